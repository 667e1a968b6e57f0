"""Rotary position embedding by complex multiplication, with a table from NumPy in float64."""

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["rotary_table", "apply_rotary"]


def rotary_table(
    head_dim: int,
    num_positions: int,
    theta: float,
    device: torch.device | str | None = None,
) -> Tensor:
    """Tabulate every pair's unit complex number, real parts first."""
    num_pairs, rest = divmod(head_dim, 2)
    if rest or num_pairs < 1:
        raise ValueError(f"head_dim = {head_dim} does not make one or more pairs")
    # Neighbouring speeds differ by one factor, so that the speeds are its powers.
    speeds = np.power(float(theta) ** (-1.0 / num_pairs), np.arange(num_pairs))
    numbers = np.exp(1j * np.arange(num_positions)[:, None] * speeds)
    table = np.concatenate((numbers.real, numbers.imag), axis=1)
    return torch.tensor(table, dtype=torch.float32, device=device)


def apply_rotary(x: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    """Multiply every pair, read as a complex number, with its entry of the table."""
    limit = table.shape[0]
    outside = positions[(positions < 0) | (positions >= limit)]
    if len(outside):
        raise ValueError(
            f"the table ends before {limit}, but position {int(outside[0])} is asked for"
        )
    num_pairs = x.shape[-1] // 2
    turns = torch.complex(table[:, :num_pairs].double(), table[:, num_pairs:].double())
    turns = turns.index_select(0, positions.reshape(-1)).reshape(*positions.shape, num_pairs)
    numbers = torch.complex(x[..., :num_pairs].double(), x[..., num_pairs:].double())
    numbers = numbers * turns.unsqueeze(-3)
    return torch.cat((numbers.real, numbers.imag), dim=-1).to(x.dtype)


class Rotary(nn.Module):
    """Rotate queries and keys with one table."""

    def __init__(self, head_dim: int, num_positions: int, theta: float):
        super().__init__()
        self.table = rotary_table(head_dim, num_positions, theta, device="cpu")

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        self.table = self.table.to(q.device)
        return apply_rotary(q, positions, self.table), apply_rotary(k, positions, self.table)
