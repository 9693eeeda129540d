"""`make submit`: the jobs of a chain of stages, each after those that it needs (launch/*.slurm)."""

import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ground.errors import UserError
from launch.recipe.tables import load_pipeline
from launch.run.cluster import GPUS_PER_NODE, TrainedStage, sbatch
from launch.run.folder import StageRun
from launch.walk import is_forced, unfinished


@dataclass(frozen=True)
class Job:
    run: StageRun
    part: str
    script: str
    options: str
    after: tuple[int, ...]  # jobs of the chain that must have succeeded
    is_forced: bool = False

    def line(self, ids: Sequence[str]) -> str:
        """The sbatch command, with the ids of the jobs before."""
        part = f"-{self.part}" if isinstance(self.run, TrainedStage) else ""
        options = f"--parsable --job-name={self.run.stage}{part} {self.options}".strip()
        if self.after:
            # A job that waits for one which failed is cancelled, not kept for ever.
            waits = ":".join(ids[number] for number in self.after)
            options += f" --dependency=afterok:{waits} --kill-on-invalid-dep=yes"
        return "FORCE=1 " * self.is_forced + sbatch(self.run, self.script, options)


def chain(named: Sequence[StageRun], device: str, force: bool = False) -> list[Job]:
    """The jobs of stages and of all that they take and that is not finished.

    A trained stage has three: prepare on one node, train on many, score on one. Stages before any
    training run one after another: they write to one cache.
    """
    jobs: list[Job] = []
    ends: dict[str, int] = {}  # run folder: its last job
    before_training: tuple[int, ...] = ()
    for run in _left(named, force):
        after, is_named = _ends(run, ends), any(run is one for one in named)
        if not (is_named or run.stage in load_pipeline()):
            continue  # no name to submit it by: what takes it brings it up to date
        forced = force and is_named
        if isinstance(run, TrainedStage):
            run.refuse_recipe()
            parts = ["prepare"] * _must_prepare(run, ends, forced) + ["train", "score"]
        else:
            run.refuse()
            parts = ["prepare" if _is_before_training(run) else "score"]
            after += before_training if parts == ["prepare"] else ()
        for part in parts:
            script, options = _resources(run, part, device)
            has_force = forced and _takes_force(run, part)
            jobs.append(Job(run, part, script, options, tuple(sorted({*after})), has_force))
            after = (len(jobs) - 1,)
        ends[str(run.folder)] = len(jobs) - 1
        if parts == ["prepare"]:
            before_training = after
    return jobs


def _left(named: Sequence[StageRun], force: bool) -> Iterable[StageRun]:
    """What is not finished, each once, in the order of pipeline.yaml."""
    left = {str(one.folder): one for run in named for one in unfinished(run, force)}
    left |= {str(run.folder): run for run in named if str(run.folder) in left}
    order = [*load_pipeline()]
    return sorted(
        left.values(), key=lambda run: order.index(run.stage) if run.stage in order else len(order)
    )


def _ends(run: StageRun, ends: dict[str, int]) -> tuple[int, ...]:
    """The last jobs of what a stage takes."""
    found: set[int] = set()
    for taken in run.inputs.values():
        folder = str(taken.folder)
        found |= {ends[folder]} if folder in ends else {*_ends(taken, ends)}
    return tuple(sorted(found))


def _must_prepare(run: TrainedStage, ends: dict[str, int], forced: bool) -> bool:
    """Whether it writes data of its own, or takes a stage that has no job."""
    return run.prepares_data or any(
        one is not run and str(one.folder) not in ends for one in unfinished(run, forced)
    )


def _takes_force(run: StageRun, part: str) -> bool:
    """Whether FORCE=1 is for this part: the first that writes to the run folder, and what is before."""
    if not isinstance(run, TrainedStage) or part == "prepare":
        return True
    return part == "train" and not run.prepares_data


def _is_before_training(run: StageRun) -> bool:
    return not any(
        isinstance(taken, TrainedStage) or not _is_before_training(taken)
        for taken in run.inputs.values()
    )


def _resources(run: StageRun, part: str, device: str) -> tuple[str, str]:
    """The script of launch/ and sbatch's options."""
    if part != "train" or not isinstance(run, TrainedStage):
        script = "data.slurm" if part == "prepare" else "eval.slurm"
        return script, "--gpus-per-node=0" if device == "cpu" else ""
    if run.device == "cpu":  # a process has all cores of a node
        return run.script, f"--nodes={run.world_size} --gpus-per-node=0"
    nodes = -(-run.world_size // GPUS_PER_NODE)
    each = f" --gpus-per-node={run.world_size}" if run.world_size < GPUS_PER_NODE else ""
    return run.script, f"--nodes={nodes}{each}"


def submit_chain(named: Sequence[StageRun], device: str, dry: bool) -> None:
    """Print the commands, as a script where nothing is submitted; else submit each."""
    if not named:
        raise UserError('STAGES is empty; name some: make submit STAGES="pretrain-stage1 sft"')
    jobs = chain(named, device, is_forced())
    os.environ.pop("FORCE", None)  # sbatch passes the environment on: the lines say what is forced
    if not jobs:
        print(f"{', '.join(run.stage for run in named)}: up to date")
    is_here, ids = shutil.which("sbatch") is not None, list[str]()
    for number, job in enumerate(jobs, start=1):
        if dry or not is_here:
            print(f"j{number}=$({job.line(ids)})")
            ids.append(f"$j{number}")
            continue
        line = job.line(ids)
        done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
        if done.returncode:
            problem = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
            raise UserError(f"{line}: {problem[0]}; submitted before it: {' '.join(ids) or 'none'}")
        ids.append(done.stdout.strip().partition(";")[0])
        print(f"{line}  # {ids[-1]}", flush=True)
    if jobs and not (dry or is_here):
        print("# no sbatch here: nothing was submitted")
