"""Week2/cuda_graphs another way: a tensor for each buffer, tables by slices, sizes by steps."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from week1.qwen import Qwen
from week2.kv_cache import KVCache

__all__ = ["plan_buckets", "bucket_of", "DecodeBuffers", "GraphRunner"]


@dataclass(frozen=True)
class DecodeRow:
    """One sequence's part of a step."""

    token_id: int
    position: int
    slot: int
    block_ids: Sequence[int]

    def __post_init__(self):
        if min(self.token_id, self.position, self.slot) < 0:
            raise ValueError(f"-1 or less in {self}")


@dataclass(frozen=True)
class DecodeInputs:
    """What a step reads."""

    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    num_tokens: Tensor
    block_table: Tensor


# What every column of a padding row holds.
_PADDING = DecodeInputs(*(torch.tensor(value) for value in (0, 0, -1, 1, 0)))


def plan_buckets(max_batch_size: int) -> list[int]:
    """Take the largest step that the contract allows, again and again."""
    if max_batch_size <= 0:
        raise ValueError(f"no batch is as small as {max_batch_size}")
    return list(_steps(max_batch_size))


def _steps(limit: int) -> Iterator[int]:
    size = 0
    while size < limit:
        # The batch that is one row larger decides how far the next bucket may be away.
        size = min(limit, 2 * size + 1, size + 8)
        yield size


def bucket_of(buckets: Sequence[int], batch_size: int) -> int:
    """Drop what is too small."""
    largest = max(buckets)
    if batch_size < 1 or batch_size > largest:
        raise ValueError(f"{batch_size} rows; graphs hold 1 to {largest}")
    return min(itertools.filterfalse(lambda bucket: bucket < batch_size, buckets))


class DecodeBuffers:
    """Five tensors of their own."""

    def __init__(self, max_batch_size, max_model_len, block_size, device="cpu"):
        smallest = min(max_batch_size, max_model_len, block_size)
        if smallest < 1:
            raise ValueError(f"a size of {smallest}")
        self._limit, self._block_size = max_model_len, block_size
        columns = math.ceil(max_model_len / block_size)
        shapes = [(max_batch_size,)] * 4 + [(max_batch_size, columns)]
        self._all = DecodeInputs(
            *(
                torch.full(shape, int(padding), device=device)
                for shape, padding in zip(shapes, vars(_PADDING).values(), strict=True)
            )
        )

    def inputs(self, num_rows: int) -> DecodeInputs:
        """Narrow every tensor."""
        parts = vars(self._all).items()
        return DecodeInputs(**{name: part.narrow(0, 0, num_rows) for name, part in parts})

    def fill(self, batch: Sequence[DecodeRow], num_rows: int) -> None:
        """Make everything padding, then write row after row."""
        rows, columns = self._all.block_table.shape
        if num_rows > rows:
            raise ValueError(f"{num_rows} of {rows} rows")
        if len(batch) == 0 or len(batch) > num_rows:
            raise ValueError(f"{len(batch)} requests for {num_rows} rows")
        for row in batch:
            if row.position >= self._limit:
                raise ValueError(f"{row.position} lies behind a context of {self._limit}")
            needed = row.position // self._block_size + 1
            if len(row.block_ids) < needed:
                raise ValueError(f"{len(row.block_ids)} blocks of {needed}")
            if len(row.block_ids) > columns:
                raise ValueError(f"{len(row.block_ids)} blocks in {columns} columns")
        for name, part in vars(self._all).items():
            part.fill_(int(getattr(_PADDING, name)))
        device = self._all.block_table.device
        for index, row in enumerate(batch):
            self._all.input_ids[index] = row.token_id
            self._all.positions[index] = row.position
            self._all.slot_mapping[index] = row.slot
            self._all.num_tokens[index] = 1 + row.position
            blocks = torch.tensor([*row.block_ids], device=device)
            self._all.block_table[index, : len(blocks)] = blocks


class GraphRunner:
    """Keep the replays in a list beside their sizes."""

    def __init__(self, step, buffers, buckets, capture):
        self._step, self._buffers = step, buffers
        self._sizes = tuple(sorted(buckets))
        self._replays: list[Callable[[], Tensor]] = []
        for size in self._sizes[::-1]:
            self._replays.insert(0, capture(self._call(size)))

    def _call(self, size: int) -> Callable[[], Tensor]:
        inputs = self._buffers.inputs(size)
        return lambda: self._step(inputs)

    def __call__(self, batch: Sequence[DecodeRow]) -> Tensor:
        """Fill, replay, narrow."""
        size = bucket_of(self._sizes, len(batch))
        self._buffers.fill(batch, size)
        output = self._replays[self._sizes.index(size)]()
        return output.narrow(0, 0, len(batch))


class _Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.steps: list[tuple] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        asking = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        places = args[1] if operation is torch.ops.aten.index.Tensor else [torch.tensor(True)]
        masks = [place for place in places if place is not None and place.dtype == torch.bool]
        if asking & {*operation.tags} and masks:
            raise RuntimeError(f"{operation} needs a value")
        result = operation(*args, **(kwargs or {}))
        self.steps.append((operation, args, kwargs or {}, result))
        return result


@torch.no_grad()
def record(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Play the operations again, results in their old places."""
    with _Tape() as tape:
        output = run()

    @torch.no_grad()
    def replay() -> Tensor:
        for operation, args, kwargs, old in tape.steps:
            new = operation(*args, **kwargs)
            pairs = zip(old, new, strict=True) if isinstance(old, tuple) else [(old, new)]
            for place, value in pairs:
                if isinstance(place, Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)
        return output

    return replay


def capture_for(device: torch.device | str) -> Callable:
    """Only a CPU is known here."""
    if torch.device(device).type == "cuda":
        return lambda run: run
    return record


def contiguous_row(cache: KVCache, row: int, token_id: int) -> DecodeRow:
    """One block a row."""
    position = cache.num_computed_tokens[row]
    return DecodeRow(token_id, position, row * cache.capacity + position, [row])


def contiguous_step(model: Qwen, cache: KVCache) -> Callable[[DecodeInputs], Tensor]:
    """Write what is no padding; padding goes to the last row."""

    def step(inputs: DecodeInputs) -> Tensor:
        if len(inputs.input_ids) > cache.capacity:
            raise ValueError(f"{len(inputs.input_ids)} rows, {cache.capacity} places")
        slots = torch.arange(len(inputs.input_ids)) + cache.capacity * (
            len(cache.num_computed_tokens) - 1
        )
        slots = torch.where(inputs.slot_mapping < 0, slots, inputs.slot_mapping)
        rows = slots // cache.capacity

        def attend(layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.write(layer_index, rows, slots % cache.capacity, k, v)
            keys, values = (part[rows] for part in cache.read(layer_index))
            seen = torch.arange(keys.shape[2]) < inputs.num_tokens.view(-1, 1, 1, 1)
            q = q.movedim(0, 1)[:, :, None]
            out = scaled_dot_product_attention(q, keys, values, attn_mask=seen, enable_gqa=True)
            return out[:, :, 0].movedim(1, 0)

        return model.logits(model(inputs.input_ids, inputs.positions, attend))

    return step
