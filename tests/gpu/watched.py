"""A watch over a driver, with clocks that are set by hand and the log lines that it makes."""

import anyio

from vgpu_agent.gpu.driver import GpuDriver
from vgpu_agent.gpu.watch import GpuWatch, Intervals
from vgpu_agent.model.health import Moment
from vgpu_agent.model.node import Node
from vgpu_agent.model.rules import HealthRules, SharingRules
from vgpu_agent.model.snapshot import Rules, Snapshot
from vgpu_agent.observe.changes import LogLine, changes

WALL = 1_700_000_000.0


class Watched:
    """`now` is the monotonic time; people's clock is `WALL` ahead, plus what `jumped`."""

    def __init__(
        self,
        driver: GpuDriver,
        *,
        sharing: SharingRules | None = None,
        health: HealthRules | None = None,
        cdi_names=None,
        **intervals: float,
    ) -> None:
        self.now, self.jumped = 0.0, 0.0
        self.lines: list[LogLine] = []
        self.published: list[tuple[Snapshot, Snapshot]] = []
        self.rules = Rules(sharing or SharingRules(mps=False), health or HealthRules())
        self.node = Node(
            self.rules,
            clock=lambda: Moment(self.now, self.wall),
            published=self._published,
        )
        self.driver = driver
        self.watch = GpuWatch(
            driver,
            self.node,
            cdi_names,
            Intervals(**{"event_pause": 0.01, **intervals}),
            clock=lambda: self.now,
            wall_clock=lambda: self.wall,
        )

    def _published(self, before: Snapshot, after: Snapshot) -> None:
        self.published.append((before, after))
        self.lines += changes(before, after, self.rules)

    @property
    def wall(self) -> float:
        return WALL + self.jumped + self.now

    @property
    def snapshot(self) -> Snapshot:
        return self.node.snapshot

    @property
    def healthy(self) -> list[int]:
        """The indices of the healthy GPUs."""
        return [shared.gpu.index for shared in self.snapshot.inventory.gpus if shared.healthy]

    def reasons(self, uuid: str) -> str:
        shared = self.snapshot.inventory.find(uuid)
        assert shared is not None
        return " ".join(fault.reason for fault in shared.faults)

    def logged(self) -> list[str]:
        """What was logged since the last call: level and message."""
        names = {20: "INFO", 30: "WARNING", 40: "ERROR"}
        said = [f"{names[line.level]} {line.message}" for line in self.lines]
        self.lines.clear()
        return said

    async def look(self, after: float = 0.0) -> None:
        self.now += after
        await self.watch.look()

    async def prove(self, seconds: float) -> None:
        """Looks for so long, as often as the settings say."""
        for _ in range(int(seconds / 5)):
            await self.look(after=5)

    async def xid(self, uuid: str | None, xid: int) -> None:
        """The driver reports it, and its task takes it."""
        self.driver.xid(uuid, xid)
        await self.watch.take_events()

    async def until(self, holds, within: float = 5.0) -> None:
        with anyio.fail_after(within):
            async for _ in self.node.latest.follow():
                if holds():
                    return
