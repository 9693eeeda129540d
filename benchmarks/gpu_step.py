"""Speed of a training step on one GPU: `python benchmarks/gpu_step.py`.

Trains each case in a process of its own, through the real trainer and loader, on random tokens in
documents of 1,000 tokens on average, in bf16 with fp32 accumulation, and measures after the first
steps, in which all is compiled: tokens a second (median step, optimizer included), peak memory, and
then, over two more steps, the time of kernels by group. MFU counts 6 FLOPs a parameter of a matrix
product and causal attention over whole windows, whatever the documents are (mean keys: half a window):
above 8,192 tokens a window that is mostly attention which nobody computes, so `mfu_documents` counts
the keys of the documents.

    --size 3b --variant "all on"     some of the cases
    --size smallest --device cpu --out FILE     what runs without a GPU

Writes benchmarks/gpu_step.json after every case; a case that is run again replaces its row.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from ground.errors import UserError, fail
from ground.files import read_json, write_json
from launch.machine.here import machine

HERE = Path(__file__)
WARM_UP, MEASURED, PROFILED = 5, 10, 2  # steps
DOCUMENT_TOKENS, EOS_ID, SHARD_TOKENS = 1000, 1, 4_000_000
# Dense bf16 FLOP/s of NVIDIA's data sheets, by a word of the device's name.
PEAK_FLOPS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}

# (hidden, inner, layers, heads, kv heads, vocabulary). 135m and 360m are SmolLM2's published shapes;
# 1b has the inner size at which the prototype's tokens/s and MFU agree.
SHAPES = {
    "3b": (2048, 11008, 36, 16, 4, 128_256),
    "1b": (1792, 6144, 24, 14, 2, 49_152),
    "360m": (960, 2560, 32, 15, 5, 49_152),
    "135m": (576, 1536, 30, 9, 3, 49_152),
    "smallest": (64, 128, 4, 4, 1, 512),
}
SHOWN = ("tokens_per_second", "mfu_causal", "mfu_documents", "peak_gib", "out_of_memory")
PARTS = ("compile_layer", "plain_linears", "in_place_loss", "fused_weight_gradients")
VARIANTS: dict[str, dict[str, Any]] = {
    "all on": {},
    "plain": dict.fromkeys(PARTS, False),
    # Without plain_linears there are no fused gradients either: compare it to the row without these.
    **{f"without {part}": {part: False} for part in PARTS},
    "attention varlen": {"attention": "varlen"},
    "deterministic": {"deterministic": True},
}
# By the first pattern that a kernel's name, or on a CPU an operator's, contains.
GROUPS = {
    "attention": r"flash|fmha|attention",
    "matrix products": r"gemm|nvjet|cutlass|xmma|cublas|::mm|::addmm|::bmm",
    "optimizer": r"adam|multi_tensor|foreach",
    "compiled": r"triton",
    "copies": r"memcpy|memset|copy|cat",
}


@dataclass(frozen=True)
class Case:
    size: str
    window: int  # tokens
    micro_batch: int  # windows
    accumulation: int  # micro-batches
    recompute: bool = False
    variant: str = "all on"

    def __str__(self) -> str:
        return (
            f"{self.size} {self.window} x {self.micro_batch} x {self.accumulation}, {self.variant}"
        )

    @property
    def step_tokens(self) -> int:
        return self.window * self.micro_batch * self.accumulation

    @property
    def document_keys(self) -> float:
        """Mean keys of a token in documents of geometric length, cut at the window's end."""
        p, n = 1 / DOCUMENT_TOKENS, self.window
        # A token at place i has a document that began at most i tokens before: (1 - (1-p)^i) / p.
        return sum((1 - (1 - p) ** i) / p for i in range(1, n + 1)) / n

    def flops_per_token(self, keys: float) -> float:
        """Of training, where a token has `keys` on average; half a window: the causal convention."""
        hidden, inner, layers, heads, kv_heads, vocab = SHAPES[self.size]
        attention = 2 * hidden**2 + 2 * hidden * hidden // heads * kv_heads
        parameters = layers * (attention + 3 * hidden * inner) + vocab * hidden
        return 6 * parameters + 12 * layers * hidden * keys


CASES = (
    *(Case("3b", 4096, 1, 4, variant=variant) for variant in VARIANTS),
    Case("3b", 4096, 1, 16),
    Case("3b", 6144, 1, 10),
    Case("3b", 32_768, 1, 2, recompute=True),
    Case("3b", 65_536, 1, 1, recompute=True),
    *(Case("1b", 4096, 4, 4, variant=variant) for variant in ("plain", "all on")),
    *(Case("360m", 2048, 16, 2, variant=variant) for variant in ("plain", "all on")),
    *(Case("135m", 2048, 16, 4, variant=variant) for variant in ("plain", "all on")),
    Case("135m", 2048, 32, 2),
    *(Case("smallest", 64, 2, 2, variant=variant) for variant in ("plain", "all on")),
)


def section_of(case: Case) -> dict[str, Any]:
    """Stage 1's nanotron section with the case's shape and step, on one GPU."""
    from launch.recipe.book import load_recipe

    hidden, inner, layers, heads, kv_heads, vocab = SHAPES[case.size]
    section = asdict(load_recipe("pretrain-stage1").recipe.nanotron)
    steps = WARM_UP + MEASURED + PROFILED
    section["model"]["dtype"] = "bfloat16"
    section["model"]["model_config"] |= {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": case.window,
        "bos_token_id": None,
        "eos_token_id": EOS_ID,
    }
    section["parallelism"] |= {"dp": 1, "tp": 1, "pp": 1, "recompute_layer": case.recompute}
    section["optimizer"] |= {"accumulate_grad_in_fp32": True, "zero_stage": 0}
    section["optimizer"]["learning_rate_scheduler"] |= {
        "lr_warmup_steps": 1, "lr_decay_starting_step": steps - 1, "lr_decay_steps": 1,
    }  # fmt: skip
    section["tokens"] |= {
        "sequence_length": case.window,
        "micro_batch_size": case.micro_batch,
        "batch_accumulation_per_replica": case.accumulation,
        "train_steps": steps,
    }
    return section


def write_job(case: Case, folder: Path) -> Any:
    """Shards and nanotron.yaml in `folder`; returns the Job."""
    from nanotron_ext.adapter import lower
    from nanotron_ext.job import FastStep, Job, Source

    rng, shards = np.random.default_rng(0), folder / "shards"
    tokens = rng.integers(2, SHAPES[case.size][-1], SHARD_TOKENS, dtype=np.uint32)
    tokens[rng.random(SHARD_TOKENS) < 1 / DOCUMENT_TOKENS] = EOS_ID
    shards.mkdir()
    tokens.tofile(shards / "00000.ds")
    config, _ = lower(section_of(case), folder / "checkpoints", None)
    (folder / "nanotron.yaml").write_text(yaml.safe_dump(config))
    return Job(
        stage="gpu-step",
        weights={"random": 1.0},
        sources=[Source("random", shards, 4)],
        decay_exclude=[".*token_embedding.*"],
        fast_step=FastStep(**VARIANTS[case.variant]),
        data_seed=0,
        eos_id=EOS_ID,
        first_step=0,
        tokens_before=0,
        cache=folder / "cache",
    )


def measured_trainer() -> Any:
    """The trainer, which marks the start of each measured step and profiles the last ones."""
    from nanotron_ext.trainer import SmolLM3Trainer

    is_cuda, activities = torch.cuda.is_available(), torch.profiler.ProfilerActivity

    class Measured(SmolLM3Trainer):
        peak = None

        def mark(self) -> None:
            """The moment when the device, which the host is ahead of, comes to here."""
            if is_cuda:
                self.marks.append(torch.cuda.Event(enable_timing=True))
                self.marks[-1].record()
            else:
                self.marks.append(time.perf_counter())

        def training_step(self, dataloader: Any) -> Any:
            step = self.iteration_step - 1
            if step == WARM_UP:
                self.marks: list[Any] = []
                if is_cuda:
                    torch.cuda.reset_peak_memory_stats()
            if WARM_UP <= step <= WARM_UP + MEASURED:
                self.mark()
            if step == WARM_UP + MEASURED:
                if is_cuda:
                    torch.cuda.synchronize()
                    self.peak = torch.cuda.max_memory_allocated()
                kernels = [activities.CUDA if is_cuda else activities.CPU]
                self.profile = torch.profiler.profile(activities=kernels)
                self.profile.start()
            return super().training_step(dataloader)

        def save_checkpoint(self) -> Path:
            return self.folder  # tens of GB at 3B

    return Measured


def train(case: Case, folder: Path) -> dict[str, Any]:
    """Seconds of the measured steps, peak memory and kernel times of one case, in this process."""
    from nanotron_ext import compat

    compat.init_distributed()
    trainer = measured_trainer()(folder, write_job(case, folder))
    trainer.run()
    is_cuda = torch.cuda.is_available()
    if is_cuda:
        torch.cuda.synchronize()
    trainer.profile.stop()
    seconds = [
        one.elapsed_time(two) / 1000 if is_cuda else two - one
        for one, two in pairwise(trainer.marks)
    ]
    return {
        "seconds": seconds,
        "peak_bytes": trainer.peak,
        "fast_step": list(trainer.fast_step.lines),
        "kernel_ms_a_step": kernel_groups(trainer.profile),
    }


def kernel_groups(profile: Any) -> dict[str, float]:
    """Milliseconds of a step by group of kernels; on a CPU, of operators."""
    is_cuda, found = torch.cuda.is_available(), dict.fromkeys([*GROUPS, "rest"], 0.0)
    for event in profile.key_averages():
        spent = event.self_device_time_total if is_cuda else event.self_cpu_time_total
        name = event.key.lower()
        group = next((g for g, pattern in GROUPS.items() if re.search(pattern, name)), "rest")
        found[group] += spent / 1000 / PROFILED
    return {group: round(spent, 2) for group, spent in found.items()}


def measure(case: Case) -> dict[str, Any]:
    """The row of one case, trained in a process of its own."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": "0"}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, str(HERE), "--one", json.dumps(asdict(case)), "--folder", folder],
            env={"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | alone,
            capture_output=True,
            text=True,
            check=False,
        )
        result = Path(folder) / "result.json"
        if not result.exists():
            raise RuntimeError(f"{case}: {done.stderr[-3000:]}")
        found = read_json(result)
    row: dict[str, Any] = {"case": asdict(case), "step_tokens": case.step_tokens}
    if "out_of_memory" in found:
        return row | found
    speed = case.step_tokens / statistics.median(found.pop("seconds"))
    peak, bytes_held = peak_flops(), found.pop("peak_bytes")
    keys = {"mfu_causal": case.window / 2, "mfu_documents": case.document_keys}
    mfu = {
        name: round(speed * case.flops_per_token(n) / peak, 4) if peak else None
        for name, n in keys.items()
    }
    gibibytes = round(bytes_held / 2**30, 2) if bytes_held else None
    return {
        **row,
        "tokens_per_second": round(speed),
        **mfu,
        "peak_gib": gibibytes,
        **found,
    }


def peak_flops() -> float | None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((flops for word, flops in PEAK_FLOPS.items() if word in name), None)


def where() -> dict[str, Any]:
    """The machine, the GPU, the versions and the commit."""
    git = ["git", "-C", str(HERE.parent), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    found = machine() | {"commit": commit, "gpu": None}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    for package in ("flash-attn-4", "flash-attn", "triton"):
        try:
            found["versions"][package] = version(package)
        except PackageNotFoundError:
            found["versions"][package] = None
    return found


def run_one(case: Case, folder: Path) -> None:
    try:
        found = train(case, folder)
    except torch.OutOfMemoryError as error:
        found = {"out_of_memory": str(error).splitlines()[0]}
    write_json(folder / "result.json", found)


def chosen_cases(options: argparse.Namespace) -> list[Case]:
    sizes = options.size or [size for size in SHAPES if size != "smallest"]
    cases = [case for case in CASES if case.size in sizes]
    return [case for case in cases if not options.variant or case.variant in options.variant]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", action="append", choices=SHAPES)
    parser.add_argument("--variant", action="append", choices=VARIANTS)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run_one(Case(**options.one), options.folder)
        return 0
    try:
        out = refuse(options) or HERE.with_suffix(".json")
    except UserError as error:
        return fail(str(error))
    cases = chosen_cases(options)
    write_rows(cases, lambda case: {**measure(case), "where": where()}, SHOWN, out)
    return 0


def write_rows(
    cases: Sequence[Any], measure: Callable[[Any], dict[str, Any]], shown: Sequence[str], out: Path
) -> None:
    """Measure each case; `out` is written after each, whose row takes the place of an older one."""
    rows = {json.dumps(row["case"]): row for row in read_json(out)["rows"]} if out.exists() else {}
    for case in cases:
        print(case, flush=True)
        row = measure(case)
        rows[json.dumps(row["case"])] = row
        write_json(out, {"rows": list(rows.values())})
        found = [f"{key} {row[key]}" for key in shown if row.get(key) is not None]
        print("  " + ", ".join(found), flush=True)
    print(out)


def refuse(options: argparse.Namespace) -> Path | None:
    """The file to write to; raises UserError where the device is not there."""
    has_gpu = torch.cuda.is_available()
    if options.device == "cuda" and not has_gpu:
        raise UserError("--device cuda: no GPU here; write --size smallest --device cpu --out FILE")
    if options.device == "cpu" and (has_gpu or options.out is None):
        raise UserError("--device cpu: is for a machine without a GPU, and needs --out FILE")
    return options.out


if __name__ == "__main__":
    sys.exit(main())
