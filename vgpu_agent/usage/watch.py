"""The task that attributes the processes on the GPUs to the containers that they run in.

A process on a GPU is known by its PID on the host; /proc knows its cgroup, the cgroup its
container, and the kubelet's links the container's name. The server of MPS has a context on every
GPU: it runs in the container of the MPS pod and is attributed to that pod, which holds no vGPU; no
pod of a user pays for it, and it is not unattributed either.

Between the driver's list and the look into /proc a process may end. Its PID is then missing, or
names a process that has nothing to do with the GPU; that lasts until the next look.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import anyio

from vgpu_agent.gpu.driver import GpuDriver
from vgpu_agent.model.holders import GpuProcess, Holder, Usage, attribute
from vgpu_agent.model.node import Node
from vgpu_agent.threads import in_thread
from vgpu_agent.usage.containers import LINKS, container_id, holders_by_id


@dataclass
class UsageWatch:
    """Looks at the processes on the advertised GPUs, every `interval` seconds.

    By default that is about as often as metrics are read. `call_limit` is how many seconds the
    driver has for the processes of a GPU. `proc` and `links` stand for /proc and
    /var/log/containers.
    """

    driver: GpuDriver
    node: Node
    interval: float = 15.0
    call_limit: float = 3.0
    proc: Path = Path("/proc")
    links: Path = LINKS
    _limiter: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(1))
    _last: str | None = None

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            await self.look()
            await anyio.sleep(self.interval)

    async def look(self) -> None:
        """Finds who uses what now. A GPU that does not answer has no usage, and no unattributed.

        While the driver does not answer, or is released for a reset, it is not asked.
        """
        before = self.node.snapshot.usage
        shown = None if before is None else before.problem
        if not self.node.snapshot.driver.up:
            self.node.set_usage(Usage(problem=shown))
            return
        processes = await self._processes()
        pids = {process.pid for running in processes.values() for process in running}
        containers, problem, alone = await in_thread(
            _find, pids, self.proc, self.links, abandon_on_cancel=True, limiter=self._limiter
        )
        if processes and (pids or alone):  # else there is nothing to judge by
            # Believed when two looks in a row have it: processes end between two reads.
            shown = problem if problem == self._last else shown
            self._last = problem
        self.node.set_usage(replace(attribute(processes, containers), problem=shown))

    async def _processes(self) -> dict[str, Collection[GpuProcess]]:
        """The processes on each GPU that lists them within the time it has, all asked at once."""
        found: dict[str, Collection[GpuProcess]] = {}

        async def ask(uuid: str) -> None:
            with anyio.move_on_after(self.call_limit):
                running = await self.driver.processes(uuid)
                if running is not None:
                    found[uuid] = running

        async with anyio.create_task_group() as tasks:
            for shared in self.node.snapshot.inventory.gpus:
                tasks.start_soon(ask, shared.gpu.uuid)
        return found


def _find(
    pids: Collection[int], proc: Path, links: Path
) -> tuple[Mapping[int, Holder], str | None, bool]:
    """The containers of the processes that run in one. Blocks.

    And why none can be attributed, with what to do, and whether /proc is our own container's.
    """
    texts = {pid: text for pid in pids if (text := _cgroup(proc, str(pid))) is not None}
    holders: dict[str, Holder] = {}
    problem = None
    try:
        # After the cgroups: a container that is among them has its link by now.
        holders = holders_by_id(links) if pids else {}
    except OSError as error:
        problem = (
            f"the names of containers cannot be read ({error}), so no usage can be attributed to"
            f" containers: mount {LINKS} of the node into this pod, read-only"
        )
    if not texts:
        problem = (
            "the processes on the GPUs are not in the PID namespace of this container, so no usage"
            " can be attributed to containers: run this pod with `hostPID: true`"
        )
    ids = {pid: container_id(text) for pid, text in texts.items()}
    containers = {pid: holders[each] for pid, each in ids.items() if each in holders}
    return containers, problem, _is_alone(proc)


def _is_alone(proc: Path) -> bool:
    """Whether the first process that we see is of our own container, and so of no node.

    Drivers leave out processes that have no PID in the namespace of the one who asks, so without
    the host's there may be none that could be missed.
    """
    own = _cgroup(proc, "self")
    return own is not None and _cgroup(proc, "1") in (None, own)


def _cgroup(proc: Path, pid: str) -> str | None:
    try:
        return (proc / pid / "cgroup").read_bytes().decode(errors="replace")
    except OSError:
        return None
