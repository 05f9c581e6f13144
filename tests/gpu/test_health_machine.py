"""Random faults, resets, releases and restarts: every view is always what a simple model says.

The model is written from the documented rules, not from the code. It says which GPUs are listed and
for which reasons each is unhealthy since when; the kubelet's list, the report, the log lines and
the counted transitions have to agree with it, and so with each other.
"""

import asyncio
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import anyio
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.gpu.watched import Watched
from tests.model.strategies import a_look
from vgpu_agent import store
from vgpu_agent.errors import DriverError
from vgpu_agent.gpu import memory
from vgpu_agent.gpu.memory import Keeper
from vgpu_agent.gpu.simulated import SimulatedDriver, simulated_gpus
from vgpu_agent.kubelet._proto.v1beta1 import ListAndWatchResponse
from vgpu_agent.kubelet.codec import ListEncoder
from vgpu_agent.kubelet.plugin import DevicePlugin
from vgpu_agent.model.facts import ComputeMode, Reading
from vgpu_agent.model.rules import HealthRules, SharingRules
from vgpu_agent.observe.reporting import make_report

REPLICAS, RECOVERY, INTERVAL, LOST_SECONDS = 3, 60.0, 5.0, 1800.0
GPUS = {gpu.uuid: gpu for gpu in simulated_gpus(4, "GPU", 2**34, (0, 1))}
*FIRST, LATER = GPUS  # one is put in later
uuids = st.sampled_from(list(GPUS))

GOOD, RESET, REBOOT = 1, 2, 3
"""What ends a fault: passed probes, a reset, a reboot."""

XIDS = {31: 0, 45: 0, 74: GOOD, 999: GOOD, 54: GOOD, 95: RESET, 48: RESET, 79: REBOOT, 151: REBOOT}


@dataclass
class ModelGpu:
    """The hardware, and what must be known of it."""

    on_bus: bool = True
    epoch: int = 0
    handle: int | None = None
    hangs: bool = False
    error: str | None = None
    action: int | None = None
    ecc: int = 0
    energy: int = 1000
    remap_failed: bool = False
    prohibited: bool = False
    mig: bool = False

    described: bool = False
    described_mig: bool = False
    known: bool = False
    """Something was reported of it, listed or not."""
    faults: dict[str, tuple[int, float, float]] = field(default_factory=dict)
    """By reason: what ends it, when it was seen last, and since when, as people count."""
    falls: list[float] = field(default_factory=list)
    baseline: int | None = None
    counters: tuple[int, int] | None = None
    good_seconds: float = 0.0
    good_at: float | None = None
    seen: float | None = None
    away_since: float | None = None
    back_after: float | None = None
    began_again: float | None = None

    def reading(self) -> Reading:
        return Reading(
            error=self.error,
            uncorrectable_ecc=self.ecc,
            remap_failed=self.remap_failed,
            recovery_action=self.action,
            compute_mode=ComputeMode.PROHIBITED if self.prohibited else ComputeMode.DEFAULT,
            energy_millijoules=self.energy,
        )

    @property
    def waits(self) -> bool:
        return any(ends >= RESET for ends, *_ in self.faults.values())

    def reset(self) -> None:
        self.on_bus, self.epoch, self.hangs = True, self.epoch + 1, False
        self.error, self.remap_failed, self.ecc, self.energy = None, False, 0, 0
        self.action = None if self.action is None else 0

    def bad(self, reason: str, ends: int, now: float, wall: float) -> None:
        self.known = True
        if not self.faults:
            self.falls.append(now)
        before, _, since = self.faults.get(reason, (0, 0, wall))
        self.faults[reason] = (max(before, ends), now, since)
        self.good_seconds, self.good_at = 0.0, None

    def gone(self, now: float, wall: float) -> None:
        """The driver does not see it."""
        self.bad("lost", GOOD, now, wall)
        self.away_since = now if self.away_since is None else self.away_since
        self.back_after, self.began_again = now, None

    def forgotten(self) -> None:
        """Away for so long that it is not listed any more; a reset is still waited for."""
        self.described = False
        if not self.waits:
            hardware = ModelGpu(*[getattr(self, name) for name in HARDWARE])
            self.__dict__.update(hardware.__dict__)

    def probed(self, now: float, wall: float, *, new_handle: bool) -> None:
        """It answered, well or not."""
        self.known = True
        if new_handle and self.back_after is None:
            self.back_after = now if self.seen is None else self.seen
        if self.hangs or self.error is not None:
            self.bad("timeout" if self.hangs else "probe", GOOD, now, wall)
            return
        counters = (self.energy, self.ecc)
        back, twice = self.back_after, self.began_again
        self.began_again = None
        if back is None and any(
            2 * n < o for o, n in zip(self.counters or (), counters, strict=False)
        ):
            back = twice
            self.began_again = self.seen if twice is None else None
        if back is not None or self.baseline is None:
            self.baseline = self.ecc
        if self.began_again is None:
            self.counters = counters
        found = {
            "recovery-action": (self.action not in (None, 0), RESET),
            "ecc": (self.ecc > self.baseline, RESET),
            "remap": (self.remap_failed, RESET),
            "compute-mode": (self.prohibited, GOOD),
        }
        now_bad = {reason: ends for reason, (is_so, ends) in found.items() if is_so}
        taken_back = self.action == 0 and "recovery-action" in self.faults
        until = back if back is not None else now if taken_back else None
        self.seen, self.away_since, self.back_after = now, None, None
        if until is not None:
            for reason, (ends, newest, _) in list(self.faults.items()):
                if ends >= RESET and newest <= until and reason not in now_bad:
                    del self.faults[reason]
        for reason, ends in now_bad.items():
            self.bad(reason, ends, now, wall)
        if not now_bad:
            self.proven(now)

    def proven(self, now: float) -> None:
        if self.faults and self.good_at is not None:
            self.good_seconds += min(now - self.good_at, 2 * INTERVAL)
        self.good_at = now
        recent = sum(now - fall <= 3600 for fall in self.falls)
        if self.good_seconds >= min(RECOVERY * 2.0 ** max(0, recent - 3), 3600):
            self.faults = {r: f for r, f in self.faults.items() if f[0] >= RESET}
        if not self.faults:
            self.good_seconds = 0.0


HARDWARE = list(ModelGpu.__dataclass_fields__)[:11]


class Machine(RuleBasedStateMachine):
    """An agent without its timers: every look, event and second is a step of the machine."""

    @initialize()
    def start(self) -> None:
        self.directory = Path(tempfile.mkdtemp())
        self.boot = self.directory / "boot_id"
        self.boot.write_text("0")
        self.model = {uuid: ModelGpu(on_bus=uuid in FIRST) for uuid in GPUS}
        self.inserted = set(FIRST)
        self.now, self.jumped, self.void = 1000.0, 0.0, True
        self.driver_error: str | None = None
        self.mps: set[str] = set()
        self.stranger: str | None = None
        self.loop = asyncio.new_event_loop()
        self.tasks: list[asyncio.Task[None]] = []
        self.driver = SimulatedDriver([GPUS[uuid] for uuid in FIRST])
        self.run(self.new_agent())

    def run(self, what) -> None:
        self.loop.run_until_complete(what)

    @property
    def wall(self) -> float:
        return self.agent.wall

    async def new_agent(self) -> None:
        self.agent = Watched(
            self.driver,
            sharing=SharingRules(replicas=REPLICAS),
            health=HealthRules(
                driver_wait=1e9,
                health_interval=INTERVAL,
                recovery_seconds=RECOVERY,
                lost_card_seconds=LOST_SECONDS,
            ),
            call_limit=0.1,
        )
        self.agent.now, self.agent.jumped = self.now, self.jumped
        self.said: dict[str, bool] = {}
        self.flips: Counter[tuple[str, str]] = Counter()
        self.events: Counter[tuple[str | None, int]] = Counter()
        self.mps, self.stranger = set(), None
        await Keeper(self.directory, self.agent.node, self.boot).recall()
        await self.look()
        encoder = ListEncoder()
        self.plugin = DevicePlugin(node=self.agent.node, encoder=encoder, observer=_Nobody())
        self.tasks = [self.loop.create_task(each) for each in (self.plugin.run(), self.follow())]

    async def follow(self) -> None:
        self.list: dict[str, str] = {}
        async for encoded in self.plugin._lists.follow(version=0):
            message = ListAndWatchResponse().parse(encoded)
            self.list = {device.id: device.health for device in message.devices}

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    # What the agent does in its turn

    def settle(self, after: float = 0.0) -> None:
        self.now += after
        self.agent.now = self.now
        self.run(self.look())

    async def look(self) -> None:
        for uuid in self.inserted:
            self.model[uuid].energy += 10
            self.driver.show(uuid, self.model[uuid].reading())
        present = self.agent.snapshot.present
        # Without one usable GPU it opens the driver again by itself.
        self.void |= self.agent.watch._handles_void
        await self.agent.look()
        self.looked(present)

    def looked(self, present: frozenset[str]) -> None:
        now, wall = self.now, self.wall
        hung = {uuid for uuid in present if self.model[uuid].hangs}
        answers = {
            uuid
            for uuid in present - hung
            if self.model[uuid].on_bus and self.model[uuid].handle == self.model[uuid].epoch
        }
        lost = set() if self.void else present - hung - answers
        self.void = self.driver_error is not None
        for uuid, each in self.model.items():
            there = not self.void and uuid in self.inserted and each.on_bus
            if there:
                each.handle, each.described, each.described_mig = each.epoch, True, each.mig
            if uuid in hung | answers or there:
                each.probed(now, wall, new_handle=uuid in lost)
            elif uuid in lost and self.void:
                each.gone(now, wall)
            if self.void:
                if each.described:
                    each.bad("probe", GOOD, now, wall)
            elif not there and (each.described or each.known):
                each.handle = None
                each.gone(now, wall)
                if now - each.away_since >= LOST_SECONDS:
                    each.forgotten()

    # What happens to GPUs

    @rule(uuid=st.none() | uuids, xid=st.sampled_from(list(XIDS)))
    def xid(self, uuid: str | None, xid: int) -> None:
        self.events[uuid, xid] += 1
        published = len(self.agent.published)
        self.run(self.agent.xid(uuid, xid))
        assert len(self.agent.published) == published + 1
        for each, gpu in self.model.items():
            if each == uuid or (uuid is None and gpu.described):
                gpu.known = True
                if XIDS[xid]:
                    gpu.bad("xid", XIDS[xid], self.now, self.wall)

    @rule(uuid=uuids, error=st.sampled_from([None, "GPU requires reset"]))
    def probe_error(self, uuid: str, error: str | None) -> None:
        self.model[uuid].error = error
        self.settle(after=1)

    @rule(uuid=uuids, action=st.sampled_from([None, 0, 1, 2, 9]))
    def recovery_action(self, uuid: str, action: int | None) -> None:
        self.model[uuid].action = action
        self.settle(after=1)

    @rule(uuid=uuids, fault=st.sampled_from(["ecc", "remap", "mode", "mode ends"]))
    def reading_changes(self, uuid: str, fault: str) -> None:
        gpu = self.model[uuid]
        gpu.ecc += fault == "ecc"
        gpu.remap_failed |= fault == "remap"
        gpu.prohibited = (gpu.prohibited or fault == "mode") and fault != "mode ends"
        self.settle(after=1)

    @rule(uuid=uuids, hangs=st.booleans())
    def hang(self, uuid: str, hangs: bool) -> None:
        if uuid in self.inserted:
            self.model[uuid].hangs = hangs
            self.driver.hang(uuid, hangs=hangs)
            self.settle(after=1)

    @rule(uuid=uuids)
    def falls_off_the_bus(self, uuid: str) -> None:
        if uuid in self.inserted:
            self.model[uuid].on_bus = False
            self.driver.fall_off(uuid)
            self.settle(after=1)

    @rule(
        uuid=uuids, after=st.sampled_from([0.0, 3.0]), xid=st.none() | st.sampled_from(list(XIDS))
    )
    def reset(self, uuid: str, after: float, xid: int | None) -> None:
        """And an XID before the look that sees it."""
        if uuid in self.inserted:
            self.reset_gpu(uuid)
            self.now = self.agent.now = self.now + after
            if xid is not None:
                self.xid(uuid, xid)
            self.settle(after=2)

    def reset_gpu(self, uuid: str) -> None:
        self.model[uuid].reset()
        self.driver.enumerate_again(uuid)
        self.driver.show(uuid, self.model[uuid].reading())

    @rule(uuid=uuids, mig=st.booleans())
    def inserted_or_set_to_mig(self, uuid: str, mig: bool) -> None:
        gpu = self.model[uuid]
        gpu.reset()
        gpu.mig, gpu.epoch = mig, 0
        self.inserted.add(uuid)
        self.driver.insert(replace(GPUS[uuid], mig=mig))
        self.settle(after=1)

    # What happens around them

    @rule(seconds=st.sampled_from([1.0, 5.0, 5.0, 60.0, 500.0, 4000.0]))
    def time_passes(self, seconds: float) -> None:
        self.settle(after=seconds)

    @rule(looks=st.sampled_from([12, 13, 25, 60]))
    def the_agent_probes_for_a_while(self, looks: int) -> None:
        if not any(gpu.hangs for gpu in self.model.values()):
            for _ in range(looks):
                self.settle(after=INTERVAL)

    @rule(seconds=st.sampled_from([-1e6, -30.0, 1.0, 1e6]))
    def the_wall_clock_jumps(self, seconds: float) -> None:
        self.jumped += seconds
        self.agent.jumped = self.jumped

    @rule(error=st.sampled_from([None, "NVML is not there"]))
    def the_driver_fails(self, error: str | None) -> None:
        self.driver_error = error
        self.driver.fail(error and DriverError(error))
        self.settle(after=1)

    @rule(again=st.booleans(), resets=st.sets(uuids, max_size=2))
    def release(self, again: bool, resets: set[str]) -> None:
        self.agent.watch.release(30)
        self.run(self.released(again, resets & self.inserted))
        self.settle()

    async def released(self, again: bool, resets: set[str]) -> None:
        node = self.agent.snapshot
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.agent.watch._release)
            await self.agent.until(lambda: self.agent.snapshot.driver.released_until is not None)
            self.unwatched()
            for uuid in resets:
                self.reset_gpu(uuid)
            self.now = self.agent.now = self.now + 20
            if again:
                self.agent.watch.release(30)
                end = self.wall + 30
                await self.agent.until(lambda: self.agent.snapshot.driver.released_until == end)
                self.unwatched()
            self.now = self.agent.now = self.now + 40
            self.agent.watch._release_changed.set()
        self.void = True
        for gpu in self.model.values():
            gpu.handle = None
        assert node.health.keys() == self.agent.snapshot.health.keys()

    def unwatched(self) -> None:
        for gpu in self.model.values():
            if gpu.known:
                gpu.good_at = None
                gpu.seen = self.now if gpu.away_since is None else gpu.seen

    @rule()
    def the_operator_says_that_all_were_reset(self) -> None:
        self.agent.watch.reset_done()
        for gpu in self.model.values():
            if gpu.waits:
                gpu.back_after = self.now
        self.settle(after=1)

    @rule(state=st.sampled_from(["up", "down", "faulty", "down and faulty", "partly"]), of=uuids)
    def the_mps_daemon_is_looked_at(self, state: str, of: str) -> None:
        self.stranger = of if state == "partly" else None
        look = a_look(**{uuid: REPLICAS for uuid in GPUS if uuid != self.stranger})
        down = "no daemon" if "down" in state else None
        fault = "status FAULT" if "faulty" in state else None
        daemons = {n: replace(d, down=down, fault=fault) for n, d in look.daemons.items()}
        self.agent.node.set_mps(replace(look, daemons=daemons))
        self.mps = {"mps"} if down else set()
        self.mps |= {"mps-fault"} if fault else set()

    @precondition(lambda self: not any(gpu.hangs for gpu in self.model.values()))
    @rule(resets=st.sets(uuids, max_size=2), reboot=st.sampled_from([False, False, True]))
    def the_agent_restarts(self, resets: set[str], reboot: bool) -> None:
        """With GPUs reset while it was not there; all of them where the node was rebooted."""
        kept = memory.kept(self.agent.snapshot, store.boot_id(self.boot))
        store.write(self.directory / memory.FILE, asdict(kept))
        self.run(self.stop())
        if reboot:
            self.boot.write_text(self.boot.read_text() + "0")
            resets = set(GPUS)
        for uuid in resets & self.inserted:
            self.reset_gpu(uuid)
        self.run(self.driver.release())
        for gpu in self.model.values():
            kept = {r: (ends, 0.0, at) for r, (ends, _, at) in gpu.faults.items() if ends >= RESET}
            kept, counters = {} if reboot else kept, gpu.counters
            new = ModelGpu(*[getattr(gpu, name) for name in HARDWARE])
            if kept:
                new.known, new.faults, new.counters, new.seen = True, kept, counters, 0.0
            new.handle = None
            gpu.__dict__.update(new.__dict__)
        self.void = True
        self.run(self.new_agent())

    # What must be so after each step

    def expected(self) -> dict[str, dict[str, float | None]]:
        """The listed GPUs, and since when each reason makes each of them unhealthy."""
        found = {}
        for uuid, gpu in self.model.items():
            if gpu.described and not gpu.described_mig:
                mps = self.mps | ({"mps"} if uuid == self.stranger else set())
                since = {reason: at for reason, (_, _, at) in gpu.faults.items()}
                found[uuid] = {**since, **dict.fromkeys(mps)}
        return found

    @invariant()
    def every_view_is_what_the_model_says(self) -> None:
        if not hasattr(self, "agent"):
            return
        expected = self.expected()
        snapshot = self.agent.snapshot
        found = {
            shared.gpu.uuid: {
                fault.reason.value: None if fault.reason in ("mps", "mps-fault") else fault.since
                for fault in shared.faults
            }
            for shared in snapshot.inventory.gpus
        }
        assert found == expected
        healthy = {uuid: not reasons for uuid, reasons in expected.items()}
        report = make_report(snapshot, self.agent.rules, 1e9)
        assert {gpu.uuid: gpu.healthy for gpu in report.gpus} == healthy
        assert {g.uuid: {f.reason for f in g.faults} for g in report.gpus} == {
            uuid: set(reasons) for uuid, reasons in expected.items()
        }
        assert report.vgpus.total == REPLICAS * len(healthy)
        assert report.vgpus.unhealthy == REPLICAS * list(healthy.values()).count(False)
        self.the_log_says(healthy)
        for before, after in self.agent.published:
            for shared in after.inventory.gpus:
                known = before.inventory.find(shared.gpu.uuid)
                if known is not None and known.healthy != shared.healthy:
                    to = "healthy" if shared.healthy else "unhealthy"
                    self.flips[shared.gpu.uuid, to] += 1
        self.agent.published.clear()
        counted: Counter[tuple[str, str]] = Counter()
        for (uuid, to, _), number in snapshot.transitions.items():
            counted[uuid, to] += number
        assert counted == self.flips
        assert dict(snapshot.xids) == dict(self.events)
        self.run(self.the_kubelet_has(healthy))

    def the_log_says(self, healthy: dict[str, bool]) -> None:
        """Whoever reads only the log knows the same."""
        for line in self.agent.lines:
            uuid = line.fields.get("uuid")
            if line.message.startswith("advertising"):
                self.said[uuid] = True
            elif "vGPUs are unhealthy" in line.message:
                self.said[uuid] = False
            elif "healthy again" in line.message:
                assert self.said[uuid] is False
                self.said[uuid] = True
            elif "no longer listed" in line.message or "GPU excluded" in line.message:
                self.said.pop(uuid, None)
        self.agent.lines.clear()
        assert self.said == healthy

    async def the_kubelet_has(self, healthy: dict[str, bool]) -> None:
        expected = {
            f"{uuid}::{n}": "Healthy" if is_so else "Unhealthy"
            for uuid, is_so in healthy.items()
            for n in range(REPLICAS)
        }
        with anyio.move_on_after(10):
            while self.list != expected:  # noqa: ASYNC110 - polled on purpose
                await anyio.sleep(0.001)
        assert self.list == expected

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            self.run(self.stop())
            self.run(self.loop.shutdown_asyncgens())
            self.run(self.loop.shutdown_default_executor())
            self.loop.close()


class _Nobody:
    def observe_rpc(self, method: str, code: str, seconds: float) -> None:
        """Nobody asks."""


TestMachine = pytest.mark.slow(Machine.TestCase)
TestMachine.settings = settings(
    max_examples=40,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
