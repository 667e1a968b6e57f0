"""Week 3's engine around a model that the earlier labs have loaded."""

import functools
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

# Of a CPU's memory that is free, and of a GPU's whole memory: what the pool may take.
CPU_SHARE, GPU_SHARE = 0.25, 0.9
UNKNOWN_CPU_BYTES = 1e9
# Up to so many tokens, a step waits for the weights whatever it computes, so that guesses cost
# little: for a CPU as measured with the default model's linear layers (32 rows took what 8 did);
# for a GPU below the ridge (week2/roofline.py) of every one with bfloat16 units.
FREE_TOKENS = {"cpu": 32, "cuda": 128}


class RanksEnded(Exception):
    """A process of a model that is spread over several has failed, so that all of them ended."""


@dataclass(frozen=True)
class PagedParams:
    """How much week 3's engine takes on.

    kv_gb: 10**9 bytes of the KV pool, of all ranks together; None means a share of the memory that
    there is. max_model_len: tokens of a request; None means the model's whole context.
    tensor_parallel: how many ranks, each a process, the model is spread over. speculative: None,
    "ngram" for guesses from a request's own text, or "draft" for those of the model in the folder
    draft_model, in one process, whatever the other is spread over. num_drafts: at most so many
    guesses for a request in a step. on_step: called with the record of each step. The others as in
    week 3's EngineLimits.
    Raises ValueError for a number below 1, and for a draft model without "draft" or the other way
    round.
    """

    kv_gb: float | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 32
    token_budget: int = 512
    block_size: int = 16
    prefix_caching: bool = True
    tensor_parallel: int = 1
    speculative: str | None = None
    draft_model: Path | None = None
    num_drafts: int = 4
    on_step: Callable[[dict[str, Any]], None] | None = None

    def __post_init__(self):
        counts = "max_model_len", "max_num_seqs", "token_budget", "block_size", "tensor_parallel"
        for name in (*counts, "num_drafts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.kv_gb is not None and not self.kv_gb > 0:
            raise ValueError(f"kv_gb must be above 0, got {self.kv_gb}")
        if (self.speculative == "draft") != (self.draft_model is not None):
            raise ValueError("--speculative draft and --draft-model FOLDER go together")

    @property
    def asked(self) -> dict[str, str]:
        """Labs that take part only where they are asked for → the option that asks for them."""
        asked = {}
        if self.speculative is not None:
            asked["week3/speculative"] = f"--speculative {self.speculative}"
        if self.tensor_parallel > 1:
            asked["week3/tensor_parallel"] = f"--tensor-parallel {self.tensor_parallel}"
        return asked


def kv_bytes_per_token(config: Any, itemsize: int) -> int:
    """Return the bytes of keys and values that a token leaves in a model. config: a QwenConfig."""
    per_layer = 2 * config.num_key_value_heads * config.head_dim * itemsize
    return config.num_hidden_layers * per_layer


def start_ranks(
    folder: Path, dtype: Any, device: str, size: int, prepare: Callable[[Any], None]
) -> Any:
    """Spread a model over processes; returns week3/tensor_parallel.py's Ranks.

    dtype: torch's. prepare: called with each rank's part, in its process. Raises RanksEnded when
    one does not begin, and ValueError for a model or a machine that is not for so many.
    """
    lab = importlib.import_module("week3.tensor_parallel")
    try:
        return lab.Ranks(lab.Plan(folder, size, dtype, device, make_attend(device), prepare))
    except lab.RanksFailed as error:
        raise RanksEnded(str(error)) from None


def prepare_model(model: Any, fused: bool, quantization: str | None) -> None:
    """Put what labs of week 2 have into a model, or into a rank's part, before it runs."""
    if fused:
        importlib.import_module("week2.fused_kernels").fuse(model)
    if quantization is not None:
        importlib.import_module("week2.quantization").quantize_model(model, quantization)


def paged_engine(
    model: Any,
    tokenizer: Any,
    eos_token_ids: frozenset[int],
    device: str,
    params: PagedParams,
    attend: Callable,
) -> Any:
    """Make week 3's engine from the labs that are on the path.

    device: where the model lies. attend: what its passes attend by, as `make_attend` makes it, or
    that of a leader of ranks, which is the model then.
    Raises ValueError where the KV pool has no room.
    """
    lab = importlib.import_module("week3.engine")
    weight = model.embed_tokens.weight
    num_bytes, draft = _pool_bytes(device, params), None
    if params.draft_model is not None:
        draft = _load_draft(params.draft_model, model, weight.dtype, device)
        # Both have a block for a block, so that each gets its share by what one takes.
        per_token = [kv_bytes_per_token(one.config, weight.itemsize) for one in (model, draft)]
        num_bytes = num_bytes * per_token[0] // sum(per_token)
    num_blocks, max_model_len = lab.plan_pool(
        model.config, num_bytes, weight.itemsize, params.block_size, params.max_model_len
    )
    # More than all requests together can fill would lie there for nothing.
    blocks = importlib.import_module("week3.block_manager")
    per_request = blocks.num_blocks_for(max_model_len, params.block_size)
    limits = lab.EngineLimits(
        num_blocks=min(num_blocks, per_request * params.max_num_seqs + 1),
        max_model_len=max_model_len,
        max_num_seqs=params.max_num_seqs,
        token_budget=max(params.token_budget, params.max_num_seqs),
        block_size=params.block_size,
        prefix_caching=params.prefix_caching,
    )
    asked = params.max_model_len or model.config.max_position_embeddings
    if max_model_len < asked:
        text = f"The KV pool holds {max_model_len} tokens, so no request may have {asked}."
        print(text, file=sys.stderr, flush=True)
    speculation = None
    if params.speculative is not None:
        speculation = _speculation(params, limits, draft, device)
    of_engine = model, tokenizer, eos_token_ids, limits, attend, params.on_step, speculation
    return lab.Engine(*of_engine)


def _load_draft(folder: Path, model: Any, dtype: Any, device: str) -> Any:
    draft = importlib.import_module("week1.qwen").load_model(folder, dtype, device)
    sizes = draft.config.vocab_size, model.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the draft model has a vocabulary of {sizes[0]} tokens, and the model has {sizes[1]}: "
            "guesses must be tokens of the same tokenizer"
        )
    return draft


def _speculation(params: PagedParams, limits: Any, draft: Any | None, device: str) -> Any:
    """Make what guesses. draft: a loaded model; None lets each request's own text guess."""
    lab = importlib.import_module("week3.speculative")
    if draft is None:
        proposer = lab.NgramProposer()
    else:
        proposer = lab.DraftModel(
            draft,
            limits.num_blocks,
            limits.block_size,
            limits.max_num_seqs,
            limits.token_budget,
            min(limits.max_model_len, draft.config.max_position_embeddings),
            make_attend(device),
        )
    return lab.Speculation(proposer, params.num_drafts, FREE_TOKENS[device.partition(":")[0]])


def answer_all(
    engine: Any,
    generating: ModuleType,
    prompts: Sequence[Sequence[int]],
    sampling_params: dict[str, Any],
    max_tokens: int,
    on_text: Callable[[str], None] | None = None,
    ranks: Any | None = None,
) -> list[Any]:
    """Continue prompts together; returns week1/generate.py's Completions, in their order.

    engine: as `paged_engine` makes it. generating: week 1's lab of that name. on_text: gets the
    text of all of them as it comes. ranks: over which the model is spread. Raises ValueError for a
    request that is refused, RanksEnded when a rank has failed, and what the model raised. Nothing
    of it is left in the engine, whatever ends it.
    """
    lab = importlib.import_module("week3.engine")
    params = lab.GenerationParams(**sampling_params, max_tokens=max_tokens)
    names = [str(number) for number in range(len(prompts))]
    deltas: dict[str, list[Any]] = {name: [] for name in names}
    try:
        for name, prompt_ids in zip(names, prompts, strict=True):
            engine.add(name, prompt_ids, params)
        while engine.num_unfinished:
            for delta in engine.step():
                deltas[delta.request_id].append(delta)
                if on_text is not None and delta.text:
                    on_text(delta.text)
    except lab.StepFailed as failure:
        if ranks is not None and isinstance(failure.__cause__, _ranks_failed()):
            raise RanksEnded(ranks.failure or str(failure.__cause__)) from None
        raise failure.__cause__ from None
    finally:
        for name in names:
            engine.abort(name)
    return [_completion(generating, deltas[name]) for name in names]


def _ranks_failed() -> type[Exception]:
    return importlib.import_module("week3.tensor_parallel").RanksFailed


def _completion(generating: ModuleType, deltas: Sequence[Any]) -> Any:
    token_ids = [choice.token_id for delta in deltas for choice in delta.choices]
    text = "".join(delta.text for delta in deltas)
    return generating.Completion(token_ids, text, deltas[-1].finish_reason)


def make_attend(device: str) -> Callable:
    """Return what week 3's passes attend by on a device, from the labs that are on the path."""
    attention = importlib.import_module("week3.paged_attention")
    if device == "cpu":
        return attention.paged_attend
    kernels = importlib.import_module("week3.paged_kernels")
    return functools.partial(
        attention.paged_attend,
        store=kernels.store_kv,
        prefill=kernels.paged_prefill,
        decode=kernels.paged_decode,
    )


def _pool_bytes(device: str, params: PagedParams) -> int:
    """Say how many bytes this process' part of the KV pool may take."""
    if params.kv_gb is not None:
        return int(params.kv_gb * 1e9) // params.tensor_parallel
    if device == "cpu":
        try:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError):  # macOS and Windows do not tell it this way
            return int(UNKNOWN_CPU_BYTES) // params.tensor_parallel
        return int(CPU_SHARE * free) // params.tensor_parallel
    import torch

    # Each rank has a GPU of its own; what it holds already is not free.
    total = torch.cuda.get_device_properties(device).total_memory
    return max(0, int(GPU_SHARE * total) - torch.cuda.memory_reserved(device))
