"""`varlen`, for post-training on a GPU without a FlashAttention package: each document by itself, and
no mask of all pairs of tokens. On a CPU its kernel is SDPA, one document at a time."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEVICES
from posttrain_jobs import (
    PAD,
    chat_rows,
    make_folder,
    run_in_process,
    tokenizer_with_pad,
    write_start,
)
from test_posttrain_training import trainer_of

from launch.machine import attention
from posttrain.data import packed
from posttrain.rows import chat_tokens

TOKENIZER = tokenizer_with_pad(short_system=True)
LENGTH = 700


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    write_start(root / "model")
    return root


def model_of(root: Path, kernel: str) -> Any:
    from transformers import AutoModelForCausalLM

    from posttrain import attention  # noqa: F401  # which transformers then knows by name

    return AutoModelForCausalLM.from_pretrained(root / "model", attn_implementation=kernel)


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two windows end to end, by TRL's collator."""
    from datasets import Dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rows = Dataset.from_list([chat_tokens(TOKENIZER, row, True, "here") for row in chat_rows(20)])
    windows = packed(rows, LENGTH, "bfd", tmp_path_factory.mktemp("scratch"))
    pad = TOKENIZER.convert_tokens_to_ids(PAD)
    found = DataCollatorForLanguageModeling(pad, padding_free=True)(list(windows)[:2])
    assert len(found["cu_seq_lens_q"]) > 4 and found["max_length_q"] < LENGTH / 2
    return found


def hidden(model: Any, batch: Any, device: str) -> torch.Tensor:
    """[T, hidden], as a stage computes it: on a GPU in bf16 by autocast."""
    inputs = {
        name: value.to(device) if torch.is_tensor(value) else value
        for name, value in batch.items()
        if name != "labels"
    }
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        states: torch.Tensor = model.model(**inputs, use_cache=False).last_hidden_state[0]
    return states


@pytest.mark.parametrize("device", DEVICES)
def test_packed_documents_are_what_each_is_alone(root: Path, batch: Any, device: str) -> None:
    """Hidden states and the gradients of all weights; alone by SDPA, in float32."""
    model, plain = model_of(root, "varlen").to(device), model_of(root, "sdpa")
    together = hidden(model, batch, device).float().cpu()
    borders = batch["cu_seq_lens_q"].tolist()
    documents = [batch["input_ids"][:, a:b] for a, b in pairwise(borders)]
    alone = torch.cat([hidden(plain, {"input_ids": ids}, "cpu") for ids in documents])
    most = (1e-5, 1e-4) if device == "cpu" else (2e-2, 5e-2)  # bf16 has 8 bits
    assert (together - alone).norm() <= most[0] * alone.norm()
    direction = torch.randn(alone.shape, generator=torch.Generator().manual_seed(0))
    for states in (together, alone):
        (states * direction).sum().backward()
    for one, other in zip(model.model.parameters(), plain.model.parameters(), strict=True):
        assert (one.grad.cpu() - other.grad).norm() <= most[1] * other.grad.norm()


@pytest.mark.parametrize("stage", ["midtrain", "sft", "apo"])
def test_nothing_holds_all_pairs_of_tokens(root: Path, stage: str) -> None:
    """The mask that a layer is handed; SDPA has one of documents, and of pairs that are padded."""
    from posttrain.data import prepare_data

    masks = dict[str, list[Any]]()
    for kernel in ("varlen", "sdpa"):
        trl = {"model_init_kwargs": {"attn_implementation": kernel}}
        folder = make_folder(root / f"{stage}-{kernel}-batch", stage, root / "model", trl=trl)
        prepare_data(folder)
        trainer, found = trainer_of(folder), list[Any]()
        trainer.model.model.layers[0].register_forward_pre_hook(
            lambda _, args, options, found=found: found.append(options["attention_mask"]),
            with_kwargs=True,
        )
        for inputs in list(trainer.get_train_dataloader())[:3]:
            trainer.compute_loss(trainer.model, inputs)
        masks[kernel] = found
    assert masks["varlen"] == [None] * 3
    if stage != "midtrain":  # whose windows are a stream, cut anywhere
        assert all(mask.shape[-2] == mask.shape[-1] for mask in masks["sdpa"])


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["midtrain", "sft", "apo", "adapters"])
def test_a_stage_trains_and_scores_as_with_sdpa(root: Path, stage: str) -> None:
    from posttrain.job import Lora

    lora = Lora(rank=4, alpha=8, dropout=0.0, targets=["q_proj", "v_proj"])
    more: dict[str, Any] = {"lora": lora} if stage == "adapters" else {}
    lines, results = {}, {}
    for kernel in ("varlen", "sdpa"):
        trl = {"model_init_kwargs": {"attn_implementation": kernel}}
        kind, name = stage.replace("adapters", "sft"), f"{stage}-{kernel}"
        folder = make_folder(root / name, kind, root / "model", trl=trl, **more)
        run_in_process(folder)
        text = (folder / "metrics.jsonl").read_text()
        lines[kernel] = [json.loads(line) for line in text.splitlines()]
        results[kernel] = json.loads((folder / "results.json").read_text())["scores"]
    for one, other in zip(lines["varlen"], lines["sdpa"], strict=True):
        for key in ("loss", "grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=2e-4), key
        assert (one["tokens"], one["batch_hash"]) == (other["tokens"], other["batch_hash"])
    for when, scores in results["sdpa"].items():
        assert results["varlen"][when] == pytest.approx(scores, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("capability", "kernel"), [((7, 5), "sdpa"), ((8, 0), "varlen"), ((8, 9), "varlen")]
)
def test_a_card_without_a_package_has_torchs_kernel(
    capability: tuple[int, int], kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_is_installed", lambda name: False)
    monkeypatch.setattr(attention, "_capability", lambda: capability)
    assert attention.usable_attention("flash_attention_2") == kernel
    assert attention.is_dense(kernel) == (kernel == "sdpa")
    assert attention.usable_attention("sdpa") == "sdpa", "what a recipe asks for by name"
