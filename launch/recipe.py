"""Loads and checks recipes/: the only reader of these files."""

from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.errors import UserError, did_you_mean
from launch.schema import RecipeFile, Scale, SourceRow, StageRow

RECIPES = Path(__file__).parent.parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    """A stage's recipe; `mixture` as written (need not sum to 1), `nanotron` as plain values."""

    stage: str
    file: Path
    mixture: dict[str, float]
    nanotron: dict[str, Any]


def load_yaml(file: Path) -> DictConfig:
    """The mapping in `file`; UserError for a missing file, broken YAML or a repeated key."""
    try:
        loaded = OmegaConf.load(file)
    except FileNotFoundError:
        raise UserError(f"{_short(file)}: no such file") from None
    except Exception as error:  # yaml's own and OmegaConf's errors share no base class
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{_short(file)}{where}: not valid YAML: {what}") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{_short(file)}: expected a mapping of keys to values")
    return loaded


def check(values: DictConfig, schema: type, file: Path, where: str = "") -> Any:
    """`values` as plain data, every key and type checked against the dataclass `schema`."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), values)
        missing = sorted(OmegaConf.missing_keys(merged))
    except OmegaConfBaseException as error:
        key = ".".join(part for part in (where, error.full_key or str(error.key)) if part)
        if error.object_type is not None and "not in" in str(error):
            known = [f.name for f in fields(error.object_type)]
            hint = did_you_mean(str(error.key), known)
            raise UserError(f"{_short(file)}: {key}: unknown key; {hint}") from None
        raise UserError(f"{_short(file)}: {key}: {error.msg}".splitlines()[0]) from None
    if missing:
        key = f"{where}.{missing[0]}" if where else missing[0]
        raise UserError(f"{_short(file)}: {key}: missing; add it")
    return OmegaConf.to_container(merged, throw_on_missing=True)


def stage_file(stage: str) -> Path:
    """The one recipe whose `stage:` is `stage`; a recipe file's path is taken as it is."""
    if stage.endswith((".yaml", ".yml")):
        return Path(stage)
    files = [file for file in sorted(RECIPES.glob("*/*.yaml")) if _names_stage(file, stage)]
    if len(files) != 1:
        found = ", ".join(map(_short, files)) or "none"
        raise UserError(f"recipes/: stage '{stage}' must have exactly one recipe; found: {found}")
    return files[0]


def _names_stage(file: Path, stage: str) -> bool:
    return any(line.rstrip() == f"stage: {stage}" for line in file.open())


def load_recipe(stage: str) -> Recipe:
    """The recipe of a stage (or of a recipe file), its `extends` resolved and checked.

    A mixture replaces its parent's; everything else is merged key by key.
    """
    file = stage_file(stage)
    values = check(_extended(file, ()), RecipeFile, file)
    known = load_sources()
    for name, weight in values["mixture"].items():
        if name not in known:
            raise UserError(
                f"{_short(file)}: mixture.{name}: unknown source; {did_you_mean(name, known)} "
                "New sources get a row in recipes/sources.yaml"
            )
        if not weight > 0:
            raise UserError(
                f"{_short(file)}: mixture.{name}: weight {weight:g} must be above 0; "
                "remove the line to drop the source"
            )
    return Recipe(values["stage"], file, values["mixture"], values["nanotron"])


def _extended(file: Path, children: tuple[Path, ...]) -> DictConfig:
    values = load_yaml(file)
    if "extends" not in values:
        return values
    parent_file = file.parent / str(values.pop("extends"))
    if parent_file in children:
        raise UserError(f"{_short(file)}: extends: {_short(parent_file)} extends it in turn")
    parent = _extended(parent_file, (*children, file))
    if "mixture" in values:
        parent.pop("mixture", None)
    merged = OmegaConf.merge(parent, values)
    assert isinstance(merged, DictConfig)
    return merged


@cache
def load_sources() -> dict[str, dict[str, Any]]:
    """Rows of sources.yaml by name, `same_as` checked but not resolved."""
    file = RECIPES / "sources.yaml"
    rows = load_yaml(file)["sources"]
    sources = {
        str(name): check(row, SourceRow, file, f"sources.{name}") for name, row in rows.items()
    }
    for name, row in sources.items():
        if row["same_as"] and row["same_as"] not in sources:
            hint = did_you_mean(row["same_as"], sources)
            raise UserError(f"{_short(file)}: sources.{name}.same_as: {row['same_as']}: {hint}")
    return sources


@cache
def load_standins() -> dict[str, dict[str, Any]]:
    """Rows of the embedded corpus by name."""
    rows = OmegaConf.to_container(load_yaml(RECIPES / "standins.yaml")["standins"])
    return {str(name): row for name, row in rows.items()}  # type: ignore[union-attr]


def canonical(name: str) -> str:
    """The source that `name` is another folder's name of; offsets and permutations use it."""
    return load_sources()[name]["same_as"] or name


@cache
def load_pipeline() -> dict[str, dict[str, Any]]:
    """The stages in order, with what each takes."""
    file = RECIPES / "pipeline.yaml"
    stages = load_yaml(file)["stages"]
    pipeline: dict[str, dict[str, Any]] = {}
    for name, row in stages.items():
        pipeline[str(name)] = check(row, StageRow, file, f"stages.{name}")
        for taken in pipeline[str(name)]["takes"]:
            if taken not in pipeline:
                hint = did_you_mean(taken, pipeline)
                raise UserError(f"{_short(file)}: stages.{name}.takes: {taken}: {hint}")
    return pipeline


def stage_row(stage: str) -> dict[str, Any]:
    pipeline = load_pipeline()
    if stage not in pipeline:
        hint = did_you_mean(stage, pipeline)
        raise UserError(f"unknown stage '{stage}'; {hint} (`make help` lists them)")
    return pipeline[stage]


def load_scale(name: str) -> dict[str, Any]:
    """The scale file `name`, checked."""
    file = RECIPES / "scales" / f"{name}.yaml"
    known = [f.stem for f in (RECIPES / "scales").glob("*.yaml")]
    if name not in known:
        raise UserError(f"unknown scale SCALE={name}; {did_you_mean(name, known)}")
    values: dict[str, Any] = check(load_yaml(file), Scale, file)
    for key, allowed in {"origin": ("hub", "standin"), "device": ("gpu", "cpu")}.items():
        if values[key] not in allowed:
            raise UserError(f"{_short(file)}: {key}: {values[key]} is none of {', '.join(allowed)}")
    return values


def _short(file: Path) -> str:
    """Path as a user of the repository would type it."""
    try:
        return str(file.resolve().relative_to(RECIPES.parent))
    except ValueError:
        return str(file)
