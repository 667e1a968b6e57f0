"""Workloads are those that others publish with; published figures are in their files."""

import subprocess
import sys

from course import workloads
from course.labs import ROOT


def test_nano_is_the_workload_that_others_use():
    requests = workloads.nano()
    lengths = [len(prompt_ids) for prompt_ids, _ in requests]
    outputs = [num_new for _, num_new in requests]
    assert (sum(lengths), sum(outputs)) == (142_827, 133_966)
    assert lengths[:5] == [964, 724, 484, 508, 316]
    assert outputs[:5] == [845, 312, 607, 843, 500]


def test_nano_cpu_is_as_small_as_it_says():
    requests = workloads.nano_cpu()
    assert len(requests) == 32
    assert all(16 <= len(prompt_ids) <= 128 for prompt_ids, _ in requests)
    assert all(16 <= num_new <= 64 for _, num_new in requests)


def test_prompts_with_a_common_beginning():
    prompts = workloads.prefix()
    assert len(prompts) == 64 and {len(prompt) for prompt in prompts} == {1056}
    assert len({tuple(prompt[:1024]) for prompt in prompts}) == 1
    assert len({tuple(prompt[1024:]) for prompt in prompts}) == 64


def test_the_page_of_results_is_what_the_files_hold():
    check = "from benchmarks import report; print(report.page(), end='')"
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
