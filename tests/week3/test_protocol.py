"""Grades week3/protocol: parameters, logprobs, usage, events, streams and whole answers."""

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion, ErrorObject
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from course.grading import GradedFailure, History, check_equal, check_true, describe, lab

protocol = lab("week3/protocol")
engine = lab("week3/engine")
runner = lab("week3/model_runner")

KINDS = ("completion", "chat")
# What ids carry.
PIECES = [
    *(b"a", b"bc", b" the", "é".encode(), "日本".encode(), "😀".encode(), b"", b"\n"),
    *(b"\xf0\x9f", b"\x98\x80", b"a\xc3", b"\xa9b", b"<|end|>", b'"\\', b"A", b"\xc3"),
]
ENGINE_DEFAULTS = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "seed": None,
    "min_tokens": 0,
    "ignore_eos": False,
    "stop": (),
    "stop_token_ids": (),
    "logit_bias": {},
    "logprobs": None,
    "cache_salt": "",
}
PROMPT, CONTEXT = 10, 100


def decode(ids: Sequence[int]) -> str:
    return b"".join(PIECES[i] for i in ids).decode("utf-8", errors="replace")


def body_of(kind: str, params: dict[str, Any]) -> Any:
    """Read a request as a server does, from JSON."""
    if kind == "chat":
        body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **params}
        return protocol.ChatRequest.model_validate_json(json.dumps(body))
    body = {"model": "m", "prompt": "Hi", **params}
    return protocol.CompletionRequest.model_validate_json(json.dumps(body))


def words_of(kind: str, params: dict[str, Any], num_prompt_tokens: int, context: int) -> str:
    fields = json.dumps(params, ensure_ascii=False)
    return f"a {kind} with {fields}: a prompt of {num_prompt_tokens}, max_model_len {context}"


def check_params(
    kind: str,
    params: dict[str, Any],
    changes: dict[str, Any],
    num_prompt_tokens: int = PROMPT,
    context: int = CONTEXT,
) -> None:
    """Hold params_of to the defaults with some changes."""
    max_tokens = 16 if kind == "completion" else context - num_prompt_tokens
    expected = {**ENGINE_DEFAULTS, "max_tokens": max_tokens, **changes}
    got = protocol.params_of(body_of(kind, params), num_prompt_tokens, context)
    of = words_of(kind, params, num_prompt_tokens, context)
    # By its name: beside a wrong solution there may be another module of the same lab.
    is_params = type(got).__name__ == "GenerationParams"
    check_true(is_params, f"returned {describe(got)}, expected GenerationParams", of=of)
    for name, value in expected.items():
        found = getattr(got, name)
        if isinstance(value, tuple) and isinstance(found, list):
            found = tuple(found)
        if found != value or isinstance(found, bool) != isinstance(value, bool):
            text = f"{of}\n{name}: got {found!r}, expected {value!r}"
            raise GradedFailure(text, (name, found), value)


def check_word(got: Any, expected: str | None, what: str, of: object = None) -> None:
    """Hold a name or a short text, and show all of it."""
    if got != expected:
        raise GradedFailure(
            f"{of}\n{what}: got {got!r}, expected {expected!r}", (what, got), expected
        )


def check_refused(kind: str, params: dict[str, Any], name: str) -> None:
    """Hold params_of to a RequestError with status 400 that names what the client wrote."""
    of = words_of(kind, params, PROMPT, CONTEXT)
    body = body_of(kind, params)
    try:
        got = protocol.params_of(body, PROMPT, CONTEXT)
    except protocol.RequestError as error:
        check_equal(error.status, 400, "the status of the RequestError", of=of)
        check_word(error.param, name, "the param of the RequestError", of=of)
        check_true(name in str(error), f"the message {str(error)!r} does not name {name}", of=of)
        if "max_tokens" not in params:
            named = "max_tokens" in str(error).replace("max_completion_tokens", "").split()
            text = f"the message {str(error)!r} names max_tokens, which the client did not write"
            check_true("max_completion_tokens" not in params or not named, text, of=of)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        text = f"{of}\nraised {error!r}; expected a RequestError that names {name}"
        raise GradedFailure(text) from error
    else:
        text = f"{of}\nreturned {describe(got)}; expected a RequestError that names {name}"
        raise GradedFailure(text, asdict(got))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["not given", "null"])
def test_params_that_are_not_given(kind, how):
    names = [*ENGINE_DEFAULTS, "max_tokens", "n", "stream", "user"]
    names += ["top_logprobs", "max_completion_tokens"] if kind == "chat" else []
    check_params(kind, {} if how == "not given" else dict.fromkeys(names), {})


# What a client writes, and what changes for the engine.
GIVEN = {
    "temperature 0": ({"temperature": 0}, {"temperature": 0}),
    "temperature 0.0": ({"temperature": 0.0}, {"temperature": 0}),
    "temperature": ({"temperature": 0.7}, {"temperature": 0.7}),
    "a high temperature": ({"temperature": 2}, {"temperature": 2}),
    "top_p": ({"top_p": 0.5}, {"top_p": 0.5}),
    "top_p 1": ({"top_p": 1}, {"top_p": 1}),
    "top_k": ({"top_k": 5}, {"top_k": 5}),
    "top_k 0": ({"top_k": 0}, {"top_k": 0}),
    "top_k -1": ({"top_k": -1}, {"top_k": 0}),
    "top_k 1": ({"top_k": 1}, {"top_k": 1}),
    "min_p": ({"min_p": 0.1}, {"min_p": 0.1}),
    "repetition_penalty": ({"repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
    "presence_penalty": ({"presence_penalty": -1.5}, {"presence_penalty": -1.5}),
    "frequency_penalty": ({"frequency_penalty": 0.25}, {"frequency_penalty": 0.25}),
    "seed": ({"seed": 7}, {"seed": 7}),
    "seed 0": ({"seed": 0}, {"seed": 0}),
    "one stop string": ({"stop": "end"}, {"stop": ("end",)}),
    "a stop string of one character": ({"stop": "."}, {"stop": (".",)}),
    "stop strings": ({"stop": ["end", "日本"]}, {"stop": ("end", "日本")}),
    "no stop strings": ({"stop": []}, {}),
    "stop_token_ids": ({"stop_token_ids": [3, 5]}, {"stop_token_ids": (3, 5)}),
    "no stop_token_ids": ({"stop_token_ids": []}, {}),
    "max_tokens": ({"max_tokens": 50}, {"max_tokens": 50}),
    "max_tokens 1": ({"max_tokens": 1}, {"max_tokens": 1}),
    "max_tokens above the context": ({"max_tokens": 5000}, {"max_tokens": 5000}),
    "min_tokens": ({"min_tokens": 12}, {"min_tokens": 12}),
    "ignore_eos": ({"ignore_eos": True}, {"ignore_eos": True}),
    "ignore_eos false": ({"ignore_eos": False}, {}),
    "logit_bias": ({"logit_bias": {"5": 1.5, "99": -100}}, {"logit_bias": {5: 1.5, 99: -100}}),
    "logit_bias of id 0": ({"logit_bias": {"0": 0.0}}, {"logit_bias": {0: 0}}),
    "no logit_bias": ({"logit_bias": {}}, {}),
    "cache_salt": ({"cache_salt": "tenant"}, {"cache_salt": "tenant"}),
    "what is not of the engine": (
        {"n": 3, "stream": True, "stream_options": {"include_usage": True}, "user": "me"},
        {},
    ),
    "many at once": (
        {"temperature": 0, "top_p": 0.9, "stop": ["x"], "seed": 1, "max_tokens": 9, "top_k": -1},
        {"temperature": 0, "top_p": 0.9, "stop": ("x",), "seed": 1, "max_tokens": 9},
    ),
}


@pytest.mark.parametrize("case", GIVEN)
@pytest.mark.parametrize("kind", KINDS)
def test_params_that_are_given(kind, case):
    check_params(kind, *GIVEN[case])


# (tokens of the prompt, max_model_len, what the client writes, max_tokens of the engine)
LENGTHS = {
    "completion": [
        (10, 100, {}, 16),
        (95, 100, {}, 16),
        (1, 8, {}, 16),
        (10, 100, {"max_tokens": 3}, 3),
    ],
    "chat": [
        (10, 100, {}, 90),
        (1, 32768, {}, 32767),
        (99, 100, {}, 1),
        (100, 100, {}, 1),
        (250, 100, {}, 1),
        (10, 100, {"max_tokens": 3}, 3),
        (10, 100, {"max_completion_tokens": 4}, 4),
        (10, 100, {"max_completion_tokens": 1}, 1),
        (10, 100, {"max_completion_tokens": 5000}, 5000),
        (10, 100, {"max_tokens": None, "max_completion_tokens": 4}, 4),
        (10, 100, {"max_tokens": 4, "max_completion_tokens": None}, 4),
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_params_how_many_tokens(kind):
    for num_prompt_tokens, context, params, expected in LENGTHS[kind]:
        changes = {"max_tokens": expected}
        check_params(kind, params, changes, num_prompt_tokens, context)


@pytest.mark.parametrize(
    ("kind", "params", "expected"),
    [
        ("completion", {"logprobs": None}, None),
        ("completion", {"logprobs": 0}, 0),
        ("completion", {"logprobs": 1}, 1),
        ("completion", {"logprobs": 20}, 20),
        ("chat", {"logprobs": False}, None),
        ("chat", {"logprobs": None, "top_logprobs": None}, None),
        ("chat", {"logprobs": True}, 0),
        ("chat", {"logprobs": True, "top_logprobs": None}, 0),
        ("chat", {"logprobs": True, "top_logprobs": 0}, 0),
        ("chat", {"logprobs": True, "top_logprobs": 1}, 1),
        ("chat", {"logprobs": True, "top_logprobs": 20}, 20),
    ],
)
def test_params_how_many_logprobs(kind, params, expected):
    check_params(kind, params, {"logprobs": expected})


# What a client writes, and the name that it reads.
REFUSED = {
    "temperature below 0": ({"temperature": -0.1}, "temperature"),
    "top_p 0": ({"top_p": 0}, "top_p"),
    "top_p above 1": ({"top_p": 1.5}, "top_p"),
    "top_k -2": ({"top_k": -2}, "top_k"),
    "min_p above 1": ({"min_p": 2}, "min_p"),
    "repetition_penalty 0": ({"repetition_penalty": 0}, "repetition_penalty"),
    "presence_penalty above 2": ({"presence_penalty": 2.5}, "presence_penalty"),
    "frequency_penalty below -2": ({"frequency_penalty": -2.5}, "frequency_penalty"),
    "seed below 0": ({"seed": -1}, "seed"),
    "seed above 63 bits": ({"seed": 2**63}, "seed"),
    "stop empty": ({"stop": ""}, "stop"),
    "one stop empty": ({"stop": ["a", ""]}, "stop"),
    "max_tokens 0": ({"max_tokens": 0}, "max_tokens"),
    "max_tokens below 0": ({"max_tokens": -5}, "max_tokens"),
    "min_tokens below 0": ({"min_tokens": -1}, "min_tokens"),
    "min_tokens above max_tokens": ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
    "min_tokens above the default": ({"min_tokens": 91}, "min_tokens"),
    "logit_bias above 100": ({"logit_bias": {"5": 101}}, "logit_bias"),
    "logit_bias below -100": ({"logit_bias": {"4": 1, "5": -100.5}}, "logit_bias"),
    **{
        f"logit_bias of {name[:9]!r}": ({"logit_bias": {"4": 1, name: 1}}, "logit_bias")
        for name in (
            "five",
            "",
            " 5",
            "5 ",
            "5.0",
            "-5",
            "+5",
            "1_0",
            "0x5",
            "٣",
            "²",
            "5e0",
            "9" * 5000,
        )
    },
}
ONLY_COMPLETION = {
    "logprobs above 20": ({"logprobs": 21}, "logprobs"),
    "logprobs below 0": ({"logprobs": -1}, "logprobs"),
}
ONLY_CHAT = {
    "max_completion_tokens 0": ({"max_completion_tokens": 0}, "max_completion_tokens"),
    "max_completion_tokens below 0": ({"max_completion_tokens": -1}, "max_completion_tokens"),
    "min_tokens above max_completion_tokens": (
        {"min_tokens": 5, "max_completion_tokens": 3},
        "min_tokens",
    ),
    "both lengths": ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    "both lengths, the same": ({"max_tokens": 3, "max_completion_tokens": 3}, "max_tokens"),
    "top_logprobs above 20": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "top_logprobs below 0": ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    "top_logprobs alone": ({"top_logprobs": 3}, "top_logprobs"),
    "top_logprobs 0 alone": ({"top_logprobs": 0}, "top_logprobs"),
    "top_logprobs without logprobs": ({"logprobs": False, "top_logprobs": 3}, "top_logprobs"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("kind", KINDS)
def test_params_that_are_refused(kind, case):
    check_refused(kind, *REFUSED[case])


@pytest.mark.parametrize("case", ONLY_COMPLETION)
def test_params_of_a_completion_that_are_refused(case):
    check_refused("completion", *ONLY_COMPLETION[case])


@pytest.mark.parametrize("case", ONLY_CHAT)
def test_params_of_a_chat_that_are_refused(case):
    check_refused("chat", *ONLY_CHAT[case])


@settings(max_examples=60)
@given(
    st.sampled_from(KINDS),
    st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.sampled_from([0, 0.3, 1, 1.9]),
            "top_k": st.sampled_from([-1, 0, 1, 40]),
            "top_p": st.sampled_from([0.1, 1]),
            "presence_penalty": st.sampled_from([-2, 0, 0.5]),
            "seed": st.sampled_from([0, 3, 2**63 - 1]),
            "stop": st.sampled_from(["ab", ["ab"], ["ab", "c"], []]),
            "max_tokens": st.sampled_from([1, 16, 70]),
            "ignore_eos": st.booleans(),
            "logit_bias": st.sampled_from([{}, {"1": 5}, {"0": -100, "12": 0.5}]),
        },
    ),
)
def test_params_of_anything(kind, params):
    changes = {name: value for name, value in params.items() if name != "top_k"}
    if params.get("top_k", -1) != -1:
        changes["top_k"] = params["top_k"]
    if "stop" in params:
        stop = params["stop"]
        changes["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    if "logit_bias" in params:
        changes["logit_bias"] = {int(name): bias for name, bias in params["logit_bias"].items()}
    check_params(kind, params, changes)


@dataclass(frozen=True)
class Chosen:
    """What becomes a Choice of the lab week3/model_runner."""

    token_id: int
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()

    def made(self) -> Any:
        return runner.Choice(self.token_id, self.logprob, tuple(self.top))


def choices_of(ids: Sequence[int], num_top: int | None = 2) -> list[Chosen]:
    """Choices whose logprobs tell their ids and places apart; num_top None: without logprobs."""
    if num_top is None:
        return [Chosen(token_id) for token_id in ids]
    made = []
    for place, token_id in enumerate(ids):
        others = [(token_id + 1 + k) % len(PIECES) for k in range(num_top)]
        tops = [(other, -0.25 - k - token_id / 8) for k, other in enumerate(others)]
        # Every second choice is the most likely one, and so one of those that are told.
        if place % 2 == 0 and num_top:
            tops = [(token_id, -0.125 - place / 4), *tops[: num_top - 1]]
            made.append(Chosen(token_id, -0.125 - place / 4, tops))
        else:
            made.append(Chosen(token_id, -8.0 - place / 4, tops))
    return made


def expected_completion_logprobs(choices: Sequence[Chosen], before: str = "") -> dict | None:
    """In the plainest words: what one token after the other adds."""
    if not choices or choices[0].logprob is None:
        return None
    found = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for one in choices:
        by_text = {}
        for token_id, logprob in [(one.token_id, one.logprob), *one.top]:
            text = decode([token_id])
            by_text[text] = max(logprob, by_text.get(text, -9999.0), -9999.0)
        found["tokens"].append(decode([one.token_id]))
        found["token_logprobs"].append(max(one.logprob, -9999.0))
        found["top_logprobs"].append(by_text)
        found["text_offset"].append(len(before))
        before += decode([one.token_id])
    return found


def expected_chat_logprobs(choices: Sequence[Chosen]) -> dict | None:
    if not choices or choices[0].logprob is None:
        return None

    def entry(token_id: int, logprob: float) -> dict:
        text = decode([token_id])
        # A piece that is whole characters is its own UTF-8.
        data = list(PIECES[token_id]) if "\ufffd" not in text else None
        return {"token": text, "bytes": data, "logprob": max(logprob, -9999.0)}

    return {
        "content": [
            {**entry(one.token_id, one.logprob), "top_logprobs": [entry(*pair) for pair in one.top]}
            for one in choices
        ]
    }


def as_json(value: Any, of: object = None) -> Any:
    """What a client reads of a value."""
    try:
        return json.loads(json.dumps(value))
    except TypeError as error:
        raise GradedFailure(f"{of}\n{describe(value)} cannot be written as JSON: {error}") from None


def check_object(got: Any, expected: Any, what: str, of: object = None, path: str = "") -> None:
    """Hold an object of JSON against the right one; a failure names the first difference."""
    where = f"{what}, {path}" if path else what
    if isinstance(expected, dict) and isinstance(got, dict):
        check_equal(sorted(got), sorted(expected), f"the names in {where}", of=of)
        for name in expected:
            check_object(got[name], expected[name], what, of, f"{path}.{name}".lstrip("."))
    elif isinstance(expected, list) and isinstance(got, list) and len(got) == len(expected):
        for i, (mine, right) in enumerate(zip(got, expected, strict=True)):
            check_object(mine, right, what, of, f"{path}[{i}]")
    elif isinstance(expected, (int, float)) and isinstance(got, (int, float)):
        if got != expected or isinstance(got, bool) != isinstance(expected, bool):
            check_equal(got, expected, where, of=of)
    elif isinstance(expected, str) and isinstance(got, str) and len(got + expected) < 90:
        check_word(got, expected, where, of=of)
    else:
        check_equal(got, expected, where, of=of)


def check_logprobs(kind: str, choices: Sequence[Chosen], before: str = "") -> None:
    made = type(choices)(one.made() for one in choices)
    tokens = [
        (decode([one.token_id]), one.logprob, [(decode([i]), p) for i, p in one.top])
        for one in choices
    ]
    of = f"{kind}_logprobs, offset {len(before)}" if kind == "completion" else "chat_logprobs"
    of += f"; (text, logprob, top) of each choice: {tokens}"
    if kind == "completion":
        got = protocol.completion_logprobs(made, decode, len(before))
        expected = expected_completion_logprobs(choices, before)
    else:
        got = protocol.chat_logprobs(made, decode)
        expected = expected_chat_logprobs(choices)
    check_object(as_json(got, of), expected, "the logprobs", of=of)


# Choices by hand.
A, BC, THE, ACUTE, HAN, SMILE, NOTHING, LINE = range(8)
HALF, OTHER_HALF, A_HALF, REST_B, END, QUOTE, CAPITAL_A, LEAD = range(8, 16)
LOGPROBS = {
    "one": [Chosen(A, -0.5, [(A, -0.5), (BC, -1.5)])],
    "a certain one": [Chosen(A, 0.0, [(A, 0.0)])],
    "a certain one after another": [Chosen(BC, -1.0), Chosen(A, 0.0)],
    "without others": [Chosen(A, -0.5), Chosen(BC, -1.5)],
    "not among the most likely": [Chosen(A, -5.0, [(BC, -0.5), (THE, -1.0)])],
    "of several characters": [Chosen(THE, -1.0), Chosen(BC, -2.0), Chosen(A, -3.0)],
    "beyond ASCII": [Chosen(ACUTE, -1.0), Chosen(HAN, -1.0), Chosen(SMILE, -1.0), Chosen(A, -1.0)],
    "without text": [Chosen(NOTHING, -1.0), Chosen(A, -1.0), Chosen(NOTHING, -1.0)],
    "half a character": [Chosen(HALF, -1.0, [(HALF, -1.0), (A, -2.0)])],
    "two halves": [Chosen(HALF, -1.0), Chosen(OTHER_HALF, -2.0), Chosen(A, -3.0)],
    "a letter and half a character": [Chosen(A_HALF, -1.0), Chosen(REST_B, -2.0), Chosen(A, -3.0)],
    "half a character among the most likely": [Chosen(A, -1.0, [(LEAD, -0.5), (A, -1.0)])],
    "special tokens": [Chosen(END, -1.0, [(END, -1.0), (LINE, -2.0)]), Chosen(LINE, -1.0)],
    "the same text twice": [Chosen(A, -3.0, [(HALF, -0.5), (LEAD, -1.0), (A, -3.0)])],
    "the same text as a likelier one": [Chosen(LEAD, -3.0, [(HALF, -0.5), (A, -1.0)])],
    "impossible": [Chosen(A, -math.inf, [(BC, -0.5), (THE, -math.inf)])],
    "almost impossible": [Chosen(A, -10_000.0, [(BC, -9_999.5)]), Chosen(BC, -9_998.5)],
    "quotes": [Chosen(QUOTE, -1.0, [(CAPITAL_A, -0.5), (QUOTE, -1.0)])],
    "none": [],
    "one without logprobs": [Chosen(A)],
    "several without logprobs": [Chosen(A), Chosen(BC), Chosen(NOTHING)],
}


@pytest.mark.parametrize("case", LOGPROBS)
@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_by_hand(kind, case):
    check_logprobs(kind, LOGPROBS[case])


@pytest.mark.parametrize("before", ["", "a", "日本 é", "a" * 1000])
def test_logprobs_after_other_tokens(before):
    for case in ("one", "beyond ASCII", "without text", "two halves"):
        check_logprobs("completion", LOGPROBS[case], before)


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_of_any_sequence(kind):
    check_logprobs(kind, tuple(choices_of([A, HAN, LINE, A_HALF])))


@settings(max_examples=60)
@given(
    st.sampled_from(KINDS),
    st.lists(st.integers(0, len(PIECES) - 1), max_size=8),
    st.sampled_from([None, 0, 1, 3]),
    st.text("a日", max_size=3),
)
def test_logprobs_of_anything(kind, ids, num_top, before):
    check_logprobs(kind, choices_of(ids, num_top), before)


def expected_usage(lengths: Sequence[int], generated: Sequence[int], cached: Sequence[int]) -> dict:
    n = len(generated) // len(lengths)
    firsts = [cached[prompt * n] for prompt in range(len(lengths))]
    return {
        "prompt_tokens": sum(lengths),
        "completion_tokens": sum(generated),
        "total_tokens": sum(lengths) + sum(generated),
        "prompt_tokens_details": {"cached_tokens": sum(firsts)},
    }


# (tokens of each prompt, tokens of each choice, found by each choice)
USAGES = {
    "one choice": ([5], [7], [0]),
    "found in the cache": ([40], [7], [32]),
    "found but for one token": ([33], [1], [32]),
    "an answer without tokens": ([5], [0], [0]),
    "three choices of a prompt": ([40], [1, 2, 3], [16, 32, 32]),
    "the first choice found nothing": ([40], [1, 2], [0, 32]),
    "two prompts": ([5, 50], [7, 8], [0, 48]),
    "two prompts with the same beginning": ([50, 51], [7, 8], [16, 48]),
    "two prompts with two choices each": ([20, 50], [1, 2, 3, 4], [0, 16, 32, 48]),
    "two prompts with three choices each": ([20, 30], [1, 2, 3, 4, 5, 6], [4, 16, 16, 8, 20, 24]),
    "three prompts with two choices each": ([9, 8, 7], [1] * 6, [1, 2, 3, 4, 5, 6]),
}


@pytest.mark.parametrize("case", USAGES)
def test_usage(case):
    lengths, generated, cached = USAGES[case]
    of = f"usage_of: prompts of {lengths}, choices of {generated}, of their prompts found {cached}"
    got = protocol.usage_of(lengths, generated, cached)
    check_object(as_json(got, of), expected_usage(*USAGES[case]), "the usage", of=of)


def data_of(text: Any, of: object = None) -> str:
    """Read one server-sent event, as the standard has it; returns its data."""
    check_true(isinstance(text, str), f"an event is {describe(text)}, expected text", of=of)
    check_true(text.endswith("\n\n"), f"the event {text[-40:]!r} has no empty line as its end", of)
    lines = text.removesuffix("\n\n").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    check_equal(len(lines), 1, f"how many lines stand before the empty one in {text!r}", of=of)
    check_equal(lines[0][:6], "data: ", "how the line begins", of=of)
    return lines[0][6:]


def content_of(text: Any, of: object = None) -> dict[str, Any]:
    """Read one server-sent event; returns the object in it."""
    data = data_of(text, of)
    try:
        found = json.loads(data)
    except ValueError as error:
        raise GradedFailure(f"{of}\nthe data {data[:80]!r} is no JSON: {error}") from None
    check_true(isinstance(found, dict), f"the data {data[:80]!r} is no JSON object", of=of)
    return found


EVENTS = {
    "nothing": {},
    "numbers": {"a": 1, "b": -0.5, "c": [1, [2, {}]]},
    "words of JSON": {"yes": True, "no": False, "none": None},
    "a line break": {"text": "a\nb"},
    "an empty line": {"text": "a\n\nb\n\n"},
    "line breaks of other systems": {"text": "a\r\nb\rc"},
    "what looks like an event": {"text": "\n\ndata: [DONE]\n\n"},
    "quotes": {"text": 'She said "\\n"'},
    "an accent": {"text": "é"},
    "Chinese": {"text": "你好，世界"},
    "an emoji": {"text": "😀👩‍👩‍👧"},
    "names beyond ASCII": {"größe": 1},
    "separators of Unicode": {"text": "a\u2028b\u2029c\x85d"},
    "control characters": {"text": "\x00\x1b[31m\t"},
}


@pytest.mark.parametrize("case", EVENTS)
def test_event(case):
    content = EVENTS[case]
    of = f"event of {content!r}"
    text = protocol.event(content)
    check_object(content_of(text, of), content, "what a client reads", of=of)
    beyond = {c for c in json.dumps(content, ensure_ascii=False) if ord(c) > 127}
    missing = "".join(sorted(beyond - set(text)))
    check_true(not missing, f"{missing!r} does not stand for itself in {text!r}", of=of)


@pytest.mark.parametrize("param", [None, "temperature", "stop"])
@pytest.mark.parametrize("status", [400, 401, 404, 413, 429, 499, 500, 501, 503])
def test_error(status, param):
    message = "temperature must be at least 0, got -1 (日)"
    of = f"error_body({status}, {message!r}, {param!r})"
    body = as_json(protocol.error_body(status, message, param), of)
    kind = "invalid_request_error" if status < 500 else "server_error"
    expected = {"message": message, "type": kind, "param": param, "code": status}
    check_object(body, {"error": expected}, "the error", of=of)
    ErrorObject.model_validate({**body["error"], "code": str(status)})


def test_error_without_a_name():
    body = as_json(protocol.error_body(503, "the engine has stopped"))
    check_equal(body.get("error", {}).get("param", 0), None, "param, when nothing is named")


@dataclass(frozen=True)
class Came:
    """What becomes a Delta of the lab week3/engine."""

    text: str
    choices: Sequence[Chosen] = ()
    finish_reason: str | None = None
    num_cached_tokens: int = 0

    def made(self) -> Any:
        choices = tuple(one.made() for one in self.choices)
        fields = self.finish_reason, self.num_cached_tokens
        return engine.Delta("r", self.text, choices, *fields)


def plain(*ids: int) -> list[Chosen]:
    return choices_of(ids, None)


def told(*ids: int) -> list[Chosen]:
    return choices_of(ids, 2)


# (tokens of each prompt, n, [index and delta, in order])
ANSWERS = {
    "one delta": ([5], 1, [(0, Came("abc", plain(A, BC), "length"))]),
    "a delta for each token": (
        [5],
        1,
        [(0, Came("a", plain(A))), (0, Came("bc", plain(BC))), (0, Came("", (), "stop"))],
    ),
    "the end comes with the last text": (
        [5],
        1,
        [(0, Came("a", plain(A))), (0, Came("bc", plain(BC), "length"))],
    ),
    "several tokens in a delta": (
        [5],
        1,
        [(0, Came("abc the", plain(A, BC, THE))), (0, Came("é", plain(ACUTE), "stop"))],
    ),
    "no text at all": ([5], 1, [(0, Came("", (), "stop"))]),
    "tokens without text": (
        [5],
        1,
        [(0, Came("", plain(NOTHING))), (0, Came("a", plain(A))), (0, Came("", (), "stop"))],
    ),
    "only a token without text": ([5], 1, [(0, Came("", plain(NOTHING), "length"))]),
    "a character of two tokens": (
        [5],
        1,
        [(0, Came("😀", plain(HALF, OTHER_HALF))), (0, Came("", (), "stop"))],
    ),
    "text of a token that is out": (
        [5],
        1,
        [(0, Came("a", told(A_HALF))), (0, Came("\ufffd", (), "length"))],
    ),
    "nothing new": ([5], 1, [(0, Came("")), (0, Came("a", plain(A))), (0, Came("", (), "stop"))]),
    "aborted": ([5], 1, [(0, Came("a", plain(A), None, 4)), (0, Came("", (), "abort"))]),
    "aborted before it began": ([5], 1, [(0, Came("", (), "abort"))]),
    "line breaks and quotes": (
        [5],
        1,
        [(0, Came('\n\n"\\', plain(LINE, LINE, QUOTE))), (0, Came("日", (), "stop"))],
    ),
    "logprobs": (
        [5],
        1,
        [(0, Came("a", told(A))), (0, Came("bc", told(BC))), (0, Came("", (), "stop"))],
    ),
    "logprobs of several tokens in a delta": (
        [5],
        1,
        [
            (0, Came("abc é", told(A, BC, THE))),
            (0, Came("日本", told(HAN, NOTHING))),
            (0, Came("a", told(A), "length")),
        ],
    ),
    "logprobs and held text": (
        [5],
        1,
        [
            (0, Came("", told(NOTHING))),
            (0, Came("b", told(BC))),
            (0, Came("c", told())),
            (0, Came(" the", told(THE, NOTHING, A_HALF))),
            (0, Came("a\ufffd", told(), "length")),
        ],
    ),
    "logprobs of halves": (
        [5],
        1,
        [
            (0, Came("😀", told(HALF, OTHER_HALF))),
            (0, Came("aé", told(A_HALF, REST_B))),
            (0, Came("bc", told(BC), "stop")),
        ],
    ),
    "found in the cache": (
        [40],
        1,
        [(0, Came("a", plain(A), None, 32)), (0, Came("bc", plain(BC), "length", 32))],
    ),
    "found, then aborted": (
        [40],
        1,
        [(0, Came("a", plain(A), None, 32)), (0, Came("", (), "abort", 0))],
    ),
    "two choices in turns": (
        [40],
        2,
        [
            (0, Came("a", told(A), None, 16)),
            (1, Came("bc the", told(BC, THE), None, 32)),
            (1, Came("é", told(ACUTE), "length", 32)),
            (0, Came("日本", told(HAN), None, 16)),
            (0, Came("a", told(A), "stop", 16)),
        ],
    ),
    "the second ends first": (
        [40],
        2,
        [
            (1, Came("", (), "stop", 32)),
            (0, Came("a", plain(A, NOTHING), None, 0)),
            (0, Came("bc", plain(BC), "length", 0)),
        ],
    ),
    "two prompts": (
        [5, 70],
        1,
        [
            (1, Came("a", plain(A, A), None, 64)),
            (0, Came("bc", plain(BC), "length", 0)),
            (1, Came("", (), "stop", 64)),
        ],
    ),
    "two prompts with two choices each": (
        [20, 70],
        2,
        [
            (3, Came("a", told(A), None, 64)),
            (2, Came("bc", told(BC), "length", 48)),
            (0, Came(" the", told(THE), None, 0)),
            (1, Came("a", told(CAPITAL_A), "stop", 16)),
            (3, Came("a", told(A), "length", 64)),
            (0, Came("bc", told(BC, NOTHING), "stop", 0)),
        ],
    ),
}


def head_of(kind: str, lengths: Sequence[int], n: int = 1) -> Any:
    of_kind = protocol.CHAT if kind == "chat" else protocol.COMPLETION
    answer_id = f"{of_kind.id_prefix}7"
    return protocol.AnswerHead(of_kind, answer_id, 1_700_000_000, "m", tuple(lengths), n)


def common(kind: str, name: str) -> dict[str, Any]:
    answer_id = {"chat": "chatcmpl-7", "completion": "cmpl-7"}[kind]
    return {"id": answer_id, "object": name, "created": 1_700_000_000, "model": "m"}


def usage_from(
    lengths: Sequence[int], n: int, deltas: Sequence[tuple[int, Came]]
) -> dict[str, Any]:
    generated, cached = [], []
    for index in range(len(lengths) * n):
        own = [one for i, one in deltas if i == index]
        generated.append(sum(len(one.choices) for one in own))
        cached.append(own[0].num_cached_tokens if own else 0)
    return expected_usage(lengths, generated, cached)


def logprobs_from(
    kind: str, choices: Sequence[Chosen], before: Sequence[Chosen] = ()
) -> dict | None:
    if kind == "chat":
        return expected_chat_logprobs(choices)
    return expected_completion_logprobs(choices, "".join(decode([c.token_id]) for c in before))


class Streamed:
    """A StreamWriter beside what OpenAI would send."""

    def __init__(self, kind: str, lengths: Sequence[int], n: int, include_usage: bool):
        self.kind, self.lengths, self.n = kind, lengths, n
        self.include_usage = include_usage
        self.deltas: list[tuple[int, Came]] = []
        self.of = History(
            f"StreamWriter of a {kind}, prompts of {list(lengths)} tokens, n={n}, "
            f"include_usage={include_usage}"
        )
        self.writer = protocol.StreamWriter(head_of(kind, lengths, n), decode, include_usage)

    def chunk(self, index: int, fields: dict, logprobs: dict | None, reason: str | None) -> dict:
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        part = {"index": index, **fields, "logprobs": logprobs, "finish_reason": reason}
        usage = {"usage": None} if self.include_usage else {}
        return {**common(self.kind, name), "choices": [part], **usage}

    def check(self, what: str, got: Iterable[str], expected: Sequence[dict]) -> None:
        texts = list(got)
        self.of.note(f"{what}: how many events", len(texts))
        chunks = [content_of(text, self.of) for text in texts]
        check_equal(len(chunks), len(expected), f"how many events come of {what}", of=self.of)
        for number, (mine, right) in enumerate(zip(chunks, expected, strict=True)):
            check_object(mine, right, f"event {number} of {what}", of=self.of)
            if self.kind == "chat" and "abort" not in json.dumps(right):
                ChatCompletionChunk.model_validate(mine)

    def open(self) -> None:
        fields = {"delta": {"role": "assistant", "content": ""}}
        indices = range(len(self.lengths) * self.n) if self.kind == "chat" else ()
        expected = [self.chunk(index, fields, None, None) for index in indices]
        self.check("opening()", self.writer.opening(), expected)

    def add(self, index: int, one: Came) -> None:
        is_chat = self.kind == "chat"
        before = [c for i, earlier in self.deltas if i == index for c in earlier.choices]
        self.deltas.append((index, one))
        expected = []
        if one.text != "" or len(one.choices) > 0:
            fields = {"delta": {"content": one.text}} if is_chat else {"text": one.text}
            logprobs = logprobs_from(self.kind, one.choices, before)
            expected.append(self.chunk(index, fields, logprobs, None))
        if one.finish_reason is not None:
            fields = {"delta": {}} if is_chat else {"text": ""}
            expected.append(self.chunk(index, fields, None, one.finish_reason))
        what = f"add({index}, text {one.text!r}, tokens {[c.token_id for c in one.choices]}"
        what += f", {one.finish_reason})"
        self.check(what, self.writer.add(index, one.made()), expected)

    def close(self) -> None:
        *before, end = list(self.writer.closing()) or [""]
        check_equal(data_of(end, self.of), "[DONE]", "the data of the last event", of=self.of)
        expected = []
        if self.include_usage:
            usage = usage_from(self.lengths, self.n, self.deltas)
            expected = [{**self.chunk(0, {}, None, None), "choices": [], "usage": usage}]
        self.check("closing(), without its last event", before, expected)


@pytest.mark.parametrize("include_usage", [False, True], ids=["", "with usage"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ANSWERS)
def test_stream(case, kind, include_usage):
    lengths, n, deltas = ANSWERS[case]
    streamed = Streamed(kind, lengths, n, include_usage)
    streamed.open()
    for index, one in deltas:
        streamed.add(index, one)
    streamed.close()


def test_stream_has_no_usage_unless_it_is_asked_for():
    writer = protocol.StreamWriter(head_of("chat", [3]), decode)
    of = "StreamWriter of a chat, include_usage not given"
    end = Came("a", plain(A), "stop")
    texts = [*writer.opening(), *writer.add(0, end.made()), *writer.closing()]
    check_equal(len(texts), 4, "how many events there are", of=of)
    check_true("usage" not in "".join(texts), "an event speaks of usage", of=of)


@pytest.mark.parametrize("kind", KINDS)
def test_stream_keeps_to_itself(kind):
    lengths, n, deltas = ANSWERS["two choices in turns"]
    both = [Streamed(kind, lengths, n, include_usage=True) for _ in range(2)]
    for streamed in both:
        streamed.of.note("another StreamWriter takes its turn after each call", None)
        streamed.open()
    for index, one in deltas:
        for streamed in both:
            streamed.add(index, one)
    for streamed in both:
        streamed.close()


def check_whole(
    kind: str, lengths: Sequence[int], n: int, deltas: Sequence[tuple[int, Came]]
) -> None:
    shown = [
        (index, one.text, [c.token_id for c in one.choices], one.finish_reason)
        for index, one in deltas
    ]
    of = f"whole_answer of a {kind}, prompts of {list(lengths)} tokens, n={n}\n"
    of += f"(index, text, tokens, finish_reason) of its deltas: {shown}"
    made = ((index, one.made()) for index, one in deltas)
    got = as_json(protocol.whole_answer(head_of(kind, lengths, n), made, decode), of)
    parts = []
    for index in range(len(lengths) * n):
        own = [one for i, one in deltas if i == index]
        text = "".join(one.text for one in own)
        chosen = list(itertools.chain.from_iterable(one.choices for one in own))
        reasons = [one.finish_reason for one in own if one.finish_reason is not None]
        message = {"role": "assistant", "content": text}
        fields = {"message": message} if kind == "chat" else {"text": text}
        logprobs, reason = logprobs_from(kind, chosen), (reasons or ["abort"])[0]
        parts.append({"index": index, **fields, "logprobs": logprobs, "finish_reason": reason})
    name = "chat.completion" if kind == "chat" else "text_completion"
    usage = usage_from(lengths, n, deltas)
    expected = {**common(kind, name), "choices": parts, "usage": usage}
    check_object(got, expected, "the answer", of=of)
    if "abort" not in [part["finish_reason"] for part in parts]:
        official = ChatCompletion if kind == "chat" else Completion
        official.model_validate(got)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ANSWERS)
def test_whole(case, kind):
    check_whole(kind, *ANSWERS[case])


@pytest.mark.parametrize("kind", KINDS)
def test_whole_whose_end_never_came(kind):
    check_whole(kind, [5], 1, [(0, Came("a", plain(A)))])
    check_whole(kind, [5], 1, [])
    check_whole(kind, [5], 2, [(1, Came("a", plain(A), "stop")), (0, Came("a", plain(A)))])


def answer_from(
    lengths: Sequence[int],
    n: int,
    num_top: int | None,
    pieces: Sequence[tuple[int, Sequence[int], bool]],
    ends: Sequence[tuple[str, bool, int]],
) -> tuple[Sequence[int], int, list[tuple[int, Came]]]:
    """Make an answer of what was drawn: deltas of all choices, and an end for each.

    pieces: (number of a choice, ids, whether they bring text). ends: (finish_reason, whether it
    comes with the last text, how many tokens were found in the cache).
    """
    num_choices = len(lengths) * n
    deltas = [
        (number % num_choices, Came(decode(ids) if has_text else "", choices_of(ids, num_top)))
        for number, ids, has_text in pieces
    ]
    for index, (reason, with_text, found) in enumerate(ends[:num_choices]):
        places = [place for place, (i, _) in enumerate(deltas) if i == index]
        if places and with_text:
            deltas[places[-1]] = (index, replace(deltas[places[-1]][1], finish_reason=reason))
        else:
            deltas.append((index, Came("", (), reason)))
        deltas = [
            (i, replace(one, num_cached_tokens=found) if i == index else one) for i, one in deltas
        ]
    return lengths, n, deltas


IDS = st.lists(st.integers(0, len(PIECES) - 1), max_size=3)
ANY_ANSWER = st.builds(
    answer_from,
    st.lists(st.integers(1, 90), min_size=1, max_size=3),
    st.integers(1, 3),
    st.sampled_from([None, 0, 2]),
    st.lists(st.tuples(st.integers(0, 8), IDS, st.booleans()), max_size=8),
    st.tuples(
        *[
            st.tuples(st.sampled_from(["stop", "length"]), st.booleans(), st.just(8 * i))
            for i in range(9)
        ]
    ),
)


@settings(max_examples=60)
@given(st.sampled_from(KINDS), ANY_ANSWER, st.booleans())
def test_stream_of_anything(kind, answer, include_usage):
    lengths, n, deltas = answer
    streamed = Streamed(kind, lengths, n, include_usage)
    streamed.open()
    for index, one in deltas:
        streamed.add(index, one)
    streamed.close()


@settings(max_examples=60)
@given(st.sampled_from(KINDS), ANY_ANSWER)
def test_whole_of_anything(kind, answer):
    check_whole(kind, *answer)
