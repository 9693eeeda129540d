"""Which layers rotate, and by how much.

Legend: T tokens of a micro-batch, D head dim.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from ground.errors import UserError


def layer_uses_rope(layer_index: int, no_rope_layer: int) -> bool:
    """NoPE: every n-th layer (n = `no_rope_layer`) has no positions.

    With n = 4, layers 3, 7, 11, ... (counted from 0) are not rotated; n = 0 turns NoPE off.
    Source: nanotron branch smollm3 `no_rope_layer`, transformers `no_rope_layer_interval`.
    """
    return no_rope_layer == 0 or (layer_index + 1) % no_rope_layer != 0


def rope_tables(
    positions_T: torch.Tensor,
    head_dim: int,
    theta: float,
    rope_scaling: Mapping[str, Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each fp32 [T, 1, D]; angle of pair i at position p is p * theta^(-2i/D).

    Half-split (NeoX) layout: dimension i is paired with i + D/2 (Su et al. 2021, arXiv:2104.09864).
    With `rope_scaling` the frequencies and the factor on both tables are YaRN's.
    """
    exponent = torch.arange(0, head_dim, 2, device=positions_T.device).float() / head_dim
    # Not theta**-exponent: transformers rounds so, and 64k positions make an ulp visible.
    frequencies, factor = 1.0 / theta**exponent, 1.0
    if rope_scaling:
        frequencies, factor = _yarn(frequencies, theta, rope_scaling)
    angles = positions_T.float()[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos() * factor, angles.sin() * factor


def rotate(x_THD: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor) -> torch.Tensor:
    """x rotated by the tables, [T, heads, D]; tables are cast to x's dtype, as published."""
    first, second = x_THD.chunk(2, dim=-1)
    swapped = torch.cat((-second, first), dim=-1)
    return x_THD * cos_T1D.to(x_THD.dtype) + swapped * sin_T1D.to(x_THD.dtype)


def _yarn(
    frequencies: torch.Tensor, theta: float, rope_scaling: Mapping[str, Any]
) -> tuple[torch.Tensor, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): frequencies [D/2] and the attention factor.

    Pairs that turn more than `beta_fast` times within the original length keep their frequency,
    those that turn less than `beta_slow` times have it divided by `factor`; a ramp in between. The
    attention factor multiplies cos and sin, so NoPE layers get none, as in transformers.
    """
    factor, pairs = float(rope_scaling["factor"]), len(frequencies)
    original = rope_scaling["original_max_position_embeddings"]

    def pair_that_turns(times: float) -> float:
        return pairs * math.log(original / (times * 2 * math.pi)) / math.log(theta)

    low = max(math.floor(pair_that_turns(rope_scaling.get("beta_fast") or 32)), 0)
    high = min(math.ceil(pair_that_turns(rope_scaling.get("beta_slow") or 1)), 2 * pairs - 1)
    index = torch.arange(pairs, device=frequencies.device).float()
    ramp = ((index - low) / (high - low or 0.001)).clamp(0, 1)
    kept = 1 - ramp
    attention_factor = rope_scaling.get("attention_factor") or 0.1 * math.log(factor) + 1
    return frequencies / factor * (1 - kept) + frequencies * kept, float(attention_factor)


def yarn_config(hf_config: Mapping[str, Any], factor: float = 2.0) -> dict[str, Any]:
    """config.json of the same weights for `factor` times the length, by YaRN.

    No weights change. This is how the 64k model reads 128k. Factor 4 degrades RULER (Playbook).
    """
    rope, original = dict(hf_config["rope_parameters"]), hf_config["max_position_embeddings"]
    if rope["rope_type"] != "default":
        raise UserError(
            f"rope_parameters.rope_type: '{rope['rope_type']}' is scaled already; start from the "
            "config of the unscaled checkpoint"
        )
    rope |= {
        "rope_type": "yarn",
        "factor": float(factor),
        "original_max_position_embeddings": original,
    }
    return {
        **hf_config,
        "max_position_embeddings": int(original * factor),
        "rope_parameters": rope,
    }
