"""job.json says to the trainer what launch asked for, and launch need not import torch to write it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from ground.errors import UserError
from nanotron_ext.job import FastStep, Job, Source, SpikeOptions

JOB = Job(
    stage="pretrain-stage2",
    weights={"a": 0.7, "b": 0.3},
    sources=[Source("a", Path("/shards/a"), 2, 12), Source("b", Path("/shards/b"), 4)],
    decay_exclude=[".*token_embedding.*"],
    gradient_spikes=SpikeOptions(window_steps=2, skip_batch=True),
    fast_step=FastStep(compile_layer=False, whole_logits_gib=2.5),
    data_seed=6,
    eos_id=255,
    first_step=3,
    tokens_before=384,
    tokens_per_source_before={"a": 384},
    cache=Path("/cache"),
    node_cache=(Path("/scratch/shards"), 10**9),
)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    JOB.write(tmp_path)
    assert Job.read(tmp_path) == JOB


def test_the_keys_of_the_file_stay_what_they_are(tmp_path: Path) -> None:
    JOB.write(tmp_path)
    values = json.loads((tmp_path / "job.json").read_text())
    assert " ".join(values) == (
        "stage weights sources decay_exclude gradient_spikes fast_step data_seed eos_id first_step "
        "tokens_before tokens_per_source_before cache node_cache memory_remedy"
    )
    assert values["sources"][0] == {
        "name": "a",
        "folder": "/shards/a",
        "token_bytes": 2,
        "drawn_windows": 12,
    }
    assert values["gradient_spikes"] == {"window_steps": 2, "threshold": 10.0, "skip_batch": True}


def test_a_missing_job_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "job.json"))):
        Job.read(tmp_path)


@pytest.mark.parametrize("module", ["job", "config", "weight_table", "adapter"])
def test_what_launch_imports_to_prepare_a_run_is_light(module: str) -> None:
    code = f"import sys, nanotron_ext.{module}; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"torch", "numpy", "nanotron", "transformers"} & set(done.stdout.split())
