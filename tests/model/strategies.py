"""GPUs, nodes and requests as hypothesis makes them up."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from random import Random
from uuid import NAMESPACE_OID, uuid5

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from vgpu_agent.model.devices import (
    Effect,
    Excluded,
    Fault,
    Gpu,
    Inventory,
    Reason,
    SharedGpu,
    device_id,
)
from vgpu_agent.model.facts import AppliedGpu, DaemonLook, MpsLook
from vgpu_agent.model.holders import Assignment, Holder, Holders
from vgpu_agent.model.rules import MpsLimits
from vgpu_agent.model.snapshot import Driver, Kubelet, Snapshot

MOST_GPUS = 8
MOST_REPLICAS = 12


def tried(examples: int) -> settings:
    """So many examples, however slow or busy the machine is; the profile `quick` takes fewer.

    A profile that takes n examples where hypothesis takes 100 takes n % of them.
    """
    return settings(
        max_examples=max(1, examples * settings().max_examples // 100),
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


def uuid_of(seed: int) -> str:
    """A UUID in the form of NVML; those of neighbouring seeds are in no order."""
    return f"GPU-{uuid5(NAMESPACE_OID, str(seed))}"


def a_gpu(index: int, **described) -> Gpu:
    """A GPU with 16 GiB, made for an example: its UUID is `gpu-<index>`."""
    known = {
        "uuid": f"gpu-{index}",
        "model": "Model",
        "memory_bytes": 16 * 2**30,
        "pci_bus_id": f"00000000:{index:02x}:00.0",
    }
    return Gpu(index=index, **{**known, **described})


def a_shared_gpu(
    gpu: Gpu, replicas: int, faults: tuple[Fault, ...] = (), *, reserved: int = 0
) -> SharedGpu:
    """As it is advertised where it is divided by count and so many bytes are kept out."""
    usable = max(0, gpu.memory_bytes - gpu.reserved_bytes - reserved)
    return SharedGpu(gpu, replicas, faults, usable_bytes=usable)


def a_look(
    limits: MpsLimits = MpsLimits.CLIENT, problem: str | None = None, **replicas: int
) -> MpsLook:
    """A daemon for each of these GPUs, set up for so many vGPUs of it."""
    daemons = {
        uuid: DaemonLook("1", (AppliedGpu(uuid, 0, count, None),), problem=problem)
        for uuid, count in replicas.items()
    }
    return MpsLook(None, limits, daemons)


def ids(uuid: str, *numbers: int) -> list[str]:
    return [device_id(uuid, number) for number in numbers]


faults = st.builds(
    Fault,
    reason=st.sampled_from(Reason),
    since=st.floats(0, 2e9),
    detail=st.sampled_from(["", "XID 79", "no answer"]),
    effect=st.sampled_from([e for e in Effect if e not in (Effect.NOTE, Effect.COUNT)]),
)

fault_sets = st.lists(faults, max_size=3, unique_by=lambda fault: fault.reason).map(tuple)
chances = st.integers(0, 9999).map(Random)
"""Shuffles with one draw where a permutation of hypothesis takes one for each place."""

memory_sizes = st.tuples(st.integers(2**34, 2**38), st.integers(0, 2**30))


@cache
def _shapes(replicas: int, healthy: bool) -> st.SearchStrategy[tuple[int, int | None, bool]]:
    """Replicas, NUMA node and whether the GPU may have faults, in one draw: draws are slow."""
    maybe_ill = (False,) if healthy else (False, False, False, True)
    return st.sampled_from(list(product(range(1, replicas + 1), (None, 0, 1, 2), maybe_ill)))


@st.composite
def inventories(
    draw, *, fewest=0, most=MOST_GPUS, replicas=MOST_REPLICAS, healthy=False
) -> Inventory:
    """GPUs in the order of their index, which is neither that of UUIDs nor that of PCI."""
    shapes = draw(st.lists(_shapes(replicas, healthy), min_size=fewest, max_size=most))
    chance = draw(chances)
    indices = sorted(chance.sample(range(MOST_GPUS + 2), len(shapes)))
    buses = chance.sample(range(9, 9 + MOST_GPUS), len(shapes))
    seeds = chance.sample(range(100), len(shapes))
    total, reserved = draw(memory_sizes)
    made = []
    for n, (count, numa_node, maybe_ill) in enumerate(shapes):
        gpu = Gpu(
            uuid=uuid_of(seeds[n]),
            index=indices[n],
            model="NVIDIA L4",
            memory_bytes=total // (n + 1),
            pci_bus_id=f"00000000:{buses[n]:02X}:00.0",
            reserved_bytes=min(total, reserved) // (n + 1),
            numa_node=numa_node,
        )
        made.append(a_shared_gpu(gpu, count, draw(fault_sets) if maybe_ill else ()))
    return Inventory(tuple(made))


_drivers = st.sampled_from(
    [
        Driver(),
        Driver("550", None, since=1e9),
        Driver(None, "no library", since=1.9e9),
        Driver("550", "released for a reset", 2e9 + 60, since=2e9),
    ]
)
_kubelets = st.sampled_from(
    [
        Kubelet(),
        Kubelet(registered=True, streams=1, since=1e9),
        Kubelet(registered=True, since=2e9),
        Kubelet(error="no kubelet", away=True, since=2e9),
        Kubelet(error="another agent", rival="at nvidia-aws-vgpu.sock"),
    ]
)


@st.composite
def snapshots(draw) -> Snapshot:
    """Whatever may be known of a node without MPS. Pods may hold the same, and what is gone."""
    inventory = draw(inventories())
    excluded = tuple(
        Excluded(a_gpu(90 + n), "mig", "MIG is on") for n in range(draw(st.integers(0, 2)))
    )
    vgpus = [*inventory.device_ids, "GPU-gone::0"]
    if draw(st.booleans()):
        holders = draw(
            st.lists(st.lists(st.sampled_from(vgpus), unique=True).map(tuple), max_size=4)
        )
        names = [Holder("ns", f"pod-{n}", "main") for n in range(len(holders))]
        held = Holders(None, tuple(map(Assignment, names, holders)))
    else:
        # All of it, or unknown.
        held = Holders(None, (Assignment(Holder("ns", "pod", "main"), tuple(vgpus)),))
        held = draw(st.sampled_from([held, Holders("no answer")]))
    return Snapshot(
        driver=draw(_drivers),
        kubelet=draw(_kubelets),
        inventory=inventory,
        excluded=excluded,
        holders=held,
    )


gpus = inventories(fewest=1, most=1).map(lambda inventory: inventory.gpus[0])
gpus = gpus.map(lambda shared: shared.gpu)


@dataclass(frozen=True)
class Request:
    """What the kubelet asks of `prefer`."""

    inventory: Inventory
    available: Sequence[str]
    must_include: Sequence[str]
    size: int


_must_counts = st.sampled_from([0, 0, 1, 1, 2, 3, 4])
_masks = st.integers(0, 2**MOST_REPLICAS - 1)


def _picked(mask: int, shared: SharedGpu) -> list[str]:
    return [vgpu for n, vgpu in enumerate(shared.device_ids) if mask >> n & 1]


@st.composite
def requests(draw, *, most=MOST_GPUS, replicas=MOST_REPLICAS, healthy=False) -> Request:
    """Well-formed: all IDs exist, and what must be included is available."""
    inventory = draw(inventories(most=most, replicas=replicas, healthy=healthy))
    available = [vgpu for shared in inventory.gpus for vgpu in _picked(draw(_masks), shared)]
    draw(chances).shuffle(available)
    must = available[: draw(_must_counts)]
    size = draw(st.integers(0, len(available) + 2))
    draw(chances).shuffle(available)
    return Request(inventory, available, must, size)


strangers = st.lists(
    st.sampled_from(["gpu-99::0", "", "::", "nonsense", "GPU-0::x", "::0"]), max_size=2
)


@st.composite
def racing_requests(draw) -> Request:
    """Of a kubelet that is behind: unknown and repeated IDs, must not within available."""
    request = draw(requests())
    outside = [
        vgpu for vgpu in request.inventory.device_ids if vgpu not in set(request.available)
    ] + [device_id(shared.gpu.uuid, shared.replicas) for shared in request.inventory.gpus]
    chance = draw(chances)
    chance.shuffle(outside)
    must = [*request.must_include, *outside[: draw(_must_counts)], *draw(strangers)]
    available = [*request.available, *draw(strangers)]
    size = draw(st.sampled_from([0, 1, -1, 3, -(2**31), 2**31 - 1])) + request.size
    return Request(request.inventory, available, must + must[:1], size)
