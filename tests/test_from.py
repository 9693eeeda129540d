"""FROM=: a stage starts from any SmolLM3 checkpoint, and every other is refused before its weights."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, edit, environment
from loopback_hub import COMMIT, Hub, loopback_hub
from posttrain_jobs import write_start
from small_models import write_3b

from ground.errors import UserError
from launch.recipe.scale import Scale, load_scale
from launch.run.folder import StageRun
from launch.walk import resolve, run_stage
from posttrain.start import content_digest, model_shapes

SMALL = """
extends: {recipes}/scales/tiny.yaml
posttrain:
  chats: {{rows: 50, held_out_rows: 2}}
  every_stage:
    scores: {{prompts: 0, prompts_at_end: 1, max_new_tokens: 4}}
    trl: {{max_steps: 2, warmup_steps: 0, save_steps: 1}}
  stages:
    midtrain: {{trl: {{max_steps: 2}}}}
    sft: {{trl: {{max_steps: 2}}}}
    apo: {{trl: {{max_steps: 2}}}}
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_start(tmp_path_factory.mktemp("start") / "model")


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scale:
    """A scale of a few steps, with run folders of its own."""
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CACHE", str(tmp_path / "cache"))
    file = tmp_path / "few.yaml"
    file.write_text(SMALL.format(recipes=os.path.relpath(ROOT / "recipes", tmp_path)))
    return load_scale(str(file))


def run_from(stage: str, at: Scale, start: Path | str) -> StageRun:
    run = resolve(stage, at, str(start))
    run_stage(run)
    return run


def test_a_stage_starts_from_a_folder_and_runs_no_stage_before(at: Scale, start: Path) -> None:
    from posttrain.job import Job

    run = run_from("sft", at, start)
    assert (run.folder / "hf/model.safetensors").is_file()
    job = Job.read(run.folder)
    assert Path(job.model).resolve() == start.resolve() and job.tokenizer == job.model
    done = {file.parent.name for file in run.folder.parent.parent.glob("*/*/manifest.json")}
    assert done == {
        "sft",
        "data-chats",
        next(one.stage for one in run.inputs.values() if one.scale == "from"),
    }
    assert run.folder.parent.name.startswith("few-from-model-")
    assert not run_stage(resolve("sft", at, str(start))), "nothing is left to do"
    # What it trained starts the next stage, with its own template.
    apo = run_from("apo", at, run.folder / "hf")
    assert apo.folder.parent != run.folder.parent and (apo.folder / "hf/config.json").is_file()


def test_a_merge_takes_its_models_from_folders(at: Scale, start: Path, tmp_path: Path) -> None:
    from small_models import weights

    other = shutil.copytree(start, tmp_path / "other")
    run = run_from("merge", at, f"{start},{other}")
    assert {one.scale for one in run.inputs.values()} == {"from"}
    ours, theirs = weights(run.folder / "hf"), weights(start)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor.float() - theirs[name]).abs().max() < 4e-3 * theirs[name].abs().max()


def test_checkpoints_of_other_sizes_are_not_merged(at: Scale, start: Path, tmp_path: Path) -> None:
    """Refused by config.json alone: the second is a hub's, whose weights are not here."""
    from launch.stages.checkpoint import CheckpointStage

    config = json.loads((start / "config.json").read_text()) | {"hidden_size": 64}
    run = resolve("merge", at, f"{start},{start}")
    first, second = run.inputs.values()
    assert isinstance(second, CheckpointStage)
    second = replace(second, recipe=replace(second.recipe, named="owner/name", config=config))
    run = replace(run, inputs=dict(zip(run.inputs, (first, second), strict=True)))
    message = f"FROM=owner/name: config.json: hidden_size: 64, that of {start} is 32"
    with pytest.raises(UserError, match=re.escape(message)):
        run.refuse()


def test_other_weights_are_another_run(at: Scale, start: Path, tmp_path: Path) -> None:
    import torch
    from small_models import NORM, spoil

    copy = shutil.copytree(start, tmp_path / "copy")
    assert content_digest(copy) == content_digest(start), "the content counts, not the place"
    before = resolve("sft", at, str(copy)).identity
    assert before == resolve("sft", at, str(start)).identity
    spoil(copy, {NORM: torch.full((32,), 1.25)})
    assert resolve("sft", at, str(copy)).identity != before


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without_turns(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("<|im_start|>", "<|turn|>"))


def without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def without_pad(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("<|finetune_right_pad_id|>", "<|other|>"))
    edit_json(folder / "tokenizer_config.json", pad_token="<|im_end|>")


MISTAKES: dict[str, tuple[str, Any, str]] = {
    "architecture": ("sft", lambda f: edit_json(f / "config.json", model_type="llama"),
                     "config.json: model_type: llama: another architecture; name a checkpoint of smollm3"),
    "vocabulary": ("sft", lambda f: edit_json(f / "config.json", vocab_size=128256),
                   "config.json: vocab_size: 128256: tokenizer.json has 263 tokens"),
    "small vocabulary": ("midtrain", lambda f: edit_json(f / "config.json", vocab_size=200),
                         "config.json: vocab_size: 200: tokenizer.json has 263 tokens"),
    "special tokens": ("sft", without_turns, "tokenizer.json: no token <|im_start|>"),
    "padding": ("sft", without_pad, "pad_token: <|im_end|>: no token that no text has"),
    "template": ("apo", without_template, "no chat template, and apo uses the model's own"),
    "no tokenizer": ("sft", lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: no such file"),
    "no weights": ("sft", lambda f: (f / "model.safetensors").unlink(), "model.safetensors: no such file"),
    "layers": ("sft", lambda f: edit_json(f / "config.json", num_hidden_layers=5, layer_types=None, no_rope_layers=None),
               "no tensor 'model.layers.4"),
    "width": ("sft", lambda f: edit_json(f / "config.json", intermediate_size=64), "has shape"),
    "text for a number": ("sft", lambda f: edit_json(f / "config.json", vocab_size="abc"),
                          "config.json: vocab_size: 'abc': no whole number of 1 to 4194304"),
    "layer types": ("sft", lambda f: edit_json(f / "config.json", num_hidden_layers=5),
                    "`num_hidden_layers` (5) must be equal to the number of `layer_types` (4)"),
    "no such tokenizer": ("sft", lambda f: (f / "tokenizer.json").write_text('{"a": 1}'),
                          "tokenizer.json: no tokenizer ("),
    "empty size": ("sft", lambda f: edit_json(f / "config.json", intermediate_size=None),
                   "config.json: intermediate_size: None: no whole number"),
    "heads": ("sft", lambda f: edit_json(f / "config.json", num_key_value_heads=3),
              "config.json: num_key_value_heads: 3 does not divide num_attention_heads"),
    "cut off": ("sft", lambda f: os.truncate(f / "model.safetensors", 5000), "truncated or corrupt"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(
    name: str, at: Scale, start: Path, tmp_path: Path
) -> None:
    stage, spoil, message = MISTAKES[name]
    folder = shutil.copytree(start, tmp_path / "spoilt")
    spoil(folder)
    with pytest.raises(UserError) as error:
        run_from(stage, at, folder)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list((tmp_path / "runs").glob("*/*/manifest.json")), "nothing was begun"


@pytest.mark.parametrize(
    ("stage", "named", "message"),
    [
        ("sft", "/nowhere/at/all", "FROM=/nowhere/at/all: no such folder, and no hub id"),
        ("sft", "three/parts/here", "no such folder, and no hub id"),
        ("report", "START", "report starts from no model"),
        ("pretrain-stage1", "START", "pretrain-stage1 starts from no model"),
        ("sft", "START,START", "names 2 checkpoints; sft starts from one"),
        ("sft", "START,", "START,: an empty name"),
        ("soup", "START", "soup merges models of one stage"),
        ("merge", "START", "START: names 1 checkpoint; merge takes 2: soup, longctx-64k"),
        ("merge", "START,START,START", "names 3 checkpoints; merge takes 2"),
    ],
)
def test_a_from_that_goes_nowhere_is_refused(
    stage: str, named: str, message: str, at: Scale, start: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(message.replace("START", str(start)))):
        run_from(stage, at, named.replace("START", str(start)))


def test_attention_falls_back_out_loud(
    at: Scale, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a GPU and without flash-attn the job says sdpa, and SFT trains on rows, not on a line."""
    from launch.stages.posttrain import PosttrainStage
    from posttrain.job import Job

    file = tmp_path / "card.yaml"
    gpu = "{use_cpu: false, bf16: true, model_init_kwargs: {dtype: bfloat16, attn_implementation: flash_attention_2}}"
    file.write_text(
        f"extends: few.yaml\ndevice: gpu\nlayout: fit\nposttrain: {{every_stage: {{trl: {gpu}}}}}\n"
    )
    run = resolve("sft", load_scale(str(file)), str(start))
    assert isinstance(run, PosttrainStage)
    for taken in run.inputs.values():
        run_stage(taken)
    run.begin(force=False)
    run.prepare()
    printed = capsys.readouterr().out
    if find_spec("flash_attn"):
        pytest.skip("flash-attn is installed here")
    key = "card.yaml: posttrain.every_stage.trl.model_init_kwargs.attn_implementation"
    assert (
        f"{key}: flash_attention_2: flash-attn is not installed; {run.attention} in its place"
        in printed
    )
    job = Job.read(run.folder)
    assert job.trl["model_init_kwargs"]["attn_implementation"] == run.attention
    assert "accumulated" in printed and "GiB a process predicted" in printed
    assert (
        run.recipe_values()["trl"]["model_init_kwargs"]["attn_implementation"]
        == "flash_attention_2"
    )


@pytest.mark.slow
def test_rows_that_spell_control_tokens_are_said_and_recorded(
    at: Scale, start: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from launch.stages.posttrain import PosttrainStage

    run = resolve("apo", at, str(start))
    assert isinstance(run, PosttrainStage)
    for taken in run.inputs.values():
        run_stage(taken)
    split, name = next(iter(run.job().files.items()))
    file = Path(name)
    whole = file.read_text("utf-8")
    row = json.loads(whole.splitlines()[0])
    row["prompt"][0]["content"] += "<|im_end|>"
    lines = [json.dumps(row)] * len(whole.splitlines())
    run.begin(force=False)
    try:
        file.write_text("\n".join(lines) + "\n", "utf-8")
        run.prepare()
    finally:
        file.write_text(whole, "utf-8")
    counted = json.loads((run.folder / "data.json").read_text())["rows_with_control_strings"]
    assert list(counted) == [split] and counted[split] > 0
    printed = capsys.readouterr().out
    assert f"apo: {split}: {counted[split]} rows spell control tokens in their messages" in printed


# ---- a hub


@pytest.fixture
def hub(start: Path) -> Iterator[Hub]:
    with loopback_hub({"owner/name": start}) as hub:
        yield hub


def launch(
    hub: Hub | str, at: Scale, tmp_path: Path, stage: str, named: str
) -> subprocess.CompletedProcess[str]:
    endpoint = hub if isinstance(hub, str) else hub.endpoint
    more = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "FROM": named}
    return subprocess.run(
        [sys.executable, "-m", "launch", "run", stage, "--scale", at.given],
        capture_output=True, text=True, check=False, timeout=300, env=environment(**more),
    )  # fmt: skip


def test_a_hub_that_does_not_answer_is_asked_once(at: Scale, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # closed below: nobody listens
    begun = time.monotonic()
    done = launch(f"http://127.0.0.1:{port}", at, tmp_path, "sft", "owner/nothing")
    assert done.returncode == 69 and re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    assert "the hub does not answer" in done.stderr
    assert time.monotonic() - begun < 18


@pytest.mark.slow
def test_a_stage_starts_from_a_model_on_a_hub(hub: Hub, at: Scale, tmp_path: Path) -> None:
    done = launch(hub, at, tmp_path, "sft", "owner/name")
    assert done.returncode == 0, done.stderr[-3000:]
    weights = hub.fetched.index("model.safetensors")
    assert {"config.json", "tokenizer.json"} <= set(hub.fetched[:weights]), "checked first"
    assert hub.fetched.count("model.safetensors") == 1
    run = tmp_path / "runs/few-from-owner--name/sft"
    assert (run / "hf/model.safetensors").is_file()
    (manifest,) = (tmp_path / "runs/from").glob("*/manifest.json")
    assert json.loads(manifest.read_text())["revision"] == COMMIT
    again = launch(hub, at, tmp_path, "sft", "owner/name")
    assert "up to date" in again.stdout, again.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("named", "spoilt", "message"),
    [
        ("owner/none", None, "no such repository"),
        ("owner/name@v9", None, "no such revision"),
        ("owner/name", ("config.json", '"smollm3"', '"llama"'), "model_type: llama"),
        ("owner/name", ("tokenizer.json", "<|im_end|>", "<|end|>"), "no token <|im_end|>"),
    ],
)
def test_a_model_on_a_hub_is_refused_before_its_weights_are_fetched(
    named: str, spoilt: tuple[str, str, str] | None, message: str,
    hub: Hub, at: Scale, start: Path, tmp_path: Path,
) -> None:  # fmt: skip
    if spoilt:
        folder = shutil.copytree(start, tmp_path / "spoilt")
        file, old, new = spoilt
        edit(folder / file, old, new)
        hub.repositories["owner/name"] = folder
    done = launch(hub, at, tmp_path, "sft", named)
    assert done.returncode == 2 and re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    assert message in done.stderr
    assert not [file for file in hub.fetched if "safetensors" in file]


# ---- the shape of the released model


@pytest.fixture(scope="module")
def big(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_3b(tmp_path_factory.mktemp("3b") / "model", start)


@pytest.mark.parametrize("stage", ["midtrain", "sft", "apo", "merge"])
def test_the_3b_starts_each_stage(stage: str, at: Scale, big: Path) -> None:
    given = f"{big},{big}" if stage == "merge" else str(big)
    run = resolve(stage, at, given)
    for start in run.inputs.values():
        if start.scale == "from":
            start.refuse()
    run.refuse()
    assert os.stat(big / "model-00001-of-00002.safetensors").st_blocks < 1000
    shapes = model_shapes(json.loads((big / "config.json").read_text()))
    parameters = 0
    for shape in shapes.values():
        size = 1
        for length in shape:
            size *= length
        parameters += size
    assert parameters == 3_075_098_624  # as the released model's card counts them


def test_a_3b_with_another_table_is_refused(at: Scale, big: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in big.iterdir():
        (copy / file.name).symlink_to(file)
    (copy / "config.json").unlink()
    config = json.loads((big / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 16}))
    with pytest.raises(
        UserError, match=r"[kv]_proj.weight' has shape \(512, 2048\), \(2048, 2048\)"
    ):
        run_from("sft", at, copy)
