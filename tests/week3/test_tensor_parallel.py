"""Grades week3/tensor_parallel: a model whose matrices are spread over several ranks.

Most tests run the ranks as threads of this process. They meet in a stand-in for torch.distributed
that is as strict as that one, notes who calls what, and never waits for long.
"""

import contextlib
import itertools
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3Config, Qwen3ForCausalLM

from course.grading import (
    GradedFailure,
    LabUnusable,
    check_close,
    check_equal,
    check_raises,
    check_true,
    lab,
)

parallel = lab("week3/tensor_parallel")
qwen = lab("week1/qwen")
quantization = lab("week2/quantization")
paged = lab("week3/paged_attention")
engines = lab("week3/engine")

# How long a rank waits for the others; a thread that computes on a busy machine takes a while. Once
# one has waited in vain the lab is red, and a learner should not wait so long two hundred times.
SECONDS, SECONDS_AFTERWARDS = 4.0, 0.5
# Sums of a few parts of a matrix's products, through some layers.
TOLERANCE = 1e-4
MAX_LINES = 12


# Ranks as threads


class Patience:
    """How long the tests of this process wait for what does not come."""

    seconds = SECONDS


class Alone(RuntimeError):
    """The others do not come, or the group is over: what a rank of the stand-in gets then."""


class Meeting:
    """Where the ranks of a test meet: one collective at a time, in which all take part."""

    def __init__(self, size: int, of: str = ""):
        self.size, self.of = size, of or f"{size} ranks"
        self.changed = threading.Condition()
        self.calls: list[list[tuple[str, Any]]] = [[] for _ in range(size)]
        self.lines: list[str] = []
        self.gone: dict[int, str] = {}
        self.problem = ""
        self.num_aborts = 0
        self.is_over = False
        self.round = 0
        self.here: dict[int, tuple[str, Any]] = {}
        self.result: Any = None

    def __str__(self) -> str:
        before = len(self.lines) - MAX_LINES
        earlier = [f"  … {before} lines before"] if before > 0 else []
        return "\n".join([self.of, *earlier, *self.lines[-MAX_LINES:]])

    def meet(self, rank: int, what: str, value: Any) -> Any:
        """Take part in a collective; returns what it gives, the same for all ranks."""
        with self.changed:
            shown = f"{what} {tuple(value.shape)}" if isinstance(value, Tensor) else what
            self.lines.append(f"  rank {rank}: {shown}")
            if self.is_over:
                raise Alone("the group is over")
            if isinstance(value, Tensor) and not value.is_contiguous():
                self.fail(f"rank {rank} calls {what} with a tensor that is not contiguous")
            self.calls[rank].append((what, value))
            number = self.round
            self.here[rank] = what, value
            if len(self.here) == self.size:
                self.finish()
            self.wait(rank, what, number)
            return self.result

    def wait(self, rank: int, what: str, number: int) -> None:
        seconds = Patience.seconds
        until = time.monotonic() + seconds
        while self.round == number:
            if self.is_over:
                raise Alone(f"rank {rank} waits in {what}, and the group is over")
            missing = [r for r in range(self.size) if r not in self.here]
            ended = [f"rank {r} has {self.gone[r]}" for r in missing if r in self.gone]
            if ended or time.monotonic() > until:
                others = ", ".join(ended) or f"ranks {missing} have not come after {seconds:g} s"
                Patience.seconds = Patience.seconds if ended else SECONDS_AFTERWARDS
                self.fail(f"rank {rank} waits in {what}, and {others}")
            self.changed.wait(0.5)

    def fail(self, problem: str) -> None:
        """Note what is wrong with the ranks together, and let none of them wait."""
        self.problem = self.problem or problem
        self.is_over = True
        self.changed.notify_all()
        raise Alone(problem)

    def finish(self) -> None:
        kinds = {what.replace("send", "receive") for what, _ in self.here.values()}
        forms = {(tuple(x.shape), x.dtype) for _, x in self.here.values() if isinstance(x, Tensor)}
        if len(kinds) > 1 or len(forms) > 1:
            calls = [
                f"rank {r} {what} {(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else ''}"
                for r, (what, x) in sorted(self.here.items())
            ]
            self.fail("the ranks meet in different calls: " + ", ".join(calls))
        values = [self.here[rank][1] for rank in range(self.size)]
        self.result = {
            "all_reduce": lambda: torch.stack([x.detach() for x in values]).sum(0),
            "all_gather": lambda: torch.cat([x.detach() for x in values], -1),
            "broadcast": lambda: values[0].detach().clone(),
            "receive": lambda: list(values[0]),
        }[kinds.pop()]()
        self.here, self.round = {}, self.round + 1
        self.changed.notify_all()

    def leave(self, rank: int, how: str) -> None:
        with self.changed:
            self.gone[rank] = how
            self.lines.append(f"  rank {rank} has {how}")
            self.changed.notify_all()

    def names(self, rank: int = 0) -> list[str]:
        """Return which collectives a rank has called."""
        return [what for what, _ in self.calls[rank]]


class ThreadGroup:
    """One rank's `Group` of a meeting."""

    def __init__(self, meeting: Meeting, rank: int):
        self.meeting, self.rank, self.size = meeting, rank, meeting.size

    def all_reduce(self, x: Tensor) -> Tensor:
        return x.copy_(self.meeting.meet(self.rank, "all_reduce", x))

    def all_gather(self, x: Tensor) -> Tensor:
        return self.meeting.meet(self.rank, "all_gather", x).clone()

    def broadcast(self, x: Tensor) -> Tensor:
        return x.copy_(self.meeting.meet(self.rank, "broadcast", x))

    def send(self, numbers: Sequence[int]) -> None:
        check_true(self.rank == 0, f"rank {self.rank} sends", of=self.meeting)
        check_true(len(numbers) <= 8, f"{len(numbers)} numbers are sent at once", of=self.meeting)
        wrong = [n for n in numbers if not isinstance(n, int)]
        check_true(not wrong, f"what is sent are no ints: {wrong}", of=self.meeting)
        self.meeting.meet(self.rank, "send", list(numbers))

    def receive(self) -> list[int]:
        check_true(self.rank > 0, "rank 0 receives", of=self.meeting)
        return self.meeting.meet(self.rank, "receive", None)

    def abort(self) -> None:
        with self.meeting.changed:
            self.meeting.lines.append(f"  rank {self.rank}: abort")
            self.meeting.num_aborts += 1
            self.meeting.is_over = True
            self.meeting.changed.notify_all()


def on_ranks(meeting: Meeting, *functions: Callable[[Any], Any], fails: bool = False) -> list[Any]:
    """Call a function on each rank, with its group; returns what they return, by rank.

    functions: the last one is for all further ranks. fails: return errors, too.
    """
    results: list[Any] = [None] * meeting.size

    def run(rank: int) -> None:
        function = functions[min(rank, len(functions) - 1)]
        how = "returned"
        try:
            results[rank] = function(ThreadGroup(meeting, rank))
        except BaseException as error:
            results[rank], how = error, f"raised {error!r}"
        meeting.leave(rank, how)

    threads = [threading.Thread(target=run, args=(r,), daemon=True) for r in range(meeting.size)]
    for thread in threads:
        thread.start()
    for rank, thread in enumerate(threads):
        seconds = 3 * Patience.seconds
        thread.join(seconds)
        if thread.is_alive():
            Patience.seconds = SECONDS_AFTERWARDS
            with meeting.changed, contextlib.suppress(Alone):
                meeting.fail(f"rank {rank} has not ended after {seconds:g} s")
            raise GradedFailure(f"{meeting}\n{meeting.problem}", meeting.problem)
    tell_errors(meeting, results, fails)
    return results


def tell_errors(meeting: Meeting, results: Sequence[Any], fails: bool) -> None:
    """Raise what went wrong first: an error of the lab's own, or the ranks' not meeting."""
    errors = [error for error in results if isinstance(error, BaseException)]
    # A file that is not written, or cannot be used, is that and nothing else.
    for error in errors:
        if isinstance(error, (NotImplementedError, LabUnusable, GradedFailure)):
            raise error
    if fails:
        return
    for error in errors:
        if not isinstance(error, (Alone, parallel.RanksFailed)):
            raise error
    if meeting.problem:
        raise GradedFailure(f"{meeting}\n{meeting.problem}", meeting.problem)
    if errors:
        raise errors[0]


# Models


def shape(**values: Any) -> dict[str, Any]:
    """A config of transformers with every size of its own."""
    plain = {
        "vocab_size": 37,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "max_position_embeddings": 96,
        "tie_word_embeddings": False,
    }
    return plain | values


SHAPES = {
    "Qwen2, untied": shape(architecture="Qwen2", head_dim=6),
    "Qwen2, tied, 1 KV head": shape(
        architecture="Qwen2",
        head_dim=6,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        vocab_size=41,
    ),
    "Qwen3, untied": shape(architecture="Qwen3", num_attention_heads=8),
    "Qwen3, tied, as many KV heads as query heads": shape(
        architecture="Qwen3", num_key_value_heads=4, tie_word_embeddings=True, rope_theta=10.0
    ),
    "Qwen3, output bias, 5 tokens": shape(
        architecture="Qwen3", attention_bias=True, vocab_size=5, num_attention_heads=12
    ),
    "Qwen3, even vocabulary, 1 layer": shape(
        architecture="Qwen3",
        vocab_size=32,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=8,
        hidden_size=20,
    ),
}
SIZES = (1, 2, 4)


class Whole:
    """A model of transformers with random weights, and the same as a checkpoint."""

    def __init__(self, name: str, seed: int = 0):
        values = dict(SHAPES[name])
        architecture = values.pop("architecture")
        is_qwen2 = architecture == "Qwen2"
        if is_qwen2:
            del values["head_dim"]
        rope = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
        config = (Qwen2Config if is_qwen2 else Qwen3Config)(
            **values, rope_parameters=rope, attn_implementation="eager"
        )
        with torch.random.fork_rng():
            self.oracle = (Qwen2ForCausalLM if is_qwen2 else Qwen3ForCausalLM)(config).eval()
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in self.oracle.named_parameters():
            scale = 0.5 if parameter.dim() == 1 else 1.5 * parameter.shape[-1] ** -0.5
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
            if key.endswith("norm.weight"):
                parameter.data += 1.0
        self.oracle.requires_grad_(False)
        self.tensors = {key: x.clone() for key, x in self.oracle.state_dict().items()}
        if values["tie_word_embeddings"]:
            del self.tensors["lm_head.weight"]
        raw = {"architectures": [f"{architecture}ForCausalLM"], **values, **rope}
        raw.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
        self.name, self.raw = name, raw

    @property
    def config(self) -> Any:
        return qwen.QwenConfig.from_dict(self.raw)

    def hidden(self, token_ids: Sequence[int]) -> Tensor:
        """The hidden states of one sequence, behind the last norm."""
        with torch.no_grad():
            return self.oracle.model(torch.tensor([token_ids])).last_hidden_state[0]

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        with torch.no_grad():
            return self.oracle(torch.tensor([token_ids])).logits[0]


MODELS: dict[tuple[str, int], Whole] = {}


def whole(name: str, seed: int = 0) -> Whole:
    if (name, seed) not in MODELS:
        MODELS[name, seed] = Whole(name, seed)
    return MODELS[name, seed]


class Lazy:
    """A tensor in a file that counts how much of it is read."""

    def __init__(self, tensor: Tensor):
        self.tensor, self.num_read, self.num_calls = tensor, 0, 0

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def __getitem__(self, index: Any) -> Tensor:
        part = self.tensor[index]
        self.num_read, self.num_calls = self.num_read + part.numel(), self.num_calls + 1
        return part.clone()


def lazy(tensors: dict[str, Tensor]) -> dict[str, Lazy]:
    return {name: Lazy(tensor) for name, tensor in tensors.items()}


def part_of(model: Whole, group: Any, dtype: torch.dtype = torch.float32) -> Any:
    return parallel.shard_model(lazy(model.tensors), model.config, group, dtype)


def rows_of(model: Whole, rank: int, size: int) -> dict[str, list[int]]:
    """Which heads, entries and ids a rank has, counted one by one."""
    raw = model.raw
    heads, kv_heads = raw["num_attention_heads"], raw["num_key_value_heads"]
    own = list(range(heads))[rank * heads // size : (rank + 1) * heads // size]
    inner = raw["intermediate_size"] // size
    rows = -(-raw["vocab_size"] // size)
    return {
        "q": own,
        "kv": sorted({head // (heads // kv_heads) for head in own}),
        "inner": list(range(rank * inner, (rank + 1) * inner)),
        "ids": [i for i in range(rank * rows, (rank + 1) * rows) if i < raw["vocab_size"]],
        "num_rows": rows,
    }


def expected_part(model: Whole, name: str, rank: int, size: int) -> Tensor:
    """A rank's part of a tensor, without the rows that stand for no token."""
    tensor, rows = model.tensors[name], rows_of(model, rank, size)
    head_dim = model.raw["head_dim"]

    def heads(which: str) -> list[int]:
        return [head * head_dim + i for head in rows[which] for i in range(head_dim)]

    if "embed_tokens" in name or "lm_head" in name:
        return tensor[rows["ids"]]
    if "q_proj" in name:
        return tensor[heads("q")]
    if "k_proj" in name or "v_proj" in name:
        return tensor[heads("kv")]
    if "o_proj.weight" in name:
        return tensor[:, heads("q")]
    if "gate_proj" in name or "up_proj" in name:
        return tensor[rows["inner"]]
    if "down_proj" in name:
        return tensor[:, rows["inner"]]
    return tensor


CASES = [(name, size) for name in SHAPES for size in SIZES]


# What a rank has


@pytest.mark.parametrize("name, size", CASES)
def test_shard_config(name, size):
    model = whole(name)
    rows = rows_of(model, 0, size)
    got = parallel.shard_config(model.config, size)
    check_equal(got.num_attention_heads, len(rows["q"]), "num_attention_heads")
    check_equal(got.num_key_value_heads, len(rows["kv"]), "num_key_value_heads")
    check_equal(got.intermediate_size, len(rows["inner"]), "intermediate_size")
    check_equal(got.vocab_size, rows["num_rows"], "vocab_size")
    whole_again = replace(
        got,
        **{
            field: model.raw[field]
            for field in (
                "num_attention_heads",
                "num_key_value_heads",
                "intermediate_size",
                "vocab_size",
            )
        },
    )
    check_equal(whole_again == model.config, True, "all other fields are the model's")


@pytest.mark.parametrize(
    "values, size, mentions",
    [
        ({}, 0, [0]),
        ({}, -1, [-1]),
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, 4, ["num_attention_heads", 6, 4]),
        ({"intermediate_size": 42}, 4, ["intermediate_size", 42, 4]),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 3},
            4,
            ["num_key_value_heads", 3, 4],
        ),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 6},
            4,
            ["num_key_value_heads", 6, 4],
        ),
    ],
    ids=["no rank", "less than none", "heads", "inner", "3 KV heads", "6 KV heads"],
)
def test_what_does_not_divide_is_refused(values, size, mentions):
    config = replace(whole("Qwen3, untied").config, **values)
    check_raises(ValueError, parallel.shard_config, config, size, mentions=mentions)
    if size > 0:
        name = "model.layers.0.self_attn.q_proj.weight"
        check_raises(ValueError, parallel.shard_slices, name, config, 0, size, mentions=mentions)


@pytest.mark.parametrize("name, size", CASES)
def test_shard_slices(name, size):
    model = whole(name)
    for key, rank in itertools.product(model.tensors, range(size)):
        index = parallel.shard_slices(key, model.config, rank, size)
        of = f"shard_slices({key!r}, config of {name!r}, rank {rank}, size {size}) → {index}"
        right = isinstance(index, tuple) and all(isinstance(part, slice) for part in index)
        check_true(right, "it is no tuple of slices", of=of)
        check_close(model.tensors[key][index], expected_part(model, key, rank, size), of=of)


def test_shard_slices_of_other_names():
    model = whole("Qwen3, untied")
    for key in ("rotary.table", "model.layers.1.self_attn.sinks", "model.norm.weight", "x"):
        for rank in range(2):
            index = parallel.shard_slices(key, model.config, rank, 2)
            check_close(torch.arange(12.0)[index], torch.arange(12.0), of=f"the slices of {key!r}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, size", CASES)
def test_read_shard(name, size, dtype):
    model = whole(name)
    for rank in range(size):
        tensors = lazy(model.tensors)
        got = parallel.read_shard(tensors, model.config, rank, size, dtype)
        of = f"read_shard of {name!r}, rank {rank} of {size}"
        check_equal(sorted(got), sorted(model.tensors), "the names", of=of)
        for key, tensor in tensors.items():
            expected = expected_part(model, key, rank, size)
            of_key = f"{of}: {key!r} {tuple(tensor.tensor.shape)}"
            check_true(
                tensor.num_read == expected.numel(),
                f"{tensor.num_read} entries were read, this rank needs {expected.numel()}",
                of=of_key,
            )
            check_true(tensor.num_calls <= 1, f"it was indexed {tensor.num_calls} times", of=of_key)
            if key in ("model.embed_tokens.weight", "lm_head.weight"):
                missing = rows_of(model, rank, size)["num_rows"] - len(expected)
                expected = torch.cat([expected, torch.zeros(missing, expected.shape[1])])
            check_close(got[key], expected.to(dtype), tolerance=0.0, of=of_key)


def test_read_shard_leaves_a_head_alone_that_is_not_used():
    model = whole("Qwen2, tied, 1 KV head")
    tensors = lazy(model.tensors)
    tensors["lm_head.weight"] = Lazy(torch.full((41, 24), torch.nan))
    parallel.read_shard(tensors, model.config, 1, 2)
    check_equal(tensors["lm_head.weight"].num_calls, 0, "how often the head was indexed")


def broken(tensors: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor], list[str]]]:
    """Checkpoints that do not fit, in words, and what an error has to name."""
    key = "model.layers.1.mlp.down_proj.weight"
    without = {name: x for name, x in tensors.items() if name != key}
    yield "one is missing", without, [key]
    yield "one too many", {**tensors, "model.extra.weight": torch.ones(2)}, ["model.extra.weight"]
    for change in (-1, 1, 8):
        for name, axis in (
            (key, 1),
            ("model.embed_tokens.weight", 0),
            ("model.layers.0.self_attn.q_proj.weight", 0),
            ("model.norm.weight", 0),
        ):
            sizes = list(tensors[name].shape)
            sizes[axis] += change
            yield f"{name} has {sizes}", {**tensors, name: torch.ones(sizes)}, [name, tuple(sizes)]


def test_read_shard_refuses_what_does_not_fit_before_it_reads():
    model = whole("Qwen3, untied")
    for what, tensors, mentions in broken(model.tensors):
        for rank in range(2):
            files = lazy(tensors)
            arguments = files, model.config, rank, 2
            check_raises(ValueError, parallel.read_shard, *arguments, mentions=mentions)
            read = [key for key, tensor in files.items() if tensor.num_calls]
            check_equal(read, [], "what was read", of=f"read_shard, {what}")


def write_checkpoint(model: Whole, folder: Any) -> None:
    """Write config.json and the weights into two files with an index."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.raw))
    names = sorted(model.tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in files.items():
        save_file({key: model.tensors[key] for key in keys}, folder / file)
    index = {"weight_map": {key: file for file, keys in files.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["Qwen3, output bias, 5 tokens", "Qwen2, tied, 1 KV head"])
def test_read_shard_from_files(tmp_path, name):
    model = whole(name)
    write_checkpoint(model, tmp_path / "model")
    tensors = parallel.open_checkpoint(tmp_path / "model", "cpu")
    for rank in range(4):
        got = parallel.read_shard(tensors, model.config, rank, 4)
        for key, part in got.items():
            expected = expected_part(model, key, rank, 4)
            of = f"read_shard from files, rank {rank} of 4: {key!r}"
            check_close(part[: len(expected)], expected, tolerance=0.0, of=of)


# Three modules


def of_linear(matrix: Tensor, bias: Tensor | None = None) -> nn.Linear:
    linear = nn.Linear(*reversed(matrix.shape), bias=bias is not None)
    linear.weight = nn.Parameter(matrix.clone(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return linear


def random_of(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*sizes, generator=generator)
    x.flatten()[:: max(1, x.numel() // 3)] *= 20.0
    return x.to(dtype)


def one_collective(meeting: Meeting) -> None:
    for rank in range(meeting.size):
        of = f"{meeting}\nrank {rank}"
        check_equal(len(meeting.names(rank)), 1, "how many collectives one call has", of=of)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("size, sizes", [(1, (3,)), (2, ()), (3, (2, 5)), (4, (1, 1)), (2, (0,))])
def test_row_parallel_linear(size, sizes, has_bias, dtype):
    width, out = 6, 7
    matrix, bias = random_of(out, size * width, dtype=dtype), 40 * random_of(out, seed=1)
    x = random_of(*sizes, size * width, seed=2, dtype=dtype)
    of = f"RowParallelLinear on {size} ranks, x {tuple(x.shape)} {dtype}, bias: {has_bias}"
    meeting = Meeting(size, of)

    def run(group: Any) -> Tensor:
        own = slice(group.rank * width, (group.rank + 1) * width)
        linear = of_linear(matrix[:, own], bias.to(dtype) if has_bias else None)
        module = parallel.RowParallelLinear(linear, group)
        part = x[..., own].clone()
        kept = part.clone()
        got = module(part)
        check_equal(torch.equal(part, kept), True, "x is as it was", of=of)
        return got

    expected = x.double() @ matrix.double().T + (bias.to(dtype).double() if has_bias else 0.0)
    tolerance = TOLERANCE if dtype == torch.float32 else 4e-2
    results = on_ranks(meeting, run)
    for rank, got in enumerate(results):
        check_close(got, expected.to(dtype), tolerance=tolerance, of=f"{of}: rank {rank}")
        same = torch.equal(got, results[0])
        check_true(same, f"ranks 0 and {rank} have got different bits", of=of)
    one_collective(meeting)


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
def test_row_parallel_linear_has_a_linear_to_replace(has_bias):
    matrix, bias = random_of(5, 8), random_of(5, seed=1)
    meeting = Meeting(2, f"RowParallelLinear whose torch.nn.Linear is replaced, bias: {has_bias}")

    def run(group: Any) -> Tensor:
        linear = of_linear(matrix[:, 4 * group.rank :][:, :4], bias if has_bias else None)
        module = parallel.RowParallelLinear(linear, group)
        found = [(n, c) for n, c in module.named_children() if isinstance(c, nn.Linear)]
        check_equal(len(found), 1, "how many of its children are torch.nn.Linear", of=meeting)
        (name, inner), *_ = found
        check_true(inner.bias is None, "the torch.nn.Linear in it has a bias", of=meeting)
        setattr(module, name, of_linear(-inner.weight))
        return module(torch.ones(3, 4))

    expected = -matrix.sum(1).expand(3, 5) + (bias if has_bias else 0.0)
    for got in on_ranks(meeting, run):
        check_close(got, expected, tolerance=TOLERANCE, of=meeting)


@pytest.mark.parametrize(
    "size, vocab_size, ids",
    [
        (1, 5, [[0, 4], [3, 3]]),
        (2, 7, [6, 0, 3, 4, 4, 0]),
        (4, 5, [0, 1, 2, 3, 4]),
        (4, 13, [[12], [0], [4]]),
        (4, 4, [3, 0, 2]),
        (3, 9, 8),
        (2, 6, []),
    ],
    ids=str,
)
def test_vocab_parallel_embedding(size, vocab_size, ids):
    table, input_ids = random_of(vocab_size, 6), torch.tensor(ids, dtype=torch.int64)
    rows = -(-vocab_size // size)
    of = f"VocabParallelEmbedding of {vocab_size} tokens on {size} ranks, ids {ids}"
    meeting = Meeting(size, of)

    def run(group: Any) -> Tensor:
        own = torch.zeros(rows, 6)
        here = table[group.rank * rows : (group.rank + 1) * rows]
        own[: len(here)] = here
        embedding = nn.Embedding.from_pretrained(own)
        module = parallel.VocabParallelEmbedding(embedding, group)
        check_true(module.weight is embedding.weight, "weight is another Parameter", of=of)
        got = module(input_ids)
        check_equal(input_ids.tolist(), ids, "the ids are as they were", of=of)
        return got

    for rank, got in enumerate(on_ranks(meeting, run)):
        check_close(got, table[input_ids], tolerance=0.0, of=f"{of}: rank {rank}")
    one_collective(meeting)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_vocab_parallel_embedding_beside_rows_that_are_not_finite(bad):
    table = random_of(8, 3)
    ids = torch.tensor([1, 6, 2, 5])
    used = table[ids]
    table[[0, 3, 4, 7]] = bad
    meeting = Meeting(2, f"VocabParallelEmbedding, {bad} in the rows of other ids")

    def run(group: Any) -> Tensor:
        embedding = nn.Embedding.from_pretrained(table[4 * group.rank :][:4])
        return parallel.VocabParallelEmbedding(embedding, group)(ids)

    for got in on_ranks(meeting, run):
        check_close(got, used, tolerance=0.0, of=meeting)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "size, vocab_size, sizes",
    [(1, 5, (2,)), (2, 7, ()), (4, 5, (3,)), (4, 13, (2, 2)), (2, 6, (0,))],
)
def test_parallel_head(size, vocab_size, sizes, dtype):
    matrix, hidden = (
        random_of(vocab_size, 6, dtype=dtype),
        random_of(*sizes, 6, seed=3, dtype=dtype),
    )
    rows = -(-vocab_size // size)
    of = f"ParallelHead of {vocab_size} tokens on {size} ranks, hidden {tuple(hidden.shape)}"
    meeting = Meeting(size, of)

    def run(group: Any) -> Tensor:
        # Rows that stand for no token hold what would win.
        own = torch.full((rows, 6), 1e4, dtype=dtype)
        here = matrix[group.rank * rows : (group.rank + 1) * rows]
        own[: len(here)] = here
        linear = of_linear(own)
        module = parallel.ParallelHead(linear, vocab_size, group)
        check_true(module.weight is linear.weight, "weight is another Parameter", of=of)
        kept = hidden.clone()
        got = module(hidden)
        check_equal(torch.equal(hidden, kept), True, "hidden is as it was", of=of)
        return got

    expected = (hidden.double() @ matrix.double().T).to(dtype)
    for rank, got in enumerate(on_ranks(meeting, run)):
        check_close(got, expected, of=f"{of}: rank {rank}")
    one_collective(meeting)


# A whole model


def attend_as(model: Whole) -> Callable:
    """An `Attend` for one sequence, on whatever heads a rank has."""

    def attend(layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[-3] // k.shape[-3]
        k, v = (x.repeat_interleave(group, -3) for x in (k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend


def ids_of(model: Whole, count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    vocab_size = model.raw["vocab_size"]
    # The last tokens are those of the rank that has fewer.
    return [
        vocab_size - 1 - i % vocab_size if i < 3 else rng.randrange(vocab_size)
        for i in range(count)
    ]


@pytest.mark.parametrize("name, size", CASES)
def test_all_ranks_compute_what_the_whole_model_does(name, size):
    model, token_ids = whole(name), ids_of(whole(name), 9)
    of = f"shard_model of {name!r} on {size} ranks"
    meeting = Meeting(size, of)

    def run(group: Any) -> tuple[Tensor, Tensor]:
        part = part_of(model, group)
        hidden = part(torch.tensor(token_ids), torch.arange(9), attend_as(model))
        return hidden, part.logits(hidden)

    results = on_ranks(meeting, run)
    for rank, (hidden, logits) in enumerate(results):
        check_close(
            hidden, model.hidden(token_ids), tolerance=TOLERANCE, of=f"{of}: hidden, rank {rank}"
        )
        check_close(
            logits, model.logits(token_ids), tolerance=TOLERANCE, of=f"{of}: logits, rank {rank}"
        )
        same = torch.equal(hidden, results[0][0]) and torch.equal(logits, results[0][1])
        check_true(same, f"ranks 0 and {rank} have got different bits", of=of)
    num_layers = model.raw["num_hidden_layers"]
    num_calls = len(meeting.names())
    check_equal(num_calls, 2 + 2 * num_layers, "collectives of a pass and its logits", of=of)


@pytest.mark.parametrize("name, size", CASES)
def test_what_shard_model_returns(name, size):
    model = whole(name)
    meeting = Meeting(size, f"shard_model of {name!r} on {size} ranks")
    for rank, part in enumerate(on_ranks(meeting, lambda group: part_of(model, group))):
        of = f"{meeting.of}: rank {rank}"
        check_true(isinstance(part, qwen.Qwen), f"it is a {type(part).__name__}, no Qwen", of=of)
        config = parallel.shard_config(model.config, size)
        check_equal(part.config == config, True, "config is that of shard_config", of=of)
        check_equal(part.training, False, "training", of=of)
        grads = [key for key, x in part.named_parameters() if x.requires_grad]
        check_equal(grads, [], "parameters that need a gradient", of=of)
        is_tied = part.lm_head.weight is part.embed_tokens.weight
        check_equal(is_tied, model.raw["tie_word_embeddings"], "one Parameter for both", of=of)
        for index, layer in enumerate(part.layers):
            attention, mlp = layer.self_attn, layer.mlp
            for row in (attention.o_proj, mlp.down_proj):
                right = isinstance(row, parallel.RowParallelLinear)
                check_true(right, f"layer {index} has a {type(row).__name__}", of=of)
            plain = attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj
            right = all(type(linear) is nn.Linear for linear in plain)
            check_true(right, f"layer {index} has other projections than nn.Linear", of=of)


def test_shard_model_initialises_nothing(monkeypatch):
    made = []
    for name in ("kaiming_uniform_", "normal_", "uniform_"):
        former = getattr(nn.init, name)

        def note(tensor, *args, _former=former, **options):
            if tensor.device.type != "meta":
                made.append(tuple(tensor.shape))
            return _former(tensor, *args, **options)

        monkeypatch.setattr(nn.init, name, note)
    model = whole("Qwen3, untied")
    on_ranks(Meeting(2), lambda group: part_of(model, group))
    check_equal(made, [], "weights that were initialised", of="shard_model on 2 ranks")


def test_shard_model_in_bfloat16():
    model, token_ids = whole("Qwen3, untied"), ids_of(whole("Qwen3, untied"), 6)
    meeting = Meeting(2, "shard_model in bfloat16 on 2 ranks")

    def run(group: Any) -> Tensor:
        part = part_of(model, group, torch.bfloat16)
        kinds = {str(x.dtype) for x in part.parameters()}
        check_equal(kinds, {"torch.bfloat16"}, "dtypes of the parameters", of=meeting)
        return part.logits(part(torch.tensor(token_ids), torch.arange(6), attend_as(model)))

    for got in on_ranks(meeting, run):
        check_close(got, model.logits(token_ids), tolerance=0.2, of=meeting)


@pytest.mark.parametrize("rank_of", [0, 1])
def test_shard_model_refuses_what_does_not_fit(rank_of):
    model = whole("Qwen3, untied")
    for _, tensors, mentions in itertools.islice(broken(model.tensors), 3):
        group = ThreadGroup(Meeting(2), rank_of)
        arguments = lazy(tensors), model.config, group
        check_raises(ValueError, parallel.shard_model, *arguments, mentions=mentions)
    group = ThreadGroup(Meeting(3), rank_of)
    arguments = lazy(model.tensors), model.config, group
    check_raises(ValueError, parallel.shard_model, *arguments, mentions=[8, 3])


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_part_can_be_quantized(kind):
    name = "Qwen3, output bias, 5 tokens"
    model, token_ids = whole(name), ids_of(whole(name), 7)
    meeting = Meeting(2, f"quantize_model({kind!r}) on each of 2 ranks, {name}")

    def run(group: Any) -> tuple[Tensor, int]:
        part = part_of(model, group, torch.bfloat16)
        quantization.quantize_model(part, kind, 16)
        left = [type(m).__name__ for m in part.layers.modules() if isinstance(m, nn.Linear)]
        hidden = part(torch.tensor(token_ids), torch.arange(7), attend_as(model))
        return hidden, len(left)

    for hidden, left in on_ranks(meeting, run):
        check_equal(left, 0, "how many torch.nn.Linear are left in the layers", of=meeting)
        expected = model.hidden(token_ids)
        error = float((hidden - expected).norm() / expected.norm())
        limit = 0.1 if kind == "int8" else 0.6
        check_true(error < limit, f"the error is {error:.2f} of the hidden states", of=meeting)


# The leader, and who follows


class Noted:
    """A make_attend that notes what it is called with, and lets the tested one attend."""

    def __init__(self, fails_at: int | None = None):
        self.calls: list[tuple[Any, Any, bool]] = []
        self.fails_at = fails_at

    def __call__(self, cache: Any, batch: Any) -> Callable:
        copied = {
            name: value for name, value in vars(batch).items() if not isinstance(value, Tensor)
        }
        copied |= {n: v.clone() for n, v in vars(batch).items() if isinstance(v, Tensor)}
        self.calls.append((cache, SimpleNamespace(**copied), torch.is_grad_enabled()))
        attend = paged.paged_attend(cache, batch)
        number = len(self.calls) - 1

        def attended(layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if number == self.fails_at:
                raise ToldToFail("the attention was told to fail")
            return attend(layer_index, q, k, v)

        return attended


class ToldToFail(Exception):
    """What a part of a test raises because it was told to."""


def batch_of(sequences: Sequence[tuple[Sequence[int], int]], block_size: int) -> Any:
    """A batch of sequences: the blocks of each, and (how many tokens it has, how many are new)."""
    sequences = sorted(sequences, key=lambda one: one[1][1] > 1)
    slots, positions, seq_lens, ends = [], [], [], [0]
    width = max(len(table) for table, _ in sequences)
    for table, (length, count) in sequences:
        here = range(length - count, length)
        positions += here
        slots += [table[i // block_size] * block_size + i % block_size for i in here]
        seq_lens.append(length)
        ends.append(ends[-1] + count)
    counts = [count for _, (_, count) in sequences]
    batch = paged.PagedBatch(
        torch.tensor(slots),
        torch.tensor([[*table, *[0] * (width - len(table))] for table, _ in sequences]),
        torch.tensor(ends),
        torch.tensor(seq_lens),
        num_decodes=sum(count == 1 for count in counts),
        max_seqlen_q=max(counts),
    )
    return torch.tensor(positions), batch


BLOCK_SIZE = 4
# Sequence 0 and 1, and what of them each pass computes: (its blocks, (length, new tokens)).
TABLES = [5, 1, 7, 2], [3, 6, 0]
PASSES = (
    [(0, (6, 6))],
    [(0, (7, 1)), (1, (3, 3))],
    [(0, (8, 1)), (1, (4, 1))],
    [(0, (12, 4)), (1, (9, 5))],
    [(1, (10, 1))],
)


class Followed:
    """A leader, and ranks that follow; the passes of PASSES as an engine would make them."""

    def __init__(self, name: str, size: int, dtype: torch.dtype = torch.float32):
        self.model, self.dtype = whole(name), dtype
        self.ids = [ids_of(self.model, 12), ids_of(self.model, 12, seed=1)]
        self.meeting = Meeting(size, f"Leader and follow on {size} ranks, {name}")
        self.noted = [Noted() for _ in range(size)]
        self.num_follows = 0
        self.at_start = [0] * size

    def run(self, lead: Callable[[Any], Any], fails: bool = False) -> list[Any]:
        def rank_0(group: Any) -> Any:
            part = self.part = part_of(self.model, group, self.dtype)
            return lead(parallel.Leader(part, self.model.config, group, self.noted[0]))

        def other(group: Any) -> None:
            part = part_of(self.model, group, self.dtype)
            return parallel.follow(part, group, self.noted[group.rank])

        return on_ranks(self.meeting, rank_0, other, fails=fails)

    def pool(self, leader: Any, num_blocks: int = 9) -> Any:
        return paged.paged_cache_for(leader, num_blocks, BLOCK_SIZE)

    def make(self, leader: Any, cache: Any, number: int) -> tuple[Tensor, list[tuple[int, int]]]:
        """Let the leader make a pass; returns the hidden states, and whose each of them is."""
        parts = sorted(PASSES[number], key=lambda part: part[1][1] > 1)
        positions, batch = batch_of([(TABLES[who], what) for who, what in parts], BLOCK_SIZE)
        rows = [(who, i) for who, (length, new) in parts for i in range(length - new, length)]
        input_ids = torch.tensor([self.ids[who][i] for who, i in rows])
        kept = input_ids.clone(), positions.clone()
        with torch.inference_mode():
            hidden = leader(input_ids, positions, leader.attend(cache, batch))
        check_true(
            torch.equal(input_ids, kept[0]) and torch.equal(positions, kept[1]),
            "ids or positions were changed",
            of=self.meeting,
        )
        return hidden, rows


@pytest.mark.parametrize("name, size", CASES)
def test_a_leader_computes_what_the_whole_model_does(name, size):
    followed = Followed(name, size)
    model, of = followed.model, followed.meeting
    expected = [model.hidden(ids) for ids in followed.ids]
    scores = [model.logits(ids) for ids in followed.ids]

    def lead(leader: Any) -> None:
        cache = followed.pool(leader)
        for number in range(len(PASSES)):
            hidden, rows = followed.make(leader, cache, number)
            want = torch.stack([expected[who][i] for who, i in rows])
            check_close(hidden, want, tolerance=TOLERANCE, of=f"{of}: pass {number}")
            # Not contiguous, as rows that somebody has picked may be.
            picked = hidden.flip(0)[::2] if number % 2 else hidden.T.contiguous().T
            kept = picked.clone()
            with torch.inference_mode():
                got = leader.logits(picked)
            want = torch.stack([scores[who][i] for who, i in rows])
            want = want.flip(0)[::2] if number % 2 else want
            check_close(got, want, tolerance=TOLERANCE, of=f"{of}: logits of pass {number}")
            check_equal(torch.equal(picked, kept), True, "hidden is as it was", of=of)
        leader.stop()

    followed.run(lead)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_a_leader_says_of_itself(size):
    followed = Followed("Qwen2, untied", size)
    model, of = followed.model, followed.meeting

    def lead(leader: Any) -> None:
        heads = len(rows_of(model, 0, size)["kv"])
        check_equal(leader.config.num_key_value_heads, heads, "num_key_value_heads", of=of)
        rest = replace(leader.config, num_key_value_heads=model.raw["num_key_value_heads"])
        check_equal(rest == model.config, True, "all else of config is the model's", of=of)
        rows = rows_of(model, 0, size)["num_rows"]
        check_equal(len(leader.embed_tokens.weight), rows, "rows of embed_tokens.weight", of=of)
        leader.stop()

    followed.run(lead)


@pytest.mark.parametrize("size", [2, 4])
def test_what_a_pass_costs(size):
    followed = Followed("Qwen3, untied", size)

    def lead(leader: Any) -> tuple[list[str], list[str], list[str]]:
        cache = followed.pool(leader)
        names, costs = followed.meeting.names(0), []
        followed.make(leader, cache, 0)
        for number in (1, 3):
            names = followed.meeting.names(0)
            hidden, _ = followed.make(leader, cache, number)
            costs.append(followed.meeting.names(0)[len(names) :])
        names = followed.meeting.names(0)
        with torch.inference_mode():
            leader.logits(hidden)
        costs.append(followed.meeting.names(0)[len(names) :])
        names = followed.meeting.names(0)
        leader.stop()
        costs.append(followed.meeting.names(0)[len(names) :])
        return costs

    *passes, logits, stop = followed.run(lead)[0]
    of = followed.meeting
    for cost in passes:
        check_equal(cost[:2], ["send", "broadcast"], "how a pass begins", of=of)
        check_equal(len(cost), 2 + 5, f"how many collectives a pass has: {cost}", of=of)
    check_equal(logits[:2], ["send", "broadcast"], "how logits begin", of=of)
    check_equal(len(logits), 2 + 1, f"how many collectives logits have: {logits}", of=of)
    check_equal(stop, ["send"], "the collectives of stop", of=of)
    told = [x for what, x in of.calls[0] if what == "broadcast" and not x.is_floating_point()]
    kinds = {(str(x.dtype), x.dim()) for x in told}
    check_equal(kinds, {("torch.int64", 1)}, "dtype and axes of what a pass broadcasts", of=of)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["Qwen3, untied", "Qwen2, tied, 1 KV head"])
def test_every_rank_attends_over_its_part_of_the_same_batch(name, dtype):
    followed = Followed(name, 4, dtype)
    of = followed.meeting
    pools = []

    def lead(leader: Any) -> None:
        pools.append(followed.pool(leader, 11))
        for number in range(len(PASSES)):
            followed.make(leader, pools[0], number)
        leader.stop()

    followed.run(lead)
    check_true(followed.noted[0].calls[0][0] is pools[0], "rank 0 has another pool", of=of)
    heads = len(rows_of(followed.model, 0, 4)["kv"])
    for rank, noted in enumerate(followed.noted):
        of_rank = f"{of}\nrank {rank}"
        check_equal(len(noted.calls), len(PASSES), "calls of make_attend", of=of_rank)
        caches = {id(cache) for cache, _, _ in noted.calls}
        check_equal(len(caches), 1, "how many pools it has had", of=of_rank)
        keys = noted.calls[0][0].keys
        form = tuple(keys.shape), str(keys.dtype)
        layers, head_dim = followed.model.raw["num_hidden_layers"], followed.model.raw["head_dim"]
        expected = (layers, 11, heads, BLOCK_SIZE, head_dim), str(dtype)
        check_equal(form, expected, "shape and dtype of its keys", of=of_rank)
        check_true(
            not any(flag for _, _, flag in noted.calls), "gradients are recorded", of=of_rank
        )
        for (_, got, _), (_, right, _) in zip(noted.calls, followed.noted[0].calls, strict=True):
            for field, value in vars(right).items():
                same = vars(got)[field]
                what = f"{field} of the batch"
                check_equal(same, value, what, of=of_rank)


class Letters:
    """A tokenizer that decodes every id to one letter."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(0x100 + i) for i in token_ids)


@pytest.mark.parametrize(
    "name, size",
    [("Qwen3, untied", 2), ("Qwen2, tied, 1 KV head", 4), ("Qwen3, output bias, 5 tokens", 2)],
)
def test_an_engine_over_a_leader(name, size):
    """100 requests in a pool that is too small for those who run: greedy, or drawn with a seed."""
    followed = Followed(name, size)
    model, of = followed.model, followed.meeting
    rng = random.Random(size)
    vocab_size = model.raw["vocab_size"]
    starts = [[rng.randrange(vocab_size) for _ in range(9)] for _ in range(3)]
    prompts = [
        [*rng.choice(starts), *(rng.randrange(vocab_size) for _ in range(rng.randrange(1, 9)))]
        for _ in range(100)
    ]
    wanted = [
        engines.GenerationParams(
            max_tokens=1 + i % 9, temperature=0.0 if i % 5 else 1.0, seed=i, ignore_eos=True
        )
        for i in range(100)
    ]

    def lead(leader: Any) -> Any:
        limits = engines.EngineLimits(
            15, 40, max_num_seqs=5, token_budget=24, block_size=BLOCK_SIZE
        )
        llm = engines.LLM(leader, Letters(), (0,), limits, leader.attend)
        completions = llm.generate(prompts, wanted)
        counts = llm.engine.scheduler.num_preemptions, llm.engine.scheduler.num_cached_tokens
        leader.stop()
        return [completion.token_ids for completion in completions], counts

    (answers, (num_preempted, num_cached)), *_ = followed.run(lead)
    check_true(num_preempted > 0, "nobody was preempted: this test tests nothing", of=of)
    check_true(num_cached > 0, "no beginning was found again: this test tests nothing", of=of)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if i % 5:
            check_greedy(model, prompt, answer, f"{of.of}: request {i}, prompt {prompt}")
    alone = Followed(name, 1).run(lead)[0][0]
    check_equal(answers, alone, "the tokens of all requests, compared with one rank's", of=of.of)


def check_greedy(model: Whole, prompt: Sequence[int], answer: Sequence[int], of: str) -> None:
    """Hold every token of an answer to being the most likely one, as far as that is clear."""
    logits = model.logits([*prompt, *answer[:-1]])[len(prompt) - 1 :]
    best, second = logits.topk(2).values.T
    for i, token_id in enumerate(answer):
        is_clear = float(best[i] - second[i]) > 1e-3 * float(logits[i].abs().max())
        if is_clear:
            expected = int(logits[i].argmax())
            check_equal(token_id, expected, f"token {i} of the answer {answer}", of=of)


# When something breaks


@pytest.mark.parametrize("error", [ToldToFail("boom"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("where", ["pass", "logits"])
def test_a_leader_whose_part_fails_ends_the_group(where, error):
    followed = Followed("Qwen3, untied", 2)
    of = followed.meeting

    def lead(leader: Any) -> int:
        cache = followed.pool(leader)
        hidden, _ = followed.make(leader, cache, 0)
        target = followed.part.embed_tokens if where == "pass" else followed.part.lm_head

        def fail(*_: Any, **__: Any) -> None:
            raise error

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, "forward", fail)
            try:
                if where == "pass":
                    followed.make(leader, cache, 1)
                else:
                    with torch.inference_mode():
                        leader.logits(hidden)
            except type(error):
                pass
            else:
                check_true(False, f"the error of the {where} was not raised", of=of)
        check_equal(of.num_aborts, 1, f"aborts after {error!r} in rank 0's {where}", of=of)
        num_calls = len(of.calls[0])
        for what, action in (
            ("a pass", lambda: followed.make(leader, cache, 1)),
            ("logits", lambda: leader.logits(hidden)),
            ("stop", leader.stop),
        ):
            try:
                action()
            except parallel.RanksFailed:
                continue
            except Alone:
                check_true(False, f"{what} after an error is a collective", of=of)
            check_true(False, f"{what} after an error did not raise RanksFailed", of=of)
        return len(of.calls[0]) - num_calls

    num_calls, other = followed.run(lead, fails=True)
    if isinstance(num_calls, BaseException):
        raise num_calls
    check_equal(num_calls, 0, "collectives after an error", of=of)
    check_true(isinstance(other, Alone), f"rank 1 has ended with {other!r}", of=of)


@pytest.mark.parametrize("number", [0, 2])
def test_a_leader_that_loses_a_rank(number):
    """Rank 1 raises in a pass: follow lets it out, and the leader's collective fails."""
    followed = Followed("Qwen3, untied", 2)
    followed.noted[1].fails_at = number
    of = followed.meeting

    def lead(leader: Any) -> str:
        cache = followed.pool(leader)
        for one in range(number):
            followed.make(leader, cache, one)
        try:
            followed.make(leader, cache, number)
        except Alone:
            pass
        else:
            check_true(False, "the error of the collective was not raised", of=of)
        check_equal(of.num_aborts, 1, "aborts after a collective has failed", of=of)
        try:
            followed.make(leader, cache, number)
        except parallel.RanksFailed as error:
            return str(error)
        check_true(False, "a pass after an error did not raise RanksFailed", of=of)

    text, other = followed.run(lead, fails=True)
    if isinstance(text, BaseException):
        raise text
    check_true(isinstance(other, ToldToFail), f"rank 1 has ended with {other!r}", of=of)


# Processes


def test_processes_that_are_started_answer_and_die(tmp_path):
    """Two ranks by torch.distributed: they compute, one is killed, the leader does not hang."""
    model = whole("Qwen2, tied, 1 KV head")
    write_checkpoint(model, tmp_path / "model")
    reasons = []
    ranks = parallel.Ranks(parallel.Plan(tmp_path / "model", 2), reasons.append)
    of = "2 ranks in processes of their own"
    try:
        followed = Followed("Qwen2, tied, 1 KV head", 2)
        cache = followed.pool(ranks.leader)
        for number in range(3):
            hidden, rows = followed.make(ranks.leader, cache, number)
            expected = torch.stack([model.hidden(followed.ids[who])[i] for who, i in rows])
            check_close(hidden, expected, tolerance=TOLERANCE, of=f"{of}: pass {number}")
            with torch.inference_mode():
                got = ranks.leader.logits(hidden)
            expected = torch.stack([model.logits(followed.ids[who])[i] for who, i in rows])
            check_close(got, expected, tolerance=TOLERANCE, of=f"{of}: logits of pass {number}")
        (pid,) = ranks.pids
        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(parallel.RanksFailed):
            for number in range(3, 5):
                followed.make(ranks.leader, cache, number)
            check_true(False, "passes with a rank that is dead did not raise", of=of)
        check_equal(len(reasons), 1, "how often on_failure was called", of=of)
        check_true(str(pid) in reasons[0], f"on_failure got {reasons[0]!r}", of=of)
    finally:
        ranks.stop()


def test_processes_that_are_stopped_end(tmp_path):
    model = whole("Qwen3, untied")
    write_checkpoint(model, tmp_path / "model")
    ranks = parallel.Ranks(parallel.Plan(tmp_path / "model", 2))
    try:
        followed = Followed("Qwen3, untied", 2)
        followed.make(ranks.leader, followed.pool(ranks.leader), 0)
    finally:
        start = time.monotonic()
        ranks.stop()
    took = time.monotonic() - start
    check_true(
        not ranks.was_killed, f"rank 1 had to be killed, after {took:.1f} s", of="Ranks.stop"
    )
    check_equal(ranks.failure, None, "failure of ranks that were stopped")
