"""What the agent sees of the MPS daemons: one value for one look, real or simulated.

The agent asks no daemon: it reads what `mps watch` wrote, and checks that the daemons still live.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import anyio
from anyio.abc import TaskStatus

from vgpu_agent import store
from vgpu_agent.errors import Once, StoreError
from vgpu_agent.model.facts import AppliedGpu, DaemonLook, MpsLook
from vgpu_agent.model.node import Node
from vgpu_agent.model.rules import SharingRules
from vgpu_agent.mps import state
from vgpu_agent.mps.directories import Directories
from vgpu_agent.mps.state import State
from vgpu_agent.store import since_boot
from vgpu_agent.threads import in_thread

log = logging.getLogger(__name__)

STALE = 30.0
"""Seconds without a word of `mps watch` after which it counts as away."""


class Daemons(Protocol):
    """The MPS daemons of a node."""

    async def look(self) -> MpsLook:
        """What is known of them now. Never raises, nor blocks the loop for long."""
        ...


class SimulatedDaemons:
    """Those of simulated GPUs, set up for so many vGPUs of each; each fails on demand."""

    def __init__(self, vgpus: Mapping[str, int], rules: SharingRules) -> None:
        self._rules = rules
        self._looks: dict[str, DaemonLook] = {}
        for uuid, replicas in vgpus.items():
            name = rules.daemon_of(uuid)
            known = self._looks.get(name, DaemonLook(generation="simulated:1"))
            gpu = AppliedGpu(uuid, len(known.gpus), replicas, None)
            self._looks[name] = replace(known, gpus=(*known.gpus, gpu))

    async def look(self) -> MpsLook:
        """See `Daemons`."""
        return MpsLook(None, self._rules.mps_limits, dict(self._looks))

    # Faults on demand, of the daemon of a GPU

    def set(self, uuid: str, **fields: str | None) -> None:
        """Fields of its look (`DaemonLook`), such as `down` and `fault`; None ends them."""
        name = self._rules.daemon_of(uuid)
        self._looks[name] = replace(self._looks[name], **fields)  # type: ignore[arg-type]


class RealDaemons:
    """The daemons of the node, by what `mps watch` says of them and by their files.

    Where there is a watcher, it is said how GPUs are divided.
    """

    def __init__(self, directories: Directories, rules: SharingRules) -> None:
        self._directories = directories
        self._state = store.Said(directories.state, state.read)
        self._divided = store.Said(directories.division, store.read)
        self._division = state.division(rules)
        self._trouble = Once(log)

    async def look(self) -> MpsLook:
        """See `Daemons`."""
        return await in_thread(self._look)

    def _look(self) -> MpsLook:
        try:
            found = self._state.read()
        except StoreError as error:
            return MpsLook(str(error))
        if found is None:
            return MpsLook(
                "nobody has applied the limits yet: `vgpu-agent mps watch` does, in the MPS pod"
            )
        self._say_division()
        daemons = {name: self._alive(name, found) for name in found.daemons}
        away = since_boot() - found.beat > STALE
        unwatched = (
            "`vgpu-agent mps watch` is not heard of: see it in the MPS pod" if away else None
        )
        return MpsLook(None, found.limits, daemons, unwatched)

    def _say_division(self) -> None:
        try:
            if self._divided.is_due(self._division):
                self._divided.say(self._division, self._division)
            self._trouble.warn()
        except StoreError as error:
            self._trouble.warn(f"{error}: how GPUs are divided changes only with the MPS pod")

    def _alive(self, name: str, found: State) -> DaemonLook:
        """What was seen of a daemon, unless it is gone or another one is there since."""
        look = found.daemons[name].look
        pipe = self._directories.daemon(name).pipe
        generation = state.generation_of(pipe)
        if generation == look.generation:
            return look
        if generation is None:
            return replace(look, generation=None, down=state.absence(pipe))
        problem = "the daemon is a new one, and its limits are not applied yet"
        return replace(look, generation=generation, down=None, problem=problem)


@dataclass
class MpsGuard:
    """Looks at the daemons every `interval` seconds, and hands what it finds to the node.

    vGPUs are healthy only while the limits of their daemon are in effect; what a look means is
    decided by the node.
    """

    daemons: Daemons
    node: Node
    interval: float = 1.0

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Runs until cancelled; started after the first look."""
        self.node.set_mps(await self.daemons.look())
        task_status.started()
        while True:
            await anyio.sleep(self.interval)
            self.node.set_mps(await self.daemons.look())
