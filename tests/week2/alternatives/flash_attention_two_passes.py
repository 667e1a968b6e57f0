"""Week2/flash_attention another way: the largest score and the sum first, then the values."""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["attention_by_blocks", "flash_attention"]


def attention_by_blocks(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """Merge finished results of blocks, the last block first."""
    if block_size <= 0:
        raise ValueError(f"a block of {block_size} keys")
    out = torch.zeros_like(q, dtype=torch.promote_types(q.dtype, torch.float32))
    lse = out.new_full(out.shape[:2], -torch.inf)
    for start in reversed(range(0, k.shape[1], block_size)):
        end = min(start + block_size, k.shape[1])
        keys, values = (x[:, start:end].to(out.dtype) for x in (k, v))
        scores = torch.einsum("hqd,hkd->hqk", q.to(out.dtype), keys) / q.shape[2] ** 0.5
        scores = scores.where(mask[:, start:end], -torch.inf)
        more = scores.logsumexp(-1)
        both = torch.logaddexp(lse, more)
        safe = both.where(both > -torch.inf, 0.0)
        out = out * (lse - safe).exp().unsqueeze(-1) + (scores - safe.unsqueeze(-1)).exp() @ values
        lse = both
    return out.to(q.dtype), lse


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
) -> tuple[Tensor, Tensor]:
    """One program for some queries of one head; sequences and heads in one axis of the grid."""
    heads, kv_heads, dim = q.shape[0], k.shape[0], q.shape[2]
    if heads % kv_heads != 0:
        raise ValueError(f"{kv_heads} kv heads for {heads} query heads")
    if dim > 128:
        raise ValueError(f"head_dim is {dim}, and 128 is the most")
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.zeros(q.shape[:2], device=q.device)
    num_seqs = cu_seqlens_q.numel() - 1
    rows = 16 if q.dtype == torch.float32 else 64
    grid = (num_seqs * heads, -(-max_seqlen_q // rows))
    _two_passes[grid](
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens_q,
        cu_seqlens_k,
        *q.stride(),
        *k.stride(),
        *v.stride(),
        q.shape[1],
        heads,
        heads // kv_heads,
        dim**-0.5,
        dim=dim,
        width=max(16, triton.next_power_of_2(dim)),
        rows=rows,
        columns=32,
    )
    return out, lse


def flash_prefill(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One sequence."""
    ends = [torch.tensor([0, x.shape[1]], dtype=torch.int32, device=q.device) for x in (q, keys)]
    return flash_attention(q, keys, values, *ends, q.shape[1])[0]


@triton.jit
def _load(base, first, stride, dim_stride, end, size: tl.constexpr, dim, width: tl.constexpr):
    tokens = first + tl.arange(0, size).to(tl.int64)[:, None]
    dims = tl.arange(0, width)[None, :]
    here = (tokens < end) & (dims < dim)
    return tl.load(base + tokens * stride + dims * dim_stride, mask=here, other=0.0)


@triton.jit
def _score(q, keys, scale, start, positions, columns: tl.constexpr):
    scores = tl.dot(q, keys.T, input_precision="ieee") * scale
    behind = positions[:, None] < start + tl.arange(0, columns)[None, :]
    return tl.where(behind, float("-inf"), scores)


@triton.jit
def _two_passes(
    q,
    k,
    v,
    out,
    lse,
    q_ends,
    k_ends,
    q_stride_h,
    q_stride_t,
    q_stride_d,
    k_stride_h,
    k_stride_t,
    k_stride_d,
    v_stride_h,
    v_stride_t,
    v_stride_d,
    total_q,
    heads,
    group,
    scale,
    dim: tl.constexpr,
    width: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Compute the queries of one program."""
    sequence = tl.program_id(0) // heads
    head = (tl.program_id(0) % heads).to(tl.int64)
    q_begin = tl.load(q_ends + sequence).to(tl.int64)
    q_end = tl.load(q_ends + sequence + 1).to(tl.int64)
    k_begin = tl.load(k_ends + sequence).to(tl.int64)
    k_end = tl.load(k_ends + sequence + 1).to(tl.int64)
    first = q_begin + tl.program_id(1) * rows
    if first < q_end:
        tokens = first + tl.arange(0, rows)
        # Counted from the end, queries and keys of a sequence have the same numbers.
        positions = tokens - q_end + k_end
        last = tl.minimum(k_end, first + rows - q_end + k_end)
        keys_of = k + (head // group) * k_stride_h
        values_of = v + (head // group) * v_stride_h
        mine = _load(q + head * q_stride_h, first, q_stride_t, q_stride_d, q_end, rows, dim, width)
        peak = tl.full([rows], float("-inf"), tl.float32)
        total = tl.zeros([rows], tl.float32)
        for start in range(k_begin, last, columns):
            keys = _load(keys_of, start, k_stride_t, k_stride_d, k_end, columns, dim, width)
            scores = _score(mine, keys, scale, start, positions, columns)
            higher = tl.maximum(peak, tl.max(scores, 1))
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(peak - safe) + tl.sum(tl.exp(scores - safe[:, None]), 1)
            peak = higher
        seen = total > 0
        log_total = tl.where(seen, peak + tl.log(tl.where(seen, total, 1.0)), float("-inf"))
        against = tl.where(seen, log_total, 0.0)
        gathered = tl.zeros([rows, width], tl.float32)
        for start in range(k_begin, last, columns):
            keys = _load(keys_of, start, k_stride_t, k_stride_d, k_end, columns, dim, width)
            values = _load(values_of, start, v_stride_t, v_stride_d, k_end, columns, dim, width)
            scores = _score(mine, keys, scale, start, positions, columns)
            weights = tl.exp(scores - against[:, None]).to(values.dtype)
            gathered += tl.dot(weights, values, input_precision="ieee")
        dims = tl.arange(0, width)[None, :]
        places = (head * total_q + tokens)[:, None] * dim + dims
        stored = (tokens < q_end)[:, None] & (dims < dim)
        tl.store(out + places, gathered.to(out.dtype.element_ty), mask=stored)
        tl.store(lse + head * total_q + tokens, log_total, mask=tokens < q_end)
