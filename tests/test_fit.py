"""A recipe laid out on the GPUs at hand: what fits, or why nothing does; the same tokens a step."""

import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product

import numpy as np
import pytest
from conftest import ROOT

from benchmarks.fit import SHAPES
from ground.errors import UserError
from launch.machine.fit import CUTS, fit, unfitted
from launch.machine.gpus import Gpus
from launch.machine.memory import layers_of_ranks, memory
from launch.recipe.book import load_recipe
from launch.recipe.pretrain import Nanotron
from launch.recipe.scale import load_scale, scale

STAGES = ("pretrain-stage1", "pretrain-stage3", "longctx-32k", "longctx-64k")
CAPS = (8, 12, 16, 24, 40, 80)
COUNTS = (1, 2, 4, 8)


def recipe(stage: str, shape: str = "3B", windows: int = 0) -> Nanotron:
    """A stage's recipe at a shape, in one process; `windows` a step, or the published ones."""
    published = unfitted(scale(load_recipe(stage), load_scale("full")).nanotron)
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    sizes = replace(published.model.model_config, **vars(SHAPES[shape]), **ids)
    each = windows or published.windows_a_step
    tokens = replace(published.tokens, batch_accumulation_per_replica=each)
    model = replace(published.model, model_config=sizes)
    return replace(published, model=model, tokens=tokens)


def on_gpus() -> Iterator[tuple[str, str]]:
    """(scale, stage) of every scale for GPUs."""
    for file in sorted((ROOT / "recipes/scales").glob("*.yaml")):
        if load_scale(file.stem).values.device == "gpu":
            yield from ((file.stem, stage) for stage in STAGES)


@pytest.mark.parametrize(("name", "stage"), on_gpus())
def test_every_scale_has_a_layout_that_fits_or_a_reason(name: str, stage: str) -> None:
    _check_table(unfitted(scale(load_recipe(stage), load_scale(name)).nanotron))


@pytest.mark.parametrize(("stage", "shape"), product(STAGES, SHAPES))
def test_every_shape_has_a_layout_that_fits_or_a_reason(stage: str, shape: str) -> None:
    _check_table(recipe(stage, shape))


def _check_table(whole: Nanotron) -> None:
    """Every size and number of GPUs, at the same windows a step."""
    for gigabytes, count in product(CAPS, COUNTS):
        gpus = Gpus(count, gigabytes)
        try:
            laid_out = fit(whole, gpus)
        except UserError as error:
            _check_reason(whole, gpus, str(error))
            continue
        assert laid_out.parallelism.world_size == count
        assert laid_out.windows_a_step == whole.windows_a_step
        assert memory(laid_out).total <= gigabytes * 2**30
        assert unfitted(laid_out) == whole


def _check_reason(whole: Nanotron, gpus: Gpus, reason: str) -> None:
    """What the message says would do, does; less memory than it says is needed, does not."""
    least = re.search(r"the leanest layout takes ([\d.]+) GiB", reason)
    assert least and float(least[1]) > gpus.gibibytes
    remedies = re.findall(r"(GPUS|GPU_GB)=(\d+)", reason)
    assert remedies
    for variable, value in remedies:
        key = {"GPUS": "count", "GPU_GB": "gibibytes"}[variable]
        fit(whole, replace(gpus, **{key: int(value)}))


@pytest.mark.parametrize(("gpus", "expected"), [
    # one H100: as the prototype ran
    (Gpus(1, 80), {"dp": 1, "micro_batch_size": 1, "recompute_layer": False, "zero_stage": 0}),
    (Gpus(8, 40), {"dp": 8, "recompute_layer": False, "zero_stage": 1}),
    (Gpus(4, 40), {"dp": 4, "micro_batch_size": 6, "recompute_layer": True, "zero_stage": 1}),
    (Gpus(2, 40), {"dp": 1, "tp": 2, "recompute_layer": False, "zero_stage": 0}),
])  # fmt: skip
def test_the_3b_is_laid_out_in_the_order_of_preference(
    gpus: Gpus, expected: dict[str, int]
) -> None:
    laid_out = fit(recipe("pretrain-stage1"), gpus)
    keys = {**asdict(laid_out.parallelism), **asdict(laid_out.tokens), **asdict(laid_out.optimizer)}
    assert {key: keys[key] for key in expected} == expected


def test_pipeline_ranks_come_where_tensor_parallel_ones_do_not_suffice() -> None:
    sizes = fit(recipe("longctx-32k"), Gpus(8, 12)).parallelism
    assert (sizes.dp, sizes.tp, sizes.pp) == (1, 4, 2)


def test_logits_are_computed_in_pieces_where_they_do_not_fit_whole() -> None:
    whole = recipe("longctx-64k", "135M")  # 6.4 GB of logits a window
    bounds = {n: fit(whole, Gpus(1, n)).fast_step.whole_logits_gib for n in (8, 80)}
    assert bounds == {8: 0, 80: whole.fast_step.whole_logits_gib}


def test_a_small_model_gets_the_largest_micro_batch_that_is_of_use() -> None:
    laid_out = fit(recipe("pretrain-stage1", "135M"), Gpus(1, 80))
    assert laid_out.tokens.micro_batch_size * 4096 == 32_768
    tighter = fit(recipe("pretrain-stage1", "135M"), Gpus(1, 12))
    assert 1 < tighter.tokens.micro_batch_size < 8
    assert not tighter.parallelism.recompute_layer


@pytest.mark.parametrize(
    ("windows", "count", "near"),
    [
        (128, 3, "1, 2, 4, ... 128"),
        (6, 5, "1, 2, 3, 6"),
        (4, 8, "1, 2, 4"),
        (576, 7, "1, 2, 3, ... 6, 8, ... 576"),
    ],
)
def test_gpus_that_do_not_divide_the_batch_are_refused(windows: int, count: int, near: str) -> None:
    with pytest.raises(UserError) as caught:
        fit(recipe("pretrain-stage1", "135M", windows), Gpus(count, 80))
    assert str(caught.value) == (
        f"{count} GPUs do not divide the {windows} windows of a step; set GPUS= to {near}"
    )


def test_the_plain_step_needs_more() -> None:
    whole, gpus = recipe("pretrain-stage1", "360M"), Gpus(1, 24)
    sizes = [fit(whole, gpus, fast).tokens.micro_batch_size for fast in (True, False)]
    assert sizes[0] > sizes[1]


@pytest.mark.parametrize(("shape", "pp"), product(SHAPES, CUTS))
def test_layers_are_spread_as_nanotron_spreads_them(shape: str, pp: int) -> None:
    """Its own loop over blocks, with the model's own costs (nanotron.models.base.build_model)."""
    from types import SimpleNamespace

    from nanotron_ext.config import SIZES, SmolLM3Config
    from nanotron_ext.linear import ColumnLinear
    from nanotron_ext.model import DecoderLayer, SmolLM3ForTraining

    whole = recipe("pretrain-stage1", shape)
    nanotron = replace(whole, parallelism=replace(whole.parallelism, pp=pp))
    config = SmolLM3Config(**{key: getattr(nanotron.model.model_config, key) for key in SIZES})
    costs = SmolLM3ForTraining.get_block_compute_costs(SimpleNamespace(config=config))
    blocks = [0, *[costs[DecoderLayer]] * config.num_hidden_layers, 0]
    blocks += [costs[ColumnLinear], 0]
    sums, ranks, rank = np.cumsum(blocks), list[int](), 0
    for total in sums:
        ranks.append(rank)
        rank += total > sums[-1] * ((rank + 1) / pp)
    layers = ranks[1 : config.num_hidden_layers + 1]
    assert layers_of_ranks(nanotron) == [layers.count(one) for one in range(pp)]
    assert sum(layers_of_ranks(nanotron)) == config.num_hidden_layers
