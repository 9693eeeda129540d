"""A source's documents, as they are in files or on the hub; there is no filter here."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datatrove_pipelines import hub_files
from datatrove_pipelines.counts import Counts, Step
from datatrove_pipelines.executors import run_in_threads
from datatrove_pipelines.hub_files import Listing
from datatrove_pipelines.text_files import TextField, text_files, texts
from datatrove_pipelines.units import (
    LANGUAGES,
    TOKENS_A_BYTE_OF_IDS,
    WHOLE,
    StoredFile,
    Unit,
    in_order,
    tokens_a_byte,
    units,
)
from ground.errors import UserError

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
    tokens: int | None = None  # of the whole split, as published
    contents: str | None = None  # software-heritage: the rows are ids of files there
    file_language: str | tuple[str, ...] | None = None  # of a repository's files, only these
    messages: str | None = None  # plain, chatml: text_field is a list of messages


@dataclass(frozen=True)
class OwnText:
    """The user's own text: a file, or a folder that is read with all its subfolders.

    text_files.py says which kinds of files are read. White space at a document's ends is dropped:
    exact duplicates and the held-out split treat texts that differ only there as one.
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
    clean: tuple[str, ...] = ()  # names of cleaning/steps.py
    language: str = "multi"  # ISO 639-3, as cleaning goes by it
    quality_model: Path | None = None  # what the step `educational` reads
    language_model: Path | None = None  # fastText's for the step `language`; None: py3langid
    earlier: "tuple[SourceJob, ...]" = ()  # whose near duplicates the step of that name drops, too
    # A texts file of evaluation tasks: documents that hold an item of it are left out, or only listed.
    decontaminate: Path | None = None
    only_report: bool = False


@contextmanager
def errors_name(source: str) -> Iterator[None]:
    """Every UserError of the block begins with the source's name."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"source {source}: {error}") from error


def listed(job: SourceJob) -> Listing | None:
    """The files of a source on the hub."""
    if not isinstance(job.read, HubSplit):
        return None
    with errors_name(job.name):
        return hub_files.list_files(job.read)


def pinned(job: SourceJob, listing: Listing | None) -> SourceJob:
    """The job that reads the files as they were listed."""
    if listing is None or not isinstance(job.read, HubSplit):
        return job
    return replace(job, read=replace(job.read, revision=listing.revision))


def units_of(job: SourceJob, listing: Listing | None) -> Iterator[Unit]:
    """The parts of a source in its order; what is not on the hub is one unit."""
    if listing is None or not isinstance(job.read, HubSplit):
        return iter([WHOLE])
    files = in_order(listing.files, job.seed, job.name)
    return units(files, ratio_of(job.read, files), job.read.portion)


def ratio_of(split: HubSplit, files: Sequence[StoredFile]) -> float:
    """Estimated tokens of a stored byte of the split's files."""
    of_ids = TOKENS_A_BYTE_OF_IDS / (LANGUAGES if split.file_language else 1)
    return tokens_a_byte(files, split.tokens, of_ids if split.contents else None)


def reader(job: SourceJob, unit: Unit, counts: Counts) -> Step:
    """The first step of a unit's pipeline; rows of too many bytes are counted as left out."""

    def read(data: Any, rank: int = 0, world_size: int = 1) -> "Iterator[Document]":
        with errors_name(job.name):
            match job.read:
                case HubSplit() as split:
                    yield from _read_hub(split, unit, counts)
                case JsonlFile() as file:
                    yield from _read_file(file)
                case OwnText() as own:
                    yield from _read_own(own)

    return read


def read_documents(job: SourceJob) -> "Iterator[Document]":
    """All documents of a source, in its order, held-out ones included."""
    listing = listed(job)
    for unit in units_of(job, listing):
        yield from reader(pinned(job, listing), unit, Counts())(None)


def check_readable(jobs: Iterable[SourceJob]) -> None:
    """List the files of all sources at once and look into one of each: what is not there, not
    permitted or without its column is known before the first is read whole. What a stage wrote is
    taken as it is."""
    run_in_threads(_check, [job for job in jobs if not isinstance(job.read, JsonlFile)])


def _check(job: SourceJob) -> None:
    if not isinstance(job.read, HubSplit):
        next(read_documents(job), None)
    elif listing := listed(job):
        unit = next(units_of(job, listing))
        split = replace(job.read, revision=listing.revision)
        with errors_name(job.name):
            hub_files.check_file(split, StoredFile(unit.file, unit.file_bytes))


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


def _read_hub(split: HubSplit, unit: Unit, counts: Counts) -> "Iterator[Document]":
    from datatrove.data import Document

    for number, text in hub_files.texts(split, unit, counts):
        yield Document(text, f"{unit.file}/{number}")
