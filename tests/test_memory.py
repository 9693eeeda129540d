"""What a layout needs of a GPU: as measured, as autograd keeps it, as the recipes quote it."""

import re
from dataclasses import replace

import pytest

from benchmarks.fit import PROTOTYPE, Measured, predicted
from launch.machine.memory import Memory, memory, weights
from launch.recipe.book import Loaded, load_recipe
from launch.recipe.pretrain import Nanotron, PretrainRecipe
from launch.recipe.scale import load_scale, scale

GPU_BYTES = 80e9


def published(stage: str) -> Loaded[PretrainRecipe]:
    return load_recipe(stage)


def layout_of(stage: str, **parallelism: int) -> Nanotron:
    nanotron = scale(published(stage), load_scale("full")).nanotron
    return replace(nanotron, parallelism=replace(nanotron.parallelism, **parallelism))


@pytest.mark.parametrize("row", PROTOTYPE, ids=lambda row: f"{row.shape} {row.gibibytes}")
def test_measured_peaks_are_predicted_within_a_tenth(row: Measured) -> None:
    assert predicted(row) == pytest.approx(row.gibibytes, rel=0.1)


def test_unsharded_it_is_the_published_74_gigabytes() -> None:
    """Published: tp 2, because the model needs about 74 GB on one GPU without sharding."""
    one = replace(layout_of("pretrain-stage1", tp=1, dp=1), tokens=_one_window())
    assert memory(one).allocated / 1e9 == pytest.approx(74, rel=0.1)
    assert memory(layout_of("pretrain-stage1"), fast=False).total < GPU_BYTES


def _one_window() -> object:
    return replace(layout_of("pretrain-stage1").tokens, micro_batch_size=1)


@pytest.mark.parametrize("stage", ["longctx-32k", "longctx-64k"])
def test_the_recipe_quotes_what_is_computed(stage: str) -> None:
    text = published(stage).file.read_text()
    quoted = re.search(r"It takes\s(?:# )?(\d+) of a GPU's 80 GB", text.replace("\n# ", " "))
    assert quoted and int(quoted[1]) == round(memory(layout_of(stage), fast=False).total / 1e9)


@pytest.mark.parametrize(
    "stage", ["pretrain-stage1", "pretrain-stage3", "longctx-32k", "longctx-64k"]
)
def test_every_layout_fits_its_gpus_and_keeps_the_published_batch(stage: str) -> None:
    nanotron = layout_of(stage)
    assert memory(nanotron, fast=False).total < GPU_BYTES
    batch_tokens = nanotron.windows_a_step * nanotron.tokens.sequence_length
    assert batch_tokens == 2_359_296
    before = published(stage).recipe.nanotron.parallelism
    assert nanotron.parallelism.world_size == before.world_size


def test_without_recomputation_32k_would_not_fit() -> None:
    assert memory(layout_of("longctx-32k", recompute_layer=False), fast=False).total > GPU_BYTES


def test_weights_are_the_models_own_count() -> None:
    assert weights(layout_of("pretrain-stage1", tp=1, dp=384)) == 3_075_098_624


def test_parts_shrink_as_the_layout_says() -> None:
    def of(**layout: int) -> Memory:
        return memory(layout_of("longctx-64k", **{"tp": 1, "pp": 1, **layout}), fast=False)

    one, tp = of(), of(tp=4)
    assert tp.logits_and_loss == pytest.approx(one.logits_and_loss / 4, rel=0.03)
    assert tp.layer_inputs == one.layer_inputs / 4


def test_total_is_the_sum_of_the_parts() -> None:
    one = Memory(1, 2, 4, 8, 16, 32, 64, 128, 256)
    assert (one.total, one.allocated) == (511, 127)
