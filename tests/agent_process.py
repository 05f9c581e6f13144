"""The agent as a real process."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def environment(**variables: str) -> dict[str, str]:
    others = {name: value for name, value in os.environ.items() if not name.startswith("VGPU_")}
    return others | variables


def execute(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the agent until it ends by itself."""
    return subprocess.run(
        [sys.executable, "-m", "vgpu_agent", *arguments],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


class Agent:
    """A running `vgpu-agent run`, and the lines that it wrote."""

    def __init__(
        self, python: str, kubelet_dir: Path, variables: dict[str, str], changes: str
    ) -> None:
        self.lines: list[str] = []
        self._changed = threading.Condition()
        settings = {
            "VGPU_GPU_DRIVER": "simulated",
            "VGPU_KUBELET_DIR": str(kubelet_dir),
            "VGPU_STATE_DIRECTORY": str(kubelet_dir / "state"),
            "VGPU_CORDON_DIRECTORY": str(kubelet_dir / "cordoned"),
            "VGPU_METRICS_ADDRESS": "127.0.0.1:0",
        }
        code = f"{changes}\nfrom vgpu_agent.__main__ import main\nmain()"
        program = ["-c", code] if changes else ["-m", "vgpu_agent"]
        self.process = subprocess.Popen(
            [python, "-W", "default::ResourceWarning", *program, "run"],
            env=environment(**(settings | variables)),
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait_line(self, pattern: str, timeout: float = 15.0) -> re.Match[str]:
        """The first line, past or to come, that has it."""

        def found() -> re.Match[str] | None:
            return next(filter(None, (re.search(pattern, line) for line in self.lines)), None)

        with self._changed:
            match = self._changed.wait_for(found, timeout)
        assert match, f"no {pattern!r} within {timeout} s in:\n{self.text}"
        return match

    @property
    def port(self) -> int:
        """Of its web side, on loopback."""
        return int(self.wait_line(r"metrics at http://127\.0\.0\.1:(\d+)/metrics")[1])

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, float]:
        """Signals it; its exit code and the seconds that it took to end."""
        start = time.monotonic()
        self.process.send_signal(number)
        code = self.process.wait(10)
        took = time.monotonic() - start
        self._reader.join()
        return code, took

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()


@contextmanager
def running(
    kubelet_dir: Path, python: str = sys.executable, *, changes: str = "", **variables: str
) -> Iterator[Agent]:
    """An agent with those settings; `changes` is Python code that it runs first."""
    agent = Agent(python, kubelet_dir, variables, changes)
    try:
        yield agent
    finally:
        agent.close()
