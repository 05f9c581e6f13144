"""Each fault with exactly the alerts that it makes: one cause, one alert that pages.

The same minutes are replayed to `promtool test rules` and to a real Prometheus; docs/alerts.md has
the table.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import cycle
from math import inf

import anyio

from tests.kubelet.rig import GIB
from tests.observe.machine import REPLICAS, Machine, Page
from tests.observe.rules import alerts, runbook_of
from vgpu_agent.errors import DriverError
from vgpu_agent.model.devices import device_id
from vgpu_agent.model.facts import Cordon, Reading
from vgpu_agent.model.holders import Holder, Used
from vgpu_agent.model.limits import Limited, LimitsLook, MemoryLimit

BEFORE, AFTER, LATER = 10, 70, 40
"""Minutes in which all is well, then those until every alert has fired that is to, and those in
which no other does."""

NODE = "node-a"
TARGET = {
    "job": "gpu-system/vgpu-agent",
    "instance": NODE,
    "node": NODE,
    "namespace": "gpu-system",
    "container": "agent",
    "endpoint": "metrics",
}
"""The labels that the chart's PodMonitor attaches, but for the pod."""

FIRED = 'count by (alertname) (last_over_time(ALERTS{alertstate="firing"}[2h]))'
"""Every alert that has fired, by name: those whose labels differ are several."""

Happen = Callable[[Machine], Awaitable[None]]


@dataclass(frozen=True)
class Scenario:
    """A fault in words, and the alerts that have fired by the end, each so often."""

    happen: Happen
    fault: str
    fires: tuple[str, ...]
    gpus: int = 2

    @property
    def name(self) -> str:
        return self.happen.__name__


SCENARIOS: list[Scenario] = []


def scenario(fault: str, *fires: str, gpus: int = 2) -> Callable[[Happen], Happen]:
    def add(happen: Happen) -> Happen:
        SCENARIOS.append(Scenario(happen, fault, fires, gpus))
        return happen

    return add


@cache
def pages(of: Scenario) -> tuple[Page, ...]:
    """What is scraped, minute by minute."""

    async def play() -> tuple[Page, ...]:
        machine = Machine(of.gpus)
        before = [await machine.minute() for _ in range(BEFORE)]
        await of.happen(machine)
        return (*before, *[await machine.minute() for _ in range(AFTER + LATER)])

    return anyio.run(play)


def markdown_table() -> str:
    """The table of docs/alerts.md."""
    severity = {each["alert"]: each["labels"]["severity"] for each in alerts()}
    lines = ["| what happens | alerts, in an hour |", "| --- | --- |"]
    for each in SCENARIOS:
        fired = [
            f"[{n}]({runbook_of(n).removeprefix('docs/')}) ({severity[n]})" for n in each.fires
        ]
        lines.append(f"| {each.fault} | {', '.join(fired) or 'none'} |")
    return "\n".join(lines)


# Faults of a GPU


@scenario(
    "XID 79: a GPU falls off the bus, and its MPS daemon fails; later the GPU leaves the list",
    "VgpuGpuUnhealthy",
    "VgpuGpuGone",
)
async def xid_79(machine: Machine) -> None:
    await machine.xid(0, 79, falls_off=True)
    machine.daemons.set(machine.uuids[0], down="the daemon ended", fault="its server is in FAULT")


@scenario(
    "the same on a node with one GPU: the agent ends and starts again",
    "VgpuGpuUnhealthy",
    "VgpuGpuGone",
    gpus=1,
)
async def xid_79_of_the_only_gpu(machine: Machine) -> None:
    await xid_79(machine)


@scenario(
    "an XID that needs a reset, on a node with one GPU: NVML is released again and again",
    "VgpuGpuUnhealthy",
    gpus=1,
)
async def xid_until_reset(machine: Machine) -> None:
    await machine.xid(0, 48)
    turns = cycle([True, False])

    async def release_in_turns() -> None:
        if next(turns):
            machine.node.driver_released(machine.now + 60)

    machine.after_look = release_in_turns


@scenario("uncorrectable memory errors (ECC)", "VgpuGpuUnhealthy")
async def ecc(machine: Machine) -> None:
    machine.driver.show(machine.uuids[0], Reading(uncorrectable_ecc=3))


@scenario("a GPU hangs: calls to the driver do not return", "VgpuGpuUnhealthy")
async def hang(machine: Machine) -> None:
    machine.driver.show(machine.uuids[0], Reading(hung=True, error="the driver did not answer"))


@scenario("a GPU is lost; later it leaves the list", "VgpuGpuUnhealthy", "VgpuGpuGone")
async def lost(machine: Machine) -> None:
    machine.driver.fall_off(machine.uuids[1])


@scenario("a GPU is lost while the agent is replaced", "VgpuGpuGone")
async def lost_during_an_upgrade(machine: Machine) -> None:
    machine.driver.fall_off(machine.uuids[1])
    machine.replace_pod("vgpu-agent-new")


@scenario(
    "the agent's pod is replaced while a GPU is unhealthy: one alert, which goes on",
    "VgpuGpuUnhealthy",
)
async def upgrade_during_a_fault(machine: Machine) -> None:
    await ecc(machine)
    later = machine.now + 20 * 60

    async def replace_later() -> None:
        if machine.now == later:
            machine.replace_pod("vgpu-agent-new")

    machine.before_look = replace_later


@scenario(
    "a GPU that nobody holds is put into MIG mode; its MPS daemon is still there",
    "VgpuGpuExcluded",
    "VgpuMpsReplacementNeeded",
)
async def mig(machine: Machine) -> None:
    machine.held.popitem()
    machine.driver.insert(replace(machine.driver.gpus[1], mig=True))


@scenario("XIDs of an application, one a minute", "VgpuXidsRising")
async def xids_of_an_application(machine: Machine) -> None:
    machine.before_look = partial(machine.xid, 0, 31)


@scenario("an operator cordons a GPU; then it has errors, and its MPS daemon ends for a reset")
async def cordon(machine: Machine) -> None:
    machine.node.set_cordons({machine.uuids[0]: Cordon(machine.watched.wall, "reset it")})
    await ecc(machine)
    machine.daemons.set(machine.uuids[0], down="no MPS daemon serves it")


# The node


@scenario("no driver: NVML does not answer, and the agent ends and starts again", "VgpuDriverDown")
async def no_driver(machine: Machine) -> None:
    machine.driver.fail(DriverError("NVML cannot be loaded"))


@scenario("the kubelet is away, its PodResources with it", "VgpuKubeletDisconnected")
async def kubelet_away(machine: Machine) -> None:
    machine.session = machine.be_away


@scenario(
    "another plugin for the resource takes the kubelet at once, each time",
    "VgpuKubeletDisconnected",
)
async def rival_wins(machine: Machine) -> None:
    def register_in_vain() -> None:
        machine.follow_the_list()
        machine.end_the_stream("another agent seems to serve it")

    machine.session = register_in_vain


@scenario("two agents for the resource take turns", "VgpuRegistrationUnstable")
async def rival_in_turns(machine: Machine) -> None:
    turns = cycle([True, False])

    def take_turns() -> None:
        machine.follow_the_list()
        if next(turns):
            machine.end_the_stream("the kubelet ended the stream")

    machine.session = take_turns


@scenario("the agent ends for good", "VgpuAgentDown")
async def agent_away(machine: Machine) -> None:
    machine.away = inf


@scenario("the agent's pod is replaced, all is well")
async def upgrade(machine: Machine) -> None:
    machine.replace_pod("vgpu-agent-new")


@scenario("an operator releases NVML for 10 minutes to reset a GPU")
async def release(machine: Machine) -> None:
    until = machine.now + 600

    async def released() -> None:
        if machine.now <= until:
            machine.node.driver_released(until)

    machine.after_look = released


@scenario("Allocate refused once", "VgpuAllocateRefused")
async def refusal(machine: Machine) -> None:
    machine.metrics.calls.observe_rpc("Allocate", "INVALID_ARGUMENT", 0.001)


# MPS


@scenario("the MPS daemon of one GPU ends", "VgpuMpsDown")
async def mps_daemon_dead(machine: Machine) -> None:
    machine.daemons.set(machine.uuids[0], down="no MPS daemon serves it")


@scenario("the MPS pod is away: all daemons, and who watches them", "VgpuMpsDown")
async def mps_pod_away(machine: Machine) -> None:
    machine.mps_unwatched = "`vgpu-agent mps watch` is not heard of"
    for uuid in machine.uuids:
        machine.daemons.set(uuid, generation=None, down="no MPS daemon serves it")


@scenario("an MPS daemon runs without its limits", "VgpuMpsLimitsNotInForce")
async def mps_without_limits(machine: Machine) -> None:
    machine.daemons.set(machine.uuids[0], problem="its limits are not applied yet")


@scenario("an MPS server stays in FAULT", "VgpuMpsFault")
async def mps_fault(machine: Machine) -> None:
    machine.daemons.set(machine.uuids[0], fault="its server is in FAULT")


@scenario("nobody watches the MPS daemons", "VgpuMpsUnwatched")
async def mps_unwatched(machine: Machine) -> None:
    machine.mps_unwatched = "`vgpu-agent mps watch` is not heard of"


# Who holds what


@scenario("a container uses more than its share", "VgpuContainerOverShare")
async def over_share(machine: Machine) -> None:
    holder = next(iter(machine.held))
    machine.memory[machine.uuids[0], holder] = Used(1, 12 * GIB)


def limited(machine: Machine, used: int, problem: str | None = None) -> LimitsLook:
    """The driver limits the memory of one container to 2 GiB."""
    holder, uuid = next(iter(machine.held)), machine.uuids[0]
    has = {uuid: MemoryLimit(2 * GIB, 0, used)}
    container = Limited(holder, has, {uuid: used}, problem)
    return LimitsLook(enforced=True, containers=(container,))


@scenario("the driver's limit of a container cannot be set", "VgpuMemoryLimitMissing")
async def limit_missing(machine: Machine) -> None:
    machine.limits = limited(machine, GIB, "the driver refuses")


@scenario("a container has all memory that the driver lets it have", "VgpuContainerNearLimit")
async def near_limit(machine: Machine) -> None:
    machine.limits = limited(machine, 2 * GIB)


@scenario("all vGPUs of all nodes are held", "VgpuExhausted", "VgpuNodeFull")
async def exhausted(machine: Machine) -> None:
    machine.held = {
        Holder("shop", f"batch-{number}", "main"): [device_id(uuid, n) for n in range(REPLICAS)]
        for number, uuid in enumerate(machine.uuids)
    }
