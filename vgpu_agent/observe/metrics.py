"""The metrics of the agent: one collector over one snapshot of the node, in its own registry.

Names, units and types follow the Prometheus conventions. Constant metrics are made at each scrape,
so no series outlives the card that it speaks of.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from vgpu_agent.model.devices import Card, Gpu, Reason
from vgpu_agent.model.state import RegistrationResult, Snapshot

_G = ("gpu_uuid", "gpu_index")
_RPC_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Metrics:
    """The registry of one agent, and where calls of the kubelet are timed."""

    def __init__(self, *, version: str, resource_name: str, max_clients: int = 0) -> None:
        self._version = version
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
        yield from _card_families(cards, snapshot.driver.version or "")
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

        if snapshot.mps.wanted:
            yield from self._mps_families(snapshot)

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


def _card_families(cards: Sequence[Card], driver_version: str) -> Iterator[Metric]:
    yield _gauge(
        "vgpu_gpu_info",
        "What a card is.",
        (*_G, "model", "driver_version", "numa_node"),
        [
            (
                (
                    *_labels(card.gpu),
                    card.gpu.model,
                    driver_version,
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
        "Memory of a card: all of it, and what the driver reserves of it.",
        (*_G, "kind"),
        [
            ((*_labels(card.gpu), kind), value)
            for card in cards
            for kind, value in (
                ("total", card.gpu.memory_bytes),
                ("reserved", card.gpu.reserved_bytes),
            )
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
