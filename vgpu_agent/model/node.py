"""The node: the one owner of what its edges report.

Each input is replaced as a whole by a plain method, called on the event loop only; the snapshot is
composed again of all of them. Nothing here awaits, so there is no lock and no torn view.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TypeVar

from vgpu_agent.model.devices import Gpu, Reason, flips
from vgpu_agent.model.facts import Cordon, GpuEvent, MpsLook, Scan, XidEvent
from vgpu_agent.model.health import (
    Away,
    GpuHealth,
    HealthEvent,
    Moment,
    Probed,
    Unwatched,
    XidSeen,
    advance,
)
from vgpu_agent.model.holders import Assignment, Holders, Usage
from vgpu_agent.model.latest import Latest
from vgpu_agent.model.limits import LimitsLook
from vgpu_agent.model.policy import limits_findings, mps_findings
from vgpu_agent.model.snapshot import (
    Driver,
    FirstSeen,
    Inputs,
    RegistrationResult,
    Rules,
    Snapshot,
    compose,
)

K = TypeVar("K")

MAX_UNLISTED = 256
"""Most GPUs whose health is kept; no node has as many, and nothing grows without a bound."""


Publication = Callable[[Snapshot, Snapshot], None]
"""Is called with the snapshots before and after each change, none left out."""


class Node:
    """The only mutable thing of the model.

    `clock` says what time it is. `published` is called on each change.
    """

    def __init__(
        self,
        rules: Rules,
        *,
        clock: Callable[[], Moment],
        published: Publication = lambda _before, _after: None,
    ) -> None:
        self.rules = rules
        self._clock = clock
        self._published = published
        self._inputs = Inputs()
        self.latest = Latest(compose(self._inputs, rules))

    @property
    def snapshot(self) -> Snapshot:
        """What is known now."""
        return self.latest.value

    def _update(self, **inputs: object) -> None:
        frozen = {
            name: MappingProxyType(each) if isinstance(each, dict) else each
            for name, each in inputs.items()
        }
        changed = replace(self._inputs, **frozen)  # type: ignore[arg-type]  # by their names
        if changed == self._inputs:
            return
        before = self.snapshot
        after = compose(changed, self.rules, before)
        transitions = changed.transitions
        if after.inventory is not before.inventory:
            for shared, reason in flips(before.inventory, after.inventory):
                to = "healthy" if shared.healthy else "unhealthy"
                transitions = counted(transitions, (shared.gpu.uuid, to, reason))
        if transitions is not changed.transitions:
            changed = replace(changed, transitions=MappingProxyType({**transitions}))
            after = compose(changed, self.rules, after)
        self._inputs = changed
        self.latest.publish(after)
        self._published(before, after)

    # The driver

    def driver_looked(
        self,
        driver: Driver,
        scan: Scan | None,
        events: Mapping[str, Sequence[HealthEvent]],
        *,
        cdi_names: frozenset[str] | None = None,
    ) -> None:
        """A look at the GPUs: all that was found, as one change.

        `scan` is None where the driver did not say which GPUs there are. `events` are by UUID, in
        the order in which they happened.
        """
        known = self._inputs
        read = [
            (uuid, event.reading)
            for uuid, each in events.items()
            for event in each
            if isinstance(event, Probed)
        ]
        used = {u: each.memory_used_bytes for u, each in read if each.memory_used_bytes is not None}
        missing = {uuid: each.missing for uuid, each in read if each.missing}
        changed: dict[str, object] = {
            "driver": self._since(driver),
            "memory_used": used,
            "missing": missing,
            "cdi_names": cdi_names,
        }
        all_events = {uuid: list(each) for uuid, each in events.items()}
        gpus = known.gpus
        if scan is not None:
            gpus = {**gpus, **{gpu.uuid: gpu for gpu in scan.gpus}}
            there = {each.uuid for each in (*scan.gpus, *(e.gpu for e in scan.undescribed))} - {""}
            changed["present"] = frozenset(there)
            changed["undescribed"] = (*scan.undescribed, *scan.lost)
            changed["first_seen"] = _first_seen(known.first_seen, scan.gpus)
            if self.rules.health.health_checks:
                away = known.gpus.keys() - there
                if all(each.gpu.uuid for each in scan.undescribed):
                    # One that does not say which it is may be one that was known before the start.
                    away |= known.health.keys() - there
                for uuid in away:
                    all_events.setdefault(uuid, []).append(Away())
        health = self._advanced(all_events)
        if scan is not None:
            gone = {uuid for uuid, each in health.items() if each.expired and uuid not in there}
            gpus = {uuid: gpu for uuid, gpu in gpus.items() if uuid not in gone}
            health = {
                uuid: each
                for uuid, each in health.items()
                if uuid not in gone or each.waits_for_reset
            }
            changed["gpus"] = gpus
        self._update(**changed, health=health)

    def _since(self, driver: Driver) -> Driver:
        """With the time since which it is up, or not."""
        known = self._inputs.driver
        since = known.since if driver.up == known.up else self._clock().wall
        return replace(driver, since=since)

    def driver_events(self, events: Iterable[GpuEvent]) -> None:
        """The driver reported these events, in this order: counted and judged as one change."""
        xids, by_gpu = self._inputs.xids, dict[str, list[HealthEvent]]()
        for event in events:
            if not isinstance(event, XidEvent):
                continue
            xids = counted(xids, (event.uuid, event.xid))
            # An event whose GPU is unknown concerns all of them.
            concerned = self._inputs.gpus if event.uuid is None else (event.uuid,)
            for uuid in concerned:
                by_gpu.setdefault(uuid, []).append(XidSeen(event.xid))
        if xids is not self._inputs.xids:
            self._update(xids=xids, health=self._advanced(by_gpu))

    def driver_released(self, until: float) -> None:
        """NVML is closed until then, in seconds since the epoch; nothing is probed meanwhile."""
        known = self._inputs
        self._update(
            driver=self._since(Driver(known.driver.version, "released for a reset", until)),
            health=self._advanced(dict.fromkeys(known.health, (Unwatched(),))),
        )

    def gpus_happened(self, uuids: Collection[str], event: HealthEvent) -> None:
        """The same happened to all these GPUs."""
        self._update(health=self._advanced(dict.fromkeys(uuids, (event,))))

    def _advanced(self, events: Mapping[str, Sequence[HealthEvent]]) -> dict[str, GpuHealth]:
        health, now = dict(self._inputs.health), self._clock()
        for uuid, each in events.items():
            if uuid not in health and len(health) >= MAX_UNLISTED:
                continue
            for event in each:
                health[uuid] = advance(
                    health.get(uuid, GpuHealth()),
                    event,
                    now,
                    self.rules.health,
                    sharing=self.rules.sharing,
                )
        return health

    def recalled(
        self, first_seen: Mapping[str, FirstSeen], health: Mapping[str, GpuHealth]
    ) -> None:
        """What the agent before this one kept, of the same boot of the node."""
        self._update(first_seen=dict(first_seen), health=dict(health))

    def set_store_error(self, error: str | None) -> None:
        """Why what must outlive the agent could not be written; None: it is written."""
        self._update(store_error=error)

    # The operator

    def set_cordons(self, cordons: Mapping[str, Cordon]) -> None:
        """These GPUs, by UUID, are out of service, and no others."""
        self._update(cordons=dict(cordons), cordon_error=None)

    def cordons_failed(self, error: str) -> None:
        """Which GPUs are out of service cannot be read: they stay as they were."""
        self._update(cordon_error=error)

    # The MPS daemons

    def set_mps(self, look: MpsLook) -> None:
        """The MPS daemons were looked at. A fault that goes on keeps its time."""
        now, known = self._clock().wall, self._inputs.mps_faults
        faults = {}
        for name, findings in mps_findings(look).items():
            since = {fault.reason: fault.since for fault in known.get(name, ())}
            made = [each.fault(since.get(each.rule.reason or Reason.MPS, now)) for each in findings]
            faults[name] = tuple(filter(None, made))
        self._update(mps_look=look, mps_faults=faults)

    # The driver's memory limits

    def set_limits(self, look: LimitsLook) -> None:
        """The driver's memory limits were looked at. A fault that goes on keeps its time."""
        now, known = self._clock().wall, self._inputs.limits_faults
        faults = {}
        for uuid, finding in limits_findings(look, self._inputs.gpus, self.rules.sharing).items():
            since = known[uuid].since if uuid in known else now
            if (fault := finding.fault(since)) is not None:
                faults[uuid] = fault
        self._update(limits=look, limits_faults=faults)

    # Who holds what

    def allocated(self) -> None:
        """An Allocate was answered."""
        self._update(allocates=self._inputs.allocates + 1)

    def set_assignments(
        self, assignments: tuple[Assignment, ...], checkpoint_error: str | None = None
    ) -> None:
        """The kubelet said who holds our vGPUs."""
        self._update(holders=Holders(None, assignments, checkpoint_error))

    def assignments_failed(self, error: str, *, forget: bool) -> None:
        """The kubelet did not say; `forget`: what it said last is too old to be believed."""
        holders = self._inputs.holders
        assignments = None if forget else holders.assignments
        self._update(holders=replace(holders, error=error, assignments=assignments))

    def set_usage(self, usage: Usage) -> None:
        """The processes on the GPUs were looked at."""
        self._update(usage=usage)

    # The kubelet

    def registration_tried(
        self, result: RegistrationResult, error: str | None = None, *, rival: str | None = None
    ) -> None:
        """An attempt to register ended so; `rival` names the plugin in whose place we are."""
        self._kubelet(
            counted(self._inputs.registrations, result),
            registered=result is RegistrationResult.REGISTERED,
            error=error,
            away=result is RegistrationResult.UNREACHABLE,
            rival=rival,
        )

    def registration_ended(
        self, error: str, *, away: bool = False, rival: str | None = None
    ) -> None:
        """The kubelet no longer knows us; `away`: there is none; `rival` took our place."""
        self._kubelet(registered=False, error=error, away=away, rival=rival)

    def stream_opened(self) -> None:
        """The kubelet opened a ListAndWatch stream."""
        self._kubelet(streams=self._inputs.kubelet.streams + 1)

    def stream_ended(self) -> None:
        """A ListAndWatch stream ended."""
        self._kubelet(streams=self._inputs.kubelet.streams - 1)

    def _kubelet(
        self,
        registrations: Mapping[RegistrationResult, int] | None = None,
        **changed: int | str | None,
    ) -> None:
        """The session is another in these fields."""
        known = self._inputs.kubelet
        kubelet = replace(known, **changed)  # type: ignore[arg-type]  # by their names
        if kubelet.connected != known.connected:
            kubelet = replace(kubelet, since=self._clock().wall)
        if registrations is None:
            registrations = self._inputs.registrations
        self._update(registrations=registrations, kubelet=kubelet)

    def list_sent(self) -> None:
        """A device list went out on a stream."""
        self._update(lists_sent=self._inputs.lists_sent + 1)


def counted(counts: Mapping[K, int], key: K) -> Mapping[K, int]:
    """The counts with one more of `key`."""
    return {**counts, key: counts.get(key, 0) + 1}


def _first_seen(known: Mapping[str, FirstSeen], gpus: Collection[Gpu]) -> Mapping[str, FirstSeen]:
    new = [gpu for gpu in gpus if gpu.uuid not in known]
    late = {  # which did not say their memory then
        gpu.uuid: FirstSeen(first.index, gpu.memory_bytes, gpu.reserved_bytes)
        for gpu in gpus
        if (first := known.get(gpu.uuid)) is not None
        and first.memory_bytes is None
        and gpu.memory_bytes is not None
    }
    if not (new or late):
        return known
    taken = {each.index for each in known.values()}
    seen = {
        gpu.uuid: FirstSeen(
            None if gpu.index in taken else gpu.index, gpu.memory_bytes, gpu.reserved_bytes
        )
        for gpu in new
    }
    return {**known, **late, **seen}
