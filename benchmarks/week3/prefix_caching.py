"""What a common beginning is worth: chats behind a system prompt of 1,024 tokens.

64 requests come one after the other, and each asks for its first token only: the time of a run is
64 times the time to the first token. All prompts begin with the same 1,024 ids and go on with 32 of
their own. The default model runs in bfloat16, in the same engine with and without the cache.

Counted, without a clock: without the cache each request computes 1,056 tokens. With it, the first
one does, and the others compute 32 each, so that 63 * 1,024 of 64 * 1,056 tokens are found: 95.5 %.
"""

import functools
import importlib
import itertools

import torch

from course import models, paged
from course.bench import YOURS, Workload
from course.engine import Engine, assemble, takes_part
from course.labs import Lab, week_labs
from course.workloads import prefix

NUM_FOUND = 63 * 1024
AGAINST = "no prefix cache"


def workload(yours: set[Lab]) -> Workload:
    """Build both sides. yours: the labs to take from code/; the rest is the reference."""
    folder = models.resolve_model(None)
    tokenizer = models.load_tokenizer(folder)
    parts = {lab for lab in yours if takes_part(lab)}

    def engine(has_cache: bool) -> Engine:
        params = paged.PagedParams(kv_gb=0.5, prefix_caching=has_cache)
        others = set(week_labs()) - parts
        wanted = (folder, "bfloat16", tokenizer, frozenset(), others)
        return assemble(parts, *wanted, paged_params=params)

    prompts = prefix()
    cached = engine(True)
    num_computed = sum(map(len, prompts)) - NUM_FOUND
    num_parameters = sum(parameter.numel() for parameter in cached.model.parameters())
    return Workload(
        sides={
            YOURS: functools.partial(answer, cached, prompts, itertools.count(), NUM_FOUND),
            AGAINST: functools.partial(answer, engine(False), prompts, itertools.count(), 0),
        },
        against=AGAINST,
        count=len(prompts),
        unit="first tokens",
        flops=2.0 * num_parameters * num_computed,
        num_bytes=2.0 * num_parameters * len(prompts),
        dtype=torch.bfloat16,
    )


def answer(
    engine: Engine, prompts: list[list[int]], runs: itertools.count, num_expected: int
) -> None:
    """Ask for the first token of each prompt; raises ValueError for another number of found ones.

    runs: counts them, since what an earlier run has computed is no use to this one.
    """
    lab = importlib.import_module("week3.engine")
    params = lab.GenerationParams(max_tokens=1, temperature=0.0, cache_salt=str(next(runs)))
    scheduler = engine.paged.scheduler
    before = scheduler.num_cached_tokens
    for number, prompt_ids in enumerate(prompts):
        engine.paged.add(str(number), prompt_ids, params)
        while engine.paged.num_unfinished:
            engine.paged.step()
    num_found = scheduler.num_cached_tokens - before
    if num_found != num_expected:
        raise ValueError(f"{num_found} tokens were found, and there are {num_expected}")
