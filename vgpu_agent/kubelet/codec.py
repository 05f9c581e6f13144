"""Messages of the device plugin API as bytes: what is decoded strictly, and lists encoded once."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import anyio.to_thread
from betterproto import Message
from grpclib import GRPCError, Status
from grpclib.encoding.proto import ProtoCodec

from vgpu_agent.kubelet._proto.v1beta1 import Device, ListAndWatchResponse, NumaNode, TopologyInfo
from vgpu_agent.model.devices import Inventory, device_id

HEALTHY = "Healthy"
UNHEALTHY = "Unhealthy"


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
