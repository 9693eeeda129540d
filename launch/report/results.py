"""What the report shows, read from the stages' manifests and metrics; nothing is computed again."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

from ground.errors import UserError
from ground.files import CHECKSUM, read_json_lines, read_json_object, read_record
from launch.recipe.load import read_yaml
from launch.recipe.tables import load_pipeline
from launch.run.folder import StageRun

Row = dict[str, Any]
CLEANING = ("source", "step", "before", "left out", "changed", "after")


@dataclass(frozen=True)
class StageResult:
    """A finished stage: its recipe's values, manifest and lines of metrics.jsonl (none: empty)."""

    name: str
    kind: str
    folder: Path
    recipe: Row
    manifest: Row
    metrics: list[Row]

    @property
    def seconds(self) -> float:
        """From start to finish by the clock, breaks between a kill and a resume included."""
        start, end = (datetime.fromisoformat(self.manifest[key]) for key in ("started", "finished"))
        return (end - start).total_seconds()

    def series(self, key: str, over: str = "step") -> tuple[list[float], list[float]]:
        """(values of `over`, values of `key`) of the lines that have both."""
        lines = [line for line in self.metrics if key in line and over in line]
        return [line[over] for line in lines], [line[key] for line in lines]

    def last(self, key: str) -> Any:
        values = self.series(key)[1]
        return values[-1] if values else None

    def median(self, key: str) -> float | None:
        values = self.series(key)[1]
        return median(values) if values else None


def _metrics(file: Path) -> list[Row]:
    """The lines of a metrics.jsonl. Raises UserError for one that is damaged."""
    remedy = "delete that line, which is drawn only"
    lines = read_json_lines(file, remedy, "step")
    for number, line in enumerate(lines, start=1):
        line.pop("batch_hash", None)  # the one text in a line, which nothing draws
        if bad := [key for key, value in line.items() if isinstance(value, str | list)]:
            raise UserError(f"{file}: line {number}: {bad[0]}: no number; {remedy}")
        for key in [key for key, value in line.items() if value != value or value in (inf, -inf)]:
            del line[key]  # of a step whose batch was left out
    return lines


def collect(run: StageRun) -> list[StageResult]:
    """Every finished stage that `run` takes, directly or not, in the pipeline's order."""
    results: dict[str, StageResult] = {}

    def visit(stage: StageRun) -> None:
        for taken in stage.inputs.values():
            visit(taken)
        manifest = stage.manifest()
        if (
            stage.stage not in results
            and stage is not run
            and manifest
            and manifest.get("finished")
        ):
            metrics = _metrics(stage.folder / "metrics.jsonl")
            values = stage.recipe_values()
            results[stage.stage] = StageResult(
                stage.stage, stage.kind, stage.folder, values, manifest, metrics
            )

    visit(run)
    return _in_order(results.values())


def _in_order(results: Iterable[StageResult]) -> list[StageResult]:
    """As in the pipeline; runs of the user's own recipes last."""
    order = {name: number for number, name in enumerate(load_pipeline())}
    return sorted(results, key=lambda result: order.get(result.name, len(order)))


def read_stages(folder: Path) -> list[StageResult]:
    """The finished stage of a run folder, or those of the run folders in it; nothing else is asked."""
    folders = [folder] if (folder / "manifest.json").exists() else sorted(folder.glob("*/"))
    found = [one for below in folders if (one := _read_stage(below))]
    return _in_order(stage for stage in found if stage.kind != "report")


def _read_stage(folder: Path) -> StageResult | None:
    file, remedy = folder / "manifest.json", "name a folder that holds whole runs"
    if ".old-" in folder.name or not file.exists():
        return None
    manifest: Row = read_json_object(file, remedy)
    if CHECKSUM in manifest:  # earlier versions wrote none
        manifest = read_record(file, remedy)
    if not (manifest.get("finished") and "stage" in manifest):
        return None
    name, recipe = manifest["stage"], dict(read_yaml(folder / "recipe.yaml"))
    row = load_pipeline().get(name)
    kind = row.engine if row else "pretrain" if "tokens_per_source" in manifest else "posttrain"
    return StageResult(name, kind, folder, recipe, manifest, _metrics(folder / "metrics.jsonl"))


def summary_rows(stages: list[StageResult]) -> list[Row]:
    """The table of all stages: tokens, seconds, tokens per second, loss, bits per byte, scores."""
    rows = []
    for stage in stages:
        bits = stage.manifest.get("bits_per_byte", {}).get("all", {})
        rows.append(
            {
                "stage": stage.name,
                "seconds": stage.seconds,
                "tokens": stage.last("tokens") or stage.manifest.get("tokens"),
                "tokens_per_second": stage.median("tokens_per_second"),
                "loss": stage.last("loss"),
                "bits_per_byte": bits.get("model"),
                "unigram": bits.get("unigram"),
                "scores": stage.manifest.get("scores", {}),
            }
        )
    return rows


def counted(shard: Row) -> str:
    """What a source's documents were left out for and changed by, with how many; empty if none."""
    texts = []
    for key in ("left_out", "changed"):
        counts = {reason: number for reason, number in shard.get(key, {}).items() if number}
        if reasons := ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in counts.items()):
            texts.append(f"{key.replace('_', ' ')}: {reasons}")
    return "; ".join(texts)


def cleaning_rows(shards: Mapping[str, Row]) -> list[Row]:
    """Of each cleaned source and step: the documents before it, left out, changed, and after it."""
    rows = []
    for name, shard in shards.items():
        before, left_out = shard.get("read", 0), shard.get("left_out", {})
        changed = shard.get("changed", {})
        for step in (*left_out, *(step for step in changed if step not in left_out)):
            after = before - left_out.get(step, 0)
            counts = (left_out.get(step, 0), changed.get(step, 0))
            if any(counts):
                values = (name, step.replace("_", " "), before, *counts, after)
                rows.append(dict(zip(CLEANING, values, strict=True)))
            before = after
    return rows


def mixture_rows(stages: list[StageResult]) -> dict[str, list[Row]]:
    """{stage: rows {source, planned, realised}} of shares of the stage's own tokens."""
    tables, before = {}, dict[str, int]()
    for stage in stages:
        seen = stage.manifest.get("tokens_per_source")
        if not seen:
            continue
        weights: Mapping[str, float] = stage.recipe["mixture"]
        own = {name: seen[name] - before.get(name, 0) for name in weights}
        total, weight = sum(own.values()), sum(weights.values())
        tables[stage.name] = [
            {
                "source": name,
                "planned": weights[name] / weight,
                "realised": own[name] / total,
                "tokens": own[name],
            }
            for name in sorted(weights, key=lambda name: -weights[name])
        ]
        before = seen
    return tables


def by_category(rows: list[Row], category_of: dict[str, str]) -> list[Row]:
    """The rows of a mixture summed over each category; what has none is the user's own text."""
    summed: dict[str, Row] = {}
    for row in rows:
        name = category_of.get(row["source"], "own")
        group = summed.setdefault(name, {"category": name, "planned": 0.0, "realised": 0.0})
        group["planned"] += row["planned"]
        group["realised"] += row["realised"]
    return list(summed.values())
