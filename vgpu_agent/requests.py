"""What the running agent can be asked at its control socket, and what it does then.

An answer is the report as JSON, or lines for the operator.
"""

import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import anyio

from vgpu_agent.errors import ControlError, StoreError
from vgpu_agent.gpu.cordons import MAX_REASON, Cordons, is_reason
from vgpu_agent.gpu.driver import GpuDriver
from vgpu_agent.gpu.simulated import SimulatedDriver, SimulatedFault
from vgpu_agent.gpu.watch import GpuWatch
from vgpu_agent.model.facts import Cordon
from vgpu_agent.model.holders import NO_NAMESPACE, pods_on
from vgpu_agent.model.names import GpuName, find_gpu, known_gpus
from vgpu_agent.model.node import Node
from vgpu_agent.model.snapshot import Snapshot

MAX_RELEASE = 3600.0
"""Seconds for which NVML may be closed on request: faults are not noticed meanwhile."""

MAX_XID = 2**16

PROBE_SECONDS = 3.0
"""For so long an answer waits for the probe after a reset."""


@dataclass(frozen=True, slots=True)
class Requests:
    """Answers requests, for a node and what serves it. `report` is that of the newest snapshot."""

    node: Node
    watch: GpuWatch
    cordons: Cordons
    driver: GpuDriver
    report: Callable[[], bytes]

    async def answer(self, request: Mapping[str, object]) -> bytes:
        """Does what the request says. Raises ControlError with what is wrong with it."""
        match request:
            case {"command": "report"}:
                return self.report()
            case {"command": "release", "seconds": int() | float() as seconds} if (
                0 < seconds <= MAX_RELEASE
            ):
                return await self._released(seconds)
            case {"command": "release"}:
                raise ControlError(
                    f"--for {request.get('seconds')}: allowed is a number of seconds above 0, up to"
                    f" {MAX_RELEASE:.0f} (1h)"
                )
            case {"command": "reset-done", "gpu": str(name)}:
                text = await self._reset_done(self._find(name))
            case {"command": "reset-done"}:
                self.watch.reset_done()
                text = "the GPUs that wait for a reset are probed now: see `vgpu-agent status`"
            case {"command": "cordon", "gpu": str(name), "reason": str(reason)}:
                text = await self._cordon(self._find(name), reason)
            case {"command": "uncordon", "gpu": str(name)}:
                text = await self._uncordon(self._find(name))
            case {"command": "drain-list", "gpu": str(name)}:
                text = drain_list(self.node.snapshot, self._find(name))
            case {"command": "simulate", "fault": str(fault)}:
                text = self._simulate(fault, request)
            case _:
                raise ControlError(f"unknown command {request.get('command')!r}")
        return text.encode() + b"\n"

    def _find(self, name: str) -> GpuName:
        return find_gpu(name, known_gpus(self.node.snapshot))

    # Release

    async def _released(self, seconds: float) -> bytes:
        """Releases NVML; the report that says so."""
        before = self.node.snapshot.driver.released_until
        self.watch.release(seconds)
        await self.node.latest.until(lambda now: now.driver.released_until not in (None, before))
        return self.report()

    async def _reset_done(self, gpu: GpuName) -> str:
        """Has the GPU probed; how it is then. Raises ControlError where it needs a reset still."""
        self.watch.reset_done(gpu.uuid)
        with anyio.move_on_after(PROBE_SECONDS):
            await self.node.latest.until(
                lambda now: now.driver.released_until is None and _probed(now, gpu.uuid)
            )
        snapshot = self.node.snapshot
        state = _state(snapshot, gpu.uuid)
        if not _probed(snapshot, gpu.uuid):
            raise ControlError(
                f"{gpu} has not answered a probe within {PROBE_SECONDS:g} s: {state}; if it is only"
                " slow, `vgpu-agent status` shows it soon"
            )
        if snapshot.health[gpu.uuid].waits_for_reset:
            raise ControlError(f"{gpu} was probed and needs a reset still: {state}")
        return f"{gpu} was probed: {state}"

    # Cordons

    async def _cordon(self, gpu: GpuName, reason: str) -> str:
        if not is_reason(reason):
            raise ControlError(
                f"reason={reason[:MAX_REASON]!r}: allowed is one line of at most {MAX_REASON}"
                " printable letters"
            )
        before = self.node.snapshot.cordons.get(gpu.uuid)
        cordon = Cordon(time.time() if before is None else before.since, reason)
        try:
            await self.cordons.put(gpu.uuid, cordon)
        except StoreError as error:
            raise ControlError(f"{gpu} is not cordoned: {error}") from error
        words = "is cordoned" if before is None else "stays cordoned, with this reason"
        return (
            f"{gpu} {words}: no pod is given a vGPU of it until `vgpu-agent uncordon {gpu.uuid}`\n"
            "Pods that have some go on. What deletes them:\n"
            f"    vgpu-agent drain-list {gpu.uuid}"
        )

    async def _uncordon(self, gpu: GpuName) -> str:
        if gpu.uuid not in self.node.snapshot.cordons:
            return f"{gpu} was not cordoned: {_state(self.node.snapshot, gpu.uuid)}"
        try:
            await self.cordons.remove(gpu.uuid)
        except StoreError as error:
            raise ControlError(f"{gpu} stays cordoned: {error}") from error
        return f"{gpu} is no longer cordoned: {_state(self.node.snapshot, gpu.uuid)}"

    # Rehearsal

    def _simulate(self, text: str, request: Mapping[str, object]) -> str:
        if not isinstance(self.driver, SimulatedDriver):
            raise ControlError(
                "the GPUs of this agent are real: faults are simulated with"
                " VGPU_GPU_DRIVER=simulated only"
            )
        if text not in list(SimulatedFault):
            raise ControlError(f"fault={text!r}: allowed is {', '.join(SimulatedFault)}")
        fault, gpus = SimulatedFault(text), [GpuName.of(gpu) for gpu in self.driver.gpus]
        name, xid = request.get("gpu"), request.get("xid")
        if isinstance(name, str):
            gpus = [find_gpu(name, gpus)]
        elif name is None and fault is SimulatedFault.HEAL:
            # A reset of a GPU that is well would make it unhealthy for a moment.
            gpus = [gpu for gpu in gpus if self._needs_healing(self.driver, gpu.uuid)]
        else:
            raise ControlError(f"gpu={name!r}: which GPU is it? Say --gpu INDEX")
        if not isinstance(xid, int) or not 0 < xid < MAX_XID:
            if fault is SimulatedFault.XID:
                raise ControlError(f"xid={xid!r}: allowed is a number from 1 to {MAX_XID - 1}")
            xid = 0
        for gpu in gpus:
            self.driver.rehearse(fault, gpu.uuid, xid)
        done = {
            SimulatedFault.XID: f"reports XID {xid}",
            SimulatedFault.LOSE: "has fallen off the bus",
            SimulatedFault.ECC: "has an uncorrectable memory error",
            SimulatedFault.HANG: "no longer answers",
            SimulatedFault.HEAL: "was reset, and is well",
        }[fault]
        return "\n".join(f"{gpu} {done}" for gpu in gpus) or "no GPU has a fault"

    def _needs_healing(self, driver: SimulatedDriver, uuid: str) -> bool:
        health = self.node.snapshot.health.get(uuid)
        return not driver.is_well(uuid) or (health is not None and bool(health.faults))


def _probed(snapshot: Snapshot, uuid: str) -> bool:
    """Whether the GPU answered a probe since it is said to be reset."""
    health = snapshot.health.get(uuid)
    return health is not None and health.back_after is None


def _state(snapshot: Snapshot, uuid: str) -> str:
    """How the GPU is, in words."""
    shared = snapshot.inventory.find(uuid)
    if shared is None:
        return "it gives no vGPUs now"
    return f"it is unhealthy: {shared.fault_text}" if shared.faults else "it is healthy"


def drain_list(snapshot: Snapshot, gpu: GpuName) -> str:
    """A command for each pod that holds a vGPU of the GPU. Raises ControlError where unknown."""
    holders = snapshot.holders
    if holders.assignments is None:
        raise ControlError(f"who holds vGPUs of {gpu} is unknown: {holders.error}")
    pods = pods_on(gpu.uuid, holders.assignments)
    head = f"# Pods with vGPUs of {gpu}: {len(pods) or 'none'}"
    if holders.error is not None:
        head += f"\n# This may be old: the kubelet does not answer now: {holders.error}"
    lines = [
        f"# A pod of which only the UID is known: {pod}"
        if namespace == NO_NAMESPACE
        else f"kubectl delete pod -n {shlex.quote(namespace)} {shlex.quote(pod)}"
        for namespace, pod in pods
    ]
    return "\n".join([head, *lines])
