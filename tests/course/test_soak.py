"""The soak and the fuzzer of the server, in short; the long ones are commands of their own."""

import json
import subprocess
import sys

import pytest

from course.labs import ROOT


def run(*words: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.xdist_group("soak")
def test_a_short_soak():
    seen = run("benchmarks.soak", "--seconds", "20", "--streams", "60")
    assert sum(seen["outcomes"].values()) > 60 and seen["outcomes"]["cancelled"] > 0


@pytest.mark.xdist_group("soak")
def test_a_short_fuzz():
    seen = run("benchmarks.fuzz", "--examples", "200")
    assert sum(seen["statuses"].values()) == 200 and set(seen["statuses"]) > {"200", "400"}
