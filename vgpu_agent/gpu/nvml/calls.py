"""Single questions to NVML. Each blocks, and raises pynvml.NVMLError unless it says otherwise."""

from collections.abc import Callable
from pathlib import Path
from typing import NewType, TypeVar

import pynvml

from vgpu_agent.errors import DriverError, DriverLibraryError
from vgpu_agent.model.devices import Excluded, Gpu
from vgpu_agent.model.facts import ComputeMode

T = TypeVar("T")

Handle = NewType("Handle", object)
"""An opaque `nvmlDevice_t`."""

EventSet = NewType("EventSet", object)
"""An opaque `nvmlEventSet_t`."""

# Older releases of pynvml lack these two names; the numbers are NVML's.
RECOVERY_ACTION_FIELD: int = getattr(pynvml, "NVML_FI_DEV_GET_GPU_RECOVERY_ACTION", 230)
RECOVERY_ACTION_EVENT: int = getattr(pynvml, "nvmlEventTypeGpuRecoveryAction", 0x8000)
XID_EVENT: int = pynvml.nvmlEventTypeXidCriticalError

GONE = frozenset({pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_UNINITIALIZED})
_NO_MEMORY_V2 = frozenset(
    {
        pynvml.NVML_ERROR_NOT_SUPPORTED,
        pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
        pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
    }
)

_NO_SUCH_LIST = frozenset({pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND})

# What a container was given at its creation does not change any more.
_LIBRARY_ERRORS = frozenset(
    {pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH}
)

_INIT_HELP = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: (
        "libnvidia-ml.so.1 is not here: install the NVIDIA driver on the node, and run this"
        " container with the NVIDIA runtime, which brings the driver's libraries in"
    ),
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: (
        "the NVIDIA driver is not loaded: install it on the node or load its kernel module"
        " (nvidia-smi on the node must work)"
    ),
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: (
        "libnvidia-ml.so.1 and the loaded driver are of different versions: the driver was"
        " changed under a running system; restart this pod, and the node if that is not enough"
    ),
    pynvml.NVML_ERROR_NO_PERMISSION: (
        "the NVIDIA device files may not be opened: run this container with the NVIDIA runtime"
        " or as privileged, and look at the permissions of /dev/nvidia*"
    ),
}


def open_nvml() -> None:
    """Opens NVML; raises DriverError with what is missing and what to do."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        help_ = _INIT_HELP.get(error.value, "nvidia-smi and the kernel log on the node say more")
        kind = DriverLibraryError if error.value in _LIBRARY_ERRORS else DriverError
        raise kind(f"NVML does not start ({error}): {help_}") from error


def describe(index: int, handle: Handle, uuid: str, *, numa_root: Path) -> Gpu:
    """What a GPU is. `numa_root` is sysfs's folder of PCI devices."""
    total, reserved, _ = memory(handle)
    address = bus_id(text(lambda of: pynvml.nvmlDeviceGetPciInfo(of).busId, handle))
    return Gpu(
        uuid=uuid,
        index=index,
        model=text(pynvml.nvmlDeviceGetName, handle),
        memory_bytes=total,
        pci_bus_id=address,
        reserved_bytes=reserved,
        numa_node=numa_node(numa_root / address / "numa_node"),
        compute_capability=optional(compute_capability, handle),
        mig=bool(optional(in_mig_mode, handle)),
    )


def unreadable(index: int, uuid: str, error: Exception) -> Excluded:
    """A GPU that has never said what it is; without a UUID it has not even said which it is."""
    which = "the GPU" if uuid else f"index {index}"
    detail = f"{which} is not described by NVML ({error}): see nvidia-smi and the node's kernel log"
    gpu = Gpu(uuid=uuid, index=index, model="unknown", memory_bytes=0, pci_bus_id="unknown")
    return Excluded(gpu, "error", detail)


def text(ask: Callable[[Handle], str | bytes], handle: Handle) -> str:
    """A text of the driver; what is not UTF-8 in it is replaced."""
    try:
        found = ask(handle)
    except UnicodeDecodeError as error:
        found = error.object
    return found if isinstance(found, str) else found.decode(errors="replace")


def memory(handle: Handle) -> tuple[int, int, int]:
    """Total, reserved and used bytes. The first version of the call counts reserved as used."""
    try:
        info = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
        return int(info.total), int(info.reserved), int(info.used)
    except pynvml.NVMLError as error:
        if error.value not in _NO_MEMORY_V2:
            raise
    info = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return int(info.total), 0, int(info.used)


def compute_capability(handle: Handle) -> tuple[int, int]:
    """Major and minor."""
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return int(major), int(minor)


def in_mig_mode(handle: Handle) -> bool:
    """Whether it is divided into MIG devices."""
    return bool(pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE)


def uncorrectable_ecc(handle: Handle) -> int:
    """Uncorrectable memory errors since the driver initialized the GPU."""
    return int(
        pynvml.nvmlDeviceGetTotalEccErrors(
            handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
        )
    )


def energy(handle: Handle) -> int:
    """Millijoules since the driver initialized the GPU."""
    return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))


def compute_mode(handle: Handle) -> ComputeMode | None:
    """Who may open a context; None for a mode that is not known here."""
    mode = int(pynvml.nvmlDeviceGetComputeMode(handle))
    return ComputeMode(mode) if mode in tuple(ComputeMode) else None


def remapped_rows(handle: Handle) -> tuple[int, int, int, int]:
    """Correctable, uncorrectable, whether one is pending, whether one has failed."""
    correctable, uncorrectable, pending, failed = pynvml.nvmlDeviceGetRemappedRows(handle)
    return int(correctable), int(uncorrectable), int(pending), int(failed)


def recovery_action(handle: Handle) -> int | None:
    """What the driver asks for; None where it does not know the question."""
    (field,) = pynvml.nvmlDeviceGetFieldValues(handle, [RECOVERY_ACTION_FIELD])
    # Each field has a result of its own: an older driver does not know this one.
    return int(field.value.uiVal) if field.nvmlReturn == pynvml.NVML_SUCCESS else None


def running(handle: Handle, kind: str) -> list[tuple[int, int | None]]:
    """PIDs on a GPU and the bytes that each has, None where that is not available."""
    # By the name with its version: pynvml turns a missing function of the plain name into an
    # exception that is no NVMLError. Neither every driver nor every pynvml has both.
    for version in ("v3", "v2"):
        ask = getattr(pynvml, f"nvmlDeviceGet{kind}RunningProcesses_{version}", None)
        try:
            if ask is not None:
                return [(int(each.pid), each.usedGpuMemory) for each in ask(handle)]
        except pynvml.NVMLError as error:
            if error.value != pynvml.NVML_ERROR_FUNCTION_NOT_FOUND:
                raise
    raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)


def mps_clients(handle: Handle) -> list[tuple[int, int | None]]:
    """As `running`, of clients of MPS; none where a GPU or driver has no such list."""
    try:
        return running(handle, "MPSCompute")
    except pynvml.NVMLError as error:
        if error.value in _NO_SUCH_LIST:
            return []
        raise


def optional(ask: Callable[[Handle], T], handle: Handle) -> T | None:
    """The answer to a question that not every GPU or driver answers; that is no fault.

    Raises NVMLError only where the GPU is gone; other faults show in the calls that every GPU
    answers.
    """
    try:
        return ask(handle)
    except pynvml.NVMLError as error:
        if error.value in GONE:
            raise
        return None


def pointer(handle: Handle) -> bytes:
    """The value of a handle, which differs from another's: its ctypes object is new every time."""
    value: bytes = bytes(handle)  # type: ignore[call-overload]  # a ctypes pointer is a buffer
    return value


def bus_id(written: str) -> str:
    """A PCI bus ID as sysfs writes it; NVML's has eight digits of domain and capitals.

    What is no bus ID stays as it is.
    """
    domain, _, rest = written.lower().partition(":")
    try:
        return f"{int(domain, 16):04x}:{rest}"
    except ValueError:
        return written


def numa_node(path: Path) -> int | None:
    """The node in a sysfs file; -1 there means none."""
    try:
        node = int(path.read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None
