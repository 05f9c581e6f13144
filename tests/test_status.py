"""`vgpu-agent status`, and how the commands find and ask the running agent."""

import fcntl
import io
import json
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.agent_process import REPOSITORY, environment, execute, running
from tests.model.strategies import tried
from tests.web_peer import answering, closed, http
from vgpu_agent import cli, status
from vgpu_agent import running as agent
from vgpu_agent import settings as configuration
from vgpu_agent.errors import NoAgentError, ReleaseError, SettingsError
from vgpu_agent.release import release
from vgpu_agent.settings import Address, EmbeddedSettings
from vgpu_agent.status import WIDE, show
from vgpu_agent.status.page import moment, page, ranges, size
from vgpu_agent.status.report import parse, visible

GIB = 1 << 30
MIB = 1 << 20
UUIDS = ("GPU-2b6f0a3e-1c2d-4e5f-8a9b-0c1d2e3f4a5b", "GPU-9c1d2e3f-4a5b-4e5f-8a9b-2b6f0a3e1c2d")


def card(number: int, **changes: Any) -> dict[str, Any]:
    told = {
        "uuid": UUIDS[number],
        "index": number,
        "model": "NVIDIA A10G",
        "memory_bytes": 24 * GIB,
        "memory_used_bytes": 3 * GIB,
        "unattributed_processes": 0,
        "pci_bus_id": "00000000:01:00.0",
        "numa_node": number,
        "vgpus": 10,
        "healthy": True,
        "faults": [],
        "notes": [],
        "recovery_wait_seconds": 60.0,
    }
    return told | changes


def allocation(number: int, **changes: Any) -> dict[str, Any]:
    told = {
        "namespace": "default",
        "pod": "resnet-0",
        "container": "server",
        "gpu_uuid": UUIDS[number],
        "gpu_index": number,
        "numbers": [0, 1, 2, 5],
        "memory_share_bytes": 9 * GIB,
        "memory_limited": True,
        "memory_used_bytes": 2 * GIB,
        "processes": 3,
    }
    return told | changes


def report(**changes: Any) -> dict[str, Any]:
    told = {
        "version": "0.9",
        "host": "node-7",
        "time": "2026-03-04T05:06:07.89+00:00",
        "resource": "k8s.amazonaws.com/vgpu",
        "health_checks": True,
        "driver": {"up": True, "version": "550.54", "error": None, "released_until": None},
        "kubelet": {"connected": True, "registered": True, "streams": 1, "error": None},
        "mps": {
            "up": True,
            "limits_in_force": True,
            "problem": None,
            "replacement": None,
            "clients": {UUIDS[0]: 2, UUIDS[1]: 1},
            "waiting_clients": 0,
        },
        "podresources": {"up": True, "error": None},
        "process_metrics": True,
        "names_pods": True,
        "cards": [card(0), card(1)],
        "excluded": [],
        "allocations": [allocation(0)],
        "orphaned": [],
        "largest_free_share": 10,
    }
    return told | changes


def shown(told: object, width: int = WIDE) -> str:
    """The page as it is written where there is no terminal, or on one of that width."""
    assert isinstance(told, dict)
    out = io.StringIO()
    if width == WIDE:
        show(agent.Told(json.dumps(told), told), out)
    else:
        console = Console(file=out, width=width, markup=False, emoji=False, highlight=False)
        console.print(page(parse(told)))
    return out.getvalue()


def line(text: str, beginning: str) -> list[str]:
    """The cells of the one line that begins so."""
    (found,) = [each for each in text.splitlines() if each.startswith(beginning)]
    return [cell.strip() for cell in found.split("  ") if cell.strip()]


def without(told: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in told.items() if key != name}


# The page


def test_a_node_where_all_is_well_is_shown_with_cards_and_holders():
    text = shown(report())
    head, cards, holders = text.split("\n\n")
    assert line(head, "Node") == ["Node", "node-7"]
    assert line(head, "Resource") == ["Resource", "k8s.amazonaws.com/vgpu"]
    assert line(head, "Agent") == ["Agent", "0.9, report of 2026-03-04 05:06:07 UTC"]
    assert line(head, "Driver") == ["Driver", "550.54"]
    assert line(head, "Kubelet") == ["Kubelet", "registered"]
    assert line(head, "MPS") == ["MPS", "limits are in force, 3 clients"]
    assert line(head, "Pods") == ["Pods", "told by the kubelet"]
    assert line(head, "Free") == ["Free", "10 vGPUs on one card at most"]
    names, *rows = cards.splitlines()
    assert names.split() == ["GPU", "MODEL", "UUID", "HEALTH", "MEMORY", "VGPUS", "HELD", "NUMA"]
    memory = "3 GiB of 24 GiB"
    assert [[cell.strip() for cell in row.split("  ") if cell.strip()] for row in rows] == [
        ["0", "NVIDIA A10G", UUIDS[0], "healthy", memory, "4 of 10", "0"],
        ["1", "NVIDIA A10G", UUIDS[1], "healthy", memory, "0 of 10", "1"],
    ]
    cells = ["0", "0-2,5", "4/10", "default/resnet-0", "server", "9 GiB", "2 GiB", "3"]
    assert line(holders, "0 ") == cells


def test_an_unhealthy_card_is_told_with_its_faults_and_what_to_do():
    fault = {
        "reason": "xid",
        "since": "2026-03-04T05:00:00+00:00",
        "detail": "XID 79: fallen off the bus",
        "until_reset": True,
        "advice": "reset the card",
    }
    again = fault | {"reason": "ecc", "until_reset": False, "advice": ""}
    text = shown(report(cards=[card(0), card(1, healthy=False, faults=[fault, again])]))
    assert line(text, "1 ")[3] == "xid, ecc"
    told = "GPU 1: xid since 2026-03-04 05:00:00 UTC: XID 79: fallen off the bus (until a reset)"
    lines = text.splitlines()
    assert lines[lines.index(told) + 1] == "  -> reset the card"
    assert lines[lines.index(told) + 2].startswith("GPU 1: ecc since")
    assert not lines[lines.index(told) + 2].endswith("reset)")
    assert line(shown(report(cards=[card(0, healthy=False)])), "0    NVIDIA")[3] == "unhealthy"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"driver": {"up": False, "version": None, "error": "no libnvidia-ml.so.1"}},
            "no GPU can be used: no libnvidia-ml.so.1",
        ),
        (
            {"driver": {"up": False, "released_until": "2026-03-04T05:07:00+00:00"}},
            "let go of for a reset until 2026-03-04 05:07:00 UTC",
        ),
        (
            {"kubelet": {"connected": False, "registered": False, "error": "no such socket"}},
            "not registered: no such socket",
        ),
        (
            {"kubelet": {"connected": False, "registered": True, "error": None}},
            "it does not follow our list: starting",
        ),
        (
            {"mps": {"up": False, "limits_in_force": False, "problem": "no daemon answers"}},
            "no vGPU can be given: no daemon answers",
        ),
        ({"mps": {"up": True, "limits_in_force": False}}, "limits are not in force"),
        (
            {"mps": {"up": True, "limits_in_force": True, "replacement": "replace the pod"}},
            "replace the pod",
        ),
        (
            {"mps": {"up": True, "limits_in_force": True, "waiting_clients": 2}},
            "limits are in force, clients unknown, 2 of another user waiting",
        ),
        ({"mps": None}, "MPS       not used"),
        (
            {"podresources": {"up": False, "error": "timed out"}},
            "the kubelet does not tell who holds what, what is shown is older: timed out",
        ),
        (
            {"podresources": {"up": False, "error": "timed out"}, "allocations": None},
            "the kubelet does not tell who holds what: timed out",
        ),
        ({"names_pods": False, "allocations": None}, "not named: VGPU_STATUS_PAGE=off"),
        ({"health_checks": False}, "off: no fault of any card is noticed"),
        ({"largest_free_share": 1}, "1 vGPU on one card at most"),
        ({"cards": []}, "No card is shared."),
        ({"allocations": []}, "No vGPU is held."),
        ({"orphaned": ["GPU-x::3"]}, "1 vGPU held, though the node no longer has them: GPU-x::3"),
        ({"cards": [card(0, notes=["a row waits"])]}, "GPU 0: a row waits"),
        (
            {"cards": [card(0, unattributed_processes=1)]},
            "GPU 0: 1 process of no pod that holds its vGPUs",
        ),
        (
            {
                "excluded": [
                    {"uuid": "GPU-m", "index": 2, "model": "L4", "reason": "mig", "detail": "on"}
                ]
            },
            "GPU 2 is left out (L4, GPU-m): mig: on",
        ),
        ({"allocations": [allocation(0, memory_used_bytes=10 * GIB)]}, "10 GiB, over its share"),
        ({"allocations": [allocation(0, memory_limited=False)]}, "9 GiB, no limit"),
        ({"process_metrics": False}, "not looked at: VGPU_PROCESS_METRICS=off"),
    ],
)
def test_what_is_not_as_usual_is_said_in_words(changes, told):
    assert told in shown(report(**changes))
    assert told not in shown(report())


def test_columns_of_use_are_there_only_where_processes_are_looked_at():
    assert "PROCESSES" in shown(report())
    assert "PROCESSES" in shown(without(report(), "process_metrics"))
    assert "PROCESSES" not in shown(report(process_metrics=False))


@pytest.mark.parametrize("told", [report(allocations=None), without(report(), "allocations")])
def test_where_nobody_knows_who_holds_what_it_is_unknown_and_not_free(told):
    text = shown(told | {"largest_free_share": None})
    assert line(text, "0 ")[-2] == "unknown of 10"
    assert line(text, "Free") == ["Free", "unknown"]
    assert "Who holds which vGPUs is unknown." in text
    assert "No vGPU is held" not in text


@pytest.mark.parametrize(
    ("holders", "held"),
    [
        ([allocation(0, numbers=None)], "unknown of 10"),
        ([allocation(0, numbers=[1, "2"])], "unknown of 10"),
        ([allocation(0) | {"gpu_uuid": 3}], "unknown of 10"),
        # What containers of a pod have in common counts once.
        ([allocation(0, container="init", numbers=[0, 1]), allocation(0)], "4 of 10"),
    ],
)
def test_vgpus_are_counted_once_and_not_where_a_holder_is_not_understood(holders, held):
    assert line(shown(report(allocations=holders)), "0    NVIDIA")[-2] == held


@pytest.mark.parametrize("name", report())
def test_a_report_without_a_field_says_unknown_and_the_rest_as_before(name):
    whole, fewer = shown(report()), shown(without(report(), name))
    # What an older agent does not tell of is not unknown: there was nothing of it.
    expected = name not in ("process_metrics", "names_pods", "orphaned")
    assert ("unknown" in fewer) is expected
    assert (fewer == whole) is not expected


@pytest.mark.parametrize("name", card(0))
def test_a_card_without_a_field_is_shown(name):
    text = shown(report(cards=[without(card(0), name)]))
    silent = ("unattributed_processes", "pci_bus_id", "faults", "notes", "recovery_wait_seconds")
    assert ("unknown" in text) is (name not in silent)


def test_a_card_that_is_near_no_node_is_told_from_one_of_which_that_is_unknown():
    unknown = (without(card(0), "numa_node"), card(0, numa_node="0"), card(0, numa_node=True))
    shown_as = {"none": [card(0, numa_node=None)], "unknown": unknown}
    for words, cards in shown_as.items():
        for each in cards:
            assert line(shown(report(cards=[each])), "0    NVIDIA")[-1] == words


def test_names_of_pods_are_no_markup_and_move_no_cursor():
    hostile = "[bold red]x[/]:smile:\x1b]0;title\x07\x1b[2J\r\n\u202eevil\ud800\x9b"
    text = shown(report(allocations=[allocation(0, pod=hostile)]))
    assert "default/[bold red]x[/]:smile:" in text
    assert r"\x1b]0;title\x07\x1b[2J\r\n\u202eevil\ud800\x9b" in text
    assert "\x1b" not in text


# Hypothesis: whatever is told

junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)
names = st.text(st.characters(exclude_categories=[]), max_size=30)


def objects(template: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Any subset of the fields, each like the template's."""
    return st.fixed_dictionaries({}, optional={key: like(each) for key, each in template.items()})


def like(value: object) -> st.SearchStrategy[Any]:
    """The value, others of its type, or junk. What may be None is a text otherwise."""
    match value:
        case dict():
            others: st.SearchStrategy[Any] = objects(value)
        case list():
            others = st.lists(st.one_of(*map(like, value)) if value else names, max_size=3)
        case bool():
            others = st.booleans()
        case int():
            others = st.none() | st.integers(-(10**30), 10**30)
        case _:
            others = names | st.datetimes().map(str)
    return others | st.just(value) | junk


fault = {
    "reason": "xid",
    "since": "2026-03-04T05:06:07Z",
    "until_reset": True,
    "advice": "",
    "detail": "",
}
reports = objects(report(cards=[card(0, faults=[fault]), card(1, faults=[])]))


def ink(text: str) -> Counter[str]:
    return Counter("".join(text.split()))


@tried(60)
@given(told=reports, width=st.integers(20, 200))
def test_whatever_is_told_it_is_shown_whole_and_plain(told, width):
    wide, narrow = shown(told), shown(told, width)
    assert set(wide) <= {"\n"} | {each for each in wide if each.isprintable()}
    assert ink(wide) <= ink(narrow), "something was cut"
    assert all(len(each) <= width for each in narrow.splitlines())


@tried(60)
@given(pod=names, container=names)
def test_where_there_is_no_terminal_a_holder_is_one_line(pod, container):
    text = shown(report(allocations=[allocation(0, pod=pod, container=container)]))
    (row,) = [each for each in text.splitlines() if "0-2,5" in each]
    assert f"default/{visible(pod)}" in row
    assert visible(container) in row


def test_rows_are_one_below_the_other_where_a_table_would_leave_a_few_letters_to_each_column():
    one_by_one = "POD           default/resnet-0"
    assert [one_by_one in shown(report(), width) for width in (40, 80, 100)] == [True, False, False]


# Words


@pytest.mark.parametrize(
    ("said", "value", "words"),
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
        (moment, None, "unknown"),
        (moment, "2026-03-04T05:06:07.5+02:00", "2026-03-04 03:06:07 UTC"),
        (moment, "yesterday", "yesterday"),
        (moment, "0001-01-01T00:00:00+05:00", "0001-01-01T00:00:00+05:00"),
    ],
)
def test_sizes_ranges_and_times_are_as_people_write_them(said, value, words):
    assert said(value) == words


@tried(60)
@given(st.sets(st.integers(0, 60)))
def test_ranges_name_exactly_the_numbers(numbers):
    named: set[int] = set()
    for run in filter(None, ranges(numbers).split(",")):
        first, _, last = run.partition("-")
        named |= set(range(int(first), int(last or first) + 1))
    assert named == numbers


# Finding the agent


def test_an_agent_is_found_while_it_holds_its_file(tmp_path):
    directory = tmp_path / "state"
    assert agent.find(directory) is None
    with agent.findable(directory) as tell:
        assert agent.find(directory) == agent.Found(os.getpid(), None)
        tell(Address("::1", 9408))
        assert agent.find(directory) == agent.Found(os.getpid(), Address("::1", 9408))
        with agent.findable(directory) as second:
            second(Address("127.0.0.1", 1))
        assert agent.find(directory) == agent.Found(os.getpid(), Address("::1", 9408))
    assert not (directory / agent.PID_FILE).exists()


@pytest.mark.parametrize("left", ["PID\n127.0.0.1:9\n", "", "x\n", "0\n", "-1\n"])
def test_a_file_that_nobody_holds_names_nobody_and_is_taken_over(tmp_path, left):
    (tmp_path / agent.PID_FILE).write_text(left.replace("PID", str(os.getpid())))
    assert agent.find(tmp_path) is None
    with agent.findable(tmp_path):
        assert agent.find(tmp_path) == agent.Found(os.getpid(), None)


@pytest.mark.parametrize("held", ["", "x\n", "0\n", "-7\n", "12\nnowhere\n"])
def test_a_held_file_that_says_nothing_names_nobody(tmp_path, held):
    with (tmp_path / agent.PID_FILE).open("w") as file:
        file.write(held)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        assert agent.find(tmp_path) is None


def test_a_starting_agent_waits_for_the_moment_in_which_somebody_looks(tmp_path, monkeypatch):
    with (tmp_path / agent.PID_FILE).open("w") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        monkeypatch.setattr(time, "sleep", lambda _: fcntl.flock(looking, fcntl.LOCK_UN))
        with agent.findable(tmp_path):
            assert agent.find(tmp_path) == agent.Found(os.getpid(), None)


def test_who_looks_at_the_same_time_as_another_is_not_taken_for_an_agent(tmp_path):
    (tmp_path / agent.PID_FILE).write_text(f"{os.getpid()}\n")
    with (tmp_path / agent.PID_FILE).open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert agent.find(tmp_path) is None


def test_a_directory_that_cannot_be_used_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").touch()
    with agent.findable(tmp_path / "file") as tell:
        tell(Address("127.0.0.1", 1))
    assert "`vgpu-agent release` will not work" in caplog.text


def test_with_port_0_the_address_is_what_the_agent_wrote(tmp_path):
    chosen = EmbeddedSettings(state_directory=tmp_path, metrics_address=Address("0.0.0.0", 0))
    with pytest.raises(NoAgentError, match=r"agent\.pid names no running agent"):
        agent.address_of(chosen)
    with agent.findable(tmp_path) as tell:
        with pytest.raises(NoAgentError, match=r"VGPU_METRICS_ADDRESS=0\.0\.0\.0:0"):
            agent.address_of(chosen)
        tell(Address("127.0.0.1", 4321))
        assert agent.address_of(chosen) == Address("127.0.0.1", 4321)
        fixed = EmbeddedSettings(state_directory=tmp_path, metrics_address=Address("host", 1))
        assert agent.address_of(fixed) == Address("host", 1)


# Asking it


def test_an_agent_says_what_it_says():
    body = json.dumps(report(), indent=2) + "\n"
    with answering(http(body)) as address:
        told = agent.ask(address)
        assert agent.ask(Address("0.0.0.0", address.port)) == told
    assert (told.text, told.report) == (body, report())


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (http("<html>", "404 Not Found"), "is no vgpu-agent: it answers HTTP 404"),
        (http("<html>"), "its /status.json is something else"),
        (http("[]"), "its /status.json is something else"),
        (http('{"status": "ok"}'), "its /status.json is something else"),
        (http("[" * 200_000), "its /status.json is something else"),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n\xff", "is something else"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}", "is no vgpu-agent: no HTTP"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "is no vgpu-agent: no HTTP"),
        (b"", "no agent answers at"),
    ],
)
def test_what_is_no_agent_is_told_from_one(answer, words):
    with answering(answer) as address, pytest.raises(NoAgentError) as caught:
        agent.ask(address)
    assert words in str(caught.value)
    assert str(address) in str(caught.value)


def test_nobody_there_is_said_with_the_reason():
    address = closed()
    with pytest.raises(NoAgentError, match=f"no agent answers at {address}: Connection refused"):
        agent.ask(address)
    with pytest.raises(NoAgentError, match="no agent answers at"):
        agent.ask(Address("x" * 70 + ".é", 1))
    with answering(None) as silent, pytest.raises(NoAgentError, match="timed out"):
        agent.ask(silent, timeout=0.05)


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_no_proxy_stands_between(monkeypatch, name):
    monkeypatch.setenv(name, f"http://{closed()}")
    with answering(http(json.dumps(report()))) as address:
        assert agent.ask(address).report["host"] == "node-7"


def test_an_agent_that_does_not_let_go_is_waited_for_and_then_told(tmp_path):
    asked: list[int] = []
    handler = signal.signal(signal.SIGUSR1, lambda number, _: asked.append(number))
    try:
        with answering(http(json.dumps(report()))) as address, agent.findable(tmp_path):
            chosen = EmbeddedSettings(state_directory=tmp_path, metrics_address=address)
            with pytest.raises(ReleaseError, match=r"does not say within 0\.1 s .* a call to the"):
                release(chosen, asked.append, patience=0.1)
    finally:
        signal.signal(signal.SIGUSR1, handler)
    assert asked == [signal.SIGUSR1]


# The command line


def test_its_arguments():
    assert vars(cli.parse(["status"])) == {
        "command": "status",
        "json": False,
        "watch": None,
        "address": None,
    }
    assert cli.parse(["status", "--watch"]).watch == 2.0
    assert cli.parse(["status", "--watch", "0.5"]).watch == 0.5
    assert cli.parse(["status", "--address", "[::1]:9408"]).address == Address("::1", 9408)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--watch", "0"], "'0' is not a number of seconds above 0"),
        (["--json", "--watch"], "not allowed with"),
        (["--address", "9408"], "'9408' is not host:port or [IPv6]:port"),
        (["--address", "localhost:0"], "'localhost:0' is not host:port"),
        (["--address", "a:99999"], "'a:99999' is not host:port"),
    ],
)
def test_its_wrong_arguments(capsys, arguments, named):
    with pytest.raises(SystemExit) as caught:
        cli.parse(["status", *arguments])
    assert caught.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]


def test_only_the_settings_that_it_needs_must_be_right(monkeypatch, capsys):
    monkeypatch.setenv("VGPU_REPLICAS", "many")
    with answering(http(json.dumps(report()))) as address:
        monkeypatch.setenv("VGPU_METRICS_ADDRESS", str(address))
        assert cli.execute(["status"]) == 0
        assert "node-7" in capsys.readouterr().out
        monkeypatch.setenv("VGPU_METRICS_ADDRESS", "9408")
        with pytest.raises(
            SettingsError, match="1 setting is wrong:\n  VGPU_METRICS_ADDRESS='9408'"
        ):
            cli.execute(["status"])
        assert cli.execute(["status", "--address", str(address)]) == 0
        assert "node-7" in capsys.readouterr().out


def test_settings_are_read_by_name_and_the_rest_is_default():
    environ = {
        "VGPU_METRICS_ADDRESS": "[::1]:7",
        "vgpu_state_directory": "/x",
        "VGPU_REPLICAS": "5",
    }
    read = configuration.read(environ, "metrics_address", "state_directory")
    assert (read.metrics_address, read.state_directory) == (Address("::1", 7), Path("/x"))
    assert read.replicas == 10


def test_on_a_terminal_of_few_letters_nothing_fails(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    told = report(allocations=[allocation(0, pod="pöd-模")])
    with answering(http(json.dumps(told))) as address:
        assert cli.execute(["status", "--address", str(address)]) == 0
    assert rb"default/p\xf6d-\u6a21" in stdout.buffer.getvalue()


def test_silence_is_counted_anew_after_every_answer():
    clock = [datetime(2026, 3, 4, 5, minute, tzinfo=UTC) for minute in range(5)]

    def look() -> agent.Told:
        if clock[0].minute != 2:
            raise NoAgentError("nobody")
        return agent.Told("", report())

    def sleep(_: float) -> None:
        clock.pop(0)
        if not clock:
            raise KeyboardInterrupt

    out = io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        status.watch(look, out, 1, now=lambda: clock[0], sleep=sleep)
    finally:
        signal.signal(signal.SIGTERM, handler)
    silent = [each.rstrip() for each in out.getvalue().splitlines() if "not answering" in each]
    assert silent == [f"not answering since 05:0{since}:00: nobody" for since in (0, 0, 3, 3)]
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
        deadline = time.monotonic() + 10
        while select.select([self._read], [], [], max(0, deadline - time.monotonic()))[0]:
            assert time.monotonic() < deadline, "it goes on writing after the signal"
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
    """The settings by which the commands find the agent of `running`."""
    return {
        "VGPU_STATE_DIRECTORY": str(kubelet_dir / "state"),
        "VGPU_METRICS_ADDRESS": "127.0.0.1:0",
    }


@pytest.mark.slow
def test_a_running_agent_is_shown_and_releases_also_where_only_it_knows_its_port(kubelet_dir):
    variables = where(kubelet_dir) | {"http_proxy": f"http://{closed()}", "VGPU_REPLICAS": "many"}
    with running(kubelet_dir, VGPU_REPLICAS="7", VGPU_SIMULATED_GPUS="3") as it:
        it.wait_line("no kubelet at")
        wait_until(lambda: getattr(agent.find(kubelet_dir / "state"), "address", None))
        done = execute("status", **variables)
        asked = execute("status", "--address", f"127.0.0.1:{it.port}")
        as_json = execute("status", "--json", **variables)
        told = json.loads(it.get("/status.json")[1])
        released = execute("release", **where(kubelet_dir))
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert line(done.stdout, "Node")[1] == socket.gethostname()
    assert "not registered: no kubelet at" in done.stdout
    rows = [each for each in done.stdout.splitlines() if "NVIDIA Simulated 24GB" in each]
    assert len(rows) == 3
    assert all("of 7" in row and "healthy" in row for row in rows)
    assert asked.returncode == 0
    assert as_json.returncode == 0
    assert without(json.loads(as_json.stdout), "time") == without(told, "time")
    assert released.returncode == 0, released.stderr
    assert "reset them now" in released.stdout
    wrong = execute("status", VGPU_METRICS_ADDRESS="here")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "VGPU_METRICS_ADDRESS='here' is wrong" in wrong.stderr
    after = execute("status", **variables)
    assert (after.returncode, after.stdout) == (1, "")
    assert after.stderr.startswith("vgpu-agent: VGPU_METRICS_ADDRESS=127.0.0.1:0 does not say")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["--json"], ["--watch", "0.1"]])
def test_a_reader_that_leaves_is_no_error_to_tell(arguments):
    read, write = os.pipe()
    os.close(read)
    with answering(http(json.dumps(report()))) as address:
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
        it.wait("not answering since", "names no running agent")
        for model in ("First card", "Second card"):
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
    told = report(allocations=[allocation(0, pod=f"pod-{each}") for each in range(40)])
    with (
        answering(http(json.dumps(told))) as address,
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
    assert loaded & {"rich", "yaml", "pynvml", "vgpu_agent.status", "vgpu_agent.doctor"} == set()
