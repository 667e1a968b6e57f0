"""What a learner has done, derived from graded runs and kept by the content of the files."""

import ast
import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from course import files, layers, stubs
from course.labs import ROOT, Lab, all_labs

CACHE = layers.STATE / "grades.json"
MAX_CACHED = 500
SYMBOLS = {"green": "✅", "started": "🟡", "not started": "⬜", "reference": "📘"}


@dataclass(frozen=True)
class Grade:
    """One lab's standing.

    state: "green" (every test passes), "started", "not started" (the stub as it was), or
    "reference" (named in progress/reference.txt). passed, total: tests; 0 where none ran. message:
    what the first failure says.
    """

    state: str
    passed: int = 0
    total: int = 0
    message: str = ""


def grade_all() -> dict[Lab, Grade]:
    """Grade every lab and drill; what has not changed since the last time is not run again."""
    referenced = set(layers.named_references([]))
    grades: dict[Lab, Grade] = {}
    digests: dict[Lab, str] = {}
    cache = _read_cache()
    for lab in all_labs():
        if lab in referenced:
            grades[lab] = Grade("reference")
        elif stubs.is_untouched(lab):
            grades[lab] = Grade("not started")
        else:
            digests[lab] = _digest(lab, referenced)
            if digests[lab] in cache:
                grades[lab] = Grade(**cache[digests[lab]])
    to_run = [lab for lab in digests if lab not in grades]
    if to_run:
        if sys.stderr.isatty():  # somebody waits
            names = ", ".join(lab.name for lab in to_run)
            print(f"course: grading what is new: {names} …", file=sys.stderr, flush=True)
        new = _run_suites(to_run)
        grades |= new
        _write_cache(cache, {digests[lab]: asdict(grade) for lab, grade in new.items()})
    return {lab: grades[lab] for lab in all_labs()}


def _run_suites(labs: list[Lab]) -> dict[Lab, Grade]:
    results = _pytest(labs)
    for lab in labs:
        if lab.name not in results and len(labs) > 1:
            # The run ended before its time, so one lab took the others down: each on its own.
            results |= _pytest([lab])
    return {lab: _grade(results.get(lab.name)) for lab in labs}


def _pytest(labs: list[Lab]) -> dict[str, dict]:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "grades.json"
        paths = [str(lab.code) for lab in labs]
        command = [sys.executable, "-m", "pytest", *paths, "-q", "-p", "no:cacheprovider"]
        command += ["--no-log", "--no-diagnosis"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                [*command, "--grade-json", str(target)],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=600,
            )
        return json.loads(target.read_text(encoding="utf-8")) if target.is_file() else {}


def _grade(result: dict | None) -> Grade:
    if result is None:
        return Grade("started", message="its suite ended before it was through; run it to see why")
    total = result["collected"]
    if result["passed"] == total:
        return Grade("green", total, total)
    text = (result["first"] or {}).get("text", "")
    return Grade("started", result["passed"], total, text)


def _digest(lab: Lab, referenced: Iterable[Lab]) -> str:
    """Digest everything that a lab's grade depends on."""
    digest = hashlib.sha256()
    versions = (metadata.version(name) for name in ("torch", "transformers", "pytest"))
    digest.update(" ".join([platform.python_version(), *versions]).encode())
    grader = [ROOT / "course" / f"{name}.py" for name in ("grading", "plugin", "layers", "labs")]
    parts = [*_imports(lab.code), lab.tests, *grader, *(other.solution for other in referenced)]
    for file in parts:
        digest.update(f"{file.relative_to(ROOT).as_posix()}\0".encode())
        digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()


def _imports(file: Path, seen: dict[Path, None] | None = None) -> Iterator[Path]:
    """Yield a learner's file and every other one that it imports, directly or not."""
    seen = {} if seen is None else seen
    if file in seen:
        return
    seen[file] = None
    yield file
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    for name in layers.imported_modules(tree):
        if layers.is_of_a_lab(name):
            tree = layers.learner_tree(name.partition(".")[0])
            yield from _imports(tree / (name.replace(".", "/") + ".py"), seen)


def _read_cache() -> dict[str, dict]:
    try:
        cache = json.loads(CACHE.read_text(encoding="utf-8"))
        return {key: asdict(Grade(**value)) for key, value in cache.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # it is only a cache: a damaged one costs one run


def _write_cache(old: dict[str, dict], new: dict[str, dict]) -> None:
    kept = dict(list({**old, **new}.items())[-MAX_CACHED:])
    files.replace(CACHE, json.dumps(kept))


def next_step(grades: dict[Lab, Grade]) -> str:
    """Name the one thing to do next; drills are there for whoever wants them."""
    states = ("started", "not started")
    open_labs = [lab for lab in grades if grades[lab].state in states and not lab.is_drill]
    if not open_labs:
        taken = [lab.name for lab, grade in grades.items() if grade.state == "reference"]
        if taken:
            return (
                f"Nothing of yours is open. Taken from the reference: {', '.join(taken)}; "
                f"take them out of progress/{layers.REFERENCE_FILE.name} to write them yourself"
            )
        *_, last = (lab.name for lab in grades if not lab.is_drill)
        return f"Every lab is green. Compare each with the reference, as in: course reveal {last}"
    lab = open_labs[0]
    environment = (
        "" if "VIRTUAL_ENV" in os.environ else f"\n  {_activation()}   (once per terminal)"
    )
    return (
        f"Next: read {_relative(lab.note)}, write {_relative(lab.code)}, and grade it:{environment}"
        f"\n  pytest {_relative(lab.code)}"
    )


def _activation() -> str:
    return r".venv\Scripts\activate" if os.name == "nt" else "source .venv/bin/activate"


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()
