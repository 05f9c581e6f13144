"""What the image is made from: the Dockerfile and the locked requirements."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.agent_process import REPOSITORY
from vgpu_agent import __version__

DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()
LOCKED = {
    name: (REPOSITORY / "requirements" / f"{name}.txt").read_text()
    for name in ("run", "build", "dev")
}


def pins(name: str) -> set[str]:
    return set(re.findall(r"^([\w.-]+==\S+)", LOCKED[name], re.MULTILINE))


def test_the_labels_say_what_the_project_says() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', DOCKERFILE))
    assert labels == {
        "title": project["name"],
        "description": project["description"],
        "licenses": project["license"],
        "version": "${VERSION}",
    }
    assert re.findall(r"^ARG VERSION=(\S+)", DOCKERFILE, re.MULTILINE) == [__version__]


def test_the_dockerfile_names_no_address_and_no_architecture() -> None:
    assert not re.search(r"https?://|index-url|_proxy|amd64|x86_64|arm64|aarch64", DOCKERFILE)


def test_what_builds_the_wheel_is_locked_as_in_development() -> None:
    assert any(pin.startswith("hatchling==") for pin in pins("build"))
    assert pins("build") <= pins("dev")
    assert not re.search(r"https?://", LOCKED["build"] + LOCKED["run"])


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_every_locked_library_has_a_wheel_for(machine: str, tmp_path: Path) -> None:
    platforms = [f"--platform={tag}_{machine}" for tag in ("manylinux2014", "manylinux_2_28")]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
            *("--only-binary=:all:", "--python-version=3.13", *platforms),
            *("--no-deps", "--require-hashes", "--dest", tmp_path),
            *("--requirement", REPOSITORY / "requirements" / "run.txt"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    wheels = [path.name for path in tmp_path.iterdir()]
    # Markers leave out what is for other systems only.
    assert {"pydantic_core", "pyyaml", "uvicorn"} <= {name.split("-")[0] for name in wheels}
    others = {"x86_64": "aarch64", "aarch64": "x86_64"}[machine]
    assert not [name for name in wheels if others in name]
