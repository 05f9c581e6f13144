"""Each check of the doctor when all is well, when something is odd, and when it is wrong."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import anyio
import pytest

from tests.agent_process import environment, running
from tests.fake_nvml import FakeGpu, FakeNvml
from tests.kubelet_peer import KubeletPeer, off_loop
from tests.model.strategies import a_look
from tests.test_status import controlled, report
from tests.web_peer import answering, http
from vgpu_agent import control, store, unixsocket
from vgpu_agent.address import Address
from vgpu_agent.agent import make_daemons
from vgpu_agent.commands.doctor import check_settings, checks, examine, look_once, preflight
from vgpu_agent.commands.doctor.checks import Timeouts, render_json, render_text, worst
from vgpu_agent.drivers import make_driver
from vgpu_agent.errors import DriverError, SettingsError
from vgpu_agent.gpu import memory
from vgpu_agent.gpu.simulated import SimulatedDriver, simulated_gpus
from vgpu_agent.limiting import make_looker
from vgpu_agent.model.acceptance import Acceptance, Refusal
from vgpu_agent.model.devices import Effect, Fault, Reason
from vgpu_agent.model.facts import ComputeMode, Cordon, MpsLook, Reading
from vgpu_agent.model.health import Counters
from vgpu_agent.model.place import Place, Step
from vgpu_agent.model.rules import MIB
from vgpu_agent.model.snapshot import FirstSeen
from vgpu_agent.observe.report import (
    Check,
    KubeletReport,
    Verdict,
    to_json,
)
from vgpu_agent.settings import Settings
from vgpu_agent.settings_reading import assume, embedded
from vgpu_agent.unixsocket import refusal

OK, WARN, FAIL = Verdict.OK, Verdict.WARN, Verdict.FAIL

GPUS = simulated_gpus(2, "model", 24 * 1024 * MIB, (0,))
UUID = GPUS[0].uuid
PLACE = Place("node-1", "gpus", "agent-1")
SOON = Timeouts(ask=0.1, call=0.1, look=0.4, leave=0.1)


def said(checks, name: str) -> tuple[Verdict, str]:
    """The verdict and the words, advice and commands included, of the one check of that name."""
    (check,) = [check for check in checks if check.name == name]
    assert check.advice or check.verdict is OK, f"{check} does not say what to do"
    commands = "".join(f" {step.command}" for step in check.steps)
    return check.verdict, f"{check.detail} {check.advice}{commands}"


def expect(checks: Iterable[Check], name: str, verdict: Verdict, words: str = "") -> None:
    """That the one check of that name has this verdict and, among others, these words."""
    found, text = said(checks, name)
    assert (found, words in text) == (verdict, True), text


@contextmanager
def listening(path: Path) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield


def stale(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def settings_in(kubelet_dir: Path, **changes: object) -> Settings:
    (kubelet_dir / "device-plugins").mkdir(exist_ok=True)
    values = {
        "gpu_driver": "simulated",
        "kubelet_dir": kubelet_dir,
        "state_directory": kubelet_dir / "state",
        "cordon_directory": kubelet_dir / "cordoned",
        "mps_directory": kubelet_dir / "mps",
        "mps_shm_directory": kubelet_dir / "shm",
        "metrics_address": "127.0.0.1:0",
    }
    return embedded(**(values | changes))


class FakeDaemons:
    """Looks as it is told; None hangs."""

    def __init__(self, look: MpsLook | Exception | None) -> None:
        self._look = look

    async def look(self) -> MpsLook:
        if self._look is None:
            await anyio.sleep_forever()
        if isinstance(self._look, Exception):
            raise self._look
        return self._look


async def examined(settings: Settings | SettingsError, **changes):
    options = {
        "environment": {},
        "make_driver": make_driver,
        "make_daemons": lambda _: FakeDaemons(WELL),
    }
    return await examine(settings, **(options | changes))


WELL = a_look(**dict.fromkeys((gpu.uuid for gpu in GPUS), 10))


def one(**changes: object) -> MpsLook:
    """All is well but for the daemon of the first GPU."""
    return replace(WELL, daemons={**WELL.daemons, UUID: replace(WELL.daemons[UUID], **changes)})


# The whole


async def test_with_simulated_gpus_and_a_kubelet_all_is_well(kubelet_dir):
    settings = settings_in(kubelet_dir)
    (kubelet_dir / "pod-resources").mkdir()
    sockets = [kubelet_dir / name / "kubelet.sock" for name in ("device-plugins", "pod-resources")]
    with listening(sockets[0]), listening(sockets[1]):
        found = await examined(settings)
    assert worst(found) is OK, render_text(found)
    assert said(found, "GPUs") == (OK, "2 of 2 GPUs are shared, as 20 vGPUs ")
    assert "none serves" in said(found, "agent")[1]
    assert [each.name for each in found if "mps" in each.name] == ["mps"]


async def test_without_a_kubelet_something_would_stop_the_agent(kubelet_dir):
    found = await examined(settings_in(kubelet_dir))
    assert [each.name for each in found if each.verdict is FAIL] == ["kubelet socket"]
    assert worst(found) is FAIL


async def test_wrong_settings_are_said_and_the_rest_is_checked_with_what_is_right(kubelet_dir):
    error = SettingsError("2 settings are wrong:\n  VGPU_A='1' is wrong\n  VGPU_B='2' is wrong")
    given = {
        "VGPU_GPU_DRIVER": "simulated",
        "VGPU_SIMULATED_GPUS": "3",
        "VGPU_REPLICAS": "many",
        "VGPU_KUBELET_DIR": str(kubelet_dir),
        "VGPU_STATE_DIRECTORY": str(kubelet_dir / "state"),
    }
    found = await examined(error, environment=given)
    assert [each.detail for each in found[:2]] == ["VGPU_A='1' is wrong", "VGPU_B='2' is wrong"]
    assert said(found, "GPUs")[1].startswith("3 of 3 GPUs are shared, as 30 vGPUs")
    assert str(kubelet_dir) in said(found, "kubelet directory")[1]


async def test_a_check_that_stumbles_is_a_failed_check_and_the_others_go_on(
    kubelet_dir, monkeypatch
):
    def stumble(*_: object) -> None:
        raise RuntimeError("stumbled")

    monkeypatch.setattr(preflight, "check_kubelet", stumble)
    found = await examined(
        settings_in(kubelet_dir), make_driver=stumble, make_daemons=lambda _: stumble()
    )
    for name in ("kubelet", "driver", "mps"):
        expect(found, name, FAIL, "RuntimeError: stumbled")
    assert said(found, "metrics address")[0] is OK


async def test_what_hangs_does_not_hold_up_the_rest(kubelet_dir, monkeypatch):
    going_on = threading.Event()
    monkeypatch.setattr(preflight, "check_metrics", lambda *_: going_on.wait(10))
    driver = SimulatedDriver(GPUS)
    driver.hang(UUID, hangs=True)
    settings = settings_in(kubelet_dir)
    settings.state_directory.mkdir()
    start = time.monotonic()
    with listening(settings.state_directory / control.SOCKET):
        found = await examined(
            settings,
            make_driver=lambda _: driver,
            make_daemons=lambda _: FakeDaemons(None),
            timeouts=SOON,
        )
    took = time.monotonic() - start
    going_on.set()
    assert took < 3
    assert any("the driver did not answer within 0.1 s" in each.detail for each in found)
    for name in ("agent", "mps", "metrics address"):
        expect(found, name, FAIL, "no answer within 0.")
    expect(found, "kept faults", OK)


async def test_a_look_that_never_ends_is_cut_off(kubelet_dir):
    class Stuck(SimulatedDriver):
        async def __aexit__(self, *_: object) -> None:
            await anyio.sleep_forever()

    driver = Stuck(GPUS)
    driver.hang(UUID, hangs=True)
    with anyio.fail_after(3):
        found = await examined(
            settings_in(kubelet_dir),
            make_driver=lambda _: driver,
            timeouts=replace(SOON, call=5.0, look=0.2),
        )
    expect(found, "driver", FAIL, "no answer within 0.2 s")


def test_all_limits_of_time_together_are_below_ten_seconds():
    timeouts = Timeouts()
    assert timeouts.ask + timeouts.look + timeouts.leave < 10
    assert 2 * timeouts.call < timeouts.look  # a scan and a probe


# The running agent


async def test_what_a_running_agent_says_is_what_doctor_says(kubelet_dir):
    """Its driver is not opened again, and nothing is ok where it says otherwise."""

    def opened(_: Settings) -> SimulatedDriver:
        raise AssertionError("the agent was to be asked")

    settings = settings_in(kubelet_dir)
    words = "another process serves /x/vgpu.sock: another agent for it"
    rival = "at vgpu.sock (process 7, vgpu-agent)"
    no = "No new vGPU pods: another plugin serves k8s.amazonaws.com/vgpu"
    rivals = report(
        kubelet=KubeletReport(False, False, 0, words, rival, None),
        acceptance=Acceptance(False, no, (Refusal.RIVAL,)),
    )
    async with controlled(settings.state_directory, to_json(rivals).decode()):
        with listening(settings.plugin_directory / "kubelet.sock"):
            found = await examined(settings, make_driver=opened)
    assert said(found, "agent")[0] is OK
    expect(found, "node", FAIL, no)
    expect(found, "kubelet", FAIL, words)
    assert "kubectl get daemonsets -A -o wide" in render_text(found)
    assert worst(found) is FAIL
    assert not [each for each in found if each.name == "kept faults"]


async def test_an_agent_of_another_format_is_a_warning_and_the_node_is_looked_at(kubelet_dir):
    settings = settings_in(kubelet_dir)
    async with controlled(settings.state_directory, '{"format": 77}'):
        found = await examined(settings)
    expect(found, "agent", WARN, "a report of format 77")
    assert said(found, "GPUs")[0] is OK


@pytest.mark.slow
async def test_of_a_running_agent_the_endpoint_and_the_port_are_its_own(kubelet_dir):
    with KubeletPeer(kubelet_dir) as kubelet, running(kubelet_dir) as agent:
        await off_loop(kubelet.wait_list, 1)
        await off_loop(agent.get, "/healthz")  # all of it is loaded then
        settings = settings_in(kubelet_dir, metrics_address=f"127.0.0.1:{agent.port}")
        found = await examined(settings)
        bad = [each.name for each in found if each.verdict is not OK]
        # That kubelet has none.
        assert bad == ["podresources", "podresources socket"], render_text(found)
        assert "served by the running agent" in said(found, "endpoint")[1]
        assert said(found, "kubelet")[0] is OK
        assert "is served by the running agent" in said(found, "metrics address")[1]
        # Not of the agent of another state directory.
        elsewhere = settings_in(kubelet_dir, state_directory=kubelet_dir / "other")
        assert said(await examined(elsewhere), "endpoint")[0] is FAIL


@pytest.mark.slow
async def test_two_agents_for_one_resource_fail(kubelet_dir):
    """What the agent's log says, doctor says too."""
    with KubeletPeer(kubelet_dir) as kubelet, running(kubelet_dir) as first:
        await off_loop(kubelet.wait_list, 1)
        with running(kubelet_dir, VGPU_STATE_DIRECTORY=str(kubelet_dir / "second")) as second:
            await off_loop(second.wait_line, "another process serves")
            await off_loop(second.get, "/healthz")
            settings = settings_in(kubelet_dir, state_directory=kubelet_dir / "second")
            found = await examined(settings)
            expect(found, "kubelet", FAIL, "another process serves")
            expect(found, "endpoint", FAIL, str(first.process.pid))


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


def test_commands_stand_below_the_advice_and_once():
    steps = (Step("why", "kubectl get nodes"),)
    found = [replace(REPORT[2], name=name, steps=steps) for name in ("a", "b")]
    assert render_text(found).splitlines()[:7] == [
        "fail  a  away",
        "         for long",
        "         -> start it",
        "      # why",
        "      kubectl get nodes",
        "fail  b  away",
        "         for long",
    ]
    assert render_text(found).splitlines()[7] == "         -> as for a"


def test_the_json_says_the_same():
    parsed = json.loads(render_json(REPORT))
    assert parsed["verdict"] == "fail"
    assert [store.decoded(Check, each, "check") for each in parsed["checks"]] == list(REPORT)


def test_the_worst_verdict_counts():
    assert [worst(REPORT[:n]) for n in range(4)] == [OK, OK, WARN, FAIL]
    assert checks.unexpected("x", ValueError("y")).verdict is FAIL


# Settings


def test_right_settings_are_counted():
    given = {"VGPU_REPLICAS": "3", "vgpu_sharing": "mps", "PATH": "/bin"}
    found = check_settings(embedded(), given)
    expect(found, "settings", OK, "2 VGPU_* variables are set, and right")


def test_unknown_settings_are_warned_about_with_the_nearest_name():
    given = {"VGPU_REPLICS": "3", "VGPU_XYZ_QQQQ": ""}
    _, typo, strange = check_settings(embedded(), given)
    expect([typo], "settings", WARN, "did you mean VGPU_REPLICAS?")
    assert said([strange], "settings")[1].startswith("VGPU_XYZ_QQQQ: unknown setting, ignored ")


def test_what_is_assumed_keeps_what_is_right():
    found = assume({"VGPU_REPLICAS": "0", "vgpu_log_level": "debug", "VGPU_SHARING": "x"})
    assert (found.replicas, found.log_level, found.sharing) == (10, "debug", "mps")
    # The default of one that does not fit another that is set.
    found = assume({"VGPU_MPS_MAX_CLIENTS": "5", "VGPU_LOG_LEVEL": "debug"})
    assert found.mps_max_clients is None


# Driver and GPUs, as the real pynvml shows them

CHILD = """
import os, sys, anyio
from vgpu_agent import settings_reading
from vgpu_agent.drivers import make_driver
from vgpu_agent.commands.doctor import examine
from vgpu_agent.commands.doctor.checks import render_json

async def main():
    checks = await examine(
        settings_reading.load(), environment=os.environ, make_driver=make_driver,
        make_daemons=lambda _: None,
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
        "VGPU_STATE_DIRECTORY": str(kubelet_dir / "state"),
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
    parsed = [store.decoded(Check, each, "check") for each in json.loads(done.stdout)["checks"]]
    return [replace(check, verdict=Verdict(check.verdict)) for check in parsed]


def shared(number: int, **values) -> FakeGpu:
    return FakeGpu(f"GPU-{number}", bus=f"00000000:{number + 1:02X}:00.0", **values)


@pytest.mark.slow
def test_gpus_of_the_driver_are_judged_one_by_one(kubelet_dir, fake_nvml):
    fake_nvml.set_gpus(
        shared(0),
        shared(1, mig=1),
        shared(2, compute_mode=3),
        shared(3, cc=(6, 1), remap_pending=1),
        shared(4, compute_mode=2, action=1),
        shared(5, error=999),
    )
    found = examined_with(fake_nvml, kubelet_dir)
    for name, verdict, words in (
        ("driver", OK, "version 570.1"),
        ("GPUs", OK, ""),
        ("GPU 0", OK, "NVIDIA L4 GPU-0, 23034 MiB; 10 vGPUs of 2252 MiB"),
        ("GPU 1", WARN, "nvidia-smi -i 1 -mig 0"),
        ("GPU 2", FAIL, "EXCLUSIVE_PROCESS"),
        ("GPU 2", FAIL, "nvidia-smi -i GPU-2 -c DEFAULT"),
        ("GPU 3", OK, ""),
        ("GPU 3 note", WARN, ""),
        ("GPU 5", FAIL, ""),
    ):
        expect(found, name, verdict, words)
    both = said(found, "GPU 4")[1]
    assert "PROHIBITED" in both
    assert "a reset of the GPU" in both
    assert "nvidia-smi --gpu-reset -i GPU-4" in both


@pytest.mark.slow
def test_under_mps_old_gpus_are_excluded_and_the_mode_is_the_pods(kubelet_dir, fake_nvml):
    fake_nvml.set_gpus(shared(0, cc=(6, 1)), shared(1, compute_mode=3))
    found = examined_with(fake_nvml, kubelet_dir, VGPU_SHARING="mps")
    expect(found, "GPU 0", WARN, "VGPU_SHARING=time-slicing")
    # Without a daemon, nothing else is wrong with it.
    assert "mps since" in said(found, "GPU 1")[1]


@pytest.mark.slow
def test_without_a_library_it_is_said_where_it_comes_from(kubelet_dir):
    expect(examined_with(None, kubelet_dir), "driver", FAIL, "libnvidia-ml.so.1")


@pytest.mark.slow
def test_a_gpu_that_hangs_the_driver_is_said_in_time(kubelet_dir, fake_nvml):
    fake_nvml.set_gpus(shared(0, hang=60))
    start = time.monotonic()
    found = examined_with(fake_nvml, kubelet_dir)
    assert time.monotonic() - start < 10
    expect(found, "GPU 0", FAIL, "index 0 does not answer")
    expect(found, "GPU 0", FAIL, "a reboot")


# One look at simulated GPUs


async def looked(driver: SimulatedDriver, kubelet_dir: Path, look=WELL, **changes: object):
    """What one look says; where `look` is None, with the daemon of such settings."""
    settings = settings_in(kubelet_dir, **changes)
    daemon = make_daemons(settings, driver) if look is None else FakeDaemons(look)
    return await look_once(settings, lambda _: driver, lambda _: daemon, SOON)


@pytest.mark.parametrize(
    ("reading", "name", "verdict", "words"),
    [
        (Reading(), "GPU 0", OK, "healthy"),
        (Reading(lost=True), "GPU 0", FAIL, "no longer answers"),
        (Reading(remap_pending=True), "GPU 0 note", WARN, "waits for the next reset"),
        (Reading(uncorrectable_ecc=7), "GPU 0", OK, "healthy"),
        (Reading(compute_mode=ComputeMode.EXCLUSIVE_PROCESS), "GPU 0", OK, "healthy"),
        (Reading(compute_mode=ComputeMode.DEFAULT), "GPU 0 note", WARN, "can bypass MPS"),
    ],
)
async def test_one_probe_of_a_gpu_shows_its_health(kubelet_dir, reading, name, verdict, words):
    driver = SimulatedDriver(GPUS)
    driver.show(UUID, reading)
    found = await looked(driver, kubelet_dir)
    expect(found, name, verdict, words)
    assert said(found, "GPU 1")[0] is OK


@pytest.mark.parametrize(
    ("changes", "name", "verdict", "words"),
    [
        ({}, "GPU 0", OK, "10 vGPUs of 2406 MiB"),
        ({"memory_reserved": "24Gi"}, "GPU 0", WARN, "1 MiB for each of 10"),
        ({"device_memory": "1Ti"}, "GPU 0", WARN, "VGPU_DEVICE_MEMORY"),
        ({"replicas_by_gpu": '{"0": 0}'}, "GPU 0", OK, "is excluded"),
    ],
)
async def test_what_a_gpu_is_divided_into_is_said(kubelet_dir, changes, name, verdict, words):
    found = await looked(SimulatedDriver(GPUS), kubelet_dir, None, **changes)
    expect(found, name, verdict, words)


async def test_no_gpu_at_all_and_a_driver_that_fails_are_said(kubelet_dir):
    expect(await looked(SimulatedDriver(()), kubelet_dir), "GPUs", FAIL, "lists no GPU")
    driver = SimulatedDriver(GPUS)
    driver.fail(DriverError("no driver"))
    expect(await looked(driver, kubelet_dir), "driver", FAIL, "no driver")


@pytest.mark.parametrize(
    ("look", "name", "verdict", "words"),
    [
        (one(clients={UUID: 3}), "mps", OK, "2 of 2 GPUs are served, with 3 clients"),
        (MpsLook("nobody has applied"), "mps", FAIL, "no vGPU can be given: nobody has applied"),
        (one(down="it is gone"), "GPU 0", FAIL, "it is gone"),
        (one(fault="FAULT of MPS server 7"), "GPU 0", FAIL, "MPS server 7"),
        (one(busy="process 7 holds it"), "GPU 0 mps", WARN, "process 7"),
        (a_look(**{UUID: 5, GPUS[1].uuid: 10}), "mps settings", WARN, "5 vGPUs instead of 10"),
        (RuntimeError("odd"), "mps", FAIL, "RuntimeError: odd"),
    ],
)
async def test_the_daemon_is_judged_as_the_agent_judges_it(kubelet_dir, look, name, verdict, words):
    found = await looked(SimulatedDriver(GPUS), kubelet_dir, look)
    expect(found, name, verdict, words)


def keep(directory: Path, uuid: str) -> None:
    fault = Fault(Reason.ECC, 1.0, "3 memory errors", Effect.UNTIL_RESET)
    first = {uuid: FirstSeen(0, 24 * 1024 * MIB, 0)}
    kept = memory.Kept(store.boot_id(), first, {uuid: (fault,)}, {uuid: Counters()})
    store.write(directory / memory.FILE, asdict(kept))


async def test_cordons_are_shown_as_the_next_agent_will(kubelet_dir):
    directory = kubelet_dir / "cordoned"
    store.write(directory / f"{UUID}.json", asdict(Cordon(1.0, "fan")))
    store.write(directory / "GPU-gone.json", asdict(Cordon(1.0, "sent in")))
    found = await looked(SimulatedDriver(GPUS), kubelet_dir)
    expect(found, "GPU 0", WARN, ": fan (ends when it is uncordoned)")
    expect(found, "cordoned", WARN, "GPU-gone is cordoned, and gives no vGPUs: sent in")
    assert worst(found) is WARN
    shutil.rmtree(directory)
    directory.write_text("")
    found = await looked(SimulatedDriver(GPUS), kubelet_dir)
    expect(found, "cordons", WARN, f"cannot read {directory}: Not a directory")


async def test_gpus_that_wait_for_a_reset_are_shown_as_the_next_agent_will(kubelet_dir):
    state = kubelet_dir / "state"
    found = await looked(SimulatedDriver(GPUS), kubelet_dir)
    assert said(found, "kept faults") == (OK, "none ")
    keep(state, UUID)
    found = await looked(SimulatedDriver(GPUS), kubelet_dir)
    expect(found, "GPU 0", FAIL, "3 memory errors (ends by a reset) delete the pods")
    assert said(found, "GPU 1")[0] is OK
    # Of a GPU that is not there.
    keep(state, "GPU-gone")
    found = await looked(SimulatedDriver(GPUS), kubelet_dir)
    (gone,) = [each for each in found if each.name == "kept faults" and each.verdict is FAIL]
    assert "GPU-gone is not listed, and waits for a reset: 3 memory errors" in gone.detail
    # Of another boot.
    data = dict(store.read(state / memory.FILE) or {})
    store.write(state / memory.FILE, data | {"boot_id": "other"})
    found = await looked(SimulatedDriver(GPUS), kubelet_dir)
    assert said(found, "kept faults") == (OK, "none ")
    for damaged in ("{", "[]"):
        (state / memory.FILE).write_text(damaged)
        found = await looked(SimulatedDriver(GPUS), kubelet_dir)
        assert said(found, "kept faults")[0] is WARN


def test_what_only_looks_at_memory_limits_turns_no_controller_on():
    settings = embedded(memory_limits="driver", memory_limits_enable_controller="on")
    for enforce in (True, False):
        looker = make_looker(settings, SimulatedDriver(()), enforce=enforce)
        assert (looker.enforce, looker.finder.enable) == (enforce, enforce)


# MPS on the node


def test_another_mps_on_the_node_is_warned_about(kubelet_dir):
    path = kubelet_dir / "nvidia-mps"

    def check(verdict: Verdict, words: str) -> None:
        expect([preflight.check_other_mps(path)], "other mps", verdict, words)

    check(OK, "is not there")
    path.mkdir()
    check(WARN, "left behind")
    with listening(path / "control"):
        check(WARN, "end that daemon")


def test_the_daemons_directories_must_be_there_and_open(tmp_path, monkeypatch):
    root = tmp_path / "mps"
    pipe = root / "GPU-1" / "pipe"

    def check(name: str, verdict: Verdict, words: str = "") -> None:
        expect(preflight.check_mps_directories(root, PLACE), f"mps {name}", verdict, words)

    check("directory", FAIL)
    pipe.mkdir(parents=True, mode=0o755)
    assert worst(preflight.check_mps_directories(root, PLACE)) is OK
    check("pipe", OK, "(owner ")
    pipe.chmod(0o700)
    check("pipe", WARN, "`chmod 705 ")
    pipe.chmod(0o755)
    for kind, verdict in (("container_file_t", OK), ("var_run_t", WARN)):
        label = f"system_u:object_r:{kind}:s0\0".encode()
        monkeypatch.setattr(os, "getxattr", lambda *_, label=label: label)
        check("pipe", verdict, kind)
    pipe.rmdir()
    pipe.touch()
    check("pipe", FAIL, "is not a directory")


async def test_mps_is_checked_for_real_gpus_only(kubelet_dir, tmp_path):
    async def names(**changes: object) -> set[str]:
        found = await examined(
            settings_in(kubelet_dir, **changes),
            make_driver=lambda _: SimulatedDriver(GPUS),
            other_mps=tmp_path / "none",
        )
        return {each.name for each in found if "mps" in each.name}

    every = {"mps directory", "other mps", "mps"}
    assert await names(gpu_driver="nvml", sharing="mps") == every
    assert await names(gpu_driver="nvml", sharing="time-slicing") == {"other mps"}
    assert await names(gpu_driver="simulated", sharing="mps") == {"mps"}
    assert await names(gpu_driver="simulated", sharing="time-slicing") == set()


# The node


@pytest.mark.parametrize(("length", "verdict"), [(107, OK), (108, FAIL)])
def test_the_paths_of_sockets_must_fit(length, verdict):
    path = Path("/" + "a" * (length - 1))
    words = f"{length} of 107 bytes"
    expect(preflight.check_socket_paths(path), "socket path", verdict, words)
    assert refusal(path) is not None


def test_the_kubelet_must_have_its_directory_and_listen(kubelet_dir, monkeypatch):
    directory = kubelet_dir / "device-plugins"
    path = directory / "kubelet.sock"

    def check(name: str, verdict: Verdict, words: str) -> None:
        expect(preflight.check_kubelet(directory), f"kubelet {name}", verdict, words)

    check("directory", FAIL, "No such file")
    directory.mkdir()
    check("socket", FAIL, "No such file")
    stale(path)
    check("socket", FAIL, "Connection refused")
    path.unlink()
    with listening(path):
        assert worst(preflight.check_kubelet(directory)) is OK
        monkeypatch.setattr(os, "access", lambda *_: False)
        check("directory", FAIL, "not writable from here")


def test_a_kubelet_whose_directories_are_elsewhere_is_found(kubelet_dir):
    """`--root-dir` moves one of them, and the other not."""
    moved, usual = kubelet_dir / "moved", kubelet_dir / "usual"
    plugins, pods = usual / "device-plugins", moved / "pod-resources"
    for each in (plugins, pods, moved / "device-plugins"):
        each.mkdir(parents=True)

    known = (usual, moved)

    def kubelet(at: Path, verdict: Verdict, words: str) -> None:
        expect(preflight.check_kubelet(at, known), "kubelet socket", verdict, words)

    def podresources(at: Path, verdict: Verdict, words: str) -> None:
        found = preflight.check_podresources(at, known)
        expect([found], "podresources socket", verdict, words)

    kubelet(plugins, FAIL, f"nor at {moved / 'device-plugins'}")
    podresources(moved, WARN, f"nor at {usual / 'pod-resources'}")
    with listening(plugins / "kubelet.sock"), listening(pods / "kubelet.sock"):
        kubelet(plugins, OK, f"listens at {plugins}")
        podresources(moved, OK, f"listens at {pods}")
        kubelet(moved / "device-plugins", FAIL, f"set VGPU_DEVICE_PLUGIN_DIR={plugins}")
        podresources(usual, WARN, f"set VGPU_KUBELET_DIR={moved}")


def test_our_own_endpoint_is_free_stale_or_somebodys(kubelet_dir, monkeypatch):
    path, control_path = kubelet_dir / "vgpu.sock", kubelet_dir / "control.sock"

    def check(verdict: Verdict, words: str, agent=None) -> None:
        found = preflight.check_endpoint(path, control_path, agent, "a/b", PLACE)
        expect([found], "endpoint", verdict, words)

    check(OK, "is free")
    path.mkdir()
    check(FAIL, "is not a socket")
    path.rmdir()
    stale(path)
    check(OK, "stale")
    path.unlink()
    with listening(path):
        check(FAIL, "a rival for a/b remove one of the two")
        check(FAIL, f"another process serves {path} (process {os.getpid()}, ")
        check(FAIL, "another process", report())  # it is not that agent's
        with listening(control_path):
            check(OK, "the running agent", report())
            # In containers of different PID namespaces nobody has a PID: the agent's word counts.
            monkeypatch.setattr(preflight, "listener_pid", lambda _: None)
            check(OK, "the running agent", report())
            taken = report(kubelet=KubeletReport(False, False, 0, "taken", None, None))
            check(FAIL, "another process serves", taken)


def test_the_other_plugins_of_the_node_are_named_the_newest_first(tmp_path):
    def said_of(directory: Path) -> str:
        return said([preflight.check_plugins(directory, "vgpu.sock")], "other plugins")[1]

    assert said_of(tmp_path / "none").strip() == f"in {tmp_path}/none: no other"
    stale(tmp_path / "stale.sock")
    (tmp_path / "kubelet_internal_checkpoint").touch()
    names = ("vgpu.sock", "kubelet.sock", "nvidia-gpu.sock", "nvidia-aws-vgpu.sock")
    with ExitStack() as there:
        for name in names:
            there.enter_context(listening(tmp_path / name))
        process = f"(process {os.getpid()}, "
        words = f"in {tmp_path}: nvidia-aws-vgpu.sock {process}"
        assert said_of(tmp_path).startswith(words)
        assert said_of(tmp_path).count(process) == 2
        assert f"nvidia-gpu.sock {process}" in said_of(tmp_path)


def test_of_a_listener_that_cannot_be_seen_the_socket_is_named(tmp_path, monkeypatch):
    path = tmp_path / "nvidia-gpu.sock"
    with listening(path):
        pid = os.getpid()
        assert unixsocket.listener(path, tmp_path) == f"nvidia-gpu.sock (process {pid})"
        monkeypatch.setattr(unixsocket, "listener_pid", lambda _: None)
        assert unixsocket.listener(path) == "nvidia-gpu.sock"


@pytest.mark.parametrize(
    ("answer", "verdict", "words"),
    [
        (http("ok\n"), OK, "running agent"),
        (http("<html>"), FAIL, "VGPU_METRICS_ADDRESS"),
    ],
)
def test_the_metrics_address_is_the_agents_taken_or_free(answer, verdict, words):
    with answering(answer) as address:
        expect(
            [preflight.check_metrics(address)],
            "metrics address",
            verdict,
            words,
        )
    for free in (address, Address("127.0.0.1", 0)):
        expect([preflight.check_metrics(free)], "metrics address", OK, "is free")


@pytest.mark.parametrize("name", ["state directory", "cordon directory"])
def test_what_is_kept_should_be_writable(tmp_path, monkeypatch, name):
    def check(path: Path, verdict: Verdict, words: str) -> None:
        found = preflight.check_kept_directory(name, path, "it forgets")
        expect([found], name, verdict, words)

    file = tmp_path / "file"
    file.touch()
    check(tmp_path, OK, "writable")
    check(tmp_path / "a" / "b", OK, "the agent makes it")
    check(file, WARN, "is not a directory")
    check(file / "below", WARN, "Not a directory")
    monkeypatch.setattr(os, "access", lambda *_: False)
    for path in (tmp_path, tmp_path / "a"):
        variable = f"VGPU_{name.upper().replace(' ', '_')}"
        check(path, WARN, f"or set {variable}: without it it forgets")
