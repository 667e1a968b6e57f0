"""Grades week2/continuous_batching: who computes what in a step, and a model under these steps."""

import contextlib
import gc
import itertools
import random as python_random
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3Config, Qwen3ForCausalLM

from course.grading import History, check_close, check_equal, check_true, describe, lab

batching = lab("week2/continuous_batching")
kv = lab("week2/kv_cache")
qwen = lab("week1/qwen")

VOCAB_SIZE = 23


def next_id(ids: Sequence[int]) -> int:
    """Hash a whole sequence, in its order, into its next token."""
    return zlib.crc32(bytes(ids)) % VOCAB_SIZE


def prompt_of(request_id: str, num_tokens: int) -> list[int]:
    return python_random.Random(f"{request_id} {num_tokens}").choices(
        range(VOCAB_SIZE), k=num_tokens
    )


@dataclass
class Job:
    """What the oracle knows of a request."""

    request_id: str
    prompt_ids: list[int]
    max_tokens: int
    eos_token_ids: frozenset[int]
    ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    row: int | None = None
    aborted: bool = False

    def __post_init__(self):
        self.ids = list(self.prompt_ids)

    @property
    def num_lacking(self) -> int:
        return len(self.ids) - self.num_computed

    def request(self):
        return batching.Request(
            self.request_id, self.prompt_ids, self.max_tokens, self.eos_token_ids
        )


class Oracle:
    """The contract in the plainest words: one list of everybody, those that run in front."""

    def __init__(self, num_rows: int, token_budget: int, max_model_len: int):
        self.num_rows, self.token_budget = num_rows, token_budget
        self.max_model_len = max_model_len
        self.jobs: list[Job] = []

    def find(self, request_id: str) -> Job | None:
        return next((job for job in self.jobs if job.request_id == request_id), None)

    def plan(self) -> dict[str, int]:
        """Say who computes how many tokens; gives rows to those that begin."""
        self.jobs = [job for job in self.jobs if not job.aborted]
        plan, left = {}, self.token_budget
        for job in self.jobs:
            free = set(range(self.num_rows)) - {other.row for other in self.jobs}
            if left == 0 or (job.row is None and not free):
                break
            job.row = min(free) if job.row is None else job.row
            plan[job.request_id] = min(left, job.num_lacking)
            left -= plan[job.request_id]
        return plan

    def apply(self, plan: dict[str, int], choose: Callable[[Job], int]) -> dict[str, tuple]:
        """Compute a plan; returns request_id → (token_id, finish_reason)."""
        outputs = {}
        for request_id, count in plan.items():
            job = self.find(request_id)
            job.num_computed += count
            if job.num_lacking == 0 and not job.aborted:
                outputs[request_id] = self._output(job, choose(job))
        return outputs

    def _output(self, job: Job, token_id: int) -> tuple:
        if token_id in job.eos_token_ids:
            self.jobs.remove(job)
            return None, "stop"
        job.ids.append(token_id)
        num_new = len(job.ids) - len(job.prompt_ids)
        if num_new == job.max_tokens or len(job.ids) == self.max_model_len:
            self.jobs.remove(job)
            return token_id, "length"
        return token_id, None


class Desk:
    """A scheduler beside the oracle; every step is compared, and so is what may be seen between.

    The next token of a request is a hash of the tokens that the scheduler had computed for it, in
    the order in which it had them computed.
    """

    def __init__(self, num_rows: int, token_budget: int, max_model_len: int = 64):
        limits = num_rows, token_budget, max_model_len
        self.scheduler = batching.Scheduler(*limits)
        self.oracle = Oracle(*limits)
        names = ("num_rows", "token_budget", "max_model_len")
        inside = (f"{name}={limit}" for name, limit in zip(names, limits, strict=True))
        self.of = History(f"Scheduler({', '.join(inside)})")
        self.computed: dict[str, list[int]] = {}

    def add(self, request_id: str, num_tokens: int, max_tokens: int = 3, stops_at=None) -> None:
        """Add a request. stops_at: the number of tokens behind which the next one ends it."""
        ids = prompt_of(request_id, num_tokens)
        eos_token_ids = frozenset()
        if stops_at is not None:
            sequence = list(ids)
            for _ in range(stops_at):
                sequence.append(next_id(sequence))
            eos_token_ids = frozenset({next_id(sequence)})
        job = Job(request_id, ids, max_tokens, eos_token_ids)
        self.scheduler.add(job.request())
        ends = "" if stops_at is None else f", end-of-sequence {sorted(eos_token_ids)}"
        text = f"add {request_id}: a prompt of {num_tokens}, max_tokens {max_tokens}{ends}"
        self.of.note(text, None)
        self.oracle.jobs.append(job)
        self.check_unfinished()

    def abort(self, request_id: str) -> None:
        self.scheduler.abort(request_id)
        self.of.note(f"abort {request_id}", None)
        job = self.oracle.find(request_id)
        if job is not None:
            job.aborted = True
        self.check_unfinished()

    def schedule(self) -> tuple[list, dict[str, int]]:
        """Plan a step on both sides, and compare."""
        parts, plan = self.scheduler.schedule(), self.oracle.plan()
        shares = {part.request_id: len(part.token_ids) for part in parts}
        self.of.note("schedule()", shares)
        self.check_parts(parts, plan)
        return parts, plan

    def check_parts(self, parts: list, plan: dict[str, int]) -> None:
        ids = [part.request_id for part in parts]
        for request_id in ids:
            known = self.oracle.find(request_id) is not None
            check_true(known, f"{request_id} takes part, and it has ended", of=self.of)
        once = len(set(ids)) == len(ids)
        check_true(once, f"a request takes part twice: {sorted(ids)}", of=self.of)
        total, budget = sum(len(part.token_ids) for part in parts), self.oracle.token_budget
        text = f"the step computes {total} tokens; token_budget is {budget}"
        check_true(total <= budget, text, of=self.of)
        shares = {part.request_id: len(part.token_ids) for part in parts}
        check_equal(in_order(shares, plan), plan, "who computes how many tokens", of=self.of)
        by_id = {part.request_id: part for part in parts}
        for request_id, count in plan.items():
            part, job = by_id[request_id], self.oracle.find(request_id)
            what = f"num_computed_tokens of {request_id}"
            check_equal(part.num_computed_tokens, job.num_computed, what, of=self.of)
            expected = job.ids[job.num_computed : job.num_computed + count]
            what = f"the token_ids of {request_id}"
            check_equal(part.token_ids, tuple(expected), what, of=self.of)
            expected = count == job.num_lacking
            check_equal(part.catches_up, expected, f"catches_up of {request_id}", of=self.of)
        rows = {request_id: by_id[request_id].row for request_id in plan}
        expected = {request_id: self.oracle.find(request_id).row for request_id in plan}
        check_equal(rows, expected, "the rows", of=self.of)

    def step(self, between: Callable[[], None] = lambda: None) -> dict[str, tuple]:
        """Do one step. between: what happens while the model runs."""
        parts, plan = self.schedule()
        between()
        chosen = {}
        for part in parts:
            ids = self.computed.get(part.request_id, [])[: part.num_computed_tokens]
            self.computed[part.request_id] = [*ids, *part.token_ids]
            if part.catches_up:
                chosen[part.request_id] = next_id(self.computed[part.request_id])
        # A mapping that cannot be written.
        outputs = self.scheduler.update(MappingProxyType(chosen))
        self.of.note(f"update({chosen})", [(o.token_id, o.finish_reason) for o in outputs])
        expected = self.oracle.apply(plan, lambda job: next_id(job.ids))
        self.check_outputs(outputs, expected)
        return expected

    def check_outputs(self, outputs: list, expected: dict[str, tuple]) -> None:
        ids = [output.request_id for output in outputs]
        check_equal(sorted(ids), sorted(expected), "whose outputs update returns", of=self.of)
        got = {output.request_id: (output.token_id, output.finish_reason) for output in outputs}
        what = "(token_id, finish_reason) of each output"
        check_equal(in_order(got, expected), expected, what, of=self.of)
        self.check_unfinished()

    def check_unfinished(self) -> None:
        expected = sum(not job.aborted for job in self.oracle.jobs)
        check_equal(self.scheduler.num_unfinished, expected, "num_unfinished", of=self.of)

    def drain(self) -> None:
        """Step until nobody is left; then there is nothing to do, twice."""
        while any(not job.aborted for job in self.oracle.jobs):
            self.step()
        for _ in range(2):
            self.step()


def in_order(got: dict, expected: dict) -> dict:
    """Write a dictionary in the order of another one, for whoever reads both."""
    return {key: got[key] for key in [*(k for k in expected if k in got), *got]}


def play(num_rows: int, token_budget: int, script: str, max_model_len: int = 64) -> Desk:
    """Follow a script such as "add a 6 4, step, abort a", then step until nobody is left.

    "add a 6 4 2": a prompt of 6, max_tokens 4, ended by its third token. "step 3": three steps.
    "during": what comes next happens between schedule and update. "again": schedule comes twice.
    """
    desk = Desk(num_rows, token_budget, max_model_len)
    lines = [line.split() for line in script.split(",")]
    while lines:
        word, *rest = lines.pop(0)
        if word == "add":
            desk.add(rest[0], *map(int, rest[1:]))
        elif word == "abort":
            desk.abort(rest[0])
        elif word == "again":
            desk.schedule()
        elif word == "step":
            for _ in range(int(rest[0]) if rest else 1):
                desk.step()
        else:
            during = [lines.pop(0) for _ in range(int(rest[0]))]
            desk.step(lambda during=during: follow(desk, during))
    desk.drain()
    return desk


def follow(desk: Desk, lines: list[list[str]]) -> None:
    for word, *rest in lines:
        if word == "add":
            desk.add(rest[0], *map(int, rest[1:]))
        else:
            desk.abort(rest[0])


@pytest.mark.parametrize("max_tokens", [1, 2, 5])
@pytest.mark.parametrize("num_tokens", [1, 2, 7])
def test_schedule_one_request(num_tokens, max_tokens):
    play(2, 8, f"add a {num_tokens} {max_tokens}")


@pytest.mark.parametrize("token_budget", [1, 3, 4, 6, 7, 30])
def test_schedule_a_long_prompt_beside_one_that_decodes(token_budget):
    play(3, token_budget, "add a 3 12, step 2, add b 17 3")


@pytest.mark.parametrize("token_budget", [2, 3, 5, 8, 13, 40])
def test_schedule_several_prompts_in_one_step(token_budget):
    play(6, token_budget, "add a 5 3, add b 1 4, add c 9 2, add d 2 5, add e 6 1")


@pytest.mark.parametrize("num_tokens", [1, 2, 4, 5, 6, 7, 8, 9, 16, 33])
@pytest.mark.parametrize("token_budget", [1, 2, 5, 8])
def test_schedule_a_prompt_in_chunks(token_budget, num_tokens):
    play(2, token_budget, f"add a {num_tokens} 3")


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4])
def test_schedule_more_requests_than_rows(num_rows):
    play(num_rows, 20, "add a 3 4, add b 2 1, add c 4 6, add d 1 2, add e 5 3, add f 2 2")


@pytest.mark.parametrize("num_rows, token_budget", [(8, 3), (8, 1), (2, 1), (5, 4), (3, 5)])
def test_schedule_more_requests_than_budget(num_rows, token_budget):
    play(num_rows, token_budget, "add a 2 6, add b 3 6, add c 1 6, add d 4 6, add e 2 6")


def test_schedule_admits_in_the_order_of_arrival():
    play(1, 4, "add d 3 2, add b 1 2, step, add a 1 1, add c 2 2, add aa 1 1")


def test_schedule_lets_nobody_overtake_a_long_prompt():
    play(4, 6, "add a 2 9, step, add long 20 2, add b 1 2, add c 1 2, step, add d 1 1")


def test_schedule_lets_nobody_overtake_who_waits_for_a_row():
    play(2, 10, "add a 2 3, add b 2 9, step, add long 30 2, add c 1 2, add d 1 2")


def test_schedule_uses_what_is_left_of_the_budget():
    play(8, 10, "add a 3 4, add b 3 4, add c 3 4, add d 3 4, add e 3 4, step, add f 30 2")


def test_schedule_gives_the_rows_of_the_ended_to_the_waiting():
    play(3, 12, "add a 2 2, add b 2 5, add c 2 1, add d 3 4, add e 1 4, add f 2 3, add g 2 2")


def test_schedule_takes_the_lowest_free_row():
    play(4, 30, "add a 1 6, add b 1 2, add c 1 3, add d 1 9, step 4, add e 2 2, step, add f 1 2")


@pytest.mark.parametrize("token_budget", [1, 2, 3, 7])
def test_schedule_never_stalls_a_running_request(token_budget):
    desk = Desk(4, token_budget, 200)
    desk.add("first", 2, 25)
    num_tokens = 0
    for i in range(2 * 25):
        # Prompts come without end.
        desk.add(f"r{i}", 3 + 11 * (i % 3), 2)
        num_tokens += "first" in desk.step()
    check_equal(num_tokens, 25, "tokens of the first request in 50 steps", of=desk.of)


@pytest.mark.parametrize("stops_at", [0, 1, 3])
@pytest.mark.parametrize("max_tokens", [1, 4, 9])
def test_schedule_ends_at_an_end_of_sequence(max_tokens, stops_at):
    play(2, 8, f"add b 2 7, add a 5 {max_tokens} {stops_at}, add c 4 4 1, add d 2 2")


@pytest.mark.parametrize("num_tokens", [1, 5, 8, 9])
def test_schedule_ends_at_the_end_of_the_context(num_tokens):
    play(2, 6, f"add a {num_tokens} 50, add b 3 4, add c 2 50", max_model_len=10)


def test_schedule_takes_any_collection_of_end_of_sequence_ids():
    desk = Desk(2, 8)
    for request_id, kind in (("a", set), ("b", list), ("c", tuple)):
        ids = prompt_of(request_id, 3)
        job = Job(request_id, ids, 4, kind([next_id(ids), 99]))
        desk.scheduler.add(job.request())
        desk.oracle.jobs.append(job)
    desk.of.note("add a, b and c, which the first token ends", None)
    desk.drain()


def test_schedule_has_nothing_to_do():
    desk = Desk(2, 4)
    desk.step()
    desk.add("a", 2, 1)
    desk.drain()
    desk.add("b", 9, 2)
    desk.drain()


ABORTS = {
    "waiting": "add a 3 3, add b 2 3, add c 2 2, step, abort c, step",
    "waiting, in front": "add a 3 3, step, add b 2 3, add c 2 2, add d 1 2, abort b, step",
    "before any step": "add a 3 3, add b 2 3, abort a",
    "the only one": "add a 3 3, abort a, step, add b 2 2",
    "in the middle of its prompt": "add a 2 5, step, add b 25 2, step, abort b, add c 3 2, step",
    "decoding": "add a 2 5, add b 3 9, add c 1 2, step 2, abort b, step, add d 2 2",
    "the oldest": "add a 2 9, add b 2 4, add c 7 2, step 2, abort a, step, add d 9 2",
    "twice": "add a 2 5, add b 3 9, step 2, abort b, abort b, step, abort b, add c 2 2, add d 1 1",
    "unknown": "add a 2 5, abort x, step, abort x, step, add x 2 2",
    "ended": "add a 2 2, add b 2 7, step 2, abort a, step, add c 2 3, abort a, step",
    "several": "add a 2 5, add b 2 5, add c 2 5, add d 2 5, step, abort a, abort b, step",
    "everybody": "add a 2 5, add b 9 5, add c 2 5, step, abort a, abort b, abort c",
    "the id comes again": "add a 2 9, add b 2 5, step 2, abort a, step, add a 4 2, step",
}


@pytest.mark.parametrize("case", ABORTS)
@pytest.mark.parametrize("num_rows", [2, 4])
def test_abort_between_steps(num_rows, case):
    play(num_rows, 6, ABORTS[case])


DURING = {
    "mid-prompt": "add a 2 6, step, add b 25 2, step, during 1, abort b, add c 3 2",
    "in its first chunk": "add a 2 6, add b 9 2, during 1, abort b, add c 3 2",
    "with its prompt": "add a 2 6, add b 3 2, during 1, abort b, add c 3 2",
    "decoding": "add a 2 6, add b 3 5, step 2, during 1, abort b, add c 3 2, add d 2 2",
    "at its last token": "add a 2 6, add b 3 2, step, during 1, abort b, add c 3 2, add d 2 2",
    "at its end of sequence": "add a 2 6, add b 3 9 1, step, during 1, abort b, add c 3 2",
    "waiting": "add a 2 6, add b 3 5, add c 1 1, add d 3 3, during 1, abort c",
    "twice": "add a 2 6, add b 3 5, during 2, abort b, abort b, add c 1 1, add d 3 3",
    "all of them": "add a 2 6, add b 3 5, step, during 2, abort a, abort b, add c 1 1, add d 3 3",
    "while others come": "add a 2 6, add b 3 5, step, during 3, add c 2 2, abort b, add d 3 3",
    "who came a moment ago": "add a 2 6, during 2, add c 2 2, abort c, add d 3 3",
    "the id comes again": "add a 2 6, add b 3 5, during 1, abort b, step, add b 2 3",
}


@pytest.mark.parametrize("case", DURING)
@pytest.mark.parametrize("num_rows", [2, 4])
def test_abort_during_a_step(num_rows, case):
    play(num_rows, 6, DURING[case])


def test_abort_needs_no_token():
    desk = Desk(2, 8)
    for request_id in "ab":
        desk.add(request_id, 3, 4)
    desk.schedule()
    desk.abort("b")
    ids = desk.oracle.find("a").ids
    outputs = desk.scheduler.update({"a": next_id(ids)})
    desk.of.note("update with a token for a alone", outputs)
    plan = {"a": 3, "b": 3}
    desk.check_outputs(outputs, desk.oracle.apply(plan, lambda job: next_id(job.ids)))
    desk.computed["a"] = list(ids[:3])
    desk.drain()


AGAIN = {
    "at first": "add a 3 3, add b 9 2, again, again, step",
    "while decoding": "add a 3 5, add b 3 4, step 2, again, step",
    "in the middle of a prompt": "add a 3 5, add b 20 2, step 2, again, again, step",
    "after an arrival": "add a 3 5, again, add b 2 2, add c 9 2, step",
    "after an abort": "add a 3 5, add b 2 5, add c 9 3, again, abort a, step, add d 2 2",
    "after an abort, again": "add a 3 5, add b 2 5, step, again, abort b, again, add d 2 2, step",
    "when a row was just taken": "add a 1 2, add b 1 9, add c 2 3, step 2, again, step",
}


@pytest.mark.parametrize("case", AGAIN)
@pytest.mark.parametrize("num_rows", [2, 3])
def test_schedule_again_instead_of_update(num_rows, case):
    play(num_rows, 6, AGAIN[case])


def test_schedule_again_forgets_the_step_before():
    desk = Desk(2, 8)
    for request_id in "ab":
        desk.add(request_id, 3, 4)
    desk.schedule()
    desk.abort("b")
    desk.schedule()
    token_id = next_id(desk.oracle.find("a").ids)
    of = f"{desk.of}\nupdate with tokens for a and b"
    chosen = {"a": token_id, "b": 1}
    check_refused(desk.scheduler.update, chosen, mentions=["b"], of=of)


def check_refused(function: Callable, *args, mentions: Sequence, of: object) -> None:
    """Hold a call to a ValueError that names something, with the steps before in the message."""
    try:
        got = function(*args)
    except ValueError as error:
        missing = [str(word) for word in mentions if str(word) not in str(error)]
        check_true(not missing, f"ValueError({error}) does not name {missing}", of=of)
    else:
        check_true(False, f"returned {describe(got)}, expected ValueError", of=of)


@pytest.mark.parametrize(
    "num_rows, token_budget, value", [(0, 4, 0), (-2, 4, -2), (3, 0, 0), (3, -1, -1)]
)
def test_scheduler_refuses_to_have_nothing(num_rows, token_budget, value):
    limits = num_rows, token_budget, 64
    check_refused(batching.Scheduler, *limits, mentions=[value], of=f"Scheduler{limits}")


@pytest.mark.parametrize("num_tokens", [10, 11, 200])
def test_add_refuses_a_prompt_that_never_fits(num_tokens):
    desk = Desk(2, 4, max_model_len=10)
    desk.add("a", 3, 4)
    desk.step()
    request = Job("b", prompt_of("b", num_tokens), 1, frozenset()).request()
    of = f"{desk.of}\nadd b: a prompt of {num_tokens}"
    check_refused(desk.scheduler.add, request, mentions=[num_tokens, 10], of=of)
    desk.add("c", 9, 4)
    desk.add("b", 2, 2)
    desk.drain()


@pytest.mark.parametrize("when", ["waiting", "running", "aborted"])
def test_add_refuses_an_id_that_is_taken(when):
    desk = Desk(1, 8)
    if when == "waiting":
        desk.add("x", 3, 5)
    desk.add("twin", 4, 5)
    for _ in range(2):
        desk.step()
    request = Job("twin", prompt_of("other", 2), 1, frozenset()).request()
    if when == "aborted":
        # In the middle of a step that has it scheduled.
        desk.step(lambda: [desk.abort("twin"), refuse_twin(desk, request)])
        desk.step()
        desk.add("twin", 2, 3)
    else:
        refuse_twin(desk, request)
    desk.drain()
    desk.add("twin", 2, 3)
    desk.drain()


def refuse_twin(desk: Desk, request) -> None:
    of = f"{desk.of}\nadd twin once more"
    check_refused(desk.scheduler.add, request, mentions=["twin"], of=of)
    desk.check_unfinished()


# What is chosen in a step in which a and b catch up, and long does not; the ids that are named.
WRONG_TOKENS = {
    "a token is missing": ({"a": 1}, ["b"]),
    "all tokens are missing": ({}, ["a", "b"]),
    "a token for a chunk": ({"a": 1, "b": 2, "long": 3}, ["long"]),
    "a token for who waits": ({"a": 1, "b": 2, "late": 3}, ["late"]),
    "a token for nobody": ({"a": 1, "b": 2, "nobody": 3}, ["nobody"]),
    "one missing and one too many": ({"a": 1, "long": 3}, ["b", "long"]),
}


@pytest.mark.parametrize("case", WRONG_TOKENS)
def test_update_refuses_tokens_that_do_not_fit(case):
    chosen, mentions = WRONG_TOKENS[case]
    desk = Desk(3, 8)
    for request_id, num_tokens in (("a", 2), ("b", 3), ("long", 20), ("late", 2)):
        desk.add(request_id, num_tokens, 4)
    desk.schedule()
    of = f"{desk.of}\nupdate({chosen})"
    check_refused(desk.scheduler.update, chosen, mentions=mentions, of=of)
    desk.drain()


def test_update_without_a_step():
    desk = Desk(2, 8)
    for _ in range(2):
        outputs = [output.request_id for output in desk.scheduler.update({})]
        check_equal(outputs, [], "whose outputs update({}) returns", of=desk.of)
    desk.add("a", 3, 4)
    check_refused(desk.scheduler.update, {"a": 1}, mentions=["a"], of=f"{desk.of}\nupdate")
    desk.step()
    outputs = [output.request_id for output in desk.scheduler.update({})]
    check_equal(outputs, [], "whose outputs a second update({}) returns", of=desk.of)
    of = f"{desk.of}\na second update, with a token"
    check_refused(desk.scheduler.update, {"a": 1}, mentions=["a"], of=of)
    desk.drain()


def test_scheduled_parts_stay_as_they_were():
    desk = Desk(2, 4)
    desk.add("a", 7, 3)
    kept = []
    for _ in range(3):
        parts, plan = desk.schedule()
        kept.append((parts, [(p.num_computed_tokens, *p.token_ids) for p in parts]))
        chosen = {"a": next_id(desk.oracle.find("a").ids)} if parts[0].catches_up else {}
        desk.scheduler.update(chosen)
        desk.oracle.apply(plan, lambda job: next_id(job.ids))
    for parts, expected in kept:
        got = [(p.num_computed_tokens, *p.token_ids) for p in parts]
        check_equal(got, expected, "the parts of an earlier step, two steps later", of=desk.of)


@settings(max_examples=60)
@given(st.data())
def test_schedule_anything(data):
    sizes = data.draw(st.sampled_from([(1, 1), (1, 5), (2, 3), (3, 2), (3, 8), (4, 16), (5, 4)]))
    desk = Desk(*sizes, max_model_len=24)
    num_added = 0
    for _ in range(data.draw(st.integers(1, 14))):
        for _ in range(data.draw(st.integers(0, 2))):
            num_added += 1
            # Ids whose order as text is not the order of their arrival.
            name = f"r{(7 * num_added) % 100:02}"
            stops_at = data.draw(st.sampled_from([None, None, 0, 1, 3]))
            desk.add(name, data.draw(st.integers(1, 23)), data.draw(st.integers(1, 6)), stops_at)
        victims = [f"r{(7 * i) % 100:02}" for i in range(1, num_added + 2)]
        event = data.draw(st.sampled_from(["step", "step", "step", "abort", "during", "again"]))
        if event == "abort":
            desk.abort(data.draw(st.sampled_from(victims)))
        elif event == "again":
            desk.schedule()
        elif event == "during":
            victim = data.draw(st.sampled_from(victims))
            desk.step(lambda victim=victim: desk.abort(victim))
        else:
            desk.step()
    desk.drain()


class SumModel(nn.Module):
    """A model whose scores are looked up by an exact sum over every token and its position.

    Its queries are zeros, so that attention gives the mean of the values that a token sees; these
    are whole numbers, so that the mean times their number is one again, however it was added up.
    It notes the ids and positions of every call, and raises in a layer when it is told to.
    """

    NUM_SCORES = 4093

    def __init__(self, limit: int = 48):
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
        self.calls: list[list[tuple[int, int]]] = []
        self.fails_in_layer = -1

    def values(self, layer: int, ids: Tensor, positions: Tensor) -> Tensor:
        """Hash ids and positions into small whole numbers: (tokens, 3)."""
        place = torch.tensor([3, 8, 11]) + 17 * layer
        mixed = (ids[:, None] + 5) * (positions[:, None] + place) * 31 + ids[:, None] * place
        return mixed % 29

    def forward(self, input_ids: Tensor, positions: Tensor, attend) -> Tensor:
        ids, places = input_ids.tolist(), positions.tolist()
        self.calls.append(list(zip(ids, places, strict=True)))
        sums = []
        for layer in range(2):
            if layer == self.fails_in_layer:
                raise RuntimeError("the model was told to fail")
            v = self.values(layer, input_ids, positions).float()[None]
            q = torch.zeros(2, len(ids), 3)
            means = attend(layer, q, torch.ones_like(v), v)
            sums.append((means[1] * (positions + 1)[:, None]).round())
        return torch.cat(sums, dim=-1)

    def look_up(self, sums: Tensor) -> Tensor:
        factors = torch.tensor([1, 37, 211, 5, 401, 97])
        return self.scores[(sums.long() * factors).sum(-1) % self.NUM_SCORES]

    def logits(self, hidden: Tensor) -> Tensor:
        return self.look_up(hidden)

    def expected(self, ids: Sequence[int]) -> Tensor:
        """Score what follows a whole sequence."""
        ids = torch.tensor(list(ids))
        positions = torch.arange(len(ids))
        return self.look_up(
            torch.cat([self.values(layer, ids, positions).sum(0) for layer in range(2)])
        )


class Chooser:
    """A choose that depends on a seed and on all ids; it holds what it is called with."""

    def __init__(self, model: SumModel, ids: Sequence[int], seed: int, of: object):
        self.model, self.seed, self.of = model, seed, of
        self.ids = list(ids)
        self.then: Callable[[], None] = lambda: None

    def __call__(self, logits: Tensor, token_ids: Sequence[int]) -> int:
        check_equal(list(token_ids), self.ids, "the ids that choose is called with", of=self.of)
        expected = self.model.expected(self.ids)
        of = f"{self.of}\nthe scores that choose is called with, for {len(self.ids)} ids"
        check_close(logits, expected, dtype=torch.float32, of=of)
        self.then()
        self.ids.append(pick(expected, self.ids, self.seed))
        return self.ids[-1]


def pick(scores: Tensor, ids: Sequence[int], seed: int) -> int:
    """Take one of the three best, by the seed and all ids; the best where the seed is 0."""
    rank = zlib.crc32(bytes([seed, *ids])) % 3 if seed else 0
    return int(scores.topk(3).indices[rank])


class Served:
    """A batcher beside the oracle: outputs and passes of the model are compared, step by step."""

    def __init__(self, num_rows: int, token_budget: int, limit: int = 48, **arguments):
        self.model = SumModel(limit)
        self.batcher = batching.ContinuousBatcher(self.model, num_rows, token_budget, **arguments)
        self.oracle = Oracle(num_rows, token_budget, limit)
        self.of = History(f"ContinuousBatcher(num_rows={num_rows}, token_budget={token_budget})")
        self.choosers: dict[str, Chooser] = {}
        self.seeds: dict[str, int] = {}

    def add(self, request_id, num_tokens, max_tokens=3, seed=0, eos_token_ids=()) -> None:
        ids = prompt_of(request_id, num_tokens)
        job = Job(request_id, ids, max_tokens, frozenset(eos_token_ids))
        chooser = Chooser(self.model, ids, seed, self.of)
        self.batcher.add(job.request(), chooser)
        self.of.note(f"add {request_id}: a prompt of {num_tokens}, max_tokens {max_tokens}", None)
        self.oracle.jobs.append(job)
        self.choosers[request_id], self.seeds[request_id] = chooser, seed

    def abort(self, request_id: str) -> None:
        self.batcher.abort(request_id)
        self.of.note(f"abort {request_id}", None)
        job = self.oracle.find(request_id)
        if job is not None:
            job.aborted = True

    def choose(self, job: Job) -> int:
        return pick(self.model.expected(job.ids), job.ids, self.seeds[job.request_id])

    def step(self) -> list:
        num_calls = len(self.model.calls)
        plan = self.oracle.plan()
        tokens = [
            (self.oracle.find(request_id).ids[position], position)
            for request_id, count in plan.items()
            for position in itertools.islice(
                itertools.count(self.oracle.find(request_id).num_computed), count
            )
        ]
        outputs = self.batcher.step()
        got = {output.request_id: (output.token_id, output.finish_reason) for output in outputs}
        self.of.note("step()", got)
        calls = self.model.calls[num_calls:]
        check_equal(len(calls), int(bool(plan)), "how often the model was called", of=self.of)
        if calls:
            what = "the (id, position) pairs that the model was called with, sorted"
            check_equal(sorted(calls[0]), sorted(tokens), what, of=self.of)
        expected = self.oracle.apply(plan, self.choose)
        ids = sorted(output.request_id for output in outputs)
        check_equal(ids, sorted(expected), "whose outputs step returns", of=self.of)
        what = "(token_id, finish_reason) of each output"
        check_equal(in_order(got, expected), expected, what, of=self.of)
        left = sum(not job.aborted for job in self.oracle.jobs)
        check_equal(self.batcher.num_unfinished, left, "num_unfinished", of=self.of)
        return outputs

    def drain(self) -> None:
        while any(not job.aborted for job in self.oracle.jobs):
            self.step()
        for _ in range(2):
            self.step()


@pytest.mark.parametrize("num_tokens", [1, 2, 9, 20])
def test_batcher_with_one_request(num_tokens):
    served = Served(2, 8)
    served.add("a", num_tokens, 6)
    served.drain()


@pytest.mark.parametrize("num_rows, token_budget", [(1, 1), (2, 5), (3, 8), (4, 40), (8, 3)])
def test_batcher_gives_each_what_it_gets_alone(num_rows, token_budget):
    served = Served(num_rows, token_budget)
    for i, num_tokens in enumerate((6, 1, 17, 3, 9, 2, 1)):
        served.add(f"r{9 - i}", num_tokens, 2 + (5 * i) % 7, seed=i)
    served.drain()


def test_batcher_chooses_the_best_where_nothing_is_said():
    model = SumModel()
    batcher = batching.ContinuousBatcher(model, 2, 8)
    ids = prompt_of("a", 4)
    batcher.add(batching.Request("a", ids, 5))
    expected = list(ids)
    for _ in range(5):
        expected.append(int(model.expected(expected).argmax()))
    got = batching.run(batcher)
    of = "ContinuousBatcher(num_rows=2, token_budget=8), one request without a choose"
    check_equal(got, {"a": (expected[4:], "length")}, "what comes out", of=of)


def test_batcher_puts_a_short_request_into_a_long_ones_row():
    served = Served(1, 8)
    for request_id, num_tokens, max_tokens in (("long", 30, 9), ("a", 1, 4), ("b", 5, 2)):
        served.add(request_id, num_tokens, max_tokens)
    served.drain()


@pytest.mark.parametrize("num_tokens", [40, 47])
def test_batcher_reaches_the_end_of_the_context(num_tokens):
    served = Served(2, 16)
    served.add("a", num_tokens, 100)
    served.add("b", 3, 4)
    served.drain()


def test_batcher_ends_at_an_end_of_sequence():
    served = Served(2, 16)
    for i, request_id in enumerate("abcd"):
        served.add(request_id, 3 + i, 40, seed=i, eos_token_ids=range(0, VOCAB_SIZE, 4))
    served.drain()


@pytest.mark.parametrize("steps_before", [0, 1, 2, 3, 5])
def test_batcher_aborts_between_steps(steps_before):
    served = Served(2, 8)
    for request_id, num_tokens in (("a", 3), ("b", 14), ("c", 2), ("d", 5)):
        served.add(request_id, num_tokens, 5)
    for _ in range(steps_before):
        served.step()
    served.abort("b")
    served.abort("b")
    served.abort("nobody")
    served.drain()
    served.add("b", 4, 2)
    served.drain()


@pytest.mark.parametrize("victim", ["a", "b", "c", "d", "nobody"])
def test_batcher_aborts_from_inside_a_choose(victim):
    # b aborts: itself, one that chose already, one that would choose next, one that waits.
    served = Served(3, 16)
    for request_id, num_tokens in (("a", 3), ("b", 4), ("c", 2), ("d", 5), ("e", 2)):
        served.add(request_id, num_tokens, 4)
    served.step()

    def abort():
        served.batcher.abort(victim)
        job = served.oracle.find(victim)
        if job is not None:
            job.aborted = True

    served.choosers["b"].then = abort
    plan = served.oracle.plan()
    outputs = served.batcher.step()
    served.of.note(f"step(), in which the choose of b aborts {victim}", outputs)
    expected = served.oracle.apply(plan, served.choose)
    got = {output.request_id: (output.token_id, output.finish_reason) for output in outputs}
    what = "(token_id, finish_reason) of each output"
    check_equal(in_order(got, expected), expected, what, of=served.of)
    served.choosers["b"].then = lambda: None
    served.drain()


def test_batcher_calls_no_choose_of_the_aborted():
    model = SumModel()
    batcher = batching.ContinuousBatcher(model, 4, 16)
    called = []

    def chooser(name):
        def choose(logits, token_ids):
            called.append(name)
            for other in "abc":
                if other != name:
                    batcher.abort(other)
            return 0

        return choose

    for name in "abc":
        batcher.add(batching.Request(name, prompt_of(name, 3), 1), chooser(name))
    outputs = batcher.step()
    of = "ContinuousBatcher, three requests; whoever chooses first aborts the other two"
    check_equal(len(called), 1, "how many of them were asked", of=of)
    check_equal([output.request_id for output in outputs], called, "whose outputs come", of=of)


def test_batcher_takes_requests_from_inside_a_choose():
    served = Served(2, 16)
    served.add("a", 3, 4)
    served.step()
    later = Job("b", prompt_of("b", 5), 3, frozenset())
    later_chooser = Chooser(served.model, later.ids, 2, served.of)

    def add():
        served.choosers["a"].then = lambda: None
        served.batcher.add(later.request(), later_chooser)

    served.choosers["a"].then = add
    plan = served.oracle.plan()
    outputs = served.batcher.step()
    served.of.note("step(), in which the choose of a adds b", outputs)
    served.oracle.apply(plan, served.choose)
    served.oracle.jobs.append(later)
    served.seeds["b"] = 2
    served.drain()


def check_raised_on(served: Served, error: type[Exception], what: str) -> None:
    """Do a step in which an error is raised, and hold it to coming out."""
    try:
        served.batcher.step()
        raised = False
    except error:
        raised = True
    served.of.note(what, None)
    check_true(raised, "the error does not come out of the step", of=served.of)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("steps_before", [0, 1, 2, 4])
def test_batcher_after_the_model_has_failed(steps_before, layer):
    served = Served(2, 8)
    for request_id, num_tokens in (("a", 3), ("b", 14), ("c", 2)):
        served.add(request_id, num_tokens, 5)
    for _ in range(steps_before):
        served.step()
    num_calls, served.model.fails_in_layer = len(served.model.calls), layer
    check_raised_on(served, RuntimeError, f"step(), and the model raises in layer {layer}")
    num_calls = len(served.model.calls) - num_calls
    check_equal(num_calls, 1, "how often the model was called", of=served.of)
    served.model.fails_in_layer = -1
    served.drain()


class Refused(Exception):
    """What a choose of a test raises."""


@pytest.mark.parametrize("failing", ["a", "b", "c"])
@pytest.mark.parametrize("then", ["it goes on", "it is aborted"])
def test_batcher_after_a_choose_has_failed(then, failing):
    served = Served(3, 16)
    for request_id, num_tokens in (("a", 3), ("b", 4), ("c", 2), ("d", 5)):
        served.add(request_id, num_tokens, 4)
    served.step()
    served.step()
    lengths = {name: len(chooser.ids) for name, chooser in served.choosers.items()}

    def fail():
        raise Refused

    served.choosers[failing].then = fail
    check_raised_on(served, Refused, f"step(), and the choose of {failing} raises")
    for name, chooser in served.choosers.items():
        # Who chose before it failed is asked again.
        del chooser.ids[lengths[name] :]
    served.choosers[failing].then = lambda: None
    if then == "it is aborted":
        served.abort(failing)
    served.drain()


def test_batcher_asks_for_attention_once_a_step():
    asked = []

    def make_attend(cache, num_new_tokens):
        asked.append(dict(num_new_tokens))
        return kv.cached_attend(cache, num_new_tokens)

    served = Served(2, 6, make_attend=make_attend)
    for request_id, num_tokens in (("a", 3), ("b", 8), ("c", 2)):
        served.add(request_id, num_tokens, 3)
    served.step()
    check_equal(asked, [{0: 3, 1: 3}], "what make_attend was called with", of=served.of)
    served.step()
    check_equal(asked[1:], [{0: 1, 1: 5}], "what make_attend was called with then", of=served.of)
    served.drain()
    passes = len(served.model.calls)
    check_equal(len(asked), passes, "how often make_attend was called", of=served.of)


def test_batcher_computes_every_token_once():
    served = Served(3, 10)
    prompts = {"a": 7, "b": 21, "c": 1, "d": 12, "e": 3}
    for request_id, num_tokens in prompts.items():
        served.add(request_id, num_tokens, 6)
    served.drain()
    expected = Counter()
    for request_id, chooser in served.choosers.items():
        check_equal(len(chooser.ids), prompts[request_id] + 6, f"ids of {request_id}", of=served.of)
        # What was chosen last is no longer computed.
        expected.update(zip(chooser.ids[:-1], itertools.count(), strict=False))
    got = Counter(itertools.chain(*served.model.calls))
    wrong = {
        pair: (got[pair], expected[pair]) for pair in got | expected if got[pair] != expected[pair]
    }
    text = f"(id, position) → how often it was computed, and should have been: {wrong}"
    check_true(not wrong, text, of=served.of)


@contextlib.contextmanager
def garbage_collected():
    """At the end, free what the block made and nothing refers to; older objects take too long."""
    gc.disable()
    try:
        yield
        gc.collect(0)
    finally:
        gc.enable()


def test_batcher_keeps_nothing_of_who_has_ended():
    model = SumModel()
    batcher = batching.ContinuousBatcher(model, 2, 8)
    watched = {}

    def add(request_id: str, max_tokens: int, eos_token_ids=()) -> None:
        def choose(logits, token_ids):
            return int(logits.argmax())

        watched[request_id] = weakref.ref(choose)
        request = batching.Request(request_id, prompt_of(request_id, 3), max_tokens, eos_token_ids)
        batcher.add(request, choose)

    with garbage_collected():
        add("at max_tokens", 2)
        add("at an end of sequence", 5, range(VOCAB_SIZE))
        add("aborted", 9)
        add("aborted while it waits", 9)
        for _ in range(2):
            batcher.step()
        for request_id in ("aborted", "aborted while it waits"):
            batcher.abort(request_id)
        for _ in range(2):
            batcher.step()
    alive = sorted(request_id for request_id, ref in watched.items() if ref() is not None)
    of = "ContinuousBatcher, four requests that end in different ways"
    check_equal(alive, [], "whose choose is still kept", of=of)


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE, 10**9])
@pytest.mark.parametrize("place", [0, 2])
def test_batcher_refuses_an_id_outside_the_vocabulary(place, token_id):
    served = Served(2, 8)
    served.add("a", 3, 4)
    served.step()
    ids = prompt_of("b", 3)
    ids[place] = token_id
    request = Job("b", ids, 4, frozenset()).request()
    of = f"{served.of}\nadd b: {ids}; the vocabulary has {VOCAB_SIZE} tokens"
    check_refused(served.batcher.add, request, mentions=[token_id, VOCAB_SIZE], of=of)
    served.add("b", 2, 2)
    served.drain()


def test_batcher_refuses_what_the_scheduler_refuses():
    served = Served(2, 8, limit=12)
    served.add("a", 3, 4, seed=2)
    served.step()
    for name, num_tokens, mentions in (("b", 12, (12,)), ("b", 30, (30, 12)), ("a", 2, ("a",))):
        request = Job(name, prompt_of("other", num_tokens), 2, frozenset()).request()
        of = f"{served.of}\nadd {name}: a prompt of {num_tokens}; the context is 12"
        check_refused(served.batcher.add, request, mentions=mentions, of=of)
    served.add("b", 11, 2)
    served.drain()


@pytest.mark.parametrize("num_rows, token_budget", [(0, 4), (3, 0)])
def test_batcher_refuses_to_have_nothing(num_rows, token_budget):
    of = f"ContinuousBatcher(num_rows={num_rows}, token_budget={token_budget})"
    sizes = num_rows, token_budget
    check_refused(batching.ContinuousBatcher, SumModel(), *sizes, mentions=[0], of=of)


@settings(max_examples=25)
@given(st.data())
def test_batcher_with_anything(data):
    served = Served(*data.draw(st.sampled_from([(1, 3), (2, 2), (3, 7), (4, 16)])), limit=20)
    num_added = 0
    for _ in range(data.draw(st.integers(1, 10))):
        for _ in range(data.draw(st.integers(0, 2))):
            num_added += 1
            served.add(
                f"r{num_added}",
                data.draw(st.integers(1, 19)),
                data.draw(st.integers(1, 6)),
                seed=data.draw(st.integers(0, 3)),
                eos_token_ids=data.draw(st.sampled_from([(), (), range(0, VOCAB_SIZE, 3)])),
            )
        if num_added and data.draw(st.sampled_from([False, False, True])):
            served.abort(f"r{data.draw(st.integers(1, num_added))}")
        served.step()
    served.drain()


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


@pytest.mark.parametrize("token_budget", [1, 4, 9, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_batcher_matches_transformers(family, token_budget):
    batching.Scheduler(1, 1, 2)
    with both_models(family) as (theirs, ours):
        batcher = batching.ContinuousBatcher(ours, 3, token_budget)
        draw = python_random.Random(family)
        prompts = {f"r{i}": draw.choices(range(61), k=k) for i, k in enumerate((11, 1, 6, 3, 17))}
        expected = {}
        for i, (request_id, prompt_ids) in enumerate(prompts.items()):
            max_tokens = 3 + 4 * (i % 3)
            batcher.add(batching.Request(request_id, prompt_ids, max_tokens))
            ids = list(prompt_ids)
            for _ in range(max_tokens):
                ids.append(int(theirs(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            expected[request_id] = ids[len(prompt_ids) :], "length"
        got = batching.run(batcher)
        for request_id, completion in expected.items():
            of = f"five prompts to a {family} in 3 rows, token_budget {token_budget}"
            check_equal(got.get(request_id), completion, f"the completion of {request_id}", of=of)
