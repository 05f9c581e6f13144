"""The one owner of what the node knows.

Facts come in through plain methods, called on the event loop only; where it matters they return
whether anything changed. What goes out is a frozen snapshot; watchers wait for a newer one. Nothing
here awaits while it changes something, so there is no lock and no torn view.
"""

import asyncio
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Generic, Self, TypeVar

from vgpu_agent.model.devices import Card, Excluded, Fault, Gpu, Inventory, Reason
from vgpu_agent.model.holders import Assignment, Holders, Usage
from vgpu_agent.model.share import Divided, Division, MpsLimits, divide

T = TypeVar("T")


class Latest(Generic[T]):
    """A value that any number of watchers follow; the latest one wins.

    A slow watcher skips to the newest value, no queue grows, and as long as it is not closed the
    final value is never lost.
    """

    def __init__(self, value: T) -> None:
        self._value = value
        self._version = 0
        self._closed = False
        self._changed = asyncio.Event()

    @property
    def value(self) -> T:
        """The newest value."""
        return self._value

    @property
    def version(self) -> int:
        """How many values were published: pass it to `newer_than`."""
        return self._version

    @property
    def closed(self) -> bool:
        """Whether no newer value will come."""
        return self._closed

    def publish(self, value: T) -> None:
        """Makes `value` the newest and wakes every watcher."""
        self._value = value
        self._version += 1
        self._wake()

    def close(self) -> None:
        """Ends every watcher; what was published last stays readable."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def newer_than(self, version: int) -> int | None:
        """Waits for a value newer than `version`; its version, or None when there will be none."""
        while self._version <= version and not self._closed:
            await self._changed.wait()
        return None if self._closed else self._version

    def follow(self, version: int = -1) -> "Follower[T]":
        """Iterates over the values newer than `version`, the current one at once, until closed."""
        return Follower(self, version)


class Follower(Generic[T]):
    """An iterator over the values of a Latest. A class, since it holds nothing to clean up."""

    def __init__(self, latest: Latest[T], version: int) -> None:
        self._latest = latest
        self._version = version

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        version = await self._latest.newer_than(self._version)
        if version is None:
            raise StopAsyncIteration
        self._version = version
        return self._latest.value


class RegistrationResult(StrEnum):
    """How an attempt to register with the kubelet ended."""

    REGISTERED = "registered"
    REFUSED = "refused"
    UNREACHABLE = "unreachable"
    NO_STREAM = "no-stream"
    ENDPOINT = "endpoint"


@dataclass(frozen=True, slots=True)
class Driver:
    """The source of GPUs: its version, or why it cannot be asked.

    `released_until`: all cards are let go of for a reset until then, in seconds since the epoch.
    """

    version: str | None = None
    error: str | None = "not asked yet"
    released_until: float | None = None

    @property
    def up(self) -> bool:
        """Whether the driver answered when it was last asked."""
        return self.error is None


@dataclass(frozen=True, slots=True)
class Kubelet:
    """The session with the kubelet. `streams` counts the ListAndWatch streams open now."""

    registered: bool = False
    streams: int = 0
    error: str | None = None

    @property
    def connected(self) -> bool:
        """Whether the kubelet is registered with and follows the device list."""
        return self.registered and self.streams > 0


@dataclass(frozen=True, slots=True)
class Mps:
    """What is known of the MPS daemon of the node, where cards are shared by MPS.

    `problem` says why no vGPU can be given, None where all is well; `replacement` why the MPS pod
    has to be replaced, though it serves. `limits` is what the daemon was set up for. `clients`
    counts clients by the UUID of their card, `waiting` those of another user that wait for their
    turn, and `server_bytes` what its server was measured to have of a card.
    """

    wanted: bool = False
    up: bool = False
    limits_in_force: bool = False
    limits: MpsLimits | None = None
    problem: str | None = None
    replacement: str | None = None
    clients: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    waiting: int = 0
    server_bytes: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))


XidKey = tuple[str | None, int]
TransitionKey = tuple[str, str, Reason]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that is known of the node at one moment.

    `memory_used` is in bytes by the UUID of the card. `usage` is None where processes are not
    looked at. `allocates` counts the calls of Allocate that were answered.
    """

    inventory: Inventory = Inventory()
    excluded: tuple[Excluded, ...] = ()
    driver: Driver = Driver()
    mps: Mps = field(default_factory=Mps)
    kubelet: Kubelet = Kubelet()
    xids: Mapping[XidKey, int] = field(default_factory=lambda: MappingProxyType({}))
    transitions: Mapping[TransitionKey, int] = field(default_factory=lambda: MappingProxyType({}))
    registrations: Mapping[RegistrationResult, int] = field(
        default_factory=lambda: MappingProxyType({})
    )
    lists_sent: int = 0
    allocates: int = 0
    holders: Holders = Holders()
    usage: Usage | None = None
    memory_used: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))


class NodeState:
    """The only mutable thing of the model. `division` says how cards become vGPUs."""

    def __init__(self, division: Division) -> None:
        self._division = division
        self._applied: Mapping[str, int] = {}
        self._node_faults: dict[Reason, Fault] = {}
        self._untold: Fault | None = None
        self.latest = Latest(Snapshot())

    @property
    def snapshot(self) -> Snapshot:
        """What is known now."""
        return self.latest.value

    def _become(self, snapshot: Snapshot) -> bool:
        if snapshot == self.snapshot:
            return False
        self.latest.publish(snapshot)
        return True

    # Cards

    def driver_answered(
        self, version: str, gpus: Iterable[Gpu], excluded: Iterable[Excluded] = ()
    ) -> bool:
        """The driver told all cards that it sees; one that it no longer names stays."""
        known = {card.gpu.uuid: card for card in self.snapshot.inventory.cards}
        left_out = list(excluded)
        for gpu in gpus:
            before = known.get(gpu.uuid)
            divided = self._divided(gpu)
            if isinstance(divided, Excluded):
                left_out.append(divided)
                known.pop(gpu.uuid, None)
            elif before is None:
                faults = self._mps_faults(gpu.uuid)
                notes = () if divided.note is None else (divided.note,)
                known[gpu.uuid] = Card(
                    gpu,
                    divided.replicas,
                    faults,
                    vgpu_bytes=divided.vgpu_bytes,
                    server_bytes=self._server_bytes(gpu.uuid),
                    notes=notes,
                )
            else:
                known[gpu.uuid] = replace(before, gpu=gpu, replicas=divided.replicas)
        for left in excluded:
            known.pop(left.gpu.uuid, None)  # it is there, and no longer ours
        cards = sorted(known.values(), key=lambda card: (card.gpu.index, card.gpu.uuid))
        return self._become(
            replace(
                self.snapshot,
                driver=Driver(version, None),
                inventory=Inventory(tuple(cards)),
                excluded=tuple(left_out),
            )
        )

    def _divided(self, gpu: Gpu) -> Divided | Excluded:
        """As the settings say, except that the MPS daemon's word holds until it is replaced."""
        divided = divide(gpu, self._division)
        applied = self._applied.get(gpu.uuid)
        if applied is None or isinstance(divided, Excluded):
            return divided
        return replace(divided, replicas=applied)

    def _server_bytes(self, uuid: str) -> int | None:
        return self.snapshot.mps.server_bytes.get(uuid) if self._division.measured else None

    def driver_failed(self, error: str) -> bool:
        """The driver cannot be asked."""
        return self._become(
            replace(self.snapshot, driver=Driver(self.snapshot.driver.version, error))
        )

    def driver_released(self, until: float) -> None:
        """The agent let go of all cards until then, in seconds since the epoch."""
        self._become(
            replace(
                self.snapshot,
                driver=replace(
                    self.snapshot.driver, error="released for a reset", released_until=until
                ),
            )
        )

    def card_forgotten(self, uuid: str) -> None:
        """A card is no longer listed: lost for too long, or left out from now on."""
        left = tuple(card for card in self.snapshot.inventory.cards if card.gpu.uuid != uuid)
        self._become(replace(self.snapshot, inventory=Inventory(left)))

    def card_noted(self, uuid: str, notes: tuple[str, ...], recovery_wait: float) -> bool:
        """What is to be told of a card, and for how long it has to prove itself good."""
        card = self.snapshot.inventory.find(uuid)
        if card is None:
            return False
        divided = self._divided(card.gpu)
        if isinstance(divided, Divided) and divided.note is not None:
            notes = (divided.note, *notes)
        if (card.notes, card.recovery_wait) == (notes, recovery_wait):
            return False
        self._replace_cards({uuid: replace(card, notes=notes, recovery_wait=recovery_wait)})
        return True

    def fault_found(self, uuids: Collection[str] | None, fault: Fault) -> tuple[str, ...]:
        """A fault of those cards, or of all cards where `uuids` is None.

        A reason that a card has already keeps its time; it only becomes stricter. Returns the
        UUIDs of the cards for which this was news.
        """
        changed = {}
        for card in self.snapshot.inventory.cards:
            if uuids is not None and card.gpu.uuid not in uuids:
                continue
            faults = _with_fault(card.faults, fault)
            if faults != card.faults:
                changed[card.gpu.uuid] = replace(card, faults=faults)
        self._replace_cards(changed)
        return tuple(changed)

    def faults_cleared(self, uuid: str, reasons: Collection[Reason]) -> bool:
        """Those reasons no longer hold for the card; the others stay."""
        card = self.snapshot.inventory.find(uuid)
        if card is None:
            return False
        faults = tuple(fault for fault in card.faults if fault.reason not in reasons)
        if faults == card.faults:
            return False
        self._replace_cards({uuid: replace(card, faults=faults)})
        return True

    def _mps_faults(self, uuid: str) -> tuple[Fault, ...]:
        """What the MPS daemon's watch says of a card."""
        faults = tuple(self._node_faults.values())
        untold = self._untold
        if untold is None or not self._applied or uuid in self._applied:
            return faults
        return faults if untold.reason in self._node_faults else (*faults, untold)

    def mps_seen(
        self,
        mps: Mps,
        faults: Collection[Fault],
        applied: Mapping[str, int],
        untold: Fault | None = None,
    ) -> bool:
        """The MPS daemon was looked at: `faults` are of all cards, also of those to come.

        `applied` is the number of vGPUs, by UUID, that it was told; where it differs from the
        settings it holds, and a card that is not in it has the fault `untold`.
        """
        changed = self._become(replace(self.snapshot, mps=mps))
        if applied != self._applied:
            self._applied = dict(applied)
            cards = {
                card.gpu.uuid: replace(card, replicas=divided.replicas)
                for card in self.snapshot.inventory.cards
                if isinstance(divided := self._divided(card.gpu), Divided)
                and divided.replicas != card.replicas
            }
            self._replace_cards(cards)
        before = self._node_faults
        self._node_faults = {
            # The newest words, and the time of the first.
            each.reason: replace(each, since=before[each.reason].since)
            if each.reason in before
            else each
            for each in faults
        }
        if untold is None or self._untold is None:
            self._untold = untold  # with the time of the first
        cards = {}
        of_mps = {Reason.MPS, Reason.MPS_FAULT}
        for card in self.snapshot.inventory.cards:
            own = [each for each in card.faults if each.reason not in of_mps]
            left = (*own, *self._mps_faults(card.gpu.uuid))
            fresh = replace(card, faults=left, server_bytes=self._server_bytes(card.gpu.uuid))
            if fresh != card:
                cards[card.gpu.uuid] = fresh
        self._replace_cards(cards)
        return changed

    def _replace_cards(self, changed: Mapping[str, Card]) -> None:
        if not changed:
            return
        transitions = dict(self.snapshot.transitions)
        cards = []
        for before in self.snapshot.inventory.cards:
            card = changed.get(before.gpu.uuid, before)
            if card.healthy != before.healthy:
                to = "healthy" if card.healthy else "unhealthy"
                reason = (before.faults or card.faults)[0].reason
                key = (card.gpu.uuid, to, reason)
                transitions[key] = transitions.get(key, 0) + 1
            cards.append(card)
        self._become(
            replace(
                self.snapshot,
                inventory=Inventory(tuple(cards)),
                transitions=MappingProxyType(transitions),
            )
        )

    def xid_seen(self, uuid: str | None, xid: int) -> None:
        """The driver reported an XID; `uuid` is None where it could not tell the card."""
        self._become(replace(self.snapshot, xids=_counted(self.snapshot.xids, (uuid, xid))))

    def memory_used(self, used: Mapping[str, int]) -> bool:
        """The memory in use of each card that tells it, in bytes by UUID."""
        return self._become(replace(self.snapshot, memory_used=MappingProxyType(dict(used))))

    # Who holds what

    def allocated(self) -> None:
        """The kubelet was told what a container gets."""
        self._become(replace(self.snapshot, allocates=self.snapshot.allocates + 1))

    def holders_told(self, assignments: tuple[Assignment, ...]) -> bool:
        """The kubelet said who holds our vGPUs."""
        return self._become(replace(self.snapshot, holders=Holders(None, assignments)))

    def holders_failed(self, error: str, *, forget: bool) -> bool:
        """The kubelet did not say; `forget`: what it said last is too old to be believed."""
        assignments = None if forget else self.snapshot.holders.assignments
        return self._become(replace(self.snapshot, holders=Holders(error, assignments)))

    def usage_told(self, usage: Usage) -> bool:
        """The processes on the cards were looked at."""
        return self._become(replace(self.snapshot, usage=usage))

    # Kubelet

    def registration_tried(self, result: RegistrationResult, error: str | None = None) -> None:
        """An attempt to register ended so."""
        snapshot = self.snapshot
        self._become(
            replace(
                snapshot,
                registrations=_counted(snapshot.registrations, result),
                kubelet=replace(
                    snapshot.kubelet,
                    registered=result is RegistrationResult.REGISTERED,
                    error=error,
                ),
            )
        )

    def registration_ended(self, error: str | None) -> bool:
        """The kubelet no longer knows us."""
        return self._become(
            replace(
                self.snapshot,
                kubelet=replace(self.snapshot.kubelet, registered=False, error=error),
            )
        )

    def stream_opened(self) -> None:
        """The kubelet opened a ListAndWatch stream."""
        self._streams(+1)

    def stream_ended(self) -> None:
        """A ListAndWatch stream ended."""
        self._streams(-1)

    def _streams(self, change: int) -> None:
        kubelet = self.snapshot.kubelet
        self._become(
            replace(self.snapshot, kubelet=replace(kubelet, streams=kubelet.streams + change))
        )

    def list_sent(self) -> None:
        """A device list went out on a stream."""
        self._become(replace(self.snapshot, lists_sent=self.snapshot.lists_sent + 1))


K = TypeVar("K")


def _counted(counts: Mapping[K, int], key: K) -> Mapping[K, int]:
    return MappingProxyType({**counts, key: counts.get(key, 0) + 1})


def _with_fault(faults: tuple[Fault, ...], fault: Fault) -> tuple[Fault, ...]:
    known = next((known for known in faults if known.reason is fault.reason), None)
    if known is None:
        return (*faults, fault)
    if fault.until_reset and not known.until_reset:
        stricter = replace(fault, since=known.since)
        return tuple(stricter if each is known else each for each in faults)
    return faults
