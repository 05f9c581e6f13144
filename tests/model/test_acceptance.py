"""The verdict on a node: whether it accepts new vGPU pods."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.model.strategies import a_gpu, a_shared_gpu, ids, snapshots, tried
from vgpu_agent.model.acceptance import (
    Acceptance,
    Counts,
    Refusal,
    acceptance,
    counts,
    gpu_counts,
    moment,
)
from vgpu_agent.model.devices import Excluded, Fault, Inventory, Reason
from vgpu_agent.model.holders import Assignment, Holder, Holders
from vgpu_agent.model.snapshot import Driver, Kubelet, Snapshot

NOON = 1_772_582_400.0
"""2026-03-04 00:00 UTC and half a day."""
NOW = NOON + 12 * 3600
RESOURCE = "k8s.amazonaws.com/vgpu"
ECC, LOST = Fault(Reason.ECC, 0.0, "2 errors"), Fault(Reason.LOST, 0.0, "gone")
UP = Driver("550", None)
CONNECTED = Kubelet(registered=True, streams=1)
HOLDER = Holder("ns", "pod", "main")


def node(*faults: tuple[Fault, ...], held: tuple[int, ...] = (), **known: object) -> Snapshot:
    """GPUs of ten vGPUs with these faults, of which so many vGPUs are held."""
    shared = tuple(a_shared_gpu(a_gpu(n), 10, each) for n, each in enumerate(faults))
    names = [each for n, count in enumerate(held) for each in ids(f"gpu-{n}", *range(count))]
    known = {
        "driver": UP,
        "kubelet": CONNECTED,
        "inventory": Inventory(shared),
        "holders": Holders(None, (Assignment(HOLDER, tuple(names)),)),
        **known,
    }
    return replace(Snapshot(), **known)


FOUR = ((), (), (), ())


@pytest.mark.parametrize(
    ("snapshot", "words", "refusals"),
    [
        (
            node(*FOUR, held=(10, 2, 8, 8)),
            "This node accepts vGPU pods: 12 of 40 free, largest block 8 (GPU 1)",
            (),
        ),
        (
            node((ECC,), (), held=(4, 2)),
            "This node accepts vGPU pods: 8 of 20 free, largest block 8 (GPU 1); unhealthy: GPU 0",
            (),
        ),
        (
            node((), (ECC,), holders=Holders("away")),
            (
                "This node accepts vGPU pods: 10 of 20 healthy, who holds them is unknown;"
                " unhealthy: GPU 1"
            ),
            (),
        ),
        # Under limits of the MPS daemon a container may have one.
        (
            node((), (), held=(10, 3), one_each=True),
            "This node accepts vGPU pods: 7 of 20 free, largest block 1 (GPU 1)",
            (),
        ),
        # A GPU that is healthy while all of them cannot be asked is given on.
        (
            node((), (LOST,), driver=Driver(None, "hangs")),
            (
                "This node accepts vGPU pods: 10 of 20 free, largest block 10 (GPU 0); unhealthy:"
                " GPU 1"
            ),
            (),
        ),
        (
            node((), kubelet=Kubelet(error="gone", since=NOON + 14 * 3600 + 120)),
            "No new vGPU pods: kubelet not connected since 14:02 UTC",
            ("kubelet",),
        ),
        (node((), kubelet=Kubelet()), "No new vGPU pods: kubelet not connected yet", ("kubelet",)),
        (
            node((), kubelet=Kubelet(error="x", rival="at aws.sock")),
            "No new vGPU pods: another plugin serves k8s.amazonaws.com/vgpu at aws.sock",
            ("rival",),
        ),
        (
            node(driver=Driver(None, "no library", since=NOON - 60)),
            "No new vGPU pods: the NVIDIA driver does not answer since 2026-03-03 23:59 UTC",
            ("driver",),
        ),
        (
            node((LOST,), driver=Driver("550", "gone", since=NOW), kubelet=Kubelet()),
            (
                "No new vGPU pods: kubelet not connected yet; the NVIDIA driver does not answer"
                " since 12:00 UTC"
            ),
            ("kubelet", "driver"),
        ),
        (
            node((ECC,), driver=Driver("550", "released for a reset", NOW + 600)),
            "No new vGPU pods: GPUs are released for a reset until 12:10 UTC",
            ("released",),
        ),
        (node(), "No new vGPU pods: the driver lists no GPU", ("no-gpu",)),
        (
            node(excluded=(Excluded(a_gpu(0), "mig", "on"),)),
            "No new vGPU pods: the only GPU is excluded",
            ("no-gpu",),
        ),
        (
            node((ECC,), (LOST, ECC)),
            "No new vGPU pods: all 2 GPUs are unhealthy (ecc, lost)",
            ("unhealthy",),
        ),
        (node((ECC,)), "No new vGPU pods: the only GPU is unhealthy (ecc)", ("unhealthy",)),
        (
            node((ECC,), excluded=(Excluded(a_gpu(1), "mig", "on"),)),
            "No new vGPU pods: the only shared GPU is unhealthy (ecc)",
            ("unhealthy",),
        ),
        # A release keeps no vGPU of a healthy GPU from a pod, and is not why none is free.
        (
            node((), held=(10,), driver=Driver("550", "released for a reset", NOW + 600)),
            "No new vGPU pods: all 10 vGPUs are held",
            ("full",),
        ),
        (
            node((), held=(10,), inventory=Inventory((a_shared_gpu(a_gpu(0), 1),))),
            "No new vGPU pods: the only vGPU is held",
            ("full",),
        ),
        (node((), (), held=(10, 10)), "No new vGPU pods: all 20 vGPUs are held", ("full",)),
        (
            node((), (ECC,), held=(10, 3)),
            "No new vGPU pods: all 10 vGPUs of healthy GPUs are held; unhealthy: GPU 1",
            ("full",),
        ),
    ],
)
def test_the_verdict_is_one_sentence(snapshot, words, refusals):
    expected = Acceptance(refusals == (), words, tuple(map(Refusal, refusals)))
    assert acceptance(snapshot, RESOURCE, NOW) == expected


@tried(300)
@given(snapshot=snapshots(), now=st.floats(0, 2e10))
def test_a_node_accepts_exactly_where_the_kubelet_could_give_a_vgpu(snapshot, now):
    found = acceptance(snapshot, RESOURCE, now)
    held = {vgpu for each in snapshot.assignments or () for vgpu in each.device_ids}
    giveable = [
        vgpu
        for shared in snapshot.inventory.gpus
        if shared.healthy
        for vgpu in shared.device_ids
        if vgpu not in held
    ]
    assert found.accepts is bool(snapshot.kubelet.connected and giveable)
    assert found.accepts is (not found.refusals)
    assert found.words.startswith("This node accepts vGPU pods: " if found.accepts else "No new")
    assert len(set(found.refusals)) == len(found.refusals) <= 2


@tried(300)
@given(snapshot=snapshots())
def test_counts_are_disjoint_and_add_up(snapshot):
    whole = counts(snapshot)
    of_gpus = [*gpu_counts(snapshot).values()]
    assert whole.total == sum(shared.replicas for shared in snapshot.inventory.gpus)
    for name in ("total", "free", "held", "unhealthy", "held_unhealthy"):
        parts = [getattr(each, name) for each in of_gpus]
        known = getattr(whole, name) is not None
        assert getattr(whole, name) == (sum(parts) if known else None)
    for each in (whole, *of_gpus):
        if snapshot.assignments is None:
            assert (each.free, each.held, each.held_unhealthy) == (None, None, None)
        else:
            assert each.total == each.free + each.held + each.unhealthy
            assert 0 <= each.held_unhealthy <= each.held
            assert min(each.free, each.unhealthy) >= 0
    if whole.free is not None:
        assert snapshot.largest_free == max((each.free for each in of_gpus), default=0)


def test_a_vgpu_that_two_containers_of_a_pod_hold_counts_once():
    twice = Holders(None, tuple(Assignment(HOLDER, (f"gpu-0::{n}",)) for n in (1, 1, 2)))
    assert counts(node((), holders=twice)) == Counts(10, 8, 2, 0, 0)


def test_a_time_has_its_zone_and_its_day_where_that_is_not_today():
    assert moment(NOON + 60, NOW) == "00:01 UTC"
    assert moment(NOON - 60, NOW) == "2026-03-03 23:59 UTC"
