"""A source's documents, as they stand in files or on the hub; nothing is filtered here."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ground.errors import UserError

if TYPE_CHECKING:
    from datatrove.data import Document

Step = Callable[..., "Iterator[Document]"]
TextField = str | Sequence[str]  # a column, or several that are joined by a blank line


@dataclass(frozen=True)
class JsonlFile:
    """A .jsonl or .jsonl.gz file that a stage has written."""

    path: Path
    text_field: TextField = "text"


@dataclass(frozen=True)
class HubSplit:
    """A split of a dataset on the hub, or of a local folder in the same format."""

    hub_id: str
    config: str | None
    split: str
    revision: str | None
    data_files: str | None = None  # where the config holds more than the source
    max_tokens: int | None = None  # longer documents are left out
    text_field: TextField = "text"


@dataclass(frozen=True)
class SourceJob:
    """One source to tokenise: plain values, resolved by launch."""

    name: str
    read: JsonlFile | HubSplit
    slice: tuple[float, float] = (0.0, 1.0)  # [start, stop) of the documents, by hash
    held_out_fraction: float = 0.0  # these documents are never written
    seed: int = 0


@contextmanager
def errors_name(source: str) -> Iterator[None]:
    """Every UserError of the block begins with the source's name."""
    try:
        yield
    except UserError as error:
        raise UserError(f"source {source}: {error}") from error


def reader(job: SourceJob) -> Step:
    """The first step of a source's pipeline."""

    def read(data: Any, rank: int = 0, world_size: int = 1) -> "Iterator[Document]":
        with errors_name(job.name):
            yield from (
                _read_hub(job.read) if isinstance(job.read, HubSplit) else _read_files(job.read)
            )

    return read


def read_documents(job: SourceJob) -> "Iterator[Document]":
    """All documents of a source, in its order, held-out ones included."""
    return reader(job)(None)


def clean(text: str) -> str:
    """The text without NULs. The published sets are filtered already; nothing else is touched."""
    return text.replace("\x00", "")


def _text_of(row: Any, text_field: TextField) -> str:
    """The text of a row; several fields are joined by a blank line, null ones left out."""
    if not isinstance(row, dict):
        raise ValueError(f"{type(row).__name__} where an object is wanted")
    fields = [text_field] if isinstance(text_field, str) else text_field
    for name in fields:
        if name not in row:
            raise ValueError(
                f"no field {name!r} among {sorted(row)}: correct text_field in sources.yaml"
            )
        if not isinstance(row[name], str | None):
            raise ValueError(f"field {name!r} holds {type(row[name]).__name__}, not text")
    text = "\n\n".join(row[name] for name in fields if row[name] is not None)
    # JSON can spell half of a surrogate pair, which is no character.
    return text.encode("utf-8", "replace").decode("utf-8")


def _open(file: Path) -> IO[bytes]:
    return gzip.open(file) if file.name.endswith(".gz") else file.open("rb")  # type: ignore[return-value]


def _read_files(read: JsonlFile) -> "Iterator[Document]":
    """A document a line; datatrove's own reader skips broken lines in silence."""
    from datatrove.data import Document

    remedy = "delete the file and run the stage that writes it again"
    file, number = read.path, 0
    try:
        with _open(file) as lines:
            for number, line in enumerate(lines, start=1):
                text = _text_of(json.loads(line.decode("utf-8")), read.text_field)
                yield Document(text, f"{file.name}/{number}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}, line {number}: {error}; {remedy}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}, after line {number}: {error}; {remedy}") from error


def _read_hub(split: HubSplit) -> "Iterator[Document]":
    """Stream a split; nothing is downloaded whole.

    The `datasets` library finds the files of a config and split in the repository's card, whatever
    their format.
    """
    from datatrove.pipeline.readers import HuggingFaceDatasetReader

    def adapter(self: Any, row: dict[str, Any], path: str, number: int | str) -> dict[str, Any]:
        return {"text": _text_of(row, split.text_field), "id": f"{path}/{number}"}

    options = {"name": split.config, "split": split.split, "revision": split.revision}
    if split.data_files:
        options["data_files"] = split.data_files
    try:
        yield from HuggingFaceDatasetReader(
            split.hub_id, dataset_options=options, streaming=True, adapter=adapter
        ).run()
    except Exception as error:  # whatever network, hub, licence gate or format bring
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"reading {split.hub_id} ({split.config or 'default'}, {split.split}) failed: {reason}; "
            "check recipes/sources.yaml, and for a gated set accept its terms and run "
            "`hf auth login`"
        ) from error
