"""What the agent makes of the MPS daemon."""

from collections.abc import Callable
from dataclasses import replace

import anyio
import pytest

from vgpu_agent.gpu.simulated import simulated_gpus
from vgpu_agent.model.devices import Reason
from vgpu_agent.model.share import Division, MpsLimits
from vgpu_agent.model.state import NodeState
from vgpu_agent.mps.applied import Applied, AppliedCard
from vgpu_agent.mps.daemon import DaemonLook, SimulatedDaemon
from vgpu_agent.mps.guard import MpsGuard, judge

GPUS = simulated_gpus(2, "card", 2**34, (0,))
ONE, TWO = (gpu.uuid for gpu in GPUS)
DIVISION = Division(10, max_clients=48)
APPLIED = Applied(
    generation="g1",
    limits=MpsLimits.CLIENT,
    thread_percentage=None,
    cards=(AppliedCard(ONE, 0, 10, None), AppliedCard(TWO, 1, 10, None)),
    problem=None,
    version="1",
)
WELL = DaemonLook(generation="g1", applied=APPLIED)


def verdict(look: DaemonLook, limits: MpsLimits = MpsLimits.CLIENT, division: Division = DIVISION):
    return judge(look, GPUS, division, limits)


def test_a_daemon_that_answers_and_was_told_this_nodes_limits_is_well():
    mps = verdict(WELL).mps
    assert (mps.wanted, mps.up, mps.limits_in_force) == (True, True, True)
    assert (mps.problem, mps.replacement) == (None, None)
    assert verdict(WELL).findings == ()
    assert verdict(WELL).applied == {ONE: 10, TWO: 10}


@pytest.mark.parametrize(
    ("look", "problem"),
    [
        (replace(WELL, error="nobody answers"), "nobody answers"),
        (replace(WELL, applied=None), "nobody has applied the limits yet"),
        (replace(WELL, applied=None, applied_error="state is damaged"), "state is damaged"),
        (replace(WELL, generation="g2"), "the daemon is a new one"),
        (replace(WELL, generation=None), "the daemon is a new one"),
        (replace(WELL, applied=replace(APPLIED, problem="server 7 is older")), "server 7 is older"),
    ],
)
def test_every_other_daemon_gives_no_vgpu_and_says_why(look, problem):
    found = verdict(look)
    assert problem in (found.mps.problem or "")
    assert not found.mps.limits_in_force
    assert [each.rule.reason for each in found.findings] == [Reason.MPS]


@pytest.mark.parametrize("limits", MpsLimits)
def test_for_every_kind_of_limits_the_file_has_to_speak_of_it(limits):
    look = replace(WELL, applied=replace(APPLIED, limits=limits))
    assert verdict(look, limits).mps.problem is None
    assert verdict(replace(look, generation="g9"), limits).mps.problem is not None


def test_a_faulty_server_is_a_fault_of_its_own():
    found = verdict(replace(WELL, faulty=(640,)))
    assert found.mps.problem is None
    assert [each.rule.reason for each in found.findings] == [Reason.MPS_FAULT]
    assert "640" in found.findings[0].detail


def test_what_was_applied_is_served_until_the_pod_is_replaced():
    found = verdict(WELL, division=Division(20, max_clients=48))
    assert found.mps.problem is None
    assert found.applied == {ONE: 10, TWO: 10}
    assert found.mps.replacement == (
        "the MPS pod must be replaced: GPU 0 has 10 vGPUs instead of 20,"
        " GPU 1 has 10 vGPUs instead of 20"
    )


@pytest.mark.parametrize("applied", MpsLimits)
@pytest.mark.parametrize("wanted", MpsLimits)
def test_limits_of_the_daemons_own_come_and_go_only_with_its_pod(applied, wanted):
    found = verdict(replace(WELL, applied=replace(APPLIED, limits=applied)), wanted)
    assert found.mps.problem is None
    assert found.mps.limits is applied
    if (applied is MpsLimits.SERVER) == (wanted is MpsLimits.SERVER):
        assert found.mps.replacement is None
    else:
        assert found.mps.replacement == (
            f"the MPS pod must be replaced: it serves VGPU_MPS_LIMITS={applied} instead of {wanted}"
        )


class Node:
    def __init__(self) -> None:
        self.state = NodeState(DIVISION)
        self.daemon = SimulatedDaemon({ONE: 10, TWO: 10}, MpsLimits.CLIENT)
        self.guard = MpsGuard(self.daemon, self.state, DIVISION, MpsLimits.CLIENT)

    @property
    def replicas(self) -> list[int]:
        return [card.replicas for card in self.state.snapshot.inventory.cards]

    @property
    def reasons(self) -> list[list[Reason]]:
        cards = self.state.snapshot.inventory.cards
        return [[fault.reason for fault in card.faults] for card in cards]


@pytest.fixture
def node() -> Node:
    return Node()


async def becomes(node: Node, holds: Callable[[str | None], bool]) -> None:
    with anyio.fail_after(2):
        async for snapshot in node.state.latest.follow():
            if holds(snapshot.mps.problem):
                return


async def test_a_daemon_that_dies_takes_all_vgpus_with_it_and_brings_them_back_at_once(node):
    await node.guard.look()
    node.state.driver_answered("1", GPUS)
    assert node.reasons == [[], []]
    published = node.state.latest.version
    node.daemon.die()
    await node.guard.look()
    assert node.reasons == [[Reason.MPS], [Reason.MPS]]
    assert node.state.latest.version - published == 2  # the daemon, and all cards in one
    node.daemon.come_back()
    await node.guard.look()
    assert node.reasons == [[], []]


async def test_a_card_that_appears_while_the_daemon_is_away_is_not_offered(node):
    node.daemon.die()
    await node.guard.look()
    node.state.driver_answered("1", GPUS[:1])
    assert node.reasons == [[Reason.MPS]]
    node.state.driver_answered("1", GPUS)
    assert node.reasons == [[Reason.MPS], [Reason.MPS]]
    node.daemon.come_back()
    await node.guard.look()
    assert node.reasons == [[], []]


async def test_a_server_fault_comes_and_goes_beside_other_reasons(node):
    await node.guard.look()
    node.state.driver_answered("1", GPUS)
    node.daemon.fail_server(faulty=True)
    await node.guard.look()
    assert node.reasons == [[Reason.MPS_FAULT], [Reason.MPS_FAULT]]
    node.daemon.fail_server(faulty=False)
    await node.guard.look()
    assert node.reasons == [[], []]


async def test_cards_have_as_many_vgpus_as_the_daemon_was_told(node):
    node.daemon = SimulatedDaemon({ONE: 4, TWO: 10}, MpsLimits.CLIENT)
    node.guard.daemon = node.daemon
    node.state.driver_answered("1", GPUS)
    assert node.replicas == [10, 10]
    await node.guard.look()
    assert node.replicas == [4, 10]
    node.state.driver_answered("2", GPUS)
    assert node.replicas == [4, 10]
    assert "GPU 0 has 4 vGPUs instead of 10" in (node.state.snapshot.mps.replacement or "")


async def test_looks_that_find_nothing_new_publish_and_log_nothing(node, caplog):
    node.state.driver_answered("1", GPUS)
    node.daemon.die()
    await node.guard.look()
    caplog.clear()
    published = node.state.latest.version
    for _ in range(5):
        await node.guard.look()
    assert node.state.latest.version == published
    assert caplog.records == []


async def test_it_looks_by_itself_and_soon_where_the_daemon_changed(node):
    node.guard.glance, node.guard.ask = 0.01, 60.0  # only the glance can tell
    node.state.driver_answered("1", GPUS)
    async with anyio.create_task_group() as tasks:
        await tasks.start(node.guard.run)
        node.daemon.die()
        await becomes(node, lambda problem: problem is not None)
        node.daemon.come_back()
        await becomes(node, lambda problem: problem is None)
        tasks.cancel_scope.cancel()


async def test_a_card_that_the_daemon_was_never_told_of_is_not_offered(node):
    node.daemon = SimulatedDaemon({ONE: 10}, MpsLimits.CLIENT)
    node.guard.daemon = node.daemon
    await node.guard.look()
    node.state.driver_answered("1", GPUS)
    assert node.reasons == [[], [Reason.MPS]]
    await node.guard.look()
    assert node.reasons == [[], [Reason.MPS]]


async def test_a_fault_of_the_server_is_logged_once_for_as_long_as_it_lasts(node, caplog):
    node.daemon.fail_server(faulty=True)
    for _ in range(4):
        await node.guard.look()
    assert caplog.text.count("nothing is restarted") == 1
