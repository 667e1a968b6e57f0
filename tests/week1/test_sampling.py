"""Grades week1/sampling: penalties, the distribution to draw from, seeded noise, the sampler."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from course.grading import check_close, check_equal, check_true, lab

sampling_lab = lab("week1/sampling")

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
INF = math.inf


def scores(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * scale


def columns(rows: list[dict]) -> list[torch.Tensor]:
    """The rows' parameters as the four tensors of token_probabilities."""
    rows = [{**OFF, **row} for row in rows]
    return [
        torch.tensor([row["temperature"] for row in rows], dtype=torch.float32),
        torch.tensor([row["top_k"] for row in rows], dtype=torch.int64),
        torch.tensor([row["top_p"] for row in rows], dtype=torch.float32),
        torch.tensor([row["min_p"] for row in rows], dtype=torch.float32),
    ]


def oracle_row(logits, temperature, top_k, top_p, min_p):
    """One row in Python's float64, token by token; None where rounding alone decides who stays."""
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    peak = logits[ranked[0]]
    if temperature == 0:
        return [float(i == ranked[0]) for i in range(len(logits))]
    weights = [math.exp((logit - peak) / temperature) for logit in logits]
    kept = ranked[:top_k] if top_k else ranked
    total, reached, nucleus = sum(weights[i] for i in kept), 0.0, []
    for i in kept:
        nucleus.append(i)
        reached += weights[i] / total
        if top_p < 1 and abs(reached - top_p) < 5e-6 and len(nucleus) < len(kept):
            return None
        if top_p < 1 and reached >= top_p:
            break
    if any(0 < abs(weights[i] - min_p) < 2e-5 * min_p for i in nucleus):
        return None
    kept = [i for i in nucleus if weights[i] >= min_p]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


def oracle_probabilities(logits, rows):
    arguments = zip(logits.tolist(), *(column.tolist() for column in columns(rows)), strict=True)
    return [oracle_row(*row) for row in arguments]


def check_probabilities(logits, rows):
    """Hold the distributions against the oracle, and which tokens have none of it, exactly."""
    expected = torch.tensor(oracle_probabilities(logits, rows), dtype=torch.float64)
    got = sampling_lab.token_probabilities(logits.clone(), *columns(rows))
    check_close(got, expected, dtype=torch.float32)
    # What is below float32's range may come out as 0.
    clear = (expected == 0) | (expected > 1e-30)
    check_equal((got > 0) & clear, (expected > 0) & clear, "which tokens may be drawn")
    total = got.double().sum(-1)
    check_close(total, torch.ones_like(total), tolerance=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.7, 2.0, 100.0, 0.05])
@pytest.mark.parametrize("batch, vocab_size", [(1, 1), (1, 7), (3, 50), (4, 1000)])
def test_token_probabilities_by_temperature(batch, vocab_size, temperature):
    check_probabilities(scores(batch, vocab_size), [{"temperature": temperature}] * batch)


@pytest.mark.parametrize("top_k", [1, 2, 5, 19, 20, 21, 10**6])
def test_token_probabilities_by_top_k(top_k):
    check_probabilities(scores(3, 20), [{"top_k": top_k, "temperature": t} for t in (1, 0.3, 3)])


@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_token_probabilities_by_top_p(top_p):
    check_probabilities(scores(3, 40), [{"top_p": top_p, "temperature": t} for t in (1, 0.3, 3)])


@pytest.mark.parametrize("min_p", [1e-6, 0.02, 0.3, 0.999, 1.0])
def test_token_probabilities_by_min_p(min_p):
    check_probabilities(scores(3, 40), [{"min_p": min_p, "temperature": t} for t in (1, 0.3, 3)])


MIXED = [
    {"temperature": 0.7, "top_k": 3},
    {"temperature": 0.0, "top_k": 5, "top_p": 0.3},
    {"temperature": 1.3, "top_p": 0.8},
    {},
    {"temperature": 2.0, "min_p": 0.2},
    {"temperature": 0.9, "top_k": 12, "top_p": 0.75, "min_p": 0.1},
    {"temperature": 0.0},
    {"temperature": 5.0, "top_k": 200},
    {"temperature": 0.6, "top_k": 1, "top_p": 0.01, "min_p": 1.0},
]


@pytest.mark.parametrize("vocab_size", [13, 130])
def test_token_probabilities_of_rows_with_their_own_parameters(vocab_size):
    check_probabilities(scores(len(MIXED), vocab_size, seed=4), MIXED)
    check_probabilities(scores(len(MIXED), vocab_size, seed=5), MIXED[::-1])


@pytest.mark.parametrize("row", range(len(MIXED)))
def test_token_probabilities_of_a_row_alone_and_in_a_batch(row):
    logits = scores(len(MIXED), 64, seed=6)
    together = sampling_lab.token_probabilities(logits.clone(), *columns(MIXED))
    alone = sampling_lab.token_probabilities(logits[row : row + 1], *columns(MIXED[row : row + 1]))
    check_close(alone, together[row : row + 1])


@pytest.mark.parametrize("row", range(len(MIXED)))
def test_token_probabilities_stay_whatever_other_rows_ask_for(row):
    logits = scores(len(MIXED), 200, seed=7)
    together = sampling_lab.token_probabilities(logits.clone(), *columns(MIXED))
    others = [MIXED[row] if i == row else {"temperature": 0.5} for i in range(len(MIXED))]
    alone = sampling_lab.token_probabilities(logits, *columns(others))
    of = f"row {row} of token_probabilities, when no other row has a filter"
    check_close(alone[row], together[row], tolerance=0.0, of=of)


def by_probability(*probabilities):
    return torch.tensor(probabilities).log()[None]


FILTERS = {
    "the token that crosses top_p stays": ([0.4, 0.35, 0.15, 0.1], {"top_p": 0.6}, [0, 1]),
    "the first token crosses top_p": ([0.15, 0.7, 0.1, 0.05], {"top_p": 0.3}, [1]),
    "top_p counts what top_k left": (
        [0.3, 0.25, 0.2, 0.15, 0.1], {"top_k": 2, "top_p": 0.5}, [0],
    ),
    "top_p comes before min_p": ([0.5, 0.28, 0.12, 0.1], {"top_p": 0.7, "min_p": 0.3}, [0, 1]),
    "min_p is a share of the largest": ([0.25, 0.2, 0.12, 0.43], {"min_p": 0.4}, [0, 1, 3]),
    "filters see the temperature": (
        [0.4, 0.3, 0.2, 0.1], {"temperature": 0.25, "top_p": 0.7}, [0],
    ),
    "min_p sees the temperature": (
        [0.4, 0.3, 0.2, 0.1], {"temperature": 4.0, "min_p": 0.6}, [0, 1, 2, 3],
    ),
    "top_k counts tokens, not values": ([0.1, 0.1, 0.1, 0.7], {"top_k": 2}, [3, 0]),
}  # fmt: skip


@pytest.mark.parametrize("case", FILTERS)
def test_token_probabilities_of_filters_by_hand(case):
    probabilities, row, kept = FILTERS[case]
    logits = by_probability(*probabilities)
    power = 1 / row.get("temperature", 1.0)
    weights = [p**power if i in kept else 0.0 for i, p in enumerate(probabilities)]
    expected = torch.tensor([[weight / sum(weights) for weight in weights]], dtype=torch.float64)
    got = sampling_lab.token_probabilities(logits, *columns([row]))
    check_close(got, expected, dtype=torch.float32)
    check_equal(got > 0, expected > 0, "which tokens may be drawn")


@pytest.mark.parametrize(
    "row, kept",
    [
        ({"top_k": 3}, 3),
        ({"top_p": 0.5}, 4),
        ({"top_p": 0.51}, 5),
        ({"top_p": 1e-9}, 1),
        ({"min_p": 1.0}, 8),
        ({"top_k": 4, "top_p": 0.5}, 2),
        ({"temperature": 0.0}, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("value", [0.0, -3.5, 10_000.0])
def test_token_probabilities_of_ties_where_the_lower_id_ranks_first(value, row, kept):
    rows = [row, {**row, "temperature": row.get("temperature", 2.0)}, {}]
    expected = torch.zeros(3, 8)
    expected[:2, :kept] = 1 / kept
    expected[2] = 1 / 8
    got = sampling_lab.token_probabilities(torch.full((3, 8), value), *columns(rows))
    check_close(got, expected)
    check_equal(got > 0, expected > 0, "which tokens may be drawn")


def test_token_probabilities_of_ties_among_many_tokens():
    # A sort that is not stable keeps short rows in order by accident.
    logits = scores(3, 3000, seed=8).round()
    check_probabilities(logits, [{"top_k": 40}, {"top_k": 1000, "top_p": 0.35}, {"top_k": 1}])


@pytest.mark.parametrize("row", MIXED, ids=str)
def test_token_probabilities_of_tokens_that_are_not_allowed(row):
    logits = scores(4, 20, seed=9)
    logits[0, 5:] = -INF
    logits[1, :19] = -INF
    logits[2, ::2] = -INF
    check_probabilities(logits, [row] * 4)


@pytest.mark.parametrize("temperature", [1e-4, 1e-20, 1e-40])
def test_token_probabilities_at_tiny_temperatures(temperature):
    logits = torch.tensor([[3.0, 1.0, 2.0, -4.0], [2.0, 5.0, -1.0, 5.0], [-9.0, -INF, -8.0, -INF]])
    for row in ({}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.5}, {"top_k": 9, "top_p": 0.2}):
        check_probabilities(logits, [{**row, "temperature": temperature}] * 3)


@pytest.mark.parametrize("temperature", [1e-4, 1e-6, 1e-20])
def test_token_probabilities_of_close_scores_at_tiny_temperatures(temperature):
    # Neighbours in the third case: no two float32 numbers of this size are closer together.
    logits = torch.tensor([[1.0, 1.00001], [-2.00001, -2.0], [1.0, 1.0000001]])
    check_probabilities(logits, [{"temperature": temperature}] * 3)


@pytest.mark.parametrize("temperature", [0.0, 1e-40, 1e-4, 0.5, 1.0, 64.0])
@pytest.mark.parametrize("scale", [1e4, -1e4, 1e8, 3e38])
def test_token_probabilities_of_scores_of_any_magnitude(scale, temperature):
    steps = torch.tensor([[0.5, 0.25, -1.0, 0.125, 1.0], [1.0, 1.0, 0.0, -0.5, 1.0]])
    rows = [{"temperature": temperature, "top_p": 0.9}, {"temperature": temperature}]
    check_probabilities(steps * scale, rows)
    if abs(scale) < 1e5:
        check_probabilities(torch.tensor([[0.0, 1.5, 3.0, 2.25]] * 2) + scale, rows)


def test_token_probabilities_with_parameters_that_are_off():
    logits = scores(3, 30, seed=10)
    plain = sampling_lab.token_probabilities(logits.clone(), *columns([{"temperature": 0.8}] * 3))
    rows = [
        {"temperature": 0.8, "top_k": 30},
        {"temperature": 0.8, "top_k": 31, "top_p": 1.0},
        {"temperature": 0.8, "top_k": 0, "min_p": 0.0},
    ]
    check_close(sampling_lab.token_probabilities(logits, *columns(rows)), plain)


def test_token_probabilities_keep_the_rarest_token_at_top_p_1():
    logits = torch.tensor([[20.0, 0.0, -30.0, -5.0]] * 3)
    rows = [{"top_p": 1.0}, {"top_p": 1.0, "top_k": 4}, {"top_p": 0.5}]
    check_probabilities(logits, rows)


@pytest.mark.parametrize("row", MIXED, ids=str)
def test_token_probabilities_at_temperature_0(row):
    logits = scores(3, 25, seed=11)
    logits[1, [4, 9]] = 50.0
    expected = torch.zeros(3, 25)
    expected[torch.arange(3), torch.tensor([int(logits[0].argmax()), 4, 7])] = 1.0
    logits[2] = -INF
    logits[2, 7] = -1e4
    got = sampling_lab.token_probabilities(logits, *columns([{**row, "temperature": 0.0}] * 3))
    check_close(got, expected, tolerance=0.0)


@settings(max_examples=150)
@given(st.data())
def test_token_probabilities_of_any_parameters(data):
    batch, vocab_size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 24))
    logits = scores(batch, vocab_size, seed=data.draw(st.integers(0, 10**6)), scale=3.0)
    row = st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.0, 0.2, 0.7, 1.0, 1.5, 10.0]),
            "top_k": st.integers(0, vocab_size + 3),
            "top_p": st.sampled_from([1.0, 0.95, 0.8, 0.4, 0.05]),
            "min_p": st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
        }
    )
    rows = data.draw(st.lists(row, min_size=batch, max_size=batch))
    assume(None not in oracle_probabilities(logits, rows))
    check_probabilities(logits, rows)


def test_token_probabilities_leave_their_arguments_alone():
    logits = scores(len(MIXED), 20, seed=12)
    arguments = [logits, *columns(MIXED)]
    before = [argument.clone() for argument in arguments]
    sampling_lab.token_probabilities(*arguments)
    for name, old, new in zip(
        ("logits", "temperature", "top_k", "top_p", "min_p"), before, arguments, strict=True
    ):
        check_close(new, old, tolerance=0.0, of=f"{name} after token_probabilities")


def params(**values):
    return sampling_lab.SamplingParams(**values)


def oracle_penalties(logits, prompt_ids, output_ids, values):
    """The penalties in Python's float64, token by token."""
    repetition = values.get("repetition_penalty", 1.0)
    rows = []
    for token_id, score in enumerate(logits.tolist()):
        count = list(output_ids).count(token_id)
        if count or token_id in prompt_ids:
            score = score / repetition if score > 0 else score * repetition
        if count:
            score -= values.get("presence_penalty", 0.0)
            score -= values.get("frequency_penalty", 0.0) * count
        rows.append(score)
    return torch.tensor(rows, dtype=torch.float64)


HISTORIES = {
    "both": ([3, 3, 7, 0], [1, 7, 7, 7, 4]),
    "prompt only": ([3, 3, 7, 0], []),
    "output only": ([], [1, 1, 5, 9]),
    "neither": ([], []),
    "one of each": ([2], [2]),
    "long": ([i % 4 for i in range(40)], [i % 7 for i in range(50)]),
}
PENALTIES = [
    {},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 1.5},
    {"presence_penalty": -2.0},
    {"frequency_penalty": 0.7},
    {"frequency_penalty": -0.25},
    {"repetition_penalty": 1.7, "presence_penalty": 0.4, "frequency_penalty": 0.3},
]


@pytest.mark.parametrize("values", PENALTIES, ids=str)
@pytest.mark.parametrize("history", HISTORIES)
def test_penalties_match_float64(history, values):
    prompt_ids, output_ids = HISTORIES[history]
    logits = scores(10, seed=1)
    logits[[0, 1]] = torch.tensor([4.0, -4.0])
    logits[7] = 0.0
    expected = oracle_penalties(logits, prompt_ids, output_ids, values)
    got = sampling_lab.apply_penalties(logits, prompt_ids, output_ids, params(**values))
    check_close(got, expected, dtype=torch.float32)


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e30], ids=str)
@pytest.mark.parametrize("vocab_size", [1, 33, 5000])
def test_penalties_of_any_vocabulary_and_magnitude(vocab_size, scale):
    pick = random.Random(vocab_size)
    prompt_ids, output_ids = ([pick.randrange(vocab_size) for _ in range(30)] for _ in range(2))
    values = {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 1.0}
    logits = scores(vocab_size, seed=2, scale=scale)
    expected = oracle_penalties(logits, prompt_ids, output_ids, values)
    got = sampling_lab.apply_penalties(logits, prompt_ids, output_ids, params(**values))
    check_close(got, expected, dtype=torch.float32)


@given(
    st.lists(st.integers(0, 11), max_size=12),
    st.lists(st.integers(0, 11), max_size=12),
    st.sampled_from([0.5, 1.0, 1.25, 2.0]),
    st.sampled_from([-1.0, 0.0, 0.5, 2.0]),
    st.sampled_from([-0.5, 0.0, 0.125, 2.0]),
)
def test_any_penalties_match_float64(prompt_ids, output_ids, repetition, presence, frequency):
    values = {
        "repetition_penalty": repetition,
        "presence_penalty": presence,
        "frequency_penalty": frequency,
    }
    logits = scores(12, seed=len(prompt_ids))
    expected = oracle_penalties(logits, prompt_ids, output_ids, values)
    got = sampling_lab.apply_penalties(logits, prompt_ids, output_ids, params(**values))
    check_close(got, expected, dtype=torch.float32)


def test_penalties_keep_forbidden_tokens_forbidden():
    values = {"repetition_penalty": 1.5, "presence_penalty": -2.0, "frequency_penalty": -1.0}
    logits = torch.tensor([1.0, -INF, -INF, 2.0, -INF])
    expected = oracle_penalties(logits, [1, 0], [2, 2, 3], values)
    got = sampling_lab.apply_penalties(logits, [1, 0], [2, 2, 3], params(**values))
    check_close(got, expected, dtype=torch.float32)


@pytest.mark.parametrize("values", [PENALTIES[0], PENALTIES[-1]], ids=["off", "on"])
def test_penalties_leave_their_arguments_alone(values):
    logits, prompt_ids, output_ids = scores(10), [3, 3, 1], [5, 5, 1]
    before = logits.clone()
    got = sampling_lab.apply_penalties(logits, prompt_ids, output_ids, params(**values))
    got.fill_(7.0)
    of = "logits after apply_penalties, when its result is written to"
    check_close(logits, before, tolerance=0.0, of=of)
    check_equal((prompt_ids, output_ids), ([3, 3, 1], [5, 5, 1]), "the ids after the call")


def test_penalties_take_any_sequence_of_ids():
    values = {"repetition_penalty": 1.5, "frequency_penalty": 1.0}
    logits = scores(10)
    expected = oracle_penalties(logits, (4, 4, 0), range(2, 6), values)
    got = sampling_lab.apply_penalties(logits, (4, 4, 0), tuple(range(2, 6)), params(**values))
    check_close(got, expected, dtype=torch.float32)


# A right solution fails a chi-square test with the probability ALPHA for the noise it happens to
# have; the seeds are fixed, so that a solution that passes once passes always.
ALPHA = 1e-9
Z_OF_ALPHA = 5.998


def chi_square_limit(degrees):
    """Wilson and Hilferty's approximation of the chi-square distribution's upper quantile."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + Z_OF_ALPHA * math.sqrt(spread)) ** 3


def check_counts(counts, expected, of):
    """Hold counts against expected counts; both flat, zeros of `expected` left out."""
    check_true(not bool(counts[expected == 0].any()), "a token of probability 0 was drawn", of=of)
    counts, expected = counts[expected > 0].double(), expected[expected > 0].double()
    statistic = float(((counts - expected) ** 2 / expected).sum())
    limit = chi_square_limit(len(expected) - 1)
    check_true(
        statistic <= limit,
        f"chi-square {statistic:,.0f} with {len(expected) - 1} degrees of freedom; a right "
        f"solution stays below {limit:,.0f} but for one time in {1 / ALPHA:,.0f}",
        of=of,
    )


def draw(probabilities, seeds, positions):
    """Draw a token for every (seed, position) from one distribution."""
    rows = probabilities.expand(len(seeds), -1).contiguous()
    return sampling_lab.draw(rows, seeds, positions)


def constant(value, count):
    return torch.full((count,), value, dtype=torch.int64)


DISTRIBUTIONS = {
    "skewed": [0.5, 0.3, 0.1, 0.05, 0.03, 0.02],
    "with zeros": [0.0, 0.25, 0.0, 0.0, 0.6, 0.15, 0.0, 0.0],
    "two": [0.03, 0.97],
    "even": [1 / 64] * 64,
    "one": [0.0, 0.0, 1.0, 0.0],
}
NUM_DRAWS = 3000
# Whose draws: name -> (seeds, positions).
STREAMS = {
    "one seed": lambda n: (constant(1234, n), torch.arange(n)),
    "seed 0": lambda n: (constant(0, n), torch.arange(n)),
    "the largest seed": lambda n: (constant(2**63 - 1, n), torch.arange(n)),
    "one seed, far positions": lambda n: (constant(99, n), torch.arange(n) + 2**20),
    "position 0 of many seeds": lambda n: (torch.arange(n), constant(0, n)),
    "position 77 of many seeds": lambda n: (torch.arange(n) + 10**9, constant(77, n)),
    "the largest seeds": lambda n: (2**63 - 1 - torch.arange(n), constant(5, n)),
    "seeds apart by 2**32": lambda n: (torch.arange(n) * 2**32 + 7, constant(3, n)),
    "seeds apart by 2**48": lambda n: (torch.arange(n) * 2**48 + 7, constant(3, n)),
    "seeds and positions together": lambda n: (torch.arange(n), torch.arange(n)),
    "seeds up, positions down": lambda n: (torch.arange(n), n - torch.arange(n)),
}


@pytest.mark.parametrize("distribution", ["skewed", "with zeros"])
@pytest.mark.parametrize("stream", STREAMS)
def test_draw_follows_the_probabilities(stream, distribution):
    probabilities = torch.tensor(DISTRIBUTIONS[distribution])
    seeds, positions = STREAMS[stream](NUM_DRAWS)
    tokens = draw(probabilities, seeds, positions)
    counts = torch.bincount(tokens, minlength=len(probabilities))
    of = f"draw of {NUM_DRAWS} tokens, {stream}, from {DISTRIBUTIONS[distribution]}"
    check_counts(counts, probabilities * NUM_DRAWS, of)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_draw_from_every_distribution(distribution):
    probabilities = torch.tensor(DISTRIBUTIONS[distribution])
    tokens = draw(probabilities, constant(5, NUM_DRAWS), torch.arange(NUM_DRAWS))
    counts = torch.bincount(tokens, minlength=len(probabilities))
    of = f"draw of {NUM_DRAWS} tokens from {len(probabilities)} ({distribution})"
    if len(probabilities[probabilities > 0]) == 1:
        check_equal(int(counts[probabilities > 0]), NUM_DRAWS, "how often the only one came", of=of)
    else:
        check_counts(counts, probabilities * NUM_DRAWS, of)


# (step of the seed, step of the position) from one draw to its neighbour.
NEIGHBOURS = [(0, 1), (1, 0), (1, -1), (1, 1), (2, -2), (1, -31), (1, -1000), (2**32, 0)]


@pytest.mark.parametrize("along", ["positions", "seeds"])
@pytest.mark.parametrize("seed_step, position_step", NEIGHBOURS)
def test_draw_of_neighbours_is_independent(seed_step, position_step, along):
    size, count = 8, 1500
    line, still = 2 * torch.arange(count) + 2000, constant(4242, count)
    seeds, positions = (still, line) if along == "positions" else (line, still)
    even = torch.full((size,), 1 / size)
    tokens = draw(even, seeds, positions)
    neighbours = draw(even, seeds + seed_step, positions + position_step)
    pairs = torch.bincount(tokens * size + neighbours, minlength=size * size)
    of = f"{count} pairs of draws along the {along}, at (seed, position) and at (seed + {seed_step}"
    of += f", position + {position_step}), counted as pairs"
    check_counts(pairs, torch.full((size * size,), count / size**2), of)


FACTORS = [10, 100, 1000, 10**6, *(2**power for power in range(4, 33))]
DIGITS = [
    ((1, 23), (12, 3)), ((4, 567), (45, 67)), ((7, 11), (71, 1)), ((100, 256), (1002, 56)),
    ((3, 14159), (314, 159)), ((42, 42), (424, 2)), ((2, 718), (27, 18)), ((9, 99), (99, 9)),
]  # fmt: skip


def mixed_up(first, second):
    """Say which pairs a number made of two others does not tell apart: how it is made -> pairs."""
    pairs = {f"the digits of {first}, then of {second}": DIGITS}
    for k in FACTORS:
        # The same for + and for | and ^, since the first is even where a k goes over.
        pairs[f"{first} * {k} + {second}"] = [
            ((2 * i, k + i % k), (2 * i + 1, i % k)) for i in range(8)
        ]
    return pairs


@pytest.mark.parametrize("first", ["seed", "position"])
def test_draw_tells_every_pair_of_seed_and_position_apart(first):
    """Two pairs that differ get the same of 2,048 even tokens once in 2,048 times.

    A right solution gives 4 or more of 8 the same with a probability below 70 / 2048⁴ = 4e-12 for
    one way to mix them up, and below 3e-10 for all 68 of them together.
    """
    vocab_size = 2048
    ways = mixed_up(first, "position" if first == "seed" else "seed")
    pairs = torch.tensor(list(ways.values()))
    seeds, positions = pairs.flip(-1).unbind(-1) if first == "position" else pairs.unbind(-1)
    even = torch.full((vocab_size,), 1 / vocab_size)
    tokens = draw(even, seeds.flatten(), positions.flatten()).reshape(seeds.shape)
    for way, (name, same) in enumerate(zip(ways, tokens[..., 0] == tokens[..., 1], strict=True)):
        one, other = (f"(seed {seeds[way, 0, i]}, position {positions[way, 0, i]})" for i in (0, 1))
        what = f"{int(same.sum())} of 8 pairs, such as {one} and {other}, got the same token"
        of = f"draw from {vocab_size:,} even tokens, for pairs that agree in {name}"
        check_true(int(same.sum()) < 4, what, of=of)


def test_draw_does_not_depend_on_its_batch():
    count, vocab_size = 40, 30
    rows = torch.softmax(scores(count, vocab_size, seed=3), dim=-1)
    seeds = torch.arange(count) % 7 + 2**40
    positions = torch.arange(count) * 3 % 11
    together = sampling_lab.draw(rows, seeds, positions)
    order = torch.tensor(random.Random(1).sample(range(count), count))
    shuffled = sampling_lab.draw(rows[order], seeds[order], positions[order])
    check_equal(shuffled, together[order], "the tokens, rows in another order")
    part = sampling_lab.draw(rows[25:28], seeds[25:28], positions[25:28])
    check_equal(part, together[25:28], "the tokens of rows 25 to 27 without the others")
    for row in range(count):
        one = slice(row, row + 1)
        alone = sampling_lab.draw(rows[one], seeds[one], positions[one])
        check_equal(alone, together[one], f"the token of row {row} alone")


def test_draw_does_not_depend_on_calls_before_or_on_the_global_generator():
    rows = torch.full((50, 20), 1 / 20)
    seeds, positions = torch.arange(50), torch.arange(50) % 5
    torch.manual_seed(1)
    random.seed(1)
    first = sampling_lab.draw(rows, seeds, positions)
    for _ in range(3):
        sampling_lab.draw(rows[:7], seeds[:7], positions[:7])
    torch.manual_seed(2)
    random.seed(2)
    check_equal(sampling_lab.draw(rows, seeds, positions), first, "the tokens of the same call")


def test_draw_leaves_the_global_generators_alone():
    torch.manual_seed(1)
    state, python_state = torch.get_rng_state(), random.getstate()
    sampling_lab.draw(torch.full((50, 20), 1 / 20), torch.arange(50), torch.arange(50))
    check_equal(torch.get_rng_state(), state, "the state of torch's global generator")
    check_true(random.getstate() == python_state, "Python's global generator was used")


def test_draw_of_rows_with_their_own_distributions():
    count = 2500
    kinds = torch.tensor([[0.7, 0.2, 0.1, 0.0], [0.0, 0.1, 0.2, 0.7], [0.25, 0.25, 0.25, 0.25]])
    which = torch.arange(3 * count) % 3
    tokens = sampling_lab.draw(kinds[which], constant(8, 3 * count), torch.arange(3 * count))
    for kind in range(3):
        counts = torch.bincount(tokens[which == kind], minlength=4)
        probabilities = ", ".join(f"{share:g}" for share in kinds[kind].tolist())
        of = f"every third of {3 * count} rows, drawn from {probabilities}"
        check_counts(counts, kinds[kind] * count, of)


def test_draw_has_noise_for_a_large_vocabulary():
    """Hold the draws to reaching every id: noise of 16 bits has 65,536 values, one for 4 ids."""
    vocab_size, count, size = 2**18, 128, 8
    even = torch.full((size, vocab_size), 1 / vocab_size)
    places = torch.arange(count).split(size)
    tokens = torch.cat([sampling_lab.draw(even, constant(21, size), rows) for rows in places])
    # Whichever way the ids that are left out lie: which sixteenth of the vocabulary, which of 4.
    pairs = torch.bincount(tokens * 16 // vocab_size * 4 + tokens % 4, minlength=64)
    of = f"{count} draws from {vocab_size:,} equally likely ids, by (id // {vocab_size // 16:,}, "
    of += "id % 4)"
    check_counts(pairs, torch.full((64,), count / 64), of)


def test_draw_never_takes_a_token_of_probability_0():
    vocab_size, count = 500, 3000
    rows = torch.zeros(count, vocab_size)
    allowed = torch.randint(vocab_size, (count, 3), generator=torch.Generator().manual_seed(5))
    rows.scatter_(1, allowed, torch.tensor([0.3333333, 0.6666666, 1e-7]).expand(count, 3))
    rows /= rows.sum(-1, keepdim=True)
    tokens = sampling_lab.draw(rows, torch.arange(count), torch.arange(count) * 5)
    drawn = rows[torch.arange(count), tokens]
    check_true(bool((drawn > 0).all()), f"{int((drawn == 0).sum())} drawn tokens have none")


@pytest.mark.parametrize("batch, vocab_size", [(1, 1), (3, 1), (1, 9), (5, 3000)])
def test_draw_returns_one_id_a_row(batch, vocab_size):
    rows = torch.zeros(batch, vocab_size)
    expected = torch.arange(batch) * 7 % vocab_size
    rows[torch.arange(batch), expected] = 1.0
    tokens = sampling_lab.draw(rows, constant(2**62, batch), torch.arange(batch))
    check_equal(tokens, expected, "the only possible tokens")


def test_draw_leaves_its_arguments_alone():
    rows = torch.softmax(scores(6, 12), dim=-1)
    seeds, positions = torch.arange(6) + 2**50, torch.arange(6)
    before = rows.clone(), seeds.clone(), positions.clone()
    sampling_lab.draw(rows, seeds, positions)
    names = ("probabilities", "seeds", "positions")
    check_close(rows, before[0], tolerance=0.0, of="probabilities after draw")
    for name, old, new in zip(names[1:], before[1:], (seeds, positions), strict=True):
        check_equal(new, old, f"{name} after the call")


HISTORY = [3, 17, 3, 8, 0, 21, 3, 5, 5]
SAMPLERS = [
    {"seed": 11},
    {"seed": 0, "temperature": 0.4},
    {"seed": 2**63 - 1, "temperature": 1.5, "top_k": 6},
    {"seed": 5, "top_p": 0.8, "min_p": 0.05},
    {"seed": 8, "min_p": 0.5},
    {"seed": 9, "top_p": 0.4},
    {"seed": 5, "repetition_penalty": 1.8, "temperature": 0.9},
    {"seed": 6, "presence_penalty": 2.0, "frequency_penalty": 1.5},
    {"seed": 7, "temperature": 2.5, "repetition_penalty": 0.5, "frequency_penalty": -1.5},
]


def sampler_oracle(logits, token_ids, num_prompt_tokens, values):
    """What a sampler must draw from, and the tokens of the lab's own noise for it."""
    prompt_ids, output_ids = token_ids[:num_prompt_tokens], token_ids[num_prompt_tokens:]
    penalised = oracle_penalties(logits, prompt_ids, output_ids, values)
    row = {name: values[name] for name in OFF if name in values}
    rows = torch.tensor(oracle_probabilities(penalised[None], [row])).float()
    seeds, positions = torch.tensor([values["seed"]]), torch.tensor([len(token_ids)])
    return int(sampling_lab.draw(rows, seeds, positions))


@pytest.mark.parametrize("num_prompt_tokens", [3, 8])
def test_sampler_draws_for_the_position_of_the_new_token(num_prompt_tokens):
    sampler = sampling_lab.Sampler(params(seed=11), num_prompt_tokens)
    lengths = torch.arange(num_prompt_tokens, num_prompt_tokens + 6)
    got = torch.tensor([sampler(torch.zeros(500), [0] * int(length)) for length in lengths])
    even = torch.full((500,), 1 / 500)
    # Among 500 even tokens, six draws agree with those for other positions by chance only.
    found = [
        int(length + offset)
        for offset in range(-num_prompt_tokens, 9)
        if torch.equal(draw(even, constant(11, 6), lengths + offset), got)
        for length in lengths[:1]
    ]
    what = "the positions for which draw gives the same tokens, at the first of 6 steps"
    of = f"Sampler(seed=11, num_prompt_tokens={num_prompt_tokens}) after the prompt"
    check_equal(found, [num_prompt_tokens], what, of=of)


@pytest.mark.parametrize("values", SAMPLERS, ids=str)
# With a prompt of one token, the last place and the length of the output are the same number.
@pytest.mark.parametrize("num_prompt_tokens", [3, 5, 9])
def test_sampler_takes_every_step_of_the_contract(num_prompt_tokens, values):
    sampler = sampling_lab.Sampler(params(**values), num_prompt_tokens)
    of = f"Sampler({values}, num_prompt_tokens={num_prompt_tokens})"
    for length in range(num_prompt_tokens, len(HISTORY) + 1):
        for seed in range(6):
            logits = scores(24, seed=100 * length + seed)
            expected = sampler_oracle(logits, HISTORY[:length], num_prompt_tokens, values)
            got = sampler(logits.clone(), HISTORY[:length])
            what = f"the token after {HISTORY[:length]}"
            check_equal(got, expected, what, of=of)


def test_sampler_follows_the_probabilities():
    probabilities = torch.tensor([0.45, 0.25, 0.15, 0.1, 0.05])
    sampler = sampling_lab.Sampler(params(seed=3), 3)
    count = 600
    history = [0] * (count + 3)
    tokens = [sampler(probabilities.log(), history[:length]) for length in range(3, count + 3)]
    counts = torch.bincount(torch.tensor(tokens), minlength=5)
    check_counts(counts, probabilities * count, f"{count} tokens of one sampler")


@pytest.mark.parametrize("values", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-9}], ids=str)
def test_sampler_of_the_most_likely_token(values):
    sampler = sampling_lab.Sampler(params(**values, repetition_penalty=2.0), 2)
    of = f"Sampler({values}, repetition_penalty=2)"
    logits = torch.tensor([1.0, 3.0, 5.0, 4.0])
    check_equal(sampler(logits, [0, 0]), 2, "the token without repetition", of=of)
    check_equal(sampler(logits, [2, 0]), 3, "the token when 2 is in the prompt", of=of)
    check_equal(sampler(logits, [0, 0, 2, 3]), 1, "the token when 2 and 3 are in the output", of=of)


def test_sampler_tells_the_prompt_from_the_output():
    values = {"temperature": 0.0, "presence_penalty": 2.0}
    logits = torch.tensor([1.0, 3.0, 2.5])
    for num_prompt_tokens, expected in [(3, 1), (2, 2), (1, 2)]:
        sampler = sampling_lab.Sampler(params(**values), num_prompt_tokens)
        of = f"Sampler({values}, num_prompt_tokens={num_prompt_tokens})"
        check_equal(sampler(logits, [0, 0, 1]), expected, "the token after [0, 0, 1]", of=of)


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_sampler_keeps_the_seed_it_is_given(seed):
    sampler = sampling_lab.Sampler(params(seed=seed), 3)
    check_equal(sampler.seed, seed, "seed", of=f"Sampler(seed={seed})")


def test_sampler_without_a_seed_takes_one_of_its_own():
    samplers = [sampling_lab.Sampler(params(), 3) for _ in range(20)]
    of = "20 times Sampler(SamplingParams(seed=None), 3)"
    seeds = [sampler.seed for sampler in samplers]
    check_true(all(type(seed) is int and 0 <= seed < 2**63 for seed in seeds), f"{seeds}", of=of)
    check_equal(len(set(seeds)), 20, "how many seeds differ", of=of)
    logits = torch.zeros(50)
    texts = {tuple(sampler(logits, [0] * n) for n in range(3, 14)) for sampler in samplers}
    check_equal(len(texts), 20, "how many of the drawn sequences differ", of=of)


def seed_after_seeding(value):
    """The seed that a sampler takes when every global generator has been seeded."""
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return sampling_lab.Sampler(params(), 3).seed


def test_sampler_without_a_seed_ignores_the_global_generators():
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            one, two = seed_after_seeding(5), seed_after_seeding(5)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
    of = "Sampler(SamplingParams(seed=None), 3), twice after seeding random, NumPy and torch"
    check_true(one != two, f"both have the seed {one}", of=of)


def test_sampler_of_the_same_seed_chooses_the_same():
    one, two = (sampling_lab.Sampler(params(seed=77), 3) for _ in range(2))
    of = "two samplers with seed 77"
    history, expected = [1, 2, 0], []
    for step in range(12):
        expected.append(one(scores(30, seed=step), history))
        history = [*history, expected[-1]]
    for step in reversed(range(12)):
        torch.manual_seed(step)
        again = two(scores(30, seed=step), history[: 3 + step])
        check_equal(
            again, expected[step], f"the token of step {step}, steps taken backwards", of=of
        )
    check_true(len(set(expected)) > 4, f"12 draws gave only {set(expected)}", of=of)


def test_sampler_leaves_its_arguments_alone():
    values = {"repetition_penalty": 1.5, "temperature": 0.5, "top_k": 3, "seed": 1}
    logits, history = scores(10), [1, 2, 3, 3]
    before = logits.clone()
    token_id = sampling_lab.Sampler(params(**values), 2)(logits, history)
    of = f"Sampler({values})"
    check_equal(type(token_id), int, "the type of what it returns", of=of)
    check_close(logits, before, tolerance=0.0, of=f"logits after {of} was called")
    check_equal(history, [1, 2, 3, 3], "token_ids after the call", of=of)
