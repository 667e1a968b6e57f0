"""Week2/quantization another way: floors, whole-number arithmetic, and halves that never meet.

The 4-bit kernel multiplies even and odd columns apart; the 8-bit kernel adds products up row by
row, without `tl.dot`.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

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


@dataclass(frozen=True)
class Int8Weight:
    """A matrix in 8 bits."""

    codes: Tensor
    scales: Tensor

    @property
    def shape(self):
        return tuple(self.codes.shape)

    @property
    def nbytes(self):
        return self.codes.nbytes + self.scales.nbytes


@dataclass(frozen=True)
class Int4Weight:
    """A matrix in 4 bits."""

    packed: Tensor
    scales: Tensor
    zero_points: Tensor
    in_features: int
    group_size: int

    @property
    def shape(self):
        return len(self.packed), self.in_features

    @property
    def nbytes(self):
        return self.packed.nbytes + self.scales.nbytes + self.zero_points.nbytes


def quantize_int8(weight):
    """Round half up, and give a row of zeros the scale 1."""
    _check(weight)
    weight = weight.detach().to(torch.float32)
    low, high = weight.aminmax(dim=1)
    scales = torch.maximum(-low, high) / 127
    scales[scales == 0] = 1
    codes = torch.floor(weight / scales.unsqueeze(1) + 0.5).clamp(-127, 127)
    return Int8Weight(codes.to(torch.int8).contiguous(), scales.contiguous())


def pack_int4(codes):
    """Add, where the other way sets bits."""
    packed = torch.zeros(len(codes), -(-codes.shape[1] // 2), dtype=torch.uint8).to(codes.device)
    packed += codes[:, 0::2]
    packed[:, : codes.shape[1] // 2] += 16 * codes[:, 1::2]
    return packed


def unpack_int4(packed, num_codes):
    """Divide, where the other way shifts."""
    codes = packed.new_empty(len(packed), 2 * packed.shape[1])
    codes[:, 0::2] = packed % 16
    codes[:, 1::2] = packed // 16
    return codes[:, :num_codes].contiguous()


def quantize_int4(weight, group_size):
    """Group by group, so that a short one needs no filling."""
    _check(weight)
    if group_size not in (16, 32, 64, 128, 256):
        raise ValueError(f"group_size {group_size} is none of 16, 32, 64, 128, 256")
    codes, scales, zeros = [], [], []
    for group in weight.detach().to(torch.float32).split(group_size, dim=1):
        low = group.amin(1, keepdim=True).clamp(max=0)
        scale = (group.amax(1, keepdim=True).clamp(min=0) - low) / 15
        scale[scale == 0] = 1
        zero = torch.floor(-low / scale + 0.5)
        codes.append((torch.floor(group / scale + 0.5) + zero).clamp(0, 15).to(torch.uint8))
        scales.append(scale)
        zeros.append(zero.to(torch.uint8))
    return Int4Weight(
        pack_int4(torch.cat(codes, 1)),
        torch.cat(scales, 1).contiguous(),
        torch.cat(zeros, 1).contiguous(),
        weight.shape[1],
        group_size,
    )


def dequantize(weight, dtype=torch.float32):
    """Repeat what belongs to a group."""
    if isinstance(weight, Int8Weight):
        return torch.einsum("oi,o->oi", weight.codes.float(), weight.scales).to(dtype)

    def spread(per_group):
        return per_group.repeat_interleave(weight.group_size, 1)[:, : weight.in_features]

    scales, zeros = spread(weight.scales), spread(weight.zero_points.short())
    codes = unpack_int4(weight.packed, weight.in_features).short()
    return ((codes - zeros) * scales).to(dtype)


def relative_error(weight, approximation):
    """Two sums of squares."""
    if weight.shape != approximation.shape:
        raise ValueError(f"{tuple(weight.shape)} is not {tuple(approximation.shape)}")
    wide = weight.double()
    squares = (wide - approximation).square().sum() / wide.square().sum()
    return squares.sqrt().item()


def cross_entropy(logits, token_ids):
    """PyTorch's own loss."""
    if len(token_ids) < 2:
        raise ValueError(f"{len(token_ids)} tokens are no text")
    return nn.functional.cross_entropy(logits[:-1].double(), token_ids[1:]).item()


def int8_matmul(x, weight):
    """One program for a row of x and some rows of the matrix."""
    out = _output(x, weight)
    rows, features = out.shape
    _row_kernel[(rows, triton.cdiv(features, 64))](
        *(x, weight.codes, weight.scales, out, features, x.shape[1], x.stride(0), x.stride(1)),
        BLOCK_N=64,
        BLOCK_K=64,
    )
    return out


def int4_matmul(x, weight):
    """Two products for each group: of even columns, and of odd ones."""
    out = _output(x, weight)
    rows, features = out.shape
    _group_kernel[(triton.cdiv(rows, 16), triton.cdiv(features, 32))](
        *(x, weight.packed, weight.scales, weight.zero_points, out),
        *(rows, features, x.shape[1], x.stride(0), x.stride(1), weight.packed.shape[1]),
        *(weight.scales.shape[1], weight.group_size, max(16, weight.group_size // 2)),
    )
    return out


class QuantizedLinear(nn.Module):
    """Stands in the place of a Linear: here by the dequantized matrix alone."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.weight, self.bias = weight, bias

    @property
    def nbytes(self):
        return self.weight.nbytes

    def forward(self, x):
        out = x @ dequantize(self.weight, x.dtype).T
        return out if self.bias is None else out + self.bias


def quantize_model(model, kind, group_size=32):
    """Go down from the list of layers."""
    quantize = {"int8": quantize_int8, "int4": lambda w: quantize_int4(w, group_size)}.get(kind)
    if quantize is None:
        raise ValueError(f"no kind {kind}")
    if group_size not in (16, 32, 64, 128, 256):
        raise ValueError(f"group_size {group_size} is none of 16, 32, 64, 128, 256")

    def descend(module):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                module.add_module(name, QuantizedLinear(quantize(child.weight), child.bias))
            else:
                descend(child)

    descend(model.layers)


@triton.jit
def _row_kernel(
    x, codes, scales, out, features, columns, row_stride, stride, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    scale = tl.load(scales + n, n < features, other=0.0)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, columns, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        values = tl.load(x + row * row_stride + k * stride, k < columns, other=0.0)
        inside = (n < features)[:, None] & (k < columns)[None, :]
        tile = tl.load(codes + n[:, None] * columns + k[None, :], inside, other=0)
        weight = tile.to(tl.float32) * scale[:, None]
        total += tl.sum(weight * values.to(tl.float32)[None, :], axis=1)
    tl.store(out + row * features + n, total.to(out.dtype.element_ty), n < features)


@triton.jit
def _group_kernel(
    x, packed, scales, zeros, out, rows, features, columns, row_stride, stride, num_bytes,
    num_groups, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * 16 + tl.arange(0, 16)
    n = tl.program_id(1) * 32 + tl.arange(0, 32)
    total = tl.zeros((16, 32), tl.float32)
    pair = tl.arange(0, BLOCK)
    for group in range(num_groups):
        byte = group * (GROUP // 2) + pair
        own = (pair < GROUP // 2) & (byte < num_bytes)
        both = tl.load(
            packed + n[None, :] * num_bytes + byte[:, None],
            (n < features)[None, :] & own[:, None],
            other=0,
        )
        zero = tl.load(zeros + n * num_groups + group, n < features, other=0).to(tl.int32)
        part = tl.zeros((16, 32), tl.float32)
        for half in tl.static_range(2):
            k = 2 * byte + half
            inside = (m < rows)[:, None] & (own & (k < columns))[None, :]
            values = tl.load(x + m[:, None] * row_stride + k[None, :] * stride, inside, other=0.0)
            steps = ((both >> (4 * half)) & 15).to(tl.int32) - zero[None, :]
            part += tl.dot(values, steps.to(values.dtype), input_precision="ieee")
        total += part * tl.load(scales + n * num_groups + group, n < features, other=0.0)[None, :]
    inside = (m < rows)[:, None] & (n < features)[None, :]
    tl.store(out + m[:, None] * features + n[None, :], total.to(out.dtype.element_ty), inside)


def _output(x, weight):
    if x.shape[1] != weight.shape[1]:
        raise ValueError(f"{x.shape[1]} columns do not fit {weight.shape[1]}")
    return torch.empty(len(x), weight.shape[0], dtype=x.dtype, device=x.device)


def _check(weight):
    if weight.ndim != 2:
        raise ValueError(f"no matrix: {tuple(weight.shape)}")
    if not torch.isfinite(weight.float()).all():
        raise ValueError("not finite")
