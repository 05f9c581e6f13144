"""Who holds which vGPU: asks the kubelet's PodResources API, and checks it by its checkpoint.

Nothing else depends on the answer: where there is none the state says why, what was known ages
out, and the kubelet is asked again.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Never

import anyio
from anyio import CapacityLimiter

from vgpu_agent.errors import KubeletError
from vgpu_agent.kubelet import wire
from vgpu_agent.kubelet._proto.v1 import ListPodResourcesRequest, PodResourcesListerStub
from vgpu_agent.kubelet.checkpoint import read_checkpoint
from vgpu_agent.kubelet.grpc import MAX_BYTES, back_off, call
from vgpu_agent.kubelet.wire import Fields
from vgpu_agent.model.holders import Assignment, Checked, Holder, Pod, cross_check
from vgpu_agent.model.node import Node
from vgpu_agent.model.snapshot import RegistrationResult, Snapshot
from vgpu_agent.threads import in_thread

SOCKET = Path("pod-resources", "kubelet.sock")
"""In the kubelet's directory."""


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
    _named: Mapping[str, Pod] = field(default_factory=dict)
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
        return back_off(self.timing.retry, self._retries, self.interval)

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
            return await in_thread(read, limiter=self._decoding, abandon_on_cancel=True)
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
    named: Mapping[str, Pod],
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


MAX_FIELDS = 2**18
"""Most fields of an answer that are looked at: 1600 vGPUs have 8000."""


def decode_list(answer: bytes, resource_name: str) -> list[Assignment]:
    """What each container holds of a resource, from a `ListPodResourcesResponse`.

    Raises KubeletError.
    """
    fields = Fields(MAX_FIELDS)
    try:
        return [
            Assignment(
                Holder(_last(pod[2]), _last(pod[1]), _last(container[1])),
                tuple(
                    wire.text(vgpu)
                    for devices in (fields.of(each, 1, 2) for each in container[2])
                    if devices[1][-1:] == [resource_name.encode()]
                    for vgpu in devices[2]
                ),
            )
            for pod in (fields.of(each, 1, 2, 3) for each in fields.of(answer, 1)[1])
            for container in (fields.of(each, 1, 2) for each in pod[3])
        ]
    except (ValueError, IndexError) as error:
        raise KubeletError(f"the kubelet's answer is garbage: {error!r}") from error


def _last(values: list[Any]) -> str:
    """A text, which is empty where it is absent."""
    return wire.text(values[-1]) if values else ""
