"""What the agent sees of the MPS daemon: one value for one look, real or simulated."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import anyio.to_thread

from vgpu_agent import __version__
from vgpu_agent.errors import MpsError, StoreError
from vgpu_agent.model.facts import Applied, AppliedGpu, DaemonLook
from vgpu_agent.model.rules import MpsLimits
from vgpu_agent.mps.answers import waiting_clients
from vgpu_agent.mps.applied import generation_of, read
from vgpu_agent.mps.control import Control

LOG_TAIL = 2**16
"""Bytes at the end of `control.log` in which waiting clients are looked for."""


class Daemon(Protocol):
    """A daemon that can be looked at. Neither method raises, nor blocks the loop for long."""

    async def look(self) -> DaemonLook:
        """Asks it everything."""
        ...

    def generation(self) -> str | None:
        """Which daemon is there, without asking it: cheap."""
        ...


class SimulatedDaemon:
    """The daemon of simulated GPUs, set up for so many vGPUs of each; it dies on demand."""

    def __init__(self, vgpus: Mapping[str, int], limits: MpsLimits) -> None:
        self._gpus = tuple(
            AppliedGpu(uuid, ordinal, replicas, None)
            for ordinal, (uuid, replicas) in enumerate(vgpus.items())
        )
        self._limits = limits
        self._life = 1
        self._alive = True
        self._faulty = False

    async def look(self) -> DaemonLook:
        """What a daemon of simulated GPUs says of itself."""
        generation = self.generation()
        if generation is None:
            return DaemonLook(error="the simulated MPS daemon is dead")
        applied = Applied(generation, self._limits, None, self._gpus, None, __version__)
        faulty = (1,) if self._faulty else ()
        return DaemonLook(generation=generation, applied=applied, faulty=faulty)

    def generation(self) -> str | None:
        """Each life is another daemon."""
        return f"simulated:{self._life}" if self._alive else None

    # Faults on demand

    def die(self) -> None:
        """The daemon is gone."""
        self._alive = False

    def come_back(self) -> None:
        """Another daemon is there, with its limits applied."""
        self._alive, self._life = True, self._life + 1

    def fail_server(self, *, faulty: bool) -> None:
        """A client's fault has hit the server, or is over."""
        self._faulty = faulty


class RealDaemon:
    """The daemon of the node, seen through its control program and its files."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._directories = control.directories

    async def look(self) -> DaemonLook:
        """Asks the control daemon and reads what was applied."""
        look = DaemonLook(generation=self.generation())
        try:
            look = replace(look, applied=read(self._directories.state))
        except StoreError as error:
            look = replace(look, applied_error=str(error))
        try:
            servers = await self._control.servers()
            faulty = [pid for pid in servers if await self._control.server_failed(pid)]
            clients = await self._control.clients() if servers else ()
        except MpsError as error:
            return replace(look, error=str(error))
        # The daemon may name a GPU by its ordinal.
        uuids = {str(gpu.ordinal): gpu.uuid for gpu in look.applied.gpus} if look.applied else {}
        return replace(
            look,
            faulty=tuple(faulty),
            clients=Counter(uuids.get(name, name) for name in clients),
            waiting=await anyio.to_thread.run_sync(_waiting, self._directories.log / "control.log"),
        )

    def generation(self) -> str | None:
        """See `generation_of`."""
        return generation_of(self._directories.pipe)


def _waiting(log: Path) -> int:
    """Clients of another user that wait, by the newest part of the daemon's log."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_TAIL))
            text = file.read().decode(errors="replace")
    except OSError:
        return 0
    return len(waiting_clients(text))
