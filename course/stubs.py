"""Turn the references into the learner's stubs, and tell stubs from files with work in them."""

import ast
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from itertools import chain, count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from course import files, labs, layers
from course.labs import Lab

# libcst takes a third of a second to import, so the functions that rewrite code do it themselves.
if TYPE_CHECKING:
    from libcst import (
        BaseStatement,
        ClassDef,
        CSTNode,
        FunctionDef,
        Import,
        ImportAlias,
        ImportFrom,
        SimpleStatementLine,
    )
    from libcst.metadata import MetadataWrapper

_LINE_LENGTH = 100


def make_stub(lab: Lab) -> str:
    """Return the text of a lab's stub; ValueError when its reference cannot be made into one."""
    source = lab.solution.read_text(encoding="utf-8")
    return stub_source(source, lab.name, _shown(lab.note))


def write_stubs(
    chosen: Iterable[Lab], force: bool = False, report: Callable[[str], None] = print
) -> None:
    """Write the stubs that are missing or out of date, and leave edited files alone.

    force: write in the place of edited files too, and keep those as backups.
    report: takes one line for each file written, kept or left alone.
    """
    # All texts come first: a reference that makes no stub stops us before anything is written.
    texts = {lab: make_stub(lab) for lab in chosen}
    for lab, text in texts.items():
        record = _read_record()
        old, new = _file_digest(lab.code), _digest(text.encode())
        edited = old not in (None, new, record.get(lab.name))
        if edited and not force:
            report(f"{_shown(lab.code)}: left alone, because it has been edited")
        elif old != new:
            if edited:
                report(f"{_shown(lab.code)}: kept as {_shown(_back_up(lab))}")
            files.replace(lab.code, text)
            report(f"{_shown(lab.code)}: written")
        _write_record(record | {lab.name: new})


def check_stubs() -> list[str]:
    """Return one line for each stub that is missing or out of date; edited files pass."""
    record, problems = _read_record(), []
    for lab in labs.all_labs():
        try:
            new = _digest(make_stub(lab).encode())
        except (OSError, ValueError, SyntaxError) as error:
            problems.append(f"{_shown(lab.solution)} makes no stub: {error}")
            continue
        old, recorded = _file_digest(lab.code), record.get(lab.name)
        if old is None:
            problems.append(f"{_shown(lab.code)} is missing; `course stubs` writes it")
        elif old == recorded and old != new:
            problems.append(f"{_shown(lab.code)} is out of date; `course stubs` writes it anew")
        elif recorded != new:
            problems.append(
                f"{_shown(_record_path())} is out of date for {lab.name}: `course stubs`"
            )
    gone = record.keys() - {lab.name for lab in labs.all_labs()}
    problems += [f"{_shown(_record_path())} lists {name}, which is no lab" for name in sorted(gone)]
    return problems


def is_untouched(lab: Lab) -> bool:
    """Say whether the learner's file is still as `write_stubs` wrote it; a missing one is not."""
    digest = _file_digest(lab.code)
    return digest is not None and digest == _read_record().get(lab.name)


def reset_lab(lab: Lab, report: Callable[[str], None] = print) -> None:
    """Put a lab's stub back, and keep what the learner wrote under `.course/backups/`."""
    if is_untouched(lab):
        report(f"{_shown(lab.code)}: nothing to do, it is the untouched stub")
    else:
        write_stubs([lab], force=True, report=report)


@cache
def stub_source(source: str, lab_name: str, note: str) -> str:
    """Turn the text of a reference into the text of its stub.

    lab_name: such as "week1/rope". note: the path of the session note that the message about
        unwritten work points to.
    Raises ValueError when `__all__` lists what is no function or class of the module, or when
    something graded has no docstring.
    """
    import libcst as cst
    from libcst.metadata import MetadataWrapper

    listed = _listed(source, lab_name)
    wrapper = MetadataWrapper(cst.parse_module(source))
    graded = _graded(wrapper.module.body, listed, lab_name)
    kept, names = _survivors(wrapper, graded)
    message = f"{lab_name}.py: {{}} is not written yet → {note}"

    def rewrite(statement: "BaseStatement") -> "BaseStatement | None":
        if statement not in kept:
            return None
        if statement in graded:
            return _emptied(statement, graded[statement], message)
        return _with_imports_of(names, statement)

    body = _rewritten(wrapper.module.body, rewrite)
    return wrapper.module.with_changes(body=body).code.strip("\n") + "\n"


def graded_names(lab: Lab) -> list[str]:
    """Return what a lab's `__all__` lists: the names that the learner writes."""
    return _listed(lab.solution.read_text(encoding="utf-8"), lab.name)


def _listed(source: str, lab_name: str) -> list[str]:
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise ValueError(f"{lab_name} has no __all__, which lists what the learner writes")


def _graded(
    body: "Sequence[BaseStatement]", listed: list[str], lab_name: str
) -> "dict[FunctionDef | ClassDef, str]":
    """Find the definitions that `__all__` lists, and hold each public part to its docstring."""
    defined = {node.name.value: node for node in body if _is_definition(node)}
    for name in listed:
        if name not in defined:
            raise ValueError(f"{lab_name}: __all__ lists {name}, no top-level function or class")
        for part, part_name in _parts(defined[name], name):
            # The docstring of a class speaks for __init__ and its like.
            is_exempt = "._" in part_name
            if not is_exempt and not part.get_docstring():
                raise ValueError(f"{lab_name}: {part_name} is graded but has no docstring")
    return {defined[name]: name for name in listed}


def _is_definition(node: "CSTNode") -> bool:
    import libcst as cst

    return isinstance(node, cst.FunctionDef | cst.ClassDef)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def _parts(
    definition: "FunctionDef | ClassDef", name: str
) -> "Iterator[tuple[FunctionDef | ClassDef, str]]":
    """Yield a function, or a class and what is defined in it, with dotted names."""
    import libcst as cst

    yield definition, name
    if isinstance(definition, cst.ClassDef) and not _is_private_part(name):
        for member in filter(_is_definition, definition.body.body):
            yield from _parts(member, f"{name}.{member.name.value}")


def _is_private_part(dotted_name: str) -> bool:
    return "." in dotted_name and _is_private(dotted_name.rpartition(".")[2])


@dataclass
class _Names:
    """The module-level names that one top-level statement binds, and those that its stub uses."""

    bound: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)
    only_imports: bool = True


def _survivors(
    wrapper: "MetadataWrapper", graded: "dict[FunctionDef | ClassDef, str]"
) -> "tuple[set[BaseStatement], set[str]]":
    """Find the top-level statements that stay, and the names that the imports have to bring."""
    names, to_import = _names_by_statement(wrapper, graded)

    def waits(part: _Names) -> bool:
        return bool(part.bound) and (part.only_imports or all(map(_is_private, part.bound)))

    kept = {node for node, part in names.items() if node in graded or not waits(part)}
    while True:
        used = set().union(*(names[node].used for node in kept))
        to_import |= used
        more = {
            node
            for node, part in names.items()
            if part.bound & (to_import if part.only_imports else used)
        }
        if more <= kept:
            return kept, to_import
        kept |= more


def _names_by_statement(
    wrapper: "MetadataWrapper", graded: "dict[FunctionDef | ClassDef, str]"
) -> "tuple[dict[BaseStatement, _Names], set[str]]":
    """Sort the uses of module-level names by statement.

    Second come the names that are used in what the learner writes, or not at all (imported for
    others to find), or that come from another lab (the learner is to build on it): reason enough
    for an import to stay, not for a private name.
    """
    import libcst as cst
    from libcst.metadata import ImportAssignment, ParentNodeProvider, ScopeProvider

    parents = wrapper.resolve(ParentNodeProvider)
    parts = [part for definition in graded.items() for part in _parts(*definition)]
    private = {node for node, name in parts if _is_private_part(name)}
    answers = {node.body for node, _ in parts if isinstance(node, cst.FunctionDef)}
    names = {statement: _Names() for statement in wrapper.module.body}

    def path_to(node: "CSTNode") -> "list[CSTNode]":
        path = [node]
        while path[-1] not in names:
            path.append(parents[path[-1]])
        return path

    in_answers, anywhere = set(), set()
    for assignment in wrapper.resolve(ScopeProvider)[wrapper.module].assignments:
        name = assignment.name.split(".")[0]
        owner = names[path_to(assignment.node)[-1]]
        owner.bound.add(name)
        owner.only_imports &= isinstance(assignment, ImportAssignment)
        for access in assignment.references:
            anywhere.add(name)
            path = path_to(access.node)
            if private.isdisjoint(path):
                (names[path[-1]].used if answers.isdisjoint(path) else in_answers).add(name)
    bound = set().union(*(part.bound for part in names.values()))
    from_labs = set().union(*(part.bound for node, part in names.items() if _imports_a_lab(node)))
    return names, in_answers | from_labs | (bound - anywhere)


def _imports_a_lab(statement: "BaseStatement") -> bool:
    import libcst as cst

    line = statement.body[0] if isinstance(statement, cst.SimpleStatementLine) else None
    if not isinstance(line, cst.ImportFrom) or line.module is None:
        return False
    return layers.is_of_a_lab(cst.Module([]).code_for_node(line.module))


def _rewritten(
    statements: "Sequence[BaseStatement]",
    rewrite: "Callable[[BaseStatement], BaseStatement | None]",
) -> "list[BaseStatement]":
    """Rewrite statements; where one vanishes, no gap and no missing blank line stays behind."""
    import libcst as cst

    result, gap = [], 0
    for statement in statements:
        new = rewrite(statement)
        own = len(list(takewhile(lambda line: line.comment is None, statement.leading_lines)))
        if new is None:
            gap = max(gap, own)
            continue
        if gap:
            # ruff wants the blank lines of a definition; between other statements one will do.
            blank = max(gap, own) if any(map(_is_definition, [*result[-1:], new])) else 1
            lines = [cst.EmptyLine(indent=False)] * blank + list(new.leading_lines[own:])
            new = new.with_changes(leading_lines=lines)
        result.append(new)
        gap = 0
    return result


def _emptied(
    definition: "FunctionDef | ClassDef", name: str, message: str
) -> "FunctionDef | ClassDef":
    """Take the answer out of a graded function, or out of each method of a graded class."""
    import libcst as cst

    if isinstance(definition, cst.ClassDef):

        def rewrite(member: "BaseStatement") -> "BaseStatement | None":
            if not _is_definition(member):
                return member
            member_name = f"{name}.{member.name.value}"
            return None if _is_private_part(member_name) else _emptied(member, member_name, message)

        body = _rewritten(definition.body.body, rewrite)
        return definition.with_changes(body=definition.body.with_changes(body=body))
    body = [_raise_statement(message.format(name), indent=4 + 4 * name.count("."))]
    if definition.get_docstring() is not None:
        first = definition.body.body[0]
        docstring = first.body[0] if isinstance(first, cst.SimpleStatementLine) else first
        body.insert(0, cst.SimpleStatementLine([cst.Expr(docstring.value)]))
    return definition.with_changes(body=cst.IndentedBlock(body))


def _raise_statement(message: str, indent: int) -> "BaseStatement":
    """Write the statement in as few lines as ruff would."""
    import libcst as cst

    text = f'raise NotImplementedError("{message}")'
    if indent + len(text) > _LINE_LENGTH:
        lines = [f'"{message}"']
        if indent + 4 + len(lines[0]) > _LINE_LENGTH:
            what, where = message.split("→")
            lines = [f'"{what}"', f'"→{where}"']
        text = "raise NotImplementedError(\n    " + "\n    ".join(lines) + "\n)"
    return cst.parse_statement(text)


def _with_imports_of(names: set[str], statement: "BaseStatement") -> "BaseStatement | None":
    """Keep of an import, or of the imports in an `if`, what binds one of the names."""
    import libcst as cst

    if isinstance(statement, cst.If):
        inner = (_with_imports_of(names, child) for child in statement.body.body)
        body = statement.body.with_changes(body=[child for child in inner if child is not None])
        return statement.with_changes(body=body)
    line = statement.body[0] if isinstance(statement, cst.SimpleStatementLine) else None
    if not isinstance(line, cst.Import | cst.ImportFrom) or isinstance(line.names, cst.ImportStar):
        return statement
    kept = [name for name in line.names if _bound_by(name) in names]
    if len(kept) == len(line.names):
        return statement
    return statement.with_changes(body=_import_line(line, kept).body) if kept else None


def _bound_by(name: "ImportAlias") -> str:
    return name.evaluated_alias or name.evaluated_name.split(".")[0]


def _import_line(line: "Import | ImportFrom", names: "list[ImportAlias]") -> "SimpleStatementLine":
    """Write an import of some of its names in as few lines as ruff would."""
    import libcst as cst

    texts = [
        f"{name.evaluated_name} as {name.evaluated_alias}" if name.asname else name.evaluated_name
        for name in names
    ]
    if isinstance(line, cst.Import):
        return cst.parse_statement(f"import {', '.join(texts)}")
    module = cst.Module([]).code_for_node(line.module) if line.module else ""
    head = f"from {'.' * len(line.relative)}{module} import "
    if len(head + ", ".join(texts)) <= _LINE_LENGTH:
        return cst.parse_statement(head + ", ".join(texts))
    return cst.parse_statement(head + "(\n" + "".join(f"    {text},\n" for text in texts) + ")")


def _shown(path: Path) -> str:
    return path.relative_to(labs.ROOT).as_posix()


def digest_of(text: str) -> str:
    """Digest a file's text; line endings make no difference."""
    return _digest(text.encode())


def _digest(data: bytes) -> str:
    # Git on Windows may check a stub out with other line endings: that is no edit.
    return hashlib.sha256(data.replace(b"\r\n", b"\n")).hexdigest()


def _file_digest(path: Path) -> str | None:
    return _digest(path.read_bytes()) if path.is_file() else None


def _record_path() -> Path:
    return labs.ROOT / "code" / ".stubs.json"


def _read_record() -> dict[str, str]:
    """Read which text each stub had when it was written, as a digest by lab name."""
    try:
        record = json.loads(_record_path().read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        # Without a record, or with one torn by a merge, every file counts as edited: safe.
        return {}
    return record if isinstance(record, dict) else {}


def _write_record(record: dict[str, str]) -> None:
    known = {lab.name for lab in labs.all_labs()}
    record = {name: digest for name, digest in record.items() if name in known}
    data = (json.dumps(record, indent=2, sort_keys=True) + "\n").encode()
    if _file_digest(_record_path()) != _digest(data):
        files.replace(_record_path(), data)


def _back_up(lab: Lab) -> Path:
    """Copy the learner's file to a new place under `.course/backups/`."""
    folder = labs.ROOT / ".course" / "backups" / lab.week
    folder.mkdir(parents=True, exist_ok=True)
    now = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    for suffix in chain([""], (f"-{number}" for number in count(2))):
        backup = folder / f"{lab.stem}.{now}{suffix}.py"
        try:
            backup.touch(exist_ok=False)
        except FileExistsError:
            continue
        files.replace(backup, lab.code.read_bytes())
        return backup
