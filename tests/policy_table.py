"""The table of docs/health.md: the whole policy."""

from vgpu_agent.model.devices import Effect
from vgpu_agent.model.policy import Fact


def markdown_table() -> str:
    """The policy as the table of docs/health.md."""
    reset = "when the driver takes its recovery action back, or after a reset"
    ends = {
        Effect.NOTE: "nothing to end",
        Effect.COUNT: "nothing to end",
        Effect.UNTIL_BACK: "at once when it is back",
        Effect.UNTIL_UNCORDONED: "by `vgpu-agent uncordon GPU`, not by a restart or a reboot",
        Effect.UNTIL_GOOD: "after `VGPU_RECOVERY_SECONDS` of passed probes",
        Effect.UNTIL_RESET: reset,
        Effect.UNTIL_REBOOT: f"{reset}, such as a reboot is",
    }
    rows = [
        "| fault | how it is found | what happens | how it ends | reason shown | what to do |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for rule in (fact.value for fact in Fact):
        marked = rule.reason is not None
        rows.append(
            f"| {rule.what} | {rule.found_by}"
            f" | {'all vGPUs of the GPU ' + rule.effect if marked else rule.effect}"
            f" | {ends[rule.effect]} | {f'`{rule.reason}`' if marked else '-'}"
            f" | {rule.remedy.words} |"
        )
    return "\n".join(rows)
