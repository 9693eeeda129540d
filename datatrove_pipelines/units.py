"""The parts of a source's files that are tokenised one by one, each into a shard of its own.

Files are taken in a seeded order and cut into units on an axis of estimated tokens: stored bytes
times a ratio. Where a unit begins and ends depends on the files alone, never on who reads it.
A portion begins at a place on that axis and ends with the unit that brings the counted tokens to
what is asked for.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

# A shard of 1 GB at the published vocabulary, which one core writes in minutes; 11T tokens are below
# the 65,530 files that Linux lets a process map.
MOST_TOKENS = 250_000_000
# A portion ends at the end of a unit: what is read too much is at most so small a part of it.
UNITS_A_PORTION = 16
# Tokens of a stored byte where no number of tokens is published: ours, from 4.3 bytes a token and
# text that is packed to 40 % (gzip, zstd, the columns of parquet).
TOKENS_A_BYTE, TOKENS_A_PLAIN_BYTE = 0.5, 0.22
# Where the files list ids of others: Stack-Edu's C, C++ and C# have 7 to 19 by its card; of the files that
# The Stack v2 lists, a language of its 17 is taken to have one part.
TOKENS_A_BYTE_OF_IDS, LANGUAGES = 10.0, 17
PLAIN = (".jsonl", ".json", ".ndjson")


@dataclass(frozen=True)
class StoredFile:
    name: str  # path in the repository or folder
    bytes: int


@dataclass(frozen=True)
class Unit:
    """The rows of a file that end in (start, stop] of it."""

    number: int  # place in the source's order; the shard is f"{number:05}.ds"
    file: str  # path in the repository or folder; "" where the source is no file of a hub set
    start: float  # share of the file
    stop: float
    file_bytes: int = 0

    @property
    def stored_bytes(self) -> float:
        return (self.stop - self.start) * self.file_bytes


WHOLE = Unit(0, "", 0.0, 1.0)


def in_order(files: Sequence[StoredFile], seed: int, source: str) -> list[StoredFile]:
    """The files in an order of the seed, in which each has its place whatever the others are."""

    def place(file: StoredFile) -> bytes:
        return hashlib.blake2b(f"{seed}/{source}/{file.name}".encode(), digest_size=8).digest()

    return sorted(files, key=lambda file: (place(file), file.name))


def tokens_a_byte(
    files: Sequence[StoredFile], published_tokens: int | None, of_ids: float | None = None
) -> float:
    """Estimated tokens of a stored byte of these files; `of_ids`, where they list others by id."""
    size = sum(file.bytes for file in files)
    if published_tokens and size:
        return published_tokens / size
    if of_ids:
        return of_ids
    plain = sum(file.bytes for file in files if file.name.lower().endswith(PLAIN))
    return (plain * TOKENS_A_PLAIN_BYTE + (size - plain) * TOKENS_A_BYTE) / max(size, 1)


def units(
    files: Sequence[StoredFile], ratio: float, portion: tuple[int, int] | None
) -> Iterator[Unit]:
    """All units from where the portion begins, around the source's end to there again.

    `files` in their order; `ratio` tokens a stored byte. No two units share a row, and together
    they are the source.
    """
    skip, take = portion or (0, None)
    most = MOST_TOKENS if take is None else min(MOST_TOKENS, take / UNITS_A_PORTION)
    number = 0
    for file, start, stop in _from(skip, take or math.inf, files, ratio):
        size = (stop - start) * file.bytes
        parts = max(1, math.ceil(size * ratio / max(most, 1)))
        borders = [start + (stop - start) * part / parts for part in range(parts)] + [stop]
        for begin, end in pairwise(borders):
            yield Unit(number, file.name, begin, end, file.bytes)
            number += 1


def _from(
    skip: int, take: float, files: Sequence[StoredFile], ratio: float
) -> Iterator[tuple[StoredFile, float, float]]:
    """(file, start, stop) from `skip` tokens on, and from the first file to there."""
    sizes = [file.bytes * ratio for file in files]
    if not (total := sum(sizes)):
        return
    first, left = 0, skip % total
    while left >= sizes[first] and first < len(sizes) - 1:
        left -= sizes[first]
        first += 1
    # In lines what comes before is fetched too: rather the next file, unless portions would meet.
    if left and 4 * sizes[first] <= take and not files[first].name.lower().endswith(".parquet"):
        first, left = (first + 1) % len(sizes), 0.0
    share = min(left / sizes[first], 1.0) if sizes[first] else 0.0
    if share < 1:
        yield files[first], share, 1.0
    for file in (*files[first + 1 :], *files[:first]):
        yield file, 0.0, 1.0
    if share:
        yield files[first], 0.0, share
