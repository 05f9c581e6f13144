"""The process: runs a command and turns what it ends with into an exit code.

0: ended as asked. 1: failed. 2: wrong settings or arguments, or the metrics address is taken.
130: Ctrl-C, where a command has nothing to clean up.
"""

import sys

from vgpu_agent import signals

if sys.argv[1:2] in (["run"], ["dev"], ["limits"]):
    signals.install()  # before all else, which takes some tenths of a second
elif "--at-end" in sys.argv:
    signals.block()

import logging
import os
import threading
from contextlib import suppress

from vgpu_agent.cli import execute
from vgpu_agent.errors import ListenError, SettingsError, VgpuAgentError, is_shortage

log = logging.getLogger(__name__)


def main() -> None:
    """The console script."""
    code = 0
    try:
        code = execute(sys.argv[1:])
    except* (SettingsError, ListenError) as wrong:
        code = _explain(wrong, 2)
    except* VgpuAgentError as failed:
        code = _explain(failed, 1)
    except* BrokenPipeError:
        # Whoever read our output has left; Python's own last flush must not stumble over it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except* KeyboardInterrupt:
        code = 130
    except* Exception as failed:
        # Let the DaemonSet start a fresh process; of a bug say all that is known.
        if failed.split(is_shortage)[1] is None:
            code = _explain(failed, 1)
        else:
            log.critical("ending after an unexpected error", exc_info=True)
            code = 1
    _leave_threads(code)
    sys.exit(code)


def _explain(errors: BaseExceptionGroup[Exception], code: int) -> int:
    for error in errors.exceptions:
        if isinstance(error, BaseExceptionGroup):
            _explain(error, code)
        else:
            sys.stderr.write(f"vgpu-agent: {error}\n")
    return code


def _leave_threads(code: int) -> None:
    """Ends the process hard if a thread is left: Python would wait for it, or take NVML from it.

    Everything else is cleaned up by now. Idle worker threads have been asked to end; one that
    waits for the driver's events is left to its wait.
    """
    threads = [each for each in threading.enumerate() if each is not threading.main_thread()]
    for each in threads:
        if not each.daemon:
            each.join(timeout=0.2)
            if each.is_alive():
                log.warning("a call to the driver does not return; ending without it")
                break
    if any(each.is_alive() for each in threads):
        logging.shutdown()
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
