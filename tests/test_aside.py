"""Values that are made in a child process. Each test runs in a process of its own: it forks."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.agent_process import REPOSITORY, running

pytestmark = pytest.mark.slow


def outcome(code: str) -> list[str]:
    """The lines that it prints; `here` is the process that begins."""
    done = subprocess.run(
        [sys.executable, "-c", f"import os\nhere = os.getpid()\n{code}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


MAKE = """
from vgpu_agent.aside import begin
def make():
    {}
    return "x" * 200_000, os.getpid() == here
text, made_here = begin(make)()
print(len(text), made_here)
try:
    os.waitpid(-1, 0)
except ChildProcessError:
    print("no child is left")
"""


@pytest.mark.parametrize(
    ("trouble", "made_here"),
    [
        ("pass", False),
        ("if os.getpid() != here: raise LookupError", True),
        ("if os.getpid() != here: os.kill(os.getpid(), 9)", True),
        ("if os.getpid() != here: os._exit(0)", True),
    ],
)
def test_a_value_comes_from_a_child_or_from_here_if_the_child_fails(trouble, made_here):
    lines = outcome(MAKE.format(trouble))
    assert lines == [f"200000 {made_here}", "no child is left"]


@pytest.mark.parametrize(
    ("call", "error"), [("fork", (11, "no process")), ("pipe", (24, "no descriptor"))]
)
def test_a_value_is_made_here_where_there_is_no_process_or_pipe_to_spare(call, error):
    refused = f"def refuse(): raise OSError{error}\nos.{call} = refuse\n"
    assert outcome(refused + MAKE.format("pass"))[0] == "200000 True"


def test_what_is_wrong_is_raised_here():
    code = """
from vgpu_agent.aside import begin
def make():
    raise LookupError("wrong")
take = begin(make)
try:
    take()
except LookupError as error:
    print(error, os.getpid() == here)
"""
    assert outcome(code) == ["wrong True"]


def test_the_library_that_reads_settings_is_not_in_the_memory_of_the_agent(kubelet_dir):
    with running(kubelet_dir) as agent:
        agent.wait_line("no kubelet at")
        mapped = Path("/proc", str(agent.process.pid), "maps").read_text()
    assert "python" in mapped
    assert "pydantic" not in mapped
