"""How pipelines run: one datatrove pipeline in this process, or many jobs in several processes."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import (
    FIRST_EXCEPTION,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from ground.errors import UserError
from ground.processes import begin_worker

Job = TypeVar("Job")
THREADS = 16


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


def run_in_threads(run: Callable[[Job], object], jobs: Sequence[Job]) -> None:
    """Call `run` on every job, THREADS at a time, which wait for disk or hub; the first failure is
    raised as it happens."""
    pool = ThreadPoolExecutor(THREADS)
    try:
        _results([pool.submit(run, job) for job in jobs])
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def run_in_processes(run: Callable[[Job], object], jobs: Sequence[Job], workers: int) -> None:
    """Call `run` on every job in `workers` spawned processes; the first failure stops the rest, and
    is raised when they have cleaned up.

    A worker keeps its imports and its loaded tokenizer from job to job.
    """
    context, others = multiprocessing.get_context("spawn"), set(multiprocessing.active_children())
    try:
        with ProcessPoolExecutor(workers, context, _begin, (os.getpid(),)) as pool:
            try:
                _results([pool.submit(_until_stopped, run, job) for job in jobs])
            except BaseException:
                for process in set(multiprocessing.active_children()) - others:
                    process.terminate()
                raise
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker process died on one of {len(jobs)} jobs (out of memory?): run the stage "
            "again with fewer workers; what is already written is kept"
        ) from error


def _results(futures: Sequence[Future[object]]) -> None:
    """Wait for all, or for the first that fails; its exception is raised."""
    for future in wait(futures, return_when=FIRST_EXCEPTION).done:
        future.result()


def _until_stopped(run: Callable[[Job], object], job: Job) -> object:
    """SIGTERM ends a job as an exception does, its folder aside removed, and then the process."""
    try:
        signal.signal(signal.SIGTERM, _stop)
        try:
            return run(job)
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    except SystemExit:
        os._exit(1)  # the pool would go on with the next job


def _stop(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the pool sends it again while the job cleans up
    raise SystemExit


def _begin(parent: int) -> None:
    """Turn the tokenizer's own threads off: the jobs already run in parallel."""
    begin_worker(parent)
    os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
