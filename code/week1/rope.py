"""Rotary position embedding in the half-split layout of Qwen and Llama checkpoints."""

import torch
from torch import Tensor, nn

__all__ = ["rotary_table", "apply_rotary"]


def rotary_table(
    head_dim: int,
    num_positions: int,
    theta: float,
    device: torch.device | str | None = None,
) -> Tensor:
    """Tabulate the rotation of every pair of dimensions at every position.

    head_dim: even. num_positions: the table's rows, for positions 0 to num_positions - 1.
    theta: the base of the pairs' speeds, from the model's config; 10,000 in the paper.
    device: where the table is made, whatever the default device is; None means the default device.
    Returns (num_positions, head_dim) float32: first the cosine of every pair, fastest pair first,
    then the sines in the same order. The first pair turns by one radian a position.
    Angles are computed in float32 or float64. Raises ValueError, which gives head_dim's value, when
    that is odd or below 2.
    Source: Su et al. 2021, arXiv:2104.09864, section 3.2.2.
    """
    raise NotImplementedError(
        "week1/rope.py: rotary_table is not written yet → sessions/week1/rope.md"
    )


def apply_rotary(x: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    """Rotate queries or keys to their positions.

    x: (..., num_heads, tokens, head_dim), any float dtype; pair i is made of dimension i and
        dimension i + head_dim / 2.
    positions: (..., tokens) int64, each in [0, len(table)); need not be contiguous or sorted, and
        there may be none.
    table: float32, laid out as by `rotary_table`.
    Returns a new tensor of x's shape and dtype, rotated in float32, or in x's dtype where that is
    wider. The arguments are left as they were.
    Raises ValueError, which gives the position and len(table), when a position lies outside.
    Source: Su et al. 2021, arXiv:2104.09864, section 3.4.2, in the half-split layout.
    """
    raise NotImplementedError(
        "week1/rope.py: apply_rotary is not written yet → sessions/week1/rope.md"
    )


class Rotary(nn.Module):
    """Rotate queries and keys together: the seam where later weeks put a fused kernel.

    Called with q and k of (..., num_heads, tokens, head_dim) and positions of (..., tokens);
    returns both rotated.
    """

    def __init__(self, head_dim: int, num_positions: int, theta: float):
        super().__init__()
        # Not a buffer, so that `model.to(torch.bfloat16)` never rounds the angles; made on the CPU
        # even where a model is built on the meta device, since no checkpoint brings its values.
        self.table = rotary_table(head_dim, num_positions, theta, device="cpu")

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        self.table = self.table.to(q.device)
        # Together, so that positions are checked and looked up once a layer.
        num_heads = q.shape[-3]
        both = apply_rotary(torch.cat((q, k), dim=-3), positions, self.table)
        return both[..., :num_heads, :, :], both[..., num_heads:, :, :]
