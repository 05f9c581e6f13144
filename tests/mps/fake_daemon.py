"""A stand-in for `nvidia-cuda-mps-control` and `nvidia-cuda-mps-server`. See README.md beside it.

    -f              a control daemon in the foreground; -d: in the background
    (no option)     passes commands, one a line on standard input, to the daemon
    --server UID    an MPS server, as the daemon starts it

FAKE_MPS_BEHAVIOUR names a JSON object that is read for every command; `FakeMps` writes it:

    hang            the daemon takes commands and never answers
    die             the daemon ends at once, without a word, and leaves its socket
    refuse          object of command word to what is said with exit code 1
    answers         object of command line to the whole answer, whatever is true
    status          status of every server (ACTIVE)
    clients         text of get_device_client_list
    servers         PIDs that are listed beside our own servers
    whole_gib       limits of memory are read back in whole GiB, rounded down
    stubborn        servers that start take no SIGTERM
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

MIB, GIB = 2**20, 2**30


def behaviour(name: str) -> object:
    return json.loads(Path(os.environ["FAKE_MPS_BEHAVIOUR"]).read_text()).get(name)


def control_socket() -> str:
    return os.environ["CUDA_MPS_PIPE_DIRECTORY"] + "/control"


class Daemon:
    def __init__(self) -> None:
        self.servers: list[subprocess.Popen[bytes]] = []
        self.threads = 100
        self.limits: dict[str, str] = {}
        self.log_path = Path(os.environ["CUDA_MPS_LOG_DIRECTORY"]) / "control.log"

    def run(self) -> None:
        path = Path(control_socket())
        if path.exists():
            with socket.socket(socket.AF_UNIX) as other:
                if other.connect_ex(str(path)) == 0:
                    print("An instance of this daemon is already running")
                    sys.exit(1)
            path.unlink()
        signal.signal(signal.SIGTERM, lambda *_: self.quit())
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            path.chmod(0o666)
            listener.listen(16)
            self.log("Starting control daemon using socket " + str(path))
            threading.Thread(target=self.mortal, daemon=True).start()
            while True:
                connection, _ = listener.accept()
                with connection:
                    self.serve(connection)

    def mortal(self) -> None:
        while not behaviour("die"):
            time.sleep(0.02)
        os._exit(1)

    def serve(self, connection: socket.socket) -> None:
        line = connection.makefile().readline().strip()
        while behaviour("hang"):
            time.sleep(0.02)
        code, text = self.answer(line)
        try:
            connection.sendall(f"{code}\n{text}".encode())
        except OSError:
            return  # nobody waits for it any more
        if line == "quit":
            connection.close()
            self.quit()

    def answer(self, line: str) -> tuple[int, str]:
        word, *arguments = line.split()
        refusals, answers = behaviour("refuse") or {}, behaviour("answers") or {}
        if word in refusals:
            return 1, refusals[word]
        if line in answers:
            return 0, answers[line]
        match word, arguments:
            case "get_server_list", []:
                own = [server.pid for server in self.servers if server.poll() is None]
                return 0, "\n".join(map(str, [*(behaviour("servers") or []), *own]))
            case "get_server_status", [_]:
                return 0, str(behaviour("status") or "ACTIVE")
            case "get_device_client_list", _:
                return 0, str(behaviour("clients") or "")
            case "set_default_active_thread_percentage", [percentage]:
                self.threads = int(percentage)
                return 0, f"{self.threads}.0"
            case "get_default_active_thread_percentage", []:
                return 0, f"{self.threads}.0"
            case "set_default_device_pinned_mem_limit", [device, limit]:
                self.limits[device] = limit
                return 0, ""
            case "get_default_device_pinned_mem_limit", [device]:
                limit = self.limits.get(device, "0G")
                if behaviour("whole_gib") and limit.endswith("M"):
                    limit = f"{int(limit[:-1]) * MIB // GIB}G"
                return 0, limit
            case "start_server", ["-uid", uid]:
                self.start_server(uid)
                return 0, ""
            case "quit", []:
                return 0, ""
        return 1, f"Unknown command {line!r}"

    def start_server(self, uid: str) -> None:
        program = str(Path(os.environ["FAKE_MPS_BIN"]) / "nvidia-cuda-mps-server")
        server = subprocess.Popen(
            [program, "-S", "-s", __file__, "--server", uid],
            executable=sys.executable,
            # Python looks for its library beside its name, which is not its own here.
            env={**os.environ, "PYTHONHOME": sys.base_prefix},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert server.stdout is not None
        server.stdout.readline()  # it is ready
        server.stdout.close()
        self.servers.append(server)
        self.log(f"Starting new server {server.pid} for user {uid}")
        self.log(f"NEW SERVER {server.pid}: Ready")

    def quit(self) -> None:
        for server in self.servers:
            server.terminate()
        os._exit(0)

    def log(self, text: str) -> None:
        with self.log_path.open("a") as file:
            file.write(f"[{time.strftime('%Y-%m-%d %H:%M:%S')}.000 Control {os.getpid()}] {text}\n")


def pass_commands() -> int:
    code = 0
    for line in sys.stdin:
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.connect(control_socket())
            except OSError:
                print("Cannot find MPS control daemon process")
                return 1
            connection.sendall(line.encode())
            said, _, text = connection.makefile().read().partition("\n")
        code = int(said or 1)
        if text:
            print(text)
    return code


def serve() -> None:
    if behaviour("stubborn"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("ready", flush=True)
    while True:
        time.sleep(60)


def main(arguments: list[str]) -> int:
    match arguments:
        case ["--server", _]:
            serve()
        case ["-f"]:
            Daemon().run()
        case ["-d"]:
            if os.fork() == 0:
                os.setsid()
                Daemon().run()
        case []:
            return pass_commands()
        case _:
            print("usage: nvidia-cuda-mps-control [-d | -f]", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
