"""Which document comes next: an index-free mixture of sources, O(1) at any sample.

Sample n of a stage is drawn from source `order[n % period]`. The order holds each source
`quota` times and keeps every prefix within one window of its share:
|count_i(n) - w_i n| < 1 (chairman assignment, Tijdeman 1980). A source's k-th draw is the k-th
window of a keyed permutation of its windows, a new one each epoch. So what a model sees is a
function of (seed, weights and lengths of the stages so far, sample index): no file grows with the
number of steps (the published run's index took 10 bytes per sample), and a resume is an integer.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from math import lcm
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ground.files import written_aside

MAX_PERIOD = 1 << 20
Integers = NDArray[np.int64]


def quotas(weights: Mapping[str, float]) -> dict[str, int]:
    """Windows of each source in one period; their sum is the period.

    The period is the least common denominator of the normalised weights, so that shares are
    exact; above MAX_PERIOD windows it is MAX_PERIOD, rounded by largest remainder.
    """
    exact = {name: Fraction(str(weight)) for name, weight in sorted(weights.items())}
    total = sum(exact.values())
    shares = {name: weight / total for name, weight in exact.items()}
    period = min(lcm(*(share.denominator for share in shares.values())), MAX_PERIOD)
    counts = {name: int(share * period) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: counts[name] - shares[name] * period)
    for name in by_remainder[: period - sum(counts.values())]:
        counts[name] += 1
    return counts


def chairman_order(quota: Integers) -> NDArray[np.int16]:
    """Order of sources [period] in which every prefix n has |count_i - n q_i / period| < 1.

    Tijdeman's rule with k sources: among those that lag by at least 1/(2k-2), take the one whose
    lag would reach 1 - 1/(2k-2) first.
    """
    period, slack = int(quota.sum()), max(2 * len(quota) - 2, 2)
    order = np.empty(period, np.int16)
    need, count = np.zeros_like(quota), np.zeros_like(quota)
    safe_quota = np.maximum(quota, 1)
    for n in range(period):
        need += quota  # period * w_i * (n + 1)
        lags = (need - count * period) * slack >= period
        deadline = (count * slack + slack - 1) * period / (safe_quota * slack)
        chosen = int(np.where(lags, deadline, np.inf).argmin())
        order[n] = chosen
        count[chosen] += 1
    return order


@dataclass(frozen=True)
class Mixture:
    """The order of sources of one stage. `names` are sorted; arrays are indexed alike."""

    names: tuple[str, ...]
    quota: Integers
    order: NDArray[np.int16]
    rank: Integers  # rank[r]: how often order[r] occurs in order[:r]

    @property
    def period(self) -> int:
        return len(self.order)

    def counts(self, samples: int) -> dict[str, int]:
        """Windows drawn from each source in the first `samples` of the stage, in closed form."""
        periods, rest = divmod(samples, self.period)
        counts = periods * self.quota + np.bincount(self.order[:rest], minlength=len(self.names))
        return dict(zip(self.names, counts.tolist(), strict=True))

    def locate(self, samples: Integers) -> tuple[Integers, Integers]:
        """(source index, how many windows of it the stage has drawn before) of each sample."""
        periods, slots = np.divmod(samples, self.period)
        source = self.order[slots].astype(np.int64)
        return source, periods * self.quota[source] + self.rank[slots]

    def samples(self, source: int, draws: Integers) -> Integers:
        """The sample that takes each of these draws of a source: the inverse of `locate`."""
        periods, ranks = np.divmod(draws, self.quota[source])
        return periods * self.period + np.flatnonzero(self.order == source)[ranks]


def build_mixture(weights: Mapping[str, float], cache: Path | None = None) -> Mixture:
    """Order of `weights` (need not sum to 1); tables are kept in `cache` by their hash."""
    counts = quotas(weights)
    names, quota = tuple(counts), np.array(list(counts.values()), np.int64)
    key = hashlib.blake2b(repr(counts).encode(), digest_size=8).hexdigest()
    path = cache / "mixtures" / f"{key}.npy" if cache else None
    order = _kept_order(path, quota) if path and path.exists() else None
    if order is None:
        order = chairman_order(quota)
        if path:
            with written_aside(path) as aside, aside.open("wb") as file:
                np.save(file, order)
    rank = np.empty(len(order), np.int64)
    for source in range(len(names)):
        slots = np.flatnonzero(order == source)
        rank[slots] = np.arange(len(slots))
    return Mixture(names, quota, order, rank)


def _kept_order(path: Path, quota: Integers) -> NDArray[np.int16] | None:
    """The order in a file; None where it is damaged: another bit gives a window to another source."""
    try:
        order: NDArray[np.int16] = np.load(path)
        counts = np.bincount(order, minlength=len(quota))
        if order.dtype == np.int16 and np.array_equal(counts, quota):
            return order
    except Exception:  # of whatever the header seems to say
        pass
    print(f"{path}: damaged, made again", flush=True)
    return None


def permuted_window(draw: Integers, windows: int, key: str) -> Integers:
    """Window index in [0, windows) of a source's draws: each epoch has its own permutation.

    `key` names seed, source and window length; draw // windows is the epoch.
    """
    epoch, position = np.divmod(draw, windows)
    keys = _keys(key, epoch)
    return _feistel(position.astype(np.uint64), np.uint64(windows), keys).astype(np.int64)


def draws_of(index: Integers, epoch: Integers, windows: int, key: str) -> Integers:
    """The draw that takes window `index` in an epoch: the inverse of `permuted_window`."""
    keys, size = _keys(key, epoch), np.uint64(windows)
    position = _feistel(index.astype(np.uint64), size, keys, inverse=True).astype(np.int64)
    return epoch * windows + position


def _keys(key: str, epoch: Integers) -> NDArray[np.uint64]:
    """The permutation's key in each epoch."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return _scramble(np.uint64(int.from_bytes(digest, "little")) + epoch.astype(np.uint64))


def _scramble(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser (Steele et al. 2014): 64 well-mixed bits from 64."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _feistel(
    x: NDArray[np.uint64],
    size: np.uint64,
    keys: NDArray[np.uint64],
    rounds: int = 6,
    inverse: bool = False,
) -> NDArray[np.uint64]:
    """Keyed bijection of [0, size): a balanced Feistel network over the next even power of two,
    walked until it falls inside (Black & Rogaway 2002, cycle walking)."""
    half = np.uint64(max((int(size) - 1).bit_length() + 1, 2) // 2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    x, outside = x.copy(), np.arange(len(x))
    while len(outside):
        left, right = x[outside] >> half, x[outside] & mask
        of_rounds = list(
            accumulate(range(rounds), lambda key, _: _scramble(key), initial=keys[outside])
        )
        for key in of_rounds[:0:-1] if inverse else of_rounds[1:]:
            if inverse:
                left, right = right ^ (_scramble(left ^ key) & mask), left
            else:
                left, right = right, left ^ (_scramble(right ^ key) & mask)
        x[outside] = (left << half) | right
        outside = outside[x[outside] >= size]
    return x
