"""Source code by the ids of its files: The Stack v2 and Stack-Edu list them, the texts lie in
Software Heritage's bucket, gzipped, as they were in the repositories.

A row is a file, or a repository with a list of `files`; each file is a document, since the published
mixtures weigh languages, and Stack-Edu rates files. The bucket is public; SOFTWARE_HERITAGE names
another address of it.
"""

import gzip
import logging
import os
import zlib
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from datatrove_pipelines.counts import Counts
from datatrove_pipelines.text_files import check_fields
from ground.errors import Outage, UserError, first_line
from ground.hub import ANSWER_SECONDS, SILENCE_SECONDS

if TYPE_CHECKING:
    from urllib3 import PoolManager

ADDRESS = "https://softwareheritage.s3.amazonaws.com/content"
THREADS = 32  # that wait for the bucket
# Of contents that are asked for before they are needed, and kept in memory: each has below 10 MB, as
# The Stack v2 was made.
AHEAD = 2 * THREADS
TRIES, FIRST_WAIT_SECONDS, MOST_WAIT_SECONDS = 6, 0.5, 30.0
LATER = (429, 500, 502, 503, 504)
MISSING = (403, 404)  # a bucket that may not be listed says 403 of what is not there
# Some contents are taken down; where more are missing, it is not the bucket.
MOST_MISSING, MOST_MISSING_SHARE = 20, 0.1
REMEDY = "correct SOFTWARE_HERITAGE, or the source's row in recipes/sources.yaml"
# What is read of a row, or of each file of a repository's row: the rest is many times as long.
FIELDS = ("blob_id", "language", "src_encoding")


@dataclass(frozen=True)
class Blob:
    """A file by its id; `row` is the number of the row that lists it."""

    row: int
    id: str
    encoding: str


def address() -> str:
    return os.environ.get("SOFTWARE_HERITAGE", "").rstrip("/") or ADDRESS


def id_columns(columns: Sequence[str]) -> list[str]:
    """The columns that are needed of a table with these, as dotted paths. Raises ValueError."""
    needed = [path for path in columns if path.rpartition(".")[2] in FIELDS]
    of_files = [path for path in needed if path.startswith("files.")]
    needed = of_files or [path for path in needed if "." not in path]
    if not any(path.endswith("blob_id") for path in needed):
        raise ValueError(f"no field 'blob_id' among {sorted(columns)}: its rows are no ids")
    return needed


def blobs(
    rows: Iterable[tuple[int, Mapping[str, Any]]], languages: Collection[str] = ()
) -> Iterator[Blob]:
    """The files of all rows in order, or those in `languages`. Raises ValueError."""
    languages = [languages] if isinstance(languages, str) else languages
    for number, row in rows:
        for file in (row["files"] or []) if "files" in row else [row]:
            check_fields(FIELDS[:1] + FIELDS[1:2] * bool(languages), file)
            if not languages or file["language"] in languages:
                yield Blob(number, file["blob_id"], file.get("src_encoding") or "utf-8")


def contents(wanted: Iterable[Blob], counts: Counts) -> Iterator[tuple[int, str]]:
    """(number of the row, text) of each blob in order, of THREADS at once.

    What the bucket has not, or not as gzip, is counted in `counts.left_out`. Raises UserError where
    that is too much, and Outage where the bucket does not answer.
    """
    counts.left_out.setdefault("missing_contents", 0)
    place, asked, missing = address(), 0, 0
    pool, waiting = ThreadPoolExecutor(THREADS), deque[tuple[Blob, Future[bytes | str]]]()
    queue = iter(wanted)
    try:
        while True:
            while len(waiting) < AHEAD and (blob := next(queue, None)):
                waiting.append((blob, pool.submit(_fetch, f"{place}/{blob.id}")))
            if not waiting:
                return
            blob, future = waiting.popleft()
            content, asked = future.result(), asked + 1
            if isinstance(content, bytes):
                yield blob.row, _text(content, blob.encoding)
                continue
            counts.read += 1
            counts.left_out["missing_contents"] += 1
            missing += 1
            if missing > max(MOST_MISSING, MOST_MISSING_SHARE * asked):
                what = f"{missing} of {asked} contents cannot be had (the last: {content})"
                raise UserError(f"{place}: {what}; {REMEDY}")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _text(content: bytes, encoding: str) -> str:
    """As the sets' own loaders read them: what cannot be decoded is left out."""
    try:
        return content.decode(encoding, errors="ignore")
    except LookupError:  # not one of Python's
        return content.decode("utf-8", errors="ignore")


def _fetch(url: str) -> bytes | str:
    """The unpacked content, or why there is none."""
    from urllib3.exceptions import HTTPError

    try:
        answer = _client().request("GET", url, decode_content=False)
        if answer.status == 200:
            return gzip.decompress(answer.data)
    except HTTPError as error:
        raise Outage(f"{url}: {first_line(error)}; run the same command again later") from error
    except (OSError, EOFError, zlib.error):
        return "not gzip"
    if answer.status in MISSING:
        return f"status {answer.status}"
    raise UserError(f"{url}: status {answer.status}; {REMEDY}")


@cache
def _client() -> "PoolManager":
    """One a process: its connections are kept open, and tried again with growing waits."""
    from urllib3 import PoolManager, Retry, Timeout

    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a line a try
    tries = Retry(
        TRIES, backoff_factor=FIRST_WAIT_SECONDS, backoff_max=MOST_WAIT_SECONDS,
        backoff_jitter=FIRST_WAIT_SECONDS, status_forcelist=LATER,
    )  # fmt: skip
    wait = Timeout(connect=ANSWER_SECONDS, read=SILENCE_SECONDS)
    return PoolManager(maxsize=THREADS, retries=tries, timeout=wait)
