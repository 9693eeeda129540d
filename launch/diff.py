"""`make diff`: what a scale changes of a stage's published recipe, whichever engine runs it."""

from typing import Any

from launch.errors import UserError
from launch.posttrain import load_posttrain, scale_posttrain
from launch.recipe import load_recipe, load_scale, stage_named, stage_row
from launch.scale import Change, changes, flatten

# Stages with a recipe that no scale changes.
UNCHANGED = ("merge", "release")


def stage_changes(stage: str, scale: str) -> list[Change]:
    """Every value of the stage's recipe that the scale changes, with the reason."""
    stage, dial = stage_named(stage), load_scale(scale)
    engine = stage_row(stage)["engine"]
    if engine == "pretrain":
        return changes(load_recipe(stage), dial)
    if engine == "posttrain":
        return _posttrain_changes(stage, dial)
    if engine in UNCHANGED:
        return []
    raise UserError(
        f"{stage}: has no recipe of its own (engine: {engine}); name a stage that trains"
    )


def _posttrain_changes(stage: str, dial: dict[str, Any]) -> list[Change]:
    recipe = load_posttrain(stage)
    before, after = flatten(recipe), flatten(scale_posttrain(recipe, dial))
    return [
        Change(key, before.get(key), after.get(key), _why(key, stage, dial))
        for key in before | after
        if before.get(key) != after.get(key)
    ]


def _why(key: str, stage: str, dial: dict[str, Any]) -> str:
    """The scale file's reason with the longest prefix, or where in that file the value stands."""
    names = (f"posttrain.{stage}.{key}.", f"posttrain.{key}.")
    prefixes = [p for p in dial["why"] if any(name.startswith(f"{p}.") for name in names)]
    if prefixes:
        reason: str = dial["why"][max(prefixes, key=len)]
        return reason
    own = flatten(dial["posttrain"]["stages"].get(stage, {}))
    where = f"stages.{stage}" if any(f"{key}.".startswith(f"{k}.") for k in own) else "every_stage"
    return f"recipes/scales/{dial['scale']}.yaml, posttrain.{where}"
