"""What the cache is worth: text behind a prompt of 256 tokens, with it and without.

All sides run the default model in float32, greedily. Without a cache, every token of the sequence
is computed again for each new one; transformers has a cache of its own.
"""

import torch

from course import models
from course.bench import YOURS, Workload
from course.engine import ALWAYS_ON, assemble
from course.labs import Lab, find_labs
from course.paged import kv_bytes_per_token

# Ordinary ids of the vocabulary; what they say does not matter for the time.
PROMPT = list(range(100, 356))
NUM_NEW = 16


def workload(yours: set[Lab]) -> Workload:
    """Build the three sides. yours: the labs to take from code/; the rest is the reference."""
    from transformers import Qwen2ForCausalLM

    folder = models.resolve_model(None)
    tokenizer = models.load_tokenizer(folder)
    (lab,) = find_labs("week2/kv_cache")
    first_week = {other for other in yours if other.week == ALWAYS_ON}

    def side(labs: set[Lab]):
        # No token ends it, so that every side makes the same number.
        engine = assemble(labs, folder, "float32", tokenizer, frozenset())

        def run():
            # One token of another text first: what an earlier run left in the cache is no use.
            engine.next_logits([0])
            engine.complete(PROMPT, {"temperature": 0.0}, NUM_NEW)

        return run, engine.model.config

    (with_cache, config), (without, _) = side(first_week | {lab}), side(first_week)
    sides = {YOURS: with_cache, "no cache": without}
    theirs = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([PROMPT])
    sides["transformers, its cache"] = lambda: theirs.generate(
        ids, max_new_tokens=NUM_NEW, min_new_tokens=NUM_NEW, do_sample=False, pad_token_id=0
    )
    num_parameters = sum(p.numel() for p in theirs.parameters())
    num_tokens = len(PROMPT) + NUM_NEW - 1
    cached = sum(range(len(PROMPT), num_tokens + 1))
    return Workload(
        sides=sides,
        against="no cache",
        count=NUM_NEW,
        unit="tokens",
        flops=2.0 * num_parameters * num_tokens,
        num_bytes=4.0 * num_parameters * NUM_NEW + kv_bytes_per_token(config, 4) * cached,
    )
