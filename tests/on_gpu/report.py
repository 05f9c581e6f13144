"""What was found, on disk as it comes: whatever ends a run, report and transcript are whole.

A section, and each row of its tables, stands in the report as "not reached" until it is.
"""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NOT_REACHED = "not reached"
EMPTY, COMMA = b"[\n]\n", ",\n"


class Skip(Exception):  # noqa: N818 - no error: there is nothing to measure
    """Why a section does not run here."""


class Table:
    """A table whose rows are named before they are measured."""

    def __init__(self, out: "Out", title: str) -> None:
        self._out, self._title = out, title

    def row(self, name: str, *cells: object) -> None:
        self._out.event("row", table=self._title, name=name, cells=[str(each) for each in cells])

    def measure(self, rows: Mapping[str, Callable[[], Sequence[object]]]) -> None:
        """Fills them one after the other; one that fails says so, and the next is measured."""
        for name, measured in rows.items():
            try:
                self.row(name, *measured())
            except Skip as reason:
                self.row(name, f"not run: {reason}")
            except Exception as error:  # noqa: BLE001 - the other rows are worth having
                self._out.event("failed", row=name, text=repr(error))
                self.row(name, f"failed: {first_line(error)}")


@dataclass(frozen=True, slots=True)
class Out:
    """What a section has found: events, of which the report shows some."""

    send: Callable[[dict[str, Any]], None]

    def event(self, what: str, **values: Any) -> None:
        self.send({"what": what, **values})

    def say(self, text: str) -> None:
        self.event("say", text=text)

    def table(self, title: str, head: Sequence[str], rows: Sequence[str]) -> Table:
        self.event("table", table=title, head=list(head), rows=list(rows))
        return Table(self, title)


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


@dataclass(slots=True)
class _Table:
    head: list[str]
    rows: dict[str, list[str]]

    def lines(self) -> list[str]:
        width = len(self.head)
        whole = [self.head, ["---"] * width]
        whole += [[name, *cells] for name, cells in self.rows.items()]
        padded = [cells + [""] * (width - len(cells)) for cells in whole]
        return [f"| {' | '.join(_cell(cell) for cell in cells)} |" for cells in padded]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


@dataclass(slots=True)
class _Section:
    title: str
    status: str = NOT_REACHED
    said: list[str] = field(default_factory=list)
    tables: dict[str, _Table] = field(default_factory=dict)

    def lines(self) -> list[str]:
        lines = ["", f"## {self.title}", "", f"*{self.status}*"]
        if self.said:
            lines += ["", *(f"- {_cell(text)}" for text in self.said)]
        for title, table in self.tables.items():
            lines += ["", f"{title}:", "", *table.lines()]
        return lines


class Report:
    """`report.md` and `transcript.json` of a folder."""

    def __init__(self, folder: Path, title: str, sections: Mapping[str, str]) -> None:
        self._begun = time.monotonic()
        self._title = title
        self._sections = {name: _Section(title) for name, title in sections.items()}
        self._path = folder / "report.md"
        self._transcript = (folder / "transcript.json").open("wb")
        self._transcript.write(EMPTY)
        self.write()

    def status(self, name: str, text: str) -> None:
        self._sections[name].status = text
        print(f"-- {name}: {text}", flush=True)
        self.add(name, {"what": "status", "text": text})

    def add(self, name: str, event: dict[str, Any]) -> None:
        """Takes an event of that section."""
        at = round(time.monotonic() - self._begun, 3)
        # In the place of the bracket at the end: what is on disk is always a whole array.
        line = json.dumps({"at": at, "section": name, **event})
        first = self._transcript.tell() == len(EMPTY)
        self._transcript.seek(-2 if first else -3, os.SEEK_END)
        self._transcript.write(f"{'' if first else COMMA}{line}\n]\n".encode())
        self._transcript.flush()
        section = self._sections[name]
        match event["what"]:
            case "say":
                section.said.append(event["text"])
                print(event["text"], flush=True)
            case "table":
                rows = {row: [NOT_REACHED] for row in event["rows"]}
                section.tables[event["table"]] = _Table(event["head"], rows)
            case "row":
                section.tables[event["table"]].rows[event["name"]] = event["cells"]
                print(" | ".join([event["name"], *event["cells"]]), flush=True)
            case "status":
                pass
            case _:
                return
        self.write()

    def write(self) -> None:
        lines = [f"# {self._title}"]
        for section in self._sections.values():
            lines += section.lines()
        new = self._path.with_suffix(".new")
        new.write_text("\n".join(lines) + "\n")
        new.replace(self._path)
