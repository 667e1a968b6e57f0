"""Guess several tokens ahead, let the model judge them in one pass, and keep its distribution."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
# Steps without guesses, after one that was wrong and after many.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 8, 64


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

    min_ngram, max_ngram: how many tokens must stand there again, and how many are looked for.
    Raises ValueError, which gives both, unless 1 <= min_ngram <= max_ngram.
    A call takes no longer because the text is longer.
    Source: prompt lookup decoding, Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding.
    """

    def __init__(self, min_ngram: int = 2, max_ngram: int = 4):
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(
                f"min_ngram {min_ngram} must be at least 1 and at most max_ngram {max_ngram}"
            )
        self._sizes = range(min_ngram, max_ngram + 1)
        self._token_ids: list[int] = []
        # Of every n-gram that is followed by a token: where the last one such token stands.
        self._followers: dict[tuple[int, ...], int] = {}

    def extend(self, token_ids: Sequence[int]) -> None:
        """Let the text grow by some tokens."""
        for token_id in token_ids:
            for ngram in self._last_ngrams():
                self._followers[ngram] = len(self._token_ids)
            self._token_ids.append(token_id)

    def propose(self, num_drafts: int) -> list[int]:
        """Guess the next num_drafts tokens; returns [] where nothing stood before.

        Of the n-grams that the text ends with, the longest one counts that stands anywhere before
        its end, and of the places where it stands, the last one. What follows there is guessed,
        up to the end of the text, and from there on the guesses themselves are what follows.
        """
        for ngram in reversed(self._last_ngrams()):
            place = self._followers.get(ngram)
            if place is not None:
                following = self._token_ids[place : place + num_drafts]
                return list(itertools.islice(itertools.cycle(following), num_drafts))
        return []

    def _last_ngrams(self) -> list[tuple[int, ...]]:
        length = len(self._token_ids)
        return [tuple(self._token_ids[-n:]) for n in self._sizes if n <= length]


class DraftLength:
    """Say how many tokens are worth guessing for one request, from what became of the last guesses.

    most: never more, at least 1.
    When all guesses are accepted, again and again, it is most after at most 10 steps with guesses.
    While none is accepted, at most 1 step in 20 has guesses, counted over 1,000 steps, and after
    the first 20 steps never more than one guess. However long that went on: when guesses begin to
    be accepted, it is most again within 100 steps.
    """

    def __init__(self, most: int):
        self._most, self._length = most, 1
        self._pause = self._wait = 0

    def next(self) -> int:
        """Say how many tokens to guess in the coming step; called once a step."""
        if self._wait:
            self._wait -= 1
            return 0
        return self._length

    def update(self, num_drafts: int, num_accepted: int) -> None:
        """Take in what became of the guesses of a step; num_drafts is at least 1."""
        if num_accepted == num_drafts:
            self._length, self._pause = min(self._most, 2 * self._length), 0
        elif num_accepted:
            self._length, self._pause = min(self._most, num_accepted), 0
        elif self._length > 1:
            self._length //= 2
        else:
            self._pause = min(_LONGEST_PAUSE, max(_SHORTEST_PAUSE, 2 * self._pause))
            self._wait = self._pause


def verify(
    drafts: Sequence[Draft], expected: Tensor, seeds: Sequence[int], places: Sequence[int]
) -> list[list[int]]:
    """Choose the next tokens of several requests, whose guesses the model has judged.

    drafts: of each request; without token_ids where nothing is guessed. expected: (rows,
        vocab_size) float32, one request behind the other: for each guess how likely each token is
        in its place by the model, and one row more, for the place behind the last guess.
    seeds: of the requests. places: where in its sequence each request's next token will stand.
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
    device = expected.device
    counts = [len(draft.token_ids) + 1 for draft in drafts]
    of_rows = [i for i, count in enumerate(counts) for _ in range(count)]
    row_seeds = torch.tensor([seeds[i] for i in of_rows], device=device)
    row_places = torch.tensor(
        [place + j for place, count in zip(places, counts, strict=True) for j in range(count)],
        device=device,
    )
    chosen = draw(expected, row_seeds, row_places).tolist()
    starts = [0, *itertools.accumulate(counts)]
    for start, seed, place, draft in zip(starts, seeds, places, drafts, strict=False):
        if draft.probabilities is not None and draft.token_ids:
            end = start + len(draft.token_ids)
            chosen[start:end] = _judge(draft, expected[start:end], seed, place)
    return [
        _up_to_other(chosen[start : start + count], draft.token_ids)
        for start, count, draft in zip(starts, counts, drafts, strict=False)
    ]


class DraftModel:
    """Let a small model guess, with a KV pool of its own.

    model: its vocabulary is that of the model that judges. num_blocks, block_size: of its pool.
    max_num_seqs, token_budget, max_model_len, make_attend: as in `ModelRunner`; max_model_len is at
        most the model's context.
    A `Proposer`. Each guess is drawn from the model's own `probabilities` for it, which are those
    of the request's parameters behind its tokens and the guesses before this one, with a seed of
    `seed_for` the purpose DRAFTING.
    Of a text, each token is computed once, as long as what was guessed is what came, and in chunks
    of token_budget. A request gets no guesses when no blocks are free for them, and no more than
    fit into max_model_len. Nothing is kept of who is removed.
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
        self._blocks = BlockManager(num_blocks, block_size)
        cache = paged_cache_for(model, num_blocks, block_size)
        limits = max_num_seqs, token_budget, max_model_len
        self._max_num_seqs, self._token_budget, self._max_model_len = limits
        self._runner = ModelRunner(model, cache, self._blocks, *limits, make_attend, self._choose)
        self._requests: dict[str, _Drafting] = {}

    def add(self, request_id: str, state: SamplingState) -> None:
        """Get to know a request. state: as its runner changes it; left as it is."""
        own = replace(
            state,
            num_logprobs=None,
            output_ids=[*state.output_ids],
            seed=seed_for(state.seed, DRAFTING),
        )
        self._requests[request_id] = _Drafting(state, own)
        self._runner.add(request_id, own)

    def remove(self, request_id: str) -> None:
        """Forget a request; nothing happens when it is not known."""
        self._runner.remove(request_id)
        self._blocks.free(request_id)
        self._requests.pop(request_id, None)

    def propose(self, lengths: Mapping[str, int]) -> dict[str, Draft]:
        """Guess the tokens that follow those that some requests have; see `Proposer`."""
        begun = {name: count for name, count in lengths.items() if self._begin(name, count)}
        left = begun
        while left:
            self._step(left)
            left = {
                name: count
                for name, count in left.items()
                if len(self._requests[name].drawn_from) < count
            }
        return {name: self._requests[name].draft() for name in begun}

    def _begin(self, request_id: str, num_drafts: int) -> bool:
        """Go back to the text as it is; returns whether there is room for guesses."""
        request = self._requests[request_id]
        request.go_back()
        # The last guess is not computed.
        num_tokens = request.num_tokens + num_drafts - 1
        return num_tokens <= self._max_model_len and self._blocks.allocate(request_id, num_tokens)

    def _step(self, request_ids: Iterable[str]) -> None:
        """Compute a chunk of what requests lack; those that lack nothing any more get a guess."""
        budget, parts = self._token_budget, []
        for request_id in itertools.islice(request_ids, self._max_num_seqs):
            request = self._requests[request_id]
            part = request.part(request_id, budget)
            if not part.token_ids:
                break
            request.num_computed_tokens += len(part.token_ids)
            budget -= len(part.token_ids)
            parts.append(part)
        self._runner.execute(Step(tuple(parts), ()))

    def _choose(
        self, logits: Tensor, parts: Sequence[Scheduled], states: Sequence[SamplingState]
    ) -> list[list[Choice]]:
        for part, row in zip(parts, probabilities(logits, states), strict=True):
            self._requests[part.request_id].drawn_from.append(row)
        return choose_one(logits, parts, states)


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

    proposer: where guesses come from. most: of a request's guesses in one step. max_step_tokens: a
    step of the model costs about the same up to so many tokens; guesses are made as long as no
    more are in the step, an equal number for each request that may have so many.
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


@dataclass
class _Drafting:
    """What a draft model has of a request.

    state: of the request. own: the same, with the guesses among its output_ids. num_known: so many
    tokens were the text when guesses began last, and stay. num_computed_tokens: have their KV.
    drawn_from: a distribution for each guess.
    """

    state: SamplingState
    own: SamplingState
    num_known: int = 0
    num_computed_tokens: int = 0
    drawn_from: list[Tensor] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.own.prompt_ids) + len(self.own.output_ids)

    def go_back(self) -> None:
        """Make own the text as it is, and keep of what is computed what is still right."""
        guessed = self.own.output_ids
        same = max(0, self.num_known - len(self.own.prompt_ids))
        for token_id, guess in zip(self.state.output_ids[same:], guessed[same:], strict=False):
            if token_id != guess:
                break
            same += 1
        self.own.output_ids[:] = self.state.output_ids
        self.num_known = self.num_tokens
        right = len(self.own.prompt_ids) + same
        # The scores behind the last token are needed anew.
        self.num_computed_tokens = min(self.num_computed_tokens, right, self.num_tokens - 1)
        self.drawn_from = []

    def part(self, request_id: str, budget: int) -> Scheduled:
        start, count = self.num_computed_tokens, len(self.own.prompt_ids)
        token_ids = (
            *self.own.prompt_ids[start : start + budget],
            *self.own.output_ids[max(0, start - count) : max(0, start + budget - count)],
        )
        catches_up = start + len(token_ids) == self.num_tokens
        return Scheduled(request_id, start, token_ids, 0, catches_up)

    def draft(self) -> Draft:
        token_ids = tuple(self.own.output_ids[len(self.state.output_ids) :])
        return Draft(token_ids, torch.stack(self.drawn_from))


def _judge(draft: Draft, expected: Tensor, seed: int, place: int) -> list[int]:
    """Say for each guess that was drawn what stands in its place; itself where it is accepted."""
    assert draft.probabilities is not None
    guesses = torch.tensor(draft.token_ids, device=expected.device)
    drawn_from, index = draft.probabilities, guesses[:, None]
    accepted = (expected.gather(1, index) / drawn_from.gather(1, index)).clamp(max=1.0)
    count = len(draft.token_ids)
    places = torch.arange(place, place + count, device=expected.device)

    def seeds(purpose: int) -> Tensor:
        return torch.tensor([seed_for(seed, purpose)] * count, device=expected.device)

    is_accepted = draw(torch.cat((1.0 - accepted, accepted), 1), seeds(ACCEPTING), places).bool()
    missing = (expected - drawn_from).clamp(min=0.0)
    total = missing.sum(1, keepdim=True)
    # Where nothing is missing, nothing is refused.
    missing = torch.where(total > 0, missing / total, expected)
    return torch.where(is_accepted, guesses, draw(missing, seeds(0), places)).tolist()


def _up_to_other(chosen: Sequence[int], guesses: Sequence[int]) -> list[int]:
    """Cut behind the first token that is not the guess for its place."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, guesses, strict=False))
    return list(chosen[: 1 + sum(1 for _ in same)])


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
