"""Asking the kubelet who holds what: a kubelet that answers, and many that do not."""

import gc
import logging
import threading
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import anyio
import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kubelet import peers
from tests.kubelet.peers import BAD_PEERS, listening, nothing_left, sockets, wait_for
from tests.kubelet.podresources_peer import Pod, a_pod, checkpoint, encoded, entry, serving
from tests.kubelet.rig import RESOURCE, gpus_of
from tests.kubelet_peer import off_loop
from tests.model.strategies import tried
from tests.nodes import new_node
from tests.test_store import damage
from vgpu_agent.errors import KubeletError
from vgpu_agent.kubelet import podresources
from vgpu_agent.kubelet.checkpoint import CHECKPOINT
from vgpu_agent.kubelet.podresources import (
    AskTiming,
    PodResourcesWatch,
    decode_list,
    read_answer,
)
from vgpu_agent.model.devices import device_id
from vgpu_agent.model.holders import NO_NAMESPACE, Assignment, Holder
from vgpu_agent.model.node import Node
from vgpu_agent.model.snapshot import RegistrationResult

DATA = Path(__file__).parents[1] / "data"
RECORDED_RESOURCE = "k8s.amazonaws.com/vgpu"
RECORDED_GPU = "GPU-a0000000-1111-2222-3333-000000000000"
pytestmark = pytest.mark.slow

GPUS = [gpu.uuid for gpu in gpus_of(4)]

QUICK = AskTiming(quiet=0.05, burst=0.2, retry=0.05, list_timeout=1.0)
"""Retries come soon, and slow answers are given up soon."""


@dataclass
class Clock:
    """The time, and what a test adds to it."""

    ahead: float = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead


@dataclass
class Watched:
    """A watch that runs, and the node that it keeps up to date."""

    node: Node
    clock: Clock

    @property
    def held(self) -> dict[str, int] | None:
        """How many vGPUs each pod holds."""
        told = self.node.snapshot.holders.assignments
        return None if told is None else {each.holder.pod: len(each.device_ids) for each in told}

    async def until(self, condition, within=10.0):
        await peers.until(self.node, lambda _: condition(self), within)

    async def until_held(self, within=10.0, **expected):
        wanted = {pod.replace("_", "-"): count for pod, count in expected.items()}
        await self.until(lambda now: now.held == wanted and now.node.snapshot.holders.up, within)

    async def until_error(self, words, within=10.0):
        await self.until(lambda now: words in (now.node.snapshot.holders.error or ""), within)


@asynccontextmanager
async def watching(
    kubelet_dir, *, resource=RESOURCE, interval=60.0, gpus=4, timing=QUICK, **options
):
    node, clock = new_node(gpus_of(gpus)), Clock()
    watch = PodResourcesWatch(
        socket_of(kubelet_dir),
        kubelet_dir / "device-plugins" / CHECKPOINT,
        resource,
        node,
        interval,
        clock=clock,
        timing=timing,
        **options,
    )
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch.run)
        yield Watched(node, clock)
        tasks.cancel_scope.cancel()


@pytest.fixture(autouse=True)
def nothing_stumbles(caplog):
    """No test makes asyncio say anything, nor leaves a connection behind."""
    caplog.set_level(logging.INFO)
    yield
    gc.collect()  # what was left open is told of here, not in a later test
    said = [each for each in caplog.records if each.name == "asyncio" or each.exc_info]
    assert [each.getMessage() for each in said] == []


told = peers.told


def vgpus(shared, *numbers):
    return [device_id(GPUS[shared], n) for n in numbers]


ONE = encoded(a_pod("a", *vgpus(0, 1)))
"""Pod `a` holds one vGPU."""


# What is told


async def test_what_a_real_kubelet_sent_is_told(kubelet_dir):
    answer = (DATA / "podresources-list.bin").read_bytes()
    async with serving(kubelet_dir, answer) as kubelet:
        kubelet.checkpoint.write_bytes((DATA / "kubelet_internal_checkpoint.json").read_bytes())
        async with watching(kubelet_dir, resource=RECORDED_RESOURCE) as agent:
            await agent.until_held(one_node1=1, three_node1=3)
            told_of = agent.node.snapshot.holders.assignments
    assert told_of == (
        Assignment(Holder("default", "one-node1", "main"), (device_id(RECORDED_GPU, 0),)),
        Assignment(
            Holder("default", "three-node1", "main"),
            tuple(device_id(RECORDED_GPU, n) for n in (1, 2, 3)),
        ),
    )


async def test_what_may_block_does_not_block_the_loop(kubelet_dir, monkeypatch):
    threads = []

    def recording(*args):
        threads.append(threading.current_thread())
        return read_answer(*args)

    monkeypatch.setattr(podresources, "read_answer", recording)
    async with serving(kubelet_dir, ONE), watching(kubelet_dir) as agent:
        await agent.until_held(a=1)
    assert threading.main_thread() not in threads


# When it is asked


async def test_pods_come_and_go(kubelet_dir):
    async with serving(kubelet_dir) as kubelet, watching(kubelet_dir) as agent:
        await agent.until_held()
        for n in range(1, 4):
            kubelet.answer = encoded(*(a_pod(f"pod-{i}", *vgpus(0, i)) for i in range(n)))
            agent.node.allocated()
            await agent.until(lambda now, n=n: len(now.held or ()) == n)
        kubelet.answer = encoded(a_pod("pod-2", *vgpus(0, 2)))
        agent.node.allocated()
        await agent.until_held(pod_2=1)
        calls = kubelet.calls
        await anyio.sleep(0.5)
        assert kubelet.calls == calls


async def test_a_burst_of_allocates_makes_one_question_after_it(kubelet_dir):
    timing = AskTiming(quiet=1.0, burst=60.0)
    async with serving(kubelet_dir) as kubelet, watching(kubelet_dir, timing=timing) as agent:
        await agent.until_held()
        assert kubelet.calls == 1
        for n in range(20):
            kubelet.answer = encoded(a_pod("last", *vgpus(0, *range(n % 10 + 1))))
            agent.node.allocated()
            await anyio.sleep(0.01)
        await agent.until_held(last=10)
        assert kubelet.calls == 2


async def test_a_burst_without_end_is_not_waited_for(kubelet_dir):
    timing = AskTiming(quiet=60.0, burst=0.3)
    async with serving(kubelet_dir) as kubelet, watching(kubelet_dir, timing=timing) as agent:
        await agent.until_held()
        for _ in range(2):
            before = kubelet.calls
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(allocate_all_the_time, agent)
                await wait_for(lambda before=before: kubelet.calls > before, "question")
                tasks.cancel_scope.cancel()


async def allocate_all_the_time(agent):
    while True:
        agent.node.allocated()
        await anyio.sleep(0.01)


async def test_what_is_allocated_while_the_kubelet_answers_is_asked_for_too(kubelet_dir):
    asked, go_on = threading.Event(), threading.Event()

    def slow(_context):
        asked.set()
        go_on.wait(10)
        return b""

    async with serving(kubelet_dir, slow) as kubelet, watching(kubelet_dir) as agent:
        await off_loop(asked.wait, 10)
        agent.node.allocated()
        kubelet.answer = ONE
        go_on.set()
        await agent.until_held(a=1)


async def test_a_registration_makes_it_ask(kubelet_dir):
    async with serving(kubelet_dir) as kubelet, watching(kubelet_dir) as agent:
        await agent.until_held()
        kubelet.answer = ONE
        agent.node.registration_tried(RegistrationResult.REFUSED)
        agent.node.registration_tried(RegistrationResult.REGISTERED)
        await agent.until_held(a=1)


# The checkpoint


async def test_a_pod_that_ended_is_not_held_by_a_checkpoint_that_nobody_wrote_since(kubelet_dir):
    pods = [a_pod("a", *vgpus(0, 1)), a_pod("b", *vgpus(0, 2))]
    async with serving(kubelet_dir, encoded(*pods)) as kubelet:
        kubelet.checkpoint.write_text(
            checkpoint(entry("u-a", *vgpus(0, 1)), entry("u-b", *vgpus(0, 2)))
        )
        async with watching(kubelet_dir, interval=0.1) as agent:
            await agent.until_held(a=1, b=1)
            kubelet.answer = encoded(pods[0])
            await agent.until_held(a=1)


async def test_a_pod_that_the_kubelet_does_not_list_yet_is_asked_for_again_soon(kubelet_dir):
    async with serving(kubelet_dir) as kubelet:
        kubelet.checkpoint.write_text(checkpoint(entry("u-a", *vgpus(0, 1))))
        async with watching(kubelet_dir, interval=3600) as agent:
            await agent.until_held(u_a=1)
            (one,) = agent.node.snapshot.holders.assignments
            assert one.holder == Holder(NO_NAMESPACE, "u-a", "main")
            kubelet.answer = ONE
            await agent.until_held(a=1)


async def test_a_checkpoint_that_is_of_no_use_is_told_once_and_the_list_decides(
    kubelet_dir, caplog
):
    async with (
        serving(kubelet_dir, ONE) as kubelet,
        watching(kubelet_dir, interval=0.05) as agent,
    ):
        await agent.until_held(a=1)
        assert told(caplog, "checkpoint") == []
        kubelet.checkpoint.write_text("{")
        await wait_for(lambda: told(caplog, "is no checkpoint"), "line")
        await more_calls(kubelet)
        assert agent.held == {"a": 1}
        kubelet.checkpoint.write_text(checkpoint())
        await agent.until_held()
        assert len(told(caplog, "checkpoint")) == 2


async def more_calls(kubelet, count=3):
    until = kubelet.calls + count
    await wait_for(lambda: kubelet.calls >= until, "more calls")


def test_a_list_of_too_many_fields_is_not_decoded():
    for field in (b"\x0a\x00", b"\x10\x01"):  # pods without anything, and what is no pod
        with pytest.raises(KubeletError, match="more than 262144 fields"):
            decode_list(field * 262_145, RESOURCE)


def test_the_names_of_other_resources_may_be_as_long_as_names_of_resources_are():
    other = f"{'x' * 253}/{'y' * 63}"
    answer = encoded(Pod("a", {"main": {RESOURCE: ["g::0"], other: ["z" * 1000]}}))
    (found,) = decode_list(answer, RESOURCE)
    assert found.device_ids == ("g::0",)


# Orphans


async def test_nothing_is_orphaned_before_the_driver_has_told_its_gpus(kubelet_dir, caplog):
    async with serving(kubelet_dir, ONE), watching(kubelet_dir, gpus=0) as agent:
        await agent.until_held(a=1)
    assert told(caplog, "no longer advertised") == []


# Trouble


def refused(context):
    context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many requests")


ENDED = "ended the call before its answer"
SAID_OF_BAD_PEERS = {
    "hanging up": ENDED,
    "silent": "did not answer List of PodResources v1 within 1 s",
    "no HTTP": "did not answer List of PodResources v1 within 1 s",
    "bad frame": ENDED,
    "broken off": "cannot be read",
    "nothing said": "cannot be read",
    "compressed": "cannot be read",
    "no gRPC": "does not serve List of PodResources v1",
    "odd status": "refused with UNKNOWN",
    "reset": ENDED,
    "going away": ENDED,
    "informational": "did not answer List of PodResources v1 within 1 s",
    "pushing": ENDED,
    "without end": "did not answer List of PodResources v1 within 1 s",
    "twice": "answered more than once",
    "only an end": "cannot be read",
    "only an error": "refused with UNAVAILABLE",
    "cancelled": "refused with CANCELLED",
    "reset after headers": ENDED,
    "going away after headers": ENDED,
    "half a frame": ENDED,
    "TLS": "did not answer List of PodResources v1 within 1 s",
    "HTTP/1.1": "did not answer List of PodResources v1 within 1 s",
    "noise": ENDED,
    "no end of words": "refused with UNKNOWN: xxx",
}


def socket_of(kubelet_dir):
    return kubelet_dir / "pod-resources" / "kubelet.sock"


@pytest.mark.parametrize("name", BAD_PEERS)
async def test_a_peer_that_speaks_badly_is_told_once_and_a_good_one_is_found(
    kubelet_dir, caplog, name
):
    words = SAID_OF_BAD_PEERS[name]
    async with watching(kubelet_dir, interval=0.2) as agent:
        async with listening(socket_of(kubelet_dir), BAD_PEERS[name]):
            await agent.until_error(words)
            await anyio.sleep(0.5)  # some more questions
        # The others are of the time when nobody was there.
        lines = [line for line in told(caplog, "cannot ask") if str(kubelet_dir) not in line]
        assert len(lines) == 1
        assert words in lines[0]
        assert len(lines[0]) < 1000
        async with serving(kubelet_dir, ONE):
            await agent.until_held(a=1)


@pytest.mark.parametrize(
    ("answer", "options", "words"),
    [
        (refused, {}, "the kubelet refused with RESOURCE_EXHAUSTED: too many requests"),
        (b"", {"method": "/v1.PodResourcesLister/Get"}, "does not serve List of PodResources v1"),
        (b"\xff\xff\xff", {}, "is garbage"),
        (ONE[:-3], {}, "is garbage"),
    ],
)
async def test_an_answer_that_is_none_leaves_what_was_known(
    kubelet_dir, caplog, answer, options, words
):
    async with watching(kubelet_dir, interval=0.1) as agent:
        async with serving(kubelet_dir, ONE):
            await agent.until_held(a=1)
        async with serving(kubelet_dir, answer, **options) as kubelet:
            await agent.until_error(words)
            await more_calls(kubelet) if not options else await anyio.sleep(0.3)
            assert agent.held == {"a": 1}
            assert len(told(caplog, words)) == 1
        async with serving(kubelet_dir, ONE):
            await agent.until_held(a=1)


async def test_an_answer_that_is_too_large_is_not_read_to_its_end(kubelet_dir):
    large = encoded(*(a_pod(f"pod-{n}", *vgpus(0, *range(10))) for n in range(150)))
    assert len(large) > 105_000
    small = encoded(*(a_pod(f"pod-{n}", *vgpus(0, *range(10))) for n in range(100)))
    async with (
        serving(kubelet_dir, large) as kubelet,
        watching(kubelet_dir, interval=0.1, max_bytes=100_000) as agent,
    ):
        await agent.until_error("the kubelet's answer is larger than 0.0953674 MiB")
        kubelet.answer = small
        await agent.until(lambda now: len(now.held or ()) == 100)


async def test_a_kubelet_that_restarts_is_asked_again(kubelet_dir, caplog):
    async with (
        serving(kubelet_dir, ONE) as kubelet,
        watching(kubelet_dir, interval=0.1) as agent,
    ):
        for restarts in range(1, 4):
            await agent.until_held(a=1)
            await off_loop(kubelet.stop)
            await agent.until_error(f"nobody listens on {kubelet.socket}")
            assert agent.held == {"a": 1}
            await off_loop(kubelet.start)
            await agent.until_held(a=1)
            assert len(told(caplog, "the kubelet says who holds")) == restarts + 1
    # A connection that is cut in the middle of a call has words of its own, at most.
    assert 3 <= len(told(caplog, "cannot ask")) <= 6


async def test_no_kubelet_is_told_once(kubelet_dir, caplog):
    async with watching(kubelet_dir, interval=0.05) as agent:
        await agent.until_error(f"there is no {kubelet_dir}/pod-resources/kubelet.sock")
        await anyio.sleep(0.3)  # several attempts
        assert len(told(caplog, "cannot ask")) == 1
        assert agent.held is None


async def test_a_kubelet_that_fails_is_asked_less_and_less_often(kubelet_dir):
    times = []

    def failing(context):
        times.append(time.monotonic())
        refused(context)

    timing = replace(QUICK, retry=0.02)
    async with (
        serving(kubelet_dir, failing),
        watching(kubelet_dir, interval=3600, timing=timing) as agent,
    ):
        await wait_for(lambda: len(times) >= 8, "attempts")
        assert times[7] - times[6] >= 0.02 * 2**6
        # An Allocate makes them come soon again: the next would be in 2.5 s, then in 5.
        agent.node.allocated()
        await wait_for(lambda: len(times) >= 12, "attempts", within=4)


@pytest.mark.parametrize(
    ("interval", "believed"), [(0.1, QUICK.forget_at_least), (100, 100 * QUICK.forget_intervals)]
)
async def test_what_was_told_too_long_ago_is_forgotten(kubelet_dir, caplog, interval, believed):
    async with watching(kubelet_dir, interval=interval) as agent:
        async with serving(kubelet_dir, ONE):
            await agent.until_held(a=1)
        agent.node.allocated()
        await agent.until(lambda now: not now.node.snapshot.holders.up)
        agent.clock.ahead += believed - 10
        agent.node.allocated()
        await anyio.sleep(0.5)
        assert agent.held == {"a": 1}
        agent.clock.ahead += 11
        agent.node.allocated()
        await agent.until(lambda now: now.held is None)
        await anyio.sleep(0.3)
        assert len(told(caplog, "forgetting")) == 1
        lines = told(caplog, "cannot ask")
        assert len(lines) == len(set(lines))


async def test_a_bug_of_ours_is_not_taken_for_a_kubelet_in_trouble(kubelet_dir, monkeypatch):
    def bug(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(podresources, "cross_check", bug)
    async with serving(kubelet_dir):
        with pytest.raises(ExceptionGroup) as caught:
            async with watching(kubelet_dir):
                await anyio.sleep(10)
    assert caught.group_contains(ZeroDivisionError)


# The end


@pytest.mark.parametrize("name", ["silent", "no HTTP", "hanging up", "without end"])
async def test_cancellation_at_any_moment_leaves_nothing_open(kubelet_dir, name):
    async with listening(socket_of(kubelet_dir), BAD_PEERS[name]):
        await anyio.sleep(0.05)
        async with nothing_left():
            for turns in (0, 1, 2, 3, 4, 5, 6, 8, 10, 15, 25, 40):
                async with watching(kubelet_dir, timing=AskTiming()):
                    for _ in range(turns):
                        await anyio.lowlevel.checkpoint()
            async with watching(kubelet_dir, timing=AskTiming()):
                await anyio.sleep(0.2)


@pytest.mark.parametrize("name", ["bad frame", "hanging up", "broken off"])
async def test_bad_peers_leave_no_connection_behind(kubelet_dir, name):
    calls = []

    def counted(connection):
        calls.append(name)
        BAD_PEERS[name](connection)

    async with listening(socket_of(kubelet_dir), counted), nothing_left():
        before = sockets()
        async with watching(kubelet_dir, interval=0.01):
            await wait_for(lambda: len(calls) >= 30, "calls")
            assert sockets() <= before + 4


async def test_the_end_does_not_wait_for_an_answer_that_is_being_decoded(kubelet_dir, monkeypatch):
    decoding, go_on = threading.Event(), threading.Event()

    def slow(*args):
        decoding.set()
        go_on.wait(10)
        return read_answer(*args)

    monkeypatch.setattr(podresources, "read_answer", slow)
    async with serving(kubelet_dir):
        with anyio.fail_after(8):
            async with watching(kubelet_dir):
                await off_loop(decoding.wait, 10)
        go_on.set()


# Bytes

names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
resources = st.sampled_from([RESOURCE, RESOURCE + "2", "example.com/other"])
pods = st.builds(
    Pod,
    name=names,
    containers=st.dictionaries(
        names, st.dictionaries(resources, st.lists(names, max_size=4)), max_size=3
    ),
    namespace=names,
)


@tried(200)
@given(st.lists(pods, max_size=6))
def test_any_answer_is_decoded(those):
    assert [each for each in decode_list(encoded(*those), RESOURCE) if each.device_ids] == [
        Assignment(Holder(pod.namespace, pod.name, container), tuple(held[RESOURCE]))
        for pod in those
        for container, held in pod.containers.items()
        if held.get(RESOURCE)
    ]


answers = st.lists(pods, min_size=1, max_size=3).map(lambda those: encoded(*those))


@tried(300)
@given(st.binary(max_size=60) | answers, st.data())
def test_garbage_is_said_to_be_garbage_and_does_nothing_else(answer, data):
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, max(len(answer) - 1, 0)))
        answer = answer[:at] + data.draw(st.binary(max_size=2)) + answer[at + 1 :]
    with suppress(KubeletError):
        found = decode_list(answer, RESOURCE)
        assert all(isinstance(vgpu, str) for each in found for vgpu in each.device_ids)


@tried(200)
@given(st.lists(pods, min_size=1, max_size=4), st.data())
def test_an_answer_that_breaks_off_is_garbage_or_has_fewer_whole_pods(those, data):
    whole = encoded(*those)
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    try:
        found = decode_list(cut, RESOURCE)
    except KubeletError:
        return
    assert cut in [encoded(*those[:n]) for n in range(len(those))]
    assert found == decode_list(whole, RESOURCE)[: len(found)]


@pytest.mark.parametrize("kind", ["pipe", "socket", "directory"])
async def test_a_checkpoint_that_would_hang_a_reader_holds_up_nothing(kubelet_dir, kind):
    """The list alone decides then, and goes on to: a pipe is read without waiting for a writer."""
    path = kubelet_dir / "device-plugins" / CHECKPOINT
    path.parent.mkdir(parents=True, exist_ok=True)
    damage(path, kind)
    async with serving(kubelet_dir, ONE) as kubelet, watching(kubelet_dir, interval=0.05) as agent:
        await agent.until_held(a=1)
        assert str(path) in (agent.node.snapshot.holders.checkpoint_error or "")
        kubelet.answer = b""
        await agent.until_held()


async def test_a_reader_that_hangs_is_an_error_and_not_the_last_answer(kubelet_dir, monkeypatch):
    """Whatever a file system does: who holds what is unknown then, and it is said so."""
    going_on = threading.Event()
    monkeypatch.setattr(podresources, "read_answer", lambda *_: going_on.wait(5))
    timing = replace(QUICK, list_timeout=0.1)
    try:
        async with serving(kubelet_dir, ONE), watching(kubelet_dir, timing=timing) as agent:
            await agent.until_error("could not be read within 0.1 s")
    finally:
        going_on.set()
