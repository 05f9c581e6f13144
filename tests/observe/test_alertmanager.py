"""The inhibit rules of docs/alerts.md, in a real Alertmanager."""

import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.agent_process import REPOSITORY
from tests.observe.prometheus import PATIENCE, free_port
from tests.observe.rules import TARGET_LABELS, alerts, metric_labels

DOCUMENT = (REPOSITORY / "docs/alerts.md").read_text("utf-8")
NAMES = {alert["alert"] for alert in alerts()}


def documented(key: str) -> Any:
    """The block of YAML in the document that begins with this key."""
    (block,) = re.findall(rf"```yaml\n({key}:\n.*?)```", DOCUMENT, re.DOTALL)
    return yaml.safe_load(block)


RULES = documented("inhibit_rules")["inhibit_rules"]
CONFIG = {
    "route": {"receiver": "nobody"},
    "receivers": [{"name": "nobody"}],
    "inhibit_rules": RULES,
}


def matched(matchers: list[str]) -> set[str]:
    """The names of our alerts that these matchers take."""
    found = set(NAMES)
    for matcher in matchers:
        parts = re.fullmatch(r'alertname (=~|!=|=) "?([^"]+)"?', matcher)
        assert parts, matcher
        how, what = parts.groups()
        takes = re.compile(what if how == "=~" else re.escape(what)).fullmatch
        found = {name for name in found if bool(takes(name)) is (how != "!=")}
    return found


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["source_matchers"][0])
def test_an_inhibit_rule_is_about_alerts_and_labels_that_there_are(rule):
    assert matched(rule["target_matchers"])
    assert "KubeNodeNotReady" in rule["source_matchers"][0] or matched(rule["source_matchers"])
    known = set().union(TARGET_LABELS, *metric_labels().values())
    assert set(rule["equal"]) <= known


@contextmanager
def alertmanager(directory: Path) -> Iterator[str]:
    """The address of one with the documented rules."""
    binary = shutil.which("prometheus-alertmanager")
    if binary is None:
        pytest.skip("Alertmanager is not installed (Debian: package prometheus-alertmanager)")
    config, log = directory / "alertmanager.yml", directory / "log"
    config.write_text(yaml.safe_dump(CONFIG))
    subprocess.run(["amtool", "check-config", config], check=True, capture_output=True, timeout=30)
    port = free_port()
    command = [
        binary,
        f"--config.file={config}",
        f"--storage.path={directory / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--cluster.listen-address=",
    ]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as it:
        try:
            yield f"http://127.0.0.1:{port}/api/v2/alerts"
        finally:
            it.kill()


def exchange(address: str, alerts: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """The alerts that there are, or those that are to be there."""
    data = None if alerts is None else json.dumps(alerts).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as reply:
        return json.loads(reply.read() or b"[]")


NODE = {"job": "gpu/vgpu", "instance": "node-a", "node": "node-a"}
GPU = {**NODE, "gpu_uuid": "GPU-a"}
OTHER_GPU = {**NODE, "gpu_uuid": "GPU-b"}
OTHER_NODE = {"job": "gpu/vgpu", "instance": "node-b", "node": "node-b"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "labels", "quiet", "loud"),
    [
        (
            "KubeNodeNotReady",
            {"node": "node-a"},
            [("VgpuAgentDown", NODE), ("VgpuGpuUnhealthy", GPU)],
            [("VgpuAgentDown", OTHER_NODE)],
        ),
        (
            "VgpuAgentDown",
            NODE,
            [("VgpuGpuUnhealthy", GPU), ("VgpuMpsDown", NODE)],
            [("VgpuMpsDown", OTHER_NODE), ("VgpuExhausted", {"resource": "vgpu"})],
        ),
        (
            "VgpuDriverDown",
            NODE,
            [("VgpuGpuUnhealthy", GPU), ("VgpuMpsDown", NODE), ("VgpuNoGpus", NODE)],
            [("VgpuKubeletDisconnected", NODE), ("VgpuGpuUnhealthy", {**GPU, **OTHER_NODE})],
        ),
        (
            "VgpuKubeletDisconnected",
            NODE,
            [("VgpuPodResourcesDown", NODE), ("VgpuRegistrationUnstable", NODE)],
            [("VgpuGpuUnhealthy", GPU)],
        ),
        (
            "VgpuMpsDown",
            NODE,
            [("VgpuMpsUnwatched", NODE), ("VgpuMpsBusy", GPU)],
            [("VgpuGpuUnhealthy", GPU)],
        ),
        (
            "VgpuGpuUnhealthy",
            GPU,
            [("VgpuXidsRising", {**GPU, "xid": "79"}), ("VgpuMpsServersFailing", GPU)],
            [
                ("VgpuXidsRising", OTHER_GPU),
                ("VgpuMpsServersFailing", OTHER_GPU),
                ("VgpuKubeletDisconnected", NODE),
            ],
        ),
        (
            "VgpuExhausted",
            {"resource": "vgpu"},
            [("VgpuNodeFull", {**NODE, "resource": "vgpu"})],
            [("VgpuNodeFull", {**NODE, "resource": "other"})],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_alertmanager_keeps_quiet_what_an_alert_explains(source, labels, quiet, loud, tmp_path):
    made = [{"labels": {"alertname": name, **of}} for name, of in [(source, labels), *quiet, *loud]]
    with alertmanager(tmp_path) as address:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                exchange(address, made)
                found = exchange(address)
            except (OSError, urllib.error.HTTPError):
                found = []
            suppressed = [a["labels"] for a in found if a["status"]["state"] == "suppressed"]
            if len(suppressed) == len(quiet) or time.monotonic() > until:
                break
            time.sleep(0.2)
    assert len(found) == len(made), (tmp_path / "log").read_text()
    wanted = [{"alertname": name, **of} for name, of in quiet]
    assert {frozenset(each.items()) for each in suppressed} == {
        frozenset(each.items()) for each in wanted
    }
