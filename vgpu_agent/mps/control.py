"""Asks an MPS control daemon and sets its defaults, by `nvidia-cuda-mps-control`.

The commands are those of NVIDIA's MPS documentation. A daemon takes one connection at a time and
writes some lines of log for each, so all that is to be asked is asked in one.
"""

import errno
import fcntl
import os
import re
import secrets
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from subprocess import Popen
from typing import BinaryIO

import anyio

from vgpu_agent.errors import (
    MpsBusyError,
    MpsDownError,
    MpsHungError,
    MpsRefusedError,
    MpsSetupError,
    is_shortage,
)
from vgpu_agent.model.rules import MIB
from vgpu_agent.mps import answers
from vgpu_agent.mps.directories import DaemonDirectories
from vgpu_agent.mps.programs import CONTROL, cannot_run, locked, open_lock, to_ask
from vgpu_agent.store import closing

_NO_PROGRAM = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ENOEXEC)

MAX_OUTPUT = 2**20
"""Bytes of an answer: thousands of clients."""

_ROOM = MAX_OUTPUT + 2**16
"""For an answer that is too long; whoever goes on to write is refused a page that does not fit."""

_POLL = 0.005
"""Seconds between two looks at a program that runs; one session takes some milliseconds."""

_LOCK_SECONDS = 2.0
"""How long another process of ours may ask the daemon, at most."""

KILL_SECONDS = 1.0
"""How long a program that was killed is waited for."""

# The sentence of the program where its daemon is away (seen of 535, 550 and 555; exit code 1).
_DOWN = re.compile(r"cannot find mps control daemon|connection refused", re.IGNORECASE)


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
    """The control daemon of one pipe directory.

    `timeout` is in seconds, for each session. Every method raises MpsSetupError, MpsDownError,
    MpsBusyError, MpsHungError or MpsRefusedError; the message says what to do. No process is left
    behind, but for one that the kernel does not let go of: then the daemon counts as hung until it
    has.
    """

    def __init__(
        self, directories: DaemonDirectories, *, binary: str = CONTROL, timeout: float = 1.5
    ) -> None:
        self.directories = directories
        self._binary = binary
        self._timeout = timeout
        self._stuck: Popen[bytes] | None = None

    async def ask(self, *lines: str) -> list[str]:
        """What the daemon answers to each of these commands, without blanks around it.

        Words that the daemon does not know come back as they are and keep the answers apart.
        """
        # Not to be guessed: what a client is called stands in some answers.
        separators = [f"={secrets.token_hex(4)}" for _ in lines]
        text = "".join(f"{line}\n{end}\n" for line, end in zip(lines, separators, strict=True))
        async with self._alone():
            rest = await self._session(text)
        answers_to = []
        for separator in separators:
            answer, found, rest = rest.partition(f'Unknown command "{separator}"')
            if not found:
                raise self._busy()
            answers_to.append(answer.strip())
        return answers_to

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """While no other of our processes asks this daemon."""
        lock = self.directories.lock
        try:
            descriptor = open_lock(lock)
        except OSError as error:
            raise MpsDownError(f"there is no MPS daemon: {lock}: {error.strerror}") from error
        with closing(descriptor):
            with anyio.move_on_after(min(self._timeout, _LOCK_SECONDS)) as waiting:
                while not locked(descriptor):  # noqa: ASYNC110 - a lock tells nobody
                    await anyio.sleep(0.05)
            if waiting.cancelled_caught:
                raise MpsBusyError(f"somebody else asks the MPS daemon: {lock} is locked")
            yield

    async def _session(self, text: str) -> str:
        """What the program prints when it is given these lines."""
        pipe, log = self.directories.pipe, self.directories.log
        if self._stuck is not None and self._stuck.poll() is None:
            raise MpsHungError(
                f"{self._binary} hangs in the kernel and cannot be ended: drain and reboot the node"
            )
        try:
            environment = to_ask(self.directories)
        except OSError as error:
            raise MpsBusyError(f"the MPS daemon of {pipe} cannot be asked now: {error}") from error
        try:
            code, out, err = await self._run(text, environment)
        except TimeoutError:
            raise MpsHungError(
                f"the MPS daemon of {pipe} does not answer within {self._timeout:g} s: see"
                f" control.log in {log}; if it stays so, drain the GPU and run `vgpu-agent mps"
                f" restart {self.directories.name}` in the MPS pod"
            ) from None
        except (OSError, RuntimeError) as error:
            if isinstance(error, OSError) and error.errno in _NO_PROGRAM:
                raise MpsSetupError(cannot_run(self._binary, error.strerror)) from error
            if not is_shortage(error):
                raise
            raise MpsBusyError(f"the MPS daemon of {pipe} cannot be asked now: {error}") from error
        if max(len(out), len(err)) > MAX_OUTPUT:
            raise MpsRefusedError(
                f"{self._binary} answers with more than {MAX_OUTPUT} bytes: see control.log in"
                f" {log}"
            )
        answer = out.decode(errors="replace")
        if _DOWN.search(answer) or _DOWN.search(err.decode(errors="replace")):
            raise MpsDownError(
                f"no MPS daemon answers in {pipe}: it is started again; if it does not stay, see"
                f" control.log in {log}, and that no other MPS daemon holds the GPU"
            )
        if code != 0:
            raise self._busy()
        return answer

    def _busy(self) -> MpsBusyError:
        return MpsBusyError(
            f"the MPS daemon of {self.directories.pipe} is busy: it takes one control connection at"
            " a time, and somebody else has it"
        )

    async def _run(self, text: str, environment: Mapping[str, str]) -> tuple[int, bytes, bytes]:
        """Exit code, output and errors of the program, MAX_OUTPUT bytes of them at most.

        Raises OSError, and TimeoutError.
        """
        with _file(0, text.encode()) as stdin, _file(_ROOM) as out, _file(_ROOM) as err:
            # asyncio waits for the end of all who have the pipes of a process, its children too.
            process = Popen(  # noqa: ASYNC220, S603 - a fork takes a millisecond; no shell
                [self._binary], stdin=stdin, stdout=out, stderr=err, env=environment
            )
            try:
                with anyio.fail_after(self._timeout):
                    while process.poll() is None:  # noqa: ASYNC110
                        await anyio.sleep(_POLL)
            finally:
                process.kill()
                with anyio.move_on_after(KILL_SECONDS, shield=True):
                    while process.poll() is None:  # noqa: ASYNC110
                        await anyio.sleep(_POLL)
                self._stuck = process if process.poll() is None else None
            # Where it stopped writing: the position is the program's, too.
            said, wrong = (os.pread(each.fileno(), each.tell(), 0) for each in (out, err))
            return process.returncode or 0, said, wrong


def _file(room: int, content: bytes = b"") -> BinaryIO:
    """A file in memory with that many bytes of room, or this content. It cannot grow."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    file = open(os.memfd_create("mps", flags), "w+b", buffering=0)  # noqa: PTH123, SIM115
    file.write(content)
    file.truncate(room or len(content))
    file.seek(0)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    return file


def get_defaults(ordinals: Iterable[int]) -> list[str]:
    """The commands whose answers `read_defaults` takes."""
    limits = [f"get_default_device_pinned_mem_limit {ordinal}" for ordinal in ordinals]
    return ["get_default_active_thread_percentage", *limits]


def read_defaults(ordinals: Iterable[int], said: Sequence[str]) -> Defaults:
    """What clients of servers that start from now on get. Raises MpsRefusedError."""
    limits = zip(ordinals, said[1:], strict=True)
    return Defaults(
        answers.parse_percentage(said[0]), {n: answers.parse_memory(text) for n, text in limits}
    )


def overridden(about: Mapping[str, str], wanted: Defaults) -> str | None:
    """The problem where a server has more than the defaults: its user may set that.

    `about` has what was answered, by command.
    """
    for line, said in about.items():
        command, *words = line.split()
        try:
            if command == "get_active_thread_percentage" and said:
                more = answers.parse_percentage(said) > wanted.thread_percentage
            elif command == "get_device_pinned_mem_limit" and said:
                most = wanted.memory_limits[int(words[1])]
                limit = answers.parse_memory(said)
                more = most is not None and (limit is None or limit > most)
            else:
                continue
        except MpsRefusedError:
            continue  # such as the words of a server that is gone
        if more:
            return (
                f"MPS server {words[0]} was given {said.strip()[:40]} instead of"
                f" {wanted}: its user can do that; end the pods of the GPU"
            )
    return None


def set_defaults(defaults: Defaults) -> list[str]:
    """The commands that set them, for servers that start from now on.

    Read them back: not all must be taken. A limit of memory is lifted by `0M`.
    """
    limits = [
        f"set_default_device_pinned_mem_limit {ordinal} {(limit or 0) // MIB}M"
        for ordinal, limit in defaults.memory_limits.items()
    ]
    return [f"set_default_active_thread_percentage {defaults.thread_percentage}", *limits]
