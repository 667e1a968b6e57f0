"""Week1/generate another way: an anchor and pending ids, and stop strings as running candidates."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

__all__ = ["next_token_logits", "IncrementalDetokenizer", "StopMatcher", "generate"]


@dataclass(frozen=True)
class Completion:
    """What was generated, without the prompt."""

    token_ids: list[int]
    text: str
    finish_reason: str


def greedy(logits: Tensor, token_ids: Sequence[int]) -> int:
    """Choose the most likely token; the lowest id wins a tie."""
    return int(logits.argmax())


@torch.no_grad()
def next_token_logits(model: nn.Module, token_ids: Sequence[int]) -> Tensor:
    """Score the next token with a batch of one sequence."""
    device = next(model.parameters()).device
    batch = torch.tensor([list(token_ids)], device=device)
    positions = torch.arange(batch.shape[1], device=device)[None]
    last = model(batch, positions, _attend)[:, -1:]
    return model.logits(last).flatten().float()


def _attend(layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    sdpa = nn.functional.scaled_dot_product_attention
    return sdpa(q, k, v, is_causal=True, enable_gqa=True)


class IncrementalDetokenizer:
    """Turn ids into text while they arrive, never showing half a character."""

    def __init__(self, decode: Callable[[list[int]], str]):
        self.decode = decode
        # anchor: ids whose text is out; it starts and ends between two characters.
        self.anchor: list[int] = []
        # pending: the ids after it, of whose text num_out characters are out.
        self.pending: list[int] = []
        self.num_out = 0

    def add(self, token_id: int) -> str:
        """Take one id. Returns the text that became certain with it."""
        self.pending.append(token_id)
        text = self._text_of(len(self.pending))
        num_certain = len(text) - 1 if text.endswith("\ufffd") else len(text)
        new = text[self.num_out : num_certain]
        self.num_out = num_certain
        self._move_anchor(num_certain, len(text))
        return new

    def flush(self) -> str:
        """End the stream. Returns the text not returned yet."""
        rest = self._text_of(len(self.pending))[self.num_out :] if self.pending else ""
        self.anchor, self.pending, self.num_out = [], [], 0
        return rest

    def _text_of(self, count: int) -> str:
        """Decode the first pending ids, behind the anchor so that they keep their first space."""
        in_front = len(self.decode(self.anchor)) if self.anchor else 0
        return self.decode(self.anchor + self.pending[:count])[in_front:]

    def _move_anchor(self, num_certain: int, length: int) -> None:
        complete = len(self.pending)
        text = self._text_of(complete)
        while complete and num_certain < length and len(text) == length:
            complete -= 1
            text = self._text_of(complete)
        if text:
            self.anchor = self.pending[:complete]
        if text or self.anchor:
            self.pending = self.pending[complete:]
            self.num_out -= len(text)


class StopMatcher:
    """Watch a stream of text, character by character, for stop strings."""

    def __init__(self, stops: Collection[str]):
        if "" in stops:
            raise ValueError("one of the stop strings is empty; the shortest has 1 character")
        self.stops = list(stops)
        self.matched: str | None = None
        self.waiting = ""
        # (where it starts in `waiting`, the stop string) for each that fits so far.
        self.candidates: list[tuple[int, str]] = []

    def add(self, text: str) -> str:
        """Take the next piece of text. Returns what is no part of a stop string any more."""
        return "".join(map(self._step, text))

    def flush(self) -> str:
        """End the stream. Returns the text still held back."""
        rest, self.waiting, self.candidates = self.waiting, "", []
        return rest

    def _step(self, character: str) -> str:
        if self.matched is not None:
            return ""
        place = len(self.waiting)
        self.waiting += character
        begun = [*self.candidates, *((place, stop) for stop in self.stops)]
        fitting = [(start, stop) for start, stop in begun if stop[place - start] == character]
        winners = [(start, stop) for start, stop in fitting if start + len(stop) == place + 1]
        if winners:
            first, self.matched = min(winners)
            in_front, self.waiting, self.candidates = self.waiting[:first], "", []
            return in_front
        first = min((start for start, _ in fitting), default=place + 1)
        free, self.waiting = self.waiting[:first], self.waiting[first:]
        self.candidates = [(start - first, stop) for start, stop in fitting]
        return free


def generate(
    next_logits: Callable[[Sequence[int]], Tensor],
    prompt_ids: Sequence[int],
    decode: Callable[[list[int]], str],
    *,
    max_tokens: int,
    max_model_len: int,
    eos_token_ids: Collection[int],
    choose: Callable[[Tensor, Sequence[int]], int] = greedy,
    stop: Collection[str] = (),
    min_tokens: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> Completion:
    """Continue a prompt, one token at a time."""
    if max_tokens <= 0:
        raise ValueError(f"max_tokens is {max_tokens}; it must be 1 or more")
    if not prompt_ids:
        raise ValueError("there is no prompt: 0 tokens")
    room = max_model_len - len(prompt_ids)
    if room <= 0:
        raise ValueError(f"{len(prompt_ids)} prompt tokens fill a context of {max_model_len}")
    matcher, detokenizer = StopMatcher(stop), IncrementalDetokenizer(decode)
    output: list[int] = []
    text = ""
    lengths: list[int] = []  # of the decoded text, after each id
    reason = "length"

    def emit(piece: str) -> None:
        nonlocal text
        text += piece
        if piece and on_text:
            on_text(piece)

    endless = _tokens(next_logits, [*prompt_ids], choose, set(eos_token_ids), min_tokens)
    for token_id in islice(endless, min(max_tokens, room)):
        if token_id is None:
            reason = "stop"
            break
        piece = detokenizer.add(token_id)
        output.append(token_id)
        lengths.append((lengths[-1] if lengths else 0) + len(piece))
        emit(matcher.add(piece))
        if matcher.matched:
            break
    emit(matcher.add(detokenizer.flush()))
    emit(matcher.flush())
    if matcher.matched:
        reason = "stop"
        while output and (lengths[-2] if len(lengths) > 1 else 0) >= len(text):
            output.pop()
            lengths.pop()
    return Completion(output, text, reason)


def _tokens(
    next_logits: Callable[[Sequence[int]], Tensor],
    ids: list[int],
    choose: Callable[[Tensor, Sequence[int]], int],
    eos: set[int],
    min_tokens: int,
) -> Iterator[int | None]:
    """Yield one id after another for ever, None in the place of an end-of-sequence id."""
    step = 0
    while True:
        scores = next_logits(tuple(ids))
        if step < min_tokens:
            allowed = torch.tensor([i not in eos for i in range(len(scores))])
            scores = torch.where(allowed.to(scores.device), scores, -torch.inf)
        token_id = choose(scores, tuple(ids))
        yield None if token_id in eos else token_id
        ids.append(token_id)
        step += 1
