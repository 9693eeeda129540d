"""Runs whose release and scores are done, with an export, a report and two kept checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_models import write_model

from ground.checksums import seal
from launch.recipe.scale import load_scale
from launch.run.folder import StageRun
from launch.walk import resolve

SCORE = {"model": "release", "name": "HellaSwag", "task": "HellaSwag", "suite": "local"}
SCORE |= {"metric": "acc_norm", "chance": 0.25, "value": 0.5417, "low": 0.3507, "high": 0.7211}
SWITCH = SCORE | {"name": "mode switch", "suite": "modes", "metric": "kept", "chance": None}
ROWS = [row | {"items": 24} for row in (SCORE, SWITCH, SCORE | {"model": "longctx-64k/hf"})]


def write_runs(folder: Path) -> Path:
    """Write `folder`/runs, of random models but of the recipe's own identities; returns it."""
    from nanotron_ext.convert import from_hf

    root = folder / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS", str(root))
        patch.setenv("CACHE", str(folder / "cache"))
        release = resolve("release", load_scale("tiny"))
        seal(write_model(release.inputs["merge"].folder / "hf", 3))
        _finish(release, lambda: release.work(0))
        _finish(resolve("eval", load_scale("tiny")), lambda: {"evaluation": ROWS, "left_out": []})
        stage = resolve("pretrain-stage1", load_scale("tiny"))
        stage.begin(force=False)
        write_model(stage.inputs["tokenizer"].folder / "tokenizer", 0)
        for step in (10, 20):
            from_hf(write_model(root / f"model-{step}", step), stage.folder / f"checkpoints/{step}")
        (root / "tiny/export").mkdir()
        (root / "tiny/export/SmolLM3-f16.gguf").write_bytes(b"GGUF" * 100)
        (root / "tiny/report.html").write_text("<html></html>")
    return root


def _finish(run: StageRun, work: Callable[[], dict[str, Any]]) -> None:
    run.begin(force=False)
    run.finish(**work())
