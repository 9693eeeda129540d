"""`make template-lab`: a conversation as the model sees it, with the loss mask in colour.

python -m posttrain.template_lab <tokenizer folder> <template> [--example tools]
python -m posttrain.template_lab <tokenizer folder> <template> --rows file.jsonl --row 0
"""

import argparse
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.text import Text

from ground.errors import UserError, fail
from posttrain.rows import Lines
from posttrain.template import Row, check_row, configured, tokens_and_mask


def examples() -> dict[str, Row]:
    """The conversations that the lab shows where no file is named."""
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))


def coloured(tokenizer: Any, row: Row) -> Text:
    """The row's text; trained tokens on green, the others dim."""
    text, tokens = Text(), zip(*tokens_and_mask(tokenizer, row), strict=True)
    for trained, run in groupby(tokens, key=lambda token: token[1]):
        ids = [token_id for token_id, _ in run]
        text.append(tokenizer.decode(ids), style="black on green" if trained else "dim")
    return text


def main() -> None:
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(prog="python -m posttrain.template_lab")
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("template", type=Path)
    parser.add_argument("--rows", type=Path, help="a jsonl file of chat rows")
    parser.add_argument("--row", type=int, default=0)
    parser.add_argument("--example", choices=examples(), default="tools")
    parser.add_argument("--short", action="store_true", help="the short system block")
    options = parser.parse_args()
    try:
        row, where = examples()[options.example], options.example
        if options.rows:
            row, where = Lines(options.rows).row(options.row)
        check_row(row, where)
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
        tokenizer.chat_template = configured(options.template, short_system=options.short)
        Console().print(coloured(tokenizer, row))
        _, mask = tokens_and_mask(tokenizer, row)
    except UserError as error:
        sys.exit(fail(str(error)))
    Console().print(f"{sum(mask)} of {len(mask)} tokens are trained (green)", highlight=False)


if __name__ == "__main__":
    main()
