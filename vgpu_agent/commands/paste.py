"""Commands as people paste them: each below a comment, and folded where a shell reads on."""

from collections.abc import Iterable, Iterator

from vgpu_agent.model.place import Step


def command_lines(steps: Iterable[Step], width: int, indent: str) -> Iterator[str]:
    """Lines of at most so many columns, as far as their words are short enough."""
    for step in steps:
        yield from folded(f"# {step.words}", width, indent, indent + "# ")
        yield from folded(step.command, width, indent, indent + "  ", " \\")


def folded(text: str, width: int, first: str, next_: str, end: str = "") -> Iterator[str]:
    """Text in lines that begin so, and end so where it goes on."""
    line, empty = first, True
    for word in text.split(" "):
        if not empty and len(f"{line}{word} {end}") > width:
            yield line.rstrip() + end
            line = next_
        line, empty = f"{line}{word} ", False
    yield line.rstrip()
