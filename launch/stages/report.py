"""The report stage: one page of all that the run has made."""

from dataclasses import dataclass
from typing import Any, ClassVar

from launch.recipe.scale import Scale
from launch.recipe.tables import StageRow
from launch.run.folder import StageRun


@dataclass(frozen=True)
class ReportRecipe:
    """There is nothing to choose."""


@dataclass(frozen=True, kw_only=True)
class ReportStage(StageRun):
    kind: ClassVar = "report"
    libraries: ClassVar = ("jinja2", "matplotlib")
    recipe: ReportRecipe

    @staticmethod
    def resolve(row: StageRow, at: Scale) -> ReportRecipe:
        return ReportRecipe()

    def refuse(self) -> None:
        from launch.recipe.evaluation import load_peers
        from launch.report.cost import price_given

        price_given()
        load_peers()

    def lost(self, thorough: bool = False) -> str | None:
        from launch.report.page import lost

        return lost(self)

    def work(self, lock: int) -> dict[str, Any]:
        from launch.report.page import make_report

        return make_report(self)

    def show(self) -> None:
        from launch.report.page import show

        show(self)
