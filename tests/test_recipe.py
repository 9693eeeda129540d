"""A recipe composes as it says, and each mistake in one is a line with file, key and remedy."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, edit
from launch.errors import UserError
from launch.scale import changes

from launch.recipe import canonical, load_pipeline, load_recipe, load_scale, load_sources
from launch.recipe import load_standins as load_standins
from launch.stages import resolve

STAGE1, STAGE2, SCALE = "pretrain/stage1.yaml", "pretrain/stage2.yaml", "scales/tiny.yaml"


def message(load: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        load()
    text = str(caught.value)
    assert "\n" not in text
    return text


def stage1() -> object:
    return load_recipe("pretrain-stage1")


def stage2() -> object:
    return load_recipe("pretrain-stage2")


@pytest.mark.parametrize(
    "file", sorted((ROOT / "recipes").glob("*/*.yaml")), ids=lambda file: file.stem
)
def test_every_recipe_file_loads(file: Path) -> None:
    if file.parent.name == "scales":
        assert load_scale(file.stem)["scale"] == file.stem
    elif "\nstage: pretrain" in file.read_text():
        assert load_recipe(str(file)).file == file


def test_the_tables_beside_the_recipes_load() -> None:
    assert set(load_pipeline()) >= {"tokenizer", "data-stage1", "pretrain-stage3"}
    assert len(load_sources()) == 115
    assert {row["stand_in"] for row in load_sources().values() if row["stand_in"]} <= set(
        load_standins()
    )
    assert canonical("mwiki") == "multilingual_wiki"


def test_a_mixture_replaces_its_parents_and_the_rest_is_merged_key_by_key(recipes: Path) -> None:
    (recipes / STAGE2).write_text(
        "stage: pretrain-stage2\nextends: stage1.yaml\nmixture:\n  dclm: 1\n"
        "nanotron:\n  tokens:\n    train_steps: 7\n"
    )
    parent, child = load_recipe("pretrain-stage1"), load_recipe("pretrain-stage2")
    assert child.mixture == {"dclm": 1.0}
    expected = parent.nanotron | {"tokens": parent.nanotron["tokens"] | {"train_steps": 7}}
    assert child.nanotron == expected


def test_without_a_mixture_of_its_own_a_recipe_has_its_parents(recipes: Path) -> None:
    (recipes / STAGE2).write_text("stage: pretrain-stage2\nextends: ../pretrain/stage1.yaml\n")
    assert load_recipe("pretrain-stage2").mixture == load_recipe("pretrain-stage1").mixture


@pytest.mark.parametrize(
    "line", ["stage: pretrain-stage1  # the first", 'stage: "pretrain-stage1"']
)
def test_a_stage_is_found_by_its_yaml_value(recipes: Path, line: str) -> None:
    edit(recipes / STAGE1, "stage: pretrain-stage1", line)
    assert load_recipe("pretrain-stage1").stage == "pretrain-stage1"


WEIGHTS = {
    "-1": "weight -1 must be above 0; remove the line",
    "0": "weight 0 must be above 0; remove the line",
    ".nan": "weight nan must be above 0",
    ".inf": "weight inf must be above 0",
    "much": "'much': write a number",
    '"0.3"': "'0.3': write a number",
    "true": "True: write a number",
    "[1]": "[1]: write a number",
    "": "empty: write a number",
}


@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_bad_weight_is_named_with_its_source(recipes: Path, weight: str) -> None:
    edit(recipes / STAGE1, "dclm: 0.37 ", f"dclm: {weight} ")
    text = message(stage1)
    assert text.startswith(f"recipes/{STAGE1}: mixture.dclm: {WEIGHTS[weight]}")


# (file, old, new, what the line must say)
MISTAKES: dict[str, tuple[str, str, str, str]] = {
    "unknown source": (STAGE1, "dclm:", "dclmm:", "mixture.dclmm: unknown source; did you mean 'dclm'?"),
    "one source twice": (STAGE1, "  dclm:", "  fw2-hq-fra_Latn: 0.1\n  dclm:", "the same source as"),
    "no such section": (STAGE1, "nanotron:\n", "nanotorn:\n", "nanotorn: unknown key; did you mean 'nanotron'?"),
    "misspelt section": (STAGE1, "  tokens:\n", "  token:\n", "nanotron.token: unknown key; did you mean 'tokens'?"),
    "misspelt key": (STAGE1, "train_steps: 3", "train_step: 3", "nanotron.tokens.train_step: unknown key; did you mean 'train_steps'?"),
    "misspelt deep key": (STAGE1, "rope_theta:", "rope_thet:", "nanotron.model.model_config.rope_thet: unknown key; did you mean 'rope_theta'?"),
    "misspelt key in a list": (STAGE1, "num_loading_workers:", "num_loading_worker:", "nanotron.data_stages.0.data.num_loading_worker: unknown key; did you mean 'num_loading_workers'?"),
    "text for a number": (STAGE1, "hidden_size: 2048", "hidden_size: big", "nanotron.model.model_config.hidden_size: 'big': write a whole number"),
    "fraction for a whole number": (STAGE1, "hidden_size: 2048", "hidden_size: 20.5", "hidden_size: 20.5: write a whole number"),
    "nought steps": (STAGE1, "train_steps: 3450000", "train_steps: 0", "nanotron.tokens.train_steps: 0: write at least 1"),
    "text for true": (STAGE1, "tie_word_embeddings: true", "tie_word_embeddings: perhaps", "'perhaps': write true or false"),
    "number for a section": (STAGE1, "    init_method:\n      std: 0.02", "    init_method: 3", "nanotron.model.init_method: 3: write a section"),
    "mapping for a list": (STAGE1, "      - .*token_embedding.*", "      a: b", "weight_decay_exclude_named_params: {'a': 'b'}: write a list"),
    "empty value": (STAGE1, "train_steps: 3450000", "train_steps:", "nanotron.tokens.train_steps: empty: write a whole number"),
    "missing key": (STAGE1, "      rope_theta: 50000.0", "      #", "nanotron.model.model_config.rope_theta: missing; add it"),
    "interpolation of nothing": (STAGE1, "project: smollm3-3B-final", "project: ${nope}", "nanotron.general.project: Interpolation key 'nope' not found"),
    "broken YAML": (STAGE1, "  dclm: 0.37", "  dclm: [0.37", "stage1.yaml line 12: not valid YAML"),
    "repeated key": (STAGE1, "  dclm: 0.37", "  dclm: 0.37\n  dclm: 0.1", "stage1.yaml line 12: not valid YAML: found duplicate key dclm"),
    "extends itself": (STAGE1, "stage: pretrain-stage1", "stage: pretrain-stage1\nextends: ../pretrain/stage1.yaml", "extends: ../pretrain/stage1.yaml: it extends this file in turn; drop one"),
    "extends in a circle": (STAGE1, "stage: pretrain-stage1", "stage: pretrain-stage1\nextends: stage2.yaml", "stage2.yaml: extends: stage1.yaml: it extends this file in turn; drop one"),
    "two data stages": (STAGE1, "  data_stages:", "  data_stages: []\n#", "nanotron.data_stages: write one entry"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_recipe_is_one_line_with_file_key_and_remedy(
    recipes: Path, name: str
) -> None:
    file, old, new, said = MISTAKES[name]
    if name == "two data stages":  # the section is the last of the file
        text = (recipes / file).read_text()
        (recipes / file).write_text(text[: text.index(old)] + "  data_stages: []\n")
    else:
        edit(recipes / file, old, new)
    text = message(stage1)
    assert text.startswith("recipes/pretrain/stage") and said in text


def test_an_inherited_mistake_is_said_of_the_file_in_which_it_stands(recipes: Path) -> None:
    edit(recipes / STAGE1, "rope_theta:", "rope_thet:")
    assert message(stage2).startswith(f"recipes/{STAGE1}: nanotron.model.model_config.rope_thet")


@pytest.mark.parametrize("name", ["stage9.yaml", "", ".."])
def test_what_cannot_be_extended_is_said_of_the_file_that_asks(recipes: Path, name: str) -> None:
    edit(recipes / STAGE2, "extends: stage1.yaml", f"extends: {name}")
    text = message(stage2)
    assert text.startswith(f"recipes/{STAGE2}: extends: {name or 'empty'}: no such file; write a")


@pytest.mark.parametrize("mixture", ["mixture: {}", "mixture:"])
def test_an_empty_mixture_is_refused(recipes: Path, mixture: str) -> None:
    (recipes / STAGE2).write_text(f"stage: pretrain-stage2\nextends: stage1.yaml\n{mixture}\n")
    assert message(stage2).startswith(f"recipes/{STAGE2}: mixture: empty:")


@pytest.mark.parametrize("content", ["", "word", "- a list\n", "\x00"])
def test_a_file_that_is_no_recipe_is_refused(recipes: Path, content: str) -> None:
    (recipes / STAGE1).write_text(content)
    assert f"recipes/{STAGE1}" in message(lambda: load_recipe(str(recipes / STAGE1)))


def test_a_missing_file_is_named(recipes: Path) -> None:
    assert message(lambda: load_recipe("nowhere.yaml")).endswith("nowhere.yaml: no such file")


def test_a_stage_has_exactly_one_recipe(recipes: Path) -> None:
    (recipes / "pretrain/mine.yaml").write_text("stage: pretrain-stage1\nextends: stage1.yaml\n")
    both = message(stage1)
    assert "recipes/pretrain/mine.yaml, recipes/pretrain/stage1.yaml; keep one" in both
    (recipes / "pretrain/mine.yaml").unlink()
    (recipes / STAGE1).unlink()
    assert "no file says `stage: pretrain-stage1`" in message(stage1)


def test_a_recipe_elsewhere_is_not_swapped_for_the_one_in_its_place(
    recipes: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text((recipes / STAGE1).read_text())
    assert "stage1.yaml is the recipe of pretrain-stage1" in message(
        lambda: resolve(str(mine), "tiny")
    )
    assert resolve(str(recipes / STAGE1), "tiny").stage == "pretrain-stage1"


@pytest.mark.parametrize("load", [load_recipe, lambda stage: resolve(stage, "tiny")])
def test_a_misspelt_stage_gets_the_nearest_name(load: Callable[[str], object]) -> None:
    text = message(lambda: load("pretrain-stag1"))
    assert text.startswith("unknown stage 'pretrain-stag1'; did you mean 'pretrain-stage1'?")


def test_an_unknown_scale_gets_the_known_ones() -> None:
    text = message(lambda: load_scale("middling"))
    assert text.startswith("unknown scale SCALE=middling; known: ") and "full" in text


SCALE_MISTAKES = {
    "misspelt key": ("origin:", "orign:", "orign: unknown key; did you mean 'origin'?"),
    "no such origin": ("origin: standin", "origin: moon", "origin: moon: known: hub, standin"),
    "misspelt model key": ("hidden_size:", "hiden_size:", "hiden_size: unknown key; did you mean"),
    "text for a number": ("hidden_size: 64", "hidden_size: big", "'big': write a whole number"),
    "nought": ("windows_divided_by: 16", "windows_divided_by: 0", "0: write at least 1"),
    "no steps": ("steps_divided_by: 5900", "steps_divided_by: 99999999", "train_steps: 0: write"),
    "no window": ("windows_divided_by: 16", "windows_divided_by: 9999", "embeddings: 0: write"),
    "no reason": ("  nanotron.logging:", "  nanotron.log:", "why: no reason for nanotron.logging"),
    "unknown stage": (
        "  longctx-32k:",
        "  longctx-33k:",
        "train_steps.longctx-33k: unknown stage;",
    ),
}


@pytest.mark.parametrize("name", SCALE_MISTAKES)
def test_a_mistake_in_a_scale_is_said_of_the_scale_file(recipes: Path, name: str) -> None:
    old, new, said = SCALE_MISTAKES[name]
    edit(recipes / SCALE, old, new)
    text = message(lambda: changes(load_recipe("pretrain-stage1"), load_scale("tiny")))
    assert text.startswith(f"recipes/{SCALE}: ") and said in text


TABLE_MISTAKES = {
    "takes": ("pipeline.yaml", "[tokenizer, data-stage1]", "[tokenizr]", "did you mean 'tokenizer'?"),
    "takes itself": ("pipeline.yaml", "[tokenizer, data-stage1]", "[pretrain-stage1]", "takes:"),
    "engine": ("pipeline.yaml", "engine: tokenizer", "engine: tokeniser", "did you mean 'tokenizer'?"),
    "mixture_of": ("pipeline.yaml", "mixture_of: [pretrain-stage1]", "mixture_of: [x1]", "mixture_of: x1:"),
    "stages": ("pipeline.yaml", "stages:", "stage:", "stages: missing"),
    "sources": ("sources.yaml", "sources:\n", "source:\n", "sources: missing"),
    "source key": ("sources.yaml", "hub_id: mlf", "hubid: mlf", "sources.dclm.hubid: unknown key; did"),
    "same_as": ("sources.yaml", "same_as: fw2-fra", "same_as: fw2-frx", "did you mean 'fw2-fra'?"),
    "empty row": ("sources.yaml", "{same_as: fw2-fra}", "", "sources.fw2-hq-fra_Latn: empty"),
    "stand-ins": ("standins.yaml", "standins:\n", "standin:\n", "standins: missing"),
    "stand-in": ("sources.yaml", "stand_in: web-narratives", "stand_in: web-n", "web-n: "),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE_MISTAKES)
def test_a_mistake_in_a_table_is_said_of_its_file(recipes: Path, name: str) -> None:
    file, old, new, said = TABLE_MISTAKES[name]
    edit(recipes / file, old, new)
    text = message(lambda: resolve("pretrain-stage1", "tiny"))
    assert text.startswith(f"recipes/{file}: ") and said in text
