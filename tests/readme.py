"""Rewrites the generated parts of README.md: `python -m tests.readme`."""

import re
from pathlib import Path

from vgpu_agent import settings

README = Path(__file__).parents[1] / "README.md"


def with_tables(text: str) -> str:
    """The text with its generated parts up to date."""
    table = f"<!-- settings -->\n{settings.markdown_table()}\n<!-- /settings -->"
    return re.sub(
        r"<!-- settings -->.*<!-- /settings -->", lambda _: table, text, flags=re.DOTALL
    )


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
