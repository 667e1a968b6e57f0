"""Bytes that week 1's functions move and that the kernels move, and the time that both take.

`python -m benchmarks.week2.fused_kernels` counts on any machine; the time is measured on a GPU, by
`course bench`. The shape is that of one layer of Qwen3-8B.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from course import layers
from course.bench import YOURS, Workload, import_for_gpu
from course.labs import Lab

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 4096, 32, 8, 128, 12_288
EPS, NUM_POSITIONS = 1e-6, 4096
NUM_TIMED, NUM_COUNTED = 8192, 256
# (hidden, heads, kv heads, head_dim, intermediate) of models that people serve.
SHAPES = {
    "SmolLM2-135M": (576, 9, 3, 64, 1536),
    "Qwen2.5-0.5B": (896, 14, 2, 64, 4864),
    "Qwen3-8B": (HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE),
    "Qwen2.5-72B": (8192, 64, 8, 128, 29_568),
    "head_dim 80": (2560, 32, 32, 80, 6912),
    "head_dim 96": (3072, 32, 8, 96, 8192),
}


def kernel_calls(lab: ModuleType) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield (what, call) for `course kernels`: the launches of a layer, by shape and dtype."""
    for name, (hidden, heads, kv_heads, head_dim, intermediate) in SHAPES.items():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            x = torch.empty(64, hidden, dtype=dtype)
            q, k, _ = _projection(64, heads, kv_heads, head_dim, dtype)
            positions, table = torch.empty(64, dtype=torch.int64), torch.empty(1024, head_dim)
            gate, up = torch.empty(64, 2 * intermediate, dtype=dtype).chunk(2, dim=-1)

            def layer(x=x, q=q, k=k, positions=positions, table=table, gate=gate, up=up):
                lab.add_rms_norm(x, None, x[0], EPS)
                lab.add_rms_norm(x, torch.empty_like(x), x[0], EPS)
                lab.add_rms_norm(q, None, table[0], EPS)
                lab.rotate(q, k, positions, table)
                lab.silu_mul(gate, up)
                lab.silu_mul(gate.contiguous(), up.contiguous())

            yield f"{name}, {str(dtype).removeprefix('torch.')}", layer


def workload(yours: set[Lab]) -> Workload:
    """Time the three operations of a layer, one after the other. yours: the labs from code/."""
    lab, mlp, rope = import_for_gpu(yours, "week2/fused_kernels", "week1/mlp", "week1/rope")
    given = _arguments(NUM_TIMED, rope, torch.bfloat16, "cuda")
    ours = [operation for _, operation in _fused(lab, *given)]
    theirs = [operation for _, operation in _eager(mlp, rope, *given)]
    return Workload(
        sides={YOURS: lambda: _run(ours), "eager PyTorch": lambda: _run(theirs)},
        against="eager PyTorch",
        count=NUM_TIMED,
        unit="tokens of a layer",
        flops=0.0,
        num_bytes=float(sum(_least_bytes(NUM_TIMED, torch.bfloat16.itemsize).values())),
        device="cuda",
        dtype=torch.bfloat16,
    )


class Traffic(TorchDispatchMode):
    """Counts what PyTorch's operators read and write; views move nothing.

    num_kernels: the operators that do something. num_bytes: of their arguments and results.
    """

    def __init__(self):
        super().__init__()
        self.num_kernels = self.num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        results = [x for x in _flat(out) if isinstance(x, Tensor)]
        is_view = any(result.alias_info is not None for result in func._schema.returns)
        if results and not is_view:
            given = [x for x in _flat(args) if isinstance(x, Tensor)]
            if func is torch.ops.aten.embedding.default:
                given = [*results, args[1]]  # of the table, only the rows that are looked up
            self.num_kernels += 1
            self.num_bytes += sum(x.nbytes for x in [*given, *results])
        return out


def main() -> None:
    """Count for week 1's functions, and print the count beside the least that can be."""
    sys.path.insert(0, str(layers.SOLUTIONS))
    from week1 import mlp, rope

    given = _arguments(NUM_COUNTED, rope, torch.bfloat16, "cpu")
    least = _least_bytes(NUM_COUNTED, torch.bfloat16.itemsize)
    print("one layer of Qwen3-8B in bfloat16, bytes for each token\n")
    print(f"{'':<14} {'operators':>13} {'their bytes':>12} {'one kernel':>11} {'ratio':>6}")
    for name, operation in _eager(mlp, rope, *given):
        with Traffic() as traffic:
            operation()
        print(
            f"{name:<14} {traffic.num_kernels:>13} {traffic.num_bytes / NUM_COUNTED:>12,.0f} "
            f"{least[name] / NUM_COUNTED:>11,.0f} {traffic.num_bytes / least[name]:>6.2f}"
        )


def _eager(
    mlp: ModuleType, rope: ModuleType, x, residual, weight, q, k, positions, table, gate, up
) -> Sequence[tuple[str, Callable[[], object]]]:
    def norm():
        summed = x + residual
        return mlp.rms_norm(summed, weight, EPS), summed

    rotary = rope.Rotary(HEAD_DIM, 2, 1e6)
    rotary.table = table
    return (
        ("add_rms_norm", norm),
        ("rotate", lambda: rotary(q, k, positions)),
        ("silu_mul", lambda: mlp.silu_mul(gate, up)),
    )


def _fused(
    lab: ModuleType, x, residual, weight, q, k, positions, table, gate, up
) -> Sequence[tuple[str, Callable[[], object]]]:
    return (
        ("add_rms_norm", lambda: lab.add_rms_norm(x, residual, weight, EPS)),
        ("rotate", lambda: lab.rotate(q, k, positions, table)),
        ("silu_mul", lambda: lab.silu_mul(gate, up)),
    )


def _arguments(
    num_tokens: int, rope: ModuleType, dtype: torch.dtype, device: str
) -> tuple[Tensor, ...]:
    made = {"dtype": dtype, "device": device}
    x, residual = torch.randn(2, num_tokens, HIDDEN, **made)
    q, k, _ = _projection(num_tokens, HEADS, KV_HEADS, HEAD_DIM, dtype, device)
    gate, up = torch.randn(2, num_tokens, INTERMEDIATE, **made)
    positions = torch.arange(num_tokens, device=device) % NUM_POSITIONS
    table = rope.rotary_table(HEAD_DIM, NUM_POSITIONS, 1e6, device)
    return x, residual, torch.randn(HIDDEN, **made), q, k, positions, table, gate, up


def _projection(
    num_tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device="cpu"
) -> list[Tensor]:
    """Make q, k and v as views of what one merged projection gives."""
    widths = [count * head_dim for count in (heads, kv_heads, kv_heads)]
    merged = torch.zeros(num_tokens, sum(widths), dtype=dtype, device=device)
    parts = merged.split(widths, dim=-1)
    return [part.unflatten(-1, (-1, head_dim)).transpose(0, 1) for part in parts]


def _least_bytes(num_tokens: int, itemsize: int) -> dict[str, int]:
    """Count every argument read once and every result written once."""
    angles = num_tokens * (HEAD_DIM * torch.float32.itemsize + torch.int64.itemsize)
    return {
        "add_rms_norm": itemsize * (4 * num_tokens * HIDDEN + HIDDEN),
        "rotate": itemsize * 2 * num_tokens * (HEADS + KV_HEADS) * HEAD_DIM + angles,
        "silu_mul": itemsize * 3 * num_tokens * INTERMEDIATE,
    }


def _flat(values: object) -> Iterator[object]:
    if isinstance(values, (list, tuple)):
        for value in values:
            yield from _flat(value)
    else:
        yield values


def _run(operations: Sequence[Callable[[], object]]) -> None:
    for operation in operations:
        operation()


if __name__ == "__main__":
    main()
