"""How each fault of GPUs and their driver is made: what the model and the driver are told."""

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from tests.agent_process import REPOSITORY, environment
from tests.fake_nvml import FakeGpu
from tests.faults.model import CONDITIONS, Gpu
from tests.faults.promises import HANG_ADDS, PROMISES
from tests.faults.rig import UUIDS, FaultError, Rig, number_of

Wanted = Callable[[dict[str, str]], bool]
"""Whether a list shows what must be seen before the end."""

XIDS = {
    "xid of an application": (13, 31, 43, 45, 63, 94, 154),
    "xid to prove": (74, 999),
    "xid for a reset": (46, 62, 95),
    "xid for a reboot": (79,),
}
PROBED: dict[str, Callable[[Any, FakeGpu], dict[str, int]]] = {
    "memory errors": lambda _, gpu: {"ecc": (gpu.ecc or 0) + 2},
    "remap failed": lambda _draw, _gpu: {"remap_failed": 1},
    "remap pending": lambda _draw, _gpu: {"remap_pending": 1},
    "recovery action": lambda draw, _: {"action": draw.choice((1, 2, 3, 4))},
}
CLEAN = {"ecc": 0, "remap_failed": 0, "remap_pending": 0, "action": 0}
ERRORS = (999, 18, 9, 4)
MAX_EVENTS = 3500
"""What the fake driver can keep of XIDs for one agent."""


class NotNowError(Exception):
    """This fault cannot be made as things are."""


def all_unhealthy(devices: dict[str, str]) -> bool:
    return "Healthy" not in devices.values()


class GpuFaults(Rig):
    """`make` makes a fault, of the table, by the method of its name."""

    waits_fail = False
    last_xid = 0.0
    detail = ""

    def make(self, name: str) -> Wanted | None:
        """Makes it; what the kubelet must see of it, if it ends by itself. Raises NotNowError."""
        self.detail = ""
        self.begin()
        if name in XIDS:
            return self.xid(name)
        if name in CONDITIONS:
            return self.fall(name)
        if name in PROBED:
            gpu = self.choose(self.spare())
            gpu.change(**PROBED[name](self.random, gpu.facts))
            return self.show(gpu)
        return getattr(self, name.lower().replace(" ", "_").replace("-", "_"))()

    # GPUs

    def choose(self, gpus: list[Gpu]) -> Gpu:
        if not gpus:
            raise NotNowError
        gpu = self.random.choice(gpus)
        self.detail += f" {number_of(gpu.facts.uuid)}"
        return gpu

    def spare(self) -> list[Gpu]:
        """GPUs that may fail: never the last good one, or the agent would end or release NVML."""
        good = self.model.good()
        return good if len(good) > 1 else []

    def there(self, condition: str) -> bool:
        return any(gpu.condition == condition for gpu in self.model.gpus)

    def unless(self, *problems: bool) -> None:
        if any(problems):
            raise NotNowError

    def show(self, _: Gpu | None = None) -> None:
        """Tells the fake driver what the model has."""
        for each in self.model.gpus:
            folder = self.nvml.proc_root / each.facts.bus[4:]
            if each.condition == "not listed" and folder.exists():
                folder.rmdir()
        self.nvml.set_gpus(*(g.facts for g in self.model.gpus if g.condition != "not listed"))

    def xid(self, name: str) -> Wanted | None:
        self.unless(self.waits_fail, self.there("call hangs"))
        gpu, xid = self.choose(self.spare()), self.random.choice(XIDS[name])
        self.detail += f" {xid}"
        self.last_xid = time.monotonic()
        self.nvml.xid(gpu.facts.uuid, xid)
        if name in ("xid for a reset", "xid for a reboot"):
            gpu.waits |= {"xid"}
        first = f"{gpu.facts.uuid}::0"
        return (lambda ids: ids.get(first) == "Unhealthy") if name == "xid to prove" else None

    def xid_of_no_gpu(self) -> Wanted:
        self.unless(self.waits_fail, self.there("call hangs"))
        self.nvml.xid(None, 74)
        return all_unhealthy

    def flood_of_xids(self) -> None:
        self.unless(self.waits_fail, len(self.nvml._events) > MAX_EVENTS)
        uuid = self.choose(self.spare()).facts.uuid
        self.nvml._events += [
            f"event {len(self.nvml._events) + n} {uuid} 31" for n in range(1, 200)
        ]
        self.nvml.xid(uuid, 31)

    def fall(self, condition: str) -> None:
        # Whether NVML can be opened again would be a matter of time.
        either = {"handle fails": "call hangs", "call hangs": "handle fails"}
        self.unless(self.there(either.get(condition, "")))
        gpu = self.choose(self.spare())
        gpu.fall(condition)
        if condition == "call fails":
            gpu.facts = dataclasses.replace(gpu.facts, error=self.random.choice((999, 18, 4)))
        if condition == "not listed":
            self.model.reopened()
        self.show()

    def back(self) -> None:
        # NVML lists the GPUs of its start, and cannot be opened again under a call that hangs.
        hidden = {None, "not listed"} if self.there("call hangs") else {None}
        gpu = self.choose([gpu for gpu in self.model.gpus if gpu.condition not in hidden])
        self.detail += f" {gpu.condition}"
        if gpu.condition == "not listed":
            self.model.reopened()
        gpu.back()
        self.show()

    def recovery_action_over(self) -> None:
        asked = [gpu for gpu in self.model.gpus if gpu.facts.action and gpu.condition is None]
        self.choose(asked).change(action=0)
        self.show()

    def reset(self) -> None:
        gpu = self.choose([gpu for gpu in self.model.gpus if gpu.waits and not gpu.condition])
        self.wait_after_xid()
        self.begin()
        gpu.initialized(epoch=gpu.facts.epoch + 1, **CLEAN)
        self.show()

    def wait_after_xid(self) -> None:
        """Nobody resets a GPU in the moment of its XID; what is newer than a reset stays."""
        time.sleep(max(0.0, self.last_xid + 2 - time.monotonic()))

    def event_waits_fail(self) -> None:
        self.waits_fail = not self.waits_fail
        self.nvml.wait_error(999 if self.waits_fail else None)

    def command(self, *options: str) -> None:
        subprocess.run(
            [sys.executable, "-m", "vgpu_agent", "release", *options],
            env=environment(VGPU_STATE_DIRECTORY=str(self.directory / "state")),
            cwd=REPOSITORY,
            check=True,
            capture_output=True,
            timeout=30,
        )
        self.begin()

    def release(self) -> None:
        self.unless(self.there("call hangs"))  # it is refused
        self.command("--for", "1")
        self.model.reopened()
        time.sleep(1)

    def reset_done(self) -> None:
        self.unless(any(gpu.condition for gpu in self.model.gpus))
        for gpu in self.model.gpus:
            if gpu.waits:
                gpu.initialized()
        self.command("--reset-done")

    def driver_fails(self) -> None:
        code = self.random.choice(ERRORS)
        self.detail += f" {code}"
        self.nvml.init_error(code)
        for uuid in UUIDS:
            self.nvml.update(uuid, error=code)

    def driver_repaired(self) -> None:
        self.nvml.init_error(None)
        self.model.reopened()
        self.show()

    def driver_blinks(self) -> None:
        self.driver_fails()
        self.wait_list(all_unhealthy, "driver blinks", PROMISES["lost"].seconds + HANG_ADDS)
        self.driver_repaired()
        self.begin()

    def driver_gone(self) -> None:
        self.driver_fails()
        self.wait(
            lambda: None if self.ended() else "the agent goes on",
            "driver gone",
            PROMISES["driver gone"].seconds,
        )
        if self.agent.process.returncode != 1:
            raise FaultError(f"driver gone: {self.ended()}")
        self.driver_repaired()
        self.start_agent()
        self.begin()
