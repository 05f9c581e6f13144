import re
import shutil
import subprocess
import threading
import time
from dataclasses import replace

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from tests.kubelet.rig import GIB, RESOURCE
from tests.observe.rules import LLAMA, RESNET, RULES, SHRUNK, SICK, SNAPSHOT, WELL, usable
from vgpu_agent.model.container import grant
from vgpu_agent.model.devices import Gpu, Inventory, SharedGpu
from vgpu_agent.model.holders import Holder, Holders, Usage
from vgpu_agent.model.rules import MpsLimits, SharingRules
from vgpu_agent.model.snapshot import Driver, Rules, Snapshot
from vgpu_agent.observe.metrics import Metrics

OPENMETRICS = "application/openmetrics-text; version=1.0.0"

REASONS = [
    "xid",
    "recovery-action",
    "probe",
    "timeout",
    "ecc",
    "remap",
    "lost",
    "mps",
    "mps-fault",
    "compute-mode",
    "cordoned",
]


def gpu(uuid: str, index: int, **labels: str) -> dict[str, str]:
    return {"gpu_uuid": uuid, "gpu_index": str(index), **labels}


def devices(uuid: str, index: int, health: str) -> dict[str, str]:
    return gpu(uuid, index, resource=RESOURCE, health=health)


def held(uuid: str, index: int, by: Holder, **labels: str) -> dict[str, str]:
    names = {"namespace": by.namespace, "pod": by.pod, "container": by.container}
    return gpu(uuid, index, **labels, **names)


def vgpu(uuid: str, index: int, number: int) -> dict[str, str]:
    return gpu(uuid, index, resource=RESOURCE, device_id=f"{uuid}::{number}")


def holding(uuid: str, index: int, number: int, by: Holder) -> dict[str, str]:
    return held(uuid, index, by, resource=RESOURCE, device_id=f"{uuid}::{number}")


# Of a container that holds vGPUs which are no longer advertised the share is unknown.
QUARTER_OF_A = usable(WELL) // 4
QUARTER_OF_B = usable(SICK) // 4
SHARES = [
    (held("GPU-a", 0, RESNET), QUARTER_OF_A),
    (held("GPU-a", 0, LLAMA), 2 * QUARTER_OF_A),
    (held("GPU-b", 1, LLAMA), QUARTER_OF_B),
]

# Every sample of every name with its labels.
EXPECTED: dict[str, list[tuple[dict[str, str], float]]] = {
    "vgpu_build_info": [({"version": "1.2.3"}, 1)],
    "vgpu_nvml_up": [({}, 1)],
    "vgpu_gpu_info": [
        (
            gpu("GPU-a", 0, model="NVIDIA L4", driver_version="580.65.06", numa_node="0"),
            1,
        ),
        (
            gpu("GPU-b", 1, model="NVIDIA L4", driver_version="580.65.06", numa_node=""),
            1,
        ),
    ],
    "vgpu_gpu_healthy": [(gpu("GPU-a", 0), 1), (gpu("GPU-b", 1), 0)],
    "vgpu_gpu_unhealthy_reason": [(gpu("GPU-a", 0, reason=reason), 0) for reason in REASONS]
    + [(gpu("GPU-b", 1, reason=reason), int(reason in ("lost", "xid"))) for reason in REASONS],
    "vgpu_gpus_counted": [({}, 0)],
    "vgpu_gpus_described": [({}, 0)],
    "vgpu_gpu_unread": [(gpu("GPU-a", 0, what="events"), 1)],
    "vgpu_gpu_recovery_wait_seconds": [(gpu("GPU-a", 0), 60), (gpu("GPU-b", 1), 240)],
    "vgpu_gpu_memory_bytes": [
        (gpu("GPU-a", 0, kind="total"), 24 * GIB),
        (gpu("GPU-a", 0, kind="reserved"), 400 << 20),
        (gpu("GPU-a", 0, kind="used"), 10 * GIB),
        (gpu("GPU-b", 1, kind="total"), 24 * GIB),
        (gpu("GPU-b", 1, kind="reserved"), 0),
    ],
    "vgpu_gpu_excluded": [(gpu("GPU-c", 2, reason="mig"), 1)],
    "vgpu_devices": [
        (devices("GPU-a", 0, "healthy"), 4),
        (devices("GPU-a", 0, "unhealthy"), 0),
        (devices("GPU-b", 1, "healthy"), 0),
        (devices("GPU-b", 1, "unhealthy"), 4),
    ],
    "vgpu_xid_errors_total": [
        (gpu("GPU-a", 0, xid="13"), 3),
        (gpu("GPU-b", 1, xid="79"), 1),
        ({"gpu_uuid": "", "gpu_index": "", "xid": "8"}, 2),
        ({"gpu_uuid": "GPU-x", "gpu_index": "", "xid": "31"}, 1),
    ],
    "vgpu_health_transitions_total": [
        (gpu("GPU-b", 1, to="unhealthy", reason="lost"), 2),
        (gpu("GPU-b", 1, to="healthy", reason="lost"), 1),
    ],
    "vgpu_registrations_total": [
        ({"result": "registered"}, 2),
        ({"result": "refused"}, 0),
        ({"result": "unreachable"}, 5),
        ({"result": "no-stream"}, 0),
        ({"result": "endpoint"}, 0),
    ],
    "vgpu_list_and_watch_updates_total": [({}, 7)],
    "vgpu_kubelet_connected": [({}, 1)],
    **{
        f"vgpu_mps_{name}": [(gpu("GPU-a", 0), of_a), (gpu("GPU-b", 1), 0)]
        for name, of_a in (
            ("up", 1),
            ("limits_in_force", 1),
            ("busy", 0),
            ("servers_failing", 0),
            ("server_crashes_total", 3),
            ("clients", 2),
            ("waiting_clients", 1),
        )
    },
    "vgpu_mps_replacement_needed": [({}, 0)],
    "vgpu_mps_watch_up": [({}, 1)],
    "vgpu_mps_split_containers": [({}, 1)],
    "vgpu_mps_max_clients": [({}, 48)],
    "vgpu_podresources_up": [({}, 1)],
    "vgpu_device_allocated": [(vgpu("GPU-a", 0, n), int(n in (0, 2, 3))) for n in range(4)]
    + [(vgpu("GPU-b", 1, n), int(n in (0, 1))) for n in range(4)],
    "vgpu_allocation_info": [
        (holding("GPU-a", 0, 0, RESNET), 1),
        (holding("GPU-a", 0, 2, LLAMA), 1),
        (holding("GPU-a", 0, 3, LLAMA), 1),
        (holding("GPU-b", 1, 1, LLAMA), 1),
        (holding("GPU-b", 1, 0, SHRUNK), 1),
    ],
    "vgpu_allocation_memory_share_bytes": SHARES,
    "vgpu_allocation_memory_limit_bytes_per_process": SHARES,
    "vgpu_orphaned_allocations": [({"resource": RESOURCE}, 2)],
    "vgpu_largest_free_share": [({"resource": RESOURCE}, 1)],
    "vgpu_container_memory_used_bytes": [(held("GPU-a", 0, RESNET), 9 * GIB)],
    "vgpu_container_processes": [(held("GPU-a", 0, RESNET), 2), (held("GPU-b", 1, LLAMA), 1)],
    "vgpu_unattributed_processes": [(gpu("GPU-a", 0), 3)],
}


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("1.2.3", RESOURCE, RULES)


def text(metrics: Metrics, snapshot: Snapshot = SNAPSHOT, accept: str = "") -> str:
    return metrics.render(snapshot, accept)[0].decode()


def samples(metrics: Metrics, snapshot: Snapshot, name: str) -> list[tuple[dict[str, str], float]]:
    return [
        (sample.labels, sample.value)
        for family in parse_text(text(metrics, snapshot))
        for sample in family.samples
        if sample.name == name
    ]


def test_a_snapshot_is_exposed_in_exactly_these_families_and_samples(metrics):
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in parse_text(text(metrics)):
        assert family.documentation.endswith(".")
        for sample in family.samples:
            assert family.type == ("counter" if sample.name.endswith("_total") else "gauge")
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    assert found == EXPECTED


def test_no_series_repeats_and_none_is_of_creation_times(metrics):
    metrics.observe_rpc("Allocate", "OK", 0.002)
    for accept in ("", OPENMETRICS):
        lines = [line for line in text(metrics, accept=accept).splitlines() if line[0] != "#"]
        series = [line.rpartition(" ")[0] for line in lines]
        assert len(series) == len(set(series))
        assert "_created" not in "\n".join(lines)


# Formats


@pytest.mark.parametrize("accept", ["", "*/*", "text/plain", "text/html,*/*;q=0.8", "nonsense"])
def test_the_text_format_is_the_default(metrics, accept):
    body, content_type = metrics.render(SNAPSHOT, accept)
    assert content_type.startswith("text/plain; version=")
    assert "charset=utf-8" in content_type
    assert "# EOF" not in body.decode()


@pytest.mark.parametrize(
    "accept",
    [
        OPENMETRICS,
        # What Prometheus sends.
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,*/*;q=0.1",
    ],
)
def test_openmetrics_is_served_to_whoever_accepts_it(metrics, accept):
    metrics.observe_rpc("Allocate", "OK", 0.002)
    body, content_type = metrics.render(SNAPSHOT, accept)
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    assert body.decode().endswith("# EOF\n")
    as_text = {family.name for family in parse_text(text(metrics))}
    assert {family.name for family in parse_openmetrics(body.decode())} == as_text


@pytest.mark.slow
def test_promtool_finds_nothing_to_criticise(metrics):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: package prometheus)")
    metrics.observe_rpc("Allocate", "OK", 0.002)
    body, _ = metrics.render(SNAPSHOT, "")
    done = subprocess.run(
        [promtool, "check", "metrics"], input=body, capture_output=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# States


def test_before_the_driver_answers_there_is_no_gpu_and_everything_is_down(metrics):
    assert samples(metrics, Snapshot(), "vgpu_nvml_up") == [({}, 0)]
    assert samples(metrics, Snapshot(), "vgpu_kubelet_connected") == [({}, 0)]
    assert samples(metrics, Snapshot(), "vgpu_devices") == []
    results = ["registered", "refused", "unreachable", "no-stream", "endpoint"]
    found = samples(metrics, Snapshot(), "vgpu_registrations_total")
    assert found == [({"result": result}, 0) for result in results]
    assert 'gpu_uuid="' not in text(metrics, Snapshot())


def test_a_gpu_that_is_no_longer_listed_has_no_series_of_its_own(metrics):
    """Only the counters of what happened to it go on."""
    text(metrics)  # nothing of this scrape is kept
    later = Snapshot(
        inventory=Inventory((SharedGpu(WELL, 4),)),
        driver=SNAPSHOT.driver,
        xids=SNAPSHOT.xids,
        transitions=SNAPSHOT.transitions,
    )
    names = {
        sample.name
        for family in parse_text(text(metrics, later))
        for sample in family.samples
        if sample.labels.get("gpu_uuid") == "GPU-b"
    }
    assert names == {"vgpu_xid_errors_total", "vgpu_health_transitions_total"}


@pytest.mark.parametrize(
    "model",
    ['A "quoted" GPU', "back\\slash", "two\nlines", "\\n", "naïve ☃ GPU", "{a='b'},", ""],
)
def test_an_odd_model_name_survives_both_formats(metrics, model):
    odd = Gpu("GPU-a", 0, model, GIB, "00000000:01:00.0")
    snapshot = Snapshot(inventory=Inventory((SharedGpu(odd, 1),)), driver=Driver("1", None))
    for accept, parse in (("", parse_text), (OPENMETRICS, parse_openmetrics)):
        families = {family.name: family for family in parse(text(metrics, snapshot, accept))}
        (sample,) = families["vgpu_gpu_info"].samples
        assert sample.labels["model"] == model


# Calls of the kubelet


def test_calls_are_timed_by_method_and_code(metrics):
    metrics.observe_rpc("Allocate", "OK", 0.0004)
    metrics.observe_rpc("Allocate", "OK", 0.004)
    metrics.observe_rpc("Allocate", "INVALID_ARGUMENT", 20.0)
    counts = samples(metrics, SNAPSHOT, "vgpu_rpc_duration_seconds_count")
    assert sorted((each["method"], each["code"], count) for each, count in counts) == [
        ("Allocate", "INVALID_ARGUMENT", 1),
        ("Allocate", "OK", 2),
    ]
    sums = {each["code"]: value for each, value in _rpc(metrics, "sum")}
    assert sums == {"OK": pytest.approx(0.0044), "INVALID_ARGUMENT": 20.0}
    buckets = {(each["code"], each["le"]): value for each, value in _rpc(metrics, "bucket")}
    assert buckets["OK", "0.0005"] == 1
    assert buckets["OK", "0.0025"] == 1
    assert buckets["OK", "0.005"] == 2
    assert buckets["OK", "+Inf"] == 2
    assert buckets["INVALID_ARGUMENT", "10.0"] == 0
    assert buckets["INVALID_ARGUMENT", "+Inf"] == 1


def _rpc(metrics: Metrics, part: str) -> list[tuple[dict[str, str], float]]:
    return samples(metrics, SNAPSHOT, f"vgpu_rpc_duration_seconds_{part}")


def test_timings_stay_over_scrapes_and_belong_to_one_agent(metrics):
    other = Metrics("1.2.3", RESOURCE, RULES)
    metrics.observe_rpc("Allocate", "OK", 0.1)
    assert text(metrics) == text(metrics)
    assert _rpc(other, "count") == []


def test_calls_are_timed_while_metrics_are_rendered(metrics):
    """A scrape renders in a worker thread while the loop serves the kubelet."""
    ended = threading.Event()

    def call() -> None:
        number = 0
        while not ended.is_set():
            metrics.observe_rpc("Allocate", str(number), 0.001)
            number = (number + 1) % 20

    caller = threading.Thread(target=call)
    caller.start()
    try:
        for _ in range(20):
            text(metrics)
    finally:
        ended.set()
        caller.join()


# Who holds what


def exposed(body: str) -> set[str]:
    return {family.name for family in parse_text(body)}


def test_what_was_known_last_is_shown_while_the_kubelet_does_not_answer(metrics):
    silent = replace(SNAPSHOT, holders=replace(SNAPSHOT.holders, error="no such socket"))
    assert samples(metrics, silent, "vgpu_podresources_up") == [({}, 0)]
    name = "vgpu_device_allocated"
    assert samples(metrics, silent, name) == EXPECTED[name]


def test_the_series_of_a_pod_end_with_it(metrics):
    text(metrics)
    ended = replace(SNAPSHOT, holders=Holders(None, ()), usage=Usage())
    assert RESNET.pod not in text(metrics, ended)
    assert {value for _, value in samples(metrics, ended, "vgpu_device_allocated")} == {0}


@pytest.mark.parametrize(
    ("sharing", "applied"),
    [
        (SharingRules(mps=False), None),
        (SharingRules(mps_limits=MpsLimits.NONE), MpsLimits.NONE),
        (SharingRules(mps_limits=MpsLimits.SERVER), MpsLimits.NONE),
    ],
    ids=["time-slicing", "MPS without limits", "a daemon without limits, until it is replaced"],
)
def test_a_limit_is_shown_only_where_there_is_one(sharing, applied):
    metrics = Metrics("1.2.3", RESOURCE, Rules(sharing))
    mps = None
    if applied is not None:
        mps = replace(SNAPSHOT.mps, look=replace(SNAPSHOT.mps.look, limits=applied))
    snapshot = replace(SNAPSHOT, mps=mps)
    assert samples(metrics, snapshot, "vgpu_allocation_memory_limit_bytes_per_process") == []
    assert len(samples(metrics, snapshot, "vgpu_allocation_memory_share_bytes")) == len(SHARES)


@pytest.mark.parametrize(
    ("unknown", "pattern"),
    [
        ({"holders": Holders("no such socket")}, "alloc|free_share"),
        ({"mps": None}, "^vgpu_mps_"),
        ({"usage": None}, "container_|unattributed"),
    ],
)
def test_of_what_is_unknown_there_is_no_series(metrics, unknown, pattern):
    hidden = [name.removesuffix("_total") for name in EXPECTED if re.search(pattern, name)]
    names = exposed(text(metrics, replace(SNAPSHOT, **unknown)))
    assert len(hidden) >= 3
    assert not names & set(hidden)
    assert exposed(text(metrics)) >= set(hidden)


def test_a_share_is_what_the_container_was_given(metrics):
    granted = grant(SNAPSHOT.inventory, ["GPU-a::2", "GPU-a::3"], RULES.sharing).environment
    shares = samples(metrics, SNAPSHOT, "vgpu_allocation_memory_share_bytes")
    found = [v for labels, v in shares if labels == held("GPU-a", 0, LLAMA)]
    assert found == [int(granted["VGPU_MEMORY_BYTES"])]


def test_768_vgpus_are_rendered_without_a_series_for_each(metrics):
    gpus = tuple(
        SharedGpu(Gpu(f"GPU-{n:036d}", n, "NVIDIA L4", GIB, f"00000000:{n:02x}:00.0"), 48)
        for n in range(16)
    )
    snapshot = Snapshot(inventory=Inventory(gpus), driver=Driver("1", None))
    start = time.perf_counter()
    body = text(metrics, snapshot)
    assert time.perf_counter() - start < 1
    advertised = samples(metrics, snapshot, "vgpu_devices")
    assert sum(value for labels, value in advertised if labels["health"] == "healthy") == 768
    assert len(body.splitlines()) < 768
