"""The agent's watch over the MPS daemon: vGPUs are healthy only while their limits hold.

Every look is judged by a pure function and told to the node's state as one fact about all cards.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import anyio
from anyio.abc import TaskStatus

from vgpu_agent.gpu.health import Fact, Finding
from vgpu_agent.model.devices import Excluded, Fault, Gpu, Reason
from vgpu_agent.model.share import MIB, Division, MpsLimits, divide
from vgpu_agent.model.state import Mps, NodeState
from vgpu_agent.mps.applied import Applied
from vgpu_agent.mps.daemon import Daemon, DaemonLook

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a look means. `findings` concern all cards; `applied` is vGPUs by UUID."""

    mps: Mps
    findings: tuple[Finding, ...]
    applied: Mapping[str, int]


def judge(
    look: DaemonLook, gpus: tuple[Gpu, ...], division: Division, limits: MpsLimits
) -> Verdict:
    """Whether vGPUs can be given, and what the MPS pod serves where the settings say otherwise."""
    applied = look.applied
    problem = _problem(look)
    findings = [] if problem is None else [Finding(Fact.MPS_DOWN, problem)]
    if look.faulty:
        pids = ", ".join(str(pid) for pid in look.faulty)
        findings.append(Finding(Fact.MPS_FAULT, f"status FAULT of MPS server {pids}"))
    told = {} if applied is None else {card.uuid: card.replicas for card in applied.cards}
    return Verdict(
        Mps(
            wanted=True,
            up=look.error is None,
            limits_in_force=problem is None,
            problem=problem,
            limits=None if applied is None else applied.limits,
            replacement=_replacement(applied, told, gpus, division, limits),
            clients=look.clients,
            waiting=look.waiting,
            server_bytes=_server_bytes(applied),
        ),
        tuple(findings),
        MappingProxyType(told),
    )


def _server_bytes(applied: Applied | None) -> Mapping[str, int]:
    cards = () if applied is None else applied.cards
    return MappingProxyType(
        {card.uuid: card.server_bytes for card in cards if card.server_bytes is not None}
    )


def _problem(look: DaemonLook) -> str | None:
    applied = look.applied
    if look.error is not None:
        return look.error
    if look.applied_error is not None:
        return look.applied_error
    if applied is None:
        return "nobody has applied the limits yet: `vgpu-agent mps watch` does, in the MPS pod"
    if applied.generation != look.generation:
        return "the daemon is a new one, and its limits are not applied yet"
    if applied.problem is not None:
        return applied.problem
    return None


def _replacement(
    applied: Applied | None,
    told: Mapping[str, int],
    gpus: tuple[Gpu, ...],
    division: Division,
    limits: MpsLimits,
) -> str | None:
    """Where the daemon was told something else than the settings say now."""
    differing = []
    if applied is not None and (applied.limits is MpsLimits.SERVER) != (limits is MpsLimits.SERVER):
        differing.append(f"it serves VGPU_MPS_LIMITS={applied.limits} instead of {limits}")
    for gpu in gpus:
        divided = divide(gpu, division)
        wanted = 0 if isinstance(divided, Excluded) else divided.replicas
        if gpu.uuid in told and told[gpu.uuid] != wanted:
            differing.append(f"GPU {gpu.index} has {told[gpu.uuid]} vGPUs instead of {wanted}")
    if not differing:
        return None
    return f"the MPS pod must be replaced: {', '.join(differing)}"


@dataclass
class MpsGuard:
    """Looks at the daemon again and again, and tells the node's state.

    Every `glance` seconds it looks whether the same daemon is there, and asks it where it was away;
    where all was well it is asked everything every `ask` seconds.
    """

    daemon: Daemon
    state: NodeState
    division: Division
    limits: MpsLimits
    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time
    glance: float = 1.0
    ask: float = 3.0
    _faulty: bool = False

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Runs until cancelled; started after the first look."""
        await self.look()
        task_status.started()
        while True:
            asked, generation = self.clock(), self.daemon.generation()
            while True:
                await anyio.sleep(self.glance)
                well = not self.state.snapshot.mps.problem
                if not well or self.clock() - asked >= self.ask:
                    break
                if self.daemon.generation() != generation:
                    break
            await self.look()

    async def look(self) -> None:
        """One look, and what it means."""
        look = await self.daemon.look()
        before = self.state.snapshot
        gpus = tuple(card.gpu for card in before.inventory.cards)
        verdict = judge(look, gpus, self.division, self.limits)
        now = self.wall_clock()
        faults = [fault for each in verdict.findings if (fault := each.fault(now)) is not None]
        untold = Finding(Fact.MPS_DOWN, "the daemon was not told of this card: replace the MPS pod")
        self.state.mps_seen(verdict.mps, faults, verdict.applied, untold.fault(now))
        self._log(before.mps, verdict.mps, faults)

    def _log(self, before: Mps, now: Mps, faults: list[Fault]) -> None:
        if now.problem is not None and now.problem != before.problem:
            log.warning("no vGPU can be given: %s. What to do: see the MPS pod", now.problem)
        elif now.problem is None and (before.problem is not None or not before.wanted):
            log.info("the MPS daemon answers and its limits are in force")
        if now.replacement is not None and now.replacement != before.replacement:
            log.warning("%s", now.replacement)
        if now.waiting > before.waiting:
            log.warning("%d MPS clients of another user wait for their turn", now.waiting)
        for uuid, taken in now.server_bytes.items():
            if uuid not in before.server_bytes and taken > self.division.held_back:
                log.warning(
                    "the MPS server has %d MiB of GPU %s, and %d MiB are kept out of the shares%s",
                    taken // MIB,
                    uuid,
                    self.division.held_back // MIB,
                    "" if self.division.measured else ": set VGPU_MEMORY_RESERVED=auto or more",
                )
        faulty = next((fault for fault in faults if fault.reason is Reason.MPS_FAULT), None)
        if faulty is not None and not self._faulty:
            log.warning("%s: all its clients end; nothing is restarted", faulty.detail)
        self._faulty = faulty is not None
