"""The whole engine on nano-cpu: 32 requests of different lengths, all there from the start.

Prompts have 16 to 128 tokens and outputs 16 to 64, temperature 0.6, and no token ends one early.
All sides run the default model in bfloat16. transformers runs in batches, filled up on the left to
the longest prompt, each until its longest output is complete; the size of the batch is the one that
is fastest here, tried before the rounds begin.
"""

import functools
import importlib
import random
import time
from collections.abc import Sequence
from typing import Any

import torch

from course import models
from course.bench import YOURS, Workload, assemble_paged
from course.engine import Engine
from course.labs import Lab
from course.paged import kv_bytes_per_token
from course.workloads import Request, nano_cpu

TEMPERATURE = 0.6
BATCH_SIZES = (8, 16, 32)


def workload(yours: set[Lab]) -> Workload:
    """Build the sides. yours: the labs to take from code/; the rest is the reference."""
    engine = assemble_paged(yours)
    best, name = _best_batches(models.resolve_model(None))
    sides = {YOURS: functools.partial(ours, engine), name: best}
    num_parameters = sum(parameter.numel() for parameter in engine.model.parameters())
    num_computed = sum(len(ids) + max_tokens - 1 for ids, max_tokens in nano_cpu())
    num_steps = max(max_tokens for _, max_tokens in nano_cpu())
    # Of each request, every decode reads all tokens that it has by then.
    num_read = sum(sum(range(len(ids) + 1, len(ids) + count)) for ids, count in nano_cpu())
    return Workload(
        sides=sides,
        against=name,
        count=sum(max_tokens for _, max_tokens in nano_cpu()),
        unit="tokens",
        flops=2.0 * num_parameters * num_computed,
        num_bytes=2.0 * num_parameters * num_steps
        + kv_bytes_per_token(engine.model.config, 2) * num_read,
        dtype=torch.bfloat16,
    )


def ours(engine: Engine) -> dict[str, int]:
    """Run the workload; returns request → how many tokens came."""
    lab = importlib.import_module("week3.engine")
    # What an earlier run has computed is no use to this one.
    every = {"temperature": TEMPERATURE, "cache_salt": str(random.random())}
    counts: dict[str, int] = {}
    for number, (ids, max_tokens) in enumerate(nano_cpu()):
        params = lab.GenerationParams(**every, seed=number, max_tokens=max_tokens)
        engine.paged.add(str(number), ids, params)
        counts[str(number)] = 0
    while engine.paged.num_unfinished:
        for delta in engine.paged.step():
            counts[delta.request_id] += len(delta.choices)
    _check(counts.values())
    return counts


def _best_batches(folder: Any) -> tuple[Any, str]:
    """Try transformers with several sizes of a batch; returns the fastest one, and its name."""
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    seconds = {}
    for size in BATCH_SIZES:
        start = time.perf_counter()
        theirs(model, size)
        seconds[size] = time.perf_counter() - start
    best = min(seconds, key=seconds.get)
    return functools.partial(theirs, model, best), f"transformers, batches of {best}"


def theirs(model: Any, batch_size: int) -> None:
    """Run the workload through transformers' generate."""
    requests = nano_cpu()
    counts = []
    for start in range(0, len(requests), batch_size):
        counts += _batch(model, requests[start : start + batch_size])
    _check(counts)


def _batch(model: Any, batch: Sequence[Request]) -> list[int]:
    longest = max(len(ids) for ids, _ in batch)
    num_new = max(max_tokens for _, max_tokens in batch)
    input_ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for row, (ids, _) in enumerate(batch):
        input_ids[row, longest - len(ids) :] = torch.tensor(ids)
        mask[row, longest - len(ids) :] = 1
    out = model.generate(
        input_ids,
        attention_mask=mask,
        max_new_tokens=num_new,
        min_new_tokens=num_new,
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        pad_token_id=0,
    )
    num_made = out.shape[1] - longest
    return [min(num_made, max_tokens) for _, max_tokens in batch]


def _check(counts: Any) -> None:
    promised = [max_tokens for _, max_tokens in nano_cpu()]
    if list(counts) != promised:
        raise ValueError(f"{list(counts)} tokens came, and {promised} were promised")
