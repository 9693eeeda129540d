"""The scale dial keeps what makes the recipe the recipe, and says why for all that it changes."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, edit
from hypothesis import given
from hypothesis import strategies as st
from launch.data import mixture_of
from launch.scale import changes, flatten, scale

from launch.__main__ import diff
from launch.recipe import Recipe, load_recipe, load_scale

STAGES = ("pretrain-stage1", "pretrain-stage2", "pretrain-stage3")
SMALL = sorted(
    file.stem for file in (ROOT / "recipes/scales").glob("*.yaml") if file.stem != "full"
)


@cache
def published(stage: str) -> Recipe:
    return load_recipe(stage)


def schedule(recipe: Recipe) -> dict[str, Any]:
    values: dict[str, Any] = recipe.nanotron["optimizer"]["learning_rate_scheduler"]
    return values


def steps(recipe: Recipe) -> int:
    count: int = recipe.nanotron["tokens"]["train_steps"]
    return count


@pytest.mark.parametrize("stage", STAGES)
def test_full_changes_nothing(stage: str) -> None:
    assert scale(published(stage), load_scale("full")) == published(stage)
    assert changes(published(stage), load_scale("full")) == []


@pytest.mark.parametrize("name", ["full", *SMALL])
@pytest.mark.parametrize("stage", STAGES)
def test_scaling_is_pure(stage: str, name: str) -> None:
    recipe, dial = load_recipe(stage), load_scale(name)
    before = copy.deepcopy((recipe, dial))
    first = scale(recipe, dial)
    assert (recipe, dial) == before
    first.nanotron["tokens"]["train_steps"] = -1  # what is handed out is nobody else's
    first.nanotron["optimizer"]["weight_decay_exclude_named_params"].clear()
    assert (recipe, dial) == before
    assert scale(recipe, dial) == scale(recipe, dial) != first


@pytest.mark.parametrize("name", SMALL)
def test_the_stages_keep_their_ratio_of_steps(name: str) -> None:
    small = [steps(scale(published(stage), load_scale(name))) for stage in STAGES]
    large = [steps(published(stage)) for stage in STAGES]
    for one, other in zip(small, large, strict=True):
        assert one / small[-1] == pytest.approx(other / large[-1], abs=1 / small[-1])


@given(divisor=st.integers(1, 200_000))
def test_the_schedule_keeps_its_shape_at_any_length(divisor: int) -> None:
    dial = load_scale("full") | {"steps_divided_by": divisor, "minimum_warmup_steps": 5}
    stages = [scale(published(stage), dial) for stage in STAGES]
    ends, lr = [steps(stage) for stage in stages], schedule(stages[0])
    assert all(schedule(stage) == lr for stage in stages)  # one schedule over stages 1-3
    assert lr["lr_warmup_steps"] == max(round(2000 / divisor), 5)
    # The decay begins with stage 3, which it fills.
    assert abs(lr["lr_decay_starting_step"] - ends[1]) <= 1
    assert abs(lr["lr_decay_starting_step"] + lr["lr_decay_steps"] - ends[2]) <= 1
    assert 0 < ends[0] < ends[1] < ends[2]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("stage", STAGES)
def test_windows_keep_their_ratios(stage: str, name: str) -> None:
    before = published(stage).nanotron
    after = scale(published(stage), load_scale(name)).nanotron
    divisor = load_scale(name)["windows_divided_by"]
    for section, key in (
        (("tokens",), "sequence_length"),
        (("tokenizer",), "tokenizer_max_length"),
        (("model", "model_config"), "max_position_embeddings"),
    ):
        old, new = before, after
        for part in section:
            old, new = old[part], new[part]
        assert new[key] * divisor == old[key]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("stage", STAGES)
def test_mixture_and_what_makes_the_model_are_kept(stage: str, name: str) -> None:
    before, after = published(stage), scale(published(stage), load_scale(name))
    assert after.mixture == before.mixture
    old, new = (recipe.nanotron["model"]["model_config"] for recipe in (before, after))
    kept = (
        "no_rope_layer",
        "tie_word_embeddings",
        "_use_doc_masking",
        "rope_theta",
        "rms_norm_eps",
    )
    assert {key: new[key] for key in kept} == {key: old[key] for key in kept}
    assert new["num_hidden_layers"] % new["no_rope_layer"] == 0  # whole groups of 3 RoPE, 1 NoPE
    groups = [c["num_attention_heads"] / c["num_key_value_heads"] for c in (old, new)]
    assert groups == [4, 4]
    key = "weight_decay_exclude_named_params"
    assert after.nanotron["optimizer"][key] == before.nanotron["optimizer"][key]
    for key in ("clip_grad", "weight_decay", "optimizer_factory"):
        assert after.nanotron["optimizer"][key] == before.nanotron["optimizer"][key]


@pytest.mark.parametrize("stage", STAGES)
def test_every_source_has_its_weight_whatever_the_origin(stage: str) -> None:
    weights = sorted(published(stage).mixture.values())
    assert sorted(mixture_of(stage, "standin").values()) == weights
    assert set(mixture_of(stage, "hub")) < set(mixture_of(stage, "standin"))  # some are unreleased


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("stage", STAGES)
def test_each_changed_key_is_listed_with_its_reason(stage: str, name: str) -> None:
    dial = load_scale(name)
    before = flatten(published(stage).nanotron)
    after = flatten(scale(published(stage), dial).nanotron)
    listed = {change.key: change for change in changes(published(stage), dial)}
    assert set(listed) == {f"nanotron.{key}" for key in after if after[key] != before.get(key)}
    for key, change in listed.items():
        short = key.removeprefix("nanotron.")
        assert (change.before, change.after) == (before[short], after[short])
        assert len(change.why) > 10


def test_a_reason_covers_whole_keys_alone(recipes: Path) -> None:
    # `nanotron.model.model_config` must not speak for `nanotron.model.model_configuration`.
    dial = load_scale("full") | {"scale": "full", "learning_rate_times": 2.0}
    dial["why"] = {"nanotron.optimizer.learning_rate": "a prefix by letters, not by keys"}
    with pytest.raises(
        ValueError, match=r"no reason for nanotron\.optimizer\.learning_rate_scheduler"
    ):
        changes(published("pretrain-stage1"), dial)


@pytest.mark.parametrize("stage", STAGES)
def test_diff_prints_each_change_and_its_reason(
    stage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    for name in SMALL:
        diff(stage, name)
        lines = capsys.readouterr().out.splitlines()
        for change in changes(published(stage), load_scale(name)):
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
        for change in changes(load_recipe("pretrain-stage1"), load_scale("tiny"))
        if "exclude" in change.key
    }
    before = [".*token_embedding.*"]
    wanted = {"0": (before[0], "a"), "1": (None, "b")} if now else {"0": (before[0], None)}
    assert listed == wanted
