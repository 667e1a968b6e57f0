"""Decode attention in kernels: each row's tokens cut into splits, and their results merged."""

import math

import torch
from torch import Tensor

from week2.kv_cache import decode_attention

__all__ = ["merge_splits", "plan_splits", "flash_decode"]

# So many programs on one processor: some of them compute while others wait for memory.
PROGRAMS_PER_PROCESSOR = 2
# A split of fewer tokens costs more to begin and to merge than it saves.
MIN_SPLIT_TOKENS = 256


def merge_splits(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Make what a query gathers from all keys out of what it gathers from each split of them.

    outs: (num_splits, ..., head_dim) float32: for each split, `attention` over its keys alone.
    lses: (num_splits, ...) float32: for each split, the natural logarithm of the sum of exp(score)
        over its keys; any finite number. Where a split has no keys for a query it is −inf, and
        outs means nothing there: it may be NaN.
    Returns out (..., head_dim) and lse (...), both float32: the same two for all keys together, so
    that they may be merged again; zeros and −inf where no split has keys. The arguments are left as
    they were.
    Source: Milakov and Gimelshein 2018, arXiv:1805.02867, section 3.1.
    """
    raise NotImplementedError(
        "week2/flash_decoding.py: merge_splits is not written yet "
        "→ sessions/week2/flash_decoding.md"
    )


def plan_splits(num_programs: int, capacity: int, num_processors: int) -> int:
    """Choose into how many splits the tokens of every row are cut.

    num_programs: how many programs there are when nothing is cut. capacity: how many tokens a row
    may have. num_processors: of the GPU. All at least 1.
    Returns the smallest number of splits with which there are PROGRAMS_PER_PROCESSOR programs or
    more for each processor. It is less where a split would have fewer than MIN_SPLIT_TOKENS tokens
    of a row that has capacity of them: then as many as have that; but always at least 1.
    """
    raise NotImplementedError(
        "week2/flash_decoding.py: plan_splits is not written yet → sessions/week2/flash_decoding.md"
    )


def flash_decode(
    q: Tensor, keys: Tensor, values: Tensor, num_tokens: Tensor, num_splits: int | None = None
) -> Tensor:
    """Let one new token of each row gather the values of its row, in Triton kernels.

    q: (rows, num_heads, head_dim) float32, float16 or bfloat16, any strides; at least one row.
    keys, values: (rows, num_kv_heads, capacity, head_dim), q's dtype, any strides, such as views of
        a larger cache, which may hold more than 2**31 numbers. Consecutive query heads share a
        key/value head, as in `grouped_attention`.
    num_tokens: (rows,) int64, each in [1, capacity], any stride: row r looks at its first
        num_tokens[r] tokens. What lies behind them is not read and may be anything, NaN too.
    num_splits: into how many splits the tokens of every row are cut: those that it has, not those
        that it may have; even where a row has fewer tokens than that. None lets `plan_splits`
        choose for one program a row and key/value head; a CPU counts as one processor.
    Returns (rows, num_heads, head_dim), q's dtype. Scores, weights and sums are float32, also
    between the kernels; only weights may be rounded to q's dtype, to be multiplied with values. The
    arguments are left as they were.
    One kernel is launched, or two: what the first one gives for each split may be merged by another
    one or by `merge_splits`. Each row, key/value head and split has a program of its own. The
    kernels read each key and value of a row's tokens once, where it lies, however many query heads
    and splits there are. The host does not wait for the device: what is launched follows from
    shapes and num_splits alone.
    Raises ValueError, which gives both numbers, when num_heads does not divide by num_kv_heads; and
    one that gives the value when num_splits is below 1.
    Source: Dao, Haziza, Massa and Sizov 2023, "Flash-Decoding for long-context inference".
    """
    raise NotImplementedError(
        "week2/flash_decoding.py: flash_decode is not written yet "
        "→ sessions/week2/flash_decoding.md"
    )


def decode(q: Tensor, keys: Tensor, values: Tensor, num_tokens: Tensor) -> Tensor:
    """Do what `decode_attention` does, by `flash_decode` where the tensors lie on a GPU.

    The one place that chooses: Triton compiles for GPUs only. On a CPU its interpreter can run the
    kernel, slowly, so that there PyTorch computes.
    """
    attend = flash_decode if q.is_cuda else decode_attention
    return attend(q, keys, values, num_tokens)
