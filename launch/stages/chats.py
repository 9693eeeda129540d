"""The chats stage: the splits of post-training as JSON lines, embedded or from the hub."""

import json
import math
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar

from ground.checksums import FILE, Damaged, seal, verify
from ground.errors import UserError, did_you_mean
from ground.files import digest, read_json_object, write_json
from ground.hub import Repository
from launch.recipe import load
from launch.recipe.load import short
from launch.recipe.scale import Scale
from launch.recipe.scale_file import ChatsScale
from launch.recipe.tables import ChatDataset, SplitRow, StageRow, load_splits, splits_file
from launch.run.folder import StageRun, cache_root


@dataclass(frozen=True)
class OwnChats:
    """A split in a file of the user's own."""

    path: str
    content: str  # hash of the file
    mode: str  # of rows that do not say


Own = dict[str, dict[str, OwnChats]]  # by config and split


@dataclass(frozen=True)
class HubChats:
    hub: ChatDataset
    splits: dict[str, tuple[str, ...]]  # by config
    most_rows: dict[str, int]  # of a split; all where it is not named
    own: Own


@dataclass(frozen=True)
class EmbeddedChats:
    stand_in: dict[str, dict[str, SplitRow]]  # by config
    version: int  # of the generators
    made: ChatsScale
    own: Own


@dataclass(frozen=True, kw_only=True)
class ChatsStage(StageRun):
    recipe: HubChats | EmbeddedChats
    kind: ClassVar = "chats"
    libraries: ClassVar = ()
    small_outputs: ClassVar = True

    @staticmethod
    def resolve(row: StageRow, at: Scale) -> HubChats | EmbeddedChats:
        table, own = load_splits(), _own_chats()
        rows = {
            config: {name: row for name, row in of_config.items() if not row.path}
            for config, of_config in table.splits.items()
        }
        if at.values.origin == "hub":
            most_rows = {
                split: math.ceil((row.rows or 0) * share)
                for config, share in at.values.posttrain.chats.hub_share.items()
                for split, row in rows[config].items()
            }
            splits = {name: tuple(of_config) for name, of_config in rows.items()}
            return HubChats(table.dataset, splits, most_rows, own)
        from datatrove_pipelines.standins import CHATS_VERSION

        return EmbeddedChats(rows, CHATS_VERSION, at.values.posttrain.chats, own)

    def recipe_values(self) -> dict[str, Any]:
        recipe = self.recipe
        values = asdict(recipe)
        del values["own"]
        own = {
            split: f"{one.content} {one.mode}"
            for of_config in recipe.own.values()
            for split, one in of_config.items()
        }
        more = {"own": own} if own else {}
        if isinstance(recipe, HubChats):
            if not recipe.most_rows:
                del values["most_rows"]
            return values | more
        for row in (row for of_config in values["stand_in"].values() for row in of_config.values()):
            del row["path"]
        return {"stand_in": values["stand_in"], "version": recipe.version, **values["made"], **more}

    def refuse(self) -> None:
        if isinstance(self.recipe, HubChats):
            return
        from datatrove_pipelines.standins.chats import STANDINS

        for config, rows in self.recipe.stand_in.items():
            for split, row in rows.items():
                if row.stand_in and row.stand_in not in STANDINS:
                    key = f"{short(splits_file())}: splits.{config}.{split}.stand_in"
                    hint = did_you_mean(row.stand_in, STANDINS)
                    raise UserError(f"{key}: {row.stand_in}: unknown; {hint}")

    def needs_of_hub(self) -> Iterable[Repository]:
        if not isinstance(self.recipe, HubChats) or (self._folder / FILE).exists():
            return ()
        hub = self.recipe.hub
        where = f"{short(splits_file())}: dataset"
        return [Repository("dataset", hub.hub_id, hub.revision, where)]

    @property
    def _folder(self) -> Path:
        """By the hash of what is in it."""
        text = json.dumps(self.recipe_values(), sort_keys=True)
        return cache_root() / "chats" / blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def chats(self) -> Path:
        """The folder of a finished stage's files."""
        return cache_root() / (self.manifest() or {})["folder"]

    @property
    def held_out(self) -> Path:
        """Prompts that no split holds, one file per kind."""
        return self.chats / "held_out"

    @property
    def outputs(self) -> Iterable[Path]:
        return [self.chats]

    def work(self, lock: int) -> dict[str, Any]:
        """Write the chats of all splits into the cache, unless they are there."""
        folder = self._folder
        file = folder / "rows.json"
        try:
            verify(folder)
        except Damaged as error:
            if (folder / FILE).exists():  # it was whole
                print(f"{self.stage}: {error}", flush=True)
                shutil.rmtree(folder)
            # Each split of the hub is whole or absent: a stopped download continues with the next.
            write_json(file, self._write(folder) | self._write_own(folder), indent=None)
            seal(folder)
        rows = read_json_object(file)
        return {"folder": str(folder.relative_to(cache_root())), "rows": rows}

    def _write(self, folder: Path) -> dict[str, int]:
        """Rows of each split."""
        recipe = self.recipe
        if isinstance(recipe, HubChats):
            from datatrove_pipelines.chats_hub import write_hub_chats

            splits = {name: list(rows) for name, rows in recipe.splits.items()}
            hub = recipe.hub
            return write_hub_chats(folder, hub.hub_id, hub.revision, splits, recipe.most_rows)
        from datatrove_pipelines.standins.chats import ChatSplit, write_chats

        chat_splits = [
            ChatSplit(config, split, row.mode, row.stand_in or "", row.languages, row.share)
            for config, rows in recipe.stand_in.items()
            for split, row in rows.items()
        ]
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = recipe.made
        return write_chats(folder, chat_splits, made.rows, made.held_out_rows, made.seed)

    def _write_own(self, folder: Path) -> dict[str, int]:
        from datatrove_pipelines.chats_hub import write_own_chats

        return {
            f"{config.lower()}/{split}": write_own_chats(
                folder, config, split, Path(one.path), one.mode == "think"
            )
            for config, of_config in self.recipe.own.items()
            for split, one in of_config.items()
        }


def _own_chats() -> Own:
    own: Own = {}
    for config, rows in load_splits().splits.items():
        for split, row in rows.items():
            if row.path:
                file = load.RECIPES.parent / row.path
                if not file.is_file():
                    where = f"{short(splits_file())}: splits.{config}.{split}.path: {row.path}"
                    raise UserError(f"{where}: no such file; correct it")
                own.setdefault(config, {})[split] = OwnChats(str(file), digest(file, 16), row.mode)
    return own


def split_files(folder: Path, mixture: Iterable[str]) -> dict[str, str]:
    """The file of each split of a mixture."""
    splits = load_splits().splits
    config_of = {split: config for config, rows in splits.items() for split in rows}
    return {split: str(folder / config_of[split].lower() / f"{split}.jsonl") for split in mixture}
