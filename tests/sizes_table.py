"""The tables of docs/sizing.md: what GPUs of some sizes are divided into."""

from collections.abc import Sequence

from vgpu_agent.model.devices import Excluded, Gpu
from vgpu_agent.model.rules import GIB, MIB, SharingRules
from vgpu_agent.model.share import Divided, divide, thread_percentage

MEMORIES = (16, 24, 48, 80)
"""GPUs, by their memory in GiB."""
COUNTS = (2, 4, 8, 10, 20, 48)
SIZES = (4, 8, 10, 20)
"""Memory of a vGPU in GiB."""


def divided(memory: int, rules: SharingRules) -> Divided | Excluded:
    """A GPU with so many GiB, of which the driver reserves nothing."""
    return divide(Gpu("GPU-0", 0, "Model", memory * GIB, "00000000:01:00.0"), rules)


def cell(memory: int, count: int) -> str:
    """What a vGPU has in MiB where the GPU is made into so many."""
    made = divided(memory, SharingRules(replicas=count))
    if isinstance(made, Excluded) or made.usable_bytes is None:
        raise TypeError(f"{memory} GiB as {count} vGPUs: {made}")
    return f"{made.usable_bytes // made.replicas // MIB}"


def fit(memory: int, size: int) -> str:
    """How many vGPUs of so many GiB it is made into."""
    made = divided(memory, SharingRules(device_memory=size * GIB))
    return "excluded" if isinstance(made, Excluded) else str(made.replicas)


def table(head: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [[head, *columns], ["---"] * (1 + len(columns)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def by_count() -> str:
    """Memory and threads of a vGPU, by the GPU and `replicas`."""
    percent = [f"{thread_percentage(1, count, SharingRules().mps_threads)} %" for count in COUNTS]
    rows = [
        [f"{memory} GiB", *(f"{cell(memory, count)} MiB" for count in COUNTS)]
        for memory in MEMORIES
    ]
    columns = [f"`replicas: {count}`" for count in COUNTS]
    return table("GPU", columns, [*rows, ["threads of a vGPU", *percent]])


def by_size() -> str:
    """How many vGPUs a GPU has, by the GPU and `deviceMemory`."""
    rows = [[f"{memory} GiB", *(fit(memory, size) for size in SIZES)] for memory in MEMORIES]
    return table("GPU", [f"`deviceMemory: {size}Gi`" for size in SIZES], rows)


def markdown_table() -> str:
    """Both tables of docs/sizing.md."""
    return f"{by_count()}\n\n{by_size()}"
