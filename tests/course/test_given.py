"""What the labs give to learners: configs and weights from a folder, tables, parameters, traces.

Graded suites test what learners write; these test the rest of the same files. The reference is
imported in a process of its own, so that no other test meets it.
"""

import json
import math
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from course.labs import ROOT

# Qwen2.5-0.5B-Instruct's config.json as transformers 4 wrote it, made tiny.
OLD_STYLE = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 24,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 50,
}
# The same as transformers 5 writes it, for the other two families.
NEW_STYLE = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "dtype": "bfloat16",
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 24,
    "intermediate_size": 40,
    "layer_types": ["full_attention", "full_attention"],
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 5000000.0, "rope_type": "default"},
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 50,
}
LLAMA = NEW_STYLE | {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": True,
    "head_dim": None,
    "mlp_bias": False,
    "model_type": "llama",
}


def enter_reference(folder: str) -> None:
    sys.path.insert(0, folder)
    torch.set_num_threads(1)
    import week1.qwen

    assert week1.qwen.__file__.startswith(folder)


@pytest.fixture(scope="module")
def reference():
    """Call a function of this module where `weekN` is the reference; its errors come back too."""
    context = multiprocessing.get_context("spawn")
    folder = (str(ROOT / "solutions"),)
    with ProcessPoolExecutor(1, context, enter_reference, folder) as pool:
        yield lambda function, *args: pool.submit(function, *args).result(timeout=60)


def read_config(raw: object) -> dict:
    from week1.qwen import QwenConfig

    return vars(QwenConfig.from_dict(raw))


def read_config_folder(folder: Path) -> dict:
    from week1.qwen import QwenConfig

    return vars(QwenConfig.from_folder(folder))


def read_tensors(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, list]:
    from week1.qwen import read_safetensors

    tensors = read_safetensors(folder, dtype, "cpu")
    assert all(tensor.dtype == dtype for tensor in tensors.values())
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def save_model(raw: dict, folder: Path) -> None:
    """Write a checkpoint folder with random weights, in one file."""
    from week1.qwen import Qwen, QwenConfig

    torch.manual_seed(0)
    model = Qwen(QwenConfig.from_dict(raw))
    tensors = {
        name if name.startswith("lm_head") else f"model.{name}": torch.randn_like(parameter)
        for name, parameter in model.named_parameters()
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")


def model_facts(folder: Path, *dtype: torch.dtype) -> dict:
    """Load a folder. Returns what can be told about the model, and its logits for five ids."""
    from week1.gqa import causal_attend
    from week1.qwen import load_model

    model = load_model(folder, *dtype)
    ids = torch.tensor([3, 1, 4, 1, 5])
    with torch.no_grad():
        hidden = model(ids, torch.arange(5), causal_attend)
        logits = model.logits(hidden)
    parameters = list(model.parameters())
    return {
        "dtypes": {parameter.dtype for parameter in parameters},
        "devices": {parameter.device.type for parameter in parameters},
        "requires_grad": any(parameter.requires_grad for parameter in parameters),
        "training": model.training,
        "hidden_dtype": hidden.dtype,
        "logits": logits.tolist(),
    }


def load(folder: Path) -> None:
    from week1.qwen import load_model

    load_model(folder)


def without(raw: dict, *names: str) -> dict:
    return {name: value for name, value in raw.items() if name not in names}


def test_a_config_of_transformers_4(reference):
    assert reference(read_config, OLD_STYLE) == {
        "vocab_size": 50,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "qkv_bias": True,
        "output_bias": False,
        "qk_norm": False,
    }


def test_a_config_of_transformers_5(reference):
    config = reference(read_config, NEW_STYLE)
    assert (config["head_dim"], config["rope_theta"]) == (16, 5e6)
    assert (config["qk_norm"], config["qkv_bias"], config["output_bias"]) == (True, False, False)
    assert config["tie_word_embeddings"] is False


@pytest.mark.parametrize("bias", [True, False])
def test_the_biases_of_a_llama(reference, bias):
    config = reference(read_config, LLAMA | {"attention_bias": bias})
    assert (config["qkv_bias"], config["output_bias"], config["qk_norm"]) == (bias, bias, False)
    assert config["head_dim"] == 6


def test_a_qwen2_has_its_biases_whatever_attention_bias_says(reference):
    config = reference(read_config, OLD_STYLE | {"attention_bias": True})
    assert (config["qkv_bias"], config["output_bias"]) == (True, False)


def test_defaults_are_those_of_transformers(reference):
    names = ("num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings")
    config = reference(read_config, without(OLD_STYLE, *names, "hidden_act"))
    assert [config[name] for name in names] == [4, 1e-6, 10_000.0, False]


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Llama"])
def test_a_config_as_transformers_itself_writes_it(reference, family, tmp_path):
    import transformers

    theirs = getattr(transformers, f"{family}Config")(
        architectures=[f"{family}ForCausalLM"],
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=3,
        num_hidden_layers=2,
        rope_theta=1234.5,
        rms_norm_eps=1e-3,
        tie_word_embeddings=True,
    )
    theirs.save_pretrained(tmp_path)
    config = reference(read_config_folder, tmp_path)
    for name in set(config) - {"head_dim", "rope_theta", "qkv_bias", "output_bias", "qk_norm"}:
        assert config[name] == getattr(theirs, name), name
    assert config["rope_theta"] == 1234.5
    assert config["head_dim"] == (128 if family == "Qwen3" else 8)


ROPE_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
UNSUPPORTED = {
    "another architecture": ({"architectures": ["Gemma3ForCausalLM"]}, "'Gemma3ForCausalLM'"),
    "no architecture": ({"architectures": []}, "architecture"),
    "architectures as null": ({"architectures": None}, "architecture"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "a bias in the MLP": ({"mlp_bias": True}, "mlp_bias True"),
    "a sliding window": ({"use_sliding_window": True}, "use_sliding_window True"),
    "a sliding layer": (
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types 'sliding_attention'",
    ),
    "quantized weights": ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    "rope_type in the new place": ({"rope_parameters": ROPE_YARN}, "rope_type 'yarn'"),
    "rope_type in the old place": ({"rope_scaling": ROPE_YARN}, "rope_type 'yarn'"),
    "rope_type under its old name": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_type 'linear'",
    ),
    "an unknown rope_type": (
        {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}},
        "rope_type 'spiral' is not supported; supported: default",
    ),
    "rope for each kind of layer": (
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        "rope_parameters",
    ),
    "rope as text": ({"rope_scaling": "yarn"}, "rope_scaling 'yarn'"),
    "a part of each head rotated": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "num_attention_heads 4"),
    "a size of 0": ({"vocab_size": 0}, "vocab_size"),
    "a negative size": ({"num_hidden_layers": -1}, "at least 1, got -1"),
    "a size as text": ({"hidden_size": "24"}, "hidden_size in config.json must be a whole number"),
    "a size as a fraction": ({"intermediate_size": 40.5}, "got 40.5"),
    "a size as true": ({"num_attention_heads": True}, "got True"),
    "more heads than width": ({"num_attention_heads": 48}, "head_dim"),
    "eps as text": ({"rms_norm_eps": "1e-6"}, "rms_norm_eps in config.json must be a number"),
    "eps of null": ({"rms_norm_eps": None}, "rms_norm_eps"),
    "eps negative": ({"rms_norm_eps": -1e-6}, "above 0, got -1e-06"),
    "eps not a number": ({"rms_norm_eps": math.nan}, "got nan"),
    "theta of 0": ({"rope_theta": 0}, "rope_theta in config.json must be a number above 0, got 0"),
    "theta infinite": ({"rope_parameters": {"rope_theta": math.inf}}, "rope_theta"),
    "a flag as text": ({"tie_word_embeddings": "false"}, "true or false, got 'false'"),
    "a flag as a number": ({"attention_bias": 1}, "attention_bias in config.json must be true"),
}


@pytest.mark.parametrize("changes, message", UNSUPPORTED.values(), ids=list(UNSUPPORTED))
def test_a_config_that_cannot_be_served(reference, changes, message):
    with pytest.raises(ValueError) as caught:
        reference(read_config, OLD_STYLE | changes)
    assert message in str(caught.value)


def test_an_unsupported_architecture_names_the_supported_ones(reference):
    with pytest.raises(ValueError, match="Qwen2ForCausalLM, Qwen3ForCausalLM, LlamaForCausalLM"):
        reference(read_config, OLD_STYLE | {"architectures": ["GPT2LMHeadModel"]})


@pytest.mark.parametrize(
    "name",
    [
        "architectures",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    ],
)
def test_a_config_without_an_entry(reference, name):
    with pytest.raises(ValueError, match=name.removesuffix("s")):
        reference(read_config, without(OLD_STYLE, name))


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "is not a checkpoint folder: it has no config.json"),
        (b'{"vocab_size": ', "config.json is not valid JSON"),
        (b"\xff\xfe\x00", "config.json is not valid JSON"),
        (b"", "config.json is not valid JSON"),
        (b"[1, 2]", "must hold a JSON object, got list"),
    ],
    ids=["absent", "cut off", "not text", "empty", "a list"],
)
def test_a_folder_without_a_usable_config(reference, tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        reference(load, tmp_path)
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_folder_that_does_not_exist(reference, tmp_path):
    with pytest.raises(ValueError, match="is not a checkpoint folder"):
        reference(load, tmp_path / "nowhere")


@pytest.mark.parametrize("raw", [OLD_STYLE, NEW_STYLE, LLAMA], ids=["qwen2", "qwen3", "llama"])
def test_a_model_is_loaded_as_transformers_loads_it(reference, raw, tmp_path):
    from transformers import AutoModelForCausalLM

    raw = raw | {"max_position_embeddings": 64}
    reference(save_model, raw, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor([[3, 1, 4, 1, 5]])).logits[0]
    facts = reference(model_facts, tmp_path)
    error = (torch.tensor(facts.pop("logits")) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5
    assert facts == {
        "dtypes": {torch.float32},
        "devices": {"cpu"},
        "requires_grad": False,
        "training": False,
        "hidden_dtype": torch.float32,
    }


def test_a_model_in_bfloat16(reference, tmp_path):
    reference(save_model, OLD_STYLE | {"max_position_embeddings": 64}, tmp_path)
    wide, narrow = (
        reference(model_facts, tmp_path),
        reference(model_facts, tmp_path, torch.bfloat16),
    )
    assert narrow["dtypes"] == {torch.bfloat16} == {narrow["hidden_dtype"]}
    expected = torch.tensor(wide["logits"])
    error = (torch.tensor(narrow["logits"]) - expected).abs().max() / expected.abs().max()
    assert 0 < error < 0.1


def shard(folder: Path, files: dict[str, list[str]]) -> None:
    """Split model.safetensors into the given files, with an index."""
    tensors = load_file(folder / "model.safetensors")
    for file, names in files.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    (folder / "model.safetensors").unlink()
    write_index(folder, {name: file for file, names in files.items() for name in names})


def write_index(folder: Path, weight_map: object) -> None:
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def test_several_shards_are_one_checkpoint(reference, tmp_path):
    reference(save_model, NEW_STYLE, tmp_path)
    whole = reference(read_tensors, tmp_path)
    names = sorted(whole)
    files = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
    shard(tmp_path, files)
    assert reference(read_tensors, tmp_path) == whole
    reference(load, tmp_path)


def test_shards_as_transformers_writes_them(reference, tmp_path):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    settings = without(NEW_STYLE, "dtype", "sliding_window")
    theirs = Qwen3ForCausalLM(Qwen3Config(**settings | {"max_position_embeddings": 64}))
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    expected = {name: tensor.tolist() for name, tensor in theirs.state_dict().items()}
    assert reference(read_tensors, tmp_path) == expected


def test_a_shard_that_is_missing(reference, tmp_path):
    reference(save_model, NEW_STYLE, tmp_path)
    names = sorted(load_file(tmp_path / "model.safetensors"))
    shard(tmp_path, {"a.safetensors": names[::2], "b.safetensors": names[1::2]})
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no weights: b\.safetensors is missing"):
        reference(load, tmp_path)


def test_a_shard_that_the_index_does_not_name_is_not_read(reference, tmp_path):
    save_file({"x": torch.ones(2)}, tmp_path / "a.safetensors")
    save_file({"y": torch.ones(2)}, tmp_path / "b.safetensors")
    write_index(tmp_path, {"x": "a.safetensors"})
    assert reference(read_tensors, tmp_path) == {"x": [1.0, 1.0]}


@pytest.mark.parametrize(
    "name, message",
    [
        ("../secret.safetensors", r"index\.json names '\.\./secret\.safetensors', which is not"),
        ("/etc/hostname", r"index\.json names '/etc/hostname', which is not"),
        ("sub/secret.safetensors", r"index\.json names 'sub/secret\.safetensors', which is not"),
        ("..", "is missing"),
        ("", "is missing"),
        (3, "3 is missing"),
    ],
)
def test_an_index_names_files_of_its_own_folder_only(reference, tmp_path, name, message):
    folder = tmp_path / "model"
    folder.mkdir()
    # A file of that name inside would hide that the name itself is wrong.
    for place in (tmp_path, folder):
        save_file({"x": torch.ones(2)}, place / "secret.safetensors")
    write_index(folder, {"x": name})
    with pytest.raises(ValueError, match=message):
        reference(read_tensors, folder)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": null}', '{"weight_map": ["a.safetensors"]}']
)
def test_an_index_that_is_none(reference, tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"index\.json is not an index of weights"):
        reference(read_tensors, tmp_path)


def test_a_folder_without_weights(reference, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OLD_STYLE), encoding="utf-8")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(ValueError, match=r"model\.safetensors is missing \(safetensors only\)"):
        reference(load, tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 8, 200, 0.5, 0.999])
def test_a_truncated_file(reference, tmp_path, kept):
    reference(save_model, OLD_STYLE, tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: kept if isinstance(kept, int) else int(len(content) * kept)])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or truncated"):
        reference(load, tmp_path)


def test_weights_that_do_not_fit_the_config(reference, tmp_path):
    reference(save_model, OLD_STYLE, tmp_path)
    raw = OLD_STYLE | {"num_hidden_layers": 3, "vocab_size": 51}
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        reference(load, tmp_path)
    assert "missing: model.layers.2.mlp.up_proj.weight" in str(caught.value)
    assert "shape of model.embed_tokens.weight" in str(caught.value)


def rotary_facts() -> dict:
    from week1.rope import Rotary, rotary_table

    exact = rotary_table(8, 50, 1e6)
    with torch.device("meta"):
        on_meta = Rotary(8, 50, 1e6)
    rotary = torch.nn.Sequential(Rotary(8, 50, 1e6)).to(torch.bfloat16)[0]
    q = torch.randn(2, 3, 4, 8)
    k, positions = torch.randn(2, 1, 4, 8), torch.tensor([[0, 7, 49, 3], [1, 2, 3, 4]])
    rotated = rotary(q, k, positions)
    return {
        "not rounded": rotary.table.dtype == torch.float32 and torch.equal(rotary.table, exact),
        "not on meta": torch.equal(on_meta.table, exact),
        "not in a checkpoint": list(rotary.state_dict()) == [] == list(rotary.parameters()),
        "q and k": [tuple(part.shape) for part in rotated] == [(2, 3, 4, 8), (2, 1, 4, 8)],
        "position 0 stays": torch.equal(rotated[0][0, :, 0], q[0, :, 0]),
        "others turn": not torch.equal(rotated[1][0, :, 1], k[0, :, 1]),
        "dtype kept": rotary(q.bfloat16(), k.bfloat16(), positions)[0].dtype == torch.bfloat16,
    }


def test_the_rotary_table_survives_what_happens_to_its_model(reference):
    facts = reference(rotary_facts)
    assert [name for name, holds in facts.items() if not holds] == []


def norm_facts() -> tuple[bool, bool, list[str]]:
    from week1.mlp import RMSNorm, rms_norm

    norm = RMSNorm(6, 0.25)
    x = torch.randn(3, 6)
    ones = torch.equal(norm(x), rms_norm(x, torch.ones(6), 0.25))
    norm.weight.data = torch.randn(6)
    weighted = torch.equal(norm(x), rms_norm(x, norm.weight, 0.25))
    return ones, weighted, [name for name, _ in norm.named_parameters()]


def test_the_norm_starts_with_ones_and_passes_its_eps_on(reference):
    assert reference(norm_facts) == (True, True, ["weight"])


def make_params(values: dict) -> dict:
    from week1.sampling import SamplingParams

    return vars(SamplingParams(**values))


def test_sampling_parameters_by_default_change_nothing(reference):
    assert reference(make_params, {}) == {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": None,
    }


@pytest.mark.parametrize(
    "name, values",
    [
        ("temperature", [0.0, 1e-6, 100.0]),
        ("top_k", [0, 1, 10**9]),
        ("top_p", [1e-9, 1.0]),
        ("min_p", [0.0, 1.0]),
        ("repetition_penalty", [0.01, 10.0]),
        ("presence_penalty", [-2.0, 2.0]),
        ("frequency_penalty", [-2.0, 2.0]),
        ("seed", [0, 2**63 - 1, None]),
    ],
)
def test_sampling_parameters_at_their_limits(reference, name, values):
    for value in values:
        assert reference(make_params, {name: value})[name] == value


@pytest.mark.parametrize(
    "name, values, limit",
    [
        ("temperature", [-0.1, math.nan, math.inf], "finite and at least 0"),
        ("top_k", [-1], "at least 0"),
        ("top_p", [0.0, -0.5, 1.0001, math.nan], "in (0, 1]"),
        ("min_p", [-0.1, 1.1, math.nan], "in [0, 1]"),
        ("repetition_penalty", [0.0, -1.0, math.nan, math.inf], "above 0"),
        ("presence_penalty", [-2.1, 2.1, math.nan], "in [-2, 2]"),
        ("frequency_penalty", [-2.1, 2.1, math.nan], "in [-2, 2]"),
        ("seed", [-1, 2**63], "in [0, 2**63) or None"),
    ],
)
def test_sampling_parameters_outside_their_limits(reference, name, values, limit):
    for value in values:
        with pytest.raises(ValueError) as caught:
            reference(make_params, {name: value})
        assert name in str(caught.value) and limit in str(caught.value)
        assert f"got {value}" in str(caught.value)


def greedy_choices() -> list[int]:
    from week1.generate import greedy

    rows = [[1.0, 5.0, 5.0, 2.0], [-math.inf, -3.0, -math.inf], [0.0]]
    return [greedy(torch.tensor(row), [7]) for row in rows]


def test_greedy_takes_the_lowest_of_equal_ids(reference):
    assert reference(greedy_choices) == [1, 1, 0]


def fitted_cache(dtype: torch.dtype) -> tuple:
    from week1.qwen import Qwen, QwenConfig
    from week2.kv_cache import cache_for

    model = Qwen(QwenConfig.from_dict(NEW_STYLE)).to(dtype)
    cache = cache_for(model, 3)
    cache.reserve(16)
    shapes = [tuple(part.shape) for part in cache.read(model.config.num_hidden_layers - 1)]
    return shapes, cache.read(0)[0].dtype, cache.num_computed_tokens, cache.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cache_fits_its_model(reference, dtype):
    heads, head_dim = NEW_STYLE["num_key_value_heads"], NEW_STYLE["head_dim"]
    shape = (3, heads, 16, head_dim)
    num_bytes = 2 * NEW_STYLE["num_hidden_layers"] * 3 * heads * 16 * head_dim * dtype.itemsize
    assert reference(fitted_cache, dtype) == ([shape, shape], dtype, [0, 0, 0], num_bytes)


def fused_and_not(raw: dict, dtype: torch.dtype) -> dict:
    """Run a model with random weights before `fuse` and behind it, on a batch of sequences."""
    from week1.gqa import causal_attend
    from week1.qwen import Qwen, QwenConfig
    from week2.fused_kernels import fuse

    torch.manual_seed(0)
    model = Qwen(QwenConfig.from_dict(raw | {"rms_norm_eps": 1e-2})).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    positions = torch.arange(5) + torch.tensor([[0], [20]])

    def facts() -> tuple[list, list]:
        with torch.no_grad():
            hidden = model(ids, positions, causal_attend)
        return hidden.float().tolist(), [name for name, _ in model.named_parameters()]

    before = facts()
    fuse(model)
    try:
        model(ids, positions + 40960, causal_attend)
    except ValueError as error:
        return {"before": before, "after": facts(), "outside": str(error)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("raw", [OLD_STYLE, NEW_STYLE, LLAMA], ids=lambda raw: raw["model_type"])
def test_a_fused_model_on_a_cpu_gives_the_same_numbers(reference, raw, dtype):
    facts = reference(fused_and_not, raw, dtype)
    assert facts["after"] == facts["before"]
    assert "position" in facts["outside"]


def fuse_what_is_not_all_week_1() -> dict:
    from week1.qwen import Qwen, QwenConfig
    from week2.fused_kernels import FusedMLP, fuse

    config = QwenConfig.from_dict(OLD_STYLE)
    model = Qwen(config, mlp=lambda config, index: torch.nn.Identity())
    fuse(model)
    names = [type(layer.mlp).__name__ for layer in model.layers]
    other = Qwen(config)
    other.layers[1] = torch.nn.Identity()
    before = list(other.modules())
    try:
        fuse(other)
    except ValueError as error:
        message = str(error)
    unchanged = all(a is b for a, b in zip(before, other.modules(), strict=True))
    decided = [
        FusedMLP(Qwen(config).layers[0].mlp, use).runs_kernels(torch.ones(1))
        for use in (None, True, False)
    ]
    return {"names": names, "message": message, "unchanged": unchanged, "decided": decided}


def test_fusing_what_is_not_week_1s(reference):
    facts = reference(fuse_what_is_not_all_week_1)
    assert facts["names"] == ["Identity", "Identity"]
    assert "layer 1 is a Identity" in facts["message"] and facts["unchanged"]
    assert facts["decided"] == [False, True, False]


def make_hardware(*numbers: float) -> tuple[float, float]:
    from week2.roofline import Hardware

    hardware = Hardware(*numbers)
    return hardware.flops, hardware.bytes_per_second


def make_event(*fields: object) -> tuple:
    from week2.roofline import Event

    event = Event(*fields)
    return event.time, event.request_id, event.kind


def test_hardware_and_events_keep_what_they_are_given(reference):
    assert reference(make_hardware, 1e11, 0.5) == (1e11, 0.5)
    for kind in ("arrived", "token", "finished"):
        assert reference(make_event, -1.5, "A", kind) == (-1.5, "A", kind)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["flops", "bytes_per_second"])
def test_hardware_outside_its_limits(reference, name, value):
    numbers = (value, 1.0) if name == "flops" else (1.0, value)
    with pytest.raises(ValueError, match=f"{name} must be above 0 and finite, got {value}"):
        reference(make_hardware, *numbers)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((1.0, "A", "tokens"), "arrived, token, finished, got 'tokens'"),
        ((math.nan, "A", "token"), "finite, got nan"),
        ((math.inf, "A", "token"), "finite, got inf"),
    ],
)
def test_an_event_that_cannot_be(reference, fields, message):
    with pytest.raises(ValueError, match=message):
        reference(make_event, *fields)


# Qwen3-30B-A3B's config.json as it lies on the hub, made tiny.
WITH_EXPERTS = NEW_STYLE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 12,
    "norm_topk_prob": True,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}


def read_moe_folder(folder: Path) -> tuple[dict, dict]:
    from week3.moe import read_configs

    dense, experts = read_configs(folder)
    return vars(dense), vars(experts)


def write_config(folder: Path, raw: object) -> Path:
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    return folder


def moe_model_facts(folder: Path) -> dict:
    """Load a folder; returns what can be told about the model, and its logits for five ids."""
    from week1.gqa import causal_attend
    from week3.moe import expert_load, load_model

    model = load_model(folder)
    before = expert_load(model)
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([3, 1, 4, 1, 5]), torch.arange(5), causal_attend))
    return {
        "before": before,
        "load": expert_load(model),
        "logits": logits.tolist(),
        "needs_gradient": any(parameter.requires_grad for parameter in model.parameters()),
        "training": model.training,
    }


def save_moe_model(folder: Path, **changes) -> dict:
    """Write a random checkpoint as transformers does; returns its logits for five ids."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    entries = without(WITH_EXPERTS, "architectures", "model_type", "dtype", "layer_types")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**entries | changes, initializer_range=0.3)
    model = Qwen3MoeForCausalLM._from_config(config, experts_implementation="eager").eval()
    model.save_pretrained(folder)
    with torch.no_grad():
        return model(torch.tensor([[3, 1, 4, 1, 5]])).logits[0].tolist()


def test_a_config_with_experts(reference, tmp_path):
    dense, experts = reference(read_moe_folder, write_config(tmp_path, WITH_EXPERTS))
    expected = reference(read_config, NEW_STYLE)
    assert dense == expected and dense["qk_norm"]
    assert experts == {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": (),
    }


def test_defaults_of_experts_are_those_of_transformers(reference, tmp_path):
    names = ("norm_topk_prob", "decoder_sparse_step", "mlp_only_layers")
    folder = write_config(tmp_path, without(WITH_EXPERTS, *names))
    _, experts = reference(read_moe_folder, folder)
    assert [experts[name] for name in names] == [False, 1, ()]
    raw = without(WITH_EXPERTS, "num_experts") | {"num_local_experts": 9, "mlp_only_layers": None}
    _, experts = reference(read_moe_folder, write_config(tmp_path, raw))
    assert experts["num_experts"] == 9 and experts["mlp_only_layers"] == ()


@pytest.mark.parametrize(
    ("changes", "mentions"),
    [
        ({"num_experts": 0}, ["num_experts", "at least 1", "got 0"]),
        ({"num_experts": "8"}, ["num_experts", "whole number", "'8'"]),
        ({"num_experts": True}, ["num_experts", "True"]),
        ({"num_experts": None}, ["no num_experts"]),
        ({"num_experts_per_tok": 0}, ["num_experts_per_tok", "from 1 to 6", "got 0"]),
        ({"num_experts_per_tok": 7}, ["num_experts_per_tok", "from 1 to 6", "got 7"]),
        ({"num_experts_per_tok": None}, ["no num_experts_per_tok"]),
        ({"moe_intermediate_size": -1}, ["moe_intermediate_size", "at least 1", "got -1"]),
        ({"moe_intermediate_size": 1.5}, ["moe_intermediate_size", "1.5"]),
        ({"norm_topk_prob": 1}, ["norm_topk_prob", "true or false", "got 1"]),
        ({"decoder_sparse_step": 0}, ["decoder_sparse_step", "at least 1", "got 0"]),
        ({"mlp_only_layers": 1}, ["mlp_only_layers", "a list", "got 1"]),
        ({"mlp_only_layers": [0, 2]}, ["mlp_only_layers", "from 0 to 1", "got 2"]),
        ({"mlp_only_layers": [-1]}, ["mlp_only_layers", "from 0 to 1", "got -1"]),
        ({"hidden_size": None}, ["no hidden_size"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"quantization_config": {"a": 1}}, ["quantization_config"]),
        ({"architectures": ["Qwen3ForCausalLM"]}, ["Qwen3MoeForCausalLM"]),
    ],
    ids=str,
)
def test_a_config_with_experts_that_cannot_be_served(reference, tmp_path, changes, mentions):
    with pytest.raises(ValueError) as refused:
        reference(read_moe_folder, write_config(tmp_path, WITH_EXPERTS | changes))
    for mention in mentions:
        assert mention in str(refused.value)


@pytest.mark.parametrize("text", ["{", "[]", None])
def test_a_folder_with_experts_without_a_usable_config(reference, tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        reference(read_moe_folder, tmp_path)


@pytest.mark.parametrize("num_shards", [1, 4])
@pytest.mark.parametrize("changes", [{}, {"decoder_sparse_step": 2}], ids=str)
def test_experts_are_loaded_as_transformers_writes_them(reference, tmp_path, changes, num_shards):
    expected = save_moe_model(tmp_path, **changes)
    if num_shards > 1:
        tensors = load_file(tmp_path / "model.safetensors")
        names = sorted(tensors)
        shard(tmp_path, {f"{i}.safetensors": names[i::num_shards] for i in range(num_shards)})
    facts = reference(moe_model_facts, tmp_path)
    assert torch.allclose(torch.tensor(facts["logits"]), torch.tensor(expected), atol=1e-4)
    layers = {1} if changes else {0, 1}
    assert facts["before"] == {layer: [0] * 6 for layer in layers}
    totals = {layer: sum(counts) for layer, counts in facts["load"].items()}
    assert totals == dict.fromkeys(layers, 10)
    assert not facts["needs_gradient"] and not facts["training"]


def test_experts_that_do_not_fit_the_config(reference, tmp_path):
    save_moe_model(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    prefix = "model.layers.1.mlp.experts"
    missing, odd = f"{prefix}.3.gate_proj.weight", f"{prefix}.5.down_proj.weight"
    changed = without(tensors, missing) | {odd: torch.zeros(24, 13)}
    save_file(changed, file)
    with pytest.raises(ValueError, match="the checkpoint does not fit its config") as refused:
        reference(moe_model_facts, tmp_path)
    assert f"missing: {missing}" in str(refused.value)
    shape = f"shape of {odd}: the checkpoint has (24, 13), the config asks for (24, 12)"
    assert shape in str(refused.value)
    more = f"{prefix}.6.up_proj.weight"
    save_file(tensors | {more: torch.zeros(12, 24)}, file)
    with pytest.raises(ValueError, match="the checkpoint does not fit its config") as refused:
        reference(moe_model_facts, tmp_path)
    assert f"unexpected: {more}" in str(refused.value)
    save_file(without(tensors, "model.layers.0.mlp.gate.weight"), file)
    with pytest.raises(ValueError, match=r"missing: model\.layers\.0\.mlp\.gate\.weight"):
        reference(moe_model_facts, tmp_path)
