"""Whether the node accepts new vGPU pods now, in one sentence: what every view begins with."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from vgpu_agent.model.devices import SharedGpu
from vgpu_agent.model.snapshot import Snapshot


class Refusal(StrEnum):
    """Why a node accepts no vGPU pod: a closed set. `FULL` is no fault."""

    FULL = "full"
    KUBELET = "kubelet"
    RIVAL = "rival"
    DRIVER = "driver"
    RELEASED = "released"
    NO_GPU = "no-gpu"
    UNHEALTHY = "unhealthy"


@dataclass(frozen=True, slots=True)
class Counts:
    """The vGPUs of the node, or of a GPU: `total` is `free` + `held` + `unhealthy`.

    `free` can be given to a pod, if the node accepts any; `held` are held by a container,
    `held_unhealthy` of them on an unhealthy GPU; `unhealthy` are neither. Without knowing who holds
    what `free`, `held` and `held_unhealthy` are null, and `unhealthy` are all of an unhealthy GPU.
    """

    total: int
    free: int | None
    held: int | None
    unhealthy: int
    held_unhealthy: int | None


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Whether the kubelet can give a vGPU of this node to a pod now, and `words` that say so.

    `refusals` say why not, the causes in their order; empty where it `accepts`.
    """

    accepts: bool
    words: str
    refusals: tuple[Refusal, ...]


def gpu_counts(snapshot: Snapshot) -> Mapping[str, Counts]:
    """The vGPUs of each GPU, by UUID. Several containers of a pod may hold the same one."""
    numbers = {(part.shared.gpu.uuid, n) for part in snapshot.parts for n in part.numbers}
    held = None if snapshot.assignments is None else Counter(uuid for uuid, _ in numbers)
    return {each.gpu.uuid: _of_gpu(each, held) for each in snapshot.inventory.gpus}


def _of_gpu(shared: SharedGpu, held: Counter[str] | None) -> Counts:
    total = shared.replicas
    if held is None:
        return Counts(total, None, None, 0 if shared.healthy else total, None)
    count = held[shared.gpu.uuid]
    if shared.healthy:
        return Counts(total, total - count, count, 0, 0)
    return Counts(total, 0, count, total - count, count)


def counts(snapshot: Snapshot) -> Counts:
    """The vGPUs of the node."""
    of_gpus = gpu_counts(snapshot).values()
    known = snapshot.assignments is not None
    return Counts(
        total=sum(each.total for each in of_gpus),
        free=sum(each.free or 0 for each in of_gpus) if known else None,
        held=sum(each.held or 0 for each in of_gpus) if known else None,
        unhealthy=sum(each.unhealthy for each in of_gpus),
        held_unhealthy=sum(each.held_unhealthy or 0 for each in of_gpus) if known else None,
    )


def acceptance(snapshot: Snapshot, resource: str, now: float) -> Acceptance:
    """The verdict on a snapshot; `now` is in seconds since the epoch. Total and pure."""
    found = [*_of_kubelet(snapshot, resource, now), *_of_gpus(snapshot, now)]
    if found:
        words = "; ".join(words for _, words in found)
        return Acceptance(False, f"No new vGPU pods: {words}", tuple(why for why, _ in found))
    number = counts(snapshot)
    if number.free is None:
        healthy = number.total - number.unhealthy
        words = f"{healthy} of {number.total} healthy, who holds them is unknown"
    else:
        words = f"{number.free} of {number.total} free{_largest(snapshot)}"
    if ill := [str(each.gpu.index) for each in snapshot.inventory.gpus if not each.healthy]:
        words += f"; unhealthy: GPU {', '.join(ill)}"
    return Acceptance(True, f"This node accepts vGPU pods: {words}", ())


def _largest(snapshot: Snapshot) -> str:
    largest, of_gpus = snapshot.largest_free, gpu_counts(snapshot)
    for shared in snapshot.inventory.gpus:
        if (of_gpus[shared.gpu.uuid].free or 0) >= largest:
            return f", largest block {largest} (GPU {shared.gpu.index})"
    return ""


Why = tuple[Refusal, str]


def _of_kubelet(snapshot: Snapshot, resource: str, now: float) -> list[Why]:
    kubelet = snapshot.kubelet
    if kubelet.connected:
        return []
    if kubelet.rival is not None:
        return [(Refusal.RIVAL, f"another plugin serves {resource} {kubelet.rival}")]
    return [(Refusal.KUBELET, f"kubelet not connected {_since(kubelet.since, now)}")]


def _of_gpus(snapshot: Snapshot, now: float) -> list[Why]:
    """Why no GPU has a vGPU to give: one cause, the first that there is."""
    driver, gpus, number = snapshot.driver, snapshot.inventory.gpus, counts(snapshot)
    if any(shared.healthy for shared in gpus) and number.free != 0:
        return []
    # Neither a release nor a driver that does not answer keeps the vGPUs of healthy GPUs from pods.
    ill = [shared for shared in gpus if not shared.healthy]
    if driver.released_until is not None and len(ill) == len(gpus):
        until = moment(driver.released_until, now)
        return [(Refusal.RELEASED, f"GPUs are released for a reset until {until}")]
    if not driver.up and len(ill) == len(gpus):
        why = f"the NVIDIA driver does not answer {_since(driver.since, now)}"
        return [(Refusal.DRIVER, why)]
    if not gpus:
        excluded = len(snapshot.excluded)
        why = f"all {excluded} GPUs are excluded" if excluded > 1 else "the only GPU is excluded"
        return [(Refusal.NO_GPU, why if excluded else "the driver lists no GPU")]
    reasons = ", ".join(dict.fromkeys(fault.reason for each in ill for fault in each.faults))
    if len(ill) == len(gpus):
        of_more = " shared" if snapshot.excluded else ""
        which = (
            f"the only{of_more} GPU is" if len(gpus) == 1 else f"all {len(gpus)}{of_more} GPUs are"
        )
        return [(Refusal.UNHEALTHY, f"{which} unhealthy ({reasons})")]
    if not number.total:
        return [(Refusal.NO_GPU, "no GPU has a vGPU")]
    of_healthy = sum(shared.replicas for shared in gpus if shared.healthy)
    every = "the only vGPU" if of_healthy == 1 else f"all {of_healthy} vGPUs"
    of_which = " of healthy GPUs" if ill else ""
    held = f"{every}{of_which} {'is' if of_healthy == 1 else 'are'} held"
    if ill:
        held += f"; unhealthy: GPU {', '.join(str(each.gpu.index) for each in ill)}"
    return [(Refusal.FULL, held)]


def _since(since: float | None, now: float) -> str:
    return "yet" if since is None else f"since {moment(since, now)}"


def moment(seconds: float, now: float) -> str:
    """A time for people: in UTC, with its day where that is another than today."""
    then, today = (datetime.fromtimestamp(each, UTC) for each in (seconds, now))
    return f"{then:%H:%M} UTC" if then.date() == today.date() else f"{then:%Y-%m-%d %H:%M} UTC"
