"""Weights in 8 and 4 bits: rounded, packed, multiplied with, and put into a model."""

from dataclasses import dataclass
from typing import Literal

import torch
import triton
from torch import Tensor, nn
from torch.nn.functional import linear

from week1.qwen import Qwen

__all__ = [
    "quantize_int8",
    "pack_int4",
    "unpack_int4",
    "quantize_int4",
    "dequantize",
    "relative_error",
    "cross_entropy",
    "int8_matmul",
    "int4_matmul",
    "quantize_model",
]

GROUP_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Int8Weight:
    """A matrix (out_features, in_features) with one byte an entry, and one scale a row.

    Entry (o, i) stands for codes[o, i] * scales[o].
    codes: (out_features, in_features) int8, each in [-127, 127]. scales: (out_features,) float32,
    finite. Both are contiguous.
    """

    codes: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


@dataclass(frozen=True)
class Int4Weight:
    """A matrix (out_features, in_features) with half a byte an entry, in groups along its rows.

    Group g of a row holds its entries g * group_size, g * group_size + 1, …, at most group_size of
    them: the last group of a row has fewer where in_features does not divide. An entry with code c
    in group g of row o stands for (c - zero_points[o, g]) * scales[o, g].
    packed: (out_features, ceil(in_features / 2)) uint8, each row as `pack_int4` makes it.
    scales: (out_features, num_groups) float32, finite. zero_points: (out_features, num_groups)
    uint8, each in [0, 15]. All three are contiguous.
    """

    packed: Tensor
    scales: Tensor
    zero_points: Tensor
    in_features: int
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[0], self.in_features

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales.nbytes + self.zero_points.nbytes


def quantize_int8(weight: Tensor) -> Int8Weight:
    """Round a matrix to 8 bits, each row with a scale of its own.

    weight: (out_features, in_features), any float dtype, magnitudes up to 1e38; left as it was. It
        may require a gradient; nothing of the result does.
    The scale of a row is 1/127 of its largest magnitude, computed in float32, and no entry is
    further from what its code stands for than half of that scale. A row of zeros has codes 0 and
    any finite scale.
    Raises ValueError, which gives the shape, when weight is not a matrix, and when an entry is not
    finite.
    """
    raise NotImplementedError(
        "week2/quantization.py: quantize_int8 is not written yet → sessions/week2/quantization.md"
    )


def pack_int4(codes: Tensor) -> Tensor:
    """Put two codes into each byte.

    codes: (rows, n) uint8, each in [0, 15]; left as they were.
    Returns (rows, ceil(n / 2)) uint8: byte i of a row holds code 2i in its low four bits and code
    2i + 1 in its high four. Where n is odd, the high four bits of the last byte are 0.
    """
    raise NotImplementedError(
        "week2/quantization.py: pack_int4 is not written yet → sessions/week2/quantization.md"
    )


def unpack_int4(packed: Tensor, num_codes: int) -> Tensor:
    """Take the codes out of what `pack_int4` made.

    packed: (rows, ceil(num_codes / 2)) uint8, left as it was.
    Returns (rows, num_codes) uint8.
    """
    raise NotImplementedError(
        "week2/quantization.py: unpack_int4 is not written yet → sessions/week2/quantization.md"
    )


def quantize_int4(weight: Tensor, group_size: int) -> Int4Weight:
    """Round a matrix to 4 bits, each group of a row with a scale and a zero point of its own.

    weight: as in `quantize_int8`. group_size: see `Int4Weight`; one of GROUP_SIZES.
    Plain rounding lets the 16 values that a group's codes stand for reach from its smallest entry,
    or 0 where that is smaller, to its largest one, or 0 where that is larger, and has one of them
    at 0: the scale is 1/15 of that way, computed in float32, and no entry is further from what its
    code stands for than half of the scale. A smaller scale is allowed where it makes the sum of a
    group's squared errors smaller, never larger. A group of zeros stands for zeros, with any finite
    scale.
    Raises ValueError as `quantize_int8` does, and for another group_size, which it gives.
    """
    raise NotImplementedError(
        "week2/quantization.py: quantize_int4 is not written yet → sessions/week2/quantization.md"
    )


def dequantize(weight: Int8Weight | Int4Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the matrix that a quantized weight stands for.

    Returns (out_features, in_features) of the given float dtype, computed in float32 and rounded to
    it once.
    """
    raise NotImplementedError(
        "week2/quantization.py: dequantize is not written yet → sessions/week2/quantization.md"
    )


def relative_error(weight: Tensor, approximation: Tensor) -> float:
    """Return how far a matrix lies from its approximation, as a share of the matrix.

    weight, approximation: of one shape, any float dtype; left as they were.
    Returns the Frobenius norm of their difference, divided by that of weight; computed in float32
    or wider. Raises ValueError, which gives both shapes, when they differ.
    """
    raise NotImplementedError(
        "week2/quantization.py: relative_error is not written yet → sessions/week2/quantization.md"
    )


def cross_entropy(logits: Tensor, token_ids: Tensor) -> float:
    """Return how much a model is surprised by a text, in nats a token.

    logits: (tokens, vocab_size), any float dtype: row t holds the model's scores after the tokens
        up to and including t. token_ids: (tokens,) int64, the text. Both are left as they were.
    Returns the mean of −log p over all tokens but the first, where p is the probability that the
    scores give to the token; computed in float32 or wider.
    Raises ValueError, which gives the number, for fewer than 2 tokens.
    """
    raise NotImplementedError(
        "week2/quantization.py: cross_entropy is not written yet → sessions/week2/quantization.md"
    )


def int8_matmul(x: Tensor, weight: Int8Weight) -> Tensor:
    """Multiply rows with a matrix in 8 bits: x @ dequantize(weight).T, by a Triton kernel.

    x: (rows, in_features), at least 1 row, float16, bfloat16 or float32, any strides; left as it
        was. weight: on x's device.
    Returns (rows, out_features), x's dtype. Sums are float32; an entry of the matrix may be rounded
    to x's dtype first. One launch, and no dequantized matrix in memory.
    Raises ValueError, which names both, when x has another number of columns than the matrix.
    """
    raise NotImplementedError(
        "week2/quantization.py: int8_matmul is not written yet → sessions/week2/quantization.md"
    )


def int4_matmul(x: Tensor, weight: Int4Weight) -> Tensor:
    """Multiply rows with a matrix in 4 bits: x @ dequantize(weight).T, by a Triton kernel.

    Arguments, result and errors as for `int8_matmul`.
    """
    raise NotImplementedError(
        "week2/quantization.py: int4_matmul is not written yet → sessions/week2/quantization.md"
    )


class QuantizedLinear(nn.Module):
    """Stands in the place of a torch.nn.Linear, with a quantized weight.

    weight: kept under this name. bias: (out_features,), or None. Called with x: (..., in_features),
    float16, bfloat16 or float32; returns (..., out_features), x's dtype. It stays on the device of
    its weight: on a GPU the kernels of this file multiply, elsewhere PyTorch's operators.
    """

    def __init__(self, weight: Int8Weight | Int4Weight, bias: Tensor | None = None):
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.multiply_on_cpu = None if weight.scales.is_cuda else CPUProduct(weight)

    @property
    def nbytes(self) -> int:
        """Bytes that the quantized weight takes."""
        return self.weight.nbytes

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self.multiply_on_cpu is not None:
            out = self.multiply_on_cpu(rows).to(x.dtype)
        elif isinstance(self.weight, Int8Weight):
            out = int8_matmul(rows, self.weight)
        else:
            out = int4_matmul(rows, self.weight)
        if self.bias is not None:
            out = out + self.bias
        return out.reshape(*x.shape[:-1], -1)


class CPUProduct:
    """The products of one quantized weight where there is no GPU, in bfloat16.

    Few rows wait for memory, and PyTorch's operators for packed weights read only the codes. Many
    rows wait for arithmetic: there the whole matrix is dequantized first. The operators are quick
    in bfloat16 only, and round the scales to it. Shapes that they do not take are dequantized, too.
    The int4 operator wants the codes in an order of its own: a second copy of them.
    """

    # Beyond so many rows, dequantizing costs less than it saves; about, and on one machine.
    MAX_ROWS_INT8 = 32
    MAX_ROWS_INT4 = 96

    def __init__(self, weight: Int8Weight | Int4Weight):
        self.weight = weight
        self.max_rows = 0
        out_features, in_features = weight.shape
        if isinstance(weight, Int8Weight):
            # For some other widths the operator of torch 2.13 reads where it must not, and crashes.
            if in_features % 32 == 0:
                self.max_rows = self.MAX_ROWS_INT8
                self.scales = weight.scales.bfloat16()
        elif (
            out_features % 16 == 0
            and in_features % weight.group_size == 0
            and weight.group_size > 16
        ):
            self.max_rows = self.MAX_ROWS_INT4
            codes = unpack_int4(weight.packed, in_features).int()
            self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
            # The operator computes (code - 8) * scale + offset.
            offsets = (8 - weight.zero_points.float()) * weight.scales
            both = torch.stack((weight.scales, offsets), dim=-1)
            self.scales = both.transpose(0, 1).contiguous().bfloat16()

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply (rows, in_features) with the matrix; returns (rows, out_features) bfloat16."""
        x = x.bfloat16().contiguous()
        if len(x) > self.max_rows:
            return linear(x, dequantize(self.weight, torch.bfloat16))
        if isinstance(self.weight, Int8Weight):
            return torch.ops.aten._weight_int8pack_mm(x, self.weight.codes, self.scales)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, self.packed, self.weight.group_size, self.scales
        )


def quantize_model(model: Qwen, kind: Literal["int8", "int4"], group_size: int = 32) -> None:
    """Put quantized weights in the place of a model's matrices.

    kind: which of the two. group_size: as in `quantize_int4`; int8 has no use for it.
    Afterwards every torch.nn.Linear in model.layers, at whatever depth and under its name, is a
    `QuantizedLinear` with its bias, if it has one. Everything else stays what it was: the embedding
    and the head, which may share one weight, and the norms.
    Raises ValueError, and leaves the model as it was, for another kind, which it gives, and for a
    group_size that `quantize_int4` refuses.
    """
    raise NotImplementedError(
        "week2/quantization.py: quantize_model is not written yet → sessions/week2/quantization.md"
    )
