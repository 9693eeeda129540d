"""The recipes say what was published: every number here stands in tests/published.yaml, transcribed."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.recipe.book import load_recipe
from launch.recipe.changes import flatten
from launch.recipe.load import lay_over
from launch.recipe.pretrain import PretrainRecipe

ROOT = Path(__file__).parent.parent
PUBLISHED = yaml.safe_load((Path(__file__).parent / "published.yaml").read_text())
SOURCES = yaml.safe_load((ROOT / "recipes/sources.yaml").read_text())["sources"]
LONG_CONTEXT = ["longctx-32k", "longctx-64k"]
STAGES = list(PUBLISHED["mixtures"])
CATEGORIES = {"web-en", "web-multilingual", "code", "math", "reasoning"}
ROW_KEYS = {
    "hub_id",
    "config",
    "split",
    "revision",
    "licence",
    "gated",
    "category",
    "language",
    "stand_in",
}
OPTIONAL_KEYS = {
    "substitute", "replaced_by", "data_files", "max_tokens", "contents", "file_language", "tokens",
    "clean", "messages", "text_field",
}  # fmt: skip


def recipe(stage: str) -> PretrainRecipe:
    return load_recipe(stage).recipe


def canonical(name: str) -> str:
    return SOURCES[name].get("same_as", name)


def rows() -> dict[str, dict[str, Any]]:
    return {name: row for name, row in SOURCES.items() if "same_as" not in row}


def standins() -> dict[str, dict[str, Any]]:
    return yaml.safe_load((ROOT / "recipes/standins.yaml").read_text())["standins"]


@pytest.mark.parametrize("stage", STAGES)
def test_mixture_is_the_published_one(stage):
    assert recipe(stage).stage == stage
    assert recipe(stage).mixture == PUBLISHED["mixtures"][stage]


@pytest.mark.parametrize("stage", STAGES)
def test_number_and_sum_of_weights(stage):
    mixture = recipe(stage).mixture
    assert len(mixture) == PUBLISHED["counts"][stage]
    assert sum(mixture.values()) == pytest.approx(PUBLISHED["sums"][stage], abs=1e-9)
    assert all(weight > 0 for weight in mixture.values())


@pytest.mark.parametrize("stage", STAGES)
def test_every_published_number_is_the_recipes(stage):
    published = flatten(lay_over(PUBLISHED["nanotron"], PUBLISHED["stages"][stage]))
    ours = flatten(asdict(recipe(stage).nanotron))
    assert len(published) > 60
    assert {key: ours[key] for key in published} == published


@pytest.mark.parametrize("stage", STAGES)
def test_batch_and_gpus_follow(stage):
    nanotron = recipe(stage).nanotron
    tokens = nanotron.windows_a_step * nanotron.tokens.sequence_length
    assert tokens == PUBLISHED["global_batch_tokens"]
    assert nanotron.parallelism.world_size == PUBLISHED["gpus"][stage]


@pytest.mark.parametrize("stage", LONG_CONTEXT)
def test_long_context_starts_afresh(stage):
    nanotron = recipe(stage).nanotron
    schedule = nanotron.optimizer.learning_rate_scheduler
    assert nanotron.starts_afresh
    assert schedule.lr_decay_starting_step == schedule.lr_warmup_steps
    end = schedule.lr_decay_starting_step + schedule.lr_decay_steps
    assert end == nanotron.tokens.train_steps


def test_sources_hold_the_115_published_names_and_what_replaces_them():
    names = {name for mixture in PUBLISHED["mixtures"].values() for name in mixture}
    assert len(names) == 115
    replacing = {row["replaced_by"] for row in SOURCES.values() if "replaced_by" in row}
    assert set(SOURCES) == names | replacing
    assert not names & replacing


def test_source_rows_are_complete():
    for name, row in rows().items():
        assert ROW_KEYS <= set(row) <= ROW_KEYS | OPTIONAL_KEYS, name
        assert row["category"] in CATEGORIES, name
        assert isinstance(row["gated"], bool), name
        assert row["licence"] and row["language"], name
        is_public = row["hub_id"] is not None
        assert is_public == ("substitute" not in row) == ("clean" in row), name
        assert is_public != ("replaced_by" in row), name
        assert ("text_field" in row) != ("contents" in row), name
        assert row["revision"] == "main" or re.fullmatch("[0-9a-f]{7,40}", row["revision"]), name


@pytest.mark.parametrize("stage", STAGES)
def test_with_substitutes_no_weight_is_lost(stage):
    for name in recipe(stage).mixture:
        row = SOURCES[canonical(name)]
        assert SOURCES[row.get("replaced_by", canonical(name))]["hub_id"], name


def test_what_replaces_a_source_is_of_its_category_and_language():
    for name, row in rows().items():
        if "replaced_by" in row:
            other = SOURCES[row["replaced_by"]]
            for key in ("category", "language", "stand_in"):
                assert other[key] == row[key], name


def test_same_as_points_at_a_row():
    for name, row in SOURCES.items():
        if "same_as" in row:
            assert set(row) == {"same_as"}, name
            assert row["same_as"] in rows(), name


@pytest.mark.parametrize("stage", STAGES)
def test_no_source_twice_in_a_mixture(stage):
    sources = [canonical(name) for name in PUBLISHED["mixtures"][stage]]
    assert len(sources) == len(set(sources))


def test_stand_in_fits_its_source():
    known = standins()
    for name, row in rows().items():
        assert row["stand_in"] in known, name
        stand_in = known[row["stand_in"]]
        assert stand_in["category"] == row["category"], name
        prose = row["category"] in ("web-en", "math", "reasoning") or row["language"] == "eng"
        if not prose:
            assert stand_in["language"] == row["language"], name
