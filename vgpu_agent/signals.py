"""The signals of a command that runs until it is ended, from its first moment to its last.

Signal handlers of asyncio exist only while its loop does: before and after it SIGTERM would end the
process with a failure, or, as the first process of a container, do nothing.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ENDING = (signal.SIGTERM, signal.SIGINT)

Receiver = Callable[[signal.Signals], object]


def _end(number: signal.Signals) -> None:
    """Nothing has begun: there is nothing to clean up."""
    if number in ENDING:
        os._exit(0)


_receiver: Receiver = _end


def install() -> None:
    """Takes the signals over: until there is a receiver they end the process with 0."""
    for each in (*ENDING, signal.SIGUSR1):
        signal.signal(each, lambda number, _: _receiver(signal.Signals(number)))


def block() -> None:
    """Keeps the signals for whoever waits for them, also in processes that this one starts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)


@contextmanager
def received(receiver: Receiver) -> Iterator[None]:
    """Hands signals to this, in the main thread between any two steps; after it they are over."""
    global _receiver  # noqa: PLW0603 - signals are the process's
    install()
    _receiver = receiver
    try:
        yield
    finally:
        # All is over but the exit. Python takes its own handlers away before it has ended.
        for each in (*ENDING, signal.SIGUSR1):
            signal.signal(each, signal.SIG_IGN)


def end_within(seconds: int, code: int) -> None:
    """Ends the process with that code if it has not ended by itself then. Takes no thread."""
    signal.signal(signal.SIGALRM, lambda *_: os._exit(code))
    signal.alarm(seconds)
