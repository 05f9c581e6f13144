"""The manifests of examples/: valid for every Kubernetes that we claim, and what their pods get."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubernetes_validate import utils

from tests import metrics_table
from vgpu_agent.gpu.simulated import simulated_gpus
from vgpu_agent.model.container import Grant, grant
from vgpu_agent.model.devices import Gpu, Inventory, SharedGpu
from vgpu_agent.model.rules import MIB, SharingRules
from vgpu_agent.model.share import divide
from vgpu_agent.settings import GpuDriverKind
from vgpu_agent.settings_reading import embedded

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
VERSIONS = [f"1.{minor}" for minor in range(26, 38)]
RESOURCE = embedded(gpu_driver=GpuDriverKind.NVML).resource_name

FILES = {path.relative_to(EXAMPLES).as_posix(): path for path in EXAMPLES.rglob("*.yaml")}
VALUES = {"trial/values.yaml": "vgpu-agent", "hpa-adapter-values.yaml": "prometheus-adapter"}
"""Values of charts, which are no manifests."""
ORIGINALS = {"from-aws/resnet.yaml", "from-aws/nbody.yaml"}
MANIFESTS = sorted(FILES.keys() - VALUES.keys())


@cache
def manifests(name: str) -> tuple[Mapping[str, Any], ...]:
    return tuple(each for each in yaml.safe_load_all(FILES[name].read_text("utf-8")) if each)


def pod_specs(name: str) -> Iterator[Mapping[str, Any]]:
    for each in manifests(name):
        if each["kind"] == "Pod":
            yield each["spec"]
        elif "template" in each["spec"]:
            yield each["spec"]["template"]["spec"]


def containers(name: str) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Each container with the spec of its pod."""
    for spec in pod_specs(name):
        for container in [*spec.get("initContainers", ()), *spec["containers"]]:
            yield spec, container


def vgpus(container: Mapping[str, Any]) -> int:
    return container.get("resources", {}).get("limits", {}).get(RESOURCE, 0)


# What the kubelet makes of it


@dataclass(frozen=True, slots=True)
class Started:
    """The environment of a container, and what is mounted where, as it is started."""

    environment: Mapping[str, str]
    mounts: Mapping[str, str]


def merge(spec: Mapping[str, Any], container: Mapping[str, Any], given: Grant) -> Started:
    """As the kubelet does: the pod's own variables win, and its own mounts come last."""
    own = {each["name"]: each["value"] for each in container.get("env", ())}
    volumes = {each["name"]: each for each in spec.get("volumes", ())}
    mounts = {mount.container_path: mount.host_path for mount in given.mounts}
    for each in container.get("volumeMounts", ()):
        volume = volumes[each["name"]]
        path = volume["hostPath"]["path"] if "hostPath" in volume else f"volume {each['name']}"
        mounts[each["mountPath"]] = path
    return Started({**given.environment, **own}, mounts)


GPU = Gpu("GPU-5d2ef1a4-0a3c-4b9e-8f6c-2f7f5c1b9e10", 0, "NVIDIA L4", 24576 * MIB, "0:1:0.0")
MPS = SharingRules(memory_reserved=512 * MIB)
PIPE, SHM = f"{MPS.mps_directory}/{GPU.uuid}/pipe", f"{MPS.mps_shm_directory}/shared"


def node_of(gpus: Iterable[Gpu], rules: SharingRules) -> Inventory:
    """These GPUs, divided as the rules say."""
    made = [(gpu, divide(gpu, rules)) for gpu in gpus]
    return Inventory(
        tuple(
            SharedGpu(gpu, m.replicas, usable_bytes=m.usable_bytes, vgpu_bytes=m.vgpu_bytes)
            for gpu, m in made
        )
    )


NODE = node_of([GPU], MPS)


def started(name: str) -> Started:
    """The one container of a file that holds vGPUs, on a node with a GPU of ten."""
    ((spec, container),) = [each for each in containers(name) if vgpus(each[1])]
    ids = [f"{GPU.uuid}::{number}" for number in range(vgpus(container))]
    return merge(spec, container, grant(NODE, ids, MPS))


# All of them


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_every_manifest_is_valid_for_every_kubernetes_that_we_claim(version, monkeypatch):
    monkeypatch.setattr(utils, "schema_contents", cache(utils.schema_contents))
    for name in MANIFESTS:
        for each in manifests(name):
            assert kubernetes_validate.validate(each, version, strict=True) == version, name
    assert kubernetes_validate.latest_version() == f"{VERSIONS[-1]}.0"


def test_every_file_is_a_manifest_or_known_values():
    assert VALUES.keys() <= FILES.keys()
    for name in MANIFESTS:
        assert manifests(name), name
        assert all({"apiVersion", "kind", "metadata"} <= each.keys() for each in manifests(name))


@pytest.mark.parametrize("name", MANIFESTS)
def test_limits_name_our_resource_and_nothing_else_and_images_have_a_tag(name):
    for _, container in containers(name):
        resources = container.get("resources", {})
        named = {key for each in resources.values() for key in each if "/" in key}
        assert named <= {RESOURCE}
        assert RESOURCE not in resources.get("requests", {}), "the limit is the request"
        assert vgpus(container) in range(11)
        assert isinstance(vgpus(container), int)
        assert re.fullmatch(r".+:(?!.*latest)[^/:]+", container["image"]), "no tag says which"
    if next(pod_specs(name), None):
        assert any(vgpus(container) for _, container in containers(name))


@pytest.mark.parametrize("name", MANIFESTS)
def test_no_pod_needs_anything_of_the_host(name):
    for spec in pod_specs(name):
        asked = {key for key in ("hostIPC", "hostPID", "hostNetwork") if spec.get(key)}
        asked |= {key for each in spec.get("volumes", ()) for key in each if key == "hostPath"}
        assert asked == ({"hostIPC", "hostPath"} if name in ORIGINALS else set())
        assert "securityContext" not in spec
    assert all("securityContext" not in container for _, container in containers(name))


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_service_finds_its_pods_and_their_port(name):
    for service in manifests(name):
        if service["kind"] != "Service":
            continue
        (deployment,) = [each for each in manifests(name) if each["kind"] == "Deployment"]
        template = deployment["spec"]["template"]
        assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
        assert deployment["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]
        ports = [
            port.get(key)
            for container in template["spec"]["containers"]
            for port in container["ports"]
            for key in ("name", "containerPort")
        ]
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= set(ports)


@pytest.mark.parametrize("name", [each for each in MANIFESTS if each not in ORIGINALS])
def test_no_pod_hides_the_shared_memory_or_lifts_its_own_limits(name):
    for spec, container in containers(name):
        if not vgpus(container):
            continue
        given = grant(NODE, [f"{GPU.uuid}::0"], MPS)
        assert not {each["name"] for each in container.get("env", ())} & given.environment.keys()
        assert merge(spec, container, given).mounts["/dev/shm"] == SHM


def test_the_readme_lists_every_file():
    text = (EXAMPLES / "README.md").read_text("utf-8")
    listed = re.findall(r"^\| \[.*?\]\((.*?)\)", text, re.MULTILINE)
    trial = {name for name in FILES if name.startswith("trial/")}
    assert sorted(listed) == sorted([*(FILES.keys() - trial), "trial/README.md"])
    steps = (EXAMPLES / "trial/README.md").read_text("utf-8")
    assert all(f"examples/{name}" in steps for name in trial)


def test_two_vllm_servers_fit_on_one_gpu():
    assert 2 * float(started("serving/vllm.yaml").environment["VGPU_MEMORY_FRACTION"]) <= 1
    (deployment,) = [e for e in manifests("serving/vllm.yaml") if e["kind"] == "Deployment"]
    assert deployment["spec"]["replicas"] == 2
    assert deployment["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == 0


# From the AWS plugin


@pytest.mark.parametrize("name", [each for each in MANIFESTS if each.startswith("from-aws/")])
def test_a_workload_of_the_aws_plugin_becomes_a_client_with_its_share(name):
    got = started(name)
    own = {"MODEL_NAME": "resnet"} if "resnet" in name else {}
    ((_, container),) = containers(name)
    held = vgpus(container)
    assert got.environment.items() >= own.items()
    assert got.environment["NVIDIA_VISIBLE_DEVICES"] == GPU.uuid
    assert got.environment["VGPU_SHARE"] == f"{held}/10"
    assert got.environment["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == str(10 * held)
    limit = int(got.environment["VGPU_MEMORY_BYTES"]) // MIB
    assert got.environment["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] == f"0={limit}M"
    # The daemon that it is told of is the one that it gets, whatever it mounts itself.
    assert got.mounts[got.environment["CUDA_MPS_PIPE_DIRECTORY"]] == PIPE
    assert got.mounts["/dev/shm"] == SHM
    own_mounts = {"/tmp/nvidia-mps": "/tmp/nvidia-mps"} if name in ORIGINALS else {}
    assert got.mounts == {PIPE: PIPE, "/dev/shm": SHM} | own_mounts


def test_both_forms_of_the_job_get_the_same():
    long, short = started("from-aws/nbody.yaml"), started("from-aws/nbody-short.yaml")
    assert long.environment == short.environment
    assert long.mounts.items() - short.mounts.items() == {("/tmp/nvidia-mps", "/tmp/nvidia-mps")}


def test_the_aws_server_asks_for_twice_its_share_and_the_short_one_holds_what_it_asks_for():
    ((_, container),) = containers("from-aws/resnet.yaml")
    (asked,) = [float(each.partition("=")[2]) for each in container["args"]]
    held = {
        name: float(started(f"from-aws/{name}.yaml").environment["VGPU_MEMORY_FRACTION"])
        for name in ("resnet", "resnet-short")
    }
    assert asked >= 2 * held["resnet"]
    assert 0.9 * asked < held["resnet-short"] <= asked


# The autoscaler


def test_the_autoscaler_scales_an_example_by_the_metric_that_the_adapter_makes():
    (scaler,) = manifests("hpa.yaml")
    target = scaler["spec"]["scaleTargetRef"]
    deployments = {
        (each["apiVersion"], each["kind"], each["metadata"]["name"])
        for name in MANIFESTS
        for each in manifests(name)
    }
    assert (target["apiVersion"], target["kind"], target["name"]) in deployments
    (rule,) = yaml.safe_load(FILES["hpa-adapter-values.yaml"].read_text())["rules"]["custom"]
    (metric,) = [each["pods"]["metric"]["name"] for each in scaler["spec"]["metrics"]]
    assert metric == rule["name"]["as"]
    used = set(re.findall(r"vgpu_\w+", rule["seriesQuery"] + rule["metricsQuery"]))
    labels = metrics_table.labels()
    assert used <= labels.keys()
    assert len(used) == 2
    for label in rule["resources"]["overrides"]:
        assert all(label in labels[name] for name in used)


def test_the_quota_bounds_our_resource():
    (quota,) = manifests("resourcequota.yaml")
    assert list(quota["spec"]["hard"]) == [f"requests.{RESOURCE}"]


# The trial


def test_the_values_of_the_trial_are_values_of_the_chart():
    values = yaml.safe_load(FILES["trial/values.yaml"].read_text())
    chart = yaml.safe_load((ROOT / "charts/vgpu-agent/values.yaml").read_text())
    assert values["gpuDriver"] == "simulated"
    assert values.keys() <= chart.keys()
    assert values["simulated"].keys() <= chart["simulated"].keys()


def test_the_trial_prints_what_its_readme_shows():
    settings = embedded(gpu_driver=GpuDriverKind.SIMULATED)
    gpus = simulated_gpus(
        yaml.safe_load(FILES["trial/values.yaml"].read_text())["simulated"]["gpus"],
        settings.simulated_model,
        settings.simulated_memory,
        settings.simulated_numa_nodes,
    )
    node = node_of(gpus, settings.sharing_rules())
    ((_, container),) = containers("trial/pod.yaml")
    ids = list(node.device_ids)[: vgpus(container)]
    given = grant(node, ids, settings.sharing_rules())
    text = (EXAMPLES / "trial/README.md").read_text("utf-8")
    shown = {line.strip() for line in text.splitlines()}
    expected = {f"{name}={value}" for name, value in given.environment.items()}
    expected |= {f"{mount.container_path} tmpfs" for mount in given.mounts}
    assert expected <= shown
    assert f"The node has {len(list(node.device_ids))} vGPUs" in text
