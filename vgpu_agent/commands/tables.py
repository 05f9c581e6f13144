"""A report as tables and lines for a terminal or a pipe."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.constrain import Constrain
from rich.table import Table
from rich.text import Text

from vgpu_agent.commands.paste import command_lines, folded
from vgpu_agent.model.acceptance import Refusal
from vgpu_agent.model.place import Step
from vgpu_agent.model.rules import GIB, MIB
from vgpu_agent.observe.report import AllocationReport, Check, GpuReport, Report, Verdict, utc

UNKNOWN = "unknown"
GOOD, BAD, ODD, HEAD = "green", "bold red", "yellow", "bold"
COLOURS = {Verdict.OK: "", Verdict.WARN: ODD, Verdict.FAIL: BAD}

TABLE_WIDTH = 80
"""Columns of a terminal from which on a table that does not fit is folded within its cells."""

WIDEST = 100_000
"""Columns of what is not folded."""

CELL = 16
"""Columns of a model and of the reasons of a GPU, so that its row fits into TABLE_WIDTH."""


def page(report: Report, *, wide: bool = False) -> RenderableType:
    """All of it: whether it accepts pods, the node, its GPUs, what to do, and who holds what.

    All but the last is folded to TABLE_WIDTH, also where there is no terminal: `kubectl exec` gives
    none. `wide`: nothing is, and all that is known of a GPU is in its row.
    """
    parts: list[RenderableType] = [_verdict(report), Text(), _pairs(_facts(report)), Text()]
    parts += _gpus(report, wide=wide)
    if todo := list(_todo(report, wide=wide)):
        parts += [Text(), *todo]
    node = Constrain(Group(*parts), None if wide else TABLE_WIDTH)
    return Group(node, Text(), *_holders(report))


# Words


def size(count: int | None) -> str:
    """Bytes in MiB or, from one on, GiB."""
    if count is None:
        return UNKNOWN
    unit, name = (GIB, "GiB") if abs(count) >= GIB else (MIB, "MiB")
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


def _verdict(report: Report) -> Text:
    found = report.acceptance
    if found.accepts:
        return _line((found.words, GOOD if report.vgpus.free else ""))
    return _line((found.words, HEAD if found.refusals == (Refusal.FULL,) else BAD))


def _facts(report: Report) -> Iterator[tuple[str, Text]]:
    yield "node", Text(f"{report.node}, as of {utc(report.time)}")
    pod = "" if report.pod is None else f", pod {report.namespace}/{report.pod}"
    yield "agent", Text(f"vgpu-agent {report.version}{pod}")
    yield "resource", Text(report.resource)
    yield "vGPUs", _vgpus(report)
    for check in report.checks:
        if check.gpu is None:
            yield check.name, Text(check.detail, COLOURS[check.verdict])


def _vgpus(report: Report) -> Text:
    """The counts, which add up: what is held by pods, free, and neither."""
    counts = report.vgpus
    text = Text(f"{counts.total}: ")
    if counts.free is None or counts.held is None:
        text.append("who holds them is unknown")
    else:
        text.append(f"{counts.free} free, {counts.held} held")
        if counts.held_unhealthy:
            text.append(f" ({counts.held_unhealthy} of them on unhealthy GPUs)", BAD)
    if counts.unhealthy:
        text.append(", ").append(f"{counts.unhealthy} unhealthy", BAD)
    return text


# GPUs


def _gpus(report: Report, *, wide: bool) -> Iterator[RenderableType]:
    if not report.gpus:
        yield _line("No GPU is shared.")
        return
    columns = ["GPU", "MODEL", "HEALTH", "MEMORY", "VGPUS", "FREE", "HELD"]
    if wide:
        columns += ["NUMA", "PCI", "UUID"]
    yield _Sheet(columns, [_row(gpu, wide=wide) for gpu in report.gpus])


def _row(gpu: GpuReport, *, wide: bool) -> list[Text]:
    """Green is only what a pod can be given now."""
    good, counts = GOOD if gpu.accepts else "", gpu.vgpus
    if gpu.healthy:
        health = Text("healthy", good)
    else:
        health = Text(", ".join(fault.reason for fault in gpu.faults) or "unhealthy", BAD)
    row = [
        Text(str(gpu.index)),
        Text(gpu.model if wide else gpu.model.removeprefix("NVIDIA ")),
        health,
        Text(f"{size(gpu.memory_used_bytes)} of {size(gpu.memory_bytes)}"),
        Text(str(counts.total)),
        Text("?" if counts.free is None else str(counts.free), good),
        Text("?" if counts.held is None else str(counts.held)),
    ]
    if wide:
        numa = "none" if gpu.numa_node is None else str(gpu.numa_node)
        return [*row, Text(numa), Text(gpu.pci_bus_id), Text(gpu.uuid)]
    for cell in row[1:3]:
        cell.truncate(CELL, overflow="ellipsis")
    return row


# What to do


def _todo(report: Report, *, wide: bool) -> Iterator[Text]:
    """What is wrong with GPUs, or worth knowing, and each advice once, with its commands."""
    shown = {gpu.uuid for gpu in report.gpus}
    groups: dict[tuple[str, tuple[Step, ...]], list[Check]] = {}
    for check in report.checks:
        if check.verdict is not Verdict.OK or (check.gpu and check.gpu not in shown):
            groups.setdefault((check.advice, check.steps), []).append(check)
    for (advice, steps), checks in groups.items():
        for check in checks:
            # What is wrong with the node stands above.
            colon = ":" if check.gpu is None else f": {check.detail}"
            yield _line((check.name, COLOURS[check.verdict]), colon)
        width = WIDEST if wide else TABLE_WIDTH
        lines = [*folded(advice, width, "  -> ", "     ")] if advice else []
        lines += command_lines(steps, TABLE_WIDTH, "     ")
        if lines:
            yield _line("\n".join(lines))


# Who holds what


def _holders(report: Report) -> Iterator[RenderableType]:
    allocations = report.allocations
    if allocations is None:
        why = UNKNOWN if report.names_pods else "not shown: VGPU_STATUS_PAGE=off"
        yield _line(f"Who holds which vGPUs is {why}.")
        return
    if not allocations:
        lost = " that the node has" if report.orphaned else ""
        yield _line(f"No vGPU{lost} is held.")
        return
    totals = {gpu.uuid: gpu.vgpus.total for gpu in report.gpus}
    columns = ["GPU", "VGPUS", "OF GPU", "POD", "CONTAINER", "MEMORY SHARE"]
    rows = [_holder(each, totals.get(each.gpu_uuid, UNKNOWN)) for each in allocations]
    # What nobody looks at is not said.
    if report.process_metrics or any(each.memory_source for each in allocations):
        columns.append("USED")
        for row, allocation in zip(rows, allocations, strict=True):
            row.append(_used(allocation))
    if report.process_metrics:
        columns.append("PROCESSES")
        for row, allocation in zip(rows, allocations, strict=True):
            processes = allocation.processes
            row.append(Text(UNKNOWN if processes is None else str(processes)))
    yield _Sheet(columns, rows)


def _holder(allocation: AllocationReport, total: int | str) -> list[Text]:
    return [
        Text(str(allocation.gpu_index)),
        Text(ranges(allocation.numbers)),
        Text(f"{len(allocation.numbers)}/{total}"),
        Text(f"{allocation.namespace}/{allocation.pod}"),
        Text(allocation.container),
        Text(
            size(allocation.memory_share_bytes)
            + ("" if allocation.memory_limited else ", no limit")
        ),
    ]


def _used(allocation: AllocationReport) -> Text:
    used = size(allocation.memory_used_bytes)
    return Text(f"{used}, over its share", BAD) if allocation.is_over_share else Text(used)
