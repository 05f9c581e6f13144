"""A value that is made in a process beside this one, while this one goes on."""

import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


def begin(make: Callable[[], T]) -> Callable[[], T]:
    """Begins to make a value in a child process. What is returned waits for it.

    What only the making needs, modules above all, never is in the memory of this process, and
    another core does the work. Where that does not work, for whatever reason, the value is made
    here when it is asked for, and what is wrong with it is raised here. Only for a process that has
    no threads yet, and a value that can be pickled.
    """
    try:
        made, sent = os.pipe()
    except OSError:
        return make
    try:
        child = os.fork()
    except OSError:
        os.close(made)
        os.close(sent)
        return make
    if not child:
        with suppress(BaseException):
            os.write(sent, pickle.dumps(make()))
        os._exit(0)
    os.close(sent)

    def take() -> T:
        with os.fdopen(made, "rb") as pipe:
            answer = pipe.read()
        os.waitpid(child, 0)
        try:
            value: T = pickle.loads(answer)  # noqa: S301 - our own child wrote it
        except (EOFError, pickle.UnpicklingError):
            return make()
        return value

    return take
