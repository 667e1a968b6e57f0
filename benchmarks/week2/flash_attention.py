"""What the kernel is worth: a causal prompt of 8,192 tokens, heads of Qwen3-8B, in bfloat16.

Against PyTorch's flash attention, whose keys and values are repeated beforehand: that is not timed.
"""

from collections.abc import Callable, Iterator
from itertools import product
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from course.bench import YOURS, Workload, import_for_gpu
from course.labs import Lab

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, NUM_TOKENS = 32, 8, 128, 8192


def kernel_calls(lab: ModuleType) -> Iterator[tuple[str, Callable[[], object]]]:
    """List calls of real shapes whose launches `course kernels` compiles."""
    dtypes, num_tokens = (torch.bfloat16, torch.float16, torch.float32), 1024
    for dtype, head_dim in product(dtypes, (64, 80, 96, 128)):
        q = torch.empty(num_tokens, 4, head_dim, dtype=dtype).transpose(0, 1)
        k, v = torch.empty(2, 2, 2 * num_tokens, head_dim, dtype=dtype)
        ends = torch.arange(2, dtype=torch.int32)
        arguments = q, k, v, ends * num_tokens, ends * 2 * num_tokens, num_tokens
        what = f"{str(dtype).removeprefix('torch.')}, head_dim {head_dim}"
        yield what, lambda arguments=arguments: lab.flash_attention(*arguments)


def workload(yours: set[Lab]) -> Workload:
    """Build both sides. yours: the labs to take from code/; the rest is the reference."""
    (lab,) = import_for_gpu(yours, "week2/flash_attention")
    q, k, v = (_random(heads) for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS))
    ends = torch.tensor([0, NUM_TOKENS], dtype=torch.int32, device="cuda")
    group = NUM_HEADS // NUM_KV_HEADS
    theirs = [x[None] for x in (q, k.repeat_interleave(group, 0), v.repeat_interleave(group, 0))]

    def run_theirs() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(*theirs, is_causal=True)

    num_pairs = NUM_TOKENS * (NUM_TOKENS + 1) // 2
    return Workload(
        sides={
            YOURS: lambda: lab.flash_attention(q, k, v, ends, ends, NUM_TOKENS),
            "SDPA, flash attention": run_theirs,
        },
        against="SDPA, flash attention",
        count=NUM_TOKENS,
        unit="tokens",
        # Each pair is multiplied and added over head_dim twice: with the key, and with the value.
        flops=4.0 * num_pairs * NUM_HEADS * HEAD_DIM,
        # q and out, k and v.
        num_bytes=2.0 * NUM_TOKENS * HEAD_DIM * (2 * NUM_HEADS + 2 * NUM_KV_HEADS),
        device="cuda",
        dtype=torch.bfloat16,
    )


def _random(num_heads: int) -> Tensor:
    """Draw what the projections of a model give: all heads of a token side by side."""
    x = torch.randn(NUM_TOKENS, num_heads, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    return x.transpose(0, 1)
