"""The alerts, their runbook and the dashboards, as far as they can be judged without a Prometheus.

Names and labels are found in PromQL by pattern; that every query is answered, and with data, is
seen by a real Prometheus in test_prometheus.py.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.observe.rules import (
    ALERTS,
    DASHBOARDS,
    EXPORTED,
    RUNBOOK,
    TARGET_LABELS,
    alert_tests,
    alerts,
    dashboard,
    metric_labels,
    panels,
    queries,
    recorded,
    runbook_of,
    variable_queries,
)

NAMES = [alert["alert"] for alert in alerts()]
BOARDS = pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)


@pytest.fixture
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed (Debian: package prometheus)")
    return found


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Alerts


@pytest.mark.slow
def test_promtool_takes_the_rules(promtool):
    rules = len(NAMES) + len(recorded())
    assert f"SUCCESS: {rules} rules found" in run(promtool, "check", "rules", str(ALERTS))


@pytest.mark.slow
def test_every_alert_fires_and_stays_quiet_as_its_cases_say(promtool, tmp_path):
    cases = tmp_path / "cases.yaml"
    cases.write_text(yaml.safe_dump(alert_tests()))
    run(promtool, "test", "rules", str(cases))


def test_every_alert_has_cases_in_which_it_fires_and_in_which_it_does_not():
    tests = alert_tests()["tests"]
    assert [test["name"] for test in tests] == NAMES
    for test in tests:
        fires = [bool(case["exp_alerts"]) for case in test["alert_rule_test"]]
        assert set(fires) == {True, False}, test["name"]


@pytest.mark.parametrize("alert", alerts(), ids=NAMES)
def test_an_alert_says_how_bad_it_is_what_it_means_and_where_to_read_on(alert):
    assert re.fullmatch(r"Vgpu([A-Z][a-z]+)+", alert["alert"])
    assert alert["labels"].keys() == {"severity"}
    assert alert["labels"]["severity"] in ("critical", "warning", "info")
    annotations = alert["annotations"]
    assert annotations.keys() == {"summary", "description", "runbook"}
    assert annotations["runbook"] == runbook_of(alert["alert"])
    assert annotations["description"].endswith(".")
    assert not annotations["summary"].endswith(".")


@pytest.mark.parametrize("alert", alerts(), ids=NAMES)
def test_an_alert_goes_on_when_the_pod_of_the_agent_is_replaced(alert):
    """It has no label that the new pod has another of, and bridges the time in between."""
    if alert["alert"] == "VgpuAgentDown":
        return  # is about the pod
    if "vgpu_container_memory_" not in alert["expr"]:  # whose pod is the holder
        assert re.match(
            r"(sum|max|count) (without \([^)]*\bpod\)|by \((cluster|resource|, )+\))", alert["expr"]
        )
    if alert["labels"]["severity"] == "critical" or alert["alert"] == "VgpuGpuGone":
        assert alert["keep_firing_for"] in ("5m", "10m")


def test_the_wait_of_an_alert_has_its_reason_beside_it_or_above_it():
    lines = ALERTS.read_text().splitlines()
    for number, line in enumerate(lines):
        if line.lstrip().startswith("for:"):
            above = "\n".join(lines[number - 6 : number]).rpartition("- alert:")[2]
            assert "#" in line or "#" in above, line


def test_the_runbook_has_a_section_for_each_alert_in_their_order():
    text = RUNBOOK.read_text()
    assert re.findall(r"^## (\w+)$", text, re.MULTILINE) == NAMES
    for section in text.partition("\n## What a fault looks like")[0].split("\n## ")[1:]:
        for word in ("Means", "Impact", "Look", "Clears"):
            assert f"- **{word}**: " in section, section.splitlines()[0]


def test_every_link_of_the_runbook_has_an_end():
    for link in re.findall(r"\]\(([^)]+)\)", RUNBOOK.read_text()):
        file, _, anchor = link.partition("#")
        text = (RUNBOOK.parent / file).read_text() if file else RUNBOOK.read_text()
        headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}
        assert not anchor or anchor in anchors, link


def test_the_rules_are_no_template_of_helm():
    """They are included as they are: what is in braces is Prometheus's."""
    name = r"\$labels\.\w+"
    asked = (
        rf'(?:with|range)\s+printf\s+"(?:\\.|[^"\\])+"(?: {name})+\s+\| query'
        r'(?: \| sortByLabel "\w+")?'
    )
    ours = (
        rf"(?:(?:or|with) )?(?:{name} ?)+|{asked}|\. \| first \| value|\.Labels\.\w+"
        r"|else|end|\.|\$value(?: \| .+)?"
    )
    for inside in re.findall(r"{{(.*?)}}", ALERTS.read_text(), re.DOTALL):
        assert re.fullmatch(ours, inside.strip()), inside


# Names and labels


def identifiers(expr: str) -> set[str]:
    """The names of our metrics in a query."""
    return set(re.findall(r"\bvgpu_\w+", re.sub(r'"[^"]*"', "", expr)))


def matched(expr: str) -> list[tuple[str, str]]:
    """Each metric of a query with each label that it is selected by."""
    return [
        (metric, label)
        for metric, inside in re.findall(r"\b(vgpu_\w+){([^}]*)}", expr)
        for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", re.sub(r'"[^"]*"', '""', inside))
    ]


def grouped(expr: str) -> set[str]:
    """The labels that a query groups or joins by."""
    clauses = re.findall(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)", expr)
    return {label.strip() for clause in clauses for label in clause.split(",") if label.strip()}


def check(expr: str, words: str = "") -> None:
    """Raises AssertionError where a query, or what is said of its result, has names of nothing."""
    known = metric_labels()
    names = identifiers(expr)
    assert names <= known.keys(), names - known.keys()
    for metric, label in matched(expr):
        assert label in known[metric] | TARGET_LABELS, (metric, label)
    labels = set().union(TARGET_LABELS, EXPORTED, *(known[name] for name in names))
    said = {
        *grouped(expr),
        *re.findall(r"{{(\w+)}}", words),
        *re.findall(r"\$labels\.(\w+)", words),
    }
    assert said <= labels, said - labels


def asked_in(words: str) -> list[tuple[str, list[str]]]:
    """Each query that a text is filled in from, with the labels that are shown of its result."""
    asked = r'printf\s+"((?:\\.|[^"\\])+)"[^}]*}}(.*?){{\s*(?:else|end)\s*}}'
    return [
        (query.replace("%q", '"x"').replace("\\", ""), re.findall(r"\.Labels\.(\w+)", shown))
        for query, shown in re.findall(asked, words, re.DOTALL)
    ]


@pytest.mark.parametrize("alert", alerts(), ids=NAMES)
def test_an_alert_speaks_of_metrics_and_labels_that_there_are(alert):
    words = " ".join(alert["annotations"].values())
    check(alert["expr"], words)
    for query, shown in asked_in(words):
        check(query, " ".join(f"$labels.{label}" for label in shown))
    # What a reader is to run.
    check(re.sub(r"{{.*?}}", "x", words))


@pytest.mark.parametrize("alert", alerts(), ids=NAMES)
def test_an_alert_that_pages_counts_the_pods_and_has_the_query_that_lists_them(alert):
    if alert["labels"]["severity"] != "critical":
        return
    words = alert["annotations"]["description"]
    counted = [query for query, _ in asked_in(words) if query.startswith("count(count by")]
    assert counted
    assert re.search(r"listed by (last_over_time\()?vgpu_allocation_info{instance=", words)
    assert "node $labels.instance" in " ".join(alert["annotations"].values())
    if "gpu_uuid" in grouped(alert["expr"]) and "without (gpu_uuid" not in alert["expr"]:
        assert "$labels.gpu_index" in alert["annotations"]["summary"]
        assert "gpu_uuid=%q" in words


@pytest.mark.parametrize("name", recorded())
def test_what_is_recorded_speaks_of_metrics_that_there_are_and_is_used(name):
    check(recorded()[name])
    assert any(name in alert["expr"] for alert in alerts())


def test_no_alert_asks_for_what_is_not_recorded():
    for alert in alerts():
        assert set(re.findall(r"\bvgpu:[\w:]+", alert["expr"])) <= recorded().keys()


@BOARDS
def test_a_dashboard_speaks_of_metrics_and_labels_that_there_are(path):
    for query in queries(path):
        check(query.expr.replace("$__rate_interval", "5m"), query.legend)
    for _, metric, label in variable_queries(path):
        assert label in metric_labels()[metric] | TARGET_LABELS


def test_every_metric_is_in_an_alert_or_on_a_dashboard():
    shown = [alert["expr"] for alert in alerts()]
    shown += [query.expr for path in DASHBOARDS for query in queries(path)]
    unseen = metric_labels().keys() - identifiers(" ".join(shown))
    assert unseen == {"vgpu_rpc_duration_seconds_sum"}  # its histogram is shown by quantiles


# Dashboards


def test_there_are_two_dashboards_each_with_an_address_of_its_own():
    assert [path.stem for path in DASHBOARDS] == ["fleet", "node"]
    assert [dashboard(path)["uid"] for path in DASHBOARDS] == ["vgpu-fleet", "vgpu-node"]


@BOARDS
def test_a_dashboard_is_written_with_an_indent_of_two(path):
    text = path.read_text()
    assert text == json.dumps(json.loads(text), indent=2, ensure_ascii=False) + "\n"


@BOARDS
def test_panels_have_ids_of_their_own_and_do_not_overlap(path):
    board = dashboard(path)
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    covered: dict[tuple[int, int], str] = {}
    for panel in board["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert (x, y) not in covered, (panel["title"], covered.get((x, y)))
                covered[x, y] = panel["title"]


@BOARDS
def test_every_panel_says_what_it_shows_and_in_which_unit(path):
    titles = [panel["title"] for panel in panels(dashboard(path))]
    assert len(set(titles)) == len(titles)
    for panel in panels(dashboard(path)):
        assert panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["type"] in ("stat", "timeseries", "table", "state-timeline")
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs) > 0


@BOARDS
def test_units_are_those_of_the_metrics(path):
    for panel in panels(dashboard(path)):
        if panel["type"] != "timeseries":
            continue
        unit = panel["fieldConfig"]["defaults"]["unit"]
        for expr in (target["expr"] for target in panel["targets"]):
            if "count" in expr or " / " in expr:
                assert unit in ("none", "reqps", "percentunit"), panel["title"]
            elif re.search(r"vgpu_\w*_bytes", expr):
                assert unit == "bytes", panel["title"]
            elif re.search(r"vgpu_\w*_seconds", expr):
                assert unit == "s", panel["title"]


@BOARDS
def test_all_data_comes_from_the_one_data_source_that_is_chosen(path: Path):
    board = dashboard(path)
    for panel in panels(board):
        for each in (panel, *panel["targets"]):
            assert each["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    names = {variable["name"] for variable in board["templating"]["list"]}
    assert "datasource" in names
    used = set(re.findall(r"\$(\w+)", " ".join(query.expr for query in queries(path))))
    assert used - {"__rate_interval"} == names - {"datasource"}
