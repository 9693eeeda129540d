"""Post-training recipes: published numbers, the scale's overlay, what is refused, the job."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, edit

from launch import posttrain
from launch.chats import chats_recipe, load_splits, split_files
from launch.errors import UserError
from launch.recipe import load_pipeline, load_scale
from launch.run_folder import StageRun
from launch.schema_posttrain import DpoTrl, SftTrl
from launch.slurm import processes_per_node, refuse_without_gpus
from launch.stages import resolve
from posttrain.job import Job
from posttrain.mixing import kept_rows

PUBLISHED = yaml.safe_load((ROOT / "tests/published.yaml").read_text())["posttrain"]
STAGES = ["midtrain", "sft", "apo"]
CONFIGS = {"midtrain": "Mid", "sft": "SFT", "apo": "Preference"}


@pytest.mark.parametrize("stage", STAGES)
def test_the_recipe_says_what_was_published(stage: str) -> None:
    recipe, published = posttrain.load_posttrain(stage), PUBLISHED[stage]
    trl = recipe["trl"]
    expected = {
        "learning_rate": published["learning_rate"],
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": published["min_lr_rate"]},
        "warmup_steps": published["warmup_ratio"],
        "num_train_epochs": published["epochs"][published["epochs"]["chosen"]],
        "max_steps": -1,
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "max_grad_norm": published["gradient_clip"],
        "per_device_train_batch_size": published["per_device_batch"],
        "gradient_accumulation_steps": published["accumulation"],
        "average_tokens_across_devices": True,
        "max_length": published["max_length"],
        "bf16": True,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
        "seed": published["seed"],
        "save_strategy": published["save"]["strategy"],
        "save_steps": published["save"]["steps"],
    }
    assert {name: trl[name] for name in expected} == expected
    own: dict[str, Any] = {"beta": 0.05, "loss_type": ["apo_zero"]}
    if stage != "apo":
        own = {
            "packing": True,
            "packing_strategy": published["packing"],
            "assistant_only_loss": published["assistant_only"],
            "eos_token": published["eos_token"],
        }
    assert {name: trl[name] for name in own} == own
    assert recipe["mixture_seed"] == published["mixture_seed"]
    world = recipe["world_size"]
    assert world == 8 * published["nodes"]
    assert (
        world * published["per_device_batch"] * published["accumulation"]
        == (published["global_batch"])
    )


@pytest.mark.parametrize("stage", STAGES)
def test_weights_are_the_published_ones(stage: str) -> None:
    mixture = posttrain.load_posttrain(stage)["mixture"]
    assert len(mixture) == PUBLISHED[stage]["splits"]
    assert set(mixture) == set(load_splits()["splits"][CONFIGS[stage]])
    for split, weight in mixture.items():
        assert weight == PUBLISHED["weights"].get(split, 1.0)


def used(stage: str, mode: str = "") -> int:
    rows = load_splits()["splits"][CONFIGS[stage]]
    return sum(
        kept_rows(split, rows[split]["rows"], weight)
        for split, weight in posttrain.load_posttrain(stage)["mixture"].items()
        if mode in ("", rows[split]["mode"])
    )


def test_rows_that_are_drawn_are_the_published_totals() -> None:
    for stage in STAGES:
        rows = load_splits()["splits"][CONFIGS[stage]].values()
        assert sum(row["rows"] for row in rows) == PUBLISHED[stage]["rows"]
    for mode, rows_used in PUBLISHED["sft"]["rows_used"].items():
        assert abs(used("sft", mode) - rows_used) <= 2  # the sum's own rounding
    assert used("apo") == PUBLISHED["apo"]["pairs_used"]
    assert used("apo") // PUBLISHED["apo"]["global_batch"] == PUBLISHED["apo"]["steps"]


@pytest.mark.parametrize("stage", STAGES)
def test_full_changes_nothing_of_the_recipe(stage: str) -> None:
    recipe = posttrain.load_posttrain(stage)
    assert posttrain.scale_posttrain(recipe, load_scale("full")) == recipe


@pytest.mark.parametrize("stage", STAGES)
def test_a_scale_keeps_weights_masks_packing_and_schedule(stage: str) -> None:
    recipe = posttrain.load_posttrain(stage)
    scaled = posttrain.scale_posttrain(recipe, load_scale("tiny"))
    for key in ("stage", "trainer", "mixture", "mixture_seed"):
        assert scaled[key] == recipe[key]
    kept = ["lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm", "seed"]
    kept += ["save_strategy", "save_steps", "weight_decay"]
    kept += ["beta", "loss_type"] if stage == "apo" else ["packing_strategy", "assistant_only_loss"]
    assert {k: scaled["trl"][k] for k in kept} == {k: recipe["trl"][k] for k in kept}
    assert scaled["trl"]["max_steps"] > 0 and scaled["world_size"] == 1


def test_every_key_of_the_trl_section_is_one_of_trls() -> None:
    from trl import DPOConfig, SFTConfig

    for ours, theirs in ((SftTrl, SFTConfig), (DpoTrl, DPOConfig)):
        known = {field.name for field in dataclasses.fields(theirs)}
        assert {field.name for field in dataclasses.fields(ours)} <= known


MISTAKES = {
    "misspelt key": ("learning_rate: 2.0e-5", "learning_rat: 2.0e-5", "trl.learning_rat: unknown key; did you mean 'learning_rate'?"),
    "a key of another trainer": ("eos_token: <|im_end|>", "beta: 0.1", "trl.beta: unknown key"),
    "trainer": ("trainer: SFTTrainer", "trainer: SftTrainer", "did you mean 'SFTTrainer'?"),
    "weight above 1": ("s1k_1.1_think: 1.0", "s1k_1.1_think: 2.0", "mixture.s1k_1.1_think: weight 2: write a share above 0, at most 1"),
    "weight NaN": ("s1k_1.1_think: 1.0", "s1k_1.1_think: .nan", "mixture.s1k_1.1_think: weight nan"),
    "missing key": ("  seed: 42\n", "", "trl.seed: missing; add it"),
    "wrong type": ("max_length: 65536", "max_length: long", "trl.max_length: 'long': write a whole number"),
    "template": ("file: chat_template.jinja", "file: chat.jinja", "template.file: chat.jinja: no such file beside it"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_with_key_and_remedy(name: str, recipes: Path) -> None:
    old, new, message = MISTAKES[name]
    edit(recipes / "posttrain/sft.yaml", old, new)
    with pytest.raises(UserError) as error:
        posttrain.posttrain_recipe("sft", "full")
    assert message in str(error.value) and "sft.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_split_is_refused_with_the_nearest(recipes: Path) -> None:
    edit(recipes / "posttrain/sft.yaml", "s1k_1.1_think:", "s1k_1.2_think:")
    with pytest.raises(
        UserError, match=r"mixture\.s1k_1\.2_think: .*did you mean 's1k_1\.1_think'"
    ):
        split_files(Path("chats"), posttrain.load_posttrain("sft")["mixture"])


def test_a_scale_may_not_change_the_mixture(recipes: Path) -> None:
    edit(
        recipes / "scales/tiny.yaml",
        "    sft:\n      trl:",
        "    sft:\n      mixture: {}\n      trl:",
    )
    with pytest.raises(UserError, match=r"posttrain\.stages\.sft\.mixture: no scale sets that"):
        posttrain.posttrain_recipe("sft", "tiny")


def test_a_changed_template_is_another_recipe(recipes: Path) -> None:
    before = posttrain.posttrain_recipe("sft", "tiny")
    file = recipes / "posttrain/chat_template.jinja"
    file.write_text(file.read_text() + "{#- later -#}")
    assert posttrain.posttrain_recipe("sft", "tiny") != before


def test_chats_are_another_recipe_once_their_table_changes(recipes: Path) -> None:
    before = chats_recipe("data-chats", "tiny")
    edit(recipes / "posttrain/splits.yaml", "stand_in: everyday", "stand_in: facts")
    assert chats_recipe("data-chats", "tiny") != before
    assert set(chats_recipe("data-chats", "full")["splits"]) == set(CONFIGS.values())


@pytest.mark.parametrize("stage", STAGES)
def test_full_without_gpus_names_the_command(stage: str) -> None:
    nodes = PUBLISHED[stage]["nodes"]
    line = f"SCALE=full sbatch --nodes={nodes} launch/posttrain.slurm {stage}"
    with pytest.raises(UserError, match=re.escape(line)):
        refuse_without_gpus(resolve(stage, "full"))


@pytest.mark.parametrize(
    ("nodes", "gpus", "expected"),
    [(8, 8, 8), (16, 4, 4), (8, 0, 8), (4, 8, "--nodes=8 launch")],
)
def test_nodes_make_up_the_world_or_the_line_that_does_is_named(
    nodes: int, gpus: int, expected: int | str
) -> None:
    run = StageRun("sft", "full", "posttrain", {"world_size": 64, "device": "gpu"})
    if isinstance(expected, int):
        assert processes_per_node(run, nodes, gpus) == expected
    else:
        with pytest.raises(UserError, match=expected):
            processes_per_node(run, nodes, gpus)


def test_accelerate_configurations_are_those_of_the_recipes() -> None:
    configs = {
        file.stem: yaml.safe_load(file.read_text())
        for file in (ROOT / "launch/accelerate").glob("*.yaml")
    }
    assert set(configs) == {"cpu", "gpu", "zero3"}
    assert configs["zero3"]["num_processes"] == posttrain.load_posttrain("sft")["world_size"]
    assert configs["zero3"]["deepspeed_config"]["zero_stage"] == 3
    for name in ("cpu", "gpu"):
        assert (configs[name]["num_processes"], configs[name]["distributed_type"]) == (1, "NO")


def test_accelerate_reads_the_configurations() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    for file in (ROOT / "launch/accelerate").glob("*.yaml"):
        assert load_config_from_file(str(file)).num_processes >= 1


def test_stages_follow_each_other() -> None:
    pipeline = load_pipeline()
    starts = {stage: pipeline[stage]["takes"][-1] for stage in STAGES}
    assert starts == {"midtrain": "longctx-64k", "sft": "midtrain", "apo": "sft"}


@pytest.mark.parametrize("stage", STAGES)
def test_the_job_holds_what_the_engine_reads(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CACHE", str(tmp_path / "cache"))
    run = resolve(stage, "tiny")
    chats, start = run.inputs["data-chats"], posttrain.start_of(run)
    chats.finish(folder="chats/1")
    start.finish(tokens=123)
    (tmp_path / "cache/chats/1/held_out").mkdir(parents=True)
    job = Job(**json.loads(json.dumps(posttrain.job(run))))
    assert job.model == str(start.folder / "hf") and job.tokens_before == 123
    assert job.files.keys() == job.mixture.keys()
    config = CONFIGS[stage].lower()
    assert all(f"cache/chats/1/{config}/" in file for file in job.files.values())
    assert bool(job.template) == (stage != "apo")
    assert "date_string" not in job.template_defaults
    assert job.settings == ({} if stage == "midtrain" else {"date_string": "01 July 2025"})
    assert None not in job.trl.values()
    job.write(tmp_path)
    assert Job.read(tmp_path) == job
    assert json.loads((tmp_path / "job.json").read_text()) == posttrain.job(run)


def test_a_job_is_light_to_import() -> None:
    code = "import sys, posttrain.job; print(*{'torch', 'transformers', 'trl'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
