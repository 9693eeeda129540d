"""What a step's batch held, as one number that a run writes down and `make replay` computes again.

The hash of each window or row, summed over the batch modulo 2^63: the sum depends on what the batch
holds and not on which process read which part of it, in which order. A window that differs in one
token changes it.
"""

from collections.abc import Iterable
from typing import Any

MODULUS = 1 << 63


def token_hash(ids: Any) -> int:
    """63 bits of the ids [T] of a window, in whatever integers they are kept."""
    import numpy as np  # not by all that know the modulus: launch starts without it
    import xxhash

    as_stored = np.ascontiguousarray(ids).astype("<u4", copy=False)
    return xxhash.xxh3_64_intdigest(as_stored.data) % MODULUS


def row_hash(*columns: Any) -> int:
    """63 bits of several sequences of ids of one row; where one ends and the next begins counts."""
    return token_hash([token_hash(ids) >> half & 0xFFFFFFFF for ids in columns for half in (0, 31)])


def total(hashes: Iterable[int]) -> int:
    """Of a batch whose windows or rows have these hashes."""
    return sum(hashes) % MODULUS


def shown(number: int) -> str:
    """As metrics.jsonl has it: text, since many readers of JSON round so large a number."""
    return f"{number:016x}"
