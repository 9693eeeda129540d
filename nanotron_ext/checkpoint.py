"""A nanotron checkpoint on disk, one file per tensor and rank; and what a run may start from.

A file's metadata says which slices of the whole tensor it holds, so that checkpoints of any
tensor- or pipeline-parallel layout are read in the same way, without importing nanotron.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ground.errors import UserError
from ground.files import read_json_object
from ground.weights import check_floats, check_names, check_shape, open_weights, tensor_of
from nanotron_ext.config import SIZES, SmolLM3Config
from nanotron_ext.weight_table import Weight, weights_of

CHECKPOINT_VERSION = "1.2"  # nanotron.constants, 0.4 and main
MODEL = "the config's model"
REMEDY = "is this a nanotron checkpoint?"


class Checkpoint:
    """A nanotron checkpoint of any layout; whole tensors by parameter name, read when asked for."""

    def __init__(self, folder: Path):
        path = folder / "model_config.json"
        values = read_json_object(path, REMEDY)
        if not values.get("is_smollm3_config"):
            raise UserError(f"{path}: is_smollm3_config is missing: another architecture")
        self.config = config_of(path, values)
        self.files: dict[str, list[Path]] = {}
        for file in sorted((folder / "model").rglob("*.safetensors")):
            leaf = re.sub(r"^model_|_pp-rank.*$", "", file.name.removesuffix(".safetensors"))
            module = ".".join(file.parent.relative_to(folder / "model").parts)
            self.files.setdefault(f"{module}.{leaf}", []).append(file)
        names = {weight.name for weight in weights_of(self.config)}
        check_names(folder / "model", names, self.files, MODEL)

    def tensor(self, weight: Weight) -> torch.Tensor:
        """`weight` put together from its ranks' files; a single rank's is mapped, not copied."""
        files, whole, filled = self.files[weight.name], torch.empty(0), 0
        for file in files:
            with open_weights(file) as handle:
                part, metadata = tensor_of(file, handle, "data"), handle.metadata() or {}
            pairs = metadata.get("local_global_slices_pairs")
            is_whole = len(files) == 1 and (pairs is None or part.shape == weight.shape)
            shape = part.shape if is_whole else _integers(metadata.get("unsharded_shape", ""))
            check_shape(file, weight.name, shape, weight.shape, MODEL)
            check_floats(file, weight.name, part)
            if is_whole:
                return part
            if not filled:
                whole = torch.empty(weight.shape, dtype=part.dtype)
            for pair in (pairs or "").split(";"):
                local, target = pair.split("#")
                whole[_slices(target)] = part[_slices(local)]
                filled += part[_slices(local)].numel()
        if filled != whole.numel():
            raise UserError(
                f"{file.parent}: '{weight.name}' has {filled} of {whole.numel()} values: a rank's "
                "file is missing or of another layout; take another checkpoint"
            )
        return whole


def config_of(file: Path, values: dict[str, Any]) -> SmolLM3Config:
    try:
        return SmolLM3Config(**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: {error}: another architecture?") from None


def save_weight(weight: Weight, parts: list[torch.Tensor], root: Path) -> None:
    """One file, named and described as nanotron does at tp 1, pp 1."""
    *path, leaf = weight.name.split(".")
    metadata, suffix = {}, ""
    if weight.split_dim is not None:
        suffix = "_pp-rank-0-of-1_tp-rank-0-of-1"
        metadata = {
            "version": CHECKPOINT_VERSION,
            "unsharded_shape": str(weight.shape),
            "local_global_slices_pairs": _slice_pairs(weight),
        }
    file = root.joinpath(*path, f"model_{leaf}{suffix}.safetensors")
    file.parent.mkdir(parents=True)
    data = torch.cat(parts) if len(parts) > 1 else parts[0]
    save_file({"data": data}, file, metadata=metadata)


def _slice_pairs(weight: Weight) -> str:
    """Metadata: which rows or columns of the whole the file holds (all, one part after another)."""
    every = "None,None,None"
    if len(weight.parts) == 1:
        cut = f"0,{weight.shape[weight.split_dim or 0]},None"
        return f"{every}|{every}#" + (f"{every}|{cut}" if weight.split_dim else f"{cut}|{every}")
    pairs, start = [], 0
    for shape in weight.parts.values():
        cut = f"{start},{start + shape[0]},None|{every}"
        pairs.append(f"{cut}#{cut}")
        start += shape[0]
    return ";".join(pairs)


def check_weights(folder: Path, model_config: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that lacks a tensor of the run's model, or has one that is not finite."""
    checkpoint = Checkpoint(folder)
    for key in (*SIZES, "tie_word_embeddings"):  # what fixes the shapes of the weights
        saved, asked = getattr(checkpoint.config, key), model_config[key]
        if saved != asked:
            raise UserError(
                f"{folder / 'model_config.json'}: {key} is {saved}, the run's "
                f"nanotron.model.model_config.{key} is {asked}: another model's checkpoint"
            )
    for weight in weights_of(checkpoint.config):
        checkpoint.tensor(weight)


def check_layout(folder: Path, parallelism: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose optimizer states are cut for another tp or pp.

    nanotron 0.4 loads weights in any layout, but fails on such states once all processes run, or
    drops them silently. Another dp or ZeRO stage: `recut.py`.
    """
    file = folder / "optimizer" / "optimizer_config.json"
    saved = read_json_object(file, REMEDY)["parallelism"]
    for key in ("tp", "pp"):
        before, now = int(saved[f"{key}_size"]), parallelism[key]
        if before != now:
            raise UserError(
                f"{folder}: was saved with {key} {before}, nanotron.parallelism.{key} is {now}: "
                f"optimizer states are cut by {key}; resume with {key} {before}, or with layout: fit "
                "on GPUS= and GPU_GB= as then"
            )


def _slices(text: str) -> tuple[slice, ...]:
    return tuple(
        slice(*(None if bound == "None" else int(bound) for bound in part.split(",")))
        for part in text.split("|")
    )


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text.replace("np.int64", "")))
