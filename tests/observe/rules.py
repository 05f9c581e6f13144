"""The alerts and dashboards as data, and a node of which every metric has something to say."""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.agent_process import REPOSITORY
from tests.kubelet.rig import GIB, RESOURCE
from vgpu_agent.model.devices import Effect, Excluded, Fault, Gpu, Inventory, Reason, SharedGpu
from vgpu_agent.model.facts import DaemonLook, MpsLook
from vgpu_agent.model.holders import Assignment, Holder, Holders, Usage, Used
from vgpu_agent.model.limits import Limited, LimitsLook, MemoryLimit
from vgpu_agent.model.rules import MPS_SERVER_MARGIN, MpsLimits, SharingRules
from vgpu_agent.model.snapshot import Driver, Kubelet, Mps, RegistrationResult, Rules, Snapshot
from vgpu_agent.observe.metrics import Metrics

FILES = REPOSITORY / "charts" / "vgpu-agent" / "files"
ALERTS = FILES / "alerts.yaml"
ALERTS_TEST = Path(__file__).with_name("alerts_test.yaml")
RUNBOOK = REPOSITORY / "docs" / "runbook.md"
DASHBOARDS = sorted((FILES / "dashboards").glob("*.json"))

TARGET_LABELS = {
    *("job", "instance", "namespace", "pod", "container", "endpoint", "node", "cluster")
}
"""What a PodMonitor attaches; the node and the cluster where it is set to."""

EXPORTED = {"exported_namespace", "exported_pod", "exported_container"}
"""Where a Prometheus does not honor our labels, these are the holder's."""


@cache
def _rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in _rules() if "alert" in rule]


def recorded() -> dict[str, str]:
    """The queries whose results are kept, by their names."""
    return {rule["record"]: rule["expr"] for rule in _rules() if "record" in rule}


def runbook_of(name: str) -> str:
    """Where an alert sends its reader."""
    return f"docs/runbook.md#{name.lower()}"


def alert_tests() -> dict[str, Any]:
    """The cases of ALERTS_TEST as a file for `promtool test rules`."""
    return {
        "rule_files": [str(ALERTS)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "name": name,
                "interval": "1m",
                "input_series": [
                    {"series": series, "values": values}
                    for series, values in case["series"].items()
                ],
                "alert_rule_test": [
                    {
                        "alertname": name,
                        "eval_time": time,
                        "exp_alerts": [
                            {
                                "exp_labels": alert["labels"],
                                "exp_annotations": {
                                    "summary": alert["summary"],
                                    "description": alert["description"],
                                    "runbook": runbook_of(name),
                                },
                            }
                            for alert in case["fires"].get(time, ())
                        ],
                    }
                    for time in (*case["quiet"], *case["fires"])
                ],
            }
            for name, case in yaml.safe_load(ALERTS_TEST.read_text()).items()
        ],
    }


@cache
def dashboard(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that show something."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


class Query(NamedTuple):
    """A query of a dashboard, and the legend of what it finds."""

    where: str
    expr: str
    legend: str = ""


def queries(path: Path) -> Iterator[Query]:
    for panel in panels(dashboard(path)):
        for target in panel["targets"]:
            where = f"{path.stem}: {panel['title']} {target['refId']}"
            yield Query(where, target["expr"], target["legendFormat"])


def variable_queries(path: Path) -> Iterator[tuple[str, str, str]]:
    """Name, metric and label of each `label_values(metric, label)`."""
    for variable in dashboard(path)["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
            assert found, variable
            yield variable["name"], found[1], found[2]


# A node of which every metric has something to say

WELL = Gpu(
    uuid="GPU-a",
    index=0,
    model="NVIDIA L4",
    memory_bytes=24 * GIB,
    pci_bus_id="00000000:01:00.0",
    reserved_bytes=400 << 20,
    numa_node=0,
)
SICK = Gpu(
    uuid="GPU-b",
    index=1,
    model="NVIDIA L4",
    memory_bytes=24 * GIB,
    pci_bus_id="00000000:02:00.0",
)
EXCLUDED = Gpu(
    uuid="GPU-c",
    index=2,
    model="NVIDIA A100",
    memory_bytes=40 * GIB,
    pci_bus_id="00000000:03:00.0",
)

RULES = Rules(SharingRules(mps=True))


def usable(gpu: Gpu) -> int:
    """The bytes of it that are shared out."""
    return gpu.memory_bytes - gpu.reserved_bytes - MPS_SERVER_MARGIN


RESNET = Holder("team-a", "resnet-1", "main")
LLAMA = Holder("team-b", "llama-0", "server")
SHRUNK = Holder("team-b", "old-0", "main")

DAEMON = DaemonLook("1", servers=(812,), clients={"GPU-a": 2}, waiting=1, crashes=3)

SNAPSHOT = Snapshot(
    inventory=Inventory(
        (
            SharedGpu(WELL, 4, usable_bytes=usable(WELL), recovery_wait=60),
            SharedGpu(
                SICK,
                4,
                (
                    Fault(Reason.LOST, 10.0, "gone"),
                    Fault(Reason.XID, 11.0, "XID 79", Effect.UNTIL_RESET),
                ),
                usable_bytes=usable(SICK),
                recovery_wait=240,
            ),
        )
    ),
    excluded=(Excluded(EXCLUDED, "mig", "MIG mode is on"),),
    driver=Driver("580.65.06", None),
    mps=Mps(
        look=MpsLook(limits=MpsLimits.CLIENT, daemons={"GPU-a": DAEMON}),
        problem=None,
        replacement=None,
        daemons={"GPU-a": DAEMON},
    ),
    kubelet=Kubelet(registered=True, streams=1),
    xids=MappingProxyType({("GPU-a", 13): 3, ("GPU-b", 79): 1, (None, 8): 2, ("GPU-x", 31): 1}),
    transitions=MappingProxyType(
        {
            ("GPU-b", "unhealthy", Reason.LOST): 2,
            ("GPU-b", "healthy", Reason.LOST): 1,
        }
    ),
    registrations=MappingProxyType(
        {RegistrationResult.REGISTERED: 2, RegistrationResult.UNREACHABLE: 5}
    ),
    lists_sent=7,
    holders=Holders(
        None,
        (
            Assignment(RESNET, ("GPU-a::0",)),
            Assignment(LLAMA, ("GPU-a::2", "GPU-a::3", "GPU-b::1")),
            Assignment(SHRUNK, ("GPU-b::0", "GPU-b::9", "GPU-gone::1")),
        ),
    ),
    usage=Usage(
        MappingProxyType(
            {
                ("GPU-a", RESNET): Used(2, 9 * GIB),
                ("GPU-b", LLAMA): Used(1, None),
                ("GPU-x", LLAMA): Used(1, GIB),
            }
        ),
        MappingProxyType({"GPU-a": 3, "GPU-x": 1}),
    ),
    limits=LimitsLook(
        enforced=True,
        containers=(
            Limited(
                LLAMA,
                {"GPU-a": MemoryLimit(12 * GIB, 0, 7 * GIB), "GPU-b": MemoryLimit(None, 0, GIB)},
                {"GPU-a": 8 * GIB, "GPU-b": GIB},
                "the driver refuses",
            ),
        ),
    ),
    memory_used=MappingProxyType({"GPU-a": 10 * GIB}),
    missing=MappingProxyType({"GPU-a": {"events": "Not Supported"}}),
)
"""GPU-a is well, and RESNET uses more of it than its share; GPU-b is lost; GPU-x is no GPU of ours.

SHRUNK holds vGPUs that are no longer advertised.
"""


def full_metrics(resource: str = RESOURCE) -> Metrics:
    metrics = Metrics("1.2.3", resource, RULES)
    for method in ("Allocate", "GetPreferredAllocation", "PreStartContainer"):
        metrics.calls.observe_rpc(method, "OK", 0.002)
    metrics.calls.observe_rpc("Allocate", "INVALID_ARGUMENT", 0.001)
    return metrics


def full_text(resource: str = RESOURCE) -> bytes:
    return full_metrics(resource).render(SNAPSHOT)[0]


@cache
def metric_labels() -> dict[str, set[str]]:
    """The labels of every metric, as they are exposed: of a histogram each of its three."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(full_text().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found
