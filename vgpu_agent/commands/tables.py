"""A report as tables and lines for a terminal or a pipe."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from vgpu_agent.observe.report import AllocationReport, GpuReport, MpsReport, Report

UNKNOWN = "unknown"
GOOD, BAD, ODD, HEAD, QUIET = "green", "bold red", "yellow", "bold", "dim"

TABLE_WIDTH = 80
"""Columns of a terminal from which on a table that does not fit is folded within its cells."""

_MIB = 1 << 20
_GIB = 1 << 30


def page(report: Report) -> RenderableType:
    """All of it: the node, its GPUs, what is wrong and what to do, and who holds what."""
    parts: list[RenderableType] = [_pairs(_facts(report)), Text(), *_gpus(report)]
    if troubles := list(_troubles(report)):
        parts += [Text(), *troubles]
    return Group(*parts, Text(), *_holders(report))


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


def moment(text: str) -> str:
    """A time of the report, to the second and in UTC."""
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
    yield "Node", Text(report.host)
    yield "Resource", Text(report.resource)
    yield "Agent", Text(f"{report.version}, report of {moment(report.time)}")
    yield "Driver", _driver(report)
    yield "Kubelet", _kubelet(report)
    yield "MPS", Text("not used") if report.mps is None else _mps(report.mps)
    if report.mps is not None and report.mps.replacement:
        yield "", Text(report.mps.replacement, ODD)
    yield "Pods", _pods(report)
    if not report.health_checks:
        yield "Health", Text("off: no fault of any GPU is noticed", BAD)
    yield "vGPUs", _vgpus(report)


def _driver(report: Report) -> Text:
    driver = report.driver
    if driver.released_until is not None:
        return Text(f"released for a reset until {moment(driver.released_until)}", ODD)
    if driver.error is not None:
        return Text(f"no GPU can be used: {driver.error}", BAD)
    return Text(driver.version or "of an unknown version")


def _kubelet(report: Report) -> Text:
    kubelet = report.kubelet
    if kubelet.connected:
        return Text("registered", GOOD)
    state = "it does not follow our list" if kubelet.registered else "not registered"
    return Text(f"{state}: {kubelet.error or 'starting'}", BAD)


def _mps(mps: MpsReport) -> Text:
    if mps.problem is not None or not mps.limits_in_effect:
        return Text(f"no vGPU can be given: {mps.problem or 'limits are not in effect'}", BAD)
    text = Text(f"limits are in effect, {_count(sum(mps.clients.values()), 'client')}")
    if mps.waiting_clients:
        text.append(f", {mps.waiting_clients} of another user waiting", ODD)
    return text


def _pods(report: Report) -> Text:
    if not report.names_pods:
        return Text("not named: VGPU_STATUS_PAGE=off")
    if not report.podresources.up:
        old = "" if report.allocations is None else ", what is shown is older"
        why = report.podresources.error or "for an unknown reason"
        return Text(f"the kubelet does not say who holds what{old}: {why}", BAD)
    text = Text("from the kubelet", GOOD)
    if not report.process_metrics:
        text.append("; usage: off (VGPU_PROCESS_METRICS)", QUIET)
    return text


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
        block = _count(report.largest_free, "vGPU")
        text.append(f"; largest free block: {block}{where[0] if where else ''}")
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


# What is wrong, and what to do


def _troubles(report: Report) -> Iterator[Text]:
    """A line for each, and below it what to do."""
    for gpu in report.gpus:
        name = f"GPU {gpu.index}"
        for fault in gpu.faults:
            yield _line(
                (f"{name}: {fault.reason}", BAD),
                f" since {moment(fault.since)}: {fault.detail}",
                " (until a reset)" if fault.until_reset else "",
            )
            if fault.advice:
                yield _line("  -> ", fault.advice)
        for note in gpu.notes:
            yield _line((f"{name}: ", ODD), note)
        if count := gpu.unattributed_processes:
            what = f"{_count(count, 'process', 'processes')} of no pod that holds its vGPUs"
            yield _line((f"{name}: ", ODD), what)
    for each in report.excluded:
        yield _line(
            (f"GPU {each.index} is excluded", ODD),
            f" ({each.model}, {each.uuid}): {each.reason}: {each.detail}",
        )
    if report.orphaned:
        vgpus = _count(len(report.orphaned), "vGPU")
        yield _line((f"{vgpus} held, but no longer advertised: ", ODD), ", ".join(report.orphaned))
    for problem in report.problems:
        yield _line((problem, ODD))


# Who holds what


def _holders(report: Report) -> Iterator[RenderableType]:
    allocations = report.allocations
    if allocations is None:
        yield _line(f"Who holds which vGPUs is {UNKNOWN if report.names_pods else 'not shown'}.")
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
