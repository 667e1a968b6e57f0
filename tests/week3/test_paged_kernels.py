"""Grades week3/paged_kernels: storing by slot, and attention over block tables, in Triton."""

import contextlib
import itertools
import math
import random as python_random
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from course.grading import History, check_close, check_equal, check_raises, check_true, lab
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

kernels = lab("week3/paged_kernels")

HALVES = DTYPES[1:]
# Powers of two and others, smaller than a block of a kernel and larger.
BLOCK_SIZES = (4, 1, 16, 5, 96)
# What another sequence may have left in a slot: finite in the range of float16, or not.
FILLINGS = (3e4, math.inf, math.nan)
# num_heads and num_kv_heads.
HEADS = [(1, 1), (3, 3), (4, 1), (6, 2), (7, 1), (20, 1)]
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
def unwritten_memory_is_nan() -> Iterator[None]:
    """Let memory that nobody has written hold NaN, where it often happens to hold zeros."""
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
    held = torch.full((tokens, 3, heads, head_dim), math.nan, dtype=x.dtype, device=DEVICE)
    held[:, 1] = x.transpose(0, 1)
    return held[:, 1].transpose(0, 1)


def of_columns(x: Tensor) -> Tensor:
    """The numbers of a head lie far apart."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def every_other(x: Tensor) -> Tensor:
    """Something else lies between any two numbers."""
    held = torch.full([2 * size for size in x.shape], math.nan, dtype=x.dtype, device=DEVICE)
    held[::2, ::2, ::2] = x
    return held[::2, ::2, ::2]


LAYOUTS: list[Callable[[Tensor], Tensor]] = [
    of_tokens,
    of_a_merged_projection,
    of_columns,
    every_other,
]

# Layouts in which a layer of a pool (num_blocks, num_kv_heads, block_size, head_dim) may come.


def slots_before_heads(part: Tensor) -> Tensor:
    """All heads of a slot lie side by side."""
    return part.transpose(1, 2).contiguous().transpose(1, 2)


def heads_before_blocks(part: Tensor) -> Tensor:
    """Each head has a pool of its own."""
    return part.transpose(0, 1).contiguous().transpose(0, 1)


def numbers_before_slots(part: Tensor) -> Tensor:
    """The numbers of a slot lie apart, those of a block's slots side by side."""
    return part.transpose(2, 3).contiguous().transpose(2, 3)


def keys_beside_values(part: Tensor) -> Tensor:
    """Each block has something else behind it."""
    held = torch.full((len(part), 2, *part.shape[1:]), math.nan, dtype=part.dtype, device=DEVICE)
    held[:, 0] = part
    return held[:, 0]


POOL_LAYOUTS: list[Callable[[Tensor], Tensor]] = [
    slots_before_heads,
    heads_before_blocks,
    numbers_before_slots,
    keys_beside_values,
]
by_name = {"ids": lambda layout: layout.__name__}


def far_apart(parts: Sequence[Tensor], axis: int) -> list[Tensor]:
    """Lay out keys and values so that 2**31 elements lie before their last block or head."""
    try:
        held = torch.empty(2**31 + 2**28, dtype=parts[0].dtype, device=DEVICE)
    except RuntimeError:
        pytest.skip("this machine has no room for a tensor of 4.5 GB")
    strides = list(parts[0].contiguous().stride())
    strides[axis] = -(-(2**31) // (parts[0].shape[axis] - 1))
    # Only what is named is ever touched, so that this is cheap on a CPU.
    return [
        held[i * 2**24 :].as_strided(part.shape, strides).copy_(part)
        for i, part in enumerate(parts)
    ]


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
    layouts: Sequence[Callable] = (of_tokens, of_tokens),
    pools: Sequence[Callable] = (Tensor.contiguous, Tensor.contiguous),
    note: str = "",
) -> None:
    """Store tokens in slots; hold the whole layer, and what was handed in, to the contract."""
    sizes = num_blocks, num_kv_heads, block_size, head_dim, dtype
    parts = [pool(other_slots(*sizes, seed=s)) for s, pool in zip((1, 2), pools, strict=True)]
    new = [random(num_kv_heads, len(slots), head_dim, seed=s, dtype=dtype) for s in (3, 4)]
    for token, slot in enumerate(slots):
        if slot == -1:
            new[0][:, token] = math.nan
    k, v = (layout(x) for layout, x in zip(layouts, new, strict=True))
    expected = [stored(part, x, slots) for part, x in zip(parts, new, strict=True)]
    where = integers(slots)
    kernels.store_kv(k, v, *parts, where)
    of = f"store_kv of {len(slots)} tokens into the slots {list(slots)[:20]} of a layer of "
    of += f"{num_blocks} blocks of {block_size}, {num_kv_heads} kv heads of {head_dim}, "
    of += f"{str(dtype)[6:]}{note}"
    for name, got, want in zip(("keys", "values"), parts, expected, strict=True):
        check_close(got, want, tolerance=0.0, of=f"{of}\nall {name} of the layer")
    for name, got, want in zip("kv", (k, v), new, strict=True):
        check_close(got, want, tolerance=0.0, of=f"{of}\n{name} after the call")
    check_equal(where, integers(slots), "slots after the call", of=of)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_store_puts_tokens_into_their_slots(block_size, dtype):
    slots = python_random.Random(block_size).sample(
        range(5 * block_size), min(2 * block_size + 1, 20)
    )
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
}


@pytest.mark.parametrize("num_kv_heads", [1, 5])
@pytest.mark.parametrize("case", SLOTS)
def test_store_into(case, num_kv_heads):
    check_store(SLOTS[case], num_kv_heads=num_kv_heads)


@pytest.mark.parametrize("head_dim", [1, 64, 80, 96, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_store_of_any_head_dim(dtype, head_dim):
    check_store([7, -1, 2, 8], 3, 2, head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize(
    "slots", [[-1], [-1, -1, -1], [5, -1], [-1, 5], [3, -1, -1, 0, -1, 11], [19, -1]], ids=str
)
@pytest.mark.parametrize("block_size", [4, 1])
def test_store_leaves_padding_out(block_size, slots):
    slots = [slot if slot < 5 * block_size else slot % 5 for slot in slots]
    check_store(slots, block_size=block_size, note="; the k of tokens with slot -1 are NaN")


def test_store_of_many_tokens():
    slots = python_random.Random(1).sample(range(200), 140)
    check_store([*slots[:120], -1, -1, *slots[120:]], 50, 1, 4, 4)


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


@pytest.mark.parametrize("layout", POOL_LAYOUTS, **by_name)
def test_store_into_a_pool_with_any_strides(layout):
    check_store([3, 9, -1, 18, 4], pools=(layout, layout), note=f"\nthe pool: {layout.__doc__}")


@pytest.mark.parametrize("first", [True, False], ids=["keys", "values"])
def test_store_into_a_pool_with_other_strides_for_each(first):
    pools = (slots_before_heads, numbers_before_slots)[:: 1 if first else -1]
    check_store([3, 9, -1, 18, 4], pools=pools, note=f"\nthe keys: {pools[0].__doc__}")


@pytest.mark.parametrize("axis", [0, 1], ids=["blocks", "heads"])
def test_store_into_a_pool_of_more_than_two_to_the_31_numbers(axis):
    sizes = 3, 3, 4, 8, torch.float16
    parts = far_apart([other_slots(*sizes, seed=s) for s in (1, 2)], axis)
    slots = [9, 5, 2, 11, -1]
    k, v = (random(3, 5, 8, seed=s, dtype=torch.float16) for s in (3, 4))
    expected = [stored(part, x, slots) for part, x in zip(parts, (k, v), strict=True)]
    kernels.store_kv(k, v, *parts, integers(slots))
    of = f"store_kv into the slots {slots} of a layer of 3 blocks of 4 and 3 kv heads; the last "
    of += f"{('block', 'head')[axis]} begins behind 2**31 numbers"
    for name, got, want in zip(("keys", "values"), parts, expected, strict=True):
        check_close(got, want, tolerance=0.0, of=f"{of}\nall {name} of the layer")


@settings(max_examples=15)
@given(st.data())
def test_store_into_any_slots(data):
    block_size, num_blocks = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    places = st.integers(0, block_size * num_blocks - 1)
    slots = data.draw(st.lists(places, min_size=1, unique=True))
    slots += [-1] * data.draw(st.integers(0, 3))
    slots = data.draw(st.permutations(slots))
    num_kv_heads = data.draw(st.integers(1, 4))
    check_store(slots, num_blocks, num_kv_heads, block_size, data.draw(st.integers(1, 5)))


@pytest.mark.parametrize("which", ["keys", "values"])
def test_store_is_done_by_one_kernel(which):
    def call() -> Tensor:
        keys, values = (random(3, 2, 4, 8, seed=s) for s in (1, 2))
        k, v = (random(2, 3, 8, seed=s) for s in (3, 4))
        kernels.store_kv(k, v, keys, values, integers([7, -1, 2]))
        return keys if which == "keys" else values

    check_kernel_computes(call, f"store_kv into the slots [7, -1, 2]; the {which}", num_launches=1)


def test_store_does_not_wait_for_the_device():
    check_store([7, -1, 2])
    # So many tokens that no message about the call shows their slots.
    keys, values = (random(3, 2, 8, 8, seed=s) for s in (1, 2))
    k, v = (random(2, 12, 8, seed=s) for s in (3, 4))
    slots = integers([*range(10), -1, 20])
    with without_waiting():
        kernels.store_kv(k, v, keys, values, slots)


# Attention over sequences that lie in a pool.


def attend_in_float64(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Let the last tokens of one sequence look at it, each up to itself, by torch in float64.

    q: (num_heads, tokens, head_dim). k, v: (num_kv_heads, num_keys, head_dim).
    """
    tokens, num_keys = q.shape[1], k.shape[1]
    if tokens == 0:
        return q.double()
    mask = torch.ones(tokens, num_keys, dtype=torch.bool, device=DEVICE).tril(num_keys - tokens)
    group = q.shape[0] // k.shape[0]
    k, v = (part.double().repeat_interleave(group, 0) for part in (k, v))
    return scaled_dot_product_attention(q.double(), k, v, attn_mask=mask)


def unowned(size: Sequence[int], filling: float | None, dtype: torch.dtype, seed: int) -> Tensor:
    """Make memory that belongs to nobody; filling: what it holds, None for any numbers."""
    if filling is None:
        return random(*size, seed=seed, dtype=dtype)
    return torch.full(size, filling, dtype=dtype, device=DEVICE)


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
        heads: tuple[int, int] = (2, 1),
        head_dim: int = 8,
        dtype: torch.dtype = torch.float32,
        filling: float | None = None,
        in_order: bool = False,
        num_spare: int = 3,
        num_shared: int = 0,
        seed: int = 0,
    ):
        self.lengths, self.block_size, self.dtype = list(lengths), block_size, dtype
        self.num_heads, self.num_kv_heads = heads
        self.filling = filling
        counts = [-(-length // block_size) for length in lengths]
        self.num_blocks = sum(counts) + num_spare
        ids = list(range(self.num_blocks))
        if not in_order:
            python_random.Random(f"{self.lengths} {block_size} {seed}").shuffle(ids)
        self.tables = [[ids.pop(0) for _ in range(count)] for count in counts]
        for table in self.tables:
            table[:num_shared] = self.tables[0][:num_shared]
        size = self.num_blocks, self.num_kv_heads, block_size, head_dim
        self.keys, self.values = (unowned(size, filling, dtype, seed=s) for s in (7, 8))
        self.dense: list[tuple[Tensor, Tensor]] = []
        for i, length in enumerate(lengths):
            k, v = (
                random(self.num_kv_heads, length, head_dim, seed=seed + 10 * i + s, dtype=dtype)
                for s in (1, 2)
            )
            if num_shared and i:
                common = num_shared * block_size
                k[:, :common], v[:, :common] = (x[:, :common] for x in self.dense[0])
            self.dense.append((k, v))
        self.write()

    def write(self) -> None:
        """Put what lies densely into the blocks."""
        for table, pair in zip(self.tables, self.dense, strict=True):
            positions = torch.arange(pair[0].shape[1], device=DEVICE)
            blocks = integers(table)[positions // self.block_size]
            for part, new in zip((self.keys, self.values), pair, strict=True):
                part[blocks, :, positions % self.block_size] = new.transpose(0, 1)

    def change(self, key: Callable | None = None, value: Callable | None = None) -> None:
        """Change keys and values of the sequences, as they lie densely: (heads, tokens, dims)."""
        keep = Tensor.clone
        self.dense = [((key or keep)(k), (value or keep)(v)) for k, v in self.dense]
        self.write()

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

    def owned(self) -> Tensor:
        """Count how many sequences hold each slot, (num_blocks, block_size)."""
        counts = torch.zeros(self.num_blocks, self.block_size, dtype=torch.int64)
        for table, length in zip(self.tables, self.lengths, strict=True):
            for position in range(length):
                counts[table[position // self.block_size], position % self.block_size] += 1
        return counts

    def __str__(self) -> str:
        tables = ", ".join(map(str, self.tables)) if self.num_blocks <= 20 else "…"
        heads = f"{self.num_heads} and {self.num_kv_heads} heads of {self.keys.shape[3]}"
        lengths = self.lengths if len(self.lengths) < 12 else f"{len(self.lengths)} lengths, in"
        text = f"sequences of {lengths} tokens, {heads}, {str(self.dtype)[6:]}; blocks of "
        held = "other numbers" if self.filling is None else f"{self.filling:g}"
        text += f"{self.block_size}, tables {tables}; all other slots hold {held}"
        return text


def expected_prefill(pages: Pages, q: Tensor, counts: Sequence[int]) -> Tensor:
    """Let the last tokens of each sequence look at it, sequence by sequence."""
    parts = q.split(list(counts), 1)
    outs = [attend_in_float64(part, *kv) for part, kv in zip(parts, pages.dense, strict=True)]
    return torch.cat(outs, 1)


def prefill_arguments(pages: Pages, q: Tensor, counts: Sequence[int], **others) -> dict:
    """Collect what paged_prefill is called with for so many last tokens of each sequence."""
    return {
        "q": q,
        "keys": pages.keys,
        "values": pages.values,
        "block_tables": pages.block_tables(),
        "cu_seqlens_q": integers([0, *itertools.accumulate(counts)]),
        "seq_lens": integers(pages.lengths),
        "max_seqlen_q": max(counts),
    } | others


def prefill(pages: Pages, q: Tensor, counts: Sequence[int], **others) -> Tensor:
    arguments = prefill_arguments(pages, q, counts, **others)
    with unwritten_memory_is_nan():
        return kernels.paged_prefill(*arguments.values())


def check_prefill(
    pages: Pages, counts: Sequence[int], note: str = "", tolerance: float | None = None, **others
) -> None:
    """Hold paged_prefill against the oracle; others: arguments in the place of the usual ones."""
    q = others.pop("q", None)
    q = pages.queries(sum(counts)) if q is None else q
    of = f"paged_prefill of the last {list(counts)} tokens of {pages}{note}"
    got = prefill(pages, q, counts, **others)
    expected = expected_prefill(pages, q, counts)
    check_close(got, expected, dtype=pages.dtype, tolerance=tolerance, of=of)
    check_equal(got.device.type, DEVICE, "where the result lies", of=of)


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


@pytest.mark.parametrize("block_size", [1, 5, 16])
@pytest.mark.parametrize("case", CHUNKS)
def test_prefill_matches_torch(case, block_size):
    lengths, counts = CHUNKS[case]
    check_prefill(Pages(lengths, block_size), counts)


@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefill_with_the_heads_of_real_models(dtype, head_dim, group):
    check_prefill(Pages([37], 16, (2 * group, 2), head_dim, dtype), [3])


@pytest.mark.parametrize("head_dim", [1, 10, 17])
@pytest.mark.parametrize("heads", HEADS[:-1], ids=str)
def test_prefill_with_any_heads(heads, head_dim):
    check_prefill(Pages([11, 6, 3], 4, heads, head_dim), [4, 6, 1])


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_prefill_in_other_dtypes(dtype, block_size):
    check_prefill(Pages([11, 6, 18], block_size, (3, 1), 10, dtype), [4, 6, 1])


@pytest.mark.parametrize(
    "lengths, counts",
    [
        ([300], [300]),
        ([420], [140]),
        ([700], [1]),
        ([129, 64, 65], [129, 64, 63]),
        ([133, 33, 32, 96], [5, 31, 32, 33]),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefill_of_many_blocks(dtype, lengths, counts):
    check_prefill(Pages(lengths, 16, (1, 1), 16, dtype), counts)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 9])
@pytest.mark.parametrize("num_before", [3, 4, 5, 31, 32])
def test_prefill_of_a_chunk_near_the_edge_of_a_block(num_before, count):
    check_prefill(Pages([num_before + count]), [count], f"; {num_before} tokens stand before")


@pytest.mark.parametrize("block_size", [4, 96])
@pytest.mark.parametrize("filling", FILLINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefill_does_not_look_at_other_slots(dtype, filling, block_size):
    check_prefill(Pages([5, 1, 38], block_size, dtype=dtype, filling=filling), [5, 1, 3])


@pytest.mark.parametrize("seed", range(3))
def test_prefill_does_not_look_behind_a_table(seed):
    pages = Pages([5, 1, 18])
    check_prefill(pages, [2, 1, 3], block_tables=pages.block_tables(seed, 4 * seed))


@pytest.mark.parametrize("block_size", [4, 16])
def test_prefill_of_shared_blocks(block_size):
    pages = Pages([40, 35, 37], block_size, num_shared=32 // block_size)
    check_prefill(pages, [8, 2, 37], "; the first 32 tokens of all three are the same blocks")


@pytest.mark.parametrize("max_seqlen_q", [5, 6, 64, 1000])
def test_prefill_with_room_for_longer_sequences(max_seqlen_q):
    note = f"; max_seqlen_q {max_seqlen_q}"
    check_prefill(Pages([9, 3, 5]), [5, 1, 2], note, max_seqlen_q=max_seqlen_q)


@pytest.mark.parametrize("layout", LAYOUTS, **by_name)
def test_prefill_with_any_strides(layout):
    pages = Pages([9, 3, 5], heads=(6, 2))
    check_prefill(pages, [5, 1, 2], f"\nq: {layout.__doc__}", q=layout(pages.queries(8)))


@pytest.mark.parametrize("layout", POOL_LAYOUTS, **by_name)
def test_prefill_of_a_pool_with_any_strides(layout):
    pages = Pages([9, 3, 5], heads=(6, 2))
    pages.keys, pages.values = layout(pages.keys), layout(pages.values)
    check_prefill(pages, [5, 1, 2], f"\nthe pool: {layout.__doc__}")


@pytest.mark.parametrize("first", [True, False], ids=["keys", "values"])
def test_prefill_of_a_pool_with_other_strides_for_each(first):
    pages = Pages([9, 3, 5], heads=(6, 2))
    layouts = (slots_before_heads, numbers_before_slots)[:: 1 if first else -1]
    pages.keys, pages.values = layouts[0](pages.keys), layouts[1](pages.values)
    check_prefill(pages, [5, 1, 2], f"\nthe keys: {layouts[0].__doc__}")


def wide_tables(pages: Pages) -> Tensor:
    """Make tables that are every other entry of a larger tensor."""
    tables = pages.block_tables()
    held = torch.zeros(2 * len(tables), 2 * tables.shape[1], dtype=torch.int64, device=DEVICE)
    held[::2, ::2] = tables
    return held[::2, ::2]


def test_prefill_of_tables_with_any_strides():
    pages = Pages([9, 3, 5])
    note = "; block_tables is every other entry of a larger tensor"
    check_prefill(pages, [5, 1, 2], note, block_tables=wide_tables(pages))


@pytest.mark.parametrize("axis", [0, 1], ids=["blocks", "heads"])
def test_prefill_of_a_pool_of_more_than_two_to_the_31_numbers(axis):
    pages = Pages([9, 3], heads=(3, 3), dtype=torch.float16, num_spare=0)
    pages.keys, pages.values = far_apart([pages.keys, pages.values], axis)
    q = pages.queries(7)
    note = f"; the last {('block', 'head')[axis]} begins behind 2**31 numbers"
    got = kernels.paged_prefill(*prefill_arguments(pages, q, [5, 2]).values())
    of = f"paged_prefill of the last [5, 2] tokens of {pages}{note}"
    check_close(got, expected_prefill(pages, q, [5, 2]), dtype=torch.float16, of=of)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefill_of_large_scores(dtype):
    pages = Pages([70, 12], 16, (2, 1), 16, dtype)
    # Few digits, so that the scores are exact.
    pages.change(key=lambda k: k.clamp(-4, 4).round())
    q = pages.queries(44).clamp(-4, 4).round() * 100
    check_prefill(pages, [40, 4], "; scores of some thousands", q=q)


@pytest.mark.parametrize("direction", ["rising", "falling", "all far below zero"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefill_of_scores(dtype, direction):
    pages = Pages([150, 97], 16, (2, 1), 16, dtype)
    slope = {"rising": 0.25, "falling": -0.25}.get(direction, 0.0)
    offset = -128.0 if direction == "all far below zero" else 0.0

    def sloped(k: Tensor) -> Tensor:
        k = k.clone()
        k[..., 0] = slope * torch.arange(k.shape[1], device=DEVICE) + offset
        return k

    pages.change(key=sloped)
    q = pages.queries(5) * 0.25
    # The first number of every query is 4, which is what 16 ** -0.5 takes away.
    q[..., 0] = 4.0
    tolerance = 1e-4 if dtype == torch.float32 else None
    check_prefill(pages, [4, 1], f"; scores are {direction}", tolerance, q=q)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_prefill_keeps_scores_in_float32(dtype):
    pages = Pages([9, 30], 4, (2, 1), 64, dtype)
    pages.change(key=lambda k: k * 0.1 + 43)
    q = pages.queries(12) * 2 + 50
    # Near 17,000, float32 numbers are 1e-3 apart, and a GPU adds such products with fewer digits.
    check_prefill(pages, [9, 3], "; scores near 140,000 before they are scaled", 0.1, q=q)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_prefill_keeps_sums_in_float32(dtype):
    pages = Pages([200], 16, (1, 1), 8, dtype)
    pages.change(value=lambda v: v.clamp(-1, 1) * 100 + 3e4)
    q = pages.queries(2) * 0.01
    check_prefill(pages, [2], "; values near 30,000, all scores near 0", q=q)


@pytest.mark.parametrize("num_before", [0, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefill_does_not_read_what_nobody_looks_at(dtype, num_before):
    num_tokens, num_clean = 290, 9
    lengths = [6, num_before + num_tokens]
    counts = [1, num_tokens]
    pages = Pages(lengths, 16, (1, 1), 8, dtype)
    q = pages.queries(sum(counts))
    expected = expected_prefill(pages, q, counts)[:, 1 : 1 + num_clean]
    bad = num_before + num_clean - 1 + 256
    for part in (pages.keys, pages.values):
        for position in range(bad, lengths[1]):
            part[pages.tables[1][position // 16], :, position % 16] = math.nan
    got = prefill(pages, q, counts)[:, 1 : 1 + num_clean]
    of = f"paged_prefill of the last {counts} tokens of {pages}\nthe second sequence holds NaN "
    of += f"from token {bad} on; those of its tokens that stand 256 places before that, or more"
    check_close(got, expected, dtype=dtype, of=of)


def test_prefill_wherever_the_blocks_lie():
    ordered, mixed = Pages([11, 6, 33], in_order=True), Pages([11, 6, 33])
    counts = [4, 2, 30]
    q = ordered.queries(36)
    expected = prefill(ordered, q, counts)
    of = f"paged_prefill of the last {counts} tokens of {mixed}\nagainst yours for the tables "
    of += ", ".join(map(str, ordered.tables))
    check_close(prefill(mixed, q, counts), expected, of=of)
    check_prefill(mixed, counts)


@pytest.mark.parametrize("ends", [(4, 8, 20), (1, 2, 3, 20), (19, 20)])
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


@settings(max_examples=15)
@given(st.data())
def test_prefill_of_any_sequences(data):
    lengths = data.draw(st.lists(st.integers(1, 24), min_size=1, max_size=5))
    counts = [data.draw(st.integers(0, length)) for length in lengths]
    heads = data.draw(st.sampled_from(HEADS[:4]))
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
    arguments = prefill_arguments(pages, pages.queries(8), [5, 1, 2])
    check_untouched(arguments, kernels.paged_prefill, f"paged_prefill of {pages}")


@pytest.mark.parametrize("counts", [[9], [9, 1, 4]], ids=str)
def test_prefill_is_one_kernel_for_all_sequences(counts):
    def call() -> Tensor:
        pages = Pages([12] * len(counts))
        arguments = prefill_arguments(pages, pages.queries(sum(counts)), counts)
        return kernels.paged_prefill(*arguments.values())

    of = f"paged_prefill of the last {counts} tokens of {len(counts)} sequences"
    check_kernel_computes(call, of, num_launches=1)


@interpreted
@pytest.mark.parametrize("layout", [Tensor.contiguous, slots_before_heads], **by_name)
def test_prefill_reads_the_pool_where_it_lies(layout):
    pages = Pages([9, 3, 70], heads=(2, 2), num_spare=200)
    pages.keys, pages.values = layout(pages.keys), layout(pages.values)
    owned = pages.owned()
    with counted_reads(pages.keys) as key_reads, counted_reads(pages.values) as value_reads:
        check_prefill(pages, [5, 1, 4])
    of = f"paged_prefill of the last [5, 1, 4] tokens of {pages}"
    for name, reads in (("keys", key_reads), ("values", value_reads)):
        seen = reads.amin((1, 3)) > 0
        missed, others = int((~seen & (owned > 0)).sum()), int((seen & (owned == 0)).sum())
        what = f"tokens whose {name} no kernel reads in the pool, of {sum(pages.lengths)}"
        check_equal(missed, 0, what, of=of)
        check_equal(others, 0, f"slots that hold no token, and whose {name} are read", of=of)


@interpreted
def test_prefill_reads_nothing_of_a_sequence_without_tokens():
    pages = Pages([9, 40, 3])
    owned = integers([[block] for block in pages.tables[1]]).flatten()
    with counted_reads(pages.keys) as reads:
        check_prefill(pages, [5, 0, 2])
    of = f"paged_prefill of the last [5, 0, 2] tokens of {pages}"
    check_equal(int(reads[owned].sum()), 0, "reads of keys of the sequence in the middle", of=of)


def test_prefill_makes_nothing_but_its_result():
    pages = Pages([600, 9], 16, (2, 2), 8, num_spare=200)
    arguments = prefill_arguments(pages, pages.queries(14), [5, 9])
    tensors = [x for x in arguments.values() if isinstance(x, Tensor)]
    check_prefill(pages, [5, 9])
    with Made(*tensors) as made:
        kernels.paged_prefill(*arguments.values())
    of = f"paged_prefill of the last 5 and 9 tokens of {pages}\nthe result has 224 elements, the "
    of += f"keys and values of the sequences {2 * 16 * 609:,}"
    text = f"tensors of {made.num_elements:,} elements were made, all together; 2,000 are plenty"
    check_true(made.num_elements <= 2000, text, of=of)


def test_prefill_does_not_wait_for_the_device():
    # So many sequences that no message about the call shows their numbers.
    lengths, counts = [7] * 12, [5, 1] * 6
    pages = Pages(lengths)
    check_prefill(pages, counts)
    arguments = prefill_arguments(pages, pages.queries(sum(counts)), counts)
    with without_waiting():
        got = kernels.paged_prefill(*arguments.values())
    check_equal(tuple(got.shape), (2, 36, 8), "the shape of the result", of="paged_prefill")


@pytest.mark.parametrize("heads", [(6, 4), (7, 2), (2, 3)], ids=str)
def test_prefill_refuses_heads_that_do_not_divide(heads):
    pages = Pages([3], heads=heads)
    arguments = prefill_arguments(pages, pages.queries(3), [3])
    check_raises(ValueError, kernels.paged_prefill, *arguments.values(), mentions=heads)


@pytest.mark.parametrize("head_dim", [129, 256])
def test_prefill_refuses_heads_that_are_too_large(head_dim):
    pages = Pages([3], head_dim=head_dim)
    arguments = prefill_arguments(pages, pages.queries(3), [3])
    check_raises(ValueError, kernels.paged_prefill, *arguments.values(), mentions=(head_dim, 128))


# Decoding.


def expected_decode(pages: Pages, q: Tensor) -> Tensor:
    rows = [
        attend_in_float64(q[i, :, None], *kv)[:, 0] if kv[0].shape[1] else torch.zeros_like(q[i])
        for i, kv in enumerate(pages.dense)
    ]
    return torch.stack([row.double() for row in rows])


def decode_arguments(pages: Pages, q: Tensor | None = None, **others) -> dict:
    """Collect what paged_decode is called with for the last token of each sequence."""
    q = pages.queries(len(pages.lengths)).transpose(0, 1) if q is None else q
    return {
        "q": q,
        "keys": pages.keys,
        "values": pages.values,
        "block_tables": pages.block_tables(),
        "seq_lens": integers(pages.lengths),
    } | others


def of_decode(pages: Pages, num_splits: int | None, note: str = "") -> str:
    """Put a call into words."""
    return f"paged_decode in {num_splits or 'as many as planned'} splits of {pages}{note}"


def check_decode(
    pages: Pages,
    num_splits: int | None = 1,
    note: str = "",
    tolerance: float | None = None,
    **others,
) -> None:
    """Hold paged_decode against the oracle; others: arguments in the place of the usual ones."""
    arguments = decode_arguments(pages, **others)
    with unwritten_memory_is_nan():
        got = kernels.paged_decode(*arguments.values(), num_splits)
    of, expected = of_decode(pages, num_splits, note), expected_decode(pages, arguments["q"])
    check_close(got, expected, dtype=pages.dtype, tolerance=tolerance, of=of)
    check_equal(got.device.type, DEVICE, "where the result lies", of=of)


LENGTHS = [(1,), (4,), (5,), (1, 1, 1), (5, 1, 16, 9), (64, 2, 33, 64), (3, 130, 16, 17, 2)]


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_decode_matches_torch(lengths, block_size):
    check_decode(Pages(lengths, block_size))


@pytest.mark.parametrize(
    "num_splits, block_size", [(None, 16), (2, 1), (3, 5), (4, 16), (7, 5), (20, 16)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_in_any_number_of_splits(dtype, num_splits, block_size):
    check_decode(Pages([300, 1, 65], block_size, dtype=dtype), num_splits)


@pytest.mark.parametrize("slope", [0.01, -0.01])
def test_decode_in_many_splits_that_all_have_tokens(slope):
    pages = Pages([1, 1280], 16, head_dim=16)

    def sloped(k: Tensor) -> Tensor:
        k = k * 0.25
        k[..., 0] = slope * torch.arange(k.shape[1], device=DEVICE)
        return k

    pages.change(key=sloped)
    q = pages.queries(2).transpose(0, 1) * 0.25
    # The first number of every query is 4, which is what 16 ** -0.5 takes away.
    q[..., 0] = 4.0
    note = f"; scores {'rise' if slope > 0 else 'fall'} from token to token"
    check_decode(pages, 40, note, q=q)


@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_with_the_heads_of_real_models(dtype, head_dim, group):
    check_decode(Pages([40], 16, (2 * group, 2), head_dim, dtype), 2)


@pytest.mark.parametrize("head_dim", [1, 10, 17])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_decode_with_any_heads(heads, head_dim):
    check_decode(Pages([11, 6, 3], 4, heads, head_dim), 1)


@pytest.mark.parametrize("length", [31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257])
def test_decode_around_the_sizes_of_blocks(length):
    check_decode(Pages([length], 16), 2)


PADDED = [[0], [0, 0], [5, 0, 3], [0, 9, 0], [70, 0, 1, 0, 0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("lengths", PADDED, ids=str)
def test_decode_beside_padding(lengths, num_splits, dtype):
    pages = Pages(lengths, dtype=dtype, filling=math.nan)
    tables = pages.block_tables()
    q = pages.queries(len(lengths)).transpose(0, 1).contiguous()
    for i, length in enumerate(lengths):
        if length == 0:
            q[i], tables[i] = math.nan, -1
    note = "; where there are 0 tokens, q is NaN and block_tables is -1"
    check_decode(pages, num_splits, note, q=q, block_tables=tables)


@pytest.mark.parametrize("block_size", [4, 96])
@pytest.mark.parametrize("filling", FILLINGS)
@pytest.mark.parametrize("num_splits", [1, 3])
def test_decode_does_not_look_at_other_slots(num_splits, filling, block_size):
    check_decode(Pages([5, 1, 38], block_size, filling=filling), num_splits)


@pytest.mark.parametrize("filling", FILLINGS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_decode_does_not_look_at_other_slots_in_half(dtype, filling):
    check_decode(Pages([5, 1, 38], dtype=dtype, filling=filling), 2)


@pytest.mark.parametrize("seed", range(3))
def test_decode_does_not_look_behind_a_table(seed):
    pages = Pages([5, 1, 18])
    check_decode(pages, block_tables=pages.block_tables(seed, 4 * seed))


@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("num_splits", [1, 2])
def test_decode_of_shared_blocks(num_splits, block_size):
    pages = Pages([40, 35, 37], block_size, num_shared=32 // block_size)
    note = "; the first 32 tokens of all three are the same blocks"
    check_decode(pages, num_splits, note)


@pytest.mark.parametrize("layout", LAYOUTS, **by_name)
def test_decode_with_any_strides(layout):
    pages = Pages([9, 3, 5], heads=(6, 2))
    q = layout(pages.queries(3).transpose(0, 1))
    check_decode(pages, 2, f"\nq, with sequences for heads: {layout.__doc__}", q=q)


@pytest.mark.parametrize("layout", POOL_LAYOUTS, **by_name)
def test_decode_of_a_pool_with_any_strides(layout):
    pages = Pages([9, 3, 5], heads=(6, 2))
    pages.keys, pages.values = layout(pages.keys), layout(pages.values)
    check_decode(pages, 2, f"\nthe pool: {layout.__doc__}")


@pytest.mark.parametrize("first", [True, False], ids=["keys", "values"])
def test_decode_of_a_pool_with_other_strides_for_each(first):
    pages = Pages([9, 3, 5], heads=(6, 2))
    layouts = (slots_before_heads, numbers_before_slots)[:: 1 if first else -1]
    pages.keys, pages.values = layouts[0](pages.keys), layouts[1](pages.values)
    check_decode(pages, 1, f"\nthe keys: {layouts[0].__doc__}")


def test_decode_of_tables_with_any_strides():
    pages = Pages([9, 3, 5])
    note = "; block_tables is every other entry of a larger tensor"
    check_decode(pages, 1, note, block_tables=wide_tables(pages))


@pytest.mark.parametrize("axis", [0, 1], ids=["blocks", "heads"])
def test_decode_of_a_pool_of_more_than_two_to_the_31_numbers(axis):
    pages = Pages([9, 3], heads=(3, 3), dtype=torch.float16, num_spare=0)
    pages.keys, pages.values = far_apart([pages.keys, pages.values], axis)
    arguments = decode_arguments(pages)
    got = kernels.paged_decode(*arguments.values(), 2)
    note = f"; the last {('block', 'head')[axis]} begins behind 2**31 numbers"
    expected = expected_decode(pages, arguments["q"])
    check_close(got, expected, dtype=torch.float16, of=of_decode(pages, 2, note))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_splits", [1, 3])
def test_decode_of_large_scores(num_splits, dtype):
    pages = Pages([70, 3, 140], 16, (4, 2), 16, dtype)
    # Few digits, so that the scores are exact.
    pages.change(key=lambda k: k.clamp(-4, 4).round())
    q = pages.queries(3).transpose(0, 1).clamp(-4, 4).round() * 100
    check_decode(pages, num_splits, "; scores of some thousands", q=q)


@pytest.mark.parametrize("direction", ["rising", "falling", "all far below zero"])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_decode_of_scores(num_splits, direction):
    pages = Pages([260, 97], 16, head_dim=16)
    slope = {"rising": 0.1, "falling": -0.1}.get(direction, 0.0)
    offset = -110.0 if direction == "all far below zero" else 0.0

    def sloped(k: Tensor) -> Tensor:
        k = k * 0.25
        k[..., 0] = slope * torch.arange(k.shape[1], device=DEVICE) + offset
        return k

    pages.change(key=sloped)
    q = pages.queries(2).transpose(0, 1) * 0.25
    q[..., 0] = 4.0
    # Near 110, float32 numbers are 8e-6 apart: so much a rounded score changes its weight.
    check_decode(pages, num_splits, f"; scores are {direction}", 1e-4, q=q)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("num_splits", [1, 3])
def test_decode_keeps_scores_in_float32(num_splits, dtype):
    pages = Pages([150], 16, head_dim=16, dtype=dtype)

    def near(k: Tensor) -> Tensor:
        k = torch.zeros_like(k)
        k[..., 0] = 100.0
        k[..., 1] = (8 * random(k.shape[1], seed=5).clamp(-2, 2)).to(dtype)
        return k

    pages.change(key=near)
    q = torch.zeros_like(pages.queries(1).transpose(0, 1))
    q[..., 0], q[..., 1] = 80.0, 1.0
    note = "; all scores are near 2,000, and differ by less than 10"
    check_decode(pages, num_splits, note, q=q)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("num_splits", [1, 2, 3])
def test_decode_keeps_sums_in_float32(num_splits, dtype):
    pages, eps = Pages([210], 16, dtype=dtype), torch.finfo(dtype).eps

    def cancelling(v: Tensor) -> Tensor:
        v = torch.full_like(v, 512.0)
        # Whatever is rounded to half on the way is larger than what is left at the end.
        v[:, ::3] *= 1 + 2 * eps
        v[:, 105:] *= -1
        v[:, 104] *= 1 + 64 * eps
        return v

    pages.change(value=cancelling)
    q = torch.zeros_like(pages.queries(1).transpose(0, 1))
    note = "; all scores are 0, and values near 512 and -512 cancel"
    check_decode(pages, num_splits, note, q=q)


def test_decode_wherever_the_blocks_lie():
    ordered, mixed = Pages([11, 6, 33], in_order=True), Pages([11, 6, 33])
    got, expected = (
        kernels.paged_decode(*decode_arguments(pages).values(), 1) for pages in (mixed, ordered)
    )
    of = f"{of_decode(mixed, 1)}\nagainst yours for the tables "
    of += ", ".join(map(str, ordered.tables))
    check_close(got, expected, of=of)
    check_decode(mixed)


@settings(max_examples=15)
@given(st.data())
def test_decode_of_any_sequences(data):
    lengths = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=5))
    heads = data.draw(st.sampled_from(HEADS[:4]))
    block_size = data.draw(st.sampled_from([1, 3, 4, 16]))
    check_decode(Pages(lengths, block_size, heads, 4), data.draw(st.integers(1, 4)))


def test_decode_leaves_its_arguments_alone():
    pages = Pages([9, 0, 5])
    arguments = decode_arguments(pages) | {"num_splits": 2}
    check_untouched(arguments, kernels.paged_decode, of_decode(pages, 2))


@interpreted
@pytest.mark.parametrize(
    "heads, num_splits, dtype",
    [
        ((7, 1), 1, torch.float32),
        ((8, 2), 3, torch.float16),
        ((2, 2), 1, torch.float16),
        ((4, 1), 3, torch.float32),
    ],
    ids=str,
)
def test_decode_reads_keys_and_values_once(heads, num_splits, dtype):
    pages = Pages([70, 1, 0, 140], 16, heads, 10, dtype, num_spare=50)
    with counted_reads(pages.keys) as key_reads, counted_reads(pages.values) as value_reads:
        check_decode(pages, num_splits)
    of, owned = of_decode(pages, num_splits), pages.owned()[:, None, :, None]
    for name, reads in (("key", key_reads), ("value", value_reads)):
        counts = sorted(set(reads[(owned > 0).expand_as(reads)].tolist()))
        what = f"how often kernels read the numbers of each {name} of the sequences"
        check_equal(counts, [1], what, of=of)
        others = int((reads * (owned == 0)).sum())
        check_equal(others, 0, f"reads of {name}s in slots without a token", of=of)


@pytest.mark.parametrize("num_splits", [None, 1, 3])
def test_decode_is_computed_by_kernels(num_splits):
    def call() -> Tensor:
        pages = Pages([40, 3], heads=(4, 2))
        return kernels.paged_decode(*decode_arguments(pages).values(), num_splits)

    of = f"paged_decode of sequences of [40, 3] tokens, num_splits: {num_splits}"
    check_kernel_computes(call, of, num_launches=2)


@interpreted
def test_decode_cuts_the_tokens_that_each_sequence_has():
    pages = Pages([600, 1024], 16)
    tables = pages.block_tables(num_more=200)
    with reading_programs(pages.keys) as programs:
        check_decode(pages, 4, block_tables=tables)
    first = programs[pages.tables[0], 0, :, 0].flatten()[:600]
    count = len(set(first.tolist()))
    note = "; the tables have room for 4,224 tokens"
    what = f"so many of the 4 splits read the 600 tokens of sequence 0: {count}"
    check_true(count > 1, what, of=of_decode(pages, 4, note))


@pytest.mark.parametrize("num_splits", [1, 3, 8])
def test_decode_has_a_program_for_each_split(num_splits):
    pages = Pages([90, 3], heads=(4, 2))
    arguments = decode_arguments(pages).values()
    count = count_programs(lambda: kernels.paged_decode(*arguments, num_splits))
    least = 2 * 2 * num_splits
    what = f"{count} programs run for 2 sequences, 2 key/value heads and {num_splits} splits"
    of = of_decode(pages, num_splits)
    check_true(count >= least, f"{what}; each has one of its own: {least}", of=of)


# Sequences, key/value heads, entries of a table, and splits on one processor with room for two.
PLANS = [(1, 1, 40, 2), (1, 1, 31, 1), (1, 2, 40, 1), (2, 1, 40, 1)]


@interpreted
@pytest.mark.parametrize("num_seqs, num_kv_heads, num_entries, num_splits", PLANS)
def test_decode_lets_the_plan_choose(num_seqs, num_kv_heads, num_entries, num_splits):
    pages = Pages([480] * num_seqs, 16, (num_kv_heads, num_kv_heads))
    tables = pages.block_tables(num_more=num_entries - 30)
    with reading_programs(pages.keys) as programs:
        check_decode(pages, None, block_tables=tables)
    count = len(set(programs[pages.tables[0], 0, :, 0].flatten().tolist()))
    note = f"; a table has room for {16 * num_entries} tokens, and there is one processor"
    what = "programs that read the keys of sequence 0 and head 0"
    check_equal(count, num_splits, what, of=of_decode(pages, None, note))


def test_decode_launches_as_much_for_any_split():
    pages = Pages([90, 3])
    for num_splits in (1, 2, 17):
        with observed() as names:
            check_decode(pages, num_splits)
        what = f"{len(names)} kernels are launched, at most 2 are allowed"
        check_true(len(names) <= 2, what, of=of_decode(pages, num_splits))


@pytest.mark.parametrize("num_splits", [None, 1, 3])
def test_decode_does_not_wait_for_the_device(num_splits):
    # So many sequences that no message about the call shows their lengths.
    pages = Pages([90, *range(1, 12)])
    check_decode(pages, num_splits)
    arguments = decode_arguments(pages).values()
    with without_waiting():
        got = kernels.paged_decode(*arguments, num_splits)
    check_equal(tuple(got.shape), (12, 2, 8), "the shape", of=of_decode(pages, num_splits))


@pytest.mark.parametrize("heads", [(6, 4), (7, 2), (2, 3)], ids=str)
def test_decode_refuses_heads_that_do_not_divide(heads):
    arguments = decode_arguments(Pages([4, 1], heads=heads)).values()
    check_raises(ValueError, kernels.paged_decode, *arguments, mentions=heads)


@pytest.mark.parametrize("head_dim", [129, 256])
def test_decode_refuses_heads_that_are_too_large(head_dim):
    arguments = decode_arguments(Pages([4, 1], head_dim=head_dim)).values()
    check_raises(ValueError, kernels.paged_decode, *arguments, mentions=(head_dim, 128))


@pytest.mark.parametrize("num_splits", [0, -3])
def test_decode_refuses_to_make_no_split(num_splits):
    arguments = decode_arguments(Pages([4, 1])).values()
    check_raises(ValueError, kernels.paged_decode, *arguments, num_splits, mentions=[num_splits])


# Pass after pass over one pool: what is stored by one kernel is found by the others.


class Serving:
    """A pool of one layer, and sequences that grow in it, in random blocks."""

    def __init__(self, num_seqs: int, block_size: int = 4, dtype: torch.dtype = torch.float32):
        self.block_size, self.dtype, self.seed = block_size, dtype, 0
        self.keys, self.values = (
            torch.full((90, 1, block_size, 8), math.nan, dtype=dtype, device=DEVICE)
            for _ in range(2)
        )
        self.free = list(range(90))
        python_random.Random(block_size).shuffle(self.free)
        self.tables: list[list[int]] = [[] for _ in range(num_seqs)]
        empty = torch.empty(1, 0, 8, dtype=dtype, device=DEVICE)
        self.dense = [(empty, empty)] * num_seqs
        self.of = History(f"a pool of 90 blocks of {block_size}, 2 heads and 1, {str(dtype)[6:]}")

    def draw(self, heads: int, num_tokens: int) -> Tensor:
        self.seed += 1
        size = num_tokens, heads, 8
        return random(*size, seed=self.seed, dtype=self.dtype).transpose(0, 1)

    def step(self, counts: dict[int, int], num_padding: int = 0) -> None:
        """Store so many new tokens of sequences, then let them look; padding stands behind."""
        self.of.note(f"store_kv and attention of so many tokens of sequences {counts}", None)
        k, v = (self.draw(1, sum(counts.values()) + num_padding) for _ in range(2))
        slots, start = [], 0
        for i, count in counts.items():
            here, before = slice(start, start + count), self.dense[i][0].shape[1]
            while len(self.tables[i]) * self.block_size < before + count:
                self.tables[i].append(self.free.pop())
            slots += [
                self.tables[i][at // self.block_size] * self.block_size + at % self.block_size
                for at in range(before, before + count)
            ]
            pair = zip(self.dense[i], (k, v), strict=True)
            self.dense[i] = tuple(torch.cat((old, new[:, here]), 1) for old, new in pair)
            start += count
        kernels.store_kv(k, v, self.keys, self.values, integers(slots + [-1] * num_padding))
        self.attend(counts, num_padding, f"{self.of}")

    def attend(self, counts: dict[int, int], num_padding: int, of: str) -> None:
        q = self.draw(2, sum(counts.values()))
        parts = q.split(list(counts.values()), 1)
        pairs = zip(counts, parts, strict=True)
        expected = torch.cat([attend_in_float64(x, *self.dense[i]) for i, x in pairs], 1)
        width = max(map(len, self.tables)) + 1
        tables = integers([(self.tables[i] + [self.free[0]] * width)[:width] for i in counts])
        lens = integers([self.dense[i][0].shape[1] for i in counts])
        ends = integers([0, *itertools.accumulate(counts.values())])
        most = max(counts.values())
        got = kernels.paged_prefill(q, self.keys, self.values, tables, ends, lens, most)
        check_close(got, expected, dtype=self.dtype, of=f"{of}\npaged_prefill")
        if most == 1:
            padded = torch.cat((q, self.draw(2, num_padding)), 1).transpose(0, 1)
            tables = torch.cat((tables, tables[:1].expand(num_padding, -1)))
            lens = torch.cat((lens, lens.new_zeros(num_padding)))
            got = kernels.paged_decode(padded, self.keys, self.values, tables, lens, 2)
            rows = expected.transpose(0, 1)
            expected = torch.cat((rows, expected.new_zeros(num_padding, 2, 8)))
            check_close(got, expected, dtype=self.dtype, of=f"{of}\npaged_decode")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size, num_padding", [(4, 0), (1, 1), (16, 3)])
def test_pass_after_pass(block_size, num_padding, dtype):
    serving = Serving(4, block_size, dtype)
    serving.step({2: 9, 1: 4, 0: 2}, num_padding)
    for counts in ({0: 1, 2: 1, 1: 5}, {1: 1, 0: 1, 2: 1}, {3: 19, 0: 1}, {3: 1, 0: 1, 2: 1}):
        serving.step(counts, num_padding)
