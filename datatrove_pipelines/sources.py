"""A source's documents, as they are in files or on the hub; there is no filter here."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datatrove_pipelines.counts import Step
from datatrove_pipelines.executors import run_in_threads
from datatrove_pipelines.text_files import TextField, text_files, text_of, texts
from ground.errors import UserError
from ground.hub import end_silence, refusal

if TYPE_CHECKING:
    from datatrove.data import Document


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
    data_files: str | tuple[str, ...] | None = None  # where the config holds more than the source
    max_tokens: int | None = None  # longer documents are left out
    text_field: TextField = "text"
    portion: tuple[int, int] | None = None  # tokens to leave out, then to read; None: all
    tokens: int | None = None  # of the whole split, as published; None: not known
    contents: str | None = None  # software-heritage: the rows are ids of blobs there


@dataclass(frozen=True)
class OwnText:
    """The user's own text: a file, or a folder that is read with all its subfolders.

    text_files.py says which kinds of files are read. Exact duplicates and white space at a
    document's ends are dropped: the held-out split treats texts that differ only there as one.
    """

    path: Path
    text_field: TextField = "text"


@dataclass(frozen=True)
class SourceJob:
    """One source to tokenise: plain values, resolved by launch."""

    name: str
    read: JsonlFile | HubSplit | OwnText
    slice: tuple[float, float] = (0.0, 1.0)  # [start, stop) of the documents, by hash
    held_out_fraction: float = 0.0  # these documents are never written
    seed: int = 0
    least_tokens: int = 0  # with fewer, all documents are written again until there are as many


@contextmanager
def errors_name(source: str) -> Iterator[None]:
    """Every UserError of the block begins with the source's name."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"source {source}: {error}") from error


def reader(job: SourceJob, tokens_of: Callable[[str], float] = len) -> Step:
    """The first step of a source's pipeline; `tokens_of` measures a portion."""

    def read(data: Any, rank: int = 0, world_size: int = 1) -> "Iterator[Document]":
        with errors_name(job.name):
            match job.read:
                case HubSplit(portion=None) as split:
                    yield from _read_hub(split)
                case HubSplit(portion=(skip, take)) as split:
                    yield from _portion(partial(_read_hub, split), skip, take, tokens_of)
                case JsonlFile() as file:
                    yield from _read_file(file)
                case OwnText() as own:
                    yield from _read_own(own)

    return read


def read_documents(job: SourceJob) -> "Iterator[Document]":
    """All documents of a source, in its order, held-out ones included."""
    return reader(job)(None)


def check_readable(jobs: Iterable[SourceJob]) -> None:
    """Read a document of each source, of all at once: one that is not there, not permitted or
    without its column is known before the first is read whole. What a stage wrote is taken as it is."""
    run_in_threads(_read_one, [job for job in jobs if not isinstance(job.read, JsonlFile)])


def _read_one(job: SourceJob) -> None:
    if isinstance(job.read, HubSplit):  # a portion begins far inside
        job = replace(job, read=replace(job.read, portion=None))
    next(read_documents(job), None)


def clean(text: str) -> str:
    """The text without NULs. The published sets are filtered already; nothing else is touched."""
    return text.replace("\x00", "")


def _read_file(read: JsonlFile) -> "Iterator[Document]":
    remedy = "delete the file and run the stage that writes it again"
    return _documents(read.path, read.path.name, read.text_field, remedy)


def _read_own(own: OwnText) -> "Iterator[Document]":
    """The documents of all files, in the order of the files' names."""
    remedy = "correct it, or take the file out of the source"
    for name, file in text_files(own.path).items():
        for document in _documents(file, name, own.text_field, remedy):
            document.text = clean(document.text).strip()
            yield document


def _documents(file: Path, name: str, text_field: TextField, remedy: str) -> "Iterator[Document]":
    from datatrove.data import Document

    for number, text in texts(file, text_field, remedy):
        yield Document(text, f"{name}/{number}")


def _portion(
    source: "Callable[[], Iterator[Document]]",
    skip: float,
    take: float,
    tokens_of: Callable[[str], float],
) -> "Iterator[Document]":
    """The documents that begin after `skip` tokens and before `skip` + `take`.

    Portions one after the other are the source, each document once. A source that ends before goes
    on from its start, at most to where the portion began.
    """
    position, taken, skipped = 0.0, 0.0, 0
    for document in source():
        if position >= skip + take:
            return
        tokens = tokens_of(document.text)
        if position >= skip:
            taken += tokens
            yield document
        else:
            skipped += 1
        position += tokens
    for document in islice(source(), skipped) if skipped else ():
        if taken >= take:
            return
        taken += tokens_of(document.text)
        yield document


def _read_hub(split: HubSplit) -> "Iterator[Document]":
    """Stream a split; nothing is downloaded whole.

    The `datasets` library finds the files of a config and split in the repository's card, whatever
    their format.
    """
    from datatrove.pipeline.readers import HuggingFaceDatasetReader

    def adapter(self: Any, row: dict[str, Any], path: str, number: int | str) -> dict[str, Any]:
        return {"text": text_of(row, split.text_field), "id": f"{path}/{number}"}

    options: dict[str, Any]
    options = {"name": split.config, "split": split.split, "revision": split.revision}
    if files := split.data_files:
        options["data_files"] = files if isinstance(files, str) else list(files)
    end_silence()
    try:
        yield from HuggingFaceDatasetReader(
            split.hub_id, dataset_options=options, streaming=True, adapter=adapter
        ).run()
    except Exception as error:  # any error of network, hub, licence gate or format
        where = f"{split.hub_id}@{split.revision} ({split.config or 'default'}, {split.split})"
        raise refusal(error, where, "check its row in recipes/sources.yaml") from error
