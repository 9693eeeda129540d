"""Loads and checks recipes/: the only reader of these files."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.check import BadValue, check
from launch.errors import UserError, did_you_mean
from launch.run_folder import ENGINES
from launch.schema import RecipeFile, Scale, SourceRow, StageRow

RECIPES = Path(__file__).parent.parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    """A stage's recipe; `mixture` as written (need not sum to 1), `nanotron` as plain values."""

    stage: str
    file: Path
    mixture: dict[str, float]
    nanotron: dict[str, Any]
    on_nanotron_0_4: dict[str, Any]  # what of it the pinned engine cannot do, and what it does


def load_yaml(file: Path) -> dict[str, Any]:
    """The mapping in `file`; UserError for a missing file, broken YAML or a repeated key."""
    try:
        loaded = OmegaConf.load(file)
    except FileNotFoundError:
        raise UserError(f"{_short(file)}: no such file") from None
    except OSError as error:
        raise UserError(f"{_short(file)}: cannot be read: {error.strerror}") from None
    except Exception as error:  # yaml's own and OmegaConf's errors share no base class
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{_short(file)}{where}: not valid YAML: {what}") from error
    values = OmegaConf.to_container(loaded)
    if not isinstance(values, dict):
        raise UserError(f"{_short(file)}: expected a mapping of keys to values")
    return values  # type: ignore[return-value]  # a key that is no text is an unknown key


def checked(values: Any, expected: Any, file: Path, where: str = "") -> Any:
    """`values` of `file`, checked against a dataclass; UserError names file, key and remedy."""
    try:
        return check(values, expected, where)
    except BadValue as error:
        raise UserError(f"{_short(file)}: {error}") from None


def _rows(file: Path, section: str) -> dict[str, Any]:
    rows = load_yaml(file).get(section)
    if not isinstance(rows, dict):
        raise UserError(f"{_short(file)}: {section}: missing; it holds the rows, one a name")
    return {str(name): row for name, row in rows.items()}


def stage_file(stage: str) -> Path:
    """The one recipe whose `stage:` is `stage`; a recipe file's path is taken as it is."""
    if stage.endswith((".yaml", ".yml")):
        return Path(stage)
    files = [file for file in sorted(RECIPES.glob("*/*.yaml")) if _names_stage(file, stage)]
    if not files:
        engine = stage_row(stage)["engine"]  # an unknown stage is told so
        raise UserError(f"recipes/: no file says `stage: {stage}` (engine: {engine}); write one")
    if len(files) > 1:
        found = ", ".join(map(_short, files))
        raise UserError(f"recipes/: stage '{stage}' has {len(files)} recipes, {found}; keep one")
    return files[0]


def stage_named(name: str) -> str:
    """The stage that `name` names: itself, or the stage of a recipe file that is its own."""
    if not name.endswith((".yaml", ".yml")):
        return name
    file = Path(name)
    stage = load_yaml(file).get("stage")
    if not isinstance(stage, str):
        raise UserError(f"{_short(file)}: stage: missing; a recipe names its stage")
    if (own := stage_file(stage)).resolve() != file.resolve():
        raise UserError(f"{_short(file)}: {_short(own)} is the recipe of {stage}; edit it")
    return stage


def _names_stage(file: Path, stage: str) -> bool:
    # By line: a file that is broken further on still says whose it is.
    line = rf"""^stage:\s*(["']?){re.escape(stage)}\1\s*(#.*)?$"""
    return bool(re.search(line, file.read_text("utf-8", "replace"), re.MULTILINE))


def load_recipe(stage: str) -> Recipe:
    """The recipe of a stage (or of a recipe file), its `extends` resolved and checked.

    A mixture replaces its parent's; everything else is merged key by key.
    """
    chain = _chain(stage_file(stage).resolve(), ())
    merged: dict[str, Any] = {}
    for _, values in reversed(chain):
        if "mixture" in values:
            merged.pop("mixture", None)
        merged = _merge(merged, values)
    try:
        plain = OmegaConf.to_container(OmegaConf.create(merged), resolve=True)
        recipe = check(plain, RecipeFile)
        _check_mixture(recipe["mixture"])
        if len(recipe["nanotron"]["data_stages"]) != 1:
            raise BadValue("nanotron.data_stages", "write one entry; each stage has its own recipe")
    except OmegaConfBaseException as error:
        problem = str(error).splitlines()[0]
        raise UserError(f"{_short(chain[0][0])}: {error.full_key}: {problem}") from None
    except BadValue as error:
        raise UserError(f"{_short(_owner(chain, error.key))}: {error}") from None
    return Recipe(
        recipe["stage"],
        chain[0][0],
        recipe["mixture"],
        recipe["nanotron"],
        recipe["on_nanotron_0_4"],
    )


def _check_mixture(mixture: dict[str, float]) -> None:
    known, seen = load_sources(), dict[str, str]()
    if not mixture:
        raise BadValue("mixture", "empty: name a source of recipes/sources.yaml and its weight")
    for name, weight in mixture.items():
        if name not in known:
            hint = did_you_mean(name, known)
            problem = f"unknown source; {hint} New sources get a row in recipes/sources.yaml"
            raise BadValue(f"mixture.{name}", problem)
        if not 0 < weight < math.inf:
            problem = f"weight {weight:g} must be above 0; remove the line to drop the source"
            raise BadValue(f"mixture.{name}", problem)
        if (twin := seen.setdefault(canonical(name), name)) != name:
            problem = f"the same source as {twin}; give it one line with the sum of both weights"
            raise BadValue(f"mixture.{name}", problem)


def _chain(file: Path, children: tuple[Path, ...]) -> list[tuple[Path, dict[str, Any]]]:
    """A recipe file and those that it extends, nearest first."""
    values = load_yaml(file)
    if "extends" not in values:
        return [(file, values)]
    name, children = values.pop("extends"), (*children, file)
    if not isinstance(name, str) or not (file.parent / name).is_file():
        remedy = "write a recipe's path, relative to this file"
        raise UserError(f"{_short(file)}: extends: {name or 'empty'}: no such file; {remedy}")
    parent = (file.parent / name).resolve()
    if parent in children:
        remedy = "drop one of the two lines"
        raise UserError(f"{_short(file)}: extends: {name}: it extends this file in turn; {remedy}")
    return [(file, values), *_chain(parent, children)]


def _merge(parent: Any, child: Any) -> Any:
    """`child` laid over `parent`: mappings key by key, anything else replaced."""
    if not (isinstance(parent, dict) and isinstance(child, dict)):
        return child
    return parent | {key: _merge(parent.get(key), value) for key, value in child.items()}


def _owner(chain: list[tuple[Path, dict[str, Any]]], key: str) -> Path:
    """The file of the chain in which a dotted key stands; the first where none has it."""
    absent = object()
    for file, values in chain:
        found: Any = values
        for part in key.split("."):
            if isinstance(found, dict):
                found = found.get(part, absent)
        if found is not absent:
            return file
    return chain[0][0]


@cache
def load_sources() -> dict[str, dict[str, Any]]:
    """Rows of sources.yaml by name, `same_as` checked but not resolved."""
    file = RECIPES / "sources.yaml"
    rows = _rows(file, "sources")
    sources = {name: checked(row, SourceRow, file, f"sources.{name}") for name, row in rows.items()}
    for name, row in sources.items():
        key, known = ("same_as", sources) if row["same_as"] else ("stand_in", load_standins())
        if row[key] not in known:
            hint = did_you_mean(str(row[key]), known)
            raise UserError(f"{_short(file)}: sources.{name}.{key}: {row[key]}: {hint}")
    return sources


@cache
def load_standins() -> dict[str, dict[str, Any]]:
    """Rows of the embedded corpus by name."""
    return _rows(RECIPES / "standins.yaml", "standins")


def canonical(name: str) -> str:
    """The source that `name` is another folder's name of; offsets and permutations use it."""
    return load_sources()[name]["same_as"] or name


@cache
def load_pipeline() -> dict[str, dict[str, Any]]:
    """The stages in order, with what each takes."""
    file = RECIPES / "pipeline.yaml"
    pipeline: dict[str, dict[str, Any]] = {}
    rows = _rows(file, "stages")
    for name, values in rows.items():
        row = checked(values, StageRow, file, f"stages.{name}")
        named: dict[str, tuple[list[str], Iterable[str]]] = {
            "engine": ([row["engine"]], ENGINES),
            "takes": (row["takes"], list(pipeline)),  # earlier stages alone
            "mixture_of": (row["mixture_of"], rows),
        }
        for key, (words, known) in named.items():
            for word in words:
                if word not in known:
                    hint = did_you_mean(word, known)
                    raise UserError(f"{_short(file)}: stages.{name}.{key}: {word}: {hint}")
        pipeline[name] = row
    return pipeline


def stage_row(stage: str) -> dict[str, Any]:
    pipeline = load_pipeline()
    if stage not in pipeline:
        hint = did_you_mean(stage, pipeline)
        raise UserError(f"unknown stage '{stage}'; {hint} (`make help` lists them)")
    return pipeline[stage]


def scale_file(name: str) -> Path:
    return RECIPES / "scales" / f"{name}.yaml"


def load_scale(name: str) -> dict[str, Any]:
    """The scale file `name`, checked."""
    file = scale_file(name)
    known = [f.stem for f in (RECIPES / "scales").glob("*.yaml")]
    if name not in known:
        raise UserError(f"unknown scale SCALE={name}; {did_you_mean(name, known)}")
    values: dict[str, Any] = checked(load_yaml(file), Scale, file)
    for key, allowed in {"origin": ("hub", "standin"), "device": ("gpu", "cpu")}.items():
        if values[key] not in allowed:
            hint = did_you_mean(values[key], allowed)
            raise UserError(f"{_short(file)}: {key}: {values[key]}: {hint}")
    for stage in values["train_steps"]:
        if stage not in load_pipeline():
            hint = did_you_mean(stage, load_pipeline())
            raise UserError(f"{_short(file)}: train_steps.{stage}: unknown stage; {hint}")
    return values


def _short(file: Path) -> str:
    """Path as a user of the repository would type it."""
    try:
        return str(file.resolve().relative_to(RECIPES.parent))
    except ValueError:
        return str(file)
