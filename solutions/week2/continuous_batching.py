"""Many requests in one batch, none of which waits for another to end: a scheduler and its model."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

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
        for name, value in (("num_rows", num_rows), ("token_budget", token_budget)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._token_budget = token_budget
        self._max_model_len = max_model_len
        # Every row is in _free_rows, or belongs to one request in _running.
        self._free_rows = set(range(num_rows))
        self._waiting: dict[str, _Progress] = {}  # in the order of arrival
        self._running: dict[str, _Progress] = {}  # in the order of admission
        self._step: list[Scheduled] = []  # planned, and not updated yet

    @property
    def num_unfinished(self) -> int:
        """How many requests wait or run; an aborted one no longer counts."""
        return sum(not progress.aborted for progress in self._everybody())

    def add(self, request: Request) -> None:
        """Let a request wait. It may come at any time, also between `schedule` and `update`.

        Raises ValueError, with nothing changed, when a request with its id waits or runs (names the
        id), and when its prompt leaves no room for one token (names the prompt's length and
        max_model_len).
        """
        request_id, num_tokens = request.request_id, len(request.prompt_ids)
        if request_id in self._waiting or request_id in self._running:
            raise ValueError(f"there is a request {request_id!r} already, and it has not ended")
        if num_tokens + 1 > self._max_model_len:
            raise ValueError(
                f"the prompt has {num_tokens} tokens, which leaves no room for a new one: "
                f"the context is {self._max_model_len} tokens"
            )
        self._waiting[request_id] = _Progress(request, list(request.prompt_ids))

    def abort(self, request_id: str) -> None:
        """End a request, at any time, also between `schedule` and `update`.

        From now on nothing comes out for it. It keeps its row through a step that is under way; row
        and id are free from the next `schedule` on. An id that nobody has is no error: the request
        may just have ended.
        """
        progress = self._running.get(request_id) or self._waiting.get(request_id)
        if progress is not None:
            progress.aborted = True

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
        self._drop_aborted()
        self._step = []
        budget = self._token_budget
        for progress in self._running.values():
            budget -= self._give(progress, budget)
        while budget > 0 and self._waiting and self._free_rows:
            request_id = next(iter(self._waiting))
            progress = self._running[request_id] = self._waiting.pop(request_id)
            progress.row = min(self._free_rows)
            self._free_rows.remove(progress.row)
            budget -= self._give(progress, budget)
        return list(self._step)

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
        self._check_chosen(chosen)
        outputs = []
        for part in self._step:
            progress = self._running[part.request_id]
            progress.num_computed_tokens += len(part.token_ids)
            if part.catches_up and not progress.aborted:
                outputs.append(self._append(progress, chosen[part.request_id]))
        self._step = []
        return outputs

    def _everybody(self) -> Iterator["_Progress"]:
        return chain(self._running.values(), self._waiting.values())

    def _give(self, progress: "_Progress", budget: int) -> int:
        """Plan a request's next tokens; returns how many."""
        start = progress.num_computed_tokens
        token_ids = tuple(progress.token_ids[start : start + budget])
        end = start + len(token_ids)
        assert token_ids, "nobody is admitted who would starve those that run"
        catches_up = end == len(progress.token_ids)
        request_id = progress.request.request_id
        self._step.append(Scheduled(request_id, progress.row, start, token_ids, catches_up))
        return len(token_ids)

    def _append(self, progress: "_Progress", token_id: int) -> Output:
        """Give a request its next token, or end it."""
        request = progress.request
        if token_id in request.eos_token_ids:
            self._remove(progress)
            return Output(request.request_id, None, "stop")
        progress.token_ids.append(token_id)
        limit = min(len(request.prompt_ids) + request.max_tokens, self._max_model_len)
        if len(progress.token_ids) < limit:
            return Output(request.request_id, token_id, None)
        self._remove(progress)
        return Output(request.request_id, token_id, "length")

    def _drop_aborted(self) -> None:
        # The only place where an abort has an effect on rows: no step is under way here.
        for progress in [progress for progress in self._everybody() if progress.aborted]:
            self._remove(progress)

    def _remove(self, progress: "_Progress") -> None:
        request_id = progress.request.request_id
        if self._waiting.pop(request_id, None) is None:
            del self._running[request_id]
            self._free_rows.add(progress.row)

    def _check_chosen(self, chosen: Mapping[str, int]) -> None:
        expected = {part.request_id for part in self._step if part.catches_up}
        needed = {request_id for request_id in expected if not self._running[request_id].aborted}
        if wrong := (needed - chosen.keys()) | (chosen.keys() - expected):
            raise ValueError(f"tokens missing, or not expected, for: {', '.join(sorted(wrong))}")


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
        max_model_len = model.config.max_position_embeddings
        self._scheduler = Scheduler(num_rows, token_budget, max_model_len)
        self._model = model
        self._cache = cache_for(model, num_rows)
        self._make_attend = make_attend
        # Of each request that has not ended: how it chooses, and all of its ids so far.
        self._streams: dict[str, tuple[Choose, list[int]]] = {}

    @property
    def num_unfinished(self) -> int:
        """How many requests wait or run; an aborted one no longer counts."""
        return self._scheduler.num_unfinished

    def add(self, request: Request, choose: Choose = greedy) -> None:
        """Let a request wait. It may come at any time, also from inside a choose.

        choose: as in `generate`; called once for each of the request's tokens, in their order.
        Raises ValueError as `Scheduler.add` does, and for an id outside the vocabulary (names the
        id and the vocabulary's size); nothing is changed then.
        """
        vocab_size = self._model.config.vocab_size
        for token_id in request.prompt_ids:
            if not 0 <= token_id < vocab_size:
                raise ValueError(f"token id {token_id} is outside the vocabulary of {vocab_size}")
        self._scheduler.add(request)
        self._streams[request.request_id] = choose, list(request.prompt_ids)

    def abort(self, request_id: str) -> None:
        """End a request as `Scheduler.abort` does, at any time, also from inside a choose.

        From now on its choose is not called.
        """
        self._scheduler.abort(request_id)
        self._streams.pop(request_id, None)

    def step(self) -> list[Output]:
        """Compute one step of the scheduler: one pass of the model, over its tokens and no others.

        Returns what `Scheduler.update` returns. When nobody waits or runs: [], and no pass. Nothing
        is kept of a request that has ended.
        What the model or a choose raises is raised on; the step counts as not run, and the next
        call repeats it. Who chose already is asked again.
        """
        parts = self._scheduler.schedule()
        if not parts:
            return []
        for part in parts:
            # In the row may be more: of the request before, or of a step that was not updated.
            self._cache.truncate(part.row, part.num_computed_tokens)
        new_tokens = {part.row: part.token_ids for part in parts}
        logits = extend(self._model, self._cache, new_tokens, self._make_attend)
        chosen = {}
        for part, scores in zip(parts, logits, strict=True):
            # A choose may abort others, and then their stream is gone.
            if part.catches_up and part.request_id in self._streams:
                choose, token_ids = self._streams[part.request_id]
                chosen[part.request_id] = choose(scores, token_ids)
        outputs = self._scheduler.update(chosen)
        for output in outputs:
            if output.finish_reason is None:
                self._streams[output.request_id][1].append(output.token_id)
            else:
                del self._streams[output.request_id]
        return outputs


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


@dataclass
class _Progress:
    """A request under way. row: -1 while it waits."""

    request: Request
    token_ids: list[int]
    num_computed_tokens: int = 0
    row: int = -1
    aborted: bool = False
