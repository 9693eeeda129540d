"""The chain of a size from the tokenizer to the report, on two cores: 60m.yaml made small."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from traces import check_agreement

from launch.recipe.scale import load_scale
from launch.recipe.tables import load_pipeline
from launch.tools.seen import trained_stages

CACHE = os.environ.get("CACHE") or str(ROOT / ".cache")
BATCH, STEPS, VOCAB_SIZE = 4096, 40, 1024
FEW = {"max_steps": 4}
# What two cores need; batch by tokens, stages by tokens, windows and stand-ins are 60m.yaml's way.
SMALL: dict[str, Any] = {
    "extends": "scales/60m.yaml",
    "device": "cpu",
    "windows_divided_by": 64,
    "batch_tokens": BATCH,
    "tokenizer": {"vocab_size": VOCAB_SIZE, "train_bytes": 1_000_000},
    "nanotron": {
        "logging": {"log_level": "error", "log_level_replica": "error"},
        "model": {
            "dtype": "float32",
            "model_config": {
                "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
                "num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": VOCAB_SIZE,
                "bos_token_id": VOCAB_SIZE - 13, "eos_token_id": VOCAB_SIZE - 12,
            },
        },
        "optimizer": {"accumulate_grad_in_fp32": False},
        "parallelism": {"tp_mode": "ALL_REDUCE", "tp_linear_async_communication": False},
    },
    "posttrain": {
        "every_stage": {
            "template": {"short_system": True},
            "trl": {
                "bf16": False, "use_cpu": True, "max_length": 256, "gradient_accumulation_steps": 2,
                "gradient_checkpointing": False, "gradient_checkpointing_kwargs": None,
                "model_init_kwargs": {"dtype": "float32", "attn_implementation": "sdpa"},
            },
            "scores": {"prompts": 0, "prompts_at_end": 2, "max_new_tokens": 16},
        },
        "stages": {
            "apo": {
                "template": {"short_system": False},
                "trl": {"max_length": 256, "gradient_accumulation_steps": 2},
            }
        },
    },
    "standin": {
        "tokens": STEPS * BATCH,
        "held_out": {"bytes_per_category": 4000},
        "train_steps": {"longctx-32k": 3, "longctx-64k": 3},
        "posttrain": {
            "chats": {"rows": 50, "held_out_rows": 4},
            "stages": {"midtrain": {"trl": FEW}, "sft": {"trl": FEW}, "apo": {"trl": FEW}},
        },
        "evaluation": {"limit": 2},
    },
}  # fmt: skip


def manifest(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return values


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_chain_of_a_size_runs_on_stand_ins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mini.yaml"
    file.write_text(yaml.safe_dump(SMALL))
    variables = {"SCALE": str(file), "ORIGIN": "standin", "RUNS": str(tmp_path / "runs")}
    kept = {name: value for name, value in os.environ.items() if name not in ("TEXT", "FORCE")}
    environment = kept | variables | {"CACHE": CACHE}
    command = [sys.executable, "-m", "launch", "run", "report"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    runs = tmp_path / "runs" / "mini-standin"
    assert (runs / "report.html").is_file() and (runs / "release" / "yarn").is_dir()
    for stage, row in load_pipeline().items():
        if row.engine != "report":
            assert manifest(runs / stage)["finished"], stage
    stage3, longest = manifest(runs / "pretrain-stage3"), manifest(runs / "longctx-64k")
    assert (stage3["step"], stage3["tokens"]) == (STEPS, STEPS * BATCH)
    assert longest["tokens"] == (STEPS + 6) * BATCH
    shards = manifest(runs / "data-longctx")["shards"]
    window = 65536 // 64
    assert min(shard["tokens"] for shard in shards.values()) > window
    lines = (runs / "pretrain-stage1" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == load_steps(file) and json.loads(lines[0])["step"] == 1
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (again.returncode, again.stdout) == (0, f"report: up to date, {runs / 'report'}\n")
    for name in ("RUNS", "CACHE"):
        monkeypatch.setenv(name, environment[name])
    trained = trained_stages(load_scale(str(file), origin="standin"))
    assert len(trained) == 8
    for run in trained:
        check_agreement(run, steps=100, sought=5)


def load_steps(file: Path) -> int:
    """Steps of the first stage."""
    from launch.stages.pretrain import PretrainStage
    from launch.walk import resolve

    run = resolve("pretrain-stage1", load_scale(str(file), origin="standin"))
    assert isinstance(run, PretrainStage)
    return run.steps
