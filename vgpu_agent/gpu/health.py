"""What a fact about a card means: policy as data, and the pure functions that apply it.

No clock and no I/O here. `POLICY` is the whole policy; docs/health.md is made from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum
from types import MappingProxyType

from vgpu_agent.gpu.driver import ComputeMode, Reading, RecoveryAction
from vgpu_agent.gpu.xids import CATALOGUE
from vgpu_agent.model.devices import Fault, Reason


class Effect(StrEnum):
    """What a fact does to a card."""

    TELL = "told"
    COUNT = "counted"
    UNTIL_BACK = "unhealthy until it is back"
    UNTIL_GOOD = "unhealthy until proven good"
    UNTIL_RESET = "unhealthy until reset"


@dataclass(frozen=True, slots=True)
class Rule:
    """What is done about one kind of fact, in words that the documentation uses too.

    `reason` is None where the card stays healthy. `advice` is for the operator.
    """

    what: str
    found_by: str
    effect: Effect
    reason: Reason | None
    advice: str


class Fact(Enum):
    """The kinds of facts that there are about a card."""

    RECOVERY_ACTION = "recovery action"
    XID_OF_APPLICATION = "application's XID"
    XID_UNPROVEN = "XID"
    XID_RESET = "XID that needs a reset"
    PROBE_FAILED = "probe error"
    PROBE_TIMEOUT = "probe timeout"
    ECC = "uncorrectable memory errors"
    REMAP_FAILED = "failed row remap"
    REMAP_PENDING = "pending row remap"
    LOST = "lost card"
    COMPUTE_MODE = "compute mode"
    MPS_DOWN = "MPS down"
    MPS_FAULT = "MPS server fault"


_RESET = "drain the card's pods, let go of it (`vgpu-agent release`), reset it"

POLICY: Mapping[Fact, Rule] = MappingProxyType(
    {
        Fact.RECOVERY_ACTION: Rule(
            "the driver asks for a recovery action (reset, reboot, drain ...)",
            "NVML field 230 at every probe, and its event",
            Effect.UNTIL_RESET,
            Reason.RECOVERY_ACTION,
            f"do what the driver asks for; for a reset: {_RESET}",
        ),
        Fact.XID_OF_APPLICATION: Rule(
            "an XID that the catalogue puts down to an application, or that says nothing by itself",
            "NVML event",
            Effect.COUNT,
            None,
            "look at the application that ran on the card; nothing to do for the card",
        ),
        Fact.XID_UNPROVEN: Rule(
            "an XID of any other kind, unknown ones included",
            "NVML event",
            Effect.UNTIL_GOOD,
            Reason.XID,
            "nothing at once; if it comes again, see the XID in NVIDIA's catalogue",
        ),
        Fact.XID_RESET: Rule(
            "an XID after which the card needs a reset",
            "NVML event",
            Effect.UNTIL_RESET,
            Reason.XID,
            _RESET,
        ),
        Fact.PROBE_FAILED: Rule(
            "the card answers with an error, or the driver cannot be asked",
            "probe",
            Effect.UNTIL_GOOD,
            Reason.PROBE,
            "see nvidia-smi and the kernel log of the node",
        ),
        Fact.PROBE_TIMEOUT: Rule(
            "a call to the driver does not return",
            "probe",
            Effect.UNTIL_GOOD,
            Reason.TIMEOUT,
            "see the kernel log of the node; a driver that hangs needs a reboot",
        ),
        Fact.ECC: Rule(
            "more uncorrectable memory errors than at the start",
            "probe",
            Effect.UNTIL_RESET,
            Reason.ECC,
            _RESET,
        ),
        Fact.REMAP_FAILED: Rule(
            "a failing row of memory could not be remapped",
            "probe",
            Effect.UNTIL_RESET,
            Reason.REMAP,
            "the card has no spare rows left: replace it",
        ),
        Fact.REMAP_PENDING: Rule(
            "a failing row of memory waits for the next reset to be remapped",
            "probe",
            Effect.TELL,
            None,
            "reset the card when it suits",
        ),
        Fact.LOST: Rule(
            "the driver no longer sees the card",
            "probe, and a look at all cards",
            Effect.UNTIL_GOOD,
            Reason.LOST,
            "see the kernel log of the node; a card that fell off the bus needs a reboot",
        ),
        Fact.COMPUTE_MODE: Rule(
            "the card's compute mode does not let several containers in",
            "probe",
            Effect.UNTIL_GOOD,
            Reason.COMPUTE_MODE,
            "set it back: `nvidia-smi -i <index> -c DEFAULT`",
        ),
        Fact.MPS_DOWN: Rule(
            "the MPS daemon does not answer, or its limits are not in force",
            "the daemon's watch",
            Effect.UNTIL_BACK,
            Reason.MPS,
            "see the MPS pod of the node",
        ),
        Fact.MPS_FAULT: Rule(
            "a client's fault ends all MPS clients of the card",
            "the MPS server's status",
            Effect.UNTIL_BACK,
            Reason.MPS_FAULT,
            "nothing: it is over when the clients are gone; find the client that failed",
        ),
    }
)


PROVABLE = frozenset(
    rule.reason for rule in POLICY.values() if rule.effect is Effect.UNTIL_GOOD and rule.reason
)
"""The reasons that passed probes can clear. Those of the MPS daemon are for its watch to clear."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A fact about a card, in words."""

    fact: Fact
    detail: str

    @property
    def rule(self) -> Rule:
        """What is done about it."""
        return POLICY[self.fact]

    def fault(self, now: float) -> Fault | None:
        """The fault that it is, from `now` (seconds since the epoch) on; None for none."""
        rule = self.rule
        if rule.reason is None:
            return None
        return Fault(rule.reason, now, self.detail, rule.effect is Effect.UNTIL_RESET, rule.advice)


_OF_APPLICATION = frozenset({"IGNORE", "RESTART_APP", "WORKFLOW_XID_45", "XID_154"})
_NEEDS_RESET = frozenset({"RESET_GPU", "RESTART_BM", "RESTART_VM", "WORKFLOW_XID_48"})


@dataclass(frozen=True, slots=True)
class XidOverrides:
    """What the operator knows better than the catalogue."""

    ignored: frozenset[int] = frozenset()
    critical: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class HealthPolicy:
    """The settings of health. Times are in seconds.

    `lost_for`: how long a lost card stays listed. `driver_wait`: how long a library that is missing
    is waited for before the process ends, to be started anew.
    """

    interval: float = 5.0
    recovery: float = 60.0
    lost_for: float = 3600.0
    driver_wait: float = 300.0
    xids: XidOverrides = XidOverrides()
    shared_by_mps: bool = False
    enabled: bool = True


def judge_xid(xid: int, overrides: XidOverrides = XidOverrides()) -> Finding:
    """What an XID means, by the resolution bucket of NVIDIA's catalogue.

    A bucket that is not known here, an empty one and an XID that the catalogue does not know mark
    the card until it is proven good: too careful costs a minute, too trusting a pod. An XID that
    is critical by setting does so too, unless the catalogue asks for a reset.
    """
    row = CATALOGUE.get(xid)
    detail = f"XID {xid} ({'not in the catalogue' if row is None else row.event})"
    bucket = "" if row is None else row.bucket
    if bucket in _NEEDS_RESET and xid not in overrides.ignored:
        return Finding(Fact.XID_RESET, detail)
    counted = bucket in _OF_APPLICATION and xid not in overrides.critical
    if counted or xid in overrides.ignored:
        return Finding(Fact.XID_OF_APPLICATION, detail)
    return Finding(Fact.XID_UNPROVEN, detail)


_ACTIONS = {
    RecoveryAction.GPU_RESET: "a reset of the GPU",
    RecoveryAction.NODE_REBOOT: "a reboot of the node",
    RecoveryAction.DRAIN_P2P: "draining its peer-to-peer traffic",
    RecoveryAction.DRAIN_AND_RESET: "draining it and a reset",
    RecoveryAction.IMEX_DOMAIN_RESET: "a reset of its IMEX domain",
    RecoveryAction.BUS_RESET: "a reset of its bus",
    RecoveryAction.SYSTEM_REBOOT: "a reboot of the system",
}


def judge_reading(
    reading: Reading, *, ecc_baseline: int | None, shared_by_mps: bool
) -> tuple[Finding, ...]:
    """What a probe shows. `ecc_baseline` is the number of uncorrectable errors at the start."""
    if reading.lost:
        return (Finding(Fact.LOST, "the card no longer answers from its handle"),)
    if reading.error is not None:
        return (Finding(Fact.PROBE_FAILED, reading.error),)
    findings = []
    if reading.recovery_action not in (None, RecoveryAction.NONE):
        action = _ACTIONS.get(
            RecoveryAction(reading.recovery_action)
            if reading.recovery_action in tuple(RecoveryAction)
            else RecoveryAction.NONE,
            f"action {reading.recovery_action}",
        )
        findings.append(Finding(Fact.RECOVERY_ACTION, f"the driver asks for {action}"))
    errors, baseline = reading.uncorrectable_ecc, ecc_baseline
    if errors is not None and baseline is not None and errors > baseline:
        findings.append(
            Finding(Fact.ECC, f"{errors - baseline} uncorrectable memory errors since the start")
        )
    if reading.remap_failed:
        findings.append(Finding(Fact.REMAP_FAILED, "a row of memory could not be remapped"))
    if reading.remap_pending:
        findings.append(Finding(Fact.REMAP_PENDING, "a row remap waits for the next reset"))
    if reading.compute_mode is ComputeMode.PROHIBITED or (
        reading.compute_mode is ComputeMode.EXCLUSIVE_PROCESS and not shared_by_mps
    ):
        findings.append(
            Finding(Fact.COMPUTE_MODE, f"its compute mode is {reading.compute_mode.name}")
        )
    return tuple(findings)


@dataclass(frozen=True, slots=True)
class Counters:
    """Counts that only grow for as long as a card is not initialised anew: millijoules, errors.

    NVML counts both since the driver initialised the card, which a reset makes it do again.
    """

    energy: int | None = None
    ecc: int | None = None

    def updated(self, later: "Counters") -> "Counters":
        """The later counts; what a probe could not read stays as it was."""
        return Counters(
            self.energy if later.energy is None else later.energy,
            self.ecc if later.ecc is None else later.ecc,
        )

    def fell(self, later: "Counters") -> bool:
        """Whether one of them is smaller later, which only a reset can do."""
        return any(
            before is not None and after is not None and after < before
            for before, after in ((self.energy, later.energy), (self.ecc, later.ecc))
        )


RELAPSE_WINDOW = 3600.0
"""Seconds in which relapses count."""

RELAPSES_ALLOWED = 2
"""So many relapses within the window change nothing; every further one doubles the wait."""

RECOVERY_WAIT_MAX = 3600.0


def recovery_wait(base: float, relapses: int) -> float:
    """Seconds of passed probes that prove a card good which relapsed so often within an hour."""
    doubled = base * 2.0 ** min(max(0, relapses - RELAPSES_ALLOWED), 32)
    return min(doubled, max(base, RECOVERY_WAIT_MAX))


def markdown_table() -> str:
    """The policy as the table of docs/health.md."""
    heals = {
        Effect.TELL: "nothing to heal",
        Effect.COUNT: "nothing to heal",
        Effect.UNTIL_BACK: "at once when it is back",
        Effect.UNTIL_GOOD: "after `VGPU_RECOVERY_SECONDS` of passed probes",
        Effect.UNTIL_RESET: "when the driver takes its recovery action back, or after a reset",
    }
    rows = [
        "| fault | how it is found | what happens | how it heals | reason shown | what to do |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for rule in POLICY.values():
        marked = rule.reason is not None
        rows.append(
            f"| {rule.what} | {rule.found_by}"
            f" | {'all vGPUs of the card ' + rule.effect if marked else rule.effect}"
            f" | {heals[rule.effect]} | {f'`{rule.reason}`' if marked else '-'} | {rule.advice} |"
        )
    return "\n".join(rows)
