"""What `make replay` and `make seen` refuse, and how they cut what they print."""

from collections.abc import Callable
from pathlib import Path

import pytest
from stage_runs import finished
from test_damage import flip, write_shards

from datatrove_pipelines.lookup import SourceTokens
from ground.checksums import seal
from ground.errors import UserError
from ground.files import write_record
from launch import walk
from launch.recipe.scale import load_scale
from launch.stages.pretrain import PretrainStage
from launch.tools.order import PretrainOrder
from launch.tools.replay import MOST_CHARACTERS, logged_hash, on_a_line, order_of
from launch.tools.seen import Search, seen, trained_stages


@pytest.fixture(autouse=True)
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("pretrain-stage2", "not tokenised yet; `make data-stage2 SCALE=full` does it"),
        ("longctx-64k", "not tokenised yet; `make data-longctx SCALE=full` does it"),
        ("apo", "-m launch run apo --part prepare` does it"),
        ("soup", "soup: trains nothing; STAGE= names one of the training stages"),
    ],
)
def test_what_is_missing_is_named_with_the_command_that_makes_it(stage: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        order_of(walk.resolve(stage, load_scale("full")))


def test_a_folder_of_another_recipe_is_refused() -> None:
    run = walk.resolve("pretrain-stage1", load_scale("tiny"))
    run.folder.mkdir(parents=True)
    write_record(run.folder / "manifest.json", {"identity": "another", "versions": run.versions})
    with pytest.raises(UserError, match=r"made from another recipe, .*FORCE=1"):
        order_of(run)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-3]),
    "gone": Path.unlink,
    "emptied": lambda file: file.write_text(""),
}


@pytest.fixture
def run(tmp_path: Path) -> PretrainStage:
    """A stage whose tokenizer and shards are there."""
    run = walk.resolve("pretrain-stage1", load_scale("tiny"))
    assert isinstance(run, PretrainStage)
    run.tokenizer.mkdir(parents=True)
    (run.tokenizer / "tokenizer.json").write_text("{}")
    seal(run.tokenizer)
    write_shards(tmp_path / "cache/web-1", first=1)
    finished(run.data, shards={"web": {"folder": "web-1"}}, eos_id=255)
    assert order_of(run)
    return run


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["0.ds", "0.ds.index", "1.ds.rows", "checksums.json"])
def test_an_order_of_damaged_shards_is_refused(
    run: PretrainStage, tmp_path: Path, name: str, damage: str
) -> None:
    DAMAGES[damage](tmp_path / "cache/web-1" / name)
    with pytest.raises(UserError, match=rf"web-1[/:].*({name}|cut off).*; `make data-stage1"):
        order_of(run)


def test_an_order_without_its_tokenizer_is_refused(run: PretrainStage) -> None:
    file = run.tokenizer / "tokenizer.json"
    file.write_text("[]")  # as long as before
    with pytest.raises(UserError, match=r"tokenizer\.json: its content .*; `make tokenizer SCALE"):
        order_of(run)


@pytest.mark.parametrize("name", ["0.ds.index", "1.ds.rows", "info.json"])
def test_a_search_uses_no_index_with_another_bit(tmp_path: Path, name: str) -> None:
    shards = write_shards(tmp_path / "web-1", first=1)
    order = object.__new__(PretrainOrder)
    vars(order)["sources"] = {"web": SourceTokens(shards, 2)}
    flip(shards / name, shards)
    with pytest.raises(UserError, match=rf"{name}: its content is not what was written"):
        list(Search("a text", [order]).places())


def test_a_line_of_metrics_without_its_step_is_named() -> None:
    run = walk.resolve("pretrain-stage1", load_scale("tiny"))
    run.folder.mkdir(parents=True)
    (run.folder / "metrics.jsonl").write_text(
        '{"step": 1, "batch_hash": "a"}\n{"batch_hash": "b"}\n'
    )
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2: damaged \(no step\)"):
        logged_hash(run, 2)


def test_a_search_leaves_out_what_is_not_tokenised_and_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    stages = trained_stages(load_scale("tiny"))
    seen("a text", stages, shows_all=False, as_json=False)
    printed = capsys.readouterr().out
    assert printed.count("left out: ") == len(stages) == 8
    assert "0 places of 'a text' in what no stage trains on" in printed
    with pytest.raises(UserError, match="TEXT is missing"):
        seen("", stages, shows_all=False, as_json=False)


def test_a_long_text_loses_its_middle() -> None:
    text = "a\n" + "b" * 500 + "c"
    cut = on_a_line(text)
    assert cut.startswith("a\\nb") and cut.endswith("bc") and len(cut) < MOST_CHARACTERS + 10
    assert on_a_line(text, is_whole=True) == text.replace("\n", "\\n")
