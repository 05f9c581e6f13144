"""The cgroups of containers in made-up trees, for what no machine has all of."""

import subprocess
from pathlib import Path

import pytest

from tests.limits.trees import CAPACITY, OTHER_SCOPE, SCOPE, Tree, above
from tests.usage.test_cgroups import (
    BURSTABLE,
    CONTAINERS,
    GUARANTEED,
    ID,
    OTHER,
    OTHERS,
    STATIC,
    UID,
)
from vgpu_agent.limits import cgroups
from vgpu_agent.limits.cgroups import Hierarchy, Leaf

WHOLE = {name: path for name, path in CONTAINERS.items() if ".." not in path and "(" not in path}
"""Without paths that are relative to our own, and of what is removed: no directory is called so."""


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "cgroup")


@pytest.fixture
def hierarchy(tree: Tree) -> Hierarchy:
    return Hierarchy(tree.root)


def paths(hierarchy: Hierarchy) -> dict[str, str]:
    """Where the containers are, below the root."""
    root = str(hierarchy.root)
    return {each: leaf.path.removeprefix(root) for each, leaf in hierarchy.leaves().items()}


# Where they are


def hook(hierarchy: Hierarchy) -> str | None:
    return hierarchy.hook(hierarchy.leaves().values())


@pytest.mark.parametrize("path", WHOLE.values(), ids=WHOLE.keys())
def test_a_container_is_found_wherever_kubelets_and_runtimes_put_it(tree, hierarchy, path):
    tree.add(path)
    container = path[: path.index(ID) + len(ID)]
    container += ".scope" if path.startswith(f"{container}.scope") else ""
    expected = f"{container}/container" if path == f"{container}/container" else container
    uid = STATIC if f"pod{STATIC}.slice" in path or f"pod{STATIC}/{ID}" in path else UID
    for _ in range(2):  # the second look goes by what the first one saw
        assert hierarchy.leaves() == {ID: Leaf(uid, f"{tree.root}{expected}")}


@pytest.mark.parametrize(
    "path", [path for path in OTHERS.values() if path and ".." not in path and path != "/"]
)
def test_what_is_no_container_of_a_pod_is_none(tree, hierarchy, path):
    tree.add(path)
    assert hierarchy.leaves() == {}


@pytest.mark.parametrize(
    ("own", "others", "found"),
    [
        ("", (), "/container"),
        ("71\n", (), ""),  # the container's own program made it
        ("", ("init.scope",), ""),  # systemd in the container, and a cgroup of that name
        ("", ("init.scope", "system.slice", "user.slice"), ""),
    ],
    ids=["crun", "own processes", "one beside it", "many beside it"],
)
def test_crun_alone_puts_the_processes_into_a_cgroup_of_its_own(
    tree, hierarchy, own, others, found
):
    for name in ("container", *others):
        tree.add(f"{SCOPE}/{name}")
    (tree.root / SCOPE[1:] / "cgroup.procs").write_text(own)
    for _ in range(2):
        assert paths(hierarchy) == {ID: SCOPE + found}


def test_crun_is_seen_to_move_the_processes(tree, hierarchy):
    scope = tree.add(SCOPE)
    assert paths(hierarchy) == {ID: SCOPE}
    tree.add(f"{SCOPE}/container")
    assert paths(hierarchy) == {ID: SCOPE}
    (scope / "cgroup.procs").write_text("")
    assert paths(hierarchy) == {ID: f"{SCOPE}/container"}


def test_the_monitor_and_the_sandbox_beside_a_container_change_nothing(tree, hierarchy):
    tree.add(f"{BURSTABLE}/crio-{ID}.scope/container")
    tree.add(f"{BURSTABLE}/crio-conmon-{ID}.scope")
    tree.add(f"{BURSTABLE}/crio-conmon-{OTHER}.scope")
    tree.add(f"{BURSTABLE}/crio-{OTHER}.scope")
    assert paths(hierarchy) == {
        ID: f"{BURSTABLE}/crio-{ID}.scope/container",
        OTHER: f"{BURSTABLE}/crio-{OTHER}.scope",
    }


# From look to look


def test_what_starts_and_what_ends_is_seen_at_the_next_look(tree, hierarchy):
    assert hierarchy.leaves() == {}
    tree.add(SCOPE)
    assert paths(hierarchy) == {ID: SCOPE}
    tree.add(OTHER_SCOPE)
    assert paths(hierarchy) == {ID: SCOPE, OTHER: OTHER_SCOPE}
    tree.remove(SCOPE)
    assert paths(hierarchy) == {OTHER: OTHER_SCOPE}
    # As many as before, and another one.
    tree.add(f"{GUARANTEED}/cri-containerd-{ID}.scope")
    tree.remove(OTHER_SCOPE)
    assert paths(hierarchy) == {ID: f"{GUARANTEED}/cri-containerd-{ID}.scope"}


def test_a_restarted_container_is_another_one(tree, hierarchy):
    tree.add(SCOPE)
    hierarchy.leaves()
    tree.remove(SCOPE)
    tree.add(SCOPE.replace(ID, OTHER))
    assert paths(hierarchy) == {OTHER: SCOPE.replace(ID, OTHER)}


def test_a_tree_that_is_not_there_has_nothing_and_is_seen_when_it_comes(tmp_path):
    hierarchy = Hierarchy(tmp_path / "cgroup")
    assert hierarchy.leaves() == {}
    tree = Tree(tmp_path / "cgroup")
    tree.add(SCOPE)
    assert paths(hierarchy) == {ID: SCOPE}
    tree.root.rename(tmp_path / "old")
    assert hierarchy.leaves() == {}
    Tree(tmp_path / "cgroup").add(OTHER_SCOPE)
    assert paths(hierarchy) == {OTHER: OTHER_SCOPE}


@pytest.mark.parametrize("gone", [BURSTABLE, SCOPE], ids=["the pod", "the container"])
def test_what_vanishes_while_it_is_looked_at_is_not_there(tree, hierarchy, monkeypatch, gone):
    tree.add(SCOPE)
    tree.add(OTHER_SCOPE)
    listed = cgroups._subdirectories

    def late(path: str):
        names = list(listed(path))
        if path == str((tree.root / gone[1:]).parent):
            (tree.root / gone[1:]).rename(tree.root / "gone")
        return iter(names)

    monkeypatch.setattr(cgroups, "_subdirectories", late)
    assert paths(hierarchy) == {OTHER: OTHER_SCOPE}


# Names and numbers of others' making


def test_links_are_not_followed(tree, hierarchy, tmp_path):
    Tree(tmp_path / "elsewhere").add(SCOPE)
    (tree.root / "kubepods.slice").symlink_to(tmp_path / "elsewhere" / "kubepods.slice")
    (tree.root / "loop").symlink_to(tree.root)
    tree.add(OTHER_SCOPE.replace("kubepods.slice", "kubelet-kubepods.slice", 1))
    assert hierarchy.leaves().keys() == {OTHER}


@pytest.mark.parametrize(
    "name",
    [
        "a b",
        "new\nline",
        "::",
        ":::",
        "\udcff",
        "$(id)",
        "-x",
        "x" * 255,
        f"pod{UID}",  # not a container below it
        f"kubepods-pod{UID}.slice:cri-containerd:{ID[:63]}",
    ],
)
def test_names_of_any_kind_are_no_containers_and_hide_none(tree, hierarchy, name):
    tree.add(SCOPE)
    tree.add(f"/{name}/{name}")
    tree.add(f"{BURSTABLE}/{name}/{OTHER}")
    tree.add(f"{BURSTABLE}/{name}/pod{UID}/{OTHER}")
    tree.add(f"{SCOPE}/{name}")
    assert paths(hierarchy) == {ID: SCOPE}


def test_a_user_cannot_pass_off_another_cgroup_as_that_of_a_container(tree, hierarchy):
    given = "/user.slice/user-1000.slice/user@1000.service"
    fakes = [
        f"/a.slice/kubepods/pod{UID}/{ID}",
        f"{given}/kubepods/pod{UID}/{ID}",
        f"{given}/kubepods-pod{UID}.slice:crio:{ID}",
    ]
    for fake in fakes:
        tree.add(fake)
    tree.add(SCOPE)
    tree.add(f"/kubelet/kubepods/pod{UID}/{OTHER}")
    tree.add(f"{given}/kubepods/pod{UID}/{OTHER}")
    assert paths(hierarchy) == {ID: SCOPE, OTHER: f"/kubelet/kubepods/pod{UID}/{OTHER}"}


def test_no_number_of_cgroups_hides_a_container(tree, hierarchy, monkeypatch):
    monkeypatch.setattr(cgroups, "MAX_CGROUPS", 40)
    for number in range(100):
        tree.add(f"/a.slice/user-1000.slice/{number}")
        tree.add(f"{SCOPE}/{number}")
    other = f"/kubepods/burstable/pod{STATIC}/{OTHER}"
    tree.add(other)
    for _ in range(3):
        assert paths(hierarchy) == {ID: SCOPE, OTHER: other}
        assert len(list(hierarchy._search())) <= 41


def test_the_search_does_not_go_deeper_than_pods_are(tree, hierarchy):
    deep = "/x" * (cgroups.MAX_DEPTH - 1)
    tree.add(f"{deep}/kubepods-pod{UID}.slice:crio:{ID}")
    tree.add(f"{deep}/x/kubepods-pod{UID}.slice:crio:{OTHER}")
    assert hierarchy.leaves().keys() == {ID}


# What the node can


def test_on_cgroup_v2_limits_can_be_set(tree, hierarchy):
    tree.add(SCOPE)
    assert hierarchy.problem() is None
    assert hook(hierarchy) is None  # the misc backend needs no files


def v1(root: Path) -> None:
    for name in ("memory", "cpu,cpuacct", "systemd"):
        (root / name).mkdir(parents=True)
        (root / name / "cgroup.procs").write_text("1\n")


def hybrid(root: Path) -> None:
    v1(root)
    Tree(root / "unified").add(SCOPE)


def a_containers(root: Path) -> None:
    Tree(root, hosts=False).add("/init.scope")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda _: None, "no cgroup tree is mounted at ROOT: mount the node's /sys/fs/cgroup"),
        (lambda root: root.mkdir(), "no cgroup tree is mounted at ROOT"),
        (lambda root: root.write_text(""), "no cgroup tree is mounted at ROOT"),
        (v1, "this node has cgroup v1; the driver limits memory by cgroup v2 at /sys/fs/cgroup: "),
        (hybrid, "cgroup v1, and v2 only beside it at ROOT/unified; the driver limits memory by"),
        (a_containers, "the cgroup tree at ROOT is a container's own and has no pods: mount the"),
    ],
    ids=["nothing", "empty", "a file", "v1", "hybrid", "a container's"],
)
def test_what_keeps_a_node_from_limits_is_said(tmp_path, make, words):
    root = tmp_path / "root"
    make(root)
    hierarchy = Hierarchy(root)
    assert words.replace("ROOT", str(root)) in hierarchy.problem()
    assert hook(hierarchy) == hierarchy.problem()


def test_a_node_that_is_a_container_itself_can_have_limits(tmp_path):
    """Kind: the node's tree is not the machine's, and has the pods."""
    tree = Tree(tmp_path / "cgroup", hosts=False)
    tree.add(SCOPE)
    hierarchy = Hierarchy(tree.root)
    assert hierarchy.problem() is None
    assert hierarchy.lacks(hierarchy.leaves()[ID]) is None
    assert hook(hierarchy) == (
        f"{tree.root}{SCOPE} has no dmem files, and new containers may have none; whether the "
        "driver needs them shows in the node's root cgroup only"
    )
    tree.enable(*above(SCOPE))
    assert hook(hierarchy) is None  # with either backend


# The dmem controller


@pytest.fixture
def dmem(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "dmem", capacity=CAPACITY)


@pytest.mark.parametrize("capacity", [None, "", "drm/0000:00:02.0/vram0 8589934592\n", "\xff"])
def test_without_the_drivers_gpus_in_it_the_controller_is_not_needed(tmp_path, capacity):
    tree = Tree(tmp_path / "cgroup", capacity=capacity)
    tree.add(SCOPE)
    hierarchy = Hierarchy(tree.root)
    assert hierarchy.lacks(hierarchy.leaves()[ID]) is None
    assert hook(hierarchy) is None


def test_where_the_driver_needs_the_files_the_cgroups_that_lack_them_are_said(dmem):
    dmem.add(f"{SCOPE}/container")
    hierarchy = Hierarchy(dmem.root)
    leaf = hierarchy.leaves()[ID]
    levels = above(f"{SCOPE}/container")
    for number, level in enumerate(levels):
        first = f"{dmem.root}{level}".rstrip("/")
        words = hierarchy.lacks(leaf)
        assert words.startswith(
            f"{leaf.path} has no dmem files, since {first} does not enable that controller for its "
            "children: set memoryLimitsEnableController in the chart, or run as root on the node: "
            f"echo +dmem > {first}/cgroup.subtree_control"
        )
        assert words.count("echo +dmem > ") == len(levels) - number
        assert hook(hierarchy) == f"{leaf.path} has no dmem files, and new containers may have none"
        dmem.enable(level)
    assert hierarchy.lacks(leaf) is None
    assert hook(hierarchy) is None


@pytest.mark.slow
def test_the_command_can_be_run_whatever_the_name(tmp_path):
    tree = Tree(tmp_path / "a 'b'; $(c)", capacity=CAPACITY)
    tree.add(SCOPE)
    hierarchy = Hierarchy(tree.root)
    words = hierarchy.lacks(hierarchy.leaves()[ID])
    subprocess.run(["sh", "-ec", words.partition("node: ")[2]], check=True)
    assert [
        (tree.root / each[1:] / "cgroup.subtree_control").read_text() for each in above(SCOPE)
    ] == ["+dmem\n"] * 4


def test_one_container_without_the_files_is_enough_to_doubt_the_hook(dmem):
    dmem.enable("/")
    hierarchy = Hierarchy(dmem.root)
    assert hook(hierarchy) == f"no container of a pod is in {dmem.root}"
    dmem.add(SCOPE)
    dmem.enable(*above(SCOPE))
    assert hook(hierarchy) is None
    dmem.add(OTHER_SCOPE)
    assert hook(hierarchy).startswith(f"{dmem.root}{OTHER_SCOPE} has no dmem files")
    assert hierarchy.lacks(hierarchy.leaves()[ID]) is None


def test_a_container_that_ends_meanwhile_is_no_reason_to_doubt_the_hook(dmem, monkeypatch):
    dmem.add(SCOPE)
    dmem.enable("/", *above(SCOPE))
    dmem.add(OTHER_SCOPE)
    hierarchy = Hierarchy(dmem.root)
    found = hierarchy.leaves()
    monkeypatch.setattr(hierarchy, "leaves", lambda: found)
    assert "has no dmem files" in hook(hierarchy)
    dmem.remove(OTHER_SCOPE)
    assert hook(hierarchy) is None


def test_the_controller_is_enabled_where_it_is_missing_and_nowhere_else(dmem):
    dmem.add(SCOPE)
    dmem.add(OTHER_SCOPE)
    dmem.enable("/")
    hierarchy = Hierarchy(dmem.root)
    hierarchy.enable(hierarchy.leaves()[ID])
    written = {
        str(file.parent.relative_to(dmem.root))
        for file in dmem.root.rglob("cgroup.subtree_control")
        if file.read_text().startswith("+dmem")  # as a kernel would not show it
    }
    assert written == {each[1:] for each in above(SCOPE)[1:]}
    # The files of the controller are the driver's and the kernel's.
    assert {file.name for file in dmem.root.rglob("dmem.*")} == {"dmem.capacity", "dmem.max"}
    assert not (dmem.root / SCOPE[1:] / "dmem.max").exists()
    assert all(file.read_text() == "" for file in dmem.root.rglob("dmem.max"))


def test_a_controller_that_cannot_be_enabled_is_an_error_that_names_the_file(dmem):
    dmem.add(SCOPE)
    hierarchy = Hierarchy(dmem.root)
    leaf = hierarchy.leaves()[ID]
    control = dmem.root / "kubepods.slice" / "cgroup.subtree_control"
    control.unlink()
    with pytest.raises(OSError, match=r"cgroup\.subtree_control") as raised:
        hierarchy.enable(leaf)
    assert raised.value.filename == str(control)
    assert not control.exists()
    control.symlink_to(dmem.root / "dmem.capacity")
    with pytest.raises(OSError, match="symbolic links"):
        hierarchy.enable(leaf)
    assert (dmem.root / "dmem.capacity").read_text() == CAPACITY


# The end


def test_a_container_has_ended_when_it_has_no_process_or_is_gone(dmem):
    dmem.add(SCOPE)
    hierarchy = Hierarchy(dmem.root)
    leaf = hierarchy.leaves()[ID]
    assert not hierarchy.ended(leaf)
    dmem.add(SCOPE, populated=False)
    assert hierarchy.ended(leaf)
    (dmem.root / SCOPE[1:] / "cgroup.events").unlink()
    assert not hierarchy.ended(leaf)  # nothing says so
    dmem.remove(SCOPE)
    assert hierarchy.ended(leaf)
    assert hierarchy.lacks(leaf) is None
