"""Memory limits that the driver enforces: on cgroups of our own, with MPS and without.

    driver_limits.py UUID CGROUP HARD

sets a limit as the user that it runs as, and reads it.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import pynvml

from tests.on_gpu.machine import MIB, Machine, describe
from tests.on_gpu.mps import Client, Daemon, clients, daemon
from tests.on_gpu.reach import LIMITED, MEMORY, OTHER, RUNTIME, added, outcome, taken
from tests.on_gpu.report import Skip
from tests.on_gpu.runner import Context, Section
from vgpu_agent.gpu.nvml.limits import limit_memory, memory_limit
from vgpu_agent.model.limits import MemoryLimit
from vgpu_agent.model.rules import Threads

ROOT = Path("/sys/fs/cgroup")
"""Where the driver opens cgroups."""

PREFIX = "vgpu-on-gpu-"
DMEM = "dmem"


# Cgroups


@contextmanager
def cgroup(*names: str, enable: bool = True) -> Iterator[Path]:
    """A cgroup with others in it, which are removed with their block. Raises Skip.

    `enable`: with the controller that the kernel has for the memory of devices, where it has it.
    """
    if not (ROOT / "cgroup.controllers").exists():
        raise Skip(f"there are no cgroups v2 at {ROOT}")
    made = ROOT / f"{PREFIX}{os.getpid()}-{time.monotonic_ns()}"
    before = has(ROOT / "cgroup.subtree_control", DMEM)
    try:
        made.mkdir()
    except OSError as error:
        raise Skip(f"no cgroup can be made in {ROOT}: {error.strerror}") from error
    try:
        if enable and has(ROOT / "cgroup.controllers", DMEM):
            for each in (ROOT, made):
                with suppress(OSError):  # a container's own root cannot
                    (each / "cgroup.subtree_control").write_text(f"+{DMEM}")
        for name in names:
            (made / name).mkdir()
        yield made
    finally:
        for each in [*(made / name for name in names), made]:
            _remove(each)
        if not before and has(ROOT / "cgroup.subtree_control", DMEM):
            with suppress(OSError):
                (ROOT / "cgroup.subtree_control").write_text(f"-{DMEM}")


def has(file: Path, word: str) -> bool:
    with suppress(OSError):
        return word in file.read_text().split()
    return False


def _remove(path: Path) -> None:
    """Its processes have ended, or do so now."""
    for _ in range(40):
        with suppress(OSError):
            path.rmdir()
        if not path.exists():
            return
        time.sleep(0.05)


def text(path: Path) -> str:
    try:
        return path.read_text().strip() or "(empty)"
    except OSError as error:
        return str(error.strerror)


# Limits


class Limits:
    """Those of the machine's first GPU, by the agent's own calls. Raises Skip where it has none."""

    def __init__(self) -> None:
        self.machine = Machine()
        self.uuid = self.machine.gpu.uuid
        with cgroup("leaf") as made:
            asked = (made / "leaf", made, ROOT)
            found = [memory_limit(self.machine.handle, str(path)) for path in asked]
        if all(isinstance(each, str) for each in found):
            raise Skip(found[0])

    def set(self, path: Path, hard: int | None, soft: int = 0) -> str:
        """In MiB."""
        bytes_ = None if hard is None else hard * MIB
        return limit_memory(self.machine.handle, str(path), bytes_, soft * MIB) or "set"

    def get(self, path: Path) -> str:
        """In MiB."""
        return words(memory_limit(self.machine.handle, str(path)))

    def used(self, path: Path) -> object:
        """MiB, as the driver says."""
        found = memory_limit(self.machine.handle, str(path))
        return found if isinstance(found, str) else found.used_bytes // MIB

    def container(self, **rules: object) -> tuple[dict[str, str], int]:
        """The environment of a container with one vGPU, and its share in MiB."""
        variables = self.machine.container(mps_threads=Threads.NONE, **rules)
        return variables, int(variables["VGPU_MEMORY_BYTES"]) // MIB


def words(found: MemoryLimit | str) -> str:
    if isinstance(found, str):
        return found
    hard = "none" if found.hard_bytes is None else f"{found.hard_bytes // MIB}"
    return f"hard {hard}, soft {found.soft_bytes // MIB}, used {found.used_bytes // MIB}"


def machine(context: Context) -> None:
    describe(context.out, context.program)
    context.out.say(f"{ROOT}: {text(ROOT / 'cgroup.controllers')}; own: {text(_OWN)}")
    context.out.say(f"dmem.capacity: {text(ROOT / 'dmem.capacity')}")


_OWN = Path("/proc/self/cgroup")


def call(context: Context) -> None:
    it = Limits()
    with cgroup("leaf") as made, cgroup("leaf", enable=False) as bare:
        leaf = made / "leaf"
        steps = {
            "read: the root": partial(it.get, ROOT),
            "read: a new cgroup": partial(it.get, leaf),
            "set 4096 MiB": partial(it.set, leaf, 4096),
            "read": partial(it.get, leaf),
            "read: the cgroup above": partial(it.get, made),
            "set 100 MiB": partial(it.set, leaf, 100),
            "set soft 1024 of 4096 MiB": partial(it.set, leaf, 4096, 1024),
            "dmem.min of the cgroup above": partial(text, made / "dmem.min"),
            "set soft 0": partial(it.set, leaf, 4096),
            "dmem.min above, again": partial(text, made / "dmem.min"),
            "set no limit": partial(it.set, leaf, None),
            "read, again": partial(it.get, leaf),
            "set: a path that is not there": partial(it.set, made / "none", 4096),
            "set: a file": partial(it.set, leaf / "cgroup.procs", 4096),
            "set: a directory that is no cgroup": partial(it.set, context.root, 4096),
            "set: a cgroup without dmem files": partial(it.set, bare / "leaf", 4096),
        }
        table = context.out.table("Answers, in MiB", ("question", "answer"), list(steps))
        table.measure({name: partial(_cell, step) for name, step in steps.items()})


def _cell(step: partial[str]) -> tuple[str]:
    return (step(),)


# Two containers

MPS_TOO = "MPS, with its own limit"


def containers(context: Context) -> None:
    it = Limits()
    variables, limit = it.container()
    bare = {name: value for name, value in variables.items() if name != MEMORY}
    alone = it.container(mps=False)[0]
    cases: dict[str, tuple[Mapping[str, str], bool, str]] = {
        "no limit, time-slicing": (alone, False, ""),
        "time-slicing": (alone, False, "leaf"),
        "time-slicing, on the cgroup above only": (alone, False, "above"),
        "MPS": (bare, True, "leaf"),
        MPS_TOO: (variables, True, "leaf"),
    }
    head = ("way", "set", "MPS client", "cuMemGetInfo free, total", "cuDeviceTotalMem",
            "PyTorch free, total, device", "taken", "less than the limit", "used by the driver",
            "its neighbour then")  # fmt: skip
    title = f"Two cgroups of {limit} MiB each; the first takes three times that"
    table = context.out.table(title, head, list(cases))

    def case(variables: Mapping[str, str], by_mps: bool, where: str) -> tuple[object, ...]:
        with ExitStack() as stack:
            made = stack.enter_context(cgroup("one", "two"))
            served_by = stack.enter_context(daemon(context)) if by_mps else None
            one, two = made / "one", made / "two"
            limited = {"": (), "leaf": (one, two), "above": (made,)}[where]
            answers = {it.set(each, limit) for each in limited} or {"-"}
            first, second = (_client(stack, variables, served_by, each) for each in (one, two))
            answer = first.ask("open", 30)
            beside = second.ask("open", 30)
            if "failed" in answer or "failed" in beside:
                return ", ".join(answers), outcome(answer), outcome(beside)
            seen = first.ask("seen", 40).get("torch")
            shown = ", ".join(map(str, seen.values())) if isinstance(seen, dict) else seen
            filled = first.ask("fill", 40, most=3 * limit)
            neighbour = second.ask("fill", 40, most=limit // 2)
            return (
                ", ".join(answers), first.proof(answer), f"{answer['free']}, {answer['total']}",
                answer["cuDeviceTotalMem"], shown, taken(filled),
                limit - filled["mib"] if filled.get("refusal") else "-", it.used(one),
                f"{taken(neighbour)}; {outcome(second.ask('touch'))}",
            )  # fmt: skip

    table.measure({name: partial(case, *how) for name, how in cases.items()})


def _client(
    stack: ExitStack, variables: Mapping[str, str], served_by: Daemon | None, path: Path
) -> Client:
    (made,) = stack.enter_context(clients(1, variables, served_by, cgroup=path))
    return made


# A limit that comes late, and goes


def later(context: Context) -> None:
    it = Limits()
    variables, limit = it.container(mps=False)
    rows = ["opened, no limit", "has twice the limit", "the limit is set", "takes more",
            "has released all, takes", "another client, takes",
            "the limit is lifted, takes"]  # fmt: skip
    head = ("step", "answer", "cuMemGetInfo free, total", "used by the driver")
    table = context.out.table(f"A limit of {limit} MiB, time-slicing", head, rows)
    remaining = iter(rows)
    with ExitStack() as stack:
        made = stack.enter_context(cgroup("leaf"))
        leaf = made / "leaf"
        client = _client(stack, variables, None, leaf)

        def row(answer: object, of: Client) -> None:
            seen = of.ask("memory")
            shown = outcome(seen) if "failed" in seen else f"{seen['free']}, {seen['total']}"
            table.row(next(remaining), answer, shown, it.used(leaf))

        row(outcome(client.ask("open", 30)), client)
        row(taken(client.ask("fill", 40, most=2 * limit)), client)
        row(it.set(leaf, limit), client)
        row(taken(client.ask("fill", 40, most=64)), client)
        client.ask("release", 30)
        row(taken(client.ask("fill", 40, most=2 * limit)), client)
        client.ask("release", 30)
        other = _client(stack, variables, None, leaf)
        other.ask("open", 30)
        row(taken(other.ask("fill", 40, most=2 * limit)), other)
        other.ask("release", 30)
        it.set(leaf, None)
        row(taken(other.ask("fill", 40, most=2 * limit)), other)


# Who may


def who(context: Context) -> None:
    it = Limits()
    runtime = f"--bounding-set=-all,{added(RUNTIME)}"
    cases: dict[str, tuple[str, ...]] = {
        "UID 0, all capabilities": (),
        "UID 0, SYS_ADMIN alone": (*LIMITED, f"--bounding-set=-all,{added('sys_admin')}"),
        "UID 0, a container's capabilities": (*LIMITED, runtime),
        "UID 0, none": (*LIMITED, "--bounding-set=-all"),
        f"UID {OTHER}": (f"--reuid={OTHER}", f"--regid={OTHER}", "--clear-groups"),
    }
    head = ("who", "sets 4096 MiB", "reads, in MiB")
    table = context.out.table("Who may set a limit, and read it", head, list(cases))
    with cgroup("leaf") as made:

        def case(rights: tuple[str, ...]) -> tuple[str, ...]:
            it.set(made / "leaf", None)
            before = ("setpriv", *rights) if rights else ()
            program = (sys.executable, "-m", "tests.on_gpu.driver_limits")
            done = subprocess.run(
                [*before, *program, it.uuid, str(made / "leaf"), "4096"],
                capture_output=True,
                text=True,
                timeout=20,
                check=False,
            )
            lines = done.stdout.splitlines()
            return tuple(lines) if done.returncode == 0 else ((done.stderr or "?")[-200:],)

        table.measure({name: partial(case, rights) for name, rights in cases.items()})


def main() -> None:
    uuid, path, hard = sys.argv[1:]
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError as error:
        print(f"NVML says {error}")
        return
    print(limit_memory(handle, path, int(hard) * MIB, 0) or "set")
    print(words(memory_limit(handle, path)))


SECTIONS = (
    Section("machine", "The machine", 15, machine),
    Section("call", "What the driver answers", 30, call),
    Section("containers", "Two cgroups with limits", 200, containers),
    Section("later", "A limit that comes late", 120, later),
    Section("who", "Who may set limits", 60, who),
)

if __name__ == "__main__":
    main()
