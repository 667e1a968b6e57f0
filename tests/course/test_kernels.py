"""`course kernels`: compiled without a GPU, red where the compiler or the GPU would refuse."""

import os
import subprocess
import sys

import pytest

from course import kernels
from course.labs import ROOT, find_labs

pytest.importorskip("triton", reason="kernels need Triton, which runs on Linux")

LAB = """
import triton
import triton.language as tl

_CONFIGS = [triton.Config({"BLOCK": size}, num_warps=4) for size in (64, 128)]


@triton.autotune(_CONFIGS, key=["n"])
@triton.jit
def _tuned(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n, other=0.0), mask=i < n)


@triton.jit
def _three(x, out, n, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, 3), 1.0)


@triton.jit
def _greedy(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b, c = tl.load(x + i), tl.load(x + i + BLOCK), tl.load(x + i * 3)
    tl.store(out + i, a * tl.sum(a) + b * tl.sum(b) + c * tl.sum(c))


def copy(x, out):
    _tuned[lambda meta: (triton.cdiv(len(x), meta["BLOCK"]),)](x, out, len(x))


def three(x, out):
    _three[(1,)](x, out, len(x), BLOCK=4)


def greedy(x, out):
    _greedy[(1,)](x, out, len(x), BLOCK=4096, num_warps=1)


def unwritten(x, out):
    raise NotImplementedError("week1/rope.py: unwritten is not written yet → the note")


def nothing(x, out):
    pass
"""
CALLS = """
import torch


def kernel_calls(lab):
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.empty(1 << 14, dtype=dtype)
        yield f"{{dtype}}", lambda x=x: lab.{name}(x, x)
"""


def compiled(tree, name: str):
    tree.write("code/week1/rope.py", LAB)
    tree.write("benchmarks/week1/rope.py", CALLS.format(name=name))
    return tree.run("course", "kernels", "week1/rope")


def test_every_configuration_is_compiled_for_every_gpu(tree):
    result = compiled(tree, "copy")
    assert result.returncode == 0, result.stdout
    lines = [line for line in result.stdout.splitlines() if "_tuned" in line]
    assert len(lines) == 2 * 2 * 2  # dtypes, configurations, architectures
    for words in ("sm_80", "sm_90", "BLOCK=64 num_warps=4", "BLOCK=128", "registers", "KiB shared"):
        assert any(words in line for line in lines), words


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("three", "RED: CompilationError: tl.store(out + tl.arange(0, 3), 1.0); arange's range"),
        ("greedy", "RED: spills"),
        ("nothing", "launches no kernel"),
    ],
)
def test_what_is_red(tree, name, words):
    result = compiled(tree, name)
    assert result.returncode == 1 and words in result.stdout, result.stdout
    assert "Traceback" not in result.stdout


def test_a_half_written_lab_shows_what_there_is(tree):
    calls = (
        CALLS.format(name="copy") + '        yield "the other", lambda x=x: lab.unwritten(x, x)\n'
    )
    tree.write("code/week1/rope.py", LAB)
    tree.write("benchmarks/week1/rope.py", calls)
    result = tree.run("course", "kernels", "week1/rope")
    assert result.returncode == 0 and "sm_90 _tuned" in result.stdout, result.stdout
    assert "  the other\n    week1/rope.py: unwritten is not written yet\n" in result.stdout


def test_what_another_lab_lacks_can_come_from_the_reference(tree):
    turned = "\n\ndef turned(x, out):\n    rotary_table(64, 10, 10_000.0)\n    copy(x, out)\n"
    tree.write("code/week2/kv_cache.py", f"from week1.rope import rotary_table\n{LAB}{turned}")
    tree.write("benchmarks/week2/kv_cache.py", CALLS.format(name="turned"))
    words = "course", "kernels", "week2/kv_cache"
    without = tree.run(*words)
    missing = "week1/rope.py: rotary_table is not written yet; to go on with the reference for it: "
    assert f"    {missing}{' '.join(words)} --reference week1/rope\n" in without.stdout
    # A lab that is named is the learner's, whatever else comes from the reference.
    for references in (["week1/rope"], ["week1", "--reference", "week2"]):
        result = tree.run(*words, "--reference", *references)
        assert result.returncode == 0 and "sm_90 _tuned" in result.stdout, result.stdout
    everything = tree.run("course", "kernels", "--reference", "week2")
    assert "week2/kv_cache: taken from the reference" in everything.stdout


def test_an_untouched_stub_is_not_written_yet(tree):
    tree.write("benchmarks/week1/rope.py", CALLS.format(name="copy"))
    result = tree.run("course", "kernels")
    assert (result.returncode, result.stdout) == (0, "week1/rope: not written yet\n")


def test_a_lab_without_kernels_is_refused(tree):
    result = tree.run("course", "kernels", "week1/qwen")
    assert result.returncode == 2 and "week1/qwen has no kernels" in result.stdout


def test_limits_are_those_of_the_architecture():
    (lab,) = find_labs("week1/rope")
    assert kernels.labs_with_kernels() and lab not in kernels.labs_with_kernels()
    fits_one = kernels.Compiled("k", "", 80, 64, shared=200 * 1024)
    assert fits_one.verdict == "204,800 bytes of shared memory, there are 166,912"
    assert kernels.Compiled("k", "", 90, 64, shared=200 * 1024).verdict == ""


def test_the_kernels_of_the_reference_compile():
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-m", "course", "kernels", "--solutions"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for lab in kernels.labs_with_kernels():
        assert lab.name in result.stdout
