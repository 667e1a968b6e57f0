"""What a failing test says of the belief behind it, and what it leaves alone."""

import json
import tomllib

import pytest
import torch

from course import diagnosis, evidence, grading, layers, mutants
from course.grading import Evidence, GradedFailure
from course.labs import DRILLS, GROUPS, all_labs, find_labs

ROPE = "week1/rope"
(LAB,) = find_labs(ROPE)

SUITE = """
import torch
from hypothesis import given, strategies as st

from course.grading import check_close, check_equal, lab

rope = lab("week1/rope")


def test_shape_only():
    table = rope.rotary_table(4, 3, 10.0)
    check_equal(tuple(table.shape), (3, 4), "the shape")


def test_values():
    speeds = torch.tensor([1.0, 10.0**-0.5])
    angles = torch.arange(3).unsqueeze(-1) * speeds
    check_close(rope.rotary_table(4, 3, 10.0), torch.cat((angles.cos(), angles.sin()), -1))


@given(st.integers(2, 9))
def test_any_length(length):
    table = rope.rotary_table(2, length, 10.0)
    check_close(table[:, 0], torch.arange(length).float().cos())
"""

IMPORTED = "check_close, check_raises,"
SUITE_OF_ONE_PAIR = """

def test_one_pair():
    angles = torch.arange(5.0).unsqueeze(-1)
    check_close(rope.rotary_table(2, 5, 10.0), torch.cat((angles.cos(), angles.sin()), -1))
"""

TABLE = """
[[misconception]]
id = "speeds-grow"
belief = "The pairs become faster from the first to the last"
replace = "theta**-exponents"
with = "theta**exponents"
ask = "Which pair is the fastest?"
[[misconception]]
id = "sines-first"
belief = "Sines stand in front"
replace = "(angles.cos(), angles.sin())"
with = "(angles.sin(), angles.cos())"
ask = "What is sin 0?"
[[misconception]]
id = "sines-for-cosines"
belief = "A sine is a cosine"
replace = "(angles.cos(), angles.sin()), dim=-1)"
with = "(angles.sin(), angles.cos()), dim=-1) + 0"
ask = "And cos 0?"
[[misconception]]
id = "without-end"
belief = "It ends by itself"
replace = "    exponents = torch.arange(0"
with = "    while True:\\n        pass\\n    exponents = torch.arange(0"
ask = "When?"
[[apart]]
ids = ["sines-first", "sines-for-cosines"]
ask = "Which of the two is it?"
"""


@pytest.fixture
def graded(tree):
    """Grade a wrong rope against a small suite and a small table; returns output and grade."""
    source = tree.read(f"solutions/{ROPE}.py")
    tree.write("tests/week1/test_rope.py", SUITE)
    tree.write("tests/week1/misconceptions/rope.toml", TABLE)

    def grade(replace: str, by: str, *args: str):
        assert source.count(replace) == 1
        tree.write(f"code/{ROPE}.py", source.replace(replace, by))
        result = tree.pytest(f"code/{ROPE}.py", "--grade-json", "grades.json", *args)
        return result.stdout, json.loads(tree.read("grades.json"))[ROPE]

    return grade


def test_a_known_belief_is_named_once_with_its_question(graded):
    output, grade = graded("theta**-exponents", "theta**exponents")
    assert grade["beliefs"] == ["speeds-grow"]
    assert grade["failed"] == 1 and grade["passed"] == 2
    assert "“The pairs become faster from the first to the last”" in output
    assert output.count("Which pair is the fastest?") == 1


def test_another_way_to_write_the_same_mistake_is_the_same_belief(graded):
    output, grade = graded("theta**-exponents", "torch.pow(1.0 / theta, -exponents)")
    assert grade["beliefs"] == ["speeds-grow"]
    assert "Which pair is the fastest?" in output


def test_two_beliefs_are_told_apart_by_a_question(graded):
    output, grade = graded("(angles.cos(), angles.sin())", "(angles.sin(), angles.cos())")
    assert grade["beliefs"] == ["sines-first", "sines-for-cosines"]
    assert grade["failed"] == 2  # the property test has its own smallest example
    assert output.count("Which of the two is it?") == 1
    assert "What is sin 0?" not in output


def let_the_mutant_fail_for_one_pair_as_well(tree) -> None:
    """Add a test of two dimensions, and make the mutant of `speeds-grow` wrong there, too."""
    wide = "theta**(exponents if head_dim > 2 else exponents + 1)"
    table = TABLE.replace('with = "theta**exponents"', f'with = "{wide}"')
    tree.write("tests/week1/test_rope.py", SUITE + SUITE_OF_ONE_PAIR)
    tree.write("tests/week1/misconceptions/rope.toml", table)


def test_a_belief_whose_mutant_fails_what_the_learner_passes_is_not_named(tree, graded):
    let_the_mutant_fail_for_one_pair_as_well(tree)
    # Wrong for four dimensions as the misconception is, and right for two.
    learner = "(theta**exponents if head_dim > 2 else theta**-exponents)"
    output, grade = graded("theta**-exponents", learner)
    assert grade["failed"] == 1 and grade["beliefs"] == []
    assert "Which pair is the fastest?" not in output


def test_a_belief_that_fails_differently_elsewhere_is_not_named(tree, graded):
    let_the_mutant_fail_for_one_pair_as_well(tree)
    learner = "theta**(exponents if head_dim > 2 else exponents + 2)"
    _, grade = graded("theta**-exponents", learner)
    assert grade["failed"] >= 2 and grade["beliefs"] == []


def test_an_unknown_mistake_is_met_with_silence(graded):
    output, grade = graded("theta**-exponents", "theta**(-exponents - 0.5)")
    assert grade["failed"] > 0 and grade["beliefs"] == []
    assert "believes" not in output and "Two beliefs" not in output


def test_it_can_be_switched_off(graded):
    output, grade = graded("theta**-exponents", "theta**exponents", "--no-diagnosis")
    assert grade["failed"] == 1 and grade["beliefs"] == []
    assert "believes" not in output


def test_the_question_stands_under_a_failure_that_the_belief_explains(tree, graded):
    """A second mistake, which fails first, is not taken for the belief."""
    first, rest = SUITE.split("def test_shape_only")
    refusal = (
        "def test_refusal():\n    check_raises(ValueError, rope.rotary_table, 7, 3, 10.0)\n\n\n"
    )
    suite = f"{first}{refusal}def test_shape_only{rest}".replace("check_close,", IMPORTED)
    tree.write("tests/week1/test_rope.py", suite)
    source = tree.read(f"solutions/{ROPE}.py").replace("theta**-exponents", "theta**exponents")
    tree.write(f"code/{ROPE}.py", source.replace("head_dim % 2", "head_dim % 2 and head_dim < 7"))
    output = tree.pytest(f"code/{ROPE}.py", "--grade-json", "grades.json").stdout
    parts = output.split("week1/rope.py  ")
    (told,) = [part for part in parts if "Which pair is the fastest?" in part]
    assert told.startswith("test_values") and "test_refusal" in output
    grade = json.loads(tree.read("grades.json"))[ROPE]
    assert grade["first"]["test"] == "test_values"
    assert "Which pair is the fastest?" in grade["first"]["asked"]


def test_what_a_wrong_solution_prints_is_not_shown(tree, graded):
    loud = "(print('my answer'), warnings.warn('my answer'), theta**exponents)[-1]"
    table = TABLE.replace('with = "theta**exponents"', f'with = "{loud}"')
    tree.write("tests/week1/misconceptions/rope.toml", table)
    source = tree.read(f"solutions/{ROPE}.py")
    tree.write(
        f"solutions/{ROPE}.py",
        source.replace("import torch\n", "import warnings\n\nimport torch\n"),
    )
    output, grade = graded("theta**-exponents", "theta**exponents")
    assert grade["beliefs"] == ["speeds-grow"] and "my answer" not in output


SUITE_OF_TWO_LABS = """
import sys

import torch
from torch.nn.functional import scaled_dot_product_attention

from course.grading import check_close, check_equal, lab

gqa = lab("week1/gqa")


def test_both_labs_are_of_one_layer():
    rotary = gqa.Rotary(8, 4, 10.0)
    check_equal(type(rotary) is sys.modules["week1.rope"].Rotary, True, "the same class")


def test_heads_in_groups():
    torch.manual_seed(0)
    q, k, v = torch.randn(4, 3, 8), torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    expected = scaled_dot_product_attention(q, k, v, enable_gqa=True)
    check_close(gqa.grouped_attention(q, k, v), expected)


def test_past_only():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, 5, 8).unbind(0)
    expected = scaled_dot_product_attention(q, k, v, is_causal=True)
    check_close(gqa.causal_attend(0, q, k, v), expected)
"""


@pytest.fixture
def graded_pair(tree):
    """Grade gqa against a small suite; files: (lab, text, what it becomes). Returns the beliefs."""

    def grade(*changes: tuple[str, str, str]):
        tree.write("tests/week1/test_gqa.py", SUITE_OF_TWO_LABS)
        for name in ("week1/attention", "week1/rope", "week1/gqa"):
            source = tree.read(f"solutions/{name}.py")
            for replace, by in [change[1:] for change in changes if change[0] == name]:
                assert source.count(replace) == 1
                source = source.replace(replace, by)
            tree.write(f"code/{name}.py", source)
        tree.pytest("code/week1/gqa.py", "--grade-json", "grades.json")
        grade = json.loads(tree.read("grades.json"))["week1/gqa"]
        return grade["failed"], grade["beliefs"]

    return grade


IN_TURN = ("week1/gqa", "k.repeat_interleave(group, -3)", "torch.cat([k] * group, dim=-3)")
VALUES_IN_TURN = ("week1/gqa", "v.repeat_interleave(group, -3)", "torch.cat([v] * group, dim=-3)")
FUTURE = ("week1/attention", "allowed.tril(num_keys - num_queries)", "allowed.tril(num_keys)")


def test_a_belief_is_named_where_its_lab_is_built_on_another(graded_pair):
    num_failed, beliefs = graded_pair(IN_TURN, VALUES_IN_TURN)
    assert num_failed == 1 and "repeat-instead-of-interleave" in beliefs


def test_no_belief_is_named_for_what_an_earlier_lab_does(graded_pair):
    assert graded_pair(FUTURE) == (1, [])


def test_workers_of_xdist_ask_once_too(graded):
    output, grade = graded(
        "(angles.cos(), angles.sin())", "(angles.sin(), angles.cos())", "-n", "2"
    )
    assert grade["beliefs"] == ["sines-first", "sines-for-cosines"]
    assert output.count("Which of the two is it?") == 1


def test_a_broken_table_costs_no_message(tree, graded):
    tree.write("tests/week1/misconceptions/rope.toml", "[[misconception]\n")
    output, grade = graded("theta**-exponents", "theta**exponents")
    assert grade["failed"] == 1 and "first difference at" in output
    assert "the diagnosis of week1/rope failed" in output


RIGHT = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
WRONG = torch.tensor([2.0, 4.0, 6.0, 8.0, 10.0])


@pytest.mark.parametrize(
    ("got", "wanted", "expected", "same"),
    [
        (WRONG, WRONG + 1e-5, RIGHT, True),
        (WRONG, WRONG + 0.5, RIGHT, False),
        # As near as two roundings of one number, and farther apart than from the right one.
        (RIGHT + 1e-3, RIGHT - 1e-3, RIGHT, False),
        (RIGHT + 1e-3, RIGHT + 1e-3, RIGHT, True),
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]), None, True),
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 0.0]), None, False),
        (torch.tensor([1.0, torch.inf]), torch.tensor([1.0, -torch.inf]), None, False),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), None, False),
        (torch.tensor([1.0]), torch.tensor([[1.0]]), None, False),
        (torch.tensor([]), torch.tensor([]), None, True),
        (torch.tensor([True]), torch.tensor([False]), None, False),
        (("ids", [1, 2]), ("ids", [1, 2]), [1], True),
        (("ids", [1, 2]), ("text", [1, 2]), [1], False),
        (1.0, 1, None, False),
        (float("nan"), float("nan"), None, True),
    ],
)
def test_same_results(got, wanted, expected, same):
    found, wish = (Evidence("wrong", 3, 1, value, expected) for value in (got, wanted))
    assert evidence.is_same(found, wish) is same
    assert not evidence.is_same(Evidence("wrong", 4, 1, got, expected), wish)
    assert not evidence.is_same(Evidence("wrong", 3, 2, got, expected), wish)


@pytest.mark.parametrize(
    ("value", "expected", "strong"),
    [
        (WRONG, RIGHT, True),
        (WRONG[:2], RIGHT[:2], False),
        (torch.full((5,), torch.nan), RIGHT, False),
        (torch.cat((RIGHT[:4], torch.tensor([9.0]))), RIGHT, False),
        (torch.arange(9), torch.arange(9) + 1, False),
        (("the token", 7), 8, False),
        (("the ids", list(range(9))), list(range(8)), True),
        (("the ids", [1]), [], False),
        ("one seed for both", None, False),
        (True, None, False),
    ],
)
def test_how_much_a_result_says(value, expected, strong):
    assert evidence.is_strong(Evidence("wrong", 1, 1, value, expected)) is strong


def test_what_is_no_evidence():
    for error in (
        grading.LabUnusable("x"),
        grading.OutOfTime("x"),
        NotImplementedError("week1/rope.py: rotary_table is not written yet"),
    ):
        assert grading.evidence(error) is None
    assert grading.evidence(GradedFailure("text", 3)).value == 3
    assert grading.evidence(IndexError("text")).kind == "IndexError"


@pytest.mark.parametrize(
    ("explained", "refuted", "named"),
    [
        ([], [], {}),
        ([{"a": [1]}, {}], [[], []], {"a": [1]}),
        ([{"a": [1]}, {}], [[], ["a"]], {}),
        ([{"a": [1], "b": [2]}, {"b": [3]}], [[], ["a"]], {"b": [2, 3]}),
        ([{"a": [1]}, {"b": [2], "c": [3]}], [[], []], {}),
    ],
)
def test_workers_put_together_what_they_saw(explained, refuted, named):
    parts = [{ROPE: part} for part in zip(explained, refuted, strict=True)]
    assert diagnosis.join(parts) == ({ROPE: named} if parts else {})


@pytest.mark.parametrize("lab", all_labs(), ids=lambda lab: lab.name)
def test_questions_that_tell_apart_name_rows_of_the_table(lab):
    table = tomllib.loads(lab.misconceptions.read_text(encoding="utf-8"))
    ids = {row["id"] for row in table["misconception"]}
    for row in table.get("apart", []):
        assert len(row["ids"]) == 2 and set(row["ids"]) <= ids
        assert "?" in row["ask"]
        assert mutants.separating_question(lab, row["ids"]) == row["ask"]


@pytest.mark.parametrize("week", GROUPS)
def test_unlisted_solutions_are_judged(week):
    path = layers.TESTS / week / "unlisted.toml"
    rows = tomllib.loads(path.read_text(encoding="utf-8"))["solution"]
    assert len(rows) >= (2 if week in DRILLS else 3) * len(GROUPS[week])
    for row in rows:
        assert row.keys() == {"lab", "what", "replace", "with", "says", "verdict"}
        assert (row["verdict"] == "silent") == (not row["says"])
        assert not row["verdict"].startswith("UNTRUE")
    assert {row["lab"] for row in rows} == {lab.name for lab in find_labs(week)}
