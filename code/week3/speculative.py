"""Guess several tokens ahead, let the model judge them in one pass, and keep its distribution."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from week1.gqa import Attend
from week1.qwen import Qwen
from week1.sampling import draw
from week3.block_manager import BlockManager
from week3.model_runner import (
    Choice,
    ModelRunner,
    SamplingState,
    choose_one,
    make_choices,
    probabilities,
)
from week3.paged_attention import PagedBatch, PagedKVCache, paged_attend, paged_cache_for
from week3.scheduler import Scheduled, Step

__all__ = ["NgramIndex", "DraftLength", "verify", "DraftModel"]

# Added to a request's seed: noise for another purpose is other noise.
ACCEPTING, DRAFTING = 0x5851F42D4C957F2D, 0x14057B7EF767814F


@dataclass(frozen=True)
class Draft:
    """Guesses of the next tokens of a request.

    probabilities: (len(token_ids), vocab_size) float32: the distribution that each of them was
    drawn from. None where nothing was drawn: nothing else could have been guessed.
    """

    token_ids: tuple[int, ...]
    probabilities: Tensor | None = None


class Proposer(Protocol):
    """Where guesses come from."""

    def add(self, request_id: str, state: SamplingState) -> None:
        """Get to know a request before its first step."""

    def remove(self, request_id: str) -> None:
        """Forget a request; nothing happens when it is not known."""

    def propose(self, lengths: Mapping[str, int]) -> dict[str, Draft]:
        """Guess the tokens that follow those that some requests have.

        lengths: request_id → how many, at least 1. Returns request_id → its guesses, at least one
        and at most so many; who gets none is left out.
        """


def seed_for(seed: int, purpose: int) -> int:
    """Make a seed for noise that is independent of a request's own, in the same range."""
    return (seed + purpose) % 2**63


class NgramIndex:
    """Find where the last tokens of a text stood before, and guess what followed there.

    min_ngram, max_ngram: of how many tokens the shortest and the longest run is that is looked for.
    Raises ValueError, which gives both, unless 1 <= min_ngram <= max_ngram.
    The text is empty in the beginning. A call takes no longer because the text is longer.
    Source: prompt lookup decoding, Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding.
    """

    def __init__(self, min_ngram: int = 2, max_ngram: int = 4):
        raise NotImplementedError(
            "week3/speculative.py: NgramIndex.__init__ is not written yet "
            "→ sessions/week3/speculative.md"
        )

    def extend(self, token_ids: Sequence[int]) -> None:
        """Let the text grow by some tokens."""
        raise NotImplementedError(
            "week3/speculative.py: NgramIndex.extend is not written yet "
            "→ sessions/week3/speculative.md"
        )

    def propose(self, num_drafts: int) -> list[int]:
        """Guess the next num_drafts tokens; returns as many, or [] where nothing stood before.

        Of the runs of min_ngram to max_ngram tokens that the text ends with, the longest one counts
        that stands somewhere before its end too, where it may overlap with the end; of the places
        where it stands, the last one. What follows there is guessed, up to the end of the text, and
        from there on the guesses themselves are what follows.
        """
        raise NotImplementedError(
            "week3/speculative.py: NgramIndex.propose is not written yet "
            "→ sessions/week3/speculative.md"
        )


class DraftLength:
    """Say how many tokens are worth guessing for one request, from what became of the last guesses.

    most: never more; from 1 to 64.
    When all guesses are accepted, again and again, it is most after at most 10 steps with guesses.
    As long as each step with guesses has some that are accepted, every step has guesses.
    While none is accepted, at most 1 step in 20 has guesses, counted over 1,000 steps, and after
    the first 20 steps never more than one guess. However long that went on: when guesses begin to
    be accepted, it is most again within 100 steps.
    """

    def __init__(self, most: int):
        raise NotImplementedError(
            "week3/speculative.py: DraftLength.__init__ is not written yet "
            "→ sessions/week3/speculative.md"
        )

    def next(self) -> int:
        """Say how many tokens to guess in the coming step, 0 for none; called once a step."""
        raise NotImplementedError(
            "week3/speculative.py: DraftLength.next is not written yet "
            "→ sessions/week3/speculative.md"
        )

    def update(self, num_drafts: int, num_accepted: int) -> None:
        """Take in what became of the guesses of a step; it is not called for one that had none.

        num_drafts: how many there were, from 1 to what `next` said. num_accepted: how many of them
        were accepted.
        """
        raise NotImplementedError(
            "week3/speculative.py: DraftLength.update is not written yet "
            "→ sessions/week3/speculative.md"
        )


def verify(
    drafts: Sequence[Draft], expected: Tensor, seeds: Sequence[int], places: Sequence[int]
) -> list[list[int]]:
    """Choose the next tokens of several requests, whose guesses the model has judged.

    drafts: of each request; without token_ids where nothing is guessed. expected: (rows,
        vocab_size) float32, one request behind the other: for each guess how likely each token is
        in its place by the model, and one row more, for the place behind the last guess.
    seeds: of the requests. places: where in its sequence each request's next token will stand. All
        are left as they were.
    Returns for each request its next tokens: of its guesses the first ones, as many as are
    accepted, and one token more, which is not the guess that stood there.
    Tokens come out with the probabilities that the model gives them, whatever was guessed, and
    whatever the guesses were drawn from; a guess that was drawn is accepted as often as this
    allows. A request without guesses, and one whose guesses were not drawn, gets the very tokens
    that `draw` gives, place by place, with its seed. A request gets what it would get alone.
    Noise depends on nothing but the request's seed and the place, and is independent of what drew
    the guesses.
    Source: Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318.
    """
    raise NotImplementedError(
        "week3/speculative.py: verify is not written yet → sessions/week3/speculative.md"
    )


class DraftModel:
    """Let a small model guess, with a KV pool of its own.

    model: its vocabulary is that of the model that judges. num_blocks, block_size: of its pool.
    max_num_seqs, token_budget: how many requests, and how many tokens, a pass has at most, whatever
        is asked for. max_model_len: at most the model's context; a text and its guesses together
        are never longer. make_attend: as in `ModelRunner`.
    A `Proposer`. Each guess is drawn from the model's own `probabilities` for it, which are those
    of the request's parameters behind its tokens and the guesses before this one, with noise from
    `seed_for` the purpose DRAFTING and the place that the guess will have.
    A request gets fewer guesses than asked for, or none, where its text would be too long; and none
    when the free blocks do not hold its text and all of its guesses but the last, after those that
    stand before it in lengths have got theirs. It keeps its blocks until it is removed. Nothing is
    kept of who is removed.
    Each token of a text goes through the model once, and each guess but the last one of a call.
    What was refused is no part of the text; what was guessed and came does not go through again.
    Only the last token of a text may do so, for its scores. All who guess share passes: where the
    budget is enough, a call has as many as the largest number of guesses.
    """

    def __init__(
        self,
        model: Qwen,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        token_budget: int,
        max_model_len: int,
        make_attend: Callable[[PagedKVCache, PagedBatch], Attend] = paged_attend,
    ):
        raise NotImplementedError(
            "week3/speculative.py: DraftModel.__init__ is not written yet "
            "→ sessions/week3/speculative.md"
        )

    def add(self, request_id: str, state: SamplingState) -> None:
        """Get to know a request. state: as its runner changes it; left as it is."""
        raise NotImplementedError(
            "week3/speculative.py: DraftModel.add is not written yet "
            "→ sessions/week3/speculative.md"
        )

    def remove(self, request_id: str) -> None:
        """Forget a request; nothing happens when it is not known."""
        raise NotImplementedError(
            "week3/speculative.py: DraftModel.remove is not written yet "
            "→ sessions/week3/speculative.md"
        )

    def propose(self, lengths: Mapping[str, int]) -> dict[str, Draft]:
        """Guess the tokens that follow those that some requests have; see `Proposer`."""
        raise NotImplementedError(
            "week3/speculative.py: DraftModel.propose is not written yet "
            "→ sessions/week3/speculative.md"
        )


class NgramProposer:
    """Guess by an `NgramIndex` of each request's own text: a `Proposer`.

    min_ngram, max_ngram: as there.
    """

    def __init__(self, min_ngram: int = 2, max_ngram: int = 4):
        self._sizes = min_ngram, max_ngram
        self._requests: dict[str, tuple[SamplingState, NgramIndex]] = {}
        self._num_seen: dict[str, int] = {}

    def add(self, request_id: str, state: SamplingState) -> None:
        """Get to know a request."""
        index = NgramIndex(*self._sizes)
        index.extend(state.prompt_ids)
        self._requests[request_id] = state, index
        self._num_seen[request_id] = 0

    def remove(self, request_id: str) -> None:
        """Forget a request; nothing happens when it is not known."""
        self._requests.pop(request_id, None)
        self._num_seen.pop(request_id, None)

    def propose(self, lengths: Mapping[str, int]) -> dict[str, Draft]:
        """Guess the tokens that follow those that some requests have; see `Proposer`."""
        drafts = {}
        for request_id, num_drafts in lengths.items():
            state, index = self._requests[request_id]
            index.extend(state.output_ids[self._num_seen[request_id] :])
            self._num_seen[request_id] = len(state.output_ids)
            guesses = index.propose(num_drafts)
            if guesses:
                drafts[request_id] = Draft(tuple(guesses))
        return drafts


class Speculation:
    """Speculative decoding for an `Engine`: its `Speculator`.

    proposer: where guesses come from. most: a request's guesses in one step, see `DraftLength`.
    max_step_tokens: a step costs about the same up to so many tokens; all requests share what is
        left of them for guesses, and get equally many at the most.
    """

    def __init__(self, proposer: Proposer, most: int, max_step_tokens: int):
        self._proposer, self._most, self._max_step_tokens = proposer, most, max_step_tokens
        self._lengths: dict[str, DraftLength] = {}
        self._drafts: dict[str, Draft] = {}

    def add(self, request_id: str, state: SamplingState) -> None:
        """Get to know a request before its first step."""
        self._lengths[request_id] = DraftLength(self._most)
        self._proposer.add(request_id, state)

    def remove(self, request_id: str) -> None:
        """Forget a request that has ended; nothing happens when it is not known."""
        self._lengths.pop(request_id, None)
        self._drafts.pop(request_id, None)
        self._proposer.remove(request_id)

    def propose(self, request_ids: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """Guess the tokens that follow those that some requests have."""
        lengths = {name: self._lengths[name].next() for name in request_ids}
        lengths = {name: count for name, count in lengths.items() if count}
        room = self._max_step_tokens - len(request_ids)
        share = room // len(lengths) if lengths else 0
        self._drafts = {}
        if share > 0:
            wanted = {name: min(count, share) for name, count in lengths.items()}
            self._drafts = self._proposer.propose(wanted)
        return {name: draft.token_ids for name, draft in self._drafts.items()}

    def choose(
        self, logits: Tensor, parts: Sequence[Scheduled], states: Sequence[SamplingState]
    ) -> list[list[Choice]]:
        """Choose the next tokens of requests, with guesses or without: as `choose_one` says."""
        if not any(part.num_drafts for part in parts):
            return choose_one(logits, parts, states)
        drafts = [self._draft_of(part) for part in parts]
        ahead = [
            _ahead(state, draft.token_ids[:count])
            for state, draft in zip(states, drafts, strict=True)
            for count in range(len(draft.token_ids) + 1)
        ]
        places = [len(state.prompt_ids) + len(state.output_ids) for state in states]
        seeds = [state.seed for state in states]
        chosen = verify(drafts, probabilities(logits, ahead), seeds, places)
        for part, token_ids in zip(parts, chosen, strict=True):
            if part.num_drafts:
                self._lengths[part.request_id].update(part.num_drafts, len(token_ids) - 1)
        return _told(logits, ahead, drafts, chosen)

    def _draft_of(self, part: Scheduled) -> Draft:
        """Give the guesses of a part, of which its scheduler may have taken fewer."""
        if not part.num_drafts:
            return Draft(())
        draft, count = self._drafts[part.request_id], part.num_drafts
        drawn_from = draft.probabilities
        return Draft(draft.token_ids[:count], None if drawn_from is None else drawn_from[:count])


def _ahead(state: SamplingState, guesses: Sequence[int]) -> SamplingState:
    """Give the state that a request would have behind some guesses."""
    return replace(state, output_ids=[*state.output_ids, *guesses]) if guesses else state


def _told(
    logits: Tensor,
    states: Sequence[SamplingState],
    drafts: Sequence[Draft],
    chosen: Sequence[Sequence[int]],
) -> list[list[Choice]]:
    """Tell what was chosen; logits and states: a row for each guess, and one more a request."""
    starts = itertools.accumulate((len(draft.token_ids) + 1 for draft in drafts), initial=0)
    rows = [
        start + i
        for start, token_ids in zip(starts, chosen, strict=False)
        for i in range(len(token_ids))
    ]
    choices = iter(
        make_choices(logits[rows], [*itertools.chain(*chosen)], [states[row] for row in rows])
    )
    return [list(itertools.islice(choices, len(token_ids))) for token_ids in chosen]
