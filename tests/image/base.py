"""A base image for the tests: Debian with python3, in the ways that matter like python:slim."""

import hashlib
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.agent_process import REPOSITORY

CACHE = REPOSITORY / ".cache" / "image"
PACKAGES = "ca-certificates,python3,python3-venv"
# The official images have no bytecode of Python's own library. Documentation only takes time here.
REMOVED = (
    *("usr/lib/python3*/**/*.pyc", "usr/share/doc", "usr/share/man", "usr/share/locale"),
    *("var/cache/apt/archives/*.deb", "var/lib/apt/lists/*", "etc/hostname", "etc/resolv.conf"),
)


def base_archive() -> Path:
    """A tar of Debian's minimal system with python3, of the release and mirror of this machine.

    Made once a release; it takes a minute and needs root.
    """
    values = dict(
        line.split("=", 1)
        for line in Path("/etc/os-release").read_text().splitlines()
        if "=" in line
    )
    release = values["VERSION_CODENAME"].strip('"')
    architecture = _told("dpkg", "--print-architecture").strip()
    recipe = hashlib.sha256(repr((PACKAGES, REMOVED)).encode()).hexdigest()[:8]
    archive = CACHE / f"{release}-{architecture}-{recipe}.tar"
    if not archive.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as directory:
            root = Path(directory, "root")
            _debootstrap(release, root)
            made = Path(directory, "base.tar")
            subprocess.run(["tar", "-C", root, "--numeric-owner", "-cf", made, "."], check=True)
            made.rename(archive)
    return archive


def _debootstrap(release: str, root: Path) -> None:
    proxies, certificate = _network()
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}"]
    if certificate:
        command.append(f"--certificate={certificate}")
    subprocess.run(
        [*command, release, root, _mirror(release)],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C"} | proxies,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    # Listed before anything goes: the patterns reach into each other.
    for path in [path for pattern in REMOVED for path in root.glob(pattern)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _mirror(release: str) -> str:
    """The archive that this machine's apt takes the release from."""
    targets = _told(
        *("apt-get", "indextargets", "--format"),
        "$(IDENTIFIER) $(ORIGIN) $(RELEASE) $(COMPONENT) $(REPO_URI)",
    )
    wanted = ["Packages", "Debian", release, "main"]
    found = [words[4] for line in targets.splitlines() if (words := line.split())[:4] == wanted]
    assert found, f"apt knows no archive of Debian {release}; has apt-get update run?"
    if not found[0].startswith("mirror"):
        return found[0]
    lines = Path(found[0].partition(":")[2].rstrip("/")).read_text().splitlines()
    return next(line.split()[0] for line in lines if line.startswith("http"))


def _network() -> tuple[dict[str, str], str | None]:
    """As environment, the proxies of apt, and the CA file that it trusts, if it has an own one."""
    assignments = _told(
        *("apt-config", "shell", "http_proxy", "Acquire::http::Proxy"),
        *("https_proxy", "Acquire::https::Proxy", "certificate", "Acquire::https::CaInfo"),
    )
    told = dict(word.split("=", 1) for word in shlex.split(assignments))
    certificate = told.pop("certificate", None)
    return {name: value for name, value in told.items() if value != "DIRECT"}, certificate


def _told(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
