"""From a recipe's `nanotron:` section to the config of the installed nanotron 0.4.

Recipes keep the published keys of the branch that trained SmolLM3; some are unknown to 0.4,
or implemented wrongly. Each key that is dropped, moved or changed here gives one warning and has
one line in docs/LEDGER.md. A value that the plugin cannot honour is refused, never dropped.
"""

import copy
from pathlib import Path
from typing import Any

from ground.errors import UserError
from nanotron_ext.config import SmolLM3Config

BY_PLUGIN = "the plugin always does it so"
BY_RUNNER = "the stage runner does it"

# key: (the only value that may be dropped, or ... for any; why dropping is harmless)
DROPPED: dict[str, tuple[Any, str]] = {
    "checkpoints.load_lr_scheduler": (..., BY_RUNNER),
    "checkpoints.load_optimizer": (..., BY_RUNNER),
    "checkpoints.save_final_state": (True, BY_RUNNER),
    "data_stages": (..., "the mixture changes outside nanotron; its seed is handed to the loader"),
    "metrics_logging": (..., "metrics.jsonl has every step"),
    "model.model_config._attn_implementation": (..., "the kernel is chosen at run time"),
    "model.model_config._fused_rms_norm": (..., "no fused kernel; equal in value"),
    "model.model_config._fused_rotary_emb": (..., "no fused kernel; equal in value"),
    "model.model_config._use_qkv_packed": (True, BY_PLUGIN),
    "model.model_config.attention_bias": (False, BY_PLUGIN),
    "model.model_config.flex_attention_mask": (None, BY_PLUGIN),
    "model.model_config.hidden_act": ("silu", BY_PLUGIN),
    "model.model_config.initializer_range": (..., "model.init_method.std is what counts"),
    "model.model_config.moe_config": (None, BY_PLUGIN),
    "model.model_config.pretraining_tp": (..., "parallelism.tp is what counts"),
    "model.model_config.ring_attn_heads_k_stride": (..., "0.4 has no ring attention"),
    "model.model_config.rope_interleaved": (False, BY_PLUGIN),
    "model.model_config.sliding_window_size": (None, BY_PLUGIN),
    "model.model_config.use_cache": (..., "training has no cache"),
    "parallelism.context_parallel_size": (1, "0.4 has no context parallelism"),
    "parallelism.moe_layer_recompute": (False, "no experts"),
    "parallelism.tp_recompute_allgather": (..., "0.4 keeps the gathered input: more memory"),
}
MOVED = {
    "fast_step": "the plugin's fast step",
    "model.model_config._use_doc_masking": "model.model_config.use_doc_masking",
    "model.model_config.z_loss_enabled": "model.model_config.z_loss_coefficient, 0 where false",
    "optimizer.gradient_spikes": "the plugin's spike detection",
    "optimizer.optimizer_factory": "optimizer, its fields one level up",
    "optimizer.weight_decay_exclude_named_params": "the plugin's optimizer groups",
    "parallelism.recompute_layer": "model.model_config.recompute_layer",
    "tokens.loss_mean_over": "model.model_config.loss_mean_over",
}
# key: (the value that 0.4 gets in place of any other; why)
CHANGED: dict[str, tuple[Any, str]] = {
    "checkpoints.checkpoints_path_is_shared_file_system": (
        True,
        "the stage runner reads the run folder on the first node, so all nodes share it",
    ),
    "parallelism.tp_linear_async_communication": (
        False,
        "0.4's gradients are wrong with it (5e-2)",
    ),
}


def lower(
    section: dict[str, Any],
    checkpoints_path: Path,
    resume_checkpoint_path: Path | None,
    weights_path: Path | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """nanotron 0.4's config for a recipe section, and one warning per key dropped or changed.

    `weights_path` is the checkpoint that gives a fresh run its weights instead of random ones.
    """
    config = copy.deepcopy(section)
    warnings = [*_drop(config), *_move(config), *_change(config)]
    _refuse_impossible(config)
    if weights_path:
        config["model"]["init_method"] = {"path": str(weights_path)}
    config["checkpoints"]["checkpoints_path"] = str(checkpoints_path)
    config["checkpoints"]["resume_checkpoint_path"] = (
        str(resume_checkpoint_path) if resume_checkpoint_path else None
    )
    return config, warnings


def _drop(config: dict[str, Any]) -> list[str]:
    warnings = []
    for key, (only, why) in DROPPED.items():
        parent, name = _parent(config, key)
        if name not in parent:
            continue
        value = parent.pop(name)
        if only is not ... and value != only:
            raise UserError(
                f"nanotron.{key}: {value!r} cannot be had on the installed nanotron 0.4 ({why}); "
                f"set it to {only!r}"
            )
        if value is not None:
            warnings.append(f"nanotron.{key}: {value!r} dropped: {why}")
    return warnings


def _move(config: dict[str, Any]) -> list[str]:
    del config["fast_step"]
    optimizer, model_config = config["optimizer"], config["model"]["model_config"]
    factory = optimizer.pop("optimizer_factory")
    if factory.pop("name") != "adamW":
        raise UserError("nanotron.optimizer.optimizer_factory.name: 0.4 has adamW alone")
    optimizer |= factory
    del optimizer["weight_decay_exclude_named_params"]
    if optimizer.pop("gradient_spikes")["skip_batch"] and not optimizer["torch_adam_is_fused"]:
        raise UserError(
            "nanotron.optimizer.gradient_spikes.skip_batch: true needs the fused AdamW; set "
            "optimizer_factory.torch_adam_is_fused to true"
        )
    model_config["use_doc_masking"] = model_config.pop("_use_doc_masking")
    if not model_config.pop("z_loss_enabled"):
        model_config["z_loss_coefficient"] = 0.0
    model_config["recompute_layer"] = config["parallelism"].pop("recompute_layer")
    model_config["loss_mean_over"] = config["tokens"].pop("loss_mean_over")
    return [f"nanotron.{key}: moved to {target}" for key, target in MOVED.items()]


def _change(config: dict[str, Any]) -> list[str]:
    warnings = []
    for key, (value, why) in CHANGED.items():
        parent, name = _parent(config, key)
        if parent[name] != value:
            parent[name] = value
            warnings.append(f"nanotron.{key}: changed to {value!r}: {why}")
    return warnings


def _parent(config: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    *path, name = key.split(".")
    for part in path:
        config = config[part]
    return config, name


def _refuse_impossible(config: dict[str, Any]) -> None:
    """Refuse what would otherwise fail minutes later, on every rank, as a traceback."""
    model_config, parallelism = config["model"]["model_config"], config["parallelism"]
    try:
        model = SmolLM3Config(**model_config)
    except (TypeError, ValueError) as error:
        raise UserError(f"nanotron.model.{error}") from error
    if model.num_key_value_heads % parallelism["tp"]:
        raise UserError(
            f"nanotron.parallelism.tp: {parallelism['tp']} does not divide "
            f"model_config.num_key_value_heads {model.num_key_value_heads}; lower tp"
        )
    if parallelism["dp"] > 1 and not config["general"].get("ignore_sanity_checks", True):
        raise UserError(
            "nanotron.general.ignore_sanity_checks: false is for parallelism.dp 1: nanotron's "
            "checks demand tensors of one shape on all data-parallel ranks, and the number of "
            "documents differs; set it to true"
        )
    if config["model"]["dtype"] == "float32" and config["optimizer"]["accumulate_grad_in_fp32"]:
        raise UserError(
            "nanotron.optimizer.accumulate_grad_in_fp32: true is refused by nanotron 0.4 with "
            "model.dtype float32; set it to false"
        )
