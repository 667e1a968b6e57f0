"""Every lab has a session note in the common shape; and a malformed note is refused by its line."""

import re
import shutil

import pytest
import yaml

from course import labs, notes
from course.labs import GROUPS, ROOT, Lab, all_labs

LABS = pytest.mark.parametrize("lab", all_labs(), ids=lambda lab: lab.name)
ROPE = Lab("week1", "rope")
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


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


@LABS
def test_shape(lab):
    text = lab.note.read_text(encoding="utf-8")
    # A drill is no part of the engine, so it has no worth to measure.
    sections = [name for name in SECTIONS if not (lab.is_drill and name == "What it is worth")]
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == sections
    opening = text.split("\n# ")[1].split("\n## ")[0]
    assert "?" in opening
    own_questions = text.split("## Check yourself")[1].split("\n## ")[0]
    assert len(re.findall(r"^\d+\. ", own_questions, re.MULTILINE)) >= (5 if lab.is_drill else 8)
    numbers = re.findall(r"<summary>Hint (\d+): ", text)
    assert numbers == [str(number + 1) for number in range(len(numbers))]
    needs = yaml.safe_load(text.split("---\n")[1])["needs"]
    assert set(needs) <= {other.name for other in all_labs()}


@LABS
def test_nothing_is_taken_for_a_tag_of_html(lab):
    text = without_code(lab.note.read_text(encoding="utf-8").split("---\n", 2)[2])
    assert set(re.findall(r"<(/?\w+)", text)) <= {"details", "/details", "summary", "/summary"}


@LABS
def test_the_note_can_be_read(lab):
    note = notes.read(lab)
    assert len(note.predictions) in ((1, 2, 3) if lab.is_drill else (3,))
    assert len(note.hints) >= 3
    assert note.transfer.endswith("?") and note.exit_ticket.startswith("Explain")
    text = lab.note.read_text(encoding="utf-8").split("\n## Predict")[1].split("\n## ")[0]
    assert f"`course predict {lab.name}`" in text
    for prediction in note.predictions:
        assert prediction.ask in text, "the note does not ask this"


@LABS
def test_predictions_have_answers(lab):
    note = notes.read(lab)
    truths = notes.truths(note)
    for prediction in note.predictions:
        truth = truths[prediction.id]
        assert prediction.tolerance.accepts(truth, truth)
        assert not prediction.tolerance.accepts(-truth, truth)


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A root with one note, its answers and its reference; returns a function that changes one."""
    kept = (ROPE.note, ROPE.solution, ROPE.answers)
    for file in kept:
        target = tmp_path / file.relative_to(ROOT)
        target.parent.mkdir(parents=True)
        shutil.copyfile(file, target)
    monkeypatch.setattr(labs, "ROOT", tmp_path)
    monkeypatch.setattr(notes, "ROOT", tmp_path)

    def change(old: str, new: str, name: str = "rope.md") -> None:
        (file,) = tmp_path.rglob(name)
        text = file.read_text(encoding="utf-8")
        assert text.count(old) >= 1, old
        file.write_text(text.replace(old, new, 1), encoding="utf-8")

    return change


def test_answers_come_from_the_reference_alone(copied, tmp_path, monkeypatch):
    before = notes.truths(notes.read(ROPE))
    learner = tmp_path / "code" / "week1"
    learner.mkdir(parents=True)
    (learner / "rope.py").write_text("raise SystemExit('the learner was asked')")
    monkeypatch.chdir(learner.parent)
    monkeypatch.setenv("PYTHONPATH", str(learner.parent))
    assert notes.truths(notes.read(ROPE)) == before


@pytest.mark.parametrize(
    ("answer", "reason"), [("1 / 0", "ZeroDivisionError"), ("math.inf", "inf"), ("_x", "NameError")]
)
def test_an_answer_that_fails_is_named(copied, answer, reason):
    copied("rotary_table(128, 32768, 1e6).nbytes", answer, "answers.toml")
    with pytest.raises(ValueError, match=f"rope.md: the answer of table-bytes .*{reason}"):
        notes.truths(notes.read(ROPE))


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("---\n", "", "line 1: it does not begin with front matter"),
        ("unit: score", "unit: score: x", "line 12: the front matter is no YAML"),
        ("lab: week1/rope", "lab: week1/gqa", "lab is 'week1/gqa', not 'week1/rope'"),
        ("predict:", "predicted:", "predict is no list of 3 questions"),
        ("    unit: score\n", "", "question 2: its fields are not id, ask, unit"),
        ("unit: score", "unit:", "question 2: unit is empty"),
        ("unit: score", "unit: score\n    hint: no", "question 2: its fields are not"),
        ("id: moved-score", "id: period", "two questions have the same id"),
        ("id: moved-score", "id: moved score", "question 2: id 'moved score'"),
        ("tolerance: 5 %", "tolerance: 5 percent", "question 2: tolerance '5 percent' is none of"),
        ("tolerance: 10x", "tolerance: 0.1x", "question 1: tolerance '0.1x' is a factor below 1"),
        ("Hint 2: rotary_table", "Hint 2: table", r"line 85: a hint for table, which is none of"),
        ("</details>", "", "line 79: a hint is <details>"),
        ("Hint 1: rotary_table", "rotary_table", "line 79: a hint is <details>"),
        ("Transfer:", "Last:", "no item begins with Transfer:"),
        ("## Exit ticket", "## Ticket", "the section ## Exit ticket is missing"),
    ],
)
def test_a_malformed_note_is_refused(copied, old, new, problem):
    copied(old, new)
    with pytest.raises(ValueError, match=r"^sessions/week1/rope\.md, ") as caught:
        notes.read(ROPE)
    assert re.search(problem, str(caught.value)), caught.value


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            "rotary_table(128",
            "return (128",
            r"answers.toml: the answer of table-bytes is no Python",
        ),
        (
            "table-bytes =",
            "table_bytes =",
            r"question 3: answers.toml has no answer to table-bytes",
        ),
        ("[gqa]", "more = '1'\n[gqa]", r"answers.toml answers what is not asked: more"),
        ("[rope]", "[rope", r"answers.toml cannot be read"),
    ],
)
def test_a_malformed_answer_is_refused(copied, old, new, problem):
    copied(old, new, "answers.toml")
    with pytest.raises(ValueError, match=problem):
        notes.read(ROPE)


def test_an_empty_hint_and_a_missing_note(copied):
    text = re.sub(r"(Hint 3.*</summary>)[^<]*", r"\1\n\n", ROPE.note.read_text(encoding="utf-8"))
    ROPE.note.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"rope\.md, line \d+: the hint is empty"):
        notes.read(ROPE)
    ROPE.note.unlink()
    with pytest.raises(ValueError, match=r"^sessions/week1/rope\.md does not exist$"):
        notes.read(ROPE)


@pytest.mark.parametrize(
    ("tolerance", "truth", "inside", "outside"),
    [
        ("10x", 4e6, (4e5, 4e6, 4e7), (3.9e5, 4.1e7, -4e6, 0)),
        ("10x", -2, (-0.2, -20), (-0.1, -21, 2)),
        ("5 %", -0.8, (-0.84, -0.76), (-0.85, 0.8, 0)),
        ("0", 34, (34, 34.0), (33, 34.001)),
        ("1e-4", 0, (0.0001, -0.0001), (0.0002,)),
    ],
)
def test_tolerances(tolerance, truth, inside, outside):
    parsed = notes.parse_tolerance(tolerance)
    assert all(parsed.accepts(number, truth) for number in inside)
    assert not any(parsed.accepts(number, truth) for number in outside)


@pytest.mark.parametrize("week", GROUPS)
def test_links_lead_somewhere(week):
    for page in [ROOT / "README.md", *sorted((ROOT / "sessions" / week).glob("*.md"))]:
        text = without_code(page.read_text(encoding="utf-8"))
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("week", GROUPS)
def test_the_week_lists_its_labs(week):
    text = (ROOT / "sessions" / week / "README.md").read_text(encoding="utf-8")
    places = [text.index(f"({stem}.md)") for stem in GROUPS[week]]
    assert places == sorted(places)
