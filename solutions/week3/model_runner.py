"""Run a planned step: its tokens through the model in one pass, and its choices in one batch."""

import itertools
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from week1.gqa import Attend
from week1.qwen import Qwen
from week1.sampling import SamplingParams, apply_penalties, draw, token_probabilities
from week3.block_manager import BlockManager
from week3.paged_attention import PagedBatch, PagedKVCache, paged_attend
from week3.scheduler import Scheduled, Step

__all__ = ["probabilities", "make_choices", "sample", "ModelRunner"]

# The seam where guesses are judged: called as `choose_one` is.
Choose = Callable[[Tensor, Sequence[Scheduled], Sequence["SamplingState"]], list[list["Choice"]]]


@dataclass(frozen=True)
class Choice:
    """One chosen token.

    logprob: the natural logarithm of its probability by the model's own scores, before any bias,
    penalty, temperature or filter. top: the most likely tokens with theirs, the best first; as many
    as were asked for, or as there are. Without logprobs: None and ().
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class SamplingState:
    """What choosing the tokens of one request takes, over all its steps.

    logit_bias: added to the scores of these ids. min_tokens: until so many ids have been chosen, no
    id of eos_token_ids is. num_logprobs: how many of the most likely tokens each choice tells; 0
    for the chosen one's logprob alone, None for no logprobs at all. seed: of all its draws; where
    params has none, a random one. output_ids: what was chosen so far.
    """

    params: SamplingParams
    prompt_ids: Sequence[int]
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    eos_token_ids: frozenset[int] = frozenset()
    num_logprobs: int | None = None
    output_ids: list[int] = field(default_factory=list)
    seed: int = -1

    def __post_init__(self):
        if self.seed < 0:
            self.seed = secrets.randbits(63) if self.params.seed is None else self.params.seed


def probabilities(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Say how likely each token is to be the next one of several requests.

    logits: (rows, vocab_size) float32, one row a request; left as it was. states: of these
        requests, in the same order; left as they were.
    The bias comes first, then penalties, the ban of end-of-sequence ids, temperature and filters.
    Returns (rows, vocab_size) float32; rows sum to 1. A request gets what it would get alone,
    whoever its neighbours are.
    """
    return _probabilities(_adjust(logits, states), states)


def make_choices(
    logits: Tensor, token_ids: Sequence[int], states: Sequence[SamplingState]
) -> list[Choice]:
    """Tell chosen tokens with the logprobs that their requests ask for.

    logits, states: as in `sample`; left as they were. token_ids: one a row.
    """
    if all(state.num_logprobs is None for state in states):
        return [Choice(token_id) for token_id in token_ids]
    logprobs = torch.log_softmax(logits, -1)
    return [
        _with_logprobs(token_id, row, state.num_logprobs)
        for token_id, row, state in zip(token_ids, logprobs, states, strict=True)
    ]


def sample(logits: Tensor, states: Sequence[SamplingState]) -> list[Choice]:
    """Choose the next token of several requests.

    logits: (rows, vocab_size) float32, one row a request; left as it was. states: of these
        requests, in the same order; left as they were.
    Each token is drawn by its `probabilities`, with noise from the request's seed and the place
    that the token will have, as in `Sampler`. A request gets what it would get alone, whoever its
    neighbours are.
    """
    adjusted = _adjust(logits, states)
    if all(state.params.temperature == 0.0 for state in states):
        token_ids = adjusted.argmax(-1)
    else:
        places = [len(state.prompt_ids) + len(state.output_ids) for state in states]
        seeds = torch.tensor([state.seed for state in states], device=logits.device)
        positions = torch.tensor(places, device=logits.device)
        token_ids = draw(_probabilities(adjusted, states), seeds, positions)
    return make_choices(logits, token_ids.tolist(), states)


def choose_one(
    logits: Tensor, parts: Sequence[Scheduled], states: Sequence[SamplingState]
) -> list[list[Choice]]:
    """Choose the next token of each request of a step that has no guesses.

    logits: (rows, vocab_size) float32; of each part, one part behind the other, the scores behind
        its last token that is no guess, and behind every guess. parts: of a step. states: of their
        requests. All are left as they were.
    Returns for each part the next tokens of its request: of its guesses, the first ones that are
    accepted, and one token more. A part without guesses has one row, and gets one token.
    """
    return [[choice] for choice in sample(logits, states)]


class ModelRunner:
    """Execute the steps of a scheduler.

    model, cache: of the same shape. blocks: the scheduler's; its tables say where tokens lie.
    max_num_seqs, token_budget, max_model_len: the scheduler's. make_attend: called in the place of
        `paged_attend`, once a step. choose: called in the place of `choose_one`, once a step in
        which somebody catches up, with the parts of those that do.
    A request is known from `add` to `remove`, through preemptions too.
    One step makes one pass of the model over the step's tokens, none of them padded, and scores
    only those behind which something is chosen; nothing is recorded for a backward pass. In the
    batch, sequences with one token come first, and num_decodes counts all of them.
    The ids, the positions and all tensors of the batch are int64, and parts of one tensor that is
    made once: it takes one copy a step to bring them to a device, and they begin at the same
    addresses in every step.
    """

    def __init__(
        self,
        model: Qwen,
        cache: PagedKVCache,
        blocks: BlockManager,
        max_num_seqs: int,
        token_budget: int,
        max_model_len: int,
        make_attend: Callable[[PagedKVCache, PagedBatch], Attend] = paged_attend,
        choose: Choose = choose_one,
    ):
        self._model = model
        self._cache = cache
        self._blocks = blocks
        self._make_attend = make_attend
        self._choose = choose
        self._states: dict[str, SamplingState] = {}
        max_blocks = -(-max_model_len // blocks.block_size)
        device = model.embed_tokens.weight.device
        self._buffers = _StepBuffers(max_num_seqs, token_budget, max_blocks, device)

    def add(self, request_id: str, state: SamplingState) -> None:
        """Get to know a request before its first step.

        state: kept, and changed by `execute`, as whoever adds it can see.
        """
        self._states[request_id] = state

    def remove(self, request_id: str) -> None:
        """Forget a request that has ended; nothing happens when it is not known."""
        self._states.pop(request_id, None)

    def execute(self, step: Step) -> dict[str, tuple[Choice, ...]]:
        """Compute a step.

        step: from the scheduler, with at least one part. The tables of its requests cover their
            tokens.
        Returns request_id → its next tokens, for each request that caught up and is still known.
        The tokens count as its output_ids from now on. What was computed for one that is no longer
        known is of no use, and does no harm.
        """
        # Those with one token come first: they are attended together.
        parts = sorted(step.parts, key=lambda part: len(part.token_ids) > 1)
        tables = [self._blocks.block_table(part.request_id) for part in parts]
        input_ids, positions, batch = self._buffers.fill(parts, tables, self._blocks.block_size)
        ends = np.cumsum([len(part.token_ids) for part in parts])
        choosing = [
            (part, int(end))
            for part, end in zip(parts, ends, strict=True)
            if part.catches_up and part.request_id in self._states
        ]
        with torch.inference_mode():
            hidden = self._model(input_ids, positions, self._make_attend(self._cache, batch))
            if not choosing:
                return {}
            scored = [range(end - 1 - part.num_drafts, end) for part, end in choosing]
            rows = torch.tensor([*itertools.chain(*scored)], device=hidden.device)
            logits = self._model.logits(hidden[rows])
            caught_up = [part for part, _ in choosing]
            states = [self._states[part.request_id] for part in caught_up]
            chosen = self._choose(logits, caught_up, states)
        for state, choices in zip(states, chosen, strict=True):
            state.output_ids += [choice.token_id for choice in choices]
        return {
            part.request_id: tuple(choices) for part, choices in zip(caught_up, chosen, strict=True)
        }


class _StepBuffers:
    """The numbers of a step, in one piece of memory on the host and one on the device.

    int64: [input_ids | positions | slots]   token_budget each
           [seq_lens | cu_seqlens_q]         max_num_seqs, and one more
           [block_tables]                    max_num_seqs rows of max_blocks
    On a CPU both are the same memory.
    """

    def __init__(self, max_num_seqs: int, token_budget: int, max_blocks: int, device: torch.device):
        sizes = [token_budget] * 3 + [max_num_seqs, max_num_seqs + 1, max_num_seqs * max_blocks]
        is_cuda = device.type == "cuda"
        host = torch.zeros(sum(sizes), dtype=torch.int64, pin_memory=is_cuda)
        self._host, self._device = host, host.to(device)
        self._filled = [part.numpy() for part in host.split(sizes)]
        self._filled[-1] = self._filled[-1].reshape(max_num_seqs, max_blocks)
        self._parts = list(self._device.split(sizes))
        self._parts[-1] = self._parts[-1].view(max_num_seqs, max_blocks)

    def fill(
        self, parts: Sequence[Scheduled], tables: Sequence[Sequence[int]], block_size: int
    ) -> tuple[Tensor, Tensor, PagedBatch]:
        """Write a step and copy it; returns input_ids, positions and the batch.

        parts: of the step, those with one token first. tables: their blocks.
        """
        counts = np.array([len(part.token_ids) for part in parts])
        starts = np.array([part.num_computed_tokens for part in parts])
        num_seqs, num_tokens = len(parts), int(counts.sum())
        input_ids, positions, slots, seq_lens, cu_seqlens_q, block_tables = self._filled
        for row, table in enumerate(tables):
            block_tables[row, : len(table)] = table
        seq_lens[:num_seqs] = starts + counts
        cu_seqlens_q[1 : num_seqs + 1] = np.cumsum(counts)
        input_ids[:num_tokens] = [token_id for part in parts for token_id in part.token_ids]
        rows = np.repeat(np.arange(num_seqs), counts)
        here = np.arange(num_tokens) + (starts - cu_seqlens_q[:num_seqs])[rows]
        positions[:num_tokens] = here
        slots[:num_tokens] = block_tables[rows, here // block_size] * block_size + here % block_size
        if self._device is not self._host:
            # The host waits for it: the next step is written into the same memory.
            self._device.copy_(self._host)
        width = max(map(len, tables))
        input_ids, positions, slots, seq_lens, cu_seqlens_q, block_tables = self._parts
        batch = PagedBatch(
            slots[:num_tokens],
            block_tables[:num_seqs, :width],
            cu_seqlens_q[: num_seqs + 1],
            seq_lens[:num_seqs],
            num_decodes=int((counts == 1).sum()),
            max_seqlen_q=int(counts.max()),
        )
        return input_ids[:num_tokens], positions[:num_tokens], batch


def _adjust(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Apply what changes the scores of single tokens; logits stays as it was."""
    adjusted = logits
    for row, state in enumerate(states):
        biased, banned = state.logit_bias, len(state.output_ids) < state.min_tokens
        if not (biased or banned or _has_penalties(state.params)):
            continue
        if adjusted is logits:
            adjusted = logits.clone()
        scores = adjusted[row]
        if biased:
            ids = torch.tensor([*biased], device=logits.device)
            scores[ids] += torch.tensor([*biased.values()], device=logits.device)
        if _has_penalties(state.params):
            scores.copy_(apply_penalties(scores, state.prompt_ids, state.output_ids, state.params))
        if banned and state.eos_token_ids:
            scores[torch.tensor([*state.eos_token_ids], device=logits.device)] = -torch.inf
    return adjusted


def _has_penalties(params: SamplingParams) -> bool:
    penalties = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
    return penalties != (1.0, 0.0, 0.0)


def _probabilities(adjusted: Tensor, states: Sequence[SamplingState]) -> Tensor:
    params = [state.params for state in states]

    def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=adjusted.device)

    return token_probabilities(
        adjusted,
        column([one.temperature for one in params]),
        column([one.top_k for one in params], torch.int64),
        column([one.top_p for one in params]),
        column([one.min_p for one in params]),
    )


def _with_logprobs(token_id: int, logprobs: Tensor, num_logprobs: int | None) -> Choice:
    if num_logprobs is None:
        return Choice(token_id)
    values, ids = logprobs.topk(min(num_logprobs, len(logprobs)))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Choice(token_id, logprobs[token_id].item(), top)
