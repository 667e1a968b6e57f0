"""Week3/paged_attention another way: each sequence laid out, then torch's attention."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from week1.gqa import Attend
from week1.qwen import Qwen

__all__ = ["PagedKVCache", "store_kv", "paged_prefill", "paged_decode", "paged_attend"]

StoreKV = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
PagedPrefill = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor]
PagedDecode = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class PagedBatch:
    """Where the tokens of one pass lie."""

    slots: Tensor
    block_tables: Tensor
    cu_seqlens_q: Tensor
    seq_lens: Tensor
    num_decodes: int
    max_seqlen_q: int


class PagedKVCache:
    """A pool: one list of layers, seen as two tensors."""

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        sizes = num_layers, num_blocks, num_kv_heads, block_size, head_dim
        self.keys = torch.full(sizes, 0, dtype=dtype, device=device)
        self.values = self.keys.clone()
        self.nbytes = 2 * self.keys.numel() * self.keys.element_size()


def paged_cache_for(model: Qwen, num_blocks: int, block_size: int) -> PagedKVCache:
    """Make an empty pool that fits a model."""
    config, weight = model.config, model.embed_tokens.weight
    sizes = num_blocks, block_size, config.num_key_value_heads, config.head_dim
    return PagedKVCache(config.num_hidden_layers, *sizes, weight.dtype, weight.device)


def store_kv(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Store head by head."""
    size = keys.shape[2]
    tokens = (slots != -1).nonzero().flatten()
    where = slots[tokens]
    for part, new in ((keys, k), (values, v)):
        for head in range(part.shape[1]):
            part[:, head].index_put_((where // size, where % size), new[head, tokens])


def paged_prefill(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    max_seqlen_q: int,
) -> Tensor:
    """Lay out one sequence after the other."""
    out = torch.zeros_like(q)
    for i in range(len(seq_lens)):
        first, last = int(cu_seqlens_q[i]), int(cu_seqlens_q[i + 1])
        if first < last:
            table, length = block_tables[i], int(seq_lens[i])
            out[:, first:last] = _attend(q[:, first:last], keys, values, table, length)
    return out


def paged_decode(
    q: Tensor, keys: Tensor, values: Tensor, block_tables: Tensor, seq_lens: Tensor
) -> Tensor:
    """Lay out one sequence after the other."""
    rows = [
        _attend(q[i, :, None], keys, values, block_tables[i], int(seq_lens[i]))[:, 0]
        for i in range(len(seq_lens))
    ]
    return torch.stack(rows)


def paged_attend(
    cache: PagedKVCache,
    batch: PagedBatch,
    store: StoreKV = store_kv,
    prefill: PagedPrefill = paged_prefill,
    decode: PagedDecode = paged_decode,
) -> Attend:
    """Store, and put the parts together from the back."""
    n, total = batch.num_decodes, len(batch.seq_lens)

    def attend(layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pool = cache.keys[layer_index], cache.values[layer_index]
        store(k, v, *pool, batch.slots)
        out = q.new_empty(q.shape)
        if n < total:
            tables, lens = batch.block_tables[n:], batch.seq_lens[n:]
            starts = batch.cu_seqlens_q[n:] - batch.cu_seqlens_q[n]
            out[:, n:] = prefill(q[:, n:], *pool, tables, starts, lens, batch.max_seqlen_q)
        if n:
            tables, lens = batch.block_tables[:n], batch.seq_lens[:n]
            out[:, :n] = decode(q[:, :n].transpose(0, 1), *pool, tables, lens).transpose(0, 1)
        return out

    return attend


def _attend(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, length: int) -> Tensor:
    """Let the last tokens of one sequence look at it."""
    wide = torch.promote_types(q.dtype, torch.float32)
    position = torch.arange(length, device=q.device)
    block, place = table[position // keys.shape[2]], position % keys.shape[2]
    k, v = (part[block, :, place].movedim(0, 1).to(wide) for part in (keys, values))
    mine = position[-q.shape[1] :, None]
    mask = position <= mine
    group = q.shape[0] // k.shape[0]
    k, v = (part.repeat_interleave(group, 0) for part in (k, v))
    return scaled_dot_product_attention(q.to(wide), k, v, attn_mask=mask).to(q.dtype)
