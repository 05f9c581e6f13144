"""Messages of the device plugin API as bytes: requests read strictly, and lists encoded once."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from betterproto import Message
from grpclib import GRPCError, Status
from grpclib.encoding.proto import ProtoCodec

from vgpu_agent.kubelet import wire
from vgpu_agent.kubelet._proto.v1beta1 import (
    AllocateRequest,
    AllocateResponse,
    ContainerAllocateRequest,
    ContainerPreferredAllocationRequest,
    Device,
    Empty,
    NumaNode,
    PreferredAllocationRequest,
    PreferredAllocationResponse,
    PreStartContainerRequest,
    TopologyInfo,
)
from vgpu_agent.kubelet.wire import Fields
from vgpu_agent.model.devices import Inventory, device_id
from vgpu_agent.threads import in_thread

HEALTHY = "Healthy"
UNHEALTHY = "Unhealthy"


MAX_CONTAINERS = 64
"""Most containers of a request; a kubelet asks for one at a time."""
MAX_FIELDS = 20_000
"""Most fields of a request, which take 20 ms: 16 GPUs with 1024 vGPUs each have 16,384 IDs."""


class WireCodec(ProtoCodec):
    """grpclib's codec. Bytes are encoded already; undecodable ones are the caller's mistake."""

    def encode(self, message: Any, message_type: Any) -> bytes:
        """Its bytes."""
        if isinstance(message, bytes):
            return message
        encode = _ENCODERS.get(type(message))
        return encode(message) if encode else super().encode(message, message_type)

    def decode(self, data: bytes, message_type: Any) -> Any:
        """A request. Raises GRPCError INVALID_ARGUMENT."""
        try:
            return _DECODERS[message_type](data, Fields(MAX_FIELDS))
        except (ValueError, IndexError) as error:
            raise GRPCError(
                Status.INVALID_ARGUMENT, f"cannot decode {message_type.__name__}: {error}"
            ) from error


def _containers(data: bytes, fields: Fields) -> list[bytes]:
    found = fields.of(data, 1)[1]
    if len(found) > MAX_CONTAINERS:
        raise ValueError(f"it has {len(found)} containers; {MAX_CONTAINERS} are allowed")
    return found


def _texts(data: bytes, fields: Fields) -> list[str]:
    return [wire.text(each) for each in fields.of(data, 1)[1]]


def _empty(data: bytes, fields: Fields) -> Empty:
    fields.of(data)
    return Empty()


def _allocate(data: bytes, fields: Fields) -> AllocateRequest:
    return AllocateRequest(
        container_requests=[
            ContainerAllocateRequest(devices_ids=_texts(each, fields))
            for each in _containers(data, fields)
        ]
    )


def _preferred(data: bytes, fields: Fields) -> PreferredAllocationRequest:
    return PreferredAllocationRequest(
        container_requests=[
            ContainerPreferredAllocationRequest(
                available_device_i_ds=[wire.text(vgpu) for vgpu in found[1]],
                must_include_device_i_ds=[wire.text(vgpu) for vgpu in found[2]],
                allocation_size=wire.int32(found[3][-1]) if found[3] else 0,
            )
            for found in (fields.of(each, 1, 2, number=3) for each in _containers(data, fields))
        ]
    )


def _start(data: bytes, fields: Fields) -> PreStartContainerRequest:
    return PreStartContainerRequest(devices_ids=_texts(data, fields))


_DECODERS: Mapping[type[Message], Callable[[bytes, Fields], Message]] = {
    Empty: _empty,
    AllocateRequest: _allocate,
    PreferredAllocationRequest: _preferred,
    PreStartContainerRequest: _start,
}


def _granted(answer: AllocateResponse) -> bytes:
    """Betterproto takes 0.2 ms for it, a third of all that the agent does for a container.

    Device nodes and annotations are never granted.
    """
    return b"".join(
        wire.field(
            1,
            b"".join(
                (
                    *(
                        wire.field(1, wire.texts({1: name, 2: value}))
                        for name, value in each.envs.items()
                    ),
                    *(
                        wire.field(2, wire.texts({1: m.container_path, 2: m.host_path}))
                        if not m.read_only
                        else wire.field(2, bytes(m))
                        for m in each.mounts
                    ),
                    *(wire.field(5, wire.texts({1: cdi.name})) for cdi in each.cdi_devices),
                )
            ),
        )
        for each in answer.container_responses
    )


def _advised(answer: PreferredAllocationResponse) -> bytes:
    return b"".join(
        wire.field(1, b"".join(wire.field(1, vgpu.encode()) for vgpu in each.device_i_ds))
        for each in answer.container_responses
    )


_ENCODERS: Mapping[type[Message], Callable[[Any], bytes]] = {
    AllocateResponse: _granted,
    PreferredAllocationResponse: _advised,
}
"""Answers that pods wait for. The others are small."""


_Listed = tuple[str, int, int | None]
"""What the vGPUs of a GPU are listed by: its UUID, their number, its NUMA node."""

_DEVICES, _ID = 1, 1
"""The numbers of `ListAndWatchResponse.devices` and `Device.ID`."""


class ListEncoder:
    """Encodes device lists GPU by GPU, each GPU once. Owns that cache.

    Serialised messages with repeated fields concatenate, so a list is the joined lists of its GPUs.
    """

    def __init__(self) -> None:
        self._encoded: dict[_Listed, Mapping[bool, bytes]] = {}

    async def encode(self, inventory: Inventory) -> bytes:
        """The list, encoded off the loop where GPUs are new and from the cache otherwise."""
        wanted = [(each.gpu.uuid, each.replicas, each.gpu.numa_node) for each in inventory.gpus]
        missing = [key for key in wanted if key not in self._encoded]
        if missing:
            fresh = await in_thread(_encode, missing)
            known = self._encoded | fresh
            self._encoded = {key: known[key] for key in wanted}
        gpus = zip(wanted, inventory.gpus, strict=True)
        return b"".join(self._encoded[key][shared.healthy] for key, shared in gpus)


def _encode(gpus: Iterable[_Listed]) -> dict[_Listed, Mapping[bool, bytes]]:
    """The lists of these GPUs, by health: a fault has no time to wait for an encoder."""
    return {gpu: {healthy: _list_of_one(gpu, healthy) for healthy in (True, False)} for gpu in gpus}


def _list_of_one(gpu: _Listed, healthy: bool) -> bytes:
    """The list of a GPU, whose vGPUs differ in their IDs alone.

    betterproto takes 0.1 ms for a vGPU, so it encodes only what they have in common.
    """
    uuid, replicas, numa_node = gpu
    device = Device(health=HEALTHY if healthy else UNHEALTHY)
    if numa_node is not None:
        device.topology = TopologyInfo(nodes=[NumaNode(id=numa_node)])
    common = bytes(device)
    ids = (device_id(uuid, number).encode() for number in range(replicas))
    return b"".join(wire.field(_DEVICES, wire.field(_ID, each) + common) for each in ids)
