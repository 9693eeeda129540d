"""What benchmarks/ takes from the project is there, and a GPU's step is measured as it says."""

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, environment

from ground.files import read_json

GPU_STEP = ROOT / "benchmarks" / "gpu_step.py"
GPU_POSTTRAIN = ROOT / "benchmarks" / "gpu_posttrain.py"


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda f: f.stem)
def test_a_benchmark_finds_all_that_it_imports(file: Path) -> None:
    assert callable(runpy.run_path(str(file), run_name="imported")["main"])


def benchmark(file: Path, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(file), *map(str, words)],
        env=environment(CUDA_VISIBLE_DEVICES=""),
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )


@pytest.mark.slow
def test_a_step_is_measured_by_the_real_trainer_and_a_row_replaced(tmp_path: Path) -> None:
    out, rows = tmp_path / "rows.json", []
    for _ in range(2):
        words = ("--size", "smallest", "--variant", "plain", "--device", "cpu", "--out", out)
        done = benchmark(GPU_STEP, *words)
        assert done.returncode == 0, done.stderr[-2000:]
        (row,) = read_json(out)["rows"]
        rows.append(row)
    assert rows[0]["tokens_per_second"] != rows[1]["tokens_per_second"], "measured anew"
    row = rows[1]
    assert row["step_tokens"] == 64 * 2 * 2 and row["tokens_per_second"] > 0
    assert row["mfu_causal"] is None and row["peak_gib"] is None, "known on a GPU alone"
    assert row["kernel_ms_a_step"]["matrix products"] > 0
    assert row["kernel_ms_a_step"]["attention"] > 0
    assert row["where"]["versions"]["torch"] and row["where"]["commit"]
    assert any("attention kernel: sdpa" in line for line in row["fast_step"])


@pytest.mark.slow
def test_each_stage_of_post_training_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    words = ("--size", "smallest", "--attention", "varlen", "--device", "cpu", "--out", out)
    done = benchmark(GPU_POSTTRAIN, *words)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = read_json(out)["rows"]
    cases = [(row["case"]["stage"], row["case"]["lora_rank"]) for row in rows]
    assert cases == [("midtrain", 0), ("sft", 0), ("apo", 0), ("sft", 4)]
    for row in rows:
        assert row["attention"] == "varlen" and row["tokens_per_second"] > 0
        assert row["predicted_gib"] > 0 and row["peak_gib"] is None, "known on a GPU alone"
        tokens = row["max_length"] * row["micro_batch"] * row["accumulation"]
        # Of a pair the rejected answer, three quarters of a sequence, is a quarter shorter.
        sides = 2 - 0.25 * 0.75 if row["case"]["stage"] == "apo" else 1
        assert row["step_tokens"] == tokens * sides and row["where"]["commit"]


@pytest.mark.parametrize("file", [GPU_STEP, GPU_POSTTRAIN], ids=lambda file: file.stem)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--device cuda: no GPU here; write --size smallest --device cpu --out FILE"),
        (["--device", "cpu"], "--device cpu: is for a machine without a GPU, and needs --out FILE"),
    ],
)
def test_a_device_that_is_not_there_is_one_line(file: Path, words: list[str], message: str) -> None:
    done = benchmark(file, *words)
    assert (done.returncode, done.stderr) == (2, f"error: {message}\n")


@pytest.mark.parametrize(
    ("window", "gflops"),
    [(4096, 20.26), (32_768, 32.95), (65_536, 47.44)],
)
def test_flops_a_token_of_the_published_shape(window: int, gflops: float) -> None:
    """6 x 3,074,949,120 parameters of matrix products, and 0.885 MFLOP a key of causal attention."""
    names: dict[str, Any] = runpy.run_path(str(GPU_STEP), run_name="imported")
    found = names["Case"]("3b", window, 1, 1).flops_per_token(window / 2)
    assert found == pytest.approx(6 * 3_074_949_120 + 884_736 * window / 2)
    assert found / 1e9 == pytest.approx(gflops, rel=1e-3)
