"""Who holds which vGPU: asks the kubelet's PodResources API, and checks it by its checkpoint.

Nothing else depends on the answer: where there is none the state says why, what was known ages
out, and the kubelet is asked again.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Never, cast

import anyio
import anyio.to_thread
from anyio import CapacityLimiter
from betterproto import WIRE_LEN_DELIM, encode_varint, parse_fields
from grpclib import GRPCError, Status
from grpclib.client import Channel
from grpclib.encoding.proto import ProtoCodec
from grpclib.exceptions import StreamTerminatedError
from grpclib.protocol import H2Protocol

from vgpu_agent.errors import PodResourcesError
from vgpu_agent.kubelet._proto.v1 import (
    ListPodResourcesRequest,
    PodResources,
    PodResourcesListerStub,
)
from vgpu_agent.kubelet.connection import Connection
from vgpu_agent.model.devices import Inventory
from vgpu_agent.model.holders import (
    Assignment,
    Checked,
    Holder,
    Recorded,
    cross_check,
    orphaned,
)
from vgpu_agent.model.state import NodeState, RegistrationResult, Snapshot

log = logging.getLogger(__name__)

SOCKET = Path("pod-resources", "kubelet.sock")
CHECKPOINT = Path("device-plugins", "kubelet_internal_checkpoint")
"""Where both are in the kubelet's directory."""

MAX_BYTES = 16 * 2**20
"""Most bytes of an answer, and of a checkpoint, that are read."""

GIVE_WAY = 0.0001
"""Seconds after each pod in which the event loop gets its turn: it would wait for it for 5 ms, more
than once in every call."""

NAMED = 8
"""So many orphaned vGPUs are named in a log line."""


@dataclass(frozen=True, slots=True)
class AskTiming:
    """How long a `PodResourcesWatch` waits and believes, in seconds.

    `list_timeout` is for a call of List, from the connection to the answer.

    The kubelet is asked `quiet` after the last occasion to ask, and `burst` after the first at
    most: it has to note first what an Allocate gave, and pods often come together.

    The first retry comes after `retry`; each takes twice as long as the one before.

    An answer is believed for `forget_intervals` intervals, and for `forget_at_least`.
    """

    list_timeout: float = 10.0
    quiet: float = 0.5
    burst: float = 2.0
    retry: float = 1.0
    forget_intervals: int = 5
    forget_at_least: float = 60.0


class _Connection(Connection):
    """A connection with a bound. What it stumbles over is kept from asyncio, which would log it."""

    trouble: str | None = None
    received = 0
    max_bytes = MAX_BYTES

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        if self.received > self.max_bytes:
            self._give_up(f"the kubelet's answer is larger than {self.max_bytes / 2**20:g} MiB")
            return
        try:
            super().data_received(data)
        except Exception as error:  # noqa: BLE001 - grpclib and h2 stumble in many ways
            self._give_up(f"the kubelet's answer is no gRPC: {error!r}")

    def _give_up(self, trouble: str) -> None:
        self.trouble = trouble
        self.abort()


class _BytesCodec(ProtoCodec):
    """Hands answers out as they came: betterproto is too slow for the event loop."""

    def decode(self, data: bytes, message_type: Any) -> Any:  # noqa: ARG002
        return data


class _Channel(Channel):
    """grpclib's channel for one call.

    After `abort`: why we had given its connection up, and whether it had ended already.
    """

    trouble: str | None = None
    ended = False

    def __init__(self, path: Path, max_bytes: int) -> None:
        super().__init__(path=str(path), codec=_BytesCodec())
        self._max_bytes = max_bytes
        self._connection: _Connection | None = None

    def _protocol_factory(self) -> H2Protocol:
        self._connection = _Connection.like(super()._protocol_factory())
        self._connection.max_bytes = self._max_bytes
        return self._connection

    def abort(self) -> None:
        """Leaves no connection behind."""
        if self._connection is not None:
            self.trouble = self._connection.trouble
            self.ended = self._connection.ended
            self._connection.abort()
        self.close()


@dataclass(frozen=True, slots=True)
class Reading:
    """What an answer comes to. `problem` says why the checkpoint is of no use; None: no word."""

    checked: Checked
    orphans: tuple[str, ...] = ()
    problem: str | None = None


@dataclass
class PodResourcesWatch:
    """Keeps the state told of who holds the vGPUs of `resource_name`. Times in seconds.

    `directory` is the kubelet's own; `interval` is how often it is asked without an occasion;
    `max_bytes` bounds an answer, and a checkpoint.
    """

    directory: Path
    resource_name: str
    state: NodeState
    interval: float
    clock: Callable[[], float] = time.monotonic
    timing: AskTiming = AskTiming()
    max_bytes: int = MAX_BYTES
    _answered: float | None = None
    _retries: int = 0
    _named: frozenset[str] = frozenset()
    _orphans: tuple[str, ...] = ()
    _problem: str | None = None
    _decoding: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(1))

    async def run(self) -> Never:
        """Runs until cancelled, which leaves no connection behind."""
        while True:
            occasions = _occasions(self.state.snapshot)
            try:
                reading = await self._ask()
            except PodResourcesError as error:
                self._failed(str(error))
                settled = False
            else:
                self._told(reading)
                settled = reading.checked.settled
            self._retries = 0 if settled else self._retries + 1
            await self._pause(occasions)

    # When

    async def _pause(self, occasions: int) -> None:
        """Waits until it is time to ask: at the latest after a retry's delay or the interval."""
        came = None
        with anyio.move_on_after(self._delay()):
            came = await self._occasion_after(occasions)
        if came is None:
            return
        self._retries = 0
        with anyio.move_on_after(self.timing.burst):
            quiet = False
            while not quiet:
                quiet = True
                with anyio.move_on_after(self.timing.quiet):
                    came = await self._occasion_after(came)
                    quiet = False

    def _delay(self) -> float:
        if not self._retries:
            return self.interval
        return min(self.interval, self.timing.retry * 2.0 ** min(self._retries - 1, 16))

    async def _occasion_after(self, occasions: int) -> int:
        """Waits until there were more occasions than so many; how many there were."""
        async for snapshot in self.state.latest.follow():
            if (now := _occasions(snapshot)) > occasions:
                return now
        await anyio.sleep_forever()  # nothing will happen any more
        raise AssertionError

    # The question

    async def _ask(self) -> Reading:
        """Raises PodResourcesError."""
        answer = await self._list()
        snapshot = self.state.snapshot
        return await anyio.to_thread.run_sync(
            partial(
                read_answer,
                answer,
                self.directory / CHECKPOINT,
                self.resource_name,
                self._named,
                # Before the driver's first word every vGPU would be orphaned.
                None if snapshot.driver.version is None else snapshot.inventory,
                self.max_bytes,
            ),
            limiter=self._decoding,
            abandon_on_cancel=True,
        )

    async def _list(self) -> bytes:
        """The encoded answer. Raises PodResourcesError."""
        path = self.directory / SOCKET
        outcome: list[bytes | PodResourcesError] = []

        async def call() -> None:
            try:
                outcome.append(await _call(path, self.max_bytes))
            except PodResourcesError as error:
                outcome.append(error)

        with anyio.move_on_after(self.timing.list_timeout):
            # In a task of its own: grpclib cancels the task of a call whose connection ends, which
            # must not be taken for our own end, nor for that of the time.
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(call)
        if not outcome:
            raise PodResourcesError(
                f"the kubelet did not answer List within {self.timing.list_timeout:g} s"
            )
        if isinstance(outcome[0], PodResourcesError):
            raise outcome[0]
        return outcome[0]

    # What becomes of it

    def _told(self, reading: Reading) -> None:
        self._answered = self.clock()
        self._named = reading.checked.named
        if not self.state.snapshot.holders.up:
            log.info("the kubelet says who holds which vGPU")
        self.state.holders_told(reading.checked.assignments)
        if reading.problem != self._problem:
            self._problem = reading.problem
            if reading.problem is None:
                log.info("the kubelet's checkpoint is of use again")
            else:
                log.warning(
                    "the kubelet's checkpoint is of no use, so List alone says who holds which"
                    " vGPU: %s",
                    reading.problem,
                )
        if reading.orphans != self._orphans:
            self._orphans = reading.orphans
            if reading.orphans:
                more = len(reading.orphans) - NAMED
                log.warning(
                    "%d vGPUs are held that the node no longer has: %s%s",
                    len(reading.orphans),
                    ", ".join(reading.orphans[:NAMED]),
                    f" and {more} more" if more > 0 else "",
                )
            else:
                log.info("no vGPU is held any more that the node does not have")

    def _failed(self, words: str) -> None:
        believed = max(self.timing.forget_at_least, self.timing.forget_intervals * self.interval)
        forget = self._answered is None or self.clock() - self._answered > believed
        before = self.state.snapshot.holders
        if not self.state.holders_failed(words, forget=forget):
            return
        if before.error != words:
            log.warning("cannot ask the kubelet who holds which vGPU: %s", words)
        if forget and before.assignments is not None:
            log.warning("forgetting who held which vGPU: it was told over %g s ago", believed)


def _occasions(snapshot: Snapshot) -> int:
    """How often there was something that makes the kubelet worth asking.

    After a registration it writes its checkpoint, rid of ended pods; and it may be a new kubelet.
    """
    return snapshot.allocates + snapshot.registrations.get(RegistrationResult.REGISTERED, 0)


async def _call(path: Path, max_bytes: int) -> bytes:
    """Calls List over a connection of its own, so that any kubelet will do.

    Raises PodResourcesError, and nothing else but cancellation.
    """
    channel = _Channel(path, max_bytes)
    try:
        try:
            answer = await PodResourcesListerStub(channel).list(ListPodResourcesRequest())
        finally:
            channel.abort()
    except Exception as error:  # grpclib and h2 stumble in many ways over a bad peer
        words = channel.trouble or _in_words(error, path, ended=channel.ended)
        raise PodResourcesError(words) from error
    return cast("bytes", answer)


def _in_words(error: Exception, path: Path, *, ended: bool) -> str:
    """The same words for the same trouble, which grpclib puts into several."""
    match error:
        case FileNotFoundError():
            return f"there is no {path}"
        case ConnectionRefusedError():
            return f"nobody listens on {path}"
        case OSError():
            return f"cannot connect to {path}: {error.strerror or error}"
        case GRPCError(status=Status.UNIMPLEMENTED):
            return "the kubelet does not serve PodResources v1"
        case GRPCError():
            return f"the kubelet refused with {error.status.name}: {error.message}"
        case StreamTerminatedError():
            return "the kubelet ended the call before its answer"
        case _ if ended:
            return "the kubelet ended the call before its answer"
        case _:
            return f"the kubelet's answer cannot be read: {error!r}"


# In a worker thread: values in, values out


def read_answer(
    answer: bytes,
    checkpoint: Path,
    resource_name: str,
    named: frozenset[str],
    inventory: Inventory | None,
    max_bytes: int,
) -> Reading:
    """Decodes an answer of List and checks it by the checkpoint, which is read here and so later.

    Without an inventory nothing is orphaned. Raises PodResourcesError where the answer is garbage.
    """
    listed = decode_list(answer, resource_name)
    problem = None
    try:
        recorded = read_checkpoint(checkpoint, resource_name, max_bytes)
    except PodResourcesError as error:
        recorded, problem = None, str(error)
    checked = cross_check(listed, recorded, named)
    orphans = () if inventory is None else orphaned(inventory, checked.assignments)
    return Reading(checked, orphans, problem)


def decode_list(answer: bytes, resource_name: str) -> list[Assignment]:
    """What each container holds of a resource, from a `ListPodResourcesResponse`.

    Raises PodResourcesError.
    """
    try:
        return [
            Assignment(
                Holder(_text(pod.namespace), _text(pod.name), _text(container.name)),
                tuple(
                    _text(vgpu)
                    for devices in container.devices
                    if devices.resource_name == resource_name
                    for vgpu in devices.device_ids
                ),
            )
            for pod in _pods(answer, resource_name)
            for container in pod.containers
        ]
    except Exception as error:  # betterproto raises whatever its parser stumbles on
        raise PodResourcesError(f"the kubelet's answer is garbage: {error!r}") from error


def _pods(answer: bytes, resource_name: str) -> Iterator[PodResources]:
    """The pods; those that do not name the resource are not decoded, which is slow.

    Raises ValueError where betterproto would take what it can get.
    """
    for part in parse_fields(answer):
        if part.number == 0 or part.value is None:
            raise ValueError("no protobuf")
        if part.wire_type == WIRE_LEN_DELIM:
            tag = encode_varint(part.number << 3 | part.wire_type)
            if part.raw != tag + encode_varint(len(part.value)) + part.value:
                raise ValueError("it breaks off")
        if part.number == 1 and resource_name.encode() in part.value:
            yield PodResources().parse(part.value)
            time.sleep(GIVE_WAY)


def _text(value: object) -> str:
    """Raises TypeError: betterproto keeps a value whose wire type is not that of its field."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def read_checkpoint(
    path: Path, resource_name: str, max_bytes: int = MAX_BYTES
) -> list[Recorded] | None:
    """What the kubelet's checkpoint has of a resource; None where there is no checkpoint.

    Raises PodResourcesError where it cannot be read or understood.
    """
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PodResourcesError(f"cannot read {path}: {error.strerror or error}") from error
    if len(content) > max_bytes:
        raise PodResourcesError(f"{path} is larger than {max_bytes / 2**20:g} MiB")
    try:
        return [
            Recorded(
                _text(entry["PodUID"]),
                _text(entry["ContainerName"]),
                tuple(_text(vgpu) for vgpu in _device_ids(entry["DeviceIDs"])),
            )
            for entry in json.loads(content)["Data"]["PodDeviceEntries"] or ()
            if entry["ResourceName"] == resource_name
        ]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise PodResourcesError(f"{path} is no checkpoint: {error!r}") from error


def _device_ids(told: Any) -> list[Any]:
    """The IDs, by NUMA node as kubelets write them, or in a plain list as those before 1.20 did."""
    if isinstance(told, dict):
        return [vgpu for ids in told.values() for vgpu in ids or ()]
    return told or []
