"""A host and a port, as settings and the command line write them."""

import re
from typing import NamedTuple


class Address(NamedTuple):
    """Where to listen. Port 0 is any free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """Reads host:port or [IPv6]:port. Raises ValueError."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\s\[\]]+)):(\d{1,5})", text.strip())
    if match is None or int(match[3]) > 65535:
        raise ValueError
    return Address(match[1] or match[2], int(match[3]))
