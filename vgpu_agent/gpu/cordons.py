"""Which GPUs an operator took out of service: a file for each, in VGPU_CORDON_DIRECTORY.

The name of the file is the GPU's UUID, so a file that is damaged loses the reason, and not the
cordon. The files outlive the agent and the boot.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Never

import anyio
from anyio.abc import TaskStatus

from vgpu_agent import store
from vgpu_agent.errors import StoreError, StoreShortageError
from vgpu_agent.gpu.memory import LATEST
from vgpu_agent.model.facts import Cordon
from vgpu_agent.model.node import MAX_UNLISTED, Node
from vgpu_agent.threads import in_thread

MAX_REASON = 200
"""Letters of a reason."""

INTERVAL = 30.0
"""Seconds between two looks at the directory: it may come back, and somebody may tidy it up."""

_FILE = re.compile(r"([A-Za-z0-9-]{1,80})\.json")


def load(directory: Path) -> Mapping[str, Cordon]:
    """The cordons by UUID. Blocks. Raises StoreError where the directory cannot be read."""
    try:
        names = sorted(each.name for each in directory.iterdir())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StoreError(f"cannot read {directory}: {error.strerror or error}") from error
    uuids = [match[1] for match in map(_FILE.fullmatch, names) if match]
    if len(uuids) > MAX_UNLISTED:
        raise StoreError(f"{directory} has {len(uuids)} files; allowed are {MAX_UNLISTED}")
    found = {uuid: _load(_path(directory, uuid)) for uuid in uuids}
    return {uuid: cordon for uuid, cordon in found.items() if cordon is not None}


def _path(directory: Path, uuid: str) -> Path:
    return directory / f"{uuid}.json"


def _load(path: Path) -> Cordon | None:
    """What a file says; of one that cannot be understood, that. None where it has gone.

    Raises StoreShortageError.
    """
    try:
        cordon = store.read_as(Cordon, path)
    except StoreShortageError:
        raise
    except StoreError as error:
        why = str(error)
    else:
        if cordon is None or (0 <= cordon.since < LATEST and is_reason(cordon.reason)):
            return cordon
        why = f"{path} is damaged: it has a time or a reason that cannot be shown"
    with suppress(OSError):
        since = min(max(0.0, path.lstat().st_mtime), LATEST / 2)
        return Cordon(since, f"why is not known: {why}"[:500])
    return None


def is_reason(text: str) -> bool:
    """Whether it can be shown: one line, and not without end."""
    return len(text) <= MAX_REASON and (text.isprintable() or not text)


@dataclass
class Cordons:
    """Gives the node what is in the directory, and changes it. One change at a time."""

    directory: Path
    node: Node
    interval: float = INTERVAL
    _alone: anyio.Lock = field(default_factory=anyio.Lock)

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> Never:
        """Runs until cancelled; started when the directory was looked at once."""
        while True:
            async with self._alone:
                try:
                    self.node.set_cordons(await in_thread(load, self.directory))
                except StoreError as error:
                    self.node.cordons_failed(str(error))
            task_status.started()
            task_status = anyio.TASK_STATUS_IGNORED
            await anyio.sleep(self.interval)

    async def put(self, uuid: str, cordon: Cordon) -> None:
        """Cordons a GPU, or gives another reason. Raises StoreError, and nothing changed then."""
        if not _FILE.fullmatch(f"{uuid}.json"):
            raise StoreError(f"{uuid!r} cannot be the name of a file")
        async with self._alone:
            await in_thread(store.write, _path(self.directory, uuid), asdict(cordon))
            self.node.set_cordons({**self.node.snapshot.cordons, uuid: cordon})

    async def remove(self, uuid: str) -> None:
        """Takes a cordon back. Raises StoreError, and nothing changed then."""
        async with self._alone:
            await in_thread(store.remove, _path(self.directory, uuid))
            left = {u: each for u, each in self.node.snapshot.cordons.items() if u != uuid}
            self.node.set_cordons(left)
