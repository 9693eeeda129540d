"""Merging stages: a mergekit file whose models are stages, run by posttrain/merge.py."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from launch.recipe.book import Loaded
from launch.recipe.merging import MergeRecipe
from launch.recipe.scale import Scale, scale
from launch.run.folder import StageRun


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
            self.check_taken(f"models.{index}.model", row.model)

    def config(self) -> dict[str, Any]:
        """The mergekit config: the recipe with each stage replaced by its folder."""
        config = asdict(self.recipe)
        del config["stage"]
        models = [
            asdict(row) | {"model": str(self.model_folder(row.model))} for row in self.recipe.models
        ]
        return {**config, "models": models}

    def work(self, lock: int) -> dict[str, Any]:
        """Merge into the stage's hf/."""
        from posttrain.merge import merge

        config = self.config()
        # Tokenizer, template and generation config are copied from the first model.
        lender = self.inputs[self.recipe.models[0].model.partition("/")[0]]
        merge(config, self.folder / "hf", lender.folder / "hf")
        return {
            "merged": [
                {"model": row.model, "folder": resolved["model"], **asdict(row.parameters)}
                for row, resolved in zip(self.recipe.models, config["models"], strict=True)
            ]
        }
