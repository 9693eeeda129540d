"""A GPU without enough memory: one line with the remedy, in both engines, as for a user's mistake."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, environment, torchrun
from posttrain_jobs import make_folder, write_start

from nanotron_ext.job import Job

pytestmark = pytest.mark.slow

# What torch raises, where a layer asks for memory.
FAULT = """
import torch
def silu(*args, **more):
    raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 1.96 GiB. GPU 0 has ...')
torch.nn.functional.silu = silu
"""
LINE = "error: a GPU's memory does not suffice (1.96 GiB more were needed); "


@pytest.fixture
def path(tmp_path: Path) -> str:
    folder = tmp_path / "fault"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(FAULT)
    return f"{folder}:{ROOT}"


def test_pretraining(make_job: Callable[..., Path], path: str) -> None:
    folder = make_job("run")
    replace(Job.read(folder), memory_remedy="take less").write(folder)
    done = torchrun(folder, PYTHONPATH=path)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert lines == [f"{LINE}take less"]


def test_post_training(path: str, tmp_path: Path) -> None:
    from posttrain.data import prepare_data

    more = {"held_out": "", "memory_remedy": "take less"}
    folder = make_folder(tmp_path / "sft", "sft", write_start(tmp_path / "model"), **more)
    prepare_data(folder)
    done = subprocess.run(
        [sys.executable, "-m", "posttrain.stage", str(folder)],
        env=environment(PYTHONPATH=path), capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert lines == [f"{LINE}take less"]
