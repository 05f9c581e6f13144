"""Every VGPU_* variable, validated once at the start. The only reader of the environment.

`load` either returns frozen settings or raises one SettingsError that names every wrong variable,
its value and what is allowed.
"""

import difflib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.config import JsonDict
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from vgpu_agent.errors import SettingsError
from vgpu_agent.gpu.health import HealthPolicy, XidOverrides
from vgpu_agent.model.container import DeviceList, MpsSharing, Sharing, Threads
from vgpu_agent.model.placement import Placement
from vgpu_agent.model.share import MIB, Division, MpsLimits

PREFIX = "VGPU_"

MAX_SOCKET_PATH = 107
"""Longest path of a unix socket in bytes (`sockaddr_un.sun_path` less the final zero)."""

MPS_SERVER_MARGIN = 512 * MIB
"""What `VGPU_MEMORY_RESERVED=auto` keeps for the MPS server of a card, in bytes."""

MAX_BYTES = 2**63
"""More than any card has; what a signed number on any wire cannot hold."""

MPS_MAX_CLIENTS = 48
"""Client contexts of a card that every MPS from Volta on can serve."""


class GpuDriverKind(StrEnum):
    """Where GPUs come from."""

    NVML = "nvml"
    SIMULATED = "simulated"


class SharingKind(StrEnum):
    """How containers share a card."""

    MPS = "mps"
    TIME_SLICING = "time-slicing"


class MpsComputeMode(StrEnum):
    """What `vgpu-agent mps prepare` does with the compute mode of the shared cards."""

    EXCLUSIVE = "exclusive"
    KEEP = "keep"


class LogLevel(StrEnum):
    """The least important lines that are written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    """How log lines look."""

    TEXT = "text"
    JSON = "json"


class Address(NamedTuple):
    """Where to listen. Port 0 is any free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """Reads host:port or [IPv6]:port. Raises ValueError."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\s\[\]]+)):(\d{1,5})", text.strip())
    if match is None or int(match[3]) > 65535:
        raise ValueError
    return Address(match[1] or match[2], int(match[3]))


def _address(value: object) -> object:
    return parse_address(value) if isinstance(value, str) else value


_UNITS = {"": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("i", 1024), ("", 1000))
}


def _size(value: object) -> object:
    """A Kubernetes quantity of bytes, such as 8Gi; a bare number is bytes."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?i?)B?", value.strip())
    if match is None or match[2] not in _UNITS:
        raise ValueError
    return int(Decimal(match[1]) * _UNITS[match[2]])


def _switch(value: object) -> object:
    match value:
        case "on":
            return True
        case "off":
            return False
        case bool():
            return value
    raise ValueError


def _auto(parse: Callable[[object], object]) -> Callable[[object], object]:
    return lambda value: None if value in ("auto", None) else parse(value)


def _threads(value: object) -> object:
    return Threads(value) if isinstance(value, str) and value in tuple(Threads) else value


def _numa_nodes(value: object) -> object:
    if isinstance(value, str):
        words = [word.strip() for word in value.split(",")]
        return tuple(None if word == "none" else int(word) for word in words)
    return value


def _xids(value: object) -> object:
    if isinstance(value, str):
        return frozenset(int(word) for word in value.split(",") if word.strip())
    return value


def _unset(parse: Callable[[object], object]) -> Callable[[object], object]:
    return lambda value: None if value in ("", None) else parse(value)


def _json_object(value: object) -> object:
    if not isinstance(value, str):
        return value
    return json.loads(value) if value.strip() else {}


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError
    return path


_CDI_KIND = r"^[a-z0-9][a-z0-9.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*$"
_LABEL = r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?"


def _resource_name(name: str) -> str:
    """An extended resource as the kubelet checks it (`IsExtendedResourceName`)."""
    domain, _, word = name.partition("/")
    well_formed = (
        re.fullmatch(rf"{_LABEL}(?:\.{_LABEL})*", domain)
        and len("requests." + domain) <= 253
        and re.fullmatch(r"[A-Za-z0-9](?:[-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?", word)
    )
    if not well_formed or "kubernetes.io/" in name or name.startswith("requests."):
        raise ValueError
    return name


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
Seconds = Annotated[float, Field(ge=1, allow_inf_nan=False)]
Switch = Annotated[bool, BeforeValidator(_switch)]
Xids = Annotated[frozenset[Annotated[int, Field(ge=0)]], BeforeValidator(_xids)]
Bytes = Annotated[int, Field(ge=1, lt=MAX_BYTES), BeforeValidator(_size)]


def _allowed(text: str) -> JsonDict:
    return {"allowed": text}


class Settings(BaseSettings):
    """What the agent runs with. A field `name` is the variable `VGPU_NAME`.

    Fields that others are checked against stand first: pydantic validates in order.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        frozen=True,
        extra="ignore",
        validate_default=True,
        # Values are plain text with parsers of our own, never JSON.
        enable_decoding=False,
    )

    gpu_driver: GpuDriverKind = Field(
        GpuDriverKind.NVML,
        description="Where GPUs come from: real cards, or cards that exist in memory.",
        json_schema_extra=_allowed("`nvml` or `simulated`"),
    )
    sharing: SharingKind = Field(
        SharingKind.MPS,
        description="How containers share a card.",
        json_schema_extra=_allowed("`mps` or `time-slicing`"),
    )
    mps_max_clients: Annotated[
        int | None, Field(ge=1, le=1024), BeforeValidator(_auto(lambda value: value))
    ] = Field(
        None,
        description="Most vGPUs of a card under MPS; a bound of the MPS server on CUDA contexts.",
        json_schema_extra=_allowed(f"`auto` ({MPS_MAX_CLIENTS}) or a whole number from 1 to 1024"),
    )
    replicas: Annotated[int, Field(ge=1, le=1024)] = Field(
        10,
        description="vGPUs made of each card.",
        json_schema_extra=_allowed(
            "a whole number from 1 to 1024; under MPS at most VGPU_MPS_MAX_CLIENTS"
        ),
    )
    replicas_by_gpu: Annotated[
        dict[str, Annotated[int, Field(ge=0, le=1024)]], BeforeValidator(_json_object)
    ] = Field(
        {},
        description="vGPUs of single cards: 1 is a whole card, 0 leaves the card to others.",
        json_schema_extra=_allowed(
            'nothing, or a JSON object such as `{"0": 4, "GPU-...": 1, "NVIDIA L4": 0}`: index,'
            " UUID or model name to a number from 0 to 1024; under MPS at most VGPU_MPS_MAX_CLIENTS"
        ),
    )
    device_memory: Annotated[
        int | None, Field(ge=MIB, lt=MAX_BYTES), BeforeValidator(_unset(_size))
    ] = Field(
        None,
        description="Memory of a vGPU; then each card has as many vGPUs as fit.",
        json_schema_extra=_allowed(
            "nothing, or a size from 1Mi, such as 8Gi; not together with VGPU_REPLICAS"
        ),
    )
    resource_name: Annotated[str, AfterValidator(_resource_name)] = Field(
        "k8s.amazonaws.com/vgpu",
        description="The extended resource that pods ask for.",
        json_schema_extra=_allowed(
            "an extended resource domain/name, not of kubernetes.io, not beginning with requests."
        ),
    )
    kubelet_dir: AbsolutePath = Field(
        Path("/var/lib/kubelet"),
        description="The kubelet's root directory.",
        json_schema_extra=_allowed(
            "an absolute path, short enough for the socket"
            f" DIR/device-plugins/RESOURCE.sock to fit in {MAX_SOCKET_PATH} bytes"
        ),
    )
    device_list: DeviceList = Field(
        DeviceList.ENVVAR,
        description="How the container runtime is told which cards a container sees.",
        json_schema_extra=_allowed("`envvar`, `volume-mounts`, `cdi` or `cdi+envvar`"),
    )
    cdi_kind: Annotated[str, Field(pattern=_CDI_KIND)] = Field(
        "nvidia.com/gpu",
        description="Kind of the cards in the host's CDI specs; names are KIND=UUID.",
        json_schema_extra=_allowed("vendor/class, such as nvidia.com/gpu"),
    )
    mps_limits: MpsLimits = Field(
        MpsLimits.CLIENT,
        description="Where limits are put: the container's environment, the daemon, nowhere.",
        json_schema_extra=_allowed("`client`, `server` or `none`"),
    )
    mps_compute_mode: MpsComputeMode = Field(
        MpsComputeMode.EXCLUSIVE,
        description="Whether shared cards are put into compute mode EXCLUSIVE_PROCESS.",
        json_schema_extra=_allowed("`exclusive` or `keep`"),
    )
    mps_threads: Annotated[
        Threads | Annotated[float, Field(gt=0, allow_inf_nan=False)], BeforeValidator(_threads)
    ] = Field(
        Threads.SHARE,
        description="Thread percentage of a container: its share, no limit, or share times factor.",
        json_schema_extra=_allowed("`share`, `none` or a factor above 0"),
    )
    mps_directory: AbsolutePath = Field(
        Path("/run/vgpu-agent/mps"),
        description="Holds the MPS daemon's `pipe` directory, on the host and in containers.",
        json_schema_extra=_allowed("an absolute path"),
    )
    mps_multiuser: Switch = Field(
        False,
        description="Whether `vgpu-agent mps daemon` serves users of different UIDs at the same"
        " time, where the daemon of the driver can.",
        json_schema_extra=_allowed("`on` or `off`"),
    )
    mps_shm: Switch = Field(
        True,
        description="Whether MPS containers share the host directory below as their /dev/shm.",
        json_schema_extra=_allowed("`on` or `off`"),
    )
    mps_shm_directory: AbsolutePath = Field(
        Path("/dev/shm/vgpu-mps"),  # noqa: S108 - a path on the host, not a temporary file
        description="The host directory that MPS containers share as /dev/shm. Emptied by us.",
        json_schema_extra=_allowed("an absolute path of its own: not /dev/shm itself"),
    )
    memory_reserved: Annotated[
        int | None, Field(ge=0, lt=MAX_BYTES), BeforeValidator(_auto(_size))
    ] = Field(
        None,
        description="Memory of each card kept out of the shares, for the MPS server.",
        json_schema_extra=_allowed(
            f"`auto` (under MPS {MPS_SERVER_MARGIN // MIB}Mi until a server is measured, otherwise"
            " 0), or a size such as 512Mi"
        ),
    )
    placement: Placement = Field(
        Placement.SPREAD,
        description="Put containers on the card with the most free vGPUs, or fill cards up.",
        json_schema_extra=_allowed("`spread` or `pack`"),
    )
    health_interval: Seconds = Field(
        5,
        description="Seconds between two probes of every card.",
        json_schema_extra=_allowed("a number of seconds from 1"),
    )
    recovery_seconds: Seconds = Field(
        60,
        description="Seconds of passed probes after which a card that needs no reset is healthy.",
        json_schema_extra=_allowed("a number of seconds from 1"),
    )
    health_checks: Switch = Field(
        True,
        description="Whether faults of cards are looked for. Off: pods land on broken cards.",
        json_schema_extra=_allowed("`on` or `off`"),
    )
    ignored_xids: Xids = Field(
        frozenset(),
        description="XIDs that are only counted, whatever the catalogue says.",
        json_schema_extra=_allowed("XID numbers separated by commas, or nothing"),
    )
    critical_xids: Xids = Field(
        frozenset(),
        description="XIDs that mark the card, whatever the catalogue says.",
        json_schema_extra=_allowed(
            "XID numbers separated by commas, or nothing; none that VGPU_IGNORED_XIDS has"
        ),
    )
    driver_wait: Seconds = Field(
        300,
        description="Seconds to wait for a driver library that is missing or of another version;"
        " then the agent ends, for its container to be made anew.",
        json_schema_extra=_allowed("a number of seconds from 1"),
    )
    lost_card_seconds: Seconds = Field(
        3600,
        description="Seconds for which a lost card stays listed, as unhealthy.",
        json_schema_extra=_allowed("a number of seconds from 1"),
    )
    state_directory: AbsolutePath = Field(
        Path("/run/vgpu-agent"),
        description="Where the agent remembers which cards wait for a reset.",
        json_schema_extra=_allowed("an absolute path, not in VGPU_MPS_SHM_DIRECTORY"),
    )
    metrics_address: Annotated[Address, BeforeValidator(_address)] = Field(
        Address("0.0.0.0", 9408),  # noqa: S104 - scraped from outside the pod
        description="Where the page, /metrics, /healthz, /readyz and /status.json are served.",
        json_schema_extra=_allowed("host:port or [IPv6]:port, port 0 (any free) to 65535"),
    )
    status_page: Switch = Field(
        True,
        description="Whether there is a page at /, and names of pods in /status.json. /metrics"
        " always has them.",
        json_schema_extra=_allowed("`on` or `off`"),
    )
    podresources_interval: Seconds = Field(
        60,
        description="Seconds between two questions to the kubelet about who holds which vGPU;"
        " it is also asked after each allocation.",
        json_schema_extra=_allowed("a number of seconds from 1"),
    )
    process_metrics: Switch = Field(
        False,
        description="Whether memory and processes of each container are told. Needs the host's"
        " PID namespace and /var/log/containers.",
        json_schema_extra=_allowed("`on` or `off`"),
    )
    log_level: LogLevel = Field(
        LogLevel.INFO,
        description="The least important log lines that are written.",
        json_schema_extra=_allowed("`debug`, `info`, `warning` or `error`"),
    )
    log_format: LogFormat = Field(
        LogFormat.TEXT,
        description="How log lines look.",
        json_schema_extra=_allowed("`text` or `json`"),
    )
    simulated_gpus: Annotated[int, Field(ge=0, le=64)] = Field(
        2,
        description="Number of simulated cards.",
        json_schema_extra=_allowed("a whole number from 0 to 64"),
    )
    simulated_model: Annotated[str, Field(min_length=1)] = Field(
        "NVIDIA Simulated 24GB",
        description="Model name of the simulated cards.",
        json_schema_extra=_allowed("any text"),
    )
    simulated_memory: Bytes = Field(
        24 * 1024 * MIB,
        description="Memory of each simulated card.",
        json_schema_extra=_allowed("a size such as 24Gi"),
    )
    simulated_numa_nodes: Annotated[
        tuple[Annotated[int, Field(ge=0)] | None, ...],
        Field(min_length=1),
        BeforeValidator(_numa_nodes),
    ] = Field(
        (0, 1),
        description="NUMA nodes of the simulated cards, in turn.",
        json_schema_extra=_allowed("numbers from 0, or `none`, separated by commas"),
    )

    @field_validator("replicas")
    @classmethod
    def _clients_of_a_card(cls, value: int, info: ValidationInfo) -> int:
        most = info.data.get("mps_max_clients") or MPS_MAX_CLIENTS
        if info.data.get("sharing") is SharingKind.MPS and value > most:
            raise ValueError
        return value

    @field_validator("mps_shm_directory")
    @classmethod
    def _directory_of_its_own(cls, value: Path, info: ValidationInfo) -> Path:
        mps, kubelet = info.data.get("mps_directory"), info.data.get("kubelet_dir")
        shared = value in (Path("/"), Path("/dev"), Path("/dev/shm"))  # noqa: S108 - a comparison
        shared |= any(each is not None and each.is_relative_to(value) for each in (mps, kubelet))
        shared |= mps is not None and value.is_relative_to(mps)
        if shared:
            raise ValueError
        return value

    @field_validator("state_directory")
    @classmethod
    def _not_for_pods(cls, value: Path, info: ValidationInfo) -> Path:
        shared = info.data.get("mps_shm_directory")
        if shared is not None and value.is_relative_to(shared):
            raise ValueError
        return value

    @field_validator("replicas_by_gpu")
    @classmethod
    def _clients_of_single_cards(
        cls, value: dict[str, int], info: ValidationInfo
    ) -> dict[str, int]:
        for count in value.values():
            cls._clients_of_a_card(count, info)
        return value

    @field_validator("critical_xids")
    @classmethod
    def _not_both(cls, value: frozenset[int], info: ValidationInfo) -> frozenset[int]:
        if value & info.data.get("ignored_xids", frozenset()):
            raise ValueError
        return value

    @field_validator("kubelet_dir")
    @classmethod
    def _socket_path_fits(cls, value: Path, info: ValidationInfo) -> Path:
        name = info.data.get("resource_name")
        if name is not None:
            path = value / "device-plugins" / endpoint_name(name)
            if len(str(path).encode()) > MAX_SOCKET_PATH:
                raise ValueError
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - the signature is pydantic's
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments and the environment; no files."""
        return init_settings, env_settings

    @property
    def plugin_directory(self) -> Path:
        """Where the kubelet's and the plugins' sockets are."""
        return self.kubelet_dir / "device-plugins"

    @property
    def endpoint(self) -> str:
        """File name of our socket."""
        return endpoint_name(self.resource_name)

    def health_policy(self) -> HealthPolicy:
        """The settings of health as the prober takes them."""
        return HealthPolicy(
            interval=self.health_interval,
            recovery=self.recovery_seconds,
            lost_for=self.lost_card_seconds,
            driver_wait=self.driver_wait,
            xids=XidOverrides(self.ignored_xids, self.critical_xids),
            shared_by_mps=self.sharing is SharingKind.MPS,
            enabled=self.health_checks,
        )

    def division(self) -> Division:
        """How cards become vGPUs, as the model takes it."""
        mps = self.sharing is SharingKind.MPS
        return Division(
            replicas=self.replicas,
            device_memory=self.device_memory,
            by_gpu=self.replicas_by_gpu,
            max_clients=(self.mps_max_clients or MPS_MAX_CLIENTS) if mps else None,
            held_back=self.memory_held_back,
            measured=mps and self.memory_reserved is None,
        )

    @property
    def memory_held_back(self) -> int:
        """Bytes of each card that are kept out of the shares."""
        if self.memory_reserved is not None:
            return self.memory_reserved
        return MPS_SERVER_MARGIN if self.sharing is SharingKind.MPS else 0

    def sharing_rules(self) -> Sharing:
        """The settings of sharing as the model takes them."""
        mps = MpsSharing(
            pipe_directory=str(self.mps_directory / "pipe"),
            shm_directory=str(self.mps_shm_directory) if self.mps_shm else None,
            threads=self.mps_threads,
            limits=self.mps_limits,
        )
        return Sharing(
            mps=mps if self.sharing is SharingKind.MPS else None,
            memory_held_back=self.memory_held_back,
            device_list=self.device_list,
            cdi_kind=self.cdi_kind,
        )


class EmbeddedSettings(Settings):
    """Settings of which none comes from the environment: what `vgpu-agent dev` runs with."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - the signature is pydantic's
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments alone."""
        return (init_settings,)


def endpoint_name(resource_name: str) -> str:
    """The socket's file name for a resource: the same for every agent that serves it.

    The name is not unique to a process on purpose: two agents for one resource must meet.
    """
    return f"vgpu-{resource_name.replace('/', '_')}.sock"


def load() -> Settings:
    """The settings of this process. Raises SettingsError."""
    problems: dict[str, str] = {}
    settings = None
    try:
        settings = Settings()
    except ValidationError as error:
        problems = _problems(error)
    if os.environ.get(variable("device_memory")) and variable("replicas") in os.environ:
        both = (f"{variable(n)}={os.environ[variable(n)]!r}" for n in ("replicas", "device_memory"))
        problems.setdefault("device_memory", f"  {' and '.join(both)}: only one of them is allowed")
    if settings is not None and not problems:
        return settings
    raise _wrong(problems)


def read(environment: Mapping[str, str], *names: str) -> Settings:
    """Settings of which only these are read; the others are defaults. Raises SettingsError."""
    given = {name.upper(): value for name, value in environment.items()}
    values = {name: given[variable(name)] for name in names if variable(name) in given}
    try:
        return EmbeddedSettings.model_validate(values)
    except ValidationError as error:
        raise _wrong(_problems(error)) from None


def _wrong(problems: Mapping[str, str]) -> SettingsError:
    count = len(problems)
    head = "1 setting is wrong:" if count == 1 else f"{count} settings are wrong:"
    return SettingsError("\n".join([head, *problems.values()]))


def assume(environment: Mapping[str, str]) -> Settings | None:
    """The settings with the default of every wrong variable; None where that is wrong too."""
    given = {name.upper(): value for name, value in environment.items()}
    values = {
        name: given[variable(name)] for name in Settings.model_fields if variable(name) in given
    }
    while True:
        try:
            return EmbeddedSettings.model_validate(values)
        except ValidationError as error:
            if not values:
                return None
            wrong = {str(problem["loc"][0]) for problem in error.errors()} & values.keys()
            # A default that does not fit what is set is nobody's fault here: keep nothing then.
            values = {name: value for name, value in values.items() if wrong and name not in wrong}


def _problems(error: ValidationError) -> dict[str, str]:
    """A line for each wrong variable, however many ways it is wrong in."""
    return {
        name: _problem(name, str(problem["input"]))
        for problem in error.errors(include_url=False, include_context=False)
        for name in [str(problem["loc"][0])]
    }


def _problem(name: str, parsed: str) -> str:
    # As it was set, not as far as it was parsed.
    value = os.environ.get(variable(name), parsed)
    return f"  {variable(name)}={value!r} is wrong; allowed: {allowed(name)}"


def variable(name: str) -> str:
    """The variable of a field."""
    return PREFIX + name.upper()


def allowed(name: str) -> str:
    """What a field's variable may say, in words."""
    extra = Settings.model_fields[name].json_schema_extra
    return str(extra["allowed"]) if isinstance(extra, dict) else ""


# What Kubernetes puts into a pod for each Service of the namespace; a Service whose name begins
# with "vgpu" makes variables that look like ours. NAME_PORT is told by its value.
_SERVICE_VARIABLE = re.compile(
    r"VGPU(_[A-Z0-9_]+)?_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?"
    r"|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_SERVICE_URL = re.compile(r"(tcp|udp|sctp)://")


def _from_service(name: str, value: str) -> bool:
    by_value = name.endswith("_PORT") and _SERVICE_URL.match(value)
    return bool(by_value or _SERVICE_VARIABLE.fullmatch(name))


def unknown_variables(environment: Mapping[str, str]) -> dict[str, str | None]:
    """VGPU_* variables that are no setting, each with the nearest name that is one."""
    known = {variable(name) for name in Settings.model_fields}
    return {
        name: next(iter(difflib.get_close_matches(name.upper(), known, n=1)), None)
        for name, value in sorted(environment.items())
        if name.upper().startswith(PREFIX)
        and name.upper() not in known
        and not _from_service(name, value)
    }


def unknown_in_words(environment: Mapping[str, str]) -> Iterator[str]:
    """A line for each VGPU_* variable that is no setting."""
    for name, nearest in unknown_variables(environment).items():
        hint = f"; did you mean {nearest}?" if nearest else ""
        yield f"{name} is no setting of vgpu-agent and does nothing{hint}"


def _default_text(value: object) -> str:
    match value:
        case None:
            return "auto"
        case {}:
            return ""
        case bool():
            return "on" if value else "off"
        case tuple() if not isinstance(value, Address):
            return ",".join("none" if item is None else str(item) for item in value)
        case int() if value >= MIB and value % MIB == 0:
            gibibytes, rest = divmod(value, 1024 * MIB)
            return f"{value // MIB}Mi" if rest else f"{gibibytes}Gi"
        case frozenset():
            return ",".join(str(item) for item in sorted(value))
        case _:
            return str(value)


def _default_of(name: str, value: object) -> str:
    return "" if name == "device_memory" else _default_text(value)


def _code(text: str) -> str:
    return f"`{text}`" if text else "(empty)"


def markdown_table() -> str:
    """All settings as the table of docs/settings.md."""
    rows = ["| variable | default | allowed | what it is |", "| --- | --- | --- | --- |"]
    for name, field in sorted(Settings.model_fields.items()):
        rows.append(
            f"| `{variable(name)}` | {_code(_default_of(name, field.default))} | {allowed(name)}"
            f" | {field.description} |"
        )
    return "\n".join(rows)
