"""Which part of the corpus a document belongs to, and the text that no stage trains on.

The part is a pure function of the text. Sources may share a text, each reading a slice of it, and a
share of all documents is held out, for bits per byte. Both choices hash only the text, so a new
order of the documents, a new reader or another number of processes does not change them. They use
different salts: with one hash for both, holding out the first 2 % would empty exactly the first
slice.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datatrove_pipelines.counts import Counts
from datatrove_pipelines.sources import (
    HubSplit,
    SourceJob,
    check_readable,
    clean,
    listed,
    pinned,
    units_of,
)
from ground.files import open_aside

if TYPE_CHECKING:
    from datatrove.data import Document


def _uniform(text: str, salt: bytes) -> float:
    """A number in [0, 1) from the text, the same on every machine and in every process."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, salt=salt).digest()
    # 53 bits are what a float holds: all 64 could round up to 1.0.
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def document_fraction(text: str) -> float:
    """The document's place in [0, 1), from its text."""
    return _uniform(text, b"slice")


def is_held_out(text: str, fraction: float) -> bool:
    """Whether the document is among the share `fraction` that no training stage reads."""
    return _uniform(text, b"held out") < fraction


def in_slice(text: str, start: float, stop: float) -> bool:
    """Whether the document lies in [start, stop)."""
    return start <= document_fraction(text) < stop


def held_out_texts(job: SourceJob, limit_bytes: int, cache: Path) -> list[str]:
    """Held-out documents of a source, in its order, until `limit_bytes` of UTF-8 are reached."""
    texts, size = list[str](), 0
    for document in _held_out(job, cache):
        texts.append(document.text)
        size += len(texts[-1].encode())
        if size >= limit_bytes:
            break
    return texts


def _held_out(job: SourceJob, cache: Path) -> "Iterator[Document]":
    """The documents that data stages leave out as held out, cleaned as the others are."""
    from datatrove_pipelines.cleaning.documents import cleaned
    from datatrove_pipelines.cleaning.steps import replace_personal

    if isinstance(job.read, HubSplit):  # near duplicates: all of the set would be read for a few
        job = replace(job, clean=tuple(step for step in job.clean if step != "near_duplicates"))
    listing, counts = listed(job), Counts()
    job = pinned(job, listing)

    def keep_held_out(data: "Iterator[Document]") -> "Iterator[Document]":
        for document in data:
            if is_held_out(document.text, job.held_out_fraction):
                document.text = clean(document.text)
                yield document

    last = [keep_held_out, *([replace_personal(counts)] if "pii" in job.clean else [])]
    for unit in units_of(job, listing):
        documents: Any = None
        for step in (*cleaned(job, unit, counts, cache), *last):
            documents = step(documents)
        yield from documents


def write_held_out(
    jobs: Iterable[tuple[str, SourceJob, int]], path: Path, cache: Path
) -> dict[str, int]:
    """Write {category, source, text} lines for (category, job, limit_bytes); bytes per category."""
    sizes: dict[str, int] = {}
    jobs = list(jobs)
    check_readable(job for _, job, _ in jobs)
    with open_aside(path) as file:
        for category, job, limit_bytes in jobs:
            for text in held_out_texts(job, limit_bytes, cache):
                row = {"category": category, "source": job.name, "text": text}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                sizes[category] = sizes.get(category, 0) + len(text.encode())
    return sizes
