"""Writes what is generated of docs and chart: `python -m tests.readme`.

A table goes between the lines `<!-- name -->` and `<!-- /name -->`, which its document has once.
"""

from collections.abc import Callable
from pathlib import Path

from tests import metrics_table, policy_table, report_table, settings_files, sizes_table
from tests.chart import values_table
from tests.faults import promises
from tests.observe import scenarios

ROOT = Path(__file__).parents[1]
CHART = ROOT / "charts/vgpu-agent"


def table(name: str, make: Callable[[], str]) -> Callable[[str], str]:
    """Puts it into its document's text. Raises ValueError where its markers are wrong."""

    def put(text: str) -> str:
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"needs {begin} and then {end}, once each")
        before, _, rest = text.partition(begin)
        return f"{before}{begin}\n{make()}\n{end}{rest.partition(end)[2]}"

    return put


FILES: dict[Path, Callable[[str], str]] = {
    ROOT / "docs/settings.md": table("settings", settings_files.docs_table),
    ROOT / "docs/alerts.md": table("alerts", scenarios.markdown_table),
    ROOT / "docs/metrics.md": table("metrics", metrics_table.markdown_table),
    ROOT / "docs/status.md": table("report", report_table.markdown),
    ROOT / "docs/sizing.md": table("sizes", sizes_table.markdown_table),
    ROOT / "docs/health.md": table("policy", policy_table.markdown_table),
    ROOT / "docs/reliability.md": table("promises", promises.markdown_table),
    CHART / "values.yaml": settings_files.values_yaml,
    CHART / "values.schema.json": settings_files.values_schema,
    CHART / "templates/_settings.tpl": settings_files.settings_template,
    # After values.yaml, which it is made of.
    CHART / "README.md": table("values", values_table.markdown_table),
}
"""What each file is to say, from what it says."""


if __name__ == "__main__":
    for path, write in FILES.items():
        path.write_text(write(path.read_text("utf-8")), "utf-8")
