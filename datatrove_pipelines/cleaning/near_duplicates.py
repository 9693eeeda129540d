"""The step `near_duplicates`: documents that nearly equal an earlier one, by datatrove's minhash.

A document is 14 x 8 hashes of its 5-grams of words, as for FineWeb: two that share 75 % of their
n-grams agree in 8 hashes of one bucket with a probability of 77 %, two that share 90 % of them always.
One that agrees with any document before it, in its source or in an earlier one, is left out. Clusters,
as FineWeb has them, would let a later document decide about an earlier one; here what is left
out of a part of a source depends only on what stands before, so that any prefix can be built.

    <cache>/signatures/<name>-<hash>/<unit>/00000, ...   hashes of 100,000 documents each, in 14 sorted files
    <cache>/near_duplicates/<name>-<hash>/<unit>.npy     the numbers of those to leave out

Compared are documents of 50 words or more (characters, where no spaces are written): of short notes a
few n-grams decide. Numbers count, so that tables which differ in them alone all stay.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.utils.text import TextNormConfig
from filelock import FileLock
from loguru import logger

from datatrove_pipelines.cleaning.steps import passed_by_filters
from datatrove_pipelines.cleaning.words import WORDS
from datatrove_pipelines.counts import Counts, Step
from datatrove_pipelines.shards import documents_hash
from datatrove_pipelines.sources import HubSplit, SourceJob, listed, pinned, units_of
from datatrove_pipelines.units import Unit, tokens_a_byte
from ground.files import folder_aside, written_aside

if TYPE_CHECKING:
    from datatrove.data import Document

CONFIG = MinhashConfig(
    norm_config=TextNormConfig(norm_numbers=False, norm_unicode_diacritics=False)
)
LEAST_WORDS = 50
DOCUMENTS_A_FILE = 100_000  # what is sorted in memory at a time
Numbers = np.ndarray[tuple[int], np.dtype[np.int64]]


class Signatures(MinhashDedupSignature):  # type: ignore[misc]
    """The first of datatrove's steps; short documents have no hashes."""

    def get_shingles(self, text: str) -> Any:
        shingles = super().get_shingles(text)
        return shingles if len(shingles) > LEAST_WORDS - CONFIG.n_grams else shingles[:0]


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


def numbers_to_leave_out(job: SourceJob, unit: Unit, cache: Path) -> Numbers:
    """The numbers of a unit's documents that the step drops, of those that the filters pass on.

    What is missing is found: the hashes of the units before it, and of earlier sources, are kept.
    """
    folder = cache / "near_duplicates" / _name(job, cache)
    file = folder / f"{unit.number}.npy"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not file.exists():
            units = _planned(job, unit.number + 1)
            signed = [_signed(one, each, cache) for one in job.earlier for each in _planned(one)]
            signed += [_signed(replace(job, earlier=()), each, cache) for each in units]
            found = find_near_duplicates(signed)[len(signed) - len(units) :]
            for each, numbers in zip(units, found, strict=True):
                with written_aside(folder / f"{each.number}.npy") as aside, aside.open("wb") as to:
                    np.save(to, numbers)
    kept: Numbers = np.load(file)
    return kept


def _name(job: SourceJob, cache: Path) -> str:
    return f"{job.name.replace('/', '--')}-{documents_hash(job, cache)}"


def _planned(job: SourceJob, least: int = 0) -> list[Unit]:
    """The units that hold a job's portion, as estimated; at least so many."""
    listing, units, stored, wanted = listed(job), list[Unit](), 0.0, inf
    if listing and isinstance(job.read, HubSplit) and job.read.portion:
        wanted = job.read.portion[1] / tokens_a_byte(listing.files, job.read.tokens)
    for unit in units_of(job, listing):
        if stored >= wanted and len(units) >= least:
            break
        units.append(unit)
        stored += unit.stored_bytes
    return units


def _signed(job: SourceJob, unit: Unit, cache: Path) -> Path:
    """The folder of a unit's signatures, written when it is missing."""
    folder = cache / "signatures" / _name(job, cache) / f"{unit.number:05}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            documents: Any = None
            for step in passed_by_filters(pinned(job, listed(job)), unit, Counts()):
                documents = step(documents)
            write_signatures(documents, folder)
    return folder


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
