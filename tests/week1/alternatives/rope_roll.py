"""Rotary position embedding in float32 throughout, as x · cos + (x with halves exchanged) · sin."""

import torch
from torch import Tensor, nn

__all__ = ["rotary_table", "apply_rotary"]


def rotary_table(
    head_dim: int,
    num_positions: int,
    theta: float,
    device: torch.device | str | None = None,
) -> Tensor:
    """Tabulate in float32, the speeds as reciprocals, as most libraries do it."""
    if head_dim <= 0 or head_dim & 1:
        raise ValueError(f"expected an even head_dim of at least 2 instead of {head_dim}")
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angles = torch.arange(num_positions, device=inverse.device).float()[:, None] * inverse
    table = torch.empty(num_positions, head_dim, device=inverse.device)
    table[:, : head_dim // 2] = torch.cos(angles)
    table[:, head_dim // 2 :] = torch.sin(angles)
    return table


def apply_rotary(x: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    """Rotate all heads with sines whose first half carries the minus sign."""
    for position in positions.flatten().tolist():
        if not 0 <= position < table.shape[0]:
            raise ValueError(f"{position} is not below {table.shape[0]} or not at least 0")
    half = x.shape[-1] // 2
    rows = table[positions]
    cos, sin = rows[..., :half], rows[..., half:]
    cos = torch.cat((cos, cos), -1)[..., None, :, :]
    sin = torch.cat((-sin, sin), -1)[..., None, :, :]
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * cos + wide.roll(half, -1) * sin).type_as(x)


class Rotary(nn.Module):
    """Rotate queries and keys with one table."""

    def __init__(self, head_dim: int, num_positions: int, theta: float):
        super().__init__()
        self.table = rotary_table(head_dim, num_positions, theta, device="cpu")

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        self.table = self.table.to(q.device)
        return apply_rotary(q, positions, self.table), apply_rotary(k, positions, self.table)
