"""Charts of a report as SVG: text stays text, colours are the page's, so that it is read in the dark too."""

import io
import re
import textwrap
from collections.abc import Sequence
from html import escape
from math import nan
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from launch.report.document import Chart, Series, series
from launch.report.results import Row

# After Okabe and Ito, whom colour-blind readers can follow, each at least 3 : 1 on white; the page has
# lighter ones for the dark by the same names, --c0 and so on.
COLOURS = ("#0072B2", "#B26A00", "#00805E", "#A8487F", "#2B7FAE", "#B84A00", "#6E6E6E")
MARKERS = "os^D"
WIDTH = 4.6  # inches: 442 px, whose text of 9 points can be read on a phone


def draw(chart: Chart, title: bool = False) -> str:
    """The chart as an <svg> element; with its `title` drawn where it stands alone."""
    salt = f"{chart.kind} {chart.title}"  # the same chart is the same text
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9, "text.parse_math": False}
    ):
        figure = DRAWN[chart.kind](chart)
        if title:
            figure.suptitle(chart.title, fontsize=10)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), count=1, flags=re.DOTALL)
    text = re.sub(r'<metadata>.*?</metadata>|(?<=<g) id="[^"]*"', "", text, flags=re.DOTALL)
    for number, colour in enumerate(COLOURS):
        text = text.replace(colour.lower(), f"var(--c{number}, {colour})")
    text = text.replace("#000000", "currentColor").replace("<text ", '<text fill="currentColor" ')
    label = escape(described(chart), quote=True)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def described(chart: Chart) -> str:
    """The chart in words: what is drawn, and where each series begins and ends."""
    parts = [f"{chart.title}: {chart.y_label or 'values'} by {chart.x_label or 'name'}"]
    for one in chart.series:
        points = [(x, y) for x, y in zip(one.x, one.y, strict=True) if y is not None]
        if not points:
            continue
        ends = points if chart.kind != "lines" else [points[0], *points[1:][-1:]]
        shape = "{:.1%}" if chart.are_shares else "{:.4g}"
        parts.append(
            f"{one.name}: " + ", ".join(f"{shape.format(y)} at {place(x)}" for x, y in ends)
        )
    return "; ".join(parts)


def place(x: str | float) -> str:
    return x if isinstance(x, str) else f"{x:,.6g}"


def axes_of(height: float = 2.9) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def values(one: Series) -> list[float]:
    return [nan if y is None else y for y in one.y]


def _legend(figure: Figure, names: int) -> None:
    """Below the axes, two names a line."""
    if names > 1:
        lines = -(-names // 2)
        width, height = figure.get_size_inches()
        figure.set_size_inches(width, height + 0.17 * lines)
        figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=2)


def _lines(chart: Chart) -> Figure:
    figure, axes = axes_of()
    colours = -1
    for one in chart.series:
        colours += not one.dotted
        few = len(one.x) < 30
        axes.plot(
            one.x, values(one), ":" if one.dotted else "-", color=COLOURS[colours % len(COLOURS)],
            linewidth=1.2 if few or one.dotted else 0.8, markersize=3,
            marker=MARKERS[colours // len(COLOURS) % 4] if few else None,
            label=None if one.dotted else one.name,
        )  # fmt: skip
        if one.low:
            colour = COLOURS[colours % len(COLOURS)]
            axes.fill_between(one.x, one.low, one.high, color=colour, alpha=0.12, linewidth=0)
    if any(isinstance(x, str) for one in chart.series for x in one.x):
        axes.tick_params(axis="x", labelrotation=25, labelsize=8)
    axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
    _legend(figure, sum(not one.dotted for one in chart.series))
    return figure


def _bars(chart: Chart) -> Figure:
    names = list(chart.series[0].x)
    figure, axes = axes_of(0.5 * len(names) + 0.7)
    wide = 0.8 / len(chart.series)
    for number, one in enumerate(chart.series):
        places = [place - 0.4 + wide * (number + 0.5) for place in range(len(names))]
        colour = COLOURS[6] if number == 0 else COLOURS[number - 1]
        bars = axes.barh(places, [100 * y for y in values(one)], wide, label=one.name, color=colour)
        axes.bar_label(bars, fmt="%.1f%%", padding=2, fontsize=8)
    axes.set_yticks(range(len(names)), [str(name) for name in names])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(xlabel=chart.x_label)
    _legend(figure, len(chart.series))
    return figure


def _grid(chart: Chart) -> Figure:
    figure, axes = axes_of(2.4)
    cells = [values(one) for one in chart.series]
    image = axes.imshow(cells, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(cells[0])), [place(length) for length in chart.series[0].x])
    axes.set_yticks(range(len(cells)), [one.name for one in chart.series])
    axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
    figure.colorbar(image, label="found")
    return figure


def _intervals(chart: Chart) -> Figure:
    """Points with their intervals by name; series without are marks: | and diamonds."""
    names = [textwrap.shorten(str(name), 28, placeholder="…") for name in chart.series[0].x]
    figure, axes = axes_of(0.3 * len(names) + 0.8)
    places = {name: place for place, name in enumerate(chart.series[0].x)}
    measured = sum(bool(one.low) for one in chart.series)
    for number, one in enumerate(chart.series):
        shift = 0.3 * (number - (measured - 1) / 2) if one.low else 0.0
        at = [places[name] + shift for name in one.x]
        colour = COLOURS[number] if one.low else COLOURS[(5, 6)[(number - measured) % 2]]
        for place, low, high in zip(at, one.low, one.high, strict=False):
            axes.plot([low, high], [place] * 2, color=colour, linewidth=2)
        mark = "o" if one.low else "|D"[(number - measured) % 2]
        size = 8 if mark == "|" else 4
        axes.plot(values(one), at, mark, color=colour, markersize=size, label=one.name)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel=chart.x_label)
    if chart.are_shares:
        axes.set_xlim(0, 1)
    _legend(figure, len(chart.series))
    return figure


DRAWN: dict[str, Any] = {"lines": _lines, "bars": _bars, "grid": _grid, "intervals": _intervals}


def mixture_chart(rows: Sequence[Row], title: str) -> Chart:
    """Planned against realised share of each category."""
    names = [row["category"] for row in rows]
    both = tuple(series(key, names, [row[key] for row in rows]) for key in ("planned", "realised"))
    return Chart("bars", title, "% of the stage's tokens", "", both, are_shares=True)


def needle_chart(rows: Sequence[Row], title: str) -> Chart:
    """Share of needles found, depth by length; the colour bar begins at 0, chance is in the title."""
    lengths = sorted({row["length"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    share = {(row["depth"], row["length"]): row["hits"] / row["of"] for row in rows}
    grid = tuple(
        series(f"{depth:.0%}", lengths, [share.get((depth, length)) for length in lengths])
        for depth in depths
    )
    return Chart("grid", title, "tokens", "depth of the needle", grid, are_shares=True)
