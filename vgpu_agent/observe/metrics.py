"""The metrics of the agent: one collector over one snapshot of the node, in its own registry.

Names, units and types follow the Prometheus conventions. Constant metrics are made at each scrape,
so no series outlives the card that it speaks of.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from vgpu_agent.model.container import Sharing, share_bytes
from vgpu_agent.model.devices import Card, Gpu, Reason, device_id
from vgpu_agent.model.holders import Holder, Usage, largest_free, orphaned, parts
from vgpu_agent.model.state import RegistrationResult, Snapshot

_G = ("gpu_uuid", "gpu_index")
_C = ("namespace", "pod", "container")
_RPC_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Metrics:
    """The registry of one agent, and where calls of the kubelet are timed."""

    def __init__(
        self, *, version: str, resource_name: str, sharing: Sharing, max_clients: int = 0
    ) -> None:
        self._version = version
        self._sharing = sharing
        self._max_clients = max_clients
        self._resource = resource_name
        self._timings = CollectorRegistry()
        self._rpc = Histogram(
            "vgpu_rpc_duration_seconds",
            "Duration of the kubelet's unary calls, by method and gRPC status code.",
            ("method", "code"),
            buckets=_RPC_BUCKETS,
            registry=self._timings,
        )

    def observe_rpc(self, method: str, code: str, seconds: float) -> None:
        """A call of `method` ended with a gRPC status code after so many seconds."""
        self._rpc.labels(method, code).observe(seconds)

    def render(self, snapshot: Snapshot, accept: str) -> tuple[bytes, str]:
        """The metrics as text and its content type, in the format that `accept` asks for.

        Takes 1 ms and more for every 10 vGPUs: call it in a worker thread.
        """
        registry = CollectorRegistry()
        registry.register(_Families(lambda: self._families(snapshot)))
        registry.register(_Families(lambda: _without_created(self._timings.collect())))
        encode, content_type = choose_encoder(accept)
        return encode(registry), content_type

    def _families(self, snapshot: Snapshot) -> Iterator[Metric]:
        cards = snapshot.inventory.cards
        yield _gauge(
            "vgpu_build_info", "Version of the agent.", ("version",), [((self._version,), 1)]
        )
        yield _gauge(
            "vgpu_nvml_up", "Whether the GPU driver answers.", (), [((), snapshot.driver.up)]
        )
        yield from _card_families(cards, snapshot)
        yield _gauge(
            "vgpu_gpu_excluded",
            "Cards of the node that are left out, by reason.",
            (*_G, "reason"),
            [((*_labels(left.gpu), left.reason), 1) for left in snapshot.excluded],
        )
        yield _gauge(
            "vgpu_devices",
            "vGPUs that are advertised, by card and health.",
            ("resource", *_G, "health"),
            [
                (
                    (self._resource, *_labels(card.gpu), health),
                    card.replicas if card.healthy == (health == "healthy") else 0,
                )
                for card in cards
                for health in ("healthy", "unhealthy")
            ],
        )
        yield from self._counters(snapshot)
        yield _gauge(
            "vgpu_kubelet_connected",
            "Whether the kubelet is registered with and follows the device list.",
            (),
            [((), snapshot.kubelet.connected)],
        )

        yield from self._holder_families(snapshot)
        if snapshot.usage is not None:
            yield from _usage_families(cards, snapshot.usage)
        if snapshot.mps.wanted:
            yield from self._mps_families(snapshot)

    def _holder_families(self, snapshot: Snapshot) -> Iterator[Metric]:
        """Who holds what. Where that is not known there is no series: unknown is not zero."""
        inventory, holders = snapshot.inventory, snapshot.holders
        yield _gauge(
            "vgpu_podresources_up",
            "Whether the kubelet said who holds which vGPU when it was last asked.",
            (),
            [((), holders.up)],
        )
        if holders.assignments is None:
            return
        held = parts(inventory, holders.assignments)
        taken = {(part.card.gpu.uuid, number) for part in held for number in part.numbers}
        yield _gauge(
            "vgpu_device_allocated",
            "Whether a container holds the vGPU.",
            ("resource", *_G, "device_id"),
            [
                (
                    (self._resource, *_labels(card.gpu), device_id(card.gpu.uuid, number)),
                    (card.gpu.uuid, number) in taken,
                )
                for card in inventory.cards
                for number in range(card.replicas)
            ],
        )
        yield _gauge(
            "vgpu_allocation_info",
            "Which container holds the vGPU.",
            ("resource", *_G, "device_id", *_C),
            [
                (
                    (
                        self._resource,
                        *_labels(part.card.gpu),
                        device_id(part.card.gpu.uuid, number),
                        *_names(part.holder),
                    ),
                    1,
                )
                for part in held
                for number in part.numbers
            ],
        )
        shares = [
            (
                (*_labels(part.card.gpu), *_names(part.holder)),
                share_bytes(part.card, len(part.numbers), self._sharing),
            )
            for part in held
            if part.whole
        ]
        yield _gauge(
            "vgpu_allocation_memory_share_bytes",
            "Memory of the card that the vGPUs of the container are worth together.",
            (*_G, *_C),
            shares,
        )
        yield _gauge(
            "vgpu_allocation_memory_limit_bytes_per_process",
            "Memory of the card that MPS lets each process of the container have.",
            (*_G, *_C),
            shares if self._sharing.under(snapshot.mps.limits).limits_memory else (),
        )
        yield _gauge(
            "vgpu_orphaned_allocations",
            "vGPUs that containers hold though the node no longer has them.",
            ("resource",),
            [((self._resource,), len(orphaned(inventory, holders.assignments)))],
        )
        yield _gauge(
            "vgpu_largest_free_share",
            "vGPUs that the largest request may ask for which still fits on one card.",
            ("resource",),
            [((self._resource,), largest_free(inventory, holders.assignments))],
        )

    def _mps_families(self, snapshot: Snapshot) -> Iterator[Metric]:
        mps = snapshot.mps
        for name, text, value in (
            ("vgpu_mps_up", "Whether the MPS daemon answers.", mps.up),
            (
                "vgpu_mps_limits_in_force",
                "Whether the MPS daemon's limits were read back as this node needs them.",
                mps.limits_in_force,
            ),
            (
                "vgpu_mps_replacement_needed",
                "Whether the MPS pod serves other settings than the agent's and must be replaced.",
                mps.replacement is not None,
            ),
            (
                "vgpu_mps_waiting_clients",
                "MPS clients of another user that wait for their turn.",
                mps.waiting,
            ),
            (
                "vgpu_mps_max_clients",
                "Most MPS client contexts of a card.",
                self._max_clients,
            ),
        ):
            yield _gauge(name, text, (), [((), value)])
        yield _gauge(
            "vgpu_mps_clients",
            "MPS clients of a card.",
            _G,
            [
                (_labels(card.gpu), mps.clients.get(card.gpu.uuid, 0))
                for card in snapshot.inventory.cards
            ],
        )

    def _counters(self, snapshot: Snapshot) -> Iterator[Metric]:
        index = {card.gpu.uuid: str(card.gpu.index) for card in snapshot.inventory.cards}
        yield _counter(
            "vgpu_xid_errors",
            "XIDs that the driver reported. gpu_uuid is empty where it could not tell the card.",
            (*_G, "xid"),
            [
                ((uuid or "", index.get(uuid or "", ""), str(xid)), count)
                for (uuid, xid), count in snapshot.xids.items()
            ],
        )
        yield _counter(
            "vgpu_health_transitions",
            "Cards that became healthy or unhealthy, and the reason that did it or ended.",
            (*_G, "to", "reason"),
            [
                ((uuid, index.get(uuid, ""), to, reason.value), count)
                for (uuid, to, reason), count in snapshot.transitions.items()
            ],
        )
        yield _counter(
            "vgpu_registrations",
            "Attempts to register with the kubelet, by result.",
            ("result",),
            [
                ((result.value,), snapshot.registrations.get(result, 0))
                for result in RegistrationResult
            ],
        )
        yield _counter(
            "vgpu_list_and_watch_updates",
            "Device lists sent to the kubelet.",
            (),
            [((), snapshot.lists_sent)],
        )


def _usage_families(cards: Sequence[Card], usage: Usage) -> Iterator[Metric]:
    listed = {card.gpu.uuid: card.gpu for card in cards}
    used = [
        ((*_labels(listed[uuid]), *_names(holder)), each)
        for (uuid, holder), each in usage.containers.items()
        if uuid in listed
    ]
    yield _gauge(
        "vgpu_container_memory_used_bytes",
        "Memory of the card that the processes of the container have together.",
        (*_G, *_C),
        [(labels, each.memory_bytes) for labels, each in used if each.memory_bytes is not None],
    )
    yield _gauge(
        "vgpu_container_processes",
        "Processes of the container with a context on the card.",
        (*_G, *_C),
        [(labels, each.processes) for labels, each in used],
    )
    yield _gauge(
        "vgpu_unattributed_processes",
        "Processes on the card that belong to no container that is known.",
        _G,
        [
            (_labels(gpu), usage.unattributed[u])
            for u, gpu in listed.items()
            if u in usage.unattributed
        ],
    )


def _card_families(cards: Sequence[Card], snapshot: Snapshot) -> Iterator[Metric]:
    yield _gauge(
        "vgpu_gpu_info",
        "What a card is.",
        (*_G, "model", "driver_version", "numa_node"),
        [
            (
                (
                    *_labels(card.gpu),
                    card.gpu.model,
                    snapshot.driver.version or "",
                    "" if card.gpu.numa_node is None else str(card.gpu.numa_node),
                ),
                1,
            )
            for card in cards
        ],
    )
    yield _gauge(
        "vgpu_gpu_healthy",
        "Whether the vGPUs of a card may be given to pods.",
        _G,
        [(_labels(card.gpu), card.healthy) for card in cards],
    )
    yield _gauge(
        "vgpu_gpu_unhealthy_reason",
        "1 for each reason for which a card is unhealthy now, 0 for the others.",
        (*_G, "reason"),
        [
            (
                (*_labels(card.gpu), reason.value),
                any(fault.reason is reason for fault in card.faults),
            )
            for card in cards
            for reason in Reason
        ],
    )
    yield _gauge(
        "vgpu_gpu_recovery_wait_seconds",
        "For how long the probes of a card must pass before it is healthy; grows with relapses.",
        _G,
        [(_labels(card.gpu), card.recovery_wait) for card in cards],
    )
    yield _gauge(
        "vgpu_gpu_memory_bytes",
        "Memory of a card: all of it, what the driver reserves of it, and what is in use.",
        (*_G, "kind"),
        [
            ((*_labels(card.gpu), kind), value)
            for card in cards
            for kind, value in (
                ("total", card.gpu.memory_bytes),
                ("reserved", card.gpu.reserved_bytes),
                ("used", snapshot.memory_used.get(card.gpu.uuid)),
            )
            if value is not None
        ],
    )


_Samples = Iterable[tuple[tuple[str, ...], float]]


def _gauge(name: str, text: str, labels: Sequence[str], samples: _Samples) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, value in samples:
        family.add_metric(values, float(value))
    return family


def _counter(name: str, text: str, labels: Sequence[str], samples: _Samples) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, value in samples:
        family.add_metric(values, float(value))
    return family


def _labels(gpu: Gpu) -> tuple[str, str]:
    return gpu.uuid, str(gpu.index)


def _names(holder: Holder) -> tuple[str, str, str]:
    return holder.namespace, holder.pod, holder.container


def _without_created(families: Iterable[Metric]) -> Iterator[Metric]:
    """Without the `_created` series, which nobody asked for and which double the series."""
    for family in families:
        family.samples = [each for each in family.samples if not each.name.endswith("_created")]
        yield family


class _Families(Collector):
    """A collector of families that are made when it is asked."""

    def __init__(self, make: Callable[[], Iterable[Metric]]) -> None:
        self._make = make

    def collect(self) -> Iterable[Metric]:
        return self._make()
