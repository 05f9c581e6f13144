"""What a fact about a card means: pure policy, no clock, no I/O."""

from dataclasses import dataclass
from enum import StrEnum

from vgpu_agent.gpu.driver import Reading
from vgpu_agent.gpu.xids import CATALOGUE
from vgpu_agent.model.devices import Fault, Reason


class Effect(StrEnum):
    """What a fact does to a card."""

    COUNT = "count"
    UNTIL_GOOD = "until proven good"
    UNTIL_RESET = "until reset"


_ONLY_COUNTED = frozenset({"IGNORE", "RESTART_APP", "WORKFLOW_XID_45", "XID_154"})
_RESET = frozenset({"RESET_GPU", "RESTART_BM", "RESTART_VM", "WORKFLOW_XID_48"})


@dataclass(frozen=True, slots=True)
class Verdict:
    """The effect of an XID, and the XID in words."""

    effect: Effect
    detail: str


def judge_xid(xid: int) -> Verdict:
    """What an XID means, by the resolution bucket of NVIDIA's catalogue.

    A bucket that is not known here, an empty one and an XID that the catalogue does not know mark
    the card until it is proven good: too careful costs a minute, too trusting a pod.
    """
    row = CATALOGUE.get(xid)
    if row is None:
        return Verdict(Effect.UNTIL_GOOD, f"XID {xid} (not in the catalogue)")
    detail = f"XID {xid} ({row.event})"
    if row.bucket in _ONLY_COUNTED:
        return Verdict(Effect.COUNT, detail)
    return Verdict(Effect.UNTIL_RESET if row.bucket in _RESET else Effect.UNTIL_GOOD, detail)


def judge_reading(reading: Reading, now: float) -> Fault | None:
    """The fault that a probe shows, if any. `now` is in seconds since the epoch."""
    if reading.lost:
        return Fault(Reason.LOST, now, "the card no longer answers from its handle")
    if reading.error is not None:
        return Fault(Reason.PROBE, now, reading.error)
    return None
