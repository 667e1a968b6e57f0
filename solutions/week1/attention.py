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
    scores = _at_least_float32(x)
    # An all −inf slice has the peak −inf, and −inf − (−inf) would be NaN.
    peak = scores.amax(dim, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    weights = (scores - peak).exp_()
    total = weights.sum(dim, keepdim=True)
    # The largest score alone adds 1, so only an all −inf slice, whose weights are 0, is below it.
    return weights.div_(total.clamp(min=1.0)).to(x.dtype)


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
    if not 0 <= num_queries <= num_keys:
        raise ValueError(f"num_queries must be in [0, num_keys = {num_keys}], got {num_queries}")
    allowed = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return allowed.tril(num_keys - num_queries)


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
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide_q, wide_k, wide_v = map(_at_least_float32, (q, k, v))
    scores = (wide_q * scale) @ wide_k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return (softmax(scores) @ wide_v).to(q.dtype)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Give each head its own slice of every token.

    x: (..., tokens, num_heads * head_dim); head 0 owns the first head_dim columns.
    Returns (..., num_heads, tokens, head_dim), x's dtype.
    Raises ValueError, which names both numbers, when the last axis does not divide by num_heads.
    """
    if x.shape[-1] % num_heads:
        raise ValueError(f"a width of {x.shape[-1]} does not divide into {num_heads} heads")
    return x.unflatten(-1, (num_heads, -1)).transpose(-3, -2)


def merge_heads(x: Tensor) -> Tensor:
    """Undo `split_heads`.

    x: (..., num_heads, tokens, head_dim), need not be contiguous.
    Returns (..., tokens, num_heads * head_dim), x's dtype.
    """
    return x.transpose(-3, -2).flatten(-2)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
