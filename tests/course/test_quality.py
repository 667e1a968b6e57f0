"""The graders are graded: misconceptions fit, alternatives pass, committed results are current."""

import ast

import pytest

from course import mutants, quality
from course.labs import GROUPS, ROOT, WEEKS, all_labs
from tests.course.test_layers import NUM_TESTS

LABS = pytest.mark.parametrize("lab", all_labs(), ids=lambda lab: lab.name)


@LABS
def test_misconceptions_fit_the_reference(lab):
    rows = mutants.misconceptions(lab)
    assert len(rows) >= 5
    for row in rows:
        assert "?" in row["ask"], f"{row['id']} does not ask"
        assert row["replace"] != row["with"]


@LABS
def test_every_lab_has_an_alternative(lab):
    source = lab.solution.read_text(encoding="utf-8")
    sources = [alternative.source for alternative in mutants.alternatives(lab)]
    assert sources and source not in sources


@LABS
def test_committed_results_are_current_and_good(lab):
    assert quality.stale(lab) == []
    results = mutants.read_results(lab.week)[lab.name]
    assert results["tests"] == NUM_TESTS[lab.name]
    assert results["listed_killed"] == results["listed"] == len(mutants.misconceptions(lab))
    assert set(results["survivors"]) == set(mutants.equivalents(lab))
    assert results["generated_killed"] + len(results["survivors"]) == results["generated"]
    assert results["alternative_killed"] == 0
    assert results["alternative"] == len(mutants.alternatives(lab))


@pytest.mark.parametrize("week", GROUPS)
def test_the_shares_that_are_promised(week):
    results = mutants.read_results(week).values()
    total = {key: sum(lab[key] for lab in results) for key in ("generated", "generated_killed")}
    # Killed, or named equivalent with a reason; which must not become the easy way out.
    num_equivalent = sum(len(lab["survivors"]) for lab in results)
    assert total["generated_killed"] + num_equivalent >= 0.95 * total["generated"]
    assert num_equivalent <= 0.1 * total["generated"]
    measured = [lab for lab in results if not quality.is_unmeasured(lab)]
    named = sum(lab["diagnosis"]["named"] for lab in measured)
    assert named >= mutants.DIAGNOSED_SHARE * sum(lab["listed"] for lab in measured)


def test_the_published_page_is_current():
    assert quality.PAGE.read_text(encoding="utf-8") == quality.page()


@pytest.mark.parametrize("week", WEEKS)
def test_the_weeks_page_shows_what_the_suites_say(week):
    text = quality.week_page(week).read_text(encoding="utf-8")
    assert text == quality.with_examples(week)
    results = mutants.read_results(week).values()
    num_measured = sum(not quality.is_unmeasured(lab) for lab in results)
    assert text.count("```\n" + week) >= min(5, num_measured)


def test_the_report_refuses_stale_measurements(tree):
    for week in WEEKS:
        text = quality.week_page(week).read_text(encoding="utf-8")
        tree.write(f"sessions/{week}/README.md", text)
    source = tree.read("solutions/week1/rope.py")
    tree.write("solutions/week1/rope.py", source.replace("Tabulate", "List"))
    result = tree.run("course", "mutants", "--report")
    assert result.returncode == 1
    assert "run `course mutants week1/rope`" in result.stdout
    tree.write("solutions/week1/rope.py", source)
    assert tree.run("course", "mutants", "--report").returncode == 0
    assert tree.read("tests/QUALITY.md") == quality.page()
    assert tree.read("sessions/week1/README.md") == quality.with_examples("week1")


def test_a_refused_alternative_is_red(tree):
    tree.write("tests/week1/alternatives/rope_wrong.py", "def rotary_table(*a, **k): ...\n")
    tree.write(
        "tests/week1/test_rope.py",
        "from course.grading import lab\n"
        "def test():\n    assert lab('week1/rope').rotary_table(4, 3, 10.0).shape == (3, 4)\n",
    )
    tree.write("tests/week1/misconceptions/rope.toml", "")
    result = tree.run("course", "mutants", "week1/rope")
    assert result.returncode == 1
    assert "REFUSED   rope_wrong by test" in result.stdout
    assert "accepted  rope_complex" in result.stdout


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


def test_every_case_of_the_engine_has_tests_that_exist():
    cases = quality.engine_cases()
    numbers = [case["number"] for case in cases]
    assert numbers == sorted(set(numbers)) and {*range(1, 19), 20, 21, *range(23, 27)} <= {*numbers}
    for test in [test for case in cases for test in case["tests"]]:
        file, _, name = test.partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_bytes())
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name in names, test
