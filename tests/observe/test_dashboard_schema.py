"""The dashboards by Grafana's own schemas, of Grafana 11.6; no Grafana has opened them.

What a schema does not know is lost on the way through its classes. Values of enumerations are not
judged by the classes, so they are judged here.
"""

import copy
import json
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any, get_args, get_type_hints

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.cog.runtime import panelcfg_config
from grafana_foundation_sdk.models.dashboard import Dashboard

from tests.observe.rules import DASHBOARDS, dashboard

Json = dict[str, Any]


def lost(given: object, kept: object, path: str = "") -> Iterator[str]:
    """Where `kept` has something else than `given`, or nothing."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            yield from lost(value, kept.get(key, "nothing"), f"{path}.{key}")
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for number, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from lost(one, other, f"{path}[{number}]")
    elif given != kept:
        yield f"{path}: {given!r}, kept: {kept!r}"


def strangers(value: object, path: str = "") -> Iterator[str]:
    """Values of attributes that are none of their enumeration."""
    if isinstance(value, list):
        for number, each in enumerate(value):
            yield from strangers(each, f"{path}[{number}]")
    elif type(value).__module__.startswith("grafana_foundation_sdk.models"):
        if isinstance(value, Enum):
            return
        for name, hint in get_type_hints(type(value)).items():
            found = getattr(value, name, None)
            kinds = [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type)]
            allowed = [each.value for kind in kinds if issubclass(kind, Enum) for each in kind]
            if allowed and found is not None and found not in allowed:
                yield f"{path}.{name}: {found!r} is none of {allowed}"
            yield from strangers(found, f"{path}.{name}")


def complaints(board: Json) -> list[str]:
    """What a dashboard has that Grafana's schemas do not know."""
    register_default_plugins()
    unknown = [
        f"a panel of type {panel['type']!r}"
        for panel in board["panels"]
        if panel["type"] != "row" and panelcfg_config(panel["type"]) is None
    ]
    parsed = Dashboard.from_json(copy.deepcopy(board))
    kept = json.loads(JSONEncoder().encode(parsed))
    return [*unknown, *lost(board, kept), *strangers(parsed)]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_has_nothing_that_the_schemas_of_grafana_do_not_know(path):
    assert complaints(dashboard(path)) == []


def _first(board: Json, kind: str) -> Json:
    return next(panel for panel in board["panels"] if panel["type"] == kind)


@pytest.mark.parametrize(
    ("break_it", "word"),
    [
        (lambda board: board.update(colour=1), ".colour"),
        (lambda board: board.update(graphTooltip=7), "cursor_sync|graph_tooltip"),
        (lambda board: _first(board, "stat").update(caption="x"), ".caption"),
        (lambda board: _first(board, "stat").update(type="statt"), "'statt'"),
        (lambda board: _first(board, "stat")["options"].update(colour=1), ".options.colour"),
        (lambda board: _first(board, "stat")["options"].update(colorMode="red"), "color_mode"),
        (lambda board: _first(board, "stat")["targets"][0].update(expression="x"), ".expression"),
        (
            lambda board: _first(board, "timeseries")["fieldConfig"]["defaults"]["custom"].update(
                drawStyle="dots"
            ),
            "draw_style",
        ),
    ],
    ids=range(8),
)
def test_what_grafana_would_not_understand_is_found(break_it: Callable[[Json], None], word: str):
    board = copy.deepcopy(dashboard(DASHBOARDS[0]))
    break_it(board)
    assert any(part in line for line in complaints(board) for part in word.split("|"))
