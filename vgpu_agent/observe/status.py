"""The node's state as JSON: /status.json, for people and for `vgpu-agent release`."""

import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime

from vgpu_agent.model.container import Sharing, share_bytes
from vgpu_agent.model.devices import Card, Excluded, Fault
from vgpu_agent.model.holders import Part, Used, largest_free, orphaned, parts
from vgpu_agent.model.state import Mps, Snapshot


@dataclass(frozen=True, slots=True)
class Status:
    """What does not change while the agent runs, and the report of what does.

    Without `names_pods` it does not say which containers hold what.
    """

    version: str
    resource_name: str
    health_checks: bool
    sharing: Sharing
    host: str
    names_pods: bool = True

    def render(self, snapshot: Snapshot) -> bytes:
        """The report. Times are in UTC, memory in bytes."""
        driver, kubelet = snapshot.driver, snapshot.kubelet
        report = {
            "version": self.version,
            "host": self.host,
            "time": _time(time.time()),
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
            "podresources": {"up": snapshot.holders.up, "error": snapshot.holders.error},
            "process_metrics": snapshot.usage is not None,
            "names_pods": self.names_pods,
            "cards": [_card(card, snapshot) for card in snapshot.inventory.cards],
            "excluded": [_excluded(left) for left in snapshot.excluded],
            **self._holders(snapshot),
        }
        return json.dumps(report, indent=2).encode() + b"\n"

    def _holders(self, snapshot: Snapshot) -> dict[str, object]:
        """Who holds what; null where that is not known."""
        inventory, assignments = snapshot.inventory, snapshot.holders.assignments
        if assignments is None:
            return {"allocations": None, "orphaned": None, "largest_free_share": None}
        return {
            "allocations": [self._part(part, snapshot) for part in parts(inventory, assignments)]
            if self.names_pods
            else None,
            "orphaned": list(orphaned(inventory, assignments)),
            "largest_free_share": largest_free(inventory, assignments),
        }

    def _part(self, part: Part, snapshot: Snapshot) -> dict[str, object]:
        gpu, vgpus, usage = part.card.gpu, len(part.numbers), snapshot.usage
        share = share_bytes(part.card, vgpus, self.sharing) if part.whole else None
        used = usage and usage.containers.get((gpu.uuid, part.holder), Used(0, 0))
        return {
            "namespace": part.holder.namespace,
            "pod": part.holder.pod,
            "container": part.holder.container,
            "gpu_uuid": gpu.uuid,
            "gpu_index": gpu.index,
            "numbers": list(part.numbers),
            "memory_share_bytes": share,
            "memory_limited": self.sharing.under(snapshot.mps.limits).limits_memory,
            "memory_used_bytes": used and used.memory_bytes,
            "processes": used and used.processes,
        }


def _mps(mps: Mps) -> dict[str, object]:
    return {
        "up": mps.up,
        "limits_in_force": mps.limits_in_force,
        "problem": mps.problem,
        "replacement": mps.replacement,
        "clients": dict(mps.clients),
        "waiting_clients": mps.waiting,
    }


def _card(card: Card, snapshot: Snapshot) -> dict[str, object]:
    gpu, usage = card.gpu, snapshot.usage
    return {
        "uuid": gpu.uuid,
        "index": gpu.index,
        "model": gpu.model,
        "memory_bytes": gpu.memory_bytes,
        "memory_used_bytes": snapshot.memory_used.get(gpu.uuid),
        "unattributed_processes": usage and usage.unattributed.get(gpu.uuid),
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
