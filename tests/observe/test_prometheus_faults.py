"""Each fault makes exactly its alerts in a real Prometheus, in which a minute is a second."""

import json
import re
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from tests.observe.prometheus import job, prometheus_of, serving, target
from tests.observe.rules import ALERTS
from tests.observe.scenarios import AFTER, BEFORE, FIRED, NODE, SCENARIOS, pages

pytestmark = [pytest.mark.slow, pytest.mark.ci, pytest.mark.timeout(300)]


def hurried(rules: str) -> str:
    """The rules with each of their times a sixtieth of what it is."""
    seconds = {"m": 60, "h": 3600, "d": 86400}
    return re.sub(
        r"(\[|for: |offset )(\d+)([mhd])\b",
        lambda it: f"{it[1]}{int(it[2]) * seconds[it[3]] * 1000 // 60}ms",
        rules,
    )


def test_every_fault_makes_exactly_its_alerts_in_a_real_prometheus(tmp_path: Path) -> None:
    """Each scenario is a fleet of its own, a cluster of one node."""
    rules, targets = tmp_path / "rules.yaml", tmp_path / "targets.json"
    rules.write_text(hurried(ALERTS.read_text()))
    texts: dict[str, str | None] = {}
    wanted = {of.name: dict(Counter(of.fires)) for of in SCENARIOS}

    def show(minute: int, port: int) -> None:
        found = []
        for of in SCENARIOS:
            page = pages(of)[minute]
            texts[f"/{of.name}"] = page.text
            path = {"__metrics_path__": f"/{of.name}", "cluster": of.name}
            found.append(target(port, pod=page.pod, node=NODE, **path))
        text = json.dumps(found)
        if not targets.exists() or targets.read_text() != text:
            made = tmp_path / "new.json"
            made.write_text(text)
            made.replace(targets)

    discovered = job(
        "agents", file_sd_configs=[{"files": [str(targets)], "refresh_interval": "1s"}]
    )
    with serving(texts) as port:
        show(0, port)
        with prometheus_of([discovered], rules=rules, interval="500ms", lookback="5s") as it:
            it.wait("every target scraped", lambda: len(it.query("up == 1")) == len(SCENARIOS))

            def fired() -> dict[str, dict[str, int]]:
                by_cluster = defaultdict[str, dict[str, int]](dict, {n: {} for n in wanted})
                for each in it.query(FIRED.replace("(alertname)", "(cluster, alertname)")):
                    labels = each["metric"]
                    by_cluster[labels["cluster"]][labels["alertname"]] = int(each["value"][1])
                return dict(by_cluster)

            start = time.monotonic()
            for minute in range(1, len(pages(SCENARIOS[0]))):
                time.sleep(max(0, start + minute - time.monotonic()))
                show(minute, port)
                # A scrape that a busy machine misses makes an alert wait again.
                if minute >= BEFORE + AFTER and fired() == wanted:
                    break
            assert fired() == wanted
