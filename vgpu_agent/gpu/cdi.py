"""Which cards the host's CDI specs name: what they do not name a container cannot be given.

Specs are YAML or JSON files in two directories of the host (Container Device Interface
specification); JSON is YAML too.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import anyio.to_thread
import yaml

from vgpu_agent.gpu.driver import GpuDriver, GpuEvent, Reading, Scan
from vgpu_agent.model.devices import Excluded, Gpu
from vgpu_agent.model.holders import GpuProcess

log = logging.getLogger(__name__)

DIRECTORIES = (Path("/etc/cdi"), Path("/var/run/cdi"))


def named_devices(kind: str, directories: Iterable[Path] = DIRECTORIES) -> frozenset[str]:
    """The names of all devices of that kind. Blocks. A spec that cannot be read names none."""
    names: set[str] = set()
    for directory in directories:
        for path in sorted(directory.glob("*")):
            if path.suffix in (".yaml", ".json"):
                names |= _devices_of(path, kind)
    return frozenset(names)


def _devices_of(path: Path, kind: str) -> set[str]:
    try:
        spec = yaml.safe_load(path.read_text())
        if spec["kind"] != kind:
            return set()
        return {str(device["name"]) for device in spec["devices"]}
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        log.warning("CDI spec %s cannot be read: %r", path, error)
        return set()


class NamedByCdi:
    """A GpuDriver whose scans leave out the cards that no CDI spec names."""

    def __init__(
        self, driver: GpuDriver, kind: str, directories: Sequence[Path] = DIRECTORIES
    ) -> None:
        self._driver = driver
        self._kind = kind
        self._directories = directories

    async def __aenter__(self) -> Self:
        """See the driver."""
        await self._driver.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """See the driver."""
        await self._driver.__aexit__(exc_type, exc, traceback)

    async def scan(self) -> Scan:
        """The cards that a container can be given by name."""
        scan = await self._driver.scan()
        names = await anyio.to_thread.run_sync(named_devices, self._kind, self._directories)
        left = tuple(self._left_out(gpu) for gpu in scan.gpus if gpu.uuid not in names)
        gpus = tuple(gpu for gpu in scan.gpus if gpu.uuid in names)
        return Scan(scan.driver_version, gpus, (*scan.excluded, *left))

    def _left_out(self, gpu: Gpu) -> Excluded:
        folders = " or ".join(str(each) for each in self._directories)
        return Excluded(
            gpu,
            "cdi",
            f"no CDI spec in {folders} names {self._kind}={gpu.uuid}: make one on the node with"
            " `nvidia-ctk cdi generate --device-name-strategy=uuid`, or set"
            " VGPU_DEVICE_LIST=envvar",
        )

    async def probe(self, uuid: str) -> Reading:
        """See the driver."""
        return await self._driver.probe(uuid)

    async def processes(self, uuid: str) -> Sequence[GpuProcess] | None:
        """See the driver."""
        return await self._driver.processes(uuid)

    async def next_events(self) -> Sequence[GpuEvent]:
        """See the driver."""
        return await self._driver.next_events()

    async def release(self) -> bool:
        """See the driver."""
        return await self._driver.release()
