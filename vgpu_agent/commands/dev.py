"""`vgpu-agent dev`: the agent, simulated GPUs and a stand-in kubelet, and what happens then.

The story follows what the kubelet observed over its socket, and by what the agent knows of who
holds what. A step that is not observed in time
ends it with a StoryError that names the step.
"""

import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio
from anyio.abc import TaskStatus

from vgpu_agent.address import Address
from vgpu_agent.agent import Agent, make_daemon, make_driver
from vgpu_agent.errors import AdmissionError, ListenError, StoryError
from vgpu_agent.gpu.simulated import SimulatedDriver
from vgpu_agent.kubelet.standin import Admitted, Observed, StandinKubelet, standin_kubelet
from vgpu_agent.model.devices import split_device_id
from vgpu_agent.model.holders import Assignment
from vgpu_agent.mps.daemon import SimulatedDaemon
from vgpu_agent.observe.web import listen
from vgpu_agent.settings import EmbeddedSettings, GpuDriverKind, Settings

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class StoryTiming:
    """Seconds in which a step has to be observed, and between two steps, for reading."""

    step: float = 6.0
    shown_for: float = 1.0


def embedded_settings(kubelet_dir: Path) -> Settings:
    """The settings of the embedded default; none comes from the environment."""
    return EmbeddedSettings(
        gpu_driver=GpuDriverKind.SIMULATED,
        kubelet_dir=kubelet_dir,
        state_directory=kubelet_dir / "state",
        metrics_address=_free_address(Address("127.0.0.1", 9408)),
        health_interval=1,
        recovery_seconds=1,
        podresources_interval=1,
    )


def _free_address(wanted: Address) -> Address:
    """The wanted address, or one with any free port where that one is taken."""
    try:
        listen(wanted).close()
    except ListenError:
        return Address(wanted.host, 0)
    return wanted


async def run_dev(
    say: Say,
    *,
    seconds: float | None = None,
    watch_gpus: bool = True,
    timing: StoryTiming = StoryTiming(),
) -> None:
    """Tells the story, then serves until cancelled, or until `seconds` after the start.

    Raises StoryError where a step was not observed, also when the time was too short for it.
    """
    with tempfile.TemporaryDirectory(prefix="vgpu-", dir=_short_directory()) as directory:
        settings = embedded_settings(Path(directory))
        driver = make_driver(settings)
        daemon = make_daemon(settings, driver)
        if not (isinstance(driver, SimulatedDriver) and isinstance(daemon, SimulatedDaemon)):
            raise TypeError("the embedded settings name simulated GPUs and MPS")
        async with (
            anyio.create_task_group() as tasks,
            standin_kubelet(settings.plugin_directory) as kubelet,
        ):
            agent = Agent(settings, driver, daemon)
            await tasks.start(partial(_run, agent, watch_gpus))
            story = Story(kubelet, driver, daemon, settings, agent, say, timing)
            with anyio.move_on_after(seconds):
                await story.run()
                say("serving until Ctrl-C" if seconds is None else f"serving until {seconds:g} s")
                await anyio.sleep_forever()
            if not story.complete:
                raise StoryError(
                    f"the time ended at step {story.step!r}: all of it takes about 20 s"
                )
            tasks.cancel_scope.cancel()


async def _run(agent: Agent, watch_gpus: bool, *, task_status: TaskStatus[None]) -> None:
    await agent.run(watch_gpus=watch_gpus, task_status=task_status)


def _short_directory() -> str | None:
    """Where the sockets' paths fit; None is the default place for temporary files."""
    return "/tmp" if len(os.fsencode(tempfile.gettempdir())) > 40 else None  # noqa: S108


class Story:
    """The steps, in order. `step` is the one that is under way."""

    def __init__(
        self,
        kubelet: StandinKubelet,
        driver: SimulatedDriver,
        daemon: SimulatedDaemon,
        settings: Settings,
        agent: Agent,
        say: Say,
        timing: StoryTiming,
    ) -> None:
        self._kubelet = kubelet
        self._driver = driver
        self._daemon = daemon
        self._settings = settings
        self._agent = agent
        self._say = say
        self._timing = timing
        self.step = "start"
        self.complete = False

    async def run(self) -> None:
        """Goes through all steps. Raises StoryError."""
        url = f"http://{self._agent.metrics_address}"
        total = self._settings.simulated_gpus * self._settings.replicas
        each = self._settings.replicas
        failing = self._agent.node.snapshot.inventory.gpus[0].gpu

        seen = await self._until("registration", lambda seen: seen.registrations == 1)
        self._say(f"kubelet: a plugin registered {seen.resource_name}")
        seen = await self._until("first list", lambda seen: seen.healthy == total)
        self._say(f"kubelet: its first list has {_count(seen)}")
        self._say(f"         look yourself: {url}/ in a browser, curl {url}/metrics, or")
        self._say(f"         vgpu-agent status --address {self._agent.metrics_address}")

        for pod, count in (("resnet-0", 1), ("bert-0", 2), ("llama-0", 5)):
            await anyio.sleep(self._timing.shown_for / 2)
            self._admitted(await self._admit(pod, count))
        await self._held_by("holders", {"resnet-0": 1, "bert-0": 2, "llama-0": 5})

        await anyio.sleep(self._timing.shown_for)
        lists = self._kubelet.observed.value.lists
        self._say(f"(GPU {failing.index} reports XID 79 and falls off the bus)")
        self._driver.xid(failing.uuid, 79, falls_off_the_bus=True)
        seen = await self._until("GPU failing", lambda seen: seen.healthy == total - each)
        if {uuid for uuid, ok in _by_gpu(seen).items() if not ok} != {failing.uuid}:
            raise self._failed("the unhealthy vGPUs are not those of the failing GPU")
        self._say(f"kubelet: {_updates(seen.lists - lists)}: now {_count(seen)}")

        await anyio.sleep(self._timing.shown_for)
        lists = seen.lists
        self._say(f"(GPU {failing.index} was reset and is enumerated again)")
        self._driver.enumerate_again(failing.uuid)
        seen = await self._until("GPU healing", lambda seen: seen.healthy == total)
        self._say(f"kubelet: {_updates(seen.lists - lists)}: now {_count(seen)}")

        await anyio.sleep(self._timing.shown_for)
        self._say("(pod bert-0 ends)")
        self._kubelet.end("bert-0")
        await self._held_by("holders after an end", {"resnet-0": 1, "llama-0": 5})

        await anyio.sleep(self._timing.shown_for)
        self._say("(the MPS daemon dies)")
        self._daemon.die()
        seen = await self._until("MPS daemon dying", lambda seen: seen.healthy == 0)
        self._say(f"kubelet: now {_count(seen)}")
        await anyio.sleep(self._timing.shown_for)
        self._say("(another MPS daemon is there, with its limits)")
        self._daemon.come_back()
        seen = await self._until("MPS daemon back", lambda seen: seen.healthy == total)
        self._say(f"kubelet: now {_count(seen)}")

        await anyio.sleep(self._timing.shown_for)
        self._say("(the kubelet stops and starts again)")
        await self._kubelet.stop()
        await self._until("stream end", lambda seen: seen.ended == 1)
        await self._kubelet.start()
        await self._until("registration again", lambda seen: seen.registrations == 2)
        seen = await self._until("list again", lambda seen: seen.healthy == total)
        self._say(f"kubelet: the plugin registered again; its list has {_count(seen)}")
        self._admitted(await self._admit("resnet-1", 1))

        self.step, self.complete = "end", True
        self._say(
            "all of it worked: registered, listed, allocated, reported who holds what, failed over,"
            " healed, did without MPS and with it again, registered again"
        )

    async def _until(self, step: str, holds: Callable[[Observed], bool]) -> Observed:
        """Waits until the kubelet has observed it."""
        self.step = step
        with anyio.move_on_after(self._timing.step):
            async for seen in self._kubelet.observed.follow():
                if holds(seen):
                    return seen
        raise self._failed(
            f"not observed within {self._timing.step:g} s; the kubelet has {self._has()}"
        )

    async def _held_by(self, step: str, expected: dict[str, int]) -> None:
        """Waits until the agent knows that these pods hold so many vGPUs, and no other any."""
        self.step = step
        held = None
        with anyio.move_on_after(self._timing.step):
            async for snapshot in self._agent.node.latest.follow():
                held = _by_pod(snapshot.holders.assignments or ())
                if held == expected:
                    pods = ", ".join(f"{pod} {count}" for pod, count in expected.items())
                    self._say(f"agent: vGPUs are held by {pods} (PodResources)")
                    return
        raise self._failed(f"not known within {self._timing.step:g} s; the agent knows of {held}")

    async def _admit(self, pod: str, count: int) -> Admitted:
        self.step = f"admission of {pod}"
        try:
            with anyio.fail_after(self._timing.step):
                return await self._kubelet.admit(pod, count)
        except (AdmissionError, TimeoutError) as error:
            raise self._failed(str(error)) from error

    def _admitted(self, pod: Admitted) -> None:
        self._say(f"kubelet: pod {pod.pod} admitted with {', '.join(pod.device_ids)}")
        for name, value in sorted(pod.environment.items()):
            self._say(f"           {name}={value}")
        for mount in pod.mounts:
            self._say(f"           mount {mount}")

    def _has(self) -> str:
        seen = self._kubelet.observed.value
        return f"{seen.registrations} registrations, {_count(seen)}"

    def _failed(self, why: str) -> StoryError:
        return StoryError(f"step {self.step!r} failed: {why}")


def _count(seen: Observed) -> str:
    total = len(seen.health or {})
    if seen.healthy == total:
        return f"{total} vGPUs, all healthy"
    return f"{total} vGPUs, {total - seen.healthy} of them unhealthy"


def _updates(count: int) -> str:
    return "one update" if count == 1 else f"{count} updates"


def _by_pod(assignments: Iterable[Assignment]) -> dict[str, int]:
    """How many vGPUs each pod holds."""
    return {each.holder.pod: len(each.device_ids) for each in assignments}


def _by_gpu(seen: Observed) -> dict[str, bool]:
    """Whether a GPU has any healthy vGPU, by UUID."""
    gpus: dict[str, bool] = {}
    for vgpu, health in (seen.health or {}).items():
        parts = split_device_id(vgpu)
        uuid = parts[0] if parts else vgpu
        gpus[uuid] = gpus.get(uuid, False) or health == "Healthy"
    return gpus
