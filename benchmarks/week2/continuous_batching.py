"""What it is worth not to wait: 32 requests of different lengths through 8 rows.

The workload is nano-cpu: prompts of 16 to 128 tokens, outputs of 16 to 64, temperature 0.6, and no
token ends one early. All sides run the default model in float32. Static batching takes 8 requests
in the order of arrival, fills their prompts up to the longest one, and goes on with all 8 rows
until the longest output is complete; then come the next 8.

Counted, without a clock: static batching makes 240 passes over 5,720 tokens, the reference with the
same 8 rows 179 passes over 3,284. So on one machine the ratio of these two sides lies between 1.34,
where only passes cost something, and 1.74, where only tokens do. The third side has a row for every
request, and 70 passes: what more rows add, which is not the scheduler's merit alone.
"""

import importlib
from collections.abc import Callable
from types import ModuleType

from course import models
from course.bench import YOURS, Workload
from course.engine import Engine, assemble, takes_part
from course.labs import Lab
from course.paged import kv_bytes_per_token
from course.workloads import nano_cpu

NUM_ROWS = 8
TOKEN_BUDGET = 128
TEMPERATURE = 0.6


def workload(yours: set[Lab]) -> Workload:
    """Build the sides. yours: the labs to take from code/; the rest is the reference."""
    folder = models.resolve_model(None)
    parts = {lab for lab in yours if takes_part(lab)}
    engine = assemble(parts, folder, "float32", models.load_tokenizer(folder), frozenset())
    kv_cache = importlib.import_module("week2.kv_cache")
    sides = {
        YOURS: lambda: continuous(engine, NUM_ROWS),
        "static batches": lambda: static(engine, kv_cache),
        f"yours, {len(nano_cpu())} rows": lambda: continuous(engine, len(nano_cpu())),
    }
    num_parameters = sum(parameter.numel() for parameter in engine.model.parameters())
    num_computed = sum(len(ids) + max_tokens - 1 for ids, max_tokens in nano_cpu())
    num_new = sum(max_tokens for _, max_tokens in nano_cpu())
    # Of each request, every decode reads all tokens that it has by then.
    num_read = sum(sum(range(len(ids) + 1, len(ids) + count)) for ids, count in nano_cpu())
    return Workload(
        sides=sides,
        against="static batches",
        count=num_new,
        unit="tokens",
        flops=2.0 * num_parameters * num_computed,
        # A pass gives each row one token at most, and reads all weights once.
        num_bytes=4.0 * num_parameters * num_new / NUM_ROWS
        + kv_bytes_per_token(engine.model.config, 4) * num_read,
    )


def continuous(engine: Engine, num_rows: int) -> dict[int, list[int]]:
    """Run the workload through the lab; returns number of the request → its token ids."""
    batching = engine.batching
    batcher = batching.ContinuousBatcher(engine.model, num_rows, TOKEN_BUDGET)
    for number, (ids, max_tokens) in enumerate(nano_cpu()):
        batcher.add(batching.Request(str(number), ids, max_tokens), sampler(engine, ids, number))
    ended = batching.run(batcher)
    return {int(number): token_ids for number, (token_ids, _) in ended.items()}


def static(engine: Engine, kv_cache: ModuleType) -> dict[int, list[int]]:
    """Run it batch by batch through the same model and cache; returns the same."""
    ended = {}
    requests = nano_cpu()
    for start in range(0, len(nano_cpu()), NUM_ROWS):
        batch = dict(enumerate(requests[start : start + NUM_ROWS]))
        known = {row: list(ids) for row, (ids, _) in batch.items()}
        choosers = {row: sampler(engine, ids, start + row) for row, ids in known.items()}
        cache = kv_cache.cache_for(engine.model, NUM_ROWS)
        longest = max(map(len, known.values()))
        filled = {row: ids + [0] * (longest - len(ids)) for row, ids in known.items()}
        kv_cache.extend(engine.model, cache, filled)
        for row, ids in known.items():
            # What filled the prompt up is forgotten; its last token is scored with the decodes.
            cache.truncate(row, len(ids) - 1)
        for _ in range(max(max_tokens for _, max_tokens in batch.values())):
            latest = {row: ids[-1:] for row, ids in known.items()}
            scores = kv_cache.extend(engine.model, cache, latest)
            for row, ids in known.items():
                ids.append(choosers[row](scores[row], ids))
        for row, (ids, max_tokens) in batch.items():
            ended[start + row] = known[row][len(ids) : len(ids) + max_tokens]
    return ended


def sampler(engine: Engine, prompt_ids: list[int], seed: int) -> Callable:
    """Make the choose of one request."""
    params = engine.sampling.SamplingParams(temperature=TEMPERATURE, seed=seed)
    return engine.sampling.Sampler(params, len(prompt_ids))
