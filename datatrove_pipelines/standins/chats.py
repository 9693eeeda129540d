"""The embedded chats: conversations, tool calls and preference pairs made by a grammar and a seed.

For machines without access to a hub. Every published split has a stand-in: a generator of its
kind, languages and mode, and the same schema. Each row carries what scores an answer (`check`):

    turn        index of the assistant's message that is scored; the prompt is all before it
    kind        the task; "tool" has `format` (xml, python), `name` and `arguments`
    result      of other kinds: the word that a right answer contains after its reasoning

Whether a question is trained on depends only on its text (held_out.py), so held-out prompts stay
out with any seed, in any split and whatever else is generated.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from datatrove_pipelines.held_out import is_held_out
from datatrove_pipelines.standins import calls
from datatrove_pipelines.standins.calls import ToolTask, call_text
from datatrove_pipelines.standins.flaws import TASK_FLAWS, TOOL_FLAWS, with_thought
from datatrove_pipelines.standins.tasks import TASKS, Task
from datatrove_pipelines.standins.words import read_table
from ground.errors import UserError
from ground.files import folder_aside

HELD_OUT_FRACTION = 0.1
ATTEMPTS = 2000
TOOL_SHARE = 0.3  # of the rows of a stand-in that has both tasks and tools
Row = dict[str, Any]
Drawn = TypeVar("Drawn", Task, ToolTask)


@dataclass(frozen=True)
class ChatSplit:
    """One row of the split table, as plain values."""

    config: str  # Mid | SFT | Preference
    split: str
    mode: str  # think | no_think
    stand_in: str
    languages: tuple[str, ...] = ("en",)
    share: float = 1.0  # of the rows asked for


@dataclass(frozen=True)
class StandInChat:
    """What a stand-in's rows are drawn from; chats.yaml says what the fields mean."""

    tasks: tuple[str, ...] = ()
    forms: tuple[str, ...] = ()
    then: tuple[str, ...] = ()
    second_turn: float = 0.0
    native_calls: bool = False


STANDINS = {name: StandInChat(**row) for name, row in read_table("chats.yaml").items()}


def write_chats(
    folder: Path, splits: Sequence[ChatSplit], rows: int, held_out_rows: int, seed: int
) -> dict[str, int]:
    """Write all splits and the held-out prompts below `folder`; returns rows per file.

    `<config>/<split>.jsonl` has `rows` times the split's share, `held_out/` has `think`,
    `no_think`, `tools` and `preference` of `held_out_rows` each. The folder appears whole.
    """
    for split in splits:
        if split.stand_in not in STANDINS:
            raise UserError(
                f"split {split.split}: stand_in {split.stand_in!r} is unknown; use one of "
                f"{', '.join(STANDINS)}"
            )
    counts = {}
    with folder_aside(folder) as aside:
        for split in splits:
            name = f"{split.config.lower()}/{split.split}"
            of_split = split_rows(split, round(rows * split.share), seed)
            counts[name] = _write(aside / f"{name}.jsonl", of_split)
        for name, chosen in _held_out_groups(splits).items():
            prompts = _round_robin(chosen, held_out_rows, seed)
            counts[f"held_out/{name}"] = _write(aside / "held_out" / f"{name}.jsonl", prompts)
    return counts


def split_rows(split: ChatSplit, rows: int, seed: int, held_out: bool = False) -> Iterator[Row]:
    """Distinct rows of one split; only the seed and the split decide which."""
    part = "held out" if held_out else "train"
    rng = random.Random(f"{seed}/{split.config}/{split.split}/{part}")
    seen: set[bytes] = set()
    for _ in range(rows):
        for _ in range(ATTEMPTS):
            row = _row(rng, split, held_out)
            digest = hashlib.blake2b(json.dumps(row, sort_keys=True).encode()).digest()
            if digest not in seen:
                break
        else:
            raise UserError(
                f"split {split.split}: its stand-in {split.stand_in} has {len(seen)} distinct rows "
                f"where {rows} are asked for; ask for fewer"
            )
        seen.add(digest)
        yield row


def _row(rng: random.Random, split: ChatSplit, held_out: bool) -> Row:
    stand_in = STANDINS[split.stand_in]
    thinks = split.mode == "think"
    has_call = bool(stand_in.forms) and (not stand_in.tasks or rng.random() < TOOL_SHARE)
    if split.config == "Preference":
        row = _tool_pair(rng, split, held_out) if has_call else _task_pair(rng, split, held_out)
    elif has_call:
        form = rng.choice(stand_in.forms)
        row = _tool_row(_tool_task(rng, held_out), form, thinks, stand_in.native_calls)
    else:
        row = _task_row(rng, stand_in, split, held_out)
    return {**row, "source": split.split}


def _drawn(draw: Callable[[], Drawn], held_out: bool) -> Drawn:
    """The next task on the asked side of the split."""
    for _ in range(ATTEMPTS):
        task = draw()
        if is_held_out(task.question, HELD_OUT_FRACTION) == held_out:
            return task
    raise UserError(f"no task among {ATTEMPTS} has held_out = {held_out}")


def _task(rng: random.Random, names: Sequence[str], language: str, held_out: bool) -> Task:
    return _drawn(lambda: TASKS[rng.choice(names)](rng, language), held_out)


def _tool_task(rng: random.Random, held_out: bool) -> ToolTask:
    return _drawn(lambda: calls.draw_tool_task(rng), held_out)


def _task_row(rng: random.Random, stand_in: StandInChat, split: ChatSplit, held_out: bool) -> Row:
    """One or two questions with their answers; the last is scored."""
    language = rng.choice(split.languages)
    turns = [_task(rng, stand_in.tasks, language, held_out)]
    if rng.random() < stand_in.second_turn:
        turns.append(_task(rng, stand_in.then, language, held_out))
    thinks = split.mode == "think"
    messages = []
    for task in turns:
        text = with_thought(task.trace, task.answer, thinks)
        messages += [_message("user", task.question), _message("assistant", text)]
    return {
        "messages": messages,
        "chat_template_kwargs": _kwargs(thinks, instructions=turns[-1].instructions),
        "check": _task_check(turns[-1], len(messages) - 1),
    }


def _tool_row(task: ToolTask, form: str, thinks: bool, native: bool) -> Row:
    """A request, the call, what it returns and the final answer; the call is scored."""
    if native:
        # Arguments stay a mapping, as in the documentation of chat templates.
        function = {"name": task.tool.name, "arguments": task.arguments}
        text = with_thought(task.thought, "", thinks).rstrip("\n")
        call = _message("assistant", text)
        call["tool_calls"] = [{"type": "function", "function": function}]
    else:
        written = call_text(task.tool.name, task.arguments, form)
        call = _message("assistant", with_thought(task.thought, written, thinks))
    final = with_thought(f"Let me see: {task.output}.", task.answer, thinks)
    return {
        "messages": [
            _message("user", task.question),
            call,
            _message("tool", task.output),
            _message("assistant", final),
        ],
        "chat_template_kwargs": _kwargs(thinks, task=task, form=form),
        "check": _tool_check(task, form),
    }


def _task_pair(rng: random.Random, split: ChatSplit, held_out: bool) -> Row:
    tasks, language = STANDINS[split.stand_in].tasks, rng.choice(split.languages)
    task, thinks = _task(rng, tasks, language, held_out), split.mode == "think"
    flaws = [name for name in TASK_FLAWS if thinks or name != "no_think_close"]
    flaw = rng.choice(flaws)
    right = with_thought(task.trace, task.answer, thinks)
    wrong = TASK_FLAWS[flaw](rng, task, thinks)
    return _pair(task.question, right, wrong, flaw) | {
        "chat_template_kwargs": _kwargs(thinks),
        "check": _task_check(task, 1),
    }


def _tool_pair(rng: random.Random, split: ChatSplit, held_out: bool) -> Row:
    task, thinks = _tool_task(rng, held_out), split.mode == "think"
    form, flaw = rng.choice(STANDINS[split.stand_in].forms), rng.choice(list(TOOL_FLAWS))
    right = call_text(task.tool.name, task.arguments, form)
    wrong = TOOL_FLAWS[flaw](rng, task, form)
    right, wrong = (with_thought(task.thought, text, thinks) for text in (right, wrong))
    return _pair(task.question, right, wrong, flaw) | {
        "chat_template_kwargs": _kwargs(thinks, task=task, form=form),
        "check": _tool_check(task, form),
    }


def _pair(question: str, right: str, wrong: str, flaw: str) -> Row:
    return {
        "prompt": [_message("user", question)],
        "chosen": [_message("assistant", right)],
        "rejected": [_message("assistant", wrong)],
        "flaw": flaw,
    }


def _message(role: str, content: str) -> Row:
    return {"role": role, "content": content}


def _kwargs(
    thinks: bool, instructions: str = "", task: ToolTask | None = None, form: str = ""
) -> Row:
    offered = task.offered if task else ()
    return {
        "custom_instructions": instructions,
        "enable_thinking": thinks,
        "python_tools": [calls.python_tool(tool) for tool in offered] if form == "python" else [],
        "xml_tools": [calls.xml_tool(tool) for tool in offered] if form == "xml" else [],
    }


def _task_check(task: Task, turn: int) -> Row:
    return {"turn": turn, "kind": task.kind, "language": task.language, "result": task.result}


def _tool_check(task: ToolTask, form: str) -> Row:
    call = {"format": form, "name": task.tool.name, "arguments": task.arguments}
    return {"turn": 1, "kind": "tool", "language": "en", **call}


def _held_out_groups(splits: Sequence[ChatSplit]) -> dict[str, list[ChatSplit]]:
    """Which splits each held-out file is drawn from."""
    chats = [split for split in splits if split.config == "SFT"]
    tools = [split for split in chats if STANDINS[split.stand_in].forms]
    plain = [split for split in chats if split not in tools]
    return {
        "think": [split for split in plain if split.mode == "think"],
        "no_think": [split for split in plain if split.mode == "no_think"],
        "tools": tools,
        "preference": [split for split in splits if split.config == "Preference"],
    }


def _round_robin(splits: Sequence[ChatSplit], rows: int, seed: int) -> Iterator[Row]:
    """Held-out rows from each split in turn."""
    streams = [split_rows(split, rows, seed, held_out=True) for split in splits]
    for index in range(rows if streams else 0):
        yield next(streams[index % len(streams)])


def _write(path: Path, rows: Iterator[Row]) -> int:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), "utf-8")
    return len(lines)
