"""`course learn`, `course chat` and `course generate`: text from the engine that the labs make."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from course import models, progress, status, stubs, tracker
from course.engine import (
    ALWAYS_ON,
    MOE,
    PAGED_PARTS,
    Engine,
    LabCrashed,
    assemble,
    is_on,
    is_paged,
    takes_part,
)
from course.grading import LabUnusable
from course.labs import WEEKS, Lab, week_labs
from course.paged import PagedParams, RanksEnded
from course.speed import Stopwatch

TABLE_WIDTH = 84
MIN_STEM_WIDTH = 10
# Enough for a rate, and no long wait for the second answer of --show-speed.
MAX_TOKENS_WITHOUT_LATER_WEEKS = 16


@dataclass(frozen=True)
class Request:
    """What the command line asks of the engine.

    model: a folder, a hub name, or None for the default. engine: "hybrid", "solutions" or "code".
    dtype: "float32" or "bfloat16". quantization: "int8", "int4" or None. device: "cpu" or "cuda";
    None means a GPU where there is one. tensor_parallel: how many processes the model is spread
    over. speculative, num_drafts: as in `PagedParams`, and draft_model, a folder or a hub name.
    until: the last week whose labs take part; None means all.
    show_speed: say how fast each answer was, and how fast it is without the labs of later weeks.
    Raises ValueError for max_tokens below 1.
    """

    model: str | None = None
    engine: str = "hybrid"
    dtype: str = "float32"
    quantization: str | None = None
    device: str | None = None
    tensor_parallel: int = 1
    speculative: str | None = None
    draft_model: str | None = None
    num_drafts: int = 4
    until: str | None = None
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    show_speed: bool = False

    def __post_init__(self):
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")


class Conversation:
    """An engine that is put together again, with one lab less of the learner's, after a crash."""

    def __init__(self, request: Request):
        self.request = request
        self._device = choose_device(request.device)
        folder = models.resolve_model(request.model, report=tell)
        tokenizer = models.load_tokenizer(folder)
        self._draft_folder = draft_folder(request.draft_model)
        self._parts = (folder, request.dtype, tokenizer, models.eos_token_ids(folder, tokenizer))
        self.tokenizer = tokenizer
        self._yours, self._switched_on, self.remarks = chosen_labs(request.engine, request.until)
        # What each step of week 3's engine was; only kept to say how fast it is.
        self._records: list[dict[str, Any]] = []
        self.engine: Engine = self._surviving_crashes(self._assemble)

    def complete(self, prompt_ids: list[int], on_text: Callable[[str], None] | None) -> Any:
        """Answer one prompt; returns a Completion. Raises ValueError for one that is refused."""
        self._check_length(prompt_ids)
        return self._surviving_crashes(lambda: self._complete(prompt_ids, on_text))

    def complete_all(self, prompts: list[list[int]]) -> list[Any]:
        """Answer several prompts, together where the engine can; as `complete` does it for one."""
        for prompt_ids in prompts:
            self._check_length(prompt_ids)
        return self._surviving_crashes(
            lambda: self.engine.complete_all(prompts, self._params(), self.request.max_tokens)
        )

    def speed(self, prompt_ids: list[int]) -> str:
        """Say how fast the latest answer was, and how fast week 1 alone answers the same prompt."""
        lines = [self._stopwatch.report()]
        sources = self.engine.sources.items()
        if any(lab.week != ALWAYS_ON and is_on(source) for lab, source in sources):
            first_week = {lab for lab in self._yours if lab.week == ALWAYS_ON}
            plain = Stopwatch(assemble(first_week, *self._parts, device=self._device))
            max_tokens = min(self.request.max_tokens, MAX_TOKENS_WITHOUT_LATER_WEEKS)
            plain.engine.complete(prompt_ids, self._params(), max_tokens)
            lines.append(f"with week 1 alone: {plain.report()}")
        return "\n".join(f"  {line}" for line in lines)

    def table(self) -> str:
        """Say whose lab is whose, and why a started one does not run."""
        return "\n".join([sources_table(self.engine.sources), *self.remarks])

    def _check_length(self, prompt_ids: list[int]) -> None:
        context = self.engine.model.config.max_position_embeddings
        if not 0 < len(prompt_ids) < context:
            raise ValueError(
                f"the prompt has {len(prompt_ids)} tokens; this model takes 1 to {context - 1}"
            )

    def _params(self) -> dict[str, Any]:
        request = self.request
        return {
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
        }

    def _complete(self, prompt_ids: list[int], on_text: Callable[[str], None] | None) -> Any:
        self._records.clear()
        self._stopwatch = Stopwatch(self.engine, self._records)
        timed = self._stopwatch.engine
        return timed.complete(prompt_ids, self._params(), self.request.max_tokens, on_text)

    def _assemble(self) -> Engine:
        request = self.request
        former = getattr(self, "engine", None)
        if former is not None:
            former.close()
        return assemble(
            self._yours,
            *self._parts,
            self._switched_on,
            request.quantization,
            self._device,
            PagedParams(
                tensor_parallel=request.tensor_parallel,
                speculative=request.speculative,
                draft_model=self._draft_folder,
                num_drafts=request.num_drafts,
                on_step=self._records.append if request.show_speed else None,
            ),
        )

    def _surviving_crashes(self, action: Callable[[], Any]) -> Any:
        while True:
            try:
                return action()
            except LabCrashed as crash:
                if self.request.engine == "code":
                    raise
                tell(f"\nYour lab failed: {crash}\nThe reference takes its place.\n")
                self._yours.discard(crash.lab)
                self._switched_on.add(crash.lab)
                self.engine = self._assemble()


def draft_folder(name: str | None) -> Path | None:
    """Find the folder of a draft model; None for none."""
    return None if name is None else models.resolve_model(name, report=tell)


def learn(prompt: str) -> int:
    """Show the board, let the model answer through the learner's labs, name what is next."""
    grades = status.grade_all()
    print(tracker.board(grades, progress.read()[0]))
    tell("\nLoading the model …")
    code = chat(Request(max_tokens=48), prompt)
    print(f"\n{status.next_step(grades)}")
    return code


def chat(request: Request, prompt: str | None) -> int:
    """Answer the prompt, or, without one, whatever is typed until the input ends."""
    try:
        conversation = Conversation(request)
        print(conversation.table())
        if prompt is not None:
            _answer(conversation, [], prompt)
            return 0
        return _read_and_answer(conversation)
    except (LabCrashed, LabUnusable, RanksEnded, models.ModelUnavailable) as error:
        return refuse(error)


def _read_and_answer(conversation: Conversation) -> int:
    print("Type a message; an empty line or Ctrl-D ends the conversation.")
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = input("\nyou> ").strip()
        except EOFError:
            return 0
        if not text:
            return 0
        try:
            messages = _answer(conversation, messages, text)
        except ValueError as error:
            print(f"course: {error}; starting a new conversation")
            messages = []


def _answer(conversation: Conversation, messages: list[dict], text: str) -> list[dict]:
    messages = [*messages, {"role": "user", "content": text}]
    prompt = conversation.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    prompt_ids = conversation.tokenizer.encode(prompt, add_special_tokens=False)
    print(f"\n{text}\n→ " if len(messages) == 1 else "→ ", end="", flush=True)
    start = time.perf_counter()
    completion = conversation.complete(prompt_ids, lambda piece: print(piece, end="", flush=True))
    seconds = time.perf_counter() - start
    print(f"\n  ({_closing(completion, conversation.request, f' in {seconds:.1f} s')})")
    if conversation.request.show_speed:
        print(conversation.speed(prompt_ids))
    return [*messages, {"role": "assistant", "content": completion.text}]


def generate(request: Request, prompts: list[str], as_json: bool) -> int:
    """Continue texts; with as_json, print one JSON object and nothing else on standard output."""
    if len(prompts) > 1:
        return _generate_all(request, prompts, as_json)
    (prompt,) = prompts
    try:
        conversation = Conversation(request)
        prompt_ids = conversation.tokenizer.encode(prompt)
        if not as_json:
            print(conversation.table())
            print(f"\n{prompt}", end="", flush=True)
        show = None if as_json else lambda piece: print(piece, end="", flush=True)
        start = time.perf_counter()
        completion = conversation.complete(prompt_ids, show)
        seconds = time.perf_counter() - start
    except (LabCrashed, LabUnusable, RanksEnded, models.ModelUnavailable) as error:
        return refuse(error)
    if as_json:
        report = _of_completion(prompt_ids, completion) | _of_run(conversation, seconds)
        print(json.dumps(report))
    else:
        print(f"\n  ({_closing(completion, request, f' in {seconds:.1f} s')})")
        if request.show_speed:
            print(conversation.speed(prompt_ids))
    return 0


def _generate_all(request: Request, prompts: list[str], as_json: bool) -> int:
    """Continue several texts. Their answers come when the last one has ended."""
    try:
        conversation = Conversation(request)
        ids = [conversation.tokenizer.encode(prompt) for prompt in prompts]
        if not as_json:
            print(conversation.table())
        start = time.perf_counter()
        completions = conversation.complete_all(ids)
        seconds = time.perf_counter() - start
    except (LabCrashed, LabUnusable, RanksEnded, models.ModelUnavailable) as error:
        return refuse(error)
    if as_json:
        reports = [_of_completion(*pair) for pair in zip(ids, completions, strict=True)]
        print(json.dumps({"completions": reports} | _of_run(conversation, seconds)))
        return 0
    for prompt, completion in zip(prompts, completions, strict=True):
        print(f"\n{prompt}{completion.text}\n  ({_closing(completion, request)})")
    if request.show_speed:
        num_tokens = sum(len(completion.token_ids) for completion in completions)
        rate = f"{num_tokens / seconds:.1f} tokens/s over all"
        print(f"\n  {len(prompts)} prompts, {num_tokens} tokens in {seconds:.1f} s: {rate}")
    return 0


def _closing(completion: Any, request: Request, duration: str = "") -> str:
    num_tokens = len(completion.token_ids)
    text = f"{num_tokens} tokens{duration}"
    if completion.finish_reason == "length":
        reached = num_tokens == request.max_tokens
        text += f"; cut at {f'--max-tokens {num_tokens}' if reached else 'the end of the context'}"
    return text


def _of_completion(prompt_ids: list[int], completion: Any) -> dict[str, Any]:
    return {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": len(prompt_ids),
    }


def _of_run(conversation: Conversation, seconds: float) -> dict[str, Any]:
    return {
        "seconds": round(seconds, 3),
        "labs": {lab.name: source for lab, source in conversation.engine.sources.items()},
    }


def choose_device(name: str | None) -> str:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs an NVIDIA GPU, and torch sees none here")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def chosen_labs(
    engine: str, until: str | None = None, serving: bool = False
) -> tuple[set[Lab], set[Lab], list[str]]:
    """Choose whose labs the engine runs.

    until: the last week whose labs take part; None means all. serving: it is the server's, which
    needs every lab.
    Returns the learner's labs, the labs of later weeks that run as the reference, and a remark on
    each lab that the learner began and the engine does not run.
    """
    weeks = list(WEEKS)
    last = len(weeks) if until is None else weeks.index(until) + 1
    labs = [lab for lab in week_labs() if lab.week in weeks[:last]]
    if engine == "solutions":
        return set(), set(labs), []
    if engine == "code":
        begun = {lab for lab in labs if not stubs.is_untouched(lab)}
        return begun | {lab for lab in labs if lab.week == ALWAYS_ON}, set(), []
    every = status.grade_all()
    grades = {lab: every[lab] for lab in labs}
    green = {lab for lab, grade in grades.items() if grade.state == "green"}
    referenced = {lab for lab, grade in grades.items() if grade.state == "reference"}
    needs_all = serving or is_paged(green | referenced)
    remarks = [
        f"{lab.name}: {grade.passed} of {grade.total} tests pass, so {_instead(lab, needs_all)}"
        for lab, grade in grades.items()
        if grade.state == "started" and (serving or takes_part(lab))
    ]
    return green, referenced, remarks


def _instead(lab: Lab, needs_all: bool) -> str:
    if lab.name == MOE:
        return "models with experts run on the reference, not on yours"
    if lab.week == ALWAYS_ON or (needs_all and lab.name in PAGED_PARTS):
        return "the reference runs, not yours"
    return "the engine runs without it"


def sources_table(sources: dict[Lab, str]) -> str:
    """Say in a few lines whose lab is whose, every week in columns of its own."""
    lines = []
    for week in dict.fromkeys(lab.week for lab in sources):
        of_week = {lab.stem: source for lab, source in sources.items() if lab.week == week}
        width = max(MIN_STEM_WIDTH, *map(len, of_week))
        cells = [f"{stem:<{width}} {source:<10}" for stem, source in of_week.items()]
        per_line = TABLE_WIDTH // len(cells[0])
        rows = [cells[i : i + per_line] for i in range(0, len(cells), per_line)]
        lines += ["".join(row).rstrip() for row in rows]
    return "\n".join(lines)


def refuse(error: Exception) -> int:
    if isinstance(error, LabCrashed) and isinstance(error.error, NotImplementedError):
        error = error.error
    tell(f"course: {error}")
    return 1


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
