"""`vgpu-agent status`, and how the commands ask the running agent."""

import fcntl
import io
import json
import os
import pty
import select
import shlex
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from tests.agent_process import REPOSITORY, environment, execute, running
from tests.model.strategies import snapshots, tried
from tests.observe.rules import LLAMA, SNAPSHOT
from tests.screenshot import ShownNode
from tests.web_peer import answering, closed, http
from vgpu_agent import cli, control, settings_reading, unixsocket
from vgpu_agent.address import Address
from vgpu_agent.commands import ask, status
from vgpu_agent.commands.ask import Answer
from vgpu_agent.commands.paste import command_lines
from vgpu_agent.commands.status import show
from vgpu_agent.commands.tables import GOOD, WIDEST, page, ranges, size
from vgpu_agent.errors import ControlError, NoAgentError, SettingsError
from vgpu_agent.model.acceptance import Acceptance, Counts
from vgpu_agent.model.advice import Remedy, for_gpu
from vgpu_agent.model.devices import Effect
from vgpu_agent.model.holders import Holder
from vgpu_agent.model.limits import Limited, LimitsLook, MemoryLimit, MemorySource, Mode
from vgpu_agent.model.place import Place
from vgpu_agent.model.rules import SharingRules
from vgpu_agent.model.snapshot import RegistrationResult, Rules
from vgpu_agent.observe import judge
from vgpu_agent.observe.mps import MpsDaemonReport, MpsReport
from vgpu_agent.observe.report import (
    FORMAT,
    AllocationReport,
    DriverReport,
    ExcludedReport,
    FaultReport,
    GpuReport,
    KubeletReport,
    LimitsReport,
    PodResourcesReport,
    Report,
    from_json,
    to_json,
    visible,
)
from vgpu_agent.observe.reporting import make_report

GIB = 1 << 30
MIB = 1 << 20
UUIDS = ("GPU-2b6f0a3e-1c2d-4e5f-8a9b-0c1d2e3f4a5b", "GPU-9c1d2e3f-4a5b-4e5f-8a9b-2b6f0a3e1c2d")


def gpu(number: int, **changes: Any) -> GpuReport:
    well = GpuReport(
        uuid=UUIDS[number],
        index=number,
        model="NVIDIA A10G",
        memory_bytes=24 * GIB,
        memory_used_bytes=3 * GIB,
        pci_bus_id="00000000:01:00.0",
        numa_node=number,
        healthy=True,
        accepts=number == 0,
        vgpus=Counts(10, 6, 4, 0, 0) if number == 0 else Counts(10, 10, 0, 0, 0),
        vgpu_bytes=2 * GIB,
        faults=(),
        remedy=None,
        notes=(),
        recovery_wait_seconds=60.0,
        unattributed_processes=0,
    )
    return replace(well, **changes)


def allocation(number: int, **changes: Any) -> AllocationReport:
    held = AllocationReport(
        namespace="default",
        pod="resnet-0",
        container="server",
        gpu_uuid=UUIDS[number],
        gpu_index=number,
        numbers=(0, 1, 2, 5),
        memory_share_bytes=9 * GIB,
        memory_limited=True,
        memory_used_bytes=2 * GIB,
        memory_source=MemorySource.PROCESSES,
        memory_peak_bytes=None,
        memory_limit_bytes=None,
        memory_limit_problem=None,
        processes=3,
    )
    return replace(held, **changes)


DAEMON = MpsDaemonReport(True, True, None, None, None, (812,), 0, 2, 0)
MPS = MpsReport(
    True, True, None, None, None, {UUIDS[0]: 2, UUIDS[1]: 1}, 0, dict.fromkeys(UUIDS, DAEMON), 0
)
FAULT = FaultReport(
    "xid", "2026-03-04T05:00:00+00:00", "XID 79: fallen off the bus", Effect.UNTIL_REBOOT.ends
)
RULES = Rules(place=Place("node-7", "gpus", "agent-x"))


def report(**changes: Any) -> Report:
    well = Report(
        format=FORMAT,
        version="0.9",
        node="node-7",
        namespace="gpus",
        pod="agent-x",
        time="2026-03-04T05:06:07.89+00:00",
        resource="k8s.amazonaws.com/vgpu",
        acceptance=Acceptance(True, "This node accepts vGPU pods: 16 of 20 free", ()),
        vgpus=Counts(20, 16, 4, 0, 0),
        largest_free=10,
        driver=DriverReport(True, "550.54", None, None, None),
        kubelet=KubeletReport(True, True, 1, None, None, None),
        mps=MPS,
        memory_limits=LimitsReport(Mode.OFF, None, 0),
        podresources=PodResourcesReport(True, None),
        health_checks=True,
        process_metrics=True,
        names_pods=True,
        problems=(),
        gpus=(gpu(0), gpu(1)),
        excluded=(),
        cordoned={},
        allocations=(allocation(0),),
        gone=(),
        orphaned=(),
        checks=(),
    )
    made = replace(well, **changes)
    return replace(made, checks=tuple(judge.checks(made, RULES)))


def body(**changes: Any) -> str:
    return to_json(report(**changes)).decode()


def shown(what: Report, width: int = WIDEST, *, wide: bool = False) -> str:
    """The page as it is written where there is no terminal, or on one of that width."""
    what = from_json(to_json(what))
    out = io.StringIO()
    if width == WIDEST:
        show(lambda: Answer("", what), out, wide=wide)
    else:
        console = Console(file=out, width=width, markup=False, emoji=False, highlight=False)
        console.print(page(what))
    return out.getvalue()


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.split("  ") if cell.strip()]


def line(text: str, beginning: str) -> list[str]:
    """The cells of the one line that begins so."""
    (found,) = [each for each in text.splitlines() if each.startswith(beginning)]
    return cells(found)


# The page


def test_a_node_where_all_is_well_is_shown_with_gpus_and_holders():
    verdict, head, gpus, holders = shown(report()).split("\n\n")
    assert verdict == "This node accepts vGPU pods: 16 of 20 free"
    assert [cells(each) for each in head.splitlines()] == [
        ["node", "node-7, as of 2026-03-04 05:06:07 UTC"],
        ["agent", "vgpu-agent 0.9, pod gpus/agent-x"],
        ["resource", "k8s.amazonaws.com/vgpu"],
        ["vGPUs", "20: 16 free, 4 held"],
        ["driver", "version 550.54"],
        ["mps", "2 of 2 GPUs are served, with 3 clients"],
        ["GPUs", "2 of 2 GPUs are shared, as 20 vGPUs"],
        ["kubelet", "registered, and it follows the list"],
        ["podresources", "the kubelet says who holds which vGPU"],
    ]
    names, *rows = gpus.splitlines()
    assert names.split() == ["GPU", "MODEL", "HEALTH", "MEMORY", "VGPUS", "FREE", "HELD"]
    memory = "3 GiB of 24 GiB"
    assert [cells(row) for row in rows] == [
        ["0", "A10G", "healthy", memory, "10", "6", "4"],
        ["1", "A10G", "healthy", memory, "10", "10", "0"],
    ]
    row = ["0", "0-2,5", "4/10", "default/resnet-0", "server", "9 GiB", "2 GiB", "3"]
    assert line(holders, "0 ") == row
    # Use has no columns where no processes are looked at.
    assert "PROCESSES" in holders
    assert "PROCESSES" not in shown(report(process_metrics=False))
    outside = shown(report(namespace=None, pod=None))
    assert line(outside, "agent") == ["agent", "vgpu-agent 0.9"]


def test_wide_it_has_all_of_a_gpu():
    long = "NVIDIA RTX PRO 6000 Blackwell Server Edition"
    what = report(gpus=(gpu(0, model=long), gpu(1, numa_node=None)))
    assert line(shown(what), "0    R")[1] == "RTX PRO 6000 Bl…"
    text = shown(what, wide=True)
    (names,) = [each.split() for each in text.splitlines() if each.startswith("GPU ")][:1]
    assert names[-3:] == ["NUMA", "PCI", "UUID"]
    assert line(text, "0    NVIDIA")[1] == long
    assert line(text, "0    NVIDIA")[-3:] == ["0", "00000000:01:00.0", UUIDS[0]]
    assert line(text, "1    NVIDIA")[-3] == "none"


AGAIN = replace(FAULT, reason="ecc", detail="2 errors", ends=Effect.UNTIL_RESET.ends)
ILL = {"healthy": False, "accepts": False, "faults": (FAULT, AGAIN), "remedy": Remedy.REBOOT}


def test_an_unhealthy_gpu_is_shown_with_its_faults_and_one_advice():
    what = report(gpus=(gpu(0), gpu(1, **ILL)))
    assert line(shown(what), "1    A")[2] == "xid, ecc"
    text = shown(what, wide=True)
    lines = text.splitlines()
    at = lines.index(
        "GPU 1: unhealthy: xid since 2026-03-04 05:00:00 UTC: XID 79: fallen off the bus (ends by a"
        " reboot of the node); ecc since 2026-03-04 05:00:00 UTC: 2 errors (ends by a reset)"
    )
    assert lines[at + 1] == "  -> drain the node and reboot it"
    assert "     kubectl uncordon node-7" in lines[at:]
    # One advice for a GPU: what must be rebooted is not to be reset too.
    assert "gpu-reset" not in text
    assert line(shown(report(gpus=(gpu(0, healthy=False),))), "0    A")[2] == "unhealthy"


def test_an_advice_stands_there_once():
    text = shown(report(gpus=(gpu(0, **ILL), gpu(1, **ILL))))
    assert [text.count(f"GPU {n}: unhealthy") for n in (0, 1)] == [1, 1]
    assert text.count("-> drain the node and reboot it") == 1


def pasted(text: str) -> list[str]:
    """The commands as a shell takes them, of lines as they are shown."""
    shown_lines = text.replace(" \\\n", " ").splitlines()
    return [shlex.join(shlex.split(each, comments=True)) for each in shown_lines]


@tried(100)
@given(remedy=st.sampled_from(Remedy), width=st.integers(40, 120), mps=st.booleans())
def test_commands_are_folded_so_that_they_can_be_pasted(remedy, width, mps):
    steps = for_gpu(remedy, UUIDS[0], RULES.place, SharingRules(mps=mps)).steps
    lines = list(command_lines(steps, width, "   "))
    whole = pasted("\n".join(lines))
    assert [each for each in whole if each] == [
        shlex.join(shlex.split(step.command)) for step in steps
    ]
    words = [word for step in steps for word in f"{step.words} {step.command}".split()]
    longest = max(map(len, words), default=0)
    assert all(len(each) <= max(width, longest + 7) for each in lines)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"names_pods": False, "allocations": None},
            "Who holds which vGPUs is not shown: VGPU_STATUS_PAGE=off.",
        ),
        (
            {"vgpus": Counts(20, 8, 8, 4, 6)},
            "20: 8 free, 8 held (6 of them on unhealthy GPUs), 4 unhealthy",
        ),
        ({"gpus": ()}, "No GPU is shared."),
        ({"allocations": ()}, "No vGPU is held."),
        ({"allocations": (), "orphaned": ("GPU-x::3",)}, "No vGPU that the node has is held."),
        ({"allocations": (allocation(0, memory_used_bytes=10 * GIB),)}, "10 GiB, over its share"),
        ({"allocations": (allocation(0, memory_limited=False),)}, "9 GiB, no limit"),
        # What is judged for all views, each kind of check once: test_judge.py has them all.
        (
            {"driver": DriverReport(False, None, "no libnvidia-ml.so.1", None, None)},
            "no libnvidia-ml.so.1",
        ),
        ({"orphaned": ("GPU-x::3",)}, "orphaned:\n  -> delete the pods that hold them"),
        (
            {"excluded": (ExcludedReport("GPU-m", 2, "L4", "replicas", "0"),)},
            "L4 GPU-m is excluded",
        ),
        ({"gpus": (gpu(0, notes=("a row waits",)),)}, "GPU 0 note: a row waits\n  -> see docs"),
    ],
)
def test_what_is_not_as_usual_is_said_in_words(changes, words):
    assert words in shown(report(**changes))
    assert words not in shown(report())


def test_where_nobody_knows_who_holds_what_it_is_unknown_and_not_free():
    unknown = Counts(10, None, None, 0, None)
    text = shown(
        report(
            allocations=None,
            largest_free=None,
            vgpus=Counts(20, None, None, 10, None),
            gpus=(gpu(0, vgpus=unknown), gpu(1, vgpus=replace(unknown, unhealthy=10))),
        )
    )
    assert line(text, "0 ")[-3:] == ["10", "?", "?"]
    assert line(text, "vGPUs") == ["vGPUs", "20: who holds them is unknown, 10 unhealthy"]
    assert "Who holds which vGPUs is unknown." in text
    assert "No vGPU is held" not in text


def colours(what: Report) -> list[str]:
    """All that is green."""
    console = Console(width=200, markup=False, emoji=False, highlight=False)
    return [each.text.strip() for each in console.render(page(what)) if str(each.style) == GOOD]


def test_nothing_is_green_that_cannot_be_scheduled():
    node = ShownNode()
    node.start()
    node.hold((0, Holder("a", "b", "c"), range(10)))
    full = "This node accepts vGPU pods: 10 of 20 free, largest block 10 (GPU 1)"
    assert colours(counted(node)) == [full, "healthy", "10"]
    node.registration_ended("no kubelet", away=True)
    assert colours(counted(node)) == []
    node.registration_tried(RegistrationResult.REGISTERED)
    node.fail(1)
    assert colours(counted(node)) == []
    node.heal(1)
    assert colours(counted(node)) == [full, "healthy", "10"]
    node.assignments_failed("gone", forget=True)
    assert colours(counted(node)) == []


@tried(200)
@given(snapshot=snapshots())
def test_any_node_has_a_row_for_each_gpu_and_fits_a_terminal(snapshot):
    """The words about it are folded, its rows and what comes first are not."""
    what = make_report(snapshot, RULES, 2e9)
    lines = shown(what, 80).splitlines()
    # `kubectl exec` gives no terminal: only the rows of containers may be wider there.
    of_pipe = shown(what).partition("\nGPU  VGPUS")[0].splitlines()
    assert all(cell_len(each) <= 80 for each in lines + of_pipe)
    assert what.acceptance.words.startswith(lines[0].strip())
    if what.gpus:
        first = next(n for n, each in enumerate(lines) if each.startswith("GPU  MODEL"))
        rows = lines[first + 1 : first + 1 + len(what.gpus)]
        assert [int(row.split()[0]) for row in rows] == [each.index for each in what.gpus]
        assert lines[first + 1 + len(what.gpus)].strip() == ""


@pytest.mark.parametrize(("limit", "limited"), [(1, True), (80, False), (None, False)])
def test_a_share_is_limited_only_by_a_limit_that_is_no_more(limit, limited):
    """Where nobody sets limits, a pod may have set one of its own."""
    bytes_ = None if limit is None else limit * GIB
    found = Limited(LLAMA, {"GPU-a": MemoryLimit(bytes_, 0, 0)}, {"GPU-a": 0})
    snapshot = replace(SNAPSHOT, limits=LimitsLook(applied=False, containers=(found,)))
    sliced = Rules(SharingRules(mps=False))
    (held,) = [
        each
        for each in make_report(snapshot, sliced, 2e9).allocations or ()
        if (each.gpu_uuid, each.pod) == ("GPU-a", LLAMA.pod)
    ]
    assert held.memory_limited is limited


def counted(node: ShownNode) -> Report:
    what = make_report(node.snapshot, node.rules, time.time())
    for each in (what.vgpus, *(gpu.vgpus for gpu in what.gpus)):
        if each.free is not None and each.held is not None:
            assert each.total == each.free + each.held + each.unhealthy
    return what


def test_the_counts_of_a_node_add_up_whatever_is_held_and_whatever_is_unhealthy():
    node = ShownNode()
    node.start()
    assert counted(node).vgpus == Counts(20, 20, 0, 0, 0)
    holder = Holder("a", "b", "c")
    # Two containers of a pod may hold the same ones.
    node.hold((0, holder, range(4)), (0, Holder("a", "b", "init"), range(2)), (1, holder, range(4)))
    assert counted(node).vgpus == Counts(20, 12, 8, 0, 0)
    node.fail(1)
    assert counted(node).vgpus == Counts(20, 6, 8, 6, 4)
    words = "20: 6 free, 8 held (4 of them on unhealthy GPUs), 6 unhealthy"
    assert words in shown(counted(node))
    node.assignments_failed("gone", forget=True)
    assert counted(node).vgpus == Counts(20, None, None, 10, None)


def test_names_of_pods_are_no_markup_and_move_no_cursor():
    hostile = "[bold red]x[/]:smile:\x1b]0;title\x07\x1b[2J\r\n\u202eevil\ud800\x9b"
    text = shown(report(allocations=(allocation(0, pod=hostile),)))
    assert "default/[bold red]x[/]:smile:" in text
    assert r"\x1b]0;title\x07\x1b[2J\r\n\u202eevil\ud800\x9b" in text
    assert "\x1b" not in text


# Hypothesis: whatever is reported

names = st.text(st.characters(exclude_categories=[]), max_size=30)


st.register_type_strategy(float, st.floats(allow_nan=False, allow_infinity=False))
reports = st.builds(Report, format=st.just(FORMAT), node=names)
"""By the types of its fields."""


def ink(text: str) -> Counter[str]:
    return Counter("".join(text.split()))


@tried(60)
@given(what=reports, width=st.integers(20, 200))
def test_whatever_is_reported_is_shown_whole_and_plain(what, width):
    wide, narrow = shown(what), shown(what, width)
    assert set(wide) <= {"\n"} | {each for each in wide if each.isprintable()}
    assert ink(wide) <= ink(narrow), "something was cut"
    assert all(cell_len(each) <= width for each in narrow.splitlines())


@tried(60)
@given(pod=names, container=names)
def test_where_there_is_no_terminal_a_holder_is_one_line(pod, container):
    text = shown(report(allocations=(allocation(0, pod=pod, container=container),)))
    (row,) = [each for each in text.splitlines() if "0-2,5" in each]
    assert f"default/{visible(pod)}" in row
    assert visible(container) in row


def test_rows_are_one_below_the_other_where_a_table_would_leave_a_few_letters_to_each_column():
    one_by_one = "POD           default/resnet-0"
    assert [one_by_one in shown(report(), width) for width in (40, 80, 100)] == [True, False, False]


# Words


@pytest.mark.parametrize(
    ("words", "value", "text"),
    [
        (size, None, "unknown"),
        (size, 0, "0 MiB"),
        (size, MIB, "1 MiB"),
        (size, MIB // 2, "0.5 MiB"),
        (size, GIB - 1, "1024 MiB"),
        (size, GIB, "1 GiB"),
        (size, GIB * 10 // 4, "2.5 GiB"),
        (size, -3 * MIB, "-3 MiB"),
        (size, 10**400 * GIB, f"{10**400} GiB"),
        (ranges, [5, 0, 2, 1, 2], "0-2,5"),
        (ranges, [], ""),
    ],
)
def test_sizes_and_ranges_are_as_people_write_them(words, value, text):
    assert words(value) == text


@tried(60)
@given(st.sets(st.integers(0, 60)))
def test_ranges_name_exactly_the_numbers(numbers):
    named: set[int] = set()
    for run in filter(None, ranges(numbers).split(",")):
        first, _, last = run.partition("-")
        named |= set(range(int(first), int(last or first) + 1))
    assert named == numbers


# Asking it


def test_an_agent_says_what_it_says():
    text = body()
    with answering(http(text)) as address:
        answer = ask.by_http(address)
        assert ask.by_http(Address("0.0.0.0", address.port)) == answer
        # It listens at [::], and the machine's loopback has no IPv6.
        assert ask.by_http(Address("::", address.port)) == answer
    assert answer == Answer(text, report())


def other(**changes: object) -> str:
    """A report with other JSON in it; None takes a field away."""
    fields = asdict(report()) | changes
    return json.dumps({name: each for name, each in fields.items() if each is not None})


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (http("<html>", "404 Not Found"), "is not a vgpu-agent: it answers HTTP 404"),
        (http("<html>"), "not JSON"),
        (http("[]"), "not a report of a vgpu-agent"),
        (http('{"status": "ok"}'), "not a report of a vgpu-agent"),
        (http("[" * 200_000), "not JSON"),
        (http(other(format=FORMAT + 1)), f"a report of format {FORMAT + 1}; this version reads"),
        (http(other(format="x" * 1000)), "a report of format 'xxx"),
        (http(other(node=None)), "report has no node"),
        (http(other(gpus=[{}])), "gpus has no uuid"),
        (http(other(names_pods=1)), "names_pods is of another type"),
        (http(other(vgpus=[1])), "vgpus is not an object"),
        (http(other(gpus=[asdict(gpu(0)) | {"recovery_wait_seconds": 10**400}])), "too large"),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n\xff", "not JSON"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}", "is not a vgpu-agent: no HTTP"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "is not a vgpu-agent: no HTTP"),
        (b"", "no agent answers at"),
    ],
)
def test_what_is_no_agent_or_of_another_format_is_one_clear_error(answer, words):
    with answering(answer) as address, pytest.raises(NoAgentError) as caught:
        ask.by_http(address)
    assert words in str(caught.value)
    assert str(address) in str(caught.value)
    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)


def test_a_field_that_is_not_known_yet_is_passed_over():
    with answering(http(other(new={"a": 1}))) as address:
        assert ask.by_http(address).report == report()


def test_nobody_there_is_said_with_the_reason():
    address = closed()
    with pytest.raises(NoAgentError, match=f"no agent answers at {address}: Connection refused"):
        ask.by_http(address)
    with pytest.raises(NoAgentError, match="no agent answers at"):
        ask.by_http(Address("x" * 70 + ".é", 1))
    with answering(None) as silent, pytest.raises(NoAgentError, match="timed out"):
        ask.by_http(silent, timeout=0.05)


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_no_proxy_stands_between(monkeypatch, name):
    monkeypatch.setenv(name, f"http://{closed()}")
    with answering(http(body())) as address:
        assert ask.by_http(address).report.node == "node-7"


@asynccontextmanager
async def controlled(directory: Path, answer: str) -> AsyncIterator[None]:
    """An agent that answers every request at its control socket so."""

    async def handler(request: Mapping[str, object]) -> bytes:
        if request["command"] != "report":
            raise ControlError("no")
        return answer.encode()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(partial(control.serve, directory, handler))
        while unixsocket.refusal(directory / control.SOCKET) is not None:  # noqa: ASYNC110
            await anyio.sleep(0.005)
        yield
        tasks.cancel_scope.cancel()


async def test_it_is_asked_at_its_control_socket(tmp_path):
    with pytest.raises(NoAgentError, match="no agent answers at"):
        ask.by_socket(tmp_path)
    asked = partial(anyio.to_thread.run_sync, ask.by_socket, tmp_path)
    async with controlled(tmp_path, body()):
        assert await asked() == Answer(body(), report())
    async with controlled(tmp_path, "{}"):
        with pytest.raises(NoAgentError, match=r"control\.sock answers: not a report"):
            await asked()


# The command line


async def test_only_the_setting_that_it_needs_must_be_right(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VGPU_REPLICAS", "many")
    monkeypatch.setenv("VGPU_STATE_DIRECTORY", str(tmp_path))
    executed = partial(anyio.to_thread.run_sync, cli.execute)
    async with controlled(tmp_path, body()):
        assert await executed(["status"]) == 0
        assert "node-7" in capsys.readouterr().out
        monkeypatch.setenv("VGPU_STATE_DIRECTORY", "here")
        with pytest.raises(SettingsError, match="1 setting is wrong:\n  VGPU_STATE_DIRECTORY="):
            await executed(["status"])
        with answering(http(body())) as address:
            assert await executed(["status", "--address", str(address)]) == 0
        assert "node-7" in capsys.readouterr().out


def test_settings_are_read_by_name_and_the_rest_is_default():
    environ = {
        "VGPU_METRICS_ADDRESS": "[::1]:7",
        "vgpu_state_directory": "/x",
        "VGPU_REPLICAS": "5",
    }
    read = settings_reading.read(environ, "metrics_address", "state_directory")
    assert (read.metrics_address, read.state_directory) == (Address("::1", 7), Path("/x"))
    assert read.replicas == 10


def test_on_a_terminal_of_few_letters_nothing_fails(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    text = body(allocations=(allocation(0, pod="pöd-模"),))
    with answering(http(text)) as address:
        assert cli.execute(["status", "--address", str(address)]) == 0
    assert rb"default/p\xf6d-\u6a21" in stdout.buffer.getvalue()


def test_silence_is_counted_again_after_every_answer():
    clock = [datetime(2026, 3, 4, 5, minute, tzinfo=UTC) for minute in range(5)]

    def asking() -> Answer:
        if clock[0].minute != 2:
            raise NoAgentError("nobody")
        return Answer("", report())

    def sleep(_: float) -> None:
        clock.pop(0)
        if not clock:
            raise KeyboardInterrupt

    out = io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        status.watch(asking, out, 1, now=lambda: clock[0], sleep=sleep)
    finally:
        signal.signal(signal.SIGTERM, handler)
    silent = [each.rstrip() for each in out.getvalue().splitlines() if "not answering" in each]
    assert silent == [f"not answering since 05:0{since}:00 UTC: nobody" for since in (0, 0, 3, 3)]
    assert out.getvalue().count("node-7") == 3


# Processes


def wait_until(holds: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Watching:
    """A `vgpu-agent status --watch` and what it has written."""

    def __init__(self, read: int, stdout: int, *arguments: str, **variables: str) -> None:
        self._read = read
        self.text = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vgpu_agent", "status", "--watch", "0.1", *arguments],
            env=environment(**{"TERM": "xterm", **variables}),
            cwd=REPOSITORY,
            stdout=stdout,
        )
        os.close(stdout)

    def wait(self, *words: str, since: int = 0, seconds: float = 20.0) -> None:
        """Until all of it was written after so many characters."""
        deadline = time.monotonic() + seconds
        while not all(each in self.text[since:] for each in words):
            left = deadline - time.monotonic()
            assert left > 0, f"no {words!r} in {self.text[since:][-3000:]!r}"
            if not select.select([self._read], [], [], left)[0]:
                continue
            self.text += os.read(self._read, 65536).decode(errors="replace")

    def end(self, number: signal.Signals = signal.SIGINT) -> int:
        self.process.send_signal(number)
        self._drain()
        return self.process.wait(10)

    def _drain(self) -> None:
        while select.select([self._read], [], [], 10)[0]:
            try:
                data = os.read(self._read, 65536)
            except OSError:  # a terminal that nobody holds open any more
                return
            if not data:
                return
            self.text += data.decode(errors="replace")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._read)


@contextmanager
def watching(
    *arguments: str, terminal: tuple[int, int] | None = None, **variables: str
) -> Iterator[Watching]:
    if terminal is None:
        read, write = os.pipe()
    else:
        read, write = pty.openpty()
        fcntl.ioctl(write, termios.TIOCSWINSZ, struct.pack("4H", *terminal, 0, 0))
    watched = Watching(read, write, *arguments, **variables)
    try:
        yield watched
    finally:
        watched.close()


def where(kubelet_dir: Path) -> dict[str, str]:
    """The setting by which the commands find the agent of `running`."""
    return {"VGPU_STATE_DIRECTORY": str(kubelet_dir / "state")}


@pytest.mark.slow
def test_a_running_agent_is_shown(kubelet_dir):
    variables = where(kubelet_dir) | {"VGPU_REPLICAS": "many"}
    with running(kubelet_dir, VGPU_REPLICAS="7", VGPU_SIMULATED_GPUS="3") as it:
        it.wait_line("no kubelet at")
        path = kubelet_dir / "state" / control.SOCKET
        wait_until(lambda: unixsocket.refusal(path) is None)
        done = execute("status", **variables)
        wide = execute("status", "--wide", **variables)
        asked = execute("status", "--address", f"127.0.0.1:{it.port}")
        as_json = execute("status", "--json", **variables)
        over_http = from_json(it.get("/status.json")[1].encode())
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert line(done.stdout, "node")[1].startswith(f"{socket.gethostname()}, as of 20")
    assert "not registered: no kubelet at" in wide.stdout
    for text, model in ((done.stdout, "Simulated 24GB"), (wide.stdout, "NVIDIA Simulated 24GB")):
        rows = [each for each in text.splitlines() if f" {model} " in each]
        assert len(rows) == 3
        assert all(" 7 " in row and "healthy" in row for row in rows)
        assert ("GPU-0" in rows[0]) is (text is wide.stdout)
    assert asked.returncode == 0
    assert as_json.returncode == 0
    assert replace(from_json(as_json.stdout.encode()), time=over_http.time) == over_http
    after = execute("status", **variables)
    assert (after.returncode, after.stdout) == (1, "")
    assert after.stderr.startswith(f"vgpu-agent: no agent answers at {kubelet_dir}/state/")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["--json"], ["--watch", "0.1"]])
def test_a_reader_that_leaves_is_no_error_to_tell(arguments):
    read, write = os.pipe()
    os.close(read)
    with answering(http(body())) as address:
        done = subprocess.run(
            [sys.executable, "-m", "vgpu_agent", "status", "--address", str(address), *arguments],
            env=environment(),
            stdout=write,
            stderr=subprocess.PIPE,
            timeout=30,
            check=False,
        )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.slow
def test_watching_goes_on_over_a_restart_of_the_agent_until_ctrl_c(kubelet_dir):
    with watching(**where(kubelet_dir)) as it:
        it.wait("not answering since", "no agent answers at")
        for model in ("First model", "Second model"):
            with running(kubelet_dir, VGPU_SIMULATED_MODEL=model):
                it.wait(model)
                start = len(it.text)
                it.wait(model, since=start)
                assert "not answering" not in it.text[start:]
            it.wait("not answering since", model, since=len(it.text))
        assert it.end() == 0
    assert "\x1b" not in it.text
    assert "Traceback" not in it.text


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_on_a_terminal_it_is_shown_in_place_and_stays_in_the_end(number):
    text = body(allocations=tuple(allocation(0, pod=f"pod-{each}") for each in range(40)))
    with (
        answering(http(text)) as address,
        watching("--address", str(address), terminal=(24, 120)) as it,
    ):
        for _ in range(3):
            it.wait("\x1b[H", "node-7", since=len(it.text))
        assert it.text.count("\x1b[?1049h") == 1
        assert "pod-39" not in it.text  # below the screen's end
        assert it.end(number) == 0
    _, left, rest = it.text.partition("\x1b[?1049l")
    assert left
    assert "pod-39" in rest


@pytest.mark.slow
def test_the_agent_loads_nothing_that_only_other_commands_need(kubelet_dir):
    with running(kubelet_dir, PYTHONPROFILEIMPORTTIME="1") as it:
        it.wait_line("no kubelet at")
        assert it.end()[0] == 0
    loaded = {each.rpartition("|")[2].strip() for each in it.lines if "import time:" in each}
    assert "vgpu_agent.cli" in loaded
    assert loaded & {"rich", "yaml", "pynvml", "vgpu_agent.commands"} == set()
