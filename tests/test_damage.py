"""No damaged file is used: checkpoints of both trainers, models, shards, what lists them, metrics.

Each is named in one line; a run goes on from the state before, or is refused.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from stage_runs import finished, plain

from datatrove_pipelines.shards import (
    INFO_FILE,
    ShardInfo,
    check_shards,
    seal_shards,
    verify_shards,
    write_info,
)
from ground import checksums, files
from ground.checksums import Damaged, intact, seal, seal_together, whole_checkpoints
from ground.errors import UserError
from launch.stages.data import DataRecipe, DataStage

RANK = "pp-0-of-1{}tp-0-of-1"
# What lies in a checkpoint: {a name for the case: the file}.
NANOTRON = {
    "weight": "model/model/decoder/0/pp_block/attn/qkv_proj/model_weight_pp-rank-0-of-1_tp-rank-1-of-2.safetensors",
    "Adam": f"optimizer/optimizer_{RANK.format('_')}_exp-0-of-1.pt",
    "ZeRO": f"optimizer/optimizer_{RANK.format('_dp-1-of-2_')}_exp-0-of-1.pt",
    "optimizer's layout": "optimizer/optimizer_config.json",
    "schedule": "lr_scheduler/lr_scheduler.pt",
    "random state": "random/tp-0-of-1_dp-1-of-2_pp-0-of-1.pt",
    "step": "checkpoint_metadata.json",
    "shape": "model_config.json",
    "lines": "metrics.jsonl",
    "seal": checksums.FILE,
}
TRAINER = {
    "weights": "model.safetensors",
    "Adam": "optimizer.pt",
    "schedule": "scheduler.pt",
    "random state": "rng_state_1.pth",
    "step": "trainer_state.json",
    "DeepSpeed": "global_step6/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
    "tokenizer": "tokenizer.json",
    "seal": checksums.FILE,
}
Damage = Callable[[Path, Path], object]  # of a file, beside the same file of another step


def flip(file: Path, _: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


DAMAGES: dict[str, Damage] = {
    "a bit flipped": flip,
    "cut short": lambda file, _: file.write_bytes(file.read_bytes()[:-7]),
    "emptied": lambda file, _: file.write_bytes(b""),
    "deleted": lambda file, _: file.unlink(),
    "of another step": lambda file, other: shutil.copy(other, file),
    "not JSON": lambda file, _: file.write_text("{"),
    "JSON without its keys": lambda file, _: file.write_text("{}"),
}


@pytest.fixture
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A run folder with the checkpoints of steps 3, 6 and 9, each file of which names its step."""
    for step in (3, 6, 9):
        folder = tmp_path / "checkpoints" / str(step)
        for name in request.param.values():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if name != checksums.FILE:
                (folder / name).write_text(json.dumps({"step": step, "more": name * 9}) + "\n")
        seal_together(folder, 0, 1, lambda: None)
    return tmp_path


CASES = [
    pytest.param(table, table[name], damage, id=f"{trainer}: {name} {damage}")
    for trainer, table in {"nanotron": NANOTRON, "Trainer": TRAINER}.items()
    for name in table
    for damage in DAMAGES
]


@pytest.mark.parametrize(("run", "name", "damage"), CASES, indirect=["run"])
def test_a_run_goes_on_from_the_last_whole_checkpoint(
    run: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    last, before = (run / "checkpoints" / step for step in ("9", "6"))
    DAMAGES[damage](last / name, before / name)
    saved = whole_checkpoints(run, "sft", "begin again")
    assert [folder.name for folder in saved] == ["3", "6"]
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith(f"sft: {last}/")
    assert name in said and f"set aside as {last}.damaged, goes on from {before}" in said
    assert files.checkpoints(run) == saved and (run / "checkpoints" / "9.damaged").is_dir()
    assert whole_checkpoints(run, "sft", "begin again") == saved, "said once"
    assert capsys.readouterr().out == ""
    for folder in saved:
        DAMAGES[damage](folder / name, run / "checkpoints" / "9.damaged" / name)
    if damage != "of another step":  # the damaged one's is no other than before
        with pytest.raises(Damaged, match="no checkpoint before it is whole: begin again"):
            whole_checkpoints(run, "sft", "begin again")
        assert len(files.checkpoints(run)) == 2, "nothing is set aside when nothing is whole"


@pytest.mark.parametrize("run", [NANOTRON], indirect=True)
def test_a_checkpoint_under_another_steps_name_is_damaged(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run / "checkpoints"
    shutil.rmtree(folder / "9")
    (folder / "3").rename(folder / "9")
    assert [one.name for one in whole_checkpoints(run, "sft", "begin again")] == ["6"]
    assert "the folder is the checkpoint of step 3" in capsys.readouterr().out


@pytest.mark.parametrize("run", [TRAINER], indirect=True)
def test_what_a_signal_saved_goes_though_a_kill_came_between(run: Path) -> None:
    files.note_stopped(run / "checkpoints", 6)
    assert [one.name for one in whole_checkpoints(run, "apo", "begin again")] == ["3", "9"]
    files.note_stopped(run / "checkpoints", 9)
    assert [one.name for one in whole_checkpoints(run, "apo", "begin again")] == ["3", "9"]


# ---- models


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", checksums.FILE]
)
def test_a_damaged_model_is_refused_where_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: str
) -> None:
    monkeypatch.setenv("RUNS", str(tmp_path))
    taken, other = (plain(stage, seals_models=True) for stage in ("sft", "midtrain"))
    for stage in (taken, other):
        (stage.folder / "hf").mkdir(parents=True)
        for file in ("model.safetensors", "config.json", "tokenizer.json"):
            (stage.folder / "hf" / file).write_text(json.dumps({file: stage.stage * 9}))
        seal(stage.folder / "hf")
    reader = plain("apo", takes=[taken])
    assert reader.whole_model("sft/hf") == taken.folder / "hf"
    if (damage, name) == ("of another step", checksums.FILE):
        name, message = checksums.FILE, "config.json"  # which is not what that seal says
    else:
        message = name
    DAMAGES[damage](taken.folder / "hf" / name, other.folder / "hf" / name)
    with pytest.raises(Damaged, match=message) as error:
        reader.whole_model("sft/hf")
    assert "make sft SCALE=small` writes it again" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_damaged_checkpoint_that_is_no_output_is_not_to_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNS", str(tmp_path))
    apo = plain("apo", seals_models=True)
    (apo.folder / "checkpoints" / "40").mkdir(parents=True)
    with pytest.raises(Damaged, match=r"whole; `make apo SCALE=small FORCE=1` trains again$"):
        plain("soup", takes=[apo]).whole_model("apo/checkpoints/-1")


def test_a_model_from_elsewhere_needs_no_seal_but_one_of_ours_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNS", str(tmp_path))
    ours, theirs = (plain(n, seals_models=s) for n, s in (("sft", True), ("m", False)))
    for stage in (ours, theirs):
        (stage.folder / "hf").mkdir(parents=True)
    reader = plain("apo", takes=[ours, theirs])
    assert reader.whole_model("m/hf").is_dir()
    with pytest.raises(Damaged, match=r"checksums\.json: no such file, so the folder is not whole"):
        reader.whole_model("sft/hf")


# ---- shards


def write_shards(folder: Path, first: int) -> Path:
    folder.mkdir(parents=True)
    for number in range(2):
        tokens = np.arange(first, first + 2000, dtype=np.uint16) % 250
        tokens[9::10] = 255
        tokens.tofile(folder / f"{number}.ds")
        np.arange(10, 2001, 10, dtype=np.uint64).tofile(folder / f"{number}.ds.index")
        np.arange(first, first + 200, dtype=np.uint32).tofile(folder / f"{number}.ds.rows")
    write_info(ShardInfo("web", folder, 4000, 400, first, 2, 255))
    seal_shards(folder)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name", ["0.ds", "1.ds.index", "1.ds.rows", INFO_FILE, "blocks.json", checksums.FILE]
)
def test_a_damaged_shard_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: str
) -> None:
    monkeypatch.setattr("datatrove_pipelines.shards.BLOCK_BYTES", 512)  # the file has 8
    folder, other = (write_shards(tmp_path / f"web-{n}", first=n) for n in (1, 2))

    def read() -> None:
        check_shards(folder, 255)
        verify_shards([folder])

    read()
    same = (folder / name).read_bytes() == (other / name).read_bytes()
    DAMAGES[damage](folder / name, other / name)
    if damage == "of another step" and same:
        return read()  # both have the same documents' ends
    message = name.removesuffix(".index")  # an index may show in the tokens that it points to
    if (name, damage) == (checksums.FILE, "of another step"):
        message = "its content is not what was written"
    with pytest.raises(UserError, match=message) as error:
        read()
    assert "source web: " in str(error.value) and "make data-stage1" in str(error.value)
    assert "\n" not in str(error.value)


def test_of_shards_beyond_the_bound_some_blocks_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datatrove_pipelines.shards.BLOCK_BYTES", 100)
    monkeypatch.setattr("datatrove_pipelines.shards.MOST_BYTES_READ", 4000)  # half of it
    folder = write_shards(tmp_path / "web-1", first=1)
    data = np.fromfile(folder / "0.ds", np.uint16)
    data[:5] += 1
    data.tofile(folder / "0.ds")
    missed = 0
    for _ in range(40):
        with suppress(UserError):
            verify_shards([folder])
            missed += 1
    assert 0 < missed < 40


# ---- what lists the shards, and metrics


@pytest.mark.parametrize("key", ["shards", "eos_id"])
def test_a_data_manifest_without_a_key_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("RUNS", str(tmp_path))
    stage = DataStage(
        stage="data-stage1", scale="small", arguments="SCALE=small", recipe=DataRecipe({}, 0, {}, 0)
    )
    results = {"shards": {"web": {}}, "eos_id": 255}
    del results[key]
    done = finished(replace(stage), **results)
    with pytest.raises(UserError, match=rf"manifest\.json: no {key}; `make data-stage1 .* FORCE=1"):
        getattr(done, key)


LINES = [json.dumps({"step": step, "loss": step / 7}) + "\n" for step in range(1, 9)]


@pytest.fixture
def kept(tmp_path: Path) -> list[Path]:
    """Checkpoints of steps 3 and 6 of a run that was stopped at step 8."""
    saved = []
    for step in (3, 6):
        saved.append(tmp_path / "checkpoints" / str(step))
        saved[-1].mkdir(parents=True)
        (saved[-1] / "metrics.jsonl").write_text("".join(LINES[step - 3 : step]))
        seal(saved[-1])
    (tmp_path / "metrics.jsonl").write_text("".join(LINES))
    return saved


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_metrics_are_mended_from_the_checkpoints(
    tmp_path: Path, kept: list[Path], damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "metrics.jsonl"
    if damage == "a bit flipped":
        file.write_text(file.read_text().replace("0.2857", "0.2957"))  # a digit of step 2
    elif damage == "cut short":
        file.write_text("".join(LINES)[:80])
    else:
        DAMAGES[damage](file, kept[0] / "metrics.jsonl")
    files.cut_back(file, 6, intact(kept, file.name))
    assert file.read_text() == "".join(LINES[:6])
    said = capsys.readouterr().out
    assert said.startswith(f"{file}: damaged: ") and said.count("\n") == 1


def test_whole_metrics_are_cut_back_without_a_word(
    tmp_path: Path, kept: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(LINES) + '{"step": 9, "lo')  # as a kill leaves it
    files.cut_back(file, 6, intact(kept, file.name))
    assert file.read_text() == "".join(LINES[:6]) and capsys.readouterr().out == ""


def test_a_damaged_copy_mends_nothing(tmp_path: Path, kept: list[Path]) -> None:
    flip(kept[0] / "metrics.jsonl", kept[0])
    files.cut_back(tmp_path / "metrics.jsonl", 6, intact(kept, "metrics.jsonl"))
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(LINES[:6])


def test_a_damaged_line_is_named_to_who_only_reads(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(LINES[0] + '{"step": 2, "lo\n' + LINES[2])
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2: damaged"):
        files.read_json_lines(file)
