"""One MPS daemon after the other at one place: what was set, read back and seen of it.

Set-default commands reach only servers that start later, so limits are in effect when they read
back right and every running server is younger than they are.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import anyio

from vgpu_agent.errors import (
    DriverError,
    MpsBusyError,
    MpsDownError,
    MpsError,
    MpsHungError,
)
from vgpu_agent.model.facts import AppliedGpu, DaemonLook
from vgpu_agent.model.rules import MpsLimits
from vgpu_agent.mps import answers, processes
from vgpu_agent.mps.control import (
    Control,
    Defaults,
    get_defaults,
    overridden,
    read_defaults,
    set_defaults,
)
from vgpu_agent.mps.log import PassedOn, read_on
from vgpu_agent.mps.programs import CONTROL
from vgpu_agent.mps.state import Watched, absence, generation_of
from vgpu_agent.store import since_boot
from vgpu_agent.threads import in_thread

log = logging.getLogger(__name__)

Measure = Callable[[str], Mapping[int, int]]
"""Bytes of a GPU, by its UUID, that each process has, by PID. May raise DriverError."""

_RETRIES = (0.1, 0.2, 0.4, 0.8, 1.5)
"""Seconds between questions to a daemon that is busy, before that is reported."""

_HANGS = 3
"""A daemon that does not answer so many times in a row is down."""

_DEFAULTS_SECONDS = 60.0
"""How often defaults are read that are not ours."""

_IDLE = 5
"""So many times as long between two looks where there is no server: each costs lines of log."""

_SILENT = (
    "the MPS daemon waits for a process that has connected to it and says nothing, in a pod that"
    " holds a vGPU of the GPU; new CUDA processes wait until it ends"
)
"""Whoever it is, it cannot be seen from here: sockets are seen in their own network."""

_FAILING = (
    "its servers end by an error soon after their start, again and again: see the log of `watch`;"
    " likely are a process without MPS on the GPU, a GPU that needs a reset, too little memory for"
    " the MPS pod's container `daemon`, or a driver whose libraries it does not have"
)

_CLIENTS = "get_device_client_list"


def _uuids(look: DaemonLook) -> list[str]:
    return [gpu.uuid for gpu in look.gpus]


class Watcher:
    """Looks at one daemon. `known` is what the watcher before this one wrote of it."""

    def __init__(
        self,
        plan: DaemonLook,
        control: Control,
        limits: MpsLimits,
        measure: Measure | None,
        known: Watched | None,
    ) -> None:
        self._control = control
        self._limits = limits
        self._measure = measure
        self.watched = known or Watched(plan)
        """What is known of the daemon, by now or by the watcher before."""
        self.looked = False
        if _uuids(plan) != _uuids(self._look):
            self.watched = replace(self.watched, look=plan)
        gpus = tuple(replace(gpu, server_bytes=None) for gpu in self._look.gpus)
        self._plan = DaemonLook(gpus=gpus, thread_percentage=self._look.thread_percentage)
        self._next = plan
        self._defaults: Defaults | None = None
        self._defaults_at = 0.0
        self._statuses: dict[int, tuple[str, float]] = {}
        self._hangs = 0
        self._said = ""
        self._passed_on = PassedOn()

    @property
    def _look(self) -> DaemonLook:
        return self.watched.look

    @property
    def _wanted(self) -> Defaults:
        limits = {gpu.ordinal: gpu.memory_limit_bytes for gpu in self._plan.gpus}
        return Defaults(self._plan.thread_percentage or 100, limits)

    def divide(self, plan: DaemonLook) -> None:
        """Divides the same GPUs in another way, once no server has clients of the way before."""
        if _uuids(plan) == _uuids(self._plan):
            self._next = plan

    async def run(self, poll_seconds: float, look_seconds: float) -> None:
        """Looks again and again, until cancelled."""
        pipe = self._control.directories.pipe
        while True:
            await self.look()
            self.looked = True
            generation, wait = self._look.generation, look_seconds
            if self._look.down or self._hangs:
                wait = poll_seconds
            elif not self._look.servers:  # one that starts is seen in the log
                wait *= _IDLE
            until = since_boot() + wait
            while since_boot() < until:  # slept in polls: a new daemon gets its limits at once
                await anyio.sleep(poll_seconds)
                if generation_of(pipe) != generation or await self._read_log():
                    break
                if self._next != self._plan and not self._look.servers:
                    break

    async def look(self) -> DaemonLook:
        """One look at the daemon and its log. Raises nothing but for bugs."""
        await self._read_log()
        generation = generation_of(self._control.directories.pipe)
        await self._divide(generation)
        found = await self._asked(generation)
        seen = self.watched.log
        # No line says that a client has ended while it waited; PID 0 is one that cannot be seen.
        waiting = [each for each in seen.waiting if not each[0] or processes.find(each[0])]
        seen = replace(seen, waiting=tuple(waiting))
        failing = _FAILING if seen.failing(since_boot()) else None
        found = replace(
            found, waiting=seen.waiting_for_others(), crashes=seen.crashes, failing=failing
        )
        self.watched = replace(self.watched, look=found, log=seen)
        wrong = found.down or found.problem or found.fault or found.busy
        text = wrong or f"limits are in effect: {self._limits}, {self._wanted}"
        if text != self._said:
            level = logging.WARNING if wrong else logging.INFO
            log.log(level, "%s: %s", self._control.directories.name, text)
            self._said = text
        return found

    async def _divide(self, generation: str | None) -> None:
        """Takes the division that is next, unless a server of this daemon has the one before."""
        if self._next != self._plan and generation == self._look.generation is not None:
            if self._look.servers:
                return
            try:  # one may have started since it was looked at
                if answers.parse_pids((await self._ask(["get_server_list"]))[0]):
                    return
            except MpsError:
                return
        self._plan = self._next

    async def _read_log(self) -> bool:
        """Passes on what the daemon said that people need, but for a flood; whether it did."""
        directories = self._control.directories
        seen, lines = await in_thread(
            read_on, directories.control_log, self.watched.log, since_boot()
        )
        self.watched = replace(self.watched, log=seen)
        for line in (passed_on := self._passed_on.take(lines, since_boot())):
            log.info("%s said: %s", directories.name, line)
        return bool(passed_on)

    async def _asked(self, generation: str | None) -> DaemonLook:
        """What is in effect now. Any failure has a meaning."""
        known = self._look if generation == self._look.generation else self._plan
        known = replace(known, generation=generation)
        pipe = self._control.directories.pipe
        if generation is None:
            return replace(self._plan, down=absence(pipe))
        if generation != self._look.generation:
            self._defaults = None
            if self._limits is MpsLimits.SERVER:  # otherwise there is nothing to set
                known = replace(known, problem="the daemon is a new one: it has no limits yet")
        try:
            found = await self._round(known)
        except MpsBusyError as error:
            return replace(known, busy=f"{error}{processes.holders(CONTROL, pipe, since_boot())}")
        except MpsHungError as error:
            await self._read_log()
            if self.watched.log.accepting:
                return replace(known, busy=f"{_SILENT}: {pipe}")
            self._hangs += 1
            return replace(known, down=str(error) if self._hangs >= _HANGS else known.down)
        except MpsDownError as error:
            return replace(known, down=str(error))
        except MpsError as error:
            return replace(known, down=None, busy=None, problem=str(error))
        self._hangs = 0
        # Where the daemon was replaced meanwhile, what was found is of nobody.
        return found if generation_of(pipe) == generation else replace(self._plan, down="it ended")

    async def _ask(self, lines: Sequence[str]) -> list[str]:
        """The answers; a daemon that is busy is asked again for some seconds."""
        for seconds in _RETRIES:
            try:
                return await self._control.ask(*lines)
            except MpsBusyError:
                await anyio.sleep(seconds)
        return await self._control.ask(*lines)

    async def _round(self, known: DaemonLook) -> DaemonLook:
        """Asks for all that is due, in one session where no server is new. Raises MpsError."""
        ordinals = list(self._wanted.memory_limits)
        server = self._limits is MpsLimits.SERVER
        due = server or since_boot() - self._defaults_at >= _DEFAULTS_SECONDS
        first = get_defaults(ordinals) if due or self._defaults is None else []
        of_servers = self._about(known.servers)
        said = await self._ask([*first, "get_server_list", *of_servers])
        if first:
            self._defaults = read_defaults(ordinals, said[: len(first)])
            self._defaults_at = since_boot()
        listed = answers.parse_pids(said[len(first)])
        about = dict(zip(of_servers, said[len(first) + 1 :], strict=True))
        problem = None
        if self._defaults is not None:
            problem = await self._in_force(self._defaults, known.generation or "")
        if new := self._about([pid for pid in listed if pid not in known.servers]):
            about |= zip(new, await self._ask(new), strict=True)
        statuses = {
            pid: status
            for pid in listed
            if (status := answers.parse_status(about[f"get_server_status {pid}"])) is not None
        }
        if ended := [pid for pid in statuses if server and processes.find(pid) is None]:
            # Meanwhile, or they are in /proc of another PID namespace.
            listed = answers.parse_pids((await self._ask(["get_server_list"]))[0])
            for pid in set(ended) - set(listed):
                del statuses[pid]
        problem = problem or (overridden(about, self._wanted) if server else None)
        problem = problem or (self._older(statuses) if server else None)
        now, known_since = since_boot(), self._statuses
        self._statuses = {
            pid: (status, old[1] if (old := known_since.get(pid)) and old[0] == status else now)
            for pid, status in statuses.items()
        }
        # The daemon may name a GPU by its ordinal. A client can pose as the daemon and name any.
        uuids = {name: gpu.uuid for gpu in self._plan.gpus for name in (gpu.uuid, str(gpu.ordinal))}
        clients = answers.parse_clients(about.get(_CLIENTS, ""))
        return replace(
            self._plan,
            generation=known.generation,
            gpus=await self._with_server_bytes(known, tuple(statuses)),
            problem=problem,
            fault=answers.fault_of(self._statuses, now),
            servers=tuple(statuses),
            clients=dict(Counter(uuids.get(name, "") for name in clients)),
        )

    def _about(self, servers: Sequence[int]) -> list[str]:
        """The commands about servers, if any: their users may lift the limits that they have."""
        lines = [f"get_server_status {pid}" for pid in servers]
        if self._limits is MpsLimits.SERVER:
            for pid in servers:
                ordinals = self._wanted.memory_limits
                lines += [f"get_device_pinned_mem_limit {pid} {ordinal}" for ordinal in ordinals]
                lines.append(f"get_active_thread_percentage {pid}")
        return [*lines, _CLIENTS] if servers else []

    async def _in_force(self, defaults: Defaults, generation: str) -> str | None:
        """The problem with the defaults, under `server` after they were set as they should be."""
        if self._limits is not MpsLimits.SERVER:
            other = ", ".join(self._wanted.differences(defaults))
            words = (  # they bind every client
                f"the MPS daemon has limits of its own ({other}), but VGPU_MPS_LIMITS is"
                f" {self._limits}: drain the node and delete its MPS pod"
            )
            return words if other else None
        same = self.watched.set_to == str(self._wanted) and generation == self._look.generation
        if not same or self._wanted.differences(defaults):
            ordinals = list(self._wanted.memory_limits)
            lines = set_defaults(self._wanted)
            said = await self._ask([*lines, *get_defaults(ordinals)])
            defaults = self._defaults = read_defaults(ordinals, said[len(lines) :])
            self.watched = replace(self.watched, set_to=str(self._wanted), set_at=since_boot())
        other = ", ".join(self._wanted.differences(defaults))
        return f"the MPS daemon was set to {self._wanted} and says {other}" if other else None

    def _older(self, servers: Iterable[int]) -> str | None:
        """The problem where a server was started before the limits were set."""
        for pid in servers:
            process = processes.find(pid)
            if process is None:
                return (
                    f"MPS server {pid} is not in /proc, so its age is unknown: run the MPS pod with"
                    " hostPID: true"
                )
            if process.started < self.watched.set_at:
                return (
                    f"MPS server {pid} is older than the limits: its clients have none until it"
                    " ends; drain the GPU and run `vgpu-agent mps restart"
                    f" {self._control.directories.name}` in the MPS pod"
                )
        return None

    async def _with_server_bytes(
        self, known: DaemonLook, servers: Sequence[int]
    ) -> tuple[AppliedGpu, ...]:
        """With what a server of this daemon has of each GPU: measured once, then kept."""
        sizes = {gpu.uuid: gpu.server_bytes for gpu in known.gpus}
        if self._measure is not None and servers and None in sizes.values():
            for uuid in sizes:
                try:
                    used = await in_thread(self._measure, uuid)
                except DriverError as error:
                    log.info("the memory of the MPS server is unknown: %s", error)
                    break
                sizes[uuid] = sum(used.get(pid, 0) for pid in servers) or None
        return tuple(replace(gpu, server_bytes=sizes.get(gpu.uuid)) for gpu in self._plan.gpus)
