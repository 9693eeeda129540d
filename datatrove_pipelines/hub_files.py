"""The files of a split on the hub, or in a local folder of the same layout: listed, read by ranges.

    .parquet                                          row groups and columns that are needed
    .jsonl  .json  .ndjson, alone or .gz or .zst      streamed; what comes before is decompressed

Which files belong to a config and split is the `datasets` library's own answer.
"""

import gzip
import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datatrove_pipelines.counts import Counts
from datatrove_pipelines.software_heritage import blobs, contents, id_columns
from datatrove_pipelines.stored_files import BLOCK_BYTES, Pieces, StoredRange, Table, least_bytes
from datatrove_pipelines.text_files import (
    MOST_ROW_BYTES,
    TextField,
    check_fields,
    reason,
    text_of,
)
from datatrove_pipelines.units import PLAIN, StoredFile, Unit
from ground.errors import UserError
from ground.hub import end_silence, refusal

if TYPE_CHECKING:
    from datatrove_pipelines.sources import HubSplit

LINES = tuple(kind + packed for kind in PLAIN for packed in ("", ".gz", ".zst"))
BATCH_BYTES = 16 << 20  # of a table, uncompressed, in memory
REMEDY = "check its row in recipes/sources.yaml"
Row = bytes | dict[str, Any] | None  # None: longer than MOST_ROW_BYTES


@dataclass(frozen=True)
class Listing:
    """The files of a split; `revision` is the commit that they were listed at."""

    revision: str
    files: tuple[StoredFile, ...]


def where(split: "HubSplit") -> str:
    return f"{split.hub_id}@{split.revision} ({split.config or 'default'}, {split.split})"


def list_files(split: "HubSplit") -> Listing:
    """The split's files, by name. Raises UserError, or Outage.

    Asked for once in a process.
    """
    other: dict[str, Any] = dict.fromkeys(("portion", "max_tokens", "tokens", "messages"))
    other |= dict.fromkeys(("contents", "file_language"))
    return _list_files(replace(split, text_field="", **other))


@lru_cache(maxsize=256)
def _list_files(split: "HubSplit") -> Listing:
    from datasets import load_dataset_builder
    from tqdm import tqdm

    end_silence()
    # A lock that it finds unset, `datasets` (5.2) deletes after use, under another thread that uses it.
    tqdm.get_lock()
    files = split.data_files if isinstance(split.data_files, str | None) else [*split.data_files]
    try:
        builder = load_dataset_builder(
            split.hub_id, split.config, revision=split.revision, data_files=files
        )
        known = {str(name): files for name, files in (builder.config.data_files or {}).items()}
        if split.split not in known:
            raise ValueError(f"no split {split.split!r}; known: {', '.join(known)}")
        base = str(builder.base_path)
        if not base.startswith("hf://"):
            base = str(Path(split.hub_id).absolute())
        sizes = _sizes([str(file) for file in known[split.split]])
    except Exception as error:  # any error of network, hub, licence gate or layout
        raise refusal(error, where(split), REMEDY) from error
    names = {file.removeprefix(base).lstrip("/"): size for file, size in sizes.items() if size}
    if not names:
        raise UserError(f"{where(split)}: its files are empty; {REMEDY}")
    for name in names:
        if not name.lower().endswith((*LINES, ".parquet")):
            raise UserError(f"{where(split)}: {name}: not parquet or lines of JSON; {REMEDY}")
    revision = base.rpartition("@")[2] if base.startswith("hf://") else str(split.revision)
    return Listing(revision, tuple(StoredFile(*one) for one in sorted(names.items())))


def _sizes(paths: Sequence[str]) -> dict[str, int]:
    if not paths[0].startswith("hf://"):
        return {path: Path(path).stat().st_size for path in paths}
    from huggingface_hub import HfFileSystem

    files, sizes = HfFileSystem(), dict[str, int]()
    for folder in sorted({path.rpartition("/")[0] for path in paths}):
        entries: list[Any] = files.ls(folder, detail=True, expand_info=False)
        sizes |= {f"hf://{entry['name']}": entry["size"] for entry in entries}
    return {path: sizes[path] for path in paths}


class Reading:
    """The rows of one file, handed out from one share of it to the next without a second look."""

    def __init__(self, split: "HubSplit", unit: Unit):
        file, start = StoredFile(unit.file, unit.file_bytes), unit.start
        self.at = start
        self.waiting: tuple[float, int, Row] | None = None
        if file.name.lower().endswith(".parquet"):
            self.pieces: Pieces | None = None
            # What is asked for and not needed is a small part of a portion, which is many units.
            ahead = min(max(int(unit.stored_bytes / 32), least_bytes(file.bytes)), BLOCK_BYTES)
            self.rows = _table_rows(Table(split, file), split, start, ahead)
        else:
            self.pieces, self.at = Pieces(StoredRange(split, file)), 0.0
            self.rows = _lines(self.pieces)
            for _ in self.until(start) if start else ():
                pass

    def until(self, stop: float) -> Iterator[tuple[int, Row]]:
        """(number from 1, row) of those that end before or at this share of the file."""
        if self.pieces:
            self.pieces.stop, self.pieces.behind = math.ceil(stop * self.pieces.size), 1
        while row := self.waiting or next(self.rows, None):
            self.waiting = row
            if row[0] > stop:
                break
            self.waiting = None
            yield row[1:]
        self.at = stop


def _lines(pieces: Pieces) -> Iterator[tuple[float, int, Row]]:
    """(share of the stored bytes at its end, number, line)."""
    stream = _decompressed(pieces)
    number, size, parts = 1, 0, list[bytes]()
    while chunk := stream.read1(1 << 20):
        share = pieces.at / pieces.size
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            size += len(end)
            yield share, number, None if size > MOST_ROW_BYTES else b"".join((*parts, end))
            number, size, parts = number + 1, 0, []
        size += len(rest)
        parts = [*parts, rest] if size <= MOST_ROW_BYTES else []
    if size:
        yield 1.0, number, None if size > MOST_ROW_BYTES else b"".join(parts)


def _decompressed(pieces: Pieces) -> io.BufferedIOBase | Any:
    name, stored = pieces.file.file.name.lower(), io.BufferedReader(pieces, pieces.piece)
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=stored)
    if name.endswith(".zst"):
        from zstandard import ZstdDecompressor

        return ZstdDecompressor(max_window_size=1 << 31).stream_reader(
            stored, read_size=pieces.piece, read_across_frames=True
        )
    return stored


def _table_rows(
    file: Table, split: "HubSplit", start: float, ahead: int
) -> Iterator[tuple[float, int, Row]]:
    """(share of the rows at its end, number, row), from the row group on in which `start` lies.
    `ahead`: bytes that are read at once of a column."""
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file, buffer_size=ahead, pre_buffer=False) as table:
        columns = _columns(split, table)
        rows, number = table.metadata.num_rows, 0
        for group in range(table.metadata.num_row_groups if rows else 0):
            size = table.metadata.row_group(group)
            if (number + size.num_rows) / rows <= start:
                number += size.num_rows
                continue
            file.pages.begin(table.metadata, group, columns)
            # Of a batch all pages are fetched.
            share = min(BATCH_BYTES / max(size.total_byte_size, 1), ahead / file.pages.stored_bytes)
            batch_rows = min(max(int(share * size.num_rows), 1), 1000)
            for batch in table.iter_batches(
                batch_rows, row_groups=[group], columns=columns, use_threads=False
            ):
                for row in _batch_rows(batch):
                    number += 1
                    if number / rows > start:
                        yield number / rows, number, row


def _batch_rows(batch: Any) -> Iterator[Row]:
    if batch.nbytes <= MOST_ROW_BYTES:
        yield from batch.to_pylist()
        return
    for place in range(batch.num_rows):
        row = batch.slice(place, 1)
        yield (
            None
            if row.get_total_buffer_size() > MOST_ROW_BYTES < row.nbytes
            else row.to_pylist()[0]
        )


# The file that this process reads, so that its next unit begins where the last one ended.
_reading: tuple[tuple[str, str | None, str, TextField, str | None], Reading] | None = None


def texts(split: "HubSplit", unit: Unit, counts: Counts) -> Iterator[tuple[int, str]]:
    """(number of the row in the file, text) of a unit; rows of too many bytes are counted.

    `split` is pinned to the revision that it was listed at. Raises UserError, or Outage, naming the
    file and the row.
    """
    global _reading
    place = (split.hub_id, split.revision, unit.file, split.text_field, split.contents)
    with _errors_name(split, unit.file) as at:
        if _reading and _reading[0] == place and _reading[1].at == unit.start:
            reading = _reading[1]
        else:
            reading = Reading(split, unit)
        _reading = None
        rows = _parsed(reading.until(unit.stop), counts, at)
        if split.contents:
            yield from contents(blobs(rows, split.file_language or ()), counts)
        else:
            yield from ((n, text_of(row, split.text_field, split.messages)) for n, row in rows)
        _reading = place, reading


def check_file(split: "HubSplit", file: StoredFile) -> None:
    """Refuse a file that is not to be read, or has no such field, by its header or first line."""
    from pyarrow.parquet import ParquetFile

    with _errors_name(split, file.name) as at:
        if file.name.lower().endswith(".parquet"):
            with ParquetFile(StoredRange(split, file)) as table:
                _columns(split, table)
        else:
            lines = ((n, row) for _, n, row in _lines(Pieces(StoredRange(split, file))))
            rows = _parsed(lines, Counts(), at)
            for row in rows:
                if split.contents:
                    next(blobs([row]), None)
                else:
                    text_of(row[1], split.text_field, split.messages)
                break


def _parsed(
    rows: Iterable[tuple[int, Row]], counts: Counts, at: "_At"
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows with their numbers, blank lines and those of too many bytes left out."""
    counts.left_out.setdefault("too_large", 0)
    for at.row, row in rows:
        if row is None:
            counts.read += 1
            counts.left_out["too_large"] += 1
        elif not isinstance(row, bytes):
            yield at.row, row
        elif row.strip():
            yield at.row, json.loads(row.decode("utf-8-sig"))


@dataclass
class _At:
    row: int = 0


@contextmanager
def _errors_name(split: "HubSplit", file: str) -> Iterator[_At]:
    """Errors of the block name the file, and the row that was read last."""
    at = _At()
    try:
        yield at
    except Exception as error:  # any error of network, hub, licence gate or format
        place = f"{where(split)}: {file}" + (f", row {at.row}" if at.row else "")
        if isinstance(error, UserError):
            raise type(error)(f"{place}: {error}") from error
        if isinstance(error, ValueError | RecursionError):
            raise UserError(f"{place}: {reason(error)}; {REMEDY}") from error
        raise refusal(error, place, REMEDY) from error


def _columns(split: "HubSplit", table: Any) -> list[str]:
    """The columns of a table that are read: of ids, only these of what the rows say of each file."""
    if split.contents:
        return id_columns([table.schema.column(n).path for n in range(len(table.schema.names))])
    names = [split.text_field] if isinstance(split.text_field, str) else list(split.text_field)
    check_fields(names, table.schema_arrow.names)
    return names
