"""Grades week2/roofline: what a step costs, the roofline, and the metrics of a trace.

Costs are held against two counts of this file: a real forward pass of transformers' model, in which
modules and attention are watched, and loops over tokens, layers and heads.
"""

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, DynamicCache
from transformers.models.qwen2 import configuration_qwen2 as qwen2
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM
from transformers.models.qwen3 import configuration_qwen3 as qwen3
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM

from course.grading import check_equal, check_raises, check_true, lab

roofline = lab("week2/roofline")
qwen_lab = lab("week1/qwen")

FAMILIES = {
    "Qwen2": (qwen2.Qwen2Config, Qwen2ForCausalLM),
    "Qwen3": (qwen3.Qwen3Config, Qwen3ForCausalLM),
}


def shape(family, layers, hidden, heads, kv_heads, head_dim, intermediate, vocab, tied, **others):
    return {
        "architectures": [f"{family}ForCausalLM"],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": intermediate,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "max_position_embeddings": 2**20,
        **others,
    }


# No two numbers of a shape agree by habit, and heads times head_dim is nowhere the hidden size.
TINY = {
    "Qwen2, groups of 7, untied": shape("Qwen2", 2, 20, 7, 1, 6, 33, 71, False),
    "Qwen2, groups of 3, tied": shape("Qwen2", 3, 26, 6, 2, 8, 37, 53, True),
    "Qwen3, groups of 3, untied": shape("Qwen3", 3, 24, 6, 2, 10, 37, 61, False),
    "Qwen3, no groups, tied": shape("Qwen3", 2, 28, 3, 3, 14, 17, 67, True),
    "Qwen3 with biases, groups of 2": shape(
        "Qwen3", 1, 22, 4, 2, 16, 41, 59, False, attention_bias=True
    ),
    "Qwen3, one layer, one head": shape("Qwen3", 1, 3, 1, 1, 2, 1, 5, False),
}
REAL = {
    "Qwen2.5-0.5B": shape("Qwen2", 24, 896, 14, 2, 64, 4864, 151936, True),
    "Qwen3-0.6B": shape("Qwen3", 28, 1024, 16, 8, 128, 3072, 151936, True),
    "Qwen3-8B": shape("Qwen3", 36, 4096, 32, 8, 128, 12288, 151936, False),
}
SHAPES = TINY | REAL
# A step's requests, as (num_computed_tokens, num_new_tokens).
BATCHES = {
    "a prompt": [(0, 7)],
    "a prompt of one token": [(0, 1)],
    "one new token": [(7, 1)],
    "the second part of a prompt": [(4, 5)],
    "new tokens of four requests": [(7, 1), (1, 1), (12, 1), (3, 1)],
    "prompts and new tokens": [(0, 5), (9, 1), (3, 6), (0, 1), (2, 1)],
}
TINY_SHAPES = pytest.mark.parametrize("name", TINY)
ALL_SHAPES = pytest.mark.parametrize("name", SHAPES)
ALL_BATCHES = pytest.mark.parametrize("batch", BATCHES.values(), ids=list(BATCHES))


def config_of(raw):
    return qwen_lab.QwenConfig.from_dict(raw)


def told(raw):
    """Put a shape into words: what its costs depend on."""
    parts = {
        "layers": raw["num_hidden_layers"],
        "hidden": raw["hidden_size"],
        "heads": raw["num_attention_heads"],
        "kv heads": raw["num_key_value_heads"],
        "head_dim": raw["head_dim"],
        "intermediate": raw["intermediate_size"],
        "vocabulary": raw["vocab_size"],
    }
    kind = f"{raw['architectures'][0][:5]}, {'tied' if raw['tie_word_embeddings'] else 'untied'}"
    config = config_of(raw)
    flags = [name for name in ("qkv_bias", "output_bias", "qk_norm") if getattr(config, name)]
    sizes = [f"{name} {value}" for name, value in parts.items()]
    return ", ".join([kind, *flags, *sizes])


def check_number(got, expected, what, of=None):
    """Hold a number that may have been computed in another order; None is no number."""
    if expected is None or got is None:
        check_equal(got, expected, what, of=of)
        return
    is_number = isinstance(got, (int, float)) and not isinstance(got, bool)
    check_true(is_number, f"{what} is {got!r}, expected a number", of=of)
    near = math.isclose(got, expected, rel_tol=1e-9)
    check_equal(float(expected) if near else float(got), float(expected), what, of=of)


class Watch:
    """What a forward pass does: bytes of weights, keys and values that it touches."""

    def __init__(self, raw, batch):
        self.batch = batch
        self.bytes_of_weights = 0
        self.bytes_of_kv = 0
        self._past = (raw["num_key_value_heads"], raw["head_dim"])

    def on_module(self, module, args, output):
        """A module reads its own weights, an embedding only the rows that are asked for."""
        if isinstance(module, torch.nn.Embedding):
            self.bytes_of_weights += output.nbytes
        else:
            own = module.parameters(recurse=False)
            self.bytes_of_weights += sum(parameter.nbytes for parameter in own)

    def attend(self, query, key, value):
        """Let each new token gather from those of its own request; earlier ones are made up."""
        out, start = torch.empty_like(query), 0
        heads, head_dim = self._past
        group = query.shape[1] // heads
        for computed, new in self.batch:
            here = slice(start, start + new)
            past = torch.ones(heads, computed, head_dim, dtype=key.dtype)
            keys = torch.cat((past, key[0, :, here]), 1)
            values = torch.cat((past, value[0, :, here]), 1)
            self.bytes_of_kv += key[0, :, here].nbytes + value[0, :, here].nbytes
            self.bytes_of_kv += keys.nbytes + values.nbytes
            keys, values = (x.repeat_interleave(group, 0) for x in (keys, values))
            for i in range(new):
                visible = computed + i + 1
                weights = query[0, :, start + i, None] @ keys[:, :visible].transpose(-2, -1)
                out[0, :, start + i, None] = weights.softmax(-1) @ values[:, :visible]
            start += new
        return out


def _watched_attention(module, query, key, value, mask, watch, **others):
    return watch.attend(query, key, value).transpose(1, 2), None


AttentionInterface.register("watched", _watched_attention)


@functools.cache
def oracle_model(name, device="cpu"):
    raw = {key: value for key, value in SHAPES[name].items() if key != "architectures"}
    config_class, model_class = FAMILIES[SHAPES[name]["architectures"][0][:5]]
    with torch.device(device):
        return model_class(config_class(**raw, attn_implementation="watched")).eval()


@functools.cache
def counted(name, requests, dtype):
    """Run a step for real; returns its FLOPs and bytes."""
    model = oracle_model(name).to(dtype)
    watch = Watch(SHAPES[name], requests)
    hooks = [module.register_forward_hook(watch.on_module) for module in model.modules()]
    ends = list(itertools.accumulate(new for _, new in requests))
    positions = torch.cat([torch.arange(a, a + b) for a, b in requests])[None]
    ids = torch.arange(ends[-1])[None] % SHAPES[name]["vocab_size"]
    last = torch.tensor(ends) - 1
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            model(ids, position_ids=positions, logits_to_keep=last, use_cache=False, watch=watch)
    finally:
        for hook in hooks:
            hook.remove()
    return flops.get_total_flops(), watch.bytes_of_weights + watch.bytes_of_kv


def looped_flops(raw, batch):
    query_size = raw["num_attention_heads"] * raw["head_dim"]
    kv_size = raw["num_key_value_heads"] * raw["head_dim"]
    hidden, intermediate = raw["hidden_size"], raw["intermediate_size"]
    matrices = [(hidden, query_size), (hidden, kv_size), (hidden, kv_size), (query_size, hidden)]
    matrices += [(hidden, intermediate), (hidden, intermediate), (intermediate, hidden)]
    total = 0
    for computed, new in batch:
        for position in range(computed, computed + new):
            for _ in range(raw["num_hidden_layers"]):
                total += sum(2 * rows * columns for rows, columns in matrices)
                for _ in range(raw["num_attention_heads"]):
                    total += 2 * raw["head_dim"] * (position + 1)
                    total += 2 * (position + 1) * raw["head_dim"]
        total += 2 * hidden * raw["vocab_size"]
    return total


def looped_bytes(raw, batch, itemsize):
    weights = [n for name, n in looped_weights(raw).items() if name != "looked up"]
    total = sum(weights) * itemsize
    one_token = 0
    for _ in range(raw["num_hidden_layers"]):
        for _ in range(raw["num_key_value_heads"]):
            one_token += (raw["head_dim"] + raw["head_dim"]) * itemsize
    for computed, new in batch:
        for position in range(computed + new):
            total += one_token
            if position >= computed:
                total += one_token + raw["hidden_size"] * itemsize
    return total


def looped_weights(raw):
    """Numbers in each weight, by name; a table that is only looked up goes by that name."""
    hidden, head_dim = raw["hidden_size"], raw["head_dim"]
    query_size, kv_size = (
        raw["num_attention_heads"] * head_dim,
        raw["num_key_value_heads"] * head_dim,
    )
    is_qwen2 = raw["architectures"][0].startswith("Qwen2")
    found = {"norm": hidden, "head": raw["vocab_size"] * hidden}
    if not raw["tie_word_embeddings"]:
        found["looked up"] = raw["vocab_size"] * hidden
    for layer in range(raw["num_hidden_layers"]):
        for name, size in (("q", query_size), ("k", kv_size), ("v", kv_size)):
            found[f"{layer} {name}"] = hidden * size
            if is_qwen2 or raw.get("attention_bias"):
                found[f"{layer} {name} bias"] = size
        found[f"{layer} o"] = query_size * hidden
        if raw.get("attention_bias") and not is_qwen2:
            found[f"{layer} o bias"] = hidden
        if not is_qwen2:
            found[f"{layer} q norm"] = found[f"{layer} k norm"] = head_dim
        for name in ("gate", "up", "down"):
            found[f"{layer} {name}"] = hidden * raw["intermediate_size"]
        found[f"{layer} input norm"] = found[f"{layer} post-attention norm"] = hidden
    return found


SIZES = st.integers(1, 40)


@st.composite
def any_shapes(draw):
    kv_heads = draw(st.integers(1, 3))
    family = draw(st.sampled_from(sorted(FAMILIES)))
    biases = {"attention_bias": draw(st.booleans())} if family == "Qwen3" else {}
    return shape(
        family,
        layers=draw(st.integers(1, 3)),
        hidden=draw(SIZES),
        heads=kv_heads * draw(st.sampled_from([1, 3, 7])),
        kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 9)),
        intermediate=draw(SIZES),
        vocab=draw(st.integers(1, 90)),
        tied=draw(st.booleans()),
        **biases,
    )


ANY_BATCH = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), min_size=1, max_size=5)
ITEMSIZES = st.sampled_from([1, 2, 4])


@ALL_SHAPES
def test_num_parameters_matches_transformers(name):
    expected = sum(parameter.numel() for parameter in oracle_model(name, "meta").parameters())
    of = f"num_parameters of {told(SHAPES[name])}"
    got = roofline.num_parameters(config_of(SHAPES[name]))
    check_equal(got, expected, "the number of parameters", of=of)


@given(any_shapes())
def test_num_parameters_of_any_shape(raw):
    expected = sum(looped_weights(raw).values())
    got = roofline.num_parameters(config_of(raw))
    check_equal(got, expected, "parameters", of=f"num_parameters of {told(raw)}")


PUBLISHED = {"Qwen2.5-0.5B": 12_288, "Qwen3-0.6B": 114_688, "Qwen3-8B": 147_456}


@pytest.mark.parametrize("name", PUBLISHED)
def test_kv_bytes_per_token_in_bfloat16(name):
    got = roofline.kv_bytes_per_token(config_of(SHAPES[name]), 2)
    of = f"kv_bytes_per_token in bfloat16 of {told(SHAPES[name])}"
    check_equal(got, PUBLISHED[name], "bytes", of=of)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@TINY_SHAPES
def test_kv_bytes_per_token_of_a_real_cache(name, dtype):
    raw = SHAPES[name]
    cache, num_tokens = DynamicCache(), 5
    one_layer = torch.zeros(1, raw["num_key_value_heads"], num_tokens, raw["head_dim"])
    for layer in range(raw["num_hidden_layers"]):
        cache.update(one_layer.to(dtype), one_layer.to(dtype), layer)
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    got = roofline.kv_bytes_per_token(config_of(raw), dtype.itemsize)
    of = f"kv_bytes_per_token, itemsize {dtype.itemsize}, of {told(raw)}"
    check_equal(got, stored // num_tokens, "bytes", of=of)


def check_flops(raw, batch, expected):
    got = roofline.step_flops(config_of(raw), batch)
    check_equal(got, expected, "FLOPs", of=f"step_flops of {batch} for {told(raw)}")


def check_bytes(raw, batch, itemsize, expected):
    got = roofline.step_bytes(config_of(raw), batch, itemsize)
    of = f"step_bytes of {batch}, itemsize {itemsize}, for {told(raw)}"
    check_equal(got, expected, "bytes", of=of)


# A step, and the same step with a little more.
MORE = {
    "one more earlier token": ([(7, 1)], [(8, 1)]),
    "one more token of a prompt": ([(0, 4)], [(0, 5)]),
    "one more request": ([(7, 1)], [(7, 1), (7, 1)]),
}
ALL_MORE = pytest.mark.parametrize("more", MORE)


@ALL_MORE
def test_step_flops_grow_with(more):
    before, after = MORE[more]
    for raw in TINY.values():
        config = config_of(raw)
        got = roofline.step_flops(config, after) - roofline.step_flops(config, before)
        expected = looped_flops(raw, after) - looped_flops(raw, before)
        of = f"step_flops of {after} less that of {before}, for {told(raw)}"
        check_equal(got, expected, f"FLOPs of {more}", of=of)


@ALL_MORE
def test_step_bytes_grow_with(more):
    before, after = MORE[more]
    for raw in TINY.values():
        config = config_of(raw)
        got = roofline.step_bytes(config, after, 2) - roofline.step_bytes(config, before, 2)
        expected = looped_bytes(raw, after, 2) - looped_bytes(raw, before, 2)
        of = f"step_bytes of {after} less that of {before}, itemsize 2, for {told(raw)}"
        check_equal(got, expected, f"bytes of {more}", of=of)


@ALL_BATCHES
@TINY_SHAPES
def test_step_flops_of_a_real_forward(name, batch):
    flops, _ = counted(name, tuple(batch), torch.float32)
    check_flops(SHAPES[name], batch, flops)


@given(any_shapes(), ANY_BATCH)
def test_step_flops_of_any_batch(raw, batch):
    check_flops(raw, batch, looped_flops(raw, batch))


@pytest.mark.parametrize("name", REAL)
def test_step_flops_of_real_shapes(name):
    for batch in ([(0, 16)], [(1000, 1)], [(100, 1)] * 8, [(64, 32), (300, 1)]):
        check_flops(SHAPES[name], batch, looped_flops(SHAPES[name], batch))


def test_step_flops_are_exact_beyond_what_a_float_holds():
    raw = shape("Qwen3", 71, 5001, 9, 3, 126, 20_001, 99_991, False)
    one, two, ten = (looped_flops(raw, [part]) for part in ((0, 1), (1, 1), (0, 10)))
    head = 2 * raw["hidden_size"] * raw["vocab_size"]
    # Each token costs a fixed step more than the one before it.
    num_tokens = 2**20 - 1
    steps = (two - one) * (num_tokens * (num_tokens - 1) // 2)
    expected = num_tokens * (one - head) + steps + head
    check_flops(raw, [(0, num_tokens)], expected)
    check_flops(raw, [(0, num_tokens), (0, 10)], expected + ten)


@ALL_BATCHES
@TINY_SHAPES
def test_step_bytes_of_a_real_forward(name, batch):
    _, num_bytes = counted(name, tuple(batch), torch.bfloat16)
    check_bytes(SHAPES[name], batch, 2, num_bytes)


@given(any_shapes(), ANY_BATCH, ITEMSIZES)
def test_step_bytes_of_any_batch(raw, batch, itemsize):
    check_bytes(raw, batch, itemsize, looped_bytes(raw, batch, itemsize))


@pytest.mark.parametrize("name", REAL)
def test_step_bytes_of_real_shapes(name):
    for batch in ([(0, 512)], [(1000, 1)], [(100, 1)] * 32, [(64, 32), (300, 1)]):
        check_bytes(SHAPES[name], batch, 2, looped_bytes(SHAPES[name], batch, 2))


@pytest.mark.parametrize(
    ("batch", "mentions"),
    [
        ([], []),
        ([(3, 0)], [0]),
        ([(0, 5), (4, -2)], [-2]),
        ([(-1, 5)], [-1]),
        ([(5, 1), (-7, 7)], [-7]),
    ],
)
@pytest.mark.parametrize("function", ["step_flops", "step_bytes"])
def test_a_batch_that_cannot_be_is_refused(function, batch, mentions):
    config = config_of(TINY["Qwen3, groups of 3, untied"])
    itemsize = [2] if function == "step_bytes" else []
    check_raises(
        ValueError, getattr(roofline, function), config, batch, *itemsize, mentions=mentions
    )


@ALL_SHAPES
def test_arithmetic_intensity(name):
    raw = SHAPES[name]
    for batch, itemsize in itertools.product(BATCHES.values(), (1, 2)):
        expected = looped_flops(raw, batch) / looped_bytes(raw, batch, itemsize)
        got = roofline.arithmetic_intensity(config_of(raw), batch, itemsize)
        of = f"arithmetic_intensity of {batch}, itemsize {itemsize}, for {told(raw)}"
        check_number(got, expected, "FLOPs for a byte", of=of)


# (FLOP/s, bytes/s); the last one computes slower than it moves.
MACHINES = {"laptop": (100e9, 40e9), "GPU": (989e12, 4.8e12), "pocket calculator": (3.0, 8.0)}
ALL_MACHINES = pytest.mark.parametrize("flops, bandwidth", MACHINES.values(), ids=list(MACHINES))


@ALL_MACHINES
def test_attainable_flops(flops, bandwidth):
    ridge = flops / bandwidth
    hardware = roofline.Hardware(flops, bandwidth)
    for intensity, share in [(1e-3, 1e-3), (0.5, 0.5), (1.0, 1.0), (1.01, 1.0), (1e4, 1.0)]:
        got = roofline.attainable_flops(intensity * ridge, hardware)
        machine = f"{flops:g} FLOP/s, {bandwidth:g} bytes/s"
        of = f"attainable_flops at {intensity * ridge:.4g} FLOPs for a byte, {machine}"
        check_number(got, share * flops, "FLOP/s", of=of)


@ALL_MACHINES
@ALL_SHAPES
def test_step_seconds(name, flops, bandwidth):
    raw, hardware = SHAPES[name], roofline.Hardware(flops, bandwidth)
    for batch, itemsize in itertools.product(BATCHES.values(), (1, 2)):
        work, moved = looped_flops(raw, batch), looped_bytes(raw, batch, itemsize)
        bound_by_work = work * bandwidth > moved * flops
        expected = work / flops if bound_by_work else moved / bandwidth
        got = roofline.step_seconds(config_of(raw), batch, itemsize, hardware)
        machine = f"{flops:g} FLOP/s, {bandwidth:g} bytes/s"
        of = f"step_seconds of {batch}, itemsize {itemsize}, {machine}, for {told(raw)}"
        check_number(got, expected, "seconds", of=of)


def check_sequences(raw, num_tokens, itemsize, num_bytes, expected):
    got = roofline.max_num_sequences(config_of(raw), num_tokens, itemsize, num_bytes)
    of = (
        f"max_num_sequences of {num_tokens} tokens, itemsize {itemsize}, in {num_bytes:,} "
        f"bytes, for {told(raw)}"
    )
    check_equal(got, expected, "sequences", of=of)


@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize("num_tokens", [1, 7, 300])
@TINY_SHAPES
def test_max_num_sequences_at_the_edges(name, num_tokens, itemsize):
    raw = SHAPES[name]
    weights = itemsize * sum(looped_weights(raw).values())
    one = looped_bytes(raw, [(num_tokens, 1)], itemsize)
    one = (looped_bytes(raw, [(num_tokens + 1, 1)], itemsize) - one) * num_tokens
    for count in (0, 1, 2, 50):
        check_sequences(raw, num_tokens, itemsize, weights + count * one, count)
        check_sequences(raw, num_tokens, itemsize, weights + (count + 1) * one - 1, count)


@pytest.mark.parametrize("name", REAL)
def test_max_num_sequences_of_real_shapes(name):
    raw = SHAPES[name]
    left = 80 * 10**9 - 2 * sum(looped_weights(raw).values())
    for num_tokens in (512, 4096, 32768):
        count = left // (num_tokens * PUBLISHED[name])
        check_sequences(raw, num_tokens, 2, 80 * 10**9, count)


@TINY_SHAPES
def test_max_num_sequences_when_the_weights_do_not_fit(name):
    weights = 2 * sum(looped_weights(SHAPES[name]).values())
    for num_bytes in (weights - 1, 0):
        # Larger numbers may be written with commas.
        mentions = [weights, num_bytes] if weights < 1000 else []
        arguments = config_of(SHAPES[name]), 7, 2, num_bytes
        check_raises(ValueError, roofline.max_num_sequences, *arguments, mentions=mentions)


@pytest.mark.parametrize("num_tokens", [0, -3])
def test_max_num_sequences_of_no_tokens(num_tokens):
    config = config_of(TINY["Qwen3, no groups, tied"])
    check_raises(
        ValueError, roofline.max_num_sequences, config, num_tokens, 2, 10**9, mentions=[num_tokens]
    )


class Trace(list):
    """A list of events that a failure message shows line by line."""

    def __repr__(self):
        lines = (f"{event.time:g} {event.request_id} {event.kind}" for event in self)
        return f"[{'; '.join(lines)}]"


def events(*lines):
    """Make a trace of lines such as "1.5 A token"."""
    parts = (line.split() for line in lines)
    return Trace(roofline.Event(float(time), name, kind) for time, name, kind in parts)


def check_metrics(trace, expected):
    """expected: request_id → (num_tokens, ttft, tpot, latency), in the order of arrival."""
    of = f"request_metrics of {trace}" if len(trace) < 12 else None
    got = roofline.request_metrics(trace)
    check_true(isinstance(got, dict), f"returned {type(got).__name__}, expected a dict", of=of)
    check_equal(list(got), list(expected), "the requests", of=of)
    for name, values in expected.items():
        check_equal(got[name].num_tokens, values[0], f"num_tokens of {name}", of=of)
        for field, value in zip(("ttft", "tpot", "latency"), values[1:], strict=True):
            check_number(getattr(got[name], field), value, f"{field} of {name}", of=of)


TRACES = {
    "one request": (
        ["2 A arrived", "5 A token", "5.5 A token", "7 A token", "7 A finished"],
        {"A": (3, 3.0, 1.0, 5.0)},
    ),
    "it is finished later than its last token": (
        ["2 A arrived", "3 A token", "4 A token", "9 A finished"],
        {"A": (2, 1.0, 1.0, 7.0)},
    ),
    "one token": (["1 A arrived", "4 A token", "4.5 A finished"], {"A": (1, 3.0, None, 3.5)}),
    "no token": (["1 A arrived", "4 A finished"], {"A": (0, None, None, 3.0)}),
    "two tokens at once": (
        ["1 A arrived", "4 A token", "4 A token", "4 A finished"],
        {"A": (2, 3.0, 0.0, 3.0)},
    ),
    "all at once": (["1 A arrived", "1 A token", "1 A finished"], {"A": (1, 0.0, None, 0.0)}),
    "two that interleave": (
        [
            *("1 B arrived", "1.5 A arrived", "2 B token", "4 A token", "4 B token"),
            *("5 A token", "6 A token", "6 A finished", "7 B token", "7.5 B finished"),
        ],
        {"B": (3, 1.0, 2.5, 6.5), "A": (3, 2.5, 1.0, 4.5)},
    ),
    "one after the other": (
        ["0 A arrived", "1 A token", "1 A finished", "9 B arrived", "9.5 B token", "10 B finished"],
        {"A": (1, 1.0, None, 1.0), "B": (1, 0.5, None, 1.0)},
    ),
}


@pytest.mark.parametrize("lines, expected", TRACES.values(), ids=list(TRACES))
def test_request_metrics_by_hand(lines, expected):
    check_metrics(events(*lines), expected)


@st.composite
def journeys(draw, min_tokens=0):
    """Requests as (id, arrival, times of tokens, end), each drawn on its own, in ticks."""
    gaps = st.integers(0, 40)
    found = []
    for number in draw(st.permutations(range(draw(st.integers(1, 6))))):
        arrival = 6400 + draw(st.integers(0, 200))
        waits = draw(st.lists(gaps, min_size=min_tokens, max_size=9))
        times = list(itertools.accumulate(waits, initial=arrival))
        found.append((f"r{number}", arrival, times[1:], times[-1] + draw(gaps)))
    return sorted(found, key=lambda journey: journey[1])


def trace_of(requests):
    happened = []
    for name, arrival, tokens, end in requests:
        happened.append((arrival, name, "arrived"))
        happened += [(tick, name, "token") for tick in tokens]
        happened.append((end, name, "finished"))
    happened.sort(key=lambda line: line[0])  # stable: a request's own order stays
    return Trace(roofline.Event(tick / 64, name, kind) for tick, name, kind in happened)


def seen(arrival, tokens, end):
    ttft = (tokens[0] - arrival) / 64 if tokens else None
    gaps = [(b - a) / 64 for a, b in itertools.pairwise(tokens)]
    return len(tokens), ttft, sum(gaps) / len(gaps) if gaps else None, (end - arrival) / 64


@given(journeys())
def test_request_metrics_of_any_trace(requests):
    expected = {name: seen(*times) for name, *times in requests}
    check_metrics(trace_of(requests), expected)


def test_request_metrics_of_nothing():
    check_metrics([], {})


def check_refused(name, *arguments, mentions=()):
    """Hold a function of traces to a ValueError; what it returns in its place is not looked at."""
    function = getattr(roofline, name)

    @functools.wraps(function)
    def call(*args):
        function(*args)
        return "no error"

    check_raises(ValueError, call, *arguments, mentions=mentions)


IMPOSSIBLE = {
    "time runs backwards": (["5 A arrived", "4.5 A token", "6 A finished"], [5, 4.5]),
    "time runs backwards between requests": (
        ["5 A arrived", "7 A token", "6 B arrived", "8 A finished", "9 B finished"], [7, 6],
    ),
    "a token before the arrival": (["1 late token", "2 late arrived", "3 late finished"], ["late"]),
    "a token of nobody": (["1 A arrived", "2 ghost token", "3 A finished"], ["ghost"]),
    "the end of nobody": (["1 A arrived", "2 ghost finished", "3 A finished"], ["ghost"]),
    "a token after the end": (["1 done arrived", "2 done finished", "3 done token"], ["done"]),
    "two ends": (["1 done arrived", "2 done finished", "3 done finished"], ["done"]),
    "two arrivals": (["1 twin arrived", "2 twin arrived", "3 twin finished"], ["twin"]),
    "an arrival after the end": (
        ["1 twin arrived", "2 twin finished", "3 twin arrived", "4 twin finished"], ["twin"],
    ),
    "no end": (["1 A arrived", "2 A token"], ["A"]),
    "two without an end": (
        ["1 stuck arrived", "1 A arrived", "2 lost arrived", "3 A token", "4 A finished"],
        ["stuck", "lost"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("function", ["request_metrics", "summarize"])
@pytest.mark.parametrize("lines, mentions", IMPOSSIBLE.values(), ids=list(IMPOSSIBLE))
def test_a_trace_that_cannot_be_is_refused(lines, mentions, function):
    check_refused(function, events(*lines), mentions=mentions)


def ranked(values, percent):
    """Try the values from the smallest on: the first that enough of them do not exceed."""
    for value in sorted(values):
        if 100 * sum(other <= value for other in values) >= percent * len(values):
            return value
    raise AssertionError("the largest value is above none")


@pytest.mark.parametrize("count", [1, 2, 3, 4, 10, 25, 99, 100, 101, 200])
def test_percentile_of_every_percent(count):
    values = [float((7 * i) % count) for i in range(count)] if count % 7 else list(range(count))
    expected = [float(ranked(values, percent)) for percent in range(1, 101)]
    got = [roofline.percentile(values, percent) for percent in range(1, 101)]
    of = f"percentile of 0 to {count - 1}, mixed, at the percents 1 to 100"
    check_equal(got, expected, "the percentiles", of=of)


@given(st.lists(st.integers(-5, 30), min_size=1, max_size=30), st.integers(1, 100))
def test_percentile_of_any_values(numbers, percent):
    values = [number / 4 for number in numbers]
    kept = list(values)
    got = roofline.percentile(values, percent)
    check_number(got, ranked(values, percent), f"percentile {percent}", of=f"of {values}")
    check_equal(values, kept, "the values, afterwards")


@pytest.mark.parametrize(
    ("values", "percent", "mentions"),
    [([], 50, []), ([1.0, 2.0], 0, [0]), ([1.0, 2.0], 101, [101]), ([1.0, 2.0], -5, [-5])],
)
def test_percentile_that_cannot_be(values, percent, mentions):
    check_raises(ValueError, roofline.percentile, values, percent, mentions=mentions)


def check_summary(trace, requests, percents):
    """Hold a summary against the requests that the trace was made of."""
    of = f"summarize of {trace}" if len(trace) < 12 else None
    columns = list(zip(*(seen(*times) for _, *times in requests), strict=True))
    seconds = trace[-1].time - trace[0].time
    given_percents = () if percents == (50, 99) else (percents,)
    got = roofline.summarize(trace, *given_percents)
    check_equal(got.num_tokens, sum(columns[0]), "num_tokens", of=of)
    check_number(got.seconds, seconds, "seconds", of=of)
    check_number(got.tokens_per_second, sum(columns[0]) / seconds, "tokens_per_second", of=of)
    for field, values in zip(("ttft", "tpot", "latency"), columns[1:], strict=True):
        values = [value for value in values if value is not None]
        table = getattr(got, field)
        expected = {percent: ranked(values, percent) for percent in percents} if values else {}
        check_equal(sorted(table), sorted(expected), f"the percents of {field}", of=of)
        for percent, value in expected.items():
            check_number(table[percent], value, f"percentile {percent} of {field}", of=of)


# (id, arrival, times of tokens, end), in 1/64 s.
SUMMARIES = {
    "one request": [("A", 640, [704, 768, 832], 832)],
    "a long one and a short one": [
        ("A", 640, list(range(704, 704 + 64 * 20, 64)), 704 + 64 * 20),
        ("B", 648, [652, 656], 656),
    ],
    "one token each": [("A", 640, [660], 664), ("B", 640, [700], 700), ("C", 645, [645], 650)],
    "one without a token": [("A", 640, [], 672), ("B", 656, [672, 676, 684], 684)],
    "nobody gets a token": [("A", 640, [], 672), ("B", 656, [], 660)],
    "a pause between two": [("A", 64, [72, 80], 80), ("B", 6400, [6432, 6464], 6464)],
}


@pytest.mark.parametrize("requests", SUMMARIES.values(), ids=list(SUMMARIES))
def test_summarize_by_hand(requests):
    check_summary(trace_of(requests), requests, (50, 99))


@given(journeys(), st.lists(st.integers(1, 100), min_size=1, max_size=4, unique=True))
def test_summarize_any_trace(requests, percents):
    trace = trace_of([*requests, ("last", 7000, [7001], 7100)])
    check_summary(trace, [*requests, ("last", 7000, [7001], 7100)], tuple(percents))


@pytest.mark.parametrize(
    "lines", [[], ["1 A arrived", "1 A token", "1 A finished"]], ids=["nothing", "no time"]
)
def test_summarize_a_trace_without_length(lines):
    check_refused("summarize", events(*lines))


def test_summarize_refuses_percents_out_of_range():
    trace = events("1 A arrived", "2 A token", "3 A finished")
    check_refused("summarize", trace, [50, 0], mentions=[0])
