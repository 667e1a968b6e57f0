"""`course watch`: the terminal that grades the current lab again whenever it is saved.

One thread, the main one, owns the state and the screen. It waits for events: key presses, notices
that something was saved, jobs that ended. What a save means is decided by looking at the files, so
a notice that is lost, late or about nothing costs time and never a wrong grade.
"""

import contextlib
import dataclasses
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from course import layers, progress, status, tracker
from course.labs import ROOT, Lab, find_labs

WIDTH = 80
# A look at the files when nothing announces a save.
POLL_SECONDS = 0.5
# And when notices do: network drives and containers lose them.
LOOK_SECONDS = 5.0
# An editor may write a file in several steps; a round starts when they are over.
SETTLE_SECONDS = 0.1
SHOWN_OUTPUT = 15
# An arrow, Home or Alt with a letter: the letters in it are no keys.
_SPECIAL_KEY = re.compile(rb"\x1b(\[[0-?]*[ -/]*[@-~]|O?.)?", re.DOTALL)
KEYS = "n next   h hint   l list   r run again   q quit"

_OWN_SESSION = (
    {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    if os.name == "nt"
    else {"start_new_session": True}
)
Events = queue.SimpleQueue[tuple[str, Any]]


def watch(lab: Lab | None, poll: bool) -> int:
    """Grade a lab now and after every save of a lab or drill, until q or the end of the input.

    lab: None means the first that is not green. poll: look at the files twice a second, for places
    where the system announces no saves. Returns the exit status.
    """
    with _ending_signals():
        if lab is None:
            print("Looking for the first open lab …", flush=True)
            grades = status.grade_all()
            lab = _first_open(grades)
            if lab is None:
                print(status.next_step(grades))
                return 0
        events: Events = queue.SimpleQueue()
        notices = contextlib.nullcontext() if poll else _notices(events)
        with _Jobs(events) as jobs, notices, _keyboard(events) as has_keys:
            return _Watcher(lab, events, jobs, has_keys, poll).run()


def progress_line(passed: int, total: int, width: int) -> str:
    """Draw `[#####>-----] 5/28` in at most `width` columns; without the bar where it is narrow."""
    count = f"{passed}/{total}"
    cells = width - len(count) - 3
    if cells < 4 or not total:
        return count
    done = cells * passed // total
    bar = "#" * done if done == cells else f"{'#' * done}>".ljust(cells, "-")
    return f"[{bar}] {count}"


@dataclass(frozen=True)
class _Round:
    """What one graded run found.

    total: 0 where no test was collected. text: why the lab is not green.
    """

    passed: int
    total: int
    text: str

    @property
    def green(self) -> bool:
        return self.passed == self.total > 0


class _Job:
    """A command in a session of its own: no Ctrl-C reaches it, and nothing in it reaches us."""

    def __init__(self, name: str, words: list[str], output: Path):
        self.name = name
        self._streams = (output.with_suffix(".out"), output.with_suffix(".err"))
        with open(self._streams[0], "wb") as out, open(self._streams[1], "wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *words],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                **_OWN_SESSION,
            )

    def wait(self) -> None:
        """Wait for the end, then end what the command left running."""
        self._process.wait()
        self._end_group()

    def stop(self) -> None:
        """End the command and everything that it started, at once."""
        if self._process.poll() is None:
            self._end_group()
            self._process.wait()

    def _end_group(self) -> None:
        pid = self._process.pid
        if os.name == "nt":
            subprocess.run(["taskkill", "/T", "/F", "/PID", str(pid)], capture_output=True)
            return
        # macOS answers PermissionError for a group of which only a zombie is left.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)

    def stdout(self) -> str:
        """Read what the command has printed on standard output."""
        return self._streams[0].read_text(encoding="utf-8", errors="replace")

    def text(self) -> str:
        """Read what the command has printed on both streams."""
        errors = self._streams[1].read_text(encoding="utf-8", errors="replace")
        return f"{self.stdout().rstrip()}\n{errors.rstrip()}".strip()


class _Jobs:
    """The commands that run now, at most one of a name."""

    def __init__(self, events: Events):
        self._events = events
        self._running: dict[str, _Job] = {}
        self._num_started = 0

    def __enter__(self) -> "_Jobs":
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._running):
            self.stop(name)
        self._folder.cleanup()

    def start(self, name: str, words: list[str], then: Callable[[_Job], None]) -> None:
        """Run `python -m WORDS` in the place of the job of that name; `then` follows its end."""
        self.stop(name)
        job = self._running[name] = _Job(name, words, self.new_file())

        def wait() -> None:
            job.wait()
            self._events.put(("done", (job, then)))

        threading.Thread(target=wait, daemon=True).start()

    def stop(self, name: str) -> None:
        """End the job of that name, if there is one."""
        if name in self._running:
            self._running.pop(name).stop()

    def finish(self, job: _Job) -> bool:
        """Take a job that has ended off the list; False if it was stopped before."""
        if self._running.get(job.name) is not job:
            return False
        del self._running[job.name]
        return True

    def is_running(self, name: str) -> bool:
        return name in self._running

    def new_file(self) -> Path:
        """Name a file that is nobody's, so that what a stopped job wrote is never read."""
        self._num_started += 1
        return Path(self._folder.name) / f"job-{self._num_started}"


class _Watcher:
    """The state of one session, and what every event does to it."""

    def __init__(self, lab: Lab, events: Events, jobs: _Jobs, has_keys: bool, poll: bool):
        self._lab = lab
        self._events = events
        self._jobs = jobs
        self._has_keys = has_keys
        self._seconds_between_looks = POLL_SECONDS if poll else LOOK_SECONDS
        self._redraws = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._files = _saved_files()
        self._unsettled = False
        self._round: _Round | None = None
        self._hint = ""
        self._notice = ""
        # They say where n leads; None until the lab is green and the others have been graded.
        self._grades: dict[Lab, status.Grade] | None = None
        self._goes_on = False
        self._input_ended = False
        self._over = False

    def run(self) -> int:
        """Handle events until the session is over; returns the exit status."""
        if self._redraws and os.name == "nt":
            os.system("")  # switches escape sequences on in older consoles
        self._grade()
        while not self._over:
            seconds = SETTLE_SECONDS if self._unsettled else self._seconds_between_looks
            with contextlib.suppress(queue.Empty):
                self._handle(*self._events.get(timeout=seconds))
            self._look()
        return 0

    def _handle(self, kind: str, value: Any) -> None:
        if kind == "key":
            self._press(value)
        elif kind == "done":
            job, then = value
            if self._jobs.finish(job):
                then(job)
        elif kind == "no notices":
            self._seconds_between_looks = POLL_SECONDS
        elif kind == "continued":
            self._draw()
        elif kind == "end of input":
            self._input_ended = True
            self._over = not self._jobs.is_running("round")

    def _look(self) -> None:
        files = _saved_files()
        if files != self._files:
            self._files, self._unsettled = files, True
        elif self._unsettled:
            self._unsettled = False
            self._grade()

    def _press(self, key: str) -> None:
        if key == "q":
            self._over = True
        elif key == "r":
            self._grade()
        elif key == "n":
            self._go_on()
        elif key == "h" and not self._jobs.is_running("hint"):  # else it is paid for and not shown
            self._jobs.start("hint", ["course", "hint", self._lab.name], self._show_hint)
        elif key == "l" and not self._jobs.is_running("list"):
            self._say("Grading what has changed …")
            self._jobs.start("list", ["course", "status", "--json"], self._show_board)
        elif key == "\x03":  # Ctrl-C is a key in a Windows console that is read key by key
            raise KeyboardInterrupt

    def _grade(self) -> None:
        self._round, self._notice = None, ""
        target = self._jobs.new_file()
        words = ["pytest", _relative(self._lab.code), "-q", "--grade-json", str(target)]
        self._jobs.start("round", words, lambda job: self._take_grade(job, target))
        self._draw()

    def _take_grade(self, job: _Job, target: Path) -> None:
        self._round = _read_round(self._lab, job, target)
        self._over = self._input_ended
        is_unknown = self._grades is None and not self._jobs.is_running("next")
        if self._round.green and is_unknown and not self._over:
            self._jobs.start("next", ["course", "status", "--json"], self._take_grades)
        self._draw()

    def _take_grades(self, job: _Job) -> None:
        self._grades = _read_grades(job)
        if self._grades is None:
            self._goes_on = False
            self._say(_last_lines(job))
        elif self._goes_on:
            self._go_on()
        elif self._round and self._round.green:
            self._say_or_draw(self._next_line())

    def _go_on(self) -> None:
        self._goes_on = False
        if self._round is None or not self._round.green:
            state = "still being graded" if self._round is None else "not green yet"
            self._say(f"{self._lab.name} is {state}; n goes on when it is green.")
        elif self._jobs.is_running("next"):
            self._goes_on = True
        elif self._grades is None:
            self._goes_on = True
            self._jobs.start("next", ["course", "status", "--json"], self._take_grades)
        elif lab := _first_open(self._grades, besides=self._lab):
            self._jobs.stop("hint")
            self._lab, self._hint, self._grades = lab, "", None
            self._grade()
        else:
            self._say_or_draw(self._next_line())

    def _show_hint(self, job: _Job) -> None:
        # It stays when the file is saved: asking again would cost the next one.
        self._hint, self._notice = job.text(), ""
        self._say_or_draw(self._hint)

    def _show_board(self, job: _Job) -> None:
        grades = _read_grades(job)
        self._say(_last_lines(job) if grades is None else tracker.board(grades, progress.read()[0]))

    def _say(self, text: str) -> None:
        self._notice = text
        self._say_or_draw(text)

    def _say_or_draw(self, text: str) -> None:
        if self._redraws:
            self._draw()
        else:
            print(f"{text}\n", flush=True)

    def _draw(self) -> None:
        if self._redraws:
            blocks = [self._result(), self._hint, self._notice, self._footer()]
            print("\x1b[H\x1b[2J" + "\n\n".join(filter(None, blocks)), flush=True)
        elif self._round is None:
            print(self._result(), flush=True)
        else:
            print(f"{self._result()}\n\n{self._footer()}\n", flush=True)

    def _result(self) -> str:
        if self._round is None:
            return f"Grading {self._lab.name} …"
        if not self._round.green:
            return self._round.text
        name = self._lab.name
        lines = [
            f"{name} is green: all {self._round.total} tests pass.",
            f"`course predict {name}` now shows the truth beside your predictions.",
            self._next_line(),
        ]
        return "\n".join(filter(None, lines))

    def _next_line(self) -> str:
        if self._grades is None:
            return "Looking for the next open lab …" if self._jobs.is_running("next") else ""
        lab = _first_open(self._grades, besides=self._lab)
        if lab is None:
            return f"Every {'drill' if self._lab.is_drill else 'lab'} is green."
        return f"Next: {lab.name}, with the key n" if self._has_keys else f"Next: {lab.name}"

    def _footer(self) -> str:
        path = _relative(self._lab.code)
        if self._redraws:
            path = f"\x1b]8;;{self._lab.code.as_uri()}\x1b\\{path}\x1b]8;;\x1b\\"
        lines = [path, KEYS] if self._has_keys else [path]
        if self._round and self._round.total:
            lines.insert(0, progress_line(self._round.passed, self._round.total, _width()))
        return "\n".join(lines)


def _first_open(grades: dict[Lab, status.Grade], besides: Lab | None = None) -> Lab | None:
    """Find the first lab that is not green; from a drill, the first such drill."""
    states, is_drill = ("started", "not started"), besides is not None and besides.is_drill
    own = [lab for lab in grades if lab.is_drill == is_drill and lab != besides]
    return next((lab for lab in own if grades[lab].state in states), None)


def _read_round(lab: Lab, job: _Job, target: Path) -> _Round:
    try:
        grade = json.loads(target.read_text(encoding="utf-8"))[lab.name]
    except (OSError, ValueError, KeyError):
        return _Round(0, 0, f"The run ended before its time. Its last lines:\n{_last_lines(job)}")
    passed, total, first = grade["passed"], grade["collected"], grade["first"]
    if first:
        return _Round(passed, total, _failure(lab, first))
    if grade["skipped"] == total:
        text = f"{lab.name} is taken from the reference, so there is nothing of yours to grade."
        return _Round(passed, total, text)
    return _Round(passed, total, _last_lines(job))


def _failure(lab: Lab, first: dict[str, str]) -> str:
    """Lay out a failure as `grading.render` does, which would bring torch into this process."""
    if first["kind"] != "wrong":  # the text speaks of the whole lab
        return _wrapped(first["text"], _width())
    paragraphs = [_wrapped(first[part], _width() - 2) for part in ("text", "asked") if first[part]]
    body = textwrap.indent("\n\n".join(paragraphs), "  ")
    return f"{lab.name}.py  {first['test']}\n{body}\n\n  {_relative(lab.note)}"


def _wrapped(text: str, width: int) -> str:
    lines = [textwrap.wrap(line, width, subsequent_indent="    ") for line in text.splitlines()]
    return "\n".join(part for line in lines for part in line or [""])


def _read_grades(job: _Job) -> dict[Lab, status.Grade] | None:
    """Read what `course status --json` printed; None if it failed."""
    try:
        grades = json.loads(job.stdout())
    except ValueError:
        return None
    fields = [field.name for field in dataclasses.fields(status.Grade)]
    return {
        find_labs(name)[0]: status.Grade(**{field: grade[field] for field in fields})
        for name, grade in grades.items()
    }


def _last_lines(job: _Job) -> str:
    return "\n".join(job.text().splitlines()[-SHOWN_OUTPUT:])


def _saved_files() -> dict[Path, tuple[int, int]]:
    """Return time and size of every Python file of the learner's."""
    files = {}
    for folder in layers.learner_folders():
        for path in folder.rglob("*.py"):
            # Emacs marks a file that is being edited, and not yet saved, with a link .#NAME.
            if any(part.startswith(".") for part in path.relative_to(folder).parts):
                continue
            with contextlib.suppress(OSError):  # gone since it was listed
                stat = path.stat()
                files[path] = (stat.st_mtime_ns, stat.st_size)
    return files


@contextlib.contextmanager
def _notices(events: Events) -> Iterator[None]:
    """Announce every change of a learner's file as long as the block runs."""
    stop = threading.Event()

    def notice() -> None:
        # No package, no watches left in the system, or no folder: then there are no notices.
        with contextlib.suppress(Exception):
            import watchfiles

            folders = [folder for folder in layers.learner_folders() if folder.is_dir()]
            changes = watchfiles.watch(
                *folders, watch_filter=None, debounce=400, step=100, stop_event=stop
            )
            for _ in changes:
                events.put(("saved", None))
        events.put(("no notices", None))

    thread = threading.Thread(target=notice, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def _ending_signals() -> Iterator[None]:
    """Turn the signals that end a process into SystemExit, so that every block is left in order."""

    def leave(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # nohup ignores SIGHUP, and so do we then.
    numbers = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _keyboard(events: Events) -> Iterator[bool]:
    """Send key presses as they come, and the end of the input; yields whether there are keys."""
    is_terminal = sys.stdin is not None and sys.stdin.isatty()
    read = _read_console if is_terminal and os.name == "nt" else _read_input
    reader = threading.Thread(target=read, args=(events, is_terminal), daemon=True)
    with _single_keys(events) if is_terminal and os.name != "nt" else contextlib.nullcontext():
        reader.start()
        yield is_terminal


@contextlib.contextmanager
def _single_keys(events: Events) -> Iterator[None]:
    """Let the terminal pass on keys without Enter and without showing them."""
    import termios
    import tty

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)

    def go_on(*_: object) -> None:  # after Ctrl-Z the shell may have left other settings
        tty.setcbreak(terminal)
        events.put(("continued", None))

    handler = signal.signal(signal.SIGCONT, go_on)
    try:
        tty.setcbreak(terminal)
        yield
    finally:
        signal.signal(signal.SIGCONT, handler)
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _read_input(events: Events, are_keys: bool) -> None:
    with contextlib.suppress(OSError, AttributeError):  # hung up; closed from the start
        while data := os.read(sys.stdin.fileno(), 1024):
            if not are_keys:
                continue
            for key in _SPECIAL_KEY.sub(b"", data).decode("ascii", "ignore").lower():
                events.put(("end of input", None) if key == "\x04" else ("key", key))
    events.put(("end of input", None))


def _read_console(events: Events, are_keys: bool) -> None:
    import msvcrt

    while True:
        key = msvcrt.getwch()
        if key in "\x00\xe0":  # a special key, whose code follows
            msvcrt.getwch()
        else:
            events.put(("key", key.lower()))


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _width() -> int:
    return min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
