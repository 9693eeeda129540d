"""Exact duplicates: texts that are equal up to white space at their ends."""

import hashlib
from array import array


class SeenTexts:
    """The texts met so far, as 64-bit hashes in a table with open addressing.

    A text takes 12 to 24 bytes, where a Python set of its hash takes about 100. Among a billion
    texts, two different ones share a hash with a probability of 3 %.
    """

    def __init__(self) -> None:
        self._slots = array("Q", [0]) * 1024  # 0: free
        self._texts = 0

    def has(self, text: str) -> bool:
        """Whether the text was met before; it is added."""
        digest = hashlib.blake2b(text.strip().encode(), digest_size=8).digest()
        is_new = _put(self._slots, int.from_bytes(digest, "big") or 1)
        self._texts += is_new
        if 3 * self._texts > 2 * len(self._slots):
            larger = array("Q", [0]) * (2 * len(self._slots))
            for key in self._slots:
                if key:
                    _put(larger, key)
            self._slots = larger
        return not is_new


def _put(slots: "array[int]", key: int) -> bool:
    """Write the key into the first free slot from its own on; False if it is already there."""
    slot = key % len(slots)
    while slots[slot] not in (0, key):
        slot = (slot + 1) % len(slots)
    is_new = slots[slot] == 0
    slots[slot] = key
    return is_new
