"""The published post-training chats from a dataset hub, as the JSON lines that training reads.

Rows are streamed, one file per split, `<config>/<split>.jsonl`, renamed when whole: a download
that was cut off continues with the first missing split. A thousandth of the prompts is kept
out of all splits, whichever they occur in, and a part of it written to `held_out/` to be scored.

A preference row becomes `prompt`, `chosen` and `rejected` lists of messages that do not overlap;
datasets write them in several ways (see `split_pair`).
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from datatrove_pipelines.executors import run_in_threads
from datatrove_pipelines.held_out import is_held_out
from ground.errors import UserError
from ground.files import open_aside, read_json_lines, write_text
from ground.hub import end_silence, refusal

HELD_OUT_FRACTION = 0.001
# Longer prompts are also kept out of training, but cost too much to answer and score.
SCORED_CHARACTERS = 4000
KINDS = ("think", "no_think", "tools", "preference")
CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
Row = dict[str, Any]


def write_hub_chats(
    folder: Path,
    hub_id: str,
    revision: str,
    splits: Mapping[str, Sequence[str]],
    most_rows: Mapping[str, int] | None = None,
    held_out_rows: int = 500,
    held_out_fraction: float = HELD_OUT_FRACTION,
) -> dict[str, int]:
    """Write the splits of each config; returns rows per file, as write_chats does.

    `hub_id` is a dataset repository, or a local folder of the same layout. `most_rows` of a split
    are read, all where it is not named. `held_out/` gets at most `held_out_rows` of each kind. Raises UserError, naming the split.
    """
    counts = {}
    every = [(config, split) for config, names in splits.items() for split in names]
    files = {(config, split): folder / config.lower() / f"{split}.jsonl" for config, split in every}
    # A row of each first, so that a split that cannot be read is known before others are read.
    missing = [one for one in every if not files[one].exists()]
    run_in_threads(lambda one: next(_rows(hub_id, revision, *one), None), missing)
    for config, split in every:
        file = files[config, split]
        if not file.exists():
            rows = islice(_rows(hub_id, revision, config, split), (most_rows or {}).get(split))
            _write_split(file, rows, config, held_out_fraction)
        counts[f"{config.lower()}/{split}"] = _count(file)
    return counts | _gather_held_out(folder, splits, held_out_rows)


def write_own_chats(folder: Path, config: str, split: str, source: Path, thinks: bool) -> int:
    """Copy a JSON-lines file of one's own to where training reads the split; its rows.

    A row has `messages`, or `prompt`, `chosen` and `rejected` of a pair, as the published sets have;
    one that does not say `enable_thinking` is in the split's mode.
    Raises UserError, naming the line.
    """
    with open_aside(folder / config.lower() / f"{split}.jsonl") as target:
        number = 0
        for number, row in enumerate(read_json_lines(source, "mend it"), start=1):
            where = f"{source}, line {number}"
            try:
                normal = _normal(row, config, where)
            except (KeyError, TypeError, AttributeError) as error:
                wanted = "prompt, chosen and rejected" if config == "Preference" else "messages"
                raise UserError(f"{where}: not a row with {wanted} ({error!r}); mend it") from error
            kwargs = normal["chat_template_kwargs"]
            if isinstance(kwargs, dict | None):  # else training refuses the row
                normal["chat_template_kwargs"] = {"enable_thinking": thinks, **(kwargs or {})}
            target.write(json.dumps(normal, ensure_ascii=False) + "\n")
        if not number:
            raise UserError(f"{source}: empty; write a row a line")
    return number


def _rows(hub_id: str, revision: str, config: str, split: str) -> Iterator[Row]:
    from datasets import load_dataset

    end_silence()
    try:
        rows = load_dataset(hub_id, name=config, split=split, revision=revision, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield _normal(row, config, f"{split}, row {number}")
    except UserError:
        raise
    except Exception as error:  # any error of network, hub or format
        remedy = "check recipes/posttrain/splits.yaml, then run again: whole splits are kept"
        raise refusal(error, f"{hub_id}@{revision} ({config}, {split})", remedy) from error


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
    the prompt. Raises UserError where the two sides share everything or nothing comes before them.
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
        raise UserError(f"{where}: no prompt, or chosen and rejected are the same; drop the row")
    return {"prompt": prompt, **pair}


def _write_split(file: Path, rows: Iterator[Row], config: str, fraction: float) -> None:
    """Rows to train on into `file`, the others beside it, both whole or absent."""
    # The contexts exit in turn, the split's last: where the split is, both files are.
    with open_aside(file) as train, open_aside(_held_out_file(file)) as out:
        for row in rows:
            target = out if is_held_out(_prompt(row, config), fraction) else train
            target.write(json.dumps(row, ensure_ascii=False) + "\n")


def _prompt(row: Row, config: str) -> str:
    """The first user's turn, by which the same prompt in another split is recognised."""
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
    parts: dict[str, list[list[Row]]] = {kind: [] for kind in KINDS}
    for config, names in splits.items():
        if config == "Mid":  # plain text to continue: nothing there is scored
            continue
        for split in names:
            rows = read_json_lines(_held_out_file(folder / config.lower() / f"{split}.jsonl"))
            for kind in KINDS:
                of_kind = (_scored(row, kind) for row in rows if _kind(row, config) == kind)
                parts[kind].append([row for row in of_kind if row])
    counts = {}
    for kind in KINDS:
        in_turn = (row for turn in zip_longest(*parts[kind]) for row in turn if row)
        texts = [json.dumps(row, ensure_ascii=False) + "\n" for row in islice(in_turn, limit)]
        write_text(folder / "held_out" / f"{kind}.jsonl", "".join(texts))
        counts[f"held_out/{kind}"] = len(texts)
    return counts


def _scored(row: Row, kind: str) -> Row | None:
    """The row with what scores its answer; None where it is too long or its call is not JSON."""
    if _characters(row) > SCORED_CHARACTERS:
        return None
    if kind != "tools":
        return row
    check = _call_check(row)
    return {**row, "check": check} if check else None


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
