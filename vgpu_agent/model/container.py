"""What a container that holds some vGPUs is started with: a pure function of request and node.

The same request gives the same answer whatever was allocated before, so an agent that restarts
has lost nothing. The rules are those of the device plugin API (`ContainerAllocateResponse`), of
NVIDIA's container runtime (`NVIDIA_VISIBLE_DEVICES`) and of CUDA MPS (`CUDA_MPS_*`).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from fractions import Fraction
from types import MappingProxyType

from vgpu_agent.errors import InvalidRequestError, UnavailableDeviceError
from vgpu_agent.model.devices import Card, Inventory, split_device_id
from vgpu_agent.model.share import MIB, MpsLimits, Share, fraction, usable_bytes


class Threads(StrEnum):
    """The two ways to bound threads that are not a factor."""

    SHARE = "share"
    NONE = "none"


class DeviceList(StrEnum):
    """How the NVIDIA container runtime is told which cards a container sees.

    By variable; by mounts, for clusters that refuse the variable to unprivileged pods; by names of
    the container device interface; by both of these.
    """

    ENVVAR = "envvar"
    VOLUME_MOUNTS = "volume-mounts"
    CDI = "cdi"
    CDI_ENVVAR = "cdi+envvar"


DEVICES_DIRECTORY = "/var/run/nvidia-container-devices"
"""Where the NVIDIA container runtime looks for mounts that name cards."""


@dataclass(frozen=True, slots=True)
class MpsSharing:
    """How containers reach the MPS daemon of the node, and what limits they are told.

    `threads` is a percentage rule: the share, no limit, or the share times a factor.
    `shm_directory` is None where containers keep their own /dev/shm.
    """

    pipe_directory: str
    shm_directory: str | None
    threads: Threads | float = Threads.SHARE
    limits: MpsLimits = MpsLimits.CLIENT


@dataclass(frozen=True, slots=True)
class Sharing:
    """How cards are shared: by MPS or, where `mps` is None, by plain time-slicing.

    `memory_held_back` bytes of each card are kept out of the shares. CDI names are
    `<cdi_kind>=<uuid>`.
    """

    mps: MpsSharing | None
    memory_held_back: int = 0
    device_list: DeviceList = DeviceList.ENVVAR
    cdi_kind: str = "nvidia.com/gpu"

    def under(self, applied: MpsLimits | None) -> "Sharing":
        """As the daemon was set up: its own limits come and go only with the daemon.

        `applied` is None where that is not known. Without limits of the daemon's own the settings
        choose freely between the other two kinds.
        """
        if self.mps is None or applied is None:
            return self
        server = MpsLimits.SERVER
        if (self.mps.limits is server) == (applied is server):
            return self
        return replace(self, mps=replace(self.mps, limits=applied))

    @property
    def limits_memory(self) -> bool:
        """Whether a process of a container is held to its share of memory."""
        return self.mps is not None and self.mps.limits is not MpsLimits.NONE


@dataclass(frozen=True, slots=True)
class Mount:
    """A host directory that the container gets."""

    host_path: str
    container_path: str
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class Grant:
    """What a container gets."""

    environment: Mapping[str, str]
    mounts: tuple[Mount, ...]
    cdi_devices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Part:
    """The container's part of one card."""

    card: Card
    share: Share
    usable: int

    @property
    def memory(self) -> int:
        if self.card.vgpu_bytes is not None:
            return self.card.vgpu_bytes * self.share.vgpus
        return self.share.memory_bytes(self.usable)

    @property
    def fraction(self) -> float:
        return fraction(self.memory, self.card.gpu.memory_bytes)


def _part(card: Card, vgpus: int, sharing: Sharing) -> _Part:
    server = card.server_bytes
    held_back = sharing.memory_held_back if server is None else server
    usable = usable_bytes(card.gpu.memory_bytes, card.gpu.reserved_bytes, held_back)
    return _Part(card, Share(vgpus, card.replicas), usable)


def share_bytes(card: Card, vgpus: int, sharing: Sharing) -> int:
    """The memory that so many vGPUs of a card are worth, in bytes."""
    return _part(card, vgpus, sharing).memory


def grant(inventory: Inventory, device_ids: Sequence[str], sharing: Sharing) -> Grant:
    """What a container that holds these vGPUs gets.

    Raises InvalidRequestError and UnavailableDeviceError, see `check_devices`.
    """
    counts = Counter(card.gpu.uuid for card in check_devices(inventory, device_ids))
    parts = [
        _part(card, counts[card.gpu.uuid], sharing)
        for card in sorted(inventory.cards, key=lambda card: card.gpu.pci_bus_id.lower())
        if card.gpu.uuid in counts
    ]
    for part in parts:
        if part.memory < MIB:
            raise UnavailableDeviceError(
                f"card {part.card.gpu.uuid} has {part.usable} usable bytes: {part.share} of them is"
                " less than 1 MiB; VGPU_REPLICAS or VGPU_MEMORY_RESERVED is too large for it"
            )
    _refuse_more_than_the_daemon_grants(parts, sharing)
    environment = {
        # In PCI order, and CUDA told to count so, or its ordinals would not be ours.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        # Of one card each; on several cards the smallest, which is what one number can promise.
        "VGPU_SHARE": ",".join(str(part.share) for part in parts),
        "VGPU_MEMORY_BYTES": str(min(part.memory for part in parts)),
        "VGPU_MEMORY_FRACTION": f"{min(part.fraction for part in parts):.4f}",
    }
    uuids = [part.card.gpu.uuid for part in parts]
    visible, mounts = _visible_devices(uuids, sharing.device_list)
    environment["NVIDIA_VISIBLE_DEVICES"] = visible
    if sharing.mps is not None:
        environment |= _mps_environment(sharing.mps, parts)
        mounts.append(Mount(sharing.mps.pipe_directory, sharing.mps.pipe_directory))
        if sharing.mps.shm_directory is not None:
            mounts.append(Mount(sharing.mps.shm_directory, "/dev/shm"))  # noqa: S108 - in the container
    cdi = sharing.device_list in (DeviceList.CDI, DeviceList.CDI_ENVVAR)
    names = tuple(f"{sharing.cdi_kind}={uuid}" for uuid in uuids) if cdi else ()
    return Grant(MappingProxyType(environment), tuple(mounts), names)


def _visible_devices(uuids: Sequence[str], device_list: DeviceList) -> tuple[str, list[Mount]]:
    """The value of NVIDIA_VISIBLE_DEVICES, and the mounts that name the cards."""
    match device_list:
        case DeviceList.VOLUME_MOUNTS:
            mounts = [Mount("/dev/null", f"{DEVICES_DIRECTORY}/{uuid}") for uuid in uuids]
            return DEVICES_DIRECTORY, mounts
        case DeviceList.CDI:
            # Images often say "all", which the NVIDIA runtime would add to what CDI names.
            return "void", []
        case _:
            return ",".join(uuids), []


def _mps_environment(mps: MpsSharing, parts: Sequence[_Part]) -> dict[str, str]:
    """What CUDA needs to be a client of the daemon, and the limits that it puts on itself."""
    environment = {"CUDA_MPS_PIPE_DIRECTORY": mps.pipe_directory}
    if mps.limits is not MpsLimits.CLIENT:
        return environment
    environment["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] = ",".join(
        f"{ordinal}={part.memory // MIB}M" for ordinal, part in enumerate(parts)
    )
    percentage = _thread_percentage(mps.threads, [part.share for part in parts])
    if percentage is not None:
        environment["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = str(percentage)
    return environment


def _refuse_more_than_the_daemon_grants(parts: Sequence[_Part], sharing: Sharing) -> None:
    """With limits in the daemon every client gets those of one vGPU."""
    held = sum(part.share.vgpus for part in parts)
    if sharing.mps is not None and sharing.mps.limits is MpsLimits.SERVER and held > 1:
        raise InvalidRequestError(
            f"{held} vGPUs for one container, but with VGPU_MPS_LIMITS=server the daemon grants"
            " every client the limits of one: ask for 1, or set VGPU_MPS_LIMITS=client"
        )


def check_start(inventory: Inventory, device_ids: Sequence[str]) -> None:
    """Whether a container that was given these vGPUs may start (again) now.

    A vGPU that is no longer made (fewer replicas than before) is still the container's: only its
    card counts. Raises InvalidRequestError for an ID of no card's form and UnavailableDeviceError
    where the card is gone or unhealthy.
    """
    _refuse_empty(device_ids)
    for vgpu in device_ids:
        parts = split_device_id(vgpu)
        if parts is None:
            raise InvalidRequestError(f"device {vgpu!r} is not of the form <GPU UUID>::<number>")
        card = inventory.find(parts[0])
        if card is None:
            raise UnavailableDeviceError(f"device {vgpu!r}: its card is not on this node")
        _refuse_unhealthy(vgpu, card)


def _thread_percentage(threads: Threads | float, shares: Sequence[Share]) -> int | None:
    """MPS knows one number per client: of several cards the smallest share is given."""
    if threads is Threads.NONE:
        return None
    # By its text, since a factor of 0.29 is meant, and not the nearest binary number below it.
    factor = Fraction(1) if isinstance(threads, Threads) else Fraction(str(threads))
    return min(share.thread_percentage(factor) for share in shares)


def check_devices(inventory: Inventory, device_ids: Sequence[str]) -> list[Card]:
    """The card of each vGPU, where all of them can be given to a container now.

    Raises InvalidRequestError for an empty request, an unknown ID or the same ID twice, and
    UnavailableDeviceError for an unhealthy vGPU; the message names the ID and the reason.
    """
    _refuse_empty(device_ids)
    repeated = [vgpu for vgpu, count in Counter(device_ids).items() if count > 1]
    if repeated:
        raise InvalidRequestError(f"device {repeated[0]!r} is requested more than once")
    cards = []
    for vgpu in device_ids:
        card = inventory.card_of(vgpu)
        if card is None:
            raise InvalidRequestError(
                f"device {vgpu!r} is not one of the {sum(1 for _ in inventory.device_ids)}"
                " vGPUs of this node"
            )
        _refuse_unhealthy(vgpu, card)
        cards.append(card)
    return cards


def _refuse_empty(device_ids: Sequence[str]) -> None:
    if not device_ids:
        raise InvalidRequestError("the request names no device")


def _refuse_unhealthy(vgpu: str, card: Card) -> None:
    if not card.healthy:
        raise UnavailableDeviceError(f"device {vgpu!r} is unhealthy: {card.fault_text}")
