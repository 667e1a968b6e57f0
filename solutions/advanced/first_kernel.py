"""Three first kernels in Triton: add two vectors, sum the rows of a matrix, copy it in tiles."""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["add", "row_sum", "tiled_copy"]

# How many elements a program treats at once: some for each of its 128 threads.
_BLOCK = 1024
# A tile has as many rows as columns, so that no layout of the matrix is worse than another.
_TILE = 32


def add(x: Tensor, y: Tensor) -> Tensor:
    """Add two vectors, element by element.

    x: (size,), float32, float16 or bfloat16, contiguous: one element lies behind the other. size is
        any number below 2**31, also 0. y: x's shape, dtype and device, contiguous.
    Returns a new tensor of x's shape and dtype. The arguments are left as they were.
    One launch of a kernel computes it, and its programs share the work: there is at least one for
    each 4,096 elements.
    Raises ValueError, before anything is launched: when x has not one axis (it gives x's shape);
    when y differs from x in shape, dtype or device (it gives both); when one is not contiguous (it
    gives its stride).
    """
    _check_axes(x, 1)
    for what in ("shape", "dtype", "device"):
        ours, others = getattr(x, what), getattr(y, what)
        if ours != others:
            raise ValueError(f"x and y must have one {what}, got {ours} and {others}")
    for name, vector in (("x", x), ("y", y)):
        if not vector.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got stride {vector.stride(0)}")
    size = len(x)
    out = torch.empty_like(x)
    _add_kernel[(triton.cdiv(size, _BLOCK),)](x, y, out, size, _BLOCK)
    return out


def row_sum(x: Tensor) -> Tensor:
    """Sum each row of a matrix.

    x: (rows, columns), float32, float16 or bfloat16. Its strides are arbitrary, and the offset of
        every element from the first is below 2**31. Either axis may be empty; a row may be longer
        than the largest block of Triton, 2**20 elements.
    Returns a new tensor (rows,) of x's dtype. A row is added up in float32, and the sum is rounded
    once; without columns it is 0. x is left as it was.
    One launch of a kernel computes it, nothing is copied first, and its programs share the work:
    there is at least one for each 64 rows.
    Raises ValueError, which gives x's shape, when x has not two axes.
    """
    _check_axes(x, 2)
    num_rows, num_columns = x.shape
    out = torch.empty(num_rows, dtype=x.dtype, device=x.device)
    _row_sum_kernel[(num_rows,)](x, *x.stride(), out, num_columns, _BLOCK)
    return out


def tiled_copy(x: Tensor) -> Tensor:
    """Copy a matrix, however it lies in memory, into one that lies there row by row.

    x: (rows, columns), float32, float16 or bfloat16. Its strides are arbitrary, such as those of a
        transposed matrix or of every second column, and the offset of every element from the first
        is below 2**31. Either axis may be empty, and has at most 2**20 elements.
    Returns a new contiguous tensor of x's shape and dtype with the same elements, bit by bit. x is
    left as it was.
    One launch of a kernel copies it, and nothing else does. Its programs share the work: there is
    at least one for each 4,096 elements.
    Raises ValueError, which gives x's shape, when x has not two axes.
    """
    _check_axes(x, 2)
    num_rows, num_columns = x.shape
    out = torch.empty(num_rows, num_columns, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(num_rows, _TILE), triton.cdiv(num_columns, _TILE))
    _tiled_copy_kernel[grid](x, *x.stride(), out, num_rows, num_columns, _TILE)
    return out


def _check_axes(x: Tensor, count: int) -> None:
    if x.dim() != count:
        raise ValueError(f"x must have {count} axes, got shape {tuple(x.shape)}")


@triton.jit
def _add_kernel(x_ptr, y_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """Add the BLOCK elements of this program."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    x = tl.load(x_ptr + offsets, mask=mask)
    y = tl.load(y_ptr + offsets, mask=mask)
    tl.store(out_ptr + offsets, x + y, mask=mask)


@triton.jit
def _row_sum_kernel(
    x_ptr, row_stride, column_stride, out_ptr, num_columns, BLOCK: tl.constexpr
):  # fmt: skip
    """Sum the row of this program, BLOCK columns at a time."""
    row = tl.program_id(0)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        offsets = row * row_stride + columns * column_stride
        # Zeros behind the end of the row leave its sum as it is.
        sums += tl.load(x_ptr + offsets, mask=columns < num_columns, other=0.0)
    tl.store(out_ptr + row, tl.sum(sums, axis=0))


@triton.jit
def _tiled_copy_kernel(
    x_ptr, row_stride, column_stride, out_ptr, num_rows, num_columns, TILE: tl.constexpr
):
    """Copy the TILE × TILE elements of this program."""
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)[:, None]
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)[None, :]
    mask = (rows < num_rows) & (columns < num_columns)
    values = tl.load(x_ptr + rows * row_stride + columns * column_stride, mask=mask)
    tl.store(out_ptr + rows * num_columns + columns, values, mask=mask)
