"""Worker threads for calls that block, lanes that use them, and a gate that closing waits at."""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import TypeVar

import anyio

from vgpu_agent.errors import lacks_thread
from vgpu_agent.threads import PAUSE

T = TypeVar("T")

PATIENCE = 0.02
"""Seconds that the next lane of a crew waits for a call to end. A healthy GPU takes a few ms for
all that is asked of it."""

KEPT = 1
"""Threads that are kept while they have nothing to do."""


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
    """Threads, made when none is idle, and kept for the next call while few are.

    `daemon`: the process may end while they are in a call.
    """

    def __init__(self, *, daemon: bool = False) -> None:
        self._daemon = daemon
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
            threading.Thread(target=self._serve, args=(todo,), daemon=self._daemon).start()
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
        self._crew = crew
        self._workers = workers
        self._beat = 0.0
        self._inside = Future[None]()
        self._inside.set_result(None)

    def beat(self, doing: str) -> None:
        """The thread begins with the next of its calls."""
        self.doing, self._beat = doing, time.monotonic()

    @property
    def busy(self) -> bool:
        """Whether a thread is inside."""
        return not self._inside.done()

    async def run(self, call: Callable[[], T], limit: float = math.inf) -> T:
        """The answer of the call, or what it raises.

        Raises TimeoutError where a call inside takes longer than `limit` seconds, many that are
        slow being none that hangs, and where there is no thread for it in that time.
        """
        answer = await self.turn(call, limit)
        await self.end(limit)
        return answer.result(timeout=0)

    async def turn(self, call: Callable[[], T], limit: float) -> "Future[T]":
        """Begins when the lane is free, and there is a thread. Raises TimeoutError as `run`."""
        until = None
        while True:
            while self.busy:
                await self.end(limit)
            with suppress_lack_of_threads():
                return self.begin(call)
            until = until or time.monotonic() + limit
            if time.monotonic() >= until:
                self.doing = NO_THREAD
                raise TimeoutError
            await asyncio.sleep(min(PAUSE, limit))

    def begin(self, call: Callable[[], T]) -> "Future[T]":
        """Its answer, which is there when the lane is no longer busy. Must not be busy now.

        Raises RuntimeError where there is no thread for it.
        """
        answer = Future[T]()

        def hold() -> None:
            self.beat("its first call")
            try:
                answer.set_result(call())
            except Exception as error:  # noqa: BLE001 - raised where the answer is taken
                answer.set_exception(error)

        self.beat(QUEUED)
        self._inside = (self._crew or self._workers).do(hold)
        return answer

    async def end(self, limit: float) -> None:
        """Waits until the call that is inside now has ended. Raises TimeoutError as `run`."""
        inside = self._inside
        while not inside.done():
            left = self._beat + limit - time.monotonic()
            if self._crew is not None and self.doing is QUEUED and left > -QUEUE_SECONDS:
                left = PATIENCE  # which is nobody's fault, and not for long
            elif left <= 0:
                if self._crew is not None:
                    self._crew.overtake()
                raise TimeoutError
            await self.ended(left)

    async def ended(self, within: float) -> None:
        """Waits for it so many seconds. A thread that is left is not disturbed."""
        inside, loop, done = self._inside, asyncio.get_running_loop(), asyncio.Event()

        def tell(_: "Future[None]") -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(done.set)

        inside.add_done_callback(tell)
        with anyio.move_on_after(within):
            await done.wait()
        if self._crew is not None and not inside.done():
            self._crew.overtake()


async def run_all(
    calls: Mapping[Lane, Callable[[], T]], limit: float, patience: float = math.inf
) -> dict[Lane, T | TimeoutError]:
    """What lanes of one crew answer within `patience` seconds, each call as by `Lane.run`.

    Where all answer at once, the loop hears of it once.
    """
    answers: dict[Lane, Future[T]] = {}
    hung: dict[Lane, TimeoutError] = {}
    with suppress_lack_of_threads():
        for lane, call in calls.items():
            if not lane.busy:
                answers[lane] = lane.begin(call)

    async def answer(lane: Lane) -> None:
        try:
            if lane not in answers:
                answers[lane] = await lane.turn(calls[lane], limit)
            if not answers[lane].done():
                await lane.end(limit)
        except TimeoutError as error:
            hung[lane] = error

    with anyio.move_on_after(patience):
        for lane in list(answers)[-1:]:
            await lane.ended(PATIENCE)
        late = [lane for lane in calls if lane not in answers or not answers[lane].done()]
        if late:
            async with anyio.create_task_group() as tasks:
                for lane in late:
                    tasks.start_soon(answer, lane)
    return hung | {lane: each.result() for lane, each in answers.items() if each.done()}
