"""A recipe of the user's own: any file that extends a stage's, run under its own name."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, forget_recipes, metrics
from small_checkout import make_checkout, no_process_left
from test_walk import identities

from ground.errors import UserError
from launch.recipe.scale import load_scale
from launch.run.folder import StageRun
from launch.stages.data import DataStage
from launch.stages.pretrain import PretrainStage
from launch.stages.sources import OwnText
from launch.tools.submit import chain
from launch.walk import resolve

CACHE = os.environ.get("CACHE") or str(ROOT / ".cache")
SIZE = {
    "hidden_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 96,
}
MINE = {
    "extends": "pretrain/stage1.yaml",
    "mixture": {"dclm": 3.0, "finemath": 1.0},
    "nanotron": {"model": {"model_config": SIZE}, "tokens": {"train_steps": 7}},
}  # fmt: skip
Write = Callable[..., str]


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CACHE", str(tmp_path / "cache"))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a recipe outside of the repository; returns its path."""

    def write(values: object = MINE, name: str = "my.yaml") -> str:
        file = tmp_path / "elsewhere" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(yaml.safe_dump(values))
        forget_recipes()
        return str(file)

    return write


def mine(file: str, scale: str = "tiny") -> PretrainStage:
    run = resolve(file, load_scale(scale))
    assert isinstance(run, PretrainStage)
    return run


def inputs(run: StageRun) -> list[str]:
    return list(run.inputs)


def test_it_has_a_folder_a_data_stage_and_a_command_of_its_own(
    write: Write, tmp_path: Path
) -> None:
    run = mine(write())
    assert (run.stage, run.folder) == ("my", tmp_path / "runs/tiny/my")
    assert inputs(run) == ["tokenizer", "held-out", "data-my"]
    assert isinstance(run.data, DataStage) and set(run.data.recipe.sources) == {"dclm", "finemath"}
    assert run.data.folder == tmp_path / "runs/tiny/data-my"
    assert inputs(run.data) == ["tokenizer", "eval-texts"]
    assert run.recipe.mixture == MINE["mixture"]
    assert run.command == f"make run RECIPE={tmp_path / 'elsewhere/my.yaml'} SCALE=tiny"
    assert mine(write(MINE | {"stage": "other"})).stage == "other"


@pytest.mark.parametrize("scale", ["tiny", "full"])
def test_what_it_says_stands_at_any_scale_and_the_rest_is_the_stages_own(
    write: Write, scale: str
) -> None:
    tokens = {"train_steps": 4000}  # above the published warm-up
    layout = {"tp": 1}  # as a single key-value head needs at the full scale
    model = {"model": {"model_config": SIZE}}
    values = MINE | {"nanotron": {**model, "tokens": tokens, "parallelism": layout}}
    ours, stage = mine(write(values), scale).recipe, mine("pretrain-stage1", scale).recipe
    config, theirs = ours.nanotron.model.model_config, stage.nanotron.model.model_config
    assert {key: getattr(config, key) for key in SIZE} == SIZE
    assert ours.nanotron.tokens.train_steps == 4000
    assert config.num_hidden_layers == theirs.num_hidden_layers
    assert config.vocab_size == theirs.vocab_size and ours.device == stage.device
    assert ours.nanotron.tokens.sequence_length == stage.nanotron.tokens.sequence_length
    schedule = ours.nanotron.optimizer.learning_rate_scheduler
    assert schedule == stage.nanotron.optimizer.learning_rate_scheduler


@pytest.mark.parametrize("scale", ["tiny", "full"])
def test_no_published_stage_is_touched_by_it(write: Write, scale: str) -> None:
    before = identities(scale)
    file = write(MINE | {"nanotron": {"tokens": {"train_steps": 4000}}})
    run = mine(file, scale)
    assert identities(scale) == before
    published = {name: taken.identity for name, taken in run.inputs.items() if name in before}
    assert published == {name: before[name] for name in ("tokenizer", "held-out")}
    assert len({run.identity, run.data.identity, *before.values()}) == len(before) + 2


def test_without_a_mixture_it_takes_its_parents_data(write: Write) -> None:
    run = mine(write({key: MINE[key] for key in ("extends", "nanotron")}))
    assert inputs(run) == inputs(mine("pretrain-stage1"))
    assert run.data.identity == mine("pretrain-stage1").data.identity
    assert run.recipe.mixture == mine("pretrain-stage1").recipe.mixture


def test_its_identity_follows_its_values_not_its_place(write: Write, tmp_path: Path) -> None:
    first = mine(write())
    (tmp_path / "elsewhere").rename(tmp_path / "moved")
    forget_recipes()
    moved = mine(str(tmp_path / "moved/my.yaml"))
    assert (moved.identity, moved.data.identity) == (first.identity, first.data.identity)
    assert mine(write(MINE | {"mixture": {"dclm": 1.0}})).identity != first.identity


def test_text_of_ones_own_is_found_from_the_file_that_names_it(
    write: Write, tmp_path: Path
) -> None:
    text = tmp_path / "elsewhere" / "text"
    text.mkdir(parents=True)
    (text / "a.txt").write_text("One document.")
    first = write(
        MINE | {"sources": {"mine": {"path": "text"}}, "mixture": {"mine": 1.0, "dclm": 1.0}}
    )
    run = mine(first)
    assert inputs(run) == ["tokenizer", "held-out-my", "data-my"]
    source = run.data.recipe.sources["mine"]
    assert isinstance(source, OwnText) and Path(source.path).resolve() == text
    held_out = run.held_out.recipe.sources
    assert "mine" in held_out and set(held_out) > set(
        mine("pretrain-stage1").held_out.recipe.sources
    )
    # A recipe that extends it from another folder reads the same text.
    (tmp_path / "further").mkdir()
    second = tmp_path / "further" / "more.yaml"
    second.write_text(yaml.safe_dump({"extends": "../elsewhere/my.yaml"}))
    again = mine(str(second))
    assert again.stage == "more" and again.recipe.mixture == run.recipe.mixture
    assert again.data.identity == run.data.identity
    # New text is a new run.
    (text / "b.txt").write_text("Another one.")
    assert mine(first).data.identity != run.data.identity


def test_submitted_with_force_its_training_begins_again_too(write: Write) -> None:
    jobs = chain([mine(write())], "cpu", force=True)
    forced = {job.part: job.is_forced for job in jobs if job.run.stage == "my"}
    assert forced == {"prepare": True, "train": True, "score": False}


def test_every_kind_of_recipe_may_be_extended(write: Write) -> None:
    at = load_scale("tiny")
    chats = {"extends": "posttrain/sft.yaml", "trl": {"max_steps": 9}}
    sft = resolve(write(chats, "short-sft.yaml"), at)
    assert (sft.stage, sft.recipe.recipe.trl.max_steps) == ("short-sft", 9)
    assert inputs(sft) == ["tokenizer", "data-chats", "midtrain"]
    merge = resolve(write({"extends": "merge/merge.yaml", "out_dtype": "float32"}, "wide.yaml"), at)
    assert (merge.stage, inputs(merge)) == ("wide", ["soup", "longctx-64k"])
    scored = resolve(write({"extends": "eval/eval.yaml", "limit": 2}, "few.yaml"), at)
    assert (scored.stage, scored.recipe.recipe.limit) == ("few", 2)
    later = mine(write({"extends": "longctx/32k.yaml"}, "longer.yaml"))
    assert inputs(later) == ["tokenizer", "held-out", "data-longctx", "pretrain-stage3"]


def laid_over(*path: str, value: object) -> dict[str, object]:
    """MINE with one value changed."""
    values = json.loads(json.dumps(MINE))
    below = values
    for key in path[:-1]:
        below = below.setdefault(key, {})
    below[path[-1]] = value
    return values


MODEL = ("nanotron", "model", "model_config")
BAD: dict[str, tuple[dict[str, object], str]] = {
    "a wrong type": (laid_over(*MODEL, "hidden_size", value="48"), r"hidden_size: '48': write a whole number"),
    "a misspelt key": (laid_over(*MODEL, "hiden_size", value=48), "hiden_size: unknown key; did you mean 'hidden_size'"),
    "heads that do not divide": (laid_over(*MODEL, "num_attention_heads", value=5), "write a multiple of 10: num_attention_heads, 5"),
    "no section": (laid_over("nanotron", value=3), r"nanotron: 3: write a section"),
    "a misspelt section": (laid_over("nanotorn", value={}), "nanotorn: unknown key; did you mean 'nanotron'"),
    "an unknown source": (laid_over("mixture", "dlcm", value=1.0), r"mixture\.dlcm: unknown source; did you mean 'dclm'"),
    "a weight of 0": (laid_over("mixture", "dclm", value=0), r"mixture\.dclm: 0: write a number above 0"),
    "no text there": (laid_over("sources", "x", value={"path": "none"}) | {"mixture": {"x": 1.0}}, r"sources\.x\.path: .*none: no such file"),
    "a parent that is not there": (laid_over("extends", value="pretrain/stage9.yaml"), r"extends: pretrain/stage9\.yaml: no such file"),
    "a parent that is no recipe": (laid_over("extends", value="sources.yaml"), "extends: it reaches no stage's recipe"),
    "a stage's name": (laid_over("stage", value="sft"), r"stage: sft: a stage of recipes/pipeline\.yaml has the name sft; write another"),
    "a name whose data stage is another's": (laid_over("stage", value="longctx"), "stage: longctx: "),
    "a name whose data stage is published": (laid_over("stage", value="stage1"), "stage: stage1: .* has the name data-stage1"),
    "a tool's folder": (laid_over("stage", value="evaluation"), "stage: evaluation: a tool keeps its results"),
    "the name of another recipe's text": (laid_over("stage", value="data-x"), "stage: data-x: text that is made for a recipe"),
    "a path for a name": (laid_over("stage", value="../x"), r"stage: '\.\./x': write letters"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_one_line_that_names_the_file(write: Write, name: str) -> None:
    values, words = BAD[name]
    file = write(values)
    with pytest.raises(UserError, match=words) as caught:
        resolve(file, load_scale("tiny"))
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)


def test_a_size_that_the_layout_of_a_scale_cannot_cut_is_told_there_alone(write: Write) -> None:
    file = write(laid_over("nanotron", "tokens", "train_steps", value=4000))
    mine(file, "tiny")
    with pytest.raises(
        UserError, match=r"parallelism\.tp: 2: write a divisor of .*heads, 1"
    ) as caught:
        mine(file, "full")
    assert str(caught.value).startswith(f"{file}: together with recipes/pretrain/stage1.yaml: ")


@pytest.mark.slow
def test_it_runs_under_its_own_name_and_leaves_the_published_stages_finished(
    write: Write, tmp_path: Path
) -> None:
    checkout = make_checkout(tmp_path / "checkout")
    text = tmp_path / "elsewhere" / "text.txt"
    text.parent.mkdir()
    text.write_text("\n\n".join(f"Sentence {n} of my own text. " * 40 for n in range(200)))
    mixture = {"mine": 1.0, "dclm": 1.0}
    file = write(MINE | {"sources": {"mine": {"path": "text.txt"}}, "mixture": mixture})
    with no_process_left(checkout):
        checkout.done("run", "data-stage1")
        before = (checkout.runs / "data-stage1/manifest.json").read_bytes()
        checkout.done("run", file)
        assert "my: up to date, runs/small/my\n" in checkout.done("run", file)
        assert "data-stage1: up to date" in checkout.done("run", "data-stage1")
    assert (checkout.runs / "data-stage1/manifest.json").read_bytes() == before
    assert [line["step"] for line in metrics(checkout.runs / "my")] == list(range(1, 8))
    config = json.loads((checkout.runs / "my/hf/config.json").read_text())
    assert {key: config[key] for key in SIZE} == SIZE
    seen = json.loads((checkout.runs / "my/manifest.json").read_text())["tokens_per_source"]
    assert seen.keys() == mixture.keys() and abs(seen["mine"] - seen["dclm"]) <= 64
    assert not (checkout.runs / "pretrain-stage1").exists()
