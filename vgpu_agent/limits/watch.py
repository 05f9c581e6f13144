"""Who looks at the limits: the agent itself, or the container beside it that sets them."""

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Never, TypeVar

import anyio
from anyio.abc import TaskStatus

from vgpu_agent import store
from vgpu_agent.errors import DriverError, Once, StoreError
from vgpu_agent.limits.look import Looker
from vgpu_agent.model.limits import LimitsLook, Shares, shares
from vgpu_agent.model.node import Node
from vgpu_agent.model.snapshot import Snapshot
from vgpu_agent.pace import next_turn
from vgpu_agent.store import since_boot
from vgpu_agent.threads import in_thread

log = logging.getLogger(__name__)

STALE = 75.0
"""Seconds without a word of the container that enforces limits after which it counts as away."""

FIRST = 0.1
"""Seconds between two looks until the first one has news."""

RETRY = 5.0
"""Seconds until a driver that does not start is tried again."""

RARELY = 60.0
"""The same, of a node whose driver or cgroups cannot limit memory."""

PATIENT_SCAN = 0.5
"""Seconds that GPUs have which do not answer at once, when all are looked at."""

PATIENCE = 5.0
"""Seconds that a container has which starts with the agent."""

AGAIN = 1.0
"""Seconds between a look after a sign of a change and the next: time stamps of files are coarse."""

INTERVAL = 20.0
"""Seconds between two looks where there is no sign of a change."""

BEAT = 30.0
"""Seconds after which the container that enforces limits says again what has not changed."""


# The two files between the agent and that container, in VGPU_STATE_DIRECTORY

FORMAT = 1

MAX_BYTES = 16 * 2**20
"""Most bytes of a file: 1,000 containers, each with a long reason on 8 GPUs, take some 3 MiB."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the agent says: how GPUs are divided (`Shares`).

    `released_until`: NVML is to be closed until then, in seconds since the epoch; 0 where not.
    """

    shares: Mapping[str, tuple[int, ...]]
    released_until: float = 0.0
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class Seen:
    """What the enforcing container says. `beat`: when, in seconds since the boot."""

    beat: float
    look: LimitsLook
    format: int = FORMAT


T = TypeVar("T", Wanted, Seen)


def said(kind: type[T], directory: Path) -> store.Said[T]:
    """One of the files."""
    read = partial(store.read_as, kind, limit=MAX_BYTES, form=FORMAT)
    return store.Said(directory / f"limits-{kind.__name__.lower()}", read)


Source = Callable[[Snapshot], Awaitable[LimitsLook | None]]
"""Says what is so now; None where that is what was said last. Never raises."""


@dataclass
class Paced:
    """Looks where there is a sign that something has changed, and every `INTERVAL` seconds.

    After a sign it looks twice: what changes in the same moment leaves no other one. A node that
    cannot have limits at all is looked at every `RARELY` seconds.
    """

    looker: Looker
    _signs: object = None
    _next: float = float("-inf")
    _able: bool = True
    _again: bool = False

    async def look(self, of: Shares) -> LimitsLook | None:
        """None where it is not time to look."""
        now, signs = self.looker.clock(), (of, self.looker.finder.signs() if self._able else None)
        if signs == self._signs and not self.looker.pending and now < self._next:
            return None
        new = signs != self._signs
        found = await self.looker.look(of, afresh=new or self._again)
        self._able = found.error is None or self.looker.unsure
        self._again, wait = new, AGAIN if new else INTERVAL
        self._signs = signs if self._able else (of, None)
        self._next = now + (wait if self._able else RARELY)
        return found

    async def own_look(self, snapshot: Snapshot) -> LimitsLook | None:
        """The agent looks by itself, and sets nothing: a `Source`."""
        if snapshot.driver.up:
            return await self.look(shares(snapshot.inventory.gpus))
        # What was seen before stays true.
        return LimitsLook(error=snapshot.driver.error) if snapshot.limits is None else None


class Enforced:
    """The container `limits` looks, and sets what is missing. It is said how GPUs are divided.

    For `patience` seconds one that starts with the agent is not missed.
    """

    def __init__(self, directory: Path, patience: float = PATIENCE) -> None:
        self._patient_until = since_boot() + patience
        self._seen, self._wanted = said(Seen, directory), said(Wanted, directory)

    async def look(self, snapshot: Snapshot) -> LimitsLook | None:
        """A `Source`."""
        found = {uuid: tuple(each) for uuid, each in shares(snapshot.inventory.gpus).items()}
        wanted = Wanted(found, snapshot.driver.released_until or 0.0)
        return await in_thread(self._look, wanted)

    def _look(self, wanted: Wanted) -> LimitsLook | None:
        why = _AWAY
        try:
            if self._wanted.is_due(wanted):
                self._wanted.say(asdict(wanted), wanted)
            seen = self._seen.read()
            # What an earlier boot left there has a time that has not come yet.
            if seen is not None and 0 <= since_boot() - seen.beat <= STALE:
                return seen.look
        except StoreError as error:  # perhaps another version wrote it, which is replaced now
            why = str(error)
        if since_boot() < self._patient_until:
            return None
        return LimitsLook(error=why, enforced=True)


_AWAY = "the container `limits`, which sets them, is not heard of: see its log"
_RELEASED = LimitsLook(error="NVML is released, for a reset of GPUs", enforced=True)


@dataclass
class LimitsWatch:
    """Hands what is known of the limits to the node, every `interval` seconds where it is new.

    The first news are waited for, `patience` seconds at most. `certain` blocks, and says whether
    the container toolkit is known to set limits.
    """

    source: Source
    node: Node
    certain: Callable[[], bool] | None = None
    interval: float = 1.0
    patience: float = 1.0

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> Never:
        """Runs until cancelled; started after the first look."""
        with anyio.move_on_after(self.patience):
            while not await self._look():  # noqa: ASYNC110 - a file tells nobody that it changed
                await anyio.sleep(FIRST)
        if self.node.snapshot.limits is None:  # no vGPU is given as if there were no question
            self.node.set_limits(LimitsLook(error="they could not be looked at yet"))
        task_status.started()
        while True:
            await next_turn(self.interval)
            await self._look()

    async def _look(self) -> bool:
        """Whether there is news."""
        found = await self.source(self.node.snapshot)
        if found is not None and self.certain is not None:
            certain = await in_thread(self.certain)
            found = replace(found, certain=certain)
        if found is not None:
            self.node.set_limits(found)
        return found is not None


# In the container that enforces limits


@dataclass
class Enforcer:
    """Sets limits as the agent wants them, and says what it sees, until it is cancelled.

    It looks for signs of a change every `poll` seconds. `clock` is that of the node, in seconds
    since the epoch.
    """

    looker: Looker
    directory: Path
    poll: float = 0.75
    clock: Callable[[], float] = time.time
    _scanned: bool = False
    _released: bool = True
    _look: LimitsLook | None = None

    def __post_init__(self) -> None:
        self._seen, self._wanted = said(Seen, self.directory), said(Wanted, self.directory)
        self._none, self._unheard = Once(log), Once(log)

    async def run(self) -> Never:
        """Runs until cancelled."""
        paced = Paced(self.looker)
        async with self.looker.driver:
            while True:
                wait = self.poll
                try:
                    wanted = await in_thread(self._wanted.read)
                    look = await self._new_look(paced, wanted)
                except (StoreError, DriverError) as error:
                    look = LimitsLook(error=str(error), enforced=True)
                    wait = RETRY if isinstance(error, DriverError) else self.poll
                await self._say(look)
                await anyio.sleep(wait)

    async def _new_look(self, paced: Paced, wanted: Wanted | None) -> LimitsLook | None:
        """Raises DriverError."""
        driver = self.looker.driver
        if wanted is None:
            return LimitsLook(error="the agent has not said how GPUs are divided", enforced=True)
        if wanted.released_until > self.clock():
            if not self._released:  # a GPU is not reset while anybody has it open
                self._released = await driver.release()
                self._scanned = False
            return _RELEASED if self._look is None else None
        if not self._scanned:
            self._released = False  # a scan that fails may leave it open, too
            await driver.scan(patience=PATIENT_SCAN)
            self._scanned = True
        await self.looker.end_guarantees()
        look = await paced.look(wanted.shares)
        if look is not None and look.gpus:
            self._scanned = False  # perhaps its handle is an old one
        return look

    async def _say(self, look: LimitsLook | None) -> None:
        """Writes what is new, and now and then what is not."""
        self._look = look = look or self._look
        if look is None or not self._seen.is_due(look, BEAT):
            return
        self._none.warn(look.error and f"no memory limits: {look.error}")
        data = asdict(Seen(since_boot(), look))
        try:
            await in_thread(self._seen.say, data, look)
        except StoreError as error:
            self._unheard.warn(f"{error}: the agent takes this container for gone")
        else:
            self._unheard.warn()
