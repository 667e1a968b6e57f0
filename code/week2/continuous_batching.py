"""Many requests in one batch, none of which waits for another to end: a scheduler and its model."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from week1.generate import greedy
from week1.gqa import Attend
from week1.qwen import Qwen
from week2.kv_cache import KVCache, cache_for, cached_attend, extend

__all__ = ["Scheduler", "ContinuousBatcher"]

# Maps (scores, all ids so far) to the next id, as in week 1's `generate`.
Choose = Callable[[Tensor, Sequence[int]], int]


@dataclass(frozen=True)
class Request:
    """What somebody asks for.

    request_id: tells it from the others. prompt_ids: at least one id, kept as a tuple. max_tokens:
    at least 1. eos_token_ids: any of them ends the completion and is not part of it. Raises
    ValueError for an empty prompt and, with its value, for max_tokens below 1.
    """

    request_id: str
    prompt_ids: Sequence[int]
    max_tokens: int
    eos_token_ids: Collection[int] = frozenset()

    def __post_init__(self):
        if len(self.prompt_ids) == 0:
            raise ValueError("the prompt is empty; it needs at least 1 token")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        object.__setattr__(self, "prompt_ids", tuple(self.prompt_ids))


@dataclass(frozen=True)
class Scheduled:
    """One request's part of a step.

    row: of the cache; the request has it from its first part to its end. num_computed_tokens: how
    many of its tokens earlier steps computed. token_ids: those that this step computes; they follow
    the earlier ones. catches_up: whether the request has no tokens behind these, so that this
    step's scores choose its next one.
    """

    request_id: str
    row: int
    num_computed_tokens: int
    token_ids: tuple[int, ...]
    catches_up: bool


@dataclass(frozen=True)
class Output:
    """What a step brought to one request.

    token_id: its next token; None when an end-of-sequence token came, which is not part of it.
    finish_reason: None while it goes on; at its end "stop" after an end-of-sequence token, "length"
    when max_tokens or max_model_len is reached, as in week 1's `Completion`.
    """

    request_id: str
    token_id: int | None
    finish_reason: str | None


class Scheduler:
    """Plan the steps of many requests. Knows tokens and rows, and nothing of a model.

    num_rows: how many requests may run at once; rows are numbered from 0. token_budget: how many
    tokens a step computes at most. max_model_len: prompt and completion of a request together never
    exceed it. Raises ValueError, which gives the value, when num_rows or token_budget is below 1.

    A request waits from `add` on, runs from its first part of a step on, and ends with its last
    token or by `abort`. It lacks the tokens that it has and that no step has computed: first those
    of its prompt, later the one that was chosen last.
    A step is `schedule`, then the model, then `update`.
    """

    def __init__(self, num_rows: int, token_budget: int, max_model_len: int):
        raise NotImplementedError(
            "week2/continuous_batching.py: Scheduler.__init__ is not written yet "
            "→ sessions/week2/continuous_batching.md"
        )

    @property
    def num_unfinished(self) -> int:
        """How many requests wait or run; an aborted one no longer counts."""
        raise NotImplementedError(
            "week2/continuous_batching.py: Scheduler.num_unfinished is not written yet "
            "→ sessions/week2/continuous_batching.md"
        )

    def add(self, request: Request) -> None:
        """Let a request wait. It may come at any time, also between `schedule` and `update`.

        Raises ValueError, with nothing changed, when a request with its id waits or runs (names the
        id), and when its prompt leaves no room for one token (names the prompt's length and
        max_model_len).
        """
        raise NotImplementedError(
            "week2/continuous_batching.py: Scheduler.add is not written yet "
            "→ sessions/week2/continuous_batching.md"
        )

    def abort(self, request_id: str) -> None:
        """End a request, at any time, also between `schedule` and `update`.

        From now on nothing comes out for it. It keeps its row through a step that is under way; row
        and id are free from the next `schedule` on. An id that nobody has is no error: the request
        may just have ended.
        """
        raise NotImplementedError(
            "week2/continuous_batching.py: Scheduler.abort is not written yet "
            "→ sessions/week2/continuous_batching.md"
        )

    def schedule(self) -> list[Scheduled]:
        """Plan a step.

        Returns the parts of the requests that take part, in any order; [] when nobody waits or
        runs. Together they have at most token_budget tokens.
        First come those that run, in the order in which they began; then, as long as a row is free,
        those that wait, in the order of `add`. Each gets all tokens that it lacks, or what is left
        of the budget, before the next one gets any. So each that runs gets at least one in every
        step. Who begins takes the lowest free row.
        Tokens count as computed when `update` says so. Called again instead, this plans anew, and
        the step before counts as not run; who began in it keeps row and place.
        """
        raise NotImplementedError(
            "week2/continuous_batching.py: Scheduler.schedule is not written yet "
            "→ sessions/week2/continuous_batching.md"
        )

    def update(self, chosen: Mapping[str, int]) -> list[Output]:
        """Take in what the planned step has computed.

        chosen: request_id → its next token, for every request that caught up in the step. One that
            was aborted since may be missing; its token is not used.
        Returns an output for each request that caught up and was not aborted, in any order. The
        rows of those that end are free for the next step. Without a step under way, no token is
        expected, and nothing changes.
        Raises ValueError, with nothing changed, when a token is missing or is not expected; it
        names the ids of all such requests.
        """
        raise NotImplementedError(
            "week2/continuous_batching.py: Scheduler.update is not written yet "
            "→ sessions/week2/continuous_batching.md"
        )


class ContinuousBatcher:
    """Run many requests through one model, so that each gets what it would get alone.

    num_rows, token_budget: as in `Scheduler`. make_attend: as in `extend`, for every step.
    The context is the model's max_position_embeddings. Raises ValueError as `Scheduler` does.
    """

    def __init__(
        self,
        model: Qwen,
        num_rows: int,
        token_budget: int,
        make_attend: Callable[[KVCache, Mapping[int, int]], Attend] = cached_attend,
    ):
        raise NotImplementedError(
            "week2/continuous_batching.py: ContinuousBatcher.__init__ is not written yet "
            "→ sessions/week2/continuous_batching.md"
        )

    @property
    def num_unfinished(self) -> int:
        """How many requests wait or run; an aborted one no longer counts."""
        raise NotImplementedError(
            "week2/continuous_batching.py: ContinuousBatcher.num_unfinished is not written yet "
            "→ sessions/week2/continuous_batching.md"
        )

    def add(self, request: Request, choose: Choose = greedy) -> None:
        """Let a request wait. It may come at any time, also from inside a choose.

        choose: as in `generate`; called once for each of the request's tokens, in their order.
        Raises ValueError as `Scheduler.add` does, and for an id outside the vocabulary (names the
        id and the vocabulary's size); nothing is changed then.
        """
        raise NotImplementedError(
            "week2/continuous_batching.py: ContinuousBatcher.add is not written yet "
            "→ sessions/week2/continuous_batching.md"
        )

    def abort(self, request_id: str) -> None:
        """End a request as `Scheduler.abort` does, at any time, also from inside a choose.

        From now on its choose is not called.
        """
        raise NotImplementedError(
            "week2/continuous_batching.py: ContinuousBatcher.abort is not written yet "
            "→ sessions/week2/continuous_batching.md"
        )

    def step(self) -> list[Output]:
        """Compute one step of the scheduler: one pass of the model, over its tokens and no others.

        Returns what `Scheduler.update` returns. When nobody waits or runs: [], and no pass. Nothing
        is kept of a request that has ended.
        What the model or a choose raises is raised on; the step counts as not run, and the next
        call repeats it. Who chose already is asked again.
        """
        raise NotImplementedError(
            "week2/continuous_batching.py: ContinuousBatcher.step is not written yet "
            "→ sessions/week2/continuous_batching.md"
        )


def run(batcher: ContinuousBatcher) -> dict[str, tuple[list[int], str]]:
    """Step until nobody is left. Returns request_id → (its token ids, its finish_reason)."""
    token_ids: dict[str, list[int]] = {}
    ended = {}
    while batcher.num_unfinished:
        for output in batcher.step():
            of_request = token_ids.setdefault(output.request_id, [])
            if output.token_id is not None:
                of_request.append(output.token_id)
            if output.finish_reason is not None:
                ended[output.request_id] = of_request, output.finish_reason
    return ended
