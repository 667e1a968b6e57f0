"""Grades week1/mlp: RMSNorm, the gated feed-forward block, and the residual stream around them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from course.grading import check_close, check_equal, check_true, lab

mlp_lab = lab("week1/mlp")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Ragged sizes, four axes as for heads of queries, a square, one row, one number, no row at all.
SHAPES = [(3, 5, 48), (2, 3, 7, 20), (16, 16), (33,), (4, 1), (0, 16)]
# Values of everyday size, which no product turns into a number that float32 cannot hold well.
SIXTEENTHS = st.integers(-1300, 1300).map(lambda number: number / 16)
LEADING = [(3, 5), (7,), (2, 2, 3), (1, 1), (0,)]


def random(*shape: int, seed: int = 0, scale: float = 1.0, dtype=torch.float32) -> torch.Tensor:
    """Signed numbers of mixed size: every seventh is thirty times as large as the others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    x.view(-1)[::7] *= 30
    return (x * scale / 30).to(dtype)


def oracle_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """torch's own RMSNorm in float64."""
    return nn.functional.rms_norm(x.double(), x.shape[-1:], weight.double(), eps)


def oracle_silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    values = gate.double().numpy()
    with np.errstate(over="ignore"):
        return torch.from_numpy(values / (1 + np.exp(-values))) * up.double()


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter, the norms' too, signed values of about the usual size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return module


# (a row, its weight, eps, the result): roots that a person can take on paper.
BY_HAND = {
    "a row": ([1.0, 7.0], [1.0, 1.0], 0.0, [0.2, 1.4]),
    "signs": ([-3.0, 3.0, 3.0], [1.0, 1.0, 1.0], 0.0, [-1.0, 1.0, 1.0]),
    "weights": ([1.0, 7.0], [10.0, -5.0], 0.0, [2.0, -7.0]),
    "eps": ([1.0, 7.0], [10.0, 10.0], 75.0, [1.0, 7.0]),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_rms_norm_by_hand(case):
    x, weight, eps, expected = BY_HAND[case]
    got = mlp_lab.rms_norm(torch.tensor(x), torch.tensor(weight), eps)
    check_close(got, torch.tensor(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_matches_float64(shape, dtype):
    x, weight = random(*shape, dtype=dtype), random(shape[-1], seed=1, scale=20.0, dtype=dtype)
    expected = oracle_norm(x, weight, 1e-6)
    check_close(mlp_lab.rms_norm(x, weight, 1e-6), expected, dtype=dtype)


@pytest.mark.parametrize("eps", [1e-2, 1e-5, 1e-6, 1e-12], ids=lambda eps: f"eps={eps:g}")
def test_rms_norm_of_rows_near_zero(eps):
    x = random(4, 3, 20, scale=3 * eps**0.5)
    x[1, 1] = 0.0
    x[2] /= 100
    weight = random(20, seed=1, scale=20.0)
    for row, expected in zip(x, oracle_norm(x, weight, eps), strict=True):
        check_close(mlp_lab.rms_norm(row, weight, eps), expected, dtype=torch.float32)


@pytest.mark.parametrize("scale", [1e-15, 1e-3, 1e4, 1e16], ids=lambda scale: f"scale={scale:g}")
def test_rms_norm_of_any_magnitude(scale):
    x, weight = random(3, 5, 40, scale=scale), random(40, seed=1)
    expected = oracle_norm(x, weight, 1e-5)
    check_close(mlp_lab.rms_norm(x, weight, 1e-5), expected, dtype=x.dtype)


@pytest.mark.parametrize("scale", [1e-3, 300.0, 60_000.0], ids=lambda scale: f"scale={scale:g}")
def test_rms_norm_of_float16_whose_squares_do_not_fit(scale):
    x = random(6, 64, scale=scale, dtype=torch.float16).clamp(-65_000, 65_000)
    weight = random(64, seed=1, scale=10.0, dtype=torch.float16)
    expected = oracle_norm(x, weight, 1e-6)
    check_close(mlp_lab.rms_norm(x, weight, 1e-6), expected, dtype=x.dtype)


def test_rms_norm_rounds_bfloat16_once():
    x = random(64, 96, dtype=torch.bfloat16)
    weight = 2.0 ** torch.arange(-3, 3).repeat(16).to(torch.bfloat16)
    # A product with a power of two is exact, so one rounding, of at most 2⁻⁸, is all there may be.
    expected = oracle_norm(x, weight, 1e-6).unsqueeze(-1)
    got = mlp_lab.rms_norm(x, weight, 1e-6).unsqueeze(-1)
    check_close(got, expected, dtype=torch.bfloat16, tolerance=1.01 * 2**-8)


@pytest.mark.parametrize(
    "x_dtype, weight_dtype",
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
    ids=str,
)
def test_rms_norm_returns_the_dtype_of_x_whatever_the_weight_has(x_dtype, weight_dtype):
    x, weight = random(3, 24, dtype=x_dtype), random(24, seed=1, scale=20.0, dtype=weight_dtype)
    expected = oracle_norm(x, weight, 1e-6)
    check_close(mlp_lab.rms_norm(x, weight, 1e-6), expected, dtype=x_dtype)


def test_rms_norm_of_float64_stays_float64():
    x, weight = random(3, 24, dtype=torch.float64), random(24, seed=1, dtype=torch.float64)
    expected = oracle_norm(x, weight, 1e-6)
    check_close(mlp_lab.rms_norm(x, weight, 1e-6), expected)


def test_rms_norm_matches_transformers():
    norm = randomise(qwen2.Qwen2RMSNorm(56, eps=1e-2))
    x = random(3, 5, 56, scale=4.0)
    expected = norm(x).detach()
    check_close(mlp_lab.rms_norm(x, norm.weight.detach(), 1e-2), expected)


def test_rms_norm_of_a_view_that_is_not_contiguous():
    x, weight = random(2, 5, 3, 16).transpose(1, 2), random(16, seed=1)
    expected = oracle_norm(x, weight, 1e-6)
    check_close(mlp_lab.rms_norm(x, weight, 1e-6), expected, dtype=x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_leaves_its_inputs_alone(dtype):
    x, weight = random(3, 24, dtype=dtype), random(24, seed=1, dtype=dtype)
    before = x.clone(), weight.clone()
    mlp_lab.rms_norm(x, weight, 1e-6)
    call = f"rms_norm(x: (3, 24) {dtype}, weight, eps)"
    check_close(x, before[0], tolerance=0.0, of=f"x after {call}")
    check_close(weight, before[1], tolerance=0.0, of=f"weight after {call}")


@given(
    st.lists(SIXTEENTHS, min_size=1, max_size=40),
    st.floats(0.01, 100),
    st.sampled_from([1e-2, 1e-5, 1e-6]),
)
def test_rms_norm_of_a_row_does_not_depend_on_its_scale(row, factor, eps):
    x = torch.tensor([row])
    weight = torch.ones(len(row))
    expected = oracle_norm(x, weight, eps)
    check_close(mlp_lab.rms_norm(x.clone(), weight, eps), expected, dtype=torch.float32)
    # eps is a mean square too: it has to grow with the others.
    got = mlp_lab.rms_norm((x.double() * factor).float(), weight, eps * factor**2)
    check_close(got, expected, dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_silu_mul_matches_float64(shape, dtype):
    gate = random(*shape, scale=20.0, dtype=dtype)
    up = random(*shape, seed=1, scale=20.0, dtype=dtype)
    expected = oracle_silu_mul(gate, up)
    check_close(mlp_lab.silu_mul(gate, up), expected, dtype=dtype)


def test_silu_mul_of_gates_around_zero():
    gate = torch.linspace(-3, 3, 49)
    up = torch.tensor([1.0, -2.0, 0.5]).repeat(17)[:49]
    expected = oracle_silu_mul(gate, up)
    check_close(mlp_lab.silu_mul(gate, up), expected, dtype=torch.float32)


@pytest.mark.parametrize(
    "dtype, size", [(torch.float32, 1e4), (torch.float16, 200.0), (torch.bfloat16, 1e4)], ids=str
)
def test_silu_mul_of_large_gates(dtype, size):
    gate = torch.tensor([[size, -size], [90.0, -90.0], [12.0, -12.0]], dtype=dtype)
    up = torch.tensor([[-2.0, 3.0], [-0.5, -0.5], [100.0, 100.0]], dtype=dtype)
    expected = oracle_silu_mul(gate, up)
    check_close(mlp_lab.silu_mul(gate, up), expected, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_mul_leaves_its_inputs_alone(dtype):
    gate, up = random(3, 24, dtype=dtype), random(3, 24, seed=1, dtype=dtype)
    before = gate.clone(), up.clone()
    mlp_lab.silu_mul(gate, up)
    call = f"silu_mul(gate, up) of {dtype}"
    check_close(gate, before[0], tolerance=0.0, of=f"gate after {call}")
    check_close(up, before[1], tolerance=0.0, of=f"up after {call}")


@given(st.lists(SIXTEENTHS, min_size=1, max_size=20), SIXTEENTHS)
def test_silu_mul_lets_a_gate_and_its_mirror_add_up(gates, factor):
    # 8.0 stands in every row, so that nearly closed gates are not held to their own tiny size.
    gate = torch.tensor([*gates, 8.0])
    up = torch.full_like(gate, factor)
    expected, product = oracle_silu_mul(gate, up), gate * up
    got = mlp_lab.silu_mul(gate.clone(), up.clone())
    check_close(got, expected, dtype=torch.float32)
    # silu(g) − silu(−g) = g for every g.
    check_close(got - mlp_lab.silu_mul(-gate, up), product)


@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("hidden, intermediate", [(40, 88), (32, 32), (24, 7), (1, 1)])
def test_mlp_matches_transformers(hidden, intermediate, leading):
    config = qwen2.Qwen2Config(hidden_size=hidden, intermediate_size=intermediate)
    theirs = randomise(qwen2.Qwen2MLP(config))
    block = mlp_lab.MLP(hidden, intermediate)
    block.load_state_dict(theirs.state_dict())
    x = random(*leading, hidden, scale=20.0)
    expected = theirs(x).detach()
    check_close(block(x), expected, of=f"MLP({hidden}, {intermediate}) of x: {tuple(x.shape)}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mlp_in_half_precision(dtype):
    block = randomise(mlp_lab.MLP(40, 88)).to(dtype)
    config = qwen2.Qwen2Config(hidden_size=40, intermediate_size=88)
    theirs = qwen2.Qwen2MLP(config).double()
    theirs.load_state_dict(block.state_dict())
    x = random(3, 5, 40, scale=20.0, dtype=dtype)
    expected = theirs(x.double()).detach()
    check_close(block(x), expected, dtype=dtype, of=f"MLP(40, 88) of x: {tuple(x.shape)} {dtype}")


def test_mlp_has_the_checkpoint_s_parameters_and_no_others():
    shapes = {name: tuple(p.shape) for name, p in mlp_lab.MLP(40, 88).named_parameters()}
    expected = {
        "down_proj.weight": (40, 88),
        "gate_proj.weight": (88, 40),
        "up_proj.weight": (88, 40),
    }
    check_equal(dict(sorted(shapes.items())), expected, "the parameters", of="MLP(40, 88)")


def test_mlp_can_be_built_on_the_meta_device():
    with torch.device("meta"):
        block = mlp_lab.MLP(40, 88)
    devices = {parameter.device.type for parameter in block.parameters()}
    check_equal(devices, {"meta"}, "where its parameters lie", of="MLP(40, 88)")


class Doubled(nn.Module):
    """A module in the place of another: calls it and doubles the result."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return 2 * self.inner(*args, **kwargs)


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_mlp_uses_a_projection_that_was_replaced(name):
    block = randomise(mlp_lab.MLP(24, 40))
    theirs = qwen2.Qwen2MLP(qwen2.Qwen2Config(hidden_size=24, intermediate_size=40))
    theirs.load_state_dict(block.state_dict())
    for module in (block, theirs):
        setattr(module, name, Doubled(getattr(module, name)))
    x = random(5, 24, scale=20.0)
    expected = theirs(x).detach()
    check_close(block(x), expected, of=f"MLP with another module as its {name}")


def test_mlp_leaves_its_input_alone():
    block, x = randomise(mlp_lab.MLP(24, 40)), random(5, 24)
    before = x.clone()
    block(x)
    check_close(x, before, tolerance=0.0, of="x after MLP(24, 40) was called with it")


NAMES = ["self_attn", "mlp", "input_layernorm", "post_attention_layernorm"]


class Borrowed(nn.Module):
    """transformers' attention behind the call of this course; `attend` is its mask here."""

    def __init__(self, attention: nn.Module, rotary: nn.Module):
        super().__init__()
        self.attention = attention
        self.rotary = rotary

    def forward(self, x, positions, attend):
        return self.attention(x, self.rotary(x, positions), attend)[0]


@pytest.mark.parametrize("batch, tokens", [(3, 7), (1, 1), (2, 12)])
@pytest.mark.parametrize("source", [qwen2, qwen3], ids=["qwen2", "qwen3"])
def test_layer_matches_transformers(source, batch, tokens):
    kind = source.__name__.rpartition("_")[2].capitalize()
    config = getattr(source, f"{kind}Config")(
        hidden_size=40,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=12,
        rms_norm_eps=1e-2,
        rope_theta=10.0,
        attn_implementation="eager",
    )
    theirs = randomise(getattr(source, f"{kind}DecoderLayer")(config, 1))
    rotary = getattr(source, f"{kind}RotaryEmbedding")(config)
    parts = {name: getattr(theirs, name) for name in NAMES}
    layer = mlp_lab.DecoderLayer(**parts | {"self_attn": Borrowed(theirs.self_attn, rotary)})
    x = random(batch, tokens, 40, scale=5.0)
    positions = torch.arange(tokens) * 3 + torch.arange(batch).unsqueeze(-1)
    mask = torch.full((batch, 1, tokens, tokens), -1e30).triu(1)
    expected = theirs(x, attention_mask=mask, position_embeddings=rotary(x, positions))
    got = layer(x, positions, mask)
    check_close(got, expected.detach(), of=f"DecoderLayer of {kind}'s parts, x: {tuple(x.shape)}")


class Affine(nn.Module):
    """A stand-in for any of a layer's modules; notes what it is called with."""

    def __init__(self, name: str, calls: list, factor: float, shift: float):
        super().__init__()
        self.name, self.calls, self.factor, self.shift = name, calls, factor, shift

    def forward(self, x, *others, **named):
        self.calls.append((self.name, *others, *named.values()))
        return x * self.factor + self.shift


def make_layer() -> tuple[nn.Module, list]:
    calls: list = []
    # No product of two factors is 1: a step that is left out must not be made up for by another.
    numbers = {"self_attn": (3.0, 1.0), "mlp": (-3.0, 0.5), "input_layernorm": (0.25, -1.0)}
    numbers["post_attention_layernorm"] = (-0.5, 2.0)
    modules = {name: Affine(name, calls, *numbers[name]) for name in NAMES}
    return mlp_lab.DecoderLayer(**modules), calls


@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_layer_by_hand(leading):
    layer, _ = make_layer()
    x = random(*leading, 16).double()
    attended = x + 3.0 * (0.25 * x - 1.0) + 1.0
    expected = attended - 3.0 * (2.0 - 0.5 * attended) + 0.5
    got = layer(x, torch.zeros(leading, dtype=torch.int64), None)
    check_close(got, expected, of=f"DecoderLayer of x: {tuple(x.shape)}")


def test_layer_calls_its_modules_once_each_and_in_order():
    layer, calls = make_layer()
    layer(random(5, 16), torch.arange(5), None)
    order = [call[0] for call in calls]
    expected = ["input_layernorm", "self_attn", "post_attention_layernorm", "mlp"]
    check_equal(order, expected, "the modules called", of="DecoderLayer")


def test_layer_hands_positions_and_attend_to_attention_only():
    layer, calls = make_layer()
    positions, attend = torch.tensor([4, 0, 9]), lambda layer_index, q, k, v: q
    layer(random(3, 16), positions, attend)
    others = {name: arguments for name, *arguments in calls}
    check_equal(len(others["self_attn"]), 2, "arguments behind x", of="self_attn in DecoderLayer")
    check_equal(others["self_attn"][0], positions, "positions", of="self_attn in DecoderLayer")
    check_true(others["self_attn"][1] is attend, "got another attend", of="self_attn")
    for name in set(NAMES) - {"self_attn"}:
        check_equal(others[name], [], "arguments behind x", of=f"{name} in DecoderLayer")


def test_layer_keeps_its_modules_under_the_checkpoint_s_names():
    layer, _ = make_layer()
    names = sorted(name for name, _ in layer.named_children())
    check_equal(names, sorted(NAMES), "the modules", of="DecoderLayer")
    for name in NAMES:
        check_equal(getattr(layer, name).name, name, f"what is kept as {name}", of="DecoderLayer")


@pytest.mark.parametrize("name", NAMES)
def test_layer_uses_a_module_that_was_replaced(name):
    layer, calls = make_layer()
    setattr(layer, name, Affine("another", calls, 1.5, 0.0))
    layer(random(5, 16), torch.arange(5), None)
    check_equal(sum(call[0] == "another" for call in calls), 1, f"calls of the new {name}", of=name)


def test_layer_leaves_the_stream_it_was_given_alone():
    layer, _ = make_layer()
    x = random(5, 16)
    before = x.clone()
    layer(x, torch.arange(5), None)
    check_close(x, before, tolerance=0.0, of="x after DecoderLayer was called with it")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_keeps_the_dtype_of_the_stream(dtype):
    layer, _ = make_layer()
    x = random(2, 5, 16, dtype=dtype)
    got = layer(x, torch.arange(5).expand(2, 5), None)
    check_equal(got.dtype, dtype, "the dtype", of="DecoderLayer")
