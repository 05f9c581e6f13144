"""A real Prometheus that scrapes a real agent, with our alerts loaded.

It scrapes with `honor_labels` and the target labels that a PodMonitor attaches. A second target is
a page on which every metric has something to say: a node under MPS with pods that use its GPUs, a
fault, and an excluded GPU.
"""

import json
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from tests.agent_process import Agent, running
from tests.kubelet.podresources_peer import Pod, PodResourcesPeer, encoded
from tests.kubelet.rig import RESOURCE
from tests.kubelet_peer import KubeletPeer
from tests.observe.rules import (
    ALERTS,
    DASHBOARDS,
    RESNET,
    alerts,
    full_text,
    queries,
    variable_queries,
)

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("prometheus")]

AGENT = {
    "namespace": "gpu-system",
    "pod": "vgpu-agent-x7k2p",
    "container": "agent",
    "endpoint": "metrics",
    "node": "node-a",
}
NAMES = {"namespace": RESNET.namespace, "pod": RESNET.pod, "container": RESNET.container}
GONE = "::99"
"""Ends the ID of a vGPU that no GPU has."""

PATIENCE = 60.0
"""Seconds for what takes two or three: the machine may be busy."""

NO_DATA = {
    "vgpu_gpu_unread": "a simulated GPU says all there is",
    "vgpu_container_memory_used_bytes": "no process runs on a simulated GPU",
    "vgpu_container_processes": "no process runs on a simulated GPU",
    "vgpu_unattributed_processes": "no process runs on a simulated GPU",
    "vgpu_xid_errors_total": "a simulated GPU of `run` has no fault",
    "vgpu_health_transitions_total": "a simulated GPU of `run` has no fault",
    "vgpu_gpu_unhealthy_reason": "the panel shows those that are 1, and there is no fault",
}
"""What the node's dashboard cannot show of the agent of this test, and why."""


class Prometheus:
    """A Prometheus on loopback, asked over its HTTP API."""

    def __init__(self, binary: str, directory: Path, config: dict[str, Any]) -> None:
        (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
        self._log = directory / "log"
        self.port = _free_port()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [
                    binary,
                    f"--config.file={directory / 'prometheus.yml'}",
                    f"--storage.tsdb.path={directory / 'data'}",
                    f"--web.listen-address=127.0.0.1:{self.port}",
                    "--log.level=warn",
                ],
                stdout=log,
                stderr=log,
            )

    def ready(self) -> bool:
        """Waits until it answers; False where it ended, such as for a port that was taken."""
        until = time.monotonic() + PATIENCE
        while self._process.poll() is None:
            try:
                url = f"http://127.0.0.1:{self.port}/-/ready"
                with urllib.request.urlopen(url, timeout=5):
                    return True
            except urllib.error.HTTPError as error:
                error.close()
            except OSError:
                pass
            assert time.monotonic() < until, self._log.read_text()
            time.sleep(0.05)
        return False

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an answer; an error of the API fails the test with its words."""
        query = urllib.parse.urlencode(parameters)
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{query}"
        try:
            with urllib.request.urlopen(url, timeout=10) as reply:
                return json.load(reply)["data"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{parameters}: {error.read().decode()}") from error

    def query(self, expr: str) -> list[dict[str, Any]]:
        return self.get("query", query=expr)["result"]

    def wait(self, what: str, condition: Callable[[], Any]) -> Any:
        """The first true value of `condition`."""
        until = time.monotonic() + PATIENCE
        while not (found := condition()):
            assert time.monotonic() < until, f"not within {PATIENCE} s: {what}"
            time.sleep(0.1)
        return found

    def wait_query(self, expr: str) -> list[dict[str, Any]]:
        """The first answer that is not empty."""
        return self.wait(expr, lambda: self.query(expr))

    def wait_alert(self, name: str, **labels: str) -> dict[str, Any]:
        """The alert of that name and with at least those labels, pending or firing."""

        def found() -> dict[str, Any] | None:
            wanted = {"alertname": name, **labels}.items()
            active = self.get("alerts")["alerts"]
            return next((each for each in active if wanted <= each["labels"].items()), None)

        return self.wait(f"{name} {labels}", found)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def prometheus_of(binary: str, jobs: list[dict[str, Any]]) -> Iterator[Prometheus]:
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(ALERTS)],
        "scrape_configs": jobs,
    }
    with tempfile.TemporaryDirectory(prefix="vgpu-") as directory:
        for attempt in range(3):
            place = Path(directory, str(attempt))
            place.mkdir()
            prometheus = Prometheus(binary, place, config)
            try:
                if prometheus.ready():
                    yield prometheus
                    return
            finally:
                prometheus.close()
        raise AssertionError((place / "log").read_text())


def job(name: str, port: int, **labels: str) -> dict[str, Any]:
    """As a PodMonitor with honorLabels comes out."""
    return {
        "job_name": name,
        "honor_labels": True,
        "static_configs": [{"targets": [f"127.0.0.1:{port}"], "labels": labels}],
    }


@contextmanager
def page(text: bytes) -> Iterator[int]:
    """The port on which that text is served."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@dataclass
class Scene:
    """A Prometheus, an agent with its kubelet, and the instance of the page of all metrics."""

    prometheus: Prometheus
    agent: Agent
    kubelet: KubeletPeer
    pods: PodResourcesPeer
    full: str

    @property
    def instance(self) -> str:
        return f"127.0.0.1:{self.agent.port}"

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
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("prometheus is not installed (Debian: package prometheus)")
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vgpu-")))
        kubelet = stack.enter_context(KubeletPeer(directory))
        pods = PodResourcesPeer(directory)
        pods.start()
        stack.callback(pods.stop)
        settings = {"VGPU_RESOURCE_NAME": RESOURCE, "VGPU_PODRESOURCES_INTERVAL": "1"}
        agent = stack.enter_context(running(directory, **settings))
        kubelet.wait_list(1)
        full = stack.enter_context(page(full_text("other.example.com/vgpu")))
        jobs = [
            job("gpu-system/agents", agent.port, **AGENT),
            job("elsewhere/agents", full, **{**AGENT, "node": "node-b"}),
        ]
        prometheus = stack.enter_context(prometheus_of(binary, jobs))
        it = Scene(prometheus, agent, kubelet, pods, f"127.0.0.1:{full}")
        it.hold(*it.vgpus[:2])
        kubelet.preferred(it.vgpus, [], 1)
        kubelet.allocate(it.vgpus[:2])
        yield it


@pytest.fixture(scope="module")
def shared() -> Iterator[Scene]:
    """A scene that the tests leave as it is."""
    with scene() as it:
        it.prometheus.wait_query(f'vgpu_allocation_info{{instance="{it.instance}"}}')
        it.prometheus.wait_query(f'vgpu_build_info{{instance="{it.full}"}}')
        yield it


def test_the_agent_is_scraped_with_the_labels_of_its_pod(shared):
    (up,) = shared.prometheus.query(f'up{{instance="{shared.instance}"}} == 1')
    assert up["metric"].items() >= AGENT.items()
    targets = shared.prometheus.get("targets")["activeTargets"]
    assert [(each["health"], each["lastError"]) for each in targets] == [("up", "")] * 2


def test_what_is_said_of_a_container_carries_its_own_names_and_not_the_agents(shared):
    of_agent = f'{{instance="{shared.instance}"}}'
    for metric in (
        "vgpu_allocation_info",
        "vgpu_allocation_memory_share_bytes",
        "vgpu_allocation_process_memory_limit_bytes",
    ):
        for found in shared.prometheus.wait_query(metric + of_agent):
            labels = found["metric"]
            assert labels.items() >= {**NAMES, "node": "node-a"}.items()
            assert not [name for name in labels if name.startswith("exported_")]
    # What is said of the node carries the agent's.
    (connected,) = shared.prometheus.wait_query("vgpu_kubelet_connected" + of_agent)
    assert connected["metric"].items() >= AGENT.items()


def test_every_rule_is_evaluated_without_an_error(shared):
    def evaluated() -> list[dict[str, Any]] | None:
        groups = shared.prometheus.get("rules")["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        return None if any(rule["health"] == "unknown" for rule in rules) else rules

    rules = shared.prometheus.wait("every rule evaluated", evaluated)
    assert {each["name"]: (each["health"], each.get("lastError", "")) for each in rules} == {
        each["alert"]: ("ok", "") for each in alerts()
    }


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
        shared.prometheus.wait_query(filled_in(query.expr, shared.full))
    for _, metric, label in variable_queries(path):
        assert shared.prometheus.get(f"label/{label}/values", **{"match[]": metric})


def test_the_dashboard_of_the_node_shows_the_agent_except_for_what_its_gpus_cannot_have(shared):
    (path,) = [path for path in DASHBOARDS if path.stem == "node"]
    for query in queries(path):
        expr = filled_in(query.expr, shared.instance)
        if any(metric in expr for metric in NO_DATA):
            shared.prometheus.query(expr)
        else:
            shared.prometheus.wait_query(expr)


def test_a_container_with_more_than_its_share_is_reported_by_its_own_names(shared):
    alert = shared.prometheus.wait_alert("VgpuContainerOverShare", instance=shared.full, **NAMES)
    assert alert["state"] == "pending"
    assert "resnet-1" in alert["annotations"]["summary"]
    assert "on node-b" in alert["annotations"]["description"]


def test_what_happens_on_the_node_is_seen_in_the_alerts_and_the_series_of_a_pod_end_with_it():
    with scene() as it:
        prometheus, here = it.prometheus, {"instance": it.instance}
        holders = f'vgpu_allocation_info{{instance="{it.instance}"}}'
        free = f'vgpu_largest_free_share{{instance="{it.instance}"}}'
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
        assert refused["labels"].items() >= AGENT.items()
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
