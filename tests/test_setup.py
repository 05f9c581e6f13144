"""`make run` and `make test` until .venv is there, on machines where something is missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.agent_process import REPOSITORY

pytestmark = pytest.mark.slow

PYTHON = """#!/bin/sh
# Stands for Python, and in .venv for its pip too.
here=${0%/*}
case "$*" in
*platform*) echo VERSION ;;
*ensurepip*) test -e "$here/has-venv" ;;
"-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
*" pip "*)
  echo "$*" >>calls
  echo "Collecting six"
  if grep -q "$(wc -l <calls)" broken; then
    echo "ERROR: Could not find a version of six"
    echo "ERROR: No matching distribution found for six"
    exit 1
  fi
  ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the set-up reads, with a Python that only pretends."""
    for name in ("Makefile", "pyproject.toml", "requirements"):
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, tmp_path / name)
    (tmp_path / "broken").touch()
    (tmp_path / "has-venv").touch()
    python(tmp_path, "3.12.1")
    return tmp_path


def python(checkout: Path, version: str) -> None:
    path = checkout / "python"
    path.write_text(PYTHON.replace("VERSION", version))
    path.chmod(0o755)


def make(
    checkout: Path, *arguments: str, python: str = "./python", **variables: str
) -> tuple[int, list[str]]:
    """The exit code, and what was said but for make's own lines."""
    others = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    done = subprocess.run(
        ["make", f"PYTHON={python}", *arguments],
        cwd=checkout,
        env=others | variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=100,
        check=False,
    )
    lines = done.stderr.splitlines()
    return done.returncode, [line for line in lines if not line.startswith("make: ***")]


@pytest.mark.parametrize("version", ["3.10.13", "3.14.0", "2.7.18"])
def test_another_python_is_refused_in_one_line(checkout, version):
    python(checkout, version)
    words = f"'./python' is Python {version}: 3.11, 3.12 or 3.13 is needed (make PYTHON=python3.12)"
    assert make(checkout, ".venv/dev") == (2, [f"vgpu-agent: {words}"])
    assert not (checkout / ".venv").exists()


def test_no_python_is_one_line(checkout):
    code, lines = make(checkout, ".venv/dev", python="nowhere")
    assert (code, len(lines)) == (2, 1)
    assert "no Python at 'nowhere': Python 3.11, 3.12 or 3.13 is needed" in lines[0]


def test_a_python_without_venv_is_one_line_that_names_the_package(checkout):
    (checkout / "has-venv").unlink()
    code, lines = make(checkout, ".venv/dev")
    assert (code, len(lines)) == (2, 1)
    assert "'./python' has no venv module: install it (Debian: apt-get install" in lines[0]
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("seconds", ["abc", "0", "-1", "5s", "1 2"])
def test_a_wrong_number_of_seconds_is_said_before_the_set_up(checkout, seconds):
    words = f"vgpu-agent: FOR={seconds}: a number of seconds above 0 is needed"
    assert make(checkout, "run", f"FOR={seconds}") == (2, [words])
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("given", ["SEEDS=", "SEEDS=0", "STEPS=1e3", "HOSTILE=-1", "RESTARTS=2 3"])
def test_a_wrong_number_for_the_faults_is_said_before_the_set_up(checkout, given):
    words = f"vgpu-agent: {given}: a whole number above 0 is needed"
    assert make(checkout, "test-faults", given) == (2, [words])
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_what_broke_off_is_said_and_done_again_and_what_is_done_is_not(checkout, call):
    """Run set, build set, the project, development set: whichever of the four breaks."""
    (checkout / "broken").write_text(f"{call}\n")
    code, lines = make(checkout, ".venv/dev")
    assert code == 2
    assert [line.split(":")[0] for line in lines] == [
        "setting up .venv",
        *["adding what tests and lint need"][: call // 4],
        "vgpu-agent",
    ]
    assert "set-up failed: ERROR: No matching distribution found for six" in lines[-1]
    assert "needed: a package index that pip reaches" in lines[-1]
    assert (checkout / ".venv/run").exists() == (call == 4)
    assert not (checkout / ".venv/dev").exists()

    (checkout / "broken").write_text("")
    calls = len((checkout / "calls").read_text().splitlines())
    code, lines = make(checkout, ".venv/dev")
    assert code == 0
    again = len((checkout / "calls").read_text().splitlines()) - calls
    assert again == (1 if call == 4 else 4)
    assert make(checkout, ".venv/dev") == (0, [])


def test_make_run_installs_what_the_program_needs_and_nothing_else(checkout):
    make(checkout, ".venv/run")
    calls = (checkout / "calls").read_text()
    assert "--require-hashes -r requirements/run.txt" in calls
    assert "dev.txt" not in calls


def test_without_a_network_it_is_one_line_soon(checkout):
    """The real Python and pip, and an index that nobody answers for."""
    nobody = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_CONFIG_FILE": os.devnull}
    nothing = dict.fromkeys(("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"), "")
    code, lines = make(checkout, ".venv/dev", python=sys.executable, **nobody, **nothing)
    assert code == 2
    assert len(lines) == 2
    assert lines[0].startswith("setting up .venv")
    assert "needed: a package index that pip reaches" in lines[1]
    assert not (checkout / ".venv/run").exists()


@pytest.mark.xdist_group("one")
def test_a_group_of_tests_is_one_workers(request):
    """Or each builds the image. pytest-xdist 3.8 does not group with pytest 9.2, without a word."""
    grouped = request.config.getoption("loadgroup", default=False)
    assert request.node.nodeid.endswith("@one") == grouped
