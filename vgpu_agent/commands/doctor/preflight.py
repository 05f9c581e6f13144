"""What no report can know of a node: its paths, sockets, permissions and programs."""

import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from vgpu_agent.address import Address
from vgpu_agent.commands.ask import get
from vgpu_agent.errors import ListenError, NoAgentError
from vgpu_agent.kubelet.podresources import SOCKET as POD_RESOURCES
from vgpu_agent.kubelet.session import KUBELET_SOCKET
from vgpu_agent.model.advice import rival
from vgpu_agent.model.place import Place
from vgpu_agent.observe.judge import FAIL, OK, WARN, check
from vgpu_agent.observe.listen import listen
from vgpu_agent.observe.report import Check, Report, Verdict
from vgpu_agent.unixsocket import MAX_PATH, listener, listener_pid, listeners, refusal

# Small questions about files and sockets


def writable(path: Path) -> bool:
    """Whether this process can make files in a directory."""
    return os.access(path, os.W_OK | os.X_OK)


def selinux_label(path: Path) -> str | None:
    """The label of a file; None where it has none."""
    try:
        return os.getxattr(path, "security.selinux").rstrip(b"\0").decode()
    except (OSError, UnicodeDecodeError):
        return None


def _directory(
    name: str,
    path: Path,
    advice: str,
    *,
    bad: Verdict = FAIL,
    write: bool = False,
    others: int = 0,
) -> Check:
    """A directory in which this process must be able to `write`; mode bits that others need."""
    try:
        found = path.stat()
    except OSError as error:
        return Check(name, bad, f"{path}: {error.strerror}", advice)
    if not stat.S_ISDIR(found.st_mode):
        return Check(name, bad, f"{path} is not a directory", f"remove it; {advice}")
    mode, can_write, label = stat.S_IMODE(found.st_mode), writable(path), selinux_label(path)
    detail = f"{path} (owner {found.st_uid}:{found.st_gid}, mode {mode:04o}"
    detail += f", {'writable' if can_write else 'not writable from here'}"
    detail += f"{f', SELinux {label}' if label else ''})"
    if write and not can_write:
        return Check(name, bad, detail, advice)
    if mode & others != others:
        detail += ": containers of other users cannot use it"
        return Check(name, WARN, detail, f"`chmod {mode | others:o} {path}` on the node")
    if others and label is not None and label.split(":")[2:3] != ["container_file_t"]:
        detail += ": where SELinux is enforcing, containers cannot use it"
        return Check(name, WARN, detail, f"`chcon -t container_file_t {path}` on the node")
    return Check(name, OK, detail)


# The kubelet and the agent's own sockets


def check_socket_paths(*paths: Path) -> Iterable[Check]:
    """Whether paths of sockets fit into what a socket's address can hold."""
    advice = "set the variable of that directory (VGPU_..._DIR...) to a shorter path"
    for path in paths:
        length = len(bytes(path))
        detail = f"{path} takes {length} of {MAX_PATH} bytes"
        yield Check("socket path", OK if length <= MAX_PATH else FAIL, detail, advice)


KUBELET_DIRS = (
    Path("/var/lib/kubelet"),
    Path("/var/lib/k0s/kubelet"),
    Path("/var/snap/microk8s/common/var/lib/kubelet"),
)
"""Where kubelets are known to have their directory: of most, k0s, MicroK8s."""


def check_kubelet(directory: Path, known: Iterable[Path] = KUBELET_DIRS) -> Iterable[Check]:
    """The directory in which kubelet and plugins meet, and whether a kubelet listens there.

    Where none does: in which of the known directories one does.
    """
    advice = "mount that directory at the same path, writable, or set VGPU_DEVICE_PLUGIN_DIR"
    yield _directory("kubelet directory", directory, advice, write=True)
    places = {each / "device-plugins": each / "device-plugins" / KUBELET_SOCKET for each in known}
    path = directory / KUBELET_SOCKET
    yield _kubelet_at("kubelet socket", FAIL, path, "VGPU_DEVICE_PLUGIN_DIR", places)


def check_podresources(root: Path, known: Iterable[Path] = KUBELET_DIRS) -> Check:
    """Whether a kubelet says who holds what, in its own directory or in which of the known ones."""
    places = {each: each / POD_RESOURCES for each in known}
    path = root / POD_RESOURCES
    return _kubelet_at("podresources socket", WARN, path, "VGPU_KUBELET_DIR", places)


def _kubelet_at(
    name: str, bad: Verdict, path: Path, variable: str, places: Mapping[Path, Path]
) -> Check:
    """Whether a kubelet listens there, or else at which other socket, by the variable's value."""
    reason = refusal(path)
    if reason is None:
        return Check(name, OK, f"a kubelet listens at {path}")
    detail = f"no kubelet at {path}: {reason}"
    for value, other in places.items():
        if refusal(other) is None:
            return Check(name, bad, f"{detail}; one listens at {other}", f"set {variable}={value}")
    seen = ", ".join(str(each) for each in places.values() if each != path)
    advice = f"start the node's kubelet, mount its directory, or set {variable} to what it uses"
    return Check(name, bad, f"{detail}; nor at {seen}", advice)


def check_endpoint(
    path: Path, control: Path, agent: Report | None, resource: str, place: Place
) -> Check:
    """Our own socket: free, left by an agent that is gone, or served, then by whom.

    `agent` is the report of the running agent and `control` its control socket.
    """
    name = "endpoint"
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return Check(name, OK, f"{path} is free")
    if not stat.S_ISSOCK(mode):
        return Check(name, FAIL, f"{path} is not a socket", "remove it")
    if refusal(path) is not None:
        return Check(name, OK, f"{path} is stale; the agent replaces it")
    pid, agent_pid = listener_pid(path), listener_pid(control)
    # Processes of other PID namespaces are not named: then the agent's own word counts.
    unnamed = pid is None and agent_pid is None
    ours = agent is not None and (agent.kubelet.error is None if unnamed else pid == agent_pid)
    if ours:
        return Check(name, OK, f"{path} is served by the running agent")
    detail = f"another process serves {path.parent}/{listener(path)}: a rival for {resource}"
    return check(name, FAIL, detail, rival(place))


def check_plugins(directory: Path, endpoint: str) -> Check:
    """The other device plugins of the node, one of which may serve our resource."""
    others = listeners(directory, KUBELET_SOCKET, endpoint)
    found = f"{', '.join(others)}, the newest first" if others else "no other"
    return Check("other plugins", OK, f"in {directory}: {found}")


def check_metrics(address: Address) -> Check:
    """The metrics address: free, or served by the running agent."""
    name = "metrics address"
    code, body = 0, b""
    with suppress(NoAgentError):
        if address.port:
            code, body = get(address, "/healthz")
    if (code, body) == (200, b"ok\n"):
        return Check(name, OK, f"{address} is served by the running agent")
    try:
        listen(address).close()
    except ListenError as error:
        detail, _, what = str(error).partition("; ")
        return Check(name, FAIL, detail, what)
    return Check(name, OK, f"{address} is free")


def check_kept_directory(name: str, path: Path, without: str) -> Check:
    """Where the agent keeps what it must not forget; it runs `without`. `VGPU_NAME` sets it."""
    parent = next(each for each in (path, *path.parents) if each.exists())
    if parent != path and parent.is_dir() and writable(parent):
        return Check(name, OK, f"{path} is not there yet; the agent makes it")
    variable = f"VGPU_{name.replace(' ', '_').upper()}"
    advice = f"mount a writable directory there, or set {variable}: without it {without}"
    return _directory(name, path, advice, bad=WARN, write=True)


# MPS


def check_other_mps(path: Path) -> Check:
    """Another MPS on the node, in the directory that the NVIDIA runtime mounts everywhere."""
    name = "other mps"
    if not path.exists():
        return Check(name, OK, f"{path} is not there")
    alive = refusal(path / "control") is None
    detail = (
        f"{path} is there ({'a daemon serves it' if alive else 'left behind'}): the NVIDIA runtime"
        " mounts it into every GPU container, and those that name no other directory become"
        " clients there, without limits"
    )
    advice = f"{'end that daemon, then ' if alive else ''}remove {path} on the node"
    return Check(name, WARN, detail, advice)


def check_mps_directories(directory: Path, place: Place) -> Iterable[Check]:
    """The daemons' directories: containers of every user must get into each `pipe`."""
    what = f"`vgpu-agent mps prepare` in the MPS pod makes it: {place.mps_log('prepare')}"
    for name, path in [("directory", directory), *(("pipe", p) for p in directory.glob("*/pipe"))]:
        yield _directory(f"mps {name}", path, what, others=stat.S_IROTH | stat.S_IXOTH)
