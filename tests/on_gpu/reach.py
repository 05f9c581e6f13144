"""What a client of MPS reaches, sees and is refused: all that needs no load."""

import os
import signal
import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from tests.on_gpu.machine import MIB, Machine, describe
from tests.on_gpu.mps import SHM, Answer, Client, Daemon, clients, daemon
from tests.on_gpu.runner import Context, Section
from vgpu_agent.model.rules import Threads

OTHER = 1000
"""The UID of the clients that are not root's."""


def outcome(answer: Mapping[str, Any]) -> str:
    return answer.get("failed") or "works"


def opened(client: Client, timeout: float = 20) -> tuple[str, dict[str, Any]]:
    """Whether it opens CUDA and does the lightest work, and what it said when it opened."""
    answer = client.ask("open", timeout)
    if "failed" in answer:
        return outcome(answer), answer
    return outcome(client.ask("touch", timeout)), answer


def machine(context: Context) -> None:
    describe(context.out, context.program)


def without(context: Context) -> None:
    it = Machine()
    before = it.used()
    with clients(1, it.container(mps=False)) as (client,):
        works, answer = opened(client)
        context.out.say(f"a client without MPS: {works}; MPS client: {client.proof(answer)}")
        context.out.say(f"it sees (MiB): {answer} and, by PyTorch, {client.ask('seen', 40)}")
        context.out.say(f"context: {it.used() - before} MiB of the GPU; {it.processes()}")


# Control

FRESH = (
    "get_server_list",
    "get_default_active_thread_percentage",
    "get_default_device_pinned_mem_limit 0",
    "get_default_device_pinned_mem_limit 63",
    "set_default_device_pinned_mem_limit 0 1G",
    "get_default_device_pinned_mem_limit 0",
    "set_default_device_pinned_mem_limit 0 4812M",
    "get_default_device_pinned_mem_limit 0",
    "set_default_device_pinned_mem_limit UUID 1G",
    "get_default_device_pinned_mem_limit UUID",
    "set_default_device_pinned_mem_limit 0 0G",
    "get_default_device_pinned_mem_limit 0",
    "set_default_active_thread_percentage 50",
    "get_default_active_thread_percentage",
    "set_default_active_thread_percentage 0",
    "set_default_active_thread_percentage 100",
    "get_default_client_priority",
    "get_client_list 1",
    "get_server_status 1",
    "get_device_client_list",
    "ps",
    "start_server -uid 0",
    "get_server_list",
    "no_such_command",
)
SERVED = (
    "get_server_list",
    "get_server_status SERVER",
    "get_client_list SERVER",
    "get_device_client_list",
    "get_device_client_list SERVER",
    "ps",
    "ps -p SERVER",
    "get_active_thread_percentage SERVER",
    "get_device_pinned_mem_limit SERVER 0",
    "set_active_thread_percentage SERVER 40",
    "get_active_thread_percentage SERVER",
)


def control(context: Context) -> None:
    it = Machine()
    names = [
        *(f"{n}. fresh: {command}" for n, command in enumerate(FRESH, start=1)),
        *(f"two clients: {n}. {command}" for n, command in enumerate(SERVED, start=1)),
        "stopped (SIGSTOP): get_server_list",
        "a second daemon in the directory",
        "killed: get_server_list",
    ]
    table = context.out.table("Answers", ("state and command", "answer", "exit", "ms"), names)
    remaining = iter(names)

    def answer(said: Answer) -> None:
        table.row(next(remaining), *said.cells())

    with daemon(context) as served_by:
        for command in FRESH:
            answer(served_by.ask(command.replace("UUID", it.gpu.uuid)))
        _latency(context, served_by, "no client")
        with clients(2, it.container(), served_by) as made:
            for each in made:
                opened(each)
            server = str((served_by.servers() or [0])[0])
            for command in SERVED:
                answer(served_by.ask(command.replace("SERVER", server)))
            _latency(context, served_by, "two clients")
        process = served_by.process
        os.kill(process.pid, signal.SIGSTOP)
        answer(served_by.ask("get_server_list", timeout=context.load))
        os.kill(process.pid, signal.SIGCONT)
        answer(served_by.twin())
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        answer(served_by.ask("get_server_list"))


def _latency(context: Context, served_by: Daemon, state: str) -> None:
    times = [served_by.ask("get_server_list").ms for _ in range(30)]
    middle, worst = statistics.median(times), max(times)
    context.out.say(f"get_server_list, {state}: median {middle:.1f} ms, worst {worst:.1f} of 30")


# Mounts and namespaces

NAMESPACES = (("mount",), ("mount", "ipc"), ("mount", "ipc", "pid"))


def mounts(context: Context) -> None:
    variables = Machine().container()
    cases = {
        f"UID {uid}, {'+'.join(spaces)}, /dev/shm {shm}, pipe {'ro' if read_only else 'rw'}": {
            "uid": uid, "namespaces": spaces, "shm": shm, "read_only": read_only,
        }
        for uid in (0, OTHER)
        for spaces in NAMESPACES
        for shm in SHM
        for read_only in (False, True)
    }  # fmt: skip
    head = ("client's user, namespaces of its own, mounts", "client", "MPS client", "opens in s")
    table = context.out.table("Reach", head, list(cases))
    with daemon(context) as served_by:
        known: set[int] = set()

        def case(how: Mapping[str, Any]) -> tuple[object, ...]:
            # The first one of a user waits for the server.
            timeout = 5 if how["uid"] in known else 15
            known.add(how["uid"])
            with clients(1, variables, served_by, **how) as (client,):
                works, answer = opened(client, timeout)
                return works, client.proof(answer), answer.get("seconds", "-")

        table.measure({name: partial(case, how) for name, how in cases.items()})


# The daemon's rights

RUNTIME = (
    "chown,dac_override,fowner,fsetid,kill,setgid,setuid,setpcap,net_bind_service,net_raw,"
    "sys_chroot,mknod,audit_write,setfcap"
)
"""The capabilities that container runtimes give by default."""

LIMITED = ("setpriv", "--no-new-privs", "--inh-caps=-all")


def rights(context: Context) -> None:
    it = Machine()
    chart = (*LIMITED, f"--bounding-set=-all,{added(RUNTIME)}")
    cases: dict[str, dict[str, Any]] = {
        "all": {},
        "the chart's: the runtime's own, no new privileges": {"before": chart},
        "the chart's, with a read-only root": {
            "before": chart,
            "script": "mount --bind {root} {root}; mount -o remount,bind,ro /",
        },
        "SETUID and SETGID": {
            "before": (*LIMITED, f"--bounding-set=-all,{added('setuid,setgid')}")
        },
        "none": {"before": (*LIMITED, "--bounding-set=-all")},
        "all, directories that others may write": {"script": "chmod 0777 {pipe} {log}"},
        "all, CUDA_VISIBLE_DEVICES=UUID": {"CUDA_VISIBLE_DEVICES": it.gpu.uuid},
    }
    head = ("capabilities of the daemon", "client of UID 0", f"client of UID {OTHER}", "server")
    table = context.out.table("Rights", head, list(cases))

    def case(how: dict[str, Any]) -> tuple[object, ...]:
        found = []
        with daemon(context, **how) as served_by:
            for uid in (0, OTHER):
                with clients(1, it.container(), served_by, uid=uid) as (client,):
                    works, answer = opened(client, 12)
                    found.append(f"{works}; MPS client: {client.proof(answer)}")
            return *found, served_by.status()

    table.measure({name: partial(case, how) for name, how in cases.items()})


def added(capabilities: str) -> str:
    return ",".join(f"+{each}" for each in capabilities.split(","))


# Limits

MEMORY, THREADS = "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"


def limits(context: Context) -> None:
    it = Machine()
    free = it.container(mps_threads=Threads.NONE)
    share, limit = it.container(), int(free["VGPU_MEMORY_BYTES"]) // MIB
    bare = {name: value for name, value in free.items() if name != MEMORY}
    default = f"set_default_device_pinned_mem_limit 0 {limit}M"
    cases: dict[str, tuple[dict[str, str], str | None]] = {
        "none, without MPS": (it.container(mps=False), None),
        "none": (bare, ""),
        f"client's memory, {limit} MiB": (free, ""),
        f"client's threads, {share[THREADS]} %": (bare | {THREADS: share[THREADS]}, ""),
        "client's, both, as granted": (share, ""),
        f"daemon's memory, {limit} MiB": (bare, default),
        "daemon's memory, client's twice that": (bare | {MEMORY: f"0={2 * limit}M"}, default),
        "daemon's memory, client's half of it": (bare | {MEMORY: f"0={limit // 2}M"}, default),
        "daemon's threads, 10 %": (bare, "set_default_active_thread_percentage 10"),
    }
    head = ("limit", "MPS client", "SMs", "cuMemGetInfo free, total", "cuDeviceTotalMem",
            "PyTorch free, total, device", "taken", "less than the limit")  # fmt: skip
    table = context.out.table(f"Seen and taken, in MiB (a share is {limit})", head, list(cases))

    def case(variables: dict[str, str], command: str | None) -> tuple[object, ...]:
        with ExitStack() as stack:
            served_by = None
            if command is not None:
                served_by = stack.enter_context(daemon(context))
            if served_by and command:
                served_by.ask(command)
            (client,) = stack.enter_context(clients(1, variables, served_by))
            answer = client.ask("open", 20)
            if "failed" in answer:
                return (outcome(answer),)
            proof, seen = client.proof(answer), client.ask("seen", 40)
            torch = seen.get("torch") or outcome(seen)
            shown = ", ".join(map(str, torch.values())) if isinstance(torch, dict) else torch
            memory = f"{answer['free']}, {answer['total']}"
            filled = client.ask("fill", 30, most=3 * limit)
            return (
                proof, answer["sms"], memory, answer["cuDeviceTotalMem"], shown,
                taken(filled), limit - filled["mib"] if filled.get("refusal") else "-",
            )  # fmt: skip

    table.measure({name: partial(case, *how) for name, how in cases.items()})


def taken(filled: Mapping[str, Any]) -> str:
    if "failed" in filled:
        return outcome(filled)
    return f"{filled['mib']}: {filled['refusal'] or 'not refused'}"


def malformed(context: Context) -> None:
    """Each beside a default of the daemon: who is refused where, and who escapes both limits."""
    it = Machine()
    bare = it.container(mps_threads=Threads.NONE)
    del bare[MEMORY]
    uuid = it.gpu.uuid
    memory = ("0=1G", "0=1G,1=1G", "1=1G,0=1G", "1=1G", f"{uuid}=1G", f"{uuid[:12]}=1G", "abc", "",
              "0=", "0=0G", "0=1X", "0=-1G", "=1G", "0=1G,", "0 = 1G", "0=1g", "0=1024", "0=1.5G",
              "0=100M", "0=99999G")  # fmt: skip
    threads = ("10", "0", "101", "abc", "0.5", "-5", "")
    cases = {"(neither)": bare}
    cases |= {f"{MEMORY}={text}": bare | {MEMORY: text} for text in memory}
    cases |= {f"{THREADS}={text}": bare | {THREADS: text} for text in threads}
    head = ("client's environment", "taken, of 4096 MiB", "MPS client", "SMs")
    table = context.out.table("Beside a default of the daemon of 3 GiB", head, list(cases))
    with daemon(context) as served_by:
        served_by.ask("set_default_device_pinned_mem_limit 0 3G")

        def case(variables: dict[str, str]) -> tuple[object, ...]:
            with clients(1, variables, served_by) as (client,):
                answer = client.ask("open", 15)
                if "failed" in answer:
                    return (outcome(answer),)
                filled = client.ask("fill", 15, most=4096)
                return taken(filled), client.proof(answer), answer["sms"]

        table.measure({name: partial(case, variables) for name, variables in cases.items()})


# Many, and others

COUNTS = (1, 10, 48, 49, 60, 61)


def crowd(context: Context) -> None:
    it = Machine()
    before = it.used()
    names = ["a daemon, no server", "an idle server", *(f"clients: {count}" for count in COUNTS),
             "all have left"]  # fmt: skip
    head = ("state", "MiB used more than before", "clients that are listed", "refused")
    table = context.out.table(f"The server's memory ({before} MiB used before)", head, names)
    used: dict[int, int] = {}
    with daemon(context) as served_by:
        table.row(names[0], it.used() - before)
        served_by.ask("start_server -uid 0")
        time.sleep(context.load / 2)
        table.row(names[1], it.used() - before, served_by.status())
        with ExitStack() as stack:
            made: list[Client] = []
            refused: list[str] = []
            for count in COUNTS:
                if refused:
                    table.row(f"clients: {count}", "not tried: others were refused")
                    continue
                more = stack.enter_context(clients(count - len(made), it.container(), served_by))
                made += more
                for each in more:
                    each.send("open")
                answers = [each.answer(30) for each in more]
                refused = [each["failed"] for each in answers if "failed" in each]
                used[count] = it.used() - before
                words = "; ".join(sorted(set(refused)))
                listed = len(served_by.clients())
                table.row(f"clients: {count}", used[count], listed, f"{len(refused)}: {words}")
        time.sleep(context.load / 5)
        table.row(names[-1], it.used() - before, len(served_by.clients()))
    if 10 in used:
        context.out.say(f"a client's context: {(used[10] - used[1]) / 9:.0f} MiB, of 9 more")


def processes(context: Context) -> None:
    it = Machine()
    with daemon(context) as served_by, ExitStack() as stack:
        for spaces in (("mount",), ("mount", "pid")):
            how = {"namespaces": spaces}
            (client,) = stack.enter_context(clients(1, it.container(), served_by, **how))
            works, answer = opened(client)
            proof = client.proof(answer)
            context.out.say(f"client {client.pid}, {'+'.join(spaces)}: {works}; {proof}")
        context.out.say(f"daemon {served_by.process.pid}, servers {served_by.servers()}")
        context.out.say(f"NVML's lists (PID, MiB): {it.processes()}")
        for command in ("ps", "get_device_client_list"):
            context.out.say(f"{command}: `{served_by.ask(command).text}`")


def users(context: Context) -> None:
    it = Machine()
    patience = max(1.0, context.load)
    pairs = {"server of one user": (), "-multiuser-server": ("-multiuser-server",)}
    names = [
        f"{pair}: UID {second} beside UID {first}"
        for pair in pairs
        for first, second in ((0, OTHER), (OTHER, 0))
    ]
    head = ("daemon and clients", f"within {patience:g} s", "after the first has left", "servers")
    table = context.out.table("Two users", head, names)

    def case(options: tuple[str, ...], first: int, second: int) -> tuple[object, ...]:
        with daemon(context, *options) as served_by, ExitStack() as stack:
            (one,) = stack.enter_context(clients(1, it.container(), served_by, uid=first))
            works, answer = opened(one)
            if works != "works":
                return (f"the first already: {works}",)
            (two,) = stack.enter_context(clients(1, it.container(), served_by, uid=second))
            two.ask("hello")
            answer = two.ask("open", patience)
            early = f"{outcome(answer)}; MPS client: {two.proof(answer)}"
            early += f"; {served_by.servers()} {served_by.status()}"
            late = "-"
            if "no answer" in early:
                left = time.monotonic()
                one.close(left + 5)
                answer = two.answer(20)
                late = f"{outcome(answer)} after {time.monotonic() - left:.1f} s"
                late += f"; MPS client: {two.proof(answer)}"
            return early, late, served_by.servers()

    combinations = [
        (options, *uids) for options in pairs.values() for uids in ((0, OTHER), (OTHER, 0))
    ]
    table.measure(
        {name: partial(case, *how) for name, how in zip(names, combinations, strict=True)}
    )


SECTIONS = (
    Section("machine", "The machine", 15, machine),
    Section("without", "Without MPS", 45, without),
    Section("control", "The control program", 40, control),
    Section("mounts", "Which mounts and namespaces reach the daemon", 90, mounts),
    Section("rights", "Which rights the daemon needs", 70, rights),
    Section("limits", "Limits: what is seen, what can be taken", 90, limits),
    Section("malformed", "Malformed limits", 40, malformed),
    Section("crowd", "Many clients", 60, crowd),
    Section("processes", "Lists of processes", 20, processes),
    Section("users", "Two users", 55, users),
)
