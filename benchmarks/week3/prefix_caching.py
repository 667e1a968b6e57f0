"""What a common beginning is worth: chats behind a system prompt of 1,024 tokens.

64 requests come one after the other, and each asks for its first token only: the time of a run is
64 times the time to the first token. All prompts begin with the same 1,024 ids and go on with 32 of
their own. The default model runs in bfloat16, in the same engine with and without the cache.

Counted, without a clock: without the cache each request computes 1,056 tokens. With it, the first
one does, and the others compute 32 each, so that 63 * 1,024 of 64 * 1,056 tokens are found: 95.5 %.
"""

import functools
import random

import torch

from course.bench import YOURS, Workload, assemble_paged
from course.engine import Engine
from course.labs import Lab
from course.workloads import prefix

NUM_FOUND = 63 * 1024
AGAINST = "no prefix cache"


def workload(yours: set[Lab]) -> Workload:
    """Build both sides. yours: the labs to take from code/; the rest is the reference."""
    prompts = prefix()
    cached = assemble_paged(yours)
    num_computed = sum(map(len, prompts)) - NUM_FOUND
    num_parameters = sum(parameter.numel() for parameter in cached.model.parameters())
    return Workload(
        sides={
            YOURS: functools.partial(answer, cached, prompts, NUM_FOUND),
            AGAINST: functools.partial(answer, assemble_paged(yours, False), prompts, 0),
        },
        against=AGAINST,
        count=len(prompts),
        unit="first tokens",
        flops=2.0 * num_parameters * num_computed,
        num_bytes=2.0 * num_parameters * len(prompts),
        dtype=torch.bfloat16,
    )


def answer(engine: Engine, prompts: list[list[int]], num_expected: int) -> None:
    """Ask for the first token of each prompt; ValueError when not as many as expected are found."""
    # What an earlier run has computed is no use to this one.
    params = {"temperature": 0.0, "cache_salt": str(random.random())}
    scheduler = engine.paged.scheduler
    before = scheduler.num_cached_tokens
    for prompt_ids in prompts:
        engine.complete(prompt_ids, params, max_tokens=1)
    num_found = scheduler.num_cached_tokens - before
    if num_found != num_expected:
        raise ValueError(f"{num_found} tokens were found, and there are {num_expected}")
