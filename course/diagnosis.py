"""Recognise the belief behind a wrong result by comparing it with what known misconceptions give.

Each row of tests/weekN/misconceptions/LAB.toml is the reference with one piece of text replaced. A
row explains a failing test when its mutant fails the same check at the same step with the same
result as the learner's code. It is named only when nothing speaks against it:

- its mutant passes every test that the learner passes;
- where both fail, they fail alike;
- it explains more failures than any other row;
- where all that it explains is a flag, a token or a sentence, it explains every failure.

A test says nothing of a lab when the reference in its place gets the same result: then the mistake
is in an earlier lab, which the lab is built on. The verdicts of the tests are settled before and
stay. Time is the processor's, so that what is named does not depend on what else the machine does.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType

from course import mutants, replay
from course.evidence import is_same, is_strong
from course.grading import Evidence, OutOfTime
from course.labs import Lab

SECONDS_PER_TEST = 1.0
SECONDS_PER_RUN = 10.0
# A share of the time is kept for the end of the run, when every test has spoken.
SECONDS_FOR_MATCHING = 6.0
# More beliefs than this behind one result say nothing; two can be told apart by a question.
MAX_NAMED = 2
MAX_CHECKED = 4

Limit = Callable[[float], contextlib.AbstractContextManager]


@dataclass(frozen=True)
class _Test:
    """A test of the run. evidence: what the learner's code was caught with; None when it passed."""

    name: str
    run: Callable[[], object]
    seconds: float
    evidence: Evidence | None


@dataclass
class _Case:
    """What is known of one lab.

    caught_by: the test that was the first to catch a misconception when the graders were measured.
    matches: by name of the misconception, the tests it explains. telling: by name of a test,
    whether the reference gets another result than the learner's code.
    """

    caught_by: Mapping[str, str]
    tests: list[_Test] = field(default_factory=list)
    matches: dict[str, set[str]] = field(default_factory=dict)
    refuted: set[str] = field(default_factory=set)
    seen: set[tuple[str, str]] = field(default_factory=set)
    telling: dict[str, bool] = field(default_factory=dict)
    incomparable: set[tuple[str, str]] = field(default_factory=set)


class Diagnosis:
    """Follows one run. limit: stops a block with OutOfTime after so many seconds of computing."""

    def __init__(self, limit: Limit):
        self._limit = limit
        self._cases: dict[Lab, _Case] = {}
        self._used = 0.0

    def note_passed(self, lab: Lab, name: str, run: Callable[[], object], seconds: float) -> None:
        """Remember a test that the learner's code passes."""
        self._case(lab).tests.append(_Test(name, run, seconds, None))

    def note_failed(
        self, lab: Lab, name: str, run: Callable[[], object], seconds: float, evidence: Evidence
    ) -> list[str]:
        """Name the misconceptions that give the result of a failed test, in the table's order.

        Takes at most SECONDS_PER_TEST. A weak match is not named yet; `conclude` may.
        """
        case = self._case(lab)
        test = _Test(name, run, seconds, evidence)
        case.tests.append(test)
        replay.wrong_solutions(lab)  # takes a while once, and is not part of a test's time
        until = min(SECONDS_PER_TEST, SECONDS_FOR_MATCHING - self._used) + time.process_time()
        found = []
        for mutant in self._likely(lab, name):
            if time.process_time() >= until:
                break
            if mutant not in case.refuted and self._explains(lab, mutant, test, until):
                found.append(mutant)
        for mutant in found:
            self._check(lab, mutant, until)
        kept = [mutant for mutant in found if mutant not in case.refuted]
        return _in_order(lab, kept) if is_strong(evidence) else []

    def conclude(self) -> dict[Lab, tuple[dict[str, list[str]], list[str]]]:
        """Return, for every lab, what is named in the end and what turned out to be wrong.

        What is named comes with the tests that it explains.
        """
        until = time.process_time() + SECONDS_PER_RUN - self._used
        outcome = {}
        for lab, case in self._cases.items():
            if not case.matches:
                continue
            ranked = sorted(case.matches, key=lambda mutant: -len(case.matches[mutant]))
            for mutant in ranked[:MAX_CHECKED]:
                self._check(lab, mutant, until)
            named = self._named(lab, ranked[:MAX_CHECKED])
            explained = {name: sorted(case.matches[name]) for name in named}
            outcome[lab] = explained, sorted(case.refuted)
        return outcome

    def _named(self, lab: Lab, ranked: Sequence[str]) -> list[str]:
        case = self._cases[lab]
        failed = {test.name: test.evidence for test in case.tests if test.evidence is not None}
        strong = {name for name, evidence in failed.items() if is_strong(evidence)}

        def stands(mutant: str) -> bool:
            explained = case.matches[mutant]
            comparable = {name for name in failed if (mutant, name) not in case.incomparable}
            return bool(explained & strong) or explained >= comparable

        standing = [name for name in ranked if name not in case.refuted and stands(name)]
        most = max((len(case.matches[mutant]) for mutant in standing), default=0)
        best = [mutant for mutant in standing if len(case.matches[mutant]) == most]
        return _in_order(lab, best) if len(best) <= MAX_NAMED else []

    def _case(self, lab: Lab) -> _Case:
        if lab not in self._cases:
            measured = mutants.read_results(lab.week).get(lab.name, {})
            self._cases[lab] = _Case(measured.get("killed_by", {}))
        return self._cases[lab]

    def _likely(self, lab: Lab, test: str) -> list[str]:
        """List the misconceptions, the likely ones first, since the time may not last for all.

        Likely is what explained an earlier failure, and what this very test was the first to catch
        when the graders were measured; then what another case of the same function caught.
        """
        case = self._cases[lab]

        def rank(mutant: str) -> tuple[bool, bool, bool]:
            by = case.caught_by.get(mutant, "")
            return (
                mutant not in case.matches,
                by != test,
                by.partition("[")[0] != test.partition("[")[0],
            )

        return sorted(replay.wrong_solutions(lab), key=rank)

    def _explains(self, lab: Lab, mutant: str, test: _Test, until: float) -> bool:
        """Run a failed test against a mutant; notes and returns whether it fails alike."""
        try:
            found = self._outcome(lab, mutant, test, until)
        except OutOfTime:
            return False
        except replay.NotComparable:
            self._cases[lab].incomparable.add((mutant, test.name))
            return False
        if found is None or not is_same(found, test.evidence):
            return False
        case = self._cases[lab]
        if not self._is_telling(lab, test, until):
            case.incomparable.add((mutant, test.name))
            return False
        case.matches.setdefault(mutant, set()).add(test.name)
        case.seen.add((mutant, test.name))
        return True

    def _check(self, lab: Lab, mutant: str, until: float) -> None:
        """Hold a mutant against every test that it was not held against yet, cheap ones first."""
        case = self._cases[lab]
        for test in sorted(case.tests, key=lambda test: test.seconds):
            if mutant in case.refuted or time.process_time() >= until:
                return
            if (mutant, test.name) in case.seen:
                continue
            try:
                found = self._outcome(lab, mutant, test, until)
            except OutOfTime:
                continue
            except replay.NotComparable:
                case.incomparable.add((mutant, test.name))
                continue
            if found is None:
                pass
            elif not self._is_telling(lab, test, until):
                case.incomparable.add((mutant, test.name))
            elif test.evidence is not None and is_same(found, test.evidence):
                case.matches.setdefault(mutant, set()).add(test.name)
            else:
                case.refuted.add(mutant)
            case.seen.add((mutant, test.name))

    def _is_telling(self, lab: Lab, test: _Test, until: float) -> bool:
        """Say whether a test is about this lab, and not about an earlier one that it is built on.

        The reference in the learner's place passes it, unless the learner's earlier lab is wrong;
        then it gets the learner's own result where that result is not this lab's fault.
        """
        telling = self._cases[lab].telling
        if test.name not in telling:
            try:
                found = self._replay(lab, replay.right_solution(lab), test, until)
            except OutOfTime:
                return False
            except replay.NotComparable:
                telling[test.name] = False
            else:
                is_alike = test.evidence is None or (found and is_same(found, test.evidence))
                telling[test.name] = found is None or not is_alike
        return telling[test.name]

    def _outcome(self, lab: Lab, mutant: str, test: _Test, until: float) -> Evidence | None:
        return self._replay(lab, replay.wrong_solutions(lab)[mutant], test, until)

    def _replay(
        self, lab: Lab, module: ModuleType | None, test: _Test, until: float
    ) -> Evidence | None:
        if module is None:
            raise replay.NotComparable
        start = time.process_time()
        try:
            return replay.outcome(test.run, lab, module, self._limit(max(0.01, until - start)))
        finally:
            self._used += time.process_time() - start


def join(
    parts: Iterable[Mapping[str, tuple[dict[str, list[str]], list[str]]]],
) -> dict[str, dict[str, list[str]]]:
    """Put together what several processes concluded on their shares of the tests, by lab name.

    Returns, for each lab, what is named with the tests that it explains.
    """
    named: dict[str, dict[str, list[str]]] = {}
    refuted: dict[str, set[str]] = {}
    for part in parts:
        for lab, (explained, wrong) in part.items():
            for name, tests in explained.items():
                named.setdefault(lab, {}).setdefault(name, []).extend(tests)
            refuted.setdefault(lab, set()).update(wrong)
    kept = {
        lab: {name: tests for name, tests in found.items() if name not in refuted[lab]}
        for lab, found in named.items()
    }
    return {lab: found if len(found) <= MAX_NAMED else {} for lab, found in kept.items()}


def words(lab: Lab, names: Sequence[str]) -> str:
    """Put recognised beliefs into words that end in one question; "" where nothing is certain."""
    if not 0 < len(names) <= MAX_NAMED:
        return ""
    rows = {row["id"]: row for row in mutants.misconceptions(lab)}
    if len(names) == 1:
        row = rows[names[0]]
        return f"This is what comes out when somebody believes:\n“{row['belief']}”\n{row['ask']}"
    ask = mutants.separating_question(lab, names) or "Which of the two is in your code?"
    first, second = (rows[name]["belief"] for name in names)
    return f"Two beliefs give this very result:\n“{first}”\n“{second}”\n{ask}"


def _in_order(lab: Lab, names: Sequence[str]) -> list[str]:
    return [row["id"] for row in mutants.misconceptions(lab) if row["id"] in names]
