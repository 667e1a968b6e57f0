"""Run a graded test once more, with a known wrong solution in the place of the learner's lab."""

import contextlib
import functools
import importlib
import linecache
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType

from course import grading, layers, mutants
from course.grading import Evidence, OutOfTime
from course.labs import Lab

_references: dict[str, ModuleType] = {}


class NotComparable(Exception):
    """A replay that ended in something that says nothing of the lab."""


@functools.cache
def wrong_solutions(lab: Lab) -> dict[str, ModuleType]:
    """Load the lab's misconceptions as modules; what they import is the reference."""
    loaded = {mutant.id: _load(mutant) for mutant in mutants.listed_mutants(lab)}
    return {name: module for name, module in loaded.items() if module is not None}


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


def _load(mutant: mutants.Mutant) -> ModuleType | None:
    module = ModuleType(mutant.lab.module)
    module.__file__ = str(mutant.lab.solution)
    name = f"<{mutant.lab.name} {mutant.id}>"
    # Triton reads a kernel's source again, and asks for it by the name of its file.
    lines = mutant.source.splitlines(keepends=True)
    linecache.cache[name] = len(mutant.source), None, lines, name
    with _reference_layer():
        sys.modules[mutant.lab.module] = module
        try:
            exec(compile(mutant.source, name, "exec"), vars(module))
        except Exception:
            return None  # one that cannot be imported explains no result
        finally:
            del sys.modules[mutant.lab.module]
    return module


@contextlib.contextmanager
def _reference_layer() -> Iterator[None]:
    """Let imports of labs find the reference, and leave the graded layer as it was."""
    path = sys.path[:]
    graded = {name: module for name, module in sys.modules.items() if layers.is_of_a_lab(name)}
    layers.forget_labs()
    sys.modules.update(_references)
    sys.path[:] = [str(layers.SOLUTIONS), *path]
    try:
        yield
        _references.update({n: m for n, m in sys.modules.items() if layers.is_of_a_lab(n)})
    finally:
        layers.forget_labs()
        sys.modules.update(graded)
        sys.path[:] = path
        importlib.invalidate_caches()
