"""`course mutants --report`: what the graders catch and say, from the committed measurements."""

import tomllib
from pathlib import Path

from course import files, mutants, transcripts
from course.labs import GROUPS, ROOT, WEEKS, Lab, all_labs

PAGE = ROOT / "tests" / "QUALITY.md"
CASES = ROOT / "tests" / "engine_cases.toml"
_BEGIN = "<!-- Written by `course mutants --report`: what the suites said when measured. -->"
_END = "<!-- End of what was written. -->"
_HEAD = """# How well the suites grade

Written by `course mutants --report` from `tests/weekN/mutants.json`, which `course mutants` and
`course mutants --diagnose` measure. A test fails when a lab, its suite or its table has changed
since.

- **misconceptions**: wrong solutions that people write, each with its belief; caught of all.
- **generated**: the reference with one operator, comparison, constant, condition, conversion or
  statement changed; caught of all, and how many of the rest behave like the reference, each named
  with its reason in `tests/weekN/misconceptions/LAB.toml`.
- **accepted**: other right solutions that pass.
- **recognised**: misconceptions that the failure message names, and no other; “not measured yet”
  where `course mutants LAB --diagnose` has not run so far.
- **seconds**: of the hunt on the machine that measured, which tells little about yours.
"""
_CASES = """Each case is a bug that a real engine had. The tests are named as below `tests/`; each
is in a graded suite, or in `tests/course`, which meets the engine as a user does."""
_COLUMNS = (
    "tests",
    "misconceptions",
    "generated",
    "equivalent",
    "accepted",
    "recognised",
    "seconds",
)


def write_report() -> int:
    """Write the page; returns 1, with a sentence for each, when a lab's measurement is stale."""
    problems = [problem for lab in all_labs() for problem in stale(lab)]
    if problems:
        print("\n".join(problems))
        return 1
    pages = {PAGE: page()}
    pages |= {week_page(week): with_examples(week) for week in WEEKS}
    for path, text in pages.items():
        files.replace(path, text)
        print(f"{path.relative_to(ROOT).as_posix()} is written")
    return 0


def stale(lab: Lab) -> list[str]:
    """Say which measurements of a lab no longer speak of its files."""
    results = mutants.read_results(lab.week).get(lab.name, {})
    diagnosis = results.get("diagnosis")
    problems = []
    if results.get("digest") != mutants.digest(lab):
        problems.append(f"{lab.name} has changed since the hunt: run `course mutants {lab.name}`")
    elif diagnosis and diagnosis["digest"] != mutants.diagnosis_digest(lab):
        problems.append(
            f"{lab.name} or the diagnosis has changed since it was measured: "
            f"run `course mutants {lab.name} --diagnose`"
        )
    return problems


def is_unmeasured(results: dict) -> bool:
    """Say whether nobody has measured yet what a lab's failures are taken for."""
    return not results["diagnosis"]


def page() -> str:
    """Lay out the committed measurements as Markdown."""
    parts = [_HEAD]
    for week in GROUPS:
        results = mutants.read_results(week)
        rows = {lab.name: _row(results[lab.name]) for lab in all_labs() if lab.week == week}
        rows["all"] = {column: _total(rows, column) for column in _COLUMNS}
        parts.append(f"## {week}\n\n| lab | {' | '.join(_COLUMNS)} |\n|---{'|---:' * 7}|")
        for name, row in rows.items():
            cells = " | ".join(_cell(row[column]) for column in _COLUMNS)
            parts[-1] += f"\n| {name} | {cells} |"
    parts.append(f"## What the engine survives\n\n{_CASES}\n\n{cases_table()}")
    parts.append(f"## The tutor's linter\n\n{transcripts.confusion_table()}")
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def engine_cases() -> list[dict]:
    """Read tests/engine_cases.toml: number, what, and the names of tests, in order."""
    return tomllib.loads(CASES.read_text(encoding="utf-8"))["case"]


def cases_table() -> str:
    """Lay out which tests hold the engine to what it must survive, as Markdown."""
    lines = ["| case | what | tests |", "|---:|---|---|"]
    for case in engine_cases():
        tests = "<br>".join(f"`{test}`" for test in case["tests"])
        lines.append(f"| {case['number']} | {case['what']} | {tests} |")
    return "\n".join(lines)


def week_page(week: str) -> Path:
    """Return the page of a week in the book, which shows examples of what its suites say."""
    return ROOT / "sessions" / week / "README.md"


def with_examples(week: str) -> str:
    """Return the page of a week with the examples that were measured last."""
    before, _, rest = week_page(week).read_text(encoding="utf-8").partition(_BEGIN)
    after = rest.partition(_END)[2]
    blocks = []
    for lab in all_labs():
        result = mutants.read_results(week).get(lab.name, {})
        for text in result.get("diagnosis", {}).get("examples", {}).values():
            blocks.append(f"```\n{text}\n```")
    return f"{before}{_BEGIN}\n\n" + "\n\n".join(blocks) + f"\n\n{_END}{after}"


def _row(result: dict) -> dict[str, tuple[int, ...]]:
    recognised = () if is_unmeasured(result) else (result["diagnosis"]["named"], result["listed"])
    return {
        "tests": (result["tests"],),
        "misconceptions": (result["listed_killed"], result["listed"]),
        "generated": (result["generated_killed"], result["generated"]),
        "equivalent": (len(result["survivors"]),),
        "accepted": (result["alternative"] - result["alternative_killed"], result["alternative"]),
        "recognised": recognised,
        "seconds": (result["seconds"],),
    }


def _total(rows: dict[str, dict], column: str) -> tuple[int, ...]:
    measured = [row[column] for row in rows.values() if row[column]]
    return tuple(map(sum, zip(*measured, strict=True)))


def _cell(numbers: tuple[int, ...]) -> str:
    if not numbers:
        return "not measured yet"
    if len(numbers) == 1:
        return f"{numbers[0]:,}"
    part, whole = numbers
    return f"{part}/{whole}" + (f" ({part / whole:.0%})" if part < whole else "")
