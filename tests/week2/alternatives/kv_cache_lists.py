"""Week2/kv_cache another way: a list of tensors a layer, torch's own attention, row by row."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from week1.gqa import Attend
from week1.qwen import Qwen

__all__ = [
    "KVCache",
    "prefill_attention",
    "decode_attention",
    "cached_attend",
    "extend",
    "CachedLogits",
]


class KVCache:
    """Keys and values, the tokens of a row behind each other: (rows, capacity, heads, head_dim)."""

    def __init__(
        self,
        num_layers: int,
        num_rows: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        if num_rows <= 0:
            raise ValueError(f"a cache of {num_rows} rows holds nothing")
        self.device = device
        self.num_computed_tokens = [0 for _ in range(num_rows)]

        def nothing() -> Tensor:
            return torch.zeros(num_rows, 0, num_kv_heads, head_dim, dtype=dtype, device=device)

        self._keys = [nothing() for _ in range(num_layers)]
        self._values = [nothing() for _ in range(num_layers)]

    @property
    def capacity(self) -> int:
        """Places a row."""
        return self._keys[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.numel() * part.element_size() for part in [*self._keys, *self._values])

    def reserve(self, num_tokens: int) -> None:
        """Make room, one and a half times as much as there was."""
        if num_tokens > self.capacity:
            missing = max(num_tokens, math.ceil(1.5 * self.capacity)) - self.capacity
            for parts in (self._keys, self._values):
                # One layer after the other, so that only one of them ever lies there twice.
                for index, part in enumerate(parts):
                    num_rows, _, *heads = part.shape
                    parts[index] = torch.cat((part, part.new_zeros(num_rows, missing, *heads)), 1)

    def write(
        self, layer_index: int, rows: Tensor, positions: Tensor, k: Tensor, v: Tensor
    ) -> None:
        """Store tokens."""
        for parts, new in ((self._keys, k), (self._values, v)):
            parts[layer_index].index_put_((rows, positions), new.movedim(1, 0))

    def read(self, layer_index: int) -> tuple[Tensor, Tensor]:
        """Give views in the order of axes that attention wants."""
        return self._keys[layer_index].transpose(1, 2), self._values[layer_index].transpose(1, 2)

    def truncate(self, row: int, num_tokens: int) -> None:
        """Forget the end of a row."""
        stored = self.num_computed_tokens[row]
        if num_tokens < 0 or num_tokens > stored:
            raise ValueError(f"{num_tokens} tokens of row {row}, which has {stored}")
        self.num_computed_tokens[row] = num_tokens


def cache_for(model: Qwen, num_rows: int) -> KVCache:
    """Make an empty cache that fits a model."""
    config, weight = model.config, model.embed_tokens.weight
    sizes = config.num_key_value_heads, config.head_dim
    return KVCache(config.num_hidden_layers, num_rows, *sizes, weight.dtype, weight.device)


def prefill_attention(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Let the last tokens of one row look at it."""
    return _look(q, keys, values)


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, num_tokens: Tensor) -> Tensor:
    """Go through the rows, each cut to its own length."""
    rows = zip(q, keys, values, num_tokens.tolist(), strict=True)
    return torch.stack([_look(x[:, None], k[:, :n], v[:, :n])[:, 0] for x, k, v, n in rows])


def cached_attend(
    cache: KVCache,
    num_new_tokens: Mapping[int, int],
    prefill=prefill_attention,
    decode=decode_attention,
) -> Attend:
    """Go through the rows; a single token is a batch of one."""
    spans = list(_spans(cache, num_new_tokens))

    def attend(layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pieces = []
        for row, here, start, end in spans:
            positions = torch.arange(start, end, device=q.device)
            rows = torch.full_like(positions, row)
            cache.write(layer_index, rows, positions, k[:, here], v[:, here])
            keys, values = cache.read(layer_index)
            if end - start > 1:
                pieces.append(prefill(q[:, here], keys[row, :, :end], values[row, :, :end]))
            else:
                alone = slice(row, row + 1)
                length = torch.tensor([end], device=q.device)
                queries = q[:, here].transpose(0, 1)
                pieces.append(decode(queries, keys[alone], values[alone], length).transpose(0, 1))
        return torch.cat(pieces, dim=1)

    return attend


@torch.no_grad()
def extend(
    model: Qwen,
    cache: KVCache,
    new_tokens: Mapping[int, Sequence[int]],
    make_attend=cached_attend,
) -> Tensor:
    """Run a model over the next tokens of some rows, sorted by row, and sort the scores back."""
    if len(new_tokens) == 0:
        raise ValueError("no row to extend")
    limit = model.config.max_position_embeddings
    room = 0
    for row, ids in new_tokens.items():
        if row not in range(len(cache.num_computed_tokens)) or len(ids) == 0:
            raise ValueError(f"row {row}: unknown, or without new tokens")
        room = max(room, cache.num_computed_tokens[row] + len(ids))
        if room > limit:
            raise ValueError(f"row {row} would reach {room} tokens; the context ends at {limit}")
    cache.reserve(room)
    ordered = sorted(new_tokens)
    counts = {row: len(new_tokens[row]) for row in ordered}
    device = model.embed_tokens.weight.device
    flat = list(itertools.chain.from_iterable(new_tokens[row] for row in ordered))
    spans = list(_spans(cache, counts))
    positions = torch.cat([torch.arange(start, end) for _, _, start, end in spans]).to(device)
    hidden = model(torch.tensor(flat, device=device), positions, make_attend(cache, counts))
    last = {row: here.stop - 1 for row, here, _, _ in spans}
    scores = model.logits(hidden)[[last[row] for row in new_tokens]]
    for row, _, _, end in spans:
        cache.num_computed_tokens[row] = end
    return scores


class CachedLogits:
    """Keeps one row and the ids whose keys and values are certainly there."""

    def __init__(self, model: Qwen, make_attend=cached_attend):
        self.model, self.cache, self.known = model, cache_for(model, 1), ()
        self.make_attend = make_attend

    def __call__(self, token_ids: Sequence[int]) -> Tensor:
        """Score what follows token_ids."""
        ids = tuple(token_ids)
        shared = 0
        while shared < min(len(ids) - 1, len(self.known)) and ids[shared] == self.known[shared]:
            shared += 1
        self.cache.truncate(0, shared)
        self.known = ids[:shared]
        scores = extend(self.model, self.cache, {0: ids[shared:]}, self.make_attend)[0]
        self.known = ids
        return scores


def _spans(cache: KVCache, counts: Mapping[int, int]) -> Iterator[tuple[int, slice, int, int]]:
    """Yield each row with its place in the flat call, its first new position and its new length."""
    place = 0
    for row, count in counts.items():
        start = cache.num_computed_tokens[row]
        yield row, slice(place, place + count), start, start + count
        place += count


def _look(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Let the last tokens of one row look at it: (num_heads, tokens, head_dim) in and out."""
    tokens, num_keys = q.shape[1], keys.shape[1]
    ages = torch.arange(num_keys, device=q.device)
    mask = ages <= ages[num_keys - tokens :, None]
    wide = (part.double()[None] for part in (q, keys, values))
    out = scaled_dot_product_attention(*wide, attn_mask=mask, enable_gqa=True)
    return out[0].to(q.dtype)
