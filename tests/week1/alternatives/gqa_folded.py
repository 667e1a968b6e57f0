"""Grouped-query attention that copies no keys or values: a group's queries form one longer list.

Nothing is taken from the earlier labs: the arithmetic is done in float64 by torch.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["grouped_attention", "causal_attend", "Attention"]

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Fold (kv head, member of the group, query) into (kv head, member · query)."""
    *leading, num_heads, num_queries, head_dim = q.shape
    num_kv_heads, num_keys = k.shape[-3:-1]
    group, rest = divmod(num_heads, num_kv_heads)
    if rest or not group:
        raise ValueError(f"num_heads = {num_heads} is no multiple of num_kv_heads = {num_kv_heads}")
    folded = (*leading, num_kv_heads, group * num_queries)
    scores = q.reshape(*folded, head_dim).double() @ k.double().mT / head_dim**0.5
    if mask is not None:
        allowed = mask.broadcast_to(*leading, num_heads, num_queries, num_keys)
        scores = scores.masked_fill(~allowed.reshape(*folded, num_keys), -torch.inf)
    # A query that may look at nothing has NaN shares here, and gets zeros.
    out = scores.softmax(-1).nan_to_num(0.0) @ v.double()
    return out.reshape(q.shape).to(q.dtype)


def causal_attend(layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compare positions instead of cutting a triangle."""
    positions = torch.arange(q.shape[-2], device=q.device)
    return grouped_attention(q, k, v, positions[:, None] >= positions[None, :])


class Attention(nn.Module):
    """The attention block of one decoder layer, with an identity where there is no norm."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rotary: nn.Module,
        layer_index: int,
        qkv_bias: bool = False,
        output_bias: bool = False,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
    ):
        super().__init__()
        q_width, kv_width = num_heads * head_dim, num_kv_heads * head_dim
        for name, width in (("q_proj", q_width), ("k_proj", kv_width), ("v_proj", kv_width)):
            self.add_module(name, nn.Linear(hidden_size, width, bool(qkv_bias)))
        self.o_proj = nn.Linear(q_width, hidden_size, bool(output_bias))
        self.q_norm = q_norm or nn.Identity()
        self.k_norm = k_norm or nn.Identity()
        self.rotary = rotary
        self.layer = layer_index
        self.head_shape = (-1, head_dim)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cut each projection's columns into heads and move the heads in front of the tokens."""
        q, k, v = (
            projection(x).unflatten(-1, self.head_shape).movedim(-2, -3)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return q, k, v

    def forward(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Project, normalise, rotate, attend, and mix the heads."""
        q, k, v = self.project(x)
        rotated = self.rotary(self.q_norm(q), self.k_norm(k), positions)
        out = attend(self.layer, *rotated, v)
        return self.o_proj(torch.cat(tuple(out.unbind(dim=-3)), dim=-1))
