"""Walks the pipeline: resolves a stage's recipe, runs what it takes, then the stage itself."""

import os
from collections.abc import Callable
from typing import Any

from launch import data, pretrain
from launch.errors import UserError
from launch.recipe import load_recipe, load_scale, stage_file, stage_row
from launch.run_folder import StageRun


def resolve(stage: str, scale: str) -> StageRun:
    """The stage (or the stage of a recipe file) at a scale, with all that it takes."""
    if stage.startswith("ablations/"):
        from launch.ablation import ablation_run

        return ablation_run(stage, scale)
    if stage.endswith((".yaml", ".yml")):
        recipe = load_recipe(stage)
        stage = recipe.stage
        if stage_file(stage).resolve() != recipe.file:
            raise UserError(f"{recipe.file}: {stage_file(stage)} is the recipe of {stage}; edit it")
    return _resolve(stage, scale, {})


def _resolve(stage: str, scale: str, done: dict[str, StageRun]) -> StageRun:
    if stage not in done:
        row = stage_row(stage)
        inputs = {taken: _resolve(taken, scale, done) for taken in row["takes"]}
        done[stage] = StageRun(
            stage, scale, row["engine"], RECIPE_OF[row["engine"]](stage, scale), inputs
        )
    return done[stage]


RECIPE_OF: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "tokenizer": lambda stage, scale: data.tokenizer_recipe(scale),
    "data": data.data_recipe,
    "pretrain": pretrain.pretrain_recipe,
}


def run_stage(run: StageRun, force: bool = False) -> bool:
    """Bring a stage and all that it takes up to date; False when nothing was to do."""
    if not force and is_whole(run):
        return False
    if run.engine == "pretrain":
        pretrain.refuse_without_gpus(run)
    for taken in run.inputs.values():
        run_stage(taken)
    with run.locked() as lock:
        run.begin(load_scale(run.scale)["rerun_on_change"], force)
        print(f"{run.stage}: {run.folder}", flush=True)
        run.finish(**_work(run, lock))
    if run.engine == "pretrain":
        show(run)
    return True


def is_whole(run: StageRun) -> bool:
    """Whether nothing is left to do; what data and tokenizer stages wrote may have been deleted."""
    return run.is_finished() and (run.engine == "pretrain" or data.is_there(run))


def _work(run: StageRun, lock: int) -> dict[str, Any]:
    if run.engine == "tokenizer":
        return data.make_tokenizer(run)
    if run.engine == "data":
        return data.make_data(run)
    pretrain.prepare(run)
    pretrain.train(run, lock)
    return pretrain.finish(run)


def show(run: StageRun) -> None:
    from launch.score import print_table

    manifest = run.manifest()
    assert manifest is not None
    print_table(run, manifest)


def is_forced() -> bool:
    """FORCE=1 sets the named stage's folder aside and runs it again."""
    return os.environ.get("FORCE", "") not in ("", "0")
