"""Weighted averages of checkpoints with mergekit: what it would merge silently is refused first.

mergekit lets NaNs through, invents what a folder lacks, and compares neither the configs nor the
vocabularies of its inputs. Every weight is read once before the merge, one tensor at a time.
"""

import json
import logging
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from posttrain.compat import forget_merge_inputs
from posttrain.errors import PosttrainError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# What two checkpoints of equal shapes may differ in without their weights telling.
SAME_CONFIG = (
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
    "no_rope_layers",
    "tie_word_embeddings",
)
# Of the folder that lends its tokenizer; config.json and the weights are mergekit's.
LENT = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


def merge(config: Mapping[str, Any], target: Path, lender: Path) -> None:
    """Write the transformers folder `target` that the mergekit config describes.

    `models[].model` are transformers folders; the first gives config.json, the folder `lender`
    tokenizer, chat template and generation config. `target` appears when all is written and
    replaces what was there. PosttrainError for inputs that do not belong together; nothing is
    written then.
    """
    _check_weights(config)
    folders = [Path(row["model"]) for row in config["models"]]
    check_inputs(folders)
    aside, old = (target.with_name(f"{target.name}.{end}") for end in ("partial", "old"))
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        _run_mergekit(config, aside)
        for pattern in LENT:
            for file in lender.glob(pattern):
                shutil.copy(file, aside)
        check_merged(aside, folders[0], config["out_dtype"])
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _check_weights(config: Mapping[str, Any]) -> None:
    """Refuse weights that mergekit would divide by nothing, or turn round."""
    weights = [row["parameters"]["weight"] for row in config["models"]]
    for index, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight >= 0):
            raise PosttrainError(f"models[{index}].parameters.weight: {weight}: write at least 0")
    if not sum(weights) > 0:
        raise PosttrainError("models: every weight is 0; one must be above")


def _run_mergekit(config: Mapping[str, Any], target: Path) -> None:
    with _quiet():
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions

        forget_merge_inputs()
        options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
        run_merge(MergeConfiguration.model_validate(dict(config)), str(target), options)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without mergekit's warnings that it inferred the architecture."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def weight_files(folder: Path) -> dict[str, Path]:
    """Each tensor's name and the safetensors file it stands in."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = {name: folder / file for name, file in _json(index)["weight_map"].items()}
    else:
        single = folder / "model.safetensors"
        with ExitStack() as stack:
            files = dict.fromkeys(_open(single, stack).keys(), single)
    if not files:
        raise PosttrainError(f"{folder}: no weights in it; write the checkpoint again")
    return files


def check_inputs(folders: Sequence[Path]) -> None:
    """Refuse folders whose average has no meaning: PosttrainError names file, key and remedy."""
    first, *others = folders
    configs = [_json(folder / "config.json") for folder in folders]
    files = [weight_files(folder) for folder in folders]
    for folder, config, own in zip(others, configs[1:], files[1:], strict=True):
        for key in SAME_CONFIG:
            if config.get(key) != configs[0].get(key):
                raise PosttrainError(
                    f"{folder / 'config.json'}: {key}: {config.get(key)!r}, {configs[0].get(key)!r} "
                    f"in {first}; merge checkpoints of one model"
                )
        _check_same_keys(first, files[0].keys(), folder, own.keys())
    _check_vocabularies(folders)
    for name in files[0]:
        _check_tensor(name, [own[name] for own in files])


def check_merged(folder: Path, first: Path, dtype: str) -> None:
    """Refuse a merged folder that lacks weights of its inputs, or holds them in another dtype."""
    files = weight_files(folder)
    _check_same_keys(first, weight_files(first).keys(), folder, files.keys())
    for name, file in files.items():
        with ExitStack() as stack:
            found = _open(file, stack).get_tensor(name).dtype
        if str(found) != f"torch.{dtype}":
            raise PosttrainError(f"{file}: {name} is {found}, expected {dtype} (out_dtype)")


def _check_same_keys(
    first: Path, wanted: Iterable[str], folder: Path, found: Iterable[str]
) -> None:
    missing, unknown = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise PosttrainError(
            f"{folder}: no {missing[0]}{more}, which {first} has; merge checkpoints of one model"
        )
    if unknown:
        raise PosttrainError(
            f"{folder}: {unknown[0]} is not in {first}; merge checkpoints of one model"
        )


def _check_tensor(name: str, files: Sequence[Path]) -> None:
    shape: tuple[int, ...] | None = None
    for file in files:
        with ExitStack() as stack:
            try:
                tensor = _open(file, stack).get_tensor(name)
            except SafetensorError:
                raise PosttrainError(f"{file}: no {name} in it; write the file again") from None
        if tensor.dtype not in FLOATS:
            raise PosttrainError(f"{file}: {name} is {tensor.dtype}; merge unquantised checkpoints")
        shape = shape or tuple(tensor.shape)
        if tuple(tensor.shape) != shape:
            raise PosttrainError(
                f"{file}: {name} is {list(tensor.shape)}, {list(shape)} in {files[0]}; merge "
                "checkpoints of one model"
            )
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise PosttrainError(
                f"{file}: {name} has {bad:,} of {tensor.numel():,} elements that are no numbers; "
                "that run diverged, name an earlier checkpoint"
            )


def _check_vocabularies(folders: Sequence[Path]) -> None:
    """Where a folder has a tokenizer, each of its tokens must mean the same row of the embedding."""
    first: tuple[Path, dict[str, int]] | None = None
    for file in (folder / "tokenizer.json" for folder in folders):
        if not file.is_file():
            continue
        vocabulary = _vocabulary(file)
        first = first or (file, vocabulary)
        for token, index in vocabulary.items():
            if first[1].get(token, index) != index:
                raise PosttrainError(
                    f"{file}: token {token!r} is {index}, {first[1][token]} in {first[0]}; merge "
                    "checkpoints of one tokenizer"
                )


def _vocabulary(file: Path) -> dict[str, int]:
    values = _json(file)
    own = values.get("model", {}).get("vocab", {})
    added = {row["content"]: row["id"] for row in values.get("added_tokens", ())}
    return (own if isinstance(own, dict) else {}) | added


def _open(file: Path, stack: ExitStack) -> Any:
    if not file.is_file():
        raise PosttrainError(f"{file}: no such file; write the checkpoint again")
    try:
        return stack.enter_context(safe_open(file, framework="pt"))
    except SafetensorError as error:
        raise PosttrainError(
            f"{file}: cut off or no safetensors ({error}); write the checkpoint again"
        ) from None


def _json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise PosttrainError(
            f"{file}: no such file; name a transformers folder, such as a stage's hf/"
        ) from None
    except ValueError as error:
        raise PosttrainError(f"{file}: not JSON ({error}); write the checkpoint again") from None
    if not isinstance(values, dict):
        raise PosttrainError(f"{file}: not a JSON object; write the checkpoint again")
    return values
