"""`make replay`: what the model sees at a step, from the order and the shards alone."""

import json
from dataclasses import asdict

from ground.errors import UserError
from ground.files import read_json_lines
from launch.run.folder import StageRun
from launch.stages.pretrain import PretrainStage
from launch.tools.order import PretrainOrder, SeenPart, SeenWindow

MOST_WINDOWS, MOST_CHARACTERS = 8, 160  # that are printed, of a step and of a document


def replay(run: StageRun, step: int, shows_all: bool, as_json: bool) -> None:
    """Print a step's batch: some of its windows, or all."""
    if not isinstance(run, PretrainStage):
        raise UserError(f"{run.stage}: trains nothing; STAGE= names one of the training stages")
    order = PretrainOrder(run)
    trace, logged = order.trace, logged_hash(run, step)
    planned = trace.batch_hash(step)
    if as_json:
        windows = [asdict(window) for window in order.step(step)]
        said = {"stage": run.stage, "step": step, "batch_hash": planned, "logged": logged}
        print(json.dumps({**said, "windows": windows}, ensure_ascii=False))
        return
    first = (step - run.first_step - 1) * trace.windows_a_step
    last, size = first + trace.windows_a_step - 1, trace.sequence_length
    print(f"{run.stage}, step {step:,}: samples {first:,} to {last:,}, of {size:,} tokens each")
    for number, window in enumerate(order.step(step)):
        if number == MOST_WINDOWS and not shows_all:
            more = trace.windows_a_step - number
            print(f"\n... and {more:,} windows more; ALL=1 prints them, JSON=1 as JSON")
            break
        _print(window, shows_all)
    print(f"\n{_compared(planned, logged)}")


def logged_hash(run: StageRun, step: int) -> str | None:
    """What the run wrote down of a step's batch; None where it did not."""
    lines = read_json_lines(run.folder / "metrics.jsonl")
    return next((line.get("batch_hash") for line in lines if line.get("step") == step), None)


def _compared(planned: str, logged: str | None) -> str:
    if logged is None:
        return f"batch_hash {planned}; no run has logged this step"
    said = "as the run logged it" if planned == logged else f"BUT THE RUN LOGGED {logged}"
    return f"batch_hash {planned}, {said}"


def _print(window: SeenWindow, is_whole: bool) -> None:
    print(f"\n[{window.place}] {window.source}, window {window.window:,}, epoch {window.epoch + 1}")
    for part in window.documents:
        outside = {"before": part.before, "after": part.after}
        rest = " and ".join(f"{tokens:,} {side}" for side, tokens in outside.items() if tokens)
        print(
            f"  {place_of(part.file, part.row, part.shard, part.document)}: {part.tokens:,} tokens, "
            + (f"{rest} the window" if rest else "whole")
        )
        print(f"    {on_a_line(part.text, is_whole)}")


def place_of(file: str, row: int | None, shard: str, document: int) -> str:
    """Where a document is."""
    return f"{file}{'' if row is None else f':{row}'} ({shard}, document {document:,})"


def on_a_line(text: str, is_whole: bool = False) -> str:
    """A text on one line; the middle of a long one is left out."""
    text, half = text.replace("\n", "\\n"), MOST_CHARACTERS // 2
    is_short = is_whole or len(text) <= MOST_CHARACTERS
    return text if is_short else f"{text[:half]} ... {text[-half:]}"
