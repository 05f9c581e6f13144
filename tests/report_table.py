"""The fields of /status.json for docs/status.md, from the classes that they are written from."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from vgpu_agent.observe import report

_SIMPLE = {str: "text", int: "number", float: "number", bool: "true or false"}


def markdown() -> str:
    """A section for each object, the report first."""
    return "\n\n".join(_section(each) for each in _objects(report.Report))


def _objects(kind: Any) -> Iterator[type]:
    """This class and those of its fields, each once."""
    found: dict[type, None] = {}

    def walk(kind: Any) -> None:
        if is_dataclass(kind) and isinstance(kind, type) and kind not in found:
            found[kind] = None
            for hint in get_type_hints(kind).values():
                walk(hint)
        for inner in get_args(kind):
            walk(inner)

    walk(kind)
    return iter(found)


def _section(kind: type) -> str:
    hints = get_type_hints(kind)
    rows = [f"| `{each.name}` | {_words(hints[each.name])} |" for each in fields(kind)]
    text = inspect.getdoc(kind) or ""
    head = [f"### {_name(kind)}", "", text, "", "| field | value |", "| --- | --- |"]
    return "\n".join([*head, *rows])


def _name(kind: type) -> str:
    """`GpuReport` is the object "GPU"."""
    words = re.findall("[A-Z][a-z]+", kind.__name__.replace("PodResources", "Podresources"))
    name = " ".join(words[:-1] if len(words) > 1 else words)
    return {"Gpu": "GPU", "Mps": "MPS", "Podresources": "PodResources"}.get(name, name)


def _words(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return " or ".join("null" if each is type(None) else _words(each) for each in inner)
    if origin is tuple:
        return f"list of {_words(inner[0])}"
    if origin is dict:
        return f"object: {_words(inner[1])} by {_words(inner[0])}"
    if is_dataclass(kind) and isinstance(kind, type):
        name = _name(kind)
        return f"[{name}](#{name.lower()})"
    if issubclass(kind, Enum):
        return " or ".join(f"`{each.value}`" for each in kind)
    return _SIMPLE[kind]
