"""Prompts of a split answered by a larger model, as the JSON lines that post-training reads.

answers   every turn of a conversation again, in the other mode (published: Qwen3-32B with reasoning)
pairs     the last turn by two models, the larger one's chosen (Qwen3-32B over Qwen3-0.6B)

A prompt ends as a row or as a counted reason, such as an answer that was cut off. One that ends as
neither was lost, which is an error: the runner logs a row that it could not write, and goes on.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datatrove_pipelines.duplicates import SeenTexts
from ground.errors import UserError
from ground.files import digest, open_aside, read_json_lines
from ground.modes import CLOSE, OPEN, keeps_mode

if TYPE_CHECKING:
    from datatrove.data import Document

    from datatrove_pipelines.synthetic.server import Generate, Server

Row = dict[str, Any]
Message = dict[str, str]


@dataclass(frozen=True)
class Sampling:
    """Qwen3's own for reasoning (model card): 0.6 and 0.95."""

    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 16384


@dataclass(frozen=True)
class SyntheticJob:
    prompts: Path  # JSON lines with `messages`, or `prompt` of pairs
    thinks: bool
    answers: "Server"
    rejected: "Server | None" = None  # None: no pairs
    sampling: Sampling = Sampling()
    limit: int = 0  # prompts; 0: all
    source: str = ""  # what the rows name as theirs

    def key(self) -> str:
        """A hash of all that the answers depend on; a server may move."""
        models = [one.model for one in (self.answers, self.rejected) if one]
        values = [digest(self.prompts, 16), self.thinks, models, repr(self.sampling), self.limit]
        return blake2b(json.dumps(values).encode(), digest_size=8).hexdigest()


def synthesize(job: SyntheticJob, file: Path, progress: Path) -> dict[str, int]:
    """Write the rows into `file`, whole or not at all; counts of `rows` and of what was left out.

    `progress` keeps what is answered of a run that was stopped. Raises UserError for prompts that
    cannot be read or were lost, Outage where a server does not answer.
    """
    from datatrove_pipelines.synthetic.server import check_ready, run

    counts, said = Counter[str](rows=0), list[str]()
    documents = prompts(job, counts)
    if not documents:
        raise UserError(f"{job.prompts}: no prompt in it to answer ({_shown(counts)})")
    folder = progress / job.key()
    servers = [one for one in (job.answers, job.rejected) if one]
    for one in servers:
        check_ready(one)
    # A pair is of one prompt, so that its last turn alone is answered.
    rollout = partial(_answer_last if job.rejected else _answer_turns, thinks=job.thinks)
    sampling = vars(job.sampling)
    chunks = [
        run(one, rollout, iter(documents), folder / str(number), sampling)
        for number, one in enumerate(servers)
    ]
    with open_aside(file) as lines:
        for row in _rows(job, documents, list(zip(*chunks, strict=True)), counts, said):
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
        if not counts["rows"]:
            shutil.rmtree(folder)
            more = f"; the server said: {said[0]}" if said else ""
            raise UserError(
                f"{job.prompts}: no prompt of {len(documents)} gave a row ({_shown(counts)}){more}; "
                "correct MODEL=, the row's mode or its max_tokens"
            )
    return dict(counts)


def _shown(counts: Counter[str]) -> str:
    return ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items())


def prompts(job: SyntheticJob, counts: Counter[str]) -> "list[Document]":
    """Each prompt once, as a document whose id is its line's number."""
    from datatrove.data import Document

    documents, seen = list[Document](), SeenTexts()
    for number, row in enumerate(read_json_lines(job.prompts), start=1):
        if job.limit and len(documents) == job.limit:
            break
        messages = conversation(row)
        if any(message["role"] not in ("system", "user", "assistant") for message in messages) or (
            _settings(row).get("xml_tools") or _settings(row).get("python_tools")
        ):
            counts["with_tools"] += 1  # which nobody would run
        elif not any(message["role"] == "user" for message in messages):
            counts["without_prompt"] += 1
        elif seen.has(json.dumps(_asked(messages), ensure_ascii=False)):
            counts["duplicates"] += 1
        else:
            text = next(m["content"] for m in messages if m["role"] == "user")
            documents.append(Document(text, str(number), metadata={"messages": messages}))
    return documents


def conversation(row: Row) -> list[Message]:
    """A row's messages, its system text first, which the rows keep among the template's settings."""
    messages = row.get("messages") or row.get("prompt") or []
    system = _settings(row).get("custom_instructions")
    return [*([{"role": "system", "content": system}] if system else []), *messages]


def _settings(row: Row) -> dict[str, Any]:
    return row.get("chat_template_kwargs") or {}


def _asked(messages: Sequence[Message]) -> list[str]:
    """What is said before any model's turn: two conversations that ask the same are one prompt."""
    return [message["content"] for message in messages if message["role"] != "assistant"]


async def _answer_turns(document: "Document", generate: "Generate", thinks: bool) -> Row:
    """The conversation with each of the assistant's turns written anew."""
    given, messages = document.metadata["messages"], list[Message]()
    for message in given if given[-1]["role"] == "assistant" else [*given, {"role": "assistant"}]:
        if message["role"] != "assistant":
            messages.append({"role": message["role"], "content": message["content"]})
            continue
        turn = await _turn(messages, generate, thinks)
        if "left_out" in turn:
            return turn
        messages.append({"role": "assistant", "content": turn["content"]})
    return {"messages": messages}


async def _answer_last(document: "Document", generate: "Generate", thinks: bool) -> Row:
    """The prompt up to the last user's turn, and the answer to it."""
    messages = document.metadata["messages"]
    last = max(n for n, message in enumerate(messages) if message["role"] == "user")
    asked = [{"role": m["role"], "content": m["content"]} for m in messages[: last + 1]]
    turn = await _turn(asked, generate, thinks)
    return turn if "left_out" in turn else {"prompt": asked, "answer": turn["content"]}


async def _turn(messages: list[Message], generate: "Generate", thinks: bool) -> Row:
    """{"content": text}, or {"left_out": reason}."""
    from datatrove.pipeline.inference.types import InferenceError

    # Qwen3's and SmolLM3's templates read the mode here (vLLM, SGLang, transformers serve).
    settings = {"enable_thinking": thinks}
    try:
        result = await generate({"messages": list(messages), "chat_template_kwargs": settings})
    except InferenceError as error:
        if "BadRequestError" in str(error.error):  # too long for the model, for one
            return {"left_out": "refused_by_the_server", "said": str(error.error)[:200]}
        raise
    if result.finish_reason == "length":
        return {"left_out": "cut_off"}
    content = written(result.text, result.reasoning, thinks)
    return {"content": content} if content else {"left_out": "not_in_its_mode"}


def written(text: str, reasoning: str, thinks: bool) -> str:
    """An answer as the chats write one; empty where it does not keep the mode.

    A server with a parser of reasoning returns it apart; without one it is in the text, where its
    opening tag may have been part of the prompt.
    """
    if not reasoning:
        before, closed, after = text.rpartition(CLOSE)
        reasoning, text = (before.strip().removeprefix(OPEN), after) if closed else ("", text)
    reasoning, text = reasoning.strip(), text.strip()
    content = f"{OPEN}\n{reasoning}\n{CLOSE}\n\n{text}" if reasoning else text
    return content if keeps_mode(content, thinks) else ""


def _rows(
    job: SyntheticJob,
    documents: "Sequence[Document]",
    chunks: Sequence[tuple[Path, ...]],
    counts: Counter[str],
    said: list[str],
) -> Iterator[Row]:
    """The rows in the prompts' order; `said` gets a server's words to each prompt it refused."""
    expected = iter(documents)
    for files in chunks:
        sides = [_results(file) for file in files]
        for _ in range(max(map(len, sides))):
            one = next(expected)
            results = [side.get(one.id) for side in sides]
            if None in results:
                _lost(job, one)
            said += [result["said"] for result in results if result and "said" in result]
            yield from _row(job, [result for result in results if result], counts)
    if (one := next(expected, None)) is not None:
        _lost(job, one)


def _lost(job: SyntheticJob, document: "Document") -> None:
    where = f"{job.prompts}, line {document.id}"
    raise UserError(
        f"{where}: its answer was lost; run the same command again, on a disk with room"
    )


def _results(file: Path) -> dict[str, Row]:
    from datatrove_pipelines.synthetic.server import RESULT

    return {row["id"]: row["metadata"][RESULT][0] for row in read_json_lines(file)}


def _row(job: SyntheticJob, results: Sequence[Row], counts: Counter[str]) -> Iterator[Row]:
    reason = next((result["left_out"] for result in results if "left_out" in result), None)
    if reason is None and job.rejected and results[0]["answer"] == results[1]["answer"]:
        reason = "same_answers"
    if reason:
        counts[reason] += 1
        return
    counts["rows"] += 1
    messages: list[Message] = results[0].get("messages") or results[0]["prompt"]
    settings: Row = {"enable_thinking": job.thinks}
    if messages[0]["role"] == "system":
        settings["custom_instructions"] = messages[0]["content"]
        messages = messages[1:]
    row: Row = {"chat_template_kwargs": settings, "source": job.source}
    if job.rejected is None:
        yield row | {"messages": messages}
        return
    chosen, rejected = ([{"role": "assistant", "content": r["answer"]}] for r in results)
    yield row | {"prompt": messages, "chosen": chosen, "rejected": rejected}
