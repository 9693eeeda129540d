"""Which rows a mixture takes, by the published meaning of `weight`: arithmetic on row counts only.

Each split is shuffled with the mixture's seed and cut to floor(rows * weight), once, so that every
epoch sees the same subset; the cuts are concatenated in the recipe's order and shuffled. The order
is that of `datasets`: `shuffle(seed).select(range(floor(n * weight)))`, `concatenate`, `shuffle`.

    R  rows of the mixture
"""

import math
from collections.abc import Mapping

import numpy as np

from ground.errors import UserError


def mixed_rows(counts: Mapping[str, int], weights: Mapping[str, float], seed: int) -> np.ndarray:
    """[R, 2] int64: index of the split (in the order of `weights`) and of the row in it."""
    parts = []
    for index, (split, weight) in enumerate(weights.items()):
        rows = np.random.default_rng(seed).permutation(counts[split])
        rows = rows[: kept_rows(split, counts[split], weight)]
        parts.append(np.stack([np.full_like(rows, index), rows], axis=1))
    mixed = np.concatenate(parts)
    return mixed[np.random.default_rng(seed).permutation(len(mixed))]


def kept_rows(split: str, rows: int, weight: float) -> int:
    """floor(rows * weight); UserError for a weight that is not a share, or keeps nothing."""
    if not 0 < weight <= 1:  # NaN too
        raise UserError(
            f"mixture.{split}: weight {weight:g} is no share of a split's rows: write a number above "
            "0, at most 1; remove the line to drop the split"
        )
    kept = math.floor(rows * weight)
    if kept == 0:
        raise UserError(
            f"mixture.{split}: {rows} rows at weight {weight:g} leave none: raise the weight, or "
            "remove the line"
        )
    return kept
