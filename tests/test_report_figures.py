"""report.json has all that the page shows; what training took, models of its size, sweeps and ablations."""

import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
from conftest import ROOT
from jsonschema import Draft202012Validator
from PIL import Image
from report_runs import small_chain, timed
from stage_runs import PlainStage, plain

from ground.errors import UserError
from ground.files import write_json
from launch import walk
from launch.machine.cards import card
from launch.report import page
from launch.report.charts import described, draw
from launch.report.cost import cost_of, price_given
from launch.report.document import MOST_POINTS, Chart, Report, read_report, schema, series
from launch.report.peers import peer_section, peers_of
from launch.report.picture import shown_scores
from launch.report.results import StageResult, collect
from launch.report.sections import evaluation, scores_of
from launch.stages.report import ReportRecipe, ReportStage

MACHINE = {"gpu": "NVIDIA H100 80GB HBM3", "processes": 2, "peak_memory_bytes": 3 * 2**30}
CONFIG = {
    "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16,
    "num_hidden_layers": 3, "vocab_size": 100,
}  # fmt: skip
WEIGHTS = 3 * (8 * 8 * 2 + 8 * 4 * 2 + 8 * 16 * 3) + 100 * 8


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlainStage:
    return small_chain(tmp_path, monkeypatch)


def test_each_figure_of_the_page_is_in_the_json(run: PlainStage) -> None:
    write_side_runs(run.folder.parent)
    html = Path(page.make_report(run)["page"])
    text, report = html.read_text("utf-8"), read_report(html.with_suffix(".json"))
    Draft202012Validator(schema()).validate(json.loads(html.with_suffix(".json").read_text()))
    first, *tables = (
        [
            [unescape(re.sub("<.*?>", "", cell)) for cell in re.findall(r"<td[^>]*>([^\n]*?)(?=<td|</tr>)", row)]
            for row in re.findall(r"<tr.*?</tr>", table, re.S)[1:]
        ]
        for table in re.findall(r"<table.*?</table>", text, re.S)
    )  # fmt: skip
    assert tables == [table.cells() for section in report.sections for table in section.tables]
    figures = [row for row in first if len(row) > 1]
    assert figures == [[stage.name, *page.cells(vars(stage))] for stage in report.stages]
    labels = [unescape(label) for label in re.findall(r'<svg role="img" aria-label="(.*?)"', text)]
    charts = [chart for section in report.sections for chart in section.charts]
    assert labels == [described(chart) for chart in charts] and len(labels) > 10
    assert all(chart.title in unescape(text) for chart in charts)
    with Image.open(html.with_suffix(".png")) as picture:
        assert picture.size == (1200, 630)  # as links are shown
    assert text == page.render(report), "the page shows nothing else"
    assert report.stages[0].recipe == {"mixture.dclm": 3, "mixture.wiki": 1}


def test_the_stored_schema_is_that_of_the_code() -> None:
    assert json.loads((ROOT / "docs/report.schema.json").read_text()) == schema()


def test_a_long_curve_is_thinned_and_what_is_no_number_is_null() -> None:
    thin = series("loss", range(2500), [float(n) for n in range(2500)])
    assert len(thin.x) <= MOST_POINTS and thin.y[:2] == (1.0, 4.0) and thin.x[-1] == 2499
    gap = series("loss", [1, 2], [float("nan"), 2])
    assert gap.y == (None, 2.0)
    assert "2 at 2" in draw(Chart("lines", "loss", "step", "loss", (gap,)))


def test_a_step_whose_loss_is_no_number_is_left_out(run: PlainStage) -> None:
    first = run.inputs["pretrain-stage1"]
    with (first.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "tokens": 200, "loss": NaN, "grad_norm": Infinity}\n')
    report = report_of(run.folder.parent, run)
    assert (report.stages[0].loss, report.stages[0].tokens) == (3, 200)
    write_json(run.folder / "report.json", report.as_json())  # which refuses NaN


def trained(folder: Path, **manifest: object) -> StageResult:
    """A stage of 2 hours at 1,000 tokens/s, windows of 64."""
    write_json(folder / "hf" / "config.json", CONFIG)
    times = {"started": "2026-01-01T00:00:00", "finished": "2026-01-01T02:00:00"}
    lines = [{"step": 1, "tokens_per_second": 1000.0}]
    recipe = {"trl": {"max_length": 64}}
    return StageResult("sft", "posttrain", folder, recipe, {**times, **manifest}, lines)


def test_what_training_took_is_counted_where_the_card_is_known(tmp_path: Path) -> None:
    cost, h100 = cost_of(trained(tmp_path, machine=MACHINE), 2.5), card("h100-sxm")
    assert cost and cost.card == "h100-sxm" and cost.peak_memory_bytes == 3 * 2**30
    assert cost.flops_per_token == 6 * WEIGHTS + 12 * 3 * 8 * 32
    assert cost.mfu == pytest.approx(cost.flops_per_token * 1000 / 2 / h100.flops)
    assert cost.kilowatt_hours == pytest.approx(2 * 2 * h100.power / 1000)
    assert cost.money == pytest.approx(2 * 2 * 2.5)


def test_nothing_is_guessed_of_an_unknown_machine(tmp_path: Path) -> None:
    for gpu in ("", "NVIDIA Unknown"):
        cost = cost_of(trained(tmp_path, machine=MACHINE | {"gpu": gpu}), None)
        assert cost and (cost.mfu, cost.kilowatt_hours, cost.money) == (None, None, None)
        assert cost.machine == (gpu or "CPU") and cost.tokens_per_second == 1000
    on_cpu = cost_of(trained(tmp_path, machine=MACHINE | {"gpu": ""}), 2.5)
    assert on_cpu and on_cpu.money is None  # PRICE is a GPU's
    unrecorded = cost_of(trained(tmp_path), 2.5)
    assert unrecorded and unrecorded.machine == "" and unrecorded.money is None


@pytest.mark.parametrize("price", ["much", "-1", "nan", "inf"])
def test_a_price_that_is_none_is_refused(price: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRICE", price)
    with pytest.raises(UserError, match=rf"^PRICE={price}: .* write a number"):
        price_given()


def write_side_runs(runs: Path) -> None:
    """A merge sweep of two weights and an ablation of one variant."""
    shares = ("think_well_formed", "no_think_well_formed", "tool_call_parses", "tool_listed")
    points = [
        {
            "weight": weight, "bits_per_byte": 3 - weight, "prompts": 10,
            "needle": [{"hits": 1, "of": 2}], "scores": dict.fromkeys(shares, 0.5),
        }
        for weight in (0.0, 1.0)
    ]  # fmt: skip
    sweep = {"soup": "soup/hf", "partner": "/elsewhere", "recipe_weight": 0.1, "points": points}
    write_json(runs / "merge-sweep" / "longctx-64k.json", sweep)
    means = {"baseline": 2.0, "rope-only": 3.0}
    ablation = {
        "ablation": "nope", "question": "does it cost anything?", "seeds": [1, 2, 3], "tokens": 4096,
        "variants": {
            name: {"bits_per_byte": {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}}
            for name, mean in means.items()
        },
    }  # fmt: skip
    write_json(runs / "ablations" / "nope.json", ablation)


def test_a_sweep_and_an_ablation_are_shown_once_they_were_run(
    run: PlainStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = run.folder.parent
    assert not {"sweep", "ablations"} & {part.id for part in report_of(runs, run).sections}
    for file in page.files_of(run):
        write_json(file, {"price": None})
    assert page.lost(run) is None
    write_side_runs(runs)
    assert "older than" in (page.lost(run) or "")
    sweep, ablation = (p for p in report_of(runs, run).sections if p.id in ("sweep", "ablations"))
    assert sweep.tables[0].cells()[1] == ["1", "50.0%", *["50.0%"] * 4, "2.000"]
    assert "does it cost anything?" in ablation.tables[0].title
    assert ablation.tables[0].cells()[1] == [
        "rope-only",
        "bits per byte",
        "3",
        "2.9",
        "3.1",
        "+50.0%",
    ]
    for file in page.files_of(run):
        write_json(file, {"price": 2.5})
    assert page.lost(run) is None
    for same in ("2.5", "2.50"):
        monkeypatch.setenv("PRICE", same)
        assert page.lost(run) is None
    monkeypatch.setenv("PRICE", "2")
    assert "PRICE=" in (page.lost(run) or "")
    page.page(run).with_suffix(".png").unlink()
    assert "report.png: no such file" in (page.lost(run) or "")


def report_of(runs: Path, run: PlainStage) -> Report:
    return page.report_of(collect(run), runs, run.arguments)


@pytest.mark.slow
def test_a_finished_report_is_made_again_for_another_price(
    run: PlainStage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = ReportStage(
        stage="report", scale=run.scale, arguments=run.arguments, recipe=ReportRecipe(), inputs=run.inputs
    )  # fmt: skip
    assert walk.run_stage(stage, False) and not walk.run_stage(stage, False)
    monkeypatch.setenv("PRICE", "2.5")
    assert walk.run_stage(stage, False) and not walk.run_stage(stage, False)
    assert "made with another PRICE=; made again" in capsys.readouterr().out
    assert read_report(page.page(stage).with_suffix(".json")).price == 2.5
    monkeypatch.setenv("PRICE", "much")
    with pytest.raises(UserError, match=r"^PRICE=much: "):
        walk.run_stage(stage, False)


def test_models_of_half_to_twice_the_size_stand_beside_the_scores(run: PlainStage) -> None:
    assert set(peers_of(3_080_000_000)) == {"SmolLM3-3B", "Qwen2.5-3B", "Llama3.2-3B", "Qwen3-4B"}
    assert set(peers_of(136_900_000)) == {"SmolLM2-135M", "SmolLM-135M"}
    assert set(peers_of(762_432)) == {"SmolLM2-135M"}
    assert peers_of(3_080_000_000)["Qwen3-4B"].scores["PIQA"] == 77.58
    (score,) = scores_of(collect(run))
    assert peer_section([score], 136_900_000).is_empty  # of no base suite
    row = {"suite": "local", "task": "HellaSwag", "value": 0.3}
    scored = timed(plain("scored"), 1, evaluation=[{**vars(score), **row}])
    (table,) = peer_section(scores_of(collect(plain("own", takes=[scored]))), 136_900_000).tables
    assert table.cells()[0] == ["release", "136,900,000", "30.0%", "this run"]
    assert ["SmolLM2-135M", "135,000,000", "42.1%", "model card of SmolLM2-135M"] in table.cells()


def test_scores_of_both_modes_are_told_apart(run: PlainStage) -> None:
    (score,) = scores_of(collect(run))
    both = [replace(score, suite=suite) for suite in ("instruct_think", "instruct_no_think")]
    section = evaluation([*both, replace(score, model="base")])
    names = [f"{score.task}, {one.suite}" for one in both]
    assert [row[0] for row in section.tables[0].rows] == names
    assert list(section.charts[0].series[0].x) == names
    assert [row[0] for row in section.tables[1].rows] == [score.task]


def test_the_picture_has_the_scores_of_the_release_where_it_has_some(run: PlainStage) -> None:
    stages = collect(run)
    (score,) = scores_of(stages)
    report = page.report_of(stages, run.folder.parent, "")
    base, release = (replace(score, model=name) for name in ("longctx-64k/hf", "release"))
    assert shown_scores(replace(report, scores=(base, release))) == [release]
    assert shown_scores(replace(report, scores=(base,))) == [base]
    assert shown_scores(replace(report, scores=())) == []


def test_a_name_is_drawn_as_it_is_written() -> None:
    assert ">a $x_{ b$</text>" in draw(
        Chart("lines", "t", "a $x_{ b$", "", (series("s", [1], [1]),))
    )
