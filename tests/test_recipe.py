"""A recipe composes as it says, and each mistake in one is a line with file, key and remedy."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, edit, forget_recipes

from ground.errors import UserError
from launch.recipe.book import Loaded, canonical, load_recipe
from launch.recipe.changes import changes
from launch.recipe.evaluation import (
    load_long_context,
    load_peers,
    load_published,
    load_ruler,
    load_suite,
)  # fmt: skip
from launch.recipe.pretrain import PretrainRecipe
from launch.recipe.scale import Scale, load_scale
from launch.recipe.tables import (
    load_ablations,
    load_pipeline,
    load_sources,
    load_splits,
    load_standins,
    load_synthetic,
    stage_of_file,
)
from launch.walk import resolve

STAGE1, STAGE2, SCALE = "pretrain/stage1.yaml", "pretrain/stage2.yaml", "scales/tiny.yaml"


def message(load: Callable[[], object]) -> str:
    forget_recipes()
    with pytest.raises(UserError) as caught:
        load()
    text = str(caught.value)
    assert "\n" not in text
    return text


def stage1() -> PretrainRecipe:
    loaded: Loaded[PretrainRecipe] = load_recipe("pretrain-stage1")
    return loaded.recipe


def stage2() -> PretrainRecipe:
    loaded: Loaded[PretrainRecipe] = load_recipe("pretrain-stage2")
    return loaded.recipe


TABLES: dict[str, Callable[[], object]] = {
    "pipeline.yaml": load_pipeline,
    "sources.yaml": load_sources,
    "standins.yaml": load_standins,
    "ablations.yaml": load_ablations,
    "posttrain/splits.yaml": load_splits,
    "posttrain/synthetic.yaml": load_synthetic,
    "eval/published.yaml": load_published,
    "eval/peers.yaml": load_peers,
    "eval/longctx.yaml": load_long_context,
    "eval/ruler.yaml": load_ruler,
}


@pytest.mark.parametrize(
    "name",
    [str(f.relative_to(ROOT / "recipes")) for f in sorted((ROOT / "recipes").rglob("*.yaml"))],
)
def test_every_recipe_file_loads(name: str) -> None:
    file = ROOT / "recipes" / name
    if name in TABLES:
        assert TABLES[name]()
    elif file.parent.name == "scales":
        assert load_scale(file.stem).name == file.stem
    elif stage := stage_of_file(file):
        loaded = load_recipe(str(file))
        assert loaded.file == file and loaded.recipe.stage == loaded.stage == stage
    else:
        assert load_suite(file.stem).rows


def test_the_tables_beside_the_recipes_load() -> None:
    assert set(load_pipeline()) >= {"tokenizer", "data-stage1", "pretrain-stage3"}
    assert len(load_sources()) == 115 + 7  # those that replace what was never released
    stand_ins = {row.stand_in for row in load_sources().values() if row.stand_in}
    assert stand_ins <= set(load_standins())
    assert canonical("mwiki", load_sources()) == "multilingual_wiki"


def test_a_mixture_replaces_its_parents_and_the_rest_is_merged_key_by_key(recipes: Path) -> None:
    (recipes / STAGE2).write_text(
        "stage: pretrain-stage2\nextends: stage1.yaml\nmixture:\n  dclm: 1\n"
        "nanotron:\n  tokens:\n    train_steps: 7000\n"
    )
    parent, child = stage1(), stage2()
    assert child.mixture == {"dclm": 1.0}
    tokens = replace(parent.nanotron.tokens, train_steps=7000)
    assert child.nanotron == replace(parent.nanotron, tokens=tokens)


def test_without_a_mixture_of_its_own_a_recipe_has_its_parents(recipes: Path) -> None:
    (recipes / STAGE2).write_text("stage: pretrain-stage2\nextends: ../pretrain/stage1.yaml\n")
    assert stage2().mixture == stage1().mixture


@pytest.mark.parametrize(
    "line", ["stage: pretrain-stage1  # the first", 'stage: "pretrain-stage1"']
)
def test_a_stage_is_found_by_its_yaml_value(recipes: Path, line: str) -> None:
    edit(recipes / STAGE1, "stage: pretrain-stage1", line)
    assert stage1().stage == "pretrain-stage1"


WEIGHTS = {
    "-1": "-1: write a number above 0",
    "0": "0: write a number above 0",
    ".nan": "nan: write a finite number",
    ".inf": "inf: write a finite number",
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
    "broken YAML": (STAGE1, "  dclm: 0.37", "  dclm: [0.37", "stage1.yaml line 12: not valid YAML"),
    "repeated key": (STAGE1, "  dclm: 0.37", "  dclm: 0.37\n  dclm: 0.1", "stage1.yaml line 12: not valid YAML: key 'dclm' stands twice"),
    "extends itself": (STAGE1, "stage: pretrain-stage1", "stage: pretrain-stage1\nextends: ../pretrain/stage1.yaml", "extends: ../pretrain/stage1.yaml: it extends this file in turn; drop one"),
    "extends in a circle": (STAGE1, "stage: pretrain-stage1", "stage: pretrain-stage1\nextends: stage2.yaml", "stage2.yaml: extends: stage1.yaml: it extends this file in turn; drop one"),
    "two data stages": (STAGE1, "  data_stages:", "  data_stages: []\n#", "nanotron.data_stages: 0 entries: write one entry"),
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


def test_a_stage_has_the_recipe_that_the_pipeline_names(recipes: Path) -> None:
    (recipes / "pretrain/mine.yaml").write_text("stage: pretrain-stage1\nextends: stage1.yaml\n")
    assert stage1().stage == "pretrain-stage1"  # a file beside it is nobody's until it is run
    edit(recipes / "pipeline.yaml", "recipe: pretrain/stage1.yaml", "recipe: pretrain/stage9.yaml")
    text = message(stage1)
    assert text.startswith("recipes/pipeline.yaml: stages.pretrain-stage1.recipe: ")
    assert "pretrain/stage9.yaml: no such file" in text
    edit(recipes / "pipeline.yaml", "recipe: pretrain/stage9.yaml", "#")
    text = message(stage1)
    assert text.startswith("recipes/pipeline.yaml: stages.pretrain-stage1.recipe: missing")


def test_two_stages_may_not_share_a_recipe(recipes: Path) -> None:
    edit(recipes / "pipeline.yaml", "recipe: pretrain/stage2.yaml", "recipe: pretrain/stage1.yaml")
    text = message(lambda: resolve("pretrain-stage2", load_scale("tiny")))
    assert text.startswith("recipes/pipeline.yaml: stages.pretrain-stage2.recipe: ")
    assert "pretrain-stage1" in text


def test_a_recipe_of_ones_own_has_a_name_of_its_own(recipes: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("stage: pretrain-stage1\nextends: pretrain/stage1.yaml\n")
    text = message(lambda: resolve(str(mine), load_scale("tiny")))
    assert "mine.yaml: stage: pretrain-stage1: a stage of recipes/pipeline.yaml has" in text
    mine.write_text((recipes / STAGE1).read_text())
    assert "mine.yaml: extends: it reaches no stage's recipe; extend one" in message(
        lambda: resolve(str(mine), load_scale("tiny"))
    )
    assert resolve(str(recipes / STAGE1), load_scale("tiny")).stage == "pretrain-stage1"


@pytest.mark.parametrize("load", [load_recipe, lambda stage: resolve(stage, load_scale("tiny"))])
def test_a_misspelt_stage_gets_the_nearest_name(load: Callable[[str], object]) -> None:
    text = message(lambda: load("pretrain-stag1"))
    assert text.startswith("unknown stage 'pretrain-stag1'; did you mean 'pretrain-stage1'?")


def test_an_unknown_scale_gets_the_known_ones() -> None:
    text = message(lambda: load_scale("middling"))
    assert text.startswith("unknown scale SCALE=middling; known: ") and "full" in text


SCALE_MISTAKES = {
    "misspelt key": ("origin:", "orign:", "orign: unknown key; did you mean 'origin'?"),
    "no such origin": ("origin: standin", "origin: moon", "origin: 'moon': write 'hub' or 'standin'"),
    "misspelt model key": ("hidden_size:", "hiden_size:", "hiden_size: unknown key; did you mean"),
    "text for a number": ("hidden_size: 64", "hidden_size: big", "'big': write a whole number"),
    "nought": ("windows_divided_by: 16", "windows_divided_by: 0", "0: write at least 1"),
    "no steps": ("steps_divided_by: 5900", "steps_divided_by: 99999999", "minimum_warmup_steps: 5: pretrain-stage1 has 1 steps"),
    "no window": ("windows_divided_by: 16", "windows_divided_by: 9999", "windows_divided_by: 9999: leaves windows of 0 tokens"),
    "no reason": ("  nanotron.logging:", "  nanotron.checkpoints.save_initial_state:", "why: no reason for nanotron.logging"),
    "reason of nothing": ("  nanotron.logging:", "  nanotron.log:", "why.nanotron.log: no such key"),
    "unknown stage": ("  longctx-32k:", "  longctx-33k:", "train_steps.longctx-33k: no such stage here;"),
}  # fmt: skip


def everything_of(at: Scale) -> object:
    return changes(load_recipe("pretrain-stage1"), at)


@pytest.mark.parametrize("name", SCALE_MISTAKES)
def test_a_mistake_in_a_scale_is_said_of_the_scale_file(recipes: Path, name: str) -> None:
    old, new, said = SCALE_MISTAKES[name]
    edit(recipes / SCALE, old, new)
    text = message(lambda: everything_of(load_scale("tiny")))
    assert text.startswith(f"recipes/{SCALE}: ") and said in text


TABLE_MISTAKES = {
    "takes": ("pipeline.yaml", "[tokenizer, held-out, data-stage1]", "[tokenizr]", "did you mean 'tokenizer'?"),
    "takes itself": ("pipeline.yaml", "[tokenizer, held-out, data-stage1]", "[pretrain-stage1]", "takes:"),
    "engine": ("pipeline.yaml", "engine: tokenizer", "engine: tokeniser", "did you mean 'tokenizer'?"),
    "mixture_of": ("pipeline.yaml", "mixture_of: [pretrain-stage1]", "mixture_of: [x1]", "mixture_of: x1:"),
    "stages": ("pipeline.yaml", "stages:", "stage:", "stage: unknown key; did you mean 'stages'?"),
    "sources": ("sources.yaml", "sources:\n", "source:\n", "source: unknown key; did you mean 'sources'?"),
    "source key": ("sources.yaml", "hub_id: mlf", "hubid: mlf", "sources.dclm.hubid: unknown key; did"),
    "same_as": ("sources.yaml", "same_as: fw2-fra", "same_as: fw2-frx", "did you mean 'fw2-fra'?"),
    "empty row": ("sources.yaml", "{same_as: fw2-fra}", "", "sources.fw2-hq-fra_Latn: empty: write a section"),
    "stand-ins": ("standins.yaml", "standins:\n", "standin:\n", "standin: unknown key; did you mean 'standins'?"),
    "stand-in": ("sources.yaml", "stand_in: web-narratives", "stand_in: web-narrative", "sources.dclm.stand_in: web-narrative: unknown; did you mean 'web-narratives'?"),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE_MISTAKES)
def test_a_mistake_in_a_table_is_said_of_its_file(recipes: Path, name: str) -> None:
    file, old, new, said = TABLE_MISTAKES[name]
    edit(recipes / file, old, new)
    text = message(lambda: resolve("pretrain-stage1", load_scale("tiny")))
    assert text.startswith(f"recipes/{file}: ") and said in text


COUNT_OPENS = """
import collections, pathlib, sys
opens = collections.Counter()

def count(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        path = pathlib.PurePath(arguments[0])
        if "recipes" in path.parts:
            opens[path.as_posix().rpartition("recipes/")[2]] += 1

sys.addaudithook(count)
from launch.recipe.scale import load_scale
from launch.recipe.tables import load_pipeline
from launch.walk import resolve

for name in ("tiny", "full"):
    for stage in load_pipeline():
        resolve(stage, load_scale(name)).identity
for file, times in opens.items():
    print(times, file)
"""


def test_each_recipe_file_is_read_once_a_process() -> None:
    command = [sys.executable, "-c", COUNT_OPENS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    opens = {file: int(times) for times, file in map(str.split, done.stdout.splitlines())}
    assert opens and set(opens.values()) == {1}
    stages = {row.recipe for row in load_pipeline().values() if row.recipe}
    assert opens.keys() >= stages | {"pipeline.yaml", "sources.yaml", "scales/tiny.yaml"}
