"""`make template-lab`: a conversation as the model sees it, with the loss mask in colour.

python -m posttrain.template_lab <tokenizer folder> <template> [--example tools]
python -m posttrain.template_lab <tokenizer folder> <template> --rows file.jsonl --row 0
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from posttrain.errors import PosttrainError
from posttrain.template import check_row, configured, tokens_and_mask

USER = {"role": "user", "content": "Is it warm in Rome?"}
ANSWER = {"role": "assistant", "content": "Yes, 31 degrees."}
THOUGHT = {"role": "assistant", "content": "<think>\n31 degrees is warm.\n</think>\nYes."}
CALL = {"name": "get_weather", "arguments": {"city": "Rome"}}
SCHEMA = {"name": "get_weather", "parameters": {"city": {"type": "string"}}}


def _example(*messages: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    return {"messages": [USER, *messages], "chat_template_kwargs": kwargs}


EXAMPLES = {
    "tools": _example(
        {"role": "assistant", "content": "<think>\nI look it up.\n</think>", "tool_calls": [CALL]},
        {"role": "tool", "content": "31 degrees"},
        THOUGHT,
        xml_tools=[SCHEMA],
    ),
    "python": _example(
        {"role": "assistant", "content": "<code>\nprint(get_weather('Rome'))\n</code>"},
        {"role": "tool", "content": "31 degrees"},
        ANSWER,
        python_tools=["def get_weather(city: str) -> str"],
        enable_thinking=False,
    ),
    "think": _example(THOUGHT, {"role": "user", "content": "And in Oslo?"}, THOUGHT),
    "no_think": _example(ANSWER, enable_thinking=False, custom_instructions="Be brief."),
    "override": {
        "messages": [
            {"role": "system", "content": "You are a pirate. /no_think /system_override"},
            USER,
            ANSWER,
        ],
        "chat_template_kwargs": {},
    },
}


def read_row(file: Path, number: int) -> dict[str, Any]:
    """Line `number`, from 0, of a jsonl file; PosttrainError where it is not there."""
    try:
        with file.open(encoding="utf-8") as lines:
            for index, line in enumerate(lines):
                if index == number:
                    row: dict[str, Any] = json.loads(line)
                    return row
    except (OSError, ValueError) as error:
        raise PosttrainError(f"{file}: {error}") from None
    raise PosttrainError(f"{file}: no row {number}")


def coloured(tokenizer: Any, row: dict[str, Any]) -> Text:
    """The row's text; trained tokens on green, the others dim."""
    text, (ids, mask) = Text(), tokens_and_mask(tokenizer, row)
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or mask[end] != mask[start]:
            style = "black on green" if mask[start] else "dim"
            text.append(tokenizer.decode(ids[start:end]), style=style)
            start = end
    return text


def main() -> None:
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(prog="python -m posttrain.template_lab")
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("template", type=Path)
    parser.add_argument("--rows", type=Path, help="a jsonl file of chat rows")
    parser.add_argument("--row", type=int, default=0)
    parser.add_argument("--example", choices=EXAMPLES, default="tools")
    parser.add_argument("--short", action="store_true", help="the short system block")
    chosen = parser.parse_args()
    try:
        row = read_row(chosen.rows, chosen.row) if chosen.rows else EXAMPLES[chosen.example]
        check_row(row, f"{chosen.rows} row {chosen.row}" if chosen.rows else chosen.example)
        tokenizer = AutoTokenizer.from_pretrained(chosen.tokenizer)
        tokenizer.chat_template = configured(chosen.template, short_system=chosen.short)
        text = coloured(tokenizer, row)
    except PosttrainError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    Console().print(text)
    _, mask = tokens_and_mask(tokenizer, row)
    Console().print(f"{sum(mask)} of {len(mask)} tokens are trained (green)", highlight=False)


if __name__ == "__main__":
    main()
