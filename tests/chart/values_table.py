"""The values of the chart as a table, from values.yaml and its comments."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

VALUES = Path(__file__).parents[2] / "charts/vgpu-agent/values.yaml"


def markdown_table() -> str:
    """Each key that a comment stands before, with its default."""
    text = VALUES.read_text("utf-8")
    values = yaml.safe_load(text)
    rows = ["| key | default | what it is |", "| --- | --- | --- |"]
    for path, what in documented(text):
        default = values
        for key in path:
            default = default[key]
        shown = default if isinstance(default, str) and default else json.dumps(default)
        rows.append(f"| `{'.'.join(path)}` | `{shown}` | {what} |")
    return "\n".join(rows)


def documented(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """The keys that follow a comment which begins with `# -- `, and that comment to its end."""
    above: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in text.splitlines():
        said = re.fullmatch(r" *# (-- )?(.*)", line)
        key = re.match(r"( *)([A-Za-z][\w.-]*):", line)
        if said:
            comment = [said[2]] if said[1] else [*comment, said[2]] if comment else []
            continue
        if key:
            indent = len(key[1])
            above = [*(each for each in above if each[0] < indent), (indent, key[2])]
            if comment:
                yield tuple(name for _, name in above), " ".join(comment)
        comment = []
