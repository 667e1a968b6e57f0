"""A decode step that is captured once and replayed: sizes, memory that never moves, the runner."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from week1.qwen import Qwen
from week2.kv_cache import DecodeAttention, KVCache

__all__ = ["plan_buckets", "bucket_of", "DecodeBuffers", "GraphRunner"]


@dataclass(frozen=True)
class DecodeRow:
    """What one sequence brings to a decode step: its next token, and where the cache has it.

    The cache's memory is cut into blocks of block_size slots, one slot a token.
    token_id: the new token. position: of that token, so that as many tokens stand before it.
    slot: where its key and value go. block_ids: the blocks that hold the sequence, in the order of
    its tokens; the new token's block is among them. Raises ValueError for a negative number.
    """

    token_id: int
    position: int
    slot: int
    block_ids: Sequence[int]

    def __post_init__(self):
        for name in ("token_id", "position", "slot"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class DecodeInputs:
    """What a decode step of n rows reads, all of it int64.

    input_ids, positions: (n,). slot_mapping: (n,), where each row writes its key and value; −1
    writes nothing. num_tokens: (n,), how many tokens each row looks at, the new one included.
    block_table: (n, max_num_blocks), each row's blocks in the order of its tokens.
    """

    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    num_tokens: Tensor
    block_table: Tensor


# Computes a step: (n, …) from inputs of n rows. Every row's result depends on its own row only.
Step = Callable[[DecodeInputs], Tensor]
# Turns a call into a replay of it: both take nothing, and return the same tensor.
Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


class StagedMemory:
    """Memory of int64 numbers that the host writes and a device reads.

    device: (size,), zeros at first, then what `send` has brought there. It never moves.
    """

    def __init__(self, size: int, device: torch.device | str):
        on_gpu = torch.device(device).type == "cuda"
        # Only a copy from pinned memory leaves the host free to go on.
        self._host = torch.zeros(size, dtype=torch.int64, pin_memory=on_gpu)
        self.device = torch.zeros(size, dtype=torch.int64, device=device)
        self._sent = torch.cuda.Event() if on_gpu else None

    def host(self) -> Tensor:
        """Give the host's part to write in, (size,), as soon as what was sent before has left."""
        if self._sent is not None:
            self._sent.synchronize()
        return self._host

    def send(self, count: int) -> None:
        """Bring the first `count` numbers to the device, in one copy behind what is queued."""
        self.device[:count].copy_(self._host[:count], non_blocking=True)
        if self._sent is not None:
            self._sent.record()


def plan_buckets(max_batch_size: int) -> list[int]:
    """Choose the batch sizes for which a step is captured.

    Returns sizes in ascending order, none twice, the last one max_batch_size; no more than
    max_batch_size / 8 + 4 of them. The smallest one that holds n rows, for every n from 1 to
    max_batch_size, is at most n + 7, and less than 2 * n.
    Raises ValueError, which gives the value, when max_batch_size is below 1.
    """
    if max_batch_size < 1:
        raise ValueError(f"max_batch_size must be at least 1, got {max_batch_size}")
    small = [size for size in (1, 2, 4) if size < max_batch_size]
    return [*small, *range(8, max_batch_size, 8), max_batch_size]


def bucket_of(buckets: Sequence[int], batch_size: int) -> int:
    """Find the captured size in which a batch runs: the smallest one that holds it.

    buckets: ascending, at least one. Raises ValueError, which names batch_size and the largest
    bucket, when batch_size is below 1 or above that bucket.
    """
    if not 1 <= batch_size <= buckets[-1]:
        raise ValueError(f"a batch of {batch_size} rows is outside [1, {buckets[-1]}]")
    return next(size for size in buckets if size >= batch_size)


class DecodeBuffers:
    """The memory that captured decode steps read: made once, filled anew for each step.

    max_batch_size: the most rows of a step. max_model_len: the most tokens of a sequence, the new
    one included. block_size: slots in a block. block_table has a column for each block that
    max_model_len tokens may take, and none beyond.
    A *padding row* belongs to no sequence. Its input_ids and positions are 0, its slot_mapping is
    −1, its num_tokens 1, its block_table all 0: it writes nothing, and looks at the first slot of
    block 0. At first every row is a padding row.
    Raises ValueError, which gives the value, when one of the three sizes is below 1.
    """

    def __init__(
        self,
        max_batch_size: int,
        max_model_len: int,
        block_size: int,
        device: torch.device | str = "cpu",
    ):
        sizes = (
            ("max_batch_size", max_batch_size),
            ("max_model_len", max_model_len),
            ("block_size", block_size),
        )
        for name, value in sizes:
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._max_batch_size, self._max_model_len = max_batch_size, max_model_len
        self._block_size = block_size
        self._max_num_blocks = _num_blocks(max_model_len, block_size)
        self._memory = StagedMemory(max_batch_size * (4 + self._max_num_blocks), device)
        self._device = _inputs_in(self._memory.device, max_batch_size)
        self._write([], max_batch_size)

    def inputs(self, num_rows: int) -> DecodeInputs:
        """Give the first num_rows rows, on the device.

        num_rows: at least 1, at most max_batch_size. Returns contiguous views, no copies: for as
        long as the buffers live they lie where they lay at first, and show what the latest `fill`
        brought.
        """
        parts = vars(self._device).values()
        return DecodeInputs(*(part[:num_rows] for part in parts))

    def fill(self, batch: Sequence[DecodeRow], num_rows: int) -> None:
        """Put a step's rows into the buffers.

        batch: at least one row. num_rows: how many rows the step computes, at least len(batch) and
        at most max_batch_size.
        Afterwards the first len(batch) rows hold the batch in its order, block_table with zeros
        behind each row's block_ids; those from there to num_rows are padding rows, whatever an
        earlier step has left. Rows behind num_rows mean nothing. The batch is left as it was.
        Raises ValueError, with nothing changed, which names both numbers: for len(batch) outside
        [1, num_rows], num_rows above max_batch_size, a position that is not below max_model_len,
        and fewer block_ids than position + 1 tokens take or more than block_table has columns.
        """
        self._check(batch, num_rows)
        self._write(batch, num_rows)

    def _write(self, batch: Sequence[DecodeRow], num_rows: int) -> None:
        host, size = _inputs_in(self._memory.host(), self._max_batch_size), len(batch)
        for vector, values, padding in (
            (host.input_ids, [row.token_id for row in batch], 0),
            (host.positions, [row.position for row in batch], 0),
            (host.slot_mapping, [row.slot for row in batch], -1),
            (host.num_tokens, [row.position + 1 for row in batch], 1),
        ):
            vector[:num_rows] = torch.tensor(values + [padding] * (num_rows - size))
        # The rows before had other blocks, and perhaps more of them.
        host.block_table[:num_rows] = 0
        for table, row in zip(host.block_table, batch, strict=False):
            table[: len(row.block_ids)] = torch.tensor(row.block_ids)
        self._memory.send(4 * self._max_batch_size + num_rows * self._max_num_blocks)

    def _check(self, batch: Sequence[DecodeRow], num_rows: int) -> None:
        if num_rows > self._max_batch_size:
            raise ValueError(f"{num_rows} rows are more than the {self._max_batch_size} there are")
        if not 1 <= len(batch) <= num_rows:
            raise ValueError(f"a batch of {len(batch)} rows is outside [1, {num_rows}]")
        for row in batch:
            if row.position >= self._max_model_len:
                raise ValueError(
                    f"position {row.position} is outside [0, {self._max_model_len}), the context"
                )
            needed, have = _num_blocks(row.position + 1, self._block_size), len(row.block_ids)
            if not needed <= have <= self._max_num_blocks:
                raise ValueError(
                    f"{have} blocks are outside [{needed}, {self._max_num_blocks}] at position "
                    f"{row.position}"
                )


class GraphRunner:
    """A decode step that is captured once for each bucket, and replayed from then on.

    step: see `Step`. buffers: just made. buckets: ascending, the last one at most the buffers'
    max_batch_size. capture: see `Capture`. It is called while the runner is made, once for each
    bucket, the largest first, with a call of step on that bucket's rows of the buffers. step is
    called by nobody but capture, and later neither of them is. All rows are padding rows then, so
    nothing is written. Errors that capture raises are handed on.
    """

    def __init__(
        self,
        step: Step,
        buffers: DecodeBuffers,
        buckets: Sequence[int],
        capture: Capture,
    ):
        self._buffers, self._buckets = buffers, buckets
        # Graphs share memory: what the largest one took is enough for all that follow.
        self._replays = {
            size: capture(functools.partial(step, buffers.inputs(size)))
            for size in reversed(buckets)
        }

    def __call__(self, batch: Sequence[DecodeRow]) -> Tensor:
        """Run the step on a batch by one replay, in the bucket that `bucket_of` names.

        Returns (len(batch), …), in the order of the batch: what step returns for these rows. It is
        a view of what the replay returned, no copy: any later call may overwrite it.
        Raises ValueError as `bucket_of` and `DecodeBuffers.fill` do, with nothing run.
        """
        num_rows = bucket_of(self._buckets, len(batch))
        self._buffers.fill(batch, num_rows)
        return self._replays[num_rows]()[: len(batch)]


class CudaGraphs:
    """A `Capture` on a GPU: every call becomes a CUDA graph, and all graphs share one pool.

    A graph keeps the addresses of all that it touches, and nothing of Python. So a tensor that is
    made anew is not seen, a branch is taken as it was at the capture, and who asks the device for
    a value there, by int(tensor) say, gets CUDA's error. One graph runs at a time, and any replay
    may overwrite what an earlier one has returned.
    """

    def __init__(self):
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    @torch.no_grad()
    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        # What happens only once (kernels compiled, libraries set up) must not be in the graph; and
        # libraries set themselves up for each stream.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            output = run()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


class _Recorder(TorchDispatchMode):
    """Writes down every operation of torch that runs inside the block."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _asks_the_device(operation, args):
            raise RuntimeError(
                f"{operation} asks the device for a value, which a captured step cannot do"
            )
        result = operation(*args, **kwargs)
        self.calls.append((operation, args, kwargs, result))
        return result


@torch.no_grad()
def record(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Be the `Capture` of a machine without a GPU, with a graph's limits.

    The call runs once. A replay repeats its operations on the same tensors and puts each result
    where it lay at first; no Python of the call runs again. Raises RuntimeError where the call asks
    for a value or a shape that only the data knows, as far as torch says so.
    """
    recorder = _Recorder()
    with recorder:
        output = run()

    @torch.no_grad()
    def replay() -> Tensor:
        for operation, args, kwargs, result in recorder.calls:
            again = operation(*args, **kwargs)
            for old, new in zip(_tensors(result), _tensors(again), strict=True):
                # Views, and what was changed in place, lie where they lay.
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        return output

    return replay


def capture_for(device: torch.device | str) -> Capture:
    """Choose how a step is captured on a device: the one place that does."""
    return CudaGraphs() if torch.device(device).type == "cuda" else record


def padded_decode_attention(q: Tensor, keys: Tensor, values: Tensor, num_tokens: Tensor) -> Tensor:
    """Do what week 2's `decode_attention` does, over all of the capacity: no shape hangs on data.

    Arguments and result as there.
    """
    visible = torch.arange(keys.shape[2], device=q.device) < num_tokens[:, None, None, None]
    queries = q.unsqueeze(2)
    return scaled_dot_product_attention(queries, keys, values, visible, enable_gqa=True).squeeze(2)


def contiguous_row(cache: KVCache, row: int, token_id: int) -> DecodeRow:
    """Describe the next token of a row of a contiguous cache, in which a block is a whole row."""
    position = cache.num_computed_tokens[row]
    return DecodeRow(token_id, position, row * cache.capacity + position, (row,))


def contiguous_step(
    model: Qwen, cache: KVCache, decode: DecodeAttention = padded_decode_attention
) -> Step:
    """Make the step that computes the scores of what follows each row's token, over a `KVCache`.

    model: none of its modules asks the device for a value. Week 1's Rotary does, to check the
        positions, so another one stands in its place; `DecodeBuffers.fill` has checked them.
    cache: has one row more than sequences, the last one, into which padding rows write, and room
        for every token that comes: it must not grow any more, since graphs keep its address.
    decode: as in `cached_attend`. Rows come from `contiguous_row`, and buffers have blocks of
    cache.capacity slots. The step returns (rows, vocab_size) float32; who runs it counts the new
    tokens in num_computed_tokens. Raises ValueError when rows are more than cache.capacity.
    """

    def step(inputs: DecodeInputs) -> Tensor:
        num_rows = len(inputs.input_ids)
        if num_rows > cache.capacity:
            raise ValueError(f"{num_rows} rows are more than the capacity {cache.capacity}")
        is_padding = inputs.slot_mapping < 0
        rows = inputs.block_table[:, 0].masked_fill(is_padding, len(cache.num_computed_tokens) - 1)
        # No place twice: each padding row has its own in the spare row.
        own_places = torch.arange(num_rows, device=rows.device)
        positions = torch.where(is_padding, own_places, inputs.positions)

        def attend(layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.write(layer_index, rows, positions, k, v)
            keys, values = (part[rows] for part in cache.read(layer_index))
            return decode(q.transpose(0, 1), keys, values, inputs.num_tokens).transpose(0, 1)

        return model.logits(model(inputs.input_ids, inputs.positions, attend))

    return step


def _num_blocks(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)


def _inputs_in(memory: Tensor, max_batch_size: int) -> DecodeInputs:
    """Cut memory into the five inputs, each of them contiguous."""
    # [0, 4 * max_batch_size)   one number a row, four times
    # beyond                    the block table, row by row
    vectors, table = memory.tensor_split([4 * max_batch_size])
    return DecodeInputs(*vectors.view(4, -1), table.view(max_batch_size, -1))


def _asks_the_device(operation: torch._ops.OpOverload, args: tuple) -> bool:
    if operation is torch.ops.aten.index.Tensor:
        # A mask takes as many as it lets through; a list of places takes as many as it names.
        return any(index is not None and index.dtype is torch.bool for index in args[1])
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return not tags.isdisjoint(operation.tags)


def _tensors(result: object) -> list[Tensor]:
    parts = result if isinstance(result, (tuple, list)) else (result,)
    return [part for part in parts if isinstance(part, Tensor)]
