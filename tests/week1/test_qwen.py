"""Grades week1/qwen: the model's modules, its forward pass, and how a checkpoint gets into it."""

import functools
import random
from types import MappingProxyType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from course.grading import check_close, check_equal, check_raises, check_true, lab

qwen_lab = lab("week1/qwen")

FAMILIES = {
    "Qwen2": (qwen2.Qwen2Config, qwen2.Qwen2ForCausalLM),
    "Qwen3": (qwen3.Qwen3Config, qwen3.Qwen3ForCausalLM),
    "Llama": (llama.LlamaConfig, llama.LlamaForCausalLM),
}
# Every matrix whose shape allows it is square here, so that only values tell it from its transpose.
SQUARE = {
    "vocab_size": 24,
    "hidden_size": 24,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
RAGGED = SQUARE | {
    "vocab_size": 71,
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "rms_norm_eps": 1e-2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10.0},
}


def ugly(family: str, seed: int) -> dict:
    """Draw a shape that no real model has, from whose numbers no two agree by habit."""
    draw = random.Random(f"{family} {seed}")
    kv_heads, head_dim = draw.choice([1, 2, 3]), draw.choice([2, 8, 14, 20])
    heads = kv_heads * draw.choice([1, 2, 3])
    hidden = heads * draw.choice([head_dim, 5, 9])
    shape = {
        "vocab_size": draw.choice([hidden, 61, 137]),
        "hidden_size": hidden,
        "intermediate_size": draw.choice([hidden, 1, 33, 70]),
        "num_hidden_layers": draw.choice([1, 2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": draw.choice([1e-6, 1e-5, 1e-2]),
        "rope_parameters": {"rope_type": "default", "rope_theta": draw.choice([10.0, 1e6])},
        "tie_word_embeddings": draw.random() < 0.5,
        "max_position_embeddings": 64,
    }
    return shape if family == "Qwen2" else shape | {"attention_bias": draw.random() < 0.5}


def oracle_model(family: str, shape: dict, seed: int = 0) -> nn.Module:
    """transformers' model with signed weights everywhere, norms and biases included."""
    config_class, model_class = FAMILIES[family]
    model = model_class(config_class(**shape, attn_implementation="eager")).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0
        scale = 3.0 if "embed_tokens" in name else scale
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    model.tie_weights()
    return model.requires_grad_(False)


def make_config(family: str, shape: dict):
    """Read a config as it stands in the config.json of such a checkpoint."""
    return qwen_lab.QwenConfig.from_dict(shape | {"architectures": [f"{family}ForCausalLM"]})


def loaded(theirs: nn.Module, family: str, shape: dict, **arguments) -> nn.Module:
    model = qwen_lab.Qwen(make_config(family, shape), **arguments)
    qwen_lab.load_weights(model, theirs.state_dict())
    return model.eval()


def attend(layer_index, q, k, v):
    """Causal attention among the tokens of the call, by torch."""
    k, v = (part.repeat_interleave(q.shape[-3] // k.shape[-3], -3) for part in (k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def all_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name every parameter; one that has two places in a tied model by both names."""
    return dict(model.named_parameters(remove_duplicate=False))


def sharing(places: dict[str, int]) -> list[list[str]]:
    """List the groups of names that have one place together."""
    groups: dict[int, list[str]] = {}
    for name, place in sorted(places.items()):
        groups.setdefault(place, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def random_ids(vocab_size: int, *shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, shape, generator=generator)


def run(model: nn.Module, input_ids: torch.Tensor, positions: torch.Tensor | None = None):
    """Compute the logits of every token."""
    if positions is None:
        positions = torch.arange(input_ids.shape[-1]).expand(input_ids.shape)
    with torch.no_grad():
        return model.logits(model(input_ids, positions, attend))


class Doubled(nn.Module):
    """A module in the place of another: calls it and doubles the result."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return 2 * self.inner(*args, **kwargs)


def test_modules_are_of_the_documented_kinds():
    config = make_config("Qwen3", RAGGED)
    model = qwen_lab.Qwen(config)
    check_equal(model.config, config, "its config", of="Qwen(config)")
    kinds = {"embed_tokens": nn.Embedding, "layers": nn.ModuleList, "lm_head": nn.Linear}
    for name, kind in kinds.items():
        check_true(isinstance(getattr(model, name), kind), f"{name} is no {kind.__name__}", of=name)
    names = sorted(name for name, _ in model.named_children())
    check_equal(names, ["embed_tokens", "layers", "lm_head", "norm"], "the modules", of="Qwen")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_have_the_checkpoint_s_names_and_shapes(family, tied):
    shape = RAGGED | {"tie_word_embeddings": tied}
    theirs = oracle_model(family, shape)
    expected = {name.removeprefix("model."): p.shape for name, p in all_parameters(theirs).items()}
    model = qwen_lab.Qwen(make_config(family, shape))
    got = {name: parameter.shape for name, parameter in all_parameters(model).items()}
    missing, extra = sorted(expected.keys() - got.keys()), sorted(got.keys() - expected.keys())
    check_equal(missing, [], f"parameters that a {family} lacks", of="Qwen(config)")
    check_equal(extra, [], f"parameters that no {family} has", of="Qwen(config)")
    for name, want in expected.items():
        check_equal(tuple(got[name]), tuple(want), f"the shape of {name}", of="Qwen(config)")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_shared_by_tied_embeddings_only(family, tied):
    shape = RAGGED | {"tie_word_embeddings": tied}
    model = qwen_lab.Qwen(make_config(family, shape))
    expected = [["embed_tokens.weight", "lm_head.weight"]] if tied else []
    of = f"Qwen(config) of a {'tied' if tied else 'untied'} {family}"
    parameters = all_parameters(model)
    shared = sharing({name: id(parameter) for name, parameter in parameters.items()})
    check_equal(shared, expected, "names that stand for one Parameter", of=of)
    shared = sharing({name: parameter.data_ptr() for name, parameter in parameters.items()})
    check_equal(shared, expected, "names whose values lie in the same memory", of=of)
    want = len(list(oracle_model(family, shape).parameters()))
    got = len(list(model.named_parameters()))
    check_equal(got, want, "how many parameters named_parameters() lists", of=of)


def test_untied_embeddings_are_two_parameters():
    model = qwen_lab.Qwen(make_config("Qwen2", SQUARE))
    shared = model.lm_head.weight.data_ptr() == model.embed_tokens.weight.data_ptr()
    check_true(not shared, "lm_head and embed_tokens share memory", of="Qwen(an untied config)")


class Constant(nn.Module):
    """A feed-forward block with one parameter of its own, one value a layer."""

    def __init__(self, width: int):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return self.shift.expand_as(x)


def constant_model():
    calls = []

    def build(config, layer_index):
        calls.append((config, layer_index))
        return Constant(config.hidden_size)

    config = make_config("Qwen2", RAGGED)
    return qwen_lab.Qwen(config, mlp=build), calls, config


def test_mlp_builds_the_block_of_every_layer():
    model, calls, config = constant_model()
    check_equal([index for _, index in calls], [0, 1, 2], "layer_index", of="mlp(config, index)")
    check_equal([c for c, _ in calls], [config] * 3, "config", of="mlp(config, index)")
    blocks = [type(layer.mlp).__name__ for layer in model.layers]
    check_equal(blocks, ["Constant"] * 3, "the blocks in use", of="Qwen(config, mlp)")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("family", FAMILIES)
def test_load_weights_gives_every_parameter_its_tensor(family, device, tied):
    shape = SQUARE | {"tie_word_embeddings": tied}
    with torch.device(device):
        model = qwen_lab.Qwen(make_config(family, shape))
    tensors = oracle_model(family, shape, seed=5).state_dict()
    for index, name in enumerate(sorted(tensors)):
        tensors[name] = tensors[name].to([torch.float32, torch.bfloat16, torch.float16][index % 3])
    if tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    qwen_lab.load_weights(model, tensors)
    for name, parameter in all_parameters(model).items():
        source = name if name.startswith("lm_head") else f"model.{name}"
        check_close(parameter, tensors[source], tolerance=0.0, of=f"{name} after load_weights")
        check_true(not parameter.requires_grad, f"{name} requires a gradient")
        check_true(isinstance(parameter, nn.Parameter), f"{name} is no Parameter")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_load_weights_keeps_tied_embeddings_one_parameter(device):
    shape = RAGGED | {"tie_word_embeddings": True}
    with torch.device(device):
        model = qwen_lab.Qwen(make_config("Qwen2", shape))
    same = "lm_head and embed_tokens do not share one Parameter"
    check_true(model.lm_head.weight is model.embed_tokens.weight, same, of="Qwen(config)")
    qwen_lab.load_weights(model, oracle_model("Qwen2", shape).state_dict())
    check_true(model.lm_head.weight is model.embed_tokens.weight, f"{same} after loading")
    check_true(isinstance(model.lm_head.weight, nn.Parameter), "the tied weight is no Parameter")


def test_load_weights_leaves_the_mapping_alone():
    shape = SQUARE | {"tie_word_embeddings": True}
    tensors = oracle_model("Qwen2", shape).state_dict() | {"lm_head.weight": torch.zeros(24, 24)}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    model = qwen_lab.Qwen(make_config("Qwen2", shape))
    qwen_lab.load_weights(model, MappingProxyType(tensors))
    check_equal(sorted(tensors), sorted(before), "the names after load_weights")
    for name, tensor in tensors.items():
        check_close(
            tensor, before[name], tolerance=0.0, of=f"{name} given to load_weights, after it"
        )


def check_refused(model: nn.Module, tensors: dict, mentions: list) -> None:
    """Hold load_weights to refusing the tensors, and to leaving every parameter as it was."""
    before = {
        name: (p.detach().clone(), p.requires_grad) for name, p in all_parameters(model).items()
    }
    check_raises(ValueError, qwen_lab.load_weights, model, tensors, mentions=mentions)
    after = all_parameters(model)
    check_equal(sorted(after), sorted(before), "the parameters after the error")
    for name, (value, requires_grad) in before.items():
        parameter = after[name]
        check_equal(parameter.device, value.device, f"the device of {name} after the error")
        check_equal(parameter.requires_grad, requires_grad, f"requires_grad of {name} after it")
        if value.device.type != "meta":
            check_close(parameter, value, tolerance=0.0, of=f"{name} after the error")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_load_weights_names_all_that_is_wrong_at_once(device):
    tensors = oracle_model("Qwen2", RAGGED).state_dict()
    missing = ["model.norm.weight", "model.layers.1.self_attn.k_proj.bias", "lm_head.weight"]
    for name in missing:
        del tensors[name]
    unexpected = ["model.layers.3.mlp.up_proj.weight", "model.layers.0.self_attn.o_proj.bias"]
    for name in unexpected:
        tensors[name] = torch.ones(24)
    shapes = {
        "model.layers.0.mlp.up_proj.weight": (24, 37),
        "model.layers.2.input_layernorm.weight": (1,),
        "model.embed_tokens.weight": (72, 24),
    }
    for name, shape in shapes.items():
        tensors[name] = torch.ones(shape)
    sizes = ["24, 37", "37, 24", "72, 24", "71, 24"]
    with torch.device(device):
        model = qwen_lab.Qwen(make_config("Qwen2", RAGGED))
    check_refused(model, tensors, [*missing, *unexpected, *shapes, *sizes])


WRONG = {
    "one missing": ("model.layers.2.post_attention_layernorm.weight", None),
    "an untied head missing": ("lm_head.weight", None),
    "one unexpected": ("model.layers.0.mlp.gate_proj.bias", (37,)),
    "a prefix forgotten": ("embed_tokens.weight", (71, 24)),
    "a head behind the prefix": ("model.lm_head.weight", (71, 24)),
    "a matrix transposed": ("model.layers.1.mlp.down_proj.weight", (37, 24)),
    "a matrix flat": ("model.layers.1.mlp.down_proj.weight", (37 * 24,)),
    "a bias of size 1": ("model.layers.0.self_attn.q_proj.bias", (1,)),
    "a norm as a row": ("model.norm.weight", (1, 24)),
    "a norm as one number": ("model.norm.weight", ()),
    "a vocabulary padded": ("model.embed_tokens.weight", (128, 24)),
}


@pytest.mark.parametrize("name, shape", WRONG.values(), ids=list(WRONG))
def test_load_weights_refuses_a_checkpoint_that_does_not_fit(name, shape):
    tensors = oracle_model("Qwen2", RAGGED).state_dict()
    if shape is None:
        del tensors[name]
    else:
        tensors[name] = torch.ones(shape)
    check_refused(qwen_lab.Qwen(make_config("Qwen2", RAGGED)), tensors, [name])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_load_weights_does_not_take_a_tied_head_for_the_embedding(device):
    shape = RAGGED | {"tie_word_embeddings": True}
    tensors = oracle_model("Qwen2", shape).state_dict()
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    with torch.device(device):
        model = qwen_lab.Qwen(make_config("Qwen2", shape))
    check_refused(model, tensors, ["model.embed_tokens.weight"])


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_load_weights_of_an_empty_checkpoint_names_everything(tied):
    shape = RAGGED | {"tie_word_embeddings": tied}
    names = [name for name, _ in oracle_model("Qwen3", shape).named_parameters()]
    check_refused(qwen_lab.Qwen(make_config("Qwen3", shape)), {}, names)


def test_load_weights_refuses_a_checkpoint_of_another_family():
    tensors = oracle_model("Qwen3", RAGGED).state_dict()
    norms = [name for name in tensors if ".q_norm." in name or ".k_norm." in name]
    biases = [f"model.layers.{i}.self_attn.{p}_proj.bias" for i in range(3) for p in "qkv"]
    check_refused(qwen_lab.Qwen(make_config("Qwen2", RAGGED)), tensors, norms + biases)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_match_transformers(family, seed):
    shape = ugly(family, seed)
    theirs = oracle_model(family, shape, seed)
    lengths = (11, 1, 6)
    input_ids = random_ids(shape["vocab_size"], 3, max(lengths), seed=seed)
    logits = run(loaded(theirs, family, shape), input_ids.clone())
    for row, length in enumerate(lengths):
        # Its oracle never sees the padding on the right of a shorter sequence.
        expected = theirs(input_ids[row : row + 1, :length]).logits[0]
        what = f"a {family} of {shape}, row {row} of a batch, {length} tokens"
        check_close(logits[row, :length], expected, of=what)


@pytest.mark.parametrize("shape", [SQUARE, RAGGED], ids=["square", "ragged"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_square_and_of_ragged_shapes(family, tied, shape):
    shape = shape | {"tie_word_embeddings": tied}
    theirs = oracle_model(family, shape)
    input_ids = random_ids(shape["vocab_size"], 2, 9)
    expected = theirs(input_ids).logits
    check_close(run(loaded(theirs, family, shape), input_ids), expected, of=f"{family} of {shape}")


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_with_positions_that_jump(family):
    theirs = oracle_model(family, RAGGED)
    input_ids = random_ids(71, 3, 5)
    positions = torch.tensor([[2, 0, 40, 41, 3], [7, 9, 30, 31, 63], [5, 4, 3, 60, 0]])
    expected = theirs(input_ids, torch.ones_like(input_ids), positions).logits
    got = run(loaded(theirs, family, RAGGED), input_ids, positions)
    check_close(got, expected, of=f"{family}, positions {positions.tolist()}")


@pytest.mark.parametrize("num_positions", [1, 64, 5000])
def test_logits_at_the_last_position_of_the_config(num_positions):
    shape = RAGGED | {"max_position_embeddings": num_positions}
    theirs = oracle_model("Qwen2", shape)
    model = loaded(theirs, "Qwen2", shape)
    # A token that sees only itself has the same logits wherever it stands.
    expected = theirs(torch.tensor([[7]])).logits
    of = f"a token at position {num_positions - 1}, max_position_embeddings={num_positions}"
    check_close(
        run(model, torch.tensor([[7]]), torch.tensor([[num_positions - 1]])), expected, of=of
    )


@pytest.mark.parametrize("leading", [(), (1,), (2, 2)], ids=str)
def test_logits_of_any_leading_shape(leading):
    theirs = oracle_model("Qwen3", RAGGED)
    input_ids = random_ids(71, *leading, 7)
    expected = theirs(input_ids.reshape(-1, 7)).logits.reshape(*leading, 7, 71)
    got = run(loaded(theirs, "Qwen3", RAGGED), input_ids)
    check_close(got, expected, of=f"input_ids: {tuple(input_ids.shape)}")


def test_logits_of_embeddings_with_outliers():
    theirs = oracle_model("Qwen2", RAGGED)
    theirs.model.embed_tokens.weight[:, 3] *= 1000
    theirs.model.embed_tokens.weight[5] /= 1000
    input_ids = random_ids(71, 2, 8)
    input_ids[:, 2] = 5
    expected = theirs(input_ids).logits
    check_close(run(loaded(theirs, "Qwen2", RAGGED), input_ids), expected, of="large embeddings")


@functools.cache
def ragged_qwen2() -> nn.Module:
    return oracle_model("Qwen2", RAGGED)


@settings(max_examples=10)
@given(st.data())
def test_tokens_do_not_see_those_behind_them(data):
    theirs = ragged_qwen2()
    model = loaded(theirs, "Qwen2", RAGGED)
    ids = data.draw(st.lists(st.integers(0, 70), min_size=2, max_size=12))
    length = data.draw(st.integers(1, len(ids) - 1))
    expected = theirs(torch.tensor([ids])).logits[0]
    whole = run(model, torch.tensor(ids))
    check_close(whole, expected, of=f"input_ids: {ids}")
    check_close(run(model, torch.tensor(ids[:length])), whole[:length], of=f"{ids[:length]}")


def test_forward_returns_hidden_states_behind_the_last_norm():
    theirs = oracle_model("Qwen2", RAGGED)
    input_ids = random_ids(71, 3, 6)
    expected = theirs.model(input_ids).last_hidden_state
    model = loaded(theirs, "Qwen2", RAGGED)
    got = model(input_ids, torch.arange(6).expand(3, 6), attend)
    check_close(got, expected, of="Qwen's forward")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision(family, dtype):
    theirs = oracle_model(family, RAGGED).to(dtype)
    model = loaded(theirs, family, RAGGED)
    input_ids = random_ids(71, 2, 9)
    hidden = model(input_ids.clone(), torch.arange(9).expand(2, 9), attend)
    of = f"a {family} in {dtype}"
    check_equal(hidden.dtype, dtype, "the dtype of the hidden states", of=of)
    expected = theirs.float()(input_ids).logits
    # Three layers round the stream about twenty times; a wrong model is off by the whole.
    check_close(model.logits(hidden), expected, tolerance=0.1, of=of)


def test_forward_keeps_nothing_between_calls():
    model = loaded(oracle_model("Qwen3", RAGGED), "Qwen3", RAGGED)
    first, other = random_ids(71, 2, 6), random_ids(71, 3, 9, seed=1)
    before, ids_before = run(model, first), first.clone()
    run(model, other)
    changed = run(model, (first + 1) % 71)
    check_true(not torch.equal(changed, before), "other ids of the same shape give the same logits")
    check_close(run(model, first), before, tolerance=0.0, of="the same ids again")
    check_equal(first, ids_before, "input_ids after the calls", of="Qwen")


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_of_any_rows(tied, leading):
    shape = RAGGED | {"tie_word_embeddings": tied}
    theirs = oracle_model("Qwen2", shape)
    model = loaded(theirs, "Qwen2", shape)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(*leading, 24, generator=generator) * 5
    expected = hidden.double() @ theirs.lm_head.weight.double().T
    got = model.logits(hidden)
    check_close(got, expected, dtype=torch.float32, of=f"logits(hidden: {tuple(hidden.shape)})")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_logits_are_float32_whatever_the_model_is(dtype):
    theirs = oracle_model("Qwen2", RAGGED).to(dtype)
    hidden = (torch.arange(48).reshape(2, 24) / 10 - 2).to(dtype)
    expected = hidden.double() @ theirs.lm_head.weight.double().T
    got = loaded(theirs, "Qwen2", RAGGED).logits(hidden)
    what = f"logits(hidden: (2, 24) {dtype})"
    check_close(got, expected, dtype=torch.float32, tolerance=1.6e-2, of=what)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_built_on_the_meta_device_is_whole_after_loading(family):
    theirs = oracle_model(family, RAGGED)
    with torch.device("meta"):
        model = qwen_lab.Qwen(make_config(family, RAGGED))
    devices = {parameter.device.type for parameter in model.parameters()}
    check_equal(devices, {"meta"}, "where the parameters lie", of="Qwen(config) on meta")
    qwen_lab.load_weights(model, theirs.state_dict())
    input_ids = random_ids(71, 2, 6)
    expected = theirs(input_ids).logits
    check_close(run(model, input_ids), expected, of=f"{family}, built on meta")


def test_every_layer_tells_attend_its_own_index():
    model = loaded(oracle_model("Qwen3", RAGGED), "Qwen3", RAGGED)
    calls = []

    def watch(layer_index, q, k, v):
        calls.append((layer_index, tuple(q.shape), tuple(k.shape), tuple(v.shape)))
        return attend(layer_index, q, k, v)

    model(random_ids(71, 2, 7), torch.arange(7).expand(2, 7), watch)
    expected = [(i, (2, 6, 7, 10), (2, 2, 7, 10), (2, 2, 7, 10)) for i in range(3)]
    check_equal(calls, expected, "layer_index and shapes that attend got", of="Qwen of 3 layers")


class Recorder(nn.Module):
    """A layer that notes what it is called with and passes the stream on."""

    def __init__(self):
        super().__init__()
        self.calls: list = []

    def forward(self, x, positions, attend):
        self.calls.append((x, positions, attend))
        return x


def test_every_layer_gets_the_same_positions_and_attend():
    model = loaded(oracle_model("Qwen2", RAGGED), "Qwen2", RAGGED)
    model.layers = nn.ModuleList([Recorder(), Recorder(), Recorder(), Recorder()])
    positions = torch.tensor([[3, 4, 5, 9], [0, 1, 2, 63]])
    input_ids = random_ids(71, 2, 4)
    hidden = model(input_ids, positions, attend)
    expected = model.norm(model.embed_tokens(input_ids))
    check_close(hidden, expected, of="Qwen whose layers pass the stream on")
    for index, layer in enumerate(model.layers):
        of = f"layers[{index}] of 4"
        check_equal(len(layer.calls), 1, "number of calls", of=of)
        _, got_positions, got_attend = layer.calls[0]
        check_equal(got_positions, positions, "positions", of=of)
        check_true(got_attend is attend, "attend is not the one that forward was given", of=of)


class Pair(nn.Module):
    """A layer of a fused kind: it passes the stream and a term not yet added to it."""

    def forward(self, x, positions, attend):
        stream, pending = x if isinstance(x, tuple) else (x, torch.zeros_like(x))
        return stream + pending, stream * 0.5


class NormOfPair(nn.Module):
    def forward(self, x):
        return x[0] + x[1]


def test_what_passes_between_layers_may_be_anything():
    model = loaded(oracle_model("Qwen2", RAGGED), "Qwen2", RAGGED)
    model.layers = nn.ModuleList([Pair(), Pair()])
    model.norm = NormOfPair()
    input_ids = random_ids(71, 2, 4)
    x = model.embed_tokens(input_ids)
    got = model(input_ids, torch.arange(4).expand(2, 4), attend)
    check_close(got, x * 1.5 + x * 0.5, of="Qwen whose layers pass a pair of tensors")


@pytest.mark.parametrize(
    "path",
    [
        "embed_tokens",
        "layers.1",
        "layers.0.self_attn.o_proj",
        "layers.2.self_attn.q_norm",
        "layers.1.mlp",
        "layers.1.mlp.up_proj",
        "layers.2.post_attention_layernorm",
        "norm",
        "lm_head",
    ],
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_module_that_was_replaced_is_used(path, tied):
    shape = RAGGED | {"tie_word_embeddings": tied}
    theirs = oracle_model("Qwen3", shape)
    model = loaded(theirs, "Qwen3", shape)
    model.set_submodule(path, Doubled(model.get_submodule(path)))
    theirs_path = path if path == "lm_head" else f"model.{path}"
    theirs.set_submodule(theirs_path, Doubled(theirs.get_submodule(theirs_path)))
    input_ids = random_ids(71, 2, 5)
    expected = theirs(input_ids).logits
    check_close(run(model, input_ids), expected, of=f"another module as {path}")


def test_weights_follow_the_model_s_own_modules():
    theirs = oracle_model("Qwen2", RAGGED)
    model, _, _ = constant_model()
    tensors = {name: t for name, t in theirs.state_dict().items() if ".mlp." not in name}
    missing = [f"model.layers.{i}.mlp.shift" for i in range(3)]
    check_raises(ValueError, qwen_lab.load_weights, model, tensors, mentions=missing)
    for index, name in enumerate(missing):
        tensors[name] = torch.full((24,), float(index + 1))
    qwen_lab.load_weights(model, tensors)
    for index, layer in enumerate(theirs.model.layers):
        layer.mlp = Constant(24)
        layer.mlp.shift.data += index + 1
    input_ids = random_ids(71, 2, 5)
    check_close(
        run(model, input_ids), theirs(input_ids).logits.detach(), of="a model with own MLPs"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_folder_gives_the_same_logits(family, tmp_path):
    shape = ugly(family, 99)
    theirs = oracle_model(family, shape)
    theirs.save_pretrained(tmp_path)
    model = qwen_lab.load_model(tmp_path)
    input_ids = random_ids(shape["vocab_size"], 2, 8)
    what = f"a {family} of {shape}, saved and loaded"
    expected = theirs(input_ids).logits
    check_close(run(model, input_ids), expected, of=what)


def test_loading_again_replaces_what_was_there():
    first, second = oracle_model("Qwen2", RAGGED, seed=1), oracle_model("Qwen2", RAGGED, seed=2)
    model = loaded(first, "Qwen2", RAGGED)
    qwen_lab.load_weights(model, second.state_dict())
    input_ids = random_ids(71, 2, 5)
    expected = second(input_ids).logits
    check_close(run(model, input_ids), expected, of="a model loaded twice")


@pytest.mark.parametrize("head", ["absent", "other values", "other shape"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_tied_model_does_not_look_at_the_checkpoint_s_head(device, head):
    shape = RAGGED | {"tie_word_embeddings": True}
    theirs = oracle_model("Qwen3", shape)
    tensors = {n: t for n, t in theirs.state_dict().items() if n != "lm_head.weight"}
    if head != "absent":
        size = (71, 24) if head == "other values" else (3,)
        tensors = {"lm_head.weight": torch.ones(size), **tensors}
    with torch.device(device):
        model = qwen_lab.Qwen(make_config("Qwen3", shape))
    qwen_lab.load_weights(model, tensors)
    input_ids = random_ids(71, 2, 5)
    what = f"a tied model, lm_head.weight in the checkpoint: {head}"
    expected = theirs(input_ids).logits
    check_close(run(model, input_ids), expected, of=what)
