"""metrics.jsonl with one line per logged step, the progress bar, and scores every few steps."""

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ground.batch_hash import shown
from ground.errors import UserError
from ground.files import drop_stopped, note_stopped, write_text
from ground.processes import Agreement

# Trainer's and TRL's names of what a line holds besides step, tokens and speed.
RENAMED = {"learning_rate": "lr"}
LEFT_OUT = (
    "epoch",
    "num_tokens",
    "num_input_tokens_seen",
    "train_runtime",
    "train_tokens_per_second",
)


@dataclass(eq=False)
class Metrics(TrainerCallback):
    """Writes metrics to `file`; `score` (may be None) is called at every `score_steps`.

    All processes score, since a sharded model generates with all of them; one writes.
    """

    file: Path
    stage: str
    tokens_before: int
    score: Callable[[], dict[str, float]] | None
    score_steps: int
    stopping: "StopWhenAsked"  # which has agreed on the batch's hash
    scores: dict[str, float] = field(default_factory=dict)  # until a line takes them
    unsaved: list[str] = field(default_factory=list)  # lines since the last checkpoint
    bar: Any = None  # of the process that writes; None in the others

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        from tqdm import tqdm

        self.last = (time.perf_counter(), state.num_input_tokens_seen)
        if state.is_world_process_zero:
            self.bar = tqdm(
                desc=self.stage,
                initial=state.global_step,
                total=state.max_steps,
                unit="step",
                file=sys.stdout,
                mininterval=0.5 if sys.stdout.isatty() else 20,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        last = state.global_step == state.max_steps  # scored on more prompts after training
        if self.score and not last and state.global_step % self.score_steps == 0:
            begin = time.perf_counter()
            self.scores = self.score()
            control.should_log = True
            self.last = (self.last[0] + time.perf_counter() - begin, self.last[1])

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if self.bar is None or not logs or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise UserError(
                f"{self.stage}: the loss is {logs['loss']} at step {state.global_step}: lower "
                "trl.learning_rate, or look for broken rows; checkpoints stay"
            )
        now, tokens = time.perf_counter(), state.num_input_tokens_seen
        speed = (tokens - self.last[1]) / max(now - self.last[0], 1e-9)
        self.last = (now, tokens)
        line = {
            "step": state.global_step,
            "tokens": self.tokens_before + tokens,
            **{RENAMED.get(name, name): v for name, v in logs.items() if name not in LEFT_OUT},
            "tokens_per_second": round(speed, 1),
            "batch_hash": shown(self.stopping.agreement.last.total()),
        }
        self.unsaved.append(json.dumps(line | self.scores) + "\n")
        with self.file.open("a", encoding="utf-8") as file:
            file.write(self.unsaved[-1])
        self.scores = {}
        self.bar.set_postfix_str(f"loss {logs['loss']:.3f}, {speed:,.0f} tok/s", refresh=False)
        self.bar.update(state.global_step - self.bar.n)

    def keep(self, checkpoint: Path) -> None:
        """Copy the lines since the checkpoint before into this one, from which they can be mended."""
        write_text(checkpoint / self.file.name, "".join(self.unsaved))
        self.unsaved.clear()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()


@dataclass(eq=False)
class StopWhenAsked(TrainerCallback):
    """Saves a checkpoint and ends the training after the step at which a signal came.

    With that all processes add up `trainer.batch_hash`.
    """

    trainer: Any
    is_stopped: bool = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.agreement = Agreement(args.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.agreement(self.trainer.batch_hash) and state.global_step < state.max_steps:
            ends_epoch = args.save_strategy == "epoch" and float(state.epoch).is_integer()
            if state.is_world_process_zero and not (control.should_save or ends_epoch):
                note_stopped(Path(args.output_dir), state.global_step)
            self.is_stopped = control.should_training_stop = control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save &= not self.is_stopped  # Trainer calls it in mid-epoch too; it is saved

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            drop_stopped(Path(args.output_dir), state.global_step)
