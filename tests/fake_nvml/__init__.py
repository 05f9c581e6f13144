"""A stand-in for NVIDIA's libnvidia-ml.so.1, told by a file what to say. See nvml.c for the format.

`FakeNvml` writes that file; a process started with its `environment()` finds the library.
"""

import dataclasses
import fcntl
import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

SOURCE = Path(__file__).with_name("nvml.c")

XID_EVENTS = 0x8
ALL_EVENTS = XID_EVENTS | 0x8000


Processes = tuple[tuple[int, int | None], ...]
"""PIDs, and how much memory each has."""


NO_LIMIT = 2**64 - 1
"""A hard limit that is none."""


@dataclass(frozen=True)
class Limit:
    """What is set for a cgroup on a GPU, in bytes."""

    soft: int
    hard: int


def build(directory: Path, *flags: str) -> Path:
    """Compiles the library with `cc` into that directory; raises CalledProcessError."""
    library = directory / "libnvidia-ml.so.1"
    command = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run(
        [*command, *flags, "-o", library, SOURCE], check=True, capture_output=True, text=True
    )
    return library


@dataclass(frozen=True)
class FakeGpu:
    """What a GPU answers. None: it does not offer that value. Memory is in MiB.

    `error` is the NVML error that its memory call answers; a new `epoch` makes older handles lost;
    every call takes `hang` seconds, or until that is 0 again, and answers `call_error`; `call`
    names the one call ("DeviceGetName") that these two are of. `set_mode_error` is what setting its
    compute mode answers, `handle_error` what asking for its handle does. `compute` and `mps` are
    its two lists of processes, `compute_error` and `mps_error` what asking for them answers
    instead; that takes `list_hang` seconds. `limits_error` is what asking for memory limits and
    setting them answers, `set_limits_error` what setting them does.
    """

    uuid: str
    name: str = "NVIDIA L4"
    memory: int = 23034
    reserved: int = 512
    used: int = 0
    bus: str = "00000000:3B:00.0"
    cc: tuple[int, int] = (8, 9)
    numa: int | None = None
    mig: int | None = None
    compute_mode: int | None = 0
    set_mode_error: int = 0
    handle_error: int = 0
    lost: bool = False
    error: int = 0
    ecc: int | None = 0
    remap_failed: int | None = 0
    remap_pending: int | None = 0
    action: int | None = None
    energy: int | None = None
    compute: Processes | None = ()
    mps: Processes | None = ()
    compute_error: int = 0
    mps_error: int = 0
    process_v3: bool = True
    list_hang: float = 0
    events: int | None = ALL_EVENTS
    memory_v2: bool = True
    limits_error: int = 0
    set_limits_error: int = 0
    epoch: int = 0
    hang: float = 0
    call_error: int = 0
    call: str | None = None

    def line(self) -> str:
        """The GPU in the words of the control file."""
        values = dataclasses.asdict(self)
        del values["numa"]  # sysfs's, not NVML's
        values["cc"] = ".".join(map(str, self.cc))
        values["name"] = f'"{self.name}"'
        return "card " + " ".join(f"{key}={_word(value)}" for key, value in values.items())


@dataclass
class FakeNvml:
    """One set of GPUs, as the fake library and the folders of the kernel show them.

    Every change is there at once, as a whole, for every process that uses `environment()`. Memory
    can be limited with a `driver` from 615 on; with `dmem` on cgroups that have a file dmem.max.
    """

    library: Path
    directory: Path
    gpus: list[FakeGpu] = field(default_factory=list)
    driver: str = "570.1"
    init_code: int = 0
    wait_code: int = 0
    """Milliseconds; a driver is not asked at all, but the fake one has to look at its file."""
    system_call: str = ""
    dmem: bool = False
    _events: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.numa_root.mkdir(parents=True)
        self.proc_root.mkdir()
        self.limits_file.touch()
        self.limits_file.chmod(0o666)  # the agent and what sets the limits are different users
        self._write()

    @property
    def control(self) -> Path:
        """The control file."""
        return self.directory / "control"

    @property
    def log(self) -> Path:
        """What was set, a line each."""
        return self.directory / "log"

    @property
    def limits_file(self) -> Path:
        """The memory limits that were set; see nvml.c."""
        return self.directory / "limits"

    @property
    def numa_root(self) -> Path:
        """Stands for /sys/bus/pci/devices."""
        return self.directory / "pci"

    @property
    def proc_root(self) -> Path:
        """Stands for /proc/driver/nvidia/gpus. Only ever grows."""
        return self.directory / "proc"

    def environment(self) -> Mapping[str, str]:
        """What a process needs in its environment to find the library and this file."""
        return {
            "LD_LIBRARY_PATH": str(self.library.parent),
            "FAKE_NVML_CONTROL": str(self.control),
            "FAKE_NVML_LOG": str(self.log),
            "FAKE_NVML_LIMITS": str(self.limits_file),
        }

    def set_gpus(self, *gpus: FakeGpu) -> None:
        """Makes these the GPUs of the machine. NVML sees new ones when it is opened anew."""
        self.gpus = list(gpus)
        for shared in gpus:
            domain, _, rest = shared.bus.lower().partition(":")
            bus_id = f"{domain[-4:]}:{rest}".replace("/", "_")
            (self.proc_root / bus_id).mkdir(exist_ok=True)
            (self.numa_root / bus_id).mkdir(exist_ok=True)
            if shared.numa is not None:
                (self.numa_root / bus_id / "numa_node").write_text(f"{shared.numa}\n")
        self._write()

    def update(self, uuid: str, **changes: object) -> None:
        """Changes fields of one GPU."""
        self.gpus = [
            dataclasses.replace(shared, **changes) if shared.uuid == uuid else shared  # type: ignore[arg-type]
            for shared in self.gpus
        ]
        self._write()

    def xid(self, uuid: str | None, xid: int) -> float:
        """Reports an XID on that GPU, or on one that is not known; when (monotonic)."""
        self._events.append(f"event {len(self._events) + 1} {uuid or '-'} {xid}")
        return self._write()

    def action_event(self, uuid: str | None) -> None:
        """Reports that the GPU's recovery action has changed."""
        self._events.append(f"action_event {len(self._events) + 1} {uuid or '-'}")
        self._write()

    def init_error(self, code: int | None) -> None:
        """Makes opening NVML fail, or work again."""
        self.init_code = code or 0
        self._write()

    def wait_error(self, code: int | None) -> None:
        """Makes waiting for events fail, or work again."""
        self.wait_code = code or 0
        self._write()

    def set_driver(self, version: str, *, dmem: bool = False) -> None:
        """Makes this the driver of the machine."""
        self.driver, self.dmem = version, dmem
        self._write()

    def limits(self) -> dict[tuple[str, str], Limit]:
        """The memory limits that are set, by UUID and the real path of the cgroup."""
        found: dict[tuple[str, str], Limit] = {}
        with self.limits_file.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            while line := file.readline():
                kind, uuid, soft, hard, length = line.split()
                path = os.fsdecode(file.read(int(length)))
                file.read(1)
                if kind == b"limit":
                    found[uuid.decode(), path] = Limit(int(soft), int(hard))
        return {place: limit for place, limit in found.items() if limit != Limit(0, NO_LIMIT)}

    def use(self, uuid: str, cgroup: Path | str, used: int) -> None:
        """So many bytes of that GPU are in use by the processes of that cgroup from now on."""
        path = os.fsencode(os.path.realpath(cgroup))
        with self.limits_file.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(b"used %s %d 0 %d\n%s\n" % (uuid.encode(), used, len(path), path))

    def system_hang(self, call: str) -> None:
        """Makes that call ("DeviceGetCount_v2") never return; none where empty."""
        self.system_call = call
        self._write()

    def _write(self) -> float:
        lines = [
            f"driver {self.driver}",
            f"init_error {self.init_code}",
            f"wait_error {self.wait_code}",
            f"system_hang {self.system_call}",
            f"limits_backend {'dmem' if self.dmem else 'misc'}",
            *(shared.line() for shared in self.gpus),
            *self._events,
        ]
        new = self.control.with_name("control.new")
        new.write_text("\n".join(lines) + "\n", "utf-8", errors="surrogateescape")
        now = time.monotonic()
        new.replace(self.control)
        return now


def _word(value: object) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return str(int(value))
        case tuple():
            return ",".join(f"{pid}:{_word(memory)}" for pid, memory in value)
        case _:
            return str(value)
