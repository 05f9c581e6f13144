"""The documents: what they link to, name and tell to type is there."""

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml

from tests import metrics_table, sizes_table
from tests.documents import DOCUMENTS, ROOT, TEXTS, Document, read
from tests.examples.test_examples import VERSIONS
from vgpu_agent import __version__, cli
from vgpu_agent import settings as configuration
from vgpu_agent.model.container import grant
from vgpu_agent.model.devices import Gpu, Inventory, SharedGpu
from vgpu_agent.model.rules import SharingRules

CHART = ROOT / "charts/vgpu-agent/values.yaml"


def test_the_readme_is_short():
    assert len(DOCUMENTS["README.md"].read_text("utf-8").splitlines()) < 180


def test_the_changelog_is_of_this_version():
    headings = re.findall(r"^## (.+)$", DOCUMENTS["CHANGELOG.md"].read_text("utf-8"), re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    assert re.fullmatch(rf"\[{re.escape(__version__)}\] - \d{{4}}-\d\d-\d\d", headings[1])


def test_every_image_that_is_named_is_of_this_version():
    named = {
        match
        for path in TEXTS.values()
        for match in re.findall(r"vgpu-agent:(\d+\.[\w.]+)", path.read_text("utf-8"))
    }
    assert named == {__version__}


# Links


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    found: dict[str, int] = {}
    names = set()
    for heading in filter(None, (re.match(r"#{1,6} (.+)", line) for line in read(path).prose)):
        text = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading[1]).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        count = found.get(slug, 0)
        found[slug] = count + 1
        names.add(f"{slug}-{count}" if count else slug)
    return names


def links(path: Path) -> Iterator[tuple[str, Path, str]]:
    """The links within the repository: as written, the file and the heading that it means."""
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8").replace("\n", " ")):
        file, _, anchor = target.partition("#")
        if not re.match(r"[a-z]+:", target):
            yield target, (path.parent / file).resolve() if file else path, anchor


def test_every_link_within_the_repository_leads_somewhere():
    found = [(name, *link) for name, path in DOCUMENTS.items() for link in links(path)]
    assert len(found) > 50
    for name, target, there, anchor in found:
        inside = there.exists() and there.is_relative_to(ROOT)
        assert inside, f"{name}: {target}: no such file"
        assert not anchor or anchor in anchors(there), f"{name}: {target}: no such heading"


def test_the_readme_links_every_document_of_the_repository():
    linked = {there for _, there, _ in links(DOCUMENTS["README.md"])}
    pages = {path for name, path in DOCUMENTS.items() if name.startswith(("docs/", "charts/"))}
    assert pages - linked == set()
    assert DOCUMENTS["SECURITY.md"] in linked


def test_links_to_elsewhere_are_of_pages_that_anybody_can_read():
    found = {
        target
        for path in DOCUMENTS.values()
        for target in re.findall(r"\]\(([a-z]+:[^)\s]+)\)", path.read_text("utf-8"))
    }
    assert len(found) > 20
    assert {target for target in found if not target.startswith("https://")} == set()


# Claims


def test_the_versions_that_are_claimed_are_those_that_are_tested():
    chart = yaml.safe_load((ROOT / "charts/vgpu-agent/Chart.yaml").read_text("utf-8"))
    assert chart["kubeVersion"] == f">={VERSIONS[0]}.0-0"
    for name in ("README.md", "examples/README.md"):
        text = DOCUMENTS[name].read_text("utf-8")
        assert f"schemas of {VERSIONS[0]} to {VERSIONS[-1]}" in text.replace("Kubernetes ", ""), (
            name
        )
    assert f"{VERSIONS[0]} or newer" in DOCUMENTS["README.md"].read_text("utf-8")


def test_the_share_that_the_readme_names_is_that_of_the_table():
    text = DOCUMENTS["README.md"].read_text("utf-8")
    memory, count, share = re.findall(r"a (\d+) GiB GPU as (\d+) vGPUs has (\d+) MiB", text)[0]
    assert sizes_table.cell(int(memory), int(count)) == share


def test_words_of_the_glossary_are_in_order_and_there_once():
    rows = first_column(DOCUMENTS["docs/glossary.md"])
    assert len(rows) > 30
    assert rows == sorted(set(rows), key=str.casefold)


def first_column(path: Path) -> list[str]:
    """The first column of a document's table, without its head."""
    lines = [line for line in read(path).prose if line.startswith("| ")]
    return [line.split("|")[1].strip() for line in lines[2:]]


# Commands


def agent_commands(document: Document) -> Iterator[str]:
    """The arguments of each `vgpu-agent` that is to be typed."""
    start = r"^(?:\s*\$ |.*\s-- |\s*agent |\s*)(?:\.venv/bin/)?vgpu-agent((?: .*)?)$"
    for text in (*document.spans, *document.fenced):
        if match := re.match(start, text):
            yield re.sub(r"\s+#.*|[;|&>].*", "", match[1]).strip()


PLACEHOLDERS = {"HOST:PORT": "127.0.0.1:9408", "SECONDS": "5"}


def parses(arguments: str) -> bool:
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(arguments)]
    try:
        cli.parse(words)
    except SystemExit as end:
        return end.code == 0
    return True


def test_every_command_of_the_agent_can_be_given():
    found = {each for path in DOCUMENTS.values() for each in agent_commands(read(path)) if each}
    assert {"run", "doctor", "release", "status"} <= found
    assert {command for command in found if not parses(command)} == set()


def test_every_target_of_make_exists():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    there = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    code = "\n".join(re.sub(" # .*", "", read(path).code) for path in DOCUMENTS.values())
    named = set(re.findall(r"(?:^|\s)make ([a-z]+)", code, re.MULTILINE))
    assert {"run", "test", "lint", "proto"} <= named <= there


def test_the_first_screen_of_the_readme_has_the_two_commands():
    lines = DOCUMENTS["README.md"].read_text("utf-8").splitlines()[:15]
    assert [line.split("#")[0].strip() for line in lines if line.startswith("make ")] == [
        "make run",
        "make test",
    ]


# Names


def variables() -> set[str]:
    """Settings, what containers get, and the switch of the tests."""
    gpu = Gpu("GPU-0", 0, "Model", 2**34, "00000000:01:00.0")
    given = grant(Inventory((SharedGpu(gpu, 1, usable_bytes=2**34),)), ["GPU-0::0"], SharingRules())
    settings = {configuration.variable(name) for name in configuration.TABLE}
    return settings | given.environment.keys() | {"VGPU_TEST_NO_SKIP"}


@pytest.mark.parametrize("name", TEXTS)
def test_every_variable_that_is_named_exists(name):
    named = set(re.findall(r"\bVGPU_[A-Z0-9_]*[A-Z0-9]\b", TEXTS[name].read_text("utf-8")))
    assert named - variables() == set()


def metric_names() -> set[str]:
    # One is made by an example's rule of prometheus-adapter.
    return metrics_table.names() | {"vgpu_memory_used_ratio"}


RENAMED = {"vgpu_allocation_memory_limit_bytes_per_process"}
"""Metrics of releases before, for what is said of an upgrade."""


@pytest.mark.parametrize("name", TEXTS)
def test_every_metric_that_is_named_exists(name):
    named = set(re.findall(r"\bvgpu_[a-z0-9_]*[a-z0-9]\b", TEXTS[name].read_text("utf-8")))
    before = RENAMED if name in ("CHANGELOG.md", "docs/upgrade.md") else set()
    assert named - metric_names() - {"vgpu_agent", "vgpu_bytes"} - before == set()


def has_key(values: object, dotted: str) -> bool:
    for part in dotted.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return False
        values = values[part]
    return True


OTHER_CHART = re.compile(r"^\s*helm \w+ \S+ (?!charts/)[\w-]+/.*$", re.MULTILINE)
"""A command with another one's chart."""
OTHERS_VALUES = {"devicePlugin.enabled", "gfd.enabled", "mps.root"}
"""Values of NVIDIA's charts."""


def chart_keys(document: Document, top: set[str]) -> set[str]:
    """What is given to --set, and what reads like a key of a value, such as mps.limits."""
    keys = set(re.findall(r"--set(?:-\w+)? ([\w.]+)=", OTHER_CHART.sub("", document.code)))
    for span in document.spans:
        match = re.match(r"(\w+(?:\.\w+)+)(?:$|=|: )", span)
        if match and match[1].split(".")[0] in top and not match[1].endswith((".md", ".py")):
            keys.add(match[1])
    return keys - OTHERS_VALUES


def test_every_value_of_the_chart_that_is_named_exists():
    values = yaml.safe_load(CHART.read_text("utf-8"))
    named = {name: chart_keys(read(path), set(values)) for name, path in DOCUMENTS.items()}
    assert {"mps.limits", "image.repository", "replicas"} <= set().union(*named.values())
    missing = {
        (name, key) for name, keys in named.items() for key in keys if not has_key(values, key)
    }
    assert missing == set()


WORDS_OF_KUBERNETES = {
    "emptyDir",
    "honorLabels",
    "hostIPC",
    "hostPID",
    "hostPath",
    "hostUsers",
    "runAsNonRoot",
    "runAsUser",
}
WORDS_OF_CUDA = {"cudaMallocManaged"}


OURS = ("beside", "compare", "faq", "from-aws-vgpu", "glossary", "sizing", "uninstall", "usage")
"""Documents that name values of our chart and hardly any words of other projects."""


@pytest.mark.parametrize(
    "name", ["README.md", "SECURITY.md", *(f"docs/{each}.md" for each in OURS)]
)
def test_every_word_in_camel_case_is_a_value_of_the_chart_or_of_others(name):
    values = yaml.safe_load(CHART.read_text("utf-8"))
    spans = read(DOCUMENTS[name]).spans
    words = {match[1] for span in spans if (match := re.match(r"([a-z]+[A-Z]\w*)(?:$|: )", span))}
    assert words - values.keys() - WORDS_OF_KUBERNETES - WORDS_OF_CUDA == set()
