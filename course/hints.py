"""`course hint` and `course reveal`: a ladder that is climbed by attempts, and what is on top."""

import difflib
import shutil
import textwrap
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from course import notes, progress, stubs
from course.labs import ROOT, Lab
from course.notes import Hint, Note
from course.predict import is_green

WIDTH = 78
NUM_ATTEMPTS = 3
CONTEXT = 3


def hint(lab: Lab, name: str | None) -> int:
    """Show the next hint of a lab, or of one name that the learner writes.

    Rungs are counted for each name. Without a name, it is the one that the latest graded run
    stumbled over, else the first in the note's order that has an unseen hint. Until the lab is
    graded again, the same hint is shown, without a name the lab's latest one. Returns 1 when every
    hint has been seen. Raises ValueError for a name that the lab does not grade.
    """
    note = notes.read(lab)
    graded = stubs.graded_names(lab)
    if name is not None and name not in graded:
        name = _owner(note, name) or name
    if name is not None and name not in graded:
        raise ValueError(f"{lab.name} grades no {name!r}; it grades {', '.join(graded)}")
    events, _ = progress.read()
    events = [event for event in events if event["lab"] == lab.name]
    untried = _untried(note, events, name)
    if untried is not None:
        _show(untried)
        print(_wrapped(f"Try it first: a new hint needs a graded run (pytest {lab.path})"))
        return 0
    found = _next(note, events, name)
    if found is None:
        of_what = f"{name} in {lab.name}" if name else lab.name
        print(f"There is no further hint for {of_what}. Two ways lead on:")
        print(f"  the Traps of {_relative(lab.note)}: they start from what you see")
        print(f"  course reveal {lab.name}: your file beside the reference")
        return 1
    chosen, rung = found
    progress.append("hint", lab, name=chosen.name, rung=rung)
    _show(chosen)
    print(f"When you have an answer, grade it: pytest {lab.path}")
    return 0


def _owner(note: Note, word: str) -> str | None:
    """Find the class whose hints speak of a method in their titles."""
    return next((hint.name for hint in note.hints if word in hint.title.split()), None)


def _untried(note: Note, events: list[dict], name: str | None) -> Hint | None:
    """Return the latest hint that no graded run has followed; None where one has."""
    rungs = _rungs(note)
    for event in reversed(events):
        if event["kind"] == "run":
            return None
        if event["kind"] == "hint" and name in (None, event["name"]):
            # The note may have lost a hint since the log was written.
            return rungs.get((event["name"], event["rung"]))
    return None


def _next(note: Note, events: list[dict], name: str | None) -> tuple[Hint, int] | None:
    """Find the first unseen hint and its rung."""
    seen = {(event["name"], event["rung"]) for event in events if event["kind"] == "hint"}
    # Hints of a name that stand apart in the note still belong together.
    order = list(dict.fromkeys(hint.name for hint in note.hints))
    runs = [event for event in events if event["kind"] == "run"]
    order.sort(key=lambda owner: not runs or owner != runs[-1]["at"])
    rungs = sorted(_rungs(note).items(), key=lambda item: order.index(item[0][0]))
    for (owner, rung), found in rungs:
        if name in (None, owner) and (owner, rung) not in seen:
            return found, rung
    return None


def _rungs(note: Note) -> dict[tuple[str, int], Hint]:
    """Number the hints of each name from 1."""
    rungs: dict[tuple[str, int], Hint] = {}
    for found in note.hints:
        rungs[found.name, 1 + sum(name == found.name for name, _ in rungs)] = found
    return rungs


def _show(found: Hint) -> None:
    # Neither a number nor a count: how much help is left is no reason to take it.
    print(f"Hint: {found.title}\n")
    print(f"{_wrapped(found.text)}\n")


def _wrapped(text: str) -> str:
    """Wrap the paragraphs of a note's text; blocks of code stay as they are."""
    parts = text.split("\n\n")
    return "\n\n".join(part if "```" in part else textwrap.fill(part, WIDTH) for part in parts)


def reveal(lab: Lab, give_up: bool) -> int:
    """Show the learner's file beside the reference, then ask the note's transfer question.

    Open when the lab is green; or with give_up, after NUM_ATTEMPTS graded runs of different files
    that were not. Returns 1 while it is closed.
    """
    note = notes.read(lab)
    green = is_green(lab)
    missing = "" if green else _missing(lab, give_up)
    if missing:
        print(textwrap.fill(missing, WIDTH, break_on_hyphens=False))
        return 1
    # Recorded first: who closes the terminal half-way has seen it all the same.
    progress.append("reveal", lab, delegated=not green)
    if not green:
        print(_what_delegated_means(lab))
    print(_side_by_side(lab, max(80, shutil.get_terminal_size((100, 24)).columns)))
    print("\nNow a changed case, to answer without looking:")
    print(_wrapped(note.transfer))
    return 0


def _missing(lab: Lab, give_up: bool) -> str:
    if not give_up:
        return (
            f"{lab.name} is not green yet, so the reference stays closed: `course hint {lab.name}` "
            f"has a question for you, and after {NUM_ATTEMPTS} graded attempts `course reveal "
            f"{lab.name} --give-up` opens it."
        )
    events, _ = progress.read()
    runs = progress.of(events, lab, "run")
    count = len({run["hash"] for run in runs if run["passed"] < run["total"]})
    if count >= NUM_ATTEMPTS:
        return ""
    return (
        f"The reference opens after {NUM_ATTEMPTS} graded attempts that differ, and {lab.name} has "
        f"{count}: change something and run pytest {lab.path}."
    )


def _what_delegated_means(lab: Lab) -> str:
    text = (
        f"The tracker marks {lab.name} as delegated from now on, because you see the reference "
        "before the lab is green. The mark stays in your log; it says which lab to come back to. "
        "To make the lab your own all the same: close this, put the stub back with `course reset "
        f"{lab.name}`, and write it from memory until it is green."
    )
    return textwrap.fill(text, WIDTH, break_on_hyphens=False) + "\n"


def _side_by_side(lab: Lab, width: int) -> str:
    """Draw what differs between the learner's file, on the left, and the reference."""
    mine, reference = _lines(lab.code), _lines(lab.solution)
    if mine == reference:
        return f"{_relative(lab.code)} and the reference are the same, line for line."
    half = (width - 3) // 2
    rows = list(_cells(_relative(lab.code), _relative(lab.solution), " ", half))
    rows.append("─" * (2 * half + 3))
    matcher = difflib.SequenceMatcher(None, mine, reference, autojunk=False)
    for group in matcher.get_grouped_opcodes(CONTEXT):
        rows += _cells(f"line {group[0][1] + 1}", f"line {group[0][3] + 1}", " ", half)
        for tag, start, end, other_start, other_end in group:
            pairs = zip_longest(mine[start:end], reference[other_start:other_end])
            for left, right in pairs:
                rows += _cells(left, right, _mark(tag, left, right), half)
        rows.append("─" * (2 * half + 3))
    return "\n".join(row.rstrip() for row in rows)


def _lines(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return [line.expandtabs(4).rstrip() for line in text.splitlines()]


def _mark(tag: str, left: str | None, right: str | None) -> str:
    if tag == "equal":
        return " "
    return ">" if left is None else "<" if right is None else "|"


def _cells(left: str | None, right: str | None, mark: str, half: int) -> Iterator[str]:
    """Yield the rows of one pair of lines, as many as the longer one needs."""
    columns = [_pieces(text or "", half) for text in (left, right)]
    for one, other in zip_longest(*columns, fillvalue="") if any(columns) else [("", "")]:
        yield f"{one:<{half}} {mark} {other}"


def _pieces(line: str, width: int) -> list[str]:
    """Wrap a line of code so that what follows stands further in than its beginning."""
    indent = " " * min(len(line) - len(line.lstrip()), width // 2)
    return textwrap.wrap(
        line.strip(),
        width,
        initial_indent=indent,
        subsequent_indent=indent + "    ",
        break_on_hyphens=False,
    )


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()
