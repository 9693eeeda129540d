"""Intervals of what was measured: shares of trials, and means over a few seeds."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

Z_95 = 1.959964
# Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom; beyond the last the last is used, so
# that intervals are too wide rather than too narrow. Rounded, as stored figures were made with them.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def wilson(hits: int, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Interval of a share of independent trials (Wilson 1927), 95 % unless `z` says otherwise."""
    if trials < 1:
        raise ValueError("trials: an interval needs at least one")
    # Inside, since importing it takes a second.
    from scipy.stats import binomtest

    level = math.erf(z / math.sqrt(2))
    low, high = binomtest(hits, trials).proportion_ci(level, method="wilson")
    return float(low), float(high)


def summed(rows: Sequence[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    """Cells with equal values of `names` added up, with Wilson's 95 % interval."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = tuple(row[name] for name in names)
        start = {**dict(zip(names, key, strict=True)), "hits": 0, "of": 0, "chance": row["chance"]}
        group = groups.setdefault(key, start)
        group["hits"] += row["hits"]
        group["of"] += row["of"]
    for group in groups.values():
        group["low"], group["high"] = wilson(group["hits"], group["of"])
    return list(groups.values())


def share_variance(hits: int, trials: int, z: float = Z_95) -> float:
    """Variance of a share of independent trials, with z^2 trials added, half of them hits (Agresti
    and Coull 1998): that of 0 or of all hits is not 0."""
    added = trials + z * z
    share = (hits + z * z / 2) / added
    return share * (1 - share) / added


def jackknife_variance(
    items: Sequence[Any], estimate: Callable[[Sequence[Any]], float], groups: int = 20
) -> float:
    """Variance of `estimate(items)`, from leaving out every group of items in turn (delete-a-group
    jackknife, Kott 2001): for a figure of the whole that is not a mean over items. Raises
    ValueError for a single item."""
    if len(items) < 2:
        raise ValueError("items: the jackknife needs at least two")
    count = min(groups, len(items))
    estimates = [
        estimate([item for index, item in enumerate(items) if index % count != left_out])
        for left_out in range(count)
    ]
    return (count - 1) ** 2 / count * statistics.variance(estimates)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and the ends of its 95 % t interval; the ends are infinite for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, -math.inf, math.inf
    t = T_95[min(len(values) - 2, len(T_95) - 1)]
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half
