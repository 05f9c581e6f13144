"""What to do about what is wrong: the only place that words it, as commands that can be pasted."""

from collections.abc import Iterable
from enum import StrEnum
from typing import Self

from vgpu_agent.model.devices import split_device_id
from vgpu_agent.model.place import Advice, Place, Step
from vgpu_agent.model.rules import SharingRules

# A GPU


class Remedy(StrEnum):
    """What makes a GPU healthy again, in words. A later one makes those before it superfluous."""

    NOTHING = "nothing", "nothing to do for the GPU; look at the application that ran on it"
    UNCORDON = "uncordon", "when it is to be given to pods again, uncordon it"
    WAIT = (
        "wait",
        (
            "wait: it is healthy again after `VGPU_RECOVERY_SECONDS` of passed probes; if it comes"
            " again, see the kernel log"
        ),
    )
    RESET_LATER = "reset-later", "reset the GPU when it suits"
    MPS_CLIENTS = (
        "mps-clients",
        (
            "find the client that failed; it is over when the GPU's MPS clients are gone: delete"
            " the pods that do not end"
        ),
    )
    MPS_MODE = "mps-mode", "set the GPU's compute mode again"
    MPS_POD = "mps-pod", "see what the node's MPS pod says"
    LIMITS = (
        "limits",
        (
            "make the node able to do it, or set `VGPU_MEMORY_LIMITS=auto` (`memoryLimits`):"
            " docs/memory-limits.md"
        ),
    )
    COMPUTE_MODE = "compute-mode", "set the GPU's compute mode back"
    LOOK = "look", "see what `nvidia-smi` and the kernel log of the node say"
    HANG = "hang", "see the kernel log; a driver that goes on hanging needs a reboot of the node"
    RESET = "reset", "delete the pods that hold the GPU, release it, reset it"
    RECOVERY = (
        "recovery",
        (
            "do what the driver asks for; for a reset delete the pods that hold the GPU, release"
            " it, reset it"
        ),
    )
    REBOOT = "reboot", "drain the node and reboot it"
    REPLACE = "replace", "have the GPU replaced: it has no spare memory rows left"

    words: str

    def __new__(cls, name: str, words: str) -> Self:
        """A word of the report, with its words for people."""
        made = str.__new__(cls, name)
        made._value_, made.words = name, words
        return made


def for_gpu(remedy: Remedy, uuid: str, place: Place, sharing: SharingRules) -> Advice:
    """What to do for that GPU."""
    kernel_log = _kernel_log(place)
    match remedy:
        case Remedy.WAIT:
            steps = [kernel_log]
        case Remedy.MPS_CLIENTS:
            steps = [_drain_list(uuid, place), Step("what MPS says", place.mps_log("watch"))]
        case Remedy.MPS_POD:
            steps = _mps_logs(place)
        case Remedy.LIMITS:
            steps = [_limits_log(place)]
        case Remedy.MPS_MODE:
            steps = [_mps_mode(place)]
        case Remedy.UNCORDON:
            steps = [Step("gives it to pods again", f"{place.agent} vgpu-agent uncordon {uuid}")]
        case Remedy.COMPUTE_MODE:
            mode = f"{place.shell} nvidia-smi -i {uuid} -c DEFAULT"
            steps = [Step("set it", mode)]
        case Remedy.LOOK:
            steps = [Step("does the driver answer?", f"{place.shell} nvidia-smi"), kernel_log]
        case Remedy.HANG | Remedy.REBOOT:
            steps = _reboot(place)
        case Remedy.RESET | Remedy.RECOVERY | Remedy.RESET_LATER:
            steps = _reset(uuid, place, sharing)
        case Remedy.REPLACE:
            rows = f"{place.shell} nvidia-smi -q -i {uuid} -d ROW_REMAPPER"
            steps = [Step("what the driver says of it", rows), _drain_list(uuid, place)]
        case Remedy.NOTHING:
            steps = []
    return Advice(remedy.words, tuple(steps))


def _drain_list(uuid: str, place: Place) -> Step:
    words = "lists the pods that hold the GPU's vGPUs, as commands that delete them"
    return Step(words, f"{place.agent} vgpu-agent drain-list {uuid}")


def _reset(uuid: str, place: Place, sharing: SharingRules) -> list[Step]:
    """The driver refuses a reset while any process has the GPU open."""
    steps = [_drain_list(uuid, place)]
    if sharing.mps:
        restart = f"vgpu-agent mps restart {sharing.daemon_of(uuid)}"
        steps.append(Step("ends its MPS server", f"{place.in_mps('daemon')} {restart}"))
    others = "pods that hold it without a vGPU, such as `dcgm-exporter`: take them off the node"
    steps += [
        Step(others, place.pods("dcgm", "nvidia")),
        Step("makes the agent close NVML", f"{place.agent} vgpu-agent release --for 10m"),
        Step("a shell on the node; the next three commands are for it", place.shell),
        Step("what else has it open, such as `nvidia-persistenced`?", "fuser -v /dev/nvidia[0-9]*"),
        Step("ends that; start it again afterwards", "systemctl stop nvidia-persistenced"),
        Step("resets it", f"nvidia-smi --gpu-reset -i {uuid}"),
        Step(
            "outside of that shell: says that it was reset",
            f"{place.agent} vgpu-agent release --reset-done {uuid}",
        ),
    ]
    if sharing.mps and sharing.mps_exclusive:
        steps.append(_mps_mode(place))
    return steps


def _mps_mode(place: Place) -> Step:
    words = "sets EXCLUSIVE_PROCESS; a reset sets DEFAULT"
    return Step(words, f"{place.in_mps('restore')} vgpu-agent mps compute-modes")


def _limits_log(place: Place) -> Step:
    return Step("what the container says that sets them", place.limits_log)


def _kernel_log(place: Place) -> Step:
    log = f"{place.shell} journalctl -k -g NVRM"
    return Step("the driver's lines of the kernel log", log)


def _reboot(place: Place) -> list[Step]:
    return [
        _kernel_log(place),
        Step("moves its pods away and keeps new ones off", place.drain),
        Step("reboots it", f"{place.shell} systemctl reboot"),
        Step("when it is back", f"kubectl uncordon {place.node}"),
    ]


def _mps_logs(place: Place) -> list[Step]:
    return [
        Step("is it there?", place.mps_pods),
        Step("what the daemons do", place.mps_log("daemon")),
        Step("what they say", place.mps_log("watch")),
    ]


# The node

NVIDIA_RUNTIME = (
    "set the chart's value `runtimeClassName=nvidia`, or make the NVIDIA runtime the node's default"
)
"""What gives the driver to our containers."""


def cordoned(uuid: str, place: Place) -> Advice:
    """A GPU that gives no vGPUs anyway is cordoned."""
    step = Step("takes the cordon back", f"{place.agent} vgpu-agent uncordon {uuid}")
    return Advice("where it is gone for good, uncordon it", (step,))


def agent_log(place: Place) -> Advice:
    """Where nothing better is known."""
    return Advice("see the agent's log", (Step("the log", place.log),))


def driver_down(place: Place) -> Advice:
    """The driver cannot be asked."""
    what = "make `nvidia-smi` work on the node, then in the agent's container"
    steps = (
        Step("does it work on the node?", f"{place.shell} nvidia-smi"),
        Step("does it work in the agent's container?", f"{place.agent} nvidia-smi"),
        Step(
            "after a change of the driver: a new container has what the node has now",
            f"kubectl -n {place.namespace} delete pod {place.pod}",
        ),
    )
    return Advice(what, steps)


def released(place: Place) -> Advice:
    """NVML is closed for a reset."""
    steps = (
        Step("a shell on the node, for the reset", place.shell),
        Step("the GPUs that need one", "nvidia-smi --gpu-reset -i INDEX"),
    )
    return Advice("reset the GPUs now, or wait", steps)


def no_gpu(place: Place) -> Advice:
    """The driver answers and names no GPU."""
    steps = (
        Step("the GPUs of the driver", f"{place.shell} nvidia-smi -L"),
        Step("the GPUs of the PCI bus", f"{place.shell} lspci -d 10de:"),
    )
    return Advice("see what the node has; a node without GPUs needs no agent", steps)


def silent_gpu(place: Place) -> Advice:
    """The driver counts a GPU that does not say what it is."""
    return Advice(
        "see the kernel log; where it stays so the node needs a reboot", tuple(_reboot(place))
    )


def gone(place: Place) -> Advice:
    """GPUs that the driver listed in this boot, and lists no longer."""
    what = (
        "drain the node and reboot it, unless they were taken out; have those replaced that do not"
        " come back"
    )
    return Advice(what, tuple(_reboot(place)))


def kubelet_away(place: Place) -> Advice:
    """No kubelet listens, or it refuses us."""
    steps = (
        Step("directories and sockets", f"{place.agent} vgpu-agent doctor"),
        Step("does the kubelet run?", f"{place.shell} systemctl status kubelet"),
        Step("how attempts end", place.log),
    )
    return Advice("if this lasts for more than a few seconds, see why", steps)


def rival(place: Place) -> Advice:
    """Another device plugin serves our resource."""
    steps = (
        Step("plugins of the node", place.pods("device-plugin", "vgpu")),
        Step("what runs there twice?", "kubectl get daemonsets -A -o wide"),
        Step("the sockets of all plugins", f"{place.agent} vgpu-agent doctor"),
    )
    what = "remove one of the two, or give one another `VGPU_RESOURCE_NAME` (value `resourceName`)"
    return Advice(what, steps)


def podresources(place: Place) -> Advice:
    """The kubelet does not say who holds what."""
    what = "mount the kubelet's pod-resources directory, or set `VGPU_KUBELET_DIR` (`kubeletDir`)"
    return Advice(what, (Step("where a kubelet listens", f"{place.agent} vgpu-agent doctor"),))


def processes(place: Place) -> Advice:
    """Processes of no pod that is known are on a GPU."""
    steps = (
        Step("the processes on the GPUs", f"{place.shell} nvidia-smi"),
        Step("the pods of the node", place.pods()),
    )
    return Advice("find out what they are, and end what has no business there", steps)


def mps(place: Place) -> Advice:
    """An MPS daemon does not do what it must."""
    return Advice(Remedy.MPS_POD.words, tuple(_mps_logs(place)))


def mps_replacement(place: Place) -> Advice:
    """MPS daemons were set up for something else than the settings say."""
    what = (
        "when it suits: where the number of vGPUs differs, drain the GPU and run"
        " `vgpu-agent mps restart GPU` in the MPS pod; for other limits, or a GPU that is excluded"
        " now, drain the node's GPU pods, then delete its MPS pod"
    )
    delete = f"kubectl -n {place.namespace} delete {place.mps_pod}"
    steps = (
        Step("drains the node", place.drain),
        Step("the next MPS pod is set up by the settings", delete),
        Step("lets pods in again", f"kubectl uncordon {place.node}"),
    )
    return Advice(what, steps)


def mps_busy(place: Place) -> Advice:
    """Another process keeps the daemon's only connection."""
    shell = Step("a shell on the node", place.shell)
    return Advice("end that process, or the pod it belongs to", (shell,))


def orphaned(vgpus: Iterable[str], place: Place) -> Advice:
    """Containers hold vGPUs that the node no longer has."""
    what = (
        "delete the pods that hold them; where fewer vGPUs are made than before,"
        " `VGPU_REPLICAS` (`replicas`) set back makes them again"
    )
    uuids = dict.fromkeys(split[0] for each in vgpus if (split := split_device_id(each)))
    return Advice(what, tuple(_drain_list(uuid, place) for uuid in uuids))


def no_limits(place: Place, *, enforced: bool) -> Advice:
    """A container runs without its memory limits."""
    what = "delete its pod where it must not go on so; docs/memory-limits.md has what to look at"
    return Advice(what, (_limits_log(place),) if enforced else ())


MPS_ONE_USER = Advice("run the containers of a GPU as one user: MPS serves one at a time")
MPS_SPLIT = Advice(
    "delete their pods, for ones that ask for fewer vGPUs, or set `VGPU_MPS_DAEMONS=node`"
    " (`mps.daemons`)"
)
CHECKS_OFF = Advice("set `VGPU_HEALTH_CHECKS=on` (`health.checks`)")
EXCLUDED = Advice("do that, or leave it to others")
ALL_EXCLUDED = Advice("see below why each GPU is excluded")
AS_FOR_DRIVER = Advice("as for the driver")
AS_FOR_KUBELET = Advice("as for the kubelet")
OVER_SHARE = Advice(
    "give its program less memory (`VGPU_MEMORY_BYTES` says how much), or its container more vGPUs"
)
NOTES = Advice("see docs/health.md and docs/settings.md")
