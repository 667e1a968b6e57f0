"""Grades week1/gqa: grouped-query attention, the simplest attend, and the attention block.

The block is given a rotary, norms and an attend of this file or of torch, so that it is graded
alone; only the arithmetic of attention itself comes from week1/attention.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, apply_rotary_pos_emb
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from course.grading import TOLERANCE, check_close, check_equal, check_raises, check_true, lab

gqa = lab("week1/gqa")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (num_heads, num_kv_heads): groups of 1, 4, 7, 3 and 2, one key/value head among them.
HEADS = [(4, 4), (8, 2), (7, 1), (9, 3), (2, 1), (1, 1)]
# (leading shape, num_queries, num_keys, head_dim)
SHAPES = [((3,), 5, 11, 24), ((), 1, 7, 10), ((2, 3), 4, 4, 1)]
# (hidden_size, num_heads, num_kv_heads, head_dim, theta); num_heads * head_dim is hidden_size in
# one of them only.
BLOCKS = [
    (48, 8, 2, 20, 10.0),
    (40, 4, 4, 10, 1e6),
    (56, 7, 1, 6, 1e6),
    (30, 6, 3, 16, 1e4),
    (20, 1, 1, 34, 10.0),
]
# What the two families' layers have; Qwen3 has a config with biases, too.
QWEN2 = {"qkv_bias": True}
QWEN3 = {"norms": "qk"}
QWEN3_WITH_BIASES = {"qkv_bias": True, "output_bias": True, "norms": "qk"}
KINDS = pytest.mark.parametrize(
    "kind", [QWEN2, QWEN3, QWEN3_WITH_BIASES], ids=["qwen2", "qwen3", "qwen3 with biases"]
)
EPS = 1e-3
LAYER_INDEX = 17
# A block rounds after each of five steps, of which one rounding of q and k reaches the scores.
HALF_BLOCK = {dtype: 2 * TOLERANCE[dtype] for dtype in (torch.float16, torch.bfloat16)}


def random(*shape: int, seed: int = 0, scale: float = 1.0, dtype=torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def qkv(heads, leading, num_queries, num_keys, head_dim, dtype=torch.float32, scale=1.0):
    num_heads, num_kv_heads = heads
    q = random(*leading, num_heads, num_queries, head_dim, seed=1, scale=scale, dtype=dtype)
    k = random(*leading, num_kv_heads, num_keys, head_dim, seed=2, scale=scale, dtype=dtype)
    v = random(*leading, num_kv_heads, num_keys, head_dim, seed=3, dtype=dtype)
    return q, k, v


def head_by_head(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute each query head by itself, by torch's own attention in float64."""
    num_heads, group = q.shape[-3], q.shape[-3] // k.shape[-3]
    if mask is not None:
        mask = mask.expand(*q.shape[:-1], k.shape[-2])
    heads = [
        scaled_dot_product_attention(
            q[..., head, :, :].double(),
            k[..., head // group, :, :].double(),
            v[..., head // group, :, :].double(),
            attn_mask=None if mask is None else mask[..., head, :, :],
        )
        for head in range(num_heads)
    ]
    return torch.stack(heads, dim=-3)


def staircase(tokens: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


def plain_attend(layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the block is given as attend where the block alone is graded."""
    return head_by_head(q, k, v, staircase(q.shape[-2])).to(q.dtype)


class RecordingAttend:
    """Remembers what it is called with, and answers with what has nothing to do with it."""

    def __init__(self):
        self.calls: list[tuple] = []
        self.answer = torch.empty(0)

    def __call__(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.calls.append((layer_index, q, k, v))
        *leading, num_heads, tokens, head_dim = q.shape
        # Kernels keep a token's heads together, so their answer is a view in this layout.
        rows = random(*leading, tokens, num_heads, head_dim, seed=99, dtype=q.dtype)
        self.answer = rows.transpose(-3, -2)
        return self.answer


class HalfSplitRotary(nn.Module):
    """transformers' own rotation, from angles in float64."""

    def __init__(self, head_dim: int, theta: float):
        super().__init__()
        pairs = torch.arange(head_dim // 2, dtype=torch.float64)
        self.speeds = torch.exp(-pairs * 2 / head_dim * math.log(theta))

    def cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles = (positions.double().unsqueeze(-1) * self.speeds).repeat(*[1] * positions.dim(), 2)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.cos_sin(positions, torch.float64)
        rotated = apply_rotary_pos_emb(q.double(), k.double(), cos, sin, unsqueeze_dim=-3)
        return rotated[0].to(q.dtype), rotated[1].to(k.dtype)


def make_block(shape, *, qkv_bias=False, output_bias=False, norms="", dtype=torch.float32):
    """Make the block under test, with random weights, biases and norm weights.

    norms: which of q and k have a norm, such as "qk".
    """
    hidden_size, num_heads, num_kv_heads, head_dim, theta = shape
    block = gqa.Attention(
        hidden_size,
        num_heads,
        num_kv_heads,
        head_dim,
        HalfSplitRotary(head_dim, theta),
        LAYER_INDEX,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        q_norm=nn.RMSNorm(head_dim, eps=EPS) if "q" in norms else None,
        k_norm=nn.RMSNorm(head_dim, eps=EPS) if "k" in norms else None,
    )
    widths = {"q": num_heads * head_dim, "k": num_kv_heads * head_dim, "v": num_kv_heads * head_dim}
    expected = {f"{part}_proj.weight": (width, hidden_size) for part, width in widths.items()}
    expected["o_proj.weight"] = (hidden_size, num_heads * head_dim)
    if qkv_bias:
        expected |= {f"{part}_proj.bias": (width,) for part, width in widths.items()}
    if output_bias:
        expected["o_proj.bias"] = (hidden_size,)
    expected |= {f"{part}_norm.weight": (head_dim,) for part in norms}
    found = {name: tuple(tensor.shape) for name, tensor in block.state_dict().items()}
    of = f"{words(shape)}, qkv_bias={qkv_bias}, output_bias={output_bias},{with_norms(norms)}"
    check_equal(sorted(found), sorted(expected), "the names of the parameters", of=of)
    for name, want in expected.items():
        check_equal(found[name], want, f"the shape of {name}", of=of)
    randomise(block)
    return block.to(dtype)


def randomise(module: nn.Module) -> None:
    """Give every parameter random values; those of a norm lie around one, some below zero."""
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(sorted(module.named_parameters())):
            is_matrix = parameter.dim() > 1
            scale = parameter.shape[-1] ** -0.5 if is_matrix else 0.8
            parameter.copy_(random(*parameter.shape, seed=seed, scale=scale) + ("norm" in name))


def words(shape) -> str:
    names = ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "theta")
    values = ", ".join(f"{name}={value:g}" for name, value in zip(names, shape, strict=True))
    return f"Attention({values})"


def ragged_batch(hidden_size: int, tokens: int, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """Three sequences that start at 7, 0 and 129; a few columns are outliers, as in real models."""
    x = random(3, tokens, hidden_size, seed=5)
    x[..., ::13] *= 8.0
    positions = torch.arange(tokens) + torch.tensor([[7], [0], [129]])
    return x.to(dtype), positions


def short(shape) -> str:
    hidden_size, num_heads, num_kv_heads, head_dim, _ = shape
    return f"hidden_size={hidden_size}, heads={num_heads}/{num_kv_heads}, head_dim={head_dim}"


def with_norms(norms: str) -> str:
    return f" with {' and '.join(f'{part}_norm' for part in norms)}" if norms else " without norms"


def of_block(shape, x: Tensor, more: str = "") -> str:
    dtype = str(x.dtype).removeprefix("torch.")
    return f"{words(shape)}{more}, called with x: {tuple(x.shape)} {dtype}"


def oracle_block(block: nn.Module, shape, x: Tensor, positions: Tensor) -> Tensor:
    """Run transformers' layer in float64 with the weights of the block."""
    hidden_size, num_heads, num_kv_heads, head_dim, theta = shape
    is_qwen3 = "q_norm.weight" in block.state_dict()
    config = (Qwen3Config if is_qwen3 else Qwen2Config)(
        hidden_size=hidden_size,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=EPS,
        attention_bias="o_proj.bias" in block.state_dict(),
        attn_implementation="eager",
    )
    layer = (Qwen3Attention if is_qwen3 else Qwen2Attention)(config, 0).double()
    layer.load_state_dict({name: value.double() for name, value in block.state_dict().items()})
    embeddings = HalfSplitRotary(head_dim, theta).cos_sin(positions, torch.float64)
    tokens = x.shape[-2]
    mask = torch.full((tokens, tokens), -math.inf, dtype=torch.float64).triu(1)[None, None]
    with torch.no_grad():
        return layer(x.double(), embeddings, mask)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("leading, num_queries, num_keys, head_dim", SHAPES)
def test_grouped_attention_matches_torch(leading, num_queries, num_keys, head_dim, heads, dtype):
    q, k, v = qkv(heads, leading, num_queries, num_keys, head_dim, dtype)
    expected = head_by_head(q, k, v)
    check_close(gqa.grouped_attention(q, k, v), expected, dtype=dtype)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(
    "axes", ["qk", "1qk", "b1qk", "b11k", "hqk", "h1k", "bhqk", "1h1k", "bh11"], ids=str
)
def test_grouped_attention_with_any_mask(axes, heads):
    sizes = {"b": 3, "h": heads[0], "q": 5, "k": 6, "1": 1}
    q, k, v = qkv(heads, (3,), 5, 6, 8)
    mask = random(*(sizes[axis] for axis in axes), seed=4) > -0.3
    expected = head_by_head(q, k, v, mask)
    # torch gives NaN to a query that may look at nothing, the contract zeros.
    check_close(gqa.grouped_attention(q, k, v, mask), expected.nan_to_num(0.0), dtype=torch.float32)


@pytest.mark.parametrize("heads", [(5, 2), (2, 4), (7, 3)], ids=str)
def test_grouped_attention_refuses_heads_that_do_not_divide(heads):
    q, k, v = qkv(heads, (2,), 3, 3, 8)
    check_raises(ValueError, gqa.grouped_attention, q, k, v, mentions=heads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grouped_attention_of_large_inputs(dtype):
    q, k, v = qkv((8, 2), (3,), 5, 9, 32, dtype, scale=3.0)
    v = v * 100
    expected = head_by_head(q, k, v)
    check_close(gqa.grouped_attention(q, k, v), expected, dtype=dtype)


def test_grouped_attention_of_views_that_are_not_contiguous():
    q, k, v = random(3, 5, 8, 12), random(3, 7, 2, 12, seed=1), random(3, 7, 2, 12, seed=2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    expected = head_by_head(q, k, v)
    check_close(gqa.grouped_attention(q, k, v), expected, dtype=torch.float32)


def test_grouped_attention_leaves_its_inputs_alone():
    arguments = (*qkv((8, 2), (3,), 5, 5, 8), staircase(5))
    before = [argument.clone() for argument in arguments]
    gqa.grouped_attention(*arguments)
    call = "grouped_attention(q, k, v, mask)"
    for name, argument, old in zip("qkv", arguments, before, strict=False):
        check_close(argument, old, tolerance=0.0, of=f"{name} after {call}")
    check_equal(arguments[-1], before[-1], "mask after the call", of=call)


@given(st.sampled_from(HEADS), st.integers(1, 4), st.integers(1, 6), st.integers(0, 8))
def test_grouped_attention_keeps_a_kv_head_to_its_own_group(heads, num_queries, num_keys, changed):
    changed %= heads[1]
    group = heads[0] // heads[1]
    q, k, v = qkv(heads, (2,), num_queries, num_keys, 6)
    expected = head_by_head(q, k, v)
    v[:, changed] = v[:, changed] * -3 + 1
    mine = slice(changed * group, (changed + 1) * group)
    expected[:, mine] = expected[:, mine] * -3 + 1
    check_close(gqa.grouped_attention(q, k, v), expected, dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("leading, tokens", [((3,), 9), ((), 6), ((2, 2), 1), ((2,), 150)])
def test_causal_attend_matches_torch(leading, tokens, heads, dtype):
    q, k, v = qkv(heads, leading, tokens, tokens, 12, dtype)
    expected = head_by_head(q, k, v, staircase(tokens))
    check_close(gqa.causal_attend(LAYER_INDEX, q, k, v), expected, dtype=dtype)


def test_causal_attend_keeps_padding_out():
    lengths, (q, k, v) = [4, 9, 1], qkv((8, 2), (3,), 9, 9, 16)
    for row, length in enumerate(lengths):
        for x in (q, k, v):
            x[row, :, length:] = 1e4
    rows = [(row, slice(None), slice(length)) for row, length in enumerate(lengths)]
    alone = [head_by_head(q[r], k[r], v[r], staircase(r[-1].stop)) for r in rows]
    got = gqa.causal_attend(0, q, k, v)
    check_true(isinstance(got, Tensor) and got.shape == q.shape, "the result has not q's shape")
    for row, expected in zip(rows, alone, strict=True):
        check_close(got[row], expected, dtype=torch.float32)


def test_causal_attend_keeps_nothing_between_calls():
    for layer_index, tokens in [(0, 7), (0, 1), (0, 3), (1, 7), (1, 1), (0, 7)]:
        q, k, v = qkv((8, 2), (2,), tokens, tokens, 8, scale=0.5 + layer_index)
        expected = head_by_head(q, k, v, staircase(tokens))
        check_close(gqa.causal_attend(layer_index, q, k, v), expected, dtype=torch.float32)


@pytest.mark.parametrize("norms", ["", "qk"], ids=["no norms", "norms"])
@pytest.mark.parametrize(
    "qkv_bias, output_bias", list(itertools.product([False, True], repeat=2)), ids=str
)
def test_block_has_the_parameters_of_the_checkpoint(qkv_bias, output_bias, norms):
    block = make_block(BLOCKS[0], qkv_bias=qkv_bias, output_bias=output_bias, norms=norms)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        projection = getattr(block, name)
        check_true(
            isinstance(projection, nn.Linear), f"{name} is no torch.nn.Linear", of="Attention"
        )


def test_block_has_no_other_parameters_unless_asked():
    block = gqa.Attention(40, 4, 2, 6, HalfSplitRotary(6, 1e4), 0)
    names = [f"{part}_proj.weight" for part in "koqv"]
    check_equal(sorted(block.state_dict()), names, "the names of the parameters", of="Attention")


def expected_projections(block: nn.Module, x: Tensor, head_dim: int) -> list[Tensor]:
    """Compute q, k and v in float64, cut by hand into heads."""
    state = {name: value.double() for name, value in block.state_dict().items()}
    parts = []
    for part in "qkv":
        weight, bias = state[f"{part}_proj.weight"], state.get(f"{part}_proj.bias")
        flat = linear(x.double(), weight, bias)
        parts.append(torch.stack(flat.split(head_dim, dim=-1), dim=-3))
    return parts


@pytest.mark.parametrize("leading", [(3,), (), (2, 2)], ids=str)
@pytest.mark.parametrize("shape", BLOCKS[:3], ids=short)
def test_project_makes_plain_heads(shape, leading):
    block = make_block(shape, **QWEN3_WITH_BIASES)
    x = random(*leading, 5, shape[0], seed=8)
    expected, of = expected_projections(block, x, shape[3]), of_block(shape, x)
    parts = block.project(x)
    check_equal(len(parts), 3, "how many tensors project returns", of=of)
    for name, part, want in zip("qkv", parts, expected, strict=True):
        check_close(part, want, dtype=torch.float32, of=f"project, for {name} of {of}")


@pytest.mark.parametrize("norms", ["", "q", "k", "qk"], ids=lambda norms: f"norms={norms}")
@pytest.mark.parametrize("leading", [(3,), (), (2, 2)], ids=str)
@pytest.mark.parametrize("shape", BLOCKS[:3], ids=short)
def test_block_gives_attend_normed_and_rotated_heads(shape, leading, norms):
    block = make_block(shape, qkv_bias=True, output_bias=True, norms=norms)
    x = random(*leading, 6, shape[0], seed=8, scale=2.0)
    positions = torch.arange(6 * math.prod(leading)).reshape(*leading, 6).flip(-1) + 129
    of = of_block(shape, x, with_norms(norms))
    q, k, v = expected_projections(block, x, shape[3])
    attend = RecordingAttend()
    got = block(x, positions, attend)
    check_equal(len(attend.calls), 1, "how often attend was called", of=of)
    layer_index, *given_parts = attend.calls[0]
    check_equal(layer_index, LAYER_INDEX, "attend's first argument", of=of)
    state = block.state_dict()
    if "q" in norms:
        q = rms_norm(q, (shape[3],), state["q_norm.weight"].double(), EPS)
    if "k" in norms:
        k = rms_norm(k, (shape[3],), state["k_norm.weight"].double(), EPS)
    q, k = HalfSplitRotary(*shape[3:])(q, k, positions)
    for name, part, want in zip("qkv", given_parts, (q, k, v), strict=True):
        check_close(part, want, dtype=torch.float32, of=f"what makes the {name} for attend in {of}")
    merged = torch.cat(attend.answer.unbind(-3), dim=-1).double()
    expected = linear(merged, state["o_proj.weight"].double(), state["o_proj.bias"].double())
    check_close(got, expected, dtype=torch.float32, of=f"what follows attend in {of}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_block_gives_attend_the_dtype_of_x(dtype):
    block = make_block(BLOCKS[0], **QWEN3_WITH_BIASES, dtype=dtype)
    x, positions = ragged_batch(BLOCKS[0][0], 4, dtype)
    of, attend = of_block(BLOCKS[0], x), RecordingAttend()
    block(x, positions, attend)
    check_equal(len(attend.calls), 1, "how often attend was called", of=of)
    for name, part in zip("qkv", attend.calls[0][1:], strict=True):
        check_equal(part.dtype, dtype, f"the dtype of {name} as given to attend", of=of)


class RecordingRotary(nn.Module):
    """Remembers what it is called with, and answers with what has nothing to do with it."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.append((q, k, positions))
        return random(*q.shape, seed=21), random(*k.shape, seed=22)


def test_block_calls_rotary_once_and_uses_its_result():
    rotary, attend = RecordingRotary(), RecordingAttend()
    block = gqa.Attention(40, 6, 2, 10, rotary, 3)
    randomise(block)
    x, positions = ragged_batch(40, 5)
    of = "Attention with a rotary that records its calls"
    q, k, v = expected_projections(block, x, 10)
    block(x, positions, attend)
    check_equal(len(rotary.calls), 1, "how often rotary was called", of=of)
    for name, part, want in zip("qk", rotary.calls[0], (q, k), strict=False):
        check_close(part, want, dtype=torch.float32, of=f"what makes the {name} for rotary in {of}")
    check_equal(rotary.calls[0][2], positions, "the positions given to rotary", of=of)
    _, *given_parts = attend.calls[0]
    rotated = random(*q.shape, seed=21), random(*k.shape, seed=22)
    for name, part, want in zip("qkv", given_parts, (*rotated, v), strict=True):
        check_close(part, want, dtype=torch.float32, of=f"what makes the {name} for attend in {of}")


def test_block_of_a_class_that_overrides_a_method():
    shape = BLOCKS[0]

    class Doubled(gqa.Attention):
        def project(self, x):
            return tuple(2 * part for part in super().project(x))

    block = Doubled(*shape[:4], HalfSplitRotary(*shape[3:]), 0)
    randomise(block)
    attend, (x, positions) = RecordingAttend(), ragged_batch(shape[0], 4)
    block(x, positions, attend)
    of = "what makes the v for attend in a block whose class overrides project"
    check_equal(len(attend.calls), 1, "how often attend was called", of=of)
    want = 2 * expected_projections(block, x, shape[3])[2]
    check_close(attend.calls[0][3], want, dtype=torch.float32, of=of)


@KINDS
@pytest.mark.parametrize("shape", BLOCKS, ids=short)
def test_block_matches_transformers(shape, kind):
    block = make_block(shape, **kind)
    x, positions = ragged_batch(shape[0], 11)
    expected = oracle_block(block, shape, x, positions)
    got = block(x, positions, plain_attend)
    check_close(got, expected, dtype=torch.float32, of=of_block(shape, x))


@pytest.mark.parametrize("kind", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_block_in_half_precision(dtype, kind):
    shape = BLOCKS[0]
    block = make_block(shape, **kind, dtype=dtype)
    x, positions = ragged_batch(shape[0], 8, dtype)
    expected = oracle_block(block, shape, x, positions)
    got = block(x, positions, plain_attend)
    check_close(got, expected, dtype=dtype, tolerance=HALF_BLOCK[dtype], of=of_block(shape, x))


@KINDS
def test_block_with_your_own_attend_matches_transformers(kind):
    shape = BLOCKS[3]
    block = make_block(shape, **kind)
    x, positions = ragged_batch(shape[0], 7)
    expected = oracle_block(block, shape, x, positions)
    got = block(x, positions, gqa.causal_attend)
    check_close(got, expected, dtype=torch.float32, of=of_block(shape, x))


@KINDS
@pytest.mark.parametrize("tokens", [1, 8, 10])
def test_block_without_a_batch(tokens, kind):
    shape = BLOCKS[0]
    block = make_block(shape, **kind)
    x, positions = ragged_batch(shape[0], tokens)
    expected = oracle_block(block, shape, x, positions)
    for row in range(3):
        got = block(x[row], positions[row], plain_attend)
        check_close(got, expected[row], dtype=torch.float32, of=of_block(shape, x[row]))


def test_block_at_unsorted_positions():
    shape = BLOCKS[0]
    block = make_block(shape, **QWEN3)
    x, _ = ragged_batch(shape[0], 4)
    positions = torch.tensor([[5, 900, 3, 4], [0, 0, 77, 1], [31, 30, 29, 28]])
    expected = oracle_block(block, shape, x, positions)
    got = block(x, positions, plain_attend)
    check_close(got, expected, dtype=torch.float32, of=of_block(shape, x))


@KINDS
def test_block_is_not_reached_by_padding(kind):
    shape, lengths = BLOCKS[3], [4, 9, 1]
    block = make_block(shape, **kind)
    x, positions = ragged_batch(shape[0], 9)
    for row, length in enumerate(lengths):
        x[row, length:] = 300.0
        positions[row, length:] = 0
    rows = [(slice(row, row + 1), slice(length)) for row, length in enumerate(lengths)]
    alone = [oracle_block(block, shape, x[real], positions[real]) for real in rows]
    got = block(x, positions, plain_attend)
    of = of_block(shape, x, f", padded on the right to 9 tokens from {lengths}")
    right = isinstance(got, Tensor) and got.shape == x.shape
    check_true(right, "the result has not x's shape", of=of)
    for real, expected in zip(rows, alone, strict=True):
        check_close(got[real], expected, dtype=torch.float32, of=of)


def test_block_keeps_nothing_between_calls():
    shape = BLOCKS[0]
    block = make_block(shape, **QWEN2)
    for call, tokens in enumerate((9, 9, 1, 5, 9)):
        x, positions = ragged_batch(shape[0], tokens)
        x, positions = x * (call + 1) / 5, positions + tokens
        expected = oracle_block(block, shape, x, positions)
        got = block(x, positions, plain_attend)
        check_close(got, expected, dtype=torch.float32, of=of_block(shape, x))


def test_block_leaves_its_inputs_alone():
    block = make_block(BLOCKS[0], **QWEN3_WITH_BIASES)
    x, positions = ragged_batch(BLOCKS[0][0], 5)
    before = x.clone(), positions.clone()
    block(x, positions, plain_attend)
    of = of_block(BLOCKS[0], x)
    check_close(x, before[0], tolerance=0.0, of=f"x after {of}")
    check_equal(positions, before[1], "positions after the call", of=of)


class Renamed(nn.Module):
    """Calls another module: no parameter or attribute of that module is found on it."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inside = inner

    def forward(self, *args: Tensor):
        return self.inside(*args)


MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "rotary", "q_norm", "k_norm")


def test_block_uses_modules_that_were_replaced():
    shape = BLOCKS[0]
    block, other = (make_block(shape, **QWEN3_WITH_BIASES) for _ in range(2))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-1.5).add_(0.1)
    other.rotary = HalfSplitRotary(shape[3], 77.0)
    x, positions = ragged_batch(shape[0], 6)
    expected = oracle_block(other, (*shape[:4], 77.0), x, positions)
    for name in MODULES:
        setattr(block, name, Renamed(getattr(other, name)))
    got = block(x, positions, plain_attend)
    of = of_block(shape, x, f" whose {', '.join(MODULES)} were replaced")
    check_close(got, expected, dtype=torch.float32, of=of)


def test_block_has_fewer_heads_when_its_weights_are_narrower():
    whole, part = (48, 8, 2, 20, 10.0), (48, 4, 1, 20, 10.0)
    block, other = make_block(whole, **QWEN3), make_block(part, **QWEN3)
    x, positions = ragged_batch(48, 6)
    expected = oracle_block(other, part, x, positions)
    for name in MODULES:
        setattr(block, name, getattr(other, name))
    of = of_block(
        whole, x, " after its projections were replaced by those of 4 heads and 1 kv head"
    )
    parts = zip("qkv", block.project(x), expected_projections(other, x, part[3]), strict=True)
    for name, got, want in parts:
        check_close(got, want, dtype=torch.float32, of=f"project, for {name} of {of}")
    check_close(block(x, positions, plain_attend), expected, dtype=torch.float32, of=of)
