"""A stand-in for `apply-cuda-memory-limits`, the hook of NVIDIA's container toolkit (1.20.1).

A runtime runs it as a `createRuntime` hook (OCI runtime specification): once the container's cgroup
is made and before its program starts. It gets the container's state on stdin. What fails here keeps
the container from starting.

As the toolkit's own does:
- It takes both limits from the environment in the container's configuration, in whole MiB, the
  request being at most the limit. Without either of the two it does nothing.
- One value is for every GPU of the container. Which these are the runtime knows: arguments here.
- It fails on cgroup v1, with an NVML that lacks the call, and where the call fails.

Not known of the toolkit's, and an error here: numbers that are none, and a request above the limit.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pynvml

ROOT = Path("/sys/fs/cgroup")
REQUEST = "NVIDIA_GPU_MEMORY_REQUEST"
LIMIT = "NVIDIA_GPU_MEMORY_LIMIT"
MIB = 2**20


def wanted(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """Soft and hard limit in bytes; None where the container asks for none."""
    if REQUEST not in environment or LIMIT not in environment:
        return None
    numbers = environment[REQUEST], environment[LIMIT]
    if not all(number.isascii() and number.isdecimal() for number in numbers):
        sys.exit(f"{REQUEST}={numbers[0]!r} {LIMIT}={numbers[1]!r}: not whole MiB")
    request, limit = map(int, numbers)
    if request > limit:
        sys.exit(f"{REQUEST}={request} is more than {LIMIT}={limit}")
    return request * MIB, limit * MIB


def cgroup_of(pid: int) -> Path:
    """The directory of the cgroup v2 that a process is in."""
    if not (ROOT / "cgroup.controllers").exists():
        sys.exit(f"no cgroup v2 at {ROOT}")
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    (path,) = (line.removeprefix("0::") for line in lines if line.startswith("0::"))
    return ROOT / path.lstrip("/")


def apply(uuids: Sequence[str], cgroup: Path, soft: int, hard: int) -> None:
    """Sets the limits on each GPU. Raises NVMLError."""
    pynvml.nvmlInit()
    for uuid in uuids:
        limits = pynvml.c_nvmlSetMemoryLimits_v1_t(
            nameSpace=bytes(cgroup), softLimit=soft, hardLimit=hard
        )
        pynvml.nvmlDeviceSetMemoryLimits_v1(pynvml.nvmlDeviceGetHandleByUUID(uuid), limits)
    pynvml.nvmlShutdown()


def main() -> None:
    state = json.load(sys.stdin)
    config = json.loads(Path(state["bundle"], "config.json").read_text())
    # Of a variable that is there twice the last one counts, as for most programs.
    limits = wanted(dict(entry.split("=", 1) for entry in config["process"]["env"]))
    if limits is not None:
        apply(sys.argv[1:], cgroup_of(state["pid"]), *limits)


if __name__ == "__main__":
    main()
