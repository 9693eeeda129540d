"""Splits of the user's own among those of post-training."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import edit

from ground.errors import UserError
from ground.files import read_json_lines
from launch.recipe.scale import load_scale
from launch.stages.chats import ChatsStage, split_files
from launch.walk import resolve

CHAT = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
PAIR = {
    "prompt": CHAT["messages"][:1],
    "chosen": [{"role": "assistant", "content": "4"}],
    "rejected": [{"role": "assistant", "content": "5"}],
}


def add_split(recipes: Path, config: str, rows: list[Any]) -> Path:
    file = recipes.parent / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    edit(
        recipes / "posttrain" / "splits.yaml",
        f"  {config}:\n",
        f"  {config}:\n    mine: {{mode: no_think, path: mine.jsonl}}\n",
    )
    return file


def chats(scale: str) -> ChatsStage:
    stage = resolve("data-chats", load_scale(scale))
    assert isinstance(stage, ChatsStage)
    return stage


@pytest.mark.parametrize(("config", "row"), [("SFT", CHAT), ("Preference", PAIR)])
def test_a_split_of_ones_own_is_written_beside_the_others(
    recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str, row: Any
) -> None:
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CACHE", str(tmp_path / "cache"))
    add_split(recipes, config, [row, row])
    stage = chats("tiny")
    written = stage.work(0)
    assert written["rows"][f"{config.lower()}/mine"] == 2
    assert written["rows"]["sft/s1k_1.1_think"] > 2
    folder = tmp_path / "cache" / written["folder"]
    (kept, _) = read_json_lines(Path(split_files(folder, ["mine"])["mine"]))
    assert {key: kept[key] for key in row} == row
    assert kept["chat_template_kwargs"] == {"enable_thinking": False}, "the split's mode"


@pytest.mark.parametrize("scale", ["tiny", "full"])
def test_its_content_and_not_its_place_is_part_of_the_identity(recipes: Path, scale: str) -> None:
    before = chats(scale).recipe_values()
    assert "own" not in before
    file = add_split(recipes, "SFT", [CHAT])
    one = chats(scale).recipe_values()
    assert one.pop("own") != {} and one == before, "no split of the published set is another"
    file.write_text(json.dumps(CHAT | {"source": "other"}) + "\n")
    assert chats(scale).recipe_values()["own"] != one


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"text": "no chat"}], r"mine\.jsonl, line 1: not a row with messages"),
        ([CHAT, "text"], r"mine\.jsonl: line 2: .*not a JSON object.*mend it"),
        ([], r"mine\.jsonl: empty"),
    ],
)
def test_a_file_that_is_no_split_is_refused_by_its_line(
    recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[Any], problem: str
) -> None:
    monkeypatch.setenv("CACHE", str(tmp_path / "cache"))
    add_split(recipes, "SFT", rows)
    with pytest.raises(UserError, match=problem):
        chats("tiny").work(0)


def test_a_path_that_is_not_there_is_refused_before_anything_runs(recipes: Path) -> None:
    add_split(recipes, "SFT", [CHAT]).unlink()
    with pytest.raises(UserError, match=r"splits\.SFT\.mine\.path: mine\.jsonl: no such file"):
        chats("tiny")


def test_a_row_without_path_needs_what_the_published_ones_have(recipes: Path) -> None:
    edit(recipes / "posttrain/splits.yaml", "  SFT:\n", "  SFT:\n    mine: {mode: think}\n")
    with pytest.raises(UserError, match=r"splits\.SFT\.mine\.rows: empty: .*a path"):
        chats("tiny")
