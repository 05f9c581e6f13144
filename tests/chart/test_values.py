"""What people give the chart by `--set`, files and parent charts, and what comes of it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

import vgpu_agent
from tests.chart import helm, values_table
from tests.chart.helm import CHART, CI, Object, containers, environment, of_kind, pod

pytestmark = pytest.mark.slow

LINUX = {"kubernetes.io/os": "linux"}


def workloads(*sets: str, **values: Any) -> list[Object]:
    """The DaemonSets of these values: the agent's, then that of MPS."""
    return list(of_kind(known(helm.render(values, sets=sets)), "DaemonSet").values())


def known(objects: list[Object]) -> list[Object]:
    """The same, after a look at every field and its type as the API server does."""
    for each in objects:
        if each["apiVersion"] != "monitoring.coreos.com/v1":
            kubernetes_validate.validate(each, "1.26.0", strict=True)
    return objects


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
        "monitoring.podMonitor.interval=1m30s",
        "monitoring.dashboards.enabled=true",
        "monitoring.dashboards.annotations.folder=3",
    ]
    # A file has numbers as helm reads YAML: with a fraction inside.
    values = {"podLabels": {"large": 1234567}, "podAnnotations": {"off": False}}
    objects = known(helm.render(values, sets=sets))
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


@pytest.mark.parametrize(
    ("release", "full", "names"),
    [
        ("1", "2", {"2", "2-mps", "try-2"}),
        ("1", 2, {"2", "2-mps", "try-2"}),
        ("1e3", None, {"1e3-vgpu-agent", "1e3-vgpu-agent-mps"}),
        # Names of releases may have dots, those of Services none.
        ("my.gpus", None, {"my-gpus-vgpu-agent", "try-my-gpus-vgpu-agent"}),
    ],
)
def test_names_of_releases_and_objects_are_names(
    release: str, full: object, names: set[str]
) -> None:
    text = helm.template({"fullnameOverride": full}, release=release)
    objects = known([each for each in yaml.load_all(text, helm.Loader) if each])
    assert names <= {each["metadata"]["name"] for each in objects}
    for each in objects:
        assert each["metadata"]["labels"]["app.kubernetes.io/instance"] == release


def test_numbers_of_kubernetes_itself_have_no_exponents() -> None:
    toleration = {"operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 31536000}
    for workload in workloads(tolerations=[toleration], revisionHistoryLimit=1000000):
        assert pod(workload)["tolerations"] == [toleration]
        assert workload["spec"]["revisionHistoryLimit"] == 1000000


def test_what_is_text_in_a_tree_is_text_and_what_is_counted_is_not() -> None:
    sets = [
        "tolerations[0].key=5",
        "tolerations[0].value=true",
        "tolerations[0].effect=NoExecute",
        "tolerations[0].tolerationSeconds=60",
        "imagePullSecrets[0].name=7",
        "networkPolicy.enabled=true",
        "networkPolicy.from[0].podSelector.matchLabels.team=7",
        "networkPolicy.from[1].namespaceSelector.matchLabels.on=true",
    ]
    term = {"key": "zone", "operator": "In", "values": [1, True, "b"], "dropped": None}
    preferred = {"weight": 5, "preference": {"matchExpressions": [term]}}
    affinity = {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [preferred]}}
    objects = known(helm.render({"affinity": affinity}, sets=sets))
    toleration = {"key": "5", "value": "true", "effect": "NoExecute", "tolerationSeconds": 60}
    (test,) = of_kind(objects, "Pod").values()
    for spec in (test["spec"], *map(pod, of_kind(objects, "DaemonSet").values())):
        assert spec["tolerations"] == [toleration]
        assert spec["imagePullSecrets"] == [{"name": "7"}]
    found = pod(of_kind(objects, "DaemonSet")["r-vgpu-agent"])["affinity"]["nodeAffinity"]
    (one,) = found["preferredDuringSchedulingIgnoredDuringExecution"]
    assert one["weight"] == 5
    assert one["preference"]["matchExpressions"] == [
        {"key": "zone", "operator": "In", "values": ["1", "true", "b"]}
    ]
    policy = of_kind(objects, "NetworkPolicy")["r-vgpu-agent-metrics"]
    assert policy["spec"]["ingress"][0]["from"] == [
        {"podSelector": {"matchLabels": {"team": "7"}}},
        {"namespaceSelector": {"matchLabels": {"on": "true"}}},
    ]


def test_zero_is_a_name_too() -> None:
    keys = ("fullnameOverride", "image.tag", "serviceAccount.name", "priorityClassName")
    (agent, mps) = workloads(*(f"{key}=0" for key in (*keys, "runtimeClassName", "nameOverride")))
    assert [agent["metadata"]["name"], mps["metadata"]["name"]] == ["0", "0-mps"]
    for workload in (agent, mps):
        spec = pod(workload)
        assert workload["metadata"]["labels"]["app.kubernetes.io/name"] == "0"
        names = ("serviceAccountName", "priorityClassName", "runtimeClassName")
        assert [spec[name] for name in names] == ["0"] * 3
        assert {each["image"] for each in containers(workload).values()} == {"vgpu-agent:0"}


@pytest.mark.parametrize("quantity", ["1e9", "1.5E9", ".5Gi", "5.", "+1Gi", "100m", "1E", 0.5])
def test_quantities_are_taken_as_kubernetes_takes_them(quantity: object) -> None:
    (agent, _) = workloads(resources={"agent": {"limits": {"memory": quantity}}})
    assert containers(agent)["agent"]["resources"]["limits"] == {"memory": str(quantity)}


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
    pools = [{"name": "a", "replicasByGpu": {"0": None, "1": 2}}]
    found = variables(pools=pools, replicasByGpu={"0": 4, "2": 3})
    assert found["VGPU_REPLICAS_BY_GPU"] == '{"1":2,"2":3}'


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
    # Without it there is no chart: see below.
    if path != ("image", "repository")
]


def test_null_for_everything_is_the_agents_own_defaults_and_no_more() -> None:
    nothing: dict[str, Any] = {}
    for *groups, key in KEYS:
        parent = nothing
        for group in groups:
            parent = parent.setdefault(group, {})
        parent[key] = None
    found = helm.installed(known(helm.render(nothing)))
    assert {each["kind"] for each in found} == {"DaemonSet"}
    (agent, mps) = of_kind(found, "DaemonSet").values()
    assert environment(containers(agent)["agent"]) == variables()
    for workload in (agent, mps):
        spec = pod(workload)
        assert spec["serviceAccountName"] == "default"
        assert not {"tolerations", "priorityClassName", "affinity", "imagePullSecrets"} & set(spec)
    groups = ("serviceAccount", "service", "monitoring", "networkPolicy", "metrics")
    assert helm.render(nothing | dict.fromkeys(groups)) == helm.render(nothing)
    in_pool = {key: nothing[key] for key in list(nothing) if key in POOL_KEYS}
    again = of_kind(helm.render({"pools": [{"name": "a", **in_pool}]}), "DaemonSet")
    assert environment(containers(again["r-vgpu-agent-a"])["agent"]) == variables()


POOL_KEYS = json.loads((CHART / "values.schema.json").read_text())["properties"]["pools"]["items"][
    "properties"
]


def test_null_for_what_has_no_default_elsewhere_is_refused() -> None:
    assert "image: repository is required" in helm.refusal({}, "image.repository=null")


def test_null_in_labels_and_annotations_is_none(parent: Path) -> None:
    maps: Object = {"podAnnotations": {"a": None, "b": "1"}, "podLabels": {"a": None, "b": "1"}}
    maps["commonLabels"] = {"c": None}
    maps["serviceAccount"] = {"annotations": {"a": None}}
    for objects in (helm.render(maps), helm.render({"vgpu-agent": maps}, chart=parent)):
        for workload in of_kind(known(objects), "DaemonSet").values():
            metadata = workload["spec"]["template"]["metadata"]
            assert metadata["annotations"] == {"b": "1"}
            assert metadata["labels"]["b"] == "1"
            assert not {"a", "c"} & set(metadata["labels"])


def test_values_of_an_older_release_that_lack_new_keys_are_taken(tmp_path: Path) -> None:
    # As `helm upgrade --reuse-values` has them: no default of this chart is under them.
    chart = tmp_path / "chart"
    shutil.copytree(CHART, chart)
    needed = {"image": {"repository": "x"}}
    (chart / "values.yaml").write_text(json.dumps(needed))
    found = of_kind(known(helm.render(chart=chart)), "DaemonSet")
    assert environment(containers(found["r-vgpu-agent"])["agent"]) == variables()


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


# Labels and annotations that are ours too

THEIRS = {
    "app.kubernetes.io/name": "mine",
    "app.kubernetes.io/instance": "mine",
    "app.kubernetes.io/component": "mine",
    "app.kubernetes.io/version": "mine",
    "app.kubernetes.io/managed-by": "mine",
    "helm.sh/chart": "mine",
    "vgpu-agent/pool": "mine",
    "team": "models",
}


def test_labels_that_are_the_charts_too_stay_the_charts() -> None:
    # helm.render refuses a key that is there twice.
    labels = {"enabled": True, "labels": THEIRS}
    values = {
        "podLabels": THEIRS,
        "monitoring": {"podMonitor": labels, "prometheusRule": labels, "dashboards": labels},
        "networkPolicy": {"enabled": True},
    }
    plain = helm.render({**values, "podLabels": {}, "monitoring": monitoring_without_labels()})
    for common in ({}, THEIRS):
        objects = known(helm.render({**values, "commonLabels": common}))
        for each, before in zip(objects, plain, strict=True):
            ours = before["metadata"]["labels"]
            assert each["metadata"]["labels"].items() >= ours.items()
        for workload in of_kind(objects, "DaemonSet").values():
            selector = workload["spec"]["selector"]["matchLabels"]
            labels = workload["spec"]["template"]["metadata"]["labels"]
            assert labels.items() >= selector.items()
            assert "mine" not in {*selector.values(), *labels.values()}
            assert labels["team"] == "models"


def monitoring_without_labels() -> Object:
    return {name: {"enabled": True} for name in ("podMonitor", "prometheusRule", "dashboards")}


def test_what_is_more_particular_wins_among_the_users_own_labels() -> None:
    values = {"commonLabels": {"team": "all", "a": "1"}, "podLabels": {"team": "pods"}}
    for workload in workloads(**values):
        assert workload["metadata"]["labels"]["team"] == "all"
        labels = workload["spec"]["template"]["metadata"]["labels"]
        assert (labels["team"], labels["a"]) == ("pods", "1")


def test_annotations_do_not_make_the_pod_of_helm_test_another_hook() -> None:
    theirs = {"helm.sh/hook": "pre-install", "note": "x"}
    (test,) = of_kind(helm.render({"podAnnotations": theirs}), "Pod").values()
    assert test["metadata"]["annotations"] == {
        "helm.sh/hook": "test",
        "helm.sh/hook-delete-policy": "before-hook-creation",
        "note": "x",
    }


# Names that Kubernetes refuses


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"nameOverride": "Our_GPUs"}, ["nameOverride", "Does not match pattern"]),
        ({"nameOverride": "-gpus"}, ["nameOverride", "Does not match pattern"]),
        ({"fullnameOverride": "gpus.example"}, ["fullnameOverride", "Does not match pattern"]),
        ({"fullnameOverride": "g" * 64}, ["fullnameOverride", "less than or equal to 63"]),
        ({"fullnameOverride": 1.5}, ["fullnameOverride", "given: number"]),
        ({"serviceAccount": {"name": "A b"}}, ["serviceAccount.name"]),
        ({"priorityClassName": "Very High"}, ["priorityClassName", "Does not match pattern"]),
        ({"runtimeClassName": "nvidia_runc"}, ["runtimeClassName", "Does not match pattern"]),
        ({"imagePullSecrets": [{"name": "My Secret"}]}, ["imagePullSecrets.0.name"]),
        ({"imagePullSecrets": [{}]}, ["imagePullSecrets.0", "name is required"]),
        ({"imagePullSecrets": [{"name": ""}]}, ["imagePullSecrets.0.name", "length"]),
        ({"image": {"tag": "1.0 beta"}}, ["image.tag", "Does not match pattern"]),
        ({"image": {"tag": 1.1}}, ["image.tag", "given: number"]),
        ({"resourceName": "vgpu"}, ["resourceName", "Does not match pattern"]),
        ({"resourceName": "Example.com/vgpu"}, ["resourceName", "Does not match pattern"]),
        ({"resourceName": "example.com/vgpu/x"}, ["resourceName", "Does not match pattern"]),
        ({"pools": [{"name": "a_b"}]}, ["pools.0.name", "Does not match pattern"]),
        ({"pools": [{"name": "a", "priorityClassName": "A"}]}, ["pools.0.priorityClassName"]),
        ({"podLabels": {"a b": "x"}}, ["podLabels", 'Property name of "a b" does not match']),
        ({"podLabels": {"a/b/c": "x"}}, ["podLabels", 'Property name of "a/b/c"']),
        ({"podLabels": {"Example.com/a": "x"}}, ["podLabels", "Property name of"]),
        ({"podLabels": {"team": "a b"}}, ["podLabels.team", "Does not match pattern"]),
        ({"podLabels": {"team": "x" * 64}}, ["podLabels.team", "Does not match pattern"]),
        ({"podLabels": {"team": 1.5}}, ["podLabels.team", "given: number"]),
        ({"podLabels": {"team": ["a"]}}, ["podLabels.team", "given: array"]),
        ({"commonLabels": {"team": "-a"}}, ["commonLabels.team", "Does not match pattern"]),
        ({"nodeSelector": {"kind": "a,b"}}, ["nodeSelector.kind", "Does not match pattern"]),
        ({"nodeSelector": {"kind!": "a"}}, ["nodeSelector", 'Property name of "kind!"']),
        ({"podAnnotations": {"a b": "x"}}, ["podAnnotations", 'Property name of "a b"']),
        (
            {"monitoring": {"podMonitor": {"labels": {"release": "a b"}}}},
            ["monitoring.podMonitor.labels.release", "Does not match pattern"],
        ),
        ({"resources": {"agent": {"limits": {"memory": "1 Gi"}}}}, ["limits.memory"]),
        ({"resources": {"agent": {"limits": {"a b": 1}}}}, ['Property name of "a b"']),
        ({"resources": {"agent": {"limits": {"gpu": 1}}}}, ['Property name of "gpu"']),
        ({"tolerations": [{"key": "a b"}]}, ["tolerations.0.key", "Does not match pattern"]),
        (
            {"tolerations": [{"operator": "exists"}]},
            ["tolerations.0.operator", '"Exists", "Equal"'],
        ),
        ({"tolerations": [{"effect": "Noschedule"}]}, ["tolerations.0.effect", '"NoSchedule"']),
        ({"tolerations": [{"toleration": "x"}]}, ["toleration is not allowed"]),
        ({"affinity": {"nodeAffinty": {}}}, ["affinity", "nodeAffinty is not allowed"]),
        (
            {"networkPolicy": {"from": [{"matchLabels": {"a": "b"}}]}},
            ["networkPolicy.from.0", "matchLabels is not allowed"],
        ),
        ({"tolerations": {"key": "a"}}, ["tolerations", "given: object"]),
    ],
)
def test_what_kubernetes_would_refuse_helm_refuses_before(values: Object, words: list[str]) -> None:
    message = helm.refusal(values)
    assert "values don't meet the specifications of the schema" in message
    for each in words:
        assert each in message


# A parent chart


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """A chart that has this one as a dependency, and once more under another name."""
    shutil.copytree(CHART, tmp_path / "charts/vgpu-agent")
    ours = {"name": "vgpu-agent", "version": vgpu_agent.__version__, "repository": ""}
    chart = {
        "apiVersion": "v2",
        "name": "platform",
        "version": "1.0.0",
        "dependencies": [
            {**ours, "condition": "vgpu-agent.enabled"},
            {**ours, "condition": "more.enabled", "alias": "more"},
        ],
    }
    (tmp_path / "Chart.yaml").write_text(json.dumps(chart))
    values = {
        "global": {"imageRegistry": "registry.example.com", "team": 7},
        "vgpu-agent": {"enabled": True, "replicas": 4, "tolerations": None},
        "more": {"enabled": False, "sharing": "time-slicing"},
    }
    (tmp_path / "values.yaml").write_text(json.dumps(values))
    return tmp_path


def test_a_parent_chart_switches_it_on_and_off_and_may_have_global_values(parent: Path) -> None:
    (agent, mps) = of_kind(known(helm.render(chart=parent)), "DaemonSet").values()
    assert environment(containers(agent)["agent"])["VGPU_REPLICAS"] == "4"
    assert "tolerations" not in pod(agent)
    assert "tolerations" not in pod(mps)
    assert (agent["metadata"]["name"], mps["metadata"]["name"]) == (
        "r-vgpu-agent",
        "r-vgpu-agent-mps",
    )
    assert not helm.render(sets=["vgpu-agent.enabled=false"], chart=parent)


def test_a_parent_chart_may_have_it_twice(parent: Path) -> None:
    values = {"more": {"nodeSelector": {"kind": "b"}}}
    objects = helm.render(values, sets=["more.enabled=true"], chart=parent)
    found = of_kind(objects, "DaemonSet")
    assert list(found) == ["r-more", "r-vgpu-agent", "r-vgpu-agent-mps"]
    selectors = [each["spec"]["selector"]["matchLabels"] for each in found.values()]
    assert all(selectors.count(each) == 1 for each in selectors)


def test_a_wrong_value_is_refused_in_a_parent_chart_too(parent: Path) -> None:
    done = helm.run("template", "r", parent, values={"vgpu-agent": {"replicas": 0}})
    assert done.returncode != 0
    assert "vgpu-agent: - replicas: Must be greater than or equal to 1" in " ".join(
        done.stderr.split()
    )


# More environment, volumes and the rest of a pod


def test_what_is_extra_is_in_every_container_after_what_is_ours() -> None:
    secret = {"secretKeyRef": {"name": "s", "key": "k"}}
    values = {
        "extraEnv": [
            {"name": "A", "value": "x"},
            {"name": "B", "value": 1000000},
            {"name": "C", "value": True},
            {"name": "D"},
            {"name": "E", "valueFrom": secret},
        ],
        "extraVolumes": [{"name": "x", "emptyDir": {"sizeLimit": 1000000}}],
        "extraVolumeMounts": [{"name": "x", "mountPath": "/x", "readOnly": True}],
    }
    plain = workloads()
    for workload, before in zip(workloads(**values), plain, strict=True):
        added = [{"name": "x", "emptyDir": {"sizeLimit": 1000000}}]
        assert pod(workload)["volumes"] == [*pod(before)["volumes"], *added]
        for name, container in containers(workload).items():
            ours = containers(before)[name]
            assert container["env"] == [
                *ours["env"],
                {"name": "A", "value": "x"},
                {"name": "B", "value": "1000000"},
                {"name": "C", "value": "true"},
                {"name": "D", "value": ""},
                {"name": "E", "valueFrom": secret},
            ]
            mount = {"name": "x", "mountPath": "/x", "readOnly": True}
            assert container["volumeMounts"] == [*ours["volumeMounts"], mount]


def test_extra_values_come_by_set_too() -> None:
    sets = [
        "extraEnv[0].name=A",
        "extraEnv[0].value=5",
        "extraVolumes[0].name=x",
        "extraVolumes[0].hostPath.path=/opt/nvidia",
        "extraVolumeMounts[0].name=x",
        "extraVolumeMounts[0].mountPath=/opt/nvidia",
    ]
    (agent, mps) = workloads(*sets)
    for container in [*containers(agent).values(), *containers(mps).values()]:
        assert {"name": "A", "value": "5"} in container["env"]
        assert {"name": "x", "mountPath": "/opt/nvidia"} in container["volumeMounts"]


def test_both_pods_have_the_users_security_context_and_dns_policy() -> None:
    context = {
        "seLinuxOptions": {"type": "spc_t", "level": "s0:c1,c2"},
        "supplementalGroups": [1000650000],
    }
    values = {"podSecurityContext": context, "dnsPolicy": "Default", "revisionHistoryLimit": 0}
    for workload in workloads(**values):
        assert pod(workload)["securityContext"] == context
        assert pod(workload)["dnsPolicy"] == "Default"
        assert workload["spec"]["revisionHistoryLimit"] == 0
    for workload in workloads():
        assert not {"securityContext", "dnsPolicy"} & set(pod(workload))
        assert "revisionHistoryLimit" not in workload["spec"]
    pools = [
        {"name": "a", "podSecurityContext": {"seLinuxOptions": {"type": "other_t"}}},
        {"name": "b", "podSecurityContext": None, "nodeSelector": {"kind": "b"}},
    ]
    pools[0]["nodeSelector"] = {"kind": "a"}
    (a, b, *_) = workloads(pools=pools, **values)
    assert pod(a)["securityContext"]["seLinuxOptions"] == {"type": "other_t", "level": "s0:c1,c2"}
    assert "securityContext" not in pod(b)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"extraEnv": [{"name": "1A", "value": "x"}]}, ["extraEnv.0.name", "pattern"]),
        ({"extraEnv": [{"name": "A-B", "value": "x"}]}, ["extraEnv.0.name", "pattern"]),
        ({"extraEnv": [{"value": "x"}]}, ["extraEnv.0", "name is required"]),
        ({"extraEnv": {"A": "x"}}, ["extraEnv", "given: object"]),
        ({"extraEnv": [{"name": "A", "valueFrom": {"secret": {}}}]}, ["extraEnv.0.valueFrom"]),
        (
            {"extraEnv": [{"name": "VGPU_REPLICAS", "value": "4"}]},
            ["extraEnv: name VGPU_REPLICAS is the chart's own", "set the value"],
        ),
        (
            # The agent reads its variables in any case.
            {"pools": [{"name": "a", "extraEnv": [{"name": "vgpu_replicas", "value": "4"}]}]},
            ['extraEnv: name vgpu_replicas in pool "a" is the chart'],
        ),
        (
            {"extraEnv": [{"name": "NVIDIA_VISIBLE_DEVICES", "value": "0"}]},
            ["extraEnv: name NVIDIA_VISIBLE_DEVICES is the chart's own"],
        ),
        (
            {"extraEnv": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]},
            ["extraEnv: name A is there twice"],
        ),
        (
            {"extraEnv": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s"}}}]},
            ["extraEnv.0.valueFrom.secretKeyRef", "key is required"],
        ),
        ({"extraEnv": [{"name": "A", "valueFrom": {"fieldRef": "x"}}]}, ["fieldRef", "object"]),
        ({"extraVolumes": [{"name": "x"}]}, ["extraVolumes.0", "at least 2 properties"]),
        (
            {"extraVolumes": [{"name": "x", "emptyDir": {}, "configMap": {"name": "a"}}]},
            ["extraVolumes.0", "at most 2 properties"],
        ),
        ({"extraVolumes": [{"name": "x", "hostPath": "/x"}]}, ["hostPath", "given: string"]),
        (
            {"tolerations": [{"key": "a", "operator": "Exists", "value": "x"}]},
            ['tolerations: {"key":"a","operator":"Exists","value":"x"}: with operator Exists'],
        ),
        (
            {"pools": [{"name": "a", "tolerations": [{"effect": "NoExecute"}]}]},
            ['in pool "a": without a key', "the operator must be Exists"],
        ),
        (
            {"tolerations": [{"key": "a", "tolerationSeconds": 0}]},
            ["tolerationSeconds are allowed with effect NoExecute only"],
        ),
        ({"extraVolumes": [{"name": "X", "emptyDir": {}}]}, ["extraVolumes.0.name", "pattern"]),
        (
            {"extraVolumes": [{"name": "state", "emptyDir": {}}]},
            ["extraVolumes: name state is there already", "any other name"],
        ),
        (
            # Of MPS only.
            {"extraVolumes": [{"name": "shared", "emptyDir": {}}]},
            ["extraVolumes: name shared is there already"],
        ),
        (
            {"extraVolumes": [{"name": "x", "emptyDir": {}}] * 2},
            ["extraVolumes: name x is there already"],
        ),
        (
            {"extraVolumeMounts": [{"name": "x", "mountPath": "/x"}]},
            ["extraVolumeMounts: name x is no volume of extraVolumes", "allowed are none"],
        ),
        ({"extraVolumeMounts": [{"name": "x", "mountPath": "x"}]}, ["mountPath", "pattern"]),
        ({"extraVolumeMounts": [{"name": "x"}]}, ["mountPath is required"]),
        (
            {
                "extraVolumes": [{"name": "x", "emptyDir": {}}],
                "extraVolumeMounts": [{"name": "x", "mountPath": "/dev/shm"}],
            },
            ["extraVolumeMounts: mountPath /dev/shm is there already"],
        ),
        (
            {
                "extraVolumes": [{"name": "x", "emptyDir": {}}],
                "extraVolumeMounts": [{"name": "x", "mountPath": "/run/vgpu-agent"}],
            },
            ["extraVolumeMounts: mountPath /run/vgpu-agent is there already"],
        ),
        ({"podSecurityContext": {"privileged": True}}, ["privileged is not allowed"]),
        ({"podSecurityContext": {"seLinuxOptions": {"typ": "x"}}}, ["typ is not allowed"]),
        ({"dnsPolicy": "None"}, ["dnsPolicy", '"ClusterFirst", "Default"']),
        ({"revisionHistoryLimit": -1}, ["revisionHistoryLimit"]),
        ({"service": {"clusterIP": "None"}}, ["clusterIP is not allowed"]),
    ],
)
def test_extra_values_that_are_wrong_or_the_charts_own_are_refused(
    values: Object, words: list[str]
) -> None:
    message = helm.refusal(values)
    for each in words:
        assert each in message


# Who scrapes


def test_the_service_is_every_agent_and_nobody_else() -> None:
    objects = helm.installed(helm.render(None, CI["everything"]))
    (service,) = of_kind(objects, "Service").values()
    assert service["metadata"]["name"] == "our-vgpus"
    assert service["metadata"]["labels"]["example.com/scrape"] == "agents"
    assert service["metadata"]["annotations"] == {"example.com/note": "headless"}
    spec = service["spec"]
    assert spec["clusterIP"] == "None"
    assert spec["publishNotReadyAddresses"] is True
    (port,) = spec["ports"]
    for workload in of_kind(objects, "DaemonSet").values():
        labels = workload["spec"]["template"]["metadata"]["labels"]
        is_agent = labels["app.kubernetes.io/component"] == "agent"
        assert (spec["selector"].items() <= labels.items()) == is_agent
        if is_agent:
            (metrics,) = containers(workload)["agent"]["ports"]
            assert (port["targetPort"], port["port"]) == ("metrics", metrics["containerPort"])


def test_a_service_monitor_scrapes_what_a_pod_monitor_does() -> None:
    objects = helm.render(None, CI["service-monitor"])
    assert not of_kind(objects, "PodMonitor")
    (monitor,) = of_kind(objects, "ServiceMonitor").values()
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    pods = {"monitoring": {"podMonitor": {"enabled": True}}}
    (other,) = of_kind(helm.render(pods), "PodMonitor").values()
    assert monitor["spec"]["endpoints"] == other["spec"]["podMetricsEndpoints"]
    # Its Service, and none of those that are there for `helm test`.
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    services = of_kind(objects, "Service")
    assert len(services) == 2
    found = [
        name for name, each in services.items() if wanted <= each["metadata"]["labels"].items()
    ]
    assert found == ["r-vgpu-agent"]
    assert services["r-vgpu-agent"]["spec"]["ports"][0]["name"] == "metrics"


# What the notes on platforms say


def yaml_blocks() -> list[Object]:
    text = (CHART.parents[1] / "docs/platforms.md").read_text("utf-8")
    return [
        yaml.safe_load(each)
        for each in re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ]


def test_the_values_of_the_platforms_are_taken_and_their_objects_known() -> None:
    objects = known([each for each in yaml_blocks() if "kind" in each])
    values = [each for each in yaml_blocks() if "kind" not in each]
    assert (len(objects), len(values)) == (1, 4)
    for each in objects:
        (rule,) = each["spec"]["scopeSelector"]["matchExpressions"]
        assert rule["values"] == [pod(workloads()[0])["priorityClassName"]]
    for each in values:
        assert workloads(**each)
