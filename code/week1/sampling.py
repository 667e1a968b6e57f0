"""Choose the next token: penalties, temperature, filters, and noise that no neighbour changes."""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["apply_penalties", "token_probabilities", "draw", "Sampler"]


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, in the names and units of the OpenAI and vLLM interfaces.

    temperature: 0 always takes the most likely token. top_k: 0 is off. top_p: 1 is off. min_p: 0
    is off. repetition_penalty: 1 is off. presence_penalty, frequency_penalty: 0 is off. seed: None
    takes a new random one. Raises ValueError for a value outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    def __post_init__(self):
        rules = (
            ("temperature", 0.0 <= self.temperature < math.inf, "finite and at least 0"),
            ("top_k", self.top_k >= 0, "at least 0, where 0 is off"),
            ("top_p", 0.0 < self.top_p <= 1.0, "in (0, 1]"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "in [0, 1]"),
            ("repetition_penalty", 0.0 < self.repetition_penalty < math.inf, "above 0"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "in [-2, 2]"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "in [-2, 2]"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "in [0, 2**63) or None"),
        )
        for name, holds, limit in rules:
            if not holds:
                raise ValueError(f"{name} must be {limit}, got {getattr(self, name)}")


def apply_penalties(
    logits: Tensor, prompt_ids: Sequence[int], output_ids: Sequence[int], params: SamplingParams
) -> Tensor:
    """Make tokens that were seen before less likely, or more.

    logits: (vocab_size,) float32. prompt_ids, output_ids: what the request gave and what has been
        generated since; either may be empty. All three are left as they were.
    repetition_penalty: for every token in the prompt or the output, once, a positive score is
        divided by it and a negative one multiplied.
    presence_penalty: subtracted once from every token in the output. frequency_penalty: subtracted
        from every token as often as it stands in the output. Both after the repetition penalty.
    Returns (vocab_size,) float32.
    Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1 (repetition); OpenAI API reference.
    """
    raise NotImplementedError(
        "week1/sampling.py: apply_penalties is not written yet → sessions/week1/sampling.md"
    )


def token_probabilities(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """Turn scores into the distribution to draw from, each row by its own parameters.

    logits: (batch, vocab_size) float32, of any magnitude, −inf for tokens that are not allowed; at
        least one score of a row is finite.
    temperature, top_p, min_p: (batch,) float32; top_k: (batch,) int64; ranges as in SamplingParams.
    In this order: scores are divided by the temperature; only the top_k most likely tokens stay;
    of these, renormalised, only the smallest set of most likely ones whose probability reaches
    top_p; of these, only those at least min_p times as likely as the most likely one. Of equally
    likely tokens the one with the lower id ranks first. At temperature 0 the most likely token gets
    all the probability and the filters play no part.
    Returns (batch, vocab_size) float32; rows sum to 1. A row does not depend on the other rows'
    parameters, to the last bit. The arguments are left as they were.
    Source: Fan et al. 2018, arXiv:1805.04833 (top-k); Holtzman et al. 2019, arXiv:1904.09751
    (top-p); Nguyen et al. 2024, arXiv:2407.01082 (min-p).
    """
    raise NotImplementedError(
        "week1/sampling.py: token_probabilities is not written yet → sessions/week1/sampling.md"
    )


def draw(probabilities: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Draw one token a row with noise that depends on nothing but (seed, position).

    probabilities: (batch, vocab_size) float32; rows sum to 1.
    seeds: (batch,) int64, at least 0. positions: (batch,) int64, at least 0: the place in its
        sequence that the drawn token will have. All three are left as they were.
    Returns (batch,) int64. A row's token does not depend on the other rows, on their number, or on
    any call before; a token of probability 0 is never drawn; over many positions of one seed, over
    many seeds at one position, and between any two pairs that differ, tokens come out with their
    probabilities and independently, in large vocabularies too: the noise has 24 bits or more.
    """
    raise NotImplementedError(
        "week1/sampling.py: draw is not written yet → sessions/week1/sampling.md"
    )


class Sampler:
    """Choose the tokens of one request: the `choose` of `generate`.

    params: how. num_prompt_tokens: how many of the ids it will be called with are the prompt.
    seed: params.seed; where that is None, a random one of the same range that does not follow from
        the seeds of Python's, NumPy's and torch's global generators.
    """

    def __init__(self, params: SamplingParams, num_prompt_tokens: int):
        raise NotImplementedError(
            "week1/sampling.py: Sampler.__init__ is not written yet → sessions/week1/sampling.md"
        )

    def __call__(self, logits: Tensor, token_ids: Sequence[int]) -> int:
        """Choose the token that follows token_ids: penalties, probabilities, draw.

        logits: (vocab_size,) float32. token_ids: the prompt, then the output so far. Both are left
            as they were.
        Returns the chosen id; its position is len(token_ids).
        """
        raise NotImplementedError(
            "week1/sampling.py: Sampler.__call__ is not written yet → sessions/week1/sampling.md"
        )
