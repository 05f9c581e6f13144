"""Time-slicing with limits by the driver, rendered from the chart and run with real containers.

Agent and enforcer run where cgroup v2 is at /sys/fs/cgroup, with the arguments and the environment
that their containers have.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.agent_process import REPOSITORY
from tests.chart import helm
from tests.chart.helm import CI, Object, containers, environment, of_kind
from tests.fake_nvml import FakeGpu, FakeNvml, Limit
from tests.kubelet.podresources_peer import checkpoint, entry
from tests.kubelet_peer import KubeletPeer
from tests.limits.containers import Machine, Runtime
from tests.mps.fixtures import eventually
from vgpu_agent.usage.containers import LINKS

pytestmark = pytest.mark.slow

MIB = 1 << 20
UUID = "GPU-a0000000-1111-2222-3333-000000000000"
GPU = FakeGpu(UUID, name="NVIDIA H100", memory=80 * 1024, reserved=0)
SHARE = 2 * 80 * 1024 // 10
"""MiB of two of its ten vGPUs."""


@contextmanager
def running(
    machine: Machine, agent: Object, logs: Path, *names: str, **others: str
) -> Iterator[None]:
    """Containers of that pod, as processes of the machine; ended in order with their block."""
    with ExitStack() as stack:
        for name in names:
            container, log = containers(agent)[name], logs / name
            file = stack.enter_context(log.open("wb"))
            stack.callback(lambda log=log: sys.stderr.write(log.read_text()))
            variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY)}
            process = subprocess.Popen(
                machine.command(sys.executable, "-m", "vgpu_agent", *container["args"]),
                env={**variables, **environment(container), **others},
                stdout=file,
                stderr=file,
            )
            stack.callback(process.kill)
            stack.callback(process.wait, 10)
            stack.callback(process.terminate)
        yield


def test_time_slicing_with_limits_by_the_driver(
    kubelet_dir: Path, tmp_path: Path, v2_runtime: Runtime, fake_nvml: FakeNvml
) -> None:
    machine = v2_runtime.machine
    fake_nvml.set_gpus(GPU)
    fake_nvml.set_driver("615.71")
    with socket.socket() as chosen:
        chosen.bind(("", 0))
        port = int(chosen.getsockname()[1])
    here = {
        "kubeletDir": str(kubelet_dir),
        "stateDirectory": str(kubelet_dir / "state"),
        "cordonDirectory": str(kubelet_dir / "cordoned"),
        "metrics": {"port": port},
    }
    (agent,) = of_kind(helm.render(here, CI["time-slicing-driver-limits"]), "DaemonSet").values()
    # In the machine's own mounts: the directory of those who run this stays as it is.
    made = f"mount --types tmpfs tmpfs {LINKS.parent} && mkdir {LINKS}"
    subprocess.run(machine.command("sh", "-c", made), check=True)
    links = Path(f"/proc/{machine.pid}/root{LINKS}")
    own = fake_nvml.environment()
    with (
        KubeletPeer(kubelet_dir) as kubelet,
        running(machine, agent, tmp_path, "agent", "limits", **own),
    ):
        kubelet.wait_list(
            lambda devices: [each.health for each in devices] == ["Healthy"] * 10, timeout=20
        )
        status = urllib.request.urlopen(f"http://127.0.0.1:{port}/status.json", timeout=5)
        with status:
            assert json.load(status)["memory_limits"]["mode"] == "driver"
        entries = []
        # The second one sets a limit of its own, which the toolkit's hook takes for it.
        for n, wants in enumerate(({}, {"NVIDIA_GPU_MEMORY_LIMIT": "70000"})):
            vgpus = [f"{UUID}::{2 * n}", f"{UUID}::{2 * n + 1}"]
            (answer,) = kubelet.allocate(vgpus).container_responses
            assert answer.envs["NVIDIA_GPU_MEMORY_LIMIT"] == str(SHARE)
            assert answer.envs["VGPU_MEMORY_BYTES"] == str(SHARE * MIB)
            uid = f"0000000{n}-1111-4222-8333-444444444444"
            entries.append(entry(uid, *vgpus, resource="k8s.amazonaws.com/vgpu"))
            new = kubelet_dir / "device-plugins/new"
            new.write_text(checkpoint(*entries))
            new.rename(new.with_name("kubelet_internal_checkpoint"))
            given = {**answer.envs, **wants}
            started = v2_runtime.start(f"/kubepods/besteffort/pod{uid}/{{id}}", given, [UUID])
            begun = time.monotonic()
            (links / f"pod-{n}_shop_main-{started.id}.log").symlink_to("nowhere")
            place = UUID, f"/sys/fs/cgroup{started.cgroup}"
            eventually(lambda place=place: fake_nvml.limits()[place] == Limit(0, SHARE * MIB))
            assert time.monotonic() - begun < 1
        assert len(fake_nvml.limits()) == 2, "of no other cgroup"
