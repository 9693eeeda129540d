"""Checkpoints that are whole or absent."""

import shutil
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ground.checksums import seal_together
from ground.files import replace_folder
from posttrain.metrics import Metrics


def save_whole(trainer: Any, trial: Any) -> None:
    """Trainer's checkpoint of this step as `<output_dir>/<step>`, written aside and then renamed.

    Trainer writes into the final folder: killed there, it would resume from half a checkpoint.
    TRL's own method is skipped, since it adds a model card to each.
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
    step, wait = trainer.state.global_step, trainer.accelerator.wait_for_everyone
    written = aside / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, Metrics) and callback.bar is not None:
            callback.keep(written)
    wait()
    seal_together(written, trainer.args.process_index, trainer.args.world_size, wait)
    if trainer.is_world_process_zero():
        replace_folder(written, target / str(step))
        shutil.rmtree(aside, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
