"""Grades week2/kv_cache: the store of keys and values, attention over it, a model with it."""

import contextlib
import itertools
import math
import random as python_random
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3Config, Qwen3ForCausalLM

from course.grading import History, check_close, check_equal, check_raises, check_true, lab
from course.launches import without_waiting

kv = lab("week2/kv_cache")
qwen = lab("week1/qwen")

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Finite and much larger than what is real, in the range of float16.
GARBAGE = 3e4


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Signed values with a few outliers, which other orders of axes would put elsewhere."""
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape))
    values = torch.randn(shape, generator=generator)
    values[values.abs() > 2] *= 5
    return values.to(dtype)


@contextlib.contextmanager
def unwritten_memory_is_nan() -> Iterator[None]:
    """Let memory that torch has not written hold NaN, where it often happens to hold zeros."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class Stored:
    """What a cache must hold: for each layer and row, keys and values (num_kv_heads, n, head_dim).

    shape: (num_layers, num_rows, num_kv_heads, head_dim).
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype = torch.float32):
        self.num_layers, self.num_rows, self.num_kv_heads, self.head_dim = shape
        self.dtype = dtype
        self.seed = 0
        empty = torch.empty(self.num_kv_heads, 0, self.head_dim, dtype=dtype)
        self.parts = {
            (layer, row): (empty, empty)
            for layer in range(self.num_layers)
            for row in range(self.num_rows)
        }

    def new_tokens(self, count: int) -> tuple[Tensor, Tensor]:
        """Draw keys and values of some tokens."""
        self.seed += 2
        size = (self.num_kv_heads, count, self.head_dim)
        return random(*size, seed=self.seed, dtype=self.dtype), random(
            *size, seed=self.seed + 1, dtype=self.dtype
        )

    def length(self, row: int) -> int:
        return self.parts[0, row][0].shape[1]

    def add(self, layer: int, row: int, k: Tensor, v: Tensor) -> None:
        old_k, old_v = self.parts[layer, row]
        self.parts[layer, row] = torch.cat((old_k, k), dim=1), torch.cat((old_v, v), dim=1)

    def cut(self, row: int, num_tokens: int) -> None:
        for layer in range(self.num_layers):
            k, v = self.parts[layer, row]
            self.parts[layer, row] = k[:, :num_tokens], v[:, :num_tokens]

    def write(self, cache, counts: Mapping[int, int], order_seed: int | None = None) -> None:
        """Put new tokens behind those of some rows, here and in the cache, and count them there.

        order_seed: mixes the order in which they stand in the call; None keeps row after row.
        """
        rows = [row for row, count in counts.items() for _ in range(count)]
        positions = [p for r, count in counts.items() for p in range(count)]
        positions = [p + self.length(row) for p, row in zip(positions, rows, strict=True)]
        order = list(range(len(rows)))
        if order_seed is not None:
            python_random.Random(order_seed).shuffle(order)
        for layer in range(self.num_layers):
            k, v = self.new_tokens(len(rows))
            where = (torch.tensor(x, dtype=torch.int64)[order] for x in (rows, positions))
            cache.write(layer, *where, k[:, order], v[:, order])
            start = 0
            for row, count in counts.items():
                here = slice(start, start + count)
                self.add(layer, row, k[:, here], v[:, here])
                start += count
        for row, count in counts.items():
            cache.num_computed_tokens[row] += count

    def check(self, cache, of: object) -> None:
        """Hold every stored token of a cache against what was written."""
        for layer in range(self.num_layers):
            for name, part in zip(("keys", "values"), cache.read(layer), strict=True):
                want = (self.num_rows, self.num_kv_heads, cache.capacity, self.head_dim)
                check_equal(tuple(part.shape), want, f"the shape of read's {name}", of=of)
                for row in range(self.num_rows):
                    expected = self.parts[layer, row][name == "values"]
                    what = f"{of}\nread({layer}): the {name} of row {row}, its stored tokens"
                    got = part[row, :, : expected.shape[1]]
                    check_close(got, expected, tolerance=0.0, of=what)


def make_cache(shape: Sequence[int], dtype: torch.dtype = torch.float32):
    return kv.KVCache(*shape, dtype=dtype)


def of_cache(shape: Sequence[int], then: str = "") -> str:
    names = ("num_layers", "num_rows", "num_kv_heads", "head_dim")
    inside = ", ".join(f"{name}={size}" for name, size in zip(names, shape, strict=True))
    return f"KVCache({inside}){then}"


SHAPES = [(2, 3, 2, 5), (1, 1, 1, 1), (3, 4, 3, 6)]


@pytest.mark.parametrize("shape, dtype", list(zip(SHAPES, DTYPES, strict=False)), ids=str)
def test_store_is_empty_at_first(shape, dtype):
    cache, of = make_cache(shape, dtype), of_cache(shape)
    check_equal(cache.num_computed_tokens, [0] * shape[1], "num_computed_tokens", of=of)
    check_equal((cache.capacity, cache.nbytes), (0, 0), "capacity and nbytes", of=of)
    check_equal(torch.device(cache.device), torch.device("cpu"), "device", of=of)
    for part in cache.read(shape[0] - 1):
        want = (*shape[1:3], 0, shape[3])
        check_equal((tuple(part.shape), part.dtype), (want, dtype), "what read gives", of=of)


@pytest.mark.parametrize("num_rows", [0, -3])
def test_store_refuses_to_have_no_rows(num_rows):
    check_raises(ValueError, kv.KVCache, 2, num_rows, 1, 4, mentions=[num_rows])


def check_reserve(cache, num_tokens: int, of: History) -> None:
    """Reserve, and hold capacity against the bounds of the contract."""
    before = cache.capacity
    cache.reserve(num_tokens)
    after = of.note(f"reserve({num_tokens}); capacity", cache.capacity)
    if before >= num_tokens:
        check_equal(after, before, "capacity, which was enough", of=of)
    else:
        most = max(16, 2 * num_tokens)
        right = num_tokens <= after <= most
        check_true(right, f"capacity {after} lies outside [{num_tokens}, {most}]", of=of)


@pytest.mark.parametrize(
    "steps",
    [(1,), (0, 1), (16,), (17,), (100, 5, 3), (16, 17, 32, 33), (40, 41, 42), (1000, 1001)],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_store_reserves_what_is_asked_for(shape, steps):
    cache, of = make_cache(shape), History(of_cache(shape))
    for num_tokens in steps:
        check_reserve(cache, num_tokens, of)
        for part in cache.read(0):
            want = (*shape[1:3], cache.capacity, shape[3])
            check_equal(tuple(part.shape), want, "the shape of what read gives", of=of)


@settings(max_examples=25)
@given(st.lists(st.integers(0, 400), min_size=1, max_size=12))
def test_store_reserves_in_any_order(steps):
    cache, of = make_cache((1, 2, 1, 2)), History(of_cache((1, 2, 1, 2)))
    for num_tokens in steps:
        check_reserve(cache, num_tokens, of)


def real_bytes(cache, num_layers: int) -> int:
    """Add up the memory behind what read gives, each piece of it once."""
    parts = [part.untyped_storage() for layer in range(num_layers) for part in cache.read(layer)]
    return sum({part.data_ptr(): part.nbytes() for part in parts}.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_store_takes_the_bytes_of_its_tokens(shape, dtype):
    cache, of = make_cache(shape, dtype), History(f"{of_cache(shape)}, {dtype}")
    for num_tokens in (1, 20, 21, 300):
        check_reserve(cache, num_tokens, of)
        expected = 2 * math.prod(shape) * cache.capacity * dtype.itemsize
        check_equal(cache.nbytes, expected, "nbytes", of=of)
        check_equal(real_bytes(cache, shape[0]), expected, "memory behind all that read gives", of)


def test_store_of_a_real_model_in_bytes():
    cache = kv.KVCache(28, 4, 8, 128, torch.bfloat16, "meta")
    of = History("KVCache(28, 4, 8, 128, bfloat16, on the meta device)")
    check_reserve(cache, 4096, of)
    check_equal(cache.nbytes, 4 * 114_688 * cache.capacity, "nbytes", of=of)
    devices = {part.device.type for layer in (0, 27) for part in cache.read(layer)}
    check_equal(devices, {"meta"}, "where the keys and values lie", of=of)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_store_gives_back_what_was_written(shape, dtype):
    cache, stored = make_cache(shape, dtype), Stored(shape, dtype)
    cache.reserve(17)
    lengths = dict(zip(range(shape[1]), (17, 1, 9, 4), strict=False))
    stored.write(cache, lengths, order_seed=3)
    of = of_cache(shape, f", {dtype}; tokens of all rows written in mixed order: {lengths}")
    stored.check(cache, of)


@settings(max_examples=25)
@given(st.data())
def test_store_takes_tokens_in_any_order(data):
    shape = (2, 4, 2, 3)
    cache, stored, of = make_cache(shape), Stored(shape), History(of_cache(shape))
    for _ in range(data.draw(st.integers(1, 5))):
        rows = data.draw(st.lists(st.integers(0, 3), min_size=1, unique=True))
        counts = {row: data.draw(st.integers(1, 9)) for row in rows}
        cache.reserve(max(stored.length(row) + count for row, count in counts.items()))
        stored.write(cache, counts, order_seed=data.draw(st.integers(0, 99)))
        of.note(f"reserve, then write so many tokens of rows {counts}, mixed", None)
        stored.check(cache, of)


def test_store_writes_nowhere_else():
    shape = (3, 4, 2, 5)
    cache = make_cache(shape)
    cache.reserve(12)
    before = [[part.clone() for part in cache.read(layer)] for layer in range(3)]
    k, v = random(2, 3, 5, seed=1), random(2, 3, 5, seed=2)
    rows, positions = torch.tensor([2, 0, 2]), torch.tensor([7, 11, 0])
    cache.write(1, rows, positions, k, v)
    for part, new in zip(before[1], (k, v), strict=True):
        for token in range(3):
            part[rows[token], :, positions[token]] = new[:, token]
    of = of_cache(shape, "; write(1, rows [2, 0, 2], positions [7, 11, 0], k, v)")
    for layer in range(3):
        for name, part, want in zip(
            ("keys", "values"), cache.read(layer), before[layer], strict=True
        ):
            what = f"{of}\nall {name} of layer {layer}"
            check_close(part, want, tolerance=0.0, of=what)


def test_store_leaves_what_it_is_given_alone():
    cache = make_cache((1, 2, 2, 5))
    cache.reserve(4)
    arguments = torch.tensor([1, 0]), torch.tensor([3, 0]), random(2, 2, 5), random(2, 2, 5, seed=1)
    before = [argument.clone() for argument in arguments]
    cache.write(0, *arguments)
    of = of_cache((1, 2, 2, 5), ".write")
    for name, got, want in zip(("rows", "positions"), arguments[:2], before[:2], strict=True):
        check_equal(got, want, f"{name} after the call", of=of)
    for name, got, want in zip("kv", arguments[2:], before[2:], strict=True):
        check_close(got, want, tolerance=0.0, of=f"{name} after {of}")
        got.fill_(7.0)
    kept = cache.read(0)[0][torch.tensor([1, 0]), :, torch.tensor([3, 0])].transpose(0, 1)
    check_close(kept, before[2], tolerance=0.0, of=f"{of}, after the caller has changed its k")


def test_store_does_not_wait_for_what_it_writes():
    cache = make_cache((1, 3, 2, 5))
    cache.reserve(8)
    rows, positions = torch.tensor([2, 0, 2]), torch.tensor([1, 7, 0])
    k, v = random(2, 3, 5), random(2, 3, 5, seed=1)
    with without_waiting():
        cache.write(0, rows, positions, k, v)
    keys, values = cache.read(0)
    for name, part, want in (("keys", keys, k), ("values", values, v)):
        of = f"write of 3 tokens, with which the host does not look into tensors: the {name}"
        check_close(part[rows, :, positions].transpose(0, 1), want, tolerance=0.0, of=of)


def test_store_shows_later_writes_in_what_was_read():
    shape = (2, 2, 2, 3)
    cache, stored = make_cache(shape), Stored(shape)
    cache.reserve(9)
    views = [cache.read(layer) for layer in range(2)]
    stored.write(cache, {1: 4, 0: 9})
    of = of_cache(shape, "; reserve(9), then read, then write")
    for layer in range(2):
        for name, view, now in zip(
            ("keys", "values"), views[layer], cache.read(layer), strict=True
        ):
            what = f"{of}\nthe {name} of layer {layer} that were read before the write"
            check_close(view, now.clone(), tolerance=0.0, of=what)
            same = view.data_ptr() == now.data_ptr()
            check_true(same, f"read({layer}) gives other memory each time: a copy", of=of)
    stored.check(cache, of)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_store_keeps_everything_when_it_grows(shape, dtype):
    cache, stored, of = make_cache(shape, dtype), Stored(shape, dtype), History(of_cache(shape))
    with unwritten_memory_is_nan():
        for num_tokens in (5, 40, 41, 130, 700):
            filled = cache.capacity
            check_reserve(cache, num_tokens, of)
            for layer, part in itertools.product(range(shape[0]), range(2)):
                room = cache.read(layer)[part][:, :, filled:]
                check_close(room, torch.zeros_like(room), of=f"{of}\nthe new room in layer {layer}")
            stored.check(cache, of)
            stored.write(
                cache, {row: cache.capacity - stored.length(row) for row in range(shape[1])}
            )
            of.note("write every free place", None)
    stored.check(cache, of)
    check_equal(cache.num_computed_tokens, [cache.capacity] * shape[1], "num_computed_tokens", of)


class Moves:
    """Counts how often the stored keys or values of a cache have come to lie elsewhere.

    What was read before stays alive, so that no new memory can begin where old memory did.
    """

    def __init__(self, cache, num_layers: int):
        self.cache, self.num_layers = cache, num_layers
        self.seen = [cache.read(layer) for layer in range(num_layers)]
        self.count = 0
        self.old: list = []

    def look(self) -> int:
        """Look again; returns the number so far. The first memory of all is no move."""
        now = [self.cache.read(layer) for layer in range(self.num_layers)]
        pairs = zip(itertools.chain(*self.seen), itertools.chain(*now), strict=True)
        changed = any(old.numel() and old.data_ptr() != new.data_ptr() for old, new in pairs)
        self.old += [self.seen] * changed
        self.seen, self.count = now, self.count + changed
        return self.count


def most_moves(num_tokens: int) -> int:
    return math.floor(2 * math.log2(num_tokens))


def test_store_moves_rarely_when_tokens_come_one_by_one():
    shape = (2, 2, 1, 2)
    cache, stored = make_cache(shape), Stored(shape)
    moves, of = Moves(cache, 2), of_cache(shape, "; a sequence grows, one token a step")
    for num_tokens in range(1, 2001):
        cache.reserve(num_tokens)
        count = moves.look()
        what = f"at {num_tokens} tokens, what is stored has moved {count} times; "
        what += f"allowed: {most_moves(num_tokens)}"
        check_true(count <= most_moves(num_tokens), what, of=of)
        if num_tokens % 200 in (1, 2):
            stored.write(cache, {1: num_tokens - stored.length(1)})
    stored.check(cache, of)


def test_store_forgets_what_is_behind():
    shape = (2, 3, 2, 4)
    cache, stored, of = make_cache(shape), Stored(shape), History(of_cache(shape))
    cache.reserve(20)
    capacity = cache.capacity
    stored.write(cache, {0: 20, 1: 7, 2: 3})
    for row, num_tokens in [(0, 12), (1, 7), (2, 0), (0, 1), (0, 0), (1, 6)]:
        cache.truncate(row, num_tokens)
        of.note(f"truncate({row}, {num_tokens})", None)
        stored.cut(row, num_tokens)
        lengths = [stored.length(row) for row in range(3)]
        check_equal(cache.num_computed_tokens, lengths, "num_computed_tokens", of=of)
        check_equal(cache.capacity, capacity, "capacity", of=of)
        stored.check(cache, of)
    stored.write(cache, {2: 20, 0: 2, 1: 4})
    of.note("write {2: 20, 0: 2, 1: 4}", None)
    stored.check(cache, of)
    cache.reserve(50)
    stored.check(cache, of.note("reserve(50)", None) or of)


@pytest.mark.parametrize("row, num_tokens, held", [(0, 6, 5), (1, 1, 0), (2, 9, 8), (0, -1, 5)])
def test_store_refuses_to_keep_what_it_does_not_hold(row, num_tokens, held):
    shape = (1, 3, 1, 2)
    cache, stored = make_cache(shape), Stored(shape)
    cache.reserve(16)
    stored.write(cache, {0: 5, 2: 8})
    check_raises(ValueError, cache.truncate, row, num_tokens, mentions=(held, num_tokens))
    of = of_cache(shape, f"; a refused truncate({row}, {num_tokens})")
    check_equal(cache.num_computed_tokens, [5, 0, 8], "num_computed_tokens", of=of)
    stored.check(cache, of)


def test_store_is_not_shared_with_another():
    shape = (1, 2, 1, 2)
    one, two = make_cache(shape), make_cache(shape)
    stored, other = Stored(shape), Stored(shape)
    other.seed = 50
    for cache, contents, counts in ((one, stored, {0: 3}), (two, other, {0: 1, 1: 8})):
        cache.reserve(8)
        contents.write(cache, counts)
    stored.check(one, "one of two caches")
    other.check(two, "the other of two caches")
    check_equal(one.num_computed_tokens, [3, 0], "num_computed_tokens", of="one of two caches")


def attend_in_float64(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Let the last tokens of one sequence look at it, each up to itself, by torch in float64.

    q: (num_heads, tokens, head_dim). k, v: (num_kv_heads, num_keys, head_dim).
    """
    tokens, num_keys = q.shape[1], k.shape[1]
    mask = torch.ones(tokens, num_keys, dtype=torch.bool).tril(num_keys - tokens)
    group = q.shape[0] // k.shape[0]
    k, v = (part.double().repeat_interleave(group, 0) for part in (k, v))
    return scaled_dot_product_attention(q.double(), k, v, attn_mask=mask)


def prefill_inputs(heads, tokens, num_keys, dtype=torch.float32):
    """Draw q, keys and values of one row, as views whose strides are those of a cache."""
    q = random(tokens, heads[0], 10, seed=3, dtype=dtype).transpose(0, 1)
    room = random(2, heads[1], num_keys + 5, 10, seed=4, dtype=dtype)
    return q, room[0, :, :num_keys], room[1, :, :num_keys]


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (7, 1)], ids=str)
@pytest.mark.parametrize("tokens, num_keys", [(7, 7), (1, 1), (1, 9), (3, 11), (70, 90)])
def test_prefill_matches_torch(tokens, num_keys, heads):
    arguments = prefill_inputs(heads, tokens, num_keys)
    expected = attend_in_float64(*arguments)
    check_close(kv.prefill_attention(*arguments), expected, dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_prefill_in_other_dtypes(dtype):
    arguments = prefill_inputs((6, 2), 5, 12, dtype)
    before = [argument.clone() for argument in arguments]
    expected = attend_in_float64(*arguments)
    check_close(kv.prefill_attention(*arguments), expected, dtype=dtype)
    for name, got, want in zip(("q", "keys", "values"), arguments, before, strict=True):
        check_close(got, want, tolerance=0.0, of=f"{name} after prefill_attention")


def expected_decode(q: Tensor, keys: Tensor, values: Tensor, num_tokens: Sequence[int]) -> Tensor:
    """Let one token of each row look at its own row, row by row."""
    rows = [
        attend_in_float64(q[row, :, None], keys[row, :, :length], values[row, :, :length])[:, 0]
        for row, length in enumerate(num_tokens)
    ]
    return torch.stack(rows)


def decode_inputs(heads, num_tokens, capacity, head_dim, dtype=torch.float32, seed=0):
    """Draw q, keys and values; behind a row's tokens lies large garbage."""
    num_rows, (num_heads, num_kv_heads) = len(num_tokens), heads
    q = random(num_rows, num_heads, head_dim, seed=seed, dtype=dtype)
    size = (num_rows, num_kv_heads, capacity, head_dim)
    keys, values = random(*size, seed=seed + 1), random(*size, seed=seed + 2)
    for row, length in enumerate(num_tokens):
        keys[row, :, length:] = keys[row, :, length:].sign() * GARBAGE
        values[row, :, length:] = values[row, :, length:].sign() * -GARBAGE
    return q, keys.to(dtype), values.to(dtype)


def of_decode(q: Tensor, keys: Tensor, num_tokens: Sequence[int]) -> str:
    """Put a call into words, with what lies where nothing may be read."""
    shapes = f"q: {tuple(q.shape)} {q.dtype}, keys and values: {tuple(keys.shape)}"
    behind = f"behind a row's tokens lie values of ±{GARBAGE:,.0f}"
    return f"decode_attention({shapes}, num_tokens: {list(num_tokens)}); {behind}"


HEADS = [(1, 1), (3, 3), (6, 2), (7, 1), (14, 2), (9, 3)]


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(
    "num_tokens, capacity", [((4, 1, 11), 16), ((1,), 1), ((64, 2, 33, 64), 64), ((1, 1, 1), 40)]
)
def test_decode_matches_torch(num_tokens, capacity, heads):
    q, keys, values = decode_inputs(heads, num_tokens, capacity, 10)
    expected = expected_decode(q, keys, values, num_tokens)
    got = kv.decode_attention(q, keys, values, torch.tensor(num_tokens))
    check_close(got, expected, dtype=torch.float32, of=of_decode(q, keys, num_tokens))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("heads", [(6, 2), (7, 1)], ids=str)
def test_decode_in_other_dtypes(heads, dtype):
    num_tokens = (4, 1, 11)
    q, keys, values = decode_inputs(heads, num_tokens, 16, 10, dtype)
    expected = expected_decode(q, keys, values, num_tokens)
    got = kv.decode_attention(q, keys, values, torch.tensor(num_tokens))
    check_close(got, expected, dtype=dtype, of=of_decode(q, keys, num_tokens))


@settings(max_examples=30)
@given(st.data())
def test_decode_of_any_rows_is_that_of_each_alone(data):
    heads = data.draw(st.sampled_from(HEADS))
    capacity = data.draw(st.integers(1, 24))
    num_tokens = data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=5))
    q, keys, values = decode_inputs(
        heads, num_tokens, capacity, 4, seed=data.draw(st.integers(0, 9))
    )
    expected = expected_decode(q, keys, values, num_tokens)
    together = kv.decode_attention(q, keys, values, torch.tensor(num_tokens))
    check_close(together, expected, dtype=torch.float32, of=of_decode(q, keys, num_tokens))
    for row, length in enumerate(num_tokens):
        one = slice(row, row + 1)
        alone = kv.decode_attention(q[one], keys[one], values[one], torch.tensor([length]))
        of = of_decode(q[one], keys[one], [length])
        check_close(alone, expected[one], dtype=torch.float32, of=of)


def test_decode_of_views_into_a_larger_cache():
    num_tokens = (5, 9, 1)
    q, keys, values = decode_inputs((6, 2), num_tokens, 12, 8)
    whole = torch.full((2, 5, 2, 20, 8), GARBAGE)
    whole[0, 1:4, :, :12], whole[1, 1:4, :, :12] = keys, values
    wide_q = torch.stack((q, -q), dim=-1).transpose(0, 1)[..., 0].transpose(0, 1)
    expected = expected_decode(q, keys, values, num_tokens)
    views = whole[0, 1:4], whole[1, 1:4]
    got = kv.decode_attention(wide_q, *views, torch.tensor(num_tokens))
    check_close(got, expected, dtype=torch.float32, of=of_decode(q, views[0], num_tokens))


def test_decode_of_large_scores():
    num_tokens = (7, 3, 12)
    q, keys, values = decode_inputs((4, 2), num_tokens, 12, 16)
    q, values = q * 30, values * 100
    expected = expected_decode(q, keys, values, num_tokens)
    got = kv.decode_attention(q, keys, values, torch.tensor(num_tokens))
    of = f"{of_decode(q, keys, num_tokens)}, and scores are large"
    check_close(got, expected, dtype=torch.float32, of=of)


def test_decode_leaves_its_arguments_alone():
    arguments = (*decode_inputs((6, 2), (4, 1, 9), 10, 8), torch.tensor([4, 1, 9]))
    before = [argument.clone() for argument in arguments]
    kv.decode_attention(*arguments)
    of = "decode_attention"
    for name, got, want in zip(("q", "keys", "values"), arguments, before, strict=False):
        check_close(got, want, tolerance=0.0, of=f"{name} after {of}")
    check_equal(arguments[-1], before[-1], "num_tokens after the call", of=of)


# What the rows of a cache hold, and how many tokens of which rows come next, in this order.
PASSES = {
    "one prompt": ([0], {0: 7}),
    "one prompt of one token": ([0], {0: 1}),
    "prompts": ([0, 0, 0], {0: 4, 1: 1, 2: 9}),
    "single tokens": ([5, 1, 8], {0: 1, 1: 1, 2: 1}),
    "single tokens of some rows": ([5, 3, 8, 2, 4], {3: 1, 0: 1}),
    "a chunk that continues": ([5], {0: 4}),
    "chunks that continue": ([1, 9, 4], {0: 2, 1: 5, 2: 3}),
    "rows backwards": ([3, 0, 6], {2: 1, 1: 5, 0: 2}),
    "everything": ([5, 0, 8, 3, 2, 0], {3: 1, 1: 6, 5: 1, 4: 3, 0: 1}),
    "single tokens around a chunk": ([7, 2, 7], {0: 1, 1: 3, 2: 1}),
    "a long row beside a short one": ([40, 0, 1], {2: 1, 0: 1, 1: 2}),
}


def run_pass(cache, stored: Stored, counts: Mapping[int, int], num_heads: int, of: object) -> None:
    """Run one pass through every layer; hold its results and the cache against the oracle."""
    num_tokens = sum(counts.values())
    of = f"{of}\na pass over so many tokens of rows: {dict(counts)}"
    attend = kv.cached_attend(cache, counts)
    before = list(cache.num_computed_tokens)
    for layer in range(stored.num_layers):
        size = (num_tokens, num_heads, stored.head_dim)
        q = random(*size, seed=stored.seed + 77, dtype=stored.dtype).transpose(0, 1)
        k, v = stored.new_tokens(num_tokens)
        given_parts = [part.clone() for part in (q, k, v)]
        out = attend(layer, q, k, v)
        what = f"{of}\nattend({layer}, q, k, v)"
        for name, got, want in zip("qkv", (q, k, v), given_parts, strict=True):
            check_close(got, want, tolerance=0.0, of=f"{what}\n{name} after the call")
        expected, start = [], 0
        for row, count in counts.items():
            here = slice(start, start + count)
            stored.add(layer, row, k[:, here], v[:, here])
            expected.append(attend_in_float64(q[:, here], *stored.parts[layer, row]))
            start += count
        check_close(out, torch.cat(expected, dim=1), dtype=stored.dtype, of=what)
    check_equal(cache.num_computed_tokens, before, "num_computed_tokens after all layers", of=of)
    stored.check(cache, of)


def spoil_the_rest(cache, stored: Stored) -> None:
    """Write garbage behind every row's tokens, as a longer sequence may leave it."""
    rooms = [range(stored.length(row), cache.capacity) for row in range(stored.num_rows)]
    rows = torch.tensor([row for row, room in enumerate(rooms) for _ in room], dtype=torch.int64)
    positions = torch.tensor([position for room in rooms for position in room], dtype=torch.int64)
    size = (stored.num_kv_heads, len(rows), stored.head_dim)
    for layer in range(stored.num_layers):
        garbage = random(*size, seed=layer).sign().to(stored.dtype) * GARBAGE
        cache.write(layer, rows, positions, garbage, -garbage)


def filled(lengths, heads, dtype=torch.float32, num_layers=2, head_dim=6):
    """Make a cache whose rows hold so many tokens, with room for twelve more and garbage there."""
    shape = (num_layers, len(lengths), heads[1], head_dim)
    cache, stored = make_cache(shape, dtype), Stored(shape, dtype)
    cache.reserve(max(lengths) + 12)
    counts = {row: length for row, length in enumerate(lengths) if length}
    if counts:
        stored.write(cache, counts)
    spoil_the_rest(cache, stored)
    return cache, stored


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (7, 1)], ids=str)
@pytest.mark.parametrize("case", PASSES)
def test_attend_matches_whole_sequences(case, heads):
    lengths, counts = PASSES[case]
    cache, stored = filled(lengths, heads)
    of = f"cached_attend; {heads[0]} and {heads[1]} heads; the rows hold {lengths} tokens, and "
    of += f"behind them lie values of ±{GARBAGE:,.0f}"
    run_pass(cache, stored, counts, heads[0], of)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", ["prompts", "everything", "chunks that continue"])
def test_attend_in_other_dtypes(case, dtype):
    lengths, counts = PASSES[case]
    cache, stored = filled(lengths, (6, 2), dtype)
    run_pass(cache, stored, counts, 6, f"cached_attend, {dtype}; the rows hold {lengths} tokens")


def test_attend_leaves_other_rows_alone():
    cache, stored = filled([4, 6, 2, 0], (4, 2))
    before = [[part.clone() for part in cache.read(layer)] for layer in range(2)]
    counts = MappingProxyType({3: 2, 0: 1})
    run_pass(cache, stored, counts, 4, "cached_attend; the rows hold [4, 6, 2, 0] tokens")
    check_equal(dict(counts), {3: 2, 0: 1}, "num_new_tokens afterwards", of="cached_attend")
    for layer, row in itertools.product(range(2), (1, 2)):
        for name, part, old in zip(
            ("keys", "values"), cache.read(layer), before[layer], strict=True
        ):
            of = f"cached_attend for rows 3 and 0: all {name} of row {row} in layer {layer}"
            check_close(part[row], old[row], tolerance=0.0, of=of)


def test_attend_pass_after_pass():
    lengths = [0, 3, 0]
    cache, stored = filled(lengths, (6, 2), num_layers=3)
    of = History(f"cached_attend in a row of passes; the rows hold {lengths} tokens")
    for counts in ({0: 5, 1: 1}, {2: 4, 0: 1, 1: 2}, {0: 1, 1: 1, 2: 1}, {1: 1}, {2: 2, 1: 1}):
        run_pass(cache, stored, counts, 6, of)
        of.note(f"a pass over {counts}", None)
        for row, count in counts.items():
            cache.num_computed_tokens[row] += count


class Noted:
    """Attention by torch that is handed in, and notes which numbers of tokens it was called for."""

    def __init__(self):
        self.prefills: list[tuple[int, int]] = []
        self.decodes: list[list[int]] = []

    def prefill(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        self.prefills.append((q.shape[1], keys.shape[1]))
        return -attend_in_float64(q, keys, values).to(q.dtype)

    def decode(self, q: Tensor, keys: Tensor, values: Tensor, num_tokens: Tensor) -> Tensor:
        check_equal(num_tokens.dtype, torch.int64, "the dtype of num_tokens, handed to decode")
        self.decodes.append(num_tokens.tolist())
        return -expected_decode(q, keys, values, num_tokens.tolist()).to(q.dtype)


@pytest.mark.parametrize("case", PASSES)
def test_attend_through_what_is_handed_in(case):
    lengths, counts = PASSES[case]
    (cache, stored), noted = filled(lengths, (6, 2)), Noted()
    of = f"cached_attend with prefill and decode handed in, which negate what is right; {counts}"
    own, theirs = (
        kv.cached_attend(cache, counts),
        kv.cached_attend(cache, counts, prefill=noted.prefill, decode=noted.decode),
    )
    num_tokens = sum(counts.values())
    for layer in range(stored.num_layers):
        q = random(6, num_tokens, stored.head_dim, seed=layer)
        k, v = stored.new_tokens(num_tokens)
        check_close(theirs(layer, q, k, v), -own(layer, q, k, v).double(), dtype=q.dtype, of=of)
    chunks = [(n, lengths[row] + n) for row, n in counts.items() if n > 1]
    what = "tokens and keys that prefill was called with, layer after layer"
    check_equal(noted.prefills, chunks * stored.num_layers, what, of=of)
    singles = sorted(lengths[row] + 1 for row, n in counts.items() if n == 1)
    called = [n for call in noted.decodes for n in call]
    what = "the rows with one new token did not all come by decode, in every layer"
    check_true(all(called.count(n) >= stored.num_layers for n in singles), what, of=of)


@settings(max_examples=20)
@given(st.data())
def test_attend_with_any_rows(data):
    heads = data.draw(st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 1)]))
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
    rows = data.draw(st.permutations(range(len(lengths))))[
        : data.draw(st.integers(1, len(lengths)))
    ]
    counts = {row: data.draw(st.sampled_from([1, 1, 2, 5])) for row in rows}
    cache, stored = filled(lengths, heads, head_dim=4)
    run_pass(cache, stored, counts, heads[0], f"cached_attend; the rows hold {lengths} tokens")


class LookupModel(nn.Module):
    """A model whose queries, keys and values are looked up by layer, id and position.

    Its scores depend on every token that the last one sees, and on where each stands. It notes the
    ids and positions of every call, and raises in a layer when it is told to.
    """

    def __init__(self, heads=(6, 2), num_layers=2, head_dim=5, limit=48, dtype=torch.float32):
        super().__init__()
        self.num_heads, num_kv_heads = heads
        self.config = SimpleNamespace(
            vocab_size=19,
            hidden_size=7,
            num_hidden_layers=num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=limit,
        )
        self.embed_tokens = nn.Embedding(19, 7, dtype=dtype)
        self.embed_tokens.weight.data.fill_(1.0)
        self.tables = [
            [
                random(19, count, head_dim, seed=10 * layer + part, dtype=dtype)
                for part, count in enumerate((self.num_heads, num_kv_heads, num_kv_heads))
            ]
            for layer in range(num_layers)
        ]
        self.moved = random(limit, head_dim, seed=5, dtype=dtype)
        self.head = random(num_layers * self.num_heads * head_dim, 19, seed=6, dtype=dtype)
        self.calls: list[list[tuple[int, int]]] = []
        # A layer; -1 for none, num_layers for the scores.
        self.fails_in_layer = -1

    @property
    def num_computed(self) -> int:
        """How many tokens all calls had together."""
        return sum(map(len, self.calls))

    def heads_of(self, layer: int, ids: Tensor, positions: Tensor) -> list[Tensor]:
        """Look up q, k and v: (..., heads, tokens, head_dim)."""
        moved = self.moved[positions].unsqueeze(-2)
        parts = [(table[ids] + moved).transpose(-3, -2) for table in self.tables[layer]]
        return [part * self.embed_tokens.weight[0, 0] for part in parts]

    def forward(self, input_ids: Tensor, positions: Tensor, attend) -> Tensor:
        ids, places = input_ids.flatten().tolist(), positions.flatten().tolist()
        self.calls.append(list(zip(ids, places, strict=True)))
        hidden = []
        for layer in range(self.config.num_hidden_layers):
            if layer == self.fails_in_layer:
                raise RuntimeError("the model was told to fail")
            out = attend(layer, *self.heads_of(layer, input_ids, positions))
            hidden.append(out.transpose(-3, -2).flatten(-2))
        return torch.cat(hidden, dim=-1)

    def logits(self, hidden: Tensor) -> Tensor:
        if self.fails_in_layer == self.config.num_hidden_layers:
            raise RuntimeError("the model was told to fail")
        return (hidden @ self.head).float()

    @contextlib.contextmanager
    def failing(self, layer: int, of: History, what: str) -> Iterator[None]:
        """A block in which the model raises in a layer; holds it to being called once."""
        num_calls, self.fails_in_layer = len(self.calls), layer
        try:
            yield
            raised = False
        except RuntimeError as error:
            raised = str(error) == "the model was told to fail"
        self.fails_in_layer = -1
        of.note(f"{what}; the model raises", None)
        check_true(raised, "the model has raised, and its error does not come out", of=of)
        check_equal(len(self.calls) - num_calls, 1, "how often the model was called", of=of)

    @torch.no_grad()
    def expected(self, ids: Sequence[int]) -> Tensor:
        """Score what follows a whole sequence, by torch in float64."""
        ids = torch.tensor(ids)
        hidden = [
            attend_in_float64(*self.heads_of(layer, ids, torch.arange(len(ids))))[:, -1].flatten()
            for layer in range(self.config.num_hidden_layers)
        ]
        return torch.cat(hidden) @ self.head.double()


def cache_of(model: LookupModel, num_rows: int):
    """Make the cache first of all, so that an unwritten one is what is heard of."""
    config = model.config
    shape = config.num_hidden_layers, num_rows, config.num_key_value_heads, config.head_dim
    return kv.KVCache(*shape, dtype=model.embed_tokens.weight.dtype)


class Served:
    """A model with a cache, and beside it the whole sequence of every row."""

    def __init__(self, num_rows: int, **arguments):
        self.model = LookupModel(**arguments)
        self.cache = cache_of(self.model, num_rows)
        self.ids: list[list[int]] = [[] for _ in range(num_rows)]
        self.of = History(f"extend, on an empty cache of {num_rows} rows")
        self.draw = python_random.Random(num_rows)

    def new_ids(self, count: int) -> list[int]:
        return self.draw.choices(range(19), k=count)

    def step(self, counts: Mapping[int, int]) -> None:
        """Extend rows by so many random ids; hold scores, counts and the model's calls."""
        new_tokens = {row: self.new_ids(count) for row, count in counts.items()}
        kept = {row: list(ids) for row, ids in new_tokens.items()}
        tokens = []
        for row, ids in new_tokens.items():
            tokens += [(token_id, len(self.ids[row]) + i) for i, token_id in enumerate(ids)]
            self.ids[row] = self.ids[row] + ids
        num_calls = len(self.model.calls)
        got = kv.extend(self.model, self.cache, new_tokens)
        self.of.note(f"extend by so many ids: {dict(counts)}", got)
        check_equal(new_tokens, kept, "new_tokens after the call", of=self.of)
        calls = self.model.calls[num_calls:]
        check_equal(len(calls), 1, "how often the model was called", of=self.of)
        what = "the (id, position) pairs that the model was called with, sorted"
        check_equal(sorted(calls[0]), sorted(tokens), what, of=self.of)
        expected = torch.stack([self.model.expected(self.ids[row]) for row in counts])
        check_close(got, expected, dtype=torch.float32, of=self.of, tolerance=self.tolerance())
        check_true(not got.requires_grad, "the scores have a gradient", of=self.of)
        lengths = [len(ids) for ids in self.ids]
        check_equal(self.cache.num_computed_tokens, lengths, "num_computed_tokens", of=self.of)

    def truncate(self, row: int, num_tokens: int) -> None:
        self.cache.truncate(row, num_tokens)
        self.of.note(f"truncate({row}, {num_tokens})", None)
        self.ids[row] = self.ids[row][:num_tokens]

    def tolerance(self) -> float | None:
        # In half precision the oracle rounds nothing, the model its hidden states and its head.
        half = self.model.embed_tokens.weight.dtype.itemsize == 2
        return 4e-2 if half else None


def test_extend_by_prompts_and_then_single_tokens():
    served = Served(3)
    served.step({0: 11, 1: 1, 2: 6})
    for _ in range(6):
        served.step({0: 1, 1: 1, 2: 1})


@pytest.mark.parametrize("chunk", [1, 2, 5, 9, 23])
def test_extend_by_chunks_of_a_prompt(chunk):
    served = Served(2)
    served.step({1: 4})
    for start in range(0, 23, chunk):
        served.step({0: min(chunk, 23 - start)})
    served.step({1: 1, 0: 1})


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_extend_in_any_order_of_rows(order):
    served = Served(4)
    served.step({row: (7, 2, 5)[row] for row in order})
    served.step({row: (1, 4, 1)[row] for row in order})
    served.step(dict.fromkeys(reversed(order), 1))


def test_extend_with_prompts_chunks_and_single_tokens_side_by_side():
    served = Served(5)
    served.step({4: 9, 1: 3})
    served.step({1: 1, 0: 12, 4: 5})
    served.step({0: 1, 3: 1, 1: 1, 4: 2})
    served.step({2: 8, 3: 1})
    served.step({3: 1, 2: 1, 4: 1, 0: 1, 1: 1})


def test_extend_by_single_tokens_with_idle_rows_between():
    served = Served(5)
    served.step({0: 3, 1: 20, 2: 1, 3: 7, 4: 9})
    served.step({4: 1, 2: 1})
    served.step({3: 1})
    served.step({0: 1, 4: 1})
    served.step({1: 1, 0: 1})


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_extend_a_row_that_a_longer_sequence_has_left(kept):
    served = Served(2)
    served.step({0: 30, 1: 4})
    served.truncate(0, kept)
    served.step({0: 3, 1: 1})
    served.step({1: 1, 0: 1})
    served.step({0: 1})


@settings(max_examples=15)
@given(st.data())
def test_extend_whatever_comes_and_goes(data):
    served = Served(4)
    for _ in range(data.draw(st.integers(1, 7))):
        row = data.draw(st.integers(0, 3))
        if served.ids[row] and data.draw(st.booleans()):
            served.truncate(row, data.draw(st.integers(0, len(served.ids[row]) - 1)))
        rows = data.draw(st.lists(st.integers(0, 3), min_size=1, unique=True))
        served.step({row: data.draw(st.sampled_from([1, 1, 1, 2, 4])) for row in rows})


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_extend_with_any_heads(heads):
    served = Served(3, heads=heads, num_layers=3, head_dim=4)
    served.step({2: 6, 0: 1})
    served.step({0: 1, 1: 3, 2: 2})
    served.step({1: 1, 2: 1, 0: 1})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_extend_in_half_precision(dtype):
    served = Served(3, dtype=dtype)
    served.step({0: 9, 1: 1, 2: 4})
    served.step({1: 1, 0: 1, 2: 3})
    part = served.cache.read(0)[0]
    check_equal(part.dtype, dtype, "the dtype of what is stored", of=served.of)


def test_extend_moves_memory_rarely():
    served = Served(2, limit=100)
    moves = Moves(served.cache, 2)
    for num_tokens in range(1, 71):
        new_tokens = {0: [num_tokens % 19]}
        got = kv.extend(served.model, served.cache, new_tokens)
        served.ids[0] += new_tokens[0]
        count, allowed = moves.look(), most_moves(num_tokens)
        what = f"at {num_tokens} tokens, what is stored has moved {count} times; allowed: {allowed}"
        check_true(count <= allowed, what, of="extend by one token, again and again")
    check_close(got[0], served.model.expected(served.ids[0]), dtype=torch.float32)
    room = served.cache.capacity
    what = f"capacity {room} after 70 tokens lies outside [70, 140]"
    check_true(70 <= room <= 140, what, of="extend by one token, again and again")


@pytest.mark.parametrize("kind", [tuple, list, range], ids=lambda kind: kind.__name__)
def test_extend_takes_ids_in_any_sequence(kind):
    model = LookupModel()
    cache = cache_of(model, 2)
    ids = {1: range(3, 8), 0: range(1)}
    new_tokens = MappingProxyType(
        {row: part if kind is range else kind(part) for row, part in ids.items()}
    )
    got = kv.extend(model, cache, new_tokens)
    expected = torch.stack([model.expected(list(part)) for part in ids.values()])
    check_close(
        got, expected, dtype=torch.float32, of=f"extend with each row's ids in a {kind.__name__}"
    )


# new_tokens for a cache of 3 rows that hold 40, 0 and 5 tokens, in a context of 48; what the
# message names.
REFUSED = {
    "no row": ({}, ()),
    "a row behind the last": ({0: [1], 3: [2]}, (3,)),
    "a negative row": ({-1: [2], 0: [1]}, (-1,)),
    "no ids": ({1: [4, 5], 2: []}, (2,)),
    "one token too many": ({2: [1], 0: [1] * 9}, (49, 48)),
    "a prompt that is too long": ({1: [3] * 60}, (60, 48)),
    "a long prompt in front of an unknown row": ({1: [3] * 48, 3: [2]}, (3,)),
    "a long prompt in front of a row without ids": ({1: [3] * 48, 2: []}, (2,)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_extend_refuses_and_changes_nothing(case):
    new_tokens, mentions = REFUSED[case]
    served = Served(3)
    served.step({0: 40, 2: 5})
    cache = served.cache
    before = [part.clone() for layer in range(2) for part in cache.read(layer)]
    num_calls, room = len(served.model.calls), cache.capacity
    check_raises(ValueError, kv.extend, served.model, cache, new_tokens, mentions=mentions)
    of = f"extend, refused: {case}"
    check_equal(len(served.model.calls), num_calls, "calls of the model", of=of)
    check_equal(cache.num_computed_tokens, [40, 0, 5], "num_computed_tokens", of=of)
    check_equal(cache.capacity, room, "capacity", of=of)
    after = [part for layer in range(2) for part in cache.read(layer)]
    for part, old in zip(after, before, strict=True):
        check_close(part, old, tolerance=0.0, of=f"{of}: what is stored")
    served.step({2: 1, 0: 8, 1: 2})


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_extend_after_the_model_has_failed(layer):
    served = Served(3)
    served.step({0: 5, 2: 14})
    new_tokens = {2: served.new_ids(3), 0: served.new_ids(1), 1: served.new_ids(6)}
    where = f"layer {layer}" if layer < 2 else "the scores"
    with served.model.failing(layer, served.of, f"extend by 10 ids, in {where}"):
        kv.extend(served.model, served.cache, new_tokens)
    lengths = served.cache.num_computed_tokens
    check_equal(lengths, [5, 0, 14], "num_computed_tokens", of=served.of)
    served.step({2: 3, 0: 1, 1: 6})
    served.step({1: 1, 0: 1, 2: 1})


def test_extend_through_an_attend_that_is_handed_in():
    served, seen = Served(3), []

    def make_attend(cache, counts):
        seen.append((cache is served.cache, dict(counts)))
        return lambda layer, q, k, v: torch.zeros_like(q)

    got = kv.extend(served.model, served.cache, {2: [3, 1, 4], 0: [5]}, make_attend)
    of = "extend with a make_attend whose attention is 0 everywhere"
    check_close(got, torch.zeros(2, served.model.head.shape[1]), of=of)
    check_equal(seen, [(True, {2: 3, 0: 1})], "calls of make_attend (the cache itself, counts)", of)
    check_equal(served.cache.num_computed_tokens, [1, 0, 3], "num_computed_tokens", of=of)


def test_logits_through_an_attend_that_is_handed_in():
    model, counts = LookupModel(), []

    def make_attend(cache, num_new_tokens):
        counts.append(dict(num_new_tokens))
        return kv.cached_attend(cache, num_new_tokens)

    next_logits = kv.CachedLogits(model, make_attend)
    for ids in ([3, 1, 4], [3, 1, 4, 1], [3, 1, 5, 9]):
        of = f"CachedLogits with a make_attend handed in, called with {ids}"
        check_close(next_logits(ids), model.expected(ids), dtype=torch.float32, of=of)
    check_equal(counts, [{0: 3}, {0: 1}, {0: 2}], "what make_attend was called for", of=of)


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


def qwen_cache(shape: dict, num_rows: int):
    sizes = shape["num_key_value_heads"], shape["head_dim"]
    return kv.KVCache(shape["num_hidden_layers"], num_rows, *sizes)


def uncached(theirs: nn.Module, ids: Sequence[int]) -> Tensor:
    """Score what follows a whole sequence, which transformers computes at once."""
    return theirs(torch.tensor([list(ids)]), use_cache=False).logits[0, -1]


STEPS = [
    {0: 11, 1: 1, 2: 6},
    {0: 1, 1: 1, 2: 1},
    {2: 1, 0: 1, 1: 1},
    {1: 5, 2: 1},
    {0: 1, 1: 1},
    {2: 1, 1: 1, 0: 1},
]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", FAMILIES)
def test_extend_matches_transformers(family, seed):
    shape = ugly(family, seed)
    cache = qwen_cache(shape, 3)
    theirs = oracle_model(family, shape, seed)
    model = loaded(family, shape, theirs)
    draw = python_random.Random(seed)
    rows: list[list[int]] = [[], [], []]
    for counts in STEPS:
        new_tokens = {row: draw.choices(range(61), k=count) for row, count in counts.items()}
        for row, ids in new_tokens.items():
            rows[row] = rows[row] + ids
        got = kv.extend(model, cache, new_tokens)
        expected = torch.stack([uncached(theirs, rows[row]) for row in counts])
        of = f"extend(a {family} of {shape}, by so many ids: {counts}, to {list(map(len, rows))})"
        check_close(got, expected, of=of)


@pytest.mark.parametrize("family", FAMILIES)
def test_extend_to_the_end_of_the_context_matches_transformers(family):
    shape = ugly(family, 7)
    cache = qwen_cache(shape, 1)
    theirs = oracle_model(family, shape, 7)
    model = loaded(family, shape, theirs)
    ids = [(7 * i + i * i) % 61 for i in range(40)]
    for start, end in itertools.pairwise((0, 17, 18, 36, 39, 40)):
        got = kv.extend(model, cache, {0: ids[start:end]})
        of = f"extend(a {family} of {shape}, tokens {start} to {end - 1} of 40)"
        check_close(got[0], uncached(theirs, ids[:end]), of=of)


class Asked:
    """CachedLogits with its model, and what it was asked for so far."""

    def __init__(self, **arguments):
        self.model = LookupModel(**arguments)
        self.next_logits = kv.CachedLogits(self.model)
        self.before: list[int] = []
        self.of = History("CachedLogits")

    def ask(self, ids: Sequence[int], *, count: bool = True) -> Tensor:
        """Ask for scores; hold them, and how many tokens were computed, against the oracle.

        count: whether it is known what the cache holds; not so after a failure.
        """
        given_ids, computed = list(ids), self.model.num_computed
        got = self.next_logits(given_ids)
        self.of.note(f"called with {list(ids) if len(ids) < 9 else f'{len(ids)} ids'}", got)
        check_equal(given_ids, list(ids), "the ids after the call", of=self.of)
        check_close(got, self.model.expected(ids), dtype=torch.float32, of=self.of)
        check_true(not got.requires_grad, "the scores have a gradient", of=self.of)
        if count:
            pairs = itertools.takewhile(lambda p: p[0] == p[1], zip(self.before, ids, strict=False))
            expected = len(ids) - min(sum(1 for _ in pairs), len(ids) - 1)
            computed = self.model.num_computed - computed
            check_equal(computed, expected, "how many tokens were computed", of=self.of)
        self.before = list(ids)
        return got


def test_logits_of_a_growing_sequence():
    asked, ids = Asked(), [3, 1, 4, 1, 5, 9, 2, 6]
    for _ in range(20):
        scores = asked.ask(ids)
        ids = [*ids, int(scores.argmax())]


CALLS = {
    "another prompt": ([3, 1, 4, 1], [5, 9, 2]),
    "a longer prompt": ([3, 1, 4, 1], [5, 9, 2, 6, 5, 3, 5]),
    "the same beginning": ([3, 1, 4, 1, 5], [3, 1, 4, 2, 2, 2]),
    "the same beginning, shorter": ([3, 1, 4, 1, 5, 9, 2, 6], [3, 1, 7]),
    "the same ids again": ([3, 1, 4, 1], [3, 1, 4, 1]),
    "one of the same ids": ([3, 1, 4, 1], [3]),
    "one id, twice": ([3], [3]),
    "only the beginning": ([3, 1, 4, 1, 5, 9], [3, 1, 4]),
    "only the beginning, then on": ([3, 1, 4, 1, 5, 9], [3, 1, 4], [3, 1, 4, 7], [3, 1, 4, 1, 5]),
    "only the last id differs": ([3, 1, 4, 1, 5], [3, 1, 4, 1, 6]),
    "only the first id differs": ([3, 1, 4, 1, 5], [2, 1, 4, 1, 5]),
    "an id in the middle differs": ([3, 1, 4, 1, 5, 9, 2], [3, 1, 4, 7, 5, 9, 2]),
    "two sequences in turn": ([3, 1, 4], [2, 7], [3, 1, 4, 1], [2, 7, 1], [3, 1, 4, 1, 5]),
    "several new ids at once": ([3, 1], [3, 1, 4, 1, 5, 9], [3, 1, 4, 1, 5, 9, 2, 6, 5]),
}


@pytest.mark.parametrize("case", CALLS)
def test_logits_of_calls_that_do_not_follow_each_other(case):
    asked = Asked()
    for ids in CALLS[case]:
        asked.ask(ids)


@settings(max_examples=20)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=8), min_size=2, max_size=6))
def test_logits_of_any_calls(calls):
    asked = Asked()
    for ids in calls:
        asked.ask(ids)


def test_logits_of_one_list_that_the_caller_changes():
    model = LookupModel()
    next_logits = kv.CachedLogits(model)
    ids = [3, 1, 4, 1, 5, 9]
    for changed in ({}, {1: 8, 4: 7}, {0: 2, 3: 6, 4: 5}, {5: 0}, {3: 1}):
        for place, token_id in changed.items():
            ids[place] = token_id
        got = next_logits(ids)
        of = f"CachedLogits, always called with the same list, which holds {ids} now"
        check_close(got, model.expected(ids), dtype=torch.float32, of=of)
    ids.append(7)
    check_close(next_logits(ids), model.expected(ids), dtype=torch.float32, of=f"then {ids}")


def test_logits_of_a_tuple():
    model = LookupModel()
    next_logits = kv.CachedLogits(model)
    for ids in ((3, 1, 4), (3, 1, 4, 1)):
        check_close(next_logits(ids), model.expected(ids), dtype=torch.float32, of=f"of {ids}")


@pytest.mark.parametrize(
    "failing", [(3, 1, 4, 1, 5, 9), (3, 1, 7, 7), (8, 8, 8), (3, 1, 4)], ids=str
)
@pytest.mark.parametrize(
    "then", [(3, 1, 4, 1, 5, 9), (3, 1, 4, 1), (3, 1, 7, 7), (8, 8, 8, 2)], ids=str
)
def test_logits_after_the_model_has_failed(then, failing):
    asked = Asked()
    asked.ask([3, 1, 4, 1])
    with asked.model.failing(1, asked.of, f"called with {list(failing)}"):
        asked.next_logits(list(failing))
    asked.ask(then, count=False)
    asked.ask([*then, 2])


def test_logits_after_the_first_call_has_failed():
    asked = Asked()
    with asked.model.failing(1, asked.of, "called with [3, 1, 4, 1]"):
        asked.next_logits([3, 1, 4, 1])
    asked.ask([3, 1, 4, 1], count=False)
    asked.ask([3, 1, 4, 1, 5])


def test_logits_after_a_context_that_was_too_short():
    asked = Asked(limit=10)
    ids = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    asked.ask(ids[:7])
    check_raises(ValueError, asked.next_logits.__call__, [*ids, 5], mentions=(11, 10))
    asked.of.note("called with 11 ids; the context has 10", None)
    asked.ask(ids, count=False)
    asked.ask(ids[:8])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_logits_are_float32_whatever_the_model_is(dtype):
    model = LookupModel(dtype=dtype)
    next_logits = kv.CachedLogits(model)
    for ids in ([3, 1, 4, 1, 5], [3, 1, 4, 1, 5, 9]):
        of = f"CachedLogits of a model in {dtype}, called with {ids}"
        check_close(
            next_logits(ids), model.expected(ids), dtype=torch.float32, tolerance=4e-2, of=of
        )


def test_logits_of_two_streams_of_one_model():
    model = LookupModel()
    one, two = kv.CachedLogits(model), kv.CachedLogits(model)
    for i in range(1, 6):
        for next_logits, ids in ((one, [3, 1, 4, 1, 5][:i]), (two, [2, 7, 1, 8, 2][:i])):
            of = f"two CachedLogits of one model, called in turn, now with {ids}"
            check_close(next_logits(ids), model.expected(ids), dtype=torch.float32, of=of)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_match_transformers(family):
    shape = ugly(family, 5)
    kv.KVCache(1, 1, 1, 2)
    theirs = oracle_model(family, shape, 5)
    next_logits = kv.CachedLogits(loaded(family, shape, theirs))
    ids = [5, 60, 0, 33, 5, 8]
    for _ in range(8):
        got = next_logits(ids)
        of = f"CachedLogits(a {family} of {shape}), called with {len(ids)} ids"
        check_close(got, uncached(theirs, ids), of=of)
        ids = [*ids, int(got.argmax())]
    got = next_logits(ids[:3] + ids[:2])
    check_close(got, uncached(theirs, ids[:3] + ids[:2]), of=f"then other ids, {family}")
