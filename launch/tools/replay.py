"""`make replay`: what the model sees at a step, from the order and the shards alone."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice

from ground.errors import UserError
from ground.files import read_json_lines
from launch.run.folder import StageRun
from launch.stages.posttrain import PosttrainStage
from launch.stages.pretrain import PretrainStage
from launch.tools.chat_order import PosttrainOrder, SeenRow
from launch.tools.order import PretrainOrder, SeenWindow

MOST_WINDOWS, MOST_CHARACTERS = 8, 160  # that are printed, of a step and of a document


def replay(run: StageRun, step: int, shows_all: bool, as_json: bool) -> None:
    """Print a step's batch: some of its windows, or all."""
    order = order_of(run)
    planned, logged = order.batch_hash(step), logged_hash(run, step)
    rows: Iterator[SeenWindow | SeenRow] = iter(order.step(step))
    if as_json:
        windows = [asdict(window) for window in rows]
        said = {"stage": run.stage, "step": step, "batch_hash": planned, "logged": logged}
        print(json.dumps({**said, "windows": windows}, ensure_ascii=False))
        return
    size = order.rows_of(step)
    print(f"{run.stage}, step {step:,}: {size:,} {order.unit} {order.described(step)}")
    for window in islice(rows, None if shows_all else MOST_WINDOWS):
        if isinstance(window, SeenWindow):
            _print(window, shows_all)
        else:
            _print_row(window, shows_all)
    if size > MOST_WINDOWS and not shows_all:
        print(f"\n... and {size - MOST_WINDOWS:,} more; ALL=1 prints them, JSON=1 as JSON")
    print(f"\n{_compared(planned, logged)}")


def order_of(run: StageRun) -> PretrainOrder | PosttrainOrder:
    if isinstance(run, PretrainStage):
        return PretrainOrder(run)
    if isinstance(run, PosttrainStage):
        return PosttrainOrder(run)
    raise UserError(f"{run.stage}: trains nothing; STAGE= names one of the training stages")


def _print_row(row: SeenRow, is_whole: bool) -> None:
    print(f"\n[{row.place}] row {row.row:,} of data/, epoch {row.epoch + 1}")
    for chat in row.documents:
        trained = f"{chat.trained_tokens:,} of {chat.tokens:,} tokens trained"
        print(f"  {chat.split} ({chat.file}:{chat.row}): {trained}")
        for name, text in chat.texts.items():
            print(f"    {name}{': ' * bool(name)}{on_a_line(text, is_whole)}")


def logged_hash(run: StageRun, step: int) -> str | None:
    """What the run wrote down of a step's batch; None where it did not."""
    lines = read_json_lines(run.folder / "metrics.jsonl", key="step")
    return next((line.get("batch_hash") for line in lines if line["step"] == step), None)


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
            f"  {place_of(part.file, part.row, f'{part.shard}, document {part.document:,}')}: "
            f"{part.tokens:,} tokens, " + (f"{rest} the window" if rest else "whole")
        )
        print(f"    {on_a_line(part.text, is_whole)}")


def place_of(file: str, row: int | None, inside: str) -> str:
    """Where a document is."""
    return f"{file}{'' if row is None else f':{row}'} ({inside})"


def on_a_line(text: str, is_whole: bool = False) -> str:
    """A text on one line; the middle of a long one is left out."""
    text, half = text.replace("\n", "\\n"), MOST_CHARACTERS // 2
    is_short = is_whole or len(text) <= MOST_CHARACTERS
    return text if is_short else f"{text[:half]} ... {text[-half:]}"
