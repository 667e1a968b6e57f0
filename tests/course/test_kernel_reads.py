"""What a suite sees of kernels beside their results: what is read how often, and who waits."""

import os
import subprocess
import sys

import pytest

from course.labs import ROOT

pytest.importorskip("triton")

COUNTING = """
import torch
import triton
import triton.language as tl

from course.launches import counted_reads, reading_programs


@triton.jit
def kernel(x, out, stride, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    once = tl.load(x + i * stride, mask=i < n, other=0.0)
    again = tl.load(x + i * stride, mask=i < 1, other=0.0)
    tl.store(out + i, once + again, mask=i < n)


@triton.jit
def one_each(x):
    tl.load(x + 2 * tl.program_id(0))


whole = torch.ones(4, 6)
view, out = whole[1:3, ::2], torch.zeros(8)
with counted_reads(view) as counts, counted_reads(out) as others:
    kernel[(1,)](view, out, 2, 2, BLOCK=4)
    print(counts.tolist(), int(others.sum()))
    kernel[(1,)](view, out, 2, 3, BLOCK=4)
kernel[(1,)](view, out, 2, 3, BLOCK=4)
print(counts.tolist(), out[:4].tolist())
with reading_programs(view) as programs:
    one_each[(2,)](view)
    print(programs.tolist())
"""

LOOKING = """
import numpy as np
import torch

from course.launches import KernelFault, without_waiting

x = torch.tensor([3, 1])
for look in (
    lambda: x[0].item(),
    lambda: int(x.max()),
    lambda: 1 if x.any() else 0,
    lambda: x.tolist(),
    lambda: range(x[0]),
    lambda: x[: x[1]],
    lambda: torch.zeros(x[0]),
    lambda: x.cpu(),
    lambda: x.numpy(),
    lambda: np.from_dlpack(x),
    lambda: torch.equal(x, x),
    lambda: x[x > 1],
):
    with without_waiting():
        try:
            print("seen", look())
        except KernelFault as fault:
            assert "the host asks for what a tensor holds" in str(fault)
with without_waiting():
    y = (x.max() + x[1:]).new_empty(x.shape[0]) < x[:, None]
print(int(x[0]), tuple(y.shape))
"""


def run(tmp_path, script: str) -> list[str]:
    """Run a script, in the interpreter; returns the lines that it prints."""
    file = tmp_path / "script.py"
    file.write_text(script, encoding="utf-8")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_reads_are_counted_where_they_happen(tmp_path):
    first, second, programs = run(tmp_path, COUNTING)
    assert first == "[[2, 1, 0], [0, 0, 0]] 0"
    assert second == "[[4, 2, 1], [0, 0, 0]] [2.0, 1.0, 1.0, 0.0]"
    assert programs == "[[0, 1, -1], [-1, -1, -1]]"


def test_a_host_that_looks_into_a_tensor_is_caught(tmp_path):
    assert run(tmp_path, LOOKING) == ["3 (2, 2)"]
