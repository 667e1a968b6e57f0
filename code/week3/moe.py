"""Qwen3-MoE through the same model: a router, experts in the place of an MLP, and their kernel."""

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor, nn

from week1.mlp import MLP, silu_mul
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
# Called as `grouped_gemm` and `grouped_loop` are.
GroupedLinear = Callable[[Tensor, Tensor, Tensor], Tensor]


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
        num_experts = raw.get("num_experts")
        num_experts = raw.get("num_local_experts") if num_experts is None else num_experts
        for name, kind, text in (
            ("norm_topk_prob", bool, "true or false"),
            ("mlp_only_layers", list, "a list"),
        ):
            if not isinstance(raw.get(name), (kind, type(None))):
                raise ValueError(f"{name} in config.json must be {text}, got {raw[name]!r}")
        last_layer = check_whole("num_hidden_layers", raw.get("num_hidden_layers")) - 1
        return cls(
            check_whole("num_experts", num_experts),
            check_whole("num_experts_per_tok", raw.get("num_experts_per_tok"), 1, num_experts),
            check_whole("moe_intermediate_size", raw.get("moe_intermediate_size")),
            bool(raw.get("norm_topk_prob")),
            check_whole("decoder_sparse_step", raw.get("decoder_sparse_step", 1)),
            tuple(
                check_whole("an entry of mlp_only_layers", i, 0, last_layer)
                for i in raw.get("mlp_only_layers") or ()
            ),
        )


def check_whole(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """Return a config's value; ValueError unless it is a whole number in [least, most]."""
    if value is None:
        raise ValueError(f"config.json has no {name}")
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or value < least or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} in config.json must be a whole number {limits}, got {value!r}")
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
    """Choose the experts of each token, and how much each of them counts.

    logits: (tokens, num_experts), float32, float16 or bfloat16: a router's scores. Left as it was.
    num_experts_per_tok: how many experts a token gets, at most num_experts.
    Returns (weights, expert_ids), both (tokens, num_experts_per_tok), float32 and int64. The
    experts are those that are most probable among all, the most probable one first; which of two
    equal ones comes first is not said. A weight is the probability of its expert. With
    norm_topk_prob, the weights of each token are scaled so that they add up to 1. Everything is
    computed in float32, and the host does not wait for the device.
    Source: Qwen3MoeTopKRouter in transformers; Shazeer et al. 2017, arXiv:1701.06538.
    """
    raise NotImplementedError("week3/moe.py: route is not written yet → sessions/week3/moe.md")


def sort_by_expert(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Bring together what goes to the same expert.

    expert_ids: (tokens, k) int64, the experts of each token. Its entries are counted from 0, row by
        row: entry j of token t is pair t * k + j.
    Returns (order, offsets), int64. order: (tokens * k,), all pairs, those of expert 0 first, then
    those of expert 1, and so on; pairs of the same expert stay in the order of their numbers.
    offsets: (num_experts + 1,): the pairs of expert e stand in order from offsets[e] up to, not
    including, offsets[e + 1]; an expert may have none.
    The host does not wait for the device. expert_ids is left as it was.
    """
    raise NotImplementedError(
        "week3/moe.py: sort_by_expert is not written yet → sessions/week3/moe.md"
    )


def grouped_gemm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply the rows of each expert with its own matrix, all experts in one launch.

    x: (rows, in_features), float32, float16 or bfloat16, any strides; at least one row.
    weight: (num_experts, out_features, in_features), x's dtype, any strides: a matrix for each
        expert, as in a torch.nn.Linear. At most 1,024 experts.
    offsets: (num_experts + 1,) int64, contiguous: the rows of expert e are those from offsets[e] up
        to, not including, offsets[e + 1]; the first of them is 0, the last one the number of rows.
        An expert may have no rows, or all of them.
    Returns (rows, out_features), x's dtype, contiguous: row r is x[r] times the transposed matrix
    of its expert. Products are added up in float32, and float32 inputs are multiplied without
    rounding.
    One kernel is launched, and the host does not wait for the device: how many programs there are
    follows from shapes alone. There are at most ceil(rows / 16) + min(rows, num_experts) for each
    16 columns of the result. Matrices of experts without rows are not read. Each number of another
    one is read once for 16 rows of its expert, or for more of them, and once for what is left over.
    x and weight may span more than 2**31 elements, of which one row and one matrix span fewer. The
    arguments are left as they were.
    """
    raise NotImplementedError(
        "week3/moe.py: grouped_gemm is not written yet → sessions/week3/moe.md"
    )


def grouped_loop(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply the rows of each expert with its own matrix, by PyTorch.

    The arguments and the result are those of `grouped_gemm`, on any device; there may be no rows,
    and any number of experts. The host may wait for the device.
    All rows of an expert are multiplied at once. An expert without rows costs nothing: PyTorch is
    asked for nothing more on its account, and its matrix is not read. What is made beside the
    result is no larger than the result, x and one expert's matrix together.
    """
    raise NotImplementedError(
        "week3/moe.py: grouped_loop is not written yet → sessions/week3/moe.md"
    )


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Run `grouped_gemm` on CUDA, and `grouped_loop` elsewhere.

    Anywhere else Triton has nothing but its interpreter.
    """
    return grouped_gemm(x, weight, offsets) if x.is_cuda else grouped_loop(x, weight, offsets)


def combine(rows: Tensor, weights: Tensor, order: Tensor) -> Tensor:
    """Add up what the experts of each token gave for it.

    rows: (tokens * k, hidden_size), float32, float16 or bfloat16: row r belongs to pair order[r].
    weights: (tokens, k) float32; entry j of token t is that of pair t * k + j.
    order: as `sort_by_expert` returns it.
    Returns (tokens, hidden_size), rows' dtype: for each token the sum of its k rows, each times its
    weight, computed in float32 and rounded once. The arguments are left as they were, and the host
    does not wait for the device.
    """
    raise NotImplementedError("week3/moe.py: combine is not written yet → sessions/week3/moe.md")


class MoE(nn.Module):
    """The feed-forward block of a sparse layer: many experts, of which each token gets a few.

    config, moe: of the model; moe is kept under its name. multiply: called as `grouped_gemm` and
        `grouped_loop` are, and twice in each forward pass: with gate_up_proj, and then with
        down_proj, both as they are, and the rows of all experts in the order of `sort_by_expert`.
    Each expert is what week 1's `MLP` is, with moe.moe_intermediate_size for its width. What it
    gives for a token is weighted by `route`, to whose logits the block's input is mapped by gate.
    gate: a torch.nn.Linear without a bias, (hidden_size → num_experts), with its checkpoint name.
    gate_up_proj: a Parameter (num_experts, 2 * moe_intermediate_size, hidden_size): of each expert
        the rows of its gate_proj, and below them those of its up_proj.
    down_proj: a Parameter (num_experts, hidden_size, moe_intermediate_size).
    tokens_per_expert: a buffer, (num_experts,) int64, in no state_dict: how many tokens each expert
        has been given in all forward passes so far; 0 at first. The same tensor is changed by each
        pass.
    There are no other parameters and buffers.
    Called with x: (..., tokens, hidden_size), at least one token, any strides, which is left as it
    was; returns the same shape and dtype. Beside what multiply does, the host does not wait for the
    device.
    """

    def __init__(
        self, config: QwenConfig, moe: MoEConfig, multiply: GroupedLinear = grouped_linear
    ):
        raise NotImplementedError(
            "week3/moe.py: MoE.__init__ is not written yet → sessions/week3/moe.md"
        )

    def forward(self, x: Tensor) -> Tensor:
        """Run the block on x: (..., tokens, hidden_size)."""
        raise NotImplementedError(
            "week3/moe.py: MoE.forward is not written yet → sessions/week3/moe.md"
        )


def build_mlp(config: QwenConfig, moe: MoEConfig, layer_index: int) -> MLP | MoE:
    """Build the feed-forward block of a layer.

    layer_index: counted from 0. With a decoder_sparse_step of n, every n-th layer is sparse, the
        n-th one being the first; those in mlp_only_layers are dense all the same.
    Returns an `MoE` for a sparse layer, and for a dense one week 1's `MLP`, as wide as a model
    without experts has it.
    """
    raise NotImplementedError("week3/moe.py: build_mlp is not written yet → sessions/week3/moe.md")


def expert_load(model: Qwen) -> dict[int, list[int]]:
    """Tell how many tokens each expert has been given so far.

    Returns index of a layer → tokens_per_expert of its block, for each layer whose mlp is an `MoE`;
    {} for a model without one. The host waits for the device, once for all layers.
    """
    raise NotImplementedError(
        "week3/moe.py: expert_load is not written yet → sessions/week3/moe.md"
    )


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
