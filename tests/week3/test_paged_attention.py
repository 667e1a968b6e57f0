"""Grades week3/paged_attention: a pool of blocks, what is stored there, and attention over it."""

import contextlib
import itertools
import math
import random as python_random
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.qwen2.modeling_qwen2 import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3Config, Qwen3ForCausalLM

from course.grading import History, check_close, check_equal, check_true, lab
from course.launches import without_waiting

paged = lab("week3/paged_attention")
qwen = lab("week1/qwen")

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
BLOCK_SIZES = (4, 1, 16)
# What another sequence may have left in a slot: finite in the range of float16, or not.
FILLINGS = (3e4, -3e4, math.inf, -math.inf, math.nan)
HEADS = [(1, 1), (3, 3), (8, 2), (7, 1), (14, 2)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Signed values with a few outliers, which other orders of axes would put elsewhere."""
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape))
    values = torch.randn(shape, generator=generator)
    values[values.abs() > 2] *= 5
    return values.to(dtype)


def integers(values: Sequence) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


@contextlib.contextmanager
def unwritten_memory_is_nan() -> Iterator[None]:
    """Let memory that torch has not written hold NaN, where it often happens to hold zeros."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class Made(TorchDispatchMode):
    """Counts the elements of all tensors that are made, views apart."""

    def __init__(self, *given: Tensor):
        super().__init__()
        # What was made stays alive, so that its memory is not taken for something else's.
        self.storages = {x.untyped_storage().data_ptr(): x for x in given}
        self.num_elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.numel():
                start = x.untyped_storage().data_ptr()
                if start not in self.storages:
                    self.storages[start] = x
                    self.num_elements += x.untyped_storage().nbytes() // x.itemsize
        return result


# Layouts in which a tensor (heads, tokens, head_dim) may come.


def of_tokens(x: Tensor) -> Tensor:
    """All heads of a token lie side by side."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def of_a_merged_projection(x: Tensor) -> Tensor:
    """A part of each token's numbers, other parts around it."""
    heads, tokens, head_dim = x.shape
    held = torch.full((tokens, 3, heads, head_dim), math.nan, dtype=x.dtype)
    held[:, 1] = x.transpose(0, 1)
    return held[:, 1].transpose(0, 1)


def of_columns(x: Tensor) -> Tensor:
    """The numbers of a head lie far apart."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def every_other(x: Tensor) -> Tensor:
    """Something else lies between any two numbers."""
    held = torch.full([2 * size for size in x.shape], math.nan, dtype=x.dtype)
    held[::2, ::2, ::2] = x
    return held[::2, ::2, ::2]


LAYOUTS: list[Callable[[Tensor], Tensor]] = [
    of_tokens,
    of_a_merged_projection,
    of_columns,
    every_other,
]
by_name = {"ids": lambda layout: layout.__name__}


# The pool.

# num_layers, num_blocks, block_size, num_kv_heads, head_dim
SHAPES = [(2, 7, 4, 3, 5), (1, 1, 1, 1, 1), (3, 5, 16, 2, 6), (4, 9, 1, 5, 3)]


def of_pool(shape: Sequence[int], dtype: torch.dtype) -> str:
    names = ("num_layers", "num_blocks", "block_size", "num_kv_heads", "head_dim")
    inside = ", ".join(f"{name}={size}" for name, size in zip(names, shape, strict=True))
    return f"PagedKVCache({inside}, dtype={dtype})"


@pytest.mark.parametrize("shape, dtype", list(zip(SHAPES, DTYPES, strict=True)), ids=str)
def test_pool_is_zeros_at_first(shape, dtype):
    num_layers, num_blocks, block_size, num_kv_heads, head_dim = shape
    with unwritten_memory_is_nan():
        cache = paged.PagedKVCache(*shape, dtype=dtype)
    expected = torch.zeros(num_layers, num_blocks, num_kv_heads, block_size, head_dim, dtype=dtype)
    for name in ("keys", "values"):
        of = f"{of_pool(shape, dtype)}\n{name}"
        check_close(getattr(cache, name), expected, tolerance=0.0, of=of)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pool_is_float32_if_nothing_is_said(shape):
    cache = paged.PagedKVCache(*shape)
    of = of_pool(shape, "not given")
    check_equal(cache.keys.dtype, torch.float32, "dtype of keys", of=of)
    check_equal(cache.values.device, torch.device("cpu"), "device of values", of=of)


@pytest.mark.parametrize("shape, dtype", list(zip(SHAPES, DTYPES, strict=True)), ids=str)
def test_pool_counts_its_bytes(shape, dtype):
    cache, of = paged.PagedKVCache(*shape, dtype=dtype), of_pool(shape, dtype)
    expected = 2 * math.prod(shape) * dtype.itemsize
    check_equal(cache.nbytes, expected, "nbytes", of=of)
    parts = [part.untyped_storage() for part in (cache.keys, cache.values)]
    memory = sum({part.data_ptr(): part.nbytes() for part in parts}.values())
    check_equal(memory, expected, "bytes of memory behind keys and values", of=of)
    cache.values.fill_(2.0)
    cache.keys.fill_(7.0)
    of = f"{of}; values are filled with 2, and then keys with 7"
    check_close(cache.values, torch.full_like(cache.keys, 2.0), of=f"{of}: the values")
    check_equal(cache.nbytes, expected, "nbytes when tokens are stored", of=of)


def test_pool_of_a_real_model_in_bytes():
    shape = 28, 2048, 16, 8, 128
    cache = paged.PagedKVCache(*shape, torch.bfloat16, "meta")
    of = f"{of_pool(shape, torch.bfloat16)}, on the meta device"
    check_equal(cache.nbytes, 2048 * 16 * 114_688, "nbytes", of=of)
    check_equal({cache.keys.device.type, cache.values.device.type}, {"meta"}, "devices", of=of)


# What is stored.


def other_slots(num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, dtype, seed):
    """Make one layer of a pool in which every slot holds something, some of them NaN."""
    part = random(num_blocks, num_kv_heads, block_size, head_dim, seed=seed, dtype=dtype)
    part[::3] = math.nan
    return part


def stored(part: Tensor, new: Tensor, slots: Sequence[int]) -> Tensor:
    """Put tokens into a copy of a layer, number by number of the contract."""
    part, block_size = part.clone(), part.shape[2]
    for token, slot in enumerate(slots):
        if slot != -1:
            part[slot // block_size, :, slot % block_size] = new[:, token]
    return part


def check_store(
    slots: Sequence[int],
    num_blocks: int = 5,
    num_kv_heads: int = 3,
    block_size: int = 4,
    head_dim: int = 6,
    dtype: torch.dtype = torch.float32,
    layouts: tuple = (of_tokens, of_tokens),
    note: str = "",
) -> None:
    """Store tokens in slots; hold the whole layer, and what was handed in, to the contract."""
    sizes = num_blocks, num_kv_heads, block_size, head_dim, dtype
    keys, values = other_slots(*sizes, seed=1), other_slots(*sizes, seed=2)
    new = [random(num_kv_heads, len(slots), head_dim, seed=s, dtype=dtype) for s in (3, 4)]
    for token, slot in enumerate(slots):
        if slot == -1:
            new[0][:, token] = math.nan
    k, v = (layout(x) for layout, x in zip(layouts, new, strict=True))
    expected = [stored(part, x, slots) for part, x in zip((keys, values), new, strict=True)]
    where = integers(slots)
    paged.store_kv(k, v, keys, values, where)
    of = f"store_kv of {len(slots)} tokens into the slots {list(slots)[:20]} of a layer of "
    of += f"{num_blocks} blocks of {block_size}, {num_kv_heads} kv heads, {dtype}{note}"
    for name, got, want in zip(("keys", "values"), (keys, values), expected, strict=True):
        check_close(got, want, tolerance=0.0, of=f"{of}\nall {name} of the layer")
    for name, got, want in zip("kv", (k, v), new, strict=True):
        check_close(got, want, tolerance=0.0, of=f"{of}\n{name} after the call")
    check_equal(where, integers(slots), "slots after the call", of=of)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_store_puts_tokens_into_their_slots(block_size, dtype):
    slots = python_random.Random(block_size).sample(range(5 * block_size), 2 * block_size + 1)
    check_store(slots, block_size=block_size, dtype=dtype)


SLOTS = {
    "one": [6],
    "the first": [0],
    "the last": [19],
    "a block": [8, 9, 10, 11],
    "over the edge of a block": [6, 7, 8],
    "from one block to one before it": [18, 19, 4, 5],
    "backwards": [9, 8, 7, 6],
    "all": list(range(20)),
    "far apart": [0, 19, 7, 12],
}


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("case", SLOTS)
def test_store_into(case, num_kv_heads):
    check_store(SLOTS[case], num_kv_heads=num_kv_heads)


@pytest.mark.parametrize(
    "slots",
    [[-1], [-1, -1, -1], [5, -1], [-1, 5], [3, -1, -1, 0, -1, 11], [19, -1], [-1, 0, 16]],
    ids=str,
)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_store_leaves_padding_out(block_size, slots):
    slots = [slot if slot < 5 * block_size else slot % 5 for slot in slots]
    check_store(slots, block_size=block_size, note="; the k of tokens with slot -1 are NaN")


@pytest.mark.parametrize("layout", LAYOUTS, **by_name)
def test_store_with_any_strides(layout):
    check_store([3, 9, -1, 18, 4], layouts=(layout, layout), note=f"\nk, v: {layout.__doc__}")


@pytest.mark.parametrize(
    "layouts",
    [(of_columns, of_tokens), (of_tokens, every_other)],
    ids=["columns and tokens", "tokens and every other"],
)
def test_store_with_other_strides_for_each(layouts):
    check_store([3, 9, -1, 18, 4], layouts=layouts, note=f"\nk: {layouts[0].__doc__}")


@settings(max_examples=25)
@given(st.data())
def test_store_into_any_slots(data):
    block_size, num_blocks = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    places = st.integers(0, block_size * num_blocks - 1)
    slots = data.draw(st.lists(places, min_size=1, unique=True))
    slots += [-1] * data.draw(st.integers(0, 3))
    slots = data.draw(st.permutations(slots))
    num_kv_heads = data.draw(st.integers(1, 4))
    check_store(slots, num_blocks, num_kv_heads, block_size, data.draw(st.integers(1, 5)))


def test_store_keeps_copies():
    cache = paged.PagedKVCache(1, 3, 4, 2, 5)
    k, v = random(2, 2, 5, seed=1), random(2, 2, 5, seed=2)
    before = k.clone()
    paged.store_kv(k, v, cache.keys[0], cache.values[0], integers([7, 1]))
    k.fill_(9.0)
    got = cache.keys[0][[1, 0], :, [3, 1]].transpose(0, 1)
    check_close(got, before, of="store_kv into slots 7 and 1, then the caller changes its k")


# Attention over sequences that lie in a pool.


def attend_in_float64(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Let the last tokens of one sequence look at it, each up to itself, by torch in float64.

    q: (num_heads, tokens, head_dim). k, v: (num_kv_heads, num_keys, head_dim).
    """
    tokens, num_keys = q.shape[1], k.shape[1]
    if tokens == 0:
        return q.double()
    mask = torch.ones(tokens, num_keys, dtype=torch.bool).tril(num_keys - tokens)
    group = q.shape[0] // k.shape[0]
    k, v = (part.double().repeat_interleave(group, 0) for part in (k, v))
    return scaled_dot_product_attention(q.double(), k, v, attn_mask=mask)


def unowned(size: Sequence[int], filling: float | None, dtype: torch.dtype, seed: int) -> Tensor:
    """Make memory that belongs to nobody; filling: what it holds, None for any numbers."""
    if filling is None:
        return random(*size, seed=seed, dtype=dtype)
    return torch.full(size, filling, dtype=dtype)


class Pages:
    """Some sequences, each laid out densely, and the same in the blocks of a pool.

    lengths: how many tokens each has. heads: num_heads and num_kv_heads. filling: what lies in all
    other slots; None stands for numbers as likely as any. in_order: whether the blocks of the
    sequences follow each other in the pool. num_spare: blocks of the pool that nobody holds.
    num_shared: of all sequences' first blocks, the same ones.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        block_size: int = 4,
        heads: tuple[int, int] = (8, 2),
        head_dim: int = 6,
        dtype: torch.dtype = torch.float32,
        filling: float | None = None,
        in_order: bool = False,
        num_spare: int = 3,
        num_shared: int = 0,
        seed: int = 0,
    ):
        self.lengths, self.block_size, self.dtype = list(lengths), block_size, dtype
        self.num_heads, num_kv_heads = heads
        self.filling = filling
        counts = [-(-length // block_size) for length in lengths]
        self.num_blocks = sum(counts) + num_spare
        ids = list(range(self.num_blocks))
        draw = python_random.Random(f"{self.lengths} {block_size} {seed}")
        if not in_order:
            draw.shuffle(ids)
        self.tables = [[ids.pop(0) for _ in range(count)] for count in counts]
        for table in self.tables:
            table[:num_shared] = self.tables[0][:num_shared]
        size = self.num_blocks, num_kv_heads, block_size, head_dim
        self.keys, self.values = (unowned(size, filling, dtype, seed=s) for s in (7, 8))
        self.dense: list[tuple[Tensor, Tensor]] = []
        for i, length in enumerate(lengths):
            k, v = (
                random(num_kv_heads, length, head_dim, seed=seed + 10 * i + part, dtype=dtype)
                for part in (1, 2)
            )
            if num_shared and i:
                common = num_shared * block_size
                k[:, :common], v[:, :common] = (x[:, :common] for x in self.dense[0])
            self.dense.append((k, v))
            for position in range(length):
                block, place = self.tables[i][position // block_size], position % block_size
                self.keys[block, :, place] = k[:, position]
                self.values[block, :, place] = v[:, position]

    def block_tables(self, seed: int = 0, num_more: int = 2) -> Tensor:
        """Make the tables one tensor; behind those of a sequence stand blocks of anybody."""
        draw = python_random.Random(seed)
        width = max(map(len, self.tables)) + num_more
        rows = [
            table + draw.choices(range(self.num_blocks), k=width - len(table))
            for table in self.tables
        ]
        return integers(rows)

    def queries(self, num_tokens: int, seed: int = 5) -> Tensor:
        """Draw q, (num_heads, num_tokens, head_dim)."""
        size = self.num_heads, num_tokens, self.keys.shape[3]
        return random(*size, seed=seed, dtype=self.dtype)

    def __str__(self) -> str:
        tables = ", ".join(map(str, self.tables)) if self.num_blocks <= 20 else "…"
        heads = f"{self.num_heads} and {self.keys.shape[1]} heads of {self.keys.shape[3]}"
        text = f"sequences of {self.lengths} tokens, {heads}, {str(self.dtype)[6:]}; blocks of "
        held = "other numbers" if self.filling is None else f"{self.filling:g}"
        text += f"{self.block_size}, tables {tables}; all other slots hold {held}"
        return text


def expected_prefill(pages: Pages, q: Tensor, counts: Sequence[int]) -> Tensor:
    """Let the last tokens of each sequence look at it, sequence by sequence."""
    parts = q.split(list(counts), 1)
    outs = [attend_in_float64(part, *kv) for part, kv in zip(parts, pages.dense, strict=True)]
    return torch.cat(outs, 1)


def prefill(pages: Pages, q: Tensor, counts: Sequence[int], **others) -> Tensor:
    """Call paged_prefill for so many last tokens of each sequence."""
    arguments = {
        "block_tables": pages.block_tables(),
        "cu_seqlens_q": integers([0, *itertools.accumulate(counts)]),
        "seq_lens": integers(pages.lengths),
        "max_seqlen_q": max(counts),
    } | others
    return paged.paged_prefill(q, pages.keys, pages.values, *arguments.values())


def check_prefill(pages: Pages, counts: Sequence[int], note: str = "", **others) -> None:
    """Hold paged_prefill against the oracle."""
    q = others.pop("q", None)
    q = pages.queries(sum(counts)) if q is None else q
    of = f"paged_prefill of the last {list(counts)} tokens of {pages}{note}"
    got = prefill(pages, q, counts, **others)
    check_close(got, expected_prefill(pages, q, counts), dtype=pages.dtype, of=of)


# What each sequence has, and how many of its tokens are computed in this pass.
CHUNKS = {
    "one token": ([1], [1]),
    "a prompt": ([7], [7]),
    "a prompt of whole blocks": ([16], [16]),
    "prompts": ([5, 1, 16, 9], [5, 1, 16, 9]),
    "last tokens": ([5, 1, 16, 9], [1, 1, 1, 1]),
    "the next chunk": ([11], [4]),
    "chunks": ([11, 6, 33], [4, 2, 30]),
    "a sequence without tokens": ([8, 5, 3], [3, 0, 2]),
    "sequences without tokens at both ends": ([6, 9, 1, 17], [0, 8, 1, 0]),
    "a long one beside a short one": ([70, 2], [66, 1]),
    "a short one beside a long one": ([2, 70], [2, 3]),
}


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("case", CHUNKS)
def test_prefill_matches_torch(case, block_size):
    lengths, counts = CHUNKS[case]
    check_prefill(Pages(lengths, block_size), counts)


@pytest.mark.parametrize("head_dim", [1, 10, 80])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_prefill_with_any_heads(heads, head_dim):
    check_prefill(Pages([11, 6, 3], 4, heads, head_dim), [4, 6, 1])


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_prefill_in_other_dtypes(dtype, block_size):
    check_prefill(Pages([11, 6, 18], block_size, (7, 1), 10, dtype), [4, 6, 1])


@pytest.mark.parametrize("count", [1, 3, 4, 5, 9])
@pytest.mark.parametrize("num_before", [3, 4, 5, 8])
def test_prefill_of_a_chunk_near_the_edge_of_a_block(num_before, count):
    check_prefill(Pages([num_before + count], 4), [count], f"; {num_before} tokens stand before")


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("filling", FILLINGS)
def test_prefill_does_not_look_at_other_slots(filling, block_size):
    check_prefill(Pages([5, 1, 18], block_size, filling=filling), [5, 1, 3])


@pytest.mark.parametrize("seed", range(4))
def test_prefill_does_not_look_behind_a_table(seed):
    pages = Pages([5, 1, 18])
    check_prefill(pages, [2, 1, 3], block_tables=pages.block_tables(seed, 4 * seed))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_prefill_of_shared_blocks(block_size):
    pages = Pages([40, 35, 37], block_size, num_shared=32 // block_size)
    check_prefill(pages, [8, 2, 37], "; the first 32 tokens of all three are the same blocks")


@pytest.mark.parametrize("max_seqlen_q", [5, 6, 16, 1000])
def test_prefill_with_room_for_longer_sequences(max_seqlen_q):
    note = f"; max_seqlen_q {max_seqlen_q}"
    check_prefill(Pages([9, 3, 5]), [5, 1, 2], note, max_seqlen_q=max_seqlen_q)


@pytest.mark.parametrize("layout", LAYOUTS, **by_name)
def test_prefill_with_any_strides(layout):
    pages = Pages([9, 3, 5])
    check_prefill(pages, [5, 1, 2], f"\nq: {layout.__doc__}", q=layout(pages.queries(8)))


def own_nan(call: Callable[[Pages], Tensor], what: str) -> None:
    """A sequence whose own value is no number gets none there; a broken model must show."""
    pages = Pages((6, 9), 4)
    block, place = pages.tables[1][3 // 4], 3 % 4
    pages.values[block, :, place, 0] = math.nan
    broken = call(pages).isnan().any(-1)
    check_equal(broken.tolist(), [False, True], "whether a number of each is NaN", of=what)


def test_prefill_shows_what_is_broken():
    what = "paged_prefill of the last token of two sequences; the second has a NaN of its own"
    own_nan(lambda pages: prefill(pages, pages.queries(2), [1, 1])[0], what)


def test_decode_shows_what_is_broken():
    what = "paged_decode of two sequences; the second has a NaN of its own"
    own_nan(lambda pages: decode(pages, pages.queries(2).transpose(0, 1))[:, 0], what)


def test_prefill_of_a_layer_among_others():
    pages = Pages([9, 3, 5])
    whole = random(2, 3, *pages.keys.shape)
    whole[0, 1], whole[1, 1] = pages.keys, pages.values
    pages.keys, pages.values = whole[0, 1], whole[1, 1]
    check_prefill(pages, [5, 1, 2], "; keys and values are one layer of three")


def test_prefill_of_large_scores():
    pages = Pages([30, 12], 4, (4, 2), 16)
    q = pages.queries(14).round() * 100
    for part in pages.keys, *(k for k, _ in pages.dense):
        part.copy_(part.round())
    check_prefill(pages, [10, 4], "; scores of some thousands", q=q)


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_prefill_computes_in_float32(dtype):
    pages = Pages([9, 30], 4, (2, 1), 64, dtype)
    for part in pages.keys, *(k for k, _ in pages.dense):
        part.mul_(0.1).add_(43)
    q = pages.queries(12) * 2 + 50
    check_prefill(pages, [9, 3], "; scores near 140,000 before they are scaled", q=q)


def test_prefill_wherever_the_blocks_lie():
    ordered, mixed = Pages([11, 6, 33], in_order=True), Pages([11, 6, 33])
    counts = [4, 2, 30]
    q = ordered.queries(36)
    expected = prefill(ordered, q, counts)
    of = f"paged_prefill of the last {counts} tokens of {mixed}\nagainst yours for the tables "
    of += ", ".join(map(str, ordered.tables))
    check_close(prefill(mixed, q, counts), expected, of=of)
    check_prefill(mixed, counts)


@pytest.mark.parametrize("ends", [(4, 8, 20), (1, 2, 3, 20), (3, 4, 5, 20), (19, 20), (7, 20)])
def test_prefill_of_chunks_equals_prefill_of_the_whole(ends):
    whole = Pages([20])
    q = whole.queries(20)
    expected = prefill(whole, q, [20])
    for start, end in itertools.pairwise((0, *ends)):
        chunk = Pages([20])
        chunk.lengths = [end]
        of = f"paged_prefill of tokens {start} to {end - 1} of {chunk}\n"
        of += "against the same tokens of the whole sequence at once, both yours"
        got = prefill(chunk, q[:, start:end], [end - start])
        check_close(got, expected[:, start:end], of=of)
    check_prefill(whole, [20], q=q)


@settings(max_examples=25)
@given(st.data())
def test_prefill_of_any_sequences(data):
    lengths = data.draw(st.lists(st.integers(1, 24), min_size=1, max_size=5))
    counts = [data.draw(st.integers(0, length)) for length in lengths]
    heads = data.draw(st.sampled_from(HEADS))
    pages = Pages(lengths, data.draw(st.sampled_from([1, 3, 4, 16])), heads, 4)
    check_prefill(pages, counts, max_seqlen_q=max(counts) + 1)


def check_untouched(arguments: dict[str, object], call: Callable[..., object], of: str) -> None:
    """Hold a call to leaving its tensors as they were."""
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, Tensor)}
    call(*arguments.values())
    for name, old in before.items():
        if old.is_floating_point():
            check_close(arguments[name], old, tolerance=0.0, of=f"{of}\n{name} after the call")
        else:
            check_equal(arguments[name], old, f"{name} after the call", of=of)


def test_prefill_leaves_its_arguments_alone():
    pages = Pages([9, 3, 5])
    arguments = {
        "q": pages.queries(8),
        "keys": pages.keys,
        "values": pages.values,
        "block_tables": pages.block_tables(),
        "cu_seqlens_q": integers([0, 5, 6, 8]),
        "seq_lens": integers(pages.lengths),
        "max_seqlen_q": 5,
    }
    check_untouched(arguments, paged.paged_prefill, f"paged_prefill of {pages}")


def check_made(made: Made, most: int, of: str) -> None:
    text = f"tensors of {made.num_elements:,} elements were made, all together; {most:,} are plenty"
    check_true(made.num_elements <= most, text, of=of)


def test_prefill_makes_nothing_of_the_pools_size():
    pages = Pages([40, 9], 16, (4, 2), 4, num_spare=2000)
    q, tables = pages.queries(14), pages.block_tables()
    arguments = q, pages.keys, pages.values, tables, integers([0, 5, 14]), integers(pages.lengths)
    with Made(*arguments) as made:
        paged.paged_prefill(*arguments, 9)
    of = f"paged_prefill of the last 5 and 9 tokens of {pages}\nkeys and values of the sequences "
    of += f"have 784 elements, those of the pool {2 * pages.keys.numel():,}"
    check_made(made, 60_000, of)


def expected_decode(pages: Pages, q: Tensor) -> Tensor:
    rows = [attend_in_float64(q[i, :, None], *kv)[:, 0] for i, kv in enumerate(pages.dense)]
    return torch.stack(rows)


def decode(pages: Pages, q: Tensor, block_tables: Tensor | None = None) -> Tensor:
    """Call paged_decode for the last token of each sequence."""
    tables = pages.block_tables() if block_tables is None else block_tables
    return paged.paged_decode(q, pages.keys, pages.values, tables, integers(pages.lengths))


def check_decode(pages: Pages, note: str = "", q: Tensor | None = None, block_tables=None) -> None:
    """Hold paged_decode against the oracle."""
    q = pages.queries(len(pages.lengths)).transpose(0, 1) if q is None else q
    got = decode(pages, q, block_tables)
    of = f"paged_decode of {pages}{note}"
    check_close(got, expected_decode(pages, q), dtype=pages.dtype, of=of)


LENGTHS = [(1,), (4,), (5,), (1, 1, 1), (5, 1, 16, 9), (64, 2, 33, 64), (3, 300, 16, 17, 2)]


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_decode_matches_torch(lengths, block_size):
    check_decode(Pages(lengths, block_size))


@pytest.mark.parametrize("head_dim", [1, 10, 80])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_decode_with_any_heads(heads, head_dim):
    check_decode(Pages([11, 6, 3], 4, heads, head_dim))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_decode_in_other_dtypes(dtype, block_size):
    check_decode(Pages([11, 6, 18], block_size, (7, 1), 10, dtype))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("filling", FILLINGS)
def test_decode_does_not_look_at_other_slots(filling, block_size):
    check_decode(Pages([5, 1, 18], block_size, filling=filling))


@pytest.mark.parametrize("seed", range(4))
def test_decode_does_not_look_behind_a_table(seed):
    pages = Pages([5, 1, 18])
    check_decode(pages, block_tables=pages.block_tables(seed, 4 * seed))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_decode_of_shared_blocks(block_size):
    pages = Pages([40, 35, 37], block_size, num_shared=32 // block_size)
    check_decode(pages, "; the first 32 tokens of all three are the same blocks")


@pytest.mark.parametrize("layout", LAYOUTS, **by_name)
def test_decode_with_any_strides(layout):
    pages = Pages([9, 3, 5])
    q = layout(pages.queries(3).transpose(0, 1))
    check_decode(pages, f"\nq, with sequences for heads: {layout.__doc__}", q)


def test_decode_of_a_layer_among_others():
    pages = Pages([9, 3, 5])
    whole = random(2, 3, *pages.keys.shape)
    whole[0, 1], whole[1, 1] = pages.keys, pages.values
    pages.keys, pages.values = whole[0, 1], whole[1, 1]
    check_decode(pages, "; keys and values are one layer of three")


def test_decode_of_large_scores():
    pages = Pages([30, 2, 12], 4, (4, 2), 16)
    for part in pages.keys, *(k for k, _ in pages.dense):
        part.copy_(part.round())
    q = pages.queries(3).transpose(0, 1).round() * 100
    check_decode(pages, "; scores of some thousands", q)


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_decode_computes_in_float32(dtype):
    pages = Pages([9, 30], 4, (2, 1), 64, dtype)
    for part in pages.keys, *(k for k, _ in pages.dense):
        part.mul_(0.1).add_(43)
    q = pages.queries(2).transpose(0, 1) * 2 + 50
    check_decode(pages, "; scores near 140,000 before they are scaled", q)


def test_decode_wherever_the_blocks_lie():
    ordered, mixed = Pages([11, 6, 33], in_order=True), Pages([11, 6, 33])
    q = ordered.queries(3).transpose(0, 1)
    of = f"paged_decode of {mixed}\nagainst yours for the tables "
    of += ", ".join(map(str, ordered.tables))
    check_close(decode(mixed, q), decode(ordered, q), of=of)
    check_decode(mixed, q=q)


@settings(max_examples=25)
@given(st.data())
def test_decode_of_any_sequences_is_that_of_each_alone(data):
    lengths = data.draw(st.lists(st.integers(1, 24), min_size=1, max_size=6))
    heads = data.draw(st.sampled_from(HEADS))
    pages = Pages(lengths, data.draw(st.sampled_from([1, 3, 4, 16])), heads, 4)
    check_decode(pages)
    q, tables = pages.queries(len(lengths)).transpose(0, 1), pages.block_tables()
    expected = expected_decode(pages, q)
    for i, length in enumerate(lengths):
        one = slice(i, i + 1)
        alone = q[one], pages.keys, pages.values, tables[one], integers([length])
        of = f"paged_decode of sequence {i} alone, of {pages}"
        check_close(paged.paged_decode(*alone), expected[one], dtype=torch.float32, of=of)


def test_decode_leaves_its_arguments_alone():
    pages = Pages([9, 3, 5])
    arguments = {
        "q": pages.queries(3).transpose(0, 1),
        "keys": pages.keys,
        "values": pages.values,
        "block_tables": pages.block_tables(),
        "seq_lens": integers(pages.lengths),
    }
    check_untouched(arguments, paged.paged_decode, f"paged_decode of {pages}")


@pytest.mark.parametrize(
    "lengths, num_spare", [([40, 9], 2000), ([2] * 40 + [3000], 3)], ids=["pool", "longest"]
)
def test_decode_makes_what_its_tokens_need(lengths, num_spare):
    pages = Pages(lengths, 16, (4, 2), 4, num_spare=num_spare)
    q, tables = pages.queries(len(lengths)).transpose(0, 1), pages.block_tables()
    arguments = q, pages.keys, pages.values, tables, integers(pages.lengths)
    with Made(*arguments) as made:
        paged.paged_decode(*arguments)
    num_tokens = sum(lengths)
    shown = f"{num_tokens:,} tokens in {len(lengths)} sequences, the longest has {max(lengths):,}"
    of = f"paged_decode of {shown}; the pool has {pages.num_blocks:,} blocks of 16\nkeys and values"
    check_made(made, 10_000 + 200 * num_tokens, f"{of} of these tokens have {16 * num_tokens:,}")


# One pass over a pool.


class Serving:
    """A pool, and sequences that grow in it, in random blocks.

    filling: what all slots hold at first; None stands for numbers as likely as any.
    dense[layer][i]: keys and values of sequence i, laid out densely. expected[layer]: all keys and
    all values of the layer, as they must be.
    """

    def __init__(
        self,
        num_seqs: int,
        block_size: int = 4,
        heads: tuple[int, int] = (8, 2),
        head_dim: int = 6,
        dtype: torch.dtype = torch.float32,
        num_layers: int = 2,
        num_blocks: int = 60,
        filling: float | None = None,
    ):
        self.block_size, self.num_heads, self.dtype = block_size, heads[0], dtype
        self.size = heads[1], head_dim
        sizes = num_layers, num_blocks, block_size, heads[1], head_dim
        self.cache = paged.PagedKVCache(*sizes, dtype=dtype)
        for seed, part in enumerate((self.cache.keys, self.cache.values)):
            part.copy_(unowned(part.shape, filling, dtype, seed))
        self.expected = [
            [part[layer].clone() for part in (self.cache.keys, self.cache.values)]
            for layer in range(num_layers)
        ]
        self.num_layers, self.seed = num_layers, 0
        self.free = list(range(num_blocks))
        python_random.Random(num_seqs).shuffle(self.free)
        self.tables: list[list[int]] = [[] for _ in range(num_seqs)]
        self.lengths = [0] * num_seqs
        empty = torch.empty(heads[1], 0, head_dim, dtype=dtype)
        self.dense = [[(empty, empty)] * num_seqs for _ in range(num_layers)]
        names = f"blocks of {block_size}, {heads[0]} and {heads[1]} heads, {str(dtype)[6:]}"
        held = "other numbers" if filling is None else f"{filling:g}"
        self.of = History(f"paged_attend over a pool that holds {held} at first; {names}")

    def draw(self, heads: int, num_tokens: int) -> Tensor:
        """Draw numbers of some tokens, in the layout of a projection."""
        self.seed += 1
        size = num_tokens, heads, self.size[1]
        return random(*size, seed=self.seed, dtype=self.dtype).transpose(0, 1)

    def plan(self, counts: Mapping[int, int], num_decodes: int, num_padding: int = 0):
        """Give sequences room for so many more tokens; returns the batch.

        counts: sequence → its tokens, in the order of the pass. num_decodes: how many of the first
        ones are decodes. num_padding: so many decodes more, of which nothing is stored.
        """
        slots: list[int] = []
        for i, count in counts.items():
            end = self.lengths[i] + count
            while len(self.tables[i]) * self.block_size < end:
                self.tables[i].append(self.free.pop())
            slots += [
                self.tables[i][position // self.block_size] * self.block_size
                + position % self.block_size
                for position in range(self.lengths[i], end)
            ]
        order = list(counts)
        rows = [
            (self.tables[i], self.lengths[i] + counts[i], counts[i]) for i in order[:num_decodes]
        ]
        rows += [([self.free[0]], 1, 1)] * num_padding
        rows += [
            (self.tables[i], self.lengths[i] + counts[i], counts[i]) for i in order[num_decodes:]
        ]
        slots[num_decodes:num_decodes] = [-1] * num_padding
        width = max(len(table) for table, _, _ in rows) + 1
        return paged.PagedBatch(
            slots=integers(slots),
            block_tables=integers(
                [(table + [self.free[-1]] * width)[:width] for table, *_ in rows]
            ),
            cu_seqlens_q=integers([0, *itertools.accumulate(count for *_, count in rows)]),
            seq_lens=integers([length for _, length, _ in rows]),
            num_decodes=num_decodes + num_padding,
            max_seqlen_q=max(count for *_, count in rows),
        )

    def store(self, layer: int, i: int, k: Tensor, v: Tensor) -> None:
        """Put tokens behind those of a sequence, densely and into what the pool must hold."""
        old_k, old_v = self.dense[layer][i]
        self.dense[layer][i] = torch.cat((old_k, k), 1), torch.cat((old_v, v), 1)
        for part, new in zip(self.expected[layer], (k, v), strict=True):
            for token in range(k.shape[1]):
                position = old_k.shape[1] + token
                block = self.tables[i][position // self.block_size]
                part[block, :, position % self.block_size] = new[:, token]

    def step(
        self,
        counts: Mapping[int, int],
        num_decodes: int | None = None,
        num_padding: int = 0,
        **doors,
    ) -> None:
        """Make one pass; hold its results and all of the pool against the oracle.

        num_decodes: None counts the sequences with one token in front.
        """
        if num_decodes is None:
            singles = itertools.takewhile(lambda count: count == 1, counts.values())
            num_decodes = len(list(singles))
        batch = self.plan(counts, num_decodes, num_padding)
        padding = f" and {num_padding} of padding" if num_padding else ""
        what = f"a pass over so many tokens of sequences {dict(counts)}, {num_decodes} decodes"
        self.of.note(f"{what}{padding}; tables {self.tables}", None)
        before = [x.clone() for x in vars(batch).values() if isinstance(x, Tensor)]
        attend = paged.paged_attend(self.cache, batch, **doors)
        num_tokens = len(batch.slots)
        real = batch.slots >= 0
        for layer in range(self.num_layers):
            q = self.draw(self.num_heads, num_tokens)
            k, v = (self.draw(self.size[0], num_tokens) for _ in range(2))
            for x in (q, k, v):
                x[:, ~real] = math.nan
            handed = [x.clone() for x in (q, k, v)]
            out = attend(layer, q, k, v)
            self.check_layer(layer, counts, [x[:, real] for x in handed], out, real)
            for name, got, want in zip("qkv", (q, k, v), handed, strict=True):
                what = f"{self.of}\n{name} after attend({layer}, q, k, v)"
                check_close(got, want, tolerance=0.0, of=what)
        tensors = {name: x for name, x in vars(batch).items() if isinstance(x, Tensor)}
        for (name, got), want in zip(tensors.items(), before, strict=True):
            check_equal(got, want, f"the batch's {name} after the pass", of=self.of)
        for i, count in counts.items():
            self.lengths[i] += count

    def check_layer(self, layer: int, counts: Mapping[int, int], given, out, real) -> None:
        """Hold the result of one layer, and then the whole pool."""
        q, k, v = given
        parts, start = [], 0
        for i, count in counts.items():
            here = slice(start, start + count)
            self.store(layer, i, k[:, here], v[:, here])
            parts.append(attend_in_float64(q[:, here], *self.dense[layer][i]))
            start += count
        of = f"{self.of}\nattend({layer}, q, k, v)"
        # What comes for padding means nothing, but there is something.
        check_equal(tuple(out.shape), (self.num_heads, len(real), self.size[1]), "shape", of=of)
        check_close(out[:, real], torch.cat(parts, 1), dtype=self.dtype, of=of)
        for name, wanted in zip(("keys", "values"), zip(*self.expected, strict=True), strict=True):
            for other, want in enumerate(wanted):
                what = f"{of}\nall {name} of layer {other}"
                check_close(getattr(self.cache, name)[other], want, tolerance=0.0, of=what)


# Passes one after the other: sequence → tokens, in the order of the pass.
PASSES = {
    "a prompt": [{0: 7}],
    "a prompt of one token": [{0: 1}],
    "a prompt and then single tokens": [{0: 7}, {0: 1}, {0: 1}, {0: 1}],
    "a sequence from its first token on": [{0: 1}] * 6,
    "prompts": [{0: 4, 1: 9, 2: 5}],
    "decodes and then a prompt": [{1: 3, 0: 5}, {0: 1, 1: 1, 2: 6}],
    "decodes and then chunks": [{2: 9, 1: 4, 3: 3, 0: 2}, {0: 1, 3: 1, 1: 5, 2: 2}],
    "decodes backwards": [{0: 3, 1: 8, 2: 5}, {2: 1, 0: 1, 1: 1}, {1: 1, 2: 1}],
    "a chunk from the edge of a block": [{0: 4}, {0: 5}],
    "a chunk from before the edge": [{0: 3}, {0: 5}],
    "a chunk from behind the edge": [{0: 5}, {0: 5}],
    "chunks of one": [{0: 3, 1: 2}, {1: 3, 0: 1}, {0: 2, 1: 1}],
    "a long one beside short ones": [{0: 40, 1: 2, 2: 1}, {0: 1, 1: 1, 2: 1}, {2: 1, 1: 1, 0: 3}],
}


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("case", PASSES)
def test_attend_pass_after_pass(case, block_size):
    serving = Serving(4, block_size)
    for counts in PASSES[case]:
        serving.step(counts)


@pytest.mark.parametrize("filling", FILLINGS)
def test_attend_does_not_look_at_other_slots(filling):
    serving = Serving(4, filling=filling)
    for counts in PASSES["decodes and then chunks"]:
        serving.step(counts)


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_attend_with_any_heads(heads):
    serving = Serving(4, heads=heads, num_layers=3)
    for counts in PASSES["decodes and then chunks"]:
        serving.step(counts)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_attend_in_other_dtypes(dtype):
    serving = Serving(4, dtype=dtype)
    for counts in PASSES["decodes and then chunks"]:
        serving.step(counts)


@pytest.mark.parametrize("num_decodes", [0, 1, 2])
def test_attend_where_single_tokens_count_as_chunks(num_decodes):
    serving = Serving(4)
    serving.step({0: 3, 1: 6, 2: 4, 3: 1})
    serving.step({0: 1, 3: 1, 1: 2, 2: 1}, num_decodes)


@pytest.mark.parametrize("num_padding", [1, 3])
def test_attend_beside_padding(num_padding):
    serving = Serving(4)
    serving.step({0: 3, 1: 6, 2: 4})
    serving.step({0: 1, 2: 1}, num_padding=num_padding)
    serving.step({2: 1, 1: 2, 0: 5}, num_padding=num_padding)
    serving.step({1: 2, 3: 5}, num_padding=num_padding)


@settings(max_examples=15)
@given(st.data())
def test_attend_with_any_passes(data):
    serving = Serving(4, data.draw(st.sampled_from(BLOCK_SIZES)), (3, 1), 4, num_blocks=120)
    for _ in range(data.draw(st.integers(1, 5))):
        order = data.draw(st.permutations(range(4)))[: data.draw(st.integers(1, 4))]
        counts = {i: data.draw(st.sampled_from([1, 1, 2, 5])) for i in order}
        counts = dict(sorted(counts.items(), key=lambda item: item[1] > 1))
        serving.step(counts, num_padding=data.draw(st.integers(0, 1)))


def looked_up(part: Tensor, table: Tensor, length: int) -> Tensor:
    """Read a sequence out of a layer, number by number of the contract."""
    size = part.shape[2]
    tokens = [part[int(table[p // size]), :, p % size] for p in range(length)]
    return torch.stack(tokens, 1)


class Doors:
    """Storing and attention that are handed in; the attention negates what is right.

    calls: for each call its name, and what it was called with.
    """

    def __init__(self):
        self.calls: list[tuple[str, dict]] = []

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def store(self, k, v, keys, values, slots) -> None:
        self.calls.append(("store", {"k": k, "v": v, "keys": keys, "slots": slots}))
        for part, new in ((keys, k), (values, v)):
            part.copy_(stored(part, new, slots.tolist()))

    def decode(self, q, keys, values, block_tables, seq_lens) -> Tensor:
        seen = {"q": q, "keys": keys, "block_tables": block_tables, "seq_lens": seq_lens}
        self.calls.append(("decode", seen))
        outs = []
        for i, length in enumerate(seq_lens.tolist()):
            k, v = (looked_up(part, block_tables[i], length) for part in (keys, values))
            outs.append(attend_in_float64(q[i, :, None], k, v)[:, 0])
        return -torch.stack(outs).to(q.dtype)

    def prefill(
        self, q, keys, values, block_tables, cu_seqlens_q, seq_lens, max_seqlen_q
    ) -> Tensor:
        seen = {"q": q, "keys": keys, "block_tables": block_tables, "seq_lens": seq_lens}
        seen |= {"cu_seqlens_q": cu_seqlens_q, "max_seqlen_q": max_seqlen_q}
        self.calls.append(("prefill", seen))
        outs, spans = [], itertools.pairwise(cu_seqlens_q.tolist())
        for i, (start, end) in enumerate(spans):
            length = int(seq_lens[i])
            k, v = (looked_up(part, block_tables[i], length) for part in (keys, values))
            outs.append(attend_in_float64(q[:, start:end], k, v))
        return -torch.cat(outs, 1).to(q.dtype)


# What the sequences have before the pass, the pass, and its decodes.
HANDED = {
    "only decodes": ([3, 9, 4], {0: 1, 2: 1}, 2),
    "only chunks": ([3, 0, 4], {0: 5, 1: 2}, 0),
    "decodes and chunks": ([3, 9, 0, 8], {3: 1, 0: 1, 2: 6, 1: 2}, 2),
    "a chunk of one token": ([3, 9, 4], {0: 1, 1: 1, 2: 3}, 1),
}


def handed_pass(case: str, num_padding: int = 0):
    """Fill a pool by what is handed in; returns the Serving, its batch, and the doors."""
    lengths, counts, num_decodes = HANDED[case]
    serving, doors = Serving(len(lengths)), Doors()
    for i, length in enumerate(lengths):
        batch = serving.plan({i: length}, 0) if length else None
        for layer in range(serving.num_layers * bool(length)):
            k, v = (serving.draw(serving.size[0], length) for _ in range(2))
            serving.store(layer, i, k, v)
            doors.store(k, v, serving.cache.keys[layer], serving.cache.values[layer], batch.slots)
        serving.lengths[i] = length
    doors.calls.clear()
    return serving, serving.plan(counts, num_decodes, num_padding), doors


@pytest.mark.parametrize("num_padding", [0, 2])
@pytest.mark.parametrize("case", HANDED)
def test_attend_through_what_is_handed_in(case, num_padding):
    serving, batch, doors = handed_pass(case, num_padding)
    of = f"paged_attend with store, prefill and decode handed in; {case}"
    both = {"store": doors.store, "prefill": doors.prefill, "decode": doors.decode}
    attend = paged.paged_attend(serving.cache, batch, **both)
    num_decodes, counts = batch.num_decodes, batch.cu_seqlens_q.diff().tolist()
    names = ["store"] + ["decode"] * (num_decodes > 0) + ["prefill"] * (num_decodes < len(counts))
    for layer in range(serving.num_layers):
        q = serving.draw(serving.num_heads, len(batch.slots))
        k, v = (serving.draw(serving.size[0], len(batch.slots)) for _ in range(2))
        doors.calls.clear()
        out = attend(layer, q, k, v)
        what = f"{of}; layer {layer}"
        check_equal(sorted(doors.names()), sorted(names), "what was called", of=what)
        check_equal(doors.names()[0], "store", "what was called first", of=what)
        called = dict(doors.calls)
        check_called(serving, batch, layer, (q, k, v), called, what)
        again = Doors()
        expected = []
        keys, values = serving.cache.keys[layer], serving.cache.values[layer]
        tables, lens = batch.block_tables, batch.seq_lens
        if num_decodes:
            queries = q[:, :num_decodes].transpose(0, 1)
            got = again.decode(queries, keys, values, tables[:num_decodes], lens[:num_decodes])
            expected.append(got.transpose(0, 1))
        if num_decodes < len(counts):
            ends = batch.cu_seqlens_q[num_decodes:] - num_decodes
            rest = tables[num_decodes:], ends, lens[num_decodes:], max(counts)
            expected.append(again.prefill(q[:, num_decodes:], keys, values, *rest))
        what = f"{what}\nwhat is handed in negates the result"
        check_close(out, torch.cat(expected, 1), of=what)


def check_called(serving: Serving, batch, layer: int, given, called: Mapping, of: str) -> None:
    """Hold what the doors were called with."""
    (q, k, v), n = given, batch.num_decodes
    wanted = {
        "store": {"k": k, "v": v, "slots": batch.slots},
        "decode": {
            "q": q[:, :n].transpose(0, 1),
            "block_tables": batch.block_tables[:n],
            "seq_lens": batch.seq_lens[:n],
        },
        "prefill": {
            "q": q[:, n:],
            "block_tables": batch.block_tables[n:],
            "seq_lens": batch.seq_lens[n:],
            "cu_seqlens_q": batch.cu_seqlens_q[n:] - n,
        },
    }
    for name, arguments in called.items():
        for argument, want in wanted[name].items():
            what = f"{argument}, handed to {name}"
            if want.is_floating_point():
                check_close(arguments[argument], want, tolerance=0.0, of=f"{of}\n{what}")
            else:
                check_equal(arguments[argument], want, what, of=of)
        same = arguments["keys"].data_ptr() == serving.cache.keys[layer].data_ptr()
        check_true(same, f"the keys that {name} gets are not the pool's own memory", of=of)
    if "prefill" in called:
        got, most = called["prefill"]["max_seqlen_q"], int(batch.cu_seqlens_q[n:].diff().max())
        right = type(got) is int and got >= most
        check_true(right, f"max_seqlen_q, handed to prefill, is {got}; a chunk has {most}", of=of)


def test_attend_asks_for_no_number_of_a_tensor():
    # So many sequences that no message about the call shows their numbers.
    serving, called = Serving(12), []
    batch = serving.plan({i: 1 + i // 8 for i in range(12)}, 8)

    def store(k, v, keys, values, slots):
        called.append("store")

    def decode(q, keys, values, block_tables, seq_lens):
        called.append("decode")
        return torch.zeros_like(q)

    def prefill(q, *rest, **named):
        called.append("prefill")
        return torch.ones_like(q)

    num_tokens, num_decodes = len(batch.slots), batch.num_decodes
    q = serving.draw(serving.num_heads, num_tokens)
    k, v = (serving.draw(serving.size[0], num_tokens) for _ in range(2))
    with without_waiting():
        attend = paged.paged_attend(serving.cache, batch, store, prefill, decode)
        out = attend(1, q, k, v)
    of = "paged_attend, with which the host does not look into tensors; decode gives 0, prefill 1"
    expected = torch.ones_like(q)
    expected[:, :num_decodes] = 0.0
    check_close(out, expected, of=of)
    check_equal(sorted(called), ["decode", "prefill", "store"], "what was called", of=of)


# A model over a pool.

FAMILIES = {"Qwen2": (Qwen2Config, Qwen2ForCausalLM), "Qwen3": (Qwen3Config, Qwen3ForCausalLM)}


def ugly(family: str, seed: int) -> dict:
    """Draw a shape that no real model has, from whose numbers no two agree by habit."""
    draw = python_random.Random(f"{family} {seed}")
    kv_heads, head_dim = draw.choice([1, 2, 3]), draw.choice([2, 8, 14])
    heads = kv_heads * draw.choice([1, 3, 7])
    return {
        "vocab_size": 61,
        "hidden_size": heads * draw.choice([5, 9]),
        "intermediate_size": draw.choice([33, 50]),
        "num_hidden_layers": draw.choice([1, 2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": draw.choice([10.0, 1e6])},
        "tie_word_embeddings": draw.random() < 0.5,
        "max_position_embeddings": 40,
    }


def oracle_model(family: str, shape: dict, seed: int) -> nn.Module:
    """transformers' model with signed weights everywhere, norms and biases included."""
    config_class, model_class = FAMILIES[family]
    model = model_class(config_class(**shape, attn_implementation="eager")).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0
        scale = 3.0 if "embed_tokens" in name else scale
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    model.tie_weights()
    return model.requires_grad_(False)


def loaded(family: str, shape: dict, theirs: nn.Module) -> nn.Module:
    """Put the same weights into the course's model."""
    config = qwen.QwenConfig.from_dict(shape | {"architectures": [f"{family}ForCausalLM"]})
    model = qwen.Qwen(config)
    qwen.load_weights(model, theirs.state_dict())
    return model.eval()


# What a step of a server may hold: prompts, chunks, and single tokens in front.
STEPS = [
    {0: 11, 1: 1, 2: 6},
    {0: 1, 1: 1, 2: 1},
    {2: 1, 0: 1, 1: 4},
    {2: 1, 1: 5},
    {0: 1, 3: 9},
    {3: 1, 1: 1, 0: 1, 2: 1},
]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", FAMILIES)
def test_attend_in_a_model_matches_transformers(family, seed):
    shape, block_size = ugly(family, seed), (1, 4, 16, 5)[seed]
    heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    # The cache first of all, so that an unwritten one is what is heard of.
    sizes = {"head_dim": shape["head_dim"], "num_layers": shape["num_hidden_layers"]}
    serving = Serving(4, block_size, heads, **sizes)
    theirs = oracle_model(family, shape, seed)
    model = loaded(family, shape, theirs)
    draw = python_random.Random(seed)
    rows: list[list[int]] = [[], [], [], []]
    for counts in STEPS:
        counts = dict(sorted(counts.items(), key=lambda item: item[1] > 1))
        new = {i: draw.choices(range(61), k=count) for i, count in counts.items()}
        batch = serving.plan(counts, sum(count == 1 for count in counts.values()))
        positions = [len(rows[i]) + j for i, ids in new.items() for j in range(len(ids))]
        for i, ids in new.items():
            rows[i] = rows[i] + ids
            serving.lengths[i] = len(rows[i])
        input_ids = integers([token_id for ids in new.values() for token_id in ids])
        with torch.inference_mode():
            attend = paged.paged_attend(serving.cache, batch)
            got = model.logits(model(input_ids, integers(positions), attend))
        expected = [
            theirs(torch.tensor([rows[i]]), use_cache=False).logits[0, -count:]
            for i, count in counts.items()
        ]
        of = f"a {family} of {shape} over a pool of blocks of {block_size}, a pass over so many "
        of += f"tokens of sequences {counts}, of which there are {list(map(len, rows))} now"
        check_close(got, torch.cat(expected), tolerance=2e-5, of=of)


@pytest.mark.parametrize("family", FAMILIES)
def test_attend_in_a_pool_that_fits_a_model(family):
    shape = ugly(family, 2)
    cache = paged.PagedKVCache(1, 1, 1, 1, 1)
    model = loaded(family, shape, oracle_model(family, shape, 2)).to(torch.bfloat16)
    cache = paged.paged_cache_for(model, 6, 4)
    kv_heads, head_dim = shape["num_key_value_heads"], shape["head_dim"]
    expected = (shape["num_hidden_layers"], 6, kv_heads, 4, head_dim), torch.bfloat16
    got = tuple(cache.values.shape), cache.values.dtype
    check_equal(got, expected, "shape and dtype of the values", of=f"paged_cache_for a {family}")
