"""What is shown of the MPS daemons: their part of the report, and what of it is a metric."""

from collections.abc import Callable
from dataclasses import dataclass

from vgpu_agent.model.facts import DaemonLook
from vgpu_agent.model.holders import split_containers
from vgpu_agent.model.rules import SharingRules
from vgpu_agent.model.snapshot import Mps, Snapshot


@dataclass(frozen=True, slots=True)
class MpsDaemonReport:
    """The MPS daemon of a GPU. `up`: it is there; `limits_in_effect`: they were read back right.

    `problem` says why no vGPU of the GPU can be given. `busy` says why it could not be asked for a
    while, `failing` why new clients get no server; the vGPUs stay what they are. `servers` are
    PIDs; `crashes` counts those that ended by an error. `waiting_clients` are of another user.
    """

    up: bool
    limits_in_effect: bool
    problem: str | None
    busy: str | None
    failing: str | None
    servers: tuple[int, ...]
    crashes: int
    clients: int
    waiting_clients: int


@dataclass(frozen=True, slots=True)
class MpsReport:
    """The MPS daemons; null where GPUs are not shared by MPS. `up`: all are there.

    `limits_in_effect`: all limits were read back as this node needs them. `problem` says why no
    vGPU at all can be given, `replacement` what daemons serve otherwise than the settings say,
    `unwatched` why all this may be out of date. `clients` counts clients by the UUID of their GPU,
    `waiting_clients` those of another user that wait. `daemons` are by the UUID of the GPU that
    they serve. `split_containers` hold vGPUs of several daemons and cannot start.
    """

    up: bool
    limits_in_effect: bool
    problem: str | None
    replacement: str | None
    unwatched: str | None
    clients: dict[str, int]
    waiting_clients: int
    daemons: dict[str, MpsDaemonReport]
    split_containers: int


def mps_report(mps: Mps, snapshot: Snapshot, sharing: SharingRules) -> MpsReport:
    """What is known of the MPS daemons."""
    daemons = {
        shared.gpu.uuid: _daemon(shared.gpu.uuid, mps.daemons.get(shared.gpu.uuid, DaemonLook()))
        for shared in snapshot.inventory.gpus
    }
    return MpsReport(
        up=mps.look.error is None and all(daemon.up for daemon in daemons.values()),
        limits_in_effect=all(daemon.limits_in_effect for daemon in daemons.values()),
        problem=mps.problem,
        replacement=mps.replacement,
        unwatched=mps.look.unwatched,
        clients={uuid: daemon.clients for uuid, daemon in daemons.items() if daemon.clients},
        waiting_clients=sum(daemon.waiting for daemon in mps.look.daemons.values()),
        daemons=daemons,
        split_containers=len(split_containers(snapshot.parts, sharing)),
    )


def _daemon(uuid: str, look: DaemonLook) -> MpsDaemonReport:
    there = look.generation is not None and look.down is None
    return MpsDaemonReport(
        up=there,
        limits_in_effect=there and look.problem is None,
        problem=look.down or look.problem or look.fault,
        busy=look.busy,
        failing=look.failing,
        servers=look.servers,
        crashes=look.crashes,
        clients=look.clients.get(uuid, 0),
        waiting_clients=look.waiting,
    )


METRICS: tuple[tuple[str, str, Callable[[MpsDaemonReport], float]], ...] = (
    ("vgpu_mps_up", "Whether the MPS daemon of the GPU is there.", lambda d: d.up),
    (
        "vgpu_mps_limits_in_force",
        "Whether the limits of the GPU's MPS daemon were read back as this node needs them.",
        lambda d: d.limits_in_effect,
    ),
    (
        "vgpu_mps_busy",
        "Whether the MPS daemon of the GPU cannot be asked, as somebody else holds it.",
        lambda d: d.busy is not None,
    ),
    (
        "vgpu_mps_servers_failing",
        "Whether the MPS servers of the GPU end soon after their start, again and again.",
        lambda d: d.failing is not None,
    ),
    (
        "vgpu_mps_server_crashes_total",
        "MPS servers of the GPU that ended by an error.",
        lambda d: d.crashes,
    ),
    ("vgpu_mps_clients", "MPS clients of a GPU.", lambda d: d.clients),
    (
        "vgpu_mps_waiting_clients",
        "MPS clients of another user that wait for their turn at the GPU's daemon.",
        lambda d: d.waiting_clients,
    ),
)
"""Of the daemon of each GPU: name, what it says, and its value."""
