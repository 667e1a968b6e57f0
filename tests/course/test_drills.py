"""Drills are labs in exercises/: graded alike, told apart, and in nobody's way."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from course import layers, watch
from course.labs import DRILLS, ROOT, WEEKS, Lab, all_labs, find_labs, week_labs
from course.layers import LayerError, select
from course.status import Grade

FREE, RING = Lab("basic", "free_list"), Lab("basic", "ring_buffer")
DRILL_LABS = [lab for lab in all_labs() if lab.is_drill]
BASIC = [lab for lab in DRILL_LABS if lab.week == "basic"]


def imported(lab: Lab) -> set[str]:
    tree = ast.parse(lab.solution.read_text(encoding="utf-8"))
    return {name.partition(".")[0] for name in layers.imported_modules(tree)}


def test_drills_on_data_structures_need_python_alone():
    program = (
        "import importlib, sys\n"
        "sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "for name in sys.argv[2:]:\n"
        "    importlib.import_module(name)\n"
    )
    words = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, sys.argv[1])\n{program}"]
    words += [str(ROOT / "solutions"), *(lab.module for lab in BASIC)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for lab in BASIC:
        assert imported(lab) <= sys.stdlib_module_names


def test_no_drill_is_built_on_a_lab_of_a_week():
    for lab in DRILL_LABS:
        assert not imported(lab) & WEEKS.keys(), lab.name


def test_no_lab_of_a_week_is_built_on_a_drill():
    for lab in week_labs():
        assert not imported(lab) & DRILLS.keys(), lab.name


def test_paths_name_the_learners_file():
    assert FREE.path == "exercises/basic/free_list.py" and FREE.code == ROOT / FREE.path
    assert Lab("week1", "rope").path == "code/week1/rope.py"
    for text in ("free_list", "basic/free_list", FREE.path, "solutions/basic/free_list.py"):
        assert find_labs(text) == [FREE]
    assert find_labs("basic") == find_labs("exercises/basic") == BASIC
    assert find_labs("exercises/advanced") == [Lab("advanced", "first_kernel")]


SUITE = str(ROOT / "tests" / "basic" / "test_free_list.py")


@pytest.mark.parametrize(
    ("args", "cwd", "tree", "suites"),
    [
        (["exercises"], ".", "code", [str(ROOT / "tests" / group) for group in DRILLS]),
        (["exercises/basic"], ".", "code", [str(ROOT / "tests/basic")]),
        (["exercises/basic/free_list.py"], ".", "code", [SUITE]),
        (["exercises/basic/free_list.py::test_x"], ".", "code", [f"{SUITE}::test_x"]),
        (["basic/free_list.py"], "exercises", "code", [SUITE]),
        (["free_list.py"], "exercises/basic", "code", [SUITE]),
        (["."], "exercises/basic", "code", [str(ROOT / "tests/basic")]),
        (["tests/basic/test_free_list.py"], ".", "code", [SUITE]),
        (["solutions/basic/free_list.py"], ".", "solutions", [SUITE]),
        (["code"], ".", "code", [str(ROOT / "tests" / week) for week in WEEKS]),
        (["code/week1/rope.py", "exercises/basic/free_list.py"], ".", "code", None),
    ],
)
def test_paths_choose_suites(args, cwd, tree, suites):
    selection = select(args, ROOT / cwd)
    assert selection.tree == tree
    rope = str(ROOT / "tests/week1/test_rope.py")
    assert selection.args == (suites or [rope, SUITE])


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["code/basic/free_list.py"], "does not lie in code/: pytest exercises/basic/free_list.py"),
        (["exercises/week1/rope.py"], "does not lie in exercises/: pytest code/week1/rope.py"),
        (["exercises/basic/fre_list.py"], "did you mean basic/free_list"),
        (["exercises/basic", "solutions/basic"], "one run grades one tree"),
    ],
)
def test_paths_that_choose_nothing_are_refused(args, sentence):
    with pytest.raises(LayerError, match=re.escape(sentence)):
        select(args, ROOT)


def test_a_drill_is_graded_from_exercises(tree):
    wrong = FREE.solution.read_text(encoding="utf-8").replace(
        "return block_id\n", "return None\n", 1
    )
    tree.write(FREE.path, wrong.replace("behind, before\n", "behind, 1 / 0\n", 1))
    tree.solve(RING.name)
    result = tree.pytest("exercises/basic/free_list.py", "exercises/basic/ring_buffer.py", "-x")
    assert "exercises/basic/free_list.py, line" in result.stdout
    assert "course hint basic/free_list" in result.stdout
    assert "Traceback" not in result.stdout
    grades = tree.grades("exercises/basic", "--reference", "basic/lru_cache")
    assert grades[RING.name]["passed"] == grades[RING.name]["collected"]
    assert grades[FREE.name]["failed"] and not grades["basic/hash_chain"]["passed"]
    assert grades["basic/lru_cache"]["skipped"] == grades["basic/lru_cache"]["collected"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("from week1.rope import rotary_table\n", "and a drill imports no week's lab"),
        ("def (", "SyntaxError"),
        (None, "exercises/basic/free_list.py does not exist; there is exercises/basic/freelist.py"),
    ],
)
def test_a_file_that_cannot_be_graded_says_why(tree, text, sentence):
    if text is None:
        Path(tree.root / FREE.path).rename(tree.root / "exercises/basic/freelist.py")
    else:
        tree.write(FREE.path, text)
    result = tree.pytest(FREE.path)
    assert result.returncode == 1 and sentence in " ".join(result.stdout.split())


def test_a_package_file_among_the_drills_is_refused(tree):
    tree.write("exercises/basic/__init__.py", "")
    assert "remove exercises/basic/__init__.py" in tree.pytest("code/week1/rope.py").stdout


def status_of(tree) -> tuple[str, dict]:
    shown = tree.run("course", "status").stdout
    return shown, json.loads(tree.run("course", "status", "--json").stdout)


def test_status_counts_drills_apart(tree):
    before, _ = status_of(tree)
    assert "drills" not in before and "basic/" not in before
    tree.solve(RING.name)
    tree.write(FREE.path, tree.read(FREE.path).replace("raise NotImplementedError(", "return (", 1))
    tree.run("pytest", RING.path, FREE.path, "-q", "-p", "no:cacheprovider")
    after, grades = status_of(tree)
    of_weeks = f"0 of {len(week_labs())} labs are green"
    assert of_weeks in before and of_weeks in after
    assert f"1 of {len(DRILL_LABS)} drills are green" in after
    assert before.rpartition("Next:")[2] == after.rpartition("Next:")[2]
    assert (grades[RING.name]["state"], grades[FREE.name]["state"]) == ("green", "started")
    tracker = tree.read("progress/tracker.md")
    assert of_weeks in tracker.split("## Week 1")[0] and "## Drills: basic" in tracker
    assert f"1 of {len(BASIC)} drills are green" in tracker.split("## Drills: basic")[1]
    assert "basic/" not in tree.read("progress/achievement_log.md")
    assert not (tree.root / "progress/milestone_checkpoints").exists()


def test_reset_brings_a_drill_back(tree):
    tree.write(FREE.path, "x = 1\n")
    done = tree.run("course", "reset", "free_list")
    assert f"{FREE.path}: kept as .course/backups/basic/free_list." in done.stdout
    assert "is not written yet" in tree.read(FREE.path)


def test_watch_goes_from_drill_to_drill_and_from_lab_to_lab():
    grades = {lab: Grade("not started") for lab in all_labs()}
    first, second = DRILL_LABS[:2]
    assert watch._first_open(grades) == week_labs()[0]
    assert watch._first_open(grades, besides=first) == second
    assert watch._first_open(grades, besides=week_labs()[0]) == week_labs()[1]
    green = {lab: Grade("green" if lab.is_drill else "started") for lab in all_labs()}
    assert watch._first_open(green, besides=first) is None


def test_watch_sees_drills_and_nothing_else_of_exercises(tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "CODE", tmp_path / "code")
    monkeypatch.setattr(layers, "EXERCISES", tmp_path / "exercises")
    drill = tmp_path / "exercises/basic/free_list.py"
    other = tmp_path / "exercises/submitted/ada/free_list.py"
    for file in (drill, other):
        file.parent.mkdir(parents=True)
        file.write_text("x = 1")
    assert list(watch._saved_files()) == [drill]
