"""An ablation is one change: what its runs differ in, and what its table may say."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, forget_recipes
from small_checkout import make_checkout, no_process_left

from ground.errors import UserError
from ground.files import read_json_lines
from launch.recipe.changes import flatten
from launch.recipe.scale import load_scale
from launch.recipe.tables import load_ablations
from launch.report.sweeps import verdict
from launch.stages.pretrain import PretrainStage
from launch.stages.sources import HubData, planned
from launch.tools.ablation import SEEDS, ablation_run, ablation_runs
from nanotron_ext.mixture import build_mixture

SEED_KEYS = {"nanotron.general.seed", "nanotron.data_stages.0.data.seed"}


def runs_of(name: str, scale: str) -> dict[str, list[PretrainStage]]:
    return ablation_runs(name, load_scale(scale))


def different(one: PretrainStage, other: PretrainStage) -> set[str]:
    a, b = flatten(one.recipe_values()), flatten(other.recipe_values())
    return {key for key in a | b if a.get(key) != b.get(key)}


@pytest.mark.parametrize("scale", ["tiny", "full"])
@pytest.mark.parametrize("name", load_ablations())
def test_a_variant_differs_from_the_baseline_in_one_key_and_seeds_in_the_seed(
    name: str, scale: str
) -> None:
    runs = runs_of(name, scale)
    assert len(runs) > 1
    for variant, group in runs.items():
        assert len({run.identity for run in group}) == len(group) == len(SEEDS)
        assert different(group[0], group[1]) == SEED_KEYS
        for run, base in zip(group, runs["baseline"], strict=True):
            keys = different(run, base)
            # an emptied list is one change of several flattened keys
            parents = {key.rsplit(".", 1)[0] if key[-1].isdigit() else key for key in keys}
            parents = {"mixture" if key.startswith("mixture.") else key for key in parents}
            assert len(parents) == (variant != "baseline")


def test_each_variant_is_what_its_name_says() -> None:
    model = {
        (name, variant): group[0].recipe.nanotron.model.model_config
        for name in load_ablations()
        for variant, group in runs_of(name, "full").items()
    }
    assert model["nope", "baseline"].no_rope_layer == 4
    assert model["nope", "rope-only"].no_rope_layer == 0
    assert model["nope", "nope-only"].no_rope_layer == 1
    assert model["gqa", "mha"].num_key_value_heads == 16
    assert model["docmask", "no-docmask"]._use_doc_masking is False
    assert model["theta", "baseline"].rope_theta == 2e6
    assert model["theta", "theta-unchanged"].rope_theta == 5e4
    decayed = runs_of("embed-decay", "full")["decayed"][0].recipe.nanotron.optimizer
    assert decayed.weight_decay_exclude_named_params == ()


def test_a_short_run_ends_in_a_decay_to_nothing() -> None:
    nanotron = runs_of("gqa", "tiny")["mha"][0].recipe.nanotron
    schedule, steps = nanotron.optimizer.learning_rate_scheduler, nanotron.tokens.train_steps
    assert schedule.lr_decay_starting_step + schedule.lr_decay_steps == steps == 300
    assert schedule.min_decay_lr == 0
    assert schedule.lr_decay_steps == 30


def test_baselines_of_one_stage_are_shared() -> None:
    of_stage_1 = [name for name, row in load_ablations().items() if row.of == "pretrain-stage1"]
    assert len({runs_of(name, "tiny")["baseline"][0].folder for name in of_stage_1}) == 1


def test_a_run_is_found_by_its_folder_and_a_wrong_name_is_told_the_nearest() -> None:
    at = load_scale("tiny")
    run = ablation_runs("nope", at)["rope-only"][1]
    assert ablation_run(run.stage, at).identity == run.identity
    with pytest.raises(UserError, match=r"ablations/pretrain-stage1-rope-onyl-2: .*rope-only-2"):
        ablation_run("ablations/pretrain-stage1-rope-onyl-2", at)
    with pytest.raises(UserError, match=r"NAME=nop: no such ablation; .*nope"):
        ablation_runs("nop", at)


@pytest.mark.parametrize("scale", ["tiny", "60m"])
def test_two_mixtures_read_the_same_text_of_what_both_have(scale: str) -> None:
    at = load_scale(scale)
    runs = ablation_runs("mixture", at)
    (baseline, *_), (other, *rest) = runs["baseline"], runs["of-stage3"]
    assert other.recipe.mixture == planned("pretrain-stage3", at).weights
    assert baseline.data.stage == "data-stage1"  # the one baseline of all ablations
    assert {one.data.identity for one in rest} == {other.data.identity}
    here, there = baseline.data.recipe.sources, other.data.recipe.sources
    assert here.items() <= there.items() and set(there) == {*here, *other.recipe.mixture}
    added = {name: one for name, one in there.items() if name not in here}
    assert added
    samples = other.steps * other.recipe.nanotron.windows_a_step
    drawn = build_mixture(other.recipe.mixture).counts(samples)
    for name, one in added.items():
        if isinstance(one, HubData) and one.portion:
            skip, take = one.portion
            assert skip == 0 and drawn[name] * (other.window + 1) < take


def test_a_variant_s_mixture_may_be_written_and_its_mistakes_are_named(recipes: Path) -> None:
    def runs(mixture: object) -> dict[str, list[PretrainStage]]:
        row = {"of": "pretrain-stage1", "question": "?", "variants": {"mine": {"mixture": mixture}}}
        (recipes / "ablations.yaml").write_text(yaml.safe_dump({"ablations": {"own": row}}))
        forget_recipes()
        return runs_of("own", "tiny")

    mine = runs({"dclm": 3, "fineweb-edu": 1.0})["mine"][0]
    assert mine.recipe.mixture == {"dclm": 3, "fineweb-edu": 1} and mine.data.stage == "data-stage1"
    place = r"ablations\.yaml: ablations\.own\.variants\.mine\.mixture"
    for mixture, line in (
        ({"dclmm": 1.0}, rf"{place}\.dclmm: unknown source; did you mean 'dclm'"),
        ({"dclm": 0}, rf"{place}\.dclm: 0: "),
        (
            {"same_as": "pretrain-stage33"},
            rf"{place}\.same_as: pretrain-stage33: no stage that pre",
        ),
        ("dclm", rf"{place}: 'dclm': write one"),
        ({}, rf"{place}: no source of it can be had at SCALE=tiny; name others"),
    ):
        with pytest.raises(UserError, match=line) as error:
            runs(mixture)
        assert "\n" not in str(error.value)


def test_own_text_leaves_no_mixture_to_compare(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("text " * 50)
    with pytest.raises(UserError, match="it is all that is trained on: no mixture to compare"):
        ablation_runs("mixture", load_scale("tiny", str(tmp_path / "notes.txt")))


def test_overlapping_intervals_are_no_difference() -> None:
    base = {"mean": 2.0, "low": 1.9, "high": 2.1}
    assert verdict(base, {"mean": 2.3, "low": 2.1, "high": 2.5}) == "no difference"
    assert verdict(base, {"mean": 2.3, "low": 2.2, "high": 2.4}) == "+15.0%"
    assert verdict(base, {"mean": 1.5, "low": 1.4, "high": 1.6}) == "-25.0%"


@pytest.mark.slow
def test_an_ablation_runs_whole_and_a_second_time_trains_nothing(tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path / "checkout")
    rows = yaml.safe_load((ROOT / "recipes/ablations.yaml").read_text())["ablations"]
    file = checkout.folder / "recipes/ablations.yaml"
    file.write_text(yaml.safe_dump({"ablations": {"embed-decay": rows["embed-decay"]}}))
    with no_process_left(checkout):
        first = checkout.done("ablation", "embed-decay")
        second = checkout.done("ablation", "embed-decay")
    assert "steps" not in second and second.splitlines()[-12:] == first.splitlines()[-12:]
    folder = checkout.runs / "ablations"
    report = json.loads((folder / "embed-decay.json").read_text())
    assert report["variants"].keys() == report["needle"].keys() == {"baseline", "decayed"}
    assert report["tokens"] == 12 * 4 * 64
    for summary in report["variants"].values():
        assert all(s["low"] <= s["mean"] <= s["high"] for s in summary.values())
    assert all(cell["of"] == 30 for rows in report["needle"].values() for cell in rows)
    # The one seed's initial weights are the same: what differs is the decay alone.
    baseline, decayed = (
        read_json_lines(folder / f"pretrain-stage1-{variant}-1/metrics.jsonl")
        for variant in ("baseline", "decayed")
    )
    assert baseline[0]["loss"] == decayed[0]["loss"]
    assert baseline[-1]["embedding_norm"] > decayed[-1]["embedding_norm"]
    assert (folder / "embed-decay.svg").read_text().lstrip().startswith("<?xml")


@pytest.mark.slow
def test_two_mixtures_are_compared_domain_by_domain(tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path / "checkout")
    rows = yaml.safe_load((ROOT / "recipes/ablations.yaml").read_text())["ablations"]
    file = checkout.folder / "recipes/ablations.yaml"
    file.write_text(yaml.safe_dump({"ablations": {"mixture": rows["mixture"]}}))
    with no_process_left(checkout):
        printed = checkout.done("ablation", "mixture", COLUMNS="200")
    folder = checkout.runs / "ablations"
    domains = json.loads((folder / "mixture.json").read_text())["domains"]
    assert domains.keys() == {"baseline", "of-stage3"}
    held_out = {
        row["category"] for row in read_json_lines(checkout.runs / "held-out/held_out.jsonl")
    }
    for of in domains.values():
        assert of.keys() == held_out and all(d["low"] < d["mean"] < d["high"] for d in of.values())
    assert all(f"│ {name} " in printed for name in held_out)
    manifest = json.loads((folder / "data-pretrain-stage1-of-stage3/manifest.json").read_text())
    first = json.loads((checkout.runs / "data-stage1/manifest.json").read_text())
    assert set(manifest["shards"]) == {*first["shards"], "kaggle"}
    assert all(manifest["shards"][name] == shard for name, shard in first["shards"].items())
    seen = read_json_lines(folder / "pretrain-stage1-of-stage3-1/metrics.jsonl")[-1]
    assert seen["tokens_per_source"].keys() == {"dclm", "finemath", "kaggle"}
