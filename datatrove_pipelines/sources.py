"""A source's documents, as they stand in a jsonl file or on the hub; nothing is filtered here."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datatrove.data import Document

Step = Callable[..., "Iterator[Document]"]


class ShardError(ValueError):
    """A source that cannot be tokenised or a shard that is not whole. One line, with the remedy."""


@dataclass(frozen=True)
class SourceJob:
    """One source to tokenise: plain values, resolved by launch."""

    name: str
    # {"kind": "jsonl", "path": file} or
    # {"kind": "hub", "hub_id", "config", "split", "revision", "data_files", "max_tokens"};
    # "text_field" is a column or a list of columns, joined by a blank line ("text" if absent).
    read: dict[str, Any]
    slice: tuple[float, float] = (0.0, 1.0)  # [start, stop) of the documents, by hash
    held_out_fraction: float = 0.0  # these documents are never written
    seed: int = 0


def reader(job: SourceJob) -> Step:
    """The first step of a source's pipeline."""
    return _read_jsonl(job) if job.read["kind"] == "jsonl" else _read_hub(job)


def read_documents(job: SourceJob) -> "Iterator[Document]":
    """All documents of a source, in its order, held-out ones included."""
    return reader(job)(None)


def clean(text: str) -> str:
    """The text without NULs. The published sets are filtered already; nothing else is touched."""
    return text.replace("\x00", "")


def _text(row: dict[str, Any], text_field: str | list[str]) -> str:
    """The text of a row; several fields are joined by a blank line, null ones left out."""
    fields = [text_field] if isinstance(text_field, str) else text_field
    if missing := [name for name in fields if name not in row]:
        raise ValueError(
            f"no field {missing[0]!r} among {sorted(row)}: correct text_field in sources.yaml"
        )
    text = "\n\n".join(row[name] for name in fields if row[name] is not None)
    # JSON can spell half of a surrogate pair, which is no character.
    return text.encode("utf-8", "replace").decode("utf-8")


def _read_jsonl(job: SourceJob) -> Step:
    """Read a .jsonl or .jsonl.gz file; datatrove's own reader skips broken lines in silence."""
    path = Path(job.read["path"])
    text_field = job.read.get("text_field", "text")

    def read(data: Any, rank: int = 0, world_size: int = 1) -> "Iterator[Document]":
        from datatrove.data import Document

        number = 0
        try:
            with (gzip.open if path.suffix == ".gz" else open)(
                path, "rt", encoding="utf-8"
            ) as file:
                for number, line in enumerate(file, start=1):
                    yield Document(_text(json.loads(line), text_field), f"{path.name}/{number}")
        except (ValueError, TypeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ShardError(
                f"source {job.name}: {path}, line {number or 1} or the next: {error}; delete the "
                "file and run the stage that writes it again"
            ) from error

    return read


def _read_hub(job: SourceJob) -> Step:
    """Stream a split of a hub dataset, or of a local folder in the same format.

    The `datasets` library finds the files of a config and split in the repository's card, whatever
    their format; nothing is downloaded whole.
    """
    read_from, text_field = job.read, job.read.get("text_field", "text")

    def adapter(self: Any, row: dict[str, Any], path: str, number: int | str) -> dict[str, Any]:
        return {"text": _text(row, text_field), "id": f"{path}/{number}"}

    def read(data: Any, rank: int = 0, world_size: int = 1) -> "Iterator[Document]":
        from datatrove.pipeline.readers import HuggingFaceDatasetReader

        options = {
            "name": read_from.get("config"),
            "split": read_from["split"],
            "revision": read_from["revision"],
        }
        if read_from.get("data_files"):
            options["data_files"] = read_from["data_files"]
        reader = HuggingFaceDatasetReader(
            str(read_from["hub_id"]), dataset_options=options, streaming=True, adapter=adapter
        )
        documents = reader.run(None, rank, world_size)
        while True:
            try:
                document = next(documents)
            except StopIteration:
                return
            except Exception as error:  # whatever network, hub, licence gate or format bring
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise ShardError(
                    f"source {job.name}: reading {read_from['hub_id']} "
                    f"({read_from.get('config') or 'default'}, "
                    f"{read_from['split']}) failed: {reason}; check recipes/sources.yaml, and "
                    "for a gated set accept its terms and run `hf auth login`"
                ) from error
            yield document

    return read
