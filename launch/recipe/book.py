"""A stage's recipe, found and loaded: the published one, and the user's own file on top."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from ground.errors import UserError, did_you_mean
from launch.recipe.evaluation import EvalRecipe
from launch.recipe.load import Layer, chain, compose, is_recipe_file, lay_over, parse, short
from launch.recipe.merging import MergeRecipe, ReleaseRecipe
from launch.recipe.posttrain import DpoRecipe, PosttrainRecipe, SftRecipe
from launch.recipe.pretrain import Nanotron, PretrainRecipe
from launch.recipe.tables import (
    SourceRow,
    check_sources,
    load_pipeline,
    load_sources,
    load_splits,
    located,
    stage_file,
    stage_of_file,
    stage_row,
)

Recipe = TypeVar("Recipe")
RECIPE_TYPES: dict[str, type] = {
    "pretrain": PretrainRecipe,
    "posttrain": PosttrainRecipe,
    "eval": EvalRecipe,
    "merge": MergeRecipe,
    "release": ReleaseRecipe,
}
# Parts of posttrain/splits.yaml: rows of conversations, and pairs of a chosen and a rejected one.
CHATS, PAIRS = ("Mid", "SFT"), ("Preference",)
TRAINERS: dict[str, type] = {"SFTTrainer": SftRecipe, "DPOTrainer": DpoRecipe}
TOOL_FOLDERS = (
    "ablations",
    "evaluation",
    "longctx",
    "merge-sweep",
    "mixture",
    "report.html",
)  # of runs/<scale>/


@dataclass(frozen=True)
class Loaded(Generic[Recipe]):
    """`recipe` as in its file; `published` is without the user's own files, which are `own`."""

    stage: str  # of pipeline.yaml: the stage itself, or the one whose recipe the file extends
    file: Path
    recipe: Recipe
    published: Recipe
    layers: tuple[Layer, ...]  # of `published`, the farthest parent first
    own: tuple[Layer, ...] = ()

    @property
    def name(self) -> str:
        """The run's name: the stage's, or that of the user's recipe."""
        name: str = getattr(self.recipe, "stage")  # noqa: B009  (each kind has it)
        return name


@cache
def load_recipe(stage: str) -> Loaded[Any]:
    """The recipe of a stage, or of a recipe file that extends a stage's. Raises UserError."""
    file = stage_file(stage)
    layers = chain(file)
    parent = stage if not is_recipe_file(stage) else _parent(file, layers)
    border = stage_file(parent).resolve()
    split = next(n for n, layer in enumerate(layers) if layer.file.resolve() == border) + 1
    published, own = layers[:split], layers[split:]
    if own and "stage" not in own[-1].values:
        name = Layer(own[-1].file, {"stage": own[-1].file.stem})
        own = [*own, name]
    kind = _kind(parent, layers)
    base: Any = compose(published, kind)
    recipe: Any = compose([*published, *map(_unscaled, own)], kind) if own else base
    if base.stage != parent:
        problem = f"stage: {base.stage}: it is the recipe of {parent} (recipes/pipeline.yaml)"
        raise UserError(f"{short(published[-1].file)}: {problem}; write that name")
    if own and (owner := _owner_of_name(recipe.stage)):
        problem = f"stage: {recipe.stage}: {owner}; write another name"
        raise UserError(f"{short(own[-1].file)}: {problem}")
    if isinstance(recipe, PretrainRecipe):
        recipe = replace(recipe, sources=_located(recipe.sources, [*published, *own]))
    loaded = Loaded(parent, file, recipe, base, tuple(published), tuple(own))
    _check(loaded)
    return loaded


def _unscaled(layer: Layer) -> Layer:
    """A user's layer without the keys that are checked later, together with a scale's values."""
    return replace(layer, values={k: v for k, v in layer.values.items() if k != "nanotron"})


def _owner_of_name(name: str) -> str | None:
    """The owner of the folder below RUNS that this run, or a stage made for it, would take."""
    if name in TOOL_FOLDERS:
        return "a tool keeps its results under that name"
    if name.startswith(("data-", "held-out-")):
        return "text that is made for a recipe has such a name"
    for folder in (name, f"data-{name}", f"held-out-{name}"):
        if folder in load_pipeline():
            return f"a stage of recipes/pipeline.yaml has the name {folder}"
    return None


def _located(rows: Mapping[str, SourceRow], layers: list[Layer]) -> dict[str, SourceRow]:
    """The rows with paths from here: in a file, a path is relative to that file."""
    folders = {
        name: layer.file.parent
        for name in rows
        for layer in layers
        if layer.has(["sources", name, "path"])
    }
    return {
        name: located({name: row}, folders[name])[name] if name in folders else row
        for name, row in rows.items()
    }


def _parent(file: Path, layers: list[Layer]) -> str:
    """The stage that a recipe file belongs to, or extends."""
    for layer in reversed(layers):
        if (stage := stage_of_file(layer.file)) is not None:
            return stage
    raise UserError(
        f"{short(file)}: extends: it reaches no stage's recipe; extend one, such as "
        "`extends: pretrain/stage1.yaml`"
    )


def _kind(stage: str, layers: list[Layer]) -> type:
    kind = RECIPE_TYPES.get(stage_row(stage).engine)
    if kind is None:
        raise UserError(
            f"{stage}: has no recipe of its own; name a stage that trains, merges or scores"
        )
    if kind is not PosttrainRecipe:
        return kind
    named = [layer for layer in layers if "trainer" in layer.values]
    trainer = str(named[-1].values["trainer"]) if named else ""
    if trainer not in TRAINERS:
        file = (named or layers)[-1].file
        hint = did_you_mean(trainer, TRAINERS)
        raise UserError(f"{short(file)}: trainer: {trainer or 'missing'}: unknown; {hint}")
    return TRAINERS[trainer]


def _check(loaded: Loaded[Any]) -> None:
    """Check what one file does not show: names in other tables, and values of overlays."""
    recipe = loaded.recipe
    layers = [*loaded.layers, *loaded.own]
    if isinstance(recipe, PretrainRecipe):
        check_sources(recipe.sources, sources_of(recipe), loaded.file)
        _check_mixture(recipe, layers)
        if recipe.on_nanotron_0_4:
            values = lay_over(asdict(recipe.nanotron), recipe.on_nanotron_0_4)
            parse(
                values,
                Nanotron,
                [one.below(key) for one in layers for key in ("nanotron", "on_nanotron_0_4")],
            )
        for layer in loaded.own:
            for path in (["nanotron", "tokenizer"], ["on_nanotron_0_4"]):
                if layer.has(path):
                    remedy = "the scale's tokenizer is used" if len(path) > 1 else "use nanotron:"
                    raise UserError(
                        f"{layer.named(path)}: not read in a recipe of one's own; {remedy}"
                    )
    elif isinstance(recipe, PosttrainRecipe):
        wanted = PAIRS if isinstance(recipe, DpoRecipe) else CHATS
        config_of = {
            split: config for config, rows in load_splits().splits.items() for split in rows
        }
        for name in recipe.mixture:
            if name not in config_of:
                hint = did_you_mean(name, config_of)
                _refuse(layers, f"mixture.{name}", f"unknown split; {hint}")
            if config_of[name] not in wanted:
                problem = f"of {config_of[name]}, but {recipe.trainer} takes {' or '.join(wanted)}"
                _refuse(layers, f"mixture.{name}", f"{problem} (posttrain/splits.yaml)")
        if (template := template_file(loaded)) and not template.is_file():
            problem = f"{recipe.template.file}: no such file beside it; write its name"
            _refuse(layers, "template.file", problem)


def _check_mixture(recipe: PretrainRecipe, layers: list[Layer]) -> None:
    known, seen = sources_of(recipe), dict[str, str]()
    for name in recipe.mixture:
        if name not in known:
            hint = did_you_mean(name, known)
            problem = f"unknown source; {hint}; a new one gets a row in recipes/sources.yaml"
            _refuse(layers, f"mixture.{name}", problem)
        if (twin := seen.setdefault(canonical(name, known), name)) != name:
            problem = f"the same source as {twin}; give it one line with the sum of both weights"
            _refuse(layers, f"mixture.{name}", problem)


def _refuse(layers: list[Layer], key: str, problem: str) -> None:
    path = key.split(".", 1)
    owner = next((one for one in reversed(layers) if one.has(path)), layers[-1])
    raise UserError(f"{short(owner.file)}: {key}: {problem}")


def sources_of(recipe: PretrainRecipe) -> Mapping[str, SourceRow]:
    """The rows of sources.yaml and those of the recipe itself."""
    if not recipe.sources:
        return load_sources()
    return {**load_sources(), **recipe.sources}


def canonical(name: str, sources: Mapping[str, SourceRow]) -> str:
    """The source of which `name` is another name; offsets and permutations use it."""
    return sources[name].same_as or name


def template_file(loaded: Loaded[Any]) -> Path | None:
    """The template that a post-training recipe names, beside the file that names it."""
    for layer in reversed([*loaded.layers, *loaded.own]):
        if layer.has(["template", "file"]):
            name = cast(Any, layer.values["template"])["file"]
            return layer.file.parent / name if name else None
    return None
