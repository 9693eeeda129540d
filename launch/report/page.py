"""One self-contained page of all stages, and the table that `make` ends with."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ground.files import write_text
from launch.recipe.tables import load_sources
from launch.report.results import (
    CLEANING,
    Row,
    StageResult,
    by_category,
    cleaning_rows,
    collect,
    counted,
    mixture_rows,
    summary_rows,
)
from launch.report.terminal import print_table_of
from launch.run.folder import StageRun, runs_root


@dataclass
class Section:
    """A part of the page; `tables` are {title, columns, rows, open}, `samples` {title, text}."""

    id: str
    title: str
    note: str = ""
    charts: list[str] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)

    def chart(self, svg: str | None) -> None:
        if svg:
            self.charts.append(svg)

    @property
    def is_empty(self) -> bool:
        return not (self.charts or self.tables or self.samples)


def page(run: StageRun) -> Path:
    """The path of a run's report: beside the stages' folders, where users look for it."""
    return runs_root() / run.scale / "report.html"


def make_report(run: StageRun) -> dict[str, Any]:
    """Write the page; returns the manifest's results."""
    import jinja2

    stages = collect(run)
    sections = [make(stages) for make in SECTIONS]
    sections = [section for section in sections if not section.is_empty]
    template = Path(__file__).with_name("page.html.jinja").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    versions = {name: v for stage in stages for name, v in stage.manifest["versions"].items()}
    last = stages[-1].manifest
    text = environment.from_string(template).render(
        scale=run.arguments,
        commit=last["git_commit"],
        versions=", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
        contents=[("stages", "Stages"), *((s.id, s.title) for s in sections)],
        summary_columns=list(SUMMARY),
        summary=[
            {"stage": row["stage"], "cells": cells(row), "scores": scores_text(row["scores"])}
            for row in summary_rows(stages)
        ],
        sections=sections,
        trained_on=trained_on(stages),
    )
    write_text(page(run), text)
    return {"page": str(page(run)), "stages": [stage.name for stage in stages]}


# Columns of the table of all stages: the key of a row, and how its value is shown.
SUMMARY = {
    "seconds": ("seconds", "{:.0f}"),
    "tokens": ("tokens", "{:,}"),
    "tokens/s": ("tokens_per_second", "{:,.0f}"),
    "loss": ("loss", "{:.3f}"),
    "bits/byte": ("bits_per_byte", "{:.3f}"),
    "unigram": ("unigram", "{:.3f}"),
}


def cells(row: Row) -> list[str]:
    """The values of SUMMARY as text, empty where a stage has none."""
    return ["" if row[key] is None else form.format(row[key]) for key, form in SUMMARY.values()]


def scores_text(scores: Row) -> str:
    """Scores by name, as text; {before, after} of a stage as `before -> after`."""
    if scores.keys() == {"before", "after"}:
        before, after = scores["before"], scores["after"]
        return ", ".join(
            f"{name.replace('_', ' ')} "
            + (f"{number(before[name])} -> " if name in before else "")
            + number(value)
            for name, value in after.items()
        )
    return ", ".join(f"{name.replace('_', ' ')} {number(value)}" for name, value in scores.items())


def number(value: float) -> str:
    return f"{value:.2f}"


def training(stages: Sequence[StageResult]) -> Section:
    from launch.report.charts import curves

    pretraining = [stage for stage in stages if stage.run.kind == "pretrain"]
    section = Section("pretraining", "Pretraining and long context")
    for key, label in (
        ("loss", "loss, nats a token"),
        ("lr", "learning rate"),
        ("grad_norm", "gradient norm before clipping"),
        ("embedding_norm", "mean L2 norm of an embedding"),
    ):
        section.chart(curves(pretraining, key, label))
    return section


def domains(stages: Sequence[StageResult]) -> Section:
    from launch.report.charts import bits_per_byte

    note = "Held-out text that no stage trains on; dotted: a unigram model of the same mixture."
    section = Section("domains", "Bits per byte by domain", note)
    section.chart(bits_per_byte(stages))
    return section


def mixtures(stages: Sequence[StageResult]) -> Section:
    from launch.report.charts import mixture

    note = "Planned: the recipe's weights. Realised: what the sampler delivered."
    section = Section("mixture", "Mixture, planned and realised", note)
    category_of: dict[str, str] = {name: row.category for name, row in load_sources().items()}
    for stage in stages:  # the held-out stage knows the user's own sources too
        category_of |= getattr(stage.run.recipe, "categories", {})
    for name, rows in mixture_rows(list(stages)).items():
        section.chart(mixture(by_category(rows, category_of), name))
        cells = [
            [r["source"], f"{r['planned']:.3%}", f"{r['realised']:.3%}", f"{r['tokens']:,}"]
            for r in rows
        ]
        columns = ["source", "planned", "realised", "tokens"]
        section.tables.append({"title": name, "columns": columns, "rows": cells, "open": False})
    return section


def cleaning(stages: Sequence[StageResult]) -> Section:
    note = "Documents before and after each step that left some out or changed some."
    section = Section("cleaning", "Cleaning", note)
    for stage in stages:
        rows = cleaning_rows(stage.manifest.get("shards", {}))
        if rows:
            cells = [
                [f"{cell:,}" if isinstance(cell, int) else cell for cell in row.values()]
                for row in rows
            ]
            columns = list(CLEANING)
            section.tables.append(
                {"title": stage.name, "columns": columns, "rows": cells, "open": True}
            )
    return section


# Charts of post-training: title, and the metrics that share its axes, by the start of their names.
POSTTRAINING = {
    "held-out prompts: mode compliance, tools, tasks": ("think_", "no_think_", "tool_"),
    "rewards of chosen and rejected": ("rewards/chosen", "rewards/rejected"),
    "reward margin": ("rewards/margins",),
    "reward accuracy": ("rewards/accuracies",),
}


def posttraining(stages: Sequence[StageResult]) -> Section:
    from launch.report.charts import curves, lines

    note = "Loss: nats a trained token in mid-training and SFT; APO's own loss is 1.0 at its start."
    section = Section("posttraining", "Post-training", note)
    for stage in stages:
        if stage.run.kind == "posttrain":
            section.chart(curves([stage], "loss", "loss", over="step"))
            keys = dict.fromkeys(key for line in stage.metrics for key in line)
            for title, starts in POSTTRAINING.items():
                found = [key for key in keys if key.startswith(starts)]
                section.chart(lines(stage, found, f"{stage.name}: {title}"))
    return section


def needles(stages: Sequence[StageResult]) -> Section:
    from launch.report.charts import needles as chart

    section = Section("needles", "Needles in a haystack", "At a small scale they stay at chance.")
    for stage in stages:
        if rows := stage.manifest.get("needle"):
            section.chart(chart(rows, f"{stage.name}, chance {rows[0]['chance']:.0%}"))
    return section


def evaluation(stages: Sequence[StageResult]) -> Section:
    from launch.report.charts import points_with_intervals

    section = Section("evaluation", "Evaluation")
    for stage in stages:
        rows: list[Row] = stage.manifest.get("evaluation", [])
        for model in dict.fromkeys(row["model"] for row in rows):
            own = [row for row in rows if row["model"] == model]
            section.chart(points_with_intervals(own, model))
            columns = ["task", "metric", "score", "95 % interval", "chance", "published", "items"]
            section.tables.append(
                {"title": model, "columns": columns, "rows": [_score(r) for r in own], "open": True}
            )
    return section


def _score(row: Row) -> list[str]:
    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    interval = f"{percent(row['low'])} to {percent(row['high'])}"
    return [
        row["task"], row["metric"], percent(row["value"]), interval,
        percent(row.get("chance")), percent(row.get("published")), str(row["items"]),
    ]  # fmt: skip


def samples(stages: Sequence[StageResult]) -> Section:
    section = Section("samples", "One unedited sample a stage")
    for stage in stages:
        if text := stage.manifest.get("sample"):
            section.samples.append({"title": stage.name, "text": text})
    return section


SECTIONS = (training, domains, mixtures, cleaning, posttraining, needles, evaluation, samples)


def show(run: StageRun) -> None:
    """The table of all stages, and where to go from here."""
    stages = collect(run)
    rows = summary_rows(stages)
    lines = [f"{r['stage']}: {text}" for r in rows if (text := scores_text(r["scores"]))]
    lines += [f"trained on: {where}" for where in trained_on(stages)]
    release = run.folder.with_name("release")
    arguments = "" if run.scale == os.environ.get("SCALE") else f" {run.arguments}"
    lines += [
        f"report:  {os.path.relpath(page(run))}",
        f"release: {os.path.relpath(release)}, a transformers folder",
        f"talk:    make chat{arguments}",
    ]
    seconds = f"{sum(stage.seconds for stage in stages):.0f}"
    title = f"all stages at {run.arguments}"
    total = ["all", seconds, *[""] * (len(SUMMARY) - 1)]
    table = [[row["stage"], *cells(row)] for row in rows]
    print_table_of(("stage", *SUMMARY), table, title, lines, total=total)


def trained_on(stages: Sequence[StageResult]) -> list[str]:
    """The user's own text that the stages read: source, path, documents and bytes."""
    found: dict[str, str] = {}
    for stage in stages:
        for name, path in stage.manifest.get("own_text", {}).items():
            shard = stage.manifest["shards"][name]
            size = f"{shard['documents']:,} documents, {shard['bytes']:,} bytes"
            if counts := counted(shard):
                size += f"; {counts}"
            found[name] = f"{path} (source {name}): {size}"
    return list(found.values())
