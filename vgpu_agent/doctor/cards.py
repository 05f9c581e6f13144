"""The driver and its cards: what they are, what is made of them, and how they are."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import anyio

from vgpu_agent.doctor.report import TIMEOUTS, Check, Timeouts, Verdict, late, unexpected
from vgpu_agent.errors import DriverError
from vgpu_agent.gpu.driver import ComputeMode, GpuDriver, Reading, Scan
from vgpu_agent.gpu.health import Fact, judge_reading
from vgpu_agent.model.devices import Excluded, Gpu
from vgpu_agent.model.share import MIB, Divided, Division, divide, usable_bytes

SMALL_VGPU = 1024 * MIB
"""A vGPU of fewer bytes is worth a warning: a CUDA context alone takes some hundred MiB."""

_HUNG = "see the kernel log of the node; a driver that hangs needs a reboot"


@dataclass(frozen=True, slots=True)
class Plan:
    """How the settings want cards to be shared.

    `exclusive`: the MPS pod is to put the cards into compute mode EXCLUSIVE_PROCESS.
    """

    division: Division
    by_mps: bool
    exclusive: bool


@dataclass(frozen=True, slots=True)
class Cards:
    """The checks of driver and cards, and the cards that can be shared."""

    checks: tuple[Check, ...] = ()
    gpus: tuple[Gpu, ...] = ()


async def ask_driver(
    make: Callable[[], GpuDriver], plan: Plan, *, timeouts: Timeouts = TIMEOUTS
) -> Cards:
    """Looks at all cards once and probes each. Raises nothing, also where the driver hangs."""
    try:
        driver = make()
        await driver.__aenter__()
        try:
            return await _ask(driver, plan, timeouts)
        finally:
            with anyio.move_on_after(timeouts.leave, shield=True):
                await driver.__aexit__(None, None, None)
    except DriverError as error:
        advice = "no vGPU can be given until `nvidia-smi` works on the node and in this container"
        return Cards((Check("driver", Verdict.FAIL, str(error), advice),))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is told
        return Cards((unexpected("driver", error),))


async def _ask(driver: GpuDriver, plan: Plan, timeouts: Timeouts) -> Cards:
    scan: Scan | None = None
    with anyio.move_on_after(timeouts.scan):
        scan = await driver.scan()
    if scan is None:
        return Cards((late("driver", timeouts.scan, _HUNG),))
    readings: dict[str, Reading | Exception] = {}

    async def probe(uuid: str) -> None:
        try:
            readings[uuid] = await driver.probe(uuid)
        except Exception as error:  # noqa: BLE001 - told as this card's
            readings[uuid] = error

    with anyio.move_on_after(timeouts.probe):
        async with anyio.create_task_group() as tasks:
            for gpu in scan.gpus:
                tasks.start_soon(probe, gpu.uuid)
    return Cards(tuple(_judge(scan, readings, plan, timeouts)), scan.gpus)


def _judge(
    scan: Scan,
    readings: Mapping[str, Reading | Exception],
    plan: Plan,
    timeouts: Timeouts = TIMEOUTS,
) -> Iterable[Check]:
    yield Check("driver", Verdict.OK, f"version {scan.driver_version}")
    yield _count(scan, plan)
    # In the order of nvidia-smi, whatever is shared and whatever is left out.
    everything: list[Gpu | Excluded] = [*scan.gpus, *scan.excluded]
    everything.sort(key=lambda card: card.gpu.index if isinstance(card, Excluded) else card.index)
    for card in everything:
        if isinstance(card, Excluded):
            yield _left_out(card)
            continue
        name = f"card {card.index}"
        yield _division(name, card, plan)
        yield _capability(f"{name} capability", card, plan)
        reading = readings.get(card.uuid)
        if reading is None:
            yield late(f"{name} health", timeouts.probe, _HUNG)
            continue
        yield from _health(f"{name} health", reading, plan)
        if isinstance(reading, Reading) and not reading.lost and reading.error is None:
            yield _compute_mode(f"{name} compute mode", card, reading.compute_mode, plan)


def _count(scan: Scan, plan: Plan) -> Check:
    divided = [divide(gpu, plan.division) for gpu in scan.gpus]
    made = [each.replicas for each in divided if isinstance(each, Divided)]
    total = len(scan.gpus) + len(scan.excluded)
    detail = f"{len(made)} of {total} cards make {sum(made)} vGPUs"
    if made:
        return Check("cards", Verdict.OK, detail)
    if total:
        return Check("cards", Verdict.FAIL, detail, "see below why each card is left out")
    advice = "see `nvidia-smi -L` on the node; a node without GPUs needs no agent"
    return Check("cards", Verdict.FAIL, "the driver lists no card", advice)


def _left_out(left: Excluded) -> Check:
    # The detail says what to do too.
    detail = f"{left.gpu.model} {left.gpu.uuid} is left out ({left.reason}): {left.detail}"
    return Check(f"card {left.gpu.index}", Verdict.WARN, detail, "do that, or leave it to others")


def _division(name: str, gpu: Gpu, plan: Plan) -> Check:
    what = f"{gpu.model} {gpu.uuid}, {gpu.memory_bytes // MIB} MiB"
    divided = divide(gpu, plan.division)
    if isinstance(divided, Excluded):
        asked_for = divided.reason == "replicas"
        verdict = Verdict.OK if asked_for else Verdict.WARN
        advice = "make the vGPUs smaller, or leave the card to others"
        return Check(name, verdict, f"{what}; left out: {divided.detail}", advice)
    usable = usable_bytes(gpu.memory_bytes, gpu.reserved_bytes, plan.division.held_back)
    size = divided.vgpu_bytes or usable // divided.replicas
    detail = f"{what}; {divided.replicas} vGPUs of {size // MIB} MiB"
    if size < MIB:
        advice = "lower VGPU_REPLICAS or VGPU_MEMORY_RESERVED"
        return Check(name, Verdict.FAIL, f"{detail}: too little for any container", advice)
    if divided.note is not None:
        advice = "make the vGPUs larger, and so fewer"
        return Check(name, Verdict.WARN, f"{detail}; {divided.note}", advice)
    if size < SMALL_VGPU:
        detail += ": a CUDA context alone takes a good part of that"
        return Check(name, Verdict.WARN, detail, "lower VGPU_REPLICAS, or give pods several vGPUs")
    return Check(name, Verdict.OK, detail)


def _capability(name: str, gpu: Gpu, plan: Plan) -> Check:
    # A card that is too old for MPS is among those that are left out.
    if gpu.compute_capability is None:
        if plan.by_mps:
            advice = "see that the card is a Volta or newer; before, MPS limits nothing"
            return Check(name, Verdict.WARN, "the driver does not tell it", advice)
        return Check(name, Verdict.OK, "the driver does not tell it")
    return Check(name, Verdict.OK, ".".join(map(str, gpu.compute_capability)))


def _health(name: str, reading: Reading | Exception, plan: Plan) -> Iterable[Check]:
    if isinstance(reading, Exception):
        yield unexpected(name, reading)
        return
    found = judge_reading(reading, ecc_baseline=None, shared_by_mps=plan.by_mps)
    # The compute mode has a line of its own.
    findings = [each for each in found if each.fact is not Fact.COMPUTE_MODE]
    for finding in findings:
        verdict = Verdict.WARN if finding.rule.reason is None else Verdict.FAIL
        yield Check(name, verdict, finding.detail, finding.rule.advice)
    if not findings:
        yield Check(name, Verdict.OK, "its probe passes")


def _compute_mode(name: str, gpu: Gpu, mode: ComputeMode | None, plan: Plan) -> Check:
    back = f"set it back: `nvidia-smi -i {gpu.index} -c DEFAULT`"
    if mode is None:
        return Check(name, Verdict.OK, "the driver does not tell it")
    if mode is ComputeMode.PROHIBITED:
        return Check(name, Verdict.FAIL, "PROHIBITED lets no container in", back)
    if mode is not ComputeMode.DEFAULT and not plan.by_mps:
        return Check(name, Verdict.FAIL, f"{mode.name} lets in one process at a time", back)
    if mode is ComputeMode.DEFAULT and plan.by_mps and plan.exclusive:
        return Check(
            name,
            Verdict.WARN,
            "DEFAULT lets in processes that are no clients of MPS, and so without limits",
            "`vgpu-agent mps prepare` in the MPS pod sets it: see that pod's log; or choose"
            " VGPU_MPS_COMPUTE_MODE=keep",
        )
    return Check(name, Verdict.OK, mode.name)
