"""`tests.on_gpu` from one end to the other, with stand-ins for the GPU's libraries and programs."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import fake_cuda
from tests.agent_process import REPOSITORY
from tests.fake_nvml import FakeGpu, FakeNvml
from tests.on_gpu import driver_limits, load, reach, runner, wheels
from tests.on_gpu.__main__ import LIMIT

UUID = "GPU-0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0"

CGROUPS: tuple[str, ...] = ()
"""What a command runs in where the machine has cgroups v2 beside v1 only."""
if not Path("/sys/fs/cgroup/cgroup.controllers").exists() and os.geteuid() == 0:
    bound = 'mount --bind /sys/fs/cgroup/unified /sys/fs/cgroup; exec "$@"'
    CGROUPS = ("unshare", "--mount", "sh", "-c", bound, "sh")

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for mounts of its own")


def eventually(check, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


@dataclass
class Machine:
    """One with a GPU, or so its programs think. `place` has its temporary files, `out` results."""

    place: Path
    out: Path
    variables: dict[str, str]
    nvml: FakeNvml

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*CGROUPS, sys.executable, *arguments],
            cwd=REPOSITORY,
            env={**os.environ, **self.variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, **variables: str) -> tuple[int, str]:
        self.variables |= variables
        with self.start("-m", "tests.on_gpu", *arguments) as process:
            said, _ = process.communicate(timeout=280)
        return process.returncode, said

    @property
    def report(self) -> str:
        return (self.out / "report.md").read_text()

    @property
    def transcript(self) -> list[dict[str, object]]:
        return json.loads((self.out / "transcript.json").read_text())

    def sections(self) -> dict[str, str]:
        """The status of each by its title."""
        return dict(re.findall(r"^## (.*)\n\n\*(.*)\*$", self.report, re.MULTILINE))

    def rows(self, title: str) -> dict[str, list[str]]:
        """The tables of a section: cells by the name of the row."""
        text = self.report.split(f"## {title}\n")[1].split("\n## ")[0]
        cells = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
        return {name: rest for name, *rest in cells}

    def processes(self) -> list[int]:
        """Those of its programs that run: all have its variables."""
        found = []
        for path in Path("/proc").iterdir():
            with suppress(OSError):
                if self.variables["FAKE_NVML_CONTROL"].encode() in (path / "environ").read_bytes():
                    found.append(int(path.name))
        return found

    def assert_clean(self) -> None:
        eventually(lambda: not self.processes(), 5)
        assert list(self.place.iterdir()) == []
        assert str(self.place) not in Path("/proc/self/mountinfo").read_text()


@pytest.fixture
def machine(fake_nvml_library: Path, tmp_path: Path) -> Iterator[Machine]:
    nvml = FakeNvml(fake_nvml_library, tmp_path / "nvml")
    nvml.set_gpus(FakeGpu(UUID, name="NVIDIA H100", memory=81559, cc=(9, 0)))
    library = fake_cuda.build(tmp_path)
    fakes = fake_cuda.environment(library, tmp_path / "bin")
    # A short path, for unix sockets, that other users may enter.
    with tempfile.TemporaryDirectory(prefix="vgpu-") as name:
        place = Path(name)
        place.chmod(0o755)
        paths = f"{fakes['LD_LIBRARY_PATH']}:{fake_nvml_library.parent}"
        variables = {**nvml.environment(), **fakes, "LD_LIBRARY_PATH": paths, "TMPDIR": name}
        yield Machine(place, tmp_path / "out", variables, nvml)


def figures(machine: Machine, titles: list[str]) -> None:
    """Every section came to its end, and every row has something that was measured."""
    assert list(machine.sections()) == titles
    bad = {title: text for title, text in machine.sections().items() if not text.startswith("done")}
    assert bad == {}
    assert "not reached" not in machine.report
    assert "failed: " not in machine.report
    assert all({"at", "section", "what"} <= event.keys() for event in machine.transcript)


@root_only
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_clients_reach_is_reported_in_full(machine):
    code, said = machine.run("reach", str(machine.out), "--load", "0.1")
    assert code == 0, said
    figures(
        machine,
        ["The machine", "Without MPS", "The control program",
         "Which mounts and namespaces reach the daemon", "Which rights the daemon needs",
         "Limits: what is seen, what can be taken", "Malformed limits", "Many clients",
         "Lists of processes", "Two users"],
    )  # fmt: skip
    mounts = machine.rows("Which mounts and namespaces reach the daemon")
    assert len(mounts) == 2 + 2 * 3 * 3 * 2  # with the head and its line
    # The stand-in writes to /dev/shm, and refuses a pipe directory that is read-only.
    works = {name for name, cells in mounts.items() if cells[:2] == ["works", "yes"]}
    assert works == {name for name in mounts if re.search("shm (shared|own), pipe rw", name)}
    assert "MPS_CONNECTION_FAILED" in mounts["UID 1000, mount, /dev/shm none, pipe rw"][0]
    rights = machine.rows("Which rights the daemon needs")
    assert rights["the chart's, with a read-only root"][1] == "works; MPS client: yes"
    started = [event for event in machine.transcript if event["what"] == "daemon"]
    capabilities = [event["rights"] for event in started if event["section"] == "rights"]
    assert "CapEff:\t00000000a80425fb" in capabilities[1]  # what containers have
    assert "NoNewPrivs:\t1" in capabilities[1]
    assert "CapEff:\t0000000000000000" in capabilities[4]
    limits = machine.rows("Limits: what is seen, what can be taken")
    assert limits["client's, both, as granted"][:4] == ["yes", "13", "7753, 81559", "81559"]
    assert limits["client's, both, as granted"][-1] == "300"  # the context
    assert limits["none, without MPS"][0] == "no"
    crowd = machine.rows("Many clients")
    assert crowd["clients: 48"][1:] == ["48", "0:"]
    assert crowd["clients: 49"][1].startswith("48")
    assert "MAX_CLIENTS_REACHED" in crowd["clients: 49"][2]
    users = machine.rows("Two users")
    assert users["server of one user: UID 1000 beside UID 0"][0].startswith("no answer within 1 s")
    assert users["server of one user: UID 1000 beside UID 0"][1].startswith("works after")
    assert users["-multiuser-server: UID 1000 beside UID 0"][0].startswith("works")
    assert "listening" in json.dumps(machine.transcript)  # the daemon's own words
    machine.assert_clean()


@root_only
@pytest.mark.slow
def test_every_answer_of_the_control_program_is_reported(machine):
    """Of the real one, where it was fetched: it needs no GPU. No client reaches that one here."""
    real = next(REPOSITORY.glob(".cache/mps/*/usr/bin/nvidia-cuda-mps-control"), None)
    named = ["--control", str(real)] if real else []
    code, said = machine.run(
        "reach", str(machine.out), "--load", "0.1", "--sections", "control", *named
    )
    assert code == 0, said
    figures(machine, ["The control program"])
    rows = machine.rows("The control program")
    assert rows["8. fresh: get_default_device_pinned_mem_limit 0"][0] == (
        "`4G`" if real else "`4812M`"
    )
    assert rows["24. fresh: no_such_command"][:2] == ['`Unknown command "no_such_command"`', "0"]
    assert rows["stopped (SIGSTOP): get_server_list"][:2] == ["`no answer within 0.1 s`", "none"]
    twin = rows["a second daemon in the directory"]
    assert twin[:2] == ["`An instance of this daemon is already running`", "1"]
    killed = rows["killed: get_server_list"]
    assert killed[:2] == ["`Cannot find MPS control daemon process`", "1"]
    assert float(killed[2]) > 0
    machine.assert_clean()


@root_only
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_load_and_accidents_are_reported_in_full(machine):
    code, said = machine.run("load", str(machine.out), "--load", "0.1")
    assert code == 0, said
    figures(
        machine,
        ["The machine", "Throughput", "Latency beside busy neighbours",
         "A client beyond its memory", "A client's fault", "Kills"],
    )  # fmt: skip
    assert "the kernel is right" in machine.report
    throughput = machine.rows("Throughput")
    for way in ("share", "none", "time-slicing"):
        for count in (1, 2, 5, 10):
            each, together, clients, _, failed = throughput[f"{way}, {count} clients"]
            assert float(together) >= float(each.split()[0]) > 0
            assert clients == ("0" if way == "time-slicing" else str(count))
            assert failed == "none"
    latency = machine.rows("Latency beside busy neighbours")
    median, worst, _, made_with, _, clients, _ = latency["none, 9 neighbours"]
    assert 0 < float(median) <= float(worst)
    assert (made_with, clients) == ("PyTorch", "10")
    memory = machine.rows("A client beyond its memory")
    assert memory["share"][:2] == ["yes", "8053"]
    assert memory["share"][2].startswith("7753 (")
    assert memory["share"][3] == "4026 (not refused), 4026 (not refused)"
    assert memory["time-slicing"][0] == "no"
    fault = machine.rows("A client's fault")
    assert "ILLEGAL_ADDRESS" in fault["illegal access, MPS"][0]
    assert "RPC_FAILURE" in fault["illegal access, MPS"][3]
    assert "FAULT" in fault["illegal access, MPS"][5]
    assert fault["illegal access, time-slicing"][2] == "['works', 'works']"
    kills = machine.rows("Kills")
    assert kills["daemon"][4].endswith("MPS client: no")
    assert kills["daemon, and another is started"][4].endswith("MPS client: yes")
    assert kills["server"][4].endswith("MPS client: yes")
    machine.assert_clean()


@root_only
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_limits_of_the_driver_are_reported_in_full(machine):
    machine.nvml.set_driver("615.71")
    code, said = machine.run("limits", str(machine.out), "--load", "0.1")
    assert code == 0, said
    figures(
        machine,
        ["The machine", "What the driver answers", "Two cgroups with limits",
         "A limit that comes late", "Who may set limits"],
    )  # fmt: skip
    answers = machine.rows("What the driver answers")
    assert answers["read: a new cgroup"] == ["hard none, soft 0, used 0"]
    assert answers["read"] == ["hard 4096, soft 0, used 0"]
    assert answers["read, again"] == answers["read: a new cgroup"]
    two = machine.rows("Two cgroups with limits")
    # Sees the limit, and takes what the context leaves of it; its neighbour does not notice.
    _, _, seen, total, _, taken, less, used, beside = two["time-slicing"]
    assert (seen, total, less, used) == ("7753, 8053", "8053", "300", "8053")
    assert taken.startswith("7753: cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY")
    assert beside == "4026: not refused; works"
    assert two["MPS"][:4] == ["set", "yes", "7753, 8053", "8053"]
    assert two["MPS, with its own limit"][:4] == ["set", "yes", "7753, 81559", "81559"]
    assert two["no limit, time-slicing"][0] == "-"
    assert two["no limit, time-slicing"][5].endswith(": not refused")
    late = machine.rows("A limit that comes late")
    assert late["has twice the limit"][0] == "16208: not refused"
    assert late["takes more"][0].startswith("0: cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY")
    assert late["another client, takes"][1] == "0, 8104"
    assert late["the limit is lifted, takes"][0] == "16208: not refused"
    assert len(machine.rows("Who may set limits")) == 2 + 5
    machine.assert_clean()
    assert not list(Path("/sys/fs/cgroup").glob(f"**/{driver_limits.PREFIX}*"))


@root_only
@pytest.mark.slow
def test_a_driver_that_is_too_old_to_limit_memory_is_named(machine):
    code, said = machine.run("limits", str(machine.out))
    assert code == 0, said
    machine_, *others = machine.sections().values()
    assert machine_.startswith("done")
    assert len(others) == 4
    too_old = "not run: the driver is too old to limit memory: r615 (CUDA 13.4) is the first that"
    assert all(each.startswith(too_old) for each in others)
    machine.assert_clean()


@root_only
@pytest.mark.slow
def test_without_a_control_program_that_is_said_and_the_rest_is_measured(machine):
    control = Path(machine.variables["PATH"].partition(":")[0]) / "nvidia-cuda-mps-control"
    control.unlink()
    sections = "machine,without,mounts,limits"
    code, said = machine.run("reach", str(machine.out), "--load", "0.1", "--sections", sections)
    assert code == 0, said
    assert "no MPS here: nvidia-cuda-mps-control is not on PATH (" in machine.report
    found = machine.sections()
    assert found["Without MPS"].startswith("done")
    assert found["Which mounts and namespaces reach the daemon"].startswith("not run: nvidia-cuda")
    limits = machine.rows("Limits: what is seen, what can be taken")
    assert limits["none, without MPS"][1] == "132"
    assert limits["none"][0].startswith("not run: nvidia-cuda-mps-control is not on PATH")
    machine.assert_clean()


@pytest.mark.slow
def test_without_a_gpu_every_section_says_so(machine):
    Path(machine.variables["FAKE_NVML_CONTROL"]).write_text("init_error 9\n")
    code, said = machine.run("load", str(machine.out))
    assert code == 1, said
    texts = machine.sections().values()
    assert all(
        "there is no NVIDIA GPU to measure on: NVML says Driver Not Loaded" in t for t in texts
    )
    assert machine.run("load", str(machine.out))[0] == 2  # what was found is not overwritten


SECTIONS = """
import signal, subprocess, sys, time
from pathlib import Path
from tests.on_gpu import runner

runner.GRACE = 0.5

def measured(context):
    context.out.table("A table", ("what", "figure"), ("first", "second")).row("first", 1)

def hangs(context):
    subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs "$1"; setsid sleep 600 & wait',
         "sh", context.root]
    )
    signal.signal(signal.SIGTERM, signal.SIG_IGN if sys.argv[2] == "deaf" else runner._cut)
    context.out.say("it hangs")
    time.sleep(600)

def fails(context):
    raise ValueError("no such figure")

sections = [
    runner.Section(name, name, float(sys.argv[4]), function)
    for name, function in (("measured", measured), ("hangs", hangs), ("fails", fails),
                           ("last", measured))
]
Path(sys.argv[1]).mkdir()
good = runner.run("Sections", sections, Path(sys.argv[1]), limit=float(sys.argv[3]), load=1)
sys.exit(not good)
"""


@root_only
@pytest.mark.slow
@pytest.mark.parametrize("how", ["deaf", "orderly"])
def test_a_section_that_hangs_is_cut_off_and_the_rest_goes_on(machine, how):
    with machine.start("-c", SECTIONS, str(machine.out), how, "60", "2") as process:
        process.communicate(timeout=60)
    assert process.returncode == 1
    found = machine.sections()
    assert found["measured"].startswith("done")
    assert found["hangs"].startswith("**cut off** after 2 s (")
    assert found["fails"].startswith("**failed**: ValueError: no such figure")
    assert found["last"].startswith("done")
    assert "- it hangs" in machine.report
    assert re.search(r"- left behind, and ended: .*sleep \d+", machine.report)
    assert machine.rows("last") == {"what": ["figure"], "---": ["---"], "first": ["1"],
                                    "second": ["not reached"]}  # fmt: skip
    machine.assert_clean()


@root_only
@pytest.mark.slow
def test_what_the_time_does_not_reach_is_named(machine):
    with machine.start("-c", SECTIONS, str(machine.out), "deaf", "4", "30") as process:
        process.communicate(timeout=60)
    found = machine.sections()
    assert found["hangs"].startswith("**cut off** after 2 s (")
    assert (found["fails"], found["last"]) == ("not reached", "not reached")
    assert "- no time was left for it" in machine.report
    machine.assert_clean()


@root_only
@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_keeps_what_it_found_and_leaves_nothing(machine, end):
    with machine.start("-c", SECTIONS, str(machine.out), "orderly", "60", "30") as process:
        report = machine.out / "report.md"
        eventually(lambda: report.exists() and "it hangs" in report.read_text())
        process.send_signal(end)
        process.communicate(timeout=20)
    found = machine.sections()
    assert found["measured"].startswith("done")
    assert found["last"] == "not reached"
    assert "it hangs" in [event.get("text") for event in machine.transcript]
    machine.assert_clean()


@pytest.mark.parametrize("sections", [reach.SECTIONS, load.SECTIONS, driver_limits.SECTIONS])
def test_every_section_can_use_its_bound_within_nine_minutes(sections):
    assert sum(each.bound for each in sections) + runner.GRACE + 1 < LIMIT <= 9 * 60


# Wheels


def make_wheel(folder: Path, name: str) -> str:
    """An empty wheel of that name; its SHA-256."""
    folder.mkdir(exist_ok=True)
    distribution, version, *_ = name.split("-")
    info = f"{distribution}-{version}.dist-info"
    with zipfile.ZipFile(folder / name, "w") as archive:
        archive.writestr(f"{distribution}.py", "here = True\n")
        text = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        archive.writestr(f"{info}/METADATA", text)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_every_wheel_that_is_missing_is_named(tmp_path, capsys):
    assert not wheels.check(tmp_path, "3.12")
    said = capsys.readouterr().out
    for it in wheels.locked(wheels.LOCK.read_text()):
        assert f"MISSING {it.name} {it.version} is missing" in said
    assert "MISSING nvidia-ml-py" in said
    assert "pip download --require-hashes" in said
    assert "grpcio-tools" not in said


@pytest.mark.parametrize(
    ("wheel", "problem"),
    [
        ("some_name-1.0-py3-none-any.whl", None),
        ("some_name-1.0-py2.py3-none-any.whl", None),
        ("some_name-1.0-cp312-cp312-manylinux2014_x86_64.manylinux_2_17_x86_64.whl", None),
        ("some_name-1.0-cp39-abi3-manylinux_2_28_x86_64.whl", None),
        ("some_name-0.9-py3-none-any.whl", "is missing (found 0.9)"),
        ("other-1.0-py3-none-any.whl", "is missing"),
        ("some_name-1.0-cp311-cp311-manylinux2014_x86_64.whl", "has no wheel for CPython 3.12"),
        ("some_name-1.0-cp313-abi3-manylinux2014_x86_64.whl", "has no wheel for CPython 3.12"),
        ("some_name-1.0-cp312-cp312-manylinux2014_aarch64.whl", "has no wheel for CPython 3.12"),
        ("some_name-1.0-cp312-cp312-musllinux_1_2_x86_64.whl", "has no wheel for CPython 3.12"),
    ],
)
def test_a_wheel_is_judged_by_its_name(tmp_path, wheel, problem):
    digest = make_wheel(tmp_path, wheel)
    found, _ = wheels.judge(wheels.Locked("some-name", "1.0", {digest}), tmp_path, "3.12")
    assert found == problem if problem is None else found.startswith(problem)


def test_a_wheel_of_another_content_is_refused(tmp_path):
    make_wheel(tmp_path, "some_name-1.0-py3-none-any.whl")
    found, _ = wheels.judge(wheels.Locked("some-name", "1.0", {"0" * 64}), tmp_path, "3.12")
    assert found.startswith("is not the locked one: the SHA-256 of some_name-1.0-py3-none-any.whl")


@pytest.mark.slow
def test_wheels_are_installed_beside_what_the_machine_has(tmp_path, monkeypatch):
    digest = make_wheel(tmp_path / "wheels", "some_name-1.0-py3-none-any.whl")
    lock = tmp_path / "run.txt"
    lock.write_text(f"some-name==1.0 \\\n    --hash=sha256:{digest}\n    # via nothing\n")
    monkeypatch.setattr(wheels, "LOCK", lock)
    assert wheels.check(tmp_path / "wheels", "3.12")
    wheels.install(tmp_path / "wheels", tmp_path / "venv")
    # pytest is this environment's own, as PyTorch is the machine's.
    code = "import some_name, pytest, sys; assert sys.prefix != sys.base_prefix"
    subprocess.run([tmp_path / "venv/bin/python", "-P", "-c", code], check=True)
