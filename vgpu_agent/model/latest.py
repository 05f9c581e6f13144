"""A value that any number of watchers follow, without a queue and without a lock."""

import asyncio
from collections.abc import Callable
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Latest(Generic[T]):
    """A value that any number of watchers follow; the latest one wins.

    A slow watcher skips to the newest value, no queue grows, and as long as it is not closed the
    final value is never lost.
    """

    def __init__(self, value: T) -> None:
        self._value = value
        self._version = 0
        self._closed = False
        self._changed = asyncio.Event()

    @property
    def value(self) -> T:
        """The newest value."""
        return self._value

    @property
    def version(self) -> int:
        """How many values were published: pass it to `newer_than`."""
        return self._version

    def publish(self, value: T) -> None:
        """Makes `value` the newest and wakes every watcher."""
        self._value = value
        self._version += 1
        self._wake()

    def close(self) -> None:
        """Ends every watcher; what was published last stays readable."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def newer_than(self, version: int) -> int | None:
        """Waits for a value newer than `version`; its version, or None when there will be none."""
        while self._version <= version and not self._closed:
            await self._changed.wait()
        return None if self._closed else self._version

    async def until(self, holds: Callable[[T], object]) -> T:
        """The first value from now on that the condition holds for."""
        async for value in self.follow():
            if holds(value):
                return value
        await asyncio.Event().wait()  # no other will come
        raise AssertionError

    def follow(self, version: int = -1) -> "Follower[T]":
        """Iterates over the values newer than `version`, the current one at once, until closed."""
        return Follower(self, version)


class Follower(Generic[T]):
    """An iterator over the values of a Latest. A class, since it holds nothing to clean up."""

    def __init__(self, latest: Latest[T], version: int) -> None:
        self._latest = latest
        self._version = version

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        version = await self._latest.newer_than(self._version)
        if version is None:
            raise StopAsyncIteration
        self._version = version
        return self._latest.value
