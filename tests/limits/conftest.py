"""Fixtures of real cgroups and containers; see `containers`."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_nvml import FakeNvml
from tests.limits.containers import V1, V2, Machine, NotHereError, Runtime, machine


def _machine(script: str) -> Iterator[Machine]:
    try:
        with machine(script) as made:
            yield made
    except NotHereError as error:
        pytest.skip(str(error))


@pytest.fixture
def v2_machine() -> Iterator[Machine]:
    yield from _machine(V2)


@pytest.fixture
def v1_machine() -> Iterator[Machine]:
    yield from _machine(V1)


def _runtime(on: Machine, directory: Path, nvml: FakeNvml) -> Iterator[Runtime]:
    try:
        runtime = Runtime(on, directory, nvml.environment())
    except NotHereError as error:
        pytest.skip(str(error))
    try:
        yield runtime
    finally:
        runtime.close()


@pytest.fixture
def v2_runtime(v2_machine: Machine, tmp_path: Path, fake_nvml: FakeNvml) -> Iterator[Runtime]:
    """Starts containers with the hook, on cgroup v2."""
    yield from _runtime(v2_machine, tmp_path / "containers", fake_nvml)


@pytest.fixture
def v1_runtime(v1_machine: Machine, tmp_path: Path, fake_nvml: FakeNvml) -> Iterator[Runtime]:
    yield from _runtime(v1_machine, tmp_path / "containers", fake_nvml)
