"""A small chain with manifests and metrics: what the report's tests show."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from stage_runs import PlainStage, finished, plain

from ground.files import write_record
from launch.report import results

START = datetime(2026, 1, 1, tzinfo=UTC)
ROWS = [
    {"length": length, "depth": depth, "hits": 1, "of": 2, "chance": 0.1}
    for length in (256, 512)
    for depth in (0.0, 1.0)
]
BITS = {"model": 3.0, "unigram": 4.0}
SCORE = {
    "task": "piqa_cf", "metric": "acc", "model": "release", "value": 0.6, "low": 0.5, "high": 0.7,
    "chance": 0.5, "published": 0.789, "items": 40,
}  # fmt: skip


def timed(run: PlainStage, seconds: float, *metrics: dict[str, Any], **results: Any) -> PlainStage:
    """The stage done in so many seconds, with these lines of metrics."""
    finished(run, **results)
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    file = run.folder / "manifest.json"
    times = {"started": START, "finished": START + timedelta(seconds=seconds)}
    write_record(file, (run.manifest() or {}) | {k: v.isoformat() for k, v in times.items()})
    return run


def small_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlainStage:
    """The report of two pretraining stages of 100 and 50 tokens, an APO run and an evaluation."""
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    order = dict.fromkeys(("pretrain-stage1", "pretrain-stage2", "apo", "eval"))
    monkeypatch.setattr(results, "load_pipeline", lambda: order)
    lines = [{"step": s, "tokens": 50 * s, "loss": 5 - s, "tokens_per_second": 9.0} for s in (1, 2)]
    bits = dict.fromkeys(("code", "all"), BITS)
    first = timed(
        plain("pretrain-stage1", {"mixture": {"dclm": 3, "wiki": 1}}, kind="pretrain"),
        60, *lines, tokens=100, tokens_per_source={"dclm": 80, "wiki": 20}, bits_per_byte=bits,
        sample="<b>",
    )  # fmt: skip
    second = timed(
        plain("pretrain-stage2", {"mixture": {"dclm": 1, "kaggle": 1}}, takes=[first], kind="pretrain"),
        30, {"step": 3, "tokens": 150, "loss": 2.5, "embedding_norm": 1.5}, tokens=150,
        tokens_per_source={"dclm": 100, "wiki": 20, "kaggle": 30}, needle=ROWS,
    )  # fmt: skip
    lines = [{"step": s, "loss": 1 / s, "rewards/margins": 0.1 * s} for s in (1, 2)]
    apo = timed(plain("apo", takes=[second], kind="posttrain"), 10, *lines)
    scores = {"before": {"a_b": 0.1}, "after": {"a_b": 0.95, "c": 1}}
    scored = timed(plain("eval", takes=[apo], kind="eval"), 5, evaluation=[SCORE], scores=scores)
    return plain("report", takes=[scored, first])
