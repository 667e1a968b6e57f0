"""How many operations a decode step has, and what a graph of it saves.

Run it with `python -m benchmarks.week2.cuda_graphs`. Operations are counted on any machine, in a
model of Qwen3-0.6B's depth and tiny widths, on which their number does not depend. Steps of the
model in its real widths, with random weights, are timed where there is a GPU.
"""

import sys
import time

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen3 import modeling_qwen3 as theirs

from course import layers

# The reference's numbers, whatever the learner has.
sys.path.insert(0, str(layers.SOLUTIONS))

from week1.qwen import Qwen, QwenConfig
from week2 import cuda_graphs, kv_cache, roofline

NUM_STEPS = 50
NUM_COMPUTED = 511
CAPACITY = 1024
BATCH_SIZES = (1, 8)
SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 1e6,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
}
TINY = SHAPE | {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
}


class AskingNobody(nn.Module):
    """transformers' rotation in the place of week 1's Rotary, which asks the device for a value."""

    def __init__(self, shape: dict):
        super().__init__()
        names = ("hidden_size", "num_attention_heads", "head_dim", "max_position_embeddings")
        rope = {"rope_type": "default", "rope_theta": shape["rope_theta"]}
        config = theirs.Qwen3Config(**{n: shape[n] for n in names}, rope_parameters=rope)
        self.rotary = theirs.Qwen3RotaryEmbedding(config)

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate both."""
        cos, sin = self.rotary(q, positions[None])
        q, k = theirs.apply_rotary_pos_emb(q[None], k[None], cos, sin)
        return q[0], k[0]


class Counter(TorchDispatchMode):
    """Counts the operations that compute, which is all but views, and those that ask for a value.

    A question is at the same time the moment in which the host waits for the device.
    """

    def __init__(self):
        super().__init__()
        self.num_computing = 0
        self.num_asking = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.num_asking += torch.Tag.data_dependent_output in operation.tags
        self.num_computing += not operation.is_view
        return operation(*args, **(kwargs or {}))


@torch.no_grad()
def make_model(shape: dict, dtype: torch.dtype, device: str) -> Qwen:
    """Build a model with random weights."""
    with torch.device(device):
        model = Qwen(QwenConfig.from_dict(shape)).to(dtype)
    return model.eval()


def make_step(model: Qwen, num_sequences: int, device: str):
    """Return a decode step, its buffers, and a batch for them."""
    cache = kv_cache.cache_for(model, num_sequences + 1)
    cache.reserve(CAPACITY)
    # Zeros stand for the earlier tokens: what they are changes neither number nor time.
    cache.num_computed_tokens = [NUM_COMPUTED] * num_sequences + [0]
    buffers = cuda_graphs.DecodeBuffers(num_sequences, CAPACITY, cache.capacity, device)
    batch = [cuda_graphs.contiguous_row(cache, row, 7) for row in range(num_sequences)]
    return cuda_graphs.contiguous_step(model, cache), buffers, batch


@torch.no_grad()
def count(own_rotary: bool) -> Counter:
    """Count the operations of one decode step."""
    model = make_model(TINY, torch.float32, "cpu")
    if not own_rotary:
        use_rotary(model, AskingNobody(TINY))
    step, buffers, batch = make_step(model, 1, "cpu")
    buffers.fill(batch, 1)
    with Counter() as counter:
        step(buffers.inputs(1))
    return counter


def use_rotary(model: Qwen, rotary: nn.Module) -> None:
    """Put another rotation into every layer."""
    for layer in model.layers:
        layer.self_attn.rotary = rotary


@torch.no_grad()
def seconds_a_step(runner: cuda_graphs.GraphRunner, batch: list) -> float:
    """Time steps whose results the host waits for, as it does to send a token to a user."""
    for _ in range(3):
        runner(batch)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(NUM_STEPS):
        runner(batch).argmax(-1).tolist()
    return (time.perf_counter() - start) / NUM_STEPS


def measure() -> None:
    """Time steps on the GPU, launched one operation at a time and as a graph."""
    model = make_model(SHAPE, torch.bfloat16, "cuda")
    use_rotary(model, AskingNobody(SHAPE).to("cuda"))
    print(f"\n{'rows':<6} {'eager, ms':>10} {'graph, ms':>10} {'graph, GB/s':>12}")
    for num_rows in BATCH_SIZES:
        step, buffers, batch = make_step(model, num_rows, "cuda")
        sizes = [num_rows]
        eager = cuda_graphs.GraphRunner(step, buffers, sizes, lambda run: run)
        graph = cuda_graphs.GraphRunner(step, buffers, sizes, cuda_graphs.capture_for("cuda"))
        times = [seconds_a_step(runner, batch) for runner in (eager, graph)]
        num_bytes = roofline.step_bytes(model.config, [(NUM_COMPUTED, 1)] * num_rows, 2)
        print(
            f"{num_rows:<6} {times[0] * 1e3:>10.2f} {times[1] * 1e3:>10.2f} "
            f"{num_bytes / times[1] / 1e9:>12.0f}"
        )


def main() -> None:
    """Count, and measure where that is possible."""
    layers_text = f"a decode step of {SHAPE['num_hidden_layers']} layers"
    for own_rotary, name in ((True, "week 1's Rotary"), (False, "a rotation that asks nobody")):
        counter = count(own_rotary)
        print(
            f"{layers_text}, {name}: {counter.num_computing} operations that compute, "
            f"{counter.num_asking} of them ask the device for a value"
        )
    if torch.cuda.is_available():
        measure()
    else:
        print("What a graph saves can only be timed on a GPU, and this machine has none.")


if __name__ == "__main__":
    main()
