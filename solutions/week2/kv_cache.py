"""A contiguous cache of keys and values, and the model run through it."""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, takewhile

import torch
from torch import Tensor

from week1.attention import attention, causal_mask
from week1.gqa import Attend, grouped_attention
from week1.qwen import Qwen

__all__ = [
    "KVCache",
    "prefill_attention",
    "decode_attention",
    "cached_attend",
    "extend",
    "CachedLogits",
]

# The seams where later labs put kernels: called as `prefill_attention`, `decode_attention` and
# `cached_attend` are.
PrefillAttention = Callable[[Tensor, Tensor, Tensor], Tensor]
DecodeAttention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_SMALLEST_CAPACITY = 16


class KVCache:
    """The keys and values of every token that some sequences have seen, one row a sequence.

    num_layers, num_kv_heads, head_dim: of the model. num_rows: how many sequences, at least 1.
    dtype, device: of what is stored.
    num_computed_tokens: a list with, for each row, how many of its tokens are stored; its next
        token stands at this position. Kept under this name; who calls `write` counts them here,
        when every layer has them.
    capacity: how many tokens each row has room for; 0 at first. device: where it lies.
    Raises ValueError, which gives the value, when num_rows is below 1.
    """

    def __init__(
        self,
        num_layers: int,
        num_rows: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        if num_rows < 1:
            raise ValueError(f"num_rows must be at least 1, got {num_rows}")
        self.num_computed_tokens = [0] * num_rows
        self.capacity = 0
        self.device = torch.device(device)
        # keys_and_values[layer][0 or 1]: (num_rows, num_kv_heads, capacity, head_dim). In a row,
        # [0, num_computed_tokens)   may be read
        # beyond                     zeros, or what a longer sequence left; never NaN
        self._storage = torch.zeros(
            num_layers, 2, num_rows, num_kv_heads, 0, head_dim, dtype=dtype, device=device
        )

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the keys and values of all rows take, unused room included.

        Nothing else is kept: no second copy, no room beyond capacity.
        """
        return self._storage.nbytes

    def reserve(self, num_tokens: int) -> None:
        """Make room for num_tokens in every row.

        Afterwards capacity is at least num_tokens, and at most max(16, 2 * num_tokens) where it had
        to grow. What is stored stays, nothing ever shrinks, and new room holds zeros. While a
        sequence grows to n tokens, one a step, what is stored moves at most 2 * log2(n) times; the
        first room of all is no move.
        """
        if num_tokens <= self.capacity:
            return
        capacity = max(num_tokens, 2 * self.capacity, _SMALLEST_CAPACITY)
        *sizes, _, head_dim = self._storage.shape
        storage = self._storage.new_zeros(*sizes, capacity, head_dim)
        storage[..., : self.capacity, :] = self._storage
        self._storage, self.capacity = storage, capacity

    def write(
        self, layer_index: int, rows: Tensor, positions: Tensor, k: Tensor, v: Tensor
    ) -> None:
        """Store tokens of any rows, each at its own position.

        rows, positions: (tokens,) int64, in any order; positions below capacity, no place twice.
        k, v: (num_kv_heads, tokens, head_dim), the cache's dtype; left as they were.
        On a GPU the host does not wait for any of them: it asks for no number that they hold.
        """
        keys, values = self._storage[layer_index]
        keys[rows, :, positions] = k.transpose(0, 1)
        values[rows, :, positions] = v.transpose(0, 1)

    def read(self, layer_index: int) -> tuple[Tensor, Tensor]:
        """Give the keys and values of a layer.

        Returns two tensors (num_rows, num_kv_heads, capacity, head_dim): views, no copies, so that
        later writes show in them until capacity grows.
        """
        keys, values = self._storage[layer_index]
        return keys, values

    def truncate(self, row: int, num_tokens: int) -> None:
        """Forget all but a row's first num_tokens tokens; with 0 the row is free for another.

        Raises ValueError, which names both numbers, when the row holds fewer, or num_tokens is
        negative.
        """
        stored = self.num_computed_tokens[row]
        if not 0 <= num_tokens <= stored:
            raise ValueError(f"row {row} holds {stored} tokens, so it cannot keep {num_tokens}")
        self.num_computed_tokens[row] = num_tokens


def cache_for(model: Qwen, num_rows: int) -> KVCache:
    """Make an empty cache that fits a model, in the dtype and on the device of its weights."""
    config, weight = model.config, model.embed_tokens.weight
    return KVCache(
        config.num_hidden_layers,
        num_rows,
        config.num_key_value_heads,
        config.head_dim,
        weight.dtype,
        weight.device,
    )


def prefill_attention(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Let the new tokens of one row gather the values of their row.

    q: (num_heads, tokens, head_dim), any float dtype: the row's last tokens.
    keys, values: (num_kv_heads, num_keys, head_dim), q's dtype: all tokens of the row, at least as
        many as in q; query heads share them as in `grouped_attention`.
    Each token looks at those up to itself. Returns (num_heads, tokens, head_dim), q's dtype,
    computed as `attention` does. The arguments are left as they were.
    """
    return grouped_attention(q, keys, values, causal_mask(q.shape[-2], keys.shape[-2], q.device))


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, num_tokens: Tensor) -> Tensor:
    """Let one new token of each row gather the values of its row.

    q: (rows, num_heads, head_dim), any float dtype.
    keys, values: (rows, num_kv_heads, capacity, head_dim), q's dtype; query heads share them as in
        `grouped_attention`.
    num_tokens: (rows,) int64, at least 1: row r looks at its first num_tokens[r] tokens. What lies
        behind them is finite and means nothing.
    Returns (rows, num_heads, head_dim), q's dtype, computed as `attention` does. The arguments are
    left as they were.
    """
    longest = int(num_tokens.max())
    visible = torch.arange(longest, device=q.device) < num_tokens[:, None, None, None]
    # The query heads of one group stand where attention has queries: they share keys and mask.
    grouped = q.unflatten(1, (keys.shape[1], -1))
    out = attention(grouped, keys[:, :, :longest], values[:, :, :longest], visible)
    return out.flatten(1, 2)


def cached_attend(
    cache: KVCache,
    num_new_tokens: Mapping[int, int],
    prefill: PrefillAttention = prefill_attention,
    decode: DecodeAttention = decode_attention,
) -> Attend:
    """Make the `Attend` of one pass over the next tokens of some rows.

    num_new_tokens: row → how many tokens of it the pass computes, at least 1; they follow those
        that the row has already. The cache has room for them.
    prefill: called in the place of `prefill_attention`, for each row with several new tokens.
    decode: called in the place of `decode_attention`, for the rows with one, alone or together;
        the token that has just been stored counts in num_tokens.
    The returned function takes the tokens of all rows flat, row after row in the order of
    num_new_tokens: q (num_heads, tokens, head_dim), k and v (num_kv_heads, tokens, head_dim). It
    stores k and v at their rows and positions, and returns (num_heads, tokens, head_dim), in which
    each token has looked at those of its own row, up to itself. q, k, v, other rows, and the counts
    in num_computed_tokens, stay as they are.
    """
    rows, positions = _places(cache, num_new_tokens)
    starts = _starts(num_new_tokens)
    decoding = {row: starts[row] for row, count in num_new_tokens.items() if count == 1}
    attend_decoding = _decoding(cache, decoding, decode) if decoding else None

    def attend(layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.write(layer_index, rows, positions, k, v)
        keys, values = cache.read(layer_index)
        out = torch.empty_like(q)
        for row, count in num_new_tokens.items():
            if count > 1:
                end = cache.num_computed_tokens[row] + count
                here = slice(starts[row], starts[row] + count)
                out[:, here] = prefill(q[:, here], keys[row, :, :end], values[row, :, :end])
        if attend_decoding is not None:
            attend_decoding(q, keys, values, out)
        return out

    return attend


def extend(
    model: Qwen,
    cache: KVCache,
    new_tokens: Mapping[int, Sequence[int]],
    make_attend: Callable[[KVCache, Mapping[int, int]], Attend] = cached_attend,
) -> Tensor:
    """Run a model over the next tokens of some rows, and keep their keys and values.

    new_tokens: row → the ids that follow what the row has seen, at least one. Whole prompts, chunks
        of prompts and single tokens may stand side by side, in any order of rows.
    make_attend: called once, in the place of `cached_attend`, for the pass's `Attend`.
    Returns (len(new_tokens), vocab_size) float32 without a gradient: the scores of what follows
    each row's last id, in the order of new_tokens. num_computed_tokens has grown by what was
    computed. What the model itself raises is raised on; num_computed_tokens is as before, so that
    the call may be repeated.
    The model runs once, over exactly these ids, none of them padded. Before, room is made with
    `reserve` for as many tokens as the longest of these rows will have.
    Raises ValueError, with nothing changed, when there is no row, when a row is unknown or gets no
    ids (it names the row), and when a row would have more tokens than the model's
    max_position_embeddings (it names both numbers).
    """
    counts = {row: len(ids) for row, ids in new_tokens.items()}
    limit = model.config.max_position_embeddings
    _check_new_tokens(cache, counts, limit)
    cache.reserve(max(cache.num_computed_tokens[row] + count for row, count in counts.items()))
    device = model.embed_tokens.weight.device
    flat = [token_id for ids in new_tokens.values() for token_id in ids]
    _, positions = _places(cache, counts)
    last = torch.tensor([*counts.values()], device=device).cumsum(0) - 1
    with torch.inference_mode():
        input_ids = torch.tensor(flat, dtype=torch.int64, device=device)
        hidden = model(input_ids, positions, make_attend(cache, counts))
        logits = model.logits(hidden[last])
    for row, count in counts.items():
        cache.num_computed_tokens[row] += count
    return logits


class CachedLogits:
    """Score the next token as week 1's `next_token_logits` does, computing only what is new.

    make_attend: as in `extend`.
    Called with all ids so far, at least one; returns (vocab_size,) float32 without a gradient.
    A call need not continue the one before. The ids that both begin with are not computed again,
    apart from the call's last one, which always is; nothing else of the earlier call is looked at.
    The ids are left as they were, and the caller may change them afterwards. A call that fails,
    since the model raises or the context is too short, may be followed by any other.
    """

    def __init__(
        self,
        model: Qwen,
        make_attend: Callable[[KVCache, Mapping[int, int]], Attend] = cached_attend,
    ):
        self._model = model
        self._make_attend = make_attend
        self._cache = cache_for(model, num_rows=1)
        self._ids: list[int] = []  # what the cache holds

    def __call__(self, token_ids: Sequence[int]) -> Tensor:
        """Score what follows token_ids."""
        ids = list(token_ids)
        shared = _num_shared(self._ids, ids[:-1])
        self._cache.truncate(0, shared)
        # Shortened before the model runs: should it fail, this is what the cache still holds.
        self._ids = ids[:shared]
        logits = extend(self._model, self._cache, {0: ids[shared:]}, self._make_attend)
        self._ids = ids
        return logits[0]


def _places(cache: KVCache, counts: Mapping[int, int]) -> tuple[Tensor, Tensor]:
    """Return the row and the position of every new token, flat."""
    rows, positions = [], []
    for row, count in counts.items():
        start = cache.num_computed_tokens[row]
        rows += [row] * count
        positions += range(start, start + count)
    return torch.tensor(rows, device=cache.device), torch.tensor(positions, device=cache.device)


def _starts(counts: Mapping[int, int]) -> dict[int, int]:
    """Return where each row's tokens begin in the flat call."""
    ends = accumulate(counts.values(), initial=0)
    return dict(zip(counts, ends, strict=False))


def _decoding(
    cache: KVCache, starts: Mapping[int, int], decode: DecodeAttention
) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
    """Prepare, once for all layers, what the rows with one new token need.

    starts: row → its place in the flat call. The returned function takes q, the keys and values of
    all rows, and out, in which it fills these rows' places.
    """
    first, last = min(starts), max(starts)
    # A slice of rows is a view, a list of rows would be a copy; rows between that do not take part
    # look at one token, for nothing.
    span = slice(first, last + 1)
    places = torch.tensor([row - first for row in starts], device=cache.device)
    num_tokens = torch.ones(last - first + 1, dtype=torch.int64, device=cache.device)
    counts = [cache.num_computed_tokens[row] + 1 for row in starts]
    num_tokens[places] = torch.tensor(counts, device=cache.device)
    flat = torch.tensor([*starts.values()], device=cache.device)

    def attend(q: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
        queries = q.new_zeros(last - first + 1, q.shape[0], q.shape[2])
        queries[places] = q[:, flat].transpose(0, 1)
        attended = decode(queries, keys[span], values[span], num_tokens)
        out[:, flat] = attended[places].transpose(0, 1)

    return attend


def _check_new_tokens(cache: KVCache, counts: Mapping[int, int], limit: int) -> None:
    if not counts:
        raise ValueError("new_tokens must name at least 1 row, got 0")
    for row, count in counts.items():
        if not 0 <= row < len(cache.num_computed_tokens):
            raise ValueError(f"row {row} is outside [0, {len(cache.num_computed_tokens)})")
        if count == 0:
            raise ValueError(f"row {row} gets no tokens; it needs at least 1")
        total = cache.num_computed_tokens[row] + count
        if total > limit:
            raise ValueError(
                f"row {row} would have {total} tokens, the model's context is {limit} tokens"
            )


def _num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
