"""Merging stages: a mergekit file whose models are stages, run by posttrain/merge.py."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from ground.errors import UserError, did_you_mean
from ground.files import checkpoints
from launch.recipe.book import Loaded
from launch.recipe.merging import MergeRecipe
from launch.recipe.scale import Scale, scale
from launch.run.folder import StageRun


def check_taken(where: str, model: str, takes: Mapping[str, StageRun]) -> None:
    """Refuse a model `<stage>/<folder>` of a stage that is not taken, or has no such folder."""
    stage, _, folder = model.partition("/")
    if stage not in takes:
        raise UserError(
            f"{where}: {model}: takes no stage '{stage}' (recipes/pipeline.yaml); "
            f"{did_you_mean(stage, takes)}"
        )
    if not re.fullmatch(takes[stage].models, folder):
        pattern = takes[stage].models or "no folder"
        raise UserError(f"{where}: {model}: {stage} leaves no such model; write {pattern} of it")


@dataclass(frozen=True, kw_only=True)
class MergeStage(StageRun):
    kind: ClassVar = "merge"
    models: ClassVar = "hf"
    libraries: ClassVar = ("mergekit", "torch", "transformers")
    recipe: MergeRecipe

    @staticmethod
    def resolve(loaded: Loaded[MergeRecipe], at: Scale) -> MergeRecipe:
        return scale(loaded, at)

    def refuse(self) -> None:
        for index, row in enumerate(self.recipe.models):
            check_taken(self.where(f"models.{index}.model"), row.model, self.inputs)

    def config(self) -> dict[str, Any]:
        """The mergekit config: the recipe with folders for stages."""
        config = asdict(self.recipe)
        del config["stage"]
        models = [
            asdict(row) | {"model": str(resolve_model(row.model, self.inputs))}
            for row in self.recipe.models
        ]
        return {**config, "models": models}

    def work(self, lock: int) -> dict[str, Any]:
        """Merge into the stage's hf/."""
        from posttrain.merge import merge

        config = self.config()
        # The first model lends its tokenizer, template and generation config.
        lender = self.inputs[self.recipe.models[0].model.partition("/")[0]]
        merge(config, self.folder / "hf", lender.folder / "hf")
        return {
            "merged": [
                {"model": row.model, "folder": resolved["model"], **asdict(row.parameters)}
                for row, resolved in zip(self.recipe.models, config["models"], strict=True)
            ]
        }


def resolve_model(name: str, inputs: Mapping[str, StageRun]) -> Path:
    """The transformers folder that `<stage>/<folder>` names."""
    stage, _, below = name.partition("/")
    folder = inputs[stage].folder
    kind, _, number = below.partition("/")
    if kind != "checkpoints" or not number.startswith("-"):
        return folder / below
    saved = checkpoints(folder)
    if not number[1:].isdigit() or not 0 < int(number[1:]) <= len(saved):
        names = ", ".join(path.name for path in saved) or "none"
        raise UserError(
            f"{name}: {folder / 'checkpoints'} has {len(saved)} checkpoints ({names}); save more "
            f"often in the recipe of {stage}, or count from -1"
        )
    return saved[int(number)]
