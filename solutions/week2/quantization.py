"""Weights in 8 and 4 bits: rounded, packed, multiplied with, and put into a model."""

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
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

# Shares of a group's range that its codes may reach over instead of all of it.
_NARROWER = (0.95, 0.9, 0.85, 0.8)

# A step of decoding waits for memory: many small programs keep more loads under way.
_DECODE = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}
_PREFILL = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
# Products of float32 run without tensor cores, and need more registers.
_FLOAT32 = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
# For at most 16 rows, and for more.
_BLOCKS = {
    torch.float32: (_FLOAT32, _FLOAT32),
    torch.float16: (_DECODE, _PREFILL),
    torch.bfloat16: (_DECODE, _PREFILL),
}


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
    wide = _checked_matrix(weight)
    scales = wide.abs().amax(1) / 127
    codes = torch.round(wide / _nonzero(scales)[:, None])
    return Int8Weight(codes.to(torch.int8), scales)


def pack_int4(codes: Tensor) -> Tensor:
    """Put two codes into each byte.

    codes: (rows, n) uint8, each in [0, 15]; left as they were.
    Returns (rows, ceil(n / 2)) uint8: byte i of a row holds code 2i in its low four bits and code
    2i + 1 in its high four. Where n is odd, the high four bits of the last byte are 0.
    """
    padded = nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return padded[:, ::2] | padded[:, 1::2] << 4


def unpack_int4(packed: Tensor, num_codes: int) -> Tensor:
    """Take the codes out of what `pack_int4` made.

    packed: (rows, ceil(num_codes / 2)) uint8, left as it was.
    Returns (rows, num_codes) uint8.
    """
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)[:, :num_codes]


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
    wide = _checked_matrix(weight)
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size must be one of {GROUP_SIZES}, got {group_size}")
    in_features = wide.shape[1]
    # What fills up the last group is 0, which lies in the range of every group.
    padded = nn.functional.pad(wide, (0, -in_features % group_size))
    groups = padded.unflatten(1, (-1, group_size))
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scales, zero_points, codes, errors = _round_groups(groups, low, high)
    # A narrower range cuts off the outermost entries, and all others are rounded less.
    for share in _NARROWER:
        other = _round_groups(groups, share * low, share * high)
        better = other[3] < errors
        scales = torch.where(better, other[0], scales)
        zero_points = torch.where(better, other[1], zero_points)
        codes = torch.where(better[:, :, None], other[2], codes)
        errors = torch.where(better, other[3], errors)
    packed = pack_int4(codes.to(torch.uint8).flatten(1)[:, :in_features])
    return Int4Weight(packed, scales, zero_points.to(torch.uint8), in_features, group_size)


def dequantize(weight: Int8Weight | Int4Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the matrix that a quantized weight stands for.

    Returns (out_features, in_features) of the given float dtype, computed in float32 and rounded to
    it once.
    """
    if isinstance(weight, Int8Weight):
        return (weight.codes * weight.scales[:, None]).to(dtype)
    codes = unpack_int4(weight.packed, weight.in_features)
    group = torch.arange(weight.in_features, device=codes.device) // weight.group_size
    steps = codes - weight.zero_points.float()[:, group]
    return (steps * weight.scales[:, group]).to(dtype)


def relative_error(weight: Tensor, approximation: Tensor) -> float:
    """Return how far a matrix lies from its approximation, as a share of the matrix.

    weight, approximation: of one shape, any float dtype; left as they were.
    Returns the Frobenius norm of their difference, divided by that of weight; computed in float32
    or wider. Raises ValueError, which gives both shapes, when they differ.
    """
    if weight.shape != approximation.shape:
        shapes = f"{tuple(weight.shape)} and {tuple(approximation.shape)}"
        raise ValueError(f"weight and approximation must have one shape, got {shapes}")
    difference = approximation - weight.double()
    return float(difference.norm() / weight.double().norm())


def cross_entropy(logits: Tensor, token_ids: Tensor) -> float:
    """Return how much a model is surprised by a text, in nats a token.

    logits: (tokens, vocab_size), any float dtype: row t holds the model's scores after the tokens
        up to and including t. token_ids: (tokens,) int64, the text. Both are left as they were.
    Returns the mean of −log p over all tokens but the first, where p is the probability that the
    scores give to the token; computed in float32 or wider.
    Raises ValueError, which gives the number, for fewer than 2 tokens.
    """
    if len(token_ids) < 2:
        raise ValueError(f"a text needs at least 2 tokens, got {len(token_ids)}")
    log_probabilities = logits[:-1].double().log_softmax(-1)
    return -float(log_probabilities.gather(1, token_ids[1:, None]).mean())


def int8_matmul(x: Tensor, weight: Int8Weight) -> Tensor:
    """Multiply rows with a matrix in 8 bits: x @ dequantize(weight).T, by a Triton kernel.

    x: (rows, in_features), at least 1 row, float16, bfloat16 or float32, any strides; left as it
        was. weight: on x's device.
    Returns (rows, out_features), x's dtype. Sums are float32; an entry of the matrix may be rounded
    to x's dtype first. One launch, and no dequantized matrix in memory.
    Raises ValueError, which names both, when x has another number of columns than the matrix.
    """
    rows = _checked_rows(x, weight)
    out_features, in_features = weight.shape
    out = x.new_empty(rows, out_features)
    blocks = _blocks(rows, x.dtype)
    grid = triton.cdiv(out_features, blocks["BLOCK_N"]), triton.cdiv(rows, blocks["BLOCK_M"])
    _int8_kernel[grid](
        *(x, weight.codes, weight.scales, out),
        *(rows, out_features, in_features, *x.stride()),
        **blocks,
    )
    return out


def int4_matmul(x: Tensor, weight: Int4Weight) -> Tensor:
    """Multiply rows with a matrix in 4 bits: x @ dequantize(weight).T, by a Triton kernel.

    Arguments, result and errors as for `int8_matmul`.
    """
    rows = _checked_rows(x, weight)
    out_features, in_features = weight.shape
    out = x.new_empty(rows, out_features)
    blocks = _blocks(rows, x.dtype)
    grid = triton.cdiv(out_features, blocks["BLOCK_N"]), triton.cdiv(rows, blocks["BLOCK_M"])
    _int4_kernel[grid](
        *(x, weight.packed, weight.scales, weight.zero_points, out),
        *(rows, out_features, in_features, *x.stride(), weight.group_size),
        **blocks,
    )
    return out


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
    if kind not in ("int8", "int4"):
        raise ValueError(f"kind must be int8 or int4, got {kind!r}")
    for parent in list(model.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                weight = child.weight
                quantized = (
                    quantize_int8(weight) if kind == "int8" else quantize_int4(weight, group_size)
                )
                setattr(parent, name, QuantizedLinear(quantized, child.bias))


@triton.jit
def _int8_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    out_ptr,
    rows,
    out_features,
    in_features,
    stride_row,
    stride_in,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Programs of one column of the grid share their rows of the matrix, which then stay in cache.
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, in_features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(
            x_ptr + m * stride_row + k * stride_in, (m < rows) & (k < in_features), other=0.0
        )
        # Beyond the last column x is 0, and any code will do.
        codes = tl.load(codes_ptr + n * in_features + k, (n < out_features) & (k < in_features))
        # Every code is exact in x's dtype, so the scale can wait until the sums are there.
        sums = tl.dot(x, tl.trans(codes.to(x.dtype)), sums, input_precision="ieee")
    n = tl.trans(n)
    scales = tl.load(scales_ptr + n, n < out_features)
    tl.store(
        out_ptr + m * out_features + n,
        (sums * scales).to(out_ptr.dtype.element_ty),
        (m < rows) & (n < out_features),
    )


@triton.jit
def _int4_kernel(
    x_ptr,
    packed_ptr,
    scales_ptr,
    zero_points_ptr,
    out_ptr,
    rows,
    out_features,
    in_features,
    stride_row,
    stride_in,
    GROUP_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Either several whole groups, or a part of one.
    GROUPS: tl.constexpr = max(1, BLOCK_K // GROUP_SIZE)
    num_bytes = (in_features + 1) // 2
    num_groups = (in_features + GROUP_SIZE - 1) // GROUP_SIZE
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, in_features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(
            x_ptr + m * stride_row + k * stride_in, (m < rows) & (k < in_features), other=0.0
        )
        byte = start // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
        pairs = tl.load(packed_ptr + n * num_bytes + byte, (n < out_features) & (byte < num_bytes))
        codes = tl.interleave(pairs & 15, pairs >> 4).to(tl.float32)
        group = start // GROUP_SIZE + tl.arange(0, GROUPS)[None, :]
        in_range = (n < out_features) & (group < num_groups)
        scales = tl.load(scales_ptr + n * num_groups + group, in_range, other=0.0)
        zeros = tl.load(zero_points_ptr + n * num_groups + group, in_range)
        steps = codes.reshape(BLOCK_N, GROUPS, BLOCK_K // GROUPS) - zeros.to(tl.float32)[:, :, None]
        weight = (steps * scales[:, :, None]).reshape(BLOCK_N, BLOCK_K).to(x.dtype)
        sums = tl.dot(x, tl.trans(weight), sums, input_precision="ieee")
    n = tl.trans(n)
    tl.store(
        out_ptr + m * out_features + n,
        sums.to(out_ptr.dtype.element_ty),
        (m < rows) & (n < out_features),
    )


def _blocks(rows: int, dtype: torch.dtype) -> dict[str, int]:
    return _BLOCKS[dtype][rows > 16]


def _checked_matrix(weight: Tensor) -> Tensor:
    """Return a matrix in float32; ValueError where it is none, or not finite."""
    if weight.dim() != 2:
        raise ValueError(f"weight must be (out_features, in_features), got {tuple(weight.shape)}")
    wide = weight.detach().float().contiguous()
    if not bool(wide.isfinite().all()):
        raise ValueError(f"weight {tuple(weight.shape)} holds an entry that is not finite")
    return wide


def _round_groups(
    groups: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Round (rows, num_groups, group_size) to 16 values between low and high, both of each group.

    Returns scales, zero points, codes, and the sum of the squared errors of each group.
    """
    scales = (high - low) / 15
    steps = _nonzero(scales)
    zero_points = torch.round(-low / steps)
    codes = torch.round(groups / steps[:, :, None]) + zero_points[:, :, None]
    codes = codes.clamp(0, 15)
    errors = (codes - zero_points[:, :, None]) * steps[:, :, None] - groups
    return scales, zero_points, codes, errors.square().sum(2)


def _nonzero(scales: Tensor) -> Tensor:
    """Return scales to divide by: what consists of zeros has scale 0, and keeps it."""
    return torch.where(scales == 0, 1.0, scales)


def _checked_rows(x: Tensor, weight: Int8Weight | Int4Weight) -> int:
    if x.shape[1] != weight.shape[1]:
        raise ValueError(f"x has {x.shape[1]} columns, the matrix {weight.shape[1]}")
    return x.shape[0]
