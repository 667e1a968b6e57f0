"""From logits to text: the decoding loop, a detokenizer that streams, and stop strings."""

from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from week1.gqa import causal_attend
from week1.qwen import Qwen

__all__ = ["next_token_logits", "IncrementalDetokenizer", "StopMatcher", "generate"]

_REPLACEMENT = "\ufffd"
# Ids that the detokenizer decodes again with each new one; above it, the window is shortened.
_MAX_WINDOW = 8


@dataclass(frozen=True)
class Completion:
    """What was generated, without the prompt.

    finish_reason: "stop" when an end-of-sequence token or a stop string ended it, "length" when
    max_tokens or max_model_len did.
    """

    token_ids: list[int]
    text: str
    finish_reason: str


def greedy(logits: Tensor, token_ids: Sequence[int]) -> int:
    """Choose the most likely token; the lowest id wins a tie."""
    return int(logits.argmax())


def next_token_logits(model: Qwen, token_ids: Sequence[int]) -> Tensor:
    """Score the next token by running the model over the whole sequence.

    token_ids: the prompt and everything generated so far, at least one id.
    Returns (vocab_size,) float32 on the model's device, without a gradient. Only the last token is
    scored against the vocabulary. Week 2's cache replaces this function: the same arguments, less
    work.
    """
    device = model.embed_tokens.weight.device
    input_ids = torch.tensor(token_ids, dtype=torch.int64, device=device)
    positions = torch.arange(len(token_ids), device=device)
    with torch.inference_mode():
        hidden = model(input_ids, positions, causal_attend)
        return model.logits(hidden[-1])


class IncrementalDetokenizer:
    """Turn ids into text while they arrive, never showing half a character.

    decode: turns a list of ids into text. An id may carry only some bytes of a character, or no
        text at all; bytes that form no character come out as U+FFFD. Decoding a longer list only
        ever appends to the text of a shorter one, where its last U+FFFD may turn into a character.
        One space in front of a list's text may be missing, so that ids decoded apart from those
        before them may lose it.
    All text that `add` and `flush` return, joined, equals decode(all ids). A character is returned
    by the call that brings its last byte, never earlier. However long the stream gets, one `add` or
    `flush` passes decode a bounded number of ids, at most 500, summed over all its calls of decode,
    as long as the ids bring text.
    """

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode = decode
        self._window: list[int] = []
        # Characters of decode(window) that are out; the rest waits for more bytes.
        self._num_shown = 0

    def add(self, token_id: int) -> str:
        """Take one id. Returns the text that became certain with it, often one word, or ""."""
        self._window.append(token_id)
        text = self._decode(self._window)
        # Only the last U+FFFD may still become a character: bytes before it are already followed by
        # some that do not continue them. What is out stays out: the window may begin inside a
        # character, whose other half then reads as U+FFFD.
        certain = max(self._num_shown, len(text) - text.endswith(_REPLACEMENT))
        new = text[self._num_shown : certain]
        self._num_shown = certain
        if len(self._window) > _MAX_WINDOW:
            self._shorten_window(text)
        return new

    def flush(self) -> str:
        """End the stream. Returns the text not returned yet: unfinished bytes as U+FFFD, or ""."""
        text = self._decode(self._window)[self._num_shown :]
        self._num_shown += len(text)
        return text

    def _shorten_window(self, text: str) -> None:
        # Some decoders strip a list's first space. Two ids stay, since one may be just that space,
        # and they must have text: else the strip would hit the next id's space.
        dropped, kept = self._window[:-2], self._window[-2:]
        kept_text = self._decode(kept)
        # Only ids whose text is out may go: the bytes of an unfinished character stay together.
        if kept_text and len(self._decode(dropped)) <= self._num_shown:
            self._num_shown = len(kept_text) - (len(text) - self._num_shown)
            self._window = kept


class StopMatcher:
    """Watch a stream of text for stop strings and hold back what may become one.

    stops: the stop strings; ValueError when one is empty.
    The stop string that is complete first wins; of those complete at the same character, the one
    that starts first. How the text is cut into pieces makes no difference.
    matched: the winner once there is one, else None.
    """

    def __init__(self, stops: Collection[str]):
        if not all(stops):
            raise ValueError("a stop string must have at least 1 character, got ''")
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def add(self, text: str) -> str:
        """Take the next piece of text, of any length.

        Returns what can no longer be part of a stop string and was not returned before. Once a
        stop string is complete, returns the text in front of it, and "" from then on.
        """
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if found:
            start, self.matched = min(found, key=lambda match: (match[0] + len(match[1]), match[0]))
            self._held = ""
            return text[:start]
        cut = len(text) - self._num_held(text)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """End the stream. Returns the text still held back, which was no stop string after all."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        longest = max(map(len, self._stops), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


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
    """Continue a prompt, one token at a time.

    next_logits: maps all ids so far, prompt first, to (vocab_size,) float32 scores of the next one.
        Its result is left as it was.
    prompt_ids: at least one id, left as they were. decode: see `IncrementalDetokenizer`; the bound
        on the ids that it is passed holds for every step here.
    max_tokens: at least 1. max_model_len: prompt and completion together never exceed it.
    eos_token_ids: any of them ends the completion and is not part of it.
    choose: maps (scores, all ids so far) to the next id.
    stop: stop strings, see `StopMatcher`. The text ends in front of the one that matched, and
        token_ids ends with the first id after which the detokenizer had returned all of that text;
        no ids when the text is empty.
    min_tokens: end-of-sequence ids get the score −inf until so many ids have been generated.
    on_text: called with each piece of text as soon as it is certain, never with "" and never with
        a part of a stop string; the pieces joined are the completion's text.
    Raises ValueError, before the first step, for an empty prompt, for an empty stop string, for
    max_tokens below 1, whose value it gives, and for a prompt that leaves no room for one token,
    whose length it gives together with max_model_len.
    """
    _check_request(len(prompt_ids), max_tokens, max_model_len)
    ids = list(prompt_ids)
    num_prompt_tokens = len(ids)
    detokenizer, matcher = IncrementalDetokenizer(decode), StopMatcher(stop)
    pieces: list[str] = []
    num_decoded = [0]  # characters that the detokenizer had returned after 0, 1, … ids

    def show(text: str) -> None:
        if text:
            pieces.append(text)
            if on_text is not None:
                on_text(text)

    finish_reason = "length"
    for step in range(min(max_tokens, max_model_len - num_prompt_tokens)):
        logits = next_logits(ids)
        if step < min_tokens:
            logits = _without(logits, eos_token_ids)
        token_id = choose(logits, ids)
        if token_id in eos_token_ids:
            finish_reason = "stop"
            break
        ids.append(token_id)
        text = detokenizer.add(token_id)
        num_decoded.append(num_decoded[-1] + len(text))
        show(matcher.add(text))
        if matcher.matched is not None:
            break
    show(matcher.add(detokenizer.flush()))
    show(matcher.flush())
    text, output_ids = "".join(pieces), ids[num_prompt_tokens:]
    if matcher.matched is not None:
        return Completion(_ids_for(len(text), output_ids, num_decoded), text, "stop")
    return Completion(output_ids, text, finish_reason)


def _ids_for(num_characters: int, ids: list[int], num_decoded: list[int]) -> list[int]:
    return ids[: bisect_left(num_decoded, num_characters)]


def _check_request(num_prompt_tokens: int, max_tokens: int, max_model_len: int) -> None:
    if num_prompt_tokens == 0:
        raise ValueError("the prompt is empty; it needs at least 1 token")
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    if num_prompt_tokens + 1 > max_model_len:
        raise ValueError(
            f"the prompt has {num_prompt_tokens} tokens, which leaves no room for a new one: "
            f"the model's context is {max_model_len} tokens"
        )


def _without(logits: Tensor, token_ids: Collection[int]) -> Tensor:
    logits = logits.clone()
    logits[list(token_ids)] = -torch.inf
    return logits
