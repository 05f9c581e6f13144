"""What k of the n vGPUs of a card are worth. Integer arithmetic, always rounded down.

Rounding down is what keeps the shares of one card together within the card.
"""

from dataclasses import dataclass
from fractions import Fraction

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Share:
    """k of n vGPUs of one card, 1 <= k <= n."""

    vgpus: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.vgpus <= self.of:
            raise ValueError(f"a share is 1 to {self.of} of {self.of} vGPUs, not {self.vgpus}")

    def __str__(self) -> str:
        return f"{self.vgpus}/{self.of}"

    def memory_bytes(self, usable: int) -> int:
        """The share of `usable` bytes."""
        return usable * self.vgpus // self.of

    def memory_fraction(self, usable: int, total: int) -> float:
        """The share of the usable memory as a fraction of the whole card, rounded down to 1/10000.

        Serving frameworks take their memory limit as a fraction of all memory that CUDA shows.
        """
        return self.memory_bytes(usable) * 10_000 // total / 10_000 if total else 0.0

    def thread_percentage(self, factor: Fraction = Fraction(1)) -> int:
        """The share of the card's threads times `factor`, in percent from 1 (MPS takes no 0)."""
        return max(1, min(100, int(100 * self.vgpus * factor / self.of)))


def usable_bytes(total: int, driver_reserved: int, held_back: int) -> int:
    """What of a card's memory can be shared out: never negative.

    `held_back` is what is kept for the MPS server (setting VGPU_MEMORY_RESERVED).
    """
    return max(0, total - driver_reserved - held_back)
