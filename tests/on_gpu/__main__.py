"""`python -m tests.on_gpu FOLDER [--sections abcde] [--seconds 5]`."""

import argparse
import shutil
import sys
from pathlib import Path

import pynvml

from tests.on_gpu.client import cuda_problem
from tests.on_gpu.record import Record
from tests.on_gpu.sections import SECTIONS
from vgpu_agent.mps.control import BINARY


def missing() -> str | None:
    """Why nothing can be measured on this machine, in one sentence."""
    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError as error:
        return f"there is no NVIDIA GPU to measure on: NVML does not start ({error})."
    if count == 0:
        return "there is no NVIDIA GPU to measure on: NVML lists none."
    if shutil.which(BINARY) is None:
        return f"{BINARY} is not on PATH: install the NVIDIA driver's compute programs."
    return cuda_problem()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.on_gpu", description=__doc__)
    parser.add_argument("folder", type=Path, help="where report.md and transcript.json go")
    parser.add_argument("--sections", default="".join(SECTIONS), help="which of them, as letters")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each load in (c)")
    options = parser.parse_args()
    unknown = set(options.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    problem = missing()
    if problem is not None:
        sys.stderr.write(f"tests.on_gpu: {problem}\n")
        return 2
    options.folder.mkdir(parents=True, exist_ok=True)
    record = Record(options.folder)
    for letter in options.sections:
        title, section = SECTIONS[letter]
        with record.section(f"({letter}) {title}"):
            section(record, options.seconds)
    sys.stdout.write(f"{options.folder / 'report.md'}\n")
    return 1 if record.failed else 0


if __name__ == "__main__":
    sys.exit(main())
