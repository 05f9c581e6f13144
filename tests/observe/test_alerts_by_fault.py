"""Each fault makes exactly the alerts that docs/runbook.md says, judged by `promtool test rules`
with the waits as they are; test_prometheus.py has a real Prometheus judge the same.
"""

import json
import shutil
import subprocess
from collections import Counter

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.observe.machine import Page
from tests.observe.rules import ALERTS, alerts
from tests.observe.scenarios import FIRED, SCENARIOS, TARGET, Scenario, pages

SEVERITY = {each["alert"]: each["labels"]["severity"] for each in alerts()}


def scraped(page: Page) -> dict[str, float]:
    """What is stored of a scrape, as a PodMonitor with honorLabels makes it: series and value."""
    target = {**TARGET, "pod": page.pod}
    samples = [("up", {}, float(page.text is not None))]
    for family in text_string_to_metric_families(page.text or ""):
        samples += [(each.name, each.labels, each.value) for each in family.samples]
    found = {}
    for name, own, value in samples:
        labels = sorted((target | own).items())
        found[f"{name}{{{','.join(f'{k}={json.dumps(v)}' for k, v in labels)}}}"] = value
    return found


def history(of: Scenario) -> dict[str, str]:
    """Each series with its values in the notation of promtool: a sample a minute."""
    minutes = [scraped(page) for page in pages(of)]
    values: dict[str, list[str]] = {name: [] for minute in minutes for name in minute}
    for minute in minutes:
        for name, known in values.items():
            if name in minute:
                known.append(repr(minute[name]))
            else:  # a series that ends is marked so once
                known.append("stale" if known and known[-1] not in ("_", "stale") else "_")
    return {name: " ".join(known) for name, known in values.items()}


@pytest.mark.slow
@pytest.mark.timeout(400)  # promtool reckons for half a minute
def test_every_fault_makes_exactly_its_alerts(tmp_path):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: package prometheus)")
    tests = [
        {
            "name": of.name,
            "interval": "1m",
            "input_series": [
                {"series": name, "values": values} for name, values in history(of).items()
            ],
            "promql_expr_test": [
                {
                    "expr": FIRED,
                    "eval_time": f"{len(pages(of)) - 1}m",
                    "exp_samples": [
                        {"labels": f'{{alertname="{name}"}}', "value": count}
                        for name, count in Counter(of.fires).items()
                    ],
                }
            ],
        }
        for of in SCENARIOS
    ]
    cases = tmp_path / "cases.yaml"
    rules = {"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": tests}
    cases.write_text(json.dumps(rules))
    done = subprocess.run(
        [promtool, "test", "rules", cases], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("of", SCENARIOS, ids=lambda each: each.name)
def test_no_fault_pages_twice(of):
    assert [SEVERITY[name] for name in of.fires].count("critical") <= 1
