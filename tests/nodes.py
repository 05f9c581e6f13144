"""Nodes that know what a test says, with their changes logged as the agent logs them."""

import time
from collections.abc import Iterable

from vgpu_agent.model.devices import Fault, Gpu
from vgpu_agent.model.facts import Reading, Scan
from vgpu_agent.model.health import Moment, Probed
from vgpu_agent.model.node import Node
from vgpu_agent.model.rules import HealthRules, SharingRules
from vgpu_agent.model.snapshot import Driver, Rules
from vgpu_agent.observe import changes


def new_node(
    gpus: Iterable[Gpu] = (),
    sharing: SharingRules | None = None,
    health: HealthRules | None = None,
    clock=time.monotonic,
) -> Node:
    """A node on which the driver was looked at once."""
    rules = Rules(sharing or SharingRules(), health or HealthRules())
    node = Node(
        rules,
        clock=lambda: Moment(clock(), time.time()),
        published=lambda before, after: changes.write(changes.changes(before, after, rules)),
    )
    if gpus:
        found(node, gpus)
    return node


def found(node: Node, gpus: Iterable[Gpu]) -> None:
    """The driver lists these GPUs, and they are well."""
    scan = Scan("simulated", tuple(gpus))
    node.driver_looked(Driver("simulated", None), scan, {})


def probed(node: Node, uuid: str, reading: Reading) -> None:
    """A probe of a GPU read this."""
    driver = node.snapshot.driver
    node.driver_looked(driver, None, {uuid: (Probed(reading),)})


def fault_of(node: Node, uuid: str) -> Fault:
    """Its only fault."""
    shared = node.snapshot.inventory.find(uuid)
    assert shared is not None
    (fault,) = shared.faults
    return fault
