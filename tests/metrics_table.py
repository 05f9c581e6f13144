"""The table of docs/metrics.md: every metric of the agent."""

from collections.abc import Iterator

from tests.observe.rules import SNAPSHOT, full_metrics
from vgpu_agent.observe.families import PARTS
from vgpu_agent.observe.metrics import durations


def _families() -> Iterator[tuple[str, str, tuple[str, ...], str, str]]:
    """Name, type, labels and text of each, and when it is there."""
    metrics = full_metrics()
    for part, only in PARTS:
        for family in part(metrics.source, SNAPSHOT):
            name = family.samples[0].name
            yield name, family.type, tuple(family.samples[0].labels), family.documentation, only
    timed = durations(metrics.calls)
    of_calls = tuple(each for each in timed.samples[0].labels if each != "le")
    yield timed.name, timed.type, of_calls, timed.documentation, ""


def labels() -> dict[str, tuple[str, ...]]:
    """The labels of every metric, by the name that a query uses."""
    return {name: of_metric for name, _, of_metric, _, _ in _families()}


def names() -> set[str]:
    """Every name that a query may use: a histogram has several."""
    parts = {
        f"{name}_{part}"
        for name, kind, *_ in _families()
        for part in ("bucket", "count", "sum")
        if kind == "histogram"
    }
    return labels().keys() | parts


def markdown_table() -> str:
    """All metrics by name, with when they are there."""
    lines = ["| metric | type | labels | what it says | only |", "| --- | --- | --- | --- | --- |"]
    for name, kind, of_metric, text, only in sorted(_families()):
        words = ", ".join(f"`{label}`" for label in of_metric) or "-"
        lines.append(f"| `{name}` | {kind} | {words} | {text} | {only or '-'} |")
    return "\n".join(lines)
