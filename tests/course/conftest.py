"""Temporary copies of the repository, in which real commands run as a learner would run them."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from course import stubs
from course.labs import ROOT, all_labs, find_labs

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "eos_token_id": 257,
}
TEMPLATE = "{% for m in messages %}<|start|>{{ m.content }}{% endfor %}"
COPIED = ("conftest.py", "pyproject.toml", "requirements.txt", "course", "solutions", "tests")


class Tree:
    """A copy of the repository with pristine stubs."""

    def __init__(self, root: Path):
        self.root = root
        root.mkdir()
        ignore = shutil.ignore_patterns("__pycache__")
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, root / name, ignore=ignore)
            else:
                shutil.copyfile(source, root / name)
        record = {}
        for lab in all_labs():
            text = stubs.make_stub(lab)
            self.write(lab.path, text)
            record[lab.name] = stubs.digest_of(text)
        self.write("code/.stubs.json", json.dumps(record))

    def write(self, path: str, text: str) -> None:
        """Write a file of the copy."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")

    def read(self, path: str) -> str:
        """Read a file of the copy."""
        return (self.root / path).read_text(encoding="utf-8")

    def solve(self, *names: str) -> None:
        """Put the reference in the place of the learner's files."""
        for lab in [lab for name in names for lab in find_labs(name)]:
            shutil.copyfile(self.root / f"solutions/{lab.name}.py", self.root / lab.path)

    def run(self, *words: str, cwd: str = ".", **environment: str) -> subprocess.CompletedProcess:
        """Run `python -m WORDS` in the copy; its output is text, both streams in stdout."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("COURSE_", "PYTEST_"))}
        kept.pop("PYTHONPATH", None)
        kept |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **environment}
        return subprocess.run(
            [sys.executable, "-m", *words],
            cwd=self.root / cwd,
            env=kept,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            timeout=300,
        )

    def pytest(self, *args: str, cwd: str = ".", **environment: str):
        """Run pytest in the copy, without a cache."""
        return self.run("pytest", "-p", "no:cacheprovider", *args, cwd=cwd, **environment)

    def grades(self, *args: str) -> dict[str, dict]:
        """Run pytest in the copy and return the outcome of every lab."""
        target = self.root / "grades.json"
        result = self.pytest(*args, "--grade-json", str(target))
        assert target.is_file(), result.stdout
        return json.loads(target.read_text(encoding="utf-8"))


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A fresh copy of the repository with pristine stubs."""
    return Tree(tmp_path / "tree")


def random_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden, inner, kv = 32, 48, 16

    def random(*shape):
        return torch.randn(*shape, generator=generator) * 0.3

    weights = {
        "model.embed_tokens.weight": random(258, hidden),
        "model.norm.weight": random(hidden),
    }
    for i in range(CONFIG["num_hidden_layers"]):
        layer = {
            "input_layernorm.weight": random(hidden) + 1,
            "post_attention_layernorm.weight": random(hidden) + 1,
            "self_attn.q_proj.weight": random(hidden, hidden),
            "self_attn.q_proj.bias": random(hidden),
            "self_attn.k_proj.weight": random(kv, hidden),
            "self_attn.k_proj.bias": random(kv),
            "self_attn.v_proj.weight": random(kv, hidden),
            "self_attn.v_proj.bias": random(kv),
            "self_attn.o_proj.weight": random(hidden, hidden),
            "mlp.gate_proj.weight": random(inner, hidden),
            "mlp.up_proj.weight": random(inner, hidden),
            "mlp.down_proj.weight": random(hidden, inner),
        }
        weights |= {f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()}
    return weights


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory) -> Callable[..., str]:
    """A function that makes a tiny random Qwen2 checkpoint with a byte-level tokenizer.

    It takes what differs from CONFIG, and returns the folder.
    """
    return lambda **changes: checkpoint(tmp_path_factory.mktemp("model"), CONFIG | changes)


def checkpoint(folder: Path, config: dict) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    save_file(random_weights(), folder / "model.safetensors")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|start|>", "<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "eos_token": "<|end|>",
        "chat_template": TEMPLATE,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)
