"""`course predict` asks before the lab, tells after it, and never lets the truth slip out."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from course import predict
from course.labs import ROOT

LAB = "week1/attention"
IDS = ("largest-weight", "shift", "allowed-pairs")
TRUTHS = ("0.6323", "34")
SUITE = f"""
from course.grading import lab


def test_it():
    assert lab("{LAB}").DONE
"""
on_a_terminal = pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")


@pytest.fixture
def course(tree):
    """The copy with session notes, where attention is graded by one quick test."""
    shutil.copytree(ROOT / "sessions", tree.root / "sessions")
    tree.write(f"tests/{LAB.replace('/', '/test_')}.py", SUITE)
    return tree


def events(tree) -> list[dict]:
    files = sorted(tree.root.glob("progress/log/*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [event for event in lines if event["kind"] in ("predict", "ticket")]


def answer(tree, *answers: str):
    options = [word for text in answers for word in ("--answer", text)]
    return tree.run("course", "predict", LAB, *options)


def type_into(tree, keys: str) -> tuple[int, str]:
    """Run `course predict` on a pseudo-terminal; returns its status and what stood there."""
    import pty

    kept = {k: v for k, v in os.environ.items() if not k.startswith(("COURSE_", "PYTEST_"))}
    kept.pop("PYTHONPATH", None)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "course", "predict", LAB],
        cwd=tree.root,
        env={**kept, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    os.write(ours, f"{keys}\x04".encode())  # end of input: one prompt too many must not hang
    output = b""
    try:
        while read := os.read(ours, 4096):
            output += read
    except OSError:  # Linux says so when the other end is closed
        pass
    os.close(ours)
    return process.wait(timeout=60), output.decode().replace("\r\n", "\n")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1e6", 1e6),
        ("1,000,000", 1e6),
        ("1_000_000", 1e6),
        ("3/8", 0.375),
        ("2**20", 2**20),
        ("2^10", 1024),
        (" 2 · 3 ", 6),
        ("−4", -4),
        ("-(1 + 2) * .5", -1.5),
        ("1,024 * 4", 4096),
        ("12 %", 0.12),
    ],
)
def test_numbers_are_read_generously(text, number):
    assert predict.parse_number(text) == number


@pytest.mark.parametrize(
    "text",
    [
        *("", "about", "about 5", "x", "5 bytes", "nan", "inf", "True", "'a'", "[1]", "exit()"),
        *("0,5", "1,00", "12345,678", "1.000.000", "%", "1 if 1 else 2", "1j", "(-8)**0.5"),
        *("(" * 50, "1" * 100),
    ],
)
def test_what_is_no_number_is_refused_in_a_sentence(text):
    with pytest.raises(ValueError, match=r"is not a number: write 1e6, .* A guess is welcome"):
        predict.parse_number(text)


@pytest.mark.parametrize("text", ["1e999", "1/0", "9**9**9", "-1e308*10"])
def test_what_is_not_finite_is_refused(text):
    with pytest.raises(ValueError, match="is not a finite number"):
        predict.parse_number(text)


@pytest.mark.parametrize(
    ("number", "text"),
    [(34.0, "34"), (16777216.0, "16,777,216"), (4080185.1, "4,080,185"), (-0.83229, "-0.8323")],
)
def test_numbers_are_written_for_readers(number, text):
    assert predict.shown(number) == text


def test_before_the_lab(course):
    asked = answer(course)
    assert asked.returncode == 1 and not events(course)
    for id in IDS:
        assert f"\n{id}: " in asked.stdout
    assert "unit: fraction" in asked.stdout
    assert f"course predict {LAB} --answer {IDS[0]}=NUMBER:CONFIDENCE" in asked.stdout

    some = answer(course, f"{IDS[0]}=7/10:4", f"{IDS[1]}=1e-3:2")
    assert some.returncode == 1 and "Open questions are left" in some.stdout
    again = answer(course, f"{IDS[0]}=0.5:1", f"{IDS[2]}=30:5")
    assert again.returncode == 0
    assert f"{IDS[0]}: your first answer counts: 0.7, confidence 4 of 5" in again.stdout
    assert "The truth is shown when the lab is green" in again.stdout
    kept = [(event["id"], event["answer"], event["confidence"]) for event in events(course)]
    assert kept == [(IDS[0], 0.7, 4), (IDS[1], 0.001, 2), (IDS[2], 30, 5)]
    assert not any(event["late"] for event in events(course))

    everything = asked.stdout + some.stdout + again.stdout + answer(course).stdout
    assert all(len(line) <= 80 for line in everything.splitlines())
    assert not any(truth in everything for truth in TRUTHS)
    assert "inside" not in everything and "outside" not in everything


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ("largest=1:3", "has no question 'largest'; it has largest-weight, shift, allowed-pairs"),
        ("shift=1:6", "a confidence is a whole number from 1 to 5, not '6'"),
        ("shift=1:0", "not '0'"),
        ("shift=1:2.5", "not '2.5'"),
        ("shift=about 1:3", "'about 1' is not a number"),
        ("shift=nan:3", "'nan' is not a number"),
        ("shift=1e999:3", "'1e999' is not a finite number"),
        ("shift=28:3", "a fraction lies between 0 and 1, not at 28; write 0.28 or 28 %"),
        ("shift=1", "has not the form ID=NUMBER:CONFIDENCE"),
        (f"{IDS[0]}=1:1", f"given twice for {IDS[0]}"),
    ],
)
def test_bad_answers_are_refused_and_nothing_is_kept(course, bad, sentence):
    result = answer(course, f"{IDS[0]}=1:1", bad)
    assert result.returncode == 2
    assert result.stdout.startswith("course: ") and sentence in result.stdout
    assert len(result.stdout.splitlines()) == 1
    assert not events(course)


def test_the_first_of_two_logged_answers_counts(course):
    answer(course, "shift=0.25:2")
    (log,) = course.root.glob("progress/log/*.jsonl")
    second = log.read_text().replace("0.25", "0.75")  # as from a merge of two clones
    log.write_text(log.read_text() + second)
    assert "shift: you said 0.25" in answer(course).stdout


@on_a_terminal
def test_on_a_terminal_before_the_lab(course):
    status, shown = type_into(course, "about a half\n0.5\n7\n2\n\n30\n5\n")
    assert status == 1
    assert "'about a half' is not a number" in shown
    assert "a confidence is a whole number from 1 to 5, not '7'" in shown
    assert "you said 0.5, confidence 2 of 5" in shown
    assert [event["id"] for event in events(course)] == [IDS[0], IDS[2]]  # one was skipped
    status, shown = type_into(course, "")
    assert status == 1
    assert IDS[0] not in shown and IDS[1] in shown
    assert "Stopped here. What you answered is kept" in shown and "Traceback" not in shown
    assert len(events(course)) == 2
    status, shown = type_into(course, "1\n1\n")
    assert status == 0 and len(events(course)) == 3
    assert not any(truth in shown for truth in TRUTHS)


def test_after_the_lab(course):
    answer(course, f"{IDS[0]}=0.9:2", f"{IDS[1]}=0.001:4")
    course.write(f"code/{LAB}.py", "DONE = False\n")
    red = answer(course)
    assert red.returncode == 1 and not any(truth in red.stdout for truth in TRUTHS)

    course.write(f"code/{LAB}.py", "DONE = True\n")
    green = answer(course)
    assert green.returncode == 1
    assert "do not count" in green.stdout
    # The unsure miss is told. What was not answered, and the sure miss, keep their truths.
    assert "you said  0.9, confidence 2 of 5: outside the tolerance" in green.stdout
    assert "truth     0.6323 (tolerance: 10 % either way)" in green.stdout
    assert "Which step of your reasoning gave 0.9?" in green.stdout
    assert green.stdout.count("truth  ") == 1 and "34" not in green.stdout
    assert "Explain to somebody who knows what a weighted average is" in green.stdout
    ticket = green.stdout.split("Exit ticket of")[1]
    assert "You said 0.001, confidence 4 of 5" in ticket
    assert f"--answer {IDS[1]}=NUMBER:CONFIDENCE" in ticket
    assert all(len(line) <= 80 for line in green.stdout.splitlines())

    settled = answer(course, f"{IDS[1]}=0.63:3", f"{IDS[2]}=34:5", f"{IDS[0]}=0.6:5")
    assert settled.returncode == 0
    assert f"{IDS[0]}: your first answer counts" in settled.stdout
    assert settled.stdout.count("truth  ") == 3
    assert "You were sure of 0.001 and it is 0.6323." in settled.stdout
    late, ticket = events(course)[-1], events(course)[-2]
    assert (late["kind"], late["id"], late["late"]) == ("predict", IDS[2], True)
    assert (ticket["kind"], ticket["id"], ticket["right"]) == ("ticket", IDS[1], True)
    count = len(events(course))
    assert answer(course, f"{IDS[1]}=0.1:5").returncode == 0
    assert len(events(course)) == count


@on_a_terminal
def test_on_a_terminal_after_the_lab(course):
    course.write(f"code/{LAB}.py", "DONE = True\n")
    # A sure miss, a skipped question, a hit; then the exit ticket, missed again.
    status, shown = type_into(course, "0.99\n5\n\n34\n4\n0.9\n1\n")
    assert status == 0, shown
    results, ticket = shown.split("Exit ticket of")
    assert results.count("truth  ") == 2
    assert "34, confidence 4 of 5: inside the tolerance" in results
    assert "You said 0.99, confidence 5 of 5" in ticket
    assert ticket.index("your number") < ticket.index("truth  ")
    assert "then      0.9, confidence 1 of 5: outside the tolerance" in ticket
    assert "Which step of your reasoning gave 0.99?" in " ".join(ticket.split())
    assert [event.get("late") for event in events(course)] == [True, True, None]
    assert events(course)[-1]["right"] is False
