"""Calls of first kernels with sizes of real models, which `course kernels` compiles."""

from collections.abc import Callable, Iterator
from types import ModuleType

import torch

# The width of a hidden state, and a row longer than any block.
WIDTHS = (896, 1_500_000)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def kernel_calls(lab: ModuleType) -> Iterator[tuple[str, Callable[[], object]]]:
    """List calls with sizes and dtypes of real models."""
    for dtype in DTYPES:
        short = str(dtype).removeprefix("torch.")
        vector = torch.empty(100_003, dtype=dtype)
        yield f"add, {short}, 100,003 elements", lambda x=vector: lab.add(x, x)
        for width in WIDTHS:
            x = torch.empty(2, width, dtype=dtype)
            yield f"row_sum, {short}, {width:,} columns", lambda x=x: lab.row_sum(x)
        x = torch.empty(500, 896, dtype=dtype)
        yield f"tiled_copy, {short}, rows", lambda x=x: lab.tiled_copy(x)
        yield f"tiled_copy, {short}, a transposed matrix", lambda x=x: lab.tiled_copy(x.T)
