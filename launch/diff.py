"""`make diff`: what a scale changes of a stage's published recipe, whichever engine runs it."""

from typing import Any

from launch.errors import UserError
from launch.evaluate import load_eval
from launch.posttrain import load_posttrain, scale_posttrain
from launch.recipe import load_recipe, load_scale, stage_named, stage_row
from launch.scale import Change, changes, flatten, reason

# Stages with a recipe that no scale changes.
UNCHANGED = ("merge", "release")


def stage_changes(stage: str, scale: str) -> list[Change]:
    """Every value of the stage's recipe that the scale changes, with the reason."""
    stage, dial = stage_named(stage), load_scale(scale)
    engine = stage_row(stage)["engine"]
    if engine == "pretrain":
        return changes(load_recipe(stage), dial)
    if engine == "posttrain":
        recipe = load_posttrain(stage)
        sections = [f"posttrain.{stage}", "posttrain"]
        return _explained(recipe, scale_posttrain(recipe, dial), dial, sections)
    if engine == "eval":
        recipe = load_eval(stage)
        return _explained(recipe, recipe | dial["evaluation"], dial, ["evaluation"])
    if engine in UNCHANGED:
        return []
    raise UserError(
        f"{stage}: has no recipe of its own (engine: {engine}); name a stage that trains or scores"
    )


def _explained(
    published: dict[str, Any], scaled: dict[str, Any], dial: dict[str, Any], sections: list[str]
) -> list[Change]:
    before, after = flatten(published), flatten(scaled)
    return [
        Change(
            key,
            before.get(key),
            after.get(key),
            reason(dial, *(f"{section}.{key}" for section in sections)),
        )
        for key in before | after
        if before.get(key) != after.get(key)
    ]
