"""Fixtures of the fake NVML: the library is compiled once, each test gets GPUs of its own."""

import shutil
from pathlib import Path

import pytest

from tests.fake_nvml import FakeNvml, build


@pytest.fixture(scope="session")
def fake_nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler (cc)")
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def fake_nvml(fake_nvml_library: Path, tmp_path: Path) -> FakeNvml:
    return FakeNvml(fake_nvml_library, tmp_path / "nvml")
