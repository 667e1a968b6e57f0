"""Week3/tensor_parallel another way: what is added up here is gathered, and the other way round.

The bias belongs to one rank's part, the owner of a token is found by division, and an order says
by its length what it is. Rows of tokens come before rows of sequences.
"""

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
from collections.abc import Callable, Mapping, Sequence
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
    if size < 1:
        raise ValueError(f"there must be at least 1 rank, got {size}")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % size != 0:
        raise ValueError(f"num_attention_heads {heads} does not divide by {size} ranks")
    if config.intermediate_size % size != 0:
        raise ValueError(
            f"intermediate_size {config.intermediate_size} does not divide by {size} ranks"
        )
    larger, smaller = max(size, kv_heads), min(size, kv_heads)
    if larger % smaller != 0:
        raise ValueError(f"num_key_value_heads {kv_heads} does not go with {size} ranks")
    rows = next(n for n in range(config.vocab_size + 1) if n * size >= config.vocab_size)
    return replace(
        config,
        num_attention_heads=heads // size,
        num_key_value_heads=kv_heads // smaller,
        intermediate_size=config.intermediate_size // size,
        vocab_size=rows,
    )


# Along which axis a matrix is cut, and what its parts consist of.
_CUTS = {
    "embed_tokens.weight": (0, "tokens"),
    "lm_head.weight": (0, "tokens"),
    "q_proj.weight": (0, "heads"),
    "q_proj.bias": (0, "heads"),
    "k_proj.weight": (0, "kv heads"),
    "k_proj.bias": (0, "kv heads"),
    "v_proj.weight": (0, "kv heads"),
    "v_proj.bias": (0, "kv heads"),
    "o_proj.weight": (1, "heads"),
    "gate_proj.weight": (0, "inner"),
    "up_proj.weight": (0, "inner"),
    "down_proj.weight": (1, "inner"),
}


def shard_slices(name: str, config: QwenConfig, rank: int, size: int) -> tuple[slice, ...]:
    local = shard_config(config, size)
    cut = next((cut for end, cut in _CUTS.items() if name.endswith(end)), None)
    if cut is None:
        return ()
    axis, what = cut
    width, start = {
        "tokens": (local.vocab_size, rank * local.vocab_size),
        "inner": (local.intermediate_size, rank * local.intermediate_size),
        "heads": (
            local.num_attention_heads * local.head_dim,
            rank * local.num_attention_heads * local.head_dim,
        ),
        "kv heads": (
            local.num_key_value_heads * local.head_dim,
            # That of the rank's first query head.
            rank
            * local.num_attention_heads
            // (config.num_attention_heads // config.num_key_value_heads)
            * local.head_dim,
        ),
    }[what]
    end = min(start + width, config.vocab_size) if what == "tokens" else start + width
    return (*[slice(None)] * axis, slice(min(start, end), end, 1))


def read_shard(
    tensors: Mapping[str, LazyTensor],
    config: QwenConfig,
    rank: int,
    size: int,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    local = shard_config(config, size)
    names = set(tensors)
    if config.tie_word_embeddings:
        names -= {"lm_head.weight"}
    with torch.device("meta"):
        model = Qwen(config)
        shapes = {name: torch.empty(tuple(tensors[name].get_shape())) for name in names}
    load_weights(model, shapes)
    parts = {}
    for name in sorted(names):
        part = tensors[name][shard_slices(name, config, rank, size)]
        if "embed_tokens" in name or "lm_head" in name:
            rows = part.new_zeros(local.vocab_size, part.shape[1])
            rows[: len(part)] = part
            part = rows
        parts[name] = part.to(dtype)
    return parts


class RowParallelLinear(nn.Module):
    def __init__(self, linear: nn.Linear, group: Group):
        super().__init__()
        self.group, self.own_bias = group, linear.bias
        self.product = nn.Linear(1, 1, bias=False, device="meta")
        self.product.weight = linear.weight

    def forward(self, x: Tensor) -> Tensor:
        out = self.product(x)
        # One rank's part has the bias, and so has the sum.
        if self.own_bias is not None and self.group.rank == self.group.size - 1:
            out = out + self.own_bias
        parts = self.group.all_gather(out.contiguous())
        return parts.unflatten(-1, (self.group.size, -1)).sum(-2)


class VocabParallelEmbedding(nn.Module):
    def __init__(self, embedding: nn.Embedding, group: Group):
        super().__init__()
        self.weight, self.group = embedding.weight, group

    def forward(self, input_ids: Tensor) -> Tensor:
        owner, row = input_ids // len(self.weight), input_ids % len(self.weight)
        # Everybody looks up a row, and the owner's is taken.
        found = self.group.all_gather(self.weight[row].contiguous())
        found = found.unflatten(-1, (self.group.size, -1))
        index = owner[..., None, None].expand(*owner.shape, 1, found.shape[-1])
        return found.gather(-2, index).squeeze(-2)


class ParallelHead(nn.Module):
    def __init__(self, linear: nn.Linear, vocab_size: int, group: Group):
        super().__init__()
        self.weight, self.vocab_size, self.group = linear.weight, vocab_size, group

    def forward(self, hidden: Tensor) -> Tensor:
        own = hidden @ self.weight.T
        rows = len(self.weight)
        scores = own.new_zeros(*own.shape[:-1], self.group.size, rows)
        scores[..., self.group.rank, :] = own
        scores = self.group.all_reduce(scores)
        return scores.flatten(-2)[..., : self.vocab_size].clone()


def shard_model(
    tensors: Mapping[str, LazyTensor],
    config: QwenConfig,
    group: Group,
    dtype: torch.dtype = torch.float32,
) -> Qwen:
    parts = read_shard(tensors, config, group.rank, group.size, dtype)
    with torch.device("meta"):
        model = Qwen(shard_config(config, group.size))
    load_weights(model, parts)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in ("o_proj", "down_proj"):
                setattr(module, name, RowParallelLinear(child, group))
    model.lm_head = ParallelHead(model.lm_head, config.vocab_size, group)
    model.embed_tokens = VocabParallelEmbedding(model.embed_tokens, group)
    model.train(False)
    return model


class Leader:
    def __init__(
        self,
        model: Qwen,
        config: QwenConfig,
        group: Group,
        make_attend: MakeAttend = paged_attend,
    ):
        self.model, self.group, self.make_attend = model, group, make_attend
        local = shard_config(config, group.size)
        self.config = replace(config, num_key_value_heads=local.num_key_value_heads)
        self.embed_tokens = model.embed_tokens
        self.is_broken = False

    def attend(self, cache: PagedKVCache, batch: PagedBatch) -> Attend:
        self.told = cache, batch
        return self.make_attend(cache, batch)

    def __call__(self, input_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        return self.try_to(lambda: self.make_pass(input_ids, positions, attend))

    def logits(self, hidden: Tensor) -> Tensor:
        return self.try_to(lambda: self.score(hidden))

    def stop(self) -> None:
        self.try_to(lambda: self.group.send([]))

    def make_pass(self, input_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        cache, batch = self.told
        _, num_blocks, _, block_size, _ = cache.keys.shape
        count, (num_seqs, width) = len(input_ids), batch.block_tables.shape
        counts = [num_blocks, block_size, count, num_seqs, width]
        self.group.send([*counts, batch.num_decodes, batch.max_seqlen_q])
        # A row a token, then a row a sequence.
        of_tokens = torch.stack((input_ids, positions, batch.slots), 1)
        ends, lens = batch.cu_seqlens_q[1:, None], batch.seq_lens[:, None]
        of_seqs = torch.cat((ends, lens, batch.block_tables), 1)
        self.group.broadcast(torch.cat((of_tokens.flatten(), of_seqs.flatten())))
        return self.model(input_ids, positions, attend)

    def score(self, hidden: Tensor) -> Tensor:
        self.group.send([hidden.shape[0]])
        return self.model.logits(
            self.group.broadcast(hidden.clone(memory_format=torch.contiguous_format))
        )

    def try_to(self, action: Callable[[], Any]) -> Any:
        if self.is_broken:
            raise RanksFailed("an earlier call has failed")
        try:
            result = action()
            is_fine = True
        except BaseException:
            is_fine = False
            raise
        finally:
            if not is_fine:
                self.is_broken = True
                self.group.abort()
        return result


def follow(model: Qwen, group: Group, make_attend: MakeAttend = paged_attend) -> None:
    torch.set_grad_enabled(False)
    weight, pools = model.embed_tokens.weight, []
    while order := group.receive():
        if len(order) == 1:
            rows = torch.empty(order[0], weight.shape[1], dtype=weight.dtype, device=weight.device)
            model.logits(group.broadcast(rows))
            continue
        num_blocks, block_size, count, num_seqs, width, num_decodes, longest = order
        if not pools:
            pools.append(paged_cache_for(model, num_blocks, block_size))
        told = torch.empty(3 * count + (2 + width) * num_seqs, dtype=torch.int64)
        told = group.broadcast(told.to(weight.device))
        input_ids, positions, slots = told[: 3 * count].view(count, 3).T.contiguous()
        of_seqs = told[3 * count :].view(num_seqs, 2 + width)
        ends, lens = of_seqs[:, :2].T.contiguous()
        batch = PagedBatch(
            slots,
            of_seqs[:, 2:].contiguous(),
            nn.functional.pad(ends, (1, 0)),
            lens,
            num_decodes,
            longest,
        )
        model(input_ids, positions, make_attend(pools[0], batch))


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
        self._processes = [self._start((rank, plan, file, share)) for rank in range(1, plan.size)]
        atexit.register(self.stop)
        try:
            torch.set_num_threads(share)
            self._wait_for("here")
            group = DistributedGroup(0, plan, file, self._explain, self._abort)
            model = _load_part(plan, config, group)
            self.leader = Leader(model, config, group, plan.make_attend)
            self._wait_for("ready")
        except BaseException:
            self.stop()
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
            [sys.executable, "-c", "from week3.tensor_parallel import run_rank; run_rank()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
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
            with self._changed:
                self._num_said[line.decode().strip()] += 1
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
    device = plan.device
    if device != "cpu":
        device = f"{device}:{group.rank}"
        torch.cuda.set_device(device)
    tensors = open_checkpoint(plan.folder, device)
    model = shard_model(tensors, config, group, plan.dtype)
    if plan.prepare is not None:
        plan.prepare(model)
    return model
