"""Whose `weekN` is imported: the layers of sys.path, and the paths that choose them.

A layer is a list of folders that hold `weekN` packages, and those of the drills. Grading the
learner puts `code/` and `exercises/` there, and in front of them an overlay with copies of the
references that the learner asked for by name. Grading the reference puts `solutions/` there. The
learner's and the reference's never stand together while the learner is graded: a deleted file must
be missing, not silently replaced.
"""

import ast
import contextlib
import difflib
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from course.labs import DRILLS, GROUPS, ROOT, WEEKS, Lab, all_labs, find_labs

CODE = ROOT / "code"
EXERCISES = ROOT / "exercises"
SOLUTIONS = ROOT / "solutions"
TESTS = ROOT / "tests"
REFERENCE_FILE = ROOT / "progress" / "reference.txt"
STATE = ROOT / ".course"
SECONDS_TO_KEEP_OVERLAYS = 24 * 3600
# What `def` makes in a syntax tree, with `async` in front of it and without.
Function = ast.FunctionDef | ast.AsyncFunctionDef


class LayerError(ValueError):
    """A request that names no tree to grade, or more than one; the message is for the learner."""


@dataclass(frozen=True)
class Selection:
    """What a pytest command line asks for.

    tree: "code" (the learner's labs and drills), "solutions", or "" when no lab is graded. args:
    paths that pytest collects.
    """

    tree: str
    args: list[str]


def select(args: Sequence[str], cwd: Path) -> Selection:
    """Map paths to labs and drills to the graded suites; other paths stay as they are.

    args: as typed, relative to cwd, with or without ::node. Raises LayerError.
    """
    trees: set[str] = set()
    mapped: list[str] = []
    for arg in args:
        path, separator, node = arg.partition("::")
        tree, files = _suites(Path(os.path.normpath(cwd / path)))
        if tree:
            trees.add(tree)
        mapped += [f"{file}{separator}{node}" for file in files] if files else [arg]
    if len(trees) > 1:
        raise LayerError(
            "one run grades one tree: call `pytest code/…` and `pytest solutions/…` separately"
        )
    return Selection(trees.pop() if trees else "", mapped)


def _suites(path: Path) -> tuple[str, list[str]]:
    if path in (ROOT, TESTS):
        return "code", [str(TESTS)]
    if not path.is_relative_to(ROOT):
        return "", []
    tree, *rest = path.relative_to(ROOT).parts
    if tree == "tests":
        # An editor's test explorer asks for the suites themselves: they grade the learner's code.
        return ("code" if rest[0] in GROUPS else ""), [str(path)]
    held = {"code": WEEKS, "exercises": DRILLS, "solutions": GROUPS}.get(tree)
    if held is None:
        return "", []
    layer = "solutions" if tree == "solutions" else "code"
    if not rest:
        return layer, [str(TESTS / week) for week in held]
    if len(rest) == 1 and rest[0] in held:
        return layer, [str(TESTS / rest[0])]
    try:
        labs = find_labs("/".join(rest))
    except ValueError as error:
        raise LayerError(str(error)) from None
    for lab in labs:
        if lab.week not in held:
            raise LayerError(f"{lab.name} does not lie in {tree}/: pytest {lab.path}")
    return layer, [str(lab.tests) for lab in labs]


def check_trees() -> None:
    """Refuse a tree whose packages are no longer open to layers. Raises LayerError."""
    trees = (CODE, SOLUTIONS, *(EXERCISES / group for group in DRILLS))
    for file in [file for tree in trees for file in tree.glob("**/__init__.py")]:
        name = file.relative_to(ROOT).as_posix()
        raise LayerError(f"remove {name}: it hides Python's own `code` module or other layers")


def named_references(words: Iterable[str]) -> list[Lab]:
    """Resolve the labs to take from the reference: the given words and progress/reference.txt."""
    lines = REFERENCE_FILE.read_text(encoding="utf-8") if REFERENCE_FILE.is_file() else ""
    words = [*words, *(line.partition("#")[0].strip() for line in lines.splitlines())]
    found: set[Lab] = set()
    for word in filter(None, words):
        try:
            found.update(find_labs(word))
        except ValueError as error:
            raise LayerError(f"--reference or {REFERENCE_FILE.name}: {error}") from None
    return [lab for lab in all_labs() if lab in found]


def build_overlay(files: Mapping[str, Path]) -> Path:
    """Make a layer folder of copies; the same files give the same folder.

    files: what to copy, by its place in the layer, such as "week1/attention.py".
    """
    digest = hashlib.sha256()
    for place, file in sorted(files.items()):
        digest.update(f"{place}\0".encode() + file.read_bytes() + b"\0")
    overlay = STATE / "overlays" / digest.hexdigest()[:16]
    if overlay.is_dir():
        os.utime(overlay)
        return overlay
    _remove_old_overlays(overlay.parent)
    unfinished = overlay.with_name(f"{overlay.name}.{os.getpid()}")
    for place, file in files.items():
        target = unfinished / place
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    try:
        unfinished.rename(overlay)
    except OSError:  # another process was faster; its folder holds the same
        shutil.rmtree(unfinished)
    return overlay


def _remove_old_overlays(parent: Path) -> None:
    for folder in parent.glob("*"):
        with contextlib.suppress(FileNotFoundError):  # other processes rename and remove them too
            if time.time() - folder.stat().st_mtime > SECONDS_TO_KEEP_OVERLAYS:
                shutil.rmtree(folder, ignore_errors=True)


def folders(tree: str, overlaid: Mapping[str, Path]) -> list[Path]:
    """List a layer's folders in import order. overlaid: see `build_overlay`; it comes first."""
    overlay = [build_overlay(overlaid)] if overlaid else []
    return [*overlay, *([SOLUTIONS] if tree == "solutions" else [CODE, EXERCISES])]


def learner_tree(week: str) -> Path:
    """Return the tree that holds a week's labs, or a group's drills, as the learner writes them."""
    return EXERCISES if week in DRILLS else CODE


def learner_folders() -> list[Path]:
    """List the folders that hold learners' files and nobody else's."""
    # Beside the drills, exercises/ holds what nbgrader keeps there.
    return [CODE, *(EXERCISES / group for group in DRILLS)]


def activate(layer: Sequence[Path]) -> None:
    """Put a layer on sys.path and into PYTHONPATH, for this process and every child it starts.

    The layer's folders come first; the repository root comes last, so that spawned children can
    unpickle what test modules define. Labs imported before are forgotten.
    """
    front, last = [str(folder) for folder in layer], str(ROOT)
    ours = {*front, last, str(CODE), str(EXERCISES), str(SOLUTIONS)}
    others = [entry for entry in sys.path if entry not in ours and not is_overlay(entry)]
    sys.path[:] = [*front, *others, last]
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    others = [entry for entry in inherited if entry and entry not in ours and not is_overlay(entry)]
    os.environ["PYTHONPATH"] = os.pathsep.join([*front, *others, last])
    forget_labs()


def forget_labs() -> None:
    """Drop every imported module of a lab, so that the next import looks at sys.path again."""
    for name in [name for name in sys.modules if is_of_a_lab(name)]:
        del sys.modules[name]


def week_of(module: str) -> int | None:
    """Return the number of the week that a module name such as "week2.kv_cache" belongs to."""
    match = re.fullmatch(r"week(\d+)", module.partition(".")[0])
    return int(match[1]) if match else None


def is_of_a_lab(module: str) -> bool:
    """Say whether a module name belongs to a week or to a group of drills."""
    return week_of(module) is not None or module.partition(".")[0] in DRILLS


def imported_modules(tree: ast.AST) -> list[str]:
    """List the modules that a parsed file imports, inside functions too."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.append(node.module)
    return names


def stray_files(week: str) -> list[str]:
    """Name files of a learner's folder that are no lab, each with the lab it is nearly called."""
    strays, stems = [], GROUPS[week]
    tree = learner_tree(week)
    for file in sorted((tree / week).glob("*.py")):
        if file.stem not in stems:
            near = difflib.get_close_matches(file.stem, stems, n=1)
            if near:
                strays.append(f"{tree.name}/{week}/{file.name} (is it meant to be {near[0]}.py?)")
    return strays


def is_overlay(entry: Path | str) -> bool:
    """Say whether an entry of sys.path is a folder of copies, see `build_overlay`."""
    return Path(entry).is_relative_to(STATE / "overlays")
