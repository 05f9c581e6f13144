"""A stand-in for `nvidia-cuda-mps-control`, as 555.58 answers. See README.md beside it.

    -f, -d          a control daemon in the foreground or the background
    (no option)     passes commands, one a line on standard input, to the daemon

Its server is the `nvidia-cuda-mps-server` on PATH. FAKE_MPS_BEHAVIOUR names a JSON object that is
read for every command; `FakeMps` writes it:

    hang            the daemon takes commands and never answers
    busy            exit code and sentence of a caller that meets another one
    refuse          object of command word to what is said with exit code 1
    answers         object of command line to the whole answer, whatever is true
    status          status of every server (ACTIVE)
    clients         text of get_device_client_list
    servers         PIDs that are listed beside our own server
    stubborn        a server that starts takes no SIGTERM

With FAKE_MPS_TURNS set callers take turns, where the real daemon sends all but the first away.
FAKE_MPS_USER is the UID of a caller.
"""

import fcntl
import json
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TextIO

PIPE = Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"])
LOG = Path(os.environ["CUDA_MPS_LOG_DIRECTORY"])
PID_FILE = PIPE / "nvidia-cuda-mps-control.pid"
ORDINALS = [str(n) for n in range(32)]

NOT_FOUND = "Cannot find MPS control daemon process"
BUSY = "Cannot send command to MPS control daemon process"
REFUSED = "Insufficient privileges for UID {}. "
REFUSED_SETTING = (
    REFUSED + "Control deamon settings can only be modified by the user started it or by the root"
    " user."
)
REFUSED_SERVER = REFUSED + "Only the root user may shutdown another user's server."


def behaviour(name: str) -> object:
    try:
        return json.loads(Path(os.environ["FAKE_MPS_BEHAVIOUR"]).read_text()).get(name)
    except FileNotFoundError:
        return None


def mib(limit: str) -> int:
    """What is no G is taken as M, and what is no number as nothing."""
    number, gib = re.match(r"(\d*)([gG]?)", limit).groups()  # type: ignore[union-attr]
    return int(number or 0) * (1024 if gib else 1)


class Daemon:
    def __init__(self, log_file: TextIO) -> None:
        self.log_file = log_file
        self.server: subprocess.Popen[bytes] | None = None
        self.threads = 100.0
        self.limits = dict.fromkeys(ORDINALS, 0)

    def run(self) -> None:
        (PIPE / "log").unlink(missing_ok=True)
        os.mkfifo(PIPE / "log")
        (PIPE / "log").chmod(0o777)
        privileged = self.listen("control_privileged", 0o755)
        listener = self.listen("control", 0o666)
        PID_FILE.write_text(str(os.getpid()))
        PID_FILE.chmod(0o666)
        self.log(f"Starting control daemon using socket {PIPE}/control")
        self.log(
            f"To connect CUDA applications to this daemon, set env CUDA_MPS_PIPE_DIRECTORY={PIPE}"
        )
        with privileged, listener:
            self.accept(listener)

    def listen(self, name: str, mode: int) -> socket.socket:
        path = PIPE / name
        path.unlink(missing_ok=True)
        if len(bytes(path)) > 106:  # one less than fits
            sys.exit(1)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        path.chmod(mode)
        listener.listen(16)
        return listener

    def accept(self, listener: socket.socket) -> None:
        turns = "FAKE_MPS_TURNS" in os.environ
        caller: socket.socket | None = None
        while True:
            wanted = [caller or listener] if turns else [listener, *filter(None, [caller])]
            ready, _, _ = select.select(wanted, [], [], 0.02)
            while behaviour("hang"):
                time.sleep(0.02)
            self.reap()
            if caller in ready:  # first: it may have ended, so that the next is served
                assert caller is not None
                if not self.serve(caller):
                    caller.close()
                    caller = None
                    self.log("UI closed")
            elif listener in ready:
                new, _ = listener.accept()
                self.log("Accepting connection...")
                if caller is None:
                    caller = new
                    self.log("NEW UI")
                else:
                    new.close()

    def serve(self, caller: socket.socket) -> bool:
        """Answers a command; whether there was one."""
        try:
            data = caller.recv(65536)
        except OSError:
            return False
        if not data:
            return False
        line = data.decode().strip()
        self.log(f"Cmd:{line}")
        peer = caller.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        _, uid, _ = struct.unpack("3i", peer)
        code, text = self.answer(line, uid)
        for each in text.splitlines():
            self.log(each)
        with suppress(OSError):  # nobody waits for it any more
            caller.sendall(json.dumps([code, text]).encode() + b"\n")
        if line.startswith("quit") and not text:
            self.log("Exit with status 0")
            (PIPE / "log").unlink()
            PID_FILE.unlink()
            sys.exit(0)
        return True

    def answer(self, line: str, uid: int) -> tuple[int, str]:
        word, *arguments = line.split() or [""]
        refusals, answers = behaviour("refuse") or {}, behaviour("answers") or {}
        if word in refusals:
            return 1, refusals[word]
        if line in answers:
            return 0, answers[line]
        return 0, self.say(word, arguments, privileged=uid in {0, os.getuid()}, uid=uid)

    def say(self, word: str, arguments: list[str], *, privileged: bool, uid: int) -> str:
        own = [self.server.pid] if self.server else []
        pids = [str(pid) for pid in [*(behaviour("servers") or []), *own]]
        match word, arguments:
            case "get_server_list", _:
                return "\n".join(pids)
            case "get_server_status" | "get_device_client_list" | "shutdown_server", [pid] if (
                pid not in pids
            ):
                return f"Server {pid} not found"
            case "get_server_status", [_]:
                return str(behaviour("status") or "ACTIVE")
            case "get_device_client_list", _:
                return str(behaviour("clients") or "")
            case "shutdown_server", [_]:
                return "" if privileged else REFUSED_SERVER.format(uid)
            case (
                "set_default_active_thread_percentage" | "set_default_device_pinned_mem_limit",
                _,
            ) if not privileged:
                return REFUSED_SETTING.format(uid)
            case "set_default_active_thread_percentage", [percentage]:
                with suppress(ValueError):
                    if 0 < float(percentage) <= 100:
                        self.threads = float(percentage)
                return f"{self.threads:.1f}"
            case "get_default_active_thread_percentage", _:
                return f"{self.threads:.1f}"
            case "set_default_device_pinned_mem_limit", [device, limit]:
                if device in self.limits:
                    self.limits[device] = mib(limit)
                elif not device.isdecimal():  # a UUID is not what it takes, but 0
                    self.limits["0"] = 0
                return ""
            case "get_default_device_pinned_mem_limit", [device]:
                limit = self.limits.get(device, 0)
                return f"{limit // 1024}G" if limit >= 1024 else f"{limit}M" if limit else ""
            case "start_server", ["-uid", of]:
                if self.server is None:
                    self.start_server(int(of))
                return ""
            case "quit", _:
                if not privileged:
                    return "Not enough privilege to execute quit command"
                self.end_server(arguments)
                return ""
        return f'Unknown command "{word}"'

    def start_server(self, uid: int) -> None:
        def child() -> None:
            if behaviour("stubborn"):
                signal.signal(signal.SIGTERM, signal.SIG_IGN)

        self.server = subprocess.Popen(
            ["nvidia-cuda-mps-server"],
            user=uid if os.getuid() == 0 else None,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=child,  # noqa: PLW1509 - there are no threads
        )
        self.log(f"Starting new server {self.server.pid} for user {uid}")

    def reap(self) -> None:
        if self.server is not None and self.server.poll() is not None:
            code = max(0, self.server.returncode)
            self.log(f"Server {self.server.pid} exited with status {code}")
            self.server = None

    def end_server(self, arguments: list[str]) -> None:
        """Waits until it has ended, or for so many seconds before it is killed."""
        if self.server is None:
            return
        try:
            self.server.wait(float(arguments[1]) if arguments[:1] == ["-t"] else None)
        except subprocess.TimeoutExpired:
            self.server.kill()
            self.server.wait()

    def log(self, text: str) -> None:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        print(f"[{now}.000 Control {os.getpid():5}] {text}", file=self.log_file, flush=True)


def control(*, background: bool) -> int:
    for directory in PIPE, LOG:
        directory.mkdir(exist_ok=True)
    log_file = sys.stdout
    # Opened once: where a process closes such a file, it has no lock on it any more.
    with (PIPE / "control_lock").open("a") as lock:
        Path(lock.name).chmod(0o666)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("An instance of this daemon is already running")
            return 1
        if background:
            if os.fork():
                return 0
            os.setsid()
            fcntl.lockf(lock, fcntl.LOCK_EX)  # its parent has it until it ends
            (LOG / "server.log").touch()
            log_file = (LOG / "control.log").open("a")
            for number in range(3):
                os.dup2(os.open(os.devnull, os.O_RDWR), number)
        Daemon(log_file).run()
    return 0


def pass_commands() -> int:
    code = 0
    with socket.socket(socket.AF_UNIX) as connection:
        os.seteuid(int(os.environ.get("FAKE_MPS_USER", os.geteuid())))
        try:
            connection.connect(str(PIPE / "control"))
        except OSError:
            print(NOT_FOUND, file=sys.stderr)
            return 1
        answers = connection.makefile()
        for line in sys.stdin:
            try:
                connection.sendall(line.encode())
                answer = answers.readline()
            except OSError:
                answer = ""
            if not answer:
                code, sentence = behaviour("busy") or (1, BUSY)
                if sentence:
                    print(sentence, file=sys.stderr)
                return code
            code, text = json.loads(answer)
            if text:
                print(text)
    return code


def main(arguments: list[str]) -> int:
    match arguments:
        case ["-f" | "-d" as option, *options] if set(options) <= {"-multiuser-server"}:
            return control(background=option == "-d")
        case []:
            return pass_commands()
    print("usage: nvidia-cuda-mps-control [-d | -f] [-multiuser-server]")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
