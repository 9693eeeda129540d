"""What is trained on: the assistant's tokens of every row, each document by itself, nothing lost."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from damaged import DAMAGED
from posttrain_jobs import (
    PAD,
    chat_rows,
    kwargs,
    make_folder,
    pair_rows,
    say,
    tokenizer_with_pad,
    write_rows,
    write_start,
)

from ground.errors import UserError
from posttrain.data import packed, prepare_data
from posttrain.rows import IGNORED, chat_tokens, pair_tokens
from posttrain.template import render

TOKENIZER = tokenizer_with_pad(short_system=True)


def assistant_text(row: dict[str, Any]) -> str:
    """The assistant's turns of a rendered row, cut out of its text by hand."""
    turns = render(TOKENIZER, row).split("<|im_start|>")
    return "".join(f"<|im_start|>{turn}" for turn in turns if turn.startswith("assistant\n"))


def documents(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each document of a batch of windows, padding left out."""
    found = []
    pad = TOKENIZER.convert_tokens_to_ids(PAD)
    for ids, labels, positions in zip(
        batch["input_ids"], batch["labels"], batch["position_ids"], strict=True
    ):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for begin, end in itertools.pairwise(starts):
            if ids[begin] != pad:
                found.append((ids[begin:end].tolist(), labels[begin:end].tolist()))
    return found


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from datasets import Dataset

    rows = [chat_tokens(TOKENIZER, row, True, "here") for row in chat_rows(20)]
    return packed(Dataset.from_list(rows), 700, "bfd", tmp_path_factory.mktemp("scratch"))


@pytest.fixture(scope="module")
def batch(windows: Any) -> dict[str, torch.Tensor]:
    from posttrain.sft import WindowCollator

    return WindowCollator(TOKENIZER.convert_tokens_to_ids(PAD))(list(windows))


def test_trained_tokens_of_a_mixed_batch_are_exactly_the_assistants(
    batch: dict[str, torch.Tensor],
) -> None:
    expected = {render(TOKENIZER, row): assistant_text(row) for row in chat_rows(20)}
    found = documents(batch)
    assert len(found) == len(expected) == 20
    for ids, labels in found:
        trained = [token for token in labels if token != IGNORED]
        assert TOKENIZER.decode(trained) == expected.pop(TOKENIZER.decode(ids))
        assert all(label in (token, IGNORED) for token, label in zip(ids, labels, strict=True))


def test_several_documents_share_a_window_and_none_is_cut(windows: Any) -> None:
    assert max(len(lengths) for lengths in windows["seq_lengths"]) > 1
    assert sum(len(lengths) for lengths in windows["seq_lengths"]) == 20


def test_flat_batches_train_the_same_tokens(windows: Any, batch: dict[str, torch.Tensor]) -> None:
    """TRL's own collator, for attention with variable lengths, against ours."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    pad = TOKENIZER.convert_tokens_to_ids(PAD)
    flat = DataCollatorForLanguageModeling(pad, padding_free=True)(list(windows))
    kept = batch["input_ids"] != pad
    for name in ("input_ids", "labels", "position_ids"):
        assert flat[name][0].tolist() == batch[name][kept].tolist()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_do_not_see_each_other(
    attention: str, batch: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        write_start(tmp_path / "model"), attn_implementation=attention
    )
    with torch.no_grad():
        together = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        window, checked = 0, 0
        for window, positions in enumerate(batch["position_ids"]):
            starts = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
            for begin, end in itertools.pairwise(starts):
                alone = model(input_ids=batch["input_ids"][window : window + 1, begin:end]).logits
                difference = (alone[0] - together[window, begin:end]).abs().max().item()
                assert difference < 2e-5
                checked += begin > 0
    assert checked >= 10  # documents with something before them in their window


# ---- preference pairs


@pytest.mark.parametrize("row", pair_rows(4), ids=["think", "no_think"] * 2)
def test_a_pair_is_rendered_in_its_own_mode(row: dict[str, Any]) -> None:
    ids = pair_tokens(TOKENIZER, row, {}, "here")
    prompt, chosen = TOKENIZER.decode(ids["prompt_ids"]), TOKENIZER.decode(ids["chosen_ids"])
    thinks = row["chat_template_kwargs"]["enable_thinking"]
    assert f"Reasoning Mode: {'/think' if thinks else '/no_think'}\n" in prompt
    assert prompt.endswith("assistant\n" if thinks else "assistant\n<think>\n\n</think>\n")
    assert chosen == row["chosen"][0]["content"] + "<|im_end|>\n"
    whole = row | {"messages": row["prompt"] + row["rejected"]}
    rejected = TOKENIZER.decode(ids["rejected_ids"])
    assert prompt + rejected == render(TOKENIZER, whole)


def test_a_completion_ends_once_and_a_long_prompt_is_kept() -> None:
    row = pair_rows(1)[0]
    row["prompt"] = [say("user", "word " * 400)]
    ids = pair_tokens(TOKENIZER, row, {}, "here")
    end = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
    assert ids["chosen_ids"].count(end) == ids["rejected_ids"].count(end) == 1
    assert len(ids["prompt_ids"]) > 2000


def test_a_settings_date_reaches_the_prompt_and_the_rows_own_values_win() -> None:
    tokenizer = tokenizer_with_pad()
    row = pair_rows(1)[0]
    text = tokenizer.decode(
        pair_tokens(tokenizer, row, {"date_string": "02 May 2025"}, "here")["prompt_ids"]
    )
    assert "Today Date: 02 May 2025" in text
    row["chat_template_kwargs"]["date_string"] = "03 May 2025"
    text = tokenizer.decode(
        pair_tokens(tokenizer, row, {"date_string": "02 May 2025"}, "here")["prompt_ids"]
    )
    assert "Today Date: 03 May 2025" in text


# ---- bad rows


def bad(**changes: Any) -> str:
    return json.dumps(chat_rows(1)[0] | changes)


BAD_ROWS = {
    "no assistant": (bad(messages=[say("user", "Hi")]), "no assistant's turn"),
    "null kwargs": (bad(chat_template_kwargs=None), "chat_template_kwargs: None: write a mapping"),
    "unknown role": (bad(messages=[say("bot", "Hi")]), "role 'bot': use one of"),
    "tools": (
        bad(chat_template_kwargs=kwargs(True, xml_tools=["{name: add}"])),
        "is not a JSON object",
    ),
    "content": (bad(messages=[{"role": "assistant", "content": None}]), "content None is no text"),
    "broken line": ('{"messages": ', "not JSON"),
    "no object": ("[1]", "not a JSON object"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "sft", "sft", write_start(tmp_path / "model"))
    line, message = BAD_ROWS[name]
    rows = (folder / "rows/a.jsonl").read_text().splitlines()
    rows[5] = line
    (folder / "rows/a.jsonl").write_text("\n".join(rows) + "\n")
    with pytest.raises(UserError) as error:
        prepare_data(folder)
    assert message in str(error.value) and "rows/a.jsonl:6: " in str(error.value)
    assert "\n" not in str(error.value)
    assert not (folder / "data").exists() and not (folder / "data.json").exists()
    rows[5] = json.dumps(chat_rows(6)[5])
    (folder / "rows/a.jsonl").write_text("\n".join(rows) + "\n")
    assert prepare_data(folder)["rows"] == 24 + 20


@pytest.mark.parametrize("side", ["prompt", "chosen", "rejected"])
def test_a_pair_without_a_side_is_named(side: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "apo", "apo", write_start(tmp_path / "model"))
    rows = pair_rows(24)
    rows[2][side] = []
    write_rows(folder / "rows/a.jsonl", rows)
    with pytest.raises(UserError, match=rf"a\.jsonl:3: {side}: \[\]: write a list"):
        prepare_data(folder)


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_model_is_named_before_anything_is_computed(name: str, tmp_path: Path) -> None:
    damage, words = DAMAGED[name]
    folder = make_folder(tmp_path / "sft", "sft", write_start(tmp_path / "model"))
    damage(tmp_path / "model")
    with pytest.raises(UserError, match=words):
        prepare_data(folder)
    assert not (folder / "data").exists()


def test_rows_longer_than_the_window_are_counted(tmp_path: Path) -> None:
    start = write_start(tmp_path / "model")
    folder = make_folder(tmp_path / "sft", "sft", start, trl={"max_length": 150})
    counted = prepare_data(folder)
    assert 0 < counted["rows_cut_at_max_length"] < counted["rows"] == 44


def test_midtraining_trains_every_token(tmp_path: Path) -> None:
    from datasets import load_from_disk

    folder = make_folder(tmp_path / "midtrain", "midtrain", write_start(tmp_path / "model"))
    counted = prepare_data(folder)
    data = load_from_disk(str(folder / "data"))
    assert sum(map(len, data["labels"])) == counted["tokens"]
    assert data["labels"][:] == data["input_ids"][:]
    assert all(len(ids) == 700 for ids in data["input_ids"][:-1])
    assert "Reasoning Mode" not in TOKENIZER.decode(data["input_ids"][0])
