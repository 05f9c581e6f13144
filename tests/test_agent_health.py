"""Faults and their ends, seen by a grpcio kubelet: the real process, real pynvml, a fake driver."""

import dataclasses
import json
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.agent_process import Agent, execute, running
from tests.fake_nvml import FakeGpu, FakeNvml
from tests.kubelet_peer import KubeletPeer

pytestmark = pytest.mark.slow

UUIDS = [f"GPU-a000000{n}-1111-2222-3333-00000000000{n}" for n in range(4)]
GPUS = [FakeGpu(uuid, bus=f"00000000:{n + 1:02X}:00.0") for n, uuid in enumerate(UUIDS)]
ALL = {"c0": 10, "c1": 10, "c2": 10, "c3": 10}

SETTINGS = {
    "VGPU_GPU_DRIVER": "nvml",
    "VGPU_SHARING": "time-slicing",
    "VGPU_HEALTH_INTERVAL": "1",
}

RESET, UNPROVEN, APPLICATION = 62, 74, 31


class Node:
    """An agent with fast settings on a fake driver, and the kubelet that follows it."""

    def __init__(self, kubelet: KubeletPeer, agent: Agent, nvml: FakeNvml) -> None:
        self.kubelet, self.agent, self.nvml = kubelet, agent, nvml

    def wait(self, **healthy: int) -> list[Any]:
        """Waits for a list with so many healthy vGPUs by GPU (`c0=10`) and no others."""
        expected = {UUIDS[int(name[1:])]: count for name, count in healthy.items() if count}
        return self.kubelet.wait_list(lambda devices: by_gpu(devices) == expected)

    def wait_healthy(self, total: int) -> None:
        self.kubelet.wait_list(lambda devices: sum(by_gpu(devices).values()) == total)

    def status(self) -> dict[str, Any]:
        return json.loads(self.get("/status.json"))

    def get(self, path: str) -> str:
        return self.agent.get(path)[1]

    def faults(self, shared: int) -> set[str]:
        (found,) = [each for each in self.status()["gpus"] if each["uuid"] == UUIDS[shared]]
        return {fault["reason"] for fault in found["faults"]}

    def updates(self) -> int:
        return len(self.kubelet.lists)

    def ids(self) -> set[str]:
        return {device.id for device in self.kubelet.lists[-1].devices}


def by_gpu(devices: list[Any]) -> Counter[str]:
    return Counter(device.id.split("::")[0] for device in devices if device.health == "Healthy")


Start = Callable[..., AbstractContextManager[Node]]


@pytest.fixture
def node(kubelet_dir: Path, fake_nvml: FakeNvml) -> Start:
    """Starts an agent whose driver names these GPUs, and which then has so many healthy vGPUs."""

    @contextmanager
    def start(
        *gpus: FakeGpu, vgpus: int = 40, changes: str = "", **settings: str
    ) -> Iterator[Node]:
        fake_nvml.set_gpus(*gpus)
        values = SETTINGS | {"VGPU_RECOVERY_SECONDS": "1"} | settings
        with (
            KubeletPeer(kubelet_dir) as kubelet,
            running(kubelet_dir, changes=changes, **values, **fake_nvml.environment()) as agent,
        ):
            kubelet.wait_list(1)
            assert sum(by_gpu(kubelet.lists[0].devices).values()) == vgpus
            yield Node(kubelet, agent, fake_nvml)

    return start


def described(**values: Any) -> list[FakeGpu]:
    return [dataclasses.replace(shared, **values) for shared in GPUS]


def test_xids_of_each_bucket_do_what_their_bucket_says(node: Start) -> None:
    with node(*GPUS, VGPU_RECOVERY_SECONDS="2") as it:
        # RESTART_APP, IGNORE and the two workflows
        for counted in (13, 31, 43, 45, 63, 94, 154):
            it.nvml.xid(UUIDS[0], counted)
            it.agent.wait_line(f"XID {counted} ")
        assert it.updates() == 1

        it.nvml.xid(UUIDS[1], UNPROVEN)
        it.wait(c0=10, c1=0, c2=10, c3=10)
        it.wait(c0=10, c1=10, c2=10, c3=10)  # proven good
        assert it.updates() == 3  # all vGPUs of a GPU in one

        it.nvml.xid(None, UNPROVEN)  # whose GPU cannot be told concerns all GPUs
        it.wait_healthy(0)
        assert it.updates() == 4
        it.wait_healthy(40)

        for shared, reset in ((0, 46), (1, 79), (2, 151), (3, 48)):  # GPU, BM, VM, ECC workflow
            it.nvml.xid(UUIDS[shared], reset)
        it.wait_healthy(0)
        assert [it.faults(shared) for shared in range(4)] == [{"xid"}] * 4
        metrics = it.get("/metrics")
        for shared, xid in ((0, 13), (0, 154), (1, UNPROVEN), (3, 48)):
            assert re.search(
                rf'vgpu_xid_errors_total{{gpu_index="{shared}",.*,xid="{xid}"}} 1.0', metrics
            )
        assert f'vgpu_gpu_healthy{{gpu_index="2",gpu_uuid="{UUIDS[2]}"}} 0.0' in metrics


def test_where_the_driver_offers_its_recovery_action_its_word_marks_and_heals(node: Start) -> None:
    with node(*described(action=0), VGPU_HEALTH_INTERVAL="30") as it:
        it.nvml.xid(UUIDS[2], RESET)
        it.nvml.update(UUIDS[2], action=1)
        it.nvml.action_event(UUIDS[2])  # the interval is long: only the event can tell
        it.wait(c0=10, c1=10, c2=0, c3=10)
        it.agent.wait_line("asks for a reset of the GPU")
        assert it.faults(2) == {"xid", "recovery-action"}

        it.nvml.update(UUIDS[2], action=0)
        it.nvml.action_event(UUIDS[2])
        it.wait(c0=10, c1=10, c2=10, c3=10)
        assert it.updates() == 3


def test_where_the_driver_does_not_offer_it_a_reset_is_told_by_counts_that_fell(
    node: Start,
) -> None:
    with node(*described(energy=5000, ecc=0)) as it:
        it.nvml.xid(UUIDS[1], RESET)
        it.wait(c0=10, c1=0, c2=10, c3=10)
        it.nvml.update(UUIDS[1], energy=9000)
        time.sleep(2.5)  # passed probes alone do not heal it
        assert it.updates() == 2
        it.nvml.update(UUIDS[1], energy=10)
        it.wait(c0=10, c1=10, c2=10, c3=10)


def test_a_fault_marks_its_gpu_in_one_update_and_is_over_with_its_cause(node: Start) -> None:
    causes = [
        ({"ecc": 8}, {"ecc": 0}, {"ecc"}),  # above those at the start, until its reset
        ({"compute_mode": 3}, {"compute_mode": 0}, {"compute-mode"}),
        ({"hang": 30}, {"hang": 0}, {"timeout"}),
        ({"lost": True}, {"lost": False, "epoch": 1}, {"lost", "xid"}),
    ]
    with node(*described(ecc=7)) as it:
        ids = it.ids()
        time.sleep(1.5)  # seven errors at the start are no news
        assert it.updates() == 1
        for shared, (cause, end, faults) in enumerate(causes):
            it.nvml.update(UUIDS[shared], **cause)
            if "xid" in faults:
                it.nvml.xid(UUIDS[shared], 79)
                it.agent.wait_line("XID 79")
            it.wait(**ALL | {f"c{shared}": 0})
            it.agent.wait_line(f"{min(faults)}: ")
            assert it.faults(shared) == faults
            it.nvml.update(UUIDS[shared], **end)
            it.wait(**ALL)
            assert it.ids() == ids
        assert it.updates() == 9


def test_a_gpu_that_is_lost_for_long_leaves_and_returns_with_the_same_ids(node: Start) -> None:
    with node(*GPUS, VGPU_LOST_CARD_SECONDS="2") as it:
        ids = it.ids()
        it.nvml.update(UUIDS[3], lost=True)
        it.wait(c0=10, c1=10, c2=10, c3=0)
        assert it.faults(3) == {"lost"}
        assert it.ids() == ids
        it.kubelet.wait_list(lambda devices: len(devices) == 30)
        assert "no longer listed" in it.agent.wait_line("no longer listed").string
        # The driver still counts it.
        ((index, reason),) = [(each["index"], each["reason"]) for each in it.status()["excluded"]]
        assert (index, reason) == (3, "lost")
        assert "vgpu_gpus_counted 4.0\nvgpu_gpus_described 3.0" in "\n".join(
            line for line in it.get("/metrics").splitlines() if line.startswith("vgpu_gpus_")
        )
        it.nvml.update(UUIDS[3], lost=False, epoch=2)
        it.wait(c0=10, c1=10, c2=10, c3=10)
        assert it.ids() == ids


def test_a_call_that_hangs_for_long_delays_nothing_but_its_own_gpu(
    kubelet_dir: Path, node: Start
) -> None:
    with node(*GPUS) as it:
        it.nvml.update(UUIDS[0], hang=30)
        it.wait(c0=0, c1=10, c2=10, c3=10)
        assert it.faults(0) == {"timeout"}
        tasks = Path(f"/proc/{it.agent.process.pid}/task")
        threads = len(list(tasks.iterdir()))

        for _ in range(20):
            began = time.monotonic()
            it.kubelet.allocate([f"{UUIDS[1]}::0"])
            assert it.get("/healthz") == "ok\n"
            assert time.monotonic() - began < 0.5
        time.sleep(4)  # more looks, and no more threads: at most one waits for a GPU
        assert len(list(tasks.iterdir())) <= threads
        it.nvml.update(UUIDS[2], error=999)  # other GPUs go on being probed
        it.wait(c0=0, c1=10, c2=0, c3=10)

        code, seconds = it.agent.end()
        assert (code, seconds < 2) == (0, True), seconds
        assert not list((kubelet_dir / "device-plugins").glob("vgpu-*.sock"))


# Where nothing is, nothing is looked for more often than each half a minute: in tests, each second.
LOOK_SOON = """
from functools import partial
from vgpu_agent import agent
from vgpu_agent.gpu.watch import GpuWatch, Intervals
agent.GpuWatch = partial(GpuWatch, intervals=Intervals(driver_retry=1.0))
"""


def test_no_gpu_then_four_then_two_then_four(node: Start) -> None:
    with node(vgpus=0, changes=LOOK_SOON) as it:
        assert it.get("/readyz") == "ready\n"
        it.nvml.set_gpus(*GPUS)
        it.kubelet.wait_list(lambda devices: sum(by_gpu(devices).values()) == 40)
        it.nvml.set_gpus(*GPUS[:2])
        it.wait(c0=10, c1=10, c2=0, c3=0)
        assert len(it.ids()) == 40
        it.nvml.set_gpus(*GPUS)
        it.wait(c0=10, c1=10, c2=10, c3=10)


def test_a_gpu_that_waits_for_its_reset_still_does_after_the_agent_was_killed(
    kubelet_dir: Path, node: Start
) -> None:
    with node(*described(energy=5000)) as it:
        it.nvml.xid(UUIDS[0], RESET)
        it.nvml.xid(UUIDS[1], UNPROVEN)
        it.kubelet.wait_list(lambda devices: by_gpu(devices)[UUIDS[0]] == 0)
        state = kubelet_dir / "state" / "gpus.json"
        deadline = time.monotonic() + 5
        while not state.exists() or "xid" not in state.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        it.agent.end(signal.SIGKILL)
    # What only had to be proven good is: its probe at the start passed.
    with node(*described(energy=5000), vgpus=30) as it:
        assert by_gpu(it.kubelet.lists[0].devices) == dict.fromkeys(UUIDS[1:], 10)
        it.nvml.update(UUIDS[0], energy=1)
        it.wait_healthy(40)


def test_release_lets_go_of_the_driver_and_nothing_else_stops(
    kubelet_dir: Path, node: Start
) -> None:
    with node(*GPUS) as it:
        settings = {
            "VGPU_STATE_DIRECTORY": str(kubelet_dir / "state"),
            "VGPU_METRICS_ADDRESS": f"0.0.0.0:{it.agent.port}",
            "VGPU_SHARING": "time-slicing",
        }
        it.nvml.xid(UUIDS[0], RESET)
        it.wait(c0=0, c1=10, c2=10, c3=10)
        done = execute("release", **settings)
        assert done.returncode == 0, done.stderr
        assert "reset them now" in done.stdout
        it.agent.wait_line("released all GPUs; reset them now")
        assert it.status()["driver"]["released_until"] is not None
        assert "vgpu_nvml_up 0.0\n" in (metrics := it.get("/metrics"))
        assert "vgpu_nvml_released 1.0\n" in metrics
        assert it.kubelet.allocate([f"{UUIDS[1]}::0"])
    without = execute("release", **settings | {"VGPU_STATE_DIRECTORY": str(kubelet_dir)})
    assert without.returncode == 1
    assert f"no agent answers at {kubelet_dir}/control.sock" in without.stderr


def test_gpus_in_mig_mode_are_left_out_with_a_reason_that_everybody_shows_and_return(
    node: Start,
) -> None:
    with node(*GPUS[:3], dataclasses.replace(GPUS[3], mig=1), vgpus=30) as it:
        assert [left["reason"] for left in it.status()["excluded"]] == ["mig"]
        assert "MIG mode" in it.agent.wait_line("GPU excluded").string
        assert re.search(r'vgpu_gpu_excluded{.*reason="mig"} 1.0', it.get("/metrics"))
        it.nvml.update(UUIDS[1], mig=1)
        it.kubelet.wait_list(lambda devices: len(devices) == 20)
        it.wait(c0=10, c2=10)
        it.nvml.update(UUIDS[1], mig=0)
        it.wait(c0=10, c1=10, c2=10)


def test_without_health_checks_nothing_is_marked_and_that_is_said_loudly(node: Start) -> None:
    with node(*GPUS, VGPU_HEALTH_CHECKS="off") as it:
        it.agent.wait_line("no fault of any GPU will be noticed")
        it.nvml.xid(UUIDS[0], RESET)
        it.nvml.update(UUIDS[1], lost=True)
        time.sleep(2.5)
        assert it.updates() == 1
        assert it.status()["health_checks"] is False


def test_a_missing_library_ends_the_agent_after_its_time_so_that_the_container_is_made_anew(
    kubelet_dir: Path,
) -> None:
    with (
        KubeletPeer(kubelet_dir) as kubelet,
        running(kubelet_dir, **SETTINGS, VGPU_DRIVER_WAIT="3") as agent,
    ):
        # It is live and registered until then.
        assert kubelet.wait_list(1).devices == []
        assert agent.get("/readyz") == (200, "ready\n")
        assert "libnvidia-ml.so.1" in agent.wait_line("no GPU can be used").string
        assert agent.process.wait(timeout=10) == 1
    assert "libnvidia-ml.so.1" in agent.lines[-1]
    assert not any("Traceback" in line for line in agent.lines)


def test_a_driver_that_does_not_start_is_looked_for_again(node: Start) -> None:
    """All handles are dead by then, and again when it starts."""
    with node(*GPUS) as it:
        it.nvml.init_error(9)
        for uuid in UUIDS:
            it.nvml.update(uuid, lost=True)
        it.wait_healthy(0)
        assert "the NVIDIA driver is not loaded" in it.agent.wait_line("no GPU can be used").string
        it.nvml.init_error(None)
        for uuid in UUIDS:
            it.nvml.update(uuid, lost=False, epoch=1)
        it.wait_healthy(40)


@pytest.mark.parametrize(
    "call", ["DeviceGetUUID", "DeviceGetMemoryInfo_v2", "DeviceRegisterEvents"]
)
def test_a_gpu_that_hangs_costs_the_others_nothing(node: Start, call: str) -> None:
    """At the start, and then beside one that is lost and one with a bad XID."""
    hangs = dataclasses.replace(GPUS[1], hang=60, call=call)
    listed = 40 if call == "DeviceRegisterEvents" else 30
    with node(GPUS[0], hangs, *GPUS[2:], vgpus=listed) as it:
        if listed == 30:
            (silent,) = it.status()["excluded"]
            assert (silent["index"], silent["uuid"], silent["reason"]) == (1, "", "timeout")
            assert "vgpu_gpus_described 3.0" in it.get("/metrics")
            it.nvml.update(UUIDS[1], hang=0)
            it.wait(**ALL)
            it.nvml.update(UUIDS[1], hang=60)
        it.nvml.update(UUIDS[2], lost=True)
        it.nvml.xid(UUIDS[3], RESET)
        it.wait(c0=10)
        assert [it.faults(n) for n in range(1, 4)] == [{"timeout"}, {"lost"}, {"xid"}]
        it.nvml.update(UUIDS[2], lost=False)
        it.wait(c0=10, c2=10)
        assert it.agent.end()[0] == 0  # though a thread is inside NVML
        it.nvml.update(UUIDS[1], hang=0)


NO_THREADS = """
import threading
from pathlib import Path
start, flag = threading.Thread.start, Path({!r})
def starts(self):
    if flag.exists():
        raise RuntimeError("can't start new thread")
    start(self)
threading.Thread.start = starts
"""


def test_an_agent_on_a_node_without_threads_waits_for_some(node: Start, tmp_path: Path) -> None:
    """As where a tenant starts processes without end."""
    flag = tmp_path / "none"
    with node(*GPUS, changes=NO_THREADS.format(str(flag)), VGPU_PROCESS_METRICS="on") as it:
        it.agent.port  # noqa: B018 - its web side is loaded
        flag.touch()
        it.nvml.update(UUIDS[1], hang=0.5)
        it.nvml.xid(UUIDS[2], RESET)
        it.kubelet.wait_list(lambda devices: UUIDS[2] not in by_gpu(devices))
        time.sleep(4)
        assert it.agent.process.poll() is None, it.agent.text
        it.nvml.update(UUIDS[1], hang=0)
        it.wait(c0=10, c1=10, c3=10)
        flag.unlink()
        assert it.get("/healthz") == "ok\n"
        it.nvml.update(UUIDS[0], lost=True)
        it.wait(c1=10, c3=10)
        assert it.agent.end()[0] == 0
    assert "Traceback" not in it.agent.text


def test_a_gpu_that_shares_the_hosts_memory_is_shared_by_number(node: Start) -> None:
    with node(*GPUS[:2], dataclasses.replace(GPUS[2], error=3), vgpus=30) as it:
        (granted,) = it.kubelet.allocate([f"{UUIDS[2]}::0"]).container_responses
        assert granted.envs["VGPU_SHARE"] == "1/10"
        assert not any(name.startswith("VGPU_MEMORY") for name in granted.envs)
        metrics = it.get("/metrics")
        assert not re.search(rf'vgpu_gpu_memory_bytes{{[^}}]*"{UUIDS[2]}"', metrics)
        assert re.search(rf'vgpu_gpu_memory_bytes{{[^}}]*"{UUIDS[1]}"', metrics)
        assert it.status()["gpus"][2]["memory_bytes"] is None
        assert it.agent.end()[0] == 0


def test_a_gpu_that_returns_half_dead_stays_listed(node: Start) -> None:
    with node(*GPUS) as it:
        it.nvml.update(UUIDS[0], lost=True)
        it.wait(c1=10, c2=10, c3=10)
        it.nvml.update(UUIDS[0], lost=False, error=999, epoch=1)
        it.agent.wait_line("probe: nvmlDeviceGetMemoryInfo")
        assert len(it.ids()) == 40
        assert it.faults(0) >= {"probe"}
        it.nvml.update(UUIDS[0], error=0)
        it.wait(**ALL)


def test_what_the_kubelet_does_not_wait_for_is_loaded_after_its_first_list(node: Start) -> None:
    with node(*GPUS, changes=LOADS) as it:
        line = it.agent.wait_line(r"loads beside, lists sent: (\d+)")
        assert line[1] == "1"
        assert it.get("/healthz") == "ok\n"


def test_probes_are_answered_while_there_is_no_kubelet(kubelet_dir: Path) -> None:
    with running(kubelet_dir, changes=LOADS, VGPU_GPU_DRIVER="simulated") as agent:
        assert agent.wait_line(r"loads beside, lists sent: (\d+)")[1] == "0"
        assert agent.get("/healthz")[1] == "ok\n"


LOADS = """
import sys
from vgpu_agent import agent
real = agent.Agent._run_beside
async def run_beside(self, *args):
    load = agent._load_beside
    def loading():
        print("loads beside, lists sent:", self.node.snapshot.lists_sent, file=sys.stderr)
        assert not {"uvicorn", "prometheus_client", "vgpu_agent.beside"} & sys.modules.keys()
        return load()
    agent._load_beside = loading
    await real(self, *args)
agent.Agent._run_beside = run_beside
"""
