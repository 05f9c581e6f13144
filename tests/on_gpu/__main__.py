"""`python -m tests.on_gpu`: see `__init__`."""

import argparse
import sys
from pathlib import Path

LIMIT = 540.0
COMMANDS = {
    "reach": "what clients of MPS reach",
    "load": "load and accidents",
    "limits": "memory limits that the driver enforces",
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.on_gpu")
    commands = parser.add_subparsers(dest="command", required=True)
    wheels = commands.add_parser("wheels", help="check a folder of wheels, and install them")
    wheels.add_argument("folder", type=Path)
    wheels.add_argument("venv", type=Path, nargs="?", help="made, for this Python")
    wheels.add_argument("--python", default="3.12", help="of the machine with the GPU")
    for name, what in COMMANDS.items():
        command = commands.add_parser(name, help=what)
        command.add_argument("folder", type=Path, help="for report.md and transcript.json")
        command.add_argument("--limit", type=float, default=LIMIT, help="seconds, for all of it")
        command.add_argument("--load", type=float, default=5.0, help="seconds of each load")
        command.add_argument("--sections", help="some of them, with commas")
        command.add_argument("--control", help="the nvidia-cuda-mps-control to use")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if options.command == "wheels":
        from tests.on_gpu import wheels

        own = f"{sys.version_info[0]}.{sys.version_info[1]}"
        if not wheels.check(options.folder, own if options.venv else options.python):
            return 1
        if options.venv:
            wheels.install(options.folder, options.venv)
            print(f"{options.venv / 'bin/python'} -m tests.on_gpu reach OUT")
        return 0
    # Only now: these need what the wheels bring.
    try:
        from tests.on_gpu import driver_limits, load, reach, runner
    except ImportError as error:
        print(f"{error}: see `python -m tests.on_gpu wheels`", file=sys.stderr)
        return 2

    modules = {"reach": reach, "load": load, "limits": driver_limits}
    sections = modules[options.command].SECTIONS
    if options.sections:
        names = options.sections.split(",")
        if unknown := set(names) - {each.name for each in sections}:
            print(f"no section {', '.join(sorted(unknown))}", file=sys.stderr)
            return 2
        sections = tuple(each for each in sections if each.name in names)
    if (options.folder / "report.md").exists():
        print(f"{options.folder} has a report already: name another folder", file=sys.stderr)
        return 2
    options.folder.mkdir(parents=True, exist_ok=True)
    good = runner.run(
        f"Measured on a GPU: {options.command}",
        sections,
        options.folder,
        limit=options.limit,
        load=options.load,
        program=options.control,
    )
    print(options.folder / "report.md")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
