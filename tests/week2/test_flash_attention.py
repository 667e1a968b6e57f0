"""Grades week2/flash_attention: attention block by block, and the kernel for many sequences."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from course.grading import check_close, check_equal, check_raises, check_true, describe, lab
from course.launches import DEVICE, DTYPES, check_kernel_computes, without_waiting

flash = lab("week2/flash_attention")
kv = lab("week2/kv_cache")
qwen = lab("week1/qwen")

# attention_by_blocks is PyTorch, which knows more dtypes than a kernel does.
ALL_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# A result that was computed in float32 and rounded once is off by half a step at the most.
ONE_ROUNDING = {torch.float16: 1.02 * 2**-11, torch.bfloat16: 1.02 * 2**-8}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Signed values with a few outliers."""
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape))
    values = torch.randn(shape, generator=generator)
    values[values.abs() > 2] *= 3
    return values.to(dtype).to(DEVICE)


def oracle(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """torch's own attention in float64, for one sequence; query heads may share key heads."""
    q, k, v = q.double(), k.double(), v.double()
    if q.numel() == 0 or k.shape[1] == 0:
        return torch.zeros_like(q), torch.full(q.shape[:2], -math.inf, device=q.device).double()
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask).nan_to_num(0.0)
    scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
    return out, scores.logsumexp(-1)


def staircase(num_queries: int, num_keys: int) -> Tensor:
    """Let the last query look at all keys, and each one before it at one key less."""
    allowed = torch.ones(num_queries, num_keys, dtype=torch.bool, device=DEVICE)
    return allowed.tril(num_keys - num_queries)


def check_results(
    got: object,
    expected: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    of: object,
    tolerance: float | None = None,
    lse_tolerance: float | None = None,
) -> None:
    """Hold out and lse against the oracle's."""
    pair = isinstance(got, tuple) and len(got) == 2
    check_true(pair, f"returned {describe(got)}, expected the pair (out, lse)", of=of)
    check_close(got[0], expected[0], dtype=dtype, tolerance=tolerance, of=f"{of}\nout")
    lse_dtype = torch.promote_types(dtype, torch.float32)
    check_close(got[1], expected[1], dtype=lse_dtype, tolerance=lse_tolerance, of=f"{of}\nlse")


class Allocations(TorchDispatchMode):
    """Notes the number of elements and of bytes of every tensor that is made, views apart."""

    def __init__(self, *given: Tensor):
        super().__init__()
        # What was made stays alive, so that its memory is not taken for something else's.
        self.storages = {x.untyped_storage().data_ptr(): x for x in given}
        self.made: list[tuple[int, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if not isinstance(x, Tensor) or x.numel() == 0:
                continue
            start = x.untyped_storage().data_ptr()
            if start not in self.storages:
                self.storages[start] = x
                self.made.append((x.numel(), x.untyped_storage().nbytes()))
        return result


def by_blocks(q, k, v, mask, block_size):
    """Call it, and say what it was called with."""
    sizes = f"{q.shape[1]} queries, {k.shape[1]} keys, {q.shape[0]} heads, head_dim {q.shape[2]}"
    of = f"attention_by_blocks: {sizes}, {str(q.dtype)[6:]}, block_size {block_size}"
    return flash.attention_by_blocks(q, k, v, mask, block_size), of


def draw_blocks(num_heads, num_queries, num_keys, head_dim, dtype=torch.float32):
    q = random(num_heads, num_queries, head_dim, seed=1, dtype=dtype)
    k = random(num_heads, num_keys, head_dim, seed=2, dtype=dtype)
    return q, k, random(num_heads, num_keys, head_dim, seed=3, dtype=dtype)


# (num_heads, num_queries, num_keys, head_dim): ragged, size 1, more keys than queries.
SHAPES = [(3, 13, 13, 24), (2, 5, 37, 80), (1, 1, 9, 64), (2, 1, 1, 1)]


@pytest.mark.parametrize("block_size", [1, 4, 16, 100])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_match_float64(shape, dtype, block_size):
    q, k, v = draw_blocks(*shape, dtype=dtype)
    mask = staircase(shape[1], shape[2])
    got, of = by_blocks(q, k, v, mask, block_size)
    check_results(got, oracle(q, k, v, mask), dtype, of, ONE_ROUNDING.get(dtype))


@pytest.mark.parametrize("block_size", [1, 2, 3, 7])
def test_blocks_with_any_mask(block_size):
    q, k, v = draw_blocks(2, 40, 11, 20)
    mask = random(40, 11, seed=4) > 0.4
    mask[3:6] = False
    mask[7] = True
    got, of = by_blocks(q, k, v, mask, block_size)
    check_results(got, oracle(q, k, v, mask), torch.float32, f"{of}; any mask")


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_blocks_of_a_query_that_may_look_at_nothing(dtype):
    q, k, v = draw_blocks(2, 3, 10, 8, dtype)
    mask = torch.ones(3, 10, dtype=torch.bool, device=DEVICE)
    mask[1] = False
    got, of = by_blocks(q, k, v, mask, 4)
    check_results(got, oracle(q, k, v, mask), dtype, f"{of}; query 1 may look at nothing")


@pytest.mark.parametrize(
    "visible", [slice(8, 12), slice(0, 4), slice(4, 8), slice(11, 12)], ids=str
)
def test_blocks_of_which_only_one_may_be_looked_at(visible):
    q, k, v = draw_blocks(2, 3, 12, 8)
    mask = torch.zeros(3, 12, dtype=torch.bool, device=DEVICE)
    mask[:, visible] = True
    got, of = by_blocks(q, k, v, mask, 4)
    keys = f"keys {visible.start} to {visible.stop - 1}"
    check_results(got, oracle(q, k, v, mask), torch.float32, f"{of}; only {keys} may be seen")


@pytest.mark.parametrize("num_queries, num_keys", [(0, 5), (3, 0), (0, 0)])
def test_blocks_of_nothing(num_queries, num_keys):
    q, k, v = draw_blocks(2, num_queries, num_keys, 8)
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=DEVICE)
    got, of = by_blocks(q, k, v, mask, 4)
    check_results(got, oracle(q, k, v, mask), torch.float32, of)


def test_blocks_by_hand():
    q = torch.tensor([[[2.0]]], device=DEVICE)
    k = torch.tensor([[[math.log(2) / 2], [math.log(4) / 2], [0.0]]], device=DEVICE)
    v = torch.tensor([[[7.0], [14.0], [-7.0]]], device=DEVICE)
    # exp(score) is 2, 4 and 1, so that the weights are 2/7, 4/7 and 1/7.
    expected = torch.tensor([[[9.0]]]).double(), torch.tensor([[math.log(7)]]).double()
    got, of = by_blocks(q, k, v, staircase(1, 3), 1)
    check_results(got, expected, torch.float32, f"{of}; scores log 2, log 4, 0; values 7, 14, -7")


@pytest.mark.parametrize("order", ["rising", "falling", "last", "first"])
def test_blocks_whose_largest_score_moves(order):
    q, k, v = draw_blocks(2, 4, 20, 16)
    k[:] = q[:, :1] * 0.3 + 0.05 * k
    steps = torch.arange(20, device=DEVICE) / 4
    k *= {
        "rising": steps,
        "falling": steps.flip(0),
        "last": torch.where(steps == steps[-1], 20.0, 0.1),
        "first": torch.where(steps == 0, 20.0, 0.1),
    }[order][:, None]
    mask = torch.ones(4, 20, dtype=torch.bool, device=DEVICE)
    got, of = by_blocks(q, k, v, mask, 5)
    expected = oracle(q, k, v, mask)
    check_results(got, expected, torch.float32, f"{of}; the largest score: {order}", 2e-5)


@pytest.mark.parametrize("factor", [100.0, -100.0, 1e4], ids=lambda f: f"factor {f:g}")
def test_blocks_of_large_scores(factor):
    q, k, v = draw_blocks(2, 6, 17, 16)
    # Few digits, so that the scores are exact. A sum that is kept as its lse is not.
    q, k = (x.round() for x in (q, k))
    got, of = by_blocks(q * factor, k, v, staircase(6, 17), 4)
    expected = oracle(q * factor, k, v, staircase(6, 17))
    check_results(got, expected, torch.float32, f"{of}; scores up to {abs(factor) * 30:g}", 5e-2)


# A sum that is kept as its lse is known to 3e-5 there, and to 8e-3.
@pytest.mark.parametrize("far, tolerance", [(400, 1e-3), (100_000, 5e-2)])
def test_blocks_of_scores_that_are_all_far_below_zero(far, tolerance):
    q, k, v = draw_blocks(2, 5, 9, 16)
    q[..., 0], k[..., 0] = 4.0, -(far + torch.arange(9, device=DEVICE) % 4)
    q[..., 1:] = 0.0
    got, of = by_blocks(q, k, v, staircase(5, 9), 4)
    expected = oracle(q, k, v, staircase(5, 9))
    check_results(got, expected, torch.float32, f"{of}; all scores are near {-far:,}", tolerance)


@pytest.mark.parametrize("head_dim, scale", [(32, 3.0), (24, 5.0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_blocks_of_large_half_precision_inputs(dtype, head_dim, scale):
    q, k, v = draw_blocks(2, 6, 9, head_dim)
    q, k, v = ((x * scale).to(dtype) for x in (q, k, v))
    mask = staircase(6, 9)
    got, of = by_blocks(q, k, v, mask, 4)
    check_results(got, oracle(q, k, v, mask), dtype, f"{of}; large inputs", ONE_ROUNDING[dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_blocks_sum_up_in_float32(dtype):
    q, k, v = draw_blocks(1, 1, 3000, 8, dtype)
    q *= 0.1
    mask = staircase(1, 3000)
    got, of = by_blocks(q, k, (v * 100).to(dtype), mask, 64)
    expected = oracle(q, k, (v * 100).to(dtype), mask)
    # Thousands of values cancel, which leaves a small sum of large parts.
    check_results(got, expected, dtype, f"{of}; values of some hundreds", 2 * ONE_ROUNDING[dtype])


@settings(max_examples=25)
@given(st.integers(1, 12), st.integers(1, 30), st.integers(1, 31), st.integers(0, 99))
def test_blocks_of_any_size_give_the_same(num_queries, num_keys, block_size, seed):
    q, k, v = draw_blocks(2, num_queries, num_keys, 8)
    mask = random(num_queries, num_keys, seed=seed) > -0.7
    got, of = by_blocks(q, k, v, mask, block_size)
    check_results(got, oracle(q, k, v, mask), torch.float32, of)


def test_blocks_leave_their_arguments_alone():
    arguments = *draw_blocks(2, 6, 9, 8), staircase(6, 9)
    before = [x.clone() for x in arguments]
    _, of = by_blocks(*arguments, 4)
    for name, x, old in zip(("q", "k", "v"), arguments, before, strict=False):
        check_close(x, old, tolerance=0.0, of=f"{of}; {name} after the call")
    check_equal(arguments[3], before[3], "mask after the call", of=of)


@pytest.mark.parametrize("num_queries, num_keys, block_size", [(20, 400, 16), (1, 900, 8)])
def test_blocks_never_hold_all_scores(num_queries, num_keys, block_size):
    num_heads, head_dim = 4, 24
    q, k, v = draw_blocks(num_heads, num_queries, num_keys, head_dim, torch.float16)
    mask = staircase(num_queries, num_keys)
    most = num_heads * max(num_queries, block_size) * max(block_size, head_dim)
    with Allocations(q, k, v, mask) as seen:
        _, of = by_blocks(q, k, v, mask, block_size)
    largest = max(numel for numel, _ in seen.made)
    what = f"a tensor of {largest:,} elements was made, at most {most:,} are allowed"
    check_true(largest <= most, what, of=of)


@pytest.mark.parametrize("block_size", [0, -3])
def test_blocks_refuse_to_be_empty(block_size):
    q, k, v = draw_blocks(1, 2, 4, 8)
    refused = flash.attention_by_blocks, q, k, v, staircase(2, 4), block_size
    check_raises(ValueError, *refused, mentions=[block_size])


@dataclass
class Batch:
    """Sequences for the kernel. lengths: (num_queries, num_keys) of each."""

    lengths: Sequence[tuple[int, int]]
    heads: tuple[int, int] = (2, 1)
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    note: str = ""
    seed: int = 0

    def __post_init__(self):
        num_queries, num_keys = (sum(lengths) for lengths in zip(*self.lengths, strict=True))
        num_heads, num_kv_heads = self.heads
        make = {"seed": self.seed, "dtype": self.dtype}
        self.q = random(num_heads, num_queries, self.head_dim, **make)
        self.k, self.v = random(2, num_kv_heads, num_keys, self.head_dim, **make)

    def ends(self, which: int) -> list[int]:
        return [0, *itertools.accumulate(pair[which] for pair in self.lengths)]

    def cu_seqlens(self, which: int) -> Tensor:
        return torch.tensor(self.ends(which), dtype=torch.int32, device=DEVICE)

    def spans(self) -> list[tuple[slice, slice]]:
        """Return where the queries and the keys of each sequence lie."""
        ends = zip(*(itertools.pairwise(self.ends(which)) for which in (0, 1)), strict=True)
        return [(slice(*queries), slice(*keys)) for queries, keys in ends]

    @property
    def of(self) -> str:
        shown = ", ".join(map(str, self.lengths[:6])) + ", …" * (len(self.lengths) > 6)
        many = f"{len(self.lengths)} sequences of (queries, keys) {shown}"
        one = "one sequence of {} queries and {} keys".format(*self.lengths[0])
        heads = f"{self.heads[0]} query heads, {self.heads[1]} kv heads, head_dim {self.head_dim}"
        text = f"flash_attention: {many if len(self.lengths) > 1 else one}; {heads}"
        return f"{text}, {str(self.dtype)[6:]}{'; ' * bool(self.note)}{self.note}"

    def run(self, max_seqlen_q: int | None = None) -> tuple[Tensor, Tensor]:
        longest = max(pair[0] for pair in self.lengths)
        arguments = self.q, self.k, self.v, self.cu_seqlens(0), self.cu_seqlens(1)
        return flash.flash_attention(*arguments, longest if max_seqlen_q is None else max_seqlen_q)

    def expected(self) -> tuple[Tensor, Tensor]:
        parts = [
            oracle(self.q[:, queries], self.k[:, keys], self.v[:, keys], staircase(*lengths))
            for lengths, (queries, keys) in zip(self.lengths, self.spans(), strict=True)
        ]
        return tuple(torch.cat(of_all, dim=1) for of_all in zip(*parts, strict=True))

    def check(
        self, tolerance: float | None = None, lse_tolerance: float | None = None, **arguments
    ) -> None:
        got = self.run(**arguments)
        check_results(got, self.expected(), self.dtype, self.of, tolerance, lse_tolerance)


RAGGED = [(37, 37), (1, 50), (0, 9), (3, 70), (1, 1)]
HEADS = {(3, 3): 64, (8, 2): 80, (7, 1): 96, (4, 4): 128, (4, 1): 96, (14, 2): 64}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_flash_matches_float64(heads, dtype):
    Batch(RAGGED, heads, HEADS[heads], dtype).check()


@pytest.mark.parametrize("head_dim", [1, 5, 24, 33, 127])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flash_of_any_head_dim(dtype, head_dim):
    Batch([(9, 12), (2, 40)], (4, 2), head_dim, dtype).check()


@pytest.mark.parametrize(
    "lengths",
    [
        [(300, 300)],
        [(140, 420)],
        [(1, 700)],
        [(129, 129), (64, 64), (63, 65)],
        [(5, 261), (31, 33), (32, 32), (33, 96)],
        [(200, 201), (3, 3)],
        [(3, 65), (7, 133)],
        [(40, 40), (32, 63)],
        [(130, 130), (128, 191)],
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flash_of_many_blocks(dtype, lengths):
    Batch(lengths, dtype=dtype).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "lengths",
    [[(1, 1)], [(1, 1)] * 9, [(1, 1), (2, 2), (1, 3)], [(0, 4), (2, 2)], [(2, 2), (0, 0), (1, 5)]],
    ids=str,
)
def test_flash_of_short_sequences(lengths, dtype):
    Batch(lengths, (4, 2), 24, dtype).check()


@pytest.mark.parametrize("lengths", [[(0, 0)], [(0, 5)], [(0, 5), (0, 3)]], ids=str)
def test_flash_of_no_queries(lengths):
    Batch(lengths).check()


@pytest.mark.parametrize(
    "lengths", [[(3, 0)], [(5, 2)], [(2, 2), (140, 7), (1, 0), (4, 9)], [(200, 66)]], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flash_of_queries_that_look_at_nothing(dtype, lengths):
    Batch(lengths, dtype=dtype).check()


@settings(max_examples=12)
@given(
    st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), min_size=1, max_size=5),
    st.sampled_from([(1, 1), (3, 1), (4, 2)]),
    st.integers(0, 99),
)
@example([(0, 3), (40, 0), (33, 5), (1, 64)], (2, 2), 5)
def test_flash_of_any_lengths(pairs, heads, seed):
    lengths = [(num_queries, num_queries + more) for num_queries, more in pairs]
    Batch(lengths, heads, 8, torch.float16, seed=seed).check()


@pytest.mark.parametrize("max_seqlen_q", [5, 6, 64, 65, 1000])
def test_flash_with_room_for_longer_sequences(max_seqlen_q):
    batch = Batch([(5, 9), (1, 3), (4, 4)], dtype=torch.float16)
    batch.note = f"max_seqlen_q {max_seqlen_q}"
    batch.check(max_seqlen_q=max_seqlen_q)


def test_flash_by_hand():
    batch = Batch([(60, 60), (3, 40)], (2, 1), 8, note="every query is zero")
    batch.q.zero_()
    # All scores are 0: each query gets the mean of what it looks at, and the log of their number.
    counts = torch.cat((torch.arange(1, 61), torch.arange(38, 41))).to(DEVICE)
    values = batch.v[0].double()
    sums = torch.cat((values[:60].cumsum(0), values[60:].cumsum(0)[-3:]))
    expected = (sums / counts[:, None]).expand(2, -1, -1), counts.double().log().expand(2, -1)
    check_results(batch.run(), expected, torch.float32, batch.of)


def of_tokens(x: Tensor) -> Tensor:
    """As projections give it: all heads of a token side by side, other columns behind them."""
    heads, tokens, head_dim = x.shape
    held = torch.full((tokens, heads * head_dim + 5), math.nan, dtype=x.dtype, device=DEVICE)
    view = held[:, : heads * head_dim].unflatten(1, (heads, head_dim)).transpose(0, 1)
    return view.copy_(x)


def of_a_cache(x: Tensor) -> Tensor:
    """As a cache holds it: room behind the tokens of each head."""
    held = torch.full((x.shape[0], x.shape[1] + 7, x.shape[2]), math.nan, dtype=x.dtype)
    return held.to(DEVICE)[:, : x.shape[1]].copy_(x)


def of_columns(x: Tensor) -> Tensor:
    """With the numbers of a head far apart, and the tokens side by side."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def every_other(x: Tensor) -> Tensor:
    """With something else between any two numbers."""
    held = torch.full([2 * size for size in x.shape], math.nan, dtype=x.dtype, device=DEVICE)
    return held[::2, ::2, ::2].copy_(x)


LAYOUTS: list[Callable[[Tensor], Tensor]] = [of_tokens, of_a_cache, of_columns, every_other]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_flash_with_any_strides(layout, dtype):
    batch = Batch([(30, 75), (1, 3), (4, 4)], (4, 2), 20, dtype, layout.__doc__)
    batch.q, batch.k, batch.v = map(layout, (batch.q, batch.k, batch.v))
    batch.check()


def test_flash_with_other_strides_for_each():
    batch = Batch([(30, 75), (4, 4)], (4, 2), 20, note="q, k and v have different strides")
    batch.q, batch.k, batch.v = of_tokens(batch.q), of_columns(batch.k), of_a_cache(batch.v)
    batch.check()
    batch.q, batch.k, batch.v = of_columns(batch.q), of_a_cache(batch.k), of_tokens(batch.v)
    batch.check()


@pytest.mark.parametrize("apart", ["heads", "tokens"])
def test_flash_of_tensors_with_billions_of_elements(apart):
    lengths = [(2, 3), (4, 130), (1, 2)] if apart == "tokens" else [(2, 5)]
    batch = Batch(lengths, (3, 3) if apart == "heads" else (1, 1), 16, torch.float16)
    try:
        held = torch.empty(2**31 + 2**28, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("this machine has no room for a tensor of 4.5 GB")
    # Only the few elements that are named are ever touched.
    strides = (2**30, 16, 1) if apart == "heads" else (0, 2**24, 1)
    batch.k = held.as_strided(batch.k.shape, strides).copy_(batch.k)
    batch.v = held[2**20 :].as_strided(batch.v.shape, strides).copy_(batch.v)
    if apart == "heads":
        batch.q = held[2**21 :].as_strided(batch.q.shape, strides).copy_(batch.q)
    batch.note = f"the {apart} of k lie {max(strides):,} elements apart"
    batch.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", range(4))
# NumPy's word for the rows that are NaN on purpose.
@pytest.mark.filterwarnings("ignore:All-NaN")
def test_flash_keeps_sequences_apart(kept, dtype):
    batch = Batch([(5, 9), (40, 40), (1, 33), (3, 3)], dtype=dtype)
    expected = batch.expected()
    queries, keys = batch.spans()[kept]
    for x, here in ((batch.q, queries), (batch.k, keys), (batch.v, keys)):
        own = x[:, here].clone()
        x.fill_(math.nan)
        x[:, here] = own
    got = batch.run()
    of = f"{batch.of}\nthe queries of sequence {kept}; every other sequence is NaN"
    check_close(got[0][:, queries], expected[0][:, queries], dtype=dtype, of=f"{of}; out")
    check_close(got[1][:, queries], expected[1][:, queries], dtype=torch.float32, of=f"{of}; lse")


@pytest.mark.parametrize("lengths", [(290, 290), (270, 330)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flash_does_not_read_what_nobody_looks_at(dtype, lengths):
    batch = Batch([(1, 6), lengths], dtype=dtype)
    expected = batch.expected()
    # Query i of the long sequence looks at its key i + more last, and may not notice what stands
    # 256 places behind that.
    num_clean = 9
    more = lengths[1] - lengths[0]
    first_bad = 6 + num_clean - 1 + more + 256
    batch.k[:, first_bad:] = math.nan
    batch.v[:, first_bad:] = math.nan
    got = batch.run()
    here = slice(1, 1 + num_clean)
    of = f"{batch.of}\nkeys and values are NaN from {first_bad - 6} on, query 8 looks at "
    of += f"{num_clean + more - 1} last; queries 0 to 8"
    check_close(got[0][:, here], expected[0][:, here], dtype=dtype, of=f"{of}; out")
    check_close(got[1][:, here], expected[1][:, here], dtype=torch.float32, of=f"{of}; lse")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flash_of_a_huge_future(dtype):
    batch = Batch([(40, 60)], dtype=dtype)
    right = batch.expected()
    batch.k[:, -1], batch.v[:, -1] = 1e4, -3e4
    batch.note = "only the last query looks at the last token, which is huge"
    got = batch.run()
    check_close(got[0][:, :-1], right[0][:, :-1], dtype=dtype, of=f"{batch.of}\nout, all but last")
    check_close(got[1][:, :-1], right[1][:, :-1], dtype=torch.float32, of=f"{batch.of}\nlse")


@pytest.mark.parametrize("factor", [100.0, -100.0, 3000.0], ids=lambda f: f"factor {f:g}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flash_of_large_scores(dtype, factor):
    batch = Batch([(50, 70), (1, 90)], dtype=dtype, note=f"scores up to {abs(factor) * 30:g}")
    # Few digits, so that the scores are exact. A sum that is kept as its lse is not.
    batch.q, batch.k = (x.clamp(-4, 4).round() for x in (batch.q, batch.k))
    batch.q *= factor
    batch.check(tolerance=5e-2)


@pytest.mark.parametrize("far, tolerance", [(400, 4e-3), (40_000, 5e-2)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flash_of_scores_that_are_all_far_below_zero(dtype, far, tolerance):
    batch = Batch([(5, 40), (1, 90)], dtype=dtype, note=f"all scores are near {-far:,}")
    batch.q[..., 0], batch.k[..., 0] = far / 100, -400.0
    batch.q[..., 1:] = 0.0
    batch.k[:, ::3, 0] = -402.0
    batch.check(tolerance)


@pytest.mark.parametrize("head_dim", [80, 128])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_flash_of_large_half_precision_inputs(dtype, head_dim):
    batch = Batch([(20, 40)], (2, 1), head_dim, dtype, note="large inputs")
    batch.q *= 3.3
    batch.k *= 3.3
    batch.check()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_flash_whose_unscaled_scores_exceed_half_precision(dtype):
    batch = Batch([(9, 30)], (2, 1), 64, dtype, note="unscaled scores near 140,000")
    batch.q, batch.k = batch.q * 2 + 50, batch.k * 0.1 + 43
    # A GPU adds such products with fewer digits than a CPU.
    batch.check(tolerance=0.1)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_flash_whose_sums_exceed_half_precision(dtype):
    batch = Batch([(2, 300)], dtype=dtype, note="values near 30,000, all scores near 0")
    batch.q *= 0.01
    batch.v = batch.v.clamp(-1, 1) * 100 + 30_000
    batch.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flash_of_thousands_of_keys(dtype):
    batch = Batch([(1, 3001)], (1, 1), 8, dtype, note="scores near 0")
    batch.q *= 0.1
    batch.check(lse_tolerance=2e-6)


@pytest.mark.parametrize("order", ["rising", "falling", "last", "first"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flash_whose_largest_score_moves(dtype, order):
    batch = Batch([(3, 300)], (2, 1), 16, dtype, note=f"the largest score: {order}")
    batch.q[:] = 1.0 + 0.1 * batch.q
    steps = torch.arange(300, device=DEVICE) / 60
    factors = {
        "rising": steps,
        "falling": steps.flip(0),
        "last": torch.where(steps >= steps[-3], 3.0, 0.1),
        "first": torch.where(steps == 0, 3.0, 0.1),
    }
    batch.k = ((1 + 0.1 * batch.k) * factors[order][:, None]).to(dtype)
    batch.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flash_leaves_its_arguments_alone(dtype):
    batch = Batch([(9, 30), (1, 2)], dtype=dtype)
    arguments = batch.q, batch.k, batch.v, batch.cu_seqlens(0), batch.cu_seqlens(1)
    before = [x.clone() for x in arguments]
    flash.flash_attention(*arguments, 9)
    for name, x, old in zip(("q", "k", "v"), arguments, before, strict=False):
        check_close(x, old, tolerance=0.0, of=f"{batch.of}; {name} after the call")
    for name, which in (("cu_seqlens_q", 3), ("cu_seqlens_k", 4)):
        check_equal(arguments[which], before[which], f"{name} after the call", of=batch.of)


@pytest.mark.parametrize("part", ["out", "lse"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flash_is_one_kernel_for_all_sequences(dtype, part):
    def call() -> Tensor:
        return Batch([(9, 30), (1, 2), (5, 5)], (4, 2), 24, dtype).run()[part == "lse"]

    check_kernel_computes(call, f"flash_attention of 3 sequences, {str(dtype)[6:]}: {part}")


@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=lambda layout: layout.__name__)
def test_flash_makes_nothing_but_its_results(layout):
    batch = Batch([(30, 900), (4, 700)], (6, 2), 16, torch.float16, layout.__doc__)
    batch.q, batch.k, batch.v = map(layout, (batch.q, batch.k, batch.v))
    arguments = batch.q, batch.k, batch.v, batch.cu_seqlens(0), batch.cu_seqlens(1)
    with Allocations(*arguments) as seen:
        out, lse = flash.flash_attention(*arguments, 30)
    made = sum(nbytes for _, nbytes in seen.made)
    # Small tables of the sequences, or of the blocks, are nobody's concern.
    most = out.numel() * out.itemsize + lse.numel() * lse.itemsize + 4096
    what = f"{made:,} bytes were taken for tensors, out and lse have {most - 4096:,}"
    check_true(made <= most, what, of=batch.of)


def test_flash_does_not_wait_for_the_device():
    # So many sequences that no message about the call shows their numbers.
    batch = Batch([(3, 9), (1, 7), (4, 4)] * 3, (4, 2))
    arguments = batch.q, batch.k, batch.v, batch.cu_seqlens(0), batch.cu_seqlens(1)
    flash.flash_attention(*arguments, 4)
    with without_waiting():
        flash.flash_attention(*arguments, 4)


@pytest.mark.parametrize("heads", [(6, 4), (2, 3)], ids=str)
def test_flash_refuses_heads_that_do_not_divide(heads):
    batch = Batch([(3, 5)], heads)
    arguments = batch.q, batch.k, batch.v, batch.cu_seqlens(0), batch.cu_seqlens(1)
    check_raises(ValueError, flash.flash_attention, *arguments, 3, mentions=heads)


@pytest.mark.parametrize("head_dim", [129, 256])
def test_flash_refuses_heads_that_are_too_large(head_dim):
    batch = Batch([(3, 5)], head_dim=head_dim)
    arguments = batch.q, batch.k, batch.v, batch.cu_seqlens(0), batch.cu_seqlens(1)
    check_raises(ValueError, flash.flash_attention, *arguments, 3, mentions=(head_dim, 128))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flash_of_chunks_equals_flash_of_the_whole(dtype):
    whole = Batch([(100, 100)], (4, 2), 32, dtype)
    expected = whole.run()
    for start, end in itertools.pairwise((0, 33, 34, 98, 100)):
        chunk = Batch([(end - start, end)], (4, 2), 32, dtype)
        chunk.q, chunk.k, chunk.v = whole.q[:, start:end], whole.k[:, :end], whole.v[:, :end]
        of = f"{chunk.of}\nagainst the same queries of the whole sequence of 100, both yours"
        got = chunk.run()
        check_close(got[0], expected[0][:, start:end], of=of)
        check_close(got[1], expected[1][:, start:end], of=of)


FAMILIES = {
    "Qwen2": {"head_dim": 20, "num_key_value_heads": 1},
    "Qwen3": {"head_dim": 16, "num_key_value_heads": 2},
}


def tiny_model(family: str) -> torch.nn.Module:
    shape = {
        "architectures": [f"{family}ForCausalLM"],
        "vocab_size": 61,
        "hidden_size": 40,
        "intermediate_size": 33,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
        "max_position_embeddings": 200,
    }
    model = qwen.Qwen(qwen.QwenConfig.from_dict(shape | FAMILIES[family]))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return model.requires_grad_(False).eval().to(DEVICE)


def through_the_kernel(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Call flash_attention as `prefill_attention` is called: one sequence."""
    ends = [torch.tensor([0, x.shape[1]], dtype=torch.int32, device=x.device) for x in (q, keys)]
    return flash.flash_attention(q, keys, values, *ends, q.shape[1])[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_flash_in_a_model_with_a_cache(family):
    Batch([(2, 3)]).check()
    model = tiny_model(family)
    caches = kv.cache_for(model, 3), kv.cache_for(model, 3)

    def make_attend(cache, counts):
        return kv.cached_attend(cache, counts, prefill=through_the_kernel)

    for step in ({0: 40, 1: 1, 2: 7}, {1: 3, 0: 35}, {2: 1, 0: 2}):
        new_tokens = {row: [(7 * i + row) % 61 for i in range(n)] for row, n in step.items()}
        expected = kv.extend(model, caches[0], new_tokens)
        got = kv.extend(model, caches[1], new_tokens, make_attend)
        of = (
            f"extend of a tiny {family} by so many ids: {step}, the prompts through flash_attention"
        )
        check_close(got, expected, tolerance=5e-5, of=of)
