"""The cgroups of real containers, and what the kernel says and refuses.

runc makes the cgroups at the paths that kubelets give to it. No kernel of a test machine has to
have the dmem controller: files of that one are in `test_cgroups.py` only.
"""

import os
import secrets
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

import vgpu_agent
from tests.limits.containers import CGROUPS, Machine, Runtime
from vgpu_agent.limits.cgroups import Hierarchy, Leaf

pytestmark = pytest.mark.slow

REPOSITORY = Path(vgpu_agent.__file__).parents[1]
UID = "55c6c714-b240-4dec-9a45-57b61696ab6e"
UNIT = UID.replace("-", "_")
SLICE = f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UNIT}.slice"
LAYOUTS = {
    "systemd, containerd": SLICE + "/cri-containerd-{id}.scope",
    "systemd, CRI-O": SLICE + "/crio-{id}.scope",
    "systemd, guaranteed": f"/kubepods.slice/kubepods-pod{UNIT}.slice/cri-containerd-{{id}}.scope",
    "systemd, kind": "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice"
    f"/kubelet-kubepods-besteffort-pod{UNIT}.slice" + "/cri-containerd-{id}.scope",
    "cgroupfs, burstable": f"/kubepods/burstable/pod{UID}" + "/{id}",
    "cgroupfs, guaranteed": f"/kubepods/pod{UID}" + "/{id}",
    "cgroupfs, kind": f"/kubelet/kubepods/besteffort/pod{UID}" + "/{id}",
}


@pytest.fixture
def hierarchy(v2_machine: Machine) -> Hierarchy:
    return Hierarchy(v2_machine.cgroups)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_real_container_is_found_until_it_ends(v2_runtime: Runtime, hierarchy, layout):
    container = v2_runtime.start(layout, {})
    leaf = hierarchy.leaves()[container.id]
    assert leaf.pod_uid == UID
    assert leaf.path == f"{hierarchy.root}{container.cgroup}"
    assert str(container.pid) in Path(leaf.path, "cgroup.procs").read_text().split()
    assert not hierarchy.ended(leaf)
    second = v2_runtime.start(layout, {})
    assert hierarchy.leaves().keys() >= {container.id, second.id}
    v2_runtime.end(container.id)
    assert hierarchy.ended(leaf)
    assert container.id not in hierarchy.leaves()
    assert second.id in hierarchy.leaves()


def test_where_the_kubelets_driver_is_systemd_and_the_runtimes_is_not(
    v2_runtime: Runtime, hierarchy
):
    container = v2_runtime.start(f"kubepods-burstable-pod{UNIT}.slice:cri-containerd:{{id}}", {})
    assert ":cri-containerd:" in container.cgroup
    leaf = hierarchy.leaves()[container.id]
    assert (leaf.pod_uid, leaf.path) == (UID, f"{hierarchy.root}{container.cgroup}")


def test_cgroups_that_a_container_makes_are_not_looked_into(v2_runtime: Runtime, hierarchy):
    container = v2_runtime.start(LAYOUTS["systemd, containerd"], {})
    other = secrets.token_hex(32)
    inner = Path(f"{hierarchy.root}{container.cgroup}/kubepods/pod{UID}/{other}")
    inner.mkdir(parents=True)
    try:
        assert hierarchy.leaves()[container.id].path == f"{hierarchy.root}{container.cgroup}"
        assert other not in hierarchy.leaves()
    finally:
        for made in (inner, *list(inner.parents)[:2]):
            made.rmdir()


def test_crun_puts_the_processes_a_level_further_down(v2_runtime: Runtime, hierarchy):
    container = v2_runtime.start(LAYOUTS["systemd, CRI-O"], {})
    inner = Path(f"{hierarchy.root}{container.cgroup}/container")
    inner.mkdir()
    (inner / "cgroup.procs").write_text(str(container.pid))  # as crun does
    leaf = hierarchy.leaves()[container.id]
    assert leaf.path == str(inner)
    assert not hierarchy.ended(leaf)
    v2_runtime.end(container.id)
    assert hierarchy.ended(leaf)


def test_a_container_whose_program_ended_has_ended_before_its_cgroup_goes(
    v2_runtime: Runtime, hierarchy
):
    container = v2_runtime.start(LAYOUTS["cgroupfs, burstable"], {})
    leaf = hierarchy.leaves()[container.id]
    os.kill(container.pid, signal.SIGKILL)
    until = time.monotonic() + 10
    while not hierarchy.ended(leaf):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert Path(leaf.path).is_dir()


def test_the_machines_real_tree_is_the_nodes(v2_runtime: Runtime, hierarchy):
    assert hierarchy.problem() is None
    container = v2_runtime.start(LAYOUTS["cgroupfs, burstable"], {})
    # The tree of a pod, as a container with its own cgroup namespace sees it.
    pod = Hierarchy(Path(hierarchy.leaves()[container.id].path).parent)
    assert "is a container's own" in (pod.problem() or "")
    # That of a node that is a container: kind.
    node = Hierarchy(hierarchy.root / v2_runtime.machine.top)
    assert node.problem() is None
    assert "shows in the node's root cgroup only" in (node.hook(node.leaves().values()) or "")


def test_a_real_cgroup_v1_is_said_to_be_the_reason(v1_machine: Machine):
    assert "this node has cgroup v1; " in (Hierarchy(v1_machine.cgroups).problem() or "")


@pytest.mark.skipif(
    not (CGROUPS / "unified" / "cgroup.controllers").exists(),
    reason="this machine does not have cgroup v1 with v2 beside it",
)
def test_a_real_hybrid_is_said_to_be_the_reason():
    assert "v2 only beside it at /sys/fs/cgroup/unified" in (Hierarchy().problem() or "")


def test_what_the_kernel_refuses_names_the_file(v2_runtime: Runtime, hierarchy):
    container = v2_runtime.start(LAYOUTS["cgroupfs, burstable"], {})
    below = Hierarchy(hierarchy.root / v2_runtime.machine.top)  # not the machine's own root
    # A kernel without the controller refuses at once, and every kernel where there are processes.
    leaf = Leaf(UID, f"{below.leaves()[container.id].path}/inner")
    with pytest.raises(OSError, match=r"cgroup\.subtree_control") as raised:
        below.enable(leaf)
    assert raised.value.filename.startswith(f"{below.root}/")


# Numbers


@pytest.fixture
def full(v2_machine: Machine) -> Path:
    """A full node: 110 pods, 250 containers, 300 units of systemd, all real cgroups."""
    top = v2_machine.cgroups / v2_machine.top
    for number in range(300):
        (top / "system.slice" / f"unit-{number}.service").mkdir(parents=True)
    slices = top / "kubepods.slice" / "kubepods-burstable.slice"
    for number in range(110):
        unit = str(uuid.uuid4()).replace("-", "_")
        for _ in range(3 if number < 30 else 2):
            pod = slices / f"kubepods-burstable-pod{unit}.slice"
            (pod / f"cri-containerd-{secrets.token_hex(32)}.scope").mkdir(parents=True)
    return top


MEASURE = """
import sys, time
from pathlib import Path
from vgpu_agent.limits.cgroups import Hierarchy

def took(look):
    start = time.thread_time()  # of the CPU, however busy the machine
    look()
    return (time.thread_time() - start) * 1000

root = Path(sys.argv[1])
print(len(Hierarchy(root).leaves()))
print(min(took(Hierarchy(root).leaves) for _ in range(5)))
"""


@pytest.mark.alone
@pytest.mark.usefixtures("full")
def test_a_full_node_is_looked_at_quickly(v2_machine: Machine):
    python = ("env", f"PYTHONPATH={REPOSITORY}", sys.executable, "-c", MEASURE)
    asked = v2_machine.command(*python, CGROUPS / v2_machine.top)
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    found, milliseconds = map(float, done.stdout.split())
    assert found == 250
    assert milliseconds < 100


def test_on_a_full_node_nothing_that_changes_is_missed(full: Path):
    hierarchy = Hierarchy(full)
    known = set(hierarchy.leaves())
    slices = full / "kubepods.slice" / "kubepods-burstable.slice"
    pods = [pod for pod in slices.iterdir() if pod.is_dir()]
    for number, pod in enumerate(pods):
        scopes = [scope for scope in pod.iterdir() if scope.is_dir()]
        if number % 3:
            scopes[0].rmdir()
            known.remove(scopes[0].name[15:79])
        if number % 2:
            new = secrets.token_hex(32)
            (pod / f"cri-containerd-{new}.scope").mkdir()
            known.add(new)
        if number % 10 == 0:
            assert set(hierarchy.leaves()) == known
    for scope in [scope for scope in pods[0].iterdir() if scope.is_dir()]:
        scope.rmdir()
        known.remove(scope.name[15:79])
    pods[0].rmdir()
    assert set(hierarchy.leaves()) == known
