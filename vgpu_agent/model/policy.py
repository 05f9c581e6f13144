"""What a fact about a GPU means: policy as data, and the judgement of XIDs, probes and MPS.

`Fact` is the whole policy; docs/health.md is made from it.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, unique

from vgpu_agent.model.advice import Remedy
from vgpu_agent.model.devices import Effect, Fault, Gpu, Reason
from vgpu_agent.model.facts import ComputeMode, Cordon, MpsLook, Reading, RecoveryAction
from vgpu_agent.model.limits import LimitsLook
from vgpu_agent.model.rules import HealthRules, MemoryLimits, SharingRules
from vgpu_agent.model.xids import CATALOGUE


@dataclass(frozen=True, slots=True)
class Rule:
    """What is done about one kind of fact, in words that the documentation uses too.

    `reason` is None where the GPU stays healthy. `remedy` is for the operator.
    """

    what: str
    found_by: str
    effect: Effect
    reason: Reason | None
    remedy: Remedy


@unique
class Fact(Enum):
    """The kinds of facts that there are about a GPU, each with what is done about it."""

    RECOVERY_ACTION = Rule(
        "the driver asks for a recovery action (reset, drain ...)",
        "NVML field 230 at every probe, and its event",
        Effect.UNTIL_RESET,
        Reason.RECOVERY_ACTION,
        Remedy.RECOVERY,
    )
    RECOVERY_REBOOT = Rule(
        "the driver asks for a reboot",
        "NVML field 230 at every probe, and its event",
        Effect.UNTIL_REBOOT,
        Reason.RECOVERY_ACTION,
        Remedy.REBOOT,
    )
    XID_OF_APPLICATION = Rule(
        "an XID of an application by the catalogue, or that says nothing by itself",
        "NVML event",
        Effect.COUNT,
        None,
        Remedy.NOTHING,
    )
    XID_UNPROVEN = Rule(
        "an XID of any other kind, unknown ones included",
        "NVML event",
        Effect.UNTIL_GOOD,
        Reason.XID,
        Remedy.WAIT,
    )
    XID_RESET = Rule(
        "an XID after which the GPU needs a reset",
        "NVML event",
        Effect.UNTIL_RESET,
        Reason.XID,
        Remedy.RESET,
    )
    XID_REBOOT = Rule(
        "an XID after which the node needs a reboot",
        "NVML event",
        Effect.UNTIL_REBOOT,
        Reason.XID,
        Remedy.REBOOT,
    )
    PROBE_FAILED = Rule(
        "the GPU answers with an error, or the driver cannot be asked",
        "probe",
        Effect.UNTIL_GOOD,
        Reason.PROBE,
        Remedy.LOOK,
    )
    PROBE_TIMEOUT = Rule(
        "a call to the driver does not return",
        "probe",
        Effect.UNTIL_GOOD,
        Reason.TIMEOUT,
        Remedy.HANG,
    )
    ECC = Rule(
        "more uncorrectable memory errors than at the start",
        "probe",
        Effect.UNTIL_RESET,
        Reason.ECC,
        Remedy.RESET,
    )
    REMAP_FAILED = Rule(
        "a failing row of memory could not be remapped",
        "probe",
        Effect.UNTIL_RESET,
        Reason.REMAP,
        Remedy.REPLACE,
    )
    REMAP_PENDING = Rule(
        "a failing row of memory waits for the next reset to be remapped",
        "probe",
        Effect.NOTE,
        None,
        Remedy.RESET_LATER,
    )
    LOST = Rule(
        "the driver no longer sees the GPU",
        "probe, and a look at all GPUs",
        Effect.UNTIL_GOOD,
        Reason.LOST,
        Remedy.REBOOT,
    )
    COMPUTE_MODE = Rule(
        "the GPU's compute mode does not let several containers in",
        "probe",
        Effect.UNTIL_GOOD,
        Reason.COMPUTE_MODE,
        Remedy.COMPUTE_MODE,
    )
    OPEN_MODE = Rule(
        "compute mode DEFAULT under MPS, though `VGPU_MPS_COMPUTE_MODE=exclusive`",
        "probe",
        Effect.NOTE,
        None,
        Remedy.MPS_MODE,
    )
    MPS_DOWN = Rule(
        "the MPS daemon does not answer, or its limits are not in effect",
        "the daemon's watch",
        Effect.UNTIL_BACK,
        Reason.MPS,
        Remedy.MPS_POD,
    )
    MPS_FAULT = Rule(
        "a client's fault ends all MPS clients of the GPU",
        "the MPS server's status",
        Effect.UNTIL_BACK,
        Reason.MPS_FAULT,
        Remedy.MPS_CLIENTS,
    )
    LIMITS = Rule(
        "the driver cannot limit the memory of containers, which `VGPU_MEMORY_LIMITS=driver` wants",
        "a look at driver and cgroups",
        Effect.UNTIL_BACK,
        Reason.LIMITS,
        Remedy.LIMITS,
    )
    CORDONED = Rule(
        "an operator took the GPU out of service",
        "`vgpu-agent cordon GPU`",
        Effect.UNTIL_UNCORDONED,
        Reason.CORDONED,
        Remedy.UNCORDON,
    )


_REMEDIES: Mapping[tuple[Reason | None, Effect], Remedy] = {
    (fact.value.reason, fact.value.effect): fact.value.remedy for fact in Fact
}

_ORDER = {remedy: number for number, remedy in enumerate(Remedy)}


def remedy(faults: Iterable[Fault]) -> Remedy:
    """What makes a GPU with these faults healthy again: one remedy, the most thorough of theirs."""
    found = (_REMEDIES.get((fault.reason, fault.effect), Remedy.LOOK) for fault in faults)
    return max(found, key=_ORDER.__getitem__, default=Remedy.NOTHING)


@dataclass(frozen=True, slots=True)
class Finding:
    """A fact about a GPU, in words."""

    fact: Fact
    detail: str

    @property
    def rule(self) -> Rule:
        """What is done about it."""
        return self.fact.value

    def fault(self, now: float) -> Fault | None:
        """The fault that it is, from `now` (seconds since the epoch) on; None for none."""
        rule = self.rule
        if rule.reason is None:
            return None
        return Fault(rule.reason, now, self.detail, rule.effect)


_BUCKETS: Mapping[str, Fact] = {
    **dict.fromkeys(
        ("IGNORE", "RESTART_APP", "WORKFLOW_XID_45", "XID_154"), Fact.XID_OF_APPLICATION
    ),
    **dict.fromkeys(("RESET_GPU", "WORKFLOW_XID_48"), Fact.XID_RESET),
    **dict.fromkeys(("RESTART_BM", "RESTART_VM"), Fact.XID_REBOOT),
}

XID_RECOVERY_ACTION_CHANGED = 154


def judge_xid(xid: int, rules: HealthRules) -> Finding:
    """What an XID means, by the resolution bucket of NVIDIA's catalogue.

    A bucket that is not known here, an empty one and an XID that the catalogue does not know mark
    the GPU until it is proven good: too careful costs a minute, too trusting a pod. An XID that
    is critical by setting does so too, unless the catalogue asks for a reset.
    """
    row = CATALOGUE.get(xid)
    detail = f"XID {xid} ({'not in the catalogue' if row is None else row.event})"
    fact = Fact.XID_UNPROVEN if row is None else _BUCKETS.get(row.bucket, Fact.XID_UNPROVEN)
    if xid in rules.ignored_xids:
        fact = Fact.XID_OF_APPLICATION
    elif fact is Fact.XID_OF_APPLICATION and xid in rules.critical_xids:
        fact = Fact.XID_UNPROVEN
    return Finding(fact, detail)


_ACTIONS: Mapping[int, str] = {
    RecoveryAction.GPU_RESET: "a reset of the GPU",
    RecoveryAction.NODE_REBOOT: "a reboot of the node",
    RecoveryAction.DRAIN_P2P: "draining its peer-to-peer traffic",
    RecoveryAction.DRAIN_AND_RESET: "draining it and a reset",
    RecoveryAction.IMEX_DOMAIN_RESET: "a reset of its IMEX domain",
    RecoveryAction.BUS_RESET: "a reset of its bus",
    RecoveryAction.SYSTEM_REBOOT: "a reboot of the system",
}

_REBOOTS = (RecoveryAction.NODE_REBOOT, RecoveryAction.SYSTEM_REBOOT)


def judge_reading(
    reading: Reading, *, ecc_baseline: int | None, sharing: SharingRules
) -> tuple[Finding, ...]:
    """What a probe shows. `ecc_baseline` is the number of uncorrectable errors at the start."""
    if reading.hung:
        return (Finding(Fact.PROBE_TIMEOUT, reading.error or "a call does not return"),)
    if reading.lost:
        return (Finding(Fact.LOST, reading.error or "the GPU no longer answers from its handle"),)
    if reading.error is not None:
        return (Finding(Fact.PROBE_FAILED, reading.error),)
    findings = []
    action = reading.recovery_action
    if action:  # not unknown, and not RecoveryAction.NONE
        words = _ACTIONS.get(action, f"action {action}")
        fact = Fact.RECOVERY_REBOOT if action in _REBOOTS else Fact.RECOVERY_ACTION
        findings.append(Finding(fact, f"the driver asks for {words}"))
    errors = reading.uncorrectable_ecc
    if errors is not None and ecc_baseline is not None and errors > ecc_baseline:
        since = f"{errors - ecc_baseline} uncorrectable memory errors since the start"
        findings.append(Finding(Fact.ECC, since))
    if reading.remap_failed:
        findings.append(Finding(Fact.REMAP_FAILED, "a row of memory could not be remapped"))
    if reading.remap_pending:
        findings.append(Finding(Fact.REMAP_PENDING, "a row remap waits for the next reset"))
    mode = reading.compute_mode
    if mode is ComputeMode.DEFAULT:
        if sharing.mps and sharing.mps_exclusive:
            detail = (
                "its compute mode is DEFAULT: processes can bypass MPS and its limits;"
                " `vgpu-agent mps compute-modes` in the container `restore` of the MPS pod sets it"
            )
            findings.append(Finding(Fact.OPEN_MODE, detail))
    elif mode is ComputeMode.PROHIBITED or (mode is not None and not sharing.mps):
        findings.append(Finding(Fact.COMPUTE_MODE, f"its compute mode is {mode.name}"))
    return tuple(findings)


def mps_findings(look: MpsLook) -> Mapping[str, list[Finding]]:
    """What is wrong with each MPS daemon, by its name, and under `""` with GPUs that have none."""
    missing = look.error or (
        "no MPS daemon was set up for this GPU: delete the MPS pod of the node, once drained"
    )
    findings = {"": [Finding(Fact.MPS_DOWN, missing)]}
    for name, daemon in look.daemons.items():
        why = daemon.down or daemon.problem
        findings[name] = [Finding(Fact.MPS_DOWN, why)] if why else []
        if daemon.fault:
            findings[name].append(Finding(Fact.MPS_FAULT, daemon.fault))
    return findings


def limits_findings(
    look: LimitsLook, gpus: Mapping[str, Gpu], sharing: SharingRules
) -> Mapping[str, Finding]:
    """Why the driver limits no memory on a GPU, by UUID, where it is wanted that it does."""
    if sharing.memory_limits is not MemoryLimits.DRIVER:
        return {}
    unknown = "NVML does not know how much memory the GPU has"
    found = {
        uuid: look.why_not([uuid]) or (unknown if gpu.memory_bytes is None else None)
        for uuid, gpu in gpus.items()
    }
    return {uuid: Finding(Fact.LIMITS, why) for uuid, why in found.items() if why is not None}


def cordon_faults(cordon: Cordon | None) -> Iterator[Fault]:
    """What a cordon, if there is one, does to its GPU."""
    if cordon is not None:
        finding = Finding(Fact.CORDONED, cordon.reason or "the operator gave no reason")
        yield from filter(None, [finding.fault(cordon.since)])
