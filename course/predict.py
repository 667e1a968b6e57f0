"""`course predict`: the questions of a session note, asked before the lab and settled after it.

The first answer to a question counts. The truth is computed from the reference, and only when the
lab is green. A number that was given with confidence and lies outside the tolerance is asked once
more, in the exit ticket, before its truth is shown.
"""

import ast
import functools
import math
import operator
import re
import sys
import textwrap
from dataclasses import dataclass

from course import notes, progress, status, stubs
from course.labs import Lab
from course.notes import Note, Prediction

SURE = 4
WIDTH = 78
MAX_LENGTH = 60
FORMS = "1e6, 1,000,000, 0.25, 3/8 or 2**20"
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


@dataclass(frozen=True)
class Answer:
    """What a learner says. confidence: 1 (a guess) to 5 (certain)."""

    number: float
    confidence: int

    def __str__(self) -> str:
        return f"{shown(self.number)}, confidence {self.confidence} of 5"


@dataclass(frozen=True)
class Standing:
    """Where a lab's questions stand, by their ids: first answers, and those of the exit ticket."""

    first: dict[str, Answer]
    again: dict[str, Answer]


def predict(lab: Lab, answers: list[str]) -> int:
    """Ask the open questions of a lab; when it is green, show how the answers did.

    answers: each "ID=NUMBER:CONFIDENCE", given without being asked. Returns 0 when no question is
    open, else 1. Raises ValueError for an unknown id, a confidence outside 1 to 5, or no number.
    """
    note = notes.read(lab)
    given = _given(note, answers)
    green = is_green(lab)
    truths = notes.truths(note) if green else {}
    try:
        return _settle(note, given, truths) if green else _collect(note, given)
    except EOFError:
        print("\nStopped here. What you answered is kept; the same command goes on.")
        return 1


def is_green(lab: Lab) -> bool:
    """Say whether a lab's whole suite passes; grades what has changed."""
    # An untouched stub cannot be green, and grading may take the other labs' time.
    return not stubs.is_untouched(lab) and status.grade_all()[lab].state == "green"


def _collect(note: Note, given: dict[str, Answer]) -> int:
    """Take answers before the lab is green; the truth plays no part."""
    name = note.lab.name
    _record_first(note, given, late=False)
    if not given or _can_ask():
        _ask_first(note, late=False)
    first = _standing(note).first
    for prediction in note.predictions:
        if prediction.id in first:
            print(f"  {prediction.id}: you said {first[prediction.id]}")
    if len(first) < len(note.predictions):
        print(f"Open questions are left: course predict {name}")
        return 1
    print("Every question has your answer. The truth is shown when the lab is green without")
    print("--reference:")
    print(f"  course predict {name}")
    return 0


def _settle(note: Note, given: dict[str, Answer], truths: dict[str, float]) -> int:
    """Take late answers, show the truth of what is settled, and go through the exit ticket."""
    before = _standing(note).first
    late = {id: answer for id, answer in given.items() if id not in before}
    repeated = {id: answer for id, answer in given.items() if id in before}
    _record_again(note, repeated, truths)
    _record_first(note, late, late=True)
    asking = _can_ask()
    if len(_standing(note).first) < len(note.predictions) and (asking or not given):
        print(f"{note.lab.name} is green already. You may still answer, but answers that are")
        print("given from now on do not count for mastery.")
        _ask_first(note, late=True)
    standing = _standing(note)
    sure_misses = _sure_misses(note, standing, truths)
    print(f"\n{note.lab.name} is green. Your numbers beside the reference's:")
    for prediction in note.predictions:
        # Without a terminal, an open question stays open and its truth unseen.
        settled = prediction.id in standing.first or asking
        if settled and prediction not in sure_misses:
            _show(prediction, standing, truths[prediction.id])
    print(f"\nExit ticket of {note.lab.name}:")
    print(_wrapped(" ".join(note.exit_ticket.split()), "  "))
    num_open = 0 if asking else len(note.predictions) - len(standing.first)
    for prediction in sure_misses:
        num_open += not _ask_again(note, prediction, standing, truths[prediction.id])
    if num_open:
        print(f"\nOpen questions are left: course predict {note.lab.name}")
    return 1 if num_open else 0


def _sure_misses(note: Note, standing: Standing, truths: dict[str, float]) -> list[Prediction]:
    """List the questions of the exit ticket that have no second answer yet."""

    def is_sure_miss(prediction: Prediction) -> bool:
        answer = standing.first.get(prediction.id)
        if answer is None or answer.confidence < SURE:
            return False
        return not prediction.tolerance.accepts(answer.number, truths[prediction.id])

    waiting = [prediction for prediction in note.predictions if prediction.id not in standing.again]
    return list(filter(is_sure_miss, waiting))


def _record_first(note: Note, given: dict[str, Answer], late: bool) -> None:
    first = _standing(note).first
    for id, answer in given.items():
        if id in first:
            print(f"{id}: your first answer counts: {first[id]}")
        else:
            _append_first(note, id, answer, late)


def _append_first(note: Note, id: str, answer: Answer, late: bool) -> None:
    # `late` tells the tracker which answers were given after green and prove nothing.
    fields = {"answer": answer.number, "confidence": answer.confidence, "late": late}
    progress.append("predict", note.lab, id=id, **fields)


def _record_again(note: Note, given: dict[str, Answer], truths: dict[str, float]) -> None:
    standing = _standing(note)
    waiting = {prediction.id: prediction for prediction in _sure_misses(note, standing, truths)}
    for id, answer in given.items():
        if id in waiting:
            _append_ticket(note, waiting[id], answer, truths[id])
        else:
            print(f"{id}: your first answer counts: {standing.first[id]}")


def _append_ticket(note: Note, prediction: Prediction, answer: Answer, truth: float) -> None:
    right = prediction.tolerance.accepts(answer.number, truth)
    fields = {"answer": answer.number, "confidence": answer.confidence, "right": right}
    progress.append("ticket", note.lab, id=prediction.id, **fields)


def _ask_first(note: Note, late: bool) -> None:
    """Ask the open questions on the terminal; without one, print them and how to answer."""
    first = _standing(note).first
    waiting = [prediction for prediction in note.predictions if prediction.id not in first]
    for prediction in waiting:
        print(f"\n{_question(prediction)}")
        if _can_ask():
            answer = _asked(prediction)
            if answer is not None:
                _append_first(note, prediction.id, answer, late)
    if waiting and not _can_ask():
        _say_how(note, waiting[0])
    print()


def _ask_again(note: Note, prediction: Prediction, standing: Standing, truth: float) -> bool:
    """Ask a question of the exit ticket; returns whether it was answered, and so settled."""
    before = standing.first[prediction.id]
    print(f"\n{_question(prediction)}")
    print(_wrapped(f"You said {before}. What the reference computes lies elsewhere.", "  "))
    print(_wrapped("Which step of your way there would you look at first? Take it again.", "  "))
    if not _can_ask():
        _say_how(note, prediction)
        return False
    answer = _asked(prediction)
    if answer is None:
        return False
    _append_ticket(note, prediction, answer, truth)
    _show(prediction, _standing(note), truth)
    return True


def _show(prediction: Prediction, standing: Standing, truth: float) -> None:
    """Show a settled question: what was said, what is true, and whether it is near enough."""
    print(f"\n{_question(prediction)}")
    first = standing.first.get(prediction.id)
    for title, answers in (("you said", standing.first), ("then", standing.again)):
        if prediction.id in answers:
            answer = answers[prediction.id]
            inside = prediction.tolerance.accepts(answer.number, truth)
            print(f"  {title:<9} {answer}: {'inside' if inside else 'outside'} the tolerance")
    print(f"  {'truth':<9} {shown(truth)} (tolerance: {prediction.tolerance})")
    if first is None or prediction.tolerance.accepts(first.number, truth):
        return
    said, true = shown(first.number), shown(truth)
    belief = f"You were sure of {said} and it is {true}. " if first.confidence >= SURE else ""
    print(_wrapped(f"{belief}Which step of your reasoning gave {said}?", "  "))


def _question(prediction: Prediction) -> str:
    return _wrapped(f"{prediction.id}: {prediction.ask}", "") + f"\n  unit: {prediction.unit}"


def _wrapped(text: str, indent: str) -> str:
    lines = textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent or "  ")
    return "\n".join(lines)


def _say_how(note: Note, prediction: Prediction) -> None:
    print("\nAnswer on a terminal, or like this, with how sure you are from 1 to 5:")
    print(f"  course predict {note.lab.name} --answer {prediction.id}=NUMBER:CONFIDENCE")


def _can_ask() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _asked(prediction: Prediction) -> Answer | None:
    """Ask for a number and a confidence until they can be read; None when it is left empty."""
    read = functools.partial(_read, prediction)
    number = _ask_until("  your number (empty to skip): ", read)
    if number is None:
        return None
    confidence = _ask_until("  how sure, 1 (a guess) to 5 (certain): ", parse_confidence)
    return None if confidence is None else Answer(number, confidence)


def _ask_until(prompt: str, parse):
    while True:
        text = input(prompt).strip()
        if not text:
            return None
        try:
            return parse(text)
        except ValueError as error:
            print(_wrapped(str(error), "  "))


def _given(note: Note, texts: list[str]) -> dict[str, Answer]:
    ids = [prediction.id for prediction in note.predictions]
    given: dict[str, Answer] = {}
    for text in texts:
        found = re.fullmatch(r"([^=]*)=(.*):([^:]*)", text)
        if found is None:
            raise ValueError(f"--answer {text} has not the form ID=NUMBER:CONFIDENCE")
        id, number, confidence = (part.strip() for part in found.groups())
        if id not in ids:
            raise ValueError(f"{note.lab.name} has no question {id!r}; it has {', '.join(ids)}")
        if id in given:
            raise ValueError(f"--answer is given twice for {id}")
        (prediction,) = (found for found in note.predictions if found.id == id)
        given[id] = Answer(_read(prediction, number), parse_confidence(confidence))
    return given


def _read(prediction: Prediction, text: str) -> float:
    """Read an answer to a question, in its unit. Raises ValueError."""
    number = parse_number(text)
    if prediction.unit.startswith("fraction") and not 0 <= number <= 1:
        raise ValueError(f"a fraction lies between 0 and 1, not at {text}; write 0.28 or 28 %")
    return number


def parse_confidence(text: str) -> int:
    """Read a whole number from 1 to 5. Raises ValueError for anything else."""
    if text not in ("1", "2", "3", "4", "5"):
        raise ValueError(f"a confidence is a whole number from 1 to 5, not {text!r}")
    return int(text)


def parse_number(text: str) -> float:
    """Read a number as people write it: 1e6, 1,000,000, 1_000_000, 3/8, 2**20, −4, 12 %.

    Raises ValueError, in a sentence for the learner, for what is none or is not finite.
    """
    plain = text.strip().replace("−", "-").replace("×", "*").replace("·", "*").replace("^", "**")
    plain = re.sub(
        r"(?<![\d.,])\d{1,3}(,\d{3})+(?!\d)", lambda found: found[0].replace(",", ""), plain
    )
    if plain.endswith("%"):
        plain = f"({plain[:-1]})/100"
    try:
        if len(plain) > MAX_LENGTH:
            raise SyntaxError
        number = float(_value(ast.parse(plain.strip(), mode="eval").body))
    except (SyntaxError, TypeError, ValueError):
        raise ValueError(
            f"{text!r} is not a number: write {FORMS}. A guess is welcome; the next question asks "
            "how sure you are"
        ) from None
    except (OverflowError, ZeroDivisionError):
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{text!r} is not a finite number")
    return number


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise SyntaxError


def shown(number: float) -> str:
    """Write a number for a reader: whole ones with commas, others with four digits."""
    if number == int(number) and abs(number) < 1e15:
        return f"{int(number):,}"
    return f"{number:,.0f}" if 1000 <= abs(number) < 1e15 else f"{number:.4g}"


def _standing(note: Note) -> Standing:
    """Read the first answers, and the first ones of the exit ticket, from the log."""
    events, _ = progress.read()
    found: list[dict[str, Answer]] = []
    for kind in ("predict", "ticket"):
        by_id: dict[str, Answer] = {}
        for event in progress.of(events, note.lab, kind):
            by_id.setdefault(event["id"], Answer(event["answer"], event["confidence"]))
        found.append(by_id)
    return Standing(*found)
