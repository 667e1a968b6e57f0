"""Plan the steps of many requests over one pool of blocks: one counter, one budget of tokens."""

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
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
        raise NotImplementedError(
            "week3/scheduler.py: Scheduler.__init__ is not written yet "
            "→ sessions/week3/scheduler.md"
        )

    @property
    def num_waiting(self) -> int:
        """How many requests wait; one that was aborted may count until the next `schedule`."""
        raise NotImplementedError(
            "week3/scheduler.py: Scheduler.num_waiting is not written yet "
            "→ sessions/week3/scheduler.md"
        )

    @property
    def num_running(self) -> int:
        """How many requests run; one that was aborted may count until the next `schedule`."""
        raise NotImplementedError(
            "week3/scheduler.py: Scheduler.num_running is not written yet "
            "→ sessions/week3/scheduler.md"
        )

    @property
    def num_unfinished(self) -> int:
        """How many requests wait or run; an aborted one no longer counts."""
        raise NotImplementedError(
            "week3/scheduler.py: Scheduler.num_unfinished is not written yet "
            "→ sessions/week3/scheduler.md"
        )

    def add(self, request: Request) -> None:
        """Let a request wait. It may come at any time, also between `schedule` and `update`.

        Raises ValueError, with nothing changed, when its id is not free (names the id), and when
        its prompt leaves no room for one token (names the prompt's length and max_model_len).
        """
        raise NotImplementedError(
            "week3/scheduler.py: Scheduler.add is not written yet → sessions/week3/scheduler.md"
        )

    def abort(self, request_id: str) -> None:
        """End a request, at any time, also between `schedule` and `update`.

        From now on nothing comes out for it. It keeps its blocks through a step that is under way;
        blocks and id are free from the next `schedule` on. An id that nobody has is no error: the
        request may just have ended.
        """
        raise NotImplementedError(
            "week3/scheduler.py: Scheduler.abort is not written yet → sessions/week3/scheduler.md"
        )

    def num_cached(self, request_id: str) -> int:
        """Count the tokens of a request that were in the pool when it began; 0 before.

        Raises KeyError when the request has ended by itself, or was never there.
        """
        raise NotImplementedError(
            "week3/scheduler.py: Scheduler.num_cached is not written yet "
            "→ sessions/week3/scheduler.md"
        )

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
        raise NotImplementedError(
            "week3/scheduler.py: Scheduler.schedule is not written yet "
            "→ sessions/week3/scheduler.md"
        )

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
        raise NotImplementedError(
            "week3/scheduler.py: Scheduler.update is not written yet → sessions/week3/scheduler.md"
        )
