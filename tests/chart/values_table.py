"""The values of the chart as a table, from values.yaml and its comments."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from vgpu_agent import settings

VALUES = Path(__file__).parents[2] / "charts/vgpu-agent/values.yaml"


def keys() -> dict[str, str]:
    """The value of each setting, such as mps.threads and health.driverWait, by its field."""
    paths = [path for path, _ in documented(VALUES.read_text("utf-8"))]
    whole = {"".join(path).lower(): ".".join(path) for path in paths}
    last = {path[-1].lower(): ".".join(path) for path in paths}
    plain = {name: name.replace("_", "") for name in settings.Settings.model_fields}
    return {name: whole.get(words) or last[words] for name, words in sorted(plain.items())}


def settings_table() -> str:
    """The table of settings, with the value of the chart that sets each."""
    rows = settings.markdown_table().splitlines()
    reached = {settings.variable(name): value for name, value in keys().items()}
    for number, row in enumerate(rows):
        setting = row.split("`")[1] if number > 1 else ""
        extra = ("value of the chart", "---")[number] if number < 2 else f"`{reached[setting]}`"
        rows[number] = f"{row} {extra} |"
    return "\n".join(rows)


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
