"""A private MPS daemon, and clients in namespaces of their own; all of it ends with its block."""

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.on_gpu.machine import CONTROL, find, no_control
from tests.on_gpu.report import Skip
from tests.on_gpu.runner import Context, descendants

CLIENT = Path(__file__).with_name("client.py")

FLAGS = {
    "mount": ("--mount",),
    "ipc": ("--ipc",),
    # Whoever ends the parent ends the client too.
    "pid": ("--pid", "--fork", "--kill-child", "--mount-proc"),
}
SHM = {
    "shared": "mount --bind {shm} /dev/shm",
    "own": "mount -t tmpfs tmpfs /dev/shm",
    "none": "mount -t tmpfs -o ro tmpfs /dev/shm",
}


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """This one's without what chooses GPUs, limits or a daemon, and with these."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA_", "VGPU_", "NVIDIA_"))}
    return kept | dict(variables)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the control program said; `exit` is None where it did not end within its time."""

    text: str
    exit: int | None
    ms: float

    @property
    def good(self) -> bool:
        return self.exit == 0 and "cannot" not in self.text.lower()

    def cells(self) -> tuple[str, ...]:
        code = "none" if self.exit is None else str(self.exit)
        return (f"`{self.text}`" if self.text else "(nothing)", code, f"{self.ms:.1f}")


class Daemon:
    """A control daemon in a directory of its own, with the mounts that its clients get."""

    def __init__(self, context: Context, *options: str) -> None:
        program = find(CONTROL, context.program)
        if program is None:
            raise Skip(no_control())
        self._out, self._program, self._options = context.out, program, options
        number = sum(1 for _ in context.root.glob("mps*"))
        self.root = context.root / f"mps{number}"
        self.pipe, self.log, self.shm = (self.root / name for name in ("pipe", "log", "shm"))
        for path, mode in ((self.pipe, 0o755), (self.log, 0o700), (self.shm, 0o1777)):
            path.mkdir(parents=True)
            path.chmod(mode)
        self.process: subprocess.Popen[bytes] | None = None
        self._known: set[int] = set()

    def environment(self) -> dict[str, str]:
        return environment(
            {
                "CUDA_MPS_PIPE_DIRECTORY": str(self.pipe),
                "CUDA_MPS_LOG_DIRECTORY": str(self.log),
                "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
                # Where it finds the server's program.
                "PATH": f"{os.environ['PATH']}:{Path(self._program).parent}",
            }
        )

    def start(self, before: Sequence[str] = (), script: str = ":", **variables: str) -> None:
        """`before` is a command that becomes the daemon, `script` is run in its namespace first.

        That may name the daemon's directories, as {root} or {pipe}.
        """
        names = {name: getattr(self, name) for name in ("root", "pipe", "log", "shm")}
        lines = f"set -e\n{SHM['shared']}\n{script}".format(**names)
        command = ["unshare", "--mount", "sh", "-c", f'{lines}\nexec "$@"', "sh", *before]
        with (self.root / "output").open("ab") as output:
            self.process = subprocess.Popen(
                [*command, self._program, "-f", *self._options],
                env=self.environment() | variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        begun = time.monotonic()
        while not self.ask("get_server_list").good:
            if self.process.poll() is not None or time.monotonic() > begun + 10:
                said = (self.root / "output").read_text(errors="replace")[-500:]
                code = self.process.poll()
                raise RuntimeError(f"the daemon does not answer (exit {code}): {said}")
            time.sleep(0.05)
        status = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        given = [line for line in status if line.startswith(("Cap", "NoNewPrivs"))]
        seconds = time.monotonic() - begun
        self._out.event("daemon", pid=self.process.pid, seconds=seconds, rights=given)

    def ask(self, command: str, timeout: float = 5) -> Answer:
        begun, code, text = time.monotonic(), None, ""
        try:
            done = subprocess.run(
                [self._program],
                input=f"{command}\n",
                env=self.environment(),
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
                check=False,
            )
            code, text = done.returncode, (done.stdout + done.stderr).strip()
        except subprocess.TimeoutExpired:
            text = f"no answer within {timeout:g} s"
        answer = Answer(text, code, 1000 * (time.monotonic() - begun))
        self._out.event("control", command=command, answer=text, exit=code, ms=answer.ms)
        return answer

    def twin(self) -> Answer:
        """What a second daemon in the directory says."""
        begun, code, text = time.monotonic(), None, "runs"
        with suppress(subprocess.TimeoutExpired):
            done = subprocess.run(
                [self._program, "-f"],
                env=self.environment(),
                capture_output=True,
                text=True,
                timeout=3,
                check=False,
            )
            code, text = done.returncode, (done.stdout + done.stderr).strip()
        return Answer(text, code, 1000 * (time.monotonic() - begun))

    def servers(self) -> list[int]:
        found = self._pids("get_server_list")
        self._known |= set(found)
        return found

    def clients(self) -> list[int]:
        """PIDs of the clients of all servers."""
        return [pid for each in self.servers() for pid in self._pids(f"get_client_list {each}")]

    def _pids(self, command: str) -> list[int]:
        """PIDs of a list. An empty one is asked for again: a daemon that is busy says nothing."""
        found: list[int] = []
        for pause in (0.05, 0.05, 0):
            answer = self.ask(command)
            if answer.good:
                found = [int(word) for word in answer.text.split() if word.isdigit()]
            if found or "cannot find" in answer.text.lower():
                break
            time.sleep(pause)
        return found

    def status(self) -> str:
        return ", ".join(self.ask(f"get_server_status {pid}").text for pid in self.servers())

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.ask("quit -t 5", timeout=8)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(2)
            self.process.kill()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(2)
        self._end_orphans()
        for path in (self.root / "output", *sorted(self.log.glob("*"))):
            if path.is_file():
                lines = path.read_text(errors="replace").splitlines()
                self._out.event("log", name=path.name, lines=lines[-300:])
        shutil.rmtree(self.root, ignore_errors=True)

    def _end_orphans(self) -> None:
        """Servers that outlived their daemon: they are this process's own by now."""
        orphans = {pid for pid in self._known if _runs(pid)}
        for number, seconds in ((signal.SIGTERM, 3), (signal.SIGKILL, 2)):
            for pid in orphans:
                self._out.event("orphan", pid=pid, signal=number.name)
                os.kill(pid, number)
            deadline = time.monotonic() + seconds
            while (orphans := {pid for pid in orphans if _runs(pid)}) and (
                time.monotonic() < deadline
            ):
                time.sleep(0.05)


def _runs(pid: int) -> bool:
    """Whether that is a child of this process that has not ended."""
    try:
        return os.waitpid(pid, os.WNOHANG) == (0, 0)
    except ChildProcessError:
        return False


@contextmanager
def daemon(context: Context, *options: str, **how: Any) -> Iterator[Daemon]:
    """One that answers; see `Daemon.start`."""
    made = Daemon(context, *options)
    try:
        made.start(**how)
        yield made
    finally:
        made.stop()


class Client:
    """A CUDA process; see `client.py` for what it can be asked. Without a daemon it takes turns."""

    def __init__(
        self,
        variables: Mapping[str, str],
        served_by: Daemon | None = None,
        *,
        namespaces: Sequence[str] = ("mount",),
        shm: str = "shared",
        read_only: bool = False,
        uid: int = 0,
        cgroup: Path | None = None,
    ) -> None:
        lines = ["set -e"]
        if cgroup is not None:
            lines.append(f"echo $$ > {cgroup}/cgroup.procs")
        self.daemon = served_by
        chosen = {k: v for k, v in variables.items() if k != "CUDA_MPS_PIPE_DIRECTORY"}
        if served_by is not None:
            pipe = served_by.pipe
            chosen["CUDA_MPS_PIPE_DIRECTORY"] = str(pipe)
            lines += [
                f"mount --bind {pipe} {pipe}",
                f"mount -o remount,bind,ro {pipe}" if read_only else ":",
                SHM[shm].format(shm=served_by.shm),
            ]
        # A file: nobody reads a pipe while it works, and one that is full would stop it.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by the reader
        flags = [flag for name in namespaces for flag in FLAGS[name]]
        self.process = subprocess.Popen(
            ["unshare", *flags, "sh", "-c", "\n".join([*lines, 'exec "$@"']), "sh",
             sys.executable, "-P", CLIENT, str(uid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            errors="replace",
            env=environment(chosen),
        )  # fmt: skip
        self._forked = "pid" in namespaces
        self.prepared: dict[str, Any] = {}
        self._sent = 0
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """As this machine counts."""
        if not self._forked:
            return self.process.pid
        return next(descendants(self.process.pid), 0)

    def _read(self) -> None:
        for line in self.process.stdout:
            with suppress(ValueError):
                self._answers.put(json.loads(line))
        self._errors.seek(0)
        said = self._errors.read()[-300:].decode(errors="replace")
        self._errors.close()
        ended = f"the process ended with {self.process.wait()}: {said}".strip().rstrip(":")
        self._answers.put({"failed": ended, "ended": True})

    def send(self, do: str, **values: Any) -> None:
        self._sent += 1
        with suppress(BrokenPipeError, ValueError):  # the reader says how it ended
            line = json.dumps({"do": do, "number": self._sent, **values})
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def answer(self, timeout: float = 20) -> dict[str, Any]:
        """To what was sent last; those that came too late are passed over."""
        until = time.monotonic() + timeout
        while True:
            try:
                found = self._answers.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                return {"failed": f"no answer within {timeout:.3g} s"}
            if found.setdefault("number", self._sent) == self._sent:
                if "ended" in found:  # to whatever is asked
                    self._answers.put({"failed": found["failed"], "ended": True})
                return found

    def ask(self, do: str, timeout: float = 20, **values: Any) -> dict[str, Any]:
        self.send(do, **values)
        return self.answer(timeout)

    def proof(self, opened: Mapping[str, Any], pids: Collection[int] | None = None) -> str:
        """Whether the daemon knows it, and whether CUDA says that it is a client of MPS.

        `pids` are the daemon's clients, which it is asked for where they are None.
        """
        if pids is None:
            pids = self.daemon.clients() if self.daemon else ()
        listed, said = self.pid in pids, opened.get("mps")
        if (listed, said) in ((True, 1), (False, 0)):
            return "yes" if listed else "no"
        return f"listed by the daemon: {'yes' if listed else 'no'}; CUDA says {said}"

    def kill(self) -> None:
        self.process.kill()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(5)

    def hang_up(self) -> None:
        """Lets it end by itself."""
        with suppress(OSError):
            self.process.stdin.close()

    def close(self, until: float = 0) -> None:
        """Ends it; until then, by the monotonic clock, it may end by itself."""
        self.hang_up()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.01, until - time.monotonic()))
        self.process.kill()
        self._reader.join(2)


@contextmanager
def clients(
    count: int, variables: Mapping[str, str], served_by: Daemon | None = None, **how: Any
) -> Iterator[list[Client]]:
    """So many clients; none of them is left after that."""
    made: list[Client] = []
    try:
        made += (Client(variables, served_by, **how) for _ in range(count))
        yield made
    finally:
        until = time.monotonic() + 5
        for each in made:
            each.hang_up()
        for each in made:
            each.close(until)
