"""Attention over a KV pool in blocks: stored by slot, found through block tables."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from week1.attention import attention, causal_mask
from week1.gqa import Attend, grouped_attention
from week1.qwen import Qwen

__all__ = ["PagedKVCache", "store_kv", "paged_prefill", "paged_decode", "paged_attend"]

# The seams where kernels are put: called as `store_kv`, `paged_prefill` and `paged_decode` are.
StoreKV = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
PagedPrefill = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor]
PagedDecode = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class PagedBatch:
    """Where the tokens of one pass lie: those of some sequences, one sequence behind the other.

    slots: (tokens,) int64, where each token's keys and values go; -1 for padding, which is stored
        nowhere.
    block_tables: (num_seqs, max_blocks) int64, the blocks of each sequence in the order of its
        tokens; entries behind those that hold its tokens are blocks of the pool and mean nothing.
    cu_seqlens_q: (num_seqs + 1,) int64: sequence i has the tokens of this pass from cu_seqlens_q[i]
        up to, not including, cu_seqlens_q[i + 1].
    seq_lens: (num_seqs,) int64, at least 1: how many tokens each sequence has, those of this pass
        included.
    num_decodes: so many sequences, the first ones, have exactly one token in this pass.
    max_seqlen_q: no sequence has more tokens in this pass.
    All tensors lie on the device of the pool.
    """

    slots: Tensor
    block_tables: Tensor
    cu_seqlens_q: Tensor
    seq_lens: Tensor
    num_decodes: int
    max_seqlen_q: int


class PagedKVCache:
    """The keys and values of a pool of blocks, for every layer of a model.

    num_layers, num_kv_heads, head_dim: of the model. num_blocks, block_size: of the pool, as in
        `BlockManager`. dtype, device: of what is stored.
    keys, values: (num_layers, num_blocks, num_kv_heads, block_size, head_dim), kept under these
        names. Slot s is place s % block_size of block s // block_size. In the beginning all zeros.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        raise NotImplementedError(
            "week3/paged_attention.py: PagedKVCache.__init__ is not written yet "
            "→ sessions/week3/paged_attention.md"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the pool takes, whoever holds its blocks."""
        raise NotImplementedError(
            "week3/paged_attention.py: PagedKVCache.nbytes is not written yet "
            "→ sessions/week3/paged_attention.md"
        )


def paged_cache_for(model: Qwen, num_blocks: int, block_size: int) -> PagedKVCache:
    """Make an empty pool that fits a model, in the dtype and on the device of its weights."""
    config, weight = model.config, model.embed_tokens.weight
    return PagedKVCache(
        config.num_hidden_layers,
        num_blocks,
        block_size,
        config.num_key_value_heads,
        config.head_dim,
        weight.dtype,
        weight.device,
    )


def store_kv(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Store the keys and values of some tokens in a layer's part of the pool.

    k, v: (num_kv_heads, tokens, head_dim), the pool's dtype, any strides; left as they were.
    keys, values: (num_blocks, num_kv_heads, block_size, head_dim).
    slots: (tokens,) int64: where each token goes, no slot twice; a token with slot -1 is not
        stored. Other slots stay as they are.
    """
    raise NotImplementedError(
        "week3/paged_attention.py: store_kv is not written yet → sessions/week3/paged_attention.md"
    )


def paged_prefill(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    max_seqlen_q: int,
) -> Tensor:
    """Let the last tokens of several sequences gather the values of their own sequence.

    q: (num_heads, tokens, head_dim), any float dtype, any strides: the queries of all sequences,
        one sequence behind the other.
    keys, values: (num_blocks, num_kv_heads, block_size, head_dim), q's dtype: a layer of the pool,
        in which the keys and values of these tokens are stored already. Query heads share them as
        in `grouped_attention`.
    block_tables, cu_seqlens_q, seq_lens, max_seqlen_q: as in `PagedBatch`. A sequence may have no
        token in this pass.
    Each token looks at those of its own sequence up to itself. Returns (num_heads, tokens,
    head_dim), q's dtype, computed as `attention` does. What lies in other slots is not looked at:
    it may be anything, NaN too. The arguments are left as they were, and nothing is made that grows
    with the pool.
    """
    raise NotImplementedError(
        "week3/paged_attention.py: paged_prefill is not written yet "
        "→ sessions/week3/paged_attention.md"
    )


def paged_decode(
    q: Tensor, keys: Tensor, values: Tensor, block_tables: Tensor, seq_lens: Tensor
) -> Tensor:
    """Let the last token of each sequence gather the values of its sequence.

    q: (num_seqs, num_heads, head_dim), any float dtype, any strides; at least one sequence.
    keys, values: as in `paged_prefill`. block_tables, seq_lens: as in `PagedBatch`, with at least
        one token a sequence.
    Returns (num_seqs, num_heads, head_dim), q's dtype, computed as `attention` does. What lies in
    other slots is not looked at: it may be anything, NaN too. The arguments are left as they were.
    What is made and computed grows with the tokens of these sequences, not with the pool, and not
    with the number of sequences times the longest of them.
    """
    raise NotImplementedError(
        "week3/paged_attention.py: paged_decode is not written yet "
        "→ sessions/week3/paged_attention.md"
    )


def paged_attend(
    cache: PagedKVCache,
    batch: PagedBatch,
    store: StoreKV = store_kv,
    prefill: PagedPrefill = paged_prefill,
    decode: PagedDecode = paged_decode,
) -> Attend:
    """Make the `Attend` of one pass over a pool.

    store, decode, prefill: called once a layer, in the place of `store_kv`, of `paged_decode` for
        the first num_decodes sequences, and of `paged_prefill` for the others. Where there are no
        sequences of its kind, decode or prefill is not called.
    The returned function takes the tokens of the pass flat: q (num_heads, tokens, head_dim), k and
    v (num_kv_heads, tokens, head_dim). It stores k and v in their slots, and returns (num_heads,
    tokens, head_dim), in which each token has looked at those of its own sequence, up to itself;
    what a token with slot -1 gets means nothing. q, k, v, the batch, other slots and other layers
    stay as they are. Beside what the three do, the host asks for no number that a tensor holds.
    """
    raise NotImplementedError(
        "week3/paged_attention.py: paged_attend is not written yet "
        "→ sessions/week3/paged_attention.md"
    )
