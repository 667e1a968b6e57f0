"""Week3/speculative another way: one request after the other, and passes made by hand.

The index keeps all places of each run. A share says how many guesses are worth it. Guesses are
judged one by one, by the request's own noise; where one is refused, other noise draws. The draft
model remembers which tokens it has computed, and compares them with the text.
"""

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
    SamplingState,
    choose_one,
    make_choices,
    probabilities,
)
from week3.paged_attention import PagedBatch, PagedKVCache, paged_attend, paged_cache_for
from week3.scheduler import Scheduled

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
    """Remember all places behind each run of tokens."""

    def __init__(self, min_ngram: int = 2, max_ngram: int = 4):
        if min_ngram < 1 or max_ngram < min_ngram:
            raise ValueError(f"1 <= {min_ngram} <= {max_ngram} does not hold")
        self.min_ngram, self.max_ngram = min_ngram, max_ngram
        self.text: list[int] = []
        self.places: dict[tuple[int, ...], list[int]] = {}

    def extend(self, token_ids: Sequence[int]) -> None:
        """Take in some tokens."""
        for token_id in token_ids:
            self.text.append(int(token_id))
            end = len(self.text)
            for size in range(self.min_ngram, min(self.max_ngram, end) + 1):
                run = tuple(self.text[end - size : end])
                self.places.setdefault(run, []).append(end)

    def propose(self, num_drafts: int) -> list[int]:
        """Follow the last place but one of the longest run that has two."""
        end = len(self.text)
        for size in range(min(self.max_ngram, end), self.min_ngram - 1, -1):
            places = self.places[tuple(self.text[end - size :])]
            if len(places) > 1:
                start, guesses = places[-2], []
                for i in range(num_drafts):
                    place = start + i
                    guesses.append(self.text[place] if place < end else guesses[place - end])
                return guesses
        return []


class DraftLength:
    """Quadruple, or begin anew; after a failure at one guess, wait for ever longer."""

    def __init__(self, most: int):
        self.most, self.now = most, min(2, most)
        self.num_failures = self.rest = 0

    def next(self) -> int:
        """Say how many."""
        self.rest -= 1
        return self.now if self.rest < 0 else 0

    def update(self, num_drafts: int, num_accepted: int) -> None:
        """Learn from a step."""
        if num_accepted:
            self.num_failures = 0
            wanted = 4 * self.now if num_accepted == num_drafts else 1 + num_accepted
            self.now = min(self.most, wanted)
            self.rest = 0
        else:
            was_short, self.now = self.now == 1, 1
            self.num_failures += was_short
            self.rest = min(10 * self.num_failures, 50)


def verify(
    drafts: Sequence[Draft], expected: Tensor, seeds: Sequence[int], places: Sequence[int]
) -> list[list[int]]:
    """Choose for one request after the other, and one place after the other."""
    answers, row = [], 0
    for draft, seed, place in zip(drafts, seeds, places, strict=True):
        tokens: list[int] = []
        for i, guess in enumerate([*draft.token_ids, None]):
            wanted = expected[row + i]
            if guess is None or draft.probabilities is None:
                token = _drawn(wanted, seed, place + i)
            else:
                token = _judged(wanted, draft.probabilities[i], guess, seed, place + i)
            tokens.append(token)
            if token != guess:
                break
        answers.append(tokens)
        row += len(draft.token_ids) + 1
    return answers


def _drawn(row: Tensor, seed: int, place: int) -> int:
    return int(draw(row[None], torch.tensor([seed]), torch.tensor([place])))


def _judged(wanted: Tensor, guessed: Tensor, guess: int, seed: int, place: int) -> int:
    chance = float(wanted[guess]) / float(guessed[guess])
    if chance >= 1.0 or _drawn(torch.tensor([chance, 1.0 - chance]), seed, place) == 0:
        return guess
    both = torch.minimum(wanted, guessed)
    rest = (wanted - both).double()
    if float(rest.sum()) <= 0.0:
        return guess
    return _drawn((rest / rest.sum()).float(), seed_for(seed, ACCEPTING), place)


class DraftModel:
    """Make the passes of a small model by hand."""

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
        self.model, self.make_attend = model, make_attend
        self.blocks = BlockManager(num_blocks, block_size)
        self.cache = paged_cache_for(model, num_blocks, block_size)
        self.most_seqs, self.most_tokens = max_num_seqs, token_budget
        self.max_model_len = max_model_len
        self.states: dict[str, SamplingState] = {}
        self.computed: dict[str, list[int]] = {}

    def add(self, request_id: str, state: SamplingState) -> None:
        """Remember its state, of which nothing is computed."""
        self.states[request_id], self.computed[request_id] = state, []

    def remove(self, request_id: str) -> None:
        """Forget a request."""
        if request_id in self.states:
            self.blocks.free(request_id)
            del self.states[request_id], self.computed[request_id]

    def propose(self, lengths: Mapping[str, int]) -> dict[str, Draft]:
        """Guess for those who have room, all of them a token at a time."""
        wanted = {}
        for name, count in lengths.items():
            num_tokens = len(self._text(name))
            count = min(count, self.max_model_len - num_tokens)
            if count > 0 and self.blocks.allocate(name, num_tokens + count - 1):
                wanted[name] = count
                self._keep_what_is_right(name)
        guesses: dict[str, list[int]] = {name: [] for name in wanted}
        rows: dict[str, list[Tensor]] = {name: [] for name in wanted}
        open_ones = list(wanted)
        while open_ones:
            self._pass(open_ones, guesses, rows)
            open_ones = [name for name in wanted if len(guesses[name]) < wanted[name]]
        return {name: Draft(tuple(guesses[name]), torch.stack(rows[name])) for name in wanted}

    def _text(self, name: str) -> list[int]:
        return [*self.states[name].prompt_ids, *self.states[name].output_ids]

    def _keep_what_is_right(self, name: str) -> None:
        text, right = self._text(name), 0
        for old, new in zip(self.computed[name], text[:-1], strict=False):
            if old != new:
                break
            right += 1
        del self.computed[name][right:]

    def _pass(
        self,
        names: Sequence[str],
        guesses: dict[str, list[int]],
        rows: dict[str, list[Tensor]],
    ) -> None:
        left, shares = self.most_tokens, {}
        for name in names[: self.most_seqs]:
            start = len(self.computed[name])
            share = [*self._text(name), *guesses[name]][start : start + left]
            if share:
                shares[name] = share
                left -= len(share)
        order = sorted(shares, key=lambda name: len(shares[name]) != 1)
        with torch.inference_mode():
            logits = self._scores({name: shares[name] for name in order})
        for name, scores in zip(order, logits, strict=True):
            self.computed[name] += shares[name]
            state = self.states[name]
            place = len(self.computed[name])
            if place < len(state.prompt_ids) + len(state.output_ids) + len(guesses[name]):
                continue
            ahead = replace(state, output_ids=[*state.output_ids, *guesses[name]])
            row = probabilities(scores[None], [ahead])[0]
            rows[name].append(row)
            guesses[name].append(_drawn(row, seed_for(state.seed, DRAFTING), place))

    def _scores(self, shares: Mapping[str, list[int]]) -> Tensor:
        """Score the last token of each part."""
        size, slots, positions, lengths = self.blocks.block_size, [], [], []
        tables = [list(self.blocks.block_table(name)) for name in shares]
        for (name, share), table in zip(shares.items(), tables, strict=True):
            start = len(self.computed[name])
            lengths.append(start + len(share))
            for place in range(start, start + len(share)):
                positions.append(place)
                slots.append(table[place // size] * size + place % size)
        counts = [len(share) for share in shares.values()]
        ends = list(itertools.accumulate(counts))
        width = max(map(len, tables))
        batch = PagedBatch(
            torch.tensor(slots),
            torch.tensor([table + [0] * (width - len(table)) for table in tables]),
            torch.tensor([0, *ends]),
            torch.tensor(lengths),
            num_decodes=counts.count(1),
            max_seqlen_q=max(counts),
        )
        ids = torch.tensor([token_id for share in shares.values() for token_id in share])
        attend = self.make_attend(self.cache, batch)
        hidden = self.model(ids, torch.tensor(positions), attend)
        return self.model.logits(hidden[[end - 1 for end in ends]])


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
