"""What the doctor says: checks with a verdict each, as text and as JSON."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import anyio
from anyio import to_thread

from vgpu_agent.commands.paste import command_lines
from vgpu_agent.model.place import Step
from vgpu_agent.observe.report import Check, Verdict


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds that each part may take: the agent is asked, then all else is looked at.

    The driver gets a call at a time, and has to let go in the end; the MPS daemon, files, sockets
    and ports are looked at meanwhile.
    """

    ask: float = 2.0
    call: float = 2.0
    look: float = 5.0
    leave: float = 1.5


TIMEOUTS = Timeouts()

Checking = Callable[[], Check | Iterable[Check]]
"""Does one or more checks; may block, and may raise."""


def worst(checks: Iterable[Check]) -> Verdict:
    """The verdict on all: where it is FAIL, something would stop the agent."""
    found = {check.verdict for check in checks}
    return next((each for each in (Verdict.FAIL, Verdict.WARN) if each in found), Verdict.OK)


def render_text(checks: Sequence[Check]) -> str:
    """The report for people: one line for each check, and below it what to do."""
    width = max((len(check.name) for check in checks), default=0)
    margin = " " * (len("warn") + 2 + width + 2)
    lines: list[str] = []
    given: dict[tuple[str, tuple[Step, ...]], str] = {}
    for check in checks:
        detail = check.detail.replace("\n", "\n" + margin)
        lines.append(f"{check.verdict.value:<4}  {check.name:<{width}}  {detail}")
        if check.advice and check.verdict is not Verdict.OK:
            lines += _advice(check, margin, given)
    counts = [
        f"{sum(check.verdict is verdict for check in checks)} {verdict.value}"
        for verdict in Verdict
    ]
    return "\n".join([*lines, "", ", ".join(counts)]) + "\n"


def _advice(
    check: Check, margin: str, given: dict[tuple[str, tuple[Step, ...]], str]
) -> Iterator[str]:
    """What to do; commands that were `given` before are not said again, but where they were."""
    before = given.setdefault((check.advice, check.steps), check.name)
    if check.steps and before != check.name:
        yield f"{margin}-> as for {before}"
        return
    yield f"{margin}-> {check.advice}"
    yield from command_lines(check.steps, 80, "      ")


def render_json(checks: Sequence[Check]) -> str:
    """The report for programs: the worst verdict, and the checks."""
    report = {"verdict": worst(checks), "checks": [asdict(check) for check in checks]}
    return json.dumps(report, indent=2) + "\n"


# Guards


def unexpected(name: str, error: BaseException) -> Check:
    """A check that could not be done."""
    detail = f"this could not be checked: {type(error).__name__}: {error}"
    return Check(name, Verdict.FAIL, detail, "look at the message; it may be a fault of vgpu-agent")


def late(name: str, seconds: float, advice: str) -> Check:
    """A check whose subject did not answer."""
    return Check(name, Verdict.FAIL, f"no answer within {seconds:g} s", advice)


def guarded(name: str, checking: Checking) -> tuple[Check, ...]:
    """Its checks; where it raises, that is the check's failure, and the others go on."""
    try:
        found = checking()
        return (found,) if isinstance(found, Check) else tuple(found)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is said
        return (unexpected(name, error),)


async def in_thread(name: str, checking: Checking, seconds: float) -> tuple[Check, ...]:
    """The same in a thread, which is left behind where it takes too long."""
    with anyio.move_on_after(seconds):
        return await to_thread.run_sync(partial(guarded, name, checking), abandon_on_cancel=True)
    return (late(name, seconds, "look at the file system or the network behind it"),)
