"""How healthy a GPU is: what is known of it, and the one pure function that changes that.

No clock and no I/O here. `advance` takes what the edges report and the time; `policy` says what a
single fact means.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from vgpu_agent.model.devices import Effect, Fault, Reason
from vgpu_agent.model.facts import Reading
from vgpu_agent.model.policy import Fact, Finding, judge_reading, judge_xid
from vgpu_agent.model.rules import HealthRules, SharingRules

RELAPSE_WINDOW = 3600.0
"""Seconds in which relapses count."""

RELAPSES_ALLOWED = 2
"""So many relapses within the window change nothing; every further one doubles the wait."""

RECOVERY_WAIT_MAX = 3600.0


def recovery_wait(base: float, relapses: int) -> float:
    """Seconds of passed probes that prove a GPU good which relapsed so often within an hour."""
    doubled = base * 2.0 ** min(max(0, relapses - RELAPSES_ALLOWED), 32)
    return min(doubled, max(base, RECOVERY_WAIT_MAX))


@dataclass(frozen=True, slots=True)
class Counters:
    """Counts that only grow until a GPU is initialized again: millijoules, errors.

    NVML counts both since the driver initialized the GPU, which a reset makes it do again.
    """

    energy: int | None = None
    ecc: int | None = None

    def updated(self, later: "Counters") -> "Counters":
        """The later counts; what a probe could not read stays as it was."""
        return Counters(
            self.energy if later.energy is None else later.energy,
            self.ecc if later.ecc is None else later.ecc,
        )

    def started_over(self, later: "Counters") -> bool:
        """Whether one of them began again: far below what it was, not a little."""
        return any(
            before is not None and after is not None and after < before / 2
            for before, after in ((self.energy, later.energy), (self.ecc, later.ecc))
        )


@dataclass(frozen=True, slots=True)
class Moment:
    """Now: `wall` in seconds since the epoch, for people; `monotonic` for what time decides."""

    monotonic: float
    wall: float


# What happens to a GPU, as the edges report it


@dataclass(frozen=True, slots=True)
class XidSeen:
    """The driver reported an XID."""

    xid: int


@dataclass(frozen=True, slots=True)
class Away:
    """A complete look at all GPUs did not find it."""


@dataclass(frozen=True, slots=True)
class Probed:
    """It was probed. `new_handle`: the old handle was lost, and this is of the one it has now."""

    reading: Reading
    new_handle: bool = False


@dataclass(frozen=True, slots=True)
class Unwatched:
    """For a while it is not probed: NVML is released."""


@dataclass(frozen=True, slots=True)
class ResetDone:
    """The operator says that it was reset."""


HealthEvent = XidSeen | Away | Probed | Unwatched | ResetDone


@dataclass(frozen=True, slots=True)
class ActiveFault:
    """A fault, and when the newest fact said so (monotonic seconds)."""

    fault: Fault
    newest: float


@dataclass(frozen=True, slots=True)
class GpuHealth:
    """What is known of the health of a GPU, listed now or not. Times are monotonic seconds.

    `good_seconds` of passed probes were seen since the last bad fact, up to `last_good`, which is
    None where the GPU is not being watched. `seen` is when it last answered, or was given up for a
    release: it was not reset before. `back_after`: it was away, or is said to be reset, and was not
    there before that time; the next good probe shows it as initialized again. `restart`: counters
    that began again were read once, and `seen` of before. `falls` are the times at which it became
    unhealthy, of the last hour. `expired`: lost for so long that it is not listed any more.
    """

    active: tuple[ActiveFault, ...] = ()
    notes: tuple[str, ...] = ()
    counters: Counters = Counters()
    ecc_baseline: int | None = None
    good_seconds: float = 0.0
    last_good: float | None = None
    seen: float | None = None
    away_since: float | None = None
    back_after: float | None = None
    restart: float | None = None
    falls: tuple[float, ...] = ()
    recovery_wait: float = 0.0
    expired: bool = False

    @property
    def faults(self) -> tuple[Fault, ...]:
        """The faults in effect."""
        return tuple(each.fault for each in self.active)

    @property
    def waits_for_reset(self) -> bool:
        """Whether nothing but a reset makes it healthy again."""
        return any(each.fault.until_reset for each in self.active)


def advance(
    health: GpuHealth, event: HealthEvent, now: Moment, rules: HealthRules, *, sharing: SharingRules
) -> GpuHealth:
    """What is known of a GPU after an event. Total: no answer of an edge makes it raise."""
    recent = tuple(at for at in health.falls if now.monotonic - at <= RELAPSE_WINDOW)
    if recent != health.falls:
        health = replace(health, falls=recent)
    match event:
        case XidSeen():
            health = _with_findings(health, [judge_xid(event.xid, rules)], now)
        case Away():
            health = _away(health, "the driver does not see it", now, rules)
        case Unwatched():
            # The driver refuses a reset while we are its client: none was before now.
            seen = now.monotonic if health.away_since is None else health.seen
            health = replace(health, last_good=None, seen=seen)
        case ResetDone():
            health = replace(health, back_after=now.monotonic)
        case Probed():
            health = _probed(health, event, now, rules, sharing=sharing)
    wait = _wait(health, rules)
    return health if wait == health.recovery_wait else replace(health, recovery_wait=wait)


def _wait(health: GpuHealth, rules: HealthRules) -> float:
    return recovery_wait(rules.recovery_seconds, len(health.falls) - 1)


def _with_findings(health: GpuHealth, findings: Iterable[Finding], now: Moment) -> GpuHealth:
    """With the faults that they are: a reason keeps its time, and only becomes stricter."""
    active = {each.fault.reason: each for each in health.active}
    for finding in findings:
        fault = finding.fault(now.wall)
        if fault is None:
            continue
        before = active.get(fault.reason)
        if before is not None:
            effect = max(fault.effect, before.fault.effect, key=_STRICTNESS.index)
            known = effect is before.fault.effect
            fault = before.fault if known else replace(fault, since=before.fault.since)
        active[fault.reason] = ActiveFault(fault, now.monotonic)
        health = replace(health, good_seconds=0.0, last_good=None)
    falls = health.falls
    if active and not health.active:
        falls = (*falls, now.monotonic)
    return replace(health, active=tuple(active.values()), falls=falls)


_STRICTNESS = [*Effect]


def _away(health: GpuHealth, detail: str, now: Moment, rules: HealthRules) -> GpuHealth:
    since = now.monotonic if health.away_since is None else health.away_since
    health = _with_findings(health, [Finding(Fact.LOST, detail)], now)
    return replace(
        health,
        away_since=since,
        back_after=now.monotonic,
        restart=None,
        expired=now.monotonic - since >= rules.lost_card_seconds,
    )


def _probed(
    health: GpuHealth, event: Probed, now: Moment, rules: HealthRules, *, sharing: SharingRules
) -> GpuHealth:
    reading = event.reading
    if event.new_handle and health.back_after is None:
        # Its handle was lost and it is there: it came back after it last answered.
        answered = now.monotonic if health.seen is None else health.seen
        health = replace(health, back_after=answered)
    if not reading.answered:
        findings = judge_reading(reading, ecc_baseline=None, sharing=sharing)
        if reading.lost:
            return _away(health, findings[0].detail, now, rules)
        return _with_findings(replace(health, last_good=None), findings, now)
    counters = Counters(reading.energy_millijoules, reading.uncorrectable_ecc)
    back_after, restart = health.back_after, None
    if back_after is None and health.counters.started_over(counters):
        # Seen twice in a row, or it is not believed.
        back_after = health.restart
        restart = health.seen if back_after is None else None
    back = back_after is not None
    baseline = counters.ecc if back or health.ecc_baseline is None else health.ecc_baseline
    findings = judge_reading(reading, ecc_baseline=baseline, sharing=sharing)
    reasons = {each.rule.reason for each in findings} - {None}
    known = health.counters
    if restart is None:
        known = counters if back else known.updated(counters)
    health = replace(
        health,
        counters=known,
        notes=tuple(each.detail for each in findings if each.rule.effect is Effect.NOTE),
        ecc_baseline=baseline,
        seen=now.monotonic,
        away_since=None,
        back_after=None,
        restart=restart,
        expired=False,
    )
    if back_after is not None:
        health = _without_resets(health, reasons, before=back_after)
    elif reading.recovery_action == 0 and any(
        fault.reason is Reason.RECOVERY_ACTION for fault in health.faults
    ):
        # The driver asked for an action and no longer does: its word, also on an XID.
        health = _without_resets(health, reasons, before=now.monotonic)
    if reasons:
        return _with_findings(health, findings, now)
    return _proven(health, now, rules)


def _without_resets(
    health: GpuHealth, reasons: Collection[Reason | None], *, before: float
) -> GpuHealth:
    """Without what a reset ends: facts that are not newer than it, and that no longer show."""
    return replace(
        health,
        active=tuple(
            each
            for each in health.active
            if not each.fault.until_reset or each.newest > before or each.fault.reason in reasons
        ),
    )


def _proven(health: GpuHealth, now: Moment, rules: HealthRules) -> GpuHealth:
    """After a passed probe. Time in which no probe ran is not time passed."""
    if not health.active:
        return replace(health, good_seconds=0.0, last_good=now.monotonic)
    passed = 0.0
    if health.last_good is not None:
        passed = min(now.monotonic - health.last_good, 2 * rules.health_interval)
    good = health.good_seconds + max(0.0, passed)
    health = replace(health, good_seconds=good, last_good=now.monotonic)
    if good < _wait(health, rules):
        return health
    return replace(health, active=tuple(each for each in health.active if each.fault.until_reset))
