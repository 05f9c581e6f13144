"""One run of one seed: faults at random, each followed by a look at everything.

The draws depend on the seed, the number of steps and the model only, so a run with the same two
makes the same steps.
"""

import dataclasses
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.faults.faults import Faults, NotNowError
from tests.faults.promises import HANG_ADDS, NOT_YET, PROMISES
from tests.faults.rig import START, FaultError, odd_lines

MAX_LOG = 200
"""Lines in any minute."""
MAX_GROWTH = 1024
"""KiB of RSS."""
MEASURED_FROM = 300
"""Steps of a run, at least, that memory is measured in."""


@dataclasses.dataclass
class Result:
    """What a run measured. `problem`: why it failed, None where it did not."""

    seed: int
    steps: int
    seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    growth: int = 0
    descriptors: int = 0
    threads: int = 0
    log_lines: int = 0
    problem: str | None = None


class Run(Faults):
    """A run, and what it measures."""

    def __init__(self, result: Result, *arguments: Any) -> None:
        self.result = result
        self.history = ["start"]
        super().__init__(result.seed, *arguments)

    def go(self) -> None:
        """All steps. Raises FaultError."""
        self.start_agent()
        self.settle("start", START, None)
        steps = self.result.steps
        marks = {steps // 3, steps * 2 // 3} if steps >= MEASURED_FROM else set()
        measured = []
        for number in range(steps):
            if number in marks:
                measured.append(self.measured())
            self.step(number)
        self.history.append("all faults end")
        self.calm()
        if measured:
            self.compare(*measured)
        if self.most_lines > MAX_LOG:
            raise FaultError(f"{self.most_lines} log lines in a minute")
        if odd := odd_lines(self.agent.lines):
            raise FaultError("\n".join(["no log lines:", *odd]))

    def step(self, number: int) -> None:
        """Draws until there is a fault that can be made, makes it, and waits."""
        names = [name for name in PROMISES if name not in NOT_YET]
        if number < self.result.steps * 2 // 3:
            names = [name for name in names if not PROMISES[name].ends_agent]
        weights = [PROMISES[name].weight for name in names]
        was, since = self.model.devices(), len(self.kubelet.lists)
        hang = self.there("call hangs")
        while True:
            (name,) = self.random.choices(names, weights)
            if hang and f"{name} during a hang" in NOT_YET:
                continue
            try:
                first = self.make(name)
            except NotNowError:
                continue
            break
        self.history.append(f"step {number}: {name}{self.detail}")
        promise = PROMISES[name]
        seconds = promise.seconds + (HANG_ADDS if hang else 0)
        if first is not None:
            self.wait_list(first, name, seconds)
            self.settle(name, seconds, None, took=time.monotonic() - self.began)
        else:
            self.settle(name, seconds, None if promise.flaps else was, since=since)

    def measured(self) -> tuple[int, int, int]:
        """The least of some seconds, in which idle threads and connections end."""
        self.history.append("all faults end")
        self.calm()
        found = []
        for _ in range(24):
            time.sleep(0.5)
            found.append(self.usage())
        rss, descriptors, threads = map(min, zip(*found, strict=True))
        return rss, descriptors, threads

    def compare(self, warm: tuple[int, int, int], now: tuple[int, int, int]) -> None:
        growth, descriptors, threads = (b - a for a, b in zip(warm, now, strict=True))
        result = self.result
        result.growth, result.descriptors, result.threads = growth, descriptors, threads
        # Idle threads end after 10 s; how many are not idle depends on what meets by chance.
        if growth >= MAX_GROWTH or descriptors > 0 or threads > 1:
            words = f"{growth} KiB of RSS, {descriptors} descriptors, {threads} threads"
            raise FaultError(f"more than after the first third: {words}")


def run_seed(seed: int, steps: int, library: Path, patience: float = 1) -> Result:
    """One run; what goes wrong is in the result, with the last steps and log lines."""
    result = Result(seed, steps)
    with ExitStack() as stack:
        run = Run(result, library, stack, patience)
        stack.callback(run.peers_leave)
        try:
            run.go()
        except Exception as error:  # noqa: BLE001 - reported with the seed
            words = str(error) if isinstance(error, FaultError) else traceback.format_exc()
            lines = run.agent.lines[-15:] if run.agent else []
            result.problem = "\n".join([words, *run.history[-8:], *lines])
        result.seconds, result.log_lines = dict(run.seconds), run.most_lines
    return result
