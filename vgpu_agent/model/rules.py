"""The settings that decisions depend on, as one value for sharing and one for health.

A field is named as its setting: `replicas` is VGPU_REPLICAS.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType

MIB = 2**20
GIB = 2**30

MPS_SERVER_MARGIN = 512 * MIB
"""What `VGPU_MEMORY_RESERVED=auto` keeps for the MPS server of a GPU, in bytes. A fixed number: the
same Allocate request must have the same answer for as long as the settings are the same."""

CONTEXT_MPS, CONTEXT = 448 * MIB, 832 * MIB
"""What a process cannot allocate of a limit that the driver enforces, in bytes, as an MPS client
and without MPS: its CUDA context (NVIDIA's measurement with driver 615, rounded up)."""

MAX_REPLICAS = 1024
"""Most vGPUs of a GPU, by count or by size."""

MPS_CONTEXTS, MPS_MAX_CLIENTS = 48, 60
"""Client contexts of a GPU that every MPS from Volta on serves, and that the newest one does, from
CUDA 13.1 on (NVIDIA's MPS documentation)."""

SHARED = "shared"
"""The directory in `mps_shm_directory` that containers have as their /dev/shm."""

MAX_DAEMON_NAME = 40
"""Letters of the name of an MPS daemon: the UUID of a GPU, `GPU-` and 36 more."""


class MpsLimits(StrEnum):
    """Where the limits of a container's MPS clients are put.

    `client`: into the container's environment, where a pod's author can lift them. `server`: as
    the daemon's defaults, which no client can exceed; then a container has one vGPU. `none`.
    """

    CLIENT = "client"
    SERVER = "server"
    NONE = "none"


class MpsDaemons(StrEnum):
    """What an MPS daemon is for: one GPU, or all of the node.

    With `gpu` a fault, a hang, a foreign user or a reset stays on one GPU, and the vGPUs of a
    container must come from one GPU: a process can be a client of one daemon only.
    """

    GPU = "gpu"
    NODE = "node"


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


class MemoryLimits(StrEnum):
    """Whether the driver itself holds a container to its memory: a limit of the container's cgroup.

    From driver r615 on, with MPS and without it. `auto`: where node and container toolkit do it by
    themselves. `driver`: wanted, set where it is missing, and without it no vGPU is given. `off`.
    """

    AUTO = "auto"
    DRIVER = "driver"
    OFF = "off"


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
    None is what the GPU's MPS serves. Each MPS daemon has a directory of its name in
    `mps_directory`. `mps_shm_directory` is None where containers keep their own /dev/shm.
    `mps_exclusive`: the MPS pod sets the GPUs to EXCLUSIVE_PROCESS. `memory_guarantee`: where the
    driver limits memory, a container's share is also kept for it.
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
    mps_daemons: MpsDaemons = MpsDaemons.GPU
    mps_directory: str = "/run/vgpu-agent/mps"
    mps_shm_directory: str | None = "/dev/shm/vgpu-agent"  # noqa: S108 - a path on the host
    mps_exclusive: bool = True
    memory_limits: MemoryLimits = MemoryLimits.AUTO
    memory_guarantee: bool = False

    @property
    def reserved_bytes(self) -> int:
        """Bytes of each GPU that are kept out of the shares, beside what the driver reserves."""
        if self.memory_reserved is not None:
            return self.memory_reserved
        return MPS_SERVER_MARGIN if self.mps else 0

    @property
    def context_bytes(self) -> int:
        """What a CUDA context takes of a container's memory."""
        return CONTEXT_MPS if self.mps else CONTEXT

    def daemon_of(self, uuid: str) -> str:
        """The name of the MPS daemon that serves a GPU, and of its directories."""
        if self.mps_daemons is MpsDaemons.NODE:
            return "node"
        return re.sub(r"[^A-Za-z0-9-]", "_", uuid)[:MAX_DAEMON_NAME]

    @property
    def limits_memory(self) -> bool:
        """Whether a process of a container is held to its share of memory."""
        return self.mps and self.mps_limits is not MpsLimits.NONE

    @property
    def one_each(self) -> bool:
        """Whether a container may have one vGPU only: the daemon's limits are the same for all."""
        return self.mps and self.mps_limits is MpsLimits.SERVER

    def with_applied_limits(self, applied: MpsLimits | None) -> "SharingRules":
        """As the daemon was set up: its own limits come and go only with the daemon.

        `applied` is None where that is unknown. Without limits of the daemon's own the settings
        choose freely between the other two kinds.
        """
        server = MpsLimits.SERVER
        if applied is None or (self.mps_limits is server) == (applied is server):
            return self
        return replace(self, mps_limits=applied)


DIVISION = (
    "replicas",
    "replicas_by_gpu",
    "device_memory",
    "memory_reserved",
    "mps_threads",
    "mps_max_clients",
)
"""The sharing rules that say how a GPU is divided: a daemon without servers takes others."""


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
