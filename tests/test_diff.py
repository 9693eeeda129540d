"""`make diff` says what a scale changes of any stage that has a recipe."""

from pathlib import Path

import pytest
from conftest import edit
from launch.diff import stage_changes
from launch.errors import UserError

from launch.stages import resolve

POSTTRAIN = ("midtrain", "sft", "apo")


@pytest.mark.parametrize(
    "stage", ["pretrain-stage1", "longctx-64k", *POSTTRAIN, "soup", "release", "eval"]
)
def test_what_is_listed_is_all_that_a_scale_changes(stage: str) -> None:
    full, small = (resolve(stage, scale).recipe for scale in ("full", "tiny"))
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
        stage = resolve(str(file), "tiny").stage
        assert f"\nstage: {stage}\n" in file.read_text()
        assert stage_changes(str(file), "tiny") == stage_changes(stage, "tiny")
    stray = recipes / "stray.yaml"
    stray.write_text((recipes / "merge/soup.yaml").read_text())
    with pytest.raises(UserError, match=r"stray\.yaml: recipes/merge/soup\.yaml is the recipe of"):
        resolve(str(stray), "tiny")
    edit(stray, "stage: soup", "stages: soup")
    with pytest.raises(UserError, match=r"stray\.yaml: stage: missing"):
        resolve(str(stray), "tiny")


def test_a_stage_without_a_recipe_says_so() -> None:
    with pytest.raises(UserError, match="data-stage1: has no recipe of its own"):
        stage_changes("data-stage1", "tiny")


def test_a_change_without_a_reason_is_refused(recipes: Path) -> None:
    edit(recipes / "scales/tiny.yaml", "  posttrain.world_size: one process", "  # one process")
    with pytest.raises(UserError, match=r"tiny\.yaml: why: no reason for posttrain\.world_size;"):
        stage_changes("apo", "tiny")
