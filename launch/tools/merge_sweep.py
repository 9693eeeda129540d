"""`make merge-sweep PARTNER=...`: the last merge's weight as a measurement.

The soup is merged with a partner at weights 0, 0.1, ... 1, in all else by the merge's recipe.
Each merge is scored on what the partner is for (needles, bits per byte over the long window) and on
what it costs (both modes, tool calls), then deleted: only scores are kept. A stopped sweep resumes.

    runs/<scale>/merge-sweep/<partner>.json  <partner>.svg  <partner>/<weight>.json
"""

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from ground.checksums import verify_if_sealed
from ground.errors import UserError, did_you_mean
from ground.files import kept_record, write_json, write_record
from launch import walk
from launch.recipe.merging import MergeRecipe
from launch.recipe.scale import Scale
from launch.recipe.tables import load_pipeline
from launch.report.sweeps import curves
from launch.report.terminal import print_table_of
from launch.stages.merge import MergeStage
from launch.stages.posttrain import PosttrainStage
from launch.stages.pretrain import PretrainStage

STEPS = 10
NEEDLES_PER_CELL = 4


def weights() -> list[float]:
    """The partner's shares, 0 to 1."""
    return [round(step / STEPS, 6) for step in range(STEPS + 1)]


@dataclass(frozen=True)
class SweepRecipe:
    """All that the scores of a sweep depend on."""

    stage: MergeRecipe
    partner: Any  # what tells its weights from others
    needles: int


@dataclass(frozen=True, kw_only=True)
class SweepRun(MergeStage):
    """The sweep's folder; `long_context` gives the text that its merges are scored on."""

    recipe: Any  # a SweepRecipe
    soup: MergeStage
    long_context: PretrainStage


def run_sweep(partner: str, at: Scale) -> Path:
    """Score what is not scored yet, print the table, write figure and JSON; returns the JSON's path."""
    merge = cast(MergeStage, walk.resolve("merge", at))
    soup_model, partner_model = (row.model for row in merge.recipe.models)
    soup = cast(MergeStage, merge.inputs[soup_model.partition("/")[0]])
    name, folder, stamp = _partner(partner or partner_model.partition("/")[0], at)
    walk.run_stage(soup)
    soup.verify_model(soup.folder / "hf")
    verify_if_sealed(folder)
    long_context = merge.input_of(PretrainStage)
    walk.run_stage(long_context)
    run = SweepRun(
        stage=f"merge-sweep/{name}", scale=at.name, arguments=at.arguments, soup=soup,
        recipe=SweepRecipe(merge.recipe, stamp, NEEDLES_PER_CELL), long_context=long_context,
        inputs={**long_context.inputs, soup.stage: soup},
    )  # fmt: skip
    with run.locked():
        points = [_point(run, folder, weight) for weight in weights()]
    report = {
        "soup": soup_model,
        "partner": str(folder),
        "recipe_weight": merge.recipe.models[1].parameters.weight,
        "points": points,
    }
    target = run.folder.with_suffix(".json")
    write_json(target, report)
    draw(report, target.with_suffix(".svg"))
    show(report)
    print(f"{target}, figure in {target.with_suffix('.svg')}")
    return target


def _partner(partner: str, at: Scale) -> tuple[str, Path, Any]:
    """(name, transformers folder, what tells its weights from others) of a stage or a folder."""
    if (Path(partner) / "config.json").is_file():
        folder = Path(partner).resolve()
        files = sorted(folder.glob("*.safetensors"))
        stamp = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        named = folder.parent if folder.name == "hf" else folder
        return named.name, folder, stamp
    makers = ("pretrain", "posttrain", "merge")
    stages = [name for name, row in load_pipeline().items() if row.engine in makers]
    if partner not in stages:
        raise UserError(
            f"PARTNER={partner}: neither a stage that makes a model nor a transformers folder; "
            f"{did_you_mean(partner, stages)}"
        )
    run = walk.resolve(partner, at)
    walk.run_stage(run)
    return partner, run.folder / "hf", run.identity


def sweep_config(recipe: MergeRecipe, soup: Path, partner: Path, weight: float) -> dict[str, Any]:
    """The merge's mergekit config with the partner's share of the weights at `weight`."""
    config = asdict(recipe)
    del config["stage"]
    shares = ((soup, round(1 - weight, 6)), (partner, weight))
    config["models"] = [
        {"model": str(folder), "parameters": {"weight": share}} for folder, share in shares
    ]
    return config


def _point(run: SweepRun, partner: Path, weight: float) -> dict[str, Any]:
    """The scores of one merge, kept beside the sweep."""
    from posttrain.merge import merge

    kept = run.folder / f"{weight:g}.json"
    point = kept_record(kept)
    if point and point["identity"] == run.identity:
        return point
    print(f"{run.stage}: weight {weight:g}", flush=True)
    lender, merged = run.soup.folder / "hf", run.folder / "hf"
    try:
        merge(sweep_config(run.recipe.stage, lender, partner, weight), merged, lender)
        scores = _scores(run)
    finally:
        shutil.rmtree(merged, ignore_errors=True)
    point = {"identity": run.identity, "weight": weight, **scores}
    write_record(kept, point)
    return point


def _scores(run: SweepRun) -> dict[str, Any]:
    """{needle, bits_per_byte, scores} of the run's hf/."""
    from launch.stages.scoring import Scorer, needle_table
    from posttrain.scores import Scorer as ChatScorer

    # The text of the long-context stage, the weights of the merge.
    scored = replace(run.long_context, stage=run.stage)
    scorer = Scorer.of(scored)
    apo = run.soup.input_of(PosttrainStage)
    asked, date = apo.recipe.recipe.scores, apo.recipe.recipe.template.date_string
    chats = ChatScorer(
        scorer.tokenizer,
        apo.chats.held_out,
        asked.prompts_at_end,
        asked.max_new_tokens,
        {"date_string": date} if date else {},
    )
    lengths = [scorer.window // 4, scorer.window // 2, scorer.window]
    return {
        "needle": needle_table(scorer, lengths, NEEDLES_PER_CELL),
        "bits_per_byte": round(scorer.first_positions(scorer.window), 4),
        "scores": chats(scorer.model),
        "prompts": asked.prompts_at_end,
    }


def draw(report: dict[str, Any], file: Path) -> None:
    """Shares with their intervals over the partner's weight, bits per byte below; as SVG."""
    from matplotlib.figure import Figure

    points = report["points"]
    x = [point["weight"] for point in points]
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for name, shares in curves(points).items():
        middle, low, high = zip(*shares, strict=True)
        (line,) = top.plot(x, middle, marker="o", markersize=3, label=name)
        top.fill_between(x, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    chance = points[0]["needle"][0]["chance"]
    top.axhline(chance, color="0.6", linestyle=":", label="needles by chance")
    top.set(ylabel="share, 95 % interval", ylim=(-0.02, 1.02))
    top.legend(frameon=False, fontsize=8)
    bottom.plot(
        x, [point["bits_per_byte"] for point in points], color="0.2", marker="o", markersize=3
    )
    bottom.set(xlabel="weight of the partner", ylabel="bits per byte")
    for axes in (top, bottom):
        axes.axvline(report["recipe_weight"], color="0.4", linestyle="--", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)


def show(report: dict[str, Any]) -> None:
    """One row per weight; that of the recipe is bold."""
    shares, points = curves(report["points"]), report["points"]
    rows = [
        [
            f"{point['weight']:g}",
            *(f"{of[index][0]:.0%}" for of in shares.values()),
            f"{point['bits_per_byte']:.3f}",
        ]
        for index, point in enumerate(points)
    ]
    weights_scored = [point["weight"] for point in points]
    recipes_own = report["recipe_weight"]
    bold = weights_scored.index(recipes_own) if recipes_own in weights_scored else None
    title = f"{report['soup']} merged with {report['partner']}"
    print_table_of(("weight", *shares, "bits per byte"), rows, title, bold=bold)
