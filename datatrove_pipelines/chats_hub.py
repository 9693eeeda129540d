"""The published post-training chats from a dataset hub, as the JSON lines that training reads.

Rows are streamed, one file a split, `<config>/<split>.jsonl`, renamed when it is whole: a download
that was cut off goes on with the first split that is missing. A thousandth of the prompts is kept
out of all splits, whichever they occur in, and a part of it written to `held_out/` to be scored.

A preference row becomes `prompt`, `chosen` and `rejected` lists of messages that do not overlap;
datasets write them in several ways (see `split_pair`).
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datatrove_pipelines.split import is_held_out
from datatrove_pipelines.standin_chat import ChatError

__all__ = ["HELD_OUT_FRACTION", "split_pair", "write_hub_chats"]

HELD_OUT_FRACTION = 0.001
# Longer prompts are kept out of training all the same, but cost too much to be answered and scored.
SCORED_CHARACTERS = 4000
KINDS = ("think", "no_think", "tools", "preference")
CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
Row = dict[str, Any]


def write_hub_chats(
    folder: Path,
    hub_id: str,
    revision: str,
    splits: Mapping[str, Sequence[str]],
    held_out_rows: int = 500,
    held_out_fraction: float = HELD_OUT_FRACTION,
) -> dict[str, int]:
    """Write the splits of each config; returns rows per file, as write_chats does.

    `hub_id` is a dataset repository, or a local folder of the same layout. `held_out/` gets at most
    `held_out_rows` of each kind. Raises ChatError, naming the split.
    """
    counts = {}
    for config, names in splits.items():
        for split in names:
            name = f"{config.lower()}/{split}"
            file = folder / f"{name}.jsonl"
            if not file.exists():
                rows = _rows(hub_id, revision, config, split)
                _write_split(file, rows, config, held_out_fraction)
            counts[name] = _count(file)
    return counts | _gather_held_out(folder, splits, held_out_rows)


def _rows(hub_id: str, revision: str, config: str, split: str) -> Iterator[Row]:
    from datasets import load_dataset

    try:
        rows = load_dataset(hub_id, name=config, split=split, revision=revision, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield _normal(row, config, f"{split}, row {number}")
    except ChatError:
        raise
    except Exception as error:  # whatever network, hub and formats bring
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ChatError(
            f"{hub_id} ({config}, {split}): {reason}; check recipes/posttrain/splits.yaml and the "
            "connection, then run again: whole splits are kept"
        ) from error


def _normal(row: Row, config: str, where: str) -> Row:
    """The row's own columns, without the nulls that a common table schema puts into messages."""
    kept: Row = {"chat_template_kwargs": row.get("chat_template_kwargs")}
    if config == "Preference":
        kept |= split_pair(row, where)
    else:
        kept["messages"] = [_message(message) for message in row["messages"]]
    kept["source"] = row.get("source")
    return kept


def _message(message: Row) -> Row:
    return {key: value for key, value in message.items() if value is not None}


def split_pair(row: Row, where: str) -> Row:
    """`prompt`, `chosen`, `rejected` without overlap.

    `prompt` may be messages, a text (one user's turn) or absent; `chosen` and `rejected` may repeat
    the prompt. Raises ChatError where the two sides share everything or nothing comes before them.
    """
    sides = {side: [_message(m) for m in row[side]] for side in ("chosen", "rejected")}
    shared: list[Row] = []
    for one, other in zip(sides["chosen"], sides["rejected"], strict=False):
        if one != other:
            break
        shared.append(one)
    given = row.get("prompt")
    if shared:
        prompt = shared
    elif isinstance(given, str):
        prompt = [{"role": "user", "content": given}]
    else:
        prompt = [_message(message) for message in given or ()]
    pair = {side: messages[len(shared) :] for side, messages in sides.items()}
    if not prompt or not all(pair.values()):
        raise ChatError(f"{where}: no prompt, or chosen and rejected are the same; drop the row")
    return {"prompt": prompt, **pair}


def _write_split(file: Path, rows: Iterator[Row], config: str, fraction: float) -> None:
    """Rows to train on into `file`, the others beside it, both whole or absent."""
    file.parent.mkdir(parents=True, exist_ok=True)
    held_out = _held_out_file(file)
    parts = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in (held_out, file)}
    try:
        with (
            parts[file].open("w", encoding="utf-8") as train,
            parts[held_out].open("w", encoding="utf-8") as out,
        ):
            for row in rows:
                target = out if is_held_out(_prompt(row, config), fraction) else train
                target.write(json.dumps(row, ensure_ascii=False) + "\n")
        for path, aside in parts.items():  # the split itself last: it says that both are there
            aside.replace(path)
    except BaseException:
        for aside in parts.values():
            aside.unlink(missing_ok=True)
        raise


def _prompt(row: Row, config: str) -> str:
    """The first user's turn: what the same prompt in another split has in common with it."""
    messages = row["prompt" if config == "Preference" else "messages"]
    return next((str(m.get("content")) for m in messages if m.get("role") == "user"), "")


def _held_out_file(file: Path) -> Path:
    return file.with_name(f"{file.stem}.held_out.jsonl")


def _count(file: Path) -> int:
    with file.open("rb") as lines:
        return sum(1 for _ in lines)


def _kind(row: Row, config: str) -> str:
    if config == "Preference":
        return "preference"
    kwargs = row["chat_template_kwargs"] or {}
    if kwargs.get("xml_tools") or kwargs.get("python_tools"):
        return "tools"
    return "no_think" if kwargs.get("enable_thinking") is False else "think"


def _gather_held_out(
    folder: Path, splits: Mapping[str, Sequence[str]], limit: int
) -> dict[str, int]:
    """The first rows of each kind, taken from the splits in turn, into `held_out/<kind>.jsonl`."""
    found: dict[str, list[list[str]]] = {kind: [] for kind in KINDS}
    for config, names in splits.items():
        if config == "Mid":  # plain text to continue: nothing there is scored
            continue
        for split in names:
            by_kind: dict[str, list[str]] = {kind: [] for kind in KINDS}
            file = _held_out_file(folder / config.lower() / f"{split}.jsonl")
            with file.open(encoding="utf-8", newline="\n") as lines:
                rows = [json.loads(line) for line in lines]
            for row in rows:
                kind = _kind(row, config)
                check = _call_check(row) if kind == "tools" else {}
                if check is not None and _characters(row) <= SCORED_CHARACTERS:
                    scored = {**row, "check": check} if check else row
                    by_kind[kind].append(json.dumps(scored, ensure_ascii=False))
            for kind, texts in by_kind.items():
                found[kind].append(texts)
    (folder / "held_out").mkdir(exist_ok=True)
    counts = {}
    for kind, parts in found.items():
        texts = _in_turn(parts)[:limit]
        aside = folder / "held_out" / f".{kind}.{os.getpid()}"
        aside.write_text("".join(f"{text}\n" for text in texts), "utf-8")
        aside.replace(folder / "held_out" / f"{kind}.jsonl")
        counts[f"held_out/{kind}"] = len(texts)
    return counts


def _call_check(row: Row) -> Row | None:
    """What scores a tool row: the first call of its conversation; None where that is not JSON."""
    for turn, message in enumerate(row["messages"]):
        call = CALL.search(message.get("content") or "")
        if message["role"] != "assistant" or call is None:
            continue
        try:
            value = json.loads(call[1])
            name, arguments = value["name"], value["arguments"]
        except (ValueError, KeyError, TypeError):
            return None
        return {"turn": turn, "kind": "tool", "format": "xml", "name": name, "arguments": arguments}
    return None


def _characters(row: Row) -> int:
    messages = row.get("prompt") or row["messages"]
    return sum(len(m.get("content") or "") for m in messages if m.get("role") != "assistant")


def _in_turn(parts: Sequence[Sequence[str]]) -> list[str]:
    longest = max(map(len, parts), default=0)
    return [part[index] for index in range(longest) for part in parts if index < len(part)]
