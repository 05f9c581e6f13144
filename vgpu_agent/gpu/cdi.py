"""Which GPUs the host's CDI specs name, and whether the hook for memory limits comes with them.

What they do not name a container cannot be given. Specs are YAML or JSON files in two directories
of the host (Container Device Interface specification); JSON is YAML too.
"""

import json
import logging
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vgpu_agent import store
from vgpu_agent.errors import StoreError, StoreShortageError
from vgpu_agent.unixsocket import Identity

try:
    from yaml import CSafeLoader as SafeLoader  # ten times as fast
except ImportError:
    from yaml import SafeLoader

log = logging.getLogger(__name__)

MAX_BYTES = 2**22
"""A node with many GPUs and MIG devices has a spec of some hundred KiB."""

MAX_DEPTH = 64
"""Lists and mappings inside each other; a spec has some eight."""

HOOK = "apply-cuda-memory-limits"
"""The container toolkit's hook (1.20.1), an argument of its program, which sets memory limits."""

MAX_LOOKED_AT = 32
"""Hooks, and arguments of each; a spec has some five hooks, whose name is their second argument.

YAML can repeat a long list without end.
"""

DIRECTORIES = (Path("/etc/cdi"), Path("/var/run/cdi"))


@dataclass(frozen=True, slots=True)
class _Spec:
    """A file as it was read: the names of its devices of the kind.

    `limits_memory`: it has no device without the hook. Of one that cannot be read that is not
    known.
    """

    identity: Identity
    names: frozenset[str] = frozenset()
    limits_memory: bool = False


_UNREAD = Identity(-1, -1, -1)
"""Of no file."""


class CdiSpecs:
    """The specs of the host. Each is read once for as long as its file is the same."""

    def __init__(self, kind: str, directories: Iterable[Path] = DIRECTORIES) -> None:
        self._kind = kind
        self._directories = tuple(directories)
        self._read: dict[Path, _Spec] = {}

    def names(self) -> frozenset[str]:
        """The names of all devices of the kind. Blocks. A spec that cannot be read has none.

        Where no directory can be looked at now (out of descriptors) they are as they were.
        """
        self._look()
        return frozenset().union(*(spec.names for spec in self._read.values()))

    def limits_memory(self) -> bool:
        """Whether every device of the kind comes with the hook that sets memory limits. Blocks.

        A file that cannot be read may name one without.
        """
        self._look()
        specs = self._read.values()
        return any(spec.names for spec in specs) and all(spec.limits_memory for spec in specs)

    def _look(self) -> None:
        with suppress(OSError):
            paths = [path for each in self._directories for path in sorted(each.glob("*"))]
            self._read = {
                path: self._of(path) for path in paths if path.suffix in (".yaml", ".json")
            }

    def _of(self, path: Path) -> _Spec:
        try:
            identity = Identity.of(path.stat())
        except OSError as error:
            # A link that leads nowhere is a file of its own.
            identity = Identity(0, 0, error.errno or 0)
        known = self._read.get(path)
        if known is not None and known.identity == identity:
            return known
        try:
            return _read(path, self._kind, identity)
        except StoreShortageError:
            return known or _Spec(_UNREAD)  # the next look reads it
        except _WRONG as error:
            words = f"CDI spec {path} cannot be read: {type(error).__name__}: {error}"
            log.warning("%s", words[:500])
            return _Spec(identity)


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


def _read(path: Path, kind: str, identity: Identity) -> _Spec:
    """Raises one of `_WRONG`."""
    spec = _parsed(store.read_bytes(path, MAX_BYTES) or b"")
    if spec["kind"] != kind:
        return _Spec(identity, limits_memory=True)
    names = [device["name"] for device in spec["devices"]]
    if not all(isinstance(name, str | int) for name in names):
        raise TypeError("a device has a name that is no text")  # YAML can nest without end
    limited = _has_hook(spec) or all(map(_has_hook, spec["devices"]))
    return _Spec(identity, frozenset(map(str, names)), limited)


class _Loader(SafeLoader):  # type: ignore[misc]  # yaml has no types
    """Without merge keys (`<<`), by which a few lines can make keys without end."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Leaves them as they are, which is an error."""


def _parsed(content: bytes) -> Any:
    """What JSON or YAML says. Probes wait for it, so it is to be quick. Raises one of `_WRONG`."""
    with suppress(ValueError, RecursionError):
        return json.loads(content)
    depth = 0
    for event in yaml.parse(content, Loader=_Loader):  # what loads it is not safe from depth
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    return yaml.load(content, Loader=_Loader)  # noqa: S506 - it is a SafeLoader


def _has_hook(edited: dict[str, object]) -> bool:
    """Whether the container edits of a spec or of a device have the hook, whatever they are."""
    edits = edited.get("containerEdits")
    hooks = edits.get("hooks") if isinstance(edits, dict) else None
    for hook in hooks[:MAX_LOOKED_AT] if isinstance(hooks, list) else ():
        args = hook.get("args") if isinstance(hook, dict) else None
        if isinstance(args, list) and HOOK in args[:MAX_LOOKED_AT]:
            return True
    return False
