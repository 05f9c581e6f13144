import json
from contextlib import suppress
from dataclasses import FrozenInstanceError
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import pydantic
import pytest
import yaml

from tests import readme, settings_files
from vgpu_agent import settings as configuration
from vgpu_agent.address import Address, parse_address
from vgpu_agent.errors import SettingsError
from vgpu_agent.model.rules import (
    DeviceList,
    HealthRules,
    MemoryLimits,
    MpsDaemons,
    MpsLimits,
    Placement,
    SharingRules,
    Threads,
)
from vgpu_agent.observe.logs import LogFormat, LogLevel
from vgpu_agent.settings import (
    GpuDriverKind,
    MpsComputeMode,
    SharingKind,
    variable,
)
from vgpu_agent.settings_reading import embedded, load
from vgpu_agent.settings_unknown import unknown_setting_warnings

MIB = 1 << 20
GIB = 1 << 30


class Row(NamedTuple):
    """A setting: its default, texts with what they mean, wrong texts, and what is said of them."""

    default: object
    good: dict[str, object]
    bad: str
    """With a | between."""
    allowed: str


def one_of(default: StrEnum, bad: str) -> Row:
    words = list(type(default))
    return Row(default, {str(each): each for each in words}, bad, f"`{words[-2]}` or `{words[-1]}`")


SWITCH = {"on": True, "off": False}
LONG_NAMES = f"example.com/{'x' * 64}|{'x' * 245}/vgpu"
TABLE = {
    "cdi_kind": Row(
        "nvidia.com/gpu",
        {"example.com/GPU": "example.com/GPU"},
        "|gpu|nvidia.com/|nvidia.com/gpu=all",
        "vendor/class",
    ),
    **dict.fromkeys(
        ("node_name", "pod_name", "pod_namespace"),
        Row(
            "",
            {"gpu-1.example.com": "gpu-1.example.com", "a" * 253: "a" * 253},
            f"GPU_1|-a|a-|a..b|a b|a;reboot|{'a' * 254}",
            "a name as Kubernetes allows it",
        ),
    ),
    "critical_xids": Row(
        frozenset(), {"43,45": frozenset({43, 45})}, "x|-1", "none that VGPU_IGNORED_XIDS has"
    ),
    "device_plugin_dir": Row(
        None,
        {"": None, "/var/lib/kubelet/device-plugins": Path("/var/lib/kubelet/device-plugins")},
        "device-plugins|./x|~/x",
        "nothing, or an absolute path",
    ),
    "device_list": one_of(DeviceList.ENVVAR, "|CDI|env"),
    "device_memory": Row(None, {"": None, "8Gi": 8 * GIB}, "0|512Ki|-1Gi|many", "a size from 1Mi"),
    "driver_wait": Row(300, {"1": 1}, "|0|nan", "seconds from 1"),
    "gpu_driver": one_of(GpuDriverKind.NVML, "|NVML|cuda| nvml"),
    "health_checks": Row(True, SWITCH, "|true|0|ON", "`on` or `off`"),
    "health_interval": Row(5, {"1": 1, "2.5": 2.5}, "|0|0.5|-5|5s|inf|nan", "seconds from 1"),
    "ignored_xids": Row(
        frozenset(),
        {"79": frozenset({79}), " 13, 31 ,": frozenset({13, 31}), "": frozenset()},
        "x|13;31|-1|1.5|13 31",
        "separated by commas",
    ),
    "kubelet_dir": Row(
        Path("/var/lib/kubelet"),
        {"/data/kubelet": Path("/data/kubelet")},
        "|kubelet|./kubelet|~/kubelet",
        "an absolute path",
    ),
    "log_format": one_of(LogFormat.TEXT, "|JSON|logfmt"),
    "log_level": one_of(LogLevel.INFO, "|INFO|trace|10"),
    "lost_card_seconds": Row(3600, {"86400": 86400}, "|0.9|1h", "seconds from 1"),
    "memory_guarantee": Row(False, SWITCH, "|true|1", "`on` not with VGPU_MEMORY_LIMITS=off"),
    "memory_limits": one_of(MemoryLimits.AUTO, "|AUTO|on|hook"),
    "memory_limits_enable_controller": Row(
        False, {"off": False}, "|true|on", "`on` only with VGPU_MEMORY_LIMITS=driver"
    ),
    "memory_reserved": Row(
        None,
        {"auto": None, "0": 0, "512Mi": 512 * MIB},
        "|-1|lots|5i|1 Gi Gi|1Ei",
        "a size such as 512Mi",
    ),
    "metrics_address": Row(
        Address("::", 9408),
        {
            "127.0.0.1:0": Address("127.0.0.1", 0),
            "localhost:65535": Address("localhost", 65535),
            "[::]:9408": Address("::", 9408),
            "0.0.0.0:9408": Address("0.0.0.0", 9408),
            "[2001:DB8::1]:80": Address("2001:DB8::1", 80),
        },
        "|9408|:9408|0.0.0.0|0.0.0.0:|0.0.0.0:65536|0.0.0.0:-1|0.0.0.0:http|::1:9408|[::1]"
        "|[host]:9408|a b:9408",
        "host:port or [IPv6]:port",
    ),
    "mps_compute_mode": one_of(MpsComputeMode.EXCLUSIVE, "|default"),
    "mps_daemons": one_of(MpsDaemons.GPU, "|both"),
    "mps_directory": Row(
        Path("/run/vgpu-agent/mps"),
        {"/run/mps": Path("/run/mps"), "/" + 40 * "m": Path("/" + 40 * "m")},
        "|mps",
        "an absolute path",
    ),
    "mps_limits": one_of(MpsLimits.CLIENT, "|daemon"),
    "mps_max_clients": Row(
        None, {"auto": None, "10": 10, "1024": 1024}, "|0|-1|1025|many|4.5", "from 1 to 1024"
    ),
    "mps_multiuser": Row(False, SWITCH, "|true", "`on` or `off`"),
    "mps_shm": Row(True, SWITCH, "|true|1|ON|yes", "`on` or `off`"),
    "mps_shm_directory": Row(
        Path("/dev/shm/vgpu-agent"), {"/dev/shm/x": Path("/dev/shm/x")}, "|shm", "an absolute path"
    ),
    "mps_threads": Row(
        Threads.SHARE,
        {"share": Threads.SHARE, "none": Threads.NONE, "2": 2.0, "0.5": 0.5},
        "|0|-1|nan|inf|half",
        "a factor above 0",
    ),
    "placement": one_of(Placement.SPREAD, "|Spread|random"),
    "podresources_interval": Row(10, {"60": 60}, "|0|often", "seconds from 1"),
    "process_metrics": Row(False, SWITCH, "|yes", "`on` or `off`"),
    "recovery_seconds": Row(60, {"3600": 3600}, "|0|0.5|-5|1m|inf|nan", "seconds from 1"),
    "replicas": Row(
        10, {"1": 1, "48": 48}, "|0|-1|1025|ten|2.5|1e2|0x10", "a whole number from 1 to 1024"
    ),
    "replicas_by_gpu": Row(
        {},
        {
            "": {},
            '{"0": 4, "NVIDIA L4": 1}': {"0": 4, "NVIDIA L4": 1},
            '{"GPU-a": 0}': {"GPU-a": 0},
        },
        '{|4|[1]|{"0": -1}|{"0": 2000}|{"0": "x"}',
        "a JSON object",
    ),
    "resource_name": Row(
        "k8s.amazonaws.com/vgpu",
        {"nvidia.com/gpu.shared": "nvidia.com/gpu.shared", "a/B": "a/B"},
        "|vgpu|/vgpu|example.com/|example.com/a/b|Example.com/vgpu|-example.com/vgpu"
        "|example..com/vgpu|example.com/_vgpu|kubernetes.io/vgpu|sub.kubernetes.io/vgpu"
        f"|requests.example.com/vgpu|{LONG_NAMES}",
        "an extended resource domain/name, not of kubernetes.io",
    ),
    "sharing": one_of(SharingKind.MPS, "|MPS|timeslicing"),
    "cordon_directory": Row(
        Path("/var/lib/vgpu-agent/cordoned"),
        {"/var/lib/x": Path("/var/lib/x")},
        "|run|./x",
        "an absolute path",
    ),
    "simulated_gpus": Row(2, {"0": 0, "64": 64}, "|-1|65|two", "from 0 to 64"),
    "simulated_memory": Row(
        24 * GIB,
        {
            "8Gi": 8 * GIB,
            "8G": 8 * 10**9,
            "512Mi": 512 * MIB,
            "1.5Gi": 3 * GIB // 2,
            "100": 100,
            "1K": 1000,
            "1Ti": 1 << 40,
        },
        f"|0|0Gi|0.5|-1Gi|lots|1Xi|1.Gi|{'9' * 400}",
        "a size such as 24Gi",
    ),
    "simulated_model": Row(
        "NVIDIA Simulated 24GB", {'A [GPU]: "x"': 'A [GPU]: "x"'}, "", "any text"
    ),
    "simulated_numa_nodes": Row(
        (0, 1),
        {"1": (1,), "0, none,3": (0, None, 3)},
        "|-1|0,-1|0,|0;1|a|0 1",
        "numbers from 0, or `none`, separated by commas",
    ),
    "state_directory": Row(
        Path("/run/vgpu-agent"),
        {"/var/lib/vgpu": Path("/var/lib/vgpu")},
        "|run|./x",
        "an absolute path",
    ),
    "status_hosts": Row(
        frozenset(),
        {
            "GPUs.example.com, node1": frozenset({"gpus.example.com", "node1"}),
            "": frozenset(),
        },
        "a b|a:80|*.example.com|.a|http://a",
        "host names separated by commas",
    ),
    "status_page": Row(True, SWITCH, "|no|0", "`on` or `off`"),
}
DEFAULTS = {name: row.default for name, row in TABLE.items()}


def wrong(name: str, value: str) -> str:
    return f"  {name}={value!r} is wrong; allowed: "


def refused(monkeypatch: pytest.MonkeyPatch, given: dict[str, str]) -> list[str]:
    """The lines that are said of these variables."""
    with monkeypatch.context() as environment:
        for name, value in given.items():
            environment.setenv(name, value)
        with pytest.raises(SettingsError) as caught:
            load()
    head, *lines = str(caught.value).splitlines()
    count = len(lines)
    assert head == ("1 setting is wrong:" if count == 1 else f"{count} settings are wrong:")
    # No trace of the library.
    assert caught.value.__context__ is None
    assert "pydantic" not in str(caught.value)
    return lines


# Values


@pytest.mark.parametrize("name", TABLE)
def test_good_values_are_taken(monkeypatch, name):
    for value, meaning in TABLE[name].good.items():
        monkeypatch.setenv(variable(name), value)
        found = getattr(load(), name)
        assert found == meaning, value
        assert type(found) is type(meaning) or isinstance(meaning, int | float)


@pytest.mark.parametrize("name", TABLE)
def test_a_bad_value_is_told_with_its_variable_and_what_is_allowed(monkeypatch, name):
    for value in TABLE[name].bad.split("|"):
        (line,) = refused(monkeypatch, {variable(name): value})
        assert line.startswith(wrong(variable(name), value))
        assert TABLE[name].allowed in line.removeprefix(wrong(variable(name), value))


def test_odd_values_and_a_name_in_small_letters_are_wrong_like_others(monkeypatch):
    (line,) = refused(monkeypatch, {"VGPU_SIMULATED_MODEL": "\udcff"})
    assert line.isascii()
    deep = '{"0":' * 10_000
    (line,) = refused(monkeypatch, {"VGPU_REPLICAS_BY_GPU": deep})
    assert line.startswith(wrong("VGPU_REPLICAS_BY_GPU", deep))
    (line,) = refused(monkeypatch, {"vgpu_replicas": "many"})
    assert line.startswith(wrong("VGPU_REPLICAS", "many"))


def test_all_wrong_settings_are_reported_at_once_each_on_a_line_of_its_own(monkeypatch):
    # VGPU_MPS_THREADS is wrong in two ways: neither a word nor a number.
    bad = {variable(name): TABLE[name].bad.split("|")[0] for name in configuration.TABLE}
    lines = refused(monkeypatch, bad)
    assert [line.partition("allowed: ")[0] + "allowed: " for line in lines] == [
        wrong(name, value) for name, value in bad.items()
    ]


# Values that go together


def test_a_size_and_a_number_of_vgpus_exclude_each_other(monkeypatch):
    monkeypatch.setenv("VGPU_DEVICE_MEMORY", "8Gi")
    assert load().sharing_rules() == SharingRules(device_memory=8 * GIB)
    ten = {"VGPU_REPLICAS": "10"}  # set is set, also to its default
    assert "'10' and VGPU_DEVICE_MEMORY='8Gi': only one" in refused(monkeypatch, ten)[0]
    assert len(refused(monkeypatch, ten | {"VGPU_PLACEMENT": "x"})) == 2


KUBELET_DIR = "/" + "d" * (107 - len("//device-plugins/vgpu-example.com_vgpu.sock"))
"""The longest one whose socket fits, where the resource is example.com/vgpu."""
EXAMPLE = {"VGPU_RESOURCE_NAME": "example.com/vgpu"}
TIME_SLICING = {"VGPU_SHARING": "time-slicing"}


@pytest.mark.parametrize(
    "given",
    [
        {"VGPU_REPLICAS": "48"},
        {"VGPU_REPLICAS": "60", "VGPU_MPS_MAX_CLIENTS": "60"},
        TIME_SLICING | {"VGPU_REPLICAS": "61"},
        TIME_SLICING | {"VGPU_REPLICAS": "1024"},
        TIME_SLICING | {"VGPU_REPLICAS": "9", "VGPU_MPS_MAX_CLIENTS": "8"},
        TIME_SLICING | {"VGPU_REPLICAS_BY_GPU": '{"0": 61}'},
        EXAMPLE | {"VGPU_KUBELET_DIR": KUBELET_DIR},
        EXAMPLE | {"VGPU_KUBELET_DIR": KUBELET_DIR.replace("dd", "é")},
        {"VGPU_RESOURCE_NAME": f"example.com/{'x' * 63}", "VGPU_KUBELET_DIR": "/k"},
        EXAMPLE | {"VGPU_KUBELET_DIR": f"{KUBELET_DIR}d", "VGPU_DEVICE_PLUGIN_DIR": "/k"},
        EXAMPLE | {"VGPU_DEVICE_PLUGIN_DIR": f"{KUBELET_DIR}/device-plugins"},
        {"VGPU_MEMORY_LIMITS": "driver", "VGPU_MEMORY_LIMITS_ENABLE_CONTROLLER": "on"},
        {"VGPU_MEMORY_LIMITS": "driver", "VGPU_MEMORY_GUARANTEE": "on"},
        {"VGPU_MEMORY_LIMITS": "off", "VGPU_MEMORY_GUARANTEE": "off"},
    ],
)
def test_values_that_go_together_are_taken(monkeypatch, given):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    settings = load()
    for name, value in given.items():
        found = getattr(settings, name.removeprefix("VGPU_").lower())
        text = {True: "on", False: "off"}[found] if isinstance(found, bool) else str(found)
        assert text.replace("'", '"') == value


CLIENTS = "VGPU_MPS_MAX_CLIENTS"
CONTROLLER = "VGPU_MEMORY_LIMITS_ENABLE_CONTROLLER"
NO_LIMITS = {"VGPU_MEMORY_LIMITS": "off"}


@pytest.mark.parametrize(
    ("name", "value", "words", "others"),
    [
        ("VGPU_REPLICAS", "61", CLIENTS, {}),
        ("VGPU_REPLICAS", "61", CLIENTS, {"VGPU_MPS_MAX_CLIENTS": "60"}),
        ("VGPU_REPLICAS", "9", CLIENTS, {"VGPU_MPS_MAX_CLIENTS": "8"}),
        ("VGPU_REPLICAS_BY_GPU", '{"0": 61}', CLIENTS, {}),
        ("VGPU_KUBELET_DIR", f"{KUBELET_DIR}d", "107 bytes", EXAMPLE),
        ("VGPU_DEVICE_PLUGIN_DIR", f"{KUBELET_DIR}d/device-plugins", "107 bytes", EXAMPLE),
        (
            "VGPU_KUBELET_DIR",
            "/k" * 20,
            "107 bytes",
            {"VGPU_RESOURCE_NAME": f"{'x' * 60}.com/vgpu"},
        ),
        ("VGPU_CRITICAL_XIDS", "13", "that VGPU_IGNORED_XIDS has", {"VGPU_IGNORED_XIDS": "79,13"}),
        ("VGPU_MEMORY_GUARANTEE", "on", "not with VGPU_MEMORY_LIMITS=off", NO_LIMITS),
        (CONTROLLER, "on", "only with VGPU_MEMORY_LIMITS=driver", NO_LIMITS),
        (CONTROLLER, "on", "only with VGPU_MEMORY_LIMITS=driver", {"VGPU_MEMORY_LIMITS": "auto"}),
        ("VGPU_MPS_DIRECTORY", "/" + 41 * "m", "at most 41 bytes", {}),
        ("VGPU_MPS_SHM_DIRECTORY", "/dev/shm", "not /dev/shm itself", {}),
        ("VGPU_MPS_SHM_DIRECTORY", "/run", "a directory of its own", {}),
        ("VGPU_MPS_SHM_DIRECTORY", "/var", "a directory of its own", {}),
        ("VGPU_MPS_SHM_DIRECTORY", "/k", "a directory of", {"VGPU_DEVICE_PLUGIN_DIR": "/k/p"}),
        ("VGPU_MPS_SHM_DIRECTORY", "/mps/shm", "a directory", {"VGPU_MPS_DIRECTORY": "/mps"}),
        ("VGPU_STATE_DIRECTORY", "/dev/shm/vgpu-agent/x", "not in VGPU_MPS_SHM_DIRECTORY", {}),
        ("VGPU_CORDON_DIRECTORY", "/dev/shm/vgpu-agent/x", "not in VGPU_MPS_SHM_DIRECTORY", {}),
        ("VGPU_CORDON_DIRECTORY", "/run/vgpu-agent", "not VGPU_STATE_DIRECTORY itself", {}),
    ],
)
def test_values_that_do_not_go_together_are_reported_at_one_of_them(
    monkeypatch, name, value, words, others
):
    (line,) = refused(monkeypatch, {name: value, **others})
    assert line.startswith(wrong(name, value))
    assert words in line.removeprefix(wrong(name, value))


def test_the_socket_is_named_after_the_resource(monkeypatch):
    monkeypatch.setenv("VGPU_KUBELET_DIR", "/k")
    assert load().plugin_directory == Path("/k/device-plugins")
    monkeypatch.setenv("VGPU_DEVICE_PLUGIN_DIR", "/p")
    settings = load()
    assert settings.plugin_directory == Path("/p")
    assert settings.endpoint == "vgpu-k8s.amazonaws.com_vgpu.sock"


@pytest.mark.parametrize(
    ("address", "text"),
    [(Address("0.0.0.0", 9408), "0.0.0.0:9408"), (Address("::1", 80), "[::1]:80")],
)
def test_an_address_is_written_as_it_is_read(address, text):
    assert str(address) == text
    assert parse_address(text) == address


# What the model gets


def test_gpus_are_shared_and_their_health_is_judged_as_the_settings_say(monkeypatch):
    assert load().sharing_rules() == SharingRules()
    assert load().health_rules() == HealthRules()
    for name, value in {
        "SHARING": "time-slicing",
        "REPLICAS": "60",
        "MPS_DIRECTORY": "/mps",
        "MPS_SHM": "off",
        "MPS_THREADS": "1.5",
        "MPS_COMPUTE_MODE": "keep",
        "MEMORY_RESERVED": "0",
        "MEMORY_LIMITS": "driver",
        "MEMORY_GUARANTEE": "on",
        "REPLICAS_BY_GPU": '{"0": 4}',
        "PLACEMENT": "pack",
        "HEALTH_CHECKS": "off",
        "RECOVERY_SECONDS": "7.5",
        "CRITICAL_XIDS": "13",
        "IGNORED_XIDS": "79",
    }.items():
        monkeypatch.setenv(f"VGPU_{name}", value)
    assert load().sharing_rules() == SharingRules(
        mps=False,
        replicas=60,
        mps_directory="/mps",
        mps_shm_directory=None,
        mps_threads=1.5,
        mps_exclusive=False,
        memory_reserved=0,
        memory_limits=MemoryLimits.DRIVER,
        memory_guarantee=True,
        replicas_by_gpu={"0": 4},
        placement=Placement.PACK,
    )
    assert load().health_rules() == HealthRules(
        health_checks=False,
        recovery_seconds=7.5,
        critical_xids=frozenset({13}),
        ignored_xids=frozenset({79}),
    )


# Where they come from


def test_settings_are_frozen():
    with pytest.raises(FrozenInstanceError):
        load().replicas = 3


def test_variables_without_the_prefix_and_env_files_change_nothing(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("VGPU_REPLICAS=7\nREPLICAS=7\n")
    monkeypatch.setenv("REPLICAS", "7")
    assert load().replicas == 10


def test_embedded_settings_are_deaf_to_the_environment_and_checked_all_the_same(monkeypatch):
    for name, row in TABLE.items():
        monkeypatch.setenv(variable(name), row.bad.split("|")[-1])
    settings = embedded(gpu_driver=GpuDriverKind.SIMULATED, replicas=3)
    expected = DEFAULTS | {"gpu_driver": GpuDriverKind.SIMULATED, "replicas": 3}
    assert {name: getattr(settings, name) for name in DEFAULTS} == expected
    with pytest.raises(pydantic.ValidationError):
        embedded(replicas=61)


# Unknown variables


def test_unknown_variables_are_found_in_order_with_the_nearest_known_one():
    nearest = {
        "VGPU_": None,
        "VGPU_AGENT_PORT_METRICS": "VGPU_PROCESS_METRICS",
        "VGPU_LOGLEVEL": "VGPU_LOG_LEVEL",
        "VGPU_METRICS_PORT": "VGPU_METRICS_ADDRESS",  # no URL: not of a Service
        "VGPU_METRIC_ADDRESS": "VGPU_METRICS_ADDRESS",
        "VGPU_MPS_THREAD": "VGPU_MPS_THREADS",
        "VGPU_QQQQQQQQQQ": None,
        "VGPU_REPLICA": "VGPU_REPLICAS",
        "vgpu_replica": "VGPU_REPLICAS",
    }
    assert list(unknown_setting_warnings(dict.fromkeys(reversed(nearest), "9500"))) == [
        f"{name}: unknown setting, ignored" + (f"; did you mean {other}?" if other else "")
        for name, other in nearest.items()
    ]
    assert list(unknown_setting_warnings({"VGPU_AGENT_SERVICE": ""}))


def test_settings_in_any_case_and_variables_of_others_and_of_services_are_not_unknown(monkeypatch):
    known = [variable(name) for name in configuration.TABLE]
    others = ["PATH", "MY_VGPU_REPLICA", "VGPUS", "XVGPU_REPLICA"]
    url = "tcp://10.0.0.7:9408"
    agent = {
        *("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_METRICS", "PORT", "PORT_9408_TCP"),
        *("PORT_9408_TCP_PROTO", "PORT_9408_TCP_PORT", "PORT_9408_TCP_ADDR", "PORT_53_UDP_ADDR"),
    }
    services = [f"{prefix}_{each}" for prefix in ("VGPU", "VGPU_AGENT") for each in agent]
    given = [*known, *map(str.lower, known), *others, *services]
    assert list(unknown_setting_warnings(dict.fromkeys(given, url))) == []
    for name in services:
        monkeypatch.setenv(name, url)
    assert load().replicas == 10


# The table


def test_every_setting_has_its_documented_default_and_it_can_be_set(monkeypatch):
    _, _, *lines = settings_files.docs_table().splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert all(len(row) == 5 and all(row) for row in cells)
    defaults = {row[0].strip("`"): row[1].strip("`").replace("(empty)", "") for row in cells}
    assert list(defaults) == sorted(variable(name) for name in configuration.TABLE)
    assert vars(load()) == DEFAULTS
    for name, value in defaults.items():
        monkeypatch.setenv(name, value)
    assert vars(load()) == DEFAULTS


CHART_IS_LOOSER = {
    "replicas": {"1e2"},  # a number in YAML, and whole
    # Rules that templates/validate.yaml has.
    "memory_limits_enable_controller": {"on"},
    "resource_name": {
        "kubernetes.io/vgpu",
        "sub.kubernetes.io/vgpu",
        "requests.example.com/vgpu",
        f"{'x' * 245}/vgpu",
    },
    # Sizes that no GPU has.
    "simulated_memory": {"9" * 400, "0.5"},
}


def in_chart(text: str, schema: Any) -> list[object]:
    """A variable's text as a value of the chart: of all types that it may have there."""
    kinds = {kind for each in schema.get("anyOf", [schema]) for kind in types(each)}
    if "array" in kinds:
        words = [word.strip() for word in text.split(",") if text]
        return [[in_chart(word, schema["items"])[0] for word in words]]
    if "boolean" in kinds:
        return [{"on": True, "off": False}.get(text, text)]
    forms: list[object] = [text] if kinds & {"string", "enum"} else []
    if kinds & {"number", "integer", "object"}:
        with suppress(ValueError):
            forms.insert(0, json.loads(text))
    return forms or [text]


def types(schema: Any) -> list[str]:
    found = schema.get("type", "enum")
    return found if isinstance(found, list) else [found]


@pytest.mark.parametrize("value", [*settings_files.values()], ids=lambda value: value.variable)
def test_the_chart_allows_what_the_agent_allows(value):
    name = value.variable.removeprefix(configuration.PREFIX).lower()
    valid = jsonschema.Draft7Validator(value.schema).is_valid
    assert valid(yaml.safe_load(value.yaml))
    assert valid(None)
    unset = {""} if value.nullable or name == "replicas_by_gpu" else set()
    for text in set(TABLE[name].good) - unset:
        assert any(map(valid, in_chart(text.rstrip(" ,"), value.schema))), text
    bad = TABLE[name].bad.split("|")
    wrong = {text for text in bad if any(map(valid, in_chart(text, value.schema)))}
    assert wrong - unset == CHART_IS_LOOSER.get(name, set())


@pytest.mark.parametrize("name", ["health_interval", "mps_threads"])
def test_a_number_may_be_text_in_the_chart_as_helm_makes_it_of_one_that_is_not_whole(name):
    (value,) = [each for each in settings_files.values() if each.variable == f"VGPU_{name.upper()}"]
    valid = jsonschema.Draft7Validator(value.schema).is_valid
    assert all(valid(each) for each in (2, 2.5, "2", "2.5", "10"))
    assert not any(valid(each) for each in (0, -1, "0", "-1", "0.0", "2.5s", "1e3", ""))


@pytest.mark.parametrize("path", readme.FILES, ids=lambda path: path.name)
def test_a_generated_file_is_up_to_date(path):
    text = path.read_text("utf-8")
    assert text == readme.FILES[path](text), "run: python -m tests.readme"
