import math
import re
import shutil
import subprocess
import threading
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from prometheus_client.registry import Collector

from tests.kubelet.rig import GIB, RESOURCE
from tests.observe.rules import LLAMA, RESNET, RULES, SHRUNK, SICK, SNAPSHOT, WELL, usable
from vgpu_agent.model.container import grant
from vgpu_agent.model.devices import Gpu, Inventory, SharedGpu
from vgpu_agent.model.holders import Holder, Holders, Usage
from vgpu_agent.model.rules import MpsLimits, SharingRules
from vgpu_agent.model.snapshot import Driver, Rules, Snapshot
from vgpu_agent.observe.metrics import Metrics, prefers_openmetrics
from vgpu_agent.observe.metrics import exposed as as_text
from vgpu_agent.observe.timings import CALLS

FORMATS = (False, True)
"""Prometheus's own text format, and OpenMetrics."""

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
    "limits",
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

TRANSITIONS = {("GPU-b", "unhealthy", "lost"): 2, ("GPU-b", "healthy", "lost"): 1}

# Every sample of every name with its labels. What calls took is apart, below.
EXPECTED: dict[str, list[tuple[dict[str, str], float]]] = {
    "vgpu_build_info": [({"version": "1.2.3"}, 1)],
    "vgpu_nvml_up": [({}, 1)],
    "vgpu_nvml_released": [({}, 0)],
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
        (gpu(uuid, index, to=to, reason=reason), TRANSITIONS.get((uuid, to, reason), 0))
        for uuid, index in (("GPU-a", 0), ("GPU-b", 1))
        for to in ("healthy", "unhealthy")
        for reason in REASONS
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
    "vgpu_allocation_process_memory_limit_bytes": SHARES,
    "vgpu_orphaned_allocations": [({"resource": RESOURCE}, 2)],
    "vgpu_largest_free_share": [({"resource": RESOURCE}, 1)],
    "vgpu_memory_limits_mode": [
        ({"mode": mode}, int(mode == "driver")) for mode in ("driver", "hook", "none", "off")
    ],
    "vgpu_container_memory_limit_missing": [
        ({"namespace": LLAMA.namespace, "pod": LLAMA.pod, "container": LLAMA.container}, 1)
    ],
    "vgpu_container_memory_used_bytes": [
        (held("GPU-a", 0, RESNET), 9 * GIB),
        (held("GPU-a", 0, LLAMA), 7 * GIB),
        (held("GPU-b", 1, LLAMA), GIB),
    ],
    "vgpu_container_memory_source_info": [
        (held("GPU-a", 0, RESNET, source="processes"), 1),
        (held("GPU-a", 0, LLAMA, source="driver"), 1),
        (held("GPU-b", 1, LLAMA, source="driver"), 1),
    ],
    "vgpu_container_memory_peak_bytes": [
        (held("GPU-a", 0, LLAMA), 8 * GIB),
        (held("GPU-b", 1, LLAMA), GIB),
    ],
    "vgpu_container_memory_limit_bytes": [(held("GPU-a", 0, LLAMA), 12 * GIB)],
    "vgpu_container_processes": [(held("GPU-a", 0, RESNET), 2), (held("GPU-b", 1, LLAMA), 1)],
    "vgpu_unattributed_processes": [(gpu("GPU-a", 0), 3)],
}


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("1.2.3", RESOURCE, RULES)


def text(metrics: Metrics, snapshot: Snapshot = SNAPSHOT, *, in_openmetrics: bool = False) -> str:
    return metrics.render(snapshot, in_openmetrics=in_openmetrics)[0].decode()


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
            if family.type == "histogram":
                continue
            assert family.type == ("counter" if sample.name.endswith("_total") else "gauge")
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    assert found == EXPECTED


def test_the_unit_is_last_in_a_name(metrics):
    """But for what says that it is a counter, or a part of a histogram."""
    names = [family.name for family in parse_text(text(metrics))]
    units = ("bytes", "seconds")
    assert [name for name in names if any(f"_{unit}" in name for unit in units)] == [
        name for name in names if name.endswith(units)
    ]


def test_no_series_repeats_and_none_is_of_creation_times(metrics):
    metrics.calls.observe_rpc("Allocate", "OK", 0.002)
    for in_openmetrics in FORMATS:
        body = text(metrics, in_openmetrics=in_openmetrics)
        lines = [line for line in body.splitlines() if line[0] != "#"]
        series = [line.rpartition(" ")[0] for line in lines]
        assert len(series) == len(set(series))
        assert "_created" not in "\n".join(lines)


# Formats


class Families(Collector):
    """What the library asks of a registry."""

    def __init__(self, *families):
        self.families = families

    def collect(self):
        return iter(self.families)


HOSTILE = GaugeMetricFamily("hostile", 'a\\b "c"\nd', labels=("one", "two"))
HOSTILE.add_metric(('"', "\\"), math.inf)
HOSTILE.add_metric(("a\nb", "ü\u2028}"), -math.inf)
HOSTILE.add_metric(("", "x" * 1000), math.nan)
HOSTILE.add_metric(("1", "2"), 1e21)
HOSTILE.add_metric(("1", "3"), 1234567.5)


@pytest.mark.parametrize("in_openmetrics", FORMATS)
def test_the_text_is_byte_for_byte_that_of_the_library(metrics, in_openmetrics):
    metrics.calls.observe_rpc("Allocate", "OK", 0.002)
    families = [*metrics.families(SNAPSHOT), HOSTILE]
    encode = openmetrics.generate_latest if in_openmetrics else generate_latest
    text_of_library = encode(Families(*families))
    assert as_text(families, in_openmetrics=in_openmetrics) == text_of_library


def test_each_format_has_its_content_type_and_both_the_same_families(metrics):
    metrics.calls.observe_rpc("Allocate", "OK", 0.002)
    (plain, of_plain), (marked, of_marked) = (
        metrics.render(SNAPSHOT, in_openmetrics=each) for each in FORMATS
    )
    assert of_plain == "text/plain; version=0.0.4; charset=utf-8"
    assert of_marked == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert b"# EOF" not in plain
    assert marked.endswith(b"# EOF\n")
    as_text = {family.name for family in parse_text(plain.decode())}
    assert {family.name for family in parse_openmetrics(marked.decode())} == as_text


OPENMETRICS = "application/openmetrics-text"
PROMETHEUS_2 = (
    f"{OPENMETRICS}; version=1.0.0,{OPENMETRICS}; version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
PROMETHEUS_3 = (
    "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;"
    f"encoding=delimited;q=0.6,{OPENMETRICS};version=1.0.0;escaping=allow-utf-8;q=0.5,"
    f"{OPENMETRICS};version=0.0.1;q=0.4,text/plain;version=1.0.0;escaping=allow-utf-8;"
    "q=0.3,text/plain;version=0.0.4;q=0.2,/;q=0.1"
)


@pytest.mark.parametrize(
    ("accept", "preferred"),
    [
        ("", False),
        ("*/*", False),
        ("text/html,*/*;q=0.8", False),
        ("nonsense", False),
        (";;;,,,==;q", False),
        ('text/plain; version="0.0.4"', False),
        ("text/plain;version=" + "9" * 5000, False),
        (OPENMETRICS, True),
        (f"{OPENMETRICS}; version=1.0.0", True),
        (f'{OPENMETRICS}; version="1.0.0"; charset=utf-8', True),
        (f'{OPENMETRICS} ; q = 0.5 ; version = "1.0.0"', True),
        (f"{OPENMETRICS.upper()};VERSION=1.0.0", True),
        (f'{OPENMETRICS};version="0.0.4"', False),
        (f"{OPENMETRICS};version=0.0.1", False),
        (f"{OPENMETRICS};version=2.0.0", False),
        (f"{OPENMETRICS};version=1.x.y", True),  # whatever it is: 1.0.0 is what is answered
        (f"{OPENMETRICS};version=a.b", False),
        (f"{OPENMETRICS};version=", True),
        (f"{OPENMETRICS};q=0", False),
        (f"{OPENMETRICS};q=0.0,text/plain", False),
        (f"{OPENMETRICS};q=often", False),
        (f"{OPENMETRICS};q=nan", False),
        (f"{OPENMETRICS};q=-1", False),
        (f"{OPENMETRICS};q=inf", False),
        (f"{OPENMETRICS};q=0.5,text/plain;q=0.9", False),
        (f"{OPENMETRICS};q=0.9,text/plain;q=0.5", True),
        (f"{OPENMETRICS};version=0.0.1;q=1,{OPENMETRICS};version=1.0.0;q=0.3", True),
        # What releases of Prometheus send.
        (PROMETHEUS_2, True),
        (PROMETHEUS_3, True),
    ],
)
def test_openmetrics_is_for_whoever_asks_for_it_by_name_and_for_text_no_more(accept, preferred):
    assert prefers_openmetrics(accept) is preferred


@given(st.text(st.characters(max_codepoint=255)))
def test_no_accept_header_is_an_error(accept):
    for each in (accept, f"{OPENMETRICS};{accept}", f'{OPENMETRICS};version="{accept}'):
        assert prefers_openmetrics(each) in FORMATS


@pytest.mark.slow
def test_promtool_finds_nothing_to_criticise(metrics):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: package prometheus)")
    metrics.calls.observe_rpc("Allocate", "OK", 0.002)
    body, _ = metrics.render(SNAPSHOT)
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


def test_a_release_is_no_driver_that_is_down(metrics):
    released = replace(SNAPSHOT, driver=Driver("580", "released for a reset", 1_700_000_000.0))
    assert samples(metrics, released, "vgpu_nvml_up") == [({}, 0)]
    assert samples(metrics, released, "vgpu_nvml_released") == [({}, 1)]


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
    for in_openmetrics, parse in zip(FORMATS, (parse_text, parse_openmetrics), strict=True):
        body = text(metrics, snapshot, in_openmetrics=in_openmetrics)
        families = {family.name: family for family in parse(body)}
        (sample,) = families["vgpu_gpu_info"].samples
        assert sample.labels["model"] == model


# Calls of the kubelet

NO_CALLS = {(method, code): 0.0 for method, codes in CALLS.items() for code in codes}


def test_how_calls_usually_end_is_counted_from_0_on(metrics):
    """`increase` sees no step from nothing: the first refusal would be none."""
    counts = {(of["method"], of["code"]): count for of, count in _rpc(metrics, "count")}
    assert counts == NO_CALLS
    assert counts.keys() >= {("Allocate", "INVALID_ARGUMENT"), ("Allocate", "FAILED_PRECONDITION")}


def test_calls_are_timed_by_method_and_code(metrics):
    metrics.calls.observe_rpc("Allocate", "OK", 0.0004)
    metrics.calls.observe_rpc("Allocate", "OK", 0.004)
    metrics.calls.observe_rpc("Allocate", "INVALID_ARGUMENT", 20.0)
    metrics.calls.observe_rpc("PreStartContainer", "CANCELLED", 20.0)
    counts = {(of["method"], of["code"]): count for of, count in _rpc(metrics, "count")}
    assert counts == {
        **NO_CALLS,
        ("Allocate", "OK"): 2,
        ("Allocate", "INVALID_ARGUMENT"): 1,
        ("PreStartContainer", "CANCELLED"): 1,
    }
    allocate = [(of, value) for of, value in _rpc(metrics, "sum") if of["method"] == "Allocate"]
    sums = {of["code"]: value for of, value in allocate if value}
    assert sums == {"OK": pytest.approx(0.0044), "INVALID_ARGUMENT": 20.0}
    buckets = {
        (of["code"], of["le"]): value
        for of, value in _rpc(metrics, "bucket")
        if of["method"] == "Allocate"
    }
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
    metrics.calls.observe_rpc("Allocate", "OK", 0.1)
    assert text(metrics) == text(metrics)
    assert {count for _, count in _rpc(other, "count")} == {0}


def test_calls_are_timed_while_metrics_are_rendered(metrics):
    """A scrape renders in a worker thread while the loop serves the kubelet."""
    ended = threading.Event()

    def call() -> None:
        number = 0
        while not ended.is_set():
            metrics.calls.observe_rpc("Allocate", str(number), 0.001)
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
    return {family.name for family in parse_text(body) if family.samples}


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
    assert samples(metrics, snapshot, "vgpu_allocation_process_memory_limit_bytes") == []
    assert len(samples(metrics, snapshot, "vgpu_allocation_memory_share_bytes")) == len(SHARES)


@pytest.mark.parametrize(
    ("unknown", "pattern"),
    [
        ({"holders": Holders("no such socket")}, "alloc|free_share"),
        ({"mps": None}, "^vgpu_mps_"),
        ({"usage": None, "limits": None}, "container_|unattributed"),
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
    def node_of(replicas: int) -> Snapshot:
        gpus = tuple(
            SharedGpu(Gpu(f"GPU-{n:036d}", n, "NVIDIA L4", GIB, f"00000000:{n:02x}:00.0"), replicas)
            for n in range(16)
        )
        return Snapshot(inventory=Inventory(gpus), driver=Driver("1", None))

    start = time.perf_counter()
    body = text(metrics, node_of(48))
    assert time.perf_counter() - start < 1
    advertised = samples(metrics, node_of(48), "vgpu_devices")
    assert sum(value for labels, value in advertised if labels["health"] == "healthy") == 768
    assert len(body.splitlines()) == len(text(metrics, node_of(1)).splitlines())
