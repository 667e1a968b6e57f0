"""Hints come one at a time and hold no answer; the reference opens to those who have tried."""

import ast
import json
import re
import shutil
import textwrap
from datetime import UTC, datetime
from itertools import zip_longest

import pytest

from course import hints, notes, stubs
from course.labs import ROOT, Lab, all_labs
from course.notes import Hint

LAB = "week1/rope"
OPERATIONS = (ast.Call, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare)
TRY_FIRST = f"Try it first: a new hint needs a graded run (pytest code/{LAB}.py)"
LEAK = "Is it `x.unflatten(-1, (num_heads, -1)).transpose(-2, -3)`, or not?"


def code_in(text: str) -> list[str]:
    """List the code blocks and spans of a hint that compute something, as bodies of a function."""
    fences = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    bodies = []
    for source in (textwrap.dedent(piece).strip() for piece in (*fences, *spans)):
        try:
            tree = ast.parse(source)
        except SyntaxError:
            continue
        if any(isinstance(node, OPERATIONS) for node in ast.walk(tree)):
            is_expression = len(tree.body) == 1 and isinstance(tree.body[0], ast.Expr)
            bodies.append(f"return (\n{source}\n)" if is_expression else source)
    return bodies


def pasted(stub: str, name: str, body: str) -> str:
    """Put a body into a function of a stub, or into every method of a class."""
    (owner,) = (node for node in ast.parse(stub).body if getattr(node, "name", "") == name)
    functions = [owner] if isinstance(owner, ast.FunctionDef) else owner.body
    functions = [node for node in functions if isinstance(node, ast.FunctionDef)]
    lines = stub.splitlines()
    for function in reversed(functions):
        unwritten = function.body[-1]
        indented = textwrap.indent(body, " " * unwritten.col_offset)
        lines[unwritten.lineno - 1 : unwritten.end_lineno] = indented.splitlines()
    return "\n".join(lines) + "\n"


def leaks(tree, given: dict[Lab, list[Hint]], *options: str) -> list[str]:
    """Grade stubs with the hints' own code pasted in; returns the labs where any test passes."""
    stubs = {lab: tree.read(lab.path) for lab in given}
    columns = [
        [
            (lab, hint.name, body)
            for hint in found
            if hint.name == name
            for body in code_in(hint.text)
        ]
        for lab, found in given.items()
        for name in {hint.name for hint in found}
    ]
    leaking = []
    # One run takes one piece of code for each name; most hints are prose and need none.
    for pieces in zip_longest(*columns):
        texts = dict(stubs)
        pieces = [piece for piece in pieces if piece]
        for lab, name, body in pieces:
            texts[lab] = pasted(texts[lab], name, body)
        for lab, text in texts.items():
            tree.write(lab.path, text)
        touched = {lab.path for lab, _, _ in pieces}
        grades = tree.grades(*sorted(touched), *options)
        leaking += [name for name, grade in grades.items() if grade["passed"]]
    return leaking


@pytest.fixture
def course(tree):
    """The copy with session notes."""
    shutil.copytree(ROOT / "sessions", tree.root / "sessions")
    return tree


def log(tree, kind: str, lab: str = LAB, **fields) -> None:
    now = datetime.now(UTC)
    file = f"progress/log/{now:%Y-%m}.jsonl"
    before = tree.read(file) if (tree.root / file).is_file() else ""
    event = {"time": now.isoformat(timespec="seconds"), "kind": kind, "lab": lab, **fields}
    tree.write(file, before + json.dumps(event) + "\n")


def log_run(
    tree, hash: str = "a", passed: int = 0, total: int = 9, lab: str = LAB, at: str = ""
) -> None:
    fields = {"passed": passed, "total": total, "hash": hash, "seconds": 0.1, "hints": 0}
    log(tree, "run", lab, **fields, at=at)


def events(tree, kind: str) -> list[dict]:
    files = sorted(tree.root.glob("progress/log/*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [event for event in lines if event["kind"] == kind]


@pytest.mark.parametrize("lab", all_labs(), ids=lambda lab: lab.name)
def test_every_name_has_a_hint(lab):
    owners = [hint.name for hint in notes.read(lab).hints]
    assert set(owners) == set(stubs.graded_names(lab))


def test_code_is_found_in_hints():
    text = (
        "Look at `softmax`, `[0, 1]`, `a b`, `<stop>` and `x.shape`.\n"
        "Then `x * 2` or `f(x)`:\n\n```python\n  y = x.exp()\n  return y\n```\n\n"
        "```\nno code: at all\n```"
    )
    assert code_in(text) == ["y = x.exp()\nreturn y", "return (\nx * 2\n)", "return (\nf(x)\n)"]
    assert code_in("Which of `x <= 0` and `-x` fits?") == ["return (\nx <= 0\n)", "return (\n-x\n)"]


def test_code_is_pasted_into_functions_and_methods():
    stub = (
        'def f(x):\n    """Doc."""\n    raise E("a"\n        "b")\n\n\nclass A:\n    """Doc."""\n\n'
    )
    stub += "    y: int\n\n    def g(self):\n        raise E\n\n    def h(self):\n        raise E\n"
    assert 'Doc."""\n    return 1\n\n\nclass' in pasted(stub, "f", "return 1")
    assert pasted(stub, "A", "y = 1\nreturn y").count("        y = 1\n        return y\n") == 2


def test_a_leaking_hint_is_caught(tree):
    attention = Lab("week1", "attention")
    planted = {attention: [Hint("split_heads", "split_heads", LEAK)]}
    assert leaks(tree, planted, "-k", "split_heads") == [attention.name]


def test_no_hint_holds_an_answer(tree):
    given = {lab: list(notes.read(lab).hints) for lab in all_labs()}
    assert any(code_in(hint.text) for found in given.values() for hint in found)
    assert leaks(tree, given) == []


def test_the_ladder_is_climbed_by_attempts(course):
    first = course.run("course", "hint", LAB)
    assert first.returncode == 0
    assert first.stdout.startswith("Hint: rotary_table\n\nTake head_dim = 4 and theta = 100.")
    again = course.run("course", "hint", LAB)
    assert again.returncode == 0 and TRY_FIRST in again.stdout
    assert "theta = 100" in again.stdout and "two lists" not in again.stdout
    assert [(event["name"], event["rung"]) for event in events(course, "hint")] == [
        ("rotary_table", 1)
    ]
    log_run(course, lab="week1/attention")
    assert TRY_FIRST in course.run("course", "hint", LAB).stdout  # another lab was graded
    log_run(course)
    second = course.run("course", "hint", LAB)
    assert second.stdout.startswith("Hint: rotary_table\n\nYou have one list of positions")
    assert TRY_FIRST not in second.stdout
    log_run(course)
    assert course.run("course", "hint", LAB).stdout.startswith("Hint: apply_rotary\n")
    shown = first.stdout + again.stdout + second.stdout
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert not re.search(r"[Hh]int \d|\d of \d|remain|left", shown)


def test_without_a_name_it_is_where_the_latest_run_got_stuck(course):
    log_run(course, at="rotary_table")
    log_run(course, at="apply_rotary")
    assert "Stay in the plane." in course.run("course", "hint", LAB).stdout
    log_run(course, at="")
    assert "theta = 100" in course.run("course", "hint", LAB).stdout


def test_each_name_has_a_ladder_of_its_own(course):
    apply, table = ("course", "hint", LAB, "apply_rotary"), ("course", "hint", LAB, "rotary_table")
    assert "Stay in the plane." in course.run(*apply).stdout
    assert "theta = 100" in course.run(*table).stdout
    assert "Stay in the plane." in course.run(*apply).stdout
    assert "theta = 100" in course.run("course", "hint", LAB).stdout  # the lab's latest
    log_run(course)
    assert "two lists" in course.run(*table).stdout
    log_run(course)
    done = course.run(*table)
    assert done.returncode == 1
    assert "no further hint for rotary_table" in done.stdout
    assert f"sessions/{LAB}.md" in done.stdout and f"course reveal {LAB}" in done.stdout
    assert "Which two entries" in course.run("course", "hint", LAB).stdout
    assert [event["rung"] for event in events(course, "hint")] == [1, 1, 2, 2]


def test_the_end_of_the_ladder(course):
    for name, count in (("rotary_table", 2), ("apply_rotary", 3)):
        for rung in range(count):
            log(course, "hint", name=name, rung=rung + 1)
    log_run(course)
    done = course.run("course", "hint", LAB)
    assert done.returncode == 1
    assert f"There is no further hint for {LAB}." in done.stdout and "Traps" in done.stdout
    assert len(events(course, "hint")) == 5


def test_a_hint_that_the_note_has_lost_does_no_harm(course):
    log(course, "hint", name="gone", rung=7)
    assert course.run("course", "hint", LAB).stdout.startswith("Hint: rotary_table\n")


def test_a_name_that_is_not_graded(course):
    result = course.run("course", "hint", LAB, "Rotary")
    assert result.returncode == 2
    assert "grades no 'Rotary'; it grades rotary_table, apply_rotary" in result.stdout
    assert len(result.stdout.splitlines()) == 1 and not events(course, "hint")


def test_the_reference_opens_after_different_attempts(course):
    closed = course.run("course", "reveal", LAB)
    assert closed.returncode == 1 and "is not green yet" in closed.stdout
    assert "course reveal week1/rope --give-up" in " ".join(closed.stdout.split())
    for attempt in ("a", "b", "b"):
        log_run(course, attempt)
    log_run(course, "c", passed=9)
    log_run(course, "d", lab="week1/gqa")
    few = course.run("course", "reveal", LAB, "--give-up")
    assert few.returncode == 1 and f"{LAB} has 2:" in few.stdout
    assert not events(course, "reveal")
    assert "theta**-exponents" not in closed.stdout + few.stdout

    log_run(course, "e", passed=8)
    still = course.run("course", "reveal", LAB)
    assert still.returncode == 1 and not events(course, "reveal")
    opened = course.run("course", "reveal", LAB, "--give-up", COLUMNS="80")
    assert opened.returncode == 0
    assert "marks week1/rope as delegated" in opened.stdout
    assert f"course reset {LAB}" in " ".join(opened.stdout.split())
    assert "theta**-exponents" in opened.stdout
    assert all(len(line) <= 80 for line in opened.stdout.splitlines())
    assert "a model was trained on 8,192 positions" in opened.stdout
    assert [event["delegated"] for event in events(course, "reveal")] == [True]


def test_a_green_lab_beside_the_reference(course):
    name = LAB.rpartition("/")[2]
    suite = f'from course.grading import lab\n\n\ndef test_it():\n    assert lab("{LAB}").DONE\n'
    course.write(f"tests/week1/test_{name}.py", suite)
    solution = course.read(f"solutions/{LAB}.py")
    mine = solution.replace("theta**-exponents", "theta ** (-exponents)") + "\nDONE = True\n"
    course.write(f"code/{LAB}.py", mine)
    result = course.run("course", "reveal", LAB, COLUMNS="160")
    assert result.returncode == 0, result.stdout
    assert "delegated" not in result.stdout
    (changed,) = (line for line in result.stdout.splitlines() if "(-exponents)" in line)
    left, right = changed.split(" | ")
    assert "theta ** (-exponents)" in left and "theta**-exponents" in right
    assert re.search(r"^DONE = True +<$", result.stdout, re.MULTILINE)
    assert "class Rotary" not in result.stdout  # far from any change
    assert [event["delegated"] for event in events(course, "reveal")] == [False]

    course.write(f"solutions/{LAB}.py", mine)
    same = course.run("course", "reveal", LAB)
    assert "the reference are the same, line for line" in same.stdout


def test_a_missing_file_is_compared_as_an_empty_one(tmp_path, monkeypatch):
    monkeypatch.setattr(hints, "ROOT", tmp_path)
    mine, reference = tmp_path / "mine.py", tmp_path / "reference.py"
    reference.write_text("a" * 50 + "\n\nb\n")

    class Stray:
        code, solution = mine, reference

    rows = hints._side_by_side(Stray, 80).splitlines()
    assert [row.split(">")[1].strip() for row in rows if ">" in row] == [
        "a" * 38,
        "a" * 12,
        "",
        "b",
    ]
