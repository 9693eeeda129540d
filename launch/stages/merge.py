"""Merging stages: a mergekit file whose models are stages, run by posttrain/merge.py."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from ground.errors import UserError
from launch.recipe.book import Loaded
from launch.recipe.merging import MergeRecipe
from launch.recipe.scale import Scale, scale
from launch.run.folder import StageRun
from launch.stages.checkpoint import CheckpointStage


@dataclass(frozen=True, kw_only=True)
class MergeStage(StageRun):
    kind: ClassVar = "merge"
    models: ClassVar = "hf"
    libraries: ClassVar = ("mergekit", "torch", "transformers")
    recipe: MergeRecipe

    @staticmethod
    def resolve(loaded: Loaded[MergeRecipe], at: Scale) -> MergeRecipe:
        return scale(loaded, at)

    def started_from(self, starts: Sequence[StageRun]) -> "MergeStage":
        """With `starts` in place of the stages of its models, in their order."""
        merged = list(dict.fromkeys(row.model.partition("/")[0] for row in self.recipe.models))
        if len(merged) < 2:
            raise UserError(
                f"FROM=: {self.stage} merges models of one stage, {', '.join(merged)}; name a merge "
                "of several stages"
            )
        if len(starts) != len(merged):
            named = ",".join(one.recipe.named for one in starts if isinstance(one, CheckpointStage))
            raise UserError(
                f"FROM={named}: names {len(starts)} checkpoint{'s' * (len(starts) != 1)}; "
                f"{self.stage} takes {len(merged)}: {', '.join(merged)}; name one for each, in this "
                "order, commas between"
            )
        # Their place keeps the name, which the recipe's `models` say.
        return replace(self, inputs={**self.inputs, **dict(zip(merged, starts, strict=True))})

    def refuse(self) -> None:
        for index, row in enumerate(self.recipe.models):
            self.check_taken(f"models.{index}.model", row.model)
        self._refuse_other_sizes()

    def _refuse_other_sizes(self) -> None:
        """Refuse checkpoints of FROM= that are not of one shape, before any weight is fetched."""
        starts = [one.recipe for one in self.inputs.values() if isinstance(one, CheckpointStage)]
        for other in starts[1:]:
            first = starts[0].sizes
            for key, size in other.sizes.items():
                if size != first[key]:
                    raise UserError(
                        f"FROM={other.named}: config.json: {key}: {size}, that of "
                        f"{starts[0].named} is {first[key]}; name checkpoints of one shape"
                    )

    @property
    def outputs(self) -> Iterable[Path]:
        return [self.folder / "hf"]

    def config(self) -> dict[str, Any]:
        """The mergekit config: the recipe with each stage replaced by its folder."""
        config = asdict(self.recipe)
        del config["stage"]
        models = [
            asdict(row) | {"model": str(self.whole_model(row.model))} for row in self.recipe.models
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
