"""From logits to text: the decoding loop, a detokenizer that streams, and stop strings."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from week1.gqa import causal_attend
from week1.qwen import Qwen

__all__ = ["next_token_logits", "IncrementalDetokenizer", "StopMatcher", "generate"]


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
    raise NotImplementedError(
        "week1/generate.py: next_token_logits is not written yet → sessions/week1/generate.md"
    )


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
        raise NotImplementedError(
            "week1/generate.py: IncrementalDetokenizer.__init__ is not written yet "
            "→ sessions/week1/generate.md"
        )

    def add(self, token_id: int) -> str:
        """Take one id. Returns the text that became certain with it, often one word, or ""."""
        raise NotImplementedError(
            "week1/generate.py: IncrementalDetokenizer.add is not written yet "
            "→ sessions/week1/generate.md"
        )

    def flush(self) -> str:
        """End the stream. Returns the text not returned yet: unfinished bytes as U+FFFD, or ""."""
        raise NotImplementedError(
            "week1/generate.py: IncrementalDetokenizer.flush is not written yet "
            "→ sessions/week1/generate.md"
        )


class StopMatcher:
    """Watch a stream of text for stop strings and hold back what may become one.

    stops: the stop strings; ValueError when one is empty.
    The stop string that is complete first wins; of those complete at the same character, the one
    that starts first. How the text is cut into pieces makes no difference.
    matched: the winner once there is one, else None.
    """

    def __init__(self, stops: Collection[str]):
        raise NotImplementedError(
            "week1/generate.py: StopMatcher.__init__ is not written yet "
            "→ sessions/week1/generate.md"
        )

    def add(self, text: str) -> str:
        """Take the next piece of text, of any length.

        Returns what can no longer be part of a stop string and was not returned before. Once a
        stop string is complete, returns the text in front of it, and "" from then on.
        """
        raise NotImplementedError(
            "week1/generate.py: StopMatcher.add is not written yet → sessions/week1/generate.md"
        )

    def flush(self) -> str:
        """End the stream. Returns the text still held back, which was no stop string after all."""
        raise NotImplementedError(
            "week1/generate.py: StopMatcher.flush is not written yet → sessions/week1/generate.md"
        )


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
    raise NotImplementedError(
        "week1/generate.py: generate is not written yet → sessions/week1/generate.md"
    )
