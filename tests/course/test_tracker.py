"""The tracker tells from the log what happened, and from a fresh grade what is true."""

import json
import unicodedata
from dataclasses import asdict
from datetime import UTC, datetime, timedelta

import pytest

from course import labs, notes, progress, tracker
from course.labs import Lab
from course.status import Grade

ATTENTION, ROPE, GQA = (Lab("week1", stem) for stem in ("attention", "rope", "gqa"))
CACHE = Lab("week2", "kv_cache")
GREEN = Grade("green", 30, 30)
OPEN = Grade("not started")
NOTE = """---
lab: {name}
predict:
  - {{id: one, ask: "Of 1?", unit: none, tolerance: "0"}}
  - {{id: two, ask: "Of 2?", unit: none, tolerance: "10 %"}}
  - {{id: ten, ask: "Of 10?", unit: none, tolerance: 2x}}
---
# A lab

## Check yourself
1. Transfer: and of 7?

## Exit ticket
Explain it.
"""
ANSWERS = "".join(
    f"[{stem}]\none = 'double(0.5)'\ntwo = 'double(1)'\nten = 'double(5)'\n"
    for stem in ("attention", "rope", "gqa", "kv_cache")
)
START = datetime(2026, 3, 1, 10, tzinfo=UTC)


def at(minute: float, kind: str, lab: Lab = ROPE, **fields) -> dict:
    time = (START + timedelta(minutes=minute)).isoformat(timespec="seconds")
    return {"time": time, "kind": kind, "lab": lab.name, **fields}


def run(minute: float, passed: int, total: int = 30, hash: str = "", lab: Lab = ROPE) -> dict:
    fields = {"passed": passed, "total": total, "hash": hash or f"file-{minute}"}
    return at(minute, "run", lab, **fields, seconds=1.0, hints=0, at="")


def hint(minute: float, lab: Lab = ROPE) -> dict:
    return at(minute, "hint", lab, name="apply_rotary", rung=1)


def say(minute: float, id: str, number: float, confidence: int = 3, **fields) -> dict:
    return at(minute, "predict", id=id, answer=number, confidence=confidence, **fields)


def bench(minute: float, medal: str) -> dict:
    return at(minute, "bench", ratio=1.2, medal=medal)


RIGHT = [say(0, "one", 1), say(1, "two", 2.1), say(2, "ten", 18)]


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone with a note for each lab, into which the tracker writes."""
    for module in (labs, notes, progress):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(progress, "LOG", tmp_path / "progress" / "log")
    monkeypatch.setattr(tracker, "FOLDER", tmp_path / "progress")
    monkeypatch.setattr(tracker, "CACHE", tmp_path / ".course" / "predictions.json")
    for lab in (ATTENTION, ROPE, GQA, CACHE):
        source = '__all__ = ["double"]\n\n\ndef double(x):\n    return 2 * x\n'
        note = NOTE.format(name=lab.name)
        for path, text in ((lab.note, note), (lab.solution, source), (lab.answers, ANSWERS)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return tmp_path


@pytest.fixture
def truths(clone, monkeypatch):
    """The truths of NOTE without a process; holds the labs they were computed for."""
    asked = []

    def compute(note):
        asked.append(note.lab)
        return {"one": 1.0, "two": 2.0, "ten": 10.0}

    monkeypatch.setattr(notes, "truths", compute)
    return asked


def give_medal(lab: Lab) -> None:
    lab.misconceptions.parent.mkdir(parents=True, exist_ok=True)
    lab.misconceptions.write_text("[medal]\nbronze = 0.5\n")


def log(clone, events: list[dict]) -> None:
    folder = clone / "progress" / "log"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "2026-03.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))


def written(clone) -> dict[str, str]:
    """The derived files, by their paths below progress/."""
    folder = clone / "progress"
    return {
        file.relative_to(folder).as_posix(): file.read_text(encoding="utf-8")
        for file in sorted(folder.rglob("*.md"))
    }


def of_rope(events: list[dict], grade: Grade = GREEN) -> tracker.Standing:
    return tracker.standing({ROPE: grade}, events)[ROPE]


@pytest.mark.parametrize(
    ("events", "mastery"),
    [
        ([], ("green", "no hints")),
        ([run(9, 30)], ("green", "no hints")),
        ([hint(1), run(9, 30)], ("green",)),
        ([run(9, 30), hint(10)], ("green", "no hints")),
        # Passing a few chosen tests is no green run, so the hint came before.
        ([run(1, 3, total=3), hint(2), run(9, 30)], ("green",)),
        ([*RIGHT, run(9, 30)], ("green", "no hints", "predictions", "exit ticket")),
        (RIGHT, ("green", "no hints", "predictions", "exit ticket")),
        # One is missing, given late, changed, or wrong.
        ([*RIGHT[:2], run(9, 30)], ("green", "no hints")),
        ([*RIGHT[:2], run(9, 30), say(10, "ten", 10)], ("green", "no hints")),
        ([*RIGHT[:2], say(3, "ten", 10, late=True), run(9, 30)], ("green", "no hints")),
        ([*RIGHT[:2], say(3, "ten", 90), say(4, "ten", 10), run(9, 30)], None),
        ([*RIGHT[:2], say(3, "ten", 10), say(4, "ten", 90), run(9, 30)], "all"),
        ([*RIGHT[:2], say(3, "ten", 90, 3), run(9, 30)], None),
        # Sure and wrong: the exit ticket decides, and its first answer.
        ([*RIGHT[:2], say(3, "ten", 90, 4), run(9, 30)], ("green", "no hints")),
        (
            [*RIGHT[:2], say(3, "ten", 90, 4), run(9, 30), at(10, "ticket", id="ten", right=True)],
            None,
        ),
        (
            [
                *(*RIGHT[:2], say(3, "ten", 90, 4), run(9, 30)),
                *(at(10 + n, "ticket", id="ten", right=bool(n)) for n in range(2)),
            ],
            ("green", "no hints"),
        ),
        # Questions that the note does not ask are nobody's.
        ([*RIGHT, say(3, "eleven", 11), run(9, 30)], "all"),
        ([say(0, "eleven", 11), run(9, 30)], ("green", "no hints")),
        # Delegated.
        ([*RIGHT, run(9, 30), at(10, "reveal", delegated=False)], "all"),
        ([*RIGHT, at(8, "reveal", delegated=True), run(9, 30)], ("green",)),
        # Rope has no medal to win.
        ([bench(8, "gold"), run(9, 30)], ("green", "no hints")),
    ],
)
def test_mastery(truths, events, mastery):
    four = ("green", "no hints", "predictions", "exit ticket")
    expected = {None: ("green", "no hints", "exit ticket"), "all": four}.get(mastery, mastery)
    found = of_rope(events)
    assert found.mastery == expected
    assert found.max_stars == 4


@pytest.mark.parametrize("state", ["started", "not started", "reference"])
def test_a_log_that_claims_green_makes_no_lab_green(truths, state):
    events = [*RIGHT, run(9, 30)]
    found = of_rope(events, Grade(state, 0, 0))
    assert (found.state, found.mastery, found.predictions) == (state, (), {})
    assert tracker.board({ROPE: Grade(state)}, events).endswith("\n0 of 1 labs are green")
    assert truths == []  # and the truth is not computed before its time


@pytest.mark.parametrize("medal", ["gold", "silver", "bronze", "", "platinum"])
def test_a_medal_is_the_fifth_star(truths, medal):
    give_medal(ROPE)
    found = of_rope([*RIGHT, bench(8, medal), run(9, 30)])
    is_won = medal in tracker.MEDALS
    assert found.max_stars == 5
    assert ("medal" in found.mastery) == is_won
    assert found.medal == (medal if is_won else "")


def test_the_best_medal_counts(truths):
    give_medal(ROPE)
    events = [bench(1, "bronze"), bench(2, "gold"), bench(3, "silver"), run(9, 30)]
    assert of_rope(events).medal == "gold"
    (ROPE.misconceptions).write_text("[medal")
    assert of_rope(events).max_stars == 4


def test_attempts_are_different_files_up_to_the_first_green_one(truths):
    events = [
        *(run(1, 3, hash="a"), run(2, 3, hash="a"), run(3, 9, hash="b"), run(4, 3, hash="a")),
        *(hint(5), run(6, 30, hash="c"), run(7, 20, hash="d"), hint(8), run(9, 30, hash="e")),
    ]
    found = of_rope(events)
    assert (found.attempts, found.hints, found.hints_before_green) == (3, 2, 1)
    assert (found.hash, found.first_green) == ("c", "2026-03-01T10:06:00+00:00")
    assert of_rope(events[:5], Grade("started", 9, 30)).attempts == 2


def test_a_run_of_chosen_tests_dates_no_green(truths):
    assert of_rope([run(1, 2, total=2)]).first_green == ""
    after_reset = of_rope([run(1, 2, total=2), run(2, 30)], OPEN)
    assert after_reset.first_green == "2026-03-01T10:02:00+00:00"
    assert of_rope([run(1, 0, total=0)], OPEN).first_green == ""


def test_active_time_is_the_short_gaps_of_all_labs_together(truths):
    events = [
        *(run(0, 1), run(10, 1, lab=GQA), run(25, 1), run(40.02, 1), hint(41.02, GQA)),
        *(run(500, 1, lab=GQA), run(505, 1, lab=GQA)),
    ]
    standings = tracker.standing({ROPE: OPEN, GQA: OPEN, ATTENTION: OPEN}, reversed(events))
    seconds = {lab.stem: found.seconds for lab, found in standings.items()}
    assert seconds == {"gqa": (10 + 1 + 5) * 60, "rope": 15 * 60, "attention": 0}


@pytest.mark.parametrize(
    ("minutes", "text"), [(0, "0 min"), (59.9, "59 min"), (60, "1 h 0 min"), (80, "1 h 20 min")]
)
def test_durations(truths, minutes, text):
    events = [run(14 * step, 1) for step in range(int(minutes // 14) + 1)]
    events.append(run(minutes, 1))
    assert tracker.board({ROPE: Grade("started", 1, 30)}, events).splitlines()[1].endswith(text)


def test_truths_are_computed_once_for_each_content(truths):
    of_rope([run(9, 30)])
    assert truths == []  # no answers, nothing to compare
    first = of_rope([*RIGHT, run(9, 30)])
    assert of_rope([*RIGHT, run(9, 30)]) == first
    assert truths == [ROPE]
    of_rope([say(0, "one", 7), *RIGHT, run(9, 30)])
    ROPE.note.write_text(NOTE.format(name=ROPE.name) + "\nMore.\n")
    of_rope([*RIGHT, run(9, 30)])
    ROPE.solution.write_text('__all__ = ["double"]\n')
    of_rope([*RIGHT, run(9, 30)])
    assert len(truths) == 4
    tracker.CACHE.write_text("[1]")
    assert of_rope([*RIGHT, run(9, 30)]) == first


def test_the_cache_holds_outcomes_and_no_truth(truths):
    of_rope([say(0, "one", 7), say(1, "two", 2), run(9, 30)])
    ((outcome),) = json.loads(tracker.CACHE.read_text()).values()
    assert outcome == {"one": False, "two": True, "ten": None}


def test_a_broken_note_is_said_in_a_sentence(clone):
    log(clone, [*RIGHT, run(9, 30)])
    ROPE.note.write_text("# no front matter\n")
    (problem,) = tracker.write({ROPE: GREEN})
    assert problem.startswith("the predictions of week1/rope could not be checked: sessions/week1")
    assert "★★ of 4" in written(clone)["tracker.md"]


def test_the_truths_of_a_lab_take_one_process(clone, monkeypatch):
    calls, real = [], notes.subprocess.run
    monkeypatch.setattr(notes.subprocess, "run", lambda *a, **k: calls.append(a) or real(*a, **k))
    for _ in range(2):
        found = of_rope([*RIGHT[:2], say(3, "ten", 90, 5), run(9, 30)])
        assert found.predictions == {"one": True, "two": True, "ten": False}
        assert found.sure_misses == (tracker.Miss("ten", 90, 5, None),)
    assert len(calls) == 1


def cells(line: str) -> int:
    return sum(1 + (unicodedata.east_asian_width(c) == "W") for c in line)


def test_the_board_fits_a_terminal_of_80_columns(truths):
    give_medal(ROPE)
    long = Lab("week2", "flash_attention")
    grades = {
        **{ATTENTION: Grade("green", 142, 142), ROPE: GREEN, GQA: Grade("reference")},
        **{CACHE: OPEN, long: Grade("started", 100, 142, "wrong")},
    }
    events = [*RIGHT, bench(3, "gold"), run(9, 30), run(10, 3, lab=GQA)]
    events += [run(100 + 14 * step, 3, 142, lab=long) for step in range(120)]
    events += [hint(100, long), at(101, "reveal", long, delegated=True)]
    lines = tracker.board(grades, events).splitlines()
    assert max(map(cells, lines)) <= 80
    assert lines[-1] == "2 of 5 labs are green"
    assert [line.split() for line in lines[1:-1]] == [
        ["✅", "week1/attention", "green", "142/142", "★★", "of", "4"],
        ["✅", "week1/rope", "green", "30/30", "★★★★★", "of", "5", "1", "0", "9", "min"],
        ["📘", "week1/gqa", "reference", "1", "0", "1", "min"],
        ["⬜", "week2/kv_cache", "not", "started"],
        [
            *("🟡", "week2/flash_attention", "delegated", "100/142", "–", "of", "4"),
            *("120", "1", "27", "h", "46", "min"),
        ],
    ]


def test_a_standing_is_plain_data(truths):
    give_medal(ROPE)
    events = [*RIGHT[:2], say(3, "ten", 90, 5), bench(4, "silver"), hint(5), run(9, 30)]
    found = json.loads(json.dumps(asdict(of_rope(events))))
    assert found == {
        **{"state": "green", "passed": 30, "total": 30, "message": ""},
        **{"mastery": ["green", "medal"], "max_stars": 5, "delegated": False},
        **{"attempts": 1, "hints": 1, "hints_before_green": 1, "seconds": 540},
        **{"first_green": "2026-03-01T10:09:00+00:00", "hash": "file-9"},
        "predictions": {"one": True, "two": True, "ten": False},
        "sure_misses": [{"id": "ten", "number": 90, "confidence": 5, "again": None}],
        **{"medal": "silver", "problem": ""},
    }


def test_without_an_event_nothing_is_written(truths, clone):
    assert tracker.write({ROPE: GREEN}) == []
    assert not (clone / "progress").exists()
    log(clone, [run(1, 30, lab=Lab("week9", "gone"))])
    assert tracker.write({ROPE: GREEN}) == []
    assert written(clone) == {}


WEEK = {ATTENTION: GREEN, ROPE: GREEN, GQA: Grade("started", 5, 12, "wrong"), CACHE: OPEN}
STORY = [
    *(run(0, 10, lab=ATTENTION), hint(2, ATTENTION), run(5, 30, hash="a1", lab=ATTENTION)),
    *(say(6, "one", 1), say(7, "two", 2), say(8, "ten", 90, 5), run(20, 4), run(24, 4)),
    *(run(2880, 30, hash="b2"), at(2881, "ticket", id="ten", right=True)),
    *(run(2890, 5, 12, lab=GQA), at(2891, "reveal", GQA, delegated=True)),
]


def test_the_derived_files(truths, clone):
    log(clone, STORY)
    assert tracker.write(WEEK) == []
    found = written(clone)
    assert list(found) == [
        *("achievement_log.md", "tracker.md", "weekly_reports/week_1_progress.md")
    ]
    for text in found.values():
        first = text.splitlines()[0]
        assert "`course status`" in first and "progress/log/" in first and "not edit" in first
    tracked = found["tracker.md"]
    for line in (
        "2 of 4 labs are green; 4 of 16 stars; attempts: 6; hints: 1; active time: 35 min.",
        "| [week1/attention](../sessions/week1/attention.md) | ✅ green | 30/30 | ★ of 4 | 2 | 1 |"
        " 5 min |  | 2026-03-01 |",
        "| [week1/rope](../sessions/week1/rope.md) | ✅ green | 30/30 | ★★★ of 4 | 3 | 0 |"
        " 20 min |  | 2026-03-03 |",
        "| [week1/gqa](../sessions/week1/gqa.md) | 🟡 started, delegated | 5/12 | – of 4 | 1 | 0 |"
        " 10 min |  |  |",
        "| [week2/kv_cache](../sessions/week2/kv_cache.md) | ⬜ not started |  | – of 4 |  |  |"
        "  |  |  |",
    ):
        assert line in tracked.splitlines()
    report = found["weekly_reports/week_1_progress.md"].splitlines()
    for line in (
        "First work on 2026-03-01, last on 2026-03-03 (UTC).",
        "2 of 3 labs are green; 4 of 12 stars; attempts: 6; hints: 1; active time: 35 min.",
        "- Most attempts: week1/rope (3), week1/attention (2)",
        "- Most hints: week1/attention (1)",
        "- Sure and wrong: week1/rope, ten: you said 90 with confidence 5 of 5; "
        "right the second time",
    ):
        assert line in report
    assert [line for line in found["achievement_log.md"].splitlines() if line[:1] == "-"] == [
        "- 2026-03-01: week1/attention is the first green lab",
        "- 2026-03-03: week1/rope is the first green lab without a hint",
        "- 2026-03-03: week1/gqa is the first lab that is delegated",
    ]


def test_what_has_not_changed_is_not_written_again(truths, clone, monkeypatch):
    log(clone, STORY)
    tracker.write(WEEK)
    before = written(clone)
    replaced, real = [], tracker.files.replace
    monkeypatch.setattr(
        tracker.files, "replace", lambda path, text: replaced.append(path.name) or real(path, text)
    )
    tracker.write(WEEK)
    assert replaced == []
    (clone / "progress/tracker.md").write_bytes(b"\xff all green, I promise")
    tracker.write(WEEK)
    assert replaced == ["tracker.md"]
    assert written(clone) == before


def test_a_complete_week_is_a_milestone(truths, clone):
    week = {ATTENTION: GREEN, ROPE: GREEN, CACHE: OPEN}
    log(clone, STORY[:-2])
    tracker.write(week)
    path = "milestone_checkpoints/week_1.md"
    lines = written(clone)[path].splitlines()
    assert "Reached: 2026-03-03 10:00 UTC." in lines
    assert "| week1/attention | 2026-03-01 10:05 | 30/30 | 2 | 1 | `a1` |" in lines
    assert "| week1/rope | 2026-03-03 10:00 | 30/30 | 3 | 0 | `b2` |" in lines
    assert "progress/log/2026-03.jsonl" in lines[-1]
    complete = "- 2026-03-03: week 1 is complete"
    assert complete in written(clone)["achievement_log.md"].splitlines()
    # It stays what it was when a lab breaks later; the achievement says how things are.
    before = written(clone)[path]
    tracker.write({**week, ROPE: Grade("started", 29, 30)})
    assert written(clone)[path] == before
    assert f"{complete} (not green today)" in written(clone)["achievement_log.md"].splitlines()
    (row,) = (line for line in written(clone)["tracker.md"].splitlines() if "[week1/rope]" in line)
    assert row.endswith("| – of 4 | 3 | 0 | 20 min |  |  |")


def test_a_log_that_claims_a_complete_week_gives_no_milestone(truths, clone):
    log(clone, [run(1, 30), run(2, 30, lab=ATTENTION)])
    tracker.write({ATTENTION: Grade("started", 3, 30), ROPE: GREEN})
    assert not any("milestone" in path for path in written(clone))
    assert "✅ green" not in written(clone)["tracker.md"].split("week1/rope")[0]


def test_a_milestone_without_a_logged_run_says_how_to_get_its_date(truths, clone):
    log(clone, [run(1, 30), run(2, 2, total=2, lab=ATTENTION)])
    tracker.write({ATTENTION: GREEN, ROPE: GREEN})
    text = written(clone)["milestone_checkpoints/week_1.md"]
    assert "the date, a graded run is missing: `pytest code/week1/attention.py`." in text
    assert "week 1 is complete" not in written(clone)["achievement_log.md"]


def test_a_delegated_lab_is_not_the_first_without_a_hint(truths, clone):
    events = [run(1, 3), at(2, "reveal", delegated=True), run(3, 30), run(9, 30, lab=ATTENTION)]
    log(clone, events)
    tracker.write({ATTENTION: GREEN, ROPE: GREEN})
    lines = written(clone)["achievement_log.md"].splitlines()
    assert "- 2026-03-01: week1/rope is the first green lab" in lines
    assert "- 2026-03-01: week1/attention is the first green lab without a hint" in lines


def test_achievements_come_in_the_order_of_time(truths, clone):
    give_medal(ROPE)
    events = [*RIGHT, bench(3, "silver"), bench(4, "bronze"), bench(5, "silver")]
    events += [run(9, 30), bench(11, "gold"), run(10, 30, lab=ATTENTION)]
    log(clone, events)
    tracker.write({ATTENTION: GREEN, ROPE: GREEN})
    lines = written(clone)["achievement_log.md"].splitlines()
    assert [line.partition(": ")[2] for line in lines if line.startswith("- ")] == [
        "week1/rope: silver medal",
        "week1/rope is the first green lab",
        "week1/rope is the first green lab without a hint",
        "week1/rope: every prediction was right",
        "week 1 is complete",
        "week1/rope: gold medal",
    ]


def test_a_corrupt_line_is_reported_and_stays(truths, clone):
    log(clone, STORY)
    file = clone / "progress/log/2026-03.jsonl"
    content = file.read_bytes() + b"<<<<<<< HEAD\n"
    file.write_bytes(content)
    (problem,) = tracker.write(WEEK)
    assert f"line {len(STORY) + 1} is left out" in problem
    assert file.read_bytes() == content
    assert "2 of 4 labs are green" in written(clone)["tracker.md"]


def test_a_file_that_cannot_be_written_stops_no_other(truths, clone):
    log(clone, STORY)
    (clone / "progress/tracker.md/x").mkdir(parents=True)
    (problem,) = tracker.write(WEEK)
    assert problem.startswith("progress/tracker.md could not be written: ")
    assert (clone / "progress/weekly_reports/week_1_progress.md").is_file()
