"""The progress log loses nothing, and whatever lies in it, it can be read."""

import json
import subprocess
import sys
from datetime import UTC, datetime

import pytest

from course import labs, progress
from course.labs import ROOT, Lab

ROPE = Lab("week1", "rope")
HINT = {"time": "2026-03-01T10:00:00+00:00", "kind": "hint", "lab": "week1/rope"}
HINT |= {"name": "apply_rotary", "rung": 1}
WRITER = """
import sys
from pathlib import Path
from course import progress
from course.labs import Lab
root = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
progress.LOG, progress._LOCK = root / "progress" / "log", root / ".course" / "progress.lock"
for number in range(50):
    progress.append("hint", Lab("week1", "rope"), name=f"{sys.argv[2]}-{number}", rung=number)
"""


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """An empty clone whose log is the one that is read and written."""
    monkeypatch.setattr(labs, "ROOT", tmp_path)
    monkeypatch.setattr(progress, "ROOT", tmp_path)
    monkeypatch.setattr(progress, "LOG", tmp_path / "progress" / "log")
    monkeypatch.setattr(progress, "_LOCK", tmp_path / ".course" / "progress.lock")
    return tmp_path


def write(clone, *lines: object, name: str = "2026-03") -> None:
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    folder = clone / "progress" / "log"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_bytes(b"\n".join(texts) + b"\n")


def test_without_a_log_there_are_no_events(clone):
    assert progress.read() == ([], [])


def test_what_is_appended_is_read_back(clone):
    start = datetime.now(UTC).replace(microsecond=0)
    progress.append("predict", ROPE, id="period", answer=6e6, confidence=4)
    progress.append("reveal", ROPE, delegated=True)
    events, problems = progress.read()
    assert problems == []
    assert [event["kind"] for event in events] == ["predict", "reveal"]
    assert (events[0]["answer"], events[0]["confidence"], events[0]["id"]) == (6e6, 4, "period")
    assert start <= datetime.fromisoformat(events[0]["time"]) <= datetime.now(UTC)


def test_a_run_is_known_by_the_content_of_the_file(clone):
    ROPE.code.parent.mkdir(parents=True)
    for text in ("one", "two", "one"):
        ROPE.code.write_text(text)
        progress.append_run(ROPE, passed=1, total=3, seconds=0.5, at="rotary_table")
    progress.append("hint", ROPE, name="apply_rotary", rung=1)
    progress.append_run(ROPE, passed=3, total=3, seconds=0.5, at="")
    runs = progress.of(progress.read()[0], ROPE, "run")
    hashes = [run["hash"] for run in runs]
    assert hashes[0] == hashes[2] == hashes[3] != hashes[1]
    assert [run["hints"] for run in runs] == [0, 0, 0, 1]


def test_four_processes_lose_no_event(clone):
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(clone), str(who)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for who in range(4)
    ]
    for writer in writers:
        writer.stdout.readline()
    for writer in writers:  # all at once, when all of them are ready
        writer.stdin.write(b"go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=120)
    assert [writer.returncode for writer in writers] == [0] * 4
    lines = [line for file in progress.LOG.iterdir() for line in file.read_bytes().splitlines()]
    events = [json.loads(line) for line in lines]
    assert len(events) == 200
    for who in range(4):
        own = [event["rung"] for event in events if event["name"].startswith(f"{who}-")]
        assert own == list(range(50))
    assert progress.read()[1] == []


def test_a_line_that_was_cut_off_does_not_swallow_the_next(clone):
    progress.append("hint", ROPE, name="a", rung=1)
    (file,) = progress.LOG.iterdir()
    file.write_bytes(file.read_bytes() + b'{"time": "2026-0')
    progress.append("hint", ROPE, name="b", rung=2)
    events, problems = progress.read()
    assert [event["name"] for event in events] == ["a", "b"]
    (problem,) = problems
    assert f"{file.name}, line 2 is left out" in problem


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b"3",
        b'{"kind": ["run"]}',
        {**HINT, "kind": "party"},
        {**HINT, "rung": "1"},
        {**HINT, "rung": True},
        {**HINT, "lab": None},
        {**HINT, "time": "yesterday"},
        {**HINT, "time": "2026-03-01T10:00:00"},
        {**HINT, "time": "0001-01-01T00:00:00+14:00"},
        {
            **HINT,
            "kind": "run",
            "passed": 4,
            "total": 3,
            "hash": "a",
            "seconds": 1,
            "hints": 0,
            "at": "",
        },
        {
            **HINT,
            "kind": "run",
            "passed": -1,
            "total": 3,
            "hash": "a",
            "seconds": 1,
            "hints": 0,
            "at": "",
        },
        {**HINT, "kind": "predict", "id": "a", "answer": float("nan"), "confidence": 3},
        {**HINT, "kind": "predict", "id": "a", "answer": 10**400, "confidence": 3},
        {**HINT, "kind": "predict", "id": "a", "answer": 1, "confidence": 6},
        {**HINT, "kind": "x" * 10_000},
    ],
    ids=lambda line: repr(line)[:40],
)
def test_a_corrupt_line_costs_one_short_sentence_and_nothing_else(clone, line):
    write(clone, HINT, line, HINT)
    before = (clone / "progress/log/2026-03.jsonl").read_bytes()
    events, problems = progress.read()
    assert events == [HINT, HINT]
    (problem,) = problems
    assert problem.startswith("progress/log/2026-03.jsonl, line 2 is left out: ")
    assert len(problem) < 200 and "\n" not in problem
    assert (clone / "progress/log/2026-03.jsonl").read_bytes() == before


def test_files_that_are_no_log_cost_one_sentence_each(clone):
    write(clone, HINT)
    write(clone, *(bytes([number]) * 20 for number in range(128, 160)), name="2026-01")
    (clone / "progress/log/2026-02.jsonl").mkdir()
    events, problems = progress.read()
    assert events == [HINT]
    assert problems[0] == (
        "progress/log/2026-01.jsonl is left out: none of its 32 lines is an event"
    )
    assert problems[1].startswith("progress/log/2026-02.jsonl is left out: ")
    assert len(problems) == 2


def test_events_come_in_the_order_of_their_times(clone):
    times = {
        "c": "2099-01-01T00:00:00+00:00",
        "b": "2026-03-01T12:00:00+02:00",
        "a": "2026-03-01T09:59:59.5+00:00",
    }
    write(clone, *({**HINT, "name": name, "time": time} for name, time in times.items()))
    events, problems = progress.read()
    assert problems == []
    assert [(event["name"], event["time"]) for event in events] == [
        ("a", "2026-03-01T09:59:59+00:00"),
        ("b", "2026-03-01T10:00:00+00:00"),
        ("c", "2099-01-01T00:00:00+00:00"),
    ]


SUITE = """
from course.grading import check_equal, lab

rope = lab("week1/rope")


def test_table():
    check_equal(rope.rotary_table(2), 4, "the table")


def test_rotation():
    check_equal(rope.apply_rotary(2), 4, "the rotation")
"""


def logged(tree) -> list[dict]:
    files = sorted(tree.root.glob("progress/log/*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_graded_runs_are_noted_once_each(tree):
    tree.write("tests/week1/test_rope.py", SUITE)
    path = f"code/{ROPE.name}.py"
    tree.pytest(path)
    assert logged(tree) == []  # an untouched stub is no attempt
    tree.write(path, "def rotary_table(x): return 4\ndef apply_rotary(x): return x\n")
    tree.pytest(path)
    tree.pytest(path, "--no-log")
    tree.run("course", "status")
    (event,) = logged(tree)
    expected = {"kind": "run", "lab": ROPE.name, "passed": 1, "total": 2, "hints": 0}
    assert event.items() >= expected.items() and event["at"] == "apply_rotary"
    tree.pytest(path, "-n", "2")
    tree.pytest(path, "-k", "table")
    assert [(e["passed"], e["total"], e["at"]) for e in logged(tree)[1:]] == [
        (1, 2, "apply_rotary"),
        (1, 1, ""),
    ]
    assert tree.pytest(f"solutions/{ROPE.name}.py", "-k", "table").returncode == 1
    assert len(logged(tree)) == 3  # the reference's runs are nobody's progress
