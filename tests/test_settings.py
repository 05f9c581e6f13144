import ast
from collections.abc import Iterator
from pathlib import Path

import pydantic
import pytest

import vgpu_agent
from tests import readme
from vgpu_agent import settings as configuration
from vgpu_agent.errors import SettingsError
from vgpu_agent.model.container import DeviceList, MpsSharing, Sharing, Threads
from vgpu_agent.model.placement import Placement
from vgpu_agent.model.share import Division, MpsLimits
from vgpu_agent.settings import (
    Address,
    EmbeddedSettings,
    GpuDriverKind,
    LogFormat,
    LogLevel,
    MpsComputeMode,
    Settings,
    SharingKind,
    load,
    unknown_variables,
)

MIB = 1 << 20
GIB = 1 << 30

DEFAULTS = {
    "gpu_driver": GpuDriverKind.NVML,
    "sharing": SharingKind.MPS,
    "mps_max_clients": None,
    "replicas": 10,
    "replicas_by_gpu": {},
    "device_memory": None,
    "resource_name": "k8s.amazonaws.com/vgpu",
    "kubelet_dir": Path("/var/lib/kubelet"),
    "device_list": DeviceList.ENVVAR,
    "cdi_kind": "nvidia.com/gpu",
    "mps_limits": MpsLimits.CLIENT,
    "mps_compute_mode": MpsComputeMode.EXCLUSIVE,
    "mps_threads": Threads.SHARE,
    "mps_directory": Path("/run/vgpu-agent/mps"),
    "mps_multiuser": False,
    "mps_shm": True,
    "mps_shm_directory": Path("/dev/shm/vgpu-mps"),
    "memory_reserved": None,
    "placement": Placement.SPREAD,
    "health_interval": 5,
    "recovery_seconds": 60,
    "health_checks": True,
    "ignored_xids": frozenset(),
    "critical_xids": frozenset(),
    "driver_wait": 300,
    "lost_card_seconds": 3600,
    "state_directory": Path("/run/vgpu-agent"),
    "metrics_address": Address("0.0.0.0", 9408),
    "status_page": True,
    "podresources_interval": 60,
    "process_metrics": False,
    "log_level": LogLevel.INFO,
    "log_format": LogFormat.TEXT,
    "simulated_gpus": 2,
    "simulated_model": "NVIDIA Simulated 24GB",
    "simulated_memory": 24 * GIB,
    "simulated_numa_nodes": (0, 1),
}

GOOD = [
    ("VGPU_REPLICAS_BY_GPU", "", {}),
    ("VGPU_REPLICAS_BY_GPU", '{"0": 4, "NVIDIA L4": 1}', {"0": 4, "NVIDIA L4": 1}),
    ("VGPU_REPLICAS_BY_GPU", '{"GPU-a": 0}', {"GPU-a": 0}),
    ("VGPU_DEVICE_MEMORY", "", None),
    ("VGPU_DEVICE_MEMORY", "8Gi", 8 << 30),
    ("VGPU_DEVICE_LIST", "cdi+envvar", DeviceList.CDI_ENVVAR),
    ("VGPU_DEVICE_LIST", "volume-mounts", DeviceList.VOLUME_MOUNTS),
    ("VGPU_CDI_KIND", "example.com/card", "example.com/card"),
    ("VGPU_MPS_LIMITS", "server", MpsLimits.SERVER),
    ("VGPU_MPS_LIMITS", "none", MpsLimits.NONE),
    ("VGPU_MPS_COMPUTE_MODE", "keep", MpsComputeMode.KEEP),
    ("VGPU_GPU_DRIVER", "simulated", GpuDriverKind.SIMULATED),
    ("VGPU_SHARING", "mps", SharingKind.MPS),
    ("VGPU_SHARING", "time-slicing", SharingKind.TIME_SLICING),
    ("VGPU_MPS_MAX_CLIENTS", "auto", None),
    ("VGPU_MPS_MAX_CLIENTS", "10", 10),
    ("VGPU_MPS_MAX_CLIENTS", "1024", 1024),
    ("VGPU_REPLICAS", "1", 1),
    ("VGPU_REPLICAS", "48", 48),
    ("VGPU_RESOURCE_NAME", "nvidia.com/gpu.shared", "nvidia.com/gpu.shared"),
    ("VGPU_RESOURCE_NAME", "a/B", "a/B"),
    ("VGPU_KUBELET_DIR", "/data/kubelet", Path("/data/kubelet")),
    ("VGPU_MPS_THREADS", "share", Threads.SHARE),
    ("VGPU_MPS_THREADS", "none", Threads.NONE),
    ("VGPU_MPS_THREADS", "2", 2.0),
    ("VGPU_MPS_THREADS", "0.5", 0.5),
    ("VGPU_MPS_DIRECTORY", "/run/mps", Path("/run/mps")),
    ("VGPU_MPS_MULTIUSER", "on", True),
    ("VGPU_STATUS_PAGE", "off", False),
    ("VGPU_PROCESS_METRICS", "on", True),
    ("VGPU_PODRESOURCES_INTERVAL", "10", 10),
    ("VGPU_MPS_SHM", "on", True),
    ("VGPU_MPS_SHM", "off", False),
    ("VGPU_MPS_SHM_DIRECTORY", "/dev/shm/x", Path("/dev/shm/x")),
    ("VGPU_MEMORY_RESERVED", "auto", None),
    ("VGPU_MEMORY_RESERVED", "0", 0),
    ("VGPU_MEMORY_RESERVED", "512Mi", 512 * MIB),
    ("VGPU_PLACEMENT", "spread", Placement.SPREAD),
    ("VGPU_PLACEMENT", "pack", Placement.PACK),
    ("VGPU_HEALTH_INTERVAL", "1", 1),
    ("VGPU_HEALTH_INTERVAL", "2.5", 2.5),
    ("VGPU_RECOVERY_SECONDS", "3600", 3600),
    ("VGPU_HEALTH_CHECKS", "off", False),
    ("VGPU_IGNORED_XIDS", "79", frozenset({79})),
    ("VGPU_IGNORED_XIDS", " 13, 31 ,", frozenset({13, 31})),
    ("VGPU_IGNORED_XIDS", "", frozenset()),
    ("VGPU_CRITICAL_XIDS", "43,45", frozenset({43, 45})),
    ("VGPU_DRIVER_WAIT", "1", 1),
    ("VGPU_LOST_CARD_SECONDS", "86400", 86400),
    ("VGPU_STATE_DIRECTORY", "/var/lib/vgpu", Path("/var/lib/vgpu")),
    ("VGPU_METRICS_ADDRESS", "127.0.0.1:0", Address("127.0.0.1", 0)),
    ("VGPU_METRICS_ADDRESS", "localhost:65535", Address("localhost", 65535)),
    ("VGPU_METRICS_ADDRESS", "[::]:9408", Address("::", 9408)),
    ("VGPU_METRICS_ADDRESS", "[2001:DB8::1]:80", Address("2001:DB8::1", 80)),
    ("VGPU_LOG_LEVEL", "debug", LogLevel.DEBUG),
    ("VGPU_LOG_LEVEL", "error", LogLevel.ERROR),
    ("VGPU_LOG_FORMAT", "json", LogFormat.JSON),
    ("VGPU_SIMULATED_GPUS", "0", 0),
    ("VGPU_SIMULATED_GPUS", "64", 64),
    ("VGPU_SIMULATED_MODEL", 'A [card]: "x"', 'A [card]: "x"'),
    ("VGPU_SIMULATED_MEMORY", "8Gi", 8 * GIB),
    ("VGPU_SIMULATED_MEMORY", "8G", 8 * 10**9),
    ("VGPU_SIMULATED_MEMORY", "512Mi", 512 * MIB),
    ("VGPU_SIMULATED_MEMORY", "1.5Gi", 3 * GIB // 2),
    ("VGPU_SIMULATED_MEMORY", "100", 100),
    ("VGPU_SIMULATED_MEMORY", "1K", 1000),
    ("VGPU_SIMULATED_MEMORY", "1Ti", 1 << 40),
    ("VGPU_SIMULATED_NUMA_NODES", "1", (1,)),
    ("VGPU_SIMULATED_NUMA_NODES", "0, none,3", (0, None, 3)),
]

BAD = [
    (
        "VGPU_REPLICAS_BY_GPU",
        ["{", "4", "[1]", '{"0": -1}', '{"0": 2000}', '{"0": "x"}'],
        "a JSON object",
    ),
    ("VGPU_DEVICE_MEMORY", ["0", "512Ki", "-1Gi", "many"], "a size from 1Mi"),
    ("VGPU_DEVICE_LIST", ["", "CDI", "env"], "`volume-mounts`"),
    ("VGPU_CDI_KIND", ["", "gpu", "nvidia.com/", "nvidia.com/gpu=all"], "vendor/class"),
    ("VGPU_MPS_LIMITS", ["", "daemon"], "`client`, `server` or `none`"),
    ("VGPU_MPS_COMPUTE_MODE", ["", "default"], "`exclusive` or `keep`"),
    ("VGPU_GPU_DRIVER", ["", "NVML", "cuda", " nvml"], "`nvml` or `simulated`"),
    ("VGPU_SHARING", ["", "MPS", "timeslicing"], "`mps` or `time-slicing`"),
    ("VGPU_MPS_MAX_CLIENTS", ["", "0", "-1", "1025", "many", "4.5"], "from 1 to 1024"),
    ("VGPU_REPLICAS", ["", "0", "-1", "1025", "ten", "2.5", "1e2", "0x10"], "from 1 to 1024"),
    (
        "VGPU_RESOURCE_NAME",
        [
            "",
            "vgpu",
            "/vgpu",
            "example.com/",
            "example.com/a/b",
            "Example.com/vgpu",
            "-example.com/vgpu",
            "example..com/vgpu",
            "example.com/_vgpu",
            "example.com/" + "x" * 64,
            "kubernetes.io/vgpu",
            "sub.kubernetes.io/vgpu",
            "requests.example.com/vgpu",
            "x" * 245 + "/vgpu",
        ],
        "an extended resource domain/name, not of kubernetes.io",
    ),
    ("VGPU_KUBELET_DIR", ["", "kubelet", "./kubelet", "~/kubelet"], "an absolute path"),
    ("VGPU_MPS_THREADS", ["", "0", "-1", "nan", "inf", "half"], "a factor above 0"),
    ("VGPU_MPS_DIRECTORY", ["", "mps"], "an absolute path"),
    ("VGPU_MPS_MULTIUSER", ["", "true"], "`on` or `off`"),
    ("VGPU_STATUS_PAGE", ["", "no", "0"], "`on` or `off`"),
    ("VGPU_PROCESS_METRICS", ["", "yes"], "`on` or `off`"),
    ("VGPU_PODRESOURCES_INTERVAL", ["", "0", "often"], "seconds from 1"),
    ("VGPU_MPS_SHM", ["", "true", "1", "ON", "yes"], "`on` or `off`"),
    ("VGPU_MPS_SHM_DIRECTORY", ["", "shm"], "an absolute path"),
    ("VGPU_MEMORY_RESERVED", ["", "-1", "lots", "5i", "1 Gi Gi", "1Ei"], "a size such as 512Mi"),
    ("VGPU_PLACEMENT", ["", "Spread", "random"], "`spread` or `pack`"),
    ("VGPU_HEALTH_INTERVAL", ["", "0", "0.5", "-5", "5s", "inf", "nan"], "seconds from 1"),
    ("VGPU_RECOVERY_SECONDS", ["", "0", "0.5", "-5", "1m", "inf", "nan"], "seconds from 1"),
    ("VGPU_HEALTH_CHECKS", ["", "true", "0", "ON"], "`on` or `off`"),
    ("VGPU_IGNORED_XIDS", ["x", "13;31", "-1", "1.5", "13 31"], "separated by commas"),
    ("VGPU_CRITICAL_XIDS", ["x", "-1"], "none that VGPU_IGNORED_XIDS has"),
    ("VGPU_DRIVER_WAIT", ["", "0", "nan"], "seconds from 1"),
    ("VGPU_LOST_CARD_SECONDS", ["", "0.9", "1h"], "seconds from 1"),
    ("VGPU_STATE_DIRECTORY", ["", "run", "./x"], "an absolute path"),
    (
        "VGPU_METRICS_ADDRESS",
        [
            "",
            "9408",
            ":9408",
            "0.0.0.0",
            "0.0.0.0:",
            "0.0.0.0:65536",
            "0.0.0.0:-1",
            "0.0.0.0:http",
            "::1:9408",
            "[::1]",
            "[host]:9408",
            "a b:9408",
        ],
        "host:port or [IPv6]:port",
    ),
    ("VGPU_LOG_LEVEL", ["", "INFO", "trace", "10"], "`debug`, `info`, `warning` or `error`"),
    ("VGPU_LOG_FORMAT", ["", "JSON", "logfmt"], "`text` or `json`"),
    ("VGPU_SIMULATED_GPUS", ["", "-1", "65", "two"], "from 0 to 64"),
    ("VGPU_SIMULATED_MODEL", [""], "any text"),
    (
        "VGPU_SIMULATED_MEMORY",
        ["", "0", "0Gi", "0.5", "-1Gi", "lots", "1Xi", "1.Gi", "9" * 400],
        "a size such as 24Gi",
    ),
    (
        "VGPU_SIMULATED_NUMA_NODES",
        ["", "-1", "0,-1", "0,", "0;1", "a", "0 1"],
        "numbers from 0, or `none`, separated by commas",
    ),
]


@pytest.fixture(autouse=True)
def simulated_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default driver does not go with the default sharing yet."""
    monkeypatch.setenv("VGPU_GPU_DRIVER", "simulated")


def wrong(name: str, value: str) -> str:
    return f"  {name}={value!r} is wrong; allowed: "


# Values


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_has_its_documented_default(name):
    assert Settings.model_fields[name].default == DEFAULTS[name]
    if name != "gpu_driver":
        assert getattr(load(), name) == DEFAULTS[name]


@pytest.mark.parametrize(("name", "value", "meaning"), GOOD)
def test_a_good_value_is_taken(monkeypatch, name, value, meaning):
    monkeypatch.setenv(name, value)
    found = getattr(load(), name.removeprefix("VGPU_").lower())
    assert found == meaning
    assert type(found) is type(meaning) or isinstance(meaning, int | float)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [(name, value, allowed) for name, values, allowed in BAD for value in values],
)
def test_a_bad_value_is_told_with_its_variable_and_what_is_allowed(
    monkeypatch, name, value, allowed
):
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load()
    head, line = str(caught.value).splitlines()
    assert head == "1 setting is wrong:"
    assert line.startswith(wrong(name, value))
    assert allowed in line.removeprefix(wrong(name, value))


def test_good_and_bad_values_of_every_setting_are_tried():
    every = {configuration.variable(name) for name in Settings.model_fields}
    assert {name for name, _, _ in GOOD} == every
    assert {name for name, _, _ in BAD} == every


def test_a_value_that_is_no_text_is_told_without_a_failure_of_its_own(monkeypatch):
    monkeypatch.setenv("VGPU_SIMULATED_MODEL", "\udcff")
    with pytest.raises(SettingsError) as caught:
        load()
    assert str(caught.value).isascii()


def test_all_wrong_settings_are_reported_at_once_each_on_a_line_of_its_own(monkeypatch):
    bad = {
        "VGPU_GPU_DRIVER": "x",
        "VGPU_SHARING": "x",
        "VGPU_REPLICAS": "x",
        "VGPU_MPS_THREADS": "x",  # wrong in two ways: neither a word nor a number
        "VGPU_METRICS_ADDRESS": "x",
        "VGPU_SIMULATED_NUMA_NODES": "x,y",
    }
    for name, value in bad.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load()
    head, *lines = str(caught.value).splitlines()
    assert head == "6 settings are wrong:"
    assert [line.partition("allowed: ")[0] + "allowed: " for line in lines] == [
        wrong(name, value) for name, value in bad.items()
    ]


def test_every_setting_can_be_wrong_at_once(monkeypatch):
    for name, values, _ in BAD:
        monkeypatch.setenv(name, values[0])
    with pytest.raises(SettingsError) as caught:
        load()
    lines = str(caught.value).splitlines()[1:]
    assert sorted(line.split("=")[0].strip() for line in lines) == sorted(
        name for name, _, _ in BAD
    )


def test_no_trace_of_the_library_is_in_the_error(monkeypatch):
    monkeypatch.setenv("VGPU_REPLICAS", "x")
    with pytest.raises(SettingsError) as caught:
        load()
    assert "pydantic" not in str(caught.value)
    assert caught.value.__context__ is None


# Values that go together


def test_a_size_and_a_number_of_vgpus_exclude_each_other(monkeypatch):
    monkeypatch.setenv("VGPU_DEVICE_MEMORY", "8Gi")
    assert load().division() == Division(
        10, device_memory=8 << 30, max_clients=48, held_back=512 << 20, measured=True
    )
    monkeypatch.setenv("VGPU_REPLICAS", "10")  # set is set, also to its default
    with pytest.raises(SettingsError, match=r"'10' and VGPU_DEVICE_MEMORY='8Gi': only one"):
        load()
    monkeypatch.setenv("VGPU_PLACEMENT", "x")
    with pytest.raises(SettingsError, match=r"2 settings are wrong"):
        load()


def test_a_single_card_cannot_have_more_vgpus_than_mps_serves(monkeypatch):
    monkeypatch.setenv("VGPU_REPLICAS_BY_GPU", '{"0": 49}')
    with pytest.raises(SettingsError, match="VGPU_REPLICAS_BY_GPU"):
        load()
    monkeypatch.setenv("VGPU_SHARING", "time-slicing")
    assert load().division().by_gpu == {"0": 49}


def test_time_slicing_on_real_cards_is_fine(monkeypatch):
    monkeypatch.setenv("VGPU_GPU_DRIVER", "nvml")
    monkeypatch.setenv("VGPU_SHARING", "time-slicing")
    assert load().gpu_driver is GpuDriverKind.NVML


@pytest.mark.parametrize(
    ("sharing", "clients", "replicas", "fine"),
    [
        ("mps", "auto", "48", True),
        ("mps", "auto", "49", False),
        ("mps", "60", "60", True),
        ("mps", "60", "61", False),
        ("mps", "8", "9", False),
        ("time-slicing", "auto", "49", True),
        ("time-slicing", "auto", "1024", True),
        ("time-slicing", "8", "9", True),
    ],
)
def test_replicas_are_bounded_by_the_clients_of_mps_and_only_by_them(
    monkeypatch, sharing, clients, replicas, fine
):
    monkeypatch.setenv("VGPU_SHARING", sharing)
    monkeypatch.setenv("VGPU_MPS_MAX_CLIENTS", clients)
    monkeypatch.setenv("VGPU_REPLICAS", replicas)
    if fine:
        assert load().replicas == int(replicas)
        return
    with pytest.raises(SettingsError) as caught:
        load()
    _, line = str(caught.value).splitlines()
    assert line.startswith(wrong("VGPU_REPLICAS", replicas))
    assert "VGPU_MPS_MAX_CLIENTS" in line


def kubelet_dir_for_socket_path(length: int, letter: str = "d") -> str:
    rest = len("/" + "/device-plugins/" + "vgpu-example.com_vgpu.sock")
    assert (length - rest) % len(letter.encode()) == 0
    return "/" + letter * ((length - rest) // len(letter.encode()))


@pytest.mark.parametrize("letter", ["d", "é"])
def test_a_socket_path_of_107_bytes_is_taken(monkeypatch, letter):
    monkeypatch.setenv("VGPU_RESOURCE_NAME", "example.com/vgpu")
    directory = kubelet_dir_for_socket_path(107, letter)
    monkeypatch.setenv("VGPU_KUBELET_DIR", directory)
    settings = load()
    assert len(str(settings.plugin_directory / settings.endpoint).encode()) == 107


def test_a_socket_path_of_108_bytes_is_refused(monkeypatch):
    monkeypatch.setenv("VGPU_RESOURCE_NAME", "example.com/vgpu")
    directory = kubelet_dir_for_socket_path(108)
    monkeypatch.setenv("VGPU_KUBELET_DIR", directory)
    with pytest.raises(SettingsError) as caught:
        load()
    _, line = str(caught.value).splitlines()
    assert line.startswith(wrong("VGPU_KUBELET_DIR", directory))
    assert "107 bytes" in line


def test_a_resource_name_of_63_characters_is_taken_where_its_socket_path_fits(monkeypatch):
    name = "example.com/" + "x" * 63
    monkeypatch.setenv("VGPU_RESOURCE_NAME", name)
    monkeypatch.setenv("VGPU_KUBELET_DIR", "/k")
    assert load().resource_name == name


def test_a_long_resource_name_can_make_the_socket_path_too_long(monkeypatch):
    monkeypatch.setenv("VGPU_RESOURCE_NAME", "x" * 60 + ".com/vgpu")
    with pytest.raises(SettingsError, match="VGPU_KUBELET_DIR='/var/lib/kubelet' is wrong"):
        load()


def test_the_socket_is_named_after_the_resource():
    settings = load()
    assert settings.plugin_directory == Path("/var/lib/kubelet/device-plugins")
    assert settings.endpoint == "vgpu-k8s.amazonaws.com_vgpu.sock"


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (Address("0.0.0.0", 9408), "0.0.0.0:9408"),
        (Address("::1", 80), "[::1]:80"),
    ],
)
def test_an_address_is_written_as_it_is_read(monkeypatch, address, text):
    assert str(address) == text
    monkeypatch.setenv("VGPU_METRICS_ADDRESS", text)
    assert load().metrics_address == address


# What the model is told


def test_mps_shares_keep_memory_for_its_server():
    assert load().sharing_rules() == Sharing(
        mps=MpsSharing(
            pipe_directory="/run/vgpu-agent/mps/pipe",
            shm_directory="/dev/shm/vgpu-mps",
            threads=Threads.SHARE,
        ),
        memory_held_back=512 * MIB,
    )


def test_mps_is_shared_as_the_settings_say(monkeypatch):
    monkeypatch.setenv("VGPU_MPS_DIRECTORY", "/mps")
    monkeypatch.setenv("VGPU_MPS_SHM", "off")
    monkeypatch.setenv("VGPU_MPS_THREADS", "1.5")
    monkeypatch.setenv("VGPU_MEMORY_RESERVED", "0")
    assert load().sharing_rules() == Sharing(
        mps=MpsSharing(pipe_directory="/mps/pipe", shm_directory=None, threads=1.5),
        memory_held_back=0,
    )


@pytest.mark.parametrize(("reserved", "held_back"), [("auto", 0), ("1Gi", GIB)])
def test_time_slicing_holds_back_only_what_is_asked_for(monkeypatch, reserved, held_back):
    monkeypatch.setenv("VGPU_SHARING", "time-slicing")
    monkeypatch.setenv("VGPU_MEMORY_RESERVED", reserved)
    assert load().sharing_rules() == Sharing(mps=None, memory_held_back=held_back)


# Where they come from


def test_settings_are_frozen():
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        load().replicas = 3


def test_variables_without_the_prefix_and_env_files_change_nothing(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("VGPU_REPLICAS=7\nREPLICAS=7\n")
    monkeypatch.setenv("REPLICAS", "7")
    assert load().replicas == 10


def test_embedded_settings_are_deaf_to_the_environment(monkeypatch):
    for name, values, _ in BAD:
        monkeypatch.setenv(name, values[-1])
    settings = EmbeddedSettings(gpu_driver=GpuDriverKind.SIMULATED, replicas=3)
    expected = DEFAULTS | {"gpu_driver": GpuDriverKind.SIMULATED, "replicas": 3}
    assert {name: getattr(settings, name) for name in Settings.model_fields} == expected


def test_embedded_settings_are_checked_all_the_same():
    with pytest.raises(pydantic.ValidationError):
        EmbeddedSettings(gpu_driver=GpuDriverKind.SIMULATED, replicas=49)


# Unknown variables


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("VGPU_REPLICA", "VGPU_REPLICAS"),
        ("VGPU_MPS_THREAD", "VGPU_MPS_THREADS"),
        ("vgpu_replica", "VGPU_REPLICAS"),
        ("VGPU_LOGLEVEL", "VGPU_LOG_LEVEL"),
        ("VGPU_METRIC_ADDRESS", "VGPU_METRICS_ADDRESS"),
        ("VGPU_", None),
        ("VGPU_QQQQQQQQQQ", None),
    ],
)
def test_an_unknown_variable_is_found_with_the_nearest_known_one(name, nearest):
    assert unknown_variables({name: "1"}) == {name: nearest}


def test_known_variables_in_any_case_and_those_of_others_are_not_reported():
    known = [configuration.variable(name) for name in Settings.model_fields]
    others = ["PATH", "MY_VGPU_REPLICA", "VGPUS", "XVGPU_REPLICA"]
    assert unknown_variables(dict.fromkeys([*known, *map(str.lower, known), *others], "")) == {}


def test_unknown_variables_are_reported_in_order():
    assert list(unknown_variables({"VGPU_Z": "", "VGPU_A": "", "VGPU_M": ""})) == [
        "VGPU_A",
        "VGPU_M",
        "VGPU_Z",
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("VGPU_SERVICE_HOST", "10.0.0.7"),
        ("VGPU_SERVICE_PORT", "9408"),
        ("VGPU_PORT", "tcp://10.0.0.7:9408"),
        ("VGPU_PORT_9408_TCP", "tcp://10.0.0.7:9408"),
        ("VGPU_AGENT_SERVICE_HOST", "10.0.0.7"),
        ("VGPU_AGENT_SERVICE_PORT", "9408"),
        ("VGPU_AGENT_SERVICE_PORT_METRICS", "9408"),
        ("VGPU_AGENT_PORT", "tcp://10.0.0.7:9408"),
        ("VGPU_AGENT_PORT_9408_TCP", "tcp://10.0.0.7:9408"),
        ("VGPU_AGENT_PORT_9408_TCP_PROTO", "tcp"),
        ("VGPU_AGENT_PORT_9408_TCP_PORT", "9408"),
        ("VGPU_AGENT_PORT_9408_TCP_ADDR", "10.0.0.7"),
        ("VGPU_AGENT_PORT_53_UDP_ADDR", "10.0.0.7"),
    ],
)
def test_the_variables_of_a_kubernetes_service_are_neither_wrong_nor_unknown(
    monkeypatch, name, value
):
    monkeypatch.setenv(name, value)
    assert load().replicas == 10
    assert unknown_variables({name: value}) == {}


def test_a_port_that_is_no_url_is_not_of_a_service():
    found = configuration.unknown_variables({"VGPU_METRICS_PORT": "9500"})
    assert found == {"VGPU_METRICS_PORT": "VGPU_METRICS_ADDRESS"}


def test_an_xid_cannot_be_both_ignored_and_critical(monkeypatch):
    monkeypatch.setenv("VGPU_SHARING", "time-slicing")
    monkeypatch.setenv("VGPU_IGNORED_XIDS", "79,13")
    monkeypatch.setenv("VGPU_CRITICAL_XIDS", "13")
    with pytest.raises(SettingsError, match="VGPU_CRITICAL_XIDS='13' is wrong"):
        load()


@pytest.mark.parametrize("name", ["VGPU_AGENT_SERVICE", "VGPU_AGENT_PORT_METRICS"])
def test_what_no_kubernetes_service_sets_is_unknown(name):
    assert name in unknown_variables({name: ""})


# The table


def test_the_table_has_every_setting_in_order_with_its_default():
    lines = configuration.markdown_table().splitlines()
    assert lines[:2] == [
        "| variable | default | allowed | what it is |",
        "| --- | --- | --- | --- |",
    ]
    cells = [line.strip("| ").split(" | ") for line in lines[2:]]
    assert all(len(row) == 4 and all(row) for row in cells)
    defaults = {row[0].strip("`"): row[1].strip("`") for row in cells}
    assert list(defaults) == sorted(configuration.variable(name) for name in Settings.model_fields)
    assert defaults["VGPU_MPS_SHM"] == "on"
    assert defaults["VGPU_MPS_MAX_CLIENTS"] == "auto"
    assert defaults["VGPU_METRICS_ADDRESS"] == "0.0.0.0:9408"
    assert defaults["VGPU_SIMULATED_NUMA_NODES"] == "0,1"
    assert defaults["VGPU_KUBELET_DIR"] == "/var/lib/kubelet"


@pytest.mark.parametrize("name", Settings.model_fields)
def test_a_default_of_the_table_is_a_value_that_can_be_set(monkeypatch, name):
    lines = configuration.markdown_table().splitlines()[2:]
    cells = {row[1].strip(" `"): row[2].strip(" `") for row in (each.split("|") for each in lines)}
    written = cells[configuration.variable(name)].replace("(empty)", "")
    monkeypatch.setenv("VGPU_SHARING", "time-slicing")
    monkeypatch.setenv(configuration.variable(name), written)
    assert getattr(load(), name) == DEFAULTS[name]


@pytest.mark.parametrize("document", readme.TABLES, ids=lambda path: path.name)
def test_the_generated_table_of_a_document_is_up_to_date(document):
    assert document.read_text("utf-8") == readme.with_table(document), "run: python -m tests.readme"


# Edges: who may use what

PACKAGE = Path(vgpu_agent.__file__).parent
SOURCES = {
    source.relative_to(PACKAGE).as_posix(): source.read_text("utf-8")
    for source in PACKAGE.rglob("*.py")
    if "_proto" not in source.parts
}
EDGES = {
    "pydantic": ("settings.py",),
    "pydantic_settings": ("settings.py",),
    "pynvml": ("gpu/nvml.py",),
    "betterproto": ("kubelet/",),
    "grpclib": ("kubelet/",),
    "prometheus_client": ("observe/",),
    "rich": ("status/",),
    "uvicorn": ("observe/",),
}


def imported(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def touches_environment(source: str) -> bool:
    words = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    return any(
        (isinstance(node, ast.Attribute) and node.attr in words)
        or (isinstance(node, ast.Name) and node.id in words)
        or (
            isinstance(node, ast.ImportFrom)
            and node.module == "os"
            and any(alias.name in words for alias in node.names)
        )
        for node in ast.walk(ast.parse(source))
    )


def test_the_sources_are_found():
    assert {"settings.py", "cli.py", "gpu/nvml.py", "kubelet/session.py"} <= set(SOURCES)


@pytest.mark.parametrize(
    ("source", "touched"),
    [
        ("import os\nos.environ['X']", True),
        ("import os\nos.getenv('X')", True),
        ("from os import environ as e", True),
        ("import os\nos.stat('environ')", False),
    ],
)
def test_the_check_sees_every_way_to_the_environment(source, touched):
    assert touches_environment(source) is touched


def test_only_the_settings_and_the_command_line_touch_the_environment():
    touching = {name for name, source in SOURCES.items() if touches_environment(source)}
    # The control program is started with this process's environment and the daemon's directory.
    assert touching <= {"settings.py", "cli.py", "mps/control.py"}


@pytest.mark.parametrize("library", EDGES)
def test_an_edge_library_stays_at_its_edge(library):
    users = {
        name
        for name, source in SOURCES.items()
        if any(each.split(".")[0] == library for each in imported(source))
    }
    assert {name for name in users if not name.startswith(EDGES[library])} == set()
    assert users, "nobody uses it any more; take it off the list"
