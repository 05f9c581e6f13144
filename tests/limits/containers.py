"""Real containers by runc, where the machine's cgroups are as a test wants them.

A mount namespace has cgroup v2 (or v1) at /sys/fs/cgroup, whatever the machine has there. What runs
in it by `Machine.command` (the agent, runc, a hook) sees that; a test sees it at `Machine.cgroups`.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.limits import hook

CGROUPS = Path("/sys/fs/cgroup")

V2 = f"""
mount --make-rprivate /
umount --recursive --lazy {CGROUPS}
mount --types cgroup2 cgroup2 {CGROUPS}
"""
V1 = f"""
mount --make-rprivate /
umount --recursive --lazy {CGROUPS}
mount --types tmpfs tmpfs {CGROUPS}
mkdir {CGROUPS}/devices {CGROUPS}/systemd
mount --types cgroup --options devices cgroup {CGROUPS}/devices
mount --types cgroup --options none,name=systemd cgroup {CGROUPS}/systemd
"""
"""As much of cgroup v1 as runc needs."""
THEN_WAIT = "\necho ready; exec cat > /dev/null"


class NotHereError(Exception):
    """The machine lacks what it takes; the message says what."""


@dataclass(frozen=True)
class Machine:
    """A mount namespace, kept by the process `pid`. `top` is a cgroup for its containers alone."""

    pid: int
    top: str = field(default_factory=lambda: f"vgpu-test-{secrets.token_hex(4)}")

    def command(self, *arguments: str | Path) -> list[str]:
        """What runs that program in it. Paths have to be absolute: it starts in /."""
        return ["nsenter", f"--mount=/proc/{self.pid}/ns/mnt", "--", *map(str, arguments)]

    @property
    def cgroups(self) -> Path:
        """Its /sys/fs/cgroup, for processes that are not in it."""
        return Path(f"/proc/{self.pid}/root{CGROUPS}")

    def clean(self) -> None:
        """Removes its containers' cgroups, which must have ended."""
        for top in [self.cgroups / self.top, *self.cgroups.glob(f"*/{self.top}")]:
            for directory, _, _ in os.walk(top, topdown=False):
                Path(directory).rmdir()


@contextmanager
def machine(script: str = V2) -> Iterator[Machine]:
    """A machine with those cgroups. Raises NotHereError."""
    if os.geteuid() != 0:
        raise NotHereError("mounting cgroups takes root")
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-ec", script + THEN_WAIT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as keeper:
        assert keeper.stdout
        assert keeper.stderr
        if keeper.stdout.readline() != "ready\n":
            raise NotHereError(f"cgroups cannot be mounted: {keeper.stderr.read().strip()}")
        made = Machine(keeper.pid)
        try:
            yield made
        finally:
            made.clean()
            keeper.communicate()


class NotStartedError(Exception):
    """A container that did not start; the message is the runtime's."""


@dataclass(frozen=True)
class Container:
    """One that runs. `pid` is of its program, `cgroup` the path in `/proc/<pid>/cgroup`."""

    id: str
    pid: int
    cgroup: str


@dataclass
class Runtime:
    """Starts containers by runc as a container runtime with CDI does, and ends them.

    `nvml` is the environment in which the toolkit's hook runs; without it there is no hook.
    """

    machine: Machine
    directory: Path
    nvml: Mapping[str, str] | None = None
    running: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if shutil.which("runc") is None:
            raise NotHereError("no runc")
        self.directory.mkdir(parents=True, exist_ok=True)

    def start(
        self,
        cgroup: str,
        environment: Mapping[str, str],
        gpus: Sequence[str] = (),
        program: Sequence[str] = ("sleep", "1000"),
    ) -> Container:
        """Starts a container in that cgroup, below the machine's own: `{id}` there is its ID.

        Raises NotStartedError.
        """
        container_id = secrets.token_hex(32)
        bundle = self.directory / container_id[:12]
        (bundle / "rootfs").mkdir(parents=True)
        path = cgroup.format(id=container_id)
        path = f"/{self.machine.top}{path}" if path.startswith("/") else path
        config = self._config(bundle, path, environment, gpus, program)
        (bundle / "config.json").write_text(json.dumps(config))
        self.running.append(container_id)
        self._runc("run", "--detach", "--bundle", bundle, container_id)
        state = json.loads(self._runc("state", container_id))
        lines = Path(f"/proc/{state['pid']}/cgroup").read_text().splitlines()
        own = next(line.removeprefix("0::") for line in lines if line.startswith("0::"))
        return Container(container_id, state["pid"], own)

    def end(self, container_id: str) -> None:
        """Ends a container, and removes its cgroup. One that does not run has ended."""
        self._runc("delete", "--force", container_id)
        with suppress(ValueError):
            self.running.remove(container_id)

    def close(self) -> None:
        for container_id in list(self.running):
            self.end(container_id)

    def _runc(self, *arguments: str | Path) -> str:
        # Detached containers keep its outputs open: no pipes.
        out, errors = self.directory / "out", self.directory / "errors"
        with out.open("w") as stdout, errors.open("w") as stderr:
            done = subprocess.run(
                self.machine.command("runc", "--root", self.directory / "runc", *arguments),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                timeout=60,
                check=False,
            )
        if done.returncode != 0:
            raise NotStartedError(errors.read_text())
        return out.read_text()

    def _config(
        self,
        bundle: Path,
        cgroup: str,
        environment: Mapping[str, str],
        gpus: Sequence[str],
        program: Sequence[str],
    ) -> Mapping[str, object]:
        """Of a container with this machine's programs; see the OCI runtime specification."""
        mounts = [{"destination": "/proc", "type": "proc", "source": "proc"}]
        for name in ("bin", "lib", "lib64", "usr"):
            source = Path("/", name)
            inside = bundle / "rootfs" / name
            if source.is_symlink():
                inside.symlink_to(source.readlink())
            elif source.is_dir():
                inside.mkdir()
                bind = {"type": "bind", "source": str(source), "options": ["rbind", "ro"]}
                mounts.append({"destination": str(source), **bind})
        own = {
            "path": sys.executable,
            "args": [sys.executable, str(Path(hook.__file__).resolve()), *gpus],
            "env": [f"{name}={value}" for name, value in (self.nvml or {}).items()],
        }
        return {
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": 0, "gid": 0},
                "args": program,
                "env": [f"{name}={value}" for name, value in environment.items()]
                + ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
                "cwd": "/",
                "noNewPrivileges": True,
            },
            "root": {"path": "rootfs", "readonly": True},
            "mounts": mounts,
            "hooks": {"createRuntime": [own] if self.nvml is not None else []},
            "linux": {
                "cgroupsPath": cgroup,
                "namespaces": [{"type": each} for each in ("pid", "mount", "ipc", "uts")],
            },
        }
