"""Walks the pipeline: resolves a stage's recipe, runs what it takes, then the stage itself."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from launch import chats, data, evaluate, merge, posttrain, pretrain, release, report, slurm
from launch.recipe import load_scale, stage_named, stage_row
from launch.run_folder import StageRun


def resolve(stage: str, scale: str) -> StageRun:
    """The stage (or the stage of a recipe file) at a scale, with all that it takes."""
    if stage.startswith("ablations/"):
        from launch.ablation import ablation_run

        return ablation_run(stage, scale)
    return _resolve(stage_named(stage), scale, {})


def _resolve(stage: str, scale: str, done: dict[str, StageRun]) -> StageRun:
    if stage not in done:
        row = stage_row(stage)
        inputs = {taken: _resolve(taken, scale, done) for taken in row["takes"]}
        done[stage] = StageRun(
            stage, scale, row["engine"], ENGINE_OF[row["engine"]].recipe(stage, scale), inputs
        )
    return done[stage]


@dataclass(frozen=True)
class Engine:
    """What the walk asks of an engine; a new engine is a new row of `ENGINE_OF`."""

    recipe: Callable[[str, str], dict[str, Any]]  # (stage, scale): resolved, plain values
    work: Callable[[StageRun, int], dict[str, Any]]  # (run, lock): the manifest's results
    refuse: Callable[[StageRun], None] = lambda run: None  # before anything is done
    is_there: Callable[[StageRun], bool] = lambda run: True  # what lies outside of the run folder
    show: Callable[[StageRun], None] = lambda run: None


def _pretrain(run: StageRun, lock: int) -> dict[str, Any]:
    pretrain.prepare(run)
    pretrain.train(run, lock)
    return pretrain.finish(run)


def show(run: StageRun) -> None:
    from launch.score import print_table

    manifest = run.manifest()
    assert manifest is not None
    print_table(run, manifest)


ENGINE_OF: dict[str, Engine] = {
    "tokenizer": Engine(
        lambda stage, scale: data.tokenizer_recipe(scale),
        lambda run, lock: data.make_tokenizer(run),
        is_there=data.is_there,
    ),
    "data": Engine(data.data_recipe, lambda run, lock: data.make_data(run), is_there=data.is_there),
    "pretrain": Engine(
        pretrain.pretrain_recipe, _pretrain, refuse=slurm.refuse_without_gpus, show=show
    ),
    "chats": Engine(
        chats.chats_recipe, lambda run, lock: chats.make_chats(run), is_there=chats.is_there
    ),
    "posttrain": Engine(
        posttrain.posttrain_recipe,
        posttrain.work,
        refuse=slurm.refuse_without_gpus,
        show=posttrain.show,
    ),
    "merge": Engine(merge.merge_recipe, lambda run, lock: merge.run_merge(run)),
    "release": Engine(
        release.release_recipe, lambda run, lock: release.run_release(run), show=release.show
    ),
    "eval": Engine(
        evaluate.eval_recipe, lambda run, lock: evaluate.make_eval(run), show=evaluate.show_eval
    ),
    "report": Engine(
        lambda stage, scale: {},
        lambda run, lock: report.make_report(run),
        is_there=lambda run: report.page(run).exists(),
        show=report.show,
    ),
}


def run_stage(run: StageRun, force: bool = False) -> bool:
    """Bring a stage and all that it takes up to date; False when nothing was to do."""
    if not force and is_whole(run):
        return False
    engine = ENGINE_OF[run.engine]
    engine.refuse(run)
    for taken in run.inputs.values():
        run_stage(taken)
    with run.locked() as lock:
        run.begin(load_scale(run.scale)["rerun_on_change"], force)
        print(f"{run.stage}: {run.folder}", flush=True)
        run.finish(**engine.work(run, lock))
    engine.show(run)
    return True


def is_whole(run: StageRun) -> bool:
    """Whether nothing is left to do; what a stage wrote elsewhere may have been deleted."""
    return run.is_finished() and ENGINE_OF[run.engine].is_there(run)


def is_forced() -> bool:
    """FORCE=1 sets the named stage's folder aside and runs it again."""
    return os.environ.get("FORCE", "") not in ("", "0")
