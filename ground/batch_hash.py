"""What a step's batch held, as one number that a run writes down and `make replay` computes again.

The hash of each window or row, summed over the batch modulo 2^63: the sum depends on what the batch
holds and not on which process read which part of it, in which order. A window that differs in one
token changes it.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import xxhash

MODULUS = 1 << 63


def token_hash(*sequences: Any) -> int:
    """63 bits of the sequences of ids [T] of one window or row, whatever integers they are kept in."""
    state = xxhash.xxh3_64()
    for ids in sequences:
        flat = np.ascontiguousarray(ids, "<i4")
        state.update(flat.data)
        if len(sequences) > 1:  # where one ends and the next begins counts
            state.update(len(flat).to_bytes(8, "little"))
    return state.intdigest() % MODULUS


def total(hashes: Iterable[int]) -> int:
    """Of a batch whose windows or rows have these hashes."""
    return sum(hashes) % MODULUS


def shown(number: int) -> str:
    """As metrics.jsonl has it: text, since many readers of JSON round so large a number."""
    return f"{number:016x}"
