"""The steps of CONTRIBUTING.md, walked with the lab that it uses as its example."""

import json

from course.labs import ROOT

LAB = "week1/clip"

REFERENCE = '''"""Keep values inside a range."""

import torch
from torch import Tensor

__all__ = ["clip"]


def clip(x: Tensor, low: float) -> Tensor:
    """Replace every value below `low` by it.

    x: any shape. Returns x's shape and dtype; x is left as it was. Raises ValueError when low is
    not finite, and gives its value.
    """
    if not _is_finite(low):
        raise ValueError(f"low must be finite, got {low}")
    return torch.where(x < low, low, x)


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")
'''

SUITE = """
import pytest
import torch

from course.grading import check_close, check_equal, check_raises, lab

clip_lab = lab("week1/clip")


@pytest.mark.parametrize("low", [-2.5, 0.0, 3.0])
def test_clip_matches_numpy(low):
    x = torch.linspace(-5.0, 5.0, 21).reshape(3, 7)
    before = x.clone()
    expected = torch.from_numpy(x.numpy().clip(low, None))
    check_close(clip_lab.clip(x, low), expected)
    check_equal(x, before, "x after the call")


@pytest.mark.parametrize("low", [float("inf"), float("-inf"), float("nan")])
def test_clip_refuses_what_is_not_finite(low):
    check_raises(ValueError, clip_lab.clip, torch.ones(2), low, mentions=(low,))
"""

TABLE = """
[[misconception]]
id = "clipped-from-above"
belief = "Clipping takes the large values away"
replace = "torch.where(x < low, low, x)"
with = "torch.where(x > low, low, x)"
ask = "low is 0 and x is −3. What remains of it?"

[[misconception]]
id = "shifted"
belief = "Small values are moved up by the limit"
replace = "torch.where(x < low, low, x)"
with = "torch.where(x < low, x + low, x)"
ask = "low is 3 and x is −5. Is the result 3?"

[[equivalent]]
mutant = "clip: return torch.where(x < low, low, x) → return torch.where(x <= low, low, x)"
reason = "A value that is the limit already is replaced by itself."
"""


def test_a_lab_from_its_name_to_its_measurement(tree):
    labs = tree.read("course/labs.py")
    tree.write("course/labs.py", labs.replace('"sampling"),', '"sampling", "clip"),'))
    tree.write(f"solutions/{LAB}.py", REFERENCE)

    made = tree.run("course", "stubs")
    assert f"code/{LAB}.py: written" in made.stdout
    stub = tree.read(f"code/{LAB}.py")
    assert "is left as it was" in stub and "_is_finite" not in stub and "where" not in stub

    tree.write("tests/week1/test_clip.py", SUITE)
    assert "6 passed" in tree.pytest(f"solutions/{LAB}.py").stdout
    red = tree.pytest(f"code/{LAB}.py")
    assert "6 failed" in red.stdout and "week1/clip.py: not written yet: clip" in red.stdout

    tree.write("tests/week1/misconceptions/clip.toml", TABLE)
    tree.write(
        "tests/week1/alternatives/clip_maximum.py",
        REFERENCE.replace("torch.where(x < low, low, x)", "x.clamp(min=low)"),
    )
    measured = tree.run("course", "mutants", LAB)
    assert measured.returncode == 0, measured.stdout
    assert "misconceptions 2/2 killed" in measured.stdout
    assert "accepted  clip_maximum" in measured.stdout
    recognised = tree.run("course", "mutants", LAB, "--diagnose")
    assert recognised.returncode == 0, recognised.stdout
    assert "2/2 misconceptions recognised" in recognised.stdout
    result = json.loads(tree.read("tests/week1/mutants.json"))[LAB]
    assert (result["tests"], result["diagnosis"]["named"]) == (6, 2)


def test_what_the_guide_names_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for path in (
        "AGENTS.md",
        "course/labs.py",
        "mkdocs.yml",
        "tests/course/test_layers.py",
        "tests/week1/unlisted.toml",
        "sessions/week1/README.md",
    ):
        assert path in text and (ROOT / path).is_file()
