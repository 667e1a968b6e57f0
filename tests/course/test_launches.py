"""course/launches.py: what the interpreter forgives and the grader does not."""

import importlib.util
from pathlib import Path

import pytest
import torch

from course import grading, launches
from course.grading import GradedFailure
from course.labs import all_labs

pytest.importorskip("triton", reason="kernels need Triton, which runs on Linux")

KERNELS = """
import torch
import triton
import triton.language as tl


@triton.jit
def _add(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n)
    tl.store(out + i, total, mask=i < n)


@triton.jit
def _add_without_mask(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i) + tl.load(y + i), mask=i < n)


@triton.jit
def _write_too_far(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, 1.0)


@triton.jit
def _sum_of_undefined(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + tl.program_id(0), tl.sum(tl.load(x + i, mask=i < n)))


@triton.jit
def _all_to_one_place(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out, tl.sum(tl.load(x + i, mask=i < n, other=0.0)))


@triton.jit
def _shift_in_place(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i + 1, mask=i + 1 < n, other=0.0), mask=i < n)


@triton.jit
def _sum_by_atomics(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(out, tl.sum(tl.load(x + i, mask=i < n, other=0.0)))


@triton.jit
def _same_value_twice(x, y, out, n, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), 2.0)


@triton.jit
def _square(x, out, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a = tl.load(x + i[:, None] * BLOCK + i[None, :])
    tl.store(out + i[:, None] * BLOCK + i[None, :], tl.dot(a, a, input_precision=PRECISION))


@triton.jit
def _copy_if(x, out, n, wanted, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    mask = (i < n) & (tl.program_id(0) < wanted)
    tl.store(out + i, tl.load(x + i, mask=mask, other=0.0), mask=mask)


def run(kernel):
    x, y, out = torch.arange(10.0), torch.ones(10), torch.zeros(10)
    kernel[(3,)](x, y, out, 10, BLOCK=4)
    return out


def add(x, y):
    out = torch.empty_like(x)
    _add[(triton.cdiv(len(x), 4),)](x, y, out, len(x), BLOCK=4)
    return out


def add_beside_a_kernel(x, y):
    add(x, y)
    return x + y


def square(x, precision="ieee"):
    out = torch.empty(len(x), len(x))
    _square[(1,)](x, out, BLOCK=len(x), PRECISION=precision)
    return out
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """The kernels above, as a module: Triton reads their source from its file."""
    if launches.DEVICE == "cuda":
        pytest.skip("a GPU runs kernels itself, and nothing watches it")
    file = tmp_path_factory.mktemp("kernels") / "kernels.py"
    file.write_text(KERNELS, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("kernels_of_this_test", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fault_of(kernels, name: str) -> str:
    """Launch a kernel that must be stopped; returns what it was stopped for."""
    with pytest.raises(Exception) as caught:
        kernels.run(getattr(kernels, name))
    error = grading._inside_kernel(caught.value)
    assert type(error) is launches.KernelFault, error
    return str(error)


def test_what_a_kernel_may_do(kernels):
    torch.testing.assert_close(kernels.run(kernels._add), torch.arange(1.0, 11.0))
    assert kernels.run(kernels._sum_by_atomics)[0] == 45
    # Twice the same value at one place is no race whose end somebody could see.
    assert kernels.run(kernels._same_value_twice).tolist() == [2.0] * 4 + [0.0] * 6


def test_a_kernel_may_store_nothing(kernels):
    x, out = torch.ones(4), torch.zeros(4)
    kernels._add_without_mask[(1,)](x, x, out, 0, BLOCK=4)
    assert out.tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("_add_without_mask", "reads 2 of 4 elements outside of its tensors (x, y, out), in "),
        ("_write_too_far", "writes 2 of 4 elements outside of its tensors (x, y, out), in program"),
        ("_all_to_one_place", "write different values to the same elements (2 times)"),
        ("_shift_in_place", "reads what another program of the same launch writes (1 of the 4"),
    ],
)
def test_what_a_gpu_would_not_forgive(kernels, name, words):
    assert words in fault_of(kernels, name)


def test_undefined_elements_are_nan(kernels):
    sums = kernels.run(kernels._sum_of_undefined)
    assert sums[:2].tolist() == [6.0, 22.0] and bool(sums[2].isnan())


def test_views_bound_what_a_kernel_may_touch(kernels):
    whole = torch.arange(20.0)
    out = torch.zeros(10)
    kernels._add[(3,)](whole[:10], whole[10:], out, 10, BLOCK=4)
    torch.testing.assert_close(out, whole[:10] + whole[10:])
    with pytest.raises(Exception, match="outside of its tensors"):
        kernels._add[(3,)](whole[:9], whole[:9], out, 10, BLOCK=4)


def test_products_that_a_gpu_would_not_compute_alike_are_refused(kernels):
    torch.testing.assert_close(kernels.square(torch.eye(16) * 3), torch.eye(16) * 9)
    with pytest.raises(Exception, match="cannot multiply bfloat16"):
        kernels.square(torch.eye(16, dtype=torch.bfloat16))
    with pytest.raises(Exception, match="round both factors to 10 bits"):
        kernels.square(torch.eye(16), "tf32")
    kernels.square(torch.eye(16, dtype=torch.float16), "tf32")
    with pytest.raises(Exception, match="adds up over a side of 8 here"):
        kernels.square(torch.eye(8))


def test_a_mask_may_join_a_block_with_a_single_number(kernels):
    x, out = torch.arange(4.0), torch.zeros(4)
    kernels._copy_if[(1,)](x, out, 3, 1, BLOCK=4)
    assert out.tolist() == [0.0, 1.0, 2.0, 0.0]
    kernels._copy_if[(1,)](x, out + 1, 3, 0, BLOCK=4)
    assert out.tolist() == [0.0, 1.0, 2.0, 0.0]


def test_launches_are_noted(kernels):
    with launches.observed() as names:
        kernels.add(torch.ones(5), torch.ones(5))
        kernels.square(torch.eye(16))
    assert names == ["_add", "_square"]
    with launches.suppressed():
        assert bool(kernels.add(torch.ones(5), torch.ones(5)).isnan().all())
    assert kernels.add(torch.ones(5), torch.ones(5)).tolist() == [2.0] * 5


def test_programs_are_counted(kernels):
    x = torch.ones(10)

    def by_a_function():
        out = torch.empty(10)
        kernels._add[lambda named: (-(-named["n"] // named["BLOCK"]), 2)](x, x, out, 10, BLOCK=4)

    assert launches.count_programs(lambda: kernels.add(x, x)) == 3
    assert launches.count_programs(by_a_function) == 6
    assert launches.count_programs(lambda: kernels.add(x[:0], x[:0])) == 0
    assert launches.count_programs(lambda: x + x) == 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda kernels, x: x + x, "no Triton kernel was launched"),
        (lambda kernels, x: kernels.add_beside_a_kernel(x, x), "what computed it?"),
        (lambda kernels, x: kernels.add(kernels.add(x, x), x), "2 kernels were launched"),
    ],
)
def test_work_that_no_kernel_did(kernels, call, words):
    with pytest.raises(GradedFailure, match=words.replace("?", r"\?")):
        launches.check_kernel_computes(lambda: call(kernels, torch.arange(5.0)), "add")


def test_work_that_a_kernel_did(kernels):
    x = torch.arange(5.0)
    launches.check_kernel_computes(lambda: kernels.add(x, x), "add")
    launches.check_kernel_computes(lambda: kernels.add(kernels.add(x, x), x), "add", 2)


def test_work_that_torch_does_beside_a_kernel(kernels):
    x = torch.arange(5.0)
    launches.check_only_kernels_compute(kernels.add, x, x, of="add")
    launches.check_only_kernels_compute(lambda: kernels.add(x.view(5, 1)[:, 0], x), of="add")
    with pytest.raises(GradedFailure, match="beside its kernels, torch computes: add"):
        launches.check_only_kernels_compute(kernels.add_beside_a_kernel, x, x, of="add")
    with pytest.raises(GradedFailure, match="torch computes: clone"):
        launches.check_only_kernels_compute(lambda: kernels.add(x[::2].contiguous(), x), of="add")


def test_a_fault_is_told_with_its_line(kernels, monkeypatch):
    folder = Path(kernels.__file__).parent
    monkeypatch.setattr(grading.session, "folders", (folder,))
    with pytest.raises(Exception) as caught:
        kernels.run(kernels._add_without_mask)
    kind, text = grading.explain(caught.value, all_labs()[0])
    assert kind == "wrong" and "KernelFault: the kernel _add_without_mask reads" in text
    assert "kernels.py, line 17" in text and "tl.load(x + i) + tl.load(y + i)" in text
