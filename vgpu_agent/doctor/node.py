"""What the agent needs of the node: the kubelet, its own socket and port, its memory."""

import json
import stat
from collections.abc import Iterable
from pathlib import Path

from vgpu_agent import running
from vgpu_agent.doctor.files import connects, described, listener_pid, selinux_label, writable
from vgpu_agent.doctor.report import Check, Verdict
from vgpu_agent.errors import ListenError, NoAgentError
from vgpu_agent.gpu.memory import FILE as FAULT_FILE
from vgpu_agent.gpu.memory import FaultMemory
from vgpu_agent.kubelet.session import KUBELET_SOCKET
from vgpu_agent.observe.web import listen
from vgpu_agent.settings import MAX_SOCKET_PATH, Address, Settings


def check_socket_paths(*paths: Path) -> Iterable[Check]:
    """Whether paths of sockets fit into what a socket's address can hold."""
    for path in paths:
        length = len(bytes(path))
        detail = f"{path} takes {length} of {MAX_SOCKET_PATH} bytes"
        if length <= MAX_SOCKET_PATH:
            yield Check("socket path", Verdict.OK, detail)
        else:
            advice = "set VGPU_KUBELET_DIR or VGPU_MPS_DIRECTORY to a shorter path"
            yield Check("socket path", Verdict.FAIL, detail, advice)


def check_kubelet(directory: Path) -> Iterable[Check]:
    """The directory in which kubelet and plugins meet, and whether a kubelet listens there."""
    name = "kubelet directory"
    advice = "mount the kubelet's directory at the same path, writable, or set VGPU_KUBELET_DIR"
    try:
        found = directory.stat()
    except OSError as error:
        yield Check(name, Verdict.FAIL, f"{directory}: {error.strerror}", advice)
        return
    usable = stat.S_ISDIR(found.st_mode) and writable(directory)
    detail = described(directory, found, selinux_label(directory))
    yield Check(name, Verdict.OK if usable else Verdict.FAIL, detail, advice)
    path = directory / KUBELET_SOCKET
    reason = connects(path)
    if reason is None:
        yield Check("kubelet socket", Verdict.OK, f"a kubelet listens at {path}")
        return
    advice = "start the node's kubelet, or set VGPU_KUBELET_DIR to the directory that it uses"
    yield Check("kubelet socket", Verdict.FAIL, f"no kubelet at {path}: {reason}", advice)


def check_endpoint(settings: Settings) -> Iterable[Check]:
    """Our own socket: free, left by an agent that is gone, or served, then by whom."""
    name, path = "endpoint", settings.plugin_directory / settings.endpoint
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        yield Check(name, Verdict.OK, f"{path} is free")
        return
    if not stat.S_ISSOCK(mode):
        yield Check(name, Verdict.FAIL, f"{path} is no socket", "remove it")
    elif connects(path) is not None:
        yield Check(name, Verdict.OK, f"{path} is stale; the agent makes it anew")
    elif (pid := listener_pid(path)) and pid == _agent_pid(settings):
        yield Check(name, Verdict.OK, f"served by the running agent, process {pid}")
    elif _served_resource(settings) == settings.resource_name:
        yield Check(name, Verdict.OK, "served by the running agent")
    else:
        detail = f"another process{f', {pid},' if pid else ''} serves {path}"
        advice = f"another agent for {settings.resource_name}? Remove one"
        yield Check(name, Verdict.FAIL, detail, advice)


def check_metrics(address: Address) -> Iterable[Check]:
    """The metrics address: free, or served by the running agent."""
    name = "metrics address"
    code, text = _get(address, "/healthz") if address.port else (0, "")
    if code == 200 and text.strip() == "ok":
        yield Check(name, Verdict.OK, f"{address} is served by the running agent")
        return
    if code == 503 and text.startswith("no sign of life"):
        advice = "see the agent's log; its liveness probe starts it anew"
        yield Check(name, Verdict.FAIL, f"the agent at {address} is stuck: {text.strip()}", advice)
        return
    try:
        listen(address).close()
    except ListenError as error:
        advice = "set another VGPU_METRICS_ADDRESS, or end what uses this one"
        yield Check(name, Verdict.FAIL, str(error).partition("; set another")[0], advice)
    else:
        yield Check(name, Verdict.OK, f"{address} is free")


def check_state_directory(path: Path) -> Iterable[Check]:
    """Where the agent remembers faults. It runs without, and forgets."""
    name = "state directory"
    advice = "mount a writable directory there, or set VGPU_STATE_DIRECTORY"
    lost = "a restart of the agent would forget which cards wait for a reset"
    try:
        found = path.stat()
    except FileNotFoundError:
        parent = next(each for each in path.parents if each.exists())
        if parent.is_dir() and writable(parent):
            yield Check(name, Verdict.OK, f"{path} is not there yet; the agent makes it")
        else:
            yield Check(name, Verdict.WARN, f"{path} cannot be made: {lost}", advice)
        return
    except OSError as error:
        yield Check(name, Verdict.WARN, f"{path}: {error.strerror}: {lost}", advice)
        return
    detail = described(path, found, selinux_label(path))
    if stat.S_ISDIR(found.st_mode) and writable(path):
        yield Check(name, Verdict.OK, detail)
    else:
        yield Check(name, Verdict.WARN, f"{detail}: {lost}", advice)


def check_faults(directory: Path) -> Iterable[Check]:
    """The cards that wait for a reset, as the agent remembers them."""
    name, path = "remembered faults", directory / FAULT_FILE
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        yield Check(name, Verdict.OK, "none")
        return
    except (OSError, ValueError):
        data = None
    if not (isinstance(data, dict) and {"boot_id", "cards"} <= data.keys()):
        advice = f"remove {path}: the agent makes it anew"
        yield Check(name, Verdict.WARN, f"{path} cannot be read", advice)
        return
    remembered = FaultMemory(directory).load()
    for each in remembered:
        detail = f"{each.uuid} waits for a reset: {each.fault.detail}"
        yield Check(name, Verdict.FAIL, detail, each.fault.advice)
    if not remembered:
        yield Check(name, Verdict.OK, "none of this boot")


def _agent_pid(settings: Settings) -> int | None:
    agent = running.find(settings.state_directory)
    return None if agent is None else agent.pid


def _served_resource(settings: Settings) -> str | None:
    """The resource of the agent of these settings; None where none answers."""
    try:
        return str(running.ask(running.address_of(settings)).report["resource"])
    except NoAgentError:
        return None


def _get(address: Address, path: str) -> tuple[int, str]:
    """Code and text of a page there; 0 where nothing answers."""
    try:
        code, body = running.get(address, path)
    except NoAgentError:
        return 0, ""
    return code, body.decode(errors="replace")
