"""Speed and memory of a post-training step on one GPU: `python benchmarks/gpu_posttrain.py`.

Trains each case in a process of its own, through the real stage's trainer, from a random checkpoint:
the recipe of a scale as it is laid out for one card of 80 GB, with the accumulation cut to two
micro-batches or STEP_TOKENS. Windows are full of documents of 1,000 tokens on average, of which SFT
trains three quarters; of a pair the chosen side is full, the rejected one ends a quarter earlier.
Measured after the first steps: tokens a second without padding (median step, optimizer included) and
peak memory, beside what launch/machine/posttrain_memory.py predicts. Reference log-probabilities are
computed before, nothing is scored or saved.

    --size 3b --stage sft            some of the cases
    --attention varlen               with another kernel than the one chosen here
    --size smallest --device cpu --out FILE     what runs without a GPU

Writes benchmarks/gpu_posttrain.json after every case; a case that is run again replaces its row.
"""

import argparse
import gc
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ground.errors import UserError, fail
from ground.files import read_json, write_json
from launch.machine.attention import DISTRIBUTIONS, usable_attention
from launch.machine.gpus import Gpus
from launch.machine.posttrain_memory import Shape, fit_posttrain, global_batch, posttrain_memory

HERE = Path(__file__)
STEP = runpy.run_path(str(HERE.with_name("gpu_step.py")), run_name="imported")
CARD = Gpus(1, 80)
WARM_UP, MEASURED = 2, 4  # steps
STEP_TOKENS, DOCUMENT_TOKENS = 65_536, 1000
SIZES = ("60m", "135m", "360m", "1b", "3b", "smallest")
STAGES = ("midtrain", "sft", "apo")
SHOWN = (
    "attention", "tokens_per_second", "peak_gib", "predicted_gib", "out_of_memory", "refused"
)  # fmt: skip
PAD, END, FIRST_WORD = "<|finetune_right_pad_id|>", "<|im_end|>", 2
SMALLEST = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 1, "vocab_size": 512,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    size: str
    stage: str
    max_length: int | None = None  # tokens; None: the recipe's at this scale
    lora_rank: int = 0  # 0: all weights
    attention: str | None = None  # None: what is chosen here in place of the recipe's

    def __str__(self) -> str:
        lora = f", LoRA {self.lora_rank}" if self.lora_rank else ""
        return f"{self.size} {self.stage} {self.max_length or ''}{lora} {self.attention or ''}"


CASES = (
    *(Case(size, stage) for size in ("60m", "135m", "360m", "1b") for stage in STAGES),
    Case("3b", "midtrain"),
    Case("3b", "apo"),
    Case("3b", "sft", lora_rank=16),
    Case("3b", "sft", max_length=32_768),
    *(Case("smallest", stage, 256) for stage in STAGES),
    Case("smallest", "sft", 256, lora_rank=4),
)


def sizes_of(case: Case) -> dict[str, int]:
    """The model's sizes by transformers' names."""
    from launch.recipe.book import load_recipe
    from launch.recipe.scale import load_scale, scale

    if case.size == "smallest":
        return SMALLEST
    pretrained = scale(load_recipe("pretrain-stage1"), load_scale(scale_of(case)))
    config = asdict(pretrained.nanotron.model.model_config)
    return {name: config[name] for name in SMALLEST}


def scale_of(case: Case) -> str:
    return {"3b": "full", "smallest": "60m"}.get(case.size, case.size)


def laid_out(case: Case, attention: str) -> Any:
    """The stage's recipe in the layout for CARD, with few micro-batches a step."""
    from launch.recipe.book import load_recipe
    from launch.recipe.posttrain import Lora
    from launch.recipe.scale import load_scale, scale

    recipe = scale(load_recipe(case.stage), load_scale(scale_of(case)))
    if case.max_length:
        recipe = replace(recipe, trl=replace(recipe.trl, max_length=case.max_length))
    if case.lora_rank:
        recipe = replace(recipe, lora=Lora(rank=case.lora_rank, alpha=2 * case.lora_rank))
    recipe = fit_posttrain(recipe, Shape.of(sizes_of(case)), CARD, attention)
    trl, sides = recipe.trl, 2 if case.stage == "apo" else 1
    most = max(STEP_TOKENS // (trl.per_device_train_batch_size * trl.max_length * sides), 1)
    accumulated = min(trl.gradient_accumulation_steps, most, 2)
    trl = replace(
        trl,
        gradient_accumulation_steps=accumulated,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        max_steps=WARM_UP + MEASURED,
        save_strategy="no",
        save_steps=None,
    )
    return replace(recipe, trl=trl)


def write_checkpoint(folder: Path, sizes: dict[str, int]) -> None:
    """A random model in bf16."""
    from transformers import AutoModelForCausalLM, SmolLM3Config

    tokens = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": None}
    config = SmolLM3Config(**sizes, **tokens, max_position_embeddings=65_536)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    del model
    gc.collect()
    torch.cuda.empty_cache()


def tokenizer() -> Any:
    """The tokens that a trainer asks for; rows have ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({PAD: 0, END: 1}, unk_token=PAD))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=PAD)


def row_of(case: Case, recipe: Any, vocab: int, rng: np.random.Generator) -> dict[str, Any]:
    """One row of random tokens as posttrain/data.py makes them."""
    from posttrain.rows import IGNORED

    length = recipe.trl.max_length
    ids = rng.integers(FIRST_WORD, vocab, length)
    if case.stage == "apo":
        prompt = length // 4
        answer = rng.integers(FIRST_WORD, vocab, (length - prompt) * 3 // 4)
        return {"prompt_ids": ids[:prompt], "chosen_ids": ids[prompt:], "rejected_ids": answer}
    if case.stage == "midtrain":
        return {"input_ids": ids, "labels": ids}
    labels, lengths = ids.copy(), list[int]()
    while left := length - sum(lengths):
        document = 1 + int(rng.exponential(min(DOCUMENT_TOKENS, length / 4)))
        begin = length - left
        lengths.append(min(document, left))
        labels[begin : begin + lengths[-1] // 4] = IGNORED  # the user's turn
    return {"input_ids": ids, "labels": labels, "seq_lengths": lengths}


def tokens_of(row: dict[str, Any]) -> int:
    if "input_ids" in row:
        return len(row["input_ids"])
    return 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])


def job_of(case: Case, recipe: Any, attention: str, start: Path) -> Any:
    from posttrain.job import Job, Lora

    trl = asdict(recipe.trl)
    trl["model_init_kwargs"] = {"dtype": "bfloat16", "attn_implementation": attention}
    return Job(
        stage=case.stage,
        trainer=recipe.trainer,
        model=str(start),
        tokenizer="",
        template="",
        template_defaults={},
        settings={},
        files={},
        mixture={},
        mixture_seed=0,
        trl={key: value for key, value in trl.items() if value not in (None, {})},
        world_size=1,
        workers=1,
        held_out="",
        score_steps=1,
        score_prompts=0,
        score_prompts_at_end=0,
        max_new_tokens=1,
        tokens_before=0,
        lora=Lora(**asdict(recipe.lora)) if recipe.lora else None,
    )


def marks() -> Any:
    """A callback with the moments at which the measured steps end."""
    from transformers import TrainerCallback

    class Marks(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step < WARM_UP:
                return
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                if state.global_step == WARM_UP:
                    torch.cuda.reset_peak_memory_stats()
            self.seconds.append(time.perf_counter())

    return Marks()


def train(case: Case, folder: Path) -> dict[str, Any]:
    """What is measured of one case, in this process."""
    from datasets import Dataset

    from posttrain.stage import Stage

    is_cuda, sizes = torch.cuda.is_available(), sizes_of(case)
    attention = case.attention or usable_attention("flash_attention_2")  # the recipes' own
    recipe = laid_out(case, attention)
    trl, memory = recipe.trl, posttrain_memory(recipe, Shape.of(sizes), attention)
    start = folder.parent / case.size  # one for all cases of a size
    if not (start / "config.json").exists():
        write_checkpoint(start, sizes)
    rng, batch = np.random.default_rng(0), global_batch(recipe)
    rows = [row_of(case, recipe, sizes["vocab_size"], rng) for _ in range(batch * trl.max_steps)]
    job = job_of(case, recipe, attention, start)
    trainer = Stage(folder, job, tokenizer()).trainer(Dataset.from_list(rows))
    measured = marks()
    trainer.add_callback(measured)
    trainer.train()
    steps = [two - one for one, two in pairwise(measured.seconds)]
    tokens = batch * tokens_of(rows[0])
    return {
        "attention": trainer.model.config._attn_implementation,
        "max_length": trl.max_length,
        "micro_batch": trl.per_device_train_batch_size,
        "accumulation": trl.gradient_accumulation_steps,
        "recompute": trl.gradient_checkpointing,
        "step_tokens": tokens,
        "tokens_per_second": round(tokens / statistics.median(steps)),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if is_cuda else None,
        "predicted_gib": round(memory.allocated / 2**30, 2),
        "loss": trainer.state.log_history[-2]["loss"],
        "seconds": steps,
    }


def run_one(case: Case, folder: Path) -> None:
    try:
        found = train(case, folder)
    except torch.OutOfMemoryError as error:
        found = {"out_of_memory": str(error).splitlines()[0]}
    except UserError as error:  # a layout that does not fit
        found = {"refused": str(error)}
    write_json(folder / "result.json", {**found, "where": STEP["where"]()})


def measure(scratch: Path, case: Case) -> dict[str, Any]:
    """The row of one case, trained in a process of its own; this one leaves the GPU alone."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    done = subprocess.run(
        [sys.executable, str(HERE), "--one", json.dumps(asdict(case)), "--folder", str(folder)],
        env={"OMP_WAIT_POLICY": "PASSIVE"} | os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    result = folder / "result.json"
    if not result.exists():
        raise RuntimeError(f"{case}: {done.stderr[-3000:]}")
    return {"case": asdict(case), **read_json(result)}


def chosen_cases(options: argparse.Namespace) -> list[Case]:
    sizes = options.size or [size for size in SIZES if size != "smallest"]
    stages = options.stage or STAGES
    cases = [case for case in CASES if case.size in sizes and case.stage in stages]
    return [replace(case, attention=options.attention) for case in cases]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", action="append", choices=SIZES)
    parser.add_argument("--stage", action="append", choices=STAGES)
    parser.add_argument("--attention", choices=(*DISTRIBUTIONS, "varlen", "sdpa"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run_one(Case(**options.one), options.folder)
        return 0
    try:
        out = STEP["refuse"](options) or HERE.with_suffix(".json")
    except UserError as error:
        return fail(str(error))
    with tempfile.TemporaryDirectory() as scratch:
        STEP["write_rows"](chosen_cases(options), partial(measure, Path(scratch)), SHOWN, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
