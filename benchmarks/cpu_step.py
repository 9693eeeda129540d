"""The CPU trainer against two ways to train transformers' own SmolLM3, on two cores.

A plain loop with DistributedDataParallel, and transformers' Trainer: two processes of one thread
each, the same weights, windows, batches, AdamW and rate. Their losses must agree with the
trainer's; the speeds are compared within a round, the order turned round with each. Writes
benchmarks/cpu_step.json:

    SCALE=<the small scale> python benchmarks/cpu_step.py [<shape> <rounds>]
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ground.files import read_json, read_json_lines, write_json
from launch.machine.here import machine
from launch.run.folder import git_commit

# What a shape changes of the small scale's stage 1.
SHAPES: dict[str, dict[str, Any]] = {
    "0.76M": {},
    # as longctx-32k has it
    "0.76M, windows of 2,048": {
        "model_config": {"max_position_embeddings": 2048},
        "sequence_length": 2048,
    },
    "9.7M, windows of 512": {
        "model_config": {
            "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 8,
            "num_key_value_heads": 2, "num_hidden_layers": 8, "max_position_embeddings": 512,
        },
        "sequence_length": 512,
    },
}  # fmt: skip
STEPS, WARM_UP_STEPS, ROUNDS = 24, 4, 3
LEARNING_RATE = 1e-3
DOCUMENT_TOKENS = 300  # mean
SEED = 0
# Relative; fp32 sums in another order drift apart as the weights do.
TOLERANCE = 1e-4
WAYS = ("trainer", "loop", "transformers_trainer")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}


# ---- The same start for all


def make_run(folder: Path, shape: str) -> None:
    """A run folder: shards, weights in both formats, job.json and nanotron.yaml."""
    import torch
    import yaml
    from transformers import AutoConfig, AutoModelForCausalLM

    from nanotron_ext.adapter import lower
    from nanotron_ext.config import SmolLM3Config
    from nanotron_ext.convert import from_hf, hf_config
    from nanotron_ext.job import Job, Source

    section = nanotron_section(shape)
    config, _ = lower(section, folder / "checkpoints", None, folder / "start")
    sizes = config["model"]["model_config"]
    known = SmolLM3Config.__dataclass_fields__
    model_config = SmolLM3Config(**{key: sizes[key] for key in sizes if key in known})
    torch.manual_seed(SEED)
    values = hf_config(model_config, "float32")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    model.save_pretrained(folder / "hf")
    from_hf(folder / "hf", folder / "start")
    write_shard(folder / "shard", model_config.vocab_size, model_config.eos_token_id)
    (folder / "nanotron.yaml").write_text(yaml.safe_dump(config))
    Job(
        stage=shape,
        weights={"random": 1.0},
        sources=[Source("random", folder / "shard", 2)],
        decay_exclude=[".*token_embedding.*"],
        data_seed=SEED,
        eos_id=model_config.eos_token_id,
        first_step=0,
        tokens_before=0,
        cache=folder / "cache",
    ).write(folder)


def nanotron_section(shape: str) -> dict[str, Any]:
    """The small scale's stage 1 in this shape, at one rate, without checkpoints on the way."""
    from launch.recipe.scale import load_scale
    from launch.walk import resolve

    section = asdict(resolve("pretrain-stage1", load_scale(os.environ["SCALE"])).recipe.nanotron)
    changes = dict(SHAPES[shape])
    section["model"]["model_config"] |= changes.pop("model_config", {})
    section["tokens"] |= {"train_steps": STEPS, **changes}
    section["checkpoints"]["checkpoint_interval"] = STEPS
    section["optimizer"]["learning_rate_scheduler"] |= {
        "learning_rate": LEARNING_RATE,
        "lr_warmup_style": "constant",
        "lr_warmup_steps": STEPS,
        "lr_decay_starting_step": STEPS,
    }
    return section


def write_shard(folder: Path, vocab_size: int, eos_id: int) -> None:
    """Random documents whose tokens are as unequally common as words are (Zipf)."""
    rng = np.random.default_rng(SEED)
    common = 1 / np.arange(1, eos_id + 1)
    tokens = rng.choice(eos_id, 1_000_000, p=common / common.sum()).astype(np.uint16)
    tokens[rng.random(len(tokens)) < 1 / DOCUMENT_TOKENS] = eos_id
    folder.mkdir()
    tokens.tofile(folder / "00000.ds")


# ---- The three ways; each leaves {losses, seconds}, of every step


def trainer(folder: Path) -> dict[str, list[float]]:
    """nanotron_ext's trainer, as `make` starts it."""
    from launch.run.workers import run_workers

    (folder / "metrics.jsonl").unlink(missing_ok=True)
    with Path(os.devnull).open() as lock:
        run_workers(folder, "trainer", processes=2, lock=lock.fileno())
    lines = read_json_lines(folder / "metrics.jsonl")
    tokens = lines[0]["tokens"]
    return {
        "losses": [line["loss"] for line in lines],
        "seconds": [tokens / line["tokens_per_second"] for line in lines],
    }


def in_processes(way: str) -> Callable[[Path], dict[str, list[float]]]:
    """A way that this file's own `way(folder)` is, in two processes of torchrun."""

    def run(folder: Path) -> dict[str, list[float]]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node=2", __file__, way, str(folder)]
        with (folder / f"{way}.log").open("a") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log)
        result: dict[str, list[float]] = read_json(folder / f"{way}.json")
        return result

    return run


def windows(folder: Path, rank: int, size: int) -> Iterator[dict[str, Any]]:
    """The micro-batches of a process as transformers takes them; labels stand at their inputs."""
    from nanotron_ext.dataloader import Loader
    from nanotron_ext.job import Job
    from nanotron_ext.mixture import build_mixture

    job, config = Job.read(folder), read_json(folder / "hf" / "config.json")
    loader = Loader(
        build_mixture(job.weights, job.cache), job.sources,
        sequence_length=config["max_position_embeddings"], micro_batch_size=2, dp_rank=rank,
        dp_size=size, first_sample=0, seed=job.data_seed, eos_id=job.eos_id,
        vocab_size=config["vocab_size"],
    )  # fmt: skip
    for batch in loader:
        labels = batch.label_ids.masked_fill(~batch.label_mask, -100)
        yield {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "labels": labels,
            "shift_labels": labels,  # as they are: the model shifts no labels of this name
        }


def start(folder: Path) -> tuple[Any, Any]:
    """transformers' model with the start's weights, and AdamW as the recipe has it."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype="float32").train()
    embedding = model.get_input_embeddings().weight
    others = [weight for weight in model.parameters() if weight is not embedding]
    groups = [{"params": others}, {"params": [embedding], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True
    )
    return model, optimizer


def loop(folder: Path) -> None:
    import torch
    from torch import distributed as dist

    dist.init_process_group("gloo")
    model, optimizer = start(folder)
    batches = windows(folder, dist.get_rank(), 2)
    ready = [next(batches) for _ in range(STEPS)]
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    losses, times = [], [time.perf_counter()]
    for batch in ready:
        loss = wrapped(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(mean := loss.detach() / 2)
        losses.append(mean.item())
        times.append(time.perf_counter())
    save(folder / "loop.json", losses, times)


def transformers_trainer(folder: Path) -> None:
    import torch
    from torch import distributed as dist
    from transformers import Trainer, TrainingArguments

    losses: list[torch.Tensor] = []
    times: list[float] = []

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *arguments: Any, **named: Any) -> Any:
            times.append(time.perf_counter())
            loss = super().training_step(*arguments, **named)
            losses.append(loss)
            return loss

    model, optimizer = start(folder)
    batches = windows(folder, 0, 1)
    rows = [
        {key: value[row] for key, value in batch.items()}
        for batch in (next(batches) for _ in range(2 * STEPS))
        for row in range(2)
    ]
    arguments = TrainingArguments(
        output_dir=str(folder / "transformers"), max_steps=STEPS, per_device_train_batch_size=2,
        max_grad_norm=1.0, average_tokens_across_devices=False, remove_unused_columns=False,
        lr_scheduler_type="constant", learning_rate=LEARNING_RATE, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, ddp_backend="gloo",
    )  # fmt: skip
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    InOrder(model, arguments, train_dataset=rows, optimizers=(optimizer, scheduler)).train()
    times.append(time.perf_counter())
    means = torch.stack(losses) / 2
    dist.all_reduce(means)
    save(folder / "transformers_trainer.json", means.tolist(), times)


def save(file: Path, losses: list[float], times: list[float]) -> None:
    if os.environ["RANK"] == "0":
        write_json(file, {"losses": losses, "seconds": np.diff(times).tolist()})


# ---- The comparison


def compare(folder: Path, shape: str, rounds: int) -> dict[str, Any]:
    """Medians over rounds of each way's tokens per second and of the ratios within a round."""
    make_run(folder, shape)
    ways = {"trainer": trainer} | {way: in_processes(way) for way in WAYS[1:]}
    config = read_json(folder / "hf" / "config.json")
    step_tokens = 4 * config["max_position_embeddings"]  # two windows of two processes
    speeds: dict[str, list[float]] = {way: [] for way in WAYS}
    apart = 0.0
    for number in range(rounds):
        found = {way: ways[way](folder) for way in (WAYS if number % 2 == 0 else WAYS[::-1])}
        for way, result in found.items():
            seconds = statistics.median(result["seconds"][WARM_UP_STEPS:])
            speeds[way].append(step_tokens / seconds)
            pairs = zip(result["losses"], found["trainer"]["losses"], strict=True)
            apart = max(apart, *(abs(a - b) / b for a, b in pairs))
        print(f"{shape}: " + ", ".join(f"{way} {speeds[way][-1]:,.0f}" for way in WAYS), flush=True)
    if apart > TOLERANCE:
        raise SystemExit(f"{shape}: losses are {apart:.1e} apart (relative): not the same training")
    return {
        "shape": shape,
        "step_tokens": step_tokens,
        "tokens_per_second": {way: round(statistics.median(speeds[way])) for way in WAYS},
        "times_as_fast_as": {way: ratio(speeds["trainer"], speeds[way]) for way in WAYS[1:]},
        "largest_relative_difference_of_losses": float(f"{apart:.1e}"),
    }


def ratio(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    shown = [round(value, 3) for value in ratios]
    return {"median": round(statistics.median(ratios), 3), "rounds": shown}


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in WAYS:
        globals()[sys.argv[1]](Path(sys.argv[2]))
        return
    os.environ |= ENVIRONMENT
    shapes = sys.argv[1:2] or list(SHAPES)
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else ROUNDS
    results = []
    for shape in shapes:
        with tempfile.TemporaryDirectory() as scratch:
            results.append(compare(Path(scratch), shape, rounds))
        report = {**machine(), "commit": git_commit(), "steps": STEPS, "shapes": results}
        write_json(Path(__file__).with_suffix(".json"), report)
    for result in results:
        for way, times in result["times_as_fast_as"].items():
            print(f"{result['shape']}: {times['median']:.2f} times as fast as {way}")


if __name__ == "__main__":
    main()
