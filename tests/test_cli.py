"""A user's mistake, a broken file or a full disk: exit status 2, one line, and nothing is lost."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from conftest import edit
from small_checkout import STEPS, Checkout, make_checkout, no_process_left

from ground.errors import UserError, disk_error
from ground.files import read_record, write_record

STAGE = "pretrain-stage1"


@pytest.fixture(scope="module")
def with_data(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout whose tokenizer and first data stage are done."""
    checkout = make_checkout(tmp_path_factory.mktemp("cli") / "checkout")
    checkout.done("run", "data-stage1")
    return checkout


@pytest.fixture
def checkout(with_data: Checkout, tmp_path: Path) -> Iterator[Checkout]:
    mine = with_data.copy(tmp_path / "checkout")
    with no_process_left(mine):
        yield mine


def set_scale(checkout: Checkout, **values: object) -> None:
    file = checkout.folder / "recipes/scales/small.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | values))


def is_finished(checkout: Checkout, stage: str) -> bool:
    file = checkout.runs / stage / "manifest.json"
    return file.exists() and bool(json.loads(file.read_text())["finished"])


def a_shard(checkout: Checkout) -> Path:
    return next(checkout.cache.glob("shards/dclm-*/*.ds"))


# ---- what was asked for


def test_diff_refuses_a_start() -> None:
    from launch.__main__ import diff

    with pytest.raises(
        UserError, match=r"^FROM=mine: diff compares the scale's own recipes; leave"
    ):
        diff("sft", "60m", start="mine")


def test_unknown_names_get_the_nearest(checkout: Checkout) -> None:
    assert "unknown stage 'pretrain-stag1'; did you mean 'pretrain-stage1'?" in checkout.refused(
        "run", "pretrain-stag1"
    )
    assert "unknown scale SCALE=smal; did you mean 'small'?" in checkout.refused(
        "run", STAGE, SCALE="smal"
    )
    assert "unknown stage" in checkout.refused("diff", "pretrain-stag1")


def test_without_its_gpus_the_full_scale_names_the_command_for_the_cluster(
    checkout: Checkout,
) -> None:
    for asked in (STAGE, "pretrain-stage2"):  # which needs the first stage to have run
        line = checkout.refused("run", asked, SCALE="full", CUDA_VISIBLE_DEVICES="")
        command = f"SCALE=full sbatch --nodes=48 launch/pretrain.slurm {STAGE}"
        assert line.endswith(f"{command}\n") and "needs 384 GPUs" in line
    assert not (checkout.folder / "runs/full").exists()


def test_a_mistake_in_a_recipe_is_found_before_anything_runs(checkout: Checkout) -> None:
    edit(checkout.folder / "recipes/pretrain/stage1.yaml", "dclm: 0.75", "dclm: -1")
    assert (
        "recipes/pretrain/stage1.yaml: mixture.dclm: -1: write a number above 0"
        in checkout.refused("run", STAGE)
    )
    assert not (checkout.runs / STAGE).exists()


def test_a_layout_that_the_engine_cannot_have_names_its_key(checkout: Checkout) -> None:
    file = checkout.folder / "recipes/scales/small.yaml"
    edit(file, "    tp: 1\n", "    tp: 2\n")
    line = checkout.refused("run", STAGE)
    assert "recipes/scales/small.yaml: nanotron.parallelism.tp: 2: write a divisor" in line
    assert not is_finished(checkout, STAGE)


def test_a_changed_recipe_is_refused_until_forced(checkout: Checkout) -> None:
    before = json.loads((checkout.runs / "data-stage1/manifest.json").read_text())
    edit(checkout.folder / "recipes/pretrain/stage1.yaml", "      seed: 6\n", "      seed: 7\n")
    line = checkout.refused("run", "data-stage1")
    assert "was made from another recipe" in line and "FORCE=1" in line
    assert json.loads((checkout.runs / "data-stage1/manifest.json").read_text()) == before
    checkout.done("run", "data-stage1", FORCE="1")
    (old,) = checkout.runs.glob("data-stage1.old-*")
    assert json.loads((old / "manifest.json").read_text()) == before
    assert is_finished(checkout, "data-stage1")


def test_where_the_scale_says_so_a_changed_recipe_runs_again_by_itself(checkout: Checkout) -> None:
    changed = {"fraction": 0.05, "bytes_per_category": 4000}
    set_scale(checkout, held_out=changed, rerun_on_change=True)
    assert "set the old run aside" in checkout.done("run", "data-stage1")
    assert len(list(checkout.runs.glob("data-stage1.old-*"))) == 1


# ---- what lies on the disk


@pytest.mark.parametrize("content", ['{"stage": "data-st', "[]"])
def test_a_broken_manifest_names_itself_and_force_mends_it(
    checkout: Checkout, content: str
) -> None:
    (checkout.runs / "data-stage1/manifest.json").write_text(content)
    line = checkout.refused("run", "data-stage1")
    assert "runs/small/data-stage1/manifest.json: not " in line
    assert "make data-stage1 SCALE=small FORCE=1" in line
    assert line == checkout.refused("run", STAGE)  # the stage to force is the broken one
    checkout.done("run", "data-stage1", FORCE="1")
    assert is_finished(checkout, "data-stage1")


@pytest.mark.parametrize("damage", [lambda file: os.truncate(file, 10), Path.unlink])
def test_a_shard_that_is_cut_or_gone_is_made_again(
    checkout: Checkout, damage: Callable[[Path], None]
) -> None:
    shard = a_shard(checkout)
    whole = shard.read_bytes()
    damage(shard)
    said = checkout.done("run", "data-stage1")
    assert "a file is missing or cut off; made again" in said
    assert shard.read_bytes() == whole


def test_runs_on_a_file_is_refused(checkout: Checkout) -> None:
    (checkout.folder / "file").write_text("")
    line = checkout.refused("run", "tokenizer", RUNS="file")
    assert "file" in line and "RUNS=" in line


# ---- the disk is full


def test_a_full_disk_is_known_by_number_or_by_words() -> None:
    def line(error: Exception) -> str:
        return disk_error(error) or ""

    number = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x")
    words = RuntimeError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )
    assert "no space left" in line(number) and "runs/x" in line(number)
    assert "no space left" in line(words)
    assert "/x: permission denied; RUNS=" in line(OSError(errno.EACCES, "Permission denied", "/x"))
    assert (
        line(ValueError("some other bug")) == line(FileNotFoundError(errno.ENOENT, "", "x")) == ""
    )


NO_SPACE = """
import errno, os, pathlib
def full(*a, **k):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
def full_at(name, replace=pathlib.Path.replace):
    pathlib.Path.replace = lambda self, to: full() if pathlib.Path(to).name == name else replace(self, to)
"""
SHARD = NO_SPACE + ("import datatrove_pipelines.token_writer as w\nw.copy_documents = full\n")
# What cannot be written: the code that makes it so, and the stage that then fails.
FULL = {
    "shard": (SHARD, "data-stage1"),
    "held_out.jsonl": (f"{NO_SPACE}full_at('held_out.jsonl')", "held-out"),
    "manifest.json": (f"{NO_SPACE}full_at('manifest.json')", "tokenizer"),
    "recipe.yaml": (f"{NO_SPACE}os.fsync = full", "tokenizer"),
}


@pytest.mark.parametrize("what", FULL)
def test_a_full_disk_while_preparing_leaves_nothing_that_passes_for_whole(
    checkout: Checkout, what: str
) -> None:
    fault, stage = FULL[what]
    shutil.rmtree(checkout.runs / stage, ignore_errors=True)
    shutil.rmtree(checkout.cache / "shards")
    assert "no space left" in checkout.with_fault(fault).refused("run", stage)
    assert not is_finished(checkout, stage)
    assert what != "shard" or not list(checkout.cache.glob("shards/*/*.ds"))
    checkout.done("run", stage)
    assert is_finished(checkout, stage)


# A write of safetensors, of checkpoints by the workers and of hf/ by the runner alike.
SAVE = (
    NO_SPACE
    + """
import safetensors.torch as s
def save_file(tensors, filename, *a, save=s.save_file, **k):
    full() if PART in str(filename) else save(tensors, filename, *a, **k)
s.save_file = save_file
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["checkpoints/.partial", "hf.partial"])
def test_a_full_disk_while_training_leaves_nothing_that_passes_for_whole(
    checkout: Checkout, part: str
) -> None:
    fault = SAVE.replace("PART", repr(part))
    assert "no space left" in checkout.with_fault(fault).refused("run", STAGE)
    folder = checkout.runs / STAGE
    assert not is_finished(checkout, STAGE) and not (folder / "hf").exists()
    saved = [path.name for path in (folder / "checkpoints").glob("[0-9]*")]
    assert bool(saved) == (part == "hf.partial")
    checkout.done("run", STAGE)
    assert is_finished(checkout, STAGE) and (folder / "hf/model.safetensors").exists()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS[STAGE] + 1))


@pytest.mark.slow
def test_a_window_longer_than_a_source_names_the_source(checkout: Checkout) -> None:
    set_scale(checkout, windows_divided_by=1)
    file = checkout.folder / "recipes/pretrain/stage1.yaml"
    for key in ("sequence_length", "max_position_embeddings"):
        edit(file, f"{key}: 4096", f"{key}: 1048576")
    line = checkout.refused("run", STAGE)
    assert "fewer than one window of 1,048,577 of pretrain-stage1: shorten" in line
    assert not list((checkout.runs / STAGE / "checkpoints").glob("*"))


@pytest.fixture(scope="module")
def trained(with_data: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout whose first pretraining stage is done."""
    mine = with_data.copy(tmp_path_factory.mktemp("trained") / "checkout")
    mine.done("run", STAGE)
    return mine


@pytest.mark.slow
def test_a_deleted_checkpoint_of_a_finished_stage_is_named_with_its_remedy(
    trained: Checkout, tmp_path: Path
) -> None:
    mine = trained.copy(tmp_path / "checkout")
    shutil.rmtree(mine.runs / STAGE / "checkpoints")
    line = mine.refused("run", "pretrain-stage2")
    assert f"{STAGE}/checkpoints/{STEPS[STAGE]}: the stage's last checkpoint is missing" in line
    assert f"make {STAGE} SCALE=small FORCE=1" in line


@pytest.mark.slow
def test_a_cut_checkpoint_is_named_and_trained_again_from_the_one_before(
    trained: Checkout, tmp_path: Path
) -> None:
    mine = trained.copy(tmp_path / "checkout")
    folder = mine.runs / STAGE
    manifest = read_record(folder / "manifest.json")
    write_record(folder / "manifest.json", manifest | {"finished": None})
    before = (folder / "hf/model.safetensors").read_bytes()
    model = folder / f"checkpoints/{STEPS[STAGE]}/model"
    file = max(model.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-10])
    said = mine.done("run", STAGE)
    assert f"{file.name}: " in said and f"set aside as runs/small/{STAGE}/checkpoints/" in said
    assert is_finished(mine, STAGE)
    assert (folder / "hf/model.safetensors").read_bytes() == before
