"""Week2/continuous_batching another way: one list of everybody, goals instead of tokens to append.

Parts come in the opposite order, an abort outside of a step frees its row at once, and the batcher
clears a row when a request begins or when the step before it has failed.
"""

from collections.abc import Callable, Mapping, Sequence

from week1.generate import greedy
from week1.qwen import Qwen
from week2.kv_cache import cache_for, cached_attend, extend

__all__ = ["Scheduler", "ContinuousBatcher"]


class Request:
    """A prompt and when its completion ends."""

    def __init__(self, request_id: str, prompt_ids: Sequence[int], max_tokens: int, eos=()):
        if not prompt_ids or max_tokens <= 0:
            raise ValueError(f"{len(prompt_ids)} prompt tokens, max_tokens {max_tokens}")
        self.request_id, self.prompt_ids = request_id, [*prompt_ids]
        self.max_tokens, self.eos_token_ids = max_tokens, set(eos)


class Scheduled:
    """A part of a step."""

    def __init__(self, entry: dict, count: int):
        self.request_id, self.row = entry["id"], entry["row"]
        self.num_computed_tokens = entry["done"]
        self.token_ids = tuple(entry["ids"][entry["done"] :][:count])
        self.catches_up = entry["done"] + count == len(entry["ids"])


class Output:
    """What came out."""

    def __init__(self, request_id: str, token_id: int | None, finish_reason: str | None):
        self.request_id, self.token_id = request_id, token_id
        self.finish_reason = finish_reason


class Scheduler:
    """Keep everybody in one list, in the order of arrival; whoever has no row waits."""

    def __init__(self, num_rows: int, token_budget: int, max_model_len: int):
        if min(num_rows, token_budget) < 1:
            raise ValueError(f"{num_rows} rows, {token_budget} tokens a step: at least 1 of each")
        self.num_rows, self.token_budget = num_rows, token_budget
        self.max_model_len = max_model_len
        self.entries: list[dict] = []
        self.plan: list[Scheduled] = []
        self.dead: set[str] = set()

    @property
    def num_unfinished(self) -> int:
        """Count who is neither done nor dead."""
        return len(self.entries) - len(self.dead)

    def add(self, request: Request) -> None:
        """Put a request behind all others."""
        room = self.max_model_len - len(request.prompt_ids)
        if room < 1:
            raise ValueError(f"{len(request.prompt_ids)} tokens in {self.max_model_len} places")
        if any(entry["id"] == request.request_id for entry in self.entries):
            raise ValueError(f"{request.request_id} is here already")
        ids = list(request.prompt_ids)
        goal = len(ids) + min(room, request.max_tokens)
        eos = frozenset(request.eos_token_ids)
        name = request.request_id
        entry = {"id": name, "ids": ids, "done": 0, "row": None, "goal": goal, "eos": eos}
        self.entries.append(entry)

    def abort(self, request_id: str) -> None:
        """Forget a request at once, or after the step that has it."""
        if any(part.request_id == request_id for part in self.plan):
            self.dead.add(request_id)
        else:
            self._forget({request_id})

    def schedule(self) -> list[Scheduled]:
        """Go through the list from the front."""
        self._forget(self.dead)
        self.plan, left = [], self.token_budget
        for entry in self.entries:
            if entry["row"] is None:
                taken = [other["row"] for other in self.entries]
                free = [row for row in range(self.num_rows) if row not in taken]
                if not free or not left:
                    break
                entry["row"] = free[0]
            part = Scheduled(entry, min(left, len(entry["ids"]) - entry["done"]))
            left -= len(part.token_ids)
            self.plan.insert(0, part)
        return self.plan.copy()

    def update(self, chosen: Mapping[str, int]) -> list[Output]:
        """Move everybody on."""
        ready = {part.request_id for part in self.plan if part.catches_up}
        if not ready - self.dead <= set(chosen) <= ready:
            raise ValueError(f"tokens for {sorted(chosen)}, expected for {sorted(ready)}")
        plan, self.plan = self.plan, []
        outputs, over = [], set(self.dead)
        for part in plan:
            entry = next(e for e in self.entries if e["id"] == part.request_id)
            entry["done"] += len(part.token_ids)
            if part.request_id not in ready - self.dead:
                continue
            token_id, reason = chosen[part.request_id], None
            if token_id in entry["eos"]:
                token_id, reason = None, "stop"
            else:
                entry["ids"].append(token_id)
                if len(entry["ids"]) == entry["goal"]:
                    reason = "length"
            if reason:
                over.add(part.request_id)
            outputs.append(Output(part.request_id, token_id, reason))
        self._forget(over)
        return outputs

    def _forget(self, ids: set[str]) -> None:
        self.entries = [entry for entry in self.entries if entry["id"] not in ids]
        self.dead = self.dead - set(ids)


class ContinuousBatcher:
    """Keep the latest ids of everybody beside the scheduler."""

    def __init__(self, model: Qwen, num_rows: int, token_budget: int, make_attend=cached_attend):
        self.scheduler = Scheduler(num_rows, token_budget, model.config.max_position_embeddings)
        self.model, self.make_attend = model, make_attend
        self.cache = cache_for(model, num_rows)
        self.choosers: dict[str, Callable] = {}
        self.known: dict[str, list[int]] = {}
        self.failed = False

    @property
    def num_unfinished(self) -> int:
        """Ask the scheduler."""
        return self.scheduler.num_unfinished

    def add(self, request: Request, choose: Callable = greedy) -> None:
        """Check the ids, then hand on."""
        size = self.model.config.vocab_size
        for bad in (i for i in request.prompt_ids if i not in range(size)):
            raise ValueError(f"{bad} is not in [0, {size})")
        self.scheduler.add(request)
        self.choosers[request.request_id] = choose
        self.known[request.request_id] = [*request.prompt_ids]

    def abort(self, request_id: str) -> None:
        """Forget the choose and tell the scheduler."""
        self.scheduler.abort(request_id)
        self.choosers.pop(request_id, None)
        self.known.pop(request_id, None)

    def step(self) -> list[Output]:
        """Run one pass over what the scheduler says."""
        plan = self.scheduler.schedule()
        if not plan:
            return []
        for part in plan:
            if part.num_computed_tokens == 0 or self.failed:
                self.cache.truncate(part.row, part.num_computed_tokens)
        self.failed = True
        rows = {part.row: part.token_ids for part in plan}
        scores = dict(
            zip(rows, extend(self.model, self.cache, rows, self.make_attend), strict=True)
        )
        chosen = {}
        for part in plan:
            choose = self.choosers.get(part.request_id) if part.catches_up else None
            if choose:
                chosen[part.request_id] = choose(scores[part.row], self.known[part.request_id])
        outputs = self.scheduler.update(chosen)
        self.failed = False
        for output in outputs:
            if output.finish_reason:
                del self.choosers[output.request_id], self.known[output.request_id]
            else:
                self.known[output.request_id].append(output.token_id)
        return outputs


def run(batcher: ContinuousBatcher) -> dict[str, tuple[list[int], str]]:
    """Step until everybody is done."""
    texts, reasons = {}, {}
    while batcher.num_unfinished > 0:
        for output in batcher.step():
            texts.setdefault(output.request_id, [])
            if output.token_id is not None:
                texts[output.request_id].append(output.token_id)
            reasons[output.request_id] = output.finish_reason
    return {request_id: (ids, reasons[request_id]) for request_id, ids in texts.items()}
