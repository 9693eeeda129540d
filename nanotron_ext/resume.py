"""What a checkpoint must be for a run to start from it; checked before any process starts.

nanotron 0.4 loads weights in any layout, optimizer states in their own alone: in another they
crash late, or are dropped without a word.
"""

from pathlib import Path
from typing import Any

from nanotron_ext.checkpoint import Checkpoint, ConvertError, read_json, weights_of

HINT = "is this a nanotron checkpoint?"
# What fixes the shapes of the weights.
SHAPES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)


def check_weights(folder: Path, model_config: dict[str, Any]) -> None:
    """Every tensor of the model is there, whole, finite and of the run's shape; ConvertError."""
    checkpoint = Checkpoint(folder)
    for key in SHAPES:
        found, wanted = getattr(checkpoint.config, key), model_config[key]
        if found != wanted:
            raise ConvertError(
                f"{folder / 'model_config.json'}: {key} is {found}, the run's "
                f"nanotron.model.model_config.{key} is {wanted}: another model's checkpoint"
            )
    for weight in weights_of(checkpoint.config):
        checkpoint.tensor(weight)


def check_layout(folder: Path, parallelism: dict[str, Any], zero_stage: int) -> None:
    """The optimizer states in `folder` can be read by this layout; ConvertError."""
    file = folder / "optimizer" / "optimizer_config.json"
    saved = read_json(file, HINT)["parallelism"]
    was_sharded = any("_dp-" in path.name for path in file.parent.glob("optimizer_pp-*.pt"))
    same = ["tp", "pp"]
    if was_sharded or zero_stage:
        same.append("dp")
    for key in same:
        found, wanted = int(saved[f"{key}_size"]), parallelism[key]
        if found != wanted:
            why = (
                "ZeRO-1 shards its optimizer states" if key == "dp" else "optimizer states are cut"
            )
            raise ConvertError(
                f"{folder}: was saved with {key} {found}, nanotron.parallelism.{key} is {wanted}: "
                f"{why} by {key}; resume with {key} {found}"
            )
    if was_sharded != bool(zero_stage):
        found = int(was_sharded)
        raise ConvertError(
            f"{folder}: was saved with ZeRO stage {found}, nanotron.optimizer.zero_stage is "
            f"{zero_stage}; resume with zero_stage {found}"
        )
