"""The default model through the references says what transformers says with the same weights."""

import json
import os
import subprocess
import sys

import pytest

from course import models
from course.labs import ROOT

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "Wasser kocht bei 100 Grad, und",
    "1, 2, 3, 4,",
)
NUM_TOKENS = 64

# transformers generates with its cache. Then one pass of ours over each whole sequence: if the most
# likely token behind every prefix is the one that transformers chose, greedy decoding through ours
# chooses the same 64, one after the other.
SCRIPT = """
import json, sys, torch
from pathlib import Path
from transformers import Qwen2ForCausalLM
from course import models
from week1.gqa import causal_attend
from week1.qwen import load_model
folder, prompts, num_tokens = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
tokenizer = models.load_tokenizer(folder)
theirs = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
ours = load_model(folder)
report = []
with torch.inference_mode():
    for prompt in prompts:
        ids = torch.tensor([tokenizer.encode(prompt)])
        whole = theirs.generate(
            ids, do_sample=False, min_new_tokens=num_tokens, max_new_tokens=num_tokens
        )
        positions = torch.arange(whole.shape[1])
        logits = ours.logits(ours(whole[0], positions, causal_attend))
        expected = theirs(whole).logits[0]
        blocked = [i for i in models.eos_token_ids(folder, tokenizer)]
        logits_without_eos = logits.clone()
        logits_without_eos[:, blocked] = -torch.inf
        chosen = logits_without_eos.argmax(-1)[ids.shape[1] - 1 : -1]
        error = float((logits - expected).norm() / expected.norm())
        report.append([chosen.tolist(), whole[0, ids.shape[1] :].tolist(), error])
print(json.dumps(report))
"""


@pytest.mark.skipif(
    not models.default_model_ready(),
    reason="the default model is not there; `course model fetch` makes it",
)
def test_greedy_text_equals_transformers():
    arguments = [str(models.DEFAULT_MODEL), json.dumps(PROMPTS), str(NUM_TOKENS)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([f"{ROOT}/solutions", str(ROOT)])}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stderr
    for chosen, expected, error in json.loads(result.stdout.splitlines()[-1]):
        assert len(expected) == NUM_TOKENS
        assert chosen == expected
        assert error <= 1e-5
