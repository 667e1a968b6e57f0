"""A contiguous cache of keys and values, and the model run through it."""

from collections.abc import Callable, Mapping, Sequence

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
        raise NotImplementedError(
            "week2/kv_cache.py: KVCache.__init__ is not written yet → sessions/week2/kv_cache.md"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the keys and values of all rows take, unused room included.

        Nothing else is kept: no second copy, no room beyond capacity.
        """
        raise NotImplementedError(
            "week2/kv_cache.py: KVCache.nbytes is not written yet → sessions/week2/kv_cache.md"
        )

    def reserve(self, num_tokens: int) -> None:
        """Make room for num_tokens in every row.

        Afterwards capacity is at least num_tokens, and at most max(16, 2 * num_tokens) where it had
        to grow. What is stored stays, nothing ever shrinks, and new room holds zeros. While a
        sequence grows to n tokens, one a step, what is stored moves at most 2 * log2(n) times; the
        first room of all is no move.
        """
        raise NotImplementedError(
            "week2/kv_cache.py: KVCache.reserve is not written yet → sessions/week2/kv_cache.md"
        )

    def write(
        self, layer_index: int, rows: Tensor, positions: Tensor, k: Tensor, v: Tensor
    ) -> None:
        """Store tokens of any rows, each at its own position.

        rows, positions: (tokens,) int64, in any order; positions below capacity, no place twice.
        k, v: (num_kv_heads, tokens, head_dim), the cache's dtype; left as they were.
        On a GPU the host does not wait for any of them: it asks for no number that they hold.
        """
        raise NotImplementedError(
            "week2/kv_cache.py: KVCache.write is not written yet → sessions/week2/kv_cache.md"
        )

    def read(self, layer_index: int) -> tuple[Tensor, Tensor]:
        """Give the keys and values of a layer.

        Returns two tensors (num_rows, num_kv_heads, capacity, head_dim): views, no copies, so that
        later writes show in them until capacity grows.
        """
        raise NotImplementedError(
            "week2/kv_cache.py: KVCache.read is not written yet → sessions/week2/kv_cache.md"
        )

    def truncate(self, row: int, num_tokens: int) -> None:
        """Forget all but a row's first num_tokens tokens; with 0 the row is free for another.

        Raises ValueError, which names both numbers, when the row holds fewer, or num_tokens is
        negative.
        """
        raise NotImplementedError(
            "week2/kv_cache.py: KVCache.truncate is not written yet → sessions/week2/kv_cache.md"
        )


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
    raise NotImplementedError(
        "week2/kv_cache.py: prefill_attention is not written yet → sessions/week2/kv_cache.md"
    )


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
    raise NotImplementedError(
        "week2/kv_cache.py: decode_attention is not written yet → sessions/week2/kv_cache.md"
    )


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
    raise NotImplementedError(
        "week2/kv_cache.py: cached_attend is not written yet → sessions/week2/kv_cache.md"
    )


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
    raise NotImplementedError(
        "week2/kv_cache.py: extend is not written yet → sessions/week2/kv_cache.md"
    )


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
        raise NotImplementedError(
            "week2/kv_cache.py: CachedLogits.__init__ is not written yet "
            "→ sessions/week2/kv_cache.md"
        )

    def __call__(self, token_ids: Sequence[int]) -> Tensor:
        """Score what follows token_ids."""
        raise NotImplementedError(
            "week2/kv_cache.py: CachedLogits.__call__ is not written yet "
            "→ sessions/week2/kv_cache.md"
        )
