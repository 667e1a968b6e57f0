"""week3/paged_kernels: what `course kernels` compiles of it."""

import functools
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor

NUM_SEQS, NUM_BLOCKS, BLOCK_SIZE, NUM_NEW = 8, 64, 16, 100
# (num_heads, num_kv_heads, head_dim): Qwen2.5-0.5B, SmolLM2-135M, a ratio of 1, Qwen3-0.6B and -8B.
HEADS = ((14, 2, 64), (9, 3, 64), (8, 8, 80), (16, 8, 128), (32, 8, 128))


def kernel_calls(lab: ModuleType) -> Iterator[tuple[str, Callable[[], object]]]:
    """List calls with the heads and dtypes of real models, for `course kernels`."""
    for num_heads, num_kv_heads, head_dim in HEADS:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            new = functools.partial(torch.empty, dtype=dtype)
            pool = new(NUM_BLOCKS, num_kv_heads, BLOCK_SIZE, head_dim)
            k = new(NUM_NEW, num_kv_heads, head_dim).transpose(0, 1)
            q = new(NUM_NEW, num_heads, head_dim).transpose(0, 1)
            what = f"{num_heads} and {num_kv_heads} heads of {head_dim}, {str(dtype)[6:]}"
            yield (
                f"store_kv, {what}",
                functools.partial(lab.store_kv, k, k, pool, pool, _ids(NUM_NEW)),
            )
            tables, lens = _ids(NUM_SEQS, 8), _ids(NUM_SEQS)
            prefill = lab.paged_prefill, q, pool, pool, tables, _ids(NUM_SEQS + 1), lens, NUM_NEW
            yield f"paged_prefill, {what}", functools.partial(*prefill)
            for num_splits in (1, 4):
                decode = (
                    lab.paged_decode,
                    q.transpose(0, 1),
                    pool,
                    pool,
                    _ids(NUM_NEW, 8),
                    _ids(NUM_NEW),
                )
                yield (
                    f"paged_decode, {what}, {num_splits} splits",
                    functools.partial(*decode, num_splits),
                )


def _ids(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.int64)
