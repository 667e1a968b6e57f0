"""Attention with named axes: weights from logsumexp, sums by einsum, the mask as a bias."""

import torch
from torch import Tensor

__all__ = ["softmax", "causal_mask", "attention", "split_heads", "merge_heads"]


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """Exponentiate logarithms: distances to the largest score, less the logarithm of their sum."""
    scores = x if x.dtype == torch.float64 else x.to(torch.float32)
    peak = scores.max(dim, keepdim=True).values
    distances = scores - torch.where(peak.isinf(), 0.0, peak)
    # The largest distance is 0 and the sum at least 1, unless every score is −inf.
    log_total = torch.logsumexp(distances, dim, keepdim=True).clamp(min=0.0)
    return torch.exp(distances - log_total).to(x.dtype)


def causal_mask(
    num_queries: int, num_keys: int, device: torch.device | str | None = None
) -> Tensor:
    """Compare the position of every query with that of every key."""
    first = num_keys - num_queries
    if num_queries < 0 or first < 0:
        raise ValueError(f"{num_queries} queries cannot be the last of {num_keys} keys")
    query_positions = torch.arange(first, num_keys, device=device).unsqueeze(1)
    return torch.arange(num_keys, device=device) <= query_positions


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Scale the queries, not the scores, and add the mask as 0 or −inf."""
    dtype = q.dtype
    working = torch.promote_types(dtype, torch.float32)
    q, k, v = q.to(working), k.to(working), v.to(working)
    if scale is None:
        scale = 1.0 / q.size(-1) ** 0.5
    scores = torch.einsum("...qd, ...kd -> ...qk", q * scale, k)
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=working, device=mask.device)
        scores = scores + bias.masked_fill(mask.logical_not(), float("-inf"))
    return torch.einsum("...qk, ...kd -> ...qd", softmax(scores), v).to(dtype)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Cut the columns into one piece a head and stack the pieces."""
    head_dim, rest = divmod(x.size(-1), num_heads)
    if rest:
        raise ValueError(f"{x.size(-1)} columns cannot be shared by {num_heads} heads")
    return torch.stack(x.split(head_dim, dim=-1), dim=-3)


def merge_heads(x: Tensor) -> Tensor:
    """Put the heads side by side again."""
    return torch.cat(x.unbind(-3), dim=-1)
