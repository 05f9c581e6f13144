"""Asks the MPS control daemon and sets its defaults, by `nvidia-cuda-mps-control`.

The commands are those of NVIDIA's MPS documentation, one for each run of the program, so that no
answer can be taken for another's.
"""

import errno
import os
import re
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NoReturn

import anyio
from anyio.abc import ByteReceiveStream

from vgpu_agent.errors import (
    MpsBinaryError,
    MpsDownError,
    MpsHungError,
    MpsRefusedError,
    is_shortage,
)
from vgpu_agent.model.rules import MIB
from vgpu_agent.mps import answers
from vgpu_agent.mps.directories import Directories

BINARY = "nvidia-cuda-mps-control"

_NO_PROGRAM = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ENOEXEC)

MAX_OUTPUT = 2**20
"""Bytes of an answer: thousands of clients."""


def become_daemon(directories: Directories, *, multiuser: bool) -> NoReturn:
    """Makes this process the control daemon, in the foreground: none of ours is its parent.

    `multiuser` lets users of different UIDs be clients at the same time, where the daemon has that
    option. Raises MpsBinaryError.
    """
    # From NVIDIA's MPS documentation; not yet seen to work, as docs/measurements.md has it.
    options = ["-multiuser-server"] if multiuser else []
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and exec hands that on
        signal.signal(number, signal.SIG_DFL)
    # The limits name GPUs by their ordinals in this order.
    order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    try:
        os.execvpe(  # noqa: S606 - no shell is wanted
            BINARY, [BINARY, "-f", *options], {**os.environ, **directories.environment(), **order}
        )
    except OSError as error:
        raise MpsBinaryError(_cannot_run(BINARY, error)) from error


def _cannot_run(binary: str, error: OSError) -> str:
    return (
        f"{binary} cannot be run ({error.strerror}): the NVIDIA driver brings it; install the"
        " driver on the node, and run this container with the NVIDIA runtime and"
        " NVIDIA_DRIVER_CAPABILITIES=compute,utility"
    )


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a client of the next server gets at most.

    `thread_percentage` of a GPU's threads, and bytes of memory by the ordinal of the GPU, None for
    no limit. The daemon takes whole MiB.
    """

    thread_percentage: int
    memory_limits: Mapping[int, int | None]

    def differences(self, found: "Defaults") -> tuple[str, ...]:
        """What of `found`, which was read back, cannot be these defaults."""
        words = []
        if found.thread_percentage != self.thread_percentage:
            words.append(f"{found.thread_percentage} % of the threads")
        for ordinal, limit in found.memory_limits.items():
            if not answers.same_limit(self.memory_limits[ordinal], limit):
                words.append(_limit_in_words(ordinal, limit))
        return tuple(words)

    def __str__(self) -> str:
        limits = [_limit_in_words(n, limit) for n, limit in self.memory_limits.items()]
        return f"{self.thread_percentage} % of the threads, {', '.join(limits) or 'no GPU'}"


def _limit_in_words(ordinal: int, limit: int | None) -> str:
    return f"{'no limit' if limit is None else f'{limit // MIB} MiB'} on GPU {ordinal}"


class Control:
    """The control daemon of one pipe directory. One question at a time.

    `timeout` is in seconds, for each command. Every method raises MpsBinaryError, MpsDownError,
    MpsHungError or MpsRefusedError; the message says what to do. No process is left behind,
    whatever ends a call.
    """

    def __init__(
        self, directories: Directories, *, binary: str = BINARY, timeout: float = 1.5
    ) -> None:
        self.directories = directories
        self._binary = binary
        self._timeout = timeout
        self._turn = anyio.Lock()

    async def command(self, line: str) -> str:
        """What the daemon answers to a command, without blanks around it."""
        environment = {**os.environ, **self.directories.environment()}
        async with self._turn:
            try:
                with anyio.fail_after(self._timeout), _standard_input(line) as stdin:
                    code, out, err = await _run(self._binary, stdin, environment)
            except TimeoutError:
                raise MpsHungError(
                    f"the MPS daemon of {self.directories.pipe} does not answer `{line}` within"
                    f" {self._timeout:g} s: see control.log in {self.directories.log}; if it stays"
                    " so, drain the node and delete its MPS pod"
                ) from None
            except (OSError, RuntimeError) as error:
                if isinstance(error, OSError) and error.errno in _NO_PROGRAM:
                    raise MpsBinaryError(_cannot_run(self._binary, error)) from error
                if not is_shortage(error):
                    raise
                raise MpsHungError(
                    f"the MPS daemon of {self.directories.pipe} cannot be asked now: {error}"
                ) from error
        if max(len(out), len(err)) > MAX_OUTPUT:
            raise MpsRefusedError(
                f"{self._binary} answers `{line}` with more than {MAX_OUTPUT} bytes: see"
                f" control.log in {self.directories.log}"
            )
        answer = out.decode(errors="replace").strip()
        words = " ".join((answer, err.decode(errors="replace").strip())).strip()
        if _DOWN.search(words):
            raise MpsDownError(
                f"no MPS daemon answers in {self.directories.pipe}: the kubelet starts it again; if"
                " it does not stay, see the log of its container, and that no other MPS daemon"
                " holds the GPUs"
            )
        if code != 0:
            raise MpsRefusedError(
                f"the MPS daemon refused `{line}` (exit code {code}): {words[:500] or '-'};"
                f" see control.log in {self.directories.log}"
            )
        return answer

    async def servers(self) -> tuple[int, ...]:
        """PIDs of the running servers."""
        return answers.parse_pids(await self.command("get_server_list"))

    async def server_failed(self, pid: int) -> bool:
        """Whether the status of the server of that PID is FAULT: a client's fault has hit it."""
        return answers.parse_fault(await self.command(f"get_server_status {pid}"))

    async def clients(self) -> tuple[str, ...]:
        """The GPUs of all clients, by UUID or ordinal: one for each client and GPU."""
        return answers.parse_clients(await self.command("get_device_client_list"))

    async def defaults(self, ordinals: Iterable[int]) -> Defaults:
        """What clients of servers that start from now on get on those GPUs."""
        percentage = await self.command("get_default_active_thread_percentage")
        limits = {
            n: await self.command(f"get_default_device_pinned_mem_limit {n}") for n in ordinals
        }
        return Defaults(
            answers.parse_percentage(percentage),
            {n: answers.parse_memory(limit) for n, limit in limits.items()},
        )

    async def set_defaults(self, defaults: Defaults) -> None:
        """Sets them, for servers that start from now on. Read them back: not all must be taken.

        A limit of memory cannot be lifted.
        """
        await self.command(f"set_default_active_thread_percentage {defaults.thread_percentage}")
        for ordinal, limit in defaults.memory_limits.items():
            if limit is not None:
                await self.command(f"set_default_device_pinned_mem_limit {ordinal} {limit // MIB}M")


async def _run(binary: str, stdin: int, environment: Mapping[str, str]) -> tuple[int, bytes, bytes]:
    """Exit code, output and errors of the program, MAX_OUTPUT bytes of them and a buffer at most.

    No process is left behind: one that is cancelled, or says too much, is killed. Raises OSError.
    """
    output = {1: b"", 2: b""}
    async with await anyio.open_process([binary], stdin=stdin, env=environment) as process:

        async def read(number: int, stream: ByteReceiveStream) -> None:
            async for data in stream:
                output[number] += data
                if len(output[number]) > MAX_OUTPUT:
                    with suppress(ProcessLookupError):
                        process.kill()
                    tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            for number, stream in enumerate((process.stdout, process.stderr), start=1):
                if stream is not None:
                    tasks.start_soon(read, number, stream)
        return await process.wait(), output[1], output[2]


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
