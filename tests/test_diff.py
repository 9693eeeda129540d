"""`make diff` says what a scale changes of any stage that has a recipe."""

from pathlib import Path
from typing import Any

import pytest
from conftest import edit

from ground.errors import UserError
from launch.recipe.changes import Change
from launch.recipe.scale import load_scale
from launch.tools import diff
from launch.walk import resolve

POSTTRAIN = ("midtrain", "sft", "apo")


def stage_changes(stage: str, scale: str) -> list[Change]:
    return diff.stage_changes(stage, load_scale(scale))


def values_of(stage: str, scale: str) -> dict[str, Any]:
    return resolve(stage, load_scale(scale)).recipe_values()


@pytest.mark.parametrize(
    "stage", ["pretrain-stage1", "longctx-64k", *POSTTRAIN, "soup", "release", "eval"]
)
def test_what_is_listed_is_all_that_a_scale_changes(stage: str) -> None:
    full, small = (values_of(stage, scale) for scale in ("full", "tiny"))
    listed = {change.key: change for change in stage_changes(stage, "tiny")}
    for key, change in listed.items():
        assert change.before != change.after and change.why
        assert key.partition(".")[0] in small
    if stage in POSTTRAIN:
        assert listed["world_size"].before == full["world_size"]
        assert listed["trl.max_steps"].after == small["trl"]["max_steps"]
        assert full["mixture"] == small["mixture"]
    if stage == "eval":
        assert listed["limit"].before == 0 and listed["limit"].after == small["limit"]
        full, small = ({k: v for k, v in r.items() if k in listed} for r in (full, small))
    assert bool(listed) == (full != small)


@pytest.mark.parametrize("stage", ["midtrain", "sft", "apo", "merge", "eval"])
def test_the_full_scale_changes_nothing(stage: str) -> None:
    assert stage_changes(stage, "full") == []


def test_a_recipe_file_stands_for_its_stage(recipes: Path) -> None:
    for name in ("posttrain/apo.yaml", "merge/soup.yaml", "longctx/32k.yaml"):
        file = recipes / name
        stage = resolve(str(file), load_scale("tiny")).stage
        assert f"\nstage: {stage}\n" in file.read_text()
        assert stage_changes(str(file), "tiny") == stage_changes(stage, "tiny")
    stray = recipes / "stray.yaml"
    stray.write_text((recipes / "merge/soup.yaml").read_text())
    with pytest.raises(UserError, match=r"stray\.yaml: extends: it reaches no stage's recipe;"):
        resolve(str(stray), load_scale("tiny"))


@pytest.mark.parametrize("stage", ["tokenizer", "data-stage1", "held-out", "data-chats"])
def test_a_stage_without_a_recipe_is_compared_with_itself_at_full_scale(stage: str) -> None:
    listed = {change.key: change for change in stage_changes(stage, "tiny")}
    assert listed and all(change.why for change in listed.values())
    at_hub = diff.stage_changes(stage, load_scale("tiny", origin="hub"))
    assert all(change.why for change in at_hub)
    assert stage_changes(stage, "full") == []


def test_a_stage_that_says_nothing_has_nothing_to_compare() -> None:
    with pytest.raises(UserError, match="report: has no recipe to compare"):
        stage_changes("report", "tiny")


def test_a_change_without_a_reason_is_refused(recipes: Path) -> None:
    edit(recipes / "scales/tiny.yaml", "  posttrain.world_size: one process", "  # one process")
    with pytest.raises(UserError, match=r"tiny\.yaml: why: no reason for posttrain\.world_size;"):
        stage_changes("apo", "tiny")


def test_a_fitted_layout_is_shown_of_post_training_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUS", "4")
    monkeypatch.setenv("GPU_GB", "80")
    rows = {change.key: change for change in stage_changes("sft", "60m")}
    assert (rows["world_size"].after, rows["world_size"].why) == (4, "layout: fit, to 4 x 80 GiB")
    batch, accumulated = (
        rows[f"trl.{key}"].after if f"trl.{key}" in rows else None
        for key in ("per_device_train_batch_size", "gradient_accumulation_steps")
    )
    assert (batch or 1, accumulated) == (4, 1)
