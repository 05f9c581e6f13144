"""A family of metrics, and the labels that many have."""

from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from vgpu_agent.model.devices import Gpu
from vgpu_agent.model.holders import Holder
from vgpu_agent.model.snapshot import Rules

Labels = tuple[str, ...]
Samples = Iterable[tuple[Labels, float]]


@dataclass(frozen=True, slots=True)
class Source:
    """What metrics say of the agent itself."""

    version: str
    resource: str
    rules: Rules


GPU = ("gpu_uuid", "gpu_index")
CONTAINER = ("namespace", "pod", "container")


def family(name: str, text: str, labels: Labels, samples: Samples) -> Metric:
    """A metric; its name says of which kind."""
    kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    family = kind(name.removesuffix("_total"), text, labels=labels)
    for values, value in samples:
        family.add_metric(values, float(value))
    return family


def one(name: str, text: str, value: float) -> Metric:
    """A metric without labels."""
    return family(name, text, (), [((), value)])


def of_gpu(gpu: Gpu) -> Labels:
    """The values of `GPU`."""
    return gpu.uuid, str(gpu.index)


def of_container(holder: Holder) -> Labels:
    """The values of `CONTAINER`."""
    return holder.namespace, holder.pod, holder.container
