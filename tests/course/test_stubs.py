"""Stubs say what to write and never how; and no command takes a learner's work away."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from course import labs, stubs
from course.labs import Lab, all_labs

REFERENCE = '''"""A lab."""

import math
import os
from collections import Counter, OrderedDict, defaultdict
from typing import TYPE_CHECKING

import numpy as np

import week0.registered  # for what it does when imported
from week0.earlier import helper, other

if TYPE_CHECKING:
    from pathlib import Path
    from queue import Queue

__all__ = ["Block", "compute"]

_SECRET = 3
# The size that everybody agrees on.
SIZE = 4
# How the answer does it.
_METHOD = math.pi

_FLOOR = 0

# A given alias,
# explained in two lines.
Pair = tuple[int, int]  # both are counts


class Block(Counter):
    """A graded class."""

    # Learners need this field.
    limit: int = SIZE

    def __init__(self, limit: int = SIZE):
        # The trick.
        self.limit = limit + _SECRET

    def __len__(self) -> int:
        """How many."""
        return helper(self)
        # After the trick.

    def _inner(self) -> int:
        return other(self.limit)

    # Why this one is a property.
    @property
    def full(self) -> "bool":
        """Whether it is full."""

        def nested() -> int:
            return _SECRET

        return self._inner() == nested()

    class Error(ValueError):
        """An inner class."""

        def explain_what_went_wrong(self) -> str:
            """Explain."""
            return "because"


# Belongs to the answer.
@np.vectorize
def _hidden(queue: "Queue") -> OrderedDict:
    return OrderedDict(_method=_METHOD)


# Belongs to the task.
@staticmethod
def compute(
    first: int,  # counts from zero
    path: "Path",
    floor: int = _FLOOR,
) -> Pair:
    """Compute.

    first: anything.
    """
    # A hint that is none of the learner's business.
    return defaultdict(_hidden, {first: _SECRET})


def given(value: int) -> int:
    """Given whole."""
    # With its comment.
    return _needed(value)


def _needed(value: int) -> int:
    # Needed with its comment.
    return _deeper(os.path.basename(value))


def _deeper(value: int) -> int:
    return value
'''

STUB = '''"""A lab."""

import os
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import week0.registered  # for what it does when imported
from week0.earlier import helper, other

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Block", "compute"]

# The size that everybody agrees on.
SIZE = 4

_FLOOR = 0

# A given alias,
# explained in two lines.
Pair = tuple[int, int]  # both are counts


class Block(Counter):
    """A graded class."""

    # Learners need this field.
    limit: int = SIZE

    def __init__(self, limit: int = SIZE):
        raise NotImplementedError(
            "week0/lab.py: Block.__init__ is not written yet → sessions/week0/lab.md"
        )

    def __len__(self) -> int:
        """How many."""
        raise NotImplementedError(
            "week0/lab.py: Block.__len__ is not written yet → sessions/week0/lab.md"
        )

    # Why this one is a property.
    @property
    def full(self) -> "bool":
        """Whether it is full."""
        raise NotImplementedError(
            "week0/lab.py: Block.full is not written yet → sessions/week0/lab.md"
        )

    class Error(ValueError):
        """An inner class."""

        def explain_what_went_wrong(self) -> str:
            """Explain."""
            raise NotImplementedError(
                "week0/lab.py: Block.Error.explain_what_went_wrong is not written yet "
                "→ sessions/week0/lab.md"
            )


# Belongs to the task.
@staticmethod
def compute(
    first: int,  # counts from zero
    path: "Path",
    floor: int = _FLOOR,
) -> Pair:
    """Compute.

    first: anything.
    """
    raise NotImplementedError("week0/lab.py: compute is not written yet → sessions/week0/lab.md")


def given(value: int) -> int:
    """Given whole."""
    # With its comment.
    return _needed(value)


def _needed(value: int) -> int:
    # Needed with its comment.
    return _deeper(os.path.basename(value))


def _deeper(value: int) -> int:
    return value
'''


GRADED = 'def f():\n    """Do it."""\n    return {}'


def stub(source: str) -> str:
    return stubs.stub_source(source, "week0/lab", "sessions/week0/lab.md")


def reference(*parts: str, graded: str = "f") -> str:
    """A small reference that consists of the parts and grades one name."""
    return "\n".join(['"""A lab."""', *parts, f'__all__ = ["{graded}"]', ""])


FIRST, SECOND = all_labs()[:2]


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """A copy of the references with fresh stubs, in the place of the repository."""
    for lab in all_labs():
        copy = tmp_path / lab.solution.relative_to(labs.ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(lab.solution.read_bytes())
    monkeypatch.setattr(labs, "ROOT", tmp_path)
    stubs.write_stubs(all_labs(), report=lambda line: None)
    return tmp_path


def say_more(lab: Lab) -> None:
    """Change the reference in a way that its stub shows."""
    text = lab.solution.read_text(encoding="utf-8")
    lab.solution.write_text(text.replace('"""', '"""More: ', 1), encoding="utf-8")


def force(lab: Lab, report: Callable[[str], None]) -> None:
    stubs.write_stubs([lab], force=True, report=report)


def parts_of(text: str) -> dict[str, ast.AST]:
    """What `__all__` of a lab lists, and the public members of the classes among it."""
    tree, found = ast.parse(text), {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in exported(text):
            found[node.name] = node
            for member in ast.walk(node) if isinstance(node, ast.ClassDef) else ():
                if isinstance(member, ast.FunctionDef) and not is_private(member.name):
                    found[f"{node.name}.{member.name}"] = member
    return found


def exported(text: str) -> list[str]:
    found = re.search(r"^__all__ = (\[.*?\])", text, re.MULTILINE | re.DOTALL)
    return ast.literal_eval(found[1])


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def snapshot(root: Path) -> dict[Path, tuple[bytes, int]]:
    """Every file below a folder with its bytes and the time when it was written."""
    files = (path for path in root.rglob("*") if path.is_file())
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture
def formatted(tmp_path) -> Callable[[list[str]], list[str]]:
    """What ruff makes of texts, in one run."""

    def run(texts: list[str]) -> list[str]:
        paths = [tmp_path / f"formatted_{number}.py" for number in range(len(texts))]
        for path, text in zip(paths, texts, strict=True):
            path.write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length=100"]
        subprocess.run([*command, *paths], capture_output=True, check=True)
        return [path.read_text(encoding="utf-8") for path in paths]

    return run


def test_every_rule_at_once():
    assert stub(REFERENCE) == STUB


def test_a_stub_of_a_stub_is_the_same():
    assert stub(STUB) == STUB


def test_a_stub_ends_with_one_newline():
    assert stub(REFERENCE.rstrip()) == stub(REFERENCE + "\n\n") == STUB


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (reference(GRADED, graded="g"), "__all__ lists g,"),
        (reference("f = 3"), "__all__ lists f,"),
        (reference("def f():\n    return 1"), "f is graded but has no docstring"),
        (reference("class f:\n    pass"), "f is graded but has no docstring"),
        (
            reference('class f:\n    """Do."""\n    def go(self):\n        return 1'),
            "f.go is graded but has no docstring",
        ),
        ('"""A lab."""\n', "week0/lab has no __all__"),
    ],
)
def test_a_reference_that_makes_no_stub_is_named(source, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        stub(source)


@pytest.mark.parametrize(
    ("line", "stays"),
    [
        ("import math\n_half = math.pi / 2", False),
        ("import math\nHALF = math.pi / 2", True),
        ("import math\n_half = math.pi / 2\nHALF = _half", True),
        ("import math as maths\n_half = maths.pi / 2", False),
        ("import os.path as math\n_half = math.sep", False),
        ("import math.inner\n_half = math.inner.pi", False),
        ("import math.inner\nHALF = math.inner.pi", True),
        ("from __future__ import math", True),
        ("from somewhere import *  # math", True),
        ("try:\n    import math\nexcept ImportError:\n    math = None", True),
        ("import math\n_a, B = math.e, math.pi", True),
        ("import math\n\n\ndef _g(math):\n    return math.pi", True),
        ("import math\n\n\ndef _g(pi=math.pi):\n    return pi", False),
    ],
)
def test_an_import_goes_only_with_the_last_private_use(line, stays):
    text = stub(reference(line, GRADED))
    assert bool(re.search(r"\bmath", text)) == stays


def test_a_conditional_import_goes_with_its_condition():
    condition = "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    import math\n"
    text = stub(reference(condition, "_half: math.Half = 0.5", GRADED))
    assert "math" not in text and "TYPE_CHECKING" not in text


def test_a_local_name_does_not_keep_an_import_of_the_same_name():
    helper = "def _g():\n    return heapq.heappop"
    body = GRADED.format("heapq") + "\n\n\ndef g(heapq):\n    return heapq"
    assert "import heapq" in stub(reference("import heapq", helper, body))
    local = GRADED.format("[heapq for heapq in ()]")
    assert "heapq" not in stub(reference("import heapq", helper, local))


def test_a_shortened_import_is_wrapped_like_ruff_does():
    names = [f"a_name_of_some_length_{number}" for number in range(9)]
    for used in (2, 8):
        call = f"return {', '.join(names[:used])}"
        body = f'def f():\n    """Do it."""\n    {call}\n\n\n_g = {", ".join(names[used:])}'
        line = f"from somewhere import {', '.join(names)}"
        head = stub(reference(line, body)).split("def f")[0]
        assert (f"from somewhere import {', '.join(names[:2])}\n" in head) == (used == 2)
        assert (f"from somewhere import (\n    {names[0]},\n" in head) == (used == 8)
        assert names[8] not in head


def test_a_private_name_that_is_graded_is_a_task():
    text = stub(reference('def _kernel():\n    """Do it."""\n    return 1', graded="_kernel"))
    assert "_kernel is not written yet" in text
    assert "return 1" not in text


@pytest.mark.parametrize(
    "body",
    [
        'async def f():\n    """Do it."""\n    yield 41',
        'class f:\n    """Do it."""\n\n    async def __aiter__(self):\n        yield 41',
        'class f:\n    """Do it."""\n\n    def __call__(self): return 41',
        'class f:\n    """Do it."""\n\n    class _Part:\n        answer = 41',
        'def f():\n    """Do it."""\n    if True:\n        return 1\n    # It was 41.',
        'def f():\n    """Do it."""  # 41\n    return 1',
    ],
)
def test_an_answer_goes_whatever_its_form(body):
    text = stub(reference(body))
    assert "41" not in text
    ast.parse(text)


def test_comments_go_with_what_they_belong_to():
    body = GRADED.format(1) + "\n    # in f\n\n\n# of g\ndef _g():\n    return 2\n    # in g\n"
    text = stub(reference(body, "# of B\nB = 2"))
    assert re.findall("#.*", text) == ["# of B"]


def test_no_blank_line_is_left_over_or_missing(formatted):
    kept = ["A = 1", "# of A\nA = 1", "\n\ndef a():\n    return 1\n", "\n\nclass A:\n    a = 1\n"]
    gone = ["_B = 1", "_B = 1\n_D = 2", "\n\ndef _b():\n    return 1\n\n", "\n# of B\n_B = 1\n"]
    sources = [reference(*parts, "\n\n" + GRADED) for parts in product(kept, gone, kept)]
    texts = [stub(source) for source in formatted(sources)]
    assert formatted(texts) == texts
    for text in texts:
        assert "A = 1\n\n\n\n" not in text
        assert not re.search(r"A = 1\n\n\n(# of A\n)?A = 1", text)


@pytest.mark.parametrize("lab", all_labs(), ids=lambda lab: lab.name)
def test_a_stub_has_the_contract_and_no_answer(lab):
    text = stubs.make_stub(lab)
    theirs, ours = parts_of(text), parts_of(lab.solution.read_text(encoding="utf-8"))
    assert list(theirs) == list(ours)
    for name, node in theirs.items():
        assert ast.get_docstring(node, clean=False) == ast.get_docstring(ours[name], clean=False)
        assert [*map(ast.unparse, node.decorator_list)] == [
            *map(ast.unparse, ours[name].decorator_list)
        ]
        if isinstance(node, ast.ClassDef):
            assert [*map(ast.unparse, node.bases)] == [*map(ast.unparse, ours[name].bases)]
            continue
        assert ast.unparse(node.args) == ast.unparse(ours[name].args)
        assert ast.dump(node.returns or ast.Pass()) == ast.dump(ours[name].returns or ast.Pass())
        body = node.body[ast.get_docstring(node) is not None :]
        message = f"{lab.name}.py: {name} is not written yet → sessions/{lab.name}.md"
        assert [*map(ast.unparse, body)] == [f"raise NotImplementedError({message!r})"]


@pytest.mark.parametrize("lab", all_labs(), ids=lambda lab: lab.name)
def test_a_private_name_is_in_a_stub_only_where_something_given_uses_it(lab):
    text = stubs.make_stub(lab)
    source = ast.parse(lab.solution.read_text(encoding="utf-8"))
    for node in source.body:
        members = (
            node.body if isinstance(node, ast.ClassDef) and node.name in exported(text) else []
        )
        for member in members:
            own = getattr(member, "name", "")
            assert not is_private(own) or not re.search(rf"\b{own}\b", text)
        targets = [ast.unparse(target) for target in getattr(node, "targets", [])]
        for name in filter(is_private, [getattr(node, "name", ""), *targets]):
            users = [
                other
                for other in ast.parse(text).body
                if getattr(other, "name", "") != name
                for use in ast.walk(other)
                if isinstance(use, ast.Name) and use.id == name and isinstance(use.ctx, ast.Load)
            ]
            assert users or not re.search(rf"\b{name}\b", text)


@pytest.mark.parametrize("lab", all_labs(), ids=lambda lab: lab.name)
def test_a_stub_makes_itself(lab):
    text = stubs.make_stub(lab)
    assert stubs.stub_source(text, lab.name, f"sessions/{lab.name}.md") == text


def test_stubs_are_formatted(formatted):
    texts = [REFERENCE, STUB, *map(stubs.make_stub, all_labs())]
    assert formatted(texts) == texts
    assert all(text.endswith("\n") and not text.endswith("\n\n") for text in texts)


def test_stubs_import_with_nothing_but_code_on_the_path(tree):
    program = (
        "import importlib, sys; sys.path[:0] = sys.argv[1:3]\n"
        "for name in sys.argv[3:]:\n"
        "    module = importlib.import_module(name)\n"
        "    print(module.__file__)\n"
        "    [getattr(module, task) for task in module.__all__]\n"
    )
    modules = [lab.module for lab in all_labs()]
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-c",
            program,
            str(tree / "code"),
            str(tree / "exercises"),
            *modules,
        ],
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [str(lab.code) for lab in all_labs()]


def test_no_package_marker_hides_the_other_layers(tree):
    assert not list(tree.rglob("__init__.py"))
    repository = Path(__file__).parents[2]
    assert not list((repository / "solutions").rglob("__init__.py"))
    assert not list((repository / "code").rglob("__init__.py"))


def test_the_committed_stubs_are_up_to_date():
    assert stubs.check_stubs() == []


def test_fresh_stubs_are_untouched_and_clean(tree):
    assert stubs.check_stubs() == []
    assert all(map(stubs.is_untouched, all_labs()))
    before, lines = snapshot(tree), []
    stubs.write_stubs(all_labs(), report=lines.append)
    stubs.reset_lab(FIRST, report=lines.append)
    assert lines == [f"code/{FIRST.name}.py: nothing to do, it is the untouched stub"]
    assert snapshot(tree) == before


def test_an_untouched_stub_follows_its_reference(tree):
    say_more(FIRST)
    assert stubs.check_stubs() == [
        f"code/{FIRST.name}.py is out of date; `course stubs` writes it anew"
    ]
    lines = []
    stubs.write_stubs(all_labs(), report=lines.append)
    assert lines == [f"code/{FIRST.name}.py: written"]
    assert FIRST.code.read_text(encoding="utf-8").startswith('"""More: ')
    assert stubs.check_stubs() == []


def test_a_missing_stub_is_a_problem_and_is_written(tree):
    FIRST.code.unlink()
    assert not stubs.is_untouched(FIRST)
    assert stubs.check_stubs() == [f"code/{FIRST.name}.py is missing; `course stubs` writes it"]
    (tree / "code" / ".stubs.json").unlink()
    assert not stubs.is_untouched(FIRST)
    stubs.write_stubs([FIRST], report=lambda line: None)
    assert stubs.is_untouched(FIRST)


@pytest.mark.parametrize("work", [b"answer = 42\n", b"\xff not even text", b"def half(:\n", b""])
def test_work_is_left_alone(tree, work):
    FIRST.code.write_bytes(work)
    assert not stubs.is_untouched(FIRST)
    assert stubs.check_stubs() == []
    say_more(FIRST)
    lines = []
    stubs.write_stubs(all_labs(), report=lines.append)
    assert lines == [f"code/{FIRST.name}.py: left alone, because it has been edited"]
    assert FIRST.code.read_bytes() == work
    assert stubs.check_stubs() == []
    assert not (tree / ".course").exists()


@pytest.mark.parametrize("restore", [stubs.reset_lab, force])
def test_a_stub_in_the_place_of_work_keeps_it(tree, restore):
    kept = []
    for work in (b"first\n", b"second\n", b"third\n"):
        FIRST.code.write_bytes(work)
        lines = []
        restore(FIRST, lines.append)
        assert stubs.is_untouched(FIRST)
        line = re.fullmatch(rf"code/{FIRST.name}\.py: kept as (\S+)", lines[0])
        assert re.fullmatch(rf"\.course/backups/{FIRST.name}\.\d{{8}}T\d{{6}}Z(-\d)?\.py", line[1])
        kept.append(tree / line[1])
    assert [path.read_bytes() for path in kept] == [b"first\n", b"second\n", b"third\n"]
    assert stubs.check_stubs() == []


def test_resetting_a_deleted_file_brings_the_stub_back(tree):
    FIRST.code.unlink()
    stubs.reset_lab(FIRST, report=lambda line: None)
    assert stubs.is_untouched(FIRST)
    assert not (tree / ".course").exists()


def test_other_line_endings_are_no_edit(tree):
    FIRST.code.write_bytes(FIRST.code.read_bytes().replace(b"\n", b"\r\n"))
    assert stubs.is_untouched(FIRST)
    assert stubs.check_stubs() == []


@pytest.mark.parametrize("torn", ["<<<<<<< HEAD", "[]", "{}"])
def test_a_torn_record_is_mended_and_costs_no_work(tree, torn):
    SECOND.code.write_text("work = 1\n", encoding="utf-8")
    record = tree / "code" / ".stubs.json"
    record.write_text(torn, encoding="utf-8")
    assert not stubs.is_untouched(FIRST)
    assert f"code/.stubs.json is out of date for {FIRST.name}" in stubs.check_stubs()[0]
    lines = []
    stubs.write_stubs(all_labs(), report=lines.append)
    assert lines == [f"code/{SECOND.name}.py: left alone, because it has been edited"]
    assert stubs.check_stubs() == []
    assert stubs.is_untouched(FIRST) and not stubs.is_untouched(SECOND)
    assert SECOND.code.read_text(encoding="utf-8") == "work = 1\n"


def test_a_lab_that_left_the_course_leaves_the_record(tree, monkeypatch):
    monkeypatch.setattr(labs, "WEEKS", {FIRST.week: (FIRST.stem,)})
    assert f"code/.stubs.json lists {SECOND.name}, which is no lab" in stubs.check_stubs()
    stubs.write_stubs(all_labs(), report=lambda line: None)
    assert stubs.check_stubs() == []


def test_a_reference_that_makes_no_stub_is_a_problem_and_stops_the_writing(tree):
    say_more(FIRST)
    SECOND.solution.write_text('"""No list of tasks."""\n', encoding="utf-8")
    assert any(SECOND.name in line and "no __all__" in line for line in stubs.check_stubs())
    before = snapshot(tree)
    with pytest.raises(ValueError, match=SECOND.name):
        stubs.write_stubs(all_labs(), report=lambda line: None)
    assert snapshot(tree) == before


def test_an_interrupted_write_leaves_the_old_file(tree, monkeypatch):
    FIRST.code.write_text("work = 1\n", encoding="utf-8")
    before = snapshot(tree / "code")

    def interrupted(path: Path, target: Path) -> None:
        if target == FIRST.code:
            raise KeyboardInterrupt
        path.rename(target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stubs.reset_lab(FIRST, report=lambda line: None)
    assert snapshot(tree / "code") == before


def test_the_quick_question_does_not_wait_for_libcst():
    program = (
        "import sys; from course import labs, stubs\n"
        "print([stubs.is_untouched(lab) for lab in labs.all_labs()] and 'libcst' in sys.modules)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=labs.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
