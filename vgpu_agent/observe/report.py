"""What the agent says of its node, as values: the one schema of /status.json.

The running agent makes a `Report` (`reporting`) and writes it as JSON; `status`, `doctor` and the
page read it. Memory is in bytes, times are ISO 8601 in UTC. docs/status.md is made from the
classes.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum

from vgpu_agent.model.acceptance import Acceptance, Counts
from vgpu_agent.model.advice import Remedy
from vgpu_agent.model.limits import MemorySource, Mode
from vgpu_agent.model.place import Step
from vgpu_agent.observe.mps import MpsReport
from vgpu_agent.store import decoded

FORMAT = 2
"""Grows when a field goes away or means something else; new fields may come at any time."""


@dataclass(frozen=True, slots=True)
class DriverReport:
    """The source of GPUs: its version, once it answered; `error` is null while it answers.

    `released_until`: NVML is closed until then, so that GPUs can be reset; null where it is not.
    `since`: since then it is up, or not; null where it was never otherwise.
    """

    up: bool
    version: str | None
    error: str | None
    released_until: str | None
    since: str | None


@dataclass(frozen=True, slots=True)
class KubeletReport:
    """The session with the kubelet. `connected`: it is registered with and follows the list.

    `streams` counts its open streams of the list. `error` says why the last registration failed or
    ended; null while it holds. `rival` names another plugin that seems to serve our resource.
    `since`: since then it is connected, or not; null where it was never otherwise.
    """

    connected: bool
    registered: bool
    streams: int
    error: str | None
    rival: str | None
    since: str | None


@dataclass(frozen=True, slots=True)
class PodResourcesReport:
    """Whether the kubelet says who holds what, and why not."""

    up: bool
    error: str | None


@dataclass(frozen=True, slots=True)
class LimitsReport:
    """Memory limits by the driver: `mode` is how they come about, `error` why they do not.

    `missing` counts containers whose limits are not in effect.
    """

    mode: Mode
    error: str | None
    missing: int


@dataclass(frozen=True, slots=True)
class FaultReport:
    """A reason for which a GPU is unhealthy, in words too. `ends` says how: `by a reset`."""

    reason: str
    since: str
    detail: str
    ends: str


@dataclass(frozen=True, slots=True)
class GpuReport:
    """An advertised GPU: `healthy` where it has no `faults`. `notes` are worth knowing anyway.

    `accepts`: a vGPU of it is known to be free, and can be given to a pod now. `remedy` is what
    makes it healthy again, one for all its faults; null of a healthy GPU.
    `memory_used_bytes` and `unattributed_processes` (of no container that holds its vGPUs) are null
    where they are not known; `numa_node` where the platform names none. `vgpu_bytes` is what one
    vGPU is worth. For `recovery_wait_seconds` its probes must pass before it is proven good.
    """

    uuid: str
    index: int
    model: str
    memory_bytes: int | None
    memory_used_bytes: int | None
    pci_bus_id: str
    numa_node: int | None
    healthy: bool
    accepts: bool
    vgpus: Counts
    vgpu_bytes: int | None
    faults: tuple[FaultReport, ...]
    remedy: Remedy | None
    notes: tuple[str, ...]
    recovery_wait_seconds: float
    unattributed_processes: int | None


@dataclass(frozen=True, slots=True)
class ExcludedReport:
    """A GPU that is not shared, and why."""

    uuid: str
    index: int
    model: str
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class AllocationReport:
    """What a container holds and uses of a GPU: the `numbers` of its vGPUs.

    `memory_share_bytes` is what they are worth, null where some of them are no longer advertised;
    `memory_limited`: each of its processes is held to it by MPS, or all by the driver.

    `memory_used_bytes` is what the container has, by the `memory_source`: the `driver`, or its
    `processes`, whose number is null where they are not looked at. `memory_peak_bytes` is the most
    that was seen. `memory_limit_bytes` is the driver's limit, null where there is none, and
    `memory_limit_problem` says why that is not in effect.
    """

    namespace: str
    pod: str
    container: str
    gpu_uuid: str
    gpu_index: int
    numbers: tuple[int, ...]
    memory_share_bytes: int | None
    memory_limited: bool
    memory_used_bytes: int | None
    memory_source: MemorySource | None
    memory_peak_bytes: int | None
    memory_limit_bytes: int | None
    memory_limit_problem: str | None
    processes: int | None

    @property
    def is_over_share(self) -> bool:
        """Whether it is known to use more memory than its share."""
        used, share = self.memory_used_bytes, self.memory_share_bytes
        return used is not None and share is not None and used > share


class Verdict(StrEnum):
    """What a check came to. `FAIL`: some vGPUs, or all, cannot be given until that ends."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, what was found, and what to do about it where that is not ok.

    `gpu` is the UUID of the GPU that it is about; null where it is about the node. `steps` are the
    commands of the advice, in their order.
    """

    name: str
    verdict: Verdict
    detail: str
    advice: str = ""
    steps: tuple[Step, ...] = ()
    gpu: str | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """The node. `acceptance` says whether it accepts new vGPU pods; every view begins with it.

    `node`, `namespace` and `pod` are the names of the node and of the agent's own pod: the host
    name, and null, where they are not set. `resource` is the name of the vGPUs in Kubernetes.
    `checks` are what `status`, `doctor` and the page say of all this, and what to do. `cordoned`
    has the reason, which may be empty, of every GPU that is cordoned, listed or not, by its UUID.
    `gone` has the UUIDs of GPUs that were seen in this boot of the node and are no longer listed.

    `health_checks` and `process_metrics`: whether GPUs are probed, and processes looked at;
    `names_pods`: whether this document names pods that hold vGPUs. `problems` are troubles of the
    agent itself that have no place elsewhere.

    `largest_free`: the most vGPUs of one GPU that a container can be given, if the node accepts
    any. `orphaned`: the vGPUs that are held and no longer advertised. These two and `allocations`
    are null where it is unknown who holds what; `allocations` also where `names_pods` is false.
    """

    format: int
    version: str
    node: str
    namespace: str | None
    pod: str | None
    time: str
    resource: str
    acceptance: Acceptance
    vgpus: Counts
    largest_free: int | None
    driver: DriverReport
    kubelet: KubeletReport
    mps: MpsReport | None
    memory_limits: LimitsReport
    podresources: PodResourcesReport
    health_checks: bool
    process_metrics: bool
    names_pods: bool
    problems: tuple[str, ...]
    gpus: tuple[GpuReport, ...]
    excluded: tuple[ExcludedReport, ...]
    cordoned: dict[str, str]
    gone: tuple[str, ...]
    allocations: tuple[AllocationReport, ...] | None
    orphaned: tuple[str, ...] | None
    checks: tuple[Check, ...]


# As JSON


def to_json(report: Report) -> bytes:
    """The report as it is served."""
    return json.dumps(asdict(report), indent=2).encode() + b"\n"


def from_json(text: bytes) -> Report:
    """Reads what `to_json` wrote. Raises ValueError with the reason.

    Fields that are not known here are passed over. All text is fit for a terminal.
    """
    try:
        data: object = json.loads(text)
    except RecursionError as error:
        raise ValueError("not JSON that anybody means") from error
    if not isinstance(data, Mapping) or "format" not in data:
        raise ValueError("not a report of a vgpu-agent")
    if data["format"] != FORMAT:
        found = repr(data["format"])[:20]
        raise ValueError(f"a report of format {found}; this version reads format {FORMAT}")
    try:
        report: Report = decoded(Report, data, "report", visible)
    except OverflowError as error:
        raise ValueError("a number is too large") from error
    return report


def iso(seconds: float) -> str:
    """A time of the report, from seconds since the epoch."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def utc(time: str) -> str:
    """A time of the report, for people."""
    return re.sub(r"^(\S+)T(\d\d:\d\d:\d\d)(\.\d+)?(Z|\+00:00)$", r"\1 \2 UTC", time)


def visible(text: str) -> str:
    """The text with everything that is no plain character written out: pods name themselves."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )
