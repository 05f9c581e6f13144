"""A kubelet in this process, for `vgpu-agent dev`: it speaks the real API over real sockets.

It registers plugins as the kubelet's device manager does (dials back inside Register, then opens
ListAndWatch), keeps the lists, admits and ends pods, and lists them (PodResources). What it
observed is all that it reports.
"""

import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import anyio
from anyio import CancelScope
from anyio.abc import TaskGroup
from grpclib import GRPCError, Status
from grpclib.client import Channel
from grpclib.exceptions import StreamTerminatedError
from grpclib.server import Server

from vgpu_agent.errors import AdmissionError
from vgpu_agent.kubelet._proto import v1
from vgpu_agent.kubelet._proto.v1beta1 import (
    AllocateRequest,
    ContainerAllocateRequest,
    ContainerPreferredAllocationRequest,
    Device,
    DevicePluginStub,
    Empty,
    PreferredAllocationRequest,
    PreStartContainerRequest,
    RegisterRequest,
    RegistrationBase,
)
from vgpu_agent.kubelet.codec import HEALTHY
from vgpu_agent.kubelet.podresources import SOCKET as POD_RESOURCES_SOCKET
from vgpu_agent.kubelet.session import API_VERSION, KUBELET_SOCKET
from vgpu_agent.model.latest import Latest

DIAL_TIMEOUT = 10.0

NAMESPACE = "default"
CONTAINER = "main"


@dataclass(frozen=True, slots=True)
class Admitted:
    """A pod's only container, as the plugin said that it is to be started."""

    pod: str
    device_ids: tuple[str, ...]
    environment: Mapping[str, str]
    mounts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Observed:
    """What the kubelet has seen. `devices` is the newest list, by device ID.

    `lists` counts the lists of all registrations, `ended` the streams that ended.
    """

    resource_name: str = ""
    registrations: int = 0
    lists: int = 0
    ended: int = 0
    devices: Mapping[str, Device] = field(default_factory=dict)

    @property
    def unhealthy(self) -> frozenset[str]:
        """The devices that no pod may be given."""
        return frozenset(vgpu for vgpu, device in self.devices.items() if device.health != HEALTHY)


@asynccontextmanager
async def standin_kubelet(directory: Path) -> AsyncIterator["StandinKubelet"]:
    """A kubelet on `directory` that runs, and that is stopped however the context ends."""
    async with anyio.create_task_group() as tasks:
        kubelet = StandinKubelet(directory, tasks)
        await kubelet.start()
        try:
            yield kubelet
        finally:
            await kubelet.stop()


class _PodResources(v1.PodResourcesListerBase):
    """Answers List; the other calls are UNIMPLEMENTED."""

    def __init__(self, listed: Callable[[], v1.ListPodResourcesResponse]) -> None:
        self._listed = listed

    async def list(
        self,
        list_pod_resources_request: v1.ListPodResourcesRequest,  # noqa: ARG002
    ) -> v1.ListPodResourcesResponse:
        return self._listed()


class StandinKubelet(RegistrationBase):
    """A kubelet, for as long as `start` and `stop` say. `directory` is that of device plugins."""

    def __init__(self, directory: Path, tasks: TaskGroup) -> None:
        self._directory = directory
        self._tasks = tasks
        self._servers: list[Server] = []
        self._plugin: CancelScope | None = None
        self._channel: Channel | None = None
        self._pre_start = False
        self._held: dict[str, Admitted] = {}
        self.observed = Latest(Observed())

    @property
    def _sockets(self) -> tuple[Path, Path]:
        return self._directory / KUBELET_SOCKET, self._directory.parent / POD_RESOURCES_SOCKET

    async def start(self) -> None:
        """Removes every plugin's socket and its own stale ones, as kubelets do, and listens."""
        services: tuple[RegistrationBase | v1.PodResourcesListerBase, ...] = (
            self,
            _PodResources(self._listed),
        )
        for service, path in zip(services, self._sockets, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            for stale in path.parent.glob("*.sock"):
                stale.unlink()
            server = Server([service])
            await server.start(path=str(path))
            self._servers.append(server)

    async def stop(self) -> None:
        """Ends as a kubelet does at SIGTERM: streams cut, its sockets left behind, stale."""
        if self._plugin is not None:
            self._plugin.cancel()
        for server, path in zip(self._servers, self._sockets, strict=False):
            server.close()
            # grpclib leaves the file up to Python 3.12 and asyncio removes it from 3.13 on.
            if not path.exists():
                with socket.socket(socket.AF_UNIX) as stale:
                    stale.bind(str(path))
        self._servers = []

    async def register(self, register_request: RegisterRequest) -> Empty:
        """Dials the plugin back inside the call, then follows its list."""
        if register_request.version != API_VERSION:
            raise GRPCError(Status.UNKNOWN, f"unsupported version {register_request.version!r}")
        channel = Channel(path=str(self._directory / register_request.endpoint))
        plugin = DevicePluginStub(channel)
        try:
            options = await plugin.get_device_plugin_options(Empty(), timeout=DIAL_TIMEOUT)
        except (OSError, GRPCError, StreamTerminatedError) as error:
            channel.close()
            raise GRPCError(Status.UNKNOWN, f"cannot dial the plugin back: {error}") from error
        if self._plugin is not None:
            self._plugin.cancel()
        self._channel = channel
        self._pre_start = options.pre_start_required
        self._see(
            resource_name=register_request.resource_name,
            registrations=self.observed.value.registrations + 1,
        )
        self._tasks.start_soon(self._follow, channel)
        return Empty()

    async def _follow(self, channel: Channel) -> None:
        try:
            with CancelScope() as scope:
                self._plugin = scope
                async for each in DevicePluginStub(channel).list_and_watch(Empty()):
                    self._see(
                        lists=self.observed.value.lists + 1,
                        devices={device.id: device for device in each.devices},
                    )
        except (OSError, GRPCError, StreamTerminatedError):
            pass  # the end of a stream is the end of it, however it came
        finally:
            channel.close()
        self._see(ended=self.observed.value.ended + 1, devices={})

    def _see(self, **seen: object) -> None:
        self.observed.publish(replace(self.observed.value, **seen))  # type: ignore[arg-type]

    async def admit(self, pod: str, count: int) -> Admitted:
        """Gives a pod `count` devices, asking the plugin as the kubelet does.

        Raises AdmissionError with the plugin's words.
        """
        try:
            return await self._admit(pod, count)
        except (OSError, GRPCError, StreamTerminatedError) as error:
            raise AdmissionError(f"pod {pod} cannot be admitted: {error}") from error

    async def _admit(self, pod: str, count: int) -> Admitted:
        if self._channel is None:
            raise AdmissionError("no plugin is registered")
        plugin = DevicePluginStub(self._channel)
        held = {vgpu for each in self._held.values() for vgpu in each.device_ids}
        given = held | self.observed.value.unhealthy
        free = [vgpu for vgpu in self.observed.value.devices if vgpu not in given]
        preferred = await plugin.get_preferred_allocation(
            PreferredAllocationRequest(
                container_requests=[
                    ContainerPreferredAllocationRequest(
                        available_device_i_ds=free, allocation_size=count
                    )
                ]
            )
        )
        device_ids = preferred.container_responses[0].device_i_ds
        answer = await plugin.allocate(
            AllocateRequest(container_requests=[ContainerAllocateRequest(devices_ids=device_ids)])
        )
        if self._pre_start:
            await plugin.pre_start_container(PreStartContainerRequest(devices_ids=device_ids))
        container = answer.container_responses[0]
        admitted = Admitted(
            pod,
            tuple(device_ids),
            dict(container.envs),
            tuple(f"{mount.host_path} on {mount.container_path}" for mount in container.mounts),
        )
        self._held[pod] = admitted
        return admitted

    def end(self, pod: str) -> None:
        """Ends an admitted pod: its devices are free."""
        del self._held[pod]

    def _listed(self) -> v1.ListPodResourcesResponse:
        """The pods, with an entry for each device, as kubelets make it."""
        return v1.ListPodResourcesResponse(
            pod_resources=[
                v1.PodResources(
                    name=pod.pod,
                    namespace=NAMESPACE,
                    containers=[
                        v1.ContainerResources(
                            name=CONTAINER, devices=[self._device(vgpu) for vgpu in pod.device_ids]
                        )
                    ],
                )
                for pod in self._held.values()
            ]
        )

    def _device(self, vgpu: str) -> v1.ContainerDevices:
        nodes = self.observed.value.devices.get(vgpu, Device()).topology.nodes
        return v1.ContainerDevices(
            resource_name=self.observed.value.resource_name,
            device_ids=[vgpu],
            topology=v1.TopologyInfo(nodes=[v1.NumaNode(id=node.id) for node in nodes]),
        )
