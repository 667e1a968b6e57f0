"""Week3/paged_kernels another way: heads packed into tiles, splits in rounds, PyTorch merges."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from week2.flash_decoding import merge_splits, plan_splits

__all__ = ["store_kv", "paged_prefill", "paged_decode"]

MAX_HEAD_DIM = 128
_TOKENS_OF_A_TILE = 16


def store_kv(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Give every token and head a program."""
    k, v = k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()
    num_tokens, num_heads, head_dim = k.shape
    _store_row[num_heads, num_tokens](
        *(k, v, keys, values, slots, *keys.stride(), *values.stride()),
        *(num_heads, keys.shape[2], head_dim, triton.next_power_of_2(head_dim)),
    )


def paged_prefill(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    max_seqlen_q: int,
) -> Tensor:
    """Launch a program for some tokens of all query heads that share a key/value head."""
    group = _group_size(q.shape[0], keys.shape[1], q.shape[2])
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    num_tiles = triton.cdiv(max_seqlen_q, _TOKENS_OF_A_TILE)
    _look_back[len(seq_lens), keys.shape[1], num_tiles](
        *(q, keys, values, out, block_tables, cu_seqlens_q, seq_lens),
        *(*q.stride(), *keys.stride(), *values.stride(), *out.stride(), *block_tables.stride()),
        *(q.shape[2], group, keys.shape[2], q.shape[2] ** -0.5),
        BLOCK_T=_TOKENS_OF_A_TILE,
        BLOCK_G=triton.next_power_of_2(group),
        BLOCK_N=32,
        BLOCK_D=max(16, triton.next_power_of_2(q.shape[2])),
    )
    return out


def paged_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    num_splits: int | None = None,
) -> Tensor:
    """Launch one kernel over all splits; what it writes is merged by `merge_splits`."""
    num_seqs, num_heads, head_dim = q.shape
    group = _group_size(num_heads, keys.shape[1], head_dim)
    if num_splits is None:
        gpu = torch.cuda.get_device_properties(q.device) if q.is_cuda else None
        processors = gpu.multi_processor_count if gpu else 1
        room = block_tables.shape[1] * keys.shape[2]
        num_splits = plan_splits(num_seqs * keys.shape[1], room, processors)
    if num_splits <= 0:
        raise ValueError(f"{num_splits} splits")
    outs = torch.zeros(num_splits, num_seqs, num_heads, head_dim, device=q.device)
    lses = torch.full((num_splits, num_seqs, num_heads), float("-inf"), device=q.device)
    _deal[num_splits, keys.shape[1], num_seqs](
        *(q, keys, values, outs, lses, block_tables, seq_lens),
        *(*q.stride(), *keys.stride(), *values.stride(), *outs.stride()[:3]),
        *(*block_tables.stride(), head_dim, group, keys.shape[2], head_dim**-0.5),
        BLOCK_G=max(16, triton.next_power_of_2(group)),
        BLOCK_N=32,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
    )
    return merge_splits(outs, lses)[0].to(q.dtype)


def _group_size(num_heads: int, num_kv_heads: int, head_dim: int) -> int:
    group, rest = divmod(num_heads, num_kv_heads)
    if rest:
        raise ValueError(f"num_heads {num_heads}, num_kv_heads {num_kv_heads}")
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim {head_dim}, and the largest is {MAX_HEAD_DIM}")
    return group


@triton.jit
def _store_row(
    k,
    v,
    keys,
    values,
    slots,
    k_block,
    k_head,
    k_slot,
    k_dim,
    v_block,
    v_head,
    v_slot,
    v_dim,
    num_heads,
    block_size,
    head_dim,
    BLOCK_D: tl.constexpr,
):
    head, token = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token)
    d = tl.arange(0, BLOCK_D)
    # Nothing of padding is stored, whatever its place would be.
    mask = (d < head_dim) & (slot >= 0)
    at = (token * num_heads + head) * head_dim + d
    block, place = slot // block_size, slot % block_size
    k_at = block * k_block + head * k_head + place * k_slot + d * k_dim
    v_at = block * v_block + head * v_head + place * v_slot + d * v_dim
    tl.store(keys + k_at, tl.load(k + at, mask=mask), mask=mask)
    tl.store(values + v_at, tl.load(v + at, mask=mask), mask=mask)


@triton.jit
def _look_back(
    q,
    keys,
    values,
    out,
    tables,
    cu_seqlens_q,
    seq_lens,
    q_head,
    q_token,
    q_dim,
    k_block,
    k_head,
    k_slot,
    k_dim,
    v_block,
    v_head,
    v_slot,
    v_dim,
    out_head,
    out_token,
    out_dim,
    table_row,
    table_column,
    head_dim,
    group,
    block_size,
    scale,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sequence, kv_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, end = tl.load(cu_seqlens_q + sequence), tl.load(cu_seqlens_q + sequence + 1)
    length = tl.load(seq_lens + sequence)
    rows, d = tl.arange(0, BLOCK_T * BLOCK_G), tl.arange(0, BLOCK_D)
    token = start + tl.program_id(2) * BLOCK_T + rows // BLOCK_G
    head = kv_head * group + rows % BLOCK_G
    is_row = (token < end) & (rows % BLOCK_G < group)
    mask = is_row[:, None] & (d < head_dim)[None, :]
    q_at = head[:, None] * q_head + token[:, None] * q_token + d[None, :] * q_dim
    tile = tl.load(q + q_at, mask=mask, other=0.0)
    # Where each token stands in its sequence; rows without one look at its first token.
    position = tl.where(is_row, length - end + token, 0)
    tables += sequence * table_row
    keys += kv_head * k_head + d[None, :] * k_dim
    values += kv_head * v_head + d[None, :] * v_dim

    top = tl.full((BLOCK_T * BLOCK_G,), -3.0e38, tl.float32)
    mass = tl.zeros((BLOCK_T * BLOCK_G,), tl.float32)
    sums = tl.zeros((BLOCK_T * BLOCK_G, BLOCK_D), tl.float32)
    stop = tl.where(start + tl.program_id(2) * BLOCK_T < end, tl.max(position, 0) + 1, 0)
    for first in range(0, stop, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        block = tl.load(tables + n // block_size * table_column, mask=n < stop, other=0)[:, None]
        slot = (n % block_size)[:, None]
        inside = (n < stop)[:, None] & (d < head_dim)[None, :]
        k = tl.load(keys + block * k_block + slot * k_slot, mask=inside, other=0.0)
        s = tl.dot(tile, tl.trans(k), input_precision="ieee") * scale
        s = tl.where(n[None, :] <= position[:, None], s, -3.0e38)
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.where(n[None, :] <= position[:, None], tl.exp(s - higher[:, None]), 0.0)
        decay = tl.exp(top - higher)
        mass = mass * decay + tl.sum(p, 1)
        v = tl.load(values + block * v_block + slot * v_slot, mask=inside, other=0.0)
        sums = sums * decay[:, None] + tl.dot(p.to(tile.dtype), v, input_precision="ieee")
        top = higher
    out_at = head[:, None] * out_head + token[:, None] * out_token + d[None, :] * out_dim
    tl.store(out + out_at, (sums / mass[:, None]).to(tile.dtype), mask=mask)


@triton.jit
def _deal(
    q,
    keys,
    values,
    outs,
    lses,
    tables,
    seq_lens,
    q_seq,
    q_head,
    q_dim,
    k_block,
    k_head,
    k_slot,
    k_dim,
    v_block,
    v_head,
    v_slot,
    v_dim,
    out_split,
    out_seq,
    out_head,
    table_row,
    table_column,
    head_dim,
    group,
    block_size,
    scale,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    split, kv_head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    length = tl.load(seq_lens + sequence)
    if split * BLOCK_N >= length:
        return
    g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    mask = (g < group)[:, None] & (d < head_dim)[None, :]
    head = kv_head * group + g
    q_at = sequence * q_seq + head[:, None] * q_head + d[None, :] * q_dim
    tile = tl.load(q + q_at, mask=mask, other=0.0)
    tables += sequence * table_row
    keys += kv_head * k_head + d[None, :] * k_dim
    values += kv_head * v_head + d[None, :] * v_dim
    top = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_G,), tl.float32)
    sums = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for first in range(split * BLOCK_N, length, tl.num_programs(0) * BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        block = tl.load(tables + n // block_size * table_column, mask=n < length, other=0)[:, None]
        slot = (n % block_size)[:, None]
        inside = (n < length)[:, None] & (d < head_dim)[None, :]
        k = tl.load(keys + block * k_block + slot * k_slot, mask=inside, other=0.0)
        v = tl.load(values + block * v_block + slot * v_slot, mask=inside, other=0.0)
        s = tl.dot(tile, tl.trans(k), input_precision="ieee") * scale
        s = tl.where((n < length)[None, :], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.exp(s - higher[:, None])
        decay = tl.exp(top - higher)
        mass = mass * decay + tl.sum(p, 1)
        sums = sums * decay[:, None] + tl.dot(p.to(tile.dtype), v, input_precision="ieee")
        top = higher
    place = split * out_split + sequence * out_seq + head * out_head
    tl.store(outs + place[:, None] + d[None, :], sums / mass[:, None], mask=mask)
    tl.store(lses + place // head_dim, top + tl.log(mass), mask=g < group)
