"""The one way to keep a small JSON file, and to read one that others may have damaged.

Everything here blocks: call it in a worker thread.
"""

import json
import math
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Generic, TypeVar, get_args, get_origin, get_type_hints

from vgpu_agent.errors import SHORTAGES, StoreError, StoreShortageError

T = TypeVar("T")

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

MAX_BYTES = 2**20

MAX_INT = 2**256
"""No counter, size or index of ours is larger; what follows could not be divided."""


def since_boot() -> float:
    """Seconds since the boot: the same in every container of the node."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def boot_id(file: Path = BOOT_ID) -> str:
    """Names this boot of the node; what was noted in another one is void. Empty if unknown.

    Raises StoreShortageError where it cannot be read now.
    """
    try:
        return file.read_text().strip()
    except OSError as error:
        if error.errno in SHORTAGES:
            raise _unread(file, error) from error
        return ""
    except UnicodeDecodeError:
        return ""


def identity(path: Path) -> object:
    """Which file is there, with its content; None where there is none. For comparisons."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


@contextmanager
def closing(descriptor: int) -> Iterator[int]:
    """Closes it in the end."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int | None:
    """A descriptor of a regular file, None for anything else. Never waits. Raises OSError."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    return None


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes | None:
    """A regular file's content; None where there is no such file.

    Never waits: neither for a pipe nor for a device. Raises StoreError with the path and the
    reason, also where the file has more than `limit` bytes.
    """
    try:
        descriptor = open_regular(path)
        if descriptor is None:
            raise StoreError(f"{path} is not a regular file")
        with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor has no path
            content = file.read(limit + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unread(path, error) from error
    if len(content) > limit:
        raise StoreError(f"{path} is larger than {limit / 2**20:g} MiB")
    return content


def _unread(path: Path, error: OSError) -> StoreError:
    kind = StoreShortageError if error.errno in SHORTAGES else StoreError
    return kind(f"cannot read {path}: {error.strerror or error}")


def read(path: Path, limit: int = MAX_BYTES) -> Mapping[str, object] | None:
    """A JSON object; None where there is no such file. Raises StoreError for anything else."""
    content = read_bytes(path, limit)
    if content is None:
        return None
    try:
        data: object = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is damaged: {type(error).__name__}: {error}"[:500]) from error
    if not isinstance(data, dict):
        raise StoreError(f"{path} is damaged: no JSON object")
    return data


def read_as(
    kind: type[T], path: Path, limit: int = MAX_BYTES, *, form: int | None = None, hint: str = ""
) -> T | None:
    """What `asdict` of a dataclass was written from; None for no file. Raises StoreError.

    `form` is the `format` that it must have, where it has one; `hint` what to do about another.
    """
    data = read(path, limit)
    if data is not None and data.get("format") != form:
        raise StoreError(f"{path} is of another version of the agent{hint}")
    try:
        return None if data is None else decoded(kind, data, "it")
    except (ValueError, OverflowError) as error:
        raise StoreError(f"{path} is damaged: {error}") from error


def decoded(kind: Any, value: object, name: str, text: Callable[[str], str] = str) -> Any:
    """A value of that type, made of what JSON holds; fields that are not known are passed over.

    `text` is applied to every string. Raises ValueError that names the field.
    """
    arguments, origin = get_args(kind), get_origin(kind)
    if is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} is not an object")
        hints, names = get_type_hints(kind), [each.name for each in fields(kind)]
        missing = [each for each in names if each not in value]
        if missing:
            raise ValueError(f"{name} has no {missing[0]}")
        return kind(**{each: decoded(hints[each], value[each], each, text) for each in names})
    if origin is UnionType:
        *first, last = [each for each in arguments if each is not NoneType]
        if value is None and NoneType in arguments:
            return None
        for each in first:
            with suppress(ValueError):
                return decoded(each, value, name, text)
        return decoded(last, value, name, text)
    if origin is tuple and isinstance(value, list):
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise ValueError(f"{name} is a list of {len(value)}")
        return tuple(decoded(arguments[0], each, name, text) for each in value)
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {text(str(k)): decoded(arguments[1], v, name, text) for k, v in value.items()}
    if origin is None and issubclass(kind, Enum):
        return kind(value)
    if kind is float and type(value) in (int, float):
        number = float(value)  # type: ignore[arg-type]  # it is one of the two
        if not math.isfinite(number):
            raise ValueError(f"{name} is {number}")
        return number
    if kind is not type(value) or (isinstance(value, int) and abs(value) > MAX_INT):
        raise ValueError(f"{name} is of another type")
    return text(value) if isinstance(value, str) else value


def write(path: Path, data: Mapping[str, object], *, mode: int = 0o644) -> None:
    """Replaces the file as a whole, so that a crash leaves the old one or the new one.

    Raises StoreError.
    """
    new = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear(new)
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with open(descriptor, "w") as file:  # noqa: PTH123 - a descriptor has no path
            json.dump(data, file)
            file.flush()
            os.fsync(descriptor)
        if path.is_dir() and not path.is_symlink():
            _clear(path)
        new.replace(path)
        _sync(path.parent)
    except OSError as error:
        with suppress(OSError):
            new.unlink()  # half a file would keep a full disk full
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error


def remove(path: Path) -> None:
    """Removes the file, also for good. What is no file stays beside it. Raises StoreError."""
    try:
        _clear(path)
        _sync(path.parent)
    except OSError as error:
        raise StoreError(f"cannot remove {path}: {error.strerror or error}") from error


def _clear(path: Path) -> None:
    """Nothing is there any more; a directory, which may hold somebody's files, stays beside it."""
    if path.is_dir() and not path.is_symlink():
        path.rename(path.with_name(f".{path.name}.directory"))
    path.unlink(missing_ok=True)


def _sync(directory: Path) -> None:
    """Makes the new name of a file last. Not every file system can."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    with suppress(OSError), closing(os.open(directory, flags)) as descriptor:
        os.fsync(descriptor)


class Said(Generic[T]):
    """A file by which one process says something to another; each has one for its side of it."""

    def __init__(self, path: Path, read: Callable[[Path], T | None]) -> None:
        self._path = path
        self._reader = read
        self._read: tuple[object, T | None] = None, None
        self._said: tuple[object, object, float] = None, None, 0.0

    def read(self) -> T | None:
        """What it says, read where it is new; None where there is none. Raises StoreError."""
        which = identity(self._path)
        if which != self._read[0]:
            self._read = which, self._reader(self._path)
        return self._read[1]

    def is_due(self, known: object, seconds: float = float("inf")) -> bool:
        """Whether `known` is not what was said, or somebody changed it, or it is so many s old."""
        said, which, at = self._said
        return known != said or which != identity(self._path) or since_boot() - at >= seconds

    def say(self, data: Mapping[str, object], known: object) -> None:
        """Replaces the file; `known` stands for what it says in `is_due`. Raises StoreError."""
        write(self._path, data)
        self._said = known, identity(self._path), since_boot()
