"""The device plugin service: its five calls, answered from the model. Knows no sockets.

The contract is the kubelet's device plugin API v1beta1 (KEP-3573). Wrong requests are answered
with INVALID_ARGUMENT, requests that cannot be met now with FAILED_PRECONDITION.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn, Protocol
from weakref import WeakSet

import anyio
from anyio.abc import TaskStatus
from betterproto import Message
from grpclib import GRPCError, Status
from grpclib.const import Handler
from grpclib.server import Stream

from vgpu_agent.errors import AllocationError, InvalidRequestError, UnavailableDeviceError
from vgpu_agent.kubelet._proto.v1beta1 import (
    AllocateRequest,
    AllocateResponse,
    CdiDevice,
    ContainerAllocateResponse,
    ContainerPreferredAllocationResponse,
    DevicePluginBase,
    DevicePluginOptions,
    Empty,
    Mount,
    PreferredAllocationRequest,
    PreferredAllocationResponse,
    PreStartContainerRequest,
    PreStartContainerResponse,
)
from vgpu_agent.kubelet.codec import ListEncoder
from vgpu_agent.model.container import Grant, check_start, grant
from vgpu_agent.model.latest import Latest
from vgpu_agent.model.node import Node
from vgpu_agent.model.placement import prefer
from vgpu_agent.threads import in_thread

log = logging.getLogger(__name__)

LARGE = 2000
"""So many free vGPUs are chosen from off the event loop, where that takes more than some ms."""

MAX_NAMED = 20
"""Most vGPUs that a log line names."""

_Call = Callable[[str, Stream[Any, Any]], Awaitable[None]]
"""Serves a call, by its method and its stream."""


class RpcObserver(Protocol):
    """Where the duration of every unary call goes."""

    def observe_rpc(self, method: str, code: str, seconds: float) -> None:
        """A call of `method` ended with a gRPC status code after so many seconds."""
        ...


@dataclass(frozen=True, slots=True)
class Streams:
    """How many ListAndWatch streams were opened since the plugin was made, and how many are open.

    `ended` counts those that may have been the kubelet's: the first one, and those of connections
    that asked for the options before, as kubelets do. Others are a guest's.
    """

    opened: int = 0
    open: int = 0
    ended: int = 0


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
        self._introduced: WeakSet[object] = WeakSet()
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
            ask = partial(
                prefer,
                self._node.snapshot.inventory,
                request.available_device_i_ds,
                request.must_include_device_i_ds,
                request.allocation_size,
                self._node.rules.sharing.placement,
            )
            large = len(request.available_device_i_ds) > LARGE
            preference = await in_thread(ask) if large else ask()
            if preference.passed_over:
                log.info(
                    "GetPreferredAllocation: passed over as unknown or unhealthy: %s",
                    _listed(preference.passed_over),
                )
            responses.append(
                ContainerPreferredAllocationResponse(device_i_ds=list(preference.device_ids))
            )
        return PreferredAllocationResponse(container_responses=responses)

    async def allocate(self, allocate_request: AllocateRequest) -> AllocateResponse:
        """What each container is started with, see `model.container`."""
        snapshot = self._node.snapshot
        inventory, rules = snapshot.inventory, self._node.rules.sharing
        if snapshot.mps is not None:
            rules = rules.with_applied_limits(snapshot.mps.look.limits)
        requests = [list(each.devices_ids) for each in allocate_request.container_requests]
        if not requests:
            raise InvalidRequestError("the request names no container")
        total = sum(shared.replicas for shared in inventory.gpus)
        if len(requests) > total:
            raise InvalidRequestError(
                f"{len(requests)} container requests, but the node has {total} vGPUs"
            )
        _check_disjoint(requests)
        grants = [grant(inventory, each, rules, snapshot.limits) for each in requests]
        for device_ids in requests:
            log.info("Allocate: %s", _listed(sorted(device_ids)))
        self._node.allocated()
        return AllocateResponse(container_responses=[_response(each) for each in grants])

    async def pre_start_container(
        self, pre_start_container_request: PreStartContainerRequest
    ) -> PreStartContainerResponse:
        """Refuses while a GPU of the container is gone or unhealthy; the kubelet tries again."""
        check_start(
            self._node.snapshot.inventory,
            pre_start_container_request.devices_ids,
            self._node.rules.sharing,
        )
        return PreStartContainerResponse()

    async def _list_and_watch(self, method: str, stream: Stream[Any, Any]) -> None:
        """The list, and again the newest list at every change, until `end_streams`."""
        await _received(stream, may_lack=True)
        before = self.streams.value
        # A guest's end is nothing to register again for.
        kubelets = before.opened == 0 or _connection(stream) in self._introduced
        self.streams.publish(replace(before, opened=before.opened + 1, open=before.open + 1))
        self._node.stream_opened()
        try:
            async for encoded in self._lists.follow(version=0):  # 0 is before the first list
                await stream.send_message(encoded)  # for `WireCodec`, as it is
                with self._ours(method):
                    self._node.list_sent()
        finally:
            now = self.streams.value
            self.streams.publish(replace(now, open=now.open - 1, ended=now.ended + kubelets))
            self._node.stream_ended()

    # What all calls share

    def __mapping__(self) -> dict[str, Handler]:
        """The calls by their path on the wire."""
        calls: dict[str, _Call] = {
            "ListAndWatch": self._list_and_watch,
            "GetDevicePluginOptions": self._options,
            "GetPreferredAllocation": self._unary(self.get_preferred_allocation),
            "Allocate": self._unary(self.allocate),
            "PreStartContainer": self._unary(self.pre_start_container),
        }
        return {
            path: handler._replace(func=partial(calls[method], method))
            for path, handler in super().__mapping__().items()
            for method in [path.rpartition("/")[2]]
        }

    async def _options(self, method: str, stream: Stream[Any, Any]) -> None:
        """Whoever asks for the options first may be a kubelet."""
        self._introduced.add(_connection(stream))
        await self._unary(self.get_device_plugin_options, may_lack=True)(method, stream)

    def _unary(
        self, answer_to: Callable[[Any], Awaitable[Message]], *, may_lack: bool = False
    ) -> _Call:
        """A call with one answer, observed."""

        async def call(method: str, stream: Stream[Any, Any]) -> None:
            started = time.perf_counter()
            status = Status.CANCELLED  # what is left when neither an answer nor an error came
            try:
                request = await _received(stream, may_lack=may_lack)
                with self._ours(method):
                    answer = await answer_to(request)
                await stream.send_message(answer)
                status = Status.OK
            except GRPCError as error:
                status = error.status
                raise
            finally:
                self._observer.observe_rpc(method, status.name, time.perf_counter() - started)

        return call

    @contextmanager
    def _ours(self, method: str) -> Iterator[None]:
        """Translates errors of ours to gRPC's; one that nobody expected ends the agent."""
        try:
            yield
        except AllocationError as error:
            log.warning("%s refused: %s", method, error)
            raise GRPCError(_status(error), str(error)) from error
        except Exception as error:
            self.fail(error)
            raise GRPCError(Status.INTERNAL, f"{method} failed: {error!r}") from error


def _status(error: AllocationError) -> Status:
    unavailable = isinstance(error, UnavailableDeviceError)
    return Status.FAILED_PRECONDITION if unavailable else Status.INVALID_ARGUMENT


def _connection(stream: Stream[Any, Any]) -> object:
    """The connection of a call; grpclib has no public name for it."""
    return stream._stream.connection


async def _received(stream: Stream[Any, Any], *, may_lack: bool) -> Any:
    """The request of a call; None where it has none and needs none. Raises GRPCError."""
    try:
        request = await stream.recv_message()
    except GRPCError:
        raise
    except Exception as error:  # grpclib stumbles: it breaks off, or is compressed
        words = f"the message cannot be read: {error!r}"
        raise GRPCError(Status.INVALID_ARGUMENT, words) from error
    if request is None and not may_lack:  # the caller ended its side without a message
        raise GRPCError(Status.INVALID_ARGUMENT, "the call carries no message")
    await asyncio.sleep(0)  # others first: a large request takes 20 ms to decode
    return request


def _listed(device_ids: Sequence[str]) -> str:
    more = len(device_ids) - MAX_NAMED
    return ", ".join(device_ids[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def _check_disjoint(requests: Iterable[Iterable[str]]) -> None:
    containers = Counter(vgpu for device_ids in requests for vgpu in set(device_ids))
    for vgpu, count in containers.items():
        if count > 1:
            raise InvalidRequestError(f"device {vgpu!r} is requested for two containers")


def _response(granted: Grant) -> ContainerAllocateResponse:
    return ContainerAllocateResponse(
        envs=dict(granted.environment),
        mounts=[
            Mount(
                container_path=each.container_path,
                host_path=each.host_path,
                read_only=each.read_only,
            )
            for each in granted.mounts
        ],
        cdi_devices=[CdiDevice(name=name) for name in granted.cdi_devices],
    )
