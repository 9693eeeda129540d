"""Prompts, answers and scores of every published task are the released ones, on made-up rows: what
differs is listed here, and in docs/LEDGER.md with the reason (`released_questions.py` has the rows)."""

import json
import os
from typing import Any

import pytest
from conftest import ROOT
from forked import run
from released_questions import FILE, TASKS

from eval_tasks.task_table import expanded, read_tasks
from launch.recipe.evaluation import load_suite

Asked = dict[str, dict[str, Any]]
RELEASED: dict[str, Any] = json.loads(FILE.read_text("utf-8"))
# Published by the release under these names, and not in its task lists or not in this repository's.
NOT_RELEASED = {"humaneval_plus", "mbpp_plus", "mode_switch"}
# Their prompts and rules are lighteval's own functions, called.
NOT_RELEASED |= {"livecodebench:v4"}


def ask(*arguments: str) -> Asked:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = run(
        "scores", str(ROOT / "tests/ask_tasks.py"), *arguments, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: Asked = json.loads(done.stdout.split("RESULT")[1])
    return found


@pytest.fixture(scope="module")
def ours() -> Asked:
    return ask()


@pytest.mark.slow
def test_every_prompt_choice_and_gold_is_the_released_one(ours: Asked) -> None:
    assert list(ours) == list(RELEASED["tasks"])
    for name, released in RELEASED["tasks"].items():
        for key in ("prompt", "choices", "gold"):
            wanted = [item[key] for item in released["asked"]]
            assert [item[key] for item in ours[name]["asked"]] == wanted, (name, key)


@pytest.mark.slow
def test_every_answer_is_scored_as_released(ours: Asked) -> None:
    for name, released in RELEASED["tasks"].items():
        for mine, theirs in zip(ours[name]["asked"], released["asked"], strict=True):
            scores = mine["scores"], theirs["scores"]
            if len(theirs["scores"]) == 1:  # a metric that has another name here
                scores = list(mine["scores"].values()), list(theirs["scores"].values())
            assert scores[0] == scores[1], name
    zeros_and_ones = {
        digit
        for name in ("gsm8k_base", "math_base:algebra", "gsm_plus_mini", "gpqa_diamond")
        for item in RELEASED["tasks"][name]["asked"]
        for digit in "".join(item["scores"].values())
    }
    assert zeros_and_ones == {"0", "1"}


@pytest.mark.slow
def test_sets_splits_limits_and_stops_are_the_released_ones(ours: Asked) -> None:
    for name, released in RELEASED["tasks"].items():
        mine = ours[name]
        assert mine["dataset"] == released["dataset"], name
        assert mine["splits"] == released["splits"], name
        if released["shots"][2]:
            assert mine["shots"] == released["shots"], name
        written = "acc_norm" not in released["metrics"] and "acc" not in released["metrics"]
        if written and released["answer_tokens"]:
            assert mine["answer_tokens"] == released["answer_tokens"], name
        if written:
            assert mine["stop"] == released["stop"], name


@pytest.mark.slow
def test_a_corpus_score_counts_every_translation_where_the_release_counts_the_first(
    ours: Asked,
) -> None:
    for name, released in RELEASED["tasks"].items():
        if name.startswith("flores"):
            assert set(ours[name]["corpus"]) == {"chrf++", "bleu"}
            assert all(ours[name]["corpus"][key] != released["corpus"][key] for key in ("chrf++", "bleu"))  # fmt: skip


@pytest.mark.parametrize("name", ["base", "instruct", "multilingual"])
def test_every_task_of_a_published_suite_is_compared(name: str) -> None:
    used = {task for row in load_suite(name).rows for task in expanded(row.tasks, read_tasks())}
    for family, members in RELEASED["members"].items():
        ours = {"math_cot": "math_base"}.get(family, family)
        assert {task for task in used if task.startswith(f"{ours}:")} <= {f"{ours}:{m}" for m in members}  # fmt: skip
        if name == "base":
            assert len(members) == sum(task.startswith(f"{ours}:") for task in used)
        used = {task for task in used if not task.startswith(f"{ours}:")}
    assert used - set(TASKS) <= NOT_RELEASED
