"""What a failing check says: the input first, where it differs, how much, and never too much."""

import dataclasses

import pytest
import torch

from course import grading
from course.grading import GradedFailure, History, check_close, check_equal, check_raises
from course.labs import find_labs

(LAB,) = find_labs("week1/rope")


def said(check, *args, **kwargs) -> str:
    """Return the message of a check that has to fail."""
    with pytest.raises(GradedFailure) as caught:
        check(*args, **kwargs)
    return str(caught.value)


def test_a_difference_from_the_input_to_the_places():
    expected = torch.arange(60.0).reshape(3, 4, 5)
    got = expected.clone()
    got[:, 1:, 2] += 7.0
    lines = said(check_close, got, expected, of="turn(x: (3, 4, 5) float32)").splitlines()
    assert lines == [
        "turn(x: (3, 4, 5) float32)",
        "shape and dtype are right",
        "first difference at [0, 1, 2]: got 14, expected 7   (allowed: 1e-05 of the row's largest)",
        "9 of 60 elements differ; largest difference 7",
        "along axis 1 (length 4), 0 is right",
        "along axis 2 (length 5), all differences are at 2",
    ]


def test_numbers_that_look_alike_are_written_out():
    text = said(check_close, torch.tensor([1.0 + 1e-4]), torch.tensor([1.0]), tolerance=1e-9)
    assert "got 1.0001, expected 1 " in text
    close = torch.tensor([1.0 + 2.0**-20], dtype=torch.float64)
    text = said(check_close, close, torch.tensor([1.0], dtype=torch.float64))
    assert "got 1.0000009536743164, expected 1 " in text


def test_nan_and_inf_are_counted():
    got = torch.tensor([float("nan"), float("inf"), 1.0, float("nan")])
    text = said(check_close, got, torch.ones(4))
    assert "your result holds 2 NaN and 1 Inf" in text


@pytest.mark.parametrize(
    ("got", "sentence"),
    [
        (3, "returned 3, expected a tensor"),
        (None, "returned None, expected a tensor"),
        ([1.0] * 50, "returned list of 50, expected a tensor"),
        (torch.ones(2, 3), "returned shape (2, 3), expected (3, 2)"),
        (torch.ones(2, 3).half(), "(and torch.float16, expected torch.float32)"),
        (torch.ones(3, 2).double(), "returned dtype torch.float64, expected torch.float32"),
        (torch.ones(3, 2, device="meta"), "without data, on the meta device"),
    ],
)
def test_the_wrong_kind_of_thing(got, sentence):
    assert sentence in said(check_close, got, torch.ones(3, 2))


def test_what_a_learner_s_tensor_can_fool_is_not_asked():
    class Agreeable(torch.Tensor):
        def __eq__(self, other):
            return torch.tensor(True)

    assert "expected a tensor" in said(check_close, Agreeable(), torch.ones(1))


@pytest.mark.parametrize(
    ("wrong", "lines"),
    [
        (torch.tensor(True), []),
        (torch.tensor([True, True]), []),
        (torch.tensor([True, False, True]), ["along axis 0 (length 3), 1 is right"]),
        (
            torch.tensor([0, 1, 1, 0, 0, 0, 0, 1]).bool(),
            ["along axis 0 (length 8), all differences are at 1–2 and 7"],
        ),
        (
            torch.tensor([1, 0, 1, 0, 1, 1]).bool(),
            ["along axis 0 (length 6), 1 and 3 are right"],
        ),
        # One difference in a row of nine is no matter of rows.
        (torch.eye(9).bool()[:4], []),
        (torch.tensor([0, 1] * 8).bool(), []),
    ],
)
def test_where_the_differences_keep_to(wrong, lines):
    assert grading._where(wrong) == lines


def test_long_values_show_their_first_difference_only():
    got, expected = list(range(5000)), list(range(5000))
    got[4000] = -1
    text = said(check_equal, got, expected, "the token ids")
    assert "first difference at [4000]" in text and len(text) < 300
    text = said(check_equal, "a" * 5000, "a" * 4999 + "b", "the text")
    assert "first difference at [4999]" in text and len(text) < 300


def test_a_history_shows_its_latest_steps():
    history = History("a stack of 3")
    for number in range(9):
        assert history.note(f"push({number})", number * 2) == number * 2
    text = said(check_equal, 1, 2, "the size", of=history)
    assert text.splitlines() == [
        "a stack of 3",
        "  … 3 steps before",
        *(f"  push({number}) → {number * 2}" for number in range(3, 9)),
        "the size: got 1, expected 2",
    ]


@pytest.mark.parametrize(
    ("raised", "sentence"),
    [
        (None, "returned 5, expected ValueError"),
        (TypeError("odd"), "raised TypeError('odd'); expected ValueError"),
        (ValueError("too big"), "ValueError(too big) does not name 7"),
    ],
)
def test_an_error_that_is_asked_for(raised, sentence):
    def limit(value):
        if raised:
            raise raised
        return 5

    text = said(check_raises, ValueError, limit, 7, mentions=(7,))
    assert text == f"limit(value: 7)\n{sentence}"


def test_objects_are_named_by_their_type_and_not_by_their_address():
    text = grading.describe_call(lambda *a, **k: 0, [object(), torch.nn.Linear(1, 1)], {"f": len})
    assert text == "<lambda>(a: object, k: Linear, f: len)"


def test_a_failure_fits_80_columns():
    text = f"f(x: (3,) float32)\n{'a rather long sentence ' * 20}"
    page = grading.render(LAB, "test_x", text, "A belief.\nIs it yours?")
    assert max(map(len, page.splitlines())) <= 80
    head, asked, link = page.split("\n\n")
    assert head.startswith("week1/rope.py  test_x\n  f(x: (3,) float32)\n")
    assert asked == "  A belief.\n  Is it yours?"
    assert link == "  sessions/week1/rope.md · course hint week1/rope"


def test_parameters_show_what_is_not_at_its_default():
    @dataclasses.dataclass(frozen=True)
    class Params:
        size: int
        temperature: float = 1.0
        stop: tuple[str, ...] = ()

    assert grading.describe(Params(3)) == "Params(size=3)"
    assert grading.describe(Params(3, 0.1 + 0.2, ("a",))) == (
        "Params(size=3, temperature=0.3, stop=('a',))"
    )


def test_a_reference_is_named_and_not_quoted(tree):
    tree.write("progress/reference.txt", "week1/attention\nweek1/rope\n")
    tree.solve("week1/gqa")
    gqa = tree.read("code/week1/gqa.py")
    wrong = gqa.replace("split_heads(part, part.shape[-1]", "split_heads(part, 1 + part.shape[-1]")
    tree.write("code/week1/gqa.py", wrong)
    output = tree.pytest("code/week1/gqa.py", "--no-diagnosis").stdout
    assert "raised by week1/attention.py, called in" in output
    assert "code/week1/gqa.py, line" in output
    assert "raise ValueError" not in output and "code/week1/attention.py" not in output


def test_floats_are_shown_with_six_digits():
    assert grading.describe(torch.tensor([0.3, 1.0])) == "[0.3, 1.0] float32"
    text = said(check_equal, torch.tensor([0.1, 0.3]), torch.tensor([0.1, 0.7]), "x after the call")
    assert "x after the call: first difference at [1]: got 0.3, expected 0.7" in text
