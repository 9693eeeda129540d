"""`make diff`: what a scale changes in a stage's published recipe, for every kind of stage."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from ground.errors import UserError, did_you_mean
from launch import walk
from launch.machine.fit import fit
from launch.machine.gpus import Gpus, given, gpus_for
from launch.recipe.book import RECIPE_TYPES, Loaded, load_recipe
from launch.recipe.changes import Change, changes, flatten, reason
from launch.recipe.load import is_recipe_file
from launch.recipe.pretrain import PretrainRecipe
from launch.recipe.scale import Scale, load_scale, scale
from launch.recipe.tables import load_pipeline, stage_of_file, stage_row
from launch.report.terminal import print_table_of
from launch.stages.posttrain import PosttrainStage
from launch.stages.sources import planned

PUBLISHED = "full"


def stage_changes(stage: str, at: Scale) -> list[Change]:
    """Every value of the stage's recipe that the scale changes, with the reason.

    A stage without a recipe file is compared with itself at the full scale.
    """
    is_file = is_recipe_file(stage)
    named = stage_of_file(Path(stage)) if is_file else stage
    if is_file and named is None:
        return _changes(load_recipe(stage), at)
    assert named is not None
    if stage_row(named).engine in RECIPE_TYPES:
        return _changes(load_recipe(named), at)
    if stage_row(named).engine == "report":
        known = [name for name, row in load_pipeline().items() if row.engine != "report"]
        raise UserError(f"{stage}: has no recipe to compare; {did_you_mean(stage, known)}")
    published = walk.resolve(named, load_scale(PUBLISHED)).recipe_values()
    before, after = _readable(published), _readable(walk.resolve(named, at).recipe_values())
    return [
        Change(key, before.get(key), after.get(key), _why(at, key))
        for key in before | after
        if before.get(key) != after.get(key)
    ]


def _changes(loaded: Loaded[object], at: Scale) -> list[Change]:
    """What a scale changes of a recipe, then what the layout changes where it is fitted."""
    found = changes(loaded, at) + _replaced(loaded, at)
    if at.values.layout == "recipe":
        return found
    on = gpus_for(at.values.device)
    before = flatten(asdict(cast(Any, loaded.published)))
    unfitted, fitted = _layouts(loaded, at, on)
    moved = [key for key in fitted if fitted[key] != unfitted[key]]
    processes = f"{on.count} process{'es' * (on.count > 1)}"
    why = f"layout: fit, to {processes if at.values.device == 'cpu' else on}"
    return [one for one in found if one.key not in moved] + [
        Change(key, before[key], fitted[key], why) for key in moved if fitted[key] != before[key]
    ]


def _replaced(loaded: Loaded[object], at: Scale) -> list[Change]:
    """The sources for which a scale reads another."""
    if not isinstance(loaded.recipe, PretrainRecipe):
        return []
    plan = planned(str(loaded.file) if loaded.own else loaded.stage, at)
    return [
        Change(
            f"mixture.{name}",
            "never released",
            f"{other}: {plan.rows[other].hub_id}",
            _why(at, "replaced"),
        )
        for name, other in plan.replaced.items()
    ]


def _layouts(
    loaded: Loaded[object], at: Scale, on: Gpus
) -> tuple[dict[str, object], dict[str, object]]:
    """The values of a stage's scaled recipe, before and after it is fitted.

    Raises UserError where nothing fits.
    """
    scaled = scale(cast(Loaded[Any], loaded), at)
    laid_out: Any = scaled
    run = walk.resolve(str(loaded.file) if loaded.own else loaded.stage, at)
    try:
        if isinstance(scaled, PretrainRecipe):
            laid_out = replace(scaled, nanotron=fit(scaled.nanotron, on))
        elif isinstance(run, PosttrainStage):
            laid_out = run.fitted()
    except UserError as error:
        reason = str(error).removeprefix(loaded.stage).lstrip(": ")
        raise UserError(f"{at.arguments}{given()}: {loaded.stage}: {reason}") from None
    return flatten(asdict(scaled)), flatten(asdict(laid_out))


def _readable(values: Mapping[str, object]) -> dict[str, object]:
    """Dotted keys; a source or a table of stand-ins on one line."""
    readable: dict[str, object] = {}
    for key, value in values.items():
        if key in ("sources", "standins", "stand_in") and isinstance(value, Mapping):
            for name, row in value.items():
                readable[f"{key}.{name}"] = _one_line(row)
        else:
            readable |= flatten(value, key)
    return readable


def _one_line(row: object) -> str:
    if not isinstance(row, Mapping):
        return str(row)
    if isinstance(row.get("stand_in"), Mapping):
        start, stop = row["slice"]
        return f"stand-in {', '.join(row['stand_in'])}, {start:.2g} to {stop:.2g} of its documents"
    if "hub_id" in row:
        portion = "{1:,} tokens after {0:,} of ".format(*row["portion"]) if "portion" in row else ""
        return f"{portion}{row['hub_id']} {row['config'] or ''}".strip()
    return "text of your own" if "own_text" in row else "made here"


# Keys of stages without a recipe file: which part of the scale file decides them.
DECIDED_BY = {
    "held_out": ("fraction", "bytes_per_category", "held_out_fraction"),
    "tokenizer": ("published", "vocab_size", "train_bytes"),
    "posttrain.chats": ("most_rows",),
    "fill_windows": ("least_tokens",),
    "decontaminate": ("decontaminate", "tasks", "may_miss", "local"),
}


def _why(at: Scale, key: str) -> str:
    first = key.partition(".")[0]
    if at.values.scale == PUBLISHED:  # nothing else of it can be changed
        return "SUBSTITUTES=1"
    named = [section for section, keys in DECIDED_BY.items() if first in keys]
    if first == "sources" and at.values.origin == "hub" and not at.text:
        named = ["tokens" if at.values.tokens else "nanotron.tokens.train_steps"]
    if first in ("replaced", "unreleased") and at.values.substitutes:
        named = ["substitutes"]
    return reason(at, *(named or ["origin"]))


def show(stage: str, at: Scale) -> None:
    """Print the table."""
    rows = [[c.key, str(c.before), str(c.after), c.why] for c in stage_changes(stage, at)]
    rows = [[row[0].removeprefix("nanotron."), *row[1:]] for row in rows]
    origin = f"TEXT={at.text}" if at.text else at.values.origin
    rows.insert(0, ["(data)", "hub", origin, "recipes/sources.yaml says what stands in"])
    columns = ("key", "published", at.name, "why")
    print_table_of(columns, rows, left=columns)
