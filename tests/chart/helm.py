"""The chart as helm renders it. Every test of it needs the real helm."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

CHART = Path(__file__).parents[2] / "charts/vgpu-agent"
CI = {path.name.removesuffix("-values.yaml"): path for path in sorted(CHART.glob("ci/*"))}

Object = dict[str, Any]


def helm() -> str:
    """The program: that of the virtual environment, or one on the PATH."""
    found = shutil.which("helm", path=Path(sys.prefix, "bin")) or shutil.which("helm")
    if found is None:
        pytest.skip("no helm")
    return found


def run(command: str, *arguments: str | Path, values: object = None) -> Any:
    """`helm COMMAND` with these values over those of the arguments."""
    given = () if values is None else ("--values", "-")
    return subprocess.run(
        [helm(), command, *arguments, *given],
        input=json.dumps(values),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def template(
    values: object = None,
    *files: Path,
    sets: Sequence[str] = (),
    chart: Path = CHART,
    release: str = "r",
) -> str:
    """What would be installed, as text, in namespace `gpu`; `sets` are those of `--set`."""
    chosen = [word for file in files for word in ("--values", str(file))]
    chosen += [word for each in sets for word in ("--set", each)]
    done = run("template", release, chart, "--namespace", "gpu", *chosen, values=values)
    assert done.returncode == 0, done.stderr
    return done.stdout


def render(
    values: object = None, *files: Path, sets: Sequence[str] = (), chart: Path = CHART
) -> list[Object]:
    """The same, parsed."""
    text = template(values, *files, sets=sets, chart=chart)
    return [each for each in yaml.load_all(text, Loader) if each]


def refusal(values: Mapping[str, object], *sets: str) -> str:
    """Why these values are not taken, in one line; all of the chart's own words are in it."""
    chosen = [word for each in sets for word in ("--set", each)]
    done = run("template", "r", CHART, *chosen, values=values)
    assert done.returncode != 0, "the values were taken"
    return " ".join(done.stderr.split())


class Loader(yaml.CSafeLoader):
    """Refuses a key that is there twice, as helm install does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        assert len(mapping) == len(node.value), f"a key is there twice: {node.start_mark}"
        return mapping


# What is in it


def of_kind(objects: Sequence[Object], kind: str) -> dict[str, Object]:
    """By name."""
    return {each["metadata"]["name"]: each for each in objects if each["kind"] == kind}


def installed(objects: Sequence[Object]) -> list[Object]:
    """Without what is there for `helm test` only."""
    return [each for each in objects if not is_hook(each)]


def tested(objects: Sequence[Object]) -> list[Object]:
    """What is there for `helm test` only."""
    return [each for each in objects if is_hook(each)]


def is_hook(one: Object) -> bool:
    return "helm.sh/hook" in one["metadata"].get("annotations", ())


def pod(workload: Object) -> Object:
    return workload["spec"]["template"]["spec"]


def containers(workload: Object) -> dict[str, Object]:
    """All of a workload's pods, by name."""
    spec = pod(workload)
    return {each["name"]: each for each in [*spec.get("initContainers", ()), *spec["containers"]]}


OF_POD = {"spec.nodeName": "gpu-1", "metadata.name": "pod-1", "metadata.namespace": "gpus"}
"""What the downward API says of a pod."""


def environment(container: Object) -> dict[str, str]:
    return {
        each["name"]: each["value"]
        if "value" in each
        else OF_POD[each["valueFrom"]["fieldRef"]["fieldPath"]]
        for each in container["env"]
    }


def mounts(workload: Object, name: str) -> dict[str, Object]:
    """A container's mounts of the host by their path in it, each with `host` path and `type`."""
    volumes = {
        each["name"]: each["hostPath"] for each in pod(workload)["volumes"] if "hostPath" in each
    }
    return {
        each["mountPath"]: {
            "host": volumes[each["name"]]["path"],
            "type": volumes[each["name"]]["type"],
            "read_only": each.get("readOnly", False),
        }
        for each in containers(workload)[name]["volumeMounts"]
        if each["name"] in volumes
    }


def settings_of(objects: Sequence[Object]) -> Iterator[dict[str, str]]:
    """The VGPU_* variables of each container."""
    for workload in of_kind(objects, "DaemonSet").values():
        for container in containers(workload).values():
            variables = environment(container)
            yield {key: value for key, value in variables.items() if key.startswith("VGPU_")}
