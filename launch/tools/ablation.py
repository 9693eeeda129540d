"""`make ablation NAME=...`: one change of a stage against its own recipe, over a few seeds.

Every run is a separate stage run under runs/<scale>/ablations/, so that baselines are shared
between ablations and a stopped ablation continues where it was.
"""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from eval_tasks.intervals import mean_interval, summed
from ground.errors import UserError, did_you_mean
from ground.files import kept_record, read_json_lines, write_json, write_record
from launch import walk
from launch.recipe import load
from launch.recipe.book import load_recipe, sources_of
from launch.recipe.load import Layer, lay_over, parse
from launch.recipe.pretrain import Nanotron
from launch.recipe.scale import Scale, scale
from launch.recipe.tables import (
    AblationRow,
    SourceRow,
    load_ablations,
    load_pipeline,
    load_sources,
)
from launch.recipe.values import Positive, Text, section
from launch.report.sweeps import verdict
from launch.report.terminal import needles_by_length, print_table_of
from launch.run.folder import StageRun, runs_root
from launch.stages.budget import Wanted, portioned, with_margin
from launch.stages.pretrain import PretrainStage
from launch.stages.sources import data_of, plan_of

SEEDS = (1, 2, 3)
# Share of a short run's steps, as in the published schedule.
DECAY_SHARE = 0.1
# A run's loss is the mean of this many last steps, since a single one is noise.
LAST_STEPS = 20
NEEDLES_PER_CELL = 10
# Sentence and question take about 50 tokens of a small vocabulary.
MIN_NEEDLE = 64
RUNS = "ablations/"  # the start of these runs' names
MIXTURE = "mixture"  # the key of a variant that is not laid over `nanotron:`


def ablation_row(name: str) -> AblationRow:
    """A row of recipes/ablations.yaml. Raises UserError for an unknown name."""
    rows = load_ablations()
    if name not in rows:
        raise UserError(f"NAME={name}: no such ablation; {did_you_mean(name, rows)}")
    return rows[name]


def ablation_runs(name: str, at: Scale) -> dict[str, list[PretrainStage]]:
    """The runs of the baseline and of each variant, one per seed."""
    row = ablation_row(name)
    stage = cast(PretrainStage, walk.resolve(row.of, at))
    variants: dict[str, Mapping[str, object]] = {"baseline": {}, **row.variants}
    runs = {}
    for variant, overlay in variants.items():
        where = f"ablations.{name}.variants.{variant}"
        layer = Layer(load.RECIPES / "ablations.yaml", overlay, where)
        runs[variant] = [_run(stage, f"{row.of}-{variant}", layer, seed, at) for seed in SEEDS]
        if MIXTURE in overlay:
            runs[variant] = _on_other_mixture(runs[variant], f"{row.of}-{variant}", layer, at)
    return runs


def ablation_run(stage: str, at: Scale) -> StageRun:
    """One run by the name of its folder, `ablations/<stage>-<variant>-<seed>`."""
    groups = [group for name in load_ablations() for group in ablation_runs(name, at).values()]
    runs = {run.stage: run for group in groups for run in group}
    if stage not in runs:
        raise UserError(f"{stage}: no such run; {did_you_mean(stage, runs)}")
    return runs[stage]


def _run(stage: PretrainStage, name: str, overlay: Layer, seed: int, at: Scale) -> PretrainStage:
    nanotron: Any = asdict(stage.recipe.nanotron)
    nanotron["general"]["seed"] = nanotron["data_stages"][0]["data"]["seed"] = seed
    if not stage.earlier:
        steps = at.values.ablation_steps
        decay = round(steps * DECAY_SHARE)
        nanotron["tokens"]["train_steps"] = steps
        schedule = nanotron["optimizer"]["learning_rate_scheduler"]
        if (warmup := schedule["lr_warmup_steps"]) > steps - decay:
            remedy = f"write more than the {warmup} of lr_warmup_steps and a tenth to decay"
            raise UserError(f"{at.named('ablation_steps')}: {steps}: {remedy}")
        schedule |= {"lr_decay_starting_step": steps - decay, "lr_decay_steps": decay}
    overlay = replace(overlay, values={k: v for k, v in overlay.values.items() if k != MIXTURE})
    changed = lay_over(nanotron, _filled(overlay.values, nanotron))
    recipe = replace(stage.recipe, nanotron=parse(changed, Nanotron, [overlay]))
    return replace(
        stage, stage=f"{RUNS}{name}-{seed}", recipe=recipe, file=overlay.file, is_own=False,
        named=partial(_where, overlay, stage),
    )  # fmt: skip


@section
class OtherMixture:
    """What a variant says under `mixture`, where that is not another stage's."""

    mixture: dict[Text, Positive]


def _on_other_mixture(
    runs: list[PretrainStage], name: str, overlay: Layer, at: Scale
) -> list[PretrainStage]:
    """The runs with the mixture of a variant. Of the sources that the stage has they read the same
    text; those that it lacks are prepared beside them."""
    if at.text:
        raise UserError(f"TEXT={at.text}: it is all that is trained on: no mixture to compare")
    run, (mixture, rows) = runs[0], _written(overlay, runs[0], at)
    plan, nanotron = plan_of(mixture, rows, at), run.recipe.nanotron
    if not plan.weights:
        place = overlay.named([MIXTURE])
        raise UserError(f"{place}: no source of it can be had at {at.arguments}; name others")
    windows = (run.steps - run.first_step) * nanotron.windows_a_step
    lacking = portioned(
        {
            source: data_of(source, plan.rows[source], at, overlay.named([MIXTURE, source]))
            for source in plan.weights
            if source not in run.data.recipe.sources
        },
        Wanted(Counter(), with_margin(plan.weights, windows, run.window), Counter()),
    )
    data = run.data
    if lacking:
        of_both = dict(sorted({**data.recipe.sources, **lacking}.items()))
        recipe = replace(data.recipe, sources=of_both, unreleased=plan.unreleased)
        data = replace(data, stage=f"{RUNS}data-{name}", recipe=recipe)
    inputs = {
        data.stage if one is run.data else taken: data if one is run.data else one
        for taken, one in run.inputs.items()
    }
    return [
        replace(one, recipe=replace(one.recipe, mixture=plan.weights), inputs=inputs)
        for one in runs
    ]


def _written(
    overlay: Layer, run: PretrainStage, at: Scale
) -> tuple[Mapping[str, float], Mapping[str, SourceRow]]:
    """A variant's mixture and the rows of its sources."""
    says: Any = overlay.values[MIXTURE]
    other = says.get("same_as") if isinstance(says, Mapping) and len(says) == 1 else None
    stages = [one for one, row in load_pipeline().items() if row.engine == "pretrain"]
    if other is not None:
        if other not in stages:
            where = overlay.named([MIXTURE, "same_as"])
            hint = did_you_mean(str(other), stages)
            raise UserError(f"{where}: {other}: no stage that pretrains; {hint}")
        recipe = scale(load_recipe(other), at)
        return recipe.mixture, sources_of(recipe)
    only = replace(overlay, values={MIXTURE: says})
    mixture, rows = parse(only.values, OtherMixture, [only]).mixture, load_sources()
    for name in mixture:
        if name not in rows:
            hint = did_you_mean(name, rows)
            raise UserError(f"{overlay.named([MIXTURE, name])}: unknown source; {hint}")
    return mixture, rows


def _where(overlay: Layer, stage: PretrainStage, key: str) -> str:
    """The file and key of the overlay, or of the stage's own recipe."""
    path = key.split(".")[1:]
    return overlay.named(path) if overlay.has(path) else stage.where(key)


def _filled(overlay: Mapping[str, Any], section: Mapping[str, Any]) -> dict[str, Any]:
    """An overlay with each `{same_as: <key>}` replaced by the value beside it in the section."""
    filled: dict[str, Any] = {}
    for key, value in overlay.items():
        if isinstance(value, Mapping) and list(value) == ["same_as"]:
            filled[key] = section.get(value["same_as"], value)
        elif isinstance(value, Mapping):
            below = section.get(key)
            filled[key] = _filled(value, below if isinstance(below, Mapping) else {})
        else:
            filled[key] = value
    return filled


def run_ablation(name: str, at: Scale) -> Path:
    """Run what is not done, print the table, write it to runs/<scale>/ablations/<name>.json."""
    runs = ablation_runs(name, at)
    # Seed by seed: a machine that slows down slows every variant.
    for of_one_seed in zip(*runs.values(), strict=True):
        for run in of_one_seed:
            walk.run_stage(run)
    rows = {variant: [_figures(run) for run in group] for variant, group in runs.items()}
    report = {
        "ablation": name,
        "question": ablation_row(name).question,
        "scale": at.name,
        "seeds": list(SEEDS),
        "tokens": _tokens(runs["baseline"][0]),
        "variants": {variant: _summary(figures) for variant, figures in rows.items()},
        "needle": {
            variant: summed([cell for f in figures for cell in f["needle"]], "length", "depth")
            for variant, figures in rows.items()
        },
        "domains": {variant: _domains(figures) for variant, figures in rows.items()},
    }
    target = runs_root() / at.name / "ablations" / f"{name}.json"
    write_json(target, report)
    show(report)
    norms = {variant: _norms(group[0]) for variant, group in runs.items()}
    draw_norms(norms, target.with_suffix(".svg"))
    print(f"{target}, curve of the embedding's norm in {target.with_suffix('.svg')}")
    return target


def _tokens(run: PretrainStage) -> int:
    """Tokens of the run's own steps."""
    first, second, *_ = lines = _metrics(run)
    return len(lines) * int(second["tokens"] - first["tokens"])


def _metrics(run: PretrainStage) -> list[dict[str, Any]]:
    return read_json_lines(run.folder / "metrics.jsonl", key="step")


def _figures(run: PretrainStage) -> dict[str, Any]:
    """The figures that runs are compared by; scores that a stage lacks are stored beside it."""
    from launch.stages.scoring import Scorer, needle_table

    manifest, lines = run.manifest() or {}, _metrics(run)
    kept = run.folder / "ablation.json"
    if (scores := kept_record(kept)) is None:
        scorer, window = Scorer.of(run), run.window
        first = run.earlier[0].window if run.recipe.nanotron.starts_afresh else window
        lengths = [n for n in (window // 4, window // 2, window, 2 * window) if n >= MIN_NEEDLE]
        scores = {
            "first_positions": scorer.first_positions(first),
            "needle": needle_table(scorer, lengths, NEEDLES_PER_CELL),
        }
        write_record(kept, scores)
    return {
        "loss": statistics.fmean(line["loss"] for line in lines[-LAST_STEPS:]),
        "bits_per_byte": manifest["bits_per_byte"]["all"]["model"],
        "first_positions": scores["first_positions"],
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in lines),
        "needle": scores["needle"],
        "domains": {
            category: scored["model"]
            for category, scored in manifest["bits_per_byte"].items()
            if category != "all"
        },
    }


METRICS = ("loss", "bits_per_byte", "first_positions", "tokens_per_second")


def _summary(figures: list[dict[str, Any]]) -> dict[str, Any]:
    return {metric: _interval([one[metric] for one in figures]) for metric in METRICS}


def _domains(figures: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Bits per byte of each category of held-out text: mean and interval over the seeds."""
    return {
        category: _interval([one["domains"][category] for one in figures])
        for category in figures[0]["domains"]
    }


def _interval(values: Sequence[float]) -> dict[str, float]:
    return dict(zip(("mean", "low", "high"), mean_interval(values), strict=True))


def show(report: dict[str, Any]) -> None:
    """Mean and interval of each figure; below a variant's, its difference."""
    title = f"{report['ablation']}: {report['question']} ({report['tokens']:,} tokens, 3 seeds)"
    baseline, rows = report["variants"]["baseline"], []
    for variant, summary in report["variants"].items():
        cells = [variant]
        for metric in METRICS:
            digits = 0 if metric == "tokens_per_second" else 3
            cells.append(_cell(summary[metric], baseline[metric], digits))
        rows.append(cells)
    lines = [f"{name}: {needles_by_length(cells)}" for name, cells in report["needle"].items()]
    print_table_of(("variant", *(m.replace("_", " ") for m in METRICS)), rows, title, lines)
    domains = report["domains"]
    rows = [
        [category, *(_cell(of[category], domains["baseline"][category]) for of in domains.values())]
        for category in domains["baseline"]
    ]
    print_table_of(("bits per byte", *domains), rows)


def _cell(figure: dict[str, float], baseline: dict[str, float], digits: int = 3) -> str:
    """Mean and half interval; below a variant's, its difference."""
    text = f"{figure['mean']:,.{digits}f} ± {figure['high'] - figure['mean']:,.{digits}f}"
    return text if figure is baseline else f"{text}\n{verdict(baseline, figure)}"


def _norms(run: PretrainStage) -> list[tuple[int, float]]:
    return [
        (line["step"], line["embedding_norm"]) for line in _metrics(run) if "embedding_norm" in line
    ]


def draw_norms(norms: dict[str, list[tuple[int, float]]], file: Path) -> None:
    """The embedding rows' mean norm over the steps, one curve per variant, as SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for variant, points in norms.items():
        axes.plot(*zip(*points, strict=True), label=variant)
    axes.set(xlabel="step", ylabel="mean L2 norm of an embedding", ylim=(0, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)
