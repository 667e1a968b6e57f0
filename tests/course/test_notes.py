"""Every lab has a session note in the common shape, whose predictions can be answered."""

import re
import subprocess
import sys

import pytest
import yaml

from course.labs import ROOT, WEEKS, all_labs

LABS = pytest.mark.parametrize("lab", all_labs(), ids=lambda lab: lab.name)
SECTIONS = (
    "Predict",
    "What you need to know",
    "Build",
    "Traps",
    "Check yourself",
    "In vLLM",
    "What it is worth",
    "Exit ticket",
)


def front_matter(lab) -> dict:
    text = lab.note.read_text(encoding="utf-8")
    return yaml.safe_load(text.split("---\n")[1])


@LABS
def test_shape(lab):
    text = lab.note.read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == list(SECTIONS)
    opening = text.split("\n# ")[1].split("\n## ")[0]
    assert "?" in opening
    assert text.count("<details>") >= 3
    own_questions = text.split("## Check yourself")[1].split("\n## ")[0]
    assert len(re.findall(r"^\d+\. ", own_questions, re.MULTILINE)) >= 8
    matter = front_matter(lab)
    assert matter["lab"] == lab.name
    assert set(matter["needs"]) <= {other.name for other in all_labs()}


@LABS
def test_every_task_has_a_hint(lab):
    text = lab.note.read_text(encoding="utf-8")
    hints = " ".join(re.findall(r"<details>(.*?)</details>", text, re.DOTALL))
    (names,) = re.findall(r"__all__ = \[(.*?)\]", lab.solution.read_text("utf-8"), re.DOTALL)
    for name in re.findall(r'"(\w+)"', names):
        assert name in hints, f"no hint of {lab.name} speaks of {name}"


@LABS
def test_predictions_have_answers(lab):
    predictions = front_matter(lab)["predict"]
    assert len(predictions) == 3
    text = " ".join(lab.note.read_text(encoding="utf-8").split("---\n", 2)[2].split())
    code = ["import math, torch", f"from {lab.module} import *", f"import {lab.module} as m"]
    code.append("globals().update({k: v for k, v in vars(m).items() if not k.startswith('_')})")
    for prediction in predictions:
        assert " ".join(prediction["ask"].split()) in text, "the note does not ask this"
        code.append(f"assert math.isfinite(float({prediction['answer']}))")
    environment = {"PYTHONPATH": str(ROOT / "solutions"), "PATH": ""}
    subprocess.run([sys.executable, "-c", "\n".join(code)], check=True, env=environment)


@pytest.mark.parametrize("week", WEEKS)
def test_links_lead_somewhere(week):
    for page in [ROOT / "README.md", *sorted((ROOT / "sessions" / week).glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("week", WEEKS)
def test_the_week_lists_its_labs(week):
    text = (ROOT / "sessions" / week / "README.md").read_text(encoding="utf-8")
    places = [text.index(f"({stem}.md)") for stem in WEEKS[week]]
    assert places == sorted(places)
