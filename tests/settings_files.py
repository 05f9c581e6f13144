"""What is written from the table of settings: a table of the docs, and three files of the chart.

Each function takes a file's text and gives it as it is to be. What people write in these files
stays: the chart's other values, and the form that `metrics.address` has there.
"""

import json
import re
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml

from vgpu_agent.address import parse_address
from vgpu_agent.settings import TABLE, allowed, kind_of, variable


class Value(NamedTuple):
    """A value of the chart that is a setting."""

    key: tuple[str, ...]
    variable: str
    nullable: bool
    yaml: str
    comment: str
    schema: dict[str, Any]


def chart_keys() -> dict[str, str]:
    """The key in values.yaml of each setting, such as mps.threads."""
    return {name: each.chart for name, each in TABLE.items()}


def values() -> Iterator[Value]:
    """All but those that the chart has in a form of its own."""
    for name, key in chart_keys().items():
        field, kind = TABLE[name], kind_of(name)
        if kind.schema is None:
            continue
        nullable, type_ = key.endswith("?"), kind.schema.get("type")
        yield Value(
            key=tuple(key.removesuffix("?").split(".")),
            variable=variable(name),
            nullable=nullable,
            yaml="null" if nullable else _yaml(field.default, type_),
            comment=_comment(name),
            schema={"$comment": variable(name), **_or_null(kind.schema)},
        )


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    """The same or null, which helm leaves in a pool: there too it is the default of the agent."""
    match schema:
        case {"enum": words}:
            return {"enum": [*words, None]}
        case {"anyOf": kinds}:
            return {"anyOf": [*kinds, {"type": "null"}]}
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    of_map = {each: _or_null(schema[each]) for each in ("additionalProperties",) if each in schema}
    return {**schema, "type": [*types, "null"], **of_map}


def _comment(name: str) -> str:
    """What it is, and what is allowed where that names something to write as it is."""
    keys = {variable(each): key.removesuffix("?") for each, key in chart_keys().items()}
    field, schema = TABLE[name], kind_of(name).schema or {}
    text = field.what
    if chart_keys()[name].endswith("?") and field.default:
        text += f" null: {field.default}."
    words = allowed(name).removesuffix(".")
    if re.search("`|such as", words) and schema.get("type") not in ("boolean", "array"):
        text += f" Allowed: {words}."
    return re.sub("VGPU_[A-Z_]+", lambda match: keys[match[0]], text)


def _yaml(text: str, type_: object) -> str:
    match type_:
        case "boolean":
            return {"on": "true", "off": "false"}[text]
        case "array":
            return f"[{', '.join(text.split(','))}]"
        case "object":
            return text or "{}"
    return text or '""'


def docs_table() -> str:
    """The table of docs/settings.md."""
    rows = [
        "| variable | default | allowed | what it is | value of the chart |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, key in sorted(chart_keys().items(), key=lambda each: variable(each[0])):
        field = TABLE[name]
        default = f"`{field.default}`" if field.default else "(empty)"
        rows.append(
            f"| `{variable(name)}` | {default} | {allowed(name)} | {field.what}"
            f" | {_code(key.removesuffix('?'))} |"
        )
    return "\n".join(rows)


def _code(key: str) -> str:
    return f"`{key}`" if key else "(downward API)"


# values.yaml


def values_yaml(text: str) -> str:
    """With the comment and the default of each setting; new ones at the end of their maps."""
    lines = text.splitlines()
    for value in values():
        indent = "  " * (len(value.key) - 1)
        comment = textwrap.wrap(f"-- {value.comment}", 98 - len(indent), break_on_hyphens=False)
        new = [f"{indent}# {line}" for line in comment]
        new.append(f"{indent}{value.key[-1]}: {value.yaml}")
        at = _lines_of_keys(lines)
        for depth in range(1, len(value.key)):
            if value.key[:depth] not in at:
                lines.append(f"{'  ' * (depth - 1)}{value.key[depth - 1]}:")
                at = _lines_of_keys(lines)
        if value.key in at:
            first = last = at[value.key]
            while lines[first - 1].startswith(f"{indent}# "):
                first -= 1
            lines[first : last + 1] = new
        else:
            group = value.key[:-1]
            after = max(line for key, line in at.items() if key[: len(group)] == group)
            lines[after + 1 : after + 1] = new
    return "\n".join(lines) + "\n"


def _lines_of_keys(lines: list[str]) -> dict[tuple[str, ...], int]:
    found: dict[tuple[str, ...], int] = {}
    path: tuple[str, ...] = ()
    for number, line in enumerate(lines):
        if key := re.match(r"((?:  )*)([A-Za-z][\w.-]*):", line):
            path = (*path[: len(key[1]) // 2], key[2])
            found[path] = number
    return found


# values.schema.json


def values_schema(text: str) -> str:
    """With the schema of each setting; what has a `$comment` is from here."""
    schema = json.loads(text)
    parts = schema["definitions"]
    every_pool = schema["properties"]["pools"]["items"]["properties"]
    for name, part in [*parts.items()]:
        _drop_own(part.get("properties", {}))
        if "$comment" in part:
            for each in (parts, every_pool, schema["properties"]):
                del each[name]
    for value in values():
        top, *rest = value.key
        reference = {"$ref": f"#/definitions/{top}"}
        if rest:
            group = parts.setdefault(
                top, {"type": ["object", "null"], "additionalProperties": False, "properties": {}}
            )
            group["properties"][rest[0]] = value.schema
        else:
            parts[top] = value.schema
        schema["properties"][top] = every_pool[top] = reference
    return _json(schema) + "\n"


def _drop_own(properties: dict[str, Any]) -> None:
    for name in [name for name, part in properties.items() if "$comment" in part]:
        del properties[name]


def _json(value: object, indent: str = "") -> str:
    """With two spaces, and on one line what fits and is no map of maps."""
    inner = indent + "  "
    line = json.dumps(value)
    if isinstance(value, dict) and (len(inner + line) > 80 or _depth(value) > 2):
        parts = [f"{inner}{json.dumps(key)}: {_json(each, inner)}" for key, each in value.items()]
        return "{\n" + ",\n".join(parts) + f"\n{indent}}}"
    if isinstance(value, list) and len(inner + line) > 80:
        parts = [f"{inner}{_json(each, inner)}" for each in value]
        return "[\n" + ",\n".join(parts) + f"\n{indent}]"
    return line


def _depth(value: object) -> int:
    within = value.values() if isinstance(value, dict) else value
    return 1 + max(map(_depth, within), default=0) if isinstance(value, dict | list) else 0


# templates/_settings.tpl


def _defaults() -> dict[str, Any]:
    """The default of every value of the chart that has one."""
    listens = parse_address(TABLE["metrics_address"].default)
    defaults: dict[str, Any] = {"metrics": {"address": listens.host, "port": listens.port}}
    for value in values():
        if not value.nullable:
            *group, name = value.key
            parent = defaults.setdefault(group[0], {}) if group else defaults
            parent[name] = yaml.safe_load(value.yaml)
    return defaults


ONLY_WITH = {"mps": 'eq .sharing "mps"', "simulated": 'eq .gpuDriver "simulated"'}
"""When the settings of a map of the chart are set at all."""


def settings_template(_: str) -> str:
    """The values of a pool by the names of their settings, as JSON."""
    groups: dict[str | None, list[str]] = {None: []}
    for value in sorted(values(), key=lambda each: each.variable):
        group = value.key[0] if value.key[0] in ONLY_WITH else None
        line = f"  {json.dumps(value.variable)} .{'.'.join(value.key)}"
        groups.setdefault(group, []).append(line)
    always = "\n".join(groups.pop(None))
    sometimes = "".join(
        f"{{{{- if {ONLY_WITH[str(group)]} }}}}{{{{ $settings = merge $settings (dict\n"
        + "\n".join(lines)
        + "\n) }}{{ end }}\n"
        for group, lines in groups.items()
    )
    return (
        "{{/* Written from vgpu_agent/settings.py by `python -m tests.readme`: the value of each"
        " setting, as JSON,\nand the values that are used where there is none. */}}\n"
        f'{{{{- define "vgpu-agent.defaults" -}}}}\n{_json(_defaults())}\n{{{{- end }}}}\n'
        '{{- define "vgpu-agent.settings" -}}\n'
        f"{{{{- $settings := dict\n{always}\n}}}}\n{sometimes}"
        "{{- toJson $settings }}\n{{- end }}\n"
    )
