"""How each fault of the kubelet, of who holds what and of the process is made."""

import json
import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc

from tests.faults.gpu_faults import CLEAN, GpuFaults, NotNowError
from tests.faults.model import REPLICAS
from tests.faults.promises import PROMISES
from tests.faults.rig import UUIDS, FaultError
from tests.kubelet.podresources_peer import a_pod, encoded
from tests.kubelet_peer import StalledPeer

MAX_OPEN = 60


class Faults(GpuFaults):
    """`drops`: streams that ended since another kubelet came. `open`: peers that do nothing."""

    fifo = False
    drops = 0

    def __init__(self, *arguments: Any) -> None:
        self.open: list[Any] = []
        super().__init__(*arguments)

    # The kubelet

    def new_kubelet(self, pause: float) -> None:
        time.sleep(pause)
        self.kubelet.start()
        self.drops = 0
        self.begin()

    def kubelet_restart(self) -> None:
        self.kubelet.stop(clean=self.random.random() < 0.5)
        self.new_kubelet(self.random.choice((0, 0.3, 1)))

    def kubelet_away(self) -> None:
        self.kubelet.stop()
        self.new_kubelet(self.random.uniform(1, 3))

    def kubelet_socket_stale(self) -> None:
        self.kubelet.stop()
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(self.kubelet.socket))
        self.new_kubelet(0.5)

    def may_drop(self) -> None:
        """Not the third soon after another: that is taken for a second agent."""
        self.unless(self.drops == 2)
        self.drops += 1

    def stream_drop(self) -> None:
        self.may_drop()
        self.kubelet.drop_stream()

    def register_refused(self) -> None:
        self.may_drop()
        self.kubelet.refuse_register = "not now"
        self.kubelet.drop_stream()
        time.sleep(0.5)
        self.kubelet.refuse_register = None
        self.begin()

    def kubelet_slow(self) -> None:
        self.may_drop()
        self.kubelet.slow_options = 1
        self.kubelet.drop_stream()
        time.sleep(0.5)
        self.kubelet.slow_options = 0
        self.begin()

    @property
    def own_socket(self) -> Path:
        return next(self.kubelet.directory.glob("vgpu-*.sock"))

    def own_socket_removed(self) -> None:
        self.may_drop()
        before = len(self.kubelet.registrations)
        self.own_socket.unlink()
        seconds = PROMISES["own socket removed"].seconds * self.patience
        self.kubelet.wait_registrations(before + 1, seconds)

    def half_open_connections(self) -> None:
        self.unless(len(self.open) > MAX_OPEN)
        for _ in range(20):
            self.open.append(one := socket.socket(socket.AF_UNIX))
            one.connect(str(self.own_socket))
            one.send(b"PRI * HTTP/2.0\r\n"[: self.random.randrange(16)])

    def slow_reader(self) -> None:
        self.unless(len(self.open) > MAX_OPEN)
        self.open.append(StalledPeer(self.own_socket))

    def slow_scrapers(self) -> None:
        self.unless(len(self.open) > MAX_OPEN)
        for _ in range(8):
            self.open.append(one := socket.create_connection(("127.0.0.1", self.agent.port)))
            one.setblocking(False)
            with suppress(OSError):
                one.send(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50)

    def peers_leave(self) -> None:
        while self.open:
            self.open.pop().close()

    # Who holds what

    def answer(self) -> bytes:
        return encoded(*(a_pod(f"pod-{n}", each) for n, each in enumerate(sorted(self.held))))

    def pods_change(self) -> None:
        self.unless(not self.pods_up)
        everything = [f"{uuid}::{n}" for uuid in UUIDS for n in range(REPLICAS)]
        self.held = set(self.random.sample(everything, self.random.randrange(8)))
        self.pods.answer = self.answer()

    def pods_fail(self) -> None:
        self.unless(not self.pods_up)
        self.pods_up = False

    def pod_resources_away(self) -> None:
        self.pods_fail()
        self.pods.stop()

    def pod_resources_fail(self) -> None:
        self.pods_fail()
        self.pods.answer = lambda context: context.abort(grpc.StatusCode.INTERNAL, "no")

    def pod_resources_hang(self) -> None:
        self.pods_fail()
        self.pods.answer = lambda _: self.pods.stopping.wait() and b""

    def checkpoint_is_a_fifo(self) -> None:
        self.unless(self.fifo, not self.pods_up)
        self.fifo = True
        os.mkfifo(self.pods.checkpoint)

    def pod_resources_back(self) -> None:
        self.unless(self.pods_up and not self.fifo)
        if self.fifo:
            self.pods.checkpoint.unlink()
        if not self.pods_up:
            self.pods.stop()
            self.pods.answer = self.answer()
            self.pods.start()
        self.pods_up, self.fifo = True, False

    # The process

    def clock_jump(self) -> None:
        new = self.offset.with_name("offset.new")
        new.write_text(str(self.random.choice((-86400, -3600, 0, 3600, 86400 * 30))))
        new.rename(self.offset)

    def stopped(self) -> None:
        self.agent.process.send_signal(signal.SIGSTOP)
        time.sleep(self.random.uniform(0.5, 2))
        self.agent.process.send_signal(signal.SIGCONT)
        self.begin()

    def sigterm(self) -> None:
        code, took = self.agent.end()
        if code != 0 or took > 2.5 * self.patience:
            raise FaultError(f"SIGTERM: exit code {code} after {took:.2f} s")
        self.start_agent()
        self.begin()

    def not_kept(self) -> str | None:
        waiting = {gpu.facts.uuid for gpu in self.model.gpus if gpu.waits}
        path = self.directory / "state" / "gpus.json"
        kept = json.loads(path.read_text("utf-8"))["faults"] if path.exists() else {}
        other = waiting ^ kept.keys()
        return f"{path.name} has other faults of {', '.join(other)}" if other else None

    def sigkill(self) -> None:
        self.wait(self.not_kept, "SIGKILL", 2)  # what happened in its moment may be lost
        self.agent.end(signal.SIGKILL)
        self.start_agent()
        self.begin()

    # All well

    def calm(self) -> None:
        """Ends every fault, and waits until that is seen: what is away first, then by resets."""
        with suppress(NotNowError):
            self.pod_resources_back()
        self.peers_leave()
        self.waits_fail = False
        self.nvml.wait_error(None)
        for gpu in self.model.gpus:
            if gpu.condition is not None:
                gpu.back()
        self.settled_calm()
        self.wait_after_xid()
        for gpu in self.model.gpus:
            gpu.initialized(epoch=gpu.facts.epoch + 1, **CLEAN)
        self.settled_calm()

    def settled_calm(self) -> None:
        self.show()
        self.begin()
        self.settle("all faults end", 25, None)
