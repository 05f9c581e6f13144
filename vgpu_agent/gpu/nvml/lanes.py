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

from vgpu_agent.errors import lacks_thread
from vgpu_agent.threads import PAUSE

T = TypeVar("T")

PATIENCE = 0.02
"""Seconds that the next lane of a crew waits for a call to end. A healthy GPU takes a few ms for
all that is asked of it."""

KEPT = 2
"""Threads that are kept while they have nothing to do: one that waits for events, one that asks."""


QUEUED = "its turn"
"""What a lane does that waits for others of its crew."""

QUEUE_SECONDS = 10.0
"""Longest that its turn is waited for, beyond what the call may take: it comes at once, but where
there are no threads."""

NO_THREAD = "no thread can be started on this node"


@contextmanager
def suppress_lack_of_threads() -> Iterator[None]:
    """Passes over that no thread can be started now."""
    try:
        yield
    except RuntimeError as error:
        if not lacks_thread(error):
            raise


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


class Crew:
    """Calls of several lanes, one after the other in one thread, in the order of their asking.

    A call that takes longer than PATIENCE is left behind by those who wait: the rest goes on in
    another thread, and the one that was left ends with its call. Used on one loop.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._shift: object = None
        self._since = 0.0

    def do(self, work: Callable[[], None]) -> "Future[None]":
        """Does what raises nothing, in its turn."""
        done = Future[None]()
        with self._lock:
            self._waiting.append((work, done))
            idle = self._shift is None
        if idle:
            try:
                self._begin_shift()
            except BaseException:
                self._waiting.pop()
                raise
        return done

    def overtake(self) -> None:
        """Lets those who wait go on, where the call before them takes long."""
        with self._lock:
            late = bool(self._waiting) and time.monotonic() - self._since >= PATIENCE
        if late:
            with suppress_lack_of_threads():
                self._begin_shift()

    def _begin_shift(self) -> None:
        shift = object()
        with self._lock:
            before, self._shift, self._since = self._shift, shift, time.monotonic()
        try:
            self._workers.do(lambda: self._work(shift))
        except BaseException:
            self._shift = before  # no thread is to be had now: the next call tries again
            raise

    def _work(self, shift: object) -> None:
        while True:
            with self._lock:
                if self._shift is not shift:
                    return
                if not self._waiting:
                    self._shift = None
                    return
                work, done = self._waiting.popleft()
                self._since = time.monotonic()
            work()
            done.set_result(None)


class Lane:
    """Blocking calls, one at a time, in a worker thread.

    A caller can leave at any time, but the thread stays until its call returns. The next caller
    waits for that on the loop: a driver that hangs costs one thread, not one for each call.

    Lanes of one `crew` share a thread for as long as each answers at once.
    """

    def __init__(self, workers: Workers, crew: Crew | None = None) -> None:
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
            answer = Future[T]()

            def hold() -> None:
                self.beat("its first call")
                try:
                    answer.set_result(call())
                except Exception as error:  # noqa: BLE001 - raised where the answer is taken
                    answer.set_exception(error)

            self.beat(QUEUED)
            self._inside = await self._begun(hold, limit)
            await self._free(limit)
            return answer.result(timeout=0)

    async def _begun(self, work: Callable[[], None], limit: float) -> "Future[None]":
        """Begins the work once there is a thread for it. Raises TimeoutError as `run`."""
        until = self._beat + limit
        while True:
            with suppress_lack_of_threads():
                return (self._crew or self._workers).do(work)
            if time.monotonic() >= until:
                self.doing = NO_THREAD
                raise TimeoutError
            await asyncio.sleep(min(PAUSE, limit))

    async def _free(self, limit: float) -> None:
        """Waits until no thread is inside. Raises TimeoutError as `run`."""
        if self._inside is None or self._inside.done():
            return
        ended = asyncio.wrap_future(self._inside)
        while not ended.done():
            left = self._beat + limit - time.monotonic()
            if self._crew is not None and self.doing is QUEUED and left > -QUEUE_SECONDS:
                left = PATIENCE  # which is nobody's fault, and not for long
            elif left <= 0:
                if self._crew is not None:
                    self._crew.overtake()
                raise TimeoutError
            # A thread that was left is not disturbed.
            await asyncio.wait([ended], timeout=None if left == math.inf else left)
            if self._crew is not None and not ended.done():
                self._crew.overtake()
