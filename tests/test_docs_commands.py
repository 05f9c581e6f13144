"""The documents' kubectl, helm and PromQL: what they tell to type can be typed."""

import json
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from tests.chart import helm
from tests.documents import DOCUMENTS, ROOT, blocks, commands, read
from tests.observe.test_alerts import promtool

__all__ = ["promtool"]

EVERYWHERE = {"-n", "--namespace"}
KUBECTL = {
    "apply": {"-f"},
    "cordon": set[str](),
    "create": set[str](),
    "delete": set[str](),
    "describe": set[str](),
    "drain": {"--ignore-daemonsets", "--delete-emptydir-data"},
    "exec": {"-c"},
    "get": {"-A", "-l", "-o", "--field-selector", "--watch"},
    "label": {"--all", "--overwrite", "-l"},
    "logs": {"-c", "--previous"},
    "patch": {"--patch", "--type"},
    "port-forward": set[str](),
    "rollout": set[str](),
    "uncordon": set[str](),
    "wait": {"--for"},
}
"""The commands of kubectl that we name, and their flags, as in kubectl 1.32."""


def given(program: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for name, path in DOCUMENTS.items():
        for words in commands(read(path), program):
            yield name, words


def parts(words: tuple[str, ...]) -> tuple[str, list[str]]:
    """The command and its flags: all that is before `--`, which is for a container."""
    ours = words[: words.index("--")] if "--" in words else words
    flags = [
        re.sub("=.*", "", word, flags=re.DOTALL) for word in ours if re.match("--?[a-zA-Z]", word)
    ]
    rest = [
        word
        for before, word in zip(("", *ours), ours, strict=False)
        if not word.startswith("-") and before not in EVERYWHERE
    ]
    # `helm get` has commands of its own.
    return " ".join(rest[: 2 if rest[:2] == ["get", "values"] else 1]), flags


def unknown_to_kubectl(words: tuple[str, ...]) -> str | None:
    """What is wrong with a command of kubectl."""
    command, flags = parts(words)
    if command not in KUBECTL:
        return f"no command {command}"
    wrong = [flag for flag in flags if flag not in KUBECTL[command] | EVERYWHERE]
    if wrong:
        return f"{command} has no {wrong[0]}"
    if "--patch" in words:
        json.loads(words[words.index("--patch") + 1])
    return None


def test_every_command_of_kubectl_can_be_given():
    found = list(given("kubectl"))
    assert {"drain", "exec", "get", "patch"} <= {parts(words)[0] for _, words in found}
    wrong = [(name, words, why) for name, words in found if (why := unknown_to_kubectl(words))]
    assert wrong == []


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("get", "pods", "--field-selektor", "a=b"), "get has no --field-selektor"),
        (("-n", "vgpu", "evict", "POD"), "no command evict"),
        (("exec", "POD", "--", "vgpu-agent", "status", "--watch"), None),
    ],
)
def test_a_command_of_kubectl_that_cannot_be_given_is_seen(words, why):
    assert unknown_to_kubectl(words) == why


def test_a_patch_that_is_no_json_is_seen():
    with pytest.raises(ValueError, match="Expecting"):
        unknown_to_kubectl(("patch", "daemonset", "NAME", "--patch", '{"spec": {]}'))


# Helm

PLACEHOLDERS = {"REGISTRY": "registry.example"}


@cache
def flags_of_helm(command: str) -> frozenset[str]:
    shown = helm.run(*command.split(), "--help").stdout
    return frozenset(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", shown))


@pytest.mark.slow
def test_every_command_of_helm_can_be_given():
    found = list(given("helm"))
    assert {"install", "upgrade", "uninstall", "test"} <= {parts(words)[0] for _, words in found}
    wrong = [
        (name, words)
        for name, words in found
        if not set(parts(words)[1]) <= flags_of_helm(parts(words)[0])
    ]
    assert wrong == []


def filled(word: str) -> str | Path:
    """A word of a command as it is typed; paths are those of the repository."""
    for placeholder, value in PLACEHOLDERS.items():
        word = word.replace(placeholder, value)
    return ROOT / word if (ROOT / word).exists() else word


def installations() -> set[tuple[str, ...]]:
    """The words after `helm install` and `helm upgrade` of our chart, of all documents."""
    return {
        words[1:]
        for _, words in given("helm")
        if words[0] in ("install", "upgrade") and len(words) > 2 and words[2].startswith("charts/")
    }


@pytest.mark.slow
@pytest.mark.parametrize("words", sorted(installations()), ids=" ".join)
def test_every_installation_renders_with_the_values_of_its_document(words):
    # `helm template` has no release whose values it could reuse, and no file of the reader's.
    known = [word for word in words if word != "--reuse-values"]
    if "values.yaml" in known:
        file = known.index("values.yaml")
        del known[file - 1 : file + 1]
    done = helm.run("template", *map(filled, known))
    assert done.returncode == 0, done.stderr
    assert {each["kind"] for each in yaml.safe_load_all(done.stdout) if each} >= {"DaemonSet"}


# PromQL

HOLDERS = (
    'vgpu_allocation_info{gpu_uuid="GPU-0", gpu_index="0", namespace="team", pod="%s", node="n"}'
)


@pytest.mark.slow
def test_the_join_with_dcgm_exporter_gives_each_pod_the_value_of_its_gpu(promtool, tmp_path):
    (query,) = blocks(DOCUMENTS["docs/beside.md"], "promql")
    series = {
        HOLDERS % "a": "1",
        # It has two vGPUs.
        HOLDERS.replace("{", '{device_id="GPU-0::1", ') % "b": "1",
        HOLDERS.replace("{", '{device_id="GPU-0::2", ') % "b": "1",
        # As with KUBERNETES_VIRTUAL_GPUS: a series for each pod.
        'DCGM_FI_DEV_GPU_UTIL{UUID="GPU-0", pod="a"}': "40",
        'DCGM_FI_DEV_GPU_UTIL{UUID="GPU-0", pod="b"}': "40",
        'DCGM_FI_DEV_GPU_UTIL{UUID="GPU-1"}': "90",
    }
    labels = '{gpu_uuid="GPU-0", namespace="team", node="n", pod="%s"}'
    expected = [{"labels": labels % pod, "value": 40} for pod in "ab"]
    case = {
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [{"expr": query, "eval_time": "0s", "exp_samples": expected}],
    }
    file = tmp_path / "cases.yaml"
    file.write_text(yaml.safe_dump({"tests": [case]}))
    done = subprocess.run(
        [promtool, "test", "rules", file], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
