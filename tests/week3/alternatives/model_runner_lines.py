"""Week3/model_runner another way: one request after the other, and a step written line by line.

Every request is drawn, the greedy ones too, and the parts of a step go through the model in the
opposite order. The buffer has the tables in front, and they are as wide as the context.
"""

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from week1.gqa import Attend
from week1.qwen import Qwen
from week1.sampling import SamplingParams, apply_penalties, draw, token_probabilities
from week3.block_manager import BlockManager, num_blocks_for, slot_mapping
from week3.paged_attention import PagedBatch, PagedKVCache, paged_attend
from week3.scheduler import Scheduled, Step

__all__ = ["probabilities", "make_choices", "sample", "ModelRunner"]


@dataclass(frozen=True)
class Choice:
    """A token, and how likely it was."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class SamplingState:
    """How a request chooses, and what it has chosen."""

    params: SamplingParams
    prompt_ids: Sequence[int]
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    eos_token_ids: frozenset[int] = frozenset()
    num_logprobs: int | None = None
    output_ids: list[int] = field(default_factory=list)
    seed: int = -1

    def __post_init__(self):
        given = self.params.seed
        if self.seed == -1:
            self.seed = given if given is not None else secrets.randbelow(2**63)


def probabilities(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Make one row after the other."""
    return torch.cat([_row(scores, state) for scores, state in zip(logits, states, strict=True)])


def make_choices(
    logits: Tensor, token_ids: Sequence[int], states: Sequence[SamplingState]
) -> list[Choice]:
    """Tell one choice after the other."""
    return [_told(*each) for each in zip(logits, token_ids, states, strict=True)]


def sample(logits: Tensor, states: Sequence[SamplingState]) -> list[Choice]:
    """Choose for one request after the other."""
    token_ids = []
    for scores, state in zip(logits, states, strict=True):
        place = len(state.prompt_ids) + len(state.output_ids)
        drawn = draw(_row(scores, state), torch.tensor([state.seed]), torch.tensor([place]))
        token_ids.append(int(drawn))
    return make_choices(logits, token_ids, states)


def choose_one(
    logits: Tensor, parts: Sequence[Scheduled], states: Sequence[SamplingState]
) -> list[list[Choice]]:
    """Choose where nothing is guessed."""
    return [[choice] for choice in sample(logits, states)]


def _row(scores: Tensor, state: SamplingState) -> Tensor:
    adjusted, params = scores.clone(), state.params
    for token_id, bias in state.logit_bias.items():
        adjusted[token_id] += bias
    adjusted = apply_penalties(adjusted, state.prompt_ids, state.output_ids, params)
    if state.min_tokens > len(state.output_ids):
        for token_id in state.eos_token_ids:
            adjusted[token_id] = -math.inf
    return token_probabilities(
        adjusted[None],
        torch.tensor([params.temperature]),
        torch.tensor([params.top_k]),
        torch.tensor([params.top_p]),
        torch.tensor([params.min_p]),
    )


def _told(scores: Tensor, token_id: int, state: SamplingState) -> Choice:
    if state.num_logprobs is None:
        return Choice(token_id)
    logprobs = (scores - scores.logsumexp(0)).tolist()
    ranked = sorted(range(len(logprobs)), key=logprobs.__getitem__, reverse=True)
    top = tuple((i, logprobs[i]) for i in ranked[: state.num_logprobs])
    return Choice(token_id, logprobs[token_id], top)


class ModelRunner:
    """Write a step into a buffer, line by line, and run it."""

    def __init__(
        self,
        model: Qwen,
        cache: PagedKVCache,
        blocks: BlockManager,
        max_num_seqs: int,
        token_budget: int,
        max_model_len: int,
        make_attend: Callable[[PagedKVCache, PagedBatch], Attend] = paged_attend,
        choose: Callable = choose_one,
    ):
        self.model, self.cache, self.blocks = model, cache, blocks
        self.make_attend, self.choose = make_attend, choose
        self.requests: dict[str, SamplingState] = {}
        width = num_blocks_for(max_model_len, blocks.block_size)
        memory = torch.zeros(max_num_seqs * (width + 2) + 1 + 3 * token_budget, dtype=torch.int64)
        tables, rest = memory[: max_num_seqs * width], memory[max_num_seqs * width :]
        self.tables = tables.view(max_num_seqs, width)
        self.seq_lens, rest = rest[:max_num_seqs], rest[max_num_seqs:]
        self.starts, rest = rest[: max_num_seqs + 1], rest[max_num_seqs + 1 :]
        self.lines = rest.view(3, token_budget)  # ids, positions, slots

    def add(self, request_id: str, state: SamplingState) -> None:
        """Keep a state."""
        self.requests[request_id] = state

    def remove(self, request_id: str) -> None:
        """Drop a state, if there is one."""
        if request_id in self.requests:
            del self.requests[request_id]

    @torch.no_grad()
    def execute(self, step: Step) -> dict[str, tuple[Choice, ...]]:
        """Write, run, choose."""
        ones = [part for part in step.parts if len(part.token_ids) == 1]
        parts = [*ones, *(part for part in reversed(step.parts) if part not in ones)]
        end, wanted, rows = 0, [], []
        for row, part in enumerate(parts):
            end = self._write(row, end, part)
            if part.catches_up and part.request_id in self.requests:
                wanted.append(part)
                rows += range(end - part.num_drafts - 1, end)
        ids, positions, slots = self.lines[:, :end]
        batch = PagedBatch(
            slots,
            self.tables[: len(parts)],
            self.starts[: len(parts) + 1],
            self.seq_lens[: len(parts)],
            len(ones),
            end,
        )
        hidden = self.model(ids, positions, self.make_attend(self.cache, batch))
        if not wanted:
            return {}
        states = [self.requests[part.request_id] for part in wanted]
        out = {}
        every = self.choose(self.model.logits(hidden[rows]), wanted, states)
        for part, state, choices in zip(wanted, states, every, strict=True):
            state.output_ids += [choice.token_id for choice in choices]
            out[part.request_id] = tuple(choices)
        return out

    def _write(self, row: int, begin: int, part) -> int:
        table = self.blocks.block_table(part.request_id)
        first, last = part.num_computed_tokens, part.num_computed_tokens + len(part.token_ids)
        end = begin + len(part.token_ids)
        slots = slot_mapping(table, first, last, self.blocks.block_size)
        lines = [list(part.token_ids), list(range(first, last)), slots]
        self.lines[:, begin:end] = torch.tensor(lines)
        self.tables[row, : len(table)] = torch.tensor(list(table))
        self.seq_lens[row] = last
        self.starts[row + 1] = end
        return end
