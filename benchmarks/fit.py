"""Memory of one GPU, predicted against measured: `python benchmarks/fit.py`.

On a GPU every row below runs three steps on random documents, each in a process of its own, and
benchmarks/fit.json keeps what torch counted. Elsewhere the predictions stand beside peaks on one H100
80GB (torch 2.11): of the fast step by benchmarks/gpu_step.py, of the plain one by a prototype.
"""

import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ground.files import write_json
from launch.machine.gpus import gpus
from launch.machine.here import machine
from launch.machine.memory import PLAIN, memory
from launch.recipe.book import load_recipe
from launch.recipe.pretrain import Nanotron
from launch.recipe.scale import load_scale, scale

STEPS = 3  # Adam's moments are there from the second
DOCUMENT_TOKENS = 1000  # mean, as in gpu_step.py


@dataclass(frozen=True)
class Shape:
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int


SHAPES = {
    "3B": Shape(2048, 11008, 36, 16, 4, 128256),
    "135M": Shape(576, 1536, 30, 9, 3, 49152),
    "360M": Shape(960, 2560, 32, 15, 5, 49152),
    "1.0B": Shape(1792, 6144, 24, 14, 2, 49152),
}


@dataclass(frozen=True)
class Row:
    """A micro-batch, and its measured peak of torch.cuda.max_memory_allocated in GiB."""

    shape: str
    windows: int
    window: int  # tokens
    fast: bool
    gibibytes: float
    recompute: bool = False

    def __str__(self) -> str:
        step, more = "fast" if self.fast else "plain", ", recomputed" * self.recompute
        return f"{self.shape:5} {self.windows:>2} x {self.window:>6,} {step}{more}"


# Plain: the plugin before its fast step, by a prototype. Fast: benchmarks/gpu_step.json.
MEASURED = (
    Row("3B", 1, 4096, False, 75.6),
    Row("3B", 1, 4096, False, 58.3, recompute=True),
    Row("3B", 1, 4096, True, 66.03),
    Row("3B", 1, 6144, True, 73.28),
    Row("3B", 1, 32768, True, 64.63, recompute=True),
    Row("135M", 16, 2048, False, 41.9),
    Row("135M", 16, 2048, True, 22.3),
    Row("135M", 32, 2048, True, 42.25),
    Row("360M", 16, 2048, False, 64.6),
    Row("360M", 16, 2048, True, 39.08),
    Row("1.0B", 4, 4096, False, 59.7),
    Row("1.0B", 4, 4096, True, 42.64),
)


def layout_of(row: Row, shape: Shape) -> Nanotron:
    """The published recipe with a row's sizes, two micro-batches a step on one GPU."""
    published = scale(load_recipe("pretrain-stage1"), load_scale("full")).nanotron
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    sizes = {**asdict(shape), "max_position_embeddings": row.window, **ids}
    schedule = replace(
        published.optimizer.learning_rate_scheduler, lr_warmup_steps=0, lr_decay_starting_step=1
    )
    return replace(
        published,
        model=replace(published.model, model_config=replace(published.model.model_config, **sizes)),
        optimizer=replace(published.optimizer, learning_rate_scheduler=schedule),
        parallelism=replace(published.parallelism, dp=1, tp=1, recompute_layer=row.recompute),
        tokens=replace(
            published.tokens,
            micro_batch_size=row.windows,
            sequence_length=row.window,
            batch_accumulation_per_replica=2,
            train_steps=STEPS,
        ),
        fast_step=published.fast_step if row.fast else PLAIN,
    )


def predicted(row: Row) -> float:
    """GiB that torch would count."""
    return memory(layout_of(row, SHAPES[row.shape]), row.fast).allocated / 2**30


def run(nanotron: Nanotron, folder: Path) -> float:
    """GiB that torch counts over a few real steps, in this process; 0 without a GPU."""
    import numpy as np
    import torch
    import yaml

    from nanotron_ext import compat
    from nanotron_ext.adapter import lower
    from nanotron_ext.job import FastStep, Job, Source
    from nanotron_ext.trainer import SmolLM3Trainer

    class Trainer(SmolLM3Trainer):
        def save_checkpoint(self) -> Path:
            return self.folder  # tens of GB that nobody reads

    tokens, model = nanotron.tokens, nanotron.model.model_config
    drawn = np.random.default_rng(0).integers(
        0, model.vocab_size, (STEPS * nanotron.windows_a_step + 2) * (tokens.sequence_length + 1)
    )
    drawn[::DOCUMENT_TOKENS] = 0  # ends a document
    (folder / "shard").mkdir(parents=True)
    drawn.astype(np.uint32).tofile(folder / "shard" / "00000.ds")
    config, _ = lower(asdict(nanotron), folder / "checkpoints", None)
    (folder / "nanotron.yaml").write_text(yaml.safe_dump(config))
    job = Job(
        stage="fit",
        weights={"random": 1.0},
        sources=[Source("random", folder / "shard", 4)],
        decay_exclude=[],
        data_seed=0,
        eos_id=0,
        first_step=0,
        tokens_before=0,
        cache=folder / "cache",
        fast_step=FastStep(**asdict(nanotron.fast_step)),
    )
    compat.init_distributed()
    Trainer(folder, job).run()
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def measured(number: int) -> str:
    """What `run` says of a row, in a process of its own; the error where it ends in one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    done = subprocess.run(
        [*command, __file__, str(number)], capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines() if done.returncode == 0 else done.stderr.splitlines()
    return next((one for one in reversed(lines) if "GiB" in one or "Error" in one), "failed")


def main() -> None:
    if len(sys.argv) > 1:
        row = MEASURED[int(sys.argv[1])]
        with tempfile.TemporaryDirectory() as folder:
            print(f"{run(layout_of(row, SHAPES[row.shape]), Path(folder)):.2f} GiB", flush=True)
        return
    has_gpu, rows = gpus().count > 0, list[dict[str, Any]]()
    print(f"{'GiB allocated at the fullest moment':36} {'predicted':>9} {'measured':>9}")
    for number, row in enumerate(MEASURED):
        guess = predicted(row)
        line = f"{row!s:36} {guess:9.1f} {row.gibibytes:9.1f} {guess / row.gibibytes - 1:+7.1%}"
        here = measured(number) if has_gpu else ""
        print(line, here, flush=True)
        rows.append({**asdict(row), "predicted": round(guess, 2), "measured": here})
    if has_gpu:
        report = {**machine(), "gpu": gpus().name, "rows": rows}
        write_json(Path(__file__).with_suffix(".json"), report)


if __name__ == "__main__":
    main()
