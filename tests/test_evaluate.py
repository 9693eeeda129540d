"""`make eval` and the eval stage: which models, data and rows a suite is scored on, and what is kept."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, edit
from small_models import piqa_data, save_model

from eval_tasks.job import Job
from ground.errors import UserError
from launch.recipe.evaluation import NOT_SUITES, load_suite, published_score
from launch.report.terminal import print_scores
from launch.stages.evaluate import check_tasks
from launch.tools.evaluate_any import evaluate_models, short_names
from launch.tools.win_rate import show_win_rates

SUITES = [f.stem for f in (ROOT / "recipes/eval").glob("*.yaml") if f.stem not in NOT_SUITES]


@pytest.fixture(autouse=True)
def _without_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.slow
def test_a_model_that_cannot_be_scored_costs_no_other_its_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good, base = (save_model(tmp_path / name, 0, window=4096) for name in ("good", "base"))
    for file in base.glob("chat_template*"):
        file.unlink()
    data = piqa_data(tmp_path / "data")
    suite = load_suite("local")
    rows = tuple(row for row in suite.rows if row.name == "PIQA")
    in_chat = replace(suite, rows=rows, chat=True)
    monkeypatch.setattr("launch.stages.evaluate.load_suite", lambda name: in_chat)
    monkeypatch.setattr("launch.stages.evaluate.local_datasets", lambda: data)
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    broken = {name: save_model(tmp_path / name, 0) for name in ("weights", "kind", "tokenizer")}
    weights = broken["weights"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    edit(broken["kind"] / "config.json", '"smollm3"', '"smollm9"')
    (broken["tokenizer"] / "tokenizer.json").write_text("{}")
    models = [base, *broken.values(), good]
    with pytest.raises(UserError, match=r"4 of 5 scores are left out; the first, PIQA: .*base: no"):
        evaluate_models([str(model) for model in models], "local", "tiny", limit=4)
    said = capsys.readouterr().out
    assert f"left out: {base}: no chat template" in said
    for folder in broken.values():
        assert f"left out: {folder}: cannot be loaded: " in said
    (table,) = (tmp_path / "runs").rglob("local-table.json")
    scored = [row for row in json.loads(table.read_text()) if "error" not in row]
    assert [(row["model"], row["items"]) for row in scored] == [(str(good), 4)]


def test_models_are_told_apart_by_as_much_of_their_path_as_it_takes() -> None:
    found = short_names(["runs/a/hf", "runs/b/hf", "runs/release", "hub/model"])
    assert list(found.values()) == ["a/hf", "b/hf", "release", "model"]


def test_whether_data_come_from_packages_is_the_suites_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[Job] = []
    monkeypatch.setattr("launch.stages.evaluate.local_datasets", lambda: tmp_path / "packages")
    monkeypatch.setattr("launch.stages.evaluate._run", lambda job, file: jobs.append(job) or [])
    monkeypatch.setenv("RUNS", str(tmp_path))
    for suite in ("base", "local"):
        evaluate_models(["hub/a "], suite, "tiny", limit=3)
    assert [job.data for job in jobs] == [None, str(tmp_path / "packages")]
    assert jobs[0].models == ["hub/a"] and jobs[0].limit == 3
    with pytest.raises(UserError, match="LIMIT=-1: below 0"):
        evaluate_models(["hub/a"], "local", "tiny", limit=-1)


def test_scores_are_ready_for_the_win_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def scored(suite: str, name: str, value: float) -> dict[str, Any]:
        row = {"suite": suite, "model": "out/SmolLM3-3B", "name": name, "metric": "", "items": 9}
        return row | {"value": value, "low": 0, "high": 1, "chance": None, "published": None}

    found = {
        "base": [scored("base", "MMLU CF", 0.5), scored("base", "RULER", 0.1)],
        "instruct": [scored("instruct-think", "IFEval", 0.9), scored("instruct-no_think", "IFEval", 0.7)],
        "local": [scored("local", "PIQA", 0.6)],
        "multilingual": [scored("multilingual", "Belebele fr", 0.6)],
    }  # fmt: skip
    monkeypatch.setattr(
        "launch.tools.evaluate_any.evaluate", lambda models, suite, *_, **__: found[suite]
    )
    monkeypatch.setenv("RUNS", str(tmp_path))
    for suite in found:
        evaluate_models(["out/SmolLM3-3B"], suite, "full", limit=0)
    folder, said = tmp_path / "full/evaluation", capsys.readouterr().out
    scores = {file.stem: yaml.safe_load(file.read_text()) for file in folder.glob("*.yaml")}
    assert scores == {
        "base-scores": {"SmolLM3-3B (own)": {"MMLU-CF": 50.0}},
        "instruct-think-scores": {"SmolLM3-3B (own)": {"IFEval": 90.0}},
        "instruct-no_think-scores": {"SmolLM3-3B (own)": {"IFEval": 70.0}},
    }
    assert f"make win-rate SUITE=think SCORES={folder / 'instruct-think-scores.yaml'}" in said
    show_win_rates("think", folder / "instruct-think-scores.yaml")
    assert "SmolLM3-3B (own)" in capsys.readouterr().out


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_loads_and_its_published_values_exist(name: str) -> None:
    suite = load_suite(name)
    check_tasks(name, suite)
    for section in suite.system_prompts or {suite.published: ""}:
        for row in suite.rows:
            value = published_score(section, row.published)
            assert value is None or 0 < value < 1
    with pytest.raises(UserError, match=r"SUITE=bsae: no such suite; .*base"):
        load_suite("bsae")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("{folder}", r"MODEL=.*: no config\.json there; name a transformers folder or a hub id"),
        ("{folder}/none", r"MODEL=.*none: no config\.json there"),
        ("./none", r"MODEL=\./none: no config\.json there"),
        ("", "MODEL=: no config"),
    ],
)
def test_what_is_no_model_is_refused_before_any_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, words: str
) -> None:
    monkeypatch.setattr(
        "launch.tools.evaluate_any.evaluate", lambda *_, **__: pytest.fail("scored")
    )
    with pytest.raises(UserError, match=words):
        evaluate_models(["hub/model", model.format(folder=tmp_path)], "local", "tiny", limit=0)


def test_the_table_tells_scores_of_both_modes_apart(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")  # xdist's is 80, where the names are folded
    row = {"model": "m", "value": 0.5, "low": 0.4, "high": 0.6, "chance": None, "published": None, "items": 9}  # fmt: skip
    modes = [row | {"name": "IFEval", "suite": f"instruct-{mode}"} for mode in ("think", "no_think")]  # fmt: skip
    print_scores([*modes, row | {"name": "AIME", "suite": "instruct-think"}])
    said = capsys.readouterr().out
    assert "IFEval, instruct-think" in said and "IFEval, instruct-no_think" in said
    assert "AIME," not in said
