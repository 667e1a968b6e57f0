"""What happened in the learner's clone: one JSON line for every graded run, hint and prediction.

The log is the only thing kept; the tracker and the reports are derived from it and from a fresh
grade. Fields of every event: `time` (UTC, ISO 8601), `kind`, `lab`. Kinds and their own fields:

run      passed, total: tests. hash: of the learner's file. seconds: in tests. hints: seen so
         far. at: the name of what the first failure speaks of.
predict  id, answer, confidence: 1 to 5. late: given after the lab was green.
hint     name: of the function or class. rung: counted from 1.
reveal   delegated: whether the lab was not green.
ticket   id: of a prediction asked again in the exit ticket. answer, confidence, right.
bench    ratio: to the reference. medal: "gold", "silver", "bronze" or "".
"""

import hashlib
import json
import math
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from course import bootstrap
from course.labs import ROOT, Lab

LOG = ROOT / "progress" / "log"
MAX_SHOWN = 100
_LOCK = ROOT / ".course" / "progress.lock"
_NUMBER = (int, float)
_FIELDS = {
    "run": {
        **{"passed": int, "total": int, "hash": str, "seconds": _NUMBER, "hints": int},
        "at": str,
    },
    "predict": {"id": str, "answer": _NUMBER, "confidence": int},
    "hint": {"name": str, "rung": int},
    "reveal": {"delegated": bool},
    "ticket": {"id": str, "right": bool},
    "bench": {"ratio": _NUMBER, "medal": str},
}


def append(kind: str, lab: Lab, **fields: object) -> None:
    """Add one event to this month's file; safe while other processes do the same."""
    now = datetime.now(UTC)
    event = {"time": now.isoformat(timespec="seconds"), "kind": kind, "lab": lab.name, **fields}
    LOG.mkdir(parents=True, exist_ok=True)
    file = LOG / f"{now:%Y-%m}.jsonl"
    with bootstrap.locked(_LOCK, "waiting for another course command"):
        # A line that was cut off, by a full disk or an editor, must not swallow this one.
        before = file.read_bytes() if file.is_file() else b""
        gap = "\n" if before and not before.endswith(b"\n") else ""
        with open(file, "a", encoding="utf-8") as log:
            log.write(f"{gap}{json.dumps(event, ensure_ascii=False)}\n")


def append_run(lab: Lab, passed: int, total: int, seconds: float, at: str) -> None:
    """Note a graded run of the lab as its file is now."""
    digest = hashlib.sha256(lab.code.read_bytes()).hexdigest()[:16]
    hints = len(of(read()[0], lab, "hint"))
    fields = {"passed": passed, "total": total, "hash": digest, "seconds": seconds}
    append("run", lab, **fields, hints=hints, at=at)


def read() -> tuple[list[dict], list[str]]:
    """Return (events in the order of their times, one sentence for every line that is unusable).

    A file that cannot be read, or has no usable line at all, gets one sentence.
    """
    events, problems = [], []
    for file in sorted(LOG.glob("*.jsonl")):
        found, bad = _read_file(file)
        events += found
        problems += bad
    return sorted(events, key=lambda event: event["time"]), problems


def _read_file(file: Path) -> tuple[list[dict], list[str]]:
    shown = file.relative_to(ROOT).as_posix()
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        return [], [f"{shown} is left out: {error.strerror}"]
    events, problems = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            events.append(_checked(json.loads(line)))
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            problems.append(f"{shown}, line {number} is left out: {_shortened(str(error))}")
    if len(problems) > 1 and not events:
        problems = [f"{shown} is left out: none of its {len(problems)} lines is an event"]
    return events, problems


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def _checked(event: object) -> dict:
    if not isinstance(event, dict):
        raise TypeError("it is no JSON object")
    if event.get("kind") not in list(_FIELDS):  # a list, for a kind that cannot be hashed
        raise ValueError(f"kind {event.get('kind')!r} is not one of {', '.join(_FIELDS)}")
    for name, types in {"time": str, "lab": str, **_FIELDS[event["kind"]]}.items():
        value = event.get(name)
        # True is an int to Python; JSON of Python's knows NaN and Infinity.
        is_other = isinstance(value, bool) and types is not bool
        if is_other or not isinstance(value, types):
            raise TypeError(f"{name} is {value!r}")
        if types is _NUMBER and not math.isfinite(value):
            raise ValueError(f"{name} is {value!r}")
    if event["kind"] == "run" and not 0 <= event["passed"] <= event["total"]:
        raise ValueError(f"{event['passed']} of {event['total']} tests is impossible")
    if event["kind"] == "predict" and not 1 <= event["confidence"] <= 5:
        raise ValueError(f"confidence is {event['confidence']}, not 1 to 5")
    time = datetime.fromisoformat(event["time"])
    if time.tzinfo is None:
        raise ValueError(f"time {event['time']!r} has no time zone")
    return {**event, "time": time.astimezone(UTC).isoformat(timespec="seconds")}


def of(events: Iterable[dict], lab: Lab, kind: str) -> list[dict]:
    """Pick a lab's events of one kind."""
    return [event for event in events if (event["lab"], event["kind"]) == (lab.name, kind)]
