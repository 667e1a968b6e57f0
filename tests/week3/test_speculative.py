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
    if not all(row[token] for row, token in zip(possible, tokens, strict=False)):
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
