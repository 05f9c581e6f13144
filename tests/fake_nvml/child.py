"""Asks an NvmlDriver what a test wants to know: JSON lines in, JSON lines out.

A process of its own, since the loader reads LD_LIBRARY_PATH only at the start of one.
"""

import dataclasses
import json
import logging
import sys
import threading
import time
from pathlib import Path
from typing import Any

import anyio
from anyio import to_thread

from vgpu_agent.errors import DriverError
from vgpu_agent.gpu.nvml import NvmlDriver


async def scan(driver: NvmlDriver, *limits: float) -> Any:
    try:
        found = dataclasses.asdict(await driver.scan(*limits))
        return found | {"returned": sorted(found["returned"])}
    except DriverError as error:
        return {"error": str(error)}


async def probe(driver: NvmlDriver, uuid: str, *limit: float) -> Any:
    return dataclasses.asdict((await driver.probe([uuid], *limit))[uuid])


async def processes(driver: NvmlDriver, uuid: str) -> Any:
    found = await driver.processes(uuid)
    return None if found is None else [dataclasses.astuple(process) for process in found]


async def memory_limits(driver: NvmlDriver, uuid: str, *cgroups: str) -> Any:
    """Hard, soft and used bytes by path, or words; and how many seconds it took."""
    start = time.monotonic()
    found = await driver.memory_limits(uuid, cgroups)
    took = time.monotonic() - start
    answers = {
        path: each if isinstance(each, str) else dataclasses.astuple(each)
        for path, each in found.items()
    }
    return [answers, took]


async def limit_memory(
    driver: NvmlDriver, uuid: str, cgroup: str, hard: int | None, soft: int
) -> Any:
    return await driver.limit_memory(uuid, cgroup, hard, soft)


async def release(driver: NvmlDriver) -> Any:
    return await driver.release()


async def events(driver: NvmlDriver, waits: int) -> Any:
    """The events of so many waits, or of the first that has any."""
    for _ in range(waits):
        if found := await driver.next_events():
            return [[type(event).__name__, *dataclasses.astuple(event)] for event in found]
    return []


async def cancel(driver: NvmlDriver, after: float) -> Any:
    """How many seconds it takes to get away from a wait for events."""
    start = time.monotonic()
    with anyio.move_on_after(after):
        await driver.next_events()
    return time.monotonic() - start - after


async def hang(
    driver: NvmlDriver,
    uuid: str,
    seconds: float,
    times: int,
    name: str = "probe",
    *arguments: Any,
) -> Any:
    """What happens on the loop and to threads while calls hang: ticks, timeouts, new threads."""
    call, of = getattr(driver, name), [uuid] if name == "probe" else uuid
    ticks = timeouts = 0
    before = threading.active_count()
    done = anyio.Event()

    async def tick() -> None:
        nonlocal ticks
        while not done.is_set():
            await anyio.sleep(0.01)
            ticks += 1

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(tick)
        for _ in range(times):
            with anyio.move_on_after(seconds) as scope:
                await call(of, *arguments)
            timeouts += scope.cancelled_caught
        done.set()
    return {"ticks": ticks, "timeouts": timeouts, "threads": threading.active_count() - before}


async def advance(_: NvmlDriver, seconds: float) -> None:
    global offset
    offset += seconds


async def leave(driver: NvmlDriver) -> Any:
    """Closes NVML while another task waits for events; how many seconds that takes."""
    start = time.monotonic()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(driver.next_events)
        await anyio.sleep(0.05)
        await driver.__aexit__(None, None, None)
        took = time.monotonic() - start
        tasks.cancel_scope.cancel()
    return took


COMMANDS = {
    command.__name__: command
    for command in (
        scan,
        probe,
        processes,
        memory_limits,
        limit_memory,
        release,
        events,
        cancel,
        hang,
        advance,
        leave,
    )
}

offset = 0.0


async def main() -> None:
    numa_root, proc_root = json.loads(sys.argv[1])
    async with NvmlDriver(
        numa_root=Path(numa_root),
        proc_root=Path(proc_root),
        wait_seconds=2,
        monotonic=lambda: time.monotonic() + offset,
    ) as driver:
        while line := await to_thread.run_sync(sys.stdin.readline):
            name, *arguments = json.loads(line)
            print(json.dumps(await COMMANDS[name](driver, *arguments)), flush=True)


if __name__ == "__main__":
    logging.getLogger().addHandler(logging.NullHandler())  # stderr is for what goes wrong
    anyio.run(main)
