from collections import Counter
from itertools import pairwise

import anyio
import pytest
from anyio.lowlevel import checkpoint
from hypothesis import given
from hypothesis import strategies as st

from tests.model.strategies import a_gpu, fault_sets, faults, gpus, ids, tried
from vgpu_agent.model.devices import Excluded, Fault, Reason
from vgpu_agent.model.share import Division
from vgpu_agent.model.state import Driver, Kubelet, Latest, NodeState, RegistrationResult

REGISTERED = RegistrationResult.REGISTERED

LOST = Fault(Reason.LOST, 10.0, "not on the bus")
MPS_DOWN = Fault(Reason.MPS, 20.0, "no daemon")
XID = Fault(Reason.XID, 30.0, "XID 13")


@pytest.fixture
def node() -> NodeState:
    """Two cards of two vGPUs each."""
    node = NodeState(Division(2))
    node.driver_answered("580.1", [a_gpu(0), a_gpu(1)])
    return node


def faults_of(node: NodeState, uuid: str) -> tuple[Fault, ...]:
    return node.snapshot.inventory.find(uuid).faults


# What the driver says


def test_nothing_is_known_at_first():
    node = NodeState(Division(2))
    assert node.snapshot.inventory.cards == ()
    assert not node.snapshot.driver.up
    assert not node.snapshot.kubelet.connected
    assert node.latest.version == 0


def test_each_card_that_the_driver_names_becomes_that_many_vgpus(node):
    assert list(node.snapshot.inventory.device_ids) == ids("gpu-0", 0, 1) + ids("gpu-1", 0, 1)
    assert node.snapshot.driver == Driver("580.1", None)


def test_cards_are_in_the_order_of_their_index_whatever_order_the_driver_names_them_in():
    node = NodeState(Division(1))
    node.driver_answered("580.1", [a_gpu(2), a_gpu(0), a_gpu(1)])
    assert [card.gpu.index for card in node.snapshot.inventory.cards] == [0, 1, 2]


def test_the_same_answer_in_another_order_is_no_news(node):
    before = node.latest.version
    assert not node.driver_answered("580.1", [a_gpu(1), a_gpu(0)])
    assert node.latest.version == before


def test_ids_and_faults_stay_with_a_card_that_gets_another_index(node):
    node.fault_found({"gpu-0"}, LOST)
    assert node.driver_answered("580.1", [a_gpu(0, uuid="gpu-1"), a_gpu(5, uuid="gpu-0")])
    inventory = node.snapshot.inventory
    assert [(card.gpu.uuid, card.gpu.index) for card in inventory.cards] == [
        ("gpu-1", 0),
        ("gpu-0", 5),
    ]
    assert set(inventory.device_ids) == {*ids("gpu-0", 0, 1), *ids("gpu-1", 0, 1)}
    assert faults_of(node, "gpu-0") == (LOST,)
    assert faults_of(node, "gpu-1") == ()


def test_a_card_that_the_driver_no_longer_names_stays_with_its_faults(node):
    node.fault_found({"gpu-0"}, LOST)
    assert not node.driver_answered("580.1", [a_gpu(1)])
    assert [card.gpu.uuid for card in node.snapshot.inventory.cards] == ["gpu-0", "gpu-1"]
    assert faults_of(node, "gpu-0") == (LOST,)


def test_excluded_cards_are_those_of_the_last_answer(node):
    mig = Excluded(a_gpu(2), "mig", "card 2 is in MIG mode")
    assert node.driver_answered("580.1", [a_gpu(0), a_gpu(1)], [mig])
    assert node.snapshot.excluded == (mig,)
    assert not node.driver_answered("580.1", [a_gpu(0), a_gpu(1)], [mig])
    assert node.driver_answered("580.1", [a_gpu(0), a_gpu(1)])
    assert node.snapshot.excluded == ()


def test_a_driver_that_fails_keeps_its_version_and_its_cards(node):
    inventory = node.snapshot.inventory
    assert node.driver_failed("driver not loaded")
    assert not node.driver_failed("driver not loaded")
    assert node.snapshot.driver == Driver("580.1", "driver not loaded")
    assert not node.snapshot.driver.up
    assert node.snapshot.inventory == inventory
    assert node.driver_answered("580.1", [a_gpu(0), a_gpu(1)])
    assert node.snapshot.driver.up


@given(st.lists(st.lists(gpus, max_size=4, unique_by=lambda gpu: gpu.uuid), max_size=4))
@tried(40)
def test_whatever_the_driver_names_later_no_card_or_vgpu_is_lost_or_doubled(answers):
    node = NodeState(Division(2))
    newest = {}
    for answer in answers:
        before = node.snapshot
        news = node.driver_answered("580.1", answer)
        assert news == (node.snapshot != before)
        newest |= {gpu.uuid: gpu for gpu in answer}
        assert {card.gpu.uuid: card.gpu for card in node.snapshot.inventory.cards} == newest
        vgpus = list(node.snapshot.inventory.device_ids)
        assert len(set(vgpus)) == len(vgpus) == 2 * len(newest)


# Faults


def test_a_fault_makes_only_its_own_card_unhealthy(node):
    assert node.fault_found({"gpu-1"}, XID) == ("gpu-1",)
    assert [card.healthy for card in node.snapshot.inventory.cards] == [True, False]


def test_a_fault_of_no_card_in_particular_concerns_all_in_one_update(node):
    before = node.latest.version
    assert node.fault_found(None, MPS_DOWN) == ("gpu-0", "gpu-1")
    assert faults_of(node, "gpu-0") == faults_of(node, "gpu-1") == (MPS_DOWN,)
    assert node.latest.version == before + 1


def test_only_cards_for_which_a_fault_is_news_are_named(node):
    node.fault_found({"gpu-0"}, MPS_DOWN)
    assert node.fault_found(None, MPS_DOWN) == ("gpu-1",)
    before = node.latest.version
    assert node.fault_found(None, MPS_DOWN) == ()
    assert node.latest.version == before


@pytest.mark.parametrize("uuids", [[], ["gpu-9"]])
def test_a_fault_of_a_card_that_is_not_known_changes_nothing(node, uuids):
    before = node.latest.version
    assert node.fault_found(uuids, XID) == ()
    assert node.latest.version == before


def test_a_reason_keeps_its_first_time_and_words(node):
    node.fault_found({"gpu-0"}, Fault(Reason.XID, 30.0, "XID 13"))
    assert node.fault_found({"gpu-0"}, Fault(Reason.XID, 99.0, "XID 31")) == ()
    assert faults_of(node, "gpu-0") == (Fault(Reason.XID, 30.0, "XID 13"),)


def test_a_reason_becomes_stricter_and_keeps_its_first_time_and_place(node):
    node.fault_found({"gpu-0"}, XID)
    node.fault_found({"gpu-0"}, LOST)
    stricter = Fault(Reason.XID, 99.0, "XID 95", until_reset=True)
    assert node.fault_found({"gpu-0"}, stricter) == ("gpu-0",)
    assert faults_of(node, "gpu-0") == (Fault(Reason.XID, 30.0, "XID 95", True), LOST)


def test_a_reason_that_holds_until_reset_never_becomes_milder(node):
    strict = Fault(Reason.XID, 30.0, "XID 95", until_reset=True)
    node.fault_found({"gpu-0"}, strict)
    assert node.fault_found({"gpu-0"}, XID) == ()
    assert node.fault_found({"gpu-0"}, Fault(Reason.XID, 99.0, "XID 48", until_reset=True)) == ()
    assert faults_of(node, "gpu-0") == (strict,)


def test_only_the_named_reasons_are_cleared_and_only_of_that_card(node):
    for fault in (XID, MPS_DOWN, LOST):
        node.fault_found(None, fault)
    assert node.faults_cleared("gpu-0", {Reason.XID, Reason.LOST, Reason.ECC})
    assert faults_of(node, "gpu-0") == (MPS_DOWN,)
    assert faults_of(node, "gpu-1") == (XID, MPS_DOWN, LOST)


@pytest.mark.parametrize(
    ("uuid", "reasons"),
    [("gpu-0", []), ("gpu-0", [Reason.ECC]), ("gpu-1", [Reason.XID]), ("gpu-9", [Reason.XID])],
)
def test_to_clear_what_does_not_hold_changes_nothing(node, uuid, reasons):
    node.fault_found({"gpu-0"}, XID)
    before = node.latest.version
    assert not node.faults_cleared(uuid, reasons)
    assert node.latest.version == before


def test_a_change_of_health_is_counted_once_by_the_reason_that_began_or_ended_it(node):
    node.fault_found({"gpu-0"}, XID)
    node.fault_found({"gpu-0"}, LOST)
    node.fault_found({"gpu-0"}, XID)
    assert node.snapshot.transitions == {("gpu-0", "unhealthy", Reason.XID): 1}
    node.faults_cleared("gpu-0", {Reason.XID})
    assert node.snapshot.transitions == {("gpu-0", "unhealthy", Reason.XID): 1}
    node.faults_cleared("gpu-0", {Reason.LOST})
    node.faults_cleared("gpu-0", {Reason.LOST})
    assert node.snapshot.transitions == {
        ("gpu-0", "unhealthy", Reason.XID): 1,
        ("gpu-0", "healthy", Reason.LOST): 1,
    }
    node.fault_found({"gpu-0"}, XID)
    assert node.snapshot.transitions[("gpu-0", "unhealthy", Reason.XID)] == 2


def test_reasons_that_end_together_are_counted_as_one_end_by_the_oldest(node):
    node.fault_found({"gpu-0"}, XID)
    node.fault_found({"gpu-0"}, LOST)
    node.faults_cleared("gpu-0", set(Reason))
    assert node.snapshot.transitions == {
        ("gpu-0", "unhealthy", Reason.XID): 1,
        ("gpu-0", "healthy", Reason.XID): 1,
    }


found = st.tuples(
    st.just("found"), st.none() | st.lists(st.sampled_from(["gpu-0", "gpu-1", "gpu-9"])), faults
)
cleared = st.tuples(
    st.just("cleared"),
    st.sampled_from(["gpu-0", "gpu-1", "gpu-9"]),
    st.sets(st.sampled_from(Reason), max_size=3) | st.just(set(Reason)),
)


def tell(node: NodeState, fact) -> bool:
    kind, whom, what = fact
    return bool(
        node.fault_found(whom, what) if kind == "found" else node.faults_cleared(whom, what)
    )


@given(st.lists(found | cleared, max_size=8))
@tried(70)
def test_a_fact_is_published_when_it_is_news_and_each_change_of_health_is_counted(facts):
    node = NodeState(Division(1))
    node.driver_answered("580.1", [a_gpu(0), a_gpu(1)])
    flips = Counter()
    for fact in facts:
        before, version = node.snapshot, node.latest.version
        news = tell(node, fact)
        assert news == (node.snapshot != before)
        assert node.latest.version == version + news
        assert not tell(node, fact)
        assert node.latest.version == version + news
        flips.update(
            (now.gpu.uuid, "healthy" if now.healthy else "unhealthy")
            for then, now in zip(before.inventory.cards, node.snapshot.inventory.cards, strict=True)
            if then.healthy != now.healthy
        )
    counted = Counter()
    for (uuid, to, _), count in node.snapshot.transitions.items():
        counted[uuid, to] += count
    assert counted == flips


@given(fault_sets)
@tried(50)
def test_a_card_is_healthy_again_when_its_last_reason_is_cleared(several):
    node = NodeState(Division(1))
    node.driver_answered("580.1", [a_gpu(0)])
    for fault in several:
        node.fault_found(None, fault)
    assert faults_of(node, "gpu-0") == several
    for fault in several:
        assert not node.snapshot.inventory.find("gpu-0").healthy
        assert node.faults_cleared("gpu-0", {fault.reason})
    assert node.snapshot.inventory.find("gpu-0").healthy


def test_an_older_snapshot_does_not_change(node):
    before = node.snapshot
    node.fault_found(None, LOST)
    node.xid_seen("gpu-0", 79)
    assert all(card.healthy for card in before.inventory.cards)
    assert before.transitions == {}
    assert before.xids == {}
    with pytest.raises(TypeError):
        node.snapshot.xids["gpu-0", 79] = 0


def test_xids_are_counted_by_card_and_number_and_every_one_is_published(node):
    before = node.latest.version
    for uuid, xid in [("gpu-0", 13), ("gpu-0", 13), ("gpu-0", 31), (None, 13)]:
        node.xid_seen(uuid, xid)
    assert node.snapshot.xids == {("gpu-0", 13): 2, ("gpu-0", 31): 1, (None, 13): 1}
    assert node.latest.version == before + 4
    assert all(card.healthy for card in node.snapshot.inventory.cards)


# The kubelet


def test_every_attempt_to_register_is_counted_by_its_result(node):
    node.registration_tried(RegistrationResult.UNREACHABLE, "no kubelet")
    node.registration_tried(RegistrationResult.UNREACHABLE, "no kubelet")
    assert node.snapshot.kubelet == Kubelet(registered=False, error="no kubelet")
    node.registration_tried(REGISTERED)
    assert node.snapshot.registrations == {RegistrationResult.UNREACHABLE: 2, REGISTERED: 1}
    assert node.snapshot.kubelet == Kubelet(registered=True, error=None)


@pytest.mark.parametrize("result", [each for each in RegistrationResult if each != REGISTERED])
def test_every_other_result_is_no_registration(node, result):
    node.registration_tried(REGISTERED)
    node.registration_tried(result, "why")
    assert node.snapshot.kubelet == Kubelet(registered=False, error="why")


def test_the_end_of_a_registration_is_told_once(node):
    node.registration_tried(REGISTERED)
    assert node.registration_ended("the stream ended")
    assert not node.registration_ended("the stream ended")
    assert node.snapshot.kubelet == Kubelet(registered=False, error="the stream ended")
    assert node.snapshot.registrations == {REGISTERED: 1}


def test_a_kubelet_is_connected_while_it_is_registered_with_and_follows(node):
    node.stream_opened()
    assert not node.snapshot.kubelet.connected
    node.registration_tried(REGISTERED)
    assert node.snapshot.kubelet.connected
    node.stream_ended()
    assert not node.snapshot.kubelet.connected
    assert node.snapshot.kubelet.registered


def test_streams_are_counted_whatever_a_registration_does(node):
    node.stream_opened()
    node.stream_opened()
    node.registration_tried(RegistrationResult.REFUSED, "not now")
    node.registration_ended(None)
    assert node.snapshot.kubelet.streams == 2
    node.stream_ended()
    node.stream_ended()
    assert node.snapshot.kubelet.streams == 0


def test_lists_that_went_out_are_counted(node):
    node.list_sent()
    node.list_sent()
    assert node.snapshot.lists_sent == 2


# Watchers of the latest value


class Watcher:
    """Follows a value to its end, so many turns of the event loop behind."""

    def __init__(self, latest: Latest[int], turns: int = 0) -> None:
        self.latest = latest
        self.turns = turns
        self.versions: list[int] = []
        self.values: list[int] = []
        self.ended = False
        self.scope = anyio.CancelScope()

    async def follow(self) -> None:
        with self.scope:
            version = 0
            while (newer := await self.latest.newer_than(version)) is not None:
                assert newer > version  # here, or a wrong version would be asked for for ever
                version = newer
                self.versions.append(version)
                self.values.append(self.latest.value)
                await turn(self.turns)
            self.ended = True


async def turn(times: int) -> None:
    for _ in range(times):
        await checkpoint()


SETTLED = 30
"""Turns of the event loop after which the slowest watcher has caught up."""

watchers = st.lists(st.integers(0, 8), min_size=1, max_size=4)
steps = st.lists(
    st.just("publish") | st.integers(0, 3).map(lambda n: ("pause", n)) | st.just("cancel"),
    max_size=12,
)


async def published(latest: Latest[int], watching: list[Watcher], script) -> None:
    """Plays the script: each value is its own version."""
    cancelled = iter(watching)
    for step in script:
        if step == "publish":
            latest.publish(latest.version + 1)
        elif step == "cancel":
            if (watcher := next(cancelled, None)) is not None:
                watcher.scope.cancel()
        else:
            await turn(step[1])


async def played(slowness: list[int], script, *, pause_before_close: int) -> list[Watcher]:
    latest = Latest(0)
    watching = [Watcher(latest, turns) for turns in slowness]
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            for watcher in watching:
                tasks.start_soon(watcher.follow)
            await published(latest, watching, script)
            await turn(pause_before_close)
            latest.close()
    return watching


@given(watchers, steps)
@tried(70)
async def test_a_watcher_sees_ever_newer_values_and_if_it_survives_the_final_one_and_the_end(
    slowness, script
):
    final = script.count("publish")
    for watcher in await played(slowness, script, pause_before_close=SETTLED):
        assert all(earlier < later for earlier, later in pairwise(watcher.versions))
        assert watcher.values == watcher.versions
        if not watcher.scope.cancel_called:
            assert watcher.ended
            assert watcher.values[-1:] == ([final] if final else [])


@given(watchers, steps)
@tried(50)
async def test_the_end_reaches_every_watcher_without_a_pause_after_the_last_value(slowness, script):
    final = script.count("publish") + 1
    for watcher in await played(slowness, [*script, "publish"], pause_before_close=0):
        assert watcher.ended or watcher.scope.cancel_called
        assert watcher.latest.value == final


async def test_a_fast_watcher_sees_every_value_and_a_slow_one_skips_to_the_newest():
    fast, slow = await played([0, 6], ["publish", ("pause", 2)] * 9, pause_before_close=SETTLED)
    assert fast.values == list(range(1, 10))
    assert slow.values[-1] == 9
    assert len(slow.values) < 9


async def test_the_first_value_can_be_waited_for_too():
    with anyio.fail_after(1):
        assert await Latest("a").newer_than(-1) == 0


@pytest.mark.parametrize("version", [-1, 0, 1])
async def test_a_watcher_that_comes_after_the_end_is_told_so_and_can_read_the_last_value(version):
    latest = Latest("a")
    latest.publish("b")
    latest.close()
    latest.close()  # it can be told twice
    with anyio.fail_after(1):
        assert await latest.newer_than(version) is None
    assert latest.closed
    assert latest.value == "b"


async def test_nothing_that_is_published_after_the_end_is_told():
    latest = Latest(0)
    latest.publish(1)
    seen = latest.version
    latest.close()
    latest.publish(2)
    with anyio.fail_after(1):
        assert await latest.newer_than(seen) is None


async def test_an_iteration_begins_with_the_current_value_and_skips_to_the_newest():
    latest = Latest("a")
    values = latest.follow()
    with anyio.fail_after(1):
        assert await anext(values) == "a"
        latest.publish("b")
        latest.publish("c")
        assert await anext(values) == "c"


async def test_an_iteration_can_begin_after_a_version():
    latest = Latest("not ready")
    values = latest.follow(latest.version)
    with anyio.move_on_after(0.02) as waited:
        await anext(values)
    assert waited.cancelled_caught
    latest.publish("ready")
    with anyio.fail_after(1):
        assert await anext(values) == "ready"


async def test_an_iteration_ends_with_the_value_it_follows():
    latest = Latest(0)
    seen = []

    async def follow():
        async for value in latest.follow():
            assert value not in seen
            seen.append(value)
        seen.append("end")

    with anyio.fail_after(1):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(follow)
            await turn(2)
            latest.publish(1)
            await turn(2)
            latest.close()
    assert seen == [0, 1, "end"]


async def test_a_watcher_of_the_node_is_woken_by_a_fault(node):
    seen = []

    async def watch():
        await node.latest.newer_than(node.latest.version)
        seen.append([card.healthy for card in node.snapshot.inventory.cards])

    with anyio.fail_after(1):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            await turn(2)
            node.fault_found({"gpu-0"}, LOST)
    assert seen == [[False, True]]
