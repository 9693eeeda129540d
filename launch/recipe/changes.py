"""What a scale, or the user's own recipe, changes in a published recipe, and why: `make diff`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from ground.errors import UserError
from launch.recipe.book import Loaded, Recipe
from launch.recipe.evaluation import EvalRecipe
from launch.recipe.load import short
from launch.recipe.posttrain import PosttrainRecipe
from launch.recipe.pretrain import PretrainRecipe
from launch.recipe.scale import Scale, scale


@dataclass(frozen=True)
class Change:
    key: str
    before: object
    after: object
    why: str


def changes(loaded: Loaded[Recipe], at: Scale) -> list[Change]:
    """Every value of a stage's recipe that differs from the published one, with the reason."""
    after = flatten(asdict(cast(Any, scale(loaded, at))))
    before = flatten(asdict(cast(Any, loaded.published)))
    by_engine: dict[str, object] = {}
    if isinstance(loaded.recipe, PretrainRecipe):
        by_engine = flatten({"nanotron": loaded.recipe.on_nanotron_0_4})
    changed = []
    for key in before | after:
        if before.get(key) != after.get(key):
            why = _why(loaded, at, key, key in by_engine and by_engine[key] == after.get(key))
            changed.append(Change(key, before.get(key), after.get(key), why))
    return changed


def _why(loaded: Loaded[Recipe], at: Scale, key: str, by_engine: bool) -> str:
    path = key.split(".")
    for layer in reversed(loaded.own):
        if layer.has(path) or (path[0] in ("mixture", "sources") and path[0] in layer.values):
            return f"says {short(layer.file)}"
    if by_engine:
        return "what nanotron 0.4 cannot do otherwise: see the recipe"
    if at.text and path[0] in ("mixture", "sources"):
        return "TEXT= is all that is trained on"
    recipe: object = loaded.published
    if isinstance(recipe, PosttrainRecipe):
        return reason(at, f"posttrain.{loaded.stage}.{key}", f"posttrain.{key}")
    if isinstance(recipe, EvalRecipe):
        return reason(at, f"evaluation.{key}")
    return reason(at, key)


def reason(at: Scale, *names: str) -> str:
    """The scale file's reason for a change of a key, by the longest prefix of any of its `names`.

    Raises UserError where there is none.
    """
    why = at.values.why
    prefixes = [one for one in why if any(f"{name}.".startswith(f"{one}.") for name in names)]
    if not prefixes:
        key = names[-1]
        raise UserError(f"{short(at.file)}: why: no reason for {key}; add `{key}: <reason>`")
    return why[max(prefixes, key=len)]


def flatten(values: object, prefix: str = "") -> dict[str, object]:
    """Nested mappings and lists as dotted keys."""
    items: Sequence[tuple[object, object]]
    if isinstance(values, Mapping):
        items = list(values.items())
    elif isinstance(values, list | tuple):
        items = list(enumerate(values))
    else:
        return {prefix: values}
    flat: dict[str, object] = {}
    for key, value in items:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
