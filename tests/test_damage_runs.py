"""A stage whose files were damaged while it stood still ends in the same bits, or is refused."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from posttrain_jobs import write_start
from safetensors.torch import load_file
from small_checkout import Checkout, kill_when, make_checkout, no_process_left
from test_damage import DAMAGES, flip

from ground.checksums import Damaged
from ground.files import checkpoints
from launch.recipe.scale import load_scale
from launch.stages.posttrain import PosttrainStage
from launch.walk import resolve, run_stage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STAGE = "pretrain-stage1"
ADAM = "optimizer/optimizer_pp-0-of-1_tp-0-of-1_exp-0-of-1.pt"


def steps_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line | {"tokens_per_second": None} for line in lines]


def damage_line(folder: Path, step: int) -> None:
    """A digit of a line's loss."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines()
    at = lines[step - 1].index('"loss": ') + len('"loss": 0.0')
    lines[step - 1] = lines[step - 1][:at] + "99" + lines[step - 1][at + 2 :]
    file.write_text("\n".join(lines) + "\n")


# ---- pretraining


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """Killed after the checkpoint of step 21."""
    checkout = make_checkout(tmp_path_factory.mktemp("stopped") / "checkout")
    with no_process_left(checkout):
        saved = checkout.runs / STAGE / "checkpoints" / "21"
        assert kill_when(checkout, STAGE, saved.exists), "ended before step 21"
    return checkout


@pytest.fixture(scope="module")
def whole(stopped: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the run that goes on undamaged."""
    checkout = stopped.copy(tmp_path_factory.mktemp("whole") / "checkout")
    with no_process_left(checkout):
        checkout.done("run", STAGE)
    return checkout.runs / STAGE


@pytest.fixture
def checkout(stopped: Checkout, tmp_path: Path) -> Iterator[Checkout]:
    copy = stopped.copy(tmp_path / "checkout")
    with no_process_left(copy):
        yield copy


def damage_adam_and_a_line(run: Path) -> str:
    flip(run / "checkpoints/21" / ADAM, run)
    damage_line(run, 5)
    return f"{ADAM}: its content is not what was written"


def damage_two_checkpoints(run: Path) -> str:
    saved = run / "checkpoints"
    shutil.copy(saved / "14/checkpoint_metadata.json", saved / "21")
    (saved / "14/lr_scheduler/lr_scheduler.pt").unlink()
    return "lr_scheduler.pt: no such file; set aside"


@pytest.mark.parametrize("damage", [damage_adam_and_a_line, damage_two_checkpoints])
def test_pretraining_goes_on_from_the_last_whole_checkpoint_in_the_same_bits(
    checkout: Checkout, whole: Path, damage: Callable[[Path], str]
) -> None:
    run = checkout.runs / STAGE
    message = damage(run)
    printed = checkout.done("run", STAGE)
    assert message in printed and "21.damaged, goes on from" in printed
    assert steps_of(run) == steps_of(whole)
    last = max(checkpoints(run), key=lambda folder: int(folder.name))
    files = sorted(file.relative_to(last) for file in last.rglob("*.safetensors"))
    assert files and last.name == "29"
    for name in files:
        ours, theirs = load_file(last / name), load_file(whole / "checkpoints/29" / name)
        assert ours["data"].equal(theirs["data"]), name
    hf = "hf/model.safetensors"
    assert (run / hf).read_bytes() == (whole / hf).read_bytes()


def test_pretraining_is_refused_without_a_whole_checkpoint_or_shard(checkout: Checkout) -> None:
    run = checkout.runs / STAGE
    aside = shutil.copytree(run / "checkpoints", checkout.folder / "aside")
    for folder in checkpoints(run):
        flip(folder / "checkpoint_metadata.json", run)
    line = checkout.refused("run", STAGE)
    assert "21/checkpoint_metadata.json: its content is not what was written" in line
    assert "no checkpoint before it is whole: `make pretrain-stage1" in line and "FORCE=1" in line
    shutil.rmtree(run / "checkpoints")
    aside.rename(run / "checkpoints")
    shard = sorted((checkout.cache / "shards").glob("*/*.ds"))[0]
    flip(shard, shard)
    assert f"{shard.name}: bytes 0 to" in (line := checkout.refused("run", STAGE))
    assert "make data-stage1" in line


# ---- post-training

SMALL = """
extends: {recipes}/scales/tiny.yaml
posttrain:
  chats: {{rows: 50, held_out_rows: 2}}
  every_stage:
    scores: {{prompts: 0, prompts_at_end: 1, max_new_tokens: 4}}
    trl: {{max_steps: 6, warmup_steps: 0, save_steps: 2}}
  stages:
    sft: {{trl: {{max_steps: 6, save_strategy: steps, save_steps: 2}}}}
    apo: {{trl: {{max_steps: 6, save_steps: 2}}}}
"""


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, PosttrainStage]]:
    """SFT and APO from a model of one's own, run to their ends."""
    root = tmp_path_factory.mktemp("posttrain")
    start = write_start(root / "model")
    file = root / "few.yaml"
    file.write_text(SMALL.format(recipes=os.path.relpath(ROOT / "recipes", root)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS", str(root / "runs"))
        patch.setenv("CACHE", str(root / "cache"))
        stages = {}
        for name in ("sft", "apo"):
            run = resolve(name, load_scale(str(file)), str(start))
            run_stage(run)
            assert isinstance(run, PosttrainStage)
            shutil.copytree(run.folder, root / name)
            stages[name] = run
        yield stages


def stop(run: PosttrainStage) -> Path:
    """The run as if killed at step 5; returns the folder of the whole one."""
    whole = run.folder.parent.parent.parent / run.stage
    shutil.rmtree(run.folder)
    shutil.copytree(whole, run.folder)
    for name in ("hf", "checkpoints/6"):
        shutil.rmtree(run.folder / name)
    (run.folder / "results.json").unlink()
    return whole


@pytest.mark.parametrize("stage", ["sft", "apo"])
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("optimizer.pt", "deleted"),
        ("scheduler.pt", "of another step"),
        ("model.safetensors", "a bit flipped"),
        ("trainer_state.json", "JSON without its keys"),
    ],
)
def test_post_training_goes_on_from_the_last_whole_checkpoint_in_the_same_bits(
    stages: dict[str, PosttrainStage],
    stage: str,
    name: str,
    damage: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = stages[stage]
    whole, saved = stop(run), run.folder / "checkpoints"
    DAMAGES[damage](saved / "4" / name, saved / "2" / name)
    damage_line(run.folder, 2)
    capsys.readouterr()
    run.prepare()
    run.train(0)
    said = capsys.readouterr().out
    assert f"{stage}: {saved / '4' / name}: " in said and f"goes on from {saved / '2'}\n" in said
    assert "metrics.jsonl: damaged: 1 lines" in said
    assert [folder.name for folder in checkpoints(run.folder)] == ["2", "4", "6"]
    assert steps_of(run.folder) == steps_of(whole)
    for file in ("hf/model.safetensors", "checkpoints/4/model.safetensors"):
        assert (run.folder / file).read_bytes() == (whole / file).read_bytes(), file


def test_post_training_without_a_whole_checkpoint_or_start_is_refused(
    stages: dict[str, PosttrainStage],
) -> None:
    run = stages["sft"]
    stop(run)
    for folder in checkpoints(run.folder):
        (folder / "optimizer.pt").unlink()
    with pytest.raises(Damaged, match=r"4/optimizer\.pt: no such file; no checkpoint before it"):
        run.prepare()
    flip(stages["apo"].folder / "hf/model.safetensors", run.folder)
    with pytest.raises(Damaged, match=r"apo/hf/model\.safetensors: its content is not"):
        stages["apo"].verify_model(stages["apo"].folder / "hf")
