"""Does the model keep its mode, call tools and solve the tasks? Greedy answers to held-out prompts.

A held-out row's `check` says what is right (see the chats' own description): `turn` is the index of
the message to generate; `kind` "tool" has `format`, `name` and `arguments`, any other `result`.
Rows without `check` are scored on their last turn, only for the mode.
"""

import ast
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence

from ground.modes import END, well_formed
from posttrain.rows import Lines
from posttrain.template import Row, template_kwargs, token_ids, with_settings

KINDS = ("think", "no_think", "tools")
Item = TypeVar("Item")
Result = TypeVar("Result")
# Prompts that are answered together, and tokens of their answers: 2.4 GB of 2**15 in the 3B.
BATCH, BATCH_TOKENS = 64, 2**15


class Scorer:
    """The first `prompts` held-out rows of each kind, tokenised once."""

    def __init__(
        self,
        tokenizer: Any,
        folder: Path,
        prompts: int,
        max_new_tokens: int,
        settings: Mapping[str, str],
    ):
        self.tokenizer, self.max_new_tokens = tokenizer, max_new_tokens
        self.rows = {
            kind: [
                with_settings(row, settings, where)
                for row, where in Lines(folder / f"{kind}.jsonl").first(prompts)
            ]
            for kind in KINDS
        }

    def __call__(self, model: Any) -> dict[str, float]:
        """Shares in [0, 1], by name."""
        answers = iter(self.generate(model, [row for kind in KINDS for row in self.rows[kind]]))
        figures: dict[str, float] = {}
        for kind in KINDS:
            figures |= shares(kind, [(row, next(answers)) for row in self.rows[kind]])
        return figures

    def generate(self, model: Any, rows: Sequence[Row]) -> list[str]:
        """The model's greedy answer to each row's prompt, `<|im_end|>` included where it comes."""
        prompts = [token_ids(self.tokenizer, _opening(row), prompt=True) for row in rows]

        def answered(share: Sequence[int]) -> list[str]:
            size = prompts_at_once(self.max_new_tokens)
            batches = [share[begin : begin + size] for begin in range(0, len(share), size)]
            return [
                text
                for batch in batches
                for text in greedy(
                    model, self.tokenizer, [prompts[index] for index in batch], self.max_new_tokens
                )
            ]

        # Prompts of like length together; neighbours go to different processes.
        order = sorted(range(len(rows)), key=lambda index: len(prompts[index]))
        with evaluated(model):
            answers = dict(zip(order, shared_out(order, answered), strict=True))
        return [answers[index] for index in range(len(rows))]


def shared_out(
    items: Sequence[Item], work: Callable[[Sequence[Item]], list[Result]]
) -> list[Result]:
    """`work`'s result for each item, in their order; of n processes each works on every n-th item.

    All processes call it with the same items, and all get all results.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work(items)
    rank, size = dist.get_rank(), dist.get_world_size()
    share = items[rank::size]
    shares: list[Any] = [None] * size
    dist.all_gather_object(shares, work(share) if share else [])
    results: list[Any] = [None] * len(items)
    for number, done in enumerate(shares):
        results[number::size] = done
    return results


def prompts_at_once(max_new_tokens: int) -> int:
    """Prompts of a batch: their answers' keys and values stay in memory together."""
    return max(min(BATCH, BATCH_TOKENS // max_new_tokens), 1)


@contextmanager
def evaluated(model: Any) -> Iterator[None]:
    """The model in evaluation mode; its training state is restored afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def greedy(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[str]:
    """Continuations of one batch, padded on the left; cut after `<|im_end|>`."""
    left = partial(pad_sequence, batch_first=True, padding_side="left")
    ids = left([torch.tensor(prompt) for prompt in prompts], padding_value=tokenizer.pad_token_id)
    mask = left([torch.ones(len(prompt), dtype=torch.long) for prompt in prompts])
    end = tokenizer.convert_tokens_to_ids(END)
    out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        eos_token_id=end,
        pad_token_id=tokenizer.pad_token_id,
    )
    answers = out[:, ids.shape[1] :].tolist()
    # By its id: an answer may also spell it in other tokens, as text.
    ended = [answer[: answer.index(end) + 1] if end in answer else answer for answer in answers]
    return tokenizer.batch_decode(ended, skip_special_tokens=False)


def _opening(row: Row) -> Row:
    """The row up to the message that is to be generated."""
    messages = row["messages"]
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return row | {"messages": messages[: row.get("check", {}).get("turn", turns[-1])]}


def shares(kind: str, scored: Sequence[tuple[Row, str]]) -> dict[str, float]:
    """Shares of one kind of prompts, from (row, answer); each over the rows that it applies to."""
    hits: defaultdict[str, list[bool]] = defaultdict(list)
    for row, answer in scored:
        for name, hit in _hits(kind, row, answer).items():
            hits[name].append(hit)
    return {name: sum(values) / len(values) for name, values in sorted(hits.items())}


def _hits(kind: str, row: Row, answer: str) -> dict[str, bool]:
    if kind == "tools":
        return tool_figures(row, answer)
    hits = {f"{kind}_well_formed": well_formed(answer, kind == "think")}
    if "result" in row.get("check", {}):
        hits[f"{kind}_task_accuracy"] = is_right(row, answer)
    return hits


def final_answer(answer: str) -> str:
    """The text after the reasoning."""
    return answer.removesuffix(END).rpartition("</think>")[2]


def is_right(row: Row, answer: str) -> bool:
    """Whether the answer has the expected result as a separate word."""
    result = re.escape(str(row["check"]["result"]))
    return bool(re.search(rf"(?<!\w){result}(?!\w)", final_answer(answer)))


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
    call = re.search(rf"<{tag}>\n?(.*?)\n?</{tag}>", text, re.DOTALL)
    if call is None:
        return None
    return _json_call(call[1]) if form == "xml" else _python_call(call[1])


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
        call = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)][-1]
        if not isinstance(call.func, ast.Name) or call.args:
            return None
        return call.func.id, {str(key.arg): ast.literal_eval(key.value) for key in call.keywords}
    except (SyntaxError, ValueError, IndexError, RecursionError, MemoryError):
        return None


def tool_names(row: Row) -> set[str]:
    """Names of the tools that a row lists."""
    kwargs = template_kwargs(row)
    signatures = [re.match(r"def (\w+)", text) for text in kwargs.get("python_tools", ())]
    names = {match[1] for match in signatures if match}
    return names | {str(tool["name"]) for tool in kwargs.get("xml_tools", ())}
