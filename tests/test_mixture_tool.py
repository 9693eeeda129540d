"""`make mixture`: what a stage should draw beside what it has drawn."""

import json
from collections import Counter
from pathlib import Path

import pytest
from test_sizes import pretrained

from ground.errors import UserError
from launch.recipe.scale import load_scale
from launch.stages import accounting
from launch.tools.mixture import drawn, show, summed
from nanotron_ext.mixture import build_mixture


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CACHE", str(tmp_path / "cache"))


def test_what_will_be_drawn_is_the_plan_but_for_a_window_of_each_source(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    at = load_scale("60m")
    run, found = pretrained("pretrain-stage2", at), drawn("pretrain-stage2", at)
    windows = (run.steps - run.first_step) * run.recipe.nanotron.windows_a_step
    assert sum(one.tokens for one in found.lines) == windows * run.window
    for one in found.lines:
        assert abs(one.realised - one.planned) < 1 / windows
        assert one.epochs is not None and one.epochs < 1
    for key in ("category", "language"):
        groups = summed(found.lines, key)
        assert sum(group["planned"] for group in groups) == pytest.approx(1)
        assert {g["category"] for g in groups} == {getattr(o.row, key) for o in found.lines}
    show("pretrain-stage2", at)
    printed = capsys.readouterr().out
    assert "by the mixture" in printed and "web-multilingual" in printed and "█" in printed
    drawings = sorted((tmp_path / "runs/60m/mixture").iterdir())
    assert [file.name for file in drawings] == [
        f"pretrain-stage2-{key}.svg" for key in ("category", "language")
    ]
    assert all(file.read_text().startswith("<svg") for file in drawings)
    run.begin(force=False)  # nothing that was drawn stands in a run's way


def test_a_run_s_own_count_is_shown_without_that_of_earlier_stages() -> None:
    at = load_scale("tiny")
    run, steps = pretrained("pretrain-stage2", at), 7
    own = build_mixture(run.recipe.mixture).counts(steps * run.recipe.nanotron.windows_a_step)
    total = Counter(accounting.tokens_per_source(run.earlier))
    total.update({name: windows * run.window for name, windows in own.items()})
    run.begin(force=False)
    line = {"step": run.first_step + steps, "tokens_per_source": dict(total)}
    (run.folder / "metrics.jsonl").write_text(
        json.dumps(line) + "\n" + json.dumps({"step": 10**6}) + "\n"
    )
    found = drawn("pretrain-stage2", at)
    assert f"up to step {run.first_step + steps:,}" in found.said_by
    assert {o.name: o.tokens for o in found.lines} == {n: w * run.window for n, w in own.items()}
    manifest = run.folder / "manifest.json"
    manifest.unlink()  # whose count it is, nothing says any more
    assert "by the mixture" in drawn("pretrain-stage2", at).said_by


def test_a_stage_without_a_mixture_is_refused() -> None:
    with pytest.raises(UserError, match=r"^STAGE=sft: has no mixture of text; name a stage that"):
        drawn("sft", load_scale("tiny"))
