"""`make ablation NAME=...`: one change of a stage against its own recipe, over a few seeds.

Every run is a stage run of its own under runs/<scale>/ablations/, so that baselines are shared
between ablations and a stopped ablation goes on where it was.
"""

import copy
import json
import statistics
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf

from eval_tasks.intervals import summed
from launch.errors import UserError, did_you_mean
from launch.pretrain import earlier_stages, pretrain_recipe, starts_afresh
from launch.recipe import RECIPES, checked, load_scale, load_yaml
from launch.run_folder import StageRun, runs_root, write_aside
from launch.scale import lay_over
from launch.schema import Nanotron

SEEDS = (1, 2, 3)
# Of a short run's steps, as in the published schedule.
DECAY_SHARE = 0.1
# A run's loss is the mean of this many last steps, a single one is noise.
LAST_STEPS = 20
NEEDLES_PER_CELL = 10
# Sentence and question alone take about 50 tokens of a small vocabulary.
MIN_NEEDLE = 64


@dataclass
class AblationRow:
    """One row of recipes/ablations.yaml; a variant is an overlay of the `nanotron:` section."""

    of: str = MISSING
    question: str = MISSING
    variants: dict[str, Any] = field(default_factory=dict)


@cache
def load_ablations() -> dict[str, dict[str, Any]]:
    file = RECIPES / "ablations.yaml"
    rows = load_yaml(file).get("ablations")
    if not isinstance(rows, dict):
        raise UserError(f"{file}: ablations: missing; it holds the rows, one a name")
    return {
        str(name): checked(row, AblationRow, file, f"ablations.{name}")
        for name, row in rows.items()
    }


def ablation_runs(name: str, scale: str) -> dict[str, list[StageRun]]:
    """The runs of the baseline and of each variant, one a seed."""
    from launch.stages import resolve

    if name not in load_ablations():
        raise UserError(f"NAME={name}: no such ablation; {did_you_mean(name, load_ablations())}")
    row = load_ablations()[name]
    stage = resolve(row["of"], scale)
    variants = {"baseline": {}, **row["variants"]}
    return {
        variant: [_run(stage, f"{row['of']}-{variant}", overlay, seed) for seed in SEEDS]
        for variant, overlay in variants.items()
    }


def ablation_run(stage: str, scale: str) -> StageRun:
    """One run by the name of its folder, `ablations/<stage>-<variant>-<seed>`."""
    every = [
        run
        for name in load_ablations()
        for group in ablation_runs(name, scale).values()
        for run in group
    ]
    for run in every:
        if run.stage == stage:
            return run
    raise UserError(f"{stage}: no such run; {did_you_mean(stage, [run.stage for run in every])}")


def _run(stage: StageRun, name: str, overlay: dict[str, Any], seed: int) -> StageRun:
    recipe = copy.deepcopy(pretrain_recipe(stage.stage, stage.scale))
    nanotron = recipe["nanotron"]
    nanotron["general"]["seed"] = nanotron["data_stages"][0]["data"]["seed"] = seed
    if not any(taken.engine == "pretrain" for taken in stage.inputs.values()):
        steps = load_scale(stage.scale)["ablation_steps"]
        decay, schedule = (
            round(steps * DECAY_SHARE),
            nanotron["optimizer"]["learning_rate_scheduler"],
        )
        nanotron["tokens"]["train_steps"] = steps
        schedule |= {"lr_decay_starting_step": steps - decay, "lr_decay_steps": decay}
    lay_over(nanotron, copy.deepcopy(overlay))
    resolved = OmegaConf.to_container(OmegaConf.create({"nanotron": nanotron}), resolve=True)
    where = f"ablations of {stage.stage}: {name}"
    recipe["nanotron"] = checked(
        resolved["nanotron"],  # type: ignore[index, call-overload]  # a mapping went in
        Nanotron,
        RECIPES / "ablations.yaml",
        where,
    )
    return StageRun(f"ablations/{name}-{seed}", stage.scale, "pretrain", recipe, stage.inputs)


def run_ablation(name: str, scale: str) -> Path:
    """Run what is not done, print the table, write it to runs/<scale>/ablations/<name>.json."""
    from launch.stages import run_stage

    runs = ablation_runs(name, scale)
    # Seed by seed: a machine that slows down slows every variant.
    for of_one_seed in zip(*runs.values(), strict=True):
        for run in of_one_seed:
            run_stage(run)
    rows = {variant: [_figures(run) for run in group] for variant, group in runs.items()}
    report = {
        "ablation": name,
        "question": load_ablations()[name]["question"],
        "scale": scale,
        "seeds": list(SEEDS),
        "tokens": _tokens(runs["baseline"][0]),
        "variants": {variant: _summary(figures) for variant, figures in rows.items()},
        "needle": {
            variant: summed([cell for f in figures for cell in f["needle"]], "length", "depth")
            for variant, figures in rows.items()
        },
    }
    target = runs_root() / scale / "ablations" / f"{name}.json"
    write_aside(target, json.dumps(report, indent=1) + "\n")
    show(report)
    norms = {variant: _norms(group[0]) for variant, group in runs.items()}
    draw_norms(norms, target.with_suffix(".svg"))
    print(f"{target}, curve of the embedding's norm in {target.with_suffix('.svg')}")
    return target


def _tokens(run: StageRun) -> int:
    """Of the run's own steps."""
    first, second, *_ = lines = _metrics(run)
    return len(lines) * int(second["tokens"] - first["tokens"])


def _metrics(run: StageRun) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").open()]


def _figures(run: StageRun) -> dict[str, Any]:
    """What one run is compared by; scores that a stage does not have by itself are kept beside it."""
    from launch.score import Scorer, needle_table

    manifest, lines = run.manifest() or {}, _metrics(run)
    kept = run.folder / "ablation.json"
    try:
        scores = json.loads(kept.read_text())
    except FileNotFoundError:
        scorer = Scorer.of(run)
        window = _window(run)
        first = _window(earlier_stages(run)[0]) if starts_afresh(run) else window
        lengths = [n for n in (window // 4, window // 2, window, 2 * window) if n >= MIN_NEEDLE]
        scores = {
            "first_positions": scorer.first_positions(first),
            "needle": needle_table(scorer, lengths, NEEDLES_PER_CELL),
        }
        write_aside(kept, json.dumps(scores))
    return {
        "loss": statistics.fmean(line["loss"] for line in lines[-LAST_STEPS:]),
        "bits_per_byte": manifest["bits_per_byte"]["all"]["model"],
        "first_positions": scores["first_positions"],
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in lines),
        "needle": scores["needle"],
    }


def _window(run: StageRun) -> int:
    length: int = run.recipe["nanotron"]["tokens"]["sequence_length"]
    return length


METRICS = ("loss", "bits_per_byte", "first_positions", "tokens_per_second")


def _summary(figures: list[dict[str, Any]]) -> dict[str, Any]:
    from eval_tasks.intervals import mean_interval

    return {
        metric: dict(
            zip(("mean", "low", "high"), mean_interval([f[metric] for f in figures]), strict=True)
        )
        for metric in METRICS
    }


def verdict(baseline: dict[str, float], variant: dict[str, float]) -> str:
    """`no difference` where two intervals overlap, else which way and how far the mean moved."""
    if variant["low"] <= baseline["high"] and baseline["low"] <= variant["high"]:
        return "no difference"
    return f"{variant['mean'] / baseline['mean'] - 1:+.1%}"


def show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from launch.score import needles_by_length

    title = f"{report['ablation']}: {report['question']} ({report['tokens']:,} tokens, 3 seeds)"
    table = Table("variant", *(m.replace("_", " ") for m in METRICS), title=title)
    baseline = report["variants"]["baseline"]
    for variant, summary in report["variants"].items():
        cells = []
        for metric in METRICS:
            found = summary[metric]
            digits = 0 if metric == "tokens_per_second" else 3
            text = f"{found['mean']:,.{digits}f} ± {found['high'] - found['mean']:,.{digits}f}"
            cells.append(
                text if variant == "baseline" else f"{text}\n{verdict(baseline[metric], found)}"
            )
        table.add_row(variant, *cells)
    console = Console()
    console.print(table)
    for variant, rows in report["needle"].items():
        console.print(f"{variant}: {needles_by_length(rows)}", highlight=False)


def _norms(run: StageRun) -> list[tuple[int, float]]:
    return [
        (line["step"], line["embedding_norm"]) for line in _metrics(run) if "embedding_norm" in line
    ]


def draw_norms(norms: dict[str, list[tuple[int, float]]], file: Path) -> None:
    """The embedding rows' mean norm over the steps, a curve a variant, as SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for variant, points in norms.items():
        axes.plot(*zip(*points, strict=True), label=variant)
    axes.set(xlabel="step", ylabel="mean L2 norm of an embedding", ylim=(0, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)
