"""A stand-in for `nvidia-cuda-mps-control -f` that serves the clients of cuda.c. Only Python.

It counts its clients by their connections, one user's at a time, 48 of them, and starts a process
as their server. How a real daemon answers is not known from it: tests/mps/README.md says what is.
"""

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

MOST = 48
SOCKET = Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"]) / "control"


class Daemon:
    def __init__(self, several: bool) -> None:
        self.several = several
        self.lock = threading.Condition()
        self.server: subprocess.Popen[bytes] | None = None
        self.user = -1
        self.clients: dict[int, socket.socket] = {}
        self.fault = False
        self.defaults: dict[str, str] = {}

    def run(self) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            with socket.socket(socket.AF_UNIX) as other:
                if other.connect_ex(str(SOCKET)) == 0:
                    sys.exit("An instance of this daemon is already running")
            SOCKET.unlink(missing_ok=True)
            listener.bind(str(SOCKET))
            SOCKET.chmod(0o666)
            listener.listen(64)
            signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
            print("listening", flush=True)
            threading.Thread(target=self.watch, daemon=True).start()
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=self.take, args=(connection,), daemon=True).start()

    def watch(self) -> None:
        """A server that was killed takes its clients with it."""
        while True:
            time.sleep(0.02)
            with self.lock:
                if self.server is not None and self.server.poll() is not None:
                    self.server = None
                    for client in self.clients.values():
                        client.shutdown(socket.SHUT_RDWR)

    def take(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            line = connection.makefile().readline().strip()
            if line == "CLIENT":
                self.serve(connection)
            else:
                with self.lock:
                    connection.sendall(self.answer(line).encode())
                if line.startswith("quit"):
                    os._exit(0)

    def serve(self, connection: socket.socket) -> None:
        who = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, user, _ = struct.unpack("3i", who)
        with self.lock:
            mine = lambda: self.several or not self.clients or self.user == user  # noqa: E731
            self.lock.wait_for(mine)
            if len(self.clients) >= MOST:
                connection.sendall(b"full\n")
                return
            if self.user != user and not self.several:
                self.end_server()
            self.user = user
            self.start_server()
            self.clients[pid] = connection
        try:
            connection.sendall(b"ok\n")
            while line := connection.recv(16):
                if line == b"FAULT\n":
                    with self.lock:
                        self.fault = True
                        for each in self.clients.values():
                            each.shutdown(socket.SHUT_WR)
        finally:
            with self.lock:
                del self.clients[pid]
                self.fault = self.fault and bool(self.clients)
                self.lock.notify_all()

    def start_server(self) -> None:
        if self.server is None:
            code = "import time; time.sleep(600)"
            self.server = subprocess.Popen(
                ["nvidia-cuda-mps-server", "-S", "-s", "-c", code], executable=sys.executable,
                env={**os.environ, "PYTHONHOME": sys.base_prefix},
            )  # fmt: skip

    def end_server(self) -> None:
        if self.server is not None:
            self.server.kill()
            self.server.wait()
            self.server = None

    def answer(self, line: str) -> str:
        servers = [] if self.server is None else [str(self.server.pid)]
        match line.split():
            case ["get_server_list"]:
                return "\n".join(servers)
            case ["start_server", *_]:
                self.start_server()
            case ["get_server_status", pid]:
                known = "FAULT" if self.fault else "ACTIVE"
                return known if pid in servers else f"Server {pid} not found"
            case ["get_client_list", _]:
                return "\n".join(map(str, self.clients))
            case ["ps"] | ["get_device_client_list", *_]:
                return "\n".join(f"Device 0 PID {pid}" for pid in self.clients)
            case [word, *rest] if word.startswith("set_default_"):
                *ordinal, value = rest
                self.defaults["".join([word[4:], *ordinal])] = value
            case [word, *rest] if word.startswith("get_default_"):
                return self.defaults.get("".join([word[4:], *rest]), "")
            case ["quit", *_]:
                self.end_server()
            case _:
                return f'Unknown command "{line}"'
        return ""


if __name__ == "__main__":
    Daemon("-multiuser-server" in sys.argv).run()
