"""The report says what the manifests say: shares, sums, one file, nothing fetched."""

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from launch.report_data import StageResult, by_category, collect, mixture_rows, summary_rows
from launch.run_folder import StageRun

from launch import report
from launch.recipe import canonical, load_recipe

START = datetime(2026, 1, 1, tzinfo=UTC)
ROWS = [
    {"length": length, "depth": depth, "hits": 1, "of": 2, "chance": 0.1}
    for length in (256, 512)
    for depth in (0.0, 1.0)
]
SCORE = {
    "task": "piqa_cf", "metric": "acc", "model": "release", "value": 0.6, "low": 0.5, "high": 0.7,
    "chance": 0.5, "published": 0.789, "items": 40,
}  # fmt: skip


def finished(run: StageRun, metrics: list[dict[str, Any]], seconds: float, **results: Any) -> None:
    run.begin(rerun_on_change=True, force=False)
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    run.finish(**results)
    file = run.folder / "manifest.json"
    times = {"started": START, "finished": START + timedelta(seconds=seconds)}
    manifest = json.loads(file.read_text()) | {k: v.isoformat() for k, v in times.items()}
    file.write_text(json.dumps(manifest))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StageRun:
    """Two pretraining stages of 100 and 50 tokens, an APO run and an evaluation."""
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    first = StageRun("pretrain-stage1", "tiny", "pretrain", {"mixture": {"dclm": 3, "wiki": 1}})
    lines = [{"step": s, "tokens": 50 * s, "loss": 5 - s, "tokens_per_second": 9.0} for s in (1, 2)]
    bits = {name: {"model": 3.0, "unigram": 4.0} for name in ("code", "all")}
    seen = {"dclm": 80, "wiki": 20}
    finished(first, lines, 60, tokens=100, tokens_per_source=seen, bits_per_byte=bits, sample="<b>")
    mixture = {"mixture": {"dclm": 1, "kaggle": 1}}
    second = StageRun("pretrain-stage2", "tiny", "pretrain", mixture, {first.stage: first})
    lines = [{"step": 3, "tokens": 150, "loss": 2.5, "embedding_norm": 1.5}]
    seen = {"dclm": 100, "wiki": 20, "kaggle": 30}
    finished(second, lines, 30, tokens=150, tokens_per_source=seen, needle=ROWS)
    apo = StageRun("apo", "tiny", "posttrain", {}, {second.stage: second})
    finished(apo, [{"step": s, "loss": 1 / s, "rewards/margins": 0.1 * s} for s in (1, 2)], 10)
    scored = StageRun("eval", "tiny", "eval", {}, {apo.stage: apo})
    finished(
        scored,
        [],
        5,
        evaluation=[SCORE],
        scores={"before": {"a_b": 0.1}, "after": {"a_b": 0.95, "c": 1}},
    )
    return StageRun("report", "tiny", "report", {}, {"eval": scored, first.stage: first})


@pytest.fixture(autouse=True)
def _engines(monkeypatch: pytest.MonkeyPatch) -> None:
    from launch import report_data, run_folder

    for engine in ("posttrain", "eval"):
        monkeypatch.setitem(run_folder.ENGINES, engine, ("torch",))
    order = {name: {} for name in ("pretrain-stage1", "pretrain-stage2", "apo", "eval")}
    monkeypatch.setattr(report_data, "load_pipeline", lambda: order)


def test_every_stage_is_collected_once_and_in_order(run: StageRun) -> None:
    names = [stage.name for stage in collect(run)]
    assert names == ["pretrain-stage1", "pretrain-stage2", "apo", "eval"]


def test_an_unfinished_stage_is_left_out(run: StageRun) -> None:
    run.inputs["eval"].begin(rerun_on_change=True, force=False)
    assert [stage.name for stage in collect(run)][-1] == "apo"


def test_the_mixture_realised_is_that_of_the_stage_alone(run: StageRun) -> None:
    tables = mixture_rows(collect(run))
    assert [(r["source"], r["planned"], r["realised"]) for r in tables["pretrain-stage1"]] == [
        ("dclm", 0.75, 0.8),
        ("wiki", 0.25, 0.2),
    ]
    assert [(r["source"], r["realised"]) for r in tables["pretrain-stage2"]] == [
        ("dclm", 0.4),
        ("kaggle", 0.6),
    ]
    sums = by_category(tables["pretrain-stage1"], {"dclm": "web", "wiki": "web"})
    assert sums == [{"category": "web", "planned": 1.0, "realised": 1.0}]


def test_the_table_has_what_the_stages_measured(run: StageRun) -> None:
    first, second, apo, scored = summary_rows(collect(run))
    assert (first["seconds"], first["tokens"], first["tokens_per_second"]) == (60, 100, 9.0)
    assert (first["loss"], first["bits_per_byte"], first["unigram"]) == (3, 3.0, 4.0)
    assert second["bits_per_byte"] is None and apo["loss"] == 0.5
    assert report.scores_text(scored["scores"]) == "a b 0.10 -> 0.95, c 1.00"


def test_the_page_is_one_file_that_fetches_nothing(run: StageRun) -> None:
    results = report.make_report(run)
    page = Path(results["page"])
    assert page == report.page(run) and page.parent == run.folder.parent
    text = page.read_text("utf-8")
    body = re.sub(
        r"""xmlns(:\w+)?="[^"]*"|<metadata>.*?</metadata>|<!DOCTYPE[^>]*>""", "", text, flags=re.S
    )
    assert not re.search(r"""(src|href)="(?!#|data:)|@import|url\((?!#)|<script""", body)
    for words in ("embedding", "Needles", "apo: reward margin", "60.0%", "50.0% to 70.0%", "78.9%"):
        assert words in text, words
    assert "&lt;b&gt;" in text and "<b>" not in text  # a sample is text, whatever it says
    ids = re.findall(r'<h2 id="(\w+)"', text)
    assert ids == re.findall(r'<a href="#(\w+)"', text.split("</nav>")[0]) and len(ids) == len(
        set(ids)
    )
    assert text.count("<svg") == text.count("</svg>") >= 8


def test_the_end_names_report_release_and_how_to_talk(
    run: StageRun, capsys: pytest.CaptureFixture[str]
) -> None:
    report.make_report(run)
    report.show(run)
    out = capsys.readouterr().out
    assert "report.html" in out and "release" in out and "make chat" in out
    assert re.search(r"all +│ +105 ", out)  # 60 + 30 + 10 + 5 seconds


def test_each_source_has_a_category() -> None:
    from launch.recipe import load_sources

    for stage in ("pretrain-stage1", "longctx-64k"):
        for name in load_recipe(stage).mixture:
            assert load_sources()[canonical(name)]["category"]


def test_a_stage_that_ran_no_steps_has_empty_series(run: StageRun) -> None:
    stage: StageResult = collect(run)[-1]
    assert stage.series("loss") == ([], []) and stage.last("loss") is None
