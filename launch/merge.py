"""Merging stages: a mergekit file whose models are stages, run by posttrain/merge.py."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from omegaconf import MISSING

from launch.errors import UserError, did_you_mean
from launch.recipe import checked, load_yaml, stage_file, stage_row
from launch.run_folder import StageRun


@dataclass
class Parameters:
    weight: Annotated[float, 0.0] = MISSING


@dataclass
class MergedModel:
    model: str = MISSING  # <stage>/<folder in its run folder>; checkpoints/-1 is its last
    parameters: Parameters = field(default_factory=Parameters)


@dataclass
class MergeFile:
    """A recipe that merges: mergekit's own keys, those of a linear merge, and `stage`."""

    stage: str = MISSING
    merge_method: str = MISSING
    dtype: str = MISSING
    out_dtype: str = MISSING
    models: list[MergedModel] = field(default_factory=list)


# Of each key: what the checks and the proofs of this stage cover.
ALLOWED = {
    "merge_method": ("linear",),
    "dtype": ("float32",),  # in bfloat16 mergekit mis-rounds a fifth of the elements
    "out_dtype": ("bfloat16", "float16", "float32"),
}


def merge_recipe(stage: str, scale: str) -> dict[str, Any]:
    """The checked recipe of a merging stage; it is the same at every scale."""
    file = stage_file(stage)
    short = os.path.relpath(file)
    recipe: dict[str, Any] = checked(load_yaml(file), MergeFile, file)
    for key, allowed in ALLOWED.items():
        if recipe[key] not in allowed:
            raise UserError(f"{short}: {key}: {recipe[key]}: write {' or '.join(allowed)}")
    if len(recipe["models"]) < 2:
        raise UserError(
            f"{short}: models: {len(recipe['models'])} listed; a merge takes two or more"
        )
    takes = stage_row(stage)["takes"]
    for index, row in enumerate(recipe["models"]):
        taken = row["model"].partition("/")[0]
        if taken not in takes:
            hint = did_you_mean(taken, takes)
            raise UserError(
                f"{short}: models.{index}.model: {row['model']}: {stage} takes no stage '{taken}' "
                f"(recipes/pipeline.yaml); {hint}"
            )
    return recipe


def saved_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a post-training run folder, oldest first: <step> or checkpoint-<step>."""
    found = {path: re.fullmatch(r"(?:checkpoint-)?(\d+)", path.name)
             for path in (folder / "checkpoints").glob("*")}  # fmt: skip
    steps = {path: int(match[1]) for path, match in found.items() if match}
    return sorted(steps, key=steps.__getitem__)


def resolve_model(name: str, inputs: Mapping[str, StageRun]) -> Path:
    """The transformers folder that `<stage>/<folder>` names."""
    stage, _, below = name.partition("/")
    folder = inputs[stage].folder
    kind, _, number = below.partition("/")
    if kind != "checkpoints" or not number.startswith("-"):
        return folder / below
    saved = saved_checkpoints(folder)
    if not number[1:].isdigit() or not 0 < int(number[1:]) <= len(saved):
        found = ", ".join(path.name for path in saved) or "none"
        raise UserError(
            f"{name}: {folder / 'checkpoints'} has {len(saved)} checkpoints ({found}); save more "
            f"often in the recipe of {stage}, or count from -1"
        )
    return saved[int(number)]


def merge_config(recipe: dict[str, Any], inputs: Mapping[str, StageRun]) -> dict[str, Any]:
    """The mergekit config: the recipe with folders for stages."""
    config = {key: value for key, value in recipe.items() if key != "stage"}
    models = [
        {**row, "model": str(resolve_model(row["model"], inputs))} for row in recipe["models"]
    ]
    return {**config, "models": models}


def run_merge(run: StageRun) -> dict[str, Any]:
    """Merge into the stage's hf/; returns the manifest's results."""
    from posttrain.merge import merge

    config = merge_config(run.recipe, run.inputs)
    lender = run.recipe["models"][0]["model"].partition("/")[0]
    merge(config, run.folder / "hf", run.inputs[lender].folder / "hf")
    return {
        "merged": [
            {"model": row["model"], "folder": resolved["model"], **row["parameters"]}
            for row, resolved in zip(run.recipe["models"], config["models"], strict=True)
        ]
    }
