"""Worker threads for calls that block, lanes that use them, and a gate that closing waits at."""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TypeVar

import anyio

T = TypeVar("T")

PATIENCE = 0.02
"""Seconds that the next lane of a crew waits for a call to end. A healthy GPU takes a few ms for
all that is asked of it."""

KEPT = 2
"""Threads that are kept while they have nothing to do: one that waits for events, one that asks."""


class Gate:
    """Lets many threads in together, or one alone; whoever wants to be alone goes first."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._inside = 0
        self._wanted = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Inside together with others."""
        with self._condition:
            self._condition.wait_for(lambda: not self._wanted)
            self._inside += 1
        try:
            yield
        finally:
            with self._condition:
                self._inside -= 1
                self._condition.notify_all()

    @contextmanager
    def alone(self, timeout: float) -> Iterator[bool]:
        """Waits so many seconds until all are out; whether they are. One thread at a time."""
        with self._condition:
            self._wanted = True
            try:
                yield self._condition.wait_for(lambda: self._inside == 0, timeout)
            finally:
                self._wanted = False
                self._condition.notify_all()


class Workers:
    """Threads, made when none is idle, and kept for the next call while few are."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: deque[SimpleQueue[tuple[Callable[[], None], Future[None]] | None]] = deque()
        self._kept = KEPT

    def do(self, work: Callable[[], None]) -> "Future[None]":
        """Does what raises nothing; the answer comes when the thread is free again."""
        done = Future[None]()
        with self._lock:
            self._kept = KEPT
            todo = self._idle.pop() if self._idle else None
        if todo is None:
            todo = SimpleQueue()
            threading.Thread(target=self._serve, args=(todo,), name="driver").start()
        todo.put((work, done))
        return done

    def _serve(self, todo: "SimpleQueue[tuple[Callable[[], None], Future[None]] | None]") -> None:
        stays = True
        while stays and (given := todo.get()) is not None:
            work, done = given
            work()
            with self._lock:
                stays = len(self._idle) < self._kept
                if stays:
                    self._idle.append(todo)
            done.set_result(None)
            del given, work, done

    def end(self) -> None:
        """Lets the threads end, each when its call has; the next call makes new ones."""
        with self._lock:
            self._kept = 0
            while self._idle:
                self._idle.pop().put(None)


class Lane:
    """Blocking calls, one at a time, in a worker thread.

    A caller can leave at any time, but the thread stays until its call returns. The next caller
    waits for that on the loop: a driver that hangs costs one thread, not one for each call.

    Lanes of one `crew` begin one after the other: the next one when the call before has ended, or
    has taken PATIENCE. So those that answer at once share a thread, and no other is held up long.
    """

    def __init__(self, workers: Workers, crew: anyio.Lock | None = None) -> None:
        self.doing = ""
        self._workers = workers
        self._crew = crew
        self._turn = anyio.Lock()
        self._beat = 0.0
        self._inside: Future[None] | None = None

    def beat(self, doing: str) -> None:
        """The thread begins with the next of its calls."""
        self.doing, self._beat = doing, time.monotonic()

    async def run(self, call: Callable[[], T], limit: float = math.inf) -> T:
        """The answer of the call, or what it raises.

        Raises TimeoutError where a call inside takes longer than `limit` seconds: many that are
        slow are none that hangs.
        """
        async with self._turn:
            await self._free(limit)
            if self._crew is None:
                answer = self._begin(call)
            else:
                async with self._crew:
                    answer = self._begin(call)
                    await self._wait(PATIENCE)
            await self._free(limit)
            return answer.result(timeout=0)

    def _begin(self, call: Callable[[], T]) -> "Future[T]":
        answer = Future[T]()

        def hold() -> None:
            try:
                answer.set_result(call())
            except Exception as error:  # noqa: BLE001 - raised where the answer is taken
                answer.set_exception(error)

        self.beat("its first call")
        self._inside = self._workers.do(hold)
        return answer

    async def _free(self, limit: float) -> None:
        """Waits until no thread is inside. Raises TimeoutError as `run`."""
        while self._inside is not None and not self._inside.done():
            left = self._beat + limit - time.monotonic()
            if left <= 0:
                raise TimeoutError
            await self._wait(left)

    async def _wait(self, seconds: float) -> None:
        """Waits so long for the thread at most; a thread that was left is not disturbed."""
        if self._inside is not None:
            timeout = None if seconds == math.inf else seconds
            await asyncio.wait([asyncio.wrap_future(self._inside)], timeout=timeout)
