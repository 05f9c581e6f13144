"""What must outlive the agent: GPUs that wait for a reset, and what each GPU was when first seen.

A small file in VGPU_STATE_DIRECTORY. It is of the boot in which it was written; after a reboot it
is void.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Never

import anyio

from vgpu_agent import store
from vgpu_agent.errors import StoreError, StoreShortageError
from vgpu_agent.model.devices import Fault
from vgpu_agent.model.health import ActiveFault, Counters, GpuHealth
from vgpu_agent.model.node import Node
from vgpu_agent.model.snapshot import FirstSeen, Snapshot
from vgpu_agent.threads import in_thread

log = logging.getLogger(__name__)

FILE = "gpus.json"

LATEST = 2.0**37
"""Seconds since the epoch that no fault reaches; a date of four digits still."""

RETRIES = (1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds until a failed write is tried again; the last one for good."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept: by UUID, how a GPU was first seen, and its faults that only a reset ends."""

    boot_id: str
    first_seen: Mapping[str, FirstSeen]
    faults: Mapping[str, tuple[Fault, ...]]
    counters: Mapping[str, Counters]

    def same_as(self, other: "Kept | None") -> bool:
        """Whether writing it again would say nothing new; counters alone say nothing."""
        return other is not None and self == replace(other, counters=self.counters)

    @property
    def health(self) -> Mapping[str, GpuHealth]:
        """As the next agent begins with: facts older than all that it will see."""
        return {
            uuid: GpuHealth(
                active=tuple(ActiveFault(fault, newest=0.0) for fault in faults),
                counters=self.counters.get(uuid, Counters()),
                seen=0.0,
            )
            for uuid, faults in self.faults.items()
        }


def kept(snapshot: Snapshot, boot_id: str) -> Kept:
    """What must outlive the agent now."""
    health = {uuid: each for uuid, each in snapshot.health.items() if each.waits_for_reset}
    return Kept(
        boot_id,
        dict(snapshot.first_seen),
        {
            uuid: tuple(fault for fault in each.faults if fault.until_reset)
            for uuid, each in health.items()
        },
        {uuid: each.counters for uuid, each in health.items()},
    )


def load(directory: Path, boot_id: str) -> Kept | None:
    """What was kept in this boot of the node; None for nothing. Blocks. Raises StoreError."""
    found = store.read_as(Kept, directory / FILE)
    if found is None or found.boot_id != boot_id:
        return None
    if any(not 0 <= each.since < LATEST for faults in found.faults.values() for each in faults):
        raise StoreError(f"{directory / FILE} is damaged: it has a time that no calendar has")
    return found


@dataclass
class Keeper:
    """Keeps the file as the node is, from `recall` on.

    What could not be written is tried again until it is.
    """

    directory: Path
    node: Node
    boot_id_file: Path = store.BOOT_ID
    retries: tuple[float, ...] = RETRIES
    _written: Kept | None = None
    _boot_id: str = ""

    async def recall(self) -> None:
        """Gives the node what the agent before this one kept. A damaged file is no memory.

        One that cannot be read for want of descriptors is waited for: it would be overwritten.
        """
        problem = ""
        while True:
            try:
                self._boot_id = await in_thread(store.boot_id, self.boot_id_file)
                self._written = await in_thread(load, self.directory, self._boot_id)
            except StoreShortageError as error:
                if not problem:
                    log.warning("%s; tried again", error)
                problem = str(error)
                await anyio.sleep(self.retries[0])
                continue
            except StoreError as error:
                log.warning("%s; GPUs that wait for a reset since before are unknown", error)
            break
        if self._written is not None:
            self.node.recalled(self._written.first_seen, self._written.health)

    async def run(self) -> Never:
        """Runs until cancelled."""
        boot_id, path = self._boot_id, self.directory / FILE
        failures = 0
        version = -1
        while True:
            version = await self.node.latest.newer_than(version) or 0
            while not (now := kept(self.node.snapshot, boot_id)).same_as(self._written):
                try:
                    await in_thread(store.write, path, asdict(now))
                except StoreError as error:
                    self.node.set_store_error(str(error))
                    await anyio.sleep(self.retries[min(failures, len(self.retries) - 1)])
                    failures += 1
                else:
                    self._written, failures = now, 0
            self.node.set_store_error(None)
