"""Metrics in the formats of Prometheus: the table of `metrics`, and the duration of calls.

Constant metrics are made at each scrape, so no series outlives the GPU that it speaks of.
"""

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from vgpu_agent.model.snapshot import Rules, Snapshot
from vgpu_agent.observe.metrics import RPC_DURATION, TABLE, View


class Metrics:
    """The metrics of one agent, and where calls of the kubelet are timed."""

    _BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)

    def __init__(self, version: str, resource: str, rules: Rules) -> None:
        self._version = version
        self._resource = resource
        self._rules = rules
        self._timings = CollectorRegistry()
        self._rpc = Histogram(
            *RPC_DURATION,
            buckets=self._BUCKETS,
            registry=self._timings,
        )

    def observe_rpc(self, method: str, code: str, seconds: float) -> None:
        """A call of `method` ended with a gRPC status code after so many seconds."""
        self._rpc.labels(method, code).observe(seconds)

    def render(self, snapshot: Snapshot, accept: str) -> tuple[bytes, str]:
        """The metrics as text and its content type, in the format that `accept` asks for.

        Takes 1 ms and more for every 10 vGPUs: call it in a worker thread.
        """
        view = View(self._version, self._resource, self._rules, snapshot)
        registry = CollectorRegistry()
        registry.register(_Families(_table(view)))
        registry.register(_Families(_without_created(self._timings.collect())))
        encode, content_type = choose_encoder(accept)
        return encode(registry), content_type


def _table(view: View) -> Iterator[Metric]:
    for entry in TABLE:
        if all(only.holds(view.snapshot) for only in entry.only):
            kind = CounterMetricFamily if entry.kind == "counter" else GaugeMetricFamily
            family = kind(entry.name.removesuffix("_total"), entry.text, labels=entry.labels)
            for labels, value in entry.samples(view):
                family.add_metric(labels, float(value))
            yield family


def _without_created(families: Iterable[Metric]) -> Iterator[Metric]:
    """Without the `_created` series, which nobody asked for and which double the series."""
    for family in families:
        family.samples = [each for each in family.samples if not each.name.endswith("_created")]
        yield family


class _Families(Collector):
    """A collector of families that are made as they are collected: once."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        families, self._families = self._families, ()
        return families

    def describe(self) -> Iterable[Metric]:
        """Nothing that is made at registration."""
        return ()
