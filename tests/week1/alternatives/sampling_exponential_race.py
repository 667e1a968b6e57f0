"""Week1/sampling another way: row by row in float64, and draws by an exponential race."""

import hashlib
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["apply_penalties", "token_probabilities", "draw", "Sampler"]


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens; ValueError for a value outside its range."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    def __post_init__(self):
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be finite and at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, got {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")
        if not 0.0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2.0 <= getattr(self, name) <= 2.0:
                raise ValueError(f"{name} must be in [-2, 2], got {getattr(self, name)}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63) or None, got {self.seed}")


def apply_penalties(
    logits: Tensor, prompt_ids: Sequence[int], output_ids: Sequence[int], params: SamplingParams
) -> Tensor:
    """Make tokens that were seen before less likely, or more: one token after another."""
    result = logits.detach().clone()
    times_in_output = Counter(output_ids)
    for token_id in set(prompt_ids) | set(times_in_output):
        score = float(logits[token_id])
        score *= params.repetition_penalty if score < 0 else 1 / params.repetition_penalty
        if token_id in times_in_output:
            score -= params.presence_penalty
            score -= params.frequency_penalty * times_in_output[token_id]
        result[token_id] = score
    return result


def token_probabilities(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """Turn scores into the distribution to draw from, each row by its own parameters."""
    columns = (column.tolist() for column in (temperature, top_k, top_p, min_p))
    rows = [_row(*row) for row in zip(logits.double(), *columns, strict=True)]
    return torch.stack(rows).to(torch.float32)


def _row(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    if temperature == 0:
        best = torch.zeros_like(logits)
        best[logits.argmax()] = 1.0
        return best
    # float64 holds any float32 score over any float32 temperature.
    weights = torch.softmax(logits / temperature, dim=-1)
    best_first = torch.argsort(-logits, stable=True)
    rank = torch.empty_like(best_first)
    rank[best_first] = torch.arange(len(logits), device=logits.device)
    if top_k > 0:
        weights = torch.where(rank < top_k, weights, 0.0)
    if top_p < 1.0:
        sums = weights[best_first].cumsum(0) / weights.sum()
        num_kept = int((sums < top_p).sum()) + 1
        weights = torch.where(rank < num_kept, weights, 0.0)
    if min_p > 0.0:
        weights = torch.where(weights >= min_p * weights.max(), weights, 0.0)
    return weights / weights.sum()


def draw(probabilities: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Let the tokens of a row race: each arrives after an exponential time, sooner if likelier."""
    generator = torch.Generator()
    winners = []
    for row, seed, position in zip(
        probabilities.cpu(), seeds.tolist(), positions.tolist(), strict=True
    ):
        key = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=4).digest()
        generator.manual_seed(int.from_bytes(key, "little"))
        times = torch.empty(len(row), dtype=torch.float64).exponential_(generator=generator)
        arrivals = torch.where(row > 0, times / row.double(), math.inf)
        winners.append(int(arrivals.argmin()))
    return torch.tensor(winners, dtype=torch.int64, device=probabilities.device)


class Sampler:
    """Choose the tokens of one request."""

    def __init__(self, params: SamplingParams, num_prompt_tokens: int):
        self._params = params
        self._start = num_prompt_tokens
        self.seed = params.seed
        if self.seed is None:
            self.seed = random.SystemRandom().randrange(2**63)

    def __call__(self, logits: Tensor, token_ids: Sequence[int]) -> int:
        """Choose the token that follows token_ids."""
        p = self._params
        scores = apply_penalties(logits, token_ids[: self._start], token_ids[self._start :], p)
        row = _row(scores.double(), p.temperature, p.top_k, p.top_p, p.min_p).float()[None]
        return int(draw(row, torch.tensor([self.seed]), torch.tensor([len(token_ids)])))
