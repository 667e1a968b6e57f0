"""Grades week3/speculative: guesses from the text, how many, judging them, a model that guesses."""

import contextlib
import gc
import inspect
import itertools
import math
import random as python_random
import statistics
import sys
import tracemalloc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from course.grading import History, check_close, check_equal, check_raises, check_true, lab

spec = lab("week3/speculative")
engine_lab = lab("week3/engine")
runners = lab("week3/model_runner")
sampling = lab("week1/sampling")

INF = math.inf
# A right solution fails a chi-square test with the probability ALPHA for the noise it happens to
# have; there are a few hundred of them.
ALPHA = 1e-8


# Guesses from the text.


def naive_guesses(text: Sequence[int], min_ngram: int, max_ngram: int, count: int) -> list[int]:
    """Look at every place of the text, and let it grow by each guess."""
    for size in range(max_ngram, min_ngram - 1, -1):
        end = text[len(text) - size :] if size <= len(text) else None
        places = [i for i in range(len(text) - size) if text[i : i + size] == end]
        if places:
            grown = list(text)
            for place in range(places[-1] + size, places[-1] + size + count):
                grown.append(grown[place])
            return grown[len(text) :]
    return []


TEXTS = {
    "nothing": ([], []),
    "one token": ([5], []),
    "two alike": ([5, 5], []),
    "three alike": ([5, 5, 5], [5, 5, 5, 5, 5]),
    "no token twice": ([1, 2, 3, 4, 5, 6], []),
    "two tokens again": ([1, 2, 3, 4, 5, 6, 1, 2], [3, 4, 5, 6, 1]),
    "one token again": ([1, 2, 3, 4, 5, 6, 2], []),
    "there twice": ([1, 2, 3, 1, 2, 4, 1, 2], [4, 1, 2, 4, 1]),
    "the longer one is older": ([7, 1, 2, 3, 9, 1, 2, 4, 7, 1, 2], [3, 9, 1, 2, 4]),
    "four tokens are looked for": (
        [8, 7, 1, 2, 3, 9, 7, 1, 2, 4, 8, 7, 1, 2], [3, 9, 7, 1, 2],
    ),
    "not more than four": ([8, 7, 6, 1, 2, 3, 9, 7, 6, 1, 2, 4, 8, 7, 6, 1, 2], [4, 8, 7, 6, 1]),
    "up to the end of the text": ([1, 2, 3, 1, 2], [3, 1, 2, 3, 1]),
    "it overlaps with itself": ([1, 2, 1, 2, 1], [2, 1, 2, 1, 2]),
    "right behind it": ([4, 1, 2, 1, 2], [1, 2, 1, 2, 1]),
    "at the very beginning": ([1, 2, 9, 8, 7, 1, 2], [9, 8, 7, 1, 2]),
}  # fmt: skip


@pytest.mark.parametrize("case", TEXTS)
def test_ngrams_by_hand(case):
    text, expected = TEXTS[case]
    index = spec.NgramIndex()
    index.extend(text)
    of = f"NgramIndex(), the text {text}, propose(5)"
    check_equal(index.propose(5), expected, "the guesses", of=of)


@pytest.mark.parametrize("min_ngram, max_ngram", [(1, 1), (1, 3), (2, 2), (2, 4), (3, 5), (1, 8)])
@pytest.mark.parametrize("vocab_size", [1, 2, 3, 10])
def test_ngrams_against_a_plain_search(vocab_size, min_ngram, max_ngram):
    choose = python_random.Random(f"{vocab_size} {min_ngram} {max_ngram}")
    for _ in range(6):
        index, text = spec.NgramIndex(min_ngram, max_ngram), []
        while len(text) < 50:
            more = choose.choices(range(vocab_size), k=choose.randint(0, 4))
            if choose.random() < 0.3:
                start = choose.randint(0, len(text))
                more = text[start : start + 6]
            index.extend(more)
            text += more
            for count in (choose.randint(1, 9), 1):
                of = f"NgramIndex({min_ngram}, {max_ngram}), the text {text}, propose({count})"
                expected = naive_guesses(text, min_ngram, max_ngram, count)
                check_equal(index.propose(count), expected, "the guesses", of=of)


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_ngrams_of_a_text_that_grows_in_pieces(size, kind):
    text = [1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3, 4, 1, 2]
    index = spec.NgramIndex(2, 3)
    for start in range(0, len(text), size):
        index.extend(kind(text[start : start + size]))
        index.extend(kind())
    of = f"NgramIndex(2, 3), the text {text} in pieces of {size}, propose(6)"
    check_equal(index.propose(6), naive_guesses(text, 2, 3, 6), "the guesses", of=of)


def test_ngrams_are_the_same_when_asked_again():
    index = spec.NgramIndex(1, 2)
    index.extend([3, 1, 2, 3, 1])
    of = "NgramIndex(1, 2), the text [3, 1, 2, 3, 1], propose again and again"
    for count, expected in ((4, [2, 3, 1, 2]), (1, [2]), (4, [2, 3, 1, 2])):
        got = index.propose(count)
        check_equal(got, expected, f"propose({count})", of=of)
        got.append(7)
    index.extend([2])
    check_equal(index.propose(3), [3, 1, 2], "propose(3) behind one token more", of=of)


def test_ngrams_keep_to_themselves():
    one, two = spec.NgramIndex(1, 2), spec.NgramIndex(1, 2)
    one.extend([1, 2, 1])
    two.extend([1, 3, 1])
    of = "two indexes, of the texts [1, 2, 1] and [1, 3, 1], propose(2)"
    check_equal([one.propose(2), two.propose(2)], [[2, 1], [3, 1]], "the guesses", of=of)


@pytest.mark.parametrize("min_ngram, max_ngram", [(0, 3), (-2, 17), (4, 3), (19, 1)])
def test_ngrams_refuse_sizes(min_ngram, max_ngram):
    mentions = [min_ngram, max_ngram]
    check_raises(ValueError, spec.NgramIndex, min_ngram, max_ngram, mentions=mentions)


class NoisyId(int):
    """A token that runs a line of Python whenever it is compared or hashed."""

    def __eq__(self, other):
        return int(self) == int(other)

    def __hash__(self):
        return hash(int(self))


def num_lines(call: Callable[[], object]) -> int:
    """Count the lines of Python that a call runs, every round of a loop anew."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def noisy_text(length: int, kind: str) -> list[NoisyId]:
    """Make a text in which its end stood before: near its beginning, everywhere, or nowhere."""
    choose = python_random.Random(length)
    ids = {
        "at the beginning": [1, 2, 3, 4, *(10 + choose.randrange(20) for _ in range(length - 8))],
        "everywhere": [1, 2, 3, 4] * (length // 4 - 1),
        "nowhere": [10 + choose.randrange(20) for _ in range(length - 4)],
    }[kind]
    return [NoisyId(i) for i in [*ids, 1, 2, 3, 4]]


@pytest.mark.parametrize("kind", ["at the beginning", "everywhere", "nowhere"])
def test_ngrams_whose_cost_does_not_grow(kind):
    counts = {}
    for length in (100, 3000):
        index = spec.NgramIndex(2, 4)
        index.extend(noisy_text(length, kind))
        index.propose(8)
        calls = {
            "propose(8)": lambda index=index: index.propose(8),
            "extend by one": lambda index=index: index.extend([NoisyId(2)]),
            "propose(8) again": lambda index=index: index.propose(8),
        }
        counts[length] = {name: num_lines(call) for name, call in calls.items()}
    for name, few in counts[100].items():
        many = counts[3000][name]
        text = f"{name} runs {few:,} lines of Python behind 100 tokens, {many:,} behind 3,000"
        check_true(many <= 2 * few + 40, text, of=f"NgramIndex(2, 4), its end stood {kind} before")


@pytest.mark.parametrize("kind", ["at the beginning", "everywhere", "nowhere"])
def test_ngrams_of_which_no_copy_is_made(kind):
    index = spec.NgramIndex(2, 4)
    index.extend([int(i) for i in noisy_text(20_000, kind)])
    index.propose(8)
    tracemalloc.start()
    try:
        index.propose(8)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    text = f"propose(8) takes {most:,} bytes for a while; allowed: 40,000"
    check_true(most <= 40_000, text, of="NgramIndex(2, 4), a text of 20,000 tokens")


@pytest.mark.parametrize("kind", ["at the beginning", "everywhere", "nowhere"])
def test_ngrams_of_a_long_text_cost_as_much_for_each_token(kind):
    counts = {}
    for length in (200, 2000):
        index, text = spec.NgramIndex(2, 4), noisy_text(length, kind)
        counts[length] = num_lines(lambda index=index, text=text: index.extend(text)) / length
    text = f"extend runs {counts[200]:.0f} lines of Python for each of 200 tokens, "
    text += f"and {counts[2000]:.0f} for each of 2,000"
    check_true(counts[2000] <= 2 * counts[200] + 5, text, of="NgramIndex(2, 4), extend")


# How many guesses.

MOST = (1, 2, 3, 4, 5, 7, 8, 16, 33, 64)


@dataclass
class Guessing:
    """A DraftLength, and how many guesses each step had."""

    most: int

    def __post_init__(self):
        self.length = spec.DraftLength(self.most)
        self.of = History(f"DraftLength({self.most})")
        self.counts: list[int] = []

    def steps(
        self,
        num_steps: int,
        accept: Callable[[int], int],
        share: Callable[[int], int] = lambda count: count,
    ) -> list[int]:
        """Do steps; returns their numbers of guesses. accept: how many of them are accepted.

        share: how many there are in the end; 0 means that update is not called.
        """
        before = len(self.counts)
        for _ in range(num_steps):
            count = self.length.next()
            in_range = type(count) is int and 0 <= count <= self.most
            check_true(in_range, f"next() returns {count!r}", of=self.of)
            self.counts.append(count)
            num_drafts = share(count)
            if num_drafts:
                num_accepted = accept(num_drafts)
                self.of.note(f"next(), update({num_drafts}, {num_accepted})", count)
                self.length.update(num_drafts, num_accepted)
        return self.counts[before:]

    def check_grows(self, share: Callable[[int], int] = lambda count: count) -> None:
        """From now on, all guesses are accepted."""
        counts = self.steps(120, lambda count: count, share)
        with_guesses = [count for count in counts if count]
        text = f"all guesses are accepted, and the steps have {with_guesses[:14]} … guesses"
        check_true(with_guesses[10:11] == [self.most], text, of=self.of)
        text = f"all guesses are accepted for 120 steps, and the last have {counts[100:]}"
        check_true(set(counts[100:]) == {self.most}, text, of=self.of)


def nothing(count: int) -> int:
    return 0


def everything(count: int) -> int:
    return count


@pytest.mark.parametrize("most", MOST)
def test_length_grows_when_all_are_accepted(most):
    guessing = Guessing(most)
    guessing.check_grows()
    text = f"all guesses are accepted, and of 120 steps some have none: {guessing.counts}"
    check_true(0 not in guessing.counts, text, of=guessing.of)


@pytest.mark.parametrize("most", [2, 8, 64])
def test_length_grows_when_others_leave_little_room(most):
    Guessing(most).check_grows(lambda count: min(count, 1))
    Guessing(most).check_grows(lambda count: min(count, max(1, most // 2)))


@pytest.mark.parametrize("most", [4, 64])
def test_length_grows_when_there_was_nothing_to_guess(most):
    guessing = Guessing(most)
    guessing.steps(300, everything, share=nothing)
    guessing.check_grows()


@pytest.mark.parametrize("most", MOST)
@pytest.mark.parametrize("before", [0, 7, 120])
def test_length_when_none_is_accepted(before, most):
    guessing = Guessing(most)
    guessing.steps(before, everything)
    guessing.of.note(f"{before} steps with all accepted, from now on none", None)
    counts = guessing.steps(3000, nothing)
    check_true(any(counts), "3,000 steps without a guess", of=guessing.of)
    for start in (0, 20, 1000, 2000):
        share = sum(map(bool, counts[start : start + 1000]))
        allowed = 50 if start + 1000 <= len(counts) else 0
        text = f"none is accepted, and {share} of 1,000 steps have guesses"
        check_true(share <= allowed, text, of=guessing.of)
    longest = max(counts[20:])
    text = f"none is accepted for 20 steps, and then a step has {longest} guesses"
    check_true(longest <= 1, text, of=guessing.of)


@pytest.mark.parametrize("most", MOST)
@pytest.mark.parametrize("num_refused", [1, 2, 5, 30, 100, 1000, 20_000])
def test_length_comes_back(num_refused, most):
    guessing = Guessing(most)
    guessing.steps(50, everything)
    guessing.steps(num_refused, nothing)
    guessing.of.note(f"{num_refused} steps with none accepted, from now on all", None)
    counts = guessing.steps(150, everything)
    text = f"steps 96 to 105 from there have {counts[96:106]} guesses"
    check_true(set(counts[100:]) == {most}, text, of=guessing.of)


@pytest.mark.parametrize("most", [1, 4, 5, 16, 64])
@pytest.mark.parametrize("kind", ["one", "all but one", "any number"])
def test_length_never_pauses_while_some_are_accepted(kind, most):
    choose = python_random.Random(most)
    accept = {
        "one": lambda count: 1,
        "all but one": lambda count: max(1, count - 1),
        "any number": lambda count: choose.randint(1, count),
    }[kind]
    guessing = Guessing(most)
    for before in (0, 40):
        guessing.steps(before, everything)
        counts = guessing.steps(200, accept)
        text = f"some guesses are accepted each time, and the steps have {counts[:20]} …"
        check_true(min(counts) >= 1, text, of=guessing.of)


@pytest.mark.parametrize("most", [1, 3, 8, 64])
def test_length_after_anything(most):
    choose = python_random.Random(most)
    for _ in range(20):
        guessing = Guessing(most)
        for _ in range(choose.randint(1, 8)):
            rate = choose.choice([0.0, 0.2, 0.5, 0.9])
            guessing.steps(
                choose.randint(1, 60),
                lambda count, rate=rate: sum(choose.random() < rate for _ in range(count)),
                lambda count: choose.randint(0, count),
            )
        counts = guessing.steps(400, everything)
        text = f"from now on all are accepted, and steps 96 to 105 have {counts[96:106]} guesses"
        check_true(set(counts[100:]) == {most}, text, of=guessing.of)
        counts = guessing.steps(1000, nothing)
        share = sum(map(bool, counts))
        text = f"from now on none is accepted, and {share} of 1,000 steps have guesses"
        check_true(share <= 50 and max(counts[20:]) <= 1, text, of=guessing.of)


def test_length_is_of_one_request():
    one, two = Guessing(8), Guessing(8)
    for _ in range(40):
        one.steps(1, everything)
        two.steps(1, nothing)
    text = f"one of two is never accepted, and the other one has {one.counts[20:]} guesses"
    check_true(set(one.counts[20:]) == {8}, text, of=one.of)


# Judging guesses.


def distributions(rows: int, vocab_size: int, seed: int = 0, scale: float = 1.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(torch.randn(rows, vocab_size, generator=generator) * scale, -1)


def one_hot(token_ids: Sequence[int], vocab_size: int) -> Tensor:
    return torch.eye(vocab_size)[list(token_ids)]


def drawn(probabilities: Tensor, seeds: Sequence[int], places: Sequence[int]) -> list[int]:
    """Draw tokens with week 1's noise, one a row."""
    # Not as a call of the lab's, of which the latest is named where something fails.
    draw = inspect.unwrap(sampling.draw)
    numbers = (torch.tensor([*values], dtype=torch.int64) for values in (seeds, places))
    return draw(probabilities, *numbers).tolist()


def drafting(seeds: Sequence[int]) -> list[int]:
    """Make the seeds by which guesses for requests with these seeds are drawn."""
    seed_for, purpose = inspect.unwrap(spec.seed_for), spec.DRAFTING
    return [seed_for(seed, purpose) for seed in seeds]


@dataclass(frozen=True)
class Judged:
    """A request whose guesses are judged. expected: a row for each guess, and one more."""

    guesses: tuple[int, ...]
    drawn_from: Tensor | None
    expected: Tensor
    seed: int
    place: int

    def __str__(self) -> str:
        how = "not drawn" if self.drawn_from is None else "drawn"
        guesses = f"the guesses {self.guesses}, {how}" if self.guesses else "no guesses"
        return f"{guesses}, seed {self.seed}, place {self.place}"

    @property
    def alone(self) -> list[int]:
        """What `draw` gives, place by place, up to the first token that is not the guess."""
        count = len(self.expected)
        places = range(self.place, self.place + count)
        tokens = drawn(self.expected, [self.seed] * count, places)
        num_same = 0
        while num_same < len(self.guesses) and tokens[num_same] == self.guesses[num_same]:
            num_same += 1
        return tokens[: num_same + 1]


def judge(requests: Sequence[Judged], of: object = None) -> list[list[int]]:
    """Let requests be judged together; hold the answers to what holds for any of them."""
    make = spec.Draft
    drafts = [make(one.guesses, one.drawn_from) for one in requests]
    expected = torch.cat([one.expected for one in requests])
    tensors = {id(one.drawn_from): one.drawn_from for one in requests if one.drawn_from is not None}
    tensors[0] = expected
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    seeds, places = [one.seed for one in requests], [one.place for one in requests]
    got = spec.verify(drafts, expected, seeds, places)
    shown = [str(one) for one in requests[:3]]
    more = [f"… {len(requests) - 3} requests more"] if len(requests) > 3 else []
    of = of or "\n".join(["verify", *shown, *more])
    same = all(torch.equal(tensor, kept[name]) for name, tensor in tensors.items())
    check_true(same, "expected, or what guesses were drawn from, was changed", of=of)
    check_equal(len(got), len(requests), "how many lists come", of=of)
    rows = iter((expected > 0).tolist())
    for one, tokens in zip(requests, got, strict=True):
        problem = problem_of(one, tokens, [*itertools.islice(rows, len(one.expected))])
        if problem:
            check_true(False, f"{problem}; for {one} came {tokens!r}", of=of)
    return got


def problem_of(one: Judged, tokens: list[int], possible: Sequence[Sequence[bool]]) -> str:
    """Say what cannot be right of a request's tokens, whatever the noise; "" for nothing."""
    if type(tokens) is not list or not all(type(token) is int for token in tokens):
        return "no list of whole numbers"
    count = len(tokens) - 1
    if not 0 <= count <= len(one.guesses):
        return "too few or too many tokens"
    if tuple(tokens[:count]) != one.guesses[:count]:
        return "all tokens but the last one are the first guesses"
    if count < len(one.guesses) and tokens[count] == one.guesses[count]:
        return "the last token is not the guess of its place"
    rows = zip(possible, tokens, strict=False)
    if not all(0 <= token < len(row) and row[token] for row, token in rows):
        return "a token has probability 0"
    return ""


def check_judged(requests: Sequence[Judged]) -> None:
    """Hold requests whose guesses were not drawn to what `draw` gives."""
    for one, tokens in zip(requests, judge(requests), strict=True):
        check_equal(tokens, one.alone, "its tokens", of=f"verify\n{one}")


@pytest.mark.parametrize("vocab_size", [2, 7, 300])
def test_verify_without_guesses(vocab_size):
    for seed in (0, 5, 2**63 - 1):
        expected = distributions(1, vocab_size, seed % 1000)
        check_judged([Judged((), None, expected, seed, place) for place in (0, 1, 40)])
        empty = torch.zeros(0, vocab_size)
        check_judged([Judged((), empty, expected, seed, place) for place in (2, 7)])


@pytest.mark.parametrize("vocab_size", [2, 7, 300])
@pytest.mark.parametrize("num_right", [0, 1, 2, 3, 4])
def test_verify_guesses_that_were_not_drawn(num_right, vocab_size):
    """num_right: so many of 4 guesses are what comes, and the next one is not."""
    requests = []
    for seed in range(12):
        expected = distributions(5, vocab_size, seed)
        place = 3 * seed
        guesses = drawn(expected[:4], [seed] * 4, range(place, place + 4))
        if num_right < 4:
            guesses[num_right] = (guesses[num_right] + 1 + seed % (vocab_size - 1)) % vocab_size
        requests.append(Judged(tuple(guesses), None, expected, seed, place))
    check_judged(requests)
    for one in requests[:4]:
        check_judged([one])


def test_verify_guesses_that_were_not_drawn_behind_a_wrong_one():
    expected = distributions(6, 5, 3)
    tokens = drawn(expected, [9] * 6, range(4, 10))
    for wrong in range(5):
        guesses = [*tokens[:5]]
        guesses[wrong] = (guesses[wrong] + 1) % 5
        check_judged([Judged(tuple(guesses), None, expected, 9, 4)])


@pytest.mark.parametrize("is_drawn", [False, True], ids=["not drawn", "drawn"])
@pytest.mark.parametrize("num_right", [0, 1, 2, 3])
def test_verify_where_all_is_certain(num_right, is_drawn):
    requests = []
    for seed in range(10):
        tokens = python_random.Random(seed).choices(range(6), k=4)
        guesses = tokens[:3]
        if num_right < 3:
            guesses[num_right] = (guesses[num_right] + 1 + seed % 5) % 6
        drawn_from = one_hot(guesses, 6) if is_drawn else None
        requests.append(Judged(tuple(guesses), drawn_from, one_hot(tokens, 6), seed, seed + 2))
    for one, got in zip(requests, judge(requests), strict=True):
        expected = one.expected.argmax(-1).tolist()[: num_right + 1]
        check_equal(got, expected, "its tokens, of which each is certain", of=f"verify\n{one}")


def test_verify_where_rounding_leaves_nothing():
    """The guess is less likely than it was guessed, and in float32 no other token is more so."""
    expected = torch.tensor([[0.5, 0.5, 4e-8], [0.2, 0.3, 0.5]])
    drawn_from = torch.tensor([[0.5, 0.5, 1e-7]])
    judge([Judged((2,), drawn_from, expected, seed, 3) for seed in range(50)])
    judge([Judged((0,), expected[:1], expected, seed, 3) for seed in range(50)])


def requests_of_every_kind(vocab_size: int = 6) -> list[Judged]:
    """Requests with 0 to 4 guesses, drawn and not, none like its neighbour."""
    requests = []
    for seed in range(30):
        count = (0, 3, 1, 4, 2)[seed % 5]
        expected = distributions(count + 1, vocab_size, seed)
        drawn_from = distributions(count, vocab_size, 100 + seed % 7)
        place = (5, 5, 17, 0)[seed % 4]
        seeds = drafting([seed // 2] * count)
        guesses = drawn(drawn_from, seeds, range(place, place + count))
        kept = drawn_from if seed % 3 else None
        requests.append(Judged(tuple(guesses), kept, expected, seed // 2, place))
    return requests


def test_verify_whoever_the_neighbours_are():
    requests = requests_of_every_kind()
    alone = [judge([one])[0] for one in requests]
    choose = python_random.Random(1)
    for _ in range(8):
        order = choose.sample(range(len(requests)), choose.randint(2, len(requests)))
        order += order[:2]
        for i, got in zip(order, judge([requests[i] for i in order]), strict=True):
            of = f"verify, alone and beside {len(order) - 1} others\n{requests[i]}"
            check_equal(got, alone[i], "its tokens", of=of)


def test_verify_requests_of_every_kind():
    requests = requests_of_every_kind()
    for one, got in zip(requests, judge(requests), strict=True):
        if one.drawn_from is None or not one.guesses:
            check_equal(got, one.alone, "its tokens", of=f"verify, beside others\n{one}")


def test_verify_repeats_itself():
    requests = requests_of_every_kind()
    first = judge(requests)
    for seed in (1, 2):
        torch.manual_seed(seed)
        python_random.seed(seed)
        of = "verify, for the same requests again"
        check_equal(judge(requests), first, "the tokens", of=of)


# A case of the chi-square tests: what the model expects, and what guesses are drawn from.


def filtered(probabilities: Tensor, kept: int) -> Tensor:
    """Keep the most likely tokens of each row."""
    values, ids = probabilities.topk(kept)
    cut = torch.zeros_like(probabilities).scatter(-1, ids, values)
    return cut / cut.sum(-1, keepdim=True)


def pair(name: str) -> tuple[Tensor, Tensor]:
    """Give (places + 1, vocab_size) expected and (places, vocab_size) drawn_from."""
    p = distributions(4, 6, 1)
    even = torch.full((3, 6), 1 / 6)
    pairs = {
        "another one": (p, distributions(3, 6, 2)),
        "much alike": (p, torch.softmax(p[:3].log() + distributions(3, 6, 3, 0.7), -1)),
        "the same": (p, p[:3].clone()),
        "even guesses": (p, even),
        "even answers": (torch.full((4, 6), 1 / 6), distributions(3, 6, 4, 2.0)),
        "two tokens": (distributions(3, 2, 5), distributions(2, 2, 6)),
        "many tokens": (distributions(3, 60, 7), distributions(2, 60, 8)),
        "the likely are guessed": (p, filtered(p[:3], 2)),
        "the likely are right": (filtered(p, 3), p[:3].clone()),
        "nothing in common": (
            torch.tensor([[0.3, 0.5, 0.2, 0.0, 0.0, 0.0]] * 3),
            torch.tensor([[0.0, 0.0, 0.0, 0.6, 0.1, 0.3]] * 2),
        ),
        "certain guesses": (p, one_hot([2, 0, 5], 6)),
        "certain answers": (one_hot([2, 0, 5, 1], 6), distributions(3, 6, 9, 0.3)),
        "one token in common": (
            torch.tensor([[0.4, 0.6, 0.0, 0.0]] * 3), torch.tensor([[0.0, 0.3, 0.3, 0.4]] * 2),
        ),
    }  # fmt: skip
    return pairs[name]


PAIRS = (
    "another one", "much alike", "the same", "even guesses", "even answers", "two tokens",
    "many tokens", "the likely are guessed", "the likely are right", "nothing in common",
    "certain guesses", "certain answers", "one token in common",
)  # fmt: skip


def judged_often(name: str, noise: str, count: int) -> list[Judged]:
    """Make requests that differ in their noise alone.

    noise: what draws the guesses: the request's noise for DRAFTING, or that of somebody else. "one
    seed": that of one request, at many places.
    """
    expected, drawn_from = pair(name)
    num_guesses = len(drawn_from)
    choose = python_random.Random(f"{name} {noise}")
    seeds, places = [choose.getrandbits(62) for _ in range(count)], [5] * count
    if noise == "one seed":
        seeds, places = [7] * count, [10 * i for i in range(count)]
    if noise == "other":
        generator = torch.Generator().manual_seed(len(name))
        guesses = torch.stack(
            [row.multinomial(count, True, generator=generator) for row in drawn_from], 1
        )
    else:
        of_rows = drafting([seed for seed in seeds for _ in drawn_from])
        rows = [place + i for place in places for i in range(num_guesses)]
        guesses = torch.tensor(drawn(drawn_from.repeat(count, 1), of_rows, rows))
    return [
        Judged(tuple(row), drawn_from, expected, seed, place)
        for row, seed, place in zip(
            guesses.view(count, num_guesses).tolist(), seeds, places, strict=True
        )
    ]


def check_counts(counts: Counter, probabilities: Mapping, what: str, of: object) -> None:
    """Hold how often things came against their probabilities, by a chi-square test."""
    total = sum(counts.values())
    strange = [key for key in counts if probabilities.get(key, 0.0) <= 0.0]
    check_true(not strange, f"{what}: {strange[:3]} came, which have probability 0", of=of)
    cells, rest, num_rest = [], 0.0, 0
    for key, probability in probabilities.items():
        if probability * total >= 5:
            cells.append((counts.get(key, 0), probability * total))
        else:
            rest, num_rest = rest + probability * total, num_rest + counts.get(key, 0)
    if rest > 0:
        # What is too seldom for a cell of its own counts together.
        cells.append((num_rest, rest))
    if len(cells) < 2:
        return
    statistic = sum((got - wanted) ** 2 / wanted for got, wanted in cells)
    degrees = len(cells) - 1
    spread = 2 / (9 * degrees)
    # Wilson and Hilferty's approximation of the upper quantile.
    z = statistics.NormalDist().inv_cdf(1 - ALPHA)
    limit = degrees * (1 - spread + z * math.sqrt(spread)) ** 3
    if statistic > limit:
        worst = max(probabilities, key=lambda k: abs(counts.get(k, 0) - total * probabilities[k]))
        text = f"{what}: of {total:,}, {worst} came {counts.get(worst, 0):,} times, and "
        text += f"{total * probabilities[worst]:,.0f} were expected\nchi-square "
        text += f"{statistic:,.0f} with {degrees} degrees of freedom; a right solution stays "
        check_true(False, text + f"below {limit:,.0f}", of=of)


def as_mapping(row: Tensor) -> dict[int, float]:
    return dict(enumerate(row.tolist()))


@pytest.mark.parametrize(
    "name, noise",
    [
        *((name, "the request's") for name in PAIRS),
        *((name, "other") for name in ("another one", "much alike", "the likely are guessed")),
        *((name, "one seed") for name in ("another one", "even guesses", "nothing in common")),
    ],
)
def test_verify_keeps_the_distribution(noise, name):
    expected, drawn_from = pair(name)
    requests = judged_often(name, noise, 2500)
    of = f"verify, for 2,500 requests with {len(drawn_from)} guesses; drawn from: {name}"
    got = judge(requests, of)
    for i, row in enumerate(expected):
        counts = Counter(tokens[i] for tokens in got if len(tokens) > i)
        check_counts(counts, as_mapping(row), f"token {i} of those that came", of)


@pytest.mark.parametrize("name", PAIRS)
def test_verify_accepts_as_often_as_possible(name):
    expected, drawn_from = pair(name)
    of = f"verify, for 2,500 requests with {len(drawn_from)} guesses; drawn from: {name}"
    got = judge(judged_often(name, "the request's", 2500), of)
    for i, rate in enumerate(torch.minimum(expected[:-1], drawn_from).sum(-1).tolist()):
        counts = Counter(len(tokens) > i + 1 for tokens in got if len(tokens) > i)
        # The last bits of a sum are no chance.
        rate = rate if 1e-4 < rate < 0.9999 else round(rate)
        what = f"whether guess {i} is accepted, when those before it are"
        check_counts(counts, {True: rate, False: 1.0 - rate}, what, of)


@pytest.mark.parametrize("name", ["another one", "even guesses", "the likely are guessed"])
def test_verify_accepts_each_guess_by_its_own_chance(name):
    expected, drawn_from = pair(name)
    of = f"verify, for 4,000 requests; drawn from: {name}"
    requests = judged_often(name, "other", 4000)
    outcomes = Counter(
        (one.guesses[0], tokens[0])
        for one, tokens in zip(requests, judge(requests, of), strict=True)
    )
    p, q = expected[0], drawn_from[0]
    missing = (p - q).clamp(min=0.0) / (p - q).clamp(min=0.0).sum()
    joint = {}
    for guess, token in itertools.product(range(len(p)), repeat=2):
        kept = min(1.0, float(p[guess] / q[guess])) if q[guess] > 0 else 0.0
        chance = kept if token == guess else (1.0 - kept) * float(missing[token])
        joint[guess, token] = float(q[guess]) * chance
    check_counts(outcomes, joint, "pairs of the first guess and the token that came", of)


def next_of(prefix: Sequence[int], vocab_size: int, salt: int) -> Tensor:
    """What a small language gives behind some tokens."""
    seed = salt + sum((token + 1) * 31**i for i, token in enumerate(prefix))
    return distributions(1, vocab_size, seed, 1.2)[0]


def written(count: int, vocab_size: int, most: int, length: int, of: str) -> list[tuple[int, ...]]:
    """Write texts, each with a seed of its own, by guessing and judging again and again."""
    table = {}

    def look_up(prefix: tuple[int, ...], salt: int) -> Tensor:
        if (prefix, salt) not in table:
            table[prefix, salt] = next_of(prefix, vocab_size, salt)
        return table[prefix, salt]

    choose = python_random.Random(of)
    seeds, texts = [choose.getrandbits(62) for _ in range(count)], [() for _ in range(count)]
    while left := [i for i in range(count) if len(texts[i]) < length]:
        guesses: dict[int, tuple[int, ...]] = dict.fromkeys(left, ())
        rows: dict[int, list[Tensor]] = {i: [] for i in left}
        for _ in range(most):
            for i in left:
                rows[i].append(look_up(texts[i] + guesses[i], 1000))
            places = [len(texts[i]) + len(guesses[i]) for i in left]
            of_rows = drafting([seeds[i] for i in left])
            tokens = drawn(torch.stack([rows[i][-1] for i in left]), of_rows, places)
            for i, token in zip(left, tokens, strict=True):
                guesses[i] += (token,)
        requests = [
            Judged(
                guesses[i],
                torch.stack(rows[i]),
                torch.stack([look_up(texts[i] + guesses[i][:n], 0) for n in range(most + 1)]),
                seeds[i],
                len(texts[i]),
            )
            for i in left
        ]
        for i, tokens in zip(left, judge(requests, of), strict=True):
            texts[i] += tuple(tokens)
    return [text[:length] for text in texts]


@pytest.mark.parametrize("vocab_size, most, length", [(2, 1, 5), (2, 3, 5), (3, 2, 4), (5, 2, 3)])
def test_verify_writes_whole_texts_with_their_probabilities(vocab_size, most, length):
    of = f"verify, again and again: texts of {length} tokens, vocabulary {vocab_size}, "
    of += f"{most} guesses a step"
    counts = Counter(written(2500, vocab_size, most, length, of))
    probabilities = {(): 1.0}
    for _ in range(length):
        probabilities = {
            (*text, token): probability * chance
            for text, probability in probabilities.items()
            for token, chance in enumerate(next_of(text, vocab_size, 0).tolist())
        }
    check_counts(counts, probabilities, "whole texts", of)


@pytest.mark.parametrize("name", ["another one", "even answers", "certain guesses"])
def test_verify_draws_tokens_that_know_nothing_of_each_other(name):
    expected, _ = pair(name)
    of = f"verify, for 4,000 requests; drawn from: {name}"
    got = judge(judged_often(name, "the request's", 4000), of)
    pairs = Counter((tokens[0], tokens[1]) for tokens in got if len(tokens) > 1)
    # Behind a guess that was accepted, the next token is drawn as behind any other.
    for first in range(6):
        counts = Counter({b: count for (a, b), count in pairs.items() if a == first})
        if sum(counts.values()) >= 100:
            what = f"the second token, where the first one is {first}"
            check_counts(counts, as_mapping(expected[1]), what, of)


# A model that guesses.

VOCAB_SIZE = 23
PARAMS = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed",
)  # fmt: skip


def state_of(prompt_ids: Sequence[int], **values):
    """Make the state of a request; values: of SamplingParams and SamplingState."""
    params = {name: values.pop(name) for name in PARAMS if name in values}
    return runners.SamplingState(sampling.SamplingParams(**params), tuple(prompt_ids), **values)


def fields_of(state) -> dict:
    """Copy what a state holds."""
    return {name: value for name, value in vars(state).items() if name != "output_ids"} | {
        "output_ids": list(state.output_ids)
    }


def oracle_scores(logits: Sequence[float], state, output_ids: Sequence[int]) -> list[float]:
    """The scores of one row behind the bias, the penalties and the ban, token by token."""
    params, output_ids = state.params, list(output_ids)
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


class SumModel(nn.Module):
    """A model whose scores are looked up by an exact sum over every token and its position.

    Its queries are zeros, so that attention gives the mean of the values that a token sees; these
    are whole numbers, so that the mean times their number is one again, however it was added up.

    other: how far its scores are from those of the model with other=0. num_tokens: of each pass.
    """

    NUM_SCORES = 4093

    def __init__(self, context: int = 64, other: float = 0.0, vocab_size: int = VOCAB_SIZE):
        super().__init__()
        self.config = SimpleNamespace(
            vocab_size=vocab_size,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=3,
            max_position_embeddings=context,
        )
        self.embed_tokens = nn.Embedding(vocab_size, 2)
        generator = torch.Generator().manual_seed(1)
        self.scores = 3 * torch.randn(self.NUM_SCORES, vocab_size, generator=generator)
        self.scores += other * torch.randn(self.NUM_SCORES, vocab_size, generator=generator)
        self.num_tokens: list[int] = []

    def values(self, layer: int, ids: Tensor, positions: Tensor) -> Tensor:
        """Hash ids and positions into small whole numbers: (tokens, 3)."""
        place = torch.tensor([3, 8, 11]) + 17 * layer
        mixed = (ids[:, None] + 5) * (positions[:, None] + place) * 31 + ids[:, None] * place
        return mixed % 29

    def forward(self, input_ids: Tensor, positions: Tensor, attend) -> Tensor:
        self.num_tokens.append(len(input_ids))
        sums = []
        for layer in range(2):
            v = self.values(layer, input_ids, positions).float()[None]
            means = attend(layer, torch.zeros(2, len(input_ids), 3), torch.ones_like(v), v)
            sums.append((means[1] * (positions + 1)[:, None]).round())
        return torch.cat(sums, dim=-1)

    def logits(self, hidden: Tensor) -> Tensor:
        factors = torch.tensor([1, 37, 211, 5, 401, 97])
        return self.scores[(hidden.long() * factors).sum(-1) % self.NUM_SCORES]

    def expected(self, ids: Sequence[int]) -> Tensor:
        """Score what follows a whole sequence."""
        ids = torch.tensor(list(ids))
        positions = torch.arange(len(ids))
        return self.logits(
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
    "drawn": {"temperature": 1.5},
    "seeded": {"temperature": 1.2, "seed": 6},
    "the largest seed": {"seed": 2**63 - 1},
    "filtered": {"temperature": 2.0, "top_k": 9, "top_p": 0.8, "min_p": 0.05, "seed": 8},
    "penalised": {"repetition_penalty": 1.4, "frequency_penalty": 0.8, "seed": 3},
    "present": {"temperature": 0.0, "presence_penalty": 2.0, "frequency_penalty": 2.0},
    "biased": {"logit_bias": {3: 4.0, 9: -2.0}, "num_logprobs": 2, "seed": 1},
    "unending": {
        "temperature": 0.0, "min_tokens": 4, "eos_token_ids": frozenset(range(0, VOCAB_SIZE, 2)),
    },
}  # fmt: skip


def prompt_of(request_id: str, num_tokens: int) -> list[int]:
    return python_random.Random(request_id).choices(range(VOCAB_SIZE), k=num_tokens)


@dataclass
class Known:
    """What the oracle knows of a request. computed: the tokens whose KV the draft model has."""

    state: object
    kept: dict
    computed: list[int]
    num_blocks: int = 0
    guesses: tuple[int, ...] = ()

    @property
    def ids(self) -> list[int]:
        return [*self.state.prompt_ids, *self.state.output_ids]


class Guesser:
    """A DraftModel beside the oracle; every guess, and every pass, is compared."""

    def __init__(
        self,
        num_blocks: int = 60,
        block_size: int = 4,
        max_num_seqs: int = 6,
        token_budget: int = 60,
        max_model_len: int = 60,
    ):
        self.model = SumModel()
        self.num_blocks, self.block_size = num_blocks, block_size
        self.max_num_seqs, self.token_budget = max_num_seqs, token_budget
        self.max_model_len = max_model_len
        limits = num_blocks, block_size, max_num_seqs, token_budget, max_model_len
        self.lab = spec.DraftModel(self.model, *limits, self.make_attend)
        names = "num_blocks", "block_size", "max_num_seqs", "token_budget", "max_model_len"
        inside = ", ".join(f"{n}={v}" for n, v in zip(names, limits, strict=True))
        self.of = History(f"DraftModel({inside})")
        self.known: dict[str, Known] = {}

    def make_attend(self, cache, batch):
        num_seqs = len(batch.seq_lens)
        text = f"a pass has {num_seqs} requests; max_num_seqs is {self.max_num_seqs}"
        check_true(num_seqs <= self.max_num_seqs, text, of=self.of)
        num_tokens = len(batch.slots)
        text = f"a pass has {num_tokens} tokens; token_budget is {self.token_budget}"
        check_true(num_tokens <= self.token_budget, text, of=self.of)
        counts = batch.cu_seqlens_q.diff().tolist()
        text = f"the requests of a pass have {counts} tokens; num_decodes is {batch.num_decodes}"
        fits = min(counts) > 0 and counts[: batch.num_decodes] == [1] * counts.count(1)
        check_true(fits, text, of=self.of)
        return plain_attend(cache, batch)

    def add(self, request_id: str, num_tokens: int, kind: str = "greedy", **values) -> None:
        state = state_of(prompt_of(request_id, num_tokens), **(values or KINDS[kind]))
        self.lab.add(request_id, state)
        self.of.note(f"add {request_id}: a prompt of {num_tokens}, {kind}", None)
        self.known[request_id] = Known(state, fields_of(state), [])
        self.grow(request_id, 0)

    def grow(self, request_id: str, num_accepted: int, num_more: int = 1) -> None:
        """Give a request its next tokens: of its guesses the first ones, and others."""
        known = self.known[request_id]
        output_ids, guesses = known.state.output_ids, known.guesses
        output_ids += guesses[:num_accepted]
        choose = python_random.Random(f"{request_id} {len(output_ids)}")
        for _ in range(num_more):
            refused = guesses[num_accepted : num_accepted + 1]
            output_ids.append(choose.choice([i for i in range(VOCAB_SIZE) if (i,) != refused]))
        known.kept["output_ids"] = list(output_ids)
        text = f"{request_id} goes on: {num_accepted} of its {len(guesses)} guesses came, "
        self.of.note(f"{text}and {num_more} other; now it has {len(known.ids)} tokens", None)
        known.guesses = ()

    def remove(self, request_id: str) -> None:
        self.lab.remove(request_id)
        self.known.pop(request_id, None)
        self.of.note(f"remove {request_id}", None)

    def propose(self, **lengths: int) -> None:
        """Ask for guesses; hold them, and the passes, to the oracle's."""
        rooms = {name: self.room_for(name, count) for name, count in lengths.items()}
        rooms = {name: room for name, room in rooms.items() if room}
        lacking = sum(len(self.known[n].ids) - self.start_of(n) for n in rooms)
        self.model.num_tokens.clear()
        got = self.lab.propose(lengths)
        shown = {name: draft.token_ids for name, draft in got.items()}
        self.of.note(f"propose({lengths})", shown)
        check_equal(sorted(got), sorted(rooms), "who gets guesses", of=self.of)
        for name, room in rooms.items():
            self.check_guesses(name, got[name], room)
        for name, known in self.known.items():
            same = fields_of(known.state) == known.kept
            check_true(same, f"the state of {name} was changed", of=self.of)
        num_tokens = lacking + sum(rooms.values()) - len(rooms)
        done = sum(self.model.num_tokens)
        text = f"{done} tokens went through the model; {num_tokens} are enough"
        check_true(done <= num_tokens, text, of=self.of)
        if len(rooms) <= self.max_num_seqs and lacking <= self.token_budget:
            most, num_passes = max(rooms.values(), default=0), len(self.model.num_tokens)
            text = f"{num_passes} passes of the model; {most} are enough"
            check_true(num_passes <= most, text, of=self.of)
        for name, room in rooms.items():
            known = self.known[name]
            known.computed = [*known.ids, *known.guesses[: room - 1]]

    def room_for(self, request_id: str, count: int) -> int:
        """Say how many guesses a request gets, and hold blocks for them."""
        known = self.known[request_id]
        known.guesses = ()
        num_tokens = len(known.ids)
        count = min(count, self.max_model_len - num_tokens)
        free = self.num_blocks - sum(one.num_blocks for one in self.known.values())
        needed = -(-(num_tokens + count - 1) // self.block_size)
        if count < 1 or needed > known.num_blocks + free:
            return 0
        known.num_blocks = max(known.num_blocks, needed)
        return count

    def start_of(self, request_id: str) -> int:
        """Count the tokens that need not go through the model again."""
        known = self.known[request_id]
        pairs = zip(known.ids, known.computed, strict=False)
        same = sum(1 for _ in itertools.takewhile(lambda two: two[0] == two[1], pairs))
        return min(same, len(known.ids) - 1)

    def check_guesses(self, request_id: str, draft, count: int) -> None:
        known, of = self.known[request_id], f"{self.of}\nthe guesses of {request_id}"
        state, token_ids = known.state, draft.token_ids
        check_equal(type(token_ids), tuple, "type of token_ids", of=of)
        check_equal(len(token_ids), count, "how many there are", of=of)
        plain = all(type(token_id) is int for token_id in token_ids)
        check_true(plain, f"no whole numbers: {token_ids!r}", of=of)
        seed = inspect.unwrap(spec.seed_for)(state.seed, spec.DRAFTING)
        rows, expected = [], []
        for i in range(count):
            output_ids = [*state.output_ids, *expected]
            ids = [*state.prompt_ids, *output_ids]
            adjusted = oracle_scores(self.model.expected(ids).tolist(), state, output_ids)
            rows.append(oracle_probabilities(adjusted, state.params))
            expected += drawn(torch.tensor([rows[-1]]), [seed], [len(ids)])
            check_equal(token_ids[i], expected[i], f"guess {i}", of=of)
        check_close(draft.probabilities, torch.tensor(rows), tolerance=1e-4, of=of)
        known.guesses = token_ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [1, 3, 4, 11])
def test_draft_model_with_one_request(num_tokens, kind):
    guesser = Guesser()
    guesser.add("a", num_tokens, kind)
    for count, num_accepted in ((3, 1), (4, 4), (1, 0), (1, 1), (5, 0), (5, 3), (2, 2)):
        guesser.propose(a=count)
        guesser.grow("a", num_accepted)
    guesser.propose(a=4)


@pytest.mark.parametrize("num_accepted", [0, 1, 2, 3, 4])
def test_draft_model_goes_back_to_what_came(num_accepted):
    guesser = Guesser()
    guesser.add("a", 6, "seeded")
    for _ in range(5):
        guesser.propose(a=4)
        guesser.grow("a", num_accepted)
    guesser.propose(a=4)


@pytest.mark.parametrize("kind", ["greedy", "seeded"])
@pytest.mark.parametrize("num_more", [2, 3, 9])
def test_draft_model_catches_up_with_what_it_did_not_see(num_more, kind):
    guesser = Guesser()
    guesser.add("a", 5, kind)
    for num_accepted in (0, 2, 3):
        guesser.propose(a=3)
        guesser.grow("a", num_accepted, num_more)
    guesser.propose(a=3)


def test_draft_model_for_a_text_that_did_not_grow():
    guesser = Guesser()
    guesser.add("a", 5, "seeded")
    for count in (3, 3, 1, 5, 2):
        guesser.propose(a=count)
    guesser.grow("a", 2)
    guesser.propose(a=4)
    guesser.propose(a=4)


def test_draft_model_for_a_text_that_came_like_a_guess_that_was_dropped():
    guesser = Guesser()
    guesser.add("a", 5, "seeded")
    for count in (2, 3, 4):
        guesser.propose(a=4)
        known = guesser.known["a"]
        guesses = known.guesses
        # All that came was guessed, though fewer guesses than these were judged.
        known.state.output_ids += guesses[:count]
        known.kept["output_ids"] = list(known.state.output_ids)
        guesser.of.note(f"a goes on with {guesses[:count]}", None)
    guesser.propose(a=3)


@pytest.mark.parametrize("block_size", [1, 2, 3, 16])
def test_draft_model_with_blocks_of_any_size(block_size):
    guesser = Guesser(block_size=block_size, num_blocks=120)
    guesser.add("a", 5, "seeded")
    guesser.add("b", 8, "greedy")
    for num_accepted in (0, 1, 3, 2, 3, 0):
        guesser.propose(a=3, b=3)
        guesser.grow("a", num_accepted)
        guesser.grow("b", 3 - num_accepted)


@pytest.mark.parametrize("token_budget, max_num_seqs", [(1, 1), (2, 2), (3, 1), (5, 4), (9, 2)])
def test_draft_model_in_chunks(token_budget, max_num_seqs):
    guesser = Guesser(token_budget=token_budget, max_num_seqs=max_num_seqs)
    for name, num_tokens, kind in (("a", 12, "seeded"), ("b", 1, "greedy"), ("c", 7, "present")):
        guesser.add(name, num_tokens, kind)
    guesser.propose(b=2)
    guesser.propose(a=2, b=4, c=1)
    guesser.grow("a", 2)
    guesser.grow("b", 1, 8)
    guesser.propose(c=3, b=3, a=3)


def test_draft_model_with_requests_of_every_kind():
    guesser = Guesser(num_blocks=200, max_num_seqs=9, token_budget=100)
    names = {f"r{i}": kind for i, kind in enumerate(KINDS)}
    for i, (name, kind) in enumerate(names.items()):
        guesser.add(name, 3 + 2 * i, kind)
    for step in range(5):
        lengths = {name: 1 + (i + step) % 4 for i, name in enumerate(names)}
        guesser.propose(**lengths)
        for i, name in enumerate(names):
            guesser.grow(name, (i * step) % (lengths[name] + 1))


def test_draft_model_asked_for_some_of_its_requests():
    guesser = Guesser()
    for name in "abcd":
        guesser.add(name, 5, "seeded")
    for names in ("ab", "c", "dcba", "b", "ad", "dbca"):
        guesser.propose(**dict.fromkeys(names, 3))
        for name in names:
            guesser.grow(name, len(names) % 4)


def test_draft_model_asked_for_nobody():
    guesser = Guesser()
    guesser.propose()
    guesser.add("a", 5)
    guesser.propose()
    guesser.propose(a=2)


@pytest.mark.parametrize("kind", ["penalised", "present"])
def test_draft_model_counts_its_guesses_for_penalties(kind):
    guesser = Guesser()
    guesser.add("a", 3, kind)
    for num_accepted in (0, 8, 3, 8):
        guesser.propose(a=8)
        guesser.grow("a", num_accepted)


def test_draft_model_counts_its_guesses_for_min_tokens():
    guesser = Guesser()
    for i in range(5):
        name = f"r{i}"
        values = {"min_tokens": 2 + i, "eos_token_ids": frozenset(range(11)), "temperature": 0.0}
        guesser.add(name, 4 + i, **values)
    guesser.propose(**{f"r{i}": 6 for i in range(5)})


@pytest.mark.parametrize("max_model_len", [12, 13, 14, 15, 16])
def test_draft_model_up_to_the_end_of_its_context(max_model_len):
    guesser = Guesser(max_model_len=max_model_len, block_size=3)
    guesser.add("a", 8, "seeded")
    guesser.add("b", 2)
    while len(guesser.known["a"].ids) <= max_model_len + 1:
        guesser.propose(a=4, b=2)
        guesser.grow("a", 0)


@pytest.mark.parametrize("num_tokens", [10, 11, 12])
def test_draft_model_holds_nothing_for_whom_it_cannot_guess(num_tokens):
    guesser = Guesser(num_blocks=4, block_size=4, max_model_len=12)
    guesser.add("a", num_tokens)
    guesser.add("b", 8)
    guesser.propose(a=2, b=3)
    guesser.propose(b=3)


@pytest.mark.parametrize("num_blocks", [4, 5, 6, 7, 8])
def test_draft_model_with_too_small_a_pool(num_blocks):
    guesser = Guesser(num_blocks, block_size=3)
    for name, num_tokens in (("a", 6), ("b", 3), ("c", 1)):
        guesser.add(name, num_tokens, "seeded")
    for num_accepted in (0, 1, 2, 3, 0, 2):
        guesser.propose(b=2, a=4, c=3)
        for name in "abc":
            guesser.grow(name, min(num_accepted, len(guesser.known[name].guesses)))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_draft_model_holds_no_block_for_the_last_guess(count):
    guesser = Guesser(num_blocks=2, block_size=4)
    guesser.add("a", 4, "seeded")
    guesser.propose(a=count)
    guesser.propose(a=4)
    guesser.propose(a=count)


def test_draft_model_frees_what_removed_requests_held():
    guesser = Guesser(num_blocks=4, block_size=4)
    for i in range(6):
        guesser.add(f"a{i}", 9)
        guesser.add(f"b{i}", 9)
        guesser.propose(**{f"a{i}": 4})
        guesser.propose(**{f"b{i}": 1})
        guesser.remove(f"a{i}")
        guesser.propose(**{f"b{i}": 4})
        guesser.remove(f"b{i}")


def test_draft_model_with_an_id_that_comes_again():
    guesser = Guesser()
    for kind, num_tokens in (("seeded", 6), ("greedy", 9), ("seeded", 6), ("present", 2)):
        guesser.add("a", num_tokens, kind)
        guesser.propose(a=3)
        guesser.grow("a", 2)
        guesser.propose(a=2)
        guesser.remove("a")


def test_draft_model_removes_nobody():
    guesser = Guesser()
    guesser.remove("nobody")
    guesser.add("a", 5)
    guesser.propose(a=2)
    for name in ("nobody", "a", "a"):
        guesser.remove(name)


@contextlib.contextmanager
def garbage_collected() -> Iterator[None]:
    """At the end, free what the block made and nothing refers to; older objects take too long."""
    gc.disable()
    try:
        yield
        gc.collect(0)
    finally:
        gc.enable()


def test_draft_model_keeps_nothing_of_who_was_removed():
    guesser, watched = Guesser(), {}
    with garbage_collected():
        for name in ("before a step", "behind some guesses"):
            guesser.add(name, 6)
            state = guesser.known[name].state
            watched[name] = weakref.ref(state), weakref.ref(state.params)
        del state
        guesser.propose(**{"behind some guesses": 3})
        for name in watched:
            guesser.remove(name)
    alive = sorted(name for name, refs in watched.items() if any(ref() for ref in refs))
    check_equal(alive, [], "whose state, or params, are still kept", of=guesser.of)


def test_draft_model_attends_with_paged_attend_where_nothing_is_said():
    model = SumModel()
    guesser = Guesser()
    guesser.model, guesser.lab = model, spec.DraftModel(model, 60, 4, 6, 60, 60)
    guesser.add("a", 9, "seeded")
    guesser.add("b", 2)
    for num_accepted in (3, 0, 1):
        guesser.propose(a=3, b=3)
        guesser.grow("a", num_accepted)
        guesser.grow("b", num_accepted)


@pytest.mark.parametrize("length", [10, 20, 30, 40, 60, 80])
def test_draft_model_with_anything(length):
    choose = python_random.Random(length)
    max_num_seqs, token_budget = choose.choice([(6, 60), (3, 12), (1, 5)])
    guesser = Guesser(
        choose.choice([12, 20, 60]),
        choose.choice([1, 3, 4]),
        max_num_seqs,
        token_budget,
        choose.choice([24, 40, 60]),
    )
    for i in range(length):
        names = list(guesser.known)
        if len(names) < 2 or (len(names) < 5 and choose.random() < 0.3):
            guesser.add(f"r{i}", choose.randint(1, 20), choose.choice(list(KINDS)))
        elif choose.random() < 0.15:
            guesser.remove(choose.choice(names))
        names = [name for name in guesser.known if choose.random() < 0.8]
        choose.shuffle(names)
        guesser.propose(**{name: choose.randint(1, 6) for name in names})
        for name, known in guesser.known.items():
            if choose.random() < 0.85 and len(known.ids) < 56:
                num_accepted = choose.randint(0, len(known.guesses))
                guesser.grow(name, num_accepted, choose.choice([1, 1, 1, 3]))


# Through the engine.

END = 3


class Letters:
    """A tokenizer whose ids are letters."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(97 + i) for i in ids if i != END or not skip_special_tokens)


class Prophet:
    """A `Proposer` who knows the answers, and says something else at some places.

    answers: request_id → its ids. wrong: how often a guess is another token. is_drawn: whether the
    guesses come with what they were drawn from, which is certain. said: all guesses so far, each
    with its request and how many tokens that had been answered.
    """

    def __init__(self, answers: Mapping[str, Sequence[int]], wrong: float, is_drawn: bool = False):
        self.answers, self.wrong, self.is_drawn = answers, wrong, is_drawn
        self.states: dict[str, object] = {}
        self.said: list[tuple[str, int, list[int]]] = []

    def add(self, request_id: str, state) -> None:
        self.states[request_id] = state

    def remove(self, request_id: str) -> None:
        self.states.pop(request_id, None)

    def propose(self, lengths: Mapping[str, int]) -> dict:
        drafts = {}
        for request_id, count in lengths.items():
            num_known = len(self.states[request_id].output_ids)
            choose = python_random.Random(f"{request_id} {num_known}")
            behind = choose.choices(range(VOCAB_SIZE), k=9)
            answer = [*self.answers.get(request_id, ()), END, *behind]
            guesses = [
                choose.randrange(VOCAB_SIZE) if choose.random() < self.wrong else token_id
                for token_id in answer[num_known : num_known + count]
            ]
            drawn_from = one_hot(guesses, VOCAB_SIZE) if self.is_drawn else None
            self.said.append((request_id, num_known, guesses))
            if guesses:
                drafts[request_id] = spec.Draft(tuple(guesses), drawn_from)
        return drafts


def proposer_of(kind: str, limits, answers: Mapping[str, Sequence[int]], model: nn.Module):
    if kind == "n-grams":
        return spec.NgramProposer(1, 3)
    if kind.startswith("a prophet"):
        return Prophet(answers, 0.0 if "right" in kind else 0.3, "certain" in kind)
    draft = model if kind == "the same model" else SumModel(other=1.0)
    return spec.DraftModel(
        draft,
        limits.num_blocks,
        limits.block_size,
        limits.max_num_seqs,
        limits.token_budget,
        limits.max_model_len,
        plain_attend,
    )


EXACT = ("n-grams", "a prophet", "a prophet who is right")
MODELS = ("another model", "the same model", "a prophet, certain")


@dataclass
class Got:
    """What a request was answered."""

    ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple = ()
    finish_reason: str | None = None


def answers_of(engine, requests: Mapping[str, tuple], of: object) -> dict[str, Got]:
    """Let requests come one by one, and step until nobody is left."""
    got, pending = {}, list(requests.items())
    choose = python_random.Random(len(requests))
    for _ in range(3000):
        while pending and choose.random() < 0.6:
            name, (prompt, params) = pending.pop(0)
            got[name] = Got()
            engine.add(name, prompt, params)
        for delta in engine.step():
            one = got[delta.request_id]
            one.ids += tuple(choice.token_id for choice in delta.choices)
            one.text += delta.text
            told = [(c.logprob, c.top) for c in delta.choices if c.logprob is not None]
            one.logprobs += tuple(told)
            one.finish_reason = delta.finish_reason
        if not pending and not engine.num_unfinished:
            break
    check_true(not engine.num_unfinished, "after 3,000 steps somebody has not ended", of=of)
    free, num_blocks = engine.blocks.num_free_blocks, engine.limits.num_blocks
    text = f"nobody waits or runs, and {free} of {num_blocks} blocks are free"
    check_true(free == num_blocks, text, of=of)
    return got


class Spoken:
    """Requests through an engine that guesses, beside one that does not."""

    def __init__(
        self, kind: str, requests: Mapping[str, tuple], most: int = 4, step: int = 48, **limits
    ):
        sizes = {
            "num_blocks": 80, "max_model_len": 48, "max_num_seqs": 6, "token_budget": 40,
            "block_size": 4, "watermark": 0,
        }  # fmt: skip
        self.limits = engine_lab.EngineLimits(**(sizes | limits))
        self.requests, model = requests, SumModel()
        shown = ", ".join(f"{name}={value}" for name, value in limits.items())
        self.of = f"Engine({shown}), {len(requests)} requests, {kind} guesses up to {most} tokens"
        make = engine_lab.Engine
        self.silent = make(model, Letters(), {END}, self.limits, plain_attend)
        self.plain = answers_of(self.silent, requests, self.of)
        answers = {name: one.ids for name, one in self.plain.items()}
        self.proposer = proposer_of(kind, self.limits, answers, model)
        speculation = spec.Speculation(self.proposer, most, step)
        arguments = model, Letters(), {END}, self.limits, plain_attend
        self.engine = make(*arguments, speculator=speculation)
        self.got = answers_of(self.engine, requests, self.of)

    def check_same(self, names: Sequence[str] | None = None) -> None:
        for name in self.requests if names is None else names:
            prompt, params = self.requests[name]
            plain, got = self.plain[name], self.got[name]
            of = f"{self.of}\n{name}, a prompt of {len(prompt)}: {params}"
            check_equal(got.ids, plain.ids, "its ids, with guesses and without", of=of)
            check_equal(got.text, plain.text, "its text, with guesses and without", of=of)
            check_equal(got.finish_reason, plain.finish_reason, "finish_reason", of=of)
            check_equal(len(got.logprobs), len(plain.logprobs), "how many logprobs", of=of)
            for (one, top), (other, other_top) in zip(got.logprobs, plain.logprobs, strict=True):
                same = [i for i, _ in top] == [i for i, _ in other_top]
                values = [one, *(value for _, value in top)]
                others = [other, *(value for _, value in other_top)]
                close = all(abs(a - b) < 1e-4 for a, b in zip(values, others, strict=True))
                text = f"logprobs with guesses {values}, and without {others}"
                check_true(same and close, text, of=of)

    def check_limits(self) -> None:
        """Hold to what is true of any answer, whatever was drawn."""
        for name, (prompt, params) in self.requests.items():
            got, of = self.got[name], f"{self.of}\n{name}, a prompt of {len(prompt)}: {params}"
            most = min(params.max_tokens, self.limits.max_model_len - len(prompt))
            text = f"it has {len(got.ids)} tokens; at most {most} are allowed"
            check_true(len(got.ids) <= most, text, of=of)
            ended = END in got.ids and not params.ignore_eos
            check_true(not ended, f"the end is part of the answer: {got.ids}", of=of)
            if got.finish_reason == "length":
                text = f"it ends by its length with {len(got.ids)} of {most} tokens"
                check_true(len(got.ids) == most, text, of=of)

    def check_guessed(self, least: int = 1) -> None:
        text = f"{self.engine.num_accepted_tokens} guesses were accepted; at least {least} could be"
        check_true(self.engine.num_accepted_tokens >= least, text, of=self.of)


def asked(count: int, greedy: bool, seed: int = 0, **values) -> dict[str, tuple]:
    """Make requests, of which some begin like others, with parameters of many kinds."""
    choose = python_random.Random(seed)
    base, requests = prompt_of(f"base {seed}", 20), {}
    for i in range(count):
        prompt = base[: choose.randint(0, 20)] + prompt_of(f"{seed} {i}", choose.randint(1, 12))
        params = {
            "temperature": 0.0 if greedy else choose.choice([0.0, 0.7, 1.5]),
            "max_tokens": choose.randint(1, 24),
            "ignore_eos": choose.random() < 0.4,
            "seed": i,
            "stop": choose.choice([(), (), ("ab", "c"), ("gh", "hi", "q")]),
            "logprobs": choose.choice([None, None, 0, 3]),
            "presence_penalty": choose.choice([0.0, 0.0, 1.0]),
            "repetition_penalty": choose.choice([1.0, 1.0, 0.7]),
            "top_p": choose.choice([1.0, 0.6]),
            "logit_bias": choose.choice([{}, {}, {5: 3.0, END: 2.0}]),
            **values,
        }
        params["min_tokens"] = choose.choice([0, min(3, params["max_tokens"])])
        requests[f"r{i}"] = prompt, engine_lab.GenerationParams(**params)
    return requests


@pytest.mark.parametrize("most", [1, 3, 8])
@pytest.mark.parametrize("kind", EXACT)
def test_engine_answers_as_without_guesses(kind, most):
    spoken = Spoken(kind, asked(12, greedy=False, seed=most), most)
    spoken.check_same()
    spoken.check_limits()


@pytest.mark.parametrize("most", [1, 3, 8])
@pytest.mark.parametrize("kind", MODELS)
def test_engine_answers_greedy_requests_as_without_guesses(kind, most):
    spoken = Spoken(kind, asked(12, greedy=True, seed=most), most)
    spoken.check_same()
    spoken.check_limits()


@pytest.mark.parametrize("kind", ["the same model", "a prophet who is right"])
def test_engine_accepts_whatever_is_right(kind):
    requests = asked(8, greedy=True, max_tokens=20, ignore_eos=True, stop=(), logit_bias={})
    spoken = Spoken(kind, requests, step=200)
    spoken.check_same()
    counts = spoken.engine.num_accepted_tokens, spoken.engine.num_draft_tokens
    text = "{} of {} guesses were accepted, and all of them are right".format(*counts)
    check_true(counts[0] == counts[1] > 60, text, of=spoken.of)


def test_engine_accepts_what_the_same_model_draws():
    requests = asked(10, greedy=False, temperature=1.0, max_tokens=20, ignore_eos=True, stop=())
    spoken = Spoken("the same model", requests, step=200)
    spoken.check_limits()
    counts = spoken.engine.num_accepted_tokens, spoken.engine.num_draft_tokens
    text = "{} of {} guesses were accepted, though both models are the same".format(*counts)
    check_true(counts[0] >= 0.98 * counts[1] > 60, text, of=spoken.of)


@pytest.mark.parametrize("kind", [*EXACT, *MODELS])
@pytest.mark.parametrize("case", ["small pool", "chunks", "no prefixes", "short context"])
def test_engine_that_guesses_with_little_room(case, kind):
    limits = {
        "small pool": {"num_blocks": 16, "max_model_len": 40},
        "chunks": {"token_budget": 6},
        "no prefixes": {"prefix_caching": False, "num_blocks": 20},
        "short context": {"max_model_len": 34, "block_size": 3},
    }[case]
    exact = kind in EXACT
    requests = asked(14, greedy=not exact, seed=5, max_tokens=18, ignore_eos=True)
    spoken = Spoken(kind, requests, **limits)
    spoken.check_same()
    spoken.check_limits()
    if case == "small pool":
        num_preemptions = spoken.engine.scheduler.num_preemptions
        check_true(num_preemptions > 0, "nobody has lost blocks in this pool", of=spoken.of)


@pytest.mark.parametrize("kind", ["a prophet who is right", "the same model"])
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5, 6, 7])
def test_engine_that_guesses_never_passes_max_tokens(max_tokens, kind):
    requests = asked(6, greedy=True, max_tokens=max_tokens, ignore_eos=True, stop=())
    spoken = Spoken(kind, requests, most=8, step=200)
    spoken.check_same()
    spoken.check_limits()


@pytest.mark.parametrize("kind", ["a prophet who is right", "the same model"])
def test_engine_cuts_behind_an_end_among_accepted_guesses(kind):
    bias = {END: 2.5}
    requests = asked(30, greedy=True, max_tokens=24, ignore_eos=False, stop=(), logit_bias=bias)
    spoken = Spoken(kind, requests, most=8, step=200)
    spoken.check_same()
    stopped = [one for one in spoken.got.values() if one.finish_reason == "stop" and one.ids]
    check_true(len(stopped) >= 5, "too few requests stop by themselves", of=spoken.of)
    spoken.check_guessed(10)


@pytest.mark.parametrize("kind", ["a prophet who is right", "n-grams"])
def test_engine_guesses_for_those_who_ask_again(kind):
    first = asked(6, greedy=False, seed=3, max_tokens=16, ignore_eos=True, stop=())
    answers = Spoken(kind, first).plain
    again = {
        f"{name} again": ([*prompt, *answers[name].ids][:36], params)
        for name, (prompt, params) in first.items()
    }
    spoken = Spoken(kind, {**first, **again}, max_num_seqs=3)
    spoken.check_same()
    check_true(spoken.engine.scheduler.num_cached_tokens > 0, "no prefix was found", of=spoken.of)


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_engine_finds_nothing_of_refused_guesses(block_size):
    """Ask for what was guessed and refused: its KV may be gone, and nobody may find it."""
    requests = asked(6, greedy=True, seed=8, max_tokens=16, ignore_eos=True, stop=())
    spoken = Spoken("a prophet", requests, block_size=block_size, num_blocks=200)
    spoken.check_same()
    again = {}
    for name, num_known, guesses in spoken.proposer.said:
        prompt, params = requests[name]
        refused = [*prompt, *spoken.plain[name].ids[:num_known], *guesses][:40]
        again[f"{name} {num_known}"] = refused, params
    expected = answers_of(spoken.silent, again, spoken.of)
    for name, got in answers_of(spoken.engine, again, spoken.of).items():
        of = f"{spoken.of}\n{name}, whose prompt ends with guesses that were made before"
        check_equal(got.ids, expected[name].ids, "its ids", of=of)


@pytest.mark.parametrize("trial", range(8))
def test_engine_that_guesses_whatever_comes(trial):
    choose = python_random.Random(trial)
    limits = {
        "num_blocks": choose.choice([20, 30, 60]),
        "max_num_seqs": choose.choice([2, 5, 8]),
        "token_budget": choose.choice([8, 12, 40]),
        "block_size": choose.choice([3, 4]),
        "prefix_caching": choose.random() < 0.7,
        "max_model_len": 48,
    }
    step, most = choose.choice([6, 16, 64]), choose.choice([2, 4, 7])
    for kind in (*EXACT, *MODELS):
        requests = asked(11, greedy=kind not in EXACT, seed=100 + trial)
        spoken = Spoken(kind, requests, most, step, **limits)
        spoken.check_same()
        spoken.check_limits()
        if kind in MODELS:
            drawn_ones = Spoken(
                kind, asked(5, greedy=False, seed=200 + trial), most, step, **limits
            )
            drawn_ones.check_limits()


@pytest.mark.parametrize("other", [0.7, 3.0])
def test_engine_draws_texts_with_their_probabilities(other):
    model, draft = SumModel(vocab_size=3), SumModel(other=other, vocab_size=3)
    model.scores, draft.scores = model.scores / 2, draft.scores / 2
    limits = engine_lab.EngineLimits(200, 16, 40, 400, 4, watermark=0)
    proposer = spec.DraftModel(draft, 200, 4, 40, 400, 16, plain_attend)
    speculation = spec.Speculation(proposer, 3, 400)
    arguments = model, Letters(), (), limits, plain_attend
    engine = engine_lab.Engine(*arguments, speculator=speculation)
    of = "Engine, 1,500 requests alike but for their seeds, 5 tokens of a vocabulary of 3"
    prompt, choose = [0, 2, 1], python_random.Random(5)
    make = engine_lab.GenerationParams
    requests = {
        f"r{i}": (prompt, make(max_tokens=5, seed=choose.getrandbits(62))) for i in range(1500)
    }
    counts = Counter(one.ids for one in answers_of(engine, requests, of).values())
    probabilities = {(): 1.0}
    for _ in range(5):
        probabilities = {
            (*text, token): probability * chance
            for text, probability in probabilities.items()
            for token, chance in enumerate(
                torch.softmax(model.expected([*prompt, *text]), -1).tolist()
            )
        }
    check_counts(counts, probabilities, "whole texts", of)
    text = f"{engine.num_accepted_tokens} guesses were accepted"
    check_true(engine.num_accepted_tokens > 300, text, of=of)
