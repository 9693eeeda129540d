"""Scores checkpoints on a suite: `python -m eval_tasks.run <job.json>`.

The job holds plain values (see Job); results.json beside it gets one row a model and benchmark as
each is done, so that a benchmark that fails costs no other its score.
"""

import ctypes
import fnmatch
import json
import math
import os
import signal
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval_tasks.errors import EvalError
from eval_tasks.intervals import Z_95, jackknife_variance, share_variance, wilson

Row = dict[str, Any]
PR_SET_PDEATHSIG = 1
# A generative item costs as much as several choices.
GENERATIVE_SHARE = 4
# Tokens that an answer must have room for; its limit may be far above what it needs.
ANSWER_ROOM = 256
UNKNOWN_VARIANCE = 0.25  # of a single item: the largest that a share can have
# Metrics of a whole corpus, which sacrebleu gives in percent.
PERCENT = ("chrf", "chrf++", "bleu", "ter")


@dataclass(frozen=True)
class Job:
    """What to score.

    `models` are transformers folders or hub ids; `rows` {name, tasks, shots, metric, chance,
    published}, `tasks` being names or patterns of lighteval tasks, whose scores are averaged;
    `limit` items a task (0: all; a quarter of it for generative tasks); `data` the folder of local
    datasets; `chat` renders prompts with the chat template, `system_prompt` before them.
    """

    models: list[str]
    rows: list[Row]
    results: str
    limit: int = 0
    data: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    batch_size: int = 8
    chat: bool = False
    system_prompt: str | None = None
    generation: dict[str, Any] = field(default_factory=dict)


def end_with_caller() -> None:
    """A caller that is killed leaves no scorer behind, which would write over the next one's files."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def main() -> None:
    end_with_caller()
    try:
        job = Job(**json.loads(Path(sys.argv[1]).read_text()))
        run(job)
    except EvalError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def run(job: Job) -> list[Row]:
    """Score every model on every row; returns the rows {model, name, value, low, high, ...}."""
    if job.data:
        os.environ["EVAL_DATA"] = job.data
    from eval_tasks import compat

    compat.before_import()
    from eval_tasks.smollm3 import TASKS_TABLE

    names = [task.name for task in TASKS_TABLE]
    found: list[Row] = []
    for model_name in job.models:
        try:
            model = _load(model_name, job)
        except EvalError as error:
            print(f"left out: {error}", file=sys.stderr, flush=True)
            lost = {"model": model_name, "error": str(error)}
            found += [_of_suite(row) | lost for row in job.rows]
            _write(Path(job.results), found)
            continue
        for row in job.rows:
            found.append({"model": model_name, **_score(model, row, names, job)})
            _write(Path(job.results), found)
    return found


def _of_suite(row: Row) -> Row:
    """What a row of the results repeats of the suite."""
    return {key: row.get(key) for key in ("name", "metric", "shots", "chance", "published")}


def _write(file: Path, rows: list[Row]) -> None:
    aside = file.with_suffix(".partial")
    aside.write_text(json.dumps(rows, indent=1) + "\n")
    aside.replace(file)


def _load(name: str, job: Job) -> Any:
    from lighteval.models.model_input import GenerationParameters
    from lighteval.models.model_loader import load_model
    from lighteval.models.transformers.transformers_model import TransformersModelConfig

    # A hub id has one slash at most.
    if not Path(name).exists() and name.count("/") > 1:
        raise EvalError(f"{name}: no such folder; name a transformers folder or a hub id")
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise EvalError(f"{name}: no config.json in it; name a transformers folder")
    config = TransformersModelConfig(
        model_name=name,
        device=job.device,
        dtype=job.dtype,
        batch_size=job.batch_size,
        override_chat_template=job.chat,
        system_prompt=job.system_prompt,
        generation_parameters=GenerationParameters(**job.generation),
        cache_dir=str(Path(job.results).parent / "lighteval"),
    )
    try:
        model = load_model(config)
    except Exception as error:  # safetensors, transformers and tokenizers each have their own
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EvalError(f"{name}: cannot be loaded: {line}") from None
    # A pipeline deletes its model at the end; here the next task needs it.
    model.cleanup = lambda: None
    if job.chat and not model.tokenizer.chat_template:
        raise EvalError(
            f"{name}: no chat template; an instruct suite needs one, base.yaml does not"
        )
    return model


def _score(model: Any, row: Row, names: list[str], job: Job) -> Row:
    """The row with its score, or with the `error` that kept it from one."""
    kept = _of_suite(row)
    try:
        if row["tasks"] == ["mode_switch"]:
            from eval_tasks.modes import mode_switch

            switched = mode_switch(model.model, model.tokenizer, **_answer_limit(job))
            return {**kept, **summary([of_items([float(right) for right in switched])])}
        return {
            **kept,
            **summary([_task(model, task, row, job) for task in expanded(row["tasks"], names)]),
        }
    except Exception as error:
        line = str(error).strip().splitlines() or [type(error).__name__]
        print(f"left out: {row['name']}: {line[0]}", file=sys.stderr, flush=True)
        return {**kept, "error": line[0]}


def expanded(patterns: list[str], names: list[str]) -> list[str]:
    """Task names of `patterns`; a plain name may be one of lighteval's own."""
    found: list[str] = []
    for pattern in patterns:
        matches = fnmatch.filter(names, pattern) if "*" in pattern else [pattern]
        if not matches:
            raise EvalError(f"tasks: {pattern}: matches no task of eval_tasks/smollm3.py")
        found += matches
    return found


def _task(model: Any, task: str, row: Row, job: Job) -> "Scored":
    """The metric of one task."""
    from lighteval.logging.evaluation_tracker import EvaluationTracker

    tracker = EvaluationTracker(output_dir=str(Path(job.results).parent / "lighteval"))
    pipeline = _pipeline(model, task, row, job, tracker)
    _check_lengths(pipeline, model, task, job)
    pipeline.evaluate()
    (per_metric,) = [
        values for name, values in tracker.metrics_logger.metrics_values.items() if name != "all"
    ]
    if row["metric"] not in per_metric:
        raise EvalError(
            f"{row['name']}: metric: {row['metric']}: {task} has {', '.join(per_metric)}"
        )
    values = per_metric[row["metric"]]
    if row["metric"] not in PERCENT:
        return of_items([float(value) for value in values])
    (loaded,) = pipeline.tasks_dict.values()
    of_corpus = loaded.aggregation()[row["metric"]]

    def share(items: Sequence[Any]) -> float:
        return float(of_corpus(items)) / 100

    variance = jackknife_variance(values, share) if len(values) > 1 else UNKNOWN_VARIANCE
    return Scored(share(values), variance, len(values))


def _pipeline(model: Any, task: str, row: Row, job: Job, tracker: Any) -> Any:
    """lighteval's pipeline of one task. Raises EvalError for an unknown task or missing dataset."""
    from lighteval.pipeline import ParallelismManager, Pipeline, PipelineParameters

    limit = job.limit
    if limit and row.get("generative"):
        limit = max(limit // GENERATIVE_SHARE, 1)
    parameters = PipelineParameters(
        launcher_type=ParallelismManager.ACCELERATE,
        custom_tasks_directory=str(Path(__file__).with_name("smollm3.py")),
        max_samples=limit or None,
        bootstrap_iters=0,  # the intervals are ours
    )
    try:
        return Pipeline(
            tasks=f"{task}|{row['shots']}", pipeline_parameters=parameters,
            evaluation_tracker=tracker, model=model,
        )  # fmt: skip
    except ValueError as error:
        if "Cannot find" in str(error) or "not found" in str(error).lower():
            raise EvalError(f"task {task}: no such task or dataset: {error}") from None
        raise
    except OSError as error:  # datasets' own errors are kinds of it
        raise EvalError(
            f"task {task}: its dataset cannot be read: {error}; SUITE=local takes what packages carry"
        ) from None


def _answer_limit(job: Job) -> dict[str, int]:
    return {key: value for key, value in job.generation.items() if key == "max_new_tokens"}


def _check_lengths(pipeline: Any, model: Any, task: str, job: Job) -> None:
    """lighteval cuts a prompt from the left, and an answer to the room that is left, without a word."""
    for docs in pipeline.sampling_docs.values():
        for doc in docs:
            prompt = len(model.tok_encode(model.prompt_manager.prepare_prompt(doc)))
            room = max((len(model.tok_encode(choice)) for choice in doc.choices), default=0)
            if doc.generation_size:
                size = _answer_limit(job).get("max_new_tokens", doc.generation_size)
                room = min(size, ANSWER_ROOM)
            if prompt + room > model.max_length:
                raise EvalError(
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


def summary(tasks: Sequence[Scored]) -> Row:
    """{value, low, high, items}: the mean of the tasks' scores with its 95 % interval.

    One task of right and wrong items has Wilson's interval, else the normal one of the mean.
    """
    value, items = statistics.fmean(task.value for task in tasks), sum(task.items for task in tasks)
    if len(tasks) == 1 and tasks[0].hits is not None:
        low, high = wilson(tasks[0].hits, items)
    else:
        half = Z_95 * math.sqrt(sum(task.variance for task in tasks)) / len(tasks)
        low, high = max(value - half, 0.0), min(value + half, 1.0)
    return {"value": value, "low": low, "high": high, "items": items}


if __name__ == "__main__":
    main()
