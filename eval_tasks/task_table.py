"""The table of evaluation tasks, datasets.yaml: typed, read once, and without importing lighteval.

To add a task: write a row in datasets.yaml, whose head explains the keys; add what is new in it to
FORMS and METRICS of tasks.py; name the task in a suite of recipes/eval/.
"""

import fnmatch
import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ground.errors import UserError, did_you_mean

FILE = Path(__file__).with_name("datasets.yaml")
CHOICE_METRICS = ("acc", "acc_norm", "acc_norm_token")


@dataclass(frozen=True)
class Task:
    """A row of datasets.yaml, or one member of it; the head of that file explains each key."""

    name: str
    form: str
    dataset: str
    config: str
    split: str
    metrics: Sequence[str]
    revision: str | None = None
    columns: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    counted_from: int = 0
    shots_from: str | None = None
    shots_select: str | None = None
    language: str = "eng"
    template: str = ""
    answer_tokens: int | None = None
    stop: Sequence[str] = ()
    keep: str | None = None


@functools.cache
def read_tasks() -> dict[str, Task]:
    """{name: task} in the file's order. Raises UserError for a row that is not a task."""
    tasks: dict[str, Task] = {}
    for name, row in _file()["tasks"].items():
        for member in _members(name, row):
            try:
                tasks[member["name"]] = Task(**member)
            except TypeError as error:  # an unknown key, or a missing one
                raise UserError(f"{FILE}: tasks.{name}: {error}") from None
    return tasks


def is_choice(name: str) -> bool:
    """Whether a task is scored by the log-likelihood of given answers."""
    task = read_tasks().get(name)
    return task is not None and any(metric in CHOICE_METRICS for metric in task.metrics)


def known_tasks() -> dict[str, tuple[str, ...]]:
    """{name: its metrics} of every task that a suite may name."""
    ours = {name: tuple(task.metrics) for name, task in read_tasks().items()}
    return ours | {name: tuple(metrics) for name, metrics in _file()["others"].items()}


def dataset(repo: str) -> str:
    """The hub's name of a dataset, or its folder under EVAL_DATA where there is one."""
    local = Path(os.environ.get("EVAL_DATA") or "/nowhere") / repo.replace("/", "--")
    return str(local) if local.is_dir() else repo


def expanded(patterns: Iterable[str], names: Iterable[str], where: str = "") -> list[str]:
    """Task names of `patterns`; a plain name is taken as it is. Raises UserError for no match."""
    names, tasks = list(names), list[str]()
    for pattern in patterns:
        matches = fnmatch.filter(names, pattern) if "*" in pattern else [pattern]
        if not matches:
            raise UserError(
                f"{where}tasks: {pattern}: matches no task of eval_tasks/datasets.yaml; name one"
            )
        tasks += matches
    return tasks


def check_row(tasks: Iterable[str], metric: str, where: str) -> None:
    """Refuse a suite's row whose task is unknown or lacks the metric; `where` is `<file>: rows.<n>`.

    Raises UserError. Needs no lighteval, so that a mistake is found before any process starts.
    """
    known = known_tasks()
    for name in expanded(tasks, read_tasks(), f"{where}."):
        if name not in known:
            raise UserError(
                f"{where}.tasks: {name}: no such task; {did_you_mean(name, known)} (one of "
                "lighteval's own needs a line under `others` in eval_tasks/datasets.yaml)"
            )
        if metric not in known[name]:
            raise UserError(f"{where}.metric: {metric}: {name} has {', '.join(known[name])}")


def _members(name: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The values of each task of a row: one, or one for each member of `each`."""
    shared = {key: value for key, value in row.items() if key != "each"}
    each = row.get("each")
    if each is None:
        return [{"name": name, **shared}]
    values = each if isinstance(each, dict) else {member: {} for member in each}
    return [
        {"name": f"{name}:{member}", "config": member, **shared, **own}
        for member, own in values.items()
    ]


@functools.cache
def _file() -> dict[str, Any]:
    return dict(yaml.safe_load(FILE.read_text("utf-8")))
