"""Temporary copies of the repository, in which real commands run as a learner would run them."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from course import stubs, tiny
from course.labs import ROOT, all_labs, find_labs

COPIED = ("conftest.py", "pyproject.toml", "requirements.txt", "course", "solutions", "tests")


class Tree:
    """A copy of the repository with pristine stubs."""

    def __init__(self, root: Path):
        self.root = root
        root.mkdir()
        ignore = shutil.ignore_patterns("__pycache__")
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, root / name, ignore=ignore)
            else:
                shutil.copyfile(source, root / name)
        record = {}
        for lab in all_labs():
            text = stubs.make_stub(lab)
            self.write(lab.path, text)
            record[lab.name] = stubs.digest_of(text)
        self.write("code/.stubs.json", json.dumps(record))

    def write(self, path: str, text: str) -> None:
        """Write a file of the copy."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")

    def read(self, path: str) -> str:
        """Read a file of the copy."""
        return (self.root / path).read_text(encoding="utf-8")

    def solve(self, *names: str) -> None:
        """Put the reference in the place of the learner's files."""
        for lab in [lab for name in names for lab in find_labs(name)]:
            shutil.copyfile(self.root / f"solutions/{lab.name}.py", self.root / lab.path)

    def run(self, *words: str, cwd: str = ".", **environment: str) -> subprocess.CompletedProcess:
        """Run `python -m WORDS` in the copy; its output is text, both streams in stdout."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("COURSE_", "PYTEST_"))}
        kept.pop("PYTHONPATH", None)
        kept |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **environment}
        return subprocess.run(
            [sys.executable, "-m", *words],
            cwd=self.root / cwd,
            env=kept,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            timeout=300,
        )

    def pytest(self, *args: str, cwd: str = ".", **environment: str):
        """Run pytest in the copy, without a cache."""
        return self.run("pytest", "-p", "no:cacheprovider", *args, cwd=cwd, **environment)

    def grades(self, *args: str) -> dict[str, dict]:
        """Run pytest in the copy and return the outcome of every lab."""
        target = self.root / "grades.json"
        result = self.pytest(*args, "--grade-json", str(target))
        assert target.is_file(), result.stdout
        return json.loads(target.read_text(encoding="utf-8"))


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A fresh copy of the repository with pristine stubs."""
    return Tree(tmp_path / "tree")


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory) -> Callable[..., str]:
    """A function that makes a tiny random Qwen2 checkpoint with a byte-level tokenizer.

    It takes what differs from CONFIG, and returns the folder.
    """
    return lambda **changes: tiny.make_checkpoint(tmp_path_factory.mktemp("model"), **changes)
