"""Grades week2/cuda_graphs: sizes, buffers that never move, and steps that are only replayed.

Most steps here are paged and have no weights: every token leaves a vector, hashed from its id and
position, in a pool of slots, and a row's result is a sum over all tokens of its own sequence, found
through its block table. Where there is a GPU, the same steps run as CUDA graphs, too.
"""

import math
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from course.grading import History, check_close, check_equal, check_raises, check_true, lab

graphs = lab("week2/cuda_graphs")
kv = lab("week2/kv_cache")
qwen = lab("week1/qwen")

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
PARTS = ("input_ids", "positions", "slot_mapping", "num_tokens", "block_table")


@pytest.mark.parametrize(
    "max_batch_size", [*range(1, 27), 31, 32, 33, 64, 100, 255, 256, 257, 513, 2050]
)
def test_plan_fits_every_batch(max_batch_size):
    buckets = graphs.plan_buckets(max_batch_size)
    of = f"plan_buckets({max_batch_size}), which gives {buckets}"
    check_equal(type(buckets), list, "its type", of=of)
    check_equal({type(size) for size in buckets}, {int}, "types of the sizes", of=of)
    check_equal(buckets, sorted(set(buckets)), "the sizes, ascending and none twice", of=of)
    check_equal(buckets[-1], max_batch_size, "the last size", of=of)
    most = max_batch_size / 8 + 4
    text = f"{len(buckets)} sizes; allowed: at most {math.floor(most)}"
    check_true(len(buckets) <= most, text, of=of)
    for size in range(1, max_batch_size + 1):
        bucket = next(bucket for bucket in buckets if bucket >= size)
        allowed = min(size + 7, 2 * size - 1)
        right = bucket <= allowed
        check_true(right, f"{size} rows run as {bucket}; allowed: {allowed}", of=of)


@pytest.mark.parametrize("max_batch_size", [0, -8])
def test_plan_refuses_no_rows(max_batch_size):
    check_raises(ValueError, graphs.plan_buckets, max_batch_size, mentions=[max_batch_size])


BUCKETS = [[1, 2, 4, 8, 16, 24], [1, 2, 3, 5, 8, 9], [11], [2, 5, 12], [1], (1, 2, 4, 8)]


@pytest.mark.parametrize("buckets", BUCKETS, ids=str)
def test_bucket_is_the_smallest_that_holds_the_batch(buckets):
    sizes = list(range(1, buckets[-1] + 1))
    got = [graphs.bucket_of(buckets, size) for size in sizes]
    expected = [min(bucket for bucket in buckets if bucket >= size) for size in sizes]
    of = f"bucket_of({buckets}, …)"
    check_equal(got, expected, f"the buckets of batches of 1 to {sizes[-1]} rows", of=of)


@pytest.mark.parametrize("batch_size", [0, -1, 1])
@pytest.mark.parametrize("buckets", BUCKETS, ids=str)
def test_bucket_refuses_what_fits_into_none(buckets, batch_size):
    size = buckets[-1] + 1 if batch_size == 1 else batch_size
    check_raises(ValueError, graphs.bucket_of, buckets, size, mentions=[size, buckets[-1]])


# max_batch_size, max_model_len, block_size, and how many blocks so many tokens may take.
SIZES = [
    (9, 37, 4, 10),
    (1, 1, 1, 1),
    (3, 16, 16, 1),
    (8, 33, 16, 3),
    (10, 7, 50, 1),
    (2, 8, 1, 8),
    (12, 31, 2, 16),
]


def of_buffers(sizes: Sequence[int]) -> str:
    names = ("max_batch_size", "max_model_len", "block_size")
    inside = ", ".join(f"{name}={size}" for name, size in zip(names, sizes, strict=False))
    return f"DecodeBuffers({inside})"


def make_buffers(sizes: Sequence[int], device: str = "cpu"):
    return graphs.DecodeBuffers(*sizes[:3], device)


def new_buffers(max_batch_size: int, max_model_len: int, block_size: int) -> None:
    """Make buffers; nothing comes back, since a lab's own objects cannot be compared."""
    graphs.DecodeBuffers(max_batch_size, max_model_len, block_size)


def new_runner(step, buffers, buckets: Sequence[int]) -> None:
    """Make a runner; nothing comes back, as above."""
    graphs.GraphRunner(step, buffers, buckets, graphs.record)


# A learner reads their own names.
new_buffers.__name__, new_runner.__name__ = "DecodeBuffers", "GraphRunner"


def expected_inputs(batch: Sequence, num_rows: int, num_blocks: int) -> dict[str, list[int]]:
    """Write down, flat, what the buffers' first num_rows rows must hold."""
    rows = [(r.token_id, r.position, r.slot, r.position + 1, [*r.block_ids]) for r in batch]
    rows += [(0, 0, -1, 1, [])] * (num_rows - len(batch))
    *vectors, tables = zip(*rows, strict=True)
    table = [block for ids in tables for block in ids + [0] * (num_blocks - len(ids))]
    return dict(zip(PARTS, [*map(list, vectors), table], strict=True))


def check_inputs(inputs, batch: Sequence, num_rows: int, num_blocks: int, of: object) -> None:
    expected = expected_inputs(batch, num_rows, num_blocks)
    for name in PARTS:
        part = getattr(inputs, name)
        shape = (num_rows, num_blocks) if name == "block_table" else (num_rows,)
        form = (tuple(part.shape), part.dtype)
        check_equal(form, (shape, torch.int64), f"shape and dtype of {name}", of=of)
        check_equal(part.flatten().tolist(), expected[name], name, of=of)


def draw_batch(count: int, sizes: Sequence[int], seed: int, longest: int | None = None) -> list:
    """Draw rows that are right for buffers of these sizes, whatever cache they belong to."""
    draw = random.Random(seed)
    _, max_model_len, block_size, num_blocks = sizes
    rows = []
    for _ in range(count):
        position = draw.randrange(min(longest or max_model_len, max_model_len))
        needed = position // block_size + 1
        blocks = [draw.randrange(1, 1000) for _ in range(draw.randint(needed, num_blocks))]
        slot = blocks[needed - 1] * block_size + position % block_size
        rows.append(graphs.DecodeRow(draw.randrange(1, 50_000), position, slot, blocks))
    return rows


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_buffers_begin_as_padding(sizes):
    buffers = make_buffers(sizes)
    for num_rows in (sizes[0], 1):
        of = f"{of_buffers(sizes)}.inputs({num_rows}), just made"
        check_inputs(buffers.inputs(num_rows), [], num_rows, sizes[3], of)


@pytest.mark.parametrize("value", [0, -3])
@pytest.mark.parametrize("which", range(3))
def test_buffers_refuse_to_be_empty(which, value):
    sizes = [4, 5, 6]
    sizes[which] = value
    check_raises(ValueError, new_buffers, *sizes, mentions=[value])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_buffers_hold_a_batch(sizes):
    for num_rows in range(1, sizes[0] + 1):
        for count in {1, (num_rows + 1) // 2, num_rows}:
            buffers = make_buffers(sizes)
            batch = draw_batch(count, sizes, seed=num_rows)
            buffers.fill(batch, num_rows)
            of = f"{of_buffers(sizes)}; fill with {count} rows as {num_rows}"
            check_inputs(buffers.inputs(num_rows), batch, num_rows, sizes[3], of)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_buffers_hold_the_longest_sequence(sizes):
    max_batch_size, max_model_len, block_size, num_blocks = sizes
    blocks = list(range(100, 100 + num_blocks))
    last = max_model_len - 1
    row = graphs.DecodeRow(7, last, blocks[-1] * block_size + last % block_size, blocks)
    buffers = make_buffers(sizes)
    buffers.fill([row], max_batch_size)
    of = f"{of_buffers(sizes)}; fill with a row at position {last}, in {num_blocks} blocks"
    check_inputs(buffers.inputs(max_batch_size), [row], max_batch_size, num_blocks, of)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_buffers_after_a_larger_step(sizes):
    buffers, of = make_buffers(sizes), History(of_buffers(sizes))
    most = sizes[0]
    half = (most + 1) // 2
    steps = [(most, most, None), (1, most, 1), (most, most, None), (1, 1, 1), (1, half, 2)]
    for seed, (count, num_rows, longest) in enumerate([*steps, (1, most, None)]):
        batch = draw_batch(count, sizes, seed, longest)
        if longest:
            batch = [
                graphs.DecodeRow(r.token_id, r.position, r.slot, r.block_ids[: r.position + 1])
                for r in batch
            ]
        of.note(f"fill with {count} rows as {num_rows}", None)
        buffers.fill(batch, num_rows)
        check_inputs(buffers.inputs(num_rows), batch, num_rows, sizes[3], of)


@settings(max_examples=30)
@given(st.data())
def test_buffers_after_any_steps(data):
    sizes = data.draw(st.sampled_from(SIZES))
    buffers, of = make_buffers(sizes), History(of_buffers(sizes))
    for _ in range(data.draw(st.integers(1, 5))):
        num_rows = data.draw(st.integers(1, sizes[0]))
        count = data.draw(st.integers(1, num_rows))
        longest = data.draw(st.sampled_from([None, 1, 5]))
        batch = draw_batch(count, sizes, data.draw(st.integers(0, 99)), longest)
        of.note(f"fill with {count} rows as {num_rows}", None)
        buffers.fill(batch, num_rows)
        check_inputs(buffers.inputs(num_rows), batch, num_rows, sizes[3], of)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_buffers_never_move(sizes):
    most, num_blocks = sizes[0], sizes[3]
    for device in DEVICES:
        buffers, of = make_buffers(sizes, device), History(f"{of_buffers(sizes)} on {device}")
        first = buffers.inputs(most)
        places = [getattr(first, name).data_ptr() for name in PARTS]
        for seed, num_rows in enumerate([most, 1, (most + 1) // 2, most]):
            batch = draw_batch((num_rows + 1) // 2, sizes, seed)
            of.note(f"fill with {len(batch)} rows as {num_rows}", None)
            buffers.fill(batch, num_rows)
            inputs = buffers.inputs(num_rows)
            for name, place in zip(PARTS, places, strict=True):
                part = getattr(inputs, name)
                moved = f"{name} of inputs({num_rows}) lies elsewhere than at first"
                check_true(part.data_ptr() == place, moved, of=of)
                check_equal(part.device.type, device, f"where {name} lies", of=of)
                check_true(part.is_contiguous(), f"{name} is not contiguous", of=of)
            early = [getattr(first, name)[:num_rows] for name in PARTS]
            of.note("look at the inputs that were taken before all of this", None)
            check_inputs(graphs.DecodeInputs(*early), batch, num_rows, num_blocks, of)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_buffers_give_the_same_memory_twice(sizes):
    buffers = make_buffers(sizes)
    first, again, smaller = (buffers.inputs(count) for count in (sizes[0], sizes[0], 1))
    for name in PARTS:
        places = {getattr(inputs, name).data_ptr() for inputs in (first, again, smaller)}
        of = f"{of_buffers(sizes)}; inputs are taken three times, and nothing is filled"
        check_equal(len(places), 1, f"in how many places {name} lies", of=of)


@pytest.mark.parametrize("kind", [tuple, list, range], ids=lambda kind: kind.__name__)
def test_buffers_take_any_sequence_and_leave_it_alone(kind):
    sizes = (6, 30, 4, 8)
    buffers = make_buffers(sizes)
    blocks = [range(3, 11), range(20, 23), range(1, 2)]
    blocks = [part if kind is range else kind(part) for part in blocks]
    batch = [graphs.DecodeRow(5 + i, i, 40 + i, ids) for i, ids in enumerate(blocks)]
    outer = tuple(batch) if kind is tuple else batch
    before = list(outer)
    buffers.fill(outer, 6)
    of = f"{of_buffers(sizes)}; fill with a batch whose block_ids are of type {kind.__name__}"
    check_inputs(buffers.inputs(6), before, 6, 8, of)
    check_equal(len(outer), 3, "how many rows the caller's batch has afterwards", of=of)
    check_equal([len(row.block_ids) for row in outer], [8, 3, 1], "their block_ids", of=of)


def refused_batches() -> dict[str, tuple]:
    """For buffers of 6 rows, 30 tokens in blocks of 4: the batch, num_rows, what is named."""
    row = graphs.DecodeRow(7, 9, 41, [3, 10, 11])

    def at(position: int, num_blocks: int):
        return graphs.DecodeRow(7, position, 41, [10] * num_blocks)

    return {
        "no rows": ([], 4, (0, 4)),
        "more rows than asked for": ([row] * 4, 3, (4, 3)),
        "more rows than there are": ([row] * 2, 7, (7, 6)),
        "the first position behind the context": ([row, at(30, 8)], 4, (30, 30)),
        "a position far behind the context": ([at(99, 25)], 4, (99, 30)),
        "a block too few": ([row, row, at(8, 2)], 4, (2, 3)),
        "two blocks too few": ([at(12, 2)], 1, (2, 4)),
        "no blocks": ([at(0, 0)], 1, (0, 1)),
        "a block more than columns": ([at(8, 9)], 4, (9, 8)),
    }


REFUSED = (
    "no rows",
    "more rows than asked for",
    "more rows than there are",
    "the first position behind the context",
    "a position far behind the context",
    "a block too few",
    "two blocks too few",
    "no blocks",
    "a block more than columns",
)


@pytest.mark.parametrize("case", REFUSED)
def test_buffers_refuse_and_change_nothing(case):
    sizes = (6, 30, 4, 8)
    buffers = make_buffers(sizes)
    kept = draw_batch(5, sizes, seed=3)
    buffers.fill(kept, 6)
    batch, num_rows, mentions = refused_batches()[case]
    check_raises(ValueError, buffers.fill, batch, num_rows, mentions=mentions)
    of = f"{of_buffers(sizes)}; fill with 5 rows as 6, then one that is refused: {case}"
    check_inputs(buffers.inputs(6), kept, 6, 8, of)


def test_buffers_accept_what_is_just_allowed():
    sizes = (6, 30, 4, 8)
    buffers = make_buffers(sizes)
    edges = [(29, 8), (8, 3), (7, 2), (0, 1), (0, 8), (28, 8)]
    batch = [graphs.DecodeRow(3, p, 7 + p, [*range(9, 9 + count)]) for p, count in edges]
    buffers.fill(batch, 6)
    of = f"{of_buffers(sizes)}; rows at (position, number of block_ids): {edges}"
    check_inputs(buffers.inputs(6), batch, 6, 8, of)


FACTORS = (1, 5, 19, 31)


def token_vector(token_id: int, position: int) -> list[int]:
    mixed = (token_id * 7919 + position * 104_729 + 12_345) % 10_007
    return [mixed * factor % 101 - 50 for factor in FACTORS]


def place_weight(position: int) -> int:
    return 1 + position % 13


class PagedStep:
    """A step over a pool of slots, with nothing that only the data knows: safe to capture.

    sizes: of the inputs of every call. pool: (num_slots + 1, 4); −1 writes into the last place.
    """

    def __init__(self, num_slots: int, max_model_len: int, block_size: int, device: str):
        self.block_size = block_size
        garbage = torch.arange(4 * (num_slots + 1), dtype=torch.float64) + 1e6
        self.pool = garbage.view(-1, 4).to(device)
        self.factors = torch.tensor(FACTORS, device=device)
        self.places = torch.arange(max_model_len, device=device)
        self.sizes: list[int] = []

    def __call__(self, inputs) -> Tensor:
        self.sizes.append(len(inputs.input_ids))
        mixed = (inputs.input_ids * 7919 + inputs.positions * 104_729 + 12_345) % 10_007
        new = (mixed[:, None] * self.factors) % 101 - 50
        self.pool[inputs.slot_mapping % len(self.pool)] = new.double()
        slots = inputs.block_table[:, self.places // self.block_size] * self.block_size
        slots = slots + self.places % self.block_size
        weights = (self.places < inputs.num_tokens[:, None]) * (1 + self.places % 13)
        return (self.pool[slots] * weights[..., None]).sum(1)


class Watched:
    """A Capture that notes what happens, and spoils what earlier replays returned.

    num_captured, replayed: how often it was called; the sizes of all replays.
    """

    def __init__(self, capture):
        self.capture = capture
        self.num_captured = 0
        self.replayed: list[int] = []
        self.output = torch.zeros(1)

    def __call__(self, run):
        replay = self.capture(run)
        self.num_captured += 1

        def watched() -> Tensor:
            self.output.fill_(torch.nan)
            self.output = replay()
            self.replayed.append(len(self.output))
            return self.output

        return watched


class World:
    """A runner with its cache, some sequences, and what all of them must have left behind.

    sequences: name → (ids, blocks). of: what happened.
    """

    def __init__(self, sizes: Sequence[int], buckets: Sequence[int], device: str = "cpu"):
        max_batch_size, self.max_model_len, self.block_size, num_blocks = sizes
        num_blocks *= max_batch_size + 1
        self.free = list(range(num_blocks))
        random.Random(4).shuffle(self.free)
        self.of = History(f"GraphRunner, buckets {list(buckets)}, {of_buffers(sizes)} on {device}")
        num_slots = num_blocks * self.block_size
        self.step = PagedStep(num_slots, self.max_model_len, self.block_size, device)
        self.expected_pool = self.step.pool[:-1].cpu().clone()
        self.watched = Watched(graphs.capture_for(device))
        self.buckets = buckets
        self.sequences: dict[object, tuple[list[int], list[int]]] = {}
        self.next_id = 1
        buffers = make_buffers(sizes, device)
        self.runner = graphs.GraphRunner(self.step, buffers, buckets, self.watched)

    def row(self, name: object):
        """Give a sequence its next token, and a block where it needs one."""
        ids, blocks = self.sequences.setdefault(name, ([], []))
        position = len(ids)
        self.next_id = self.next_id * 31 % 50_021
        ids.append(self.next_id)
        if position % self.block_size == 0:
            blocks.append(self.free.pop())
        slot = blocks[-1] * self.block_size + position % self.block_size
        self.expected_pool[slot] = torch.tensor(token_vector(ids[-1], position)).double()
        return graphs.DecodeRow(ids[-1], position, slot, tuple(blocks))

    def finish(self, name: object) -> None:
        """Let a sequence go; its blocks are the next ones to be used."""
        self.free += self.sequences.pop(name)[1]
        self.of.note(f"sequence {name} is finished", None)

    def decode(self, names: Sequence[object]) -> Tensor:
        """Run a step for some sequences and check all of it."""
        batch = [self.row(name) for name in names]
        got = self.runner(batch)
        lengths = [len(self.sequences[name][0]) for name in names]
        self.of.note(f"a batch of {len(batch)} rows, to {lengths} tokens", got)
        sums = [
            [
                sum(place_weight(p) * token_vector(i, p)[part] for p, i in enumerate(ids))
                for part in range(4)
            ]
            for ids, _ in (self.sequences[name] for name in names)
        ]
        check_close(got, torch.tensor(sums).double(), of=self.of)
        self.check_pool()
        bucket = min(size for size in self.buckets if size >= len(batch))
        check_equal(self.watched.replayed[-1:], [bucket], "the size that was replayed", of=self.of)
        return got

    def check_pool(self) -> None:
        pool = self.step.pool[:-1].cpu()
        check_close(pool, self.expected_pool, of=f"{self.of}\nthe pool of slots, a row for each")


RUNNERS = {
    "buckets up to 8": ((8, 40, 4, 10), (1, 2, 4, 8)),
    "ragged": ((11, 23, 5, 5), (2, 3, 7, 11)),
    "one bucket": ((9, 17, 16, 2), (9,)),
    "one row": ((1, 12, 3, 4), (1,)),
    "blocks of one slot": ((5, 9, 1, 9), (1, 2, 3, 4, 5)),
    "fewer than the buffers hold": ((12, 30, 7, 5), [1, 2, 4, 6]),
}
ALL_RUNNERS = pytest.mark.parametrize("case", RUNNERS)


def test_runner_sees_no_python_again():
    """What Python decides is decided at the capture; what tensors say is read at each replay."""
    decided = {"factor": 3.0}
    added = torch.tensor([0.5])

    def step(inputs) -> Tensor:
        return inputs.input_ids[:, None] * decided["factor"] * torch.arange(1.0, 7.0) + added

    runner = graphs.GraphRunner(step, make_buffers((4, 12, 4, 3)), [1, 4], graphs.record)
    decided["factor"] = -100.0
    added.fill_(0.25)
    for ids in ([5, 7, 11], [13], [2, 3, 5, 7]):
        got = runner([graphs.DecodeRow(token_id, 0, 0, (0,)) for token_id in ids])
        expected = torch.tensor(ids)[:, None] * 3.0 * torch.arange(1.0, 7.0) + 0.25
        of = (
            "a step of ids times a factor, 3 at the capture and −100 later, plus a tensor, 0.5 at "
            "the capture and 0.25 later"
        )
        check_close(got, expected, of=of)


@pytest.mark.parametrize("case", ["buckets up to 8", "ragged", "one bucket"])
def test_runner_captures_the_largest_bucket_first_while_it_is_made(case):
    sizes, buckets = RUNNERS[case]
    world = World(sizes, buckets)
    sizes_run = list(reversed(buckets))
    check_equal(world.step.sizes, sizes_run, "sizes that step has run with", of=world.of)
    check_equal(world.watched.num_captured, len(buckets), "calls of capture", of=world.of)
    check_equal(world.watched.replayed, [], "sizes that were replayed", of=world.of)


@pytest.mark.parametrize("case", ["buckets up to 8", "ragged", "one bucket"])
def test_runner_captures_each_bucket_once(case):
    sizes, buckets = RUNNERS[case]
    world = World(sizes, buckets)
    for count in (buckets[-1], 1, buckets[-1], buckets[0], 1, buckets[-1]):
        world.decode(range(count))
    check_equal(world.watched.num_captured, len(buckets), "calls of capture", of=world.of)
    runs = len(world.step.sizes)
    check_equal(runs, len(buckets), "calls of step, all of them by captures", of=world.of)
    check_equal(len(world.watched.replayed), 6, "replays in six steps", of=world.of)


@ALL_RUNNERS
def test_runner_writes_nothing_while_it_is_made(case):
    for device in DEVICES:
        World(*RUNNERS[case], device).check_pool()


@ALL_RUNNERS
def test_runner_with_every_batch_size(case):
    sizes, buckets = RUNNERS[case]
    for device in DEVICES:
        growing, shrinking = World(sizes, buckets, device), World(sizes, buckets, device)
        counts = range(1, buckets[-1] + 1)
        for count in counts:
            growing.decode(range(count))
        for count in reversed(counts):
            shrinking.decode(range(count))


@ALL_RUNNERS
def test_runner_to_the_end_of_the_context(case):
    sizes, buckets = RUNNERS[case]
    world = World(sizes, buckets)
    for length in range(1, sizes[1] + 1):
        world.decode(["long"] if length % 3 else ["long", f"short {length}"][: buckets[-1]])
        if f"short {length}" in world.sequences:
            world.finish(f"short {length}")


@ALL_RUNNERS
def test_runner_reuses_blocks_of_finished_sequences(case):
    sizes, buckets = RUNNERS[case]
    for device in DEVICES:
        world, most = World(sizes, buckets, device), buckets[-1]
        for _ in range(sizes[1] - 1):
            world.decode(range(most))
        for name in range(0, most, 2):
            world.finish(name)
        world.decode([name for name in range(most) if name % 2] or ["new"])
        for name in range(1, most, 2):
            world.finish(name)
        for count in (1, most, 1):
            world.decode([f"new {name}" for name in range(count)])


@settings(max_examples=15)
@given(st.data())
def test_runner_while_sequences_come_and_go(data):
    sizes, buckets = RUNNERS[data.draw(st.sampled_from(sorted(RUNNERS)))]
    world = World(sizes, buckets)
    for step in range(data.draw(st.integers(1, 8))):
        alive = sorted(world.sequences)
        full = [name for name in alive if len(world.sequences[name][0]) == sizes[1]]
        gone = data.draw(st.lists(st.sampled_from(alive), unique=True)) if alive else []
        for name in {*full, *gone}:
            world.finish(name)
        stay = sorted(world.sequences)
        room = buckets[-1] - len(stay)
        new = data.draw(st.integers(0 if stay else 1, room)) if room else 0
        names = stay + [100 * step + i for i in range(new)]
        some = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
        world.decode(some)


def test_runner_replays_for_the_same_batch_again():
    added = torch.tensor([0.5])

    def step(inputs) -> Tensor:
        return inputs.input_ids[:, None] + added

    runner = graphs.GraphRunner(step, make_buffers((4, 12, 4, 3)), [1, 4], graphs.record)
    batch = [graphs.DecodeRow(token_id, 0, 0, (0,)) for token_id in (5, 7)]
    for number in (0.5, 0.25):
        added.fill_(number)
        of = f"the same batch once more; what the step adds to the ids is {number} now"
        check_close(runner(batch), torch.tensor([[5.0], [7.0]]) + number, of=of)


def test_buffers_show_the_batch_after_the_step():
    sizes = (4, 12, 4, 3)
    buffers = make_buffers(sizes)
    runner = graphs.GraphRunner(lambda inputs: inputs.positions, buffers, [2, 4], graphs.record)
    for count in (3, 1):
        batch = draw_batch(count, sizes, seed=count)
        runner(batch)
        num_rows = 4 if count == 3 else 2
        of = f"{of_buffers(sizes)}\ninputs({num_rows}) after a step of {count} rows"
        check_inputs(buffers.inputs(num_rows), batch, num_rows, 3, of)


def test_buffers_lie_on_the_device_that_is_asked_for():
    inputs = make_buffers((3, 16, 4), "meta").inputs(2)
    for name in PARTS:
        device = getattr(inputs, name).device.type
        check_equal(
            device, "meta", f"the device of {name}", of=f'{of_buffers((3, 16, 4))} on "meta"'
        )


def test_runner_keeps_the_order_of_the_batch():
    world = World((8, 40, 4, 10), (1, 2, 4, 8))
    for names in ("abcdefgh", "hgfedcba", "cab", "h", "bdfh", "hfdbgeca", "gc"):
        world.decode(names)


def test_runner_takes_any_sequence():
    world = World((8, 40, 4, 10), (1, 2, 4, 8))
    batch = tuple(world.row(name) for name in "abc")
    got = world.runner(batch)
    check_equal(tuple(got.shape), (3, 4), "the shape of the result", of="a tuple of 3 rows")
    world.check_pool()


@ALL_RUNNERS
def test_runner_returns_a_view_of_what_was_replayed(case):
    sizes, buckets = RUNNERS[case]
    world = World(sizes, buckets)
    for count in {1, buckets[0], buckets[-1]}:
        got = world.decode([f"{count} {name}" for name in range(count)])
        of = f"{world.of}\nwhat the latest call returned"
        same = got.data_ptr() == world.watched.output.data_ptr()
        check_true(same, "it is a copy: it lies elsewhere than what the replay returned", of=of)


@pytest.mark.parametrize("kind", ["no rows", "too many rows", "a position", "blocks"])
def test_runner_refuses_and_runs_nothing(kind):
    sizes = (8, 22, 4, 6)
    world = World(sizes, (1, 2, 4, 6))
    world.decode("abcd")
    row = graphs.DecodeRow(5, 2, 0, (0,))
    batch, mentions = {
        "no rows": ([], (0, 6)),
        "too many rows": ([row] * 7, (7, 6)),
        "a position": ([row, graphs.DecodeRow(5, 22, 0, [0] * 6)], (22,)),
        "blocks": ([graphs.DecodeRow(5, 4, 0, [0])], (1, 2)),
    }[kind]
    check_raises(ValueError, world.runner.__call__, batch, mentions=mentions)
    for negative in ((-1, 0, 0), (0, -1, 0), (0, 0, -1)):
        check_raises(ValueError, graphs.DecodeRow, *negative, (0,), mentions=[-1])
    world.of.note(f"a batch that is refused: {kind}", None)
    check_equal(len(world.watched.replayed), 1, "replays until now", of=world.of)
    world.check_pool()
    world.decode("dbeca")


@pytest.mark.parametrize("shape", [(), (3,), (2, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_runner_returns_what_the_step_returns(dtype, shape):
    """The rows of a result may be numbers, vectors or tables, of any dtype."""
    grid = torch.arange(1, 1 + torch.Size(shape).numel()).view(shape)

    def step(inputs) -> Tensor:
        ids = inputs.input_ids.view(-1, *[1] * len(shape))
        return (ids * grid).to(dtype)

    buffers = make_buffers((6, 12, 4, 3))
    runner = graphs.GraphRunner(step, buffers, [1, 3, 6], graphs.record)
    for count in (6, 2, 1, 5):
        ids = [3 * i + count for i in range(count)]
        got = runner([graphs.DecodeRow(i, 0, 0, (0,)) for i in ids])
        expected = torch.stack([i * grid for i in ids]).to(dtype)
        of = f"a step that returns {(count, *shape)} {dtype} for {count} rows"
        if dtype.is_floating_point:
            check_close(got, expected, of=of)
        else:
            check_equal(got, expected, "the result", of=of)


FAMILIES = {
    "Qwen2": (qwen2.Qwen2Config, qwen2.Qwen2ForCausalLM, qwen2.Qwen2RotaryEmbedding),
    "Qwen3": (qwen3.Qwen3Config, qwen3.Qwen3ForCausalLM, qwen3.Qwen3RotaryEmbedding),
}
CONTEXT = 24
SHAPE = {
    "vocab_size": 53,
    "hidden_size": 20,
    "intermediate_size": 33,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "tie_word_embeddings": True,
    "max_position_embeddings": CONTEXT,
}


class AskingNobody(nn.Module):
    """transformers' rotation in the place of week 1's Rotary: positions are not checked."""

    def __init__(self, rotary: nn.Module):
        super().__init__()
        self.rotary = rotary

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotary(q, positions[None])
        q, k = qwen2.apply_rotary_pos_emb(q[None], k[None], cos, sin)
        return q[0], k[0]


def two_models(family: str, device: str) -> tuple[nn.Module, nn.Module]:
    """Make transformers' model with signed weights everywhere, and the course's with the same."""
    config_class, model_class, rotary_class = FAMILIES[family]
    config = config_class(**SHAPE, attn_implementation="eager")
    theirs = model_class(config).eval()
    generator = torch.Generator().manual_seed(11)
    for parameter in theirs.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    theirs.tie_weights()
    theirs = theirs.requires_grad_(False).to(device)
    raw = SHAPE | {"architectures": [f"{family}ForCausalLM"]}
    model = qwen.Qwen(qwen.QwenConfig.from_dict(raw))
    qwen.load_weights(model, theirs.state_dict())
    for layer in model.layers:
        layer.self_attn.rotary = AskingNobody(rotary_class(config).to(device))
    return theirs, model.to(device).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_model_in_graphs_matches_transformers(family):
    for device in DEVICES:
        theirs, model = two_models(family, device)
        cache = kv.cache_for(model, num_rows=6)
        cache.reserve(CONTEXT)
        buffers = graphs.DecodeBuffers(5, CONTEXT, cache.capacity, device)
        step = graphs.contiguous_step(model, cache)
        runner = graphs.GraphRunner(step, buffers, [1, 2, 5], graphs.capture_for(device))
        ids: dict[int, list[int]] = {row: [] for row in (3, 0, 4, 1, 2)}
        of = History(f"a {family} in graphs on {device}, its cache with 5 rows and a spare one")
        for count in (1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 5, 1, 3):
            rows = list(ids)[-count:]
            for row in rows:
                ids[row].append((7 * len(ids[row]) + 11 * row + count) % 53)
            batch = [graphs.contiguous_row(cache, row, ids[row][-1]) for row in rows]
            got = of.note(f"rows {rows}, one token each", runner(batch))
            with torch.no_grad():
                expected = [theirs(torch.tensor([ids[row]], device=device)).logits for row in rows]
            check_close(got, torch.stack([one[0, -1] for one in expected]), of=of)
            for row in rows:
                cache.num_computed_tokens[row] += 1


ASKING = {
    "a value": lambda inputs: inputs.input_ids[: int(inputs.num_tokens.max())],
    "whether all are right": lambda inputs: inputs.positions * bool((inputs.num_tokens > 0).all()),
    "rows that are not padding": lambda inputs: inputs.input_ids[inputs.slot_mapping >= 0],
    "places of padding": lambda inputs: (inputs.slot_mapping < 0).nonzero(),
}


@pytest.mark.parametrize("question", ASKING)
def test_runner_hands_on_why_a_step_cannot_be_captured(question):
    buffers = make_buffers((2, 12, 4, 3))
    check_raises(RuntimeError, new_runner, ASKING[question], buffers, [1, 2])


def test_model_needs_a_place_for_each_padding_row():
    _, model = two_models("Qwen3", "cpu")
    cache = kv.cache_for(model, num_rows=3)
    cache.reserve(2)
    most = cache.capacity
    step = graphs.contiguous_step(model, cache)
    graphs.GraphRunner(step, make_buffers((most, 9, 9, 1)), [1, most], graphs.record)
    buffers = make_buffers((most + 1, 9, 9, 1))
    sizes = [1, most + 1]
    check_raises(ValueError, new_runner, step, buffers, sizes, mentions=[most + 1, most])
