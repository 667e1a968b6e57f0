"""The model as a fold over its layers; weights are planned first and then set one by one."""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from week1.gqa import Attend, Attention
from week1.mlp import MLP, DecoderLayer, RMSNorm
from week1.rope import Rotary

__all__ = ["Qwen", "load_weights"]


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
        """Read a checkpoint folder's config.json."""
        return cls.from_dict(json.loads((Path(folder) / "config.json").read_text("utf-8")))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "QwenConfig":
        """Read a parsed config.json."""
        family = raw["architectures"][0].removesuffix("ForCausalLM")
        if family not in ("Qwen2", "Qwen3", "Llama"):
            raise ValueError(f"{family} is not supported; supported: Qwen2, Qwen3, Llama")
        same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        same += ("num_attention_heads", "num_key_value_heads", "rms_norm_eps")
        same += ("max_position_embeddings", "tie_word_embeddings")
        bias = raw.get("attention_bias", False)
        return cls(
            **{name: raw[name] for name in same},
            head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
            rope_theta=raw["rope_parameters"]["rope_theta"],
            qkv_bias=bias or family == "Qwen2",
            output_bias=bias and family != "Qwen2",
            qk_norm=family == "Qwen3",
        )


class Qwen(nn.Module):
    """A decoder-only language model."""

    def __init__(
        self,
        config: QwenConfig,
        mlp: Callable[[QwenConfig, int], nn.Module] | None = None,
    ):
        super().__init__()
        self.config = config
        width, vocabulary = config.hidden_size, config.vocab_size
        if mlp is None:
            mlp = lambda config, index: MLP(width, config.intermediate_size)  # noqa: E731
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        # Where the two are tied, the head's Parameter is the one that the embedding takes over.
        self.embed_tokens = nn.Embedding(vocabulary, width)
        if config.tie_word_embeddings:
            self.embed_tokens.weight = self.lm_head.weight
        self.norm = self._norm(width)
        self.layers = nn.ModuleList()
        rotary = Rotary(config.head_dim, config.max_position_embeddings, config.rope_theta)
        while len(self.layers) < config.num_hidden_layers:
            index = len(self.layers)
            self.layers.append(self._layer(index, rotary, mlp(config, index)))

    def _norm(self, width: int) -> RMSNorm:
        return RMSNorm(width, self.config.rms_norm_eps)

    def _layer(self, index: int, rotary: Rotary, mlp: nn.Module) -> DecoderLayer:
        config, width = self.config, self.config.hidden_size
        attention = Attention(
            hidden_size=width,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            rotary=rotary,
            layer_index=index,
            qkv_bias=config.qkv_bias,
            output_bias=config.output_bias,
        )
        if config.qk_norm:
            attention.q_norm = self._norm(config.head_dim)
            attention.k_norm = self._norm(config.head_dim)
        return DecoderLayer(attention, mlp, self._norm(width), self._norm(width))

    def forward(self, input_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        def step(stream: Any, layer: nn.Module) -> Any:
            return layer(stream, positions=positions, attend=attend)

        return self.norm(functools.reduce(step, self.layers, self.embed_tokens(input_ids)))

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.as_tensor(self.lm_head(hidden), dtype=torch.float32)


def load_weights(model: Qwen, tensors: Mapping[str, Tensor]) -> None:
    """Put a checkpoint's tensors into the model's parameters."""
    tied = model.config.tie_word_embeddings
    left = dict(tensors)
    if tied:
        left.pop("lm_head.weight", None)
    plan, complaints = [], []
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{attribute}" if path == "lm_head" else f"model.{path}.{attribute}"
            if tied and path == "lm_head":
                continue
            tensor = left.pop(name, None)
            if tensor is None:
                complaints.append(f"{name} is missing")
            elif tensor.shape != parameter.shape:
                complaints.append(f"{name} is {list(tensor.shape)}, not {list(parameter.shape)}")
            plan.append((module, attribute, tensor))
    complaints += [f"{name} has no place in the model" for name in left]
    if complaints:
        raise ValueError("; ".join(complaints))
    for module, attribute, tensor in plan:
        setattr(module, attribute, nn.Parameter(tensor.detach().clone(), requires_grad=False))
    if tied:
        model.lm_head.weight = model.embed_tokens.weight


def load_model(
    folder: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Qwen:
    """Load a checkpoint folder."""
    model = Qwen(QwenConfig.from_folder(folder))
    load_weights(model, read_safetensors(folder, dtype, device))
    return model.eval()


def read_safetensors(
    folder: Path | str, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    """Read every tensor of every safetensors file in a folder."""
    files = sorted(Path(folder).glob("*.safetensors"))
    parts = [load_file(file, device=str(device)) for file in files]
    return {name: tensor.to(dtype) for part in parts for name, tensor in part.items()}
