"""The table of docs/metrics.md: every metric of the agent."""

from vgpu_agent.observe.metrics import RPC_DURATION, TABLE


def labels() -> dict[str, tuple[str, ...]]:
    """The labels of every metric, by the name that a query uses."""
    name, _, of_calls = RPC_DURATION
    return {entry.name: entry.labels for entry in TABLE} | {name: of_calls}


def names() -> set[str]:
    """Every name that a query may use: a histogram has several."""
    histogram = RPC_DURATION[0]
    return {*labels(), *(f"{histogram}_{part}" for part in ("bucket", "count", "sum"))}


def markdown_table() -> str:
    """All metrics by name, with when they are there."""
    rows = [
        (entry.name, entry.kind, entry.labels, entry.text, ", ".join(entry.only) or "-")
        for entry in TABLE
    ]
    name, text, of_calls = RPC_DURATION
    rows.append((name, "histogram", of_calls, text, "-"))
    lines = ["| metric | type | labels | what it says | only |", "| --- | --- | --- | --- | --- |"]
    for name, kind, of_metric, text, only in sorted(rows):
        words = ", ".join(f"`{label}`" for label in of_metric) or "-"
        lines.append(f"| `{name}` | {kind} | {words} | {text} | {only} |")
    return "\n".join(lines)
