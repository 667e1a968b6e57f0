"""`course bench`: ratios of rounds, thresholds, and what a script can read."""

import json

import pytest

from course import bench, mutants
from course.labs import all_labs, find_labs

QWEN = "week1/qwen"
SUITE = """
from course.grading import check_true, lab


def test():
    check_true(lab("week1/qwen").ANSWER == 42, "ANSWER is not 42")
"""
WORKLOAD = """
import time
from course.bench import YOURS, Workload


def workload(yours):
    assert [lab.name for lab in yours] == ["week1/qwen"]
    sides = {YOURS: lambda: time.sleep(0.2), "the reference": lambda: time.sleep(0.1)}
    return Workload(sides, "the reference", count=3, unit="tokens", flops=1e6, num_bytes=1e6)
"""


def work(**seconds: list[float]) -> bench.Workload:
    sides = dict.fromkeys(seconds, lambda: None)
    return bench.Workload(sides, "theirs", count=10, unit="tokens", flops=2e9, num_bytes=1e6)


@pytest.mark.parametrize(
    ("ratio", "medal"), [(0.49, ""), (0.5, "bronze"), (0.81, "silver"), (0.95, "gold"), (3, "gold")]
)
def test_medals_by_threshold(ratio, medal):
    assert bench.medal_of(ratio, {"bronze": 0.5, "silver": 0.8, "gold": 0.95}) == medal


def test_the_median_of_the_rounds_counts():
    # The machine was slow in the second round, for both sides.
    seconds = {"yours": [1.0, 9.0, 2.0], "theirs": [1.0, 9.0, 1.0]}
    thresholds = mutants.medal(*find_labs(QWEN))
    machine = bench.Machine("a machine", flops=1e9, bytes_per_second=1e9)
    report = bench._report(*find_labs(QWEN), work(**seconds), seconds, machine, thresholds)
    assert report["ratio"] == 1.0 and report["medal"] == "gold"
    assert report["rates"] == {"yours": 5.0, "theirs": 10.0}
    assert report["share_of_limit"] == 1.0  # 2 GFLOP in 2 s at 1 GFLOP/s


def test_the_machine_is_measured():
    machine = bench.measure_machine()
    assert machine.flops > 1e8 and machine.bytes_per_second > 1e8


def test_thresholds_rise_and_have_their_workload():
    with_medal = [lab for lab in all_labs() if mutants.medal(lab)]
    assert with_medal
    for lab in with_medal:
        limits = mutants.medal(lab)
        assert limits.keys() == {"bronze", "silver", "gold"}
        assert 0 < limits["bronze"] < limits["silver"] < limits["gold"]
        assert (bench.ROOT / "benchmarks" / f"{lab.name}.py").is_file()


def test_a_run_from_red_to_medal(tree):
    tree.write("tests/week1/test_qwen.py", SUITE)
    tree.write("benchmarks/week1/qwen.py", WORKLOAD)
    red = tree.run("course", "bench", QWEN)
    assert red.returncode == 1 and "right before fast" in red.stdout
    tree.write(f"code/{QWEN}.py", "ANSWER = 42\n")
    done = tree.run("course", "bench", QWEN, "--json", "--runs", "3")
    assert done.returncode == 0, done.stdout
    report = json.loads(done.stdout)
    rounds = zip(report["seconds"]["the reference"], report["seconds"]["yours"], strict=True)
    ratios = sorted(theirs / ours for theirs, ours in rounds)
    assert len(ratios) == 3 and report["ratio"] == pytest.approx(ratios[1], rel=0.05)
    (line,) = next((tree.root / "progress" / "log").iterdir()).read_text().splitlines()
    event = json.loads(line)
    assert (event["kind"], event["ratio"]) == ("bench", report["ratio"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("week1/rope",),
            "week1/rope has no medal: speed is not its point; there is one for "
            + ", ".join(lab.name for lab in all_labs() if mutants.medal(lab)),
        ),
        ((QWEN, "--runs", "0"), "--runs must be at least 1, got 0"),
        (("week1",), "this takes one lab, and week1 is 7 of them"),
    ],
)
def test_refusals_are_one_sentence(tree, words, sentence):
    result = tree.run("course", "bench", *words)
    assert result.returncode == 2
    assert result.stdout == f"course: {sentence}\n"


def test_a_lab_with_a_benchmark_and_no_medal_says_how_to_measure(tree):
    tree.write("benchmarks/week1/rope.py", "")
    result = tree.run("course", "bench", "week1/rope")
    sentence = "course: week1/rope has no medal; to measure: python -m benchmarks.week1.rope\n"
    assert (result.returncode, result.stdout) == (2, sentence)
