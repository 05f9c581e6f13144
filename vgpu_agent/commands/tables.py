"""A report as tables and lines for a terminal or a pipe."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from vgpu_agent.commands import judge
from vgpu_agent.commands.judge import Check, Verdict
from vgpu_agent.model.rules import GIB, MIB
from vgpu_agent.observe.report import AllocationReport, GpuReport, Report

UNKNOWN = "unknown"
GOOD, BAD, ODD, HEAD = "green", "bold red", "yellow", "bold"
COLOURS = {Verdict.OK: "", Verdict.WARN: ODD, Verdict.FAIL: BAD}

TABLE_WIDTH = 80
"""Columns of a terminal from which on a table that does not fit is folded within its cells."""


def page(report: Report) -> RenderableType:
    """All of it: the node, its GPUs, what is wrong and what to do, and who holds what."""
    parts: list[RenderableType] = [_pairs(_facts(report)), Text(), *_gpus(report)]
    if findings := list(judge.findings(report)):
        parts += [Text(), *(line for check in findings for line in _finding(check))]
    return Group(*parts, Text(), *_holders(report))


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


def _or_unknown(value: object) -> str:
    return UNKNOWN if value is None else str(value)


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
    yield "node", Text(report.host)
    yield "resource", Text(report.resource)
    yield "version", Text(f"{report.version}, report of {report.time}")
    yield "vGPUs", _vgpus(report)
    for check in judge.of_node(report):
        advice = "" if check.verdict is Verdict.OK else f"\n-> {check.advice}"
        yield check.name, Text.assemble((check.detail, COLOURS[check.verdict]), advice)


def _vgpus(report: Report) -> Text:
    """The counts, which add up: what is held by pods, free, and neither."""
    counts = report.vgpus
    text = Text(f"{counts.total}: ")
    if counts.free is None or counts.held is None:
        text.append("who holds them is unknown")
    else:
        text.append(f"{counts.held} held")
        if counts.held_unhealthy:
            text.append(f" ({counts.held_unhealthy} of them on unhealthy GPUs)", BAD)
        text.append(", ").append(*_free(counts.free, report, " free"))
    if counts.unhealthy:
        text.append(", ").append(f"{counts.unhealthy} unhealthy", BAD)
    if not report.schedulable:
        text.append("; the kubelet cannot give any to a pod now", BAD)
    elif report.largest_free:
        where = [f" (GPU {g.index})" for g in report.gpus if g.vgpus.free == report.largest_free]
        text.append(f"; largest free block: {report.largest_free}{where[0] if where else ''}")
    return text


def _free(count: int, report: Report, words: str = "") -> tuple[str, str]:
    """Green is only what a pod can be given now."""
    return f"{count}{words}", GOOD if count and report.schedulable else ""


# GPUs


def _gpus(report: Report) -> Iterator[RenderableType]:
    if not report.gpus:
        yield _line("No GPU is shared.")
        return
    columns = ("GPU", "MODEL", "UUID", "HEALTH", "MEMORY", "VGPUS", "HELD", "FREE", "NUMA")
    yield _Sheet(columns, [_row(gpu, report) for gpu in report.gpus])


def _row(gpu: GpuReport, report: Report) -> list[Text]:
    free = gpu.vgpus.free
    return [
        Text(str(gpu.index)),
        Text(gpu.model),
        Text(gpu.uuid),
        _health(gpu, report),
        Text(f"{size(gpu.memory_used_bytes)} of {size(gpu.memory_bytes)}"),
        Text(str(gpu.vgpus.total)),
        Text(_or_unknown(gpu.vgpus.held)),
        Text(UNKNOWN) if free is None else Text(*_free(free, report)),
        Text("none" if gpu.numa_node is None else str(gpu.numa_node)),
    ]


def _health(gpu: GpuReport, report: Report) -> Text:
    if gpu.healthy:
        return Text("healthy", GOOD if report.schedulable else "")
    return Text(", ".join(fault.reason for fault in gpu.faults) or "unhealthy", BAD)


def _finding(check: Check) -> Iterator[Text]:
    """What is wrong, and below it what to do."""
    yield _line((f"{check.name}: ", COLOURS[check.verdict]), check.detail)
    if check.verdict is not Verdict.OK:
        yield _line("  -> ", check.advice)


# Who holds what


def _holders(report: Report) -> Iterator[RenderableType]:
    allocations = report.allocations
    if allocations is None:
        why = UNKNOWN if report.names_pods else "not shown: VGPU_STATUS_PAGE=off"
        yield _line(f"Who holds which vGPUs is {why}.")
        return
    if not allocations:
        yield _line("No vGPU is held.")
        return
    totals = {gpu.uuid: gpu.vgpus.total for gpu in report.gpus}
    columns = ["GPU", "VGPUS", "OF GPU", "POD", "CONTAINER", "MEMORY SHARE"]
    rows = [_holder(each, totals.get(each.gpu_uuid, UNKNOWN)) for each in allocations]
    # Where processes are not looked at there is nothing to say of usage.
    if report.process_metrics:
        columns += ["USED", "PROCESSES"]
        for row, allocation in zip(rows, allocations, strict=True):
            row += [_used(allocation), Text(_or_unknown(allocation.processes))]
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
    used, share = allocation.memory_used_bytes, allocation.memory_share_bytes
    over = used is not None and share is not None and used > share
    return Text(f"{size(used)}, over its share", BAD) if over else Text(size(used))
