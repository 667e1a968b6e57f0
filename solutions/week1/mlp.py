"""RMSNorm, the SwiGLU feed-forward block, and the decoder layer that adds them up."""

import torch
from torch import Tensor, nn

from week1.gqa import Attend

__all__ = ["rms_norm", "silu_mul", "MLP", "DecoderLayer"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Give every row a root mean square of one, then scale every column by its weight.

    x: (..., width), any float dtype. weight: (width,), any float dtype. Both are left as they were.
    eps: added to the mean square.
    Returns x's shape and dtype. Everything but the product with the weight is computed in float32,
    or in x's dtype where that is wider.
    Source: Zhang and Sennrich 2019, arXiv:1910.07467; eps as in Llama and Qwen.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = wide.square().mean(-1, keepdim=True)
    return (wide * torch.rsqrt(mean_square + eps)).to(x.dtype) * weight.to(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with its weight: the seam where later weeks put a fused kernel."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Let `gate` decide, element by element, how much of `up` passes.

    gate: goes through the SiLU function (also called Swish). up: what is let through, gate's shape
        and dtype. Both are left as they were.
    Returns their shape and dtype.
    Source: Shazeer 2020, arXiv:2002.05202, SwiGLU without its bias.
    """
    return nn.functional.silu(gate) * up


class MLP(nn.Module):
    """The feed-forward block of one decoder layer: two projections up, a gate, one projection down.

    hidden_size: width of input and output. intermediate_size: width between.
    Parameters carry their checkpoint names: gate_proj, up_proj and down_proj are torch.nn.Linear
    without a bias. Each may be replaced by another module that is called alike, such as a quantized
    one. Called with x: (..., tokens, hidden_size), which is left as it was; returns the same shape
    and dtype.
    """

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block on x: (..., tokens, hidden_size)."""
        return self.down_proj(silu_mul(self.gate_proj(x), self.up_proj(x)))


class DecoderLayer(nn.Module):
    """One layer of the decoder: attention, then feed-forward, around one residual stream.

    self_attn: called as self_attn(x, positions, attend). mlp: called as mlp(x).
    input_layernorm stands before self_attn, post_attention_layernorm before mlp.
    The four modules are kept under these names, which are the checkpoint's, and each may be
    replaced by another that is called alike.
    """

    def __init__(
        self,
        self_attn: nn.Module,
        mlp: nn.Module,
        input_layernorm: nn.Module,
        post_attention_layernorm: nn.Module,
    ):
        super().__init__()
        self.self_attn = self_attn
        self.mlp = mlp
        self.input_layernorm = input_layernorm
        self.post_attention_layernorm = post_attention_layernorm

    def forward(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Run the layer.

        x: (..., tokens, hidden_size), the residual stream. positions, attend: as in `Attention`.
        Returns the residual stream behind the layer, x's shape and dtype; x is left as it was.
        """
        x = x + self.self_attn(self.input_layernorm(x), positions, attend)
        return x + self.mlp(self.post_attention_layernorm(x))
