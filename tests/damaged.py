"""One table of what can be wrong with the weights of a transformers folder, for all its readers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from small_models import INDEX, NORM, shard, spoil

Damage = Callable[[Path], Any]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def lose_a_shard(folder: Path) -> None:
    shard(folder)
    sorted(folder.glob("*.safetensors"))[1].unlink()


def cut_a_shard(folder: Path) -> None:
    shard(folder)
    cut(sorted(folder.glob("*.safetensors"))[1])


def list_another_tensor(folder: Path) -> None:
    shard(folder)
    file = folder / INDEX
    file.write_text(file.read_text().replace('"model.norm.weight"', '"model.norm.bias"'))


def filled(value: float) -> torch.Tensor:
    tensor = torch.ones(32)
    tensor[3] = value
    return tensor


# {what was done to a folder of small_models: (how, what the error's line says)}
DAMAGED: dict[str, tuple[Damage, str]] = {
    "nan": (
        lambda folder: spoil(folder, {NORM: filled(float("nan"))}),
        r"model\.safetensors: 'model\.norm\.weight' is not finite in 1 of 32 values",
    ),
    "inf": (lambda folder: spoil(folder, {NORM: filled(float("inf"))}), "is not finite in 1 of 32"),
    "whole numbers": (
        lambda folder: spoil(folder, {NORM: torch.ones(32, dtype=torch.int8)}),
        r"'model\.norm\.weight' is torch\.int8; take the unquantised",
    ),
    "file cut off": (
        lambda folder: cut(folder / "model.safetensors"),
        r"model\.safetensors: truncated or corrupt",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        r"model\.safetensors: no such file",
    ),
    "a shard missing": (lose_a_shard, r"model-00002-of-\d+\.safetensors: no such file"),
    "a shard cut off": (cut_a_shard, r"model-00002-of-\d+\.safetensors: truncated or corrupt"),
    "another index": (list_another_tensor, r"no tensor 'model\.norm\.(bias|weight)'"),
}
