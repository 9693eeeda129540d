"""`layout: fit` in a scale file: the stage's layout follows the GPUs, its identity does not."""

from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import forget_recipes, metrics
from small_checkout import SCALE, Checkout, kill_when, make_checkout, no_process_left

from ground.errors import UserError
from ground.files import checkpoints
from launch.machine.gpus import Gpus
from launch.machine.memory import memory
from launch.recipe.scale import load_scale
from launch.run.cluster import processes_per_node
from launch.stages.pretrain import PretrainStage
from launch.tools import diff
from launch.walk import resolve

STAGE = "pretrain-stage1"
WHY = {"nanotron": "sizes of a test", "tokenizer": "the same", "held_out": "the same"}
Write = Callable[..., Path]


@pytest.fixture
def write(recipes: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a scale that fits the published 3B, or what `nanotron` changes of it."""
    monkeypatch.delenv("GPUS", raising=False)
    monkeypatch.delenv("GPU_GB", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)

    def make(device: str = "gpu", mean: str = "tokens", **tokens: int) -> Path:
        file = recipes / "scales/mine.yaml"
        values: dict[str, Any] = yaml.safe_load((recipes / "scales/full.yaml").read_text())
        values |= {"scale": "mine", "device": device, "layout": "fit", "why": WHY}
        values["nanotron"] = {"tokens": {"loss_mean_over": mean, **tokens}}
        file.write_text(yaml.safe_dump(values))
        forget_recipes()
        return file

    return make


def stage_on(monkeypatch: pytest.MonkeyPatch, gpus: int = 0, gigabytes: int = 0) -> PretrainStage:
    for name, value in {"GPUS": gpus, "GPU_GB": gigabytes}.items():
        monkeypatch.setenv(name, str(value or ""))
    for name in ("RUNS", "CACHE"):
        monkeypatch.delenv(name, raising=False)
    run = resolve(STAGE, load_scale("mine"))
    assert isinstance(run, PretrainStage)
    return run


def test_layout_follows_the_gpus_and_identity_does_not(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write()
    known = set[str]()
    for gpus, gigabytes in ((0, 0), (1, 80), (8, 80), (8, 24), (1, 8), (7, 80)):
        run = stage_on(monkeypatch, gpus, gigabytes)
        nanotron = run.recipe.nanotron
        fits = gpus in (1, 8) and gigabytes > 8
        assert run.world_size == (gpus if fits else 1)
        assert nanotron.windows_a_step == 576
        assert not fits or memory(nanotron).total <= gigabytes * 2**30
        known.add(run.identity)
    assert len(known) == 1
    write(train_steps=3_000_000)
    assert stage_on(monkeypatch).identity not in known


@pytest.mark.parametrize(("gpus", "gigabytes", "mean", "words"), [
    (7, 80, "tokens", "SCALE=mine GPUS=7 GPU_GB=80: pretrain-stage1: 7 GPUs do not divide the 576 windows of a step"),
    (1, 8, "tokens", "SCALE=mine GPUS=1 GPU_GB=8: pretrain-stage1: does not fit on 1 x 8 GiB, because"),
    (1, 80, "labels", "recipes/scales/mine.yaml: nanotron.tokens.loss_mean_over: labels: with layout: fit"),
])  # fmt: skip
def test_what_cannot_be_fitted_is_refused_before_anything_is_done(
    write: Write, monkeypatch: pytest.MonkeyPatch, gpus: int, gigabytes: int, mean: str, words: str
) -> None:
    write(mean=mean)
    with pytest.raises(UserError) as caught:
        stage_on(monkeypatch, gpus, gigabytes).refuse()
    assert str(caught.value).startswith(words)


def test_without_a_gpu_the_run_is_refused_with_the_line_for_the_cluster(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write()
    with pytest.raises(UserError) as caught:
        stage_on(monkeypatch, 16, 80).refuse()
    assert "is torch's CUDA build installed? A scale with `device: cpu` runs" in str(caught.value)
    assert "needs 16 GPUs (dp 16 x tp 1 x cp 1 x pp 1), this machine has" in str(caught.value)
    assert "GPU_GB=80 GPUS=16 SCALE=mine sbatch --nodes=2 launch/pretrain.slurm" in str(
        caught.value
    )


def test_one_gpu_is_one_and_a_recipe_s_own_layout_takes_no_gpus_from_the_command_line(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write()
    with pytest.raises(UserError, match=r"needs 1 GPU \("):
        stage_on(monkeypatch, 1, 80).refuse()
    with pytest.raises(
        UserError, match=r"needs 384 GPUs .* has \d+; on the cluster: SCALE=full sb"
    ):
        resolve(STAGE, load_scale("full")).refuse()


def test_a_job_is_laid_out_on_all_of_its_gpus_or_told_why_not(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write()
    assert processes_per_node(stage_on(monkeypatch, 16, 80), 2, 8) == 8
    with pytest.raises(
        UserError, match=r"submit it so: .*GPU_GB=80 GPUS=8 SCALE=mine sbatch --nodes=1 "
    ):
        processes_per_node(stage_on(monkeypatch, 8, 80), 2, 8)
    with pytest.raises(
        UserError, match=r"SCALE=mine GPUS=8 GPU_GB=8: pretrain-stage1: does not fit on 8 x 8 GiB"
    ):
        processes_per_node(stage_on(monkeypatch, 8, 8), 1, 8)


def test_on_a_cpu_gpus_are_processes(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write(device="cpu")
    assert stage_on(monkeypatch).world_size == 1
    run = stage_on(monkeypatch, 4)
    assert run.world_size == run.recipe.nanotron.parallelism.dp == 4


def test_diff_tells_the_layout_and_for_what(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write()
    stage_on(monkeypatch, 8, 40)
    rows = {change.key: change for change in diff.stage_changes(STAGE, load_scale("mine"))}
    dp = rows["nanotron.parallelism.dp"]
    assert (dp.before, dp.after, dp.why) == (192, 8, "layout: fit, to 8 x 40 GiB")
    assert rows["nanotron.tokens.batch_accumulation_per_replica"].after == 72
    assert rows["nanotron.tokens.loss_mean_over"].why == WHY["nanotron"]
    stage_on(monkeypatch, 1, 8)
    with pytest.raises(UserError, match=r"^SCALE=mine GPUS=1 GPU_GB=8: .*: does not fit on 1 x 8 "):
        diff.stage_changes(STAGE, load_scale("mine"))
    assert str(Gpus(1, inf)) == "one GPU of any size" and str(Gpus(8, inf)).startswith("8 GPUs of")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    checkout = make_checkout(tmp_path_factory.mktemp("fit") / "checkout")
    nanotron = {
        **SCALE["nanotron"],
        "tokens": {**SCALE["nanotron"]["tokens"], "loss_mean_over": "tokens"},
    }
    scale = SCALE | {"layout": "fit", "nanotron": nanotron}
    (checkout.folder / "recipes/scales/small.yaml").write_text(yaml.safe_dump(scale))
    checkout.done("run", "data-stage1")
    with no_process_left(checkout):
        yield checkout


@pytest.mark.slow
def test_on_other_gpus_the_run_goes_on_with_the_same_tokens(
    checkout: Checkout, tmp_path: Path
) -> None:
    """Two processes, then one, then four with a quarter of the micro-batch, against one alone."""
    whole, moved = checkout.copy(tmp_path / "whole"), checkout.copy(tmp_path / "moved")
    whole.done("run", STAGE)
    folder = moved.runs / STAGE
    for gpus, step in ((2, 7), (1, 14)):
        done = kill_when(moved, STAGE, lambda step=step: _last(folder) >= step, GPUS=str(gpus))
        assert done, f"ended before step {step}"
    moved.done("run", STAGE, GPUS="4")
    assert "up to date" in moved.done("run", STAGE, GPUS="3")
    lines = [metrics(one.runs / STAGE) for one in (whole, moved)]
    for key in ("step", "tokens"):
        assert [line[key] for line in lines[0]] == [line[key] for line in lines[1]]
    assert lines[0][-1]["tokens_per_source"] == lines[1][-1]["tokens_per_source"]
    losses = [[line["loss"] for line in one] for one in lines]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    configs = (folder / "checkpoints").glob("*/config.yaml")
    used = {yaml.safe_load(file.read_text())["parallelism"]["dp"] for file in configs}
    assert used == {1, 2, 4}


def _last(folder: Path) -> int:
    return int((checkpoints(folder) or [Path("0")])[-1].name)
