"""Single questions to NVML. Each blocks, and raises pynvml.NVMLError unless it says otherwise."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NewType, TypeVar

import pynvml

from vgpu_agent.errors import SHORTAGES, DriverError, DriverLibraryError
from vgpu_agent.model.advice import NVIDIA_RUNTIME
from vgpu_agent.model.devices import Excluded, Gpu, is_uuid
from vgpu_agent.model.facts import ComputeMode
from vgpu_agent.model.rules import MPS_CONTEXTS, MPS_MAX_CLIENTS

T = TypeVar("T")

Handle = NewType("Handle", object)
"""An opaque `nvmlDevice_t`."""

Beat = Callable[[str], None]
"""Is called before each call to NVML, with what is asked."""

EventSet = NewType("EventSet", object)
"""An opaque `nvmlEventSet_t`."""

RECOVERY_ACTION_FIELD: int = pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION
RECOVERY_ACTION_EVENT: int = pynvml.nvmlEventTypeGpuRecoveryAction
XID_EVENT: int = pynvml.nvmlEventTypeXidCriticalError

GONE = frozenset({pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_UNINITIALIZED})
# The GPU or the driver has no answer to the question, and never will.
NOT_OFFERED = frozenset(
    {
        pynvml.NVML_ERROR_NOT_SUPPORTED,
        pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
        pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
    }
)

LOST = "lost"
"""Why a GPU is excluded that was described before."""

MAX_GPUS = 256
"""No node has as many."""

MAX_MEMORY = 2**50
"""No GPU has a PiB."""

_NOT_AVAILABLE = 2**64 - 1

# What a container was given at its creation does not change any more.
_LIBRARY_ERRORS = frozenset(
    {pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH}
)

_INIT_HELP = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: (
        "libnvidia-ml.so.1 is not here: install the NVIDIA driver on the node, and for this"
        f" container to get its libraries {NVIDIA_RUNTIME}"
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
        f"the NVIDIA device files may not be opened: {NVIDIA_RUNTIME}; and look at the permissions"
        " of /dev/nvidia* on the node"
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


@dataclass(frozen=True, slots=True)
class Asked:
    """A GPU to which questions are put; `beat` is called before each with what is asked."""

    handle: Handle
    beat: Beat = lambda _: None

    def must(self, question: Callable[[Handle], T]) -> T:
        """The answer. Raises NVMLError."""
        self.beat(subject(question))
        return question(self.handle)

    def may(self, question: Callable[[Handle], T]) -> T | None:
        """The answer, None where the GPU or its driver does not offer it. Raises NVMLError."""
        try:
            return self.must(question)
        except pynvml.NVMLError as error:
            if error.value in NOT_OFFERED:
                return None
            raise


def subject(question: Callable[[Handle], object]) -> str:
    """What a question is about, in words."""
    return question.__name__.replace("_", " ")


def describe(index: int, uuid: str, gpu: Asked, *, numa_root: Path) -> Gpu:
    """What a GPU is. `numa_root` is sysfs's folder of PCI devices.

    Raises NVMLError, and ValueError for what cannot be.
    """
    if not is_uuid(uuid):
        raise ValueError(f"its UUID is {uuid!r}")
    total, reserved, _ = gpu.must(memory)
    if total is not None and not 0 < total <= MAX_MEMORY:
        raise ValueError(f"it has {total} bytes of memory")
    address = bus_id(gpu.must(pci_address))
    return Gpu(
        uuid=uuid,
        index=index,
        model=gpu.must(name),
        memory_bytes=total,
        pci_bus_id=address,
        reserved_bytes=reserved,
        numa_node=numa_node(numa_root / address / "numa_node"),
        compute_capability=gpu.may(compute_capability),
        mig=bool(gpu.may(mig_mode)),
        mps_contexts=gpu.may(mps_contexts) or MPS_CONTEXTS,
    )


def unreadable(index: int, uuid: str, error: Exception) -> Excluded:
    """A GPU that has never said what it is; without a UUID it has not even said which it is."""
    which = "the GPU" if is_uuid(uuid) else f"index {index}"
    detail = f"{which} is not described by NVML ({error}): see nvidia-smi and the node's kernel log"
    return Excluded(_unknown(index, uuid), "error", detail)


def nameless(index: int, detail: str) -> Excluded:
    """A GPU that does not say which it is."""
    return Excluded(_unknown(index, ""), "error", detail)


def lost(gpu: Gpu, error: Exception) -> Excluded:
    """A GPU that the driver counts, that said what it is, and that is lost now."""
    detail = f"index {gpu.index} is lost ({error}): see nvidia-smi and the node's kernel log"
    return Excluded(gpu, LOST, detail)


def silent(index: int, doing: str) -> Excluded:
    """A GPU that has not answered yet, and has never said what it is."""
    detail = f"index {index} does not answer ({doing}): see the node's kernel log"
    return Excluded(_unknown(index, ""), "timeout", detail)


def _unknown(index: int, uuid: str) -> Gpu:
    return Gpu(uuid=uuid, index=index, model="unknown", memory_bytes=None, pci_bus_id="unknown")


def _text(ask: Callable[[], str | bytes]) -> str:
    """A text of the driver; what is not UTF-8 in it is replaced."""
    try:
        found = ask()
    except UnicodeDecodeError as error:
        found = error.object
    return found if isinstance(found, str) else found.decode(errors="replace")


def driver_version() -> str:
    """The version of the driver."""
    return _text(pynvml.nvmlSystemGetDriverVersion)


def count() -> int:
    """How many GPUs there are. Raises ValueError for a number that no node has."""
    found = int(pynvml.nvmlDeviceGetCount())
    if found > MAX_GPUS:
        raise ValueError(f"it counts {found}; {MAX_GPUS} are possible")
    return found


def listed(root: Path) -> int | None:
    """How many GPUs the driver's own list has; not every platform has that list.

    None where it cannot be read now, as by a process that is out of descriptors.
    """
    try:
        return len(list(root.iterdir()))
    except OSError as error:
        return None if error.errno in SHORTAGES else 0


def uuid(handle: Handle) -> str:
    """Which GPU it is."""
    return _text(lambda: pynvml.nvmlDeviceGetUUID(handle))


def name(handle: Handle) -> str:
    """Its model."""
    return _text(lambda: pynvml.nvmlDeviceGetName(handle))


def pci_address(handle: Handle) -> str:
    """Where it is, as NVML writes that."""
    return _text(lambda: pynvml.nvmlDeviceGetPciInfo(handle).busId)


def memory(handle: Handle) -> tuple[int | None, int, int | None]:
    """Total, reserved and used bytes; no total and no use where the GPU shares the host's memory.

    The first version of the call counts reserved as used.
    """
    for version in (pynvml.nvmlMemory_v2, None):
        try:
            info = pynvml.nvmlDeviceGetMemoryInfo(handle, version=version)
        except pynvml.NVMLError as error:
            if error.value not in NOT_OFFERED:
                raise
            continue
        reserved = None if version is None else _known(info.reserved)
        return _known(info.total), reserved or 0, _known(info.used)
    return None, 0, None


def _known(value: int) -> int | None:
    return None if value == _NOT_AVAILABLE else int(value)


def compute_capability(handle: Handle) -> tuple[int, int]:
    """Major and minor."""
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return int(major), int(minor)


def mig_mode(handle: Handle) -> bool:
    """Whether it is divided into MIG devices."""
    return bool(pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE)


def mps_contexts(handle: Handle) -> int:  # noqa: ARG001 - asked as all others
    """CUDA contexts of a GPU that this driver's MPS serves: 60 from CUDA 13.1 on (its guide)."""
    return MPS_MAX_CLIENTS if pynvml.nvmlSystemGetCudaDriverVersion_v2() >= 13_010 else MPS_CONTEXTS


def ecc_errors(handle: Handle) -> int:
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
    # Each field has a result of its own: to an older driver this one is an invalid argument.
    if field.nvmlReturn == pynvml.NVML_ERROR_INVALID_ARGUMENT:
        return None
    if field.nvmlReturn != pynvml.NVML_SUCCESS:
        raise pynvml.NVMLError(field.nvmlReturn)
    return int(field.value.uiVal)


def running(handle: Handle, kind: str) -> list[tuple[int, int | None]]:
    """PIDs on a GPU and the bytes that each has, None where that is not available."""
    # By the name with its version: pynvml turns a missing function of the plain name into an
    # exception that is no NVMLError. Not every driver has both.
    for version in ("v3", "v2"):
        ask = getattr(pynvml, f"nvmlDeviceGet{kind}RunningProcesses_{version}")
        try:
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
        if error.value in NOT_OFFERED:
            return []
        raise


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
    """The node in a sysfs file; -1 there means none. Raises OSError of SHORTAGES."""
    try:
        node = int(path.read_text())
    except OSError as error:
        if error.errno in SHORTAGES:
            raise
        return None
    except ValueError:
        return None
    return node if node >= 0 else None
