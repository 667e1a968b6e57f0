"""Guessing ahead as its users meet it: the same answers, whatever else the engine does.

Case 19 of the engine's list, together with prefix caching, preemption and tensor parallelism.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from course import models
from course.engine import Engine, assemble
from course.labs import ROOT, week_labs
from course.paged import PagedParams
from course.running import ServerProcess

NAME = "tiny"
# Five variants; together more than 500.
NUM_REQUESTS = 110
CONTEXT = 64


@pytest.fixture(scope="module")
def model(make_checkpoint) -> str:
    return make_checkpoint(max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def draft(model, tmp_path_factory) -> str:
    """The model with its weights a little wrong, so that some guesses are."""
    folder = tmp_path_factory.mktemp("draft") / "model"
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(8)
    wrong = {
        name: weight + 0.03 * torch.randn(weight.shape, generator=generator)
        for name, weight in weights.items()
    }
    save_file(wrong, folder / "model.safetensors")
    return str(folder)


def engine(model: str, **params: Any) -> Engine:
    folder, tokenizer = Path(model), models.load_tokenizer(model)
    ends = models.eos_token_ids(folder, tokenizer)
    labs = set(week_labs())
    paged = PagedParams(max_num_seqs=8, token_budget=48, block_size=4, **params)
    return assemble(set(), folder, "float32", tokenizer, ends, labs, None, "cpu", paged)


def requests(seed: int, is_drawn: bool) -> list[tuple[list[int], dict[str, Any]]]:
    """Draw prompts, many with a common beginning and with repetitions, and how to go on."""
    rng = random.Random(seed)
    shared, made = rng.choices(range(200), k=24), []
    for number in range(NUM_REQUESTS):
        ids = shared[: rng.choice([0, 8, 16, 24])] + rng.choices(range(200), k=rng.randint(1, 9))
        ids += ids[-rng.randint(1, 8) :] * rng.choice([0, 1, 2])
        params = {
            "temperature": rng.choice([0.0, 0.0, 0.8]) if is_drawn else 0.0,
            "seed": number,
            "max_tokens": rng.randint(1, 24),
            "ignore_eos": rng.random() < 0.5,
            "stop": ("e",) if rng.random() < 0.2 else (),
            "frequency_penalty": rng.choice([0.0, 0.0, 0.4]),
            "min_tokens": rng.choice([0, 1]),
            "logprobs": rng.choice([None, 2]),
        }
        made.append((ids[: CONTEXT - 1], params))
    return made


def answers(assembled: Engine, wanted: list[tuple[list[int], dict[str, Any]]]) -> list[tuple]:
    """Let requests come in while others run; returns (ids, text, finish_reason) of each."""
    from week3.engine import GenerationParams

    inside, rng, left = assembled.paged, random.Random(1), list(enumerate(wanted))
    got: dict[str, list] = {}
    while left or inside.num_unfinished:
        while left and rng.random() < 0.6:
            number, (ids, params) = left.pop(0)
            got[str(number)] = [(), "", None]
            inside.add(str(number), ids, GenerationParams(**params))
        for delta in inside.step():
            answer = got[delta.request_id]
            answer[0] += tuple(choice.token_id for choice in delta.choices)
            answer[1] += delta.text
            answer[2] = delta.finish_reason
    assert inside.blocks.num_free_blocks == inside.blocks.num_blocks
    return [tuple(got[str(number)]) for number in range(len(wanted))]


@pytest.mark.parametrize(
    "how, size", [("ngram", 1), ("ngram", 2), ("draft", 1), ("draft", 2), ("no guesses", 2)]
)
def test_answers_are_those_of_one_process_that_does_not_guess(model, draft, how, size):
    # A draft draws with noise of its own: of what is drawn, only the distribution stays.
    wanted = requests(NUM_REQUESTS, is_drawn=how != "draft")
    expected = answers(engine(model, kv_gb=1.0), wanted)
    guessing = {} if how == "no guesses" else {"speculative": how}
    if how == "draft":
        guessing["draft_model"] = Path(draft)
    # So few blocks that requests lose theirs.
    several = engine(
        model, kv_gb=4e-5 if how != "draft" else 8e-5, tensor_parallel=size, **guessing
    )
    try:
        assert answers(several, wanted) == expected
    finally:
        several.close()
    inside = several.paged
    assert inside.scheduler.num_preemptions > 0
    assert inside.scheduler.num_cached_tokens > 0
    if guessing:
        assert 0 < inside.num_accepted_tokens < inside.num_draft_tokens


@pytest.fixture(scope="module", params=["ngram", "draft"])
def server(request, model, draft) -> Iterator[ServerProcess]:
    words = ["--speculative", request.param]
    words += ["--draft-model", draft] if request.param == "draft" else []
    with ServerProcess(model, NAME, "--kv-gb", "0.002", *words) as running:
        yield running


def test_a_server_that_guesses(server, model):
    assert ["speculative", "reference"] in map(list, pairwise(server.said.split()))
    prompts = ["abcabcabcabc", "Hello", "Ünïcödé 🙂"]
    with ServerProcess(model, NAME, "--kv-gb", "0.002") as plain:
        for prompt in prompts:
            got, expected = (
                each.complete(prompt, max_tokens=30, temperature=0).choices[0].text
                for each in (server, plain)
            )
            assert got == expected, prompt
    chunks = server.complete(prompts[0], max_tokens=30, temperature=0, stream=True)
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert text == server.complete(prompts[0], max_tokens=30, temperature=0).choices[0].text
    counts = [
        server.metric(f"vllm:spec_decode_num_{name}_total")
        for name in ("accepted_tokens", "draft_tokens", "drafts")
    ]
    assert 0 < counts[0] < counts[1] and 0 < counts[2] <= counts[1]
    many = server.complete(prompts[0], max_tokens=12, temperature=1.0, n=3, logprobs=2)
    assert len(many.choices) == 3
    server.wait_until_idle()


@pytest.mark.parametrize(
    "words, sentence",
    [
        (("--speculative", "draft"), "--speculative draft and --draft-model FOLDER go together"),
        (("--draft-model", "MODEL"), "--speculative draft and --draft-model FOLDER go together"),
        (("--speculative", "ngram", "--num-drafts", "0"), "num_drafts must be at least 1, got 0"),
        (("--speculative", "ngram", "--until", "week2"), "ngram needs week 3's engine"),
    ],
    ids=["no draft model", "a draft model for nobody", "none", "until week 2"],
)
def test_what_cannot_be_is_said_in_a_sentence(model, words, sentence):
    words = [model if word == "MODEL" else word for word in words]
    start = [sys.executable, "-m", "course", "chat", "--engine", "solutions", "--model", model]
    done = subprocess.run(
        [*start, "--prompt", "Hi", *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("course: ") and sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_a_draft_of_another_vocabulary_is_refused(model, tmp_path):
    config = {"vocab_size": 300}
    folder = tmp_path / "other"
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    name = "model.embed_tokens.weight"
    weights[name] = torch.cat((weights[name], torch.zeros(300 - len(weights[name]), 32)))
    save_file(weights, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(ValueError, match="vocabulary of 300 tokens, and the model has 258"):
        engine(model, speculative="draft", draft_model=folder)
