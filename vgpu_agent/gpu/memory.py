"""What must outlive the agent: cards that wait for a reset, where the driver does not tell.

A small file in VGPU_STATE_DIRECTORY. A fault is of the boot in which it was seen; after a reboot
it is void.
"""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vgpu_agent.gpu.health import Counters
from vgpu_agent.model.devices import Fault, Reason

log = logging.getLogger(__name__)

FILE = "waiting-for-reset.json"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Remembered:
    """A fault of a card that only a reset clears, and the counts that a reset makes fall."""

    uuid: str
    fault: Fault
    counters: Counters

    @property
    def key(self) -> tuple[str, Fault]:
        """What makes it worth writing again: the counts alone do not."""
        return self.uuid, self.fault


class FaultMemory:
    """The file. Both methods block, and neither raises: a lost memory costs care, not service."""

    def __init__(self, directory: Path, boot_id_file: Path = BOOT_ID) -> None:
        self._path = directory / FILE
        self._boot_id_file = boot_id_file

    def load(self) -> tuple[Remembered, ...]:
        """What was remembered in this boot of the node."""
        try:
            text = self._path.read_text()
        except FileNotFoundError:
            return ()
        except (OSError, UnicodeDecodeError) as error:
            log.warning(
                "cannot read %s: %s; cards that wait for a reset are not known", self._path, error
            )
            return ()
        try:
            data = json.loads(text)
            if data["boot_id"] != self._boot_id():
                return ()
            return tuple(
                Remembered(
                    each["uuid"],
                    Fault(
                        Reason(each["fault"]["reason"]),
                        float(each["fault"]["since"]),
                        str(each["fault"]["detail"]),
                        until_reset=True,
                        advice=str(each["fault"]["advice"]),
                    ),
                    Counters(**each["counters"]),
                )
                for each in data["cards"]
            )
        except (ValueError, TypeError, KeyError) as error:
            log.warning(
                "%s is damaged (%r); cards that wait for a reset are not known", self._path, error
            )
            return ()

    def save(self, remembered: Sequence[Remembered]) -> None:
        """Replaces the file as a whole, so that a crash leaves the old one or the new one."""
        data = {"boot_id": self._boot_id(), "cards": [asdict(each) for each in remembered]}
        new = self._path.with_suffix(".new")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with new.open("w") as file:
                json.dump(data, file)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._path)
        except OSError as error:
            log.warning(
                "cannot write %s: %s; a restart of the agent would forget which cards wait for a"
                " reset: look at VGPU_STATE_DIRECTORY",
                self._path,
                error,
            )

    def _boot_id(self) -> str:
        try:
            return self._boot_id_file.read_text().strip()
        except OSError:
            return ""
