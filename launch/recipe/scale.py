"""The scale dial: one pure function from a published recipe to the same recipe at a scale.

Kept at every scale: the mixture's weights, the step ratio of stages 1-3, where the decay starts,
the warm-up share (never below `minimum_warmup_steps` or `minimum_warmup_share`), windows' ratios,
and every key that the scale file does not name. `full` reads from the hub and changes only what a
recipe lists under `on_nanotron_0_4`. What a user's own recipe sets is used unchanged at every scale.
"""

import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

from ground.errors import UserError, did_you_mean
from launch.recipe import load
from launch.recipe.book import Loaded, Recipe, load_recipe
from launch.recipe.evaluation import EvalRecipe
from launch.recipe.load import (
    Layer,
    chain,
    compose,
    has_key,
    is_recipe_file,
    lay_over,
    parse,
    short,
)
from launch.recipe.posttrain import DpoRecipe, PosttrainRecipe, SftRecipe
from launch.recipe.pretrain import Nanotron, PretrainRecipe
from launch.recipe.scale_file import ScaleFile
from launch.recipe.tables import SourceRow, load_pipeline, load_splits

# The name of the one source that replaces every mixture with TEXT=.
OWN_TEXT = "text"
# The last stage of the published schedule of stages 1-3.
LAST_STAGE = "pretrain-stage3"
ORIGINS = ("hub", "standin")
SUBSTITUTES = ("no-substitutes", "substitutes")  # ends of runs' names, for 0 and 1
# Keys of a recipe that no scale sets.
NOT_SCALED = ("stage", "trainer", "mixture", "mixture_seed")


@dataclass(frozen=True, eq=False)  # by identity, so that what is computed from it can be cached
class Scale:
    """A scale file, and the user's own text that replaces every mixture (TEXT=)."""

    values: ScaleFile
    layers: tuple[Layer, ...]  # the scale file, after those that it extends
    given: str  # what SCALE= says
    text: Path | None = None
    origin: str = ""  # what ORIGIN= says where that is not the file's own
    substitutes: bool | None = None  # what SUBSTITUTES= says where that is not the file's own

    @property
    def file(self) -> Path:
        return self.layers[-1].file

    def below(self, *keys: str) -> list[Layer]:
        """The values of one section in the files."""
        layers = list(self.layers)
        for key in keys:
            layers = [layer.below(key) for layer in layers]
        return layers

    def named(self, *path: str) -> str:
        """`<file>: <key>` of the last file that sets a key, to start a message."""
        return _named(self.layers, *path)

    @property
    def name(self) -> str:
        """The name of the folder below RUNS."""
        name = self.values.scale + (f"-{self.origin}" if self.origin else "")
        if self.substitutes is not None:
            name += f"-{SUBSTITUTES[self.substitutes]}"
        if self.text is None:
            return name
        place = self.text.resolve()
        return f"{name}-{place.name if place.is_dir() else place.name.partition('.')[0]}"

    @property
    def arguments(self) -> str:
        """The arguments that select this scale on a command line."""
        origin = f" ORIGIN={self.origin}" if self.origin else ""
        text = f" TEXT={shlex.quote(str(self.text))}" if self.text else ""
        given = "" if self.substitutes is None else f" SUBSTITUTES={int(self.substitutes)}"
        return f"SCALE={shlex.quote(self.given)}{origin}{given}{text}"


def load_scale(
    name: str, text: str = "", origin: str = "", substitutes: bool | None = None
) -> Scale:
    """A scale by the name of its file in recipes/scales/, or by a file's path.

    TEXT=, ORIGIN= and SUBSTITUTES= stand beside it; empty or None where they are not given.
    """
    file = Path(name)
    if not is_recipe_file(name):
        known = [one.stem for one in (load.RECIPES / "scales").glob("*.yaml")]
        if name not in known:
            given = f"SCALE={name}" if name else "SCALE= is empty"
            raise UserError(f"unknown scale {given}; {did_you_mean(name, known)}")
        file = load.RECIPES / "scales" / f"{name}.yaml"
    elif (load.RECIPES / "scales" / file.name).is_file() and file.parent.resolve() != (
        load.RECIPES / "scales"
    ).resolve():
        raise UserError(f"SCALE={name}: recipes/scales/ has a {file.name}; give it another name")
    if origin and origin not in ORIGINS:
        raise UserError(f"ORIGIN={origin[:100]}: unknown; {did_you_mean(origin, ORIGINS)}")
    file = file.resolve()
    if origin and origin == _checked_file(file)[0].origin:
        origin = ""
    if substitutes == _checked_file(file, origin)[0].substitutes:
        substitutes = None
    values, layers = _checked_file(file, origin, substitutes)
    own = Path(text) if text else None
    if own and (not os.path.exists(own) or own.resolve() == Path("/")):
        raise UserError(f"TEXT={text[:100]}: no such file or folder; name one that holds your text")
    if own and own.resolve().name.partition(".")[0] in (*ORIGINS, *SUBSTITUTES):
        raise UserError(f"TEXT={text[:100]}: other runs have names that end in that; rename it")
    return Scale(values, layers, name, own, origin, substitutes)


def _named(layers: Sequence[Layer], *path: str) -> str:
    return next((one for one in reversed(layers) if one.has(path)), layers[-1]).named(path)


@cache
def _checked_file(
    file: Path, origin: str = "", substitutes: bool | None = None
) -> tuple[ScaleFile, tuple[Layer, ...]]:
    """A scale file and its layers, with another origin or `substitutes` than its own where given."""
    layers = chain(file)
    if "scale" not in layers[-1].values:
        layers.append(Layer(file, {"scale": file.stem}))
    if origin:
        layers.append(Layer(file, {"origin": origin}))
    named = [layer.values["origin"] for layer in layers if "origin" in layer.values]
    if named and named[-1] == "standin":
        layers += [layer.below("standin") for layer in layers if layer.has(["standin"])]
    if substitutes is not None:
        layers.append(Layer(file, {"substitutes": substitutes}))
    scale = compose(layers, ScaleFile)
    if scale.scale != file.stem:
        raise UserError(f"{short(file)}: scale: {scale.scale}: write the file's name, {file.stem}")
    _check_names(scale, layers)
    for layer in layers:
        for path in (["every_stage"], *(["stages", stage] for stage in scale.posttrain.stages)):
            if layer.has(["posttrain", *path, "template", "file"]):
                place = layer.named(["posttrain", *path, "template", "file"])
                raise UserError(f"{place}: no scale sets that; write a recipe of your own")
    for key in scale.why:
        _check_why(_named(layers, "why", key), key, list(scale.posttrain.stages))
    return scale, tuple(layers)


def _check_names(scale: ScaleFile, layers: Sequence[Layer]) -> None:
    """A scale's stages and configs must exist."""
    kinds = {name: row.engine for name, row in load_pipeline().items()}
    for key, names, kind in (
        ("train_steps", scale.train_steps, "pretrain"),
        ("posttrain.stages", scale.posttrain.stages, "posttrain"),
    ):
        known = [name for name, engine in kinds.items() if engine == kind]
        for name in names:
            if name not in known:
                hint = did_you_mean(name, known)
                place = _named(layers, *key.split("."), name)
                raise UserError(f"{place}: no such stage here; {hint}")
    for name in scale.posttrain.chats.hub_share:
        if name not in load_splits().splits:
            hint = did_you_mean(name, load_splits().splits)
            place = _named(layers, "posttrain", "chats", "hub_share", name)
            raise UserError(f"{place}: no config; {hint}")


def _check_why(place: str, key: str, stages: list[str]) -> None:
    """A reason must belong to a key that exists."""
    first, *path = key.split(".")
    kinds: tuple[type, ...] = {
        "nanotron": (Nanotron,), "posttrain": (SftRecipe, DpoRecipe), "evaluation": (EvalRecipe,)
    }.get(first, (ScaleFile,))  # fmt: skip
    if first == "posttrain" and path and path[0] in stages:
        path = path[1:]
    if kinds == (ScaleFile,) or key.startswith("posttrain.chats"):
        kinds, path = (ScaleFile,), [first, *path]
    if not any(has_key(kind, path) for kind in kinds):
        raise UserError(f"{place}: no such key; name the key that is changed")


def scale(loaded: Loaded[Recipe], at: Scale) -> Recipe:
    """A stage's recipe, or a user's, at a scale, whatever its kind.

    UserError where they do not fit together; with the user's own recipe it names that file.
    """
    recipe: object = loaded.published
    try:
        if isinstance(recipe, PretrainRecipe):
            return cast(Recipe, _pretrain(cast(Loaded[PretrainRecipe], loaded), at))
        return _laid_over(loaded, _layers_of_scale(recipe, loaded.stage, at))
    except UserError as error:
        own = [short(layer.file) for layer in loaded.own]
        if not own or str(error).startswith(tuple(own)):
            raise
        raise UserError(f"{own[-1]}: together with {error}") from None


def _layers_of_scale(recipe: object, stage: str, at: Scale) -> list[Layer]:
    """What a scale lays over a recipe."""
    if isinstance(recipe, PosttrainRecipe):
        layers = at.below("posttrain", "every_stage")
        return [*layers, *at.below("posttrain", "stages", stage)]
    return at.below("evaluation") if isinstance(recipe, EvalRecipe) else []


def where(loaded: Loaded[Any], at: Scale, key: str) -> str:
    """`<file>: <key>` of the last file that sets a key of a scaled recipe, to start a message."""
    path = [int(part) if part.isdigit() else part for part in key.split(".")]
    of_engine = ["on_nanotron_0_4", *path[1:]]
    is_pretrain = path[0] == "nanotron"
    last_first = [
        *((layer, path) for layer in reversed(loaded.own)),
        *((layer, path) for layer in reversed(at.layers) if is_pretrain),
        *((layer, path) for layer in _layers_of_scale(loaded.published, loaded.stage, at)[::-1]),
        *((layer, of_engine) for layer in reversed(loaded.layers) if is_pretrain),
        *((layer, path) for layer in reversed([*at.layers, *loaded.layers])),
    ]
    known = (layer.named(below) for layer, below in last_first if layer.has(below))
    return next(known, loaded.layers[-1].named(path))


def _laid_over(loaded: Loaded[Recipe], layers: list[Layer]) -> Recipe:
    for layer in layers:
        for key in layer.values:
            if key in NOT_SCALED:
                where = f"{short(layer.file)}: {layer.where}.{key}"
                raise UserError(f"{where}: no scale sets that; write a recipe of your own")
    values: dict[str, object] = asdict(cast(Any, loaded.published))
    for layer in (*layers, *loaded.own):
        values = lay_over(values, layer.values)
    return parse(values, type(loaded.published), [*loaded.layers, *layers, *loaded.own])


def _pretrain(loaded: Loaded[PretrainRecipe], at: Scale) -> PretrainRecipe:
    recipe, says = loaded.published, at.values
    values = lay_over(asdict(recipe.nanotron), loaded.recipe.on_nanotron_0_4)
    nanotron: Any = values
    window = nanotron["tokens"]["sequence_length"] // says.windows_divided_by
    _refuse_window(window, at)
    nanotron["tokens"]["sequence_length"] = window
    nanotron["tokenizer"]["tokenizer_max_length"] = window
    nanotron["model"]["model_config"]["max_position_embeddings"] = window
    if says.batch_tokens:
        _set_batch(nanotron, says.batch_tokens, at, loaded.stage)
    schedule = nanotron["optimizer"]["learning_rate_scheduler"]
    schedule["learning_rate"] *= says.learning_rate_times
    schedule["min_decay_lr"] *= says.learning_rate_times
    published_steps = nanotron["tokens"]["train_steps"]
    steps = says.train_steps.get(loaded.stage, published_steps / _steps_divided_by(says))
    _scale_steps(nanotron, steps / published_steps, at, loaded.stage)
    layers = at.below("nanotron")
    for layer in layers:
        values = lay_over(values, layer.values)
    for layer in loaded.own:
        if "nanotron" in layer.values:
            layers.append(layer.below("nanotron"))
            values = cast(Any, lay_over({"": values}, {"": layer.values["nanotron"]}))[""]
    owners = [
        layer.below(key) for layer in loaded.layers for key in ("nanotron", "on_nanotron_0_4")
    ]
    scaled = replace(loaded.recipe, nanotron=parse(values, Nanotron, [*owners, *layers]))
    if at.text:
        row = SourceRow(path=str(at.text))
        scaled = replace(scaled, mixture={OWN_TEXT: 1.0}, sources={OWN_TEXT: row})
    return scaled


def _steps_divided_by(says: ScaleFile) -> float:
    """The ratio of the published steps of stages 1-3 to the scale's, before rounding."""
    if not says.tokens:
        return says.steps_divided_by
    published: int = load_recipe(LAST_STAGE).published.nanotron.tokens.train_steps
    return published * says.batch_tokens / says.tokens


def _set_batch(nanotron: Any, batch_tokens: int, at: Scale, stage: str) -> None:
    """One process that takes the windows of a step one after the other: the layout to start from."""
    window = nanotron["tokens"]["sequence_length"]
    if batch_tokens % window:
        where = f"{at.named('batch_tokens')}: {batch_tokens}"
        raise UserError(f"{where}: write a multiple of {window}, the window of {stage} here")
    nanotron["tokens"]["micro_batch_size"] = 1
    nanotron["tokens"]["batch_accumulation_per_replica"] = batch_tokens // window
    nanotron["optimizer"]["zero_stage"] = 0
    nanotron["parallelism"] |= {"dp": 1, "tp": 1, "pp": 1, "context_parallel_size": 1}


def _refuse_window(window: int, at: Scale) -> None:
    if window < 16:
        where = f"{at.named('windows_divided_by')}: {at.values.windows_divided_by}"
        raise UserError(f"{where}: leaves windows of {window} tokens; divide by less")


def _scale_steps(nanotron: Any, ratio: float, at: Scale, stage: str) -> None:
    """Shrink length and schedule by one ratio; borders stay borders after rounding."""
    schedule = nanotron["optimizer"]["learning_rate_scheduler"]
    start = schedule["lr_decay_starting_step"]
    minimum, end = at.values.minimum_warmup_steps, (start + schedule["lr_decay_steps"]) * ratio
    steps = max(round(nanotron["tokens"]["train_steps"] * ratio), 1)
    of_share = round(at.values.minimum_warmup_share * end)
    warmup = max(round(schedule["lr_warmup_steps"] * ratio), minimum, of_share)
    if warmup and warmup >= steps:
        share = of_share > minimum
        where = at.named(f"minimum_warmup_{'share' if share else 'steps'}")
        value = at.values.minimum_warmup_share if share else minimum
        remedy = f"{stage} has {steps} steps here; write fewer, or take more steps"
        raise UserError(f"{where}: {value}: {remedy}")
    new_start = max(round(start * ratio), warmup)
    new_end = max(round(end), new_start + 1)
    nanotron["tokens"]["train_steps"] = steps
    schedule["lr_warmup_steps"] = warmup
    schedule["lr_decay_starting_step"] = new_start
    schedule["lr_decay_steps"] = new_end - new_start
