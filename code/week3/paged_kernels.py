"""The three kernels of a paged pool: store by slot, prefill of several sequences, split decode."""

import torch
import triton
from torch import Tensor

from week2.flash_decoding import plan_splits

__all__ = ["store_kv", "paged_prefill", "paged_decode"]

# Larger heads need smaller blocks than the kernels have.
MAX_HEAD_DIM = 128


def store_kv(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Store the keys and values of some tokens in a layer's part of the pool, in one launch.

    k, v: (num_kv_heads, tokens, head_dim), the pool's dtype, any strides; left as they were. At
        least one token.
    keys, values: (num_blocks, num_kv_heads, block_size, head_dim), float32, float16 or bfloat16,
        any strides, which need not be the same for both. Slot s is place s % block_size of block
        s // block_size; a block may have any number of slots. They may span more than 2**31
        elements, of which one head of one block spans fewer.
    slots: (tokens,) int64: where each token goes, no slot twice; a token with slot -1 is padding,
        which is stored nowhere and may hold anything. Other slots stay as they are.
    One launch of a kernel stores both, and the host does not wait for the device.
    """
    raise NotImplementedError(
        "week3/paged_kernels.py: store_kv is not written yet → sessions/week3/paged_kernels.md"
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
    """Let the last tokens of several sequences look at their own sequence, in one launch.

    q: (num_heads, tokens, head_dim), any strides: the queries of all sequences, one sequence behind
        the other; float32, float16 or bfloat16.
    keys, values: as in `store_kv`, q's dtype: the keys and values of these tokens are stored
        already. Query heads share them as in `grouped_attention`.
    block_tables: (num_seqs, max_blocks) int64, any strides: the blocks of each sequence in the
        order of its tokens, anywhere in the pool. Entries behind those mean nothing.
    cu_seqlens_q: (num_seqs + 1,) int64: sequence i has the tokens of this pass from cu_seqlens_q[i]
        up to, not including, cu_seqlens_q[i + 1]. It may have any number of them; where it has
        none, nothing of it is read in the pool.
    seq_lens: (num_seqs,) int64, at least 1: how many tokens each sequence has, those of this pass
        included, which are its last ones.
    max_seqlen_q: no sequence has more tokens in this pass. It and the shapes are all that the host
        looks at: the call does not wait for the device.
    Returns (num_heads, tokens, head_dim), q's dtype: what `attention` of week 1 gives when each
    token looks at those of its own sequence up to itself. Scores may lie far outside of what exp
    can hold; they, the weights and the sums are float32, and float32 inputs are multiplied without
    rounding. Only a weight may be rounded to q's dtype, before it meets its value.
    What lies in other slots is not looked at: it may be anything, NaN too. Nor are the tokens that
    stand 256 places or more behind a query: they may be NaN, as far as this query is concerned.
    Keys and values are read where they lie: nothing is made beside the result that grows with the
    tokens or with the pool. The arguments are left as they were.
    Raises ValueError, which names both numbers, when num_heads does not divide by num_kv_heads, and
    when head_dim is above 128.
    Source: Kwon et al. 2023, arXiv:2309.06180, section 4.3; Dao 2023, arXiv:2307.08691.
    """
    raise NotImplementedError(
        "week3/paged_kernels.py: paged_prefill is not written yet → sessions/week3/paged_kernels.md"
    )


def paged_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    num_splits: int | None = None,
) -> Tensor:
    """Let the last token of each sequence gather the values of its sequence, cut into splits.

    q: (num_seqs, num_heads, head_dim), any strides; at least one sequence.
    keys, values, block_tables: as in `paged_prefill`.
    seq_lens: (num_seqs,) int64: how many tokens each sequence has, at most as many as the columns
        of block_tables have room for. A sequence with 0 tokens is padding: it gets zeros, and
        neither its q nor its table means anything.
    num_splits: into how many splits the tokens of every sequence are cut: those that it has, not
        those that its table has room for, even where it has fewer than that. None lets
        `plan_splits` choose for one program a sequence and key/value head, and for what a table has
        room for; a CPU counts as one processor.
    Returns (num_seqs, num_heads, head_dim), q's dtype, computed as in `paged_prefill`; what stays
    between two kernels is float32. Other slots and the arguments are treated as there.
    One kernel is launched, or two: what the first one gives for each split may be merged by another
    one or by `merge_splits`. Each sequence, key/value head and split has a program of its own. The
    kernels read each key and value of a sequence's tokens once, where it lies, however many query
    heads and splits there are. The host does not wait for the device: what is launched follows from
    shapes and num_splits alone.
    Raises ValueError, which names both numbers, when num_heads does not divide by num_kv_heads, and
    when head_dim is above 128; and one that gives the value when num_splits is below 1.
    Source: Kwon et al. 2023, arXiv:2309.06180, section 4.3; Dao et al. 2023, "Flash-Decoding".
    """
    raise NotImplementedError(
        "week3/paged_kernels.py: paged_decode is not written yet → sessions/week3/paged_kernels.md"
    )
