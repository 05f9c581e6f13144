"""What was seen: a report for people and a transcript for programs, written after every section."""

import json
import platform
import subprocess
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pynvml


def _machine() -> list[str]:
    time_of_day, driver = datetime.now(UTC), pynvml.nvmlSystemGetDriverVersion()
    python = f"kernel {platform.release()}, Python {platform.python_version()}"
    lines = [f"{time_of_day:%Y-%m-%d %H:%M} UTC, driver {driver}, {python}"]
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        mode = pynvml.nvmlDeviceGetComputeMode(handle)
        lines.append(f"GPU {index}: {pynvml.nvmlDeviceGetName(handle)}, compute mode {mode}")
    return lines


class Record:
    def __init__(self, folder: Path) -> None:
        self.failed = False
        self._folder = folder
        self._start = time.monotonic()
        self._name = ""
        self._events: list[dict[str, Any]] = []
        self._lines = ["# Measured on a GPU", "", *(f"- {line}" for line in _machine())]

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Catches what goes wrong in it: the other sections are worth having."""
        self._name = name
        self._lines += ["", f"## {name}", ""]
        try:
            yield
        except Exception as error:  # noqa: BLE001 - AssertionErrors of waits among them
            self.failed = True
            self.say(f"**this section failed**: {type(error).__name__}: {error}".splitlines()[0])
            self.event("failed", text=traceback.format_exc())
        self._write()

    def say(self, text: str) -> None:
        """A line of the report."""
        print(text, flush=True)
        self._lines.append(f"- {text}")
        self.event("said", text=text)

    def table(self, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        for cells in (head, ["---"] * len(head), *rows):
            self._lines.append(f"| {' | '.join(map(str, cells))} |")
        self.event("table", head=list(head), rows=[list(map(str, row)) for row in rows])

    def event(self, what: str, **values: Any) -> None:
        """A line of the transcript."""
        at = round(time.monotonic() - self._start, 4)
        self._events.append({"at": at, "section": self._name, "what": what, **values})

    def command(
        self, arguments: Sequence[str], text: str, env: dict[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command for at most 5 s; all that it said goes into the transcript."""
        try:
            done = subprocess.run(
                arguments,
                input=text,
                env=env,
                capture_output=True,
                text=True,
                timeout=5,
                check=False,
            )
        except subprocess.TimeoutExpired:
            done = subprocess.CompletedProcess(arguments, "none", "", "no answer within 5 s")
        said = {"exit": done.returncode, "stdout": done.stdout, "stderr": done.stderr}
        self.event("command", arguments=list(arguments), stdin=text, **said)
        return done

    def _write(self) -> None:
        (self._folder / "report.md").write_text("\n".join(self._lines) + "\n")
        (self._folder / "transcript.json").write_text(json.dumps(self._events, indent=1) + "\n")
