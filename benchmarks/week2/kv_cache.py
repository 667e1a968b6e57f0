"""What the cache is worth: text behind a prompt of 256 tokens, with it and without.

All sides run the default model in float32, greedily. Without a cache, every token of the sequence
is computed again for each new one; transformers has a cache of its own.
"""

import torch

from course import models
from course.bench import YOURS, Workload
from course.engine import ALWAYS_ON, assemble
from course.labs import Lab, find_labs

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

        return run

    sides = {YOURS: side(first_week | {lab}), "no cache": side(first_week)}
    theirs = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([PROMPT])
    sides["transformers, its cache"] = lambda: theirs.generate(
        ids, max_new_tokens=NUM_NEW, min_new_tokens=NUM_NEW, do_sample=False, pad_token_id=0
    )
    config = theirs.config
    num_parameters = sum(p.numel() for p in theirs.parameters())
    num_tokens = len(PROMPT) + NUM_NEW - 1
    head_dim = config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    cached = sum(range(len(PROMPT), num_tokens + 1))
    return Workload(
        sides=sides,
        against="no cache",
        count=NUM_NEW,
        unit="tokens",
        flops=2.0 * num_parameters * num_tokens,
        num_bytes=4.0 * (num_parameters * NUM_NEW + per_token * cached),
    )
