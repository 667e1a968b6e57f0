"""The feed-forward half by other arithmetic: lengths for the norm, tanh for the gate, one loop."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["rms_norm", "silu_mul", "MLP", "DecoderLayer"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Stretch every row to the length that a row of ones has, as eps allows, then weigh it."""
    row = x.double()
    width = x.shape[-1]
    length = torch.linalg.vector_norm(row, dim=-1, keepdim=True)
    # √width · row / √(length² + width · eps) is the same quotient, multiplied through by √width.
    longer = torch.hypot(length, torch.tensor(math.sqrt(width * eps), dtype=row.dtype))
    return (math.sqrt(width) * row / longer * weight.double()).to(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with its weight: the seam where later weeks put a fused kernel."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Use σ(g) = (1 + tanh(g / 2)) / 2, in float32 or better."""
    half = gate.to(torch.promote_types(gate.dtype, torch.float32)) / 2
    return ((half + half * torch.tanh(half)) * up).to(gate.dtype)


class MLP(nn.Module):
    """The feed-forward block, its projections made in a loop."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        sizes = {"gate": (hidden_size, intermediate_size), "up": (hidden_size, intermediate_size)}
        for name, (inward, outward) in (sizes | {"down": (intermediate_size, hidden_size)}).items():
            self.add_module(f"{name}_proj", nn.Linear(inward, outward, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        inner = silu_mul(gate=self.gate_proj(x), up=self.up_proj(x))
        return self.down_proj(inner)


class DecoderLayer(nn.Module):
    """One layer, as two steps of the same kind."""

    def __init__(
        self,
        self_attn: nn.Module,
        mlp: nn.Module,
        input_layernorm: nn.Module,
        post_attention_layernorm: nn.Module,
    ):
        super().__init__()
        self.input_layernorm = input_layernorm
        self.self_attn = self_attn
        self.post_attention_layernorm = post_attention_layernorm
        self.mlp = mlp

    def forward(self, x: Tensor, positions: Tensor, attend: Callable) -> Tensor:
        steps = (
            (self.input_layernorm, self.self_attn, (positions, attend)),
            (self.post_attention_layernorm, self.mlp, ()),
        )
        for norm, block, others in steps:
            x = torch.add(block(norm(x), *others), x)
        return x
