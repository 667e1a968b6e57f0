"""The tutor's protocol holds together, and its linter says of labelled sessions what it says."""

import ast
import json
import re
import subprocess
import sys

import pytest

from course import leaks, stubs, transcripts
from course.labs import ROOT, all_labs, find_labs, week_labs

AGENTS = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
EVERY = transcripts.fixtures()
# A loop without an end, an exit, and what a name in __all__ of another lab must not break.
ACCIDENTS = """
## Tutor
```python
def rotary_table(head_dim, num_positions, theta, device=None):
    while True:
        pass
def apply_rotary(x, positions, table):
    import os
    os._exit(0)
```
What does it do?
"""


def exchange(number: int) -> str:
    """Return one of the sample exchanges of AGENTS.md as a transcript."""
    samples = re.findall(r"(?:^> .*\n)+", AGENTS, re.MULTILINE)
    text = samples[number].replace("> ", "", 1).replace("\n> ", "\n")
    return f"---\nlab: week1/attention\n---\n{text}"


@pytest.fixture(scope="module")
def kinds() -> dict[str, set[str]]:
    """Lint everything that has code in one go; kinds of findings by name."""
    parsed = {
        **EVERY,
        "good exchange": transcripts.parse(exchange(0), "AGENTS.md"),
        "bad exchange": transcripts.parse(exchange(1), "AGENTS.md"),
        "accidents": transcripts.parse(f"---\nlab: week1/rope\n---\n{ACCIDENTS}", "accidents"),
    }
    results = transcripts.check(list(parsed.values()))
    return {
        name: {finding.kind for finding in found}
        for name, found in zip(parsed, results, strict=True)
    }


def dialogue_kinds(text: str, lab: str = "week1/attention") -> list[str]:
    """Lint a transcript that holds no code."""
    (findings,) = transcripts.check([transcripts.parse(f"---\nlab: {lab}\n---\n{text}", "text")])
    return [finding.kind for finding in findings]


# The protocol.


def test_claude_imports_agents_and_says_at_most_one_sentence_more():
    lines = (ROOT / "CLAUDE.md").read_text(encoding="utf-8").split("\n")
    assert lines[0] == "@AGENTS.md"
    rest = " ".join(lines[1:]).strip()
    assert len(re.findall(r"[.!?](?:\s|$)", rest)) <= 1 and len(rest) < 200


def test_agents_separates_its_two_readers():
    titles = re.findall(r"^# (.+)$", re.sub(r"```.*?```", "", AGENTS, flags=re.DOTALL), re.M)
    assert titles[-2:] == ["Tutoring a learner", "Maintaining the course"]
    opening = AGENTS.partition("# Tutoring a learner")[0]
    assert "unless somebody told you otherwise" in opening


@pytest.mark.parametrize(
    "word", ["hint", "提示", "smaller", "小一点", "example", "举例", "tell me", "直接告诉我"]
)
def test_every_command_of_the_learner_is_explained(word):
    table = AGENTS.partition("## What the learner can say")[2].partition("\n## ")[0]
    assert f"`{word}`" in table


def test_every_command_and_every_file_of_agents_exists():
    done = subprocess.run(
        [sys.executable, "-m", "course", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    words = set(re.findall(r"^    (\S+)", done.stdout, re.MULTILINE))
    named = set(re.findall(r"(?:^ *|`)course ([a-z-]+)", AGENTS, re.MULTILINE))
    assert {"hint", "reveal", "status", "mutants"} <= named <= words
    paths = re.findall(r"`((?:[\w.-]+/)+[\w.-]*|[A-Z-]+\.md)`", AGENTS)
    made_later = ("progress/", "code/week1/LAB.py", "sessions/week1/LAB.md")
    assert len(paths) > 10
    for path in paths:
        assert path.startswith(made_later) or (ROOT / path).exists(), path


def test_the_settings_deny_what_agents_says():
    settings = json.loads((ROOT / ".claude" / "settings.json").read_text(encoding="utf-8"))
    denied = settings["permissions"]["deny"]
    needed = {"Read(/solutions/**)", "Read(/tests/**/alternatives/**)"}
    assert needed | {"Edit(/tests/**)", "Edit(/course/**)"} <= set(denied)
    # Other rules about files are accepted and never looked at.
    assert all(re.fullmatch(r"(Read|Edit)\(/[\w.*/]+\)", rule) for rule in denied)
    assert "not a sandbox" in AGENTS


def test_the_template_of_a_session_log_is_in_both_languages():
    template = (ROOT / "SESSION-TEMPLATE.md").read_text(encoding="utf-8")
    titles = re.findall(r"^#+ (.+)$", template, re.MULTILINE)
    assert len(titles) >= 5
    assert all(re.search(r"[A-Za-z]+.* · .*[\u4e00-\u9fff]", title) for title in titles)


def test_the_sample_exchanges_are_what_they_are_called(kinds):
    assert kinds["good exchange"] == set()
    assert {"unproven-mastery", "no-question"} <= kinds["bad exchange"]


# The labelled transcripts.


def test_the_labels_are_complete():
    verdicts = [found.about["verdict"] for found in EVERY.values()]
    assert len(verdicts) >= 32 and min(map(verdicts.count, ("good", "bad"))) >= 16
    assert {found.lab for found in EVERY.values()} == {
        lab for lab in week_labs() if lab.week == "week1"
    }
    ways = [set(found.about["ways"]) for found in EVERY.values()]
    assert set().union(*ways) == set(transcripts.KINDS)


@pytest.mark.parametrize("name", EVERY)
def test_a_label_is_consistent(name):
    found = EVERY[name]
    ways, missed, alarms = (set(found.about.get(f, ())) for f in ("ways", "missed", "alarms"))
    assert (found.about["verdict"] == "bad") == bool(ways) == name.startswith("bad-")
    assert missed <= ways and not alarms & ways
    assert ways | alarms <= set(transcripts.KINDS)


@pytest.mark.parametrize("name", EVERY)
def test_the_linter_says_what_the_label_says(kinds, name):
    assert kinds[name] == transcripts.expected(EVERY[name])


def test_the_published_table_counts_what_was_measured(kinds):
    table = transcripts.confusion_table()
    bad = [name for name, found in EVERY.items() if found.about["verdict"] == "bad"]
    caught = [name for name in bad if kinds[name] - transcripts.WARNINGS]
    alarms = [name for name in set(EVERY) - set(bad) if kinds[name] - transcripts.WARNINGS]
    assert f"| bad | {len(caught)} | {len(bad) - len(caught)} |" in table
    assert f"| good | {len(alarms)} | {len(EVERY) - len(bad) - len(alarms)} |" in table
    leaking = [name for name in EVERY if "leak" in EVERY[name].about["ways"]]
    found = sum("leak" in kinds[name] for name in leaking)
    assert f" | {len(leaking)} | {found} | {len(leaking) - found} | 0 |" in table


def test_code_that_never_ends_or_leaves_is_graded_all_the_same(kinds):
    assert kinds["accidents"] == set()


# Overlap, in every lab.


def graded_functions():
    """Every function that a learner writes, with the lab and its text in the reference."""
    for lab in all_labs():
        source = lab.solution.read_text(encoding="utf-8")
        tops = {node.name: node for node in ast.parse(source).body if hasattr(node, "name")}
        for name in stubs.graded_names(lab):
            yield pytest.param(lab, ast.unparse(tops[name]), id=f"{lab.stem}-{name}")


def overlaps(lab, text: str) -> list[leaks.Leak]:
    said = leaks.fragments([(1, f"```python\n{text}\n```", True)], lab)
    return leaks.overlaps(said, lab)


@pytest.mark.parametrize(("lab", "text"), list(graded_functions()))
def test_a_reference_under_other_names_overlaps(lab, text):
    renamed = re.sub(r"\b(scores|weights|total|mask|angles|x|q|k|v|text|logits)\b", r"my_\1", text)
    assert overlaps(lab, text) and overlaps(lab, renamed)


@pytest.mark.parametrize("lab", all_labs(), ids=lambda lab: lab.stem)
def test_what_the_learner_has_anyway_does_not_overlap(lab):
    assert not overlaps(lab, stubs.make_stub(lab))


def test_what_the_learner_wrote_before_is_no_leak_of_the_tutor():
    (lab,) = find_labs("week1/attention")
    line = "`x.transpose(-3, -2).flatten(-2)`"
    assert leaks.fragments([(1, line, True)], lab)
    assert not leaks.fragments([(1, line, False), (2, f"What does {line} do?", True)], lab)


# The rules about the dialogue.

ASK = "What do you expect?"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"Tutor: {ASK}", []),
        ("Tutor: Think about it.", ["no-question"]),
        ("导师: 你觉得呢？", []),
        ("导师: 想一想。", ["no-question"]),
        (f"Tutor: Look.\n\n**{ASK}**", []),
        (f"Tutor: {ASK}\n\n```\nprint(x.shape)\n```", []),
        (f"Tutor: Really? Why? {ASK}", ["many-questions"]),
        ("Tutor: Why `x?` and `y?`, what is it?", []),
        (f"Tutor: {ASK}\n\nLearner: x\n\nTutor: It is in `progress/log/2026-03-02-rope.md`.", []),
        ("Tutor: It is in `progress/log/a.md`.\n\nLearner: x\n\nTutor: Why?", ["no-question"]),
        (f"Learner: [graded: 85/86]\n\nTutor: It is green. {ASK}", ["unproven-mastery"]),
        (f"Learner: [graded: 86/86]\n\nTutor: It is green. {ASK}", []),
        (f"Learner: [graded: 85/86]\n\nTutor: When it is green, tell me. {ASK}", []),
        ("Learner: [graded: 85/86]\n\nTutor: Do you think it is green?", []),
        (f"Learner: [graded: 86/86]\n\nTutor: You've mastered it. {ASK}", ["unproven-mastery"]),
        ("学生: [graded: 1/86]\n\n导师: 你已经掌握了。下一步呢？", ["unproven-mastery"]),
        (f"Tutor: Here is the solution: … {ASK}", ["early-reveal"]),
        (f"Learner: [graded: 86/86]\n\nTutor: Here is the reference, too. {ASK}", []),
        ("Tutor: `course reveal week1/rope` opens after three graded attempts. Why?", []),
        ("Learner: [revealed]\n\nTutor: Why?", ["early-reveal"]),
        ("Learner:\n[graded: 1/9]\n[graded: 2/9]\n[graded: 3/9]\n[revealed]\n\nTutor: Why?", []),
    ],
)
def test_one_rule_at_a_time(text, found):
    assert dialogue_kinds(text) == found


SECOND_RUNG = "Tutor: Hint 2: softmax. Where is the first NaN?"


@pytest.mark.parametrize(
    ("before", "found"),
    [
        ("Learner: hint", ["rung-skipped"]),
        ("Learner: [hint: softmax 1]", ["rung-skipped"]),
        ("Learner:\n[hint: softmax 1]\n[graded: 3/86]", []),
        ("Learner:\n[graded: 3/86]\n[hint: softmax 1]", ["rung-skipped"]),
        ("Learner:\n[hint: attention 1]\n[graded: 3/86]", ["rung-skipped"]),
        ("Learner:\n[hint: softmax 2]", []),
    ],
)
def test_a_rung_needs_the_one_before_and_an_attempt(before, found):
    assert dialogue_kinds(f"{before}\n\n{SECOND_RUNG}") == found


# The file.


def test_a_heading_in_code_begins_no_turn():
    text = "## Tutor\n```\n## Learner\nTutor: x\n```\nWhy?\n## Learner\nBecause.\n"
    turns = transcripts.parse(text, "text").turns
    assert [(turn.number, turn.is_tutor) for turn in turns] == [(1, True), (2, False)]


def test_the_lab_is_found_in_the_text_where_no_front_matter_names_it():
    assert transcripts.parse("Tutor: In code/week1/gqa.py: why?", "text").lab.stem == "gqa"
    assert transcripts.parse("Tutor: Why?", "text").lab is None


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read: No such file"),
        (b"", "has no turn of a tutor"),
        (b"Learner: hello?\n", "has no turn of a tutor"),
        (b"---\nlab: week1/nothing\n---\nTutor: Why?\n", "'week1/nothing', which is no lab"),
        (b"---\nlab: week1\n---\nTutor: Why?\n", "'week1', which is no lab"),
        (b"---\nlab: [\n---\nTutor: Why?\n", "is no YAML"),
        (b"---\nwords\n---\nTutor: Why?\n", "has no fields"),
        (b"Tutor: \xff?\n", "is no UTF-8 text"),
    ],
)
def test_an_unusable_file_is_refused_in_one_sentence(tmp_path, content, sentence):
    path = tmp_path / "session.md"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        transcripts.lint(path, as_json=False)


def run_lint(name: str, as_json: bool) -> subprocess.CompletedProcess:
    path = str(transcripts.FIXTURES / f"{name}.md")
    code = "import sys; from pathlib import Path; from course import transcripts; "
    code += f"sys.exit(transcripts.lint(Path({path!r}), as_json={as_json}))"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_the_command_prints_findings_by_turn_and_says_no():
    done = run_lint("bad-answer-in-a-question", as_json=False)
    assert done.returncode == 1 and not done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].endswith("2 turns about week1/attention")
    assert [line.split()[:3] for line in lines[1:-1]] == [
        ["turn", "2", "leak:"],
        ["turn", "2", "overlap:"],
    ]
    assert "split_heads" in lines[1]
    assert lines[-1] == "2 findings, 0 warnings"


def test_the_command_prints_json_and_says_yes():
    done = run_lint("good-tell-me", as_json=True)
    assert done.returncode == 0 and not done.stderr
    summary = json.loads(done.stdout)
    assert summary["lab"] == "week1/sampling" and summary["turns"] == 6
    assert summary["findings"] == []
