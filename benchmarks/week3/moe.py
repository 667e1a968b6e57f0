"""One sparse block of Qwen3-30B-A3B: whom its tokens meet, and all experts in one launch.

`python -m benchmarks.week3.moe` counts on any machine, with a router that prefers nobody; the time
against a loop over the experts is measured on a GPU, by `course bench`.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from course import layers
from course.bench import YOURS, Workload, import_for_gpu
from course.labs import Lab

# (hidden_size, moe_intermediate_size, num_experts): Qwen3-30B-A3B, Qwen3-235B-A22B,
# Qwen3-Coder-480B-A35B, and Qwen1.5-MoE-A2.7B, whose 60 are no power of two.
SHAPES = ((2048, 768, 128), (4096, 1536, 128), (6144, 2560, 160), (2048, 1408, 60))
TOP_K = 8
# 16 rows an expert, on average: every matrix is read, and little is done with it.
NUM_TOKENS = 256
STEPS = (1, 2, 8, 32, 256, 2048)


def kernel_calls(lab: ModuleType) -> Iterator[tuple[str, Callable[[], object]]]:
    """List calls with the experts and dtypes of real models, for `course kernels`."""
    for hidden, width, num_experts in SHAPES:
        offsets = torch.zeros(num_experts + 1, dtype=torch.int64)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for num_tokens in (8, 4096):
                for name, wide, narrow in (("up", hidden, 2 * width), ("down", width, hidden)):
                    x = torch.empty(num_tokens * TOP_K, wide, dtype=dtype)
                    # Nobody reads it, and all of it would be gigabytes.
                    weight = torch.empty(1, narrow, wide, dtype=dtype).expand(num_experts, -1, -1)
                    what = f"{num_experts} experts {name}, {wide} to {narrow}, {str(dtype)[6:]}"
                    call = functools.partial(lab.grouped_gemm, x, weight, offsets)
                    yield f"{what}, {num_tokens} tokens", call


def workload(yours: set[Lab]) -> Workload:
    """Time one sparse block. yours: the labs to take from code/."""
    lab, qwen = import_for_gpu(yours, "week3/moe", "week1/qwen")
    hidden, width, num_experts = SHAPES[0]
    config = qwen.QwenConfig.from_dict(_config(hidden))
    moe = lab.MoEConfig(num_experts, TOP_K, width, True, 1, ())
    with torch.device("cuda"):
        x = torch.randn(NUM_TOKENS, hidden, dtype=torch.bfloat16)
        ours = lab.MoE(config, moe).to(torch.bfloat16)
        theirs = lab.MoE(config, moe, _loop).to(torch.bfloat16)
        for parameter in ours.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    theirs.load_state_dict(ours.state_dict(), assign=True)
    num_weights = 3 * hidden * width
    return Workload(
        sides={YOURS: lambda: _run(ours, x), "a loop over experts": lambda: _run(theirs, x)},
        against="a loop over experts",
        count=NUM_TOKENS,
        unit="tokens of a block",
        flops=2.0 * NUM_TOKENS * TOP_K * num_weights,
        num_bytes=float(num_experts * num_weights * torch.bfloat16.itemsize),
        device="cuda",
        dtype=torch.bfloat16,
    )


def main() -> None:
    """Print how many experts the tokens of a step meet, and what is read for them."""
    sys.path.insert(0, str(layers.SOLUTIONS))
    from week3 import moe as lab

    hidden, width, num_experts = SHAPES[0]
    mb = 3 * hidden * width * torch.bfloat16.itemsize / 1e6
    print(f"a sparse block of Qwen3-30B-A3B in bfloat16: {num_experts} experts of {mb:.1f} MB each")
    print(f"{'tokens':>7} {'experts':>8} {'MB read':>8} {'rows each':>10} {'tiles of 16':>12}")
    torch.manual_seed(0)
    for num_tokens in STEPS:
        _, ids = lab.route(torch.randn(num_tokens, num_experts), TOP_K, True)
        _, offsets = lab.sort_by_expert(ids, num_experts)
        counts = offsets.diff()
        used, tiles = int((counts > 0).sum()), int((-(-counts // 16)).sum())
        rows = num_tokens * TOP_K / used
        print(f"{num_tokens:>7} {used:>8} {used * mb:>8.0f} {rows:>10.1f} {tiles:>12}")


def _config(hidden_size: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 1,
        "hidden_size": hidden_size,
        "intermediate_size": 1,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "max_position_embeddings": 1,
    }


def _loop(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Multiply expert by expert, whoever's lab is measured."""
    parts = x.split(offsets.diff().tolist())
    pairs = zip(parts, weight, strict=True)
    return torch.cat([torch.nn.functional.linear(part, matrix) for part, matrix in pairs])


def _run(block: torch.nn.Module, x: torch.Tensor) -> None:
    with torch.inference_mode():
        block(x)


if __name__ == "__main__":
    main()
