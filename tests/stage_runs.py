"""Stages with plain values for a recipe and nothing to do: run folders as any stage has them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from launch.run.folder import StageRun


@dataclass(frozen=True)
class PlainRecipe:
    """`values` are the recipe; the rest is what reports ask of a pretraining stage's."""

    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def mixture(self) -> Mapping[str, float]:
        mixture: Mapping[str, float] = self.values["mixture"]
        return mixture


@dataclass(frozen=True, kw_only=True)
class PlainStage(StageRun):
    """`log` gets a line for each thing that is asked of the stage."""

    libraries: ClassVar = ("datatrove",)
    recipe: PlainRecipe = PlainRecipe()
    scale: str = "small"
    arguments: str = "SCALE=small"
    kind: str = ""  # type: ignore[misc]
    seals_models: bool = False  # type: ignore[misc]  # tests put folders into it
    log: list[str] = field(default_factory=list)
    outside: Path | None = None  # a file that the stage writes outside of its folder
    refusal: Exception | None = None

    def recipe_values(self) -> dict[str, Any]:
        return dict(self.recipe.values)

    def refuse(self) -> None:
        self.log.append(f"refuse {self.stage}")
        if self.refusal:
            raise self.refusal

    def work(self, lock: int) -> dict[str, Any]:
        self.log.append(f"work {self.stage}")
        if self.outside:
            self.outside.touch()
        return {"lock": lock}

    def lost(self, thorough: bool = False) -> str | None:
        return None if not self.outside or self.outside.exists() else f"{self.outside}: gone"

    @property
    def outputs(self) -> Iterable[Path]:
        return [self.folder / "hf"]

    def show(self) -> None:
        self.log.append(f"show {self.stage}")


def plain(stage: str, values: Mapping[str, Any] | None = None, **more: Any) -> PlainStage:
    """A stage of `values`; `takes` in `more` are the stages that it takes."""
    inputs = {run.stage: run for run in more.pop("takes", ())}
    return PlainStage(stage=stage, recipe=PlainRecipe(values or {}), inputs=inputs, **more)


def finished(run: StageRun, **results: Any) -> StageRun:
    """The stage with a folder that says it is done."""
    run.begin(force=False)
    run.finish(**results)
    return run
