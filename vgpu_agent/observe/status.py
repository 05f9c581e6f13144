"""The node's state as JSON: /status.json, for people and for `vgpu-agent release`."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime

from vgpu_agent.model.devices import Card, Excluded, Fault
from vgpu_agent.model.state import Mps, Snapshot


@dataclass(frozen=True, slots=True)
class Status:
    """What does not change while the agent runs, and the report of what does."""

    version: str
    resource_name: str
    health_checks: bool

    def render(self, snapshot: Snapshot) -> bytes:
        """The report. Times are in UTC, memory in bytes."""
        driver, kubelet = snapshot.driver, snapshot.kubelet
        report = {
            "version": self.version,
            "resource": self.resource_name,
            "health_checks": self.health_checks,
            "driver": {
                "up": driver.up,
                "version": driver.version,
                "error": driver.error,
                "released_until": _time(driver.released_until),
            },
            "kubelet": {
                "connected": kubelet.connected,
                "registered": kubelet.registered,
                "streams": kubelet.streams,
                "error": kubelet.error,
            },
            "mps": _mps(snapshot.mps) if snapshot.mps.wanted else None,
            "cards": [_card(card) for card in snapshot.inventory.cards],
            "excluded": [_excluded(left) for left in snapshot.excluded],
        }
        return json.dumps(report, indent=2).encode() + b"\n"


def _mps(mps: Mps) -> dict[str, object]:
    return {
        "up": mps.up,
        "limits_in_force": mps.limits_in_force,
        "problem": mps.problem,
        "replacement": mps.replacement,
        "clients": dict(mps.clients),
        "waiting_clients": mps.waiting,
    }


def _card(card: Card) -> dict[str, object]:
    gpu = card.gpu
    return {
        "uuid": gpu.uuid,
        "index": gpu.index,
        "model": gpu.model,
        "memory_bytes": gpu.memory_bytes,
        "pci_bus_id": gpu.pci_bus_id,
        "numa_node": gpu.numa_node,
        "vgpus": card.replicas,
        "healthy": card.healthy,
        "faults": [_fault(fault) for fault in card.faults],
        "notes": list(card.notes),
        "recovery_wait_seconds": card.recovery_wait,
    }


def _fault(fault: Fault) -> dict[str, object]:
    return {
        "reason": fault.reason.value,
        "since": _time(fault.since),
        "detail": fault.detail,
        "until_reset": fault.until_reset,
        "advice": fault.advice,
    }


def _excluded(left: Excluded) -> dict[str, object]:
    return {
        "uuid": left.gpu.uuid,
        "index": left.gpu.index,
        "model": left.gpu.model,
        "reason": left.reason,
        "detail": left.detail,
    }


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()
