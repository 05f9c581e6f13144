"""The table of docs/metrics.md: every metric, as a node that shows all of them exposes it."""

from dataclasses import replace

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from vgpu_agent.model.container import MpsSharing, Sharing
from vgpu_agent.model.devices import Card, Excluded, Fault, Gpu, Inventory, Reason
from vgpu_agent.model.holders import Assignment, Holder, Holders, Usage, Used
from vgpu_agent.model.share import MIB
from vgpu_agent.model.state import Mps, RegistrationResult, Snapshot
from vgpu_agent.observe.metrics import Metrics

_GPU = Gpu("GPU-0", 0, "NVIDIA L4", 24 * 1024 * MIB, "00000000:01:00.0", 512 * MIB, 0)
_HOLDER = Holder("namespace", "pod", "container")
_EVERYTHING = Snapshot(
    inventory=Inventory((Card(_GPU, 2, (Fault(Reason.XID, 0, "XID 79"),)),)),
    excluded=(Excluded(_GPU, "mig", "in MIG mode"),),
    mps=Mps(wanted=True, clients={"GPU-0": 1}),
    xids={("GPU-0", 79): 1},
    transitions={("GPU-0", "unhealthy", Reason.XID): 1},
    registrations={RegistrationResult.REGISTERED: 1},
    holders=Holders(None, (Assignment(_HOLDER, ("GPU-0::0",)),)),
    usage=Usage({("GPU-0", _HOLDER): Used(1, MIB)}, {"GPU-0": 0}),
    memory_used={"GPU-0": MIB},
)


def _families(snapshot: Snapshot, *, mps: bool = True) -> dict[str, Metric]:
    """The families of a node by the name that a query uses."""
    sharing = Sharing(MpsSharing("/pipe", None) if mps else None)
    metrics = Metrics(version="1", resource_name="example.com/vgpu", sharing=sharing)
    metrics.observe_rpc("Allocate", "OK", 0.001)
    text = metrics.render(snapshot, "")[0].decode()
    return {
        family.name + "_total" * (family.type == "counter"): family
        for family in text_string_to_metric_families(text)
    }


def _shown(families: dict[str, Metric]) -> set[str]:
    return {name for name, family in families.items() if family.samples}


def metrics() -> dict[str, Metric]:
    """Every metric of the agent, with a sample of each. Raises ValueError where one has none."""
    families = _families(_EVERYTHING)
    missing = families.keys() - _shown(families)
    if missing:
        raise ValueError(f"the node of {__name__} has no sample of {', '.join(sorted(missing))}")
    return families


def markdown_table() -> str:
    """All metrics by name, with when they are there."""
    without_mps = _shown(_families(replace(_EVERYTHING, mps=Mps()), mps=False))
    without_usage = _shown(_families(replace(_EVERYTHING, usage=None)))
    without_holders = _shown(_families(replace(_EVERYTHING, holders=Holders())))
    rows = ["| metric | type | labels | what it says | only |", "| --- | --- | --- | --- | --- |"]
    for name, family in sorted(metrics().items()):
        labels = {label: None for sample in family.samples for label in sample.labels}
        labels.pop("le", None)
        words = ", ".join(f"`{label}`" for label in labels) or "-"
        when = [
            words
            for shown, words in (
                (without_mps, "under MPS"),
                (without_usage, "with `VGPU_PROCESS_METRICS=on`"),
                (without_holders, "while holders are known"),
            )
            if name not in shown
        ]
        rows.append(
            f"| `{name}` | {family.type} | {words} | {family.documentation} |"
            f" {', '.join(when) or '-'} |"
        )
    return "\n".join(rows)
