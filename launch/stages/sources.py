"""What a source is at a scale: the user's own text, a data set on the hub, or a stand-in."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from inspect import signature
from pathlib import Path
from typing import Any

from ground.errors import UserError, did_you_mean
from ground.hub import Repository
from launch.recipe import load
from launch.recipe.book import canonical, load_recipe, sources_of
from launch.recipe.load import short
from launch.recipe.scale import Scale, scale
from launch.recipe.tables import SourceRow, StandInRow, load_standins
from launch.run.folder import cache_root, runs_root
from launch.stages.cleaning import AS_PUBLISHED, Cleaning, cleaning_of


@dataclass(frozen=True)
class OwnText:
    """The user's own file or folder."""

    path: str
    text_field: str | tuple[str, ...]
    content: str  # hash over names and contents of its files
    cleaning: Cleaning = AS_PUBLISHED

    def values(self) -> dict[str, Any]:
        # Not its path: a folder may move.
        own = {"own_text": self.content, "text_field": self.text_field}
        return own | self.cleaning.values()


@dataclass(frozen=True)
class HubData:
    """A split of a data set on the hub."""

    hub_id: str
    config: str | None
    split: str
    revision: str
    data_files: str | tuple[str, ...] | None
    text_field: str | tuple[str, ...]
    max_tokens: int | None
    portion: tuple[int, int] | None = None  # tokens to leave to earlier stages, and those to read
    contents: str | None = None  # software-heritage: the rows are ids of files there
    file_language: str | tuple[str, ...] | None = None  # of a repository's files, only these
    messages: str | None = None  # plain, chatml: text_field is a list of messages
    tokens: int | None = None  # of the whole split, as published; a portion is measured by them
    cleaning: Cleaning = AS_PUBLISHED

    def values(self) -> dict[str, Any]:
        return self.split_values() | self.cleaning.values()

    def split_values(self) -> dict[str, Any]:
        """The values of a HubSplit."""
        # Added later: what has none of it keeps its identity.
        later = ("portion", "contents", "file_language", "messages", "tokens")
        values = {key: v for key, v in asdict(self).items() if key not in later or v is not None}
        del values["cleaning"]
        if self.portion is None and not self.contents:  # of ids, the bytes say little
            values.pop("tokens", None)
        return values


@dataclass(frozen=True)
class StandInData:
    """The documents of a stand-in whose hash lies in [start, stop) of `slice`."""

    name: str
    row: StandInRow
    slice: tuple[float, float]

    def values(self) -> dict[str, Any]:
        return {"stand_in": {self.name: stand_in_values(self.row)}, "slice": self.slice}


Data = OwnText | HubData | StandInData


def stand_in_values(row: StandInRow) -> dict[str, Any]:
    """The values of the row that the documents depend on; slices say who reads which share."""
    defaults = {"packages": (), "installed": (), "options": {}, "max_bytes": StandInRow.max_bytes}
    values = asdict(row)
    del values["shared_by"]
    return {key: v for key, v in values.items() if key not in defaults or v != defaults[key]}


@dataclass(frozen=True)
class Planned:
    """A stage's mixture under canonical names, as far as its sources are to be had."""

    weights: dict[str, float]
    rows: dict[str, SourceRow]  # of these, and of those that are not
    unreleased: dict[str, str]  # sources that are left out, and what to build in their place
    replaced: dict[str, str]  # sources that were never released, and the row that is read for each


@dataclass(frozen=True)
class Mixture(Planned):
    """With what each source is."""

    data: dict[str, Data]


@cache
def planned(recipe: str, at: Scale) -> Planned:
    """The mixture of a stage's recipe, or of a recipe file, at a scale; no text is looked at.

    What was never released is left out, or replaced under the other's name, whose weight grows.
    """
    scaled = scale(load_recipe(recipe), at)
    found = plan_of(scaled.mixture, sources_of(scaled), at)
    if not found.weights:
        raise UserError(f"{recipe} at {at.arguments}: mixture: no source of it can be had")
    return found


def plan_of(mixture: Mapping[str, float], sources: Mapping[str, SourceRow], at: Scale) -> Planned:
    """A mixture as it is written, whose sources have these rows, as far as they are to be had."""
    found = Planned({}, {}, {}, {})
    for written, weight in mixture.items():
        name = canonical(written, sources)
        row = found.rows[name] = sources[name]
        if not (row.path or row.hub_id or (row.stand_in and at.values.origin == "standin")):
            if not (at.values.substitutes and row.replaced_by):
                found.unreleased[name] = row.substitute or "nothing is known of it"
                continue
            found.replaced[name] = name = canonical(row.replaced_by, sources)
            found.rows[name] = sources[name]
        found.weights[name] = found.weights.get(name, 0.0) + weight
    return found


@cache
def mixture_of(recipe: str, at: Scale) -> Mixture:
    """The mixture of a stage's recipe, or of a recipe file, with what each source is."""
    loaded, plan = load_recipe(recipe), planned(recipe, at)
    own = scale(loaded, at).sources
    data = {}
    for name in plan.weights:
        file = loaded.file if name in own else load.RECIPES / "sources.yaml"
        data[name] = data_of(name, plan.rows[name], at, f"{short(file)}: sources.{name}")
    return Mixture(plan.weights, plan.rows, plan.unreleased, plan.replaced, data)


def mixtures_of(recipes: tuple[str, ...], at: Scale) -> Mixture:
    """Several mixtures as one; weights are those of the first that names a source."""
    mixtures = [mixture_of(recipe, at) for recipe in recipes]
    merged = Mixture({}, {}, {}, {}, {})
    for mixture in reversed(mixtures):
        merged.weights.update(mixture.weights)
        merged.rows.update(mixture.rows)
        merged.data.update(mixture.data)
        merged.unreleased.update(mixture.unreleased)
        merged.replaced.update(mixture.replaced)
    return merged


def data_of(name: str, row: SourceRow, at: Scale, where: str) -> Data:
    """Where a source's text comes from: its path, else what the scale prefers, else the hub.

    `where` is the row's place, for messages.
    """
    if row.path:
        from datatrove_pipelines.text_files import fingerprint

        path = Path(row.path)
        if not path.exists():
            raise UserError(f"{where}.path: {path}: no such file or folder; correct it")
        for variable, root in (("RUNS", runs_root()), ("CACHE", cache_root())):
            if root.resolve().is_relative_to(path.resolve()):
                raise UserError(
                    f"{path}: holds {variable}={root}, which the run writes to; name a folder of "
                    f"your text alone, or another {variable}="
                )
        content = fingerprint(path, cache_root())
        return OwnText(str(path), row.text_field, content, cleaning_of(row, where))
    if row.stand_in and at.values.origin == "standin":
        return StandInData(row.stand_in, load_standins()[row.stand_in], _slice(name, row.stand_in))
    assert row.hub_id and row.split and row.revision  # the row's own check
    return HubData(
        row.hub_id, row.config, row.split, row.revision, row.data_files, row.text_field,
        row.max_tokens, None, row.contents, row.file_language, row.messages,
        tokens=row.tokens, cleaning=cleaning_of(row, where),
    )  # fmt: skip


def _slice(name: str, stand_in: str) -> tuple[float, float]:
    return slices(load_standins()[stand_in].shared_by).get(name, (0.0, 1.0))


def slices(shares: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Disjoint parts [start, stop) of a stand-in's documents, one for each source that shares it."""
    total, start = sum(shares.values()), 0.0
    parts: dict[str, tuple[float, float]] = {}
    for name, share in sorted(shares.items()):
        parts[name] = (start, start + share / total)
        start += share / total
    if parts:
        last = list(parts)[-1]
        parts[last] = (parts[last][0], 1.0)
    return parts


def standins_of(data: Mapping[str, Data]) -> dict[str, StandInRow]:
    """The rows of the stand-ins among these sources."""
    return {one.name: one.row for one in data.values() if isinstance(one, StandInData)}


def build_standins(rows: Mapping[str, StandInRow]) -> dict[str, Path]:
    """The embedded corpus' files for these rows, fetched and built when missing."""
    from datatrove_pipelines.executors import run_in_processes
    from datatrove_pipelines.standins.corpus import StandIn, build, fetch, target

    standins = [StandIn(name=name, **stand_in_values(row)) for name, row in rows.items()]
    missing = [standin for standin in standins if not target(standin, cache_root()).exists()]
    if missing:
        fetch([pin for standin in missing for pin in standin.packages], cache_root())
        run = partial(build, cache=cache_root())
        run_in_processes(run, missing, workers=min(os.cpu_count() or 1, len(missing)))
    return {standin.name: target(standin, cache_root()) for standin in standins}


def check_standins(data: Mapping[str, Data]) -> None:
    """Refuse a stand-in whose reader, an option of it, or category the engine does not know."""
    from datatrove_pipelines.standins.corpus import CATEGORIES
    from datatrove_pipelines.standins.readers import READERS

    for name, row in standins_of(data).items():
        words = {"reader": (row.reader, READERS), "category": (row.category, CATEGORIES)}
        if row.reader in READERS:
            options = list(signature(READERS[row.reader]).parameters)[1:]
            words |= {f"options.{option}": (option, options) for option in row.options}
        for key, (word, known) in words.items():
            if word not in known:
                file = short(load.RECIPES / "standins.yaml")
                hint = did_you_mean(word, known)
                raise UserError(f"{file}: standins.{name}.{key}: {word}: unknown; {hint}")


def repositories(data: Mapping[str, Data]) -> Iterator[Repository]:
    """The data sets on the hub among these sources."""
    file = short(load.RECIPES / "sources.yaml")
    for name, one in data.items():
        if isinstance(one, HubData):
            yield Repository("dataset", one.hub_id, one.revision, f"{file}: sources.{name}")


def build_all(data: Mapping[str, Data]) -> dict[str, Path]:
    """The files of all stand-ins among these sources."""
    rows = standins_of(data)
    return build_standins(rows) if rows else {}


def source_job(
    name: str,
    data: Data,
    files: Mapping[str, Path],
    held_out_fraction: float,
    seed: int = 0,
    least_tokens: int = 0,
) -> Any:
    """What datatrove_pipelines reads: a SourceJob."""
    from datatrove_pipelines import sources

    read: Any
    part = (0.0, 1.0)
    if isinstance(data, StandInData):
        read, part = sources.JsonlFile(files[data.name]), data.slice
    elif isinstance(data, OwnText):
        read = sources.OwnText(Path(data.path), data.text_field)
    else:
        read = sources.HubSplit(**data.split_values())
    job = sources.SourceJob(name, read, part, held_out_fraction, seed, least_tokens)
    return job if isinstance(data, StandInData) else replace(job, **vars(data.cleaning))
