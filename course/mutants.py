"""Measure the graders: run every suite against wrong solutions and see which ones it lets through.

Two kinds of wrong solutions. The misconceptions of tests/weekN/misconceptions/LAB.toml, written by
hand: the reference with one piece of text replaced. And generated ones: the reference with one
operator, comparison, constant, condition or statement changed. A generated mutant that behaves like
the reference is named in the same file as an [[equivalent]] with its reason.
"""

import ast
import copy
import gc
import hashlib
import importlib
import json
import os
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from course import files, layers, stubs
from course.labs import ROOT, Lab

SECONDS_PER_MUTANT = 180
# Tests that come first because they caught a similar mutant.
MAX_FIRST = 8
# A learner reads a few failures; the diagnosis is measured on as many.
NUM_DIAGNOSED_FAILURES = 10
DIAGNOSED_SHARE = 0.9
# A mutant that allocates without end must not take the machine with it.
MAX_BYTES = 12 * 2**30


@dataclass(frozen=True)
class Mutant:
    """One wrong solution. id: of the misconception, or where and what was changed."""

    lab: Lab
    kind: str
    id: str
    source: str


@dataclass(frozen=True)
class Verdict:
    """What a suite says of one solution.

    killed_by: the first failing test; "" when all passed. num_tests: in the suite. beliefs: what
    the failures were taken for. text: what the first failure says.
    """

    killed_by: str
    num_tests: int = 0
    beliefs: tuple[str, ...] = ()
    text: str = ""


def misconceptions(lab: Lab) -> list[dict[str, str]]:
    """Read a lab's misconceptions; ValueError when a row is incomplete or does not fit its lab."""
    rows = _toml(lab).get("misconception", [])
    source = lab.solution.read_text(encoding="utf-8")
    for row in rows:
        missing = {"id", "belief", "replace", "with", "ask"} - row.keys()
        if missing:
            raise ValueError(
                f"{lab.misconceptions.name}: {row} has no {', '.join(sorted(missing))}"
            )
        count = source.count(row["replace"])
        if count != 1:
            raise ValueError(
                f"{lab.misconceptions.name}: the text that {row['id']!r} replaces occurs {count} "
                f"times in {lab.solution.name}, and it must occur once"
            )
    ids = [row["id"] for row in rows]
    if len(set(ids)) < len(ids):
        raise ValueError(f"{lab.misconceptions.name}: two rows have the same id")
    return rows


def equivalents(lab: Lab) -> dict[str, str]:
    """Read which generated mutants of a lab behave like the reference: id → reason."""
    return {row["mutant"]: row["reason"] for row in _toml(lab).get("equivalent", [])}


def separating_question(lab: Lab, names: Sequence[str]) -> str:
    """Read the question that tells two misconceptions apart; "" where none is written."""
    rows = _toml(lab).get("apart", [])
    return next((row["ask"] for row in rows if set(row["ids"]) == set(names)), "")


def medal(lab: Lab) -> dict[str, float]:
    """Read a lab's thresholds for bronze, silver and gold; {} where speed is not its point."""
    return _toml(lab).get("medal", {})


def _toml(lab: Lab) -> dict:
    return tomllib.loads(lab.misconceptions.read_text(encoding="utf-8"))


def listed_mutants(lab: Lab) -> list[Mutant]:
    """Apply every misconception to the reference."""
    source = lab.solution.read_text(encoding="utf-8")
    return [
        Mutant(lab, "listed", row["id"], source.replace(row["replace"], row["with"]))
        for row in misconceptions(lab)
    ]


def alternatives(lab: Lab) -> list[Mutant]:
    """Read the other right solutions of a lab, which its suite must accept."""
    files = sorted((lab.tests.parent / "alternatives").glob(f"{lab.stem}_*.py"))
    return [
        Mutant(lab, "alternative", file.stem, file.read_text(encoding="utf-8")) for file in files
    ]


def unlisted(lab: Lab) -> dict[str, tuple[Mutant, list[str]]]:
    """Read wrong solutions that no table holds: what was done → (the mutant, what is said to it).

    They show what the diagnosis does with a belief that it does not know. Each row of
    tests/weekN/unlisted.toml has a verdict by a person: silent, or why what is said is true.
    """
    path = layers.TESTS / lab.week / "unlisted.toml"
    rows = tomllib.loads(path.read_text(encoding="utf-8"))["solution"]
    source = lab.solution.read_text(encoding="utf-8")
    found = {}
    for row in rows:
        if row["lab"] != lab.name:
            continue
        if source.count(row["replace"]) != 1:
            raise ValueError(f"{path.name}: {row['what']!r} does not fit {lab.solution.name}")
        changed = source.replace(row["replace"], row["with"])
        found[row["what"]] = Mutant(lab, "unlisted", row["what"], changed), row["says"]
    return found


def generated_mutants(lab: Lab) -> list[Mutant]:
    """Change what a learner has to write, one place at a time."""
    tree = ast.parse(lab.solution.read_text(encoding="utf-8"))
    answers = _answer_names(lab, tree)
    mutants: dict[str, Mutant] = {}
    for position, node in enumerate(tree.body):
        name = getattr(node, "name", "")
        if name not in answers:
            continue
        for text, mutated in _mutations(node):
            changed = copy.deepcopy(tree)
            changed.body[position] = mutated
            key = f"{name}: {text}"
            while key in mutants:
                key += " (again)"
            mutants[key] = Mutant(lab, "generated", key, ast.unparse(changed))
    return list(mutants.values())


def _answer_names(lab: Lab, tree: ast.Module) -> set[str]:
    """Return the definitions that a learner writes: what the stub lacks or has without a body."""
    given = {getattr(node, "name", "") for node in ast.parse(stubs.make_stub(lab)).body}
    defined = {getattr(node, "name", "") for node in tree.body} - {""}
    return (defined - given) | (defined & set(stubs.graded_names(lab)))


def _mutations(definition: ast.stmt) -> Iterator[tuple[str, ast.stmt]]:
    """Yield (what was changed, the changed definition) for every place that can be changed."""
    for index, (node, _) in enumerate(_places(definition)):
        for number in range(len(_changes(node))):
            mutated = copy.deepcopy(definition)
            place, statement = list(_places(mutated))[index]
            before = _text(statement)
            replacement = _changes(place)[number]
            if place is statement:
                after = _text(replacement)
                _replace(mutated, place, replacement)
            else:
                _replace(mutated, place, replacement)
                after = _text(statement)
            yield f"{before} → {after}", mutated


def _text(statement: ast.AST) -> str:
    """Write a statement on one line; of one that holds others, only its head."""
    return " ".join(ast.unparse(statement).partition(":\n")[0].split())


def _places(definition: ast.stmt) -> Iterator[tuple[ast.AST, ast.stmt]]:
    """Yield (node, its statement) in bodies; not in signatures, docstrings or error messages."""
    functions = [n for n in ast.walk(definition) if isinstance(n, layers.Function)]
    nested = {inner for f in functions for inner in ast.walk(f) if inner is not f}
    for function in functions:
        if function in nested:
            continue
        for statement in function.body[1:] if ast.get_docstring(function) else function.body:
            yield from _walk(statement, statement)


def _walk(node: ast.AST, statement: ast.stmt) -> Iterator[tuple[ast.AST, ast.stmt]]:
    statement = node if isinstance(node, ast.stmt) else statement
    yield node, statement
    if isinstance(node, (ast.Raise, ast.JoinedStr)):
        return
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "args") and not isinstance(node, ast.Call):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _walk(child, statement)


_NEGATIONS = {
    ast.Lt: ast.GtE,
    ast.LtE: ast.Gt,
    ast.Gt: ast.LtE,
    ast.GtE: ast.Lt,
}
_OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


_DROPPED = (ast.Expr, ast.AugAssign, ast.Raise, ast.Break, ast.Continue)


def _changes(node: ast.AST) -> list[ast.AST]:
    """List the nodes that may stand in this node's place."""
    changes: list[ast.AST] = []
    if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in _OPERATORS:
        changed = copy.deepcopy(node)
        changed.op = _OPERATORS[type(node.op)]()
        changes.append(changed)
    elif isinstance(node, ast.Compare):
        for table in (_OPERATORS, _NEGATIONS):
            if type(node.ops[0]) in table:
                changed = copy.deepcopy(node)
                changed.ops[0] = table[type(node.ops[0])]()
                changes.append(changed)
    elif isinstance(node, ast.UnaryOp):
        # −1 is a number, most often an axis; the constant inside is changed by itself.
        if not isinstance(node.operand, ast.Constant):
            changes.append(node.operand)
    elif _is_plain_method(node):
        changes.append(node.func.value)
    elif isinstance(node, ast.Constant):
        changes += _other_constants(node.value)
    elif isinstance(node, (ast.If, ast.IfExp)):
        for value in (True, False):
            changed = copy.deepcopy(node)
            changed.test = ast.Constant(value)
            changes.append(changed)
    elif isinstance(node, _DROPPED) or _is_update(node):
        changes.append(ast.Pass())
    return changes


def _is_update(node: ast.AST) -> bool:
    """Say whether the node is a statement such as x = f(x), without which x goes on as it was."""
    if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
        return False
    used = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
    return node.targets[0].id in used


def _is_plain_method(node: ast.AST) -> bool:
    """Say whether the node is a conversion or copy such as x.float() or logits.clone()."""
    is_method = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    return is_method and not node.args and not node.keywords and _is_value(node.func.value)


def _is_value(node: ast.AST) -> bool:
    # super() and self are no tensors, and without their method nothing runs at all.
    named = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return not named & {"super", "self"}


def _other_constants(value: object) -> list[ast.AST]:
    if isinstance(value, bool):
        return [ast.Constant(not value)]
    if isinstance(value, int):
        return [ast.Constant(value + 1)]
    if isinstance(value, float):
        return [ast.Constant(value + 1.0)]
    return []


def _replace(root: ast.AST, old: ast.AST, new: ast.AST) -> None:
    for parent in ast.walk(root):
        for field, value in ast.iter_fields(parent):
            if value is old:
                setattr(parent, field, new)
            elif isinstance(value, list) and any(item is old for item in value):
                value[next(i for i, item in enumerate(value) if item is old)] = new


def results_file(week: str) -> Path:
    """Return where the committed results of a week lie."""
    return layers.TESTS / week / "mutants.json"


def digest(lab: Lab) -> str:
    """Digest what a lab's result speaks of: reference, suite, misconceptions, tolerances."""
    from course import grading  # brings torch, for which `hunt` sets the threads first

    # Which survivors are equivalent is judged afterwards, so those rows are left out.
    kept = ("id", "belief", "replace", "with", "ask")
    rows = json.dumps([{key: row[key] for key in kept} for row in misconceptions(lab)])
    total = hashlib.sha256(f"{dict(grading.TOLERANCE)}{rows}".encode())
    texts = [file.read_text(encoding="utf-8") for file in (lab.solution, lab.tests)]
    for text in [*texts, *(other.source for other in alternatives(lab))]:
        total.update(text.encode() + b"\0")
    return total.hexdigest()[:16]


def hunt(labs: list[Lab], listed_only: bool = False) -> int:
    """Run the mutants of the labs, print the verdicts and keep them; returns 1 if one survived.

    listed_only: leave the generated ones out; nothing is kept then.
    """
    _prepare()
    num_survivors = 0
    for lab in labs:
        start = time.perf_counter()
        mutants = listed_mutants(lab)
        if not listed_only:
            mutants += generated_mutants(lab) + alternatives(lab)
        verdicts = _run_all(lab, mutants)
        num_survivors += _tell(lab, verdicts, time.perf_counter() - start)
        if not listed_only:
            _keep(lab, verdicts, time.perf_counter() - start)
    return 1 if num_survivors else 0


def measure_diagnosis(labs: list[Lab]) -> int:
    """See whether every misconception is recognised as itself, print and keep the outcome.

    Runs the unlisted solutions as well. Returns 1 when fewer than DIAGNOSED_SHARE of all are
    recognised, or an unlisted one passes or hears something else than its row says.
    """
    _prepare()
    num_named, num_all, changed = 0, 0, 0
    for lab in labs:
        listed = listed_mutants(lab)
        strangers = unlisted(lab)
        verdicts = _run_all(lab, [*listed, *(m for m, _ in strangers.values())], diagnosed=True)
        told = {mutant.id: list(verdict.beliefs) for mutant, verdict in verdicts.items()}
        changed += _compare(strangers, verdicts)
        others = {m.id: told[m.id] for m in listed if told[m.id] != [m.id]}
        for name, beliefs in others.items():
            print(f"  {name:<34} {' or '.join(beliefs) or 'silent'}")
        named = len(listed) - len(others)
        print(f"{lab.name}: {named}/{len(listed)} misconceptions recognised", flush=True)
        outcome = {
            "digest": diagnosis_digest(lab),
            "named": named,
            "others": others,
            "examples": _examples(lab, verdicts),
        }
        _write_results(lab, {**read_results(lab.week).get(lab.name, {}), "diagnosis": outcome})
        num_named, num_all = num_named + named, num_all + len(listed)
    return 0 if num_named >= DIAGNOSED_SHARE * num_all and not changed else 1


def _examples(lab: Lab, verdicts: dict[Mutant, Verdict]) -> dict[str, str]:
    """Keep what the learner reads for the rows that are marked as examples."""
    from course import diagnosis, grading  # they bring torch, for which `_prepare` sets the threads

    marked = {row["id"] for row in misconceptions(lab) if row.get("example")}
    return {
        mutant.id: grading.render(
            lab, verdict.killed_by, verdict.text, diagnosis.words(lab, verdict.beliefs)
        )
        for mutant, verdict in verdicts.items()
        if mutant.kind == "listed" and mutant.id in marked
    }


def _compare(
    strangers: dict[str, tuple[Mutant, list[str]]], verdicts: dict[Mutant, Verdict]
) -> int:
    """Print what is said to each unlisted solution; returns how many need a new look."""
    num_changed = 0
    for what, (mutant, says) in strangers.items():
        verdict = verdicts[mutant]
        said = list(verdict.beliefs)
        note = "PASSES" if not verdict.killed_by else "" if said == says else "CHANGED"
        num_changed += bool(note)
        print(f"  unlisted  {what}: {' or '.join(said) or 'silent'}  {note}".rstrip())
    return num_changed


def diagnosis_digest(lab: Lab) -> str:
    """Digest what the rate of recognised misconceptions speaks of."""
    file = ROOT / "course" / "diagnosis.py"
    return hashlib.sha256(digest(lab).encode() + file.read_bytes()).hexdigest()[:16]


def _prepare() -> None:
    if not hasattr(os, "fork"):
        raise ValueError("course mutants needs Linux or macOS")
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: as many workers as cores
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"


def _tell(lab: Lab, verdicts: dict[Mutant, Verdict], seconds: float) -> int:
    """Print a lab's verdicts; returns how many of them are not as they should be."""
    reasons = equivalents(lab)
    num_survivors = 0
    for mutant, verdict in verdicts.items():
        if mutant.kind == "alternative":
            num_survivors += bool(verdict.killed_by)
            accepted = f"REFUSED   {mutant.id} by {verdict.killed_by}"
            print(f"  {accepted if verdict.killed_by else f'accepted  {mutant.id}'}")
        elif verdict.killed_by and mutant.kind == "listed":
            print(f"  killed    {mutant.id:<34} {verdict.killed_by}")
        elif not verdict.killed_by and mutant.id not in reasons:
            num_survivors += 1
            print(f"  SURVIVED  {mutant.id}")
        elif verdict.killed_by and mutant.id in reasons:
            num_survivors += 1
            print(f"  NOT EQUIVALENT  {mutant.id} (killed by {verdict.killed_by})")
    stale = reasons.keys() - {mutant.id for mutant in verdicts}
    if any(mutant.kind == "generated" for mutant in verdicts):
        for name in sorted(stale):
            num_survivors += 1
            print(f"  NO SUCH MUTANT  {name}")
    counts = _counts(verdicts)
    num_equivalent = sum(mutant.id in reasons for mutant in verdicts)
    print(
        f"{lab.name}: misconceptions {counts['listed_killed']}/{counts['listed']} killed, "
        f"generated {counts['generated_killed']}/{counts['generated']} killed "
        f"and {num_equivalent} equivalent, {seconds:.0f} s",
        flush=True,
    )
    return num_survivors


def _counts(verdicts: dict[Mutant, Verdict]) -> dict[str, int]:
    counts = {"tests": max((verdict.num_tests for verdict in verdicts.values()), default=0)}
    for kind in ("listed", "generated", "alternative"):
        ours = [verdict for mutant, verdict in verdicts.items() if mutant.kind == kind]
        counts[kind] = len(ours)
        counts[f"{kind}_killed"] = sum(bool(verdict.killed_by) for verdict in ours)
    return counts


def _keep(lab: Lab, verdicts: dict[Mutant, Verdict], seconds: float) -> None:
    results = {
        "digest": digest(lab),
        **_counts(verdicts),
        "seconds": round(seconds),
        "killed_by": {m.id: v.killed_by for m, v in verdicts.items() if m.kind == "listed"},
        "survivors": [
            m.id for m, v in verdicts.items() if m.kind == "generated" and not v.killed_by
        ],
    }
    diagnosis = read_results(lab.week).get(lab.name, {}).get("diagnosis", {})
    _write_results(lab, {**results, "diagnosis": diagnosis})


def read_results(week: str) -> dict[str, dict]:
    """Read the committed results of a week: lab name → counts, first catches, survivors."""
    file = results_file(week)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _write_results(lab: Lab, results: dict) -> None:
    every = dict(sorted({**read_results(lab.week), lab.name: results}.items()))
    text = json.dumps(every, indent=1, ensure_ascii=False)
    files.replace(results_file(lab.week), text + "\n")


def _run_all(lab: Lab, mutants: list[Mutant], diagnosed: bool = False) -> dict[Mutant, Verdict]:
    """Run each mutant in a fork of this process, which has the libraries loaded already."""
    _import_what_the_suite_imports(lab)
    gc.freeze()
    waiting, running = list(reversed(mutants)), {}
    verdicts: dict[Mutant, Verdict] = {}
    # By what was changed, the tests that caught another change of it, the latest first.
    caught: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                mutant = waiting.pop()
                target = Path(folder) / str(len(waiting))
                first = caught.get(_changed(mutant), [])[:MAX_FIRST]
                pid = _start(mutant, target, diagnosed, first)
                running[pid] = mutant, target, time.perf_counter()
            for pid in list(running):
                mutant, target, start = running[pid]
                seconds = time.perf_counter() - start
                verdict = _finish(pid, target, seconds)
                if verdict is not None:
                    verdicts[mutant] = verdict
                    del running[pid]
                    if verdict.killed_by:
                        place = _changed(mutant)
                        others = [t for t in caught.get(place, []) if t != verdict.killed_by]
                        caught[place] = [verdict.killed_by, *others]
            time.sleep(0.01)
    gc.unfreeze()
    return {mutant: verdicts[mutant] for mutant in mutants}


def _changed(mutant: Mutant) -> str:
    """Name what a generated mutant changes; of the others, each is about something of its own."""
    return mutant.id.partition(":")[0] if mutant.kind == "generated" else mutant.id


def _import_what_the_suite_imports(lab: Lab) -> None:
    from course import plugin  # which brings torch and pytest

    plugin.choose_interpreter()
    tree = ast.parse(lab.tests.read_bytes())
    for name in layers.imported_modules(tree):
        importlib.import_module(name)


def _start(mutant: Mutant, target: Path, diagnosed: bool, first: Sequence[str]) -> int:
    target.mkdir()
    file = target / f"{mutant.lab.stem}.py"
    file.write_text(mutant.source, encoding="utf-8")
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        import resource  # POSIX only, and so is this function

        os.setpgrp()
        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
        log = os.open(target / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(ROOT)
        os._exit(_grade(mutant, file, target / "grades.json", diagnosed, first))
    finally:
        os._exit(99)


def _grade(mutant: Mutant, file: Path, target: Path, diagnosed: bool, first: Sequence[str]) -> int:
    import pytest

    depth = [f"--maxfail={NUM_DIAGNOSED_FAILURES}"] if diagnosed else ["-x", "--no-diagnosis"]
    return pytest.main(
        [
            str(mutant.lab.solution),
            *("-q", "--assert=plain", *depth),
            *("-p", "no:cacheprovider"),
            # These two collect garbage three times a run, which costs more than most mutants.
            *("-p", "no:unraisableexception", "-p", "no:threadexception"),
            *("--candidate", f"{mutant.lab.name}={file}"),
            *("--grade-json", str(target)),
            *(f"--grade-first={name}" for name in first),
        ]
    )


def _finish(pid: int, target: Path, seconds: float) -> Verdict | None:
    """Return the verdict of a fork, or None while it runs."""
    if seconds > SECONDS_PER_MUTANT:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return Verdict("the time limit")
    done, status = os.waitpid(pid, os.WNOHANG)
    if not done:
        return None
    code = os.waitstatus_to_exitcode(status)
    grades = target / "grades.json"
    if code in (0, 1) and grades.is_file():
        (grade,) = json.loads(grades.read_text(encoding="utf-8")).values()
        first = grade["first"] if code else {"test": "", "text": ""}
        return Verdict(first["test"], grade["collected"], tuple(grade["beliefs"]), first["text"])
    if code < 0 or code == 1:
        return Verdict(f"a crash of the process ({code})")
    log = (target / "log").read_text(encoding="utf-8", errors="replace")
    raise RuntimeError(f"pytest itself failed with status {code}:\n{log[-3000:]}")
