"""`vgpu-agent mps watch`: sets the limits of the MPS daemon, and says in `state` what is in effect.

It starts and ends nothing: the daemon is the kubelet's, servers are the daemon's. Set-default
commands reach only servers that start later, so limits are in effect when they read back right and
every running server is younger than they are. A watcher that comes back takes over what the one
before it applied, or every server would seem too old.
"""

import fcntl
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import anyio
import anyio.to_thread

from vgpu_agent import store
from vgpu_agent.errors import DriverError, MpsError, MpsRefusedError, MpsSetupError, StoreError
from vgpu_agent.model.facts import Applied
from vgpu_agent.model.rules import MpsLimits
from vgpu_agent.mps import answers, applied, processes
from vgpu_agent.mps.control import Control, Defaults

log = logging.getLogger(__name__)

Measure = Callable[[str], Mapping[int, int]]
"""Bytes of a GPU, by its UUID, that each process has, by PID. May raise DriverError."""

_BACK_OFF = (0.5, 1.0, 2.0, 5.0, 10.0)
"""Seconds from one failed look at the daemon to the next; a new daemon ends them."""

_RESTARTS = 3
_RESTARTS_SECONDS = 60.0


async def watch(
    plan: Applied,
    control: Control,
    *,
    measure: Measure | None = None,
    poll_seconds: float = 0.5,
    look_seconds: float = 5,
) -> None:
    """Watches until cancelled. Raises MpsSetupError where another watcher runs.

    `plan` is what is to be in effect, whatever the generation of the daemon. `measure` says, in a
    worker thread, how many bytes of a GPU each process has; with it the memory of a server itself
    is published, once one runs. Whether there is a new daemon is seen every `poll_seconds`; all
    else is asked for every `look_seconds`.
    """
    with _only_one(control.directories.watch):
        watcher = _Watcher(plan, control, measure)
        starts: deque[float] = deque(maxlen=_RESTARTS)
        failures, last = 0, None
        while True:
            generation = applied.generation_of(control.directories.pipe)
            if generation not in (None, last):
                last = generation
                starts.append(processes.now())
                _warn_of_restarts(starts, control.directories.log)
            if await watcher.look(generation):
                failures, wait = 0, look_seconds
            else:
                wait = _BACK_OFF[min(failures, len(_BACK_OFF) - 1)]
                failures += 1
            # Slept in polls: a new daemon gets its limits at once.
            until = processes.now() + wait
            while processes.now() < until:
                await anyio.sleep(poll_seconds)
                if applied.generation_of(control.directories.pipe) != generation:
                    failures = 0
                    break


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
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
        yield
    finally:
        os.close(descriptor)


def _warn_of_restarts(starts: Sequence[float], logs: Path) -> None:
    took = starts[-1] - starts[0]
    if len(starts) == _RESTARTS and took < _RESTARTS_SECONDS:
        log.warning(
            "the MPS daemon was started %d times within %.0f s: see the log of its container and"
            " control.log in %s; another MPS daemon on the node, or GPUs that another process"
            " holds, end it",
            _RESTARTS,
            took,
            logs,
        )


@dataclass(frozen=True, slots=True)
class _Memory:
    """When the defaults of a daemon were set, in seconds since the boot, and to what."""

    generation: str
    defaults: str
    since: float


class _Watcher:
    """One daemon after the other: what was applied to which, and what was read back then."""

    def __init__(self, plan: Applied, control: Control, measure: Measure | None) -> None:
        self._plan = plan
        limits = {gpu.ordinal: gpu.memory_limit_bytes for gpu in plan.gpus}
        self._wanted = Defaults(plan.thread_percentage or 100, limits)
        self._control = control
        self._measure = measure
        self._state = control.directories.state
        self._memory: _Memory | None = None
        with suppress(StoreError):  # a damaged file is no memory at all
            self._memory = store.read_as(_Memory, control.directories.watch_memory)
        self._after_set: Defaults | None = None
        self._said = ""

    async def look(self, generation: str | None) -> bool:
        """Looks at the daemon, sets what it does not know, writes `state` if it changed.

        Whether all of it could be done. Where the daemon was replaced meanwhile it could not: what
        was found is of nobody.
        """
        try:
            published = self._published()
            found = await self._found(generation or "")
            found = await self._with_server_bytes(found, published)
            now = applied.generation_of(self._control.directories.pipe)
            if generation is None or now != generation:
                return False
            if found != published:
                applied.write(self._state, found)
        except MpsError as error:
            self._say(logging.WARNING, str(error))
            return False
        except StoreError as error:
            advice = "mount its directory writable into this container, and run it as root"
            self._say(logging.WARNING, f"{error}: {advice}")
            return False
        if found.problem is not None:
            self._say(logging.WARNING, found.problem)
        else:
            self._say(logging.INFO, f"limits are in effect: {found.limits}, {self._wanted}")
        return True

    def _say(self, level: int, text: str) -> None:
        if text != self._said:
            log.log(level, "%s", text)
            self._said = text

    def _published(self) -> Applied | None:
        try:
            return applied.read(self._state)
        except StoreError:
            return None  # a damaged one is replaced

    async def _found(self, generation: str) -> Applied:
        """What is in effect now; a refusal is a problem of this daemon.

        Raises MpsError and StoreError.
        """
        try:
            defaults = await self._control.defaults(self._wanted.memory_limits)
            if self._plan.limits is MpsLimits.SERVER:
                if self._to_be_set(generation, defaults):
                    defaults = await self._set(generation)
                problem = self._mismatch(defaults) or await self._older()
            else:
                problem = self._mismatch(defaults)
        except MpsRefusedError as error:
            defaults, problem = self._wanted, str(error)
        return self._applied(generation, defaults, problem)

    def _to_be_set(self, generation: str, defaults: Defaults) -> bool:
        """Whether setting the defaults can change something: not all that is set must be taken."""
        done = self._memory and (self._memory.generation, self._memory.defaults)
        if done != (generation, str(self._wanted)):
            return True
        return self._mismatch(defaults) is not None and defaults != self._after_set

    async def _set(self, generation: str) -> Defaults:
        """Sets the defaults, and remembers when; what is read back."""
        await self._control.set_defaults(self._wanted)
        self._memory = _Memory(generation, str(self._wanted), processes.now())
        store.write(self._control.directories.watch_memory, asdict(self._memory), mode=0o600)
        self._after_set = await self._control.defaults(self._wanted.memory_limits)
        return self._after_set

    def _mismatch(self, defaults: Defaults) -> str | None:
        """The problem where the daemon has other defaults than it should."""
        other = ", ".join(self._wanted.differences(defaults))
        if not other:
            return None
        if self._plan.limits is MpsLimits.SERVER:
            return f"the MPS daemon was set to {self._wanted} and says {other}: see its control.log"
        return (  # they bind every client
            f"the MPS daemon has limits of its own ({other}), but VGPU_MPS_LIMITS is"
            f" {self._plan.limits}: drain the node and delete its MPS pod"
        )

    async def _older(self) -> str | None:
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
            if self._memory is None or process.started < self._memory.since:
                return (
                    f"MPS server {pid} is older than the limits: its clients have none until it"
                    " ends; drain the node and delete its MPS pod"
                )
        return None

    def _applied(self, generation: str, defaults: Defaults, problem: str | None) -> Applied:
        """What is published: the limits that were read back, exactly as set if they can be."""
        gpus = []
        for gpu in self._plan.gpus:
            limit = defaults.memory_limits[gpu.ordinal]
            same = answers.same_limit(gpu.memory_limit_bytes, limit)
            gpus.append(gpu if same else replace(gpu, memory_limit_bytes=limit))
        percentage = None if defaults.thread_percentage == 100 else defaults.thread_percentage
        return replace(
            self._plan,
            generation=generation,
            thread_percentage=percentage,
            gpus=tuple(gpus),
            problem=problem,
        )

    async def _with_server_bytes(self, found: Applied, published: Applied | None) -> Applied:
        """With what a server of this daemon has of each GPU: measured once, then kept."""
        known: dict[str, int | None] = {}
        if published is not None and published.generation == found.generation:
            known = {gpu.uuid: gpu.server_bytes for gpu in published.gpus}
        if self._measure is not None and None in [known.get(gpu.uuid) for gpu in found.gpus]:
            servers = await self._control.servers()
            for gpu in found.gpus if servers else ():
                try:
                    used = await anyio.to_thread.run_sync(self._measure, gpu.uuid)
                except DriverError as error:
                    log.info("the memory of the MPS server is unknown: %s", error)
                    break
                known[gpu.uuid] = sum(used.get(pid, 0) for pid in servers) or None
        gpus = tuple(replace(gpu, server_bytes=known.get(gpu.uuid)) for gpu in found.gpus)
        return replace(found, gpus=gpus)
