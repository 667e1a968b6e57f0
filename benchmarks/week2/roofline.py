"""Your machine's roofline, and how near real steps come: `python -m benchmarks.week2.roofline`.

Steps of the default model run in float32 with random weights, since no number in them changes the
time. What the machine does at best is measured in the same run. Writes roofline.svg here.
"""

import sys
import time

import torch

from course import layers

# The reference's numbers, whatever the learner has.
sys.path.insert(0, str(layers.SOLUTIONS))

import matplotlib
from matplotlib import pyplot

from course import bench, figures
from week1.qwen import Qwen, QwenConfig
from week2 import kv_cache, roofline

NUM_RUNS = 5
NUM_COMPUTED = 511
STEPS = {
    "1 new token": [(NUM_COMPUTED, 1)],
    "8 new tokens": [(NUM_COMPUTED, 1)] * 8,
    "32 new tokens": [(NUM_COMPUTED, 1)] * 32,
    "prompt of 512": [(0, 512)],
}
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def measure(model: Qwen, batch: list[tuple[int, int]]) -> float:
    """Run a step a few times; returns the seconds of the fastest run."""
    cache = kv_cache.cache_for(model, num_rows=len(batch))
    cache.reserve(max(computed + new for computed, new in batch))
    tokens = {row: [7] * new for row, (_, new) in enumerate(batch)}
    seconds = []
    for _ in range(NUM_RUNS + 1):  # the first run makes what later ones find made
        # Zeros stand for the earlier tokens: what they are does not change the time either.
        cache.num_computed_tokens = [computed for computed, _ in batch]
        start = time.perf_counter()
        kv_cache.extend(model, cache, tokens)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def main() -> None:
    """Measure, print a table, and draw."""
    config = QwenConfig.from_dict(SHAPE)
    model = Qwen(config).eval()
    machine = bench.measure_machine()
    hardware = roofline.Hardware(machine.flops, machine.bytes_per_second)
    itemsize = torch.float32.itemsize
    print(
        f"this machine: {machine.flops / 1e9:.0f} GFLOP/s, "
        f"{machine.bytes_per_second / 1e9:.1f} GB/s copied, in float32"
    )
    print(
        f"{'step':<15} {'FLOPs/byte':>10} {'bound, ms':>10} {'measured':>10} {'of the bound':>13}"
    )
    intensities, reached = {}, []
    for name, batch in STEPS.items():
        bound = roofline.step_seconds(config, batch, itemsize, hardware)
        seconds = measure(model, batch)
        intensities[name] = roofline.arithmetic_intensity(config, batch, itemsize)
        reached.append(roofline.step_flops(config, batch) / seconds)
        print(
            f"{name:<15} {intensities[name]:>10.1f} {bound * 1e3:>10.1f} {seconds * 1e3:>10.1f} "
            f"{bound / seconds:>13.0%}"
        )
    draw(hardware, intensities, reached)
    print("roofline.svg: the line, what steps reach at best (dots), what they reached (crosses)")


def draw(hardware: roofline.Hardware, intensities: dict[str, float], reached: list[float]) -> None:
    """Write the machine's roofline with what was measured."""
    matplotlib.use("svg")
    figure, ax = pyplot.subplots(figsize=(6, 4.2), layout="constrained")
    figures.draw_roof(ax, hardware, intensities, figures.COLOURS[0])
    ax.scatter(list(intensities.values()), reached, marker="x", color=figures.COLOURS[1], s=60)
    for name, intensity in intensities.items():
        ax.text(intensity, min(reached) / 7, name, ha="center", va="bottom", rotation=90)
    ax.set(ylim=(min(reached) / 8, 2 * hardware.flops))
    ax.set_ylabel("floating-point operations a second")
    figure.savefig("roofline.svg")


if __name__ == "__main__":
    main()
