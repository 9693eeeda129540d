"""The scale dial keeps what makes the recipe the recipe, and says why for all that it changes."""

import copy
from dataclasses import FrozenInstanceError, asdict, replace
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import ROOT, edit
from hypothesis import given
from hypothesis import strategies as st

from ground.errors import UserError
from launch.recipe.book import Loaded, load_recipe
from launch.recipe.changes import changes, flatten
from launch.recipe.pretrain import LearningRateScheduler, PretrainRecipe
from launch.recipe.scale import Scale, load_scale, scale
from launch.stages.sources import mixture_of
from launch.tools.diff import show, stage_changes

STAGES = ("pretrain-stage1", "pretrain-stage2", "pretrain-stage3")
SMALL = sorted(
    file.stem for file in (ROOT / "recipes/scales").glob("*.yaml") if file.stem != "full"
)


def published(stage: str) -> Loaded[PretrainRecipe]:
    return load_recipe(stage)


def scaled(stage: str, at: Scale) -> PretrainRecipe:
    return scale(published(stage), at)


def with_values(at: Scale, **changed: Any) -> Scale:
    """A scale with other values of its file."""
    return replace(at, values=replace(at.values, **changed))


def schedule(recipe: PretrainRecipe) -> LearningRateScheduler:
    return recipe.nanotron.optimizer.learning_rate_scheduler


def steps(recipe: PretrainRecipe) -> int:
    return recipe.nanotron.tokens.train_steps


@pytest.mark.parametrize("stage", STAGES)
def test_full_changes_nothing(stage: str) -> None:
    assert scaled(stage, load_scale("full")) == published(stage).recipe
    assert changes(published(stage), load_scale("full")) == []


@pytest.mark.parametrize("name", ["full", *SMALL])
@pytest.mark.parametrize("stage", STAGES)
def test_scaling_is_pure(stage: str, name: str) -> None:
    loaded, dial = published(stage), load_scale(name)
    before = copy.deepcopy((loaded, dial.values))
    first = scaled(stage, dial)
    with pytest.raises(FrozenInstanceError):
        first.nanotron.tokens.train_steps = 1  # type: ignore[misc]
    plain = asdict(first)  # what is handed out is nobody else's
    plain["mixture"].clear()
    plain["nanotron"]["tokens"].clear()
    assert (loaded, dial.values) == before
    assert scaled(stage, dial) == first


@pytest.mark.parametrize("name", SMALL)
def test_the_stages_keep_their_ratio_of_steps(name: str) -> None:
    small = [steps(scaled(stage, load_scale(name))) for stage in STAGES]
    large = [steps(published(stage).recipe) for stage in STAGES]
    for one, other in zip(small, large, strict=True):
        assert one / small[-1] == pytest.approx(other / large[-1], abs=1 / small[-1])


@given(divisor=st.integers(1, 200_000))
def test_the_schedule_keeps_its_shape_at_any_length(divisor: int) -> None:
    dial = with_values(load_scale("full"), steps_divided_by=divisor, minimum_warmup_steps=5)
    stages = [scaled(stage, dial) for stage in STAGES]
    ends, lr = [steps(stage) for stage in stages], schedule(stages[0])
    assert all(schedule(stage) == lr for stage in stages)  # one schedule over stages 1-3
    assert lr.lr_warmup_steps == max(round(2000 / divisor), 5)
    # The decay begins with stage 3, which it fills.
    assert abs(lr.lr_decay_starting_step - ends[1]) <= 1
    assert abs(lr.lr_decay_starting_step + lr.lr_decay_steps - ends[2]) <= 1
    assert 0 < ends[0] < ends[1] < ends[2]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("stage", STAGES)
def test_windows_keep_their_ratios(stage: str, name: str) -> None:
    before = flatten(asdict(published(stage).recipe.nanotron))
    after = flatten(asdict(scaled(stage, load_scale(name)).nanotron))
    divisor = load_scale(name).values.windows_divided_by
    for key in (
        "tokens.sequence_length",
        "tokenizer.tokenizer_max_length",
        "model.model_config.max_position_embeddings",
    ):
        assert cast(int, after[key]) * divisor == before[key]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("stage", STAGES)
def test_mixture_and_what_makes_the_model_are_kept(stage: str, name: str) -> None:
    before, after = published(stage).recipe, scaled(stage, load_scale(name))
    assert after.mixture == before.mixture
    old, new = (recipe.nanotron.model.model_config for recipe in (before, after))
    kept = (
        "no_rope_layer",
        "tie_word_embeddings",
        "_use_doc_masking",
        "rope_theta",
        "rms_norm_eps",
    )
    assert {key: getattr(new, key) for key in kept} == {key: getattr(old, key) for key in kept}
    assert new.num_hidden_layers % new.no_rope_layer == 0  # whole groups of 3 RoPE, 1 NoPE
    groups = [c.num_attention_heads / c.num_key_value_heads for c in (old, new)]
    assert groups == [4, 4]
    kept = (
        "weight_decay_exclude_named_params",
        "clip_grad",
        "weight_decay",
        "optimizer_factory",
    )
    for key in kept:
        assert getattr(after.nanotron.optimizer, key) == getattr(before.nanotron.optimizer, key)


@pytest.mark.parametrize("stage", STAGES)
def test_every_source_has_its_weight_whatever_the_origin(stage: str) -> None:
    weights = sorted(published(stage).recipe.mixture.values())
    small, full = load_scale("tiny"), load_scale("full")
    stand_in, hub = (
        mixture_of(stage, with_values(at, origin=origin)).weights
        for at, origin in ((small, "standin"), (full, "hub"))
    )
    assert sorted(stand_in.values()) == weights
    assert set(hub) < set(stand_in)  # some are unreleased


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("stage", STAGES)
def test_each_changed_key_is_listed_with_its_reason(stage: str, name: str) -> None:
    dial = load_scale(name)
    before = flatten(asdict(published(stage).recipe.nanotron))
    after = flatten(asdict(scaled(stage, dial).nanotron))
    listed = {change.key: change for change in changes(published(stage), dial)}
    assert set(listed) == {f"nanotron.{key}" for key in after if after[key] != before.get(key)}
    for key, change in listed.items():
        short = key.removeprefix("nanotron.")
        assert (change.before, change.after) == (before[short], after[short])
        assert len(change.why) > 10


def test_a_reason_covers_whole_keys_alone(recipes: Path) -> None:
    # `nanotron.model.model_config` must not speak for `nanotron.model.model_configuration`.
    why = {"nanotron.optimizer.learning_rate": "a prefix by letters, not by keys"}
    dial = with_values(load_scale("full"), learning_rate_times=2.0, why=why)
    with pytest.raises(
        UserError, match=r"no reason for nanotron\.optimizer\.learning_rate_scheduler"
    ):
        changes(published("pretrain-stage1"), dial)


@pytest.mark.parametrize("stage", STAGES)
def test_diff_prints_each_change_and_its_reason(
    stage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    for name in SMALL:
        show(stage, load_scale(name))
        lines = capsys.readouterr().out.splitlines()
        for change in stage_changes(stage, load_scale(name)):
            key = change.key.removeprefix("nanotron.")
            cells = (f" {key} ", f" {change.before} ", f" {change.after} ", f" {change.why} ")
            assert any(all(cell in line for cell in cells) for line in lines), cells


@pytest.mark.parametrize("now", [["a", "b"], []])
def test_a_list_of_another_length_is_listed_whole(recipes: Path, now: list[str]) -> None:
    file = recipes / "scales/tiny.yaml"
    old = "    accumulate_grad_in_fp32: false\n"
    edit(file, old, f"{old}    weight_decay_exclude_named_params: {now}\n")
    edit(file, "\nwhy:\n", "\nwhy:\n  nanotron.optimizer: for the test\n")
    listed = {
        change.key.rpartition(".")[2]: (change.before, change.after)
        for change in changes(published("pretrain-stage1"), load_scale("tiny"))
        if "exclude" in change.key
    }
    before = [".*token_embedding.*"]
    wanted = {"0": (before[0], "a"), "1": (None, "b")} if now else {"0": (before[0], None)}
    assert listed == wanted
