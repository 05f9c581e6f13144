"""`Looker`: which containers are found, what is set, and what is said of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import pytest

from tests.model.strategies import a_gpu, a_shared_gpu
from vgpu_agent.gpu.simulated import SimulatedDriver
from vgpu_agent.limits.cgroups import Hierarchy
from vgpu_agent.limits.look import Looker
from vgpu_agent.limits.tree import Finder
from vgpu_agent.model.holders import Holder
from vgpu_agent.model.limits import GRACE, MemoryLimit, Mode, shares
from vgpu_agent.model.rules import GIB

RESOURCE = "k8s.amazonaws.com/vgpu"
A, B = (
    a_shared_gpu(a_gpu(n, uuid=f"GPU-{n}", memory_bytes=10 * GIB * (n + 1)), 10) for n in (0, 1)
)
SHARES = shares([A, B])
NO_LIMIT = MemoryLimit(None, 0, 0)


class Driver(SimulatedDriver):
    """Limits by GPU and path, as the driver keeps them."""

    def __init__(self) -> None:
        super().__init__(())
        self.limits: dict[tuple[str, str], MemoryLimit] = {}
        self.set: list[tuple[str, str, int, int]] = []
        self.word: dict[str, str] = {}
        self.refuses: str | None = None

    async def memory_limits(
        self, uuid: str, cgroups: Sequence[str]
    ) -> Mapping[str, MemoryLimit | str]:
        if uuid in self.word:
            return dict.fromkeys(cgroups, self.word[uuid])
        return {path: self.limits.get((uuid, path), NO_LIMIT) for path in cgroups}

    async def limit_memory(self, uuid: str, cgroup: str, hard: int, soft: int) -> str | None:
        if self.refuses is not None:
            return self.refuses
        self.set.append((uuid, cgroup, hard, soft))
        used = self.limits.get((uuid, cgroup), NO_LIMIT).used_bytes
        self.limits[uuid, cgroup] = MemoryLimit(hard, soft, used)
        return None


def uid(n: int) -> str:
    return f"{n:08x}-0000-4000-8000-000000000000"


def container_id(n: int) -> str:
    return f"{n:064x}"


@dataclass
class Machine:
    """A node's files: cgroups, links, checkpoint; and the driver."""

    root: Path
    driver: Driver = field(default_factory=Driver)
    now: float = 1000.0
    entries: list[dict[str, object]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tree, self.links = self.root / "cgroup", self.root / "links"
        self.checkpoint = self.root / "checkpoint"
        self.links.mkdir()
        self.cgroup(self.tree)
        (self.tree / "cgroup.events").unlink()
        self.write()

    def cgroup(self, path: Path) -> None:
        path.mkdir(parents=True)
        for name, text in {"controllers": "memory", "subtree_control": "", "procs": ""}.items():
            (path / f"cgroup.{name}").write_text(text)
        (path / "cgroup.events").write_text("populated 1\nfrozen 0\n")

    def path(self, n: int, pod: int | None = None) -> Path:
        pod_uid = uid(n if pod is None else pod)
        return self.tree / "kubepods" / f"pod{pod_uid}" / container_id(n)

    def start(self, n: int, *, pod: int | None = None, name: str = "main") -> str:
        """A container runs; its path."""
        path = self.path(n, pod)
        self.cgroup(path)
        pod = n if pod is None else pod
        (self.links / f"pod-{pod}_shop_{name}-{container_id(n)}.log").symlink_to("nowhere")
        return str(path)

    def end(self, n: int, *, removed: bool = True) -> None:
        path = self.path(n)
        (path / "cgroup.events").write_text("populated 0\n")
        if removed:
            for each in path.iterdir():
                each.unlink()
            path.rmdir()

    def give(self, n: int, *vgpus: str, name: str = "main", resource: str = RESOURCE) -> None:
        self.entries.append(
            {
                "PodUID": uid(n),
                "ContainerName": name,
                "ResourceName": resource,
                "DeviceIDs": {"0": list(vgpus)},
                "AllocResp": "",
            }
        )
        self.write()

    def write(self) -> None:
        new = self.checkpoint.with_suffix(".new")
        new.write_text(json.dumps({"Data": {"PodDeviceEntries": self.entries}}))
        new.rename(self.checkpoint)

    def looker(
        self, *, enforce: bool = False, guarantee: bool = False, enable: bool = False
    ) -> Looker:
        finder = Finder(
            self.checkpoint,
            RESOURCE,
            Hierarchy(self.tree),
            self.links,
            enable,
            living=enforce and guarantee,
        )
        return Looker(self.driver, finder, guarantee, enforce, clock=lambda: self.now)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


async def test_each_container_that_holds_vgpus_gets_its_limits_and_no_other_is_touched(machine):
    one = machine.start(1)
    two = machine.start(2)
    machine.start(3)  # holds nothing
    machine.start(4)  # another resource
    machine.start(10, pod=1, name="sidecar")
    machine.give(1, "GPU-0::1", "GPU-0::2")
    machine.give(2, "GPU-0::0", "GPU-1::3")
    machine.give(4, "GPU-0::5", resource="nvidia.com/gpu")
    machine.give(5, "GPU-0::6")  # has not started
    looker = machine.looker(enforce=True)
    look = await looker.look(SHARES)
    assert sorted(machine.driver.set) == [
        ("GPU-0", one, 2 * GIB, 0),
        ("GPU-0", two, GIB, 0),
        ("GPU-1", two, 2 * GIB, 0),
    ]
    assert (look.mode, look.missing, look.gpus) == (Mode.DRIVER, (), {})
    assert {
        each.holder: {u: limit.hard_bytes for u, limit in each.limits.items()}
        for each in look.containers
    } == {
        Holder("shop", "pod-1", "main"): {"GPU-0": 2 * GIB},
        Holder("shop", "pod-2", "main"): {"GPU-0": GIB, "GPU-1": 2 * GIB},
    }
    assert look.containers[0].limits == {"GPU-0": MemoryLimit(2 * GIB, 0, 0)}
    await looker.look(SHARES)
    assert len(machine.driver.set) == 3


@pytest.mark.parametrize(
    "found",
    [
        MemoryLimit(8 * GIB, 0, 0),  # the pod's own variable won
        MemoryLimit(GIB, 0, 0),  # the smallest of several GPUs
        MemoryLimit(2 * GIB, 2 * GIB, 0),  # the guarantee of another setting
        NO_LIMIT,
    ],
)
async def test_a_limit_that_is_another_is_set_right(machine, found):
    path = machine.start(1)
    machine.give(1, "GPU-0::1", "GPU-0::2")
    machine.driver.limits["GPU-0", path] = found
    await machine.looker(enforce=True).look(SHARES)
    assert machine.driver.limits["GPU-0", path] == MemoryLimit(2 * GIB, 0, 0)


async def test_a_container_that_starts_again_gets_its_limits_and_what_ended_is_forgotten(machine):
    machine.start(1)
    machine.give(1, "GPU-0::1")
    looker = machine.looker(enforce=True)
    before = looker.finder.signs()
    await looker.look(SHARES)
    machine.end(1)
    again = machine.start(11, pod=1)
    assert looker.finder.signs() != before
    look = await looker.look(SHARES)
    assert machine.driver.set[-1] == ("GPU-0", again, GIB, 0)
    assert len(look.containers) == 1


@pytest.mark.parametrize("removed", [True, False])
async def test_a_container_that_ends_while_it_is_looked_at_is_no_problem(machine, removed):
    machine.start(1)
    machine.give(1, "GPU-0::1")
    machine.driver.refuses = "Not Found"
    looker = machine.looker(enforce=True)
    await looker.look(SHARES)
    machine.now += GRACE
    machine.end(1, removed=removed)
    assert (await looker.look(SHARES)).containers == ()


async def test_a_limit_that_cannot_be_set_is_a_problem_after_the_grace(machine):
    machine.start(1)
    machine.give(1, "GPU-0::1")
    machine.driver.refuses = "the driver said no"
    looker = machine.looker(enforce=True)
    for seconds, problem in ((0.0, None), (4.9, None), (5.1, "the driver said no")):
        machine.now = 1000 + seconds
        look = await looker.look(SHARES)
        assert [each.problem for each in look.containers] == [problem]
        assert looker.pending
    machine.now = 1011
    assert not looker.pending  # from now on it is tried at every regular look
    machine.driver.refuses = None
    assert (await looker.look(SHARES)).missing == ()


async def test_without_enforcing_nothing_is_set_and_a_limit_of_the_pods_own_is_a_problem(machine):
    paths = [machine.start(n) for n in (1, 2)]
    for n in (1, 2):
        machine.give(n, f"GPU-0::{n}", f"GPU-1::{n}")
    # The hook knows one number for all GPUs of a container: the smallest.
    for uuid in ("GPU-0", "GPU-1"):
        machine.driver.limits[uuid, paths[0]] = MemoryLimit(GIB, 0, 0)
    machine.driver.limits["GPU-0", paths[1]] = MemoryLimit(9 * GIB, 0, 0)
    looker = machine.looker()
    await looker.look(SHARES)
    machine.now += GRACE
    look = await looker.look(SHARES)
    assert machine.driver.set == []
    assert look.mode is Mode.HOOK
    (wrong,) = look.missing
    assert wrong.holder == Holder("shop", "pod-2", "main")
    assert "NVIDIA_GPU_MEMORY_LIMIT" in wrong.problem
    assert "instead of 1024 MiB" in wrong.problem


async def test_a_limit_by_a_gpu_that_left_is_no_problem_on_the_others(machine):
    path = machine.start(1)
    machine.give(1, "GPU-0::1", "GPU-1::1")
    machine.driver.limits["GPU-1", path] = MemoryLimit(GIB, 0, 0)  # GPU 0 has the smallest share
    looker = machine.looker()
    await looker.look(SHARES)
    only = {"GPU-1": SHARES["GPU-1"]}
    for _ in range(2):
        machine.now += GRACE
        look = await looker.look(only)
    assert (look.mode, look.missing) == (Mode.HOOK, ())


async def test_where_no_hook_sets_limits_that_is_the_nodes_affair_and_no_containers(machine):
    machine.start(1)
    machine.give(1, "GPU-0::1")
    looker = machine.looker()
    assert (await looker.look(SHARES)).mode is Mode.HOOK  # nothing is late yet
    machine.now += GRACE
    look = await looker.look(SHARES)
    assert (look.mode, look.missing, look.hook) == (Mode.NONE, (), None)
    assert "1.20.1" in look.why_none


@pytest.mark.parametrize(
    ("words", "error", "gpus"),
    [
        ({"GPU-0": "too old", "GPU-1": "too old"}, "too old", 2),
        ({"GPU-1": "MIG"}, None, 1),
        ({"GPU-0": "MIG", "GPU-1": "hangs"}, None, 2),
    ],
)
async def test_what_the_driver_cannot_do_is_said_once(machine, words, error, gpus):
    machine.start(1)
    machine.driver.word = words
    look = await machine.looker(enforce=True).look(SHARES)
    assert (look.error, len(look.gpus)) == (error, gpus)


async def test_a_gpu_that_does_not_answer_is_left_alone_for_a_while(machine, monkeypatch):
    asked = []

    async def hangs(uuid: str, cgroups: Sequence[str]) -> Mapping[str, MemoryLimit]:
        asked.append(uuid)
        return {} if uuid == "GPU-1" else dict.fromkeys(cgroups, NO_LIMIT)

    monkeypatch.setattr(machine.driver, "memory_limits", hangs)
    looker = machine.looker(enforce=True)
    for seconds, asks in ((0, ["GPU-0", "GPU-1"]), (5, ["GPU-0"]), (11, ["GPU-0", "GPU-1"])):
        machine.now, asked[:] = 1000.0 + seconds, []
        look = await looker.look(SHARES)
        assert sorted(asked) == asks
        assert set(look.gpus) == {"GPU-1"}


async def test_a_gpu_that_stops_answering_keeps_the_limits_that_were_in_effect(
    machine, monkeypatch
):
    """A container that has started since has none."""
    machine.start(1)
    machine.give(1, "GPU-0::1")
    looker = machine.looker(enforce=True)
    await looker.look(SHARES)

    async def silent(*_: object) -> Mapping[str, MemoryLimit]:
        return {}

    monkeypatch.setattr(machine.driver, "memory_limits", silent)
    machine.start(2)
    machine.give(2, "GPU-0::2")
    for seconds in (0, GRACE, 2 * GRACE):
        machine.now = 1000 + seconds
        look = await looker.look(SHARES)
    assert [(each.holder.pod, each.problem) for each in look.missing] == [
        ("pod-2", "NVML does not answer for its GPU now")
    ]


async def test_a_gpu_that_does_not_answer_says_nothing_of_the_toolkit(machine, monkeypatch):
    machine.start(1)
    machine.give(1, "GPU-1::1")
    answers = machine.driver.memory_limits

    async def half(uuid: str, cgroups: Sequence[str]) -> Mapping[str, MemoryLimit | str]:
        return {} if uuid == "GPU-1" else await answers(uuid, cgroups)

    monkeypatch.setattr(machine.driver, "memory_limits", half)
    looker = machine.looker()
    await looker.look(SHARES)
    machine.now += GRACE
    assert (await looker.look(SHARES)).mode is Mode.HOOK


async def test_a_gpu_that_hangs_while_limits_are_set_holds_up_a_look_for_a_bounded_time(machine):
    for n in range(20):
        machine.start(n)
        machine.give(n, f"GPU-0::{n % 10}")
    tried = []

    async def hangs(*arguments: object) -> str:
        tried.append(arguments)
        machine.now += 10
        return "the GPU does not answer within 10 s"

    machine.driver.limit_memory = hangs
    await machine.looker(enforce=True).look(SHARES)
    assert len(tried) <= 2


@pytest.mark.parametrize("ends", [1, 2])
async def test_a_container_that_ends_meanwhile_does_not_speak_for_its_gpu(machine, ends):
    """Whether a GPU can limit memory is asked of containers that may not be ours."""
    for n in range(ends + 1):
        machine.start(n)
    looker, answers = machine.looker(enforce=True), machine.driver.memory_limits
    gone = [leaf.path for leaf in looker.finder.hierarchy.leaves().values()][:ends]

    async def some(uuid: str, cgroups: Sequence[str]) -> Mapping[str, MemoryLimit | str]:
        found = dict(await answers(uuid, cgroups))
        return {path: "it is gone" if path in gone else found[path] for path in found}

    machine.driver.memory_limits = some
    look = await looker.look(SHARES)
    assert (look.error, look.gpus) == (None, {})


async def test_a_container_with_names_that_hide_its_id_is_a_problem(machine):
    machine.start(1)
    machine.give(1, "GPU-0::1")
    (link,) = machine.links.iterdir()
    link.unlink()
    name = f"{'long-' * 42}pod-1"
    cut = f"{name}_shop_main-{container_id(1)}"[:251] + ".log"
    (machine.links / cut).symlink_to(f"/var/log/pods/shop_{name}_{uid(1)}/main/0.log")
    look = await machine.looker(enforce=True).look(SHARES)
    (missing,) = look.missing
    assert missing.holder == Holder("shop", name, "main")
    assert "shorter names" in missing.problem
    assert machine.driver.set == []
    machine.end(1)  # its link stays for a while
    assert (await machine.looker(enforce=True).look(SHARES)).missing == ()


async def test_a_node_without_a_container_is_asked_too(machine):
    machine.driver.word = dict.fromkeys(SHARES, "too old")
    assert (await machine.looker(enforce=True).look(SHARES)).error == "too old"


async def test_a_node_that_cannot_be_read_says_why(machine):
    machine.checkpoint.write_text("garbage")
    look = await machine.looker(enforce=True).look(SHARES)
    assert "is no checkpoint" in look.error
    machine.write()
    (machine.tree / "cgroup.controllers").unlink()
    assert "cgroup" in (await machine.looker(enforce=True).look(SHARES)).error


async def test_the_most_that_was_in_use_is_kept_while_the_container_runs(machine):
    path = machine.start(1)
    machine.give(1, "GPU-0::1")
    looker = machine.looker(enforce=True)
    for used, peak in ((5, 5), (9, 9), (3, 9)):
        machine.driver.limits["GPU-0", path] = MemoryLimit(GIB, 0, used)
        (container,) = (await looker.look(SHARES)).containers
        assert container.peaks == {"GPU-0": peak}
        assert container.limits["GPU-0"].used_bytes == used


async def test_what_was_kept_for_a_container_is_given_back_when_it_ends(machine, caplog):
    paths = [machine.start(n) for n in (1, 2)]
    for n in (1, 2):
        machine.give(n, f"GPU-0::{n}")
    looker = machine.looker(enforce=True, guarantee=True)
    await looker.look(SHARES)
    assert machine.driver.set == [("GPU-0", path, GIB, GIB) for path in paths]
    await looker.end_guarantees()
    assert len(machine.driver.set) == 2
    machine.end(1, removed=False)
    await looker.end_guarantees()
    assert machine.driver.set[-1] == ("GPU-0", paths[0], GIB, 0)
    await looker.end_guarantees()
    assert len(machine.driver.set) == 3
    # The other one's cgroup is gone already.
    machine.end(2)
    machine.driver.word["GPU-0"] = "Not Found"
    await looker.end_guarantees()
    assert "stays kept" in caplog.text


async def test_what_has_ended_is_given_no_guarantee_again(machine):
    path = machine.start(1)
    machine.give(1, "GPU-0::1")
    looker = machine.looker(enforce=True, guarantee=True)
    await looker.look(SHARES)
    machine.end(1, removed=False)
    await looker.end_guarantees()
    await looker.look(SHARES)  # the runtime has not removed its cgroup yet
    assert machine.driver.limits["GPU-0", path].soft_bytes == 0


async def test_a_guarantee_that_no_answer_ended_is_said(machine, caplog):
    machine.start(1)
    machine.give(1, "GPU-0::1")
    looker = machine.looker(enforce=True, guarantee=True)
    await looker.look(SHARES)
    machine.end(1, removed=False)

    async def silent(*_: object) -> Mapping[str, MemoryLimit]:
        return {}

    machine.driver.memory_limits = silent
    await looker.end_guarantees()
    assert "NVML does not answer for its GPU now" in caplog.text


async def test_without_enforcing_nothing_is_remembered_of_what_is_kept_for_containers(machine):
    """Nobody ends it then."""
    looker = machine.looker()
    for n in range(3):
        path = machine.start(n)
        machine.give(n, "GPU-0::1")
        machine.driver.limits["GPU-0", path] = MemoryLimit(GIB, GIB, 0)
        await looker.look(SHARES)
        machine.end(n)
    await looker.look(SHARES)
    assert not looker._kept


async def test_250_containers_are_looked_at_in_a_moment(machine):
    for n in range(250):
        machine.start(n)
        machine.give(n, f"GPU-{n % 2}::{n % 10}")
    looker = machine.looker(enforce=True)
    with anyio.fail_after(5):
        look = await looker.look(SHARES)
        assert len(look.containers) == 250
        assert len(machine.driver.set) == 250
        assert (await looker.look(SHARES)).missing == ()


async def test_containers_that_have_ended_say_nothing_of_a_gpu(machine, monkeypatch):
    gone = machine.start(1)
    looker = machine.looker(enforce=True)
    await looker.look(SHARES)
    machine.end(1)  # which leaves no sign: its link stays for a while
    machine.start(2)

    async def answers(_: str, cgroups: Sequence[str]) -> Mapping[str, MemoryLimit | str]:
        return {path: "Not Found" if path == gone else NO_LIMIT for path in cgroups}

    monkeypatch.setattr(machine.driver, "memory_limits", answers)
    assert (await looker.look(SHARES, afresh=False)).gpus == {}
