"""Three first kernels in Triton: add two vectors, sum the rows of a matrix, copy it in tiles."""

import torch
import triton
from torch import Tensor

__all__ = ["add", "row_sum", "tiled_copy"]


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
    raise NotImplementedError(
        "advanced/first_kernel.py: add is not written yet → sessions/advanced/first_kernel.md"
    )


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
    raise NotImplementedError(
        "advanced/first_kernel.py: row_sum is not written yet → sessions/advanced/first_kernel.md"
    )


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
    raise NotImplementedError(
        "advanced/first_kernel.py: tiled_copy is not written yet "
        "→ sessions/advanced/first_kernel.md"
    )
