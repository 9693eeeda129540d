"""Units tokenised by the machines of a Slurm or Ray cluster: EXECUTOR=slurm|ray.

What is to be done and what comes of it are as in `executors.run_units`; here it goes in rounds. The
nodes see the same CACHE and checkout. datatrove's own Slurm executor ends when it has submitted, and
takes a task for done by a file that does not say what the task was.

    <CACHE>/slurm/<random>/   task.pickle   numbers.json (of each array element)   ended/<number>
"""

import json
import logging
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datatrove_pipelines.executors import Units, failure_of, run_units
from ground.errors import UserError, did_you_mean
from ground.files import written_aside

EXECUTORS = ("local", "slurm", "ray")
# Slurm's default MaxArraySize is 1001; an element takes several units where there are more.
MOST_ELEMENTS = 1000
POLL_SECONDS = 1.0
# What a site changes by Slurm's own variables (SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT,
# SBATCH_MEM_PER_CPU ...), which win over a script's lines, or in launch/site.sh.
SCRIPT = """\
#!/usr/bin/env bash
#SBATCH --job-name=smollm3-units
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --mem-per-cpu=4G
#SBATCH --requeue
#SBATCH --output={folder}/log-%a.txt
[[ ! -f launch/site.sh ]] || source launch/site.sh
PYTHONPATH=$PWD exec {python} -m datatrove_pipelines.clusters {folder} "$SLURM_ARRAY_TASK_ID"
"""
# Tasks of a round: their outcomes by number. One that is missing died with its process or machine.
Round = Callable[[Units, Sequence[int]], dict[int, Exception | None]]


def executor_of(environment: Mapping[str, str]) -> tuple[str, int]:
    """EXECUTOR and WORKERS, the processes at once: as many as there are cores, or 64 of a cluster.

    Raises UserError for a word that names no executor, or one that cannot run here.
    """
    executor, workers = environment.get("EXECUTOR") or "local", environment.get("WORKERS") or ""
    _check(executor)
    if workers and not (workers.isdecimal() and int(workers)):
        raise UserError(f"WORKERS={workers}: not a number of processes; write one from 1")
    most = 64 if executor == "slurm" else os.cpu_count() or 1
    return executor, int(workers or most)


def _check(executor: str) -> None:
    if executor not in EXECUTORS:
        raise UserError(f"EXECUTOR={executor}: unknown; {did_you_mean(executor, EXECUTORS)}")
    if executor == "slurm" and not shutil.which("sbatch"):
        raise UserError("EXECUTOR=slurm: no sbatch here; start it on a machine that submits jobs")
    if executor == "ray":
        from importlib.util import find_spec

        if find_spec("ray") is None:
            raise UserError("EXECUTOR=ray: ray is not installed; pip install -e '.[ray]'")


def run_units_on(
    executor: str, task: Units, numbers: Iterable[int], workers: int, cache: Path
) -> dict[int, Exception]:
    """`run_units`, by `workers` processes at once of the machines that `executor` names."""
    if executor == "local":
        return run_units(task, numbers, workers)
    if executor == "slurm":
        return in_rounds(task, numbers, partial(_on_slurm, workers=workers, cache=cache))
    with _Ray(workers) as cluster:
        return in_rounds(task, numbers, cluster.run)


def in_rounds(task: Units, numbers: Iterable[int], run: Round) -> dict[int, Exception]:
    """Run tasks until no source has any left; a task that died is tried once more."""
    waiting, tried, failures = list(numbers), set[int](), dict[int, Exception]()
    while waiting:
        ended = run(task, waiting)
        died = [number for number in waiting if number not in ended]
        failures |= {number: error for number, error in ended.items() if error}
        failures |= {number: _death(task, number) for number in died if number in tried}
        tried |= set(died)
        failed = {task.source(number) for number in failures}
        again = [number for number in died if number not in failures]
        sources = {task.source(number) for number in waiting} - failed
        sources -= {task.source(number) for number in again}
        waiting = again + [number for source in sorted(sources) for number in task.more(source)]
    return failures


def _death(task: Units, number: int) -> UserError:
    remedy = "give it more memory; what is already written is kept"
    return UserError(f"{task.label(number)}: its process died twice (out of memory?); {remedy}")


def _on_slurm(
    task: Units, numbers: Sequence[int], workers: int, cache: Path
) -> dict[int, Exception | None]:
    """One job array; waits for its end, and cancels it where this process is stopped."""
    folder = (cache / "slurm" / uuid.uuid4().hex[:12]).resolve()
    (folder / "ended").mkdir(parents=True)
    elements = [list(numbers[n::MOST_ELEMENTS]) for n in range(min(MOST_ELEMENTS, len(numbers)))]
    (folder / "task.pickle").write_bytes(pickle.dumps(task))
    (folder / "numbers.json").write_text(json.dumps(elements))
    place, python = shlex.quote(str(folder)), shlex.quote(sys.executable)
    (folder / "job.sh").write_text(SCRIPT.format(folder=place, python=python))
    array = f"--array=0-{len(elements) - 1}%{workers}"
    words = ["sbatch", "--parsable", array, f"--chdir={Path.cwd()}", str(folder / "job.sh")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        line = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise UserError(
            f"EXECUTOR=slurm: {line}; set SBATCH_PARTITION= and what else the site asks"
        )
    job = done.stdout.strip().partition(";")[0]
    print(f"slurm job {job}: {len(numbers)} files to read, at most {workers} at once", flush=True)
    try:
        while _is_queued(job):
            time.sleep(POLL_SECONDS)
    except BaseException:
        subprocess.run(["scancel", job], check=False)
        raise
    outcomes = {
        int(file.name): pickle.loads(file.read_bytes()) for file in (folder / "ended").iterdir()
    }
    shutil.rmtree(folder)
    return outcomes


def _is_queued(job: str) -> bool:
    """Whether any element of it waits, runs or ends; a controller that is busy is asked again."""
    done = subprocess.run(
        ["squeue", "--noheader", f"--jobs={job}"], capture_output=True, text=True, check=False
    )
    return bool(done.stdout.strip()) or (
        done.returncode != 0 and "Invalid job id" not in done.stderr
    )


def run_element(folder: Path, element: int) -> None:
    """The units of one element of a job array, on its node."""
    task: Units = pickle.loads((folder / "task.pickle").read_bytes())
    for number in json.loads((folder / "numbers.json").read_text())[element]:
        target = folder / "ended" / str(number)
        if not target.exists():  # the job was queued again
            error = failure_of(task, number)
            with written_aside(target) as aside:
                aside.write_bytes(pickle.dumps(error))


class _Ray:
    """Ray at RAY_ADDRESS, or started on this machine."""

    def __init__(self, workers: int):
        self.workers = workers

    def __enter__(self) -> "_Ray":
        import ray

        num_cpus = None if os.environ.get("RAY_ADDRESS") else self.workers
        variables = {"PYTHONPATH": str(Path.cwd()), "RAYON_NUM_THREADS": "1"}
        ray.init(
            num_cpus=num_cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": variables},
        )
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        ray.shutdown()  # of a cluster of others, this program's tasks alone

    def run(self, task: Units, numbers: Sequence[int]) -> dict[int, Exception | None]:
        import ray

        unit: Any = ray.remote(max_retries=0, num_cpus=1)(_unit_of)
        shared, folder = ray.put(task), os.getcwd()
        futures = {unit.remote(shared, number, folder): number for number in numbers}
        outcomes = dict[int, Exception | None]()
        waiting = list(futures)
        while waiting:
            (future,), waiting = ray.wait(waiting)
            try:
                outcomes[futures[future]] = ray.get(future)
            except ray.exceptions.RayError:  # its process or machine is gone
                continue
        return outcomes


def _unit_of(task: Units, number: int, folder: str) -> Exception | None:
    os.chdir(folder)  # a relative CACHE is of the checkout
    return failure_of(task, number)


if __name__ == "__main__":
    run_element(Path(sys.argv[1]), int(sys.argv[2]))
