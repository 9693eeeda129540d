"""From sources to their shard folders: which units are needed, tokenised anywhere in any order.

    <cache>/shards/<name>-<hash>.building/   listing.json   00000/ 00001/ ...   units that are whole

A source's shards are the shortest prefix of its units that holds the tokens that are asked for, so
they do not depend on who built which unit, when, or how often a build was killed. A file is read in
one go by one task, which looks before each further unit whether it is still needed.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice, takewhile
from pathlib import Path

from datatrove_pipelines.clusters import run_units_on
from datatrove_pipelines.counts import summed
from datatrove_pipelines.fast_tokenizer import encoder, why_slow
from datatrove_pipelines.hub_files import Listing
from datatrove_pipelines.pipeline import build_unit
from datatrove_pipelines.progress import progress
from datatrove_pipelines.shards import (
    UNIT_FILE,
    ShardInfo,
    UnitInfo,
    check_shards,
    content_hash,
    has_its_files,
    is_whole,
    read_info,
    seal_shards,
    shard_folder,
    write_info,
)
from datatrove_pipelines.sources import (
    HubSplit,
    SourceJob,
    check_readable,
    listed,
    pinned,
    ratio_of,
    units_of,
)
from datatrove_pipelines.units import StoredFile, Unit
from ground.errors import Outage, UserError, disk_error
from ground.files import folder_aside, read_json_object, write_json

CAUTION = 0.9  # what units in work are taken to hold of what is estimated


class Source:
    """A source under way: its units, and those that are on the disk."""

    def __init__(self, job: SourceJob, folder: Path, listing: Listing | None):
        self.job, self.folder, self.listing = pinned(job, listing), folder, listing
        self.building = _building(folder)
        self._units, self._more = list[Unit](), units_of(job, listing)
        self._finished = dict[int, UnitInfo]()
        self._counted, self._stored = 0, 0.0  # tokens and stored bytes of these
        self._looked, self._held, self._open = 0, 0, list[Unit]()  # of `is_needed`

    def __reduce__(self) -> tuple[type, tuple[SourceJob, Path, Listing | None]]:
        return Source, (self.job, self.folder, self.listing)

    @cached_property
    def wanted_tokens(self) -> int | None:
        """None: all that there are."""
        read = self.job.read
        return read.portion[1] if isinstance(read, HubSplit) and read.portion else None

    @cached_property
    def estimated_ratio(self) -> float:
        """Tokens of a stored byte."""
        if self.listing is None or not isinstance(self.job.read, HubSplit):
            return 0.0
        return ratio_of(self.job.read, self.listing.files)

    @property
    def expected_tokens(self) -> float:
        stored = sum(file.bytes for file in self.listing.files) if self.listing else 0
        return min(stored * self.estimated_ratio, self.wanted_tokens or math.inf)

    def units(self, first: int = 0) -> Iterator[Unit]:
        """Units in order, cut when they are asked for: a small portion of a large set has many."""
        number = first
        while True:
            while len(self._units) <= number:
                if (unit := next(self._more, None)) is None:
                    return
                self._units.append(unit)
            yield self._units[number]
            number += 1

    @property
    def cache(self) -> Path:
        return self.folder.parents[1]

    def unit_folder(self, number: int) -> Path:
        return self.building / f"{number:05}"

    def finished(self, unit: Unit) -> UnitInfo | None:
        """What is on the disk of a unit, if it is whole."""
        folder = self.unit_folder(unit.number)
        if unit.number not in self._finished:
            with suppress(OSError, ValueError, TypeError):
                text = (folder / UNIT_FILE).read_text("utf-8")
                info = UnitInfo(**json.loads(text))
                same = (info.file, info.start, info.stop) == (unit.file, unit.start, unit.stop)
                if same and has_its_files(folder, info):
                    self._finished[unit.number] = info
                    self._counted += info.tokens
                    self._stored += unit.stored_bytes
        return self._finished.get(unit.number)

    def needed(self) -> Iterator[Unit]:
        """Units up to the tokens that are wanted: counted where finished, else estimated."""
        total = 0.0
        for unit in self.units():
            if self.wanted_tokens is not None and total >= self.wanted_tokens:
                return
            yield unit
            info = self.finished(unit)
            total += info.tokens if info else unit.stored_bytes * self._ratio()

    def is_needed(self, unit: Unit, caution: float) -> bool:
        """Whether `unit` is among `needed`. Asked of one after another, it looks at each unit before
        it once, and again only at those that were not finished then."""
        if self.wanted_tokens is None:
            return True
        if unit.number < self._looked:
            self._looked, self._held, self._open = 0, 0, []
        still_open = []
        for one in (*self._open, *islice(self.units(self._looked), unit.number - self._looked)):
            if info := self.finished(one):
                self._held += info.tokens
            else:
                still_open.append(one)
        self._open, self._looked = still_open, unit.number
        expected = caution * sum(one.stored_bytes for one in still_open) * self._ratio()
        return self._held + expected < self.wanted_tokens

    def _ratio(self) -> float:
        """Tokens of a stored byte: as counted in what is finished, else as estimated."""
        counted = self._counted / self._stored if self._stored else 0.0
        return counted or self.estimated_ratio

    def missing(self) -> Iterator[int]:
        """The first missing unit of each file of which a unit is needed."""
        last = None
        for unit in self.needed():
            if self.finished(unit) is None and unit.file != last:
                last = unit.file
                yield unit.number


def _building(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.building")


@dataclass(frozen=True)
class ReadFiles:
    """The tasks of several sources: each reads a file from one unit of it on."""

    sources: tuple[Source, ...]
    tokenizer: Path

    def __call__(self, number: int) -> None:
        source, first = self._at(number)
        units = source.units(first.number)
        for unit in takewhile(lambda unit: unit.file == first.file, units):
            # Sooner one too many than to fetch all that comes before in the file once more.
            caution = 1.0 if unit is first else CAUTION
            if not source.is_needed(unit, caution):
                return
            if not source.finished(unit):
                with _disk_errors(source):
                    folder = source.unit_folder(unit.number)
                    build_unit(source.job, unit, self.tokenizer, folder, source.cache)

    def source(self, number: int) -> str:
        return self._at(number)[0].folder.name

    def label(self, number: int) -> str:
        source, unit = self._at(number)
        return f"source {source.job.name}" + (f": {unit.file}" if unit.file else "")

    def all(self) -> list[int]:
        """The tasks by which, as estimated, all sources have their tokens."""
        return [number for source in self.sources for number in self.more(source.folder.name)]

    def more(self, source: str) -> list[int]:
        place = next(n for n, one in enumerate(self.sources) if one.folder.name == source)
        return [first * len(self.sources) + place for first in self.sources[place].missing()]

    def _at(self, number: int) -> tuple[Source, Unit]:
        first, place = divmod(number, len(self.sources))
        return self.sources[place], next(self.sources[place].units(first))


def tokenize_source(job: SourceJob, tokenizer: Path, cache: Path) -> ShardInfo:
    """The shards of `job`, built when they are missing. `tokenizer` is a folder with tokenizer.json."""
    return tokenize_all([job], tokenizer, cache, 1)[0]


def tokenize_all(
    jobs: Sequence[SourceJob],
    tokenizer: Path,
    cache: Path,
    workers: int,
    executor: str = "local",
) -> list[ShardInfo]:
    """The shards of all `jobs`, in order; the missing ones are built by `workers` processes of
    `executor` (local, slurm or ray).

    Nothing is built before all are known to be readable. A failure stops no other unit or source,
    and what is built is kept: UserError names the first, Outage where all are the hub's.
    """
    from filelock import FileLock

    folders = [shard_folder(job, tokenizer, cache) for job in jobs]
    missing = {f: job for f, job in zip(folders, jobs, strict=True) if not is_whole(f)}
    for folder in {*folders} - {*missing}:  # a kill came before the last step
        shutil.rmtree(_building(folder), ignore_errors=True)
    check_readable(missing.values())
    if missing and (reason := why_slow(tokenizer)):
        print(f"{tokenizer}: {reason}: tokenised by the tokenizers library, several times slower")
    with ExitStack() as locks:
        for folder in sorted(missing):  # in one order, or two processes wait for each other
            folder.parent.mkdir(parents=True, exist_ok=True)
            locks.enter_context(FileLock(f"{folder}.lock"))
            if is_whole(folder):  # another process built it meanwhile
                del missing[folder]
        failures = _build(
            [_begin(job, folder) for folder, job in missing.items()],
            tokenizer,
            lambda task: run_units_on(executor, task, task.all(), workers, cache),
        )
    if failures:
        raise _one_line(failures)
    return [read_info(folder) for folder in folders]


def _begin(job: SourceJob, folder: Path) -> Source:
    """A source with the files that it was first listed with: a branch may move on meanwhile."""
    source = Source(job, folder, None)
    file = source.building / "listing.json"
    with _disk_errors(source):
        if file.exists():
            values = read_json_object(file, "delete the folder")
            files = tuple(StoredFile(**one) for one in values["files"])
            return Source(job, folder, Listing(values["revision"], files))
        source.building.mkdir(exist_ok=True)
        if listing := listed(job):
            write_json(file, asdict(listing), indent=None)
        return Source(job, folder, listing)


def _build(
    sources: Sequence[Source],
    tokenizer: Path,
    run: "Callable[[ReadFiles], dict[int, Exception]]",
) -> list[Exception]:
    """The shard folders of all sources but those that failed; returns why they did."""
    task = ReadFiles(tuple(sources), tokenizer)
    expected = {source.building: source.expected_tokens for source in sources}
    with progress(expected, encoder(tokenizer).token_bytes):
        failures = run(task)
    failed = {task.source(number) for number in failures}
    errors = list(failures.values())
    for source in sources:
        if source.folder.name in failed:
            with suppress(OSError):  # of which nothing is finished
                source.building.rmdir()
        elif next(source.missing(), None) is None:
            try:
                with _disk_errors(source):
                    _assemble(source, tokenizer)
            except UserError as error:
                errors.append(error)
    return errors


def _assemble(source: Source, tokenizer: Path) -> None:
    """The shortest prefix of units that holds the tokens, as the source's shard folder."""
    units = [info for unit in source.needed() if (info := source.finished(unit))]
    tokens = sum(unit.tokens for unit in units)
    left_out, changed = summed(u.left_out for u in units), summed(u.changed for u in units)
    if not tokens:
        shutil.rmtree(source.building)
        reasons = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in left_out.items())
        raise UserError(
            f"source {source.job.name}: no document is left ({reasons}): give it more text or a "
            "larger slice"
        )
    times = max(-(-source.job.least_tokens // tokens), 1)
    placed = [replace(one, number=n) for n, one in enumerate(units * times)]
    with folder_aside(source.folder) as output:
        for unit, copy in zip(units * times, placed, strict=True):
            for file in source.unit_folder(unit.number).glob("*.ds*"):
                os.link(file, output / f"{copy.number:05}.{file.name.partition('.')[2]}")
        encode = encoder(tokenizer)
        documents, size = sum(u.documents for u in placed), sum(u.bytes for u in placed)
        sizes = (times * tokens, documents, size, encode.token_bytes, encode.eos_id)
        job, counts = source.job, (left_out, sum(u.read for u in units), changed)
        texts = content_hash(job.decontaminate) if job.decontaminate and not job.only_report else ""
        write_info(ShardInfo(job.name, output, *sizes, *counts, placed, texts))
        check_shards(output, encode.eos_id)
        seal_shards(output)
    shutil.rmtree(source.building)


@contextmanager
def _disk_errors(source: Source) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(source.folder)
        if line := disk_error(error):
            raise UserError(f"source {source.job.name}: {line}") from error
        raise


def _one_line(failures: Sequence[Exception]) -> Exception:
    """All failures as one; a bug is raised as it is."""
    for error in failures:
        if not isinstance(error, UserError):
            return error
    first = next((one for one in failures if not isinstance(one, Outage)), failures[0])
    for error in failures[: len(failures) if len(failures) > 1 else 0]:
        print(error, flush=True)
    more = f" (and {len(failures) - 1} more, printed above)" if len(failures) > 1 else ""
    return type(first)(f"{first}{more}")
