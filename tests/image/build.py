"""Builds the image from the Dockerfile with buildah, in a storage of its own."""

import ast
import json
import os
import ssl
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.agent_process import REPOSITORY
from tests.image.base import base_archive

MARK = "# left-behind-by-the-build"
"""Stands in every secret that is handed to the build, and nowhere else."""

PIP_OPTIONS = (
    *("index-url", "extra-index-url", "find-links", "no-index", "proxy"),
    *("trusted-host", "default-timeout", "timeout", "retries"),
)


@dataclass(frozen=True)
class Image:
    """What was built. `layers` are those above the base image's, each with its size in bytes."""

    config: dict[str, Any]
    rootfs: Path
    layers: list[tuple[list[tarfile.TarInfo], int]]
    marked: list[str]
    seconds: float

    @property
    def entries(self) -> list[tarfile.TarInfo]:
        return [entry for entries, _ in self.layers for entry in entries]


def build(directory: Path) -> Image:
    """Builds it in `directory`, which is left with nothing that must be unmounted."""
    storage = ["--root", directory / "root", "--runroot", directory / "run"]
    buildah = ["buildah", *storage, "--storage-driver", "vfs"]
    base, name = "localhost/vgpu-base:test", "localhost/vgpu-agent:test"

    container = _told(*buildah, "from", "--name", "base", "scratch").strip()
    _told(*buildah, "add", "--quiet", container, base_archive(), "/")
    _told(*buildah, "commit", "--quiet", "--rm", container, base)

    started = time.monotonic()
    _told(
        *(*buildah, "build", "--isolation", "chroot", "--build-arg", f"BASE_IMAGE={base}"),
        *_pip_access(directory),
        *("--tag", name, REPOSITORY),
    )
    took = time.monotonic() - started

    layout = directory / "layout"
    _told(*buildah, "push", "--quiet", name, f"oci:{layout}:test")
    own = _layers(layout)[len(_from_storage(buildah, base)["rootfs"]["diff_ids"]) :]
    container = _told(*buildah, "from", "--pull-never", "--name", "agent", name).strip()
    rootfs = Path(_told(*buildah, "mount", container).strip())
    config = _from_storage(buildah, name)
    marked = ["the image's configuration"] if MARK in json.dumps(config) else []
    layers = []
    for path in own:
        entries, size, found = _read_layer(path)
        layers.append((entries, size))
        marked += found
    return Image(config["config"], rootfs, layers, marked, took)


def _from_storage(buildah: list[Any], name: str) -> dict[str, Any]:
    return json.loads(_told(*buildah, "inspect", "--type", "image", name))["OCIv1"]


def _layers(layout: Path) -> list[Path]:
    def blob(digest: str) -> Path:
        return layout / "blobs" / digest.replace(":", "/")

    index = json.loads((layout / "index.json").read_text())
    manifest = json.loads(blob(index["manifests"][0]["digest"]).read_text())
    return [blob(layer["digest"]) for layer in manifest["layers"]]


def _read_layer(path: Path) -> tuple[list[tarfile.TarInfo], int, list[str]]:
    """Its entries, its bytes, and the names of those that have the mark of a secret."""
    entries, marked = [], []
    with tarfile.open(path) as archive:
        for member in archive:
            entries.append(member)
            content = archive.extractfile(member) if member.isreg() else None
            if content is not None and MARK.encode() in content.read():
                marked.append(member.name)
        size = archive.fileobj.tell() if archive.fileobj else 0
    return entries, size, marked


def _pip_access(directory: Path) -> list[str | Path]:
    """How this machine's pip reaches its index, as secrets and volumes of a build."""
    options: dict[str, str] = {}
    told = _told(sys.executable, "-m", "pip", "config", "list").splitlines()
    settings = [line.split("=", 1) for line in told if "=" in line]
    # Variables win, as in pip.
    for name, value in sorted(settings, key=lambda setting: setting[0].startswith(":env:")):
        options[name.rpartition(".")[2]] = str(ast.literal_eval(value))
    lines = [MARK, "[global]"]
    lines += [
        f"{name} = {' '.join(options[name].split())}" for name in options if name in PIP_OPTIONS
    ]

    arguments: list[str | Path] = []
    authorities = (
        options.get("cert")
        or os.environ.get("REQUESTS_CA_BUNDLE")
        or os.environ.get("SSL_CERT_FILE")
        or ssl.get_default_verify_paths().cafile
    )
    if authorities:
        copy = directory / "ca.pem"
        copy.write_text(f"{MARK}\n{Path(authorities).read_text()}")
        arguments += ["--secret", f"id=ca.pem,src={copy}"]
        lines.append("cert = /run/secrets/ca.pem")
    configuration = directory / "pip.conf"
    configuration.touch(mode=0o600)
    configuration.write_text("\n".join(lines) + "\n")
    arguments += ["--secret", f"id=pip.conf,src={configuration}"]
    for place in _local_places(options):
        arguments += ["--volume", f"{place}:{place}:ro"]
    return arguments


def _local_places(options: dict[str, str]) -> list[Path]:
    """Directories of this machine that pip looks into."""
    places = set()
    for name in ("index-url", "extra-index-url", "find-links"):
        for word in options.get(name, "").split():
            url = urlsplit(word)
            if url.scheme not in {"", "file"}:
                continue
            path = Path(unquote(url.path))
            # An index names its files beside it, mostly: ../../files.
            beside = path.parent if name != "find-links" and path.parent != Path("/") else path
            if beside.is_dir():
                places.add(beside)
    return sorted(places)


def _told(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout
