"""Grades week3/scheduler: who computes what in a step, over a pool of blocks that is simulated.

The pool's slots remember from which tokens their keys and values were computed, and the next token
of a request is a hash of what its slots remember: whatever is stale, missing or somebody else's
comes to light in the step in which it is read.
"""

import copy
import hashlib
import random as python_random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import pytest

from course.grading import History, check_equal, check_true, describe, lab, session

scheduling = lab("week3/scheduler")
caching = lab("week3/prefix_caching")

VOCAB_SIZE = 23


def next_id(ids: Sequence[int]) -> int:
    """Hash a whole sequence, in its order, into its next token."""
    return zlib.crc32(bytes(ids)) % VOCAB_SIZE


def prompt_of(name: str, num_tokens: int) -> list[int]:
    """Make a prompt; two of one name begin alike."""
    return python_random.Random(name).choices(range(VOCAB_SIZE), k=num_tokens)


def block_hashes(ids: Sequence[int], block_size: int, salt: str) -> list[bytes]:
    parent, hashes = hashlib.sha256(salt.encode()).digest(), []
    for end in range(block_size, len(ids) + 1, block_size):
        content = b"".join(i.to_bytes(8, "little") for i in ids[end - block_size : end])
        parent = hashlib.sha256(parent + content).digest()
        hashes.append(parent)
    return hashes


@dataclass
class Job:
    """What the oracle knows of a request."""

    request_id: str
    prompt_ids: list[int]
    max_tokens: int
    eos_token_ids: frozenset[int] = frozenset()
    salt: str = ""
    ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0
    has_begun: bool = False
    aborted: bool = False

    def __post_init__(self):
        self.ids = list(self.prompt_ids)

    def request(self):
        eos_token_ids, salt = self.eos_token_ids, self.salt
        return scheduling.Request(
            self.request_id, self.prompt_ids, self.max_tokens, eos_token_ids, salt
        )


@dataclass(frozen=True)
class Share:
    """What a request computes in a step: the tokens from start on, the last ones guessed."""

    start: int
    token_ids: list[int]
    num_drafts: int
    catches_up: bool


class Oracle:
    """The contract in the plainest words; it plans on a copy of the pool."""

    def __init__(self, max_num_seqs: int, token_budget: int, max_model_len: int):
        self.max_num_seqs, self.token_budget = max_num_seqs, token_budget
        self.max_model_len = max_model_len
        self.running: list[Job] = []
        self.waiting: list[Job] = []
        self.counts = dict.fromkeys(
            ("num_preemptions", "num_prompt_tokens", "num_cached_tokens"), 0
        )

    def jobs(self) -> list[Job]:
        return self.running + self.waiting

    def find(self, request_id: str) -> Job | None:
        return next((job for job in self.jobs() if job.request_id == request_id), None)

    def num_unfinished(self) -> int:
        return sum(not job.aborted for job in self.jobs())

    def limit(self, job: Job) -> int:
        return min(len(job.prompt_ids) + job.max_tokens, self.max_model_len)

    def plan(self, pool, drafts: dict[str, list[int]]) -> tuple[dict[str, Share], list[str]]:
        """Plan a step; returns who computes what, and who lost its blocks."""
        for job in [job for job in self.jobs() if job.aborted]:
            self.remove(job)
            pool.free(job.request_id)
        shares, preempted = {}, []
        for job in list(self.running):
            if job in self.running:
                share = self._share(pool, job, self._left(shares), preempted)
                shares |= {job.request_id: share} if share else {}
        if not preempted:
            for request_id, share in shares.items():
                guesses = drafts.get(request_id, []) if share.catches_up else []
                shares[request_id] = self._guess(pool, share, guesses, request_id, shares)
            self._admit(pool, shares)
        return shares, preempted

    def remove(self, job: Job) -> None:
        (self.running if job in self.running else self.waiting).remove(job)

    def _left(self, shares: dict[str, Share]) -> int:
        return self.token_budget - sum(len(share.token_ids) for share in shares.values())

    def _share(self, pool, job: Job, left: int, preempted: list[str]) -> Share | None:
        """Find what one that runs computes; None when it lost its own blocks."""
        start = job.num_computed
        token_ids = job.ids[start : start + left]
        while not pool.allocate(job.request_id, start + len(token_ids)):
            victim = self.running.pop()
            pool.free(victim.request_id)
            victim.num_computed = 0
            self.waiting.insert(0, victim)
            self.counts["num_preemptions"] += 1
            preempted.append(victim.request_id)
            if victim is job:
                return None
        return Share(start, token_ids, 0, start + len(token_ids) == len(job.ids))

    def _guess(
        self, pool, share: Share, guesses: list[int], request_id: str, shares: dict[str, Share]
    ) -> Share:
        """Try as many guesses as there are, then fewer and fewer."""
        job = self.find(request_id)
        for num_drafts in range(len(guesses), 0, -1):
            in_budget = num_drafts <= self._left(shares)
            in_limit = len(job.ids) + num_drafts + 1 <= self.limit(job)
            if in_budget and in_limit and pool.allocate(request_id, len(job.ids) + num_drafts):
                token_ids = share.token_ids + guesses[:num_drafts]
                return Share(share.start, token_ids, num_drafts, True)
        return share

    def _admit(self, pool, shares: dict[str, Share]) -> None:
        while self.waiting and len(self.running) < self.max_num_seqs and self._left(shares) > 0:
            job = self.waiting[0]
            hashes = block_hashes(job.ids, pool.block_size, job.salt)
            prefix = pool.match(hashes, len(job.ids))
            if not pool.can_admit(len(job.ids), prefix):
                return
            start = job.num_computed = len(prefix) * pool.block_size
            token_ids = job.ids[start : start + self._left(shares)]
            end = start + len(token_ids)
            pool.allocate(job.request_id, end, prefix)
            self.running.append(self.waiting.pop(0))
            shares[job.request_id] = Share(start, token_ids, 0, end == len(job.ids))
            if not job.has_begun:
                job.has_begun, job.num_cached = True, start
                self.counts["num_prompt_tokens"] += len(job.ids)
                self.counts["num_cached_tokens"] += start

    def apply(self, shares: dict[str, Share], chosen: dict[str, list[int]]) -> dict[str, tuple]:
        """Take in a step; returns request_id → (token_ids, finish_reason)."""
        outputs = {}
        for request_id, share in shares.items():
            job = self.find(request_id)
            job.num_computed += len(share.token_ids)
            if share.catches_up and not job.aborted:
                outputs[request_id] = self._output(job, share, chosen[request_id])
        return outputs

    def _output(self, job: Job, share: Share, chosen: list[int]) -> tuple:
        # The guesses that were accepted, and one more: the others were computed for nothing.
        job.num_computed -= share.num_drafts + 1 - len(chosen)
        new, reason = [], None
        for token_id in chosen:
            if reason is None and token_id in job.eos_token_ids:
                reason = "stop"
            if reason is None:
                new.append(token_id)
                reason = "length" if len(job.ids) + len(new) == self.limit(job) else None
        job.ids += new
        job.num_computed = min(job.num_computed, len(job.ids))
        if reason is not None:
            self.remove(job)
        return tuple(new), reason


class Memory:
    """The slots of a pool: each remembers the salt and a hash of the tokens that it depends on."""

    def __init__(self, pool, of: History):
        self.pool, self.of = pool, of
        self.slots: dict[int, tuple[str, int]] = {}
        # Of every full block of every sequence so far: hash → what its slots remember.
        self.contents: dict[bytes, list[tuple[str, int]]] = {}

    def slot(self, request_id: str, position: int) -> int:
        size = self.pool.block_size
        table = self.pool.block_table(request_id)
        text = (
            f"{request_id} needs position {position}, and its table covers {len(table) * size} "
            "positions"
        )
        check_true(position // size < len(table), text, of=self.of)
        return table[position // size] * size + position % size

    def compute(self, job: Job, share: Share) -> list[int]:
        """Compute a share; returns the tokens that are chosen, guesses that are right first."""
        ids = job.ids[: share.start] + share.token_ids
        states = [(job.salt, crc) for crc in hashes_of(ids)]
        self.check_read(job, states[: share.start])
        for position in range(share.start, len(ids)):
            self.write(job, position, states[position])
        if not share.catches_up:
            return []
        chosen = []
        for position in range(len(ids) - 1 - share.num_drafts, len(ids)):
            chosen.append(states[position][1] % VOCAB_SIZE)
            if ids[position + 1 : position + 2] != chosen[-1:]:
                break
        return chosen

    def check_read(self, job: Job, states: list[tuple[str, int]]) -> None:
        for position, state in enumerate(states):
            slot = self.slot(job.request_id, position)
            check_true(self.slots.get(slot) == state, self.story(job, position, slot), of=self.of)

    def story(self, job: Job, position: int, slot: int) -> str:
        block_id = slot // self.pool.block_size
        where = f"position {position} of {job.request_id}, in block {block_id},"
        if slot not in self.slots:
            return f"{where} is read and was never computed"
        if self.slots[slot][0] != job.salt:
            return f"{where} is read and was computed under another salt"
        return f"{where} is read, and its KV is that of other tokens"

    def write(self, job: Job, position: int, state: tuple[str, int]) -> None:
        slot = self.slot(job.request_id, position)
        block_id = slot // self.pool.block_size
        count = self.pool.ref_count(block_id)
        text = f"{job.request_id} writes into block {block_id}, which is in {count} tables"
        check_true(count == 1, text, of=self.of)
        self.slots[slot] = state

    def expect(self, job: Job, share: Share) -> None:
        """Remember what the blocks of a sequence must hold whenever they can be found."""
        ids, size = job.ids[: share.start] + share.token_ids, self.pool.block_size
        states = [(job.salt, crc) for crc in hashes_of(ids)]
        for i, block_hash in enumerate(block_hashes(ids, size, job.salt)):
            self.contents[block_hash] = states[i * size : (i + 1) * size]

    def check_index(self) -> None:
        """Every block that can be found holds what its hash says, to its last slot."""
        size = self.pool.block_size
        num_found = 0
        for block_hash, states in self.contents.items():
            block_id = self.pool.find(block_hash)
            if block_id is not None:
                num_found += 1
                held = [
                    self.slots.get(slot) for slot in range(block_id * size, (block_id + 1) * size)
                ]
                text = f"block {block_id} can be found under tokens whose KV is not in it"
                check_true(held == states, text, of=self.of)
        num_cached = self.pool.num_cached_blocks
        text = f"of {num_cached} blocks that can be found, {num_found} are found by their tokens"
        check_true(num_found == num_cached, text, of=self.of)


def hashes_of(ids: Sequence[int]) -> Iterator[int]:
    """Hash every beginning of a sequence."""
    crc = 0
    for token_id in ids:
        crc = zlib.crc32(bytes([token_id]), crc)
        yield crc


class Desk:
    """A scheduler beside the oracle; every step is compared, and the pool is checked throughout."""

    def __init__(
        self,
        pool: tuple,
        max_num_seqs: int = 4,
        token_budget: int = 16,
        max_model_len: int | None = None,
    ):
        self.pool = caching.CachingBlockManager(*pool)
        capacity = self.pool.num_blocks * self.pool.block_size
        limits = max_num_seqs, token_budget, max_model_len or capacity
        self.scheduler = scheduling.Scheduler(self.pool, *limits)
        self.oracle = Oracle(*limits)
        names = ("num_blocks", "block_size", "watermark", "enabled")
        of_pool = ", ".join(f"{n}={value}" for n, value in zip(names, pool, strict=False))
        names = ("max_num_seqs", "token_budget", "max_model_len")
        inside = ", ".join(f"{n}={limit}" for n, limit in zip(names, limits, strict=True))
        self.of = History(f"Scheduler({inside}) over CachingBlockManager({of_pool})")
        self.memory = Memory(self.pool, self.of)
        self.guesses: dict[str, list[int]] = {}
        self.names: list[str] = []

    def call(self, operation: str, function: Callable, *args):
        """Call a method of the scheduler; should it crash, the steps before it are told."""
        session.last_call = f"{self.of}\n  {operation}"
        return function(*args)

    def add(self, job: Job) -> None:
        self.call(f"add {job.request_id}", self.scheduler.add, job.request())
        self.of.note(f"add {job.request_id}: {wishes(job)}; unfinished", self.num_left())
        self.oracle.waiting.append(job)
        self.names += [] if job.request_id in self.names else [job.request_id]
        self.check_between()

    def abort(self, request_id: str) -> None:
        self.call(f"abort {request_id}", self.scheduler.abort, request_id)
        self.of.note(f"abort {request_id}; unfinished", self.num_left())
        job = self.oracle.find(request_id)
        if job is not None:
            job.aborted = True
        self.check_between()

    def num_left(self) -> int:
        return self.scheduler.num_unfinished

    def guess(self, request_id: str, marks: str) -> None:
        """Guess the next tokens of a request: + is right, - is wrong."""
        job = self.oracle.find(request_id)
        if job is None:
            self.guesses[request_id] = [1] * len(marks)
            return
        ids = list(job.ids)
        for mark in marks:
            ids.append((next_id(ids) + (mark == "-")) % VOCAB_SIZE)
        self.guesses[request_id] = ids[len(job.ids) :]

    def step(self, between: Callable[[], None] = lambda: None) -> dict[str, tuple]:
        """Do one step. between: what happens while the model runs."""
        step, shares = self.schedule()
        between()
        chosen = {}
        for request_id, share in shares.items():
            ids = self.memory.compute(self.oracle.find(request_id), share)
            chosen |= {request_id: ids} if ids else {}
        return self.update(step, shares, chosen)

    def schedule(self) -> tuple[object, dict[str, Share]]:
        """Plan a step on both sides, and compare."""
        drafts, self.guesses = self.guesses, {}
        copied = copy.deepcopy(self.pool)
        # A mapping that cannot be written; nothing at all where nobody guesses.
        arguments = [MappingProxyType(drafts)] if drafts else []
        step = self.call(f"schedule{guesses_text(drafts)}", self.scheduler.schedule, *arguments)
        text = f"schedule{guesses_text(drafts)}: {told(step)}; free blocks"
        self.of.note(text, self.pool.num_free_blocks)
        shares, preempted = self.oracle.plan(copied, drafts)
        for request_id, share in shares.items():
            self.memory.expect(self.oracle.find(request_id), share)
        self.check_pool()
        self.check_step(step, shares, preempted)
        for request_id in self.names:
            got, expected = (len(p.block_table(request_id)) for p in (self.pool, copied))
            check_equal(got, expected, f"how many blocks {request_id} holds", of=self.of)
        self.check_counts()
        return step, shares

    def check_step(self, step, shares: dict[str, Share], preempted: list[str]) -> None:
        ids = [part.request_id for part in step.parts]
        for request_id in ids:
            known = self.oracle.find(request_id) is not None
            check_true(known, f"{request_id} takes part, and it has ended", of=self.of)
        once = len(set(ids)) == len(ids)
        check_true(once, f"a request takes part twice: {sorted(ids)}", of=self.of)
        total, budget = sum(len(p.token_ids) for p in step.parts), self.oracle.token_budget
        text = f"the step computes {total} tokens; token_budget is {budget}"
        check_true(total <= budget, text, of=self.of)
        check_equal(sorted(step.preempted), sorted(preempted), "who lost its blocks", of=self.of)
        got = {part.request_id: len(part.token_ids) for part in step.parts}
        expected = {request_id: len(share.token_ids) for request_id, share in shares.items()}
        what = "who computes how many tokens"
        check_equal(in_order(got, expected), expected, what, of=self.of)
        for part in step.parts:
            share = shares[part.request_id]
            of_it = f"of {part.request_id}"
            what = f"num_computed_tokens {of_it}"
            check_equal(part.num_computed_tokens, share.start, what, of=self.of)
            check_equal(part.num_drafts, share.num_drafts, f"num_drafts {of_it}", of=self.of)
            what = f"the token_ids {of_it}"
            check_equal(part.token_ids, tuple(share.token_ids), what, of=self.of)
            check_equal(part.catches_up, share.catches_up, f"catches_up {of_it}", of=self.of)

    def update(self, step, shares: dict[str, Share], chosen: dict) -> dict[str, tuple]:
        jobs = {request_id: self.oracle.find(request_id) for request_id in shares}
        rejected = {name: self.rejected_blocks(jobs[name], shares[name], chosen) for name in shares}
        # Who was aborted may lose its blocks with the update.
        tables = {name: list(self.pool.block_table(name)) for name in shares}
        text = f"update: {chosen_text(chosen)}"
        outputs = self.call(text, self.scheduler.update, step, MappingProxyType(chosen))
        self.of.note(f"{text}; free blocks", self.pool.num_free_blocks)
        expected = self.oracle.apply(shares, chosen)
        self.check_outputs(outputs, expected)
        self.check_pool()
        for name, job in jobs.items():
            self.check_published(job, shares[name].start, rejected[name], tables[name])
        self.check_counts()
        return expected

    def rejected_blocks(self, job: Job, share: Share, chosen: dict) -> dict[bytes, int]:
        """Find the full blocks with a guess in them that was wrong: hash → block."""
        ids, size = job.ids[: share.start] + share.token_ids, self.pool.block_size
        num_right = len(ids) - share.num_drafts - 1 + len(chosen.get(job.request_id, [0]))
        pairs = zip(
            block_hashes(ids, size, job.salt), self.pool.block_table(job.request_id), strict=False
        )
        return dict(list(pairs)[num_right // size :])

    def check_outputs(self, outputs: list, expected: dict[str, tuple]) -> None:
        ids = [output.request_id for output in outputs]
        check_equal(sorted(ids), sorted(expected), "whose outputs update returns", of=self.of)
        got = {o.request_id: (o.token_ids, o.finish_reason) for o in outputs}
        what = "(token_ids, finish_reason) of each output"
        check_equal(in_order(got, expected), expected, what, of=self.of)

    def check_published(
        self, job: Job, start: int, rejected: dict[bytes, int], table: list[int]
    ) -> None:
        """Blocks that became full from start on can be found, and those with a wrong guess not."""
        for block_hash, block_id in rejected.items():
            text = f"block {block_id} of {job.request_id} can be found with a wrong guess in it"
            check_true(self.pool.find(block_hash) != block_id, text, of=self.of)
        size = self.pool.block_size
        hashes = block_hashes(job.ids[: job.num_computed], size, job.salt)
        if job.aborted:
            for i in range(start // size, len(hashes)):
                text = f"{job.request_id} was aborted during the step, and its block {table[i]}"
                text += ", which the step filled, can be found"
                check_true(self.pool.find(hashes[i]) != table[i], text, of=self.of)
            return
        for i in range(start // size, len(hashes) if self.pool.enabled else 0):
            text = (
                f"the tokens {i * size} to {i * size + size - 1} of {job.request_id} are a full "
                "block and computed, and cannot be found"
            )
            check_true(self.pool.find(hashes[i]) is not None, text, of=self.of)

    def check_pool(self) -> None:
        """Check what must hold after every operation."""
        holders: dict[int, list[str]] = {}
        for request_id in self.names:
            for block_id in self.pool.block_table(request_id):
                holders.setdefault(block_id, []).append(request_id)
        for request_id in self.names:
            if self.oracle.find(request_id) is None:
                text = f"{request_id} has ended, and it still holds blocks"
                check_true(not self.pool.block_table(request_id), text, of=self.of)
        for block_id in range(self.pool.num_blocks):
            count, tables = self.pool.ref_count(block_id), holders.get(block_id, [])
            text = f"block {block_id} is in the tables of {tables}, and its count is {count}"
            check_true(count == len(tables), text, of=self.of)
        num_free, num_blocks = self.pool.num_free_blocks, self.pool.num_blocks
        text = f"{num_free} blocks are free and {len(holders)} in tables, of {num_blocks}"
        check_true(num_free + len(holders) == num_blocks, text, of=self.of)
        self.memory.check_index()

    def check_counts(self) -> None:
        """Check all that may be asked when no abort is on its way."""
        if any(job.aborted for job in self.oracle.jobs()):
            self.check_between()
            return
        check_equal(self.scheduler.num_waiting, len(self.oracle.waiting), "num_waiting", of=self.of)
        check_equal(self.scheduler.num_running, len(self.oracle.running), "num_running", of=self.of)
        self.check_between()

    def check_between(self) -> None:
        """Check what may be asked at any time."""
        expected = self.oracle.num_unfinished()
        check_equal(self.scheduler.num_unfinished, expected, "num_unfinished", of=self.of)
        for name, expected in self.oracle.counts.items():
            check_equal(getattr(self.scheduler, name), expected, name, of=self.of)
        for job in self.oracle.jobs():
            if not job.aborted:
                got = self.scheduler.num_cached(job.request_id)
                check_equal(got, job.num_cached, f"num_cached({job.request_id!r})", of=self.of)

    def drain(self) -> None:
        """Step until nobody is left; then there is nothing to do, twice, and nothing is held."""
        while self.oracle.num_unfinished():
            self.step()
        for _ in range(2):
            self.step()
        num_free, num_blocks = self.pool.num_free_blocks, self.pool.num_blocks
        check_equal(num_free, num_blocks, "free blocks when nobody is left", of=self.of)


def wishes(job: Job) -> str:
    parts = [f"a prompt of {len(job.prompt_ids)}", f"max_tokens {job.max_tokens}"]
    parts += [f"end-of-sequence {sorted(job.eos_token_ids)}"] if job.eos_token_ids else []
    return ", ".join(parts + ([f"salt {job.salt}"] if job.salt else []))


def guesses_text(drafts: dict[str, list[int]]) -> str:
    return f" with guesses for {' and '.join(drafts)}" if drafts else ""


def told(step) -> str:
    """Put a step into a line."""
    texts = []
    for part in step.parts:
        start, end = part.num_computed_tokens, part.num_computed_tokens + len(part.token_ids) - 1
        guessed = f" ({part.num_drafts} guessed)" if part.num_drafts else ""
        places = f"{start}" if start == end else f"{start}–{end}"
        texts.append(f"{part.request_id} computes {places}{guessed}")
    texts += [f"{request_id} loses its blocks" for request_id in step.preempted]
    return ", ".join(texts) or "nothing"


def chosen_text(chosen: dict[str, list[int]]) -> str:
    return ", ".join(f"{name} gets {ids}" for name, ids in chosen.items()) or "nobody gets a token"


def in_order(got: dict, expected: dict) -> dict:
    """Write a dictionary in the order of another one, for whoever reads both."""
    return {key: got[key] for key in [*(k for k in expected if k in got), *got]}


def job_of(text: str) -> Job:
    """Read "a 6 4 like b salt x stops 2": a prompt of 6 that begins as b's, max_tokens 4.

    stops: the number of tokens behind which the next one ends it.
    """
    request_id, num_tokens, max_tokens, *rest = text.split()
    extra = dict(zip(rest[::2], rest[1::2], strict=True))
    ids = prompt_of(extra.get("like", request_id), int(num_tokens))
    eos_token_ids = frozenset()
    if "stops" in extra:
        sequence = list(ids)
        for _ in range(int(extra["stops"])):
            sequence.append(next_id(sequence))
        eos_token_ids = frozenset({next_id(sequence)})
    return Job(request_id, ids, int(max_tokens), eos_token_ids, extra.get("salt", ""))


def play(script: str, pool: tuple, *limits: int) -> Desk:
    """Follow a script such as "add a 6 4, step, abort a", then step until nobody is left.

    "add": see `job_of`. "step 3": three steps. "guess a ++-": guesses for the next step, the last
    one wrong. "during 2": the next two happen between schedule and update.
    """
    desk = Desk(pool, *limits)
    lines = [line.strip() for line in script.split(",")]
    while lines:
        word, _, rest = lines.pop(0).partition(" ")
        if word == "step":
            for _ in range(int(rest or 1)):
                desk.step()
        elif word == "during":
            during = [lines.pop(0) for _ in range(int(rest))]
            desk.step(lambda during=during: [follow(desk, *line.split(" ", 1)) for line in during])
        else:
            follow(desk, word, rest)
    desk.drain()
    return desk


def follow(desk: Desk, word: str, rest: str) -> None:
    if word == "add":
        desk.add(job_of(rest))
    elif word == "guess":
        desk.guess(*rest.split())
    else:
        desk.abort(rest)


@pytest.mark.parametrize("max_tokens", [1, 2, 5])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 7, 8, 9])
def test_schedule_one_request(num_tokens, max_tokens):
    play(f"add a {num_tokens} {max_tokens}", (4, 4), 2, 16)


@pytest.mark.parametrize("token_budget", [3, 4, 6, 7, 30])
def test_schedule_a_long_prompt_beside_one_that_decodes(token_budget):
    play("add a 3 12, step 2, add b 17 3", (20, 2), 3, token_budget)


@pytest.mark.parametrize("token_budget", [6, 8, 13, 40])
def test_schedule_several_prompts_in_one_step(token_budget):
    script = "add a 5 3, add b 1 4, add c 9 2, add d 2 5, add e 6 1"
    play(script, (20, 4), 6, token_budget)


# Chunks of any size give the same tokens.
@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 8, 9, 16, 17])
@pytest.mark.parametrize("chunk", [1, 3, 4, 5, 20])
def test_chunks_of_any_size(chunk, num_tokens):
    play(f"add a {num_tokens} 6", (8, 4), 1, chunk)


@pytest.mark.parametrize("token_budget", [2, 3, 5, 6, 9])
def test_chunks_beside_one_that_decodes(token_budget):
    play("add a 2 14, step, add b 21 2, add c 13 2", (24, 4), 2, token_budget)


def test_chunks_are_found_by_others_as_soon_as_they_are_computed():
    play("add a 2 9, step, add b 21 2, step 2, add c 24 2 like b", (40, 4), 4, 9)


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 4])
def test_schedule_more_requests_than_may_run(max_num_seqs):
    script = "add a 3 4, add b 2 1, add c 4 6, add d 1 2, add e 5 3, add f 2 2"
    play(script, (20, 2), max_num_seqs, 20)


def test_schedule_has_nothing_to_do():
    desk = Desk((4, 2), 2, 8)
    desk.step()
    desk.add(job_of("a 2 1"))
    desk.drain()
    desk.add(job_of("b 7 2"))
    desk.drain()


def test_schedule_admits_in_the_order_of_arrival():
    script = "add d 3 2, add b 1 2, step, add a 1 1, add c 2 2, add aa 1 1"
    play(script, (20, 4), 1, 4)


def test_schedule_lets_nobody_overtake_a_long_prompt():
    script = "add a 2 9, step, add long 20 2, add b 1 2, add c 1 2, step, add d 1 1"
    play(script, (20, 4), 4, 6)


def test_schedule_lets_nobody_overtake_who_waits_for_blocks():
    script = "add a 13 5, step, add long 22 2, add b 1 2, add c 1 2, step, add d 1 1"
    play(script, (9, 4), 4, 40)


def test_schedule_uses_what_is_left_of_the_budget():
    script = "add a 3 4, add b 3 4, add c 3 4, add d 3 4, add e 3 4, step, add f 30 2"
    play(script, (40, 4), 8, 10)


# Prompts that arrive without end.
@pytest.mark.parametrize("token_budget", [4, 5, 7, 16])
def test_prompts_without_end_never_stall_a_running_request(token_budget):
    desk = Desk((60, 4), 4, token_budget)
    desk.add(job_of("first 2 25"))
    num_tokens = 0
    for i in range(2 * 25):
        desk.add(job_of(f"r{i} {3 + 11 * (i % 3)} 2"))
        num_tokens += "first" in desk.step()
    check_equal(num_tokens, 25, "tokens of the first request in 50 steps", of=desk.of)


@pytest.mark.parametrize("stops", [0, 1, 3])
@pytest.mark.parametrize("max_tokens", [1, 4, 9])
def test_schedule_ends_at_an_end_of_sequence(max_tokens, stops):
    script = f"add b 2 7, add a 5 {max_tokens} stops {stops}, add c 4 4 stops 1, add d 2 2"
    play(script, (20, 4), 4, 16)


@pytest.mark.parametrize("num_tokens", [1, 5, 8, 9])
def test_schedule_ends_at_the_end_of_the_context(num_tokens):
    play(f"add a {num_tokens} 50, add b 3 4, add c 2 50", (20, 4), 2, 6, 10)


def test_schedule_takes_any_collection_of_end_of_sequence_ids():
    desk = Desk((20, 4), 3, 16)
    for request_id, kind in (("a", set), ("b", list), ("c", tuple)):
        ids = prompt_of(request_id, 3)
        desk.add(Job(request_id, ids, 4, kind([next_id(ids), 99])))
    desk.drain()


# More than the pool can hold when all of them grow.
CROWDS = {
    "two": "add a 4 9, add b 4 9, step, add c 2 3",
    "three": "add a 3 9, add b 3 9, add c 3 9, step, add d 2 3",
    "several in one step": "add a 8 12, step, add b 1 9, add c 1 9, step, add d 1 9",
    "the oldest is short": "add a 1 3, add b 5 11, add c 4 5, step 2, add d 2 3",
    "a long prompt": "add a 4 12, step 2, add b 9 3, step, add c 2 2",
    "again and again": "add a 3 13, add b 2 13, add c 1 13, add d 2 9, add e 1 9",
}


# The pool runs out while requests grow.
@pytest.mark.parametrize("case", CROWDS)
@pytest.mark.parametrize("pool", [(8, 2), (5, 4), (20, 1)], ids=str)
def test_preempt_when_the_pool_runs_out(pool, case):
    play(CROWDS[case], pool, 4, 8, 16)


@pytest.mark.parametrize("case", CROWDS)
def test_preempt_without_a_cache(case):
    desk = play(CROWDS[case], (8, 2, 0, False), 4, 8, 16)
    assert desk.oracle.counts["num_preemptions"] > 0


def test_preempt_the_one_that_began_last():
    desk = play("add a 4 9, step, add b 4 9, step, add c 4 9", (9, 2), 4, 8, 16)
    assert desk.oracle.counts["num_preemptions"] > 0


def test_preempt_oneself():
    # b is the last one, and itself needs the block that is not there.
    desk = play("add a 5 3, add b 4 6", (5, 2), 2, 12, 10)
    assert desk.oracle.counts["num_preemptions"] > 0


def test_preempt_in_the_middle_of_a_prompt():
    desk = play("add a 2 10, step, add b 7 3", (6, 2), 2, 2, 12)
    assert desk.oracle.counts["num_preemptions"] > 0


def test_preempted_requests_wait_in_front():
    script = "add a 4 12, add b 2 9, add c 2 9, add d 2 3, add e 2 3"
    desk = play(script, (5, 2), 4, 12, 10)
    assert desk.oracle.counts["num_preemptions"] > 1


def test_preempted_requests_keep_what_they_have_generated():
    desk = play("add a 2 10, add b 2 10, add c 2 4", (6, 2), 3, 12, 12)
    assert desk.oracle.counts["num_preemptions"] > 0


def test_preempted_requests_come_back_in_chunks():
    desk = play("add a 3 12, add b 9 6, add c 2 4", (9, 2), 3, 5, 18)
    assert desk.oracle.counts["num_preemptions"] > 0


def test_preempt_and_admit_nobody_in_that_step():
    # When b gives way, there would be room for c.
    desk = play("add a 3 9, add b 6 5, step 2, add c 1 3, add d 1 3", (5, 2), 4, 12, 10)
    assert desk.oracle.counts["num_preemptions"] > 0


@pytest.mark.parametrize("block_size, num_tokens", [(1, 7), (2, 9), (4, 13), (16, 40)])
def test_preempt_never_who_runs_alone(block_size, num_tokens):
    num_blocks = -(-(num_tokens + 6) // block_size)
    desk = play(f"add a {num_tokens} 50", (num_blocks, block_size), 1, 16)
    check_equal(desk.oracle.counts["num_preemptions"], 0, "num_preemptions", of=desk.of)


def test_preempted_requests_count_once_as_a_hit():
    script = "add x 6 1, step, add a 6 9 like x, add b 6 9 like x, add c 5 4"
    desk = play(script, (8, 2), 3, 16, 15)
    assert desk.oracle.counts["num_preemptions"] > 0
    assert desk.oracle.counts["num_cached_tokens"] > 0


# What cannot fit is refused; what fits begins, however long others were in front of it.
@pytest.mark.parametrize("watermark", [0, 1, 3, 9])
def test_admit_a_prompt_that_fills_the_pool(watermark):
    script = "add a 3 4, add full 15 1, add b 2 3, add c 2 3"
    play(script, (4, 4, watermark), 3, 24)


@pytest.mark.parametrize("watermark", [1, 2, 5])
def test_admit_only_above_the_watermark(watermark):
    script = "add a 7 6, add b 4 2, add c 3 6, step 2, add d 9 2, add e 1 1"
    play(script, (9, 2, watermark), 4, 30)


def test_admit_for_all_tokens_not_for_the_first_chunk():
    play("add a 3 9, step, add long 14 2, add b 1 2", (8, 2), 3, 4, 16)


# A prompt whose beginning is in the pool, and too few free blocks for its rest.
@pytest.mark.parametrize("num_blocks", [7, 8, 9, 10])
def test_admit_changes_nothing_where_it_fails(num_blocks):
    script = "add x 8 1, step, add a 9 4 like x, step, add b 13 3 like x, step, add c 1 2"
    play(script, (num_blocks, 2), 4, 20, 14)


# The whole prompt is in the pool, to its last block.
@pytest.mark.parametrize("num_tokens", [3, 4, 5, 7, 8, 9, 12])
@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_prefix_of_the_whole_prompt(block_size, num_tokens):
    script = f"add x 12 1, step, add a {num_tokens} 3 like x, add b {num_tokens} 4 like x"
    play(script, (40, block_size), 4, 40, 40)


def test_prefix_from_one_that_runs():
    play("add a 9 6, step 2, add b 12 4 like a, add c 7 3 like a", (20, 2), 4, 20)


def test_prefix_of_generated_tokens():
    desk = Desk((20, 2), 2, 30)
    desk.add(job_of("a 3 7"))
    desk.drain()
    ids = prompt_of("a", 3)
    for _ in range(7):
        ids.append(next_id(ids))
    # The last token that was generated was never computed.
    desk.add(Job("b", [*ids, 1, 2, 3], 3))
    desk.step()
    check_equal(desk.scheduler.num_cached("b"), 8, "num_cached('b')", of=desk.of)
    desk.drain()


@pytest.mark.parametrize("stops", [0, 2, 3])
def test_prefix_of_who_has_stopped(stops):
    play(f"add a 5 9 stops {stops}, step 6, add b 5 7 like a, add c 9 2 like a", (20, 2), 2, 20)


# Two identical prompts in one step, each with blocks of its own.
@pytest.mark.parametrize("num_tokens", [4, 7, 8])
def test_prefix_that_two_compute_in_one_step(num_tokens):
    script = (
        f"add a {num_tokens} 4, add b {num_tokens} 7 like a, step, add c {num_tokens} 3 like a, "
        f"step 5, add d {num_tokens} 5 like a"
    )
    play(script, (12, 2), 4, 40, 20)


def test_prefix_of_another_salt_is_not_shared():
    script = (
        "add a 9 4 salt x, step 2, add b 9 4 like a salt y, add c 9 4 like a, "
        "add d 9 4 like a salt x"
    )
    desk = play(script, (40, 2), 4, 40)
    check_equal(desk.scheduler.num_cached_tokens, 8, "num_cached_tokens", of=desk.of)


def test_prefix_that_was_handed_out_anew_is_gone():
    script = "add a 8 1, step, add b 9 4, step 4, add c 9 2 like a, step 2, add d 9 3 like b"
    play(script, (6, 2), 2, 20, 12)


def test_prefix_without_a_cache():
    play("add a 9 3, step, add b 9 3 like a, add c 5 2 like a", (20, 2, 0, False), 4, 30)


# Guesses for a step: + comes true, - does not.
GUESSES = ["+", "-", "++", "+-", "-+", "++++", "++-+", "+++++++++"]


@pytest.mark.parametrize("marks", GUESSES)
@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_guess_once(block_size, marks):
    play(f"add a 3 12, step, guess a {marks}, step", (20, block_size), 2, 16)


@pytest.mark.parametrize("marks", GUESSES)
def test_guess_again_and_again(marks):
    script = "add a 3 14, add b 5 6, step, " + ", ".join([f"guess a {marks}, step"] * 4)
    play(script, (20, 2), 3, 16)


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5, 6])
def test_guess_up_to_max_tokens(max_tokens):
    play(f"add a 3 {max_tokens}, step, guess a ++++, step", (20, 2), 2, 16)


@pytest.mark.parametrize("num_tokens", [4, 5, 6, 7, 8])
def test_guess_up_to_the_end_of_the_context(num_tokens):
    play(f"add a {num_tokens} 50, step, guess a ++++, step", (20, 2), 2, 16, 10)


@pytest.mark.parametrize("stops", [1, 2, 3, 4, 5])
def test_guess_beyond_an_end_of_sequence(stops):
    script = f"add a 4 12 stops {stops}, step, guess a ++++, step, add b 9 3 like a"
    play(script, (20, 2), 2, 16)


@pytest.mark.parametrize("token_budget", [3, 4, 5, 6, 8])
def test_guess_within_the_budget(token_budget):
    script = "add a 2 14, add b 2 12, add c 2 9, step 3, guess b +++, guess a ++++, step"
    play(script + ", guess a -+, guess b ++, guess c +, step", (40, 2), 3, token_budget)


def test_guess_beside_a_prompt_in_chunks():
    script = "add a 2 14, step, add b 21 2, step, guess a +++++, guess b ++, step"
    play(script, (40, 2), 3, 8)


@pytest.mark.parametrize("marks", ["+++", "---", "++++++"])
@pytest.mark.parametrize("num_tokens", [3, 4, 5, 6])
def test_guess_takes_blocks_from_nobody(num_tokens, marks):
    script = f"add a {num_tokens} 7, add b 4 3, step, guess a {marks}, guess b ++, step"
    play(script, (6, 2), 3, 20)


def test_guess_for_who_is_not_there_or_does_not_run():
    script = (
        "add a 2 9, guess a ++, guess x ++, step, add b 30 2, step, guess b ++, step, "
        "abort a, guess a ++, step"
    )
    play(script, (40, 2), 2, 8)


def test_guess_for_who_was_preempted():
    script = "add a 3 9, add b 3 9, " + ", ".join(["guess a +, guess b ++, step"] * 8)
    desk = play(script, (6, 2), 2, 12)
    assert desk.oracle.counts["num_preemptions"] > 0


@pytest.mark.parametrize("marks", ["-", "--", "+-", "-----"])
def test_guess_that_was_wrong_is_found_by_nobody(marks):
    # The block is full only with the guesses in it.
    play(f"add a 3 9, step, guess a {marks}, step, add b 12 3 like a", (30, 4), 3, 20)
    play(f"add a 2 9, step, guess a {marks}, step, add b 12 3 like a", (30, 1), 3, 20)


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
    "sharing its blocks": "add a 9 3, step, add b 9 5 like a, step, abort a, step, add c 9 2",
}


# An abort at any time; blocks are given back once, and nothing comes out any more.
@pytest.mark.parametrize("case", ABORTS)
@pytest.mark.parametrize("max_num_seqs", [2, 4])
def test_abort_between_steps(max_num_seqs, case):
    play(ABORTS[case], (20, 2), max_num_seqs, 6, 32)


DURING = {
    "mid-prompt": "add a 2 6, step, add b 25 2, step, during 1, abort b, add c 3 2",
    "in its first chunk": "add a 2 6, add b 9 2, during 1, abort b, add c 3 2",
    "with its prompt": "add a 2 6, add b 3 2, during 1, abort b, add c 3 2",
    "decoding": "add a 2 6, add b 3 5, step 2, during 1, abort b, add c 3 2, add d 2 2",
    "at its last token": "add a 2 6, add b 3 2, step, during 1, abort b, add c 3 2, add d 2 2",
    "at its end of sequence": "add a 2 6, add b 3 9 stops 1, step, during 1, abort b, add c 3 2",
    "waiting": "add a 2 6, add b 3 5, add c 1 1, add d 3 3, during 1, abort c",
    "twice": "add a 2 6, add b 3 5, during 2, abort b, abort b, add c 1 1, add d 3 3",
    "all of them": "add a 2 6, add b 3 5, step, during 2, abort a, abort b, add c 1 1, add d 3 3",
    "while others come": "add a 2 6, add b 3 5, step, during 3, add c 2 2, abort b, add d 3 3",
    "who came a moment ago": "add a 2 6, during 2, add c 2 2, abort c, add d 3 3",
    "the id comes again": "add a 2 6, add b 3 5, during 1, abort b, step, add b 2 3",
    "with guesses": "add a 2 6, add b 3 9, step, guess b ++, during 1, abort b, add c 3 2",
    "whose prompt another one has": "add a 2 6, add b 9 5, during 1, abort b, add c 9 5 like b",
}


@pytest.mark.parametrize("case", DURING)
@pytest.mark.parametrize("max_num_seqs", [2, 4])
def test_abort_during_a_step(max_num_seqs, case):
    play(DURING[case], (20, 2), max_num_seqs, 6, 32)


@pytest.mark.parametrize("when", ["abort b", "during 1, abort b", "during 2, abort b, add d 1 2"])
def test_abort_who_was_preempted(when):
    # In the fourth step, a takes the blocks of b.
    desk = play(f"add a 3 9, add b 2 9, step 4, {when}, add c 2 3", (4, 2, 0, False), 2, 12, 8)
    assert desk.oracle.counts["num_preemptions"] > 0


@pytest.mark.parametrize("given", [True, False])
def test_abort_needs_no_token(given):
    desk = Desk((20, 2), 2, 8)
    for request_id in "ab":
        desk.add(job_of(f"{request_id} 3 4"))
    step, shares = desk.schedule()
    desk.abort("b")
    chosen = {name: desk.memory.compute(desk.oracle.find(name), shares[name]) for name in "ab"}
    if not given:
        del chosen["b"]
    desk.update(step, shares, chosen)
    desk.drain()


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
    "limits, mentions",
    [
        ((0, 4, 20), [0]),
        ((-2, 4, 20), [-2]),
        ((3, 2, 20), [3, 2]),
        ((1, 0, 20), [1, 0]),
        ((40, 39, 20), [40, 39]),
        ((2, 4, 41), [41, 40]),
        ((2, 4, 4096), [4096, 40]),
    ],
)
def test_scheduler_refuses(limits, mentions):
    pool = caching.CachingBlockManager(10, 4)
    of = f"Scheduler over 40 slots, (max_num_seqs, token_budget, max_model_len) = {limits}"
    check_refused(scheduling.Scheduler, pool, *limits, mentions=mentions, of=of)


@pytest.mark.parametrize("limits", [(1, 1, 40), (4, 4, 2), (3, 4, 39)])
def test_scheduler_takes_what_just_fits(limits):
    play("add a 1 60, add b 1 2, step, add c 1 3", (10, 4), *limits)


# A prompt without room for one token is refused at once, and the others go on.
@pytest.mark.parametrize("num_tokens", [10, 11, 200])
def test_add_refuses_a_prompt_that_never_fits(num_tokens):
    desk = Desk((20, 2), 2, 4, 10)
    desk.add(job_of("a 3 4"))
    desk.step()
    job = job_of(f"b {num_tokens} 1")
    of = f"{desk.of}\nadd b: a prompt of {num_tokens}"
    check_refused(desk.scheduler.add, job.request(), mentions=[num_tokens, 10], of=of)
    desk.check_counts()
    desk.add(job_of("c 9 4"))
    desk.add(job_of("b 2 2"))
    desk.drain()


# An id that is taken.
@pytest.mark.parametrize("when", ["waiting", "running", "preempted", "aborted"])
def test_add_refuses_an_id_that_is_taken(when):
    desk = Desk((6, 2), 1 if when == "waiting" else 2, 8, 10)
    if when in ("waiting", "preempted"):
        desk.add(job_of("x 3 7"))
    desk.add(job_of("twin 4 5"))
    for _ in range(5 if when == "preempted" else 2):
        desk.step()
    assert (desk.oracle.counts["num_preemptions"] > 0) == (when == "preempted")
    if when == "aborted":
        # In the middle of a step that has it scheduled.
        desk.step(lambda: [desk.abort("twin"), refuse_twin(desk)])
        desk.step()
        desk.add(job_of("twin 2 3"))
    else:
        refuse_twin(desk)
    desk.drain()
    desk.add(job_of("twin 2 3 like other"))
    desk.drain()


def refuse_twin(desk: Desk) -> None:
    request = job_of("twin 2 1 like other").request()
    of = f"{desk.of}\nadd twin once more"
    check_refused(desk.scheduler.add, request, mentions=["twin"], of=of)
    desk.check_counts()


@pytest.mark.parametrize("end", ["add a 3 2, step 2", "add a 3 9, step, abort a, step"])
def test_num_cached_knows_nobody_who_has_ended(end):
    desk = play(end, (20, 2), 2, 8)
    for request_id in ("a", "nobody"):
        try:
            got = desk.scheduler.num_cached(request_id)
        except KeyError:
            continue
        text = f"num_cached({request_id!r}) returned {describe(got)}, expected KeyError"
        check_true(False, text, of=desk.of)


# What is chosen in a step in which a and b catch up, b with two guesses, and long does not; the
# ids that are named.
WRONG_TOKENS = {
    "tokens are missing": ({"a": [1]}, ["b"]),
    "all tokens are missing": ({}, ["a", "b"]),
    "no tokens": ({"a": [], "b": [1]}, ["a"]),
    "tokens for a chunk": ({"a": [1], "b": [2], "long": [3]}, ["long"]),
    "tokens for who waits": ({"a": [1], "b": [2], "late": [3]}, ["late"]),
    "tokens for nobody": ({"a": [1], "b": [2], "nobody": [3]}, ["nobody"]),
    "one missing and one too many": ({"a": [1], "long": [3]}, ["b", "long"]),
    "more than one without a guess": ({"a": [1, 2], "b": [2]}, ["a"]),
    "more than the guesses and one": ({"a": [1], "b": [1, 2, 3, 4]}, ["b"]),
    "everything": ({"a": [1, 2], "b": [], "long": [1], "late": [1]}, ["a", "b", "long", "late"]),
}


@pytest.mark.parametrize("case", WRONG_TOKENS)
def test_update_refuses_tokens_that_do_not_fit(case):
    chosen, mentions = WRONG_TOKENS[case]
    desk = Desk((40, 2), 3, 8)
    for line in ("a 2 6", "b 3 9"):
        desk.add(job_of(line))
    desk.step()
    desk.add(job_of("long 20 4"))
    desk.add(job_of("late 2 4"))
    desk.guess("b", "+-")
    step, shares = desk.schedule()
    of = f"{desk.of}\nupdate: {chosen_text(chosen)}"
    check_refused(desk.scheduler.update, step, chosen, mentions=mentions, of=of)
    desk.check_pool()
    desk.check_counts()
    right = {}
    for name, share in shares.items():
        ids = desk.memory.compute(desk.oracle.find(name), share)
        right |= {name: ids} if ids else {}
    desk.update(step, shares, right)
    desk.drain()


# (blocks, slots in a block), (max_num_seqs, token_budget): from more than enough to hardly any.
SIZES = {
    "roomy": ((30, 2), (4, 16)),
    "crowded": ((7, 2), (4, 12)),
    "single slots": ((12, 1), (3, 5)),
    "small budget": ((8, 4), (3, 3)),
    "one at a time": ((4, 4), (1, 7)),
    "many": ((12, 4), (8, 20)),
    "watermark": ((9, 2, 2), (4, 10)),
    "no cache": ((8, 2, 0, False), (4, 9)),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_steps", [5, 10, 20, 40])
def test_anything(num_steps, size):
    for seed in range(6):
        draw = python_random.Random(f"{size} {num_steps} {seed}")
        pool, limits = SIZES[size]
        capacity = pool[0] * pool[1]
        desk = Desk(pool, *limits, draw.choice([capacity, max(4, capacity // 2)]))
        for _ in range(num_steps):
            do_anything(desk, draw)
        desk.drain()


def do_anything(desk: Desk, draw: python_random.Random) -> None:
    """Let requests come, guess and go, and do a step."""
    limit = desk.oracle.max_model_len
    for _ in range(draw.choice([0, 0, 1, 2])):
        # Ids whose order as text is not the order of their arrival.
        name = f"r{(37 * len(desk.names)) % 100:02}"
        num_tokens = min(limit - 1, draw.choice([1, 2, 3, 5, 8, 12]))
        like = f" like {draw.choice('pq')}" if draw.random() < 0.6 else ""
        salt = " salt x" if draw.random() < 0.2 else ""
        stops = f" stops {draw.randrange(5)}" if draw.random() < 0.3 else ""
        words = f"{name} {num_tokens} {draw.choice([1, 2, 4, 9, 15])}{like}{salt}{stops}"
        if desk.oracle.find(name) is None:
            desk.add(job_of(words))
    for job in desk.oracle.jobs():
        if draw.random() < 0.3:
            desk.guess(job.request_id, draw.choice(["+", "++", "+++", "-", "+-", "++-++"]))
    victim = draw.choice(desk.names) if desk.names and draw.random() < 0.15 else None
    # In which order two aborted ones give their blocks back is not laid down.
    pending = any(job.aborted for job in desk.oracle.jobs())
    if victim is not None and not pending and draw.random() < 0.5:
        desk.abort(victim)
        victim = None
    desk.step((lambda: desk.abort(victim)) if victim is not None else lambda: None)
