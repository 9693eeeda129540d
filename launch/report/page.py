"""report.html, one self-contained page of all stages, what it shows as report.json and a picture of it
to share; and the table that `make` ends with."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ground.files import read_json_object, write_json, write_text
from launch.recipe.changes import flatten
from launch.report.document import Report, Section, StageFigures, shown
from launch.report.results import Row, StageResult, collect, counted, summary_rows
from launch.report.terminal import print_table_of
from launch.run.folder import StageRun, runs_root

NAME = "SmolLM3"  # where no release names the model


def page(run: StageRun) -> Path:
    """The path of a run's report: beside the stages' folders, where users look for it."""
    return runs_root() / run.scale / "report.html"


def files_of(run: StageRun) -> list[Path]:
    """What a report leaves: the page, its values, its picture."""
    return [page(run).with_suffix(ending) for ending in (".html", ".json", ".png")]


def lost(run: StageRun) -> str | None:
    """What of a report is missing, or newer than it: a sweep, an ablation, another PRICE=."""
    from launch.report.cost import price_given
    from launch.report.sweeps import files

    html, values, _ = paths = files_of(run)
    for file in paths:
        if not (file.is_file() and file.stat().st_size):
            return f"{file}: no such file"
    for file in files(html.parent):
        if file.stat().st_mtime_ns > html.stat().st_mtime_ns:
            return f"{html}: older than {file}"
    price = price_given()
    if price is not None and read_json_object(values, "remove it").get("price") != price:
        return f"{html}: made with another PRICE="
    return None


def make_report(run: StageRun) -> dict[str, Any]:
    """Write page, JSON and picture; returns the manifest's results."""
    from launch.report.picture import write_picture

    stages = collect(run)
    report = report_of(stages, page(run).parent, run.arguments)
    html, values, picture = files_of(run)
    write_json(values, report.as_json())
    write_picture(report, picture)
    write_text(html, render(report))
    return {"page": str(html), "stages": [stage.name for stage in stages]}


def report_of(stages: Sequence[StageResult], runs: Path, arguments: str) -> Report:
    """What the page of finished stages says; `runs` is the folder that sweeps and ablations are in."""
    from launch.report import sections
    from launch.report.cost import cost_of, cost_section, price_given
    from launch.report.peers import peer_section
    from launch.report.sweeps import ablation_section, sweep_section

    price, scores = price_given(), sections.scores_of(stages)
    parts = [make(stages) for make in (sections.training, sections.domains, sections.mixtures)]
    parts += [sections.cleaning(stages), sections.posttraining(stages), sections.needles(stages)]
    figures = []
    for stage, row in zip(stages, summary_rows(list(stages)), strict=True):
        own: dict[str, Any] = row.pop("scores")
        both = own if own.keys() == {"before", "after"} else {"before": {}, "after": own}
        recipe, cost = flatten(stage.recipe), cost_of(stage, price)
        figures.append(StageFigures(row.pop("stage"), **row, **both, recipe=recipe, cost=cost))
    costs = [(one.name, one.seconds, one.cost) for one in figures if one.cost]
    found = [n for s in stages if (n := s.manifest.get("parameters"))]
    parameters = found[-1] if found else None
    parts += [sections.evaluation(scores), peer_section(scores, parameters)]
    parts += [sweep_section(runs), ablation_section(runs), cost_section(costs)]
    parts.append(sections.samples(stages))
    names = [name for one in figures if (name := one.recipe.get("model_name"))]
    return Report(
        version=1,
        name=names[-1] if names else NAME,
        arguments=arguments,
        commit=stages[-1].manifest["git_commit"],
        versions=dict(sorted((k, v) for s in stages for k, v in s.manifest["versions"].items())),
        trained_on=tuple(trained_on(stages)),
        price=price,
        parameters=parameters,
        stages=tuple(figures),
        scores=scores,
        sections=tuple(section for section in parts if not section.is_empty),
    )


def render(report: Report) -> str:
    """The page of a report."""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return page_of(
        title=f"smollm3-recipe, {report.arguments}",
        heading="smollm3-recipe",
        subtitle=f"{report.arguments}, commit {report.commit or 'unknown'}, {versions}",
        lines=[f"Trained on {text}." for text in report.trained_on],
        summary=[
            {
                "stage": one.name,
                "cells": cells(vars(one)),
                "scores": scores_text({"before": one.before, "after": one.after}),
            }
            for one in report.stages
        ],
        sections=report.sections,
    )


def page_of(sections: Sequence[Section], **values: Any) -> str:
    """HTML in the report's own look; the template names the values."""
    import jinja2

    from launch.report.charts import draw

    template = Path(__file__).with_name("page.html.jinja").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template).render(
        sections=sections, summary_columns=list(SUMMARY), draw=draw, **values
    )


# Columns of the table of all stages: the key of a row, and how its value is shown.
SUMMARY = {
    "seconds": ("seconds", ".0f"),
    "tokens": ("tokens", ","),
    "tokens/s": ("tokens_per_second", ",.0f"),
    "loss": ("loss", ".3f"),
    "bits/byte": ("bits_per_byte", ".3f"),
    "unigram": ("unigram", ".3f"),
}


def cells(row: Row) -> list[str]:
    """The values of SUMMARY as text, empty where a stage has none."""
    return [shown(row[key], form) for key, form in SUMMARY.values()]


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


def show(run: StageRun) -> None:
    """The table of all stages, and where to go from here."""
    stages = collect(run)
    rows = summary_rows(stages)
    lines = [f"{r['stage']}: {text}" for r in rows if (text := scores_text(r["scores"]))]
    lines += [f"trained on: {where}" for where in trained_on(stages)]
    release = run.folder.with_name("release")
    arguments = "" if run.scale == os.environ.get("SCALE") else f" {run.arguments}"
    html, values, picture = (os.path.relpath(file) for file in files_of(run))
    lines += [
        f"report:  {html}, its values in {values}, a picture in {picture}",
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
