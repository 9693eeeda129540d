"""The scale dial: one pure function from a published recipe to the same recipe at a scale.

Kept at every scale: the mixture's weights, the step ratio of stages 1-3, where the decay starts,
the warm-up share (never below `minimum_warmup_steps`), windows' ratios, and every key that the
scale file does not name. `full` changes nothing but what the pinned engine cannot do, which the
recipe says itself (`on_nanotron_0_4`).
"""

import copy
from dataclasses import dataclass, replace
from typing import Any

from launch.errors import UserError
from launch.recipe import Recipe, checked, scale_file
from launch.schema import Nanotron


@dataclass(frozen=True)
class Change:
    key: str
    before: Any
    after: Any
    why: str


def scale(recipe: Recipe, dial: dict[str, Any]) -> Recipe:
    """`recipe` at the scale that the checked scale file `dial` describes."""
    nanotron = copy.deepcopy(recipe.nanotron)
    lay_over(nanotron, recipe.on_nanotron_0_4)
    tokens = nanotron["tokens"]
    schedule = nanotron["optimizer"]["learning_rate_scheduler"]
    window = tokens["sequence_length"] // dial["windows_divided_by"]
    tokens["sequence_length"] = window
    nanotron["tokenizer"]["tokenizer_max_length"] = window
    nanotron["model"]["model_config"]["max_position_embeddings"] = window
    schedule["learning_rate"] *= dial["learning_rate_times"]
    schedule["min_decay_lr"] *= dial["learning_rate_times"]
    published_steps = tokens["train_steps"]
    steps = dial["train_steps"].get(recipe.stage, published_steps / dial["steps_divided_by"])
    _scale_steps(nanotron, steps / published_steps, dial["minimum_warmup_steps"])
    lay_over(nanotron, dial["nanotron"])
    nanotron = checked(nanotron, Nanotron, scale_file(dial["scale"]), "nanotron")
    return replace(recipe, nanotron=nanotron)


def _scale_steps(nanotron: dict[str, Any], ratio: float, minimum_warmup: int) -> None:
    """Shrink length and schedule by one ratio; borders stay borders after rounding."""
    schedule = nanotron["optimizer"]["learning_rate_scheduler"]
    start = schedule["lr_decay_starting_step"]
    warmup = max(round(schedule["lr_warmup_steps"] * ratio), minimum_warmup)
    new_start = max(round(start * ratio), warmup)
    end = round((start + schedule["lr_decay_steps"]) * ratio)
    nanotron["tokens"]["train_steps"] = round(nanotron["tokens"]["train_steps"] * ratio)
    schedule["lr_warmup_steps"] = warmup
    schedule["lr_decay_starting_step"] = new_start
    schedule["lr_decay_steps"] = end - new_start


def lay_over(values: dict[str, Any], overlay: dict[str, Any]) -> None:
    """Mappings key by key; a misspelt key stays, for the schema to refuse."""
    for key, value in overlay.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            lay_over(values[key], value)
        else:
            values[key] = value


def changes(recipe: Recipe, dial: dict[str, Any]) -> list[Change]:
    """Every value that the dial changes, with the scale file's reason (longest key prefix)."""
    before, by_engine = flatten({"nanotron": recipe.nanotron}), flatten(recipe.on_nanotron_0_4)
    after = flatten({"nanotron": scale(recipe, dial).nanotron})
    changed = []
    for key in before | after:
        if before.get(key) != after.get(key):
            if by_engine.get(key.removeprefix("nanotron."), ...) == after.get(key):
                why = "what nanotron 0.4 cannot do otherwise: see the recipe"
                changed.append(Change(key, before.get(key), after.get(key), why))
                continue
            why = reason(dial, key)
            changed.append(Change(key, before.get(key), after.get(key), why))
    return changed


def reason(dial: dict[str, Any], *names: str) -> str:
    """The scale file's reason for a change of a key, by the longest prefix of any of its `names`.

    Raises UserError where there is none.
    """
    prefixes = [p for p in dial["why"] if any(f"{name}.".startswith(f"{p}.") for name in names)]
    if not prefixes:
        file = f"recipes/scales/{dial['scale']}.yaml"
        raise UserError(f"{file}: why: no reason for {names[-1]}; add `{names[-1]}: <reason>`")
    why: str = dial["why"][max(prefixes, key=len)]
    return why


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as dotted keys."""
    if isinstance(values, dict):
        items = list(values.items())
    elif isinstance(values, list):
        items = list(enumerate(values))
    else:
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
