"""The container image: built from the Dockerfile on a Debian base, looked into, and run."""

import json
import os
import re
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType

import pytest

from tests.agent_process import REPOSITORY
from tests.image.base import CACHE
from tests.image.build import Image, build
from tests.image.container import Container, Mount, RuncContainer, why_no_runc
from tests.kubelet_peer import KubeletPeer
from tools.sbom import locked
from vgpu_agent import __version__

# Built once: by one worker.
pytestmark = [
    *(pytest.mark.slow, pytest.mark.ci, pytest.mark.timeout(600)),
    pytest.mark.xdist_group("image"),
]

MEGABYTE = 1_000_000
UNCHECKED_HASH = 1
SIMULATED = MappingProxyType({"VGPU_GPU_DRIVER": "simulated"})
# Printed as JSON: all modules of the agent are loaded, and those without bytecode are told.
WITHOUT_BYTECODE = """
import importlib, json, os, pkgutil, sys
import vgpu_agent
for one in pkgutil.walk_packages(vgpu_agent.__path__, "vgpu_agent."):
    if not one.name.endswith("__main__"):
        importlib.import_module(one.name)
specs = {name: getattr(one, "__spec__", None) for name, one in sys.modules.items()}
cached = {name: spec.cached for name, spec in specs.items() if spec}
missing = [name for name, path in cached.items() if path and not os.path.exists(path)]
print(json.dumps({"loaded": len(cached), "missing": missing}))
"""


def _missing() -> str | None:
    """Why the image cannot be built here."""
    if os.geteuid() != 0:
        return "needs root"
    tools = ("apt-get", "buildah", "debootstrap", "runc")
    absent = [name for name in tools if not shutil.which(name)]
    return f"needs {', '.join(absent)}" if absent else None


@pytest.fixture(scope="module")
def built() -> Iterator[tuple[Image, Path]]:
    """The image, and a directory that goes with it."""
    if reason := _missing():
        pytest.skip(reason)
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="build-") as directory:
        yield build(Path(directory)), Path(directory)


@pytest.fixture
def image(built: tuple[Image, Path]) -> Image:
    return built[0]


@pytest.fixture(scope="module")
def no_runc(built: tuple[Image, Path]) -> str | None:
    """Why this machine's runc does not run the image, if it does not."""
    return why_no_runc(built[1], built[0])


@pytest.fixture
def container(
    built: tuple[Image, Path], no_runc: str | None, kubelet_dir: Path
) -> Iterator[Container]:
    """With the mounts of the chart at the places where the settings look by default."""
    image, directory = built
    for name in ("device-plugins", "pod-resources", "state"):
        (kubelet_dir / name).mkdir()
    mounts = [
        Mount(kubelet_dir / "device-plugins", "/var/lib/kubelet/device-plugins"),
        Mount(kubelet_dir / "pod-resources", "/var/lib/kubelet/pod-resources", "ro"),
        Mount(kubelet_dir / "state", "/run/vgpu-agent"),
    ]
    if no_runc is None:
        container: Container = RuncContainer(directory, image, mounts, SIMULATED)
    else:
        # It shares the network of this machine, where the port may be taken.
        shared = SIMULATED | {"VGPU_METRICS_ADDRESS": "127.0.0.1:0"}
        container = Container(directory, image, mounts, shared)
    yield container
    container.close()


# What is in it


def test_its_own_layers_are_small(image: Image, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [size / MEGABYTE for _, size in image.layers]
    with capsys.disabled():
        told = " + ".join(f"{size:.1f}" for size in sizes)
        print(f"\n  layers above the base {told} MB, built in {image.seconds:.0f} s")
    assert 5 < sum(sizes) < 60


def test_it_says_what_it_is_and_what_it_runs(image: Image) -> None:
    assert image.config["Entrypoint"] == ["vgpu-agent"]
    assert image.config["Cmd"] == ["run"]
    assert image.config["User"] == "0:0"
    path = dict(entry.split("=", 1) for entry in image.config["Env"])["PATH"]
    assert path.split(":")[0] == "/opt/vgpu-agent/bin"
    labels = {
        name.rpartition(".")[2]: value
        for name, value in image.config["Labels"].items()
        if name.startswith("org.opencontainers.image.")
    }
    assert labels == {
        "title": "vgpu-agent",
        "description": "Kubernetes node agent that shares each NVIDIA GPU as many virtual GPUs",
        "licenses": "Apache-2.0",
        "version": __version__,
    }


def test_it_has_only_the_agent_with_its_libraries_and_bytecode(image: Image) -> None:
    """Everything else that the build needed stays out: pip, hatchling, compilers, caches."""
    strangers = [
        entry.name
        for entry in image.entries
        if entry.isreg()
        and not re.match(
            r"opt/vgpu-agent/(lib/python3\.\d+/site-packages/|pyvenv\.cfg$)", entry.name
        )
        and not re.match(r"usr/(local/)?lib/python3\.\d+/.*\.pyc$", entry.name)
    ]
    assert strangers == ["opt/vgpu-agent/bin/vgpu-agent"]
    packages = {
        match[1]
        for entry in image.entries
        if (
            match := re.search(r"/site-packages/([^/]+)-[^/-]+\.dist-info$", entry.name.rstrip("/"))
        )
    }
    assert {"vgpu_agent", "pydantic", "uvicorn"} <= packages
    # Those that the SBOM lists.
    listed = {name for name, _ in locked((REPOSITORY / "requirements/run.txt").read_text())}
    assert {re.sub(r"[-_.]+", "-", name).lower() for name in packages} == listed | {"vgpu-agent"}
    assert not packages & {"pip", "setuptools", "hatchling", "uv", "grpcio", "pytest"}
    for name in ("gcc", "cc", "ld", "as", "make"):
        assert not shutil.which(name, path=f"{image.rootfs}/usr/bin:{image.rootfs}/usr/local/bin")
    assert not (image.rootfs / "root" / ".cache").exists()
    assert not (image.rootfs / "build").exists()


def test_no_secret_of_the_build_is_left_in_it(image: Image) -> None:
    assert image.marked == []
    names = [entry.name for entry in image.entries]
    assert not [name for name in names if re.search(r"pip\.conf|ca\.pem|run/secrets", name)]


def test_every_user_can_read_it(image: Image) -> None:
    closed = [entry.name for entry in image.entries if entry.isreg() and not entry.mode & 0o004]
    assert closed == []


def test_every_source_has_bytecode_that_never_goes_stale(image: Image) -> None:
    """Times of files are not compared: they may differ where the image is unpacked."""
    sources = [
        image.rootfs / entry.name
        for entry in image.entries
        if entry.isreg() and re.match(r"opt/vgpu-agent/lib/.*\.py$", entry.name)
    ]
    assert len(sources) > 300
    for source in sources:
        compiled = list((source.parent / "__pycache__").glob(f"{source.stem}.cpython-*.pyc"))
        assert len(compiled) == 1, source
        _, flags = struct.unpack("<4sI", compiled[0].read_bytes()[:8])
        assert flags == UNCHECKED_HASH, source


# What it does


def test_the_agent_of_the_image_serves_a_kubelet_without_privileges(
    container: Container,
    no_runc: str | None,
    kubelet_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with KubeletPeer(kubelet_dir) as kubelet:
        begun = time.monotonic()
        process = container.run()
        registered = kubelet.wait_registrations(1, timeout=30).time
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - _started(container.pid())
        to_register = age - (time.monotonic() - registered)
        assert len(kubelet.wait_list(1).devices) == 20
        answer = kubelet.allocate([kubelet.allocatable[0]])
        assert answer.container_responses[0].envs["NVIDIA_VISIBLE_DEVICES"]

        status = Path(f"/proc/{container.pid()}/status").read_text()
        assert re.search(r"^Uid:\t0\t", status, re.MULTILINE)
        assert set(re.findall(r"^Cap\w+:\t(\w+)$", status, re.MULTILINE)) == {"0" * 16}
        assert re.search(r"^NoNewPrivs:\t1$", status, re.MULTILINE)
        code, text = container.beside("sh", "-c", "touch /opt/x || touch /tmp/x || touch /x")
        assert (code, text.count("Read-only file system")) == (1, 3)

        code, text = container.beside("vgpu-agent", "doctor")
        assert (code, ", 0 fail" in text) == (0, True), text
        code, text = container.beside("vgpu-agent", "status", "--wide")
        assert (code, "GPU-00000000" in text) == (0, True), text
        code, text = container.beside("python", "-c", WITHOUT_BYTECODE)
        told = json.loads(text)
        assert told["loaded"] > 300
        assert told["missing"] == []

        ending = time.monotonic()
        container.terminate()
        text, _ = process.communicate(timeout=30)
        ended = time.monotonic() - ending
    assert process.returncode == 0, text
    assert "Traceback" not in text
    with capsys.disabled():
        print(
            f"\n  by {'runc' if no_runc is None else f'unshare, as runc says: {no_runc}'}:"
            f" Register {registered - begun:.2f} s after the container's start and"
            f" {to_register:.2f} s after its first process; ended in {ended:.2f} s"
        )
    assert registered - begun < 5
    assert ended < 2


def test_the_image_tells_its_version(container: Container) -> None:
    assert container.output("--version") == (0, f"{__version__}\n")


def _started(pid: int) -> float:
    """Seconds since boot at which a process came to be, in steps of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")
