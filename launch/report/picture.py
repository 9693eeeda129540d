"""report.png: name, curve and scores in one picture, of the size that links are shown with."""

from pathlib import Path

from matplotlib.figure import Figure

from ground.files import written_aside
from launch.report.charts import COLOURS, values
from launch.report.document import Report, Score
from launch.report.sections import names_of

INCHES, DOTS = (12, 6.3), 100  # 1,200 x 630
MOST_SCORES = 8
INK, DIM = "#1a1a1a", "#555555"


def write_picture(report: Report, file: Path) -> None:
    figure = Figure(figsize=INCHES, dpi=DOTS, facecolor="white")
    size = f"{report.parameters / 1e6:,.3g}M parameters, " if report.parameters else ""
    figure.text(0.04, 0.9, report.name, fontsize=30, weight="bold", color=INK, va="center")
    tokens = max((one.tokens or 0 for one in report.stages), default=0)
    line = f"{size}{tokens:,} tokens, {len(report.stages)} stages, {report.arguments}"
    figure.text(0.04, 0.82, line, fontsize=14, color=DIM, va="center")
    figure.text(0.04, 0.035, "smollm3-recipe", fontsize=11, color=DIM, va="center")
    scores = shown_scores(report)
    _curve(report, figure, 0.42 if scores else 0.88)
    if scores:
        _scores(scores, figure)
    with written_aside(file) as aside:
        figure.savefig(aside, format="png", metadata={"Software": None})


def _curve(report: Report, figure: Figure, width: float) -> None:
    """The first chart of the page: loss over tokens where anything was trained."""
    drawn = [chart for section in report.sections for chart in section.charts]
    lines = [chart for chart in drawn if chart.kind == "lines"]
    if not lines:
        return
    axes = figure.add_axes((0.07, 0.17, width, 0.55))
    for number, one in enumerate(lines[0].series):
        axes.plot(one.x, values(one), color=COLOURS[number % len(COLOURS)], label=one.name)
    axes.set(xlabel=lines[0].x_label, ylabel=lines[0].y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=10)


def shown_scores(report: Report) -> list[Score]:
    """Those of the release; where it has none, of the model that was scored first."""
    models = [score.model for score in report.scores]
    shown = "release" if "release" in models else next(iter(models), "")
    return [score for score in report.scores if score.model == shown][:MOST_SCORES]


def _scores(scores: list[Score], figure: Figure) -> None:
    axes = figure.add_axes((0.66, 0.17, 0.29, 0.55))
    for place, one in enumerate(scores):
        axes.plot([one.low, one.high], [place, place], color=COLOURS[0], linewidth=3)
        axes.plot(one.value, place, "o", color=COLOURS[0])
        if one.chance is not None:
            axes.plot(one.chance, place, "|", color=COLOURS[5], markersize=14)
    axes.set_yticks(range(len(scores)), names_of(scores))
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="score, 95 % interval; |: chance", title=scores[0].model)
    axes.spines[["top", "right"]].set_visible(False)
