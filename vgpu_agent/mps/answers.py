"""Reads the answers of the MPS control daemon.

Most have no documented form. Each parser says which form it expects and where it was seen; it takes
what cannot be misread and refuses the rest.
"""

import re
from collections.abc import Mapping

from vgpu_agent.errors import MpsRefusedError
from vgpu_agent.model.rules import GIB, MIB


def _shown(text: str) -> str:
    """Of whatever length: it is kept beside what is known of all other daemons."""
    return repr(text[:200])


def parse_pids(text: str) -> tuple[int, ...]:
    """PIDs, one or several a line, none for nothing.

    Raises MpsRefusedError for anything else: a server that is overlooked could be one without
    limits.
    """
    words = text.split()
    if not all(re.fullmatch(r"[0-9]{1,10}", word) for word in words):
        raise MpsRefusedError(f"the MPS daemon lists no PIDs of servers, but {_shown(text)}")
    return tuple(map(int, words))


def parse_status(text: str) -> str | None:
    """A server's status, such as ACTIVE (documented); None for a server that is gone (seen).

    UNREPORTED where the daemon does not know the question (535, seen). BUSY where it says so of the
    server; when it does is not known (the words are in 535, 550 and 555).
    """
    text = text.strip()
    if "not found" in text.lower():
        return None
    words = text.split()
    if text.startswith("Unknown command"):
        return UNREPORTED
    if text.endswith("<busy>"):
        return BUSY
    return words[0].upper() if len(words) == 1 else text


UNREPORTED = "unreported"
"""The status of a server whose daemon does not report it."""

BUSY = "<busy>"
"""The status of a server that does not answer its daemon now."""


_UUID = re.compile(r"(?:GPU|MIG)-[0-9A-Za-z-]+")


def parse_clients(text: str) -> tuple[str, ...]:
    """The GPU of each client, as the daemon names it: by UUID or ordinal, empty where unclear.

    The form of the list is documented only for the command `ps`. Taken are its table (`PID ID
    SERVER DEVICE NAMESPACE COMMAND`, or with STATUS before DEVICE), and, as guesses, lines of a
    device and PIDs (either first, the device a UUID or, as the smaller number, an ordinal) and
    lines of a device alone above lines of PIDs. What is left counts: each line that begins with a
    number is a client.
    """
    clients: list[str] = []
    column: int | None = None
    device = ""
    for line in text.splitlines():
        words = line.replace(":", " ").replace(",", " ").split()
        if not words:
            continue
        if words[0].upper() == "PID":
            heads = [word.upper() for word in words]
            column = heads.index("DEVICE") if "DEVICE" in heads else None
            continue
        uuid = next((word for word in words if _UUID.fullmatch(word)), None)
        numbers = [int(word) for word in words if re.fullmatch(r"[0-9]{1,10}", word)]
        if column is not None and len(words) > column and len(numbers) >= 3:
            clients.append(words[column])
        elif re.match(r"(?i)device\b", line.strip()) and len(numbers) == 1:
            device = str(numbers[0])
        elif uuid is not None:
            if not numbers:
                device = uuid
            clients += [uuid] * len(numbers)
        elif len(numbers) == len(words) == 2:
            clients.append(str(min(numbers)))
        elif words[0].isdecimal():
            clients.append(device)
    return tuple(clients)


def parse_percentage(text: str) -> int:
    """A percentage such as `50.0` (seen). Raises MpsRefusedError for anything else."""
    match = re.fullmatch(r"([0-9]{1,3})(?:\.[0-9]+)?\s*%?", text.strip())
    if match is None or not 0 <= int(match[1]) <= 100:
        raise MpsRefusedError(f"the MPS daemon answers no thread percentage, but {_shown(text)}")
    return int(match[1])


_UNITS = {"": 1, "K": 1024, "M": MIB, "G": GIB, "T": 1024 * GIB}


def parse_memory(text: str) -> int | None:
    """A limit of memory such as `8G` (seen) or `512M`, in bytes.

    None, no limit, for zero or nothing: seen where none is set; and for what the daemon logs then.
    Raises MpsRefusedError for anything else.
    """
    text = text.strip().upper()
    if not text or text.startswith("NO DEFAULT PINNED MEMORY LIMIT SET"):
        return None
    match = re.fullmatch(r"([0-9]{1,18})\s*([KMGT]?)I?B?", text)
    if match is None:
        raise MpsRefusedError(f"the MPS daemon answers no limit of memory, but {_shown(text)}")
    return int(match[1]) * _UNITS[match[2]] or None


def same_limit(wanted: int | None, found: int | None) -> bool:
    """Whether a limit that was read back can be the one that was set, both in bytes.

    The daemon was seen to answer in whole GiB, and such an answer may be rounded down: from 1 GiB
    on it is taken for any limit of that many GiB.
    """
    if wanted is None or found is None:
        return wanted is found
    wanted = wanted // MIB * MIB
    return found in {wanted, wanted // GIB * GIB}


_MOMENTARY = ("INITIALIZING", BUSY)
_MOMENTARY_SECONDS = 60.0
"""A server that needs longer to start, or to answer, does not serve."""


def fault_of(statuses: Mapping[int, tuple[str, float]], now: float) -> str | None:
    """Why clients of these servers are lost; by PID the status of each, and since when."""
    for pid, (status, since) in statuses.items():
        if status in ("ACTIVE", UNREPORTED):
            continue
        if status not in _MOMENTARY:
            return f"MPS server {pid} has the status {status[:40]}"
        if now - since > _MOMENTARY_SECONDS:
            return f"MPS server {pid} is {status} for over {_MOMENTARY_SECONDS:.0f} s"
    return None
