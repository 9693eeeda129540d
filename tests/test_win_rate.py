"""The win rates of the published scores, and what a pair counts."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from eval_tasks.win_rate import win_rates
from ground.errors import UserError
from launch.tools.win_rate import show_win_rates, with_own

PUBLISHED: dict[str, Any] = yaml.safe_load((ROOT / "recipes/eval/published.yaml").read_text())


def rates(kind: str) -> dict[str, float]:
    found = win_rates(PUBLISHED["scores"][kind], PUBLISHED["win_rate"][kind])
    return {model: round(100 * rate, 1) for model, rate in found.items()}


def test_the_reference_table_comes_out_of_the_published_scores() -> None:
    assert rates("base") == {
        "Qwen3-4B": 81.2, "SmolLM3-3B": 68.8, "Qwen2.5-3B": 43.8, "Llama3.2-3B": 33.3,
        "Qwen3-1.7B": 22.9,
    }  # fmt: skip
    assert rates("no_think") == {
        "Qwen3-4B": 89.3, "SmolLM3-3B": 71.4, "Qwen2.5-3B": 42.9, "Qwen3-1.7B": 35.7,
        "Llama3.2-3B": 10.7,
    }  # fmt: skip


def test_the_data_are_whole() -> None:
    assert {kind: len(names) for kind, names in PUBLISHED["win_rate"].items()} == {
        "base": 12, "no_think": 7, "think": 8,
    }  # fmt: skip
    scores = PUBLISHED["scores"]
    assert {kind: len(rows) for kind, rows in scores.items()} == {
        "base": 17, "no_think": 8, "think": 8, "multilingual": 29,
    }  # fmt: skip
    values = [v for rows in scores.values() for row in rows.values() for v in row.values()]
    assert all(0 < value < 100 for value in values)


def test_a_users_model_joins_the_table() -> None:
    scores = {name: {**row, "mine": 100.0} for name, row in PUBLISHED["scores"]["base"].items()}
    found = win_rates(scores, PUBLISHED["win_rate"]["base"])
    assert next(iter(found.items())) == ("mine", 1.0)
    assert found["Qwen3-4B"] == pytest.approx(39 / 60)


def test_a_tie_is_half_a_win_and_a_missing_score_no_game() -> None:
    scores = {"a": {"x": 1.0, "y": 1.0}, "b": {"x": 2.0, "y": 1.0}, "c": {"x": 5.0}}
    assert win_rates(scores, ["a", "b", "c"]) == {"x": 0.75, "y": 0.25}
    with pytest.raises(ValueError, match="x: no other model"):
        win_rates(scores, ["c"])
    with pytest.raises(KeyError, match="d"):
        win_rates(scores, ["d"])


def test_own_scores_are_read_from_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("mine: {HellaSwag: 75.8, PIQA: 78.4}\n")
    show_win_rates("base", file)
    cells = [
        [cell.strip() for cell in line.split("│")] for line in capsys.readouterr().out.splitlines()
    ]
    (mine,) = [row for row in cells if "mine" in row]
    # HellaSwag: above 4 of 5; PIQA: above 78.35, 77.58 and 75.35
    assert mine[2:4] == [f"{100 * (4 + 3) / 10:.1f}", "2"]


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (
            {"mine": {"HelaSwag": 50}},
            "mine: no benchmark 'HelaSwag' here; did you mean 'HellaSwag'?",
        ),
        ({"mine": {"PIQA": 101}}, "mine: PIQA: 101 is not a percentage"),
        ({"mine": {"PIQA": float("nan")}}, "mine: PIQA: nan is not a percentage"),
        ({"mine": {"PIQA": "high"}}, "mine: PIQA: 'high' is not a number"),
        ({"mine": {"PIQA": True}}, "mine: PIQA: True is not a number"),
        ({"SmolLM3-3B": {"PIQA": 50}}, "SmolLM3-3B has published scores; give yours another name"),
        ({"PIQA": 50}, "not a mapping of model"),
        ({"mine": {}}, "not a mapping of model"),
    ],
)
def test_own_scores_that_cannot_be_are_refused(own: object, said: str) -> None:
    with pytest.raises(UserError) as caught:
        with_own(PUBLISHED["scores"]["base"], own, "SCORES=mine.yaml")
    assert str(caught.value).startswith("SCORES=mine.yaml: ") and said in str(caught.value)
