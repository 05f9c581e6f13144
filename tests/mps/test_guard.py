"""What the node makes of the MPS daemon, as its guard sees it."""

from collections.abc import Callable
from dataclasses import replace

import anyio
import pytest

from tests.model.strategies import a_look
from vgpu_agent.gpu.simulated import simulated_gpus
from vgpu_agent.model.devices import Reason
from vgpu_agent.model.facts import DaemonLook, Scan
from vgpu_agent.model.health import Moment
from vgpu_agent.model.node import Node
from vgpu_agent.model.rules import MpsLimits, SharingRules
from vgpu_agent.model.snapshot import Driver, Mps, Rules
from vgpu_agent.mps.daemon import SimulatedDaemon
from vgpu_agent.mps.guard import MpsGuard
from vgpu_agent.observe import changes

GPUS = simulated_gpus(2, "GPU", 2**34, (0,))
ONE, TWO = (gpu.uuid for gpu in GPUS)
WELL = a_look(**{ONE: 10, TWO: 10})
APPLIED = WELL.applied


def make_node(limits: MpsLimits = MpsLimits.CLIENT, replicas: int = 10) -> Node:
    rules = Rules(SharingRules(mps_limits=limits, replicas=replicas))

    def published(before, after) -> None:
        changes.write(changes.changes(before, after, rules))

    return Node(rules, clock=lambda: Moment(1.0, 1000.0), published=published)


def see(node: Node, gpus=GPUS) -> None:
    """The driver shows these GPUs."""
    node.driver_looked(Driver("1", None), Scan("1", gpus), {})


def judged(look: DaemonLook, limits: MpsLimits = MpsLimits.CLIENT, replicas: int = 10) -> Node:
    node = make_node(limits, replicas)
    see(node)
    node.set_daemon(look)
    return node


def mps_of(node: Node) -> Mps:
    assert node.snapshot.mps is not None
    return node.snapshot.mps


def reasons(node: Node) -> list[list[Reason]]:
    return [[fault.reason for fault in shared.faults] for shared in node.snapshot.inventory.gpus]


def replicas_of(node: Node) -> list[int]:
    return [shared.replicas for shared in node.snapshot.inventory.gpus]


# What a look means


def test_a_daemon_that_answers_and_was_set_up_for_this_node_is_well():
    node = judged(WELL)
    mps = mps_of(node)
    assert (mps.up, mps.limits_in_effect, mps.problem, mps.replacement) == (True, True, None, None)
    assert reasons(node) == [[], []]
    assert replicas_of(node) == [10, 10]


@pytest.mark.parametrize(
    ("look", "problem"),
    [
        (replace(WELL, error="nobody answers"), "nobody answers"),
        (replace(WELL, applied=None), "nobody has applied the limits yet"),
        (replace(WELL, applied=None, applied_error="state is damaged"), "state is damaged"),
        (replace(WELL, generation="g2"), "the daemon is a new one"),
        (replace(WELL, generation=None), "the daemon is a new one"),
        (replace(WELL, applied=replace(APPLIED, problem="server 7 is older")), "server 7 is older"),
    ],
)
def test_every_other_daemon_gives_no_vgpu_and_says_why(look, problem):
    node = judged(look)
    assert problem in (mps_of(node).problem or "")
    assert not mps_of(node).limits_in_effect
    assert reasons(node) == [[Reason.MPS], [Reason.MPS]]


@pytest.mark.parametrize("limits", MpsLimits)
def test_for_every_kind_of_limits_the_file_must_be_of_this_daemon(limits):
    look = replace(WELL, applied=replace(APPLIED, limits=limits))
    assert mps_of(judged(look, limits)).problem is None
    assert mps_of(judged(replace(look, generation="g9"), limits)).problem is not None


def test_what_was_applied_is_served_until_the_pod_is_replaced():
    node = judged(WELL, replicas=20)
    assert mps_of(node).problem is None
    assert replicas_of(node) == [10, 10]
    assert mps_of(node).replacement == (
        "the MPS pod must be replaced: GPU 0 has 10 vGPUs instead of 20,"
        " GPU 1 has 10 vGPUs instead of 20"
    )


@pytest.mark.parametrize("applied", MpsLimits)
@pytest.mark.parametrize("wanted", MpsLimits)
def test_limits_of_the_daemons_own_come_and_go_only_with_its_pod(applied, wanted):
    mps = mps_of(judged(replace(WELL, applied=replace(APPLIED, limits=applied)), wanted))
    assert mps.problem is None
    assert mps.limits is applied
    if (applied is MpsLimits.SERVER) == (wanted is MpsLimits.SERVER):
        assert mps.replacement is None
    else:
        assert mps.replacement == (
            f"the MPS pod must be replaced: it serves VGPU_MPS_LIMITS={applied} instead of {wanted}"
        )


# A daemon that comes and goes


class Watched:
    def __init__(self) -> None:
        self.node = make_node()
        self.daemon = SimulatedDaemon({ONE: 10, TWO: 10}, MpsLimits.CLIENT)

    async def look(self) -> None:
        self.node.set_daemon(await self.daemon.look())


@pytest.fixture
def watched() -> Watched:
    return Watched()


async def becomes(node: Node, holds: Callable[[str | None], bool]) -> None:
    with anyio.fail_after(2):
        async for snapshot in node.latest.follow():
            if snapshot.mps is not None and holds(snapshot.mps.problem):
                return


async def test_a_daemon_that_dies_takes_all_vgpus_with_it_and_brings_them_back_at_once(watched):
    await watched.look()
    see(watched.node)
    assert reasons(watched.node) == [[], []]
    published = watched.node.latest.version
    watched.daemon.die()
    await watched.look()
    assert reasons(watched.node) == [[Reason.MPS], [Reason.MPS]]
    assert watched.node.latest.version - published == 1  # the daemon and all GPUs at once
    watched.daemon.come_back()
    await watched.look()
    assert reasons(watched.node) == [[], []]


async def test_a_gpu_that_appears_while_the_daemon_is_away_is_not_offered(watched):
    watched.daemon.die()
    await watched.look()
    see(watched.node, GPUS[:1])
    assert reasons(watched.node) == [[Reason.MPS]]
    see(watched.node)
    assert reasons(watched.node) == [[Reason.MPS], [Reason.MPS]]
    watched.daemon.come_back()
    await watched.look()
    assert reasons(watched.node) == [[], []]


async def test_a_server_fault_comes_and_goes(watched):
    await watched.look()
    see(watched.node)
    watched.daemon.fail_server(faulty=True)
    await watched.look()
    assert reasons(watched.node) == [[Reason.MPS_FAULT], [Reason.MPS_FAULT]]
    watched.daemon.fail_server(faulty=False)
    await watched.look()
    assert reasons(watched.node) == [[], []]


async def test_a_gpu_that_the_daemon_does_not_know_is_not_offered(watched):
    watched.daemon = SimulatedDaemon({ONE: 10}, MpsLimits.CLIENT)
    await watched.look()
    see(watched.node)
    assert reasons(watched.node) == [[], [Reason.MPS]]
    await watched.look()
    assert reasons(watched.node) == [[], [Reason.MPS]]


async def test_looks_that_find_nothing_new_publish_and_log_nothing(watched, caplog):
    see(watched.node)
    watched.daemon.die()
    watched.daemon.fail_server(faulty=True)
    await watched.look()
    assert caplog.text.count("no vGPU can be given: the simulated MPS daemon is dead") == 1
    caplog.clear()
    published = watched.node.latest.version
    for _ in range(5):
        await watched.look()
    assert watched.node.latest.version == published
    assert caplog.records == []


# The task


async def test_it_looks_by_itself_and_soon_where_the_daemon_changed(watched):
    guard = MpsGuard(watched.daemon, watched.node, glance=0.01, ask=60.0)  # the glance alone tells
    see(watched.node)
    async with anyio.create_task_group() as tasks:
        await tasks.start(guard.run)
        watched.daemon.die()
        await becomes(watched.node, lambda problem: problem is not None)
        watched.daemon.come_back()
        await becomes(watched.node, lambda problem: problem is None)
        tasks.cancel_scope.cancel()


async def test_a_daemon_that_stays_is_asked_everything_in_time(watched):
    guard = MpsGuard(watched.daemon, watched.node, glance=0.01, ask=0.05)
    see(watched.node)
    async with anyio.create_task_group() as tasks:
        await tasks.start(guard.run)
        assert reasons(watched.node) == [[], []]
        watched.daemon.fail_server(faulty=True)  # of the same generation
        with anyio.fail_after(2):
            async for snapshot in watched.node.latest.follow():
                if not any(shared.healthy for shared in snapshot.inventory.gpus):
                    break
        tasks.cancel_scope.cancel()
