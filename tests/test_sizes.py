"""The sizes between a laptop's and the published one: what each scale file of them must keep."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import forget_recipes
from hypothesis import given
from hypothesis import strategies as st
from test_scale import STAGES, scaled, schedule, steps, with_values

from ground.errors import UserError
from launch.recipe.scale import Scale, load_scale
from launch.recipe.tables import load_pipeline
from launch.run.cluster import TrainedStage
from launch.run.folder import StageRun
from launch.stages.chats import ChatsStage
from launch.stages.data import DataStage
from launch.stages.pretrain import PretrainStage
from launch.tools.ablation import ablation_runs
from launch.tools.diff import stage_changes
from launch.walk import resolve
from nanotron_ext.config import SmolLM3Config
from nanotron_ext.weight_table import weights_of

SIZES = ("60m", "135m", "360m", "1b")
PRETRAINED = (*STAGES, "longctx-32k", "longctx-64k")
WINDOWS = {"60m": 2048, "135m": 2048, "360m": 2048, "1b": 4096}


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CACHE", str(tmp_path / "cache"))


def pretrained(stage: str, at: Scale) -> PretrainStage:
    run = resolve(stage, at)
    assert isinstance(run, PretrainStage)
    return run


def parameters(at: Scale) -> int:
    """Of the model, its table of embeddings included."""
    config = pretrained("pretrain-stage1", at).recipe.nanotron.model.model_config
    sizes = {key: getattr(config, key) for key in SmolLM3Config().__dict__ if hasattr(config, key)}
    return sum(math.prod(weight.shape) for weight in weights_of(SmolLM3Config(**sizes)))


@pytest.mark.parametrize("size", SIZES)
def test_a_size_has_the_parameters_of_its_name(size: str) -> None:
    unit = {"m": 10**6, "b": 10**9}[size[-1]]
    assert parameters(load_scale(size)) == pytest.approx(int(size[:-1]) * unit, rel=0.05)


@pytest.mark.parametrize("size", SIZES)
def test_the_tokens_are_20_to_100_a_parameter(size: str) -> None:
    at = load_scale(size)
    assert 19 <= at.values.tokens / parameters(at) <= 101


@pytest.mark.parametrize("origin", ["hub", "standin"])
@pytest.mark.parametrize("size", SIZES)
def test_every_stage_resolves_is_accepted_and_says_why_it_differs(size: str, origin: str) -> None:
    at = load_scale(size, origin=origin)
    for stage, row in load_pipeline().items():
        run = resolve(stage, at)
        if isinstance(run, TrainedStage):
            run.refuse_recipe()
        else:
            run.refuse()
        if row.engine != "report":
            assert all(change.why for change in stage_changes(stage, at))
    for name in ("nope", "theta"):
        for runs in ablation_runs(name, at).values():
            runs[0].refuse_recipe()


@pytest.mark.parametrize("origin", ["hub", "standin"])
@pytest.mark.parametrize("size", SIZES)
def test_every_stage_has_the_batch_and_all_of_them_the_tokens(size: str, origin: str) -> None:
    at = load_scale(size, origin=origin)
    runs = {stage: pretrained(stage, at) for stage in PRETRAINED}
    batch = at.values.batch_tokens
    for run in runs.values():
        nanotron = run.recipe.nanotron
        assert nanotron.windows_a_step * nanotron.tokens.sequence_length == batch
    assert abs(runs[STAGES[-1]].steps * batch - at.values.tokens) <= batch
    windows = [run.window for run in runs.values()]
    assert windows == [WINDOWS[size] * times for times in (1, 1, 1, 8, 16)]


@pytest.mark.parametrize("size", SIZES)
def test_the_3b_s_heads_and_layers_are_kept(size: str) -> None:
    model = pretrained("pretrain-stage1", load_scale(size)).recipe.nanotron.model
    config = model.model_config
    assert config.num_attention_heads == 4 * config.num_key_value_heads
    assert config.hidden_size // config.num_attention_heads in (64, 128)
    assert config.num_hidden_layers % config.no_rope_layer == 0 and config.no_rope_layer == 4
    assert config.tie_word_embeddings and config.intermediate_size % 128 == 0
    assert 32768 <= config.vocab_size <= 65536 and config.vocab_size % 128 == 0
    # SmolLM-135M's rule; the 3B's own value at its width.
    std = 0.02 if config.hidden_size == 2048 else 1 / math.sqrt(config.hidden_size)
    assert model.init_method.std == pytest.approx(std, rel=0.01)


@pytest.mark.parametrize("size", SIZES)
def test_post_training_keeps_its_batch(size: str) -> None:
    for stage, batch in {"midtrain": 16 * 8192, "sft": 16 * 8192, "apo": 32 * 4096}.items():
        recipe: Any = resolve(stage, load_scale(size)).recipe
        trl, processes = recipe.recipe.trl, recipe.recipe.world_size
        rows = processes * trl.per_device_train_batch_size * trl.gradient_accumulation_steps
        assert rows * trl.max_length == batch
        window = pretrained("longctx-64k", load_scale(size)).window
        assert trl.max_length <= window


@given(steps_of_all=st.integers(20, 5_000_000), batch=st.sampled_from([65536, 262144, 2359296]))
def test_tokens_give_the_published_schedule_at_any_length(steps_of_all: int, batch: int) -> None:
    at = with_values(
        load_scale("full"),
        tokens=steps_of_all * batch,
        batch_tokens=batch,
        minimum_warmup_share=0.01,
    )
    recipes = [scaled(stage, at) for stage in STAGES]
    ends, lr = [steps(recipe) for recipe in recipes], schedule(recipes[0])
    assert all(schedule(recipe) == lr for recipe in recipes)
    assert ends[-1] == steps_of_all
    for end, published in zip(ends, (3450, 4198, 4720), strict=True):
        assert abs(end - steps_of_all * published / 4720) <= 0.5
    assert lr.lr_warmup_steps == round(0.01 * 4720001 / 4720000 * steps_of_all)
    # Published: one step after stage 2; three values are rounded.
    assert abs(lr.lr_decay_starting_step - ends[1]) <= 2
    assert abs(lr.lr_decay_starting_step + lr.lr_decay_steps - ends[2]) <= 2


@pytest.mark.parametrize("stage", PRETRAINED)
@pytest.mark.parametrize("size", SIZES)
def test_every_stage_fits_one_card_and_any_number_of_them_has_the_same_steps(
    size: str, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPU_GB", "40" if size == "1b" else "24")
    steps_of_all = set()
    for count in (1, 2, 4, 8):
        monkeypatch.setenv("GPUS", str(count))
        run = pretrained(stage, load_scale(size))
        run.refuse_recipe()  # where nothing fits
        nanotron = run.recipe.nanotron
        assert nanotron.parallelism.world_size == count
        steps_of_all.add((run.steps, nanotron.windows_a_step, run.identity))
    assert len(steps_of_all) == 1


def write_scale(folder: Path, **values: Any) -> str:
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump({"extends": "scales/60m.yaml", **values}))
    forget_recipes()
    return str(file)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "both": ({"steps_divided_by": 100}, r"60m\.yaml: tokens: 1200000000: drop it or steps_divided_by, 100: "),
    "no batch": ({"batch_tokens": 0}, r"batch_tokens: 0: say how many tokens a step has"),
    "odd batch": ({"batch_tokens": 100_000}, r"batch_tokens: 100000: write a multiple of 2048, the"),
    "long window": ({"batch_tokens": 16384}, r"batch_tokens: 16384: write a multiple of 32768, the "
                    r"window of longctx-64k here"),
    "all warm-up": ({"minimum_warmup_share": 1.0}, r"minimum_warmup_share: 1.0: .* has "),
    "origin twice": ({"standin": {"origin": "hub"}}, r"standin\.origin: hub: drop it, the file"),
    "config": ({"posttrain": {"chats": {"hub_share": {"STF": 0.1}}}},
               r"posttrain\.chats\.hub_share\.STF: no config; did you mean 'SFT'\?"),
    "share": ({"posttrain": {"chats": {"hub_share": {"SFT": 2}}}},
              r"posttrain\.chats\.hub_share\.SFT: 2: write at most 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_together_is_one_line(name: str, tmp_path: Path) -> None:
    values, line = REFUSED[name]
    with pytest.raises(UserError, match=line) as error:
        resolve("report", load_scale(write_scale(tmp_path, **values)))
    assert "\n" not in str(error.value)


def test_origin_lays_the_file_s_own_section_over_it_and_names_its_runs(tmp_path: Path) -> None:
    hub, standin = load_scale("60m"), load_scale("60m", origin="standin")
    assert hub.values.origin == "hub" and standin.values.origin == "standin"
    assert (hub.name, hub.arguments) == ("60m", "SCALE=60m")
    assert (standin.name, standin.arguments) == ("60m-standin", "SCALE=60m ORIGIN=standin")
    assert standin.values.held_out.fraction == hub.values.standin["held_out"]["fraction"]  # type: ignore[index]
    assert load_scale("60m", origin="hub").name == "60m"  # what the file says anyway
    assert load_scale("tiny", origin="standin").name == "tiny"
    assert load_scale("tiny", origin="hub").arguments == "SCALE=tiny ORIGIN=hub"
    both = load_scale("60m", str(tmp_path), "standin")
    assert both.name == f"60m-standin-{tmp_path.name}"
    assert resolve("sft", standin).folder.parent.name == "60m-standin"
    own = load_scale(write_scale(tmp_path, origin="standin", standin={"tokens": 10 * 262144}))
    assert own.values.tokens == 10 * 262144 and own.values.fill_windows


def test_a_wrong_origin_or_a_text_of_its_name_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^ORIGIN=standim: unknown; did you mean 'standin'\?$"):
        load_scale("60m", origin="standim")
    with pytest.raises(UserError, match=r"chats\.rows: 0: write at least 1 where origin is stand"):
        load_scale("full", origin="standin")
    (tmp_path / "standin").mkdir()
    with pytest.raises(
        UserError, match=r"^TEXT=.*: other runs have names that end in that; rename"
    ):
        load_scale("60m", str(tmp_path / "standin"))


# ---- text in proportion to the tokens (of sources: test_source_budget.py)


def test_chats_are_read_in_proportion_to_their_published_rows() -> None:
    run: StageRun = resolve("data-chats", load_scale("60m"))
    assert isinstance(run, ChatsStage)
    most: dict[str, int] = run.recipe_values()["most_rows"]
    assert most["OpenThoughts3_1.2M"] == 1136  # a thousandth of 1,135,104, rounded up
    assert most["s1k_1.1_think"] == 84  # a tenth of 835
    assert "most_rows" not in resolve("data-chats", load_scale("full")).recipe_values()


def test_stand_ins_fill_the_longest_window(monkeypatch: pytest.MonkeyPatch) -> None:
    run = resolve("data-longctx", load_scale("60m", origin="standin"))
    assert isinstance(run, DataStage) and run.recipe.least_tokens == 32_769
    assert run.recipe_values()["least_tokens"] == 32_769
    tiny = resolve("data-longctx", load_scale("tiny"))
    assert "least_tokens" not in tiny.recipe_values()
