"""Week3/moe another way: a table of tiles made by PyTorch, sums by index_add, counting by hand."""

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from week1.mlp import MLP
from week1.qwen import Qwen, QwenConfig, load_weights, read_safetensors

__all__ = [
    "route",
    "sort_by_expert",
    "grouped_gemm",
    "grouped_loop",
    "combine",
    "MoE",
    "build_mlp",
    "expert_load",
]

ARCHITECTURE = "Qwen3MoeForCausalLM"
GroupedLinear = Callable[[Tensor, Tensor, Tensor], Tensor]
_TILE = 16


@dataclass(frozen=True)
class MoEConfig:
    """What the experts' shapes depend on, named as in a Qwen3-MoE checkpoint's config.json.

    num_experts: in each sparse layer. num_experts_per_tok: how many of them a token gets.
    moe_intermediate_size: width between an expert's projections. norm_topk_prob: whether the
    weights of a token's experts add up to 1. decoder_sparse_step, mlp_only_layers: which layers are
    sparse, see `build_mlp`.
    """

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    decoder_sparse_step: int
    mlp_only_layers: tuple[int, ...]

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "MoEConfig":
        """Read a parsed config.json, as transformers 4 or 5 writes it.

        Raises ValueError that names the entry which is missing or out of range, the limit and what
        stands there.
        """
        # transformers 5 writes the second name; the checkpoints on the hub have the first one.
        num_experts = raw.get("num_experts", raw.get("num_local_experts"))
        norm_topk_prob, mlp_only_layers = raw.get("norm_topk_prob"), raw.get("mlp_only_layers")
        if not isinstance(norm_topk_prob, (bool, type(None))):
            raise ValueError(f"norm_topk_prob must be true or false, got {norm_topk_prob!r}")
        if not isinstance(mlp_only_layers, (list, type(None))):
            raise ValueError(f"mlp_only_layers must be a list, got {mlp_only_layers!r}")
        return cls(
            check_whole("num_experts", num_experts),
            check_whole("num_experts_per_tok", raw.get("num_experts_per_tok"), 1, num_experts),
            check_whole("moe_intermediate_size", raw.get("moe_intermediate_size")),
            bool(norm_topk_prob),
            check_whole("decoder_sparse_step", raw.get("decoder_sparse_step", 1)),
            tuple(
                check_whole("an entry of mlp_only_layers", i, 0, raw["num_hidden_layers"] - 1)
                for i in mlp_only_layers or ()
            ),
        )


def check_whole(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """Return a config's value; ValueError unless it is a whole number in [least, most]."""
    if value is None:
        raise ValueError(f"config.json has no {name}")
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or value < least or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be a whole number {limits}, got {value!r}")
    return value


def read_configs(folder: Path | str) -> tuple[QwenConfig, MoEConfig]:
    """Read a Qwen3-MoE folder's config.json: what is as in Qwen3, and what is not.

    Raises ValueError as `QwenConfig.from_folder` and `MoEConfig.from_dict` do.
    """
    path = Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"{folder} is not a checkpoint folder: it has no config.json") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict) or raw.get("architectures") != [ARCHITECTURE]:
        raise ValueError(f"{path} must name {ARCHITECTURE} as its only architecture")
    dense = QwenConfig.from_dict(raw | {"architectures": ["Qwen3ForCausalLM"]})
    return dense, MoEConfig.from_dict(raw)


def route(logits: Tensor, num_experts_per_tok: int, norm_topk_prob: bool) -> tuple[Tensor, Tensor]:
    """Choose by the scores; the softmax that makes the weights knows all experts, or the chosen."""
    scores = logits.to(torch.float32)
    ids = scores.sort(dim=1, descending=True).indices[:, :num_experts_per_tok]
    chosen = scores.gather(1, ids)
    if norm_topk_prob:
        return chosen.softmax(dim=1), ids
    return torch.exp(chosen - scores.logsumexp(dim=1, keepdim=True)), ids


def sort_by_expert(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Count, and give each pair the next free place of its expert."""
    flat = expert_ids.reshape(-1, 1)
    is_its = flat == torch.arange(num_experts, device=flat.device)
    zero = torch.zeros(1, dtype=torch.int64, device=flat.device)
    offsets = torch.cat((zero, is_its.sum(0).cumsum(0)))
    earlier = is_its.cumsum(0).gather(1, flat) - 1
    places = (offsets[flat] + earlier).flatten()
    pairs = torch.arange(len(places), device=flat.device)
    return torch.zeros_like(pairs).scatter(0, places, pairs), offsets


def grouped_gemm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Write down for each tile whose it is, and launch one program for it and some columns."""
    num_rows, num_experts = len(x), len(weight)
    num_tiles = min(num_rows, num_experts) + num_rows // _TILE
    tiles = (offsets.diff() + _TILE - 1) // _TILE
    ends = tiles.cumsum(0)
    number = torch.arange(num_tiles, device=x.device)
    experts = (number[:, None] >= ends).sum(1)
    known = experts.clamp(max=num_experts - 1)
    first = offsets[known] + (number - ends[known] + tiles[known]) * _TILE
    table = torch.stack((experts, first, offsets[known + 1]), 1).contiguous()
    out = torch.zeros(num_rows, weight.shape[1], dtype=x.dtype, device=x.device)
    _tile_kernel[num_tiles, triton.cdiv(weight.shape[1], 32)](
        *(x, weight, out, table, *x.stride(), *weight.stride()),
        *(num_experts, weight.shape[1], weight.shape[2]),
        BLOCK_M=_TILE,
        BLOCK_N=32,
        BLOCK_K=16,
    )
    return out


@triton.jit
def _tile_kernel(
    x,
    weight,
    out,
    table,
    x_row,
    x_in,
    weight_expert,
    weight_out,
    weight_in,
    num_experts,
    out_features,
    in_features,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    entry = table + tl.program_id(0) * 3
    expert, end = tl.load(entry), tl.load(entry + 2)
    if expert == num_experts:
        return
    row = (tl.load(entry + 1) + tl.arange(0, BLOCK_M))[:, None]
    column = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, in_features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        a = tl.load(x + row * x_row + k * x_in, (row < end) & (k < in_features), other=0)
        b = tl.load(
            weight + expert * weight_expert + column * weight_out + k * weight_in,
            (column < out_features) & (k < in_features),
            other=0,
        )
        total += tl.dot(a, tl.trans(b), input_precision="ieee")
    column = tl.trans(column)
    mask = (row < end) & (column < out_features)
    tl.store(out + row * out_features + column, total.to(out.dtype.element_ty), mask)


def grouped_loop(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply part by part, and join what comes out."""
    ends = offsets.cpu().numpy()
    busy = [e for e in range(len(weight)) if ends[e] != ends[e + 1]]
    parts = [x[ends[e] : ends[e + 1]] @ weight[e].t() for e in busy]
    return torch.cat([x.new_empty(0, weight.shape[1]), *parts])


def combine(rows: Tensor, weights: Tensor, order: Tensor) -> Tensor:
    """Add each row to its token where it lies."""
    scaled = rows.float() * weights.flatten().index_select(0, order).unsqueeze(1)
    out = torch.zeros(len(weights), rows.shape[1], device=rows.device)
    out.index_add_(0, order.div(weights.shape[1], rounding_mode="floor"), scaled)
    return out.to(rows.dtype)


class MoE(nn.Module):
    """Each step of a block in a line, with week 1's SwiGLU written out."""

    def __init__(self, config: QwenConfig, moe: MoEConfig, multiply: GroupedLinear | None = None):
        super().__init__()
        shape = moe.num_experts, moe.moe_intermediate_size, config.hidden_size
        self.gate = nn.Linear(shape[2], shape[0], bias=False)
        self.gate_up_proj = nn.Parameter(torch.zeros(shape[0], shape[1] * 2, shape[2]))
        self.down_proj = nn.Parameter(torch.zeros(shape[0], shape[2], shape[1]))
        self.register_buffer(
            "tokens_per_expert", torch.zeros(shape[0], dtype=torch.long), persistent=False
        )
        self.moe = moe
        self.product = multiply or grouped_linear

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        k = self.moe.num_experts_per_tok
        weights, ids = route(self.gate(flat), k, self.moe.norm_topk_prob)
        order, offsets = sort_by_expert(ids, self.moe.num_experts)
        self.tokens_per_expert.scatter_add_(0, ids.flatten(), torch.ones_like(ids.flatten()))
        sent = flat.repeat_interleave(k, 0)[order]
        inner = self.product(sent, self.gate_up_proj, offsets)
        width = self.moe.moe_intermediate_size
        inner = nn.functional.silu(inner[:, :width]) * inner[:, width:]
        return combine(self.product(inner, self.down_proj, offsets), weights, order).view_as(x)


def build_mlp(config: QwenConfig, moe: MoEConfig, layer_index: int) -> nn.Module:
    """List the sparse layers, and look whether this one is among them."""
    step = moe.decoder_sparse_step
    sparse = set(range(step - 1, config.num_hidden_layers, step)) - set(moe.mlp_only_layers)
    if layer_index in sparse:
        return MoE(config, moe)
    return MLP(config.hidden_size, config.intermediate_size)


def expert_load(model: Qwen) -> dict[int, list[int]]:
    """Bring all counts together, and cut them apart on the host."""
    found = [(i, layer.mlp) for i, layer in enumerate(model.layers) if isinstance(layer.mlp, MoE)]
    if not found:
        return {}
    counts = torch.cat([block.tokens_per_expert for _, block in found]).tolist()
    size = len(counts) // len(found)
    return {i: counts[n * size : n * size + size] for n, (i, _) in enumerate(found)}


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Run `grouped_gemm` on CUDA, and `grouped_loop` elsewhere.

    Anywhere else Triton has nothing but its interpreter.
    """
    return grouped_gemm(x, weight, offsets) if x.is_cuda else grouped_loop(x, weight, offsets)


def load_model(
    folder: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Qwen:
    """Load a Qwen3-MoE checkpoint folder, as week 1's `load_model` does a dense one."""
    config, moe = read_configs(folder)
    with torch.device("meta"):
        model = Qwen(config, lambda config, index: build_mlp(config, moe, index))
    tensors = read_safetensors(folder, dtype, device)
    stack_experts(tensors, model)
    load_weights(model, tensors)
    for layer in model.layers:
        if isinstance(layer.mlp, MoE):
            # No checkpoint brings it from the meta device.
            layer.mlp.tokens_per_expert = torch.zeros(
                moe.num_experts, dtype=torch.int64, device=device
            )
    return model.eval()


def stack_experts(tensors: dict[str, Tensor], model: Qwen) -> None:
    """Put the experts of a checkpoint together, each layer's in the two tensors that `MoE` has.

    tensors: by checkpoint name, such as "model.layers.0.mlp.experts.3.gate_proj.weight". Those of
        experts are taken out, and stacked ones come in, such as "model.layers.0.mlp.down_proj".
    Raises ValueError like `load_weights`, with nothing changed, when tensors of experts are missing
    or of another shape than the model asks for.
    """
    blocks = {f"model.layers.{i}.mlp": layer.mlp for i, layer in enumerate(model.layers)}
    wanted = {
        prefix: expert_shapes(prefix, block)
        for prefix, block in blocks.items()
        if isinstance(block, MoE)
    }
    problems = []
    for name, want in itertools.chain(*(shapes.items() for shapes in wanted.values())):
        have = tuple(tensors[name].shape) if name in tensors else None
        if have is None:
            problems.append(f"missing: {name}")
        elif have != want:
            problems.append(
                f"shape of {name}: the checkpoint has {have}, the config asks for {want}"
            )
    if problems:
        raise ValueError("the checkpoint does not fit its config:\n  " + "\n  ".join(problems))
    for prefix, names in wanted.items():
        num_experts = len(names) // 3
        parts = [tensors.pop(name) for name in names]
        gate, up, down = (
            torch.stack(parts[i : i + num_experts]) for i in range(0, len(parts), num_experts)
        )
        tensors[f"{prefix}.gate_up_proj"] = torch.cat((gate, up), dim=1)
        tensors[f"{prefix}.down_proj"] = down


def expert_shapes(prefix: str, block: MoE) -> dict[str, tuple[int, int]]:
    """Name the checkpoint's tensors of a block's experts: all gates, all ups, all downs."""
    num_experts, hidden_size, width = block.down_proj.shape
    up, down = (width, hidden_size), (hidden_size, width)
    return {
        f"{prefix}.experts.{expert}.{projection}.weight": shape
        for projection, shape in (("gate_proj", up), ("up_proj", up), ("down_proj", down))
        for expert in range(num_experts)
    }
