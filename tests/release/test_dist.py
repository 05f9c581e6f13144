"""What `make dist` makes, all but the image, and the workflow that publishes it."""

import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.agent_process import REPOSITORY
from tests.chart import helm
from vgpu_agent import __version__

pytestmark = pytest.mark.slow

WORKFLOWS = REPOSITORY / ".github/workflows"


@dataclass(frozen=True)
class Dist:
    """A release's files."""

    directory: Path

    @property
    def chart(self) -> Path:
        return self.directory / f"vgpu-agent-{__version__}.tgz"

    def sums(self) -> dict[str, str]:
        return {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in self.directory.iterdir()
        }

    def sbom(self) -> dict[str, Any]:
        return json.loads((self.directory / f"vgpu-agent-{__version__}.cdx.json").read_text())


def run(
    *command: str | Path, cwd: Path = REPOSITORY, check: bool = False, **options: Any
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, check=check, capture_output=True, text=True, timeout=120, **options
    )


def run_dist(directory: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "tools.dist", "--no-image", "--output", directory)
    return run(*command, *arguments, **options)


def make(directory: Path, *arguments: str, umask: int = 0o022) -> Dist:
    done = run_dist(directory, *arguments, umask=umask)
    assert done.returncode == 0, done.stderr
    return Dist(directory)


def commit_time() -> int:
    return int(run("git", "log", "-1", "--format=%ct", check=True).stdout)


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Dist:
    return make(tmp_path_factory.mktemp("release") / "dist")


def test_it_has_every_file_of_a_release(dist: Dist) -> None:
    names = {
        f"vgpu_agent-{__version__}-py3-none-any.whl",
        f"vgpu_agent-{__version__}.tar.gz",
        f"vgpu-agent-{__version__}.tgz",
        f"vgpu-agent-{__version__}.cdx.json",
        "vgpu-agent.yaml",
    }
    assert dist.sums().keys() == names | {"SHA256SUMS"}
    listed = (line.split("  ") for line in (dist.directory / "SHA256SUMS").read_text().splitlines())
    actual = dist.sums()
    assert {name: each for each, name in listed} == {name: actual[name] for name in names}


def test_the_same_commit_makes_the_same_bytes(dist: Dist, tmp_path: Path) -> None:
    assert make(tmp_path / "again", umask=0o077).sums() == dist.sums()
    # Nor would another second have changed them.
    for archive in dist.directory.glob("*gz"):
        with tarfile.open(archive) as packed:
            assert {each.mtime for each in packed} == {commit_time()}
        assert int.from_bytes(archive.read_bytes()[4:8], "little") == commit_time()


def test_it_replaces_only_what_it_made(dist: Dist) -> None:
    (own := dist.directory.parent / "own").mkdir()
    (own / "thesis.txt").touch()
    done = run_dist(own)
    assert done.returncode == 1
    assert "has other files" in done.stderr
    assert [each.name for each in own.iterdir()] == ["thesis.txt"]


# The chart


@pytest.mark.parametrize("name", helm.CI)
def test_the_packaged_chart_renders_the_same_as_its_folder(dist: Dist, name: str) -> None:
    packaged = helm.template(None, helm.CI[name], chart=dist.chart)
    assert packaged == helm.template(None, helm.CI[name])


def test_the_chart_of_a_registry_pulls_from_there_and_links_home(tmp_path: Path) -> None:
    source = "https://git.example.com/team/vgpu-agent"
    published = make(tmp_path, "--registry", "registry.example.com/team", "--source", source)
    image = "registry.example.com/team/vgpu-agent"
    expected = helm.template({"image": {"repository": image}})
    assert helm.template(chart=published.chart) == expected
    assert f"image: {image}:{__version__}\n" in expected
    assert image in (published.directory / "vgpu-agent.yaml").read_text()
    shown = yaml.safe_load(helm.run("show", "chart", published.chart).stdout)
    assert (shown["home"], shown["sources"]) == (source, [source])
    annotations = shown["annotations"]
    (listed,) = yaml.safe_load(annotations["artifacthub.io/images"])
    assert listed["image"] == f"{image}:{__version__}"
    changes = yaml.safe_load(annotations["artifacthub.io/changes"])
    assert any("`make dist` makes a release" in each["description"] for each in changes)
    assert {each["kind"] for each in changes} <= {"added", "changed", "removed", "fixed"}
    done = helm.run("lint", "--strict", published.chart)
    assert done.returncode == 0, done.stdout


def test_the_manifests_are_the_chart_and_its_namespace(dist: Dist) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="no kubernetes-validate")
    text = (dist.directory / "vgpu-agent.yaml").read_text()
    namespace, *others = [each for each in yaml.safe_load_all(text) if each]
    assert namespace["kind"] == "Namespace"
    name = namespace["metadata"]["name"]
    assert namespace["metadata"]["labels"] == {"pod-security.kubernetes.io/enforce": "privileged"}
    for each in (namespace, *others):
        for version in ("1.26.0", validate.latest_version()):
            validate.validate(each, version, strict=True)
    done = helm.run("template", "vgpu-agent", helm.CHART, "--namespace", name, "--skip-tests")
    assert others == [each for each in yaml.safe_load_all(done.stdout) if each]
    assert helm.installed(others) == others
    assert {each["metadata"]["namespace"] for each in others} == {name}


# The Python packages


def test_the_wheel_runs(dist: Dist, tmp_path: Path) -> None:
    (wheel,) = dist.directory.glob("*.whl")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    run(*pip, "--no-deps", "--no-index", "--target", tmp_path, wheel, check=True)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)}
    for arguments, expected in (
        (
            ["-c", "import vgpu_agent as it; print(it.__file__)"],
            tmp_path / "vgpu_agent/__init__.py",
        ),
        ([tmp_path / "bin/vgpu-agent", "--version"], __version__),
    ):
        done = run(sys.executable, *arguments, cwd=tmp_path, env=environment)
        assert done.stdout == f"{expected}\n", done.stderr


def test_the_sdist_has_what_the_wheel_is_made_of(dist: Dist) -> None:
    with tarfile.open(dist.directory / f"vgpu_agent-{__version__}.tar.gz") as archive:
        names = {each.name.partition("/")[2] for each in archive}
    assert {"pyproject.toml", "LICENSE", "README.md", "vgpu_agent/agent.py"} <= names
    assert not [each for each in names if each.startswith(("tests/", "tools/"))]


# The SBOM


def test_the_sbom_has_every_locked_library_and_its_license(dist: Dist) -> None:
    bill = dist.sbom()
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    components = {each["purl"]: each for each in bill["components"]}
    text = (REPOSITORY / "requirements/run.txt").read_text()
    pins = re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE)
    libraries = {f"pkg:pypi/{name}@{version}" for name, version in pins}
    others = {f"pkg:pypi/vgpu-agent@{__version__}", "pkg:docker/python@3.13-slim"}
    assert components.keys() == libraries | others
    assert all(components[each]["licenses"] for each in libraries)
    (image,) = [each for each in bill["dependencies"] if each["ref"] == "image"]
    assert set(image["dependsOn"]) == components.keys()
    committed = datetime.fromtimestamp(commit_time(), UTC)
    assert datetime.fromisoformat(bill["metadata"]["timestamp"]) == committed


# The workflows


def test_actionlint_has_no_finding_and_would_have_one(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("actionlint")
    done = run(program)
    assert (done.returncode, done.stdout) == (0, "")
    wrong = tmp_path / "wrong.yaml"
    text = (WORKFLOWS / "release.yaml").read_text()
    wrong.write_text(text.replace("needs: test\n", "needs: tests\n"))
    done = run(program, wrong)
    assert done.returncode == 1
    assert '"tests"' in done.stdout


def steps(name: str) -> Iterator[dict[str, Any]]:
    workflow = yaml.safe_load((WORKFLOWS / name).read_text())
    for job in workflow["jobs"].values():
        yield from job.get("steps", ())


@pytest.mark.parametrize("name", ["ci.yaml", "release.yaml"])
def test_workflows_may_little_and_pin_what_they_use(name: str) -> None:
    workflow = yaml.safe_load((WORKFLOWS / name).read_text())
    assert workflow["permissions"] == {"contents": "read"}
    rights = {key: job.get("permissions") for key, job in workflow["jobs"].items()}
    assert {key: each for key, each in rights.items() if each} == (
        {"release": {"contents": "write", "packages": "write"}} if name == "release.yaml" else {}
    )
    used = re.findall(r"uses: (.+)", (WORKFLOWS / name).read_text())
    for each in used:
        assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+|\./.+", each), each


@pytest.mark.parametrize(
    ("tag", "code"), [(f"v{__version__}", 0), (__version__, 1), (f"v{__version__}1", 1)]
)
def test_a_tag_that_is_not_the_version_publishes_nothing(
    tag: str, code: int, tmp_path: Path
) -> None:
    check = next(each for each in steps("release.yaml") if "run" in each)
    assert check["name"] == "The tag is the version", "it is not the first"
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "GITHUB_REF_NAME": tag,
        "GITHUB_REPOSITORY_OWNER": "Some-Team",
        "GITHUB_ENV": str(tmp_path / "env"),
    }
    done = run("bash", "-e", "-c", check["run"], env=environment)
    assert done.returncode == code, done.stderr
    if code == 0:
        expected = f"VERSION={__version__}\nREGISTRY=ghcr.io/some-team\n"
        assert (tmp_path / "env").read_text() == expected
    else:
        assert f"tag v{__version__}" in done.stderr


def test_the_notes_of_a_release_are_its_part_of_the_changelog() -> None:
    (step,) = [each for each in steps("release.yaml") if each.get("name") == "Release"]
    (command,) = re.findall(r"awk [^|]*? > notes\.md", step["run"], re.DOTALL)
    script = command.replace("> notes.md", "")
    environment = {"PATH": os.environ["PATH"], "VERSION": __version__}
    done = run("bash", "-e", "-c", script, env=environment, check=True)
    text = (REPOSITORY / "CHANGELOG.md").read_text()
    section = text.partition(f"## [{__version__}]")[2].partition("\n## ")[0]
    assert done.stdout.strip() == section.partition("\n")[2].strip()
