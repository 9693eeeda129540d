"""A run of one process in bf16 keeps float32 masters: a small step moves the weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from posttrain_jobs import make_folder, run_in_process, write_start

from ground.files import checkpoints

ONE_STEP = {
    "learning_rate": 1e-6,
    "lr_scheduler_type": "constant",
    "lr_scheduler_kwargs": {},
    "warmup_steps": 0,
    "max_steps": 1,
    "save_strategy": "no",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_start(tmp_path_factory.mktemp("precision") / "model")


def settings(bf16: bool) -> dict[str, Any]:
    dtype = "bfloat16" if bf16 else "float32"
    options = {"dtype": dtype, "attn_implementation": "sdpa"}
    return {"bf16": bf16, "model_init_kwargs": options}


def change(folder: Path) -> torch.Tensor:
    """What one step adds to all weights, flat, in float64."""
    from datasets import load_from_disk

    from posttrain.data import load_tokenizer, prepare_data
    from posttrain.job import Job
    from posttrain.stage import Stage

    prepare_data(folder)
    job = Job.read(folder)
    data = load_from_disk(str(folder / "data"))
    trainer = Stage(folder, job, load_tokenizer(job)).trainer(data)
    weights = list(trainer.model.parameters())
    before = [weight.detach().double().clone() for weight in weights]
    trainer.train()
    pairs = zip(weights, before, strict=True)
    return torch.cat([(weight.detach().double() - was).flatten() for weight, was in pairs])


@pytest.mark.parametrize("stage", ["sft", "apo"])
def test_a_step_at_1e_6_moves_the_weights_as_in_fp32(
    stage: str, model: Path, tmp_path: Path
) -> None:
    changes = [
        change(make_folder(tmp_path / str(bf16), stage, model, held_out="", trl={**ONE_STEP, **settings(bf16)}))
        for bf16 in (True, False)
    ]  # fmt: skip
    ours, reference = changes
    assert torch.nn.functional.cosine_similarity(ours, reference, dim=0) >= 0.99
    assert ours.norm() / reference.norm() == pytest.approx(1, abs=0.01)


def test_masters_stay_in_checkpoints_and_the_model_is_stored_in_the_recipes_dtype(
    model: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    folder = make_folder(tmp_path / "sft", "sft", model, trl={"max_steps": 3, **settings(True)})
    run_in_process(folder)
    stored = load_file(folder / "hf/model.safetensors")
    kept = load_file(checkpoints(folder)[-1] / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    assert stored.keys() == kept.keys()
    assert all(tensor.equal(kept[name].bfloat16()) for name, tensor in stored.items())
    assert json.loads((folder / "hf/config.json").read_text())["dtype"] == "bfloat16"
