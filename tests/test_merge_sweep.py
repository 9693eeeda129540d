"""The sweep merges as the recipe does, scores each weight once, and draws what it scored."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import weights as weights_of
from small_models import write_model

from eval_tasks.intervals import wilson
from ground.checksums import seal
from ground.errors import UserError
from launch import walk
from launch.recipe.merging import MergeRecipe
from launch.recipe.scale import Scale, load_scale
from launch.report.sweeps import curves
from launch.stages.merge import MergeStage
from launch.tools import merge_sweep
from launch.tools.merge_sweep import SweepRun, draw, run_sweep, sweep_config, weights

SCORES = {
    "think_well_formed": 0.9,
    "no_think_well_formed": 1.0,
    "tool_call_parses": 0.5,
    "tool_listed": 0.0,
}


resolved = walk.resolve


def found_by(monkeypatch: pytest.MonkeyPatch, merge: MergeStage) -> MergeStage:
    """The stage and all that it takes are what their names resolve to, and they are done."""
    stages = {**merge.inputs, "merge": merge}
    monkeypatch.setattr(walk, "resolve", lambda stage, at: stages[stage])
    monkeypatch.setattr(walk, "run_stage", lambda run: False)
    return merge


@pytest.fixture
def at() -> Scale:
    return load_scale("tiny")


@pytest.fixture
def merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: Scale) -> MergeStage:
    """The merge stage with a soup and a partner that are done."""
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    stage = resolved("merge", at)
    assert isinstance(stage, MergeStage)
    for seed, run in enumerate(stage.inputs.values()):
        seal(write_model(run.folder / "hf", seed))
    return found_by(monkeypatch, stage)


Merged = list[dict[str, torch.Tensor]]


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> Merged:
    """The weights of each merge that was scored."""
    seen: Merged = []

    def score(run: SweepRun) -> dict[str, Any]:
        seen.append(weights_of(run.folder / "hf"))
        needle = {"length": 64, "depth": 0.5, "hits": 1, "of": 4, "chance": 0.1}
        return {"needle": [needle], "bits_per_byte": 3.0, "scores": SCORES, "prompts": 20}

    monkeypatch.setattr(merge_sweep, "_scores", score)
    return seen


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_the_sweep_runs_from_the_soup_to_the_partner_through_the_recipes_merge(
    merge: MergeStage, at: Scale, scored: Merged
) -> None:
    merge.work(0)
    target = run_sweep("", at)
    assert weights() == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    ends = [
        {name: tensor.bfloat16() for name, tensor in weights_of(run.folder / "hf").items()}
        for run in merge.inputs.values()
    ]
    assert equal(scored[0], ends[0]) and equal(scored[-1], ends[1])
    assert equal(scored[1], weights_of(merge.folder / "hf"))
    assert len(scored) == 11 and not equal(scored[1], scored[2])
    report = json.loads(target.read_text())
    assert [point["weight"] for point in report["points"]] == weights()
    assert report["recipe_weight"] == 0.1
    assert not list(target.parent.glob("**/*.safetensors"))


def test_a_stopped_sweep_goes_on_and_a_changed_one_begins_again(
    merge: MergeStage, at: Scale, scored: Merged, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = merge_sweep._scores

    def stop_at_the_fourth(run: SweepRun) -> dict[str, Any]:
        if len(scored) == 3:
            raise KeyboardInterrupt
        return score(run)

    monkeypatch.setattr(merge_sweep, "_scores", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        run_sweep("longctx-64k", at)
    assert not list(merge.folder.parent.glob("merge-sweep/**/*.safetensors"))
    monkeypatch.setattr(merge_sweep, "_scores", score)
    first = run_sweep("longctx-64k", at).read_bytes()
    assert len(scored) == 11
    assert run_sweep("longctx-64k", at).read_bytes() == first and len(scored) == 11
    soup = merge.inputs["soup"]
    changed = replace(soup, recipe=replace(soup.recipe, out_dtype="float16"))
    found_by(monkeypatch, replace(merge, inputs={**merge.inputs, "soup": changed}))
    run_sweep("longctx-64k", at)
    assert len(scored) == 22


@pytest.mark.parametrize("below", ["other", "other/hf"])
def test_a_partner_may_be_any_folder_and_is_told_from_its_next_version(
    merge: MergeStage, at: Scale, scored: Merged, tmp_path: Path, below: str
) -> None:
    folder = write_model(tmp_path / below, 9)
    target = run_sweep(str(folder), at)
    assert target.name == "other.json"
    assert equal(scored[-1], {n: t.bfloat16() for n, t in weights_of(folder).items()})
    write_model(folder, 10)
    run_sweep(str(folder), at)
    assert len(scored) == 22 and not equal(scored[-1], scored[10])


def test_an_unknown_partner_is_refused(merge: MergeStage, at: Scale, scored: Merged) -> None:
    with pytest.raises(
        UserError, match=r"PARTNER=longctx-46k: neither .* did you mean 'longctx-64k'"
    ):
        run_sweep("longctx-46k", at)
    with pytest.raises(UserError, match="PARTNER=tokenizer: neither"):
        run_sweep("tokenizer", at)
    assert scored == []


def test_the_share_of_the_soup_is_what_the_partner_leaves(tmp_path: Path, at: Scale) -> None:
    recipe: MergeRecipe = resolved("merge", at).recipe
    for weight in weights():
        config = sweep_config(recipe, tmp_path / "soup", tmp_path / "partner", weight)
        shares = [row["parameters"]["weight"] for row in config["models"]]
        assert shares[1] == weight and sum(shares) == pytest.approx(1)
        for key in ("dtype", "out_dtype", "merge_method"):
            assert config[key] == getattr(recipe, key)


def points(hits: Callable[[int], int]) -> list[dict[str, Any]]:
    cell = {"length": 64, "chance": 0.1, "of": 10}
    return [
        {"weight": weight, "bits_per_byte": 3.0, "scores": SCORES, "prompts": 20,
         "needle": [{**cell, "depth": d, "hits": hits(index)} for d in (0.0, 1.0)]}
        for index, weight in enumerate(weights())
    ]  # fmt: skip


def test_curves_are_the_scores_with_intervals_around_them() -> None:
    found = curves(points(lambda index: index // 2))
    hits = [2 * (index // 2) for index in range(11)]  # of two depths
    assert found["needles found"] == [(n / 20, *wilson(n, 20)) for n in hits]
    assert found["/think well-formed"] == [(0.9, *wilson(18, 20))] * 11
    assert found["tool is listed"] == [(0.0, *wilson(0, 20))] * 11


def test_the_figure_names_every_curve(tmp_path: Path) -> None:
    report = {"points": points(lambda index: 5), "recipe_weight": 0.1}
    draw(report, tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text()
    for words in (*curves(report["points"]), "needles by chance", "bits per byte"):
        assert f"<!-- {words} -->" in text
