"""Post-training recipes: published numbers, the scale's overlay, what is refused, the job."""

import dataclasses
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, edit, forget_recipes

from ground.errors import UserError
from launch.recipe.book import load_recipe
from launch.recipe.changes import flatten
from launch.recipe.load import lay_over
from launch.recipe.posttrain import DpoTrl, PosttrainRecipe, SftTrl
from launch.recipe.scale import load_scale, scale
from launch.recipe.tables import SplitRow, load_pipeline, load_splits
from launch.run.cluster import processes_per_node, refuse_without_processors
from launch.stages.chats import ChatsStage
from launch.stages.posttrain import PosttrainStage
from launch.walk import resolve
from posttrain.job import Job
from posttrain.mixing import kept_rows

PUBLISHED = yaml.safe_load((ROOT / "tests/published.yaml").read_text())
STAGES = ["midtrain", "sft", "apo"]
CONFIGS = {"midtrain": "Mid", "sft": "SFT", "apo": "Preference"}


def published(stage: str) -> PosttrainRecipe:
    recipe: PosttrainRecipe = load_recipe(stage).recipe
    return recipe


def scaled(stage: str, name: str) -> PosttrainRecipe:
    recipe: PosttrainRecipe = scale(load_recipe(stage), load_scale(name))
    return recipe


def run_of(stage: str, name: str = "tiny") -> PosttrainStage:
    run = resolve(stage, load_scale(name))
    assert isinstance(run, PosttrainStage)
    return run


def splits_of(stage: str) -> dict[str, SplitRow]:
    return load_splits().splits[CONFIGS[stage]]


@pytest.mark.parametrize("stage", STAGES)
def test_the_recipe_says_what_was_published(stage: str) -> None:
    numbers = lay_over(PUBLISHED["every_posttrain_stage"], PUBLISHED["posttrain"][stage])
    ours = flatten(dataclasses.asdict(published(stage)))
    assert {key: ours[key] for key in flatten(numbers)} == flatten(numbers)
    trl = published(stage).trl
    batch = published(stage).world_size * trl.per_device_train_batch_size
    totals = PUBLISHED["posttrain_totals"][stage]
    assert batch * trl.gradient_accumulation_steps == totals["global_batch"]


@pytest.mark.parametrize("stage", STAGES)
def test_weights_are_the_published_ones(stage: str) -> None:
    mixture = published(stage).mixture
    assert len(mixture) == PUBLISHED["posttrain_totals"][stage]["splits"]
    assert set(mixture) == set(splits_of(stage))
    for split, weight in mixture.items():
        assert weight == PUBLISHED["posttrain_weights"].get(split, 1.0)


def used(stage: str, mode: str = "") -> int:
    rows = splits_of(stage)
    return sum(
        kept_rows(split, rows[split].rows, weight)
        for split, weight in published(stage).mixture.items()
        if mode in ("", rows[split].mode)
    )


def test_rows_that_are_drawn_are_the_published_totals() -> None:
    totals = PUBLISHED["posttrain_totals"]
    for stage in STAGES:
        assert sum(row.rows for row in splits_of(stage).values()) == totals[stage]["rows"]
    for mode, rows_used in totals["sft"]["used"].items():
        assert abs(used("sft", mode) - rows_used) <= 2  # the sum's own rounding
    assert used("apo") == totals["apo"]["used"]
    assert used("apo") // totals["apo"]["global_batch"] == totals["apo"]["steps"]


@pytest.mark.parametrize("stage", STAGES)
def test_full_changes_nothing_of_the_recipe(stage: str) -> None:
    assert scaled(stage, "full") == published(stage)


@pytest.mark.parametrize("stage", STAGES)
def test_a_scale_keeps_weights_masks_packing_and_schedule(stage: str) -> None:
    before, after = (
        flatten(dataclasses.asdict(one)) for one in (published(stage), scaled(stage, "tiny"))
    )
    kept = ["lr_scheduler_type", "lr_scheduler_kwargs.min_lr_rate", "warmup_steps", "seed"]
    kept += ["max_grad_norm", "save_strategy", "save_steps", "weight_decay"]
    kept += (
        ["beta", "loss_type.0"] if stage == "apo" else ["packing_strategy", "assistant_only_loss"]
    )
    keys = ["stage", "trainer", "mixture_seed", *(f"trl.{key}" for key in kept)]
    keys += [f"mixture.{split}" for split in published(stage).mixture]
    assert {key: after[key] for key in keys} == {key: before[key] for key in keys}
    assert scaled(stage, "tiny").mixture == published(stage).mixture
    assert scaled(stage, "tiny").trl.max_steps > 0 and scaled(stage, "tiny").world_size == 1


def test_every_key_of_the_trl_section_is_one_of_trls() -> None:
    from trl import DPOConfig, SFTConfig

    for ours, theirs in ((SftTrl, SFTConfig), (DpoTrl, DPOConfig)):
        known = {field.name for field in dataclasses.fields(theirs)}
        assert {field.name for field in dataclasses.fields(ours)} <= known


MISTAKES = {
    "misspelt key": ("learning_rate: 2.0e-5", "learning_rat: 2.0e-5", "trl.learning_rat: unknown key; did you mean 'learning_rate'?"),
    "a key of another trainer": ("eos_token: <|im_end|>", "beta: 0.1", "trl.beta: unknown key"),
    "trainer": ("trainer: SFTTrainer", "trainer: SftTrainer", "did you mean 'SFTTrainer'?"),
    "weight above 1": ("s1k_1.1_think: 1.0", "s1k_1.1_think: 2.0", "mixture.s1k_1.1_think: 2.0: write at most 1"),
    "weight NaN": ("s1k_1.1_think: 1.0", "s1k_1.1_think: .nan", "mixture.s1k_1.1_think: nan: write a finite number"),
    "missing key": ("  seed: 42\n", "", "trl.seed: missing; add it"),
    "wrong type": ("max_length: 65536", "max_length: long", "trl.max_length: 'long': write a whole number"),
    "template": ("file: chat_template.jinja", "file: chat.jinja", "template.file: chat.jinja: no such file beside it"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_with_key_and_remedy(name: str, recipes: Path) -> None:
    old, new, message = MISTAKES[name]
    edit(recipes / "posttrain/sft.yaml", old, new)
    with pytest.raises(UserError) as error:
        run_of("sft", "full")
    assert message in str(error.value) and "sft.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_split_is_refused_with_the_nearest(recipes: Path) -> None:
    edit(recipes / "posttrain/sft.yaml", "s1k_1.1_think:", "s1k_1.2_think:")
    with pytest.raises(
        UserError, match=r"sft\.yaml: mixture\.s1k_1\.2_think: .*did you mean 's1k_1\.1_think'"
    ):
        run_of("sft")


def test_a_scale_may_not_change_the_mixture(recipes: Path) -> None:
    edit(
        recipes / "scales/tiny.yaml",
        "    sft:\n      trl:",
        "    sft:\n      mixture: {}\n      trl:",
    )
    with pytest.raises(UserError, match=r"posttrain\.stages\.sft\.mixture: no scale sets that"):
        run_of("sft")


def test_a_changed_template_is_another_recipe(recipes: Path) -> None:
    before = run_of("sft").recipe_values()
    file = recipes / "posttrain/chat_template.jinja"
    file.write_text(file.read_text() + "{#- later -#}")
    forget_recipes()
    assert run_of("sft").recipe_values() != before


def test_chats_are_another_recipe_once_their_table_changes(recipes: Path) -> None:
    small, full = load_scale("tiny"), load_scale("full")
    before = resolve("data-chats", small).recipe_values()
    edit(recipes / "posttrain/splits.yaml", "stand_in: everyday", "stand_in: facts")
    assert resolve("data-chats", small).recipe_values() != before
    of_the_hub = resolve("data-chats", full).recipe_values()["splits"]
    assert set(of_the_hub) == set(CONFIGS.values())


@pytest.mark.parametrize("stage", STAGES)
def test_full_without_gpus_names_the_command(stage: str) -> None:
    nodes = PUBLISHED["posttrain"][stage]["world_size"] // 8
    line = f"SCALE=full sbatch --nodes={nodes} launch/posttrain.slurm {stage}"
    with pytest.raises(UserError, match=re.escape(line)):
        refuse_without_processors(run_of(stage, "full"))


@pytest.mark.parametrize(
    ("nodes", "gpus", "expected"),
    [(8, 8, 8), (16, 4, 4), (8, 0, 8), (4, 8, "--nodes=8 launch")],
)
def test_nodes_make_up_the_world_or_the_line_that_does_is_named(
    nodes: int, gpus: int, expected: int | str
) -> None:
    run = run_of("sft", "full")
    assert run.world_size == 64
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
    assert configs["zero3"]["num_processes"] == published("sft").world_size
    assert configs["zero3"]["deepspeed_config"]["zero_stage"] == 3
    for name in ("cpu", "gpu"):
        assert (configs[name]["num_processes"], configs[name]["distributed_type"]) == (1, "NO")


def test_accelerate_reads_the_configurations() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    for file in (ROOT / "launch/accelerate").glob("*.yaml"):
        assert load_config_from_file(str(file)).num_processes >= 1


def test_stages_follow_each_other() -> None:
    pipeline = load_pipeline()
    starts = {stage: pipeline[stage].takes[-1] for stage in STAGES}
    assert starts == {"midtrain": "longctx-64k", "sft": "midtrain", "apo": "sft"}


@pytest.mark.parametrize("stage", STAGES)
def test_the_job_holds_what_the_engine_reads(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CACHE", str(tmp_path / "cache"))
    run = run_of(stage)
    chats, start = run.chats, run.start
    assert isinstance(chats, ChatsStage)
    chats.finish(folder="chats/1")
    start.finish(tokens=123)
    (tmp_path / "cache/chats/1/held_out").mkdir(parents=True)
    (tmp_path / "job").mkdir()
    run.job().write(tmp_path / "job")
    job = Job.read(tmp_path / "job")
    assert job.model == str(start.folder / "hf") and job.tokens_before == 123
    assert job.files.keys() == job.mixture.keys()
    config = CONFIGS[stage].lower()
    assert all(f"cache/chats/1/{config}/" in file for file in job.files.values())
    assert bool(job.template) == (stage != "apo")
    assert "date_string" not in job.template_defaults
    assert job.settings == ({} if stage == "midtrain" else {"date_string": "01 July 2025"})
    assert None not in job.trl.values()


def test_a_key_that_a_section_lacks_is_missing_in_the_file_with_the_section(tmp_path: Path) -> None:
    own = tmp_path / "adapters.yaml"
    own.write_text("extends: posttrain/sft.yaml\nlora: {rank: 4}\n")
    with pytest.raises(UserError, match=rf"^{re.escape(str(own))}: lora.alpha: missing; add it"):
        load_recipe(str(own))


def test_the_remedy_for_memory_is_one_of_the_layout() -> None:
    """GPU_GB does nothing where the layout is the recipe's."""
    run = run_of("sft", "full")
    assert "GPU_GB" not in run.memory_remedy()
    assert run.memory_remedy().startswith(("write true for recipes/", "lower recipes/"))
    fitted = replace(run, recipe=replace(run.recipe, layout="fit"))
    assert re.match(r"give a GPU_GB= below \d+: ", fitted.memory_remedy())


def test_a_fitted_layout_is_fitted_to_the_gpus_of_the_job() -> None:
    text = (ROOT / "launch/stage.sh").read_text()
    line = "export GPUS=${GPUS:-$((SLURM_NNODES * GPUS_A_NODE))}"
    assert text.index(line) < text.index("-m launch run")


def test_a_scale_file_of_ones_own_extends_a_scale_by_its_name(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("extends: tiny.yaml\n")
    assert load_scale(str(own)).name == "own"
