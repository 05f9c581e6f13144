"""Memory limits that the driver enforces: what a container should have, and what it has.

A limit is of a container's cgroup on one GPU (`nvmlDeviceSetMemoryLimits_v1`, driver r615): all its
processes together cannot take more, with MPS or without.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from vgpu_agent.model.holders import Holder
from vgpu_agent.model.rules import MIB

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

    `pod_uid` and `container` are as the kubelet's checkpoint has them. `holder` is None where its
    names are not known. `wanted` are bytes, `peaks` the most that was seen in use. `problem` says
    why its limits are not in effect.
    """

    pod_uid: str
    container: str
    holder: Holder | None
    wanted: Mapping[str, int]
    limits: Mapping[str, MemoryLimit] = field(default_factory=lambda: MappingProxyType({}))
    peaks: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class LimitsLook:
    """What is known of the driver's memory limits at one moment.

    `error` says why there can be none on this node, or why nothing is known; `gpus` the same of
    single GPUs, by UUID. `hook` says why containers get no variables for the container toolkit's
    hook, which would keep them from starting; None where it cannot. `certain`: the hook is known
    to set the limits before a container starts. `enforced`: what is missing is set.
    """

    error: str | None = None
    gpus: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    hook: str | None = None
    certain: bool = False
    enforced: bool = False
    containers: tuple[Limited, ...] = ()


def whole_mib(share: int) -> int:
    """A share of memory as a limit: whole MiB, which is what the toolkit's hook takes."""
    return share // MIB * MIB


def in_effect(found: MemoryLimit, wanted: int, *, guarantee: bool) -> bool:
    """Whether what the driver has is what a container should have, but for rounding."""
    if found.hard_bytes is None or abs(found.hard_bytes - wanted) >= ROUNDED:
        return False
    return abs(found.soft_bytes - (wanted if guarantee else 0)) < ROUNDED
