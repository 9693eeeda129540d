"""`make compare`: what differs between two runs, and what of it is more than chance."""

import re
import shutil
from pathlib import Path

import pytest
import yaml
from report_runs import small_chain
from stage_runs import PlainStage

from ground.errors import UserError
from ground.files import read_json_object, write_json
from launch.report import page
from launch.report.document import Score
from launch.report.results import collect
from launch.tools.compare import command, compared, difference, read_run


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runs folder, the same again beside it, and the first one's report."""
    report: PlainStage = small_chain(tmp_path, monkeypatch)
    runs = report.folder.parent
    values = page.report_of(collect(report), runs, report.arguments)
    write_json(runs / "report.json", values.as_json())
    shutil.copytree(runs, runs.with_name("other"))
    return runs


def change(folder: Path, **results: object) -> None:
    """Other results in a manifest, without its checksum, as an earlier version's."""
    file = folder / "manifest.json"
    manifest = read_json_object(file) | results
    del manifest["checksum"]
    write_json(file, manifest)


def test_two_equal_runs_do_not_differ(runs: Path) -> None:
    one, other = (
        read_run("A", str(runs / "report.json")),
        read_run("B", str(runs.with_name("other"))),
    )
    parts = {section.id: section for section in compared(one, other)}
    assert set(parts) == {"curves", "scores", "stages"}
    (row,) = parts["scores"].tables[0].cells()
    assert row[0] == "release: piqa cf" and row[7:] == [
        "+0.0%",
        "-14.1%",
        "+14.1%",
        "no difference",
    ]


def test_recipes_curves_and_scores_stand_beside_each_other(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # as narrow as a terminal: xdist sets it
    other = runs.with_name("other")
    recipe = other / "pretrain-stage1" / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"mixture": {"dclm": 2, "wiki": 1}}))
    (row,) = read_json_object(other / "eval" / "manifest.json")["evaluation"]
    change(other / "eval", evaluation=[row | {"value": 0.9, "low": 0.85, "high": 0.95}])
    command(str(runs), str(other))
    printed = capsys.readouterr().out
    assert re.search(r"pretrain-stage1 +│ mixture.dclm +│ 3 +│ 2 ", printed)
    assert re.search(r"release: piqa cf .*\+30\.0% │.*│ yes", printed)
    html = Path(printed.splitlines()[-1])
    text = html.read_text("utf-8")
    assert html.resolve().parent == runs.parent / "compare" and "mixture.dclm" in text
    assert "pretrain-stage1, B: " in text and '<h2 id="stages">Stages</h2>' in text
    body = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert not re.search(r"""(src|href)="(?!#|data:)|<script""", body)


def test_two_stages_are_compared_whatever_they_are_called(runs: Path) -> None:
    mine = runs.with_name("mine") / "mine"
    shutil.copytree(runs / "apo", mine)
    change(mine, stage="mine")
    lines, figures = compared(read_run("A", str(runs / "apo")), read_run("B", str(mine)))
    assert [chart.title for chart in lines.charts] == ["apo: loss", "apo: reward margin"]
    assert [[line.dotted for line in chart.series] for chart in lines.charts] == [[False, True]] * 2
    assert figures.tables[0].rows[0] == ("apo and mine", "loss", "0.500", "0.500")


def score(hits: int, of: int) -> Score:
    from eval_tasks.intervals import wilson

    return Score("m", "t", "acc", hits / of, *wilson(hits, of), of)


def test_the_interval_of_a_difference_is_newcombes() -> None:
    """His first example: 56 of 70 against 48 of 80 is .0524 to .3339."""
    found = difference(score(48, 80), score(56, 70))
    assert found == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    middle, low, high = difference(score(56, 70), score(48, 80))
    assert (middle, low, high) == pytest.approx((-0.2, -0.3339, -0.0524), abs=5e-5)


def test_bad_input_is_one_line(runs: Path, tmp_path: Path) -> None:
    empty, broken, old = tmp_path / "empty", tmp_path / "broken.json", tmp_path / "old.json"
    empty.mkdir()
    broken.write_text("{")
    write_json(old, read_json_object(runs / "report.json") | {"version": 0})
    cases = {
        ("", str(runs)): "A=: missing; name",
        (str(runs), ""): "B=: missing; name",
        (str(tmp_path / "none"), str(runs)): "none: no such file or folder; name",
        (str(empty), str(runs)): "empty: no finished run in it; name",
        (str(broken), str(runs)): "broken.json: not JSON",
        (str(runs), str(old)): "old.json: version: input should be 1; B= takes",
    }
    for (a, b), problem in cases.items():
        with pytest.raises(UserError, match=re.escape(problem)) as caught:
            command(a, b)
        assert "\n" not in str(caught.value)
    shutil.rmtree(runs.with_name("other") / "eval")
    with pytest.raises(UserError, match=r"no stage in common \(eval; pretrain-stage1, "):
        command(str(runs / "eval"), str(runs.with_name("other")))
