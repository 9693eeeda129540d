"""The chats stage: the splits of post-training as JSON lines, embedded or from the hub."""

import json
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any

from launch import recipe
from launch.errors import UserError, did_you_mean
from launch.recipe import checked, load_scale, load_yaml
from launch.run_folder import StageRun, cache_root
from launch.schema_posttrain import SplitsFile


def splits_file() -> Path:
    return recipe.RECIPES / "posttrain" / "splits.yaml"


def load_splits() -> dict[str, Any]:
    """posttrain/splits.yaml, checked."""
    splits: dict[str, Any] = checked(load_yaml(splits_file()), SplitsFile, splits_file())
    return splits


def chats_recipe(stage: str, scale: str) -> dict[str, Any]:
    """What the chats depend on, as plain values."""
    dial, table = load_scale(scale), load_splits()
    names = {config: list(rows) for config, rows in table["splits"].items()}
    if dial["origin"] == "hub":
        return {"hub": table["dataset"], "splits": names}
    from datatrove_pipelines.standins import CHATS_VERSION

    return {
        "stand_in": table["splits"],
        "version": CHATS_VERSION,
        **dial["posttrain"]["chats"],
    }


def make_chats(run: StageRun) -> dict[str, Any]:
    """Write the chats of all splits into the cache, unless they are there."""
    name = blake2b(json.dumps(run.recipe, sort_keys=True).encode(), digest_size=8).hexdigest()
    folder = cache_root() / "chats" / name
    if not _is_whole(folder):
        # The hub's splits are each whole or absent: a stopped download goes on with the next.
        rows = _from_hub(run, folder) if "hub" in run.recipe else _embedded(run, folder)
        (folder / "rows.json").write_text(json.dumps(rows), "utf-8")
    return {
        "folder": str(folder.relative_to(cache_root())),
        "rows": json.loads((folder / "rows.json").read_text("utf-8")),
    }


def _is_whole(folder: Path) -> bool:
    return (folder / "rows.json").exists()


def _embedded(run: StageRun, folder: Path) -> dict[str, int]:
    from datatrove_pipelines.standins.chats import ChatSplit, write_chats

    made = run.recipe
    splits = [
        ChatSplit(
            config, split, row["mode"], row["stand_in"], tuple(row["languages"]), row["share"]
        )
        for config, rows in made["stand_in"].items()
        for split, row in rows.items()
    ]
    folder.parent.mkdir(parents=True, exist_ok=True)
    return write_chats(folder, splits, made["rows"], made["held_out_rows"], made["seed"])


def _from_hub(run: StageRun, folder: Path) -> dict[str, int]:
    from datatrove_pipelines.chats_hub import write_hub_chats

    hub = run.recipe["hub"]
    return write_hub_chats(folder, hub["hub_id"], hub["revision"], run.recipe["splits"])


def chats_folder(run: StageRun) -> Path:
    """Where a finished chats stage has its files."""
    return cache_root() / (run.manifest() or {})["folder"]


def is_there(run: StageRun) -> bool:
    return _is_whole(chats_folder(run))


def split_files(folder: Path, mixture: Iterable[str]) -> dict[str, str]:
    """The file of each split of a mixture; UserError for an unknown one."""
    config_of = {
        split: config for config, rows in load_splits()["splits"].items() for split in rows
    }
    for split in mixture:
        if split not in config_of:
            hint = did_you_mean(split, config_of)
            raise UserError(f"mixture.{split}: unknown split of {splits_file()}; {hint}")
    return {split: str(folder / config_of[split].lower() / f"{split}.jsonl") for split in mixture}
