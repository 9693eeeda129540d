"""What a layout needs of a GPU: the figures that the long-context recipes quote, and their sense."""

import re
from dataclasses import replace

import pytest

from launch.machine.memory import memory_bytes
from launch.recipe.book import Loaded, load_recipe
from launch.recipe.pretrain import Nanotron, PretrainRecipe
from launch.recipe.scale import load_scale, scale

GPU_BYTES = 80e9


def published(stage: str) -> Loaded[PretrainRecipe]:
    return load_recipe(stage)


def layout_of(stage: str, **parallelism: int) -> Nanotron:
    nanotron = scale(published(stage), load_scale("full")).nanotron
    return replace(nanotron, parallelism=replace(nanotron.parallelism, **parallelism))


def gigabytes(nanotron: Nanotron) -> float:
    return sum(memory_bytes(nanotron).values()) / 1e9


@pytest.mark.parametrize("stage", ["longctx-32k", "longctx-64k"])
def test_the_recipe_quotes_what_is_computed(stage: str) -> None:
    text = published(stage).file.read_text()
    quoted = re.search(r"It takes\s(?:# )?(\d+) of a GPU's 80 GB", text.replace("\n# ", " "))
    assert quoted and int(quoted[1]) == round(gigabytes(layout_of(stage)))


@pytest.mark.parametrize(
    "stage", ["pretrain-stage1", "pretrain-stage3", "longctx-32k", "longctx-64k"]
)
def test_every_layout_fits_its_gpus_and_keeps_the_published_batch(stage: str) -> None:
    nanotron = layout_of(stage)
    assert sum(memory_bytes(nanotron).values()) < GPU_BYTES
    batch_tokens = nanotron.windows_a_step * nanotron.tokens.sequence_length
    assert batch_tokens == 2_359_296
    before = published(stage).recipe.nanotron.parallelism
    assert nanotron.parallelism.world_size == before.world_size


def test_without_recomputation_32k_would_not_fit() -> None:
    assert sum(memory_bytes(layout_of("longctx-32k", recompute_layer=False)).values()) > GPU_BYTES


def test_weights_are_the_models_own_count() -> None:
    """3,075,098,624 published, of which 149,504 are the norms that no rank shares."""
    whole = memory_bytes(layout_of("pretrain-stage1", tp=1, dp=384))
    assert whole["weights, gradients and optimizer"] / 20 == 3_075_098_624 - 149_504


def test_parts_shrink_as_the_layout_says() -> None:
    one, tp, pp = (
        memory_bytes(layout_of("longctx-64k", tp=tp, pp=pp)) for tp, pp in ((1, 1), (4, 1), (1, 2))
    )
    assert tp["logits and loss"] == one["logits and loss"] / 4 == pp["logits and loss"] / 4
    assert tp["inputs of the layers"] == one["inputs of the layers"] / 4
    # half the layers, but two micro-batches in flight
    assert pp["inputs of the layers"] == one["inputs of the layers"]
    assert pp["weights, gradients and optimizer"] < one["weights, gradients and optimizer"]
