"""`vgpu-agent release`: asks the running agent to let go of the cards, so that they can be reset.

The driver refuses to reset a card while a client of NVML is there, and the agent is one.
"""

import fcntl
import json
import logging
import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import IO

from vgpu_agent.errors import ReleaseError
from vgpu_agent.settings import Settings

log = logging.getLogger(__name__)

PID_FILE = "agent.pid"
PATIENCE = 15.0
"""Seconds in which the agent has to answer."""


@contextmanager
def findable(directory: Path) -> Iterator[None]:
    """Makes this process known to `release` for as long as it runs.

    The lock on the file says that the process lives; a second agent leaves the first one's alone.
    A directory that cannot be written is no reason not to run.
    """
    path = directory / PID_FILE
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        log.warning("`vgpu-agent release` will not work: %s: %s", path, error.strerror)
        yield
        return
    with file:
        if not _lock(file):
            yield
            return
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _lock(file: IO[str]) -> bool:
    """Whether nobody else holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def release(settings: Settings, tell: Callable[[str], None]) -> None:
    """Asks, and waits until the cards are let go of. Raises ReleaseError."""
    path = settings.state_directory / PID_FILE
    pid = _pid(path)
    if pid is None:
        raise ReleaseError(
            f"no running agent is named in {path}: run this in the agent's container, with its"
            " VGPU_STATE_DIRECTORY"
        )
    before = _released_until(settings)
    try:
        os.kill(pid, signal.SIGUSR1)
    except (ProcessLookupError, PermissionError) as error:
        raise ReleaseError(
            f"cannot signal the agent, process {pid} of {path}: {error.strerror}"
        ) from error
    deadline = time.monotonic() + PATIENCE
    while (until := _released_until(settings)) in (None, before):
        if time.monotonic() > deadline:
            raise ReleaseError(
                f"the agent was asked, and does not say within {PATIENCE:.0f} s at"
                f" VGPU_METRICS_ADDRESS={settings.metrics_address} that it let go: see its log; a"
                " call to the driver may hang"
            )
        time.sleep(0.2)
    tell(f"the agent has let go of all cards until {until}; reset them now:")
    tell("    nvidia-smi --gpu-reset -i <index>")


def _pid(path: Path) -> int | None:
    """The agent that holds the file; one that nobody holds was left by an agent that is gone."""
    try:
        with path.open("r+") as file:
            pid = int(file.read())
            return pid if pid > 0 and not _lock(file) else None
    except (OSError, ValueError):
        return None


def _released_until(settings: Settings) -> str | None:
    host, port = settings.metrics_address
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - a comparison
    url = f"http://{f'[{local}]' if ':' in local else local}:{port}/status.json"
    try:
        # This machine is never behind a proxy.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=2) as answer:
            until = json.load(answer)["driver"]["released_until"]
    except (OSError, ValueError, KeyError, TypeError, HTTPException):
        return None
    return None if until is None else str(until)
