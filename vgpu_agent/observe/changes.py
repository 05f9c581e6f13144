"""What to log when the node changes: the only place that words a change of its state.

A line is an event: a short message and fields. A warning says what happened, what it means for
pods, and what to do next.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field

from vgpu_agent.model import advice
from vgpu_agent.model.devices import Effect, Gpu, Reason, SharedGpu
from vgpu_agent.model.facts import DaemonLook
from vgpu_agent.model.holders import split_containers
from vgpu_agent.model.limits import LimitsLook, Mode
from vgpu_agent.model.names import number_of
from vgpu_agent.model.place import Advice, in_a_line
from vgpu_agent.model.policy import judge_xid, remedy
from vgpu_agent.model.rules import HealthRules
from vgpu_agent.model.snapshot import Rules, Snapshot
from vgpu_agent.observe.logs import Repeats
from vgpu_agent.observe.report import iso

log = logging.getLogger("vgpu_agent")

NAMED = 8
"""So many orphaned vGPUs are named in a log line."""


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line of the log. Fields are `gpu`, `uuid`, `xid`, `reason` and the like.

    `times`, where it is not 0, says how often it happened, and that it may happen very often.
    """

    level: int
    message: str
    fields: Mapping[str, object] = field(default_factory=dict)
    times: int = 0


def write(lines: Iterator[LogLine], repeats: Repeats | None = None) -> None:
    """Sends the lines to the log; those that may happen very often by `repeats`."""
    for line in lines:
        if line.times and repeats is not None:
            repeats.log(line.level, line.message, line.fields, line.times)
        else:
            log.log(line.level, line.message, extra={"fields": line.fields})


def changes(before: Snapshot, after: Snapshot, rules: Rules) -> Iterator[LogLine]:
    """The lines for one change. Each part of the state has its own function below."""
    yield from _driver(before, after, rules)
    if after.xids is not before.xids:
        yield from _xids(before, after, rules.health)
    if after.inventory is not before.inventory or after.excluded is not before.excluded:
        yield from _gpus(before, after, rules)
    yield from _mps(before, after, rules)
    if after.limits is not None and after.limits != before.limits:
        yield from _limits(before.limits or LimitsLook("not asked yet"), after.limits, rules)
    yield from _kubelet(before, after, rules)
    yield from _holders(before, after)
    for problem, begun, ended in _PROBLEMS:
        if (new := problem(after)) != problem(before):
            yield _info(ended) if new is None else _warning(begun.format(new))


def _info(message: str, **fields: object) -> LogLine:
    return LogLine(logging.INFO, message, fields)


def _warning(message: str, **fields: object) -> LogLine:
    return LogLine(logging.WARNING, message, fields)


def _driver(before: Snapshot, after: Snapshot, rules: Rules) -> Iterator[LogLine]:
    old, new = before.driver, after.driver
    if old == new:
        return
    if new.released_until is not None:
        if old.released_until is None:
            yield _warning("released all GPUs; reset them now", until=iso(new.released_until))
        else:
            yield _info("the release is longer", until=iso(new.released_until))
    elif new.error is not None:
        # Where a call for all GPUs hangs, those that answer for themselves are given on.
        answer = any(shared.healthy for shared in after.inventory.gpus)
        what = "the driver cannot be asked about all GPUs" if answer else "no GPU can be used"
        next_ = _next(advice.driver_down(rules.place), rules)
        yield LogLine(logging.ERROR, f"{what}: {new.error}. {next_}")
    elif not old.up:
        yield _info(f"driver {new.version} answers", gpus=len(after.present))


def _next(what: Advice, rules: Rules) -> str:
    return f"Next: {in_a_line(what, rules.place)}"


def _xids(before: Snapshot, after: Snapshot, rules: HealthRules) -> Iterator[LogLine]:
    """XIDs that are only counted; the others show as faults."""
    for (uuid, xid), count in after.xids.items():
        times = count - before.xids.get((uuid, xid), 0)
        if not times:
            continue
        finding = judge_xid(xid, rules)
        if finding.rule.effect is Effect.COUNT:
            known = after.gpus.get(uuid or "")
            index = {} if known is None else {"gpu": known.index}
            which = "of an unknown GPU, " if uuid is None else ""
            fields = {**index, "uuid": uuid, "xid": xid}
            yield LogLine(logging.INFO, f"{finding.detail}: {which}counted", fields, times)


def _gpus(before: Snapshot, after: Snapshot, rules: Rules) -> Iterator[LogLine]:
    for shared in after.inventory.gpus:
        known = before.inventory.find(shared.gpu.uuid)
        gpu = _fields(shared.gpu)
        if known is None:
            vgpus = number_of(shared.replicas, "vGPU")
            yield _info(f"advertising {vgpus}", **gpu, model=shared.gpu.model)
        elif known.replicas != shared.replicas:
            vgpus = number_of(shared.replicas, "vGPU")
            yield _info(f"advertising {vgpus} instead of {known.replicas}", **gpu)
        yield from _faults(known, shared, rules, driver_up=after.driver.up)
        for note in shared.notes:
            if known is None or note not in known.notes:
                yield _warning(note, **gpu)
    listed = {shared.gpu.uuid for shared in after.inventory.gpus}
    for shared in before.inventory.gpus:
        if shared.gpu.uuid not in listed and shared.gpu.uuid not in after.present:
            minutes = rules.health.lost_card_seconds / 60
            yield _warning(
                f"lost for {minutes:.0f} minutes: no longer listed", **_fields(shared.gpu)
            )
    known_excluded = {(e.gpu.uuid, e.gpu.index, e.reason) for e in before.excluded}
    for each in after.excluded:
        if (each.gpu.uuid, each.gpu.index, each.reason) not in known_excluded:
            yield _warning(f"GPU excluded: {each.detail}", **_fields(each.gpu), reason=each.reason)


def _faults(
    known: SharedGpu | None, shared: SharedGpu, rules: Rules, *, driver_up: bool
) -> Iterator[LogLine]:
    """A new fault with what to do about it, or the end of some."""
    gpu = _fields(shared.gpu)
    old = {} if known is None else {each.reason: each for each in known.faults}
    new = {each.reason: each for each in shared.faults}
    news = [
        each
        for each in shared.faults
        if each.reason not in old
        or old[each.reason].effect is not each.effect
        or (each.reason is Reason.CORDONED and old[each.reason].detail != each.detail)
    ]
    if news:
        what = advice.for_gpu(remedy(shared.faults), shared.gpu.uuid, rules.place, rules.sharing)
        if not driver_up:
            what = advice.AS_FOR_DRIVER
        yield _warning(
            f"{_vgpus(shared)} unhealthy: {shared.fault_text}. {_next(what, rules)}",
            **gpu,
            reason=",".join(each.reason for each in news),
        )
    elif old and not new:
        ended = "; ".join(f"no longer {each.reason}: {each.detail}" for each in old.values())
        yield _info(f"{_vgpus(shared)} healthy again ({ended})", **gpu)
    elif old.keys() - new.keys():
        ended = ", ".join(reason for reason in old if reason not in new)
        yield _info(f"no longer {ended}; still unhealthy: {shared.fault_text}", **gpu)


def _vgpus(shared: SharedGpu) -> str:
    return f"{number_of(shared.replicas, 'vGPU')} {'is' if shared.replicas == 1 else 'are'}"


def _fields(gpu: Gpu) -> dict[str, object]:
    return {"gpu": gpu.index, "uuid": gpu.uuid}


def _mps(before: Snapshot, after: Snapshot, rules: Rules) -> Iterator[LogLine]:
    old, new = before.mps, after.mps
    if after.holders is not before.holders:
        sharing = rules.sharing
        split = split_containers(after.parts, sharing) - split_containers(before.parts, sharing)
        for holder in sorted(split):
            yield _warning(
                "a container was given vGPUs of several GPUs, each with an MPS daemon of its own,"
                f" and cannot start. {_next(advice.MPS_SPLIT, rules)}",
                namespace=holder.namespace,
                pod=holder.pod,
                container=holder.container,
            )
    if new is None or after.mps_look is None or old == new:
        return
    first = before.mps_look is None or old is None
    problem = None if first or old is None else old.problem
    if new.problem is not None and new.problem != problem:
        next_ = _next(advice.mps(rules.place), rules)
        yield _warning(f"no vGPU can be given: {new.problem}. {next_}")
    elif new.problem is None and (first or problem is not None):
        yield _info("the MPS daemons answer and their limits are in effect")
    if new.replacement is not None and (old is None or new.replacement != old.replacement):
        yield _warning(new.replacement)
    unwatched = None if old is None else old.look.unwatched
    if new.look.unwatched != unwatched:
        yield _warning(new.look.unwatched) if new.look.unwatched else _info("`mps watch` is back")
    for shared in after.inventory.gpus:
        fields = _fields(shared.gpu)
        was = DaemonLook() if old is None else old.daemons.get(shared.gpu.uuid, DaemonLook())
        now = new.daemons.get(shared.gpu.uuid, DaemonLook())
        if now.waiting > was.waiting:
            words = "MPS clients of another user wait for their turn"
            yield _warning(words, clients=now.waiting, **fields)


def _limits(old: LimitsLook, new: LimitsLook, rules: Rules) -> Iterator[LogLine]:
    """Where the driver must limit memory, its GPUs are unhealthy when it does not."""
    if new.mode is Mode.NONE and new.why_none != old.why_none:
        yield _info(f"memory is not limited by the driver: {new.why_none}")
    elif new.mode is not old.mode:
        how = "set" if new.mode is Mode.DRIVER else "left to the node's container toolkit"
        yield _info(f"memory limits by the driver are {how}")
    was = {each.holder: each.problem for each in old.missing}
    for each in new.missing:
        if each.holder not in was:
            next_ = _next(advice.no_limits(rules.place, enforced=new.enforced), rules)
            yield _warning(
                f"a container runs without its memory limit: {each.problem}. {next_}",
                **asdict(each.holder),
            )
    # One that starts again has two cgroups for a moment.
    have = {each.holder for each in new.containers} - {each.holder for each in new.missing}
    for holder in sorted(was.keys() & have):
        yield _info("a container has its memory limit now", **asdict(holder))


def _kubelet(before: Snapshot, after: Snapshot, rules: Rules) -> Iterator[LogLine]:
    old, new, resource = before.kubelet, after.kubelet, rules.resource
    if new.registered and not old.registered:
        yield _info("registered with the kubelet; it follows the list", resource=resource)
    elif new.error is not None and new.error != old.error:
        if new.rival is not None:
            message = f"{new.error}. {_next(advice.rival(rules.place), rules)}"
            yield LogLine(logging.ERROR, message, {"resource": resource})
        elif old.registered:
            yield _warning(f"registration ended: {new.error}; registering again", resource=resource)
        elif new.away:
            yield _warning(f"{new.error}; waiting for it", resource=resource)
        else:
            yield LogLine(logging.ERROR, f"cannot register: {new.error}", {"resource": resource})


def _holders(before: Snapshot, after: Snapshot) -> Iterator[LogLine]:
    old, new = before.holders, after.holders
    if old is not new:
        if new.up and not old.up:
            yield _info("the kubelet says who holds which vGPU")
        elif new.error is not None and new.error != old.error:
            yield _warning(f"cannot ask the kubelet who holds which vGPU: {new.error}")
        if new.assignments is None and old.assignments is not None:
            yield _warning("forgetting who holds which vGPU: the kubelet's answer is too old")
    if (old is not new or before.inventory is not after.inventory) and (
        before.orphans != after.orphans
    ):
        if after.orphans:
            more = len(after.orphans) - NAMED
            names = ", ".join(after.orphans[:NAMED]) + (f" and {more} more" if more > 0 else "")
            yield _warning(f"held, but no longer advertised: {names}", vgpus=len(after.orphans))
        else:
            yield _info("every vGPU that is held is advertised again")


_PROBLEMS: tuple[tuple[Callable[[Snapshot], str | None], str, str], ...] = (
    (
        lambda snapshot: snapshot.holders.checkpoint_error,
        "the kubelet's checkpoint is of no use, so List alone says who holds which vGPU: {}",
        "the kubelet's checkpoint is of use again",
    ),
    (
        lambda snapshot: None if snapshot.usage is None else snapshot.usage.problem,
        "{} (docs/usage.md)",
        "usage is attributed to containers again",
    ),
    (
        lambda snapshot: snapshot.store_error,
        (
            "{}; tried again. A restart of the agent would forget which GPUs wait for a reset:"
            " look at VGPU_STATE_DIRECTORY"
        ),
        "the state file is written again",
    ),
    (
        lambda snapshot: snapshot.cordon_error,
        "{}; GPUs that are cordoned since before are unknown: look at VGPU_CORDON_DIRECTORY",
        "the cordons are read again",
    ),
)
"""What may be wrong with the agent itself, and the words for its begin and its end."""
