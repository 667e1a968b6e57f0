"""The three kernels of a paged pool: store by slot, prefill of several sequences, split decode."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from week2.flash_decoding import plan_splits

__all__ = ["store_kv", "paged_prefill", "paged_decode"]

# Larger heads need smaller blocks than the kernels have.
MAX_HEAD_DIM = 128

_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_LOG2_E = math.log2(math.e)
# By bytes of an element; chosen by what `course kernels` says, so that no register is spilled.
_PREFILL_BLOCKS = {
    2: {"BLOCK_Q": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2},
    4: {"BLOCK_Q": 32, "BLOCK_K": 32, "num_warps": 16, "num_stages": 1},
}
_DECODE_BLOCKS = {
    2: {"BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    4: {"BLOCK_K": 32, "num_warps": 8, "num_stages": 2},
}
# tl.dot multiplies tiles of at least this many rows and columns.
_SMALLEST_TILE = 16
_MERGED_AT_ONCE = 16


def store_kv(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Store the keys and values of some tokens in a layer's part of the pool, in one launch.

    k, v: (num_kv_heads, tokens, head_dim), the pool's dtype, any strides; left as they were. At
        least one token.
    keys, values: (num_blocks, num_kv_heads, block_size, head_dim), float32, float16 or bfloat16,
        any strides, which need not be the same for both. Slot s is place s % block_size of block
        s // block_size; a block may have any number of slots. They may span more than 2**31
        elements, of which one head of one block spans fewer.
    slots: (tokens,) int64: where each token goes, no slot twice; a token with slot -1 is padding,
        which is stored nowhere and may hold anything. Other slots stay as they are.
    One launch of a kernel stores both, and the host does not wait for the device.
    """
    num_kv_heads, num_tokens, head_dim = k.shape
    _store_kernel[num_tokens,](
        *(k, v, keys, values, slots),
        *(k.stride(), v.stride(), keys.stride(), values.stride()),
        NUM_KV_HEADS=num_kv_heads,
        BLOCK_SIZE=keys.shape[2],
        HEAD_DIM=head_dim,
        PADDED_HEADS=triton.next_power_of_2(num_kv_heads),
        PADDED_DIM=triton.next_power_of_2(head_dim),
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
    """Let the last tokens of several sequences look at their own sequence, in one launch.

    q: (num_heads, tokens, head_dim), any strides: the queries of all sequences, one sequence behind
        the other; float32, float16 or bfloat16.
    keys, values: as in `store_kv`, q's dtype: the keys and values of these tokens are stored
        already. Query heads share them as in `grouped_attention`.
    block_tables: (num_seqs, max_blocks) int64, any strides: the blocks of each sequence in the
        order of its tokens, anywhere in the pool. Entries behind those mean nothing.
    cu_seqlens_q: (num_seqs + 1,) int64: sequence i has the tokens of this pass from cu_seqlens_q[i]
        up to, not including, cu_seqlens_q[i + 1]. It may have any number of them; where it has
        none, nothing of it is read in the pool.
    seq_lens: (num_seqs,) int64, at least 1: how many tokens each sequence has, those of this pass
        included, which are its last ones.
    max_seqlen_q: no sequence has more tokens in this pass. It and the shapes are all that the host
        looks at: the call does not wait for the device.
    Returns (num_heads, tokens, head_dim), q's dtype: what `attention` of week 1 gives when each
    token looks at those of its own sequence up to itself. Scores may lie far outside of what exp
    can hold; they, the weights and the sums are float32, and float32 inputs are multiplied without
    rounding. Only a weight may be rounded to q's dtype, before it meets its value.
    What lies in other slots is not looked at: it may be anything, NaN too. Nor are the tokens that
    stand 256 places or more behind a query: they may be NaN, as far as this query is concerned.
    Keys and values are read where they lie: nothing is made beside the result that grows with the
    tokens or with the pool. The arguments are left as they were.
    Raises ValueError, which names both numbers, when num_heads does not divide by num_kv_heads, and
    when head_dim is above 128.
    Source: Kwon et al. 2023, arXiv:2309.06180, section 4.3; Dao 2023, arXiv:2307.08691.
    """
    num_heads, _, head_dim = q.shape
    _check_heads(num_heads, keys.shape[1], head_dim)
    out = torch.empty_like(q)
    options = _PREFILL_BLOCKS[q.itemsize]
    grid = triton.cdiv(max_seqlen_q, options["BLOCK_Q"]), num_heads, len(seq_lens)
    _prefill_kernel[grid](
        *(q, keys, values, out, block_tables, cu_seqlens_q, seq_lens),
        *(q.stride(), keys.stride(), values.stride(), out.stride(), block_tables.stride()),
        group_size=num_heads // keys.shape[1],
        # exp2 is one instruction and exp is several, so that scores are counted in powers of 2.
        scale=head_dim**-0.5 * _LOG2_E,
        BLOCK_SIZE=keys.shape[2],
        HEAD_DIM=head_dim,
        PADDED_DIM=max(_SMALLEST_TILE, triton.next_power_of_2(head_dim)),
        **options,
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
    """Let the last token of each sequence gather the values of its sequence, cut into splits.

    q: (num_seqs, num_heads, head_dim), any strides; at least one sequence.
    keys, values, block_tables: as in `paged_prefill`.
    seq_lens: (num_seqs,) int64: how many tokens each sequence has, at most as many as the columns
        of block_tables have room for. A sequence with 0 tokens is padding: it gets zeros, and
        neither its q nor its table means anything.
    num_splits: into how many splits the tokens of every sequence are cut: those that it has, not
        those that its table has room for, even where it has fewer than that. None lets
        `plan_splits` choose for one program a sequence and key/value head, and for what a table has
        room for; a CPU counts as one processor.
    Returns (num_seqs, num_heads, head_dim), q's dtype, computed as in `paged_prefill`; what stays
    between two kernels is float32. Other slots and the arguments are treated as there.
    One kernel is launched, or two: what the first one gives for each split may be merged by another
    one or by `merge_splits`. Each sequence, key/value head and split has a program of its own. The
    kernels read each key and value of a sequence's tokens once, where it lies, however many query
    heads and splits there are. The host does not wait for the device: what is launched follows from
    shapes and num_splits alone.
    Raises ValueError, which names both numbers, when num_heads does not divide by num_kv_heads, and
    when head_dim is above 128; and one that gives the value when num_splits is below 1.
    Source: Kwon et al. 2023, arXiv:2309.06180, section 4.3; Dao et al. 2023, "Flash-Decoding".
    """
    num_seqs, num_heads, head_dim = q.shape
    num_kv_heads = keys.shape[1]
    _check_heads(num_heads, num_kv_heads, head_dim)
    if num_splits is None:
        capacity = block_tables.shape[1] * keys.shape[2]
        num_splits = plan_splits(num_seqs * num_kv_heads, capacity, _num_processors(q.device))
    if num_splits < 1:
        raise ValueError(f"num_splits must be at least 1, got {num_splits}")
    # What is merged stays in float32; with a single split there is nothing to merge.
    dtype = torch.float32 if num_splits > 1 else q.dtype
    outs = q.new_empty(num_splits, num_seqs, num_heads, head_dim, dtype=dtype)
    lses = q.new_empty(num_splits, num_seqs, num_heads, dtype=torch.float32)
    group = num_heads // num_kv_heads
    _decode_kernel[num_seqs, num_kv_heads, num_splits](
        *(q, keys, values, block_tables, seq_lens, outs, lses),
        *(q.stride(), keys.stride(), values.stride(), block_tables.stride()),
        scale=head_dim**-0.5 * _LOG2_E,
        GROUP=group,
        BLOCK_SIZE=keys.shape[2],
        HEAD_DIM=head_dim,
        PADDED_GROUP=max(_SMALLEST_TILE, triton.next_power_of_2(group)),
        PADDED_DIM=max(_SMALLEST_TILE, triton.next_power_of_2(head_dim)),
        **_DECODE_BLOCKS[q.itemsize],
    )
    return outs[0] if num_splits == 1 else _merge(outs, lses, q.dtype)


def _check_heads(num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide among {num_kv_heads} kv heads")
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be at most {MAX_HEAD_DIM}, got {head_dim}")


def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the interpreter runs one program after the other
    return torch.cuda.get_device_properties(device).multi_processor_count


def _merge(outs: Tensor, lses: Tensor, dtype: torch.dtype) -> Tensor:
    num_splits, num_seqs, num_heads, head_dim = outs.shape
    merged = outs.new_empty(num_seqs, num_heads, head_dim, dtype=dtype)
    _merge_kernel[num_seqs * num_heads,](
        *(outs, lses, merged, num_splits, num_seqs * num_heads),
        HEAD_DIM=head_dim,
        PADDED_DIM=triton.next_power_of_2(head_dim),
        BLOCK_SPLITS=_MERGED_AT_ONCE,
    )
    return merged


@triton.jit
def _store_kernel(
    k,
    v,
    keys,
    values,
    slots,
    k_strides,
    v_strides,
    key_strides,
    value_strides,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):
    """Store one token."""
    token = tl.program_id(0)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    # The heads of a pool may lie further apart than 32 bits can count.
    heads = tl.arange(0, PADDED_HEADS)[:, None].to(tl.int64)
    dims = tl.arange(0, PADDED_DIM)[None, :]
    is_inside = (heads < NUM_KV_HEADS) & (dims < HEAD_DIM)
    block, place = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    k += heads * k_strides[0] + token * k_strides[1] + dims * k_strides[2]
    v += heads * v_strides[0] + token * v_strides[1] + dims * v_strides[2]
    keys += block * key_strides[0] + heads * key_strides[1]
    keys += place * key_strides[2] + dims * key_strides[3]
    values += block * value_strides[0] + heads * value_strides[1]
    values += place * value_strides[2] + dims * value_strides[3]
    tl.store(keys, tl.load(k, mask=is_inside), mask=is_inside)
    tl.store(values, tl.load(v, mask=is_inside), mask=is_inside)


@triton.jit
def _prefill_kernel(
    q,
    keys,
    values,
    out,
    block_tables,
    cu_seqlens_q,
    seq_lens,
    q_strides,
    key_strides,
    value_strides,
    out_strides,
    table_strides,
    group_size,
    scale,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute one block of queries of one head of one sequence."""
    sequence, head = tl.program_id(2), tl.program_id(1)
    # The heads of a pool may lie further apart than 32 bits can count.
    kv_head = (head // group_size).to(tl.int64)
    # No single sequence has more tokens than 32 bits can count, and they leave registers free.
    q_start = tl.load(cu_seqlens_q + sequence)
    num_queries = (tl.load(cu_seqlens_q + sequence + 1) - q_start).to(tl.int32)
    num_keys = tl.load(seq_lens + sequence).to(tl.int32)
    # The last block has the most keys, so that it begins first and nobody waits for it.
    first_query = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q
    if first_query >= num_queries:
        return

    rows, columns = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    dims = tl.arange(0, PADDED_DIM)
    is_dim = (dims < HEAD_DIM)[None, :]
    is_query = (first_query + rows < num_queries)[:, None] & is_dim
    tokens = q_start + first_query + rows
    q += head * q_strides[0] + tokens[:, None] * q_strides[1] + dims[None, :] * q_strides[2]
    queries = tl.load(q, mask=is_query, other=0.0)
    keys += kv_head * key_strides[1] + dims[None, :] * key_strides[3]
    values += kv_head * value_strides[1] + dims[None, :] * value_strides[3]
    block_tables += sequence * table_strides[0]

    # The block's first query is this token of its sequence, and looks at no key behind it.
    first_token = num_keys - num_queries + first_query
    end = tl.minimum(first_token + BLOCK_Q, num_keys)
    peak = tl.full([BLOCK_Q], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    gathered = tl.zeros([BLOCK_Q, PADDED_DIM], tl.float32)
    for start in range(0, end, BLOCK_K):
        positions = start + columns
        is_key = positions < num_keys
        k, v = _load_tokens(
            *(keys, values, block_tables, positions, is_key, is_dim),
            *(key_strides, value_strides, table_strides, BLOCK_SIZE),
        )
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
        visible = is_key[None, :] & (positions[None, :] <= (first_token + rows)[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        peak, total, gathered = _add_block(scores, v, peak, total, gathered)

    out += head * out_strides[0] + tokens[:, None] * out_strides[1] + dims[None, :] * out_strides[2]
    tl.store(out, (gathered / total[:, None]).to(out.dtype.element_ty), mask=is_query)


@triton.jit
def _decode_kernel(
    q,
    keys,
    values,
    block_tables,
    seq_lens,
    outs,
    lses,
    q_strides,
    key_strides,
    value_strides,
    table_strides,
    scale,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Let the query heads of one key/value head look at one split of their sequence."""
    # The heads of a pool may lie further apart than 32 bits can count.
    sequence, kv_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    split, num_splits = tl.program_id(2), tl.num_programs(2)
    members, columns = tl.arange(0, PADDED_GROUP), tl.arange(0, BLOCK_K)
    dims = tl.arange(0, PADDED_DIM)
    heads = kv_head * GROUP + members
    is_dim = (dims < HEAD_DIM)[None, :]
    is_mine = (members < GROUP)[:, None] & is_dim
    q += sequence * q_strides[0] + heads[:, None] * q_strides[1] + dims[None, :] * q_strides[2]
    queries = tl.load(q, mask=is_mine, other=0.0)
    keys += kv_head * key_strides[1] + dims[None, :] * key_strides[3]
    values += kv_head * value_strides[1] + dims[None, :] * value_strides[3]
    block_tables += sequence * table_strides[0]

    num_tokens = tl.load(seq_lens + sequence).to(tl.int32)
    # Whole blocks, so that only the last one of the sequence is ragged.
    split_size = tl.cdiv(tl.cdiv(num_tokens, BLOCK_K), num_splits) * BLOCK_K
    first = split * split_size
    end = tl.minimum(first + split_size, num_tokens)
    peak = tl.full([PADDED_GROUP], _LOWEST, tl.float32)
    total = tl.zeros([PADDED_GROUP], tl.float32)
    gathered = tl.zeros([PADDED_GROUP, PADDED_DIM], tl.float32)
    for start in range(first, end, BLOCK_K):
        positions = start + columns
        is_key = positions < end
        k, v = _load_tokens(
            *(keys, values, block_tables, positions, is_key, is_dim),
            *(key_strides, value_strides, table_strides, BLOCK_SIZE),
        )
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        peak, total, gathered = _add_block(scores, v, peak, total, gathered)

    # Every query of a split without tokens: zeros, and −inf, with which nothing of it is merged.
    out = tl.where((total > 0)[:, None], gathered / total[:, None], 0.0)
    places = (split * tl.num_programs(0) + sequence) * tl.num_programs(1) * GROUP + heads
    tl.store(lses + places, peak + tl.log2(total), mask=members < GROUP)
    outs += places[:, None] * HEAD_DIM + dims[None, :]
    tl.store(outs, out.to(outs.dtype.element_ty), mask=is_mine)


@triton.jit
def _load_tokens(
    keys,
    values,
    block_tables,
    positions,
    is_key,
    is_dim,
    key_strides,
    value_strides,
    table_strides,
    BLOCK_SIZE: tl.constexpr,
):
    """Load keys and values of one head by their positions; what is not there is 0."""
    blocks = tl.load(
        block_tables + positions // BLOCK_SIZE * table_strides[1], mask=is_key, other=0
    )
    # The ids have 64 bits, and need them: a pool may hold more than 2**31 numbers.
    blocks, places = blocks[:, None], (positions % BLOCK_SIZE)[:, None]
    is_inside = is_key[:, None] & is_dim
    k = tl.load(keys + blocks * key_strides[0] + places * key_strides[2], mask=is_inside, other=0.0)
    v = tl.load(
        values + blocks * value_strides[0] + places * value_strides[2], mask=is_inside, other=0.0
    )
    return k, v


@triton.jit
def _add_block(scores, v, peak, total, gathered):
    """Add a block of keys to what was gathered; peak and scores count in powers of 2."""
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    weights = tl.exp2(scores - new_peak[:, None])
    # What was added up so far belongs to the old peak.
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(weights, 1)
    gathered = gathered * shrink[:, None]
    gathered = tl.dot(weights.to(v.dtype), v, gathered, input_precision="ieee")
    return new_peak, total, gathered


@triton.jit
def _merge_kernel(
    outs,
    lses,
    merged,
    num_splits,
    num_queries,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Merge what one query gathered from every split; lses count in powers of 2."""
    query = tl.program_id(0)
    dims = tl.arange(0, PADDED_DIM)
    # Finite, since −inf − (−inf) would be NaN where no split has tokens.
    peak, total = tl.full([], _LOWEST, tl.float32), 0.0
    gathered = tl.zeros((PADDED_DIM,), tl.float32)
    for start in range(0, num_splits, BLOCK_SPLITS):
        splits = start + tl.arange(0, BLOCK_SPLITS)
        places = splits * num_queries + query
        lse = tl.load(lses + places, mask=splits < num_splits, other=float("-inf"))
        is_there = (splits < num_splits)[:, None] & (dims < HEAD_DIM)[None, :]
        out = tl.load(outs + places[:, None] * HEAD_DIM + dims[None, :], mask=is_there, other=0.0)
        new_peak = tl.maximum(peak, tl.max(lse, axis=0))
        weights = tl.exp2(lse - new_peak)
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, axis=0)
        gathered = gathered * shrink + tl.sum(weights[:, None] * out, axis=0)
        peak = new_peak
    out = tl.where(total > 0, gathered / total, 0.0)
    tl.store(
        merged + query * HEAD_DIM + dims, out.to(merged.dtype.element_ty), mask=dims < HEAD_DIM
    )
