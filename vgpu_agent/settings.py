"""Every VGPU_* variable: a table of what it is, and all of their values as the agent has them.

A line of `Settings` is all there is to say of a setting: the docs, the chart's schema, comments and
environment are written from it by `python -m tests.readme`, and text becomes its value by it, see
`settings_reading`. The module is long because the whole table stands in it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args

from vgpu_agent import settings_kinds as kinds
from vgpu_agent.model.rules import (
    MAX_DAEMON_NAME,
    MIB,
    MPS_CONTEXTS,
    MPS_MAX_CLIENTS,
    MPS_SERVER_MARGIN,
    DeviceList,
    HealthRules,
    MemoryLimits,
    MpsDaemons,
    MpsLimits,
    Placement,
    SharingRules,
)
from vgpu_agent.observe.logs import LogFormat, LogLevel
from vgpu_agent.settings_kinds import AbsolutePath, Kind, Seconds, Switch
from vgpu_agent.unixsocket import MAX_PATH

PREFIX = "VGPU_"


class GpuDriverKind(StrEnum):
    """Where GPUs come from."""

    NVML = "nvml"
    SIMULATED = "simulated"


class SharingKind(StrEnum):
    """How containers share a GPU."""

    MPS = "mps"
    TIME_SLICING = "time-slicing"


class MpsComputeMode(StrEnum):
    """What `vgpu-agent mps prepare` does with the compute mode of the shared GPUs."""

    EXCLUSIVE = "exclusive"
    KEEP = "keep"


@dataclass(frozen=True, slots=True)
class Setting:
    """What there is to say of a setting, beside its kind.

    Its default as a user writes it, its key in the chart's values, what it is. A `?` ends a key
    that is null in the chart, which then sets nothing. What has no key the chart sets by the
    downward API. `also` is what is allowed beyond the kind: a rule over several settings.
    """

    default: str
    chart: str
    what: str
    also: str = ""


def setting(default: str, chart: str, what: str, also: str = "") -> Any:
    """A line of the table."""
    return field(metadata={Setting: Setting(default, chart, what, also)})


# What is allowed by a rule over several settings, and what is meant.
_AT_MOST = "under MPS at most VGPU_MPS_MAX_CLIENTS"
_SHORT = f"the socket {{}}vgpu-RESOURCE.sock in it at most {MAX_PATH} bytes long"
# NVIDIA's daemons end without a word where the path has as many bytes as fit (535, 550, 555; seen).
_MAX_MPS_DIRECTORY = MAX_PATH - 1 - len("//pipe/control_privileged") - MAX_DAEMON_NAME
_RESERVED = f"{MPS_SERVER_MARGIN // MIB}Mi under MPS, otherwise 0"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the agent runs with. A field `name` is the variable `VGPU_NAME`.

    Fields that others are checked against stand first: they are read in order.
    """

    # fmt: off
    gpu_driver: GpuDriverKind = setting("nvml", "gpuDriver",
        "Where GPUs come from; `simulated` to try it without GPUs.")
    sharing: SharingKind = setting("mps", "sharing", "How containers share a GPU.")
    mps_max_clients: kinds.MaxClients = setting("auto", "mps.maxClients",
        "Most vGPUs of a GPU under MPS: CUDA contexts that it serves. `auto`:"
        f" {MPS_MAX_CLIENTS} from CUDA 13.1 on, {MPS_CONTEXTS} before.")
    replicas: kinds.Replicas = setting("10", "replicas?", "vGPUs of each GPU.", _AT_MOST)
    replicas_by_gpu: kinds.ReplicasByGpu = setting("", "replicasByGpu",
        "vGPUs of single GPUs: 1 is a whole GPU, 0 excludes the GPU.", _AT_MOST)
    device_memory: kinds.DeviceMemory = setting("", "deviceMemory?",
        "Memory of a vGPU; then each GPU has as many vGPUs as fit.",
        "not together with VGPU_REPLICAS")
    resource_name: kinds.ResourceName = setting("k8s.amazonaws.com/vgpu", "resourceName",
        "The extended resource that pods ask for.")
    device_plugin_dir: kinds.OptionalPath = setting("", "devicePluginDir?",
        "Where kubelet and device plugins meet, if not in VGPU_KUBELET_DIR/device-plugins. Kubelets"
        " have it at /var/lib/kubelet/device-plugins, whatever their --root-dir is.",
        _SHORT.format(""))
    kubelet_dir: AbsolutePath = setting("/var/lib/kubelet", "kubeletDir",
        "The kubelet's root directory, --root-dir: it has pod-resources. On k0s it is"
        " /var/lib/k0s/kubelet, on MicroK8s /var/snap/microk8s/common/var/lib/kubelet; set"
        " VGPU_DEVICE_PLUGIN_DIR too where device-plugins is not in it.",
        _SHORT.format("device-plugins/"))
    device_list: DeviceList = setting("envvar", "deviceList",
        "How the container runtime learns which GPUs a container sees.")
    cdi_kind: kinds.CdiKind = setting("nvidia.com/gpu", "cdiKind",
        "Kind of the GPUs in the host's CDI specs; names are KIND=UUID.")
    mps_limits: MpsLimits = setting("client", "mps.limits",
        "Where limits are put: the container's environment, the daemon (one vGPU for each container"
        " then), nowhere.")
    mps_compute_mode: MpsComputeMode = setting("exclusive", "mps.computeMode",
        "Whether shared GPUs are put into compute mode EXCLUSIVE_PROCESS: only MPS can use them.")
    mps_threads: kinds.ThreadLimit = setting("share", "mps.threads",
        "Thread percentage of a container: its share, no limit, or its share times a factor.")
    mps_daemons: MpsDaemons = setting("gpu", "mps.daemons",
        "One MPS daemon for each GPU, or one for the node: then faults and other users reach all"
        " GPUs, and a container may have vGPUs of several.")
    mps_directory: AbsolutePath = setting("/run/vgpu-agent/mps", "mps.directory",
        "Holds the MPS daemons' pipes, logs and state, on the host and in containers.",
        f"at most {_MAX_MPS_DIRECTORY} bytes long")
    mps_multiuser: Switch = setting("off", "mps.multiuser",
        "Whether users of different UIDs are served at the same time, where the daemon can.")
    mps_shm: Switch = setting("on", "mps.shm",
        "Whether MPS containers share a directory of the host as their /dev/shm.")
    mps_shm_directory: AbsolutePath = setting("/dev/shm/vgpu-agent", "mps.shmDirectory",  # noqa: S108
        "Holds that directory. It is emptied, and everybody on the node can read and write it.",
        "a directory of its own, not /dev/shm itself")
    memory_reserved: kinds.Reserved = setting("auto", "memoryReserved",
        f"Memory of each GPU kept out of the shares, for the MPS server. `auto`: {_RESERVED}.")
    memory_limits: MemoryLimits = setting("auto", "memoryLimits",
        "Whether the driver holds a container to its memory, from r615 on, with MPS and without."
        " `auto`: where the node's container toolkit does it. `driver`: a container of the agent's"
        " pod does it, and vGPUs are unhealthy where the driver cannot.")
    memory_guarantee: Switch = setting("off", "memoryGuarantee",
        "Whether the driver also keeps a container's share of memory for it, which leaves"
        " reservations behind where a container ends at a bad moment.",
        "`on` not with VGPU_MEMORY_LIMITS=off")
    memory_limits_enable_controller: Switch = setting("off", "memoryLimitsEnableController",
        "Whether the cgroup controller that memory limits need is turned on for pods.",
        "`on` only with VGPU_MEMORY_LIMITS=driver")
    placement: Placement = setting("spread", "placement",
        "Put containers on the GPU with the most free vGPUs, or fill GPUs up.")
    health_interval: Seconds = setting("5", "health.interval",
        "Seconds between two probes of every GPU.")
    recovery_seconds: Seconds = setting("60", "health.recoverySeconds",
        "Seconds of passed probes after which a GPU that needs no reset is healthy.")
    health_checks: Switch = setting("on", "health.checks",
        "Whether faults of GPUs are looked for. Off: pods land on broken GPUs.")
    ignored_xids: kinds.Xids = setting("", "health.ignoredXids",
        "XIDs that are only counted, whatever the catalogue says.")
    critical_xids: kinds.Xids = setting("", "health.criticalXids",
        "XIDs that mark the GPU, whatever the catalogue says.", "none that VGPU_IGNORED_XIDS has")
    driver_wait: Seconds = setting("300", "health.driverWait",
        "Seconds to wait for a driver library that is missing or of another version; then the agent"
        " ends, for its container to be created again.")
    lost_card_seconds: Seconds = setting("3600", "health.lostCardSeconds",
        "Seconds for which a lost GPU stays listed, as unhealthy.")
    state_directory: AbsolutePath = setting("/run/vgpu-agent", "stateDirectory",
        "Where the agent remembers which GPUs wait for a reset.", "not in VGPU_MPS_SHM_DIRECTORY")
    cordon_directory: AbsolutePath = setting("/var/lib/vgpu-agent/cordoned", "cordonDirectory",
        "Where the agent remembers which GPUs are cordoned, also over a reboot of the node.",
        "not in VGPU_MPS_SHM_DIRECTORY, and not VGPU_STATE_DIRECTORY itself")
    metrics_address: kinds.ListenAddress = setting("[::]:9408", "metrics.address",
        "Where the page, /metrics, /healthz, /readyz and /status.json are served. `[::]` is IPv6"
        " and IPv4, or IPv4 alone where the machine has no IPv6.")
    status_hosts: kinds.HostNames = setting("", "statusHosts",
        "Names under which the page and /status.json are served, besides localhost and IP"
        " addresses.")
    status_page: Switch = setting("on", "statusPage",
        "Whether there is a page at /, and names of pods in /status.json (/metrics has them).")
    podresources_interval: Seconds = setting("10", "podResourcesInterval",
        "Seconds between two questions to the kubelet about who holds which vGPU; it is also asked"
        " after each allocation.")
    process_metrics: Switch = setting("off", "processMetrics",
        "Whether memory and processes of each container are reported. Needs the host's PID"
        " namespace and /var/log/containers.")
    node_name: kinds.ObjectName = setting("", "",
        "Name of the node, in page, `status`, log and commands to run. Empty: the host name.")
    pod_name: kinds.ObjectName = setting("", "",
        "Name of the agent's own pod, in commands to run.")
    pod_namespace: kinds.ObjectName = setting("", "", "Namespace of the agent's own pod.")
    log_level: LogLevel = setting("info", "log.level",
        "The least important log lines that are written.")
    log_format: LogFormat = setting("text", "log.format", "How log lines look.")
    simulated_gpus: kinds.GpuCount = setting("2", "simulated.gpus", "Number of simulated GPUs.")
    simulated_model: kinds.Name = setting("NVIDIA Simulated 24GB", "simulated.model",
        "Model name of the simulated GPUs.")
    simulated_memory: kinds.SimulatedMemory = setting("24Gi", "simulated.memory",
        "Memory of each simulated GPU.")
    simulated_numa_nodes: kinds.NumaNodes = setting("0,1", "simulated.numaNodes",
        "NUMA nodes of the simulated GPUs, in turn; `none`: on no node.")
    # fmt: on

    @property
    def plugin_directory(self) -> Path:
        """Where the kubelet's and the plugins' sockets are."""
        return self.device_plugin_dir or self.kubelet_dir / "device-plugins"

    @property
    def endpoint(self) -> str:
        """File name of our socket."""
        return _endpoint(self.resource_name)

    def sharing_rules(self) -> SharingRules:
        """How GPUs become vGPUs, as the model takes it."""
        return SharingRules(
            **self._named_as_in(SharingRules)
            | {
                "mps": self.sharing is SharingKind.MPS,
                "mps_directory": str(self.mps_directory),
                "mps_shm_directory": str(self.mps_shm_directory) if self.mps_shm else None,
                "mps_exclusive": self.mps_compute_mode is MpsComputeMode.EXCLUSIVE,
            }
        )

    def health_rules(self) -> HealthRules:
        """When a GPU is unhealthy, as the model takes it."""
        return HealthRules(**self._named_as_in(HealthRules))

    def _named_as_in(self, rules: type[SharingRules | HealthRules]) -> dict[str, Any]:
        names = {each.name for each in dataclasses.fields(rules)} & TABLE.keys()
        return {name: getattr(self, name) for name in names}


TABLE: Mapping[str, Setting] = {
    each.name: each.metadata[Setting] for each in dataclasses.fields(Settings)
}
"""The settings by their fields, in the order of the table."""

TYPES: Mapping[str, Any] = {each.name: each.type for each in dataclasses.fields(Settings)}
"""The annotations of the fields."""


def _endpoint(resource_name: str) -> str:
    """The socket's file name for a resource: the same for every agent that serves it.

    The name is not unique to a process on purpose: two agents for one resource must meet.
    """
    return f"vgpu-{resource_name.replace('/', '_')}.sock"


# Rules over several settings. Each takes a value and the fields before it, but for wrong ones.

Others = Mapping[str, Any]


def _mps_serves_as_many(value: int | dict[str, int], others: Others) -> bool:
    most = others.get("mps_max_clients") or MPS_MAX_CLIENTS
    counts = value.values() if isinstance(value, dict) else [value]
    return others.get("sharing") is not SharingKind.MPS or max(counts, default=0) <= most


def _socket_path_fits(directory: Path | None, others: Others) -> bool:
    resource = others.get("resource_name")
    if directory is None or resource is None:
        return True
    return len(bytes(directory / _endpoint(resource))) <= MAX_PATH


def _directory_of_its_own(shm: Path, others: Others) -> bool:
    mps = others.get("mps_directory")
    found = (mps, others.get("kubelet_dir"), others.get("device_plugin_dir"))
    used = [Path("/dev/shm"), *(each for each in found if each)]  # noqa: S108
    return not any(each.is_relative_to(shm) for each in used) and _outside(shm, mps)


def _outside(path: Path, directory: Path | None) -> bool:
    return directory is None or not path.is_relative_to(directory)


_RULES: dict[str, Callable[[Any, Others], bool]] = {
    "replicas": _mps_serves_as_many,
    "replicas_by_gpu": _mps_serves_as_many,
    "device_plugin_dir": _socket_path_fits,
    "kubelet_dir": lambda path, others: _socket_path_fits(
        None if others.get("device_plugin_dir") else path / "device-plugins", others
    ),
    "mps_directory": lambda path, _others: len(bytes(path)) <= _MAX_MPS_DIRECTORY,
    "mps_shm_directory": _directory_of_its_own,
    "memory_guarantee": lambda on, others: (
        not on or others.get("memory_limits") is not MemoryLimits.OFF
    ),
    "memory_limits_enable_controller": lambda on, others: (
        not on or others.get("memory_limits", MemoryLimits.DRIVER) is MemoryLimits.DRIVER
    ),
    "state_directory": lambda path, others: _outside(path, others.get("mps_shm_directory")),
    "cordon_directory": lambda path, others: (
        _outside(path, others.get("mps_shm_directory")) and path != others.get("state_directory")
    ),
    "critical_xids": lambda xids, others: not xids & others.get("ignored_xids", frozenset()),
}


def fits(name: str, value: Any, others: Others) -> bool:
    """Whether a value fits those of the fields before it."""
    rule = _RULES.get(name)
    return rule is None or rule(value, others)


def kind_of(name: str) -> Kind:
    """The kind of a field."""
    type_ = TYPES[name]
    found = next((each for each in get_args(type_) if isinstance(each, Kind)), None)
    return found or kinds.choice(type_)


def allowed(name: str) -> str:
    """What a field's variable may say, in words."""
    return f"{kind_of(name).words}; {TABLE[name].also}".removesuffix("; ")


def variable(name: str) -> str:
    """The variable of a field."""
    return PREFIX + name.upper()
