"""One look after the other at the containers that hold vGPUs, and their limits by the driver.

Where it is asked for, limits that are missing or wrong are set.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace

import anyio

from vgpu_agent.gpu.driver import GpuDriver
from vgpu_agent.limits.tree import Finder, Held, Tree
from vgpu_agent.model.devices import by_gpu
from vgpu_agent.model.limits import (
    GRACE,
    Limited,
    LimitsLook,
    MemoryLimit,
    Shares,
    differs,
    in_effect,
    wanted,
)
from vgpu_agent.threads import in_thread

log = logging.getLogger(__name__)

SILENT = 10.0
"""Seconds for which a GPU that did not answer is not asked again, and which limits may be set."""

KNOWN = 60.0
"""Seconds for which the containers are taken for the same where nothing says otherwise."""

_NO_ANSWER = "NVML does not answer for its GPU now"

Answers = dict[str, MemoryLimit | str]
"""What the driver has for cgroups on one GPU, by path, or its word for why it says nothing."""


@dataclass
class Looker:
    """Looks at the containers that hold vGPUs, by the driver's handles.

    `enforce`: limits are set. `guarantee`: a container's memory is also kept for it.
    """

    driver: GpuDriver
    finder: Finder
    guarantee: bool = False
    enforce: bool = False
    unsure: bool = False  # the last look found an error that may be gone at any moment
    clock: Callable[[], float] = time.monotonic
    _known: tuple[float, Tree] | None = None
    _wrong: dict[tuple[str, str], float] = field(default_factory=dict)
    _peaks: dict[tuple[str, str], int] = field(default_factory=dict)
    _kept: dict[str, Held] = field(default_factory=dict)
    _silent: dict[str, float] = field(default_factory=dict)
    _set: set[str] = field(default_factory=set)
    _applied: bool = False
    _limiter: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(1))

    @property
    def pending(self) -> bool:
        """Whether some limit was not in effect and that is not yet old, or a GPU is to be asked."""
        now = self.clock()
        late = any(now - since < 2 * GRACE for since in self._wrong.values())
        return late or any(now >= until for until in self._silent.values())

    async def look(self, shares: Shares, *, afresh: bool = True) -> LimitsLook:
        """What is so now, after all corrections. Raises nothing but for bugs.

        Unless `afresh`, containers are those of the last look, for a while.

        Without `enforce` it is not told of single containers where none can have a limit.
        """
        tree = await self._tree(afresh=afresh or self.pending)
        if tree.problem is not None:
            self._wrong.clear()
            self._silent.clear()
            self.unsure = tree.passing
            return LimitsLook(error=tree.problem, enforced=self.enforce)
        limits = {each.leaf.path: self._wanted(each, shares) for each in tree.held}
        answers: dict[str, Answers] = {}

        async def ask(uuid: str) -> None:
            answers[uuid] = {} if self._is_silent(uuid) else await self._of_gpu(uuid, tree, limits)
            if answers[uuid]:
                self._silent.pop(uuid, None)
            elif not self._is_silent(uuid):  # it may hang: the others do not wait for it again
                self._silent[uuid] = self.clock() + SILENT

        async with anyio.create_task_group() as tasks:
            for uuid in shares:
                tasks.start_soon(ask, uuid)
        gpus = {
            uuid: next((str(of[path]) for path in tree.scratch if path in of), _NO_ANSWER)
            for uuid, of in answers.items()
            if not any(isinstance(each, MemoryLimit) for each in of.values())
        }
        if not afresh and set(gpus.values()) - {_NO_ANSWER}:  # what was asked about may have ended
            return await self.look(shares)
        alike = set(gpus.values()) if gpus.keys() == shares.keys() else set()
        self.unsure = alike == {_NO_ANSWER}
        found = [(held, self._limited(held, limits[held.leaf.path], answers)) for held in tree.held]
        wrong = [held.leaf for held, each in found if each.problem is not None]
        ended = await in_thread(self.finder.ended, wrong, limiter=self._limiter)
        containers = [each for held, each in found if held.leaf.path not in ended]
        self._forget(tree, shares)
        late = any(each.problem is not None and each.limits for each in containers)
        applied = self.enforce or self._applied or not late
        if self.enforce or (tree.hook is None and applied):
            containers += tree.lost
        else:  # that is of the node, and of none of its containers
            containers = [replace(each, problem=None) for each in containers]
        return LimitsLook(
            error=alike.pop() if len(alike) == 1 else None,
            gpus=gpus,
            hook=tree.hook,
            enforced=self.enforce,
            applied=applied,
            containers=tuple(containers),
        )

    async def _tree(self, *, afresh: bool) -> Tree:
        if self._known is not None and not (afresh or self.finder.enable or self.finder.living):
            until, tree = self._known
            if self.clock() < until and tree.problem is None:
                return tree
        tree = await in_thread(self.finder.find, limiter=self._limiter)
        self._known = self.clock() + KNOWN, tree
        return tree

    def _wanted(self, held: Held, shares: Shares) -> dict[str, int]:
        """The hook knows one limit for all GPUs: the smallest, which takes all of them to know."""
        found = wanted(held.recorded.device_ids, shares)
        if self.enforce:
            return found
        known = len(found) == len(by_gpu(held.recorded.device_ids))
        return dict.fromkeys(found, min(found.values())) if found and known else {}

    async def end_guarantees(self) -> None:
        """What was kept for containers that have ended is kept no longer.

        A cgroup that is removed before leaves what was kept for it with its parents, for good.
        """
        if not self._kept:
            return
        leaves = [held.leaf for held in self._kept.values()]
        for path in await in_thread(self.finder.ended, leaves, limiter=self._limiter):
            held = self._kept.pop(path)
            for uuid in by_gpu(held.recorded.device_ids):
                word = await self._end_guarantee(uuid, path)
                if word is not None:
                    log.warning(
                        "a container ended and the memory that the driver kept for it stays kept,"
                        " until the node is rebooted: %s",
                        word,
                        extra={"fields": {**asdict(held.holder), "uuid": uuid}},
                    )

    async def _end_guarantee(self, uuid: str, path: str) -> str | None:
        """Why it could not be ended."""
        if self._is_silent(uuid):
            return _NO_ANSWER
        found = (await self.driver.memory_limits(uuid, [path])).get(path)
        if found is None:
            self._silent[uuid] = self.clock() + SILENT
            return _NO_ANSWER
        if isinstance(found, str) or not found.soft_bytes:
            return found if isinstance(found, str) else None
        return await self.driver.limit_memory(uuid, path, found.hard_bytes, 0)

    def _is_silent(self, uuid: str) -> bool:
        return self.clock() < self._silent.get(uuid, float("-inf"))

    # On one GPU

    async def _of_gpu(
        self, uuid: str, tree: Tree, limits: Mapping[str, Mapping[str, int]]
    ) -> Answers:
        """What the driver has for all cgroups that are to have a limit there, and for `scratch`.

        A GPU that hangs holds up nothing for long: the rest is set at the next look.
        """
        held = [each for each in tree.held if uuid in limits[each.leaf.path]]
        paths = [*tree.scratch, *(each.leaf.path for each in held)]
        found = dict(await self.driver.memory_limits(uuid, list(dict.fromkeys(paths))))
        again, until = [], self.clock() + SILENT
        for each in held if self.enforce else ():
            if self.clock() >= until:
                break
            path, hard = each.leaf.path, limits[each.leaf.path][uuid]
            has, soft = found.get(path), self._soft(hard)
            if each.lacks or not isinstance(has, MemoryLimit) or in_effect(has, hard, soft):
                continue
            refused = await self.driver.limit_memory(uuid, path, hard, soft)
            if refused is not None:
                found[path] = refused
                continue
            again.append(path)
            if path not in self._set:
                self._set.add(path)
                fields = asdict(each.holder)
                log.info("memory limits of a container are set", extra={"fields": fields})
        if again:
            found |= await self.driver.memory_limits(uuid, again)
        return found

    def _soft(self, hard: int) -> int:
        return hard if self.guarantee else 0

    # What it comes to

    def _limited(
        self, held: Held, limits: Mapping[str, int], answers: Mapping[str, Answers]
    ) -> Limited:
        has: dict[str, MemoryLimit] = {}
        problem, path, now = None, held.leaf.path, self.clock()
        for uuid, hard in limits.items():
            found, key = answers[uuid].get(path), (path, uuid)
            if isinstance(found, MemoryLimit):
                has[uuid] = found
                self._peaks[key] = max(self._peaks.get(key, 0), found.used_bytes)
                if held.lacks is None and in_effect(found, hard, self._soft(hard)):
                    self._wrong.pop(key, None)
                    self._applied = True
                    continue
            elif found is None and key in self._peaks and key not in self._wrong:
                continue  # the limit that was in effect is the driver's, and stays
            if now - self._wrong.setdefault(key, now) >= GRACE:
                if isinstance(found, MemoryLimit):
                    found = differs(found, hard, self._soft(hard), enforced=self.enforce)
                problem = held.lacks or found or _NO_ANSWER
        if self.enforce and any(found.soft_bytes for found in has.values()):
            self._kept[path] = held
        peaks = {uuid: self._peaks[path, uuid] for uuid in has}
        return Limited(held.holder, has, peaks, problem)

    def _forget(self, tree: Tree, shares: Shares) -> None:
        """What was remembered of containers and GPUs that are no longer there."""
        paths = {each.leaf.path for each in tree.held}
        self._set &= paths
        self._peaks = {key: peak for key, peak in self._peaks.items() if key[0] in paths}
        self._wrong = {key: since for key, since in self._wrong.items() if key[0] in paths}
        self._silent = {uuid: until for uuid, until in self._silent.items() if uuid in shares}
