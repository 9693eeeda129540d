"""Tables for the terminal, all printed in one way."""

import os
import sys
from collections.abc import Sequence
from typing import Any

# A pipe is taken to have 80 columns, and cut columns cannot be read.
COLUMNS_OF_A_PIPE = 120


def print_table_of(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    title: str = "",
    lines: Sequence[str] = (),
    *,
    left: Sequence[str] = (),
    bold: int | None = None,
    total: Sequence[str] = (),
    width: int = COLUMNS_OF_A_PIPE,
) -> None:
    """A table and the lines below it. The first column and those of `left` are flush left; `bold`
    is a row to mark, `total` a last row under a rule, `width` what a pipe is taken to have."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, show_lines=any("\n" in cell for row in rows for cell in row))
    for number, column in enumerate(columns):
        is_left = number == 0 or column in left
        table.add_column(column, justify="left" if is_left else "right", overflow="fold")
    for number, row in enumerate(rows):
        table.add_row(*row, style="bold" if number == bold else None)
    if total:
        table.add_section()
        table.add_row(*total)
    knows_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(width=None if knows_width else width)
    console.print(table)
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def percent(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:.{digits}%}"


def needles_by_length(rows: Sequence[dict[str, Any]]) -> str:
    """One line: the share of needles found at each length, with its interval."""
    from eval_tasks.intervals import summed

    if not rows:
        return "needles: left out, the held-out text has no room for them"
    parts = [
        f"{cell['length']}: {cell['hits'] / cell['of']:.0%} ({cell['low']:.0%}-{cell['high']:.0%})"
        for cell in summed(rows, "length")
    ]
    return f"needles found (chance {rows[0]['chance']:.0%}): " + ", ".join(parts)


def told_apart(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    """The task of each (model, task, suite); with its suite where a model has the task twice, as in
    both modes."""
    keys = [(model, task) for model, task, _ in rows]
    return [
        task if keys.count((model, task)) == 1 else f"{task}, {suite}"
        for model, task, suite in rows
    ]


def print_scores(rows: Sequence[dict[str, Any]]) -> None:
    """The table of an evaluation, one row per model and benchmark."""
    columns = ("model", "benchmark", "score", "interval", "chance", "published", "items")
    cells = []
    names = told_apart([(row["model"], row["name"], row["suite"]) for row in rows])
    for row, name in zip(rows, names, strict=True):
        if "error" in row:
            cells.append([row["model"], name, "left out", "", "", "", ""])
            continue
        interval = f"{100 * row['low']:.0f}-{100 * row['high']:.0f}"
        shares = [percent(row[key]).rstrip("%") for key in ("value", "chance", "published")]
        cells.append([row["model"], name, shares[0], interval, *shares[1:], str(row["items"])])
    title = "evaluation: score in %, 95 % interval"
    print_table_of(columns, cells, title, left=("benchmark",))
