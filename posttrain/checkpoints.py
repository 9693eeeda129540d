"""Checkpoints that are whole or not there, and the metrics file cut back to the last of them."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def whole_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run folder by step: folders named by a number appear by renaming alone."""
    found = [path for path in (folder / "checkpoints").glob("*") if path.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name))


def save_whole(trainer: Any, trial: Any) -> None:
    """Trainer's checkpoint of this step as `<output_dir>/<step>`, written aside and then renamed.

    Trainer writes into the final folder: killed there, it would resume from half a checkpoint.
    TRL's own method is passed over: it adds a model card to each.
    """
    target = Path(trainer.args.output_dir)
    aside = target / ".partial"
    if trainer.is_world_process_zero():
        shutil.rmtree(aside, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.args.output_dir = str(aside)
    try:
        Trainer._save_checkpoint(trainer, trainer.model, trial)
    finally:
        trainer.args.output_dir = str(target)
    trainer.accelerator.wait_for_everyone()
    step = trainer.state.global_step
    if trainer.is_world_process_zero():
        replace_folder(aside / f"{PREFIX_CHECKPOINT_DIR}-{step}", target / str(step))
        shutil.rmtree(aside, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


def replace_folder(new: Path, target: Path) -> None:
    """Put a finished folder in the place of `target`."""
    shutil.rmtree(target, ignore_errors=True)
    new.rename(target)


def cut_metrics(file: Path, last_step: int) -> None:
    """Drop the lines after `last_step`, which the resumed run writes again, and one cut short."""
    if not file.exists():
        return
    kept = [line for line in file.read_text("utf-8").splitlines() if 0 <= _step(line) <= last_step]
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    aside.write_text("".join(f"{line}\n" for line in kept), "utf-8")
    aside.replace(file)


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except ValueError:
        return -1
