"""The classroom: notebooks from a lab's own files, nbgrader's pipeline, and the workflow for forks.

One pipeline runs for all submissions of one lab: its notebooks are graded by the real suite.
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from course import labs, mutants, notebooks, notes, stubs
from course.labs import ROOT, Lab, all_labs, find_labs

# The class is made once, so one worker takes all that reads it.
pytestmark = pytest.mark.xdist_group("notebooks")
CONFIG = ROOT / "exercises" / "nbgrader_config.py"
WORKFLOW = ROOT / ".github" / "workflows" / "classroom.yml"
ROPE = Lab("week1", "rope")
SECONDS_PER_TEST = 5
# How a line of a reference must look to give something away: longer than `return x`.
TELLING = 16


def nbgrader(folder: Path, *words: str) -> str:
    """Run nbgrader in a course root of its own; returns what it printed."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTEST_ADDOPTS": f"--seconds-per-test={SECONDS_PER_TEST}",
        "JUPYTER_CONFIG_DIR": str(folder / ".jupyter"),
        "IPYTHONDIR": str(folder / ".ipython"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "nbgrader", *words],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=300,
    )
    return done.stdout


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def text_of(cell: dict) -> str:
    return "".join(cell["source"])


def cell(notebook: dict, id: str) -> dict:
    return next(cell for cell in notebook["cells"] if cell["id"] == id)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A course root with every lab's source notebook and release."""
    folder = tmp_path_factory.mktemp("classroom")
    assert notebooks.write(all_labs(), folder / "source") == 0
    own = f"load_subconfig({str(CONFIG)!r})\nget_config().CourseDirectory.root = {str(folder)!r}\n"
    (folder / "nbgrader_config.py").write_text(own)
    # What an instructor may leave beside a notebook must stay there.
    (folder / "source" / "week1-rope" / "answers.py").write_text("secret = 1\n")
    (folder / "source" / "week1-rope" / "marking.md").write_text("secret\n")
    script = (
        "import sys\n"
        "from nbgrader.apps import GenerateAssignmentApp\n"
        "for name in sys.argv[1].split(','):\n"
        "    GenerateAssignmentApp.clear_instance()\n"
        "    GenerateAssignmentApp.launch_instance([name])\n"
    )
    names = ",".join(f"{lab.week}-{lab.stem}" for lab in all_labs())
    done = subprocess.run(
        [sys.executable, "-c", script, names],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    missing = [name for name in names.split(",") if not (folder / "release" / name).is_dir()]
    assert not missing, done.stdout
    return folder


def release_of(lab: Lab, folder: Path) -> dict:
    return read(folder / "release" / f"{lab.week}-{lab.stem}" / f"{lab.stem}.ipynb")


@pytest.mark.parametrize("lab", all_labs(), ids=lambda lab: lab.name)
def test_notebook_is_deterministic(lab):
    assert notebooks.notebook(lab) == notebooks.notebook(lab)
    ids = [cell["id"] for cell in json.loads(notebooks.notebook(lab))["cells"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("lab", all_labs(), ids=lambda lab: lab.name)
def test_notebook_holds_every_task_prediction_and_question(lab, released):
    release, note = release_of(lab, released), notes.read(lab)
    points = {
        c["id"]: c["metadata"]["nbgrader"]["points"]
        for c in release["cells"]
        if c["metadata"].get("nbgrader", {}).get("grade")
    }
    expected = {f"check-{p.id}": notebooks.POINTS_PER_PREDICTION for p in note.predictions}
    expected |= {f"check-{name}": notebooks.POINTS_PER_TASK for name in stubs.graded_names(lab)}
    expected |= {f"answer-{n}": notebooks.POINTS_PER_ANSWER for n in (1, 2, 3)}
    assert points == {**expected, "exit-ticket": notebooks.POINTS_PER_EXIT_TICKET}
    text = "\n".join(map(text_of, release["cells"]))
    assert all(p.ask in text for p in note.predictions)
    assert note.transfer[1:] in text and note.exit_ticket in text
    assert text.startswith("# ")


@pytest.mark.parametrize("lab", all_labs(), ids=lambda lab: lab.name)
def test_release_leaks_nothing(lab, released):
    release = release_of(lab, released)
    assert text_of(cell(release, "lab")) == stubs.make_stub(lab).strip("\n")
    whole = json.dumps(release, ensure_ascii=False)
    shown = {line.strip() for line in stubs.make_stub(lab).splitlines()}
    secret = {line.strip() for line in lab.solution.read_text().splitlines()} - shown
    # Half a line of the stub, such as one parameter of a signature, is no secret.
    secret = {line for line in secret if len(line) >= TELLING and line not in stubs.make_stub(lab)}
    assert secret, "the reference holds nothing that the stub does not"
    quoted = {line: json.dumps(line, ensure_ascii=False)[1:-1] for line in secret}
    assert not [line for line, text in quoted.items() if text in whole]
    for prediction in notes.read(lab).predictions:
        assert prediction.answer not in whole
        name = prediction.id.replace("-", "_")
        assert text_of(cell(release, f"prediction-{prediction.id}")) == f"{name} = ..."
    assert not [c["id"] for c in release["cells"] if "truth(" in text_of(c)]
    assert all(not c.get("outputs") and "stub" not in c["metadata"] for c in release["cells"])


def test_only_notebooks_are_released(released):
    files = [path for path in (released / "release").rglob("*") if path.is_file()]
    assert len(files) == len(all_labs())
    assert {path.suffix for path in files} == {".ipynb"}


def with_source(notebook: dict, **sources: str) -> dict:
    """Copy a notebook with the text of some cells replaced; `_` stands for `-` in their ids."""
    copied = json.loads(json.dumps(notebook))
    for id, text in sources.items():
        cell(copied, id.replace("_", "-"))["source"] = text
    return copied


def submissions(release: dict, source: dict) -> dict[str, dict]:
    """One submission of week1/rope for each kind of learner that a grader meets."""
    reference, stub = ROPE.solution.read_text(encoding="utf-8"), stubs.make_stub(ROPE)
    wrong = {mutant.id: mutant.source for mutant in mutants.listed_mutants(ROPE)}
    written = reference.index("    _check_positions(positions, len(table))")
    only_table = (
        reference[:written]
        + stub[stub.index("    raise NotImplementedError", stub.index("def apply_rotary")) :]
    )
    loop = "    while True:\n        pass\n    raise NotImplementedError"
    deleted = with_source(release, lab=only_table)
    locked = ("check-", "setup")
    deleted["cells"] = [c for c in deleted["cells"] if not c["id"].startswith(locked)]
    return {
        "solution": source,
        "stub": release,
        "misconception": with_source(release, lab=wrong["interleaved-pairs"]),
        "loop-in-a-task": with_source(
            release, lab=stub.replace("    raise NotImplementedError", loop, 1)
        ),
        "loop-in-the-cell": with_source(release, lab=f"{stub}\nwhile True:\n    pass\n"),
        "deleted-cells": deleted,
    }


@pytest.fixture(scope="module")
def pipeline(released: Path) -> dict[str, dict[str, float]]:
    """Autograde all submissions; returns the automatic points of every cell, by learner."""
    from nbgrader.api import Gradebook

    source = read(released / "source" / "week1-rope" / "rope.ipynb")
    for name, notebook in submissions(release_of(ROPE, released), source).items():
        path = released / "submitted" / name / "week1-rope" / "rope.ipynb"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(notebook), encoding="utf-8")
    # A cell that never ends costs its whole limit, so that learner gets a short one.
    stuck = ("--student=loop-in-the-cell", "--Execute.timeout=5")
    printed = nbgrader(released, "autograde", "week1-rope", *stuck)
    printed += nbgrader(released, "autograde", "week1-rope")
    printed += nbgrader(released, "export", f"--to={released / 'grades.csv'}")
    with Gradebook(f"sqlite:///{released / 'gradebook.db'}") as gradebook:
        found = {
            submission.student.id: {
                grade.name: grade.auto_score
                for grade in submission.notebooks[0].grades
                if grade.name.startswith("check-")
            }
            for submission in gradebook.assignment_submissions("week1-rope")
        }
    assert len(found) == 6, printed
    return found


def scored(grades: dict[str, float]) -> dict[str, float]:
    """Leave out the cells without points."""
    return {name: score for name, score in grades.items() if score}


def test_the_solution_has_every_automatic_point(pipeline):
    ids = [prediction.id for prediction in notes.read(ROPE).predictions]
    predictions = {f"check-{id}": notebooks.POINTS_PER_PREDICTION for id in ids}
    tasks = {f"check-{name}": notebooks.POINTS_PER_TASK for name in stubs.graded_names(ROPE)}
    assert pipeline["solution"] == predictions | tasks


def test_the_stub_has_no_point(pipeline):
    assert pipeline["stub"] == dict.fromkeys(pipeline["solution"], 0.0)


def test_a_misconception_costs_the_points_of_its_task_only(pipeline):
    points = {"check-rotary_table": notebooks.POINTS_PER_TASK}
    assert scored(pipeline["misconception"]) == points


@pytest.mark.parametrize("name", ["loop-in-a-task", "loop-in-the-cell"])
def test_an_endless_loop_has_no_point_and_stops_nobody(name, pipeline):
    assert pipeline[name] == dict.fromkeys(pipeline["solution"], 0.0)


def test_deleted_test_cells_come_back(pipeline):
    assert pipeline["deleted-cells"].keys() == pipeline["solution"].keys()
    assert scored(pipeline["deleted-cells"]) == {"check-rotary_table": notebooks.POINTS_PER_TASK}


def test_a_learner_reads_what_failed(pipeline, released):
    graded = read(released / "autograded" / "misconception" / "week1-rope" / "rope.ipynb")
    (output,) = cell(graded, "check-rotary_table")["outputs"]
    assert "".join(output["text"]) == "rotary_table: every test passes\n"
    (output,) = cell(graded, "check-apply_rotary")["outputs"]
    assert "apply_rotary: test_rotation" in output["evalue"]
    assert "first difference at" in output["evalue"]
    # The sentence, and no way through the course's own code.
    assert output["traceback"] == [output["evalue"]]
    graded = read(released / "autograded" / "stub" / "week1-rope" / "rope.ipynb")
    (output,) = cell(graded, "check-apply_rotary")["outputs"]
    assert output["evalue"] == "apply_rotary is not written yet → sessions/week1/rope.md"


def test_grades_are_exported(pipeline, released):
    with (released / "grades.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["assignment"] == "week1-rope"]
    scores = {row["student_id"]: float(row["score"]) for row in rows}
    assert scores == {name: sum(grades.values()) for name, grades in pipeline.items()}


def test_a_wrong_number_is_told_without_the_truth(capsys):
    with pytest.raises(notebooks.NotRight) as caught:
        notebooks.check_prediction("week1/rope", "table-bytes", 1)
    assert "16777216" not in str(caught.value).replace(",", "")
    assert "1 is not accepted" in str(caught.value)
    notebooks.check_prediction("week1/rope", "table-bytes", 32768 * 128 * 4)
    assert capsys.readouterr().out == "table-bytes: accepted\n"


def test_an_open_number_is_asked_for():
    with pytest.raises(notebooks.NotRight, match="write a number in the cell above"):
        notebooks.check_prediction("week1/rope", "table-bytes", ...)


@pytest.mark.parametrize(
    "cells, said",
    [
        ([], "no cell that ran defines rotary_table"),
        (["def rotary_table(:\n    pass"], "line 1: "),
        (["from solutions.week1 import rope\n\n\ndef rotary_table(): ..."], "imports solutions"),
        (
            ["from week1.rope import apply_rotary\n\n\ndef rotary_table(): ..."],
            "imports week1.rope",
        ),
        ([stubs.make_stub(ROPE)], "rotary_table is not written yet"),
    ],
    ids=["missing", "syntax", "solutions", "its-own-reference", "stub"],
)
def test_what_cannot_be_graded_says_why(cells, said):
    with pytest.raises(notebooks.NotRight, match=said):
        notebooks.check("week1/rope", "rotary_table", cells)


def candidate_module(lab: Lab, task: str, submission: str) -> dict:
    text = notebooks.candidate(lab, task, submission)
    module = {"__name__": "candidate", "__file__": "candidate.py"}
    exec(compile(text, "candidate.py", "exec"), module)
    return module


def test_a_candidate_has_one_task_of_the_submission_and_the_rest_of_the_reference():
    submission = (
        "import math\n\n\ndef _shift():\n    return math.floor(7.5)\n\n\n"
        "def rotary_table(*args, **kwargs):\n    return _shift()\n\n\n"
        "def apply_rotary(x, positions, table):\n    return rotary_table(2, 1, 1e4)\n\n\n"
        "def _check_positions():\n    raise RuntimeError\n"
    )
    table = candidate_module(ROPE, "rotary_table", submission)
    assert table["rotary_table"](2, 1, 1e4) == 7
    assert table["Rotary"].__init__.__globals__["rotary_table"] is table["rotary_table"]
    assert "positions" in table["_check_positions"].__annotations__
    rotation = candidate_module(ROPE, "apply_rotary", submission)
    assert rotation["apply_rotary"](None, None, None).shape == (1, 2)


def test_a_candidate_never_falls_back_to_the_reference():
    submission = "def rotary_table():\n    return apply_rotary\n\n\ndel rotary_table\n"
    with pytest.raises(KeyError):
        candidate_module(ROPE, "rotary_table", submission)


def test_a_candidates_line_numbers_are_the_cells():
    submission = "def apply_rotary():\n    pass\n\n\ndef rotary_table():\n    return 1 / 0\n"
    module = candidate_module(ROPE, "rotary_table", submission)
    with pytest.raises(ZeroDivisionError) as caught:
        module["rotary_table"]()
    assert caught.traceback[-1].lineno + 1 == 6


ADD_CELL = """# What a learner may write above the kernel moves its lines.
import torch
import triton
import triton.language as tl


@triton.jit
def _plus(x_ptr, y_ptr, out_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    total = tl.load(x_ptr + offsets, mask=mask) + tl.load(y_ptr + offsets, mask=mask)
    tl.store(out_ptr + offsets, total, mask=mask)


def add(x, y):
    if x.dim() != 1 or (x.shape, x.dtype, x.device) != (y.shape, y.dtype, y.device):
        raise ValueError(f"{x.shape}, {x.dtype}, {x.device}; {y.shape}, {y.dtype}, {y.device}")
    if not (x.is_contiguous() and y.is_contiguous()):
        raise ValueError(f"strides {x.stride(0)} and {y.stride(0)}")
    out = torch.empty_like(x)
    _plus[(triton.cdiv(x.numel(), 512),)](x, y, out, x.numel(), 512)
    return out
"""


def test_a_kernel_of_a_cell_is_read_and_graded(capsys):
    pytest.importorskip("triton")
    notebooks.check("advanced/first_kernel", "add", [ADD_CELL])
    assert capsys.readouterr().out == "add: every test passes\n"
    wrong = ADD_CELL.replace("total, mask=mask)", "total)")
    with pytest.raises(notebooks.NotRight, match=r"writes .* outside of its tensors"):
        notebooks.check("advanced/first_kernel", "add", [wrong])


def test_a_cells_line_is_shown_and_no_line_of_the_reference():
    pytest.importorskip("triton")
    broken = ADD_CELL.replace("    mask = offsets < size\n", "    mask = offsets < no_such_size\n")
    with pytest.raises(notebooks.NotRight) as caught:
        notebooks.check("advanced/first_kernel", "add", [broken])
    line = 1 + broken[: broken.index("no_such_size")].count("\n")
    said = " ".join(str(caught.value).split())
    assert f"advanced/first_kernel.py, line {line}, in _plus" in said
    assert "mask = offsets < no_such_size" in said


def test_the_word_writes_one_notebook_for_each_lab(tmp_path, capsys):
    assert notebooks.write(find_labs("rope"), tmp_path) == 0
    assert capsys.readouterr().out.endswith("week1-rope/rope.ipynb: written\n")
    assert (tmp_path / "week1-rope" / "rope.ipynb").read_text() == notebooks.notebook(ROPE)


def test_a_missing_nbgrader_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(notebooks.importlib.util, "find_spec", lambda name: None)
    assert notebooks.write(all_labs(), tmp_path) == 1
    assert capsys.readouterr().err == "The notebooks need nbgrader: pip install 'nbgrader>=0.9.5'\n"
    assert not list(tmp_path.iterdir())


def test_generated_notebooks_are_not_committed():
    listed = subprocess.run(
        ["git", "ls-files", "--others", "--cached", "--exclude-standard", "exercises"],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
    ).stdout.split()
    assert not [name for name in listed if name.endswith((".ipynb", ".db", ".csv"))]


def steps_of_the_workflow() -> list[dict]:
    workflow = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    assert workflow[True]["push"]["paths"] == ["code/**"]  # YAML reads `on` as true
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["env"]["WEEK"] in labs.WEEKS
    job = workflow["jobs"]["grade"]
    assert job["if"] == "vars.COURSE_REPOSITORY != ''" and job["timeout-minutes"] <= 60
    return job["steps"]


def test_the_workflow_grades_a_fork(tree):
    steps = {step.get("name", step.get("uses")): step for step in steps_of_the_workflow()}
    # A learner's fork with one lab written and a suite that lets everything pass.
    fork, course = tree.root.parent / "fork", tree.root.rename(tree.root.with_name("course"))
    (fork / "code" / "week1").mkdir(parents=True)
    (fork / "tests" / "week1").mkdir(parents=True)
    for lab in find_labs("week1"):
        text = lab.solution.read_text() if lab == ROPE else stubs.make_stub(lab)
        (fork / "code" / f"{lab.name}.py").write_text(text)
        (fork / "tests" / "week1" / f"test_{lab.stem}.py").write_text("def test_all(): pass\n")
    for lab in find_labs("week1"):
        suite = f"from course.grading import lab\n\n\ndef test_it():\n    lab('{lab.name}')."
        name = stubs.graded_names(lab)[0]
        call = f"{name}(4, 1, 1e4)" if lab == ROPE else f"{name}(1, 1)"
        (course / "tests" / "week1" / f"test_{lab.stem}.py").write_text(f"{suite}{call}\n")
    summary = course.parent / "summary.md"
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "PYTHONPATH"))},
        "WEEK": "week1",
        "OMP_NUM_THREADS": "1",
        "GITHUB_STEP_SUMMARY": str(summary),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    for name in ("Put the learner's labs into the course", "Grade", "Points"):
        step = steps[name]
        folder = course.parent / step.get("working-directory", ".")
        command = step["run"].replace("-n 2", "-n 0")
        done = subprocess.run(
            ["bash", "-e", "-c", command], cwd=folder, env=environment, capture_output=True
        )
        assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    lines = summary.read_text().splitlines()
    assert "| week1/rope | 1 of 1 | 20 of 20 |" in lines
    assert "| week1/attention | 0 of 1 | 0 of 50 |" in lines
    assert lines[-1].startswith("| all | | 20 of ")


def test_the_workflow_installs_the_torch_of_the_requirements():
    (install,) = [step["run"] for step in steps_of_the_workflow() if step.get("name") == "Install"]
    (torch,) = [
        line for line in (ROOT / "requirements.txt").read_text().splitlines() if "torch==" in line
    ]
    assert torch in install and "-r requirements.txt" in install
