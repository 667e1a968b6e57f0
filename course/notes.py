"""What a session note holds for the tools: predictions, hints, the transfer case, the exit ticket.

A note is YAML front matter between two lines of three dashes, then sections that begin with `## `.
The answers to its predictions stand in tests/WEEK/answers.toml, where nobody reads them by chance.
Hints are blocks that a reader opens, `<details><summary>Hint 1: NAME …</summary>`, where NAME is
what the learner writes.
"""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass

import yaml

from course.labs import ROOT, Lab
from course.stubs import graded_names

# Of a lab; a drill asks one to so many.
NUM_PREDICTIONS = 3
_FIELDS = ("id", "ask", "unit", "tolerance")
_FRONT_MATTER = re.compile(r"---\n(.*?\n)---\n", re.DOTALL)
_HINT = re.compile(
    r"<details><summary>Hint \d+: (?P<title>(?P<name>\w+)[^<\n]*)</summary>"
    r"(?P<text>(?:(?!<details>).)*?)</details>",
    re.DOTALL,
)
_TRANSFER = re.compile(r"^\d+\. Transfer: (.+(?:\n(?!\d+\. |\s*\n).+)*)", re.MULTILINE)

# Runs in a process of its own, in which `weekN` is the reference's and nobody else's.
_ANSWERING = """
import importlib, json, math, sys
import torch
module, answers = json.load(sys.stdin)
public = {k: v for k, v in vars(importlib.import_module(module)).items() if k[0] != "_"}
results = []
for answer in answers:
    try:
        value = float(eval(answer, {"math": math, "torch": torch, **public}))
        results.append([value, "" if math.isfinite(value) else f"it is {value}"])
    except Exception as error:
        results.append([0.0, f"{type(error).__name__}: {error}"])
print(json.dumps(results))
"""


@dataclass(frozen=True)
class Tolerance:
    """How far a number may lie from the truth.

    kind: "factor" (either way), "share" (of the truth) or "distance". size: 10 for ten times, 0.05
    for 5 %, or the largest distance.
    """

    kind: str
    size: float

    def accepts(self, number: float, truth: float) -> bool:
        """Say whether a number is inside."""
        # A number exactly on the border must not fall to a rounding of the arithmetic here.
        size = self.size * (1 + 1e-9)
        if self.kind == "factor":
            low, high = sorted((truth / size, truth * size))
            return low <= number <= high
        return abs(number - truth) <= (size * abs(truth) if self.kind == "share" else size)

    def __str__(self) -> str:
        if self.kind == "factor":
            return f"a factor of {self.size:g} either way"
        if self.kind == "share":
            return f"{self.size * 100:g} % either way"
        return f"{self.size:g} either way" if self.size else "none"


@dataclass(frozen=True)
class Prediction:
    """One question with a number for an answer.

    answer: a Python expression over the public names of the lab's reference, torch and math.
    """

    id: str
    ask: str
    unit: str
    answer: str
    tolerance: Tolerance


@dataclass(frozen=True)
class Hint:
    """One rung. title: what stands behind "Hint N: ". name: of what the learner writes."""

    title: str
    name: str
    text: str


@dataclass(frozen=True)
class Note:
    """What the tools need of one session note. transfer: the changed case of Check yourself."""

    lab: Lab
    predictions: tuple[Prediction, ...]
    hints: tuple[Hint, ...]
    transfer: str
    exit_ticket: str


def read(lab: Lab) -> Note:
    """Read a lab's session note.

    Raises ValueError, which names the file and the place in it, when it is missing or malformed.
    """
    shown = lab.note.relative_to(ROOT).as_posix()
    if not lab.note.is_file():
        raise ValueError(f"{shown} does not exist")
    answers = _answers(lab)
    try:
        text = lab.note.read_text(encoding="utf-8")
        return Note(
            lab,
            _predictions(_front_matter(text), lab, answers),
            _hints(text, graded_names(lab)),
            _transfer(text),
            _section(text, "Exit ticket"),
        )
    except ValueError as error:
        raise ValueError(f"{shown}, {error}") from None


def parse_tolerance(text: str) -> Tolerance:
    """Read "10x" (a factor), "5 %" (of the truth), "0" (exact) or "1e-4" (a distance)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e-?\d+)?) ?([x%]?)", text)
    if found is None:
        raise ValueError(f"tolerance {text!r} is none of 10x, 5 %, 0 and 1e-4")
    size, sign = float(found.group(1)), found.group(2)
    if sign == "x" and size < 1:
        raise ValueError(f"tolerance {text!r} is a factor below 1, which not even the truth meets")
    return {
        "x": Tolerance("factor", size),
        "%": Tolerance("share", size / 100),
        "": Tolerance("distance", size),
    }[sign]


def truths(note: Note) -> dict[str, float]:
    """Compute the true answers from the reference, by the ids of the predictions.

    Raises ValueError, which names the prediction, when an answer cannot be computed.
    """
    # -P: the folder that `course` was called in may hold a weekN of its own.
    done = subprocess.run(
        [sys.executable, "-P", "-c", _ANSWERING],
        input=json.dumps([note.lab.module, [p.answer for p in note.predictions]]),
        env={**os.environ, "PYTHONPATH": str(ROOT / "solutions")},
        capture_output=True,
        encoding="utf-8",
    )
    shown = note.lab.note.relative_to(ROOT).as_posix()
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["its process ended"])[-1]
        raise ValueError(f"{shown}: the answers cannot be computed: {reason}")
    values = {}
    for prediction, (value, problem) in zip(
        note.predictions, json.loads(done.stdout.splitlines()[-1]), strict=True
    ):
        if problem:
            raise ValueError(f"{shown}: the answer of {prediction.id} fails: {problem}")
        values[prediction.id] = value
    return values


def _front_matter(text: str) -> dict:
    found = _FRONT_MATTER.match(text)
    if found is None:
        raise ValueError("line 1: it does not begin with front matter between two lines of ---")
    try:
        matter = yaml.safe_load(found.group(1))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 2 if mark else 2  # YAML counts from 0, and behind the first ---
        raise ValueError(
            f"line {line}: the front matter is no YAML: {getattr(error, 'problem', error)}"
        ) from None
    if not isinstance(matter, dict):
        raise ValueError("line 2: the front matter has no fields")
    return matter


def _answers(lab: Lab) -> dict[str, str]:
    """Read a lab's part of answers.toml: id → an expression."""
    shown = lab.answers.relative_to(ROOT).as_posix()
    try:
        table = tomllib.loads(lab.answers.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{shown} cannot be read: {error}") from None
    answers = table.get(lab.tests.stem.removeprefix("test_"), {})
    for id, answer in answers.items():
        try:
            ast.parse(answer, mode="eval")
        except SyntaxError as error:
            text = f"the answer of {id} is no Python expression: {error.msg}"
            raise ValueError(f"{shown}: {text}") from None
    return answers


def _predictions(matter: dict, lab: Lab, answers: dict[str, str]) -> tuple[Prediction, ...]:
    if matter.get("lab") != lab.name:
        raise ValueError(f"front matter: lab is {matter.get('lab')!r}, not {lab.name!r}")
    listed = matter.get("predict")
    fewest = 1 if lab.is_drill else NUM_PREDICTIONS
    if not isinstance(listed, list) or not fewest <= len(listed) <= NUM_PREDICTIONS:
        count = f"1 to {NUM_PREDICTIONS}" if lab.is_drill else NUM_PREDICTIONS
        raise ValueError(f"front matter: predict is no list of {count} questions")
    predictions: list[Prediction] = []
    for number, fields in enumerate(listed, 1):
        try:
            predictions.append(_prediction(fields, answers))
        except ValueError as error:
            raise ValueError(f"front matter, question {number}: {error}") from None
    ids = [prediction.id for prediction in predictions]
    if len(set(ids)) < len(ids):
        raise ValueError(f"front matter: two questions have the same id: {', '.join(ids)}")
    if answers.keys() - set(ids):
        extra = ", ".join(sorted(answers.keys() - set(ids)))
        raise ValueError(f"front matter: answers.toml answers what is not asked: {extra}")
    return tuple(predictions)


def _prediction(fields: object, answers: dict[str, str]) -> Prediction:
    if not isinstance(fields, dict) or set(fields) != set(_FIELDS):
        raise ValueError(f"its fields are not {', '.join(_FIELDS)}")
    texts = {name: str(fields[name]).strip() for name in _FIELDS}
    if not re.fullmatch(r"[a-z0-9-]+", texts["id"]):
        raise ValueError(f"id {texts['id']!r} is not made of a–z, 0–9 and -")
    for name in ("ask", "unit"):
        if fields[name] is None or not texts[name]:
            raise ValueError(f"{name} is empty")
    if texts["id"] not in answers:
        raise ValueError(f"answers.toml has no answer to {texts['id']}")
    tolerance = parse_tolerance(texts.pop("tolerance"))
    return Prediction(**texts, answer=answers[texts["id"]], tolerance=tolerance)


def _hints(text: str, graded: list[str]) -> tuple[Hint, ...]:
    hints = []
    for start in re.finditer("<details", text):
        line = text.count("\n", 0, start.start()) + 1
        found = _HINT.match(text, start.start())
        if found is None:
            raise ValueError(
                f"line {line}: a hint is <details><summary>Hint 1: NAME</summary>, its text, "
                "and </details>"
            )
        if found["name"] not in graded:
            known = ", ".join(graded)
            raise ValueError(f"line {line}: a hint for {found['name']}, which is none of {known}")
        if not found["text"].strip():
            raise ValueError(f"line {line}: the hint is empty")
        hints.append(Hint(found["title"].strip(), found["name"], found["text"].strip()))
    return tuple(hints)


def _transfer(text: str) -> str:
    found = _TRANSFER.search(_section(text, "Check yourself"))
    if found is None:
        raise ValueError("## Check yourself: no item begins with Transfer:")
    return " ".join(found.group(1).split())


def _section(text: str, title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    if found is None or not found.group(1).strip():
        raise ValueError(f"the section ## {title} is missing or empty")
    return found.group(1).strip()
