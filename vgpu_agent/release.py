"""`vgpu-agent release`: asks the running agent to let go of the cards, so that they can be reset.

The driver refuses to reset a card while a client of NVML is there, and the agent is one.
"""

import json
import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vgpu_agent.errors import ReleaseError
from vgpu_agent.settings import Settings

PID_FILE = "agent.pid"
PATIENCE = 15.0
"""Seconds in which the agent has to answer."""


@contextmanager
def findable(directory: Path) -> Iterator[None]:
    """Makes this process known to `release` for as long as it runs.

    A directory that cannot be written is no reason not to run; `release` then says so.
    """
    path = directory / PID_FILE
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{os.getpid()}\n")
    except OSError:
        pass
    try:
        yield
    finally:
        if _pid(path) == os.getpid():
            path.unlink(missing_ok=True)


def release(settings: Settings, tell: Callable[[str], None]) -> None:
    """Asks, and waits until the cards are let go of. Raises ReleaseError."""
    path = settings.state_directory / PID_FILE
    pid = _pid(path)
    if pid is None:
        raise ReleaseError(
            f"no running agent is named in {path}: run this in the agent's container, with its"
            " VGPU_STATE_DIRECTORY"
        )
    try:
        os.kill(pid, signal.SIGUSR1)
    except (ProcessLookupError, PermissionError) as error:
        raise ReleaseError(
            f"cannot signal the agent, process {pid} of {path}: {error.strerror}"
        ) from error
    deadline = time.monotonic() + PATIENCE
    while (until := _released_until(settings)) is None:
        if time.monotonic() > deadline:
            raise ReleaseError(
                f"the agent did not let go of the cards within {PATIENCE:.0f} s: see its log; a"
                " call to the driver may hang"
            )
        time.sleep(0.2)
    tell(f"the agent has let go of all cards until {until}; reset them now:")
    tell("    nvidia-smi --gpu-reset -i <index>")


def _pid(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _released_until(settings: Settings) -> str | None:
    host, port = settings.metrics_address
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - a comparison
    url = f"http://{f'[{local}]' if ':' in local else local}:{port}/status.json"
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            until = json.load(answer)["driver"]["released_until"]
    except (OSError, ValueError, KeyError):
        return None
    return None if until is None else str(until)
