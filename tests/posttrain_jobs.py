"""Run folders of post-training stages, small enough for a test: real rows, a random model."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from conftest import ROOT
from forked import Forked
from small_models import make_tokenizer, random_model

from posttrain.job import Job

PAD = "<|finetune_right_pad_id|>"
COMMON = {
    "learning_rate": 0.01,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "warmup_steps": 0.1,
    "max_steps": 8,
    "weight_decay": 0.0,
    "max_grad_norm": 0.2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_length": 700,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "seed": 42,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 3,
}
SFT = {"packing": True, "eos_token": "<|im_end|>"}
TRL: dict[str, dict[str, Any]] = {
    "midtrain": {**SFT, "packing_strategy": "wrapped", "assistant_only_loss": False},
    "sft": {**SFT, "packing_strategy": "bfd", "assistant_only_loss": True},
    "apo": {"beta": 0.05, "loss_type": ["apo_zero"], "precompute_ref_log_probs": True},
}


def tokenizer_with_pad(**settings: Any) -> Any:
    tokenizer = make_tokenizer(**settings)
    tokenizer.add_special_tokens({"pad_token": PAD})
    return tokenizer


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def kwargs(thinks: bool, **more: Any) -> dict[str, Any]:
    empty = {"custom_instructions": "", "python_tools": [], "xml_tools": []}
    return empty | {"enable_thinking": thinks} | more


def chat_rows(count: int) -> list[dict[str, Any]]:
    """Both modes, several turns, a tool call with its result, instructions; each row its own."""
    rows = []
    for n in range(count):
        thinks = n % 2 == 0
        thought = f"<think>\nIt is {n}.\n</think>\n" if thinks else ""
        messages = [say("user", f"What is {n}?"), say("assistant", f"{thought}It is {n}.")]
        more: dict[str, Any] = {}
        if n % 3 == 1:
            messages += [say("user", "And then?"), say("assistant", f"{thought}Then {n + 1}.")]
        if n % 3 == 2:
            call = {"type": "function", "function": {"name": "add", "arguments": {"x": n}}}
            messages[1] = {"role": "assistant", "content": "", "tool_calls": [call]}
            messages += [say("tool", str(n + 1)), say("assistant", f"{thought}{n + 1}")]
            more = {"xml_tools": [json.dumps({"name": "add", "parameters": {}})]}
        if n % 5 == 0:
            more["custom_instructions"] = "Be brief."
        check = {"turn": 1, "kind": "sum", "result": str(n)}
        if n % 3 == 2:
            check = {"turn": 1, "kind": "tool", "format": "xml", "name": "add"}
            check["arguments"] = {"x": n}
        rows.append(
            {"messages": messages, "chat_template_kwargs": kwargs(thinks, **more), "check": check}
        )
    return rows


def pair_rows(count: int) -> list[dict[str, Any]]:
    rows = []
    for n in range(count):
        thinks = n % 2 == 0
        thought = f"<think>\nIt is {n}.\n</think>\n" if thinks else ""
        rows.append(
            {
                "prompt": [say("user", f"What is {n}?" + " Well?" * (n % 4))],
                "chosen": [say("assistant", f"{thought}It is {n}.")],
                "rejected": [say("assistant", f"{thought}It is {n + 1}. It is {n + 2}.")],
                "chat_template_kwargs": kwargs(thinks),
            }
        )
    return rows


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_start(folder: Path) -> Path:
    """A random model with a tokenizer that can pad."""
    tokenizer = tokenizer_with_pad(short_system=True)
    random_model(tokenizer, seed=0, window=1024, std=0.1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_folder(folder: Path, stage: str, model: Path, **changes: Any) -> Path:
    """A run folder with its job.json; `trl` in `changes` is laid over the stage's."""
    folder.mkdir(parents=True, exist_ok=True)
    is_pairs = stage == "apo"
    rows = pair_rows if is_pairs else chat_rows
    files = {
        name: write_rows(folder / "rows" / f"{name}.jsonl", rows(count))
        for name, count in {"a": 24, "b": 40}.items()
    }
    held = folder / "held_out"
    scored = {"think": chat_rows(4)[::2], "no_think": chat_rows(4)[1::2], "tools": chat_rows(3)[2:]}
    for kind, prompts in scored.items():
        write_rows(held / f"{kind}.jsonl", prompts)
    write_rows(held / "preference.jsonl", pair_rows(6))
    template = "chatml.jinja" if stage == "midtrain" else "chat_template.jinja"
    job: dict[str, Any] = {
        "stage": stage,
        "trainer": "DPOTrainer" if is_pairs else "SFTTrainer",
        "model": str(model),
        "tokenizer": str(model),
        "template": "" if is_pairs else str(ROOT / "recipes/posttrain" / template),
        "template_defaults": {"short_system": True} if stage == "sft" else {},
        "settings": {},
        "files": {name: str(file) for name, file in files.items()},
        "mixture": {"a": 1.0, "b": 0.5},
        "mixture_seed": 0,
        "trl": {**COMMON, **TRL[stage], **changes.pop("trl", {})},
        "world_size": 1,
        "workers": 1,
        "held_out": "" if stage == "midtrain" else str(held),
        "score_steps": 4,
        "score_prompts": 1,
        "score_prompts_at_end": 2,
        "max_new_tokens": 4,
        "tokens_before": 1000,
        **changes,
    }
    Job(**job).write(folder)
    return folder


def run_in_process(folder: Path) -> Path:
    from posttrain.data import prepare_data
    from posttrain.stage import train

    prepare_data(folder)
    train(folder)
    return folder


def start(folder: Path, *part: str, code: tuple[str, ...] = ()) -> Forked:
    """The stage's training in a process of its own, or `code` for it; data must be prepared.

    It is forked from one that has the libraries: a sitecustomize.py does not reach it.
    """
    return Forked(
        "posttrain", *(code or ("-m", "posttrain.stage")), str(folder), *part,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
