"""Week3/scheduler another way: one list of everybody in the order of arrival; its beginning runs.

Who loses its blocks stays where it stands, and the beginning gets shorter. Parts come in the
opposite order, guesses are tried from many to few, hashes are made anew whenever they are needed,
and an abort outside of a step gives everything back at once.
"""

from collections.abc import Mapping, Sequence

from week3.prefix_caching import CachingBlockManager, extend_hashes

__all__ = ["Scheduler"]


class Request:
    """A prompt and when its completion ends."""

    def __init__(self, request_id, prompt_ids, max_tokens, eos_token_ids=(), cache_salt=""):
        if not prompt_ids or max_tokens <= 0:
            raise ValueError(f"{len(prompt_ids)} prompt tokens, max_tokens {max_tokens}")
        self.request_id, self.prompt_ids = request_id, [*prompt_ids]
        self.max_tokens, self.eos_token_ids = max_tokens, set(eos_token_ids)
        self.cache_salt = cache_salt


class Scheduled:
    """A part of a step."""

    def __init__(self, entry: "Entry", known: Sequence[int], guesses: Sequence[int]):
        self.request_id, self.num_computed_tokens = entry.name, entry.done
        self.token_ids, self.num_drafts = (*known, *guesses), len(guesses)
        self.catches_up = entry.done + len(known) == len(entry.ids)


class Step:
    """What is computed together."""

    def __init__(self, parts: list[Scheduled], preempted: list[str]):
        self.parts, self.preempted = parts, preempted


class Output:
    """What came out."""

    def __init__(self, request_id: str, token_ids: list[int], finish_reason: str | None):
        self.request_id, self.token_ids = request_id, tuple(token_ids)
        self.finish_reason = finish_reason


class Entry:
    """Somebody who is here."""

    def __init__(self, request: Request, room: int):
        self.name, self.ids = request.request_id, [*request.prompt_ids]
        self.goal = len(self.ids) + min(room, request.max_tokens)
        self.eos, self.salt = request.eos_token_ids, request.cache_salt
        self.done, self.found = 0, None

    def hashes(self, block_size: int) -> list[bytes]:
        """Hash all full blocks, from the first one on."""
        hashes: list[bytes] = []
        extend_hashes(hashes, self.ids, block_size, self.salt)
        return hashes


class Scheduler:
    """Keep everybody in one list; the first num_running of them run."""

    def __init__(self, blocks: CachingBlockManager, max_num_seqs, token_budget, max_model_len):
        slots = blocks.num_blocks * blocks.block_size
        if max_num_seqs <= 0 or max_num_seqs > token_budget or slots < max_model_len:
            raise ValueError(
                f"{max_num_seqs} requests, {token_budget} tokens a step, contexts of "
                f"{max_model_len} tokens in {slots} slots"
            )
        self.blocks, self.at_most, self.budget = blocks, max_num_seqs, token_budget
        self.context = max_model_len
        self.everybody: list[Entry] = []
        self.num_running = 0
        self.dead: set[str] = set()
        self.under_way = False
        self.num_preemptions = self.num_prompt_tokens = self.num_cached_tokens = 0

    @property
    def num_waiting(self) -> int:
        """Count the rest of the list."""
        return len(self.everybody) - self.num_running

    @property
    def num_unfinished(self) -> int:
        """Count who is not dead."""
        return len(self.everybody) - len(self.dead)

    def add(self, request: Request) -> None:
        """Put a request at the end of the list."""
        room = self.context - len(request.prompt_ids)
        if room < 1:
            raise ValueError(f"{len(request.prompt_ids)} tokens in {self.context} places")
        if any(entry.name == request.request_id for entry in self.everybody):
            raise ValueError(f"{request.request_id} is here already")
        self.everybody.append(Entry(request, room))

    def abort(self, request_id: str) -> None:
        """Forget a request at once, or after the step that is under way."""
        if any(entry.name == request_id for entry in self.everybody):
            self.dead.add(request_id)
        if not self.under_way:
            self._forget_dead()

    def num_cached(self, request_id: str) -> int:
        """Look into the list."""
        for entry in self.everybody:
            if entry.name == request_id:
                return entry.found or 0
        raise KeyError(request_id)

    def schedule(self, drafts: Mapping[str, Sequence[int]] | None = None) -> Step:
        """Go through the list from the front."""
        self._forget_dead()
        parts, preempted, left, i = [], [], self.budget, 0
        while i < self.num_running:
            entry = self.everybody[i]
            known = entry.ids[entry.done :][:left]
            if not self.blocks.allocate(entry.name, entry.done + len(known)):
                preempted.append(self._shrink())
                continue
            parts.append(Scheduled(entry, known, []))
            left -= len(known)
            i += 1
        if not preempted:
            for i, part in enumerate(parts):
                parts[i] = self._guess(self.everybody[i], part, (drafts or {}), left)
                left -= parts[i].num_drafts
        while not preempted and self.num_waiting and left and self.num_running < self.at_most:
            part = self._begin(self.everybody[self.num_running], left)
            if part is None:
                break
            parts.append(part)
            left -= len(part.token_ids)
        self.under_way = True
        return Step(parts[::-1], preempted)

    def _guess(self, entry: Entry, part: Scheduled, drafts, left: int) -> Scheduled:
        guesses = drafts.get(entry.name, []) if part.catches_up else []
        for count in range(min(len(guesses), left, entry.goal - len(entry.ids) - 1), 0, -1):
            if self.blocks.allocate(entry.name, len(entry.ids) + count):
                return Scheduled(entry, part.token_ids, guesses[:count])
        return part

    def _shrink(self) -> str:
        self.num_running -= 1
        self.num_preemptions += 1
        entry = self.everybody[self.num_running]
        self.blocks.free(entry.name)
        return entry.name

    def _begin(self, entry: Entry, left: int) -> Scheduled | None:
        size = self.blocks.block_size
        prefix = self.blocks.match(entry.hashes(size), len(entry.ids))
        if not self.blocks.can_admit(len(entry.ids), prefix):
            return None
        entry.done = len(prefix) * size
        if prefix:
            self.blocks.allocate(entry.name, entry.done, prefix)
        if entry.found is None:
            entry.found = entry.done
            self.num_prompt_tokens += len(entry.ids)
            self.num_cached_tokens += entry.done
        self.num_running += 1
        known = entry.ids[entry.done :][:left]
        self.blocks.allocate(entry.name, entry.done + len(known))
        return Scheduled(entry, known, [])

    def update(self, step: Step, chosen: Mapping[str, Sequence[int]]) -> list[Output]:
        """Move everybody on."""
        entries = {entry.name: entry for entry in self.everybody}
        self._check(step, chosen)
        outputs = []
        for part in step.parts:
            entry = entries[part.request_id]
            new = chosen.get(entry.name, [])
            entry.done = part.num_computed_tokens + len(part.token_ids) - part.num_drafts
            entry.done += max(len(new) - 1, 0)
            if entry.name in self.dead:
                continue
            if part.catches_up:
                outputs.append(self._take(entry, new))
            full = entry.hashes(self.blocks.block_size)
            self.blocks.publish(entry.name, full, min(entry.done, len(entry.ids)))
        self.dead |= {output.request_id for output in outputs if output.finish_reason}
        self.under_way = False
        self._forget_dead()
        return outputs

    def _take(self, entry: Entry, new: Sequence[int]) -> Output:
        stops = [i for i, token_id in enumerate(new) if token_id in entry.eos]
        kept = list(new[: stops[0]] if stops else new)
        entry.ids += kept
        over = "length" if len(entry.ids) >= entry.goal else None
        return Output(entry.name, kept, "stop" if stops else over)

    def _check(self, step: Step, chosen: Mapping[str, Sequence[int]]) -> None:
        room = {part.request_id: part.num_drafts + 1 for part in step.parts if part.catches_up}
        names = {*room, *chosen} - (self.dead & set(room))
        wrong = [name for name in names if not 0 < len(chosen.get(name, [])) <= room.get(name, 0)]
        if wrong:
            raise ValueError(f"the tokens of {sorted(wrong)} do not fit the step")

    def _forget_dead(self) -> None:
        for name in self.dead:
            self.blocks.free(name)
        runs = self.everybody[: self.num_running]
        self.num_running -= sum(entry.name in self.dead for entry in runs)
        self.everybody = [entry for entry in self.everybody if entry.name not in self.dead]
        self.dead = set()
