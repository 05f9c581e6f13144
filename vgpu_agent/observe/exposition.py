"""Families as text, in Prometheus's format or in OpenMetrics 1, byte for byte as the library does.

prometheus_client looks at every label of every sample as if it might be of any kind: 2400 samples
take it 17 ms, and 50 ms as OpenMetrics. Ours are counters, gauges and histograms with plain names.
"""

from collections.abc import Iterable

from prometheus_client.core import Metric
from prometheus_client.utils import floatToGoString


def exposed(families: Iterable[Metric], *, in_openmetrics: bool) -> bytes:
    """The text of the families, whose names and labels are plain ones."""
    lines: list[str] = []
    escaped: dict[str, str] = {}
    for family in families:
        text = family.documentation.replace("\\", r"\\").replace("\n", r"\n")
        name = family.name
        if in_openmetrics:
            text = text.replace('"', r"\"")
        elif family.type == "counter":
            name += "_total"
        lines += (f"# HELP {name} {text}", f"# TYPE {name} {family.type}")
        for sample in family.samples:
            pairs = []
            for label in sorted(sample.labels):
                value = sample.labels[label]
                if value not in escaped:
                    escaped[value] = _escaped(value)
                pairs.append(f'{label}="{escaped[value]}"')
            labels = f"{{{','.join(pairs)}}}" if pairs else ""
            number = floatToGoString(sample.value)  # type: ignore[no-untyped-call]
            lines.append(f"{sample.name}{labels} {number}")
    if in_openmetrics:
        lines.append("# EOF")
    return "".join(f"{line}\n" for line in lines).encode()


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
