"""A real Prometheus that scrapes a real agent, with our alerts loaded.

It scrapes with `honor_labels` and the target labels that a PodMonitor attaches. A second target is
a page on which every metric has something to say: a node under MPS with pods that use its GPUs, a
fault, and an excluded GPU.
"""

import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grpc
import pytest

from tests.agent_process import Agent, execute, running
from tests.kubelet.podresources_peer import Pod, PodResourcesPeer, encoded
from tests.kubelet.rig import RESOURCE
from tests.kubelet_peer import KubeletPeer
from tests.observe.prometheus import Prometheus, job, prometheus_of, serving, target
from tests.observe.rules import (
    DASHBOARDS,
    RESNET,
    RULES,
    SNAPSHOT,
    alerts,
    full_text,
    queries,
    recorded,
    variable_queries,
)
from vgpu_agent.model.devices import Reason
from vgpu_agent.observe.metrics import Metrics

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("prometheus")]

HERE, FULL, OVERRIDDEN = "node-a", "node-b", "node-c"
"""The instances: of the agent, of the page of all metrics, and of that page where a Prometheus does
not honor labels."""

AGENT = {
    "namespace": "gpu-system",
    "pod": "vgpu-agent-x7k2p",
    "container": "agent",
    "endpoint": "metrics",
    "node": HERE,
    "instance": HERE,
}
NAMES = {"namespace": RESNET.namespace, "pod": RESNET.pod, "container": RESNET.container}
GONE = "::99"
"""Ends the ID of a vGPU that no GPU has."""

NO_DATA = {
    "vgpu_gpu_unread": "a simulated GPU says all there is",
    "vgpu_container_memory_": "no process runs on a simulated GPU, and none has a limit",
    "vgpu_container_processes": "no process runs on a simulated GPU",
    "vgpu_unattributed_processes": "no process runs on a simulated GPU",
    "vgpu_xid_errors_total": "a simulated GPU of `run` has no fault",
    "vgpu_health_transitions_total": "a simulated GPU of `run` has no fault",
    "vgpu_gpu_unhealthy_reason": "the panel shows those that are 1, and there is no fault",
}
"""What the node's dashboard cannot show of the agent of this test, and why."""


@dataclass
class Scene:
    """A Prometheus, and an agent with its kubelet."""

    prometheus: Prometheus
    agent: Agent
    kubelet: KubeletPeer
    pods: PodResourcesPeer
    state: Path

    @property
    def vgpus(self) -> list[str]:
        return [device.id for device in self.kubelet.devices]

    def hold(self, *device_ids: str) -> None:
        """From now on one container holds these vGPUs, and nobody any other."""
        held = {RESNET.container: {RESOURCE: device_ids}}
        pods = [Pod(RESNET.pod, held, RESNET.namespace)] if device_ids else []
        self.pods.answer = encoded(*pods)


@contextmanager
def scene() -> Iterator[Scene]:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vgpu-")))
        kubelet = stack.enter_context(KubeletPeer(directory))
        pods = PodResourcesPeer(directory)
        pods.start()
        stack.callback(pods.stop)
        settings = {"VGPU_RESOURCE_NAME": RESOURCE, "VGPU_PODRESOURCES_INTERVAL": "1"}
        agent = stack.enter_context(running(directory, **settings))
        kubelet.wait_list(1)
        full = stack.enter_context(
            serving({"/metrics": full_text("other.example.com/vgpu").decode()})
        )
        pod = AGENT["pod"]
        found = {
            node: [target(port, pod=pod, node=node)]
            for node, port in ((HERE, agent.port), (FULL, full), (OVERRIDDEN, full))
        }
        jobs = [
            job("gpu-system/agents", static_configs=found[HERE]),
            job("elsewhere/agents", static_configs=found[FULL]),
            job("overridden/agents", honor=False, static_configs=found[OVERRIDDEN]),
        ]
        prometheus = stack.enter_context(prometheus_of(jobs))
        it = Scene(prometheus, agent, kubelet, pods, directory / "state")
        it.hold(*it.vgpus[:2])
        kubelet.preferred(it.vgpus, [], 1)
        kubelet.allocate(it.vgpus[:2])
        yield it


@pytest.fixture(scope="module")
def shared() -> Iterator[Scene]:
    """A scene that the tests leave as it is."""
    with scene() as it:
        it.prometheus.wait_query(f'vgpu_allocation_info{{instance="{HERE}"}}')
        for instance in (FULL, OVERRIDDEN):
            it.prometheus.wait_query(f'vgpu_build_info{{instance="{instance}"}}')
        yield it


def test_the_agent_is_scraped_with_the_labels_of_its_pod(shared):
    (up,) = shared.prometheus.query(f'up{{instance="{HERE}"}} == 1')
    assert up["metric"].items() >= AGENT.items()
    targets = shared.prometheus.get("targets")["activeTargets"]
    assert [(each["health"], each["lastError"]) for each in targets] == [("up", "")] * 3


def test_what_is_said_of_a_container_carries_its_own_names_and_not_the_agents(shared):
    of_agent = f'{{instance="{HERE}"}}'
    for metric in (
        "vgpu_allocation_info",
        "vgpu_allocation_memory_share_bytes",
        "vgpu_allocation_process_memory_limit_bytes",
    ):
        for found in shared.prometheus.wait_query(metric + of_agent):
            labels = found["metric"]
            assert labels.items() >= {**NAMES, "node": "node-a"}.items()
            assert not [name for name in labels if name.startswith("exported_")]
    # Where a Prometheus does not honor them, the PodMonitor puts them back.
    for found in shared.prometheus.wait_query(f'vgpu_allocation_info{{instance="{OVERRIDDEN}"}}'):
        labels = found["metric"]
        assert labels["namespace"] in ("team-a", "team-b")
        assert (labels["pod"], labels["container"]) == (
            labels["exported_pod"],
            labels["exported_container"],
        )
    # What is said of the node carries the agent's.
    (connected,) = shared.prometheus.wait_query("vgpu_kubelet_connected" + of_agent)
    assert connected["metric"].items() >= AGENT.items()


def test_every_rule_is_evaluated_without_an_error(shared):
    def evaluated() -> list[dict[str, Any]] | None:
        groups = shared.prometheus.get("rules")["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        return None if any(rule["health"] == "unknown" for rule in rules) else rules

    rules = shared.prometheus.wait("every rule evaluated", evaluated)
    names = [*recorded(), *(each["alert"] for each in alerts())]
    found = {each["name"]: (each["health"], each.get("lastError", "")) for each in rules}
    assert found == dict.fromkeys(names, ("ok", ""))


def filled_in(expr: str, instance: str) -> str:
    """A query as Grafana sends it."""
    for name, value in (
        ("$__rate_interval", "10s"),
        ("$resource", ".*"),
        ("$instance", instance),
    ):
        expr = expr.replace(name, value)
    assert "$" not in expr
    return expr


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_query_of_a_dashboard_finds_data_where_there_is_some_to_find(shared, path):
    for query in queries(path):
        shared.prometheus.wait_query(filled_in(query.expr, FULL))
    for _, metric, label in variable_queries(path):
        assert shared.prometheus.get(f"label/{label}/values", **{"match[]": metric})


def test_the_dashboard_of_the_node_shows_the_agent_except_for_what_its_gpus_cannot_have(shared):
    (path,) = [path for path in DASHBOARDS if path.stem == "node"]
    for query in queries(path):
        expr = filled_in(query.expr, HERE)
        if any(metric in expr for metric in NO_DATA):
            shared.prometheus.query(expr)
        else:
            shared.prometheus.wait_query(expr)


@pytest.mark.parametrize("node", [FULL, OVERRIDDEN])
def test_a_container_with_more_than_its_share_is_reported_by_its_own_names(shared, node):
    alert = shared.prometheus.wait_alert("VgpuContainerOverShare", instance=node, **NAMES)
    assert alert["state"] == "pending"
    assert alert["annotations"]["summary"].startswith("team-a/resnet-1 uses more")
    assert f"on {node}" in alert["annotations"]["description"]


def test_the_first_event_is_seen_by_the_queries_of_the_dashboards():
    """`increase` and `rate` see no step from nothing."""
    metrics = Metrics("1.2.3", RESOURCE, RULES)
    nothing = MappingProxyType(dict[Any, int]())
    quiet = replace(SNAPSHOT, xids=nothing, transitions=nothing)
    texts = {"/metrics": metrics.render(quiet)[0].decode()}
    seldom = re.compile(r"vgpu_(xid_errors|health_transitions|rpc_duration_seconds)_\w+")
    exprs = [
        filled_in(query.expr, HERE)
        for path in DASHBOARDS
        for query in queries(path)
        if seldom.search(query.expr)
    ]
    assert len(exprs) == 8
    with (
        serving(texts) as port,
        prometheus_of(
            [job("agents", static_configs=[target(port, pod="agent-1", node=HERE)])]
        ) as prometheus,
    ):
        prometheus.wait_query("count_over_time(vgpu_build_info[1m]) > 12")
        for expr in exprs:
            assert not prometheus.query(f"({expr}) > 0")
        metrics.calls.observe_rpc("Allocate", "INVALID_ARGUMENT", 0.001)
        key = ("GPU-b", "unhealthy", Reason.LOST)
        once = replace(SNAPSHOT, xids={("GPU-b", 79): 1}, transitions={key: 1})
        texts["/metrics"] = metrics.render(once)[0].decode()
        for expr in exprs:
            (found,) = prometheus.wait_query(f"({expr}) > 0")
            if "rate(" not in expr:
                assert 0.9 < float(found["value"][1]) < 1.5, expr


def test_a_rehearsed_xid_is_one_alert_with_its_gpu_node_xid_and_pods():
    with scene() as it:
        it.prometheus.wait_query(f'vgpu_allocation_info{{instance="{HERE}"}}')
        done = execute("simulate", "xid", "79", "--gpu", "0", VGPU_STATE_DIRECTORY=str(it.state))
        assert done.returncode == 0, done.stderr
        uuid = it.vgpus[0].partition("::")[0]

        def worded() -> dict[str, Any] | None:
            alert = it.prometheus.wait_alert("VgpuGpuUnhealthy", instance=HERE)
            return alert if "xid" in alert["annotations"]["summary"] else None

        alert = it.prometheus.wait("the alert with the reason", worded)
        assert re.fullmatch(
            r"GPU 0 on node-a is unhealthy:( [a-z-]+)+", alert["annotations"]["summary"]
        )
        for words in (
            f"GPU 0 ({uuid})",
            "or of no GPU by name: 79.",
            (
                "Pods that hold vGPUs of it: 1, listed by"
                f' vgpu_allocation_info{{instance="{HERE}",gpu_uuid="{uuid}"}}.'
            ),
        ):
            assert words in alert["annotations"]["description"]
        active = [each["labels"] for each in it.prometheus.get("alerts")["alerts"]]
        ours = [o for o in active if o.get("instance") == HERE or o.get("resource") == RESOURCE]
        assert [labels["alertname"] for labels in ours] == ["VgpuGpuUnhealthy"]


def test_what_happens_on_the_node_is_seen_in_the_alerts_and_the_series_of_a_pod_end_with_it():
    with scene() as it:
        prometheus, here = it.prometheus, {"instance": HERE}
        holders = f'vgpu_allocation_info{{instance="{HERE}"}}'
        free = f'vgpu_largest_free_share{{instance="{HERE}"}}'
        assert len(prometheus.wait_query(holders)) == 2

        # All vGPUs are held, and one that there is not.
        it.hold(*it.vgpus, it.vgpus[0].partition("::")[0] + GONE)
        for name, labels in (
            ("VgpuOrphanedAllocations", here),
            ("VgpuNodeFull", here),
            ("VgpuExhausted", {"resource": RESOURCE}),
        ):
            assert prometheus.wait_alert(name, **labels)["state"] == "pending"

        # A request that cannot be met fires at once.
        with pytest.raises(grpc.RpcError, match="INVALID_ARGUMENT"):
            it.kubelet.allocate(["GPU-none::0"])
        refused = prometheus.wait_alert("VgpuAllocateRefused", **here)
        assert refused["state"] == "firing"
        assert refused["labels"].items() >= AGENT.items() - {("pod", AGENT["pod"])}
        assert "pod" not in refused["labels"]  # it goes on when the pod is replaced
        assert "INVALID_ARGUMENT" in refused["annotations"]["description"]

        # The pod ends. Its series end with the next list, and not 5 minutes later.
        assert len(prometheus.wait_query(holders)) == len(it.vgpus)
        it.hold()
        prometheus.wait("no holder", lambda: not prometheus.query(holders))
        prometheus.wait_query(f"{free} == 10")

        # The kubelet goes, and its PodResources with it.
        it.pods.stop()
        prometheus.wait_alert("VgpuPodResourcesDown", **here)
        it.kubelet.stop()
        prometheus.wait_alert("VgpuKubeletDisconnected", **here)

        assert it.agent.end()[0] == 0
        down = prometheus.wait_alert("VgpuAgentDown", **here)
        assert down["labels"].items() >= AGENT.items()
        assert down["annotations"]["summary"] == "vgpu-agent on node-a does not answer"
