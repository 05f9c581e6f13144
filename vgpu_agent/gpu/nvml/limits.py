"""Memory limits of cgroups, as NVML has them since driver r615. Blocks.

What the driver cannot do is an answer in words, as one GPU of a node or one cgroup of many may be
of that kind. Only a GPU that is lost is an error.
"""

import pynvml

from vgpu_agent.gpu.nvml.calls import GONE, Handle
from vgpu_agent.model.limits import MemoryLimit

NO_LIMIT: int = pynvml.NVML_DEVICE_MEMORY_LIMIT_MAX

_WHY = {
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND: (
        "the driver is too old to limit memory: r615 (CUDA 13.4) is the first that can"
    ),
    pynvml.NVML_ERROR_NOT_SUPPORTED: (
        "memory of this GPU cannot be limited: it is in MIG mode, or the driver's memory accounting"
        " is switched off (registry key RmMemacctMode of its kernel module)"
    ),
    pynvml.NVML_ERROR_NO_PERMISSION: (
        "the driver lets only root with the capability SYS_ADMIN limit memory"
    ),
    pynvml.NVML_ERROR_NOT_FOUND: (
        "the driver finds no cgroup there that can be limited: it is gone, or the kernel keeps the"
        " limits and it has no file dmem.max"
    ),
}


def memory_limit(handle: Handle, cgroup: str) -> MemoryLimit | str:
    """What the driver has for a cgroup, or why it does not say. Raises NVMLError for a lost GPU."""
    path = _path(cgroup)
    if path is None:
        return _no_path(cgroup)
    asked = pynvml.c_nvmlGetMemoryLimits_v1_t(nameSpace=path)
    try:
        pynvml.nvmlDeviceGetMemoryLimits_v1(handle, asked)
    except pynvml.NVMLError as error:
        return _why("nvmlDeviceGetMemoryLimits_v1", error)
    hard = int(asked.hardLimit)
    return MemoryLimit(
        hard_bytes=None if hard == NO_LIMIT else hard,
        soft_bytes=int(asked.softLimit),
        used_bytes=int(asked.currentUsed),
    )


def limit_memory(handle: Handle, cgroup: str, hard: int | None, soft: int) -> str | None:
    """Sets the limits of a cgroup, in bytes; None as `hard` is no limit.

    Answers why it was not set. Raises NVMLError for a lost GPU.
    """
    path = _path(cgroup)
    if path is None:
        return _no_path(cgroup)
    most = NO_LIMIT if hard is None else hard
    if not 0 <= soft <= most <= NO_LIMIT:  # ctypes would take the rest of them by 2**64
        return f"soft {soft} and hard {hard} bytes are no limits: allowed is 0 <= soft <= hard"
    limits = pynvml.c_nvmlSetMemoryLimits_v1_t(nameSpace=path, softLimit=soft, hardLimit=most)
    try:
        pynvml.nvmlDeviceSetMemoryLimits_v1(handle, limits)
    except pynvml.NVMLError as error:
        return _why("nvmlDeviceSetMemoryLimits_v1", error)
    return None


def _path(cgroup: str) -> bytes | None:
    """As C takes it, which would end at a NUL; None for what is no full path."""
    try:
        path = cgroup.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return None
    return path if path.startswith(b"/") and b"\0" not in path else None


def _no_path(cgroup: str) -> str:
    return f"{cgroup!r} is not the full path of a cgroup"


def _why(call: str, error: pynvml.NVMLError) -> str:
    if error.value in GONE:
        raise error
    return _WHY.get(error.value, f"{call}: {error}")
