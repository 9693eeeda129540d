"""`make mixture`: a stage's mixture as planned and as drawn, by source, category and language."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ground.errors import UserError
from ground.files import read_json_lines, write_text
from launch import walk
from launch.recipe.load import is_recipe_file
from launch.recipe.scale import Scale
from launch.recipe.tables import SourceRow
from launch.report.results import Row, by_category
from launch.report.terminal import print_table_of
from launch.run.folder import runs_root
from launch.stages import accounting
from launch.stages.pretrain import PretrainStage
from launch.stages.sources import HubData, planned

FOLDER = "mixture"  # of runs/<scale>/
BAR = 40  # characters of a share of 100 %


@dataclass(frozen=True)
class Line:
    """One source of a stage. Shares are of the stage's own tokens."""

    name: str
    row: SourceRow
    planned: float
    realised: float
    tokens: int
    epochs: float | None  # over this stage and those before; None: nothing says how much there is


@dataclass(frozen=True)
class Drawn:
    """What a stage has drawn, or will have."""

    lines: list[Line]
    said_by: str


def drawn(stage: str, at: Scale) -> Drawn:
    """The sources of a stage that pretrains, the largest first. Raises UserError for another stage."""
    run = walk.resolve(stage, at)
    if not isinstance(run, PretrainStage):
        raise UserError(f"STAGE={stage}: has no mixture of text; name a stage that pretrains")
    rows, weights = planned(stage, at).rows, run.recipe.mixture
    tokens, said_by = _tokens(run)
    epochs, total = _epochs(run), max(sum(tokens.values()), 1)
    lines = [
        Line(
            name, rows[name], weights[name] / sum(weights.values()), tokens[name] / total,
            tokens[name], epochs.get(name),
        )
        for name in sorted(weights, key=lambda name: -weights[name])
    ]  # fmt: skip
    return Drawn(lines, said_by)


def _tokens(run: PretrainStage) -> tuple[Counter[str], str]:
    """The stage's own tokens of each source, and who says so: its last count, else the mixture."""
    lines = read_json_lines(run.folder / "metrics.jsonl", key="step")
    counts = [line for line in lines if "tokens_per_source" in line]
    if not counts or (run.manifest() or {}).get("identity") != run.identity:
        tokens = Counter(accounting.tokens_per_source([run]))
        return tokens, f"drawn: by the mixture, for the {run.steps - run.first_step:,} steps"
    seen = Counter(counts[-1]["tokens_per_source"])
    seen.subtract(accounting.tokens_per_source(run.earlier))
    return seen, f"drawn: the run's own count, up to step {counts[-1]['step']:,} of {run.steps:,}"


def _epochs(run: PretrainStage) -> dict[str, float]:
    """By the shards, where they are written, else by the published number of tokens."""
    if run.data.is_finished():
        tokens = {name: run.data.shards[name]["tokens"] for name in run.recipe.mixture}
    else:
        tokens = {
            name: data.tokens if data.portion is None else data.portion[1]
            for name, data in run.data.recipe.sources.items()
            if isinstance(data, HubData) and (data.portion or data.tokens)
        }
    return accounting.epochs(run, {n: t for n, t in tokens.items() if n in run.recipe.mixture})


def show(stage: str, at: Scale) -> None:
    """Print the tables, and draw both sums."""
    found = drawn(stage, at)
    rows = [[one.name, one.row.category, one.row.language, *_cells(one)] for one in found.lines]
    columns = ("source", "category", "language", "planned", "drawn", "tokens", "epochs")
    print_table_of(
        columns, rows, f"{stage} at {at.arguments}", [found.said_by], left=("category", "language")
    )
    name = Path(stage).stem if is_recipe_file(stage) else stage
    for key in ("category", "language"):
        groups = summed(found.lines, key)
        cells = [
            [one["category"], f"{one['planned']:.2%}", f"{one['realised']:.2%}", _bar(one)]
            for one in groups
        ]
        print_table_of((key, "planned", "drawn", ""), cells, left=("",))
        _draw(groups, f"{name} by {key}", runs_root() / at.name / FOLDER / f"{name}-{key}.svg")


def _cells(one: Line) -> list[str]:
    epochs = "" if one.epochs is None else f"{one.epochs:.2g}"
    return [f"{one.planned:.2%}", f"{one.realised:.2%}", f"{one.tokens:,}", epochs]


def summed(lines: list[Line], key: str) -> list[Row]:
    """The shares of each category or language, the largest first."""
    rows = [{"source": o.name, "planned": o.planned, "realised": o.realised} for o in lines]
    groups = by_category(rows, {one.name: getattr(one.row, key) for one in lines})
    return sorted(groups, key=lambda group: -group["planned"])


def _bar(group: Row) -> str:
    return "█" * round(BAR * group["realised"])


def _draw(groups: list[Row], title: str, file: Path) -> None:
    from launch.report.charts import draw, mixture_chart

    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, draw(mixture_chart(groups, title), title=True))
    print(file)
