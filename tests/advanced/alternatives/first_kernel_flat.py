"""Kernels whose grid follows the block, several rows a program, and a copy by flat indices."""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["add", "row_sum", "tiled_copy"]


def add(x: Tensor, y: Tensor) -> Tensor:
    """Add in float32; a grid as a function of the constants."""
    if x.ndim != 1:
        raise ValueError(f"expected a vector instead of {tuple(x.shape)}")
    if x.shape != y.shape:
        raise ValueError(f"sizes differ: {tuple(x.shape)} and {tuple(y.shape)}")
    if (x.dtype, x.device) != (y.dtype, y.device):
        raise ValueError(f"{x.dtype} on {x.device} and {y.dtype} on {y.device} do not go together")
    strides = [vector.stride(0) for vector in (x, y)]
    if not (x.is_contiguous() and y.is_contiguous()):
        raise ValueError(f"expected elements side by side, got strides {strides}")
    total = x.new_empty(x.shape)
    size = x.numel()
    _plus[lambda constants: (triton.cdiv(size, constants["B"]),)](x, y, total, size, B=128)
    return total


def row_sum(x: Tensor) -> Tensor:
    """Sum 8 rows a program, over tiles of 8 × 256."""
    if x.ndim != 2:
        raise ValueError(f"expected a matrix instead of {tuple(x.shape)}")
    height, width = x.shape
    sums = x.new_empty(height)
    down, right = x.stride()
    grid = (triton.cdiv(height, 8),)
    _sums[grid](x, sums, height, width, down, right, ROWS=8, COLUMNS=256)
    return sums


def tiled_copy(x: Tensor) -> Tensor:
    """Copy 1,024 elements a program, in the order of the result."""
    if x.ndim != 2:
        raise ValueError(f"expected a matrix instead of {tuple(x.shape)}")
    copy = torch.empty(*x.shape, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(x.numel(), 1024),)
    _flat_copy[grid](x, copy, x.numel(), x.shape[1], x.stride(0), x.stride(1), 1024)
    return copy


@triton.jit
def _plus(a, b, c, n, B: tl.constexpr):
    i = tl.arange(0, B) + B * tl.program_id(axis=0)
    inside = i < n
    left = tl.load(a + i, inside, 0.0).to(tl.float32)
    right = tl.load(b + i, inside, 0.0).to(tl.float32)
    tl.store(c + i, (left + right).to(c.dtype.element_ty), inside)


@triton.jit
def _sums(x, out, height, width, down, right, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    starts = x + rows[:, None] * down
    for start in range(0, width, COLUMNS):
        columns = (start + tl.arange(0, COLUMNS))[None, :]
        inside = (rows[:, None] < height) & (columns < width)
        tile = tl.load(starts + columns * right, mask=inside, other=0.0)
        total += tl.sum(tile.to(tl.float32), axis=1)
    tl.store(out + rows, total, mask=rows < height)


@triton.jit
def _flat_copy(x, out, total, width, down, right, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    inside = i < total
    element = tl.load(x + (i // width) * down + (i % width) * right, mask=inside)
    tl.store(out + i, element, mask=inside)
