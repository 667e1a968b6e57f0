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
    raise NotImplementedError(
        "week1/gqa.py: grouped_attention is not written yet → sessions/week1/gqa.md"
    )


def causal_attend(layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend within the tokens of this call, each to itself and to those before it.

    The simplest `Attend`: it keeps nothing between calls, so each call must hold whole sequences
    that start at their first token. Shapes as in `Attend`. Sequences of a batch may be padded on
    the right: no token looks at the padding behind it.
    """
    raise NotImplementedError(
        "week1/gqa.py: causal_attend is not written yet → sessions/week1/gqa.md"
    )


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
        raise NotImplementedError(
            "week1/gqa.py: Attention.__init__ is not written yet → sessions/week1/gqa.md"
        )

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Make the queries, keys and values of every token.

        x: (..., tokens, hidden_size).
        Returns q (..., num_heads, tokens, head_dim), k and v (..., num_kv_heads, tokens, head_dim),
        not yet normalised or rotated; fewer heads where a narrower projection was put in the place
        of one. Later weeks override this method with one merged product.
        """
        raise NotImplementedError(
            "week1/gqa.py: Attention.project is not written yet → sessions/week1/gqa.md"
        )

    def forward(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Run the block.

        x: (..., tokens, hidden_size). positions: (..., tokens) int64. Both are left as they were.
        attend: see `Attend`; called once, with tensors of x's dtype, since it may store them.
        Returns (..., tokens, hidden_size), x's dtype.
        """
        raise NotImplementedError(
            "week1/gqa.py: Attention.forward is not written yet → sessions/week1/gqa.md"
        )
