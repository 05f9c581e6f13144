"""Each check of the doctor when all is well, when something is odd, and when it is wrong."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from tests.agent_process import environment, running
from tests.fake_nvml import FakeCard, FakeNvml
from tests.kubelet_peer import KubeletPeer, off_loop
from tests.web_peer import answering, http
from vgpu_agent import settings as configuration
from vgpu_agent.agent import make_driver
from vgpu_agent.doctor import (
    Check,
    Timeouts,
    Verdict,
    cards,
    check_settings,
    examine,
    files,
    mps,
    node,
    render_json,
    render_text,
    report,
    worst,
)
from vgpu_agent.errors import DriverError, SettingsError
from vgpu_agent.gpu.driver import ComputeMode, Reading
from vgpu_agent.gpu.health import Counters
from vgpu_agent.gpu.memory import FILE, FaultMemory, Remembered
from vgpu_agent.gpu.simulated import SimulatedDriver, simulated_gpus
from vgpu_agent.model.devices import Excluded, Fault, Reason
from vgpu_agent.model.share import MIB, Division, MpsLimits
from vgpu_agent.mps.applied import Applied, AppliedCard
from vgpu_agent.mps.daemon import DaemonLook
from vgpu_agent.running import findable
from vgpu_agent.settings import Address, EmbeddedSettings, Settings

OK, WARN, FAIL = Verdict.OK, Verdict.WARN, Verdict.FAIL

GPUS = simulated_gpus(2, "card", 24 * 1024 * MIB, (0,))
UUID = GPUS[0].uuid
TIME_SLICING = cards.Plan(Division(10), by_mps=False, exclusive=True)
BY_MPS = cards.Plan(Division(10, max_clients=48), by_mps=True, exclusive=True)
SOON = Timeouts(scan=0.1, probe=0.1, daemon=0.1, look=0.1)
LATE = "no answer within 0.1 s"


def told(checks: Iterable[Check], name: str) -> tuple[Verdict, str]:
    """The verdict and the words, advice included, of the one check of that name."""
    (check,) = [check for check in checks if check.name == name]
    assert check.advice or check.verdict is OK, f"{check} does not say what to do"
    return check.verdict, f"{check.detail} {check.advice}"


def expect(checks: Iterable[Check], name: str, verdict: Verdict, words: str = "") -> None:
    """That the one check of that name has this verdict and, among others, these words."""
    found, text = told(checks, name)
    assert (found, words in text) == (verdict, True), text


def expect_one(checks: Iterable[Check], verdict: Verdict, words: str = "") -> None:
    """The same of the only check."""
    (check,) = checks
    expect([check], check.name, verdict, words)


@contextmanager
def listening(path: Path) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield


def stale(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def settings_in(kubelet_dir: Path, **changes: object) -> EmbeddedSettings:
    (kubelet_dir / "device-plugins").mkdir(exist_ok=True)
    values = {
        "gpu_driver": "simulated",
        "kubelet_dir": kubelet_dir,
        "state_directory": kubelet_dir / "state",
        "mps_directory": kubelet_dir / "mps",
        "mps_shm_directory": kubelet_dir / "shm",
        "metrics_address": "127.0.0.1:0",
    }
    return EmbeddedSettings.model_validate(values | changes)


class FakeDaemon:
    """Looks as it is told; None hangs."""

    def __init__(self, look: DaemonLook | Exception | None) -> None:
        self._look = look

    async def look(self) -> DaemonLook:
        if self._look is None:
            await anyio.sleep_forever()
        if isinstance(self._look, Exception):
            raise self._look
        return self._look

    def generation(self) -> str | None:
        raise NotImplementedError


async def examined(settings: Settings | SettingsError, **changes):
    options = {
        "environment": {},
        "make_driver": make_driver,
        "make_daemon": lambda _: FakeDaemon(DaemonLook(error="away")),
    }
    return await examine(settings, **(options | changes))


# The whole


async def test_with_simulated_cards_and_a_kubelet_all_is_well(kubelet_dir):
    settings = settings_in(kubelet_dir)
    with listening(settings.plugin_directory / "kubelet.sock"):
        checks = await examined(settings)
    assert worst(checks) is OK, render_text(checks)
    assert told(checks, "cards") == (OK, "2 of 2 cards make 20 vGPUs ")
    assert not [check for check in checks if "mps" in check.name]


async def test_without_a_kubelet_something_would_stop_the_agent(kubelet_dir):
    checks = await examined(settings_in(kubelet_dir))
    assert [check.name for check in checks if check.verdict is FAIL] == ["kubelet socket"]
    assert worst(checks) is FAIL


async def test_wrong_settings_are_told_and_the_rest_is_checked_with_what_is_right(kubelet_dir):
    error = SettingsError("2 settings are wrong:\n  VGPU_A='1' is wrong\n  VGPU_B='2' is wrong")
    given = {
        "VGPU_GPU_DRIVER": "simulated",
        "VGPU_SIMULATED_GPUS": "3",
        "VGPU_REPLICAS": "many",
        "VGPU_KUBELET_DIR": str(kubelet_dir),
    }
    checks = await examined(error, environment=given)
    assert [check.detail for check in checks[:2]] == ["VGPU_A='1' is wrong", "VGPU_B='2' is wrong"]
    assert told(checks, "cards") == (OK, "3 of 3 cards make 30 vGPUs ")
    assert str(kubelet_dir) in told(checks, "kubelet directory")[1]


async def test_a_check_that_stumbles_is_a_failed_check_and_the_others_go_on(
    kubelet_dir, monkeypatch
):
    def stumble(*_: object) -> None:
        raise RuntimeError("stumbled")

    monkeypatch.setattr(node, "check_kubelet", stumble)
    monkeypatch.setattr(mps, "check_daemon", stumble)
    checks = await examined(
        settings_in(kubelet_dir, gpu_driver="nvml", sharing="mps"), make_driver=stumble
    )
    for name in ("kubelet", "driver", "mps daemon"):
        expect(checks, name, FAIL, "RuntimeError: stumbled")
    expect(checks, "metrics address", OK)


async def test_what_hangs_does_not_hold_up_the_rest(kubelet_dir, monkeypatch):
    going_on = threading.Event()
    monkeypatch.setattr(node, "check_metrics", lambda _: going_on.wait(10) and ())
    driver = SimulatedDriver(GPUS)
    driver.hang(UUID, hangs=True)
    start = time.monotonic()
    checks = await examined(
        settings_in(kubelet_dir, gpu_driver="nvml", sharing="mps"),
        make_driver=lambda _: driver,
        make_daemon=lambda _: FakeDaemon(None),
        timeouts=SOON,
    )
    took = time.monotonic() - start
    going_on.set()
    assert took < 3
    for name in ("driver", "mps daemon", "metrics address"):
        assert told(checks, name)[1].startswith(LATE)
    expect(checks, "remembered faults", OK)


def test_all_limits_of_time_together_are_below_ten_seconds():
    assert Timeouts().whole < 10


@pytest.mark.slow
async def test_of_a_running_agent_the_endpoint_and_the_port_are_its_own(kubelet_dir):
    with KubeletPeer(kubelet_dir) as kubelet, running(kubelet_dir) as agent:
        await off_loop(kubelet.wait_list, 1)
        settings = settings_in(kubelet_dir, metrics_address=f"127.0.0.1:{agent.port}")
        checks = await examined(settings)
        assert worst(checks) is OK, render_text(checks)
        pid = agent.process.pid
        assert told(checks, "endpoint") == (OK, f"served by the running agent, process {pid} ")
        expect(checks, "metrics address", OK, "is served by the running agent")
        # Also from where its PID file is not seen.
        elsewhere = settings.model_copy(update={"state_directory": kubelet_dir / "other"})
        (check,) = node.check_endpoint(elsewhere)
        assert (check.verdict, check.detail) == (OK, "served by the running agent")


# The report

REPORT = (
    Check("settings", OK, "fine", "never shown"),
    Check("driver", WARN, "odd", "look"),
    Check("kubelet socket", FAIL, "away\nfor long", "start it"),
)


def test_the_text_is_aligned_and_plain():
    assert render_text(REPORT) == (
        "ok    settings        fine\n"
        "warn  driver          odd\n"
        "                      -> look\n"
        "fail  kubelet socket  away\n"
        "                      for long\n"
        "                      -> start it\n"
        "\n"
        "1 ok, 1 warn, 1 fail\n"
    )


def test_the_json_says_the_same():
    parsed = json.loads(render_json(REPORT))
    assert parsed["verdict"] == "fail"
    assert [Check(**each) for each in parsed["checks"]] == list(REPORT)


def test_the_worst_verdict_counts():
    assert [worst(REPORT[:n]) for n in range(4)] == [OK, OK, WARN, FAIL]
    assert report.unexpected("x", ValueError("y")).verdict is FAIL


# Settings


def test_right_settings_are_counted():
    given = {"VGPU_REPLICAS": "3", "vgpu_sharing": "mps", "PATH": "/bin"}
    (check,) = check_settings(EmbeddedSettings(), given)
    assert (check.verdict, check.detail) == (OK, "2 VGPU_* variables are set, and right")


def test_unknown_settings_are_warned_about_with_the_nearest_name():
    given = {"VGPU_REPLICS": "3", "VGPU_XYZ_QQQQ": ""}
    _, typo, strange = check_settings(EmbeddedSettings(), given)
    assert (typo.verdict, typo.advice) == (WARN, "did you mean VGPU_REPLICAS?")
    assert (strange.verdict, strange.advice) == (WARN, "remove it")


def test_what_is_assumed_keeps_what_is_right():
    found = configuration.assume(
        {"VGPU_REPLICAS": "0", "vgpu_log_level": "debug", "VGPU_SHARING": "x"}
    )
    assert found is not None
    assert (found.replicas, found.log_level, found.sharing) == (10, "debug", "mps")
    # The default of one that does not fit another that is set.
    found = configuration.assume({"VGPU_MPS_MAX_CLIENTS": "5", "VGPU_LOG_LEVEL": "debug"})
    assert found is not None
    assert found.mps_max_clients is None


# Driver and cards, as the real pynvml tells them

CHILD = """
import os, sys, anyio
from vgpu_agent import settings
from vgpu_agent.agent import make_driver
from vgpu_agent.doctor import examine, render_json

async def main():
    checks = await examine(
        settings.load(), environment=os.environ, make_driver=make_driver,
        make_daemon=lambda _: None,
    )
    sys.stdout.write(render_json(checks))
    sys.stdout.flush()

anyio.run(main)
os._exit(0)  # a hung call to the driver has a thread
"""


def examined_with(nvml: FakeNvml | None, kubelet_dir: Path, **variables: str) -> list[Check]:
    """In a process of its own, since the loader reads LD_LIBRARY_PATH only at the start of one."""
    given = {
        "VGPU_SHARING": "time-slicing",
        "VGPU_KUBELET_DIR": str(kubelet_dir),
        "VGPU_METRICS_ADDRESS": "127.0.0.1:0",
        **(nvml.environment() if nvml else {}),
        **variables,
    }
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        env=environment(**given),
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    parsed = [Check(**each) for each in json.loads(done.stdout)["checks"]]
    return [replace(check, verdict=Verdict(check.verdict)) for check in parsed]


def card(number: int, **values) -> FakeCard:
    return FakeCard(f"GPU-{number}", bus=f"00000000:{number + 1:02X}:00.0", **values)


@pytest.mark.slow
def test_cards_of_the_driver_are_judged_one_by_one(kubelet_dir, fake_nvml):
    fake_nvml.set_cards(
        card(0),
        card(1, mig=1),
        card(2, compute_mode=3),
        card(3, cc=(6, 1), remap_pending=1),
        card(4, compute_mode=2, action=1),
        card(5, error=999),
    )
    checks = examined_with(fake_nvml, kubelet_dir)
    assert told(checks, "driver") == (OK, "version 570.1 ")
    assert told(checks, "card 0 capability") == (OK, "8.9 ")
    assert told(checks, "card 0 compute mode") == (OK, "DEFAULT ")
    assert told(checks, "card 3 capability") == (OK, "6.1 ")
    for name, verdict, words in (
        ("cards", OK, ""),
        ("card 0", OK, "NVIDIA L4 GPU-0, 23034 MiB; 10 vGPUs of 2252 MiB"),
        ("card 0 health", OK, ""),
        ("card 1", WARN, "nvidia-smi -i 1 -mig 0"),
        ("card 2 compute mode", FAIL, "EXCLUSIVE_PROCESS"),
        ("card 2 compute mode", FAIL, "nvidia-smi -i 2 -c DEFAULT"),
        ("card 3 health", WARN, ""),
        ("card 4 health", FAIL, "a reset of the GPU"),
        ("card 4 compute mode", FAIL, ""),
        ("card 5", WARN, ""),
    ):
        expect(checks, name, verdict, words)


@pytest.mark.slow
def test_under_mps_old_cards_are_left_out_and_the_mode_is_the_pods(kubelet_dir, fake_nvml):
    fake_nvml.set_cards(card(0, cc=(6, 1)), card(1), card(2, compute_mode=3))
    checks = examined_with(fake_nvml, kubelet_dir, VGPU_SHARING="mps")
    expect(checks, "card 0", WARN, "VGPU_SHARING=time-slicing")
    expect(checks, "card 1 compute mode", WARN, "VGPU_MPS_COMPUTE_MODE=keep")
    assert told(checks, "card 2 compute mode") == (OK, "EXCLUSIVE_PROCESS ")


@pytest.mark.slow
def test_without_a_library_it_is_said_where_it_comes_from(kubelet_dir):
    expect(examined_with(None, kubelet_dir), "driver", FAIL, "libnvidia-ml.so.1")


@pytest.mark.slow
def test_a_card_that_hangs_the_driver_is_told_in_time(kubelet_dir, fake_nvml):
    fake_nvml.set_cards(card(0, hang=60))
    start = time.monotonic()
    expect(examined_with(fake_nvml, kubelet_dir), "driver", FAIL, "a reboot")
    assert time.monotonic() - start < 10


# Cards, as simulated ones show them


async def asked(driver: SimulatedDriver, plan: cards.Plan = TIME_SLICING, **options):
    return (await cards.ask_driver(lambda: driver, plan, **options)).checks


@pytest.mark.parametrize(
    ("reading", "verdict", "words"),
    [
        (Reading(), OK, "passes"),
        (Reading(lost=True), FAIL, "no longer answers"),
        (Reading(error="nvml says no"), FAIL, "nvml says no"),
        (Reading(remap_failed=True), FAIL, "replace it"),
        (Reading(remap_pending=True), WARN, "reset the card when it suits"),
        (Reading(recovery_action=2), FAIL, "a reboot of the node"),
        (Reading(uncorrectable_ecc=7), OK, "passes"),
    ],
)
async def test_one_probe_of_a_card_tells_its_health(reading, verdict, words):
    driver = SimulatedDriver(GPUS)
    driver.show(UUID, reading)
    checks = await asked(driver)
    expect(checks, "card 0 health", verdict, words)
    expect(checks, "card 1 health", OK)


@pytest.mark.parametrize(
    ("plan", "mode", "verdict"),
    [
        (TIME_SLICING, None, OK),
        (TIME_SLICING, ComputeMode.DEFAULT, OK),
        (TIME_SLICING, ComputeMode.EXCLUSIVE_THREAD, FAIL),
        (TIME_SLICING, ComputeMode.EXCLUSIVE_PROCESS, FAIL),
        (TIME_SLICING, ComputeMode.PROHIBITED, FAIL),
        (BY_MPS, ComputeMode.DEFAULT, WARN),
        (replace(BY_MPS, exclusive=False), ComputeMode.DEFAULT, OK),
        (BY_MPS, ComputeMode.EXCLUSIVE_PROCESS, OK),
        (BY_MPS, ComputeMode.PROHIBITED, FAIL),
    ],
)
async def test_a_compute_mode_is_judged_by_how_cards_are_shared(plan, mode, verdict):
    driver = SimulatedDriver(GPUS)
    driver.show(UUID, Reading(compute_mode=mode))
    checks = await asked(driver, plan)
    expect(checks, "card 0 compute mode", verdict)
    expect(checks, "card 0 health", OK)


@pytest.mark.parametrize(
    ("division", "name", "verdict", "words"),
    [
        (Division(10), "card 0", OK, "10 vGPUs of 2457 MiB"),
        (Division(48), "card 0", WARN, "a CUDA context alone"),
        (Division(10, held_back=24 * 1024 * MIB), "card 0", FAIL, "too little"),
        (Division(10, device_memory=2048 * MIB), "card 0", OK, "12 vGPUs of 2048 MiB"),
        (Division(10, device_memory=512 * MIB, max_clients=20), "card 0", WARN, "20"),
        (Division(10, device_memory=2**40), "card 0", WARN, "VGPU_DEVICE_MEMORY"),
        (Division(10, device_memory=2**40), "cards", FAIL, "0 of 2 cards"),
        (Division(10, by_gpu={"0": 0}), "card 0", OK, "left out"),
    ],
)
async def test_what_cards_are_divided_into_is_said(division, name, verdict, words):
    plan = replace(TIME_SLICING, division=division)
    expect(await asked(SimulatedDriver(GPUS), plan), name, verdict, words)


async def test_a_driver_without_cards_one_that_fails_and_one_that_does_not_tell_all():
    expect(await asked(SimulatedDriver(())), "cards", FAIL, "lists no card")
    failing = SimulatedDriver(GPUS)
    failing.fail(DriverError("no driver"))
    expect(await asked(failing), "driver", FAIL, "no driver")
    silent = SimulatedDriver([replace(GPUS[0], compute_capability=None)])
    expect(await asked(silent), "card 0 capability", OK)
    expect(await asked(silent, BY_MPS), "card 0 capability", WARN)


async def test_a_probe_that_fails_or_hangs_is_the_cards_own():
    class Odd(SimulatedDriver):
        async def probe(self, uuid: str) -> Reading:
            if uuid == UUID:
                raise RuntimeError("odd")
            await anyio.sleep_forever()
            raise AssertionError

    checks = await asked(Odd(GPUS), timeouts=SOON)
    assert told(checks, "card 0 health")[1].startswith("this could not be checked: RuntimeError")
    assert told(checks, "card 1 health")[1].startswith(LATE)


def test_a_card_that_is_left_out_is_listed_where_its_index_is():
    left = Excluded(GPUS[0], "mig", "MIG is on: turn it off")
    scan = cards.Scan("1", (GPUS[1],), (left,))
    names = [check.name for check in cards._judge(scan, {GPUS[1].uuid: Reading()}, TIME_SLICING)]
    assert names[:4] == ["driver", "cards", "card 0", "card 1"]


# MPS

APPLIED = Applied(
    generation="g",
    limits=MpsLimits.CLIENT,
    thread_percentage=None,
    cards=tuple(AppliedCard(gpu.uuid, gpu.index, 10, None) for gpu in GPUS),
    problem=None,
    version="1",
)
WELL = DaemonLook(generation="g", applied=APPLIED, clients={UUID: 3})


@pytest.mark.parametrize(
    ("look", "name", "verdict", "words"),
    [
        (WELL, "mps daemon", OK, "3 clients"),
        (WELL, "mps limits", OK, "in force"),
        (replace(WELL, error="nobody answers"), "mps daemon", FAIL, "nobody answers"),
        (replace(WELL, faulty=(7,)), "mps servers", FAIL, "MPS server 7"),
        (replace(WELL, waiting=2), "mps clients", WARN, "as one user"),
        (replace(WELL, applied=None), "mps limits", FAIL, "nobody has applied"),
        (replace(WELL, generation="h"), "mps limits", FAIL, "a new one"),
        (
            replace(WELL, applied=replace(APPLIED, problem="server 7 is older")),
            "mps limits",
            FAIL,
            "server 7 is older",
        ),
        (
            replace(WELL, applied=replace(APPLIED, cards=(AppliedCard(UUID, 0, 5, None),))),
            "mps limits",
            WARN,
            "5 vGPUs instead of 10",
        ),
    ],
)
def test_the_daemon_is_judged_as_the_agent_judges_it(look, name, verdict, words):
    checks = tuple(mps.check_daemon(look, GPUS, Division(10), MpsLimits.CLIENT))
    expect(checks, name, verdict, words)


async def test_a_daemon_that_hangs_stumbles_or_is_not_needed():
    for make, verdict, words in (
        (lambda: FakeDaemon(None), FAIL, LATE),
        (lambda: FakeDaemon(RuntimeError("odd")), FAIL, "RuntimeError: odd"),
        (lambda: None, OK, "none is needed"),
    ):
        look = await mps.ask_daemon(make, timeouts=SOON)
        checks = mps.check_daemon(look, GPUS, Division(10), MpsLimits.CLIENT)
        expect_one(checks, verdict, words)


def test_the_control_program_is_looked_for_on_the_path(tmp_path):
    expect_one(mps.check_binary({"PATH": str(tmp_path)}), FAIL)
    program = tmp_path / mps.BINARY
    program.touch(mode=0o755)
    expect_one(mps.check_binary({"PATH": str(tmp_path)}), OK, f"{program} ")


def test_another_mps_on_the_node_is_warned_about(kubelet_dir):
    path = kubelet_dir / "nvidia-mps"
    expect_one(mps.check_other(path), OK)
    path.mkdir()
    expect_one(mps.check_other(path), WARN, "left behind")
    with listening(path / "control"):
        expect_one(mps.check_other(path), WARN, "end that daemon")


def test_the_daemons_directories_must_be_there_and_open(tmp_path, monkeypatch):
    root, shm = tmp_path / "mps", tmp_path / "shm"
    checks = tuple(mps.check_directories(root, shm))
    for name, verdict in (("mps pipe", FAIL), ("mps log", WARN), ("mps shm", WARN)):
        expect(checks, name, verdict)
    for path, mode in ((root / "pipe", 0o755), (root / "log", 0o700), (shm, 0o1777)):
        path.mkdir(parents=True)
        path.chmod(mode)
    checks = tuple(mps.check_directories(root, shm))
    assert worst(checks) is OK
    expect(checks, "mps shm", OK, "owner")
    expect(checks, "mps shm", OK, "mode 1777, writable")
    assert len(tuple(mps.check_directories(root, None))) == 2

    (root / "pipe").chmod(0o700)
    expect(mps.check_directories(root, None), "mps pipe", WARN, "`chmod 705 ")
    (root / "pipe").chmod(0o755)
    for kind, verdict in (("container_file_t", OK), ("var_run_t", WARN)):
        label = f"system_u:object_r:{kind}:s0\0".encode()
        monkeypatch.setattr(os, "getxattr", lambda *_, label=label: label)
        expect(mps.check_directories(root, None), "mps pipe", verdict, kind)
    (root / "log").rmdir()
    (root / "log").touch()
    expect(mps.check_directories(root, None), "mps log", FAIL)


async def test_mps_is_checked_for_real_cards_only(kubelet_dir, tmp_path):
    async def names(**changes: object) -> set[str]:
        checks = await examined(
            settings_in(kubelet_dir, **changes),
            make_driver=lambda _: SimulatedDriver(GPUS),
            other_mps=tmp_path / "none",
        )
        return {check.name for check in checks if "mps" in check.name}

    every = {"mps binary", "mps pipe", "mps log", "mps shm", "other mps", "mps daemon"}
    assert await names(gpu_driver="nvml", sharing="mps") == every
    assert await names(gpu_driver="nvml", sharing="time-slicing") == {"other mps"}
    assert await names(gpu_driver="simulated", sharing="mps") == set()


# The node


def test_the_paths_of_sockets_must_fit():
    expect_one(node.check_socket_paths(Path("/" + "a" * 106)), OK)
    expect_one(node.check_socket_paths(Path("/" + "a" * 107)), FAIL, "108 of 107 bytes")
    assert files.connects(Path("/" + "a" * 107)) is not None


def test_the_kubelet_must_have_its_directory_and_listen(kubelet_dir, monkeypatch):
    directory = kubelet_dir / "device-plugins"
    expect_one(node.check_kubelet(directory), FAIL)
    directory.mkdir()
    expect(node.check_kubelet(directory), "kubelet socket", FAIL)
    stale(directory / "kubelet.sock")
    expect(node.check_kubelet(directory), "kubelet socket", FAIL, "Connection refused")
    (directory / "kubelet.sock").unlink()
    with listening(directory / "kubelet.sock"):
        assert worst(node.check_kubelet(directory)) is OK
        monkeypatch.setattr(os, "access", lambda *_: False)
        checks = node.check_kubelet(directory)
        expect(checks, "kubelet directory", FAIL, "not writable from here")


def test_our_own_endpoint_is_free_stale_or_somebodys(kubelet_dir):
    settings = settings_in(kubelet_dir)
    path = settings.plugin_directory / settings.endpoint
    expect_one(node.check_endpoint(settings), OK, "is free")
    path.mkdir()
    expect_one(node.check_endpoint(settings), FAIL)
    path.rmdir()
    stale(path)
    expect_one(node.check_endpoint(settings), OK, "stale")
    path.unlink()
    with listening(path):
        expect_one(node.check_endpoint(settings), FAIL, "another agent for")
        settings.state_directory.mkdir()
        (settings.state_directory / "agent.pid").write_text(f"{os.getpid()}\n")
        expect_one(node.check_endpoint(settings), FAIL)  # left behind: nobody holds it
        with findable(settings.state_directory):
            expect_one(node.check_endpoint(settings), OK)


@pytest.mark.parametrize(
    ("page", "verdict", "words"),
    [
        ('{"resource": "k8s.amazonaws.com/vgpu", "cards": []}', OK, "served by the running agent "),
        ('{"resource": "other/one", "cards": []}', FAIL, "another agent for"),
        ("[]", FAIL, "another agent for"),
        ("{", FAIL, "another agent for"),
    ],
)
def test_an_endpoint_is_our_agents_also_where_only_its_web_side_says_so(
    kubelet_dir, page, verdict, words
):
    with answering(http(page)) as address:
        settings = settings_in(kubelet_dir, metrics_address=str(address))
        with listening(settings.plugin_directory / settings.endpoint):
            expect_one(node.check_endpoint(settings), verdict, words)


@pytest.mark.parametrize(
    ("answer", "verdict", "words"),
    [
        (http("ok\n"), OK, "running agent"),
        (http("no sign of life for 12 s\n", "503 Service Unavailable"), FAIL, "stuck"),
        (http("<html>"), FAIL, "VGPU_METRICS_ADDRESS"),
    ],
)
def test_the_metrics_address_is_free_the_agents_or_taken(answer, verdict, words):
    with answering(answer) as address:
        expect_one(node.check_metrics(address), verdict, words)
    expect_one(node.check_metrics(address), OK, "is free")
    expect_one(node.check_metrics(Address("127.0.0.1", 0)), OK)


def test_the_state_directory_should_be_writable(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    for path, verdict, words in (
        (tmp_path, OK, ""),
        (tmp_path / "a" / "b", OK, "the agent makes it"),
        (file, WARN, ""),
        (file / "below", WARN, ""),
    ):
        expect_one(node.check_state_directory(path), verdict, words)
    monkeypatch.setattr(os, "access", lambda *_: False)
    for path in (tmp_path, tmp_path / "a"):
        expect_one(node.check_state_directory(path), WARN, "would forget")


def test_cards_that_wait_for_a_reset_are_told(tmp_path):
    expect_one(node.check_faults(tmp_path), OK, "none ")
    fault = Fault(Reason.ECC, 1.0, "3 uncorrectable memory errors", True, "reset it")
    FaultMemory(tmp_path).save([Remembered(UUID, fault, Counters())])
    expect_one(node.check_faults(tmp_path), FAIL, UUID)
    expect_one(node.check_faults(tmp_path), FAIL, "reset it")
    FaultMemory(tmp_path).save([])
    expect_one(node.check_faults(tmp_path), OK)
    for damaged in ("{", "[]", "{}"):
        (tmp_path / FILE).write_text(damaged)
        expect_one(node.check_faults(tmp_path), WARN)
