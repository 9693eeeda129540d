"""The loss does not depend on the parallel layout, and a resumed run ends in the same bits.

Real processes over gloo. Jobs of the same process count share their processes; resumed jobs run in
fresh ones.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, job_maker, metrics
from forked import distributed
from safetensors.torch import load_file

from ground.errors import UserError
from nanotron_ext.checkpoint import check_layout
from nanotron_ext.convert import from_hf, to_hf
from nanotron_ext.recut import recut

pytestmark = pytest.mark.slow
JOBS = ROOT / "tests" / "run_jobs.py"

RECOMPUTE = "parallelism.recompute_layer"
DP2 = {"parallelism.dp": 2, "tokens.batch_accumulation_per_replica": 2}
TP2 = {"parallelism.tp": 2}
PP2 = {"parallelism.pp": 2}
SCATTER = {"parallelism.tp_mode": "REDUCE_SCATTER"}
BF16 = {"model.dtype": "bfloat16", "optimizer.accumulate_grad_in_fp32": True}
# name: (processes, what differs from one process)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "recomputation": (1, {RECOMPUTE: True}),
    "dp 2": (2, DP2),
    "dp 2, ZeRO-1": (2, {**DP2, "optimizer.zero_stage": 1}),
    "tp 2 ALL_REDUCE": (2, TP2),
    "tp 2 REDUCE_SCATTER": (2, {**TP2, **SCATTER}),
    "tp 2 REDUCE_SCATTER, recomputation": (2, {**TP2, **SCATTER, RECOMPUTE: True}),
    "pp 2 1f1b": (2, PP2),
    "pp 2 1f1b, recomputation": (2, {**PP2, RECOMPUTE: True}),
    "pp 2 afab": (2, {**PP2, "parallelism.pp_engine": "afab"}),
    "dp 2, tp 2 REDUCE_SCATTER": (4, {**DP2, **TP2, **SCATTER}),
    "tp 2, pp 2": (4, {**TP2, **PP2, **SCATTER}),
}
Z_LOSS = {"model.model_config.z_loss_enabled": True, "model.model_config.z_loss_coefficient": 0.1}
Z_LOSS_LAYOUTS = {"z-loss": (1, Z_LOSS), "z-loss, tp 2": (2, {**TP2, **Z_LOSS})}
BF16_LAYOUTS = {
    "bf16, fp32 accumulation": (1, BF16),
    "bf16, fp32 accumulation, dp 2": (2, {**BF16, **DP2}),
    "bf16, fp32 accumulation, dp 2, ZeRO-1": (2, {**BF16, **DP2, "optimizer.zero_stage": 1}),
    # as published, with 192 times tp 2
    "bf16, fp32 accumulation, dp 2, tp 2 REDUCE_SCATTER": (4, {**BF16, **DP2, **TP2, **SCATTER}),
}
EVERY = LAYOUTS | BF16_LAYOUTS | Z_LOSS_LAYOUTS


def run(folders: list[Path], processes: int) -> None:
    done = distributed("trainer", processes, str(JOBS), *map(str, folders))
    assert done.returncode == 0, done.stderr[-3000:]


def run_all(make: Callable[[str, dict[str, Any]], Path]) -> dict[str, Path]:
    folders = {name: make(name, overlay) for name, (_, overlay) in EVERY.items()}
    for processes in (1, 2, 4):
        run([folders[name] for name, (size, _) in EVERY.items() if size == processes], processes)
    return folders


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return job_maker(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="module")
def trained(make: Callable[..., Path]) -> dict[str, Path]:
    """Every layout's run of 6 steps, with checkpoints at 0, 3 and 6."""
    initial = {"checkpoints.save_initial_state": True}
    return run_all(lambda name, overlay: make(name, {**overlay, **initial}))


@pytest.fixture(scope="module")
def resumed(make: Callable[..., Path], trained: dict[str, Path]) -> dict[str, Path]:
    """Steps 4 to 6 again, from the checkpoint at 3, in fresh processes."""

    def again(name: str, overlay: dict[str, Any]) -> Path:
        return make(f"{name} resumed", overlay, resume=trained[name] / "checkpoints" / "3")

    return run_all(again)


def column(folder: Path, key: str) -> list[float]:
    return [line[key] for line in metrics(folder)]


def weights(folder: Path, step: int, target: Path) -> dict[str, torch.Tensor]:
    to_hf(folder / "checkpoints" / str(step), target)
    return load_file(target / "model.safetensors")


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one process"])
def test_loss_and_gradient_norm_are_those_of_one_process(
    trained: dict[str, Path], name: str
) -> None:
    for key in ("loss", "grad_norm"):
        mine, one = column(trained[name], key), column(trained["one process"], key)
        assert len(mine) == 6
        assert mine == pytest.approx(one, rel=1e-6), key


def test_z_loss_over_a_sharded_vocabulary_is_that_of_one_process(trained: dict[str, Path]) -> None:
    for key in ("loss", "grad_norm"):
        sharded, one = (column(trained[name], key) for name in ("z-loss, tp 2", "z-loss"))
        assert sharded == pytest.approx(one, rel=1e-6), key
        assert one[-1] != column(trained["one process"], key)[-1], key


@pytest.mark.parametrize("name", BF16_LAYOUTS)
def test_bf16_with_fp32_accumulation_stays_near_fp32(trained: dict[str, Path], name: str) -> None:
    """bf16 keeps 8 bits of a weight: 2^-9 = 2e-3 relative, and the loss averages over it."""
    mine, fp32 = column(trained[name], "loss"), column(trained["one process"], "loss")
    assert mine == pytest.approx(fp32, rel=2e-3)
    assert mine != fp32
    one = column(trained["bf16, fp32 accumulation"], "loss")
    assert mine == pytest.approx(one, rel=2e-3)


@pytest.mark.parametrize("name", EVERY)
def test_a_resumed_run_ends_in_the_same_bits(
    trained: dict[str, Path], resumed: dict[str, Path], name: str, tmp_path: Path
) -> None:
    for key in ("step", "loss", "grad_norm", "lr"):
        assert column(resumed[name], key) == column(trained[name], key)[3:], key
    whole = weights(trained[name], 6, tmp_path / "whole")
    for key, tensor in weights(resumed[name], 6, tmp_path / "resumed").items():
        assert torch.equal(tensor, whole[key]), key


@pytest.mark.parametrize("name", LAYOUTS)
def test_initial_weights_do_not_depend_on_the_layout(
    trained: dict[str, Path], name: str, tmp_path: Path
) -> None:
    one = weights(trained["one process"], 0, tmp_path / "one")
    mine = weights(trained[name], 0, tmp_path / "mine")
    assert mine.keys() == one.keys()
    for key, tensor in mine.items():
        assert torch.equal(tensor, one[key]), key


@pytest.mark.parametrize("name", EVERY)
def test_a_checkpoint_of_any_layout_survives_both_conversions(
    trained: dict[str, Path], name: str, tmp_path: Path
) -> None:
    there = weights(trained[name], 6, tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "nanotron")
    to_hf(tmp_path / "nanotron", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == there.keys()
    for key, tensor in there.items():
        assert torch.equal(tensor, back[key]), key


LAYOUT = {"tp": 1, "pp": 1, "dp": 1}


@pytest.mark.parametrize(
    ("name", "layout", "words"),
    [
        ("one process", {"tp": 2}, "saved with tp 1, nanotron.parallelism.tp is 2"),
        ("tp 2 ALL_REDUCE", {}, "saved with tp 2, nanotron.parallelism.tp is 1"),
        ("pp 2 afab", {}, "saved with pp 2, nanotron.parallelism.pp is 1"),
    ],
)
def test_a_resume_in_a_layout_that_cannot_read_the_states_is_refused(
    trained: dict[str, Path], name: str, layout: dict[str, int], words: str
) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        check_layout(trained[name] / "checkpoints" / "3", {**LAYOUT, **layout})


@pytest.mark.parametrize("name", EVERY)
def test_a_resume_in_its_own_layout_is_let_through(trained: dict[str, Path], name: str) -> None:
    overlay, checkpoint = EVERY[name][1], trained[name] / "checkpoints" / "3"
    own = {key: overlay.get(f"parallelism.{key}", 1) for key in LAYOUT}
    check_layout(checkpoint, own)
    nowhere = checkpoint.with_name("recut")
    assert (
        recut(checkpoint, nowhere, own["dp"], overlay.get("optimizer.zero_stage", 0)) == checkpoint
    )
    assert not nowhere.exists()
