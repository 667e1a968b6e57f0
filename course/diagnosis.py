"""Recognise the belief behind a wrong result: replay the failing test against the misconceptions.

Each row of tests/weekN/misconceptions/LAB.toml is the reference with one piece of text replaced.
Where such a mutant fails the same check of the same test at the same step, with the same result as
the learner's code, the row's belief explains the learner's result, and its question is asked. The
verdict of the test is settled before and stays.
"""

import contextlib
import importlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from course import grading, layers, mutants
from course.grading import TOLERANCE, Evidence
from course.labs import Lab

SECONDS_PER_TEST = 1.0
SECONDS_PER_RUN = 10.0
# Results of the same mistake, made in another order of operations, differ by this much at most.
SLACK = 4.0
# More beliefs than this behind one result say nothing; two can be told apart by a question.
MAX_NAMED = 2


@dataclass
class _Budget:
    """What the run in progress has left."""

    seconds: float = SECONDS_PER_RUN


_budget = _Budget()
_loaded: dict[str, list[tuple[str, ModuleType]]] = {}
_references: dict[str, ModuleType] = {}
_recognised: dict[str, dict[str, None]] = {}


def diagnose(
    replay: Callable[[], object],
    error: BaseException,
    lab: Lab,
    test: str,
    limit: Callable[[float], contextlib.AbstractContextManager],
) -> list[str]:
    """Name the misconceptions that give the result of a failed test, in the order of the table.

    replay: runs the test again. test: its name. limit: stops a block after so many seconds with
    OutOfTime. Takes at most SECONDS_PER_TEST, and SECONDS_PER_RUN in the whole run; what is not
    tried by then is not named.
    """
    wanted = grading.evidence(error)
    if wanted is None or _budget.seconds <= 0:
        return []
    start = time.perf_counter()
    left = min(SECONDS_PER_TEST, _budget.seconds)
    found = []
    try:
        for name, module in _candidates(lab, test):
            remaining = left - (time.perf_counter() - start)
            if remaining <= 0:
                break
            if _is_same(_produced(replay, lab, module, limit(remaining)), wanted):
                found.append(name)
    finally:
        _budget.seconds -= time.perf_counter() - start
    _recognised.setdefault(lab.name, {}).update(dict.fromkeys(found))
    return [row["id"] for row in mutants.misconceptions(lab) if row["id"] in found]


def narrow(matches: Iterable[Sequence[str]]) -> list[str]:
    """Keep the beliefs that explain every recognised failure of one lab, in order.

    matches: of each failing test. A failure that contradicts those before it is left out.
    """
    kept: list[str] = []
    for names in matches:
        common = [name for name in kept if name in names] if kept else list(names)
        kept = common or kept
    return kept


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


def _candidates(lab: Lab, test: str) -> list[tuple[str, ModuleType]]:
    """List the lab's mutants, the likely ones first, since the time may not last for all.

    Likely is what explained an earlier failure, and what this very test was the first to catch when
    the graders were measured; then what another case of the same test function caught.
    """
    if lab.name not in _loaded:
        pairs = [(mutant.id, _load(mutant)) for mutant in mutants.listed_mutants(lab)]
        _loaded[lab.name] = [(name, module) for name, module in pairs if module is not None]
    seen = _recognised.get(lab.name, {})
    caught_by = mutants.read_results(lab.week).get(lab.name, {}).get("killed_by", {})

    def rank(pair: tuple[str, ModuleType]) -> tuple[bool, bool, bool]:
        by = caught_by.get(pair[0], "")
        return pair[0] not in seen, by != test, by.partition("[")[0] != test.partition("[")[0]

    return sorted(_loaded[lab.name], key=rank)


def _load(mutant: mutants.Mutant) -> ModuleType | None:
    module = ModuleType(mutant.lab.module)
    module.__file__ = str(mutant.lab.solution)
    with _reference_layer():
        sys.modules[mutant.lab.module] = module
        try:
            exec(compile(mutant.source, f"<{mutant.id}>", "exec"), vars(module))
        except Exception:
            return None  # one that cannot be imported explains no result
        finally:
            del sys.modules[mutant.lab.module]
    return module


@contextlib.contextmanager
def _reference_layer() -> Iterator[None]:
    """Let imports of weekN find the reference, and leave the graded layer as it was."""
    path = sys.path[:]
    graded = {name: module for name, module in sys.modules.items() if layers.week_of(name)}
    layers.forget_labs()
    sys.modules.update(_references)
    sys.path[:] = [str(layers.SOLUTIONS), *path]
    try:
        yield
        _references.update({n: m for n, m in sys.modules.items() if layers.week_of(n)})
    finally:
        layers.forget_labs()
        sys.modules.update(graded)
        sys.path[:] = path
        importlib.invalidate_caches()


def _produced(
    replay: Callable[[], object],
    lab: Lab,
    module: ModuleType,
    limit: contextlib.AbstractContextManager,
) -> Evidence | None:
    """Run the test against a mutant; returns what it was caught with, or None."""
    with grading.lab(lab.name).replaced_by(module):
        try:
            with limit:
                replay()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return grading.evidence(error)
    return None


def _is_same(got: Evidence | None, wanted: Evidence) -> bool:
    if got is None or (got.kind, got.line, got.num_calls) != (
        wanted.kind,
        wanted.line,
        wanted.num_calls,
    ):
        return False
    return _equal(got.value, wanted.value)


def _equal(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return _equal_tensors(a, b)
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=1e-5)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    try:
        return bool(a == b)
    except Exception:
        return False


def _equal_tensors(a: Tensor, b: Tensor) -> bool:
    if (a.shape, a.dtype, a.device.type) != (b.shape, b.dtype, b.device.type):
        return False
    if a.device.type == "meta" or not a.is_floating_point():
        return a.device.type == "meta" or bool((a == b).all())
    wide, other = a.double(), b.double()
    same = (wide == other) | (wide.isnan() & other.isnan())
    peak = float(wide.abs().nan_to_num(0.0, 0.0, 0.0).max()) if a.numel() else 0.0
    allowed = SLACK * TOLERANCE.get(a.dtype, 1e-6) * peak
    return bool((same | ((wide - other).abs() <= allowed)).all())
