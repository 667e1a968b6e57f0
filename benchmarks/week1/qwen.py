"""The week's medal: text from the learner's model, the reference's, and that of transformers.

All three run the default model in float32, greedily, and compute every token of the sequence again
for each new one, which is what week 1 does.
"""

import torch

from course import models
from course.bench import YOURS, Workload
from course.engine import ALWAYS_ON, assemble
from course.labs import Lab

# Ordinary ids of the vocabulary; what they say does not matter for the time.
PROMPT = list(range(100, 164))
NUM_NEW = 8


def workload(yours: set[Lab]) -> Workload:
    """Build the three sides. yours: the labs to take from code/; the rest is the reference."""
    from transformers import Qwen2ForCausalLM

    folder = models.resolve_model(None)
    tokenizer = models.load_tokenizer(folder)
    sides = {}
    first_week = {lab for lab in yours if lab.week == ALWAYS_ON}
    for name, labs in ((YOURS, first_week), ("the reference", set())):
        # No token ends it, so that every side makes the same number.
        engine = assemble(labs, folder, "float32", tokenizer, frozenset())
        sides[name] = lambda engine=engine: engine.complete(PROMPT, {"temperature": 0.0}, NUM_NEW)
    theirs = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([PROMPT])
    sides["transformers, no cache"] = lambda: theirs.generate(
        ids,
        max_new_tokens=NUM_NEW,
        min_new_tokens=NUM_NEW,
        do_sample=False,
        use_cache=False,
        pad_token_id=0,
    )
    num_parameters = sum(p.numel() for p in theirs.parameters())
    lengths = range(len(PROMPT), len(PROMPT) + NUM_NEW)
    return Workload(
        sides=sides,
        against="the reference",
        count=NUM_NEW,
        unit="tokens",
        flops=2.0 * num_parameters * sum(lengths),
        num_bytes=4.0 * num_parameters * NUM_NEW,
    )
