"""Compute modes of the shared GPUs, before and after MPS: `mps prepare` and `mps restore`.

What is changed of a GPU is remembered first, so that `restore` can undo it.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from vgpu_agent import store
from vgpu_agent.errors import DriverError, MpsSetupError, StoreError
from vgpu_agent.gpu.driver import GpuDriver
from vgpu_agent.model.devices import Excluded
from vgpu_agent.model.facts import ComputeMode
from vgpu_agent.model.rules import SharingRules
from vgpu_agent.model.share import divide
from vgpu_agent.threads import in_thread

log = logging.getLogger(__name__)

SetComputeMode = Callable[[str, ComputeMode], bool]
"""Sets the mode of the GPU of that UUID; False where it has none. Blocks; raises DriverError."""


@dataclass(frozen=True, slots=True)
class _Kept:
    boot_id: str
    modes: Mapping[str, ComputeMode]


class ComputeModes:
    """The compute modes of a node's GPUs, and those that were found before ours, in this boot.

    The driver forgets modes with the boot. Every method raises MpsSetupError and DriverError.
    """

    def __init__(self, driver: GpuDriver, set_mode: SetComputeMode, path: Path) -> None:
        self._driver = driver
        self._set_mode = set_mode
        self._path = path
        self._boot_id = store.boot_id()
        self._before: dict[str, ComputeMode] = {}
        try:
            kept = store.read_as(_Kept, path)
            if kept is not None and kept.boot_id == self._boot_id:
                self._before = dict(kept.modes)
        except StoreError as error:
            log.warning("%s: the modes found now are remembered", error)

    async def take(self, rules: SharingRules) -> None:
        """EXCLUSIVE_PROCESS for the shared GPUs, so that no process can bypass MPS on them."""
        async with self._driver:
            scan = await self._driver.scan()
            shared = [g.uuid for g in scan.gpus if not isinstance(divide(g, rules), Excluded)]
            for uuid in self._before.keys() - set(shared):
                # Shared before and not any more: others need the mode that they had.
                await self._give_back(uuid)
            for uuid in shared:
                await self._take(uuid)

    async def restore(self) -> None:
        """Sets the remembered modes back, where they were not changed since then."""
        if not self._before:
            log.info("no compute mode was changed in this boot of the node: nothing to restore")
            return
        async with self._driver:
            await self._driver.scan()
            for uuid in list(self._before):
                await self._give_back(uuid)

    async def _take(self, uuid: str) -> None:
        mode = (await self._driver.probe([uuid]))[uuid].compute_mode
        if mode is None:
            log.warning("%s has no compute mode: processes can bypass MPS", uuid)
            return
        if uuid not in self._before:  # what is found later may be ours
            self._remember({**self._before, uuid: mode})
        if mode is ComputeMode.EXCLUSIVE_PROCESS:
            return
        if await self._set(uuid, ComputeMode.EXCLUSIVE_PROCESS):
            log.info("%s: compute mode EXCLUSIVE_PROCESS, was %s", uuid, mode.name)
        else:
            log.warning("%s takes no compute mode: processes can bypass MPS", uuid)

    async def _give_back(self, uuid: str) -> None:
        before = self._before[uuid]
        reading = (await self._driver.probe([uuid]))[uuid]
        if reading.lost:
            log.warning("%s is not there; compute mode %s is not restored", uuid, before.name)
            return
        if reading.compute_mode is not ComputeMode.EXCLUSIVE_PROCESS:
            log.info("%s: its compute mode was changed since; it is left alone", uuid)
        elif before is not ComputeMode.EXCLUSIVE_PROCESS:
            await self._set(uuid, before)
            log.info("%s: compute mode %s is restored", uuid, before.name)
        else:
            log.info("%s: compute mode %s was its own", uuid, before.name)
        self._remember({each: mode for each, mode in self._before.items() if each != uuid})

    async def _set(self, uuid: str, mode: ComputeMode) -> bool:
        try:
            return await in_thread(self._set_mode, uuid, mode)
        except DriverError as error:
            raise MpsSetupError(
                f"{error}; or set VGPU_MPS_COMPUTE_MODE=keep to leave compute modes alone"
            ) from error

    def _remember(self, before: dict[str, ComputeMode]) -> None:
        try:
            store.write(self._path, asdict(_Kept(self._boot_id, before)))
        except StoreError as error:
            raise MpsSetupError(
                f"{error}, so compute modes could not be restored: mount its directory writable, or"
                " set VGPU_MPS_COMPUTE_MODE=keep"
            ) from error
        self._before = before
