"""What the agent makes of the MPS daemons, as `state` and their files show them."""

import fcntl
import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.model.strategies import a_look, tried
from tests.mps.node import limited
from vgpu_agent import store
from vgpu_agent.errors import StoreError
from vgpu_agent.gpu.simulated import simulated_gpus
from vgpu_agent.model.devices import Reason
from vgpu_agent.model.facts import AppliedGpu, DaemonLook, MpsLook, Scan
from vgpu_agent.model.health import Moment
from vgpu_agent.model.node import Node
from vgpu_agent.model.rules import MAX_REPLICAS, MpsDaemons, MpsLimits, SharingRules
from vgpu_agent.model.snapshot import Driver, Rules
from vgpu_agent.mps import state
from vgpu_agent.mps.daemon import STALE, MpsGuard, RealDaemons, SimulatedDaemons
from vgpu_agent.mps.directories import PIPE_MODE, Directories
from vgpu_agent.mps.log import Seen
from vgpu_agent.mps.state import State, Watched, absence, generation_of
from vgpu_agent.observe import changes
from vgpu_agent.store import since_boot

GPUS = simulated_gpus(2, "GPU", 2**34, (0,))
ONE, TWO = (gpu.uuid for gpu in GPUS)
WELL = a_look(**{ONE: 10, TWO: 10})
APPLIED = {uuid: (AppliedGpu(uuid, 0, 10, None),) for uuid in (ONE, TWO)}


def make_node(limits: MpsLimits = MpsLimits.CLIENT, **sharing: object) -> Node:
    rules = Rules(SharingRules(mps_limits=limits, **{"replicas": 10, **sharing}))

    def published(before, after) -> None:
        changes.write(changes.changes(before, after, rules))

    node = Node(rules, clock=lambda: Moment(1.0, 1000.0), published=published)
    node.driver_looked(Driver("1", None), Scan("1", GPUS), {})
    return node


def reasons(node: Node) -> list[list[Reason]]:
    return [[fault.reason for fault in shared.faults] for shared in node.snapshot.inventory.gpus]


def one(**fields: object) -> MpsLook:
    """All is well but for the daemon of the first GPU."""
    return replace(WELL, daemons={**WELL.daemons, ONE: replace(WELL.daemons[ONE], **fields)})


# What a look means


@pytest.mark.parametrize(
    ("look", "expected"),
    [
        (WELL, [[], []]),
        (one(down="it is gone"), [[Reason.MPS], []]),
        (one(problem="server 7 is older"), [[Reason.MPS], []]),
        (one(fault="FAULT"), [[Reason.MPS_FAULT], []]),
        (one(down="it is gone", fault="FAULT"), [[Reason.MPS, Reason.MPS_FAULT], []]),
        (one(busy="process 7 holds it"), [[], []]),  # busy is not down
        (one(failing="again and again", crashes=3), [[], []]),
        (replace(WELL, unwatched="nobody looks"), [[], []]),
        (a_look(**{TWO: 10}), [[Reason.MPS], []]),
        (MpsLook("nobody has applied the limits yet"), [[Reason.MPS], [Reason.MPS]]),
        (a_look(problem="not yet", **{ONE: 10, TWO: 10}), [[Reason.MPS], [Reason.MPS]]),
    ],
)
def test_a_daemon_concerns_its_own_gpu_and_busy_is_not_down(look, expected):
    node = make_node()
    node.set_mps(look)
    assert reasons(node) == expected
    problem = node.snapshot.mps.problem
    assert bool(problem) is all(Reason.MPS in each for each in expected)


def test_daemons_that_were_set_up_in_another_way_give_no_vgpu_until_their_pod_is_replaced():
    node = make_node(mps_daemons=MpsDaemons.NODE)
    node.set_mps(WELL)
    assert reasons(node) == [[Reason.MPS], [Reason.MPS]]
    words = "no MPS daemon was set up for this GPU: delete the MPS pod of the node, once drained"
    assert [gpu.faults[0].detail for gpu in node.snapshot.inventory.gpus] == [words, words]


@pytest.mark.parametrize(
    ("of_one", "served", "words"),
    [
        (20, [20, 20], None),
        (10, [10, 20], "GPU 0 has 10 vGPUs instead of 20 until its MPS daemon is restarted"),
        (0, [20], "GPU 0 is excluded, and its MPS daemon stays until the MPS pod is replaced"),
    ],
)
def test_what_was_applied_is_served_until_it_is_replaced(of_one, served, words):
    """The other GPU has what the settings say."""
    node = make_node(replicas=20, replicas_by_gpu={} if of_one else {ONE: 0})
    node.set_mps(a_look(**{ONE: of_one or 10, TWO: 20}))
    assert [shared.replicas for shared in node.snapshot.inventory.gpus] == served
    assert node.snapshot.mps.replacement == words


@pytest.mark.parametrize("applied", MpsLimits)
@pytest.mark.parametrize("wanted", MpsLimits)
def test_limits_of_the_daemons_own_come_and_go_only_with_its_pod(applied, wanted):
    node = make_node(wanted)
    node.set_mps(replace(WELL, limits=applied))
    assert node.snapshot.mps.problem is None
    if (applied is MpsLimits.SERVER) == (wanted is MpsLimits.SERVER):
        assert node.snapshot.mps.replacement is None
    else:
        assert node.snapshot.mps.replacement == (
            f"the daemons serve VGPU_MPS_LIMITS={applied} instead of {wanted} until the MPS pod is"
            " replaced"
        )


def test_looks_that_find_nothing_new_publish_and_log_nothing(caplog):
    node = make_node()
    node.set_mps(MpsLook("no state"))
    assert caplog.text.count("no vGPU can be given: no state") == 1
    node.set_mps(one(busy="process 7 holds it"))
    assert caplog.text.count("process 7 holds it") == 1
    caplog.clear()
    published = node.latest.version
    for _ in range(5):
        node.set_mps(one(busy="process 7 holds it"))
    assert (node.latest.version, caplog.records) == (published, [])


async def test_the_guard_sees_a_daemon_that_comes_and_goes():
    node = make_node()
    daemons = SimulatedDaemons({ONE: 10, TWO: 10}, SharingRules())

    async def becomes(expected: list[list[Reason]]) -> None:
        with anyio.fail_after(2):
            async for _ in node.latest.follow():
                if reasons(node) == expected:
                    return

    async with anyio.create_task_group() as tasks:
        await tasks.start(MpsGuard(daemons, node, interval=0.01).run)
        assert reasons(node) == [[], []]
        daemons.set(ONE, down="it is dead")
        await becomes([[Reason.MPS], []])
        daemons.set(ONE, down=None, fault="FAULT")
        await becomes([[Reason.MPS_FAULT], []])
        daemons.set(ONE, fault=None)
        await becomes([[], []])
        tasks.cancel_scope.cancel()


# What the files say

SERVE = """
import fcntl, socket, sys, time
from pathlib import Path
pipe = Path(sys.argv[1])
lock = (pipe / "control_lock").open("w")
fcntl.lockf(lock, fcntl.LOCK_EX)
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(str(pipe / "control"))
    print("up", flush=True)
    time.sleep(60)
"""


@contextmanager
def serving(pipe: Path) -> Iterator[subprocess.Popen[str]]:
    """What a daemon leaves to see of itself."""
    pipe.mkdir(parents=True, exist_ok=True)
    (pipe / "control").unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", SERVE, str(pipe)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "up\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def directories(kubelet_dir: Path) -> Directories:
    return Directories(kubelet_dir)


def wrote(directories: Directories, *, late: float = 0, **looks: DaemonLook) -> None:
    """As `mps watch` writes it, so many seconds ago."""
    daemons = {name: Watched(look) for name, look in looks.items()}
    found = State("1", MpsLimits.CLIENT, since_boot() - late, daemons)
    store.write(directories.state, state.as_data(found))


@pytest.mark.slow
async def test_a_daemon_is_what_was_seen_of_it_until_it_dies_or_another_one_is_there(directories):
    pipe = directories.daemon(ONE).pipe
    daemons = RealDaemons(directories, SharingRules())
    assert "nobody has applied the limits yet" in (await daemons.look()).error
    with serving(pipe) as process:
        seen = DaemonLook(generation_of(pipe), APPLIED[ONE], servers=(812,), clients={ONE: 2})
        wrote(directories, **{ONE: seen})
        assert await daemons.look() == MpsLook(None, MpsLimits.CLIENT, {ONE: seen})
        wrote(directories, late=STALE + 1, **{ONE: seen})
        late = await daemons.look()
        assert late.daemons == {ONE: seen}  # a watcher that has died changes nothing
        assert "is not heard of" in late.unwatched
        process.kill()
        process.wait()
        # Its socket is still there.
        assert (await daemons.look()).daemons[ONE].down == f"no MPS daemon serves {pipe}"
    with serving(pipe):
        found = (await daemons.look()).daemons[ONE]
        assert (found.down, found.gpus) == (None, APPLIED[ONE])
        assert "its limits are not applied yet" in found.problem


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"format": 2, "generation": "1"}',
        b'{"format": 3}',
        b'{"format": 3, "version": "", "limits": "all", "beat": 1, "daemons": {}}',
        b'{"format": 3, "version": "", "limits": "client", "beat": 1, "daemons": {"x": {}}}',
        b'{"format": 3, "version": "", "limits": "client", "beat": 1, "daemons": []}',
        b"[" * 100_000,
        b"\xff",
    ],
    ids=lambda content: content[:40].decode(errors="replace"),
)
async def test_a_state_that_makes_no_sense_gives_no_vgpu_and_says_so(directories, content):
    directories.state.write_bytes(content)
    with pytest.raises(StoreError):
        state.read(directories.state)
    look = await RealDaemons(directories, SharingRules()).look()
    assert str(directories.state) in look.error
    assert look.daemons == {}


DAMAGES = {
    "beat": float("nan"),
    "beat ": 10**400,
    "daemons.x.set_at": float("inf"),
    "daemons.x.log.waiting": [[7]],
    "daemons.x.log.waiting ": [[7, 0, 0]],
    "daemons.x.log.owners": {"7": "root"},
    "daemons.x.look.servers": [True],
    "daemons.x.look.gpus.0.replicas": 10**9,
    "daemons.x.look.gpus.0.replicas ": 0,
}


@pytest.mark.parametrize("field", DAMAGES)
def test_a_state_that_a_look_could_not_be_made_of_is_damaged(directories, field):
    wrote(directories, x=DaemonLook(gpus=APPLIED[ONE]))
    found = json.loads(directories.state.read_text())
    *inner, last = field.strip().split(".")
    place = found
    for key in inner:
        place = place[int(key) if key.isdecimal() else key]
    place[last] = DAMAGES[field]
    directories.state.write_text(json.dumps(found))
    with pytest.raises(StoreError, match="is damaged"):
        state.read(directories.state)


DIVIDED = SharingRules(replicas=7, replicas_by_gpu=MappingProxyType({"0": 3}), mps_threads=1.5)


@pytest.mark.slow
async def test_a_watcher_is_said_how_gpus_are_divided(directories, caplog):
    daemons = RealDaemons(directories, DIVIDED)
    await daemons.look()
    assert not directories.division.exists()  # there is no watcher, or none any more
    wrote(directories)
    for spoil in (lambda _: None, Path.unlink, lambda path: path.write_text("{}"), Path.unlink):
        spoil(directories.division)
        await daemons.look()
        assert state.with_division(directories.division, SharingRules()) == DIVIDED
    assert not caplog.messages


@pytest.mark.parametrize("change", [{"replicas": "7"}, {"mps_threads": "all"}, {"replicas": None}])
def test_a_division_that_makes_no_sense_is_refused_as_a_whole(tmp_path, change):
    path = tmp_path / "division"
    assert state.with_division(path, DIVIDED) == DIVIDED
    store.write(path, state.division(DIVIDED))
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(StoreError, match=f"{path} is of another version, or damaged"):
        state.with_division(path, SharingRules())


looks = st.builds(
    DaemonLook,
    st.none() | st.text(),
    st.lists(
        st.builds(AppliedGpu, st.text(), st.integers(0), st.integers(1, MAX_REPLICAS), st.none())
    ).map(tuple),
    st.none() | st.integers(1, 99),
    down=st.none() | st.text(),
    clients=st.dictionaries(st.text(), st.integers(0)),
    servers=st.lists(st.integers(0)).map(tuple),
)
seen = st.builds(
    Seen,
    st.integers(0),
    st.dictionaries(st.text(), st.integers()),
    st.none() | st.integers(),
    st.lists(st.tuples(st.integers(), st.integers())).map(tuple),
    st.integers(0),
    st.lists(st.floats(0, 1e9)).map(tuple),
    st.lists(st.integers()).map(tuple),
    st.booleans(),
)


@given(st.dictionaries(st.text(), st.builds(Watched, looks, st.text(), st.floats(0, 1e9), seen)))
@tried(40)
def test_what_is_written_is_read_back(tmp_path_factory, daemons):
    path = tmp_path_factory.mktemp("state") / "state"
    written = State("1", MpsLimits.SERVER, 3.5, daemons)
    # JSON has no lone surrogates; the driver's text has none either.
    try:
        json.dumps(asdict(written)).encode()
    except UnicodeEncodeError:
        return
    store.write(path, state.as_data(written))
    assert state.read(path) == written


@pytest.mark.slow
def test_a_socket_that_a_client_removed_is_said_with_the_way_out(directories):
    pipe = directories.daemon(ONE).pipe
    assert absence(pipe) == f"no MPS daemon serves {pipe}"
    with serving(pipe):
        (pipe / "control").unlink()
        assert generation_of(pipe) is None
        assert f"the one that lives: run `vgpu-agent mps restart {ONE}`" in absence(pipe)
    assert absence(pipe) == f"no MPS daemon serves {pipe}"


def nothing(_pipe: Path) -> None:
    pass


def a_file(pipe: Path) -> None:
    (pipe / "control").touch()


def a_dangling_link(pipe: Path) -> None:
    (pipe / "control").symlink_to("nowhere")


def a_free_lock(pipe: Path) -> None:
    a_file(pipe)
    (pipe / "control_lock").touch()


def a_pipe_for_a_lock(pipe: Path) -> None:
    a_file(pipe)
    os.mkfifo(pipe / "control_lock")


@pytest.mark.parametrize(
    ("left", "there"),
    [
        (nothing, False),
        (a_file, True),  # an older daemon has no lock
        (a_dangling_link, True),
        (a_free_lock, False),
        (a_pipe_for_a_lock, True),
    ],
)
def test_whatever_a_tenant_leaves_in_the_pipe_directory_is_looked_at_without_waiting(
    tmp_path: Path, left: Callable[[Path], None], there: bool
):
    left(tmp_path)
    assert (generation_of(tmp_path) is not None) is there
    assert generation_of(tmp_path / "none") is None


@pytest.mark.skipif(os.geteuid() != 0, reason="requires root, who may drop capabilities")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "owner"), [(0, 0), (0o600, 0), (0o777, 0), (0o755, 1000), (0, 1000), (0o700, 65534)]
)
def test_a_mode_that_a_tenant_gave_the_pipe_directory_is_set_back(directories, mode, owner):
    """Where it gave the directory to somebody else and closed it, that is said, and the way out."""
    pipe = directories.daemon(ONE).pipe
    look = f"""
from pathlib import Path
from vgpu_agent.mps.state import absence, generation_of
pipe = Path({str(pipe)!r})
print(generation_of(pipe) or absence(pipe))
"""
    with serving(pipe):
        pipe.chmod(mode)
        os.chown(pipe, owner, owner)
        program = [*limited("-all"), sys.executable, "-c", look]
        found = subprocess.run(program, capture_output=True, text=True, check=True)
        if mode & 0o1 or not owner:
            assert found.stdout.strip() == generation_of(pipe)
        else:
            assert f"given to user {owner}: run `vgpu-agent mps restart {ONE}`" in found.stdout
            return
    assert stat.S_IMODE(pipe.stat().st_mode) == PIPE_MODE


def test_our_own_lock_is_not_the_daemons(tmp_path):
    """A lock of this very process does not show: the agent holds none."""
    with socket.socket(socket.AF_UNIX) as listener, (tmp_path / "control_lock").open("w") as lock:
        listener.bind(str(tmp_path / "control"))
        fcntl.lockf(lock, fcntl.LOCK_EX)
        assert generation_of(tmp_path) is None
