"""Grades week2/fused_kernels: add and RMSNorm, the rotation, SiLU times up, and a model on them."""

import math
import random as python_random
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2Config, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Config, Qwen3Model

from course.grading import TOLERANCE, check_close, check_equal, check_true, lab
from course.launches import (
    DEVICE,
    DTYPES,
    check_kernel_computes,
    check_only_kernels_compute,
    observed,
)

fk = lab("week2/fused_kernels")
qwen = lab("week1/qwen")
gqa = lab("week1/gqa")

HALVES = [dtype for dtype in DTYPES if dtype != torch.float32]
# Real widths, one column, one row, no power of two anywhere, and no rows at all.
SHAPES = [
    (3, 576), (5, 80), (4, 1), (1, 896), (2, 3, 33), (70, 9), (7,), (16, 16), (2, 1, 3, 20),
    (0, 16), (2, 0, 24), (0, 3, 5),
]  # fmt: skip
# Wider than the blocks that people like, and higher than the rows that they take at a time.
LARGE = [(2, 4097), (1, 9000), (257, 5), (2, 130, 3)]
NUM_POSITIONS = 200


def random(
    *shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Signed numbers, some of them thirty times as large, in places that follow no axis."""
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x[x.abs() > 1.6] *= 30
    return (x * scale / 10).to(dtype).to(DEVICE)


def of_columns(x: Tensor) -> Tensor:
    """Lay the same numbers out so that those of one row lie far apart."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def in_wider_rows(x: Tensor) -> Tensor:
    """Lay the same numbers out in the middle of longer rows, with NaN around them."""
    width = x.shape[-1]
    wide = x.new_full((*x.shape[:-1], width + 7), math.nan)
    wide[..., 3 : 3 + width] = x
    return wide[..., 3 : 3 + width]


def every_second(x: Tensor) -> Tensor:
    """Lay the same numbers out with a NaN behind each of them."""
    return torch.stack((x, torch.full_like(x, math.nan)), dim=-1)[..., 0]


def first_axes_exchanged(x: Tensor) -> Tensor:
    """Lay the same numbers out as a view whose first two axes were exchanged."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "column by column": of_columns,
    "in the middle of wider rows": in_wider_rows,
    "every second of its memory": every_second,
    "with the first two axes exchanged": first_axes_exchanged,
}


def pair(got: object) -> tuple[Tensor, Tensor]:
    """Take a result apart that has to be a pair."""
    check_true(isinstance(got, tuple) and len(got) == 2, "the result is not a tuple of two")
    return got


def check_left_alone(names: Sequence[str], arguments: Sequence[Tensor], call: Callable) -> None:
    """Hold a call to changing no argument, and to handing none of them back."""
    before = [argument.clone() for argument in arguments]
    results = call()
    results = results if isinstance(results, tuple) else (results,)
    own = {result.untyped_storage().data_ptr() for result in results}
    for name, argument, want in zip(names, arguments, before, strict=True):
        same = torch.equal(argument.cpu().nan_to_num(), want.cpu().nan_to_num())
        check_true(same, f"{name} has changed in the call")
        shared = argument.untyped_storage().data_ptr() in own
        check_true(not shared, f"a result lies in the memory of {name}; it is no new tensor")


def check_rounded(got: Tensor, expected: Tensor, what: str) -> None:
    """Hold a half-precision result to being rounded where the contract rounds, and only there.

    Where a number lies nearly in the middle of two others, the last bit of float32 decides, so one
    in fifty may fall on the other side.
    """
    check_close(got, expected)
    others = (got.cpu() != expected.cpu()).nonzero()
    text = f"{what}: {len(others)} of {expected.numel()} numbers are not those that the contract's "
    if len(others) > expected.numel() / 50:
        place = tuple(others[0].tolist())
        first = f"the first at {list(place)}: got {got[place]:.9g}, expected {expected[place]:.9g}"
        check_true(False, f"{text}roundings give; {first}")


def stored(x: Tensor) -> str:
    """Put a shape, a dtype and the strides into words."""
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}, strides {x.stride()}"


# add_rms_norm


def oracle_sum(x: Tensor, residual: Tensor | None) -> Tensor:
    return x if residual is None else (x.double() + residual.double()).to(x.dtype)


def oracle_norm(summed: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute in float64, and round to the dtype where the contract rounds."""
    wide = summed.double()
    normed = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    return (normed.to(summed.dtype).double() * weight.to(summed.dtype).double()).to(summed.dtype)


def check_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-6, of: object = None
) -> None:
    normed, summed = pair(fk.add_rms_norm(x, residual, weight, eps))
    expected = oracle_sum(x, residual)
    check_close(summed, expected, of=of and f"{of}\nsummed")
    check_close(normed, oracle_norm(expected, weight, eps), of=of and f"{of}\nnormed")


# (x, the residual, the weight, eps, the sum, the result): roots that a person can take on paper.
NORMS_BY_HAND = {
    "nothing to add": ([1.0, 7.0], None, [1.0, 1.0], 0.0, [1.0, 7.0], [0.2, 1.4]),
    "a sum": ([2.0, 4.0], [-1.0, 3.0], [1.0, 1.0], 0.0, [1.0, 7.0], [0.2, 1.4]),
    "three columns": ([-3.0, 1.0, 3.0], [0.0, 2.0, 0.0], [1.0] * 3, 0.0, [-3.0, 3.0, 3.0],
                      [-1.0, 1.0, 1.0]),
    "weights": ([0.0, 7.0], [1.0, 0.0], [10.0, -5.0], 0.0, [1.0, 7.0], [2.0, -7.0]),
    "eps": ([1.0, 7.0], [0.0, 0.0], [10.0, 10.0], 75.0, [1.0, 7.0], [1.0, 7.0]),
    "one column": ([-3.0], [-1.0], [0.5], 9.0, [-4.0], [-0.4]),
}  # fmt: skip


@pytest.mark.parametrize("case", NORMS_BY_HAND)
def test_norm_by_hand(case):
    *arguments, eps, sum_by_hand, by_hand = NORMS_BY_HAND[case]
    x, residual, weight = (
        None if row is None else torch.tensor(row, device=DEVICE) for row in arguments
    )
    normed, summed = pair(fk.add_rms_norm(x, residual, weight, eps))
    of = f"add_rms_norm of x {arguments[0]}, residual {arguments[1]}, weight {arguments[2]}, {eps=}"
    check_close(summed, torch.tensor(sum_by_hand), of=f"{of}\nsummed")
    check_close(normed, torch.tensor(by_hand), of=f"{of}\nnormed")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_matches_float64(shape, dtype):
    x, residual = random(*shape, dtype=dtype), random(*shape, seed=1, dtype=dtype)
    check_norm(x, residual, random(shape[-1], seed=2, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 576), (2, 5, 80), (40, 1), (0, 7)], ids=str)
def test_norm_without_a_residual(shape, dtype):
    x, weight = random(*shape, dtype=dtype), random(shape[-1], seed=2, dtype=dtype)
    check_norm(x, None, weight)
    _, summed = pair(fk.add_rms_norm(x, None, weight, 1e-6))
    check_true(summed is x, "residual is None, and summed is not x itself")


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_norm_of_many_rows_and_of_wide_ones(shape):
    check_norm(random(*shape), random(*shape, seed=1), random(shape[-1], seed=2))


@pytest.mark.parametrize("eps", [1e-2, 1e-5, 1e-6, 1e-12], ids=lambda eps: f"eps={eps:g}")
def test_norm_of_rows_near_zero(eps):
    x = random(5, 20, scale=3 * eps**0.5)
    x[2] /= 100
    residual = random(5, 20, seed=1, scale=3 * eps**0.5)
    x[1] = -residual[1]
    weight = random(20, seed=2, scale=10.0)
    for row in range(5):
        check_norm(x[row], residual[row], weight, eps)


@pytest.mark.parametrize("scale", [1e-15, 1e-3, 1e4, 1e16], ids=lambda scale: f"scale={scale:g}")
def test_norm_of_any_magnitude(scale):
    x, residual = random(3, 40, scale=scale), random(3, 40, seed=1, scale=scale)
    check_norm(x, residual, random(40, seed=2), 1e-5)


@pytest.mark.parametrize("scale", [1e-2, 300.0, 3000.0], ids=lambda scale: f"scale={scale:g}")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_norm_of_half_precision_whose_squares_do_not_fit(dtype, scale):
    x = random(6, 70, scale=scale, dtype=torch.float32).clamp(-30_000, 30_000).to(dtype)
    residual = random(6, 70, seed=1, scale=scale).clamp(-30_000, 30_000).to(dtype)
    check_norm(x, residual, random(70, seed=2, scale=10.0, dtype=dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_norm_of_many_small_squares_beside_a_large_one(dtype):
    # Beside the square of 64, a half-precision sum does not notice that of 0.75.
    x = torch.full((2, 3000), 0.75, dtype=dtype, device=DEVICE)
    x[:, 0] = 64
    check_norm(x, torch.zeros_like(x), random(3000, seed=2, dtype=dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_norm_rounds_where_week_1_rounds(dtype):
    x, residual = random(30, 96, dtype=dtype), random(30, 96, seed=1, dtype=dtype)
    weight = random(96, seed=2, scale=10.0, dtype=dtype)
    normed, summed = pair(fk.add_rms_norm(x, residual, weight, 1e-6))
    expected = oracle_sum(x, residual)
    check_rounded(summed, expected, "summed")
    check_rounded(normed, oracle_norm(expected, weight, 1e-6), "normed")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_norm_of_a_sum_that_is_rounded(dtype):
    # Next to 1/eps the spacing is 2, so that half of these sums lie between two numbers.
    large = 2 / torch.finfo(dtype).eps
    residual = large + 2 * torch.arange(64, device=DEVICE).repeat(8, 1)
    x = torch.arange(64, device=DEVICE) % 4 - 1
    residual, x = residual.to(dtype), x.expand(8, 64).to(dtype)
    weight = torch.ones(64, dtype=dtype, device=DEVICE)
    normed, summed = pair(fk.add_rms_norm(x, residual, weight, 1e-6))
    expected = oracle_sum(x, residual)
    check_rounded(summed, expected, "summed")
    check_rounded(normed, oracle_norm(expected, weight, 1e-6), "normed")


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_gives_the_dtype_of_x_whatever_the_weight_has(dtype, weight_dtype):
    x, residual = random(9, 64, dtype=dtype), random(9, 64, seed=1, dtype=dtype)
    weight = random(64, seed=2, scale=10.0, dtype=weight_dtype)
    normed, summed = pair(fk.add_rms_norm(x, residual, weight, 1e-6))
    expected = oracle_norm(oracle_sum(x, residual), weight, 1e-6)
    check_close(summed, oracle_sum(x, residual))
    check_close(normed, expected)
    if dtype != torch.float32:
        check_rounded(normed, expected, "normed")


@pytest.mark.parametrize("which", ["x", "residual", "x without a residual"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_of_arguments_that_are_not_contiguous(layout, which):
    x, residual = random(4, 3, 18), random(4, 3, 18, seed=1)
    weight = random(18, seed=2)
    if which == "residual":
        residual = LAYOUTS[layout](residual)
    else:
        x = LAYOUTS[layout](x)
    given = None if which == "x without a residual" else residual
    of = f"add_rms_norm(x: {stored(x)}, residual: {'None' if given is None else stored(residual)})"
    check_norm(x, given, weight, of=of)


@pytest.mark.parametrize("layout", ["column by column", "in the middle of wider rows"])
def test_norm_of_four_axes_that_are_not_contiguous(layout):
    x = LAYOUTS[layout](random(2, 3, 4, 10).transpose(1, 2))
    residual = random(4, 2, 3, 10, seed=1).permute(1, 0, 2, 3)
    of = f"add_rms_norm(x: {stored(x)}, residual: {stored(residual)})"
    check_norm(x, residual, random(10, seed=2), of=of)


def test_norm_of_one_row_for_all_and_of_a_stretched_weight():
    x = random(6, 20)
    residual = random(20, seed=1).expand(6, 20)
    for weight in (every_second(random(20, seed=2)), random(1, seed=3).expand(20)):
        of = f"add_rms_norm(x, residual: {stored(residual)}, weight: {stored(weight)})"
        check_norm(x, residual, weight, of=of)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_leaves_its_inputs_alone(dtype):
    arguments = [random(5, 24, dtype=dtype), random(5, 24, seed=1, dtype=dtype), random(24, seed=2)]
    check_left_alone(
        ("x", "residual", "weight"), arguments, lambda: fk.add_rms_norm(*arguments, 1e-6)
    )
    check_left_alone(
        ("x", "weight"),
        arguments[::2],
        lambda: fk.add_rms_norm(arguments[0], None, arguments[2], 0)[0],
    )


def test_norm_keeps_the_rows_apart():
    x, residual = random(6, 33), random(6, 33, seed=1)
    weight = random(33, seed=2)
    x[2, 5], residual[4, 0] = math.nan, math.inf
    normed, summed = pair(fk.add_rms_norm(x, residual, weight, 1e-6))
    kept = [0, 1, 3, 5]
    of = "add_rms_norm of 6 rows, a NaN in x's row 2, an infinity in the residual's row 4"
    expected = oracle_sum(x[kept], residual[kept])
    check_close(summed[kept], expected, of=f"{of}\nsummed, the other rows")
    check_close(normed[kept], oracle_norm(expected, weight, 1e-6), of=f"{of}\nnormed, those rows")
    check_true(normed[2].isnan().all(), "row 2 has a NaN, and its mean square is a number", of=of)


@settings(max_examples=20)
@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 99))
def test_norm_of_rows_together_is_that_of_each_alone(num_rows, width, seed):
    x, residual = random(num_rows, width, seed=seed), random(num_rows, width, seed=seed + 1)
    weight = random(width, seed=seed + 2)
    together = pair(fk.add_rms_norm(x, residual, weight, 1e-6))
    row = seed % num_rows
    alone = pair(fk.add_rms_norm(x[row], residual[row], weight, 1e-6))
    for name, all_rows, one in zip(("normed", "summed"), together, alone, strict=True):
        of = f"add_rms_norm of {num_rows} rows of {width}, and of row {row} alone: {name}"
        check_close(all_rows[row], one, of=of)


@pytest.mark.parametrize("shape", [(5, 70), (2, 3, 1100)], ids=str)
@pytest.mark.parametrize("which", ["normed", "summed", "normed, without a residual"])
def test_norm_is_one_launch_of_a_kernel(which, shape):
    x, residual, weight = random(*shape), random(*shape, seed=1), random(shape[-1], seed=2)
    given = residual if which in ("normed", "summed") else None
    check_kernel_computes(
        lambda: fk.add_rms_norm(x.clone(), given, weight, 1e-6)[which == "summed"],
        f"add_rms_norm of {shape}: {which}",
    )


# rotate


def angles(positions: Tensor, head_dim: int, theta: float) -> Tensor:
    pairs = torch.arange(head_dim // 2, dtype=torch.float64)
    return positions.cpu().double().unsqueeze(-1) * torch.exp(
        -2 * pairs / head_dim * math.log(theta)
    )


def make_table(head_dim: int, theta: float = 1e4, num_positions: int = NUM_POSITIONS) -> Tensor:
    """A right table, so that week 1's is not graded once more."""
    turned = angles(torch.arange(num_positions), head_dim, theta)
    return torch.cat((turned.cos(), turned.sin()), dim=-1).float().to(DEVICE)


def oracle_rotation(x: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    """A pair is one complex number, and turning it is one multiplication, in float64."""
    half = x.shape[-1] // 2
    turns = torch.complex(*table.cpu().double()[positions.cpu()].split(half, dim=-1))
    wide = x.cpu().double()
    numbers = torch.complex(wide[..., :half], wide[..., half:]) * turns
    return torch.cat((numbers.real, numbers.imag), dim=-1)


def rounded_once(dtype: torch.dtype) -> float:
    """Say how far a result may be off that is computed in float32 and rounded once."""
    own = 0.0 if dtype == torch.float32 else 0.5 * torch.finfo(dtype).eps
    return own + TOLERANCE[torch.float32]


def check_rotation(
    q: Tensor, k: Tensor, positions: Tensor, table: Tensor, of: object = None
) -> None:
    rotated = pair(fk.rotate(q, k, positions, table))
    for name, x, got in zip("qk", (q, k), rotated, strict=True):
        expected, tolerance = oracle_rotation(x, positions, table), rounded_once(x.dtype)
        what = of and f"{of}\n{name}"
        check_close(got, expected, dtype=x.dtype, tolerance=tolerance, of=what)


def draw_positions(tokens: int, seed: int = 0, limit: int = NUM_POSITIONS) -> Tensor:
    """Positions in no order, some of them twice."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(limit, (tokens,), generator=generator).to(DEVICE)


def projected(
    tokens: int, heads: Sequence[int], head_dim: int, dtype=torch.float32
) -> list[Tensor]:
    """Queries, keys and so on as views (heads, tokens, head_dim) of one projection's result."""
    merged = random(tokens, sum(heads) * head_dim, dtype=dtype)
    parts = merged.split([count * head_dim for count in heads], dim=-1)
    return [part.unflatten(-1, (-1, head_dim)).transpose(0, 1) for part in parts]


# (row 1 of the table, a token, the same token turned to position 1)
ROTATIONS_BY_HAND = {
    "head_dim=2": ([0.6, 0.8], [1.0, 0.0], [0.6, 0.8]),
    "head_dim=2, the other axis": ([0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]),
    "head_dim=4, the first pair": (
        [0.6, 1.0, 0.8, 0.0], [1.0, 0.0, 0.0, 0.0], [0.6, 0.0, 0.8, 0.0],
    ),
    "head_dim=4, the second pair": (
        [1.0, 0.6, 0.0, 0.8], [0.0, 10.0, 0.0, 0.0], [0.0, 6.0, 0.0, 8.0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ROTATIONS_BY_HAND)
def test_rotate_by_hand(case):
    row, x, expected = ROTATIONS_BY_HAND[case]
    half = len(row) // 2
    table = torch.tensor([[1.0] * half + [0.0] * half, row], device=DEVICE)
    q, k = torch.tensor([[x]], device=DEVICE), torch.zeros(1, 1, 2 * half, device=DEVICE)
    got, still = pair(fk.rotate(q, k, torch.tensor([1], device=DEVICE), table))
    of = f"rotate of one query {x} at position 1, row 1 of the table is {row}; the key is zero"
    check_close(got, torch.tensor([[expected]]), of=f"{of}\nq")
    check_close(still, k, of=f"{of}\nk")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "num_heads, num_kv_heads, tokens, head_dim",
    [(14, 2, 5, 64), (4, 4, 3, 80), (8, 2, 6, 96), (9, 3, 1, 128), (1, 1, 11, 2), (3, 1, 7, 6),
     (1, 3, 2, 24), (40, 8, 2, 16), (2, 1, 90, 4), (5, 5, 5, 10), (2, 2, 1, 300)],
)  # fmt: skip
def test_rotate_matches_complex_numbers(num_heads, num_kv_heads, tokens, head_dim, dtype):
    q = random(num_heads, tokens, head_dim, dtype=dtype)
    k = random(num_kv_heads, tokens, head_dim, seed=1, dtype=dtype)
    check_rotation(q, k, draw_positions(tokens), make_table(head_dim))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_heads, num_kv_heads", [(3, 3), (4, 1), (14, 2)])
@pytest.mark.parametrize("with_values", [False, True], ids=["two projections", "one projection"])
def test_rotate_views_of_a_projection(with_values, num_heads, num_kv_heads, dtype):
    heads = (num_heads, num_kv_heads, *([num_kv_heads] if with_values else []))
    q, k, *_ = projected(9, heads, 20, dtype)
    of = f"rotate(q: {stored(q)}, k: {stored(k)})"
    check_rotation(q, k, draw_positions(9), make_table(20), of=of)


@pytest.mark.parametrize("which", ["q", "k", "table"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotate_arguments_that_are_not_contiguous(layout, which):
    given = {"q": random(6, 5, 12), "k": random(2, 5, 12, seed=1), "table": make_table(12)}
    given[which] = LAYOUTS[layout](given[which])
    of = f"rotate, {which}: {stored(given[which])}"
    check_rotation(given["q"], given["k"], draw_positions(5), given["table"], of=of)


def test_rotate_with_positions_that_are_not_contiguous():
    q, k, table = random(3, 6, 8), random(1, 6, 8, seed=1), make_table(8)
    scattered = torch.stack((draw_positions(6), torch.full((6,), -1, device=DEVICE)), dim=-1)[:, 0]
    for positions in (scattered, torch.tensor([77], device=DEVICE).expand(6)):
        of = f"rotate, positions: {stored(positions)}"
        check_rotation(q, k, positions, table, of=of)


ORDERS = {
    "backwards": [8, 7, 6, 5, 4],
    "three sequences in one call": [7, 8, 0, 1, 129],
    "one position for all": [3, 3, 3, 3, 3],
    "the first and the last of the table": [0, 199, 0, 199, 198],
}


@pytest.mark.parametrize("order", ORDERS)
def test_rotate_at_positions_in_any_order(order):
    positions = torch.tensor(ORDERS[order], device=DEVICE)
    check_rotation(random(4, 5, 16), random(2, 5, 16, seed=1), positions, make_table(16))


@pytest.mark.parametrize("theta", [10.0, 1e6], ids=lambda theta: f"theta={theta:g}")
def test_rotate_reads_the_table_it_is_given(theta):
    q, k = random(3, 4, 24), random(1, 4, 24, seed=1)
    check_rotation(q, k, draw_positions(4, 3, 11), make_table(24, theta, num_positions=11))


def test_rotate_far_from_the_start():
    positions = torch.tensor([32_767, 0, 30_001, 12_345], device=DEVICE)
    table = make_table(16, 1e6, num_positions=32_768)
    check_rotation(random(2, 4, 16), random(2, 4, 16, seed=1), positions, table)


@pytest.mark.parametrize("scale", [1e30, 1e-30], ids=lambda scale: f"scale={scale:g}")
def test_rotate_huge_and_tiny_numbers(scale):
    q, k = random(2, 7, 16, scale=scale), random(1, 7, 16, seed=1, scale=scale)
    check_rotation(q, k, draw_positions(7), make_table(16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotate_at_position_zero_changes_nothing(dtype):
    q, k = random(2, 3, 24, dtype=dtype), random(1, 3, 24, seed=1, dtype=dtype)
    rotated = pair(
        fk.rotate(q, k, torch.zeros(3, dtype=torch.int64, device=DEVICE), make_table(24))
    )
    for x, got in zip((q, k), rotated, strict=True):
        check_close(got, x, tolerance=0.0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rotate_rounds_once(dtype):
    q, k = random(8, 30, 32, dtype=dtype), random(2, 30, 32, seed=1, dtype=dtype)
    positions, table = draw_positions(30), make_table(32)
    for name, x, got in zip("qk", (q, k), pair(fk.rotate(q, k, positions, table)), strict=True):
        check_rounded(got, oracle_rotation(x, positions, table).to(dtype), name)


@pytest.mark.parametrize("wrong", [-1, -NUM_POSITIONS, 40, 41, 100_000, 2**32 + 3, -(2**40)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotate_gives_nan_for_positions_outside_the_table(dtype, wrong):
    q, k = random(3, 4, 12, dtype=dtype), random(1, 4, 12, seed=1, dtype=dtype)
    # The table lies in a longer one, so that what is read outside of it is no accident.
    table = make_table(12)[80:120]
    positions = torch.tensor([39, 0, wrong, 17], device=DEVICE)
    rotated = pair(fk.rotate(q, k, positions, table))
    of = f"rotate at positions {positions.tolist()}, in a table of 40 rows"
    for name, x, got in zip("qk", (q, k), rotated, strict=True):
        check_equal(tuple(got.shape), tuple(x.shape), f"the shape of {name}", of=of)
        kept = [0, 1, 3]
        expected = oracle_rotation(x[:, kept], positions[kept], table)
        tolerance, what = rounded_once(dtype), f"{of}\n{name}, the tokens inside"
        check_close(got[:, kept], expected, dtype=dtype, tolerance=tolerance, of=what)
        what = f"{name} of the token at position {wrong} holds numbers, not NaN"
        check_true(got[:, 2].isnan().all(), what, of=of)


@pytest.mark.parametrize("num_heads, num_kv_heads", [(4, 2), (1, 1)])
def test_rotate_no_tokens(num_heads, num_kv_heads):
    q, k = random(num_heads, 0, 8), random(num_kv_heads, 0, 8)
    check_rotation(q, k, draw_positions(0), make_table(8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotate_leaves_its_inputs_alone(dtype):
    q, k = random(4, 5, 8, dtype=dtype), random(2, 5, 8, seed=1, dtype=dtype)
    arguments = [q, k, draw_positions(5), make_table(8)]
    names = ("q", "k", "positions", "table")
    check_left_alone(names, arguments, lambda: fk.rotate(*arguments))


@settings(max_examples=20)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 5), st.integers(1, 9))
def test_rotate_tokens_together_as_each_alone(tokens, num_kv_heads, group, num_pairs):
    q = random(num_kv_heads * group, tokens, 2 * num_pairs)
    k, table = random(num_kv_heads, tokens, 2 * num_pairs, seed=1), make_table(2 * num_pairs)
    positions = draw_positions(tokens, seed=group)
    together = pair(fk.rotate(q, k, positions, table))
    one = slice(tokens // 2, tokens // 2 + 1)
    alone = pair(fk.rotate(q[:, one], k[:, one], positions[one], table))
    for name, all_tokens, token in zip("qk", together, alone, strict=True):
        of = f"rotate of {tokens} tokens, and of token {tokens // 2} alone: {name}"
        check_close(all_tokens[:, one], token, of=of)


@pytest.mark.parametrize("which", ["q", "k"])
@pytest.mark.parametrize("num_heads, num_kv_heads, tokens", [(14, 2, 3), (3, 3, 40)])
def test_rotate_is_one_launch_of_a_kernel(num_heads, num_kv_heads, tokens, which):
    q, k = random(num_heads, tokens, 16), random(num_kv_heads, tokens, 16, seed=1)
    positions, table = draw_positions(tokens) + 1, make_table(16, num_positions=NUM_POSITIONS + 1)
    check_kernel_computes(
        lambda: fk.rotate(q.clone(), k.clone(), positions, table)[which == "k"],
        f"rotate of q {tuple(q.shape)} and k {tuple(k.shape)}: {which}",
    )


# silu_mul


def oracle_silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Compute in float64, and round to the dtype where the contract rounds."""
    silu = gate.cpu().double()
    silu = silu / (1 + (-silu).exp())
    return (silu.to(gate.dtype).double() * up.cpu().double()).to(gate.dtype)


def check_silu(gate: Tensor, up: Tensor, of: object = None) -> None:
    check_close(fk.silu_mul(gate, up), oracle_silu_mul(gate, up), of=of)


def test_silu_by_hand():
    gate = torch.tensor([0.0, 40.0, -40.0, 40.0, math.log(3)], device=DEVICE)
    up = torch.tensor([7.0, 3.0, 3.0, -0.5, 4 / math.log(3)], device=DEVICE)
    expected = torch.tensor([0.0, 120.0, 0.0, -20.0, 3.0])
    of = "silu_mul of gate [0, 40, -40, 40, ln 3] and up [7, 3, 3, -0.5, 4 / ln 3]"
    check_close(fk.silu_mul(gate, up), expected, of=of)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_silu_matches_float64(shape, dtype):
    gate, up = random(*shape, scale=8.0, dtype=dtype), random(*shape, seed=1, dtype=dtype)
    check_silu(gate, up)


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_silu_of_many_rows_and_of_wide_ones(shape):
    check_silu(random(*shape, scale=8.0), random(*shape, seed=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 80, 1100])
def test_silu_of_both_halves_of_one_tensor(width, dtype):
    merged = random(5, 2 * width, scale=8.0, dtype=dtype)
    gate, up = merged.chunk(2, dim=-1)
    check_silu(gate, up, of=f"silu_mul(gate: {stored(gate)}, up: {stored(up)})")


@pytest.mark.parametrize("which", ["gate", "up"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_silu_of_arguments_that_are_not_contiguous(layout, which):
    given = {"gate": random(4, 3, 18, scale=8.0), "up": random(4, 3, 18, seed=1)}
    given[which] = LAYOUTS[layout](given[which])
    check_silu(**given, of=f"silu_mul, {which}: {stored(given[which])}")


def test_silu_of_one_row_for_all_and_of_four_axes():
    gate, up = random(2, 3, 4, 10, scale=8.0).transpose(1, 2), random(10, seed=1)
    up = up.expand(2, 4, 3, 10)
    check_silu(gate, up, of=f"silu_mul(gate: {stored(gate)}, up: {stored(up)})")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_of_gates_whose_exponential_does_not_fit(dtype):
    gates = [
        -60_000.0,
        -104.0,
        -89.0,
        -88.0,
        -20.0,
        -12.0,
        -11.0,
        11.5,
        12.0,
        90.0,
        300.0,
        60_000.0,
    ]
    gate = torch.tensor(gates, device=DEVICE).to(dtype)
    for size in (1.0, -0.25):
        of = f"silu_mul of gate {gates} and up {size:g}, {dtype}"
        check_silu(gate, torch.full_like(gate, size), of=of)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_silu_rounds_where_week_1_rounds(dtype):
    gate, up = random(30, 96, scale=4.0, dtype=dtype), random(30, 96, seed=1, dtype=dtype)
    check_rounded(fk.silu_mul(gate, up), oracle_silu_mul(gate, up), "the result")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_leaves_its_inputs_alone(dtype):
    arguments = [random(5, 24, dtype=dtype), random(5, 24, seed=1, dtype=dtype)]
    check_left_alone(("gate", "up"), arguments, lambda: fk.silu_mul(*arguments))


def test_silu_keeps_the_elements_apart():
    gate, up = random(4, 33, scale=8.0), random(4, 33, seed=1)
    expected = oracle_silu_mul(gate, up)
    gate[1, 7] = up[2, 30] = expected[1, 7] = expected[2, 30] = math.nan
    of = "silu_mul of (4, 33), gate is NaN at [1, 7] and up at [2, 30]"
    check_close(fk.silu_mul(gate, up), expected, of=of)


@settings(max_examples=20)
@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 99))
def test_silu_of_any_size(num_rows, width, seed):
    gate = random(num_rows, width, seed=seed, scale=8.0)
    check_silu(gate, random(num_rows, width, seed=seed + 1))


@pytest.mark.parametrize("shape", [(5, 70), (2, 3, 1100)], ids=str)
def test_silu_is_one_launch_of_a_kernel(shape):
    gate, up = random(*shape, scale=8.0), random(*shape, seed=1)
    check_kernel_computes(lambda: fk.silu_mul(gate.clone(), up), f"silu_mul of {shape}")


def test_contiguous_arguments_leave_all_work_to_the_kernels():
    x, residual, weight = random(4, 18), random(4, 18, seed=1), random(18, seed=2)
    q, k, table = random(4, 5, 16), random(2, 5, 16, seed=1), make_table(16)
    of = "arguments that are all contiguous"
    only = check_only_kernels_compute
    only(fk.add_rms_norm, x, residual, weight, 1e-6, of=f"add_rms_norm, {of}")
    only(fk.rotate, q, k, draw_positions(5), table, of=f"rotate, {of}")
    only(fk.silu_mul, x, residual, of=f"silu_mul, {of}")


# The model on these kernels: `fuse` is given.

FAMILIES = {"Qwen2": (Qwen2Config, Qwen2Model), "Qwen3": (Qwen3Config, Qwen3Model)}
SIZES = {
    "Qwen2": {"hidden_size": 28, "num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 6},
    "Qwen3": {
        "hidden_size": 20,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 14,
    },
}
SHARED = {
    "vocab_size": 61,
    "intermediate_size": 33,
    "num_hidden_layers": 3,
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "tie_word_embeddings": True,
    "max_position_embeddings": 40,
}


def two_models(family: str) -> tuple[nn.Module, nn.Module]:
    """transformers' model and the fused one of the course, with the same signed weights."""
    shape = SHARED | SIZES[family]
    config_class, model_class = FAMILIES[family]
    theirs = model_class(config_class(**shape, attn_implementation="eager")).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in theirs.named_parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0
        scale = 3.0 if "embed_tokens" in name else scale
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    theirs.requires_grad_(False)
    model = qwen.Qwen(
        qwen.QwenConfig.from_dict(shape | {"architectures": [f"{family}ForCausalLM"]})
    )
    fk.fuse(model, use_kernels=True)
    qwen.load_weights(model, {f"model.{name}": x for name, x in theirs.state_dict().items()})
    return theirs, model.to(DEVICE)


def hidden_states(model: nn.Module, ids: Tensor, positions: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(ids.to(DEVICE), positions.to(DEVICE), gqa.causal_attend)


@pytest.mark.parametrize("num_tokens", [1, 7])
@pytest.mark.parametrize("family", FAMILIES)
def test_model_matches_transformers(family, num_tokens):
    theirs, model = two_models(family)
    ids = torch.arange(num_tokens) ** 2 % 61
    expected = theirs(ids[None], use_cache=False).last_hidden_state[0]
    of = f"a {family} of 3 layers on your kernels, its hidden states of {num_tokens} tokens"
    # Three layers of other orders of summation.
    got = hidden_states(model, ids, torch.arange(num_tokens))
    check_close(got, expected, tolerance=5 * TOLERANCE[torch.float32], of=of)


@pytest.mark.parametrize("family", FAMILIES)
def test_model_of_a_batch_matches_transformers(family):
    theirs, model = two_models(family)
    ids = torch.arange(15).reshape(3, 5) ** 2 % 61
    positions = torch.arange(5) + torch.tensor([[0], [30], [4]])
    expected = theirs(ids, position_ids=positions, use_cache=False).last_hidden_state
    of = f"a {family} of 3 layers on your kernels, its hidden states of 3 sequences of 5 tokens"
    got = hidden_states(model, ids, positions)
    check_close(got, expected, tolerance=5 * TOLERANCE[torch.float32], of=of)


@pytest.mark.parametrize("family, in_a_layer", [("Qwen2", 4), ("Qwen3", 6)])
def test_model_launches_few_kernels(family, in_a_layer):
    _, model = two_models(family)
    draw = python_random.Random(family)
    ids = torch.tensor(draw.choices(range(61), k=5))
    with observed() as names:
        hidden_states(model, ids, torch.arange(5))
    of = f"a {family} of 3 layers on your kernels"
    check_equal(len(names), 3 * in_a_layer + 1, "the number of launches", of=of)
