"""Memory limits of cgroups: NvmlDriver against a fake libnvidia-ml.so.1, and simulated GPUs."""

import dataclasses
import os
import shutil
import time
from pathlib import Path

import pytest

from tests.fake_nvml import FakeNvml, Limit, build
from tests.gpu.test_nvml import (
    FUNCTION_NOT_FOUND,
    GPU_IS_LOST,
    L4,
    MIB,
    NO_PERMISSION,
    SECOND,
    UNKNOWN,
)
from tests.mps.fixtures import eventually
from vgpu_agent.gpu.simulated import SimulatedDriver, SimulatedFault, simulated_gpus
from vgpu_agent.model.limits import MemoryLimit

slow = pytest.mark.slow

INVALID_ARGUMENT = 2
NOT_SUPPORTED = 3

TOO_OLD = "the driver is too old to limit memory: r615 (CUDA 13.4)"
NOT_KNOWN = "the driver does not know the GPU now"
NONE = [None, 0, 0]


@pytest.fixture
def nvml(fake_nvml: FakeNvml) -> FakeNvml:
    """A driver that can limit memory."""
    fake_nvml.set_driver("615.71")
    return fake_nvml


def limit_of(child, uuid, cgroup):
    return child.ask("memory_limits", uuid, str(cgroup))[0][str(cgroup)]


@slow
def test_a_limit_is_of_one_cgroup_on_one_gpu_and_every_process_sees_it(start, nvml, tmp_path):
    for name in ("one", "two"):
        (tmp_path / "pod" / name).mkdir(parents=True)
    one, two = tmp_path / "pod" / "one", tmp_path / "pod" / "two"
    agent = start(L4, SECOND)
    enforcer = start(L4, SECOND)
    assert limit_of(agent, "GPU-a", one) == NONE
    assert enforcer.ask("limit_memory", "GPU-a", str(one), 4607 * MIB, 0) is None
    assert enforcer.ask("limit_memory", "GPU-b", str(two), 2**40, 2**39) is None
    nvml.use("GPU-a", one, 17)
    for child in (agent, enforcer):
        assert child.ask("memory_limits", "GPU-a", str(one), str(two))[0] == {
            str(one): [4607 * MIB, 0, 17],
            str(two): NONE,
        }
        assert limit_of(child, "GPU-b", two) == [2**40, 2**39, 0]
    assert nvml.limits() == {
        ("GPU-a", str(one)): Limit(0, 4607 * MIB),
        ("GPU-b", str(two)): Limit(2**39, 2**40),
    }
    assert enforcer.ask("limit_memory", "GPU-b", str(two), None, 0) is None
    assert enforcer.ask("limit_memory", "GPU-a", str(one), 0, 0) is None
    assert limit_of(agent, "GPU-b", two) == NONE
    assert limit_of(agent, "GPU-a", one) == [0, 0, 17]
    assert nvml.limits() == {("GPU-a", str(one)): Limit(0, 0)}


CANNOT = [
    ({"driver": "570.1"}, TOO_OLD),
    ({"driver": "614.99"}, TOO_OLD),
    ({"limits_error": FUNCTION_NOT_FOUND}, TOO_OLD),
    ({"mig": 1}, "it is in MIG mode"),
    ({"limits_error": NOT_SUPPORTED}, "RmMemacctMode"),
    ({"limits_error": UNKNOWN}, "MemoryLimits_v1: Unknown Error"),
    ({"limits_error": 12345}, "MemoryLimits_v1: "),
    ({"set_limits_error": NO_PERMISSION}, "only root with the capability SYS_ADMIN"),
    ({"set_limits_error": INVALID_ARGUMENT}, "nvmlDeviceSetMemoryLimits_v1: Invalid Argument"),
]


@slow
@pytest.mark.parametrize(("fault", "words"), CANNOT, ids=lambda each: str(each)[:40])
def test_what_the_driver_cannot_do_is_an_answer_in_words(start, nvml, tmp_path, fault, words):
    fields = dict(fault)
    nvml.set_driver(fields.pop("driver", "615.71"))
    child = start(dataclasses.replace(L4, **fields))
    assert words in child.ask("limit_memory", "GPU-a", str(tmp_path), MIB, 0)
    answer = limit_of(child, "GPU-a", tmp_path)
    if "set_limits_error" in fault:
        assert answer == NONE
    else:
        assert words in answer
    assert nvml.limits() == {}
    nvml.update("GPU-a", **dict.fromkeys(fields, 0))
    nvml.set_driver("615.71")
    assert child.ask("limit_memory", "GPU-a", str(tmp_path), MIB, 0) is None


@slow
def test_a_library_without_the_calls_is_of_a_driver_that_is_too_old(start, nvml, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    nvml.library = build(old, "-DNO_MEMORY_LIMITS")
    child = start(L4)
    for _ in range(2):
        assert limit_of(child, "GPU-a", tmp_path).startswith(TOO_OLD)
        assert child.ask("limit_memory", "GPU-a", str(tmp_path), MIB, 0).startswith(TOO_OLD)
    assert not child.ask("probe", "GPU-a")["lost"]


@slow
@pytest.mark.usefixtures("nvml")
def test_who_may_only_read_is_refused_and_reads(start, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_NVML_UNPRIVILEGED", "1")
    child = start(L4)
    assert "SYS_ADMIN" in child.ask("limit_memory", "GPU-a", str(tmp_path), MIB, 0)
    assert limit_of(child, "GPU-a", tmp_path) == NONE


@slow
@pytest.mark.parametrize(
    ("hard", "soft"), [(-1, 0), (MIB, -1), (MIB, MIB + 1), (2**64, 0), (None, 2**64), (None, -1)]
)
def test_numbers_that_are_no_limits_do_not_reach_the_driver(start, nvml, tmp_path, hard, soft):
    child = start(L4)
    words = child.ask("limit_memory", "GPU-a", str(tmp_path), hard, soft)
    assert words == f"soft {soft} and hard {hard} bytes are no limits: allowed is 0 <= soft <= hard"
    assert nvml.limits() == {}


@slow
def test_a_path_that_is_no_cgroup_gets_words_and_the_others_their_answers(start, nvml, tmp_path):
    child = start(L4)
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    wrong = {
        str(tmp_path / "gone"): "it is gone",
        str(tmp_path / "file"): "Invalid Argument",
        str(tmp_path / "file" / "x"): "Invalid Argument",
        str(tmp_path / "loop"): "Invalid Argument",
        f"/{'x' * 5000}": "Invalid Argument",
        "": "'' is not the full path of a cgroup",
        "kubepods": "'kubepods' is not the full path of a cgroup",
        f"{tmp_path}\0/pod": "is not the full path of a cgroup",
        f"{tmp_path}/\ud800": "is not the full path of a cgroup",
    }
    found, _ = child.ask("memory_limits", "GPU-a", *wrong, str(tmp_path))
    assert found.pop(str(tmp_path)) == NONE
    assert set(found) == set(wrong)
    for path, words in wrong.items():
        assert words in found[path]
        assert words in child.ask("limit_memory", "GPU-a", path, MIB, 0)
    assert nvml.limits() == {}


@slow
def test_any_name_of_a_directory_is_a_path(start, nvml, tmp_path, monkeypatch):
    child, reader = start(L4), start(L4)
    names = ["a b", "a\nlimit GPU-a 1 1 1\n/", "'\"%s\\", "\udcff\udc80", "ä💾", "-", "x" * 255]
    paths = [tmp_path / name for name in names]
    for path in paths:
        path.mkdir()
    monkeypatch.chdir(tmp_path)
    deep = tmp_path
    while len(os.fsencode(deep)) + 256 < 4095:  # the kernel takes no longer path at once
        Path("y" * 255).mkdir()
        os.chdir("y" * 255)
        deep = deep / ("y" * 255)
    rest = "z" * (4095 - 1 - len(os.fsencode(deep)))
    Path(rest).mkdir()
    paths.append(deep / rest)
    for n, path in enumerate(paths):
        assert child.ask("limit_memory", "GPU-a", str(path), n * MIB, 0) is None
    found, _ = reader.ask("memory_limits", "GPU-a", *map(str, paths))
    assert found == {str(path): [n * MIB, 0, 0] for n, path in enumerate(paths)}
    assert nvml.limits() == {
        ("GPU-a", str(path)): Limit(0, n * MIB) for n, path in enumerate(paths)
    }
    os.chdir(tmp_path)
    shutil.rmtree("y" * 255)


@slow
def test_with_the_dmem_controller_only_a_cgroup_with_its_files_can_be_limited(
    start, nvml, tmp_path
):
    nvml.set_driver("615.71", dmem=True)
    child = start(L4)
    pod = tmp_path / "pod"
    leaf = pod / "leaf"
    leaf.mkdir(parents=True)
    (pod / "dmem.max").touch()
    assert "has no file dmem.max" in child.ask("limit_memory", "GPU-a", str(leaf), MIB, 0)
    assert child.ask("limit_memory", "GPU-a", str(pod), 9 * MIB, 0) is None
    assert limit_of(child, "GPU-a", leaf) == [9 * MIB, 0, 0]
    (leaf / "dmem.max").touch()
    assert limit_of(child, "GPU-a", leaf) == NONE  # it shadows its parent's
    assert child.ask("limit_memory", "GPU-a", str(leaf), MIB, 0) is None
    assert limit_of(child, "GPU-a", leaf) == [MIB, 0, 0]


@slow
@pytest.mark.usefixtures("nvml")
def test_without_it_the_nearest_cgroup_with_a_limit_counts(start, tmp_path):
    child = start(L4)
    leaf = tmp_path / "pod" / "leaf"
    leaf.mkdir(parents=True)
    assert child.ask("limit_memory", "GPU-a", str(tmp_path), 9 * MIB, MIB) is None
    assert limit_of(child, "GPU-a", leaf) == [9 * MIB, MIB, 0]
    assert child.ask("limit_memory", "GPU-a", f"{leaf}/../leaf/", 2 * MIB, 0) is None
    assert limit_of(child, "GPU-a", leaf) == [2 * MIB, 0, 0]


@slow
@pytest.mark.parametrize("failure", [{"lost": True}, {"epoch": 1}, {"limits_error": GPU_IS_LOST}])
def test_a_gpu_that_is_lost_or_unknown_has_no_answers(start, nvml, tmp_path, failure):
    child = start(L4, SECOND)
    nvml.update("GPU-a", **failure)
    for uuid in ("GPU-a", "GPU-unknown", ""):
        assert child.ask("memory_limits", uuid, str(tmp_path), "/")[0] == {}
        assert NOT_KNOWN in child.ask("limit_memory", uuid, str(tmp_path), MIB, 0)
    assert limit_of(child, "GPU-b", tmp_path) == NONE


@slow
@pytest.mark.usefixtures("nvml")
def test_asking_for_limits_does_not_open_what_was_released(start, tmp_path):
    child = start(L4)
    assert child.ask("release")
    assert child.ask("memory_limits", "GPU-a", str(tmp_path))[0] == {}
    assert child.ask("limit_memory", "GPU-a", str(tmp_path), MIB, 0) == NOT_KNOWN
    assert child.ask("probe", "GPU-a")["lost"]  # it is still closed
    child.ask("scan")
    assert limit_of(child, "GPU-a", tmp_path) == NONE


@slow
@pytest.mark.parametrize("name", ["Get", "Set"])
def test_a_gpu_that_hangs_holds_up_no_other_and_no_probe(start, nvml, tmp_path, name):
    child = start(L4, SECOND)
    arguments = {"Get": ("memory_limits", "GPU-a", [str(tmp_path)])}
    arguments["Set"] = ("limit_memory", "GPU-a", str(tmp_path), MIB, 0)
    call, _, *rest = arguments[name]
    child.ask("probe", "GPU-a")  # which leaves an idle thread
    nvml.update("GPU-a", hang=60, call=f"Device{name}MemoryLimits_v1")
    found = child.ask("hang", "GPU-a", 0.1, 4, call, *rest)
    assert found["timeouts"] == 4
    assert found["ticks"] > 10
    assert found["threads"] <= 1
    assert child.ask("hang", "GPU-a", 10, 1, "probe")["timeouts"] == 0
    assert limit_of(child, "GPU-b", tmp_path) == NONE
    asked_at = time.monotonic()
    assert child.ask("memory_limits", "GPU-a", str(tmp_path))[0] == {}
    words = child.ask("limit_memory", "GPU-a", str(tmp_path), MIB, 0)
    assert words == "the GPU does not answer within 3 s (memory limits)"
    assert time.monotonic() - asked_at < 8
    nvml.update("GPU-a", hang=0)
    eventually(lambda: child.ask("limit_memory", "GPU-a", str(tmp_path), 2 * MIB, 0) is None)
    # A call that was left is made before those that come after it.
    assert limit_of(child, "GPU-a", tmp_path) == [2 * MIB, 0, 0]


@slow
@pytest.mark.usefixtures("nvml")
def test_a_gpu_that_is_slow_is_not_one_that_hangs(start, tmp_path):
    child = start(dataclasses.replace(L4, hang=0.7, call="DeviceGetMemoryLimits_v1"))
    paths = [str(tmp_path / str(n)) for n in range(5)]
    found, took = child.ask("memory_limits", "GPU-a", *paths)
    assert list(found) == paths
    assert took > 3


@slow
def test_processes_that_set_limits_at_once_lose_none(start, nvml, tmp_path):
    """Of the stand-in: agent, enforcer and hook are processes of their own."""
    places = [tmp_path / f"{n}-{'x' * 200}" for n in range(3)]
    for place in places:
        place.mkdir()
    setters = [(start(L4), str(place)) for place in places]
    for n in range(1, 51):
        for child, place in setters:
            child.send("limit_memory", "GPU-a", place, n * MIB, 0)
            child.send("memory_limits", "GPU-a", *map(str, places))
    for n in range(1, 51):
        for child, place in setters:
            assert child.answer() is None
            assert child.answer()[0][place] == [n * MIB, 0, 0]
    assert nvml.limits() == {("GPU-a", str(place)): Limit(0, 50 * MIB) for place in places}


@slow
@pytest.mark.alone
@pytest.mark.usefixtures("nvml")
def test_250_cgroups_are_looked_at_within_20_ms(start, tmp_path):
    child = start(L4)
    paths = [tmp_path / f"kubepods-pod{n:032x}.slice" / f"cri-{n:064x}.scope" for n in range(250)]
    for n, path in enumerate(paths):
        path.mkdir(parents=True)
        assert child.ask("limit_memory", "GPU-a", str(path), n * MIB, 0) is None
    looks = [child.ask("memory_limits", "GPU-a", *map(str, paths)) for _ in range(5)]
    assert looks[0][0] == {str(path): [n * MIB, 0, 0] for n, path in enumerate(paths)}
    assert min(took for _, took in looks) < 0.020


async def test_simulated_gpus_say_that_they_have_no_limits():
    driver = SimulatedDriver(simulated_gpus(1, "gpu", 2**34, (0,)))
    (gpu,) = driver.gpus
    assert await driver.memory_limits(gpu.uuid, ["/a"]) == {}  # not scanned yet
    assert await driver.limit_memory(gpu.uuid, "/a", MIB, 0) == NOT_KNOWN
    await driver.scan()
    words = "simulated GPUs have no memory limits"
    assert await driver.memory_limits(gpu.uuid, ["/a", "/b"]) == {"/a": words, "/b": words}
    assert await driver.limit_memory(gpu.uuid, "/a", MIB, 0) == words
    driver.can_limit_memory()
    assert await driver.memory_limits(gpu.uuid, ["/a"]) == {"/a": MemoryLimit(None, 0, 0)}


async def test_simulated_gpus_can_be_given_limits_which_a_reset_ends():
    driver = SimulatedDriver(simulated_gpus(2, "gpu", 2**34, (0,)))
    one, two = (gpu.uuid for gpu in driver.gpus)
    await driver.scan()
    driver.can_limit_memory()
    assert await driver.limit_memory(one, "/a", 2 * MIB, MIB) is None
    driver.use_in(one, "/a", 7)
    driver.use_in(one, "/b", 8)
    wanted = {"/a": MemoryLimit(2 * MIB, MIB, 7), "/b": MemoryLimit(None, 0, 8)}
    assert await driver.memory_limits(one, ["/a", "/b"]) == wanted
    assert await driver.memory_limits(two, ["/a"]) == {"/a": MemoryLimit(None, 0, 0)}
    for fault in (SimulatedFault.HANG, SimulatedFault.LOSE, SimulatedFault.HEAL):
        driver.rehearse(fault, one)
        assert await driver.memory_limits(one, ["/a"]) == {}
        assert await driver.limit_memory(one, "/a", MIB, 0) == NOT_KNOWN
    await driver.scan()
    assert await driver.memory_limits(one, ["/a"]) == {"/a": MemoryLimit(None, 0, 0)}
    driver.can_limit_memory("switched off")
    assert await driver.memory_limits(one, ["/a"]) == {"/a": "switched off"}
