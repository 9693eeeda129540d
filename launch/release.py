"""The release: the merged model as one transformers folder, ready to load, serve and hand on.

runs/<scale>/release/   config.json  model*.safetensors  tokenizer*  chat_template.jinja
                        generation_config.json  README.md  yarn/ (the same for twice the window)
"""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from omegaconf import MISSING

from launch.errors import UserError, did_you_mean
from launch.recipe import checked, load_yaml, stage_file, stage_row
from launch.run_folder import StageRun, write_aside
from launch.schema import Positive

# Of the folder that is released; everything else in it is written here.
COPIED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


@dataclass
class Generation:
    """Sampling defaults in generation_config.json."""

    temperature: Positive = MISSING
    top_p: Positive = MISSING
    eos_token: str = MISSING


@dataclass
class ReleaseFile:
    stage: str = MISSING
    model: str = MISSING  # <stage>/<folder in its run folder>
    model_name: str = MISSING
    generation: Generation = field(default_factory=Generation)
    yarn_factor: Annotated[float, 1.0] = MISSING


def release_recipe(stage: str, scale: str) -> dict[str, Any]:
    """The checked recipe of the release; it is the same at every scale."""
    file = stage_file(stage)
    short = os.path.relpath(file)
    recipe: dict[str, Any] = checked(load_yaml(file), ReleaseFile, file)
    top_p = recipe["generation"]["top_p"]
    if top_p > 1:
        raise UserError(f"{short}: generation.top_p: {top_p}: write a share, at most 1")
    taken, takes = recipe["model"].partition("/")[0], stage_row(stage)["takes"]
    if taken not in takes:
        hint = did_you_mean(taken, takes)
        raise UserError(f"{short}: model: {recipe['model']}: {stage} takes no '{taken}'; {hint}")
    return recipe


def run_release(run: StageRun) -> dict[str, Any]:
    """Write the release into the run folder itself; returns the manifest's results."""
    from launch.model_card import model_card

    stage, _, below = run.recipe["model"].partition("/")
    source, target = run.inputs[stage].folder / below, run.folder
    config = read_json(source / "config.json")
    for file in sorted({f for pattern in COPIED for f in source.glob(pattern)}):
        _copy_aside(file, target / file.name)
    eos_id = _eos_id(source, run.recipe["generation"]["eos_token"])
    config["eos_token_id"] = eos_id
    _write_json(target / "config.json", config)
    _write_json(target / "generation_config.json", generation_config(run.recipe, config, source))
    yarn = write_yarn(target, run.recipe["yarn_factor"])
    count = parameters(target)
    write_aside(target / "README.md", model_card(run, config, yarn, count))
    check_loads(target)
    return {
        "window_tokens": config["max_position_embeddings"],
        "yarn_window_tokens": yarn["max_position_embeddings"],
        "parameters": count,
        "dtype": config["dtype"],
    }


def show(run: StageRun) -> None:
    """Where the release is and how long a text it reads."""
    manifest = run.manifest() or {}
    print(
        f"release: {run.folder}, {manifest['parameters']:,} parameters, windows of "
        f"{manifest['window_tokens']:,} tokens; {run.folder / 'yarn'} reads "
        f"{manifest['yarn_window_tokens']:,}"
    )


def generation_config(
    recipe: dict[str, Any], config: dict[str, Any], source: Path
) -> dict[str, Any]:
    """What transformers, vLLM and others sample with unless told otherwise."""
    file = source / "generation_config.json"
    carried = read_json(file) if file.is_file() else {}
    carried.pop("transformers_version", None)
    ours = {"do_sample": True, "eos_token_id": config["eos_token_id"]}
    ours |= {key: recipe["generation"][key] for key in ("temperature", "top_p")}
    return {"bos_token_id": config.get("bos_token_id"), **carried, **ours}


def write_yarn(release: Path, factor: float) -> dict[str, Any]:
    """yarn/: the same files by link, and a config for `factor` times the window; returns it.

    Links are relative, so that the folder may be moved; uploads follow them.
    """
    from nanotron_ext.rope import yarn_config

    config = yarn_config(read_json(release / "config.json"), factor)
    aside, yarn = release / ".yarn.partial", release / "yarn"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for pattern in (*COPIED, "generation_config.json"):
        for file in release.glob(pattern):
            (aside / file.name).symlink_to(Path("..") / file.name)
    _write_json(aside / "config.json", config)
    shutil.rmtree(yarn, ignore_errors=True)
    aside.rename(yarn)
    return config


def check_loads(release: Path) -> None:
    """Refuse a folder that its users could not load: template, special tokens, both configs."""
    from transformers import AutoConfig, AutoTokenizer

    for folder in (release, release / "yarn"):
        AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if not tokenizer.chat_template:
            raise UserError(
                f"{folder}: the tokenizer has no chat template; the post-training stages store it "
                "in their hf/, run them again with FORCE=1"
            )


def parameters(folder: Path) -> int:
    """Parameters in the folder's safetensors files, from their headers."""
    import math

    from safetensors import safe_open

    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            total += sum(math.prod(handle.get_slice(key).get_shape()) for key in handle.keys())  # noqa: SIM118
    return total


def _eos_id(source: Path, token: str) -> int:
    from tokenizers import Tokenizer

    file = source / "tokenizer.json"
    read_json(file)
    found: int | None = Tokenizer.from_file(str(file)).token_to_id(token)
    if found is None:
        raise UserError(
            f"{file}: no token {token}; recipes/merge/release.yaml names the "
            "end of a turn in generation.eos_token"
        )
    return found


def _copy_aside(file: Path, target: Path) -> None:
    aside = target.with_name(f".{target.name}.partial")
    shutil.copyfile(file, aside)  # not its mode: some writers close weights to others
    aside.replace(target)


def read_json(file: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{file}: no such file; run the stage that writes it with FORCE=1"
        ) from None
    return values


def _write_json(file: Path, values: dict[str, Any]) -> None:
    write_aside(file, json.dumps(values, indent=2) + "\n")
