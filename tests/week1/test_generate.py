"""Grades week1/generate: the scores of the next token, the detokenizer, stop strings, the loop."""

import copy
import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AttentionInterface
from transformers.models.qwen2.modeling_qwen2 import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3Config, Qwen3ForCausalLM

from course.grading import History, check_close, check_equal, check_raises, check_true, lab

generate_lab = lab("week1/generate")

UNFINISHED = "\ufffd"
SCRIPTS = {
    "accents": "Zoë’s café, naïve façade — ça va? ½ €",
    "chinese": "你好，世界。学而时习之，不亦说乎？𠮷野家",
    "emoji": "ok 👍🏽 family 👨‍👩‍👧 flag 🇫🇷 done 🫠",
    "arabic": "مرحبا بالعالم، كيف حالك؟",
    "devanagari": "नमस्ते दुनिया। क्षत्रिय ज्ञान",
    "mixed": " \n\taé日😀ע한ß\u0301  z",
}


# One to four bytes a character, spaces, a combining accent, and the replacement character itself.
ALPHABET = " a\né½ע\u0301日，नि\ufffd😀🏽𠮷"


def said(start, values):
    """As many of the values as fit into the 60 characters that are shown of an argument."""
    for count, value in enumerate(values):
        longer = f"{start}{',' if count else ''} {value!r}"
        if len(longer) > 57:
            return f"{start}, …"
        start = longer
    return start


def counted(number, noun):
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class Vocabulary:
    """A tokenizer in which id i carries the i-th piece of bytes; counts the ids it is asked for."""

    def __init__(self, pieces, strips_space=False):
        self.pieces = list(pieces)
        self.strips_space = strips_space
        self.num_decoded = 0

    def __repr__(self):
        return said("ids from 0 bring", self.pieces)

    def __call__(self, ids):
        self.num_decoded += len(ids)
        text = b"".join(self.pieces[i] for i in ids).decode("utf-8", errors="replace")
        return text[1:] if self.strips_space and text.startswith(" ") else text

    def certain(self, ids):
        """The text that has its last byte. What follows may still become a character."""
        return self(ids).removesuffix(UNFINISHED)


def cut(data, places):
    """Cut bytes or text into pieces at the given places."""
    places = sorted({place % (len(data) + 1) for place in places})
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


def told(pieces):
    few = f"ids that carry the bytes {list(pieces)}"
    return f"IncrementalDetokenizer, {few if len(pieces) < 40 else f'{len(pieces)} ids'}"


def check_stream(pieces, strips_space=False):
    """Feed one id a piece; hold the text so far, after every call, against a whole decode."""
    decode = Vocabulary(pieces, strips_space)
    of = History(told(pieces) + (", decoded without a leading space" if strips_space else ""))
    detokenizer = generate_lab.IncrementalDetokenizer(Vocabulary(pieces, strips_space))
    text = ""
    for i in range(len(pieces)):
        text += of.note(f"add({i}), which carries {pieces[i]}", detokenizer.add(i))
        so_far = list(range(i + 1))
        wrong = (
            f"after {counted(i + 1, 'id')} the text is {text!r}, their decode is {decode(so_far)!r}"
        )
        check_true(decode(so_far).startswith(text), wrong, of=of)
        check_true(text.startswith(decode.certain(so_far)), f"something is missing: {wrong}", of=of)
    text += of.note("flush()", detokenizer.flush())
    check_equal(text, decode(list(range(len(pieces)))), "all text joined", of=of)


def single_bytes(data):
    return cut(data, range(len(data)))[1:]


@pytest.mark.parametrize("strips_space", [False, True], ids=["", "strips-space"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_detokenizer_of_one_byte_an_id(script, strips_space):
    check_stream(single_bytes((SCRIPTS[script] * 2).encode()), strips_space)


@given(st.sampled_from(sorted(SCRIPTS)), st.lists(st.integers(0, 10_000), max_size=60))
def test_detokenizer_of_characters_cut_anywhere(script, places):
    check_stream(cut(SCRIPTS[script].encode(), places))


@given(st.text(ALPHABET, max_size=40), st.lists(st.integers(0, 10_000), max_size=40), st.booleans())
def test_detokenizer_of_any_text_cut_anywhere(text, places, strips_space):
    check_stream(cut(text.encode(), places), strips_space)


# Lead bytes, continuations, a surrogate's start, bytes that UTF-8 never uses, and plain text.
UGLY_BYTES = b"\x80\x9f\x98\x81\xac\xa0\xf0\xe2\xe0\xed\xc3\xff\xc0 a"


@settings(max_examples=150)
@given(st.lists(st.lists(st.sampled_from(UGLY_BYTES), max_size=3).map(bytes), max_size=40))
def test_detokenizer_of_invalid_bytes(pieces):
    check_stream(pieces)


@settings(max_examples=100)
@given(st.lists(st.sampled_from([b" ", b"", b" a", b"a ", b"  ", b"b"]), max_size=30))
def test_detokenizer_loses_a_space_in_front_once_only(pieces):
    check_stream(pieces, strips_space=True)


@pytest.mark.parametrize("num_textless", [1, 2, 3, 30])
@pytest.mark.parametrize("strips_space", [False, True], ids=["", "strips-space"])
def test_detokenizer_of_ids_without_text(num_textless, strips_space):
    textless = [b""] * num_textless
    unit = [b" one", *textless, b" two", b"\xf0", *textless, b"\x9f\x98", *textless, b"\x81"]
    for num_in_front in range(12):
        check_stream([b"."] * num_in_front + unit + textless + unit[::-1] + unit, strips_space)


@settings(max_examples=150)
@given(
    st.lists(st.sampled_from("a é日😀"), max_size=14).map("".join),
    st.lists(st.tuples(st.integers(0, 99), st.integers(1, 12)), max_size=8),
    st.booleans(),
)
def test_detokenizer_of_ids_without_text_anywhere(text, textless, strips_space):
    pieces = single_bytes(text.encode())
    for place, count in textless:
        place %= len(pieces) + 1
        pieces[place:place] = [b""] * count
    check_stream(pieces, strips_space)


@pytest.mark.parametrize("end", [b"\xf0", b"\xf0\x9f\x98", b"\xe6\x97", b"\xc3"], ids=str)
def test_detokenizer_of_a_character_cut_off_at_the_end(end):
    pieces = [b"so", *single_bytes("é 😀".encode()), *single_bytes(end)]
    check_stream(pieces)
    detokenizer = generate_lab.IncrementalDetokenizer(Vocabulary(pieces))
    shown = "".join(detokenizer.add(i) for i in range(len(pieces)))
    check_equal(shown, "soé 😀", "the text before flush", of=told(pieces))
    check_equal(detokenizer.flush(), UNFINISHED, "what flush returns", of=told(pieces))
    check_equal(detokenizer.flush(), "", "what a second flush returns", of=told(pieces))


def test_detokenizer_returns_a_character_with_its_last_byte():
    pieces = [b"a\xf0", b"\x9f", b"\x98", b"\x81!\xe6", b"\x97\xa5", "本é".encode(), b".\xc3"]
    detokenizer = generate_lab.IncrementalDetokenizer(Vocabulary(pieces))
    got = [detokenizer.add(i) for i in range(len(pieces))]
    check_equal(got, ["a", "", "", "😁!", "日", "本é", "."], "what add returns", of=told(pieces))


def test_detokenizer_holds_back_no_more_than_one_replacement_character():
    pieces = [b"a\x80", b"\x80", b"\xff\xff", b"\xf0", b"\x9f\x98", b"b\x80\x80\x80", b"c"]
    detokenizer = generate_lab.IncrementalDetokenizer(Vocabulary(pieces))
    got = [detokenizer.add(i) for i in range(len(pieces))]
    texts = ["a", "\ufffd", "\ufffd" * 2, "\ufffd", "", "\ufffdb\ufffd\ufffd", "\ufffdc"]
    check_equal(got, texts, "what add returns", of=told(pieces))


def test_detokenizer_of_a_replacement_character_in_the_text():
    check_stream(single_bytes("a\ufffd\ufffdb\ufffd".encode()))


def test_detokenizer_without_ids():
    detokenizer = generate_lab.IncrementalDetokenizer(Vocabulary([]))
    check_equal(detokenizer.flush(), "", "what flush returns", of="IncrementalDetokenizer, no ids")


def test_detokenizer_keeps_its_stream_apart_from_another():
    pieces = single_bytes("né😀日".encode())
    one, two = (generate_lab.IncrementalDetokenizer(Vocabulary(pieces)) for _ in range(2))
    texts = ["", ""]
    for i in range(len(pieces)):
        texts[0] += one.add(i)
        texts[1] += two.add(len(pieces) - 1 if i == 0 else i - 1)
    texts[0] += one.flush()
    of = "two IncrementalDetokenizers, id by id in turn"
    check_equal(texts[0], "né😀日", "the first stream's text", of=of)
    check_true("né😀" in texts[1], f"the second stream's text is {texts[1]!r}", of=of)


LONG_STREAMS = {
    "text": [b" word", b"!", "日".encode(), b"s", "né".encode()] * 400,
    "bytes of emoji": single_bytes("😀👍🏽".encode()) * 160,
    "invalid bytes": [b"\x80", b"\xf0", b"\x9f", b"\xff"] * 500,
    "one invalid byte": [b"\x98"] * 2000,
    "ids that end inside a character": [b"\xf0", *[b"\x9f\x98\x81\xf0"] * 1999],
    "spaces": [b" "] * 2000,
    "text with textless ids": [b"a", b"", b"", b" b\xc3", b"\xa9"] * 400,
}


@pytest.mark.parametrize("strips_space", [False, True], ids=["", "strips-space"])
@pytest.mark.parametrize("stream", LONG_STREAMS)
def test_detokenizer_whose_cost_does_not_grow(stream, strips_space):
    pieces = LONG_STREAMS[stream]
    decode = Vocabulary(pieces, strips_space)
    detokenizer = generate_lab.IncrementalDetokenizer(decode)
    text, most = "", 0
    for i in range(len(pieces)):
        before = decode.num_decoded
        text += detokenizer.add(i)
        most = max(most, decode.num_decoded - before)
    before = decode.num_decoded
    text += detokenizer.flush()
    most = max(most, decode.num_decoded - before)
    of = f"IncrementalDetokenizer, {len(pieces)} ids: {stream}"
    check_equal(text, decode(list(range(len(pieces)))), "all text joined", of=of)
    check_true(most <= 500, f"one call passed {most:,} ids to decode; allowed: 500", of=of)


def expected_stop(text, stops):
    """Find the winning stop string by trying every end: (text in front of it, the winner)."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            winner = max(complete, key=len)
            return text[: end - len(winner)], winner
    return text, None


def expected_shown(text, stops):
    """What may be shown of an unfinished text: all that is no beginning of a stop string."""
    shown, winner = expected_stop(text, stops)
    if winner is None:
        starts = [i for i in range(len(text)) if any(s.startswith(text[i:]) for s in stops)]
        shown = text[: min(starts, default=len(text))]
    return shown


def check_matcher(pieces, stops):
    """Feed the pieces; hold what was returned, after every call, against trying every end."""
    of = History(f"StopMatcher({list(stops)})")
    matcher = generate_lab.StopMatcher(stops)
    returned = ""
    for i, piece in enumerate(pieces):
        returned += of.note(f"add({piece!r})", matcher.add(piece))
        so_far = "".join(pieces[: i + 1])
        what = f"the text returned after {counted(i + 1, 'piece')}"
        check_equal(returned, expected_shown(so_far, stops), what, of=of)
        check_equal(matcher.matched, expected_stop(so_far, stops)[1], "matched", of=of)
    returned += of.note("flush()", matcher.flush())
    check_equal(returned, expected_stop("".join(pieces), stops)[0], "all text joined", of=of)


STOP_CASES = {
    "across pieces": (["ab<", "st", "op", ">cd"], ["<stop>"]),
    "inside one piece": (["a", "b<stop>c", "d"], ["<stop>"]),
    "in the first piece": (["<stop>", "x"], ["<stop>"]),
    "at the very end": (["ab", "c<stop>"], ["<stop>"]),
    "never finished": (["ab", "c<sto"], ["<stop>"]),
    "a false start": (["a<", "st", "<stop>", "b"], ["<stop>"]),
    "a false start inside itself": (["a", "a", "a", "b", "c"], ["aab"]),
    "one the prefix of another": (["xa", "bc", "d"], ["abcd", "ab"]),
    "the prefix comes second": (["xa", "bc", "d"], ["ab", "abcd"]),
    "complete at the same character": (["ab", "cd", "e"], ["cd", "bcd", "d"]),
    "all at the same character": (["az", "bc", "d"], ["bc", "zbc", "c"]),
    "the later start is complete first": (["abcd", "efg"], ["bcdefg", "de"]),
    "two in one piece": (["one STOP two END three"], ["END", "STOP"]),
    "twice in one piece": (["one STOP two STOP"], ["STOP"]),
    "one character": (["ab", "c\n", "d"], ["\n"]),
    "longer than the text": (["ab"], ["abc" * 20]),
    "held by the longer, not the shorter": (["xab", "y"], ["bz", "abq"]),
    "overlap": (["ab", "ab", "ac"], ["abac"]),
    "other characters": (["a日", "本", "語。b"], ["本語。"]),
    "empty pieces": (["", "a", "", "b", ""], ["ab"]),
    "no stop strings": (["a", "<stop>", "b"], []),
    "the same one twice": (["ab", "cd"], ["bc", "bc"]),
}


@pytest.mark.parametrize("case", STOP_CASES)
def test_matcher_by_hand(case):
    check_matcher(*STOP_CASES[case])


@settings(max_examples=200)
@given(
    st.text("ab", max_size=24),
    st.lists(st.text("ab", min_size=1, max_size=6), max_size=4),
    st.lists(st.integers(0, 100), max_size=8),
)
def test_matcher_however_the_text_is_cut(text, stops, places):
    check_matcher(cut(text, places), stops)


@settings(max_examples=100)
@given(
    st.text("<|im_end>", max_size=30),
    st.lists(st.sampled_from(["<|im_end|>", "<|", "|>", "_end", "im"]), min_size=1, max_size=3),
)
def test_matcher_one_character_at_a_time(text, stops):
    check_matcher(list(text), stops)


@pytest.mark.parametrize("kind", [list, tuple, set, frozenset])
def test_matcher_of_stop_strings_in_any_collection(kind):
    check_matcher(["abc", "de"], kind(["cd", "zz"]))


def test_matcher_returns_nothing_after_a_stop_string():
    of = "StopMatcher(['<s>']) fed with 'a<s>b', then 'c<s>d', then flushed"
    matcher = generate_lab.StopMatcher(["<s>"])
    got = [matcher.add("a<s>b"), matcher.add("c<s>d"), matcher.flush()]
    check_equal(got, ["a", "", ""], "what add, add and flush return", of=of)
    check_equal(matcher.matched, "<s>", "matched", of=of)


def test_matcher_flushes_held_text_that_was_no_stop_string():
    of = "StopMatcher(['<stop>', 'opal']) fed with 'a<st' and 'op', then flushed"
    matcher = generate_lab.StopMatcher(["<stop>", "opal"])
    got = [matcher.add("a<st"), matcher.add("op"), matcher.flush()]
    check_equal(got, ["a", "", "<stop"], "what add, add and flush return", of=of)
    check_equal(matcher.matched, None, "matched", of=of)


@pytest.mark.parametrize("stops", [[""], ["a", ""], {"", "b"}], ids=str)
def test_matcher_refuses_an_empty_stop_string(stops):
    check_raises(ValueError, generate_lab.StopMatcher, stops)


class RollingModel:
    """Scores that depend on every id and its place: one id lost or moved changes all of them."""

    def __init__(self, vocab_size=40):
        self.vocab_size = vocab_size
        self.calls = []

    def __repr__(self):
        return f"scores of {self.vocab_size} ids by a hash of all ids so far"

    def __call__(self, ids):
        self.calls.append(list(ids))
        state = 17
        for position, token_id in enumerate(ids):
            state = (state * 1_000_003 + token_id * 8191 + position + 1) % (2**61 - 1)
        generator = torch.Generator().manual_seed(state % 2**32)
        return torch.randn(self.vocab_size, generator=generator)


def rolling_ids(prompt, count, eos=(), vocab_size=40):
    """The greedy output of a RollingModel, without the end-of-sequence id that ends it."""
    model, ids = RollingModel(vocab_size), list(prompt)
    while len(ids) < len(prompt) + count:
        token_id = model(ids).tolist().index(max(model(ids).tolist()))
        if token_id in eos:
            break
        ids.append(token_id)
    return ids[len(prompt) :]


class Script:
    """A model that says the given ids, as long as it is called with exactly what it said before."""

    def __init__(self, prompt, ids, eos=None):
        self.prompt, self.ids = list(prompt), list(ids)
        self.vocab_size = max([*self.prompt, *self.ids, eos or 0]) + 2
        self.num_calls = 0
        self.shown = []
        self.shown_before_call = []

    def __repr__(self):
        return said("says", self.ids)

    def __call__(self, ids):
        count = len(ids) - len(self.prompt)
        right = list(ids) == self.prompt + self.ids[: max(count, 0)] and count < len(self.ids)
        check_true(right, f"the model was called with {list(ids)}", of=f"after {self.prompt}")
        self.num_calls += 1
        self.shown_before_call.append("".join(self.shown))
        scores = torch.zeros(self.vocab_size)
        scores[self.ids[count]] = 5.0
        return scores


LETTERS = Vocabulary([bytes([65 + i]) for i in range(60)])


def run(next_logits, prompt=(0, 2, 1), decode=LETTERS, **arguments):
    limits = {"max_tokens": 100, "max_model_len": 1000, "eos_token_ids": set()}
    return generate_lab.generate(next_logits, list(prompt), decode, **{**limits, **arguments})


def check_completion(got, ids, text, reason):
    check_equal(got.token_ids, ids, "token_ids")
    check_true(all(type(i) is int for i in got.token_ids), "token_ids are not all of type int")
    check_equal(got.text, text, "text")
    check_equal(got.finish_reason, reason, "finish_reason")


@pytest.mark.parametrize("max_tokens", [1, 2, 7, 25])
@pytest.mark.parametrize("prompt", [(5,), (3, 3, 1, 38), tuple(range(30))], ids=len)
def test_loop_generates_exactly_max_tokens(prompt, max_tokens):
    model = RollingModel()
    got = run(model, prompt, max_tokens=max_tokens)
    expected = rolling_ids(prompt, max_tokens)
    check_completion(got, expected, LETTERS(expected), "length")
    whole = [*prompt, *expected]
    calls = [whole[: len(prompt) + i] for i in range(max_tokens)]
    check_equal(model.calls, calls, "the ids that the model was called with")


@pytest.mark.parametrize(
    "room, max_tokens, count", [(1, 9, 1), (4, 9, 4), (9, 9, 9), (10, 9, 9), (3, 10**9, 3)]
)
def test_loop_never_exceeds_max_model_len(room, max_tokens, count):
    model, prompt = RollingModel(), (4, 0, 9)
    got = run(model, prompt, max_tokens=max_tokens, max_model_len=len(prompt) + room)
    expected = rolling_ids(prompt, count)
    check_completion(got, expected, LETTERS(expected), "length")
    check_equal(len(model.calls), count, "how often the model was called")


@given(
    st.lists(st.integers(0, 39), min_size=1, max_size=6),
    st.sets(st.integers(0, 39), max_size=12),
    st.integers(1, 20),
)
def test_loop_ends_with_any_end_of_sequence_id(prompt, eos, max_tokens):
    got = run(RollingModel(), prompt, max_tokens=max_tokens, eos_token_ids=eos)
    expected = rolling_ids(prompt, max_tokens, eos)
    reason = "length" if len(expected) == max_tokens else "stop"
    check_completion(got, expected, LETTERS(expected), reason)


@pytest.mark.parametrize("kind", [list, tuple, set, frozenset])
@pytest.mark.parametrize("eos", [50, 51, 52])
def test_loop_takes_end_of_sequence_ids_in_any_collection(kind, eos):
    model = Script([1], [3, 4, eos, 5])
    got = run(model, [1], eos_token_ids=kind([52, 50, 51]))
    check_completion(got, [3, 4], "DE", "stop")
    check_equal(model.num_calls, 3, "how often the model was called")


def test_loop_with_end_of_sequence_as_the_first_token():
    pieces = []
    got = run(Script([1], [9]), [1], eos_token_ids={9}, on_text=pieces.append)
    check_completion(got, [], "", "stop")
    check_equal(pieces, [], "what on_text was called with")


def test_loop_with_end_of_sequence_ids_in_the_prompt():
    got = run(Script([9, 1, 9], [3, 4, 9]), [9, 1, 9], eos_token_ids={9})
    check_completion(got, [3, 4], "DE", "stop")


@pytest.mark.parametrize("max_tokens, count, reason", [(2, 2, "length"), (3, 2, "stop")])
def test_loop_with_end_of_sequence_at_max_tokens(max_tokens, count, reason):
    model = Script([1], [3, 4, 9])
    got = run(model, [1], max_tokens=max_tokens, eos_token_ids={9})
    check_completion(got, [3, 4], "DE", reason)
    check_equal(model.num_calls, max_tokens, "how often the model was called")


@pytest.mark.parametrize("min_tokens", [0, 1, 4, 6])
@pytest.mark.parametrize("score", [4.0, 12.0], ids=["below", "above"])
def test_loop_masks_every_end_of_sequence_id_until_min_tokens(score, min_tokens):
    scores = torch.tensor([0.5, score, 9.0, -3.0, 8.0])
    masked = torch.tensor([0.5, score, -math.inf, -3.0, -math.inf])
    before, seen = scores.clone(), []

    def choose(given_scores, ids):
        seen.append(given_scores.clone())
        return 1 if len(seen) <= min_tokens else 4

    limits = {"max_tokens": 6, "eos_token_ids": {2, 4}, "min_tokens": min_tokens}
    got = run(lambda ids: scores, choose=choose, **limits)
    expected = [masked] * min_tokens + [before] * (min_tokens < 6)
    check_equal(len(seen), len(expected), "how often choose was called")
    for step, (got_scores, want) in enumerate(zip(seen, expected, strict=True)):
        of = f"the scores that choose saw in step {step}, with min_tokens={min_tokens}"
        check_close(got_scores, want, tolerance=0.0, of=of)
    check_close(scores, before, tolerance=0.0, of="the model's own scores after generate")
    reason = "stop" if min_tokens < 6 else "length"
    check_completion(got, [1] * min_tokens, "B" * min_tokens, reason)


def test_loop_with_min_tokens_and_no_end_of_sequence_ids():
    expected = rolling_ids((1, 2), 5)
    got = run(RollingModel(), (1, 2), max_tokens=5, min_tokens=3)
    check_completion(got, expected, LETTERS(expected), "length")


def test_loop_shows_choose_the_scores_and_all_ids():
    prompt, model, seen = [6, 1], RollingModel(), []

    def choose(scores, ids):
        oracle = RollingModel()(ids)
        check_true(torch.equal(scores, oracle), "choose was not called with the model's scores")
        seen.append(list(ids))
        return (sum(ids) * 7 + len(ids)) % 40

    got = run(model, prompt, max_tokens=6, choose=choose)
    ids = list(prompt)
    for _ in range(6):
        ids.append((sum(ids) * 7 + len(ids)) % 40)
    check_completion(got, ids[2:], LETTERS(ids[2:]), "length")
    check_equal(seen, [ids[: 2 + i] for i in range(6)], "the ids that choose was called with")


def test_loop_chooses_the_most_likely_token():
    scores = torch.tensor([1.0, 7.5, 7.5, -2.0])
    got = run(lambda ids: scores, max_tokens=3)
    check_completion(got, [1, 1, 1], "BBB", "length")


def test_loop_leaves_the_prompt_alone():
    prompt = [4, 0, 9]
    first = generate_lab.generate(
        RollingModel(), prompt, LETTERS, max_tokens=4, max_model_len=50, eos_token_ids=()
    )
    check_equal(prompt, [4, 0, 9], "the prompt afterwards")
    second = generate_lab.generate(
        RollingModel(), (4, 0, 9), LETTERS, max_tokens=4, max_model_len=50, eos_token_ids=()
    )
    check_equal(second, first, "the completion of the same prompt as a tuple")
    check_equal(first.token_ids, rolling_ids((4, 0, 9), 4), "token_ids")


BAD_REQUESTS = {
    "empty prompt": ([], {}, ()),
    "max_tokens 0": ([1], {"max_tokens": 0}, (0,)),
    "max_tokens negative": ([1], {"max_tokens": -3}, (-3,)),
    "prompt fills the context": ([1] * 12, {"max_model_len": 12}, (12,)),
    "prompt exceeds the context": ([1] * 57, {"max_model_len": 48}, (57, 48)),
    "empty stop string": ([1], {"stop": ["a", ""]}, ()),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_loop_refuses_bad_requests_before_the_first_step(case):
    prompt, changed, mentions = BAD_REQUESTS[case]
    model, pieces = RollingModel(), []
    arguments = {"max_tokens": 5, "max_model_len": 100, "eos_token_ids": {9}, **changed}
    check_raises(
        ValueError,
        generate_lab.generate,
        model,
        prompt,
        LETTERS,
        on_text=pieces.append,
        mentions=mentions,
        **arguments,
    )
    check_equal(model.calls, [], "the calls of the model")
    check_equal(pieces, [], "what on_text was called with")


def check_text(pieces, stops, reason_without_stop="length", ends_with_eos=False):
    """Let a scripted model say one id a piece; hold everything against brute force."""
    decode = Vocabulary([b"P", *pieces, b"E"])
    ids = list(range(1, len(pieces) + 1))
    eos = len(pieces) + 1
    model = Script([0], [*ids, eos] if ends_with_eos else ids)
    calls = []
    got = run(
        model,
        [0],
        decode,
        max_tokens=len(ids) + ends_with_eos,
        eos_token_ids={eos},
        stop=stops,
        on_text=lambda piece: (calls.append(piece), model.shown.append(piece)),
    )
    text, winner = expected_stop(decode(ids), stops)
    certain = [decode.certain(ids[:count]) for count in range(len(ids) + 1)]
    num_calls = model.num_calls
    if winner is not None:
        done = next(i for i in range(len(ids) + 1) if expected_stop(certain[i], stops)[1])
        reason, num_ids = "stop", next(i for i, t in enumerate(certain) if len(t) >= len(text))
    else:
        done, reason, num_ids = len(ids) + ends_with_eos, reason_without_stop, len(ids)
    check_completion(got, ids[:num_ids], text, reason)
    check_equal("".join(calls), text, "what on_text was called with, joined")
    check_true("" not in calls, f"on_text was called with '': {calls}")
    check_equal(num_calls, done, "how often the model was called")
    shown = [expected_shown(certain[count], stops) for count in range(num_calls)]
    check_equal(model.shown_before_call, shown, "the text that was out before each step")


TEXT_CASES = {
    "across tokens": ([b"ab", b"<st", b"op", b">c", b"d"], ["<stop>"]),
    "in the first token": ([b"<stop>x", b"y"], ["<stop>"]),
    "from the first token on": ([b"<s", b"top", b">"], ["<stop>"]),
    "inside one token": ([b"x", b"y<stop>z", b"w"], ["<stop>"]),
    "in the last token": ([b"ab", b"c<", b"stop>"], ["<stop>"]),
    "several": ([b"abc", b"def", b"g"], ["ef", "bcd"]),
    "one the prefix of another": ([b"xa", b"bc", b"d"], ["abcd", "ab"]),
    "complete at the same character": ([b"a", b"b", b"c", b"d"], ["cd", "bcd"]),
    "the later start first": ([b"ab", b"cd", b"ef", b"g"], ["bcdefg", "de"]),
    "overlapping itself": ([b"a", b"a", b"a", b"b", b"c"], ["aab"]),
    "held at the end": ([b"ab", b"c<", b"sto"], ["<stop>"]),
    "held line breaks at the end": ([b"ab", b" \n", b"\n"], ["\n\n#"]),
    "bytes of characters": (single_bytes("日本。語".encode()), ["。"]),
    "half a character in front": ([b"a\xe6", b"\x97\xa5<", b"stop>"], ["<stop>"]),
    "ids without text": ([b"a", b"", b"b", b"", b"<", b"", b"stop>", b""], ["<stop>"]),
    "ids without text in front": ([b"", b"", b"<stop>"], ["<stop>"]),
    "no stop string": ([b"a", b"<stop>", b"b"], []),
}


@pytest.mark.parametrize("case", TEXT_CASES)
def test_loop_with_a_stop_string(case):
    check_text(*TEXT_CASES[case])


@pytest.mark.parametrize("case", TEXT_CASES)
def test_loop_with_a_stop_string_before_end_of_sequence(case):
    check_text(*TEXT_CASES[case], reason_without_stop="stop", ends_with_eos=True)


# Ids that belong together, so that every é is whole, with ids that carry no text among them.
UNITS = [[b"a"], [b"b"], [b"ab"], [b"ba"], [b""], [b"b\xc3", b"\xa9"], [b"\xc3", b"", b"\xa9a"]]


@settings(max_examples=150)
@given(
    st.lists(st.sampled_from(UNITS), min_size=1, max_size=12),
    st.lists(st.sampled_from(["a", "ab", "aba", "bb", "é", "éa", "bé", "baab"]), max_size=3),
    st.booleans(),
)
def test_loop_cuts_text_and_ids_alike(units, stops, ends_with_eos):
    pieces = [piece for unit in units for piece in unit]
    check_text(pieces, stops, "stop" if ends_with_eos else "length", ends_with_eos)


@pytest.mark.parametrize("eos", [True, False], ids=["end-of-sequence", "max_tokens"])
def test_loop_ends_with_unfinished_bytes_and_held_text_in_order(eos):
    pieces = [b"ab", b"<st", b"\xf0\x9f"]
    model = Script([4], [0, 1, 2, 3])
    shown = []
    got = run(
        model,
        [4],
        Vocabulary([*pieces, b"E", b"P"]),
        max_tokens=4 if eos else 3,
        eos_token_ids={3},
        stop=["<stop>"],
        on_text=shown.append,
    )
    check_completion(got, [0, 1, 2], "ab<st\ufffd", "stop" if eos else "length")
    check_equal("".join(shown), "ab<st\ufffd", "what on_text was called with, joined")


@pytest.mark.parametrize("pieces", [[b"ab", b"\x80", b"c"], [b"ab", b"\xf0"]], ids=str)
def test_loop_with_a_stop_string_of_invalid_bytes(pieces):
    ids = list(range(len(pieces)))
    decode = Vocabulary([*pieces, b"P"])
    got = run(Script([2 + 1], ids), [3], decode, max_tokens=len(ids), stop=[UNFINISHED])
    check_equal(got.text, "ab", "text")
    check_equal(got.finish_reason, "stop", "finish_reason")


def test_loop_keeps_the_prompt_out_of_stop_strings():
    decode = Vocabulary([b"<st", b"op>", b"a"])
    got = run(Script([0], [1, 2]), [0], decode, max_tokens=2, stop=["<stop>"])
    check_completion(got, [1, 2], "op>a", "length")


def test_loop_streams_characters():
    data = "né 日本 👍🏽 ok".encode()
    pieces = cut(data, random.Random(3).sample(range(len(data)), 12))
    check_text(pieces, [])
    check_text(single_bytes(data), ["本 👎", "k!"])


def test_loop_whose_cost_does_not_grow():
    pieces = [b" word", "日".encode(), b"\xc3", b"\xa9", b"<"] * 300
    decode = Vocabulary([*pieces, b"P"])
    model, costs = Script([len(pieces)], range(len(pieces))), []

    def choose(scores, ids):
        costs.append(decode.num_decoded)
        return int(scores.argmax())

    of = f"generate with {len(pieces)} ids"
    got = run(
        model,
        model.prompt,
        decode,
        max_tokens=len(pieces),
        max_model_len=9999,
        stop=["<s>"],
        choose=choose,
    )
    check_equal(got.text, b"".join(pieces).decode(), "text", of=of)
    most = max(after - before for before, after in itertools.pairwise(costs))
    check_true(most <= 500, f"one step passed {most:,} ids to decode; allowed: 500", of=of)


class Ledger(nn.Module):
    """Called like a Qwen; its scores tell every id, every position and their order apart."""

    def __init__(self, device=None):
        super().__init__()
        self.embed_tokens = nn.Embedding(50, 3, device=device)
        self.norm = nn.LayerNorm(3, device=device)
        self.lm_head = nn.Linear(3, 50, bias=False, device=device)
        self.layers = nn.ModuleList()
        self.num_scored = 0

    def forward(self, input_ids, positions, attend):
        check_equal(input_ids.device, self.lm_head.weight.device, "the device of the ids")
        check_equal(positions.device, self.lm_head.weight.device, "the device of the positions")
        check_equal(positions.dtype, torch.int64, "the dtype of the positions")
        products = (input_ids + 1) * (positions + 1)
        return torch.stack((products.cumsum(-1), input_ids, positions), dim=-1).float()

    def logits(self, hidden):
        self.num_scored += hidden[..., 0].numel()
        return self.lm_head(hidden)


@pytest.mark.parametrize("ids", [[7], [3, 3], [49, 0, 12, 12, 5, 1, 30]], ids=len)
def test_next_token_logits_has_every_id_at_its_position(ids):
    model = Ledger()
    row = [sum((token_id + 1) * (i + 1) for i, token_id in enumerate(ids)), ids[-1], len(ids) - 1]
    expected = (model.lm_head.weight.double() @ torch.tensor(row).double()).detach()
    got = generate_lab.next_token_logits(model, ids)
    check_close(got, expected, dtype=torch.float32)


@pytest.mark.parametrize("num_tokens", [1, 2, 300])
def test_next_token_logits_scores_the_last_token_only(num_tokens):
    model = Ledger()
    generate_lab.next_token_logits(model, [i % 50 for i in range(num_tokens)])
    check_equal(model.num_scored, 1, "how many tokens were scored against the vocabulary")


def test_next_token_logits_works_on_the_models_device():
    got = generate_lab.next_token_logits(Ledger(device="meta"), [4, 9, 2])
    check_equal(got.device.type, "meta", "the device of the scores")
    check_equal(tuple(got.shape), (50,), "the shape of the scores")


def _plugged_attention(module, query, key, value, mask, scaling, dropout=0.0, **others):
    return others["attend"](module.layer_idx, query, key, value).transpose(1, 2), None


AttentionInterface.register("plugged", _plugged_attention)


class Plugged(nn.Module):
    """A transformers model that is called like a Qwen and leaves attention to `attend`."""

    def __init__(self, original):
        super().__init__()
        inner = copy.deepcopy(original)
        inner.config._attn_implementation = "plugged"
        self.embed_tokens, self.layers = inner.model.embed_tokens, inner.model.layers
        self.norm, self.lm_head = inner.model.norm, inner.lm_head
        self.rotary = inner.model.rotary_emb

    def forward(self, input_ids, positions, attend):
        ids, positions = torch.atleast_2d(input_ids), torch.atleast_2d(positions)
        x = self.embed_tokens(ids)
        rotation = self.rotary(x, positions)
        for layer in self.layers:
            x = layer(x, position_embeddings=rotation, attend=attend)
        return self.norm(x).reshape(*input_ids.shape, -1)

    def logits(self, hidden):
        return self.lm_head(hidden).float()


def make_transformer(kind, dtype=torch.float32, seed=0):
    """A tiny random model of transformers with nothing at its usual value."""
    config_class, model_class = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[kind]
    torch.manual_seed(seed)
    config = config_class(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=70,
        num_hidden_layers=3,
        max_window_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        max_position_embeddings=96,
        attn_implementation="eager",
        **({"head_dim": 20} if kind == "qwen3" else {}),
    )
    model = model_class(config).eval().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.3 if parameter.dim() == 1 else 0.0, 0.3)
    return model


@pytest.mark.parametrize("num_tokens", [1, 2, 17, 40])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_next_token_logits_matches_transformers(kind, num_tokens):
    original = make_transformer(kind)
    ids = torch.randint(61, (num_tokens,), generator=torch.Generator().manual_seed(num_tokens))
    with torch.no_grad():
        expected = original(ids[None]).logits[0, -1]
    got = generate_lab.next_token_logits(Plugged(original), ids.tolist())
    check_close(got, expected)
    check_true(not got.requires_grad, "the scores require a gradient")


def test_next_token_logits_of_a_bfloat16_model_are_float32():
    original = make_transformer("qwen3", torch.bfloat16)
    ids = [3, 60, 0, 22, 22, 9]
    with torch.no_grad():
        expected = original(torch.tensor([ids])).logits[0, -1]
    got = generate_lab.next_token_logits(Plugged(original), tuple(ids))
    # Three layers in bfloat16 whose attention sums in another order.
    check_close(got, expected, dtype=torch.float32, tolerance=0.05)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_loop_completion_matches_transformers(kind):
    original = make_transformer(kind, seed=5)
    prompt = [11, 4, 58, 4, 33]
    expected = original.generate(
        torch.tensor([prompt]),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    model = Plugged(original)
    got = run(
        lambda ids: generate_lab.next_token_logits(model, ids),
        prompt,
        Vocabulary([bytes([33 + i]) for i in range(61)]),
        max_tokens=20,
    )
    check_equal(got.token_ids, expected, "token_ids")
