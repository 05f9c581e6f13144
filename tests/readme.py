"""Puts the table of all settings into README.md: `python -m tests.readme`.

It goes between the lines `<!-- settings -->` and `<!-- /settings -->`, which README.md has once.
"""

from pathlib import Path

from vgpu_agent.settings import markdown_table

README = Path(__file__).parents[1] / "README.md"
BEGIN = "<!-- settings -->"
END = "<!-- /settings -->"


def with_table(text: str) -> str:
    """The text with the table as it is now. Raises ValueError where the markers are not right."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{README.name} needs {BEGIN} and then {END}, once each")
    return f"{before}{BEGIN}\n{markdown_table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text("utf-8")), "utf-8")
