"""How much of a source is read: a portion a stage, or the whole source for all of them."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import forget_recipes
from hypothesis import given
from hypothesis import strategies as st
from loopback_hub import loopback_hub
from small_checkout import make_checkout
from test_sizes import PRETRAINED, SIZES, pretrained

from datatrove_pipelines.units import MOST_TOKENS
from launch.recipe.scale import Scale, load_scale
from launch.recipe.tables import load_pipeline
from launch.stages import accounting
from launch.stages.budget import CLEARLY_MORE, Wanted, drawn, wanted
from launch.stages.data import DataStage
from launch.stages.sources import HubData
from launch.walk import resolve

PASS = ("data-stage1", "data-stage2", "data-stage3")
TOKENS = st.integers(0, 4 * 10**12)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For all tests, since the order of a mixture takes a second to make."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CACHE", str(cache))


def portions(stage: str, at: Scale) -> dict[str, tuple[int, int] | None]:
    """Of each source on the hub; None: it is read whole."""
    run = resolve(stage, at)
    assert isinstance(run, DataStage)
    data = run.recipe.sources
    return {n: one.portion for n, one in data.items() if isinstance(one, HubData)}


def of_pass(takes: list[int], tokens: int | None) -> list[tuple[int, int] | None]:
    """The portions of one source in the stages of a pass."""
    return [
        Wanted(
            Counter(s=sum(takes[:number])), Counter(s=take), Counter(s=sum(takes[number + 1 :]))
        ).portion("s", tokens)
        for number, take in enumerate(takes)
    ]


@given(takes=st.lists(TOKENS, min_size=1, max_size=5), tokens=st.none() | TOKENS)
def test_portions_of_a_pass_never_meet_and_a_scarce_source_is_whole_in_all(
    takes: list[int], tokens: int | None
) -> None:
    found = of_pass(takes, tokens)
    if tokens and tokens < CLEARLY_MORE * sum(takes):
        assert found == [None] * len(takes)
        return
    for number, (take, portion) in enumerate(zip(takes, found, strict=True)):
        assert portion is not None and portion[1] == take
        # What earlier stages read, and half of it again since both are estimates.
        assert portion[0] >= CLEARLY_MORE * sum(takes[:number])
    assert not tokens or portion[0] + take <= tokens


@given(
    takes=st.lists(TOKENS, min_size=2, max_size=5), more=TOKENS, tokens=st.none() | st.just(10**14)
)
def test_what_a_later_stage_draws_moves_no_earlier_portion(
    takes: list[int], more: int, tokens: int | None
) -> None:
    assert of_pass(takes, tokens)[:-1] == of_pass([*takes[:-1], more], tokens)[:-1]


@pytest.mark.parametrize("scale", [*SIZES, "full"])
def test_each_stage_reads_of_the_hub_what_it_draws_and_nothing_twice(scale: str) -> None:
    at, end = load_scale(scale), Counter[str]()
    tokens = 0
    for stage in PASS:
        for name, portion in portions(stage, at).items():
            if portion:
                assert portion[0] >= end[name]
                end[name] = sum(portion)
        tokens += drawn(stage.replace("data", "pretrain"), at).total()
    published = pretrained("pretrain-stage3", at)
    steps = published.steps * published.recipe.nanotron.windows_a_step * published.window
    assert 1 < tokens / steps < 1.2
    afresh = portions("data-longctx", at).values()
    assert {portion[0] for portion in afresh if portion} == {0}  # a new pass


# The orders of long context have a million places each: ten seconds.
LONG = [pytest.param(stage, marks=pytest.mark.slow) for stage in PRETRAINED[3:]]


@pytest.mark.parametrize("stage", [*PRETRAINED[:3], *LONG])
def test_a_portion_holds_every_window_that_is_drawn(stage: str) -> None:
    run = pretrained(stage, load_scale("60m"))
    taken = {n: one for n, one in portions(run.data.stage, load_scale("60m")).items() if one}
    windows = {n: count for n, count in accounting.drawn_windows(run).items() if n in taken}
    # 3 of 100 documents may be held out, or their tokens be estimated too high.
    assert all(0.97 * taken[name][1] // (run.window + 1) >= windows[name] for name in windows)
    assert windows and not accounting.windows_before(run).keys() & windows.keys()
    tokens = {name: taken[name][1] for name in windows}
    assert max(accounting.epochs(run, tokens).values()) <= 1.01


def with_tokens(recipes: Path, name: str, tokens: int) -> None:
    file = recipes / "sources.yaml"
    values = yaml.safe_load(file.read_text())
    values["sources"][name]["tokens"] = tokens
    file.write_text(yaml.safe_dump(values, width=10**6))
    forget_recipes()


def test_a_scarce_source_is_whole_shared_and_counted_on_over_the_stages(recipes: Path) -> None:
    stages = [stage.replace("data", "pretrain") for stage in PASS]
    want = sum(drawn(stage, load_scale("60m"))["fw2-fra"] for stage in stages)
    with_tokens(recipes, "fw2-fra", int(1.6 * want))
    assert all(portions(stage, load_scale("60m"))["fw2-fra"] for stage in PASS)
    with_tokens(recipes, "fw2-fra", int(1.4 * want))
    at = load_scale("60m")
    runs = [pretrained(stage, at) for stage in stages]
    data = [run.data.recipe.sources["fw2-fra"] for run in runs]
    assert data[0] == data[1] == data[2]
    assert data[0].values().keys().isdisjoint({"portion", "tokens"})
    windows = [accounting.drawn_windows(run)["fw2-fra"] for run in runs]
    assert accounting.windows_before(runs[2]) == {"fw2-fra": sum(windows[:2])}
    held = {"fw2-fra": sum(windows) * (runs[2].window + 1)}
    assert accounting.epochs(runs[2], held)["fw2-fra"] == 1
    # All that its tokens change is the source itself: the others' text stays.
    with_tokens(recipes, "fw2-fra", 10 * want)
    for run in runs:
        now = pretrained(run.stage, load_scale("60m")).data.recipe.sources
        changed = {n for n, one in now.items() if one != run.data.recipe.sources[n]}
        assert changed == {"fw2-fra"}


def test_own_text_and_stand_ins_have_no_portion(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("some text " * 100)
    for at in (
        load_scale("60m", origin="standin"),
        load_scale("60m", str(tmp_path / "notes.txt")),
    ):
        assert portions("data-stage2", at) == {}
    before = accounting.windows_before(pretrained("pretrain-stage2", load_scale("tiny")))
    assert before["dclm"] > 0


def recipes_of_data() -> dict[str, dict[str, Any]]:
    runs = [resolve(stage, load_scale("60m")) for stage in load_pipeline()]
    return {run.stage: run.recipe_values() for run in runs if isinstance(run, DataStage)}


def more_dclm(recipes: Path) -> None:
    file = recipes / "pretrain/stage2.yaml"
    values = yaml.safe_load(file.read_text())
    values["mixture"]["dclm"] += 0.1
    file.write_text(yaml.safe_dump(values))


def a_new_source(recipes: Path) -> None:
    for name, key, row in (
        ("sources.yaml", "sources", {"hub_id": "a/b", "split": "train", "revision": "main"}),
        ("pretrain/stage2.yaml", "mixture", 0.1),
    ):
        values = yaml.safe_load((recipes / name).read_text())
        if isinstance(row, dict) and "clean" in values["sources"]["dclm"]:
            row["clean"] = "published"
        values[key]["new"] = row
        (recipes / name).write_text(yaml.safe_dump(values, width=10**6))


@pytest.mark.parametrize("change", [more_dclm, a_new_source])
def test_a_later_stage_s_mixture_leaves_earlier_text_as_it_is(
    recipes: Path, change: Callable[[Path], None]
) -> None:
    before = recipes_of_data()
    change(recipes)
    forget_recipes()
    after = recipes_of_data()
    changed = {stage for stage in before if before[stage] != after[stage]}
    assert changed == {"data-stage2", "data-stage3"}


def test_a_recipe_of_ones_own_takes_the_place_of_the_stage_that_it_extends(
    recipes: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(f"extends: {recipes}/pretrain/stage2.yaml\nmixture: {{dclm: 1.0}}\n")
    at = load_scale("60m")
    here, there = wanted((str(own),), at), wanted(("pretrain-stage2",), at)
    assert (here.earlier, here.later) == (there.earlier, there.later)
    assert here.here["dclm"] > there.here["dclm"] and set(here.here) == {"dclm"}


TEXT = "the river was cold and an old man told us of the year when it had been warm in spring"
WORDS = TEXT.split()


def write_lines(folder: Path, files: int, rows: int) -> int:
    """A data set of JSON lines; returns about how many tokens it has."""
    folder.mkdir()
    size = 0
    for file in range(files):
        texts = [
            " ".join(WORDS[(row * 7 + file + k * k) % len(WORDS)] for k in range(30))
            + f" {file} {row}"
            for row in range(rows)
        ]
        (folder / f"train-{file}.jsonl").write_text(
            "".join(json.dumps({"text": t}) + "\n" for t in texts)
        )
        size += sum(map(len, texts))
    return size // 4


@pytest.mark.slow
def test_stages_read_apart_what_is_plenty_and_together_what_is_scarce(tmp_path: Path) -> None:
    checkout, sources = make_checkout(tmp_path / "checkout"), dict[str, dict[str, Any]]()
    folders = {}
    for name, files, rows in (("dclm", 4, 2000), ("finemath", 1, 40), ("wiki", 1, 40)):
        folders[f"datasets/owner/{name}"] = tmp_path / name
        sources[name] = {
            "hub_id": f"owner/{name}", "split": "train", "revision": "main", "clean": "published",
            "category": "code", "stand_in": "scripts",
            "tokens": write_lines(tmp_path / name, files, rows),
        }  # fmt: skip
    sources["kaggle"] = {
        "hub_id": None, "category": "code", "stand_in": "scripts", "replaced_by": "wiki",
        "substitute": "anything",
    }  # fmt: skip
    file = checkout.folder / "recipes/sources.yaml"
    file.write_text(yaml.safe_dump({"sources": sources}))
    shards = []
    with loopback_hub(folders) as hub:
        words = {"ORIGIN": "hub", "SUBSTITUTES": "1", **hub.variables(tmp_path / "hf")}
        printed = [checkout.done("run", stage, **words) for stage in PASS]
    assert "kaggle was never released: wiki (owner/wiki) takes its place" in printed[2]
    for stage in PASS:
        manifest = checkout.runs.with_name("small-hub-substitutes") / stage / "manifest.json"
        shards.append(json.loads(manifest.read_text())["shards"])
    assert len({one["finemath"]["folder"] for one in shards}) == 1
    assert shards[2].keys() == {"dclm", "finemath", "wiki"}
    documents = [documents_of(checkout.cache / one["dclm"]["folder"]) for one in shards]
    assert all(documents) and sum(map(len, documents)) == len(set().union(*documents))
    at_stage = [one["dclm"]["tokens"] for one in shards]
    assert at_stage[0] > at_stage[1] > at_stage[2] and sum(at_stage) < 2 * 40 * 4 * 64


def documents_of(folder: Path) -> set[tuple[str, int]]:
    """(file, row) of each document of a source's shards."""
    units = json.loads((folder / "info.json").read_text())["units"]
    return {
        (unit["file"], int(row))
        for unit in units
        if unit["documents"]
        for row in np.fromfile(folder / f"{unit['number']:05}.ds.rows", np.uint32)
    }


def test_the_shards_of_the_published_run_are_fewer_than_a_process_can_map() -> None:
    """Linux lets it have 65,530 maps (vm.max_map_count)."""
    shards = sum(
        -(-tokens // MOST_TOKENS)
        for recipe in PRETRAINED
        for tokens in drawn(recipe, load_scale("full")).values()
    )
    print(f"{shards:,} shards")
    assert 40_000 < shards < 60_000
