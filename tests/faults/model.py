"""What a kubelet must see, worked out from the faults alone. Knows nothing of the agent's code."""

import dataclasses

from tests.fake_nvml import FakeGpu

REPLICAS = 4
CONDITIONS: dict[str, dict[str, object]] = {
    "lost": {"lost": True},
    "not listed": {},
    "call fails": {"error": 999},
    "call hangs": {"hang": 3600},
    "handle fails": {"handle_error": 999},
}
"""What takes an answer of a GPU away, one at a time, and how the fake driver is told."""

GONE = ("lost", "not listed")


@dataclasses.dataclass
class Gpu:
    """A GPU as it is now, and what the agent has to remember of it.

    `waits`: what only a reset ends. `baseline`: ECC errors that were there when it was first read.
    `void`: NVML was opened again while it gives no handle.
    """

    facts: FakeGpu
    condition: str | None = None
    listed: bool = True
    waits: frozenset[str] = frozenset()
    baseline: int = 0
    void: bool = False

    @property
    def answers(self) -> bool:
        return self.condition is None or (self.condition == "handle fails" and not self.void)

    @property
    def healthy(self) -> bool:
        return self.listed and self.answers and not self.waits

    def shows(self) -> frozenset[str]:
        """What its probe would find now."""
        ecc = (self.facts.ecc or 0) > self.baseline
        found = {"ecc": ecc, "remap": self.facts.remap_failed, "action": self.facts.action}
        return frozenset(name for name, there in found.items() if there)

    def change(self, **facts: object) -> None:
        """Values of its probe change."""
        asked = self.facts.action
        self.facts = dataclasses.replace(self.facts, **facts)  # type: ignore[arg-type]
        if asked and not self.facts.action:
            self.waits = frozenset()  # the driver's word
        self.waits |= self.shows()

    def initialized(self, **facts: object) -> None:
        """It was reset, or went away and came back."""
        self.facts = dataclasses.replace(self.facts, **facts)  # type: ignore[arg-type]
        self.baseline = self.facts.ecc or 0
        self.waits = self.shows()

    def fall(self, condition: str) -> None:
        self.condition = condition
        self.facts = dataclasses.replace(self.facts, **CONDITIONS[condition])  # type: ignore[arg-type]

    def back(self) -> None:
        gone = self.void or self.condition in GONE
        self.condition, self.listed, self.void = None, True, False
        self.facts = dataclasses.replace(self.facts, lost=False, error=0, hang=0, handle_error=0)
        if gone:
            self.initialized()

    def agent_restarted(self) -> None:
        """A new agent lists what it can describe, and remembers what waits for a reset."""
        self.listed = self.condition is None
        self.baseline = self.facts.ecc or 0


class Model:
    """All GPUs of the node."""

    def __init__(self, gpus: list[FakeGpu]) -> None:
        self.gpus = [Gpu(each) for each in gpus]

    def devices(self) -> dict[str, str]:
        """The list that the kubelet must have: health by ID."""
        return {
            f"{gpu.facts.uuid}::{number}": "Healthy" if gpu.healthy else "Unhealthy"
            for gpu in self.gpus
            if gpu.listed
            for number in range(REPLICAS)
        }

    def reopened(self) -> None:
        """NVML was closed and opened again."""
        for gpu in self.gpus:
            gpu.void = gpu.condition == "handle fails"

    def good(self) -> list[Gpu]:
        return [gpu for gpu in self.gpus if gpu.healthy and gpu.condition is None]
