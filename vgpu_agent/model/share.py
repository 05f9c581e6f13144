"""Which GPUs are shared, into how many vGPUs, and what k of the n vGPUs are worth.

Integer arithmetic, always rounded down: that keeps the shares of one GPU together within the GPU.
"""

from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction

from vgpu_agent.model.devices import Excluded, Gpu
from vgpu_agent.model.rules import MAX_REPLICAS, MIB, MpsLimits, SharingRules, Threads

SMALL_VGPU = 2**30
"""A vGPU with less usable memory than this, in bytes, is warned about under MPS."""


def thread_percentage(vgpus: int, of: int, threads: Threads | float) -> int | None:
    """The threads of some of a GPU's vGPUs, in percent from 1 (MPS takes no 0).

    None for no limit.
    """
    if threads is Threads.NONE:
        return None
    # By its text: a factor of 0.29 is meant, and not the nearest binary number below it.
    factor = Fraction(1) if isinstance(threads, Threads) else Fraction(str(threads))
    return max(1, min(100, int(100 * vgpus * factor / of)))


def fraction(memory: int, total: int) -> float:
    """A part of a GPU's whole memory, rounded down to 1/10000; 0 of a GPU without memory.

    Serving frameworks take their memory limit as a fraction of all memory that CUDA shows.
    """
    return memory * 10_000 // total / 10_000 if total else 0.0


@dataclass(frozen=True, slots=True)
class Divided:
    """What a GPU is divided into. `vgpu_bytes` is None where it is divided by count.

    `usable_bytes` of its memory are shared out, None where that is not known. `note` says what an
    operator should know of it.
    """

    replicas: int
    usable_bytes: int | None
    vgpu_bytes: int | None = None
    note: str | None = None


def divide(
    gpu: Gpu,
    rules: SharingRules,
    *,
    index: int | None = None,
    cdi_names: Collection[str] | None = None,
) -> Divided | Excluded:
    """The vGPUs of a GPU, or why it has none: the one place that decides it.

    `index` is the index by which settings name the GPU, its own where None. `cdi_names` are the
    names in the host's CDI specs, where containers are given GPUs by them.
    """
    # Volta is the first with limits for each MPS client and an address space of its own.
    oldest, has = (7, 0) if rules.mps else None, gpu.compute_capability
    if gpu.mig:
        return Excluded(
            gpu,
            "mig",
            "the GPU is in MIG mode, and only whole GPUs are shared: turn it off with"
            f" `nvidia-smi -i {gpu.index} -mig 0`, or leave the GPU to another device plugin",
        )
    if oldest is not None and has is not None and has < oldest:
        return Excluded(
            gpu,
            "compute-capability",
            f"compute capability {_dotted(has)} is below {_dotted(oldest)}, which this way of"
            " sharing requires: set VGPU_SHARING=time-slicing to share this GPU",
        )
    if cdi_names is not None and gpu.uuid not in cdi_names:
        return Excluded(
            gpu,
            "cdi",
            f"no CDI spec of the host names {rules.cdi_kind}={gpu.uuid}: make one on the node with"
            " `nvidia-ctk cdi generate --device-name-strategy=uuid`, or set"
            " VGPU_DEVICE_LIST=envvar",
        )
    names = (gpu.uuid, str(gpu.index if index is None else index), gpu.model)
    override = next(
        (rules.replicas_by_gpu[name] for name in names if name in rules.replicas_by_gpu), None
    )
    if override == 0:
        return Excluded(gpu, "replicas", "VGPU_REPLICAS_BY_GPU leaves this GPU to others")
    by_size = override is None and rules.device_memory is not None
    replicas = rules.replicas if override is None else override
    most = max_vgpus(gpu, rules)
    note = None
    if replicas > most and not by_size:
        note = f"{most} vGPUs instead of {replicas}: {_most_in_words(most, rules)}"
        replicas = most
    if gpu.memory_bytes is None:
        return _without_memory(gpu, replicas, rules, by_size=by_size)
    usable = max(0, gpu.memory_bytes - gpu.reserved_bytes - rules.reserved_bytes)
    if by_size and rules.device_memory is not None:
        return _by_size(gpu, rules.device_memory, usable, rules)
    vgpu = usable // replicas
    if vgpu < MIB:
        return Excluded(
            gpu,
            "memory",
            f"{usable} bytes of the GPU are usable, less than 1 MiB for each of {replicas} vGPUs:"
            " VGPU_REPLICAS or VGPU_MEMORY_RESERVED is too large for it",
        )
    return Divided(replicas, usable, note=note or _small(vgpu, rules))


def _without_memory(
    gpu: Gpu, replicas: int, rules: SharingRules, *, by_size: bool
) -> Divided | Excluded:
    """Of a GPU that shares the host's memory, and so has none to divide or to limit."""
    if not by_size and not (rules.mps and rules.mps_limits is not MpsLimits.NONE):
        return Divided(replicas, None)
    setting = "VGPU_DEVICE_MEMORY" if by_size else f"VGPU_MPS_LIMITS={rules.mps_limits}"
    return Excluded(
        gpu,
        "memory",
        f"NVML does not know how much memory the GPU has, which {setting} divides: unset it, or set"
        " VGPU_SHARING=time-slicing to share this GPU by number",
    )


def max_vgpus(gpu: Gpu, rules: SharingRules) -> int:
    """The most vGPUs that a GPU can be divided into."""
    return (rules.mps_max_clients or gpu.mps_contexts) if rules.mps else MAX_REPLICAS


def _most_in_words(most: int, rules: SharingRules) -> str:
    return f"{f'MPS serves {most} clients' if rules.mps else f'there are at most {most}'} of a GPU"


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _small(vgpu: int, rules: SharingRules) -> str | None:
    """Under MPS every process has a CUDA context of some hundred MiB out of its share."""
    if not rules.mps or vgpu >= SMALL_VGPU:
        return None
    return f"a vGPU of it has only {vgpu // MIB} MiB, of which a CUDA context takes hundreds"


def _by_size(gpu: Gpu, size: int, usable: int, rules: SharingRules) -> Divided | Excluded:
    fit = usable // size
    if fit == 0:
        return Excluded(
            gpu,
            "memory",
            f"{usable // MIB} MiB of the GPU are usable, less than one vGPU of"
            f" VGPU_DEVICE_MEMORY ({size // MIB} MiB)",
        )
    most = max_vgpus(gpu, rules)
    if fit > most:
        note = f"{fit} vGPUs of that size fit; {_most_in_words(most, rules)}"
        return Divided(most, usable, size, note)
    return Divided(fit, usable, size, _small(size, rules))
