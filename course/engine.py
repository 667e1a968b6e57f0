"""The engine put together from labs: the learner's where they pass, the reference for the rest.

Week 1 is the engine. A lab of a later week makes it faster and is off until it is switched on: by
passing in code/, by a line in progress/reference.txt, or by asking for the reference altogether.
Week 3 is another engine around the same model: one of its labs switches it on, with the reference
for its others, since none of them runs without the rest. Its lab on experts is none of these: it
loads every model that has experts, and no other.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from course import grading, layers, models, paged
from course.labs import WEEKS, Lab, week_labs
from course.paged import PagedParams

YOURS, REFERENCE, OFF, NO_GPU, REPLACED = "yours", "reference", "off", "no GPU", "replaced"
ALWAYS_ON = "week1"
QUANTIZATION, MOE = "week2/quantization", "week3/moe"
SPECULATIVE, TENSOR_PARALLEL = "week3/speculative", "week3/tensor_parallel"
# On a CPU nothing but Triton's interpreter could run them.
GPU_PARTS = (
    "week2/fused_kernels",
    "week2/flash_attention",
    "week2/flash_decoding",
    "week3/paged_kernels",
)
PAGED_PARTS = (
    "week3/block_manager",
    "week3/prefix_caching",
    "week3/scheduler",
    "week3/paged_attention",
    "week3/paged_kernels",
    "week3/model_runner",
    "week3/engine",
)
# What week 2 has in the places of week 3's parts.
ROW_PARTS = (
    "week2/kv_cache",
    "week2/flash_attention",
    "week2/flash_decoding",
    "week2/continuous_batching",
)
# Labs of later weeks that the engine can run; the others are used beside it.
LATER_PARTS = (
    *ROW_PARTS,
    QUANTIZATION,
    "week2/fused_kernels",
    *PAGED_PARTS,
    MOE,
    SPECULATIVE,
    TENSOR_PARALLEL,
)
# Of prompts that run together: how many at once, and how many tokens they compute in one step.
NUM_ROWS = 32
TOKEN_BUDGET = 256


class LabCrashed(Exception):
    """A learner's lab raised an error while the engine ran.

    lab: whose. error: what it raised. place: file and line, in words.
    """

    def __init__(self, lab: Lab, error: BaseException, place: str):
        super().__init__(f"{place}: {type(error).__name__}: {error}")
        self.lab = lab
        self.error = error


@dataclass(frozen=True)
class Engine:
    """A loaded model, and the labs that run it.

    sources: every lab that takes part, "yours", "reference", "off", "no GPU" or "replaced".
    next_logits: maps all ids so far to the scores of the next one. make_attend: what passes over a
    cache attend by, None without one. batching: the lab that runs prompts together; None when off.
    paged: week 3's Engine, which takes the place of these three; None when off. ranks: those that
    the model is spread over, see week3/tensor_parallel.py; None when it is in one process.
    """

    sources: dict[Lab, str]
    model: Any
    tokenizer: Any
    eos_token_ids: frozenset[int]
    next_logits: Callable[[Sequence[int]], Any]
    make_attend: Callable | None
    generating: ModuleType
    sampling: ModuleType
    batching: ModuleType | None
    paged: Any | None
    blame: "_Blame"
    ranks: Any | None = None

    def close(self) -> None:
        """End what runs beside this process; the engine is of no use afterwards."""
        if self.ranks is not None:
            self.ranks.stop()

    def complete(
        self,
        prompt_ids: Sequence[int],
        sampling_params: dict[str, Any],
        max_tokens: int,
        on_text: Callable[[str], None] | None = None,
    ) -> Any:
        """Continue a prompt; returns week1/generate.py's Completion.

        sampling_params: arguments of SamplingParams. Raises LabCrashed for an error in a learner's
        file, ValueError for a request that cannot be met.
        """
        self._check_ids(prompt_ids)
        if self.paged is not None:
            (answer,) = self._complete_paged([prompt_ids], sampling_params, max_tokens, on_text)
            return answer
        params = self.sampling.SamplingParams(**sampling_params)
        with self.blame:
            return self.generating.generate(
                self.next_logits,
                prompt_ids,
                self._decode,
                max_tokens=max_tokens,
                max_model_len=self.model.config.max_position_embeddings,
                eos_token_ids=self.eos_token_ids,
                choose=self.sampling.Sampler(params, len(prompt_ids)),
                on_text=on_text,
            )

    def complete_all(
        self,
        prompts: Sequence[Sequence[int]],
        sampling_params: dict[str, Any],
        max_tokens: int,
    ) -> list[Any]:
        """Continue several prompts, together where the lab for it is on; errors as in `complete`.

        Returns their completions in the order of the prompts.
        """
        for ids in prompts:
            self._check_ids(ids)
        if self.paged is not None:
            return self._complete_paged(prompts, sampling_params, max_tokens)
        if self.batching is None or self.make_attend is None:
            return [self.complete(ids, sampling_params, max_tokens) for ids in prompts]
        params = self.sampling.SamplingParams(**sampling_params)
        with self.blame:
            num_rows = min(NUM_ROWS, len(prompts))
            batcher = self.batching.ContinuousBatcher(
                self.model, num_rows, TOKEN_BUDGET, self.make_attend
            )
            for number, ids in enumerate(prompts):
                request = self.batching.Request(str(number), ids, max_tokens, self.eos_token_ids)
                choose = self.sampling.Sampler(params, len(ids))
                batcher.add(
                    request, lambda scores, known, choose=choose: choose(scores.cpu(), known)
                )
            ended = self.batching.run(batcher)
            completions = [ended[str(number)] for number in range(len(prompts))]
            return [
                self.generating.Completion(token_ids, self._decode(token_ids), finish_reason)
                for token_ids, finish_reason in completions
            ]

    def _complete_paged(
        self,
        prompts: Sequence[Sequence[int]],
        sampling_params: dict[str, Any],
        max_tokens: int,
        on_text: Callable[[str], None] | None = None,
    ) -> list[Any]:
        wanted = sampling_params, max_tokens, on_text
        with self.blame:
            return paged.answer_all(self.paged, self.generating, prompts, *wanted, self.ranks)

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def _check_ids(self, prompt_ids: Sequence[int]) -> None:
        vocab_size = self.model.config.vocab_size
        wrong = next((i for i in prompt_ids if not 0 <= i < vocab_size), None)
        if wrong is not None:
            raise ValueError(f"token id {wrong} is outside the vocabulary of {vocab_size} tokens")


def takes_part(lab: Lab) -> bool:
    """Say whether the engine can run a lab."""
    return lab.week == ALWAYS_ON or lab.name in LATER_PARTS


def is_paged(switched_on: Iterable[Lab]) -> bool:
    """Say whether these labs switch week 3's engine on."""
    return any(lab.name in PAGED_PARTS for lab in switched_on)


def is_on(source: str) -> bool:
    """Say whether a lab with this source runs."""
    return source in (YOURS, REFERENCE)


def assemble(
    yours: Iterable[Lab],
    folder: Path,
    dtype: str,
    tokenizer: Any,
    eos_token_ids: frozenset[int],
    switched_on: Iterable[Lab] = (),
    quantization: str | None = None,
    device: str = "cpu",
    paged_params: PagedParams | None = None,
) -> Engine:
    """Put an engine together and load the checkpoint folder into it.

    yours: the labs to take from code/. dtype: "float32" or "bfloat16". switched_on: the labs of
    later weeks that run as the reference. Every other lab is the reference in week 1, and off in
    later weeks. quantization: "int8" or "int4"; with None, the lab of that name is off. device:
    "cpu", on which kernels do not run, or "cuda". paged_params: of week 3's engine; None leaves its
    labs off. Raises LabCrashed for an error in a learner's file, ValueError for a bad checkpoint,
    and when a lab that is asked for is not switched on, RanksEnded when a rank does not begin.
    """
    import torch

    chosen = set(yours)
    sources = _sources(chosen, set(switched_on), quantization, device, paged_params)
    sources |= _source_of_experts(sources, models.has_experts(folder), quantization)
    blame = _Blame(sources, _activate(chosen))
    with blame:
        labs = {
            lab.name: grading.import_lab(lab) for lab, source in sources.items() if is_on(source)
        }
        prepare = functools.partial(
            paged.prepare_model, fused="week2/fused_kernels" in labs, quantization=quantization
        )
        ranks = None
        if TENSOR_PARALLEL in labs:
            of_ranks = getattr(torch, dtype), device, paged_params.tensor_parallel, prepare
            ranks = paged.start_ranks(folder, *of_ranks)
            model = ranks.leader
        else:
            loading = labs[MOE if MOE in labs else "week1/qwen"]
            model = loading.load_model(folder, getattr(torch, dtype), device)
            prepare(model)
        make_attend = _make_attend(labs)
        next_logits = _next_logits(labs, model, make_attend)
        engine = None
        if "week3/engine" in labs:
            attend = paged.make_attend(device) if ranks is None else model.attend
            of_engine = model, tokenizer, eos_token_ids, device, paged_params, attend
            engine = _or_stop(ranks, lambda: paged.paged_engine(*of_engine))
    modules = (
        labs["week1/generate"],
        labs["week1/sampling"],
        labs.get("week2/continuous_batching"),
    )
    return Engine(
        *(sources, model, tokenizer, eos_token_ids, next_logits, make_attend),
        *(*modules, engine, blame, ranks),
    )


def _or_stop(ranks: Any | None, action: Callable[[], Any]) -> Any:
    """Return what the action does; when it raises, the ranks end."""
    try:
        return action()
    except BaseException:
        if ranks is not None:
            ranks.stop()
        raise


def _sources(
    yours: set[Lab],
    switched_on: set[Lab],
    quantization: str | None,
    device: str,
    paged_params: PagedParams | None,
) -> dict[Lab, str]:
    parts = {lab.name: lab for lab in week_labs() if takes_part(lab)}
    paging = {parts[name] for name in PAGED_PARTS}
    asked = {} if paged_params is None else paged_params.asked
    wanted = {parts[name] for name in asked}
    # Who asks for one of these labs, and has it, asks for the engine that it belongs to.
    pages = paged_params is not None and (
        is_paged(yours | switched_on) or bool(wanted & (yours | switched_on))
    )
    referenced = {lab for lab in parts.values() if lab.week == ALWAYS_ON} | switched_on
    referenced |= paging
    sources = {
        lab: YOURS if lab in yours else REFERENCE if lab in referenced else OFF
        for lab in parts.values()
    }
    unused = [parts[name] for name in ROW_PARTS] if pages else paging
    sources |= {lab: REPLACED if pages else OFF for lab in unused if is_on(sources[lab])}
    if device == "cpu":
        sources |= dict.fromkeys((parts[name] for name in GPU_PARTS), NO_GPU)
    for name in (SPECULATIVE, TENSOR_PARALLEL):
        if name not in asked:
            sources[parts[name]] = OFF
        elif pages:
            sources[parts[name]] = YOURS if parts[name] in yours else REFERENCE
        else:
            raise ValueError(
                f"{asked[name]} needs week 3's engine: pass the suite of one of its labs, or write "
                "week3 into progress/reference.txt, or ask for --engine solutions"
            )
    quantizing = parts[QUANTIZATION]
    if quantization is None:
        sources[quantizing] = OFF
    elif sources[quantizing] == OFF:
        raise ValueError(
            f"--quantization {quantization} needs {QUANTIZATION}: pass its suite "
            f"(pytest {quantizing.path}), or write its name into progress/reference.txt, or ask "
            "for --engine solutions"
        )
    return sources


def _source_of_experts(
    sources: dict[Lab, str], has_experts: bool, quantization: str | None
) -> dict[Lab, str]:
    """Say whose lab loads the experts: a model with experts has no other way, a dense one none."""
    (moe,) = (lab for lab in sources if lab.name == MOE)
    if not has_experts:
        return {moe: OFF}
    if quantization is not None:
        raise ValueError(f"--quantization {quantization} knows nothing of a model with experts")
    if any(lab.name == TENSOR_PARALLEL and is_on(source) for lab, source in sources.items()):
        raise ValueError("--tensor-parallel knows nothing of a model with experts")
    return {moe: sources[moe] if is_on(sources[moe]) else REFERENCE}


def _make_attend(labs: Mapping[str, ModuleType]) -> Callable | None:
    """Make what the passes over a cache attend by; None without a cache."""
    if "week2/kv_cache" not in labs:
        return None
    kernels = {}
    if "week2/flash_attention" in labs:
        kernels["prefill"] = labs["week2/flash_attention"].flash_prefill
    if "week2/flash_decoding" in labs:
        kernels["decode"] = labs["week2/flash_decoding"].decode
    return functools.partial(labs["week2/kv_cache"].cached_attend, **kernels)


def _next_logits(
    labs: Mapping[str, ModuleType], model: Any, make_attend: Callable | None
) -> Callable[[Sequence[int]], Any]:
    if make_attend is not None:
        score = labs["week2/kv_cache"].CachedLogits(model, make_attend)
    else:
        score = functools.partial(labs["week1/generate"].next_token_logits, model)
    # Week 1's sampling draws on the host.
    return lambda token_ids: score(token_ids).cpu()


def _activate(yours: set[Lab]) -> list[Path]:
    """Put the engine's layer on the path; returns the folders that hold the learner's files."""
    for lab in sorted(yours):
        if not lab.code.is_file():
            raise ValueError(f"{lab.path} does not exist; `course reset {lab.name}` helps")
    files = {f"{lab.name}.py": lab.code for lab in yours}
    for week in {lab.week for lab in yours}:
        # Helper modules that the learner's labs may import travel with them.
        helpers = (layers.CODE / week).glob("*.py")
        files |= {f"{week}/{file.name}": file for file in helpers if file.stem not in WEEKS[week]}
    folders = layers.folders("solutions", files)
    grading.activate(folders)
    return folders[:-1]


class _Blame:
    """A block in which an error that a learner's file raised becomes LabCrashed."""

    def __init__(self, sources: dict[Lab, str], folders: list[Path]):
        self._sources = sources
        self._folders = folders

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if not isinstance(error, Exception):
            return
        frame = grading.learner_frame(error, self._folders)
        if frame is None:
            return
        file = grading.short_path(frame.filename)
        for lab, source in self._sources.items():
            if file == f"{lab.name}.py" and source == YOURS:
                raise LabCrashed(lab, error, f"code/{file}, line {frame.lineno}") from error
