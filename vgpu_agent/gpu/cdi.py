"""Which GPUs the host's CDI specs name: what they do not name a container cannot be given.

Specs are YAML or JSON files in two directories of the host (Container Device Interface
specification); JSON is YAML too.
"""

import logging
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import yaml

from vgpu_agent import store
from vgpu_agent.errors import StoreError
from vgpu_agent.unixsocket import Identity

log = logging.getLogger(__name__)

MAX_BYTES = 2**22
"""A node with many GPUs and MIG devices has a spec of some hundred KiB."""

DIRECTORIES = (Path("/etc/cdi"), Path("/var/run/cdi"))


class CdiSpecs:
    """The specs of the host. Each is read once for as long as its file is the same."""

    def __init__(self, kind: str, directories: Iterable[Path] = DIRECTORIES) -> None:
        self._kind = kind
        self._directories = tuple(directories)
        self._read: dict[Path, tuple[Identity, frozenset[str]]] = {}

    def names(self) -> frozenset[str]:
        """The names of all devices of the kind. Blocks. A spec that cannot be read has none.

        Where no directory can be looked at now (out of descriptors) they are as they were.
        """
        with suppress(OSError):
            paths = [path for each in self._directories for path in sorted(each.glob("*"))]
            self._read = {
                path: self._of(path) for path in paths if path.suffix in (".yaml", ".json")
            }
        return frozenset().union(*(names for _, names in self._read.values()))

    def _of(self, path: Path) -> tuple[Identity, frozenset[str]]:
        """Which file it is, and its devices."""
        try:
            identity = Identity.of(path.stat())
        except OSError as error:
            # A link that leads nowhere is a file of its own.
            identity = Identity(0, 0, error.errno or 0)
        known = self._read.get(path)
        if known is not None and known[0] == identity:
            return known
        try:
            return identity, frozenset(_devices_of(path, self._kind))
        except _WRONG as error:
            words = f"CDI spec {path} cannot be read: {type(error).__name__}: {error}"
            log.warning("%s", words[:500])
            return identity, frozenset()


_WRONG = (
    StoreError,
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RecursionError,
    yaml.YAMLError,
)


def _devices_of(path: Path, kind: str) -> set[str]:
    """Raises one of `_WRONG`."""
    spec = yaml.safe_load(store.read_bytes(path, MAX_BYTES) or b"")
    if spec["kind"] != kind:
        return set()
    names = [device["name"] for device in spec["devices"]]
    if not all(isinstance(name, str | int) for name in names):
        raise TypeError("a device has a name that is no text")  # YAML can nest without end
    return set(map(str, names))
