"""Decode attention in kernels: each row's tokens cut into splits, and their results merged."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from week2.kv_cache import decode_attention

__all__ = ["merge_splits", "plan_splits", "flash_decode"]

# So many programs on one processor: some of them compute while others wait for memory.
PROGRAMS_PER_PROCESSOR = 2
# A split of fewer tokens costs more to begin and to merge than it saves.
MIN_SPLIT_TOKENS = 256

_MERGED_AT_ONCE = 16
# Chosen by what `course kernels` says: so no register is spilled, and the shared memory of an A100
# has room for two programs.
_BLOCKS = {
    torch.float32: {"BLOCK_TOKENS": 32, "num_stages": 2},
    torch.float16: {"BLOCK_TOKENS": 64, "num_stages": 3},
    torch.bfloat16: {"BLOCK_TOKENS": 64, "num_stages": 3},
}
# tl.dot multiplies tiles of at least this many rows and columns.
_SMALLEST_TILE = 16


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
    # Where no split has keys, −inf − (−inf) would be NaN.
    peak = lses.amax(0).clamp(min=torch.finfo(lses.dtype).min)
    weights = (lses - peak).exp()
    # The largest weight is 1, so that only where no split has keys the sum is below it.
    total = weights.sum(0)
    # A weight of 0 does not help against NaN.
    parts = outs.masked_fill(lses.unsqueeze(-1) == -math.inf, 0.0)
    out = (weights.unsqueeze(-1) * parts).sum(0) / total.clamp(min=1.0).unsqueeze(-1)
    return out, peak + total.log()


def plan_splits(num_programs: int, capacity: int, num_processors: int) -> int:
    """Choose into how many splits the tokens of every row are cut.

    num_programs: how many programs there are when nothing is cut. capacity: how many tokens a row
    may have. num_processors: of the GPU. All at least 1.
    Returns the smallest number of splits with which there are PROGRAMS_PER_PROCESSOR programs or
    more for each processor. It is less where a split would have fewer than MIN_SPLIT_TOKENS tokens
    of a row that has capacity of them: then as many as have that; but always at least 1.
    """
    wanted = math.ceil(PROGRAMS_PER_PROCESSOR * num_processors / num_programs)
    return max(1, min(wanted, capacity // MIN_SPLIT_TOKENS))


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
    num_rows, num_heads, head_dim = q.shape
    _, num_kv_heads, capacity, _ = keys.shape
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide among {num_kv_heads} kv heads")
    if num_splits is None:
        num_splits = plan_splits(num_rows * num_kv_heads, capacity, _num_processors(q.device))
    if num_splits < 1:
        raise ValueError(f"num_splits must be at least 1, got {num_splits}")
    # What is merged stays in float32; with a single split there is nothing to merge.
    dtype = torch.float32 if num_splits > 1 else q.dtype
    outs = q.new_empty(num_splits, num_rows, num_heads, head_dim, dtype=dtype)
    lses = q.new_empty(num_splits, num_rows, num_heads, dtype=torch.float32)
    _launch_attention(q, keys, values, num_tokens, outs, lses)
    return outs[0] if num_splits == 1 else _launch_merge(outs, lses, q.dtype)


def decode(q: Tensor, keys: Tensor, values: Tensor, num_tokens: Tensor) -> Tensor:
    """Do what `decode_attention` does, by `flash_decode` where the tensors lie on a GPU.

    The one place that chooses: Triton compiles for GPUs only. On a CPU its interpreter can run the
    kernel, slowly, so that there PyTorch computes.
    """
    attend = flash_decode if q.is_cuda else decode_attention
    return attend(q, keys, values, num_tokens)


def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the interpreter runs one program after the other
    return torch.cuda.get_device_properties(device).multi_processor_count


def _launch_attention(
    q: Tensor, keys: Tensor, values: Tensor, num_tokens: Tensor, outs: Tensor, lses: Tensor
) -> None:
    """Fill outs and lses, one program for each row, key/value head and split."""
    num_splits, num_rows, num_heads, head_dim = outs.shape
    group = num_heads // keys.shape[1]
    block_heads = max(_SMALLEST_TILE, triton.next_power_of_2(group))
    _attend_to_split[num_rows, keys.shape[1], num_splits](
        *(q, keys, values, num_tokens, outs, lses),
        *(q.stride(), keys.stride(), values.stride(), num_tokens.stride()),
        head_dim**-0.5,
        HEAD_DIM=head_dim,
        GROUP=group,
        BLOCK_HEADS=block_heads,
        BLOCK_DIM=max(_SMALLEST_TILE, triton.next_power_of_2(head_dim)),
        num_warps=block_heads // 4,
        **_BLOCKS[q.dtype],
    )


def _launch_merge(outs: Tensor, lses: Tensor, dtype: torch.dtype) -> Tensor:
    num_splits, num_rows, num_heads, head_dim = outs.shape
    merged = outs.new_empty(num_rows, num_heads, head_dim, dtype=dtype)
    _merge_splits_of_query[num_rows * num_heads,](
        *(outs, lses, merged, num_splits, num_rows * num_heads),
        HEAD_DIM=head_dim,
        BLOCK_DIM=triton.next_power_of_2(head_dim),
        BLOCK_SPLITS=_MERGED_AT_ONCE,
    )
    return merged


@triton.jit
def _attend_to_split(
    q,
    keys,
    values,
    num_tokens,
    outs,
    lses,
    q_strides,
    key_strides,
    value_strides,
    num_tokens_strides,
    scale,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    # A cache may hold more than 2**31 numbers, so that places in it are counted in 64 bits.
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    split, num_splits = tl.program_id(2), tl.num_programs(2)
    members, dims = tl.arange(0, BLOCK_HEADS), tl.arange(0, BLOCK_DIM)
    heads = kv_head * GROUP + members
    mine = (members < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    q += row * q_strides[0] + heads[:, None] * q_strides[1] + dims[None, :] * q_strides[2]
    queries = tl.load(q, mask=mine, other=0.0)

    length = tl.load(num_tokens + row * num_tokens_strides[0])
    # Whole blocks, so that only the last one of the row is ragged.
    split_size = tl.cdiv(tl.cdiv(length, BLOCK_TOKENS), num_splits) * BLOCK_TOKENS
    first = split * split_size
    end = tl.minimum(first + split_size, length)
    keys += row * key_strides[0] + kv_head * key_strides[1] + dims[None, :] * key_strides[3]
    values += row * value_strides[0] + kv_head * value_strides[1] + dims[None, :] * value_strides[3]
    peak = tl.full((BLOCK_HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_HEADS,), tl.float32)
    gathered = tl.zeros((BLOCK_HEADS, BLOCK_DIM), tl.float32)
    for start in range(first, end, BLOCK_TOKENS):
        tokens = start + tl.arange(0, BLOCK_TOKENS)
        there = (tokens < end)[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(keys + tokens[:, None] * key_strides[2], mask=there, other=0.0)
        v = tl.load(values + tokens[:, None] * value_strides[2], mask=there, other=0.0)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where((tokens < end)[None, :], scores, float("-inf"))
        peak, total, gathered = _add_block(scores, v, peak, total, gathered)

    places = (split * tl.num_programs(0) + row) * tl.num_programs(1) * GROUP + heads
    # Without a token the logarithm is −inf, and nobody reads what was gathered.
    tl.store(lses + places, peak + tl.log(total), mask=members < GROUP)
    outs += places[:, None] * HEAD_DIM + dims[None, :]
    tl.store(outs, gathered / total[:, None], mask=mine & (total > 0.0)[:, None])


@triton.jit
def _add_block(scores, v, peak, total, gathered):
    """Let a block of tokens join what was gathered; every row of scores has a finite one."""
    new_peak = tl.maximum(peak, tl.max(scores, axis=1))
    weights = tl.exp(scores - new_peak[:, None])
    shrink = tl.exp(peak - new_peak)
    total = total * shrink + tl.sum(weights, axis=1)
    gathered = gathered * shrink[:, None]
    gathered = tl.dot(weights.to(v.dtype), v, gathered, input_precision="ieee")
    return new_peak, total, gathered


@triton.jit
def _merge_splits_of_query(
    outs,
    lses,
    merged,
    num_splits,
    num_queries,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    query = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK_DIM)
    peak, total = float("-inf"), 0.0
    gathered = tl.zeros((BLOCK_DIM,), tl.float32)
    # The first split always has tokens, so that the peak is finite from the first round on.
    for start in range(0, num_splits, BLOCK_SPLITS):
        splits = start + tl.arange(0, BLOCK_SPLITS)
        places = splits * num_queries + query
        lse = tl.load(lses + places, mask=splits < num_splits, other=float("-inf"))
        there = (lse > float("-inf"))[:, None] & (dims < HEAD_DIM)[None, :]
        out = tl.load(outs + places[:, None] * HEAD_DIM + dims[None, :], mask=there, other=0.0)
        new_peak = tl.maximum(peak, tl.max(lse, axis=0))
        weights = tl.exp(lse - new_peak)
        shrink = tl.exp(peak - new_peak)
        total = total * shrink + tl.sum(weights, axis=0)
        gathered = gathered * shrink + tl.sum(weights[:, None] * out, axis=0)
        peak = new_peak
    tl.store(merged + query * HEAD_DIM + dims, gathered / total, mask=dims < HEAD_DIM)
