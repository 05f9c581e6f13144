"""`vgpu-agent mps watch`: the one that asks the MPS daemons, and says in `state` what it saw.

It sets their limits and reads them back. It starts and ends nothing: daemons are the MPS pod's,
servers are the daemons'. A watcher that comes back goes on from what the one before it wrote.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

import anyio

from vgpu_agent.errors import Once, StoreError
from vgpu_agent.mps import state
from vgpu_agent.mps.control import Control
from vgpu_agent.mps.directories import Directories
from vgpu_agent.mps.look import Measure, Watcher
from vgpu_agent.mps.programs import CONTROL, hold
from vgpu_agent.mps.state import State, Watched
from vgpu_agent.store import Said, closing, since_boot
from vgpu_agent.threads import in_thread

log = logging.getLogger(__name__)

BEAT = 10.0
"""Seconds after which `state` is written, also where nothing changed."""


async def watch(
    plan: State,
    directories: Directories,
    *,
    binary: str = CONTROL,
    measure: Measure | None = None,
    divided: Callable[[], State] | None = None,
    poll_seconds: float = 0.5,
    look_seconds: float = 5.0,
) -> None:
    """Watches until cancelled. Raises MpsSetupError where another watcher runs.

    `plan` is what is to be in effect at each daemon. `measure` says, in a worker thread, how many
    bytes of a GPU each process has; with it the memory of a server itself is reported. `divided` is
    asked, in a worker thread, how GPUs are to be divided now; it may raise StoreError.
    Whether there is a new daemon, and what one writes, is seen every `poll_seconds`; all else is
    asked for every `look_seconds`, and less often where there is no server.
    """
    with closing(hold(directories.watch)):
        try:
            known = (state.read(directories.state) or plan).daemons
        except StoreError as error:
            log.warning("%s; it is replaced", error)
            known = {}
        said = Said(directories.state, state.read)
        watchers = {
            name: Watcher(
                planned.look,
                Control(directories.daemon(name), binary=binary),
                plan.limits,
                measure,
                known.get(name),
            )
            for name, planned in plan.daemons.items()
        }
        async with anyio.create_task_group() as tasks:
            for one in watchers.values():
                tasks.start_soon(one.run, poll_seconds, look_seconds)
            if divided is not None:
                tasks.start_soon(_divide, watchers, divided, look_seconds)
            trouble = Once(log)
            while True:
                await anyio.sleep(poll_seconds)
                try:
                    await _say(said, watchers, plan)
                    trouble.warn()
                except StoreError as error:
                    trouble.warn(f"{error}: mount its directory writable, and run this as root")


async def _divide(
    watchers: Mapping[str, Watcher], divided: Callable[[], State], seconds: float
) -> None:
    trouble = Once(log)
    while True:
        await anyio.sleep(seconds)
        try:
            plan = await in_thread(divided)
        except StoreError as error:
            trouble.warn(f"{error}: GPUs stay divided as they are")
            continue
        trouble.warn()
        for name, planned in plan.daemons.items():
            if name in watchers:
                watchers[name].divide(planned.look)


async def _say(said: Said[State], watchers: Mapping[str, Watcher], plan: State) -> None:
    """Writes what changed, and now and then what did not. Raises StoreError."""
    daemons = {name: one.watched for name, one in watchers.items() if one.looked}
    known = {name: _known(each) for name, each in daemons.items()}
    if daemons and said.is_due(known, BEAT):
        data = state.as_data(replace(plan, beat=since_boot(), daemons=daemons))
        await in_thread(said.say, data, known)


def _known(watched: Watched) -> Watched:
    """What is worth a write at once: a log is read on every time."""
    return replace(watched, log=replace(watched.log, offset=0))
