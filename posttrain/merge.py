"""Averages checkpoints with mergekit. Refuses what mergekit would accept silently.

mergekit lets NaNs through, invents what a folder lacks, and compares neither the configs nor the
vocabularies of its inputs. Every weight is read once before the merge, one tensor at a time.
"""

import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ground.checksums import seal
from ground.errors import UserError
from ground.files import folder_aside, read_json_object
from ground.weights import check_floats, check_names, check_shape, tensors, weight_files
from posttrain.compat import forget_merge_inputs, keep_merge_order
from posttrain.lora import CONFIG as ADAPTER
from posttrain.lora import merged

REMEDY = "name a whole transformers folder, such as a stage's hf/"
# What may differ between two checkpoints of equal shapes and is not visible in the weights.
SAME_CONFIG = (
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
    "no_rope_layers",
    "tie_word_embeddings",
)
# Copied from the folder `lender`; config.json and the weights are mergekit's.
LENT = ("*token*", "chat_template.jinja", "generation_config.json")


def merge(config: Mapping[str, Any], target: Path, lender: Path) -> None:
    """Write the transformers folder `target` that the mergekit config describes.

    `models[].model` are transformers folders; the first gives config.json, the folder `lender`
    tokenizer, chat template and generation config. `target` appears when all is written and
    replaces what was there. UserError for inputs that do not belong together; nothing is written
    then.
    """
    _check_shares(config)
    with _whole_models(config, target) as whole:
        _merge(whole, target, lender)


@contextmanager
def _whole_models(config: Mapping[str, Any], target: Path) -> Iterator[Mapping[str, Any]]:
    """The config with a merged folder, beside `target` for a while, for each one of an adapter."""
    import torch

    scratch = target.with_name(f"{target.name}.adapters")
    rows = []
    for number, row in enumerate(config["models"]):
        folder = Path(row["model"])
        if (folder / ADAPTER).is_file():
            merged(folder, torch.float32).save_pretrained(scratch / str(number))
            for file in folder.glob("*token*"):
                shutil.copy(file, scratch / str(number))
            folder = scratch / str(number)
        rows.append({**row, "model": str(folder)})
    try:
        yield {**config, "models": rows}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _merge(config: Mapping[str, Any], target: Path, lender: Path) -> None:
    folders = [Path(row["model"]) for row in config["models"]]
    check_inputs(folders)
    with folder_aside(target) as aside:
        _run_mergekit(config, aside)
        for pattern in LENT:
            for file in lender.glob(pattern):
                shutil.copy(file, aside)
        check_merged(aside, folders[0], config["out_dtype"])
        seal(aside)


def _check_shares(config: Mapping[str, Any]) -> None:
    """Refuse weights that are negative or not finite, or that sum to 0."""
    weights = [row["parameters"]["weight"] for row in config["models"]]
    for index, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"models[{index}].parameters.weight: {weight}: write at least 0")
    if not sum(weights) > 0:
        raise UserError("models: every weight is 0; one must be above")


def _run_mergekit(config: Mapping[str, Any], target: Path) -> None:
    threshold = logging.root.manager.disable
    logging.disable(logging.WARNING)  # mergekit warns that it inferred the architecture
    try:
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions

        forget_merge_inputs()
        keep_merge_order()
        options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
        run_merge(MergeConfiguration.model_validate(dict(config)), str(target), options)
    finally:
        logging.disable(threshold)


def check_inputs(folders: Sequence[Path]) -> None:
    """Refuse folders whose average has no meaning: UserError names file, key and remedy."""
    first = folders[0]
    config = read_json_object(first / "config.json", REMEDY)
    names = set(weight_files(first, REMEDY))
    for folder in folders[1:]:
        other = read_json_object(folder / "config.json", REMEDY)
        for key in SAME_CONFIG:
            if other.get(key) != config.get(key):
                raise UserError(
                    f"{folder / 'config.json'}: {key}: {other.get(key)!r}, {config.get(key)!r} in "
                    f"{first}; merge checkpoints of one model"
                )
        check_names(folder, names, weight_files(folder, REMEDY), str(first))
    _check_vocabularies(folders)
    shapes: dict[str, tuple[int, ...]] = {}
    for folder in folders:
        for file, name, tensor in tensors(folder, REMEDY):
            check_shape(file, name, tensor.shape, shapes.setdefault(name, tensor.shape), str(first))
            check_floats(file, name, tensor)


def check_merged(folder: Path, first: Path, dtype: str) -> None:
    """Refuse a merged folder that lacks weights of its inputs, or holds them in another dtype."""
    check_names(folder, set(weight_files(first)), weight_files(folder), str(first))
    for file, name, tensor in tensors(folder):
        if str(tensor.dtype) != f"torch.{dtype}":
            raise UserError(f"{file}: {name} is {tensor.dtype}, expected {dtype} (out_dtype)")


def _check_vocabularies(folders: Sequence[Path]) -> None:
    """Refuse tokenizers in which a token means different rows of the embedding."""
    files = [folder / "tokenizer.json" for folder in folders]
    files = [file for file in files if file.is_file()]
    expected = _vocabulary(files[0]) if files else {}
    for file in files[1:]:
        for token, index in _vocabulary(file).items():
            if expected.get(token, index) != index:
                raise UserError(
                    f"{file}: token {token!r} is {index}, {expected[token]} in {files[0]}; merge "
                    "checkpoints of one tokenizer"
                )


def _vocabulary(file: Path) -> dict[str, int]:
    values = read_json_object(file, REMEDY)
    learned = values.get("model", {}).get("vocab", {})
    added = {row["content"]: row["id"] for row in values.get("added_tokens", ())}
    # A Unigram model's vocabulary is a list, in the order of the rows.
    return (learned if isinstance(learned, dict) else {}) | added
