"""The engine: requests in, text out, a step at a time."""

import itertools
import time
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

from torch import Tensor
from tqdm import tqdm

from week1.generate import IncrementalDetokenizer, StopMatcher
from week1.gqa import Attend
from week1.qwen import Qwen, QwenConfig
from week1.sampling import SamplingParams
from week3.model_runner import Choice, ModelRunner, SamplingState, choose_one
from week3.paged_attention import PagedBatch, PagedKVCache, paged_attend, paged_cache_for
from week3.prefix_caching import CachingBlockManager
from week3.scheduler import NO_DRAFTS, Output, Request, Scheduled, Scheduler, Step

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
        """The ids of the choices."""
        return [choice.token_id for choice in self.choices]


class Speculator(Protocol):
    """Guess the next tokens of requests, and say which guesses are accepted."""

    def add(self, request_id: str, state: SamplingState) -> None:
        """Get to know a request before its first step. state: the one that its runner has."""

    def remove(self, request_id: str) -> None:
        """Forget a request that has ended; nothing happens when it is not known."""

    def propose(self, request_ids: Sequence[str]) -> Mapping[str, Sequence[int]]:
        """Guess the tokens that follow those that some requests have.

        Returns request_id → its guesses, without those for which there is none.
        """

    def choose(
        self, logits: Tensor, parts: Sequence[Scheduled], states: Sequence[SamplingState]
    ) -> list[list[Choice]]:
        """Choose tokens as week3/model_runner.py's `choose_one` says, with guesses too."""


def plan_pool(
    config: QwenConfig,
    num_bytes: int,
    itemsize: int,
    block_size: int = 16,
    max_model_len: int | None = None,
) -> tuple[int, int]:
    """Choose how many blocks a KV pool has, and how long a request may get in it.

    num_bytes: what the pool may take. itemsize: bytes of one stored number. max_model_len: what is
        asked for; None asks for the model's whole context.
    Returns (num_blocks, max_model_len). The pool has as many blocks as num_bytes holds. Where one
    request of the length asked for does not fit, max_model_len is what does fit.
    Raises ValueError, which names num_bytes and the bytes of a block, when not one block fits, and
    one that names both lengths when more is asked for than the model's max_position_embeddings.
    """
    context = config.max_position_embeddings
    wanted = context if max_model_len is None else max_model_len
    if wanted > context:
        raise ValueError(f"max_model_len {wanted} exceeds the model's context of {context} tokens")
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    block_bytes = per_token * itemsize * block_size
    num_blocks = num_bytes // block_bytes
    if num_blocks < 1:
        raise ValueError(f"a KV pool of {num_bytes} bytes has no room for a block: {block_bytes}")
    return num_blocks, min(wanted, num_blocks * block_size)


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


class TextStream:
    """Turn the tokens of one request into what may be shown of them.

    decode: see `IncrementalDetokenizer`; the bound on the ids that it is passed holds for `add` and
        `flush` too. stop: stop strings, see `StopMatcher`.
    Text comes out as soon as no stop string can take it back, and the choices that brought it come
    with it: up to the first one after which all text that is out was there. So both end alike when
    a stop string matches, and joined they are what week 1's `generate` returns.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Collection[str] = ()):
        self._detokenizer, self._matcher = IncrementalDetokenizer(decode), StopMatcher(stop)
        # With each choice that is not out, how many characters there were after it.
        self._held: list[tuple[int, Choice]] = []
        self._num_decoded = self._num_shown = self._num_covered = 0

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text; None as long as none did."""
        return self._matcher.matched

    def add(self, choice: Choice) -> tuple[str, list[Choice]]:
        """Take the next token; returns the text and the choices that are certain with it."""
        text = self._detokenizer.add(choice.token_id)
        self._num_decoded += len(text)
        self._held.append((self._num_decoded, choice))
        return self._release(self._matcher.add(text))

    def flush(self) -> tuple[str, list[Choice]]:
        """End the stream; returns the text and the choices that were held back.

        Where no stop string has matched, no choice is left out, also none without text.
        """
        text = self._matcher.add(self._detokenizer.flush())
        text, choices = self._release(text + self._matcher.flush())
        if self.matched is None:
            choices += [choice for _, choice in self._held]
            self._held = []
        return text, choices

    def _release(self, text: str) -> tuple[str, list[Choice]]:
        self._num_shown += len(text)
        if self._num_covered >= self._num_shown:
            return text, []
        count = 1 + bisect_left(self._held, self._num_shown, key=lambda held: held[0])
        out, self._held = self._held[:count], self._held[count:]
        # The last text of a stream may be bytes of a choice that is out already.
        self._num_covered = out[-1][0] if out else self._num_shown
        return text, [choice for _, choice in out]


class Engine:
    """Many requests through one model and one pool of KV blocks, a step at a time.

    model: as loaded. tokenizer: called for decoding only, as decode(ids, skip_special_tokens=True).
    eos_token_ids: what ends an answer. limits: how much it takes on. make_attend: as in
        `ModelRunner`.
    on_step: called at the end of each step with its `step_record`; with None, none is made. There
        is none either of a `step` that has nothing to compute, or fails.
    speculator: with None, nothing is guessed. It is asked for guesses once a step, for the requests
        that got tokens in the step before and go on, and only where there are any.
    limits; blocks, the `CachingBlockManager`; and scheduler, the `Scheduler`, are kept under these
    names, for whoever wants to know how full the engine is. So are num_drafts, how often a request
    had guesses in a step; num_draft_tokens, how many guesses these were; and num_accepted_tokens,
    how many of them were accepted.
    A request gets what week 1's `generate` returns for it alone, whoever runs beside it and whoever
    loses blocks. Nothing is kept of who has ended; when nobody waits or runs, all blocks are free.
    For one thread only; `AsyncEngine` is for several.
    Raises ValueError as `Scheduler` and `BlockManager` do, for limits that do not fit together, and
    one that names both lengths when max_model_len exceeds the model's max_position_embeddings.
    """

    def __init__(
        self,
        model: Qwen,
        tokenizer: Any,
        eos_token_ids: Collection[int],
        limits: EngineLimits,
        make_attend: Callable[[PagedKVCache, PagedBatch], Attend] = paged_attend,
        on_step: Callable[[dict[str, Any]], None] | None = None,
        speculator: Speculator | None = None,
    ):
        context = model.config.max_position_embeddings
        if limits.max_model_len > context:
            raise ValueError(
                f"max_model_len {limits.max_model_len} exceeds the model's context of {context}"
            )
        self.limits = limits
        self._eos_token_ids = frozenset(eos_token_ids)
        self._vocab_size = model.config.vocab_size
        self._tokenizer = tokenizer
        self._on_step = on_step
        self.blocks = CachingBlockManager(
            limits.num_blocks, limits.block_size, limits.watermark, limits.prefix_caching
        )
        of_steps = limits.max_num_seqs, limits.token_budget, limits.max_model_len
        self.scheduler = Scheduler(self.blocks, *of_steps)
        cache = paged_cache_for(model, limits.num_blocks, limits.block_size)
        self._speculator = speculator
        choose = choose_one if speculator is None else speculator.choose
        self._runner = ModelRunner(model, cache, self.blocks, *of_steps, make_attend, choose)
        self._streams: dict[str, TextStream] = {}
        self._grown: list[str] = []  # who got tokens in the last step
        self._num_steps = 0
        self.num_drafts = self.num_draft_tokens = self.num_accepted_tokens = 0

    @property
    def num_unfinished(self) -> int:
        """How many requests wait or run."""
        return self.scheduler.num_unfinished

    def check(self, prompt_ids: Sequence[int], params: GenerationParams) -> None:
        """Raise ValueError for what `add` would refuse whatever else runs; for any thread.

        That is an empty prompt; one that leaves no room for one token, whose length is named
        together with max_model_len; and an id, also in logit_bias and stop_token_ids, that is no
        int or outside the vocabulary, which is named together with the size of the vocabulary.
        """
        limit = self.limits.max_model_len
        if len(prompt_ids) == 0:
            raise ValueError("the prompt is empty; it needs at least 1 token")
        if len(prompt_ids) + 1 > limit:
            raise ValueError(
                f"the prompt has {len(prompt_ids)} tokens, which leaves no room for a new one: "
                f"the context is {limit} tokens"
            )
        for token_id in itertools.chain(prompt_ids, params.logit_bias, params.stop_token_ids):
            if not isinstance(token_id, int) or not 0 <= token_id < self._vocab_size:
                raise ValueError(
                    f"token id {token_id!r} is outside the vocabulary of {self._vocab_size}"
                )

    def add(self, request_id: str, prompt_ids: Sequence[int], params: GenerationParams) -> None:
        """Let a request wait for its first step.

        Raises ValueError, with nothing changed, for what `check` refuses, and, with the id, when a
        request with its id has not ended. Who has ended may keep the id until the next `step`.
        """
        self.check(prompt_ids, params)
        ending = frozenset() if params.ignore_eos else self._eos_token_ids
        ending |= frozenset(params.stop_token_ids)
        self.scheduler.add(
            Request(request_id, prompt_ids, params.max_tokens, ending, params.cache_salt)
        )
        state = SamplingState(
            params,
            prompt_ids,
            params.logit_bias,
            params.min_tokens,
            ending,
            params.logprobs,
        )
        self._runner.add(request_id, state)
        if self._speculator is not None:
            self._speculator.add(request_id, state)
        self._streams[request_id] = TextStream(self._decode, params.stop)

    def abort(self, request_id: str) -> None:
        """End a request; nothing comes out for it from now on. An unknown id is no error."""
        self._end(request_id)
        self._free_when_idle()

    def step(self) -> list[Delta]:
        """Compute one step; returns what came to the requests that have something to show.

        Returns [] when nobody waits or runs.
        Raises StepFailed, from the error, when the model raises: the requests of the step have
        ended, without a delta, and nobody finds anything of what it would have computed; the others
        go on with the next step.
        """
        start = time.perf_counter()
        try:
            drafts = self._propose()
        except Exception as error:
            self._give_up(self._grown, None, error)
        step = self.scheduler.schedule(drafts)
        if not step.parts:
            return []
        planned = time.perf_counter()
        try:
            chosen = self._runner.execute(step)
        except Exception as error:
            self._give_up([part.request_id for part in step.parts], step, error)
        computed = time.perf_counter()
        deltas, num_accepted = self._take_in(step, chosen)
        if self._on_step is not None:
            times = start, planned, computed, time.perf_counter()
            of_step = self._num_steps, step, num_accepted, deltas, times
            self._on_step(step_record(*of_step, self.scheduler, self.blocks))
        self._num_steps += 1
        return deltas

    def _propose(self) -> Mapping[str, Sequence[int]]:
        self._grown = [name for name in self._grown if name in self._streams]
        if self._speculator is None or not self._grown:
            return NO_DRAFTS
        return self._speculator.propose(self._grown)

    def _take_in(
        self, step: Step, chosen: Mapping[str, Sequence[Choice]]
    ) -> tuple[list[Delta], int]:
        """Take in what a step has chosen; returns the deltas, and how many guesses held."""
        # Asked before `update`, after which the scheduler knows nothing of those that ended.
        cached = {name: self.scheduler.num_cached(name) for name in chosen}
        outputs = self.scheduler.update(
            step, {name: [one.token_id for one in choices] for name, choices in chosen.items()}
        )
        self._grown = [output.request_id for output in outputs]
        deltas = [self._delta(output, chosen[output.request_id], cached) for output in outputs]
        deltas = [delta for delta in deltas if delta.text or delta.choices or delta.finish_reason]
        self._free_when_idle()
        num_accepted = sum(len(choices) - 1 for choices in chosen.values())
        self.num_accepted_tokens += num_accepted
        self.num_draft_tokens += sum(part.num_drafts for part in step.parts)
        self.num_drafts += sum(part.num_drafts > 0 for part in step.parts)
        return deltas, num_accepted

    def _give_up(self, request_ids: Sequence[str], step: Step | None, error: Exception) -> NoReturn:
        for request_id in request_ids:
            self._end(request_id)
        if step is not None:
            # Nothing of an aborted request is published: no KV is found that is not there.
            self.scheduler.update(step, {})
        self._free_when_idle()
        raise StepFailed(request_ids) from error

    def _delta(self, output: Output, chosen: Sequence[Choice], cached: Mapping[str, int]) -> Delta:
        request_id, finish_reason = output.request_id, output.finish_reason
        stream = self._streams[request_id]
        text, shown = "", []
        # Of accepted guesses, those behind the token that ended the request are no part of it.
        for choice in chosen[: len(output.token_ids)]:
            piece, certain = stream.add(choice)
            text, shown = text + piece, shown + certain
            if stream.matched is not None:
                break
        if stream.matched is not None:
            self.scheduler.abort(request_id)
        if stream.matched is not None or finish_reason is not None:
            piece, certain = stream.flush()
            text, shown = text + piece, shown + certain
            # Asked again: the bytes of an unfinished character may complete a stop string.
            if stream.matched is not None:
                finish_reason = "stop"
            self._forget(request_id)
        return Delta(request_id, text, tuple(shown), finish_reason, cached[request_id])

    def _end(self, request_id: str) -> None:
        self.scheduler.abort(request_id)
        self._forget(request_id)

    def _free_when_idle(self) -> None:
        # The aborted keep their blocks until the next plan, and nobody else may ask for one.
        if self.scheduler.num_unfinished == 0:
            self.scheduler.schedule()

    def _forget(self, request_id: str) -> None:
        self._runner.remove(request_id)
        if self._speculator is not None:
            self._speculator.remove(request_id)
        self._streams.pop(request_id, None)

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)


class LLM:
    """Answer a list of prompts, together.

    model, tokenizer, eos_token_ids, limits, make_attend, speculator: as in `Engine`. The tokenizer
        is called for encoding too, as encode(text).
    engine, an `Engine` of which nobody else makes use, is kept under this name.
    """

    def __init__(
        self,
        model: Qwen,
        tokenizer: Any,
        eos_token_ids: Collection[int],
        limits: EngineLimits,
        make_attend: Callable[[PagedKVCache, PagedBatch], Attend] = paged_attend,
        speculator: Speculator | None = None,
    ):
        self._tokenizer = tokenizer
        self.engine = Engine(
            model, tokenizer, eos_token_ids, limits, make_attend, speculator=speculator
        )

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: GenerationParams | Sequence[GenerationParams],
        show_progress: bool = False,
    ) -> list[Completion]:
        """Continue prompts; returns their completions in the same order.

        prompts: texts, or ids. params: for all of them, or one for each. show_progress: draw a bar.
        Raises ValueError, before any step, when the numbers of prompts and params differ, which it
        names, and for what `Engine.check` refuses. Whatever ends the call early, nothing of it is
        left in the engine.
        """
        every = [params] * len(prompts) if isinstance(params, GenerationParams) else list(params)
        if len(every) != len(prompts):
            raise ValueError(f"there are {len(prompts)} prompts, and params for {len(every)}")
        ids = [self._encode(prompt) for prompt in prompts]
        completions = {str(i): Completion(tuple(one)) for i, one in enumerate(ids)}
        try:
            for name, prompt_ids, wanted in zip(completions, ids, every, strict=True):
                self.engine.add(name, prompt_ids, wanted)
            self._run(completions, show_progress)
        finally:
            for name in completions:
                self.engine.abort(name)
        return list(completions.values())

    def _run(self, completions: Mapping[str, Completion], show_progress: bool) -> None:
        with tqdm(total=len(completions), disable=not show_progress, unit="prompt") as bar:
            while self.engine.num_unfinished:
                for delta in self.engine.step():
                    completion = completions[delta.request_id]
                    completion.choices += delta.choices
                    completion.text += delta.text
                    completion.finish_reason = delta.finish_reason
                    bar.update(delta.finish_reason is not None)

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        return self._tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
