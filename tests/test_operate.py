"""One GPU is taken out of service, reset and given back: the real commands on a running agent."""

import json
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.agent_process import REPOSITORY, Agent, execute, running
from tests.kubelet.podresources_peer import PodResourcesPeer, a_pod, encoded
from tests.kubelet.rig import RESOURCE
from tests.kubelet_peer import KubeletPeer
from tests.mps.fixtures import eventually
from vgpu_agent import control, unixsocket
from vgpu_agent.gpu.simulated import simulated_gpus

pytestmark = pytest.mark.slow

ONE, TWO = (gpu.uuid for gpu in simulated_gpus(2, "M", 1, (0,)))
NAMED = f"GPU 0 ({ONE})"
RUNBOOK = REPOSITORY / "docs" / "runbook.md"


class Machine:
    """A node with a kubelet; `run` is a command in the agent's container."""

    def __init__(self, kubelet_dir: Path, kubelet: KubeletPeer, pods: PodResourcesPeer) -> None:
        self.kubelet_dir, self.kubelet, self.pods = kubelet_dir, kubelet, pods

    @contextmanager
    def agent(self, healthy: str) -> Iterator[Agent]:
        """The agent, when the kubelet has its list and these GPUs are healthy in it."""
        settings = {"VGPU_HEALTH_INTERVAL": "1", "VGPU_PODRESOURCES_INTERVAL": "1"}
        lists = len(self.kubelet.lists)
        settings |= {"VGPU_RECOVERY_SECONDS": "600", "VGPU_RESOURCE_NAME": RESOURCE}
        with running(self.kubelet_dir, **settings) as agent:
            self.kubelet.wait_list(lists + 1)
            self.wait(healthy)
            agent.wait_line("the kubelet says who holds which vGPU")
            path = self.kubelet_dir / "state" / control.SOCKET
            assert unixsocket.refusal(path) is None
            yield agent
            assert agent.end()[0] == 0, agent.text

    def run(self, *command: str, code: int = 0) -> str:
        """What it prints: the answer, or what is wrong."""
        done = execute(*command, VGPU_STATE_DIRECTORY=str(self.kubelet_dir / "state"))
        assert done.returncode == code, done.stdout + done.stderr
        assert (done.stdout if code else done.stderr) == ""
        return done.stderr if code else done.stdout

    def wait(self, healthy: str) -> None:
        """Until the newest list has all vGPUs of these GPUs as healthy, and no others."""
        uuids = {(ONE, TWO)[int(index)] for index in healthy.split()}
        self.kubelet.wait_list(
            lambda devices: (
                {d.id.split("::")[0] for d in devices if d.health == "Healthy"} == uuids
                and len(devices) == 20
            )
        )

    def report(self) -> dict:
        return json.loads(self.run("status", "--json"))


@pytest.fixture
def machine(kubelet_dir: Path) -> Iterator[Machine]:
    pods = PodResourcesPeer(kubelet_dir, encoded())
    pods.start()
    try:
        with KubeletPeer(kubelet_dir) as kubelet:
            yield Machine(kubelet_dir, kubelet, pods)
    finally:
        pods.stop()


def documented() -> list[str]:
    """The steps of the runbook, as they are to be typed."""
    section = RUNBOOK.read_text().partition("### Resetting one GPU")[2]
    return section.split("```")[1].strip().splitlines()


def test_a_gpu_is_reset_by_the_steps_of_the_runbook(machine):
    cordon, drain, restart, release, reset, done, modes, uncordon = documented()
    # Simulated GPUs have no MPS pod: these two are in tests/mps.
    assert " mps restart 0" in restart
    assert modes.endswith("-c restore -- vgpu-agent mps compute-modes")
    assert reset == "nvidia-smi --gpu-reset -i 0"

    def typed(step: str) -> str:
        return machine.run(*shlex.split(step.removeprefix("agent vgpu-agent ")))

    holding = a_pod("train-0", f"{ONE}::0", f"{ONE}::3", namespace="team a")
    other = a_pod("web-1", f"{TWO}::0")
    machine.pods.answer = encoded(holding, other)
    with machine.agent("0 1") as agent:
        machine.run("simulate", "ecc", "--gpu", "0")
        machine.wait("1")

        assert typed(cordon).startswith(f"{NAMED} is cordoned: no pod is given a vGPU of it until ")
        agent.wait_line(r"WARNING .*ecc: .*; cordoned: ECC errors, reset\. Next: delete the pods")

        assert typed(drain).splitlines() == [
            f"# Pods with vGPUs of {NAMED}: 1",
            "kubectl delete pod -n 'team a' train-0",
        ]
        machine.pods.answer = encoded(other)
        none = f"# Pods with vGPUs of {NAMED}: none\n"
        eventually(lambda: typed(drain) == none, seconds=20)

        assert typed(release).startswith("released all GPUs until ")
        assert machine.report()["driver"]["released_until"] is not None

        machine.run("simulate", "heal", "--gpu", "0")
        words = "it is unhealthy: cordoned: ECC errors, reset"
        assert typed(done) == f"{NAMED} was probed: {words}\n"
        assert machine.report()["driver"]["released_until"] is None

        assert typed(uncordon) == f"{NAMED} is no longer cordoned: it is healthy\n"
        machine.wait("0 1")
        assert agent.wait_line(r"healthy again \(no longer cordoned: ECC errors, reset\)")


def test_a_reset_that_did_not_help_is_said_and_fails(machine):
    with machine.agent("0 1"):
        machine.run("simulate", "xid", "79", "--gpu", "0")
        machine.wait("1")
        machine.run("release", "--for", "10m")
        why = machine.run("release", "--reset-done", "0", code=1)
        assert why.startswith(
            f"vgpu-agent: {NAMED} has not answered a probe within 3 s: it is unhealthy"
        )
        assert "XID 79" in why


def test_one_reset_after_the_other_in_one_window(machine):
    with machine.agent("0 1"):
        machine.run("release", "--for", "10m")
        answer = machine.run("release", "--reset-done", "0", "--for", "5m").splitlines()
        assert answer[0] == f"{NAMED} was probed: it is healthy"
        assert answer[1].startswith("released all GPUs until ")
        assert machine.report()["driver"]["released_until"] is not None
        machine.run("release", "--reset-done")
        machine.run("release", "--reset-done", "1")
        assert machine.report()["driver"]["released_until"] is None


def test_a_cordon_outlives_the_agent_and_the_boot_and_is_shown_everywhere(machine):
    with machine.agent("0 1"):
        machine.run("cordon", ONE, "--reason", "fan")
        machine.wait("1")
    shutil.rmtree(machine.kubelet_dir / "state")  # as a reboot empties /run
    with machine.agent("1") as agent:
        agent.wait_line(r"WARNING 10 vGPUs are unhealthy: cordoned: fan\. Next: .*uncordon")
        (shared,) = [gpu for gpu in machine.report()["gpus"] if not gpu["healthy"]]
        (fault,) = shared["faults"]
        said = {name: fault[name] for name in ("reason", "detail", "ends")}
        assert said == {"reason": "cordoned", "detail": "fan", "ends": "when it is uncordoned"}
        assert machine.report()["cordoned"] == {ONE: "fan"}
        metrics = agent.get("/metrics")[1]
        sample = (
            f'vgpu_gpu_unhealthy_reason{{gpu_index="0",gpu_uuid="{ONE}",reason="cordoned"}} 1.0'
        )
        assert sample in metrics
        assert "cordoned since " in machine.run("status")
        machine.run("uncordon", "GPU-00000000")
        machine.wait("0 1")
    with machine.agent("0 1"):
        assert machine.report()["cordoned"] == {}


WRONG = {
    "cordon 7": "there is no GPU '7': GPU 0 (",
    "uncordon GPU-0000000": "'GPU-0000000' names several GPUs: GPU 0 (",
    "drain-list x": "there is no GPU 'x': GPU 0 (",
    "release --reset-done 7": "there is no GPU '7': GPU 0 (",
    "release --for 2h": "--for 7200.0: allowed is a number of seconds above 0, up to 3600 (1h)",
    "simulate hang --gpu 7": "there is no GPU '7': GPU 0 (",
    f"cordon 0 --reason {'x' * 201}": "reason='xxx",
    f"cordon 0 --reason {'x' * 5000}": "cordon: the request has 50",
    "simulate xid 0 --gpu 1": "xid=0: allowed is a number from 1 to 65535",
}


def test_what_cannot_be_done_ends_with_1_and_says_why(machine):
    with machine.agent("0 1"):
        for command, words in WRONG.items():
            said = machine.run(*command.split(), code=1)
            assert said.startswith(f"vgpu-agent: {words}")
            assert said.count("\n") == 1
        lists = len(machine.kubelet.lists)
    assert len(machine.kubelet.lists) == lists


def test_without_an_agent_that_is_said(machine):
    where = f"{machine.kubelet_dir}/state/control.sock"
    for command in ("cordon 0", "uncordon 0", "drain-list 0", "simulate heal"):
        said = machine.run(*command.split(), code=1)
        assert said.startswith(f"vgpu-agent: no agent answers at {where}")
