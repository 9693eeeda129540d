"""The report says what the manifests say: shares, sums, one file, nothing fetched."""

import re
from pathlib import Path

import pytest
from report_runs import small_chain, timed
from stage_runs import PlainStage, plain

from launch.recipe.book import canonical, load_recipe, sources_of
from launch.report import page as report
from launch.report.results import (
    StageResult,
    by_category,
    cleaning_rows,
    collect,
    mixture_rows,
    summary_rows,
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlainStage:
    return small_chain(tmp_path, monkeypatch)


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
    for words in ("embedding", "Needles", "apo: reward margin", "60.0%", "50.0%", "70.0%", "78.9%"):
        assert words in text, words
    assert "&lt;b&gt;" in text and "<b>" not in text  # a sample is text, whatever it says
    ids = re.findall(r'<h2 id="(\w+)"', text)
    assert ids == re.findall(r'<a href="#(\w+)"', text.split("</nav>")[0]) and len(ids) == len(
        set(ids)
    )
    assert text.count("<svg") == text.count("</svg>") >= 8


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
