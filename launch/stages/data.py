"""A data stage: the sources of its mixtures as token shards in the cache."""

import os
from dataclasses import dataclass
from typing import Any, ClassVar

from ground.errors import UserError
from launch.recipe.book import load_recipe
from launch.recipe.scale import Scale, scale
from launch.recipe.tables import StageRow
from launch.run.folder import StageRun, cache_root
from launch.stages.sources import Data, OwnText, build_all, check_standins, mixtures_of, source_job
from launch.stages.tokenizer import TokenizerStage


@dataclass(frozen=True)
class DataRecipe:
    sources: dict[str, Data]
    held_out_fraction: float  # of documents, never written
    unreleased: dict[str, str]  # what is left out, and what to build in its place
    seed: int


@dataclass(frozen=True, kw_only=True)
class DataStage(StageRun):
    kind: ClassVar = "data"
    takes: ClassVar = ("tokenizer",)
    libraries: ClassVar = ("datatrove", "tokenizers")
    recipe: DataRecipe

    @staticmethod
    def resolve(row: StageRow, at: Scale) -> DataRecipe:
        mixture = mixtures_of(row.mixture_of, at)
        return DataRecipe(
            dict(sorted(mixture.data.items())),
            at.values.held_out.fraction,
            mixture.unreleased,
            scale(load_recipe(row.mixture_of[0]), at).nanotron.data_seed,
        )

    def recipe_values(self) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "sources": {name: data.values() for name, data in recipe.sources.items()},
            "held_out_fraction": recipe.held_out_fraction,
            "unreleased": recipe.unreleased,
            "seed": recipe.seed,
        }

    @property
    def shards(self) -> dict[str, Any]:
        """Shards of a finished stage: {source: {folder, tokens, documents, bytes, token_bytes}}."""
        shards: dict[str, Any] = (self.manifest() or {}).get("shards", {})
        return shards

    def is_there(self) -> bool:
        return all((cache_root() / shard["folder"]).is_dir() for shard in self.shards.values())

    def refuse(self) -> None:
        check_standins(self.recipe.sources)

    def work(self, lock: int) -> dict[str, Any]:
        from datatrove_pipelines.pipeline import tokenize_all

        recipe = self.recipe
        for name, substitute in recipe.unreleased.items():
            print(
                f"{self.stage}: {name} was never released and is left out, the other weights are "
                f"renormalised; to put it back, build it ({substitute}) and name it in "
                "recipes/sources.yaml",
                flush=True,
            )
        files = build_all(recipe.sources)
        jobs = [
            source_job(name, data, files, recipe.held_out_fraction, recipe.seed)
            for name, data in recipe.sources.items()
        ]
        tokenizer = self.input_of(TokenizerStage)
        workers = os.cpu_count() or 1
        infos = tokenize_all(jobs, tokenizer.tokenizer, cache_root(), workers)
        if len({info.eos_id for info in infos}) != 1:
            raise UserError(f"{self.stage}: shards of several tokenizers; {self.command} FORCE=1")
        own = {name: one.path for name, one in recipe.sources.items() if isinstance(one, OwnText)}
        return {
            "shards": {
                info.name: {
                    "folder": str(info.folder.relative_to(cache_root())),
                    "tokens": info.tokens,
                    "documents": info.documents,
                    "bytes": info.bytes,
                    "token_bytes": info.token_bytes,
                    **({"left_out": info.left_out} if info.name in own else {}),
                }
                for info in infos
            },
            "eos_id": infos[0].eos_id,
            **({"own_text": own} if own else {}),
        }
