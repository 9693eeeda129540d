"""Memory of post-training: counts held to real layers, layouts at the same tokens a step."""

import re
from dataclasses import asdict, replace
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import edit
from posttrain_jobs import make_folder, write_start
from test_posttrain_training import log_probs, trainer_of
from torch.utils._python_dispatch import TorchDispatchMode

from ground.errors import UserError
from launch.machine.attention import DISTRIBUTIONS, usable_attention
from launch.machine.gpus import Gpus
from launch.machine.posttrain_memory import (
    REMEDY_LORA,
    Shape,
    fit_posttrain,
    global_batch,
    layer_bytes,
    posttrain_memory,
    unfitted,
)
from launch.recipe.book import load_recipe
from launch.recipe.posttrain import Lora, PosttrainRecipe
from launch.recipe.scale import load_scale, scale
from launch.walk import resolve

STAGES = ["midtrain", "sft", "apo"]
FLASH = "flash_attention_2"
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "vocab_size": 512,
}
SHAPE_3B = Shape(2048, 11008, 512, 16, 36, 128256, True)


def recipe_of(stage: str) -> PosttrainRecipe:
    recipe: PosttrainRecipe = scale(load_recipe(stage), load_scale("full"))
    return recipe


def kept_bytes(recipe: PosttrainRecipe, tokens: int = 512) -> float:
    """Bytes a token that autograd keeps of one real layer: activations, not weights or their casts."""
    from peft import get_peft_model
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    from posttrain.job import Lora as JobLora
    from posttrain.lora import lora_config

    autocast = recipe.world_size == 1 and recipe.trl.bf16
    bf16 = recipe.trl.bf16 and (recipe.lora or recipe.world_size > 1)
    more: dict[str, Any] = {"pad_token_id": None, "no_rope_layers": [1] * 4}
    model = SmolLM3ForCausalLM(SmolLM3Config(**SIZES, **more, attn_implementation="sdpa"))
    model = model.to(torch.bfloat16 if bf16 else torch.float32)
    if recipe.lora:
        config = lora_config(JobLora(**asdict(recipe.lora)))
        # As TRL does with ZeRO-3.
        get_peft_model(model, config, autocast_adapter_dtype=recipe.world_size == 1)
    layer, states = model.model.layers[0], torch.randn(1, tokens, 256, dtype=model.dtype)
    places = torch.arange(tokens)[None]
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tokens in tensor.shape:  # of a sequence; weights and their copies have other sizes
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        layer(
            states.requires_grad_(), position_ids=places,
            position_embeddings=model.model.rotary_emb(states, places),
        )  # fmt: skip
    return sum(one.untyped_storage().nbytes() for one in kept.values()) / tokens


@pytest.mark.parametrize(
    "lora", [None, Lora(rank=8, alpha=8), Lora(rank=8, alpha=8, targets=("q_proj", "v_proj"))]
)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("bf16", [True, False])
def test_a_layer_keeps_what_is_counted(lora: Lora | None, ranks: int, bf16: bool) -> None:
    recipe = recipe_of("sft")
    recipe = replace(recipe, lora=lora, world_size=ranks, trl=replace(recipe.trl, bf16=bf16))
    assert layer_bytes(Shape.of(SIZES), recipe) == pytest.approx(kept_bytes(recipe), rel=0.03)


def test_parameters_are_those_of_the_models() -> None:
    from peft import get_peft_model
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    from posttrain.job import Lora as JobLora
    from posttrain.lora import lora_config

    assert SHAPE_3B.parameters == 3_075_098_624
    with torch.device("meta"):
        model = SmolLM3ForCausalLM(SmolLM3Config(**SIZES, pad_token_id=None))
        assert Shape.of(SIZES).parameters == sum(one.numel() for one in model.parameters())
        adapted = get_peft_model(model, lora_config(JobLora(**asdict(REMEDY_LORA))))
    trained, _ = adapted.get_nb_trainable_parameters()
    assert Shape.of(SIZES).adapter_parameters(REMEDY_LORA) == trained


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("gibibytes", [8, 12, 16, 24, 40, 80])
def test_a_layout_keeps_the_step_or_one_line_says_what_would_fit(
    stage: str, count: int, gibibytes: int
) -> None:
    for lora in (None, REMEDY_LORA):
        recipe = replace(recipe_of(stage), lora=lora)
        gpus = Gpus(count, gibibytes)
        if not fits(recipe, gpus):
            line = refusal(recipe, gpus)
            assert "\n" not in line and "because the leanest layout takes" in line
            assert "would do" in line
            continue
        laid_out = fit_posttrain(recipe, SHAPE_3B, gpus, FLASH)
        assert global_batch(laid_out) == global_batch(recipe) and laid_out.world_size == count
        assert posttrain_memory(laid_out, SHAPE_3B, FLASH).total <= gibibytes * 2**30
        assert unfitted(laid_out) == unfitted(
            replace(recipe, trl=replace(recipe.trl, gradient_checkpointing=laid_out.trl.gradient_checkpointing))
        )  # fmt: skip


def fits(recipe: PosttrainRecipe, gpus: Gpus) -> bool:
    try:
        fit_posttrain(recipe, SHAPE_3B, gpus, FLASH)
    except UserError:
        return False
    return True


def refusal(recipe: PosttrainRecipe, gpus: Gpus, attention: str = FLASH) -> str:
    with pytest.raises(UserError) as error:
        fit_posttrain(recipe, SHAPE_3B, gpus, attention)
    return str(error.value)


def test_the_3b_on_one_card_of_80_gb() -> None:
    """All weights at 32k and at 24k pairs, not at 64k; every remedy that is named does fit."""
    card = Gpus(1, 80)
    for stage in ("midtrain", "apo"):
        fit_posttrain(recipe_of(stage), SHAPE_3B, card, FLASH)
    sft = recipe_of("sft")
    line = refusal(sft, card)
    assert (
        "LoRA (`lora: {rank: 16, alpha: 32}`) or trl.max_length: 32768 or GPUS=2 or GPU_GB=141"
        in line
    )
    fit_posttrain(replace(sft, lora=REMEDY_LORA), SHAPE_3B, card, FLASH)
    fit_posttrain(replace(sft, trl=replace(sft.trl, max_length=32768)), SHAPE_3B, card, FLASH)
    for other in (Gpus(2, 80), Gpus(1, 141)):
        fit_posttrain(sft, SHAPE_3B, other, FLASH)
    assert "with trl.max_length: 32768" in refusal(sft, Gpus(1, 24))


def test_a_dense_mask_is_counted() -> None:
    apo = recipe_of("apo")
    fit_posttrain(apo, SHAPE_3B, Gpus(1, 80), FLASH)
    assert "flash-attn installed" in refusal(apo, Gpus(1, 80), "sdpa")


def test_gpus_that_do_not_divide_the_step_are_refused() -> None:
    line = refusal(recipe_of("apo"), Gpus(5, 80))
    assert "5 GPUs do not divide the 32 pairs of a step; set GPUS= to 1, 2, 4, 8, ... 32" in line


# ---- a stage


@pytest.fixture
def fitted(recipes: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    edit(recipes / "scales/full.yaml", "device: gpu", "device: gpu\nlayout: fit")
    monkeypatch.setenv("GPU_GB", "80")
    return recipes


def stage_on(gpus: int, monkeypatch: pytest.MonkeyPatch, stage: str = "midtrain") -> Any:
    monkeypatch.setenv("GPUS", str(gpus))
    return resolve(stage, load_scale("full"))


def test_a_stage_is_laid_out_on_what_there_is(
    fitted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, eight = (stage_on(count, monkeypatch) for count in (1, 8))
    assert eight.world_size == 8 and eight.laid_out.trl.gradient_accumulation_steps == 16
    assert eight.identity == one.identity, "the same run on other GPUs"
    published = stage_on(8, monkeypatch).recipe.recipe
    assert published.world_size == 64


def test_a_stage_that_does_not_fit_is_refused_in_one_line(
    fitted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPU_GB", "24")
    for count, problem in ((1, "does not fit on 1 x 24 GiB"), (3, "do not divide the 128 windows")):
        with pytest.raises(
            UserError,
            match=rf"^SCALE=full GPUS={count} GPU_GB=24: sft.* {problem}.*full\.yaml: layout: fit",
        ) as error:
            stage_on(count, monkeypatch, "sft").refuse()
        assert "\n" not in str(error.value)


# ---- attention


def test_a_kernel_that_is_not_installed_gives_way_to_sdpa() -> None:
    if any(_is_there(name) for name in DISTRIBUTIONS.values()):
        pytest.skip("a flash kernel is installed here")
    assert usable_attention("flash_attention_2") == "sdpa"
    assert usable_attention("eager") == "eager"


def _is_there(distribution: str) -> bool:
    # Not by its module: nanotron's stand-in for flash_attn would be found.
    return any(distributions(name=distribution))


def test_an_installed_kernel_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "flash_attn-2.8.3.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert usable_attention("flash_attention_2") == "flash_attention_2"
    assert re.fullmatch("sdpa|flash_attention_4", usable_attention("flash_attention_3"))


# ---- Logits


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return result


WORDS = 30_000


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An APO stage of a model with a large vocabulary, its data prepared."""
    from transformers import AutoModelForCausalLM

    from posttrain.data import prepare_data

    root = tmp_path_factory.mktemp("pairs")
    start = write_start(root / "model")
    model = AutoModelForCausalLM.from_pretrained(start)
    model.resize_token_embeddings(WORDS, mean_resizing=False)
    model.save_pretrained(start)
    folder = make_folder(root / "apo", "apo", start, trl={"per_device_train_batch_size": 8})
    prepare_data(folder)
    return folder


def test_training_on_pairs_never_holds_the_logits_of_its_batch(pairs: Path) -> None:
    """At 24,576 tokens a sequence they would be 25 GB a pair in float32."""
    with Largest() as reference:
        trainer = trainer_of(pairs)
    batch = next(iter(trainer.get_train_dataloader()))
    trained = int(batch["completion_mask"].sum())
    with Largest() as policy:
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
    assert max(reference.elements, policy.elements) < trained * WORDS / 2
    found = {name: one.grad for name, one in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    chosen, rejected = log_probs(trainer.model, batch).chunk(2)
    r_w, r_l = chosen - batch["ref_chosen_logps"], rejected - batch["ref_rejected_logps"]
    with Largest() as whole:
        ((1 - torch.sigmoid(0.05 * r_w)) + torch.sigmoid(0.05 * r_l)).mean().backward()
    assert whole.elements >= trained * WORDS, "the measure sees logits where they are"
    for name, one in trainer.model.named_parameters():
        assert (found[name] - one.grad).norm() <= 1e-6 * one.grad.norm(), name


def test_scoring_pairs_holds_the_logits_of_a_few_tokens(
    pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import load_from_disk

    from posttrain import apo

    model = trainer_of(pairs).model
    rows = list(load_from_disk(str(pairs / "data")))[:16]
    whole = apo.completion_log_probs(model, rows, 0)
    longest = max(len(row["prompt_ids"] + row["rejected_ids"]) for row in rows)
    monkeypatch.setattr(apo, "TOKENS_OF_LOGITS", 32)
    monkeypatch.setattr(apo, "PAIR_TOKENS", 2 * 3 * longest)
    batches = list[int]()
    hook = model.model.register_forward_hook(
        lambda *found: batches.append(found[2][0].shape[:2].numel())
    )
    with Largest() as largest:
        found = apo.completion_log_probs(model, rows, 0)
    hook.remove()
    assert largest.elements == 32 * WORDS
    assert max(batches) <= 2 * 3 * longest and len(batches) < len(rows) / 2
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
