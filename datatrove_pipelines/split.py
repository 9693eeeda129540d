"""Which part of the corpus a document belongs to: a pure function of its text.

A stand-in is tokenised once and read by several sources, and one part of it is kept out of
training. Both choices hash the text alone, so they survive a new order of the documents, a new
reader and any number of processes. They use different salts: were they the same hash, holding out
the first 2 % would empty exactly the first slice.
"""

import hashlib


def _uniform(text: str, salt: bytes) -> float:
    """A number in [0, 1) from the text, the same on every machine and in every process."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, salt=salt).digest()
    # 53 bits are what a float holds: all 64 could round up to 1.0.
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def document_fraction(text: str) -> float:
    """Where the document lies in [0, 1) of its stand-in."""
    return _uniform(text, b"slice")


def is_held_out(text: str, fraction: float) -> bool:
    """Whether the document is among the share `fraction` that no training stage reads."""
    return _uniform(text, b"held out") < fraction


def in_slice(text: str, start: float, stop: float) -> bool:
    """Whether the document lies in [start, stop) of its stand-in."""
    return start <= document_fraction(text) < stop
