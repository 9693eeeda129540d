"""The trainer takes the fast step in every layout: the plain run's losses and gradient norms.

Real processes over gloo, which choose as on CUDA. Jobs of the same process count share processes.
"""

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, job_maker, metrics
from forked import distributed

pytestmark = pytest.mark.slow

PLAIN: dict[str, Any] = {f"fast_step.{key}": False for key in (
    "compile_layer", "plain_linears", "in_place_loss", "fused_weight_gradients")}  # fmt: skip
EAGER: dict[str, Any] = {"fast_step.compile_layer": False}
CHUNKS: dict[str, Any] = {**EAGER, "fast_step.whole_logits_gib": 0.0}
# The gradients of the weights alone: on a CPU their products are rounded as in the plain step.
FUSED = {**PLAIN, "fast_step.plain_linears": True, "fast_step.fused_weight_gradients": True}

BF16 = {"model.dtype": "bfloat16", "optimizer.accumulate_grad_in_fp32": True}
UNTIED = {**BF16, "model.model_config.tie_word_embeddings": False}
RECOMPUTE = {"parallelism.recompute_layer": True}
DP2 = {"parallelism.dp": 2, "tokens.batch_accumulation_per_replica": 2}
ZERO = {**DP2, "optimizer.zero_stage": 1}
TP2 = {"parallelism.tp": 2}
SCATTER = {**TP2, "parallelism.tp_mode": "REDUCE_SCATTER"}
PP2 = {"parallelism.pp": 2}

# name: (processes, the job beside its options)
IN_FP32: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "recomputation": (1, RECOMPUTE),
    "dp 2": (2, DP2),
    "tp 2": (2, TP2),
    "tp 2 REDUCE_SCATTER, recomputation": (2, {**SCATTER, **RECOMPUTE}),
    "pp 2": (2, PP2),
}
IN_BF16: dict[str, tuple[int, dict[str, Any]]] = {
    "one process, bf16": (1, UNTIED),
    "recomputation, bf16": (1, {**UNTIED, **RECOMPUTE}),
    "dp 2, bf16": (2, {**UNTIED, **DP2}),
    "dp 2, ZeRO-1, bf16": (2, {**UNTIED, **ZERO}),
    "tp 2, bf16": (2, {**UNTIED, **TP2}),
    "tp 2 REDUCE_SCATTER, bf16": (2, {**UNTIED, **SCATTER}),
    "pp 2, bf16": (2, {**UNTIED, **PP2}),
}
TIED = {"tied, bf16": (1, BF16), "tied, dp 2, bf16": (2, {**BF16, **DP2})}
COMPILED = ("one process", "tp 2", "tp 2 REDUCE_SCATTER, recomputation")

JOBS = ROOT / "tests" / "run_jobs.py"
Runs = dict[str, Path]


def run(folders: list[Path], processes: int, script: Path = JOBS) -> str:
    """Train each folder's job as on CUDA; returns the end of what failed, if anything did."""
    words = [str(script), "--device-type=cuda", *map(str, folders)]
    done = distributed("trainer", processes, *words)
    assert (done.returncode == 0) is (script == JOBS), done.stderr[-3000:]
    return done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Six steps of each layout, plain and fast."""
    make = job_maker(tmp_path_factory.mktemp("fast"))
    jobs: dict[str, tuple[int, dict[str, Any]]] = {}
    for name, (processes, overlay) in (IN_FP32 | IN_BF16 | TIED).items():
        ways = {"plain": PLAIN, "eager": EAGER}
        if name in IN_FP32:
            ways["chunks"] = CHUNKS
        if name in IN_BF16:
            ways["fused"] = FUSED
        for way, options in ways.items():
            jobs[f"{name}: {way}"] = (processes, {**overlay, **options})
    folders = {name: make(name, overlay) for name, (_, overlay) in jobs.items()}
    for count in (1, 2):
        run([folders[name] for name, (processes, _) in jobs.items() if processes == count], count)
    return folders


def column(folder: Path, key: str) -> list[float]:
    values = [line[key] for line in metrics(folder)]
    assert len(values) == 6
    return values


def assert_near(mine: Path, plain: Path, relative: float) -> None:
    for key in ("loss", "grad_norm"):
        assert column(mine, key) == pytest.approx(column(plain, key), rel=relative), key


@pytest.mark.parametrize("way", ["eager", "chunks"])
@pytest.mark.parametrize("name", IN_FP32)
def test_in_fp32_each_layout_takes_the_plain_steps(trained: Runs, name: str, way: str) -> None:
    assert_near(trained[f"{name}: {way}"], trained[f"{name}: plain"], 1e-6)


@pytest.mark.parametrize("name", IN_BF16)
def test_gradients_added_in_the_product_are_the_plain_ones_to_the_bit(
    trained: Runs, name: str
) -> None:
    """Over micro-batches, data-parallel ranks and ZeRO's shares: none is lost or added twice."""
    mine, plain = trained[f"{name}: fused"], trained[f"{name}: plain"]
    for key in ("loss", "grad_norm"):
        assert column(mine, key) == column(plain, key), key


@pytest.mark.parametrize("name", [*IN_BF16, *TIED])
def test_in_bf16_the_fast_step_stays_near_the_plain_one(trained: Runs, name: str) -> None:
    """bf16 keeps 8 bits: 2^-9 = 2e-3 relative. Later gradients are those of other weights."""
    mine, plain = trained[f"{name}: eager"], trained[f"{name}: plain"]
    assert column(mine, "loss") == pytest.approx(column(plain, "loss"), rel=2e-3)
    norms, plain_norms = (column(folder, "grad_norm")[:2] for folder in (mine, plain))
    assert norms == pytest.approx(plain_norms, rel=2e-3)


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_the_trainer_takes_the_plain_steps(
    trained: Runs, name: str, tmp_path: Path
) -> None:
    processes, overlay = IN_FP32[name]
    folder = job_maker(tmp_path)("compiled", overlay)
    run([folder], processes)
    assert_near(folder, trained[f"{name}: plain"], 1e-6)


def test_compiled_with_gradients_in_the_product_bf16_stays_near(
    trained: Runs, tmp_path: Path
) -> None:
    make = job_maker(tmp_path)
    plain = column(trained["tied, bf16: plain"], "loss")
    for processes, layout in ((1, RECOMPUTE), (2, SCATTER)):
        folder = make(f"of {processes}", {**BF16, **layout})
        run([folder], processes)
        assert column(folder, "loss") == pytest.approx(plain, rel=2e-3)


def test_a_resumed_fast_run_ends_in_the_same_bits(trained: Runs, tmp_path: Path) -> None:
    name = "tied, bf16: eager"
    resume = trained[name] / "checkpoints" / "3"
    folder = job_maker(tmp_path)("resumed", {**BF16, **EAGER}, resume=resume)
    run([folder], 1)
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in metrics(folder)] == column(trained[name], key)[3:], key


UPSTREAM = {
    "gradients in the buffer": (
        "compat.expect_gradients_in_buffer = lambda accumulator, names: None",
        1,
        "to have gradient",
    ),
}


@pytest.mark.parametrize(("without", "processes", "symptom"), UPSTREAM.values(), ids=UPSTREAM)
def test_without_the_mend_of_nanotron_the_run_fails_with_its_symptom(
    tmp_path: Path, without: str, processes: int, symptom: str
) -> None:
    script = tmp_path / "without.py"
    jobs = JOBS.read_text().replace("if __name__", f"import contextlib\n{without}\nif __name__")
    script.write_text(jobs)
    layout = DP2 if processes == 2 else {}
    folder = job_maker(tmp_path)("run", {**BF16, **layout, **EAGER})
    assert re.search(symptom, run([folder], processes, script))
