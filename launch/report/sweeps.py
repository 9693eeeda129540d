"""Merge sweeps and ablations that were run beside the stages."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ground.files import read_json_object
from launch.report.document import Cell, Chart, Section, Table, series

# Shares of the post-training scores that a merge may cost, and what figures call them.
SHARES = {
    "think_well_formed": "/think well-formed",
    "no_think_well_formed": "/no_think well-formed",
    "tool_call_parses": "tool call parses",
    "tool_listed": "tool is listed",
}
AGAIN = "remove it, or run the tool again"


def files(runs: Path) -> list[Path]:
    """What the tools have written below runs/<scale>/."""
    return sorted((*runs.glob("merge-sweep/*.json"), *runs.glob("ablations/*.json")))


def curves(points: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float, float, float]]]:
    """{name: (share, low, high) for each weight}, with 95 % intervals."""
    from eval_tasks.intervals import wilson

    found: dict[str, list[tuple[float, float, float]]] = {}
    for point in points:
        rows = point["needle"]
        hits, asked = (sum(row[key] for row in rows) for key in ("hits", "of"))
        counts = {"needles found": (hits, asked)}
        for key, name in SHARES.items():
            counts[name] = round(point["scores"][key] * point["prompts"]), point["prompts"]
        for name, (hits, of) in counts.items():
            found.setdefault(name, []).append((hits / of, *wilson(hits, of)))
    return found


def sweep_section(runs: Path) -> Section:
    """The soup merged with each partner that was tried."""
    drawn, tables = [], []
    for file in sorted(runs.glob("merge-sweep/*.json")):
        report = read_json_object(file, AGAIN)
        points, title = report["points"], f"{report['soup']} with {file.stem}"
        weights = [point["weight"] for point in points]
        shares = {name: list(zip(*of, strict=True)) for name, of in curves(points).items()}
        label = f"weight of the partner (recipe: {report['recipe_weight']:g})"
        lines = tuple(
            series(name, weights, middle, low=low, high=high)
            for name, (middle, low, high) in shares.items()
        )
        bits = [point["bits_per_byte"] for point in points]
        drawn.append(Chart("lines", title, label, "share, 95 % interval", lines, are_shares=True))
        line = (series("bits per byte", weights, bits),)
        drawn.append(Chart("lines", f"{title}: long text", label, "bits per byte", line))
        columns = ("weight", *shares, "bits per byte")
        rows = tuple(zip(weights, *(of[0] for of in shares.values()), bits, strict=True))
        formats = ("g", *[".1%"] * len(shares), ".3f")
        tables.append(Table(title, columns, formats, rows))
    return Section("sweep", "Merge sweep", "", tuple(drawn), tuple(tables))


def verdict(baseline: dict[str, float], variant: dict[str, float]) -> str:
    """`no difference` where two intervals overlap, else which way and how far the mean moved."""
    if variant["low"] <= baseline["high"] and baseline["low"] <= variant["high"]:
        return "no difference"
    return f"{variant['mean'] / baseline['mean'] - 1:+.1%}"


def ablation_section(runs: Path) -> Section:
    """One change each against its baseline, with intervals over the seeds."""
    drawn, tables = [], []
    for file in sorted(runs.glob("ablations/*.json")):
        report = read_json_object(file, AGAIN)
        variants, name = report["variants"], report["ablation"]
        bits = [of["bits_per_byte"] for of in variants.values()]
        mean, low, high = ([of[key] for of in bits] for key in ("mean", "low", "high"))
        line = series("bits per byte", list(variants), mean, low=tuple(low), high=tuple(high))
        drawn.append(Chart("intervals", name, "bits per byte, 95 % interval", "", (line,)))
        rows = list[tuple[Cell, ...]]()
        for variant, figures in variants.items():
            for metric, of in figures.items():
                says = "" if variant == "baseline" else verdict(variants["baseline"][metric], of)
                named = metric.replace("_", " ")
                rows.append((variant, named, of["mean"], of["low"], of["high"], says))
        columns = ("variant", "figure", "mean", "from", "to", "against the baseline")
        title = f"{name}: {report['question']} ({report['tokens']:,} tokens, {len(report['seeds'])} seeds)"
        formats = ("", "", ",.4g", ",.4g", ",.4g", "")
        tables.append(Table(title, columns, formats, tuple(rows), is_open=False))
    return Section("ablations", "Ablations", "", tuple(drawn), tuple(tables))
