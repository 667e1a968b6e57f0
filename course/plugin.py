"""The pytest plugin: chooses the layer, keeps learners' accidents apart, and words the results."""

import contextlib
import functools
import importlib.util
import json
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch

from course import diagnosis, grading, layers, progress, stubs
from course.grading import OutOfTime, PrintFlood, session
from course.labs import WEEKS, Lab, all_labs, find_labs

# A graded test takes well under a second; the first use of a library may take several.
SECONDS_PER_TEST = 20.0
# The backstop for loops that the first limit cannot reach, such as one inside a library.
HARD_LIMIT_FACTOR = 5
# In a replay, how many seconds may pass for one of computing; and how many may be waited in a run.
PATIENCE = 4
SECONDS_OF_WAITING = 30.0
_ALARMS = [getattr(signal, name) for name in ("SIGALRM", "SIGPROF") if hasattr(signal, "setitimer")]
MAX_PRINTED = 200_000
MAX_SHOWN_FAILURES = 3
# What a test's report carries about its lab, so that it survives the way from an xdist worker.
PROPERTY = "course"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("course", "Socratic Serving")
    group.addoption(
        "--reference",
        action="append",
        default=[],
        metavar="LAB",
        help="take week1, or week1/rope, from the reference while other labs are graded",
    )
    group.addoption(
        "--candidate",
        action="append",
        default=[],
        metavar="LAB=FILE",
        help="with pytest solutions/…: grade FILE in the place of the reference of LAB",
    )
    group.addoption(
        "--seconds-per-test",
        type=float,
        default=SECONDS_PER_TEST,
        metavar="S",
        help="stop a graded test after S seconds (default: %(default)g)",
    )
    group.addoption(
        "--no-diagnosis",
        action="store_true",
        help="do not compare wrong results with what known misconceptions give",
    )
    group.addoption("--grade-json", metavar="FILE", help="write the result of every lab to FILE")
    group.addoption(
        "--grade-first",
        action="append",
        default=[],
        metavar="TEST",
        help="run the tests of this name before the others",
    )
    group.addoption("--no-log", action="store_true", help="leave this run out of progress/log/")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # xdist's workers get the paths and options as they were typed, and come by here like everybody;
    # the overlay that the controller built is found again by its content.
    try:
        layers.check_trees()
        selection = layers.select(config.args, config.invocation_params.dir)
        tree, overlaid = selection.tree, _overlaid(config, selection)
    except layers.LayerError as error:
        raise pytest.UsageError(str(error)) from None
    config.args = selection.args
    places = {f"{name}.py": Path(file) for name, file in overlaid.items()}
    folders = layers.folders(tree or "code", places)
    if tree:
        layers.activate(folders)
    else:
        sys.path[:] = [*(e for e in sys.path if e != str(layers.ROOT)), str(layers.ROOT)]
    session.tree, session.folders = tree, tuple(folders)
    choose_interpreter()
    # NumPy's remarks on what a kernel computes in the interpreter; the suites look at the results.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
    referenced = [lab for lab in all_labs() if lab.name in overlaid]
    config.stash[_referenced] = referenced if tree == "code" else []
    if tree == "code" and config.option.reportchars == "fE":
        config.option.reportchars = "E"  # every failure has been told in full by then
    _configure_hypothesis()


def choose_interpreter() -> None:
    """Let Triton interpret its kernels where there is no GPU; before anything imports Triton."""
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


_referenced: pytest.StashKey[list[Lab]] = pytest.StashKey()


def _overlaid(config: pytest.Config, selection: layers.Selection) -> dict[str, str]:
    tree = selection.tree
    named, candidates = config.getoption("--reference"), config.getoption("--candidate")
    if named and tree != "code":
        raise layers.LayerError("--reference goes with pytest code/…")
    if candidates and tree != "solutions":
        raise layers.LayerError("--candidate goes with pytest solutions/…")
    if tree == "code":
        # A whole week beside the file of one of its labs: that one is to be graded.
        asked = {lab for lab in all_labs() if str(lab.tests) in selection.args}
        by_name = layers.named_references([name for name in named if "/" in name])
        return {
            lab.name: str(lab.solution)
            for lab in layers.named_references(named)
            if lab in by_name or lab not in asked
        }
    return dict(candidate.split("=", 1) for candidate in candidates)


def _configure_hypothesis() -> None:
    try:
        from hypothesis import Phase, settings
    except ImportError:
        return
    # The same examples in every run, and no files: a grade depends on the code alone.
    phases = (Phase.explicit, Phase.generate, Phase.shrink)
    settings.register_profile(
        "course",
        max_examples=30,
        deadline=None,
        derandomize=True,
        database=None,
        phases=phases,
        # Two mistakes at once would be told as a group of exceptions.
        report_multiple_bugs=False,
    )
    settings.load_profile("course")


def pytest_report_header(config: pytest.Config) -> list[str]:
    if not session.tree:
        return []
    names = _in_short(config.stash[_referenced])
    line = f"grading {session.tree}/"
    return [f"{line}, with the reference for {', '.join(names)}" if names else line]


def _in_short(labs: Iterable[Lab]) -> list[str]:
    """Name labs; a week that is there as a whole by its own name."""
    names = [lab.name for lab in labs]
    for week, stems in WEEKS.items():
        of_week = [f"{week}/{stem}" for stem in stems]
        if set(of_week) <= set(names):
            names = [week, *(name for name in names if name not in of_week)]
    return sorted(names)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    first = {name: rank for rank, name in enumerate(config.getoption("--grade-first"))}
    items.sort(key=lambda item: first.get(item.name, len(first)))
    referenced = config.stash[_referenced]
    hard_limit = config.getoption("--seconds-per-test") * HARD_LIMIT_FACTOR
    for item in items:
        lab = lab_of(item)
        if lab and config.pluginmanager.hasplugin("timeout"):
            item.add_marker(pytest.mark.timeout(hard_limit, method="thread"))
        if lab and not _has_what_it_needs(lab):
            reason = f"{lab.name} needs {grading.WHERE_TRITON_RUNS}"
            item.add_marker(pytest.mark.skip(reason=reason))
        if lab in referenced:
            reason = (
                f"{lab.name} is taken from the reference, so there is nothing of yours to grade"
            )
            item.add_marker(pytest.mark.skip(reason=reason))


@functools.cache
def _has_what_it_needs(lab: Lab) -> bool:
    is_of_kernels = "import triton" in lab.solution.read_text(encoding="utf-8")
    return not is_of_kernels or importlib.util.find_spec("triton") is not None


def lab_of(item: pytest.Item) -> Lab | None:
    """Return the lab whose suite the test belongs to."""
    return _lab_of_suite(item.path)


@functools.cache
def _lab_of_suite(path: Path) -> Lab | None:
    return next((lab for lab in all_labs() if lab.tests == path), None)


@pytest.hookimpl(wrapper=True, trylast=True)  # inside of pytest's own capture
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    if not (session.tree and lab_of(item)):
        return (yield)
    session.last_call, session.num_calls = "", 0
    grading.seed_everything()
    streams, leave = (sys.stdout, sys.stderr), os._exit
    sys.stdout, sys.stderr = map(_LimitedStream, streams)
    # It would end the run with a status that looks like success.
    os._exit = sys.exit
    try:
        with (
            _remembered_example(item),
            _TimeLimit(item.config.getoption("--seconds-per-test")),
        ):
            return (yield)
    except pytest.exit.Exception as error:
        if grading.learner_frame(error):
            raise grading.GradedFailure(f"the lab ends the test run: {error}") from None
        raise
    finally:
        sys.stdout, sys.stderr = streams
        os._exit = leave


@contextlib.contextmanager
def _remembered_example(item: pytest.Item) -> Iterator[None]:
    """Keep the arguments of the latest example of a hypothesis test, for `_replay`."""
    handle = getattr(item.obj, "hypothesis", None)
    if handle is None:
        yield
        return
    inner = handle.inner_test

    @functools.wraps(inner)
    def run(*args, **kwargs):
        item.stash[_example] = functools.partial(inner, *args, **kwargs)
        session.last_call, session.num_calls = "", 0
        return inner(*args, **kwargs)

    handle.inner_test = run
    try:
        yield
    finally:
        handle.inner_test = inner


_example: pytest.StashKey[Callable[[], object]] = pytest.StashKey()


def _replay(item: pytest.Item, failed: bool) -> Callable[[], object]:
    """Return a call that runs the test once more; of a hypothesis test, its smallest failure."""
    names = item._fixtureinfo.argnames
    once = functools.partial(item.obj, **{name: item.funcargs[name] for name in names})
    return item.stash.get(_example, once) if failed else once


class _LimitedStream:
    """Passes on what is printed until it is too much for a report."""

    def __init__(self, stream):
        self._stream = stream
        self._left = MAX_PRINTED

    def write(self, text: str) -> int:
        self._left -= len(text)
        if self._left < 0:
            raise PrintFlood(f"this test printed more than {MAX_PRINTED:,} characters")
        return self._stream.write(text)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


class _TimeLimit:
    """Raises OutOfTime in the main thread when the block runs too long; POSIX only.

    computing: the limit in seconds of the processor's time; None sets none.
    """

    def __init__(self, seconds: float, computing: float | None = None):
        self._seconds, self._computing = seconds, computing
        self._usable = (
            hasattr(signal, "setitimer")
            and threading.current_thread() is threading.main_thread()
            and sys.gettrace() is None  # a debugger waits for a person
        )

    def __enter__(self) -> None:
        if self._usable:
            self._previous = [signal.signal(kind, self._stop) for kind in _ALARMS]
            # Again every second, for code that catches everything inside its loop.
            signal.setitimer(signal.ITIMER_REAL, self._seconds, 1.0)
            if self._computing is not None:
                signal.setitimer(signal.ITIMER_PROF, self._computing, 1.0)

    def __exit__(self, *_: object) -> None:
        if self._usable:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.setitimer(signal.ITIMER_PROF, 0.0)
            for kind, previous in zip(_ALARMS, self._previous, strict=True):
                signal.signal(kind, previous)

    def _stop(self, *_: object) -> None:
        if sys.gettrace() is not None:
            return  # breakpoint() was reached after the start
        raise OutOfTime(f"this test ran longer than {self._seconds:g} s and was stopped")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    lab = lab_of(item)
    if lab is None or not session.tree:
        return (yield)
    # Else hypothesis writes its example as a patch for the suite, which is not the learner's.
    vars(item).pop("_hypothesis_failing_examples", None)
    error = call.excinfo.value if call.excinfo else None  # pytest replaces some of them below
    # pytest's own wording parses the suite anew for every failure, and is replaced below.
    item.repr_failure = lambda *_, **__: ""
    report = yield
    kind, text, asked, beliefs = "", "", "", []
    if report.skipped and error is not None and grading.learner_frame(error):
        # Only the suite may skip a test, not the file that it grades.
        report.outcome = "failed"
        vars(report).pop("wasxfail", None)
    if report.failed and error is not None:
        if isinstance(error, OutOfTime):
            grading.lab(lab.name).note_timeout()
        kind, text = grading.explain(error, lab)
        if kind == "wrong" and call.when == "call":
            beliefs = _beliefs(item, error, lab, call.duration)
        asked = diagnosis.words(lab, beliefs)
        report.longrepr = grading.render(lab, item.name, text, asked)
        # Logs hold tracebacks through the suite, which tell nothing of what was wrong.
        hides = item.config.option.verbose <= 0
        report.sections = [
            (title, _tail(content))
            for title, content in report.sections
            if not (hides and title.startswith("Captured log"))
        ]
    is_followed = not item.config.getoption("--no-diagnosis")
    if call.when == "call" and report.passed and is_followed:
        _diagnosis(item.config).note_passed(lab, item.name, _replay(item, False), call.duration)
    verdict = {"lab": lab.name, "kind": kind, "text": text, "asked": asked, "beliefs": beliefs}
    report.user_properties.append((PROPERTY, verdict))
    return report


def _beliefs(item: pytest.Item, error: BaseException, lab: Lab, seconds: float) -> list[str]:
    evidence = grading.evidence(error)
    if evidence is None or item.config.getoption("--no-diagnosis"):
        return []
    try:
        run = _replay(item, True)
        return _diagnosis(item.config).note_failed(lab, item.name, run, seconds, evidence)
    except Exception as problem:
        # The grade stands; a broken table costs no learner a failure message.
        warnings.warn(f"the diagnosis of {lab.name} failed: {problem!r}", stacklevel=2)
        return []


def _diagnosis(config: pytest.Config) -> diagnosis.Diagnosis:
    if _current not in config.stash:
        config.stash[_current] = diagnosis.Diagnosis(_Patience().limit)
    return config.stash[_current]


class _Patience:
    """Limits replays by what they compute, since on a busy machine everything takes longer.

    A wrong solution may wait for ever without computing: that is limited over a whole run.
    """

    def __init__(self):
        self._left = SECONDS_OF_WAITING

    @contextlib.contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        """Stop the block after so many seconds of computing, or when patience has run out."""
        start, computed = time.perf_counter(), time.process_time()
        try:
            with _TimeLimit(max(0.01, min(PATIENCE * seconds, self._left)), seconds):
                yield
        finally:
            waited = time.perf_counter() - start - (time.process_time() - computed)
            self._left -= max(0.0, waited)


_current: pytest.StashKey[diagnosis.Diagnosis] = pytest.StashKey()
# What this process, or with xdist each worker, concluded, by lab name; see `Diagnosis.conclude`.
_conclusions: pytest.StashKey[list[dict]] = pytest.StashKey()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if config.getoption("--no-diagnosis"):
        return
    concluded = {lab.name: parts for lab, parts in _diagnosis(config).conclude().items()}
    if hasattr(config, "workeroutput"):
        config.workeroutput[PROPERTY] = concluded
    config.stash.setdefault(_conclusions, []).append(concluded)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error: object) -> None:
    concluded = getattr(node, "workeroutput", {}).get(PROPERTY, {})
    node.config.stash.setdefault(_conclusions, []).append(concluded)


def _tail(text: str, count: int = 20) -> str:
    lines = text.splitlines()
    if len(lines) <= count and len(text) <= 2000:
        return text
    kept = "\n".join(line[:200] for line in lines[-count:])
    return f"… {max(0, len(lines) - count)} lines before\n{kept}"


def _verdict(report: pytest.TestReport) -> dict[str, str]:
    return dict(report.user_properties).get(PROPERTY, {})


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter, config: pytest.Config):
    """Show failures of a whole lab once, and of the others a few, each of another test function."""
    stats = terminalreporter.stats
    failed = stats.get("failed", [])
    shown, whole_lab, hidden = _sort_failures(failed, all_of_them=config.option.verbose > 0)
    _ask_once(shown, failed, diagnosis.join(config.stash.get(_conclusions, [])))
    if failed:
        stats["failed"] = shown
    result = yield
    if failed:
        stats["failed"] = failed
    if whole_lab or hidden:
        terminalreporter.section("labs")
    for name, count in hidden.items():
        terminalreporter.write_line(
            f"{name}: {count} more failing tests (all of them: pytest -v {find_labs(name)[0].path})"
        )
    if not failed:
        _tell_of_references(terminalreporter, config)
    for (name, text), verdicts in whole_lab.items():
        line = text or _unwritten_line(name, verdicts)
        count = f"{len(verdicts)} test{'s' * (len(verdicts) != 1)}"
        terminalreporter.write_line(f"{line} ({count})")
    return result


def _tell_of_references(terminalreporter, config: pytest.Config) -> None:
    """Say what a run with --reference is worth."""
    if not config.getoption("--reference") or session.tree != "code":
        return
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = {report.longrepr[2].removeprefix("Skipped: ") for report in skipped}
    lines = sorted(reason for reason in reasons if "taken from the reference" in reason)
    if terminalreporter.stats.get("passed"):
        lines.append(
            "status, predict, reveal and chat count a lab as green when it passes on your own "
            "earlier labs, without --reference"
        )
    for line in lines:
        terminalreporter.write_line(line)


def _ask_once(shown: list, failed: list, named: dict[str, dict[str, list[str]]]) -> None:
    """Word every lab's diagnosis by the whole run, and ask its question at a failure of it.

    That is the first one shown which the diagnosis explains; where none is, one more is shown.
    """
    questions: dict[str, str] = {}
    for name, explained in named.items():
        words = diagnosis.words(*find_labs(name), list(explained))
        found = [r for r in [*shown, *failed] if words and _is_explained(r, name, explained)]
        if not found:
            continue
        questions[found[0].nodeid] = words
        if found[0] not in shown:
            shown.append(found[0])
    for report in shown:
        verdict = _verdict(report)
        if verdict.get("kind") == "wrong":
            (lab,) = find_labs(verdict["lab"])
            test, words = _test_of(report), questions.get(report.nodeid, "")
            report.longrepr = grading.render(lab, test, verdict["text"], words)


def _is_explained(report, name: str, explained: dict[str, list[str]]) -> bool:
    """Say whether everything that is named explains the failure of this test."""
    verdict = _verdict(report)
    is_wrong = verdict.get("lab") == name and verdict.get("kind") == "wrong"
    return is_wrong and all(_test_of(report) in tests for tests in explained.values())


def _test_of(report) -> str:
    return report.nodeid.rpartition("::")[2]


def _sort_failures(reports: list, all_of_them: bool) -> tuple[list, dict, dict]:
    shown, whole_lab, hidden = [], {}, {}
    num_shown: dict[str, int] = {}
    functions: set[str] = set()
    for report in reports:
        verdict = _verdict(report)
        name, kind = verdict.get("lab", ""), verdict.get("kind")
        if kind in ("not written", "unusable"):
            own = kind == "not written" and verdict["text"].startswith(f"{name}.py:")
            key = name, "" if own else verdict["text"]
            whole_lab.setdefault(key, []).append(verdict["text"])
            continue
        function = report.nodeid.partition("[")[0]
        enough = function in functions or num_shown.get(name, 0) >= MAX_SHOWN_FAILURES
        if name and enough and not all_of_them:
            hidden[name] = hidden.get(name, 0) + 1
            continue
        functions.add(function)
        num_shown[name] = num_shown.get(name, 0) + 1
        shown.append(report)
    return shown, whole_lab, hidden


def _unwritten_line(name: str, texts: list[str]) -> str:
    """Join stubs' messages, "week1/rope.py: NAME is not written yet → NOTE", into one line."""
    found = {text.partition(": ")[2].partition(" is not")[0] for text in texts}
    (lab,) = find_labs(name)
    order = stubs.graded_names(lab)
    names = sorted(found, key=lambda found_name: order.index(found_name.partition(".")[0]))
    note = texts[0].partition("→")[2].strip()
    return f"{name}.py: not written yet: {', '.join(names)} → {note}"


class _Grades:
    """Counts the outcome of every lab of a run, for --grade-json and the progress log."""

    def __init__(self, path: str | None, is_logged: bool):
        self._path = path
        self._is_logged = is_logged
        self._labs: dict[str, dict] = {}
        self._failures: dict[str, list[pytest.TestReport]] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            lab = lab_of(item)
            if lab:
                self._grade(lab.name)["collected"] += 1

    def _grade(self, name: str) -> dict:
        empty = {
            **dict.fromkeys(("collected", "passed", "failed", "skipped", "not_written"), 0),
            "seconds": 0.0,
            "first": None,
            "beliefs": [],
        }
        return self._labs.setdefault(name, empty)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        verdict = _verdict(report)
        decisive = report.when == "call" or report.outcome != "passed"
        if not verdict or not decisive:
            return
        grade = self._grade(verdict["lab"])
        grade[report.outcome] += 1
        grade["seconds"] = round(grade["seconds"] + report.duration, 3)
        if report.failed:
            grade["not_written"] += verdict["kind"] == "not written"
            self._failures.setdefault(verdict["lab"], []).append(report)
            grade["first"] = grade["first"] or {"test": _test_of(report), **verdict}

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        named = diagnosis.join(session.config.stash.get(_conclusions, []))
        for name, grade in self._labs.items():
            explained = named.get(name, {})
            grade["beliefs"] = list(explained)
            if grade["first"]:
                grade["first"]["asked"] = ""
            words = diagnosis.words(*find_labs(name), grade["beliefs"])
            failures = self._failures.get(name, [])
            told = [report for report in failures if _is_explained(report, name, explained)]
            if words and told:
                grade["first"] = {"test": _test_of(told[0]), **_verdict(told[0]), "asked": words}
        if self._path:
            Path(self._path).write_text(json.dumps(self._labs, indent=1), encoding="utf-8")
        if self._is_logged:
            for name, grade in self._labs.items():
                self._log(name, grade)

    def _log(self, name: str, grade: dict) -> None:
        (lab,) = find_labs(name)
        ran = grade["passed"] + grade["failed"]
        if not ran or not lab.code.is_file() or stubs.is_untouched(lab):
            return
        seconds, at = grade["seconds"], _stuck_at(lab, grade["first"])
        progress.append_run(lab, passed=grade["passed"], total=ran, seconds=seconds, at=at)


def _stuck_at(lab: Lab, first: dict | None) -> str:
    """Return the graded name that a lab's first failure is about; "" where that cannot be told.

    It is the first one in the failure's text, else the one that shares most with the test's name.
    """
    if not first:
        return ""
    graded = stubs.graded_names(lab)
    spoken = next((word for word in re.findall(r"\w+", first["text"]) if word in graded), None)
    if spoken is not None:
        return spoken
    of_test = _words(first["test"].partition("[")[0])

    def num_shared(name: str) -> int:
        return sum(
            any(word.startswith(other) or other.startswith(word) for other in of_test)
            for word in _words(name)
        )

    nearest = max(graded, key=num_shared)
    return nearest if num_shared(nearest) else ""


def _words(name: str) -> list[str]:
    """Split a name of code into its words: int4_matmul, DecodeBuffers."""
    words = re.findall(r"[A-Z]?[a-z]+\d*|[A-Z]+|\d+", name)
    return [word.lower() for word in words if len(word) > 2]


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    config = session.config
    if hasattr(config, "workerinput"):
        return
    is_logged = grading.session.tree == "code" and not config.getoption("--no-log")
    grades = _Grades(config.getoption("--grade-json"), is_logged)
    config.pluginmanager.register(grades, "course-grades")
