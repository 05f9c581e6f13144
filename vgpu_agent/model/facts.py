"""What the edges report, as values: the driver's answers and the MPS daemon's.

Nothing here says what a fact means (`health`, `node`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from vgpu_agent.model.devices import Excluded, Gpu
from vgpu_agent.model.rules import MpsLimits

EVENTS = "events"
"""What is missing of a GPU (`Reading.missing`) whose XIDs the driver does not report."""


class RecoveryAction(IntEnum):
    """What the driver says a GPU needs (NVML field `GET_GPU_RECOVERY_ACTION`, 230)."""

    NONE = 0
    GPU_RESET = 1
    NODE_REBOOT = 2
    DRAIN_P2P = 3
    DRAIN_AND_RESET = 4
    IMEX_DOMAIN_RESET = 5
    BUS_RESET = 6
    SYSTEM_REBOOT = 7


class ComputeMode(IntEnum):
    """Who may open a CUDA context on a GPU (`nvmlComputeMode_t`)."""

    DEFAULT = 0
    EXCLUSIVE_THREAD = 1
    PROHIBITED = 2
    EXCLUSIVE_PROCESS = 3


@dataclass(frozen=True, slots=True)
class Scan:
    """All GPUs that the driver sees now. A GPU that is lost is not among `gpus`.

    `undescribed`: GPUs that are there and do not say what they are, with the reason. `silent`: what
    known GPUs, by UUID, did not answer in time; they are among `gpus` as they were. `returned`:
    GPUs whose handle of the scan before was lost, and which were initialized since. `lost`: GPUs
    that the driver counts, that said what they are before, and that are lost.
    """

    driver_version: str
    gpus: tuple[Gpu, ...]
    undescribed: tuple[Excluded, ...] = ()
    silent: Mapping[str, str] = field(default_factory=dict)
    returned: frozenset[str] = frozenset()
    lost: tuple[Excluded, ...] = ()


@dataclass(frozen=True, slots=True)
class Reading:
    """What one probe of a GPU read. None: the GPU or the driver does not offer it.

    `error` is the driver's word for a call that failed, `hung` says that a call did not return;
    `lost` says that the GPU is gone from its handle. `uncorrectable_ecc` and `energy_millijoules`
    count since the driver initialized the GPU. `recovery_action` is a number, since drivers may
    know more of them than we do. `missing` says why something is not known that it should offer.
    """

    lost: bool = False
    error: str | None = None
    hung: bool = False
    uncorrectable_ecc: int | None = None
    remap_failed: bool | None = None
    remap_pending: bool | None = None
    recovery_action: int | None = None
    compute_mode: ComputeMode | None = None
    memory_used_bytes: int | None = None
    energy_millijoules: int | None = None
    missing: Mapping[str, str] = field(default_factory=dict)

    @property
    def answered(self) -> bool:
        """Whether the GPU said how it is."""
        return not (self.lost or self.hung or self.error is not None)

    @classmethod
    def silent(cls, what: str, seconds: float) -> "Reading":
        """Of a GPU that did not answer that within so many seconds."""
        return cls(hung=True, error=f"the driver did not answer within {seconds:g} s: {what}")


@dataclass(frozen=True, slots=True)
class Cordon:
    """The operator took a GPU out of service: when (seconds since the epoch), and why, or `""`."""

    since: float
    reason: str = ""


@dataclass(frozen=True, slots=True)
class XidEvent:
    """The driver reported an XID. `uuid` is None where it could not name the GPU."""

    uuid: str | None
    xid: int


@dataclass(frozen=True, slots=True)
class RecoveryActionChanged:
    """The driver changed its mind about what a GPU needs: read it again."""

    uuid: str | None


GpuEvent = XidEvent | RecoveryActionChanged


@dataclass(frozen=True, slots=True)
class AppliedGpu:
    """A GPU as its MPS daemon knows it. `ordinal` is its CUDA number there.

    `memory_limit_bytes` is the daemon's default limit of pinned memory for one client; None is no
    limit. `server_bytes` is what the daemon's server has of the GPU itself, None until one ran.
    """

    uuid: str
    ordinal: int
    replicas: int
    memory_limit_bytes: int | None
    server_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class DaemonLook:
    """One MPS daemon, as it was seen last.

    `generation` names the daemon that serves its directory. `gpus` and `thread_percentage` (of one
    client, None for 100) are what it was set up for.

    `down` says why it is taken for gone, `problem` why its limits are not in effect, `fault` why
    its clients are lost: each makes its vGPUs unhealthy, None where all is well. `busy` says why it
    could not be asked for a while, and `failing` that its servers end soon after their start; the
    vGPUs stay what they were.

    `servers` are PIDs. `clients` counts clients by the UUID of their GPU, `waiting` those of
    another user. `crashes` counts servers that ended by an error, or before they were ready, since
    the daemon's pod started.
    """

    generation: str | None = None
    gpus: tuple[AppliedGpu, ...] = ()
    thread_percentage: int | None = None
    down: str | None = None
    problem: str | None = None
    fault: str | None = None
    busy: str | None = None
    failing: str | None = None
    servers: tuple[int, ...] = ()
    clients: Mapping[str, int] = field(default_factory=dict)
    waiting: int = 0
    crashes: int = 0


@dataclass(frozen=True, slots=True)
class MpsLook:
    """The MPS daemons of the node, by name (`SharingRules.daemon_of`), at one moment.

    `error` says why nothing is known of them. `limits` are those that all were set up for.
    `unwatched` says that nobody looks at them now: what is here is older.
    """

    error: str | None = None
    limits: MpsLimits | None = None
    daemons: Mapping[str, DaemonLook] = field(default_factory=dict)
    unwatched: str | None = None

    def applied_to(self, uuid: str) -> AppliedGpu | None:
        """What a daemon was set up for on a GPU; None where none knows the GPU."""
        known = (gpu for daemon in self.daemons.values() for gpu in daemon.gpus)
        return next((gpu for gpu in known if gpu.uuid == uuid), None)
