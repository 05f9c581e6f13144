"""The report as tables and lines for a terminal or a pipe."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from vgpu_agent.status.report import Allocation, Card, Excluded, Fault, Kubelet, Mps, Report

UNKNOWN = "unknown"
GOOD, BAD, ODD, HEAD, QUIET = "green", "bold red", "yellow", "bold", "dim"

TABLE_WIDTH = 80
"""Columns of a terminal from which on a table that does not fit is folded within its cells."""

_MIB = 1 << 20
_GIB = 1 << 30


def page(report: Report) -> RenderableType:
    """All of it: the node, what is wrong and what to do, its cards, and who holds what."""
    parts: list[RenderableType] = [_pairs(_facts(report))]
    parts += [Text(), *_cards(report), *_troubles(report)]
    parts += [Text(), *_holders(report)]
    return Group(*parts)


# Words


def size(count: int | None) -> str:
    """Bytes in MiB or, from one on, GiB."""
    if count is None:
        return UNKNOWN
    unit, name = (_GIB, "GiB") if abs(count) >= _GIB else (_MIB, "MiB")
    whole, tenth = divmod((abs(count) * 10 + unit // 2) // unit, 10)
    return f"{'-' if count < 0 else ''}{whole}{f'.{tenth}' if tenth else ''} {name}"


def ranges(numbers: Collection[int]) -> str:
    """Numbers as people write them: 0-2,5."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def moment(text: str | None) -> str:
    """A time of the report, to the second and in UTC."""
    if text is None:
        return UNKNOWN
    try:
        return f"{datetime.fromisoformat(text).astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (ValueError, OverflowError):
        return text


def _or_unknown(value: object) -> str:
    return UNKNOWN if value is None else str(value)


def _count(number: int, thing: str, plural: str = "") -> str:
    return f"{number} {thing if number == 1 else plural or thing + 's'}"


def _line(*parts: str | tuple[str, str]) -> Text:
    """Plain text: nothing in it is markup."""
    return Text.assemble(*parts, overflow="fold")


def _grid(*, show_header: bool) -> Table:
    return Table(
        box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style=HEAD, show_header=show_header
    )


def _pairs(pairs: Iterable[tuple[str, Text]]) -> Table:
    """Names, and what is to be said of each."""
    table = _grid(show_header=False)
    table.add_column(style=HEAD, overflow="fold")
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(Text(name), value)
    return table


@dataclass(frozen=True, slots=True)
class _Sheet:
    """Rows as a table or, where that would leave a few letters to each column, one by one."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Text]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = _grid(show_header=True)
        for column in self.columns:
            table.add_column(Text(column), overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        if options.max_width >= min(TABLE_WIDTH, table.__rich_measure__(console, options).maximum):
            yield table
            return
        for number, row in enumerate(self.rows):
            if number:
                yield Text()
            yield _pairs(zip(self.columns, row, strict=True))


# The node


def _facts(report: Report) -> Iterator[tuple[str, Text]]:
    yield "Node", Text(_or_unknown(report.host))
    yield "Resource", Text(_or_unknown(report.resource))
    yield "Agent", Text(f"{_or_unknown(report.version)}, report of {moment(report.time)}")
    yield "Driver", _driver(report)
    yield "Kubelet", _kubelet(report.kubelet)
    yield "MPS", _mps(report)
    if report.mps is not None and report.mps.replacement:
        yield "", Text(report.mps.replacement, ODD)
    yield "Pods", _pods(report)
    if report.health_checks is not True:
        off = report.health_checks is False
        yield "Health", Text("off: no fault of any card is noticed", BAD) if off else Text(UNKNOWN)
    free = report.largest_free_share
    yield "Free", Text(UNKNOWN if free is None else f"{_count(free, 'vGPU')} on one card at most")


def _driver(report: Report) -> Text:
    driver = report.driver
    if driver.released_until is not None:
        return Text(f"let go of for a reset until {moment(driver.released_until)}", ODD)
    if driver.up is None:
        return Text(UNKNOWN)
    if driver.up:
        return Text(driver.version or "of an unknown version")
    return Text(f"no GPU can be used: {_or_unknown(driver.error)}", BAD)


def _kubelet(kubelet: Kubelet) -> Text:
    if kubelet.connected is None:
        return Text(UNKNOWN)
    if kubelet.connected:
        return Text("registered", GOOD)
    state = "it does not follow our list" if kubelet.registered else "not registered"
    return Text(f"{state}: {kubelet.error or 'starting'}", BAD)


def _mps(report: Report) -> Text:
    if report.mps is None:
        return Text("not used" if report.no_mps else UNKNOWN)
    return _daemon(report.mps)


def _daemon(mps: Mps) -> Text:
    if mps.problem is not None or mps.up is False or mps.limits_in_force is False:
        what = "the daemon is not there" if mps.up is False else "limits are not in force"
        return Text(f"no vGPU can be given: {mps.problem or what}", BAD)
    if mps.up is None or mps.limits_in_force is None:
        return Text(UNKNOWN)
    clients = "clients unknown" if mps.clients is None else _count(mps.clients, "client")
    text = Text(f"limits are in force, {clients}")
    if mps.waiting_clients:
        text.append(f", {mps.waiting_clients} of another user waiting", ODD)
    return text


def _pods(report: Report) -> Text:
    if report.names_pods is False:
        return Text("not named: VGPU_STATUS_PAGE=off")
    if report.podresources_up is False:
        old = "" if report.allocations is None else ", what is shown is older"
        why = report.podresources_error or "for an unknown reason"
        return Text(f"the kubelet does not tell who holds what{old}: {why}", BAD)
    if report.podresources_up is None or report.allocations is None:
        return Text(UNKNOWN)
    text = Text("told by the kubelet", GOOD)
    if report.process_metrics is False:
        text.append("; what they use is not looked at: VGPU_PROCESS_METRICS=off", QUIET)
    return text


# Cards


def _cards(report: Report) -> Iterator[RenderableType]:
    if report.cards is None:
        yield _line("Cards are unknown.")
        return
    if not report.cards:
        yield _line("No card is shared.")
        return
    columns = ("GPU", "MODEL", "UUID", "HEALTH", "MEMORY", "VGPUS HELD", "NUMA")
    yield _Sheet(columns, [_row(card, report.allocations) for card in report.cards])


def _row(card: Card, allocations: tuple[Allocation, ...] | None) -> list[Text]:
    return [
        Text(_or_unknown(card.index)),
        Text(_or_unknown(card.model)),
        Text(_or_unknown(card.uuid)),
        _health(card),
        Text(f"{size(card.memory_used_bytes)} of {size(card.memory_bytes)}"),
        Text(f"{_held(card, allocations)} of {_or_unknown(card.vgpus)}"),
        Text("none" if card.no_numa else _or_unknown(card.numa_node)),
    ]


def _health(card: Card) -> Text:
    if card.healthy:
        return Text("healthy", GOOD)
    if card.healthy is None:
        return Text(UNKNOWN)
    reasons = dict.fromkeys(_or_unknown(fault.reason) for fault in card.faults)
    return Text(", ".join(reasons) or "unhealthy", BAD)


def _held(card: Card, allocations: tuple[Allocation, ...] | None) -> str:
    """How many of its vGPUs are held; an init container and its pod's others hold the same ones."""
    if allocations is None or card.uuid is None:
        return UNKNOWN
    own = [each.numbers for each in allocations if each.gpu_uuid == card.uuid]
    if None in own or any(each.gpu_uuid is None for each in allocations):
        return UNKNOWN
    return str(len({number for numbers in own for number in numbers or ()}))


# What is wrong, and what to do


def _troubles(report: Report) -> Iterator[Text]:
    """A line for each, with room above the first."""
    lines = [
        *(line for card in report.cards or () for line in _troubles_of(card)),
        *(_left_out(each) for each in report.excluded or ()),
        *_orphaned(report),
    ]
    if report.excluded is None:
        lines.append(_line("Cards that are left out are unknown."))
    if lines:
        yield Text()
        yield from lines


def _troubles_of(card: Card) -> Iterator[Text]:
    name = f"GPU {_or_unknown(card.index)}"
    for fault in card.faults:
        yield from _fault(name, fault)
    for note in card.notes:
        yield _line((f"{name}: ", ODD), note)
    if count := card.unattributed_processes:
        yield _line(
            (f"{name}: ", ODD),
            f"{_count(count, 'process', 'processes')} of no pod that holds its vGPUs",
        )


def _fault(name: str, fault: Fault) -> Iterator[Text]:
    yield _line(
        (f"{name}: {_or_unknown(fault.reason)}", BAD),
        f" since {moment(fault.since)}: {_or_unknown(fault.detail)}",
        " (until a reset)" if fault.until_reset else "",
    )
    if fault.advice:
        yield _line("  -> ", fault.advice)


def _left_out(card: Excluded) -> Text:
    return _line(
        (f"GPU {_or_unknown(card.index)} is left out", ODD),
        f" ({_or_unknown(card.model)}, {_or_unknown(card.uuid)}):"
        f" {_or_unknown(card.reason)}: {_or_unknown(card.detail)}",
    )


def _orphaned(report: Report) -> Iterator[Text]:
    if report.orphaned:
        count = _count(len(report.orphaned), "vGPU")
        yield _line(
            (f"{count} held, though the node no longer has them: ", ODD), ", ".join(report.orphaned)
        )


# Who holds what


def _holders(report: Report) -> Iterator[RenderableType]:
    allocations = report.allocations
    if allocations is None:
        yield _line("Who holds which vGPUs is unknown.")
        return
    if not allocations:
        yield _line("No vGPU is held.")
        return
    made = {card.uuid: card.vgpus for card in report.cards or () if card.uuid is not None}
    columns = ["GPU", "VGPUS", "OF CARD", "POD", "CONTAINER", "MEMORY SHARE"]
    rows = [_holder(each, made.get(each.gpu_uuid or "")) for each in allocations]
    # Without a look at processes there is nothing to say of what anybody uses.
    if report.process_metrics is not False:
        columns += ["USED", "PROCESSES"]
        for row, each in zip(rows, allocations, strict=True):
            row += [_used(each), Text(_or_unknown(each.processes))]
    yield _Sheet(columns, rows)


def _holder(allocation: Allocation, made: int | None) -> list[Text]:
    numbers = allocation.numbers
    unlimited = ", no limit" if allocation.memory_limited is False else ""
    return [
        Text(_or_unknown(allocation.gpu_index)),
        Text(UNKNOWN if numbers is None else ranges(numbers)),
        Text(f"{UNKNOWN if numbers is None else len(numbers)}/{_or_unknown(made)}"),
        Text(f"{_or_unknown(allocation.namespace)}/{_or_unknown(allocation.pod)}"),
        Text(_or_unknown(allocation.container)),
        Text(size(allocation.memory_share_bytes) + unlimited),
    ]


def _used(allocation: Allocation) -> Text:
    used, share = allocation.memory_used_bytes, allocation.memory_share_bytes
    over = used is not None and share is not None and used > share
    return Text(f"{size(used)}, over its share", BAD) if over else Text(size(used))
