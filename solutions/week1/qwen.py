"""The one model of this course: Qwen2 and Qwen3, and Llama checkpoints of the same shape.

This file never changes after week 1. Everything that later weeks make faster is plugged in:

- `attend`, an argument of every forward pass, owns keys, values, masks and their layout.
- Any module of the tree may be replaced by another that is called alike: a Linear by a quantized
  or sharded one, an RMSNorm or Rotary by a fused kernel, an MLP by a mixture of experts, a layer.
- What passes from one layer to the next, and from the last one to `norm`, is not looked at here.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from week1.gqa import Attend, Attention
from week1.mlp import MLP, DecoderLayer, RMSNorm
from week1.rope import Rotary

__all__ = ["Qwen", "load_weights"]

ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM")


@dataclass(frozen=True)
class QwenConfig:
    """What the model's shape depends on, named as in a checkpoint's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool

    @classmethod
    def from_folder(cls, folder: Path | str) -> "QwenConfig":
        """Read a checkpoint folder's config.json; ValueError names what is unsupported."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ValueError(f"{folder} is not a checkpoint folder: it has no config.json")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(raw, dict):
            raise ValueError(f"{path} must hold a JSON object, got {type(raw).__name__}")
        return cls.from_dict(raw)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "QwenConfig":
        """Read a parsed config.json, as transformers 4 or 5 writes it.

        Raises ValueError that names the entry which is missing, out of range or not supported.
        """
        _check_supported(raw)
        architecture = _architecture(raw)
        is_qwen2 = architecture == "Qwen2ForCausalLM"
        attention_bias = _flag(raw, "attention_bias")
        hidden_size, num_heads = _size(raw, "hidden_size"), _size(raw, "num_attention_heads")
        num_kv_heads = _size(raw, "num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_attention_heads {num_heads} does not divide by "
                f"num_key_value_heads {num_kv_heads}"
            )
        return cls(
            vocab_size=_size(raw, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_size(raw, "intermediate_size"),
            num_hidden_layers=_size(raw, "num_hidden_layers"),
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            head_dim=_size(raw, "head_dim", hidden_size // num_heads),
            rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
            rope_theta=_number({**raw, **_rope_parameters(raw)}, "rope_theta", 10_000.0),
            max_position_embeddings=_size(raw, "max_position_embeddings"),
            tie_word_embeddings=_flag(raw, "tie_word_embeddings"),
            qkv_bias=is_qwen2 or attention_bias,
            output_bias=attention_bias and not is_qwen2,
            qk_norm=architecture == "Qwen3ForCausalLM",
        )


class Qwen(nn.Module):
    """A decoder-only language model.

    config: its shape, kept under this name. mlp: called with (config, layer_index), builds the
        feed-forward block of that layer; None means an `MLP` in every layer.
    Submodules carry their checkpoint names without the leading "model.": embed_tokens, layers
    (a torch.nn.ModuleList of DecoderLayer), norm, and lm_head, a torch.nn.Linear without a bias.
    With tie_word_embeddings, lm_head and embed_tokens have one weight, the same Parameter; no other
    two names share one.
    """

    def __init__(
        self,
        config: QwenConfig,
        mlp: Callable[[QwenConfig, int], nn.Module] | None = None,
    ):
        super().__init__()
        self.config = config
        mlp = mlp or _dense_mlp
        rotary = Rotary(config.head_dim, config.max_position_embeddings, config.rope_theta)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            _decoder_layer(config, i, rotary, mlp(config, i))
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, input_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Compute the final hidden state of every token.

        input_ids, positions: (..., tokens) int64, left as they were; every position up to
            config.max_position_embeddings - 1 is accepted. attend: see `Attend` in week1/gqa.py.
        Returns (..., tokens, hidden_size), behind the last norm.
        """
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, positions, attend)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Score every token of the vocabulary as the next one.

        hidden: (..., hidden_size), rows of what `forward` returned.
        Returns (..., vocab_size) float32.
        """
        return self.lm_head(hidden).float()


def load_weights(model: Qwen, tensors: Mapping[str, Tensor]) -> None:
    """Put a checkpoint's tensors into the model's parameters.

    model: may lie on the meta device. Afterwards each parameter holds the given values in the given
        dtype and on the given device, and requires no gradient.
    tensors: by checkpoint name, such as "model.layers.0.mlp.up_proj.weight" or "lm_head.weight". A
        model with tied embeddings needs no "lm_head.weight" and ignores one: it does not stand in
        for a missing "model.embed_tokens.weight". Left as it was.
    What a checkpoint has to hold follows from the model's own parameters, whatever modules it has.
    Raises ValueError, and leaves the model as it was, when tensors are missing, not known to the
    model, or of another shape than the parameter; the message names all of them, a wrong shape
    together with the right one.
    """
    expected = {_checkpoint_name(name): name for name, _ in model.named_parameters()}
    given = set(tensors)
    if model.config.tie_word_embeddings:
        given.discard("lm_head.weight")
    problems = [f"missing: {name}" for name in sorted(expected.keys() - given)]
    problems += [f"unexpected: {name}" for name in sorted(given - expected.keys())]
    for name in sorted(expected.keys() & given):
        have, want = tuple(tensors[name].shape), tuple(model.get_parameter(expected[name]).shape)
        if have != want:
            problems.append(
                f"shape of {name}: the checkpoint has {have}, the config asks for {want}"
            )
    if problems:
        raise ValueError("the checkpoint does not fit its config:\n  " + "\n  ".join(problems))
    state = {expected[name]: tensors[name] for name in expected}
    model.load_state_dict(state, strict=False, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    model.requires_grad_(False)


def load_model(
    folder: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Qwen:
    """Load a checkpoint folder: config.json and safetensors files; nothing in it is executed.

    dtype: what the weights are converted to. Raises ValueError when the folder does not hold a
    whole, supported model.
    """
    config = QwenConfig.from_folder(folder)
    with torch.device("meta"):
        model = Qwen(config)
    load_weights(model, read_safetensors(folder, dtype, device))
    return model.eval()


def read_safetensors(
    folder: Path | str, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    """Read every tensor of a checkpoint folder, from one file or from the files of its index."""
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(Path(folder)):
        if not path.is_file():
            raise ValueError(f"{folder} has no weights: {path.name} is missing (safetensors only)")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                names = file.keys()
                # A copy even where the dtype is right: products from a mapped file, whose tensors
                # begin at any byte, are 3 to 5 % slower.
                tensors.update((n, file.get_tensor(n).to(dtype, copy=True)) for n in names)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or truncated: {error}") from None
    return tensors


def _dense_mlp(config: QwenConfig, layer_index: int) -> MLP:
    return MLP(config.hidden_size, config.intermediate_size)


def _decoder_layer(config: QwenConfig, index: int, rotary: Rotary, mlp: nn.Module) -> DecoderLayer:
    def head_norm() -> RMSNorm | None:
        return RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    attention = Attention(
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        rotary,
        index,
        qkv_bias=config.qkv_bias,
        output_bias=config.output_bias,
        q_norm=head_norm(),
        k_norm=head_norm(),
    )
    return DecoderLayer(
        attention,
        mlp,
        RMSNorm(config.hidden_size, config.rms_norm_eps),
        RMSNorm(config.hidden_size, config.rms_norm_eps),
    )


def _checkpoint_name(parameter: str) -> str:
    return parameter if parameter.startswith("lm_head.") else f"model.{parameter}"


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    try:
        names = {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of weights: {error!r}") from None
    for name in names:
        # An index is untrusted input: it may name files of this folder only.
        if Path(name).name != name:
            raise ValueError(f"{index} names {name!r}, which is not a file of its own folder")
    return [folder / name for name in sorted(names)]


def _check_supported(raw: Mapping[str, Any]) -> None:
    _require("architecture", _architecture(raw), ARCHITECTURES)
    _require("hidden_act", raw.get("hidden_act", "silu"), ("silu",))
    _require("mlp_bias", _flag(raw, "mlp_bias"), (False,))
    _require("use_sliding_window", _flag(raw, "use_sliding_window"), (False,))
    layer_types = raw.get("layer_types") or ["full_attention"]
    for kind in layer_types if isinstance(layer_types, list) else [layer_types]:
        _require("layer_types", kind, ("full_attention",))
    _require("quantization_config", raw.get("quantization_config"), (None,))
    rope = _rope_parameters(raw)
    _require("rope_type", rope.get("rope_type", rope.get("type", "default")), ("default",))
    _require("partial_rotary_factor", {**raw, **rope}.get("partial_rotary_factor", 1.0), (1.0,))


def _architecture(raw: Mapping[str, Any]) -> Any:
    architectures = raw.get("architectures")
    return architectures[0] if isinstance(architectures, list) and architectures else architectures


def _rope_parameters(raw: Mapping[str, Any]) -> dict[str, Any]:
    # transformers 5 writes rope_parameters; before, rope_scaling was there only for scaled models,
    # and people still add it by hand.
    rope: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        part = raw.get(name) or {}
        if not isinstance(part, dict) or any(isinstance(value, dict) for value in part.values()):
            raise ValueError(f"{name} {part!r} is not supported; supported: one flat object")
        rope |= part
    return rope


def _size(raw: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = raw.get(name)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"config.json has no {name}")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"{name} in config.json must be a whole number of at least 1, got {value!r}"
        )
    return value


def _number(raw: Mapping[str, Any], name: str, default: float) -> float:
    value = raw.get(name, default)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise ValueError(f"{name} in config.json must be a number above 0, got {value!r}")
    return float(value)


def _flag(raw: Mapping[str, Any], name: str) -> bool:
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name} in config.json must be true or false, got {value!r}")
    return bool(value)


def _require(name: str, value: object, supported: tuple) -> None:
    if value not in supported:
        choices = ", ".join(str(choice) for choice in supported)
        raise ValueError(f"{name} {value!r} is not supported; supported: {choices}")
