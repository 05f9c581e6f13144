"""The stand-in for the container toolkit's hook: what it sets, and what keeps a container back."""

import pytest

from tests.fake_nvml import FakeGpu, FakeNvml, Limit
from tests.limits.containers import NotStartedError, Runtime

pytestmark = pytest.mark.slow

MIB = 2**20
CGROUP = "/kubepods/pod55c6c714-b240-4dec-9a45-57b61696ab6e/{id}"
GPUS = ("GPU-a", "GPU-b")
NOT_SUPPORTED = 3


def limits(request: object, limit: object) -> dict[str, str]:
    return {"NVIDIA_GPU_MEMORY_REQUEST": str(request), "NVIDIA_GPU_MEMORY_LIMIT": str(limit)}


@pytest.fixture
def nvml(fake_nvml: FakeNvml) -> FakeNvml:
    fake_nvml.set_gpus(*(FakeGpu(uuid, bus=f"00000000:3{uuid[-1]}:00.0") for uuid in GPUS))
    fake_nvml.set_driver("615.71")
    return fake_nvml


def test_the_limits_are_set_before_the_program_starts(v2_runtime: Runtime, nvml):
    container = v2_runtime.start(CGROUP, limits(0, 3000), GPUS)
    path = f"/sys/fs/cgroup{container.cgroup}"
    assert path.endswith(CGROUP.format(id=container.id))
    assert nvml.limits() == {(uuid, path): Limit(0, 3000 * MIB) for uuid in GPUS}
    v2_runtime.start(CGROUP, limits(1000, 1000), GPUS[:1])
    assert Limit(1000 * MIB, 1000 * MIB) in nvml.limits().values()
    assert len(nvml.limits()) == 3


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"NVIDIA_GPU_MEMORY_LIMIT": "3000"},
        {"NVIDIA_GPU_MEMORY_REQUEST": "0"},
        {"NVIDIA_GPU_MEMORY_REQUESTS": "0", "NVIDIA_GPU_MEMORY_LIMITS": "3000"},
    ],
    ids=["none", "no request", "no limit", "plural"],
)
def test_without_both_variables_it_does_nothing(v1_runtime: Runtime, nvml, environment):
    v1_runtime.start(CGROUP, environment, GPUS)  # where it could do nothing
    assert nvml.limits() == {}


@pytest.mark.parametrize(
    ("request_", "limit"), [(0, ""), (0, "1.5"), (0, "3Gi"), ("-1", 3), (4, 3), ("x", 3), (0, "²")]
)
def test_numbers_that_make_no_sense_keep_the_container_from_starting(
    v2_runtime: Runtime, nvml, request_, limit
):
    fails(v2_runtime, nvml, "NVIDIA_GPU_MEMORY_LIMIT", limits(request_, limit))


def test_cgroup_v1_keeps_the_container_from_starting(v1_runtime: Runtime, nvml):
    fails(v1_runtime, nvml, "no cgroup v2 at /sys/fs/cgroup")


def test_an_old_driver_keeps_the_container_from_starting(v2_runtime: Runtime, nvml):
    nvml.set_driver("610.1")
    fails(v2_runtime, nvml, "Function Not Found")


def test_a_driver_that_needs_dmem_files_keeps_the_container_from_starting(
    v2_runtime: Runtime, nvml
):
    nvml.set_driver("615.71", dmem=True)
    fails(v2_runtime, nvml, "Not Found")


def test_a_gpu_that_cannot_be_limited_keeps_the_container_from_starting(v2_runtime: Runtime, nvml):
    nvml.update("GPU-b", set_limits_error=NOT_SUPPORTED)
    with pytest.raises(NotStartedError, match="Not Supported"):
        v2_runtime.start(CGROUP, limits(0, 3000), GPUS)


def test_without_nvml_the_container_does_not_start(v2_runtime: Runtime, nvml):
    v2_runtime.nvml = {}
    fails(v2_runtime, nvml, "Shared Library Not Found")


def fails(runtime: Runtime, nvml: FakeNvml, words: str, environment=None) -> None:
    with pytest.raises(NotStartedError, match="hook") as raised:
        runtime.start(CGROUP, environment or limits(0, 3000), GPUS)
    assert words in str(raised.value)
    assert nvml.limits() == {}
