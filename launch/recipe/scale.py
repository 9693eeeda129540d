"""The scale dial: one pure function from a published recipe to the same recipe at a scale.

Kept at every scale: the mixture's weights, the step ratio of stages 1-3, where the decay starts,
the warm-up share (never below `minimum_warmup_steps`), windows' ratios, and every key that the
scale file does not name. `full` reads from the hub and changes only what a recipe lists under
`on_nanotron_0_4`. What a user's own recipe sets is used unchanged at every scale.
"""

import os
import shlex
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import Field

from ground.errors import UserError, did_you_mean
from launch.recipe import load
from launch.recipe.book import Loaded, Recipe
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
from launch.recipe.tables import SourceRow, load_pipeline
from launch.recipe.values import (
    MOST,
    Count,
    Flag,
    Name,
    Natural,
    Overlay,
    Positive,
    Refused,
    Seed,
    Text,
    section,
)

# The name of the one source that replaces every mixture with TEXT=.
OWN_TEXT = "text"
# Keys of a recipe that no scale sets.
NOT_SCALED = ("stage", "trainer", "mixture", "mixture_seed")


@section
class TokenizerScale:
    vocab_size: Natural = 0  # 0: the published tokenizer
    train_bytes: Natural = 0  # text that the BPE is trained on

    def __post_init__(self) -> None:
        if 0 < self.vocab_size < 512:
            remedy = "write 0, or at least 512: 256 bytes, the special tokens and some merges"
            raise Refused("vocab_size", self.vocab_size, remedy)
        if self.vocab_size and not self.train_bytes:
            raise Refused("train_bytes", self.train_bytes, "say how much text the BPE learns from")


@section
class HeldOutScale:
    # Of documents, never trained on.
    fraction: Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, le=0.5)]
    bytes_per_category: Count  # of text that bits per byte are measured on


@section
class ChatsScale:
    """How many embedded chats a scale makes; none are made of hub data."""

    rows: Natural = 0  # of each split, times the split's own share
    held_out_rows: Natural = 0  # of each kind
    seed: Seed = 0


@section
class PosttrainScale:
    chats: ChatsScale = field(default_factory=ChatsScale)
    every_stage: Overlay = field(default_factory=dict)  # laid over each recipe
    stages: dict[Name, Overlay] = field(default_factory=dict)  # then over that stage's


@section
class ScaleFile:
    """What one scale changes of every recipe."""

    scale: Name
    origin: Literal["hub", "standin"]  # where a source is read from when it has both
    device: Literal["gpu", "cpu"]  # gpu: refuse to run without the recipe's GPUs
    layout: Literal["recipe", "fit"] = "recipe"  # fit: to the GPUs at hand
    held_out: HeldOutScale
    rerun_on_change: Flag = False
    tokenizer: TokenizerScale = field(default_factory=TokenizerScale)
    windows_divided_by: Count = 1
    learning_rate_times: Positive = 1.0
    minimum_warmup_steps: Natural = 0
    steps_divided_by: Count = 1  # stages 1-3 alike, so that their ratio stays
    train_steps: dict[Name, Count] = field(default_factory=dict)  # of every other stage
    ablation_steps: Annotated[
        int, Field(strict=True, ge=10, le=MOST)
    ]  # of each run of an ablation of the first stage
    nanotron: Overlay = field(default_factory=dict)  # laid over the recipe's section
    posttrain: PosttrainScale = field(default_factory=PosttrainScale)
    evaluation: Overlay = field(default_factory=dict)  # laid over the eval stage's recipe
    why: dict[Text, Text] = field(default_factory=dict)  # key prefix: reason, for `make diff`

    def __post_init__(self) -> None:
        if self.origin == "standin" and not (
            self.posttrain.chats.rows and self.posttrain.chats.held_out_rows
        ):
            key = "rows" if not self.posttrain.chats.rows else "held_out_rows"
            value = getattr(self.posttrain.chats, key)
            raise Refused(
                f"posttrain.chats.{key}", value, "write at least 1 where origin is standin"
            )


@dataclass(frozen=True, eq=False)  # by identity, so that what is computed from it can be cached
class Scale:
    """A scale file, and the user's own text that replaces every mixture (TEXT=)."""

    values: ScaleFile
    layers: tuple[Layer, ...]  # the scale file, after those that it extends
    given: str  # what SCALE= says
    text: Path | None = None

    @property
    def file(self) -> Path:
        return self.layers[-1].file

    def below(self, *keys: str) -> list[Layer]:
        """The values of one section in the files."""
        layers = list(self.layers)
        for key in keys:
            layers = [layer.below(key) for layer in layers]
        return layers

    @property
    def name(self) -> str:
        """The name of the folder below RUNS."""
        if self.text is None:
            return self.values.scale
        place = self.text.resolve()
        return (
            f"{self.values.scale}-{place.name if place.is_dir() else place.name.partition('.')[0]}"
        )

    @property
    def arguments(self) -> str:
        """The arguments that select this scale on a command line."""
        text = f" TEXT={shlex.quote(str(self.text))}" if self.text else ""
        return f"SCALE={shlex.quote(self.given)}{text}"


def load_scale(name: str, text: str = "") -> Scale:
    """A scale by the name of its file in recipes/scales/, or by a file's path; TEXT= beside it."""
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
    values, layers = _checked_file(file.resolve())
    own = Path(text) if text else None
    if own and (not os.path.exists(own) or own.resolve() == Path("/")):
        raise UserError(f"TEXT={text[:100]}: no such file or folder; name one that holds your text")
    return Scale(values, layers, name, own)


@cache
def _checked_file(file: Path) -> tuple[ScaleFile, tuple[Layer, ...]]:
    layers = chain(file)
    if "scale" not in layers[-1].values:
        layers.append(Layer(file, {"scale": file.stem}))
    scale = compose(layers, ScaleFile)
    if scale.scale != file.stem:
        raise UserError(f"{short(file)}: scale: {scale.scale}: write the file's name, {file.stem}")
    kinds = {name: row.engine for name, row in load_pipeline().items()}
    for key, names, kind in (
        ("train_steps", scale.train_steps, "pretrain"),
        ("posttrain.stages", scale.posttrain.stages, "posttrain"),
    ):
        known = [name for name, engine in kinds.items() if engine == kind]
        for name in names:
            if name not in known:
                hint = did_you_mean(name, known)
                raise UserError(f"{short(file)}: {key}.{name}: no such stage here; {hint}")
    for layer in layers:
        for path in (["every_stage"], *(["stages", stage] for stage in scale.posttrain.stages)):
            if layer.has(["posttrain", *path, "template", "file"]):
                place = layer.named(["posttrain", *path, "template", "file"])
                raise UserError(f"{place}: no scale sets that; write a recipe of your own")
    for key in scale.why:
        _check_why(file, key, list(scale.posttrain.stages))
    return scale, tuple(layers)


def _check_why(file: Path, key: str, stages: list[str]) -> None:
    """A reason must belong to a key that exists."""
    first, *path = key.split(".")
    kinds: tuple[type, ...] = {
        "nanotron": (Nanotron,), "posttrain": (SftRecipe, DpoRecipe), "evaluation": (EvalRecipe,)
    }.get(first, (ScaleFile,))  # fmt: skip
    if first == "posttrain" and path and path[0] in stages:
        path = path[1:]
    if kinds == (ScaleFile,):
        path = [first, *path]
    if not any(has_key(kind, path) for kind in kinds):
        raise UserError(f"{short(file)}: why.{key}: no such key; name the key that is changed")


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
    schedule = nanotron["optimizer"]["learning_rate_scheduler"]
    schedule["learning_rate"] *= says.learning_rate_times
    schedule["min_decay_lr"] *= says.learning_rate_times
    published_steps = nanotron["tokens"]["train_steps"]
    steps = says.train_steps.get(loaded.stage, published_steps / says.steps_divided_by)
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


def _refuse_window(window: int, at: Scale) -> None:
    if window < 16:
        key = f"windows_divided_by: {at.values.windows_divided_by}"
        raise UserError(
            f"{short(at.file)}: {key}: leaves windows of {window} tokens; divide by less"
        )


def _scale_steps(nanotron: Any, ratio: float, at: Scale, stage: str) -> None:
    """Shrink length and schedule by one ratio; borders stay borders after rounding."""
    schedule, minimum = (
        nanotron["optimizer"]["learning_rate_scheduler"],
        at.values.minimum_warmup_steps,
    )
    start = schedule["lr_decay_starting_step"]
    steps = max(round(nanotron["tokens"]["train_steps"] * ratio), 1)
    warmup = max(round(schedule["lr_warmup_steps"] * ratio), minimum)
    if warmup and warmup >= steps:
        key = f"minimum_warmup_steps: {minimum}"
        remedy = f"{stage} has {steps} steps here; write fewer, or take more steps"
        raise UserError(f"{short(at.file)}: {key}: {remedy}")
    new_start = max(round(start * ratio), warmup)
    end = max(round((start + schedule["lr_decay_steps"]) * ratio), new_start + 1)
    nanotron["tokens"]["train_steps"] = steps
    schedule["lr_warmup_steps"] = warmup
    schedule["lr_decay_starting_step"] = new_start
    schedule["lr_decay_steps"] = end - new_start
