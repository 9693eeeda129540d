"""Rows of JSON lines, and their token ids: a chat with the mask of its loss, a preference pair."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ground import chat
from ground.errors import UserError
from posttrain.template import Row, opening_and_answer, token_ids, tokens_and_mask, with_settings

# The label that the loss ignores.
IGNORED = -100


def holds_control_strings(tokenizer: Any, row: Row) -> bool:
    """Whether a row's text spells tokens that the template alone writes, such as `<|im_end|>`."""
    parts = ("messages", "prompt", "chosen", "rejected")
    messages = [message for part in parts for message in row.get(part) or ()]
    return chat.holds_control_strings(tokenizer, messages, row["chat_template_kwargs"])


class Lines:
    """A JSON-lines file read by line number, without keeping it in memory."""

    def __init__(self, file: Path):
        self.file = file
        try:
            with file.open("rb") as lines:
                sizes = [len(line) for line in lines]
        except FileNotFoundError:
            raise UserError(f"{file}: no such file; run the stage's data stage") from None
        self.starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, index: int) -> tuple[Row, str]:
        """Row `index`, from 0, and its place, "<file>:<line from 1>", which a UserError names."""
        if not 0 <= index < len(self):
            raise UserError(f"{self.file}: no row {index}: it has {len(self)}, counted from 0")
        place = f"{self.file}:{index + 1}"
        with self.file.open("rb") as file:
            file.seek(int(self.starts[index]))
            line = file.read(int(self.starts[index + 1] - self.starts[index]))
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{place}: not JSON ({error}); mend the line") from None
        if not isinstance(row, dict):
            raise UserError(f"{place}: not a JSON object; mend the line")
        return row, place

    def first(self, limit: int) -> list[tuple[Row, str]]:
        """The first `limit` rows, or all, each with its place."""
        return [self.row(index) for index in range(min(limit, len(self)))]


def chat_tokens(tokenizer: Any, row: Row, only_assistant: bool, where: str) -> Row:
    """`input_ids` and `labels` [T]; with `only_assistant`, -100 outside the assistant's turns."""
    if not only_assistant:
        ids = token_ids(tokenizer, row)
        return {"input_ids": ids, "labels": ids}
    ids, mask = tokens_and_mask(tokenizer, row)
    if not any(mask):
        raise UserError(
            f"{where}: the template trains no token of this row: give its assistant's turns "
            "{% generation %} blocks"
        )
    labels = [token if trained else IGNORED for token, trained in zip(ids, mask, strict=True)]
    return {"input_ids": ids, "labels": labels}


def pair_tokens(tokenizer: Any, row: Row, settings: Mapping[str, str], where: str) -> Row:
    """`prompt_ids`, `chosen_ids`, `rejected_ids` of a preference row, rendered in its own mode.

    A completion ends with the template's one `<|im_end|>` and newline: no further end token.
    """
    for name in ("prompt", "chosen", "rejected"):
        if not isinstance(row.get(name), list) or not row[name]:
            raise UserError(f"{where}: {name}: {row.get(name)!r}: write a list of messages")
    chats = {
        side: with_settings(
            row | {"messages": row["prompt"] + row[side]}, settings, f"{where}: {side}"
        )
        for side in ("chosen", "rejected")
    }
    prompt = chats["chosen"] | {"messages": row["prompt"]}
    ids = Row()
    for side, answered in chats.items():
        both = opening_and_answer(tokenizer, prompt, answered)
        if both is None:
            raise UserError(
                f"{where}: {side}: the template does not begin the answer with its generation "
                "prompt: the two must agree"
            )
        ids["prompt_ids"], ids[f"{side}_ids"] = both
    return ids
