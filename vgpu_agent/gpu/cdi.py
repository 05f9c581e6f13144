"""Which GPUs the host's CDI specs name: what they do not name a container cannot be given.

Specs are YAML or JSON files in two directories of the host (Container Device Interface
specification); JSON is YAML too.
"""

import logging
from collections.abc import Iterable
from pathlib import Path

import yaml

from vgpu_agent import store
from vgpu_agent.errors import StoreError

log = logging.getLogger(__name__)

MAX_BYTES = 2**22
"""A node with many GPUs and MIG devices has a spec of some hundred KiB."""

DIRECTORIES = (Path("/etc/cdi"), Path("/var/run/cdi"))


class CdiSpecs:
    """The specs of the host, and what was wrong with them when it was logged last."""

    def __init__(self, kind: str, directories: Iterable[Path] = DIRECTORIES) -> None:
        self._kind = kind
        self._directories = tuple(directories)
        self._wrong: dict[Path, str] = {}

    def names(self) -> frozenset[str]:
        """The names of all devices of the kind. Blocks. A spec that cannot be read has none.

        That is logged once for as long as the same is wrong with it.
        """
        names: set[str] = set()
        wrong: dict[Path, str] = {}
        for directory in self._directories:
            for path in sorted(directory.glob("*")):
                if path.suffix not in (".yaml", ".json"):
                    continue
                try:
                    names |= _devices_of(path, self._kind)
                except _WRONG as error:
                    wrong[path] = f"CDI spec {path} cannot be read: {type(error).__name__}: {error}"
        for path, words in wrong.items():
            if self._wrong.get(path) != words:
                log.warning("%s", words[:500])
        self._wrong = wrong
        return frozenset(names)


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
    return {str(device["name"]) for device in spec["devices"]}
