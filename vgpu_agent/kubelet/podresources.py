"""Who holds which vGPU: asks the kubelet's PodResources API, and checks it by its checkpoint.

Nothing else depends on the answer: where there is none the state says why, what was known ages
out, and the kubelet is asked again.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Never

import anyio
import anyio.to_thread
from anyio import CapacityLimiter

from vgpu_agent import store
from vgpu_agent.errors import KubeletError, StoreError
from vgpu_agent.kubelet._proto.v1 import ListPodResourcesRequest, PodResourcesListerStub
from vgpu_agent.kubelet.grpc import MAX_BYTES, call
from vgpu_agent.model.holders import Assignment, Checked, Holder, Recorded, cross_check
from vgpu_agent.model.node import Node
from vgpu_agent.model.snapshot import RegistrationResult, Snapshot

SOCKET = Path("pod-resources", "kubelet.sock")
"""In the kubelet's directory."""
CHECKPOINT = "kubelet_internal_checkpoint"
"""In the directory of device plugins, which `--root-dir` does not move."""


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


@dataclass(frozen=True, slots=True)
class Reading:
    """What an answer comes to. `problem` says why the checkpoint is of no use; None: no word."""

    checked: Checked
    problem: str | None = None


@dataclass
class PodResourcesWatch:
    """Keeps the node up to date on who holds the vGPUs of `resource_name`. Times in seconds.

    `socket` is that of PodResources, `checkpoint` the file; `interval` is how often the kubelet is
    asked without an occasion; `max_bytes` bounds an answer, and a checkpoint.
    """

    socket: Path
    checkpoint: Path
    resource_name: str
    node: Node
    interval: float
    clock: Callable[[], float] = time.monotonic
    timing: AskTiming = AskTiming()
    max_bytes: int = MAX_BYTES
    _answered: float | None = None
    _retries: int = 0
    _named: frozenset[str] = frozenset()
    _decoding: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(1))

    async def run(self) -> Never:
        """Runs until cancelled, which leaves no connection behind."""
        while True:
            occasions = _occasions(self.node.snapshot)
            try:
                reading = await self._ask()
            except KubeletError as error:
                self._failed(str(error))
                settled = False
            else:
                self._answered_with(reading)
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
        return _occasions(await self.node.latest.until(lambda now: _occasions(now) > occasions))

    # The question

    async def _ask(self) -> Reading:
        """Raises KubeletError."""
        within = self.timing.list_timeout
        answer = await call(
            self.socket,
            "List of PodResources v1",
            lambda channel: PodResourcesListerStub(channel).list(ListPodResourcesRequest()),
            within=within,
            max_bytes=self.max_bytes,
        )
        read = partial(
            read_answer, answer, self.checkpoint, self.resource_name, self._named, self.max_bytes
        )
        with anyio.move_on_after(within):
            return await anyio.to_thread.run_sync(
                read, limiter=self._decoding, abandon_on_cancel=True
            )
        raise KubeletError(f"the kubelet's checkpoint could not be read within {within:g} s")

    # What becomes of it

    def _answered_with(self, reading: Reading) -> None:
        self._answered = self.clock()
        self._named = reading.checked.named
        self.node.set_assignments(reading.checked.assignments, reading.problem)

    def _failed(self, words: str) -> None:
        believed = max(self.timing.forget_at_least, self.timing.forget_intervals * self.interval)
        forget = self._answered is None or self.clock() - self._answered > believed
        self.node.assignments_failed(words, forget=forget)


def _occasions(snapshot: Snapshot) -> int:
    """How often there was something that makes the kubelet worth asking.

    After a registration it writes its checkpoint, rid of ended pods; and it may be a new kubelet.
    """
    return snapshot.allocates + snapshot.registrations.get(RegistrationResult.REGISTERED, 0)


# In a worker thread: values in, values out


def read_answer(
    answer: bytes,
    checkpoint: Path,
    resource_name: str,
    named: frozenset[str],
    max_bytes: int = MAX_BYTES,
) -> Reading:
    """Decodes an answer of List and checks it by the checkpoint, which is read here and so later.

    Raises KubeletError where the answer is garbage.
    """
    listed = decode_list(answer, resource_name)
    try:
        recorded = read_checkpoint(checkpoint, resource_name, max_bytes)
    except KubeletError as error:
        return Reading(cross_check(listed, None, named), str(error))
    return Reading(cross_check(listed, recorded, named))


def decode_list(answer: bytes, resource_name: str) -> list[Assignment]:
    """What each container holds of a resource, from a `ListPodResourcesResponse`.

    Raises KubeletError.
    """
    try:
        return [
            Assignment(
                Holder(_last(pod, 2), _last(pod, 1), _last(container, 1)),
                tuple(
                    vgpu.decode()
                    for devices in map(_fields, container[2])
                    if _last(devices, 1) == resource_name
                    for vgpu in devices[2]
                ),
            )
            for pod in map(_fields, _fields(answer)[1])
            for container in map(_fields, pod[3])
        ]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise KubeletError(f"the kubelet's answer is garbage: {error!r}") from error


def _fields(message: bytes) -> defaultdict[int, list[Any]]:
    """The fields of an encoded message by number: numbers, and bytes of texts and messages.

    betterproto takes 0.1 ms for a vGPU, which is 35 times as long. Raises ValueError, and
    IndexError where it breaks off.
    """
    found = defaultdict(list)
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        value: int | bytes
        match tag & 7:
            case 0:
                value, at = _varint(message, at)
            case 1 | 5 as fixed:
                value, at = b"", at + (8 if fixed == 1 else 4)
            case 2:
                length, at = _varint(message, at)
                value, at = message[at : at + length], at + length
            case other:
                raise ValueError(f"wire type {other}")
        found[tag >> 3].append(value)
    if at > len(message) or 0 in found:
        raise ValueError("it breaks off, or is no protobuf")
    return found


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The number that begins there, and where it ends."""
    number = 0
    for shift in range(0, 64, 7):
        byte = message[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
    raise ValueError("a number is too long")


def _last(fields: defaultdict[int, list[Any]], number: int) -> str:
    """A text, which is empty where it is absent."""
    return fields[number][-1].decode() if fields[number] else ""


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def read_checkpoint(
    path: Path, resource_name: str, max_bytes: int = MAX_BYTES
) -> list[Recorded] | None:
    """What the kubelet's checkpoint has of a resource; None where there is no checkpoint.

    Raises KubeletError where it cannot be read or understood.
    """
    try:
        content = store.read_bytes(path, max_bytes)
    except StoreError as error:
        raise KubeletError(str(error)) from error
    if content is None:
        return None
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
        raise KubeletError(f"{path} is no checkpoint: {error!r}") from error


def _device_ids(found: Any) -> list[Any]:
    """The IDs, by NUMA node as kubelets write them, or in a plain list as those before 1.20 did."""
    if isinstance(found, dict):
        return [vgpu for ids in found.values() for vgpu in ids or ()]
    return found or []
