"""Does the model keep to its mode, call tools and solve the tasks? Greedy answers to held-out prompts.

A held-out row's `check` says what is right (see the chats' own description): `turn` is the index of
the message to generate; `kind` "tool" has `format`, `name` and `arguments`, any other `result`.
Rows without `check` are scored on their last turn, for the mode alone.
"""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ground.modes import END, well_formed
from posttrain.rows import Row, read_rows, with_settings
from posttrain.template import render

KINDS = ("think", "no_think", "tools")


class Scorer:
    """The first `prompts` held-out rows of each kind, tokenised once."""

    def __init__(
        self,
        tokenizer: Any,
        folder: Path,
        prompts: int,
        max_new_tokens: int,
        settings: Mapping[str, Any],
    ):
        self.tokenizer, self.max_new_tokens = tokenizer, max_new_tokens
        self.rows = {
            kind: [
                with_settings(row, settings, f"{folder / kind}.jsonl:{index + 1}")
                for index, row in enumerate(read_rows(folder / f"{kind}.jsonl", prompts))
            ]
            for kind in KINDS
        }

    def __call__(self, model: Any) -> dict[str, float]:
        """Shares in [0, 1], by name."""
        rows = [row for kind in KINDS for row in self.rows[kind]]
        answers = iter(self.generate(model, rows))
        found: dict[str, float] = {}
        for kind in KINDS:
            scored = [(row, next(answers)) for row in self.rows[kind]]
            found |= shares(kind, scored)
        return found

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def generate(self, model: Any, rows: Sequence[Row]) -> list[str]:
        """The model's greedy answer to each row's prompt, `<|im_end|>` included where it comes."""
        prompts = [self._ids(render(self.tokenizer, _opening(row), prompt=True)) for row in rows]
        order = sorted(range(len(rows)), key=lambda index: len(prompts[index]))
        answers = [""] * len(rows)
        was_training = model.training
        model.eval()
        for begin in range(0, len(order), 64):
            batch = order[begin : begin + 64]
            texts = greedy(
                model, self.tokenizer, [prompts[index] for index in batch], self.max_new_tokens
            )
            for index, text in zip(batch, texts, strict=True):
                answers[index] = text
        model.train(was_training)
        return answers


@torch.no_grad()
def greedy(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[str]:
    """Continuations of one batch, padded on the left; cut after `<|im_end|>`."""
    longest = max(map(len, prompts))
    padding = [[tokenizer.pad_token_id] * (longest - len(prompt)) for prompt in prompts]
    ids = torch.tensor([[*pad, *prompt] for pad, prompt in zip(padding, prompts, strict=True)])
    mask = torch.tensor([[0] * len(p) + [1] * (longest - len(p)) for p in padding])
    out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=False)
    return [
        text.split(END)[0] + END if END in text else _unpadded(text, tokenizer) for text in texts
    ]


def _unpadded(text: str, tokenizer: Any) -> str:
    return text.replace(tokenizer.pad_token, "")


def _opening(row: Row) -> Row:
    """The row up to the message that is to be generated."""
    messages = row["messages"]
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return row | {"messages": messages[: row.get("check", {}).get("turn", turns[-1])]}


def shares(kind: str, scored: Sequence[tuple[Row, str]]) -> dict[str, float]:
    """Shares of one kind of prompts, from (row, answer)."""
    if not scored:
        return {}
    if kind == "tools":
        found = [tool_figures(row, answer) for row, answer in scored]
    else:
        found = [
            {f"{kind}_well_formed": well_formed(answer, kind == "think")} for _, answer in scored
        ]
        checked = [(row, answer) for row, answer in scored if "result" in row.get("check", {})]
        found += [{f"{kind}_task_accuracy": is_right(row, answer)} for row, answer in checked]
    names = {name for figures in found for name in figures}
    return {
        name: sum(values) / len(values)
        for name in sorted(names)
        if (values := [float(figures[name]) for figures in found if name in figures])
    }


def final_answer(answer: str) -> str:
    """What stands behind the reasoning."""
    return answer.removesuffix(END).rpartition("</think>")[2]


def is_right(row: Row, answer: str) -> bool:
    """Whether the answer has the expected result as a word of its own."""
    wanted = re.escape(str(row["check"]["result"]))
    return bool(re.search(rf"(?<!\w){wanted}(?!\w)", final_answer(answer)))


def tool_figures(row: Row, answer: str) -> dict[str, bool]:
    """Whether the call parses, names a listed tool, and equals the expected one."""
    check = row["check"]
    call = parse_call(final_answer(answer), check["format"])
    return {
        "tool_call_parses": call is not None,
        "tool_listed": call is not None and call[0] in tool_names(row),
        "tool_right": call is not None and call[0] == check["name"],
        "tool_arguments_right": call == (check["name"], check["arguments"]),
    }


def parse_call(text: str, form: str) -> tuple[str, dict[str, Any]] | None:
    """(name, arguments) of the first call in `<tool_call>` JSON or `<code>` Python; else None."""
    tag = "tool_call" if form == "xml" else "code"
    found = re.search(rf"<{tag}>\n?(.*?)\n?</{tag}>", text, re.DOTALL)
    if found is None:
        return None
    return _json_call(found[1]) if form == "xml" else _python_call(found[1])


def _json_call(text: str) -> tuple[str, dict[str, Any]] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    if not isinstance(value, dict) or not isinstance(value.get("arguments"), dict):
        return None
    return str(value.get("name")), value["arguments"]


def _python_call(code: str) -> tuple[str, dict[str, Any]] | None:
    """The innermost first call of a line such as `print(f(x=1))`, with literal keyword arguments."""
    try:
        calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
        call = calls[-1]
        if not isinstance(call.func, ast.Name) or call.args:
            return None
        return call.func.id, {str(key.arg): ast.literal_eval(key.value) for key in call.keywords}
    except (SyntaxError, ValueError, IndexError, RecursionError, MemoryError):
        return None


def tool_names(row: Row) -> set[str]:
    """Names of the tools that a row lists."""
    kwargs = row["chat_template_kwargs"]
    xml = [json.loads(t) if isinstance(t, str) else t for t in kwargs.get("xml_tools") or ()]
    signatures = [re.match(r"def (\w+)", text) for text in kwargs.get("python_tools") or ()]
    return {str(tool["name"]) for tool in xml} | {found[1] for found in signatures if found}
