"""Find a lab's answer in what somebody says about it: by grading the code, and by its shape.

Code is taken from fences, indented blocks, inline code, diffs, doctests, base64 and formulas. It is
graded in the place of the bodies that the learner writes, the rest of the lab being the reference's
(a learner who asks about one function may have all others). And it is compared with the reference
as a syntax tree in which names of variables, keywords and the order of sums make no difference.

Grading runs that code in processes of its own, with pytest's time limits and nothing else between
it and the machine: lint only what you would also run.
"""

import ast
import base64
import builtins
import copy
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from course import layers, stubs
from course.labs import ROOT, Lab, find_labs
from course.layers import Function

# A piece of syntax that is smaller than this many nodes occurs in code about anything.
MIN_NODES = 5
# How much of a function's syntax may be said, and how large one piece of it may be.
MAX_SHARE = 0.2
MAX_PIECE = 14
MAX_VARIANTS = 4
SECONDS_PER_TEST = 3
SECONDS_PER_RUN = 120

_SHELL = {"bash", "sh", "shell", "console", "zsh", "powershell", "json", "toml", "yaml"}
_CODE = re.compile(
    r"^[ \t]*(?P<fence>```+|~~~+)[ \t]*(?P<language>[\w+-]*)[^\n]*\n(?P<block>.*?)^[ \t]*(?P=fence)"
    r"|(?:(?<=\n\n)|\A)(?P<indented>(?:(?:    |\t)[^\n]*\n|[ \t]*\n(?=    |\t))+)"
    r"|\$\$(?P<display>.+?)\$\$|\$(?P<maths>[^$\n]+)\$|\\[\[(](?P<brackets>.+?)\\[\])]"
    r"|(?P<ticks>`+)(?P<inline>[^`].*?)(?P=ticks)"
    r"|(?P<base64>[A-Za-z0-9+/]{40,}={0,2})",
    re.DOTALL | re.MULTILINE,
)
_PATH = re.compile(r"[\w.*-]*/[\w./*-]*")
# From a formula to Python, in this order.
_MATHS = (
    (r"\\(?:left|right|quad|mathrm|text|operatorname|,|;|!)", " "),
    (r"\\?[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))"),
    (r"\\(?:cdot|times)|[·×]", " * "),
    (r"−", "-"),
    (r"\^\{?\\?(?:top|T)\b\}?", ".T"),
    (r"√\s*(\w+)", r"sqrt(\1)"),
    (r"[{]", "("),
    (r"[}]", ")"),
    (r"\^", "**"),
    (r"_\((\w+)\)", r"_\1"),
    (r"\\", " "),
    (r"\b(cos|sin|exp|log|sqrt) +([^\W\d]\w*)", r"\1(\2)"),
    (r"(?<=[\w)]) +(?=[\w(])", " * "),
)
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_LIBRARIES = {"torch", "nn", "F", "functional", "math", "np", "numpy", "Tensor"}
_PRELUDE = "import math\nimport torch\nimport torch.nn.functional as F\nfrom torch import nn\n"
_CHILD = "from course import leaks; leaks.grade_here()"


@dataclass(frozen=True)
class Fragment:
    """A piece of Python, the turn in which it was said, and the names spoken of before it."""

    turn: int
    tree: ast.Module
    spoken: str


@dataclass(frozen=True)
class Leak:
    """Code of a tutor that does a learner's work, by the turn that completed it."""

    turn: int
    reason: str


def fragments(turns: Iterable[tuple[int, str, bool]], lab: Lab) -> list[Fragment]:
    """Collect the code that a tutor brought in, in order; what the learner wrote before is not it.

    turns: (number, text, whether the tutor speaks).
    """
    names = re.compile(rf"\b({'|'.join(map(re.escape, stubs.graded_names(lab)))})\b")
    spoken, found, known = "", [], set()
    for number, text, is_tutor in turns:
        for match in _CODE.finditer(text):
            before = names.findall(text[: match.start()])
            spoken = before[-1] if before else spoken
            for tree in filter(None, map(_parsed, _sources(match))):
                statements = {ast.dump(statement) for statement in tree.body}
                if is_tutor and not statements <= known:
                    found.append(Fragment(number, tree, spoken))
                elif not is_tutor:
                    known |= statements
        spoken = (names.findall(text) or [spoken])[-1]
    return found


def _sources(match: re.Match) -> Iterator[str]:
    """Yield the Python in one match, as a whole or, where that is no Python, line by line."""
    part = match.groupdict()
    if part["language"] and part["language"].lower() in _SHELL:
        return
    formula = part["display"] or part["maths"] or part["brackets"]
    if formula:
        yield from _formulas(formula)
        return
    text = part["block"] or part["indented"] or part["inline"] or _decoded(part["base64"] or "")
    if part["language"] == "diff" or re.search(r"^@@ ", text, re.MULTILINE):
        lines = [line for line in text.splitlines() if not re.match(r"-|\+\+\+|@@", line)]
        text = "\n".join(line[1:] for line in lines)
    if ">>> " in text:
        lines = re.findall(r"^\s*(?:>>>|\.\.\.) ?(.*)$", text, re.MULTILINE)
        text = "\n".join(lines)
    text = textwrap.dedent(text).strip("\n")
    if part["inline"] and _PATH.fullmatch(text):
        return
    whole = _parsed(text)
    if whole is not None:
        yield text
        return
    for line in text.splitlines():
        # A formula in a block of text, or code between words.
        yield from [line.strip()] if _parsed(line.strip()) else _formulas(line)


def _formulas(text: str) -> Iterator[str]:
    text = text.translate(_SUBSCRIPTS)
    for pattern, replacement in _MATHS:
        text = re.sub(pattern, replacement, text)
    for side in re.split(r"(?<![=<>!])=(?!=)|[,;。，；]\s|\\\\", text):
        if _parsed(side.strip()):
            yield side.strip()


def _decoded(text: str) -> str:
    try:
        return base64.b64decode(text, validate=True).decode()
    except ValueError:
        return ""


@cache
def _parsed(text: str) -> ast.Module | None:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return tree if tree.body else None


# By its shape.


@cache
def _tree(text: str) -> ast.Module:
    return ast.parse(text)


def overlaps(said: Sequence[Fragment], lab: Lab) -> list[Leak]:
    """Find the functions of the reference of which too much was said.

    The measure: the share of a function's nodes that lie in pieces of MIN_NODES or more which occur
    in what was said, and the size of the largest piece. Pieces that the stub or the note shows do
    not count, nor do docstrings and messages of errors.
    """
    turns: dict[object, int] = {}
    for fragment in said:
        bodies = [ast.Module(_without_words(f), []) for _, f in _functions(fragment.tree)]
        for tree in (fragment.tree, *bodies):
            for piece in _pieces(_shape(tree)):
                turns.setdefault(_renamed(piece), fragment.turn)
    public = _public_pieces(lab)
    given = {ast.dump(function) for _, function in _functions(_tree(stubs.make_stub(lab)))}
    found = []
    for name, function in _functions(_tree(lab.solution.read_text(encoding="utf-8"))):
        if ast.dump(function) in given:
            continue
        body = _shape(ast.Module(_without_words(function), []))
        matched = list(_matched(body, turns, public))
        share = sum(size for size, _ in matched) / _size(body)
        largest = max((size for size, _ in matched), default=0)
        if share > MAX_SHARE or largest > MAX_PIECE:
            turn = max(turn for _, turn in matched)
            reason = f"{share:.0%} of {name} in the reference, the largest piece {largest} nodes"
            found.append(Leak(turn, reason))
    return found


def _matched(
    tree: tuple, said: dict[object, int], public: set[object]
) -> Iterator[tuple[int, int]]:
    """Yield the size and the turn of each largest piece that was said."""
    size = _size(tree)
    if size < MIN_NODES:
        return
    key = _renamed(tree)
    if key in said and key not in public:
        yield size, said[key]
        return
    for child in tree[1:]:
        yield from _matched(child, said, public)


@cache
def _public_pieces(lab: Lab) -> set[object]:
    shown = lab.note.read_text(encoding="utf-8") if lab.note.is_file() else ""
    trees = [stubs.make_stub(lab)]
    trees += [source for match in _CODE.finditer(shown) for source in _sources(match)]
    return {_renamed(piece) for text in trees for piece in _pieces(_shape(_tree(text)))}


def _functions(tree: ast.Module) -> Iterator[tuple[str, Function]]:
    for node in tree.body:
        if isinstance(node, Function):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            inner = (member for member in node.body if isinstance(member, Function))
            yield from ((f"{node.name}.{member.name}", member) for member in inner)


def _without_words(function: Function) -> list[ast.stmt]:
    is_documented = ast.get_docstring(function) is not None
    body = [copy.deepcopy(node) for node in function.body[is_documented:]]
    for node in ast.walk(ast.Module(body, [])):
        if isinstance(node, ast.Raise):
            node.exc = None
    return body


def _shape(node: ast.AST) -> tuple:
    """Write a syntax tree as (label, child, …), spellings of one thing alike.

    torch.exp(x) is x.exp(), dim=-1 is -1, a + b is b + a, x ** 2 is x.square(); a variable is
    ("$", name). cos and sin stand alone, since a formula has cos θ where code has a variable.
    """
    if isinstance(node, ast.Call):
        return _shape_of_call(node)
    if isinstance(node, ast.Name):
        return (node.id,) if node.id in ("cos", "sin") else ("$", node.id)
    if isinstance(node, ast.Constant):
        return (f"={node.value!r}",) if not isinstance(node.value, str) else ("=text",)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _shape(node.operand)
        return (f"=-{inner[0][1:]}",) if inner[0].startswith("=") else ("USub", inner)
    if isinstance(node, ast.BinOp):
        sides = [_shape(node.left), _shape(node.right)]
        if isinstance(node.op, ast.Pow) and sides[1] == ("=2",):
            return ("square()", sides[0])
        if isinstance(node.op, ast.Add | ast.Mult):
            sides.sort(key=lambda side: repr(_renamed(side)))
        return (type(node.op).__name__, *sides)
    if isinstance(node, ast.Attribute):
        return (f".{node.attr}", _shape(node.value))
    if isinstance(node, ast.Expr | ast.Return) and node.value is not None:
        return _shape(node.value)
    if isinstance(node, ast.arg):
        return ("$", node.arg)
    children = (
        child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr_context)
    )
    return (type(node).__name__, *map(_shape, children))


def _shape_of_call(node: ast.Call) -> tuple:
    arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
    function = node.func
    if isinstance(function, ast.Attribute):
        name = function.attr
        root = ast.unparse(function.value).split(".")[0]
        if root not in _LIBRARIES:
            arguments.insert(0, function.value)
    elif isinstance(function, ast.Name):
        name = function.id
    else:
        return ("call", _shape(function), *map(_shape, arguments))
    if name in ("cos", "sin"):
        return (name,)
    shapes = [_shape(argument) for argument in arguments]
    if name == "pow" and shapes[1:] == [("=2",)]:
        return ("square()", shapes[0])
    return (f"{name}()", *shapes)


def _pieces(tree: tuple) -> Iterator[tuple]:
    if _size(tree) >= MIN_NODES:
        yield tree
        for child in tree[1:]:
            yield from _pieces(child)


def _size(tree: tuple) -> int:
    return 1 if tree[0] == "$" else 1 + sum(map(_size, tree[1:]))


def _renamed(tree: tuple) -> tuple:
    """Number the variables in the order in which they come."""
    numbers: dict[str, int] = {}

    def rename(part: tuple) -> tuple:
        if part[0] == "$":
            return ("$", numbers.setdefault(part[1], len(numbers)))
        return (part[0], *map(rename, part[1:]))

    return rename(tree)


# By grading it.


@dataclass(frozen=True)
class Job:
    """Files to grade in the place of a lab. blank: the lab with empty bodies, for comparison.

    variants: (the text, the names whose bodies were said, the turn of the latest of them).
    """

    lab: Lab
    blank: str
    variants: tuple[tuple[str, tuple[str, ...], int], ...]


def job(said: Sequence[Fragment], lab: Lab) -> Job | None:
    """Put what was said in the place of bodies; None where nothing fits anywhere."""
    reference = lab.solution.read_text(encoding="utf-8")
    listed = set(stubs.graded_names(lab))
    parts = {
        name: node
        for name, node in _functions(_tree(reference))
        if name.split(".")[0] in listed and not _is_private_method(name)
    }
    bodies = {name: _bodies(said, name, node, parts) for name, node in parts.items()}
    bodies = {name: found for name, found in bodies.items() if found}
    if not bodies:
        return None
    extra = _definitions(said, parts)
    variants = []
    for place in range(min(MAX_VARIANTS, max(map(len, bodies.values())))):
        # Never the reference's own body beside them: it would turn its tests green for them.
        chosen = {name: found[min(place, len(found) - 1)] for name, found in bodies.items()}
        texts = {name: body for name, (body, _) in chosen.items()}
        turn = max(turn for _, turn in chosen.values())
        variants.append((_assembled(reference, texts, extra), tuple(chosen), turn))
    blank = _assembled(reference, {name: _blank(parts[name]) for name in bodies}, extra)
    return Job(lab, blank, tuple(variants))


def _is_private_method(name: str) -> bool:
    method = name.rpartition(".")[2]
    return "." in name and method.startswith("_") and not method.endswith("__")


def _bodies(
    said: Sequence[Fragment], name: str, function: Function, parts: dict
) -> list[tuple[list[ast.stmt], int]]:
    """List the bodies that what was said gives to one function, the likeliest first."""
    owner, _, short = name.rpartition(".")
    found = []
    for fragment in reversed(said):
        for node in _defined(fragment.tree, owner):
            if node.name == short:
                found.append((_with_arguments_of(node, function), fragment.turn))
    loose = [
        (fragment, [n for n in fragment.tree.body if not _is_definition(n)]) for fragment in said
    ]
    own = [pair for pair in loose if pair[0].spoken == (owner or name)]
    by_size = sorted(loose, key=lambda pair: -len(ast.dump(pair[0].tree)))
    for group in (own, loose, *([pair] for pair in by_size)):
        statements = [(s, fragment.turn) for fragment, found_in in group for s in found_in]
        body, turn = _joined(statements, function)
        if body:
            found.append((body, turn))
    for fragment in said:
        for node in fragment.tree.body:
            is_foreign = isinstance(node, Function) and node.name not in parts
            if is_foreign and not owner and _takes_as_many(node, function):
                found.append((_with_arguments_of(node, function), fragment.turn))
    unique = {"\n".join(map(ast.unparse, body)): (body, turn) for body, turn in reversed(found)}
    return list(reversed(unique.values()))[:MAX_VARIANTS]


def _defined(tree: ast.Module, owner: str) -> Iterator[Function]:
    """Yield functions that stand alone, or those of a class: inside of it or with a `self`."""
    for node in tree.body:
        if isinstance(node, Function):
            has_self = bool(node.args.args) and node.args.args[0].arg == "self"
            if has_self == bool(owner):
                yield node
        elif isinstance(node, ast.ClassDef) and node.name == owner:
            yield from (member for member in node.body if isinstance(member, Function))


def _is_definition(node: ast.stmt) -> bool:
    return isinstance(node, Function | ast.ClassDef | ast.Import | ast.ImportFrom)


def _arguments(function: Function) -> list[str]:
    arguments = function.args
    return [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


def _takes_as_many(node: Function, function: Function) -> bool:
    required = len(_arguments(function)) - len(function.args.defaults)
    return required <= len(_arguments(node)) <= len(_arguments(function))


def _with_arguments_of(node: Function, function: Function) -> list[ast.stmt]:
    """Take a body over into a function whose arguments have other names."""
    pairs = zip(_arguments(node), _arguments(function), strict=False)
    renamed = [f"{mine} = {theirs}" for mine, theirs in pairs if mine != theirs]
    return [*ast.parse("\n".join(renamed)).body, *node.body]


def _joined(
    statements: Iterable[tuple[ast.stmt, int]], function: Function
) -> tuple[list[ast.stmt], int]:
    """Make a body of the statements that can run in this order; returns it and the last turn."""
    known = {*_arguments(function), *dir(builtins), *_LIBRARIES}
    known |= _module_names(function)
    body, last = [], 0
    for statement, turn in statements:
        made = _names(statement, ast.Store)
        calls = {ast.unparse(n.func) for n in ast.walk(statement) if isinstance(n, ast.Call)}
        is_about = not calls & {function.name, f"self.{function.name}"}
        if _needed(statement) <= known and is_about and not _says_nothing(statement):
            body, last = [*body, statement], turn
            known |= made
    read = set().union(*(_names(statement, ast.Load) for statement in body))
    if read.isdisjoint(_arguments(function)):
        return [], 0  # what looks at none of the arguments is about something else
    if function.name == "__init__" and not any("self." in t for t in _targets(body)):
        return [], 0
    body = [s for s in body[:-1] if not isinstance(s, ast.Expr)] + body[-1:]
    final = body[-1]
    if isinstance(final, ast.Expr) and function.name != "__init__":
        body[-1] = ast.Return(final.value)
    elif isinstance(final, ast.Assign | ast.AugAssign):
        target = final.targets[0] if isinstance(final, ast.Assign) else final.target
        if isinstance(target, ast.Name):
            body.append(ast.Return(ast.Name(target.id, ast.Load())))
    return body, last


def _targets(body: Iterable[ast.stmt]) -> list[str]:
    assigned = (s for s in body if isinstance(s, ast.Assign))
    return [ast.unparse(target) for s in assigned for target in s.targets]


def _names(node: ast.AST, context: type[ast.expr_context]) -> set[str]:
    names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
    return {n.id for n in names if isinstance(n.ctx, context)}


def _needed(statement: ast.stmt) -> set[str]:
    """Names that must exist before a statement runs."""
    if isinstance(statement, ast.Assign):
        return _names(statement.value, ast.Load) - _names(statement.value, ast.Store)
    if isinstance(statement, ast.AugAssign):
        return _names(statement, ast.Load) | _names(statement.target, ast.Store)
    return _names(statement, ast.Load) - _names(statement, ast.Store)


def _module_names(function: Function) -> set[str]:
    """Names that the reference's body reads without making them: what its module holds."""
    read = {name for name in _names(function, ast.Load) if not name.startswith("_")}
    return read - _names(function, ast.Store)


def _says_nothing(statement: ast.stmt) -> bool:
    """A name, a constant, an attribute, a bare error and a look inside compute nothing."""
    if isinstance(statement, ast.Raise | ast.Pass):
        return True
    value = statement.value if isinstance(statement, ast.Expr | ast.Return) else None
    if isinstance(value, ast.Call) and ast.unparse(value.func) in ("print", "breakpoint"):
        return True
    while isinstance(value, ast.Attribute):
        value = value.value
    return isinstance(value, ast.Name | ast.Constant)


def _definitions(said: Sequence[Fragment], parts: dict) -> list[ast.stmt]:
    """Collect imports, helpers, and of graded classes the members that no test knows."""
    classes = {name.split(".")[0] for name in parts if "." in name}
    found = []
    for fragment in said:
        for node in fragment.tree.body:
            is_import = isinstance(node, ast.Import | ast.ImportFrom)
            if is_import and any(layers.is_of_a_lab(m) for m in layers.imported_modules(node)):
                continue
            if isinstance(node, ast.ClassDef) and node.name in classes:
                names = [f"{node.name}.{getattr(member, 'name', '')}" for member in node.body]
                pairs = zip(names, node.body, strict=True)
                rest = [member for name, member in pairs if name not in parts]
                found.append(ast.ClassDef(node.name, [], [], rest, []))
            elif _is_definition(node) and getattr(node, "name", "") not in parts:
                found.append(node)
    return found


def _blank(function: Function) -> list[ast.stmt]:
    arguments = [name for name in _arguments(function) if name != "self"]
    if function.name == "__init__":
        return ast.parse("super().__init__()").body
    return ast.parse(f"import copy\nreturn copy.copy({(arguments or [None])[0]})").body


def _assembled(reference: str, bodies: dict[str, list[ast.stmt]], extra: list[ast.stmt]) -> str:
    tree = ast.parse(reference)
    for name, function in _functions(tree):
        if name in bodies:
            function.body = bodies[name]
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    lines = []
    for node in extra:
        if isinstance(node, ast.ClassDef) and node.name in classes:
            classes[node.name].body += node.body
        else:
            lines.append(textwrap.indent(ast.unparse(node), "    "))
    text = ast.unparse(ast.fix_missing_locations(tree))
    # At the end, helpers take the place of the reference's; one that cannot be made is left out.
    guarded = "".join(f"try:\n{line}\nexcept Exception:\n    pass\n" for line in lines)
    return f"{_PRELUDE}{text}\n{guarded}"


def grade(jobs: Sequence[Job]) -> list[Leak | None]:
    """Grade jobs; returns for each its first variant that turns a test green, or None.

    Such a test passes with the code and fails where the same bodies only return a copy of their
    first argument. Raises RuntimeError when the suites cannot be run.
    """
    if not jobs:
        return []
    sent = [
        {"lab": j.lab.name, "blank": j.blank, "variants": [text for text, _, _ in j.variants]}
        for j in jobs
    ]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("COURSE_", "PYTEST_"))}
    num_runs = sum(1 + len(j.variants) for j in jobs)
    done = subprocess.run(
        [sys.executable, "-P", "-c", _CHILD],
        input=json.dumps(sent),
        env={**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        timeout=60 + SECONDS_PER_RUN * num_runs,
    )
    if done.returncode:
        raise RuntimeError(f"grading a transcript failed:\n{done.stderr[-3000:]}")
    answers = json.loads(done.stdout.splitlines()[-1])
    return [_leak(j, *found) if found else None for j, found in zip(jobs, answers, strict=True)]


def _leak(job: Job, place: int, test: str) -> Leak:
    _, names, turn = job.variants[place]
    where = f"{', '.join(names[:-1])} or {names[-1]}" if names[1:] else names[0]
    return Leak(turn, f"the code so far, as the body of {where}, turns {test} green")


def grade_here() -> None:
    """Grade the jobs on standard input; for the process that `grade` starts."""
    blanks: dict[str, list[str]] = {}
    answers = []
    for sent in json.load(sys.stdin):
        (lab,) = find_labs(sent["lab"])
        if sent["blank"] not in blanks:
            blanks[sent["blank"]] = _run(lab, sent["blank"], [])["failed"]
        answers.append(_first_green(lab, sent["variants"], blanks[sent["blank"]]))
    print(f"\n{json.dumps(answers)}")


def _first_green(lab: Lab, texts: Sequence[str], red: Sequence[str]) -> tuple[int, str] | None:
    """Return the place of the first text that turns one of the red tests green, and that test."""
    for place, text in enumerate(texts if red else ()):
        passed = _run(lab, text, red)["passed"]
        if passed:
            return place, passed[0]
    return None


def _run(lab: Lab, text: str, tests: Sequence[str]) -> dict[str, list[str]]:
    """Grade one text; with tests, only those, until the first one passes."""
    with tempfile.TemporaryDirectory() as folder:
        file, target = Path(folder) / f"{lab.stem}.py", Path(folder) / "outcome.json"
        file.write_text(text, encoding="utf-8")
        if hasattr(os, "fork"):
            _import_what_the_suite_imports(lab)
            _fork(lab, file, target, tests)
        else:
            code = f"from course import leaks; leaks.run_pytest(*{(lab.name, str(file))!r}, "
            code += f"{str(target)!r}, {list(tests)!r})"
            subprocess.run([sys.executable, "-P", "-c", code], timeout=SECONDS_PER_RUN)
        if not target.is_file():  # killed, or it ended its process
            return {"passed": [], "failed": []}
        return json.loads(target.read_text(encoding="utf-8"))


def _import_what_the_suite_imports(lab: Lab) -> None:
    names = layers.imported_modules(ast.parse(lab.tests.read_bytes()))
    for name in ["pytest", "torch", "course.plugin", *names]:
        importlib.import_module(name)


def _fork(lab: Lab, file: Path, target: Path, tests: Sequence[str]) -> None:
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            run_pytest(lab.name, str(file), str(target), tests)
        finally:
            os._exit(0)
    end = time.monotonic() + SECONDS_PER_RUN
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > end:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            return
        time.sleep(0.01)


def run_pytest(lab_name: str, file: str, target: str, tests: Sequence[str]) -> None:
    """Grade a file in the place of a lab's reference and write the outcome to target."""
    import pytest

    (lab,) = find_labs(lab_name)
    outcome: dict[str, list[str]] = {"passed": [], "failed": []}

    class Recorder:
        def pytest_sessionstart(self, session: pytest.Session) -> None:
            self.session = session

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or report.failed:
                test = report.nodeid.partition("::")[2]
                outcome.setdefault(report.outcome, []).append(test)
            if tests and outcome["passed"]:
                self.session.shouldstop = "one is enough"

    paths = [f"{lab.solution}::{test}" for test in tests] or [str(lab.solution)]
    options = ["-q", "--tb=no", "--assert=plain", "--no-diagnosis"]
    options += [f"--seconds-per-test={SECONDS_PER_TEST}", f"--candidate={lab.name}={file}"]
    for plugin in ("cacheprovider", "unraisableexception", "threadexception"):
        options += ["-p", f"no:{plugin}"]
    pytest.main([*options, *paths], plugins=[Recorder()])
    Path(target).write_text(json.dumps(outcome), encoding="utf-8")
