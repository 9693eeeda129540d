"""How pipelines run: one in this process, or the units of all sources in several."""

import multiprocessing
import os
import signal
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    FIRST_EXCEPTION,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, Protocol, TypeVar

from ground.errors import Outage, UserError
from ground.processes import begin_worker

Job = TypeVar("Job")
Result = TypeVar("Result")
THREADS = 16
MOST_OUTAGES = 4  # in a row: then it is the hub that does not answer, and the rest is left


def run_pipeline(steps: list[Any]) -> None:
    """Run one pipeline here, as one datatrove task. Nothing is printed: a failure is the exception
    that the caller gets, not datatrove's traceback."""
    from loguru import logger

    logger.disable("datatrove")
    try:
        data: Any = None
        for step in steps:
            data = step(data, 0, 1)
        deque(data or (), maxlen=0)
    finally:
        logger.enable("datatrove")


class Units(Protocol):
    """Tasks by number, sent to other processes once."""

    def __call__(self, number: int) -> object: ...

    def source(self, number: int) -> str: ...

    def label(self, number: int) -> str:
        """What the task reads, for messages."""
        ...

    def more(self, source: str) -> Sequence[int]:
        """The tasks that are left of a source, once all that it had have ended."""
        ...


def run_units(task: Units, numbers: Iterable[int], workers: int) -> dict[int, Exception]:
    """Call `task` with every number, and with those that are left then, in `workers` processes.

    A failure costs no other task: returned are all, by number. A process that dies is replaced and
    its task tried once more.
    """
    tasks = _Waiting(task)
    tasks.add(numbers)
    if (workers := min(workers, len(tasks))) < 2:
        while (number := tasks.next()) is not None:
            tasks.end(number, failure_of(task, number))
        return tasks.failures
    others = set(multiprocessing.active_children())
    idle = [_worker(task) for _ in range(workers)]
    running = dict[Future[Exception | None], tuple[int, ProcessPoolExecutor]]()
    try:
        while True:
            while idle and (number := tasks.next()) is not None:
                one = idle.pop()
                running[one.submit(_unit, number)] = number, one
            if not running:
                return tasks.failures
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                number, one = running.pop(future)
                try:
                    tasks.end(number, future.result())
                except BrokenProcessPool:
                    one.shutdown()
                    one = _worker(task)
                    tasks.died(number)
                idle.append(one)
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        for one in (*idle, *(one for _, one in running.values())):
            one.shutdown(cancel_futures=True)


def _worker(task: Units) -> ProcessPoolExecutor:
    """A pool of one: a process that dies takes all futures of its pool with it."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, _begin_units, (os.getpid(), task))


class _Waiting:
    """Tasks that wait, by source: a slow source does not hold all workers while others wait."""

    def __init__(self, task: Units):
        self.task = task
        self.waiting, self.running = defaultdict[str, deque[int]](deque), Counter[str]()
        self.tried_again, self.failures = set[int](), dict[int, Exception]()
        self.outages_in_a_row = 0
        self.added = dict[str, list[int]]()

    def __len__(self) -> int:
        return sum(map(len, self.waiting.values()))

    def add(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self.waiting[self.task.source(number)].append(number)

    def next(self) -> int | None:
        """A task of the source that has the fewest in work."""
        sources = [source for source, numbers in self.waiting.items() if numbers]
        if not sources or self.outages_in_a_row >= MOST_OUTAGES:
            return None
        source = min(sources, key=self.running.__getitem__)
        self.running[source] += 1
        return self.waiting[source].popleft()

    def end(self, number: int, error: Exception | None) -> None:
        source = self.task.source(number)
        self.running[source] -= 1
        if error:
            self.failures[number] = error
        self.outages_in_a_row = self.outages_in_a_row + 1 if isinstance(error, Outage) else 0
        has_failed = any(self.task.source(failed) == source for failed in self.failures)
        if not (self.waiting[source] or self.running[source] or has_failed):
            more = [*self.task.more(source)]
            if more != self.added.get(source):  # else the tasks do not do what they say
                self.added[source] = more
                self.add(more)

    def died(self, number: int) -> None:
        if number not in self.tried_again:
            self.tried_again.add(number)
            self.add([number])
            self.running[self.task.source(number)] -= 1
            return
        remedy = "run the stage again with fewer workers; what is already written is kept"
        label = self.task.label(number)
        self.end(number, UserError(f"{label}: its process died twice (out of memory?); {remedy}"))


def failure_of(task: Units, number: int) -> Exception | None:
    try:
        task(number)
    except Exception as error:
        return error
    return None


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


def _until_stopped(run: Callable[[Job], Result], job: Job) -> Result:
    """SIGTERM ends a job as an exception does, its folder aside removed, and then the process."""
    try:
        signal.signal(signal.SIGTERM, _stop)
        try:
            return run(job)
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    except SystemExit:
        os._exit(1)  # the pool would go on with the next job


def _unit(number: int) -> Exception | None:
    assert _task
    return _until_stopped(partial(failure_of, _task), number)


def _stop(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the pool sends it again while the job cleans up
    raise SystemExit


_task: Units | None = None  # of this worker process


def _begin_units(parent: int, task: Units) -> None:
    global _task
    _begin(parent)
    _task = task


def _begin(parent: int) -> None:
    """Turn the tokenizer's own threads off: the jobs already run in parallel."""
    begin_worker(parent)
    os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
