"""Grades week3/moe: a router, rows sorted by expert, their products, the block, and the model."""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe

from course.grading import check_close, check_equal, check_true, lab
from course.launches import (
    DEVICE,
    DTYPES,
    check_kernel_computes,
    count_programs,
    counted_reads,
    without_waiting,
)

moe = lab("week3/moe")
qwen = lab("week1/qwen")
mlp = lab("week1/mlp")
kv_cache = lab("week2/kv_cache")
paged = lab("week3/paged_attention")

HALVES = (torch.float16, torch.bfloat16)
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="only the interpreter sees what is read")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Signed values with a few outliers, which other orders of axes would put elsewhere."""
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape))
    values = torch.randn(shape, generator=generator)
    values[values.abs() > 2] *= 5
    return values.to(DEVICE, dtype)


def integers(values: Sequence) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


@contextlib.contextmanager
def left_alone(of: str, **given: Tensor) -> Iterator[None]:
    """A block that leaves these tensors as they are."""
    before = {name: x.clone() for name, x in given.items()}
    yield
    for name, x in given.items():
        same = torch.equal(x.nan_to_num(7.0), before[name].nan_to_num(7.0))
        check_true(same, f"{name} was changed", of=of)


class Operations(TorchDispatchMode):
    """Counts the operations of PyTorch, its matrix products, and the numbers that it makes."""

    PRODUCTS = (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "matmul",
        "mv",
        "linear",
        "mkldnn_linear",
        "einsum",
    )

    def __init__(self, *given: Tensor):
        super().__init__()
        self.storages = {x.untyped_storage().data_ptr(): x for x in given}
        self.num_operations = self.num_products = self.num_made = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.num_operations += 1
        self.num_products += function.overloadpacket.__name__.strip("_") in self.PRODUCTS
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.numel():
                start = x.untyped_storage().data_ptr()
                if start not in self.storages:
                    # It stays alive, so that its memory is not taken for something else's.
                    self.storages[start] = x
                    self.num_made += x.untyped_storage().nbytes() // x.itemsize
        return result


# The router.


def distinct(num_tokens: int, num_experts: int, dtype=torch.float32, step=0.25, seed=0) -> Tensor:
    """Make logits of which no two of a token are equal, and which every dtype can hold."""
    generator = torch.Generator().manual_seed(seed)
    ranks = [torch.randperm(num_experts, generator=generator) for _ in range(num_tokens)]
    return ((torch.stack(ranks) - num_experts // 2) * step).to(DEVICE, dtype)


def routed(logits: Tensor, k: int, norm_topk_prob: bool) -> tuple[Tensor, Tensor]:
    """Compute in float64 what the contract says of a router; a token at a time."""
    weights, ids = [], []
    for row in logits.double().tolist():
        peak = max(row)
        total = math.fsum(math.exp(score - peak) for score in row)
        chosen = sorted(range(len(row)), key=lambda e: -row[e])[:k]
        probabilities = [math.exp(row[e] - peak) / total for e in chosen]
        scale = math.fsum(probabilities) if norm_topk_prob else 1.0
        weights.append([p / scale for p in probabilities])
        ids.append(chosen)
    return torch.tensor(weights, dtype=torch.float64), torch.tensor(ids)


def check_route(logits: Tensor, k: int, norm_topk_prob: bool, note: str = "") -> None:
    """Route, and hold experts and weights to the contract."""
    size = f"{tuple(logits.shape)} {str(logits.dtype)[6:]}"
    of = f"route(logits: {size}, num_experts_per_tok: {k}, norm_topk_prob: {norm_topk_prob}){note}"
    with left_alone(of, logits=logits):
        got = moe.route(logits, k, norm_topk_prob)
    check_true(len(got) == 2, "it must return (weights, expert_ids)", of=of)
    weights, ids = routed(logits, k, norm_topk_prob)
    check_equal(got[1].cpu(), ids, "expert_ids, the most probable first", of=of)
    check_close(got[0], weights, dtype=torch.float32, tolerance=1e-5, of=f"{of}\nweights")


ROUTERS = [(1, 1, 1), (1, 5, 2), (5, 7, 3), (3, 4, 4), (9, 3, 1), (33, 60, 8), (2, 128, 8)]
norms = pytest.mark.parametrize("norm", [True, False], ids=["normalised", "as they are"])


@norms
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("num_tokens, num_experts, k", ROUTERS)
def test_route(num_tokens, num_experts, k, dtype, norm):
    check_route(distinct(num_tokens, num_experts, dtype), k, norm)


@norms
@pytest.mark.parametrize("scale, k", [(2.0**-10, 3), (1.0, 3), (32.0, 3), (2.0**13, 1)])
def test_route_of_logits_of_any_size(scale, k, norm):
    logits = distinct(6, 9, step=scale)
    check_route(logits, k, norm, f"; neighbours are {scale:g} apart")
    check_route(logits + 512 * scale, k, norm, "; all of them far above zero")
    check_route(logits - 512 * scale, k, norm, "; all of them far below zero")


@norms
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_route_computes_in_float32(dtype, norm):
    # So many experts that a sum of probabilities in half precision is visibly rounded.
    check_route(distinct(20, 250, dtype, step=1 / 128), 7, norm, "; all of them close together")


@norms
def test_route_of_equal_logits(norm):
    logits = torch.zeros(3, 8, device=DEVICE)
    weights, ids = moe.route(logits, 4, norm)
    of = f"route(logits: eight zeros for each of 3 tokens, 4, {norm})"
    expected = torch.full((3, 4), 1 / 4 if norm else 1 / 8)
    check_close(weights, expected, of=f"{of}\nweights")
    for row in ids.tolist():
        fits = len({*row}) == 4 and {*row} <= {*range(8)}
        check_true(fits, f"the experts of a token: {row}, expected 4 different ones", of=of)


@norms
@pytest.mark.parametrize("seed", range(3))
def test_route_is_that_of_transformers(seed, norm):
    config = qwen3_moe.Qwen3MoeConfig(
        hidden_size=16, num_experts=11, num_experts_per_tok=3, norm_topk_prob=norm
    )
    router = qwen3_moe.Qwen3MoeTopKRouter(config)
    # Not so large that two experts have the probability 0, and are equal.
    router.weight.data = random(11, 16, seed=seed).clamp(-2, 2).cpu()
    with torch.no_grad():
        logits, weights, ids = router(random(7, 16, seed=seed + 9).clamp(-2, 2).cpu())
    got = moe.route(logits.to(DEVICE), 3, norm)
    of = f"route(logits: (7, 11), 3, {norm}), against Qwen3MoeTopKRouter"
    check_equal(got[1].cpu(), ids, "expert_ids", of=of)
    check_close(got[0], weights, of=of)


@settings(max_examples=40)
@given(st.data())
def test_route_of_any_logits(data):
    num_experts = data.draw(st.integers(1, 12))
    k = data.draw(st.integers(1, num_experts))
    # So near that no probability is too small for float32.
    scores = st.integers(-280, 280)
    rows = st.lists(scores, min_size=num_experts, max_size=num_experts, unique=True)
    logits = torch.tensor(data.draw(st.lists(rows, min_size=1, max_size=4)), device=DEVICE)
    check_route(logits / data.draw(st.sampled_from([7.0, 100.0])), k, data.draw(st.booleans()))


@norms
def test_route_does_not_wait_for_the_device(norm):
    check_route(distinct(20, 9), 3, norm)
    logits = distinct(20, 9)
    with without_waiting():
        weights, _ = moe.route(logits, 3, norm)
    check_equal(tuple(weights.shape), (20, 3), "the shape of the weights")


# Sorting.


def choices(num_tokens: int, k: int, experts: Sequence[int], seed: int = 0) -> Tensor:
    """Draw k different ones of these experts for each token."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(len(experts), generator=generator)[:k] for _ in range(num_tokens)]
    return integers(experts)[torch.stack(rows).to(DEVICE)]


def sorted_pairs(expert_ids: Tensor, num_experts: int) -> tuple[list[int], list[int]]:
    """Sort pairs as the contract says, one expert after the other."""
    flat = expert_ids.flatten().tolist()
    order = [pair for e in range(num_experts) for pair, its in enumerate(flat) if its == e]
    counts = [flat.count(e) for e in range(num_experts)]
    return order, [0, *itertools.accumulate(counts)]


def check_sort(expert_ids: Tensor, num_experts: int, note: str = "") -> None:
    """Sort, and hold order and offsets to the contract."""
    shown = expert_ids.tolist() if expert_ids.numel() <= 24 else f"of {tuple(expert_ids.shape)}"
    of = f"sort_by_expert(expert_ids {shown}, num_experts: {num_experts}){note}"
    with left_alone(of, expert_ids=expert_ids):
        got = moe.sort_by_expert(expert_ids, num_experts)
    check_true(len(got) == 2, "it must return (order, offsets)", of=of)
    order, offsets = (torch.tensor(x) for x in sorted_pairs(expert_ids, num_experts))
    check_equal(got[1].cpu(), offsets, "offsets", of=of)
    check_equal(got[0].cpu(), order, "order", of=of)


SORTED = {
    "one pair": ([[0]], 1),
    "one pair of another expert": ([[3]], 5),
    "one token": ([[4, 0, 2]], 6),
    "the first experts without tokens": ([[3, 4], [4, 5]], 6),
    "the last experts without tokens": ([[0, 1], [1, 0]], 7),
    "a gap": ([[0], [5], [0], [5], [5]], 6),
    "all on the first": ([[0], [0], [0]], 4),
    "all on the last": ([[3], [3], [3]], 4),
    "all on one in the middle": ([[2]] * 20, 4),
    "every expert for everybody": ([[1, 0, 2], [2, 1, 0], [0, 1, 2]], 3),
    "one each, backwards": ([[4], [3], [2], [1], [0]], 5),
}


@pytest.mark.parametrize("case", SORTED)
def test_sort_of(case):
    ids, num_experts = SORTED[case]
    check_sort(integers(ids), num_experts)


@pytest.mark.parametrize("num_experts, k", [(1, 1), (3, 1), (5, 5), (60, 8), (128, 8)])
@pytest.mark.parametrize("num_tokens", [1, 7, 40])
def test_sort_of_many(num_tokens, num_experts, k):
    check_sort(choices(num_tokens, k, range(num_experts)), num_experts)


def test_sort_keeps_the_order_of_an_expert_s_pairs():
    # Many more pairs than experts, so that an unstable order shows.
    check_sort(choices(1500, 2, [0, 3, 4]), 5, "; pairs of an expert stay in order")


def test_sort_of_ids_with_any_strides():
    ids = choices(9, 3, range(7))
    check_sort(ids.T.contiguous().T, 7, "; its columns are contiguous")
    check_sort(torch.cat((ids, ids + 1), 1)[:, ::2], 8, "; every other column of a tensor")


@settings(max_examples=40)
@given(st.data())
def test_sort_of_any_ids(data):
    num_experts = data.draw(st.integers(1, 9))
    k = data.draw(st.integers(1, num_experts))
    rows = st.permutations(range(num_experts)).map(lambda row: row[:k])
    check_sort(integers(data.draw(st.lists(rows, min_size=1, max_size=6))), num_experts)


def test_sort_does_not_wait_for_the_device():
    ids = choices(20, 2, range(5))
    check_sort(ids, 6)
    with without_waiting():
        order, offsets = moe.sort_by_expert(ids, 6)
    check_equal((len(order), len(offsets)), (40, 7), "the lengths of order and offsets")


# Rows times the matrix of their expert.

WAYS = ["grouped_gemm", "grouped_loop"]
ways = pytest.mark.parametrize("way", WAYS)


def offsets_of(counts: Sequence[int]) -> Tensor:
    return integers([0, *itertools.accumulate(counts)])


def multiplied(x: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
    """Multiply in float64, expert by expert."""
    parts = x.double().cpu().split(list(counts))
    pairs = zip(parts, weight.double().cpu(), strict=True)
    return torch.cat([part @ matrix.T for part, matrix in pairs if len(part)])


def in_words(way: str, counts: Sequence[int], x: Tensor, weight: Tensor, note: str = "") -> str:
    shown = list(counts) if len(counts) <= 16 else f"of {len(counts)} experts, {sum(counts)} in all"
    sizes = f"{weight.shape[2]} to {weight.shape[1]} features, {str(x.dtype)[6:]}"
    return f"{way}: so many rows for each expert: {shown}; {sizes}{note}"


def check_product(
    way: str,
    counts: Sequence[int],
    in_features: int = 20,
    out_features: int = 12,
    dtype: torch.dtype = torch.float32,
    x: Tensor | None = None,
    weight: Tensor | None = None,
    note: str = "",
    tolerance: float | None = None,
) -> None:
    """Multiply rows and hold the result to the contract."""
    x = random(sum(counts), in_features, seed=1, dtype=dtype) if x is None else x
    if weight is None:
        weight = random(len(counts), out_features, in_features, seed=2, dtype=dtype)
    of, offsets = in_words(way, counts, x, weight, note), offsets_of(counts)
    with left_alone(of, x=x, weight=weight, offsets=offsets):
        got = getattr(moe, way)(x, weight, offsets)
    expected = multiplied(x, weight, counts)
    check_close(got, expected, dtype=x.dtype, tolerance=tolerance, of=of)


COUNTS = {
    "one row": [1],
    "one row of the last": [0, 0, 1],
    "one row of the first": [1, 0, 0, 0],
    "a row each": [1, 1, 1, 1, 1],
    "a gap": [3, 0, 5],
    "gaps everywhere": [0, 0, 2, 0, 0, 0, 9, 0],
    "all on the first": [40, 0, 0],
    "all on the last": [0, 0, 40],
    "all on one in the middle": [0, 40, 0],
    "tiles of 16 filled": [16, 32, 16],
    "tiles of 16, and one row more": [17, 33, 1],
    "tiles of 16, and one row less": [15, 31, 0, 15],
    "a large one beside small ones": [2, 150, 0, 1],
    "many experts, few rows": [0] * 20 + [1, 0, 2] + [0] * 37,
    "many rows for each": [70, 129, 0, 64],
    "one expert": [37],
    "one expert with many rows": [131],
}


@ways
@pytest.mark.parametrize("case", COUNTS)
def test_product_of(case, way):
    check_product(way, COUNTS[case])


SIZES = [(1, 1), (5, 3), (16, 16), (33, 70), (130, 17), (64, 128), (200, 130)]


@ways
@pytest.mark.parametrize("in_features, out_features", SIZES)
@pytest.mark.parametrize("counts", [[3, 0, 18], [70, 80]], ids=str)
def test_product_of_any_size(counts, in_features, out_features, way):
    check_product(way, counts, in_features, out_features)


# Triton's interpreter cannot multiply bfloat16.
OF_DTYPE = [("grouped_gemm", dtype) for dtype in DTYPES]
OF_DTYPE += [("grouped_loop", dtype) for dtype in (torch.float32, *HALVES)]


@pytest.mark.parametrize("way, dtype", OF_DTYPE, ids=str)
@pytest.mark.parametrize("counts", [[3, 0, 18], [130, 1]], ids=str)
def test_product_of_dtype(counts, way, dtype):
    check_product(way, counts, 70, 33, dtype)


@ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", [[3, 0, 18], [130, 1]], ids=str)
def test_product_adds_up_in_float32(counts, dtype, way):
    # Behind eight numbers come large ones that cancel, so far apart that no tile has all of them.
    x = random(sum(counts), 300, seed=1).clamp(-2, 2)
    weight = random(len(counts), 12, 300, seed=2).clamp(-2, 2)
    x[:, 8:264], weight[:, :, 8:136], weight[:, :, 136:264] = 8.0, 30.0, -30.0
    x, weight = x.to(dtype), weight.to(dtype)
    note = "; large products cancel"
    # Sums of float32 themselves are rounded at 30,000.
    check_product(way, counts, x=x, weight=weight, note=note, tolerance=3e-3)


@ways
@pytest.mark.parametrize("counts", [[3, 0, 18], [70, 80]], ids=str)
def test_product_keeps_float32_exact(counts, way):
    # Numbers with 20 digits, which fewer bits would round away.
    x = 1 + random(sum(counts), 4, seed=1) * 2.0**-12
    weight = torch.tensor([1.0, -1.0, 1.0, -1.0], device=DEVICE).expand(len(counts), 3, 4)
    note = "; nearly equal numbers cancel"
    # What float32 itself rounds, near 1, against what is left.
    check_product(way, counts, x=x, weight=weight, note=note, tolerance=1e-2)


def transposed(x: Tensor) -> Tensor:
    """Its last two axes lie the other way round."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def inside_something(x: Tensor) -> Tensor:
    """A part of a wider tensor, NaN around it."""
    held = torch.full((*x.shape[:-1], x.shape[-1] + 5), math.nan, dtype=x.dtype, device=DEVICE)
    held[..., 3:-2] = x
    return held[..., 3:-2]


def every_other(x: Tensor) -> Tensor:
    """Something else lies between any two numbers."""
    held = torch.full([2 * size for size in x.shape], math.nan, dtype=x.dtype, device=DEVICE)
    held[(slice(None, None, 2),) * x.dim()] = x
    return held[(slice(None, None, 2),) * x.dim()]


def experts_last(x: Tensor) -> Tensor:
    """Its first axis lies innermost."""
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


LAYOUTS: list[Callable[[Tensor], Tensor]] = [
    transposed,
    inside_something,
    every_other,
    experts_last,
]


@ways
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("which", ["x", "weight"])
@pytest.mark.parametrize("counts", [[3, 0, 18], [70, 80]], ids=str)
def test_product_with_any_strides(counts, which, layout, way):
    given = {"x": random(sum(counts), 20, seed=1), "weight": random(len(counts), 12, 20, seed=2)}
    given[which] = layout(given[which])
    check_product(way, counts, **given, note=f"\n{which}: {layout.__doc__}")


@ways
def test_product_returns_contiguous_rows(way):
    x, weight = transposed(random(21, 20)), transposed(random(3, 12, 20))
    got = getattr(moe, way)(x, weight, offsets_of([3, 0, 18]))
    check_true(got.is_contiguous(), f"the result has the strides {got.stride()}")


@ways
@pytest.mark.parametrize("counts", [[3, 0, 5, 0, 20], [0, 70, 0, 70]], ids=str)
def test_product_keeps_experts_apart(counts, way):
    """What belongs to one expert is NaN: nobody else may see it, and no idle one anything."""
    for bad in range(len(counts)):
        x = random(sum(counts), 20, seed=1)
        weight = random(len(counts), 12, 20, seed=2)
        weight[bad] = math.nan
        check_product(way, counts, x=x, weight=weight, note=f"; expert {bad} is NaN")
        start = sum(counts[:bad])
        x[start : start + counts[bad]] = math.inf
        weight[bad] = 1.0
        check_product(way, counts, x=x, weight=weight, note=f"; rows of expert {bad} are Inf")


@ways
@settings(max_examples=20)
@given(st.data())
def test_product_of_any_rows(way, data):
    counts = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any))
    sizes = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 20)))
    check_product(way, counts, *sizes)


@pytest.mark.parametrize("counts", [[3, 0, 18], [70, 80, 0]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gemm_is_computed_by_one_kernel(dtype, counts):
    def call() -> Tensor:
        x = random(sum(counts), 20, seed=1, dtype=dtype)
        weight = random(len(counts), 12, 20, seed=2, dtype=dtype)
        return moe.grouped_gemm(x, weight, offsets_of(counts))

    of = f"grouped_gemm of so many rows for each expert: {counts}"
    check_kernel_computes(call, of, num_launches=1)


def test_gemm_does_not_wait_for_the_device():
    # So many experts that no message about the call shows their offsets.
    counts = [5, 0, 9, *[0] * 8]
    check_product("grouped_gemm", counts)
    x, weight, offsets = random(14, 20), random(11, 12, 20), offsets_of(counts)
    with without_waiting():
        got = moe.grouped_gemm(x, weight, offsets)
    check_equal(tuple(got.shape), (14, 12), "the shape")


# Rows of the experts, and columns of the result.
PROGRAMS = {
    "one row, 64 experts": ([1] + [0] * 63, 16),
    "two rows, 202 experts": ([1, 1] + [0] * 200, 40),
    "one full tile, ten experts": ([0] * 9 + [16], 16),
    "a row each": ([1] * 30, 16),
    "few experts": ([100, 0, 28], 16),
    "many rows": ([300, 200], 70),
}


@pytest.mark.parametrize("case", PROGRAMS)
def test_gemm_launches_no_program_for_idle_experts(case):
    counts, out_features = PROGRAMS[case]
    x, weight = random(sum(counts), 8), random(len(counts), out_features, 8)
    offsets = offsets_of(counts)
    count = count_programs(lambda: moe.grouped_gemm(x, weight, offsets))
    tiles = -(-sum(counts) // 16) + min(sum(counts), len(counts))
    most = tiles * -(-out_features // 16)
    of = in_words("grouped_gemm", counts, x, weight)
    check_true(count <= most, f"{count} programs are launched, at most {most} are allowed", of=of)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", [[1, 0, 40, 16], [0, 0, 3], [200, 0, 17]], ids=str)
def test_gemm_reads_no_matrix_too_often(counts, dtype):
    x, weight = random(sum(counts), 20, dtype=dtype), random(len(counts), 40, 20, dtype=dtype)
    with counted_reads(weight) as reads:
        check_product("grouped_gemm", counts, x=x, weight=weight)
    of = in_words("grouped_gemm", counts, x, weight)
    for expert, count in enumerate(counts):
        most, got = -(-count // 16), int(reads[expert].max())
        what = f"numbers of expert {expert}, which has {count} rows, are read {got} times"
        check_true(got <= most, f"{what}, at most {most} are allowed", of=of)


@pytest.mark.parametrize("which", ["x", "weight"])
def test_gemm_of_more_than_two_to_the_31_numbers(which):
    counts = [2, 0, 5]
    given = {"x": random(7, 20, dtype=torch.float16), "weight": random(3, 12, 20).half()}
    part = given[which]
    try:
        held = torch.empty(2**31 + 2**24, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("this machine has no room for a tensor of 4.3 GB")
    strides = -(-(2**31) // (len(part) - 1)), *part.stride()[1:]
    # Only what is named is ever touched, so that this is cheap on a CPU.
    given[which] = held.as_strided(part.shape, strides).copy_(part)
    offsets, expected = offsets_of(counts), multiplied(**given, counts=counts)
    got = moe.grouped_gemm(given["x"], given["weight"], offsets)
    note = f"; the last part of {which} begins behind 2**31 numbers"
    check_close(
        got, expected, dtype=torch.float16, of=in_words(WAYS[0], counts, **given, note=note)
    )


def test_loop_of_no_rows():
    got = moe.grouped_loop(random(0, 20), random(3, 12, 20), offsets_of([0, 0, 0]))
    check_equal(tuple(got.shape), (0, 12), "the shape")


@pytest.mark.parametrize("counts", [[1], [3, 5], [1, 1, 1, 1], [40, 2, 70]], ids=str)
def test_loop_multiplies_the_rows_of_an_expert_together(counts):
    x, weight = random(sum(counts), 20), random(len(counts), 12, 20)
    offsets = offsets_of(counts)
    with Operations() as seen:
        moe.grouped_loop(x, weight, offsets)
    most = len(counts)
    of = in_words("grouped_loop", counts, x, weight)
    what = f"{seen.num_products} matrix products, at most {most} are allowed"
    check_true(seen.num_products <= most, what, of=of)


@pytest.mark.parametrize("counts", [[3, 5], [1], [40, 2, 9]], ids=str)
def test_loop_does_nothing_for_idle_experts(counts):
    x = random(sum(counts), 20)
    operations = []
    for num_idle in (0, 50):
        # Some before each expert with rows, and some at the end.
        every = [count for one in counts for count in [0] * num_idle + [one]] + [0] * num_idle
        weight, offsets = random(len(every), 12, 20), offsets_of(every)
        with Operations() as seen:
            moe.grouped_loop(x, weight, offsets)
        operations.append(seen.num_operations)
    few, many = operations
    what = f"{few} operations of PyTorch without idle experts, {many} with 50 around each of them"
    check_true(many <= few, what, of=f"grouped_loop of {counts} rows")


@pytest.mark.parametrize("counts", [[30, 0, 2], [1, 1, 1, 1], [0, 0, 64]], ids=str)
def test_loop_makes_little_beside_its_result(counts):
    x, weight = random(sum(counts), 30), random(len(counts), 20, 30)
    offsets = offsets_of(counts)
    with Operations(x, weight, offsets) as seen:
        moe.grouped_loop(x, weight, offsets)
    most = 2 * sum(counts) * 20 + x.numel() + max(weight[0].numel(), 30) + 4 * len(offsets)
    what = f"{seen.num_made} numbers are made, of which {sum(counts) * 20} are the result"
    check_true(seen.num_made <= most, what, of=in_words("grouped_loop", counts, x, weight))


# Adding up what the experts gave.


def combined(rows: Tensor, weights: Tensor, order: Tensor) -> Tensor:
    """Add up in float64, a row at a time."""
    out = torch.zeros(len(weights), rows.shape[1], dtype=torch.float64)
    k = weights.shape[1]
    for row, pair in zip(rows.double().cpu(), order.tolist(), strict=True):
        out[pair // k] += row * weights[pair // k, pair % k].double().cpu()
    return out


def check_combine(ids: Tensor, rows: Tensor, weights: Tensor | None = None, note: str = "") -> None:
    """Combine rows for the experts of some tokens, and hold the result to the contract."""
    num_tokens, k = ids.shape
    if weights is None:
        weights = random(num_tokens, k, seed=5)
    order = integers(sorted_pairs(ids, int(ids.max()) + 1)[0])
    of = f"combine of {num_tokens} tokens with {k} experts each, {str(rows.dtype)[6:]}{note}"
    if ids.numel() <= 12:
        of += f"\nthe experts of the tokens: {ids.tolist()}"
    with left_alone(of, rows=rows, weights=weights, order=order):
        got = moe.combine(rows, weights, order)
    check_close(got, combined(rows, weights, order), dtype=rows.dtype, of=of)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("num_tokens, num_experts, k", [*ROUTERS, (40, 3, 2)])
def test_combine(num_tokens, num_experts, k, dtype):
    ids = choices(num_tokens, k, range(num_experts))
    check_combine(ids, random(num_tokens * k, 10, dtype=dtype))


@pytest.mark.parametrize("case", SORTED)
def test_combine_of(case):
    ids = integers(SORTED[case][0])
    check_combine(ids, random(ids.numel(), 6))


def test_combine_of_one_number():
    check_combine(integers([[1, 0], [0, 1], [0, 2]]), random(6, 1))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_combine_keeps_weights_in_float32(dtype):
    ids = integers([[0, 1], [1, 0], [0, 2]])
    rows = torch.full((6, 8), 256.0, device=DEVICE, dtype=dtype)
    rows[torch.tensor(sorted_pairs(ids, 3)[0]) % 2 == 1] *= -1
    weights = torch.tensor([[0.5001, 0.5], [0.25, 0.2501], [0.7, 0.7003]], device=DEVICE)
    # Neighbours in float32 near 0.5 times 256: so much is rounded on the way.
    check_combine(ids, rows, weights, "; rows near 256 and -256 nearly cancel")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_combine_rounds_once(dtype):
    ids = choices(5, 6, range(6))
    rows = torch.full((30, 8), 1.0, device=DEVICE, dtype=dtype)
    weights = torch.tensor([300.0, 0.4, 0.4, 0.4, 0.4, -300.0], device=DEVICE).repeat(5, 1)
    check_combine(ids, rows, weights, "; the first and the last weight of each token cancel")


@settings(max_examples=40)
@given(st.data())
def test_combine_of_any_tokens(data):
    num_experts = data.draw(st.integers(1, 7))
    k = data.draw(st.integers(1, num_experts))
    rows = st.permutations(range(num_experts)).map(lambda row: row[:k])
    ids = integers(data.draw(st.lists(rows, min_size=1, max_size=6)))
    check_combine(ids, random(ids.numel(), data.draw(st.integers(1, 5)), seed=3))


def test_combine_does_not_wait_for_the_device():
    ids = choices(20, 3, range(5))
    rows, weights = random(60, 8), random(20, 3)
    check_combine(ids, rows, weights)
    order = integers(sorted_pairs(ids, 5)[0])
    with without_waiting():
        got = moe.combine(rows, weights, order)
    check_equal(tuple(got.shape), (20, 8), "the shape")


# The block.

SHAPE = {
    "vocab_size": 41,
    "hidden_size": 20,
    "intermediate_size": 37,
    "moe_intermediate_size": 11,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")


def configs_of(shape: dict):
    """Make the config of the dense part, and that of the experts."""
    raw = shape | {"architectures": ["Qwen3ForCausalLM"]}
    return qwen.QwenConfig.from_dict(raw), moe.MoEConfig.from_dict(shape)


def oracle_config(shape: dict) -> qwen3_moe.Qwen3MoeConfig:
    # The other ways of its experts ask for widths that are multiples of 16 bytes.
    return qwen3_moe.Qwen3MoeConfig(
        **shape, attn_implementation="eager", experts_implementation="eager"
    )


def fill(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give a module signed weights, and a router that prefers some experts."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0
        scale = 3.0 if "embed_tokens" in name else scale
        scale = 2.0 * scale if name.endswith("gate.weight") else scale
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return module.eval().requires_grad_(False)


def blocks_of(shape: dict, multiply: Callable | None = None, dtype=torch.float32, seed: int = 0):
    """Make transformers' block, and the lab's with the same weights."""
    theirs = fill(qwen3_moe.Qwen3MoeSparseMoeBlock(oracle_config(shape)), seed)
    arguments = () if multiply is None else (multiply,)
    ours = moe.MoE(*configs_of(shape), *arguments)
    weights = {
        "gate.weight": theirs.gate.weight,
        "gate_up_proj": theirs.experts.gate_up_proj,
        "down_proj": theirs.experts.down_proj,
    }
    ours.load_state_dict({name: weight.detach().clone() for name, weight in weights.items()})
    return theirs.to(dtype), ours.eval().requires_grad_(False).to(DEVICE, dtype)


def of_block(shape: dict, x: Tensor, note: str = "") -> str:
    named = ", ".join(f"{name}: {shape[name]}" for name in EXPERTS)
    return f"MoE({named}) of x {tuple(x.shape)} {str(x.dtype)[6:]}{note}"


def check_block(
    changes: dict,
    x: Tensor | None = None,
    multiply: Callable | None = None,
    dtype: torch.dtype = torch.float32,
    note: str = "",
    change: Callable[[nn.Module, nn.Module], None] | None = None,
) -> None:
    """Run a block on x, and hold it to transformers'. change: gets both blocks before."""
    shape = SHAPE | changes
    theirs, ours = blocks_of(shape, multiply, dtype)
    if change is not None:
        change(theirs, ours)
    x = random(2, 7, shape["hidden_size"], seed=4) if x is None else x
    x = x.to(dtype)
    of = of_block(shape, x, note)
    with torch.no_grad():
        flat = x.cpu().reshape(1, -1, x.shape[-1])
        expected = theirs(flat).view(x.shape)
        with left_alone(of, x=x):
            got = ours(x)
    check_close(got, expected, dtype=dtype, of=of)


BLOCKS = [
    {},
    {"norm_topk_prob": False},
    {"num_experts_per_tok": 1},
    {"num_experts_per_tok": 1, "norm_topk_prob": False},
    {"num_experts_per_tok": 5},
    {"num_experts_per_tok": 5, "norm_topk_prob": False},
    {"num_experts": 1, "num_experts_per_tok": 1},
    {"num_experts": 60, "num_experts_per_tok": 8},
    {"num_experts": 7, "num_experts_per_tok": 3, "norm_topk_prob": False},
    {"moe_intermediate_size": 1},
    {"moe_intermediate_size": 37},
    {"hidden_size": 33, "moe_intermediate_size": 64},
]


@pytest.mark.parametrize("changes", BLOCKS, ids=str)
def test_block_is_that_of_transformers(changes):
    check_block(changes)


@pytest.mark.parametrize("changes", BLOCKS[:9], ids=str)
def test_block_by_its_kernel(changes):
    check_block(changes, multiply=moe.grouped_gemm, note=", multiply: grouped_gemm")


@pytest.mark.parametrize("size", [(1,), (2,), (50,), (1, 1), (3, 1), (2, 9), (2, 3, 4)], ids=str)
@norms
def test_block_of_tokens(size, norm):
    x = random(*size, 20, seed=4)
    check_block({"norm_topk_prob": norm}, x)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_block_of_tokens_with_any_strides(layout):
    check_block({}, layout(random(2, 7, 20, seed=4)), note=f"\nx: {layout.__doc__}")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("changes", BLOCKS[:5], ids=str)
def test_block_of_dtype(changes, dtype):
    # Few digits, so that no two experts are nearly equal for a token.
    x = random(2, 7, 20, seed=4).clamp(-3, 3).mul(4).round().div(4)
    check_block(changes, x, dtype=dtype)


def sending_to(experts: Sequence[int]) -> Callable[[nn.Module, nn.Module], None]:
    """Let the first feature, which is 8 everywhere, decide for some experts."""

    def change(theirs: nn.Module, ours: nn.Module) -> None:
        for weight in (theirs.gate.weight, ours.gate.weight):
            weight[:, 0] = -3.0
            weight[list(experts), 0] = 3.0
        idle = [e for e in range(len(ours.down_proj)) if e not in experts]
        ours.gate_up_proj[idle] = ours.down_proj[idle] = math.nan

    return change


@pytest.mark.parametrize("multiply", [None, "grouped_gemm"], ids=["by itself", "by its kernel"])
@pytest.mark.parametrize("experts", [(0,), (2,), (4,), (0, 4), (1, 3), (2, 3)], ids=str)
def test_block_with_idle_experts(experts, multiply):
    x = random(2, 11, 20, seed=4).clamp(-2, 2)
    x[..., 0] = 8.0
    multiply = multiply and getattr(moe, multiply)
    note = f"; all tokens go to {experts}, the weights of the others are NaN"
    changes = {"num_experts_per_tok": len(experts)}
    check_block(changes, x, multiply, note=note, change=sending_to(experts))


def test_block_has_the_documented_parts():
    shape = SHAPE | {"num_experts": 6}
    block = moe.MoE(*configs_of(shape))
    got = {name: tuple(parameter.shape) for name, parameter in block.named_parameters()}
    expected = {"gate.weight": (6, 20), "gate_up_proj": (6, 22, 20), "down_proj": (6, 20, 11)}
    of = "MoE with 6 experts, hidden_size 20, moe_intermediate_size 11"
    check_equal(got, expected, "its parameters", of=of)
    check_true(isinstance(block.gate, nn.Linear), "gate is no torch.nn.Linear", of=of)
    check_equal(block.moe, configs_of(shape)[1], "moe", of=of)
    check_equal(sorted(block.state_dict()), sorted(expected), "its state_dict", of=of)
    buffers = [name for name, _ in block.named_buffers()]
    check_equal(buffers, ["tokens_per_expert"], "its buffers", of=of)
    check_equal(
        block.tokens_per_expert, torch.zeros(6, dtype=torch.int64), "tokens_per_expert", of=of
    )


class Recorded:
    """Multiplies like `grouped_linear`, and keeps what it was called with."""

    def __init__(self):
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        self.calls.append((x, weight, offsets))
        parts = zip(x.split(offsets.diff().tolist()), weight, strict=True)
        return torch.cat([part @ matrix.T for part, matrix in parts])


@pytest.mark.parametrize("k", [1, 2, 5])
def test_block_multiplies_twice(k):
    shape, recorded = SHAPE | {"num_experts_per_tok": k}, Recorded()
    theirs, ours = blocks_of(shape, recorded)
    x = random(3, 4, 20, seed=4)
    got, of = ours(x), of_block(shape, x)
    check_close(got, theirs(x.cpu()), of=of)
    check_equal(len(recorded.calls), 2, "calls of multiply", of=of)
    _, ids = routed(x.view(-1, 20) @ ours.gate.weight.T, k, True)
    offsets = torch.tensor(sorted_pairs(ids, 5)[1])
    kinds = ("gate_up_proj", "down_proj")
    for (rows, weight, its), name, width in zip(recorded.calls, kinds, (20, 11), strict=True):
        check_equal(tuple(rows.shape), (12 * k, width), f"the shape of rows for {name}", of=of)
        check_equal(its.cpu(), offsets, f"the offsets for {name}", of=of)
        own = getattr(ours, name)
        check_true(
            weight.data_ptr() == own.data_ptr() and weight.shape == own.shape,
            f"multiply gets another tensor than the block's {name}",
            of=of,
        )


def fake(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Take the place of a product where nothing may be looked at."""
    return x.new_zeros(len(x), weight.shape[1])


@norms
def test_block_does_not_wait_for_the_device(norm):
    shape = SHAPE | {"norm_topk_prob": norm}
    _, ours = blocks_of(shape, fake)
    x = random(3, 4, 20)
    check_equal(tuple(ours(x).shape), (3, 4, 20), "the shape", of=of_block(shape, x))
    with without_waiting():
        got = ours(x)
    check_equal(tuple(got.shape), (3, 4, 20), "the shape", of=of_block(shape, x))


# How much each expert has to do.


def counted(block: nn.Module, x: Tensor, k: int) -> Tensor:
    """Count the tokens of each expert, in float64."""
    logits = x.reshape(-1, x.shape[-1]).double() @ block.gate.weight.double().T
    ids = logits.topk(k).indices.flatten().tolist()
    return torch.tensor([ids.count(e) for e in range(len(block.gate.weight))])


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("size", [(1,), (2, 9), (40,)], ids=str)
def test_load_counts_tokens(size, k):
    shape = SHAPE | {"num_experts_per_tok": k}
    _, ours = blocks_of(shape)
    counter, expected = ours.tokens_per_expert, torch.zeros(5, dtype=torch.int64)
    for number in range(3):
        x = random(*size, 20, seed=number)
        ours(x)
        expected += counted(ours, x, k)
        of = of_block(shape, x, f"; after {number + 1} passes")
        check_equal(ours.tokens_per_expert.cpu(), expected, "tokens_per_expert", of=of)
        same = ours.tokens_per_expert.data_ptr() == counter.data_ptr()
        check_true(same, "tokens_per_expert is another tensor than before the pass", of=of)
    total = 3 * k * math.prod(size)
    check_equal(int(ours.tokens_per_expert.sum()), total, "tokens of all experts together")


def test_load_is_counted_with_and_without_inference_mode():
    _, ours = blocks_of(SHAPE)
    x = random(4, 20)
    with torch.inference_mode():
        ours(x)
    ours(x)
    with torch.inference_mode():
        ours(x)
    check_equal(ours.tokens_per_expert.cpu(), 3 * counted(ours, x, 2), "tokens_per_expert")


def test_load_of_one_block_is_not_that_of_another():
    blocks = [blocks_of(SHAPE, seed=seed)[1] for seed in (0, 1)]
    x = random(6, 20)
    for block in blocks:
        block(x)
    for number, block in enumerate(blocks):
        of = f"block {number} of two, after a pass of each"
        check_equal(block.tokens_per_expert.cpu(), counted(block, x, 2), "tokens_per_expert", of=of)


class Waiting(TorchFunctionMode):
    """Counts how often the host asks for what a tensor holds."""

    ASKING = ("tolist", "item", "cpu", "numpy", "__int__", "__index__", "__iter__", "__array__")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += getattr(function, "__name__", "") in self.ASKING
        return function(*args, **(kwargs or {}))


LAYERS = {
    "all sparse": {},
    "every second": {"decoder_sparse_step": 2, "num_hidden_layers": 5},
    "one left out": {"mlp_only_layers": [1]},
    "only the last": {"mlp_only_layers": [0, 1]},
    "none": {"mlp_only_layers": [0, 1, 2]},
}


def is_sparse(shape: dict, index: int) -> bool:
    """Say which layers of transformers' model are sparse."""
    config = oracle_config(shape)
    layer = qwen3_moe.Qwen3MoeDecoderLayer(config, index)
    return isinstance(layer.mlp, qwen3_moe.Qwen3MoeSparseMoeBlock)


def model_of(shape: dict) -> nn.Module:
    """Build a model with random weights from the lab's blocks."""
    config, experts = configs_of(shape)
    model = qwen.Qwen(config, lambda config, index: moe.build_mlp(config, experts, index))
    return fill(model).to(DEVICE)


@pytest.mark.parametrize("case", LAYERS)
def test_load_of_a_model(case):
    shape = SHAPE | LAYERS[case]
    model = model_of(shape)
    sparse = [i for i in range(shape["num_hidden_layers"]) if is_sparse(shape, i)]
    expected = {i: [0] * 5 for i in sparse}
    of = f"expert_load of a model, of which these layers are sparse: {sparse}"
    check_equal(moe.expert_load(model), expected, "the load before the first pass", of=of)
    for number in range(2):
        run(model, integers([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]) + number)
        expected = {i: model.layers[i].mlp.tokens_per_expert.tolist() for i in sparse}
        check_equal(moe.expert_load(model), expected, "the load", of=of)
        totals = {i: sum(counts) for i, counts in expected.items()}
        check_equal(totals, dict.fromkeys(sparse, 20 * (number + 1)), "tokens × experts", of=of)


def test_load_of_a_model_without_experts():
    model = fill(qwen.Qwen(configs_of(SHAPE)[0]))
    check_equal(moe.expert_load(model), {}, "the load of a dense model")


def test_load_waits_for_the_device_once():
    model = model_of(SHAPE | {"num_hidden_layers": 6})
    with Waiting() as seen:
        moe.expert_load(model)
    what = f"the host asks {seen.count} times for what tensors hold, for 6 layers"
    check_true(seen.count <= 1, what)


# Which layers are sparse.

STEPS = [
    (step, only, count)
    for step, only, count in [
        (1, [], 4), (2, [], 5), (3, [], 7), (4, [], 4), (9, [], 4), (1, [0], 3), (1, [2], 3),
        (1, [0, 1, 2], 3), (2, [1], 6), (2, [0, 2], 6), (3, [2, 8], 9), (2, [5, 1], 6),
    ]
]  # fmt: skip


@pytest.mark.parametrize("step, only, num_layers", STEPS, ids=str)
def test_build_mlp(step, only, num_layers):
    shape = SHAPE | {
        "decoder_sparse_step": step,
        "mlp_only_layers": only,
        "num_hidden_layers": num_layers,
    }
    of = f"build_mlp with decoder_sparse_step {step}, mlp_only_layers {only}"
    for index in range(num_layers):
        block = moe.build_mlp(*configs_of(shape), index)
        kind = "MoE" if is_sparse(shape, index) else "MLP"
        check_equal(
            type(block).__name__, kind, f"the block of layer {index} of {num_layers}", of=of
        )


def test_build_mlp_makes_blocks_of_the_right_widths():
    config, experts = configs_of(SHAPE | {"decoder_sparse_step": 2})
    dense, sparse = (moe.build_mlp(config, experts, index) for index in (0, 1))
    check_true(isinstance(dense, mlp.MLP), "layer 0 is not week 1's MLP", of="build_mlp")
    check_true(isinstance(sparse, moe.MoE), "layer 1 is not your MoE", of="build_mlp")
    check_equal(tuple(dense.up_proj.weight.shape), (37, 20), "up_proj of the dense layer")
    check_equal(tuple(sparse.gate_up_proj.shape), (5, 22, 20), "gate_up_proj of the sparse layer")


# The whole model.


def attend(layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention among the tokens of the call, by torch."""
    k, v = (part.repeat_interleave(q.shape[-3] // k.shape[-3], -3) for part in (k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def run(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Compute the logits of every token."""
    positions = torch.arange(input_ids.shape[-1], device=DEVICE).expand(input_ids.shape)
    with torch.no_grad():
        return model.logits(model(input_ids, positions, attend))


MODELS = {
    "all sparse": {},
    "weights as they are": {"norm_topk_prob": False},
    "every second": {"decoder_sparse_step": 2},
    "every third": {"decoder_sparse_step": 3, "num_hidden_layers": 4, "norm_topk_prob": False},
    "a step beyond the last layer": {"decoder_sparse_step": 4},
    "the first one dense": {"mlp_only_layers": [0]},
    "a step and a list": {
        "decoder_sparse_step": 2, "mlp_only_layers": [1], "num_hidden_layers": 4,
    },
    "one expert a token": {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "all experts for each token": {"num_experts_per_tok": 5, "norm_topk_prob": False},
    "one expert": {"num_experts": 1, "num_experts_per_tok": 1},
    "many experts": {"num_experts": 37, "num_experts_per_tok": 6},
    "experts as wide as dense layers": {"moe_intermediate_size": 37, "decoder_sparse_step": 2},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True},
}  # fmt: skip


@functools.cache
def oracle_model(case: str) -> nn.Module:
    """Make transformers' model, with weights of which no two agree by habit."""
    model = fill(qwen3_moe.Qwen3MoeForCausalLM(oracle_config(SHAPE | MODELS[case])))
    model.tie_weights()
    return model


@functools.cache
def folder_of(case: str, folder: Path) -> Path:
    """Write a model as transformers does, once."""
    oracle_model(case).save_pretrained(folder / case)
    return folder / case


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("moe")


def random_ids(*size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SHAPE["vocab_size"], size, generator=generator)


def expected_logits(case: str, input_ids: Tensor) -> Tensor:
    with torch.no_grad():
        return oracle_model(case)(input_ids.view(-1, input_ids.shape[-1])).logits.view(
            *input_ids.shape, -1
        )


@pytest.mark.parametrize("size", [(1,), (11,), (3, 6)], ids=str)
@pytest.mark.parametrize("case", MODELS)
def test_model_is_that_of_transformers(case, size, folder):
    model = moe.load_model(folder_of(case, folder), device=DEVICE)
    input_ids = random_ids(*size)
    of = f"a Qwen3-MoE model ({case}), logits of ids {tuple(input_ids.shape)}"
    got = run(model, input_ids.to(DEVICE))
    check_close(got, expected_logits(case, input_ids), tolerance=3e-5, of=of)


@pytest.mark.parametrize("case", ["all sparse", "weights as they are", "a step and a list"])
def test_model_through_a_cache(case, folder):
    """Prefill, then token by token, through week 2's cache."""
    model = moe.load_model(folder_of(case, folder), device=DEVICE)
    next_logits, ids = kv_cache.CachedLogits(model), random_ids(14, seed=1)
    expected = expected_logits(case, ids)
    for length in (6, 7, 8, 12, 13, 14):
        got = next_logits(ids[:length].tolist())
        of = f"a Qwen3-MoE model ({case}) through week 2's cache, scores behind {length} tokens"
        check_close(got, expected[length - 1], tolerance=3e-5, of=of)


class Paging:
    """Two sequences in a paged pool of blocks of four, as week 3's engine runs them."""

    TABLES = ((5, 1, 7, 0), (2, 6, 3, 4))

    def __init__(self, model: nn.Module, ids: Sequence[Tensor]):
        self.model, self.ids, self.lengths = model, ids, [0, 0]
        self.cache = paged.paged_cache_for(model, 8, 4)

    def step(self, counts: Sequence[int]) -> list[Tensor]:
        """Compute so many more tokens of each; returns the logits of those."""
        spans = [(n, n + count) for n, count in zip(self.lengths, counts, strict=True)]
        self.lengths = [end for _, end in spans]
        places = [(row, at) for row, span in enumerate(spans) for at in range(*span)]
        batch = paged.PagedBatch(
            integers([4 * self.TABLES[row][at // 4] + at % 4 for row, at in places]),
            integers(self.TABLES),
            integers([0, *itertools.accumulate(counts)]),
            integers(self.lengths),
            num_decodes=2 if max(counts) == 1 else 0,
            max_seqlen_q=max(counts),
        )
        tokens = torch.cat([x[a:b] for x, (a, b) in zip(self.ids, spans, strict=True)])
        positions = integers([at for _, at in places])
        with torch.inference_mode():
            hidden = self.model(tokens.to(DEVICE), positions, paged.paged_attend(self.cache, batch))
            return list(self.model.logits(hidden).split(list(counts)))


@pytest.mark.parametrize("case", ["all sparse", "weights as they are", "a step and a list"])
def test_model_through_a_paged_pool(case, folder):
    """Chunks of two prompts, then a token of each in every step."""
    model = moe.load_model(folder_of(case, folder), device=DEVICE)
    ids = [random_ids(13, seed=2), random_ids(9, seed=3)]
    paging, expected = Paging(model, ids), [expected_logits(case, x) for x in ids]
    done = [0, 0]
    for counts in ((5, 3), (4, 2), (1, 1), (1, 1), (2, 2)):
        for row, got in enumerate(paging.step(counts)):
            start, done[row] = done[row], done[row] + counts[row]
            of = f"a Qwen3-MoE model ({case}) in a paged pool, tokens {start} to {done[row] - 1} "
            of += f"of sequence {row}"
            check_close(got, expected[row][start : done[row]], tolerance=3e-5, of=of)


@pytest.mark.parametrize("case", ["all sparse", "weights as they are"])
def test_model_gives_a_token_the_same_in_any_batch(case, folder):
    model = moe.load_model(folder_of(case, folder), device=DEVICE)
    input_ids = random_ids(4, 9, seed=5).to(DEVICE)
    together = run(model, input_ids)
    for row in range(4):
        of = f"a Qwen3-MoE model ({case}), sequence {row} of 4 against the same alone"
        check_close(together[row], run(model, input_ids[row]).cpu(), tolerance=3e-5, of=of)


def test_model_in_bfloat16(folder):
    model = moe.load_model(folder_of("all sparse", folder), torch.bfloat16, DEVICE)
    dtypes = {parameter.dtype for parameter in model.parameters()}
    check_equal(dtypes, {torch.bfloat16}, "the dtypes of a model loaded in bfloat16")
    logits = run(model, random_ids(2, 7).to(DEVICE))
    check_true(bool(logits.isfinite().all()), "there are NaN or Inf among its logits")
    load = moe.expert_load(model)
    check_equal({i: sum(x) for i, x in load.items()}, dict.fromkeys(range(3), 28), "its load")


def test_model_is_loaded_with_counters_at_zero(folder):
    model = moe.load_model(folder_of("every second", folder), device=DEVICE)
    check_equal(moe.expert_load(model), {1: [0] * 5}, "the load of a model that was just loaded")
    run(model, random_ids(8).to(DEVICE))
    check_equal(sum(moe.expert_load(model)[1]), 16, "tokens × experts after 8 tokens")
