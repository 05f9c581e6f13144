"""Runs sections one after the other, each within its bound and all within theirs.

A section is a process of its own, and everything that it starts stays below this one, whatever
becomes of its parents: what a section leaves behind is ended here, by name of PID.
"""

import ctypes
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from tests.on_gpu.report import Out, Report, Skip, first_line

GRACE = 10.0
"""Seconds that a section which is cut off has to end clients and daemons in order."""

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


@dataclass(frozen=True, slots=True)
class Context:
    """What a section is given.

    `root` is a directory for it alone. `load` is how many seconds a load takes, and what is waited
    for. `program` is the control program that was named.
    """

    root: Path
    load: float
    program: str | None = None
    out: Out = Out(print)


@dataclass(frozen=True, slots=True)
class Section:
    """`bound` is in seconds."""

    name: str
    title: str
    bound: float
    measure: Callable[[Context], None]


class Cut(BaseException):
    """It has been told to end."""


def _cut(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise Cut


def run(
    title: str, sections: Sequence[Section], folder: Path, *, limit: float, load: float,
    program: str | None = None,
) -> bool:  # fmt: skip
    """Whether all sections came to their end; `limit` is in seconds, for all of it."""
    deadline = time.monotonic() + limit
    report = Report(folder, title, {each.name: each.title for each in sections})
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _cut)
    mounts = _mounts()
    root = Path(tempfile.mkdtemp(prefix="vgpu-"))
    root.chmod(0o755)  # clients of other users find their daemon in it
    good = True
    try:
        for section in sections:
            place = root / section.name
            place.mkdir()
            left = deadline - time.monotonic() - GRACE - 1
            if left < 1:
                good = False
                report.add(section.name, {"what": "say", "text": "no time was left for it"})
                continue
            context = Context(place, load, program)
            good &= _Running(section, context, report).finish(min(section.bound, left))
    except Cut:
        good = False
        print("stopped by a signal", flush=True)
    finally:
        if _mounts() != mounts:
            text = "mounts of this machine have changed"
            report.add(sections[-1].name, {"what": "say", "text": text})
        shutil.rmtree(root, ignore_errors=True)
    return good


class _Running:
    """A section and its process."""

    def __init__(self, section: Section, context: Context, report: Report) -> None:
        self._section, self._report = section, report
        self._begun = time.monotonic()
        report.status(section.name, "begun, and not ended")
        self._read, write = os.pipe()
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._read)
            _be(section, context, write, parent)
        os.close(write)
        self._data = b""
        self._status = "**failed**: its process ended"

    def finish(self, bound: float) -> bool:
        """Whether it came to its end. Nothing of it is left after that."""
        try:
            if not self._listen(bound):
                os.kill(self._pid, signal.SIGTERM)
                self._listen(GRACE)
                self._status = f"**cut off** after {bound:.0f} s"
        except Cut:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGTERM)
            self._listen(GRACE)
            self._status = "**stopped** by a signal"
            raise
        finally:
            os.close(self._read)
            # The section itself, where it has not ended yet, and what it started.
            _wait(self._pid, 1.0)
            ended = _end()
            if ended:
                words = f"left behind, and ended: {ended}"
                self._report.add(self._section.name, {"what": "say", "text": words})
            took = f" ({time.monotonic() - self._begun:.1f} s)"
            self._report.status(self._section.name, self._status + took)
        return self._status.startswith(("done", "not run"))

    def _listen(self, seconds: float) -> bool:
        """Takes what the section says; whether it ended within that time."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([self._read], [], [], left)[0]:
                return False
            data = os.read(self._read, 1 << 16)
            if not data:
                return True
            *lines, self._data = (self._data + data).split(b"\n")
            for line in lines:
                event = json.loads(line)
                if event["what"] == "end":
                    self._status = event["text"]
                else:
                    self._report.add(self._section.name, event)
        return False


def _be(section: Section, context: Context, write: int, parent: int) -> NoReturn:
    """The life of a section's process."""
    signal.signal(signal.SIGTERM, _cut)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's is passed on as SIGTERM
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def send(event: dict[str, Any]) -> None:
        data = json.dumps(event).encode() + b"\n"
        with suppress(BrokenPipeError):  # the rest is still to be ended in order
            while data:
                data = data[os.write(write, data) :]

    out = Out(send)
    text = "done"
    try:
        section.measure(replace(context, out=out))
    except Skip as reason:
        text = f"not run: {reason}"
    except Cut:
        text = "cut off"
    except BaseException as error:  # noqa: BLE001 - the other sections are worth having
        out.event("failed", text=traceback.format_exc())
        text = f"**failed**: {first_line(error)}"
    out.event("end", text=text)
    if os.getppid() != parent:  # killed, and nobody else cleans up
        _end()
        shutil.rmtree(context.root.parent, ignore_errors=True)
    sys.stdout.flush()
    os._exit(0)


def descendants(of: int) -> Iterator[int]:
    """The PIDs of all processes below one, children before parents."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            with suppress(OSError, ValueError, IndexError):
                parent = int((path / "stat").read_text("latin-1").rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(path.name))

    def below(pid: int) -> Iterator[int]:
        for child in children.get(pid, ()):
            yield from below(child)
            yield child

    yield from below(of)


def _wait(pid: int, seconds: float) -> None:
    """Until a child has ended, or so long."""
    deadline = time.monotonic() + seconds
    with suppress(ChildProcessError):
        while os.waitpid(pid, os.WNOHANG)[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.01)


def _end() -> str:
    """Kills all processes below this one; those that were no zombies, in words."""
    found: dict[int, str] = {}
    deadline = time.monotonic() + 5
    remaining = list(descendants(os.getpid()))
    while remaining and time.monotonic() < deadline:
        for pid in remaining:
            with suppress(OSError):
                name, _, rest = Path(f"/proc/{pid}/stat").read_text("latin-1").rpartition(")")
                if rest.split()[0] != "Z":
                    found.setdefault(pid, name.partition("(")[2])
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.02)
        remaining = list(descendants(os.getpid()))
    words = [f"{name} {pid}" for pid, name in found.items()]
    return ", ".join([*words, *(f"{pid} WITHOUT SUCCESS" for pid in remaining)])


def _mounts() -> str:
    """Where something is mounted."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return "\n".join(sorted(line.split()[4] for line in lines))
