"""The step `near_duplicates`: documents that nearly equal an earlier one, by datatrove's minhash.

A document is 14 x 8 hashes of its 5-grams of words, as for FineWeb: two that share 75 % of their
n-grams agree in 8 hashes of one bucket with a probability of 77 %, two that share 90 % of them always.
One that agrees with any document before it, in its source or in an earlier one, is left out. Clusters,
as FineWeb has them, would let a later document decide about an earlier one; here what is left
out of a part of a source depends only on what stands before, so that any prefix can be built.

Compared are documents of 50 words or more (characters, where no spaces are written): of short notes a
few n-grams decide. Numbers count, so that tables which differ in them alone all stay.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.utils.text import TextNormConfig
from loguru import logger

from datatrove_pipelines.cleaning.words import WORDS
from datatrove_pipelines.counts import Counts, Step
from ground.files import folder_aside

if TYPE_CHECKING:
    from datatrove.data import Document

CONFIG = MinhashConfig(
    norm_config=TextNormConfig(norm_numbers=False, norm_unicode_diacritics=False)
)
LEAST_WORDS = 50
NGRAMS_A_PART = 100_000
DOCUMENTS_A_FILE = 100_000  # what is sorted in memory at a time
Numbers = np.ndarray[tuple[int], np.dtype[np.int64]]


class Signatures(MinhashDedupSignature):
    """The first of datatrove's steps; short documents have no hashes."""

    def get_shingles(self, text: str) -> Any:
        shingles = super().get_shingles(text)
        return shingles if len(shingles) > LEAST_WORDS - CONFIG.n_grams else shingles[:0]

    def get_signature(self, shingles: Any) -> list[list[int]]:
        """datatrove's, of a part of a long document at a time: an n-gram has 112 numbers."""
        hashes, starts = super().get_signature, range(0, len(shingles), NGRAMS_A_PART)
        parts = [hashes(shingles[n : n + NGRAMS_A_PART]) for n in starts]
        smallest: list[list[int]] = np.min(parts, axis=0).tolist()
        return smallest


def write_signatures(documents: "Iterable[Document]", folder: Path) -> None:
    """The hashes of the documents, in their order; the folder is whole or not there."""
    logger.disable("datatrove")
    try:
        with folder_aside(folder) as output:
            rest = iter(documents)
            for number, first in enumerate(rest):
                part = chain([first], islice(rest, DOCUMENTS_A_FILE - 1))
                Signatures(str(output / f"{number:05}"), CONFIG, language=WORDS).run(part)
    finally:
        logger.enable("datatrove")


def find_near_duplicates(folders: Sequence[Path]) -> list[Numbers]:
    """Of each folder of signatures, the numbers of the documents that agree with an earlier one.

    Earlier is what stands before in the folder, or in a folder before.
    """
    parts = [(folder, part) for folder in range(len(folders)) for part in _parts(folders[folder])]
    left_out = [np.zeros(0, np.int64) for _ in folders]
    buckets = CONFIG.num_buckets
    logger.disable("datatrove")
    try:
        with TemporaryDirectory(dir=folders[0].parent, prefix=".buckets-") as name:
            work = Path(name)
            for bucket in range(buckets):
                _link(bucket, [part for _, part in parts], work / "in")
                MinhashDedupBuckets(
                    str(work / "in"), str(work / "out"), config=CONFIG, lines_to_buffer=1000
                ).run(None, bucket, buckets)
                pairs = np.fromfile(work / "out" / f"{bucket:05}_00.dups", "<u4").reshape(-1, 4)
                pairs = pairs[np.argsort(pairs[:, 2], kind="stable")]
                ends = np.searchsorted(pairs[:, 2], np.arange(len(parts) + 1))
                for number, (folder, part) in enumerate(parts):
                    later = pairs[ends[number] : ends[number + 1], 3].astype(np.int64)
                    later += int(part.name) * DOCUMENTS_A_FILE
                    left_out[folder] = np.union1d(left_out[folder], later)
    finally:
        logger.enable("datatrove")
    return left_out


def _parts(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.isdigit())


def _link(bucket: int, parts: Sequence[Path], target: Path) -> None:
    """The files of a bucket under one folder, numbered in their order."""
    folder = target / f"bucket_{bucket:03}"
    folder.mkdir(parents=True)
    for number, part in enumerate(parts):
        os.link(part / folder.name / "00000.minhash.sig", folder / f"{number:05}.minhash.sig")


def leave_out_numbers(counts: Counts, reason: str, numbers: Numbers) -> Step:
    """A step that drops the documents of these numbers, counted from 0 in the order of its input."""
    counts.left_out[reason] = 0

    def leave_out(data: "Iterator[Document]", rank: int = 0, world_size: int = 1) -> Any:
        left = iter([*numbers.tolist(), -1])
        next_left = next(left)
        for number, document in enumerate(data):
            if number == next_left:
                counts.left_out[reason] += 1
                next_left = next(left)
            else:
                yield document

    return leave_out
