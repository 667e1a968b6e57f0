"""Triton kernels for what stands between the matrix products, and a model that runs on them."""

import math

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

# How many numbers of each tensor a program takes: enough loads at a time to keep memory busy, and
# few enough that they stay in registers.
_TILE = 2048


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
    rows = _as_rows(x)
    added = rows if residual is None else _as_rows(residual)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    summed = x if residual is None else torch.empty_like(normed)
    outer, inner, width = rows.shape
    block = triton.next_power_of_2(width)
    rows_at_once = max(1, _TILE // block)
    _add_rms_norm_kernel[(triton.cdiv(outer * inner, rows_at_once),)](
        rows, *rows.stride(), added, *added.stride(), weight, weight.stride(0), normed, summed,
        outer * inner, inner, width, eps, residual is not None, rows_at_once, block,
        num_warps=8,
    )  # fmt: skip
    return normed, summed


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
    num_tokens, head_dim = q.shape[1:]
    block = triton.next_power_of_2(head_dim // 2)
    rows_at_once = max(1, _TILE // (2 * block))
    num_blocks = [triton.cdiv(len(x) * num_tokens, rows_at_once) for x in (q, k)]
    rotated = [
        torch.empty(num_tokens, len(x), head_dim, dtype=x.dtype, device=x.device) for x in (q, k)
    ]
    _rotate_kernel[(sum(num_blocks),)](
        q, *q.stride(), rotated[0], len(q), num_blocks[0],
        k, *k.stride(), rotated[1], len(k),
        positions, positions.stride(0), table, *table.stride(), len(table),
        num_tokens, head_dim // 2, rows_at_once, block,
    )  # fmt: skip
    return rotated[0].transpose(0, 1), rotated[1].transpose(0, 1)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Let `gate` decide, element by element, how much of `up` passes.

    gate: (..., width), float32, float16 or bfloat16; width at least 1. up: gate's shape and dtype.
    Strides are arbitrary: the two may be halves of one tensor. There may be no rows. The arguments
    are left as they were.
    Returns a new tensor of their shape and dtype: what week 1's `silu_mul` gives. The SiLU of gate
    is computed in float32 and rounded to the dtype, and so is its product with up.
    One launch of a kernel computes it; what is not contiguous may be copied first.
    """
    gates, ups = _as_rows(gate), _as_rows(up)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    outer, inner, width = gates.shape
    block = min(triton.next_power_of_2(width), _TILE)
    _silu_mul_kernel[(outer * inner, triton.cdiv(width, block))](
        gates, *gates.stride(), ups, *ups.stride(), out, inner, width, block
    )
    return out


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


def _as_rows(x: Tensor) -> Tensor:
    """View a tensor as (outer, inner, width), so that two strides lead to any of its rows."""
    x = x.unsqueeze(0)  # a tensor of one axis has no axis of rows
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


@triton.jit(do_not_specialize=["num_rows", "inner"])
def _add_rms_norm_kernel(
    x_ptr, x_outer, x_inner, x_column,
    residual_ptr, residual_outer, residual_inner, residual_column,
    weight_ptr, weight_column, normed_ptr, summed_ptr, num_rows, inner, width, eps,
    HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Treat ROWS whole rows: a row's mean square needs all of it, and nothing is read twice."""
    dtype = x_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    outer, within = (rows // inner)[:, None], (rows % inner)[:, None]
    mask = (rows < num_rows)[:, None] & (columns < width)
    x_at = outer * x_outer + within * x_inner + columns * x_column
    # Zeros behind the width add nothing to the squares.
    summed = tl.load(x_ptr + x_at, mask=mask, other=0.0)
    out_at = rows[:, None] * width + columns
    if HAS_RESIDUAL:
        residual_at = outer * residual_outer + within * residual_inner + columns * residual_column
        residual = tl.load(residual_ptr + residual_at, mask=mask, other=0.0)
        summed = (summed.to(tl.float32) + residual.to(tl.float32)).to(dtype)
        tl.store(summed_ptr + out_at, summed, mask=mask)
    wide = summed.to(tl.float32)
    mean_square = tl.sum(wide * wide, axis=1) / width
    normed = (wide * tl.rsqrt(mean_square + eps)[:, None]).to(dtype)
    weight = tl.load(weight_ptr + columns * weight_column, mask=columns < width)
    # The product of two rounded numbers is exact in float32, so that it is rounded once.
    product = normed.to(tl.float32) * weight.to(dtype).to(tl.float32)
    tl.store(normed_ptr + out_at, product.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["num_q_blocks", "num_tokens", "limit"])
def _rotate_kernel(
    q_ptr, q_head, q_token, q_column, rotated_q_ptr, num_heads, num_q_blocks,
    k_ptr, k_head, k_token, k_column, rotated_k_ptr, num_kv_heads,
    positions_ptr, position_stride, table_ptr, table_row, table_column, limit,
    num_tokens, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate some rows of q, or, in the programs behind those, of k."""
    block = tl.program_id(0)
    if block < num_q_blocks:
        _rotate_rows(
            block, q_ptr, q_head, q_token, q_column, rotated_q_ptr, num_heads,
            positions_ptr, position_stride, table_ptr, table_row, table_column, limit,
            num_tokens, HALF, ROWS, BLOCK,
        )  # fmt: skip
    else:
        _rotate_rows(
            block - num_q_blocks, k_ptr, k_head, k_token, k_column, rotated_k_ptr, num_kv_heads,
            positions_ptr, position_stride, table_ptr, table_row, table_column, limit,
            num_tokens, HALF, ROWS, BLOCK,
        )  # fmt: skip


@triton.jit
def _rotate_rows(
    block, x_ptr, x_head, x_token, x_column, out_ptr, num_heads,
    positions_ptr, position_stride, table_ptr, table_row, table_column, limit,
    num_tokens, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate ROWS rows. A row is one head of one token, and a token's heads follow each other."""
    rows = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pairs = tl.arange(0, BLOCK)
    tokens, heads = rows // num_heads, rows % num_heads
    mask = (tokens < num_tokens)[:, None] & (pairs < HALF)
    positions = tl.load(positions_ptr + tokens * position_stride, mask=tokens < num_tokens)
    turns = mask & ((positions >= 0) & (positions < limit))[:, None]
    cos_ptrs = table_ptr + (positions * table_row)[:, None] + pairs * table_column
    cos = tl.load(cos_ptrs, mask=turns, other=float("nan"))
    sin = tl.load(cos_ptrs + HALF * table_column, mask=turns, other=float("nan"))
    first_ptrs = x_ptr + (heads * x_head + tokens * x_token)[:, None] + pairs * x_column
    first = tl.load(first_ptrs, mask=mask).to(tl.float32)
    second = tl.load(first_ptrs + HALF * x_column, mask=mask).to(tl.float32)
    out_ptrs = out_ptr + (rows * 2 * HALF)[:, None] + pairs
    # What is stored is rounded to the dtype that lies there.
    tl.store(out_ptrs, first * cos - second * sin, mask=mask)
    tl.store(out_ptrs + HALF, second * cos + first * sin, mask=mask)


@triton.jit(do_not_specialize=["inner"])
def _silu_mul_kernel(
    gate_ptr, gate_outer, gate_inner, gate_column, up_ptr, up_outer, up_inner, up_column,
    out_ptr, inner, width, BLOCK: tl.constexpr,
):  # fmt: skip
    """Treat BLOCK columns of one row."""
    dtype = gate_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    outer, within = row // inner, row % inner
    gate_at = outer * gate_outer + within * gate_inner + columns * gate_column
    gate = tl.load(gate_ptr + gate_at, mask=mask).to(tl.float32)
    up_at = outer * up_outer + within * up_inner + columns * up_column
    up = tl.load(up_ptr + up_at, mask=mask).to(tl.float32)
    silu = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * width + columns, (silu * up).to(dtype), mask=mask)
