"""`make merge-sweep PARTNER=...`: the last merge's weight as a measurement.

The soup is merged with a partner at weights 0, 0.1, ... 1, by the recipe of the merge in all else.
Each merge is scored on what the partner is for (needles, bits per byte over the long window) and on
what it costs (both modes, tool calls), then deleted: only scores are kept. Stopped, it goes on.

    runs/<scale>/merge-sweep/<partner>.json  <partner>.svg  <partner>/<weight>.json
"""

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.errors import UserError, did_you_mean
from launch.merge import merge_recipe
from launch.recipe import load_pipeline
from launch.run_folder import StageRun, write_aside

STEPS = 10
NEEDLES_PER_CELL = 4
# Shares of the post-training scores that a merge may cost, and what the figure calls them.
SHARES = {
    "think_well_formed": "/think well-formed",
    "no_think_well_formed": "/no_think well-formed",
    "tool_call_parses": "tool call parses",
    "tool_listed": "tool is listed",
}


def weights() -> list[float]:
    """The partner's shares, 0 to 1."""
    return [round(step / STEPS, 6) for step in range(STEPS + 1)]


def run_sweep(partner: str, scale: str) -> Path:
    """Score what is not scored yet, print the table, write figure and JSON; returns the JSON's path."""
    from launch.stages import resolve, run_stage

    merge = resolve("merge", scale)
    soup_name, partner_name = (row["model"] for row in merge.recipe["models"])
    soup = merge.inputs[soup_name.partition("/")[0]]
    name, folder, stamp = _partner(partner or partner_name.partition("/")[0], scale)
    run_stage(soup)
    recipe = {"stage": merge.recipe, "partner": stamp, "needles": NEEDLES_PER_CELL}
    long_context = next(run for run in merge.inputs.values() if run.engine == "pretrain")
    run_stage(long_context)
    run = StageRun(
        f"merge-sweep/{name}", scale, "merge", recipe, {**long_context.inputs, soup.stage: soup}
    )
    with run.locked():
        points = [_point(run, soup, folder, weight) for weight in weights()]
    report = {
        "soup": soup_name,
        "partner": str(folder),
        "recipe_weight": merge.recipe["models"][1]["parameters"]["weight"],
        "points": points,
    }
    target = run.folder.with_suffix(".json")
    write_aside(target, json.dumps(report, indent=1) + "\n")
    draw(report, target.with_suffix(".svg"))
    show(report)
    print(f"{target}, figure in {target.with_suffix('.svg')}")
    return target


def _partner(partner: str, scale: str) -> tuple[str, Path, Any]:
    """(name, transformers folder, what tells its weights from others) of a stage or a folder."""
    from launch.stages import resolve, run_stage

    if (Path(partner) / "config.json").is_file():
        folder = Path(partner).resolve()
        files = sorted(folder.glob("*.safetensors"))
        stamp = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        named = folder.parent if folder.name == "hf" else folder
        return named.name, folder, stamp
    makers = ("pretrain", "posttrain", "merge")
    stages = [name for name, row in load_pipeline().items() if row["engine"] in makers]
    if partner not in stages:
        raise UserError(
            f"PARTNER={partner}: neither a stage that makes a model nor a transformers folder; "
            f"{did_you_mean(partner, stages)}"
        )
    run = resolve(partner, scale)
    run_stage(run)
    return partner, run.folder / "hf", run.identity


def sweep_config(recipe: dict[str, Any], soup: Path, partner: Path, weight: float) -> Any:
    """The merge's mergekit config with the partner's share of the weights at `weight`."""
    config = {key: value for key, value in copy.deepcopy(recipe).items() if key != "stage"}
    shares = ((soup, round(1 - weight, 6)), (partner, weight))
    config["models"] = [
        {"model": str(folder), "parameters": {"weight": share}} for folder, share in shares
    ]
    return config


def _point(run: StageRun, soup: StageRun, partner: Path, weight: float) -> dict[str, Any]:
    """The scores of one merge, kept beside the sweep."""
    from posttrain.merge import merge

    kept = run.folder / f"{weight:g}.json"
    try:
        point: dict[str, Any] = json.loads(kept.read_text("utf-8"))
        if point["identity"] == run.identity:
            return point
    except FileNotFoundError:
        pass
    print(f"{run.stage}: weight {weight:g}", flush=True)
    lender, merged = soup.folder / "hf", run.folder / "hf"
    config = sweep_config(merge_recipe("merge", run.scale), lender, partner, weight)
    try:
        merge(config, merged, lender)
        scores = _scores(run, soup)
    finally:
        shutil.rmtree(merged, ignore_errors=True)
    point = {"identity": run.identity, "weight": weight, **scores}
    write_aside(kept, json.dumps(point, indent=1) + "\n")
    return point


def _scores(run: StageRun, soup: StageRun) -> dict[str, Any]:
    """{needle, bits_per_byte, scores} of the run's hf/."""
    from launch.chats import chats_folder
    from launch.score import Scorer, needle_table
    from posttrain.scores import Scorer as ChatScorer

    scorer = Scorer.of(run)
    apo = next(taken for taken in soup.inputs.values() if taken.engine == "posttrain")
    asked, date = apo.recipe["scores"], apo.recipe["template"]["date_string"]
    chats = ChatScorer(
        scorer.tokenizer,
        chats_folder(apo.inputs["data-chats"]) / "held_out",
        asked["prompts_at_end"],
        asked["max_new_tokens"],
        {"date_string": date} if date else {},
    )
    lengths = [scorer.window // 4, scorer.window // 2, scorer.window]
    return {
        "needle": needle_table(scorer, lengths, NEEDLES_PER_CELL),
        "bits_per_byte": round(scorer.first_positions(scorer.window), 4),
        "scores": chats(scorer.model),
        "prompts": asked["prompts_at_end"],
    }


def _needle_share(point: dict[str, Any]) -> tuple[int, int]:
    """(found, asked) over all lengths and depths."""
    rows = point["needle"]
    return sum(row["hits"] for row in rows), sum(row["of"] for row in rows)


def curves(points: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float, float, float]]]:
    """{name: (share, low, high) for each weight}, with 95 % intervals."""
    from eval_tasks.intervals import wilson

    found: dict[str, list[tuple[float, float, float]]] = {}
    for point in points:
        counts = {"needles found": _needle_share(point)}
        for key, name in SHARES.items():
            counts[name] = round(point["scores"][key] * point["prompts"]), point["prompts"]
        for name, (hits, of) in counts.items():
            found.setdefault(name, []).append((hits / of, *wilson(hits, of)))
    return found


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
    from rich.console import Console
    from rich.table import Table

    shares = curves(report["points"])
    table = Table(title=f"{report['soup']} merged with {report['partner']}")
    for column in ("weight", *shares, "bits per byte"):
        table.add_column(column, justify="right")
    for index, point in enumerate(report["points"]):
        is_recipes = point["weight"] == report["recipe_weight"]
        cells = [f"{of[index][0]:.0%}" for of in shares.values()]
        table.add_row(
            f"{point['weight']:g}", *cells, f"{point['bits_per_byte']:.3f}",
            style="bold" if is_recipes else None,
        )  # fmt: skip
    Console().print(table)
