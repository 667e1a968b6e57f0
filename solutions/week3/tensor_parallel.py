"""One model on several processes: each has a slice of every matrix, and all compute every token."""

import atexit
import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from week1.gqa import Attend
from week1.qwen import Qwen, QwenConfig, load_weights
from week3.paged_attention import PagedBatch, PagedKVCache, paged_attend, paged_cache_for

__all__ = [
    "shard_config",
    "shard_slices",
    "read_shard",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "ParallelHead",
    "shard_model",
    "Leader",
    "follow",
]

# How many numbers `Group.send` takes at most.
MAX_NUMBERS = 8
# Who takes longer for a collective, or to begin, hangs.
COLLECTIVE_SECONDS, START_SECONDS = 60.0, 600.0
# Gloo wants a limit for everything; nobody knows when the next request comes.
NEVER = timedelta(days=1000)
# How long a rank's end may be on its way to whoever has lost the connection to it.
SECONDS_TO_TELL = 1.0
SECONDS_TO_STOP = 5.0
# The exit status of a rank that ends because another one has.
LOST = 75
MakeAttend = Callable[[PagedKVCache, PagedBatch], Attend]

_PASS, _SCORE, _STOP = range(3)


class Group(Protocol):
    """The ranks that have a model together, as one of them sees them.

    rank: in [0, size). Each method but `abort` is a collective: all ranks call the same ones in the
    same order, with contiguous tensors of the same shape and dtype, and none returns before every
    rank has come. Every rank gets the same bits. A rank that does not come is an error for the
    others, after a limit; `receive` alone waits without one.
    """

    rank: int
    size: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """Add up the x of all ranks, in the place of each x; returns x."""

    def all_gather(self, x: Tensor) -> Tensor:
        """Return the x of all ranks joined along the last axis, in the order of the ranks."""

    def broadcast(self, x: Tensor) -> Tensor:
        """Put the x of rank 0 in the place of each x; returns x."""

    def send(self, numbers: Sequence[int]) -> None:
        """Tell all other ranks up to MAX_NUMBERS ints; for rank 0, while the others `receive`."""

    def receive(self) -> list[int]:
        """Return what rank 0 sends; for all other ranks."""

    def abort(self) -> None:
        """End the group: the others get an error, wherever they are. No collective is possible."""


class LazyTensor(Protocol):
    """A tensor in a file, of which only what is asked for is read."""

    def get_shape(self) -> Sequence[int]:
        """Return its shape, without reading it."""

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        """Read a part: what a tensor would be indexed with, one slice an axis, or fewer."""


def shard_config(config: QwenConfig, size: int) -> QwenConfig:
    """Say what one rank has of a model.

    config: of the whole model. size: how many ranks there are.
    Returns a config of which num_attention_heads, num_key_value_heads, intermediate_size and
    vocab_size are one rank's, and all else is the model's. Every rank has as many query heads as
    the others, and the key/value heads that they use: where there are fewer of these than ranks,
    one, which other ranks have too. vocab_size is the same for all ranks, and as small as possible;
    where it does not come out even, some ranks have rows that stand for no token.
    Raises ValueError, which names size and the number, for a size below 1; where
    num_attention_heads or intermediate_size does not divide by size; and where neither of
    num_key_value_heads and size divides by the other.
    """
    if size < 1:
        raise ValueError(f"there must be at least 1 rank, got {size}")
    for name in ("num_attention_heads", "intermediate_size"):
        if getattr(config, name) % size:
            raise ValueError(f"{name} {getattr(config, name)} does not divide by {size} ranks")
    num_kv_heads = config.num_key_value_heads
    if num_kv_heads % size and size % num_kv_heads:
        raise ValueError(
            f"num_key_value_heads {num_kv_heads} neither divides by {size} ranks nor divides them"
        )
    return replace(
        config,
        num_attention_heads=config.num_attention_heads // size,
        num_key_value_heads=max(1, num_kv_heads // size),
        intermediate_size=config.intermediate_size // size,
        vocab_size=-(-config.vocab_size // size),
    )


def shard_slices(name: str, config: QwenConfig, rank: int, size: int) -> tuple[slice, ...]:
    """Say which part of a checkpoint's tensor belongs to a rank.

    name: of a tensor of the checkpoint, such as "model.layers.0.mlp.up_proj.weight"; one that a
        rank has whole may have any name. config: of the whole model.
    The ranks have query heads, entries between the projections of the feed-forward block, and rows
    of the vocabulary in their order: rank 0 the first ones, all of them without a gap. Everything
    that belongs to no head, no such entry and no token, every rank has whole.
    Returns what the tensor is indexed with: a slice for each axis, or for the first ones. Of a rank
    with rows that stand for no token, the slice may reach beyond the tensor.
    Raises ValueError as `shard_config` does.
    """
    local = shard_config(config, size)

    def share(width: int) -> slice:
        return slice(rank * width, (rank + 1) * width)

    module, *kind = name.split(".")[-2:]
    if module in ("embed_tokens", "lm_head"):
        return (share(local.vocab_size),)
    if module in ("gate_proj", "up_proj"):
        return (share(local.intermediate_size),)
    if module == "down_proj":
        return slice(None), share(local.intermediate_size)
    if module == "q_proj":
        return (share(local.num_attention_heads * config.head_dim),)
    if module in ("k_proj", "v_proj"):
        # Ranks whose query heads share a key/value head have the same one.
        first = rank * config.num_key_value_heads // size
        end = first + local.num_key_value_heads
        return (slice(first * config.head_dim, end * config.head_dim),)
    if module == "o_proj" and kind == ["weight"]:
        return slice(None), share(local.num_attention_heads * config.head_dim)
    return (slice(None),)


def read_shard(
    tensors: Mapping[str, LazyTensor],
    config: QwenConfig,
    rank: int,
    size: int,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Read a rank's part of a checkpoint, and nothing else.

    tensors: by checkpoint name, as `open_checkpoint` returns them. config: of the whole model.
        dtype: what the weights are converted to.
    Returns what `load_weights` puts into a `Qwen` of `shard_config`: by checkpoint name, each
    tensor's part of `shard_slices`; rows that stand for no token are zeros. A tensor is indexed at
    most once, and with what this rank needs of it.
    Raises ValueError as `load_weights` does for a checkpoint that does not fit config, before
    anything is read, and as `shard_config` does.
    """
    local = shard_config(config, size)
    with torch.device("meta"):
        whole = Qwen(config)
        # Not a byte of the weights is needed to see whether they fit.
        load_weights(whole, {name: torch.empty(t.get_shape()) for name, t in tensors.items()})
    parts: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        part = tensor[shard_slices(name, config, rank, size)].to(dtype)
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            part = nn.functional.pad(part, (0, 0, 0, local.vocab_size - len(part)))
        parts[name] = part
    return parts


class RowParallelLinear(nn.Module):
    """The product of what the ranks have of x with what they have of a matrix.

    linear: a torch.nn.Linear whose weight is this rank's columns of the matrix, and whose bias,
        if it has one, is the whole one, the same on every rank. A torch.nn.Linear without a bias
        is among this module's children, so that a quantized one can be put in its place.
    Called with x: (..., in_features), this rank's part of the columns, left as it was; returns
    (..., out_features), what the whole matrix with its bias gives for the whole x, on every rank.
    One collective a call.
    """

    def __init__(self, linear: nn.Linear, group: Group):
        super().__init__()
        self.bias = linear.bias
        linear.bias = None
        self.linear = linear
        self._group = group

    def forward(self, x: Tensor) -> Tensor:
        """Multiply; x: (..., in_features)."""
        out = self._group.all_reduce(self.linear(x))
        return out if self.bias is None else out + self.bias


class VocabParallelEmbedding(nn.Module):
    """The embedding of every token, from rows that are spread over the ranks.

    embedding: a torch.nn.Embedding with this rank's rows. Every rank has as many; those of rank 0
        stand for the first ids, and so on.
    weight: this rank's rows, the same Parameter as embedding's, kept under this name.
    Called with input_ids: (...) int64, left as they were, ids of any rank; returns (...,
    hidden_size), their rows, on every rank. What the rows of other ids hold does no harm, NaN and
    infinity neither. One collective a call.
    """

    def __init__(self, embedding: nn.Embedding, group: Group):
        super().__init__()
        self.weight = embedding.weight
        self._group = group

    def forward(self, input_ids: Tensor) -> Tensor:
        """Look up; input_ids: (...) int64."""
        rows = input_ids - self._group.rank * len(self.weight)
        elsewhere = (rows < 0) | (rows >= len(self.weight))
        x = nn.functional.embedding(rows.masked_fill(elsewhere, 0), self.weight)
        return self._group.all_reduce(x.masked_fill(elsewhere[..., None], 0.0))


class ParallelHead(nn.Module):
    """The score of every token, from rows that are spread over the ranks.

    linear: a torch.nn.Linear without a bias, with this rank's rows, as in `VocabParallelEmbedding`.
    vocab_size: how many tokens there are; rows behind them stand for none.
    weight: this rank's rows, the same Parameter as linear's, kept under this name.
    Called with hidden: (..., hidden_size), the same on every rank and left as it was; returns (...,
    vocab_size), hidden's dtype, on every rank. One collective a call.
    """

    def __init__(self, linear: nn.Linear, vocab_size: int, group: Group):
        super().__init__()
        self.weight = linear.weight
        self._vocab_size, self._group = vocab_size, group

    def forward(self, hidden: Tensor) -> Tensor:
        """Score; hidden: (..., hidden_size)."""
        scores = self._group.all_gather(nn.functional.linear(hidden, self.weight))
        return scores[..., : self._vocab_size]


def shard_model(
    tensors: Mapping[str, LazyTensor],
    config: QwenConfig,
    group: Group,
    dtype: torch.dtype = torch.float32,
) -> Qwen:
    """Make a rank's part of a model, and load it.

    tensors, config, dtype: as in `read_shard`, which reads them.
    Returns a `Qwen` of `shard_config`, in evaluation mode, that needs no gradient. When all ranks
    call theirs together, with the same arguments, each gets the hidden states and logits of the
    whole model, bit by bit the same as the other ranks. attend is called on every rank with the
    heads of that rank. A layer needs two collectives, the embedding one, the logits one.
    Of its layers, o_proj and down_proj are `RowParallelLinear`, the other projections plain
    torch.nn.Linear. With tied embeddings, head and embedding have one Parameter.
    No weight is initialised that is read afterwards.
    Raises ValueError as `read_shard` does.
    """
    with torch.device("meta"):
        model = Qwen(shard_config(config, group.size))
    load_weights(model, read_shard(tensors, config, group.rank, group.size, dtype))
    for layer in model.layers:
        layer.self_attn.o_proj = RowParallelLinear(layer.self_attn.o_proj, group)
        layer.mlp.down_proj = RowParallelLinear(layer.mlp.down_proj, group)
    model.embed_tokens = VocabParallelEmbedding(model.embed_tokens, group)
    model.lm_head = ParallelHead(model.lm_head, config.vocab_size, group)
    return model.eval()


class Leader:
    """Rank 0: stands in a model's place, and takes the other ranks along.

    model: rank 0's part, as `shard_model` makes it. config: of the whole model. group: rank 0's.
        make_attend: as in `ModelRunner`. The other ranks run `follow`.
    config: the whole model's, but for num_key_value_heads, which is what a rank has; and
    embed_tokens, the part's, are kept under these names, so that pools fit the part.
    An `Engine` that is made with a leader as its model, and with the leader's `attend` as its
    make_attend, needs to know nothing else of the ranks. For one pool, and one thread.
    When a pass, a scoring or `stop` raises, whatever it is, the ranks are no longer at the same
    place: the group is aborted, the error goes on to the caller, and from then on all three raise
    RanksFailed, without a collective.
    """

    def __init__(
        self,
        model: Qwen,
        config: QwenConfig,
        group: Group,
        make_attend: MakeAttend = paged_attend,
    ):
        self.config = replace(config, num_key_value_heads=model.config.num_key_value_heads)
        self.embed_tokens = model.embed_tokens
        self._model, self._group, self._make_attend = model, group, make_attend
        self._cache: PagedKVCache | None = None
        self._batch: PagedBatch | None = None
        self._error: BaseException | None = None

    def attend(self, cache: PagedKVCache, batch: PagedBatch) -> Attend:
        """Make the `Attend` of the next pass, over rank 0's part of the pool; no collective.

        cache: the same in every call. batch: every rank's.
        """
        self._cache, self._batch = cache, batch
        return self._make_attend(cache, batch)

    def __call__(self, input_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Let all ranks make a pass.

        input_ids, positions: (tokens,) int64, left as they were. attend: what the latest call of
            `attend` returned; a pass needs one of its own.
        Returns (tokens, hidden_size), as the whole model does. Beside the model's collectives: one
        `send`, and one `broadcast` of one int64 tensor.
        """
        cache, batch = self._cache, self._batch
        with self._together():
            tables = batch.block_tables
            sizes = len(input_ids), *tables.shape, batch.num_decodes, batch.max_seqlen_q
            self._group.send([_PASS, *sizes, cache.keys.shape[1], cache.keys.shape[3]])
            parts = input_ids, positions, batch.slots, batch.seq_lens, batch.cu_seqlens_q
            self._group.broadcast(torch.cat([*parts, tables.flatten()]))
            return self._model(input_ids, positions, attend)

    def logits(self, hidden: Tensor) -> Tensor:
        """Let all ranks score rows of what a pass returned.

        hidden: (rows, hidden_size), left as it was. Returns (rows, vocab_size) float32, as the
        whole model does. Beside the model's collective: one `send`, and one `broadcast`.
        """
        with self._together():
            self._group.send([_SCORE, len(hidden)])
            self._group.broadcast(hidden.contiguous())
            return self._model.logits(hidden)

    def stop(self) -> None:
        """Let `follow` return on all other ranks. To be called once, as the last call."""
        with self._together():
            self._group.send([_STOP])

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        if self._error is not None:
            raise RanksFailed(f"the ranks are out of step since {self._error!r}")
        try:
            yield
        except BaseException as error:
            self._error = error
            self._group.abort()
            raise


def follow(model: Qwen, group: Group, make_attend: MakeAttend = paged_attend) -> None:
    """Do on a rank other than 0 what its `Leader` does, until that one stops.

    model: this rank's part, as `shard_model` makes it. make_attend: as in `ModelRunner`; over a
        pool of this rank's heads, in the dtype and on the device of its weights, with as many and
        as large blocks as the leader's, which is made once.
    Nothing is recorded for a backward pass. Raises what the model, make_attend and the group raise.
    """
    weight, cache = model.embed_tokens.weight, None
    with torch.inference_mode():
        while True:
            kind, *numbers = group.receive()
            if kind == _STOP:
                return
            if kind == _SCORE:
                hidden = weight.new_empty(*numbers, weight.shape[1])
                model.logits(group.broadcast(hidden))
                continue
            *sizes, num_blocks, block_size = numbers
            input_ids, positions, batch = _receive_pass(group, sizes, weight.device)
            if cache is None:
                cache = paged_cache_for(model, num_blocks, block_size)
            model(input_ids, positions, make_attend(cache, batch))


def _receive_pass(
    group: Group, sizes: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor, PagedBatch]:
    num_tokens, num_seqs, width, num_decodes, max_seqlen_q = sizes
    lengths = [num_tokens] * 3 + [num_seqs, num_seqs + 1, num_seqs * width]
    numbers = group.broadcast(torch.empty(sum(lengths), dtype=torch.int64, device=device))
    input_ids, positions, slots, seq_lens, cu_seqlens_q, tables = numbers.split(lengths)
    tables = tables.view(num_seqs, width)
    batch = PagedBatch(slots, tables, cu_seqlens_q, seq_lens, num_decodes, max_seqlen_q)
    return input_ids, positions, batch


class RanksFailed(RuntimeError):
    """The ranks cannot go on; the message says which one failed, and how."""


@dataclass(frozen=True)
class Plan:
    """What all ranks have to know to begin.

    folder: the checkpoint's. size: how many ranks. dtype: of the weights. device: "cpu", or "cuda"
    for a GPU a rank. make_attend: as in `ModelRunner`. prepare: called with each rank's part before
    it runs. Both are pickled, so that their modules are imported on every rank.
    """

    folder: Path
    size: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    make_attend: MakeAttend = paged_attend
    prepare: Callable[[Qwen], None] | None = None
    collective_seconds: float = COLLECTIVE_SECONDS


def open_checkpoint(folder: Path | str, device: torch.device | str) -> dict[str, LazyTensor]:
    """Open the tensors of a checkpoint folder, from one file or from the files of its index.

    Nothing is read but names and shapes; parts are read to the device. Raises ValueError when the
    folder has no weights, or damaged ones.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    tensors: dict[str, LazyTensor] = {}
    for name in sorted(names):
        path = folder / name
        # An index is untrusted input: it may name files of this folder only.
        if Path(name).name != name or not path.is_file():
            raise ValueError(f"{folder} has no weights: {name!r} is missing (safetensors only)")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                tensors.update((key, file.get_slice(key)) for key in file.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or truncated: {error}") from None
    return tensors


class DistributedGroup:
    """A `Group` by torch.distributed: gloo on a CPU, NCCL on GPUs.

    file: of the file system, the same for all ranks, where they find each other. device: this
    rank's. on_error: called with the error of a collective; raises. on_abort: called by `abort`.
    """

    def __init__(
        self,
        rank: int,
        plan: Plan,
        file: str,
        on_error: Callable[[Exception], NoReturn],
        on_abort: Callable[[], None],
    ):
        self.rank, self.size = rank, plan.size
        self.abort, self._on_error = on_abort, on_error
        # Ranks of one machine talk to each other over its loopback, and nobody else is let in.
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        if plan.device != "cpu":
            torch.cuda.set_device(rank)
        dist.init_process_group(
            "gloo" if plan.device == "cpu" else "nccl",
            store=dist.FileStore(file, plan.size),
            rank=rank,
            world_size=plan.size,
            timeout=timedelta(seconds=plan.collective_seconds),
        )
        # What is to be done next is told on the host: who waits for it needs no GPU, and no limit.
        self._orders = dist.new_group(backend="gloo", timeout=NEVER)

    def all_reduce(self, x: Tensor) -> Tensor:
        self._run(dist.all_reduce, x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._run(dist.all_gather, parts, x)
        return torch.cat(parts, dim=-1)

    def broadcast(self, x: Tensor) -> Tensor:
        self._run(dist.broadcast, x, 0)
        return x

    def send(self, numbers: Sequence[int]) -> None:
        padded = [len(numbers), *numbers, *[0] * (MAX_NUMBERS - len(numbers))]
        self._run(dist.broadcast, torch.tensor(padded), 0, group=self._orders)

    def receive(self) -> list[int]:
        padded = torch.empty(1 + MAX_NUMBERS, dtype=torch.int64)
        self._run(dist.broadcast, padded, 0, group=self._orders)
        count, *numbers = padded.tolist()
        return numbers[:count]

    def _run(self, collective: Callable, *args: Any, **options: Any) -> None:
        try:
            collective(*args, **options)
        except RuntimeError as error:
            self._on_error(error)


class Ranks:
    """All ranks of a model: the leader in this process, each other one in a process of its own.

    leader: the `Leader`, ready to be called. failure: why the ranks have ended, when they have not
    been stopped; None as long as they run. on_failure: called with it, once, from any thread; may
    be set later. pids: of the other processes. was_killed: whether one did not end when it was
    stopped.
    Whatever ends one rank ends all others, at once or after the limit of a collective. The other
    processes end when this one does, however it does.
    Raises RanksFailed when a rank fails before it is ready, and what loading this rank's part
    raises.
    """

    def __init__(self, plan: Plan, on_failure: Callable[[str], None] | None = None):
        config = QwenConfig.from_folder(plan.folder)
        _check(plan, config)
        self.failure: str | None = None
        self.on_failure = on_failure
        self.was_killed = False
        self._is_over = False
        self._changed = threading.Condition()
        self._num_said = {"here": 0, "ready": 0}
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._num_threads = torch.get_num_threads()
        file = str(Path(self._folder.name) / "store")
        share = max(1, self._num_threads // plan.size)
        self._processes: list[subprocess.Popen] = []
        atexit.register(self.stop)
        try:
            for rank in range(1, plan.size):
                self._processes.append(self._start((rank, plan, file, share)))
            torch.set_num_threads(share)
            self._wait_for("here")
            group = DistributedGroup(0, plan, file, self._explain, self._abort)
            model = _load_part(plan, config, group)
            self.leader = Leader(model, config, group, plan.make_attend)
            self._wait_for("ready")
        except BaseException as error:
            reason = self.failure
            self.stop()
            if reason is not None and not isinstance(error, RanksFailed):
                raise RanksFailed(reason) from error
            raise

    @property
    def pids(self) -> list[int]:
        """The processes of the other ranks."""
        return [process.pid for process in self._processes]

    def stop(self) -> None:
        """End the other ranks and wait for their processes; may be called again."""
        with self._changed:
            is_first, self._is_over = not self._is_over, True
        atexit.unregister(self.stop)
        if is_first and self.failure is None and hasattr(self, "leader"):
            with contextlib.suppress(RuntimeError):
                self.leader.stop()
        for process in self._processes:
            with contextlib.suppress(OSError):
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(SECONDS_TO_STOP)
            except subprocess.TimeoutExpired:
                self.was_killed = True
                process.kill()
                process.wait()
        if is_first:
            if dist.is_initialized():
                dist.destroy_process_group()
            self._folder.cleanup()
            torch.set_num_threads(self._num_threads)

    def _start(self, order: tuple) -> subprocess.Popen:
        # With this process' path it imports the labs that this process does. In a session of its
        # own no Ctrl-C reaches it; it ends with its standard input.
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", "import week3.tensor_parallel as lab; lab.run_rank()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
            start_new_session=True,
        )
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(pickle.dumps(order))
            process.stdin.flush()
        threading.Thread(target=self._listen, args=(order[0], process), daemon=True).start()
        return process

    def _listen(self, rank: int, process: subprocess.Popen) -> None:
        """Note what a rank says of itself, and that it ends."""
        for line in process.stdout:
            word = line.decode(errors="replace").strip()
            if word not in self._num_said:  # a lab has printed something while it was imported
                print(word, file=sys.stderr)
                continue
            with self._changed:
                self._num_said[word] += 1
                self._changed.notify_all()
        status = process.wait()
        if status == LOST:  # so another one has ended first
            time.sleep(SECONDS_TO_TELL)
        how = f"has ended with status {status}"
        if status < 0:
            how = f"was ended by {signal.Signals(-status).name}"
        self._fail(f"rank {rank} (process {process.pid}) {how}")

    def _wait_for(self, word: str) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: self.failure or self._num_said[word] == len(self._processes),
                timeout=START_SECONDS,
            )
            if self.failure is not None:
                raise RanksFailed(self.failure)
            if self._num_said[word] < len(self._processes):
                raise RanksFailed(f"a rank has not begun after {START_SECONDS:g} s")

    def _fail(self, reason: str) -> None:
        with self._changed:
            if self._is_over or self.failure is not None:
                return
            self.failure = reason
            self._changed.notify_all()
        for process in self._processes:
            process.kill()
        if self.on_failure is not None:
            self.on_failure(reason)

    def _explain(self, error: Exception) -> NoReturn:
        with self._changed:
            self._changed.wait_for(lambda: self.failure, timeout=SECONDS_TO_TELL)
        self._fail(f"rank 0 cannot reach the others: {error}")
        raise RanksFailed(self.failure or "the ranks have been stopped") from None

    def _abort(self) -> None:
        self._fail("rank 0 failed in a pass")


def run_rank() -> None:
    """Be one of the processes that `Ranks` starts: what to do comes from standard input."""
    said = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what labs print belongs to nobody's output
    rank, plan, file, num_threads = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_input, daemon=True).start()
    torch.set_num_threads(num_threads)
    print("here", file=said)
    try:
        group = DistributedGroup(rank, plan, file, _lose, _lose)
        model = _load_part(plan, QwenConfig.from_folder(plan.folder), group)
        print("ready", file=said)
        follow(model, group, plan.make_attend)
        dist.destroy_process_group()
    except RanksFailed:
        os._exit(LOST)


def _lose(*_: Exception) -> NoReturn:
    raise RanksFailed("another rank has failed")


def _end_with_input() -> None:
    """End this process when the one that started it closes its input, or is no more."""
    # Not through sys.stdin, whose lock the interpreter wants when it ends.
    while os.read(0, 1024):
        pass
    os._exit(0)


def _check(plan: Plan, config: QwenConfig) -> None:
    """Raise ValueError for what no rank can begin with."""
    shard_config(config, plan.size)
    if plan.device != "cpu" and torch.cuda.device_count() < plan.size:
        count = torch.cuda.device_count()
        raise ValueError(f"{plan.size} ranks need {plan.size} GPUs, and torch sees {count}")


def _load_part(plan: Plan, config: QwenConfig, group: Group) -> Qwen:
    device = plan.device if plan.device == "cpu" else f"{plan.device}:{group.rank}"
    tensors = open_checkpoint(plan.folder, device)
    model = shard_model(tensors, config, group, plan.dtype)
    if plan.prepare is not None:
        plan.prepare(model)
    return model
