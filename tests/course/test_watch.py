"""`course watch` as a person meets it: a process in a terminal, keys, and files that are saved."""

import contextlib
import itertools
import os
import queue
import re
import select
import signal
import subprocess
import sys
import threading
import time

import pytest

from course import layers, watch
from course.labs import find_labs, week_labs

LAB = "code/week1/attention.py"
SUITE = """
from course.grading import check_equal, lab

tested = lab("week1/{stem}")


def test_twice():
    check_equal(tested.{name}(2), 4, "twice two")


def test_of_zero():
    check_equal(tested.{name}(0), 0, "twice nothing")
"""
RIGHT = "def softmax(x):\n    return 2 * x\n"
HALF_RIGHT = "def softmax(x):\n    return 3 * x\n"
UNWRITTEN = "softmax is not written yet"
# Makes the terminal the one that Ctrl-C and a hang-up come from, as a shell does.
IN_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")


@pytest.mark.parametrize(
    ("passed", "width", "line"),
    [
        (0, 18, "[>----------] 0/28"),
        (5, 18, "[#>---------] 5/28"),
        (28, 18, "[##########] 28/28"),
        (27, 18, "[#########>] 27/28"),
        (14, 11, "14/28"),
        (14, 12, "[##>-] 14/28"),
        (14, 3, "14/28"),
    ],
)
def test_progress_line(passed, width, line):
    assert watch.progress_line(passed, 28, width) == line


def test_progress_line_fills_the_width_and_is_full_only_at_the_end():
    for passed in range(29):
        line = watch.progress_line(passed, 28, 80)
        assert len(line) == 80
        assert (">" in line) == (passed < 28)
    assert watch.progress_line(0, 0, 80) == "0/0"


def test_notices_of_saves(tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "CODE", tmp_path)
    events = queue.SimpleQueue()
    with watch._notices(events):
        for _ in range(60):  # the first saves may come before the system listens
            (tmp_path / "rope.new").write_text("x = 1")
            os.replace(tmp_path / "rope.new", tmp_path / "rope.py")
            with contextlib.suppress(queue.Empty):
                assert events.get(timeout=0.5) == ("saved", None)
                break
        else:
            pytest.fail("no save was noticed")


def test_without_watchfiles_there_are_no_notices_and_the_files_are_looked_at(monkeypatch):
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    events = queue.SimpleQueue()
    with watch._notices(events):
        assert events.get(timeout=30) == ("no notices", None)


def test_what_counts_as_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "CODE", tmp_path)
    monkeypatch.setattr(layers, "EXERCISES", tmp_path / "exercises")
    (tmp_path / "week1").mkdir()
    file = tmp_path / "week1/rope.py"
    file.write_text("x = 1")
    (tmp_path / "week1/.#rope.py").write_text("")
    (tmp_path / "week1/rope.py~").write_text("")
    before = watch._saved_files()
    assert list(before) == [file]
    file.unlink()
    assert watch._saved_files() == {}
    file.write_text("x = 12")
    assert watch._saved_files() not in ({}, before)


def test_a_burst_of_saves_is_one_round(tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "CODE", tmp_path)
    rounds = []
    (lab,) = find_labs("week1/rope")
    watcher = watch._Watcher(lab, queue.SimpleQueue(), None, has_keys=False, poll=True)
    monkeypatch.setattr(watcher, "_grade", lambda: rounds.append("a round"))
    for size in range(3):
        (tmp_path / "rope.py").write_text("#" * size)
        watcher._look()
    assert rounds == []
    watcher._look()
    watcher._look()
    assert rounds == ["a round"]


class Terminal:
    """A `course watch` in a pseudo-terminal of 80 columns."""

    def __init__(self, tree, *words: str):
        import pty
        import termios

        self._screen, self._terminal = pty.openpty()
        termios.tcsetwinsize(self._terminal, (40, 80))
        self.modes_before = termios.tcgetattr(self._terminal)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("COURSE_", "PYTEST_"))}
        for name in ("PYTHONPATH", "COLUMNS", "NO_COLOR"):
            kept.pop(name, None)
        kept |= {"TERM": "xterm", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", IN_TERMINAL, "-m", "course", "watch", *words],
            cwd=tree.root,
            env=kept,
            stdin=self._terminal,
            stdout=self._terminal,
            stderr=self._terminal,
            start_new_session=True,
        )
        self._unread = ""

    def wait_for(self, text: str) -> str:
        """Read until the screen shows `text`; returns what was shown up to it, without escapes."""
        deadline = time.monotonic() + 120
        while text not in self._unread:
            readable, _, _ = select.select([self._screen], [], [], 1.0)
            assert time.monotonic() < deadline, f"no {text!r} in {self._unread!r}"
            if not readable:
                continue
            shown = os.read(self._screen, 65536).decode("utf-8", "replace")
            self._unread += shown.replace("\r\n", "\n")
        before, _, self._unread = self._unread.partition(text)
        return re.sub(r"\x1b\[[HJ2]+|\x1b\]8;;.*?\x1b\\", "", before + text)

    def press(self, key: str) -> None:
        os.write(self._screen, key.encode())

    def modes(self) -> list:
        import termios

        return termios.tcgetattr(self._terminal)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()  # it ends what it has started
            self.process.wait(timeout=30)
        os.close(self._terminal)
        os.close(self._screen)


@pytest.fixture
def open_terminal(tree):
    """Return a function that starts `course watch` in a copy with suites of two tests."""
    tree.write("tests/week1/test_attention.py", SUITE.format(stem="attention", name="softmax"))
    tree.write("tests/week1/test_rope.py", SUITE.format(stem="rope", name="rotary_table"))
    with contextlib.ExitStack() as stack:

        def start(*words: str) -> Terminal:
            terminal = Terminal(tree, *words)
            stack.callback(terminal.close)
            return terminal

        yield start


def save(tree, text: str) -> None:
    """Save the lab as careful editors do: write another file, then rename it."""
    tree.write(f"{LAB}.tmp", text)
    os.replace(tree.root / f"{LAB}.tmp", tree.root / LAB)


@posix
def test_from_the_open_lab_over_a_syntax_error_to_green_and_on(tree, open_terminal):
    terminal = open_terminal()
    assert UNWRITTEN in terminal.wait_for("[>" + "-" * 73 + "] 0/2")
    link = (tree.root / LAB).as_uri()
    terminal.wait_for(f"\x1b]8;;{link}\x1b\\{LAB}\x1b]8;;\x1b\\")
    terminal.wait_for("q quit")

    save(tree, "def softmax(x:\n    return x\n")
    assert "week1/attention.py, line 1: SyntaxError" in terminal.wait_for("0/2")
    save(tree, HALF_RIGHT)
    shown = terminal.wait_for("1/2")
    assert "week1/attention.py  test_twice\n  softmax(x: 2)\n  twice two: got 6" in shown
    assert "sessions/week1/attention.md" in shown
    (tree.root / LAB).unlink()
    assert "code/week1/attention.py does not exist" in terminal.wait_for("0/2")
    tree.write(LAB, RIGHT)
    shown = terminal.wait_for("Next: week1/rope, with the key n")
    assert "week1/attention is green: all 2 tests pass." in shown
    assert "course predict week1/attention" in shown
    assert "#] 2/2" in terminal.wait_for("q quit")

    terminal.press("n")
    assert "week1/rope.py  test_twice" in terminal.wait_for("0/2")
    assert terminal.modes() != terminal.modes_before
    terminal.press("q")
    assert terminal.process.wait(timeout=60) == 0
    assert terminal.modes() == terminal.modes_before


@posix
def test_keys(tree, open_terminal):
    # The words behind h and l are proven elsewhere; here they only have to be asked.
    hints = "def hint(lab, name):\n    print('a hint for', lab.name)\n    return 0\n"
    tree.write("course/hints.py", hints)
    terminal = open_terminal("attention")
    terminal.wait_for("Grading week1/attention …")
    terminal.wait_for("q quit")
    terminal.press("n")
    terminal.wait_for("week1/attention is still being graded; n goes on when it is green.")
    terminal.wait_for("0/2")
    terminal.press("n")
    terminal.wait_for("week1/attention is not green yet; n goes on when it is green.")
    terminal.press("\x1b[Hl")  # the Home key is no h
    shown = terminal.wait_for(f"0 of {len(week_labs())} labs are green")
    assert "not started" in shown and "a hint" not in shown
    terminal.press("h")
    terminal.wait_for("a hint for week1/attention")
    assert "labs are green" not in terminal.wait_for("q quit")
    terminal.press("r")
    terminal.wait_for("Grading week1/attention …")
    assert "a hint for week1/attention" in terminal.wait_for("0/2")
    terminal.process.terminate()
    assert terminal.process.wait(timeout=60) == 128 + signal.SIGTERM
    assert terminal.modes() == terminal.modes_before


@posix
def test_a_save_ends_an_endless_loop_and_ctrl_c_ends_everything(tree, open_terminal):
    tree.write("watchfiles.py", "raise AssertionError('--poll asks for notices')")
    loop = (
        "import os, pathlib, subprocess\n"
        "def softmax(x):\n"
        "    child = subprocess.Popen(['sleep', '1000'])\n"
        "    pathlib.Path('loop-new').write_text(f'{os.getpid()} {child.pid}')\n"
        "    os.rename('loop-new', 'loop')\n"
        "    while True: pass\n"
    )
    terminal = open_terminal("attention", "--poll")
    terminal.wait_for("0/2")
    first = pids_of_the_loop(tree, loop)
    save(tree, RIGHT)
    shown = terminal.wait_for("2/2")
    assert "is green: all 2 tests pass" in shown and "ran longer" not in shown
    wait_until_gone(first)
    terminal.wait_for("Next: week1/rope")
    second = pids_of_the_loop(tree, loop)
    terminal.press("\x03")
    assert terminal.process.wait(timeout=60) == 130
    wait_until_gone(second)
    assert terminal.modes() == terminal.modes_before


def pids_of_the_loop(tree, text: str) -> list[int]:
    """Save the loop, and return the processes of the round once it is inside."""
    save(tree, text)
    deadline = time.monotonic() + 120
    while not (tree.root / "loop").is_file():
        assert time.monotonic() < deadline, "the saved loop never ran"
        time.sleep(0.05)
    pids = [int(pid) for pid in tree.read("loop").split()]
    (tree.root / "loop").unlink()
    return pids


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, f"one of the processes {pids} goes on"
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    """Say whether a process runs; a zombie, which nobody has collected yet, does not."""
    command = ["ps", "-o", "stat=", "-p", str(pid)]
    state = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return state != "" and not state.startswith("Z")


def test_without_a_terminal_it_grades_on_save_until_the_input_ends(tree):
    tree.write("tests/week1/test_attention.py", SUITE.format(stem="attention", name="softmax"))
    process = subprocess.Popen(
        [sys.executable, "-m", "course", "watch", "week1/attention"],
        cwd=tree.root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    guard = threading.Timer(120, process.kill)
    guard.start()
    shown = iter(process.stdout.readline, "")
    first = "".join(itertools.takewhile(lambda line: line != f"{LAB}\n", shown))
    assert first.startswith("Grading week1/attention …\n") and UNWRITTEN in first
    assert first.endswith("] 0/2\n")
    tree.write(LAB, "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n")
    second = "".join(itertools.takewhile(lambda line: line != f"{LAB}\n", shown))
    assert "The run ended before its time." in second
    process.stdin.close()
    rest = process.stdout.read()
    assert process.wait() == 0
    guard.cancel()
    assert "\x1b" not in first + second + rest and "q quit" not in first + second + rest


def test_input_that_has_ended_gives_one_round(tree):
    tree.write("progress/reference.txt", "week1/attention\n")
    tree.write("tests/week1/test_attention.py", SUITE.format(stem="attention", name="softmax"))
    result = tree.run("course", "watch", "week1/attention")
    assert result.returncode == 0
    assert "taken from the reference, so there is nothing of yours to grade" in result.stdout
    assert result.stdout.count("Grading") == 1
