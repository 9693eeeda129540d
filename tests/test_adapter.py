"""Every key of a recipe's `nanotron:` section is understood, moved or dropped out loud."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from ground.errors import UserError
from launch.recipe.book import load_recipe
from nanotron_ext.adapter import CHANGED, DROPPED, MOVED, lower
from nanotron_ext.config import SmolLM3Config

STAGES = ["pretrain-stage1", "pretrain-stage2", "pretrain-stage3"]
CHECKPOINTS = Path("checkpoints")


def section(**changes: Any) -> dict[str, Any]:
    """Stage 1's section; a change is named by its key, with __ for the dots."""
    values: dict[str, Any] = dataclasses.asdict(load_recipe("pretrain-stage1").recipe.nanotron)
    for key, value in changes.items():
        *path, name = key.split("__")
        target = values
        for part in path:
            target = target[part]
        target[name] = value
    return values


def ledger() -> str:
    return (ROOT / "docs" / "LEDGER.md").read_text().split("## nanotron keys")[1]


def keys_of(values: dict[str, Any], prefix: str = "") -> set[str]:
    found = set()
    for name, value in values.items():
        found.add(prefix + name)
        if isinstance(value, dict):
            found |= keys_of(value, f"{prefix}{name}.")
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_every_published_key_lowers_to_a_config_that_nanotron_accepts(
    stage: str, tmp_path: Path
) -> None:
    import yaml

    from nanotron_ext import compat

    compat.activate()
    from nanotron.config import get_config_from_file

    config, _ = lower(dataclasses.asdict(load_recipe(stage).recipe.nanotron), CHECKPOINTS, None)
    (tmp_path / "nanotron.yaml").write_text(yaml.safe_dump(config))
    read = get_config_from_file(str(tmp_path / "nanotron.yaml"), model_config_class=SmolLM3Config)
    assert isinstance(read.model.model_config, SmolLM3Config)
    assert read.optimizer.learning_rate_scheduler.lr_decay_steps == 522_000
    # every value that is left arrives as it stands
    known = {field.name for field in dataclasses.fields(SmolLM3Config)}
    assert config["model"]["model_config"].keys() <= known
    for key, value in config["model"]["model_config"].items():
        assert getattr(read.model.model_config, key) == value


@pytest.mark.parametrize("stage", STAGES)
def test_each_key_that_does_not_arrive_as_it_stands_has_one_warning(stage: str) -> None:
    values = dataclasses.asdict(load_recipe(stage).recipe.nanotron)
    config, warnings = lower(values, CHECKPOINTS, None)
    before = {key for key in keys_of(values) if not _inside_another(key)}
    gone = before - keys_of(config)
    published_as_null = {key for key in gone if _value(values, key) is None}
    named = [re.match(r"nanotron\.([\w.]+):", warning) for warning in warnings]
    assert all(named) and len(set(warnings)) == len(warnings)
    keys = {match[1] for match in named if match}
    assert keys - set(CHANGED) == gone - published_as_null
    assert len(keys) == len(warnings)


def _inside_another(key: str) -> bool:
    """A key whose parent is dropped or moved as a whole has no warning of its own."""
    whole = ("optimizer.optimizer_factory.", "optimizer.gradient_spikes.", "metrics_logging.")
    whole += ("fast_step.",)
    return key.startswith((*whole, "data_stages."))


def _value(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


@pytest.mark.parametrize("key", [*DROPPED, *MOVED, *CHANGED])
def test_each_dropped_moved_or_changed_key_has_a_line_in_the_ledger(key: str) -> None:
    assert f"`{key}`" in ledger()


def test_the_ledger_names_no_key_that_lives() -> None:
    """The reverse: a row whose key is no longer touched is stale."""
    rows = [line for line in ledger().splitlines() if line.startswith("| `")]
    named = {key for row in rows for key in re.findall(r"`([\w.]+\.[\w.]+)`", row.split("|")[1])}
    by_runner = {"checkpoints.checkpoints_path", "checkpoints.resume_checkpoint_path"}
    by_name = {
        "model.model_config.is_qwen2_config",
        "model.model_config.max_position_embeddings",
    }
    assert named - by_runner - by_name <= {*DROPPED, *MOVED, *CHANGED}


# Written out, not read from DROPPED: what changes a computed value must not become droppable.
MODEL = "model.model_config."
REFUSED = {
    "checkpoints.save_final_state": True,
    MODEL + "_use_qkv_packed": True,
    MODEL + "attention_bias": False,
    MODEL + "flex_attention_mask": None,
    MODEL + "hidden_act": "silu",
    MODEL + "moe_config": None,
    MODEL + "rope_interleaved": False,
    MODEL + "sliding_window_size": None,
    "parallelism.context_parallel_size": 1,
    "parallelism.moe_layer_recompute": False,
}


@pytest.mark.parametrize(("key", "only"), REFUSED.items(), ids=REFUSED.keys())
def test_a_dropped_key_with_another_value_is_refused_with_its_remedy(key: str, only: Any) -> None:
    other = "unheard of"
    with pytest.raises(UserError) as error:
        lower(section(**{key.replace(".", "__"): other}), CHECKPOINTS, None)
    assert f"nanotron.{key}: {other!r}" in str(error.value)
    assert str(error.value).endswith(f"set it to {only!r}")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parallelism__tp": 8}, ["nanotron.parallelism.tp: 8", "num_key_value_heads 4", "lower"]),
        (
            {"model__dtype": "float32"},
            ["nanotron.optimizer.accumulate_grad_in_fp32: true", "float32", "set it to false"],
        ),
        (
            {"optimizer__optimizer_factory__name": "sgd"},
            ["nanotron.optimizer.optimizer_factory.name", "adamW"],
        ),
        (
            {"model__model_config__hidden_size": 2050},
            ["nanotron.model.model_config.hidden_size 2050", "multiple", "num_attention_heads 16"],
        ),
        (
            {
                "optimizer__gradient_spikes__skip_batch": True,
                "optimizer__optimizer_factory__torch_adam_is_fused": False,
            },
            ["nanotron.optimizer.gradient_spikes.skip_batch: true", "torch_adam_is_fused to true"],
        ),
        (
            {"general__ignore_sanity_checks": False, "parallelism__dp": 2},
            ["nanotron.general.ignore_sanity_checks: false", "parallelism.dp 1", "set it to true"],
        ),
        ({"model__model_config__qk_norm": True}, ["nanotron.model", "qk_norm"]),
        (
            {"model__model_config__rope_scaling": {"rope_type": "linear"}},
            ["nanotron.model.model_config.rope_scaling.rope_type: 'linear'", "yarn"],
        ),
    ],
)
def test_an_impossible_value_is_refused_before_any_process_starts(
    changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        lower(section(**changes), CHECKPOINTS, None)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(("enabled", "coefficient"), [(False, 0.0), (True, 1e-5)])
def test_the_z_loss_has_weight_only_where_it_is_enabled(enabled: bool, coefficient: float) -> None:
    values = section(model__model_config__z_loss_enabled=enabled)
    config, _ = lower(values, CHECKPOINTS, None)
    assert config["model"]["model_config"]["z_loss_coefficient"] == coefficient


def test_the_recipe_itself_is_left_as_it_was() -> None:
    values = section()
    lower(values, CHECKPOINTS, Path("resume"))
    assert values == section()
