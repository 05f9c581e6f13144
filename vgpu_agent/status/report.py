"""What the agent tells at /status.json, as values.

The agent may be older or newer than this command: what is missing, or is of another type than
expected, is None, which means unknown; what is not known here is left out. The texts are fit for a
terminal.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Driver:
    """The source of GPUs."""

    up: bool | None
    version: str | None
    error: str | None
    released_until: str | None


@dataclass(frozen=True, slots=True)
class Kubelet:
    """The session with the kubelet."""

    connected: bool | None
    registered: bool | None
    error: str | None


@dataclass(frozen=True, slots=True)
class Mps:
    """The MPS daemon. `clients` of all cards together."""

    up: bool | None
    limits_in_force: bool | None
    problem: str | None
    replacement: str | None
    clients: int | None
    waiting_clients: int | None


@dataclass(frozen=True, slots=True)
class Fault:
    """A reason for which a card is unhealthy."""

    reason: str | None
    since: str | None
    detail: str | None
    until_reset: bool | None
    advice: str | None


@dataclass(frozen=True, slots=True)
class Card:
    """A shared card. Memory in bytes. `no_numa`: the platform names no node for it."""

    uuid: str | None
    index: int | None
    model: str | None
    memory_bytes: int | None
    memory_used_bytes: int | None
    unattributed_processes: int | None
    numa_node: int | None
    no_numa: bool
    vgpus: int | None
    healthy: bool | None
    faults: tuple[Fault, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Excluded:
    """A card that is left out."""

    uuid: str | None
    index: int | None
    model: str | None
    reason: str | None
    detail: str | None


@dataclass(frozen=True, slots=True)
class Allocation:
    """What a container holds and uses of a card. Memory in bytes."""

    namespace: str | None
    pod: str | None
    container: str | None
    gpu_uuid: str | None
    gpu_index: int | None
    numbers: tuple[int, ...] | None
    memory_share_bytes: int | None
    memory_limited: bool | None
    memory_used_bytes: int | None
    processes: int | None


@dataclass(frozen=True, slots=True)
class Report:
    """The node. `no_mps`: its cards are not shared by MPS."""

    version: str | None
    host: str | None
    time: str | None
    resource: str | None
    health_checks: bool | None
    process_metrics: bool | None
    names_pods: bool | None
    driver: Driver
    kubelet: Kubelet
    mps: Mps | None
    no_mps: bool
    podresources_up: bool | None
    podresources_error: str | None
    cards: tuple[Card, ...] | None
    excluded: tuple[Excluded, ...] | None
    allocations: tuple[Allocation, ...] | None
    orphaned: tuple[str, ...] | None
    largest_free_share: int | None


def visible(text: str) -> str:
    """The text with everything that is no plain character written out: pods name themselves."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


@dataclass(frozen=True, slots=True)
class _Fields:
    """A JSON object, read field by field."""

    values: Mapping[str, object]

    def text(self, name: str) -> str | None:
        value = self.values.get(name)
        return visible(value) if isinstance(value, str) else None

    def number(self, name: str) -> int | None:
        return _number(self.values.get(name))

    def flag(self, name: str) -> bool | None:
        value = self.values.get(name)
        return value if isinstance(value, bool) else None

    def null(self, name: str) -> bool:
        return name in self.values and self.values[name] is None

    def inner(self, name: str) -> "_Fields":
        return _fields(self.values.get(name))

    def items(self, name: str) -> list[object] | None:
        value = self.values.get(name)
        return value if isinstance(value, list) else None

    def objects(self, name: str) -> "tuple[_Fields, ...] | None":
        items = self.items(name)
        return None if items is None else tuple(_fields(each) for each in items)

    def texts(self, name: str) -> tuple[str, ...] | None:
        items = self.items(name)
        if items is None or not all(isinstance(each, str) for each in items):
            return None
        return tuple(visible(str(each)) for each in items)

    def numbers(self, name: str) -> tuple[int, ...] | None:
        items = self.items(name)
        return None if items is None else _numbers(items)


def _fields(value: object) -> _Fields:
    return _Fields(value if isinstance(value, dict) else {})


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _numbers(values: Collection[object]) -> tuple[int, ...] | None:
    numbers = tuple(number for each in values if (number := _number(each)) is not None)
    return numbers if len(numbers) == len(values) else None


def parse(told: Mapping[str, object]) -> Report:
    """Reads what the agent told, as far as it is understood."""
    fields = _Fields(told)
    driver, kubelet, mps = (fields.inner(name) for name in ("driver", "kubelet", "mps"))
    podresources = fields.inner("podresources")
    cards, excluded = fields.objects("cards"), fields.objects("excluded")
    allocations = fields.objects("allocations")
    return Report(
        version=fields.text("version"),
        host=fields.text("host"),
        time=fields.text("time"),
        resource=fields.text("resource"),
        health_checks=fields.flag("health_checks"),
        process_metrics=fields.flag("process_metrics"),
        names_pods=fields.flag("names_pods"),
        driver=Driver(
            up=driver.flag("up"),
            version=driver.text("version"),
            error=driver.text("error"),
            released_until=driver.text("released_until"),
        ),
        kubelet=Kubelet(
            connected=kubelet.flag("connected"),
            registered=kubelet.flag("registered"),
            error=kubelet.text("error"),
        ),
        mps=_mps(mps) if mps.values else None,
        no_mps=fields.null("mps"),
        podresources_up=podresources.flag("up"),
        podresources_error=podresources.text("error"),
        cards=None if cards is None else tuple(_card(each) for each in cards),
        excluded=None if excluded is None else tuple(_excluded(each) for each in excluded),
        allocations=(
            None if allocations is None else tuple(_allocation(each) for each in allocations)
        ),
        orphaned=fields.texts("orphaned"),
        largest_free_share=fields.number("largest_free_share"),
    )


def _mps(fields: _Fields) -> Mps:
    clients = fields.values.get("clients")
    counts = _numbers(clients.values()) if isinstance(clients, dict) else None
    return Mps(
        up=fields.flag("up"),
        limits_in_force=fields.flag("limits_in_force"),
        problem=fields.text("problem"),
        replacement=fields.text("replacement"),
        clients=None if counts is None else sum(counts),
        waiting_clients=fields.number("waiting_clients"),
    )


def _card(fields: _Fields) -> Card:
    return Card(
        uuid=fields.text("uuid"),
        index=fields.number("index"),
        model=fields.text("model"),
        memory_bytes=fields.number("memory_bytes"),
        memory_used_bytes=fields.number("memory_used_bytes"),
        unattributed_processes=fields.number("unattributed_processes"),
        numa_node=fields.number("numa_node"),
        no_numa=fields.null("numa_node"),
        vgpus=fields.number("vgpus"),
        healthy=fields.flag("healthy"),
        faults=tuple(_fault(each) for each in fields.objects("faults") or ()),
        notes=fields.texts("notes") or (),
    )


def _fault(fields: _Fields) -> Fault:
    return Fault(
        reason=fields.text("reason"),
        since=fields.text("since"),
        detail=fields.text("detail"),
        until_reset=fields.flag("until_reset"),
        advice=fields.text("advice"),
    )


def _excluded(fields: _Fields) -> Excluded:
    return Excluded(
        uuid=fields.text("uuid"),
        index=fields.number("index"),
        model=fields.text("model"),
        reason=fields.text("reason"),
        detail=fields.text("detail"),
    )


def _allocation(fields: _Fields) -> Allocation:
    return Allocation(
        namespace=fields.text("namespace"),
        pod=fields.text("pod"),
        container=fields.text("container"),
        gpu_uuid=fields.text("gpu_uuid"),
        gpu_index=fields.number("gpu_index"),
        numbers=fields.numbers("numbers"),
        memory_share_bytes=fields.number("memory_share_bytes"),
        memory_limited=fields.flag("memory_limited"),
        memory_used_bytes=fields.number("memory_used_bytes"),
        processes=fields.number("processes"),
    )
