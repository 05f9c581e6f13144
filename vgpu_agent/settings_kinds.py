"""The kinds of settings: each says once what is allowed, to people, to the parser and to the chart.

A kind stands in the annotation of a setting, `Annotated[int, whole(1, 1024)]`. A word of an enum
needs none: `choice` is its kind.
"""

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from vgpu_agent.address import Address, parse_address
from vgpu_agent.model.rules import MIB, Threads

Schema = dict[str, object]

_MAX_BYTES = 2**63
"""More than any GPU has; what a signed number on any wire cannot hold."""


@dataclass(frozen=True)
class Kind:
    """What a setting may be.

    `words` says it to people, `schema` is the JSON schema of the chart's value; None where the
    chart has a form of its own. `parse` makes a value of text, `check` says whether a value is
    allowed; both may raise what Python raises. In between the annotated type is made of the value.
    """

    words: str
    schema: Schema | None
    parse: Callable[[str], object] = str
    check: Callable[[Any], bool] = lambda _: True

    def parsed(self, value: object) -> object:
        """The value of text; what is a value already stays. Raises ValueError and TypeError."""
        try:
            return self.parse(value) if isinstance(value, str) else value
        except (ArithmeticError, LookupError, RecursionError) as error:
            raise ValueError from error

    def checked(self, value: object) -> object:
        """The same value. Raises ValueError and TypeError."""
        if not self.check(value):
            raise ValueError
        return value


def choice(words: type[StrEnum]) -> Kind:
    """One of these words."""
    return Kind(_listed(words), {"enum": [str(word) for word in words]})


def whole(least: int, most: int) -> Kind:
    """A whole number."""
    return Kind(
        f"a whole number from {least} to {most}",
        {"type": "integer", "minimum": least, "maximum": most},
        check=lambda value: least <= value <= most,
    )


def number(words: str, bound: Schema, pattern: str, check: Callable[[float], bool]) -> Kind:
    """A number, whole or not; in the chart also such text: helm's `--set` makes it of 1.5."""
    schema: Schema = {"type": ["number", "string"], **bound, "pattern": f"^{pattern}$"}
    return Kind(words, schema, check=check)


def matching(words: str, pattern: str, check: Callable[[str], bool] = lambda _: True) -> Kind:
    """Text of this form."""
    return Kind(
        words,
        {"type": "string", "pattern": f"^{pattern}$"},
        check=lambda text: re.fullmatch(pattern, text) is not None and check(text),
    )


def size(least: int, words: str, pattern: str = r"[0-9]+(\.[0-9]+)?([KMGT]i?)?B?") -> Kind:
    """A Kubernetes quantity of bytes, such as 8Gi; a bare number is bytes."""
    schema: Schema = {"type": ["string", "integer"], "minimum": least, "pattern": f"^{pattern}$"}
    return Kind(words, schema, _bytes, lambda value: least <= value < _MAX_BYTES)


_UNITS = {"": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("i", 1024), ("", 1000))
}


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?i?)B?", text.strip())
    if match is None:
        raise ValueError
    return int(Decimal(match[1]) * _UNITS[match[2]])


def or_word(kind: Kind, words: dict[str, object]) -> Kind:
    """The other kind, or one of these words, which mean these values."""
    return replace(
        kind,
        words=_listed(words, kind.words),
        schema={"anyOf": [{"enum": list(words)}, kind.schema]},
        parse=lambda text: words[text] if text in words else kind.parse(text),
        check=lambda value: value in words.values() or kind.check(value),
    )


def or_nothing(kind: Kind) -> Kind:
    """The other kind, or empty text for None."""
    words = f"nothing, or {kind.words}"
    return replace(or_word(kind, {"": None}), words=words, schema=kind.schema)


def _listed(words: Iterable[str], *last: str) -> str:
    """Words to write and what else there is, as `a`, `b` or last."""
    *most, end = [*(f"`{word}`" for word in words), *last]
    return f"{', '.join(most)} or {end}"


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


_LABEL = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"

_HOST = "[A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?"

_ABOVE_0 = r"([1-9][0-9]*(\.[0-9]+)?|0\.[0-9]*[1-9][0-9]*)"

_ON_OFF = {"on": True, "off": False}
_PATH: Schema = {"type": "string", "pattern": "^(/[A-Za-z0-9_-][A-Za-z0-9._-]*)+$"}

Switch = Annotated[bool, Kind(_listed(_ON_OFF), {"type": "boolean"}, _ON_OFF.__getitem__)]
Seconds = Annotated[
    float,
    number(
        "a number of seconds from 1",
        {"minimum": 1},
        r"[1-9][0-9]*(\.[0-9]+)?",
        lambda value: 1 <= value < math.inf,
    ),
]
AbsolutePath = Annotated[Path, Kind("an absolute path", _PATH, check=Path.is_absolute)]
OptionalPath = Annotated[
    Path | None, or_nothing(Kind("an absolute path", _PATH, Path, Path.is_absolute))
]
Xids = Annotated[
    frozenset[int],
    Kind(
        "XID numbers separated by commas, or nothing",
        {"type": "array", "items": {"type": "integer", "minimum": 0}},
        lambda text: frozenset(int(word) for word in _words(text) if word),
        lambda xids: min(xids, default=0) >= 0,
    ),
]
ListenAddress = Annotated[
    Address,
    Kind("host:port or [IPv6]:port, port 0 (any free) to 65535", None, parse_address),
]
HostNames = Annotated[
    frozenset[str],
    Kind(
        "host names separated by commas, or nothing",
        {"type": "array", "items": {"type": "string", "pattern": f"^{_HOST}$"}},
        lambda text: frozenset(word.lower() for word in _words(text) if word),
        lambda names: all(re.fullmatch(_HOST, name) for name in names),
    ),
]
Replicas = Annotated[int, whole(1, 1024)]
ReplicasByGpu = Annotated[
    dict[str, int],
    Kind(
        'nothing, or a JSON object such as `{"0": 4, "GPU-...": 1, "NVIDIA L4": 0}`: index, UUID'
        " or model name to a number from 0 to 1024",
        {"type": "object", "additionalProperties": whole(0, 1024).schema},
        lambda text: json.loads(text) if text.strip() else {},
        lambda counts: all(0 <= count <= 1024 for count in counts.values()),
    ),
]
MaxClients = Annotated[int | None, or_word(whole(1, 1024), {"auto": None})]
DeviceMemory = Annotated[
    int | None,
    or_nothing(
        size(
            MIB,
            "a size from 1Mi, such as 8Gi",
            r"([1-9][0-9]*(\.[0-9]+)?[MGT]i?|0\.[0-9]*[1-9][0-9]*[GT]i?|[1-9][0-9]{6,})B?",
        )
    ),
]
Reserved = Annotated[int | None, or_word(size(0, "a size such as 512Mi"), {"auto": None})]
SimulatedMemory = Annotated[
    int,
    size(1, "a size such as 24Gi", rf"{_ABOVE_0}([KMGT]i?)?B?"),
]
ThreadLimit = Annotated[
    Threads | float,
    or_word(
        number(
            "a factor above 0",
            {"exclusiveMinimum": 0},
            _ABOVE_0,
            lambda value: 0 < value < math.inf,
        ),
        {"share": Threads.SHARE, "none": Threads.NONE},
    ),
]
ResourceName = Annotated[
    str,
    matching(
        "an extended resource domain/name, not of kubernetes.io, not beginning with requests.",
        rf"{_LABEL}(\.{_LABEL})*/[A-Za-z0-9]([-_.A-Za-z0-9]{{0,61}}[A-Za-z0-9])?",
        # As the kubelet checks it (`IsExtendedResourceName`).
        lambda name: (
            len("requests." + name.partition("/")[0]) <= 253
            and "kubernetes.io/" not in name
            and not name.startswith("requests.")
        ),
    ),
]
ObjectName = Annotated[
    str,
    Kind(
        "nothing, or a name as Kubernetes allows it: lower-case letters, digits, - and .",
        None,
        check=lambda name: (
            len(name) <= 253 and re.fullmatch(rf"({_LABEL}(\.{_LABEL})*)?", name) is not None
        ),
    ),
]
CdiKind = Annotated[
    str,
    matching(
        "vendor/class, such as nvidia.com/gpu",
        "[a-z0-9][a-z0-9.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*",
    ),
]
Name = Annotated[
    str,
    Kind("any text", {"type": "string", "minLength": 1}, check=lambda text: text.encode() != b""),
]
GpuCount = Annotated[int, whole(0, 64)]
NumaNodes = Annotated[
    tuple[int | None, ...],
    Kind(
        "numbers from 0, or `none`, separated by commas",
        {
            "type": "array",
            "minItems": 1,
            "items": {"anyOf": [{"type": "integer", "minimum": 0}, {"enum": ["none"]}]},
        },
        lambda text: tuple(None if word == "none" else int(word) for word in _words(text)),
        lambda nodes: bool(nodes) and all(node is None or node >= 0 for node in nodes),
    ),
]
