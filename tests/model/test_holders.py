"""Who holds what, against the same worked out the slow way."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.model.strategies import ids, inventories, strangers, tried
from vgpu_agent.model.devices import Inventory, device_id, split_device_id
from vgpu_agent.model.holders import (
    NO_NAMESPACE,
    Assignment,
    GpuProcess,
    Holder,
    Holders,
    Recorded,
    Used,
    attribute,
    cross_check,
    largest_free,
    orphaned,
    parts,
)

VGPUS = [device_id(f"gpu-{shared}", n) for shared in range(3) for n in (0, 1, 2, 9, 10)]
CONTAINERS = ["init", "main", "sidecar"]

holders = st.builds(
    Holder,
    st.sampled_from(["default", "prod"]),
    st.sampled_from(["a", "b", "c"]),
    st.sampled_from(CONTAINERS),
)
some_vgpus = st.lists(st.sampled_from(VGPUS), max_size=6).map(tuple)
any_lists = st.lists(st.builds(Assignment, holders, some_vgpus), max_size=6)
any_records = st.lists(
    st.builds(
        Recorded, st.sampled_from(["u1", "u2", "u3"]), st.sampled_from(CONTAINERS), some_vgpus
    ),
    max_size=6,
)
any_named = st.dictionaries(
    st.sampled_from(["u1", "u2", "u3", "u4"]),
    st.tuples(st.sampled_from(["default", "prod"]), st.sampled_from(["a", "b", "c"])),
)


def pairs(assignments):
    """Every container with each of its vGPUs."""
    return {(each.holder, vgpu) for each in assignments for vgpu in each.device_ids}


def held(assignments):
    return {vgpu for each in assignments for vgpu in each.device_ids}


# What the kubelet knows, as it is, for the tests of the cross-check


@st.composite
def nodes(draw):
    """A kubelet: pods that run, and the pods that have ended since it wrote its checkpoint.

    A pod is its UID, its name, and what each of its containers holds.
    """
    free = draw(st.permutations(VGPUS))
    pods = []
    for n in range(draw(st.integers(0, 4))):
        containers = {}
        for name in draw(st.lists(st.sampled_from(CONTAINERS), unique=True, max_size=3)):
            count = draw(st.integers(0, 3))
            containers[name], free = free[:count], free[count:]
        pods.append((f"uid-{n}", f"pod-{n}", containers))
    gone = draw(st.integers(0, len(pods)))
    return pods[gone:], pods[:gone]


def listed(pods):
    """As List tells them: without init containers."""
    return [
        Assignment(Holder("default", name, container), tuple(vgpus))
        for _, name, containers in pods
        for container, vgpus in containers.items()
        if container != "init"
    ]


def recorded(pods):
    return [
        Recorded(uid, container, tuple(vgpus))
        for uid, _, containers in pods
        for container, vgpus in containers.items()
    ]


def only_init(pod):
    """Whether List shows nothing of the pod, though it holds something."""
    return not any(vgpus for name, vgpus in pod[2].items() if name != "init")


@tried(300)
@given(nodes())
def test_every_container_that_runs_is_told_with_what_it_holds_and_no_other(node):
    running, ended = node
    before = cross_check(listed(running + ended), recorded(running + ended))
    now = cross_check(listed(running), recorded(running + ended), before.named)
    expected = {
        (
            Holder(NO_NAMESPACE, uid, container)
            if only_init(pod)
            else Holder("default", name, container),
            vgpu,
        )
        # One that held by its init container only and has ended is told until the next Allocate.
        for pod in running + [each for each in ended if only_init(each)]
        for uid, name, containers in [pod]
        for container, vgpus in containers.items()
        for vgpu in vgpus
    }
    assert pairs(now.assignments) == expected
    holding = [pod for pod in running + ended if any(pod[2].values())]
    assert now.settled == all(pod in running and not only_init(pod) for pod in holding)


def test_a_pod_that_ended_holds_nothing_though_the_checkpoint_still_has_it():
    one = [Assignment(Holder("default", "p", "main"), ("g::0",))]
    record = [Recorded("u", "main", ("g::0",)), Recorded("u", "init", ("g::1",))]
    before = cross_check(one, record)
    assert before.settled
    after = cross_check([], record, before.named)
    assert (after.assignments, after.settled) == ((), False)
    again = cross_check([], record, after.named)
    assert again.assignments == ()
    assert cross_check([], [], again.named).named == {}


A, B = (Holder("default", name, "main") for name in "ab")
OF_A, OF_B = (Recorded(uid, "main", ("g::0",)) for uid in ("u-a", "u-b"))
NEW = Holder(NO_NAMESPACE, "u-b", "main")


@pytest.mark.parametrize(
    ("listed", "recorded", "holder"),
    [
        ([A, B], [OF_B], B),
        ([B, A], [OF_B], B),
        ([A, B], [OF_B, OF_A], B),
        ([A], [OF_B], NEW),  # the list is older
        ([A], [OF_B, OF_A], NEW),
        ([], [OF_B, OF_A], NEW),
        ([B], [OF_A], B),  # the checkpoint was not written yet
        ([B], [OF_A, OF_B], B),
    ],
)
def test_a_vgpu_that_was_given_on_is_the_new_pods_alone(listed, recorded, holder):
    before = cross_check([Assignment(A, ("g::0",))], [OF_A])
    told = [Assignment(each, ("g::0",)) for each in listed]
    found = cross_check(told, recorded, before.named)
    assert found.assignments == (Assignment(holder, ("g::0",)),)
    # And when all know it.
    later = cross_check([Assignment(B, ("g::0",))], [OF_B], found.named)
    assert later.assignments == (Assignment(B, ("g::0",)),)


def test_of_two_entries_for_a_vgpu_the_later_one_counts_where_both_are_new():
    assert cross_check([], [OF_A, OF_B]).assignments == (Assignment(NEW, ("g::0",)),)


def test_a_pod_that_comes_again_by_its_name_is_named_the_next_time():
    """As those of a StatefulSet do."""
    first = cross_check([Assignment(A, ("g::0",))], [OF_A])
    second = cross_check([Assignment(A, ("g::0",))], [OF_B], first.named)
    assert not second.settled  # so it is asked again soon
    third = cross_check([Assignment(A, ("g::0",))], [OF_B], second.named)
    assert third.assignments == (Assignment(A, ("g::0",)),)


def test_an_init_container_is_told_by_the_name_of_its_pod_where_that_is_known():
    one = [Assignment(Holder("default", "p", "main"), ("g::0",))]
    record = [Recorded("u", "init", ("g::0", "g::1")), Recorded("u", "main", ("g::0",))]
    assert cross_check(one, record).assignments == (
        Assignment(Holder("default", "p", "init"), ("g::1",)),
        Assignment(Holder("default", "p", "main"), ("g::0",)),
    )


@tried(300)
@given(any_lists, any_records, any_named)
def test_whatever_the_kubelet_says_only_recorded_vgpus_are_held(told, record, named):
    checked = cross_check(told, record, named)
    assert held(checked.assignments) <= held(record)
    # What both know is never lost, and nothing is held twice.
    assert held(told) & held(record) <= held(checked.assignments)
    assert len(held(checked.assignments)) == len(pairs(checked.assignments))
    # Nothing recorded is lost but what pods left that had a name.
    lost = held(record) - held(checked.assignments)
    assert lost <= held(each for each in record if each.pod_uid in named)
    assert checked.named.keys() <= {each.pod_uid for each in record}


@tried(200)
@given(any_lists, any_named)
def test_without_a_checkpoint_the_list_alone_decides(told, named):
    checked = cross_check(told, None, named)
    assert pairs(checked.assignments) == pairs(told)
    assert (checked.named, checked.settled) == (named, True)


@tried(200)
@given(any_lists, st.none() | any_records, any_named, st.randoms())
def test_each_container_is_told_once_in_an_order_that_does_not_depend_on_the_kubelets(
    told, record, named, chance
):
    checked = cross_check(told, record, named)
    names = [each.holder for each in checked.assignments]
    assert names == sorted(set(names))
    for each in checked.assignments:
        numbers = [split_device_id(vgpu) for vgpu in each.device_ids]
        assert numbers
        assert numbers == sorted(set(numbers))
    if len(held(told)) == len(pairs(told)):  # else which of two holders names a pod is a draw
        shuffled = [
            replace(each, device_ids=tuple(chance.sample(each.device_ids, len(each.device_ids))))
            for each in chance.sample(told, len(told))
        ]
        if record is None or len(held(record)) == sum(len(set(each.device_ids)) for each in record):
            assert cross_check(shuffled, record, named) == checked


# What follows from it


@st.composite
def node_and_holders(draw):
    """GPUs, and containers that hold of them, of others, and what is no vGPU at all."""
    inventory = draw(inventories(most=4, replicas=4))
    known = [
        *inventory.device_ids,
        *(
            device_id(shared.gpu.uuid, shared.replicas + n)
            for shared in inventory.gpus
            for n in (0, 7)
        ),
        *(shared.gpu.uuid for shared in inventory.gpus),  # as other plugins name whole GPUs
        device_id("gone", 0),
    ]
    assignments = []
    for n in range(draw(st.integers(0, 4))):
        vgpus = draw(st.lists(st.sampled_from(known), unique=True, max_size=6))
        vgpus += draw(strangers)
        assignments.append(Assignment(Holder("default", f"pod-{n}", "main"), tuple(set(vgpus))))
    return inventory, assignments


@tried(300)
@given(node_and_holders())
def test_what_is_held_is_a_part_of_a_gpu_or_orphaned(example):
    inventory, assignments = example
    found = parts(inventory, assignments)
    told = Counter(
        (part.holder, device_id(part.shared.gpu.uuid, n)) for part in found for n in part.numbers
    )
    assert told == Counter(
        (each.holder, vgpu)
        for each in assignments
        for vgpu in each.device_ids
        if vgpu in set(inventory.device_ids)
    )
    assert all(part.numbers for part in found)
    assert len({(part.shared.gpu.uuid, part.holder) for part in found}) == len(found)
    order = [(part.shared.gpu.index, part.shared.gpu.uuid, part.holder) for part in found]
    assert order == sorted(order)
    # A part is whole unless the container holds what is no longer made of the GPU.
    by_holder = {each.holder: each.device_ids for each in assignments}
    for part in found:
        of_gpu = [
            vgpu
            for vgpu in by_holder[part.holder]
            if (split_device_id(vgpu) or ("", 0))[0] == part.shared.gpu.uuid
        ]
        assert part.whole == (set(of_gpu) <= set(part.shared.device_ids))
    # What is of no part is orphaned.
    orphans = orphaned(inventory, assignments)
    assert Counter(orphans) == Counter(held(assignments) - {vgpu for _, vgpu in told})


def test_orphans_come_in_the_order_of_their_numbers():
    one = Assignment(Holder("default", "p", "main"), tuple(ids("gpu-1", 10, 9, 2)))
    other = Assignment(Holder("default", "q", "main"), tuple(ids("gpu-0", 11)))
    assert orphaned(Inventory(), [one, other]) == (*ids("gpu-0", 11), *ids("gpu-1", 2, 9, 10))


@tried(300)
@given(node_and_holders())
def test_the_largest_request_fits_on_one_healthy_gpu_and_one_more_does_not(example):
    inventory, assignments = example
    size = largest_free(inventory, assignments)
    free = [
        sum(vgpu not in held(assignments) for vgpu in shared.device_ids)
        for shared in inventory.gpus
        if shared.healthy
    ]
    assert all(count <= size for count in free)
    assert size in free or (size, free) == (0, [])


def test_nothing_is_known_before_the_kubelet_was_asked():
    assert (Holders().up, Holders().assignments) == (False, None)
    assert Holders(None, ()).up


# Processes

processes = st.lists(
    st.builds(GpuProcess, st.integers(1, 9), st.none() | st.integers(0, 2**40)), max_size=6
)


@tried(300)
@given(
    st.dictionaries(st.sampled_from(["gpu-0", "gpu-1", "gpu-2"]), processes),
    st.dictionaries(st.integers(1, 9), holders),
)
def test_processes_are_counted_for_their_container_or_as_of_nobody(running, containers):
    usage = attribute(running, containers)
    assert set(usage.unattributed) == set(running)
    for uuid, found in running.items():
        of_nobody = [process for process in found if process.pid not in containers]
        assert usage.unattributed[uuid] == len(of_nobody)
        for holder in set(containers.values()):
            own = [process for process in found if containers.get(process.pid) == holder]
            used = usage.containers.get((uuid, holder))
            if own:
                told = [each.memory_bytes for each in own if each.memory_bytes is not None]
                assert used == Used(len(own), sum(told) if told else None)
            else:
                assert used is None
