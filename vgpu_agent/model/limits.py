"""Memory limits that the driver enforces: what a container should have, and what it has.

A limit is of a container's cgroup on one GPU (`nvmlDeviceSetMemoryLimits_v1`, driver r615): all its
processes together cannot take more, with MPS or without.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from vgpu_agent.model.devices import SharedGpu, by_gpu
from vgpu_agent.model.holders import Holder, Used
from vgpu_agent.model.rules import MIB


class Mode(StrEnum):
    """How memory limits by the driver come about on a node now.

    `driver`: a container of ours sets them. `hook`: the container toolkit may, by the variables
    that containers get, and it is read back whether it did. `none`: there are none. `off`.
    """

    DRIVER = "driver"
    HOOK = "hook"
    NONE = "none"
    OFF = "off"


class MemorySource(StrEnum):
    """Who says how much memory a container has: the driver by its cgroup, or its processes."""

    DRIVER = "driver"
    PROCESSES = "processes"


@dataclass(frozen=True, slots=True)
class Memory:
    """A container's memory on a GPU, in bytes: in use, the most that was seen, the driver's limit.

    None is not known, and of the limit none.
    """

    used_bytes: int | None = None
    source: MemorySource | None = None
    peak_bytes: int | None = None
    limit_bytes: int | None = None


Shares = Mapping[str, Sequence[int]]
"""What one vGPU of a GPU is worth, two, and so on, in bytes, by UUID: for GPUs whose memory is
known."""

NOT_APPLIED = (
    "no container has its limit: the node's container toolkit does not set them (1.20.1 and later"
    " do)"
)

GRACE = 5.0
"""Seconds after which a container without its limits is reported."""

ROUNDED = 2 * MIB
"""By how much the driver may round a limit: a page of CUDA's."""


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """What the driver has for a cgroup on a GPU, in bytes (`nvmlDeviceGetMemoryLimits_v1`).

    `hard_bytes` None is no limit. `soft_bytes` are kept for the cgroup. `used_bytes` is what its
    processes have now.
    """

    hard_bytes: int | None
    soft_bytes: int
    used_bytes: int


@dataclass(frozen=True, slots=True)
class Limited:
    """A container that holds vGPUs and runs, with what the driver has for it, by UUID.

    `peaks` are the most that was seen in use. `problem` says why its limits are not in effect.
    """

    holder: Holder
    limits: Mapping[str, MemoryLimit] = field(default_factory=dict)
    peaks: Mapping[str, int] = field(default_factory=dict)
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class LimitsLook:
    """What is known of the driver's memory limits at one moment.

    `error` says why there can be none on this node, or why nothing is known; `gpus` the same of
    single GPUs, by UUID. `hook` says why containers get no variables for the container toolkit's
    hook, which would keep them from starting; None where it cannot. `certain`: the hook is known
    to set the limits before a container starts. `enforced`: what is missing is set. `applied`:
    some limit was seen in effect, or there was none to be seen.
    """

    error: str | None = None
    gpus: Mapping[str, str] = field(default_factory=dict)
    hook: str | None = None
    certain: bool = False
    enforced: bool = False
    applied: bool = True
    containers: tuple[Limited, ...] = ()

    @property
    def mode(self) -> Mode:
        """How limits come about."""
        if self.error is not None:
            return Mode.NONE
        if self.enforced:
            return Mode.DRIVER
        return Mode.HOOK if self.hook is None and self.applied else Mode.NONE

    @property
    def why_none(self) -> str | None:
        """Why the mode is `none`."""
        if self.mode is not Mode.NONE:
            return None
        return self.error or self.hook or NOT_APPLIED

    @property
    def missing(self) -> tuple[Limited, ...]:
        """The containers whose limits are not in effect, each once.

        Two are of one name where one starts again, or its pod was deleted by force.
        """
        found = {each.holder: each for each in self.containers if each.problem is not None}
        return tuple(found.values())

    def why_not(self, uuids: Iterable[str]) -> str | None:
        """Why the driver does not limit what is on all of these GPUs; None where it can."""
        return self.error or next((self.gpus[uuid] for uuid in uuids if uuid in self.gpus), None)


def shares(gpus: Iterable[SharedGpu]) -> Shares:
    """The shares of these GPUs, in whole MiB: what the toolkit's hook takes."""
    found = {}
    for shared in gpus:
        each = [shared.share_bytes(n) for n in range(1, shared.replicas + 1)]
        found[shared.gpu.uuid] = [share // MIB * MIB for share in each if share is not None]
    return {uuid: each for uuid, each in found.items() if each}


def wanted(device_ids: Iterable[str], of: Shares) -> dict[str, int]:
    """The limit on each GPU, in bytes by UUID, of a container that holds these vGPUs.

    None for a GPU that is not known, and for one that was divided anew since: what its vGPUs were
    worth is not known then.
    """
    return {
        uuid: of[uuid][len(each) - 1]
        for uuid, each in by_gpu(device_ids).items()
        if uuid in of and max(each) < len(of[uuid])
    }


def memory_of(uuid: str, limited: Limited | None, used: Used | None) -> Memory:
    """What is known of a container's memory on a GPU. The driver's own word comes first."""
    limit = None if limited is None else limited.limits.get(uuid)
    if limited is not None and limit is not None:
        peak = limited.peaks.get(uuid)
        return Memory(limit.used_bytes, MemorySource.DRIVER, peak, limit.hard_bytes)
    if used is None or used.memory_bytes is None:
        return Memory()
    return Memory(used.memory_bytes, MemorySource.PROCESSES)


def in_effect(found: MemoryLimit, hard: int, soft: int) -> bool:
    """Whether what the driver has is what a container should have, but for rounding."""
    if found.hard_bytes is None or abs(found.hard_bytes - hard) >= ROUNDED:
        return False
    return abs(found.soft_bytes - soft) < ROUNDED


def is_held_to(limit: int | None, share: int | None) -> bool:
    """Whether a limit in bytes keeps a container within its share; any does where that is None.

    A pod may set a limit of its own, or have that of a cgroup above, which are larger.
    """
    return limit is not None and (share is None or limit < share + ROUNDED)


def differs(found: MemoryLimit, hard: int, soft: int, *, enforced: bool) -> str:
    """What the driver has that is not in effect, in words; `enforced`: it was just set."""
    verb, has, should, variable = "has", found.hard_bytes, hard, "NVIDIA_GPU_MEMORY_LIMIT"
    if in_effect(found, hard, found.soft_bytes):
        verb, has, should, variable = "keeps", found.soft_bytes, soft, "NVIDIA_GPU_MEMORY_REQUEST"
    words = "no limit" if has is None else f"{has // MIB} MiB"
    why = (
        "somebody else sets it too"
        if enforced
        else f"the pod sets {variable} itself, its GPU was divided in another way since it started,"
        " or the node's container toolkit does not apply it (1.20.1 and later do)"
    )
    return f"the driver {verb} {words} for it instead of {should // MIB} MiB: {why}"
