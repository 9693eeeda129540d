"""Two processes that share a model by DeepSpeed's ZeRO-3, on the CPU."""

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, edit, environment, metrics, python_path
from posttrain_jobs import make_folder, run_in_process, start, write_start
from small_models import weights

from posttrain.data import prepare_data

# Beside the environment, not in it: TRL imports DeepSpeed where it is installed, for seconds.
NEEDS = ("hjson", "ninja", "py-cpuinfo", "msgpack", "einops", "nvidia-ml-py")
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": ["q_proj", "v_proj", "down_proj"]}
OPTIONS = {"dtype": "bfloat16", "attn_implementation": "sdpa"}


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the DeepSpeed of the gpu extra."""
    folder = tmp_path_factory.mktemp("deepspeed")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = next(one for one in extras["optional-dependencies"]["gpu"] if "deepspeed" in one)
    options = ["--quiet", "--no-build-isolation", "--no-deps", "--target", str(folder)]
    command = [sys.executable, "-m", "pip", "install", *options, pinned, *NEEDS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    # It would compile, for minutes, what moves a CPU's tensors; with GPUs nothing takes that way.
    edit(
        folder / "deepspeed/comm/torch.py",
        "def build_shm_op():\n",
        "def build_shm_op():\n    return\n",
    )
    return folder


def on_two_processes(folder: Path, deepspeed: Path) -> None:
    """As launch/accelerate/zero3.yaml says, except that this machine has no GPU."""
    config = yaml.safe_load((ROOT / "launch/accelerate/zero3.yaml").read_text())
    del config["deepspeed_config"]["deepspeed_multinode_launcher"]
    config |= {"use_cpu": True, "num_machines": 1, "num_processes": 2}
    file = folder / "zero3.yaml"
    file.write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file",
         str(file), "-m", "posttrain.stage", str(folder)],
        env=environment(DS_ACCELERATOR="cpu", PYTHONPATH=python_path(deepspeed)),
        capture_output=True, text=True, check=False, timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(900)
# Each trainer once: the model itself, and adapters beside a model that is their reference too.
@pytest.mark.parametrize(("stage", "lora"), [("sft", None), ("apo", LORA)], ids=["sft", "apo-lora"])
def test_a_shared_model_trains_as_a_whole_one(
    stage: str, lora: Any, tmp_path: Path, deepspeed: Path
) -> None:
    write_start(tmp_path / "model")
    trl = {"bf16": True, "max_steps": 3, "save_steps": 2, "model_init_kwargs": OPTIONS}
    two = make_folder(
        tmp_path / "two", stage, tmp_path / "model", world_size=2, lora=lora,
        trl={**trl, "gradient_accumulation_steps": 1},
    )  # fmt: skip
    prepare_data(two)
    on_two_processes(two, deepspeed)
    one = run_in_process(
        make_folder(tmp_path / "one", stage, tmp_path / "model", lora=lora, trl=trl)
    )
    for ours, theirs in zip(metrics(two), metrics(one), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02)
    ours, theirs = weights(two / "hf"), weights(one / "hf")
    assert ours.keys() == theirs.keys()
    assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}
    begin = weights(tmp_path / "model")
    changes = [
        torch.cat([(after[name].float() - begin[name].float()).flatten() for name in sorted(begin)])
        for after in (ours, theirs)
    ]
    assert torch.nn.functional.cosine_similarity(*changes, dim=0) > 0.9
    scores = json.loads((two / "results.json").read_text())["scores"]
    assert scores["after"].keys() >= {"think_well_formed", "tool_listed"}
    assert (two / "adapter/adapter_model.safetensors").is_file() == bool(lora)
    # One process without DeepSpeed makes the same of the last checkpoint.
    made = (two / "hf/model.safetensors").read_bytes()
    for name in ("before.json", "after.json", "results.json"):
        (two / name).unlink()
    shutil.rmtree(two / "hf")
    process = start(two, "--end")
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors[-3000:]
    assert (two / "hf/model.safetensors").read_bytes() == made
    again = json.loads((two / "results.json").read_text())["scores"]
    # Its batches of pairs are others.
    assert again == {when: pytest.approx(figures, abs=0.01) for when, figures in scores.items()}
