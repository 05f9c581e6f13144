"""What the agent costs and how fast it is: `make bench`. Nothing here is a test.

Each plugin is a real process between a grpcio kubelet and a fake NVML. The machine is noisy:
compare figures of one run, and with the floors beside them.
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

from tests.bench import growth
from tests.bench.measure import SHORT, Effort, measured
from tests.bench.plugins import AGENT, FLOORS, Size, Subject
from tests.bench.table import Run, markdown, medians, regressions

SIZES = (Size(4, 10), Size(16, 48))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench ARGS=...", description=__doc__)
    parser.add_argument("--runs", type=int, default=1, help="how many, of which medians are given")
    parser.add_argument("--short", action="store_true", help="one size, little of each")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    parser.add_argument("--compare", type=Path, help="figures of before; 1 where any is 2x worse")
    parser.add_argument(
        "--command",
        help="another plugin, beside the agent; {directory} is the kubelet's directory of plugins."
        " Its replicas and NVML are its own matter: LD_LIBRARY_PATH leads to the fake one",
    )
    parser.add_argument(
        "--growth", action="store_true", help="how cost grows with a node and what happens there"
    )
    parser.add_argument(
        "--week", type=float, metavar="SHARE", help="what is left after a week's events, or a share"
    )
    parser.add_argument("--resource", default="", help="the other plugin's name in the table")
    return parser.parse_args()


def main() -> int:
    options = parse()
    if options.growth or options.week:
        return grown(options)
    effort, sizes = (SHORT, SIZES[:1]) if options.short else (Effort(), SIZES)
    others = [Subject(options.resource or "other", options.command)] if options.command else []
    began, runs = time.time(), list[Run]()
    for _ in range(options.runs):
        runs.append(
            {size.name: measured([AGENT, *others, *FLOORS], size, effort) for size in sizes}
        )
    figures = medians(runs)
    about = {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load": [round(each, 2) for each in os.getloadavg()],
        "runs": options.runs,
        "seconds": round(time.time() - began),
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(markdown(figures))
    if options.json:
        options.json.write_text(json.dumps({"about": about, "figures": figures}, indent=1) + "\n")
    if options.compare:
        worse = [*regressions(figures, json.loads(options.compare.read_text())["figures"])]
        for line in worse:
            print(f"REGRESSION {line}")
        return int(bool(worse))
    return 0


def show(head: str, points: list[tuple[str, growth.Point]], plots: list[str]) -> None:
    print(growth.markdown(head, points), flush=True)
    for name in plots:
        print(growth.plot(head, name, points), flush=True)


def grown(options: argparse.Namespace) -> int:
    """1 where a week leaves a MiB or more behind."""
    if options.growth:
        sizes = [(each.name, growth.of_size(each)) for each in growth.SIZES]
        plots = ["RSS, MiB", "GetPreferredAllocation, ms", "scrape, ms"]
        show("GPUs x vGPUs", sizes, plots)
        show("pods", [*growth.by_pods()], ["scrape, ms", "CPU of a List, ms"])
        show("scrapes in a second", [*growth.by_scrapes()], ["CPU, % of a core"])
        show("XIDs in a second", [*growth.by_events()], ["CPU, % of a core"])
    if not options.week:
        return 0
    left = growth.week(options.week)
    print(growth.markdown("", [("week", left)]))
    return int(left[growth.GROWN] >= 1)


if __name__ == "__main__":
    sys.exit(main())
