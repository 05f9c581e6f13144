"""Log lines of the parts of the state whose lines no other test reads."""

import logging
from dataclasses import replace

import anyio
import pytest

from tests.model.strategies import a_gpu, a_look
from vgpu_agent.model import advice
from vgpu_agent.model.advice import Remedy
from vgpu_agent.model.devices import Effect, Excluded, Fault, Reason
from vgpu_agent.model.facts import MpsLook
from vgpu_agent.model.health import ActiveFault, GpuHealth
from vgpu_agent.model.holders import Assignment, Holder, Holders, Usage
from vgpu_agent.model.limits import Limited, LimitsLook
from vgpu_agent.model.place import Place, in_a_line
from vgpu_agent.model.rules import HealthRules, SharingRules
from vgpu_agent.model.snapshot import Driver, Inputs, Kubelet, Rules, Snapshot, compose
from vgpu_agent.observe.changes import NAMED, changes, write
from vgpu_agent.observe.logs import Repeats

GPU = a_gpu(0)
UP = a_look(**{"gpu-0": 2})
WAITING = replace(UP, daemons={"gpu-0": replace(UP.daemons["gpu-0"], waiting=2)})
SPLIT = Holders(None, (Assignment(Holder("ns", "pod", "main"), ("gpu-0::0", "gpu-1::0")),))
HELD = Holders(None, (Assignment(Holder("ns", "pod", "main"), ("gone::0",)),))
MANY = Holders(
    None, (Assignment(Holder("ns", "pod", "main"), tuple(f"gone::{n}" for n in range(10))),)
)
EIGHT = ", ".join(f"gone::{n}" for n in range(NAMED))
XID = Fault(Reason.XID, 0.0, "XID 74")
RESET, PROBE = replace(XID, detail="XID 95"), Fault(Reason.PROBE, 0.0, "no")
REBOOT = Fault(Reason.XID, 0.0, "XID 79", Effect.UNTIL_REBOOT)
PLACE = Place("gpu-1", "gpus", "agent-x")
RULES = Rules(SharingRules(replicas=2), HealthRules(ignored_xids=frozenset({79})), place=PLACE)
NODE = "kubectl debug node/gpu-1 -it --image=busybox --profile=sysadmin -- chroot /host"
MORE = "; all commands: kubectl -n gpus exec agent-x -c agent -- vgpu-agent status"
DRIVER = f"{in_a_line(advice.driver_down(PLACE), PLACE)}"
MPS = f"{in_a_line(advice.mps(PLACE), PLACE)}"
RIVAL = f"{in_a_line(advice.rival(PLACE), PLACE)}"
LOG = f"{NODE} journalctl -k -g NVRM"
LOOK = f"see what `nvidia-smi` and the kernel log of the node say: {NODE} nvidia-smi{MORE}"


NAME = Holder("ns", "pod", "main")
WITHOUT, WITH = Limited(NAME, problem="it has none"), Limited(NAME)
BAD, GOOD, BOTH = (
    LimitsLook(enforced=True, containers=found) for found in ((WITHOUT,), (WITH,), (WITHOUT, WITH))
)
NO_LIMIT = (
    "a container runs without its memory limit: it has none. Next: "
    f"{in_a_line(advice.no_limits(PLACE, enforced=True), PLACE)}"
)


def base(**known: object) -> Inputs:
    known = {
        "driver": Driver("1", None),
        "gpus": {"gpu-0": GPU},
        "present": frozenset({"gpu-0"}),
        **known,
    }
    return replace(Inputs(), **known)


def ill(*faults: Fault) -> dict[str, object]:
    return {"health": {"gpu-0": GpuHealth(tuple(ActiveFault(fault, 0.0) for fault in faults))}}


def kubelet(**known: object) -> dict[str, object]:
    return {"kubelet": Kubelet(**known)}


CASES = [
    ({}, {"driver": Driver("1", "no", 60.0)}, ["WARNING released all GPUs; reset them now"]),
    (
        {"driver": Driver("1", "no", 60.0)},
        {"driver": Driver("1", "no", 90.0)},
        ["INFO the release is longer"],
    ),
    ({"driver": Driver("1", "no", 60.0)}, {}, ["INFO driver 1 answers"]),
    (
        {},
        {"driver": Driver("1", "broken")},
        [f"ERROR the driver cannot be asked about all GPUs: broken. Next: {DRIVER}"],
    ),
    # The advice is what `status` says: that of the driver, where it does not answer.
    (
        {},
        {"driver": Driver("1", "broken"), **ill(PROBE)},
        [
            f"ERROR no GPU can be used: broken. Next: {DRIVER}",
            "WARNING 2 vGPUs are unhealthy: probe: no. Next: as for the driver",
        ],
    ),
    ({}, {"xids": {("gpu-0", 13): 1}}, ["INFO XID 13 (Graphics Engine Exception): counted"]),
    ({}, {"xids": {("gpu-0", 79): 1}}, ["INFO XID 79 (GPU has fallen off the bus): counted"]),
    ({}, {"xids": {("gpu-0", 74): 1}}, []),
    (
        {},
        ill(XID),
        [f"WARNING 2 vGPUs are unhealthy: xid: XID 74. Next: {Remedy.WAIT.words}: {LOG}"],
    ),
    (
        ill(XID),
        ill(XID, PROBE),
        [f"WARNING 2 vGPUs are unhealthy: xid: XID 74; probe: no. Next: {LOOK}"],
    ),
    (
        {},
        ill(REBOOT, PROBE),
        [
            (
                "WARNING 2 vGPUs are unhealthy: xid: XID 79; probe: no. Next: "
                f"{Remedy.REBOOT.words}: {LOG}{MORE}"
            )
        ],
    ),
    (ill(XID, PROBE), ill(XID), ["INFO no longer probe; still unhealthy: xid: XID 74"]),
    (ill(XID), {}, ["INFO 2 vGPUs are healthy again (no longer xid: XID 74)"]),
    (ill(XID), ill(RESET), []),
    ({"gpus": {}}, {}, ["INFO advertising 2 vGPUs"]),
    ({}, {"gpus": {}, "present": frozenset()}, ["WARNING lost for 60 minutes: no longer listed"]),
    ({}, {"undescribed": (Excluded(a_gpu(1), "error", "mute"),)}, ["WARNING GPU excluded: mute"]),
    (
        {"undescribed": (Excluded(a_gpu(1), "error", "mute"),)},
        {"undescribed": (Excluded(a_gpu(1, reserved_bytes=7), "error", "mute"),)},
        [],
    ),
    ({}, {"limits": BAD}, ["INFO memory limits by the driver are set", f"WARNING {NO_LIMIT}"]),
    ({"limits": BAD}, {"limits": GOOD}, ["INFO a container has its memory limit now"]),
    ({"limits": BAD}, {"limits": BOTH}, []),  # it was started again, and has two cgroups
    ({"limits": BOTH}, {"limits": BAD}, []),
    (
        {"limits": GOOD},
        {"limits": LimitsLook("cgroup v1")},
        ["INFO memory is not limited by the driver: cgroup v1"],
    ),
    ({}, {"mps_look": UP}, ["INFO the MPS daemons answer and their limits are in effect"]),
    (
        {},
        {"mps_look": MpsLook("gone")},
        [f"WARNING no vGPU can be given: gone. Next: {MPS}"],
    ),
    (
        {"mps_look": MpsLook("gone")},
        {"mps_look": UP},
        ["INFO the MPS daemons answer and their limits are in effect"],
    ),
    (
        {"mps_look": UP},
        {"mps_look": WAITING},
        ["WARNING MPS clients of another user wait for their turn"],
    ),
    (
        {"mps_look": UP},
        {"mps_look": replace(UP, unwatched="nobody looks")},
        ["WARNING nobody looks"],
    ),
    (
        {"mps_look": replace(UP, unwatched="nobody looks")},
        {"mps_look": UP},
        ["INFO `mps watch` is back"],
    ),
    ({}, kubelet(registered=True), ["INFO registered with the kubelet; it follows the list"]),
    ({}, kubelet(error="no kubelet", away=True), ["WARNING no kubelet; waiting for it"]),
    ({}, kubelet(error="refused"), ["ERROR cannot register: refused"]),
    (
        kubelet(registered=True),
        kubelet(error="another agent", rival="at x.sock"),
        [f"ERROR another agent. Next: {RIVAL}"],
    ),
    (
        kubelet(registered=True),
        kubelet(error="gone"),
        ["WARNING registration ended: gone; registering again"],
    ),
    (kubelet(error="refused"), kubelet(error="refused", streams=1), []),
    (
        {},
        {"holders": HELD},
        [
            "INFO the kubelet says who holds which vGPU",
            "WARNING held, but no longer advertised: gone::0",
        ],
    ),
    (
        {"holders": HELD},
        {"holders": MANY},
        [f"WARNING held, but no longer advertised: {EIGHT} and 2 more"],
    ),
    (
        {"holders": HELD},
        {"holders": Holders(None, ())},
        ["INFO every vGPU that is held is advertised again"],
    ),
    (
        {"holders": Holders(None, ())},
        {"holders": Holders("away", ())},
        ["WARNING cannot ask the kubelet who holds which vGPU: away"],
    ),
    (
        {"holders": Holders("away", ())},
        {"holders": Holders("away")},
        ["WARNING forgetting who holds which vGPU: the kubelet's answer is too old"],
    ),
    (
        {"holders": Holders(None, (), "bad")},
        {"holders": Holders(None, ())},
        ["INFO the kubelet's checkpoint is of use again"],
    ),
    (
        {"usage": Usage()},
        {"usage": Usage(problem="no cgroups")},
        ["WARNING no cgroups (docs/usage.md)"],
    ),
    (
        {"usage": Usage(problem="no cgroups")},
        {"usage": Usage()},
        ["INFO usage is attributed to containers again"],
    ),
    ({"store_error": "cannot write"}, {}, ["INFO the state file is written again"]),
]


@pytest.mark.parametrize(("before", "after", "expected"), CASES, ids=range(len(CASES)))
def test_a_change_is_logged_once_in_these_words(before, after, expected):
    old, new = compose(base(**before), RULES), compose(base(**after), RULES)
    lines = list(changes(old, new, RULES))
    assert [f"{logging.getLevelName(line.level)} {line.message}" for line in lines] == expected
    assert list(changes(new, new, RULES)) == []
    assert list(changes(new, compose(base(**after), RULES), RULES)) == []


def test_a_line_carries_fields(caplog):
    caplog.set_level(logging.INFO)
    before = Snapshot()
    repeats = Repeats(logging.getLogger("vgpu_agent"))
    write(changes(before, compose(base(**ill(XID, PROBE)), RULES), RULES), repeats)
    *_, record = caplog.records
    assert record.fields == {"gpu": 0, "uuid": "gpu-0", "reason": "xid,probe"}
    assert record.levelname == "WARNING"


@pytest.mark.slow
async def test_a_flood_of_xids_is_a_line_for_each_gpu_and_xid_and_then_their_number(caplog):
    """Any tenant can cause some 50 a second."""
    caplog.set_level(logging.INFO)
    repeats = Repeats(logging.getLogger("vgpu_agent"), period=0.3)
    before = compose(base(), RULES)
    for n in range(1, 251):
        after = compose(base(xids={("gpu-0", 13): 2 * n, (None, 13): n, ("gpu-0", 79): 1}), RULES)
        write(changes(before, after, RULES), repeats)
        before = after
    first = [(record.fields["uuid"], record.fields["xid"]) for record in caplog.records]
    assert first == [("gpu-0", 13), (None, 13), ("gpu-0", 79)]
    await anyio.sleep(0.6)
    assert [each.rpartition(": ")[2] for each in caplog.messages[3:]] == [
        "499 more within 0.3 s",
        "249 more within 0.3 s",
    ]


def test_a_failed_write_says_what_it_means():
    old, new = compose(base(), RULES), compose(base(store_error="cannot write /s: full"), RULES)
    (line,) = changes(old, new, RULES)
    assert line.message.startswith(
        "cannot write /s: full; tried again. A restart of the agent would"
    )
