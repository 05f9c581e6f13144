"""What all tests share."""

import fcntl
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.fake_nvml.fixtures import fake_nvml, fake_nvml_library

__all__ = ["fake_nvml", "fake_nvml_library"]

# `make quick` takes a fifth of the examples; the other targets take all of them.
hypothesis.settings.register_profile("quick", max_examples=20)

NEW_PROCESS = frozenset(
    {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system"}
)
"""The audit events of Python that come before a new process."""


@pytest.fixture
def anyio_backend() -> str:
    """The agent runs on asyncio: grpclib does."""
    return "asyncio"


@pytest.fixture
def kubelet_dir() -> Iterator[Path]:
    """A kubelet directory with a short path: unix sockets take 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="vgpu-") as directory:
        yield Path(directory)


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on what the machine has set."""
    for name in os.environ:
        if name.upper().startswith("VGPU_") and name != "VGPU_TEST_NO_SKIP":
            monkeypatch.delenv(name)


class NoProcesses:
    """A test that is not marked `slow` starts no process, so that `make quick` stays quick."""

    def __init__(self) -> None:
        self.test: pytest.Item | None = None
        sys.addaudithook(self.look)

    def look(self, event: str, _: Any) -> None:
        if event in NEW_PROCESS and self.test is not None:
            pytest.fail(f"a process is started ({event}): mark {self.test.name} slow")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        quick = item.get_closest_marker("slow") is None and item.get_closest_marker("ci") is None
        self.test = item if quick else None
        try:
            return (yield)
        finally:
            self.test = None


class Alone:
    """While a test that is marked `alone` runs, no other worker runs one, but for those of `ci`.

    The others share a lock. Whoever waits for it has the gate, so that nobody is overtaken. Tests
    that take a minute would stop all workers for as long, and take no part.
    """

    def __init__(self) -> None:
        here = Path(__file__)
        self.lock, self.gate = (os.open(path, os.O_RDONLY) for path in (here, here.parent))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        if item.get_closest_marker("ci") is not None:
            return (yield)
        alone = item.get_closest_marker("alone") is not None
        fcntl.flock(self.gate, fcntl.LOCK_EX)
        fcntl.flock(self.lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(self.gate, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            fcntl.flock(self.lock, fcntl.LOCK_UN)

    def pytest_unconfigure(self) -> None:
        os.close(self.lock)
        os.close(self.gate)


class LeftOut:
    """Names at the end the tests that only `.ci/run` runs, where they were deselected."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        ours = [item for item in items if item.get_closest_marker("ci")]
        self.count.update(item.nodeid.partition("[")[0] for item in ours)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["left_out"] = dict(self.count)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        # Every worker collects the same, and the controller nothing.
        self.count |= Counter(getattr(node, "workeroutput", {}).get("left_out", {}))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for name, count in sorted(self.count.items()):
            several = f" ({count} tests)" if count > 1 else ""
            terminalreporter.write_line(f"deselected, runs in .ci/run: {name}{several}")


class NoSkips:
    """On the machine where everything is installed, a skipped test is a failed one."""

    def __init__(self) -> None:
        self.skipped: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self.skipped.append(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.skipped:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for name in self.skipped:
            terminalreporter.write_line(f"SKIPPED where nothing may be: {name}", red=True)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where slow tests are left out, a module of nothing else is not even loaded."""
    if "not slow" not in config.option.markexpr or not collection_path.match("test_*.py"):
        return None
    marks = collection_path.read_text("utf-8").partition("\npytestmark = ")[2].partition("\n\n")[0]
    return True if "pytest.mark.slow" in marks else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Two for each core where processes are waited for, and one where tests only compute."""
    if config.option.numprocesses == "logical":
        return None
    cores = len(os.sched_getaffinity(0))
    return max(cores, min(2 * cores, 16))


def pytest_configure(config: pytest.Config) -> None:
    # `nohup make test &` ignores SIGINT, and every process that a test starts would inherit that.
    # xdist's workers, which inherit it too, come here as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.pluginmanager.register(NoProcesses())
    config.pluginmanager.register(LeftOut())
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(Alone())
    if os.environ.get("VGPU_TEST_NO_SKIP"):
        config.pluginmanager.register(NoSkips())
