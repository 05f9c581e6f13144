"""Figures as a table, and compared with those of another run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from tests.bench.measure import Figures

FACTOR = 2.0
"""So many times worse than the committed figures is a regression."""


@dataclass(frozen=True)
class Row:
    """A figure: what it is, how it is written, and what a difference means at all.

    What is below `slack` more than before is noise of a machine that does other things too.
    """

    name: str
    words: str
    slack: float
    digits: int = 1
    more_is_better: bool = False
    timed: bool = True
    """Whether a slow machine makes it worse."""

    def written(self, value: float | None) -> str:
        return "" if value is None else f"{value:.{self.digits}f}"

    def is_worse(self, now: float, before: float, slower: float = 1.0) -> bool:
        """On a machine that is so many times slower than that of before."""
        allowed = FACTOR * (slower if self.timed else 1.0)
        if self.more_is_better:
            return now < before / allowed
        return now > before * allowed and now - before > self.slack


ROWS = (
    Row("start", "start to Register, ms", 100, 0),
    Row("first_list", "Register to first list, ms", 20),
    Row("allocate_p50", "Allocate p50, ms", 1, 2),
    Row("allocate_p99", "Allocate p99, ms", 20, 2),
    Row("allocate_rate", "Allocate per s, 16 callers", 0, 0, more_is_better=True),
    Row("prefer_p50", "GetPreferredAllocation p50, ms", 2, 2),
    Row("xid", "XID to update, ms", 20),
    Row("kubelet_restart", "new kubelet.sock to Register, ms", 50),
    Row("dropped_stream", "dropped stream to Register, ms", 50),
    Row("rss", "RSS, MiB", 10, timed=False),
    Row("pss", "PSS, MiB", 10, timed=False),
    Row("idle", "idle CPU, ms a minute", 100, 0),
    Row("threads", "threads", 4, 0, timed=False),
    Row("stop", "stop, s", 1, 2),
    Row("scrape", "scrape with 110 pods, ms", 50),
    Row("loop_lag_p99", "loop lag during it, p99, ms", 30),
)

Run = dict[str, dict[str, Figures]]
"""Figures by size and subject."""


def medians(runs: Sequence[Run]) -> Run:
    """Of each figure that every run has."""
    return {
        size: {
            subject: {
                name: median(run[size][subject][name] for run in runs)
                for name in figures
                if all(name in run[size][subject] for run in runs)
            }
            for subject, figures in subjects.items()
        }
        for size, subjects in runs[0].items()
    }


def markdown(run: Run) -> str:
    """A column for each subject of each size."""
    columns = [(size, subject) for size, subjects in run.items() for subject in subjects]
    lines = [
        f"| | {' | '.join(f'{subject}, {size}' for size, subject in columns)} |",
        f"|---{'|---' * len(columns)}|",
    ]
    for row in ROWS:
        cells = [row.written(run[size][subject].get(row.name)) for size, subject in columns]
        if any(cells):
            lines.append(f"| {row.words} | {' | '.join(cells)} |")
    return "\n".join(lines)


YARDSTICK = "bare grpclib"


def regressions(now: Run, before: Mapping[str, Any]) -> Iterator[str]:
    """A line for each figure that is much worse than it was, bare servers aside.

    How slow the machine is now is what the bare server's Allocate says.
    """
    for size, subjects in now.items():
        known = before.get(size, {})
        speeds = [run.get(YARDSTICK, {}).get("allocate_p50") for run in (subjects, known)]
        slower = max(1.0, speeds[0] / speeds[1]) if all(speeds) else 1.0
        for subject, figures in subjects.items():
            if subject.startswith("bare "):
                continue
            for row in ROWS:
                new, old = figures.get(row.name), known.get(subject, {}).get(row.name)
                if new is not None and old is not None and row.is_worse(new, old, slower):
                    yield (
                        f"{subject}, {size}: {row.words}: {row.written(new)},"
                        f" before {row.written(old)}, on a machine {slower:.1f} times slower"
                    )
