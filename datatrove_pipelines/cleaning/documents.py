"""A unit's documents as cleaning passes them on, with what that takes of other units and sources.

    <cache>/signatures/<name>-<hash>/<unit>/           the hashes of a unit's documents
    <cache>/near_duplicates/<name>-<hash>/<unit>.npy   the numbers of those to leave out

Near duplicates are found in a pass of its own before the unit is tokenised: over the units that hold
the source's portion, as estimated, and those of earlier sources. Both files are kept for later runs.
"""

from dataclasses import replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from datatrove_pipelines.cleaning.steps import passed_by_filters
from datatrove_pipelines.counts import Counts, Step
from datatrove_pipelines.shards import documents_hash
from datatrove_pipelines.sources import HubSplit, SourceJob, listed, pinned, ratio_of, units_of
from datatrove_pipelines.units import Unit
from ground.files import written_aside

if TYPE_CHECKING:
    from datatrove_pipelines.cleaning.near_duplicates import Numbers


def cleaned(job: SourceJob, unit: Unit, counts: Counts, cache: Path) -> list[Step]:
    """The first steps of a unit's pipeline: its documents, as held-out and training text alike are
    taken from them."""
    steps = passed_by_filters(job, unit, counts)
    if "near_duplicates" in job.clean:
        from datatrove_pipelines.cleaning.near_duplicates import leave_out_numbers

        numbers = _numbers_to_leave_out(job, unit, cache)
        steps.append(leave_out_numbers(counts, "near_duplicates", numbers))
    return steps


def _numbers_to_leave_out(job: SourceJob, unit: Unit, cache: Path) -> "Numbers":
    """The numbers of a unit's documents that the step drops, of those that the filters pass on.

    What is missing is found: the hashes of the units before it, and of earlier sources, are kept.
    """
    import numpy as np

    from datatrove_pipelines.cleaning.near_duplicates import find_near_duplicates

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
        wanted = job.read.portion[1] / ratio_of(job.read, listing.files)
    for unit in units_of(job, listing):
        if stored >= wanted and len(units) >= least:
            break
        units.append(unit)
        stored += unit.stored_bytes
    return units


def _signed(job: SourceJob, unit: Unit, cache: Path) -> Path:
    """The folder of a unit's signatures, written when it is missing."""
    from datatrove_pipelines.cleaning.near_duplicates import write_signatures

    folder = cache / "signatures" / _name(job, cache) / f"{unit.number:05}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            documents: Any = None
            for step in passed_by_filters(pinned(job, listed(job)), unit, Counts()):
                documents = step(documents)
            write_signatures(documents, folder)
    return folder
