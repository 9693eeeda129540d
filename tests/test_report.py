"""The report says what the manifests say: shares, sums, one file, nothing fetched."""

import html
import json
import re
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from stage_runs import PlainStage, finished, plain

from ground.files import write_record
from launch.recipe.book import canonical, load_recipe, sources_of
from launch.report import page as report
from launch.report import results
from launch.report.results import (
    StageResult,
    by_category,
    cleaning_rows,
    collect,
    mixture_rows,
    summary_rows,
)

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


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlainStage:
    """Two pretraining stages of 100 and 50 tokens, an APO run and an evaluation."""
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


def test_every_stage_is_collected_once_and_in_order(run: PlainStage) -> None:
    names = [stage.name for stage in collect(run)]
    assert names == ["pretrain-stage1", "pretrain-stage2", "apo", "eval"]


def test_an_unfinished_stage_is_left_out(run: PlainStage) -> None:
    run.inputs["eval"].begin(force=True)
    assert [stage.name for stage in collect(run)][-1] == "apo"


def test_the_mixture_realised_is_that_of_the_stage_alone(run: PlainStage) -> None:
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
    sums = by_category(tables["pretrain-stage1"], {"dclm": "web"})
    assert [(row["category"], row["planned"]) for row in sums] == [("web", 0.75), ("own", 0.25)]


def test_the_table_has_what_the_stages_measured(run: PlainStage) -> None:
    first, second, apo, scored = summary_rows(collect(run))
    assert (first["seconds"], first["tokens"], first["tokens_per_second"]) == (60, 100, 9.0)
    assert (first["loss"], first["bits_per_byte"], first["unigram"]) == (3, 3.0, 4.0)
    assert second["bits_per_byte"] is None and apo["loss"] == 0.5
    assert report.scores_text(scored["scores"]) == "a b 0.10 -> 0.95, c 1.00"


def test_what_cleaning_did_is_a_table_of_documents_before_and_after(run: PlainStage) -> None:
    left_out = {"empty": 0, "language": 10, "near_duplicates": 5}
    shard = {"documents": 85, "bytes": 9, "read": 100, "left_out": left_out, "changed": {"pii": 7}}
    rows = cleaning_rows({"notes": shard, "dclm": {"documents": 3}})
    assert [tuple(row.values()) for row in rows] == [
        ("notes", "language", 100, 10, 0, 90),
        ("notes", "near duplicates", 90, 5, 0, 85),
        ("notes", "pii", 85, 0, 7, 85),
    ]
    said = "left out: 10 language, 5 near duplicates; changed: 7 pii"
    data = plain("data-stage1", takes=list(run.inputs.values()), kind="data")
    timed(data, 5, shards={"notes": shard}, own_text={"notes": "notes/"})
    text = Path(report.make_report(plain("report", takes=[data]))["page"]).read_text("utf-8")
    assert said in text
    assert '<h2 id="cleaning">' in text
    assert "near duplicates" in text.partition('<h2 id="cleaning">')[2]


def test_the_page_is_one_file_that_fetches_nothing(run: PlainStage) -> None:
    page = Path(report.make_report(run)["page"])
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


# In a frame of each width: the frame's, the page's and the table's width, and how far that reaches.
MEASURE = """
<script>
onload = () => {
  const widths = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, table = page.querySelector("table");
    return [frame.clientWidth, page.scrollingElement.scrollWidth, table.scrollWidth,
      table.clientWidth, Math.ceil(table.getBoundingClientRect().right)];
  });
  document.body.innerHTML = `<p id=widths>${JSON.stringify(widths)}</p>`;
}
</script>
"""


@pytest.mark.slow
def test_the_first_table_fits_the_page(run: PlainStage, tmp_path: Path) -> None:
    """No part of it is reached by scrolling, whatever its scores say and however many tokens."""
    if not (browser := shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("no chromium here")
    apo = run.inputs["eval"].inputs["apo"]
    assert isinstance(apo, PlainStage)
    names = [f"a score of name {number}" for number in range(20)]
    before_after = {"before": dict.fromkeys(names, 0.1), "after": dict.fromkeys(names, 0.9)}
    line = {"step": 1, "loss": 12.345, "tokens": 11_160_000_000_000, "tokens_per_second": 9_876_543}
    timed(apo, 12_345_678, line, scores=before_after, bits_per_byte={"all": BITS})
    text = html.escape(Path(report.make_report(run)["page"]).read_text("utf-8"))
    widths = (1280, 800, 768, 390)
    frames = [f'<iframe width="{width}" srcdoc="{text}"></iframe>' for width in widths]
    file = tmp_path / "frames.html"
    file.write_text(f"<!doctype html><body>{''.join(frames)}{MEASURE}", "utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path}/browser", "--virtual-time-budget=9000", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search('<p id="widths">(.*?)</p>', done.stdout)
    assert found, done.stdout[-500:]
    for width, (frame, page, table, shown, end) in zip(widths, json.loads(found[1]), strict=True):
        assert frame == width and page <= frame and table <= shown and end <= page


def test_the_end_names_report_release_and_how_to_talk(
    run: PlainStage, capsys: pytest.CaptureFixture[str]
) -> None:
    report.make_report(run)
    report.show(run)
    out = capsys.readouterr().out
    assert "report.html" in out and "release" in out and "make chat" in out
    assert re.search(r"all +│ +105 ", out)  # 60 + 30 + 10 + 5 seconds


def test_each_source_has_a_category() -> None:
    for stage in ("pretrain-stage1", "longctx-64k"):
        recipe = load_recipe(stage).recipe
        sources = sources_of(recipe)
        for name in recipe.mixture:
            assert sources[canonical(name, sources)].category


def test_a_stage_that_ran_no_steps_has_empty_series(run: PlainStage) -> None:
    stage: StageResult = collect(run)[-1]
    assert stage.series("loss") == ([], []) and stage.last("loss") is None
