"""What the agent sees of the MPS daemon: one value for one look, real or simulated."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import anyio.to_thread

from vgpu_agent import __version__
from vgpu_agent.errors import AppliedStateError, MpsError
from vgpu_agent.model.share import MpsLimits
from vgpu_agent.mps.applied import Applied, AppliedCard, generation_of, read
from vgpu_agent.mps.control import Client, Control, ServerStatus, waiting_clients

LOG_TAIL = 2**16
"""Bytes at the end of `control.log` in which waiting clients are looked for."""


@dataclass(frozen=True, slots=True)
class DaemonLook:
    """The daemon at one moment.

    `error` says why it does not answer, None where it does. `generation` names the daemon that
    serves the pipe directory now. `applied` is what the MPS pod says it was told, and
    `applied_error` why that cannot be understood. `faulty` are the servers whose status is FAULT.
    `clients` counts clients by the UUID of their card, `waiting` those of another user.
    """

    error: str | None = None
    generation: str | None = None
    applied: Applied | None = None
    applied_error: str | None = None
    faulty: tuple[int, ...] = ()
    clients: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    waiting: int = 0


class Daemon(Protocol):
    """A daemon that can be looked at. Neither method raises, nor blocks the loop for long."""

    async def look(self) -> DaemonLook:
        """Asks it everything."""
        ...

    def generation(self) -> str | None:
        """Which daemon is there, without asking it: cheap."""
        ...


class SimulatedDaemon:
    """The daemon of simulated cards: it knows what it was told, and dies when told to."""

    def __init__(self, cards: Mapping[str, int], limits: MpsLimits) -> None:
        self._cards = dict(cards)
        self._limits = limits
        self._life = 1
        self._alive = True
        self._faulty = False

    async def look(self) -> DaemonLook:
        """What a daemon of simulated cards says of itself."""
        if not self._alive:
            return DaemonLook(error="the simulated MPS daemon is dead")
        generation = self.generation()
        applied = Applied(
            generation=generation or "",
            limits=self._limits,
            thread_percentage=None,
            cards=tuple(
                AppliedCard(uuid, ordinal, replicas, None)
                for ordinal, (uuid, replicas) in enumerate(self._cards.items())
            ),
            problem=None,
            version=__version__,
        )
        return DaemonLook(
            generation=generation, applied=applied, faulty=(1,) if self._faulty else ()
        )

    def generation(self) -> str | None:
        """Each life is another daemon."""
        return f"simulated:{self._life}" if self._alive else None

    # Faults on demand

    def die(self) -> None:
        """The daemon is gone."""
        self._alive = False

    def come_back(self) -> None:
        """Another daemon is there, and was told its limits."""
        self._alive, self._life = True, self._life + 1

    def fail_server(self, *, faulty: bool) -> None:
        """A client's fault has hit the server, or is over."""
        self._faulty = faulty


class RealDaemon:
    """The daemon of the node, as its control program and its files tell of it."""

    def __init__(self, control: Control, directory: Path) -> None:
        self._control = control
        self._pipe = directory / "pipe"
        self._state = directory / "state"
        self._log = directory / "log" / "control.log"

    async def look(self) -> DaemonLook:
        """Asks the control daemon and reads what was applied."""
        generation = self.generation()
        try:
            applied, applied_error = read(self._state), None
        except AppliedStateError as error:
            applied, applied_error = None, str(error)
        try:
            servers = await self._control.servers()
            faulty = [
                pid
                for pid in servers
                if await self._control.server_status(pid) is ServerStatus.FAULT
            ]
            clients = await self._control.clients() if servers else ()
        except MpsError as error:
            return DaemonLook(str(error), generation, applied, applied_error)
        waiting = await anyio.to_thread.run_sync(_waiting, self._log)
        return DaemonLook(
            None,
            generation,
            applied,
            applied_error,
            tuple(faulty),
            _by_card(clients, applied),
            waiting,
        )

    def generation(self) -> str | None:
        """See `generation_of`."""
        return generation_of(self._pipe)


def _waiting(log: Path) -> int:
    """Clients of another user that wait, as the newest part of the daemon's log tells."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_TAIL))
            text = file.read().decode(errors="replace")
    except OSError:
        return 0
    return len(waiting_clients(text))


def _by_card(clients: Iterable[Client], applied: Applied | None) -> Mapping[str, int]:
    """Clients by UUID; the daemon may tell a card by its ordinal, which `applied` knows."""
    uuids = {str(card.ordinal): card.uuid for card in applied.cards} if applied else {}
    named = (client.device or "" for client in clients)
    return Counter(uuids.get(name, name) for name in named)
