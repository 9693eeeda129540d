"""The tables of recipes/: sources, stand-ins, splits, stages, ablations; one typed row per name."""

import os
from collections.abc import Mapping
from dataclasses import field, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import Field

from ground.errors import UserError, did_you_mean
from launch.recipe import load
from launch.recipe.load import Layer, is_recipe_file, parse, read_yaml, short
from launch.recipe.values import (
    Count,
    Flag,
    Many,
    Name,
    OneOrMore,
    Overlay,
    Positive,
    PositiveShare,
    Refused,
    Text,
    section,
)

Row = TypeVar("Row")
Category = Literal["web-en", "web-multilingual", "code", "math", "reasoning", "own"]
Pin = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+==[0-9A-Za-z.+!-]+$")]
# The steps of datatrove_pipelines/cleaning, which a recipe is read without.
CleaningStep = Literal[
    "language", "gopher", "c4", "fineweb", "educational", "duplicates", "near_duplicates", "pii"
]
Tokens = Annotated[int, Field(strict=True, ge=1, le=10**14)]  # more than has been written
Language = Annotated[str, Field(pattern=r"^[a-z]{3}$|^multi$|^[A-Z][A-Za-z-]*$")]


@section
class SourceRow:
    """One row of sources.yaml, whose head explains the keys."""

    same_as: Text | None = None
    hub_id: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None = None
    config: Text | None = None
    split: Text | None = None
    revision: Text | None = None
    path: Text | None = None  # the user's own text: a file, or a folder of files
    licence: Text | None = None
    gated: Flag = False
    data_files: Text | OneOrMore[Text] | None = None  # in place of all files of `config`
    contents: Literal["software-heritage"] | None = None  # the rows are ids of files there
    file_language: Text | OneOrMore[Text] | None = None  # of a repository's files, only these
    tokens: Tokens | None = None  # of the whole source, as published
    clean: Text | OneOrMore[CleaningStep] | None = None  # `published`, or steps of cleaning
    max_tokens: Count | None = None  # longer documents are left out
    text_field: Text | OneOrMore[Text] = "text"
    messages: Literal["plain", "chatml"] | None = None  # text_field is a list of messages
    category: Category = "own"
    language: Language = "multi"
    stand_in: Name | None = None
    substitute: Text | None = None
    replaced_by: Name | None = None  # the row that is read in its place

    def __post_init__(self) -> None:
        if self.hub_id is not None and (self.split is None or self.revision is None):
            key = "split" if self.split is None else "revision"
            raise Refused(key, "empty", "a data set on the hub needs a split and a revision")
        is_missing = self.hub_id is not None and self.clean is None
        if is_missing or (isinstance(self.clean, str) and self.clean != "published"):
            remedy = "write `published` for a set that is published clean, or a list of steps"
            raise Refused("clean", self.clean or "empty", remedy)
        if self.hub_id is not None and self.replaced_by:
            remedy = "it replaces a set that is not public; drop it, or write `hub_id: null`"
            raise Refused("replaced_by", self.replaced_by, remedy)
        of_hub = ("contents", "file_language", "messages", "tokens", "data_files", "config")
        for key in of_hub if self.hub_id is None else ():
            if (value := getattr(self, key)) is not None:
                raise Refused(key, value, "it is of a data set on the hub; drop it, or add hub_id")
        if self.file_language and not self.contents:
            remedy = "it is of a row with `contents`; drop it, or add contents"
            raise Refused("file_language", self.file_language, remedy)
        if self.messages and not isinstance(self.text_field, str):
            raise Refused("text_field", self.text_field, "with `messages`, name their one column")
        if not (self.same_as or self.path or self.stand_in or self.hub_id):
            raise Refused(
                "hub_id", "empty", "name a data set on the hub, a stand_in, a path or same_as"
            )


@section
class StandInRow:
    """One row of standins.yaml: which files of which packages, and who reads them."""

    category: Category
    language: Language
    packages: Many[Pin] = ()
    installed: Many[Pin] = ()
    files: dict[Text, OneOrMore[Text]]
    reader: Name
    options: dict[Text, Count | Text | OneOrMore[Text]] = field(default_factory=dict)
    max_bytes: Count = 1_500_000
    licence: Text
    provenance: Text
    # Sources that read disjoint parts of it, and their shares; any other source reads all of it.
    shared_by: dict[Name, Positive] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = {pin.partition("==")[0] for pin in (*self.packages, *self.installed)} | {"stdlib"}
        for name in self.files:
            if name not in known:
                remedy = f"no pin of it in packages or installed; {did_you_mean(name, known)}"
                raise Refused(f"files.{name}", name, remedy)


@section
class StageRow:
    """One row of pipeline.yaml."""

    engine: Text
    recipe: Text | None = None  # the stage's file, below recipes/
    takes: Many[Text] = ()
    # The recipes whose mixtures this stage prepares text for.
    mixture_of: Many[Text] = ()


@section
class SplitRow:
    """One row of posttrain/splits.yaml: of the published data set, or of a file of the user's own."""

    mode: Literal["think", "no_think"]
    path: Text | None = None  # JSON lines of one's own, read at every scale
    rows: Count | None = None
    million_tokens: Positive | None = None  # of all rows; of pairs: of the chosen side
    stand_in: Name | None = None
    languages: Many[Literal["en", "fr", "es", "de", "it", "pt"]] = ()
    share: Positive = 1.0

    def __post_init__(self) -> None:
        for key in ("rows", "stand_in", "languages"):
            if not self.path and not getattr(self, key):
                remedy = "a split of the published data set has it; one of your own has a path"
                raise Refused(key, "empty", remedy)


@section
class SyntheticRow:
    """One row of posttrain/synthetic.yaml: prompts of a split, and the models that answer them."""

    prompts: Name  # a split of splits.yaml
    mode: Literal["think", "no_think"]
    answers: Text  # the model, as its server names it
    rejected: Text | None = None  # a worse model: the rows are pairs
    temperature: Positive = 0.6
    top_p: PositiveShare = 0.95
    max_tokens: Count = 16384


@section
class ChatDataset:
    hub_id: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    revision: Text
    licence: Text


@section
class SplitsFile:
    dataset: ChatDataset
    splits: dict[Name, dict[Name, SplitRow]]


@section
class AblationRow:
    """One row of ablations.yaml; a variant is laid over the scaled `nanotron:` section, but for
    `mixture`, which takes the place of the stage's."""

    of: Text
    question: Text
    variants: dict[Name, Overlay]


# Kinds of stages; the first three prepare the text of mixtures.
PREPARES = ("tokenizer", "held-out", "data")
ENGINES = (
    *PREPARES,
    "eval-texts",
    "pretrain",
    "chats",
    "posttrain",
    "merge",
    "release",
    "eval",
    "report",
)


def rows_of(file: Path, key: str, kind: type[Row]) -> dict[str, Row]:
    """The typed rows of the one section of a file of rows."""
    values = read_yaml(file)
    if others := [name for name in values if name != key]:
        raise UserError(f"{short(file)}: {others[0]}: unknown key; did you mean '{key}'?")
    rows = values.get(key)
    if not isinstance(rows, Mapping) or not rows:
        raise UserError(f"{short(file)}: {key}: missing; it holds the rows, one a name")
    checked = {}
    for name, row in rows.items():
        layer = Layer(file, cast(Overlay, row if isinstance(row, Mapping) else {}), f"{key}.{name}")
        checked[str(name)] = parse(row, kind, [layer])
    return checked


@cache
def load_sources() -> dict[str, SourceRow]:
    """Rows of sources.yaml by name, `same_as` checked but not resolved."""
    file = load.RECIPES / "sources.yaml"
    sources = rows_of(file, "sources", SourceRow)
    check_sources(sources, sources, file)
    for stand_in, stand_in_row in load_standins().items():
        readers = [name for name, row in sources.items() if row.stand_in == stand_in]
        for name in stand_in_row.shared_by:
            if name not in readers:
                where = f"{short(load.RECIPES / 'standins.yaml')}: standins.{stand_in}.shared_by"
                hint = did_you_mean(name, readers)
                raise UserError(f"{where}.{name}: no source that reads it; {hint}")
    return located(sources, load.RECIPES.parent)


def located(rows: Mapping[str, SourceRow], folder: Path) -> dict[str, SourceRow]:
    """The rows with each `path:` as a path from here: it is relative to `folder`."""
    return {
        name: replace(row, path=os.path.relpath(folder / row.path)) if row.path else row
        for name, row in rows.items()
    }


def check_sources(
    rows: Mapping[str, SourceRow], known: Mapping[str, SourceRow], file: Path
) -> None:
    """Refuse a row that names a source or a stand-in that does not exist, or does not do."""
    tables: dict[str, Mapping[str, Any]]
    tables = {"same_as": known, "replaced_by": known, "stand_in": load_standins()}
    for name, row in rows.items():
        for key, table in tables.items():
            where, word = f"{short(file)}: sources.{name}.{key}", getattr(row, key)
            if word and word not in table:
                raise UserError(f"{where}: {word}: unknown; {did_you_mean(word, table)}")
        if row.same_as and known[row.same_as].same_as:
            where = f"{short(file)}: sources.{name}.same_as: {row.same_as}"
            raise UserError(f"{where}: it is another's name too; name that one's row")
        if row.replaced_by and not known[row.replaced_by].hub_id:
            where = f"{short(file)}: sources.{name}.replaced_by: {row.replaced_by}"
            raise UserError(f"{where}: it is not on the hub; name a row with a hub_id")


@cache
def load_standins() -> dict[str, StandInRow]:
    """Rows of the embedded corpus by name."""
    return rows_of(load.RECIPES / "standins.yaml", "standins", StandInRow)


def splits_file() -> Path:
    return load.RECIPES / "posttrain" / "splits.yaml"


@cache
def load_splits() -> SplitsFile:
    file = splits_file()
    return parse(read_yaml(file), SplitsFile, [Layer(file, read_yaml(file))])


@cache
def load_synthetic() -> dict[str, SyntheticRow]:
    """Rows of synthetic.yaml by name."""
    file = load.RECIPES / "posttrain" / "synthetic.yaml"
    rows = rows_of(file, "synthetic", SyntheticRow)
    splits = [name for config in load_splits().splits.values() for name in config]
    for name, row in rows.items():
        if row.prompts not in splits:
            where = f"{short(file)}: synthetic.{name}.prompts: {row.prompts}"
            raise UserError(f"{where}: unknown split; {did_you_mean(row.prompts, splits)}")
    return rows


@cache
def load_ablations() -> dict[str, AblationRow]:
    file = load.RECIPES / "ablations.yaml"
    ablations = rows_of(file, "ablations", AblationRow)
    for name, row in ablations.items():
        known = [one for one, stage in load_pipeline().items() if stage.engine == "pretrain"]
        if row.of not in known:
            where = f"{short(file)}: ablations.{name}.of: {row.of}"
            raise UserError(f"{where}: no stage that pretrains; {did_you_mean(row.of, known)}")
    return ablations


@cache
def load_pipeline() -> dict[str, StageRow]:
    """The stages in order, with what each takes."""
    file = load.RECIPES / "pipeline.yaml"
    rows = rows_of(file, "stages", StageRow)
    earlier: list[str] = []
    recipes: dict[str, str] = {}
    for name, row in rows.items():
        if row.recipe is not None:
            _check_recipe(file, name, row.recipe, recipes.setdefault(row.recipe, name))
        _check_stage(file, name, row, rows, earlier)
        earlier.append(name)
    return rows


def _check_stage(
    file: Path, name: str, row: StageRow, rows: Mapping[str, StageRow], earlier: list[str]
) -> None:
    """Refuse a row that takes a later stage, or whose engine does not suit it."""
    where = f"{short(file)}: stages.{name}"
    if row.engine not in ENGINES:
        hint = did_you_mean(row.engine, ENGINES)
        raise UserError(f"{where}.engine: {row.engine}: unknown; {hint}")
    for word in row.takes:
        if word not in earlier:
            hint = did_you_mean(word, earlier)
            raise UserError(f"{where}.takes: {word}: unknown stage; {hint}")
    mixtures = [one for one, stage in rows.items() if stage.engine == "pretrain"]
    for word in row.mixture_of:
        if word not in mixtures:
            hint = did_you_mean(word, mixtures)
            raise UserError(f"{where}.mixture_of: {word}: unknown stage; {hint}")
    if (row.engine in PREPARES) != bool(row.mixture_of):
        has = ", ".join(row.mixture_of)
        remedy = "drop it" if has else "name the stages that it prepares text for"
        raise UserError(f"{where}.mixture_of: {has or 'empty'}: engine is {row.engine}; {remedy}")


def _check_recipe(file: Path, name: str, recipe: str, owner: str) -> None:
    where = f"{short(file)}: stages.{name}.recipe: {recipe}"
    if not (file.parent / recipe).is_file():
        known = [str(one.relative_to(file.parent)) for one in file.parent.rglob("*.yaml")]
        raise UserError(f"{where}: no such file; {did_you_mean(recipe, known)}")
    if owner != name:
        raise UserError(f"{where}: it is the recipe of {owner}; write a file for each stage")


def stage_row(stage: str) -> StageRow:
    """A stage's row. Raises UserError for an unknown name."""
    pipeline = load_pipeline()
    if stage not in pipeline:
        hint = did_you_mean(stage, pipeline)
        raise UserError(f"unknown stage '{stage}'; {hint} (`make help` lists them)")
    return pipeline[stage]


def stage_file(stage: str) -> Path:
    """The recipe of a stage of pipeline.yaml, or a recipe file's own path."""
    if is_recipe_file(stage):
        return Path(stage).resolve()
    row = stage_row(stage)
    if row.recipe is None:
        pipeline = short(load.RECIPES / "pipeline.yaml")
        raise UserError(f"{pipeline}: stages.{stage}.recipe: missing; name the stage's file")
    return load.RECIPES / row.recipe


def stage_of_file(file: Path) -> str | None:
    """The stage of pipeline.yaml whose recipe `file` is."""
    for name, row in load_pipeline().items():
        if row.recipe and (load.RECIPES / row.recipe).resolve() == file.resolve():
            return name
    return None
