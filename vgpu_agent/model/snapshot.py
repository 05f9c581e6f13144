"""What the edges report (`Inputs`), and the pure function that makes a `Snapshot` of it.

`compose` decides which GPUs are advertised, as how many vGPUs, and which of their faults are in
effect. Everything that is shown of the node is a function of a snapshot. The module is long because
what is composed, what comes of it and how stand in one place.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property

from vgpu_agent.model.devices import Excluded, Fault, Gpu, Inventory, Reason, SharedGpu
from vgpu_agent.model.facts import EVENTS, Cordon, DaemonLook, MpsLook
from vgpu_agent.model.health import GpuHealth
from vgpu_agent.model.holders import (
    Assignment,
    Holder,
    Holders,
    Part,
    Usage,
    largest_free,
    orphaned,
    parts,
)
from vgpu_agent.model.limits import Limited, LimitsLook, Memory, memory_of
from vgpu_agent.model.place import Place
from vgpu_agent.model.policy import cordon_faults
from vgpu_agent.model.rules import MIB, HealthRules, MpsLimits, SharingRules
from vgpu_agent.model.share import Divided, divide


class RegistrationResult(StrEnum):
    """How an attempt to register with the kubelet ended."""

    REGISTERED = "registered"
    REFUSED = "refused"
    UNREACHABLE = "unreachable"
    NO_STREAM = "no-stream"
    ENDPOINT = "endpoint"


@dataclass(frozen=True, slots=True)
class Driver:
    """The source of GPUs: its version, or why it cannot be asked.

    `released_until`: NVML is closed for a reset until then; `since`: it is up, or not, since then,
    None where it was never otherwise. Both in seconds since the epoch.
    """

    version: str | None = None
    error: str | None = "not asked yet"
    released_until: float | None = None
    since: float | None = None

    @property
    def up(self) -> bool:
        """Whether the driver answered when it was last asked."""
        return self.error is None


@dataclass(frozen=True, slots=True)
class Kubelet:
    """The session with the kubelet. `streams` counts the ListAndWatch streams open now.

    `error` says why the last attempt to register failed, or why the registration ended; `away` that
    it is for want of a kubelet. `rival` names another plugin that seems to serve our resource.
    `since`: since then, in seconds since the epoch, it is connected, or not; None where it was
    never otherwise.
    """

    registered: bool = False
    streams: int = 0
    error: str | None = None
    away: bool = False
    rival: str | None = None
    since: float | None = None

    @property
    def connected(self) -> bool:
        """Whether the kubelet is registered with and follows the device list."""
        return self.registered and self.streams > 0


@dataclass(frozen=True, slots=True)
class FirstSeen:
    """What a GPU was when it was first seen in this boot: its division must not change with it.

    `index` is the index by which settings name the GPU for the boot, None where another GPU has it:
    indices shift when a GPU drops out. Drivers change the bytes that they reserve.
    """

    index: int | None
    memory_bytes: int | None
    reserved_bytes: int


@dataclass(frozen=True)
class Inputs:
    """What the edges reported last.

    `gpus` are all GPUs that the driver described, by UUID, and `present` those that its last
    complete look found. `cdi_names` are what the host's CDI specs name, None where that does not
    matter. `health` is kept by UUID, listed now or not. `mps_faults` are by the name of the MPS
    daemon whose GPUs they are of, `""` for GPUs without one. `memory_used` is in bytes by UUID.
    `missing` says by UUID why something is not known of a GPU that it should offer. `limits` is
    what is known of the driver's memory limits, None where they are not wanted; `limits_faults` are
    by the UUID of the GPU that cannot have them. `usage`
    is None where processes are not looked at. `allocates` counts the calls of Allocate that were
    answered. `store_error` says why what must outlive the agent is not written. `cordons` are by
    UUID, of GPUs listed or not; `cordon_error` says why they cannot be read.
    """

    driver: Driver = Driver()
    gpus: Mapping[str, Gpu] = field(default_factory=dict)
    present: frozenset[str] = frozenset()
    undescribed: tuple[Excluded, ...] = ()
    cdi_names: frozenset[str] | None = None
    first_seen: Mapping[str, FirstSeen] = field(default_factory=dict)
    health: Mapping[str, GpuHealth] = field(default_factory=dict)
    memory_used: Mapping[str, int] = field(default_factory=dict)
    missing: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    cordons: Mapping[str, Cordon] = field(default_factory=dict)
    cordon_error: str | None = None
    mps_look: MpsLook | None = None
    mps_faults: Mapping[str, tuple[Fault, ...]] = field(default_factory=dict)
    limits: LimitsLook | None = None
    limits_faults: Mapping[str, Fault] = field(default_factory=dict)
    kubelet: Kubelet = Kubelet()
    holders: Holders = Holders()
    usage: Usage | None = None
    store_error: str | None = None
    xids: Mapping[tuple[str | None, int], int] = field(default_factory=dict)
    transitions: Mapping[tuple[str, str, Reason], int] = field(default_factory=dict)
    registrations: Mapping[RegistrationResult, int] = field(default_factory=dict)
    lists_sent: int = 0
    allocates: int = 0


@dataclass(frozen=True, slots=True)
class Mps:
    """What is known of the MPS daemons of the node, where GPUs are shared by MPS.

    `problem` says why no vGPU at all can be given, `replacement` what daemons serve otherwise than
    the settings say, and until when; None where all is well. `daemons` are by the UUID of the GPU
    that they serve, without GPUs that have none.
    """

    look: MpsLook
    problem: str | None
    replacement: str | None
    daemons: Mapping[str, DaemonLook]


@dataclass(frozen=True)
class Snapshot(Inputs):
    """The inputs at one moment, and what follows from them. Every view is a function of this.

    `mps` is None where GPUs are not shared by MPS. `one_each`: a container may have one vGPU only.
    """

    inventory: Inventory = Inventory()
    excluded: tuple[Excluded, ...] = ()
    mps: Mps | None = None
    one_each: bool = False

    @property
    def assignments(self) -> tuple[Assignment, ...] | None:
        """Who holds what; None where that is unknown."""
        return self.holders.assignments

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """What each container holds of each advertised GPU; empty where that is unknown."""
        return parts(self.inventory, self.assignments or ())

    @cached_property
    def limited(self) -> Mapping[Holder, Limited]:
        """What the driver has for each container, where it limits memory."""
        found = () if self.limits is None else self.limits.containers
        return {each.holder: each for each in found}

    def memory_of(self, uuid: str, holder: Holder) -> Memory:
        """What is known of a container's memory on a GPU."""
        used = None if self.usage is None else self.usage.containers.get((uuid, holder))
        return memory_of(uuid, self.limited.get(holder), used)

    @cached_property
    def orphans(self) -> tuple[str, ...]:
        """The vGPUs that are held though the node no longer has them.

        Before the driver's first answer every vGPU would be one.
        """
        if self.driver.version is None:
            return ()
        return orphaned(self.inventory, self.assignments or ())

    @cached_property
    def largest_free(self) -> int:
        """How many vGPUs the largest request may ask for that still fits on one healthy GPU."""
        found = largest_free(self.inventory, self.assignments or ())
        return min(found, 1) if self.one_each else found


@dataclass(frozen=True, slots=True)
class Rules:
    """The settings that the model's decisions depend on, and the names of what is shared where."""

    sharing: SharingRules = SharingRules()
    health: HealthRules = HealthRules()
    resource: str = "k8s.amazonaws.com/vgpu"
    place: Place = Place()


# From inputs to a snapshot

_ADVERTISED = (
    "driver",
    "gpus",
    "present",
    "undescribed",
    "cdi_names",
    "first_seen",
    "health",
    "mps_look",
    "mps_faults",
    "limits_faults",
    "missing",
    "cordons",
)
"""The inputs on which the advertised GPUs depend."""


def compose(inputs: Inputs, rules: Rules, last: Snapshot | None = None) -> Snapshot:
    """The snapshot of these inputs. From `last` is taken over what depends on the same inputs."""
    if last is not None and all(getattr(inputs, n) is getattr(last, n) for n in _ADVERTISED):
        return replace(last, **vars(inputs))
    gpus: list[SharedGpu] = []
    excluded: list[Excluded] = []
    for gpu in inputs.gpus.values():
        divided = _divided(gpu, inputs, rules.sharing)
        if isinstance(divided, Divided):
            gpus.append(_shared_gpu(gpu, divided, inputs, rules))
        elif gpu.uuid in inputs.present:
            excluded.append(divided)
    known = {each.gpu.uuid for each in gpus} | {each.gpu.uuid for each in excluded}
    excluded[:0] = [each for each in inputs.undescribed if each.gpu.uuid not in known]
    gpus.sort(key=lambda shared: (shared.gpu.index, shared.gpu.uuid))
    shown = Inventory(tuple(gpus))
    mps = _mps(inputs, shown, rules.sharing) if rules.sharing.mps else None
    applied = rules.sharing.with_applied_limits(inputs.mps_look.limits if inputs.mps_look else None)
    one = applied.one_each
    return Snapshot(**vars(inputs), inventory=shown, excluded=(*excluded,), mps=mps, one_each=one)


def _divided(gpu: Gpu, inputs: Inputs, sharing: SharingRules) -> Divided | Excluded:
    """As the settings say, by what the GPU was when it was first seen."""
    first = inputs.first_seen.get(gpu.uuid)
    if first is None:
        return divide(gpu, sharing, cdi_names=inputs.cdi_names)
    memory, reserved = first.memory_bytes, first.reserved_bytes
    divided = divide(
        replace(gpu, memory_bytes=memory, reserved_bytes=reserved),
        sharing,
        index=-1 if first.index is None else first.index,
        cdi_names=inputs.cdi_names,
    )
    return replace(divided, gpu=gpu) if isinstance(divided, Excluded) else divided


def _shared_gpu(gpu: Gpu, divided: Divided, inputs: Inputs, rules: Rules) -> SharedGpu:
    # Without health checks what was kept of before is kept, and means nothing.
    health = inputs.health.get(gpu.uuid) if rules.health.health_checks else None
    health = health or GpuHealth()
    applied = None if inputs.mps_look is None else inputs.mps_look.applied_to(gpu.uuid)
    # What the MPS daemon was set up for is in effect until the daemon is replaced.
    replicas = divided.replicas if applied is None else applied.replicas
    vgpu_bytes = divided.vgpu_bytes
    if vgpu_bytes is not None and divided.usable_bytes is not None:
        vgpu_bytes = min(vgpu_bytes, divided.usable_bytes // replicas)
    notes = [*filter(None, (divided.note,)), *health.notes]
    notes += [
        f"no XID events from this GPU: {why}" if what == EVENTS else f"{what} cannot be read: {why}"
        for what, why in inputs.missing.get(gpu.uuid, {}).items()
    ]
    server, reserved = (applied and applied.server_bytes) or 0, rules.sharing.reserved_bytes
    if server > reserved:
        notes.append(
            f"the MPS server has {server // MIB} MiB of it, and {reserved // MIB} MiB are kept out"
            " of the shares: set VGPU_MEMORY_RESERVED to more"
        )
    faults = list(health.faults)
    if rules.sharing.mps:
        daemon = _daemon_of(gpu.uuid, inputs, rules.sharing)
        faults += inputs.mps_faults.get(daemon, ())
        look = inputs.mps_look.daemons.get(daemon) if inputs.mps_look else None
        notes += filter(None, (look.busy, look.failing) if look else ())
    if (limits := inputs.limits_faults.get(gpu.uuid)) is not None:
        faults.append(limits)
    faults += cordon_faults(inputs.cordons.get(gpu.uuid))
    return SharedGpu(
        gpu,
        replicas,
        tuple(faults),
        usable_bytes=divided.usable_bytes,
        vgpu_bytes=vgpu_bytes,
        notes=tuple(notes),
        recovery_wait=health.recovery_wait or rules.health.recovery_seconds,
    )


def _daemon_of(uuid: str, inputs: Inputs, sharing: SharingRules) -> str:
    """The name of the MPS daemon that was set up for a GPU; `""` where there is none."""
    name = sharing.daemon_of(uuid)
    look = inputs.mps_look and inputs.mps_look.daemons.get(name)
    return name if look and any(gpu.uuid == uuid for gpu in look.gpus) else ""


def _mps(inputs: Inputs, inventory: Inventory, sharing: SharingRules) -> Mps:
    look = inputs.mps_look or MpsLook("not asked yet")
    names = {gpu.gpu.uuid: _daemon_of(gpu.gpu.uuid, inputs, sharing) for gpu in inventory.gpus}
    daemons = {uuid: look.daemons[name] for uuid, name in names.items() if name}
    problems = [daemon.down or daemon.problem for daemon in daemons.values()]
    if look.error is None and (not daemons or None in problems):
        problem = None
    else:
        problem = look.error or problems[0]
    return Mps(look, problem, _replacement(look, inputs, sharing), daemons)


def _replacement(look: MpsLook, inputs: Inputs, sharing: SharingRules) -> str | None:
    """Where the daemons were set up for something else than the settings say now."""
    if look.limits is None:
        return None
    differing, server = [], MpsLimits.SERVER
    if (look.limits is server) != (sharing.mps_limits is server):
        differing.append(
            f"the daemons serve VGPU_MPS_LIMITS={look.limits} instead of {sharing.mps_limits} until"
            " the MPS pod is replaced"
        )
    for gpu in inputs.gpus.values():
        divided, has = _divided(gpu, inputs, sharing), look.applied_to(gpu.uuid)
        wanted = divided.replicas if isinstance(divided, Divided) else 0
        if has is not None and wanted == 0:
            differing.append(
                f"GPU {gpu.index} is excluded, and its MPS daemon stays until the MPS pod is"
                " replaced"
            )
        elif has is not None and has.replicas != wanted:
            differing.append(
                f"GPU {gpu.index} has {has.replicas} vGPUs instead of {wanted} until its MPS daemon"
                " is restarted"
            )
    return "; ".join(differing) or None
