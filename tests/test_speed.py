"""The roofline gives back the rows that it was calibrated by, and moves as a step's time must."""

from dataclasses import replace

import pytest

from launch.machine.cards import card, load_cards
from launch.machine.speed import (
    COMPILED,
    FAST,
    FAST_FLASH_4,
    PLAIN,
    WEIGHT_GRADIENTS,
    Code,
    Speed,
    Work,
    code_of,
    speed,
    work_of,
)
from launch.recipe.book import load_recipe
from launch.recipe.pretrain import ModelConfig

H100 = card("h100-sxm")
TOLERANCE = 0.09


def model(hidden: int, inner: int, layers: int, heads: int, kv: int, vocab: int) -> ModelConfig:
    published: ModelConfig = load_recipe("pretrain-stage1").recipe.nanotron.model.model_config
    return replace(
        published,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocab,
        bos_token_id=None,
        eos_token_id=0,
    )


M_135 = model(576, 1536, 30, 9, 3, 49152)
M_360 = model(960, 2560, 32, 15, 5, 49152)
B_1 = model(1792, 6144, 24, 14, 2, 49152)
B_3 = model(2048, 11008, 36, 16, 4, 128256)
# A prototype on one H100: the step (model, window, windows a micro-batch, micro-batches), how it is
# computed, tokens/s.
MEASURED = [
    (Work(B_3, 4096, 1, 4), PLAIN, 16_717),
    (Work(B_3, 4096, 1, 4), COMPILED, 22_448),
    (Work(B_3, 4096, 1, 4), WEIGHT_GRADIENTS, 22_950),
    (Work(B_3, 4096, 1, 16), WEIGHT_GRADIENTS, 24_437),
    (Work(B_3, 6144, 1, 2), WEIGHT_GRADIENTS, 22_968),
    (Work(B_3, 4096, 1, 4), FAST, 23_866),
    (Work(B_3, 4096, 1, 16), FAST, 25_849),
    (Work(B_3, 6144, 1, 10), FAST, 25_767),
    (Work(B_3, 4096, 1, 16), FAST_FLASH_4, 26_770),
    (Work(B_3, 6144, 1, 10), FAST_FLASH_4, 27_079),
    (Work(B_3, 32768, 1, 2, recompute=True), COMPILED, 18_734),
    (Work(M_135, 2048, 16, 1), PLAIN, 139_215),
    (Work(M_135, 2048, 16, 1), COMPILED, 275_538),
    (Work(M_135, 2048, 32, 1), FAST, 316_117),
    (Work(M_360, 2048, 16, 1), PLAIN, 82_198),
    (Work(M_360, 2048, 16, 1), COMPILED, 152_130),
    (Work(B_1, 4096, 4, 1), PLAIN, 47_184),
    (Work(B_1, 4096, 4, 1), COMPILED, 70_362),
    # transformers' model in a plain loop, as post-training runs it
    (Work(B_3, 4096, 1, 4, recompute=True), PLAIN, 12_458),
]


def predicted(row: tuple[Work, Code, int]) -> Speed:
    return speed(row[0], H100, row[1])


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row[0].model.hidden_size}-{row[-1]}")
def test_a_measured_row_is_predicted(row: tuple[Work, Code, int]) -> None:
    assert predicted(row).tokens_per_second == pytest.approx(row[-1], rel=TOLERANCE)


def test_the_mean_error_is_what_the_docstring_says() -> None:
    errors = [abs(predicted(row).tokens_per_second / row[-1] - 1) for row in MEASURED]
    assert sum(errors) / len(errors) < 0.03


def test_the_kernels_of_a_step_of_the_3b() -> None:
    """Of 641 ms: 400 in matrix products, 79 in attention, 114 moving memory, 66 in the optimizer."""
    step = predicted(MEASURED[5])
    assert step.matmul == pytest.approx(0.400, rel=0.05)
    assert step.attention == pytest.approx(0.079, rel=0.25)
    assert step.optimizer == pytest.approx(0.066, rel=0.05)


def test_flops_are_the_published_count() -> None:
    """GFLOP a token of the 3B: 18.89 with 500 attended keys on the mean, 20.26 with 2,048."""
    work = work_of(load_recipe("pretrain-stage1").recipe.nanotron)
    assert work.weights == 3_074_949_120
    assert work.flops_per_token == pytest.approx(18.89e9, rel=1e-3)
    causal = replace(work, model=replace(work.model, _use_doc_masking=False))
    assert causal.flops_per_token == pytest.approx(20.26e9, rel=1e-3)


def test_the_published_run() -> None:
    """384 H100, tp 2, dp 192, micro-batches of 3 windows: 24 days, restarts included."""
    work = work_of(load_recipe("pretrain-stage1").recipe.nanotron)
    assert work.gpus == 384 and work.tokens == 2_359_296
    days = 11.2e12 / speed(work, H100, PLAIN).tokens_per_second / 86400
    assert days == pytest.approx(24, rel=0.15)


STEP = Work(B_3, 4096, 1, 16)


def test_more_gpus_are_faster_but_not_for_nothing() -> None:
    one = speed(STEP, H100)
    for dp in (2, 4, 8, 16):
        more = speed(replace(STEP, dp=dp, accumulation=16 // dp), H100)
        assert more.work.tokens == one.work.tokens
        assert one.tokens_per_second < more.tokens_per_second <= dp * one.tokens_per_second


def test_what_costs_time_costs_time() -> None:
    plain = speed(STEP, H100, PLAIN).seconds
    assert speed(STEP, H100, FAST).seconds < plain
    assert speed(replace(STEP, recompute=True), H100).seconds > speed(STEP, H100).seconds
    half = replace(STEP, accumulation=8)
    tensor, data = replace(half, tp=2, accumulation=16), replace(half, dp=2)
    assert speed(tensor, H100).seconds > speed(data, H100).seconds
    assert speed(replace(STEP, pp=2), H100).pipeline > 0


def test_a_key_of_the_fast_step_is_followed() -> None:
    chosen = load_recipe("pretrain-stage1").recipe.nanotron.fast_step
    assert code_of(chosen) == FAST
    whole = speed(STEP, H100, code_of(chosen)).seconds
    for key in ("compile_layer", "in_place_loss", "plain_linears", "fused_weight_gradients"):
        assert speed(STEP, H100, code_of(replace(chosen, **{key: False}))).seconds > whole, key


def test_adapters_spare_the_gradients_of_weights() -> None:
    whole, adapters = speed(STEP, H100), speed(replace(STEP, frozen=True), H100)
    assert adapters.matmul == pytest.approx(whole.matmul * 2 / 3) and adapters.optimizer == 0


def test_a_card_without_a_network_of_its_own_is_slow_on_one() -> None:
    slow = replace(H100, network=10)
    wide = replace(STEP, dp=16, accumulation=1)
    assert speed(wide, slow).data_parallel > speed(wide, H100).data_parallel == 0


def test_no_prediction_is_above_a_cards_peak() -> None:
    for name, row in load_cards().items():
        for shape in (M_135, B_3):
            assert 0 < speed(replace(STEP, model=shape), row).mfu(row) < 0.75, name
