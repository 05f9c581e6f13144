"""What the chart renders, and what it refuses, by the real helm."""

import functools
import json
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import vgpu_agent
from tests.agent_process import execute
from tests.chart import helm, values_table
from tests.chart.helm import CHART, CI, Object, containers, environment, mounts, of_kind, pod
from vgpu_agent import settings as configuration
from vgpu_agent.address import parse_address
from vgpu_agent.gpu import cdi
from vgpu_agent.model.container import DEVICES_DIRECTORY
from vgpu_agent.model.rules import MPS_MAX_CLIENTS, SHARED
from vgpu_agent.mps import prepare, serve
from vgpu_agent.settings import Settings
from vgpu_agent.settings_reading import embedded
from vgpu_agent.usage.containers import LINKS

pytestmark = pytest.mark.slow

VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA = json.loads((CHART / "values.schema.json").read_text())


@functools.cache
def rendered(name: str) -> list[Object]:
    """A file of ci/, which no test changes."""
    return helm.render(None, CI[name])


@pytest.fixture(params=CI)
def objects(request: pytest.FixtureRequest) -> list[Object]:
    return rendered(request.param)


def daemon_sets(objects: list[Object]) -> dict[str, Object]:
    return of_kind(objects, "DaemonSet")


def component(workload: Object) -> str:
    return workload["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"]


def every_container(objects: list[Object]) -> Iterator[tuple[Object, str, Object, dict[str, str]]]:
    """Each workload with each of its containers: name, container and environment."""
    for workload in daemon_sets(objects).values():
        for name, container in containers(workload).items():
            yield workload, name, container, environment(container)


# That it is a chart


@pytest.mark.parametrize("name", CI)
def test_every_file_of_ci_is_without_a_finding(name: str) -> None:
    done = helm.run("lint", "--strict", CHART, "--values", CI[name])
    assert done.returncode == 0, done.stdout
    assert "[WARNING]" not in done.stdout


def test_the_chart_has_the_version_of_the_agent_and_says_what_catalogues_show() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == vgpu_agent.__version__
    project = tomllib.loads((CHART.parents[1] / "pyproject.toml").read_text())["project"]
    assert chart["annotations"]["artifacthub.io/license"] == project["license"]
    assert {"gpu", "nvidia", "device-plugin"} <= set(chart["keywords"])
    assert chart["maintainers"]
    # They are set by `make dist`, which knows where it is published from.
    assert not {"home", "sources"} & set(chart)


def test_the_table_of_the_values_has_every_key_that_is_no_map_of_keys() -> None:
    def leaves(value: object, path: tuple[str, ...]) -> set[tuple[str, ...]]:
        if path in rows or not isinstance(value, dict):
            return {path}
        return set().union(*(leaves(each, (*path, key)) for key, each in value.items()))

    text = values_table.VALUES.read_text("utf-8")
    rows = dict(values_table.documented(text))
    assert leaves(VALUES, ()) == set(rows)
    assert all(len(what) > 4 and "|" not in what for what in rows.values())


def test_the_oldest_and_the_newest_kubernetes_know_every_field(objects: list[Object]) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="no kubernetes-validate")
    oldest = yaml.safe_load((CHART / "Chart.yaml").read_text())["kubeVersion"]
    assert oldest == ">=1.26.0-0"
    for each in objects:
        if each["apiVersion"] != "monitoring.coreos.com/v1":
            for version in ("1.26.0", validate.latest_version()):
                validate.validate(each, version, strict=True)


def test_every_name_fits_and_is_there_once(objects: list[Object]) -> None:
    names = [(each["kind"], each["metadata"]["name"]) for each in objects]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9][-a-z0-9]{0,61}[a-z0-9]", name) for _, name in names)
    assert {each["metadata"]["namespace"] for each in objects} == {"gpu"}


def test_a_long_release_name_still_fits() -> None:
    text = helm.template(release="r" * 53)
    assert all(len(each["metadata"]["name"]) <= 63 for each in yaml.safe_load_all(text))


# Values and settings are the same


def settings_of(variables: dict[str, str]) -> Settings:
    prefix = configuration.PREFIX
    return embedded(**{key.removeprefix(prefix).lower(): value for key, value in variables.items()})


def test_every_variable_of_every_rendering_is_a_setting_and_every_setting_is_set() -> None:
    known = {configuration.variable(name) for name in configuration.TABLE}
    for name in CI:
        for variables in helm.settings_of(rendered(name)):
            assert set(variables) <= known
    everything = helm.settings_of(rendered("everything"))
    assert set().union(*everything) == known


@pytest.mark.parametrize("name", CI)
def test_the_agent_takes_what_is_rendered(name: str) -> None:
    for variables in helm.settings_of(rendered(name)):
        assert settings_of(variables).sharing == variables["VGPU_SHARING"]
    # And through the front door, where rules over several variables are too.
    variables = next(helm.settings_of(rendered(name)))
    done = execute("mps", "watch", **{**variables, "VGPU_SHARING": "time-slicing"})
    assert "has nothing to do" in done.stderr, done.stderr


@pytest.mark.parametrize("driver", ["nvml", "simulated"])
def test_the_defaults_of_the_chart_are_those_of_the_agent(driver: str) -> None:
    variables = next(helm.settings_of(helm.render({"gpuDriver": driver})))
    names = {"node_name": "gpu-1", "pod_name": "pod-1", "pod_namespace": "gpus"}
    assert settings_of(variables) == embedded(gpu_driver=driver, **names)


def test_what_is_set_arrives_as_it_was_meant() -> None:
    everything = daemon_sets(rendered("everything"))
    real = environment(containers(everything["our-vgpus-real"])["agent"])
    expected = {
        "CDI_KIND": "example.com/gpu",
        "CRITICAL_XIDS": "43,1000000",
        "DEVICE_LIST": "cdi",
        "HEALTH_INTERVAL": "2.5",
        "IGNORED_XIDS": "13,31",
        "LOST_CARD_SECONDS": "1000000",
        "MEMORY_RESERVED": "1Gi",
        "METRICS_ADDRESS": "[::]:9500",
        "MPS_MAX_CLIENTS": "60",
        "MPS_MULTIUSER": "on",
        "MPS_THREADS": "1.5",
        "REPLICAS": "50",
        "REPLICAS_BY_GPU": '{"0":4,"NVIDIA L4":1}',
        "STATUS_PAGE": "off",
    }
    assert {name: real[f"VGPU_{name}"] for name in expected} == expected
    assert "VGPU_DEVICE_MEMORY" not in real
    simulated = environment(containers(everything["our-vgpus-none"])["agent"])
    assert simulated["VGPU_DEVICE_MEMORY"] == "8Gi"
    assert simulated["VGPU_SIMULATED_NUMA_NODES"] == "none,0,1"
    assert "VGPU_REPLICAS" not in simulated


def test_a_pool_may_have_every_key_from_node_selector_on_and_no_other() -> None:
    keys = list(VALUES)
    properties = SCHEMA["properties"]["pools"]["items"]["properties"]
    assert set(properties) == {"name", *keys[keys.index("nodeSelector") :]}


def test_the_schema_is_closed_at_every_level() -> None:
    def check(schema: Any, where: str) -> None:
        if isinstance(schema, list):
            for number, each in enumerate(schema):
                check(each, f"{where}[{number}]")
        elif isinstance(schema, dict):
            if "properties" in schema and "type" in schema:
                assert schema.get("additionalProperties") is False, where
            for key, each in schema.items():
                check(each, f"{where}.{key}")

    check(SCHEMA, "")


# What is refused


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"replicas": "ten"}, ["replicas", "Expected: [integer,null], given: string"]),
        ({"repicas": 4}, ["repicas is not allowed"]),
        ({"health": {"intervall": 5}}, ["health: Additional property intervall"]),
        ({"mps": {"directory": "/run/../mps"}}, ["mps.directory", "Does not match pattern"]),
        ({"image": None}, ["image is required"]),
        ({"image": {"repository": "r.example/vgpu-agent:0.1.0"}}, ["image.repository"]),
        ({"image": {"repository": "REGISTRY/vgpu-agent"}}, ["image.repository"]),
        ({"metrics": {"address": "127.0.0.1"}}, ["metrics.address", '"0.0.0.0", "::"']),
        ({"metrics": {"port": 0}}, ["metrics.port", "greater than or equal to 1024"]),
        ({"updateStrategy": {"rollingUpdate": {"maxSurge": 1}}}, ["maxSurge"]),
        ({"memoryLimits": "hook"}, ["memoryLimits", '"auto", "driver", "off"']),
        ({"resources": {"watch": {"requests": {"cpu": 1}}}}, ["requests is not allowed"]),
        ({"mps": {"endOrphans": True}}, ["mps: Additional property endOrphans"]),
        ({"mps": {"daemons": "each"}}, ["mps.daemons", '"gpu", "node"']),
        ({"pools": [{"name": "a", "repicas": 4}]}, ["pools.0", "repicas is not allowed"]),
        ({"pools": [{"name": "a", "image": {}}]}, ["pools.0", "image is not allowed"]),
        ({"pools": [{"replicas": 4}]}, ["name is required"]),
        ({"pools": [{"name": "A"}]}, ["pools.0.name"]),
    ],
)
def test_the_schema_refuses(values: Object, words: list[str]) -> None:
    message = helm.refusal(values)
    assert "values don't meet the specifications of the schema" in message
    for each in words:
        assert each in message


ON = {"enabled": True}
POOLS = {"nodeSelector": {"kind": "a"}}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"replicas": 4, "deviceMemory": "8Gi"},
            ["replicas: 4", "deviceMemory: 8Gi", "only one of them is allowed"],
        ),
        (
            {"replicas": 4, "pools": [{"name": "a", "deviceMemory": "8Gi"}]},
            ['replicas: 4 and deviceMemory: 8Gi in pool "a"'],
        ),
        (
            {"replicas": MPS_MAX_CLIENTS + 1},
            ["replicas: 61", f"at most mps.maxClients ({MPS_MAX_CLIENTS})"],
        ),
        (
            {"replicas": 31, "mps": {"maxClients": 30}},
            ["replicas: 31", "at most mps.maxClients (30)"],
        ),
        ({"replicas": 4, "deviceMemory": 2**33}, ["replicas: 4 and deviceMemory: 8589934592: "]),
        ({"replicasByGpu": {"NVIDIA L4": 64}}, ["replicasByGpu.NVIDIA L4: 64", "(60)"]),
        (
            {"health": {"ignoredXids": [13, 31], "criticalXids": [31]}},
            ["health.criticalXids: 31", "ignoredXids"],
        ),
        ({"resourceName": "kubernetes.io/gpu"}, ["resourceName: kubernetes.io/gpu", "allowed"]),
        ({"resourceName": "requests.a.com/gpu"}, ["resourceName: requests.a.com/gpu"]),
        ({"kubeletDir": "/" + "d" * 59}, ["kubeletDir: /ddd", "108 bytes, and 107 are allowed"]),
        ({"devicePluginDir": "/" + "d" * 74}, ["devicePluginDir: /ddd", "108 bytes, and 107"]),
        ({"mps": {"shmDirectory": "/p"}, "devicePluginDir": "/p/d"}, ["mps.shmDirectory: /p"]),
        ({"mps": {"shmDirectory": "/dev/shm"}}, ["mps.shmDirectory: /dev/shm"]),
        ({"mps": {"shmDirectory": "/run"}}, ["mps.shmDirectory: /run", "/run/vgpu-agent/mps"]),
        ({"mps": {"shmDirectory": "/run/vgpu-agent/mps/shm"}}, ["is in mps.directory"]),
        ({"mps": {"shmDirectory": "/c"}, "cordonDirectory": "/c/x"}, ["mps.shmDirectory: /c"]),
        ({"cordonDirectory": "/run/vgpu-agent"}, ["cordonDirectory: /run/vgpu-agent is state"]),
        ({"mps": {"directory": "/" + "d" * 42}}, ["mps.directory: /ddd", "43 characters, and 42"]),
        ({"pools": [{"name": "a"}, {"name": "a"}]}, ['name "a" is there twice']),
        (
            {"pools": [{"name": "a"}, {"name": "b", "nodeSelector": {"kind": "b"}}]},
            ['"a" and "b" can select the same node', '"kind":"b"', "affinity"],
        ),
        (
            # The same label, as a number and as text.
            {
                "pools": [
                    {"name": "a", "nodeSelector": {"kind": 1000000}},
                    {"name": "b", "nodeSelector": {"kind": "1000000"}},
                ]
            },
            ['"a" and "b" can select the same node'],
        ),
        (
            {"pools": [{"name": "a", **POOLS}, {"name": "b", **POOLS}]},
            ['"a" and "b" can select the same node'],
        ),
        ({"pools": [{"name": "mps-a"}]}, ['name "mps-a" begins with mps']),
        (
            {"memoryGuarantee": True, "memoryLimits": "off"},
            ["memoryGuarantee: true: with memoryLimits off", "auto or driver"],
        ),
        (
            {"memoryLimitsEnableController": True},
            ["memoryLimitsEnableController: true: only with", "memoryLimits is auto"],
        ),
        (
            {
                "memoryLimits": "driver",
                "memoryLimitsEnableController": True,
                "pools": [{"name": "a", "memoryLimits": "off"}],
            },
            ['memoryLimitsEnableController: true in pool "a": only with', "memoryLimits is off"],
        ),
        (
            {"monitoring": {"podMonitor": ON, "serviceMonitor": ON}, "service": ON},
            ["monitoring.podMonitor.enabled", "serviceMonitor.enabled", "twice", "to false"],
        ),
        (
            {"monitoring": {"serviceMonitor": ON}},
            ["monitoring.serviceMonitor.enabled", "set service.enabled to true"],
        ),
        (
            {"service": ON, "fullnameOverride": "2gpus"},
            ["service.enabled: the name 2gpus begins with a digit", "set fullnameOverride"],
        ),
        (
            {"fullnameOverride": "f" * 59, "pools": [{"name": "abc"}]},
            ['name "abc"', "67 characters", "63 are allowed"],
        ),
    ],
)
def test_rules_over_several_keys_are_told_in_words(values: Object, words: list[str]) -> None:
    message = helm.refusal(values)
    for each in words:
        assert each in message


@pytest.mark.parametrize(
    "values",
    [
        {"replicas": 48},
        {"replicas": 1024, "sharing": "time-slicing"},
        {"replicas": 60, "mps": {"maxClients": 60}},
        {"replicas": 4, "pools": [{"name": "a", "replicas": None, "deviceMemory": "8Gi"}]},
        {"memoryGuarantee": True},
        {"pools": [{"name": "a", "memoryLimits": "driver", "memoryLimitsEnableController": True}]},
        {
            "pools": [
                {"name": "a", "nodeSelector": {"kind": "a"}},
                {"name": "b", "nodeSelector": {"kind": "b"}},
            ]
        },
        {
            "pools": [
                {"name": "a", "nodeSelector": {"kind": "1"}},
                {"name": "b", "nodeSelector": {"kind": True}},
            ]
        },
        {"pools": [{"name": "a"}, {"name": "b", "affinity": {"nodeAffinity": {}}}]},
        {"mps": {"directory": "/" + "d" * 41}},
        {"kubeletDir": "/" + "d" * 58},
        {"kubeletDir": "/" + "d" * 59, "devicePluginDir": "/p"},
        {"global": {"anything": 1}},
    ],
)
def test_what_is_fine_is_taken(values: Object) -> None:
    assert daemon_sets(helm.render(values))


# What every pod has


def test_no_pod_has_more_than_it_needs(objects: list[Object]) -> None:
    for workload in daemon_sets(objects).values():
        spec = pod(workload)
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert not {"hostNetwork", "hostIPC", "shareProcessNamespace"} & set(spec)
    for _, _, container, _ in every_container(objects):
        context = container["securityContext"]
        assert "privileged" not in context
        assert context["readOnlyRootFilesystem"] is True
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert (context["runAsUser"], context["runAsNonRoot"]) == (0, False)
    (account,) = of_kind(objects, "ServiceAccount").values()
    assert account["automountServiceAccountToken"] is False
    kinds = {each["kind"] for each in objects}
    assert not kinds & {"Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding", "Secret"}


NOTHING = {"drop": ["ALL"]}
FILES = ["DAC_OVERRIDE", "FOWNER"]


def test_each_container_has_its_own_capabilities(objects: list[Object]) -> None:
    for _, name, container, variables in every_container(objects):
        exclusive = variables.get("VGPU_MPS_COMPUTE_MODE") == "exclusive"
        node = {**NOTHING, "add": [*FILES, "SYS_ADMIN"] if exclusive else FILES}
        expected = {
            "agent": NOTHING,
            "limits": {**NOTHING, "add": ["SYS_ADMIN"]},
            "watch": NOTHING,
            "daemon": None,
            "prepare": node,
            "restore": node,
        }
        context = container["securityContext"]
        assert context.get("capabilities") == expected[name], name
        escalates = (exclusive and name in {"prepare", "restore"}) or name == "limits"
        assert context["allowPrivilegeEscalation"] is escalates, name


def test_only_who_must_tell_processes_sees_those_of_the_host(objects: list[Object]) -> None:
    for workload, _, _, variables in every_container(objects):
        sees = component(workload) == "mps" or variables["VGPU_PROCESS_METRICS"] == "on"
        assert pod(workload).get("hostPID", False) is sees


def test_all_containers_of_a_pool_have_the_same_environment(objects: list[Object]) -> None:
    by_pool: dict[str, list[dict[str, str]]] = {}
    for workload, _, _, variables in every_container(objects):
        labels = workload["spec"]["selector"]["matchLabels"]
        by_pool.setdefault(labels["vgpu-agent/pool"], []).append(variables)
    for of_pool in by_pool.values():
        assert all(each == of_pool[0] for each in of_pool)


def test_real_gpus_are_asked_for_and_simulated_ones_are_not(objects: list[Object]) -> None:
    gpus = f"{DEVICES_DIRECTORY}/all"
    for workload, name, _, variables in every_container(objects):
        real = variables["VGPU_GPU_DRIVER"] == "nvml"
        mounted = real and variables["VGPU_DEVICE_LIST"] == "volume-mounts"
        asked = {
            "NVIDIA_DRIVER_CAPABILITIES": "compute,utility",
            "NVIDIA_VISIBLE_DEVICES": DEVICES_DIRECTORY if mounted else "all",
        }
        found = {key: value for key, value in variables.items() if key.startswith("NVIDIA_")}
        assert found == (asked if real else {})
        host = mounts(workload, name).get(gpus, {}).get("host")
        assert host == ("/dev/null" if mounted else None)


def test_selectors_are_disjoint_and_select_their_own_pods(objects: list[Object]) -> None:
    selectors = []
    for workload in daemon_sets(objects).values():
        selector = workload["spec"]["selector"]["matchLabels"]
        labels = workload["spec"]["template"]["metadata"]["labels"]
        assert selector.items() <= labels.items()
        # What never changes, so that upgrades do not: no version, no label of a user.
        assert set(selector) == {
            "app.kubernetes.io/name",
            "app.kubernetes.io/instance",
            "app.kubernetes.io/component",
            "vgpu-agent/pool",
        }
        selectors.append(tuple(sorted(selector.items())))
    assert len(set(selectors)) == len(selectors)


# The agent


def agents(objects: list[Object]) -> list[Object]:
    return [each for each in daemon_sets(objects).values() if component(each) == "agent"]


def test_an_agent_mounts_what_its_settings_use_and_nothing_else(objects: list[Object]) -> None:
    for workload, name, _, variables in every_container(objects):
        if name != "agent":
            continue
        kubelet, state = variables["VGPU_KUBELET_DIR"], variables["VGPU_STATE_DIRECTORY"]
        expected = {
            variables.get("VGPU_DEVICE_PLUGIN_DIR", f"{kubelet}/device-plugins"): False,
            f"{kubelet}/pod-resources": True,
            state: False,
        }
        mps, driver = variables.get("VGPU_MPS_DIRECTORY"), variables["VGPU_GPU_DRIVER"]
        if driver == "nvml" and mps and not mps.startswith(f"{state}/"):
            expected[mps] = False
        if not variables["VGPU_CORDON_DIRECTORY"].startswith(f"{state}/"):
            expected[variables["VGPU_CORDON_DIRECTORY"]] = False
        limits = variables["VGPU_MEMORY_LIMITS"] == "auto" and driver == "nvml"
        if variables["VGPU_PROCESS_METRICS"] == "on" or limits:
            expected[str(LINKS)] = True
        if limits:
            expected[CGROUPS] = True
        if "cdi" in variables["VGPU_DEVICE_LIST"]:
            expected |= {str(directory): True for directory in cdi.DIRECTORIES}
        found = mounts(workload, "agent")
        found.pop(f"{DEVICES_DIRECTORY}/all", None)
        assert {path: each["read_only"] for path, each in found.items()} == expected
        assert all(each["host"] == path for path, each in found.items())


# The enforcer of memory limits

CGROUPS = "/sys/fs/cgroup"
"""Where the driver opens the cgroups that it is given, whatever container asks."""


def test_an_enforcer_is_there_where_the_driver_must_limit_and_nowhere_else(
    objects: list[Object],
) -> None:
    for workload, name, container, variables in every_container(objects):
        mode = (variables["VGPU_MEMORY_LIMITS"], variables["VGPU_GPU_DRIVER"], component(workload))
        enforced = mode == ("driver", "nvml", "agent")
        assert ("limits" in containers(workload)) is enforced
        if name != "limits":
            continue
        assert container["args"] == ["limits", "enforce"]
        assert not {"livenessProbe", "readinessProbe", "startupProbe", "ports"} & set(container)
        assert container["resources"]["limits"] == {"memory": "96Mi"}
        found = mounts(workload, name)
        found.pop(f"{DEVICES_DIRECTORY}/all", None)
        assert {path: each["read_only"] for path, each in found.items()} == {
            CGROUPS: variables["VGPU_MEMORY_LIMITS_ENABLE_CONTROLLER"] == "off",
            str(settings_of(variables).plugin_directory): True,
            str(LINKS): True,
            variables["VGPU_STATE_DIRECTORY"]: False,
        }
        assert all(each["host"] == path for path, each in found.items())
        assert found[CGROUPS]["type"] == "Directory"


def test_every_kind_of_enforcer_is_rendered_by_a_file() -> None:
    found = [
        mounts(workload, name)[CGROUPS]["read_only"]
        for each in CI
        for workload, name, _, _ in every_container(rendered(each))
        if name == "limits"
    ]
    assert sorted(found) == [False, True]


def test_the_default_asks_for_no_privilege_that_an_agent_without_limits_has_not() -> None:
    (default,) = agents(rendered("default"))
    (off,) = agents(helm.render({"memoryLimits": "off"}))
    assert list(containers(default)) == list(containers(off)) == ["agent"]
    context = containers(default)["agent"]["securityContext"]
    assert context == containers(off)["agent"]["securityContext"]
    assert (context["capabilities"], context["allowPrivilegeEscalation"]) == (NOTHING, False)
    more = mounts(default, "agent").keys() - mounts(off, "agent").keys()
    assert more == {CGROUPS, str(LINKS)}
    assert all(mounts(default, "agent")[path]["read_only"] for path in more)
    assert {key for key in pod(default) if key.startswith("host")} == set()


def test_agents_roll_one_after_the_other_and_never_two_on_a_node() -> None:
    (agent,) = agents(rendered("default"))
    assert agent["spec"]["updateStrategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxSurge": 0, "maxUnavailable": "10%"},
    }
    assert pod(agent)["terminationGracePeriodSeconds"] == 10
    assert pod(agent)["priorityClassName"] == "system-node-critical"
    (agent,) = agents(rendered("time-slicing"))
    assert agent["spec"]["updateStrategy"] == {"type": "OnDelete"}
    assert pod(agent)["runtimeClassName"] == "nvidia"


def test_an_agent_is_probed_where_it_listens(objects: list[Object]) -> None:
    for _, name, container, variables in every_container(objects):
        if name != "agent":
            continue
        assert container["args"] == ["run"]
        (port,) = container["ports"]
        address = parse_address(variables["VGPU_METRICS_ADDRESS"])
        assert (port["name"], port["containerPort"]) == ("metrics", address.port)
        for probe, path in (("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")):
            assert container[probe]["httpGet"] == {"path": path, "port": "metrics"}


# MPS


def mps_pods(objects: list[Object]) -> list[Object]:
    return [each for each in daemon_sets(objects).values() if component(each) == "mps"]


def test_there_is_an_mps_pod_for_each_pool_of_real_gpus_shared_by_mps() -> None:
    names = {name: list(daemon_sets(rendered(name))) for name in CI}
    assert names["default"] == ["r-vgpu-agent", "r-vgpu-agent-mps"]
    assert names["time-slicing"] == names["simulated"] == ["r-vgpu-agent"]
    assert names["pools"] == [
        "r-vgpu-agent-inference",
        "r-vgpu-agent-notebooks",
        "r-vgpu-agent-whole-gpus",
        "r-vgpu-agent-mps-inference",
        "r-vgpu-agent-mps-whole-gpus",
    ]
    assert names["everything"] == ["our-vgpus-real", "our-vgpus-none", "our-vgpus-mps-real"]


ARGUMENTS = {
    "prepare": ["mps", "prepare"],
    "daemon": ["mps", "daemon"],
    "watch": ["mps", "watch"],
    "restore": ["mps", "restore", "--at-end"],
}


def test_an_mps_pod_is_ended_by_nothing_but_an_administrator(objects: list[Object]) -> None:
    for workload in mps_pods(objects):
        assert workload["spec"]["updateStrategy"] == {"type": "OnDelete"}
        assert [each["name"] for each in pod(workload)["initContainers"]] == ["prepare"]
        assert [each["name"] for each in pod(workload)["containers"]] == list(ARGUMENTS)[1:]
        for name, container in containers(workload).items():
            assert container["args"] == ARGUMENTS[name]
            assert not {"livenessProbe", "readinessProbe", "startupProbe", "ports"} & set(container)
            resources = container["resources"]
            if name == "daemon":
                assert {"cpu", "memory"} <= set(resources["requests"])
                assert "memory" in resources["limits"]
            else:
                assert resources["requests"] == resources["limits"]
                assert set(resources["limits"]) == {"cpu", "memory"}


def test_daemons_are_not_short_of_cpu_unless_somebody_says_so() -> None:
    (default,) = mps_pods(rendered("default"))
    assert set(containers(default)["daemon"]["resources"]["limits"]) == {"memory"}
    (everything,) = mps_pods(rendered("everything"))
    assert containers(everything)["daemon"]["resources"]["limits"] == {"cpu": "2", "memory": "4Gi"}


def test_a_pod_that_ends_has_time_for_daemons_and_for_what_was_before(
    objects: list[Object],
) -> None:
    for workload in mps_pods(objects):
        seconds = pod(workload)["terminationGracePeriodSeconds"]
        assert serve.QUIT_SECONDS + serve.BUSY_SECONDS + 2 * serve.KILL_SECONDS + 5 <= 35
        assert prepare.END_SECONDS >= 35 + 5
        assert seconds >= prepare.END_SECONDS + prepare.REMOVE_SECONDS + 10


def test_the_daemons_see_the_shared_memory_of_their_clients_as_their_own(
    objects: list[Object],
) -> None:
    for workload in mps_pods(objects):
        variables = environment(containers(workload)["daemon"])
        directory, shm = variables["VGPU_MPS_DIRECTORY"], variables["VGPU_MPS_SHM_DIRECTORY"]
        shared = variables["VGPU_MPS_SHM"] == "on"
        whole = {directory: directory} | ({shm: shm} if shared else {})
        expected = {
            "prepare": whole,
            "daemon": {directory: directory} | ({"/dev/shm": f"{shm}/{SHARED}"} if shared else {}),
            "watch": {directory: directory},
            "restore": whole,
        }
        for name, paths in expected.items():
            found = mounts(workload, name)
            found.pop(f"{DEVICES_DIRECTORY}/all", None)
            assert {path: each["host"] for path, each in found.items()} == paths
            assert not any(each["read_only"] for each in found.values())
            assert {each["type"] for each in found.values()} == {"DirectoryOrCreate"}
        for each in pod(workload)["containers"]:
            for mount in each["volumeMounts"]:
                assert mount.get("mountPropagation", "None") == "None"
                # It stays what it was at the first start of the pod.
                assert "subPath" not in mount


# Pools


def test_a_pool_has_the_common_values_where_it_has_none_of_its_own() -> None:
    sets = daemon_sets(rendered("pools"))
    inference = environment(containers(sets["r-vgpu-agent-inference"])["agent"])
    notebooks = environment(containers(sets["r-vgpu-agent-notebooks"])["agent"])
    assert inference["VGPU_HEALTH_INTERVAL"] == notebooks["VGPU_HEALTH_INTERVAL"] == "10"
    assert (inference["VGPU_DEVICE_MEMORY"], notebooks["VGPU_REPLICAS"]) == ("8Gi", "20")
    # False and the empty list are values like others.
    assert (inference["VGPU_HEALTH_CHECKS"], notebooks["VGPU_HEALTH_CHECKS"]) == ("on", "off")
    assert inference["VGPU_MPS_SHM"] == "off"
    assert inference["VGPU_IGNORED_XIDS"] == "13"
    assert "VGPU_IGNORED_XIDS" not in notebooks
    assert "tolerations" not in pod(sets["r-vgpu-agent-notebooks"])
    # Maps are merged.
    for name in ("inference", "mps-inference"):
        assert pod(sets[f"r-vgpu-agent-{name}"])["nodeSelector"] == {
            "kubernetes.io/os": "linux",
            "k8s.amazonaws.com/accelerator": "vgpu",
            "example.com/gpus": "inference",
        }


def test_null_takes_a_common_value_away() -> None:
    everything = daemon_sets(rendered("everything"))
    assert "runtimeClassName" not in pod(everything["our-vgpus-none"])
    assert pod(everything["our-vgpus-real"])["runtimeClassName"] == "nvidia"
    assert "k8s.amazonaws.com/accelerator" not in pod(everything["our-vgpus-real"])["nodeSelector"]


def test_who_comes_from_the_aws_plugin_gets_nearly_the_defaults() -> None:
    (compatible,) = agents(rendered("aws-compatible"))
    (default,) = agents(rendered("default"))
    assert pod(compatible)["nodeSelector"] == {
        "kubernetes.io/os": "linux",
        "k8s.amazonaws.com/accelerator": "vgpu",
        "vgpu-plugin": "agent",
    }
    variables = environment(containers(compatible)["agent"])
    assert variables.pop("VGPU_REPLICAS") == "10"
    limits = {"VGPU_MPS_LIMITS": "none"}
    assert variables == environment(containers(default)["agent"]) | limits


# The image and what is around


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ({}, f"vgpu-agent:{vgpu_agent.__version__}"),
        ({"repository": "r.example.com/v", "tag": "1.2"}, "r.example.com/v:1.2"),
        ({"tag": "1.2", "digest": f"sha256:{'a' * 64}"}, f"vgpu-agent@sha256:{'a' * 64}"),
    ],
)
def test_the_image_is_told_by_tag_or_digest(image: Object, expected: str) -> None:
    for workload in daemon_sets(helm.render({"image": image})).values():
        assert {each["image"] for each in containers(workload).values()} == {expected}


def test_labels_and_annotations_of_the_user_are_where_they_belong() -> None:
    for each in rendered("everything"):
        assert each["metadata"]["labels"]["team"] == "models"
    for workload in daemon_sets(rendered("everything")).values():
        metadata = workload["spec"]["template"]["metadata"]
        assert metadata["labels"]["example.com/mesh"] == "off"
        assert metadata["annotations"] == {"example.com/note": "everything"}
        assert pod(workload)["imagePullSecrets"] == [{"name": "registry"}]
        assert pod(workload)["serviceAccountName"] == "vgpus"
    plain = helm.render({"serviceAccount": {"create": False}})
    assert not of_kind(plain, "ServiceAccount")
    assert {pod(each)["serviceAccountName"] for each in daemon_sets(plain).values()} == {"default"}


def test_monitoring_and_network_policies_are_there_on_request() -> None:
    kinds = {each["kind"] for each in helm.installed(rendered("default"))}
    assert kinds == {"ServiceAccount", "DaemonSet"}


def selects(selector: Object, workload: Object) -> bool:
    labels = workload["spec"]["template"]["metadata"]["labels"]
    return selector["matchLabels"].items() <= labels.items()


def test_the_pod_monitor_selects_agents_and_keeps_their_labels() -> None:
    (monitor,) = of_kind(rendered("everything"), "PodMonitor").values()
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["honorLabels"] is True
    assert (endpoint["port"], endpoint["path"]) == ("metrics", "/metrics")
    assert endpoint["interval"] == "15s"
    assert endpoint["relabelings"] == [
        {"sourceLabels": ["__meta_kubernetes_pod_node_name"], "targetLabel": label}
        for label in ("node", "instance")
    ]
    (restored,) = endpoint["metricRelabelings"]
    assert restored["action"] == "labelmap"
    assert re.fullmatch(restored["regex"], "exported_pod").expand(r"\1") == "pod"
    assert restored["replacement"] == "$1"
    for workload in daemon_sets(rendered("everything")).values():
        assert selects(monitor["spec"]["selector"], workload) == (component(workload) == "agent")


def test_the_alerts_are_those_of_the_file_word_for_word() -> None:
    (rule,) = of_kind(rendered("everything"), "PrometheusRule").values()
    text = (CHART / "files/alerts.yaml").read_text("utf-8")
    assert "{{" in text, "nothing here that helm could have rendered"
    assert rule["spec"] == yaml.safe_load(text)
    assert rule["metadata"]["labels"]["release"] == "prometheus"


def test_alerts_link_to_the_runbook_where_it_can_be_read() -> None:
    book = {"enabled": True, "runbookUrl": "https://docs.example.com/vgpu.html"}
    (rule,) = of_kind(
        helm.render({"monitoring": {"prometheusRule": book}}), "PrometheusRule"
    ).values()
    links = [
        each["annotations"]["runbook_url"]
        for group in rule["spec"]["groups"]
        for each in group["rules"]
        if "alert" in each
    ]
    assert "https://docs.example.com/vgpu.html#vgpuagentdown" in links


def boards(release: str = "r", **values: object) -> dict[str, Any]:
    """The dashboards of a release, by the name of their ConfigMap."""
    text = helm.template(
        {"monitoring": {"dashboards": {"enabled": True}}, **values}, release=release
    )
    maps = of_kind(list(yaml.safe_load_all(text)), "ConfigMap")
    return {name: json.loads(data) for name, each in maps.items() for data in each["data"].values()}


def test_each_dashboard_is_a_config_map_with_the_file_but_for_uid_title_and_link() -> None:
    files = {path.stem: path.read_text("utf-8") for path in CHART.glob("files/dashboards/*.json")}
    maps = of_kind(rendered("everything"), "ConfigMap")
    assert len(files) == len(maps) > 0
    for name, text in files.items():
        found = maps[f"our-vgpus-dashboard-{name}"]
        assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert found["metadata"]["annotations"] == {"grafana_folder": "GPUs"}
        (data,) = found["data"].values()
        board, file = json.loads(data), json.loads(text)
        assert board["title"] == f"{file['title']}, gpu/our-vgpus"
        for each in (board, file):
            del each["uid"], each["title"], each["links"][0]["url"]
        assert board == file


def test_the_dashboards_of_two_releases_have_their_own_uids_and_lead_to_each_other() -> None:
    releases = [boards("r"), boards("s"), boards("r", fullnameOverride="x" * 63)]
    uids = [board["uid"] for release in releases for board in release.values()]
    titles = [board["title"] for release in releases for board in release.values()]
    assert len(set(uids)) == len(set(titles)) == 6
    for release in releases:
        fleet, node = release.values()
        assert fleet["links"][0]["url"] == f"/d/{node['uid']}?${{datasource:queryparam}}"
        assert node["links"][0]["url"] == f"/d/{fleet['uid']}?${{datasource:queryparam}}"
        for board in (fleet, node):
            assert re.fullmatch(r"vgpu-(fleet|node)-[0-9a-f]{10}", board["uid"])
            assert len(board["uid"]) <= 40, "longer than Grafana takes"


def test_the_network_is_closed_but_for_metrics() -> None:
    policies = of_kind(helm.installed(rendered("everything")), "NetworkPolicy")
    closed = policies.pop("our-vgpus")["spec"]
    assert closed["policyTypes"] == ["Ingress", "Egress"]
    assert not {"ingress", "egress"} & set(closed)
    workloads = daemon_sets(rendered("everything"))
    assert all(selects(closed["podSelector"], workload) for workload in workloads.values())
    for name, workload in workloads.items():
        opened = [
            each for each in policies.values() if selects(each["spec"]["podSelector"], workload)
        ]
        if component(workload) == "mps":
            assert opened == []
            continue
        assert [each["metadata"]["name"] for each in opened] == [f"{name}-metrics"]
        (rule,) = opened[0]["spec"]["ingress"]
        assert rule["ports"] == [{"port": 9500, "protocol": "TCP"}]
        assert rule["from"] == VALUES_OF_EVERYTHING["networkPolicy"]["from"]
    opened_to_all = helm.installed(helm.render({"networkPolicy": {"enabled": True}}))
    (_, anybody) = of_kind(opened_to_all, "NetworkPolicy").values()
    (rule,) = anybody["spec"]["ingress"]
    assert "from" not in rule


@pytest.mark.parametrize("name", CI)
def test_helm_test_asks_an_agent_of_each_pool(name: str) -> None:
    objects = helm.tested(rendered(name))
    pods = of_kind(objects, "Pod")
    services = of_kind(objects, "Service")
    (test,) = pods.values()
    _, _, script, _, *asked = test["spec"]["containers"][0]["command"]
    assert script.strip() == (CHART / "files/readyz.py").read_text().strip()
    workloads = agents(rendered(name))
    assert len(asked) == len(services) == len(workloads)
    for each, workload in zip(asked, workloads, strict=True):
        service_name, _, port = each.rpartition(":")
        assert re.fullmatch(r"[a-z][-a-z0-9]{0,62}", service_name)
        service = services[service_name]["spec"]
        # A headless Service: no variables in other containers, and its port is the pods' own.
        assert service["clusterIP"] == "None"
        labels = workload["spec"]["template"]["metadata"]["labels"]
        assert service["selector"].items() <= labels.items()
        assert [
            other for other in workloads if selects({"matchLabels": service["selector"]}, other)
        ] == [workload]
        (metrics,) = containers(workload)["agent"]["ports"]
        assert int(port) == service["ports"][0]["port"] == metrics["containerPort"]
        assert service["ports"][0]["targetPort"] == metrics["name"]


@pytest.mark.parametrize("name", CI)
def test_the_pod_of_helm_test_may_nothing_and_outlives_only_itself(name: str) -> None:
    objects = helm.tested(rendered(name))
    for each in objects:
        policy = each["metadata"]["annotations"]["helm.sh/hook-delete-policy"].split(",")
        # The pod stays for its log, what opens the network goes.
        assert ("hook-succeeded" in policy) == (each["kind"] != "Pod")
        assert "before-hook-creation" in policy
    (test,) = of_kind(objects, "Pod").values()
    spec, (container,) = test["spec"], test["spec"]["containers"]
    assert spec["automountServiceAccountToken"] is spec["enableServiceLinks"] is False
    assert not {"hostPID", "hostNetwork", "hostIPC", "volumes"} & set(spec)
    assert container["securityContext"] == {
        "runAsUser": 65534,
        "runAsNonRoot": True,
        "allowPrivilegeEscalation": False,
        "capabilities": NOTHING,
        "readOnlyRootFilesystem": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    agent = containers(agents(rendered(name))[0])["agent"]
    for key in ("image", "imagePullPolicy"):
        assert container[key] == agent[key]


def test_a_closed_network_lets_helm_test_through() -> None:
    objects = rendered("everything")
    labels = of_kind(objects, "Pod")["try-our-vgpus"]["metadata"]["labels"]
    outgoing, incoming = (
        of_kind(helm.tested(objects), "NetworkPolicy")[name]["spec"]
        for name in ("try-our-vgpus", "try-our-vgpus-agents")
    )
    assert outgoing["policyTypes"] == ["Egress"]
    assert outgoing["podSelector"]["matchLabels"].items() <= labels.items()
    dns, to_agents = outgoing["egress"]
    assert dns == {"ports": [{"port": 53, "protocol": each} for each in ("UDP", "TCP")]}
    assert to_agents["ports"] == [{"port": 9500, "protocol": "TCP"}]
    assert incoming["policyTypes"] == ["Ingress"]
    (from_test,) = incoming["ingress"]
    assert from_test["ports"] == to_agents["ports"]
    assert from_test["from"] == [{"podSelector": outgoing["podSelector"]}]
    assert to_agents["to"] == [{"podSelector": incoming["podSelector"]}]
    for workload in daemon_sets(objects).values():
        opened = selects(incoming["podSelector"], workload)
        assert opened == (component(workload) == "agent")
    assert not of_kind(helm.tested(rendered("default")), "NetworkPolicy")


VALUES_OF_EVERYTHING = yaml.safe_load(CI["everything"].read_text())


@pytest.mark.parametrize("name", CI)
def test_the_notes_name_the_next_commands(name: str, tmp_path: Path) -> None:
    # Helm shows notes only when it installs: here they are a template like the others.
    chart = tmp_path / "chart"
    shutil.copytree(CHART, chart)
    notes = chart / "templates/NOTES.txt"
    define = f'{{{{ define "notes" }}}}{notes.read_text()}{{{{ end }}}}'
    (chart / "templates/_notes.tpl").write_text(define)
    (chart / "templates/notes.yaml").write_text('notes: |-2\n{{ include "notes" . | indent 2 }}\n')
    notes.unlink()
    text = helm.template(None, CI[name], chart=chart)
    (said,) = [
        each["notes"] for each in yaml.load_all(text, helm.Loader) if each and "notes" in each
    ]
    for words in ("1. ", "2. ", "3. ", "vgpu-agent doctor", "enforce=privileged"):
        assert words in said
    assert ("MPS pods" in said) == bool(mps_pods(rendered(name)))
    enforced = any("limits" in containers(each) for each in agents(rendered(name)))
    assert ("memoryLimits: driver" in said) == enforced
    manifest = said.partition("<<EOF\n")[2].partition("EOF")[0]
    test_pod = yaml.safe_load(manifest)
    first = agents(rendered(name))[0]
    resource = environment(containers(first)["agent"])["VGPU_RESOURCE_NAME"]
    assert test_pod["spec"]["containers"][0]["resources"] == {"limits": {resource: 1}}
    found = re.search(r"get pods -l (\S+) --field-selector", said)
    assert found
    labels = first["spec"]["template"]["metadata"]["labels"]
    assert all(
        labels[key] == value for key, value in (each.split("=") for each in found[1].split(","))
    )
