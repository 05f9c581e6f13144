"""What is promised for each fault, and in how many seconds the kubelet's list is right again.

The seconds hold for the settings of the suite: VGPU_HEALTH_INTERVAL=1, VGPU_RECOVERY_SECONDS=1 and
VGPU_PODRESOURCES_INTERVAL=1. `docs/reliability.md` is made of this table and of the last recorded
run.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median

RECORD = Path(__file__).parents[1] / "data" / "faults.json"
"""What a run with `--record` measured."""

NOT_YET: frozenset[str] = frozenset()
"""Faults that are left out of the schedule, since the agent does not keep their promise yet.

`NAME`, or `NAME during a hang`: only while a call to another GPU hangs.
"""

HANG_ADDS = 1.0
"""Seconds more for everything, while a call to another GPU hangs."""


@dataclass(frozen=True, slots=True)
class Promise:
    """`seconds` until list, report and metrics are right. `weight`: how often it is drawn.

    `ends_agent`: it ends the process, so it comes in the last third of a run: memory, descriptors
    and threads are measured before. `flaps`: meanwhile the list is wrong by the fault's nature.
    """

    seconds: float
    what: str
    weight: int = 4
    ends_agent: bool = False
    flaps: bool = False


PROMISES: dict[str, Promise] = {
    # A GPU
    "xid of an application": Promise(1, "nothing changes; it is counted", 3),
    "flood of XIDs": Promise(2, "nothing changes; the log stays short", 1),
    "xid to prove": Promise(5, "unhealthy at once, healthy after good probes"),
    "xid for a reset": Promise(1, "unhealthy at once, until it is reset"),
    "xid for a reboot": Promise(1, "unhealthy at once, until it is reset"),
    "xid of no GPU": Promise(5, "all are unhealthy at once, healthy after good probes", 1),
    "lost": Promise(4, "the GPU is unhealthy and stays listed"),
    "not listed": Promise(4, "the GPU is unhealthy and stays listed", 2),
    "call fails": Promise(4, "the GPU is unhealthy and stays listed"),
    "call hangs": Promise(10, "the GPU is unhealthy; no other GPU is", 2),
    "handle fails": Promise(3, "a GPU whose probes pass stays healthy", 2),
    "back": Promise(9, "the GPU is healthy after good probes; a returned one needs no reset", 24),
    "memory errors": Promise(3, "the GPU is unhealthy until it is reset"),
    "remap failed": Promise(3, "the GPU is unhealthy until it is reset", 2),
    "remap pending": Promise(3, "nothing changes; it is noted", 1),
    "recovery action": Promise(3, "the GPU is unhealthy until the driver takes it back", 3),
    "recovery action over": Promise(5, "what the driver no longer asks for is over", 6),
    "reset": Promise(7, "a reset that is seen ends what waits for it", 14),
    "event waits fail": Promise(2, "nothing changes; probes go on", 1),
    "release": Promise(9, "NVML is closed for as long as asked; nothing changes", 1),
    "reset done": Promise(9, "what waits for a reset is over, as the operator says", 2),
    "driver blinks": Promise(9, "all are unhealthy, healthy when it answers", 1, flaps=True),
    "driver gone": Promise(25, "the agent ends with 1, for a new container", 1, True, True),
    # The kubelet
    "kubelet restart": Promise(5, "registered with the new kubelet; the list is as before", 3),
    "kubelet away": Promise(5, "registered when it is back", 2),
    "kubelet socket stale": Promise(5, "registered when somebody listens again", 2),
    "register refused": Promise(5, "registered soon after the kubelet accepts", 1),
    "kubelet slow": Promise(6, "registered when the kubelet is done", 1),
    "stream drop": Promise(5, "registered again", 3),
    "own socket removed": Promise(6, "served and registered again", 2),
    "half-open connections": Promise(2, "nothing changes", 2),
    "slow reader": Promise(3, "the kubelet's own stream goes on", 2),
    "slow scrapers": Promise(2, "nothing changes", 1),
    # Who holds what
    "pods change": Promise(4, "the report has the new holders", 3),
    "pod resources away": Promise(4, "reported; the last holders stay", 2),
    "pod resources fail": Promise(4, "reported; the last holders stay", 1),
    "pod resources hang": Promise(14, "reported; the last holders stay", 1),
    "checkpoint is a FIFO": Promise(4, "nothing changes", 1),
    "pod resources back": Promise(20, "the report has the holders", 6),
    # The process
    "clock jump": Promise(2, "nothing changes", 2),
    "stopped": Promise(6, "right after it goes on", 2),
    "SIGTERM": Promise(12, "ends with 0 within 2 s; the next one has the same list", 2, True, True),
    "SIGKILL": Promise(12, "the next agent has the same list", 2, True, True),
}  # fmt: skip


def summary(seconds: list[float]) -> tuple[int, float, float]:
    """Count, median and worst."""
    return len(seconds), median(seconds), max(seconds)


def markdown_table() -> str:
    """The table of docs/reliability.md."""
    record = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {}
    seen = record.get("faults", {})
    lines = [
        "| fault | what is promised | within | times | median | worst |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, promise in PROMISES.items():
        count, middle, worst = seen.get(name, (0, None, None))
        numbers = ["-" if n is None else f"{n:.3f} s" for n in (middle, worst)]
        lines.append(
            f"| {name} | {promise.what} | {promise.seconds:g} s | {count} | {' | '.join(numbers)} |"
        )
    runs = [record[each] for each in ("where", "restarts", "hostile") if each in record]
    lines += ["", f"While a call to another GPU hangs: {HANG_ADDS:g} s more."]
    if NOT_YET:
        lines.append(f"Not kept yet, and left out: {', '.join(sorted(NOT_YET))}.")
    return "\n".join([*lines, "", *(runs or ["Not measured yet."])])
