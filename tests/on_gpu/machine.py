"""The machine: its first GPU, what NVML says of it, and the programs that are needed."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pynvml

from tests.on_gpu.report import Out, Skip
from vgpu_agent import __version__
from vgpu_agent.model.container import grant
from vgpu_agent.model.devices import Gpu, Inventory, SharedGpu, device_id
from vgpu_agent.model.rules import SharingRules
from vgpu_agent.model.share import Divided, divide

MIB = 1 << 20
CONTROL, SERVER = "nvidia-cuda-mps-control", "nvidia-cuda-mps-server"
PLACES = (
    "/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/nvidia/bin", "/usr/local/cuda/bin",
    "/opt/nvidia/bin", "/run/nvidia/driver/usr/bin",
)  # fmt: skip


def find(program: str, named: str | None = None) -> str | None:
    """Its path: `named`, on PATH, or where drivers put programs."""
    if named is not None:
        return shutil.which(named)
    return shutil.which(program) or shutil.which(program, path=":".join(PLACES))


def no_control() -> str:
    return f"{CONTROL} is not on PATH ({os.environ.get('PATH')}), nor in {', '.join(PLACES)}"


class Machine:
    """The first GPU that NVML lists. Raises Skip where there is none."""

    def __init__(self) -> None:
        try:
            pynvml.nvmlInit()
            self.handle = pynvml.nvmlDeviceGetHandleByIndex(0)
            self.driver = pynvml.nvmlSystemGetDriverVersion()
            memory = pynvml.nvmlDeviceGetMemoryInfo(self.handle, version=pynvml.nvmlMemory_v2)
            self.gpu = Gpu(
                uuid=pynvml.nvmlDeviceGetUUID(self.handle),
                index=0,
                model=pynvml.nvmlDeviceGetName(self.handle),
                memory_bytes=memory.total,
                pci_bus_id=pynvml.nvmlDeviceGetPciInfo(self.handle).busId,
                reserved_bytes=memory.reserved,
                compute_capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(self.handle)),
            )
        except pynvml.NVMLError as error:
            raise Skip(f"there is no NVIDIA GPU to measure on: NVML says {error}") from error

    def used(self) -> int:
        """MiB, without what the driver reserves."""
        found = pynvml.nvmlDeviceGetMemoryInfo(self.handle, version=pynvml.nvmlMemory_v2)
        return found.used // MIB

    def processes(self) -> dict[str, Any]:
        """NVML's three lists: PID and MiB of each process."""
        found: dict[str, Any] = {}
        for name in ("Compute", "MPSCompute", "Graphics"):
            try:
                ask = getattr(pynvml, f"nvmlDeviceGet{name}RunningProcesses_v3")
                found[name] = [(p.pid, (p.usedGpuMemory or 0) // MIB) for p in ask(self.handle)]
            except pynvml.NVMLError as error:
                found[name] = str(error)
        return found

    def container(self, **rules: Any) -> dict[str, str]:
        """The environment of a container with one vGPU of it, by these rules."""
        chosen = SharingRules(**rules)
        divided = divide(self.gpu, chosen)
        if not isinstance(divided, Divided):
            raise Skip(f"the GPU is not shared: {divided.detail}")
        shared = SharedGpu(self.gpu, divided.replicas, usable_bytes=divided.usable_bytes)
        vgpu = device_id(self.gpu.uuid, 0)
        return dict(grant(Inventory((shared,)), [vgpu], chosen).environment)

    def kernels(self, place: Path) -> str:
        """The path of the kernels, built for this GPU."""
        compiler = find("nvcc")
        if compiler is None:
            raise Skip("nvcc is not on PATH, nor where CUDA is installed: there are no kernels")
        major, minor = self.gpu.compute_capability or (0, 0)
        made = place / "kernels.cubin"
        source = Path(__file__).with_name("kernels.cu")
        done = subprocess.run(
            [compiler, "-cubin", f"-arch=sm_{major}{minor}", "-O3", "-o", made, source],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode != 0:
            raise Skip(f"nvcc does not build the kernels: {(done.stdout + done.stderr)[-500:]}")
        made.chmod(0o644)
        return str(made)


def describe(out: Out, named: str | None) -> None:
    """What it was measured on; no MPS is needed, and none is started."""
    out.say(
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, vgpu-agent {__version__}: {' '.join(sys.argv)}"
    )
    control = find(CONTROL, named)
    if control is None:
        out.say(f"no MPS here: {named + ' is no program' if named else no_control()}")
    else:
        beside = find(SERVER) or find(SERVER, str(Path(control).with_name(SERVER)))
        out.say(f"{control}; the server's program: {beside or 'not found'}")
    nvcc = find("nvcc")
    out.say(f"Linux {platform.release()}, Python {platform.python_version()}, {_torch()}, {nvcc=}")
    out.say(f"user {os.getuid()}, {os.cpu_count()} CPUs; {_status('CapEff')}, {_status('Seccomp')}")
    try:
        machine = Machine()
    except Skip as reason:
        raise RuntimeError(reason) from reason
    out.say(f"driver {machine.driver}, CUDA {_ask(pynvml.nvmlSystemGetCudaDriverVersion_v2)}")
    mode = _ask(pynvml.nvmlDeviceGetComputeMode, machine.handle)
    mig = _ask(pynvml.nvmlDeviceGetMigMode, machine.handle)
    count = pynvml.nvmlDeviceGetCount()
    out.say(f"{machine.gpu}")
    out.say(f"compute mode {mode}, MIG {mig}; {count} GPUs, of which the first is measured")
    out.say(f"memory used before: {machine.used()} MiB; processes: {machine.processes()}")


def _ask(call: Callable[..., object], *arguments: object) -> object:
    try:
        return call(*arguments)
    except pynvml.NVMLError as error:
        return str(error)


def _torch() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"PyTorch {version('torch')}"
    except PackageNotFoundError:
        return "no PyTorch"


def _status(name: str) -> str:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((line for line in lines if line.startswith(name)), f"no {name}").replace("\t", " ")
