"""`make eval-longctx`: scores, intervals and heat maps of a folder, and errors in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import edit
from small_models import make_tokenizer, random_model
from test_long_context import TEXTS
from transformers import AutoTokenizer

from eval_tasks import likelihood
from eval_tasks.intervals import wilson
from ground.errors import UserError
from launch.tools.long_context import chat_of, evaluate_long_context

WINDOW = 1100
SUITE = {
    "tasks": ["needle", "aggregation", "quotation"], "languages": ["en", "de"],
    "lengths": [100, 700, 1000, 2000], "depths": [0.0, 1.0], "per_cell": 2, "seed": 0,
}  # fmt: skip


@pytest.fixture
def suite(recipes: Path) -> Path:
    file = recipes / "eval/longctx.yaml"
    file.write_text(yaml.safe_dump(SUITE))
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model"
    tokenizer = make_tokenizer(short_system=True)
    one_layer = {"num_hidden_layers": 1, "no_rope_layers": [1], "hidden_size": 16}
    random_model(tokenizer, seed=0, window=WINDOW, **one_layer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return file


@pytest.mark.usefixtures("suite")
@pytest.mark.parametrize("in_chat", [False, True])
def test_every_prompt_has_its_length_and_stays_in_the_window(
    folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_chat: bool
) -> None:
    seen: list[int] = []

    def spy(model: Any, context: list[int], choices: list[list[int]]) -> list[float]:
        seen.extend(len(context) + len(choice) for choice in choices)
        text = tokenizer.decode(context)
        assert text.startswith("<|im_start|>") == ("<|im_start|>assistant" in text) == in_chat
        return [0.0] * len(choices)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    monkeypatch.setattr(likelihood, "choice_log_likelihoods", spy)
    evaluate_long_context(folder, corpus, tmp_path / "out/model", in_chat=in_chat)
    assert {700, 1000} <= set(seen) <= {100, 700, 1000}


@pytest.mark.usefixtures("suite")
def test_scores_intervals_and_heat_maps_are_written(
    folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = evaluate_long_context(folder, corpus, tmp_path / "out/model")
    rows = json.loads(file.read_text())["rows"]
    cells = {(row["task"], row["language"], row["length"], row["depth"]) for row in rows}
    assert {(t, "en", n, d) for t in SUITE["tasks"] for n in (700, 1000) for d in (0, 1)} <= cells
    for row in rows:
        assert row["of"] == 2 and row["chance"] == 0.25
        assert (row["low"], row["high"]) == pytest.approx(wilson(row["hits"], 2))
    for task in SUITE["tasks"]:
        assert (tmp_path / f"out/model-{task}.svg").read_text().startswith("<?xml")
    said = capsys.readouterr().out
    assert "left out: quotation, en, length 100: " in said


def test_a_user_is_told_in_one_line(
    suite: Path, folder: Path, corpus: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out/model"
    with pytest.raises(UserError, match=r"MODEL=.*: no config\.json there"):
        evaluate_long_context(tmp_path, corpus, target)
    with pytest.raises(UserError, match=r"CORPUS=.*: no such file or folder"):
        evaluate_long_context(folder, tmp_path / "nowhere", target)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"CORPUS=.*: no \.txt or \.md file in it"):
        evaluate_long_context(folder, tmp_path / "empty", target)
    corpus.write_text('{"text": "one"}\n{"txt": "two"}\n')
    with pytest.raises(UserError, match=r"texts\.jsonl line 2: not a JSON object with a `text`"):
        evaluate_long_context(folder, corpus, target)
    corpus.write_text('{"text": "one"}\n')
    edit(suite, "- needle\n- aggregation\n- quotation", "- needle")
    with pytest.raises(UserError, match=r"CORPUS=.*: no sample of any length could be made"):
        evaluate_long_context(folder, corpus, target)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"has no chat template; leave CHAT out"):
        chat_of(tokenizer, folder)
    assert not target.parent.exists()


def test_a_window_shorter_than_every_length_is_refused(
    suite: Path, folder: Path, corpus: Path, tmp_path: Path
) -> None:
    edit(suite, "- 100\n- 700\n- 1000\n- 2000", f"- {WINDOW + 1}")
    with pytest.raises(UserError, match=f"its window of {WINDOW} is shorter than every length"):
        evaluate_long_context(folder, corpus, tmp_path / "out/model")
