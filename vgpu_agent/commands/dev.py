"""`vgpu-agent dev`: the agent, simulated GPUs and a stand-in kubelet, and what happens then.

The story is told by what the kubelet observed over its socket, and by what the agent knows of who
holds what. A step that is not observed in time ends it with a StoryError that names the step.
"""

import os
import shlex
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import anyio

from vgpu_agent.address import Address
from vgpu_agent.agent import Agent, make_daemons
from vgpu_agent.drivers import make_driver
from vgpu_agent.errors import AdmissionError, ListenError, StoryError
from vgpu_agent.gpu.simulated import SimulatedDriver
from vgpu_agent.kubelet.standin import Observed, StandinKubelet, standin_kubelet
from vgpu_agent.model.rules import MIB
from vgpu_agent.model.snapshot import Snapshot
from vgpu_agent.mps.daemon import SimulatedDaemons
from vgpu_agent.observe.listen import listen
from vgpu_agent.settings import GpuDriverKind, Settings, variable
from vgpu_agent.settings_reading import embedded

Say = Callable[[str], None]

IDLE_BYTES = 537 * MIB
"""Of a simulated GPU: what an MPS server without clients would have."""


@dataclass(frozen=True, slots=True)
class StoryTiming:
    """Seconds in which a step has to be observed, and between two steps, for reading."""

    step: float = 6.0
    shown_for: float = 1.0


def embedded_settings(kubelet_dir: Path, metrics_address: Address) -> Settings:
    """The settings of the embedded default; none comes from the environment."""
    return embedded(
        gpu_driver=GpuDriverKind.SIMULATED,
        kubelet_dir=kubelet_dir,
        state_directory=kubelet_dir / "state",
        cordon_directory=kubelet_dir / "cordoned",
        simulated_model="NVIDIA Simulated 80GB",
        simulated_memory=81559 * MIB,  # as drivers report it of a GPU with 80 GB
        metrics_address=metrics_address,
        health_interval=1,
        recovery_seconds=1,
        podresources_interval=1,
    )


def write_environment(settings: Settings) -> Path:
    """A file for a second shell to read: after it all commands find this agent."""
    names = ("gpu_driver", "kubelet_dir", "state_directory", "cordon_directory", "metrics_address")
    lines = [
        f"export {variable(name)}={shlex.quote(str(getattr(settings, name)))}" for name in names
    ]
    path = shlex.quote(str(Path(sys.executable).parent))
    file = settings.kubelet_dir / "env"
    file.write_text("\n".join([*lines, f"export PATH={path}:$PATH", ""]))
    return file


def _listen(wanted: Address) -> socket.socket:
    """A listening socket at that address, or with any free port where that one is taken."""
    try:
        return listen(wanted)
    except ListenError:
        return listen(Address(wanted.host, 0))


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
    # Where the paths of sockets fit; None is the default place.
    short = "/tmp" if len(os.fsencode(tempfile.gettempdir())) > 40 else None  # noqa: S108
    with (
        tempfile.TemporaryDirectory(prefix="vgpu-", dir=short) as directory,
        _listen(Address("127.0.0.1", 9408)) as listener,
    ):
        settings = embedded_settings(Path(directory), Address(*listener.getsockname()))
        driver = make_driver(settings)
        daemons = make_daemons(settings, driver)
        if not (isinstance(driver, SimulatedDriver) and isinstance(daemons, SimulatedDaemons)):
            raise TypeError("the embedded settings name simulated GPUs and MPS")
        async with (
            anyio.create_task_group() as tasks,
            standin_kubelet(settings.plugin_directory) as kubelet,
        ):
            agent = Agent(settings, driver, daemons)
            await tasks.start(partial(agent.run, watch_gpus=watch_gpus, listener=listener))
            story = Story(kubelet, driver, daemons, agent, say, timing, write_environment(settings))
            with anyio.move_on_after(seconds):
                await story.run()
                say("serving until Ctrl-C" if seconds is None else f"serving until {seconds:g} s")
                await anyio.sleep_forever()
            if not story.complete:
                raise StoryError(
                    f"the time ended at step {story.step!r}: all of it takes about 20 s"
                )
            tasks.cancel_scope.cancel()


@dataclass
class Story:
    """The steps, in order. `step` is the one that is under way."""

    kubelet: StandinKubelet
    driver: SimulatedDriver
    daemons: SimulatedDaemons
    agent: Agent
    say: Say
    timing: StoryTiming
    environment: Path
    step: str = "start"
    complete: bool = False
    _held: dict[str, tuple[str, ...]] = field(default_factory=dict)

    async def run(self) -> None:
        """Goes through all steps. Raises StoryError."""
        inventory = self.agent.node.snapshot.inventory
        failing = inventory.gpus[0]
        every = frozenset(inventory.device_ids)
        uuid, name = failing.gpu.uuid, f"GPU {failing.gpu.index}"
        pods = {"resnet-0": 1, "bert-0": 2, "llama-0": 5}
        # The step, what happens and how, and the vGPUs that are unhealthy then.
        changes: tuple[tuple[str, str, Callable[[], None], Iterable[str]], ...] = (
            (
                "GPU failing",
                f"{name} reports XID 79 and falls off the bus",
                partial(self.driver.xid, uuid, 79, falls_off_the_bus=True),
                failing.device_ids,
            ),
            (
                "GPU healing",
                f"{name} was reset and is enumerated again",
                partial(self.driver.enumerate_again, uuid),
                (),
            ),
            (
                "MPS daemon dying",
                f"the MPS daemon of {name} dies",
                partial(self.daemons.set, uuid, down="the simulated MPS daemon is dead"),
                failing.device_ids,
            ),
            (
                "MPS daemon back",
                "another MPS daemon is there, with its limits",
                partial(self.daemons.set, uuid, down=None),
                (),
            ),
        )

        seen = await self._until("registration", lambda seen: seen.registrations == 1)
        self.say(f"kubelet: a plugin registered {seen.resource_name}")
        seen = await self._listed("first list", every)
        self.say(f"kubelet: its first list has {_count(seen)}")
        url = f"http://{self.agent.metrics_address}"
        self.say(
            f"         look yourself: {url}/ in a browser, curl {url}/metrics, or, in a second"
        )
        self.say(f"         shell after `. {self.environment}`, vgpu-agent status and doctor")

        for pod, count in pods.items():
            await anyio.sleep(self.timing.shown_for / 2)
            await self._admit(pod, count)
        await self._held_by("holders", pods)
        await self._happens("pod bert-0 ends")
        self.kubelet.end("bert-0")
        del pods["bert-0"], self._held["bert-0"]
        self._use_memory()
        await self._held_by("holders after an end", pods)

        for step, what, act, unhealthy in changes:
            await self._happens(what)
            lists = self.kubelet.observed.value.lists
            act()
            self._use_memory()
            seen = await self._listed(step, every, unhealthy)
            updates = seen.lists - lists
            words = "one update" if updates == 1 else f"{updates} updates"
            self.say(f"kubelet: {words}: now {_count(seen)}")

        await self._happens("the kubelet stops and starts again")
        await self.kubelet.stop()
        await self._until("stream end", lambda seen: seen.ended == 1)
        await self.kubelet.start()
        await self._until("registration again", lambda seen: seen.registrations == 2)
        seen = await self._listed("list again", every)
        self.say(f"kubelet: the plugin registered again; its list has {_count(seen)}")
        await self._admit("resnet-1", 1)

        self.say("make a GPU fail, in the second shell: vgpu-agent simulate ecc --gpu 1")
        self.step, self.complete = "end", True
        self.say(
            "all of it worked: registered, listed, allocated, reported who holds what, failed over,"
            " healed, did without MPS and with it again, registered again"
        )

    async def _happens(self, what: str) -> None:
        await anyio.sleep(self.timing.shown_for)
        self.say(f"({what})")

    async def _listed(
        self, step: str, vgpus: frozenset[str], unhealthy: Iterable[str] = ()
    ) -> Observed:
        """Waits until the kubelet's list has these vGPUs, and no unhealthy ones but those."""
        expected = set(unhealthy)
        return await self._until(
            step, lambda seen: seen.devices.keys() == vgpus and seen.unhealthy == expected
        )

    async def _until(self, step: str, holds: Callable[[Observed], bool]) -> Observed:
        """Waits until the kubelet has observed it."""
        self.step = step
        observed = self.kubelet.observed
        with anyio.move_on_after(self.timing.step):
            return await observed.until(holds)
        raise self._failed(
            f"not observed within {self.timing.step:g} s; the kubelet has"
            f" {observed.value.registrations} registrations, {_count(observed.value)}"
        )

    async def _held_by(self, step: str, expected: dict[str, int]) -> None:
        """Waits until the agent knows that these pods hold so many vGPUs, and no other any."""
        self.step = step
        latest = self.agent.node.latest
        with anyio.move_on_after(self.timing.step):
            await latest.until(lambda snapshot: _by_pod(snapshot) == expected)
            pods = ", ".join(f"{pod} {count}" for pod, count in expected.items())
            self.say(f"agent: vGPUs are held by {pods} (PodResources)")
            return
        raise self._failed(
            f"not known within {self.timing.step:g} s; the agent knows of {_by_pod(latest.value)}"
        )

    async def _admit(self, pod: str, count: int) -> None:
        self.step = f"admission of {pod}"
        try:
            with anyio.fail_after(self.timing.step):
                admitted = await self.kubelet.admit(pod, count)
        except (AdmissionError, TimeoutError) as error:
            raise self._failed(str(error)) from error
        self._held[pod] = tuple(admitted.device_ids)
        self._use_memory()
        self.say(f"kubelet: pod {pod} admitted with {', '.join(admitted.device_ids)}")
        for name, value in sorted(admitted.environment.items()):
            self.say(f"           {name}={value}")
        for mount in admitted.mounts:
            self.say(f"           mount {mount}")

    def _use_memory(self) -> None:
        """Every GPU has as much memory in use as the pods on it would have."""
        inventory = self.agent.node.snapshot.inventory
        held = Counter(vgpu.split("::")[0] for vgpus in self._held.values() for vgpu in vgpus)
        for shared in inventory.gpus:
            share = shared.share_bytes(held[shared.gpu.uuid]) or 0
            self.driver.use_memory(shared.gpu.uuid, IDLE_BYTES + share * 13 // 16)

    def _failed(self, why: str) -> StoryError:
        return StoryError(f"step {self.step!r} failed: {why}")


def _count(seen: Observed) -> str:
    unhealthy = f"{len(seen.unhealthy)} of them unhealthy" if seen.unhealthy else "all healthy"
    return f"{len(seen.devices)} vGPUs, {unhealthy}"


def _by_pod(snapshot: Snapshot) -> dict[str, int]:
    """How many vGPUs each pod holds, as far as the agent knows."""
    held = snapshot.holders.assignments or ()
    return {each.holder.pod: len(each.device_ids) for each in held}
