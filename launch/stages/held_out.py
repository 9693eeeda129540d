"""The held-out stage: text that no stage trains on, the same for every stage that is scored."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ground.checksums import seal
from ground.errors import UserError
from ground.files import read_json_lines
from ground.hub import Repository
from launch.recipe.scale import Scale
from launch.recipe.tables import StageRow
from launch.run.folder import StageRun, cache_root
from launch.stages.sources import (
    Data,
    StandInData,
    build_all,
    check_standins,
    mixtures_of,
    repositories,
    source_job,
)

FILE = "held_out.jsonl"


@dataclass(frozen=True)
class HeldOutRecipe:
    fraction: float  # of documents
    bytes_per_category: int
    sources: dict[str, Data]
    categories: dict[str, str]  # of each source


@dataclass(frozen=True, kw_only=True)
class HeldOutStage(StageRun):
    kind: ClassVar = "held-out"
    libraries: ClassVar = ("datatrove",)
    small_outputs: ClassVar = True
    recipe: HeldOutRecipe

    @staticmethod
    def resolve(row: StageRow, at: Scale) -> HeldOutRecipe:
        mixture, says = mixtures_of(row.mixture_of, at), at.values.held_out
        return HeldOutRecipe(
            says.fraction,
            says.bytes_per_category,
            dict(sorted(mixture.data.items())),
            {name: mixture.rows[name].category for name in sorted(mixture.data)},
        )

    def recipe_values(self) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "fraction": recipe.fraction,
            "bytes_per_category": recipe.bytes_per_category,
            "sources": {name: data.values() for name, data in recipe.sources.items()},
            "categories": recipe.categories,
        }

    @property
    def shapes_results(self) -> bool:
        return False  # what is kept out of training is the data stages' own fraction

    def refuse(self) -> None:
        check_standins(self.recipe.sources)

    def needs_of_hub(self) -> Iterable[Repository]:
        return repositories(self.recipe.sources)

    @property
    def texts_file(self) -> Path:
        """Lines {category, source, text}."""
        return self.folder / FILE

    @property
    def outputs(self) -> Iterable[Path]:
        return [self.folder]

    def texts(self) -> dict[str, list[str]]:
        """Documents by category, the categories in order."""
        texts: dict[str, list[str]] = {}
        for row in read_json_lines(self.texts_file):
            texts.setdefault(row["category"], []).append(row["text"])
        return dict(sorted(texts.items()))

    def work(self, lock: int) -> dict[str, Any]:
        from datatrove_pipelines.held_out import write_held_out

        files = build_all(self.recipe.sources)
        sizes = write_held_out(self._jobs(files), self.texts_file, cache_root())
        if not sizes:
            self.texts_file.unlink()
            raise UserError(
                f"{self.stage} at {self.arguments}: no document is held out, there are too few; "
                "give more text, in more documents, or raise held_out.fraction in the scale file"
            )
        seal(self.folder, [FILE])
        return {"bytes": sizes}

    def _jobs(self, files: Mapping[str, Path]) -> Iterator[tuple[str, Any, int]]:
        """(category, job, bytes), once per text: sources of one stand-in share its documents."""
        from datatrove_pipelines.cleaning.steps import in_order

        recipe = self.recipe
        unique = {}
        for name, data in recipe.sources.items():
            text = data.name if isinstance(data, StandInData) else name
            job = source_job(name, data, files, recipe.fraction)
            unique[recipe.categories[name], text] = job
        texts_of = Counter(category for category, _ in unique)
        for (category, _), job in zip(unique, in_order(list(unique.values())), strict=True):
            yield category, job, recipe.bytes_per_category // texts_of[category]
