"""What sharing costs under load, and what accidents do to neighbours and to new clients."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from tests.on_gpu.machine import MIB, Machine
from tests.on_gpu.mps import Client, Daemon, clients, daemon
from tests.on_gpu.reach import machine, opened, outcome
from tests.on_gpu.report import Out, Skip, first_line
from tests.on_gpu.runner import Context, Section
from vgpu_agent.model.rules import Threads

BODIES = 132 * 1024
"""Four blocks for each of the 132 multiprocessors of an H100 or H200."""

FEW = 8192
"""Bodies of a small request, where there is no PyTorch."""

WAYS: dict[str, dict[str, Any]] = {
    "share": {},
    "none": {"mps_threads": Threads.NONE},
    "time-slicing": {"mps": False},
}
"""VGPU_MPS_THREADS, and sharing without MPS: the rules of each."""


@contextmanager
def serving(context: Context, way: str) -> Iterator[Daemon | None]:
    """The daemon of that way, where it has one. Raises Skip where there is no program."""
    if way == "time-slicing":
        yield None
    else:
        with daemon(context) as served_by:
            yield served_by


def each_way(
    context: Context, rows: Mapping[str, Mapping[str, Callable[[Daemon | None], Sequence[object]]]],
    title: str, head: Sequence[str],
) -> None:  # fmt: skip
    """Measures the rows of each way, with one daemon for all of them."""
    table = context.out.table(title, head, [name for group in rows.values() for name in group])
    for way, group in rows.items():
        with ExitStack() as stack:
            try:
                served_by = stack.enter_context(serving(context, way))
            except Exception as error:  # noqa: BLE001 - the other ways are worth having
                why = f"not run: {error}" if isinstance(error, Skip) else first_line(error)
                for name in group:
                    table.row(name, why)
            else:
                table.measure({name: partial(row, served_by) for name, row in group.items()})


def ready(
    out: Out, made: Sequence[Client], kind: str, kernels: str, bodies: int, warm: float, *,
    check: bool = False,
) -> tuple[list[Client], int, list[str]]:  # fmt: skip
    """Opens and warms up clients: those that are ready, how many are of MPS, what others said."""
    for each in made:
        each.send("open")
    opened_by = {each: each.answer(30) for each in made}
    failures = [outcome(answer) for answer in opened_by.values() if "failed" in answer]
    good = [each for each, answer in opened_by.items() if "failed" not in answer]
    pids = good[0].daemon.clients() if good and good[0].daemon else ()
    proven = sum(each.proof(opened_by[each], pids) == "yes" for each in good)
    for number, each in enumerate(good):
        first = check and number == 0
        each.send("prepare", kind=kind, cubin=kernels, bodies=bodies, warm=warm, check=first)
    answers = [each.answer(60) for each in good]
    out.event("ready", answers=answers)
    if check and answers and "error" in answers[0]:
        worst = answers[0]["error"]
        words = "right" if worst < 1e-3 else "**WRONG**"
        out.say(f"the kernel is {words}: {worst:.1e} from Python's own")
    for each, answer in zip(tuple(good), answers, strict=True):
        each.prepared = answer
        if "failed" in answer:
            failures.append(outcome(answer))
            good.remove(each)
    return good, proven, failures


def go(out: Out, made: Sequence[Client], seconds: float) -> tuple[list[dict[str, Any]], list[str]]:
    """Lets them work at the same time: what those found that could, what others said."""
    at = time.monotonic() + 0.1
    for each in made:
        each.send("work", at=at, seconds=seconds)
    answers = [each.answer(seconds + 40) for each in made]
    out.event("work", answers=answers)
    good = [each for each in answers if "failed" not in each]
    return good, [outcome(each) for each in answers if "failed" in each]


def rates(made: Sequence[Client], answers: Sequence[Mapping[str, Any]]) -> list[float]:
    """GFLOP/s of each."""
    return [
        client.prepared["operations"] * found["count"] / found["seconds"] / 1e9
        for client, found in zip(made, answers, strict=True)
    ]


def _failures(texts: Sequence[str]) -> str:
    return f"{len(texts)}: {'; '.join(sorted(set(texts)))}" if texts else "none"


def _span(values: Sequence[float]) -> str:
    return f"{min(values):.0f} to {max(values):.0f}" if values else "-"


# Throughput and latency


def throughput(context: Context) -> None:
    it, out = Machine(), context.out
    kernels = it.kernels(context.root)
    first = [True]

    def load(variables: dict[str, str], count: int, served_by: Daemon | None) -> Sequence[object]:
        with clients(count, variables, served_by) as made:
            check = first.pop() if first else False
            good, proven, failures = ready(
                out, made, "bodies", kernels, BODIES, context.load / 5, check=check
            )
            found, more = go(out, good, context.load)
            if more or not good:
                return "-", "-", proven, "-", _failures([*failures, *more])
            each, late = rates(good, found), 1000 * max(answer["late"] for answer in found)
            together = f"{sum(each):.0f}"
            return _span(each), together, proven, f"{late:.1f}", _failures(failures)

    rows = {
        way: {
            f"{way}, {count} clients": partial(load, it.container(**rules), count)
            for count in (1, 2, 5, 10)
        }
        for way, rules in WAYS.items()
    }
    head = ("threads, clients", "GFLOP/s of each", "together", "MPS clients", "latest start in ms",
            "failed")  # fmt: skip
    each_way(context, rows, f"{BODIES} bodies, {context.load:g} s, 20 operations a pair", head)


def latency(context: Context) -> None:
    it, out = Machine(), context.out
    kernels = it.kernels(context.root)
    warm = context.load / 5

    def load(variables: dict[str, str], count: int, served_by: Daemon | None) -> Sequence[object]:
        with ExitStack() as stack:
            (asking,) = stack.enter_context(clients(1, variables, served_by))
            busy = stack.enter_context(clients(count, variables, served_by))
            good, proven, failures = ready(out, [asking], "request", kernels, FEW, 3 * warm)
            if not good:
                return "-", "-", "-", "-", "-", proven, _failures(failures)
            more, neighbours, failed = ready(out, busy, "bodies", kernels, BODIES, warm)
            found, late = go(out, [asking, *more], context.load)
            failures += failed + late
            if late or not found or "percentiles" not in found[0]:
                return "-", "-", "-", "-", "-", proven + neighbours, _failures([*failures, *late])
            cuts, per_second = found[0]["percentiles"], found[0]["count"] / found[0]["seconds"]
            return (
                f"{cuts[50]:.2f}", f"{cuts[99]:.2f}", f"{per_second:.0f}",
                asking.prepared["with"], _span(rates(more, found[1:])), proven + neighbours,
                _failures(failures),
            )  # fmt: skip

    rows = {
        way: {
            f"{way}, {count} neighbours": partial(load, it.container(**rules), count)
            for count in (0, 1, 9)
        }
        for way, rules in WAYS.items()
    }
    head = ("threads, busy neighbours", "p50 ms", "p99 ms", "requests/s", "with",
            "GFLOP/s of each neighbour", "MPS clients", "failed")  # fmt: skip
    each_way(context, rows, "A small request", head)


# Memory


def memory(context: Context) -> None:
    it = Machine()
    total = (it.gpu.memory_bytes or 0) // MIB

    def greed(variables: dict[str, str], served_by: Daemon | None) -> Sequence[object]:
        share = int(variables["VGPU_MEMORY_BYTES"]) // MIB
        with clients(3, variables, served_by) as (greedy, *others):
            proofs = {each.proof(opened(each)[1]) for each in (greedy, *others)}
            took = greedy.ask("fill", 60, most=total)
            theirs = [each.ask("fill", 30, most=share // 2) for each in others]
            then = [outcome(each.ask("touch")) for each in (greedy, *others)]
            after = outcome(greedy.ask("release")), outcome(greedy.ask("touch"))
            proven = ", ".join(sorted(proofs))
            return proven, share, _filled(took), ", ".join(map(_filled, theirs)), then, after

    rows = {
        way: {way: partial(greed, it.container(**WAYS[way]))} for way in ("share", "time-slicing")
    }
    head = ("way", "MPS clients", "share in MiB", "the greedy one took", "neighbours took, of half",
            "all three then", "the greedy one after it gave back")  # fmt: skip
    each_way(context, rows, "A client that takes all it can", head)


def _filled(answer: Mapping[str, Any]) -> str:
    if "failed" in answer:
        return outcome(answer)
    return f"{answer['mib']} ({answer['refusal'] or 'not refused'})"


# Accidents


def again(variables: dict[str, str], served_by: Daemon | None, begun: float) -> str:
    """When new clients work again, in words; one after the other for 10 s at most."""
    first = ""
    while True:
        with clients(1, variables, served_by) as (client,):
            works, answer = opened(client, 5)
            after = time.monotonic() - begun
            if works == "works":
                proof = client.proof(answer)
                return f"{first}works after {after:.1f} s; MPS client: {proof}"
        first = first or f"{works} at {after:.1f} s; "
        if after > 10:
            return f"{first}and still {works} after {after:.0f} s"
        time.sleep(0.3)


def accident(
    context: Context, it: Machine, kernels: str, variables: dict[str, str],
    happens: Callable[[Client, Daemon | None], str], served_by: Daemon | None, *, busy: bool = True,
) -> Sequence[object]:  # fmt: skip
    """What an accident to the first of three clients does to the others and to new ones."""
    before = it.used()
    seconds = context.load
    with clients(3, variables, served_by) as made:
        good, proven, failures = ready(context.out, made, "bodies", kernels, BODIES, seconds / 10)
        if len(good) < 3:
            return (_failures(failures),)
        victim, *others = good
        for each in others:
            each.send("work", at=0, seconds=seconds)
        if busy:
            victim.ask("pile", count=100)
        time.sleep(seconds / 5)
        said, begun = happens(victim, served_by), time.monotonic()
        fresh = again(variables, served_by, begun)
        status = served_by.status() if served_by else "-"
        until = begun + seconds + 8
        heard = [outcome(each.answer(max(1.0, until - time.monotonic()))) for each in others]
        still = [outcome(each.ask("touch", 5)) for each in others]
    left = time.monotonic()
    settled = again(variables, served_by, left)
    state = f"{served_by.servers()} {served_by.status()}" if served_by else "-"
    over = it.used() - before
    return said, f"{proven} of 3", heard, still, fresh, status, settled, state, over


ACCIDENT = ("what happened", "MPS clients", "neighbours at work", "neighbours then", "a new client",
            "server's status", "a new client when all have left", "servers then",
            "memory over before, MiB")  # fmt: skip


def _poke(kernels: str, victim: Client, _: Daemon | None) -> str:
    return f"it hears: {outcome(victim.ask('poke', 20, cubin=kernels))}"


def _kill(victim: Client, _: Daemon | None) -> str:
    victim.kill()
    return "killed"


def _kill_servers(_: Client, served_by: Daemon | None) -> str:
    servers = served_by.servers() if served_by else []
    for pid in servers:
        os.kill(pid, signal.SIGKILL)
    return f"killed {servers}"


def _kill_daemon(_: Client, served_by: Daemon | None) -> str:
    served_by.process.kill()
    served_by.process.wait()
    return f"killed; {served_by.ask('get_server_list').text}"


def _kill_and_start(victim: Client, served_by: Daemon | None) -> str:
    said = _kill_daemon(victim, served_by)
    served_by.start()
    return f"{said}; another is started in its place"


def _accidents(
    context: Context, cases: Mapping[str, tuple[str, Callable[..., str], bool]], title: str
) -> None:
    """Each with a daemon of its own: the last one may have been hurt."""
    it = Machine()
    kernels = it.kernels(context.root)
    table = context.out.table(title, ("accident", *ACCIDENT), list(cases))

    def case(way: str, happens: Callable[..., str], busy: bool) -> Sequence[object]:
        with serving(context, way) as served_by:
            variables = it.container(**WAYS[way])
            return accident(context, it, kernels, variables, happens, served_by, busy=busy)

    table.measure({name: partial(case, *how) for name, how in cases.items()})


def illegal(context: Context) -> None:
    kernels = Machine().kernels(context.root)
    poke = partial(_poke, kernels)
    cases = {
        "illegal access, MPS": ("none", poke, False),
        "illegal access, time-slicing": ("time-slicing", poke, False),
    }
    _accidents(context, cases, "An illegal access")


def kills(context: Context) -> None:
    cases = {
        "idle client, MPS": ("none", _kill, False),
        "busy client, time-slicing": ("time-slicing", _kill, True),
        "busy client, MPS": ("none", _kill, True),
        "daemon": ("none", _kill_daemon, False),
        "daemon, and another is started": ("none", _kill_and_start, False),
        "server": ("none", _kill_servers, False),
    }
    _accidents(context, cases, "SIGKILL")


SECTIONS = (
    Section("machine", "The machine", 15, machine),
    Section("throughput", "Throughput", 140, throughput),
    Section("latency", "Latency beside busy neighbours", 165, latency),
    Section("memory", "A client beyond its memory", 40, memory),
    Section("illegal", "A client's fault", 60, illegal),
    Section("kills", "Kills", 105, kills),
)
