"""`course trace`: say in words and numbers what happened in the steps of an engine."""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

STAGES = ("schedule_s", "execute_s", "update_s")


def summary(file: Path) -> str:
    """Sum up a trace, which `course serve --trace` wrote; its fields: sessions/week3/trace.md.

    Raises ValueError when the file cannot be read as one.
    """
    steps = _read(file)
    if not steps:
        return f"{file}: no steps"
    last = steps[-1]
    seconds = last["time"] + sum(last[stage] for stage in STAGES) - steps[0]["time"]
    parts = [part for step in steps for part in step["parts"]]
    num_decoded = sum(
        part["num_tokens"] - part["num_drafts"] == 1 and part["catches_up"] for part in parts
    )
    num_drafts = sum(part["num_drafts"] for part in parts)
    num_accepted = sum(step["num_accepted"] for step in steps)
    num_computed = sum(part["num_tokens"] for part in parts)
    reasons = Counter(reason for step in steps for reason in step["finished"].values())
    ended = ", ".join(f"{count} by {reason}" for reason, count in reasons.most_common()) or "none"
    preempted = sum(len(step["preempted"]) for step in steps)
    cached, prompted = last["num_cached_tokens"], last["num_prompt_tokens"]
    lines = [
        f"{len(steps):,} steps in {seconds:.1f} s",
        f"requests: {len({part['request_id'] for part in parts}):,} took part; ended: {ended}",
        f"tokens: {num_computed:,} computed, {num_decoded:,} of them one at a time",
        f"prompts: {prompted:,} tokens, {cached:,} of them found in the pool"
        f" ({cached / max(prompted, 1):.0%})",
        f"lost their blocks: {preempted:,} times",
        f"guesses: {num_drafts:,}, {num_accepted:,} of them accepted",
        *_queues(steps),
        *_times(steps),
    ]
    return "\n".join(lines)


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    steps = []
    for number, line in enumerate(lines, 1):
        try:
            step = json.loads(line)
            complete = all(name in step for name in (*STAGES, "parts", "num_accepted", "finished"))
        except (ValueError, TypeError):
            complete = False
        if complete:
            steps.append(step)
        elif number < len(lines):  # the last line may have been cut off with the server
            raise ValueError(f"{file}, line {number}: this is no step of a trace")
    return steps


def _queues(steps: Sequence[dict[str, Any]]) -> list[str]:
    def row(what: str, number: Callable[[dict[str, Any]], float]) -> str:
        values = [number(step) for step in steps]
        return f"{what}: {statistics.mean(values):,.1f} on average, {max(values):,} at most"

    return [
        row("running", lambda step: step["num_running"]),
        row("waiting", lambda step: step["num_waiting"]),
        row("tokens a step", lambda step: sum(part["num_tokens"] for part in step["parts"])),
        f"free blocks: {min(step['num_free_blocks'] for step in steps):,} at least",
    ]


def _times(steps: Sequence[dict[str, Any]]) -> list[str]:
    whole = sum(step[stage] for step in steps for stage in STAGES)
    lines = []
    for stage in STAGES:
        values = sorted(step[stage] * 1e3 for step in steps)
        slow = values[min(len(values) - 1, int(0.99 * len(values)))]
        share = sum(values) / 1e3 / whole if whole else 0.0
        name = stage.removesuffix("_s")
        middle = statistics.median(values)
        lines.append(f"{name}: {middle:.2f} ms in the middle, {slow:.2f} ms at p99, {share:.1%}")
    return lines
