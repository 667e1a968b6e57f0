"""What the graded suites call: the lab under test, and checks whose failures speak to a learner.

A suite never imports a lab. It asks `lab("week1/attention")` for a stand-in that imports the
learner's file at the first use inside a test, so that a file that cannot be imported fails its own
tests with one clear sentence and leaves every other lab alone.
"""

import ast
import contextlib
import dataclasses
import functools
import importlib
import inspect
import itertools
import math
import random
import re
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor

from course import layers
from course.labs import GROUPS, Lab, find_labs

# Largest error of a result, as a share of the largest value of its row, by the dtype of the result.
TOLERANCE = MappingProxyType(
    {
        # Another order of summation over the few thousand terms of a test moves the last 3 bits.
        torch.float64: 1e-12,
        torch.float32: 1e-5,
        # One rounding of the result is 2⁻¹¹; inputs and one intermediate value are rounded as well.
        torch.float16: 2e-3,
        # The same with 2⁻⁸.
        torch.bfloat16: 1.6e-2,
    }
)
WHERE_TRITON_RUNS = "Triton, which runs on Linux, or in WSL on Windows"
# Bound before any lab is imported, so that no lab can put its own in the place of it.
_torch_equal = torch.equal
# A shape may be named as torch prints it, torch.Size([3, 4]), or as a tuple.
_SIZE = re.compile(r"torch\.Size\((\[[\d, ]*\])\)")
WIDTH = 78
MAX_TIMEOUTS = 2
MAX_STEPS = 6


class GradedFailure(AssertionError):
    """A wrong result, told in the learner's terms; shown without a traceback.

    produced: what the lab gave, for comparison with what a known mistake gives; None means the
    text. expected: the right value, where it is one of the same kind.
    """

    def __init__(self, text: str, produced: Any = None, expected: Any = None):
        super().__init__(text)
        self.produced = text if produced is None else produced
        self.expected = expected


@dataclass(frozen=True)
class Evidence:
    """What a lab was caught with.

    kind: "wrong", or the type of the error. line: of the suite. num_calls: of graded functions
    until then. value: what the lab gave. expected: the right value, or None.
    """

    kind: str
    line: int
    num_calls: int
    value: Any
    expected: Any = None


class LabUnusable(Exception):
    """A lab file that cannot be imported, in one sentence."""


class OutOfTime(BaseException):
    """A test that ran too long; no Exception, so that `except Exception` does not catch it."""


class PrintFlood(BaseException):
    """A test that prints without end."""


@dataclass
class Session:
    """The run in progress, set by the plugin: what is graded, and from which folders."""

    tree: str = "solutions"
    folders: tuple[Path, ...] = (layers.SOLUTIONS,)
    last_call: str = ""
    """The latest call of a graded function, in words."""
    num_calls: int = 0
    """Calls of graded functions in the test so far."""


session = Session()


def activate(folders: Sequence[Path]) -> None:
    """Let labs be imported from a layer, and from nowhere else; see `layers.folders`."""
    layers.activate(folders)
    session.folders = tuple(folders)


def seed_everything() -> None:
    """Start the global generators anew, so that a test gives the same result when it runs again."""
    random.seed(0)
    torch.manual_seed(0)


class GradedLab:
    """Stands for a lab's module in a suite; attributes come from the layer that is graded."""

    def __init__(self, lab: Lab):
        self._lab = lab
        self._loaded: ModuleType | None = None
        self._problem: str | None = None
        self._num_timeouts = 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            # No suite asks for a private name; pytest does, while it collects.
            raise AttributeError(name)
        module = self._module()
        try:
            value = getattr(module, name)
        except AttributeError:
            raise LabUnusable(f"{self._lab.name}.py defines no `{name}`") from None
        return _recorded(value) if inspect.isfunction(value) else value

    def note_timeout(self) -> None:
        """Count a test that ran out of time; after a few, the lab's other tests are not tried."""
        self._num_timeouts += 1
        if self._num_timeouts >= MAX_TIMEOUTS:
            self._problem = (
                f"{self._lab.name}.py: not run, because {MAX_TIMEOUTS} tests of it ran out of time"
            )

    @contextlib.contextmanager
    def replaced_by(self, module: ModuleType) -> Iterator[None]:
        """Let suites see another module for a while, as if the run had just begun with it."""
        kept = self._loaded, self._problem, session.last_call, session.num_calls
        self._loaded, self._problem = module, None
        session.last_call, session.num_calls = "", 0
        try:
            yield
        finally:
            self._loaded, self._problem, session.last_call, session.num_calls = kept

    def _module(self) -> ModuleType:
        if self._problem is not None:
            raise LabUnusable(self._problem)
        if self._loaded is None:
            try:
                self._loaded = import_lab(self._lab)
            except LabUnusable as error:
                self._problem = str(error)
                raise
        return self._loaded


@functools.cache
def lab(name: str) -> GradedLab:
    """Return the stand-in for a lab such as "week1/attention"."""
    (found,) = find_labs(name)
    return GradedLab(found)


def import_lab(lab: Lab) -> ModuleType:
    """Import a lab from the active layer. Raises LabUnusable with one sentence for the learner."""
    _check_importable(lab)
    try:
        module = importlib.import_module(lab.module)
    except (KeyboardInterrupt, NotImplementedError, OutOfTime, PrintFlood):
        raise
    except BaseException as error:
        raise LabUnusable(_import_problem(lab, error)) from None
    file = Path(module.__file__ or "")
    if not any(file.is_relative_to(folder) for folder in session.folders):
        raise SystemExit(f"{lab.name} would be graded from {file}, which is not the learner's tree")
    return module


def _check_importable(lab: Lab) -> None:
    file = next((f for f in _candidates(lab) if f.is_file()), None)
    if file is None:
        strays = "".join(f"; there is {stray}" for stray in layers.stray_files(lab.week))
        raise LabUnusable(
            f"{lab.path} does not exist{strays}; `course reset {lab.name}` brings the stub back"
        )
    if file.is_symlink():
        raise LabUnusable(f"{lab.name}.py is a link to another file; a lab is a file of its own")
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (SyntaxError, ValueError):
        return  # importing it says where
    own_week = layers.week_of(lab.week) or 0
    for name in layers.imported_modules(tree):
        if name.partition(".")[0] in ("solutions", "tests", "course"):
            raise LabUnusable(f"{lab.name}.py imports {name}, which belongs to the course itself")
        if name.partition(".")[0] in ("pytest", "_pytest"):
            raise LabUnusable(f"{lab.name}.py imports {name}, which is what grades it")
        if lab.is_drill and layers.week_of(name):
            raise LabUnusable(f"{lab.name}.py imports {name}, and a drill imports no week's lab")
        if (layers.week_of(name) or 0) > own_week:
            raise LabUnusable(f"{lab.name}.py imports {name}, which belongs to a later week")


def _candidates(lab: Lab) -> list[Path]:
    return [folder / lab.week / f"{lab.stem}.py" for folder in session.folders]


def _import_problem(lab: Lab, error: BaseException) -> str:
    own = f"{lab.name}.py"
    if isinstance(error, SyntaxError):
        where = short_path(error.filename or "") or own
        text = f"{where}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    else:
        frame = learner_frame(error)
        where = short_path(frame.filename) if frame else own
        place = f"{where}, line {frame.lineno}" if frame else own
        if isinstance(error, SystemExit):
            text = f"{place}: sys.exit is called while the file is imported"
        elif isinstance(error, ModuleNotFoundError) and error.name == "triton":
            text = f"{own} needs {WHERE_TRITON_RUNS}"
        else:
            text = f"{place}: {type(error).__name__}: {error}"
    if where != own:
        other = where.removesuffix(".py")
        text = (
            f"{own} needs {where}, and that cannot be imported ({text}); "
            f"to go on with the reference for it: pytest {lab.path} --reference {other}"
        )
    return text


def learner_frame(
    error: BaseException, folders: Sequence[Path] | None = None
) -> traceback.FrameSummary | None:
    """Return the error's innermost frame in one of the folders; None means the layer's folders."""
    folders = session.folders if folders is None else folders
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if any(Path(frame.filename).is_relative_to(folder) for folder in folders)
    ]
    return frames[-1] if frames else None


def short_path(filename: str) -> str:
    """Shorten a graded file's path to the form week1/attention.py; "" for any other file."""
    path = Path(filename)
    for folder in session.folders:
        if path.is_relative_to(folder):
            return path.relative_to(folder).as_posix()
    return ""


def _recorded(function: Callable) -> Callable:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        session.last_call = describe_call(function, args, kwargs)
        session.num_calls += 1
        return function(*args, **kwargs)

    return call


def describe_call(function: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    """Put a call into words: the names of its parameters with shapes, dtypes and small values."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        names = []
    named = [*zip([*names, *["…"] * len(args)], args, strict=False), *kwargs.items()]
    inside = ", ".join(f"{name}: {describe(value)}" for name, value in named)
    return f"{function.__name__}({inside})"


def describe(value: Any) -> str:
    """Put a value into a few words; tensors and long sequences by shape, never by content."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        shape = tuple(value.shape)
        small = value.numel() <= 8 and value.dim() <= 1 and value.device.type != "meta"
        return f"{_six_digits(value.tolist())} {dtype}" if small else f"{shape} {dtype}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        if len(value) > 8:
            return f"{type(value).__name__} of {len(value)}"
        if any(isinstance(item, Tensor) for item in value):
            return f"{type(value).__name__} of {', '.join(map(describe, value))}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _set_fields(value)
    if type(value).__repr__ is object.__repr__ or isinstance(value, torch.nn.Module):
        return type(value).__name__
    if inspect.isroutine(value):
        return getattr(value, "__name__", type(value).__name__)
    return textwrap.shorten(repr(value), 60, placeholder=" …")


def _set_fields(value: Any) -> str:
    """Show a dataclass by the fields that are not at their defaults: what a test varies."""
    changed = [
        f"{field.name}={describe(getattr(value, field.name))}"
        for field in dataclasses.fields(value)
        if field.default is dataclasses.MISSING or getattr(value, field.name) != field.default
    ]
    return f"{type(value).__name__}({', '.join(changed)})"


def _six_digits(value: Any) -> Any:
    """Round floats for a reader, inside lists too: 0.30000001192092896 becomes 0.3."""
    if isinstance(value, list):
        return [_six_digits(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


class History:
    """What a test did to a structure, step by step; the latest steps open its failure message."""

    def __init__(self, start: str):
        self._start = start
        self._steps: list[str] = []

    def note(self, operation: str, result: Any) -> Any:
        """Keep one operation with its result, and return the result."""
        self._steps.append(f"  {operation} → {describe(result)}")
        return result

    def __str__(self) -> str:
        before = len(self._steps) - MAX_STEPS
        earlier = [f"  … {before} steps before"] if before > 0 else []
        return "\n".join([self._start, *earlier, *self._steps[-MAX_STEPS:]])


def check_close(
    got: Any,
    expected: Tensor,
    *,
    dtype: torch.dtype | None = None,
    tolerance: float | None = None,
    of: object = None,
) -> None:
    """Hold a tensor against the oracle's.

    dtype: what the result must have; None means the oracle's. tolerance: the largest error as a
    share of the largest value in the same row, None takes it from TOLERANCE by dtype. of: the input
    in words or a History, None means the latest call of a graded function.
    """
    what = str(of or session.last_call)
    dtype = dtype or expected.dtype
    _check_form(got, tuple(expected.shape), dtype, what)
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    wide, want = got.detach().cpu().double(), expected.detach().cpu().double()
    peaks = want.abs().nan_to_num(0.0, 0.0, 0.0)
    row_peaks = peaks.amax(-1, keepdim=True) if want.dim() and want.shape[-1] else peaks
    # A row of tiny values beside large ones is allowed a hundredth of the tensor's own scale.
    scale = row_peaks.clamp(min=float(peaks.max()) / 100) if want.numel() else peaks
    same = (wide == want) | (wide.isnan() & want.isnan())
    wrong = ~(same | ((wide - want).abs() <= tolerance * scale))
    if bool(wrong.any()):
        text = _difference(what, wide, want, wrong, tolerance, dtype)
        raise GradedFailure(text, got.detach().cpu().clone(), want)


def _check_form(got: Any, shape: tuple[int, ...], dtype: torch.dtype, what: str) -> None:
    if type(got) not in (Tensor, torch.nn.Parameter):
        raise GradedFailure(_lines(what, f"returned {describe(got)}, expected a tensor"))
    produced = got.detach().cpu().clone() if got.device.type != "meta" else "a meta tensor"
    if tuple(got.shape) != shape:
        also = f" (and {got.dtype}, expected {dtype})" if got.dtype != dtype else ""
        text = f"returned shape {tuple(got.shape)}, expected {shape}{also}"
        raise GradedFailure(_lines(what, text), produced)
    if got.device.type == "meta":
        raise GradedFailure(_lines(what, "returned a tensor without data, on the meta device"))
    if got.dtype != dtype:
        raise GradedFailure(
            _lines(what, "shape is right", f"returned dtype {got.dtype}, expected {dtype}"),
            produced,
        )


def _difference(
    what: str, got: Tensor, want: Tensor, wrong: Tensor, tolerance: float, dtype: torch.dtype
) -> str:
    index = tuple(wrong.nonzero()[0].tolist())
    errors = (got - want).abs()[wrong]
    finite = errors[errors.isfinite()]
    largest = f"; largest difference {float(finite.max()):.3g}" if len(finite) else ""
    shown = [f"{float(value):.6g}" for value in (got[index], want[index].to(dtype))]
    if shown[0] == shown[1]:
        shown = [f"{float(value):.17g}" for value in (got[index], want[index])]
    lines = [
        "shape and dtype are right",
        f"first difference at {list(index)}: got {shown[0]}, expected {shown[1]}   "
        f"(allowed: {tolerance:.2g} of the row's largest)",
        f"{int(wrong.sum()):,} of {wrong.numel():,} elements differ{largest}",
        *_where(wrong),
    ]
    num_nan, num_inf = int(got.isnan().sum()), int(got.isinf().sum())
    if num_nan or num_inf:
        lines.append(f"your result holds {num_nan:,} NaN and {num_inf:,} Inf")
    return _lines(what, *lines)


def _where(wrong: Tensor) -> list[str]:
    """Say along which axes the differences keep to some of the indices, in at most two lines."""
    hits = []
    for axis in range(wrong.dim()):
        others = [other for other in range(wrong.dim()) if other != axis]
        hits.append(wrong.any(dim=others) if others else wrong)
    # Scattered differences, such as those of a rounding, keep to some indices by chance.
    if int(wrong.sum()) < 0.5 * math.prod(int(hit.sum()) for hit in hits):
        return []
    lines = []
    for axis, hit in enumerate(hits):
        length = len(hit)
        bad, good = (flags.nonzero().flatten().tolist() for flags in (hit, ~hit))
        few = good if len(good) <= len(bad) else bad
        ranges = _ranges(few)
        if not good or len(ranges) > 3:
            continue
        places = " and ".join(filter(None, (", ".join(ranges[:-1]), ranges[-1])))
        verb = "is" if len(few) == 1 else "are"
        text = f"{places} {verb} right" if few is good else f"all differences are at {places}"
        lines.append(f"along axis {axis} (length {length}), {text}")
    return lines[:2]


def _ranges(indices: list[int]) -> list[str]:
    """Write sorted indices as runs: [0, 4, 5, 6] becomes ["0", "4–6"]."""
    starts = [i for i, index in enumerate(indices) if i == 0 or indices[i - 1] != index - 1]
    runs = [indices[a:b] for a, b in itertools.pairwise([*starts, len(indices)])]
    return [str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs]


def check_equal(got: Any, expected: Any, what: str, of: object = None) -> None:
    """Hold a plain value (ids, text, a flag, a tensor of integers) against the right one.

    what: what the value is, such as "the token ids".
    """
    context = str(of or session.last_call)
    if isinstance(expected, Tensor):
        _check_form(got, tuple(expected.shape), expected.dtype, context)
        if _torch_equal(got.detach().cpu(), expected.cpu()):
            return
        wrong = got.detach().cpu() != expected.cpu()
        index = tuple(wrong.nonzero()[0].tolist())
        pair = [_six_digits(value[index].item()) for value in (got.detach(), expected)]
        line = f"first difference at {list(index)}: got {pair[0]}, expected {pair[1]}"
        count = f"{int(wrong.sum()):,} of {wrong.numel():,} elements differ"
        raise GradedFailure(_lines(context, f"{what}: {line}", count), got.detach().cpu().clone())
    if type(got) is not type(expected) or got != expected:
        text = _lines(context, f"{what}: {_unequal(got, expected)}")
        raise GradedFailure(text, (what, got), expected)


def _unequal(got: Any, expected: Any) -> str:
    sequence = isinstance(got, (list, tuple, str)) and type(got) is type(expected)
    if not sequence or max(len(got), len(expected)) <= 12:
        return f"got {_brief(got)}, expected {_brief(expected)}"
    pairs = zip(got, expected, strict=False)
    shorter = min(len(got), len(expected))
    index = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
    start = max(0, index - 3)
    return (
        f"first difference at [{index}]: got …{_brief(got[start : index + 6])}, "
        f"expected …{_brief(expected[start : index + 6])} "
        f"(lengths {len(got)} and {len(expected)})"
    )


def _brief(value: Any) -> str:
    return textwrap.shorten(repr(value), 160, placeholder=" …")


def check_true(condition: bool | Tensor, what: str, of: object = None) -> None:
    """Hold a property. what: the property that does not hold, in words, with the values at hand."""
    if not bool(condition):
        raise GradedFailure(_lines(str(of or session.last_call), what), what)


def check_raises(
    expected: type[Exception],
    function: Callable,
    *args: Any,
    mentions: Sequence[Any] = (),
    **kwargs: Any,
) -> None:
    """Hold a call to raising `expected`, with a message that names each of `mentions`."""
    what = describe_call(function, args, kwargs)
    try:
        result = function(*args, **kwargs)
    except NotImplementedError as error:
        if _is_not_written(error):
            raise
        text = f"raised {type(error).__name__}: {error}"
        raise GradedFailure(_lines(what, text), text) from error
    except expected as error:
        message = _SIZE.sub(lambda found: str(tuple(ast.literal_eval(found[1]))), str(error))
        missing = [str(word) for word in mentions if str(word) not in message]
        if missing:
            text = f"{expected.__name__}({error}) does not name {' and '.join(missing)}"
            raise GradedFailure(_lines(what, text), text) from None
        return
    except Exception as error:
        text = f"raised {error!r}; expected {expected.__name__}"
        raise GradedFailure(_lines(what, text), text) from error
    text = f"returned {describe(result)}, expected {expected.__name__}"
    # An object of a class of the lab's own never equals that of another module of the lab.
    is_own = type(result).__module__.partition(".")[0] in GROUPS
    raise GradedFailure(_lines(what, text), text if is_own else result)


def evidence(error: BaseException) -> Evidence | None:
    """Return what a failure shows of the lab's behaviour; None where that is nothing of use."""
    if isinstance(error, (LabUnusable, OutOfTime, PrintFlood, KeyboardInterrupt, SystemExit)):
        return None
    if isinstance(error, NotImplementedError) and _is_not_written(error):
        return None
    if type(error).__module__.startswith("hypothesis."):
        return None  # such as an example that was drawn step by step and cannot be drawn again
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_suite(f.filename)]
    line = frames[-1].lineno or 0 if frames else 0
    if isinstance(error, GradedFailure):
        return Evidence("wrong", line, session.num_calls, error.produced, error.expected)
    return Evidence(type(error).__name__, line, session.num_calls, str(error))


def _lines(*lines: str) -> str:
    return "\n".join(line for line in lines if line)


def explain(error: BaseException, lab: Lab) -> tuple[str, str]:
    """Put a test's failure into words for the learner.

    Returns (kind, text). kind is "not written" or "unusable" when the text speaks of a whole lab,
    and "wrong" when it speaks of this test.
    """
    if isinstance(error, NotImplementedError) and _is_not_written(error):
        return "not written", _not_written(str(error), lab)
    if isinstance(error, LabUnusable):
        return "unusable", str(error)
    if isinstance(error, GradedFailure):
        return "wrong", _lines(str(error), *_examples(error))
    if isinstance(error, OutOfTime):
        return "wrong", _out_of_time(error)
    if isinstance(error, PrintFlood):
        return "wrong", f"{error}; is there a print inside a loop?"
    return "wrong", _crash(error)


def _examples(error: BaseException) -> list[str]:
    """Return the smallest failing input that hypothesis found, if the test is one of its."""
    notes = [note for note in getattr(error, "__notes__", []) if "alsifying example" in note]
    texts = [" ".join(note.partition("(")[2].rpartition(")")[0].split()) for note in notes]
    return [f"smallest failing input: {textwrap.shorten(text, 200)}" for text in texts]


def _is_not_written(error: NotImplementedError) -> bool:
    # torch raises NotImplementedError too, with a message of its own.
    return "is not written yet" in str(error) or not str(error)


def _not_written(message: str, lab: Lab) -> str:
    if message.startswith(f"{lab.name}.py:") or "is not written yet" not in message:
        return message or f"{lab.name}.py: raises NotImplementedError"
    other = message.partition(".py:")[0]
    return (
        f"{lab.name}.py uses {message}; to go on with the reference for it: "
        f"pytest {lab.path} --reference {other}"
    )


def _out_of_time(error: BaseException) -> str:
    frame = learner_frame(error, _own_folders())
    place = f"\nit was in {_place(frame)}" if frame else ""
    return _lines(session.last_call, f"{error}; is there a loop whose end is never reached?{place}")


def _crash(error: BaseException) -> str:
    error = _inside_kernel(error)
    frame, innermost = learner_frame(error, _own_folders()), learner_frame(error)
    message = textwrap.shorten(str(error), 300, placeholder=" …")
    if frame is None:
        # Nothing of the learner's ran: what the suite asked for was not there to be called.
        *_, last = traceback.extract_tb(error.__traceback__) or [None]
        suite = [f for f in traceback.extract_tb(error.__traceback__) if _is_suite(f.filename)]
        line = (suite[-1] if suite else last).line
        question = "do names and signatures still match the contract?"
        return _lines(f"{type(error).__name__}: {message}", f"when the suite ran: {line}", question)
    inside = "" if frame == innermost else f"raised by {short_path(innermost.filename)}, called in"
    return _lines(session.last_call, f"{type(error).__name__}: {message}", inside, _place(frame))


def _inside_kernel(error: BaseException) -> BaseException:
    """Return what Triton's interpreter has wrapped, once for every function on its way."""
    while type(error).__name__ == "InterpreterError" and error.__cause__ is not None:
        error = error.__cause__
    return error


def _own_folders() -> list[Path]:
    """Return the layer's folders without the references that the learner asked for.

    Those are not the learner's, and a line of them could be the answer of another lab.
    """
    folders = session.folders
    return [f for f in folders if session.tree != "code" or not layers.is_overlay(f)] or [*folders]


def _is_suite(filename: str) -> bool:
    return Path(filename).is_relative_to(layers.TESTS)


def _place(frame: traceback.FrameSummary) -> str:
    file = short_path(frame.filename)
    week = file.partition("/")[0]
    tree = layers.learner_tree(week).name if session.tree == "code" else session.tree
    file = f"{tree}/{file}" if tree else file
    return f"{file}, line {frame.lineno}, in {frame.name}:\n    {frame.line}"


def render(lab: Lab, test: str, text: str, diagnosis: str = "") -> str:
    """Lay out one failure for the terminal, a CI log or an editor's panel.

    diagnosis: the recognised belief and its question; "" where none was recognised.
    """
    note = lab.note.relative_to(layers.ROOT).as_posix()
    paragraphs = [f"{lab.name}.py  {test}\n{_wrapped(text)}"]
    if diagnosis:
        paragraphs.append(_wrapped(diagnosis))
    return "\n\n".join([*paragraphs, f"  {note} · course hint {lab.name}"])


def _wrapped(text: str) -> str:
    lines = (
        wrapped
        for line in text.splitlines()
        for wrapped in (textwrap.wrap(line, WIDTH - 2, subsequent_indent="    ") or [""])
    )
    return textwrap.indent("\n".join(lines), "  ")
