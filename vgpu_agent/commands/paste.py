"""Commands as people paste them: each below a comment, and folded where a shell reads on."""

from collections.abc import Iterable, Iterator

from rich.text import Text

from vgpu_agent.model.advice import Step


def command_lines(steps: Iterable[Step], width: int, indent: str) -> Iterator[str]:
    """Lines of at most so many columns, as far as their words are short enough."""
    for step in steps:
        yield from _folded(f"# {step.words}", width, indent, indent + "# ", "")
        yield from _folded(step.command, width, indent, indent + "  ", " \\")


def commands_text(steps: Iterable[Step], width: int, indent: str) -> Text:
    """The same for a terminal."""
    return Text("\n".join(command_lines(steps, width, indent)), overflow="fold")


def _folded(text: str, width: int, first: str, next_: str, end: str) -> Iterator[str]:
    line = first
    for word in text.split(" "):
        if line.strip() and len(f"{line}{word} {end}") > width:
            yield line.rstrip() + end
            line = next_
        line += f"{word} "
    yield line.rstrip()
