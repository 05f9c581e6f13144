"""The agent's watch over the MPS daemon: vGPUs are healthy only while its limits are in effect.

What a look means is decided by the node.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import anyio
from anyio.abc import TaskStatus

from vgpu_agent.model.node import Node
from vgpu_agent.mps.daemon import Daemon


@dataclass
class MpsGuard:
    """Looks at the daemon again and again, and hands what it finds to the node.

    Every `glance` seconds it looks whether the same daemon is there, and asks it where it was away;
    where all was well it is asked everything every `ask` seconds.
    """

    daemon: Daemon
    node: Node
    clock: Callable[[], float] = time.monotonic
    glance: float = 1.0
    ask: float = 3.0

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Runs until cancelled; started after the first look."""
        self.node.set_daemon(await self.daemon.look())
        task_status.started()
        while True:
            asked, generation = self.clock(), self.daemon.generation()
            while True:
                await anyio.sleep(self.glance)
                mps = self.node.snapshot.mps
                if mps is None or mps.problem or self.clock() - asked >= self.ask:
                    break
                if self.daemon.generation() != generation:
                    break
            self.node.set_daemon(await self.daemon.look())
