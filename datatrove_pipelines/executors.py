"""How pipelines run: one datatrove pipeline in this process, or many jobs in several processes."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ground.errors import UserError
from ground.processes import Stopped, begin_worker

Job = TypeVar("Job")


def run_pipeline(steps: list[Any], logs: Path) -> None:
    """Run one pipeline here, as one datatrove task that logs into the fresh folder `logs`.

    Nothing is skipped as completed, so a changed pipeline always runs, and nothing is printed: a
    failure is the exception that the caller gets, not datatrove's traceback.
    """
    from datatrove.executor import LocalPipelineExecutor
    from loguru import logger

    logger.disable("datatrove")
    try:
        LocalPipelineExecutor(
            steps, tasks=1, workers=1, logging_dir=str(logs), skip_completed=False
        ).run()
    finally:
        logger.enable("datatrove")


def run_in_processes(run: Callable[[Job], object], jobs: Sequence[Job], workers: int) -> None:
    """Call `run` on every job in `workers` spawned processes; the first failure stops the rest.

    A worker keeps its imports and its loaded tokenizer from job to job.
    """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, context, _begin, (os.getpid(),)) as pool:
            try:
                list(pool.map(run, jobs))
            except (Stopped, KeyboardInterrupt):
                for child in multiprocessing.active_children():  # the pool waits for their jobs
                    child.kill()
                raise
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker process died on one of {len(jobs)} jobs (out of memory?): run the stage "
            "again with fewer workers; what is already written is kept"
        ) from error


def _begin(parent: int) -> None:
    """Turn the tokenizer's own threads off: the jobs already run in parallel."""
    begin_worker(parent)
    os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
