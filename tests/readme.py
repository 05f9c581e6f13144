"""Puts the generated tables into the documents: `python -m tests.readme`.

Each goes between the lines `<!-- name -->` and `<!-- /name -->`, which its document has once.
"""

from collections.abc import Callable
from pathlib import Path

from tests import metrics_table
from tests.chart import values_table
from vgpu_agent.gpu import health

ROOT = Path(__file__).parents[1]

TABLES: dict[Path, tuple[str, Callable[[], str]]] = {
    ROOT / "docs/settings.md": ("settings", values_table.settings_table),
    ROOT / "docs/metrics.md": ("metrics", metrics_table.markdown_table),
    ROOT / "docs/health.md": ("policy", health.markdown_table),
    ROOT / "charts/vgpu-agent/README.md": ("values", values_table.markdown_table),
}


def with_table(document: Path) -> str:
    """The document with its table as it is now. Raises ValueError where its markers are wrong."""
    text = document.read_text("utf-8")
    name, table = TABLES[document]
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{document.name} needs {begin} and then {end}, once each")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{table()}\n{end}{rest.partition(end)[2]}"


if __name__ == "__main__":
    for each in TABLES:
        each.write_text(with_table(each), "utf-8")
