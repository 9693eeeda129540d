"""`make compare A=... B=...`: two runs beside each other, as tables and as one page.

A and B are runs folders (runs/<scale>), folders of single stages in them, or a report.json of either.
Stages are paired by name; two single stages are compared whatever they are called.

    runs/compare/<a>-and-<b>.html
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from math import hypot
from pathlib import Path
from typing import Annotated

import typer

from ground.errors import UserError
from ground.files import write_text
from launch.report.document import (
    Cell,
    Chart,
    Report,
    Score,
    Section,
    Series,
    StageFigures,
    Table,
    read_report,
    series,
)
from launch.report.terminal import print_table_of
from launch.run.folder import runs_root

WHAT = "a runs folder, a stage's folder in it, or a report.json"
MOST_KEYS = 60  # of one stage's recipe: lists of sources differ in hundreds
SCORE_NOTE = (
    "B - A with its 95 % interval by Newcombe's method (10) from both Wilson intervals, as of independent items; "
    "both answer the same ones, which makes it too wide rather than too narrow."
)
MOST_POINTS = 60
Pairs = list[tuple[StageFigures, StageFigures]]


def command(
    a: Annotated[str, typer.Option(envvar="A", help=WHAT)] = "",
    b: Annotated[str, typer.Option(envvar="B", help=WHAT)] = "",
) -> None:
    """Compare two runs: recipes, curves over each other, scores with intervals; a page and tables."""
    from launch.report.page import page_of

    sections = compared(read_run("A", a), read_run("B", b))
    for table in (table for section in sections for table in section.tables):
        left = [name for name, form in zip(table.columns, table.formats, strict=True) if not form]
        print_table_of(table.columns, table.cells(), table.title, left=left)
    if not sections or sections[0].id != "recipes":
        print("recipes: no difference")
    file = runs_root() / "compare" / f"{_slug(a)}-and-{_slug(b)}.html"
    text = page_of(
        sections, title=f"{a} and {b}", heading="Two runs", subtitle=f"A: {a}; B: {b}",
        lines=[], summary=[],
    )  # fmt: skip
    write_text(file, text)
    print(os.path.relpath(file))


def compared(one: Report, other: Report) -> list[Section]:
    """What there is to show of two runs. Raises UserError where they have no stage in common."""
    pairs = paired(one, other)
    found = [recipes(pairs), curves(one, other, pairs), scores(one, other, pairs), stages(pairs)]
    return [section for section in found if not section.is_empty]


def _slug(text: str) -> str:
    parts = Path(text).absolute().with_suffix("").parts[-2:]
    return re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(parts)).strip("-")


def read_run(variable: str, text: str) -> Report:
    """The report of a folder's finished stages, or the one in a file. Raises UserError."""
    from launch.report.page import report_of
    from launch.report.results import read_stages

    path = Path(text)
    if not text:
        raise UserError(f"{variable}=: missing; name {WHAT}")
    if path.is_file():
        return read_report(path, f"{variable}= takes {WHAT}")
    if not path.is_dir():
        raise UserError(f"{variable}={text}: no such file or folder; name {WHAT}")
    if not (found := read_stages(path)):
        raise UserError(f"{variable}={text}: no finished run in it; name {WHAT}")
    return report_of(found, path, text)


def paired(one: Report, other: Report) -> Pairs:
    """Stages of the same name, or the only one of each. Raises UserError where there are none."""
    if len(one.stages) == len(other.stages) == 1:
        return [(one.stages[0], other.stages[0])]
    of_other = {stage.name: stage for stage in other.stages}
    pairs = [(stage, of_other[stage.name]) for stage in one.stages if stage.name in of_other]
    if not pairs:
        names = [", ".join(stage.name for stage in run.stages) for run in (one, other)]
        raise UserError(f"A= and B= have no stage in common ({names[0]}; {names[1]}); name {WHAT}")
    return pairs


def _named(pair: tuple[StageFigures, StageFigures]) -> str:
    return " and ".join(dict.fromkeys(stage.name for stage in pair))


def recipes(pairs: Pairs) -> Section:
    """The values in which the recipes differ."""
    rows = list[tuple[Cell, ...]]()
    for pair in pairs:
        a, b = (stage.recipe for stage in pair)
        keys = [key for key in a | b if a.get(key) != b.get(key)]
        for key in keys[:MOST_KEYS]:
            rows.append((_named(pair), key, *(str(of.get(key, "")) for of in (a, b))))
        if more := len(keys[MOST_KEYS:]):
            rows.append((_named(pair), f"and {more} keys more", "", ""))
    table = Table("recipes differ in", ("stage", "key", "A", "B"), ("",) * 4, tuple(rows))
    return Section("recipes", "Recipes", tables=(table,) if rows else ())


def curves(one: Report, other: Report, pairs: Pairs) -> Section:
    """The charts that both have, A's lines solid and B's dotted in the same colour."""
    names = {b.name: a.name for a, b in pairs}
    of_other = {_renamed(chart.title, names): chart for chart in _line_charts(other)}
    drawn = []
    for chart in _line_charts(one):
        if matching := of_other.get(chart.title):
            theirs = {_renamed(line.name, names): line for line in matching.series}
            both = [
                (
                    _thinned(line),
                    replace(_thinned(theirs[line.name]), name=f"{line.name}, B", dotted=True),
                )
                for line in chart.series
                if line.name in theirs and not line.dotted
            ]
            lines = tuple(line for pair in both for line in pair)
            drawn += [replace(chart, series=lines)] if lines else []
    note = (
        f"Solid: A, dotted: B; a line of more than {MOST_POINTS} points is medians of neighbours."
    )
    return Section("curves", "Curves", note, charts=tuple(drawn))


def _thinned(line: Series) -> Series:
    """So few points that two noisy lines can be told apart."""
    return series(line.name, line.x, line.y, MOST_POINTS)


def _line_charts(run: Report) -> Iterator[Chart]:
    for section in run.sections:
        yield from (chart for chart in section.charts if chart.kind == "lines")


def _renamed(text: str, names: Mapping[str, str]) -> str:
    """A title, or a line's name, that begins with a stage's name, with that of A's stage."""
    head, colon, rest = text.partition(":")
    return f"{names.get(head, head)}{colon}{rest}"


def difference(a: Score, b: Score) -> tuple[float, float, float]:
    """b - a and its 95 % interval, from those of two independent shares (Newcombe 1998, method 10)."""
    middle = b.value - a.value
    low = middle - hypot(b.value - b.low, a.high - a.value)
    return middle, low, middle + hypot(b.high - b.value, a.value - a.low)


def scores(one: Report, other: Report, pairs: Pairs) -> Section:
    """Benchmarks, and figures of post-training, side by side."""
    from launch.report.sections import names_of

    drawn, tables = [], []
    of_other = {_key(score): score for score in other.scores}
    both = [(score, of_other[_key(score)]) for score in one.scores if _key(score) in of_other]
    if both:
        own = [a for a, _ in both]
        names = [f"{a.model}: {name}" for a, name in zip(own, names_of(own), strict=True)]
        lines = [
            Series(
                name, tuple(names), tuple(s.value for s in of),
                tuple(s.low for s in of), tuple(s.high for s in of),
            )
            for name, of in zip("AB", zip(*both, strict=True), strict=True)
        ]  # fmt: skip
        chart = Chart("intervals", "benchmarks", "score, 95 % interval", "", tuple(lines), True)
        drawn.append(chart)
        tables.append(_table("benchmarks", zip(names, both, strict=True)))
    for pair in pairs:
        a, b = (dict(_shares(stage)) for stage in pair)
        if rows := [(name, (a[name], b[name])) for name in a if name in b]:
            tables.append(_table(f"{_named(pair)}: held-out prompts", rows))
    return Section("scores", "Scores", SCORE_NOTE, tuple(drawn), tuple(tables))


def _key(score: Score) -> tuple[str, ...]:
    return (score.model, score.suite, score.task, score.metric)


def _shares(stage: StageFigures) -> Iterator[tuple[str, Score]]:
    """Shares of prompts after a stage of post-training, with Wilson's interval."""
    from eval_tasks.intervals import wilson

    prompts = stage.recipe.get("scores.prompts_at_end")
    for name, value in stage.after.items():
        if prompts and 0 <= value <= 1 and "margin" not in name:
            low, high = wilson(round(value * prompts), prompts)
            yield name, Score(stage.name, name.replace("_", " "), "", value, low, high, prompts)


def _table(title: str, rows: Iterable[tuple[str, tuple[Score, Score]]]) -> Table:
    columns = ("score", "A", "from", "to", "B", "from", "to", "B - A", "from", "to", "differ")
    cells = list[tuple[Cell, ...]]()
    for name, (a, b) in rows:
        middle, low, high = difference(a, b)
        of_each = (a.value, a.low, a.high, b.value, b.low, b.high)
        says = "no difference" if low <= 0 <= high else "yes"
        cells.append((name.replace("_", " "), *of_each, middle, low, high, says))
    return Table(title, columns, ("", *[".1%"] * 6, *["+.1%"] * 3, ""), tuple(cells))


# Figures of a trained stage: the key, how it is shown, and what it is divided by.
FIGURES = {
    "tokens": ("tokens", ",.0f", 1), "loss": ("loss", ".3f", 1),
    "bits per byte": ("bits_per_byte", ".3f", 1), "seconds": ("seconds", ",.0f", 1),
    "tokens/s": ("tokens_per_second", ",.0f", 1),
    "peak memory, GiB": ("peak_memory_bytes", ".2f", 2**30),
}  # fmt: skip


def stages(pairs: Pairs) -> Section:
    """What each trained stage came to, and took."""
    rows = list[tuple[Cell, ...]]()
    for pair in pairs:
        of_both = [{**vars(stage), **(vars(stage.cost) if stage.cost else {})} for stage in pair]
        if any(values["loss"] is not None for values in of_both):
            for name, (key, form, unit) in FIGURES.items():
                found = [values.get(key) for values in of_both]
                if any(value is not None for value in found):
                    cells = [None if v is None else format(v / unit, form) for v in found]
                    rows.append((_named(pair), name, *cells))
    table = Table("trained stages", ("stage", "figure", "A", "B"), ("",) * 4, tuple(rows))
    return Section("stages", "Stages", tables=(table,) if rows else ())
