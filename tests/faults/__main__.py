"""Faults at random, at length: `make test-faults`. Exit code 1: one of them was not handled.

`--seed 7` runs that one only. `--record` keeps what was measured, for docs/reliability.md.
"""

import json
import os
import platform
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from tests import readme
from tests.fake_nvml import build
from tests.faults import hostile
from tests.faults.promises import PROMISES, RECORD, summary
from tests.faults.run import MEASURED_FROM, Result, run_seed


def main() -> int:
    parser = ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=2 * len(os.sched_getaffinity(0)))
    parser.add_argument("--patience", type=float, default=1, help="times what is promised")
    parser.add_argument("--restarts", type=int, help="instead: so many kubelet restarts in a row")
    parser.add_argument("--hostile", type=int, help="instead: so many hostile requests and frames")
    parser.add_argument("--record", action="store_true", help="keep what was measured")
    given = parser.parse_args()
    if given.restarts or given.hostile:
        good, words = (
            hostile.restarts(given.restarts)
            if given.restarts
            else hostile.requests(given.hostile, given.seed or 1)
        )
        print(words)
        if given.record and good:
            keep(**{"restarts" if given.restarts else "hostile": words})
        return 0 if good else 1
    seeds = range(1, given.seeds + 1) if given.seed is None else [given.seed]
    began, results = time.monotonic(), []
    with (
        tempfile.TemporaryDirectory() as directory,
        ProcessPoolExecutor(given.jobs, get_context("spawn")) as pool,
    ):
        library = build(Path(directory))
        more = given.steps, library, given.patience
        for done in as_completed(pool.submit(run_seed, seed, *more) for seed in seeds):
            results.append(done.result())
            show(results[-1])
    seconds = defaultdict(list)
    for result in results:
        for name, each in result.seconds.items():
            seconds[name] += each
    print(f"\n{'fault':26}{'times':>6}{'median':>9}{'worst':>9}{'promise':>9}")
    for name in (each for each in PROMISES if seconds[each]):
        count, middle, worst = summary(seconds[name])
        print(f"{name:26}{count:6}{middle:7.2f} s{worst:7.2f} s{PROMISES[name].seconds:7g} s")
    failed = sum(result.problem is not None for result in results)
    print(
        f"{len(results)} seeds, {given.steps} steps each, {failed} failed,"
        f" {(time.monotonic() - began) / 60:.0f} minutes"
    )
    if given.record and not failed:
        record(seconds, results, given)
    return 1 if failed else 0


def show(result: Result) -> None:
    """A line for a seed; for one that failed, how to repeat it."""
    print(
        f"seed {result.seed}: {'FAILED' if result.problem else 'passed'};"
        f" RSS {result.growth:+} KiB, descriptors {result.descriptors:+},"
        f" threads {result.threads:+}, at most {result.log_lines} log lines a minute",
        flush=True,
    )
    if result.problem:
        print(result.problem)
        print(
            f"repeat: .venv/bin/python -m tests.faults --seed {result.seed} --steps {result.steps}"
        )


def record(seconds: dict[str, list[float]], results: list[Result], given: Namespace) -> None:
    """Keeps what a run measured."""
    patience = f", {given.patience:g} times the promised seconds allowed" * (given.patience != 1)
    where = (
        f"Measured with {len(results)} seeds of {given.steps} steps, {given.jobs} at a time on"
        f" {len(os.sched_getaffinity(0))} cores ({platform.machine()}, load average"
        f" {os.getloadavg()[2]:.0f}{patience});"
        f" the log had {max(r.log_lines for r in results)} lines in a minute at most"
    )
    if given.steps >= MEASURED_FROM:
        where += f", RSS grew by {max(r.growth for r in results)} KiB at most"
    numbers = {name: summary(seconds[name]) for name in PROMISES if seconds[name]}
    faults = {n: [count, round(m, 3), round(w, 3)] for n, (count, m, w) in numbers.items()}
    keep(where=f"{where}.", faults=faults)


def keep(**fields: object) -> None:
    """Writes what docs/reliability.md shows, and the document."""
    before = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {}
    RECORD.write_text(json.dumps(before | fields, indent=1) + "\n", "utf-8")
    path = readme.ROOT / "docs/reliability.md"
    path.write_text(readme.FILES[path](path.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    sys.exit(main())
