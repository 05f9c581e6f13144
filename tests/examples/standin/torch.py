"""A stand-in for PyTorch: what the examples call. It computes nothing."""

from types import SimpleNamespace

import gpu


class Tensor:
    def __matmul__(self, _: "Tensor") -> "Tensor":
        return self


def rand(*_: int, device: str) -> Tensor:
    assert device == "cuda"
    return Tensor()


def _limit(fraction: float) -> None:
    assert 0 < fraction <= 1, "PyTorch refuses it"
    gpu.take(fraction * gpu.total())


cuda = SimpleNamespace(
    mem_get_info=lambda: (gpu.total() // 2, gpu.total()),
    set_per_process_memory_fraction=_limit,
    max_memory_allocated=lambda: 1 << 26,
)
