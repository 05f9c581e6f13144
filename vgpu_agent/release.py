"""`vgpu-agent release`: asks the running agent to let go of the cards, so that they can be reset.

The driver refuses to reset a card while a client of NVML is there, and the agent is one.
"""

import os
import signal
import time
from collections.abc import Callable

from vgpu_agent import running
from vgpu_agent.errors import NoAgentError, ReleaseError
from vgpu_agent.settings import Settings

PATIENCE = 15.0
"""Seconds in which the agent has to answer."""


def release(settings: Settings, tell: Callable[[str], None], *, patience: float = PATIENCE) -> None:
    """Asks, and waits until the cards are let go of. Raises ReleaseError."""
    path = settings.state_directory / running.PID_FILE
    agent = running.find(settings.state_directory)
    if agent is None:
        raise ReleaseError(
            f"no running agent is named in {path}: run this in the agent's container, with its"
            " VGPU_STATE_DIRECTORY"
        )
    before = _released_until(settings)
    try:
        os.kill(agent.pid, signal.SIGUSR1)
    except (ProcessLookupError, PermissionError) as error:
        raise ReleaseError(
            f"cannot signal the agent, process {agent.pid} of {path}: {error.strerror}"
        ) from error
    deadline = time.monotonic() + patience
    while (until := _released_until(settings)) in (None, before):
        if time.monotonic() > deadline:
            raise ReleaseError(
                f"the agent was asked, and does not say within {patience:g} s at"
                f" VGPU_METRICS_ADDRESS={settings.metrics_address} that it let go: see its log; a"
                " call to the driver may hang"
            )
        time.sleep(0.2)
    tell(f"the agent has let go of all cards until {until}; reset them now:")
    tell("    nvidia-smi --gpu-reset -i <index>")


def _released_until(settings: Settings) -> str | None:
    try:
        driver = running.ask(running.address_of(settings)).report.get("driver")
    except NoAgentError:
        return None
    until = driver.get("released_until") if isinstance(driver, dict) else None
    return None if until is None else str(until)
