"""The recipes say what was published: every number here stands in tests/published.yaml, transcribed."""

from pathlib import Path

import pytest
import yaml

from launch.recipe import load_recipe

ROOT = Path(__file__).parent.parent
PUBLISHED = yaml.safe_load((Path(__file__).parent / "published.yaml").read_text())
SOURCES = yaml.safe_load((ROOT / "recipes/sources.yaml").read_text())["sources"]
PRETRAIN = ["pretrain-stage1", "pretrain-stage2", "pretrain-stage3"]
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
    "text_field",
    "category",
    "language",
    "stand_in",
}
OPTIONAL_KEYS = {"substitute", "data_files", "max_tokens", "share"}


def published_numbers(stage: str) -> dict:
    """Long context keeps every number of pretraining that it does not change."""
    return PUBLISHED["pretrain"] | PUBLISHED["longctx"].get(stage, {})


def canonical(name: str) -> str:
    return SOURCES[name].get("same_as", name)


def rows() -> dict[str, dict]:
    return {name: row for name, row in SOURCES.items() if "same_as" not in row}


def standins() -> dict[str, dict]:
    return yaml.safe_load((ROOT / "recipes/standins.yaml").read_text())["standins"]


@pytest.mark.parametrize("stage", STAGES)
def test_mixture_is_the_published_one(stage):
    recipe = load_recipe(stage)
    assert recipe.stage == stage
    assert dict(recipe.mixture) == PUBLISHED["mixtures"][stage]


@pytest.mark.parametrize("stage", STAGES)
def test_number_and_sum_of_weights(stage):
    mixture = load_recipe(stage).mixture
    assert len(mixture) == PUBLISHED["counts"][stage]
    assert sum(mixture.values()) == pytest.approx(PUBLISHED["sums"][stage], abs=1e-9)
    assert all(weight > 0 for weight in mixture.values())


@pytest.mark.parametrize("stage", PRETRAIN)
def test_train_steps_are_cumulative(stage):
    tokens = load_recipe(stage).nanotron["tokens"]
    assert tokens["train_steps"] == PUBLISHED["pretrain"]["train_steps"][stage]


@pytest.mark.parametrize("stage", STAGES)
def test_schedule_and_optimizer(stage):
    published, optimizer = published_numbers(stage), load_recipe(stage).nanotron["optimizer"]
    assert optimizer["learning_rate_scheduler"] == {
        "learning_rate": published["learning_rate"],
        "lr_warmup_steps": published["lr_warmup_steps"],
        "lr_warmup_style": published["lr_warmup_style"],
        "lr_decay_starting_step": published["lr_decay_starting_step"],
        "lr_decay_steps": published["lr_decay_steps"],
        "lr_decay_style": published["lr_decay_style"],
        "min_decay_lr": published["final_learning_rate"],
    }
    assert optimizer["optimizer_factory"] == {
        "name": "adamW",
        "adam_beta1": published["adam_beta1"],
        "adam_beta2": published["adam_beta2"],
        "adam_eps": published["adam_eps"],
        "torch_adam_is_fused": published["adam_fused"],
    }
    assert optimizer["weight_decay"] == published["weight_decay"]
    assert optimizer["weight_decay_exclude_named_params"] == published["weight_decay_excluded"]
    assert optimizer["clip_grad"] == published["gradient_clip"]
    assert optimizer["accumulate_grad_in_fp32"] is published["gradient_accumulation_in_fp32"]
    assert optimizer["zero_stage"] == published["zero_stage"]


@pytest.mark.parametrize("stage", STAGES)
def test_layout_and_batch(stage):
    published, nanotron = published_numbers(stage), load_recipe(stage).nanotron
    layout, tokens = nanotron["parallelism"], nanotron["tokens"]
    for ours, theirs in {
        "dp": "dp",
        "tp": "tp",
        "pp": "pp",
        "context_parallel_size": "cp",
        "expert_parallel_size": "ep",
        "tp_mode": "tp_mode",
        "tp_linear_async_communication": "tp_async_communication",
        "tp_recompute_allgather": "tp_recompute_allgather",
        "recompute_layer": "recompute_layer",
    }.items():
        assert layout[ours] == published[theirs], ours
    if stage in PRETRAIN:
        gpus = layout["dp"] * layout["tp"] * layout["pp"] * layout["context_parallel_size"]
        assert gpus == published["gpus"]
    assert tokens["micro_batch_size"] == published["micro_batch_size"]
    assert tokens["batch_accumulation_per_replica"] == published["gradient_accumulation"]
    assert tokens["sequence_length"] == published["sequence_length"]
    assert global_batch_tokens(nanotron) == published["global_batch_tokens"]


def global_batch_tokens(nanotron: dict) -> int:
    tokens = nanotron["tokens"]
    sequences = tokens["micro_batch_size"] * tokens["batch_accumulation_per_replica"]
    return nanotron["parallelism"]["dp"] * sequences * tokens["sequence_length"]


@pytest.mark.parametrize("stage", STAGES)
def test_model(stage):
    published, model = published_numbers(stage), load_recipe(stage).nanotron["model"]
    changed = {"max_position_embeddings": published["sequence_length"]}
    if stage in LONG_CONTEXT:
        changed["rope_theta"] = published["rope_theta"]
    for key, value in (PUBLISHED["model"] | changed).items():
        assert model["model_config"][key] == value, key
    assert model["init_method"] == {"std": published["init_std"]}
    assert model["dtype"] == published["dtype"]
    assert model["ddp_bucket_cap_mb"] == published["ddp_bucket_mb"]


@pytest.mark.parametrize("stage", STAGES)
def test_seeds_checkpoints_tokenizer(stage):
    published, nanotron = published_numbers(stage), load_recipe(stage).nanotron
    assert nanotron["general"]["seed"] == published["seed"]
    (data_stage,) = nanotron["data_stages"]
    assert data_stage["data"]["seed"] == published["data_seed"]
    assert data_stage["data"]["num_loading_workers"] == published["data_workers"]
    assert nanotron["checkpoints"]["checkpoint_interval"] == published["checkpoint_interval"]
    assert nanotron["tokenizer"]["tokenizer_name_or_path"] == published["tokenizer"]
    assert nanotron["tokenizer"]["tokenizer_max_length"] == published["sequence_length"]


@pytest.mark.parametrize("stage", LONG_CONTEXT)
def test_long_context_numbers(stage):
    published, nanotron = PUBLISHED["longctx"][stage], load_recipe(stage).nanotron
    schedule = nanotron["optimizer"]["learning_rate_scheduler"]
    layout, tokens = nanotron["parallelism"], nanotron["tokens"]
    config = nanotron["model"]["model_config"]
    assert {
        "train_steps": tokens["train_steps"],
        "sequence_length": tokens["sequence_length"],
        "rope_theta": config["rope_theta"],
        "learning_rate": schedule["learning_rate"],
        "lr_warmup_steps": schedule["lr_warmup_steps"],
        "lr_decay_starting_step": schedule["lr_decay_starting_step"],
        "lr_decay_steps": schedule["lr_decay_steps"],
        "lr_decay_style": schedule["lr_decay_style"],
        "final_learning_rate": schedule["min_decay_lr"],
        "dp": layout["dp"],
        "tp": layout["tp"],
        "cp": layout["context_parallel_size"],
        "pp": layout["pp"],
        "micro_batch_size": tokens["micro_batch_size"],
        "gradient_accumulation": tokens["batch_accumulation_per_replica"],
        "global_batch_tokens": global_batch_tokens(nanotron),
        "recompute_layer": layout["recompute_layer"],
        "weight_decay": nanotron["optimizer"]["weight_decay"],
        "checkpoint_interval": nanotron["checkpoints"]["checkpoint_interval"],
    } == published


@pytest.mark.parametrize("stage", LONG_CONTEXT)
def test_long_context_starts_afresh(stage):
    nanotron = load_recipe(stage).nanotron
    schedule = nanotron["optimizer"]["learning_rate_scheduler"]
    assert nanotron["checkpoints"]["load_optimizer"] is False
    assert nanotron["checkpoints"]["load_lr_scheduler"] is False
    assert schedule["lr_decay_starting_step"] == schedule["lr_warmup_steps"]
    end = schedule["lr_decay_starting_step"] + schedule["lr_decay_steps"]
    assert end == nanotron["tokens"]["train_steps"]


@pytest.mark.parametrize("stage", STAGES)
def test_attention_is_the_released_configs(stage):
    config = load_recipe(stage).nanotron["model"]["model_config"]
    released = (
        ("llama3_ring_attention", 1) if stage in LONG_CONTEXT else ("flash_attention_2", None)
    )
    assert (config["_attn_implementation"], config["ring_attn_heads_k_stride"]) == released


def test_sources_hold_the_115_published_names_and_no_other():
    names = {name for mixture in PUBLISHED["mixtures"].values() for name in mixture}
    assert len(names) == 115
    assert set(SOURCES) == names


def test_source_rows_are_complete():
    for name, row in rows().items():
        assert ROW_KEYS <= set(row) <= ROW_KEYS | OPTIONAL_KEYS, name
        assert row["category"] in CATEGORIES, name
        assert isinstance(row["gated"], bool), name
        assert row["text_field"] and row["licence"] and row["language"], name
        assert (row["hub_id"] is None) == ("substitute" in row), name


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
