"""Stand-ins for CUDA and MPS: a libcuda.so.1 in C, a control program, an nvcc, a PyTorch.

With the fake NVML beside them `tests.on_gpu` runs without a GPU, which says that it runs and
nothing about MPS. See the head of each file for what it does and does not.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).parent
PYTHON = sys._base_executable  # type: ignore[attr-defined]


def build(directory: Path) -> Path:
    """Compiles the library with `cc` into that directory; raises CalledProcessError."""
    library = directory / "libcuda.so.1"
    command = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
    arguments = [*command, "-o", library, HERE / "cuda.c", "-lm"]
    subprocess.run(arguments, check=True, capture_output=True, text=True)
    return library


def environment(library: Path, programs: Path, *, control: bool = True) -> Mapping[str, str]:
    """What a process needs to find them; `programs` is a new directory for those that are run."""
    programs.mkdir()
    scripts = {"nvcc": 'while [ "$1" != -o ]; do shift; done; : >"$2"'}
    if control:
        scripts["nvidia-cuda-mps-control"] = (
            f"case $1 in -f) it=control ;; *) it=ask ;; esac\n"
            f"exec '{PYTHON}' -I -S {HERE}/$it.py \"$@\""
        )
    for name, script in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    return {
        "LD_LIBRARY_PATH": str(library.parent),
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(HERE / "python"),
    }
