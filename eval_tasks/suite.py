"""Scores models on a suite: `python -m eval_tasks.suite <job file>`, which job.py describes.

The results file gets one row per model and benchmark as each is done, so that a benchmark that
fails does not lose the score of another.
"""

import ctypes
import math
import os
import signal
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval_tasks.intervals import Z_95, jackknife_variance, share_variance, wilson
from eval_tasks.job import Job, Result, SuiteRow, write_results
from eval_tasks.task_table import expanded, read_tasks
from ground.errors import UserError, fail, first_line

PR_SET_PDEATHSIG = 1
# A generative item costs as much as several choices.
GENERATIVE_SHARE = 4
# Tokens that an answer must have room for; its limit may be far above what it needs.
ANSWER_ROOM = 256
UNKNOWN_VARIANCE = 0.25  # of a single item: the largest that a share can have
# Metrics of a whole corpus, which sacrebleu gives in percent.
PERCENT = ("chrf", "chrf++", "bleu", "ter")


def main() -> None:
    end_with_caller()
    try:
        run(Job.read(Path(sys.argv[1])))
    except UserError as error:
        sys.exit(fail(str(error)))


def end_with_caller() -> None:
    """End when the caller is killed: a scorer left behind would overwrite the next one's files."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def run(job: Job) -> list[Result]:
    """Score every model on every row; the job's results file has them as they come."""
    if job.data:
        os.environ["EVAL_DATA"] = job.data  # before tasks are made: they look for their data then
    from eval_tasks import compat

    compat.before_import()
    from eval_tasks import smollm3  # noqa: F401  (its fixes apply to all that follows)
    from eval_tasks.backends import load

    results: list[Result] = []
    for name in job.models:
        try:
            model = load(name, job)
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr, flush=True)
            results += [replace(_unscored(name, row), error=str(error)) for row in job.rows]
            write_results(Path(job.results), results)
            continue
        for row in job.rows:
            results.append(_score(model, _unscored(name, row), row, job))
            write_results(Path(job.results), results)
    return results


def _unscored(model: str, row: SuiteRow) -> Result:
    metric = row.metric if row.samples == 1 else f"{row.metric}, avg@{row.samples}"
    return Result(model, row.name, metric, row.shots, row.chance, row.published)


def _score(model: Any, unscored: Result, row: SuiteRow, job: Job) -> Result:
    """The result with its score, or with the `error` that prevented one."""
    from eval_tasks.sandbox.outside import require_sandbox

    try:
        if row.metric == "pass@1":
            require_sandbox()  # before anything is generated
        if row.tasks == ["mode_switch"]:
            from eval_tasks.mode_switch import mode_switch

            kept = mode_switch(model, **_answer_limit(job))
            scores = [of_items([float(right) for right in kept])]
        else:
            scores = [_task(model, task, row, job) for task in expanded(row.tasks, read_tasks())]
        return with_score(unscored, scores)
    except Exception as error:
        print(f"left out: {row.name}: {first_line(error)}", file=sys.stderr, flush=True)
        return replace(unscored, error=first_line(error))


def _task(model: Any, task: str, row: SuiteRow, job: Job) -> "Scored":
    """The metric of one task."""
    from lighteval.logging.evaluation_tracker import EvaluationTracker

    tracker = EvaluationTracker(output_dir=str(Path(job.results).with_name("lighteval")))
    pipeline = _pipeline(model, task, row, job, tracker)
    _check_lengths(pipeline, model, task, job)
    for doc in (doc for docs in pipeline.sampling_docs.values() for doc in docs):
        # The sample cache knows an item by its id alone.
        doc.num_samples, doc.id = row.samples, f"{doc.id}-{row.samples}"
    pipeline.evaluate()
    (per_metric,) = [
        values for name, values in tracker.metrics_logger.metrics_values.items() if name != "all"
    ]
    if row.metric not in per_metric:
        raise UserError(f"{row.name}: metric: {row.metric}: {task} has {', '.join(per_metric)}")
    values = per_metric[row.metric]
    if row.metric not in PERCENT:
        return of_items([float(value) for value in values])
    (loaded,) = pipeline.tasks_dict.values()
    of_corpus = loaded.aggregation()[row.metric]

    def share(items: Sequence[Any]) -> float:
        return float(of_corpus(items)) / 100

    variance = jackknife_variance(values, share) if len(values) > 1 else UNKNOWN_VARIANCE
    return Scored(share(values), variance, len(values))


def _pipeline(model: Any, task: str, row: SuiteRow, job: Job, tracker: Any) -> Any:
    """lighteval's pipeline of one task. Raises UserError for an unknown task or missing dataset."""
    from lighteval.pipeline import ParallelismManager, Pipeline, PipelineParameters

    limit = job.limit
    if limit and row.generative:
        limit = max(limit // GENERATIVE_SHARE, 1)
    parameters = PipelineParameters(
        launcher_type=ParallelismManager.ACCELERATE,
        custom_tasks_directory=str(Path(__file__).with_name("smollm3.py")),
        max_samples=limit or None,
        bootstrap_iters=0,  # the intervals are ours
    )
    try:
        return Pipeline(
            tasks=f"{task}|{row.shots}", pipeline_parameters=parameters,
            evaluation_tracker=tracker, model=model,
        )  # fmt: skip
    except ValueError as error:
        if "Cannot find" in str(error) or "not found" in str(error).lower():
            raise UserError(f"task {task}: no such task or dataset: {error}") from None
        raise
    except OSError as error:  # datasets' own errors are kinds of it
        raise UserError(
            f"task {task}: its dataset cannot be read: {error}; SUITE=local takes what packages carry"
        ) from None


def _answer_limit(job: Job) -> dict[str, int]:
    """The job's own `max_new_tokens`, where it has one."""
    return {key: int(value) for key, value in job.generation.items() if key == "max_new_tokens"}


def _check_lengths(pipeline: Any, model: Any, task: str, job: Job) -> None:
    """lighteval cuts a prompt from the left, and an answer to the room that is left, silently."""
    for docs in pipeline.sampling_docs.values():
        for doc in docs:
            prompt = len(model.tok_encode(model.prompt_manager.prepare_prompt(doc)))
            room = max((len(model.tok_encode(choice)) for choice in doc.choices), default=0)
            if doc.generation_size:
                size = _answer_limit(job).get("max_new_tokens", doc.generation_size)
                room = min(size, ANSWER_ROOM)
            if prompt + room > model.max_length:
                raise UserError(
                    f"task {task}: a prompt of {prompt} tokens and {room} for the answer, the "
                    f"model's window has {model.max_length}; take fewer shots or another model"
                )


@dataclass(frozen=True)
class Scored:
    """A task's score, the variance of that estimate, and its items; `hits` where all items are
    right or wrong."""

    value: float
    variance: float
    items: int
    hits: int | None = None


def of_items(values: Sequence[float]) -> Scored:
    """The mean of the items' values."""
    if set(values) <= {0.0, 1.0}:
        hits = round(sum(values))
        return Scored(hits / len(values), share_variance(hits, len(values)), len(values), hits)
    variance = statistics.variance(values) / len(values) if len(values) > 1 else UNKNOWN_VARIANCE
    return Scored(statistics.fmean(values), variance, len(values))


def with_score(result: Result, tasks: Sequence[Scored]) -> Result:
    """The result with the mean of the tasks' scores and its 95 % interval.

    One task of right and wrong items has Wilson's interval, else the normal one of the mean.
    Raises UserError for a score that is not a number.
    """
    value, items = statistics.fmean(task.value for task in tasks), sum(task.items for task in tasks)
    if not math.isfinite(value):
        raise UserError(f"the score is {value}")
    if len(tasks) == 1 and tasks[0].hits is not None:
        low, high = wilson(tasks[0].hits, items)
    else:
        half = Z_95 * math.sqrt(sum(task.variance for task in tasks)) / len(tasks)
        low, high = max(value - half, 0.0), min(value + half, 1.0)
    return replace(result, value=value, low=low, high=high, items=items)


if __name__ == "__main__":
    main()
