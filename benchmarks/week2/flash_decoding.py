"""What splits are worth: the attention of a decode step of Qwen3-8B, in bfloat16.

`python -m benchmarks.week2.flash_decoding` counts on any machine, and measures on a GPU: each side
as a CUDA graph, without the host's time, over as many layers as no cache of the GPU can hold.
"""

import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from course import layers
from course.bench import YOURS, Workload, import_for_gpu, measure_machine
from course.labs import Lab

NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 36, 32, 8, 128
STEPS = ((1, 4096), (1, 8192), (32, 4096), (32, 8192))
NUM_RUNS = 20
# Of an H100 or H200, for the count on a machine that has none.
NUM_PROCESSORS = 132


def kernel_calls(lab: ModuleType) -> Iterator[tuple[str, Callable[[], object]]]:
    """List calls of real shapes whose launches `course kernels` compiles."""
    dtypes = torch.bfloat16, torch.float16, torch.float32
    for dtype, head_dim, group in product(dtypes, (64, 80, 96, 128), (1, 7, 20)):
        cache = torch.empty(2, 3, 2, 1024, head_dim, dtype=dtype)
        q = torch.empty(3, 2 * group, head_dim, dtype=dtype)
        num_tokens = torch.ones(3, dtype=torch.int64)
        what = f"{str(dtype).removeprefix('torch.')}, head_dim {head_dim}, {group} heads a kv head"
        for num_splits in (1, 20):
            arguments = q, *cache, num_tokens, num_splits
            yield (
                f"{what}, {num_splits} splits",
                lambda arguments=arguments: lab.flash_decode(*arguments),
            )


def workload(yours: set[Lab]) -> Workload:
    """Build both sides, for one sequence. yours: the labs to take from code/."""
    (lab,) = import_for_gpu(yours, "week2/flash_decoding")
    num_rows, num_tokens = 1, 8192
    return Workload(
        sides=_sides(lab, num_rows, num_tokens),
        against="SDPA",
        count=1,
        unit="steps",
        flops=4.0 * NUM_LAYERS * num_rows * num_tokens * NUM_HEADS * HEAD_DIM,
        num_bytes=float(_num_layers(num_rows) * _layer_bytes(num_rows, num_tokens)),
        device="cuda",
        dtype=torch.bfloat16,
    )


def main() -> None:
    """Print what each step reads and how it is cut; on a GPU, what that takes."""
    sys.path.insert(0, str(layers.SOLUTIONS))
    from week2 import flash_decoding as lab

    on_gpu = torch.cuda.is_available()
    device = torch.cuda.current_device() if on_gpu else None
    name = torch.cuda.get_device_name(device) if on_gpu else "no GPU; an H200 has"
    processors = (
        torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else NUM_PROCESSORS
    )
    print(f"one layer of Qwen3-8B in bfloat16; {name} {processors} processors")
    print(f"{'rows':>5} {'tokens':>7} {'MB read':>8} {'programs':>9} {'splits':>7}", end="")
    print(f"{'us':>9} {'of copying':>11} {'x SDPA':>7}" if on_gpu else "")
    bandwidth = measure_machine("cuda").bytes_per_second if on_gpu else 0.0
    for num_rows, num_tokens in STEPS:
        num_bytes, programs = _layer_bytes(num_rows, num_tokens), num_rows * NUM_KV_HEADS
        splits = lab.plan_splits(programs, num_tokens, processors)
        print(
            f"{num_rows:>5} {num_tokens:>7} {num_bytes / 1e6:>8.1f} {programs:>9} {splits:>7}",
            end="",
        )
        if on_gpu:
            sides = _sides(lab, num_rows, num_tokens)
            ours, theirs = (_seconds(run) / _num_layers(num_rows) for run in sides.values())
            share = num_bytes / ours / bandwidth
            print(f"{ours * 1e6:>9.1f} {share:>11.0%} {theirs / ours:>7.2f}")
        else:
            print()


def _layer_bytes(num_rows: int, num_tokens: int) -> int:
    """Count the keys and values of one layer."""
    return 2 * num_rows * NUM_KV_HEADS * num_tokens * HEAD_DIM * torch.bfloat16.itemsize


def _num_layers(num_rows: int) -> int:
    return max(1, NUM_LAYERS // num_rows)


def _sides(lab: ModuleType, num_rows: int, num_tokens: int) -> dict[str, Callable[[], None]]:
    """Capture both sides, over the layers of a step."""
    made = {"dtype": torch.bfloat16, "device": "cuda"}
    size = _num_layers(num_rows), 2, num_rows, NUM_KV_HEADS, num_tokens, HEAD_DIM
    caches = torch.randn(size, **made)
    q = torch.randn(num_rows, NUM_HEADS, HEAD_DIM, **made)
    lengths = torch.full((num_rows,), num_tokens, device="cuda")

    def ours(keys: Tensor, values: Tensor) -> Tensor:
        return lab.flash_decode(q, keys, values, lengths)

    def theirs(keys: Tensor, values: Tensor) -> Tensor:
        return scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)

    return {YOURS: _captured(ours, caches), "SDPA": _captured(theirs, caches)}


def _captured(attend: Callable[[Tensor, Tensor], Tensor], caches: Tensor) -> Callable[[], None]:
    attend(*caches[0])  # what happens only once is not captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for cache in caches:
            attend(*cache)
    # The graph knows addresses only: what lies there has to stay.
    return lambda kept=(attend, caches): graph.replay()


def _seconds(run: Callable[[], object]) -> float:
    """Return the seconds of the fastest of a few runs."""
    seconds = []
    for _ in range(NUM_RUNS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    main()
