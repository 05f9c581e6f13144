"""What the running agent can be asked to do with one GPU, by requests in this process."""

import shlex
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest

from tests.gpu.watched import Watched
from vgpu_agent.errors import ControlError
from vgpu_agent.gpu.cordons import MAX_REASON, Cordons, load
from vgpu_agent.gpu.driver import GpuDriver
from vgpu_agent.gpu.simulated import SimulatedDriver, simulated_gpus
from vgpu_agent.model.facts import Reading
from vgpu_agent.model.holders import NO_NAMESPACE, Assignment, Holder
from vgpu_agent.model.policy import XID_RECOVERY_ACTION_CHANGED
from vgpu_agent.model.rules import HealthRules
from vgpu_agent.requests import Requests

GPUS = simulated_gpus(3, "GPU", 2**34, (0,))
ONE, TWO, THREE = (gpu.uuid for gpu in GPUS)
RESET = 95


class Asked(Watched):
    """A watched node that answers requests."""

    def __init__(self, directory: Path, driver: GpuDriver | None = None) -> None:
        super().__init__(
            driver or SimulatedDriver(GPUS), health=HealthRules(recovery_seconds=5), release=0.05
        )
        self.cordons = Cordons(directory, self.node)
        self.requests = Requests(
            node=self.node,
            watch=self.watch,
            cordons=self.cordons,
            driver=self.driver,
            report=lambda: b"",
        )

    async def ask(self, command: str, **arguments: object) -> str:
        return (await self.requests.answer({"command": command, **arguments})).decode()

    async def refused(self, command: str, **arguments: object) -> str:
        with pytest.raises(ControlError) as caught:
            await self.ask(command, **arguments)
        return str(caught.value)


@pytest.fixture
async def it(tmp_path) -> AsyncIterator[Asked]:
    asked = Asked(tmp_path / "cordoned")
    await asked.look()
    asked.logged()
    return asked


@pytest.fixture
def holders() -> list[Assignment]:
    def held(namespace: str, pod: str, container: str, *vgpus: str) -> Assignment:
        return Assignment(Holder(namespace, pod, container), vgpus)

    return [
        held("team-b", "web-1", "main", f"{ONE}::3"),
        held("team-a", "train-0", "side", f"{ONE}::1", f"{TWO}::0"),
        held("team-a", "train-0", "main", f"{ONE}::0"),
        held("team-a", "other", "main", f"{TWO}::5"),
        held(NO_NAMESPACE, "3f1c-uid", "init", f"{ONE}::7"),
        held("team-c", "x; rm -rf $HOME", "main", f"{ONE}::99"),  # of before; and a bad peer's name
        held("team-c", "odd", "main", "GPU-00000000"),
    ]


# Cordons


async def test_cordon_again_gives_another_reason_and_uncordon_takes_it_back(it):
    answer = await it.ask("cordon", gpu="0", reason="fan")
    assert answer.startswith(f"GPU 0 ({ONE}) is cordoned: ")
    assert f"    vgpu-agent drain-list {ONE}\n" in answer
    since = it.snapshot.cordons[ONE].since
    answer = await it.ask("cordon", gpu="01:00.0", reason="fan 2")
    assert answer.startswith(f"GPU 0 ({ONE}) stays cordoned, with this reason: ")
    assert load(it.cordons.directory) == it.snapshot.cordons
    assert (it.snapshot.cordons[ONE].since, it.snapshot.cordons[ONE].reason) == (since, "fan 2")
    assert [line.partition(". Next")[0] for line in it.logged()] == [
        "WARNING 10 vGPUs are unhealthy: cordoned: fan",
        "WARNING 10 vGPUs are unhealthy: cordoned: fan 2",
    ]
    assert it.healthy == [1, 2]
    assert await it.ask("uncordon", gpu="GPU-00000000") == (
        f"GPU 0 ({ONE}) is no longer cordoned: it is healthy\n"
    )
    assert it.healthy == [0, 1, 2]
    assert await it.ask("uncordon", gpu="0") == (f"GPU 0 ({ONE}) was not cordoned: it is healthy\n")
    assert it.logged() == ["INFO 10 vGPUs are healthy again (no longer cordoned: fan 2)"]
    assert it.snapshot.transitions == {
        (ONE, "unhealthy", "cordoned"): 1,
        (ONE, "healthy", "cordoned"): 1,
    }


async def test_without_a_reason_that_is_said(it):
    await it.ask("cordon", gpu="0", reason="")
    assert "cordoned: the operator gave no reason. Next: " in it.logged()[0]


@pytest.mark.parametrize("command", ["cordon", "uncordon", "drain-list", "reset-done", "simulate"])
@pytest.mark.parametrize("name", ["3", "GPU-0", "", "all"])
async def test_a_gpu_that_nobody_knows_is_refused_with_what_there_is(it, command, name):
    more = {"reason": "", "fault": "lose"}
    why = await it.refused(command, gpu=name, **more)
    assert repr(name) in why
    assert f"GPU 0 ({ONE}) at 0000:01:00.0, GPU 1 ({TWO}) at 0000:02:00.0, " in why
    assert it.logged() == []


@pytest.mark.parametrize("command", ["cordon", "uncordon", "drain-list", "simulate"])
@pytest.mark.parametrize("name", [None, 0, ["0"], {}])
async def test_what_is_no_name_is_refused(it, command, name):
    assert await it.refused(command, gpu=name, reason="", fault="lose")
    assert it.logged() == []


@pytest.mark.parametrize("reason", ["a\nb", "\x1b[31m", "x" * (MAX_REASON + 1)])
async def test_a_reason_that_cannot_be_shown_is_refused(it, reason):
    why = await it.refused("cordon", gpu="0", reason=reason)
    assert why.startswith("reason='")
    assert why.endswith(f"allowed is one line of at most {MAX_REASON} printable letters")
    assert "\n" not in why
    assert it.healthy == [0, 1, 2]


async def test_a_lost_gpu_is_cordoned_by_its_last_index_and_by_its_uuid_when_it_has_left(it):
    it.driver.fall_off(ONE)
    await it.look()
    await it.ask("cordon", gpu="0", reason="gone")
    assert it.reasons(ONE) == "lost cordoned"
    await it.look(after=4000)
    assert it.snapshot.inventory.find(ONE) is None
    assert (await it.ask("cordon", gpu=ONE, reason="sent in")).startswith(f"{ONE} stays cordoned")
    assert await it.ask("uncordon", gpu=ONE) == (
        f"{ONE} is no longer cordoned: it gives no vGPUs now\n"
    )


async def test_what_cannot_be_written_is_no_cordon(it):
    it.cordons.directory.write_text("")
    why = await it.refused("cordon", gpu="0", reason="")
    assert why.startswith(f"GPU 0 ({ONE}) is not cordoned: cannot write ")
    assert it.healthy == [0, 1, 2]


# Who has to go


async def test_the_pods_of_a_gpu_are_listed_as_commands_each_once_in_order(it, holders):
    it.node.set_assignments(tuple(holders))
    answer = await it.ask("drain-list", gpu="0")
    assert answer.splitlines() == [
        f"# Pods with vGPUs of GPU 0 ({ONE}): 4",
        "kubectl delete pod -n team-a train-0",
        "kubectl delete pod -n team-b web-1",
        "kubectl delete pod -n team-c 'x; rm -rf $HOME'",
        "# A pod of which only the UID is known: 3f1c-uid",
    ]
    words = [shlex.split(line, comments=True) for line in answer.splitlines()]
    assert [each[3:] for each in words if each] == [
        ["-n", "team-a", "train-0"],
        ["-n", "team-b", "web-1"],
        ["-n", "team-c", "x; rm -rf $HOME"],
    ]


async def test_of_a_gpu_that_has_left_the_list_the_pods_are_known_too(it, holders):
    it.node.set_assignments(tuple(holders))
    it.driver.fall_off(ONE)
    await it.look()
    await it.look(after=4000)
    assert "kubectl delete pod -n team-b web-1" in await it.ask("drain-list", gpu=ONE)


async def test_where_nobody_holds_it_that_is_all_that_is_said(it):
    it.node.set_assignments(())
    assert await it.ask("drain-list", gpu="1") == f"# Pods with vGPUs of GPU 1 ({TWO}): none\n"


async def test_an_old_answer_of_the_kubelet_is_said_to_be_old_and_none_is_an_error(it, holders):
    it.node.set_assignments(tuple(holders))
    it.node.assignments_failed("no answer", forget=False)
    lines = (await it.ask("drain-list", gpu="1")).splitlines()
    assert lines[1:3] == [
        "# This may be old: the kubelet does not answer now: no answer",
        "kubectl delete pod -n team-a other",
    ]
    it.node.assignments_failed("no answer", forget=True)
    why = await it.refused("drain-list", gpu="1")
    assert why == f"who holds vGPUs of GPU 1 ({TWO}) is unknown: no answer"


# A reset of one GPU


@pytest.fixture
async def watching(it) -> AsyncIterator[Asked]:
    """It looks by itself."""
    async with anyio.create_task_group() as tasks:
        await tasks.start(it.watch.run)
        yield it
        tasks.cancel_scope.cancel()


async def test_a_reset_that_is_done_ends_the_faults_of_that_gpu_alone_after_a_probe(watching):
    it = watching
    for uuid in (ONE, TWO):
        it.driver.xid(uuid, RESET)
    await it.until(lambda: it.healthy == [2])
    it.now += 1
    assert await it.ask("reset-done", gpu="1") == f"GPU 1 ({TWO}) was probed: it is healthy\n"
    assert it.healthy == [1, 2]
    assert await it.ask("reset-done") == (
        "the GPUs that wait for a reset are probed now: see `vgpu-agent status`\n"
    )
    await it.until(lambda: it.healthy == [0, 1, 2])


async def test_a_fault_that_still_stands_after_the_reset_stays_and_is_the_answer(watching):
    it = watching
    it.driver.show(ONE, Reading(recovery_action=1))
    it.driver.xid(ONE, XID_RECOVERY_ACTION_CHANGED)
    await it.until(lambda: it.healthy == [1, 2])
    why = await it.refused("reset-done", gpu="0")
    assert why == (
        f"GPU 0 ({ONE}) was probed and needs a reset still: it is unhealthy: recovery-action: the"
        " driver asks for a reset of the GPU"
    )


async def test_a_gpu_that_does_not_answer_is_not_said_to_be_reset(watching, monkeypatch):
    it = watching
    monkeypatch.setattr("vgpu_agent.requests.PROBE_SECONDS", 0.5)
    it.driver.xid(ONE, RESET, falls_off_the_bus=True)
    await it.until(lambda: it.healthy == [1, 2])
    why = await it.refused("reset-done", gpu="0")
    begin = f"GPU 0 ({ONE}) has not answered a probe within 0.5 s: it is unhealthy: xid: XID 95"
    assert why.startswith(begin)


async def test_a_cordon_outlives_the_reset(watching):
    it = watching
    await it.ask("cordon", gpu="0", reason="reset")
    it.driver.xid(ONE, RESET)
    await it.until(lambda: it.reasons(ONE) == "xid cordoned")
    it.now += 1
    answer = await it.ask("reset-done", gpu="0")
    assert answer == f"GPU 0 ({ONE}) was probed: it is unhealthy: cordoned: reset\n"


# Rehearsal


@pytest.mark.parametrize(
    ("fault", "reasons"),
    [
        ({"fault": "xid", "xid": 79}, "xid lost"),
        ({"fault": "xid", "xid": RESET}, "xid"),
        ({"fault": "xid", "xid": 31}, ""),
        ({"fault": "lose"}, "lost"),
        ({"fault": "ecc"}, "ecc"),
        ({"fault": "hang"}, "timeout"),
    ],
)
@pytest.mark.parametrize("heal", [{}, {"gpu": "0"}])
async def test_a_simulated_fault_is_found_as_a_real_one_and_ends_with_heal(
    it, monkeypatch, fault, reasons, heal
):
    monkeypatch.setattr(it.watch, "intervals", it.watch.intervals.__class__(call_limit=0.05))
    await it.ask("simulate", gpu="0", **fault)
    if "xid" in fault:
        await it.watch.take_events()
    await it.look()
    assert it.reasons(ONE) == reasons
    assert it.reasons(TWO) == ""
    # Others are not reset, which would make them unhealthy for a moment.
    answer = f"GPU 0 ({ONE}) was reset, and is well" if heal or reasons else "no GPU has a fault"
    assert await it.ask("simulate", fault="heal", **heal) == f"{answer}\n"
    await it.look()
    await it.prove(20)
    assert it.healthy == [0, 1, 2]


async def test_every_ecc_error_is_one_more_and_heal_begins_anew(it):
    for _ in range(2):
        await it.ask("simulate", fault="ecc", gpu="0")
    assert (await it.driver.probe([ONE]))[ONE].uncorrectable_ecc == 2
    await it.ask("simulate", fault="heal")
    await it.look()
    assert (await it.driver.probe([ONE]))[ONE].uncorrectable_ecc == 0


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"fault": "burn", "gpu": "0"}, "fault='burn': allowed is xid, lose, ecc, hang, heal"),
        ({"fault": "lose"}, "gpu=None: which GPU is it? Say --gpu INDEX"),
        ({"fault": "heal", "gpu": 0}, "gpu=0: which GPU is it? Say --gpu INDEX"),
        ({"fault": "xid", "gpu": "0"}, "xid=None: allowed is a number from 1 to 65535"),
        ({"fault": "xid", "gpu": "0", "xid": 0}, "xid=0: allowed is a number from 1 to 65535"),
        ({"fault": "xid", "gpu": "0", "xid": 65536}, "xid=65536: allowed is"),
        ({"fault": "xid", "gpu": "0", "xid": "79"}, "xid='79': allowed is"),
    ],
)
async def test_a_fault_that_is_none_is_refused(it, wrong, words):
    assert (await it.refused("simulate", **wrong)).startswith(words)
    await it.look()
    assert it.healthy == [0, 1, 2]


async def test_real_gpus_cannot_be_made_to_fail(tmp_path):
    class Real(GpuDriver):
        """It is not even asked."""

        scan = probe = processes = next_events = release = memory_limits = limit_memory = None

    it = Asked(tmp_path, Real())
    for fault in ("xid", "lose", "ecc", "hang", "heal", "burn"):
        why = await it.refused("simulate", fault=fault, gpu="0", xid=79)
        assert why == (
            "the GPUs of this agent are real: faults are simulated with"
            " VGPU_GPU_DRIVER=simulated only"
        )
