"""`vgpu-agent mps watch`: tells the MPS daemon its limits, and says in `state` whether they hold.

It starts and ends nothing: the daemon is the kubelet's, servers are the daemon's. Set-default
commands reach only servers that start later, so limits are in force when they read back right and
every running server is younger than they are. A watcher that comes back takes over what the one
before it applied, or every server would seem too old.
"""

import fcntl
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import anyio
import anyio.to_thread

from vgpu_agent.errors import DriverError, MpsError, MpsRefusedError, MpsSetupError
from vgpu_agent.model.share import MIB, MpsLimits
from vgpu_agent.mps import applied, processes
from vgpu_agent.mps.applied import Applied, AppliedCard
from vgpu_agent.mps.control import Control, same_limit

log = logging.getLogger(__name__)

Measure = Callable[[str], Mapping[int, int]]
"""Bytes of a card, by its UUID, that each process has, by PID. May raise DriverError."""

_BACK_OFF = (0.5, 1.0, 2.0, 5.0, 10.0)
"""Seconds from one failed look at the daemon to the next; a new daemon ends them."""

_RESTARTS = 3
_RESTARTS_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class WatchPlan:
    """What the daemon is to be told.

    Under `server` the cards have the memory limit of one vGPU and `thread_percentage` is what one
    vGPU gets, None for 100. Otherwise both are open, and the cards have None. `version` is that of
    this program.
    """

    limits: MpsLimits
    thread_percentage: int | None
    cards: tuple[AppliedCard, ...]
    version: str


@dataclass(frozen=True, slots=True)
class WatchFiles:
    """`state` is written for the agent; `lock` is held, and remembers what was applied when."""

    state: Path
    lock: Path


async def watch(
    plan: WatchPlan,
    control: Control,
    files: WatchFiles,
    *,
    measure: Measure | None = None,
    poll_seconds: float = 0.5,
    look_seconds: float = 5,
) -> None:
    """Watches until cancelled. Raises MpsSetupError where another watcher runs.

    `measure` tells, in a worker thread, how many bytes of a card each process has; with it the
    memory of a server itself is published, once one runs. Whether there is a new daemon is seen
    every `poll_seconds`; all else is asked for every `look_seconds`.
    """
    with _only_one(files.lock) as memory:
        watcher = _Watcher(plan, control, files.state, memory, measure)
        failures = 0
        while True:
            generation = applied.generation_of(control.pipe_directory)
            wait = look_seconds
            if await watcher.look():
                failures = 0
            else:
                wait = _BACK_OFF[min(failures, len(_BACK_OFF) - 1)]
                failures += 1
            # Slept in polls: a new daemon is told at once.
            until = processes.now() + wait
            while processes.now() < until:
                await anyio.sleep(poll_seconds)
                if applied.generation_of(control.pipe_directory) != generation:
                    failures = 0
                    break


@dataclass(frozen=True, slots=True)
class _Applied:
    """When the defaults of a daemon were set, in seconds since the boot, and from what plan."""

    generation: str
    plan: object
    since: float


class _Memory:
    """What was applied, in the file that is held. A damaged one is no memory at all."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def load(self) -> _Applied | None:
        try:
            return _Applied(**json.loads(os.pread(self._descriptor, 2**20, 0)))
        except (ValueError, TypeError):
            return None

    def save(self, what: _Applied) -> None:
        """Over the old one, in place: the lock is on this very file."""
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(asdict(what)).encode(), 0)


@contextmanager
def _only_one(lock: Path) -> Iterator[_Memory]:
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise MpsSetupError(
            f"{lock} cannot be opened ({error.strerror}): `vgpu-agent mps prepare` makes its"
            " directory; run this container as root, with that directory mounted writable"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MpsSetupError(
                f"another `vgpu-agent mps watch` holds {lock}: one watches a daemon; remove the"
                " second MPS pod of this node, or wait for the old one to end"
            ) from None
        yield _Memory(descriptor)
    finally:
        os.close(descriptor)


class _Watcher:
    """One daemon after the other.

    Its state: what was applied to which daemon, what was read back then, what was last logged, and
    when daemons came.
    """

    def __init__(
        self,
        plan: WatchPlan,
        control: Control,
        state: Path,
        memory: _Memory,
        measure: Measure | None,
    ) -> None:
        cards = tuple(
            replace(card, memory_limit_bytes=_whole_mib(card.memory_limit_bytes))
            for card in plan.cards
        )
        self._plan = replace(plan, cards=cards)
        self._plan_words = json.loads(json.dumps([asdict(card) for card in cards]))
        self._plan_words.append([plan.limits.value, plan.thread_percentage])
        self._control = control
        self._state = state
        self._memory = memory
        self._measure = measure
        self._applied = memory.load()
        self._after_apply: _Defaults | None = None
        self._told = ""
        self._generation: str | None = None
        self._came: deque[float] = deque(maxlen=_RESTARTS)

    async def look(self) -> bool:
        """Looks at the daemon, tells it what it does not know, writes `state` if it changed.

        False where that was not possible, which is logged once, and tried again.
        """
        generation = applied.generation_of(self._control.pipe_directory)
        self._count(generation)
        try:
            published = self._published()
            found = await self._measured(await self._look(generation or ""), published)
            now = applied.generation_of(self._control.pipe_directory)
            if generation is None or now != generation:
                return False  # it was replaced meanwhile: what was found is of nobody
            if found != published:
                applied.write(self._state, found)
        except MpsError as error:
            self._tell(str(error))
            return False
        except OSError as error:
            self._tell(
                f"{self._state} cannot be written ({error}): mount its directory writable into this"
                " container, and run it as root"
            )
            return False
        self._tell(found.problem or f"limits are in force: {_words(found)}")
        return True

    async def _measured(self, found: Applied, published: Applied | None) -> Applied:
        """With what a server of this daemon has of each card: measured once, then kept."""
        known: dict[str, int | None] = {}
        if published is not None and published.generation == found.generation:
            known = {card.uuid: card.server_bytes for card in published.cards}
        if self._measure is not None and None in [known.get(card.uuid) for card in found.cards]:
            servers = await self._control.servers()
            for card in found.cards if servers else ():
                try:
                    used = await anyio.to_thread.run_sync(self._measure, card.uuid)
                except DriverError as error:
                    log.info("the memory of the MPS server is not known: %s", error)
                    break
                known[card.uuid] = sum(used.get(pid, 0) for pid in servers) or None
        cards = tuple(replace(card, server_bytes=known.get(card.uuid)) for card in found.cards)
        return replace(found, cards=cards)

    def _published(self) -> Applied | None:
        try:
            return applied.read(self._state)
        except MpsError:
            return None  # a damaged one is written anew

    async def _look(self, generation: str) -> Applied:
        """What holds now; a refusal is a problem of this daemon. Raises MpsError and OSError."""
        try:
            return await self._judge(generation)
        except MpsRefusedError as error:
            return self._result(generation, _Defaults(None, ()), str(error))

    async def _judge(self, generation: str) -> Applied:
        defaults = await self._read_back()
        known = (
            self._applied is not None
            and self._applied.generation == generation
            and self._applied.plan == self._plan_words
        )
        problem: str | None
        if self._plan.limits is not MpsLimits.SERVER:
            problem = self._not_open(defaults)
            return self._result(generation, defaults, problem)
        # Told again only when that can change something: not all that is told must be taken.
        if not known or (self._differs(defaults) and defaults != self._after_apply):
            await self._apply()
            self._applied = _Applied(generation, self._plan_words, processes.now())
            self._memory.save(self._applied)
            defaults = self._after_apply = await self._read_back()
        problem = self._differs(defaults) or await self._older(self._applied)
        return self._result(generation, defaults, problem)

    async def _apply(self) -> None:
        await self._control.set_default_thread_percentage(self._plan.thread_percentage or 100)
        for card in self._plan.cards:
            if card.memory_limit_bytes is not None:
                await self._control.set_default_memory_limit(card.ordinal, card.memory_limit_bytes)

    async def _read_back(self) -> "_Defaults":
        percentage = await self._control.default_thread_percentage()
        limits = [await self._control.default_memory_limit(card.ordinal) for card in self._cards]
        return _Defaults(percentage, tuple(limits))

    @property
    def _cards(self) -> tuple[AppliedCard, ...]:
        return self._plan.cards

    def _not_open(self, defaults: "_Defaults") -> str | None:
        """The problem where the daemon has limits of its own, which bind every client's."""
        found = []
        if defaults.percentage != 100:
            found.append(f"{defaults.percentage} % of the threads")
        found += [
            f"{limit // MIB} MiB on card {card.ordinal}"
            for card, limit in zip(self._cards, defaults.limits, strict=True)
            if limit is not None
        ]
        if not found:
            return None
        return (
            f"the MPS daemon has limits of its own ({', '.join(found)}), but VGPU_MPS_LIMITS is"
            f" {self._plan.limits}: drain the node and delete its MPS pod"
        )

    def _differs(self, defaults: "_Defaults") -> str | None:
        """The problem where the daemon does not say what it was told."""
        wanted = self._plan.thread_percentage or 100
        if defaults.percentage != wanted:
            return (
                f"the MPS daemon was told {wanted} % of the threads and says"
                f" {defaults.percentage}: see its control.log"
            )
        for card, limit in zip(self._cards, defaults.limits, strict=True):
            if not same_limit(card.memory_limit_bytes, limit):
                return (
                    f"the MPS daemon was told {_mib(card.memory_limit_bytes)} for card"
                    f" {card.ordinal} ({card.uuid}) and says {_mib(limit)}: see its control.log"
                )
        return None

    async def _older(self, since: _Applied | None) -> str | None:
        """The problem where a server was started before the limits were set."""
        for pid in await self._control.servers():
            process = processes.find(pid)
            if process is None:
                if pid not in await self._control.servers():
                    continue  # it has just ended
                return (
                    f"MPS server {pid} is not in /proc, so its age is unknown: run the MPS pod with"
                    " hostPID: true"
                )
            if since is None or process.started < since.since:
                return (
                    f"MPS server {pid} is older than the limits: its clients have none until it"
                    " ends; drain the node and delete its MPS pod"
                )
        return None

    def _result(self, generation: str, defaults: "_Defaults", problem: str | None) -> Applied:
        """What is published: the limits that were read back, exactly as set if they can be."""
        cards = tuple(
            card
            if same_limit(card.memory_limit_bytes, limit)
            else replace(card, memory_limit_bytes=limit)
            for card, limit in zip(self._cards, defaults.limits, strict=bool(defaults.limits))
        )
        percentage = None if defaults.percentage == 100 else defaults.percentage
        return Applied(
            generation, self._plan.limits, percentage, cards, problem, self._plan.version
        )

    def _count(self, generation: str | None) -> None:
        """Tells of a daemon that does not stay."""
        if generation is None or generation == self._generation:
            return
        self._generation = generation
        self._came.append(processes.now())
        if len(self._came) == _RESTARTS and self._came[-1] - self._came[0] < _RESTARTS_SECONDS:
            log.warning(
                "the MPS daemon was started %d times within %.0f s: see the log of its container"
                " and control.log in %s; another MPS daemon on the node, or cards that another"
                " process holds, end it",
                _RESTARTS,
                self._came[-1] - self._came[0],
                self._control.log_directory,
            )

    def _tell(self, text: str) -> None:
        """One line for each change."""
        if text != self._told:
            self._told = text
            level = logging.INFO if text.startswith("limits are") else logging.WARNING
            log.log(level, "%s", text)


@dataclass(frozen=True, slots=True)
class _Defaults:
    """The daemon's defaults: threads in percent, memory in bytes for each card of the plan."""

    percentage: int | None
    limits: tuple[int | None, ...]


def _whole_mib(limit: int | None) -> int | None:
    return None if limit is None else limit // MIB * MIB


def _mib(limit: int | None) -> str:
    return "no limit" if limit is None else f"{limit // MIB} MiB"


def _words(found: Applied) -> str:
    threads = f"{found.thread_percentage or 100} % of the threads"
    cards = ", ".join(
        f"{_mib(card.memory_limit_bytes)} on card {card.ordinal}" for card in found.cards
    )
    return f"{found.limits}, {threads}, {cards or 'no card'}"
