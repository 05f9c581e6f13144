"""What people give the chart by `--set`, files and parent charts, and what comes of it."""

import json
from typing import Any

import pytest
import yaml

from tests.chart import helm, values_table
from tests.chart.helm import CHART, CI, Object, containers, environment, of_kind, pod

pytestmark = pytest.mark.slow

LINUX = {"kubernetes.io/os": "linux"}


def workloads(*sets: str, **values: Any) -> list[Object]:
    """The DaemonSets of these values: the agent's, then that of MPS."""
    return list(of_kind(helm.render(values, sets=sets), "DaemonSet").values())


def variables(*sets: str, **values: Any) -> dict[str, str]:
    """The agent's environment."""
    return environment(containers(workloads(*sets, **values)[0])["agent"])


# Numbers that are text, and text that is a number


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        # helm makes text of 1.5, and numbers of 0, 2 and 8589934592.
        (["mps.threads=1.5"], {"MPS_THREADS": "1.5"}),
        (["mps.threads=2"], {"MPS_THREADS": "2"}),
        (["health.interval=2.5", "health.driverWait=90.25"], {"HEALTH_INTERVAL": "2.5"}),
        (["health.interval=10"], {"HEALTH_INTERVAL": "10"}),
        (["podResourcesInterval=1.5"], {"PODRESOURCES_INTERVAL": "1.5"}),
        (["memoryReserved=0"], {"MEMORY_RESERVED": "0"}),
        (["memoryReserved=1.5Gi"], {"MEMORY_RESERVED": "1.5Gi"}),
        (["deviceMemory=8589934592"], {"DEVICE_MEMORY": "8589934592"}),
        (["health.lostCardSeconds=31536000"], {"LOST_CARD_SECONDS": "31536000"}),
        (["health.criticalXids={43,1000000}"], {"CRITICAL_XIDS": "43,1000000"}),
        (["replicasByGpu.0=4"], {"REPLICAS_BY_GPU": '{"0":4}'}),
        (["replicas=4", "sharing=time-slicing"], {"REPLICAS": "4"}),
    ],
    ids=lambda each: each[0] if isinstance(each, list) else "",
)
def test_numbers_arrive_as_they_were_set(sets: list[str], expected: dict[str, str]) -> None:
    found = variables(*sets)
    assert {name: found[f"VGPU_{name}"] for name in expected} == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"memoryReserved": 0}, {"MEMORY_RESERVED": "0"}),
        ({"memoryReserved": "0"}, {"MEMORY_RESERVED": "0"}),
        ({"deviceMemory": 8589934592}, {"DEVICE_MEMORY": "8589934592"}),
        ({"health": {"interval": "2.5"}}, {"HEALTH_INTERVAL": "2.5"}),
        ({"health": {"lostCardSeconds": 31536000}}, {"LOST_CARD_SECONDS": "31536000"}),
    ],
)
def test_and_as_files_have_them(values: Object, expected: dict[str, str]) -> None:
    found = variables(**values)
    assert {name: found[f"VGPU_{name}"] for name in expected} == expected


@pytest.mark.parametrize(
    ("set_", "words"),
    [
        ("mps.threads=0", ["mps.threads"]),
        ("mps.threads=0.0", ["mps.threads"]),
        ("mps.threads=half", ["mps.threads"]),
        ("health.interval=0.5", ["health.interval", "Does not match pattern"]),
        ("health.interval=0", ["health.interval", "greater than or equal to 1"]),
        ("memoryReserved=-1", ["memoryReserved"]),
        ("deviceMemory=1000", ["deviceMemory", "greater than or equal to 1.048576e+06"]),
        ("replicas=1.5", ["replicas", "Expected: [integer,null], given: string"]),
    ],
)
def test_numbers_out_of_bounds_are_refused_as_text_too(set_: str, words: list[str]) -> None:
    message = helm.refusal({}, set_)
    for each in words:
        assert each in message


def test_names_and_labels_that_are_numbers_or_switches_are_text() -> None:
    sets = [
        "nameOverride=12",
        "commonLabels.team=7",
        "podLabels.on=true",
        "podAnnotations.build=1000000",
        "serviceAccount.name=34",
        "serviceAccount.annotations.role=5",
        "priorityClassName=56",
        "runtimeClassName=78",
        "nodeSelector.gpu=true",
        "image.tag=90",
        "pools[0].name=1",
        "monitoring.podMonitor.enabled=true",
        "monitoring.podMonitor.labels.release=2",
        "monitoring.dashboards.enabled=true",
        "monitoring.dashboards.annotations.folder=3",
    ]
    # A file has numbers as helm reads YAML: with a fraction inside.
    values = {"podLabels": {"large": 1234567}, "podAnnotations": {"off": False}}
    objects = helm.render(values, sets=sets)
    for each in objects:
        metadata = each["metadata"]
        assert metadata["labels"]["team"] == "7"
        assert metadata["labels"]["app.kubernetes.io/name"] == "12"
        texts = [metadata["labels"], metadata.get("annotations", {})]
        assert all(isinstance(text, str) for each in texts for text in [*each, *each.values()])
    sets_of = of_kind(objects, "DaemonSet")
    assert set(sets_of) == {"r-12-1", "r-12-mps-1"}
    for workload in sets_of.values():
        template = workload["spec"]["template"]["metadata"]
        assert template["labels"].items() >= {"on": "true", "large": "1234567"}.items()
        assert template["labels"]["vgpu-agent/pool"] == "1"
        assert template["annotations"] == {"build": "1000000", "off": "false"}
        spec = pod(workload)
        assert spec["serviceAccountName"] == "34"
        assert (spec["priorityClassName"], spec["runtimeClassName"]) == ("56", "78")
        assert spec["nodeSelector"]["gpu"] == "true"
        assert {each["image"] for each in containers(workload).values()} == {"vgpu-agent:90"}
    (account,) = of_kind(objects, "ServiceAccount").values()
    assert account["metadata"]["annotations"] == {"role": "5"}
    assert {each["spec"]["serviceAccountName"] for each in of_kind(objects, "Pod").values()} == {
        "34"
    }


def test_a_name_that_is_a_number_is_text_everywhere() -> None:
    text = helm.template({"fullnameOverride": "2"}, release="1")
    names = [each["metadata"]["name"] for each in yaml.load_all(text, helm.Loader) if each]
    assert {"2", "2-mps"} <= set(names)
    (agent, _) = of_kind(
        [each for each in yaml.load_all(text, helm.Loader) if each], "DaemonSet"
    ).values()
    assert agent["spec"]["selector"]["matchLabels"]["app.kubernetes.io/instance"] == "1"


def test_quantities_are_text_without_exponents() -> None:
    limits = {"cpu": 1.5, "memory": 268435456}
    (agent, mps) = workloads(
        "resources.watch.limits.cpu=0.1",
        "resources.watch.limits.memory=134217728",
        resources={"agent": {"limits": limits}},
    )
    found = containers(agent)["agent"]["resources"]
    assert found["limits"] == {"cpu": "1.5", "memory": "268435456"}
    found = containers(mps)["watch"]["resources"]
    assert found["limits"] == found["requests"] == {"cpu": "0.1", "memory": "134217728"}


# Null


@pytest.mark.parametrize(
    ("key", "left"),
    [("priorityClassName", None), ("tolerations", None), ("nodeSelector", LINUX)],
)
@pytest.mark.parametrize("where", ["--set", "file", "pool"])
def test_null_drops_a_default_of_where_pods_run(key: str, left: object, where: str) -> None:
    match where:
        case "--set":
            found = workloads(f"{key}=null")
        case "file":
            found = workloads(**{key: None})
        case _:
            found = workloads(pools=[{"name": "a", key: None}])
    assert len(found) == 2
    for workload in found:
        assert pod(workload).get(key) == left


def test_null_drops_what_others_have_in_a_map() -> None:
    label = "k8s.amazonaws.com/accelerator"
    for workload in workloads(f"nodeSelector.{label.replace('.', chr(92) + '.')}=null"):
        assert pod(workload)["nodeSelector"] == LINUX
    pools = [{"name": "a", "nodeSelector": {label: None, "kind": "a"}}]
    for workload in workloads(pools=pools):
        assert pod(workload)["nodeSelector"] == {**LINUX, "kind": "a"}


def test_null_drops_a_limit_or_all_resources() -> None:
    (agent, mps) = workloads(
        "resources.agent.limits.memory=null",
        "resources.daemon.limits=null",
        "resources.watch.limits.cpu=null",
        "resources.restore=null",
    )
    assert containers(agent)["agent"]["resources"] == {"requests": {"cpu": "20m", "memory": "96Mi"}}
    of_mps = {name: each["resources"] for name, each in containers(mps).items()}
    assert set(of_mps["daemon"]) == {"requests"}
    assert of_mps["watch"]["limits"] == of_mps["watch"]["requests"] == {"memory": "128Mi"}
    assert of_mps["restore"] == {}
    for workload in workloads("resources=null"):
        assert [each["resources"] for each in containers(workload).values()] in ([{}], [{}] * 4)


KEYS = [
    path
    for path, _ in values_table.documented(values_table.VALUES.read_text("utf-8"))
    # Without these there is no chart: see the next test.
    if path not in {("image", "repository"), ("metrics", "address"), ("metrics", "port")}
]


def test_null_for_everything_is_the_agents_own_defaults_and_no_more() -> None:
    nothing: dict[str, Any] = {}
    for *groups, key in KEYS:
        parent = nothing
        for group in groups:
            parent = parent.setdefault(group, {})
        parent[key] = None
    found = helm.installed(helm.render(nothing))
    assert {each["kind"] for each in found} == {"DaemonSet"}
    (agent, mps) = of_kind(found, "DaemonSet").values()
    assert environment(containers(agent)["agent"]) == variables()
    for workload in (agent, mps):
        spec = pod(workload)
        assert spec["serviceAccountName"] == "default"
        assert not {"tolerations", "priorityClassName", "affinity", "imagePullSecrets"} & set(spec)
    in_pool = {key: nothing[key] for key in list(nothing) if key in POOL_KEYS}
    again = of_kind(helm.render({"pools": [{"name": "a", **in_pool}]}), "DaemonSet")
    assert environment(containers(again["r-vgpu-agent-a"])["agent"]) == variables()


POOL_KEYS = json.loads((CHART / "values.schema.json").read_text())["properties"]["pools"]["items"][
    "properties"
]


@pytest.mark.parametrize("key", ["image.repository", "metrics.address", "metrics.port"])
def test_null_for_what_has_no_default_elsewhere_is_refused(key: str) -> None:
    group, _, name = key.partition(".")
    assert f"{group}: {name} is required" in helm.refusal({}, f"{key}=null")


def test_null_in_a_pool_is_the_agents_default_and_not_the_common_value() -> None:
    pools = [{"name": "a", "health": {"interval": None}, "mps": None, "log": {"level": "debug"}}]
    (agent, _) = workloads(pools=pools, health={"interval": 9, "driverWait": 9}, mps={"threads": 2})
    found = environment(containers(agent)["agent"])
    assert found["VGPU_HEALTH_INTERVAL"] == "5"
    assert found["VGPU_DRIVER_WAIT"] == "9"
    assert found["VGPU_MPS_THREADS"] == "share"
    assert (found["VGPU_LOG_LEVEL"], found["VGPU_LOG_FORMAT"]) == ("debug", "text")


# Linux


@pytest.mark.parametrize("name", CI)
def test_every_pod_is_for_linux(name: str) -> None:
    objects = helm.render(None, CI[name])
    pods = [pod(each) for each in of_kind(objects, "DaemonSet").values()]
    pods += [each["spec"] for each in of_kind(objects, "Pod").values()]
    assert len(pods) >= 2
    assert all(each["nodeSelector"].items() >= LINUX.items() for each in pods)


def test_linux_is_neither_dropped_nor_replaced() -> None:
    for values in ({"kubernetes.io/os": None}, {"kubernetes.io/os": "linux"}, {}):
        for workload in workloads(nodeSelector=values):
            assert pod(workload)["nodeSelector"].items() >= LINUX.items()
    message = helm.refusal({"nodeSelector": {"kubernetes.io/os": "windows"}})
    assert "nodeSelector.kubernetes.io/os" in message
    assert '"linux"' in message
