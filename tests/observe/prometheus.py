"""A real Prometheus on loopback, and pages for it to scrape."""

import json
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart import helm
from tests.observe.rules import ALERTS

PATIENCE = 60.0
"""Seconds for what takes two or three: the machine may be busy."""


class Prometheus:
    """A Prometheus on loopback, asked over its HTTP API."""

    def __init__(self, binary: str, directory: Path, config: dict[str, Any], lookback: str) -> None:
        (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
        self._log = directory / "log"
        self.port = free_port()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [
                    binary,
                    f"--config.file={directory / 'prometheus.yml'}",
                    f"--storage.tsdb.path={directory / 'data'}",
                    f"--web.listen-address=127.0.0.1:{self.port}",
                    f"--query.lookback-delta={lookback}",
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


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def prometheus_of(
    jobs: list[dict[str, Any]], *, rules: Path = ALERTS, interval: str = "1s", lookback: str = "5m"
) -> Iterator[Prometheus]:
    """Scrapes and evaluates once in each interval. Skips the test where there is no Prometheus."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("prometheus is not installed (Debian: package prometheus)")
    times = ("scrape_interval", "scrape_timeout", "evaluation_interval")
    config = {
        "global": dict.fromkeys(times, interval),
        "rule_files": [str(rules)],
        "scrape_configs": jobs,
    }
    with tempfile.TemporaryDirectory(prefix="vgpu-") as directory:
        for attempt in range(3):
            place = Path(directory, str(attempt))
            place.mkdir()
            prometheus = Prometheus(binary, place, config, lookback)
            try:
                if prometheus.ready():
                    yield prometheus
                    return
            finally:
                prometheus.close()
        raise AssertionError((place / "log").read_text())


@cache
def _endpoint() -> dict[str, Any]:
    """What the chart's PodMonitor says of the scrape."""
    values = {"monitoring": {"podMonitor": {"enabled": True}}}
    (monitor,) = [each for each in helm.render(values) if each["kind"] == "PodMonitor"]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    return endpoint


def _relabeling(rule: dict[str, Any]) -> dict[str, Any]:
    """A rule of a PodMonitor, as the Prometheus operator hands it on."""
    return {re.sub("[A-Z]", lambda big: "_" + big[0].lower(), name): v for name, v in rule.items()}


def job(name: str, *, honor: bool = True, **discovery: object) -> dict[str, Any]:
    """A scrape as the chart's PodMonitor comes out; without `honor` as where it is overridden."""
    endpoint = _endpoint()
    return {
        "job_name": name,
        "honor_labels": endpoint["honorLabels"] and honor,
        "relabel_configs": [_relabeling(rule) for rule in endpoint["relabelings"]],
        "metric_relabel_configs": [_relabeling(rule) for rule in endpoint["metricRelabelings"]],
        **discovery,
    }


def target(port: int, *, pod: str, node: str, **labels: str) -> dict[str, Any]:
    """A pod that is discovered."""
    known = {
        "namespace": "gpu-system",
        "pod": pod,
        "container": "agent",
        "endpoint": "metrics",
        "__meta_kubernetes_pod_node_name": node,
    }
    return {"targets": [f"127.0.0.1:{port}"], "labels": known | labels}


@contextmanager
def serving(texts: Mapping[str, str | None]) -> Iterator[int]:
    """The port on which these texts are served, by path; where there is none, an error."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = texts[self.path]
            body = (text or "").encode()
            self.send_response(503 if text is None else 200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()
