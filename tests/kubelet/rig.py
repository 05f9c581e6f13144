"""An agent's kubelet side in this process: real state, plugin and session, no GPUs, no web."""

import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import grpc

from tests.kubelet.peers import started, until
from tests.kubelet_peer import CHANNEL_OPTIONS, KubeletPeer, off_loop
from tests.nodes import new_node, probed
from vgpu_agent.gpu.simulated import simulated_gpus
from vgpu_agent.kubelet.codec import ListEncoder
from vgpu_agent.kubelet.plugin import DevicePlugin
from vgpu_agent.kubelet.session import KubeletSession, SessionTiming, StatFunction
from vgpu_agent.model.devices import Gpu, SharedGpu, device_id
from vgpu_agent.model.facts import Reading
from vgpu_agent.model.node import Node
from vgpu_agent.model.rules import HealthRules, Placement, SharingRules
from vgpu_agent.model.snapshot import Snapshot

RESOURCE = "example.com/vgpu"
ENDPOINT = "vgpu.sock"
GIB = 2**30
MPS = SharingRules(memory_reserved=GIB // 2)
TIME_SLICING = SharingRules(mps=False, memory_reserved=GIB // 2)
PRODUCTION = SessionTiming()
QUICK = SessionTiming(back_off_max=0.05, own_socket_poll=0.05)
"""For tests that need what comes later, and not the time until then."""
LOST = Reading(lost=True, error="fell off the bus")


def gpus_of(count: int, numa: Sequence[int | None] = (0, 0, 1, 1)) -> tuple[Gpu, ...]:
    """GPUs of 16 GiB."""
    return simulated_gpus(count, "Simulated", 16 * GIB, numa)


class RpcRecord:
    """Every unary call that was observed."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.seconds: list[float] = []

    def observe_rpc(self, method: str, code: str, seconds: float) -> None:
        self.calls.append((method, code))
        self.seconds.append(seconds)


@dataclass
class Rig:
    """The parts of a running agent."""

    node: Node
    session: KubeletSession
    observer: RpcRecord
    plugins: list[DevicePlugin]
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    ended: anyio.Event = field(default_factory=anyio.Event)

    @property
    def path(self) -> Path:
        return self.session.socket_path

    @property
    def gpus(self) -> tuple[SharedGpu, ...]:
        return self.node.snapshot.inventory.gpus

    def ids(self, shared: int, *numbers: int) -> list[str]:
        """Those vGPUs of a GPU, or all of them."""
        made = self.gpus[shared]
        return [device_id(made.gpu.uuid, n) for n in numbers or range(made.replicas)]

    def registrations(self, result: str) -> int:
        """How often an attempt to register ended so."""
        return self.node.snapshot.registrations.get(result, 0)

    def fail(self, shared: int, reading: Reading = LOST) -> None:
        probed(self.node, self.gpus[shared].gpu.uuid, reading)

    def heal(self, shared: int) -> None:
        """Passed probes, for as long as it takes."""
        for _ in range(2):
            probed(self.node, self.gpus[shared].gpu.uuid, Reading())

    async def until(self, condition: Callable[[Snapshot], Any], within: float = 10.0) -> Snapshot:
        return await until(self.node, condition, within)

    async def registered(self, times: int = 1, within: float = 10.0) -> None:
        """Until the kubelet follows the list, and has been sent one, the n-th time."""

        def done(snapshot: Snapshot) -> bool:
            often = snapshot.registrations.get("registered", 0) >= times
            return often and snapshot.kubelet.connected and snapshot.lists_sent >= times

        await self.until(done, within)

    async def call(self, method: str, *requests: bytes) -> "Answer":
        """One call over a connection of its own, in bytes; with no request it is half-closed."""
        return await off_loop(raw_call, self.path, method, requests)

    async def stop(self) -> float:
        """Ends the session as the end of the agent does; the seconds that it took."""
        started = time.monotonic()
        self.scope.cancel()
        with anyio.fail_after(10):
            await self.ended.wait()
        return time.monotonic() - started

    async def run(self) -> None:
        try:
            with self.scope:
                await self.session.run()
        finally:
            self.ended.set()


@asynccontextmanager
async def agent(
    kubelet_dir: Path,
    *,
    gpus: int | Iterable[Gpu] = 4,
    replicas: int = 10,
    sharing: SharingRules = MPS,
    placement: Placement = Placement.SPREAD,
    stat_file: StatFunction = os.stat,
    timing: SessionTiming = PRODUCTION,
    endpoint: str = ENDPOINT,
) -> AsyncIterator[Rig]:
    """An agent that keeps itself registered in `kubelet_dir`; its failure ends the block."""
    node = new_node(
        gpus_of(gpus) if isinstance(gpus, int) else gpus,
        replace(sharing, replicas=replicas, placement=placement, mps_max_clients=replicas),
        HealthRules(recovery_seconds=0),
    )
    observer, encoder, plugins = RpcRecord(), ListEncoder(), []

    def make_plugin() -> DevicePlugin:
        plugins.append(DevicePlugin(node=node, encoder=encoder, observer=observer))
        return plugins[-1]

    session = KubeletSession(
        directory=kubelet_dir / "device-plugins",
        endpoint=endpoint,
        resource_name=RESOURCE,
        node=node,
        make_plugin=make_plugin,
        stat_file=stat_file,
        timing=timing,
    )
    rig = Rig(node, session, observer, plugins)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.run)
        yield rig
        tasks.cancel_scope.cancel()


@asynccontextmanager
async def registered(kubelet_dir: Path, **options: Any) -> AsyncIterator[tuple[KubeletPeer, Rig]]:
    """A kubelet, and an agent that it follows; the options are the agent's."""
    async with started(KubeletPeer(kubelet_dir)) as kubelet, agent(kubelet_dir, **options) as rig:
        await rig.registered()
        await off_loop(kubelet.wait_list, 1)
        yield kubelet, rig


def unchanging(snapshot: Snapshot) -> Snapshot:
    """The snapshot without what only counts."""
    return replace(snapshot, lists_sent=0, registrations={}, allocates=0)


# Calls in bytes


class Answer(NamedTuple):
    code: grpc.StatusCode
    details: str
    response: bytes | None


@asynccontextmanager
async def channel_to(path: Path) -> AsyncIterator[grpc.Channel]:
    channel = grpc.insecure_channel(f"unix:{path}", CHANNEL_OPTIONS)
    try:
        yield channel
    finally:
        with anyio.CancelScope(shield=True):
            await off_loop(channel.close)


def raw_call(path: Path, method: str, requests: Sequence[bytes]) -> Answer:
    with grpc.insecure_channel(f"unix:{path}", CHANNEL_OPTIONS) as channel:
        call = channel.stream_unary(f"/v1beta1.DevicePlugin/{method}")
        try:
            response, ended = call.with_call(iter(requests), timeout=10)
        except grpc.RpcError as error:
            return Answer(error.code(), error.details(), None)
        return Answer(ended.code(), ended.details(), response)


next_message = partial(off_loop, next)
"""The next message of a grpcio stream."""
