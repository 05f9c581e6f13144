"""The XIDs that the driver can report, and what NVIDIA says is to be done at once.

From NVIDIA's XID catalogue as of October 2025, without unused codes: number, the "immediate action"
bucket (empty where the catalogue names none) and what happened. Read once, with the package.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple


class Xid(NamedTuple):
    """A row of the catalogue."""

    bucket: str
    event: str


def _catalogue(text: str) -> Iterator[tuple[int, Xid]]:
    for line in text.splitlines()[1:]:
        xid, bucket, event = line.split(",", 2)
        yield int(xid), Xid(bucket, event)


CATALOGUE: Mapping[int, Xid] = MappingProxyType(
    dict(_catalogue(Path(__file__).with_suffix(".csv").read_text("utf-8")))
)
