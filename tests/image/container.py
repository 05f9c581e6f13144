"""The image's agent in a container: by `runc`, or where that cannot run, by what else confines it.

Either way it is UID 0 without a capability and without a way to one, on a read-only root, with
process, mount, IPC and host name namespaces of its own, as in the pods of the chart. Only `runc`
gives it a network of its own too.
"""

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.image.build import Image

DROPPED = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs")
CONFINE = """
set -e
root=$1; shift
mount --make-rprivate /
mount --bind "$root" "$root"
mount --types proc proc "$root/proc"
mount --rbind /dev "$root/dev"
while [ "$1" != -- ]; do
  mkdir -p "$root$2"
  mount --bind "$1" "$root$2"
  mount --options "remount,bind,$3" "$root$2"
  shift 3
done
shift
mount --options remount,bind,ro "$root"
exec chroot "$root" "$@"
"""


@dataclass(frozen=True)
class Mount:
    """A directory of this machine in the container."""

    source: Path
    destination: str
    mode: str = "rw"


@dataclass(frozen=True)
class Container:
    """Runs commands of the image, one at a time, by unshare, chroot and setpriv."""

    directory: Path
    image: Image
    mounts: Sequence[Mount] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def run(self, *arguments: str) -> subprocess.Popen[str]:
        """Starts the image's entrypoint, with the image's own command unless one is given."""
        entrypoint, command = self.image.config["Entrypoint"], self.image.config["Cmd"]
        process = subprocess.Popen(
            self.command([*entrypoint, *(arguments or command)]),
            env=os.environ | self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started.append(process)
        return process

    def output(self, *arguments: str) -> tuple[int, str]:
        """Runs the entrypoint to its end: the exit code and what it wrote."""
        process = self.run(*arguments)
        text, _ = process.communicate(timeout=60)
        return process.returncode, text

    def beside(self, *command: str) -> tuple[int, str]:
        """Runs a command of the image in the container that runs."""
        done = subprocess.run(
            self.joining(command),
            env=os.environ | self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, done.stdout

    def terminate(self) -> None:
        """What a kubelet does to end the agent."""
        os.kill(self.pid(), signal.SIGTERM)

    def close(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()

    def environment(self) -> dict[str, str]:
        own = dict(entry.split("=", 1) for entry in self.image.config["Env"])
        return own | dict(self.variables)

    def pid(self) -> int:
        """Of the agent, as this machine counts."""
        parent = self.started[-1].pid
        return int(Path(f"/proc/{parent}/task/{parent}/children").read_text().split()[0])

    def command(self, arguments: Sequence[str]) -> Sequence[str | Path]:
        """What starts them in a new container."""
        mounts = [(one.source, one.destination, one.mode) for one in self.mounts]
        return [
            *("unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child"),
            *("sh", "-c", CONFINE, "sh", self.image.rootfs),
            *[part for mount in mounts for part in mount],
            *("--", *DROPPED, *arguments),
        ]

    def joining(self, arguments: Sequence[str]) -> Sequence[str | Path]:
        """What starts them in the running container."""
        spaces = ("--mount", "--pid", "--ipc", "--uts", "--root", "--wd")
        return ["nsenter", "--target", str(self.pid()), *spaces, "--", *DROPPED, *arguments]


@dataclass(frozen=True)
class RuncContainer(Container):
    """Runs commands of the image, one at a time, by runc."""

    NAME = "vgpu-agent-test"

    def close(self) -> None:
        super().close()
        subprocess.run([*self._runc, "delete", "--force", self.NAME], check=True)

    def pid(self) -> int:
        told = subprocess.run([*self._runc, "state", self.NAME], capture_output=True, check=True)
        return int(json.loads(told.stdout)["pid"])

    def command(self, arguments: Sequence[str]) -> Sequence[str | Path]:
        bundle = self.directory / "bundle"
        bundle.mkdir(exist_ok=True)
        configuration = bundle / "config.json"
        configuration.unlink(missing_ok=True)
        subprocess.run(["runc", "spec"], cwd=bundle, check=True)
        spec = json.loads(configuration.read_text())
        configuration.write_text(json.dumps(self._edited(spec, arguments)))
        return [*self._runc, "run", "--no-new-keyring", "--bundle", bundle, self.NAME]

    def joining(self, arguments: Sequence[str]) -> Sequence[str | Path]:
        return [*self._runc, "exec", self.NAME, *arguments]

    @property
    def _runc(self) -> tuple[str | Path, ...]:
        return ("runc", "--root", self.directory / "runc")

    def _edited(self, spec: dict[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
        sets = ("bounding", "effective", "inheritable", "permitted", "ambient")
        spec["process"] |= {
            "terminal": False,
            "args": list(arguments),
            "cwd": self.image.config["WorkingDir"],
            "env": [f"{name}={value}" for name, value in self.environment().items()],
            "capabilities": {name: [] for name in sets},
            "noNewPrivileges": True,
        }
        spec["root"] = {"path": str(self.image.rootfs), "readonly": True}
        spec["mounts"] += [
            {
                "type": "bind",
                "source": str(mount.source),
                "destination": mount.destination,
                "options": ["bind", mount.mode],
            }
            for mount in self.mounts
        ]
        return spec


def why_no_runc(directory: Path, image: Image) -> str | None:
    """None where runc runs the image on this machine."""
    probe = RuncContainer(directory, image)
    code, text = probe.output("--version")
    probe.close()
    return None if code == 0 else text.strip() or f"exit code {code}"
