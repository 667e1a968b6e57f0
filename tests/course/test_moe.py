"""A model with experts through the whole engine: loaded, answered with, counted, and refused."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from course import tiny
from course.running import ServerProcess
from course.speed import idle_expert_bytes

MOE = "code/week3/moe.py"
LINE = re.compile(r'moe:expert_tokens_total\{expert="(\d+)",layer="(\d+)",model_name="tiny"\} (.*)')


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return tiny.make_moe_checkpoint(tmp_path_factory.mktemp("moe"))


def generate(tree, model, *words):
    result = tree.run(
        *("course", "generate", "--model", model, "--prompt", "Hello", "--max-tokens", "12"),
        *("--json", *words),
    )
    line = result.stdout.strip().splitlines()[-1]
    return result, json.loads(line) if line.startswith("{") else None


def greedy_by_transformers(model: str, prompt_ids: list[int], count: int) -> list[int]:
    theirs = Qwen3MoeForCausalLM.from_pretrained(model, experts_implementation="eager")
    ids = torch.tensor([prompt_ids])
    for _ in range(count):
        with torch.no_grad():
            best = theirs(ids).logits[0, -1].argmax()
        ids = torch.cat((ids, best.view(1, 1)), 1)
    return ids[0, len(prompt_ids) :].tolist()


def test_a_model_with_experts_says_what_transformers_says(tree, model):
    _, plain = generate(tree, model)
    tokenizer = json.loads(Path(model, "tokenizer.json").read_text(encoding="utf-8"))
    alphabet = tokenizer["model"]["vocab"]
    ids = greedy_by_transformers(model, [alphabet[letter] for letter in "Hello"], 12)
    assert plain["token_ids"] == ids[: len(plain["token_ids"])] and len(plain["token_ids"]) > 3
    assert plain["labs"]["week3/moe"] == "reference" and plain["labs"]["week3/engine"] == "off"
    for words in (("--engine", "solutions", "--until", "week2"), ("--engine", "solutions")):
        _, other = generate(tree, model, *words)
        assert other["token_ids"] == plain["token_ids"]
        assert other["labs"]["week3/moe"] == "reference"
    assert other["labs"]["week3/engine"] == "reference"


def test_a_green_lab_takes_the_place_of_the_reference(tree, model):
    tree.write("progress/reference.txt", "week1\nweek2\nweek3/paged_attention\n")
    _, before = generate(tree, model)
    assert before["labs"]["week3/moe"] == "reference"
    tree.solve("week3/moe")
    tree.write(MOE, tree.read(MOE) + "\n# mine\n")
    _, after = generate(tree, model)
    assert after["labs"]["week3/moe"] == "yours"
    assert after["token_ids"] == before["token_ids"]
    chat = tree.run("course", "chat", "--model", model, "--prompt", "Hi", "--max-tokens", "3")
    assert re.search(r"moe +yours", chat.stdout), chat.stdout


def test_a_dense_model_is_not_loaded_by_it(tree, make_checkpoint):
    _, report = generate(tree, make_checkpoint(), "--engine", "solutions")
    assert report["labs"]["week3/moe"] == "off"


def test_speed_counts_the_experts_that_a_token_gets(tree, model):
    words = ("course", "chat", "--model", model, "--prompt", "Hi", "--max-tokens", "5")
    chat = tree.run(*words, "--show-speed", "--engine", "solutions")
    assert chat.stdout.count("tokens/s, which read") == 2, chat.stdout


def test_idle_experts_are_not_counted():
    block = SimpleNamespace(
        tokens_per_expert=torch.zeros(8),
        moe=SimpleNamespace(num_experts=8, num_experts_per_tok=2),
        gate_up_proj=torch.zeros(8, 6, 4),
        down_proj=torch.zeros(8, 4, 3),
    )
    layers = [SimpleNamespace(mlp=block), SimpleNamespace(mlp=torch.nn.Linear(4, 4))]
    model = SimpleNamespace(layers=layers)
    assert idle_expert_bytes(model) == 6 * (6 * 4 + 4 * 3) * 4
    assert idle_expert_bytes(SimpleNamespace(layers=layers[1:])) == 0


def test_quantizing_experts_is_refused_in_one_line(tree, model):
    words = ("--engine", "solutions", "--quantization", "int8")
    result, _ = generate(tree, model, *words)
    assert result.returncode == 2
    (line,) = result.stdout.strip().splitlines()
    assert "--quantization int8" in line and "experts" in line


def load_of(server: ServerProcess) -> dict[tuple[int, int], float]:
    lines = map(LINE.fullmatch, server.http.get("/metrics").text.splitlines())
    return {(int(m[2]), int(m[1])): float(m[3]) for m in lines if m}


def test_the_load_of_experts_is_among_the_metrics(model):
    words = ("--kv-gb", "0.002", "--no-prefix-caching")
    with ServerProcess(model, "tiny", *words) as server:
        assert re.search(r"moe +reference", server.said)
        assert load_of(server) == {(1, expert): 0.0 for expert in range(6)}
        extra = {"ignore_eos": True}
        server.complete([72, 101, 108], max_tokens=7, temperature=0, extra_body=extra)
        load = load_of(server)
        # Three tokens of the prompt and six of the answer; nobody has computed its last one.
        assert sum(load.values()) == 2 * (3 + 6) and max(load.values()) <= 9
        server.complete([72, 101, 108], max_tokens=7, temperature=0, extra_body=extra)
        assert load_of(server) == {place: 2 * count for place, count in load.items()}
