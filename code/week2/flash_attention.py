"""Attention without a table of scores: block by block in PyTorch, then in one Triton kernel."""

import math

import torch
import triton
from torch import Tensor

from week2.kv_cache import prefill_attention

__all__ = ["attention_by_blocks", "flash_attention"]

# Larger heads need smaller blocks than the kernel has.
MAX_HEAD_DIM = 128


def attention_by_blocks(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """Let every query gather the values of the keys that it matches, a block of keys at a time.

    q: (num_heads, num_queries, head_dim), any float dtype.
    k, v: (num_heads, num_keys, head_dim), q's dtype.
    mask: (num_queries, num_keys) bool, True where the query may look.
    block_size: how many keys are looked at together, at least 1; the last block may be smaller.
    Returns (out, lse). out: (num_heads, num_queries, head_dim), q's dtype, what `attention` gives.
    lse: (num_heads, num_queries): the natural logarithm of the sum of exp(score) over the keys that
        the query may look at; a score is q · k * head_dim ** -0.5. float32, or q's dtype where that
        is wider; so is everything on the way to both.
    A query that may look at nothing gets zeros, and −inf as its lse. Scores may lie far outside of
    what exp can hold. The arguments are left as they were. No tensor is made that has more than
    num_heads * max(num_queries, block_size) * max(block_size, head_dim) elements, so that the
    scores of many keys are never held at once.
    Raises ValueError, which gives the value, when block_size is below 1.
    Source: Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135.
    """
    raise NotImplementedError(
        "week2/flash_attention.py: attention_by_blocks is not written yet "
        "→ sessions/week2/flash_attention.md"
    )


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
) -> tuple[Tensor, Tensor]:
    """Let the tokens of several sequences look at their own sequence, in one launch of a kernel.

    q: (num_heads, total_q, head_dim), float32, float16 or bfloat16: the queries of all sequences,
        one sequence behind the other.
    k, v: (num_kv_heads, total_k, head_dim), q's dtype, likewise; query heads share them as in
        `grouped_attention`. q, k and v may have any strides and more than 2**31 elements.
    cu_seqlens_q: (num_seqs + 1,) int32 on q's device: sequence i has the queries from
        cu_seqlens_q[i] up to, not including, cu_seqlens_q[i + 1]. The first entry is 0, the last
        one total_q. cu_seqlens_k: the same for the keys, with total_k.
    max_seqlen_q: no sequence has more queries than this. It is all that the host looks at: the call
        does not wait for what lies on a GPU.
    The queries of a sequence are its last tokens, and its keys are all of them: the last query
    looks at all keys of its sequence, the one before it at all but the last, and so on. A sequence
    may have no queries; where it has fewer keys than queries, the first ones look at nothing.
    Returns (out, lse). out: (num_heads, total_q, head_dim), q's dtype.
    lse: (num_heads, total_q) float32: the natural logarithm of the sum of exp(score) over the keys
        that the query looks at; a score is q · k * head_dim ** -0.5.
    A query that looks at nothing gets zeros, and −inf as its lse. Scores may lie far outside of
    what exp can hold; they, the weights and the sums are float32, and float32 inputs are multiplied
    without rounding. Only a weight may be rounded to q's dtype, before it meets its value.
    Other sequences are not looked at. Nor are keys and values that stand 256 places or more behind
    the last one that a query looks at: they may even be NaN, as far as this query is concerned.
    The arguments are left as they were, and nothing is made beside out and lse that grows with the
    number of tokens.
    Raises ValueError, which names both numbers, when num_heads does not divide by num_kv_heads, and
    when head_dim is above 128.
    Source: Dao 2023, arXiv:2307.08691.
    """
    raise NotImplementedError(
        "week2/flash_attention.py: flash_attention is not written yet "
        "→ sessions/week2/flash_attention.md"
    )


def flash_prefill(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Take the place of `prefill_attention` in `cached_attend`: the kernel where there is a GPU.

    Arguments, result and dtypes as in `prefill_attention`, which is what runs on a CPU: there the
    kernel could only be interpreted.
    """
    if not q.is_cuda:
        return prefill_attention(q, keys, values)
    # One sequence: both pairs are made on the GPU, so that no copy from the host is waited for.
    ends = torch.arange(2, dtype=torch.int32, device=q.device)
    num_queries, num_keys = q.shape[1], keys.shape[1]
    return flash_attention(q, keys, values, ends * num_queries, ends * num_keys, num_queries)[0]
