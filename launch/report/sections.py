"""The parts of the page, each made from the finished stages."""

from collections.abc import Iterable, Sequence
from typing import Any

from launch.recipe.tables import load_sources
from launch.report.charts import mixture_chart, needle_chart
from launch.report.document import Chart, Sample, Score, Section, Table, series
from launch.report.results import (
    CLEANING,
    StageResult,
    by_category,
    cleaning_rows,
    mixture_rows,
)
from launch.report.terminal import told_apart


def curves(stages: Sequence[StageResult], key: str, label: str, over: str = "tokens") -> Chart:
    """A metric over tokens or steps, one line per stage that has it."""
    drawn = [(stage.name, *stage.series(key, over)) for stage in stages]
    lines = tuple(series(name, x, y) for name, x, y in drawn if y)
    alone = f"{lines[0].name}: " if over == "step" and len(lines) == 1 else ""
    return Chart("lines", alone + label.partition(",")[0], over, label, lines)


def charts(found: Iterable[Chart]) -> tuple[Chart, ...]:
    """Those that have something to draw."""
    return tuple(chart for chart in found if chart.series)


def training(stages: Sequence[StageResult]) -> Section:
    pretraining = [stage for stage in stages if stage.kind == "pretrain"]
    labels = {
        "loss": "loss, nats a token",
        "lr": "learning rate",
        "grad_norm": "gradient norm before clipping",
        "embedding_norm": "mean L2 norm of an embedding",
        "tokens_per_second": "tokens/s",
    }
    drawn = charts(curves(pretraining, key, label) for key, label in labels.items())
    return Section("pretraining", "Pretraining and long context", charts=drawn)


def domains(stages: Sequence[StageResult]) -> Section:
    """One line per domain over the stages; the unigram model's is dotted, in the same colour."""
    note = "Held-out text that no stage trains on; dotted: a unigram model of the same mixture."
    scored = [stage for stage in stages if stage.manifest.get("bits_per_byte")]
    names, lines = [stage.name for stage in scored], []
    for domain in scored[-1].manifest["bits_per_byte"] if scored else ():
        for model in ("model", "unigram"):
            bits = [stage.manifest["bits_per_byte"].get(domain, {}).get(model) for stage in scored]
            name, dotted = (domain, False) if model == "model" else (f"{domain}, unigram", True)
            lines.append(series(name, names, bits, dotted=dotted))
    chart = Chart("lines", "bits per byte", "", "bits per byte", tuple(lines))
    return Section("domains", "Bits per byte by domain", note, charts([chart]))


def mixtures(stages: Sequence[StageResult]) -> Section:
    note = "Planned: the recipe's weights. Realised: what the sampler delivered."
    category_of: dict[str, str] = {name: row.category for name, row in load_sources().items()}
    for stage in stages:  # the held-out stage knows the user's own sources too
        category_of |= stage.recipe.get("categories") or {}
    drawn, tables = [], []
    for name, rows in mixture_rows(list(stages)).items():
        drawn.append(mixture_chart(by_category(rows, category_of), name))
        columns = ("source", "planned", "realised", "tokens")
        cells = tuple(tuple(row[column] for column in columns) for row in rows)
        tables.append(Table(name, columns, ("", ".3%", ".3%", ","), cells, is_open=False))
    return Section("mixture", "Mixture, planned and realised", note, tuple(drawn), tuple(tables))


def cleaning(stages: Sequence[StageResult]) -> Section:
    note = "Documents before and after each step that left some out or changed some."
    tables = [
        Table(stage.name, CLEANING, ("", "", ",", ",", ",", ","), tuple(tuple(r.values()) for r in rows))
        for stage in stages
        if (rows := cleaning_rows(stage.manifest.get("shards", {})))
    ]  # fmt: skip
    return Section("cleaning", "Cleaning", note, tables=tuple(tables))


# Charts of post-training: title, and the metrics that share its axes, by the start of their names.
POSTTRAINING = {
    "held-out prompts: mode compliance, tools, tasks": ("think_", "no_think_", "tool_"),
    "rewards of chosen and rejected": ("rewards/chosen", "rewards/rejected"),
    "reward margin": ("rewards/margins",),
    "reward accuracy": ("rewards/accuracies",),
}


def posttraining(stages: Sequence[StageResult]) -> Section:
    note = "Loss: nats a trained token in mid-training and SFT; APO's own loss is 1.0 at its start."
    drawn = list[Chart]()
    for stage in (stage for stage in stages if stage.kind == "posttrain"):
        drawn.append(curves([stage], "loss", "loss", over="step"))
        keys = dict.fromkeys(key for line in stage.metrics for key in line)
        for title, starts in POSTTRAINING.items():
            found = [key for key in keys if key.startswith(starts)]
            lines = tuple(series(key, *stage.series(key)) for key in found)
            drawn.append(Chart("lines", f"{stage.name}: {title}", "step", "", lines))
    return Section("posttraining", "Post-training", note, charts(drawn))


def needles(stages: Sequence[StageResult]) -> Section:
    note = "At a small scale they stay at chance."
    drawn = [
        needle_chart(rows, f"{stage.name}, chance {rows[0]['chance']:.0%}")
        for stage in stages
        if (rows := stage.manifest.get("needle"))
    ]
    return Section("needles", "Needles in a haystack", note, tuple(drawn))


def scores_of(stages: Sequence[StageResult]) -> tuple[Score, ...]:
    """Of all evaluations."""
    names = Score.__dataclass_fields__
    rows: list[dict[str, Any]] = [
        row for stage in stages for row in stage.manifest.get("evaluation", [])
    ]
    return tuple(Score(**{key: v for key, v in row.items() if key in names}) for row in rows)


def evaluation(scores: Sequence[Score]) -> Section:
    drawn, tables = [], []
    columns = {
        "task": "", "metric": "", "score": ".1%", "from": ".1%", "to": ".1%", "chance": ".1%",
        "SmolLM3-3B": ".1%", "items": ",",
    }  # fmt: skip
    for model in dict.fromkeys(score.model for score in scores):
        own = [score for score in scores if score.model == model]
        drawn.append(score_chart(own, model))
        rows = tuple(
            (name, s.metric, s.value, s.low, s.high, s.chance, s.published, s.items)
            for name, s in zip(names_of(own), own, strict=True)
        )
        tables.append(Table(model, tuple(columns), tuple(columns.values()), rows))
    note = (
        "Score with its 95 % interval, from and to; SmolLM3-3B: its published score, on all items."
    )
    return Section("evaluation", "Evaluation", note, tuple(drawn), tuple(tables))


def names_of(scores: Sequence[Score]) -> list[str]:
    """Each score's task; where two of a model share it, with its suite."""
    return told_apart([(score.model, score.task, score.suite) for score in scores])


def score_chart(scores: Sequence[Score], model: str) -> Chart:
    names = names_of(scores)
    lines = [
        series(
            "score, 95 % interval", names, [score.value for score in scores],
            low=tuple(score.low for score in scores), high=tuple(score.high for score in scores),
        )
    ]  # fmt: skip
    for label, key in (("chance", "chance"), ("SmolLM3-3B, published", "published")):
        known = [(n, getattr(s, key)) for n, s in zip(names, scores, strict=True)]
        known = [(name, value) for name, value in known if value is not None]
        if known:
            lines.append(series(label, [name for name, _ in known], [value for _, value in known]))
    return Chart("intervals", model, "score", "", tuple(lines), are_shares=True)


def samples(stages: Sequence[StageResult]) -> Section:
    found = [Sample(stage.name, text) for stage in stages if (text := stage.manifest.get("sample"))]
    return Section("samples", "One unedited sample a stage", samples=tuple(found))
