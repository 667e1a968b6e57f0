"""The classroom: one nbgrader notebook for each lab, and the checks that its test cells call.

A notebook is made from what the lab has already: the note's opening, its predictions and questions,
the reference (in the instructor's version) and the stub (in the learner's). A test cell takes the
text of the cell that defines its task, puts that one definition into the reference, and runs the
lab's suite over the result in a process of its own: a wrong task costs its own points only.
"""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from course import files, labs, layers, notes, stubs
from course.labs import Lab
from course.layers import Function

POINTS_PER_PREDICTION = 1
POINTS_PER_TASK = 10
POINTS_PER_ANSWER = 2
POINTS_PER_EXIT_TICKET = 4
# Two runs stay below the limit of a cell in exercises/nbgrader_config.py, so that this one speaks.
SECONDS_PER_RUN = 120
_QUESTION = re.compile(r"^\d+\. (.+(?:\n(?!\d+\. |\s*\n).+)*)", re.MULTILINE)
_FOREIGN = ("solutions", "tests", "course")


class NotRight(AssertionError):
    """What a test cell says; Jupyter shows the sentence alone."""

    def _render_traceback_(self) -> list[str]:
        # A traceback through this file would show a learner nothing of theirs.
        return [str(self)]


def write(chosen: list[Lab], out: Path | None) -> int:
    """Write the instructor's notebook of each lab to out/WEEK-LAB/LAB.ipynb.

    out: None means exercises/source. Returns 1, after one sentence, when nbgrader is missing.
    """
    if importlib.util.find_spec("nbgrader") is None:
        print("The notebooks need nbgrader: pip install 'nbgrader>=0.9.5'", file=sys.stderr)
        return 1
    out = labs.ROOT / "exercises" / "source" if out is None else out
    # All texts come first: a note that makes no notebook stops us before anything is written.
    texts = {lab: notebook(lab) for lab in chosen}
    for lab, text in texts.items():
        path = out / f"{lab.week}-{lab.stem}" / f"{lab.stem}.ipynb"
        files.replace(path, text)
        print(f"{_shown(path)}: written")
    return 0


def notebook(lab: Lab) -> str:
    """Return a lab's source notebook as JSON; the same files give the same text."""
    note, text = notes.read(lab), lab.note.read_text(encoding="utf-8")
    cells = [
        _markdown("opening", _opening(text)),
        _locked("setup", "from course import notebooks\n\nnotebooks.prepare()"),
        _markdown("predict", _PREDICT),
        *_prediction_cells(note),
        *_task_cells(lab),
        *_answer_cells(text, note),
    ]
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    content = {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def prepare() -> None:
    """Let a notebook import the labs: `weekN` is the reference's there.

    Without a GPU, kernels run in Triton's interpreter, as they do when they are graded.
    """
    from course import plugin  # which brings torch and pytest

    plugin.choose_interpreter()
    layers.activate(layers.folders("solutions", {}))


def truth(lab_name: str, id: str) -> float:
    """Compute the answer of a prediction from the reference."""
    return _truths(lab_name)[id]


def check_prediction(lab_name: str, id: str, answer: object) -> None:
    """Hold a number against the reference's; NotRight, without the truth, when it is off."""
    (lab,) = labs.find_labs(lab_name)
    prediction = next(p for p in notes.read(lab).predictions if p.id == id)
    if not isinstance(answer, int | float) or isinstance(answer, bool):
        raise NotRight(f"{id}: write a number in the cell above, it holds {answer!r}")
    if not prediction.tolerance.accepts(answer, truth(lab_name, id)):
        raise NotRight(f"{id}: {answer:g} is not accepted (tolerance: {prediction.tolerance})")
    print(f"{id}: accepted")


def check(lab_name: str, task: str, cells: Sequence[str]) -> None:
    """Run a lab's suite over one task of a notebook.

    task: a name from the lab's `__all__`. cells: the texts that the kernel ran, its `In`; the
    latest one that defines the task is graded, alone. Raises NotRight with the first failure.
    """
    (lab,) = labs.find_labs(lab_name)
    submission = _cell_that_defines(task, cells)
    text = candidate(lab, task, submission)
    problem = "" if _is_green(lab, submission) else _problem(lab, text)
    if problem:
        raise NotRight(f"{task}: {problem}")
    print(f"{task}: every test passes")


def candidate(lab: Lab, task: str, submission: str) -> str:
    """Return the reference with one task taken from a submission.

    The submission brings its own imports and private helpers; what else the reference defines
    stays the reference's, for both sides. Raises NotRight when the task cannot be graded.
    """
    tree = ast.parse(submission)
    if task not in _definitions(tree):
        raise NotRight(f"the cell does not define {task}")
    _check_gradable(lab, task, tree)
    reference = lab.solution.read_text(encoding="utf-8")
    given = {name for name in _definitions(ast.parse(reference)) if not name.startswith("_")}
    lines = submission.split("\n")  # unlike splitlines, it counts lines as ast does
    for name, node in _definitions(tree).items():
        if name in given - {task}:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            # Blank and not gone, so that a message's line number is the cell's.
            lines[first - 1 : node.end_lineno] = [""] * (node.end_lineno - first + 1)
    own = "\n".join(lines)
    return f"""{reference}

del {task}
_submitted = {{k: v for k, v in globals().items() if k[0] != "_" or k[:2] == "__"}}
import linecache as _linecache, os as _os
# Triton reads a kernel's source by file and line, and these lines are in no file: another way to
# write this file's path is kept for them.
_cell = _os.path.join(_os.path.dirname(__file__), ".", _os.path.basename(__file__))
_own = {own!r}
_linecache.cache[_cell] = len(_own), None, _own.splitlines(True), _cell
exec(compile(_own, _cell, "exec"), _submitted)
{task} = _submitted[{task!r}]
"""


def points(grades: dict[str, dict]) -> str:
    """Turn what `pytest code/… --grade-json` wrote into a Markdown table with points for each lab.

    Every lab has POINTS_PER_TASK for each of its tasks, and earns the share of its tests that pass.
    """
    rows, earned, possible = [], 0.0, 0
    for lab in (lab for lab in labs.all_labs() if lab.name in grades):
        grade = grades[lab.name]
        most = POINTS_PER_TASK * len(stubs.graded_names(lab))
        got = round(most * grade["passed"] / max(1, grade["collected"] - grade["skipped"]), 1)
        rows.append(
            f"| {lab.name} | {grade['passed']} of {grade['collected']} | {got:g} of {most} |"
        )
        earned, possible = earned + got, possible + most
    total = f"| all | | {earned:g} of {possible} |"
    return "\n".join(["| lab | tests | points |", "|---|---|---|", *rows, total])


_PREDICT = (
    "## Predict\n\n"
    "Answer before you build: put a number in the place of the three dots. An expression such as "
    "`3 * 2**20` is fine."
)


def _opening(text: str) -> str:
    """Take the note's title and what stands before its first section."""
    return text.split("---\n", 2)[2].split("\n## ", 1)[0].strip()


def _prediction_cells(note: notes.Note) -> list[dict]:
    cells = []
    for prediction in note.predictions:
        id, name = prediction.id, prediction.id.replace("-", "_")
        cells += [
            _markdown(f"ask-{id}", f"{prediction.ask} Unit: {prediction.unit}."),
            _solution(
                f"prediction-{id}",
                f'{name} = notebooks.truth("{note.lab.name}", "{id}")',
                stub=f"{name} = ...",
            ),
            _test(
                f"check-{id}",
                f'check_prediction("{note.lab.name}", "{id}", {name})',
                POINTS_PER_PREDICTION,
            ),
        ]
    return cells


def _task_cells(lab: Lab) -> list[dict]:
    names = stubs.graded_names(lab)
    tasks = "\n".join(f"- `{name}`: {POINTS_PER_TASK} points" for name in names)
    text = (
        f"## Build\n\nRead `{_shown(lab.note)}` first: it leads to what you write here, and has "
        f"the hints. Your tasks, each graded alone with the reference for the others:\n\n{tasks}"
        "\n\nAll that they need stands in this one cell, imports and helpers too: it is graded as "
        "a file. Leave the signatures as they are."
    )
    reference = lab.solution.read_text(encoding="utf-8").strip("\n")
    return [
        _markdown("build", text),
        _solution("lab", reference, stub=stubs.make_stub(lab).strip("\n")),
        _markdown("grade", "## Grade\n\nEach cell runs the lab's suite, which takes some seconds."),
        *(
            _test(f"check-{name}", f'check("{lab.name}", "{name}", In)', POINTS_PER_TASK)
            for name in names
        ),
    ]


def _answer_cells(text: str, note: notes.Note) -> list[dict]:
    """Ask three of the note's questions and the exit ticket, for a person to grade."""
    section = text.partition("\n## Check yourself\n")[2].partition("\n## ")[0]
    asked = [" ".join(question.split()) for question in _QUESTION.findall(section)]
    asked = [question for question in asked if not question.startswith("Transfer: ")]
    chosen = [asked[0], asked[len(asked) // 2], note.transfer]
    cells = [_markdown("explain", "## Explain\n\nA few sentences each, in your own words.")]
    for number, question in enumerate(chosen, 1):
        cells += [
            _markdown(f"question-{number}", f"{number}. {question[0].upper()}{question[1:]}"),
            _manual(f"answer-{number}", POINTS_PER_ANSWER),
        ]
    return [
        *cells,
        _markdown("exit", f"## Exit ticket\n\n{note.exit_ticket}"),
        _manual("exit-ticket", POINTS_PER_EXIT_TICKET),
    ]


def _markdown(id: str, text: str) -> dict:
    return {"cell_type": "markdown", "id": id, "metadata": {}, "source": text}


def _manual(id: str, worth: int) -> dict:
    meta = _nbgrader(id, "markdown", grade=True, solution=True, worth=worth)
    source = "Graded by hand: is it right, and does it give a reason?"
    return {"cell_type": "markdown", "id": id, "metadata": meta, "source": source}


def _locked(id: str, code: str) -> dict:
    return _code(id, code, _nbgrader(id, "code", locked=True))


def _solution(id: str, code: str, stub: str) -> dict:
    # `stub` is read by the preprocessor in exercises/nbgrader_config.py.
    return _code(id, code, {**_nbgrader(id, "code", solution=True), "stub": stub})


def _test(id: str, call: str, worth: int) -> dict:
    # It imports for itself: the cell before it may have been deleted, or the name taken.
    code = f"from course import notebooks\n\nnotebooks.{call}"
    meta = _nbgrader(id, "code", grade=True, locked=True, worth=worth)
    # Without the tag, "Run All Cells" stops at the first task that is open.
    return _code(id, code, {**meta, "tags": ["raises-exception"]})


def _code(id: str, code: str, metadata: dict) -> dict:
    return {
        "cell_type": "code",
        "execution_count": None,
        "id": id,
        "metadata": metadata,
        "outputs": [],
        "source": code,
    }


def _nbgrader(
    id: str,
    cell_type: str,
    grade: bool = False,
    solution: bool = False,
    locked: bool = False,
    worth: int = 0,
) -> dict:
    fields = {
        "cell_type": cell_type,
        "grade": grade,
        "grade_id": id,
        "locked": locked,
        "schema_version": 3,
        "solution": solution,
        "task": False,
    }
    return {"nbgrader": {**fields, "points": worth} if grade else fields}


@cache
def _truths(lab_name: str) -> dict[str, float]:
    (lab,) = labs.find_labs(lab_name)
    return notes.truths(notes.read(lab))


def _cell_that_defines(task: str, cells: Sequence[str]) -> str:
    broken = ""
    for text in reversed(cells):
        try:
            if task in _definitions(ast.parse(text)):
                return text
        except SyntaxError as error:
            if re.search(rf"^((async )?def|class) {task}\b", text, re.MULTILINE) and not broken:
                broken = f"the cell that defines {task}, line {error.lineno}: {error.msg}"
    raise NotRight(broken or f"no cell that ran defines {task}")


def _definitions(tree: ast.Module) -> dict[str, Function | ast.ClassDef]:
    kinds = Function | ast.ClassDef
    return {node.name: node for node in tree.body if isinstance(node, kinds)}


def _check_gradable(lab: Lab, task: str, tree: ast.Module) -> None:
    for name in layers.imported_modules(tree):
        if name.partition(".")[0] in _FOREIGN or name == lab.module:
            raise NotRight(f"the cell imports {name}, which belongs to the course itself")
    stub = _definitions(ast.parse(stubs.make_stub(lab)))
    if ast.dump(_definitions(tree)[task]) == ast.dump(stub[task]):
        raise NotRight(f"{task} is not written yet → {_shown(lab.note)}")


@cache
def _is_green(lab: Lab, submission: str) -> bool:
    """Say whether a submission passes as it is: then one run settles all tasks of the notebook."""
    try:
        for task in stubs.graded_names(lab):
            candidate(lab, task, submission)
    except NotRight:  # a task is missing or not written
        return False
    return not _problem(lab, submission)


def _problem(lab: Lab, text: str) -> str:
    """Run the suite over a candidate; return its first failure, or "" when all is well."""
    with tempfile.TemporaryDirectory() as folder:
        file, result = Path(folder, f"{lab.stem}.py"), Path(folder, "grades.json")
        file.write_text(text, encoding="utf-8")
        options = [f"--candidate={lab.name}={file}", f"--grade-json={result}", "--no-diagnosis"]
        words = ["-m", "pytest", f"solutions/{lab.name}.py", *options, "-x", "-q"]
        try:
            subprocess.run(
                [sys.executable, *words, "-p", "no:cacheprovider"],
                cwd=labs.ROOT,
                env={"OMP_NUM_THREADS": "1", **os.environ},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=SECONDS_PER_RUN,
            )
            grade = json.loads(result.read_text(encoding="utf-8"))[lab.name]
        except subprocess.TimeoutExpired:
            return f"the suite did not end within {SECONDS_PER_RUN} s"
        except (OSError, ValueError, KeyError):
            return "the suite ended without a result"
    if grade["first"]:
        return f"{grade['first']['test']}\n{grade['first']['text']}"
    is_whole = grade["passed"] and grade["passed"] + grade["skipped"] == grade["collected"]
    return "" if is_whole else f"{grade['passed']} of {grade['collected']} tests passed"


def _shown(path: Path) -> str:
    return (path.relative_to(labs.ROOT) if path.is_relative_to(labs.ROOT) else path).as_posix()


if __name__ == "__main__":
    # For CI: python -m course.notebooks grades.json
    print(points(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
