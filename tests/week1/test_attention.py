"""Grades week1/attention: softmax, the causal mask, attention, and the heads' layout."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from course.grading import check_close, check_equal, check_raises, check_true, lab

attention_lab = lab("week1/attention")
sdpa = torch.nn.functional.scaled_dot_product_attention

# (leading shape, num_queries, num_keys, head_dim): ragged, size 1, more keys than queries.
SHAPES = [((3, 4), 11, 11, 24), ((2,), 5, 13, 80), ((), 1, 7, 64), ((2, 1), 1, 1, 1)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def random(*shape: int, seed: int = 0, scale: float = 1.0, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def qkv(leading, num_queries, num_keys, head_dim, dtype=torch.float32, scale=1.0):
    q = random(*leading, num_queries, head_dim, seed=1, scale=scale, dtype=dtype)
    k = random(*leading, num_keys, head_dim, seed=2, scale=scale, dtype=dtype)
    v = random(*leading, num_keys, head_dim + 3, seed=3, dtype=dtype)
    return q, k, v


def oracle_softmax(x: torch.Tensor, dim: int) -> torch.Tensor:
    values = x.double().numpy()
    with np.errstate(invalid="ignore"):
        weights = np.exp(values - values.max(axis=dim, keepdims=True))
    return torch.from_numpy(weights / weights.sum(axis=dim, keepdims=True))


def oracle_attention(q, k, v, mask=None, scale=None) -> torch.Tensor:
    """torch's own attention in float64."""
    return sdpa(q.double(), k.double(), v.double(), attn_mask=mask, scale=scale)


# A result that was computed in float32 and rounded once is off by half a step at the most.
ONE_ROUNDING = {torch.float16: 1.02 * 2**-11, torch.bfloat16: 1.02 * 2**-8}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 3, 33), (4, 1), (40, 50)], ids=str)
def test_softmax_matches_float64(shape, dtype):
    x = random(*shape, scale=3.0, dtype=dtype)
    expected = oracle_softmax(x, -1)
    tolerance = ONE_ROUNDING.get(dtype)
    check_close(attention_lab.softmax(x), expected, dtype=dtype, tolerance=tolerance)


@pytest.mark.parametrize("dim", [0, 1, 2, -2])
def test_softmax_along_any_axis(dim):
    x = random(3, 4, 5, scale=2.0)
    expected = oracle_softmax(x, dim)
    check_close(attention_lab.softmax(x, dim), expected, dtype=torch.float32)


@pytest.mark.parametrize("shift", [1e4, -1e4, 3e38], ids=lambda shift: f"shift={shift:g}")
def test_softmax_of_large_scores(shift):
    x = random(3, 9) + 0.0
    x = x * (abs(shift) / 100) + shift if abs(shift) < 1e30 else torch.full((3, 9), shift)
    expected = oracle_softmax(x, -1)
    check_close(attention_lab.softmax(x), expected, dtype=torch.float32)


def test_softmax_of_large_float16_scores():
    x = random(4, 16, scale=20_000.0, dtype=torch.float16)
    expected = oracle_softmax(x, -1)
    check_close(attention_lab.softmax(x), expected, dtype=torch.float16)


def test_softmax_leaves_its_input_alone():
    x = random(3, 5)
    before = x.clone()
    attention_lab.softmax(x)
    check_close(x, before, tolerance=0.0, of="x after softmax(x: (3, 5) float32)")


def test_softmax_gives_forbidden_scores_no_weight():
    x = random(4, 6)
    x[0, 2:] = -math.inf
    x[1, :-1] = -math.inf
    expected = oracle_softmax(x, -1)
    check_close(attention_lab.softmax(x), expected, dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax_of_nothing_but_forbidden_scores_is_zero(dtype):
    x = random(3, 6, dtype=dtype)
    x[1] = -math.inf
    expected = oracle_softmax(x, -1)
    expected[1] = 0.0
    check_close(attention_lab.softmax(x), expected, dtype=dtype)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40))
def test_softmax_does_not_care_about_a_common_shift(scores):
    x = torch.tensor(scores)
    expected = oracle_softmax(x, -1)
    weights = attention_lab.softmax(x)
    check_close(weights, expected, dtype=torch.float32)
    check_true(abs(float(weights.double().sum()) - 1.0) < 1e-5, "the weights do not sum to one")


@pytest.mark.parametrize("num_queries, num_keys", [(1, 1), (4, 4), (1, 9), (3, 7), (6, 7), (0, 4)])
def test_causal_mask_by_hand(num_queries, num_keys):
    rows = [
        [key <= num_keys - num_queries + query for key in range(num_keys)]
        for query in range(num_queries)
    ]
    expected = torch.tensor(rows, dtype=torch.bool).reshape(num_queries, num_keys)
    check_equal(attention_lab.causal_mask(num_queries, num_keys), expected, "the mask")


@pytest.mark.parametrize("num_queries, num_keys", [(5, 4), (1, 0), (-1, 3)])
def test_causal_mask_refuses_impossible_sizes(num_queries, num_keys):
    check_raises(
        ValueError,
        attention_lab.causal_mask,
        num_queries,
        num_keys,
        mentions=(num_queries, num_keys),
    )


def test_causal_mask_is_made_where_it_is_asked_for():
    mask = attention_lab.causal_mask(3, 5, device="meta")
    check_equal(mask.device.type, "meta", "the mask's device")


def test_causal_mask_is_made_on_the_default_device():
    with torch.device("meta"):
        mask = attention_lab.causal_mask(3, 5)
    of = "causal_mask(3, 5), while the default device is meta"
    check_equal(mask.device.type, "meta", "the mask's device", of=of)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("leading, num_queries, num_keys, head_dim", SHAPES)
def test_attention_matches_torch(leading, num_queries, num_keys, head_dim, dtype):
    q, k, v = qkv(leading, num_queries, num_keys, head_dim, dtype)
    expected = oracle_attention(q, k, v)
    check_close(attention_lab.attention(q, k, v), expected, dtype=dtype)


@pytest.mark.parametrize("leading, num_queries, num_keys, head_dim", SHAPES)
def test_attention_with_a_staircase_mask(leading, num_queries, num_keys, head_dim):
    q, k, v = qkv(leading, num_queries, num_keys, head_dim)
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
    expected = oracle_attention(q, k, v, mask)
    check_close(attention_lab.attention(q, k, v, mask), expected, dtype=torch.float32)


def test_attention_with_a_mask_for_each_sequence():
    q, k, v = qkv((3, 2), 4, 6, 16)
    lengths = torch.tensor([6, 1, 4])
    mask = (torch.arange(6) < lengths[:, None])[:, None, None, :]
    expected = oracle_attention(q, k, v, mask)
    check_close(attention_lab.attention(q, k, v, mask=mask), expected, dtype=torch.float32)


def test_attention_by_hand():
    q = torch.tensor([[1.0, 0.0]])
    k = torch.tensor([[2.0, 5.0], [0.0, -3.0]])
    v = torch.tensor([[10.0], [20.0]])
    # Scores 2 and 0, times √½: the first weight is 1 / (1 + e^−√2).
    first = 1 / (1 + math.exp(-math.sqrt(2.0)))
    expected = torch.tensor([[10.0 * first + 20.0 * (1 - first)]], dtype=torch.float64)
    check_close(attention_lab.attention(q, k, v), expected, dtype=torch.float32)


def test_attention_of_a_query_that_may_look_at_nothing():
    q, k, v = qkv((2,), 3, 5, 8)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    expected = oracle_attention(q, k, v, mask)
    expected[:, 1] = 0.0
    check_close(attention_lab.attention(q, k, v, mask), expected, dtype=torch.float32)


@pytest.mark.parametrize("scale", [1.0, 0.03, 2.5, 0.0])
def test_attention_with_another_scale(scale):
    q, k, v = qkv((2, 3), 5, 5, 20)
    expected = oracle_attention(q, k, v, scale=scale)
    check_close(attention_lab.attention(q, k, v, scale=scale), expected, dtype=torch.float32)


def test_attention_of_large_inputs():
    q, k, v = qkv((2, 2), 6, 6, 32, scale=40.0)
    # Scores near 5,000 leave float32 with few digits behind the point, so the oracle rounds alike.
    expected = sdpa(q, k, v).double()
    got = attention_lab.attention(q, k, v)
    check_close(got, expected, dtype=torch.float32, tolerance=5e-3)


# The root of 24 is no power of two: queries that were scaled in half precision are rounded again.
@pytest.mark.parametrize("head_dim, scale", [(32, 3.0), (24, 5.0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_attention_of_large_half_precision_inputs(dtype, head_dim, scale):
    q, k, v = qkv((2, 2), 6, 6, head_dim, dtype, scale=scale)
    expected = oracle_attention(q, k, v)
    check_close(attention_lab.attention(q, k, v), expected, dtype=dtype)


def test_attention_whose_unscaled_scores_exceed_float16():
    q, k, v = qkv((2,), 3, 5, 64, torch.float16)
    q, k = q * 60 + 40, k + 30
    expected = oracle_attention(q, k, v)
    check_close(attention_lab.attention(q, k, v), expected, dtype=torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_leaves_its_inputs_alone(dtype):
    q, k, v = qkv((2, 3), 4, 6, 8, dtype)
    mask = torch.ones(4, 6, dtype=torch.bool).tril(2)
    before = [x.clone() for x in (q, k, v, mask)]
    attention_lab.attention(q, k, v, mask)
    call = f"attention(q, k, v, mask) of {dtype}"
    for name, x, old in zip("qkv", (q, k, v), before, strict=False):
        check_close(x, old, tolerance=0.0, of=f"{name} after {call}")
    check_equal(mask, before[-1], "mask after the call", of=call)


def test_attention_keeps_forbidden_values_out_even_when_they_are_huge():
    q, k, v = qkv((2,), 4, 6, 16)
    mask = torch.ones(4, 6, dtype=torch.bool).tril(2)
    changed_k, changed_v = k.clone(), v.clone()
    changed_k[:, -1] = 1e4
    changed_v[:, -1] = -1e6
    right = oracle_attention(q, changed_k, changed_v, mask)
    expected = attention_lab.attention(q, k, v, mask)
    got = attention_lab.attention(q, changed_k, changed_v, mask)
    check_close(got[:, :-1], expected[:, :-1])
    check_close(got, right, dtype=torch.float32)


def test_attention_of_all_queries_equals_attention_one_by_one():
    q, k, v = qkv((2, 3), 9, 9, 16)
    at_once = attention_lab.attention(q, k, v, attention_lab.causal_mask(9, 9))
    for position in range(9):
        seen = position + 1
        mask = attention_lab.causal_mask(1, seen)
        one = attention_lab.attention(
            q[..., position:seen, :], k[..., :seen, :], v[..., :seen, :], mask
        )
        what = f"attention of query {position} alone, against attention of all queries, both yours"
        check_close(one, at_once[..., position:seen, :], of=what)


@pytest.mark.parametrize("leading, tokens, num_heads, head_dim", [((3,), 5, 4, 6), ((), 1, 7, 3)])
def test_split_heads_by_hand(leading, tokens, num_heads, head_dim):
    x = random(*leading, tokens, num_heads * head_dim)
    expected = torch.stack(
        [x[..., head * head_dim : (head + 1) * head_dim] for head in range(num_heads)], dim=-3
    )
    check_equal(attention_lab.split_heads(x, num_heads), expected, "the heads")


@pytest.mark.parametrize("leading, tokens, num_heads, head_dim", [((3,), 5, 4, 6), ((), 1, 7, 3)])
def test_merge_heads_by_hand(leading, tokens, num_heads, head_dim):
    x = random(*leading, num_heads, tokens, head_dim)
    expected = torch.cat([x[..., head, :, :] for head in range(num_heads)], dim=-1)
    check_equal(attention_lab.merge_heads(x), expected, "the tokens")


@pytest.mark.parametrize("leading", [(), (4,), (2, 3)], ids=str)
def test_merge_heads_undoes_split_heads(leading):
    x = random(*leading, 6, 15)
    check_equal(attention_lab.merge_heads(attention_lab.split_heads(x, 5)), x, "x split and merged")


def test_merge_heads_of_a_view_that_is_not_contiguous():
    x = random(2, 5, 3, 8).transpose(1, 2)
    expected = torch.cat([x[:, head] for head in range(3)], dim=-1)
    check_equal(attention_lab.merge_heads(x), expected, "the tokens")


def test_split_heads_refuses_a_width_that_does_not_divide():
    check_raises(ValueError, attention_lab.split_heads, random(2, 10), 3, mentions=(10, 3))
