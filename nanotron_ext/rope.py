"""Which layers rotate, and by how much.

Legend: T tokens of a micro-batch, D head dim.
"""

import torch


def layer_uses_rope(layer_index: int, no_rope_layer: int) -> bool:
    """NoPE: every `no_rope_layer`-th layer has no positions (0-based 3, 7, 11, ...; 0 = none).

    Source: nanotron branch smollm3 `no_rope_layer`, transformers `no_rope_layer_interval`.
    """
    return no_rope_layer == 0 or (layer_index + 1) % no_rope_layer != 0


def rope_tables(
    positions_T: torch.Tensor, head_dim: int, theta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each fp32 [T, 1, D]; angle of pair i at position p is p * theta^(-2i/D).

    Half-split (NeoX) layout: dimension i is paired with i + D/2 (Su et al. 2021, arXiv:2104.09864).
    """
    exponent = torch.arange(0, head_dim, 2, device=positions_T.device).float() / head_dim
    angles = positions_T.float()[:, None] * theta**-exponent
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x_THD: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor) -> torch.Tensor:
    """x rotated by the tables, [T, heads, D]; tables are cast to x's dtype, as published."""
    first, second = x_THD.chunk(2, dim=-1)
    swapped = torch.cat((-second, first), dim=-1)
    return x_THD * cos_T1D.to(x_THD.dtype) + swapped * sin_T1D.to(x_THD.dtype)
