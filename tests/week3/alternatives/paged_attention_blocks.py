"""Week3/paged_attention another way: block by block with a running softmax, one memory for both."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

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
    """A pool: both tensors are halves of one."""

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
        self._memory = torch.zeros(
            (2, num_layers, num_blocks, num_kv_heads, block_size, head_dim),
            dtype=dtype,
            device=device,
        )

    @property
    def keys(self) -> Tensor:
        """All keys."""
        return self._memory[0]

    @property
    def values(self) -> Tensor:
        """All values."""
        return self._memory[1]

    @property
    def nbytes(self) -> int:
        """Bytes of both halves."""
        return self._memory.numel() * self._memory.element_size()


def paged_cache_for(model: Qwen, num_blocks: int, block_size: int) -> PagedKVCache:
    """Make an empty pool that fits a model."""
    config, weight = model.config, model.embed_tokens.weight
    return PagedKVCache(
        config.num_hidden_layers,
        num_blocks,
        block_size,
        config.num_key_value_heads,
        config.head_dim,
        dtype=weight.dtype,
        device=weight.device,
    )


def store_kv(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Store token by token."""
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        block, place = divmod(slot, keys.shape[2])
        keys[block, :, place] = k[:, token]
        values[block, :, place] = v[:, token]


def paged_prefill(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    max_seqlen_q: int,
) -> Tensor:
    """Take each sequence's tokens through its blocks."""
    parts = []
    for i, length in enumerate(seq_lens.tolist()):
        mine = q[:, int(cu_seqlens_q[i]) : int(cu_seqlens_q[i + 1])]
        last = length - mine.shape[1] + torch.arange(mine.shape[1], device=q.device)
        parts.append(_through_blocks(mine, last, keys, values, block_tables[i], length))
    return torch.cat(parts, dim=1)


def paged_decode(
    q: Tensor, keys: Tensor, values: Tensor, block_tables: Tensor, seq_lens: Tensor
) -> Tensor:
    """Take each sequence's one token through its blocks."""
    rows = []
    for i, length in enumerate(seq_lens.tolist()):
        last = seq_lens[i : i + 1] - 1
        out = _through_blocks(q[i].unsqueeze(1), last, keys, values, block_tables[i], length)
        rows.append(out.squeeze(1))
    return torch.stack(rows)


def paged_attend(
    cache: PagedKVCache,
    batch: PagedBatch,
    store: StoreKV = store_kv,
    prefill: PagedPrefill = paged_prefill,
    decode: PagedDecode = paged_decode,
) -> Attend:
    """Store, then fill the two parts of one result."""
    n = batch.num_decodes
    starts = batch.cu_seqlens_q[n:].sub(n)

    def attend(layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = cache.keys[layer_index], cache.values[layer_index]
        store(k, v, keys, values, batch.slots)
        out = torch.empty_like(q)
        if n > 0:
            rows = decode(
                q=q[:, :n].movedim(0, 1),
                keys=keys,
                values=values,
                block_tables=batch.block_tables[:n],
                seq_lens=batch.seq_lens[:n],
            )
            out[:, :n] = rows.movedim(1, 0)
        if batch.seq_lens.shape[0] > n:
            out[:, n:] = prefill(
                q=q[:, n:],
                keys=keys,
                values=values,
                block_tables=batch.block_tables[n:],
                cu_seqlens_q=starts,
                seq_lens=batch.seq_lens[n:],
                max_seqlen_q=batch.max_seqlen_q,
            )
        return out

    return attend


def _blocks(keys: Tensor, table: Tensor, length: int) -> Iterator[tuple[int, int, int]]:
    """Yield (block, its first position, how many of its slots count)."""
    size = keys.shape[2]
    for first in range(0, length, size):
        yield int(table[first // size]), first, min(size, length - first)


def _through_blocks(
    q: Tensor, last: Tensor, keys: Tensor, values: Tensor, table: Tensor, length: int
) -> Tensor:
    """Let queries gather from one sequence. last: the last position that each may look at."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    heads, tokens, head_dim = q.shape
    # (kv heads, group, tokens, head_dim)
    queries = q.to(wide).unflatten(0, (keys.shape[1], -1)) / head_dim**0.5
    peak = queries.new_full(queries.shape[:-1], torch.finfo(wide).min)
    total = torch.zeros_like(peak)
    gathered = torch.zeros_like(queries)
    for block, first, count in _blocks(keys, table, length):
        k, v = (part[block, :, :count].to(wide).unsqueeze(1) for part in (keys, values))
        positions = first + torch.arange(count, device=q.device)
        hidden = positions > last[:, None]
        scores = (queries @ k.mT).masked_fill(hidden, -torch.inf)
        higher = torch.maximum(peak, scores.amax(-1)) if tokens else peak
        shrink = (peak - higher).exp()
        weights = (scores - higher[..., None]).exp()
        total = total * shrink + weights.sum(-1)
        gathered = gathered * shrink[..., None] + weights @ v
        peak = higher
    return (gathered / total[..., None]).reshape(heads, tokens, head_dim).to(q.dtype)
