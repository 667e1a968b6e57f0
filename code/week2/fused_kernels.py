"""Triton kernels for what stands between the matrix products, and a model that runs on them."""

import torch
import triton
from torch import Tensor, nn

from week1.gqa import Attend
from week1.mlp import MLP, DecoderLayer, RMSNorm, rms_norm
from week1.mlp import silu_mul as unfused_silu_mul
from week1.qwen import Qwen
from week1.rope import Rotary

__all__ = ["add_rms_norm", "rotate", "silu_mul"]


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add a block's output to the residual stream, and normalise the sum.

    x: (..., width), float32, float16 or bfloat16; width at least 1 and at most 65,536.
    residual: the stream so far, x's shape and dtype; None where there is nothing to add.
    weight: (width,), any of the three dtypes. eps: added to the mean square.
    Strides are arbitrary, and there may be no rows. The arguments are left as they were.
    Returns (normed, summed) of x's shape and dtype. summed is x + residual, a new tensor; with None
    it is x itself. normed is a new tensor: week 1's `rms_norm` of summed. Everything is computed in
    float32 and rounded to x's dtype at the same places as there: the sum, before it is squared; the
    weight; the normalised number, before it meets the weight; their product.
    One launch of a kernel computes both; what is not contiguous may be copied first.
    """
    raise NotImplementedError(
        "week2/fused_kernels.py: add_rms_norm is not written yet → sessions/week2/fused_kernels.md"
    )


def rotate(q: Tensor, k: Tensor, positions: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys to their positions.

    q: (num_heads, tokens, head_dim), k: (num_kv_heads, tokens, head_dim); both float32, float16 or
        bfloat16; head_dim even.
    positions: (tokens,) int64, in any order. table: float32, as `rotary_table` of week 1 makes it.
    Strides are arbitrary, and there may be no tokens. The arguments are left as they were.
    Returns new tensors of the shapes and the dtype of q and k, rotated as by `apply_rotary` of week
    1: in float32, and rounded once.
    A position outside of [0, len(table)) is no error, since the host would have to wait for the
    device to learn of it: all numbers of such a token become NaN, and nothing outside of the table
    is read.
    One launch of a kernel computes both; what is not contiguous may be copied first.
    """
    raise NotImplementedError(
        "week2/fused_kernels.py: rotate is not written yet → sessions/week2/fused_kernels.md"
    )


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Let `gate` decide, element by element, how much of `up` passes.

    gate: (..., width), float32, float16 or bfloat16; width at least 1. up: gate's shape and dtype.
    Strides are arbitrary: the two may be halves of one tensor. There may be no rows. The arguments
    are left as they were.
    Returns a new tensor of their shape and dtype: what week 1's `silu_mul` gives. The SiLU of gate
    is computed in float32 and rounded to the dtype, and so is its product with up.
    One launch of a kernel computes it; what is not contiguous may be copied first.
    """
    raise NotImplementedError(
        "week2/fused_kernels.py: silu_mul is not written yet → sessions/week2/fused_kernels.md"
    )


class Fused(nn.Module):
    """A module that runs kernels where it can, and week 1's functions elsewhere.

    use_kernels: None means on CUDA only, since anywhere else Triton has nothing but its
    interpreter; True or False means always or never.
    """

    def __init__(self, use_kernels: bool | None):
        super().__init__()
        self.use_kernels = use_kernels

    def runs_kernels(self, x: Tensor) -> bool:
        """Say which of the two is run on x."""
        return x.is_cuda if self.use_kernels is None else self.use_kernels


class FusedRMSNorm(Fused):
    """Week 1's RMSNorm with its weight, which can take an addition along."""

    def __init__(self, norm: RMSNorm, use_kernels: bool | None):
        super().__init__(use_kernels)
        self.weight = norm.weight
        self.eps = norm.eps

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Do what `add_rms_norm` does."""
        if self.runs_kernels(x):
            return add_rms_norm(x, residual, self.weight, self.eps)
        summed = x if residual is None else x + residual
        return rms_norm(summed, self.weight, self.eps), summed

    def forward(self, stream: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """Normalise a tensor, or the sum of the two that a `FusedDecoderLayer` returns."""
        normed, _ = self.add(*stream) if isinstance(stream, tuple) else self.add(stream, None)
        return normed


class FusedRotary(Fused):
    """Week 1's Rotary. On a GPU a position outside of its table gives NaN and no ValueError."""

    def __init__(self, rotary: Rotary, use_kernels: bool | None):
        super().__init__(use_kernels)
        self.unfused = rotary

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        if not self.runs_kernels(q):
            return self.unfused(q, k, positions)
        table = self.unfused.table = self.unfused.table.to(q.device)
        # `rotate` knows one axis of tokens: the sequences of a batch follow each other on it.
        flat_q, flat_k = (x.movedim(-3, 0).flatten(1, -2) for x in (q, k))
        flat_q, flat_k = rotate(flat_q, flat_k, positions.flatten(), table)
        q, k = (x.unflatten(1, positions.shape).movedim(0, -3) for x in (flat_q, flat_k))
        return q, k


class FusedMLP(Fused):
    """Week 1's MLP with its three projections."""

    def __init__(self, mlp: MLP, use_kernels: bool | None):
        super().__init__(use_kernels)
        self.gate_proj = mlp.gate_proj
        self.up_proj = mlp.up_proj
        self.down_proj = mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        combine = silu_mul if self.runs_kernels(x) else unfused_silu_mul
        return self.down_proj(combine(self.gate_proj(x), self.up_proj(x)))


class FusedDecoderLayer(nn.Module):
    """Week 1's DecoderLayer, whose last addition is left to whoever comes next.

    Called with x, or with the pair that such a layer returns: what its feed-forward block gave, and
    the residual stream to which that has still to be added.
    """

    def __init__(self, layer: DecoderLayer):
        super().__init__()
        self.self_attn = layer.self_attn
        self.mlp = layer.mlp
        self.input_layernorm = layer.input_layernorm
        self.post_attention_layernorm = layer.post_attention_layernorm

    def forward(
        self, stream: Tensor | tuple[Tensor, Tensor], positions: Tensor, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        x, residual = stream if isinstance(stream, tuple) else (stream, None)
        x, residual = self.input_layernorm.add(x, residual)
        x = self.self_attn(x, positions, attend)
        x, residual = self.post_attention_layernorm.add(x, residual)
        return self.mlp(x), residual


def fuse(model: Qwen, use_kernels: bool | None = None) -> None:
    """Put the fused modules into a model, in the place of week 1's.

    model: afterwards it is called as before and has the same parameters under the same names. A
        feed-forward block of another kind than week 1's `MLP` stays as it is.
    use_kernels: as in `Fused`.
    Raises ValueError, with nothing changed, when a layer is not week 1's `DecoderLayer`; the
    message names it.
    """
    for index, layer in enumerate(model.layers):
        if type(layer) is not DecoderLayer:
            raise ValueError(f"layer {index} is a {type(layer).__name__}, not a DecoderLayer")
    for index, layer in enumerate(model.layers):
        attention = layer.self_attn
        attention.rotary = FusedRotary(attention.rotary, use_kernels)
        norms = ((attention, "q_norm"), (attention, "k_norm"))
        norms += ((layer, "input_layernorm"), (layer, "post_attention_layernorm"))
        for owner, name in norms:
            if getattr(owner, name) is not None:
                setattr(owner, name, FusedRMSNorm(getattr(owner, name), use_kernels))
        if type(layer.mlp) is MLP:
            layer.mlp = FusedMLP(layer.mlp, use_kernels)
        model.layers[index] = FusedDecoderLayer(layer)
    model.norm = FusedRMSNorm(model.norm, use_kernels)
