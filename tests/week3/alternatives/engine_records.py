"""Week3/engine another way: a record of each request, text as a debt that choices pay one by one.

A pool is sized by an empty block of it, every end of a request is told to the scheduler, and
prompts of a list are named by numbers that never come again.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from week1.generate import IncrementalDetokenizer, StopMatcher
from week1.qwen import QwenConfig
from week1.sampling import SamplingParams
from week3.model_runner import Choice, ModelRunner, SamplingState
from week3.paged_attention import PagedKVCache, paged_attend, paged_cache_for
from week3.prefix_caching import CachingBlockManager
from week3.scheduler import Request, Scheduler, Step

__all__ = ["plan_pool", "TextStream", "Engine", "LLM"]

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 100.0


class StepFailed(Exception):
    """The model raised in a step. request_ids: of those whose step it was; they have ended."""

    def __init__(self, request_ids: Sequence[str]):
        super().__init__(f"a step of {len(request_ids)} requests failed")
        self.request_ids = tuple(request_ids)


@dataclass(frozen=True)
class GenerationParams(SamplingParams):
    """How to continue a prompt, in the names and units of the OpenAI and vLLM interfaces.

    max_tokens: at least 1. min_tokens: until so many tokens are there, no end-of-sequence token and
    none of stop_token_ids is chosen. ignore_eos: end-of-sequence tokens are tokens like any other.
    stop: strings that end the text and are not part of it. stop_token_ids: ids that do. logit_bias:
    id → what is added to its score, in [-100, 100]. logprobs: how many of the most likely tokens
    are told with each token, at most 20; None tells nothing. cache_salt: requests share the KV of a
    common beginning only with those that have the same one. The others as in SamplingParams. Raises
    ValueError for a value outside its range.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    cache_salt: str = ""

    def __post_init__(self):
        super().__post_init__()
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(
                f"min_tokens must be in [0, max_tokens = {self.max_tokens}], got {self.min_tokens}"
            )
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise ValueError(f"logprobs must be in [0, {MAX_LOGPROBS}], got {self.logprobs}")
        for token_id, bias in self.logit_bias.items():
            if not abs(bias) <= MAX_LOGIT_BIAS:
                raise ValueError(f"logit_bias of {token_id} must be in [-100, 100], got {bias}")
        if not all(self.stop):
            raise ValueError("a stop string must have at least 1 character, got ''")


@dataclass(frozen=True)
class EngineLimits:
    """How much an engine takes on.

    num_blocks, block_size: of its KV pool. max_num_seqs: how many requests run at once.
    token_budget: tokens of one step. max_model_len: prompt and completion of a request together.
    watermark: as in `BlockManager`. prefix_caching: whether beginnings that were computed before
    are found again.
    """

    num_blocks: int
    max_model_len: int
    max_num_seqs: int = 64
    token_budget: int = 512
    block_size: int = 16
    watermark: int = 1
    prefix_caching: bool = True


@dataclass(frozen=True)
class Delta:
    """What came to a request since its last delta.

    text and choices are the parts that no stop string can take back any more. finish_reason: None
    while it goes on; "stop", "length", or "abort" at its end. num_cached_tokens: of its prompt, how
    many tokens were not computed anew.
    """

    request_id: str
    text: str
    choices: tuple[Choice, ...]
    finish_reason: str | None
    num_cached_tokens: int = 0


@dataclass
class Completion:
    """One answer: its choices and text without what ended it; finish_reason as in `Delta`."""

    prompt_ids: tuple[int, ...]
    choices: list[Choice] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None

    @property
    def token_ids(self) -> list[int]:
        return [choice.token_id for choice in self.choices]


def step_record(
    number: int,
    step: Step,
    num_accepted: int,
    deltas: Sequence[Delta],
    times: Sequence[float],
    scheduler: Scheduler,
    blocks: CachingBlockManager,
) -> dict[str, Any]:
    """Describe a step for a trace, in what JSON can hold.

    number: how many steps came before it. num_accepted: how many guesses were accepted. times: of
    time.perf_counter, when it began, was planned, was computed, and when all was taken in. The
    fields are explained in sessions/week3/trace.md.
    """
    start, planned, computed, end = times
    return {
        "step": number,
        "time": start,
        "schedule_s": planned - start,
        "execute_s": computed - planned,
        "update_s": end - computed,
        "parts": [
            {
                "request_id": part.request_id,
                "num_computed_tokens": part.num_computed_tokens,
                "num_tokens": len(part.token_ids),
                "num_drafts": part.num_drafts,
                "catches_up": part.catches_up,
                "block_table": list(blocks.block_table(part.request_id)),
            }
            for part in step.parts
        ],
        "num_accepted": num_accepted,
        "preempted": list(step.preempted),
        "finished": {d.request_id: d.finish_reason for d in deltas if d.finish_reason},
        "num_waiting": scheduler.num_waiting,
        "num_running": scheduler.num_running,
        "num_free_blocks": blocks.num_free_blocks,
        "num_cached_blocks": blocks.num_cached_blocks,
        "num_prompt_tokens": scheduler.num_prompt_tokens,
        "num_cached_tokens": scheduler.num_cached_tokens,
        "num_preemptions": scheduler.num_preemptions,
    }


def plan_pool(
    config: QwenConfig,
    num_bytes: int,
    itemsize: int,
    block_size: int = 16,
    max_model_len: int | None = None,
) -> tuple[int, int]:
    """Ask an empty pool of one block how large it is."""
    context = config.max_position_embeddings
    if max_model_len is None:
        max_model_len = context
    if max_model_len > context:
        raise ValueError(f"{max_model_len} tokens are more than the model's {context}")
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    block = PagedKVCache(layers, 1, block_size, heads, config.head_dim, device="meta")
    block_bytes = block.keys.numel() * 2 * itemsize
    num_blocks = 0
    if num_bytes >= block_bytes:
        num_blocks, _ = divmod(num_bytes, block_bytes)
    else:
        raise ValueError(f"{num_bytes} bytes are less than the {block_bytes} of one block")
    return num_blocks, max_model_len if num_blocks * block_size > max_model_len else (
        num_blocks * block_size
    )


class TextStream:
    """Two queues: characters that each choice has brought, and choices in their order."""

    def __init__(self, decode: Callable[[list[int]], str], stop: Collection[str] = ()):
        self._words, self._stops = IncrementalDetokenizer(decode), StopMatcher(stop)
        self._waiting: deque[tuple[Choice, int]] = deque()
        self._owed = 0  # characters that are out beyond those of the choices that are out

    @property
    def matched(self) -> str | None:
        return self._stops.matched

    def add(self, choice: Choice) -> tuple[str, list[Choice]]:
        text = self._words.add(choice.token_id)
        self._waiting.append((choice, len(text)))
        return self._pay(self._stops.add(text))

    def flush(self) -> tuple[str, list[Choice]]:
        text = self._stops.add(self._words.flush())
        text += self._stops.flush()
        text, choices = self._pay(text)
        while self._waiting and self.matched is None:
            choices.append(self._waiting.popleft()[0])
        return text, choices

    def _pay(self, text: str) -> tuple[str, list[Choice]]:
        self._owed += len(text)
        choices = []
        while self._owed > 0 and self._waiting:
            choice, num_characters = self._waiting.popleft()
            self._owed -= num_characters
            choices.append(choice)
        return text, choices


@dataclass
class _Live:
    stream: TextStream
    num_cached: int | None = None


class Engine:
    """Requests in one dictionary."""

    def __init__(
        self,
        model,
        tokenizer,
        eos_token_ids: Collection[int],
        limits: EngineLimits,
        make_attend=paged_attend,
        on_step=None,
        speculator=None,
    ):
        longest = model.config.max_position_embeddings
        if longest < limits.max_model_len:
            raise ValueError(f"{limits.max_model_len} tokens are more than the model's {longest}")
        self.limits, self.on_step = limits, on_step
        self.ends = {*eos_token_ids}
        self.num_ids = model.config.vocab_size
        self.tokenizer = tokenizer
        self.blocks = CachingBlockManager(
            num_blocks=limits.num_blocks,
            block_size=limits.block_size,
            watermark=limits.watermark,
            enabled=limits.prefix_caching,
        )
        sizes = (limits.max_num_seqs, limits.token_budget, limits.max_model_len)
        self.scheduler = Scheduler(self.blocks, *sizes)
        pool = paged_cache_for(model, limits.num_blocks, limits.block_size)
        self.speculator = speculator
        extra = {} if speculator is None else {"choose": speculator.choose}
        self.runner = ModelRunner(model, pool, self.blocks, *sizes, make_attend, **extra)
        self.live: dict[str, _Live] = {}
        self.count = self.num_drafts = self.num_draft_tokens = self.num_accepted_tokens = 0
        self.fed: set[str] = set()

    @property
    def num_unfinished(self) -> int:
        return len(self.live)

    def check(self, prompt_ids: Sequence[int], params: GenerationParams) -> None:
        room = self.limits.max_model_len - len(prompt_ids)
        if room < 1 or not len(prompt_ids):
            raise ValueError(
                f"{len(prompt_ids)} prompt tokens in a context of {self.limits.max_model_len}"
            )
        bad = [
            one
            for ids in (prompt_ids, params.stop_token_ids, params.logit_bias)
            for one in ids
            if type(one) is not int or one < 0 or one >= self.num_ids
        ]
        if bad:
            raise ValueError(f"{bad} are none of the {self.num_ids} tokens")

    def add(self, request_id: str, prompt_ids: Sequence[int], params: GenerationParams) -> None:
        self.check(prompt_ids, params)
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else self.ends)}
        request = Request(request_id, prompt_ids, params.max_tokens, ends, params.cache_salt)
        self.scheduler.add(request)
        state = SamplingState(params, tuple(prompt_ids), dict(params.logit_bias))
        state.min_tokens, state.eos_token_ids = params.min_tokens, frozenset(ends)
        state.num_logprobs = params.logprobs
        self.runner.add(request_id, state)
        if self.speculator:
            self.speculator.add(request_id, state)

        def decode(ids: list[int]) -> str:
            return self.tokenizer.decode(ids, skip_special_tokens=True)

        self.live[request_id] = _Live(TextStream(decode, params.stop))

    def abort(self, request_id: str) -> None:
        self._drop([request_id])
        self._tidy()

    def step(self) -> list[Delta]:
        times = [time.perf_counter()]
        drafts, wanting = {}, [name for name in self.live if name in self.fed]
        if self.speculator and wanting:
            try:
                drafts = self.speculator.propose(wanting)
            except Exception as problem:
                self._drop(wanting)
                self._tidy()
                raise StepFailed(wanting) from problem
        step = self.scheduler.schedule(drafts)
        if not step.parts:
            return []
        times.append(time.perf_counter())
        for part in step.parts:
            live = self.live[part.request_id]
            if live.num_cached is None:
                live.num_cached = self.scheduler.num_cached(part.request_id)
        try:
            chosen = self.runner.execute(step)
        except Exception as problem:
            names = [part.request_id for part in step.parts]
            self._drop(names)
            self.scheduler.update(step, {})
            self._tidy()
            raise StepFailed(names) from problem
        times.append(time.perf_counter())
        tokens = {name: [choice.token_id for choice in some] for name, some in chosen.items()}
        outputs = self.scheduler.update(step, tokens)
        num_accepted = self._count(step, tokens)
        deltas = [self._tell(one, chosen[one.request_id]) for one in outputs]
        deltas = [one for one in deltas if one.choices or one.text or one.finish_reason]
        self._tidy()
        if self.on_step:
            times.append(time.perf_counter())
            about = self.count, step, num_accepted, deltas, times
            self.on_step(step_record(*about, self.scheduler, self.blocks))
        self.count += 1
        return deltas

    def _count(self, step, tokens) -> int:
        self.fed = {*tokens}
        accepted = 0
        for part in step.parts:
            if part.num_drafts:
                self.num_drafts += 1
                self.num_draft_tokens += part.num_drafts
                accepted += len(tokens[part.request_id]) - 1
        self.num_accepted_tokens += accepted
        return accepted

    def _tell(self, output, choices: Sequence[Choice]) -> Delta:
        name, live = output.request_id, self.live[output.request_id]
        pieces = []
        for choice, _ in zip(choices, output.token_ids, strict=False):
            if not live.stream.matched:
                pieces.append(live.stream.add(choice))
        if live.stream.matched or output.finish_reason:
            pieces.append(live.stream.flush())
            self._drop([name])
        reason = "stop" if live.stream.matched else output.finish_reason
        text = "".join(text for text, _ in pieces)
        choices = tuple(choice for _, some in pieces for choice in some)
        return Delta(name, text, choices, reason, live.num_cached)

    def _drop(self, names: Sequence[str]) -> None:
        for name in names:
            self.scheduler.abort(name)
            self.runner.remove(name)
            if self.speculator:
                self.speculator.remove(name)
            self.live.pop(name, None)

    def _tidy(self) -> None:
        if not self.live:
            self.scheduler.schedule()


class LLM:
    """A counter for names, and a loop."""

    def __init__(
        self, model, tokenizer, eos_token_ids, limits, make_attend=paged_attend, speculator=None
    ):
        arguments = model, tokenizer, eos_token_ids, limits, make_attend
        self.engine = Engine(*arguments, speculator=speculator)
        self.tokenizer = tokenizer
        self.num_named = 0

    def generate(self, prompts, params, show_progress: bool = False) -> list[Completion]:
        if isinstance(params, GenerationParams):
            params = [params for _ in prompts]
        if len(prompts) != len(params):
            raise ValueError(f"{len(prompts)} prompts, {len(params)} params")
        pairs = []
        for prompt, one in zip(prompts, params, strict=True):
            ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else [*prompt]
            self.engine.check(ids, one)
            pairs.append((ids, one))
        answers: dict[str, Completion] = {}
        for ids, one in pairs:
            self.num_named += 1
            answers[f"prompt {self.num_named}"] = Completion(tuple(ids))
            self.engine.add(f"prompt {self.num_named}", ids, one)
        bar = tqdm(total=len(pairs)) if show_progress else None
        try:
            while self.engine.num_unfinished:
                for delta in self.engine.step():
                    answer = answers[delta.request_id]
                    answer.text, answer.finish_reason = (
                        answer.text + delta.text,
                        delta.finish_reason,
                    )
                    answer.choices.extend(delta.choices)
                    if bar is not None and delta.finish_reason:
                        bar.update()
        finally:
            for name in answers:
                self.engine.abort(name)
            if bar is not None:
                bar.close()
        return [*answers.values()]
