"""Asks and tells the MPS control daemon, by `nvidia-cuda-mps-control`.

The commands are those of NVIDIA's MPS documentation, one for each run of the program, so that no
answer can be taken for another's. Most answers have no documented form. The parsers below say which
form they expect and where it was seen; they take what cannot be misread and refuse the rest.
"""

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NoReturn

import anyio

from vgpu_agent.errors import MpsBinaryError, MpsDownError, MpsHungError, MpsRefusedError
from vgpu_agent.model.share import MIB

GIB = 1024 * MIB

BINARY = "nvidia-cuda-mps-control"


def become_daemon(pipe_directory: Path, log_directory: Path, *, multiuser: bool) -> NoReturn:
    """Makes this process the control daemon, in the foreground: none of ours is its parent.

    `multiuser` lets users of different UIDs be clients at the same time, where the daemon has that
    option. Raises MpsBinaryError.
    """
    # From NVIDIA's MPS documentation; not yet seen to work, as docs/measurements.md has it.
    options = ["-multiuser-server"] if multiuser else []
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and exec hands that on
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvpe(  # noqa: S606 - no shell is wanted
            BINARY,
            [BINARY, "-f", *options],
            {
                **_environment(pipe_directory, log_directory),
                # The limits name cards by their ordinals in this order.
                "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            },
        )
    except OSError as error:
        raise MpsBinaryError(_cannot_run(BINARY, error)) from error


def _environment(pipe_directory: Path, log_directory: Path) -> dict[str, str]:
    return {
        **os.environ,
        "CUDA_MPS_PIPE_DIRECTORY": str(pipe_directory),
        "CUDA_MPS_LOG_DIRECTORY": str(log_directory),
    }


def _cannot_run(binary: str, error: OSError) -> str:
    return (
        f"{binary} cannot be run ({error.strerror}): the NVIDIA driver brings it; install the"
        " driver on the node, and run this container with the NVIDIA runtime and"
        " NVIDIA_DRIVER_CAPABILITIES=compute,utility"
    )


class ServerStatus(StrEnum):
    """How an MPS server is. UNKNOWN: the daemon answered with a word that is not known here."""

    INITIALIZING = "INITIALIZING"
    ACTIVE = "ACTIVE"
    FAULT = "FAULT"
    UNKNOWN = "UNKNOWN"


@dataclass(frozen=True, slots=True)
class Client:
    """A process that uses a card through an MPS server.

    `device` is the card as the daemon names it, by UUID or ordinal; None where its answer cannot
    be understood that far. `server_pid` likewise. `pid` is 0 for a daemon that does not share the
    host's PID namespace.
    """

    pid: int
    device: str | None = None
    server_pid: int | None = None


@dataclass(frozen=True, slots=True)
class WaitingClient:
    """A client that waits because the server that runs is another user's."""

    pid: int
    uid: int


class Control:
    """The control daemon of one pipe directory. One question at a time.

    `timeout` is in seconds, for each command. Every method raises MpsBinaryError, MpsDownError,
    MpsHungError or MpsRefusedError; the message says what to do. No process is left behind,
    whatever ends a call.
    """

    def __init__(
        self,
        pipe_directory: Path,
        log_directory: Path,
        *,
        binary: str = BINARY,
        timeout: float = 1.5,
    ) -> None:
        self.pipe_directory = pipe_directory
        self.log_directory = log_directory
        self._binary = binary
        self._timeout = timeout
        self._turn = anyio.Lock()

    async def command(self, line: str) -> str:
        """What the daemon answers to a command, without blanks around it."""
        environment = _environment(self.pipe_directory, self.log_directory)
        async with self._turn:
            try:
                # On the way out of a cancelled run anyio kills the child and waits for its end.
                with anyio.fail_after(self._timeout), _standard_input(line) as stdin:
                    done = await anyio.run_process(
                        [self._binary], stdin=stdin, check=False, env=environment
                    )
            except TimeoutError:
                raise MpsHungError(
                    f"the MPS daemon of {self.pipe_directory} does not answer `{line}` within"
                    f" {self._timeout:g} s: see control.log in {self.log_directory}; if it stays"
                    " so, drain the node and delete its MPS pod"
                ) from None
            except OSError as error:
                raise MpsBinaryError(_cannot_run(self._binary, error)) from error
        answer = done.stdout.decode(errors="replace").strip()
        words = " ".join((answer, done.stderr.decode(errors="replace").strip())).strip()
        if _DOWN.search(words):
            raise MpsDownError(
                f"no MPS daemon answers in {self.pipe_directory}: the kubelet starts it again; if"
                " it does not stay, see the log of its container, and that no other MPS daemon"
                " holds the cards"
            )
        if done.returncode != 0:
            raise MpsRefusedError(
                f"the MPS daemon refused `{line}` (exit code {done.returncode}): {words or '-'};"
                f" see control.log in {self.log_directory}"
            )
        return answer

    async def servers(self) -> tuple[int, ...]:
        """PIDs of the running servers."""
        return parse_pids(await self.command("get_server_list"))

    async def server_status(self, pid: int) -> ServerStatus:
        """How the server of that PID is."""
        return parse_status(await self.command(f"get_server_status {pid}"))

    async def clients(self) -> tuple[Client, ...]:
        """The clients of all servers, once for each card that they use."""
        return parse_clients(await self.command("get_device_client_list"))

    async def default_thread_percentage(self) -> int:
        """Share of a card's threads that a client of the next server gets, 1 to 100."""
        return parse_percentage(await self.command("get_default_active_thread_percentage"))

    async def set_default_thread_percentage(self, percentage: int) -> None:
        """Sets it, for servers that start from now on. What holds is told by reading it back."""
        await self.command(f"set_default_active_thread_percentage {percentage}")

    async def default_memory_limit(self, ordinal: int) -> int | None:
        """Bytes of that card which a client of the next server may take; None is no limit."""
        return parse_memory(await self.command(f"get_default_device_pinned_mem_limit {ordinal}"))

    async def set_default_memory_limit(self, ordinal: int, limit: int) -> None:
        """Sets it in whole MiB, rounded down, for servers that start from now on."""
        await self.command(f"set_default_device_pinned_mem_limit {ordinal} {limit // MIB}M")


# The sentence of the program where its daemon is away (seen in reports; it ends with code 1).
_DOWN = re.compile(r"cannot find mps control daemon|connection refused", re.IGNORECASE)


@contextmanager
def _standard_input(line: str) -> Iterator[int]:
    """A pipe with the line in it: a program that ends without reading it breaks nothing."""
    read, write = os.pipe()
    try:
        os.write(write, f"{line}\n".encode())
        os.close(write)
        yield read
    finally:
        os.close(read)


def parse_pids(text: str) -> tuple[int, ...]:
    """PIDs, one a line (documented as a list of PIDs), none for nothing.

    Raises MpsRefusedError for anything else: a server that is overlooked could be one without
    limits.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not all(re.fullmatch(r"[0-9]{1,10}", line) for line in lines):
        raise MpsRefusedError(f"the MPS daemon lists no PIDs of servers, but {text!r}")
    return tuple(int(line) for line in lines)


def parse_status(text: str) -> ServerStatus:
    """The status of a server: its word is documented, what stands around it is not."""
    words = set(re.findall(r"[A-Z]+", text.upper()))
    # The worst first, should a sentence name several.
    for status in (ServerStatus.FAULT, ServerStatus.INITIALIZING, ServerStatus.ACTIVE):
        if status.value in words:
            return status
    return ServerStatus.UNKNOWN


_UUID = re.compile(r"(?:GPU|MIG)-[0-9A-Za-z-]+")


def parse_clients(text: str) -> tuple[Client, ...]:
    """Clients, from a list whose form is documented only for the command `ps`.

    Taken are the table of `ps` (`PID ID SERVER DEVICE NAMESPACE COMMAND`, documented for it), and,
    as guesses, lines of a device and a PID (either first, the device a UUID or, as the smaller
    number, an ordinal) and lines of a device alone above lines of PIDs. What is left counts: each
    line that begins with a number is a client of which only the PID is known.
    """
    clients: list[Client] = []
    table = False
    device: str | None = None
    for line in text.splitlines():
        words = line.replace(":", " ").replace(",", " ").split()
        if not words:
            continue
        if words[0].upper() == "PID":
            table = "SERVER" in (word.upper() for word in words)
            continue
        uuid = next((word for word in words if _UUID.fullmatch(word)), None)
        numbers = [int(word) for word in words if re.fullmatch(r"[0-9]{1,10}", word)]
        if table and len(words) >= 4 and len(numbers) >= 3:
            clients.append(Client(numbers[0], words[3], numbers[2]))
        elif re.match(r"(?i)device\b", line.strip()) and len(numbers) == 1:
            device = str(numbers[0])
        elif uuid is not None:
            if not numbers:
                device = uuid
            clients += [Client(number, uuid) for number in numbers]
        elif len(numbers) == len(words) == 2:
            clients.append(Client(max(numbers), str(min(numbers))))
        elif len(numbers) == len(words) == 1 or words[0].isdecimal():
            clients += [Client(number, device) for number in numbers[:1]]
    return tuple(clients)


def parse_percentage(text: str) -> int:
    """A percentage such as `50.0` (seen). Raises MpsRefusedError for anything else."""
    match = re.fullmatch(r"([0-9]{1,3})(?:\.[0-9]+)?\s*%?", text.strip())
    if match is None or not 0 <= int(match[1]) <= 100:
        raise MpsRefusedError(f"the MPS daemon answers no thread percentage, but {text!r}")
    return int(match[1])


_UNITS = {"": 1, "K": 1024, "M": MIB, "G": GIB, "T": 1024 * GIB}


def parse_memory(text: str) -> int | None:
    """A limit of memory such as `8G` (seen) or `512M`, in bytes.

    None, no limit, for zero or nothing: what the daemon answers where no limit is set is not known.
    Raises MpsRefusedError for anything else.
    """
    text = text.strip().upper()
    if not text:
        return None
    match = re.fullmatch(r"([0-9]{1,18})\s*([KMGT]?)I?B?", text)
    if match is None:
        raise MpsRefusedError(f"the MPS daemon answers no limit of memory, but {text!r}")
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


_LOG_LINE = re.compile(
    r"NEW CLIENT (?P<client>\d+) from user (?P<user>\d+): (?P<said>.*)"
    r"|Starting new server (?P<started>\d+) for user (?P<owner>\d+)"
    r"|NEW SERVER (?P<ready>\d+): Ready"
    r"|Server (?P<ended>\d+) exited"
)


def waiting_clients(log_text: str) -> tuple[WaitingClient, ...]:
    """Clients of another user than the running server's that wait for it to end.

    From `control.log`, whose lines are not documented. Seen in reports, and used here:

        NEW CLIENT 812 from user 0: Server is not ready, push client to pending list
        NEW CLIENT 812 from user 1000: Server already exists
        Starting new server 640 for user 1000
        NEW SERVER 640: Ready
        Server 640 exited with status 0

    A guess is that a client no longer waits when a server of its user is ready: no line says so. A
    client that ended while it waited shows no more than that, so it stays until then.
    """
    owners: dict[str, int] = {}
    running: int | None = None
    waiting: dict[WaitingClient, None] = {}
    for line in log_text.splitlines():
        match = _LOG_LINE.search(line)
        if match is None:
            continue
        if match["client"]:
            client = WaitingClient(int(match["client"]), int(match["user"]))
            if "pending" in match["said"]:
                waiting[client] = None
            else:
                running = client.uid
                waiting.pop(client, None)
        elif match["started"]:
            running = owners[match["started"]] = int(match["owner"])
        elif match["ready"]:
            running = owners.get(match["ready"])
            waiting = {client: None for client in waiting if client.uid != running}
        elif match["ended"]:
            owners.pop(match["ended"], None)
            running = next(reversed(owners.values()), None)
    return tuple(client for client in waiting if running is not None and client.uid != running)
