"""FROM=<folder or hub id>: a SmolLM3 checkpoint that takes the place of the stage before.

    runs/from/<name>/hf     a link to the folder, or to the files in the hub's cache

Configuration and tokenizer are checked before any weight is fetched.
"""

import hashlib
import shlex
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ground.errors import UserError
from launch.run.folder import StageRun

if TYPE_CHECKING:
    from posttrain.start import Checkpoint


@dataclass(frozen=True, kw_only=True)
class CheckpointStage(StageRun):
    kind: ClassVar = "checkpoint"
    models: ClassVar = "hf"
    seals_models: ClassVar = False
    recipe: "Checkpoint"

    def recipe_values(self) -> dict[str, Any]:
        return {"repository": self.recipe.repository, "revision": self.recipe.revision}

    @property
    def model_config(self) -> dict[str, Any]:
        """transformers' config.json."""
        return self.recipe.config

    @property
    def carries_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        from posttrain.start import carries_template

        return carries_template(self.recipe.folder)

    def refuse(self) -> None:
        """Refuse configuration and tokenizer, and the weights where they are here."""
        from posttrain.start import (
            check_tokenizer,
            check_weights,
            checked_shapes,
            fetch_tokenizer,
        )

        fetch_tokenizer(self.recipe)
        check_tokenizer(self.recipe)
        if self.recipe.repository:
            checked_shapes(self.recipe)
        else:
            check_weights(self.recipe)

    def lost(self, thorough: bool = False) -> str | None:
        # The content of the folder is part of the identity.
        config = self.folder / "hf" / "config.json"
        return None if config.is_file() else f"{config}: no such file"

    def work(self, lock: int) -> dict[str, Any]:
        """Fetch the weights, where they are on the hub, and link to the folder."""
        from posttrain.start import check_weights, fetch_weights

        recipe = self.recipe
        fetch_weights(recipe)
        check_weights(recipe)
        link = self.folder / "hf"
        link.unlink(missing_ok=True)
        link.symlink_to(recipe.folder.resolve())
        return {"from": recipe.named, "revision": recipe.revision}

    def show(self) -> None:
        recipe = self.recipe
        print(f"  {recipe.named}, revision {recipe.revision}", flush=True)


def started_from(run: StageRun, given: str) -> StageRun:
    """The stage with FROM's checkpoints in place of the stages that it starts from.

    It gets a folder of its own, `runs/<scale>-from-<name>/`; what it takes besides is shared with
    the stage that starts from nothing but the pipeline.
    """
    from posttrain.start import find_checkpoint

    names = [named.strip() for named in given.split(",")]
    if not all(names):
        raise UserError(f"FROM={given}: an empty name; write names with single commas between")
    starts = [_stage(find_checkpoint(named)) for named in names]
    joined = "+".join(start.stage for start in starts)
    return replace(
        run.started_from(starts),
        scale=f"{run.scale}-from-{joined}",
        arguments=f"{run.arguments} FROM={shlex.quote(given)}",
    )


def _stage(checkpoint: "Checkpoint") -> CheckpointStage:
    if checkpoint.repository:
        name = checkpoint.named.replace("/", "--")
    else:
        folder = checkpoint.folder.resolve()
        place = hashlib.blake2b(str(folder).encode(), digest_size=3).hexdigest()
        name = f"{folder.parent.name if folder.name == 'hf' else folder.name}-{place}"
    return CheckpointStage(
        stage=name,
        scale="from",
        arguments=f"FROM={shlex.quote(checkpoint.named)}",
        recipe=checkpoint,
        file=checkpoint.folder / "config.json",
        rerun_on_change=True,  # a link costs nothing; the stage that takes it is asked for itself
    )
