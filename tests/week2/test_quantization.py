"""Grades week2/quantization: rounding, packing, measuring, the two kernels, and a model with both.

The oracle is NumPy in float64; it takes codes apart itself. Where several codes are right, what is
held is how far the matrix lies from what they stand for.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from course.grading import check_close, check_equal, check_raises, check_true, lab
from course.launches import DEVICE, DTYPES, check_kernel_computes

quantization = lab("week2/quantization")
qwen = lab("week1/qwen")
gqa = lab("week1/gqa")

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Rounding in float32 may move an entry that lies half-way between two codes.
HALF = 0.5 + 1e-4
SHAPES = [(1, 1), (3, 5), (1, 64), (33, 130), (64, 32)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Signed values; every row has a size of its own, and some entries are outliers."""
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape))
    values = torch.randn(shape, generator=generator)
    values[values.abs() > 2] *= 3
    sizes = torch.linspace(-2, 2, shape[-2]) if len(shape) > 1 else torch.zeros(1)
    return (values * 10 ** sizes[:, None] if len(shape) > 1 else values).to(dtype)


def wide(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()


def told(shape, dtype, more: str = "") -> str:
    return f"weight: {tuple(shape)} {str(dtype).removeprefix('torch.')}{more}"


def check_tensor(tensor: Tensor, shape, dtype, what: str, of: str) -> None:
    got = (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous())
    check_equal(got, (tuple(shape), dtype, True), f"shape, dtype and is_contiguous of {what}", of)


def check_codes(codes: np.ndarray, low: int, high: int, what: str, of: str) -> None:
    reach = (int(codes.min()), int(codes.max()))
    check_true(low <= reach[0] and reach[1] <= high, f"{what} reach from {reach}", of=of)


def check_rounding(weight: Tensor, stands_for: np.ndarray, scales: np.ndarray, of: str) -> None:
    """Hold each entry to half of its scale; both arrays have weight's shape."""
    error = torch.from_numpy(np.abs(wide(weight) - stands_for) - HALF * scales)
    error = torch.nan_to_num(error, nan=math.inf)
    if bool((error <= 0).all()):
        return
    at = tuple((error > 0).nonzero()[0].tolist())
    text = (
        f"{int((error > 0).sum())} of {error.numel()} entries are further from what they stand for "
        f"than half of their scale, the first at {list(at)}: {float(weight[at]):.6g} became "
        f"{float(stands_for[at]):.6g}, and its scale is {float(scales[at]):.6g}"
    )
    check_true(False, text, of=of)


def check_scales(got: Tensor, expected: np.ndarray, of: str) -> None:
    """Hold scales to the contract; where all entries are zero, any finite one will do."""
    check_true(bool(got.isfinite().all()), "a scale is not finite", of=of)
    want = torch.from_numpy(expected)
    wrong = ((got.double() - want).abs() > 1e-6 * want) & (want > 0)
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        pair = f"got {float(got[at]):.6g}, expected {float(want[at]):.6g}"
        text = (
            f"{int(wrong.sum())} of {want.numel()} scales differ, the first at {list(at)}: {pair}"
        )
        check_true(False, text, of=of)


def check_int8(weight: Tensor, quantized, of: str) -> None:
    """Hold what `quantize_int8` gave to its contract."""
    check_tensor(quantized.codes, weight.shape, torch.int8, "codes", of)
    check_tensor(quantized.scales, weight.shape[:1], torch.float32, "scales", of)
    exact = wide(weight)
    check_scales(quantized.scales, np.abs(exact).max(1) / 127, of)
    codes, scales = wide(quantized.codes), wide(quantized.scales)[:, None]
    check_codes(codes, -127, 127, "codes", of)
    check_rounding(weight, codes * scales, np.broadcast_to(scales, codes.shape), of)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_is_near(shape, dtype):
    weight = random(*shape, dtype=dtype)
    before = weight.clone()
    check_int8(weight, quantization.quantize_int8(weight), told(shape, dtype))
    check_close(weight, before, tolerance=0.0, of="weight after quantize_int8")


def test_int8_by_hand():
    weight = torch.tensor([[127.0, -64.0, 1.0, 0.4], [-2.54, 0.02, 0.0, 1.27], [-5.0, 5.0, 0, 2.5]])
    got = quantization.quantize_int8(weight)
    of = f"weight: {weight.tolist()}"
    expected = torch.tensor([[127, -64, 1, 0], [-127, 1, 0, 64], [-127, 127, 0, 64]])
    # 63.5 is half-way between two codes.
    near = (got.codes.long() - expected).abs() <= torch.tensor([0, 0, 0, 1])
    check_true(near.all(), f"codes: got {got.codes.tolist()}, expected {expected.tolist()}", of)
    check_close(got.scales, torch.tensor([1.0, 0.02, 5 / 127]), tolerance=1e-6, of=of)


def test_int8_of_the_largest_and_the_smallest_row():
    weight = torch.stack((random(1, 40)[0] * 1e30, random(1, 40)[0] * 1e-30))
    check_int8(weight, quantization.quantize_int8(weight), "weight: rows near 1e30 and 1e-30")


def test_int8_of_zeros():
    weight = random(4, 6)
    weight[1] = 0
    got = quantization.quantize_int8(weight)
    check_int8(weight, got, "weight: (4, 6), row 1 is zeros")
    check_equal(got.codes[1].tolist(), [0] * 6, "codes of the row of zeros")


def test_int8_of_a_transposed_matrix():
    weight = random(9, 20).T
    check_int8(
        weight, quantization.quantize_int8(weight), told(weight.shape, "float32, transposed")
    )


@settings(max_examples=40)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 10**6))
def test_int8_of_any_matrix(rows, columns, seed):
    weight = random(rows, columns, seed=seed)
    check_int8(weight, quantization.quantize_int8(weight), told(weight.shape, weight.dtype))


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("name", ["quantize_int8", "quantize_int4"])
def test_quantizing_refuses_what_is_no_matrix(name, shape):
    more = () if name == "quantize_int8" else (32,)
    check_raises(
        ValueError, getattr(quantization, name), torch.ones(shape), *more, mentions=[shape]
    )


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ["quantize_int8", "quantize_int4"])
def test_quantizing_refuses_what_is_not_finite(name, bad):
    weight = random(3, 40)
    weight[2, 39] = bad
    more = () if name == "quantize_int8" else (32,)
    check_raises(ValueError, getattr(quantization, name), weight, *more)


def test_quantized_weights_require_no_gradient():
    weight = torch.nn.Linear(40, 3).weight
    eight, four = quantization.quantize_int8(weight), quantization.quantize_int4(weight, 32)
    parts = {
        "the scales of 8 bits": eight.scales,
        "the scales of 4 bits": four.scales,
        "the matrix that 8 bits stand for": quantization.dequantize(eight),
    }
    for what, part in parts.items():
        of = "weight: torch.nn.Linear(40, 3).weight, which requires a gradient"
        check_true(not part.requires_grad, f"{what} require a gradient, too", of=of)


def byte(low: int, high: int) -> int:
    return low + 16 * high


def test_pack_by_hand():
    codes = torch.tensor([[1, 2, 3, 15], [15, 0, 8, 7]], dtype=torch.uint8)
    want = torch.tensor([[0x21, 0xF3], [0x0F, 0x78]], dtype=torch.uint8)
    check_equal(quantization.pack_int4(codes), want, "the bytes", of=f"codes: {codes.tolist()}")


@pytest.mark.parametrize("rows, n", [(1, 1), (3, 5), (2, 6), (4, 33)])
def test_pack_any_number(rows, n):
    generator = torch.Generator().manual_seed(n)
    codes = torch.randint(0, 16, (rows, n), generator=generator, dtype=torch.uint8)
    before = codes.clone()
    table = [[*row, 0] for row in codes.tolist()]
    want = [[byte(*row[i : i + 2]) for i in range(0, n, 2)] for row in table]
    of = f"codes: ({rows}, {n}) uint8"
    got = quantization.pack_int4(codes)
    check_equal(got, torch.tensor(want, dtype=torch.uint8), "the bytes", of=of)
    check_equal(codes, before, "codes after pack_int4", of=of)
    mirrored = quantization.pack_int4(codes.flip(1).flip(1).T.contiguous().T)
    check_equal(mirrored, got, "the bytes of codes with other strides", of=of)


def test_unpack_every_byte():
    packed = torch.arange(256, dtype=torch.uint8).reshape(8, 32)
    before = packed.clone()
    want = [[half for b in row for half in (b % 16, b // 16)] for row in packed.tolist()]
    of = "packed: all 256 bytes, 32 a row"
    got = quantization.unpack_int4(packed, 64)
    check_equal(got, torch.tensor(want, dtype=torch.uint8), "the codes", of=of)
    check_equal(packed, before, "packed after unpack_int4", of=of)
    short = torch.tensor([row[:63] for row in want], dtype=torch.uint8)
    check_equal(quantization.unpack_int4(packed, 63), short, "the first 63 codes", of=of)
    one = quantization.unpack_int4(torch.tensor([[0x0C]], dtype=torch.uint8), 1)
    check_equal(one, torch.tensor([[12]], dtype=torch.uint8), "the code of byte 0x0C")


def codes_of(weight) -> np.ndarray:
    """Take the codes of an Int4Weight apart, without the lab."""
    packed = weight.packed.cpu().numpy()
    halves = np.stack((packed % 16, packed // 16), axis=-1).reshape(len(packed), -1)
    return halves[:, : weight.in_features].astype(np.float64)


def spread(per_group: np.ndarray, in_features: int, group_size: int) -> np.ndarray:
    """Give every entry of a row what belongs to its group."""
    return np.repeat(per_group, group_size, axis=1)[:, :in_features]


def meaning(weight) -> np.ndarray:
    """What a quantized weight stands for, in float64."""
    if hasattr(weight, "codes"):
        return wide(weight.codes) * wide(weight.scales)[:, None]
    size = weight.in_features, weight.group_size
    return (codes_of(weight) - spread(wide(weight.zero_points), *size)) * spread(
        wide(weight.scales), *size
    )


def plain_rounding(group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each row of a group, the scale and the sum of squared errors of plain rounding.

    Where 0 lies half-way between two codes, the worse of the two zero points counts.
    """
    low, high = np.minimum(group.min(1), 0), np.maximum(group.max(1), 0)
    scale = (high - low) / 15
    step = np.where(scale == 0, 1, scale)[:, None]
    worst = np.zeros(len(group))
    for lean in (-1e-4, 1e-4):
        zero = np.round(-low[:, None] / step + lean)
        codes = np.clip(np.round(group / step) + zero, 0, 15)
        worst = np.maximum(worst, (((codes - zero) * step - group) ** 2).sum(1))
    return scale, worst


def check_groups(
    got: np.ndarray, most: np.ndarray, slack, what: str, of: str, entries: Callable[[int], str]
) -> None:
    """Hold one number of each row to not being larger than that of plain rounding.

    entries: says of a row what became of its entries.
    """
    wrong = ~(got <= most + slack)
    if wrong.any():
        row = int(wrong.argmax())
        pair = f"{got[row]:.6g}, and plain rounding has {most[row]:.6g}"
        more = f"; so it is in {int(wrong.sum())} of {len(wrong)} rows" if wrong.sum() > 1 else ""
        check_true(False, f"row {row}, {what} is {pair}; {entries(row)}{more}", of=of)


def check_int4(weight: Tensor, quantized, group_size: int, of: str) -> None:
    """Hold what `quantize_int4` gave to its contract."""
    rows, columns = weight.shape
    num_groups = -(-columns // group_size)
    size = (quantized.in_features, quantized.group_size)
    check_equal(size, (columns, group_size), "in_features and group_size", of=of)
    check_tensor(quantized.packed, (rows, -(-columns // 2)), torch.uint8, "packed", of)
    check_tensor(quantized.scales, (rows, num_groups), torch.float32, "scales", of)
    check_tensor(quantized.zero_points, (rows, num_groups), torch.uint8, "zero_points", of)
    check_codes(wide(quantized.zero_points), 0, 15, "zero points", of)
    scales = wide(quantized.scales)
    check_true(np.isfinite(scales).all(), "a scale is not finite", of=of)
    stands_for = meaning(quantized)
    difference = wide(weight) - stands_for
    for index in range(num_groups):
        here = slice(index * group_size, (index + 1) * group_size)

        def furthest(row: int, here: slice = here) -> str:
            column = here.start + int(np.abs(difference[row, here]).argmax())
            pair = f"{wide(weight)[row, column]:.6g}, and stands for {stands_for[row, column]:.6g}"
            return f"its entry {column} was {pair}"

        step, most = plain_rounding(wide(weight)[:, here])
        # A group of zeros may have any scale.
        used = np.where(step > 0, scales[:, index], 0)
        check_groups(used, step, 1e-6 * step, f"group {index}: its scale", of, furthest)
        squares = (difference[:, here] ** 2).sum(1)
        # Float32 may move each entry by a ten-thousandth of a scale.
        slack = 1e-3 * most + group_size * (1e-4 * step) ** 2
        what = f"group {index}: the sum of its squared errors"
        check_groups(squares, most, slack, what, of, furthest)
    if columns % 2:
        unused = quantized.packed[:, -1] >> 4
        check_equal(unused.tolist(), [0] * rows, "the unused half of the last bytes", of=of)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "shape, group_size",
    [((1, 1), 16), ((3, 64), 16), ((5, 37), 16), ((33, 130), 64), ((4, 96), 128), ((2, 288), 256)],
    ids=str,
)
def test_int4_is_near(shape, group_size, dtype):
    weight = random(*shape, dtype=dtype)
    before = weight.clone()
    got = quantization.quantize_int4(weight, group_size)
    check_int4(weight, got, group_size, told(shape, dtype, f", group_size {group_size}"))
    check_close(weight, before, tolerance=0.0, of="weight after quantize_int4")


def test_int4_by_hand():
    """Groups whose entries all lie on marks, so that only one way to round them is right."""
    weight = torch.zeros(3, 16)
    weight[0, :4] = torch.tensor([-4.0, 11.0, 1.0, -1.0])
    weight[1, :3] = torch.tensor([30.0, 2.0, 16.0])
    weight[2, :3] = torch.tensor([-1.5, -0.1, -0.7])
    got = quantization.quantize_int4(weight, 16)
    of = f"weight: three rows of 16 that begin with {weight[:, :4].tolist()}, group_size 16"
    check_close(got.scales, torch.tensor([[1.0], [2.0], [0.1]]), tolerance=1e-6, of=of)
    check_equal(got.zero_points.tolist(), [[4], [0], [15]], "zero points", of=of)
    want = [[0, 15, 5, 3], [15, 1, 8, 0], [0, 14, 8, 15]]
    check_equal(codes_of(got)[:, :4].astype(int).tolist(), want, "the first four codes", of=of)


@pytest.mark.parametrize("low", [-4.5, -1.5, -0.5, -13.5])
def test_int4_of_a_zero_point_between_two_codes(low):
    weight = torch.linspace(low, low + 15, 16)[None]
    got = quantization.quantize_int4(weight, 16)
    check_int4(weight, got, 16, f"weight: one group from {low} to {low + 15}, in steps of 1")


GROUPS = {
    "positive": lambda size: torch.linspace(5, 6, size),
    "negative": lambda size: torch.linspace(-0.3, -0.2, size),
    "constant": lambda size: torch.full((size,), 3.25),
    "constant and negative": lambda size: torch.full((size,), -1e-3),
    "zeros": lambda size: torch.zeros(size),
    "one outlier": lambda size: torch.cat((torch.full((size - 1,), 0.01), torch.tensor([-9.0]))),
    "tiny": lambda size: torch.linspace(-1e-30, 2e-30, size),
    "huge": lambda size: torch.linspace(-1e30, 2e30, size),
}


@pytest.mark.parametrize("name", GROUPS)
def test_int4_of_a_special_group(name):
    weight = random(3, 80)
    for start, end in ((16, 32), (64, 80)):
        weight[1, start:end] = GROUPS[name](end - start)
    got = quantization.quantize_int4(weight, 16)
    of = f"weight: (3, 80), group_size 16; groups 1 and 4 of row 1: {name}"
    check_int4(weight, got, 16, of)
    if name == "zeros":
        stands_for = torch.from_numpy(meaning(got)[1, 16:32])
        check_close(stands_for, torch.zeros(16, dtype=torch.float64), of=of)


def test_int4_of_groups_of_very_different_size():
    weight = random(2, 100) * 10.0 ** (torch.arange(100) // 32)
    for columns in (97, 99, 100):
        part = weight[:, :columns]
        of = told(part.shape, "float32, a slice", ", each group of 32 ten times the one before")
        check_int4(part, quantization.quantize_int4(part, 32), 32, of)


@settings(max_examples=40)
@given(st.integers(1, 5), st.integers(1, 100), st.sampled_from([16, 32, 64]), st.integers(0, 10**6))
def test_int4_of_any_matrix(rows, columns, group_size, seed):
    weight = random(rows, columns, seed=seed)
    got = quantization.quantize_int4(weight, group_size)
    check_int4(weight, got, group_size, told(weight.shape, weight.dtype, f", {group_size}"))


@pytest.mark.parametrize("group_size", [-32, 0, 1, 8, 33, 48, 512])
def test_int4_refuses_other_group_sizes(group_size):
    check_raises(
        ValueError, quantization.quantize_int4, random(2, 96), group_size, mentions=[group_size]
    )


def int8_weight(rows: int, columns: int, seed: int = 0, scales: Tensor | None = None):
    """Any codes with any scales, on the device of the kernels."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)
    scales = torch.rand(rows, generator=generator) + 0.01 if scales is None else scales
    return quantization.Int8Weight(codes.to(DEVICE), scales.to(DEVICE))


def int4_weight(rows: int, columns: int, group_size: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    num_groups = -(-columns // group_size)
    packed = torch.randint(0, 256, (rows, -(-columns // 2)), generator=generator)
    if columns % 2:
        packed[:, -1] %= 16
    zeros = torch.randint(0, 16, (rows, num_groups), generator=generator)
    scales = torch.rand(rows, num_groups, generator=generator) + 0.01
    parts = packed.to(torch.uint8), scales, zeros.to(torch.uint8)
    parts = (part.to(DEVICE) for part in parts)
    return quantization.Int4Weight(*parts, in_features=columns, group_size=group_size)


def of_weight(weight) -> str:
    rows, columns = weight.shape
    kind = type(weight).__name__
    size = f", group_size {weight.group_size}" if hasattr(weight, "group_size") else ""
    return f"{kind} of {rows} × {columns}{size}"


WEIGHTS = {
    "int8": lambda: int8_weight(5, 37),
    "int8, one entry": lambda: int8_weight(1, 1),
    "int4, ragged": lambda: int4_weight(5, 37, 16),
    "int4, whole groups": lambda: int4_weight(3, 64, 32),
    "int4, one short group": lambda: int4_weight(2, 7, 128),
}


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
def test_dequantize(name, dtype):
    weight = WEIGHTS[name]()
    arguments = () if dtype is None else (dtype,)
    dtype = dtype or torch.float32
    got = quantization.dequantize(weight, *arguments)
    expected = torch.from_numpy(meaning(weight)).float().to(dtype)
    tolerance = 1e-6 if dtype.itemsize >= 4 else None
    check_close(got, expected, tolerance=tolerance, of=f"{of_weight(weight)}, {dtype}")


def test_dequantize_rounds_once():
    # In half precision the scale would be 0 or infinite, and the product is neither.
    for scale in (1e-8, 1e6):
        codes = torch.tensor([[100, -3]], dtype=torch.int8)
        weight = quantization.Int8Weight(codes, torch.tensor([scale]))
        got = quantization.dequantize(weight, torch.float32)
        check_close(got, codes.float() * scale, tolerance=1e-6, of=f"one row, scale {scale}")
    small = quantization.Int8Weight(codes, torch.tensor([1e-8]))
    got = quantization.dequantize(small, torch.float16)
    check_close(got, torch.tensor([[100e-8, -3e-8]]).half(), tolerance=0.0, of="scale 1e-8")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (40, 130)], ids=str)
def test_relative_error(shape, dtype):
    weight = random(*shape, dtype=dtype)
    approximation = weight + random(*shape, seed=5, dtype=dtype) / 10
    got = quantization.relative_error(weight, approximation)
    difference = wide(weight) - wide(approximation)
    want = math.sqrt((difference**2).sum() / (wide(weight) ** 2).sum())
    check_number(got, want, "relative_error", told(shape, dtype))


def check_number(got, want: float, what: str, of: str) -> None:
    check_equal(type(got), float, f"the type of {what}", of=of)
    near = math.isclose(got, want, rel_tol=1e-4, abs_tol=1e-9)
    check_equal(want if near else got, want, what, of=of)


def test_relative_error_by_hand():
    weight = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    for approximation, want in (
        (weight, 0.0),
        (torch.zeros(2, 2), 1.0),
        (torch.tensor([[3.0, 0.0], [1.0, 4.0]]), 0.2),
        (torch.tensor([[30.0, 0.0], [0.0, 4.0]]), 5.4),
        (-weight, 2.0),
    ):
        got = quantization.relative_error(weight, approximation)
        of = f"weight: {weight.tolist()}, approximation: {approximation.tolist()}"
        check_number(got, want, "relative_error", of)


def test_relative_error_of_large_half_precision():
    weight = torch.full((8, 8), 6e4, dtype=torch.float16)
    got = quantization.relative_error(weight, -weight)
    check_number(got, 2.0, "relative_error", "weight: (8, 8) of 6e4, float16, and −weight")


@pytest.mark.parametrize("other", [(3, 1), (4,), (4, 3)], ids=str)
def test_relative_error_refuses_other_shapes(other):
    weight, approximation = torch.ones(3, 4), torch.ones(other)
    check_raises(
        ValueError,
        quantization.relative_error,
        *(weight, approximation),
        mentions=[(3, 4), other],
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tokens, vocab_size", [(2, 1), (2, 5), (9, 40)])
def test_cross_entropy(tokens, vocab_size, dtype):
    logits = random(tokens, vocab_size, dtype=dtype)
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(0, vocab_size, (tokens,), generator=generator)
    before = logits.clone(), ids.clone()
    scores = wide(logits)
    log_sums = np.log(np.exp(scores - scores.max(1, keepdims=True)).sum(1)) + scores.max(1)
    pairs = [(log_sums[t] - scores[t, ids[t + 1]]) for t in range(tokens - 1)]
    of = f"logits: ({tokens}, {vocab_size}) {dtype}, token_ids: {ids.tolist()}"
    got = quantization.cross_entropy(logits, ids)
    check_number(got, float(np.mean(pairs)), "cross_entropy", of)
    check_close(logits, before[0], tolerance=0.0, of="logits after cross_entropy")
    check_equal(ids, before[1], "token_ids after cross_entropy")


def test_cross_entropy_by_hand():
    of = "logits: equal scores for 7 tokens"
    got = quantization.cross_entropy(torch.full((4, 7), 3.0), torch.tensor([1, 0, 6, 2]))
    check_number(got, math.log(7), "cross_entropy", of)
    # Row 0 is sure of token 2, row 1 of token 1; the last row scores what nobody knows.
    logits = torch.tensor([[0.0, 0.0, 50.0], [0.0, 50.0, 0.0], [900.0, 0.0, 0.0]])
    of = f"logits: {logits.tolist()}"
    check_number(quantization.cross_entropy(logits, torch.tensor([0, 2, 1])), 0.0, "sure", of)
    got = quantization.cross_entropy(logits, torch.tensor([0, 2, 2]))
    check_number(got, 25.0, "once sure, once wrong by 50", of)


def test_cross_entropy_of_large_scores():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -2e4], [0.0, 0.0, 0.0]])
    got = quantization.cross_entropy(logits, torch.tensor([0, 1, 0]))
    want = (2e4 + math.log(2)) / 2
    check_number(got, want, "cross_entropy", f"logits: {logits.tolist()}, token_ids: [0, 1, 0]")


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_cross_entropy_refuses_too_short_a_text(num_tokens):
    ids = torch.zeros(num_tokens, dtype=torch.int64)
    check_raises(
        ValueError,
        quantization.cross_entropy,
        torch.zeros(num_tokens, 5),
        ids,
        mentions=[num_tokens],
    )


def matmul(weight):
    return quantization.int4_matmul if hasattr(weight, "packed") else quantization.int8_matmul


def check_product(x: Tensor, weight, more: str = "") -> None:
    """Hold a product against one in float64."""
    of = f"x: {tuple(x.shape)} {x.dtype}{more}; {of_weight(weight)}"
    before = x.clone()
    got = matmul(weight)(x, weight)
    expected = torch.from_numpy(wide(x) @ meaning(weight).T).to(x.dtype)
    check_close(got, expected, of=of)
    check_close(x, before, tolerance=0.0, of=f"{of}: x after the product")


# rows, in_features, out_features, group_size: one row and many, ragged and not, one and one more
# than a usual block.
PRODUCTS = [
    (1, 1, 1, 16),
    (1, 64, 32, 32),
    (3, 37, 5, 16),
    (17, 129, 33, 64),
    (1, 300, 70, 128),
    (65, 48, 19, 32),
    (2, 130, 257, 256),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, columns, features, group_size", PRODUCTS)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_matmul(kind, rows, columns, features, group_size, dtype):
    weight = (
        int8_weight(features, columns)
        if kind == "int8"
        else int4_weight(features, columns, group_size)
    )
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, columns, generator=generator)
    x[x.abs() > 2] *= 10
    check_product(x.to(DEVICE, dtype), weight)


def both_weights(columns: int, features: int = 20):
    return int8_weight(features, columns, seed=3), int4_weight(features, columns, 16, seed=3)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_matmul_of_strided_rows(kind):
    weight = both_weights(45)[kind == "int4"]
    x = torch.randn(45, 6, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    check_product(x.T, weight, ", transposed")
    large = torch.randn(8, 100, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    check_product(large[::2, 5:50], weight, ", every second row of a slice")
    check_product(large[:, 10:][:, ::2], weight, ", every second column")
    check_product(large[:1, :45].expand(5, 45), weight, ", one row expanded to five")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_matmul_adds_in_float32(kind, dtype):
    # Sums pass 65,504 and come back: whoever adds in half precision ends at infinity or far away.
    # Every entry of the matrix is a whole number, exact in each dtype.
    columns = 512
    signs = torch.ones(columns).index_fill(0, torch.arange(256, 511), -1.0)
    if kind == "int8":
        weight = int8_weight(1, 1)
        codes = (100 * signs).to(torch.int8).repeat(3, 1)
        weight = quantization.Int8Weight(codes.to(DEVICE), torch.ones(3, device=DEVICE))
    else:
        packed = byte(15, 15) * (signs[::2] > 0).int().repeat(3, 1)
        packed[:, 255] = byte(0, 15)
        groups = 3, columns // 16
        weight = quantization.Int4Weight(
            packed.to(DEVICE, torch.uint8),
            torch.full(groups, 16.0, device=DEVICE),
            torch.full(groups, 8, dtype=torch.uint8, device=DEVICE),
            in_features=columns,
            group_size=16,
        )
    x = torch.full((2, columns), 9.0, dtype=dtype, device=DEVICE)
    x[1, ::7] = -4.0
    check_product(x, weight, ", sums that grow large and come back")


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_matmul_of_rows_is_the_product_of_each(kind):
    weight = both_weights(70, 40)[kind == "int4"]
    x = torch.randn(21, 70, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    of = f"x: (21, 70) float32; {of_weight(weight)}"
    together = matmul(weight)(x, weight)
    alone = torch.cat([matmul(weight)(x[row : row + 1], weight) for row in range(21)])
    check_close(together, alone.cpu(), of=f"{of}: all rows at once against one by one")


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_matmul_is_done_by_a_kernel(kind):
    def call() -> Tensor:
        weight = both_weights(48)[kind == "int4"]
        x = torch.randn(3, 48, generator=torch.Generator().manual_seed(5)).to(DEVICE)
        return matmul(weight)(x, weight)

    check_kernel_computes(call, f"{kind}_matmul of x: (3, 48) float32 and 20 × 48")


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_matmul_refuses_another_width(kind):
    weight = both_weights(48)[kind == "int4"]
    for columns in (47, 49, 96):
        x = torch.ones(2, columns, device=DEVICE)
        check_raises(ValueError, matmul(weight), x, weight, mentions=[columns, 48])


CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}
FAMILIES = {
    "Qwen2, tied": CONFIG,
    "Qwen3, untied": CONFIG
    | {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": False, "num_hidden_layers": 3},
}


class DeepMLP(nn.Module):
    """A block whose matrices lie deeper than usual, one of them in a list."""

    def __init__(self, config):
        super().__init__()
        self.up = nn.Sequential(nn.Linear(config.hidden_size, 12), nn.Sequential(nn.Tanh()))
        self.downs = nn.ModuleList([nn.Linear(12, config.hidden_size, bias=False)])

    def forward(self, x: Tensor) -> Tensor:
        return self.downs[0](self.up(x))


def exact_values(shape, seed: int) -> Tensor:
    """A matrix that 8 bits, and 4 bits in groups of 16, hold without loss.

    Each group reaches from −7 to 8 steps, and the first entry of a row is 127 of the steps of
    its row; steps are powers of two.
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-7, 9, shape, generator=generator).float()
    values[:, ::16], values[:, 1::16] = -7.0, 8.0
    return values


def build(name: str, dtype: torch.dtype = torch.float32, mlp=None):
    model = qwen.Qwen(qwen.QwenConfig.from_dict(FAMILIES[name]), mlp)
    for seed, (module_name, module) in enumerate(model.named_modules()):
        if isinstance(module, nn.Linear) and module_name != "lm_head":
            module.weight.data = exact_values(module.weight.shape, seed) / 64
            if module.bias is not None:
                module.bias.data = random(1, len(module.bias), seed=seed)[0].clamp(-3, 3)
        elif hasattr(module, "weight"):
            noise = torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(seed))
            module.weight.data = noise if module.weight.dim() == 2 else 1 + noise / 4
    return model.to(dtype).eval().requires_grad_(False)


def linears(model) -> dict[str, nn.Linear]:
    found = model.layers.named_modules()
    return {name: module for name, module in found if isinstance(module, nn.Linear)}


IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 60, 0, 7, 8])


def hidden_states(model) -> Tensor:
    with torch.inference_mode():
        return model(IDS, torch.arange(len(IDS)), gqa.causal_attend)


@pytest.mark.parametrize("rows", [1, 40, 120])
@pytest.mark.parametrize("columns, features", [(64, 32), (37, 5), (96, 50)])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_layer_multiplies(kind, columns, features, rows):
    """The layer that is given, with weights that the lab has made."""
    weight = random(features, columns, seed=rows)
    quantized = (
        quantization.quantize_int8(weight.to(DEVICE))
        if kind == "int8"
        else quantization.quantize_int4(weight.to(DEVICE), 32)
    )
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(7))
    expected = torch.from_numpy(wide(x) @ meaning(quantized).T)
    for shape in ((rows, columns), (1, rows, columns)):
        got = quantization.QuantizedLinear(quantized)(x.reshape(shape).to(DEVICE))
        want = expected.float().reshape(*shape[:-1], features)
        # A processor without a GPU multiplies in bfloat16.
        error = float((got.cpu() - want).norm() / want.norm())
        of = f"QuantizedLinear of {of_weight(quantized)}; x: {shape} float32"
        check_equal((got.shape, got.dtype), (want.shape, want.dtype), "shape and dtype", of=of)
        text = f"the result is {error:.1%} of its norm away from x @ dequantized.T, allowed: 2 %"
        check_true(error < 0.02, text, of=of)


# Of int4 every weight below is exact; of int8 each is within half of 8/64/127.
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("name", FAMILIES)
def test_model_says_nearly_the_same(name, kind):
    model = build(name)
    expected = hidden_states(model)
    quantization.quantize_model(model, kind, 16)
    got = hidden_states(model)
    of = f"{name}; quantize_model(model, {kind!r}, 16), then 11 tokens"
    check_equal((got.shape, got.dtype), (expected.shape, expected.dtype), "shape and dtype", of=of)
    error = float((got - expected).norm() / expected.norm())
    # bfloat16, in which a processor without a GPU multiplies, and 8 bits.
    text = f"the hidden states moved by {error:.1%} of their norm, allowed: 5 %"
    check_true(error < 0.05, text, of=of)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("name", FAMILIES)
def test_model_keeps_its_matrices_and_biases(name, kind):
    model = build(name)
    before = linears(model)
    quantization.quantize_model(model, kind, 16)
    after = dict(model.layers.named_modules())
    of = f"{name}; quantize_model(model, {kind!r}, 16)"
    left = sorted(linears(model))
    check_equal(left, [], "torch.nn.Linear that are left in model.layers", of=of)
    for path, linear in before.items():
        module, here = after[path], f"{of}: {path}"
        right = isinstance(module, quantization.QuantizedLinear)
        check_true(right, f"is {type(module).__name__}, expected QuantizedLinear", of=here)
        right = type(module.weight).__name__
        check_equal(right, {"int8": "Int8Weight", "int4": "Int4Weight"}[kind], "weight", of=here)
        weight = linear.weight
        if kind == "int4":
            check_int4(weight, module.weight, 16, here)
        else:
            check_int8(weight, module.weight, here)
        if linear.bias is None:
            check_equal(module.bias, None, "bias", of=here)
        else:
            check_close(module.bias.detach(), linear.bias, tolerance=0.0, of=f"{here}.bias")


@pytest.mark.parametrize("name", FAMILIES)
def test_model_keeps_everything_else(name):
    model = build(name)
    paths = set(linears(model))
    others = {
        path: module
        for path, module in model.named_modules()
        if path.removeprefix("layers.") not in paths
    }
    values = {
        path: parameter.clone()
        for path, parameter in model.named_parameters()
        if path.removeprefix("layers.").removesuffix(".weight").removesuffix(".bias") not in paths
    }
    quantization.quantize_model(model, "int8")
    after = dict(model.named_modules())
    of = f"{name}; quantize_model(model, 'int8')"
    changed = [path for path, module in others.items() if after.get(path) is not module]
    check_equal(changed, [], "other modules that were replaced", of=of)
    for path, value in values.items():
        check_close(model.get_parameter(path).detach(), value, tolerance=0.0, of=f"{of}: {path}")
    tied = model.lm_head.weight is model.embed_tokens.weight
    check_equal(tied, "untied" not in name, "head and embedding have one weight", of=of)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_model_with_other_modules(kind):
    model = build("Qwen3, untied", mlp=lambda config, index: DeepMLP(config))
    model.layers[1].mlp = nn.Linear(40, 40)
    paths = set(linears(model))
    expected = hidden_states(model)
    quantization.quantize_model(model, kind, 16)
    of = f"a model with other feed-forward blocks; quantize_model(model, {kind!r}, 16)"
    check_equal(sorted(linears(model)), [], "torch.nn.Linear that are left in model.layers", of=of)
    found = model.layers.named_modules()
    names = {path for path, m in found if isinstance(m, quantization.QuantizedLinear)}
    check_equal(sorted(names), sorted(paths), "what is quantized", of=of)
    error = float((hidden_states(model) - expected).norm() / expected.norm())
    check_true(error < 0.05, f"the hidden states moved by {error:.1%} of their norm", of=of)


@pytest.mark.parametrize("group_size", [None, 16, 128])
def test_model_takes_a_group_size(group_size):
    model = build("Qwen2, tied")
    more = () if group_size is None else (group_size,)
    quantization.quantize_model(model, "int4", *more)
    found = [m.weight for m in model.modules() if isinstance(m, quantization.QuantizedLinear)]
    sizes = {weight.group_size for weight in found}
    check_equal(sizes, {group_size or 32}, "group sizes", of=f"quantize_model(model, int4, {more})")


def test_model_in_bfloat16():
    model = build("Qwen2, tied", torch.bfloat16)
    expected = hidden_states(model)
    quantization.quantize_model(model, "int4", 16)
    got = hidden_states(model)
    check_equal(got.dtype, torch.bfloat16, "dtype of the hidden states")
    error = float((got.float() - expected.float()).norm() / expected.float().norm())
    check_true(error < 0.1, f"the hidden states moved by {error:.1%} of their norm")


@pytest.mark.parametrize(
    "arguments, bad",
    [(("int2",), "int2"), (("int4", 48), 48), (("int4", 0), 0), (("INT8",), "INT8")],
    ids=str,
)
def test_model_refuses_what_is_not_known(arguments, bad):
    model = build("Qwen2, tied")
    before = linears(model)
    check_raises(ValueError, quantization.quantize_model, model, *arguments, mentions=[bad])
    check_equal(linears(model) == before, True, "the model is as it was", of=str(arguments))
