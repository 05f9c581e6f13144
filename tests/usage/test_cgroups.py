"""Paths as runtimes and kubelets make them, with where each form comes from, and hostile ones."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.model.strategies import tried
from vgpu_agent.usage.containers import container_id

ID = "7dea796eb5d6826a85978fa316612874aa3d576ac576495bed83d77fbc9dc744"
OTHER = "09ab" * 16
UID = "55c6c714-b240-4dec-9a45-57b61696ab6e"
UNIT = UID.replace("-", "_")
STATIC = "8daa50c3a64c9ff60bb9eab7b44b56fd"

BURSTABLE = f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UNIT}.slice"
BEST_EFFORT = f"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{UNIT}.slice"
GUARANTEED = f"/kubepods.slice/kubepods-pod{UNIT}.slice"
IN_KIND = (
    "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice"
    f"/kubelet-kubepods-besteffort-pod{UNIT}.slice"
)

CONTAINERS = {
    # Kubernetes, pkg/kubelet/cm: cgroup_manager_linux.go and the names of QoS classes. No class
    # has a cgroup for guaranteed pods. The runtimes add their prefix and the ID (runc, systemd).
    "systemd, containerd, burstable": f"{BURSTABLE}/cri-containerd-{ID}.scope",
    "systemd, containerd, best effort": f"{BEST_EFFORT}/cri-containerd-{ID}.scope",
    "systemd, containerd, guaranteed": f"{GUARANTEED}/cri-containerd-{ID}.scope",
    "cgroupfs, burstable": f"/kubepods/burstable/pod{UID}/{ID}",
    "cgroupfs, best effort": f"/kubepods/besteffort/pod{UID}/{ID}",
    "cgroupfs, guaranteed": f"/kubepods/pod{UID}/{ID}",
    # Static pods: the UID is a hash of the manifest (kubelet, config/common.go).
    "systemd, static pod": (
        f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{STATIC}.slice"
        f"/cri-containerd-{ID}.scope"
    ),
    "cgroupfs, static pod": f"/kubepods/burstable/pod{STATIC}/{ID}",
    # CRI-O: internal/config/cgmgr, and cri-o/cri-o pull request 812 for cgroupfs.
    "systemd, CRI-O": f"{BURSTABLE}/crio-{ID}.scope",
    "cgroupfs, CRI-O": f"/kubepods/burstable/pod{UID}/crio-{ID}",
    # crun puts the process a level further down under cgroup v2.
    "CRI-O, crun": f"{BURSTABLE}/crio-{ID}.scope/container",
    # docker by cri-dockerd: cri-o/cri-o issue 842 has both for comparison.
    "systemd, docker": f"{BEST_EFFORT}/docker-{ID}.scope",
    # A kubelet with cgroupRoot: kind has /kubelet (kubernetes-sigs/kind issue 3947).
    "kind, systemd": f"{IN_KIND}/cri-containerd-{ID}.scope",
    "kind, cgroupfs": f"/kubelet/kubepods/burstable/pod{UID}/{ID}",
    "a root twice": f"/kubepods/kubepods/besteffort/pod{UID}/{ID}",  # elastic/apm pull request 284
    # The node is a container itself: kind and minikube, seen from the machine.
    "kind from outside": f"/system.slice/docker-{OTHER}.scope{IN_KIND}/cri-containerd-{ID}.scope",
    "minikube from outside": f"/docker/{OTHER}{BURSTABLE}/crio-{ID}.scope",
    # The kubelet's driver is systemd, the runtime's is cgroupfs: kubernetes issue 106514.
    "drivers differ": (
        f"/system.slice/containerd.service/kubepods-burstable-pod{UNIT}.slice:cri-containerd:{ID}"
    ),
    "drivers differ, k3s": f"/k3s/kubepods-besteffort-pod{UNIT}.slice:cri-containerd:{ID}",
    # A cgroup namespace of our own: inspektor-gadget pull request 3085, cgroup_namespaces(7).
    "namespace, another class": f"/../../../{BURSTABLE[16:]}/cri-containerd-{ID}.scope",
    "namespace, same class": f"/../../kubepods-burstable-pod{UNIT}.slice/cri-containerd-{ID}.scope",
    "namespace, to guaranteed": f"/../../../kubepods-pod{UNIT}.slice/crio-{ID}.scope",
    "namespace, cgroupfs, another class": f"/../../../burstable/pod{UID}/{ID}",
    "namespace, cgroupfs, same class": f"/../../pod{UID}/{ID}",
    "namespace, same pod": f"/../cri-containerd-{ID}.scope",
    "namespace, same pod, cgroupfs": f"/../{ID}",
    "namespace of a lower level, same pod": f"/../../crio-{ID}.scope/container",
    # Containers that make cgroups of their own: systemd, docker in docker, nested Kubernetes.
    "systemd inside": f"{BURSTABLE}/cri-containerd-{ID}.scope/init.scope",
    "a service inside": f"{BURSTABLE}/cri-containerd-{ID}.scope/system.slice/app.service",
    "docker inside": f"/kubepods/burstable/pod{UID}/{ID}/docker/{OTHER}",
    "Kubernetes inside": f"/kubepods/pod{UID}/{ID}/kubelet/kubepods/pod{STATIC}/{OTHER}",
    "the name of another one inside": f"{GUARANTEED}/cri-containerd-{ID}.scope{GUARANTEED}/{OTHER}",
    # systemd.unit(5): names of units escape what is not a letter, a digit, `:`, `_` or `.`.
    "escaped UID": (
        "/kubepods.slice/kubepods-pod" + UID.replace("-", "\\x2d") + f".slice/crio-{ID}.scope"
    ),
    "escaped prefix": f"{BURSTABLE}/cri\\x2dcontainerd\\x2d{ID}.scope",
    # cgroups(7): what is removed under a process keeps its name.
    "removed": f"{BURSTABLE}/cri-containerd-{ID}.scope (deleted)",
}

OTHERS = {
    "the root": "/",
    "nothing": "",
    "PID 1": "/init.scope",
    "a session": "/user.slice/user-1000.slice/session-67.scope",
    "the runtime": "/system.slice/containerd.service",
    "docker, systemd": f"/system.slice/docker-{ID}.scope",
    "docker, cgroupfs": f"/docker/{ID}",
    "docker, from a namespace": f"/../../../../system.slice/docker-{ID}.scope",
    "podman": f"/machine.slice/libpod-{ID}.scope",
    "nerdctl": f"/default/{ID}",
    "the pod itself": BURSTABLE,
    "the monitor of CRI-O": f"{BURSTABLE}/crio-conmon-{ID}.scope",  # opencontainers/runc issue 4620
    "a pod's name below the monitor": f"{BURSTABLE}/crio-conmon-{ID}.scope{GUARANTEED}/{OTHER}",
    "the monitor elsewhere": f"/system.slice/crio-conmon-{ID}.scope",
    "ourselves, from a namespace": "/",
    "another namespace's parent": "/../..",
    "a short ID": f"/kubepods/pod{UID}/{ID[:63]}",
    "a long ID": f"/kubepods/pod{UID}/{ID}0",
    "capitals": f"/kubepods/pod{UID}/{ID.upper()}",
    "another prefix": f"{BURSTABLE}/rkt-{ID}.scope",
    "no UID": f"/kubepods/podman/{ID}",
    "a UID with an end": f"/kubepods/pod{UID}0/{ID}",
    "a name in between": f"/kubepods/pod{UID}/extra/{ID}",
}


@pytest.mark.parametrize("path", CONTAINERS.values(), ids=CONTAINERS.keys())
def test_the_container_of_a_pod_is_found_under_both_versions_of_cgroups(path):
    assert container_id(f"0::{path}\n") == ID
    assert container_id(f"12:cpu,cpuacct:{path}\n1:name=systemd:{path}\n") == ID


@pytest.mark.parametrize("path", OTHERS.values(), ids=OTHERS.keys())
def test_what_is_no_container_of_a_pod_is_none(path):
    assert container_id(f"0::{path}\n") is None
    assert container_id(f"12:cpu,cpuacct:{path}\n1:name=systemd:{path}\n") is None


def test_one_hierarchy_that_names_the_container_is_enough():
    # opencontainers/runc issue 4620: not every hierarchy knows containers.
    lines = ["13:freezer:/", "11:files:/", f"10:pids:{BURSTABLE}/crio-{ID}.scope", "0::/"]
    assert container_id("\n".join(lines)) == ID
    assert container_id("\n".join(reversed(lines))) == ID


def test_a_container_cannot_name_another_one_by_the_cgroups_that_it_makes():
    own = f"/kubepods/pod{UID}/{ID}"
    for fake in ("\r", "\x0b", "\x85", "\u2028", ":", "/"):
        assert container_id(f"0::{own}/x{fake}0::/kubepods/pod{STATIC}/{OTHER}\n") == ID


@given(st.text() | st.text("0123456789abcdef/:.-_\\\n podslicecrio"))
@example("0::")
@example(":::")
@example("0::" + "/.." * 5000)
@example("0::/" + "pod" * 5000)
@example("0::/" + "-pod" * 5000 + f"/{ID}")
@example(f"0::/kubepods/pod{UID}" * 500)
@tried(300)
def test_text_that_makes_no_sense_is_no_container(text):
    assert container_id(text) is None


@given(
    st.sampled_from(sorted(CONTAINERS.values())), st.text(st.characters(exclude_characters="\n"))
)
@tried(300)
def test_what_is_below_a_container_changes_nothing(path, below):
    assert container_id(f"0::{path.removesuffix(' (deleted)')}/{below}") == ID
