"""course/bootstrap.py: real environments in temporary trees, whose one requirement is a stub.

Nothing here needs a network: pip finds the stub in a folder, and the tree brings its own build
backend in the place of setuptools.
"""

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from course import bootstrap

# The tests go on with one environment, one after the other, so one worker takes them all.
pytestmark = pytest.mark.xdist_group("bootstrap")
POSIX_ONLY = pytest.mark.skipif(os.name == "nt", reason="signals")
SOURCE = Path(bootstrap.__file__).parent
MAIN = """
import os, sys
from course.bootstrap import ensure_environment
ensure_environment(sys.argv[1:])
import stub
print([os.path.realpath(sys.prefix), os.getcwd(), sys.argv[1:]])
"""
BACKEND = """
import pathlib, zipfile

def build_editable(folder, config_settings=None, metadata_directory=None):
    name, info = "tree-1-py3-none-any.whl", "tree-1.dist-info"
    with zipfile.ZipFile(pathlib.Path(folder, name), "w") as wheel:
        wheel.writestr("tree.pth", str(pathlib.Path(__file__).parent))
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: tree\\nVersion: 1\\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\n")
        wheel.writestr(f"{info}/RECORD", "")
    return name
"""
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "tree"
version = "1"
"""


class Tree:
    """A copy of the tool with one stub package as its requirement."""

    def __init__(self, root: Path):
        self.root = root
        self.venv = root / ".venv"
        self.stamp = self.venv / "course-ready"
        self.python = self.venv.joinpath(
            *(("Scripts", "python.exe") if os.name == "nt" else ("bin", "python"))
        )
        (root / "course").mkdir(parents=True)
        for name in ("__init__.py", "bootstrap.py"):
            shutil.copy(SOURCE / name, root / "course" / name)
        (root / "course" / "__main__.py").write_text(MAIN)
        (root / "backend.py").write_text(BACKEND)
        (root / "pyproject.toml").write_text(PYPROJECT)
        (root / "requirements.txt").write_text("stub>=1  # found in wheels/\nother==1\n")
        (root / "elsewhere").mkdir()
        for name, version in (("stub", "1"), ("stub", "2"), ("other", "1")):
            self._write_wheel(name, version)

    def _write_wheel(self, name: str, version: str) -> None:
        info, text = f"{name}-{version}.dist-info", f"version = {version}\n"
        path = self.root / "wheels" / f"{name}-{version}-py3-none-any.whl"
        path.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(f"{name}.py", text)
            wheel.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            )
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
            wheel.writestr(f"{info}/RECORD", f"{name}.py,,{len(text)}\n")

    def start(self, *words: str, python: Path | str = sys.executable, **env: str):
        """Start `course` with the given words in a process group of its own."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
        pip = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}
        pip["PIP_FIND_LINKS"] = str(self.root / "wheels")
        return subprocess.Popen(
            [python, "-m", "course", *words],
            cwd=self.root / "elsewhere",
            env={**clean, **pip, "PYTHONPATH": str(self.root), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str, **options) -> subprocess.CompletedProcess:
        process = self.start(*words, **options)
        out, err = process.communicate(timeout=100)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def check(self, *words: str, **options) -> str:
        """Run `course`, see that it ran inside ROOT/.venv, and return what it said before that."""
        done = self.run(*words, **options)
        assert done.returncode == 0, done.stderr
        expected = [os.path.realpath(self.venv), str(self.root / "elsewhere"), list(words)]
        assert ast.literal_eval(done.stdout) == expected
        assert self.stamp.exists()
        return done.stderr

    def installed(self, name: str) -> Path:
        """Return where the module of a stub package is, or was."""
        (info,) = self.venv.glob(f"[Ll]ib/**/{name}-*.dist-info")
        return info.with_name(f"{name}.py")


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Tree:
    """A tree whose first installation was interrupted; later tests go on with its environment."""
    tree = Tree(tmp_path_factory.mktemp("tree").resolve())
    if os.name != "nt":
        interrupt_while_venv_is_made(tree)
        leave_a_broken_python(tree)
    tree.first_words = tree.check("learn", "two words", "--json")
    return tree


def interrupt_while_venv_is_made(tree: Tree) -> None:
    process = tree.start()
    wait_for(tree.venv.exists)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.endswith("Stopped. Run the same command again to go on from there.\n")
    assert not tree.stamp.exists()


def leave_a_broken_python(tree: Tree) -> None:
    tree.python.parent.mkdir(parents=True, exist_ok=True)
    tree.python.unlink(missing_ok=True)
    tree.python.write_text("#!/bin/sh\nexit 3\n")
    tree.python.chmod(0o755)
    tree.python.with_name("activate").touch()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_interrupted_installation_with_a_broken_python_is_repaired(tree):
    assert "interrupted" in tree.first_words or os.name == "nt"
    assert "making .venv: done" in tree.first_words
    assert "installing packages: done" in tree.first_words
    assert ".course/install.log" in tree.first_words


def test_a_ready_environment_says_nothing_and_is_quick(tree):
    started = time.monotonic()
    assert tree.check("learn") == ""
    assert tree.check(python=tree.python) == ""
    assert time.monotonic() - started < 5


def test_damaged_packages_are_installed_again_without_starting_over(tree):
    marker = tree.venv / "marker"
    marker.touch()
    stub, other = tree.installed("stub"), tree.installed("other")
    stub.write_text("cut off by a power loss")
    other.unlink()
    other.with_name("other-1.dist-info").joinpath("RECORD").unlink()
    tree.stamp.unlink()
    # From inside, too: there nothing may go on that was imported before the repair.
    assert "repaired" in tree.check(python=tree.python)
    assert (stub.read_text(), other.read_text()) == ("version = 2\n", "version = 1\n")
    assert marker.exists()


@POSIX_ONLY
def test_a_killed_change_of_requirements_goes_on(tree):
    (tree.root / "requirements.txt").write_text("stub==1\n")
    process = tree.start()
    process.stderr.readline()
    process.kill()
    process.communicate(timeout=60)
    assert not tree.stamp.exists()
    assert "installing packages: done" in tree.check()
    assert tree.installed("stub").read_text() == "version = 1\n"


def test_a_lock_left_behind_does_not_block_and_a_held_one_waits(tree):
    lock = tree.root / ".course" / "install.lock"
    assert lock.exists()
    tree.stamp.unlink()
    with bootstrap.locked(lock, "somebody else holds it"):
        process = tree.start()
        assert "waiting for it to finish" in process.stderr.readline()
        assert process.poll() is None
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert tree.stamp.exists()


@pytest.mark.parametrize(
    ("requirement", "index", "expected"),
    [
        ("nowhere-to-be-found==1", None, r"has no nowhere-to-be-found==1 for Python 3\.\d+ on"),
        ("nowhere-to-be-found==1", "http://127.0.0.1:9/simple", "could not be reached: check the"),
    ],
)
def test_a_failed_installation_is_told_in_a_sentence(tree, requirement, index, expected):
    before = (tree.root / "requirements.txt").read_text()
    env = {} if index is None else {"PIP_INDEX_URL": index, "PIP_RETRIES": "1", "PIP_NO_INDEX": "0"}
    try:
        (tree.root / "requirements.txt").write_text(requirement)
        done = tree.run(**env)
    finally:
        (tree.root / "requirements.txt").write_text(before)
    assert done.returncode == 1 and done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert re.search(expected, last) and last.endswith("to go on from there.")
    assert "Traceback" not in done.stderr
    assert not tree.stamp.exists()


def test_a_moved_tree_does_not_take_its_environment_for_ready(tree, monkeypatch):
    tree.check()
    monkeypatch.setattr(bootstrap, "ROOT", tree.root)
    assert bootstrap.is_ready()
    moved = tree.root.with_name("moved")
    monkeypatch.setattr(bootstrap, "ROOT", moved)
    tree.root.rename(moved)
    try:
        assert not bootstrap.is_ready()
    finally:
        moved.rename(tree.root)


@pytest.fixture
def nothing_is_made(tmp_path, monkeypatch) -> list[str]:
    """A root without an environment; notes what ensure_environment would do there."""
    done: list[str] = []
    (tmp_path / "pyproject.toml").write_text("")
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    monkeypatch.setattr(bootstrap, "_build", lambda lock: done.append("build"))
    monkeypatch.setattr(bootstrap, "_run_again", lambda argv: done.append(f"run {argv}"))
    return done


@pytest.mark.parametrize(
    ("active", "requirements", "expected"),
    [
        (True, "pytest==0.0.1  # not this version\n\n-i somewhere\n", []),
        (True, "pytest\nnowhere.to-be_found\n", ["build", "run ['a']"]),
        (True, f"pytest\nabsent; sys_platform != '{sys.platform}'\n", []),
        (False, "pytest\n", ["build", "run ['a']"]),
    ],
)
def test_an_active_environment_is_used_only_when_it_has_everything(
    nothing_is_made, monkeypatch, active, requirements, expected
):
    monkeypatch.setattr(sys, "base_prefix", "/somewhere" if active else sys.prefix)
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    (bootstrap.ROOT / "requirements.txt").write_text(requirements)
    bootstrap.ensure_environment(["a"])
    assert nothing_is_made == expected


def test_conda_counts_as_an_active_environment(nothing_is_made, monkeypatch):
    monkeypatch.setattr(sys, "base_prefix", sys.prefix)
    monkeypatch.setenv("CONDA_PREFIX", sys.prefix)
    (bootstrap.ROOT / "requirements.txt").write_text("pytest\n")
    bootstrap.ensure_environment([])
    assert nothing_is_made == []


def test_required_names():
    text = f"""
# a comment
torch==2.13.0
pytest-timeout>=2.4 # why
a_b.c[extra] ~= 1 ; sys_platform == "{sys.platform}"
absent; sys_platform == "amiga"
kept; python_version > "3"
-r other.txt
"""
    assert bootstrap.required_names(text) == ["torch", "pytest-timeout", "a_b.c", "kept"]


def test_a_python_that_is_too_old_is_told_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 10, 4, "final", 0))
    monkeypatch.setattr(bootstrap, "SUGGESTED_PYTHONS", ("python3.99",))
    with pytest.raises(SystemExit) as stop:
        bootstrap.ensure_environment([])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "The course needs Python 3.11 or newer and this is Python 3.10.4: "
        "install Python 3.11 or newer.\n"
    )


@POSIX_ONLY
def test_a_newer_python_is_suggested_only_if_it_runs(tmp_path, monkeypatch, capsys):
    for name, status in (("python3.11", 127), ("python3.12", 0)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {status}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "version_info", (3, 8, 1, "final", 0))
    with pytest.raises(SystemExit):
        bootstrap.require_python()
    assert "run it with python3.12 -m course" in capsys.readouterr().err


def test_a_real_old_python_gets_the_line(tree):
    old = [shutil.which(f"python3.{minor}") for minor in (8, 9, 10)]
    for python in filter(None, old):
        if subprocess.run([python, "-c", "pass"], capture_output=True).returncode == 0:
            done = tree.run(python=python)
            assert done.returncode == 2
            assert re.fullmatch(r"The course needs Python 3\.11 .*\n", done.stderr)


def test_the_file_needs_nothing_but_python_3_8():
    for name in ("__init__.py", "bootstrap.py"):
        text = (SOURCE / name).read_text(encoding="utf-8")
        module = ast.parse(text, feature_version=(3, 8))
        for node in ast.walk(module):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


def test_a_python_without_venv_names_the_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    monkeypatch.setattr(bootstrap.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "base_prefix", sys.prefix)
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    with pytest.raises(SystemExit) as stop:
        bootstrap.ensure_environment([])
    assert stop.value.code == 2
    assert "install the package python3-venv" in capsys.readouterr().err.splitlines()[-1]


def test_a_disk_error_is_one_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / ".course").write_text("a file where a folder has to be")
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "base_prefix", sys.prefix)
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    with pytest.raises(SystemExit) as stop:
        bootstrap.ensure_environment([])
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("The environment could not be made: ")
