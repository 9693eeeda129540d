"""The outside judge: what it is given is what lighteval asks, and what differs is listed."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT
from small_models import piqa_data, save_model

JUDGE = ROOT / "benchmarks/judge.py"
SCRIPT = """
import json, runpy, sys
from pathlib import Path
names = runpy.run_path(sys.argv[1], run_name="imported")
found = names["judge"](Path(sys.argv[2]), {"PIQA": "piqa_cf"}, 40, "")
print("RESULT" + json.dumps(found))
"""


@pytest.mark.slow
def test_lm_evaluation_harness_gives_every_item_the_same_score(tmp_path: Path) -> None:
    data = piqa_data(tmp_path / "data")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(JUDGE), str(save_model(tmp_path / "model", 0))],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env=os.environ | {
            "EVAL_DATA": str(data), "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.split("RESULT")[1])["PIQA"]
    assert found["items"] == 40 and found["differences"] == []
    ours, theirs = found["scores"].values()
    assert ours == theirs and 0 < ours["acc"] < 1
    assert 0 < found["furthest_nats"]["lm-evaluation-harness"] < 1e-3


def test_an_item_that_a_judge_scores_otherwise_is_listed() -> None:
    names = runpy.run_path(str(JUDGE), run_name="imported")
    verdict, docs = names["Verdict"], [SimpleNamespace(query=f"item {n}") for n in range(4)]
    ours = [verdict(1.0, 1.0, [-1.0, -2.0])] * 4
    other = [*ours[:3], verdict(1.0, 0.0, [-1.0, -1.75])]
    found = names["compare"](docs, {"lighteval": ours, "other": other})
    assert found["scores"]["other"] == {"acc": 1.0, "acc_norm": 0.75}
    assert found["furthest_nats"] == {"lighteval": 0.0, "other": 0.25}
    (row,) = found["differences"]
    assert (row["item"], row["judge"], row["other"]) == (3, "other", [-1.0, -1.75])
