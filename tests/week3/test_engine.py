"""Grades week3/engine: the pool's size, streams of text, the engine's steps, lists of prompts."""

import contextlib
import gc
import io
import itertools
import json
import math
import random
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3Config, Qwen3ForCausalLM

from course.grading import History, check_close, check_equal, check_true, describe, lab

engine_lab = lab("week3/engine")
runner = lab("week3/model_runner")
paged = lab("week3/paged_attention")
qwen = lab("week1/qwen")

UNFINISHED = "\ufffd"


class Vocabulary:
    """A tokenizer in which id i carries the i-th piece of bytes; counts the ids it is asked for.

    special: ids whose text is left out when special tokens are skipped.
    """

    def __init__(self, pieces: Sequence[bytes], special: Sequence[int] = ()):
        self.pieces, self.special = list(pieces), frozenset(special)
        self.num_decoded = 0

    def __call__(self, ids: Sequence[int]) -> str:
        self.num_decoded += len(ids)
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", errors="replace")

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return self([i for i in ids if not (skip_special_tokens and i in self.special)])


@dataclass(frozen=True)
class Answer:
    """What a request is answered, and what of it is certain after 0, 1, … ids.

    shown: (characters of text, number of ids) after so many ids.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: str
    shown: tuple[tuple[int, int], ...]
    matched: str | None = None


def expected_stop(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """Find the winning stop string by trying every end: (text in front of it, the winner)."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            winner = max(complete, key=len)
            return text[: end - len(winner)], winner
    return text, None


def expected_shown(text: str, stops: Sequence[str]) -> str:
    """What may be shown of an unfinished text: all that is no beginning of a stop string."""
    shown, winner = expected_stop(text, stops)
    if winner is None:
        starts = [i for i in range(len(text)) if any(s.startswith(text[i:]) for s in stops)]
        shown = text[: min(starts, default=len(text))]
    return shown


def answer_of(
    decode: Callable[[Sequence[int]], str],
    ids: Sequence[int],
    stops: Sequence[str] = (),
    finish_reason: str = "length",
) -> Answer:
    """Decode all beginnings of the ids, find the stop string that is complete first, and cut.

    finish_reason: where no stop string ends it.
    """
    certain, shown, matched = [""], [(0, 0)], None
    for count in range(1, len(ids) + 1):
        certain.append(decode(ids[:count]).removesuffix(UNFINISHED))
        matched = expected_stop(certain[-1], stops)[1]
        text = expected_shown(certain[-1], stops)
        num_ids = next(k for k in range(count + 1) if len(certain[k]) >= len(text))
        shown.append((len(text), num_ids))
        if matched is not None:
            return Answer(text, tuple(ids[:num_ids]), "stop", tuple(shown), matched)
    # The bytes of an unfinished character come out at the end, and they may complete a stop.
    text, matched = expected_stop(decode(ids), stops)
    if matched is None:
        return Answer(text, tuple(ids), finish_reason, tuple(shown))
    num_ids = next((k for k, one in enumerate(certain) if len(one) >= len(text)), len(ids))
    return Answer(text, tuple(ids[:num_ids]), "stop", tuple(shown), matched)


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    """Cut bytes into pieces at the given places."""
    places = sorted({place % (len(data) + 1) for place in places})
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


def single_bytes(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


class Streamed:
    """A TextStream beside the oracle; id i carries piece i."""

    def __init__(self, pieces: Sequence[bytes], stops: Sequence[str] = ()):
        self.pieces, self.stops = pieces, stops
        ids = list(range(len(pieces)))
        self.answer = answer_of(Vocabulary(pieces), ids, stops)
        self.stream = engine_lab.TextStream(Vocabulary(pieces), stops)
        self.of = History(f"TextStream, stop={list(stops)}; ids carry {short(pieces)}")
        self.text, self.choices = "", []

    def take(self, operation: str, got: tuple[str, list]) -> None:
        text, choices = got
        ids = [choice.token_id for choice in choices]
        self.of.note(operation, (text, ids))
        self.text += text
        self.choices += choices

    def run(self, exactly: bool = True) -> None:
        """Feed all ids, up to a stop string. exactly: hold the stream to what is certain when."""
        for i, piece in enumerate(self.pieces):
            choice = runner.Choice(i, -float(i), ((i, -float(i)),))
            self.take(f"add the choice of {i}, which carries {piece}", self.stream.add(choice))
            if exactly:
                self.check_shown(i + 1)
            if self.stream.matched is not None:
                break
        self.take("flush()", self.stream.flush())
        self.check_end()

    def check_shown(self, count: int) -> None:
        num_characters, num_ids = self.answer.shown[min(count, len(self.answer.shown) - 1)]
        whole = Vocabulary(self.pieces)(range(count))
        check_equal(self.text, whole[:num_characters], "the text that is out", of=self.of)
        ids = [choice.token_id for choice in self.choices]
        check_equal(ids, list(range(num_ids)), "the ids of the choices that are out", of=self.of)
        matched = expected_stop(whole.removesuffix(UNFINISHED), self.stops)[1]
        check_equal(self.stream.matched, matched, "matched", of=self.of)

    def check_end(self) -> None:
        check_equal(self.text, self.answer.text, "all text joined", of=self.of)
        ids = tuple(choice.token_id for choice in self.choices)
        check_equal(ids, self.answer.ids, "the ids of all choices", of=self.of)
        check_equal(self.stream.matched, self.answer.matched, "matched", of=self.of)
        for choice in self.choices:
            i = choice.token_id
            same = choice == runner.Choice(i, -float(i), ((i, -float(i)),))
            check_true(same, f"the choice of {i} comes out as {choice}", of=self.of)


def short(pieces: Sequence[bytes]) -> str:
    few = str(list(pieces))
    return few if len(few) <= 90 else f"{few[:80]} …"


# What ids carry, and stop strings.
STREAMS = {
    "no stop strings": ([b"a", b"bc", b" d"], []),
    "a character over three ids": ([b"a", *single_bytes("日".encode()), b"b"], []),
    "a character and a half in one id": ([b"a\xc3", b"\xa9b\xf0\x9f", b"\x98\x80!"], []),
    "ids without text": ([b"", b"a", b"", b"", b"b", b""], []),
    "only ids without text": ([b"", b"", b""], []),
    "ids without text, with a stop string": ([b"", b"a", b"", b"b", b""], ["zz"]),
    "ids without text inside a stop string": ([b"a", b"<", b"", b"s>", b"b"], ["<s>"]),
    "ids without text in front of a stop string": ([b"", b"a", b"", b"<s>", b"b"], ["<s>"]),
    "ids without text behind a held one": ([b"a<", b"", b"", b"b", b""], ["<s>"]),
    "a stop string over ids": ([b"a", b"b<", b"sto", b"p>c", b"d"], ["<stop>"]),
    "a stop string inside one id": ([b"a", b"b<stop>c", b"d"], ["<stop>"]),
    "a stop string is an id": ([b"a", b"b", b"<stop>", b"d"], ["<stop>"]),
    "in the first id": ([b"<stop>a", b"b"], ["<stop>"]),
    "in the first id, behind text": ([b"a<stop>", b"b"], ["<stop>"]),
    "from the first id on": ([b"<st", b"op", b">b"], ["<stop>"]),
    "at the very end": ([b"a", b"<s", b">"], ["<s>"]),
    "never finished": ([b"a", b"<s", b"to"], ["<stop>"]),
    "never finished, from the first id on": ([b"<", b"s", b"to"], ["<stop>"]),
    "a false start": ([b"a<", b"st", b"<s", b"to", b"p>b"], ["<stop>"]),
    "a false start inside itself": ([b"a", b"a", b"a", b"b", b"c"], ["aab"]),
    "held by two ids, released by a third": ([b"a", b"b", b"c", b"x", b"d"], ["abcd"]),
    "released in the middle of an id": ([b"a", b"bab", b"x", b"abc"], ["abc"]),
    "the rest of a choice that is out": ([b"ab", b"b", b"c"], ["bc"]),
    "one the prefix of another": ([b"xa", b"bc", b"d"], ["abcd", "ab"]),
    "the prefix comes second": ([b"xa", b"bc", b"d"], ["ab", "abcd"]),
    "the later start is complete first": ([b"ab", b"cd", b"ef", b"g"], ["bcdefg", "de"]),
    "complete at the same character": ([b"az", b"bc", b"d"], ["bc", "zbc", "c"]),
    "of characters over ids": ([b"a", *single_bytes("日本!".encode()), b"c"], ["本"]),
    "begins inside an id": ([b"ab", "c日".encode(), b"d", b"e"], ["日d"]),
    "ends inside an id with half a character": ([b"ab", b"<", b"s>\xe6", b"\x97"], ["<s>"]),
    "one character": ([b"ab", b"c\n", b"d"], ["\n"]),
    "a character cut off": ([b"a", b"b", b"\xf0", b"\x9f"], []),
    "a character cut off behind held text": ([b"a", b"<s", b"\xf0", b"\x9f"], ["<s>"]),
    "a character cut off in an id with text": ([b"b", b"a\xc3"], []),
    "a character cut off in the only id": ([b"a\xc3"], []),
    "a character cut off, then no text": ([b"a\xc3", b"", b""], []),
    "a character cut off in an id that is held": ([b"a<", b"s\xc3"], ["<s>"]),
    "a stop string of the bytes cut off": ([b"b", b"a\xc3"], [UNFINISHED]),
    "a stop string that the bytes cut off could begin": ([b"a\xc3"], [f"{UNFINISHED}z"]),
    "a stop string that ends with bytes cut off": ([b"b", b"a<", b"\xc3"], [f"<{UNFINISHED}"]),
}


@pytest.mark.parametrize("case", STREAMS)
def test_stream_by_hand(case):
    Streamed(*STREAMS[case]).run()


@settings(max_examples=120)
@given(
    st.text("ab é日😀", max_size=14),
    st.lists(st.integers(0, 1000), max_size=20),
    st.lists(st.integers(0, 1000), max_size=4),
    st.integers(0, 3),
)
def test_stream_of_text_cut_anywhere(text, places, textless, num_missing):
    data = text.encode()
    pieces = cut(data[: len(data) - num_missing], places)
    for place in textless:
        pieces.insert(place % (len(pieces) + 1), b"")
    Streamed(pieces).run()


@settings(max_examples=200)
@given(
    st.text("abé", max_size=16),
    st.lists(st.text("abé", min_size=1, max_size=5), min_size=1, max_size=3),
    st.lists(st.integers(0, 1000), max_size=20),
    st.lists(st.integers(0, 1000), max_size=4),
    st.integers(0, 1),
)
def test_stream_with_stop_strings_cut_anywhere(text, stops, places, textless, num_missing):
    data = text.encode()
    pieces = cut(data[: len(data) - num_missing], places)
    for place in textless:
        pieces.insert(place % (len(pieces) + 1), b"")
    Streamed(pieces, stops).run()


@settings(max_examples=80)
@given(st.lists(st.lists(st.sampled_from(b"\x80\x9f\xf0\xe2\xc3\xff a"), max_size=3).map(bytes)))
def test_stream_of_invalid_bytes(pieces):
    # When such a byte is certain is a question to the detokenizer.
    Streamed(pieces).run(exactly=False)


@pytest.mark.parametrize("kind", [list, tuple, set, frozenset])
def test_stream_takes_any_collection_of_stop_strings(kind):
    Streamed([b"ab", b"cd", b"e"], kind(["cde", "zz"])).run()


def test_stream_keeps_to_itself():
    pieces = [*single_bytes("né<日".encode()), b"s", b">"]
    one, two = Streamed(pieces, ["<s>"]), Streamed(pieces, ["<s>"])
    for i in range(len(pieces)):
        choice = runner.Choice(i, -float(i), ((i, -float(i)),))
        for streamed in (one, two):
            streamed.take(
                f"add the choice of {i}, in turn with another", streamed.stream.add(choice)
            )
    for streamed in (one, two):
        streamed.take("flush()", streamed.stream.flush())
        streamed.check_end()


@pytest.mark.parametrize("stops", [(), ("<stop>", "words")], ids=["", "with stop strings"])
def test_stream_whose_cost_does_not_grow(stops):
    pieces = [b" word", b"!", *single_bytes("日é".encode())] * 260
    decode = Vocabulary(pieces)
    stream = engine_lab.TextStream(decode, stops)
    text, most = "", 0
    for i in range(len(pieces)):
        before = decode.num_decoded
        text += stream.add(runner.Choice(i))[0]
        most = max(most, decode.num_decoded - before)
    before = decode.num_decoded
    text += stream.flush()[0]
    most = max(most, decode.num_decoded - before)
    of = f"TextStream, {len(pieces)} ids, stop={list(stops)}"
    check_equal(text, decode(range(len(pieces))), "all text joined", of=of)
    check_true(most <= 500, f"one call passed {most:,} ids to decode; allowed: 500", of=of)


# The vocabulary of the engine's tests: what ids carry, which have no text, which end an answer.
PIECES = [
    *(b"<|end|>", b"<|turn|>", b"<|pad|>", b"\xc3", b"\xa9", b"\xf0", b"\x9f", b"\x98", b"\x80"),
    *(b"a", b"b", b" ", b"ab", b"S", b"T", b"OP", b"ST", b"the ", "日".encode(), b"n\xc3"),
    *(b"\xa9!", b".", b"\n"),
]
SPECIAL, ENDS = (0, 1, 2), (0, 1)
VOCAB_SIZE = len(PIECES)
# Ids that go on with a character, by the id in front of them; all others stand behind any other.
WITHIN = {3: (4, 20), 19: (4, 20), 5: (6,), 6: (7,), 7: (8,)}
WORDS = (9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 21, 22)
STOPS = ("STOP", "ab", "a ", "é", "日.", "the b")


def vocabulary() -> Vocabulary:
    return Vocabulary(PIECES, SPECIAL)


def prompt_of(request_id: str, num_tokens: int) -> list[int]:
    return random.Random(f"{request_id} {num_tokens}").choices(WORDS, k=num_tokens)


class SumModel(nn.Module):
    """A model whose scores are looked up by an exact sum over every token and its position.

    Its queries are zeros, so that attention gives the mean of the values that a token sees; these
    are whole numbers, so that the mean times their number is one again, however it was added up.
    It never chooses bytes that are no text. It notes how many tokens each call has, and raises in a
    layer when it is told to.
    """

    NUM_SCORES = 4093

    def __init__(self, context: int = 64):
        super().__init__()
        self.config = SimpleNamespace(
            vocab_size=VOCAB_SIZE,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=3,
            max_position_embeddings=context,
        )
        self.embed_tokens = nn.Embedding(VOCAB_SIZE, 2)
        generator = torch.Generator().manual_seed(1)
        self.scores = 3 * torch.randn(self.NUM_SCORES, VOCAB_SIZE, generator=generator)
        inside = sorted({token_id for after in WITHIN.values() for token_id in after})
        self.follows = torch.zeros(VOCAB_SIZE, VOCAB_SIZE)
        self.follows[:, inside] = -50.0
        for token_id, after in WITHIN.items():
            self.follows[token_id] = -50.0
            self.follows[token_id, list(after)] = 0.0
        self.num_tokens: list[int] = []
        self.fails_in_layer = -1

    def values(self, layer: int, ids: Tensor, positions: Tensor) -> Tensor:
        """Hash ids and positions into small whole numbers: (tokens, 3)."""
        place = torch.tensor([3, 8, 11]) + 17 * layer
        mixed = (ids[:, None] + 5) * (positions[:, None] + place) * 31 + ids[:, None] * place
        return mixed % 29

    def forward(self, input_ids: Tensor, positions: Tensor, attend) -> Tensor:
        self.num_tokens.append(len(input_ids))
        sums = [input_ids[:, None].float()]
        for layer in range(2):
            if layer == self.fails_in_layer:
                raise RuntimeError("the model was told to fail")
            v = self.values(layer, input_ids, positions).float()[None]
            means = attend(layer, torch.zeros(2, len(input_ids), 3), torch.ones_like(v), v)
            sums.append((means[1] * (positions + 1)[:, None]).round())
        return torch.cat(sums, dim=-1)

    def logits(self, hidden: Tensor) -> Tensor:
        numbers = hidden.long()
        factors = torch.tensor([7, 1, 37, 211, 5, 401, 97])
        return (
            self.scores[(numbers * factors).sum(-1) % self.NUM_SCORES]
            + self.follows[numbers[..., 0]]
        )

    def expected(self, ids: Sequence[int]) -> Tensor:
        """Score what follows a whole sequence."""
        ids = torch.tensor(list(ids))
        positions = torch.arange(len(ids))
        sums = [self.values(layer, ids, positions).sum(0) for layer in range(2)]
        return self.logits(torch.cat([ids[-1:], *sums]))


MODEL = SumModel()


def adjusted(scores: Tensor, chosen: Sequence[int], params, ending: frozenset[int]) -> Tensor:
    """The scores as their request wants them, in the plainest words."""
    scores = scores.clone()
    for token_id, bias in params.logit_bias.items():
        scores[token_id] += bias
    for token_id in set(chosen):
        scores[token_id] -= params.presence_penalty
        scores[token_id] -= params.frequency_penalty * list(chosen).count(token_id)
    if len(chosen) < params.min_tokens:
        scores[list(ending)] = -math.inf
    return scores


def alone(prompt: Sequence[int], params, max_model_len: int, ends: Sequence[int] = ENDS) -> Answer:
    """What a greedy request is answered, from a model that sees all of its tokens every time."""
    ending = frozenset(() if params.ignore_eos else ends) | frozenset(params.stop_token_ids)
    decode = vocabulary()
    ids, chosen, reason = list(prompt), [], "length"
    while len(chosen) < params.max_tokens and len(ids) < max_model_len:
        scores = adjusted(MODEL.expected(ids), chosen, params, ending)
        token_id = int(scores.argmax())
        if token_id in ending:
            reason = "stop"
            break
        ids.append(token_id)
        chosen.append(token_id)
    return answer_of(lambda some: decode.decode(some, True), chosen, params.stop, reason)


class Wanted:
    """What is known of a request that has not ended: what it gets alone, and what it has got."""

    def __init__(self, request_id: str, prompt: list[int], answer: Answer):
        self.request_id, self.prompt, self.answer = request_id, prompt, answer
        self.text, self.ids, self.choices = "", (), ()
        self.num_cached: int | None = None


class Guesser:
    """A speculator that knows what comes, and compares what the engine asks it.

    right: how many of its guesses are right, before one that is wrong.
    """

    def __init__(self, num_guesses: int = 3, right: Callable[[], int] = lambda: 3):
        self.num_guesses, self.right = num_guesses, right
        self.states: dict[str, Any] = {}
        self.guesses: dict[str, tuple[int, ...]] = {}
        self.grown: set[str] = set()  # who got tokens in the step before
        self.growing: set[str] = set()
        self.fails = False
        self.num_proposals = 0
        self.counts = [0, 0, 0]  # parts with guesses, guesses, guesses that were accepted
        self.of: object = "Engine with a speculator"

    def begin_step(self) -> None:
        self.grown, self.growing, self.num_proposals, self.guesses = self.growing, set(), 0, {}

    def add(self, request_id: str, state) -> None:
        text = f"add({request_id!r}) comes to the speculator, which has that request already"
        check_true(request_id not in self.states, text, of=self.of)
        self.states[request_id] = state

    def remove(self, request_id: str) -> None:
        self.states.pop(request_id, None)

    def propose(self, request_ids: Sequence[str]) -> dict[str, tuple[int, ...]]:
        self.num_proposals += 1
        check_equal(self.num_proposals, 1, "how often propose is called in a step", of=self.of)
        expected = sorted(self.grown & self.states.keys())
        check_equal(sorted(request_ids), expected, "for whom propose is asked", of=self.of)
        check_true(bool(expected), "propose is asked for nobody", of=self.of)
        if self.fails:
            raise RuntimeError("told to fail")
        self.guesses = {name: self.continue_text(self.states[name]) for name in request_ids}
        return self.guesses

    def continue_text(self, state) -> tuple[int, ...]:
        chosen, right = list(state.output_ids), self.right()
        for i in range(self.num_guesses):
            scores = MODEL.expected([*state.prompt_ids, *chosen])
            token_id = int(adjusted(scores, chosen, state.params, state.eos_token_ids).argmax())
            chosen.append(token_id if i < right else (token_id + 1) % VOCAB_SIZE)
        return tuple(chosen[len(state.output_ids) :])

    def choose(self, logits: Tensor, parts: Sequence, states: Sequence) -> list[list]:
        """Take the tokens that each request would get, up to the first that was not guessed."""
        rows, every = iter(logits), []
        for part, state in zip(parts, states, strict=True):
            name = part.request_id
            self.growing.add(name)
            same = state is self.states.get(name)
            check_true(same, f"the speculator was not told this state of {name!r}", of=self.of)
            guesses = part.token_ids[len(part.token_ids) - part.num_drafts :]
            known = self.guesses.get(name, ())[: part.num_drafts]
            check_equal(guesses, known, f"the guesses for {name!r} that are judged", of=self.of)
            of_part = [next(rows) for _ in range(len(guesses) + 1)]
            choices, ahead = [], list(state.output_ids)
            for row, guess in zip(of_part, (*guesses, None), strict=True):
                choices += runner.sample(row[None], [replace(state, output_ids=list(ahead))])
                ahead.append(guess)
                if choices[-1].token_id != guess:
                    break
            every.append(choices)
            more = bool(guesses), len(guesses), len(choices) - 1
            self.counts = [a + b for a, b in zip(self.counts, more, strict=True)]
        return every


class Served:
    """An engine beside what each request gets alone; every delta is compared."""

    def __init__(
        self, num_blocks: int = 64, max_model_len: int = 40, ends: Sequence[int] = ENDS, **options
    ):
        self.model = SumModel()
        self.ends = ends
        names = ("max_num_seqs", "token_budget", "block_size", "watermark", "prefix_caching")
        limits = {name: options.pop(name) for name in names if name in options}
        limits = {"block_size": 4, "watermark": 0, "max_num_seqs": 8, "token_budget": 32, **limits}
        self.limits = engine_lab.EngineLimits(num_blocks, max_model_len, **limits)
        arguments = self.model, vocabulary(), ends, self.limits
        self.guesser = options.get("speculator")
        self.engine = engine_lab.Engine(*arguments, **options)
        sizes = f"num_blocks={num_blocks}, max_model_len={max_model_len}"
        sizes += "".join(f", {name}={value}" for name, value in limits.items())
        self.of = History(f"Engine, {sizes}{', with guesses' if self.guesser else ''}")
        if self.guesser:
            self.guesser.of = self.of
        self.wanted: dict[str, Wanted] = {}
        self.ended: dict[str, Wanted] = {}
        self.aborted: set[str] = set()

    def add(self, request_id: str, prompt: int | Sequence[int], max_tokens: int = 6, **params):
        """Let a request come. prompt: its ids, or how many."""
        ids = prompt_of(request_id, prompt) if isinstance(prompt, int) else list(prompt)
        wanted = engine_lab.GenerationParams(
            **{"temperature": 0.0, "max_tokens": max_tokens, **params}
        )
        answer = alone(ids, wanted, self.limits.max_model_len, self.ends)
        self.engine.add(request_id, ids, wanted)
        more = "".join(f", {name}={value}" for name, value in params.items())
        text = f"add {request_id!r}: a prompt of {len(ids)}, max_tokens={max_tokens}{more}"
        self.of.note(text, None)
        self.wanted[request_id] = Wanted(request_id, ids, answer)
        self.aborted.discard(request_id)
        self.ended.pop(request_id, None)
        self.check_unfinished()

    def abort(self, request_id: str) -> None:
        self.engine.abort(request_id)
        self.of.note(f"abort {request_id!r}", None)
        if self.wanted.pop(request_id, None) is not None:
            self.aborted.add(request_id)
        self.check_unfinished()

    def step(self) -> list:
        if self.guesser:
            self.guesser.begin_step()
        deltas = self.engine.step()
        told = {d.request_id: (d.text, ids_of(d), d.finish_reason) for d in deltas}
        self.of.note("step()", told)
        ids = [delta.request_id for delta in deltas]
        check_true(len(set(ids)) == len(ids), f"two deltas of a request: {ids}", of=self.of)
        for delta in deltas:
            self.take(delta)
        self.check_unfinished()
        return deltas

    def take(self, delta) -> None:
        """Hold a delta to what its request gets alone."""
        name = delta.request_id
        for those, what in ((self.aborted, "was aborted"), (self.ended, "has ended")):
            check_true(name not in those, f"a delta for {name!r}, which {what}", of=self.of)
        check_true(name in self.wanted, f"a delta for {name!r}, which nobody added", of=self.of)
        said = delta.text or delta.choices or delta.finish_reason
        check_true(bool(said), f"a delta for {name!r} that says nothing", of=self.of)
        wanted = self.wanted[name]
        wanted.text, wanted.ids = wanted.text + delta.text, wanted.ids + ids_of(delta)
        wanted.choices += delta.choices
        answer = wanted.answer
        text = f"the text of {name!r} so far is {wanted.text!r}; alone it gets {answer.text!r}"
        check_true(answer.text.startswith(wanted.text), text, of=self.of)
        right = wanted.ids == answer.ids[: len(wanted.ids)]
        text = f"the ids of {name!r} so far are {wanted.ids}; alone it gets {answer.ids}"
        check_true(right, text, of=self.of)
        self.check_num_cached(wanted, delta.num_cached_tokens)
        if delta.finish_reason is not None:
            self.check_end(wanted, delta.finish_reason)
        else:
            pair = len(wanted.text), len(wanted.ids)
            text = f"{pair[0]} characters and {pair[1]} choices of {name!r} are out together"
            check_true(pair in answer.shown, text, of=self.of)

    def check_end(self, wanted: Wanted, finish_reason: str) -> None:
        name, answer = wanted.request_id, wanted.answer
        check_equal(wanted.text, answer.text, f"all text of {name!r}", of=self.of)
        check_equal(wanted.ids, answer.ids, f"all ids of {name!r}", of=self.of)
        what = f"finish_reason of {name!r}"
        check_equal(finish_reason, answer.finish_reason, what, of=self.of)
        self.ended[name] = self.wanted.pop(name)

    def check_num_cached(self, wanted: Wanted, num_cached: int) -> None:
        known = wanted.num_cached if wanted.num_cached is not None else num_cached
        what = f"num_cached_tokens of {wanted.request_id!r}, as in its delta before"
        check_equal(num_cached, known, what, of=self.of)
        wanted.num_cached = num_cached

    def check_unfinished(self) -> None:
        if self.guesser:
            engine, of = self.engine, self.of
            known = sorted(self.guesser.states)
            check_equal(known, sorted(self.wanted), "whom the speculator knows", of=of)
            counts = [engine.num_drafts, engine.num_draft_tokens, engine.num_accepted_tokens]
            what = "num_drafts, num_draft_tokens, num_accepted_tokens"
            check_equal(counts, self.guesser.counts, what, of=of)
        expected = len(self.wanted)
        check_equal(self.engine.num_unfinished, expected, "num_unfinished", of=self.of)
        if expected == 0:
            free, num_blocks = self.engine.blocks.num_free_blocks, self.limits.num_blocks
            text = f"nobody waits or runs, and {free} of {num_blocks} blocks are free"
            check_true(free == num_blocks, text, of=self.of)

    def drain(self) -> None:
        """Step until nobody is left; then there is nothing to do, twice."""
        for _ in range(600):
            if not self.wanted:
                break
            self.step()
        left = sorted(self.wanted)
        check_true(not left, f"after 600 steps {left} have not ended", of=self.of)
        for _ in range(2):
            num_calls = len(self.model.num_tokens)
            check_equal(self.step(), [], "what a step without requests returns", of=self.of)
            check_equal(len(self.model.num_tokens), num_calls, "calls of the model", of=self.of)

    def fail(self, layer: int | None, expected: Sequence[str] | None = None) -> None:
        """Do a step in which the model raises in a layer; with None, it is the speculator.

        expected: whose step it is.
        """
        if self.guesser:
            self.guesser.begin_step()
            self.guesser.fails = layer is None
        self.model.fails_in_layer = -1 if layer is None else layer
        who = "the speculator" if layer is None else "the model"
        try:
            deltas = self.engine.step()
        except engine_lab.StepFailed as error:
            failed, cause = error.request_ids, error.__cause__
        else:
            text = f"{who} raised, and step returned {describe(deltas)}"
            check_true(False, text, of=self.of)
        self.model.fails_in_layer = -1
        if self.guesser:
            self.guesser.fails = False
        self.of.note(f"step(), in which {who} raises", f"StepFailed({sorted(failed)})")
        is_told = isinstance(cause, RuntimeError) and "told to fail" in str(cause)
        check_true(is_told, f"StepFailed comes from {cause!r}", of=self.of)
        if expected is not None:
            check_equal(sorted(failed), sorted(expected), "request_ids", of=self.of)
        known = set(failed) <= self.wanted.keys() and failed
        check_true(known, f"request_ids of StepFailed: {failed}", of=self.of)
        for name in failed:
            self.ended[name] = self.wanted.pop(name)
        self.check_unfinished()


def ids_of(delta) -> tuple[int, ...]:
    return tuple(choice.token_id for choice in delta.choices)


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 8, 17])
@pytest.mark.parametrize("max_tokens", [1, 2, 15])
def test_engine_with_one_request(max_tokens, num_tokens):
    served = Served()
    served.add("a", num_tokens, max_tokens, ignore_eos=True)
    served.drain()


@pytest.mark.parametrize("stops", [(), STOPS], ids=["", "with stop strings"])
@pytest.mark.parametrize("name", ["a", "b", "c", "d", "e", "f"])
def test_engine_shows_what_is_certain_at_once(name, stops):
    served = Served(max_model_len=60)
    served.add(name, 5, 40, ignore_eos=True, stop=stops)
    answer = served.wanted[name].answer
    wanted = served.wanted[name]
    for num_characters, num_ids in answer.shown[1:]:
        served.step()
        if name in served.ended:
            break
        check_equal(wanted.text, answer.text[:num_characters], "text that is out", of=served.of)
        check_equal(len(wanted.ids), num_ids, "how many choices are out", of=served.of)
    served.drain()


@pytest.mark.parametrize("token_budget", [1, 3, 4, 5, 8, 64])
def test_engine_gives_each_what_it_gets_alone(token_budget):
    served = Served(token_budget=token_budget, max_num_seqs=min(token_budget, 4))
    for i, num_tokens in enumerate((6, 1, 17, 3, 9, 4, 2)):
        served.add(f"r{9 - i}", num_tokens, 3 + (5 * i) % 11, stop=STOPS[: i % 3])
    served.drain()


@pytest.mark.parametrize("num_blocks", [10, 12, 15])
@pytest.mark.parametrize("prefix_caching", [True, False], ids=["prefixes", "no prefixes"])
def test_engine_gives_the_preempted_what_they_get_alone(prefix_caching, num_blocks):
    served = Served(num_blocks, token_budget=16, prefix_caching=prefix_caching)
    penalties = {"presence_penalty": 0.5, "frequency_penalty": 0.7}
    for i, name in enumerate("abcde"):
        served.add(name, 5 + i, 24, ignore_eos=True, **(penalties if i % 2 else {}))
    served.drain()
    num_preemptions = served.engine.scheduler.num_preemptions
    check_true(num_preemptions > 0, "nobody has lost blocks in this pool", of=served.of)
    for wanted in served.ended.values():
        what = f"num_cached_tokens of {wanted.request_id!r}, which shares nothing"
        check_equal(wanted.num_cached, 0, what, of=served.of)


def test_engine_keeps_held_text_through_a_preemption():
    served = Served(10, token_budget=16)
    for i, name in enumerate("abcdefgh"):
        served.add(name, 5 + i % 3, 24, ignore_eos=True, stop=("a long stop string", "STOP", "é."))
    served.drain()
    check_true(served.engine.scheduler.num_preemptions > 0, "nobody has lost blocks", of=served.of)


def test_engine_keeps_seeds_through_a_preemption():
    params = [
        {"temperature": 1.0 + i / 4, "seed": 11 + i, "ignore_eos": True, "max_tokens": 24}
        for i in range(5)
    ]
    params = [engine_lab.GenerationParams(**one) for one in params]
    texts = []
    for num_blocks in (64, 10):
        limits = engine_lab.EngineLimits(num_blocks, 40, block_size=4, watermark=0, token_budget=64)
        engine = engine_lab.Engine(SumModel(), vocabulary(), ENDS, limits)
        for i, one in enumerate(params):
            engine.add(f"r{i}", prompt_of(f"r{i}", 5), one)
            if num_blocks == 64:
                texts.append(run(engine)[f"r{i}"])
    of = "Engine with a pool of 10 blocks, five requests with a seed and a temperature each"
    got = run(engine)
    for i in range(5):
        what = f"the ids of r{i}, beside the others and alone"
        check_equal(got[f"r{i}"], texts[i], what, of=of)
    check_true(engine.scheduler.num_preemptions > 0, "nobody has lost blocks in this pool", of=of)


def run(engine) -> dict[str, list[int]]:
    """Step until nobody is left; returns request_id → its ids."""
    ids: dict[str, list[int]] = {}
    for _ in range(600):
        if not engine.num_unfinished:
            break
        for delta in engine.step():
            ids.setdefault(delta.request_id, []).extend(ids_of(delta))
    return ids


@pytest.mark.parametrize("num_tokens", [4, 7, 8, 9, 12])
def test_engine_finds_what_was_computed_before(num_tokens):
    served = Served()
    prompt = prompt_of("shared", num_tokens)
    # At least one token is computed.
    cases = {
        "first": ([], 0),
        "same": ([], (num_tokens - 1) // 4),
        "more": ([9] * 4, num_tokens // 4),
    }
    for name, (more, num_found) in cases.items():
        served.add(name, [*prompt, *more], 1, ignore_eos=True)
        served.drain()
        what = f"num_cached_tokens of {name!r}"
        check_equal(served.ended[name].num_cached, 4 * num_found, what, of=served.of)
        what = f"how many tokens were computed for {name!r}"
        expected = num_tokens + len(more) - 4 * num_found
        check_equal(served.model.num_tokens[-1], expected, what, of=served.of)


def test_engine_finds_nothing_where_it_is_switched_off():
    served = Served(prefix_caching=False)
    for name in "ab":
        served.add(name, prompt_of("shared", 12))
        served.drain()
        check_equal(served.ended[name].num_cached, 0, "num_cached_tokens", of=served.of)


def test_engine_shares_nothing_between_salts():
    served = Served()
    for name, salt, expected in (("a", "", 0), ("b", "x", 0), ("c", "x", 8), ("d", "y", 0)):
        served.add(name, prompt_of("shared", 12), 1, ignore_eos=True, cache_salt=salt)
        served.drain()
        what = f"num_cached_tokens of {name!r}"
        check_equal(served.ended[name].num_cached, expected, what, of=served.of)


@pytest.mark.parametrize("ends", [(0,), (1,), [0, 1], {1, 2}, frozenset(range(0, 23, 3))], ids=str)
def test_engine_ends_at_every_end_of_sequence(ends):
    served = Served(ends=ends)
    for i in range(8):
        served.add(f"r{i}", 2 + i, 25)
    served.drain()
    reasons = {wanted.answer.finish_reason for wanted in served.ended.values()}
    check_true("stop" in reasons, "no answer reached an end of sequence", of=served.of)


def test_engine_goes_on_behind_an_end_of_sequence_when_told():
    served = Served()
    for i in range(8):
        served.add(f"r{i}", 2 + i, 25, ignore_eos=bool(i % 2))
    served.drain()


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_engine_ends_at_stop_token_ids(ignore_eos):
    served = Served()
    for i in range(6):
        served.add(f"r{i}", 2 + i, 25, ignore_eos=ignore_eos, stop_token_ids=(9, 10, 17, 21))
    served.drain()


@pytest.mark.parametrize("min_tokens", [1, 4, 12])
@pytest.mark.parametrize(
    "params",
    [{}, {"stop_token_ids": (9, 10, 17)}, {"stop_token_ids": (9, 10, 17), "ignore_eos": True}],
    ids=["eos", "eos and stop ids", "stop ids alone"],
)
def test_engine_chooses_nothing_that_ends_before_min_tokens(params, min_tokens):
    served = Served()
    for i in range(6):
        served.add(f"r{i}", 2 + i, 20, min_tokens=min_tokens, **params)
    served.drain()


def test_engine_ends_at_stop_strings():
    served = Served(max_model_len=60)
    for i in range(16):
        stops = STOPS[i % 4 : i % 4 + 3]
        served.add(f"r{i}", 1 + i % 5, 40, ignore_eos=i % 3 > 0, stop=stops)
    served.drain()
    cut = [w for w in served.ended.values() if w.answer.matched is not None]
    check_true(len(cut) > 3, "hardly a stop string was met", of=served.of)


def test_engine_ends_at_a_stop_string_in_the_first_token():
    prompt = prompt_of("a", 3)
    for token_id in (9, 12, 17):
        served = Served()
        piece = PIECES[token_id].decode()
        for i, stop in enumerate((piece, piece[0], f"{piece}x")):
            served.add(f"r{i}", prompt, 3, logit_bias={token_id: 100.0}, stop=(stop,))
        served.drain()


def test_engine_ends_at_a_stop_string_in_the_last_token():
    served = Served()
    for max_tokens in (1, 2, 3):
        stop = ("the " * max_tokens,)
        name = f"r{max_tokens}"
        served.add(name, 3, max_tokens, logit_bias={17: 100.0}, stop=stop)
    served.drain()


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4])
def test_engine_shows_a_character_that_was_cut_off(max_tokens):
    served = Served()
    for i, token_id in enumerate((3, 5, 19)):
        bias = {token_id: 40.0}
        for stop in ("x\ufffd", "n\ufffd", "\ufffd"):
            name = f"r{i}, {stop!r}"
            served.add(name, 3, max_tokens, logit_bias=bias, ignore_eos=True, stop=(stop,))
    served.drain()


@pytest.mark.parametrize("num_tokens", [1, 20, 35, 39])
def test_engine_ends_at_max_model_len(num_tokens):
    served = Served(10)
    served.add("a", num_tokens, 1000, ignore_eos=True)
    served.add("b", 3, 5)
    served.drain()


@pytest.mark.parametrize("num_logprobs", [0, 1, 3])
def test_engine_tells_logprobs(num_logprobs):
    served = Served()
    served.add("a", 4, 6, ignore_eos=True, logprobs=num_logprobs)
    served.add("b", 5, 6, ignore_eos=True, presence_penalty=0.5)
    served.drain()
    ids = list(served.ended["a"].prompt)
    for choice in served.ended["a"].choices:
        expected = MODEL.expected(ids).log_softmax(-1)
        told = choice.logprob is not None and len(choice.top)
        what = "how many top tokens a choice tells with its logprob (False for none)"
        check_equal(told, num_logprobs, what, of=served.of)
        what = f"the logprob of a choice behind {len(ids)} tokens; {served.of}"
        got = torch.tensor([choice.logprob, *(logprob for _, logprob in choice.top)])
        best = expected.topk(num_logprobs).values
        check_close(got, torch.cat([expected[choice.token_id, None], best]), of=what)
        ids.append(choice.token_id)
    told = [choice for choice in served.ended["b"].choices if choice.logprob is not None]
    check_equal(told, [], "choices of 'b' with a logprob, which wants none", of=served.of)


def test_engine_draws_by_seed_and_temperature():
    def answer(**params) -> list[int]:
        limits = engine_lab.EngineLimits(64, 40, block_size=4)
        engine = engine_lab.Engine(SumModel(), vocabulary(), ENDS, limits)
        wanted = engine_lab.GenerationParams(max_tokens=20, ignore_eos=True, **params)
        engine.add("a", prompt_of("a", 4), wanted)
        return run(engine)["a"]

    of = "Engine with one request of 20 tokens"
    greedy = answer(temperature=0.0)
    check_equal(answer(temperature=1.5, seed=3), answer(temperature=1.5, seed=3), "seed 3", of=of)
    others = [answer(temperature=1.5, seed=seed) for seed in (3, 4)]
    text = "seeds 3 and 4 and temperature 0 give the same ids"
    check_true(others[0] != others[1] and greedy not in others, text, of=of)
    check_equal(answer(temperature=1.5, top_k=1, seed=3), greedy, "ids with top_k=1", of=of)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 6])
@pytest.mark.parametrize("victim", ["a", "b", "c", "d"])
def test_abort_at_any_time(victim, num_steps):
    # b is in the middle of its prompt for some steps, and d waits.
    served = Served(max_num_seqs=3, token_budget=6)
    for name, num_tokens in (("a", 3), ("b", 17), ("c", 2), ("d", 5)):
        served.add(name, num_tokens, 12, ignore_eos=True)
    for _ in range(num_steps):
        served.step()
    served.abort(victim)
    served.abort(victim)
    served.abort("nobody")
    served.step()
    served.add(victim, 4, 3)
    served.drain()
    served.abort(victim)
    served.drain()


@pytest.mark.parametrize("victim", ["a", "d", "e"])
def test_abort_of_who_gave_way(victim):
    served = Served(10, token_budget=16)
    for i, name in enumerate("abcde"):
        served.add(name, 5 + i, 24, ignore_eos=True)
    while served.engine.scheduler.num_preemptions == 0 and served.wanted:
        served.step()
    served.abort(victim)
    served.drain()


def test_abort_of_everybody():
    served = Served()
    for name in "abc":
        served.add(name, 5, 12, ignore_eos=True)
    served.step()
    for name in "abc":
        served.abort(name)
    for name in "abc":
        served.add(name, 4, 3)
    served.drain()


def test_abort_of_who_is_held_back():
    served = Served()
    served.add("a", 5, 12, logit_bias={17: 100.0}, stop=("the the the the x",))
    served.add("b", 5, 12)
    for _ in range(3):
        served.step()
    served.abort("a")
    served.drain()


def check_refused(function: Callable, *args, mentions: Sequence, of: object) -> None:
    """Hold a call to a ValueError that names something, with the steps before in the message."""
    try:
        got = function(*args)
    except ValueError as error:
        missing = [str(word) for word in mentions if str(word) not in str(error)]
        check_true(not missing, f"ValueError({error}) does not name {missing}", of=of)
    else:
        check_true(False, f"returned {describe(got)}, expected ValueError", of=of)


# A prompt, params, and what the message names. The engine has max_model_len 40.
BAD = {
    "no tokens": ([], {}, []),
    "as long as the context": ([9] * 40, {}, [40]),
    "longer than the context": ([9] * 77, {}, [77, 40]),
    "a negative id": ([9, -1, 9], {}, [-1, VOCAB_SIZE]),
    "an id too large": ([9, 9, VOCAB_SIZE], {}, [VOCAB_SIZE]),
    "an id much too large": ([10**12, 9], {}, [10**12, VOCAB_SIZE]),
    "an id that is no int": ([9, 2.5], {}, [2.5, VOCAB_SIZE]),
    "text among the ids": ([9, "a"], {}, ["a", VOCAB_SIZE]),
    "a bias outside": ([9], {"logit_bias": {9: 1.0, 99: 1.0}}, [99, VOCAB_SIZE]),
    "a bias of a negative id": ([9], {"logit_bias": {-1: 1.0}}, [-1, VOCAB_SIZE]),
    "a stop id outside": ([9], {"stop_token_ids": (0, 23)}, [23, VOCAB_SIZE]),
    "a negative stop id": ([9], {"stop_token_ids": (-7,)}, [-7, VOCAB_SIZE]),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("word", ["check", "add"])
def test_engine_refuses_a_bad_request_alone(word, case):
    prompt, params, mentions = BAD[case]
    served = Served()
    served.add("a", 5, 8)
    served.step()
    wanted = engine_lab.GenerationParams(**params)
    of = f"{served.of}\n{word}: prompt {str(prompt)[:60]}, {params}"
    if word == "check":
        check_refused(served.engine.check, prompt, wanted, mentions=mentions, of=of)
    else:
        check_refused(served.engine.add, "b", prompt, wanted, mentions=mentions, of=of)
    served.check_unfinished()
    served.step()
    served.add("b", 5, 3)
    served.drain()


def test_check_takes_what_add_takes_and_changes_nothing():
    served = Served()
    served.add("a", 5, 8)
    params = engine_lab.GenerationParams(logit_bias={22: 1.0}, stop_token_ids=(0, 22))
    for prompt in ([0], [22] * 39, (9, 10)):
        served.engine.check(prompt, params)
        served.check_unfinished()
    served.drain()


@pytest.mark.parametrize("when", ["waiting", "running"])
def test_add_refuses_an_id_that_is_taken(when):
    served = Served(max_num_seqs=1)
    if when == "waiting":
        served.add("other", 3, 5)
    served.add("twin", 4, 9, ignore_eos=True, stop=("STOP",))
    served.step()
    served.step()
    # Nothing that the first one says would be the same with these.
    wanted = engine_lab.GenerationParams(stop=tuple("abSTOPhen .\n日é😀"), logit_bias={9: 100.0})
    of = f"{served.of}\nadd 'twin' once more"
    check_refused(served.engine.add, "twin", [9, 10], wanted, mentions=["twin"], of=of)
    served.check_unfinished()
    served.drain()
    served.add("twin", 2, 3)
    served.drain()


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
def test_a_failed_step_ends_its_requests_alone(num_steps, layer):
    served = Served(max_num_seqs=2)
    for name, num_tokens in (("a", 9), ("b", 12), ("c", 6), ("d", 5)):
        served.add(name, num_tokens, 12, ignore_eos=True)
    for _ in range(num_steps):
        served.step()
    served.fail(layer, ["a", "b"])
    served.drain()
    served.add("a", 9, 3)
    served.drain()


@pytest.mark.parametrize("layer", [0, 1])
def test_a_failed_step_is_found_by_nobody(layer):
    served = Served()
    prompts = {name: prompt_of(name, 11) for name in "ab"}
    for name, prompt in prompts.items():
        served.add(name, prompt, 12, ignore_eos=True)
    served.fail(layer, ["a", "b"])
    num_cached = served.engine.blocks.num_cached_blocks
    check_equal(num_cached, 0, "num_cached_blocks after the first step failed", of=served.of)
    for name, prompt in prompts.items():
        served.add(name, prompt, 12, ignore_eos=True)
        served.add(f"{name} again", prompt, 3, ignore_eos=True)
    served.drain()
    for name in prompts:
        what = f"num_cached_tokens of {name!r}"
        check_equal(served.ended[name].num_cached, 0, what, of=served.of)


def test_a_failed_decode_is_found_by_nobody():
    served = Served()
    prompt = prompt_of("a", 7)
    served.add("a", prompt, 12, ignore_eos=True)
    served.step()
    # The failing step would have filled the second block.
    answer = served.wanted["a"].answer
    num_cached = served.engine.blocks.num_cached_blocks
    served.fail(1, ["a"])
    after = served.engine.blocks.num_cached_blocks
    check_equal(after, num_cached, "num_cached_blocks after the step failed", of=served.of)
    served.add("b", [*prompt, *answer.ids[:4]], 8, ignore_eos=True)
    served.drain()
    check_equal(served.ended["b"].num_cached, 4, "num_cached_tokens of 'b'", of=served.of)


def test_a_failed_step_after_another():
    served = Served(max_num_seqs=1)
    for name in "abc":
        served.add(name, 5, 6, ignore_eos=True)
    served.fail(0, ["a"])
    served.fail(1, ["b"])
    served.drain()


RIGHT = {"all are right": 3, "two are right": 2, "none is right": 0}


@pytest.mark.parametrize("right", RIGHT)
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 9, 14])
def test_engine_with_guesses(max_tokens, right):
    served = Served(speculator=Guesser(right=lambda: RIGHT[right]))
    served.add("a", 7, max_tokens)
    served.add("b", 3, max_tokens, ignore_eos=True)
    served.drain()


def test_engine_takes_all_tokens_of_a_step():
    served = Served(speculator=Guesser())
    served.add("a", 5, 9, ignore_eos=True)
    num_steps = 0
    while served.wanted:
        served.step()
        num_steps += 1
    # One token, and then three guesses and one more at a time.
    check_equal(num_steps, 3, "how many steps 9 tokens took", of=served.of)


def test_engine_ends_within_accepted_guesses():
    for stop_token_ids in ((), tuple(range(0, VOCAB_SIZE, 3))):
        served = Served(speculator=Guesser())
        for i in range(8):
            served.add(f"r{i}", 4 + i, 16, stop_token_ids=stop_token_ids)
        served.drain()


def test_engine_stops_at_stop_strings_within_accepted_guesses():
    served = Served(speculator=Guesser())
    for i in range(6):
        served.add(f"r{i}", 3 + i, 16, ignore_eos=True, stop=STOPS)
        served.add(f"s{i}", 3 + i, 16, ignore_eos=True, stop=STOPS[i % len(STOPS) :])
    served.drain()


@pytest.mark.parametrize("num_tokens", [30, 36, 38, 39])
def test_engine_with_guesses_up_to_max_model_len(num_tokens):
    served = Served(speculator=Guesser())
    served.add("a", num_tokens, 30, ignore_eos=True)
    served.drain()


def test_engine_tells_logprobs_of_guesses():
    told = []
    for speculator in (None, Guesser(right=lambda: 2)):
        served = Served(speculator=speculator)
        served.add("a", 9, 12, ignore_eos=True, logprobs=2)
        served.drain()
        told.append([(c.token_id, c.logprob, c.top) for c in served.ended["a"].choices])
    (plain, guessed), of = told, served.of
    ids = [[choice[0] for choice in one] for one in (guessed, plain)]
    check_equal(*ids, "the ids with guesses, as without", of=of)
    pairs = [[pair for choice in one for pair in choice[2]] for one in (guessed, plain)]
    values = [[choice[1] for choice in one] for one in (guessed, plain)]
    values = [a + [pair[1] for pair in b] for a, b in zip(values, pairs, strict=True)]
    check_close(torch.tensor(values[0]), torch.tensor(values[1]), of=of)


@pytest.mark.parametrize("num_blocks", [10, 11])
def test_engine_with_guesses_where_blocks_are_few(num_blocks):
    served = Served(num_blocks, token_budget=16, speculator=Guesser(right=lambda: 2))
    for i, name in enumerate("abcd"):
        served.add(name, 5 + i, 20, ignore_eos=True)
    served.drain()
    check_true(
        served.engine.scheduler.num_preemptions > 0, "nobody lost blocks in this test", of=served.of
    )


def test_engine_asks_for_no_guesses_where_nobody_got_a_token():
    served = Served(token_budget=8, speculator=Guesser())
    served.add("a", 30, 4, ignore_eos=True)
    for _ in range(3):
        served.step()
        of = served.of
        check_equal(served.guesser.num_proposals, 0, "how often propose was called", of=of)
    served.drain()


@pytest.mark.parametrize("layer", [None, 0])
def test_a_failed_step_with_guesses(layer):
    served = Served(max_num_seqs=2, speculator=Guesser())
    for name, num_tokens in (("a", 9), ("b", 12), ("c", 6), ("d", 5)):
        served.add(name, num_tokens, 12, ignore_eos=True)
    served.step()
    served.fail(layer, ["a", "b"])
    served.drain()
    served.add("a", 9, 3)
    served.drain()


@pytest.mark.parametrize("num_steps", range(4))
def test_abort_of_who_has_guesses(num_steps):
    served = Served(speculator=Guesser())
    for name in "ab":
        served.add(name, 6, 12, ignore_eos=True)
    for _ in range(num_steps):
        served.step()
    served.abort("a")
    served.step()
    served.add("a", 5, 6)
    served.drain()


class Stop(str):
    """A stop string that can be watched."""


@contextlib.contextmanager
def garbage_collected():
    """At the end, free what the block made and nothing refers to; older objects take too long."""
    gc.disable()
    try:
        yield
        gc.collect(0)
    finally:
        gc.enable()


def test_engine_keeps_nothing_of_who_has_ended():
    limits = engine_lab.EngineLimits(64, 40, block_size=4)
    model = SumModel()
    engine = engine_lab.Engine(model, vocabulary(), ENDS, limits)
    watched = {}

    def add(name: str, **params) -> None:
        stop = Stop("the" if name == "at a stop string" else "no such text")
        wanted = engine_lab.GenerationParams(stop=(stop,), ignore_eos=True, **params)
        engine.add(name, prompt_of(name, 3), wanted)
        watched[name] = weakref.ref(wanted), weakref.ref(stop)

    with garbage_collected():
        add("at max_tokens", max_tokens=2)
        add("at a stop token", stop_token_ids=(9,), logit_bias={9: 100.0})
        add("at a stop string", logit_bias={17: 100.0})
        add("aborted")
        for _ in range(2):
            engine.step()
        engine.abort("aborted")
        add("in a failed step")
        model.fails_in_layer = 1
        with contextlib.suppress(engine_lab.StepFailed):
            engine.step()
        engine.step()
    alive = sorted(name for name, refs in watched.items() if any(ref() for ref in refs))
    of = "Engine, five requests that end in different ways"
    check_equal(alive, [], "whose params or stop strings are still kept", of=of)


@pytest.mark.parametrize("num_blocks", [10, 64])
def test_engine_describes_each_step(num_blocks):
    records = []
    served = Served(num_blocks, token_budget=16, on_step=records.append)
    shares, finished, free = [], [], []
    for i, name in enumerate("abcd"):
        served.add(name, 5 + i, 20, ignore_eos=True, stop=STOPS[:1] if i == 3 else ())
    while served.wanted:
        deltas = served.step()
        shares.append(served.model.num_tokens[-1])
        finished.append({d.request_id: d.finish_reason for d in deltas if d.finish_reason})
        free.append(served.engine.blocks.num_free_blocks)
    served.drain()
    of = served.of
    check_equal(len(records), len(shares), "how often on_step was called", of=of)
    check_equal([one["step"] for one in records], list(range(len(records))), "step", of=of)
    got = [sum(part["num_tokens"] for part in one["parts"]) for one in records]
    check_equal(got, shares, "tokens of the parts of each step", of=of)
    check_equal([one["finished"] for one in records], finished, "finished", of=of)
    check_equal([one["num_free_blocks"] for one in records], free, "num_free_blocks", of=of)
    preempted = sum(len(one["preempted"]) for one in records)
    expected = served.engine.scheduler.num_preemptions
    check_equal(preempted, expected, "how many are preempted in all records", of=of)
    text = f"num_preemptions is {expected} with {num_blocks} blocks"
    check_true((expected > 0) == (num_blocks == 10), text, of=of)
    end = 0.0
    for one in records:
        spans = [one[name] for name in ("schedule_s", "execute_s", "update_s")]
        right = one["time"] >= end - 1e-6 and min(spans) >= 0
        text = f"a step begins at {one['time']} and takes {spans}; the one before ended at {end}"
        check_true(right, text, of=of)
        end = one["time"] + sum(spans)
    json.dumps(records)


def test_engine_describes_nothing_of_a_step_that_failed():
    records = []
    served = Served(on_step=records.append)
    served.add("a", 5, 4)
    served.fail(0)
    check_equal(records, [], "records of a step that failed", of=served.of)
    served.add("b", 5, 4, ignore_eos=True)
    served.drain()
    steps = [record["step"] for record in records]
    check_equal(steps, [0, 1, 2, 3], "step of each record: how many came before", of=served.of)


def test_engine_describes_guesses():
    records = []
    served = Served(on_step=records.append, speculator=Guesser(right=lambda: 2))
    for name in "ab":
        served.add(name, 5, 9, ignore_eos=True)
    counts = []
    while served.wanted:
        before = list(served.guesser.counts)
        served.step()
        counts.append([b - a for a, b in zip(before, served.guesser.counts, strict=True)][1:])
    got = [[sum(p["num_drafts"] for p in one["parts"]), one["num_accepted"]] for one in records]
    check_equal(got, counts, "num_drafts of all parts, num_accepted, of each step", of=served.of)


def test_engine_describes_nothing_for_nobody(monkeypatch):
    served = Served()

    def no_record(*args, **kwargs):
        check_true(False, "step_record was called, and on_step is None", of=served.of)

    monkeypatch.setitem(engine_lab.Engine.step.__globals__, "step_record", no_record)
    served.add("a", 5, 4)
    served.drain()


def test_engine_asks_for_attention_once_a_step():
    asked = []

    def make_attend(cache, batch):
        asked.append(len(batch.seq_lens))
        return paged.paged_attend(cache, batch)

    served = Served(token_budget=8, make_attend=make_attend)
    for name, num_tokens in (("a", 3), ("b", 9), ("c", 2)):
        served.add(name, num_tokens, 4)
    served.drain()
    num_steps = len(served.model.num_tokens)
    check_equal(len(asked), num_steps, "how often make_attend was called", of=served.of)


def test_engine_keeps_its_limits():
    served = Served(30, max_num_seqs=3, token_budget=7, block_size=5, watermark=6)
    check_equal(served.engine.limits, served.limits, "limits", of=served.of)
    blocks = served.engine.blocks
    got = blocks.num_blocks, blocks.block_size, blocks.watermark, blocks.enabled
    what = "num_blocks, block_size, watermark and enabled of blocks"
    check_equal(got, (30, 5, 6, True), what, of=served.of)
    for i in range(8):
        served.add(f"r{i}", 3 + i, 6, ignore_eos=True)
    most = 0
    while served.wanted:
        served.step()
        most = max(most, served.engine.scheduler.num_running)
    check_equal(most, 3, "how many ran at once", of=served.of)
    check_equal(max(served.model.num_tokens), 7, "most tokens of a step", of=served.of)


# Limits, the context of the model, and what the message names.
BAD_LIMITS = {
    "more than the context": ({"max_model_len": 65}, [65, 64]),
    "more than the pool": ({"num_blocks": 4, "max_model_len": 17, "block_size": 4}, [17, 16]),
    "no blocks": ({"num_blocks": 0, "max_model_len": 2}, [0]),
    "no size of a block": ({"block_size": 0}, [0]),
    "nobody may run": ({"max_num_seqs": 0}, [0]),
    "less budget than requests": ({"max_num_seqs": 9, "token_budget": 8}, [9, 8]),
    "a negative watermark": ({"watermark": -2}, [-2]),
}


@pytest.mark.parametrize("case", BAD_LIMITS)
def test_engine_refuses_limits_that_do_not_fit(case):
    changed, mentions = BAD_LIMITS[case]
    limits = engine_lab.EngineLimits(**{"num_blocks": 32, "max_model_len": 40, **changed})
    arguments = SumModel(context=64), vocabulary(), ENDS, limits
    of = f"Engine for a model with a context of 64, {describe(limits)}"
    check_refused(engine_lab.Engine, *arguments, mentions=mentions, of=of)


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("guesses", [False, True], ids=["", "guesses"])
def test_engine_with_anything(seed, guesses):
    rng = random.Random(seed)
    num_blocks = rng.choice([10, 11, 14, 40])
    options = {"speculator": Guesser(3, lambda: rng.randint(0, 3))} if guesses else {}
    served = Served(
        num_blocks,
        **options,
        max_num_seqs=rng.choice([1, 2, 4]),
        token_budget=rng.choice([4, 7, 32]),
        prefix_caching=rng.random() < 0.7,
        watermark=rng.choice([0, 0, 1, 3]),
    )
    num_added = 0
    for _ in range(4 + 2 * seed):
        for _ in range(rng.choice([0, 0, 1, 2])):
            num_added += 1
            prompt, params = random_request(rng)
            served.add(f"r{num_added}", prompt, **params)
        if num_added and rng.random() < 0.15:
            served.abort(f"r{rng.randint(1, num_added)}")
        if served.wanted and rng.random() < 0.05:
            served.fail(rng.randrange(2))
        served.step()
    served.drain()


def random_request(rng: random.Random) -> tuple[list[int], dict]:
    """Draw a prompt, half of them with a common beginning, and how to go on."""
    prompt = rng.choices(WORDS, k=rng.randint(1, 12))
    if rng.random() < 0.5:
        prompt = prompt_of("shared", rng.choice([4, 8, 12])) + prompt
    max_tokens = rng.randint(1, 20)
    params = {
        "max_tokens": max_tokens,
        "min_tokens": rng.choice([0, 0, max_tokens // 2]),
        "ignore_eos": rng.random() < 0.5,
        "stop": tuple(rng.sample(STOPS, rng.choice([0, 0, 1, 3]))),
        "stop_token_ids": rng.choice([(), (), (9, 21)]),
        "frequency_penalty": rng.choice([0.0, 0.0, 0.7]),
    }
    return prompt, params


class TextVocabulary(Vocabulary):
    """A vocabulary that takes texts too, a character at a time."""

    def encode(self, text: str) -> list[int]:
        return [PIECES.index(character.encode()) for character in text]


class Listed:
    """An LLM, and what it should answer."""

    def __init__(self, num_blocks: int = 64, max_num_seqs: int = 8, **options):
        self.model, self.tokenizer = SumModel(), TextVocabulary(PIECES, SPECIAL)
        limits = {"block_size": 4, "watermark": 0, "token_budget": 16, "max_num_seqs": max_num_seqs}
        wanted = engine_lab.EngineLimits(num_blocks, 40, **limits)
        self.llm = engine_lab.LLM(self.model, self.tokenizer, ENDS, wanted, **options)
        self.of = History(f"LLM with {num_blocks} blocks of {limits['block_size']}")

    def check(self, prompts: Sequence, params, **options) -> None:
        """Generate, and compare with what each prompt gets alone."""
        got = self.llm.generate(prompts, params, **options)
        self.of.note(f"generate({len(prompts)} prompts)", [c.finish_reason for c in got])
        check_equal(len(got), len(prompts), "how many completions there are", of=self.of)
        every = itertools.repeat(params) if not isinstance(params, list) else params
        for i, (prompt, completion, one) in enumerate(zip(prompts, got, every, strict=False)):
            ids = tokens(prompt)
            answer = alone(ids, one, 40)
            what = f"of completion {i}, for the prompt {prompt!r}"
            check_equal(completion.prompt_ids, tuple(ids), f"prompt_ids {what}", of=self.of)
            check_equal(completion.text, answer.text, f"text {what}", of=self.of)
            check_equal(completion.token_ids, list(answer.ids), f"token_ids {what}", of=self.of)
            reason = completion.finish_reason
            check_equal(reason, answer.finish_reason, f"finish_reason {what}", of=self.of)
        self.check_idle()

    def check_idle(self) -> None:
        engine = self.llm.engine
        check_equal(engine.num_unfinished, 0, "num_unfinished of its engine", of=self.of)
        free, num_blocks = engine.blocks.num_free_blocks, engine.limits.num_blocks
        text = f"nobody waits or runs, and {free} of {num_blocks} blocks are free"
        check_true(free == num_blocks, text, of=self.of)


def tokens(prompt: str | Sequence[int]) -> list[int]:
    return TextVocabulary(PIECES).encode(prompt) if isinstance(prompt, str) else list(prompt)


def greedy(**params):
    return engine_lab.GenerationParams(**{"temperature": 0.0, "max_tokens": 12, **params})


PROMPTS = ["ab a", [9, 10, 17], "日.", (22, 9), "b", [18] * 9, "ab a", "S", "T", "a", "b b", [21]]


def test_llm_answers_in_the_order_of_the_prompts():
    listed = Listed()
    # The first ones take longest.
    params = [greedy(max_tokens=14 - i, ignore_eos=True) for i in range(len(PROMPTS))]
    listed.check(PROMPTS, params)


@pytest.mark.parametrize("num_blocks", [10, 64])
def test_llm_takes_params_for_all(num_blocks):
    Listed(num_blocks).check(PROMPTS, greedy(ignore_eos=True))
    Listed(num_blocks).check(PROMPTS, greedy(stop=STOPS))


def test_llm_takes_params_for_each():
    params = [
        greedy(max_tokens=1 + i, ignore_eos=i % 2 > 0, stop=STOPS[i % 6 :])
        for i in range(len(PROMPTS))
    ]
    listed = Listed()
    listed.check(PROMPTS, params)
    listed.check(PROMPTS[:1], params[:1])
    listed.check([], [])
    listed.check([], greedy())


def test_llm_answers_again():
    listed = Listed()
    for stops in ((), STOPS, STOPS, ("the ",), ()):
        listed.check(PROMPTS[:4], greedy(stop=stops))
        # A stop string in the first token is the end of everybody.
        listed.check(PROMPTS[:2], greedy(stop=("the",), logit_bias={17: 100.0}))


def test_llm_keeps_logprobs():
    listed = Listed()
    (completion,) = listed.llm.generate(["ab"], greedy(ignore_eos=True, logprobs=2))
    tops = [len(choice.top) for choice in completion.choices]
    check_equal(tops, [2] * 12, "how many top tokens each choice has", of=listed.of)


def test_llm_runs_prompts_together():
    listed = Listed()
    listed.check(PROMPTS[:4], greedy(max_tokens=8, ignore_eos=True))
    num_steps = len(listed.model.num_tokens)
    check_true(num_steps < 16, f"4 prompts of 8 tokens took {num_steps} steps", of=listed.of)


@pytest.mark.parametrize("num_params", [0, 1, 2, 4])
def test_llm_refuses_another_number_of_params(num_params):
    listed = Listed()
    params = [greedy()] * num_params
    of = f"{listed.of}\ngenerate 3 prompts with params for {num_params}"
    arguments = PROMPTS[:3], params
    check_refused(listed.llm.generate, *arguments, mentions=[3, num_params], of=of)
    listed.check_idle()
    check_equal(listed.model.num_tokens, [], "tokens of the steps that were made", of=of)
    listed.check(PROMPTS[:3], [greedy()] * 3)


@pytest.mark.parametrize("bad", [[], "", [9, 99], [9] * 40, [9, 9.5]], ids=str)
def test_llm_refuses_a_bad_prompt_before_any_step(bad):
    listed = Listed()
    for place in (0, 1, 3):
        prompts = [*PROMPTS[:3]]
        prompts.insert(place, bad)
        of = f"{listed.of}\ngenerate 4 prompts, of which number {place} is {str(bad)[:40]}"
        check_refused(listed.llm.generate, prompts, greedy(), mentions=[], of=of)
        listed.check_idle()
        check_equal(listed.model.num_tokens, [], "tokens of the steps that were made", of=of)
    listed.check(PROMPTS[:3], greedy())


def test_llm_leaves_nothing_behind_when_the_model_fails():
    listed = Listed(max_num_seqs=2)
    for num_steps in (0, 1, 3):
        calls = itertools.count()

        def fail_later(module, args, calls=calls, num_steps=num_steps):
            listed.model.fails_in_layer = 1 if next(calls) == num_steps else -1

        hook = listed.model.register_forward_pre_hook(fail_later)
        with pytest.raises(engine_lab.StepFailed):
            listed.llm.generate(PROMPTS[:5], greedy(ignore_eos=True))
        hook.remove()
        listed.model.fails_in_layer = -1
        listed.of.note(f"generate(5 prompts), and the model raises in step {num_steps}", None)
        listed.check_idle()
        listed.check(PROMPTS[1:4], greedy(ignore_eos=True))


class Refused(Exception):
    """What a tokenizer of a test raises."""


def test_llm_leaves_nothing_behind_when_the_tokenizer_fails():
    listed = Listed(max_num_seqs=2)
    decode = listed.tokenizer.decode
    for num_calls in (0, 5):
        calls = itertools.count()

        def fail_later(ids, calls=calls, num_calls=num_calls, **options):
            if next(calls) == num_calls:
                raise Refused
            return decode(ids, **options)

        listed.tokenizer.decode = fail_later
        with pytest.raises(Refused):
            listed.llm.generate(PROMPTS[:5], greedy(ignore_eos=True))
        listed.tokenizer.decode = decode
        listed.of.note(f"generate(5 prompts), and call {num_calls} of decode raises", None)
        listed.check_idle()
        listed.check(PROMPTS[1:4], greedy(ignore_eos=True))


def test_llm_asks_for_attention_as_told():
    asked = []

    def make_attend(cache, batch):
        asked.append(len(batch.seq_lens))
        return paged.paged_attend(cache, batch)

    listed = Listed(make_attend=make_attend)
    listed.check(PROMPTS[:4], greedy())
    num_steps = len(listed.model.num_tokens)
    check_equal(len(asked), num_steps, "how often make_attend was called", of=listed.of)


@pytest.mark.parametrize("options", [{}, {"show_progress": False}, {"show_progress": True}])
def test_llm_draws_a_bar_when_asked(options):
    listed = Listed()
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(err):
        listed.check(PROMPTS[:3], greedy(), **options)
    said, of = err.getvalue(), f"LLM.generate({options})"
    if options.get("show_progress"):
        check_true("3/3" in said, f"at the end the bar shows {said[-60:]!r}", of=of)
    else:
        check_equal(said, "", "what is printed", of=of)


def config_of(layers: int, kv_heads: int, head_dim: int, context: int):
    return qwen.QwenConfig.from_dict(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "vocab_size": 99,
            "hidden_size": 4 * kv_heads * 3,
            "intermediate_size": 7,
            "num_hidden_layers": layers,
            "num_attention_heads": 2 * kv_heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "tie_word_embeddings": True,
            "max_position_embeddings": context,
        }
    )


# The model, bytes, itemsize, block_size, max_model_len; the pool that comes of it.
POOLS = {
    "a context that fits": ((28, 8, 128, 4096), 10**9, 2, 16, None, (544, 4096)),
    "a context that does not": ((28, 8, 128, 40_960), 10**9, 2, 16, None, (544, 8704)),
    "float32": ((28, 8, 128, 40_960), 10**9, 4, 16, None, (272, 4352)),
    "blocks of 32": ((28, 8, 128, 40_960), 10**9, 2, 32, None, (272, 8704)),
    "blocks of 1": ((2, 1, 3, 100), 24 * 2 * 7 + 47, 4, 1, None, (7, 7)),
    "less is asked for": ((28, 8, 128, 40_960), 10**9, 2, 16, 1000, (544, 1000)),
    "more is asked for than fits": ((28, 8, 128, 40_960), 10**9, 2, 16, 9000, (544, 8704)),
    "just what fits": ((28, 8, 128, 40_960), 10**9, 2, 16, 8704, (544, 8704)),
    "one token less": ((28, 8, 128, 40_960), 10**9, 2, 16, 8703, (544, 8703)),
    "the whole context": ((28, 8, 128, 512), 10**9, 2, 16, 512, (544, 512)),
    "exactly one block": ((3, 2, 5, 512), 60 * 4 * 16, 4, 16, None, (1, 16)),
    "almost two blocks": ((3, 2, 5, 512), 2 * 60 * 4 * 16 - 1, 4, 16, None, (1, 16)),
    "exactly two blocks": ((3, 2, 5, 512), 2 * 60 * 4 * 16, 4, 16, 20, (2, 20)),
}


@pytest.mark.parametrize("case", POOLS)
def test_plan_pool(case):
    shape, num_bytes, itemsize, block_size, max_model_len, expected = POOLS[case]
    config = config_of(*shape)
    got = engine_lab.plan_pool(config, num_bytes, itemsize, block_size, max_model_len)
    layers, kv_heads, head_dim, context = shape
    of = (
        f"plan_pool for {layers} layers, {kv_heads} key/value heads of {head_dim} and a context of "
        f"{context}: num_bytes {num_bytes}, itemsize {itemsize}, block_size {block_size}, "
        f"max_model_len {max_model_len}"
    )
    check_equal(got, expected, "(num_blocks, max_model_len)", of=of)


def test_plan_pool_fills_the_bytes_it_is_given():
    config = config_of(3, 2, 5, 4000)
    for num_bytes in range(20_000, 90_000, 3333):
        num_blocks, _ = engine_lab.plan_pool(config, num_bytes, 4)
        sizes = [paged.PagedKVCache(3, num_blocks + more, 16, 2, 5).nbytes for more in (0, 1)]
        text = f"{num_blocks} blocks take {sizes[0]} bytes, one more would take {sizes[1]}"
        check_true(sizes[0] <= num_bytes < sizes[1], text, of=f"plan_pool, {num_bytes} bytes")


@pytest.mark.parametrize("num_bytes", [0, 1, 60 * 4 * 16 - 1])
def test_plan_pool_refuses_less_than_a_block(num_bytes):
    of = f"plan_pool with num_bytes {num_bytes}, a block of {60 * 4 * 16} bytes"
    arguments = config_of(3, 2, 5, 512), num_bytes, 4
    check_refused(engine_lab.plan_pool, *arguments, mentions=[num_bytes, 60 * 4 * 16], of=of)


@pytest.mark.parametrize("max_model_len", [513, 10_000])
def test_plan_pool_refuses_more_than_the_context(max_model_len):
    of = f"plan_pool for a context of 512, max_model_len {max_model_len}"
    arguments = config_of(3, 2, 5, 512), 10**9, 4, 16, max_model_len
    check_refused(engine_lab.plan_pool, *arguments, mentions=[max_model_len, 512], of=of)


FAMILIES = {"Qwen2": (Qwen2Config, Qwen2ForCausalLM), "Qwen3": (Qwen3Config, Qwen3ForCausalLM)}
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 15,
    "intermediate_size": 33,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "tie_word_embeddings": False,
    "max_position_embeddings": 40,
}


@contextlib.contextmanager
def both_models(family: str) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The same random weights in transformers' model and in the course's."""
    config_class, model_class = FAMILIES[family]
    theirs = model_class(config_class(**SHAPE, attn_implementation="eager")).eval()
    generator = torch.Generator().manual_seed(11)
    for parameter in theirs.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0
        parameter.data = 2 * scale * torch.randn(parameter.shape, generator=generator)
    config = qwen.QwenConfig.from_dict(SHAPE | {"architectures": [f"{family}ForCausalLM"]})
    ours = qwen.Qwen(config)
    qwen.load_weights(ours, theirs.state_dict())
    with torch.no_grad():
        yield theirs, ours.eval()


@pytest.mark.parametrize("num_blocks", [12, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_engine_matches_transformers(family, num_blocks):
    limits = engine_lab.EngineLimits(num_blocks, 40, 4, 9, block_size=4, watermark=0)
    with both_models(family) as (theirs, ours):
        engine = engine_lab.Engine(ours, vocabulary(), ENDS, limits)
        prompts = {f"r{i}": [*([9, 10] * 4)[: 8 * (i % 2)], *range(i, 2 * i + 2)] for i in range(6)}
        for name, prompt in prompts.items():
            engine.add(name, prompt, greedy(max_tokens=14, ignore_eos=True, logprobs=0))
        answers = {name: [] for name in prompts}
        for _ in range(300):
            for delta in engine.step() if engine.num_unfinished else ():
                answers[delta.request_id] += delta.choices
        for name, prompt in prompts.items():
            ids = [choice.token_id for choice in answers[name]]
            of = f"Engine for {family}, {num_blocks} blocks of 4, request {name}"
            check_equal(len(ids), 14, "how many tokens it got", of=of)
            logits = theirs(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1)
            check_equal(ids, expected.argmax(-1).tolist(), "its ids", of=of)
            got = torch.tensor([choice.logprob for choice in answers[name]])
            check_close(got, expected.amax(-1), tolerance=1e-4, of=of)
