"""Every suite, row by row, from rows in the hub's columns to a score: whoever knows the answers gets
100 %, whoever does not gets 0."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from forked import run
from score_suites import SUITES, suites
from small_models import save_model

pytestmark = pytest.mark.slow


def child(*arguments: object) -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = run(
        "scores", str(ROOT / "tests/score_suites.py"), *map(str, arguments), cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    child("write", folder)
    return folder


@pytest.mark.parametrize("knows", ["right", "wrong"])
def test_an_oracle_scores_100_percent_of_every_row_and_a_fool_0(
    data: Path, tmp_path: Path, knows: str
) -> None:
    child(knows, data, save_model(tmp_path / "model", 0, window=8192), tmp_path)
    found: dict[str, list[dict[str, Any]]] = {
        name: json.loads((tmp_path / f"{name}.json").read_text()) for name in SUITES
    }
    names = {name: [row.name for row in suite.rows] for name, suite in suites().items()}
    assert {name: [row["name"] for row in rows] for name, rows in found.items()} == names
    errors = {
        row["name"]: row["error"] for rows in found.values() for row in rows if "error" in row
    }
    assert errors == {}
    scores = {row["name"]: row["value"] for rows in found.values() for row in rows}
    wanted_score = float(knows == "right")
    # A fool's words share a few letters with a translation.
    assert scores == pytest.approx(dict.fromkeys(scores, wanted_score), abs=0.05)
    for row in (row for rows in found.values() for row in rows):
        assert 0 <= row["low"] <= row["value"] <= row["high"] <= 1
        assert row["low"] < row["high"] or row["metric"] == "chrf++", row
