"""Grades week3/model_runner: choosing for many requests at once, and executing planned steps."""

import contextlib
import copy
import gc
import inspect
import itertools
import math
import random as python_random
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3Config, Qwen3ForCausalLM

from course.grading import History, check_close, check_equal, check_true, lab

runners = lab("week3/model_runner")
managers = lab("week3/block_manager")
paged = lab("week3/paged_attention")
caching = lab("week3/prefix_caching")
schedulers = lab("week3/scheduler")
sampling = lab("week1/sampling")
qwen = lab("week1/qwen")

VOCAB_SIZE = 23
INF = math.inf
PARAMS = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed",
)  # fmt: skip


# Choosing.


def scores(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * scale


def state_of(prompt_ids: Sequence[int] = (0,), output_ids: Sequence[int] = (), **values):
    """Make the state of a request; values: of SamplingParams and SamplingState.

    seed: of its params. drawn_seed: what a state without such a seed has drawn for itself.
    """
    params = {name: values.pop(name) for name in PARAMS if name in values}
    values["seed"] = values.pop("drawn_seed", -1)
    return runners.SamplingState(
        sampling.SamplingParams(**params), tuple(prompt_ids), output_ids=list(output_ids), **values
    )


def in_words(state) -> str:
    """Show a state by what is not as it is for everybody."""
    plain = state_of()
    shown = [
        f"{name}={getattr(held, name)!r}"
        for held, usual, names in (
            (state.params, plain.params, PARAMS),
            (state, plain, ("prompt_ids", "output_ids", "logit_bias", "min_tokens")),
            (state, plain, ("eos_token_ids", "num_logprobs")),
        )
        for name in names
        if getattr(held, name) != getattr(usual, name)
    ]
    if state.params.seed is None and state.params.temperature > 0:
        shown.append(f"seed drawn: {state.seed}")
    return f"({', '.join(shown)})"


FIELDS = (
    "params", "prompt_ids", "logit_bias", "min_tokens", "eos_token_ids", "num_logprobs",
    "output_ids", "seed",
)  # fmt: skip


def fields_of(state) -> dict:
    """Copy what a state holds."""
    return {name: copy.deepcopy(getattr(state, name)) for name in FIELDS}


def oracle_scores(logits: Sequence[float], state) -> list[float]:
    """The scores of one row behind the bias, the penalties and the ban, token by token."""
    params, output_ids = state.params, state.output_ids
    adjusted = [score + state.logit_bias.get(i, 0.0) for i, score in enumerate(logits)]
    for i in {*state.prompt_ids, *output_ids}:
        factor = params.repetition_penalty
        adjusted[i] = adjusted[i] / factor if adjusted[i] > 0 else adjusted[i] * factor
    for i in set(output_ids):
        adjusted[i] -= params.presence_penalty + params.frequency_penalty * output_ids.count(i)
    if len(output_ids) < state.min_tokens:
        adjusted = [-INF if i in state.eos_token_ids else s for i, s in enumerate(adjusted)]
    return adjusted


def oracle_probabilities(adjusted: Sequence[float], params) -> list[float]:
    """What one row is drawn from, in Python's float64."""
    ranked = sorted(range(len(adjusted)), key=lambda i: (-adjusted[i], i))
    if params.temperature == 0:
        return [float(i == ranked[0]) for i in range(len(adjusted))]
    weights = [math.exp((score - adjusted[ranked[0]]) / params.temperature) for score in adjusted]
    kept = ranked[: params.top_k] if params.top_k else ranked
    total, reached, nucleus = sum(weights[i] for i in kept), 0.0, []
    for i in kept:
        if params.top_p < 1 and reached >= params.top_p:
            break
        nucleus.append(i)
        reached += weights[i] / total
    kept = [i for i in nucleus if weights[i] >= params.min_p]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(adjusted))]


def oracle_token(logits: Sequence[float], state) -> int:
    """What one request gets, with week 1's noise for its seed and its place."""
    row = oracle_probabilities(oracle_scores(logits, state), state.params)
    place = len(state.prompt_ids) + len(state.output_ids)
    # Not as a call of the lab's, of which the latest is named where something fails.
    draw = inspect.unwrap(sampling.draw)
    return int(draw(torch.tensor([row]), torch.tensor([state.seed]), torch.tensor([place])))


def check_logprobs(choice, logits: Tensor, num_logprobs: int | None, of: object) -> None:
    """Hold a choice's logprobs against the model's own scores."""
    if num_logprobs is None:
        check_equal((choice.logprob, choice.top), (None, ()), "(logprob, top)", of=of)
        return
    expected = torch.log_softmax(logits.double(), -1)
    check_logprob(choice.logprob, expected[choice.token_id], f"token {choice.token_id}", of)
    best = expected.sort(descending=True, stable=True)
    count = min(num_logprobs, len(logits))
    ids = [pair[0] for pair in choice.top]
    check_equal(ids, best.indices[:count].tolist(), "the ids in top, best first", of=of)
    check_true(all(type(i) is int for i in ids), f"ids in top are no whole numbers: {ids}", of=of)
    for token_id, value in choice.top:
        check_logprob(value, expected[token_id], f"token {token_id}, in top", of)


def check_logprob(got: object, expected: Tensor, whose: str, of: object) -> None:
    check_true(type(got) is float, f"the logprob of {whose} is {got!r}, no float", of=of)
    # What is close to 0, the logarithm of 1, is a small difference of large numbers.
    fits = abs(got - float(expected)) <= 1e-4 * (1 + abs(float(expected)))
    text = f"the logprob of {whose}: got {got:.5g}, expected {float(expected):.5g}"
    check_true(fits, text, of=of)


def check_sample(logits: Tensor, states: Sequence, note: str = "") -> None:
    """Choose for some requests; hold each one's choice to what it would get alone."""
    kept = logits.clone(), [fields_of(state) for state in states]
    got = runners.sample(logits, states)
    rows = [f"row {i}: {in_words(state)}" for i, state in enumerate(states[:4])]
    more = [f"… {len(states) - 4} rows more"] if len(states) > 4 else []
    of = "\n".join([f"sample(logits: {tuple(logits.shape)}){note}", *rows, *more])
    check_equal(torch.equal(logits, kept[0]), True, "logits are as they were", of=of)
    same = [fields_of(state) for state in states] == kept[1]
    check_equal(same, True, "states are as they were", of=of)
    check_equal(len(got), len(states), "how many choices come", of=of)
    for i, (choice, row, state) in enumerate(zip(got, kept[0], states, strict=True)):
        of_row = f"{of}\nthe request of row {i}: {in_words(state)}"
        check_equal(choice.token_id, oracle_token(row.tolist(), state), "token_id", of=of_row)
        check_logprobs(choice, row, state.num_logprobs, of_row)


def check_probabilities(logits: Tensor, states: Sequence) -> None:
    """Hold each row of a distribution to the one that its request would have alone."""
    kept = logits.clone(), [fields_of(state) for state in states]
    got = runners.probabilities(logits, states)
    of = f"probabilities(logits: {tuple(logits.shape)})"
    check_equal(torch.equal(logits, kept[0]), True, "logits are as they were", of=of)
    same = [fields_of(state) for state in states] == kept[1]
    check_equal(same, True, "states are as they were", of=of)
    form = (tuple(got.shape), got.dtype)
    check_equal(form, (tuple(logits.shape), torch.float32), "shape and dtype", of=of)
    for i, (row, state) in enumerate(zip(kept[0].tolist(), states, strict=True)):
        expected = torch.tensor(oracle_probabilities(oracle_scores(row, state), state.params))
        check_close(got[i], expected, of=f"{of}\nthe request of row {i}: {in_words(state)}")


HISTORY = [3, 17, 3, 8, 0, 21, 3, 5, 5]


def requests(count: int, **values) -> list:
    """Requests alike but for their seeds and for how many of their tokens they were given."""
    return [
        state_of(HISTORY[: 1 + i % 5], HISTORY[1 + i % 5 :][: i % 4], seed=1000 + 7 * i, **values)
        for i in range(count)
    ]


@pytest.mark.parametrize("rows, vocab_size", [(1, 30), (5, 22), (3, 700)])
def test_sample_takes_the_most_likely_at_temperature_zero(rows, vocab_size):
    check_sample(scores(rows, vocab_size), requests(rows, temperature=0.0))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 0.4},
        {"temperature": 2.5},
        {"top_k": 4},
        {"top_p": 0.7},
        {"min_p": 0.15},
        {"temperature": 1.7, "top_k": 9, "top_p": 0.8, "min_p": 0.05},
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [1, 12])
def test_sample_draws(rows, values):
    for seed in range(4):
        check_sample(scores(rows, 24, seed=seed), requests(rows, **values))


@pytest.mark.parametrize(
    "values",
    [
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.6},
        {"presence_penalty": 1.0},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 1.0},
        {"frequency_penalty": 1.2},
        {"frequency_penalty": -1.5, "presence_penalty": -0.5},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.7},
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sample_with_penalties(temperature, values):
    for seed in range(4):
        states = requests(8, temperature=temperature, **values)
        check_sample(scores(8, 24, seed=seed), states)


@pytest.mark.parametrize(
    "bias", [{7: 9.0}, {3: -30.0, 5: 4.0, 0: 2.5}, {i: -4.0 + i % 5 for i in range(24)}], ids=len
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sample_with_a_bias(temperature, bias):
    check_sample(scores(8, 24), requests(8, temperature=temperature, logit_bias=bias))


@pytest.mark.parametrize("eos_token_ids", [{5}, {2, 11, 5, 23}, set()], ids=len)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sample_bans_ends_until_min_tokens(temperature, eos_token_ids):
    logits = scores(7, 24)
    logits[:, sorted(eos_token_ids)] += 8.0
    states = [
        state_of(
            HISTORY[:4],
            HISTORY[4 : 4 + count],
            temperature=temperature,
            min_tokens=3,
            eos_token_ids=frozenset(eos_token_ids),
            seed=count,
        )
        for count in (0, 1, 2, 3, 4, 5, 2)
    ]
    check_sample(logits, states)


@pytest.mark.parametrize(
    "values", [{"temperature": 1e4}, {"logit_bias": {0: -9e5, 1: -8e5}}], ids=str
)
def test_sample_bans_ends_whatever_the_other_scores_are(values):
    state = {"min_tokens": 1, "eos_token_ids": frozenset(range(2, 24)), "seed": 4}
    check_sample(scores(30, 24, seed=2), [state_of([1], **state, **values) for _ in range(30)])


@pytest.mark.parametrize("bias", [150.0, -7e4])
def test_sample_with_a_large_bias(bias):
    logits = scores(4, 24)
    logits[:, 3] -= bias
    states = [state_of([1], temperature=t, seed=5, logit_bias={3: bias}) for t in (0, 1, 2, 9)]
    check_sample(logits, states)


BY_HAND = {
    "the bias decides": ([1.0, 3.0, 2.5], {"logit_bias": {0: 2.5}}, 0),
    "two have a bias": ([1.0, 3.0, 2.5], {"logit_bias": {1: -2.0, 2: -0.25}}, 2),
    "the bias is penalised with the score": (
        [1.0, 1.2, 0.0], {"logit_bias": {0: 1.0}, "prompt_ids": [0], "repetition_penalty": 2.0}, 1,
    ),
    "the bias decides the sign that is penalised": (
        [-1.0, -0.5, -9.0],
        {"logit_bias": {0: 1.9}, "prompt_ids": [0, 1], "repetition_penalty": 2.0},
        0,
    ),
    "presence is not for the prompt": (
        [2.0, 1.5], {"prompt_ids": [0, 0], "presence_penalty": 2.0}, 0,
    ),
    "repetition is for the prompt too": (
        [2.0, 1.5], {"prompt_ids": [0, 0], "repetition_penalty": 2.0}, 1,
    ),
    "a biased end is banned": (
        [1.0, 0.0, 0.5],
        {"logit_bias": {0: 50.0}, "min_tokens": 1, "eos_token_ids": frozenset({0})},
        2,
    ),
    "the prompt does not count for min_tokens": (
        [9.0, 0.0, 0.5],
        {"prompt_ids": [1, 1, 1], "min_tokens": 2, "eos_token_ids": frozenset({0})},
        2,
    ),
    "min_tokens is reached": (
        [9.0, 0.0, 0.5],
        {"output_ids": [1, 1], "min_tokens": 2, "eos_token_ids": frozenset({0})},
        0,
    ),
    "ends without min_tokens": ([9.0, 0.0, 0.5], {"eos_token_ids": frozenset({0})}, 0),
}  # fmt: skip


@pytest.mark.parametrize("case", BY_HAND)
@pytest.mark.parametrize("neighbours", [False, True], ids=["alone", "in the middle"])
def test_sample_by_hand(case, neighbours):
    row, values, expected = BY_HAND[case]
    logits, states = torch.tensor([row]), [state_of(temperature=0.0, **values)]
    if neighbours:
        logits = torch.stack([-logits[0], logits[0], logits[0].flip(0)])
        states = [state_of(temperature=0.0), *states, state_of(seed=4)]
    got = runners.sample(logits, states)[len(states) // 2].token_id
    of = f"sample for {states[len(states) // 2 :][0].params}, scores {row}, {values}"
    check_equal(got, expected, "token_id", of=of)


def mixed() -> list:
    """Requests of every kind, none like its neighbour."""
    return [
        state_of(HISTORY[:2], temperature=0.0),
        state_of(HISTORY[:3], seed=5),
        state_of(HISTORY[:5], HISTORY[5:], temperature=0.0, repetition_penalty=3.0),
        state_of(HISTORY[:3], HISTORY[3:6], seed=5, top_k=3, num_logprobs=2),
        state_of(HISTORY, seed=2**63 - 1, temperature=2.0, logit_bias={4: 3.0, 6: -5.0}),
        state_of([1], HISTORY, seed=0, frequency_penalty=1.0, temperature=1.5),
        state_of(HISTORY[:4], seed=5, min_tokens=2, eos_token_ids=frozenset(range(0, 24, 2))),
        state_of(HISTORY[:4], seed=5, top_p=0.6, num_logprobs=0),
        state_of([9], temperature=0.0, num_logprobs=5, logit_bias={1: 20.0}),
        state_of(HISTORY[:1], seed=77, min_p=0.3, presence_penalty=-2.0, top_k=10),
        state_of(HISTORY[:6], drawn_seed=6),
    ]


def test_sample_for_requests_of_every_kind():
    for seed in range(8):
        check_sample(scores(len(mixed()), 24, seed=seed), mixed())
        check_sample(scores(len(mixed()), 24, seed=seed), mixed()[::-1])


@pytest.mark.parametrize("row", range(len(HISTORY) + 2))
def test_sample_whoever_the_neighbours_are(row):
    states, logits = mixed(), scores(11, 24, seed=3)
    got = {}
    for name, order in {
        "alone": [row],
        "twice": [row, row],
        "with all, in their order": list(range(11)),
        "with all, in the opposite order": list(range(10, -1, -1)),
        "with the next one": [(row + 1) % 11, row],
        "with five others": [*((row + 2 * i + 1) % 11 for i in range(5)), row],
    }.items():
        choices = runners.sample(logits[order], [states[i] for i in order])
        got[name] = choices[order.index(row)].token_id
    of = f"the same request and scores: {in_words(states[row])}"
    check_equal(got, dict.fromkeys(got, got["alone"]), "token_id", of=of)


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("num_logprobs", [0, 1, 4, 24, 30])
def test_sample_tells_logprobs_of_the_models_own_scores(num_logprobs, temperature):
    logits = scores(4, 24, seed=num_logprobs)
    states = [
        state_of([3], [4, 4], temperature=temperature, num_logprobs=num_logprobs, **values)
        for values in (
            {"seed": 3},
            {"seed": 3, "logit_bias": {5: 9.0}, "top_k": 2},
            {"seed": 4, "repetition_penalty": 3.0, "frequency_penalty": 2.0},
            {"seed": 5, "min_tokens": 9, "eos_token_ids": frozenset(range(20))},
        )
    ]
    check_sample(logits, states)
    # Scores as large as these have no exponential of their own.
    check_sample(logits * 1000 + 5000, states)


def test_sample_tells_each_as_many_logprobs_as_it_wants():
    logits = scores(6, 24, seed=9)
    wanted = [None, 3, None, 0, 7, 1]
    states = [state_of([1], seed=i, num_logprobs=count) for i, count in enumerate(wanted)]
    check_sample(logits, states)
    check_sample(logits[:3:2], states[:3:2])


def test_probabilities_for_requests_of_every_kind():
    for seed in range(8):
        check_probabilities(scores(len(mixed()), 24, seed=seed), mixed())
        check_probabilities(scores(len(mixed()), 24, seed=seed), mixed()[::-1])


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.0},
        {"temperature": 0.7, "top_k": 5},
        {"repetition_penalty": 1.8, "presence_penalty": 1.0, "frequency_penalty": -0.5},
        {"logit_bias": {7: 9.0, 3: -30.0}},
        {"min_tokens": 3, "eos_token_ids": frozenset({2, 5, 11})},
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [1, 6])
def test_probabilities_with(rows, values):
    check_probabilities(scores(rows, 24, seed=rows), requests(rows, **values))


@pytest.mark.parametrize("row", range(len(HISTORY) + 2))
def test_probabilities_whoever_the_neighbours_are(row):
    states, logits = mixed(), scores(11, 24, seed=4)
    expected = runners.probabilities(logits[[row]], [states[row]])[0]
    for order in ([row, row], list(range(11)), list(range(10, -1, -1)), [(row + 1) % 11, row]):
        got = runners.probabilities(logits[order], [states[i] for i in order])[order.index(row)]
        of = f"the same request and scores among {len(order)}: {in_words(states[row])}"
        check_equal(torch.equal(got, expected), True, "the very same numbers as alone", of=of)


def check_told(logits: Tensor, token_ids: Sequence[int], states: Sequence) -> None:
    kept = logits.clone(), [fields_of(state) for state in states]
    got = runners.make_choices(logits, token_ids, states)
    of = f"make_choices(logits: {tuple(logits.shape)}, token_ids: {list(token_ids)})"
    check_equal(torch.equal(logits, kept[0]), True, "logits are as they were", of=of)
    same = [fields_of(state) for state in states] == kept[1]
    check_equal(same, True, "states are as they were", of=of)
    check_equal([choice.token_id for choice in got], list(token_ids), "the ids", of=of)
    for choice, row, state in zip(got, kept[0], states, strict=True):
        check_logprobs(choice, row, state.num_logprobs, f"{of}\n{in_words(state)}")


@pytest.mark.parametrize("wanted", [[None], [0], [3], [None, None], [2, None, 0, 30]], ids=str)
def test_make_choices_tells_what_was_chosen_by_whomever(wanted):
    logits = scores(len(wanted), 24, seed=7)
    for token_ids in ([i % 24 for i in range(len(wanted))], logits.argmin(-1).tolist()):
        for values in ({}, {"logit_bias": {0: 9.0}, "temperature": 0.3}):
            states = [state_of([1], num_logprobs=count, **values) for count in wanted]
            check_told(logits, token_ids, states)


EXTREMES = [
    {"temperature": 1e-4},
    {"temperature": 1e-30},
    {"temperature": 1e4},
    {"top_p": 1e-9},
    {"top_k": 10**9},
    {"top_k": 1},
    {"min_p": 1.0},
    {"temperature": 1e-4, "top_k": 10**6, "top_p": 1e-6, "min_p": 1.0},
    {"temperature": 0.0},
]


@pytest.mark.parametrize("scale", [2.0, 1e4])
@pytest.mark.parametrize("num_allowed", [24, 3, 1])
def test_sample_at_the_extremes(num_allowed, scale):
    logits = scores(len(EXTREMES), 24, seed=11, scale=scale)
    for row in range(len(EXTREMES)):
        logits[row, scores(24, seed=row).argsort()[num_allowed:]] = -INF
    states = [state_of([2], seed=40 + i, **values) for i, values in enumerate(EXTREMES)]
    check_probabilities(logits, states)
    check_sample(logits, states, f", of each row {num_allowed} scores are finite")


def test_sample_whatever_is_not_used():
    logits, at_zero = scores(1, 24, seed=12), {"temperature": 0.0, "seed": 8}
    for plain, others in (
        (at_zero, [{"top_k": 5, "top_p": 0.2, "min_p": 0.9}, {"seed": 3}, {"seed": None}]),
        (
            {"seed": 8},
            [
                {"num_logprobs": 3},
                {"min_tokens": 30},
                {"eos_token_ids": frozenset(range(24))},
                {"logit_bias": {5: 0.0}},
                {"repetition_penalty": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
            ],
        ),
    ):
        expected = runners.sample(logits, [state_of([2], **plain)])[0].token_id
        for values in others:
            got = runners.sample(logits, [state_of([2], **{**plain, **values})])[0].token_id
            of = f"sample for {plain}, and then for {plain | values}"
            check_equal(got, expected, "token_id", of=of)


def completion(state, count: int = 12) -> list[int]:
    """Choose again and again from the same even scores."""
    for _ in range(count):
        state.output_ids.append(runners.sample(torch.zeros(1, 500), [state])[0].token_id)
    return state.output_ids


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_sample_repeats_itself_with_a_seed(seed):
    first = completion(state_of([1, 2, 3], seed=seed))
    torch.manual_seed(99)
    python_random.seed(99)
    again = completion(state_of([1, 2, 3], seed=seed))
    of = f"sample, 12 times from 500 even scores, seed {seed}"
    check_equal(again, first, "the tokens of the second time", of=of)
    check_true(len(set(first)) > 6, f"12 draws give {len(set(first))} different tokens", of=of)
    other = completion(state_of([1, 2, 3], seed=seed ^ 5))
    check_true(other != first, f"seed {seed ^ 5} gives the same tokens", of=of)


def test_sample_takes_the_states_seed():
    of = "sample, 12 times from 500 even scores, for ten requests without a seed"
    texts = []
    for _ in range(10):
        torch.manual_seed(1)
        python_random.seed(1)
        state = state_of([1])
        texts.append(tuple(completion(state)))
        # Who has this number as a seed of its own gets the same.
        same = completion(state_of([1], seed=state.seed))
        check_equal(same, list(texts[-1]), "what the state's seed gives to another request", of=of)
    check_equal(len(set(texts)), 10, "how many of the completions differ", of=of)


# Executing.


class SumModel(nn.Module):
    """A model whose scores are looked up by an exact sum over every token and its position.

    Its queries are zeros, so that attention gives the mean of the values that a token sees; these
    are whole numbers, so that the mean times their number is one again, however it was added up.
    The last number of a token's hidden state is its place in the pass.
    """

    NUM_SCORES = 4093

    def __init__(self, limit: int, watch: Callable[[Tensor, Tensor], None]):
        super().__init__()
        self.config = SimpleNamespace(
            vocab_size=VOCAB_SIZE,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=3,
            max_position_embeddings=limit,
        )
        self.embed_tokens = nn.Embedding(VOCAB_SIZE, 2)
        generator = torch.Generator().manual_seed(1)
        self.scores = 3 * torch.randn(self.NUM_SCORES, VOCAB_SIZE, generator=generator)
        self.watch = watch
        self.scored: list[int] = []

    def values(self, layer: int, ids: Tensor, positions: Tensor) -> Tensor:
        """Hash ids and positions into small whole numbers: (tokens, 3)."""
        place = torch.tensor([3, 8, 11]) + 17 * layer
        mixed = (ids[:, None] + 5) * (positions[:, None] + place) * 31 + ids[:, None] * place
        return mixed % 29

    def forward(self, input_ids: Tensor, positions: Tensor, attend) -> Tensor:
        self.watch(input_ids, positions)
        parts = []
        for layer in range(2):
            v = self.values(layer, input_ids, positions).float()[None]
            q = torch.zeros(2, len(input_ids), 3)
            means = attend(layer, q, torch.ones_like(v), v)
            parts.append((means[1] * (positions + 1)[:, None]).round())
        return torch.cat([*parts, torch.arange(float(len(input_ids)))[:, None]], dim=-1)

    def look_up(self, sums: Tensor) -> Tensor:
        factors = torch.tensor([1, 37, 211, 5, 401, 97])
        return self.scores[(sums.long() * factors).sum(-1) % self.NUM_SCORES]

    def logits(self, hidden: Tensor) -> Tensor:
        self.scored += hidden[..., -1].long().flatten().tolist()
        return self.look_up(hidden[..., :-1])

    def expected(self, ids: Sequence[int]) -> Tensor:
        """Score what follows a whole sequence."""
        ids = torch.tensor(list(ids))
        positions = torch.arange(len(ids))
        return self.look_up(
            torch.cat([self.values(layer, ids, positions).sum(0) for layer in range(2)])
        )


def plain_attend(cache, batch):
    """Attend with even weights, token by token."""
    size = cache.keys.shape[3]
    starts, lengths = batch.cu_seqlens_q.tolist(), batch.seq_lens.tolist()
    tables, slots = batch.block_tables.tolist(), batch.slots.tolist()

    def attend(layer, q, k, v):
        values, out = cache.values[layer], torch.empty_like(q)
        for token, slot in enumerate(slots):
            values[slot // size, :, slot % size] = v[:, token]
        for row, num_tokens in enumerate(lengths):
            places = torch.arange(num_tokens)
            blocks = torch.tensor(tables[row])[places // size]
            seen = values[blocks, 0, places % size].cumsum(0) / (places + 1)[:, None]
            here = slice(starts[row], starts[row + 1])
            out[:, here] = seen[num_tokens - (here.stop - here.start) :]
        return out

    return attend


KINDS = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 1.5, "drawn_seed": 1},
    "seeded": {"temperature": 1.2, "seed": 6},
    "penalised": {"repetition_penalty": 1.4, "frequency_penalty": 0.8, "seed": 3},
    "present": {"temperature": 0.0, "presence_penalty": 2.0},
    "biased": {"temperature": 0.0, "logit_bias": {3: 4.0, 9: -2.0}, "num_logprobs": 2},
    "unending": {
        "temperature": 0.0, "min_tokens": 3, "eos_token_ids": frozenset(range(0, VOCAB_SIZE, 2)),
    },
}  # fmt: skip


UNSEEDED = {"unseeded": {"temperature": 1.5}}


def prompt_of(request_id: str, num_tokens: int) -> list[int]:
    return python_random.Random(request_id).choices(range(VOCAB_SIZE), k=num_tokens)


@dataclass
class Job:
    """What the oracle knows of a request. ids: of all its tokens."""

    ids: list[int]
    kept: object
    state: object
    num_computed: int = 0
    known: bool = True

    @property
    def num_lacking(self) -> int:
        return len(self.ids) - self.num_computed


class Desk:
    """A runner beside the oracle, which plans the steps; every pass and every choice is compared.

    The free blocks of the pool lie in a random order, and no slot that nobody wrote holds a number.
    judges: whether it is the desk that chooses, in the place of choose_one.
    """

    def __init__(
        self, max_num_seqs=6, token_budget=40, block_size=4, max_model_len=48, judges=False
    ):
        num_blocks = 60
        self.block_size = block_size
        self.blocks = managers.BlockManager(num_blocks, block_size)
        names = list(range(num_blocks))
        for name in names:
            self.blocks.allocate(name, 1)
        python_random.Random(block_size).shuffle(names)
        for name in names:
            self.blocks.free(name)
        self.model = SumModel(max_model_len, self.watch_tokens)
        shape = 2, num_blocks, 1, block_size, 3
        self.cache = SimpleNamespace(
            keys=torch.full(shape, math.nan), values=torch.full(shape, math.nan)
        )
        limits = max_num_seqs, token_budget, max_model_len
        self.token_budget, self.max_num_seqs = token_budget, max_num_seqs
        choose = [self.judge] if judges else []
        self.runner = runners.ModelRunner(
            self.model, self.cache, self.blocks, *limits, self.make_attend, *choose
        )
        self.judges, self.num_judged = judges, 0
        self.guesses: dict[str, tuple[list[int], int]] = {}
        self.expected: dict[str, list] = {}
        names = ("block_size", "max_num_seqs", "token_budget", "max_model_len")
        inside = zip(names, (block_size, *limits), strict=True)
        text = ", ".join(f"{name}={value}" for name, value in inside)
        self.of = History(f"ModelRunner({text})")
        self.jobs: dict[str, Job] = {}
        self.parts: list = []
        self.lost: list[str] = []
        self.batches: list = []
        self.passes: list[tuple[Tensor, Tensor]] = []

    def add(
        self, request_id: str, num_tokens: int, kind: str = "greedy", beside: str = "", **values
    ) -> None:
        """Add a request. beside: another one, like which it begins, and whose blocks it shares."""
        before = self.jobs[beside].ids if beside else []
        ids = [*before, *prompt_of(request_id, num_tokens)][:num_tokens]
        state = state_of(ids, **(values or (KINDS | UNSEEDED)[kind]))
        self.runner.add(request_id, state)
        kept = copy.deepcopy(state)
        job = self.jobs[request_id] = Job(list(ids), kept, state)
        text = f"add {request_id}: a prompt of {num_tokens}, {kind}"
        if beside:
            common = min(self.jobs[beside].num_computed, num_tokens - 1) // self.block_size
            table = self.blocks.block_table(beside)[:common]
            job.num_computed = common * self.block_size
            self.blocks.allocate(request_id, job.num_computed, table)
            text += f", which shares {common} blocks of {beside}"
        self.of.note(text, None)

    def remove(self, request_id: str) -> None:
        self.runner.remove(request_id)
        self.of.note(f"remove {request_id}", None)
        if request_id in self.jobs:
            self.blocks.free(request_id)
            del self.jobs[request_id]

    def lose(self, request_id: str) -> None:
        """Let a request lose its blocks, to others."""
        self.blocks.free(request_id)
        self.jobs[request_id].num_computed = 0
        self.lost.append(request_id)
        self.of.note(f"{request_id} loses its blocks", None)

    def guess(self, request_id: str, num_guesses: int, num_kept: int) -> None:
        """Add guesses in the next step, of which the first num_kept are accepted."""
        guesses = prompt_of(f"{request_id}{len(self.jobs[request_id].ids)}", num_guesses)
        self.guesses[request_id] = guesses, num_kept
        self.of.note(f"{num_guesses} guesses for {request_id}, {num_kept} to be accepted", None)

    def step(self, counts: dict[str, int], gone: Sequence[str] = ()) -> None:
        """Do one step. gone: who is removed from the runner when the step is planned already."""
        self.parts, self.num_judged, self.expected = [], 0, {}
        for request_id, count in counts.items():
            job = self.jobs[request_id]
            start, end = job.num_computed, job.num_computed + count
            guesses = tuple(self.guesses.get(request_id, ((), 0))[0])
            assert 0 < count <= job.num_lacking
            assert self.blocks.allocate(request_id, end + len(guesses))
            catches_up = end == len(job.ids)
            ids = tuple(job.ids[start:end]) + guesses
            self.parts.append(
                schedulers.Scheduled(request_id, start, ids, len(guesses), catches_up)
            )
        for request_id in gone:
            self.runner.remove(request_id)
            self.jobs[request_id].known = False
        self.batches, self.passes, self.model.scored = [], [], []
        step = schedulers.Step(tuple(self.parts), tuple(self.lost))
        shares = [f"{p.request_id} {len(p.token_ids)}" for p in self.parts]
        removed = f", and {', '.join(gone)} removed before it" if gone else ""
        self.of.note(f"execute({', '.join(shares)}){removed}", None)
        self.lost = []
        got = self.runner.execute(step)
        check_equal(len(self.passes), 1, "how many passes of the model the step made", of=self.of)
        self.check_scored()
        self.check_choices(got)
        self.guesses = {}

    def make_attend(self, cache, batch):
        self.batches.append(batch)
        once = len(self.batches) == 1
        check_true(once, "make_attend is called a second time in one step", of=self.of)
        check_true(cache is self.cache, "make_attend got another cache", of=self.of)
        for name in ("slots", "block_tables", "cu_seqlens_q", "seq_lens"):
            dtype = getattr(batch, name).dtype
            check_equal(dtype, torch.int64, f"dtype of {name}", of=self.of)
        self.check_form(batch)
        return plain_attend(cache, batch)

    def check_form(self, batch) -> None:
        """Hold shapes and numbers of a batch to the step, before anybody uses them."""
        counts = [len(part.token_ids) for part in self.parts]
        num_seqs, ones = len(counts), counts.count(1)
        for name, shape in (
            ("slots", (sum(counts),)),
            ("cu_seqlens_q", (num_seqs + 1,)),
            ("seq_lens", (num_seqs,)),
        ):
            check_equal(tuple(getattr(batch, name).shape), shape, f"shape of {name}", of=self.of)
        got = int(batch.num_decodes)
        check_equal(got, ones, "num_decodes (how many have one token)", of=self.of)
        at_least = int(batch.max_seqlen_q) >= max(counts)
        text = f"max_seqlen_q is {batch.max_seqlen_q}, and a sequence has {max(counts)} tokens"
        check_true(at_least, text, of=self.of)
        starts = batch.cu_seqlens_q.tolist()
        check_equal(starts[0], 0, "the first entry of cu_seqlens_q", of=self.of)
        lengths = [end - start for start, end in itertools.pairwise(starts)]
        what = "tokens of the sequences by cu_seqlens_q, sorted"
        check_equal(sorted(lengths), sorted(counts), what, of=self.of)
        what = "tokens of the first num_decodes sequences"
        check_equal(lengths[:ones], [1] * ones, what, of=self.of)
        rows = batch.block_tables
        check_equal(len(rows), num_seqs, "rows of block_tables", of=self.of)
        inside = bool(((rows >= 0) & (rows < self.blocks.num_blocks)).all())
        check_true(inside, f"no block of the pool in block_tables: {rows.tolist()}", of=self.of)

    def watch_tokens(self, input_ids: Tensor, positions: Tensor) -> None:
        """Hold a pass to the parts of the step, whatever their order."""
        self.passes.append((input_ids, positions))
        check_equal(len(self.passes), 1, "how many passes of the model the step makes", of=self.of)
        check_true(not torch.is_grad_enabled(), "the pass records gradients", of=self.of)
        shape = (sum(len(part.token_ids) for part in self.parts),)
        for name, x in (("input_ids", input_ids), ("positions", positions)):
            check_equal((tuple(x.shape), x.dtype), (shape, torch.int64), name, of=self.of)
        self.check_batch(input_ids.tolist(), positions.tolist())

    def check_batch(self, input_ids: list[int], positions: list[int]) -> None:
        check_equal(len(self.batches), 1, "how often make_attend was called", of=self.of)
        batch, left = self.batches[0], list(self.parts)
        starts, slots = batch.cu_seqlens_q.tolist(), batch.slots.tolist()
        self.order = []
        for row, num_tokens in enumerate(batch.seq_lens.tolist()):
            here = slice(starts[row], starts[row + 1])
            ids = tuple(input_ids[here])
            same = [part for part in left if part.token_ids == ids]
            if not same:
                text = f"sequence {row} of the pass has the ids {ids}, as no part that is left"
                check_true(False, text, of=self.of)
            # Of parts with the same tokens, the one whose slots these are.
            part = min(same, key=lambda p: self.slots_of(p) != slots[here])
            left.remove(part)
            self.order.append(part)
            of = f"{self.of}\nthe part of {part.request_id} is sequence {row} of the pass"
            start, end = part.num_computed_tokens, part.num_computed_tokens + len(ids)
            check_equal(positions[here], list(range(start, end)), "positions", of=of)
            check_equal(slots[here], self.slots_of(part), "slots", of=of)
            check_equal(num_tokens, end, "its entry in seq_lens", of=of)
            table = list(self.blocks.block_table(part.request_id))[: -(-end // self.block_size)]
            got = batch.block_tables[row, : len(table)].tolist()
            check_equal(got, table, "its row of block_tables, as far as it has tokens", of=of)

    def slots_of(self, part) -> list[int]:
        table, size = self.blocks.block_table(part.request_id), self.block_size
        start = part.num_computed_tokens
        places = range(start, start + len(part.token_ids))
        return [table[place // size] * size + place % size for place in places]

    def check_scored(self) -> None:
        """Only tokens behind which something is chosen may have been scored."""
        expected, end = [], 0
        for part in self.order:
            end += len(part.token_ids)
            if part.catches_up and self.jobs[part.request_id].known:
                expected += range(end - 1 - part.num_drafts, end)
        what = "which tokens of the pass were scored by model.logits, sorted"
        check_equal(sorted(self.model.scored), expected, what, of=self.of)

    def judge(self, logits: Tensor, parts: Sequence, states: Sequence) -> list[list]:
        """Stand in for choose_one; accept what is to be accepted, and one token more."""
        self.num_judged += 1
        check_equal(self.num_judged, 1, "how often choose was called in the step", of=self.of)
        wanted = [part for part in self.parts if part.catches_up]
        wanted = [part for part in wanted if self.jobs[part.request_id].known]
        names = sorted(part.request_id for part in parts)
        what = "whose parts choose got"
        check_equal(names, sorted(part.request_id for part in wanted), what, of=self.of)
        ids = [self.jobs[part.request_id].ids for part in parts]
        guesses = [self.guesses.get(part.request_id, ([], 0)) for part in parts]
        texts = [
            text + made[:count]
            for text, (made, _) in zip(ids, guesses, strict=True)
            for count in range(len(made) + 1)
        ]
        form = (tuple(logits.shape), logits.dtype)
        what = "shape and dtype of the logits that choose got"
        check_equal(form, ((len(texts), VOCAB_SIZE), torch.float32), what, of=self.of)
        for row, (got, text) in enumerate(zip(logits, texts, strict=True)):
            same = torch.equal(got, self.model.expected(text))
            text = f"row {row} holds the scores behind the tokens {text}"
            check_true(same, f"{text}: it does not", of=self.of)
        for part, state in zip(parts, states, strict=True):
            check_true(part in wanted, f"{part} is no part of the step", of=self.of)
            same = state is self.jobs[part.request_id].state
            check_true(same, f"another state came for {part.request_id}", of=self.of)
        for part, text, (made, num_kept) in zip(parts, ids, guesses, strict=True):
            chosen = [*made[:num_kept], (sum(text) + num_kept) % VOCAB_SIZE]
            self.expected[part.request_id] = [runners.Choice(token_id) for token_id in chosen]
        return [list(self.expected[part.request_id]) for part in parts]

    def check_choices(self, got: dict) -> None:
        expected = {}
        for part in self.parts:
            job = self.jobs[part.request_id]
            job.num_computed += len(part.token_ids) - part.num_drafts
            if part.catches_up and job.known:
                logits = self.model.expected(job.ids)
                tokens = [oracle_token(logits.tolist(), job.kept)]
                if self.judges:
                    tokens = [choice.token_id for choice in self.expected[part.request_id]]
                expected[part.request_id] = tokens, logits
        what = "who gets a token"
        check_equal(sorted(got), sorted(expected), what, of=self.of)
        for request_id, (token_ids, logits) in expected.items():
            job, of = self.jobs[request_id], f"{self.of}\nthe choices of {request_id}"
            check_equal(type(got[request_id]), tuple, "what its choices are in", of=of)
            made = [choice.token_id for choice in got[request_id]]
            check_equal(made, token_ids, "token_ids", of=of)
            if not self.judges:
                check_logprobs(got[request_id][0], logits, job.kept.num_logprobs, of)
            # The guesses that were accepted are computed.
            job.num_computed += len(token_ids) - 1
            job.ids += token_ids
            job.kept.output_ids += token_ids
        for request_id, job in self.jobs.items():
            if job.known:
                what = f"output_ids of {request_id}"
                check_equal(job.state.output_ids, job.kept.output_ids, what, of=self.of)
                what = f"the rest of the state of {request_id} is as it was"
                same = fields_of(job.state) == fields_of(job.kept)
                check_equal(same, True, what, of=self.of)
            else:
                self.blocks.free(request_id)
        self.jobs = {name: job for name, job in self.jobs.items() if job.known}

    def run(self, num_steps: int = 1) -> None:
        """Let everybody compute what is lacking, as far as the budget goes."""
        for _ in range(num_steps):
            left, counts = self.token_budget, {}
            for request_id, job in list(self.jobs.items())[: self.max_num_seqs]:
                if left and job.num_lacking:
                    counts[request_id] = min(left, job.num_lacking)
                    left -= counts[request_id]
            self.step(counts)


def play(script: str, **limits) -> Desk:
    """Follow a script such as "add a 9 greedy, step a 4, step a 5, lose a, run 3".

    "step a 4 b 1": a step of 4 tokens of a and one of b. "run 3": three steps in which everybody
    computes what is lacking. "add b 12 greedy a": b begins like a and shares its blocks. "gone a":
    in the next step, a is removed when the step is planned already. "guess a 3 2": in the next step
    a has three guesses, of which two are accepted.
    """
    desk, gone = Desk(**limits), []
    for word, *rest in (line.split() for line in script.split(",")):
        if word == "add":
            desk.add(rest[0], int(rest[1]), *rest[2:])
        elif word == "step":
            desk.step(dict(zip(rest[::2], map(int, rest[1::2]), strict=True)), gone)
            gone = []
        elif word == "run":
            desk.run(int(rest[0]))
        elif word == "gone":
            gone += rest
        elif word == "guess":
            desk.guess(rest[0], int(rest[1]), int(rest[2]))
        else:
            {"remove": desk.remove, "lose": desk.lose}[word](*rest)
    return desk


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [1, 2, 4, 11])
def test_runner_with_one_request(num_tokens, kind):
    play(f"add a {num_tokens} {kind}, run 7")


@pytest.mark.parametrize("block_size", [1, 2, 3, 16])
def test_runner_with_blocks_of_any_size(block_size):
    play("add a 7, add b 5 seeded, add c 1, run 6", block_size=block_size)


def test_runner_with_several_prompts_in_one_step():
    play("add a 5, add b 9 seeded, add c 2 penalised, step a 5 b 9 c 2, run 3")


def test_runner_with_decodes_and_prompts_in_one_step():
    play("add a 5, add b 3, step a 5 b 3, add c 6, step c 6 a 1 b 1, step a 1 c 1 b 1")


def test_runner_with_a_prompt_between_decodes():
    play("add a 2, add b 3, step a 2 b 3, add c 6 seeded, add d 4, step a 1 c 6 b 1 d 4, run 2")


def test_runner_with_prompts_of_one_token():
    play("add a 1, add b 4, add c 1 seeded, step b 4 a 1 c 1, run 2")


@pytest.mark.parametrize("size", [1, 3, 4, 5, 9, 12])
def test_runner_with_chunks_of_any_size(size):
    desk = Desk()
    desk.add("a", 12, "seeded")
    while desk.jobs["a"].num_computed < 12:
        desk.step({"a": min(size, desk.jobs["a"].num_lacking)})
    desk.run(3)


def test_runner_with_a_chunk_beside_others():
    play(
        "add a 3 seeded, step a 3, add b 17 seeded, step a 1 b 6, step b 6 a 1, step a 1 b 5, run 3"
    )


def test_runner_with_two_tokens_before_one():
    play("add a 3, step a 3, add b 2 seeded, add c 4, step b 2 a 1 c 2, step c 2 b 1 a 1, run 2")


def test_runner_with_a_chunk_of_one_token():
    play("add a 3, step a 3, add b 6, step b 5, step b 1 a 1, run 2")


def test_runner_with_a_partial_chunk_of_one_token():
    play("add a 3, step a 3, add b 6 seeded, step b 1 a 1, step a 1 b 1, step b 4 a 1, run 2")


def test_runner_with_nobody_who_catches_up():
    play("add a 8, add b 9, step a 3 b 4, step a 4 b 4, step b 1 a 1, run 2")


@pytest.mark.parametrize("kind", ["greedy", "seeded", "present"])
def test_runner_with_parts_in_any_order(kind):
    script = ", ".join(
        f"add {name} {n} {kind}" for name, n in zip("abcd", (3, 5, 2, 4), strict=True)
    )
    play(f"{script}, step d 4 b 5 a 3 c 2, step c 1 a 1 d 1 b 1, step b 1 d 1 a 1 c 1")


def test_runner_with_the_same_prompt_twice():
    play("add a 9 seeded, add b 9 drawn a, add c 9 greedy a, run 4")


@pytest.mark.parametrize("shared", [4, 8, 9, 13])
def test_runner_with_a_prefix_that_is_there(shared):
    script = f"add b {shared} penalised a, run 4, add c {shared} present b, run 2"
    play(f"add a 12 seeded, step a 12, {script}")


def test_runner_with_a_prefix_and_a_chunk_behind_it():
    play("add a 9, step a 9, add b 20 seeded a, step a 1 b 3, step b 5 a 1, step b 4 a 1, run 2")


@pytest.mark.parametrize("kind", KINDS)
def test_runner_with_a_request_that_lost_its_blocks(kind):
    play(f"add a 6 {kind}, add b 5 {kind}, run 3, lose b, step a 1, step a 1 b 8, run 3")


def test_runner_with_a_lost_request_in_chunks():
    play("add a 6 penalised, run 4, lose a, step a 3, step a 5, step a 2, run 2")


def test_runner_with_a_request_that_lost_its_blocks_in_its_prompt():
    play("add a 9 seeded, add b 3, step a 4 b 3, lose a, step b 1, step a 7 b 1, step a 2, run 3")


def test_runner_with_blocks_that_change_hands():
    script = "add a 30, add b 30 seeded, run 2, lose a, add c 20, step c 20 b 1, lose b, step c 1"
    play(f"{script}, step a 31, step b 32, run 3", block_size=2)


def test_runner_with_a_short_table_behind_a_long_one():
    play("add a 38, run 2, remove a, add b 2, run 2, add c 30 seeded, run 2, remove b, run 1")


def test_runner_with_a_table_that_grows():
    play("add a 2, add b 7 seeded, run 20", block_size=2)


@pytest.mark.parametrize("block_size", [3, 4])
def test_runner_up_to_its_limits(block_size):
    desk = Desk(max_num_seqs=3, token_budget=20, max_model_len=20, block_size=block_size)
    for name, num_tokens in (("a", 18), ("b", 1), ("c", 1)):
        desk.add(name, num_tokens)
    # The whole budget, then everybody at once, then a context that is full.
    desk.run(2)
    for name in "bc":
        desk.remove(name)
    desk.add("d", 19)
    desk.step({"d": 19})
    desk.step({"d": 1})


def test_runner_with_requests_that_come_and_go():
    desk = Desk(max_num_seqs=4, token_budget=30)
    kinds = list(KINDS)
    for i in range(16):
        desk.add(f"r{i}", 1 + (7 * i) % 11, kinds[i % len(kinds)])
        desk.run()
        if i >= 2:
            desk.remove(f"r{i - 2}")


def test_runner_with_an_id_that_comes_again():
    play("add a 4 seeded, run 3, remove a, add a 4 present, run 3, remove a, add a 2 seeded, run 2")


@pytest.mark.parametrize("request_id", ["a", "b", "c"])
def test_runner_with_a_request_that_is_removed_meanwhile(request_id):
    script = f"gone {request_id}, step a 1 b 1 c 1, run 2"
    play(f"add a 3 seeded, add b 4, add c 2 penalised, run 2, {script}")


def test_runner_with_everybody_removed_meanwhile():
    play("add a 3, add b 4, run 2, gone a b, step a 1 b 1, add c 5, run 2")


def test_runner_with_a_prompt_that_is_removed_meanwhile():
    play(
        "add a 3, run 1, add b 9, gone b, step b 9 a 1, add b 5 seeded, gone a, step a 1 b 3, run 2"
    )


def test_runner_removes_nobody():
    play("remove nobody, add a 3, run 1, remove nobody, run 1, remove a, remove a, add b 2, run 2")


@pytest.mark.parametrize("num_guesses, num_kept", [(1, 0), (1, 1), (4, 0), (4, 2), (4, 4)])
def test_runner_with_guesses(num_guesses, num_kept):
    script = f"guess a {num_guesses} {num_kept}, step a 1, guess a 2 1, step a 1, run 2"
    play(f"add a 5 seeded, step a 5, {script}", judges=True)


def test_runner_with_guesses_beside_others():
    script = "guess a 3 1, guess c 2 2, step a 1 b 1 c 1 d 4, guess b 1 0, step b 1 d 3 a 1, run 2"
    play(f"add a 5, add b 2 seeded, add c 3, run 1, add d 7 biased, {script}", judges=True)


def test_runner_with_guesses_behind_a_prompt():
    play("add a 3, add b 9, run 1, lose b, guess b 3 2, step b 10 a 1, run 2", judges=True)


def test_runner_with_guesses_of_who_is_removed_meanwhile():
    script = "guess a 3 1, guess b 2 1, gone a, step a 1 b 1 c 1, run 2"
    play(f"add a 5, add b 2 seeded, add c 3, run 1, {script}", judges=True)


def test_runner_chooses_nothing_where_nobody_catches_up():
    desk = play("add a 8, add b 9, step a 3 b 4, step a 4 b 4", judges=True)
    check_equal(desk.num_judged, 0, "how often choose was called", of=desk.of)


@pytest.mark.parametrize("seed", range(6))
def test_runner_with_any_guesses(seed):
    choose = python_random.Random(seed)
    desk = Desk(block_size=choose.choice([3, 4, 16]), judges=True)
    for number in range(14):
        if len(desk.jobs) < 4:
            desk.add(f"r{number}", choose.randint(1, 6), choose.choice(list(KINDS)))
        counts, left = {}, desk.token_budget
        for name, job in desk.jobs.items():
            counts[name] = choose.choice([1, job.num_lacking])
            left -= counts[name]
        for name, count in counts.items():
            num_guesses = choose.randint(0, min(3, left))
            if num_guesses and count == desk.jobs[name].num_lacking:
                desk.guess(name, num_guesses, choose.randint(0, num_guesses))
                left -= num_guesses
        desk.step(counts)
        for name in [name for name, job in desk.jobs.items() if len(job.ids) > 30]:
            desk.remove(name)


def test_runner_with_logprobs():
    desk = Desk()
    for name, count in (("a", 3), ("b", None), ("c", 0), ("d", 30)):
        desk.add(name, 4, seed=5, num_logprobs=count, temperature=0.7, presence_penalty=1.0)
    desk.run(4)


def test_runner_gives_a_request_the_same_tokens_in_any_company():
    scripts = {
        "alone": "add a 13 seeded, run 8",
        "beside others": "add b 4 drawn, run 2, add a 13 seeded, add c 3, run 8",
        "in chunks": "add a 13 seeded, step a 4, step a 4, step a 4, step a 1, run 7",
        "after it lost its blocks": "add a 13 seeded, run 4, lose a, add b 3 drawn, run 4",
        "in blocks of another size": "add a 13 seeded, run 8",
    }
    got = {}
    for name, script in scripts.items():
        desk = play(script, block_size=3 if "size" in name else 4)
        got[name] = desk.jobs["a"].state.output_ids
    expected = dict.fromkeys(scripts, got["alone"])
    check_equal(got, expected, "output_ids", of="one request with a seed, 8 tokens, five times")


def test_runner_draws_others_for_who_has_no_seed():
    texts = set()
    for _ in range(6):
        torch.manual_seed(5)
        python_random.seed(5)
        texts.add(tuple(play("add a 5 unseeded, run 9").jobs["a"].state.output_ids))
    what = "how many of 6 completions of the same request without a seed differ"
    check_equal(len(texts), 6, what, of="ModelRunner, one request, 9 tokens")


def test_runner_keeps_its_memory_from_step_to_step():
    desk = Desk(max_num_seqs=5, token_budget=30)
    held: dict[str, Tensor] = {}
    for script in ("a 7 b 3", "a 1 b 1", "c 12 a 1", "b 1", "c 1 a 1 b 1"):
        rest = script.split()
        counts = dict(zip(rest[::2], map(int, rest[1::2]), strict=True))
        for name, count in counts.items():
            if name not in desk.jobs:
                desk.add(name, count)
        desk.step(counts)
        (batch,), ((input_ids, positions),) = desk.batches, desk.passes
        now = {"input_ids": input_ids, "positions": positions}
        for name in ("slots", "block_tables", "cu_seqlens_q", "seq_lens"):
            now[name] = getattr(batch, name)
        memories = {x.untyped_storage().data_ptr() for x in now.values()}
        what = "parts of how many tensors the six are"
        check_equal(len(memories), 1, what, of=desk.of)
        # What was there in the first step is still alive, so its memory is nobody else's.
        held = held or now
        moved = [name for name in now if now[name].data_ptr() != held[name].data_ptr()]
        text = f"lie somewhere else than in the first step: {moved}"
        check_true(not moved, text, of=desk.of)


@contextlib.contextmanager
def garbage_collected() -> Iterator[None]:
    """At the end, free what the block made and nothing refers to; older objects take too long."""
    gc.disable()
    try:
        yield
        gc.collect(0)
    finally:
        gc.enable()


def test_runner_keeps_nothing_of_who_was_removed():
    desk, watched = Desk(), {}
    with garbage_collected():
        for name in ("after a token", "before a step", "in a prompt"):
            desk.add(name, 6)
            watched[name] = weakref.ref(desk.jobs[name].state)
        desk.step({"after a token": 6, "in a prompt": 2})
        for name in watched:
            desk.remove(name)
    alive = sorted(name for name, ref in watched.items() if ref() is not None)
    check_equal(alive, [], "whose state is still kept", of=desk.of)


@pytest.mark.parametrize("length", [4, 8, 12, 20, 30, 40, 50, 60, 80, 100])
def test_runner_with_anything(length):
    choose = python_random.Random(length)
    desk = Desk(*choose.choice([(6, 40), (3, 12), (2, 5)]), block_size=choose.choice([1, 3, 4]))
    for i in range(length):
        names = list(desk.jobs)
        if len(names) < desk.max_num_seqs:
            others = [n for n in names if desk.jobs[n].num_computed >= desk.block_size]
            beside = choose.choice(["", *others])
            desk.add(f"r{i}", choose.randint(1, 20), choose.choice(list(KINDS)), beside)
        elif choose.random() < 0.25:
            desk.remove(choose.choice(names))
        elif choose.random() < 0.25:
            desk.lose(choose.choice(names))
        for name in [name for name, job in desk.jobs.items() if len(job.ids) > 40]:
            desk.remove(name)
        counts, left = {}, desk.token_budget
        names = [name for name in desk.jobs if choose.random() < 0.8]
        for name in choose.sample(names, len(names)):
            count = min(left, desk.jobs[name].num_lacking)
            if choose.random() < 0.3 and count:
                count = choose.randint(1, count)
            if count:
                counts[name] = count
                left -= count
        if counts:
            gone = [name for name in counts if choose.random() < 0.05]
            desk.step(counts, gone)


def test_runner_attends_with_paged_attend_where_nothing_is_said():
    model = SumModel(40, lambda input_ids, positions: None)
    blocks = managers.BlockManager(12, 4)
    cache = paged.PagedKVCache(2, 12, 4, 1, 3)
    runner = runners.ModelRunner(model, cache, blocks, 4, 30, 40)
    ids = {name: prompt_of(name, count) for name, count in (("a", 5), ("b", 11))}
    computed, kept = dict.fromkeys(ids, 0), {}
    for name, values in (("a", {"temperature": 0.0}), ("b", {"seed": 6, "temperature": 2.0})):
        runner.add(name, state_of(ids[name], **values))
        kept[name] = state_of(ids[name], **values)
    for counts in ({"a": 5, "b": 7}, {"a": 1, "b": 4}, {"a": 1, "b": 1}, {"b": 1, "a": 1}):
        parts, expected = [], {}
        for name, count in counts.items():
            start, end = computed[name], computed[name] + count
            blocks.allocate(name, end)
            tokens, caught_up = tuple(ids[name][start:end]), end == len(ids[name])
            parts.append(schedulers.Scheduled(name, start, tokens, 0, caught_up))
            computed[name] = end
            if caught_up:
                logits = model.expected(ids[name]).tolist()
                expected[name] = oracle_token(logits, kept[name])
        got = runner.execute(schedulers.Step(tuple(parts), ()))
        of = f"ModelRunner without make_attend, a greedy and b seeded, a step of {counts}"
        tokens = {name: [choice.token_id for choice in got[name]] for name in sorted(got)}
        wanted = {name: [token_id] for name, token_id in sorted(expected.items())}
        check_equal(tokens, wanted, "the tokens", of=of)
        for name, token_id in expected.items():
            ids[name].append(token_id)
            kept[name].output_ids.append(token_id)


FAMILIES = {"Qwen2": (Qwen2Config, Qwen2ForCausalLM), "Qwen3": (Qwen3Config, Qwen3ForCausalLM)}
SHAPE = {
    "vocab_size": 61,
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


def serve(model, prompts: dict[str, list[int]], max_tokens: int, num_blocks: int, budget: int):
    """Run prompts through the week's scheduler; returns (completions, the scheduler)."""
    blocks = caching.CachingBlockManager(num_blocks, 4)
    scheduler = schedulers.Scheduler(blocks, 3, budget, 40)
    cache = paged.PagedKVCache(2, num_blocks, 4, 1, 8)
    runner = runners.ModelRunner(model, cache, blocks, 3, budget, 40)
    states = {}
    for name, prompt_ids in prompts.items():
        scheduler.add(schedulers.Request(name, prompt_ids, max_tokens))
        states[name] = state_of(prompt_ids, temperature=0.0)
        runner.add(name, states[name])
    while scheduler.num_unfinished:
        step = scheduler.schedule()
        chosen = {
            name: [choice.token_id for choice in choices]
            for name, choices in runner.execute(step).items()
        }
        for output in scheduler.update(step, chosen):
            if output.finish_reason is not None:
                runner.remove(output.request_id)
    return {name: state.output_ids for name, state in states.items()}, scheduler


@pytest.mark.parametrize("num_blocks, budget", [(40, 64), (40, 5), (10, 16), (10, 3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_runner_matches_transformers(family, num_blocks, budget):
    runners.sample(torch.zeros(1, 3), [state_of()])
    with both_models(family) as (theirs, ours):
        draw = python_random.Random(family)
        common = draw.choices(range(61), k=9)
        prompts = {f"r{i}": draw.choices(range(61), k=k) for i, k in enumerate((11, 1, 6))}
        prompts |= {f"s{i}": common + draw.choices(range(61), k=k) for i, k in enumerate((2, 7))}
        expected = {}
        for name, prompt_ids in prompts.items():
            ids = list(prompt_ids)
            for _ in range(9):
                ids.append(int(theirs(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            expected[name] = ids[len(prompt_ids) :]
        got, scheduler = serve(ours, prompts, 9, num_blocks, budget)
    of = f"five prompts to a {family}, {num_blocks} blocks of 4, token_budget {budget}"
    preempted = f"{of}, {scheduler.num_preemptions} preemptions"
    for name in prompts:
        check_equal(got[name], expected[name], f"the completion of {name}", of=preempted)
