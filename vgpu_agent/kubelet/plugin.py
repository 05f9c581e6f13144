"""The device plugin service: the wire on one side, the model on the other. Knows no sockets.

The contract is the kubelet's device plugin API v1beta1 (KEP-3573). Wrong requests are answered
with INVALID_ARGUMENT, requests that cannot be met now with FAILED_PRECONDITION.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import wraps
from typing import Any, NoReturn, Protocol, TypeVar, cast

import anyio
import anyio.to_thread
from anyio.abc import TaskStatus
from betterproto import Message
from grpclib import GRPCError, Status
from grpclib.const import Cardinality, Handler
from grpclib.encoding.proto import ProtoCodec
from grpclib.server import Stream

from vgpu_agent.errors import AllocationError, InvalidRequestError, UnavailableDeviceError
from vgpu_agent.kubelet._proto.v1beta1 import (
    AllocateRequest,
    AllocateResponse,
    CdiDevice,
    ContainerAllocateResponse,
    ContainerPreferredAllocationResponse,
    Device,
    DevicePluginBase,
    DevicePluginOptions,
    Empty,
    ListAndWatchResponse,
    Mount,
    NumaNode,
    PreferredAllocationRequest,
    PreferredAllocationResponse,
    PreStartContainerRequest,
    PreStartContainerResponse,
    TopologyInfo,
)
from vgpu_agent.model.container import Grant, check_start, grant
from vgpu_agent.model.devices import Inventory, device_id
from vgpu_agent.model.latest import Latest
from vgpu_agent.model.node import Node
from vgpu_agent.model.placement import prefer

log = logging.getLogger(__name__)

Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)
_Call = Callable[[Stream[Any, Any]], Awaitable[None]]

HEALTHY = "Healthy"
UNHEALTHY = "Unhealthy"


class RpcObserver(Protocol):
    """Where the duration of every unary call goes."""

    def observe_rpc(self, method: str, code: str, seconds: float) -> None:
        """A call of `method` ended with a gRPC status code after so many seconds."""
        ...


class WireCodec(ProtoCodec):
    """grpclib's codec. Bytes are encoded already; undecodable ones are the caller's mistake."""

    def encode(self, message: Any, message_type: Any) -> bytes:
        """Its bytes."""
        return message if isinstance(message, bytes) else super().encode(message, message_type)

    def decode(self, data: bytes, message_type: Any) -> Any:
        """The message. Raises GRPCError INVALID_ARGUMENT."""
        try:
            message: Message = message_type().parse(data)
            _check_types(message)
        except Exception as error:  # betterproto raises whatever its parser stumbles on
            raise GRPCError(
                Status.INVALID_ARGUMENT, f"cannot decode {message_type.__name__}: {error}"
            ) from error
        return message


def _check_types(message: Message) -> None:
    """Raises TypeError: betterproto keeps a value whose wire type is not that of its field."""
    known = cast("Any", message)._betterproto  # which is typed wrongly
    for name, kind in known.cls_by_field.items():
        value = getattr(message, name)
        several = isinstance(value, list)
        for each in value if several else [value]:
            if not isinstance(each, kind) or several is not (known.default_gen[name] is list):
                raise TypeError(f"{name} is of another type")
            if isinstance(each, Message):
                _check_types(each)


_Listed = tuple[str, int, int | None]
"""What the vGPUs of a GPU are listed by: its UUID, their number, its NUMA node."""


class ListEncoder:
    """Encodes device lists GPU by GPU, each GPU once. Owns that cache.

    betterproto takes about 0.1 ms for a vGPU, on the event loop. Serialised messages with repeated
    fields concatenate, so a list is the joined lists of its GPUs.
    """

    def __init__(self) -> None:
        self._encoded: dict[_Listed, Mapping[bool, bytes]] = {}

    async def encode(self, inventory: Inventory) -> bytes:
        """The list, encoded off the loop where GPUs are new and from the cache otherwise."""
        wanted = [(each.gpu.uuid, each.replicas, each.gpu.numa_node) for each in inventory.gpus]
        missing = [key for key in wanted if key not in self._encoded]
        if missing:
            fresh = await anyio.to_thread.run_sync(_encode, missing)
            known = self._encoded | fresh
            self._encoded = {key: known[key] for key in wanted}
        gpus = zip(wanted, inventory.gpus, strict=True)
        return b"".join(self._encoded[key][shared.healthy] for key, shared in gpus)


def _encode(gpus: Iterable[_Listed]) -> dict[_Listed, Mapping[bool, bytes]]:
    """The lists of these GPUs, by health: a fault has no time to wait for an encoder."""
    return {
        gpu: {
            healthy: b"".join(_list_of_one(gpu, n, healthy) for n in range(gpu[1]))
            for healthy in (True, False)
        }
        for gpu in gpus
    }


def _list_of_one(gpu: _Listed, number: int, healthy: bool) -> bytes:
    uuid, _, numa_node = gpu
    device = Device(id=device_id(uuid, number), health=HEALTHY if healthy else UNHEALTHY)
    if numa_node is not None:
        device.topology = TopologyInfo(nodes=[NumaNode(id=numa_node)])
    return bytes(ListAndWatchResponse(devices=[device]))


@dataclass(frozen=True, slots=True)
class Streams:
    """How many ListAndWatch streams were opened and have ended since the plugin was made."""

    opened: int = 0
    ended: int = 0


def _guarded(
    handler: Callable[["DevicePlugin", Q], Coroutine[Any, Any, A]],
) -> Callable[["DevicePlugin", Q | None], Coroutine[Any, Any, A]]:
    """Translates the errors of a call: ours to gRPC's, an unexpected one ends the agent."""

    @wraps(handler)
    async def call(plugin: "DevicePlugin", request: Q | None) -> A:
        if request is None:  # the caller ended its side without a message
            raise GRPCError(Status.INVALID_ARGUMENT, "the call carries no message")
        try:
            return await handler(plugin, request)
        except AllocationError as error:
            log.warning("%s refused: %s", handler.__name__, error)
            raise GRPCError(_status(error), str(error)) from error
        except Exception as error:
            plugin.fail(error)
            raise GRPCError(Status.INTERNAL, f"{handler.__name__} failed: {error!r}") from error

    return call


def _status(error: AllocationError) -> Status:
    unavailable = isinstance(error, UnavailableDeviceError)
    return Status.FAILED_PRECONDITION if unavailable else Status.INVALID_ARGUMENT


class DevicePlugin(DevicePluginBase):
    """The service for one registration. `run` feeds its streams; `end_streams` ends them cleanly.

    The kubelet sees the end of a stream as the end of the registration, so a new registration
    gets a new plugin.
    """

    def __init__(self, *, node: Node, encoder: ListEncoder, observer: RpcObserver) -> None:
        self._node = node
        self._encoder = encoder
        self._observer = observer
        self._lists = Latest(b"")
        self._failure: asyncio.Future[NoReturn] = asyncio.get_running_loop().create_future()
        self.streams = Latest(Streams())

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Keeps the list of the streams up to date; started when the first list is ready.

        Raises what a handler failed with unexpectedly: a bug ends the agent, it is not served on.
        """
        async with anyio.create_task_group() as tasks:
            await tasks.start(self._publish_lists)
            task_status.started()
            await self._failure

    async def _publish_lists(
        self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED
    ) -> None:
        published: bytes | None = None
        async for snapshot in self._node.latest.follow():
            encoded = await self._encoder.encode(snapshot.inventory)
            if encoded != published:
                self._lists.publish(encoded)
            if published is None:
                task_status.started()
            published = encoded

    def fail(self, error: Exception) -> None:
        """A call failed in a way that nobody expected: `run` raises the first such error."""
        if not self._failure.done():
            self._failure.set_exception(error)

    def end_streams(self) -> None:
        """Lets every stream end with a clean end, after the list that it is sending now."""
        self._lists.close()

    @property
    def options(self) -> DevicePluginOptions:
        """What the kubelet is to call beside Allocate.

        PreStartContainer is the only call that comes again at a container's restart, and the one
        where a refusal is retried: MPS needs both.
        """
        return DevicePluginOptions(
            pre_start_required=self._node.rules.sharing.mps,
            get_preferred_allocation_available=True,
        )

    # The five calls

    async def get_device_plugin_options(self, empty: Empty) -> DevicePluginOptions:  # noqa: ARG002
        """See `options`."""
        return self.options

    async def list_and_watch(self, empty: Empty) -> AsyncIterator[ListAndWatchResponse]:  # noqa: ARG002
        """The list, and again the newest list at every change, until `end_streams`.

        Holds no cancel scope, task group or lock across the yield: a stream whose send is blocked
        is finalised by the garbage collector, in another task.
        """
        async for encoded in self._lists.follow(version=0):  # 0 is before the first list
            yield cast("ListAndWatchResponse", encoded)  # for `WireCodec`, as it is
            self._node.list_sent()

    @_guarded
    async def get_preferred_allocation(
        self, preferred_allocation_request: PreferredAllocationRequest
    ) -> PreferredAllocationResponse:
        """Advice on which free vGPUs to take, see `model.placement`."""
        responses = []
        for request in preferred_allocation_request.container_requests:
            if request.allocation_size < 0:
                raise InvalidRequestError(
                    f"allocation_size is {request.allocation_size}; it must be 0 or more"
                )
            preference = prefer(
                self._node.snapshot.inventory,
                request.available_device_i_ds,
                request.must_include_device_i_ds,
                request.allocation_size,
                self._node.rules.sharing.placement,
            )
            if preference.passed_over:
                log.info(
                    "GetPreferredAllocation: passed over as unknown or unhealthy: %s",
                    ", ".join(preference.passed_over),
                )
            responses.append(
                ContainerPreferredAllocationResponse(device_i_ds=list(preference.device_ids))
            )
        return PreferredAllocationResponse(container_responses=responses)

    @_guarded
    async def allocate(self, allocate_request: AllocateRequest) -> AllocateResponse:
        """What each container is started with, see `model.container`."""
        snapshot = self._node.snapshot
        inventory, rules = snapshot.inventory, self._node.rules.sharing
        if snapshot.mps is not None:
            rules = rules.with_applied_limits(snapshot.mps.limits)
        requests = [list(each.devices_ids) for each in allocate_request.container_requests]
        if not requests:
            raise InvalidRequestError("the request names no container")
        total = sum(shared.replicas for shared in inventory.gpus)
        if len(requests) > total:
            raise InvalidRequestError(
                f"{len(requests)} container requests, but the node has {total} vGPUs"
            )
        _check_disjoint(requests)
        grants = [grant(inventory, device_ids, rules) for device_ids in requests]
        for device_ids in requests:
            log.info("Allocate: %s", ", ".join(sorted(device_ids)))
        self._node.allocated()
        return AllocateResponse(container_responses=[_response(each) for each in grants])

    @_guarded
    async def pre_start_container(
        self, pre_start_container_request: PreStartContainerRequest
    ) -> PreStartContainerResponse:
        """Refuses while a GPU of the container is gone or unhealthy; the kubelet tries again."""
        check_start(self._node.snapshot.inventory, pre_start_container_request.devices_ids)
        return PreStartContainerResponse()

    # What all calls share

    def __mapping__(self) -> dict[str, Handler]:
        """The calls by their path on the wire, each observed and its errors translated."""
        return {
            path: handler._replace(
                func=self._followed(handler.func)
                if handler.cardinality is Cardinality.UNARY_STREAM
                else self._timed(path.rpartition("/")[2], handler.func)
            )
            for path, handler in super().__mapping__().items()
        }

    def _timed(self, method: str, func: _Call) -> _Call:
        async def call(stream: Stream[Any, Any]) -> None:
            started = time.perf_counter()
            status = Status.CANCELLED  # what is left when neither an answer nor an error came
            try:
                await func(stream)
                status = Status.OK
            except GRPCError as error:
                status = error.status
                raise
            finally:
                self._observer.observe_rpc(method, status.name, time.perf_counter() - started)

        return call

    def _followed(self, func: _Call) -> _Call:
        """Counts streams here, where the end comes at once, and not in the generator."""

        async def call(stream: Stream[Any, Any]) -> None:
            before = self.streams.value
            self.streams.publish(replace(before, opened=before.opened + 1))
            self._node.stream_opened()
            try:
                await func(stream)
            finally:
                before = self.streams.value
                self.streams.publish(replace(before, ended=before.ended + 1))
                self._node.stream_ended()

        return call


def _check_disjoint(requests: Iterable[Iterable[str]]) -> None:
    containers = Counter(vgpu for device_ids in requests for vgpu in set(device_ids))
    for vgpu, count in containers.items():
        if count > 1:
            raise InvalidRequestError(f"device {vgpu!r} is requested for two containers")


def _response(granted: Grant) -> ContainerAllocateResponse:
    return ContainerAllocateResponse(
        envs=dict(granted.environment),
        mounts=[Mount(**asdict(mount)) for mount in granted.mounts],
        cdi_devices=[CdiDevice(name=name) for name in granted.cdi_devices],
    )
