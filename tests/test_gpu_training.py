"""Runs of one process on a GPU: every layout of one process, the fast step, a resume, no waiting.

`make gpu-check` runs them there; on a CPU the same tests train over gloo as if on CUDA.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEVICES, ROOT, environment, job_maker, metrics
from safetensors.torch import load_file

pytestmark = [pytest.mark.parametrize("device", DEVICES), pytest.mark.slow]

BF16 = {"model.dtype": "bfloat16", "optimizer.accumulate_grad_in_fp32": True}
PARTS = ("compile_layer", "plain_linears", "in_place_loss", "fused_weight_gradients")
PLAIN: dict[str, Any] = {f"fast_step.{part}": False for part in PARTS}
FUSED = {f"fast_step.{part}": True for part in ("plain_linears", "fused_weight_gradients")}
RECOMPUTE = {"parallelism.recompute_layer": True}
HALF = {"tokens.micro_batch_size": 2, "tokens.batch_accumulation_per_replica": 2}
IN_FP32: dict[str, dict[str, Any]] = {
    "one process": PLAIN,
    "recomputation": {**PLAIN, **RECOMPUTE},
    "afab": {**PLAIN, "parallelism.pp_engine": "afab"},
    "ZeRO-1": {**PLAIN, "optimizer.zero_stage": 1},
    "tp REDUCE_SCATTER": {**PLAIN, "parallelism.tp_mode": "REDUCE_SCATTER"},
}
IN_BF16: dict[str, dict[str, Any]] = {
    "plain": {**BF16, **PLAIN},
    **{f"{part} alone": {**BF16, **PLAIN, f"fast_step.{part}": True} for part in PARTS[:-1]},
    "fused_weight_gradients and plain_linears alone": {**BF16, **PLAIN, **FUSED},
    **{f"all but {part}": {**BF16, f"fast_step.{part}": False} for part in PARTS},
    "all": BF16,
    "all, recomputation": {**BF16, **RECOMPUTE},
    "all, head in chunks": {**BF16, "fast_step.whole_logits_gib": 0.0},
    "untied": {**BF16, "model.model_config.tie_word_embeddings": False},
    "untied, plain": {**BF16, **PLAIN, "model.model_config.tie_word_embeddings": False},
}
ON_A_CPU = (
    "plain",
    "fused_weight_gradients and plain_linears alone",
    "all",
    "untied",
    "untied, plain",
)
SAME_BITS = {**BF16, "fast_step.deterministic": True}

WATCHED = """
import sys
from pathlib import Path
import torch
from nanotron_ext import compat
from nanotron_ext.job import Job
from nanotron_ext.trainer import SmolLM3Trainer

class Watched(SmolLM3Trainer):
    '''From the 6th step on, when all is compiled, whatever waits for the GPU raises.

    Not in the last one, after which nanotron waits for all ranks.
    '''
    def training_step(self, dataloader):
        if torch.cuda.is_available():
            watched = 5 < self.iteration_step < self.config.tokens.train_steps
            torch.cuda.set_sync_debug_mode("error" if watched else "default")
        return super().training_step(dataloader)
    def save_checkpoint(self):
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
        return super().save_checkpoint()

compat.init_distributed()
folder = Path(sys.argv[1])
Watched(folder, Job.read(folder), "cuda").run()
"""


def torchrun(script: Path, *arguments: object) -> str:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    done = subprocess.run(
        [*words, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def train(*folders: Path) -> str:
    """One process for all; `--device-type=cuda` chooses the fast step on a CPU too."""
    return torchrun(ROOT / "tests" / "run_jobs.py", "--device-type=cuda", *folders)


def fitted(device: str, overlay: dict[str, Any]) -> dict[str, Any]:
    """Heads of 64 for a GPU's kernels. test_fast_runs.py compiles on a CPU; here it would take long."""
    width = {"hidden_size": 256, "intermediate_size": 512}
    wide = {f"model.model_config.{key}": value for key, value in width.items()}
    return overlay | ({"fast_step.compile_layer": False} if device == "cpu" else wide)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    return job_maker(tmp_path)


def column(folder: Path, key: str) -> list[float]:
    return [line[key] for line in metrics(folder)]


def test_every_layout_of_one_process_takes_the_same_steps(
    make: Callable[..., Path], device: str
) -> None:
    folders = {name: make(name, fitted(device, overlay)) for name, overlay in IN_FP32.items()}
    train(*folders.values())
    for name, folder in folders.items():
        for key in ("loss", "grad_norm"):
            wanted = column(folders["one process"], key)
            assert column(folder, key) == pytest.approx(wanted, rel=1e-5), (name, key)


def test_every_part_of_the_fast_step_trains_as_the_plain_step(
    make: Callable[..., Path], device: str
) -> None:
    """bf16 keeps 8 bits: 2^-9 = 2e-3 relative. Later gradients are those of other weights."""
    names = IN_BF16 if device == "cuda" else ON_A_CPU
    says = {"logging.log_level": "info"}
    folders = {name: make(name, fitted(device, IN_BF16[name] | says)) for name in names}
    log = train(*folders.values())
    assert "attention kernel:" in log
    for name, folder in folders.items():
        plain = folders["untied, plain" if name.startswith("untied") else "plain"]
        assert column(folder, "loss") == pytest.approx(column(plain, "loss"), rel=2e-3), name
        norms, wanted = (column(run, "grad_norm")[:2] for run in (folder, plain))
        assert norms == pytest.approx(wanted, rel=1e-2), name


def test_a_resumed_run_ends_in_the_same_bits(make: Callable[..., Path], device: str) -> None:
    """`fast_step.deterministic`: else the attention's backward pass adds in the order of arrival."""
    overlay = fitted(device, SAME_BITS)
    whole = make("whole", overlay)
    train(whole)
    resumed = make("resumed", overlay, resume=whole / "checkpoints" / "3")
    train(resumed)
    for key in ("loss", "grad_norm"):
        assert column(resumed, key) == column(whole, key)[3:], key
    files = sorted((whole / "checkpoints/6/model").rglob("*.safetensors"))
    assert files
    for file in files:
        again = load_file(resumed / file.relative_to(whole))
        for name, tensor in load_file(file).items():
            assert torch.equal(tensor, again[name]), (file, name)


def test_no_step_waits_for_the_gpu(make: Callable[..., Path], device: str, tmp_path: Path) -> None:
    """torch raises at every call that would. The line of a step is read while the next one runs."""
    script = tmp_path / "watched.py"
    script.write_text(WATCHED)
    never = {"checkpoints.checkpoint_interval": 100, "general.ignore_sanity_checks": True}
    folder = make("run", fitted(device, {**BF16, **HALF, **never}), steps=12)
    torchrun(script, folder)
    assert column(folder, "step") == list(range(1, 13))
