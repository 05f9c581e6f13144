"""Worker threads for calls that block: one for each lane, and a gate that closing waits at."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

import anyio
from anyio import to_thread

T = TypeVar("T")


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


class Lane:
    """Blocking calls, one at a time, each in a worker thread.

    A caller can leave at any time, but the thread stays until its call returns. The next caller
    waits for that on the loop: a driver that hangs costs one thread, not one for each call.
    `busy` is held by the thread while it is inside.
    """

    def __init__(self) -> None:
        self.busy = threading.Lock()
        self.doing = ""
        self._turn = anyio.Lock()
        self._limiter = anyio.CapacityLimiter(1)
        self._beat = 0.0

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
            self.beat("its first call")
            with anyio.move_on_after(limit):
                await to_thread.run_sync(
                    self._hold, call, answer, abandon_on_cancel=True, limiter=self._limiter
                )
            if not answer.done():
                await self._free(limit)
            return answer.result(timeout=0)

    def _hold(self, call: Callable[[], T], answer: "Future[T]") -> None:
        with self.busy:
            try:
                answer.set_result(call())
            except Exception as error:  # noqa: BLE001 - raised where the answer is taken
                answer.set_exception(error)

    async def _free(self, limit: float) -> None:
        """Waits until no thread is inside."""
        while self.busy.locked():
            if time.monotonic() - self._beat >= limit:
                raise TimeoutError
            await anyio.sleep(0.02)  # a thread that was left tells nobody
