"""Week2/flash_decoding another way: splits deal the blocks out in rounds, PyTorch merges them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from week1.attention import softmax
from week2.kv_cache import decode_attention

__all__ = ["merge_splits", "plan_splits", "flash_decode"]

PROGRAMS_PER_PROCESSOR = 2
MIN_SPLIT_TOKENS = 256
_LOG2_OF_E = 1.4426950408889634


def merge_splits(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Add the splits up one after the other, in float64."""
    num_splits, *shape, head_dim = outs.shape
    out = outs.new_zeros(*shape, head_dim, dtype=torch.float64)
    lse = lses.new_full(shape, float("-inf"), dtype=torch.float64)
    for index in range(num_splits):
        pair = torch.stack((lse, lses[index].double()))
        weights = softmax(pair, dim=0).unsqueeze(-1)
        part = torch.where(weights[1] > 0, outs[index].double(), 0.0)
        out = weights[0] * out + weights[1] * part
        lse = torch.logaddexp(*pair)
    return out.float(), lse.float()


def plan_splits(num_programs: int, capacity: int, num_processors: int) -> int:
    """Add one split after the other while there is room on the GPU and in the row."""
    splits = 1
    while (
        splits * num_programs < PROGRAMS_PER_PROCESSOR * num_processors
        and MIN_SPLIT_TOKENS * (splits + 1) <= capacity
    ):
        splits += 1
    return splits


def flash_decode(
    q: Tensor, keys: Tensor, values: Tensor, num_tokens: Tensor, num_splits: int | None = None
) -> Tensor:
    """Launch one kernel over all splits; what it writes is merged by `merge_splits`."""
    rows, num_heads, head_dim = q.shape
    num_kv_heads, capacity = keys.shape[1], keys.shape[2]
    group, rest = divmod(num_heads, num_kv_heads)
    if rest:
        raise ValueError(f"num_heads {num_heads}, num_kv_heads {num_kv_heads}")
    if num_splits is None:
        gpu = torch.cuda.get_device_properties(q.device) if q.is_cuda else None
        processors = gpu.multi_processor_count if gpu else 3
        num_splits = plan_splits(rows * num_kv_heads, capacity, processors)
    if num_splits <= 0:
        raise ValueError(f"{num_splits} splits")
    outs = torch.zeros(num_splits, rows, num_heads, head_dim, device=q.device)
    lses = torch.zeros(num_splits, rows, num_heads, device=q.device)
    _deal[(num_splits * num_kv_heads, rows)](
        *(q, keys, values, num_tokens, outs, lses),
        *(*q.stride(), *keys.stride(), *values.stride(), num_tokens.stride(0)),
        *(*outs.stride()[:3], num_splits, head_dim, group, head_dim**-0.5 * _LOG2_OF_E),
        BLOCK_M=max(16, triton.next_power_of_2(group)),
        BLOCK_N=32,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
    )
    return merge_splits(outs, lses)[0].to(q.dtype)


def decode(q: Tensor, keys: Tensor, values: Tensor, num_tokens: Tensor) -> Tensor:
    """Choose by device."""
    return (flash_decode if q.is_cuda else decode_attention)(q, keys, values, num_tokens)


@triton.jit
def _deal(
    q,
    k,
    v,
    num_tokens,
    outs,
    lses,
    q_row,
    q_head,
    q_dim,
    k_row,
    k_head,
    k_token,
    k_dim,
    v_row,
    v_head,
    v_token,
    v_dim,
    length_stride,
    out_split,
    out_row,
    out_head,
    num_splits,
    head_dim,
    group,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    head = (tl.program_id(0) // num_splits).to(tl.int64)
    split = tl.program_id(0) % num_splits
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    q_mask = (m < group)[:, None] & (d < head_dim)[None, :]
    first_head = head * group
    q_at = row * q_row + (first_head + m)[:, None] * q_head + d[None, :] * q_dim
    tile = tl.load(q + q_at, mask=q_mask, other=0.0)
    length = tl.load(num_tokens + row * length_stride)
    k += row * k_row + head * k_head
    v += row * v_row + head * v_head
    # Far below every score, yet finite: a split without a token stays there.
    top = tl.full((BLOCK_M,), -3.0e38, tl.float32)
    mass = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(split * BLOCK_N, length, num_splits * BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        k_mask = (n < length)[None, :] & (d < head_dim)[:, None]
        keys = tl.load(k + n[None, :] * k_token + d[:, None] * k_dim, mask=k_mask, other=0.0)
        s = tl.dot(tile, keys, input_precision="ieee") * scale
        s = tl.where((n < length)[None, :], s, -3.0e38)
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        decay = tl.exp2(top - higher)
        mass = mass * decay + tl.sum(p, 1)
        v_mask = (n < length)[:, None] & (d < head_dim)[None, :]
        values = tl.load(v + n[:, None] * v_token + d[None, :] * v_dim, mask=v_mask, other=0.0)
        sums = sums * decay[:, None] + tl.dot(p.to(tile.dtype), values, input_precision="ieee")
        top = higher
    safe = tl.maximum(mass, 1.0)
    place = split * out_split + row * out_row + (first_head + m) * out_head
    lse = tl.where(mass > 0, (top + tl.log2(safe)) / 1.4426950408889634, float("-inf"))
    tl.store(outs + place[:, None] + d[None, :], sums / safe[:, None], mask=q_mask)
    tl.store(lses + place // head_dim, lse, mask=m < group)
