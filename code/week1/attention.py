"""Scaled dot-product attention for many heads at once."""

import math

import torch
from torch import Tensor

__all__ = ["softmax", "causal_mask", "attention", "split_heads", "merge_heads"]


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """Turn scores into weights that sum to one along `dim`.

    x: any shape, float dtype; left as it was. Scores may be as large as the dtype allows, and −inf.
    dim: the axis whose entries compete.
    Returns x's shape and dtype, computed in float32, or in x's dtype where that is wider. A score
    of −inf gets the weight 0; where every score along `dim` is −inf, every weight is 0.
    """
    raise NotImplementedError(
        "week1/attention.py: softmax is not written yet → sessions/week1/attention.md"
    )


def causal_mask(
    num_queries: int, num_keys: int, device: torch.device | str | None = None
) -> Tensor:
    """Say which keys each query may look at when nobody may look into the future.

    num_queries: the queries belong to the last num_queries tokens of a sequence.
    num_keys: the keys belong to the whole sequence so far.
    device: where the mask is made; None means the default device.
    Returns (num_queries, num_keys) bool, True where the query may look.
    Raises ValueError, which names both numbers, when num_queries is negative or larger than
    num_keys.
    """
    raise NotImplementedError(
        "week1/attention.py: causal_mask is not written yet → sessions/week1/attention.md"
    )


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Let every query gather the values of the keys that it matches.

    q: (..., num_queries, head_dim), any float dtype.
    k: (..., num_keys, head_dim), q's dtype.
    v: (..., num_keys, value_dim), q's dtype.
    mask: bool, broadcasts to (..., num_queries, num_keys), True where the query may look; None lets
        every query look at every key. A query that may look at nothing gets zeros.
    scale: what the scores are multiplied by; None means head_dim ** -0.5.
    Returns (..., num_queries, value_dim) in q's dtype; all of it is computed in float32, or in q's
    dtype where that is wider. The arguments are left as they were.
    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1.
    """
    raise NotImplementedError(
        "week1/attention.py: attention is not written yet → sessions/week1/attention.md"
    )


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Give each head its own slice of every token.

    x: (..., tokens, num_heads * head_dim); head 0 owns the first head_dim columns.
    Returns (..., num_heads, tokens, head_dim), x's dtype.
    Raises ValueError, which names both numbers, when the last axis does not divide by num_heads.
    """
    raise NotImplementedError(
        "week1/attention.py: split_heads is not written yet → sessions/week1/attention.md"
    )


def merge_heads(x: Tensor) -> Tensor:
    """Undo `split_heads`.

    x: (..., num_heads, tokens, head_dim), need not be contiguous.
    Returns (..., tokens, num_heads * head_dim), x's dtype.
    """
    raise NotImplementedError(
        "week1/attention.py: merge_heads is not written yet → sessions/week1/attention.md"
    )
