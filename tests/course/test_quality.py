"""The graders are graded: misconceptions fit, alternatives pass, committed results are current."""

import ast
import json

import pytest

from course import mutants
from course.labs import ROOT, all_labs

LABS = pytest.mark.parametrize("lab", all_labs(), ids=lambda lab: lab.name)
ALTERNATIVES = [
    (lab, file)
    for lab in all_labs()
    for file in sorted((lab.tests.parent / "alternatives").glob(f"{lab.stem}_*.py"))
]


@LABS
def test_misconceptions_fit_the_reference(lab):
    rows = mutants.misconceptions(lab)
    assert len(rows) >= 5
    for row in rows:
        assert "?" in row["ask"], f"{row['id']} does not ask"
        assert row["replace"] != row["with"]


@LABS
def test_every_lab_has_an_alternative(lab):
    assert lab in [owner for owner, _ in ALTERNATIVES]


@pytest.mark.parametrize(("lab", "file"), ALTERNATIVES, ids=[file.stem for _, file in ALTERNATIVES])
def test_alternatives_are_accepted(tree, lab, file):
    source = file.read_text(encoding="utf-8")
    assert source != lab.solution.read_text(encoding="utf-8")
    candidate = f"{lab.name}={file.relative_to(ROOT)}"
    result = tree.pytest(f"solutions/{lab.name}.py", "-q", "--candidate", candidate)
    assert result.returncode == 0, result.stdout


@LABS
def test_committed_results_are_current_and_good(lab):
    results = json.loads(mutants.results_file(lab.week).read_text(encoding="utf-8"))[lab.name]
    assert results["digest"] == mutants.digest(lab), (
        f"{lab.name} has changed since its graders were measured: run `course mutants {lab.name}`"
    )
    assert results["listed_killed"] == results["listed"] == len(mutants.misconceptions(lab))
    assert set(results["survivors"]) == set(mutants.equivalents(lab))
    assert results["generated_killed"] + len(results["survivors"]) == results["generated"]


def test_generated_mutants_change_bodies_and_nothing_else():
    source = '''
def clip(x: int, low: int = 0) -> int:
    """Keep x at low or above, 1 at a time."""
    if x < low:
        raise ValueError(f"{x} is below {low + 1}")
    return -x + 2
'''
    definition = ast.parse(source).body[0]
    texts = [text for text, _ in mutants._mutations(definition)]
    assert texts == [
        "if x < low → if True",
        "if x < low → if False",
        "if x < low → if x <= low",
        "if x < low → if x >= low",
        "raise ValueError(f'{x} is below {low + 1}') → pass",
        "return -x + 2 → return -x - 2",
        "return -x + 2 → return x + 2",
        "return -x + 2 → return -x + 3",
    ]


def test_a_survivor_is_red(tree):
    tree.write(
        "tests/week1/test_rope.py",
        "from course.grading import lab\n"
        "def test():\n    assert lab('week1/rope').rotary_table(4, 3, 10.0).shape == (3, 4)\n",
    )
    tree.write(
        "tests/week1/misconceptions/rope.toml",
        '[[misconception]]\nid = "seen"\nbelief = "b"\nreplace = "dim=-1)\\n\\n\\ndef apply"\n'
        'with = "dim=0)\\n\\n\\ndef apply"\nask = "?"\n'
        '[[misconception]]\nid = "unseen"\nbelief = "b"\nreplace = "theta**-exponents"\n'
        'with = "theta**exponents"\nask = "?"\n',
    )
    result = tree.run("course", "mutants", "week1/rope", "--listed")
    assert result.returncode == 1, result.stdout
    assert "killed    seen" in result.stdout and " test\n" in result.stdout
    assert "SURVIVED  unseen" in result.stdout
    assert "misconceptions 1/2 killed" in result.stdout


def test_a_row_that_does_not_fit_is_one_sentence(tree):
    tree.write(
        "tests/week1/misconceptions/rope.toml",
        '[[misconception]]\nid = "x"\nbelief = "b"\nreplace = "nowhere"\nwith = "y"\nask = "?"\n',
    )
    result = tree.run("course", "mutants", "week1/rope", "--listed")
    assert result.returncode == 2
    assert "occurs 0 times in rope.py" in result.stdout
