"""Attention without a table of scores: block by block in PyTorch, then in one Triton kernel."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from week2.kv_cache import prefill_attention

__all__ = ["attention_by_blocks", "flash_attention"]

# Larger heads need smaller blocks than the kernel has.
MAX_HEAD_DIM = 128

# Below every score, and finite: −inf minus −inf would be NaN where a query looks at nothing.
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_LN_2 = tl.constexpr(math.log(2))
# By the bytes of an element: queries and keys of a block, and how its program runs, so that it all
# fits into registers. No tensor core multiplies float32 without rounding it.
_BLOCKS = {
    2: (128, 64, {"num_warps": 8, "num_stages": 3}),
    4: (32, 32, {"num_warps": 16, "num_stages": 2}),
}


def attention_by_blocks(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """Let every query gather the values of the keys that it matches, a block of keys at a time.

    q: (num_heads, num_queries, head_dim), any float dtype.
    k, v: (num_heads, num_keys, head_dim), q's dtype.
    mask: (num_queries, num_keys) bool, True where the query may look.
    block_size: how many keys are looked at together, at least 1; the last block may be smaller.
    Returns (out, lse). out: (num_heads, num_queries, head_dim), q's dtype, what `attention` gives.
    lse: (num_heads, num_queries): the natural logarithm of the sum of exp(score) over the keys that
        the query may look at; a score is q · k * head_dim ** -0.5. float32, or q's dtype where that
        is wider; so is everything on the way to both.
    A query that may look at nothing gets zeros, and −inf as its lse. Scores may lie far outside of
    what exp can hold. The arguments are left as they were. No tensor is made that has more than
    num_heads * max(num_queries, block_size) * max(block_size, head_dim) elements, so that the
    scores of many keys are never held at once.
    Raises ValueError, which gives the value, when block_size is below 1.
    Source: Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    wide = torch.promote_types(q.dtype, torch.float32)
    scaled_q = q.to(wide) * q.shape[-1] ** -0.5
    # Finite, since −inf − (−inf) would be NaN where a query has seen nothing yet.
    peak = scaled_q.new_full(q.shape[:-1], torch.finfo(wide).min)
    total = torch.zeros_like(peak)
    acc = torch.zeros_like(scaled_q)
    for start in range(0, k.shape[-2], block_size):
        here = slice(start, start + block_size)
        scores = scaled_q @ k[:, here].to(wide).transpose(-2, -1)
        scores = scores.masked_fill(~mask[:, here], -math.inf)
        new_peak = torch.maximum(peak, scores.amax(-1))
        weights = torch.exp(scores - new_peak[..., None])
        # What was added up so far belongs to the old peak.
        shrink = torch.exp(peak - new_peak)
        total = total * shrink + weights.sum(-1)
        acc = acc * shrink[..., None] + weights @ v[:, here].to(wide)
        peak = new_peak
    # The largest score alone adds 1, so only the total of a query that looks at nothing is below.
    out = acc / total.clamp(min=1.0)[..., None]
    return out.to(q.dtype), peak + total.log()


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
) -> tuple[Tensor, Tensor]:
    """Let the tokens of several sequences look at their own sequence, in one launch of a kernel.

    q: (num_heads, total_q, head_dim), float32, float16 or bfloat16: the queries of all sequences,
        one sequence behind the other.
    k, v: (num_kv_heads, total_k, head_dim), q's dtype, likewise; query heads share them as in
        `grouped_attention`. q, k and v may have any strides and more than 2**31 elements.
    cu_seqlens_q: (num_seqs + 1,) int32 on q's device: sequence i has the queries from
        cu_seqlens_q[i] up to, not including, cu_seqlens_q[i + 1]. The first entry is 0, the last
        one total_q. cu_seqlens_k: the same for the keys, with total_k.
    max_seqlen_q: no sequence has more queries than this. It is all that the host looks at: the call
        does not wait for what lies on a GPU.
    The queries of a sequence are its last tokens, and its keys are all of them: the last query
    looks at all keys of its sequence, the one before it at all but the last, and so on. A sequence
    may have no queries; where it has fewer keys than queries, the first ones look at nothing.
    Returns (out, lse). out: (num_heads, total_q, head_dim), q's dtype.
    lse: (num_heads, total_q) float32: the natural logarithm of the sum of exp(score) over the keys
        that the query looks at; a score is q · k * head_dim ** -0.5.
    A query that looks at nothing gets zeros, and −inf as its lse. Scores may lie far outside of
    what exp can hold; they, the weights and the sums are float32, and float32 inputs are multiplied
    without rounding. Only a weight may be rounded to q's dtype, before it meets its value.
    Other sequences are not looked at. Nor are keys and values that stand 256 places or more behind
    the last one that a query looks at: they may even be NaN, as far as this query is concerned.
    The arguments are left as they were, and nothing is made beside out and lse that grows with the
    number of tokens.
    Raises ValueError, which names both numbers, when num_heads does not divide by num_kv_heads, and
    when head_dim is above 128.
    Source: Dao 2023, arXiv:2307.08691.
    """
    num_heads, total_q, head_dim = q.shape
    if num_heads % k.shape[0]:
        raise ValueError(f"{num_heads} query heads do not divide among {k.shape[0]} kv heads")
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be at most {MAX_HEAD_DIM}, got {head_dim}")
    out = torch.empty_like(q)
    lse = torch.empty(num_heads, total_q, dtype=torch.float32, device=q.device)
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    block_q, block_k, options = _BLOCKS[q.itemsize]
    grid = triton.cdiv(max_seqlen_q, block_q), num_heads, len(cu_seqlens_q) - 1
    _flash_kernel[grid](
        *(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k),
        *(*q.stride(), *k.stride(), *v.stride(), *out.stride(), lse.stride(0)),
        group_size=num_heads // k.shape[0],
        # exp2 is one instruction and exp is several, so that scores are counted in powers of 2.
        scale=head_dim**-0.5 * math.log2(math.e),
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim,
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        **options,
    )
    return out, lse


def flash_prefill(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Take the place of `prefill_attention` in `cached_attend`: the kernel where there is a GPU.

    Arguments, result and dtypes as in `prefill_attention`, which is what runs on a CPU: there the
    kernel could only be interpreted.
    """
    if not q.is_cuda:
        return prefill_attention(q, keys, values)
    # One sequence: both pairs are made on the GPU, so that no copy from the host is waited for.
    ends = torch.arange(2, dtype=torch.int32, device=q.device)
    num_queries, num_keys = q.shape[1], keys.shape[1]
    return flash_attention(q, keys, values, ends * num_queries, ends * num_keys, num_queries)[0]


@triton.jit
def _flash_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    q_head_stride,
    q_token_stride,
    q_dim_stride,
    k_head_stride,
    k_token_stride,
    k_dim_stride,
    v_head_stride,
    v_token_stride,
    v_dim_stride,
    out_head_stride,
    out_token_stride,
    out_dim_stride,
    lse_head_stride,
    group_size,
    scale,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute one block of queries of one head of one sequence."""
    sequence = tl.program_id(2)
    head = tl.program_id(1).to(tl.int64)
    q_start = tl.load(cu_seqlens_q_ptr + sequence).to(tl.int64)
    k_start = tl.load(cu_seqlens_k_ptr + sequence).to(tl.int64)
    num_queries = (tl.load(cu_seqlens_q_ptr + sequence + 1) - q_start).to(tl.int32)
    num_keys = (tl.load(cu_seqlens_k_ptr + sequence + 1) - k_start).to(tl.int32)
    # The last block has the most keys, so that it begins first and nobody waits for it.
    first_query = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q
    if first_query >= num_queries:
        return

    kv_head = head // group_size
    rows = tl.arange(0, BLOCK_Q)
    columns = tl.arange(0, BLOCK_K)
    dims = tl.arange(0, PADDED_DIM)
    q_first = q_ptr + head * q_head_stride + (q_start + first_query) * q_token_stride
    k_first = k_ptr + kv_head * k_head_stride + k_start * k_token_stride
    v_first = v_ptr + kv_head * v_head_stride + k_start * v_token_stride
    k_places = _places(k_first, columns, k_token_stride, dims, k_dim_stride)
    v_places = _places(v_first, columns, v_token_stride, dims, v_dim_stride)
    is_dim = (dims < HEAD_DIM)[None, :]
    is_query = (first_query + rows < num_queries)[:, None] & is_dim
    q = _load(_places(q_first, rows, q_token_stride, dims, q_dim_stride), is_query)

    # The block's first query is this token of its sequence, and looks at no key behind it.
    first_token = num_keys - num_queries + first_query
    # All of the block look at the keys before `shared`, none of them at those from `end` on.
    shared = tl.maximum(first_token + 1, 0) // BLOCK_K * BLOCK_K
    end = tl.minimum(first_token + BLOCK_Q, num_keys)
    peak = tl.full([BLOCK_Q], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, PADDED_DIM], tl.float32)
    for start in range(0, shared, BLOCK_K):
        offset = tl.cast(start, tl.int64)
        k = _load(k_places + offset * k_token_stride, is_dim)
        v = _load(v_places + offset * v_token_stride, is_dim)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        peak, total, acc = _add_block(scores, v, peak, total, acc)
    for start in range(shared, end, BLOCK_K):
        offset = tl.cast(start, tl.int64)
        is_key = (start + columns < num_keys)[:, None] & is_dim
        k = _load(k_places + offset * k_token_stride, is_key)
        v = _load(v_places + offset * v_token_stride, is_key)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        visible = (start + columns)[None, :] <= (first_token + rows)[:, None]
        scores = tl.where(visible, scores, float("-inf"))
        peak, total, acc = _add_block(scores, v, peak, total, acc)

    # A total of 0: a query that looks at nothing, whose lse is log(0).
    out = tl.where((total > 0)[:, None], acc / total[:, None], 0.0)
    lse = (peak + tl.log2(total)) * _LN_2
    out_first = out_ptr + head * out_head_stride + (q_start + first_query) * out_token_stride
    # out has no gaps, whatever q has: 32 bits reach across a block, and leave registers free.
    out_places = out_first + (rows[:, None] * out_token_stride + dims[None, :] * out_dim_stride)
    tl.store(out_places, out.to(out_ptr.dtype.element_ty), mask=is_query)
    lse_places = lse_ptr + head * lse_head_stride + (q_start + first_query + rows)
    tl.store(lse_places, lse, mask=first_query + rows < num_queries)


@triton.jit
def _places(first_ptr, rows, row_stride, dims, dim_stride):
    """Point at the elements of a block, counting in 64 bits: 32 end at 2 billion elements."""
    rows, dims = rows.to(tl.int64)[:, None], dims.to(tl.int64)[None, :]
    return first_ptr + (rows * row_stride + dims * dim_stride)


@triton.jit
def _load(places, is_inside):
    """Load a block; what lies outside is 0 and adds nothing to a product."""
    return tl.load(places, mask=is_inside, other=0.0)


@triton.jit
def _add_block(scores, v, peak, total, acc):
    """Add a block of keys to what was gathered; peak and scores count in powers of 2."""
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    weights = tl.exp2(scores - new_peak[:, None])
    # What was added up so far belongs to the old peak.
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return new_peak, total, acc
