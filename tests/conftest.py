"""What all tests share."""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_nvml.fixtures import fake_nvml, fake_nvml_library

__all__ = ["fake_nvml", "fake_nvml_library"]


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


def pytest_configure(config: pytest.Config) -> None:
    # `nohup make test &` ignores SIGINT, and every process that a test starts would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.environ.get("VGPU_TEST_NO_SKIP"):
        config.pluginmanager.register(NoSkips())
