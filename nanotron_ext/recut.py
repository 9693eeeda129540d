"""Optimizer states of a checkpoint, cut for another number of replicas or another ZeRO stage.

nanotron 0.4 reads optimizer states only in the layout that saved them. Without ZeRO one file a
(pipeline, tensor-parallel) rank serves any number of replicas; under ZeRO-1 there is one for each
replica too, with a slice of every tensor, flattened. Weights are the same files in every layout.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ground.errors import UserError
from ground.files import folder_aside, read_json_object

# optimizer_pp-0-of-1[_dp-0-of-2]_tp-0-of-1_exp-0-of-1.pt
NAME = re.compile(r"(optimizer_pp-\d+-of-\d+)(?:_dp-(\d+)-of-\d+)?(_tp-.*\.pt)")
CONFIG = "optimizer_config.json"
MASTERS = "gradient_accumulator"  # nanotron's key of the fp32 weights
States = dict[str, Any]  # what torch.save of an optimizer's state_dict holds


def saved_cut(checkpoint: Path) -> tuple[int, int]:
    """(replicas, ZeRO stage) that the optimizer states were saved with."""
    folder = checkpoint / "optimizer"
    replicas = int(read_json_object(folder / CONFIG)["parallelism"]["dp_size"])
    return replicas, int(any(folder.glob("optimizer_pp-*_dp-*.pt")))


def recut(checkpoint: Path, target: Path, replicas: int, zero_stage: int) -> Path:
    """The checkpoint for that layout: itself, or `target` with links to all but the optimizer.

    Holds the states of one (pipeline, tensor-parallel) rank in memory: 12 bytes a weight.
    """
    before, was_sharded = saved_cut(checkpoint)
    if was_sharded == zero_stage and (before == replicas or not zero_stage):
        return checkpoint
    config = read_json_object(checkpoint / "optimizer" / CONFIG)
    shapes = config["configs"].get("orig_param_shapes", {})
    with folder_aside(target) as aside:
        for entry in checkpoint.iterdir():
            if entry.name != "optimizer":
                (aside / entry.name).symlink_to(entry.resolve())
        (aside / "optimizer").mkdir()
        for start, end, files in _of_ranks(checkpoint / "optimizer"):
            if len(files) != (before if was_sharded else 1):
                raise UserError(
                    f"{checkpoint / 'optimizer'}: {len(files)} of {before} files {start}_dp-*; go on "
                    "from another checkpoint"
                )
            whole = _flat(files)
            if zero_stage:
                for replica in range(replicas):
                    part = _changed(whole, lambda _, flat: _slice(flat, replica, replicas))  # noqa: B023
                    name = f"{start}_dp-{replica}-of-{replicas}{end}"
                    torch.save(part, aside / "optimizer" / name)
            else:
                whole = _changed(whole, lambda name, flat: _shaped(checkpoint, name, flat, shapes))
                torch.save(whole, aside / "optimizer" / f"{start}{end}")
        config["parallelism"]["dp_size"] = str(replicas)
        (aside / "optimizer" / CONFIG).write_text(json.dumps(config))
    return target


def _of_ranks(folder: Path) -> Iterator[tuple[str, str, list[Path]]]:
    """Start and end of the names, and the files in the order of replicas, of each rank."""
    found: dict[tuple[str, str], list[tuple[int, Path]]] = {}
    for file in folder.glob("*.pt"):
        if match := NAME.fullmatch(file.name):
            found.setdefault((match[1], match[3]), []).append((int(match[2] or 0), file))
    for (start, end), files in found.items():
        yield start, end, [file for _, file in sorted(files)]


def _flat(files: list[Path]) -> States:
    """The states of one rank with every tensor whole and flattened; a step stays a scalar."""
    parts = [torch.load(file, map_location="cpu", mmap=True, weights_only=False) for file in files]
    whole: States = dict(parts[0])
    whole["state"] = {
        number: {
            key: torch.cat([part["state"][number][key].flatten() for part in parts])
            if value.dim()
            else value
            for key, value in state.items()
        }
        for number, state in whole["state"].items()
    }
    if MASTERS in whole:
        whole[MASTERS] = {
            name: torch.cat([part[MASTERS][name].flatten() for part in parts])
            for name in whole[MASTERS]
        }
    return whole


def _changed(whole: States, change: Callable[[str, torch.Tensor], torch.Tensor]) -> States:
    """The states with each tensor changed, by its weight's name; steps stay."""
    states = {
        number: {
            key: change(whole["names"][number], value) if value.dim() else value
            for key, value in state.items()
        }
        for number, state in whole["state"].items()
    }
    changed = {**whole, "state": states}
    if MASTERS in whole:
        changed[MASTERS] = {name: change(name, value) for name, value in whole[MASTERS].items()}
    return changed


def _slice(flat: torch.Tensor, replica: int, replicas: int) -> torch.Tensor:
    """As nanotron cuts: the first slices are longer by one where the size does not divide."""
    each, longer = divmod(flat.numel(), replicas)
    begin = replica * each + min(replica, longer)
    return flat[begin : begin + each + (replica < longer)].clone()


def _shaped(
    checkpoint: Path, name: str, flat: torch.Tensor, shapes: dict[str, list[str]]
) -> torch.Tensor:
    if name not in shapes:  # nanotron 0.4 writes those of the first pipeline rank alone
        raise UserError(
            f"{checkpoint}: was saved with ZeRO stage 1 and pipeline ranks, so that it does not tell "
            "its tensors' shapes; resume with ZeRO stage 1"
        )
    return flat.view([int(size) for size in shapes[name]])
