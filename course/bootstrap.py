"""Make the course's own environment out of nothing but Python, and go on inside it.

Standard library only, and no syntax newer than Python 3.8: an old Python must get as far as the
sentence that says which one is needed. Everything is printed to stderr, because the command that
runs afterwards may print JSON.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)
# The first one that runs is suggested to a person whose python3 is too old.
SUGGESTED_PYTHONS = ("python3.11", "python3.12", "python3.13", "python3.14")

_GO_ON = "Run the same command again to go on from there."
# What pip prints when it cannot reach its index.
NO_NETWORK = re.compile(r"connection broken|Max retries|name resolution|timed out|unreachable")
_SECONDS_BETWEEN_LINES = 10


def ensure_environment(argv: list[str]) -> None:
    """Return if this Python has the course's packages; else run `course` in one that has them.

    argv: the words behind `course`. An active virtual or conda environment that has every package
    of requirements.txt is used as it is. Otherwise ROOT/.venv is made or repaired first, and
    `python -m course` with the same words takes this process's place there.
    Raises SystemExit with one sentence when that is not possible.
    """
    require_python()
    try:
        inside = _is_own_environment()
        if inside and is_ready():
            return
        if not inside and _another_environment_is_active() and _has_all_packages():
            return
        if not is_ready():
            waiting = "Another course command is setting up .venv; waiting for it to finish."
            with locked(ROOT / ".course" / "install.lock", waiting) as lock:
                if not is_ready():
                    _build(lock)
    except KeyboardInterrupt:
        _stop(f"\nStopped. {_GO_ON}", 130)
    except OSError as error:
        _stop(f"The environment could not be made: {error}. {_GO_ON}", 1)
    _run_again(argv)


def require_python() -> None:
    """Raise SystemExit with one line when this Python is too old for the course."""
    if tuple(sys.version_info[:2]) >= OLDEST_PYTHON:
        return
    needed, found = (".".join(map(str, v)) for v in (OLDEST_PYTHON, sys.version_info[:3]))
    newer = next((name for name in SUGGESTED_PYTHONS if _runs(name)), None)
    advice = f"run it with {newer} -m course" if newer else f"install Python {needed} or newer"
    _stop(f"The course needs Python {needed} or newer and this is Python {found}: {advice}.", 2)


def is_ready() -> bool:
    """Say whether ROOT/.venv was built to its end from the requirements that lie here now."""
    try:
        stamp = _stamp_file().read_text(encoding="utf-8")
    except OSError:
        return False
    return stamp == _stamp_text()


def required_names(requirements: str) -> list[str]:
    """Name the distributions that a requirements file asks for on this operating system."""
    names = []
    for line in requirements.splitlines():
        requirement, _, marker = line.partition("#")[0].partition(";")
        name = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", requirement.strip())
        if name and _marker_holds(marker):
            names.append(name.group())
    return names


@contextlib.contextmanager
def locked(path: Path, waiting: str) -> Iterator[IO[str]]:
    """Hold a lock file; while another process holds it, wait, and after a second say `waiting`.

    The system drops the lock when its holder dies, so that there are no stale locks. A child that
    inherits the yielded file goes on holding it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        started, told = time.monotonic(), False
        while not _try_lock(file):
            if not told and time.monotonic() - started > 1:
                _say(waiting)
                told = True
            time.sleep(0.05)
        yield file


def flush_to_disk() -> None:
    """Bring what was written onto the disk, so that no marker of completeness gets there first."""
    if hasattr(os, "sync"):
        os.sync()


def _own_python() -> Path:
    place = ("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")
    return ROOT.joinpath(".venv", *place)


def _stamp_file() -> Path:
    return ROOT / ".venv" / "course-ready"


def _stamp_text() -> str:
    parts = [(ROOT / name).read_bytes() for name in ("requirements.txt", "pyproject.toml")]
    # A copied or moved tree must not go on with the other tree's `course`.
    parts += [_python_version().encode(), str(ROOT).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest() + "\n"


def _python_version() -> str:
    """Return the version of ROOT/.venv's Python, or "" if it cannot run."""
    if _is_own_environment():
        return f"{sys.version_info[0]}.{sys.version_info[1]}"
    program = "import sys; print(*sys.version_info[:2], sep='.')"
    with contextlib.suppress(OSError):
        done = subprocess.run([_own_python(), "-I", "-c", program], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""
    return ""


def _is_own_environment() -> bool:
    return os.path.realpath(sys.prefix) == os.path.realpath(ROOT / ".venv")


def _another_environment_is_active() -> bool:
    return sys.prefix != sys.base_prefix or "CONDA_PREFIX" in os.environ


def _has_all_packages() -> bool:
    try:
        for name in required_names((ROOT / "requirements.txt").read_text(encoding="utf-8")):
            importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _marker_holds(marker: str) -> bool:
    platform = re.fullmatch(r"""\s*sys_platform\s*(==|!=)\s*["'](\w+)["']\s*""", marker)
    if platform is None:
        return True
    return (sys.platform == platform.group(2)) == (platform.group(1) == "==")


def _runs(name: str) -> bool:
    # Finding the name is not enough: version managers put names on PATH that only print an error.
    path = shutil.which(name)
    return path is not None and _succeeds([path, "-c", "pass"])


def _succeeds(command: list[str | Path]) -> bool:
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def _try_lock(file: IO[str]) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        # Some network file systems have no locks; two installations at once are rarer than those.
        return True
    return True


def _build(lock: IO[str]) -> None:
    """Make or repair ROOT/.venv; the stamp, written last, is what makes it usable."""
    started = time.monotonic()
    _stamp_file().unlink(missing_ok=True)
    _explain()
    with open(ROOT / ".course" / "install.log", "w", encoding="utf-8") as log:
        steps = _Steps(log, lock)
        if not _is_usable():
            _require_venv_module()
            venv = [sys.executable, "-I", "-m", "venv", "--clear", ROOT / ".venv"]
            steps.run("making .venv", venv)
        _forget_damaged_packages()
        pip = [_own_python(), "-I", "-m", "pip", "install", "--no-input"]
        pip += ["--disable-pip-version-check"]
        steps.run("installing packages", [*pip, "-r", ROOT / "requirements.txt"])
        steps.run("installing the course command", [*pip, "--no-deps", "-e", ROOT])
    _write_stamp()
    _say(f"Set up in {time.monotonic() - started:.0f} s.")


def _explain() -> None:
    if (ROOT / ".venv").exists():
        _say("The packages in .venv are not those of requirements.txt, or an installation was")
        _say("interrupted. It is repaired now.")
    else:
        if _another_environment_is_active():
            _say("The active environment lacks packages that the course needs; it is left alone.")
        _say("Setting up the course. This happens once: a Python environment is made in .venv.")
        # du -sh .venv with the CPU build of torch 2.13.0, and with the one for CUDA 13.
        _say("It takes about 2 GB of disk, or 5 GB on Linux, where PyTorch brings CUDA along.")
    _say("You may stop it at any time; the next run goes on. Full log: .course/install.log")


def _is_usable() -> bool:
    """Say whether ROOT/.venv is a whole environment that pip can install into."""
    # venv writes the activation scripts last, when pip is complete.
    whole = _own_python().with_name("activate").exists()
    version = tuple(map(int, filter(None, _python_version().split("."))))
    recent = version >= OLDEST_PYTHON
    return whole and recent and _succeeds([_own_python(), "-I", "-m", "pip", "--version"])


def _site_packages() -> list[Path]:
    places = ("Lib/site-packages", "lib/python*/site-packages")
    return [site for place in places for site in (ROOT / ".venv").glob(place)]


def _require_venv_module() -> None:
    if all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")):
        return
    name = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
    _stop(
        "This Python cannot make environments because it lacks the module venv or ensurepip: on "
        f"Debian or Ubuntu install the package python3-venv (or {name}), then run the same command "
        "again.",
        2,
    )


def _forget_damaged_packages() -> None:
    """Make pip install again what an interruption left incomplete.

    pip takes a package for installed as soon as its metadata is there, but writes RECORD last; and
    after a power cut a file may be shorter than RECORD says.
    """
    for site in _site_packages():
        for info in site.glob("*.dist-info"):
            if not _is_complete(site, info):
                shutil.rmtree(info)


def _is_complete(site: Path, info: Path) -> bool:
    try:
        with open(info / "RECORD", encoding="utf-8", newline="") as file:
            sized = [(name, int(size)) for name, _, size in csv.reader(file) if size]
        return all((site / name).stat().st_size == size for name, size in sized)
    except (OSError, ValueError, csv.Error):
        return False


def _write_stamp() -> None:
    flush_to_disk()
    new = _stamp_file().with_suffix(".new")
    new.write_text(_stamp_text(), encoding="utf-8")
    os.replace(new, _stamp_file())


class _Steps:
    """Run commands with their output in the log and one line of progress for a person.

    lock: inherited by the commands, so that one that outlives this process keeps it.
    """

    def __init__(self, log: IO[str], lock: IO[str]):
        self._log = log
        self._lock = lock

    def run(self, title: str, command: list[str | Path]) -> None:
        """Run one command to its end. Raises SystemExit with a sentence when it fails."""
        # In a session of its own, a command can be ended together with what it started.
        posix = {"pass_fds": (self._lock.fileno(),), "start_new_session": True}
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            **({} if os.name == "nt" else posix),
        )
        progress = _Progress(title)
        reader = threading.Thread(target=self._read, args=(process.stdout, progress), daemon=True)
        reader.start()
        try:
            while reader.is_alive():
                reader.join(0.2)
                progress.show()
            failed = process.wait() != 0
        except KeyboardInterrupt:
            _end(process)
            raise
        progress.finish("failed" if failed else "done")
        if failed:
            _stop(self._why_it_failed(title), 1)

    def _read(self, output: IO[str], progress: _Progress) -> None:
        for line in output:
            # A full disk must not stop the reading: the command would wait for it forever.
            with contextlib.suppress(OSError):
                self._log.write(line)
            progress.read(line)

    def _why_it_failed(self, title: str) -> str:
        self._log.flush()
        text = Path(self._log.name).read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines()[-15:]:
            _say(f"  {line}")
        unavailable = re.search(r"No matching distribution found for (\S+)", text)
        if "No space left on device" in text:
            reason = "The disk is full: make room."
        elif NO_NETWORK.search(text):
            reason = "The package index could not be reached: check the network."
        elif unavailable:
            python = f"Python {_python_version()} on {sys.platform}"
            reason = f"The package index has no {unavailable.group(1)} for {python}."
        else:
            reason = f"This step failed: {title}. The whole log is .course/install.log."
        return f"{reason} {_GO_ON}"


class _Progress:
    """One line of progress: what pip does, read from its output and from the files it wrote.

    On a terminal the line is rewritten in place; elsewhere it is printed every ten seconds.
    """

    def __init__(self, title: str):
        self._title = title
        self._doing = "starting"
        self._collected = 0
        self._to_install: set[str] = set()
        self._started = time.monotonic()
        self._next_line = self._started + _SECONDS_BETWEEN_LINES
        self._is_terminal = sys.stderr.isatty()

    def read(self, line: str) -> None:
        """Take one line of the command's output."""
        collecting = re.match(r"\s*Collecting ([\w.-]+)", line)
        downloading = re.match(r"\s*Downloading (\w+)-\S+ \((.+)\)", line)
        installing = re.match(r"Installing collected packages: (.+)", line)
        if collecting:
            self._collected += 1
            self._doing = f"{collecting.group(1)}, {self._collected} found so far"
        elif downloading and ".metadata" not in line:
            name, size = downloading.groups()
            self._doing = f"downloading {name} ({size}), {self._collected} found so far"
        elif installing:
            self._to_install = {_plain(name) for name in installing.group(1).split(", ")}

    def show(self) -> None:
        """Show where the command is, if it is time to."""
        if self._is_terminal:
            width = shutil.get_terminal_size().columns - 1
            print("\r" + self._text()[:width].ljust(width), end="", file=sys.stderr, flush=True)
        elif time.monotonic() > self._next_line:
            self._next_line += _SECONDS_BETWEEN_LINES
            _say(self._text())

    def finish(self, outcome: str) -> None:
        """Show the last line of this step."""
        self._doing, self._to_install = outcome, set()
        if self._is_terminal:
            self.show()
            _say("")
        else:
            _say(self._text())

    def _text(self) -> str:
        doing = self._doing
        if self._to_install:
            records = [r for site in _site_packages() for r in site.glob("*.dist-info/RECORD")]
            installed = {_plain(record.parent.name.partition("-")[0]) for record in records}
            count = len(self._to_install & installed)
            doing = f"{count} of {len(self._to_install)} packages written"
        return f"  {self._title}: {doing}, {time.monotonic() - self._started:.0f} s"


def _end(process: subprocess.Popen) -> None:
    if os.name == "nt":
        process.terminate()
    else:
        os.killpg(process.pid, signal.SIGTERM)
    process.wait()


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower().strip()


def _run_again(argv: list[str]) -> None:
    command = [str(_own_python()), "-m", "course", *argv]
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "nt":
        sys.exit(subprocess.call(command))
    os.execv(command[0], command)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _stop(sentence: str, code: int) -> None:
    _say(sentence)
    raise SystemExit(code)
