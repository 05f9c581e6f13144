"""The agent as a real process."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

ROOT = Path(__file__).parents[1]


class AgentProcess:
    """`vgpu-agent run` with these settings; what it writes to standard error is in `lines`.

    Metrics are on a free port of loopback unless the settings say otherwise. Leaving the context
    ends the process hard where a test has not ended it.
    """

    def __init__(
        self,
        kubelet_dir: Path,
        *,
        settings: Mapping[str, str],
        environment: Mapping[str, str] | None = None,
        python: str = sys.executable,
    ) -> None:
        variables = {
            "VGPU_KUBELET_DIR": str(kubelet_dir),
            "VGPU_METRICS_ADDRESS": "127.0.0.1:0",
            "PYTHONPATH": str(ROOT),
            **settings,
        }
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [python, "-m", "vgpu_agent", "run"],
            env={**os.environ, **variables, **(environment or {})},
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()

    def wait_line(self, text: str, timeout: float = 10) -> str:
        """The first line with that text in it."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            for line in list(self.lines):
                if text in line:
                    return line
            time.sleep(0.01)
        raise AssertionError(f"no line with {text!r} in:\n" + "\n".join(self.lines))

    def url(self) -> str:
        """Where its web side is."""
        return self.wait_line("metrics at ").rpartition("metrics at ")[2].removesuffix("/metrics")

    def stop(self, number: int) -> tuple[int, float]:
        """Sends a signal; the exit code, and the seconds that it took."""
        began = time.monotonic()
        self.process.send_signal(number)
        code = self.process.wait(timeout=15)
        return code, time.monotonic() - began
