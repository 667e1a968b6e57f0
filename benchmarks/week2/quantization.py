"""What quantized weights cost and are worth.

`python -m benchmarks.week2.quantization` prints the error of the default model in 8 and 4 bits: of
its matrices, and on a fixed text. `course bench week2/quantization` times the linear layers of a
decode step against bfloat16, and `course kernels week2/quantization` compiles what `kernel_calls`
lists.
"""

import statistics
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import nn

from course import grading, layers, models
from course.bench import YOURS, Workload
from course.engine import ALWAYS_ON, assemble
from course.labs import ROOT, Lab, find_labs

# The beginning of "A Scandal in Bohemia" by Arthur Conan Doyle, 1891.
TEXT = ROOT / "benchmarks" / "texts" / "scandal_in_bohemia.txt"
VARIANTS = (("int8", 0), ("int4", 16), ("int4", 32), ("int4", 64), ("int4", 128))
# (in_features, out_features) of the matrices in a layer of Qwen3-8B, from its config.json: q, k, v,
# o, gate, up, down.
SHAPES = (
    *((4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096)),
    *((4096, 12288), (4096, 12288), (12288, 4096)),
)
NUM_LAYERS = 8
GROUP_SIZE = 32


def kernel_calls(lab: ModuleType) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield what `course kernels` compiles: one request, a batch, and a prompt, of Qwen3-8B."""
    columns, features = SHAPES[-1]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        # The kernels take one shape of block for all rows of float32.
        for rows in (1, 16) if dtype == torch.float32 else (1, 16, 256):
            x = torch.empty(rows, columns, dtype=dtype)
            codes = torch.empty(features, columns, dtype=torch.int8)
            weight = lab.Int8Weight(codes, torch.empty(features))
            what = f"{str(dtype).removeprefix('torch.')}, {rows} rows"
            yield f"int8, {what}", lambda x=x, weight=weight: lab.int8_matmul(x, weight)
            for size in (32, 128, 256):
                weight = lab.Int4Weight(
                    torch.empty(features, columns // 2, dtype=torch.uint8),
                    torch.empty(features, columns // size),
                    torch.empty(features, columns // size, dtype=torch.uint8),
                    in_features=columns,
                    group_size=size,
                )
                text = f"int4 in groups of {size}, {what}"
                yield text, lambda x=x, weight=weight: lab.int4_matmul(x, weight)


def workload(yours: set[Lab]) -> Workload:
    """Build the linear layers of one decode step. yours: the labs to take from code/.

    On a GPU they have the shapes of eight layers of Qwen3-8B, elsewhere they are the default
    model's.
    """
    quantizing = find_labs("week2/quantization")
    labs = {lab for lab in yours if lab.week == ALWAYS_ON or lab in quantizing}
    folder = models.resolve_model(None)
    tokenizer = models.load_tokenizer(folder)
    parts = (labs, folder, "bfloat16", tokenizer, frozenset())
    engine = assemble(*parts, switched_on=quantizing, quantization="int4")
    if torch.cuda.is_available():
        lab = grading.import_lab(*quantizing)
        options = {"bias": False, "device": "cuda", "dtype": torch.bfloat16}
        plain = [nn.Linear(*shape, **options) for shape in SHAPES * NUM_LAYERS]
        yours_too = [
            lab.QuantizedLinear(lab.quantize_int4(module.weight.detach(), GROUP_SIZE))
            for module in plain
        ]
    else:
        plain = [m for m in assemble(*parts).model.layers.modules() if isinstance(m, nn.Linear)]
        yours_too = [m for m in engine.model.layers.modules() if hasattr(m, "nbytes")]
    inputs = [torch.randn(1, m.in_features).to(m.weight) for m in plain]

    @torch.inference_mode()
    def run(modules):
        for module, x in zip(modules, inputs, strict=True):
            module(x)

    return Workload(
        sides={YOURS: lambda: run(yours_too), "bfloat16": lambda: run(plain)},
        against="bfloat16",
        count=1,
        unit="steps",
        flops=2.0 * sum(module.weight.numel() for module in plain),
        num_bytes=float(sum(module.nbytes for module in yours_too)),
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype=torch.bfloat16,
    )


def main() -> None:
    """Print, for each way to round, its size and both kinds of error."""
    # The reference's numbers, whatever the learner has.
    sys.path.insert(0, str(layers.SOLUTIONS))
    from week1.gqa import causal_attend
    from week1.qwen import load_model
    from week2 import quantization as lab

    folder = models.resolve_model(None)
    ids = torch.tensor(models.load_tokenizer(folder).encode(TEXT.read_text(encoding="utf-8")))

    @torch.inference_mode()
    def surprise(model) -> float:
        hidden = model(ids, torch.arange(len(ids)), causal_attend)
        return lab.cross_entropy(model.logits(hidden), ids)

    exact = load_model(folder)
    matrices = [m.weight for m in exact.layers.modules() if isinstance(m, nn.Linear)]
    before = surprise(exact)
    print(f"{TEXT.name}: {len(ids)} tokens, cross-entropy {before:.4f} in float32")
    print(
        f"{'':<14} {'bits a weight':>13} {'relative error':>15} {'cross-entropy':>14} {'more':>8}"
    )
    for kind, group_size in VARIANTS:
        model = load_model(folder)
        lab.quantize_model(model, kind, group_size or GROUP_SIZE)
        weights = [m.weight for m in model.modules() if isinstance(m, lab.QuantizedLinear)]
        bits = 8 * sum(w.nbytes for w in weights) / sum(m.numel() for m in matrices)
        errors = (
            lab.relative_error(matrix, lab.dequantize(weight))
            for matrix, weight in zip(matrices, weights, strict=True)
        )
        error, after = statistics.median(errors), surprise(model)
        name = f"{kind}, g{group_size}" if group_size else kind
        more = after / before - 1
        print(f"{name:<14} {bits:>13.2f} {error:>15.2%} {after:>14.4f} {more:>+8.2%}")


if __name__ == "__main__":
    main()
