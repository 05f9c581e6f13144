"""The settings that decisions depend on, as one value for sharing and one for health.

A field is named as its setting: `replicas` is VGPU_REPLICAS.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType

MIB = 2**20
GIB = 2**30

MPS_SERVER_MARGIN = 512 * MIB
"""What `VGPU_MEMORY_RESERVED=auto` keeps for the MPS server of a GPU, in bytes. A fixed number: the
same Allocate request must have the same answer for as long as the settings are the same."""

MAX_REPLICAS = 1024
"""Most vGPUs of a GPU, by count or by size."""

MPS_MAX_CLIENTS = 48
"""Client contexts of a GPU that every MPS from Volta on can serve (NVIDIA's MPS documentation)."""


class MpsLimits(StrEnum):
    """Where the limits of a container's MPS clients are put.

    `client`: into the container's environment, where a pod's author can lift them. `server`: as
    the daemon's defaults, which no client can exceed; then a container has one vGPU. `none`.
    """

    CLIENT = "client"
    SERVER = "server"
    NONE = "none"


class Threads(StrEnum):
    """The two ways to bound threads that are not a factor."""

    SHARE = "share"
    NONE = "none"


class DeviceList(StrEnum):
    """How the NVIDIA container runtime learns which GPUs a container sees.

    By variable; by mounts, for clusters that refuse the variable to unprivileged pods; by names of
    the container device interface; by both of these.
    """

    ENVVAR = "envvar"
    VOLUME_MOUNTS = "volume-mounts"
    CDI = "cdi"
    CDI_ENVVAR = "cdi+envvar"

    @property
    def by_cdi(self) -> bool:
        """Whether a container can only be given GPUs that the host's CDI specs name."""
        return self in (DeviceList.CDI, DeviceList.CDI_ENVVAR)


class Placement(StrEnum):
    """How containers are put on GPUs."""

    SPREAD = "spread"
    PACK = "pack"


@dataclass(frozen=True, slots=True)
class SharingRules:
    """How GPUs become vGPUs, and what a container with some of them is started with.

    `mps`: shared by CUDA MPS, otherwise by plain time-slicing. By count (`replicas`), or by size
    where `device_memory` bytes are set; `replicas_by_gpu` overrides the count for single GPUs, by
    index, UUID or model name: 1 is a whole GPU, 0 leaves the GPU to others. `memory_reserved` bytes
    of each GPU are kept out of the shares, None for the margin that MPS needs. `mps_max_clients`
    None is the documented bound. `mps_shm_directory` is None where containers keep their own
    /dev/shm. `mps_exclusive`: the MPS pod sets the GPUs to EXCLUSIVE_PROCESS.
    """

    mps: bool = True
    replicas: int = 10
    replicas_by_gpu: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    device_memory: int | None = None
    memory_reserved: int | None = None
    placement: Placement = Placement.SPREAD
    device_list: DeviceList = DeviceList.ENVVAR
    cdi_kind: str = "nvidia.com/gpu"
    mps_limits: MpsLimits = MpsLimits.CLIENT
    mps_threads: Threads | float = Threads.SHARE
    mps_max_clients: int | None = None
    mps_pipe_directory: str = "/run/vgpu-agent/mps/pipe"
    mps_shm_directory: str | None = "/dev/shm/vgpu-mps"  # noqa: S108 - a path on the host
    mps_exclusive: bool = True

    @property
    def reserved_bytes(self) -> int:
        """Bytes of each GPU that are kept out of the shares, beside what the driver reserves."""
        if self.memory_reserved is not None:
            return self.memory_reserved
        return MPS_SERVER_MARGIN if self.mps else 0

    @property
    def max_clients(self) -> int | None:
        """The most vGPUs of a GPU that MPS can serve; None without MPS."""
        return (self.mps_max_clients or MPS_MAX_CLIENTS) if self.mps else None

    @property
    def min_compute_capability(self) -> tuple[int, int] | None:
        """Volta is the first with limits for each MPS client and an address space of its own."""
        return (7, 0) if self.mps else None

    @property
    def limits_memory(self) -> bool:
        """Whether a process of a container is held to its share of memory."""
        return self.mps and self.mps_limits is not MpsLimits.NONE

    def with_applied_limits(self, applied: MpsLimits | None) -> "SharingRules":
        """As the daemon was set up: its own limits come and go only with the daemon.

        `applied` is None where that is unknown. Without limits of the daemon's own the settings
        choose freely between the other two kinds.
        """
        server = MpsLimits.SERVER
        if applied is None or (self.mps_limits is server) == (applied is server):
            return self
        return replace(self, mps_limits=applied)


@dataclass(frozen=True, slots=True)
class HealthRules:
    """When a GPU is unhealthy, and for how long. Times are in seconds.

    `lost_card_seconds`: how long a lost GPU stays listed. `driver_wait`: how long a library that is
    missing is waited for before the process ends, for its container to be created again.
    """

    health_checks: bool = True
    health_interval: float = 5.0
    recovery_seconds: float = 60.0
    lost_card_seconds: float = 3600.0
    driver_wait: float = 300.0
    ignored_xids: frozenset[int] = frozenset()
    critical_xids: frozenset[int] = frozenset()
