"""How a person names a GPU to a command, one rule for all of them; and how things are counted."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from vgpu_agent.errors import UnknownGpuError
from vgpu_agent.model.devices import Gpu, pci_order
from vgpu_agent.model.snapshot import Inputs


@dataclass(frozen=True, slots=True)
class GpuName:
    """What a GPU can be named by; `index` is None of one that has none now."""

    uuid: str
    index: int | None = None
    pci_bus_id: str = ""

    @classmethod
    def of(cls, gpu: Gpu) -> "GpuName":
        """As the driver describes it."""
        return cls(gpu.uuid, gpu.index, gpu.pci_bus_id)

    def __str__(self) -> str:
        return self.uuid if self.index is None else f"GPU {self.index} ({self.uuid})"


def number_of(count: int, thing: str) -> str:
    """`1 vGPU`, `2 vGPUs`."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def known_gpus(inputs: Inputs) -> tuple[GpuName, ...]:
    """All GPUs of the node, also those that are lost, excluded or only remembered."""
    described = [*inputs.gpus.values(), *(each.gpu for each in inputs.undescribed)]
    names = {gpu.uuid: GpuName.of(gpu) for gpu in described if gpu.uuid}
    for uuid in (*inputs.first_seen, *inputs.health, *inputs.cordons):
        names.setdefault(uuid, GpuName(uuid))
    return tuple(names.values())


def gone_gpus(inputs: Inputs) -> tuple[str, ...]:
    """The GPUs, by UUID, that were seen in this boot of the node and are no longer listed.

    None while the driver cannot be asked, or where a GPU does not say which one it is.
    """
    others = {each.gpu.uuid for each in inputs.undescribed}
    if not inputs.driver.up or "" in others:
        return ()
    return tuple(sorted(inputs.first_seen.keys() - inputs.gpus.keys() - others))


def find_gpu(text: str, gpus: Collection[GpuName]) -> GpuName:
    """The GPU of that index, UUID, PCI bus ID, or beginning of a UUID that no other has.

    Raises UnknownGpuError, which says what there is.
    """
    named = text.strip().lower()
    bus = pci_order(named if named.count(":") > 1 else f"0:{named}") if ":" in named else ()
    for matches in (
        lambda gpu: gpu.uuid.lower() == named,
        lambda gpu: str(gpu.index) == named,
        lambda gpu: len(bus) > 1 and pci_order(gpu.pci_bus_id) == bus,
        lambda gpu: len(named) > len("GPU-") and gpu.uuid.lower().startswith(named),
    ):
        found = [gpu for gpu in gpus if matches(gpu)]
        if len(found) == 1:
            return found[0]
        if found:
            raise UnknownGpuError(f"{text!r} names several GPUs: {_listed(found)}; use a UUID")
    there = _listed(gpus) if gpus else "no GPU is known yet"
    raise UnknownGpuError(f"there is no GPU {text!r}: {there}")


def _listed(gpus: Iterable[GpuName]) -> str:
    order = sorted(gpus, key=lambda gpu: (gpu.index is None, gpu.index, gpu.uuid))
    return ", ".join(f"{gpu} at {gpu.pci_bus_id}" if gpu.pci_bus_id else str(gpu) for gpu in order)
