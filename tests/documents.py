"""The documents of the repository, in their parts, and the commands that they tell to type."""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path
    for path in [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
        *(ROOT / "charts").rglob("*.md"),
    ]
}
TEXTS = DOCUMENTS | {
    path.relative_to(ROOT).as_posix(): path for path in (ROOT / "examples").rglob("*.yaml")
}
"""Documents, and the examples with their comments."""


@dataclass(frozen=True, slots=True)
class Document:
    """A document in its parts: prose with its inline code, that code, and fenced lines.

    What is fenced as `text` is what programs say, and nobody types it.
    """

    prose: tuple[str, ...]
    spans: tuple[str, ...]
    fenced: tuple[str, ...]

    @property
    def code(self) -> str:
        return "\n".join((*self.spans, *self.fenced))


@cache
def read(path: Path) -> Document:
    fenced: list[str] = []
    prose: list[str] = []
    said: list[str] = []
    inside: list[str] | None = None
    for line in path.read_text("utf-8").splitlines():
        if not line.lstrip().startswith("```"):
            (prose if inside is None else inside).append(line)
        elif inside is not None:
            inside = None
        else:
            inside = said if line.strip() == "```text" else fenced
    assert inside is None, f"{path.name}: a fence is not closed"
    # Before spans: a command may go over lines.
    found = re.findall(r"`([^`]+)`", "\n".join(prose))
    spans = tuple(re.sub(r"\s+", " ", span) for span in found)
    joined = "\n".join(fenced).replace("\\\n", " ")
    return Document(tuple(prose), spans, tuple(joined.splitlines()))


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(
        rf"^```{language}\n(.*?)^```$", path.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )


def commands(document: Document, program: str) -> Iterator[tuple[str, ...]]:
    """The words of each command of a program, also of one in a pipe; quotes may go over lines."""
    for text in (*document.spans, *_whole(document.fenced)):
        if not re.search(rf"(?:^|[\s|(]){program}\s", text):
            continue
        for words in _split(text):
            if words[0] == program:
                yield words[1:]


def _whole(lines: Sequence[str]) -> Iterator[str]:
    """Lines, those joined that a quote holds together."""
    waiting = ""
    for line in lines:
        text = f"{waiting}\n{line}" if waiting else line
        try:
            shlex.split(text)
        except ValueError:
            waiting = text
        else:
            yield text
            waiting = ""


def _split(text: str) -> Iterator[tuple[str, ...]]:
    """The simple commands of a line."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    try:
        for word in [*lexer, "|"]:
            if re.fullmatch(r"[();<>|&]+", word):
                if words:
                    yield tuple(words)
                words = []
            else:
                words.append(word)
    except ValueError:  # an apostrophe: prose, not a command
        return
