"""Rows of JSON lines to token datasets on disk, masks and per-row settings included.

TRL is handed `input_ids` and `labels` (or prompt, chosen and rejected ids) that were made here, so
that no mask or template setting can get lost on its way through TRL's own preparation.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.errors import PosttrainError
from posttrain.mixing import mixed_rows
from posttrain.template import check_row, render, tokens_and_mask

Row = dict[str, Any]
IGNORED = -100
# Best fit needs many rows to choose from; TRL's default of 1,000 rows a batch fills 98.9 % of a
# window, 50,000 fill 99.97 %.
PACKED_TOGETHER = 50_000


@dataclass(frozen=True)
class Mixture:
    """JSON-lines files by split, their weights, and what all rows are rendered with."""

    files: Mapping[str, Path]
    weights: Mapping[str, float]
    seed: int
    settings: Mapping[str, Any]  # template variables beside each row's own, e.g. date_string


class Lines:
    """A JSON-lines file read by line number, without keeping it in memory."""

    def __init__(self, file: Path):
        self.file = file
        try:
            with file.open("rb") as lines:
                sizes = [len(line) for line in lines]
        except FileNotFoundError:
            raise PosttrainError(f"{file}: no such file; run the stage's data stage") from None
        self.starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    def __len__(self) -> int:
        return len(self.starts) - 1

    def where(self, row: int) -> str:
        return f"{self.file}:{row + 1}"

    def __getitem__(self, row: int) -> Row:
        with self.file.open("rb") as file:
            file.seek(int(self.starts[row]))
            line = file.read(int(self.starts[row + 1] - self.starts[row]))
        try:
            value = json.loads(line)
        except ValueError as error:
            raise PosttrainError(f"{self.where(row)}: not JSON ({error}); mend the line") from None
        if not isinstance(value, dict):
            raise PosttrainError(f"{self.where(row)}: not a JSON object; mend the line")
        return value


def read_rows(file: Path, limit: int) -> list[Row]:
    """The first `limit` rows of a file, in order."""
    lines = Lines(file)
    return [lines[index] for index in range(min(limit, len(lines)))]


def with_settings(row: Row, settings: Mapping[str, Any], where: str) -> Row:
    """The row, checked, with template variables that hold for all rows below its own."""
    check_row(row, where)
    return row | {"chat_template_kwargs": {**settings, **row["chat_template_kwargs"]}}


def chat_tokens(tokenizer: Any, row: Row, only_assistant: bool, where: str) -> Row:
    """`input_ids` and `labels` [T]; with `only_assistant` all but the assistant's turns are -100."""
    if not only_assistant:
        ids = tokenizer(render(tokenizer, row), add_special_tokens=False)["input_ids"]
        return {"input_ids": ids, "labels": ids}
    ids, mask = tokens_and_mask(tokenizer, row)
    if not any(mask):
        raise PosttrainError(
            f"{where}: the template trains no token of this row: give its assistant's turns "
            "{% generation %} blocks"
        )
    labels = [token if kept else IGNORED for token, kept in zip(ids, mask, strict=True)]
    return {"input_ids": ids, "labels": labels}


def pair_tokens(tokenizer: Any, row: Row, settings: Mapping[str, Any], where: str) -> Row:
    """`prompt_ids`, `chosen_ids`, `rejected_ids` of a preference row, its own mode honoured.

    A completion ends with the template's one `<|im_end|>` and newline: no further end token.
    """
    sides, prompt = {}, _messages(row, "prompt", where)
    for side in ("chosen", "rejected"):
        whole = row | {"messages": prompt + _messages(row, side, where)}
        sides[side] = render(tokenizer, with_settings(whole, settings, f"{where}: {side}"))
    opening = row | {"messages": prompt}
    opening["chat_template_kwargs"] = {**settings, **row["chat_template_kwargs"]}
    text = render(tokenizer, opening, prompt=True)
    ids: Row = {"prompt_ids": tokenizer(text, add_special_tokens=False)["input_ids"]}
    for side, rendered in sides.items():
        if not rendered.startswith(text):
            raise PosttrainError(
                f"{where}: {side}: the template does not begin the answer with its generation "
                "prompt: the two must agree"
            )
        rest = rendered.removeprefix(text)
        ids[f"{side}_ids"] = tokenizer(rest, add_special_tokens=False)["input_ids"]
    return ids


def _messages(row: Row, name: str, where: str) -> list[Any]:
    messages = row.get(name)
    if not isinstance(messages, list) or not messages:
        raise PosttrainError(f"{where}: {name}: {messages!r}: write a list of messages")
    return messages


def write_dataset(folder: Path, dataset: Any) -> None:
    """Save a dataset so that the folder is there whole or not at all."""
    aside = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    dataset.save_to_disk(str(aside))
    aside.rename(folder)


def tokenised(
    mixture: Mixture, make: Callable[[Row, str], Row], scratch: Path, workers: int
) -> Any:
    """The mixture's rows through `make` (row, its place), in mixed order; a datasets.Dataset."""
    from datasets import Dataset

    lines = {split: Lines(Path(mixture.files[split])) for split in mixture.weights}
    counts = {split: len(found) for split, found in lines.items()}
    taken = mixed_rows(counts, mixture.weights, mixture.seed)
    by_index = list(lines.values())

    def one(index: Row) -> Row:
        found = by_index[index["split"]]
        return make(found[index["row"]], found.where(index["row"]))

    scratch.mkdir(parents=True, exist_ok=True)
    rows = Dataset.from_dict({"split": taken[:, 0], "row": taken[:, 1]})
    return rows.map(
        one,
        remove_columns=["split", "row"],
        num_proc=workers if workers > 1 else None,
        cache_file_name=str(scratch / "tokens.arrow"),
        new_fingerprint="tokens",  # or `one` is pickled, tokenizer and all, to be hashed
    )


def packed(dataset: Any, length: int, strategy: str, scratch: Path) -> Any:
    """Rows in windows of `length` tokens: `bfd` keeps rows whole, `wrapped` cuts a stream of them."""
    from trl.data_utils import pack_dataset

    options = {
        "batch_size": PACKED_TOGETHER,
        "cache_file_name": str(scratch / "packed.arrow"),
        "new_fingerprint": "packed",
    }
    return pack_dataset(dataset, length, strategy, options)
