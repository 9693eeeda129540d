"""The parts of a stage that a cluster runs in jobs of their own (launch/*.slurm).

    prepare   one node    all that a trained stage takes, and the data of its own
    train     many nodes  its steps, and what its metrics.jsonl says of them
    score     one node    its last checkpoint as hf/, its score before and after, the manifest

Another stage has no parts: `prepare` and `score` both run it.
"""

import os

from ground import peak_memory
from ground.errors import UserError
from ground.tracking import watched
from launch.run.cluster import TrainedStage, processes_per_node, sbatch, train_on_nodes
from launch.run.folder import StageRun
from launch.walk import is_whole, report_loss, run_stage, unfinished

PARTS = ("prepare", "train", "score")


def run_part(run: StageRun, part: str, force: bool) -> bool:
    """Run one part in this job; False where there was nothing to do."""
    if part not in PARTS:
        raise UserError(f"--part {part}: unknown; write one of {', '.join(PARTS)}")
    if part == "train":
        return _train(run, force)
    if not isinstance(run, TrainedStage):
        return run_stage(run, force)
    return _prepare(run, force) if part == "prepare" else _score(run)


def _prepare(run: TrainedStage, force: bool) -> bool:
    is_done = not force and is_whole(run)
    # A finished stage needs its data no more, `make replay` does.
    if is_done and run.is_prepared:
        return False
    if not (force or is_done):
        report_loss(run)
    run.refuse_recipe()  # another job has the processors
    for one in unfinished(run, force):
        if one is not run:
            one.refuse()
    for taken in run.inputs.values():
        run_stage(taken)
    if run.prepares_data:
        with run.locked():
            run.begin(force)
            run.prepare()
    return True


def _train(run: StageRun, force: bool) -> bool:
    if not isinstance(run, TrainedStage):
        raise UserError(f"{run.stage} trains nothing: {sbatch(run, 'data.slurm')}")
    if "SLURM_JOB_ID" not in os.environ:
        raise UserError(f"no Slurm job: {run.sbatch('')}, or here: {run.command}")
    nodes = int(os.environ["SLURM_NNODES"])
    each = processes_per_node(run, nodes, int(os.environ["GPUS_A_NODE"]))
    force = force and not run.prepares_data  # FORCE=1 was for the part that prepares
    if not force and is_whole(run):
        return False
    if not force:
        report_loss(run)
    run.refuse_recipe()
    if missing := [one.stage for one in unfinished(run, force) if one is not run]:
        raise _not_there(run, ", ".join(missing))
    with run.locked() as lock:
        run.begin(force)
        if not run.is_prepared:
            raise _not_there(run, "the token dataset")
        if not run.is_finished() or run.steps_left > 0:  # else its last checkpoint has what it lost
            run.prepare()
        if run.steps_left > 0:
            with watched(run.folder, run.is_paused):
                train_on_nodes(run, each, lock)
    print(f"{run.stage}: trained; its score: {sbatch(run, 'eval.slurm')}", flush=True)
    return True


def _not_there(run: TrainedStage, what: str) -> UserError:
    return UserError(
        f"{run.stage} at {run.arguments} takes what is not there: {what}; this job only trains: first "
        f"{sbatch(run, 'data.slurm')}, or all in order: make submit STAGES={run.stage} {run.arguments}"
    )


def _score(run: TrainedStage) -> bool:
    if is_whole(run):
        return False
    with run.locked():
        run.begin(False)
        if run.steps_left > 0:
            raise UserError(
                f"{run.stage} at {run.arguments} is not trained to its end: {run.sbatch('')}"
            )
        run.finish(**run.results(), **peak_memory.kept(run.folder))
    run.show()
    return True
