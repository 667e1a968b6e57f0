"""Plan the steps of many requests over one pool of blocks: one counter, one budget of tokens."""

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from week3.prefix_caching import CachingBlockManager, extend_hashes

__all__ = ["Scheduler"]

NO_DRAFTS: Mapping[str, Sequence[int]] = MappingProxyType({})


@dataclass(frozen=True)
class Request:
    """What somebody asks for.

    request_id: tells it from the others. prompt_ids: at least one id, kept as a tuple. max_tokens:
    at least 1. eos_token_ids: any of them ends the completion and is not part of it. cache_salt:
    requests share blocks only with those that have the same one. Raises ValueError for an empty
    prompt and, with its value, for max_tokens below 1.
    """

    request_id: str
    prompt_ids: Sequence[int]
    max_tokens: int
    eos_token_ids: Collection[int] = frozenset()
    cache_salt: str = ""

    def __post_init__(self):
        if len(self.prompt_ids) == 0:
            raise ValueError("the prompt is empty; it needs at least 1 token")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        object.__setattr__(self, "prompt_ids", tuple(self.prompt_ids))


@dataclass(frozen=True)
class Scheduled:
    """One request's part of a step.

    num_computed_tokens: how many of its tokens have their KV in the pool already. token_ids: those
    that this step computes; they follow. num_drafts: how many of them, at the end, are guesses.
    catches_up: whether the request has no tokens behind these, so that their scores choose the next
    ones: behind the last token that is no guess, and behind every guess.
    """

    request_id: str
    num_computed_tokens: int
    token_ids: tuple[int, ...]
    num_drafts: int
    catches_up: bool


@dataclass(frozen=True)
class Step:
    """What the model computes in one pass.

    parts: of the requests that take part. preempted: ids of requests that lost their blocks for it.
    """

    parts: tuple[Scheduled, ...]
    preempted: tuple[str, ...]


@dataclass(frozen=True)
class Output:
    """What a step brought to one request.

    token_ids: its next tokens, without an end-of-sequence token. finish_reason: None while it goes
    on; at its end "stop" after an end-of-sequence token, "length" when max_tokens or max_model_len
    is reached.
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: str | None


class Scheduler:
    """Decide which tokens each step computes, and where their keys and values go.

    blocks: of the pool; nobody else allocates or frees there. max_num_seqs: how many requests run
        at once. token_budget: how many tokens a step computes at most. max_model_len: prompt and
        completion of a request together never exceed it.
    Raises ValueError, which names the numbers, when max_num_seqs is below 1, token_budget below
    max_num_seqs, or max_model_len more than the whole pool can hold.

    num_preemptions: how often a request lost its blocks. num_prompt_tokens, num_cached_tokens: of
        all requests when they began, how many tokens they had and how many of these were found in
        the pool; what a preempted request finds again is not counted. All three are kept under
        these names.

    A request waits from `add` on, runs from its first part of a step on, and ends with its last
    token or by `abort`. It has one counter: how many of its tokens are computed. Prompts, chunks of
    prompts, cached prefixes, lost blocks and guesses differ in nothing but in this number and in
    how many tokens there are.
    A step is `schedule`, then the model, then `update`.
    """

    def __init__(
        self, blocks: CachingBlockManager, max_num_seqs: int, token_budget: int, max_model_len: int
    ):
        if max_num_seqs < 1:
            raise ValueError(f"max_num_seqs must be at least 1, got {max_num_seqs}")
        if token_budget < max_num_seqs:
            raise ValueError(
                f"token_budget {token_budget} is below max_num_seqs {max_num_seqs}: "
                "every request that runs gets a token in every step"
            )
        capacity = blocks.num_blocks * blocks.block_size
        if max_model_len > capacity:
            raise ValueError(f"max_model_len {max_model_len} exceeds the pool's {capacity} tokens")
        self._blocks = blocks
        self._max_num_seqs = max_num_seqs
        self._token_budget = token_budget
        self._max_model_len = max_model_len
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        # Everybody who has not ended is in _progress, and in one of the other two.
        self._progress: dict[str, _Progress] = {}
        self._waiting: deque[_Progress] = deque()  # who lost their blocks, then by arrival
        self._running: list[_Progress] = []  # the youngest, by when they began to run, at the end
        self._aborted: list[str] = []

    @property
    def num_waiting(self) -> int:
        """How many requests wait; one that was aborted may count until the next `schedule`."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """How many requests run; one that was aborted may count until the next `schedule`."""
        return len(self._running)

    @property
    def num_unfinished(self) -> int:
        """How many requests wait or run; an aborted one no longer counts."""
        return len(self._progress) - len(self._aborted)

    def add(self, request: Request) -> None:
        """Let a request wait. It may come at any time, also between `schedule` and `update`.

        Raises ValueError, with nothing changed, when its id is not free (names the id), and when
        its prompt leaves no room for one token (names the prompt's length and max_model_len).
        """
        num_tokens = len(request.prompt_ids)
        if request.request_id in self._progress:
            raise ValueError(
                f"there is a request {request.request_id!r} already, and it has not ended"
            )
        if num_tokens + 1 > self._max_model_len:
            raise ValueError(
                f"the prompt has {num_tokens} tokens, which leaves no room for a new one: "
                f"the context is {self._max_model_len} tokens"
            )
        progress = _Progress(request, list(request.prompt_ids))
        self._progress[request.request_id] = progress
        self._waiting.append(progress)

    def abort(self, request_id: str) -> None:
        """End a request, at any time, also between `schedule` and `update`.

        From now on nothing comes out for it. It keeps its blocks through a step that is under way;
        blocks and id are free from the next `schedule` on. An id that nobody has is no error: the
        request may just have ended.
        """
        progress = self._progress.get(request_id)
        if progress is not None and not progress.aborted:
            progress.aborted = True
            self._aborted.append(request_id)

    def num_cached(self, request_id: str) -> int:
        """Count the tokens of a request that were in the pool when it began; 0 before.

        Raises KeyError when the request has ended by itself, or was never there.
        """
        return self._progress[request_id].num_cached_tokens

    def schedule(self, drafts: Mapping[str, Sequence[int]] = NO_DRAFTS) -> Step:
        """Plan a step, and hold the blocks of its tokens.

        drafts: request_id → guesses of the tokens that follow those it has. Guesses for a request
            that waited until now, does not catch up in this step, or has ended, are dropped.
        First come those that run, in the order in which they began. Each gets all tokens that it
        lacks; the last one may get less. Who finds no free block for them takes those of the one
        that began last, again and again until there is one. That one may be itself. Who lost its
        blocks waits, as the first one, with all of its tokens and none of them computed.
        When somebody lost blocks, this is the step. Otherwise, what is left of the budget and of
        the free blocks goes to guesses, in the same order: to as many as keep prompt and completion
        within max_tokens and max_model_len whatever is accepted.
        Then come those that wait, in their order, as long as fewer than max_num_seqs run, budget is
        left, and the next one is admitted by `can_admit` for all tokens that it has. What the pool
        has of their beginning is not computed again.
        Returns the step; it has no parts when nobody waits or runs. `update` comes next.
        """
        self._drop_aborted()
        parts: list[Scheduled] = []
        preempted = self._schedule_running(parts)
        if not preempted:
            self._add_guesses(parts, drafts)
            self._schedule_waiting(parts)
        return Step(tuple(parts), tuple(preempted))

    def update(self, step: Step, chosen: Mapping[str, Sequence[int]]) -> list[Output]:
        """Take in what a step has computed.

        step: what `schedule` returned last.
        chosen: request_id → its next tokens, for every request that caught up in the step: the
            guesses that were accepted, and one more. One that was aborted since may be missing; its
            tokens are not used.
        Returns an output for each request that caught up and was not aborted, in any order. Tokens
        behind the one that ends it are not part of it. The blocks of those that end are free.
        Full blocks of tokens that are computed can be found by others from now on; those of guesses
        that were not accepted cannot, and neither can what this step computed for one that was
        aborted since.
        Raises ValueError, with nothing changed, when tokens are missing or not expected, or more
        than the step's guesses and one; it names the ids of all such requests.
        """
        self._check_chosen(step, chosen)
        outputs = []
        for part in step.parts:
            progress = self._progress[part.request_id]
            progress.num_computed_tokens += len(part.token_ids)
            if progress.aborted:
                continue
            output = None
            if part.catches_up:
                output = self._append(progress, part.num_drafts, chosen[part.request_id])
                outputs.append(output)
            self._publish(progress)
            if output is not None and output.finish_reason is not None:
                self._running.remove(progress)
                self._end(progress)
        return outputs

    def _schedule_running(self, parts: list[Scheduled]) -> list[str]:
        """Plan what those that run lack; returns the ids of those that lost their blocks."""
        preempted: list[str] = []
        budget = self._token_budget
        position = 0
        while position < len(self._running):
            progress = self._running[position]
            position += 1
            part = self._part(progress, budget)
            while not self._hold(part) and progress.is_running:
                preempted.append(self._preempt_youngest())
            if progress.is_running:
                parts.append(part)
                budget -= len(part.token_ids)
        return preempted

    def _part(self, progress: "_Progress", budget: int) -> Scheduled:
        start = progress.num_computed_tokens
        token_ids = tuple(progress.token_ids[start : start + budget])
        catches_up = start + len(token_ids) == len(progress.token_ids)
        return Scheduled(progress.request.request_id, start, token_ids, 0, catches_up)

    def _hold(self, part: Scheduled) -> bool:
        num_tokens = part.num_computed_tokens + len(part.token_ids)
        return self._blocks.allocate(part.request_id, num_tokens)

    def _add_guesses(self, parts: list[Scheduled], drafts: Mapping[str, Sequence[int]]) -> None:
        """Add guesses to what those that run compute, with what they leave of budget and blocks."""
        # Where somebody does not catch up, nothing is left.
        budget = self._token_budget - sum(len(part.token_ids) for part in parts)
        for i, part in enumerate(parts):
            end = part.num_computed_tokens + len(part.token_ids)
            num_blocks = len(self._blocks.block_table(part.request_id))
            num_slots = (num_blocks + self._blocks.num_free_blocks) * self._blocks.block_size
            # One token more than the guesses that are accepted is chosen.
            limit = self._limit(self._progress[part.request_id]) - 1
            room = min(budget, limit - end, num_slots - end)
            guesses = tuple(drafts.get(part.request_id, ())[: max(room, 0)])
            token_ids = part.token_ids + guesses
            parts[i] = replace(part, token_ids=token_ids, num_drafts=len(guesses))
            self._hold(parts[i])
            budget -= len(guesses)

    def _preempt_youngest(self) -> str:
        progress = self._running.pop()
        self._blocks.free(progress.request.request_id)
        progress.is_running, progress.num_computed_tokens = False, 0
        self._waiting.appendleft(progress)
        self.num_preemptions += 1
        return progress.request.request_id

    def _schedule_waiting(self, parts: list[Scheduled]) -> None:
        """Plan those that wait, with what the others leave of the budget."""
        budget = self._token_budget - sum(len(part.token_ids) for part in parts)
        while self._waiting and budget > 0 and len(self._running) < self._max_num_seqs:
            progress = self._waiting[0]
            self._extend_hashes(progress)
            num_tokens = len(progress.token_ids)
            prefix = self._blocks.match(progress.hashes, num_tokens)
            if not self._blocks.can_admit(num_tokens, prefix):
                return
            progress.num_computed_tokens = len(prefix) * self._blocks.block_size
            part = self._part(progress, budget)
            held = progress.num_computed_tokens + len(part.token_ids)
            allocated = self._blocks.allocate(part.request_id, held, prefix)
            assert allocated, "who is admitted has room for all of its tokens"
            self._running.append(self._waiting.popleft())
            self._note_admitted(progress)
            parts.append(part)
            budget -= len(part.token_ids)

    def _note_admitted(self, progress: "_Progress") -> None:
        progress.is_running = True
        if not progress.was_admitted:
            progress.was_admitted = True
            progress.num_cached_tokens = progress.num_computed_tokens
            self.num_prompt_tokens += len(progress.token_ids)
            self.num_cached_tokens += progress.num_computed_tokens

    def _append(self, progress: "_Progress", num_drafts: int, chosen: Sequence[int]) -> Output:
        """Give a request its next tokens up to the one that ends it."""
        request = progress.request
        # What was computed for guesses that were not accepted is worth nothing.
        progress.num_computed_tokens -= num_drafts + 1 - len(chosen)
        num_before, reason = len(progress.token_ids), None
        for token_id in chosen:
            if token_id in request.eos_token_ids:
                reason = "stop"
                break
            progress.token_ids.append(token_id)
            if len(progress.token_ids) == self._limit(progress):
                reason = "length"
                break
        progress.num_computed_tokens = min(progress.num_computed_tokens, len(progress.token_ids))
        return Output(request.request_id, tuple(progress.token_ids[num_before:]), reason)

    def _limit(self, progress: "_Progress") -> int:
        request = progress.request
        return min(len(request.prompt_ids) + request.max_tokens, self._max_model_len)

    def _extend_hashes(self, progress: "_Progress") -> None:
        if self._blocks.enabled:
            salt = progress.request.cache_salt
            extend_hashes(progress.hashes, progress.token_ids, self._blocks.block_size, salt)

    def _publish(self, progress: "_Progress") -> None:
        self._extend_hashes(progress)
        request_id = progress.request.request_id
        self._blocks.publish(request_id, progress.hashes, progress.num_computed_tokens)

    def _drop_aborted(self) -> None:
        # The only place where an abort takes effect: no step is under way here.
        for request_id in self._aborted:
            progress = self._progress[request_id]
            queue = self._running if progress.is_running else self._waiting
            queue.remove(progress)
            self._end(progress)
        self._aborted.clear()

    def _end(self, progress: "_Progress") -> None:
        self._blocks.free(progress.request.request_id)
        del self._progress[progress.request.request_id]

    def _check_chosen(self, step: Step, chosen: Mapping[str, Sequence[int]]) -> None:
        most = {part.request_id: part.num_drafts + 1 for part in step.parts if part.catches_up}
        needed = {request_id for request_id in most if not self._progress[request_id].aborted}
        wrong = (needed - chosen.keys()) | (chosen.keys() - most.keys())
        wrong |= {name for name in needed - wrong if not 1 <= len(chosen[name]) <= most[name]}
        if wrong:
            raise ValueError(
                f"tokens missing, too many or not expected, for: {', '.join(sorted(wrong))}"
            )


@dataclass(eq=False)
class _Progress:
    """A request that has not ended.

    num_cached_tokens: what the pool had of it when it began to run for the first time.
    """

    request: Request
    token_ids: list[int]
    hashes: list[bytes] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    is_running: bool = False
    was_admitted: bool = False
    aborted: bool = False
