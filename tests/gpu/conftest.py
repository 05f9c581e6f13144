"""A process with an NvmlDriver in it, and the fake libnvidia-ml.so.1."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.fake_nvml import FakeGpu, FakeNvml

ROOT = Path(__file__).parents[2]


@dataclass
class Child:
    """A process with an NvmlDriver in it."""

    process: subprocess.Popen[str]

    def ask(self, *command: object) -> Any:
        self.send(*command)
        return self.answer()

    def send(self, *command: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the child has ended"
        return json.loads(line)

    def end(self) -> float:
        """Lets it end; how many seconds that took."""
        assert self.process.stdin is not None
        start = time.monotonic()
        self.process.stdin.close()
        assert self.process.wait(10) == 0
        return time.monotonic() - start


Start = Callable[..., Child]


@pytest.fixture
def start(fake_nvml: FakeNvml) -> Iterator[Start]:
    """Starts children; at the end each has to leave in order, with nothing on stderr."""
    children: list[Child] = []

    def start(
        *gpus: FakeGpu,
        library: bool = True,
    ) -> Child:
        """With GPUs they are all there are, and were scanned once."""
        roots = (str(fake_nvml.numa_root), str(fake_nvml.proc_root))
        argument = json.dumps(roots)
        environment = {**os.environ, **(fake_nvml.environment() if library else {})}
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "tests.fake_nvml.child", argument],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        child = Child(process)
        children.append(child)
        if gpus:
            fake_nvml.set_gpus(*gpus)
            child.ask("scan")
        return child

    yield start
    for child in children:
        with child.process as process:
            child.end()
            assert process.stderr is not None
            assert process.stderr.read() == ""
