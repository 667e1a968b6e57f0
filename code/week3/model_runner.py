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
    raise NotImplementedError(
        "week3/model_runner.py: probabilities is not written yet → sessions/week3/model_runner.md"
    )


def make_choices(
    logits: Tensor, token_ids: Sequence[int], states: Sequence[SamplingState]
) -> list[Choice]:
    """Tell chosen tokens with the logprobs that their requests ask for.

    logits, states: as in `sample`; left as they were. token_ids: one a row.
    """
    raise NotImplementedError(
        "week3/model_runner.py: make_choices is not written yet → sessions/week3/model_runner.md"
    )


def sample(logits: Tensor, states: Sequence[SamplingState]) -> list[Choice]:
    """Choose the next token of several requests.

    logits: (rows, vocab_size) float32, one row a request; left as it was. states: of these
        requests, in the same order; left as they were.
    Each token is drawn by its `probabilities`, with noise from the request's seed and the place
    that the token will have, as in `Sampler`. A request gets what it would get alone, whoever its
    neighbours are.
    """
    raise NotImplementedError(
        "week3/model_runner.py: sample is not written yet → sessions/week3/model_runner.md"
    )


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
        raise NotImplementedError(
            "week3/model_runner.py: ModelRunner.__init__ is not written yet "
            "→ sessions/week3/model_runner.md"
        )

    def add(self, request_id: str, state: SamplingState) -> None:
        """Get to know a request before its first step.

        state: kept, and changed by `execute`, as whoever adds it can see.
        """
        raise NotImplementedError(
            "week3/model_runner.py: ModelRunner.add is not written yet "
            "→ sessions/week3/model_runner.md"
        )

    def remove(self, request_id: str) -> None:
        """Forget a request that has ended; nothing happens when it is not known."""
        raise NotImplementedError(
            "week3/model_runner.py: ModelRunner.remove is not written yet "
            "→ sessions/week3/model_runner.md"
        )

    def execute(self, step: Step) -> dict[str, tuple[Choice, ...]]:
        """Compute a step.

        step: from the scheduler, with at least one part. The tables of its requests cover their
            tokens.
        Returns request_id → its next tokens, for each request that caught up and is still known.
        The tokens count as its output_ids from now on. What was computed for one that is no longer
        known is of no use, and does no harm.
        """
        raise NotImplementedError(
            "week3/model_runner.py: ModelRunner.execute is not written yet "
            "→ sessions/week3/model_runner.md"
        )
