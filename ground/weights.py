"""Weights in safetensors files: names, shapes, dtypes and finiteness, checked before use.

A transformers folder holds `model.safetensors`, or shards that `model.safetensors.index.json` lists.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ground.errors import UserError
from ground.files import read_json_object

AGAIN = "write the folder again"
INDEX = "model.safetensors.index.json"


@contextmanager
def open_weights(file: Path, remedy: str = AGAIN) -> Iterator[Any]:
    """A handle of one safetensors file. Raises UserError where there is none, or it is cut off."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise UserError(f"{file}: no such file; {remedy}")
    try:
        with safe_open(file, "pt") as handle:
            yield handle
    except SafetensorError as error:
        raise UserError(f"{file}: truncated or corrupt ({error}); {remedy}") from None


def smollm3_config(folder: Path, remedy: str) -> dict[str, Any]:
    """config.json of a SmolLM3's transformers folder. Raises UserError for anything else."""
    file = folder / "config.json"
    config: dict[str, Any] = read_json_object(file, remedy)
    if (kind := config.get("model_type")) != "smollm3":
        raise UserError(f"{file}: model_type: {kind}; {remedy}")
    return config


def weight_files(folder: Path, remedy: str = AGAIN) -> dict[str, Path]:
    """{tensor: the file that holds it} of a transformers folder. Raises UserError where none do."""
    if (folder / INDEX).is_file():
        table = read_json_object(folder / INDEX, remedy).get("weight_map")
        if not isinstance(table, dict):
            raise UserError(f"{folder / INDEX}: weight_map: missing; {remedy}")
        files = {name: folder / file for name, file in table.items()}
    else:
        single = folder / "model.safetensors"
        with open_weights(single, remedy) as handle:
            files = dict.fromkeys(handle.keys(), single)
    if not files:
        raise UserError(f"{folder}: no weights in it; {remedy}")
    return files


def read_tensor(file: Path, name: str, remedy: str = AGAIN) -> Any:
    """One tensor of a file."""
    with open_weights(file, remedy) as handle:
        return tensor_of(file, handle, name, remedy)


def tensor_of(file: Path, handle: Any, name: str, remedy: str = AGAIN) -> Any:
    if name not in handle.keys():  # noqa: SIM118  (a safetensors handle has no __contains__)
        raise UserError(f"{file}: no tensor '{name}'; {remedy}")
    return handle.get_tensor(name)


def tensors(folder: Path, remedy: str = AGAIN) -> Iterator[tuple[Path, str, Any]]:
    """(file, name, tensor) of a transformers folder, of which one at a time is in memory."""
    files = weight_files(folder, remedy)
    for file in sorted(set(files.values())):
        with open_weights(file, remedy) as handle:
            for name in (name for name, holder in files.items() if holder == file):
                yield file, name, tensor_of(file, handle, name, remedy)


def parameters(folder: Path) -> int:
    """Parameters of a transformers folder, from the headers of its files."""
    total = 0
    for file in sorted(set(weight_files(folder).values())):
        with open_weights(file) as handle:
            total += sum(math.prod(handle.get_slice(key).get_shape()) for key in handle.keys())  # noqa: SIM118
    return total


def check_names(folder: Path, wanted: set[str], found: Iterable[str], of: str) -> None:
    """Refuse a folder that lacks a tensor of `wanted`, or has another; `of` says who asks for them."""
    missing, extra = sorted(wanted - set(found)), sorted(set(found) - wanted)
    if missing:
        raise UserError(
            f"{folder}: no tensor '{missing[0]}' ({len(missing)} missing), which {of} has; name a "
            "whole folder of one model"
        )
    if extra:
        raise UserError(f"{folder}: tensor '{extra[0]}' is not of {of}: another model's folder")


def check_shape(
    file: Path, name: str, found: Iterable[int], wanted: Iterable[int], of: str
) -> None:
    if tuple(found) != tuple(wanted):
        raise UserError(
            f"{file}: '{name}' has shape {tuple(found)}, {tuple(wanted)} in {of}: another model's"
        )


def check_floats(file: Path, name: str, tensor: Any) -> None:
    """Refuse a quantised tensor, and one that is not finite throughout."""
    import torch

    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise UserError(f"{file}: '{name}' is {tensor.dtype}; take the unquantised weights")
    # In parts, since the test makes copies.
    bad = sum(int((~torch.isfinite(part)).sum()) for part in tensor.flatten().split(2**24))
    if bad:
        raise UserError(
            f"{file}: '{name}' is not finite in {bad:,} of {tensor.numel():,} values: that run "
            "diverged; take an earlier checkpoint"
        )
