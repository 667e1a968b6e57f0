"""Grades week2/flash_decoding: merging splits, planning them, and decode attention in kernels."""

import contextlib
import functools
import inspect
import itertools
import math
from collections.abc import Iterator, Sequence
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from course.grading import check_close, check_equal, check_raises, check_true, lab
from course.launches import (
    DEVICE,
    DTYPES,
    check_kernel_computes,
    count_programs,
    counted_reads,
    observed,
    reading_programs,
    without_waiting,
)

fd = lab("week2/flash_decoding")
kv = lab("week2/kv_cache")
qwen = lab("week1/qwen")

HALVES = DTYPES[1:]
# Finite and much larger than what is real, in the range of float16.
GARBAGE = 3e4
NAN = math.nan


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Signed values with a few outliers, which other orders of axes would put elsewhere."""
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape))
    values = torch.randn(shape, generator=generator)
    values[values.abs() > 2] *= 5
    return values.to(dtype)


@contextlib.contextmanager
def unwritten_memory_is_nan() -> Iterator[None]:
    """Let memory that nobody has written hold NaN, where it often happens to hold zeros."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def split_attention(scores: Tensor, values: Tensor, cuts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Attend to each split alone, in float64; what stands in for an empty one is NaN and −inf.

    scores: (..., num_keys). values: (..., num_keys, head_dim). cuts: where splits begin and end.
    Returns (num_splits, ..., head_dim) and (num_splits, ...), float32.
    """
    outs, lses = [], []
    for start, end in itertools.pairwise(cuts):
        part = scores[..., start:end].double()
        weights = part.softmax(-1).unsqueeze(-2)
        out = (weights @ values[..., start:end, :].double()).squeeze(-2)
        outs.append(out if end > start else torch.full_like(out, NAN))
        lses.append(part.logsumexp(-1))
    return torch.stack(outs).float(), torch.stack(lses).float()


def check_merged(scores: Tensor, values: Tensor, cuts: Sequence[int], of: str = "") -> None:
    """Merge splits of known keys; hold the result against all keys at once."""
    outs, lses = split_attention(scores, values, cuts)
    (out,), (lse,) = split_attention(scores, values, (0, scores.shape[-1]))
    lengths = [end - start for start, end in itertools.pairwise(cuts)]
    what = f"merge_splits(outs: {tuple(outs.shape)}, lses: {tuple(lses.shape)}), of splits with "
    what += f"{lengths if len(lengths) < 9 else 'many, and some no,'} keys{of}"
    got = fd.merge_splits(outs, lses)
    check_close(got[0], out, dtype=torch.float32, of=f"{what}\nout")
    check_close(got[1], lse, dtype=torch.float32, of=f"{what}\nlse")


CUTS = {
    "one split": (0, 9),
    "two equal splits": (0, 8, 16),
    "one key beside many": (0, 1, 200),
    "many keys, then one": (0, 150, 151),
    "an empty split": (0, 4, 4, 11),
    "an empty split first": (0, 0, 7),
    "empty splits behind": (0, 5, 5, 5, 5),
    "a key a split": tuple(range(14)),
    "40 splits": (*range(0, 60, 2), *range(60, 70)),
}


@pytest.mark.parametrize("case", CUTS)
@pytest.mark.parametrize("shape", [(), (3,), (2, 5)], ids=str)
def test_merge_matches_all_keys_at_once(shape, case):
    cuts = CUTS[case]
    scores, values = random(*shape, cuts[-1]), random(*shape, cuts[-1], 6, seed=1)
    check_merged(scores, values, cuts)


def test_merge_of_one_key_each():
    outs = torch.tensor([[[10.0, 0.0]], [[0.0, 6.0]], [[2.0, 2.0]]])
    lses = torch.tensor([[math.log(3.0)], [math.log(1.0)], [-math.inf]])
    out, lse = fd.merge_splits(outs, lses)
    of = "merge_splits of three splits whose exp(score) sum to 3, 1 and 0"
    check_close(out, torch.tensor([[7.5, 1.5]]), of=f"{of}\nout")
    check_close(lse, torch.tensor([math.log(4.0)]), of=f"{of}\nlse")


@pytest.mark.parametrize("offset", [1e4, -1e4, 60.0, -200.0])
def test_merge_of_large_scores(offset):
    outs, lses = random(5, 4, 6) * 100, random(5, 4, seed=1) + offset
    weights = lses.double().softmax(0).unsqueeze(-1)
    out, lse = fd.merge_splits(outs, lses)
    of = f"merge_splits of 5 splits whose lses are all near {offset:g}"
    expected = (weights * outs.double()).sum(0)
    check_close(out, expected, dtype=torch.float32, of=f"{of}\nout")
    check_close(lse, lses.double().logsumexp(0), dtype=torch.float32, of=f"{of}\nlse")


def test_merge_of_queries_far_apart():
    outs, lses = random(5, 4, 6), random(5, 4, seed=1) + torch.tensor([0.0, 500.0, -3000.0, 8e3])
    weights = lses.double().softmax(0).unsqueeze(-1)
    out, lse = fd.merge_splits(outs, lses)
    of = "merge_splits of 5 splits; the lses of 4 queries are near 0, 500, -3,000 and 8,000"
    expected = (weights * outs.double()).sum(0)
    check_close(out, expected, dtype=torch.float32, of=f"{of}\nout")
    check_close(lse, lses.double().logsumexp(0), dtype=torch.float32, of=f"{of}\nlse")


@pytest.mark.parametrize("lses", [(1e4, -1e4), (-3e38, 3e38), (-1e4, -2e4, 5e3), (0.0, 80.0)])
def test_merge_of_scores_far_apart(lses):
    outs = random(len(lses), 1, 6)
    out, lse = fd.merge_splits(outs, torch.tensor(lses)[:, None])
    of = f"merge_splits of splits with the lses {lses}, of which one is all that counts"
    best = max(range(len(lses)), key=lses.__getitem__)
    check_close(out, outs[best], of=f"{of}\nout")
    check_close(lse, torch.tensor([lses[best]]), of=f"{of}\nlse")


@pytest.mark.parametrize("garbage", [NAN, math.inf, 1e30, 0.0])
def test_merge_ignores_what_an_empty_split_holds(garbage):
    outs, lses = random(4, 3, 6), random(4, 3, seed=1)
    empty = torch.tensor([[1, 0, 0], [0, 0, 1], [0, 1, 1], [0, 1, 1]], dtype=torch.bool)
    lses[empty], outs[empty] = -math.inf, garbage
    weights = lses.double().softmax(0).unsqueeze(-1)
    expected = (weights * outs.double().masked_fill(empty.unsqueeze(-1), 0.0)).sum(0)
    out, lse = fd.merge_splits(outs, lses)
    of = f"merge_splits of 4 splits; every query has some without keys, whose outs are {garbage}"
    check_close(out, expected, dtype=torch.float32, of=f"{of}\nout")
    check_close(lse, lses.double().logsumexp(0), dtype=torch.float32, of=f"{of}\nlse")


@pytest.mark.parametrize("num_splits", [1, 3])
def test_merge_where_no_split_has_keys(num_splits):
    outs, lses = random(num_splits, 3, 6), random(num_splits, 3, seed=1)
    outs[:, 1], lses[:, 1] = NAN, -math.inf
    out, lse = fd.merge_splits(outs, lses)
    of = f"merge_splits of {num_splits} splits; the query in the middle has no keys in any"
    check_close(out[1], torch.zeros(6), of=f"{of}\nits out")
    check_close(lse[1], torch.tensor(-math.inf), of=f"{of}\nits lse")
    weights = lses[:, ::2].double().softmax(0).unsqueeze(-1)
    expected = (weights * outs[:, ::2].double()).sum(0)
    check_close(out[::2], expected, dtype=torch.float32, of=f"{of}\nout of the two others")


def test_merge_of_what_was_merged():
    cuts = (0, 3, 10, 10, 14, 20, 20, 31)
    scores, values = random(2, 31) * 4, random(2, 31, 6, seed=1)
    outs, lses = split_attention(scores, values, cuts)
    (out,), (lse,) = split_attention(scores, values, (0, 31))
    parts = slice(0, 3), slice(3, 6), slice(6, 7)
    pairs = [fd.merge_splits(outs[part], lses[part]) for part in parts]
    got = fd.merge_splits(*(torch.stack(part) for part in zip(*pairs, strict=True)))
    of = "merge_splits of three results of merge_splits"
    check_close(got[0], out, dtype=torch.float32, of=f"{of}\nout")
    check_close(got[1], lse, dtype=torch.float32, of=f"{of}\nlse")


@settings(max_examples=40)
@given(st.data())
def test_merge_of_any_splits(data):
    num_keys = data.draw(st.integers(1, 40))
    inside = data.draw(st.lists(st.integers(0, num_keys), max_size=6))
    scale = data.draw(st.sampled_from([0.1, 3.0, 300.0]))
    scores = random(2, num_keys, seed=data.draw(st.integers(0, 9))) * scale
    check_merged(scores, random(2, num_keys, 3, seed=1), (0, *sorted(inside), num_keys))


def test_merge_leaves_its_arguments_alone():
    outs, lses = random(6, 3, 4).permute(2, 1, 0), random(3, 4, seed=1).t()
    lses[2, 1] = -math.inf
    before = outs.clone(), lses.clone()
    got = fd.merge_splits(outs, lses)
    of = "merge_splits of outs and lses whose axes are permuted"
    check_close(outs, before[0], tolerance=0.0, of=f"{of}\nouts after the call")
    check_close(lses, before[1], tolerance=0.0, of=f"{of}\nlses after the call")
    for name, part, whole in zip(("out", "lse"), got, fd.merge_splits(*before), strict=True):
        check_close(part, whole, of=f"{of}\n{name}")


def expected_splits(num_programs: int, capacity: int, num_processors: int) -> int:
    """Find the number of splits by trying."""
    wanted = next(n for n in itertools.count(1) if num_programs * n >= 2 * num_processors)
    longest = max((n for n in range(1, capacity + 1) if capacity / n >= 256), default=1)
    return min(wanted, longest)


PLANS = [
    (8, 8192, 132),
    (8, 40_960, 132),
    (256, 8192, 132),
    (264, 8192, 132),
    (263, 8192, 132),
    (1, 8192, 132),
    (1, 511, 132),
    (1, 512, 132),
    (3, 513, 7),
    (2, 255, 108),
    (1, 1, 1),
    (4, 100_000, 1),
    (100, 100_000, 108),
    (72, 2560, 108),
    (2, 2304, 9),
    (2, 2303, 9),
]


@pytest.mark.parametrize("case", PLANS, ids=str)
def test_plan_fills_the_processors(case):
    got = fd.plan_splits(*case)
    of = "plan_splits(num_programs={}, capacity={}, num_processors={})".format(*case)
    check_equal(type(got), int, "the type of the result", of=of)
    check_equal(got, expected_splits(*case), "splits", of=of)


@given(st.integers(1, 600), st.integers(1, 20_000), st.integers(1, 150))
def test_plan_of_any_shape(num_programs, capacity, num_processors):
    case = num_programs, capacity, num_processors
    of = "plan_splits(num_programs={}, capacity={}, num_processors={})".format(*case)
    check_equal(fd.plan_splits(*case), expected_splits(*case), "splits", of=of)


def attend_in_float64(q: Tensor, keys: Tensor, values: Tensor, num_tokens: Sequence[int]) -> Tensor:
    """Let one token of each row look at its own row, row by row, by torch in float64."""
    group = q.shape[1] // keys.shape[1]
    rows = []
    for row, length in enumerate(num_tokens):
        k, v = (
            part[row, :, :length].cpu().double().repeat_interleave(group, 0)
            for part in (keys, values)
        )
        rows.append(scaled_dot_product_attention(q[row, :, None].cpu().double(), k, v)[:, 0])
    return torch.stack(rows)


def spoil(keys: Tensor, values: Tensor, num_tokens: Sequence[int], garbage: float) -> None:
    """Write garbage of both signs behind every row's tokens."""
    for part, sign in ((keys, 1.0), (values, -1.0)):
        for row, length in enumerate(num_tokens):
            part[row, :, length:] = part[row, :, length:].sign() * garbage * sign


def inputs(heads, num_tokens, capacity, head_dim, dtype=torch.float32, seed=0, garbage=GARBAGE):
    """Draw q, keys and values of heads = (num_heads, num_kv_heads)."""
    num_rows, (num_heads, num_kv_heads) = len(num_tokens), heads
    q = random(num_rows, num_heads, head_dim, seed=seed)
    size = (num_rows, num_kv_heads, capacity, head_dim)
    keys, values = random(*size, seed=seed + 1), random(*size, seed=seed + 2)
    spoil(keys, values, num_tokens, garbage)
    return tuple(part.to(DEVICE, dtype) for part in (q, keys, values))


def lengths(num_tokens: Sequence[int]) -> Tensor:
    return torch.tensor(num_tokens, device=DEVICE)


def of_decode(q: Tensor, keys: Tensor, num_tokens: Sequence[int], num_splits: int | None) -> str:
    """Put a call into words."""
    dtype = str(q.dtype).removeprefix("torch.")
    shapes = f"q: {tuple(q.shape)} {dtype}, keys and values: {tuple(keys.shape)}"
    return f"flash_decode({shapes}, num_tokens: {list(num_tokens)}, num_splits: {num_splits})"


def check_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    num_tokens: Sequence[int],
    num_splits: int | None,
    note: str = f"behind a row's tokens lie values of ±{GARBAGE:,.0f}",
    tolerance: float | None = None,
) -> None:
    """Decode, and hold the result against the oracle; note: what is special."""
    expected = attend_in_float64(q, keys, values, num_tokens)
    num_tokens_there = lengths(num_tokens)
    with unwritten_memory_is_nan():
        got = fd.flash_decode(q, keys, values, num_tokens_there, num_splits)
    of = f"{of_decode(q, keys, num_tokens, num_splits)}; {note}"
    check_close(got, expected, dtype=q.dtype, tolerance=tolerance, of=of)
    check_equal(got.device.type, DEVICE, "where the result lies", of=of)


HEADS = [(1, 1), (3, 3), (4, 1), (6, 2), (7, 1), (14, 2), (20, 1)]


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(
    "num_tokens, capacity, num_splits",
    [((4, 1, 11), 16, 1), ((1,), 1, 1), ((130, 1, 67), 131, 2), ((1, 1), 40, 3)],
)
def test_decode_matches_torch(num_tokens, capacity, num_splits, heads):
    check_decode(*inputs(heads, num_tokens, capacity, 10), num_tokens, num_splits)


@pytest.mark.parametrize("num_splits", [None, 1, 2, 3, 4, 7, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_in_any_number_of_splits(dtype, num_splits):
    num_tokens = (300, 1, 65)
    check_decode(*inputs((2, 1), num_tokens, 301, 16, dtype), num_tokens, num_splits)


@pytest.mark.parametrize("slope", [0.01, -0.01])
def test_decode_in_many_splits_that_all_have_tokens(slope):
    num_tokens = (1, 1280)
    q, keys, values = inputs((2, 1), num_tokens, 1290, 16)
    # The first number of every query is 4, which is what 16 ** -0.5 takes away.
    q[:, :, 0], keys[..., 0] = 4.0, slope * torch.arange(1290, device=DEVICE)
    q[:, :, 1:] *= 0.2
    note = f"scores {'rise' if slope > 0 else 'fall'} from token to token"
    check_decode(q, keys, values, num_tokens, 40, note)


@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_with_the_heads_of_real_models(dtype, head_dim, group):
    num_tokens = (1, 150)
    check_decode(*inputs((2 * group, 2), num_tokens, 150, head_dim, dtype), num_tokens, 2)


@pytest.mark.parametrize("num_tokens", [31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257])
def test_decode_around_the_sizes_of_blocks(num_tokens):
    check_decode(*inputs((2, 1), [num_tokens], 260, 8), [num_tokens], 2)


def test_decode_of_many_rows():
    num_tokens = [1 + (7 * row) % 9 for row in range(20)]
    check_decode(*inputs((2, 1), num_tokens, 9, 4), num_tokens, 2)


@settings(max_examples=15)
@given(st.data())
def test_decode_of_any_rows(data):
    heads = data.draw(st.sampled_from(HEADS[:-1]))
    capacity, head_dim = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 20))
    num_tokens = data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=3))
    num_splits = data.draw(st.integers(1, 5))
    arguments = inputs(heads, num_tokens, capacity, head_dim, seed=data.draw(st.integers(0, 9)))
    check_decode(*arguments, num_tokens, num_splits)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_decode_of_views_into_a_larger_cache(num_splits):
    num_tokens = (5, 90, 1)
    q, keys, values = inputs((6, 2), num_tokens, 93, 8)
    whole = torch.full((3, 2, 6, 2, 110, 8), GARBAGE, device=DEVICE)
    views = whole[1, 0, 2:5, :, :93], whole[1, 1, 2:5, :, :93]
    for view, part in zip(views, (keys, values), strict=True):
        view.copy_(part)
    note = "the keys and values are rows and tokens of a larger cache"
    check_decode(q, *views, num_tokens, num_splits, note)


ORDERS = {"tokens before heads": (0, 2, 1, 3), "tokens last": (0, 1, 3, 2), "all": (3, 2, 1, 0)}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_splits", [1, 2])
def test_decode_of_axes_in_other_orders(num_splits, order):
    num_tokens = (40, 3)
    q, keys, values = inputs((6, 2), num_tokens, 45, 8)
    axes = ORDERS[order]
    back = sorted(range(4), key=axes.__getitem__)
    keys = keys.permute(axes).contiguous().permute(back)
    note = f"the axes of the keys lie in memory as {axes}, those of q backwards"
    q = q.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    check_decode(q, keys, values, num_tokens, num_splits, note)
    swapped = values.permute(axes).contiguous().permute(back)
    note = f"the axes of the values lie in memory as {axes}"
    check_decode(q, keys.contiguous(), swapped, num_tokens, num_splits, note)


def test_decode_of_parts_of_larger_tensors():
    num_tokens = (40, 3, 17)
    q, keys, values = inputs((4, 2), num_tokens, 45, 8)
    wide_q = torch.full((3, 9, 16), NAN, device=DEVICE)[:, 1::2, ::2]
    wide_q.copy_(q)
    expected = attend_in_float64(q, keys, values, num_tokens)
    wide_lengths = lengths([40, 45, 3, 1, 17, 2])[::2]
    got = fd.flash_decode(wide_q, keys, values, wide_lengths, 2)
    note = "q and num_tokens are every second element of larger tensors"
    of = f"{of_decode(q, keys, num_tokens, 2)}; {note}"
    check_close(got, expected, dtype=torch.float32, of=of)


def test_decode_of_a_cache_of_more_than_two_to_the_31_numbers():
    # Only what is touched becomes real memory, so that this is cheap on a CPU.
    whole = torch.empty(2**31 + 2**20, dtype=torch.float16, device=DEVICE)
    num_tokens = (9, 5, 12)
    q, keys, values = inputs((2, 1), num_tokens, 12, 8, torch.float16)
    strides = 2**30, 12 * 8, 8, 1
    views = [whole[start:].as_strided(keys.shape, strides) for start in (0, 2**19)]
    for view, part in zip(views, (keys, values), strict=True):
        view.copy_(part)
    note = "keys and values lie in a cache in which row 2 begins behind 2**31 numbers"
    check_decode(q, *views, num_tokens, 2, note)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_splits", [1, 3])
def test_decode_of_large_scores(num_splits, dtype):
    num_tokens = (70, 3, 140)
    q, keys, values = inputs((4, 2), num_tokens, 140, 16, seed=3)
    q, keys, values = (part.to(dtype) for part in (q * 80, keys * 80, values * 10))
    check_decode(q, keys, values, num_tokens, num_splits, "scores are beyond ±10,000")


@pytest.mark.parametrize("direction", ["rising", "falling", "all far below zero"])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_decode_of_scores(num_splits, direction):
    num_tokens = (260, 97)
    q, keys, values = inputs((2, 1), num_tokens, 260, 16)
    slope = {"rising": 0.1, "falling": -0.1}.get(direction, 0.0)
    offset = -110.0 if direction == "all far below zero" else 0.0
    # The first number of every query is 4, which is what 16 ** -0.5 takes away.
    q[:, :, 0] = 4.0
    keys[..., 0] = slope * torch.arange(260, device=DEVICE) + offset
    q[:, :, 1:] *= 0.2
    spoil(keys, values, num_tokens, GARBAGE)
    # Near 110, float32 numbers are 8e-6 apart: so much a rounded score changes its weight.
    check_decode(q, keys, values, num_tokens, num_splits, f"scores are {direction}", 1e-4)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("num_splits", [1, 3])
def test_decode_keeps_scores_in_float32(num_splits, dtype):
    num_tokens = (150,)
    q, keys, values = inputs((2, 1), num_tokens, 150, 16)
    q, keys = torch.zeros_like(q), torch.zeros_like(keys)
    q[..., 0], keys[..., 0] = 80.0, 100.0
    q[..., 1], keys[..., 1] = 1.0, 8 * random(150, seed=5).clamp(-2, 2).to(DEVICE)
    arguments = (part.to(dtype) for part in (q, keys, values))
    note = "all scores are near 2,000, and differ by less than 10"
    check_decode(*arguments, num_tokens, num_splits, note)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("num_splits", [1, 2, 3])
def test_decode_keeps_sums_in_float32(num_splits, dtype):
    num_tokens, eps = (210,), torch.finfo(dtype).eps
    values = torch.full((1, 1, 210, 8), 512.0)
    # Whatever is rounded to half on the way is larger than what is left at the end.
    values[:, :, ::3] *= 1 + 2 * eps
    values[:, :, 105:] *= -1
    values[:, :, 104] *= 1 + 64 * eps
    keys = random(1, 1, 210, 8)
    q, keys, values = (p.to(DEVICE, dtype) for p in (torch.zeros(1, 2, 8), keys, values))
    note = "all scores are 0, and values near 512 and -512 cancel"
    check_decode(q, keys, values, num_tokens, num_splits, note)


@pytest.mark.parametrize("garbage", [NAN, math.inf], ids=str)
@pytest.mark.parametrize("num_splits", [1, 3, 9])
def test_decode_reads_nothing_behind_the_tokens(num_splits, garbage):
    num_tokens = (1, 100, 33)
    arguments = inputs((4, 2), num_tokens, 110, 8, garbage=garbage)
    note = f"behind a row's tokens lies {garbage}"
    check_decode(*arguments, num_tokens, num_splits, note)


def test_decode_of_rows_as_long_as_the_cache():
    num_tokens = (77, 77)
    q, keys, values = inputs((4, 2), num_tokens, 77, 8)
    alone = keys.clone(), values.clone()
    check_decode(q, *alone, num_tokens, 3, "there is nothing behind the tokens")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(7, 1), (8, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("num_splits", [1, 3])
def test_decode_reads_keys_and_values_once(num_splits, heads, dtype):
    num_tokens = (70, 1, 140)
    q, keys, values = inputs(heads, num_tokens, 150, 10, dtype)
    keys, values = keys[:, :, :141], values[:, :, :141]
    with counted_reads(keys) as key_reads, counted_reads(values) as value_reads:
        check_decode(q, keys, values, num_tokens, num_splits)
    if DEVICE == "cuda":
        return  # only the interpreter sees what is read
    of = of_decode(q, keys, num_tokens, num_splits)
    for name, reads in (("key", key_reads), ("value", value_reads)):
        for row, length in enumerate(num_tokens):
            here, behind = reads[row, :, :length], reads[row, :, length:]
            counts = sorted(set(here.flatten().tolist()))
            what = f"how often kernels read the numbers of each {name} of row {row}"
            check_equal(counts, [1], what, of=of)
            check_equal(int(behind.sum()), 0, f"reads of {name}s behind row {row}'s tokens", of=of)


@pytest.mark.parametrize("num_splits", [None, 1, 3])
def test_decode_is_computed_by_kernels(num_splits):
    num_tokens = (40, 3)

    def call() -> Tensor:
        arguments = inputs((4, 2), num_tokens, 45, 8)
        return fd.flash_decode(*arguments, lengths(num_tokens), num_splits)

    of = f"flash_decode of rows of {list(num_tokens)} tokens, num_splits: {num_splits}"
    check_kernel_computes(call, of, num_launches=2)


@pytest.mark.skipif(DEVICE == "cuda", reason="only the interpreter sees what is read")
def test_decode_cuts_the_tokens_that_each_row_has():
    num_tokens, num_splits = (600, 4096), 4
    q, keys, values = inputs((2, 1), num_tokens, 4096, 8)
    with reading_programs(keys) as programs:
        check_decode(q, keys, values, num_tokens, num_splits)
    count = len(set(programs[0, 0, :600, 0].tolist()))
    what = f"so many of row 0's 4 splits read its 600 tokens: {count}"
    check_true(count > 1, what, of=of_decode(q, keys, num_tokens, num_splits))


@pytest.mark.parametrize("num_splits", [1, 3, 8])
def test_decode_has_a_program_for_each_split(num_splits):
    num_tokens = (90, 3)
    arguments = *inputs((4, 2), num_tokens, 90, 8), lengths(num_tokens)
    count = count_programs(lambda: fd.flash_decode(*arguments, num_splits))
    of = of_decode(arguments[0], arguments[1], num_tokens, num_splits)
    least = 2 * 2 * num_splits
    what = f"{count} programs run for 2 rows, 2 key/value heads and {num_splits} splits"
    check_true(count >= least, f"{what}; each has one of its own: {least}", of=of)


def test_decode_launches_as_much_for_any_split():
    num_tokens = (90, 3)
    q, keys, values = inputs((2, 1), num_tokens, 90, 8)
    for num_splits in (1, 2, 5, 40):
        with observed() as names:
            check_decode(q, keys, values, num_tokens, num_splits)
        what = f"{len(names)} kernels are launched, at most 2 are allowed"
        check_true(len(names) <= 2, what, of=of_decode(q, keys, num_tokens, num_splits))


@pytest.mark.parametrize("num_splits", [None, 1, 3])
def test_decode_does_not_wait_for_the_device(num_splits):
    # So many rows that the suite itself does not look into num_tokens to show it.
    num_tokens = (90, *range(1, 10))
    arguments = *inputs((4, 2), num_tokens, 90, 8), lengths(num_tokens)
    check_decode(*arguments[:3], num_tokens, num_splits)  # compiles on a GPU
    with without_waiting():
        got = fd.flash_decode(*arguments, num_splits)
    of = of_decode(arguments[0], arguments[1], num_tokens, num_splits)
    check_equal(tuple(got.shape), (10, 4, 8), "the shape of the result", of=of)


def test_decode_lets_the_plan_choose():
    num_tokens, asked = (70, 3, 64), []

    def plan_splits(num_programs: int, capacity: int, num_processors: int) -> int:
        asked.append((num_programs, capacity))
        return 3

    arguments = inputs((4, 2), num_tokens, 85, 8)
    namespace = inspect.unwrap(fd.flash_decode).__globals__
    with patch.dict(namespace, {"plan_splits": plan_splits}):
        check_decode(*arguments, num_tokens, None)
    of = of_decode(arguments[0], arguments[1], num_tokens, None)
    check_equal(asked, [(6, 85)], "(num_programs, capacity) of the calls of plan_splits", of=of)


def test_decode_leaves_its_arguments_alone():
    arguments = (*inputs((6, 2), (4, 1, 90), 93, 8), lengths([4, 1, 90]))
    before = [argument.clone() for argument in arguments]
    fd.flash_decode(*arguments, 2)
    for name, got, want in zip(("q", "keys", "values"), arguments, before, strict=False):
        check_close(got, want, tolerance=0.0, of=f"{name} after flash_decode")
    check_equal(arguments[-1], before[-1], "num_tokens after the call")


@pytest.mark.parametrize("heads", [(6, 4), (7, 2), (2, 3)], ids=str)
def test_decode_refuses_heads_that_do_not_divide(heads):
    q, keys, values = inputs(heads, (4, 1), 8, 8)
    check_raises(ValueError, fd.flash_decode, q, keys, values, lengths([4, 1]), mentions=heads)


@pytest.mark.parametrize("num_splits", [0, -3])
def test_decode_refuses_to_make_no_split(num_splits):
    arguments = *inputs((4, 2), (4, 1), 8, 8), lengths([4, 1])
    check_raises(ValueError, fd.flash_decode, *arguments, num_splits, mentions=[num_splits])


def test_decode_does_what_the_engine_asks_for():
    num_tokens = (40, 3)
    arguments = *inputs((4, 2), num_tokens, 45, 8), lengths(num_tokens)
    by_kernel = fd.flash_decode(*arguments)
    check_close(fd.decode(*arguments), by_kernel, of="decode beside flash_decode")


def tiny_model():
    """A Qwen3 of random weights, in which 6 query heads share 2 key/value heads."""
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 61,
        "hidden_size": 30,
        "intermediate_size": 50,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 14,
        "max_position_embeddings": 128,
    }
    torch.manual_seed(0)
    return qwen.Qwen(qwen.QwenConfig.from_dict(config)).eval().to(DEVICE)


STEPS = [{0: 70, 1: 3, 3: 1}, {0: 1, 1: 1, 3: 1}, {3: 1, 0: 1}, {1: 4, 0: 1}, {2: 1, 1: 1}]


def test_extend_with_the_kernel_gives_the_same_scores():
    fd.flash_decode(*inputs((4, 2), (2,), 2, 8), lengths([2]))
    model = tiny_model()
    with_kernel = functools.partial(kv.cached_attend, decode=fd.flash_decode)
    caches = [kv.cache_for(model, num_rows=4) for _ in range(2)]
    for step, counts in enumerate(STEPS):
        new_tokens = {
            row: [(7 * i + row + step) % 61 for i in range(count)] for row, count in counts.items()
        }
        expected = kv.extend(model, caches[0], new_tokens)
        got = kv.extend(model, caches[1], new_tokens, with_kernel)
        of = f"extend with flash_decode in the place of decode_attention, step {step} of {STEPS}"
        check_close(got, expected, of=of)
