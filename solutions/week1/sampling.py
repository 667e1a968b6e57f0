"""Choose the next token: penalties, temperature, filters, and noise that no neighbour changes."""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["apply_penalties", "token_probabilities", "draw", "Sampler"]

# SplitMix64's constants (Steele et al. 2014), as the int64 numbers with the same bits.
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_ROUNDS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))
_LAST_SHIFT = 31


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
    logits = logits.clone()
    seen = torch.tensor(sorted({*prompt_ids, *output_ids}), dtype=torch.int64, device=logits.device)
    scores = logits[seen]
    factor = params.repetition_penalty
    logits[seen] = torch.where(scores > 0, scores / factor, scores * factor)
    output = torch.tensor(output_ids, dtype=torch.int64, device=logits.device)
    counts = torch.bincount(output, minlength=len(logits))
    logits -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
    return logits


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
    temperature, top_k, top_p, min_p = (
        column.unsqueeze(-1) for column in (temperature, top_k, top_p, min_p)
    )
    greedy = temperature == 0
    # The peak is taken off first: a tiny temperature must not turn finite scores into inf − inf.
    scores = logits - logits.amax(-1, keepdim=True)
    probabilities = torch.softmax(scores / temperature.masked_fill(greedy, 1.0), -1)
    filtered = (top_k > 0) | (top_p < 1) | (min_p > 0)
    if bool(filtered.any()):
        ranked, ids = probabilities.sort(dim=-1, descending=True, stable=True)
        ranked = _filter_ranked(ranked, top_k, top_p, min_p)
        kept = torch.zeros_like(probabilities).scatter(-1, ids, ranked)
        # A row without a filter keeps its very bits: its draw must not depend on its neighbours.
        probabilities = torch.where(filtered, kept, probabilities)
    best = logits.argmax(-1, keepdim=True)
    one_hot = torch.zeros_like(probabilities).scatter(-1, best, 1.0)
    return torch.where(greedy, one_hot, probabilities)


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
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    noise = _uniform(seeds, positions).unsqueeze(-1)
    # Ends at exactly 1, and the noise stays below: behind the last possible token nothing is found.
    return torch.searchsorted(cumulative / cumulative[:, -1:], noise, right=True).squeeze(-1)


class Sampler:
    """Choose the tokens of one request: the `choose` of `generate`.

    params: how. num_prompt_tokens: how many of the ids it will be called with are the prompt.
    seed: params.seed; where that is None, a random one of the same range that does not follow from
        the seeds of Python's, NumPy's and torch's global generators.
    """

    def __init__(self, params: SamplingParams, num_prompt_tokens: int):
        self.params = params
        self.num_prompt_tokens = num_prompt_tokens
        self.seed = secrets.randbits(63) if params.seed is None else params.seed

    def __call__(self, logits: Tensor, token_ids: Sequence[int]) -> int:
        """Choose the token that follows token_ids: penalties, probabilities, draw.

        logits: (vocab_size,) float32. token_ids: the prompt, then the output so far. Both are left
            as they were.
        Returns the chosen id; its position is len(token_ids).
        """
        params, device = self.params, logits.device
        prompt_ids = token_ids[: self.num_prompt_tokens]
        output_ids = token_ids[self.num_prompt_tokens :]
        logits = apply_penalties(logits, prompt_ids, output_ids, params)
        probabilities = token_probabilities(
            logits.unsqueeze(0),
            torch.tensor([params.temperature], device=device),
            torch.tensor([params.top_k], device=device),
            torch.tensor([params.top_p], device=device),
            torch.tensor([params.min_p], device=device),
        )
        seeds = torch.tensor([self.seed], device=device)
        return int(draw(probabilities, seeds, torch.tensor([len(token_ids)], device=device)))


def _filter_ranked(ranked: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    ranks = torch.arange(ranked.shape[-1], device=ranked.device)
    ranked = _renormalised(ranked.masked_fill((ranks >= top_k) & (top_k > 0), 0.0))
    # A token stays while those ranked before it have not reached top_p: the one that crosses does.
    before = ranked.cumsum(-1) - ranked
    ranked = ranked.masked_fill((before >= top_p) & (top_p < 1), 0.0)
    return _renormalised(ranked.masked_fill(ranked < min_p * ranked[:, :1], 0.0))


def _renormalised(probabilities: Tensor) -> Tensor:
    return probabilities / probabilities.sum(-1, keepdim=True)


def _uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """Hash (seed, position) into [0, 1) by SplitMix64's mixer, twice."""
    bits = _mix(_mix(seeds) ^ positions)
    return _shift_right(bits, 11).to(torch.float64) * 2.0**-53


def _mix(bits: Tensor) -> Tensor:
    # int64 products wrap around, which is what the mixer's uint64 arithmetic asks for.
    bits = bits + _INCREMENT
    for shift, factor in _ROUNDS:
        bits = (bits ^ _shift_right(bits, shift)) * factor
    return bits ^ _shift_right(bits, _LAST_SHIFT)


def _shift_right(bits: Tensor, count: int) -> Tensor:
    # >> on int64 copies the sign bit downwards; the mixer needs zeros there.
    return (bits >> count) & ((1 << (64 - count)) - 1)
