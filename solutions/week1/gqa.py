"""Grouped-query attention as Qwen2 and Qwen3 use it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from week1.attention import attention, causal_mask, merge_heads, split_heads
from week1.rope import Rotary

__all__ = ["grouped_attention", "causal_attend", "Attention"]

# The seam that owns keys and values: attend(layer_index, q, k, v) -> out.
# q and out: (..., num_heads, tokens, head_dim); k and v: (..., num_kv_heads, tokens, head_dim), of
# the tokens of this call only. Masks, caches and kernels are the callee's business.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

_QUERY_BLOCK = 64


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attend with fewer key/value heads than query heads.

    q: (..., num_heads, num_queries, head_dim), any float dtype; left as it was, like k, v and mask.
    k, v: (..., num_kv_heads, num_keys, head_dim), q's dtype. Consecutive query heads share a
        key/value head: the first num_heads / num_kv_heads of them use key/value head 0.
    mask: as in `attention`; broadcasts to (..., num_heads, num_queries, num_keys).
    Returns (..., num_heads, num_queries, head_dim), q's dtype.
    Raises ValueError, which names both numbers, when num_heads does not divide by num_kv_heads.
    Source: Ainslie et al. 2023, arXiv:2305.13245.
    """
    num_heads, num_kv_heads = q.shape[-3], k.shape[-3]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide among {num_kv_heads} kv heads")
    group = num_heads // num_kv_heads
    return attention(q, k.repeat_interleave(group, -3), v.repeat_interleave(group, -3), mask)


def causal_attend(layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend within the tokens of this call, each to itself and to those before it.

    The simplest `Attend`: it keeps nothing between calls, so each call must hold whole sequences
    that start at their first token. Shapes as in `Attend`. Sequences of a batch may be padded on
    the right: no token looks at the padding behind it.
    """
    tokens = q.shape[-2]
    out = torch.empty_like(q)
    # A block of queries at a time: keys that no query of the block may look at are left out, and
    # the scores in memory grow with the tokens, not with their square.
    for start in range(0, tokens, _QUERY_BLOCK):
        end = min(start + _QUERY_BLOCK, tokens)
        mask = causal_mask(end - start, end, q.device)
        out[..., start:end, :] = grouped_attention(
            q[..., start:end, :], k[..., :end, :], v[..., :end, :], mask
        )
    return out


class Attention(nn.Module):
    """The attention block of one decoder layer.

    hidden_size: width of the block's input and output.
    num_heads, num_kv_heads, head_dim: num_heads * head_dim may differ from hidden_size.
    rotary: called with q, k and positions, returns q and k rotated.
    layer_index: handed to attend, so that a cache knows its layer.
    qkv_bias: whether the q, k and v projections have a bias (Qwen2). output_bias: the same for o.
    q_norm, k_norm: normalise each head of q or k over head_dim before it is rotated (Qwen3); None
        where the model has no such norm.
    Parameters carry their checkpoint names: q_proj, k_proj, v_proj and o_proj are torch.nn.Linear,
    and rotary, q_norm and k_norm are kept under these names. Later weeks replace any of them, in a
    layer that exists, by a module that is called alike.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rotary: Rotary,
        layer_index: int,
        qkv_bias: bool = False,
        output_bias: bool = False,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
    ):
        super().__init__()
        self.head_dim = head_dim
        self.layer_index = layer_index
        self.rotary = rotary
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=output_bias)
        self.q_norm = q_norm
        self.k_norm = k_norm

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Make the queries, keys and values of every token.

        x: (..., tokens, hidden_size).
        Returns q (..., num_heads, tokens, head_dim), k and v (..., num_kv_heads, tokens, head_dim),
        not yet normalised or rotated; fewer heads where a narrower projection was put in the place
        of one. Later weeks override this method with one merged product.
        """
        projected = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        # The number of heads follows from the width: a sharded layer has fewer.
        q, k, v = (split_heads(part, part.shape[-1] // self.head_dim) for part in projected)
        return q, k, v

    def forward(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Run the block.

        x: (..., tokens, hidden_size). positions: (..., tokens) int64. Both are left as they were.
        attend: see `Attend`; called once, with tensors of x's dtype, since it may store them.
        Returns (..., tokens, hidden_size), x's dtype.
        """
        q, k, v = self.project(x)
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.k_norm is not None:
            k = self.k_norm(k)
        q, k = self.rotary(q, k, positions)
        return self.o_proj(merge_heads(attend(self.layer_index, q, k, v)))
