"""Grades advanced/first_kernel against float64, and against what the tensors hold."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from course.grading import check_close, check_equal, check_raises, check_true, lab
from course.launches import (
    DEVICE,
    DTYPES,
    check_kernel_computes,
    check_only_kernels_compute,
    count_programs,
)

fk = lab("advanced/first_kernel")

HALVES = [dtype for dtype in DTYPES if dtype != torch.float32]
# One element, powers of two and their neighbours, and what is a multiple of nothing.
SIZES = [0, 1, 2, 3, 31, 32, 33, 128, 255, 257, 1000, 1024, 1025, 2047, 4096, 5003]
SHAPES = [
    (1, 1), (1, 5), (5, 1), (3, 17), (17, 3), (32, 32), (33, 31), (64, 65), (129, 40), (2, 1025),
    (300, 2), (1, 4099),
]  # fmt: skip
EMPTY = [(0, 0), (0, 1), (1, 0), (0, 7), (5, 0)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Signed numbers of which some are thirty times as large, around a half."""
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x[x.abs() > 1.6] *= 30
    return (x + 0.5).to(dtype).to(DEVICE)


def of_columns(x: Tensor) -> Tensor:
    """Lay the same numbers out column by column."""
    return x.T.contiguous().T


def in_wider_rows(x: Tensor) -> Tensor:
    """Lay the same numbers out in the middle of longer rows, with NaN around them."""
    wide = x.new_full((x.shape[0], x.shape[1] + 7), math.nan)
    wide[:, 3:-4] = x
    return wide[:, 3:-4]


def every_second_column(x: Tensor) -> Tensor:
    """Lay the same numbers out with a NaN behind each of them."""
    return torch.stack((x, torch.full_like(x, math.nan)), dim=-1)[..., 0]


def every_third_row_of_columns(x: Tensor) -> Tensor:
    """Lay the same numbers out column by column, with two NaN behind each of them."""
    thirds = torch.stack((x.T, *[torch.full_like(x.T, math.nan)] * 2), dim=-1)
    return thirds[..., 0].T


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "column by column": of_columns,
    "in the middle of wider rows": in_wider_rows,
    "every second column of its memory": every_second_column,
    "every third row of its memory, column by column": every_third_row_of_columns,
}


def stored(x: Tensor) -> str:
    """Put a shape, a dtype and the strides into words."""
    return f"x: {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}, strides {x.stride()}"


def check_new(got: Tensor, arguments: list[Tensor], before: list[Tensor]) -> None:
    """Hold a result to being a contiguous tensor of its own, and the arguments to their values."""
    for name, argument, want in zip("xy", arguments, before, strict=False):
        same = torch.equal(argument.nan_to_num(), want.nan_to_num())
        check_true(same, f"{name} has changed in the call")
        shared = argument.untyped_storage().data_ptr() == got.untyped_storage().data_ptr()
        check_true(not shared, f"the result lies in the memory of {name}; it is no new tensor")
    check_true(got.is_contiguous(), f"the result has strides {got.stride()}; it is not contiguous")


def check_shared(call: Callable[[], Tensor], what: str, num_items: int, share: int) -> None:
    """Hold a launch to as many programs as the contract asks for."""
    programs, fewest = count_programs(call), -(-num_items // share)
    text = f"{programs} programs were launched for {num_items:,} {what}, at least {fewest} share it"
    check_true(programs >= fewest, text)


# add


def check_add(x: Tensor, y: Tensor, of: object = None) -> None:
    check_close(fk.add(x, y), (x.double() + y.double()).to(x.dtype), of=of)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_add_of_any_size(size, dtype):
    check_add(random(size, dtype=dtype), random(size, seed=1, dtype=dtype))


def test_add_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], device=DEVICE)
    y = torch.tensor([10.0, -2.0, 0.5, 0.0, 1e6], device=DEVICE)
    check_close(fk.add(x, y), torch.tensor([11.0, 0.0, 3.5, 4.0, 1_000_005.0]))


@pytest.mark.parametrize("size", [20_000, 65_537])
def test_add_of_a_long_vector(size):
    check_add(random(size), random(size, seed=1))


def test_add_of_numbers_that_are_none():
    x = torch.tensor([math.inf, -math.inf, math.inf, math.nan, 3e38, -0.0], device=DEVICE)
    y = torch.tensor([1.0, 5.0, -math.inf, 1.0, 3e38, 0.0], device=DEVICE)
    expected = torch.tensor([math.inf, -math.inf, math.nan, math.nan, math.inf, 0.0])
    check_close(fk.add(x, y), expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_add_of_large_numbers_in_half_precision(dtype):
    x = torch.tensor([60_000.0, 60_000.0, -60_000.0, 2048.0], device=DEVICE).to(dtype)
    y = torch.tensor([60_000.0, -60_000.0, -4_000.0, 1.0], device=DEVICE).to(dtype)
    check_add(x, y)


def test_add_inside_of_larger_vectors():
    # Behind the end of both lie numbers that belong to somebody else.
    x, y = torch.full((80,), math.nan, device=DEVICE), torch.full((90,), math.nan, device=DEVICE)
    x[5:75], y[3:73] = random(70), random(70, seed=1)
    check_add(x[5:75], y[3:73], of="add of 70 numbers in the middle of longer vectors")


def test_add_of_a_vector_and_itself():
    x = random(300)
    check_add(x, x)


@pytest.mark.parametrize("size", [1, 40, 3000])
def test_add_returns_a_new_tensor(size):
    x, y = random(size), random(size, seed=1)
    before = [x.clone(), y.clone()]
    check_new(fk.add(x, y), [x, y], before)


@pytest.mark.parametrize("size", [70, 3000])
def test_add_is_computed_by_a_kernel(size):
    check_kernel_computes(
        lambda: fk.add(random(size), random(size, seed=1)), f"add of {size} elements"
    )


@pytest.mark.parametrize("size", [4097, 20_000])
def test_add_shares_its_work(size):
    x = random(size)
    check_shared(lambda: fk.add(x, x), "elements", size, 4096)


@pytest.mark.parametrize("shape", [(), (3, 4), (1, 5), (2, 1, 3)], ids=str)
def test_add_refuses_what_has_not_one_axis(shape):
    x = torch.ones(shape, device=DEVICE)
    check_raises(ValueError, fk.add, x, x, mentions=shape)


@pytest.mark.parametrize(("size", "other"), [(5, 6), (5, 1), (1, 5), (0, 1), (100, 99)])
def test_add_refuses_two_sizes(size, other):
    x, y = torch.ones(size, device=DEVICE), torch.ones(other, device=DEVICE)
    check_raises(ValueError, fk.add, x, y, mentions=[size, other])


def test_add_refuses_another_number_of_axes():
    x, y = torch.ones(6, device=DEVICE), torch.ones(6, 1, device=DEVICE)
    check_raises(ValueError, fk.add, x, y, mentions=[6, 1])


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.float16, torch.float32)])
def test_add_refuses_two_dtypes(dtypes):
    x, y = (torch.ones(5, dtype=dtype, device=DEVICE) for dtype in dtypes)
    check_raises(ValueError, fk.add, x, y, mentions=["float16", "float32"])


def test_add_refuses_two_devices():
    x, y = torch.ones(5, device=DEVICE), torch.ones(5, device="meta")
    check_raises(ValueError, fk.add, x, y, mentions=[DEVICE, "meta"])
    check_raises(ValueError, fk.add, y, x, mentions=[DEVICE, "meta"])


def test_add_refuses_elements_that_do_not_lie_side_by_side():
    whole, apart = torch.ones(8, device=DEVICE), torch.ones(24, device=DEVICE)[::3]
    check_raises(ValueError, fk.add, apart, whole, mentions=[3])
    check_raises(ValueError, fk.add, whole, apart, mentions=[3])
    check_raises(ValueError, fk.add, whole, whole[:1].expand(8), mentions=[0])


@settings(max_examples=25)
@given(st.integers(0, 6000), st.integers(0, 99))
def test_add_of_a_size_that_nobody_chose(size, seed):
    check_add(random(size, seed=seed), random(size, seed=seed + 1))


# row_sum


def oracle_sum(x: Tensor) -> Tensor:
    return x.double().sum(dim=1).to(x.dtype)


def check_sum(x: Tensor, of: object = None) -> None:
    check_close(fk.row_sum(x), oracle_sum(x), of=of or f"row_sum of {stored(x)}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sum_of_rows(shape, dtype):
    check_sum(random(*shape, dtype=dtype))


def test_sum_by_hand():
    x = torch.tensor([[1.0, 2.0, 3.0], [10.0, -10.0, 0.5], [0.0, 0.0, 0.0], [-1.0, -2.0, -4.0]])
    check_close(fk.row_sum(x.to(DEVICE)), torch.tensor([6.0, 0.5, 0.0, -7.0]))


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_sum_of_nothing(shape):
    check_equal(fk.row_sum(torch.ones(shape, device=DEVICE)), torch.zeros(shape[0]), "the sums")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 6), (6, 1), (7, 13), (40, 33), (3, 1500)], ids=str)
def test_sum_of_any_layout(shape, layout):
    check_sum(LAYOUTS[layout](random(*shape)))


def test_sum_of_one_row_repeated():
    check_sum(random(1, 50).expand(4, 50))
    check_sum(random(4, 1).expand(4, 50))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_sum_of_any_layout_in_half_precision(layout, dtype):
    check_sum(LAYOUTS[layout](random(9, 70, dtype=dtype)))


@pytest.mark.parametrize("columns", [4095, 4097, 9000, 33_333])
def test_sum_of_long_rows(columns):
    check_sum(random(3, columns))


def test_sum_of_a_row_longer_than_the_largest_block():
    check_sum(random(1, 2**20 + 77))


@pytest.mark.parametrize("column", [0, 1, 500, 1023, 1024, 4095, 4096, 8191, 9999])
def test_sum_counts_every_column_once(column):
    x = torch.zeros(2, 10_000, device=DEVICE)
    x[1, column] = 3.0
    check_equal(fk.row_sum(x), torch.tensor([0.0, 3.0]), f"the sums, with a 3 in column {column}")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_sum_that_leaves_half_precision_on_its_way(dtype):
    # In float32 every sum on the way is exact, in whatever order.
    x = torch.full((2, 16_800), 60_000.0)
    x[:, 8_400:] = -60_000.0
    x[1, ::100] += 150.0
    check_sum(x.to(dtype).to(DEVICE))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_sum_of_numbers_too_small_for_the_sum_so_far(dtype):
    x = torch.full((3, 12_000), 0.3)
    x[1, 0] = 5000.0
    x[2, ::2] = 4.7
    check_sum(x.to(dtype).to(DEVICE))


def test_sum_beyond_half_precision_is_infinite():
    x = torch.full((2, 3000), 40.0, dtype=torch.float16, device=DEVICE)
    x[1] *= -1
    expected = torch.tensor([math.inf, -math.inf], dtype=torch.float16)
    check_equal(fk.row_sum(x), expected, "the sums of 3,000 times 40 and −40")


def test_sum_keeps_numbers_that_are_none_in_their_rows():
    x = torch.ones(5, 70, device=DEVICE)
    x[1, 3], x[3, 69], x[4, 5] = math.nan, math.inf, -math.inf
    expected = torch.tensor([70.0, math.nan, 70.0, math.inf, -math.inf])
    check_close(fk.row_sum(x), expected)


@pytest.mark.parametrize("shape", [(1, 1), (4, 30), (3, 2000)], ids=str)
def test_sum_returns_a_new_tensor(shape):
    x = of_columns(random(*shape))
    before = x.clone()
    check_new(fk.row_sum(x), [x], [before])


@pytest.mark.parametrize("shape", [(5, 30), (2, 3000)], ids=str)
def test_sum_is_computed_by_a_kernel(shape):
    check_kernel_computes(lambda: fk.row_sum(random(*shape)), f"row_sum of {shape}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sum_leaves_all_work_to_its_kernel(layout):
    x = LAYOUTS[layout](random(7, 30))
    check_only_kernels_compute(fk.row_sum, x, of=f"row_sum({stored(x)})")


@pytest.mark.parametrize("rows", [65, 300])
def test_sum_shares_its_work(rows):
    check_shared(lambda: fk.row_sum(random(rows, 9)), "rows", rows, 64)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4), (1, 1, 1)], ids=str)
def test_sum_refuses_what_is_no_matrix(shape):
    check_raises(ValueError, fk.row_sum, torch.ones(shape, device=DEVICE), mentions=shape)


@settings(max_examples=25)
@given(st.integers(0, 40), st.integers(0, 3000), st.sampled_from(list(LAYOUTS)))
def test_sum_of_a_shape_that_nobody_chose(rows, columns, layout):
    check_sum(LAYOUTS[layout](random(rows, columns)))


# tiled_copy


def check_copy(x: Tensor, of: object = None) -> None:
    got = fk.tiled_copy(x)
    of = of or f"tiled_copy of {stored(x)}"
    check_close(got, x.cpu(), tolerance=0.0, of=of)
    text = f"the result has strides {got.stride()}; it is not contiguous"
    check_true(got.is_contiguous(), text, of=of)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_copy_of_a_matrix(shape, dtype):
    check_copy(random(*shape, dtype=dtype))


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_copy_of_nothing(shape):
    check_copy(torch.ones(shape, device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 6), (6, 1), (7, 13), (40, 33), (65, 130)], ids=str)
def test_copy_of_any_layout(shape, layout, dtype):
    check_copy(LAYOUTS[layout](random(*shape, dtype=dtype)))


def test_copy_of_one_row_or_one_column_repeated():
    check_copy(random(1, 50).expand(40, 50))
    check_copy(random(40, 1).expand(40, 50))


@pytest.mark.parametrize("shape", [(2, 5000), (5000, 2)], ids=str)
@pytest.mark.parametrize("is_transposed", [False, True], ids=["", "transposed"])
def test_copy_of_a_long_matrix(shape, is_transposed):
    x = random(*shape)
    check_copy(x.T if is_transposed else x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copy_bit_by_bit(dtype):
    x = torch.tensor([[-0.0, 0.0, math.nan], [math.inf, -math.inf, 1e-7]], device=DEVICE).to(dtype)
    got = fk.tiled_copy(x)
    check_close(got, x.cpu(), tolerance=0.0)
    signs = torch.signbit(got[0, :2]).int()
    check_equal(signs, torch.tensor([1, 0], dtype=torch.int32), "the signs of −0 and 0 (1: minus)")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 1), (40, 30)], ids=str)
def test_copy_returns_a_new_tensor(shape, layout):
    x = LAYOUTS[layout](random(*shape))
    before = x.clone()
    check_new(fk.tiled_copy(x), [x], [before])


def test_copy_of_what_is_contiguous_is_new_too():
    x = random(20, 30)
    check_new(fk.tiled_copy(x), [x], [x.clone()])


@pytest.mark.parametrize("shape", [(5, 30), (70, 80)], ids=str)
def test_copy_is_made_by_a_kernel(shape):
    check_kernel_computes(lambda: fk.tiled_copy(random(*shape).T), f"tiled_copy of {shape[::-1]}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copy_leaves_all_work_to_its_kernel(layout):
    x = LAYOUTS[layout](random(7, 30))
    check_only_kernels_compute(fk.tiled_copy, x, of=f"tiled_copy({stored(x)})")


@pytest.mark.parametrize("shape", [(100, 200), (1, 20_000), (20_000, 1)], ids=str)
def test_copy_shares_its_work(shape):
    x = random(*shape)
    check_shared(lambda: fk.tiled_copy(x), "elements", x.numel(), 4096)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4), (1, 1, 1)], ids=str)
def test_copy_refuses_what_is_no_matrix(shape):
    x = torch.ones(shape, device=DEVICE)
    check_raises(ValueError, fk.tiled_copy, x, mentions=shape)


@settings(max_examples=25)
@given(st.integers(0, 90), st.integers(0, 90), st.sampled_from(list(LAYOUTS)))
def test_copy_of_a_shape_that_nobody_chose(rows, columns, layout):
    check_copy(LAYOUTS[layout](random(rows, columns)))
