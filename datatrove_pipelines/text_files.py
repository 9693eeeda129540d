"""Text in files: which files of a folder hold some, what is in them, and a hash of it all.

    .jsonl  .jsonl.gz  .json.gz  .parquet    one document per row, from one or several columns
    .txt  .txt.gz  .md  .md.gz               one document per file; a long one is cut at blank lines

Nothing is skipped silently: a line that cannot be read is an error that names it (datatrove's own
reader of JSON lines logs a warning and goes on), and files of other kinds are counted.
"""

import gzip
import hashlib
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ground.errors import UserError, first_line
from ground.files import digest, kept_record, write_record

TextField = str | Sequence[str]  # a column, or several that are joined by a blank line
JSON_LINES = (".jsonl", ".jsonl.gz", ".json.gz")
KNOWN = (*JSON_LINES, ".parquet", ".txt", ".txt.gz", ".md", ".md.gz")
PACKED = re.compile(r"\.(jsonl?|parquet|txt|md)\.(zst|xz|bz2|lz4|zip)$")
ROWS_PER_READ = 1000
# Of a longer row the hub's sets lose it, and own text is refused: the longest window has 1 MB of
# text, and a document's tokens are a Python list.
MOST_ROW_BYTES = 32 << 20
# A text file of more characters is several documents, so that some can be held out.
LONG_CHARACTERS = 20_000
PIECE_CHARACTERS = 10_000


def text_files(path: Path) -> dict[str, Path]:
    """The files of known kinds at or below `path` by relative name, sorted; hidden ones left out.

    Raises UserError where there is none, and for a kind of compression that is not read.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; correct the source's path")
    files = {path.name: path} if path.is_file() else dict(sorted(_below(path)))
    known = {name: file for name, file in files.items() if name.lower().endswith(KNOWN)}
    if packed := [file for name, file in files.items() if PACKED.search(name.lower())]:
        raise UserError(f"{packed[0]}: unknown compression; pack it with gzip, as .gz")
    if not known:
        what = f"none of its {len(files)} files holds text" if files else "no file in it"
        raise UserError(f"{path}: {what}; known: {', '.join(KNOWN)}")
    return known


def other_files(path: Path) -> Counter[str]:
    """How many files at or below `path` are of a kind that is not read, by their names' ends."""
    below = [] if path.is_file() else _below(path)
    names = [name for name, _ in below if not name.lower().endswith(KNOWN)]
    return Counter(Path(name).suffix or "none" for name in names)


def _below(folder: Path) -> Iterator[tuple[str, Path]]:
    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: {error.strerror}; make the folder readable")

    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                file = Path(place, name)
                yield file.relative_to(folder).as_posix(), file


def fingerprint(path: Path, cache: Path) -> str:
    """A hash of the relative names and contents of all text files at or below `path`.

    `<cache>/fingerprints.json` keeps each file's hash by path, size and time of change, so that a
    second run does not read the text again. Raises UserError for a file that cannot be read, and
    where all are empty.
    """
    memory = cache / "fingerprints.json"
    known = kept_record(memory) or {}
    hashes, is_changed, size = {}, False, 0
    try:
        for name, file in text_files(path).items():
            status, place = file.stat(), str(file.resolve())
            seen = [status.st_size, status.st_mtime_ns]
            if known.get(place, [])[:2] != seen:
                known[place], is_changed = [*seen, digest(file, 16)], True
            hashes[name] = known[place][2]
            size += status.st_size
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; make it readable") from error
    finally:
        if is_changed:
            write_record(memory, known)
    if not size:
        raise UserError(f"{path}: empty; name files that hold text")
    return hashlib.blake2b(json.dumps(hashes).encode(), digest_size=16).hexdigest()


def texts(file: Path, text_field: TextField, remedy: str) -> Iterator[tuple[int, str]]:
    """(number of the line or row, document) of a file. Raises UserError, naming the line and `remedy`."""
    number, unit = 0, "row" if file.suffix.lower() == ".parquet" else "line"
    try:
        for number, row in enumerate(_rows(file, text_field), start=1):
            if isinstance(row, bytes) and not row.strip():
                continue
            if isinstance(row, bytes) and len(row) <= MOST_ROW_BYTES:
                row = text_of(json.loads(row.decode("utf-8-sig")), text_field)
            elif isinstance(row, dict):
                row = text_of(row, text_field)
            if isinstance(row, bytes) or len(row) > MOST_ROW_BYTES:
                raise ValueError(f"more than {MOST_ROW_BYTES:,} bytes in one document")
            yield number, row
    except (ValueError, RecursionError) as error:
        where = f", {unit} {number}" if number else ""
        raise UserError(f"{file}{where}: {reason(error)}; {remedy}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}, after {unit} {number}: {reason(error)}; {remedy}") from error


def text_of(row: Any, text_field: TextField, messages: str | None = None) -> str:
    """The text of a row, null fields left out; with `messages` its one field is a list of them.

    `plain` are their contents with a blank line between, `chatml` their turns. Raises ValueError.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{type(row).__name__} where an object is wanted")
    fields = [text_field] if isinstance(text_field, str) else text_field
    check_fields(fields, row)
    for name in fields:
        if not messages and not isinstance(row[name], str | None):
            raise ValueError(f"field {name!r} holds {type(row[name]).__name__}, not text")
    parts = [row[name] for name in fields if row[name] is not None]
    if messages:
        parts = [_turn(message, messages) for turns in parts for message in turns]
    text = ("\n" if messages == "chatml" else "\n\n").join(parts)
    # JSON can contain half of a surrogate pair, which is not a character.
    return text.encode("utf-8", "replace").decode("utf-8")


def _turn(message: Any, form: str) -> str:
    """A message, as {role, content}, in ChatML or its content alone."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        raise ValueError("no list of messages with a `content` each; correct `messages`")
    if form == "plain":
        return str(message["content"])
    return f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>"


def check_fields(fields: Sequence[str], columns: Any) -> None:
    if missing := [name for name in fields if name not in columns]:
        raise ValueError(
            f"no field {missing[0]!r} among {sorted(columns)}: name the column in the source's text_field"
        )


def _rows(file: Path, text_field: TextField) -> Iterator[bytes | str | dict[str, Any]]:
    """Lines of JSON, rows of a table, or the whole text of a file."""
    name = file.name.lower()
    if name.endswith(".parquet"):
        yield from _parquet_rows(file, [text_field] if isinstance(text_field, str) else text_field)
        return
    with gzip.open(file) if name.endswith(".gz") else file.open("rb") as lines:
        if name.endswith(JSON_LINES):
            while row := lines.readline(MOST_ROW_BYTES + 1):
                yield row
            return
        content = lines.read()
    try:
        yield from pieces(content.decode("utf-8-sig").replace("\r\n", "\n"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"not UTF-8 in line {line} ({error.reason})") from error


def pieces(text: str) -> Iterator[str]:
    """A long text cut at blank lines, else at line ends, into documents of about 10,000 characters."""
    if len(text) <= LONG_CHARACTERS:
        yield text
        return
    border = "\n\n" if text.count("\n\n") * PIECE_CHARACTERS >= len(text) else "\n"
    paragraphs, size = list[str](), 0
    for paragraph in text.split(border):
        paragraphs.append(paragraph)
        size += len(paragraph) + len(border)
        if size >= PIECE_CHARACTERS:
            yield border.join(paragraphs)
            paragraphs, size = [], 0
    if paragraphs:
        yield border.join(paragraphs)


def _parquet_rows(file: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as table:
            check_fields(columns, table.schema_arrow.names)
            for batch in table.iter_batches(ROWS_PER_READ, columns=list(columns)):
                yield from batch.to_pylist()
    except ArrowException as error:
        raise OSError(str(error)) from error


def reason(error: BaseException) -> str:
    if isinstance(error, json.JSONDecodeError):  # which has its own line numbers
        return f"not JSON at character {error.pos} ({error.msg})"
    return first_line(error)
