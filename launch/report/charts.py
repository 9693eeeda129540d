"""The report's charts, each as SVG text."""

import io
import re
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from launch.report.results import Row, StageResult

# Okabe and Ito's palette: colour-blind readers can tell the colours apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#6E6E6E")


def svg(figure: Figure) -> str:
    """The figure as an <svg> element, without the header that only a file needs."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return re.sub(r"^.*?(?=<svg)", "", text, count=1, flags=re.DOTALL)


def axes_of(width: float = 7.2, height: float = 3.0) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def curves(stages: Sequence[StageResult], key: str, label: str, over: str = "tokens") -> str | None:
    """A metric over tokens or steps, one line per stage; None where no stage has it."""
    drawn = [(stage, *stage.series(key, over)) for stage in stages]
    drawn = [(stage, x, y) for stage, x, y in drawn if y]
    if not drawn:
        return None
    figure, axes = axes_of()
    for index, (stage, x, y) in enumerate(drawn):
        axes.plot(x, y, label=stage.name, color=COLOURS[index % len(COLOURS)], linewidth=1)
    axes.set(xlabel=over, ylabel=label)
    axes.legend(frameon=False, fontsize=8)
    return svg(figure)


def lines(stage: StageResult, keys: Sequence[str], title: str) -> str | None:
    """Several metrics of one stage over its steps; None where it has none of them."""
    if not keys:
        return None
    figure, axes = axes_of()
    for index, key in enumerate(keys):
        colour, marker = COLOURS[index % len(COLOURS)], "os^D"[index // len(COLOURS) % 4]
        x, y = stage.series(key)
        few = len(x) < 30
        axes.plot(
            x, y, label=key, color=colour, linewidth=1, marker=marker if few else None, markersize=3
        )
    axes.set(title=title, xlabel="step")
    axes.legend(frameon=False, fontsize=7, ncols=2)
    return svg(figure)


def mixture(rows: Sequence[Row], title: str) -> str:
    """Planned against realised share of each category."""
    figure, axes = axes_of(height=0.45 * len(rows) + 1)
    places = range(len(rows))
    for offset, key, colour in ((-0.2, "planned", COLOURS[6]), (0.2, "realised", COLOURS[0])):
        shares = [row[key] * 100 for row in rows]
        bars = axes.barh([p + offset for p in places], shares, 0.38, label=key, color=colour)
        axes.bar_label(bars, fmt="%.1f%%", padding=2, fontsize=7)
    axes.set_yticks(list(places), [row["category"] for row in rows])
    axes.invert_yaxis()
    axes.set(title=title, xlabel="% of the stage's tokens")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return svg(figure)


def bits_per_byte(stages: Sequence[StageResult]) -> str | None:
    """One line per domain over the stages; the unigram model's is dotted, in the same colour."""
    scored = [stage for stage in stages if stage.manifest.get("bits_per_byte")]
    if not scored:
        return None
    figure, axes = axes_of(height=3.6)
    names = [stage.name for stage in scored]
    for index, domain in enumerate(scored[-1].manifest["bits_per_byte"]):
        colour = COLOURS[index % len(COLOURS)]
        for model, style in (("model", "-o"), ("unigram", ":")):
            values = [stage.manifest["bits_per_byte"][domain][model] for stage in scored]
            label = domain if model == "model" else None
            axes.plot(names, values, style, color=colour, label=label, markersize=3)
    axes.set(ylabel="bits per byte")
    axes.tick_params(axis="x", labelsize=8)
    axes.legend(frameon=False, fontsize=8, ncols=3)
    return svg(figure)


def needles(rows: Sequence[Row], title: str) -> str:
    """Share of needles found, depth by length; the colour bar begins at 0, chance is in the title."""
    lengths = sorted({row["length"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    share = {(row["depth"], row["length"]): row["hits"] / row["of"] for row in rows}
    grid = [[share.get((depth, length), float("nan")) for length in lengths] for depth in depths]
    figure, axes = axes_of(height=2.6)
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set(title=title, xlabel="tokens", ylabel="depth of the needle")
    figure.colorbar(image, label="found")
    return svg(figure)


def points_with_intervals(rows: Sequence[dict[str, Any]], title: str) -> str:
    """Scores with their intervals, chance and the published value, one line each."""
    figure, axes = axes_of(height=0.32 * len(rows) + 1)
    for place, row in enumerate(rows):
        axes.plot([row["low"], row["high"]], [place, place], color=COLOURS[0], linewidth=2)
        axes.plot(row["value"], place, "o", color=COLOURS[0])
        for key, marker, colour in (("chance", "|", COLOURS[5]), ("published", "D", COLOURS[6])):
            if row.get(key) is not None:
                axes.plot(
                    row[key], place, marker, color=colour, markersize=8 if key == "chance" else 4
                )
    axes.set_yticks(range(len(rows)), [row["task"] for row in rows])
    axes.invert_yaxis()
    axes.set(title=title, xlabel="score; bar: 95 % interval, |: chance, ◆: published", xlim=(0, 1))
    return svg(figure)
