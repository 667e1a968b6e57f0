"""The same kernels another way: rows in two passes over blocks of columns, one token a program.

Rows are read twice, so that a width of any size fits; a program rotates all heads of one token; the
product walks over flat memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from week1.gqa import Attend
from week1.mlp import MLP, DecoderLayer, RMSNorm, rms_norm
from week1.mlp import silu_mul as unfused_silu_mul
from week1.qwen import Qwen
from week1.rope import Rotary

__all__ = ["add_rms_norm", "rotate", "silu_mul"]

_BLOCK = 512


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Sum blocks of squares first, and come back to scale."""
    # What the kernel walks over is contiguous, and a copy is made where it is not.
    flat = x.contiguous().view(-1, x.shape[-1])
    addend = flat if residual is None else residual.contiguous().view(flat.shape)
    normed = torch.empty_like(flat)
    summed = flat if residual is None else torch.empty_like(flat)
    if len(flat):
        _norm_in_two_passes[(len(flat),)](
            flat, addend, weight.to(x.dtype).contiguous(), summed, normed,
            flat.shape[1], eps, residual is not None, _BLOCK,
        )  # fmt: skip
    return normed.view(x.shape), x if residual is None else summed.view(x.shape)


@triton.jit
def _norm_in_two_passes(
    x_ptr, addend_ptr, weight_ptr, summed_ptr, normed_ptr, width, eps,
    ADDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * width
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < width
        value = tl.load(x_ptr + start + columns, mask=inside, other=0.0)
        if ADDS:
            value = value.to(tl.float32)
            value += tl.load(addend_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
            value = value.to(x_ptr.dtype.element_ty)
            tl.store(summed_ptr + start + columns, value, mask=inside)
        wide = value.to(tl.float32)
        squares += wide * wide
    scale = 1.0 / tl.sqrt(tl.sum(squares) / width + eps)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < width
        value = tl.load(x_ptr + start + columns, mask=inside, other=0.0)
        if ADDS:
            # Added again instead of read back: what was stored may still be on its way.
            value = value.to(tl.float32)
            value += tl.load(addend_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
            value = value.to(x_ptr.dtype.element_ty)
        normed = (value.to(tl.float32) * scale).to(x_ptr.dtype.element_ty)
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
        tl.store(normed_ptr + start + columns, (normed * weight).to(normed.dtype), mask=inside)


def rotate(q: Tensor, k: Tensor, positions: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Give every token to a program, which turns all of its heads."""
    (num_heads, tokens, head_dim), num_kv_heads = q.shape, k.shape[0]
    # Queries and keys side by side, as one tensor of heads.
    out = q.new_empty(num_heads + num_kv_heads, tokens, head_dim)
    if tokens:
        _rotate_token[(tokens,)](
            q, *q.stride(), num_heads, k, *k.stride(), num_heads + num_kv_heads, out,
            positions, positions.stride(0), table.contiguous(), table.shape[0],
            tokens, head_dim // 2, triton.next_power_of_2(head_dim // 2),
        )  # fmt: skip
    return out[:num_heads], out[num_heads:]


@triton.jit
def _rotate_token(
    q_ptr, q_head, q_token, q_column, num_heads, k_ptr, k_head, k_token, k_column, all_heads,
    out_ptr, positions_ptr, positions_stride, table_ptr, limit, tokens, half,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < half
    position = tl.load(positions_ptr + token * positions_stride)
    exists = (position >= 0) & (position < limit)
    row = table_ptr + tl.where(exists, position, 0) * 2 * half + i
    nothing = tl.where(exists, 0.0, float("nan"))
    real = tl.load(row, mask=inside, other=0.0) + nothing
    imaginary = tl.load(row + half, mask=inside, other=0.0) + nothing
    for head in range(all_heads):
        if head < num_heads:
            x = q_ptr + head * q_head + token * q_token + i * q_column
            other = x + half * q_column
        else:
            x = k_ptr + (head - num_heads) * k_head + token * k_token + i * k_column
            other = x + half * k_column
        a = tl.load(x, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(other, mask=inside, other=0.0).to(tl.float32)
        place = out_ptr + (head * tokens + token) * 2 * half + i
        tl.store(place, a * real - b * imaginary, mask=inside)
        tl.store(place + half, a * imaginary + b * real, mask=inside)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Copy what is not contiguous, and walk over all numbers as one row."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if gate.numel():
        _multiply[(triton.cdiv(gate.numel(), _BLOCK),)](gate, up, out, gate.numel(), _BLOCK)
    return out


@triton.jit
def _multiply(gate_ptr, up_ptr, out_ptr, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    gate = tl.load(gate_ptr + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + place, mask=inside, other=0.0)
    silu = (gate / (1.0 + tl.exp(-gate))).to(up.dtype)
    tl.store(out_ptr + place, (silu.to(tl.float32) * up.to(tl.float32)).to(up.dtype), mask=inside)


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
