"""Run a graded test once more, with a known wrong solution in the place of the learner's lab."""

import contextlib
import functools
import linecache
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType

from course import grading, mutants
from course.grading import Evidence, OutOfTime
from course.labs import Lab


class NotComparable(Exception):
    """A replay that ended in something that says nothing of the lab."""


@functools.cache
def wrong_solutions(lab: Lab) -> dict[str, ModuleType]:
    """Load the lab's misconceptions as modules; what they import is what the learner's lab does."""
    sources = {mutant.id: mutant.source for mutant in mutants.listed_mutants(lab)}
    loaded = {name: _load(lab, name, source) for name, source in sources.items()}
    return {name: module for name, module in loaded.items() if module is not None}


@functools.cache
def right_solution(lab: Lab) -> ModuleType | None:
    """Load the lab's reference in the same way; None when its imports fail."""
    return _load(lab, "reference", lab.solution.read_text(encoding="utf-8"))


def outcome(
    test: Callable[[], object],
    lab: Lab,
    module: ModuleType,
    limit: contextlib.AbstractContextManager,
) -> Evidence | None:
    """Run a test against a module; returns what it was caught with, or None when it passes.

    limit: stops the block with OutOfTime, which is raised on. Raises NotComparable.
    """
    with grading.lab(lab.name).replaced_by(module), _silence():
        try:
            with limit:
                grading.seed_everything()
                test()
            return None
        except (KeyboardInterrupt, OutOfTime):
            raise
        except BaseException as error:
            found = grading.evidence(error)
    if found is None:
        raise NotComparable
    return found


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Show nobody what a wrong solution prints or warns of: it would speak of the answer."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def _load(lab: Lab, name: str, source: str) -> ModuleType | None:
    module = ModuleType(lab.module)
    module.__file__ = str(lab.solution)
    name = f"<{lab.name} {name}>"
    # Triton reads a kernel's source again, and asks for it by the name of its file.
    linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
    graded = sys.modules.get(lab.module)
    sys.modules[lab.module] = module
    try:
        exec(compile(source, name, "exec"), vars(module))
    except Exception:
        return None  # one that cannot be imported explains no result
    finally:
        if graded is None:
            del sys.modules[lab.module]
        else:
            sys.modules[lab.module] = graded
    return module
