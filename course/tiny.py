"""A tiny model with random weights: real enough for a server, and quick on any machine."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "eos_token_id": 257,
}
# What is another thing in a mixture of experts; its second layer is the sparse one.
MOE_CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 8,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "norm_topk_prob": True,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [],
}
TEMPLATE = "{% for m in messages %}<|start|>{{ m.content }}{% endfor %}"


def make_checkpoint(folder: Path, **changes: Any) -> str:
    """Write a Qwen2 checkpoint with a byte-level tokenizer into an empty folder; returns its name.

    changes: entries of config.json that are not as in CONFIG, and do not change a weight's shape.
    """
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    save_file(_random_weights(), folder / "model.safetensors")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|start|>", "<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "eos_token": "<|end|>",
        "chat_template": TEMPLATE,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)


def make_moe_checkpoint(folder: Path) -> str:
    """Write a Qwen3-MoE checkpoint, apart from that as `make_checkpoint`."""
    name = make_checkpoint(folder, **MOE_CONFIG)
    save_file(_with_experts(_random_weights()), folder / "model.safetensors")
    return name


def _with_experts(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Take biases out, and put norms of heads in, and experts in the second layer."""
    generator = torch.Generator().manual_seed(4)
    hidden, inner, sparse = 32, MOE_CONFIG["moe_intermediate_size"], "model.layers.1.mlp"

    def random(*shape):
        return torch.randn(*shape, generator=generator) * 0.3

    weights = {
        name: weight
        for name, weight in weights.items()
        if not name.endswith(".bias") and not name.startswith(sparse)
    }
    for i in range(CONFIG["num_hidden_layers"]):
        for norm in ("q_norm", "k_norm"):
            weights[f"model.layers.{i}.self_attn.{norm}.weight"] = random(8) + 1
    weights[f"{sparse}.gate.weight"] = random(MOE_CONFIG["num_experts"], hidden)
    for i in range(MOE_CONFIG["num_experts"]):
        for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden))):
            weights[f"{sparse}.experts.{i}.{name}_proj.weight"] = random(*shape)
        weights[f"{sparse}.experts.{i}.down_proj.weight"] = random(hidden, inner)
    return weights


def _random_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden, inner, kv = 32, 48, 16

    def random(*shape):
        return torch.randn(*shape, generator=generator) * 0.3

    weights = {
        "model.embed_tokens.weight": random(258, hidden),
        "model.norm.weight": random(hidden),
    }
    for i in range(CONFIG["num_hidden_layers"]):
        layer = {
            "input_layernorm.weight": random(hidden) + 1,
            "post_attention_layernorm.weight": random(hidden) + 1,
            "self_attn.q_proj.weight": random(hidden, hidden),
            "self_attn.q_proj.bias": random(hidden),
            "self_attn.k_proj.weight": random(kv, hidden),
            "self_attn.k_proj.bias": random(kv),
            "self_attn.v_proj.weight": random(kv, hidden),
            "self_attn.v_proj.bias": random(kv),
            "self_attn.o_proj.weight": random(hidden, hidden),
            "mlp.gate_proj.weight": random(inner, hidden),
            "mlp.up_proj.weight": random(inner, hidden),
            "mlp.down_proj.weight": random(hidden, inner),
        }
        weights |= {f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()}
    return weights
